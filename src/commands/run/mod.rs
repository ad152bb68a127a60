//! `gpurun run`: from what was typed to the command's exit code.

mod capabilities;
pub mod environment;
pub(crate) mod host_mounts;
mod limits;
pub(crate) mod mounts;
mod namespaces;
mod security;
pub mod sizes;

use super::Context;
use crate::{
    apply::{
        container::{
            self,
            cgroup::Limits,
            identity::{self, Caller, Identity},
            spec::{Container, Process, Volume},
        },
        placement::{self, DriverMount},
        rootfs::{Kind, Layers, Mounts},
    },
    cli::{self, Run},
    error::{Code, Error, OrFail, Result},
    image::{Image, ImageReference, Ownership, Platform, ScratchDir, Store},
    inventory::binfmt,
    plan::{self, Injection},
    request::DeviceRequest,
    vocabulary::EnvVar,
};
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
    let store = context.store()?;
    let reference = image_reference(&args.image)?;
    let pull = context.pull(args.pull, &args.pulling, args.quiet);
    can_run(context, &pull.platform)?;
    let image = Image::open(&reference, &store, &pull)?;
    let user_env = environment::environment(args)?;
    // Whether the host can run the image is known before a layer is fetched or unpacked.
    let injection = injection(context, args, &image, &user_env)?;
    for warning in &injection.warnings {
        tracing::warn!("{warning}");
    }
    let mut volumes = if reference == ImageReference::Host { host_file_systems()? } else { Vec::new() };
    volumes.extend(mounts::volumes(args)?);
    let layers = Layers::open(image.root(&store)?)?;
    let container =
        container(context, args, &image, user_env, volumes, injection, &layers, store.scratch()?)?;
    container::run(container, layers)
}

/// The image that was typed.
///
/// # Errors
/// Where it is the path of a file or directory of this machine: a registry may have an image of that name.
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
pub fn injection(context: &Context, args: &Run, image: &Image, user_env: &[EnvVar]) -> Result<Injection> {
    let config = image.config();
    let Some(request) = DeviceRequest::from_cli(args.gpus.as_deref(), user_env, &config.env, &config.labels)?
    else {
        return Ok(Injection::default());
    };
    let policy = plan::Policy {
        privileged: capabilities::capabilities(args, true)? & capabilities::SYS_ADMIN != 0,
        ..context.config.policy()?
    };
    context.plan(&request, &policy)
}

fn container(
    context: &Context,
    args: &Run,
    image: &Image,
    user_env: Vec<EnvVar>,
    volumes: Vec<Volume>,
    injection: Injection,
    layers: &Layers,
    scratch: ScratchDir,
) -> Result<Container> {
    let config = image.config();
    let host_network = namespaces::network(&args.network)?;
    let ipc = namespaces::ipc(args.ipc.as_deref())?;
    let caller = Caller::current();
    let mut user = if image.root_is_caller() {
        as_podman_does(
            identity::resolve(
                &config.user,
                args.user.as_deref(),
                &Caller { uid: 0, gid: 0, ..caller },
                layers,
            )?,
            &caller,
        )?
    } else {
        identity::resolve(&config.user, args.user.as_deref(), &caller, layers)?
    };
    user.groups.extend(args.group_add.iter().chain(&injection.groups));
    let rootless = caller.euid != 0;
    let placement = placement::place(layers, &mounts(&volumes, layers), &injection, DriverMount::ByUs)?;
    for note in &placement.notes {
        tracing::warn!("{note}");
    }
    let argv = command(args, &config.entrypoint, &config.cmd).ok_or_else(|| {
        Error::new(Code::Usage, "the image has no command of its own").fix("name one after the image")
    })?;
    let cwd =
        args.workdir.clone().or_else(|| Some(PathBuf::from(&config.working_dir)).filter(|d| d.is_absolute()));
    let limits = Limits {
        memory: args.resources.memory.as_deref().map(|m| sizes::size("--memory", m)).transpose()?,
        cpus: args.resources.cpus,
        pids: args.resources.pids_limit.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0),
    };
    if args.tty && args.interactive && !rustix::termios::isatty(rustix::stdio::stdin()) {
        return Err(
            Error::new(Code::Usage, "-i -t needs a terminal, and standard input is none").fix("leave out -t")
        );
    }
    let hostname = args.hostname.clone().or_else(|| (!host_network).then(|| "gpurun".to_owned()));
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
        host_network,
        network_requested: !args.network.is_empty(),
        host_ipc: ipc == namespaces::Ipc::Host,
        shm_size: shm_size(context, args, &limits)?,
        volumes,
        placement,
        limits,
        privileged: Store::ownership() == Ownership::Image,
        id_map: rootless.then(|| identity::id_map(&user, &caller)),
        process: Process {
            env: process_environment(&host_name, &config.env, &injection.env, user_env, args.tty),
            argv,
            cwd: cwd.unwrap_or_else(|| "/".into()),
            capabilities: capabilities::capabilities(args, user.uid == 0)?,
            user,
            tty: args.tty,
            interactive: args.interactive,
            init: args.init,
            stop_signal: None,
            rlimits: limits::rlimits(&args.ulimit)?,
            seccomp: security::seccomp(&args.security_opt)?,
        },
        injection,
    })
}

/// What will be mounted over the container's root before the driver is.
fn mounts(volumes: &[Volume], root: &Layers) -> Mounts {
    let mut mounts = Mounts::default();
    for (path, kind) in [("/proc", Kind::Kernel), ("/sys", Kind::Kernel), ("/dev", Kind::Memory)] {
        mounts.add(root, Path::new(path), kind, false);
    }
    for volume in volumes {
        match volume {
            Volume::Bind { source, target, read_only } => {
                mounts.add(root, target, Kind::Volume { source: Some(source.clone()) }, *read_only);
            }
            // Device nodes are made before it is mounted, and it would hide them.
            Volume::Tmpfs { target, .. } if target.starts_with("/dev") => {
                mounts.add(root, target, Kind::Kernel, false);
            }
            Volume::Tmpfs { target, read_only, .. } => mounts.add(root, target, Kind::Memory, *read_only),
        }
    }
    mounts
}

/// The command: `--entrypoint` or the image's, and the arguments that were typed or the image's. `None` if there is none.
fn command(args: &Run, entrypoint: &[String], cmd: &[String]) -> Option<Vec<OsString>> {
    let images = |words: &[String]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let typed = args.command.clone();
    let (front, back) = match &args.entrypoint {
        // As with Docker, a new entrypoint drops the image's own arguments; an empty one drops the entrypoint alone.
        Some(entry) if entry.is_empty() => (Vec::new(), if typed.is_empty() { images(cmd) } else { typed }),
        Some(entry) => (vec![entry.into()], typed),
        None if typed.is_empty() => (images(entrypoint), images(cmd)),
        None => (images(entrypoint), typed),
    };
    let argv: Vec<OsString> = front.into_iter().chain(back).collect();
    (!argv.is_empty()).then_some(argv)
}

/// In an ordinary user's Podman the caller owns what is root's in the image, and his subordinate ids the rest. A container has
/// the same owners where its root is the caller, with Podman's ids beside.
fn as_podman_does(user: Identity, caller: &Caller) -> Result<Identity> {
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
    if !identity::ids_are_podmans(caller) {
        return Err(refused("/etc/subuid or /etc/subgid has several ranges for you, or a short one".into()).fix(
            "give one range of 65536 ids; or have the image in gpurun's own store: podman save --format oci-archive",
        ));
    }
    Ok(user)
}

/// The image's variables, the driver's, the user's: the last word is the user's.
fn process_environment(
    host_name: &str,
    image: &[EnvVar],
    driver: &[EnvVar],
    user: Vec<EnvVar>,
    tty: bool,
) -> Vec<EnvVar> {
    let host_name = ("HOSTNAME".to_owned(), host_name.to_owned());
    let path = ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    let terminal = tty.then(|| ("TERM".to_owned(), "xterm".to_owned()));
    let mut all: Vec<EnvVar> = Vec::new();
    // An image may name a million.
    let mut places: HashMap<String, usize> = HashMap::new();
    for (name, value) in
        [path, host_name].into_iter().chain(terminal).chain(image.iter().chain(driver).cloned()).chain(user)
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
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")
        .or_fail(Code::Inventory, || "the host's mounts cannot be read")?;
    Ok(host_mounts::host_mounts(&mounts)
        .into_iter()
        // What the caller cannot reach on the host he does not get in the container.
        .filter(|path| std::fs::metadata(path).is_ok())
        .map(|path| Volume::Bind { source: path.clone(), target: path, read_only: true })
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
    }
}
