//! `gpurun-nvml NVML [CUDA]` loads the driver's libnvidia-ml (and libcuda) by these paths and prints what they know as JSON:
//! [`Facts`], or the failure as an object. gpurun runs it when its snapshot of the host is stale, because gpurun itself is
//! static and cannot load a library.
//!
//! `gpurun-nvml --watch NVML` prints what the driver says of its GPUs from now on, one [`Report`] a line. gpurun-device-plugin runs it.
//!
//! `gpurun-nvml --compute-mode MODE NVML GPU-…` lets nobody but one process compute on a GPU (`EXCLUSIVE_PROCESS`), or everybody
//! (`DEFAULT`), and prints nothing, or the failure as an object. gpurun-device-plugin runs it, as root.
//!
//! `gpurun-nvml --probe` runs in a container: it loads both libraries as any program there would, by name, and prints what it
//! saw. `gpurun demo` shows it.
#![forbid(unsafe_code)]

use gpurun::{
    error::{Code, Error, OrFail},
    inventory::{
        MigResources,
        nvml::{AnsweringGpu, DEFAULT, EXCLUSIVE_PROCESS, Facts, Gpu, LostGpu, MigDevice, QUIET, Report},
    },
    sys::dynamic,
};
use nvml_wrapper::{
    Device, Nvml,
    enum_wrappers::device::{Brand, ComputeMode, GpuVirtualizationMode, TopologyLevel},
    error::NvmlError,
    struct_wrappers::device::PciInfo,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io::Write,
    path::Path,
    process::ExitCode,
};

fn main() -> ExitCode {
    gpurun::sys::process::normalize();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (answer, code) = match &arguments[..] {
        [flag] if flag == "--probe" => (probe(), ExitCode::SUCCESS),
        [flag, nvml] if flag == "--watch" => {
            return watch(nvml).unwrap_or_else(|error| {
                gpurun::output::report(&error);
                error.code().exit_code().into()
            });
        }
        [flag, mode, nvml, uuid] if flag == "--compute-mode" => match set_compute_mode(mode, nvml, uuid) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_json(), error.code().exit_code().into()),
        },
        [nvml] => read(nvml, None),
        [nvml, cuda] => read(nvml, Some(cuda)),
        _ => {
            let error = Error::new(Code::Usage, "gpurun-nvml is run by gpurun")
                .fix("say `gpurun-nvml --probe` to see what a container has");
            (error.to_json(), error.code().exit_code().into())
        }
    };
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{answer}").and_then(|()| out.flush()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn read(nvml: &OsStr, cuda: Option<&OsString>) -> (Value, ExitCode) {
    let facts = facts(nvml, cuda.map(OsString::as_os_str)).and_then(|facts| {
        serde_json::to_value(facts).map_err(|error| Error::new(Code::Internal, error.to_string()))
    });
    match facts {
        Ok(facts) => (facts, ExitCode::SUCCESS),
        Err(error) => (error.to_json(), error.code().exit_code().into()),
    }
}

fn facts(path: &OsStr, cuda: Option<&OsStr>) -> Result<Facts, Error> {
    let failed = |error: NvmlError| failure(path, &error);
    let nvml = init(path).map_err(failed)?;
    let driver_version = nvml.sys_driver_version().map_err(failed)?;
    // NVML asks whichever libcuda the loader finds; the driver's own is the one that containers get.
    let cuda_version = cuda
        .and_then(|cuda| dynamic::cuda_driver_version(cuda).ok())
        .or_else(|| nvml.sys_cuda_driver_version().ok()?.try_into().ok());
    let gpus = (0..nvml.device_count().map_err(failed)?).map(|index| gpu(&nvml, index)).collect();
    let facts = Facts { driver_version, cuda_version, gpus: with_topology(&nvml, gpus) };
    // Ends with the process: a shut-down takes a second where the driver is not kept initialised.
    std::mem::forget(nvml);
    Ok(facts)
}

fn set_compute_mode(mode: &OsStr, path: &OsStr, uuid: &OsStr) -> Result<(), Error> {
    let mode = match mode.to_str() {
        Some(EXCLUSIVE_PROCESS) => ComputeMode::ExclusiveProcess,
        Some(DEFAULT) => ComputeMode::Default,
        _ => return Err(Error::new(Code::Usage, format!("there is no compute mode {}", mode.display()))),
    };
    let nvml = init(path).map_err(|error| failure(path, &error))?;
    let set = nvml.device_by_uuid(&*uuid.to_string_lossy()).and_then(|mut gpu| gpu.set_compute_mode(mode));
    // Ends with the process, as above.
    std::mem::forget(nvml);
    set.map_err(|error| {
        Error::new(Code::NvmlFailed, format!("the compute mode of {} cannot be set", uuid.display()))
            .cause(words(&error))
    })
}

fn init(path: &OsStr) -> Result<Nvml, NvmlError> {
    Nvml::builder().lib_path(path).init()
}

/// What to do about the ways in which NVML is known to fail.
fn failure(path: &OsStr, error: &NvmlError) -> Error {
    let shown = Path::new(path).display();
    let (code, what, fix) = match error {
        NvmlError::DriverNotLoaded => (
            Code::NoDriver,
            "NVML says that no NVIDIA driver is loaded".to_owned(),
            "load it with `modprobe nvidia`; look for NVRM messages in `dmesg` if that fails",
        ),
        NvmlError::LibRmVersionMismatch => (
            Code::VersionMismatch,
            format!("{shown} and the loaded kernel module have different versions"),
            "reboot, or reload the kernel module, so that both are of the same version",
        ),
        NvmlError::NoPermission | NvmlError::OperatingSystem => (
            Code::NvmlFailed,
            "the driver may not be used from here".to_owned(),
            "check the mode of /dev/nvidiactl and, in a container, its device rules; another user may be allowed",
        ),
        NvmlError::LibloadingError(_) => (
            Code::NvmlFailed,
            format!("the driver's library {shown} cannot be loaded"),
            "reinstall the driver; its libraries must fit this machine's C library",
        ),
        _ => (
            Code::NvmlFailed,
            format!("the driver's library {shown} does not answer"),
            "look for NVRM and Xid messages in `dmesg`; `nvidia-smi` should work on this host",
        ),
    };
    let error = match error {
        // The loader's own sentence is below the wrapper's.
        NvmlError::LibloadingError(error) => Error::new(code, what).cause(error),
        error => Error::new(code, what).cause(error),
    };
    error.fix(fix)
}

fn gpu(nvml: &Nvml, index: u32) -> Gpu {
    let device = match nvml.device_by_index(index) {
        Ok(device) => device,
        Err(error) => return Gpu::Lost(LostGpu { index, uuid: None, pci: None, words: words(&error) }),
    };
    match answering(&device, index) {
        Ok(facts) => Gpu::Answers(Box::new(facts)),
        Err(error) => Gpu::Lost(LostGpu {
            index,
            uuid: device.uuid().ok(),
            pci: device.pci_info().ok().map(|pci| sysfs_address(&pci)),
            words: words(&error),
        }),
    }
}

/// How a GPU is to who watches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Watched,
    Unwatched,
    Lost,
}

/// Watches until the reader closes the pipe.
fn watch(path: &OsStr) -> Result<ExitCode, Error> {
    // The plugin's end is ours, however it comes.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .or_fail(Code::Internal, || "prctl(PR_SET_PDEATHSIG, SIGTERM)")?;
    let failed = |error: NvmlError| failure(path, &error);
    let nvml = init(path).map_err(failed)?;
    let mut out = std::io::stdout().lock();
    let mut say = |report: &Report| {
        let line = serde_json::to_string(report).unwrap_or_default();
        writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
    };
    // By index: NVML also counts lost GPUs.
    let mut gpus: BTreeMap<u32, (Option<String>, Condition)> = BTreeMap::new();
    loop {
        // A set with a lost GPU in it has nothing else to say, so each change makes a new one.
        let set = nvml.create_event_set().map_err(failed)?;
        let mut devices = Vec::new();
        for index in 0..nvml.device_count().map_err(failed)? {
            let (before_uuid, before) = gpus.remove(&index).unzip();
            let device = nvml.device_by_index(index).and_then(|device| Ok((device.uuid()?, device)));
            let (uuid, registered) = match device {
                Ok((uuid, device)) => {
                    let registered = dynamic::register_xid_errors(&device, &set);
                    devices.push((uuid.clone(), device));
                    (Some(uuid), registered)
                }
                Err(error) => (before_uuid.flatten(), Err(error)),
            };
            let condition = match &registered {
                // Some have no such events: nothing is wrong with them.
                Ok(()) | Err(NvmlError::NotSupported) => Condition::Watched,
                Err(NvmlError::GpuLost | NvmlError::ResetRequired) => Condition::Lost,
                Err(_) => Condition::Unwatched,
            };
            if let (Some(uuid), true) = (uuid.clone(), before != Some(condition)) {
                let words = registered.err().as_ref().map(words).unwrap_or_default();
                let said = say(&match condition {
                    Condition::Watched => Report::Answers { uuid },
                    Condition::Unwatched => Report::Unwatched { uuid, words },
                    Condition::Lost => Report::Lost { uuid, words },
                });
                if !said {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            gpus.insert(index, (uuid, condition));
        }
        let answers = |index: u32| nvml.device_by_index(index).and_then(|device| device.uuid()).is_ok();
        let as_before =
            || gpus.iter().all(|(index, (_, before))| answers(*index) == (*before != Condition::Lost));
        // After each event: an error may be the last thing that a GPU says. And now and then, because one comes back unsaid.
        while as_before() {
            let report = match dynamic::next_xid_error(&set, QUIET) {
                Ok(error) => {
                    let of = devices.iter().find(|(_, device)| dynamic::is_same(device, &error.device));
                    let Some((uuid, _)) = of else { continue };
                    Report::Xid { uuid: uuid.clone(), xid: error.xid, instance: error.instance }
                }
                Err(NvmlError::Timeout) => Report::Quiet,
                Err(NvmlError::GpuLost) => {
                    if as_before() {
                        // Not as fast as the machine can.
                        std::thread::sleep(QUIET);
                    }
                    break;
                }
                Err(error) => return Err(failed(error)),
            };
            if !say(&report) {
                return Ok(ExitCode::SUCCESS);
            }
            // Perhaps it can be watched by now.
            if matches!(report, Report::Quiet) && gpus.values().any(|gpu| gpu.1 == Condition::Unwatched) {
                break;
            }
        }
    }
}

/// What an operator calls it; the wrapper's sentence for the rest.
fn words(error: &NvmlError) -> String {
    match error {
        NvmlError::GpuLost => "it fell off the bus (NVML_ERROR_GPU_IS_LOST)".into(),
        NvmlError::ResetRequired => "it needs a reset (NVML_ERROR_RESET_REQUIRED)".into(),
        error => error.to_string(),
    }
}

/// A fact that a driver or a GPU may lack; only a GPU that is gone is an error.
fn optional<T>(fact: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match fact {
        Ok(fact) => Ok(Some(fact)),
        Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => Err(error),
        Err(_) => Ok(None),
    }
}

fn answering(device: &Device<'_>, index: u32) -> Result<AnsweringGpu, NvmlError> {
    let memory = match device.memory_info() {
        Ok(memory) => Ok(memory.total),
        Err(_) => dynamic::total_memory(device),
    };
    // A capability of two small numbers; anything else is no fact.
    let capability = optional(device.cuda_compute_capability())?
        .and_then(|capability| Some((capability.major.try_into().ok()?, capability.minor.try_into().ok()?)));
    let mig_mode = optional(device.mig_mode())?;
    let mig_enabled = mig_mode.as_ref().is_some_and(|mode| mode.current == 1);
    Ok(AnsweringGpu {
        index,
        minor: device.minor_number()?,
        uuid: device.uuid()?,
        pci: sysfs_address(&device.pci_info()?),
        name: optional(device.name())?,
        brand: optional(device.brand())?.map(|brand| brand_word(brand).to_owned()),
        architecture: optional(device.architecture())?.map(|architecture| architecture.to_string()),
        compute_capability: capability,
        memory: optional(memory)?,
        persistence: optional(device.is_in_persistent_mode())?,
        mig_capable: mig_mode.is_some(),
        mig_enabled,
        mig_devices: if mig_enabled { mig_devices(device) } else { Vec::new() },
        nvlinks: nvlinks(device),
        topology: BTreeMap::new(),
        clique: optional(dynamic::fabric_clique(device))?.flatten(),
        vgpu: matches!(optional(device.virtualization_mode())?, Some(GpuVirtualizationMode::Vgpu)),
    })
}

/// NVML pads the domain to eight digits, sysfs to four.
fn sysfs_address(pci: &PciInfo) -> String {
    let function = pci.bus_id.rsplit_once('.').map_or("0", |(_, function)| function);
    format!("{:04x}:{:02x}:{:02x}.{function}", pci.domain, pci.bus, pci.device)
}

/// The words of `NVIDIA_REQUIRE_CUDA=brand=…` in NVIDIA's images.
fn brand_word(brand: Brand) -> &'static str {
    match brand {
        Brand::Unknown => "unknown",
        Brand::Quadro => "quadro",
        Brand::Tesla => "tesla",
        Brand::NVS => "nvs",
        Brand::GRID => "grid",
        Brand::GeForce => "geforce",
        Brand::Titan => "titan",
        Brand::VApps => "nvidiavapps",
        Brand::VPC => "nvidiavpc",
        Brand::VCS => "nvidiavcs",
        Brand::VWS => "nvidiavws",
        Brand::CloudGaming | Brand::VGaming => "nvidiacloudgaming",
        Brand::QuadroRTX => "quadrortx",
        Brand::NvidiaRTX => "nvidiartx",
        Brand::Nvidia => "nvidia",
        Brand::GeForceRTX => "geforcertx",
        Brand::TitanRTX => "titanrtx",
    }
}

fn mig_devices(device: &Device<'_>) -> Vec<MigDevice> {
    // The number of places, most of them empty: instances need not be made in order. Asked of an empty place NVML says
    // NotFound.
    let places = device.mig_device_count().unwrap_or(0);
    (0..places)
        .filter_map(|index| {
            let mig = device.mig_device_by_index(index).ok()?;
            let (gpu_instance, compute_instance) = dynamic::mig_instances(&mig).ok()?;
            let attributes = mig.attributes().ok();
            Some(MigDevice {
                index,
                uuid: mig.uuid().ok()?,
                gpu_instance,
                compute_instance,
                profile: mig.name().ok().and_then(|name| profile(&name)),
                memory: attributes.as_ref().map(|attributes| attributes.memory_size_mb << 20),
                resources: attributes.map(|attributes| MigResources {
                    multiprocessors: attributes.multiprocessor_count,
                    gpu_instance_slices: attributes.gpu_instance_slice_count,
                    compute_instance_slices: attributes.compute_instance_slice_count,
                    copy_engines: attributes.shared_copy_engine_count,
                    decoders: attributes.shared_decoder_count,
                    encoders: attributes.shared_encoder_count,
                    jpeg_engines: attributes.shared_jpeg_count,
                    ofa_engines: attributes.shared_ofa_count,
                }),
            })
        })
        .collect()
}

/// `NVIDIA A100-SXM4-40GB MIG 1g.5gb` ends with the profile; `1c.2g.10gb` is one for part of a GPU instance.
fn profile(name: &str) -> Option<String> {
    name.rsplit_once("MIG ").map(|(_, profile)| profile.trim().to_owned())
}

fn nvlinks(device: &Device<'_>) -> BTreeMap<String, u32> {
    // NVML_NVLINK_MAX_LINKS; GPUs with fewer refuse the numbers above theirs.
    const MAX_LINKS: u32 = 18;
    let mut links = BTreeMap::new();
    for link in (0..MAX_LINKS).map(|link| device.link_wrapper_for(link)) {
        match link.is_active() {
            Ok(true) => {
                if let Ok(other_end) = link.remote_pci_info() {
                    *links.entry(sysfs_address(&other_end)).or_default() += 1;
                }
            }
            Ok(false) => {}
            Err(_) => break,
        }
    }
    links
}

/// Adds how near each GPU is to each other.
fn with_topology(nvml: &Nvml, mut gpus: Vec<Gpu>) -> Vec<Gpu> {
    let devices: Vec<_> = gpus
        .iter()
        .filter_map(|gpu| match gpu {
            Gpu::Answers(facts) => Some((facts.uuid.clone(), facts.index)),
            Gpu::Lost(_) => None,
        })
        .collect();
    for gpu in &mut gpus {
        let Gpu::Answers(facts) = gpu else { continue };
        for (uuid, index) in devices.iter().filter(|(uuid, _)| *uuid != facts.uuid) {
            let level = nvml.device_by_index(facts.index).and_then(|one| {
                let other = nvml.device_by_index(*index)?;
                one.topology_common_ancestor(other)
            });
            if let Ok(level) = level {
                facts.topology.insert(uuid.clone(), nearness(level).to_owned());
            }
        }
    }
    gpus
}

fn nearness(level: TopologyLevel) -> &'static str {
    match level {
        TopologyLevel::Internal => "same-board",
        TopologyLevel::Single => "single-bridge",
        TopologyLevel::Multiple => "multiple-bridges",
        TopologyLevel::HostBridge => "same-host-bridge",
        TopologyLevel::Node => "same-numa-node",
        TopologyLevel::System => "cross-numa-node",
    }
}

/// What a program in this container sees.
fn probe() -> Value {
    let (gpus, nvml_error) = match init(OsStr::new("libnvidia-ml.so.1")) {
        Ok(nvml) => {
            let count = nvml.device_count().unwrap_or(0);
            let gpus = (0..count)
                .filter_map(|index| {
                    let device = nvml.device_by_index(index).ok()?;
                    Some(json!({ "index": index, "uuid": device.uuid().ok(), "name": device.name().ok() }))
                })
                .collect();
            // Stays mapped for the list of libraries.
            std::mem::forget(nvml);
            (gpus, None)
        }
        Err(NvmlError::LibloadingError(error)) => (Vec::new(), Some(error.to_string())),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let cuda = dynamic::cuda_driver_version(OsStr::new("libcuda.so.1"));
    let libraries = mapped_libraries();
    let path = libraries.iter().find(|path| file_name(path).starts_with("libcuda.so"));
    let libcuda = match cuda {
        Ok(version) => {
            json!({ "path": path, "cuda_version": format!("{}.{}", version / 1000, version % 1000 / 10) })
        }
        Err(error) => json!({ "path": path, "error": error }),
    };
    let home = std::env::var_os("HOME");
    let shm = rustix::fs::statvfs("/dev/shm").map(|shm| shm.f_blocks * shm.f_frsize);
    json!({
        "gpus": gpus,
        "nvml_error": nvml_error,
        "libraries": libraries,
        "libcuda": libcuda,
        "shm_bytes": shm.ok(),
        "uid": rustix::process::geteuid().as_raw(),
        "gid": rustix::process::getegid().as_raw(),
        "home": home.as_ref().map(|home| home.to_string_lossy()),
        "home_writable": home.is_some_and(|home| is_writable(Path::new(&home))),
        "devices": devices(),
    })
}

/// The driver's libraries that this process has mapped.
fn mapped_libraries() -> Vec<String> {
    let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    // Address, permissions, offset, device, inode, and then the path, which may hold spaces.
    let paths = maps.lines().filter_map(|line| line.find('/').and_then(|at| line.get(at..)));
    let mut libraries: Vec<String> = paths
        .filter(|path| file_name(path).starts_with("libcuda.so") || file_name(path).starts_with("libnvidia-"))
        .map(String::from)
        .collect();
    libraries.sort_unstable();
    libraries.dedup();
    libraries
}

fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// Whether a file can really be made there: mode bits say yes on read-only mounts.
fn is_writable(dir: &Path) -> bool {
    let file = dir.join(format!(".gpurun-probe-{}", std::process::id()));
    let made = std::fs::OpenOptions::new().write(true).create_new(true).open(&file).is_ok();
    made && std::fs::remove_file(&file).is_ok()
}

fn devices() -> Vec<String> {
    let mut names: Vec<String> = ["/dev", "/dev/nvidia-caps"]
        .iter()
        .filter_map(|dir| Some((dir, std::fs::read_dir(dir).ok()?)))
        .flat_map(|(dir, entries)| entries.flatten().map(move |entry| Path::new(dir).join(entry.file_name())))
        .filter(|path| !path.is_dir())
        .map(|path| path.display().to_string())
        .filter(|path| path.starts_with("/dev/nvidia"))
        .collect();
    names.sort_unstable();
    names
}
