//! `gpurun-runtime`: an OCI runtime for engines. It edits the bundle of a container that asks for GPUs, and is then replaced by
//! runc or crun, which never learn of it.

pub mod args;
mod log;
pub mod old_runc;

use super::{
    Context,
    engine::{context, deliver, in_user_namespace, injection, may_make_nodes, shm_size},
};
use crate::{
    apply::{
        bundle::Bundle,
        delivery::{self, Delivery, MountedBy},
        dev_char, oci_spec,
    },
    config::Config,
    error::{Code, Error, OrFail, Result},
    plan::DRIVER_DIR,
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

/// The names under which gpurun is this program. NVIDIA's toolkit has the last two for modes of its own; here there is one way.
pub const NAMES: [&str; 4] = [
    "gpurun-runtime",
    "nvidia-container-runtime",
    "nvidia-container-runtime.cdi",
    "nvidia-container-runtime.legacy",
];

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

/// Gives the container what it asks for; one that asks for nothing is not touched.
fn make_gpu_container(args: &RuntimeArgs, context: &Context, log: &Log) -> Result<()> {
    let (bundle, mut spec) = Bundle::open(&args.bundle).map_err(by_hand)?;
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
    let mounted_by =
        if spec.has_new_mount_namespace() { MountedBy::RuntimeFromHere } else { MountedBy::RuntimeElsewhere };
    let (placement, Delivery { binds, notes }) =
        deliver(&bundle.root(&spec)?, &spec, &injection, context, mounted_by, None)?;
    for note in notes {
        log.write(Level::Warning, &note);
    }
    let may_make_nodes = may_make_nodes(&spec);
    for source in oci_spec::edit(&mut spec, &injection, &binds, &placement.nodes, may_make_nodes)? {
        // A restart brings back what an earlier start mounted.
        if !source.starts_with(&context.state_dir) {
            let source = source.display();
            log.write(
                Level::Warning,
                &format!("the mount of {source} is not made: {DRIVER_DIR} is gpurun's"),
            );
        }
    }
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

fn by_hand(error: Error) -> Error {
    error.fix("engines make bundles: start the container again; by hand, `runc spec` writes a config.json")
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
}
