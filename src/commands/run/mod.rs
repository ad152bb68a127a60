//! `gpurun run`: from what was typed to the command's exit code.

mod capabilities;
mod devices;
mod env_file;
pub mod environment;
pub mod host_mounts;
mod limits;
mod mount_option;
pub mod mounts;
mod names;
mod namespaces;
mod security;
pub mod sizes;
mod stop_signal;
mod tmpfs;

use super::Context;
use crate::{
    apply::{
        container::{
            self,
            cgroup::Limits,
            identity::{self, Caller, Identity, IdentityRequest},
            image_volumes,
            spec::{Container, Process, Volume},
        },
        placement::{self, DriverMount},
        rootfs::{Kind, Layers, Mounts, not_plain},
    },
    cli::{self, Run},
    error::{Code, Error, OrFail, Result},
    image::{Image, ImageReference, Ownership, Platform, ScratchDir, Store},
    inventory::binfmt,
    plan::{self, Injection},
    request::DeviceRequest,
    sys::bpf::DeviceRule,
    vocabulary::EnvVar,
};
use environment::UserEnvironment;
use rustix::io::Errno;
use std::{
    collections::HashMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

/// An option that cannot be understood.
fn usage(what: impl Into<String>) -> Error {
    Error::new(Code::Usage, what)
}

/// Runs the container; the command's exit code.
pub fn run(context: &Context, args: &Run) -> Result<u8> {
    let options = Options::read(args)?;
    let store = context.store()?;
    let reference = image_reference(&args.image)?;
    let pull = context.pull(args.pull, &args.pulling, args.quiet)?;
    can_run(context, &pull.platform)?;
    let image = Image::open(&reference, &store, &pull)?;
    let user_env = environment::environment(args)?;
    // Whether the host can run the image is known before a layer is fetched or unpacked.
    let injection = injection(context, args, &options, &image, &user_env)?;
    warn_of_what_is_left_behind(&user_env.set);
    for warning in &injection.warnings {
        tracing::warn!("{warning}");
    }
    if image.config().has_healthcheck && !args.no_healthcheck {
        tracing::warn!(
            "the image has a HEALTHCHECK, and gpurun does not run it yet; --no-healthcheck silences this"
        );
    }
    let mut volumes = if reference == ImageReference::Host { host_file_systems()? } else { Vec::new() };
    volumes.extend(mounts::volumes(args)?);
    let layers = Layers::open(image.root(&store)?)?;
    image.check_opened(layers.lowers().map(|(_, opened)| opened))?;
    let container =
        container(context, args, options, &image, user_env, volumes, injection, &layers, store.scratch()?)?;
    let id_file = args.cidfile.as_deref().map(|path| IdFile::create(path, &container.id)).transpose()?;
    let result = container::run(container, layers);
    if result.is_err() {
        id_file.map_or(Ok(()), IdFile::remove)?;
    }
    result
}

/// The parsed options, before anything is fetched or made.
#[derive(Debug)]
pub struct Options {
    namespaces: namespaces::Namespaces,
    security: security::Security,
    devices: devices::Devices,
    device_rules: Vec<DeviceRule>,
    limits: Limits,
    gpus: Option<String>,
}

impl Options {
    /// Parses the options that do not depend on the image.
    ///
    /// # Errors
    /// [`Code::Usage`] and others, with a fix.
    pub fn read(args: &Run) -> Result<Self> {
        names::check(args)?;
        if let Some(name) = args.runtime.as_deref().filter(|name| !RUNTIMES.contains(name)) {
            return Err(usage(format!("--runtime {name} cannot be served: gpurun is the runtime"))
                .fix(format!("leave it out; to run a container with {name} use Docker or Podman")));
        }
        if let Some(score) = args.oom_score_adj.filter(|score| !(-1000..=1000).contains(score)) {
            return Err(usage(format!("--oom-score-adj {score} is out of range"))
                .fix("write a number from -1000 to 1000"));
        }
        for (option, name) in [("--hostname", &args.hostname), ("--domainname", &args.domainname)] {
            if let Some(name) = name.as_deref().filter(|name| name.len() > NAME_MAX) {
                return Err(usage(format!("{option} has {} letters", name.len()))
                    .fix(format!("write {option} with at most {NAME_MAX} letters")));
            }
        }
        // Before an image is fetched.
        working_directory(args.workdir.as_deref(), "")?;
        let devices = devices::devices(args)?;
        let gpus = gpus(args, &devices.gpus)?;
        DeviceRequest::check_option(gpus.as_deref())?;
        Ok(Self {
            namespaces: namespaces::namespaces(args)?,
            security: security::security(args)?,
            gpus,
            devices,
            device_rules: devices::rules(args)?,
            limits: limits::limits(args)?,
        })
    }
}

/// The longest name of a host or domain, in bytes (`__NEW_UTS_LEN` of linux/utsname.h).
const NAME_MAX: usize = 64;

/// Names of runtimes whose containers are like gpurun's.
const RUNTIMES: [&str; 8] = [
    "nvidia",
    "nvidia-container-runtime",
    "gpurun",
    "gpurun-runtime",
    "runc",
    "crun",
    "io.containerd.runc.v2",
    "",
];

/// The value of `--gpus`, also from `--nv` and the CDI names of `--device`.
fn gpus(args: &Run, cdi: &[String]) -> Result<Option<String>> {
    let named = if cdi.iter().any(|name| name == "all") {
        Some("all".to_owned())
    } else {
        (!cdi.is_empty()).then(|| format!("\"device={}\"", cdi.join(",")))
    };
    match (&args.gpus, named) {
        (None, None) => Ok(args.nv.then(|| "all".to_owned())),
        (None, Some(named)) => Ok(Some(named)),
        (Some(typed), None) => Ok(Some(typed.clone())),
        (Some(typed), Some(_)) if typed == "all" => Ok(Some(typed.clone())),
        (Some(typed), Some(_)) => {
            Err(usage(format!("--gpus {typed} and --device nvidia.com/gpu=… both ask for GPUs"))
                .fix("leave out --gpus or --device"))
        }
    }
}

/// Warns about variables of MPI and Slurm that hold a process's rank. A container does not get them by default, and without
/// them every process runs as a job of its own.
fn warn_of_what_is_left_behind(user_env: &[EnvVar]) {
    const RANKS: [(&str, &str); 6] = [
        ("OMPI_COMM_WORLD_RANK", "OMPI_*"),
        ("PMIX_RANK", "PMIX_*"),
        ("PMI_RANK", "PMI_*"),
        ("MPI_LOCALRANKID", "MPI_*"),
        ("SLURM_PROCID", "SLURM_*"),
        ("FLUX_TASK_RANK", "FLUX_*"),
    ];
    let left: Vec<&str> = RANKS
        .into_iter()
        .filter(|(name, _)| {
            std::env::var_os(name).is_some() && !user_env.iter().any(|(typed, _)| typed == name)
        })
        .map(|(_, pattern)| pattern)
        .collect();
    if !left.is_empty() {
        let options: Vec<String> = left.iter().map(|pattern| format!("-e '{pattern}'")).collect();
        tracing::warn!(
            "this process is one of a parallel job, and its rank does not reach the container; pass it: {}",
            options.join(" ")
        );
    }
}

/// `--cidfile`
#[derive(Debug)]
struct IdFile(PathBuf);

impl IdFile {
    /// Writes a new file. As in Docker an existing file is an error, because it may belong to a running container.
    fn create(path: &Path, id: &str) -> Result<Self> {
        let write = || {
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path)?;
            std::io::Write::write_all(&mut file, id.as_bytes())
        };
        write().or_fail(Code::Usage, || format!("--cidfile {} cannot be made", path.display())).map_err(
            |error| error.fix("name a new file in a directory that you may write: `--cidfile FILE`"),
        )?;
        Ok(Self(path.to_owned()))
    }

    fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.0)
            .or_fail(Code::Usage, || format!("--cidfile {} cannot be removed", self.0.display()))
    }
}

/// Parses the image.
///
/// # Errors
/// If it is the path of a local file or directory: a registry may have an image of that name.
pub fn image_reference(typed: &str) -> Result<ImageReference> {
    match cli::path_without_kind(typed) {
        Some(error) => Err(error),
        None => ImageReference::parse(typed),
    }
}

/// Before anything is fetched.
fn can_run(context: &Context, platform: &Platform) -> Result<()> {
    if platform.is_native()
        || platform.elf_machine().is_some_and(|machine| binfmt::emulates(&context.host, machine))
    {
        return Ok(());
    }
    Err(Error::new(Code::WrongPlatform, format!("this machine cannot run an image for {platform}"))
        .cause("its processor is another one, and no emulator is registered that works in containers")
        .fix(
            "leave --platform out; `gpurun pull --platform` fetches for another machine; to emulate, install qemu-user-static \
             (binfmt_misc, flag F)",
        ))
}

/// What the container gets of the driver; nothing, and no look at the host, where no GPU was asked for.
pub fn injection(
    context: &Context,
    args: &Run,
    options: &Options,
    image: &Image,
    user_env: &UserEnvironment,
) -> Result<Injection> {
    /// The variable that asks for GPUs.
    const VISIBLE: &str = "NVIDIA_VISIBLE_DEVICES";
    let config = image.config();
    let image_env = user_env.left_of(&config.env);
    let mut user_env = user_env.set.clone();
    // With NVIDIA's runtime the image's variables request GPUs.
    if args.runtime.as_deref().is_some_and(|name| name.starts_with("nvidia"))
        && !user_env.iter().any(|(name, _)| name == VISIBLE)
    {
        user_env.extend(image_env.iter().find(|(name, _)| name == VISIBLE).cloned());
    }
    let Some(request) =
        DeviceRequest::from_cli(options.gpus.as_deref(), &user_env, &image_env, &config.labels)?
    else {
        return Ok(Injection::default());
    };
    let policy = plan::Policy {
        privileged: capabilities::capabilities(args, true)? & capabilities::SYS_ADMIN != 0,
        ..context.config.policy()?
    };
    context.plan(&request, &policy)
}

// Only one call site, with the result of each step.
#[allow(clippy::too_many_arguments)]
fn container(
    context: &Context,
    args: &Run,
    options: Options,
    image: &Image,
    user_env: UserEnvironment,
    volumes: Vec<Volume>,
    injection: Injection,
    layers: &Layers,
    scratch: ScratchDir,
) -> Result<Container> {
    let config = image.config();
    let Options { namespaces, security, devices, device_rules, limits, gpus: _ } = options;
    let caller = Caller::current()?;
    let own_ids = format!("{}:{}", caller.uid, caller.gid);
    let image_env = user_env.left_of(&config.env);
    let typed_home =
        user_env.set.iter().rev().find(|(name, _)| name == "HOME").map(|(_, value)| value.as_str());
    let request = IdentityRequest {
        image_user: &config.user,
        user: args.user.as_deref().or_else(|| namespaces.keep_id.then_some(own_ids.as_str())),
        group_add: &args.group_add,
        home: typed_home,
        image_env: &image_env,
        layers,
        volumes: &volumes,
        read_only: args.read_only,
        injection: &injection,
    };
    let (user, id_map) = Identity::resolve(&request, &caller, image.root_is_caller())?;
    mounts::check_targets(&volumes, layers)?;
    if image.root_is_caller() {
        check_owners_as_in_podman(&user, &caller)?;
    }
    let declared: Vec<String> = mounts::anonymous(args)?
        .into_iter()
        .map(|path| path.to_string_lossy().into_owned())
        .chain(config.volumes.iter().cloned())
        .collect();
    let image_volumes = image_volumes::paths(&declared, &user.home, args.read_only, &volumes)?;
    let rootless = caller.euid != 0;
    let placement = placement::place(layers, &mounts(&volumes, layers)?, &injection, DriverMount::ByUs)?;
    for note in &placement.notes {
        tracing::warn!("{note}");
    }
    let argv = command(args, &config.entrypoint, &config.cmd).ok_or_else(|| {
        let what = match &args.entrypoint {
            Some(_) => "--entrypoint \"\" drops the image's command, and no other is named",
            None => "the image has no command of its own",
        };
        Error::new(Code::Usage, what).fix("name one after the image: `gpurun run IMAGE sh`")
    })?;
    if argv[0].is_empty() {
        return Err(Error::new(Code::CommandNotFound, "the command is an empty word")
            .cause("a variable of the shell that is not set leaves nothing")
            .fix("name a command: gpurun run IMAGE sh"));
    }
    let cwd = working_directory(args.workdir.as_deref(), &config.working_dir)?;
    if args.tty && args.interactive && !rustix::termios::isatty(rustix::stdio::stdin()) {
        return Err(Error::new(Code::Usage, "-i -t needs a terminal, and standard input is not a terminal")
            .fix("write -i in place of -it: gpurun run -i …"));
    }
    let own_name = !namespaces.host_network && !namespaces.host_uts;
    let hostname = args.hostname.clone().or_else(|| own_name.then(|| "gpurun".to_owned()));
    let stop_signal = match (&args.stop_signal, &config.stop_signal) {
        (Some(typed), _) => Some(stop_signal::number(typed).ok_or_else(|| {
            usage(format!("--stop-signal {typed:?} is not a signal"))
                .fix("write its name or number: `--stop-signal TERM`, `--stop-signal 15`")
        })?),
        (None, images) => images.as_deref().and_then(stop_signal::number),
    };
    let host_name =
        hostname.clone().unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
    if !rootless {
        capabilities::can_give(args)?;
    }
    Ok(Container {
        id: new_id()?,
        read_only: args.read_only,
        scratch,
        state_dir: context.state_dir.clone(),
        hostname,
        domainname: args.domainname.clone(),
        host_uts: namespaces.host_uts,
        host_pid: namespaces.host_pid,
        host_cgroups: namespaces.host_cgroups,
        sysctls: namespaces.sysctls,
        hosts: names::hosts(args, namespaces.host_network)?,
        dns: names::dns(args)?,
        host_network: namespaces.host_network,
        network_requested: !args.network.is_empty(),
        host_ipc: namespaces.ipc == namespaces::Ipc::Host,
        shm_size: match namespaces.ipc {
            namespaces::Ipc::WithoutShm => None,
            namespaces::Ipc::Private | namespaces::Ipc::Host => Some(shm_size(context, args, &limits)?),
        },
        devices: devices.nodes,
        device_rules,
        masked_paths: security.masked_paths,
        all_devices: security.privileged,
        pid_file: args.pidfile.clone(),
        volumes,
        image_volumes,
        placement,
        limits,
        privileged: Store::ownership() == Ownership::Image,
        id_map,
        process: Process {
            env: process_environment(
                &host_name,
                &image_env,
                &injection.env,
                user_env.set,
                &user.home,
                args.tty,
            ),
            argv,
            cwd,
            // A user without root may still get some by a program's file, where that is allowed.
            capabilities: capabilities::capabilities(args, user.uid == 0 || !security.no_new_privileges)?,
            user,
            tty: args.tty,
            interactive: args.interactive || names::attaches_stdin(args),
            init: args.init,
            stop_signal,
            rlimits: limits::rlimits(&args.ulimit)?,
            seccomp: security.seccomp,
            no_new_privileges: security.no_new_privileges,
            oom_score_adj: args.oom_score_adj,
        },
        injection,
    })
}

/// Where the command starts. A relative path is refused, as Docker refuses it.
fn working_directory(typed: Option<&Path>, images: &str) -> Result<PathBuf> {
    if let Some(typed) = typed {
        if typed.is_absolute() {
            return Ok(typed.into());
        }
        let shown = typed.display().to_string();
        let error = usage(format!("the working directory {shown} is not absolute"));
        return Err(if shown.starts_with(['~', '$']) {
            error
                .cause("the shell of the container, which knows its HOME and variables, has not started yet")
                .fix("write the path in the container: -w /root")
        } else {
            let inner = shown.trim_start_matches("./").trim_start_matches('.').trim_start_matches('/');
            error.fix(format!("write its whole path in the container: -w /{inner}"))
        });
    }
    match images {
        "" => Ok("/".into()),
        images if images.starts_with('/') => Ok(images.into()),
        images => Err(usage(format!("the image's working directory {images} is not absolute"))
            .fix(format!("write its whole path in the container: -w /{images}"))),
    }
}

/// What will be mounted over the container's root before the driver is.
///
/// # Errors
/// [`Code::Rootfs`] if the image has a link in the place of /dev, /proc or /sys. One that leads nowhere would be hidden by our
/// directory, and the device nodes would be where it leads.
fn mounts(volumes: &[Volume], root: &Layers) -> Result<Mounts> {
    let mut mounts = Mounts::default();
    for (path, kind) in [("/proc", Kind::Kernel), ("/sys", Kind::Kernel), ("/dev", Kind::Memory)] {
        let path = Path::new(path);
        if root.leads_elsewhere(path) {
            return Err(not_plain(path, Errno::LOOP));
        }
        mounts.add(root, path, kind, false);
    }
    for volume in volumes {
        match volume {
            Volume::Bind { source, target, read_only, .. } => {
                mounts.add(root, target, Kind::Volume { source: Some(source.clone()) }, *read_only);
            }
            // Device nodes are made earlier, and this mount would hide them.
            Volume::Tmpfs { target, .. } if target.starts_with("/dev") => {
                mounts.add(root, target, Kind::Kernel, false);
            }
            Volume::Tmpfs { target, flags, .. } => mounts.add(root, target, Kind::Memory, flags.read_only),
        }
    }
    Ok(mounts)
}

/// The command: `--entrypoint` or the image's, followed by the typed arguments or the image's. `None` if both are missing.
fn command(args: &Run, entrypoint: &[String], cmd: &[String]) -> Option<Vec<OsString>> {
    let images = |words: &[String]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let typed = args.command.clone();
    let (front, back) = match &args.entrypoint {
        // As in Docker, --entrypoint drops the image's arguments as well, and an empty one is none.
        Some(entry) => (if entry.is_empty() { Vec::new() } else { vec![entry.into()] }, typed),
        None if typed.is_empty() => (images(entrypoint), images(cmd)),
        None => (images(entrypoint), typed),
    };
    let argv: Vec<OsString> = front.into_iter().chain(back).collect();
    (!argv.is_empty()).then_some(argv)
}

/// In an ordinary user's Podman the caller owns what is root's in the image, and his subordinate ids the rest. A container has
/// the same owners where its root is the caller, with Podman's ids beside.
fn check_owners_as_in_podman(user: &Identity, caller: &Caller) -> Result<()> {
    let refused = |cause: String| {
        Error::new(Code::User, "the owners of the image's files would be wrong")
            .cause("it lies in your Podman, where files of the image's root are yours")
            .cause(cause)
    };
    if (user.uid, user.gid) != (0, 0) {
        let cause = format!("the container's user, who is you, would be {}:{}", user.uid, user.gid);
        return Err(refused(cause).fix(
            "-u 0; or have the image in gpurun's own store: podman save --format oci-archive, and run oci-archive:FILE",
        ));
    }
    if !identity::are_as_podman_maps_them(caller) {
        return Err(refused("/etc/subuid or /etc/subgid has several ranges for you, or a short one".into()).fix(
            "give one range of 65536 ids; or have the image in gpurun's own store: podman save --format oci-archive",
        ));
    }
    Ok(())
}

/// The image's variables, the driver's, the user's: the last word is the user's.
fn process_environment(
    host_name: &str,
    image: &[EnvVar],
    driver: &[EnvVar],
    user: Vec<EnvVar>,
    home: &Path,
    tty: bool,
) -> Vec<EnvVar> {
    let host_name = ("HOSTNAME".to_owned(), host_name.to_owned());
    let path = ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    let terminal = tty.then(|| ("TERM".to_owned(), "xterm".to_owned()));
    let mut all: Vec<EnvVar> = Vec::new();
    // An image may name a million.
    let mut places: HashMap<String, usize> = HashMap::new();
    // Already decided from the options and the image.
    let home = ("HOME".to_owned(), home.to_string_lossy().into_owned());
    for (name, value) in [path, host_name]
        .into_iter()
        .chain(terminal)
        .chain(image.iter().chain(driver).cloned())
        .chain(user)
        .chain([home])
    {
        if let Some(&place) = places.get(&name) {
            all[place].1 = value;
        } else {
            places.insert(name.clone(), all.len());
            all.push((name, value));
        }
    }
    all
}

/// What `--shm-size` says, else the configuration, else half of the memory that the container may use.
fn shm_size(context: &Context, args: &Run, limits: &Limits) -> Result<u64> {
    // `keep` speaks of what an engine chose; here there is none.
    let configured = context.config.shm_size.as_deref().filter(|size| !["auto", "keep"].contains(size));
    match (args.shm_size.as_deref(), configured) {
        (Some(size), _) => sizes::size("--shm-size", size),
        (None, Some(size)) => sizes::size("shm-size", size),
        (None, None) => {
            let system = rustix::system::sysinfo();
            // sysinfo(2) counts in units of mem_unit bytes, and its field is as wide as the machine's word.
            #[allow(clippy::useless_conversion)]
            let memory = u64::from(system.totalram).saturating_mul(u64::from(system.mem_unit));
            Ok(limits.memory.map_or(memory, |limit| limit.min(memory)) / 2)
        }
    }
}

/// 48 random bits.
fn new_id() -> Result<String> {
    let mut bytes = [0u8; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .or_fail(Code::Internal, || "getrandom failed")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// `host:` is the host's whole tree, and overlayfs shows of a lower directory only what lies on its own file system: the
/// others are mounted beside, read-only.
fn host_file_systems() -> Result<Vec<Volume>> {
    let mounts = std::fs::read("/proc/self/mountinfo")
        .or_fail(Code::Inventory, || "the host's mounts cannot be read")?;
    Ok(host_mounts::host_mounts(&mounts)
        .into_iter()
        // What the caller cannot reach on the host he does not get in the container.
        .filter(|path| std::fs::metadata(path).is_ok())
        .map(|path| Volume::Bind {
            source: path.clone(),
            target: path,
            read_only: true,
            recursive: true,
            receives_mounts: false,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `gpurun run WORDS rootfs:/x`
    pub(super) fn run(words: &[&str]) -> Run {
        let line = ["gpurun", "run"].into_iter().chain(words.iter().copied()).chain(["rootfs:/x"]);
        let line: Vec<OsString> = line.map(OsString::from).collect();
        match cli::parse(&line).request {
            Ok(cli::Request::Run(_, run)) => *run,
            other => panic!("{words:?}: {other:?}"),
        }
    }

    #[test]
    fn the_working_directory_is_absolute() {
        let of = |typed: Option<&str>, images| working_directory(typed.map(Path::new), images);
        assert_eq!(of(None, "").unwrap(), Path::new("/"));
        assert_eq!(of(None, "/srv").unwrap(), Path::new("/srv"));
        assert_eq!(of(Some("/w"), "srv").unwrap(), Path::new("/w"));
        for (typed, images) in [
            (Some("w"), "/srv"),
            (Some("./w"), "/srv"),
            (Some("~/w"), ""),
            (Some("$HOME"), ""),
            (None, "srv"),
        ] {
            let error = of(typed, images).unwrap_err();
            assert!(error.fix_line().contains("-w /"), "{error}");
        }
    }

    #[test]
    fn a_host_name_fits_the_kernel() {
        assert!(Options::read(&run(&["--hostname", &"x".repeat(64)])).is_ok());
        assert!(Options::read(&run(&["--hostname", &"x".repeat(65)])).is_err());
    }

    #[test]
    fn the_command_is_the_users_or_the_images() {
        let of = |words: &[&str], typed: &[&str]| {
            let mut args = run(words);
            args.command = typed.iter().map(OsString::from).collect();
            let words = command(&args, &["entry".into()], &["default".into()]).unwrap_or_default();
            words.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
        };
        assert_eq!(of(&[], &[]), "entry default");
        assert_eq!(of(&[], &["x", "-y"]), "entry x -y");
        assert_eq!(of(&["--entrypoint", "sh"], &[]), "sh");
        assert_eq!(of(&["--entrypoint", ""], &["x"]), "x");
        assert_eq!(of(&["--entrypoint", ""], &[]), "");
    }
}
