//! `gpurun-runtime`: an OCI runtime for engines. It edits the bundle of a container that asks for GPUs, and is then replaced by
//! runc or crun, which never learn of it.

pub mod args;
mod log;

use super::Context;
use crate::{
    apply::{
        bundle::{Bundle, ContainerRoot},
        delivery::{self, Destination},
        dev_char, loader,
        oci_spec::{self, Bind},
        rootfs::Layers,
    },
    cli::{Global, LogFormat},
    config::{Config, Nonroot},
    error::{Code, Error, OrFail, Result},
    formats::oci::Spec,
    plan::{self, Injection},
    request::DeviceRequest,
};
use args::RuntimeArgs;
use log::{Level, Log};
use rustix::fs::{Mode, OFlags};
use std::{
    ffi::OsString,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

/// The names under which gpurun is this program.
pub const NAMES: [&str; 2] = ["gpurun-runtime", "nvidia-container-runtime"];

/// Becomes the low-level runtime. It returns only when that fails, with runc's exit code for every failure.
pub fn run(words: &[OsString]) -> u8 {
    let args = RuntimeArgs::scan(words);
    let mut log = Log::new(&args);
    let Err(error) = become_runtime(&args, words, &mut log);
    // Engines show what the log says; a person who calls the runtime sees standard error.
    log.write(Level::Error, &error.to_string());
    1
}

fn become_runtime(args: &RuntimeArgs, words: &[OsString], log: &mut Log) -> Result<std::convert::Infallible> {
    let context = context(None);
    // A container that runs must stop and go, whatever happened to our configuration since.
    let default = Config::default();
    let config = match &context {
        Ok(context) => &context.config,
        Err(_) => &default,
    };
    log.configure(config);
    let runtime = low_level_runtime(config)?;
    if args.makes_container {
        make_gpu_container(args, &context?, log)?;
    }
    let error = Command::new(&runtime).arg0(&runtime).args(words).exec();
    Err(error).or_fail(Code::NoRuntime, || format!("{} cannot be run", runtime.display()))
}

/// Where things are, from the engine's environment and the configuration, which only a hook's command line names.
pub fn context(config: Option<PathBuf>) -> Result<Context> {
    let path = |key| std::env::var_os(key).map(PathBuf::from);
    let mut context = Context::new(&Global {
        driver_root: path("GPURUN_DRIVER_ROOT"),
        dev_root: path("GPURUN_DEV_ROOT"),
        simulated_host: path("GPURUN_SIMULATED_HOST"),
        config: config.or_else(|| path("GPURUN_CONFIG")),
        log: tracing::level_filters::LevelFilter::OFF,
        log_format: LogFormat::Text,
        json: false,
    })?;
    // Podman without root calls its runtime as root of a user namespace, who may not write where root keeps its state.
    let users = path("XDG_RUNTIME_DIR").filter(|dir| dir.is_absolute()).map(|dir| dir.join("gpurun"));
    if let (Some(users), None, true) = (users, path("GPURUN_STATE_DIR"), in_user_namespace()) {
        context.state_dir = users;
    }
    Ok(context)
}

/// Gives the container what it asks for; one that asks for nothing is not touched.
fn make_gpu_container(args: &RuntimeArgs, context: &Context, log: &Log) -> Result<()> {
    let (bundle, mut spec) = Bundle::open(&args.bundle)?;
    let Some(injection) = injection(&spec, context)? else { return Ok(()) };
    for warning in &injection.warnings {
        log.write(Level::Warning, warning);
    }
    if args.systemd_cgroup && !in_user_namespace() {
        // The container has its devices in any case, until systemd is told to reload.
        if let Err(error) = dev_char::link_all(Path::new("/dev/char"), &injection.devices) {
            log.write(Level::Warning, &error.to_string());
        }
    }
    let may_gather = spec.has_new_mount_namespace();
    let binds = deliver(&bundle.root(&spec)?, &spec, &injection, context, may_gather)?;
    let may_make_nodes = may_make_nodes(&spec);
    oci_spec::edit(&mut spec, &injection, &binds, may_make_nodes)?;
    if let Some(size) = shm_size(&spec, context.config.shm_size.as_deref())? {
        oci_spec::resize_shm(&mut spec, size)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let shm = oci_spec::engines_shm(&spec)
            .and_then(|source| rustix::fs::open(source, flags, Mode::empty()).ok());
        if let Err(error) = shm.map_or(Ok(()), |shm| delivery::grow_shm(&shm, size)) {
            log.write(Level::Warning, &error.to_string());
        }
    }
    bundle.replace(&spec)?;
    log.write(
        Level::Debug,
        &format!("gpurun: {} device nodes, {} mounts", injection.devices.len(), binds.len()),
    );
    Ok(())
}

/// What the container gets for what it asks; `None` where that is nothing.
pub fn injection(spec: &Spec, context: &Context) -> Result<Option<Injection>> {
    let Some(request) = DeviceRequest::from_oci(spec, &context.config.accepted())? else { return Ok(None) };
    may_run_as(spec.uid(), context.config.nonroot)?;
    let policy = plan::Policy { privileged: spec.is_bounded_by("CAP_SYS_ADMIN"), ..context.config.policy()? };
    plan::plan(&context.inventory()?, &request, &policy).map(Some)
}

/// Puts on file systems what must be there first, and says what is to be mounted. `may_gather` is as for [`Destination`].
pub fn deliver(
    root: &ContainerRoot,
    spec: &Spec,
    injection: &Injection,
    context: &Context,
    may_gather: bool,
) -> Result<Vec<Bind>> {
    let image = Layers::open(vec![root.path.clone()])?;
    let prepared = loader::prepare(&image, injection)?;
    let destination = Destination {
        root,
        image: &image,
        owner: spec.mapped_root(),
        state_dir: &context.state_dir,
        may_gather,
    };
    destination.deliver(injection, &prepared)
}

/// Whether device nodes can be made for the container: those that are made in a user namespace cannot be opened
/// (user_namespaces(7)).
pub fn may_make_nodes(spec: &Spec) -> bool {
    !spec.has_user_namespace() && !in_user_namespace()
}

fn may_run_as(uid: u64, nonroot: Nonroot) -> Result<()> {
    if uid != 0 || nonroot == Nonroot::Keep {
        return Ok(());
    }
    Err(Error::new(Code::NotAllowed, "a GPU container must not run as root on this host")
        .cause("its user is uid 0, and the administrator set nonroot = \"require\"")
        .fix("name another user: docker run --user 1000, `user: \"1000\"` in a compose file, runAsUser in a pod"))
}

/// Whether the engine is rootless: every id of the host is mapped to itself in the first user namespace alone
/// (user_namespaces(7)).
pub fn in_user_namespace() -> bool {
    let first = |map: String| map.split_whitespace().eq(["0", "0", "4294967295"]);
    !std::fs::read_to_string("/proc/self/uid_map").is_ok_and(first)
}

/// The size that a /dev/shm nobody chose gets; `None`: what the engine gave.
pub fn shm_size(spec: &Spec, configured: Option<&str>) -> Result<Option<u64>> {
    match configured {
        Some("keep") => Ok(None),
        Some(size) if size != "auto" => super::run::options::size("shm-size", size).map(Some),
        _ => {
            let system = rustix::system::sysinfo();
            // sysinfo(2) counts in units of mem_unit bytes, and its field is as wide as the machine's word.
            #[allow(clippy::useless_conversion)]
            let memory = u64::from(system.totalram).saturating_mul(u64::from(system.mem_unit));
            Ok(Some(spec.memory_limit().map_or(memory, |limit| limit.min(memory)) / 2))
        }
    }
}

/// Those that are tried where the configuration names none.
const RUNTIMES: [&str; 2] = ["runc", "crun"];
/// Where they are looked for behind PATH: engines start their runtimes with any, or with none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The first of the configured runtimes that is there, by its path.
fn low_level_runtime(config: &Config) -> Result<PathBuf> {
    let configured = config.runtimes.as_ref().map(|names| names.iter().map(PathBuf::from).collect());
    let names: Vec<PathBuf> = configured.unwrap_or_else(|| RUNTIMES.map(PathBuf::from).into());
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A relative entry is a directory of whoever is served.
    let directories: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(std::env::split_paths(PATH))
        .filter(|dir| dir.is_absolute())
        .collect();
    let own = identity(Path::new("/proc/self/exe"));
    let is_runtime = |path: &PathBuf| {
        // A wrapper that is called runc would call itself for ever.
        identity(path).is_some_and(|identity| Some(identity) != own)
            && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
    };
    let mut candidates = names.iter().flat_map(|name| {
        let absolute = name.is_absolute().then(|| name.clone());
        let is_name = name.components().count() == 1 && !name.is_absolute();
        let in_path = directories.iter().filter(move |_| is_name).map(move |directory| directory.join(name));
        absolute.into_iter().chain(in_path)
    });
    candidates.find(is_runtime).ok_or_else(|| {
        let names: Vec<_> = names.iter().map(|name| name.display().to_string()).collect();
        Error::new(Code::NoRuntime, format!("none of the low-level runtimes {} is there", names.join(", ")))
            .cause(format!("names are looked for in {}:{PATH}", path.to_string_lossy()))
            .fix("install runc or crun, or name another by its path: runtimes = [\"/usr/bin/runc\"] in gpurun's configuration")
    })
}

/// Device and inode of a regular file, links followed.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|file| (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(runtimes: &[&str]) -> Config {
        Config { runtimes: Some(runtimes.iter().map(ToString::to_string).collect()), ..Config::default() }
    }

    #[test]
    fn the_first_runtime_that_is_there_and_not_ourselves() {
        let own = std::fs::canonicalize("/proc/self/exe").unwrap();
        let own = own.to_str().unwrap();
        for (names, found) in [
            (&["/bin/sh"][..], Some("/bin/sh")),
            (&["/nowhere/runc", "/etc", "/etc/passwd", "/bin/sh"], Some("/bin/sh")),
            (&[own, "/proc/self/exe", "/bin/sh"], Some("/bin/sh")),
            (&["bin/sh", "../bin/sh", "", "."], None),
        ] {
            assert_eq!(low_level_runtime(&config(names)).ok().as_deref(), found.map(Path::new), "{names:?}");
        }
        assert!(low_level_runtime(&config(&["sh"])).unwrap().ends_with("sh"), "by name");
        let error = low_level_runtime(&config(&["no-such-runtime"])).unwrap_err();
        assert!(error.what().contains("no-such-runtime"), "{error}");
    }

    #[test]
    fn root_is_refused_where_the_administrator_says_so() {
        assert!(may_run_as(0, Nonroot::Keep).is_ok() && may_run_as(1000, Nonroot::Require).is_ok());
        assert_eq!(may_run_as(0, Nonroot::Require).unwrap_err().code(), Code::NotAllowed);
    }

    #[test]
    fn shared_memory_is_half_of_what_the_container_may_have() {
        let spec = |text: &str| Spec::parse(text.as_bytes()).unwrap();
        let limited = spec(r#"{"linux":{"resources":{"memory":{"limit":1048576}}}}"#);
        assert_eq!(shm_size(&limited, None).unwrap(), Some(524_288));
        assert_eq!(shm_size(&limited, Some("auto")).unwrap(), Some(524_288));
        assert_eq!(shm_size(&limited, Some("2g")).unwrap(), Some(2 << 30));
        assert_eq!(shm_size(&limited, Some("keep")).unwrap(), None);
        assert!(shm_size(&limited, Some("much")).is_err());
        let unlimited = spec(r#"{"linux":{"resources":{"memory":{"limit":-1}}}}"#);
        assert!(shm_size(&unlimited, None).unwrap().unwrap() > 64 << 20);
    }
}
