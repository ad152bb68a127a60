//! `nvidia-container-cli`: libnvidia-container's program, as other tools call it. It lists what there is, and gives a container
//! that does not run yet its GPUs, by the code of the prestart hook.

use super::{Context, engine, nvidia_ctk};
use crate::{
    apply::bundle::ContainerRoot,
    cli::{
        self, LogFormat,
        nvidia_container_cli::{Command, Configure, Devices, List, NvidiaContainerCli},
    },
    error::{Code, Error, OrFail, Result},
    formats::oci::Spec,
    inventory::{ContainerPath, FileKind, HostPath, Inventory},
    output, plan,
    request::DeviceRequest,
    vocabulary::{DriverCapability, GatedFeature},
};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

/// What was typed.
pub fn run(typed: &NvidiaContainerCli) -> Result<u8> {
    let path = |key| cli::environment::variable(key).map(PathBuf::from);
    let mut context = Context::new(&cli::Global {
        driver_root: typed.root.clone().or_else(|| path("GPURUN_DRIVER_ROOT")),
        dev_root: path("GPURUN_DEV_ROOT"),
        simulated_host: path("GPURUN_SIMULATED_HOST"),
        config: path("GPURUN_CONFIG"),
        log: tracing::level_filters::LevelFilter::OFF,
        log_format: LogFormat::Text,
        json: false,
    })?;
    engine::keep_state_with_the_user(&mut context);
    context.is_callers = false;
    // Modules are the first namespace's, and who may not load them finds them loaded.
    if typed.load_kmods && rustix::process::geteuid().is_root() && !engine::in_user_namespace() {
        let loaded = nvidia_ctk::load_kernel_modules(&context.host, false);
        if let Err(error) = loaded.and_then(|()| nvidia_ctk::make_control_nodes(&context.host, false)) {
            // What is missing then, the inventory says better.
            tracing::warn!("{error}");
        }
    }
    match &typed.command {
        Command::Info { csv } => output::write(info(&context.inventory()?, *csv).as_bytes())?,
        Command::List(args) => output::write(list(&context.inventory()?, args)?.as_bytes())?,
        Command::Configure(args) => configure(context, args)?,
    }
    Ok(0)
}

/// In libnvidia-container's own form (src/cli/info.c), by which scripts read it.
fn info(inventory: &Inventory, csv: bool) -> String {
    let driver = &inventory.driver;
    let (names, versions) =
        (["NVRM version", "CUDA version"], [driver.version.as_str(), driver.cuda.as_str()]);
    let columns =
        ["Device Index", "Device Minor", "Model", "Brand", "GPU UUID", "Bus Location", "Architecture"];
    let gpus = inventory.gpus.iter().map(|gpu| {
        // NVML's form of the address, which has eight digits for the domain.
        let bus = format!("0000{}", gpu.pci.to_ascii_uppercase());
        let numbers = [gpu.index.to_string(), gpu.minor.to_string()];
        let words =
            [&gpu.name, &gpu.brand, &gpu.uuid, &bus, gpu.compute_capability.as_str()].map(String::from);
        [numbers.as_slice(), &words].concat()
    });
    if csv {
        let head = format!("{}\n{}\n\n{}\n", names.join(","), versions.join(","), columns.join(","));
        return gpus.fold(head, |text, gpu| text + &gpu.join(",") + "\n");
    }
    let line = |name: &str, value: &str| format!("{:15} {value}\n", format!("{name}:"));
    let head = line(names[0], versions[0]) + &line(names[1], versions[1]);
    gpus.fold(head, |text, gpu| {
        let lines: String = columns.iter().zip(&gpu).map(|(name, value)| line(name, value)).collect();
        text + "\n" + &lines
    })
}

/// The paths, as they are called in the driver root.
fn list(inventory: &Inventory, args: &List) -> Result<String> {
    let all = *args == List::default();
    let wanted = if all { everything() } else { args.clone() };
    let driver = &inventory.driver;
    let mut paths: Vec<ContainerPath> = Vec::new();
    // MIG devices share their GPU's node.
    let mut add = |path: &ContainerPath| {
        if !paths.contains(path) {
            paths.push(path.clone());
        }
    };
    let devices = &wanted.devices;
    if !devices.device.is_empty() {
        driver.control_nodes.iter().for_each(|node| add(&node.container_path));
    }
    let spec = spec(devices, &[], None)?;
    // Who names no device has asked for none.
    if let Some(request) = DeviceRequest::from_oci(&spec, &crate::request::Accepted::default())? {
        for selected in plan::select(inventory, &request, DriverCapability::DEFAULT)? {
            plan::device::device(selected, DriverCapability::DEFAULT)
                .nodes
                .iter()
                .for_each(|node| add(&node.container_path));
        }
        for (feature, node) in &driver.gated_nodes {
            let is_asked = request.features.contains(feature)
                // A driver without MIG or IMEX has none of theirs to list.
                || all && matches!(feature, GatedFeature::MigConfig | GatedFeature::MigMonitor | GatedFeature::Imex);
            if is_asked {
                add(&node.container_path);
            }
        }
        for channel in &request.imex_channels {
            let part = plan::device::imex_channel(driver, *channel)?;
            part.nodes.iter().for_each(|node| add(&node.container_path));
        }
    }
    let is_wanted: [&dyn Fn(&FileKind) -> bool; 5] = [
        &|kind| wanted.binaries && matches!(kind, FileKind::Binary(_)),
        &|kind| wanted.libraries && matches!(kind, FileKind::Library { is_32bit: false, .. }),
        &|kind| {
            wanted.libraries && wanted.compat32 && matches!(kind, FileKind::Library { is_32bit: true, .. })
        },
        &|kind| wanted.ipcs && matches!(kind, FileKind::Socket(_)),
        &|kind| wanted.firmwares && matches!(kind, FileKind::Firmware(_)),
    ];
    for is_wanted in is_wanted {
        for file in driver.files.iter().filter(|file| is_wanted(&file.kind)) {
            add(&in_root(inventory, &file.path)?);
        }
    }
    Ok(paths.iter().map(|path| format!("{}\n", path.0.display())).collect())
}

/// Without an option.
fn everything() -> List {
    List {
        devices: Devices { device: vec!["all".into()], ..Devices::default() },
        libraries: true,
        binaries: true,
        ipcs: true,
        firmwares: true,
        compat32: true,
    }
}

fn in_root(inventory: &Inventory, path: &HostPath) -> Result<ContainerPath> {
    inventory.driver.root.container_path(path).ok_or_else(|| {
        Error::new(Code::Internal, format!("{} is outside the driver root", path.0.display()))
            .fix("name the root in which the driver is with --root")
    })
}

/// Whether what is mounted here is mounted on the host: where nothing tells, it is.
fn is_in_hosts_mounts() -> bool {
    let namespace =
        |process: &str| fs::metadata(format!("/proc/{process}/ns/mnt")).map(|it| (it.dev(), it.ino()));
    match (namespace("self"), namespace("1")) {
        (Ok(own), Ok(first)) => own == first,
        _ => true,
    }
}

fn configure(mut context: Context, args: &Configure) -> Result<()> {
    let capabilities: Vec<&str> = [
        (args.compute, "compute"),
        (args.utility, "utility"),
        (args.video, "video"),
        (args.graphics, "graphics"),
        (args.display, "display"),
        (args.ngx, "ngx"),
        (args.compat32, "compat32"),
    ]
    .iter()
    .filter_map(|(asked, name)| asked.then_some(*name))
    .collect();
    let mut environment = vec![("NVIDIA_DRIVER_CAPABILITIES".to_owned(), capabilities.join(","))];
    let requirements = args.require.iter().enumerate();
    environment.extend(requirements.map(|(number, text)| (format!("NVIDIA_REQUIRE_{number}"), text.clone())));
    if args.cuda_compat_mode.as_deref() == Some("disabled") {
        context.config.forward_compat = Some(false);
    }
    let pid = match args.pid {
        Some(pid) => pid,
        None => rustix::process::getppid().map_or(0, rustix::process::Pid::as_raw_pid),
    };
    let spec = spec(&args.devices, &environment, Some(pid))?;
    let Some(mut injection) = engine::injection(&spec, &context)? else { return Ok(()) };
    if args.no_devbind {
        injection.devices.clear();
    }
    for warning in &injection.warnings {
        tracing::warn!("{warning}");
    }
    let container = engine::Container {
        pid,
        root: ContainerRoot::open(args.rootfs.clone())?,
        // enroot and Apptainer call this from inside: from a user namespace, or as root from a mount namespace that is not
        // the host's.
        may_be_ours: engine::in_user_namespace() || !is_in_hosts_mounts(),
        restrict: !args.no_cgroups,
    };
    for note in engine::give(&container, &spec, &injection, &context)? {
        tracing::warn!("{note}");
    }
    Ok(())
}

/// The command line as the configuration of a container, which asks for GPUs in the same words on every path. Whoever calls is
/// trusted as who starts a privileged container is: this program has no more rights than its caller.
fn spec(devices: &Devices, environment: &[(String, String)], pid: Option<i32>) -> Result<Spec> {
    let joined = |list: &[String]| list.join(",");
    let ids = if devices.device.is_empty() { "none".into() } else { joined(&devices.device) };
    let mut env = vec![format!("NVIDIA_VISIBLE_DEVICES={ids}")];
    env.extend(environment.iter().map(|(name, value)| format!("{name}={value}")));
    env.extend(devices.mig_config.iter().map(|value| format!("NVIDIA_MIG_CONFIG_DEVICES={value}")));
    env.extend(devices.mig_monitor.iter().map(|value| format!("NVIDIA_MIG_MONITOR_DEVICES={value}")));
    if !devices.imex_channel.is_empty() {
        env.push(format!("NVIDIA_IMEX_CHANNELS={}", joined(&devices.imex_channel)));
    }
    let linux = pid.map_or(Ok(json!({})), user_namespace)?;
    let spec = json!({
        "process": {"env": env, "user": {"uid": 0}, "capabilities": {"bounding": ["CAP_SYS_ADMIN"]}},
        "linux": linux,
    });
    Spec::parse(spec.to_string().as_bytes())
}

/// Its user namespace, where it has one of its own, in the words of a configuration.
fn user_namespace(pid: i32) -> Result<Value> {
    let failed = || format!("the container's process {pid} cannot be looked into");
    let namespace = |process: &str| fs::metadata(format!("/proc/{process}/ns/user")).map(|stat| stat.ino());
    let pid = pid.to_string();
    let with_fix = |error: Error| error.fix("name a process that runs with --pid, and mount /proc");
    let namespace = |process: &str| namespace(process).or_fail(Code::Namespace, failed).map_err(with_fix);
    if namespace(&pid)? == namespace("self")? {
        return Ok(json!({}));
    }
    let mappings = |name: &str| -> Result<Value> {
        let text = fs::read_to_string(format!("/proc/{pid}/{name}"))
            .or_fail(Code::Namespace, failed)
            .map_err(with_fix)?;
        let mapping = |line: &str| {
            let mut numbers = line.split_whitespace().map_while(|number| number.parse::<u32>().ok());
            Some(json!({"containerID": numbers.next()?, "hostID": numbers.next()?, "size": numbers.next()?}))
        };
        Ok(text.lines().filter_map(mapping).collect())
    };
    Ok(json!({
        "namespaces": [{"type": "user"}],
        "uidMappings": mappings("uid_map")?,
        "gidMappings": mappings("gid_map")?,
    }))
}
