//! `gpurun-runtime`: an OCI runtime for engines. It edits the bundle of a container that asks for GPUs, and is then replaced by
//! runc or crun, which never learn of it.

pub mod args;
mod log;
mod low_level;
pub mod old_runc;
mod record;

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
    config::{Config, engines::EngineRuntimes},
    error::{Code, Error, OrFail, Result},
    plan::DRIVER_DIR,
};
use args::{Dialect, NewContainer, RuntimeArgs};
use log::{Level, Log};
use rustix::fs::{Mode, OFlags};
use std::{ffi::OsString, os::unix::process::CommandExt, path::Path, process::Command};

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
    log.write_error(Level::Error, &error);
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
    let engines = EngineRuntimes::load();
    let noted = engines.as_ref().cloned().unwrap_or_default();
    let runtime = low_level::find(config, &noted, args.root.as_deref())?;
    if let Some(new) = args.new_container(words, Dialect::of(&runtime)) {
        engines?;
        let context = context?;
        make_gpu_container(args, &new, &context, log)?;
        record::keep(&context.state_dir, args.root.as_deref(), &runtime)?;
    }
    let error = Command::new(&runtime).arg0(&runtime).args(words).exec();
    Err(error).or_fail(Code::NoRuntime, || format!("{} cannot be run", runtime.display())).map_err(|error| {
        error.fix("install runc or crun again, or name another in `runtimes` of /etc/gpurun/config.toml")
    })
}

/// Gives the container what it asks for; one that asks for nothing is not touched.
fn make_gpu_container(args: &RuntimeArgs, new: &NewContainer, context: &Context, log: &Log) -> Result<()> {
    let (bundle, mut spec) = match Bundle::open(&new.bundle, new.config.as_deref()) {
        // An unknown option may be the reason, so the low-level runtime decides and refuses the bundle or the option.
        Err(_) if new.has_unknown_option => return Ok(()),
        opened => opened.map_err(by_hand)?,
    };
    let Some(injection) = injection(&spec, context)? else { return Ok(()) };
    for warning in &injection.warnings {
        log.write(Level::Warning, warning);
    }
    if args.systemd_cgroup && !in_user_namespace() {
        // The container has its devices in any case, until systemd is told to reload.
        if let Err(error) = dev_char::link_all(Path::new("/dev/char"), &injection.devices) {
            log.write_error(Level::Warning, &error);
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
            log.write_error(Level::Warning, &error);
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
