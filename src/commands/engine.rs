//! What the runtime and the prestart hook do alike for a container of another engine: the same request, the same plan, the same
//! files, whichever way an engine calls gpurun.

use super::Context;
use crate::{
    apply::{
        bundle::ContainerRoot,
        delivery::{Delivery, Destination, MountedBy},
        namespace::{Waiting, devices::Access},
        oci_spec,
        placement::{self, DriverMount, Placement},
        rootfs::{Layers, Mounts},
    },
    cli::{Global, LogFormat, environment},
    config::Nonroot,
    error::{Code, Error, OrFail, Result},
    formats::oci::Spec,
    own_directory::{self, Purpose},
    plan::{self, Injection},
    request::DeviceRequest,
};
use std::path::PathBuf;

/// Where things are, from the engine's environment and the configuration, which only a hook's command line names.
pub fn context(config: Option<PathBuf>) -> Result<Context> {
    let path = |key| environment::variable(key).map(PathBuf::from);
    let mut context = Context::new(&Global {
        driver_root: path("GPURUN_DRIVER_ROOT"),
        dev_root: path("GPURUN_DEV_ROOT"),
        simulated_host: path("GPURUN_SIMULATED_HOST"),
        config: config.or_else(|| path("GPURUN_CONFIG")),
        log: tracing::level_filters::LevelFilter::OFF,
        log_format: LogFormat::Text,
        json: false,
    })?;
    keep_state_with_the_user(&mut context);
    context.is_callers = in_user_namespace() || !rustix::process::geteuid().is_root();
    Ok(context)
}

/// Podman without root calls its runtime as root of a user namespace (and Apptainer `nvidia-container-cli`), who may not write where root keeps its state.
pub fn keep_state_with_the_user(context: &mut Context) {
    let of_session =
        || own_directory::named_by("XDG_RUNTIME_DIR", Purpose::Write).map(|dir| dir.join("gpurun"));
    if environment::variable("GPURUN_STATE_DIR").is_none() && in_user_namespace() {
        let of_account = || own_directory::home_of_account().map(|home| home.join(".cache/gpurun"));
        if let Some(users) = of_session().or_else(of_account) {
            context.state_dir = users;
        }
    }
}

/// What the container gets for what it asks; `None` if that is nothing.
pub fn injection(spec: &Spec, context: &Context) -> Result<Option<Injection>> {
    context.config.usable()?;
    let Some(request) = DeviceRequest::from_oci(spec, &context.config.accepted())? else { return Ok(None) };
    may_run_as(spec.uid(), context.config.nonroot)?;
    let policy = plan::Policy { privileged: spec.is_bounded_by("CAP_SYS_ADMIN"), ..context.config.policy()? };
    context.plan(&request, &policy).map(Some)
}

/// Writes the files that must exist first, and returns the mounts to make. `mounts` are the existing mounts over the root;
/// `None` are the mounts of the configuration, which the low-level runtime will make.
pub fn deliver(
    root: &ContainerRoot,
    spec: &Spec,
    injection: &Injection,
    context: &Context,
    mounted_by: MountedBy,
    mounts: Option<&Mounts>,
) -> Result<(Placement, Delivery)> {
    // The checked descriptor, not the path again.
    let image = Layers::mounted(&root.directory)
        .or_fail(Code::Internal, || "out of descriptors")
        .map_err(|error| error.fix("raise the limit of open files (ulimit -n) of the engine's service"))?;
    let planned = if mounts.is_none() { oci_spec::mounts(spec, &image) } else { Mounts::default() };
    let placement = placement::place(&image, mounts.unwrap_or(&planned), injection, DriverMount::ByUs)?;
    let destination = Destination {
        root,
        image: &image,
        has_user_namespace: spec.has_user_namespace(),
        state_dir: &context.state_dir,
        mounted_by,
    };
    let delivery = destination.deliver(&placement)?;
    Ok((placement, delivery))
}

/// A container that has been made and does not run yet.
#[derive(Debug)]
pub struct Container {
    /// Its first process.
    pub pid: i32,
    /// Its root.
    pub root: ContainerRoot,
    /// Whether it may be in this process' own mount namespace.
    pub may_be_ours: bool,
    /// Whether its cgroup is to let it open the nodes that it gets.
    pub restrict: bool,
}

/// Injects the plan into the container. Returns the parts that were left out and the reasons.
pub fn give(
    container: &Container,
    spec: &Spec,
    injection: &Injection,
    context: &Context,
) -> Result<Vec<String>> {
    let Container { pid, root, may_be_ours, restrict } = container;
    let shm_size = shm_size(spec, context.config.shm_size.as_deref())?;
    // Everything that can be known to fail does so before the first change.
    let waiting = Waiting::open(*pid, root, *may_be_ours)?;
    // An engine without root restricts no devices, and we could not.
    let access = if *restrict && !in_user_namespace() {
        Some(Access::read(*pid, &injection.devices, spec.systemd_scope().as_deref())?)
    } else {
        None
    };
    let by = MountedBy::Gpurun;
    let (placement, delivery) = deliver(root, spec, injection, context, by, Some(waiting.mounts()))?;
    access.map_or(Ok(()), Access::grant)?;
    if let Some(size) = shm_size.filter(|_| spec.mounts().any(|mount| mount.destination == "/dev/shm")) {
        waiting.grow_shm(size)?;
    }
    let Delivery { binds, mut notes } = delivery;
    let has_user_namespace = spec.has_user_namespace();
    notes.extend(waiting.give(&placement.nodes, &binds, has_user_namespace, may_make_nodes(spec))?);
    Ok(notes)
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

/// The default size of /dev/shm; `None` keeps the engine's.
pub fn shm_size(spec: &Spec, configured: Option<&str>) -> Result<Option<u64>> {
    match configured {
        Some("keep") => Ok(None),
        Some(size) if size != "auto" => super::run::sizes::size("shm-size", size).map(Some),
        _ => {
            let system = rustix::system::sysinfo();
            // sysinfo(2) counts in units of mem_unit bytes, and its field is as wide as the machine's word.
            #[allow(clippy::useless_conversion)]
            let memory = u64::from(system.totalram).saturating_mul(u64::from(system.mem_unit));
            Ok(Some(spec.memory_limit().map_or(memory, |limit| limit.min(memory)) / 2))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
