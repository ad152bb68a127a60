//! The simulated driver, asked through the bindings that gpurun's own reader uses.

use gpurun::simulated_host::{DriverFiles, InitError};
use gpurun_integration::{TestHost, description, run};
use nvml_wrapper::{Nvml, enum_wrappers::device::Brand, error::NvmlError};
use std::{fs, path::Path, process::Command, ptr};

const NVML: &str = "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1";
const CUDA: &str = "usr/lib/x86_64-linux-gnu/libcuda.so.1";

fn nvml(host: &TestHost) -> Result<Nvml, NvmlError> {
    Nvml::builder().lib_path(host.driver(NVML).as_os_str()).init()
}

#[test]
fn nvml_says_of_every_gpu_what_its_description_says() {
    for name in ["8xh100", "a100-mig", "t4", "slow-init"] {
        let host = TestHost::new(name);
        let (nvml, told) = (nvml(&host).unwrap(), description(name));
        assert_eq!(nvml.sys_driver_version().unwrap(), told.driver);
        let cuda = nvml.sys_cuda_driver_version().unwrap();
        assert_eq!(format!("{}.{}", cuda / 1000, cuda % 1000 / 10), told.cuda);
        assert_eq!(nvml.device_count().unwrap() as usize, told.gpus.len());
        for (index, told) in (0..).zip(&told.gpus) {
            let gpu = nvml.device_by_index(index).unwrap();
            assert_eq!(gpu.name().unwrap(), told.name);
            assert_eq!(gpu.uuid().unwrap(), told.uuid);
            assert_eq!(gpu.minor_number().unwrap(), told.minor);
            assert_eq!(gpu.index().unwrap(), index);
            assert_eq!(gpu.memory_info().unwrap().total, told.memory);
            assert_eq!(gpu.architecture().unwrap().to_string(), told.architecture);
            let capability = gpu.cuda_compute_capability().unwrap();
            assert_eq!(format!("{}.{}", capability.major, capability.minor), told.compute_capability);
            assert_eq!(gpu.pci_info().unwrap().bus_id.to_ascii_lowercase(), format!("0000{}", told.pci));
            assert_eq!(nvml.device_by_uuid(told.uuid.as_str()).unwrap().index().unwrap(), index);
            assert_eq!(nvml.device_by_pci_bus_id(told.pci.as_str()).unwrap().index().unwrap(), index);
        }
    }
    let host = TestHost::new("t4");
    let brand = nvml(&host).unwrap().device_by_index(0).unwrap().brand().unwrap();
    assert_eq!(brand, Brand::Tesla);
}

#[test]
fn every_gpu_of_the_h100_host_reaches_every_other_by_two_links() {
    let host = TestHost::new("8xh100");
    let (nvml, told) = (nvml(&host).unwrap(), description("8xh100"));
    let gpu = nvml.device_by_index(0).unwrap();
    let ends: Vec<String> = (0..18)
        .map(|link| gpu.link_wrapper_for(link))
        .filter(|link| link.is_active().unwrap())
        .map(|link| link.remote_pci_info().unwrap().bus_id.to_ascii_lowercase())
        .collect();
    assert_eq!(ends.len(), 14);
    for other in &told.gpus[1..] {
        assert_eq!(ends.iter().filter(|end| **end == format!("0000{}", other.pci)).count(), 2);
    }
    assert!(gpu.link_wrapper_for(18).is_active().is_err());
}

#[test]
fn mig_devices_have_ids_a_parent_and_a_size() {
    let host = TestHost::new("a100-mig");
    let (nvml, told) = (nvml(&host).unwrap(), description("a100-mig"));
    let gpu = nvml.device_by_index(0).unwrap();
    let told = &told.gpus[0].mig.as_ref().unwrap().devices;
    for (index, told) in (0..).zip(told) {
        let mig = gpu.mig_device_by_index(index).unwrap();
        assert_eq!(mig.uuid().unwrap(), told.uuid);
        assert!(mig.name().unwrap().ends_with(&format!(" MIG {}", told.profile)));
        assert!(mig.mig_is_mig_device_handle().unwrap());
        assert_eq!(mig.mig_parent_device().unwrap().uuid().unwrap(), gpu.uuid().unwrap());
        assert_eq!(mig.attributes().unwrap().memory_size_mb, told.memory >> 20);
        // SAFETY: the handle is NVML's own, the pointer is to a local variable.
        let ids = unsafe {
            let (mut instance, mut compute) = (99, 99);
            assert_eq!(nvml.lib().nvmlDeviceGetGpuInstanceId(mig.handle(), &mut instance), 0);
            assert_eq!(nvml.lib().nvmlDeviceGetComputeInstanceId(mig.handle(), &mut compute), 0);
            (instance, compute)
        };
        assert_eq!(ids, (told.gpu_instance, told.compute_instance));
    }
    assert!(matches!(gpu.mig_device_by_index(told.len() as u32), Err(NvmlError::NotFound)));
    assert!(matches!(nvml.device_by_index(1).unwrap().mig_device_by_index(0), Err(NvmlError::NotFound)));
}

#[test]
fn faults_are_those_of_a_real_driver() {
    let host = TestHost::new("one-lost-gpu");
    let lost = nvml(&host).unwrap();
    assert_eq!(lost.device_count().unwrap(), 4);
    assert!(matches!(lost.device_by_index(2), Err(NvmlError::GpuLost)));
    assert_eq!(lost.device_by_index(3).unwrap().index().unwrap(), 3);
    assert!(matches!(lost.device_by_index(4), Err(NvmlError::InvalidArg)));
    assert!(matches!(lost.device_by_uuid("GPU-0"), Err(NvmlError::NotFound)));

    // R470 did not know the second version of the memory question.
    let host = TestHost::new("old-driver");
    let old = nvml(&host).unwrap();
    assert!(matches!(old.device_by_index(0).unwrap().memory_info(), Err(NvmlError::FunctionNotFound)));

    for (error, expected) in [
        (InitError::DriverNotLoaded, "DriverNotLoaded"),
        (InitError::LibRmVersionMismatch, "LibRmVersionMismatch"),
        (InitError::NoPermission, "NoPermission"),
        (InitError::Unknown, "Unknown"),
    ] {
        let mut description = description("t4");
        description.init_error = Some(error);
        let host = TestHost::with(&description, DriverFiles::StandIns);
        let error = nvml(&host).err().unwrap();
        assert_eq!(format!("{error:?}"), expected);
    }
}

#[test]
fn null_pointers_and_unknown_handles_are_invalid_arguments() {
    const INVALID_ARGUMENT: u32 = 2;
    let host = TestHost::new("t4");
    let nvml = nvml(&host).unwrap();
    let lib = nvml.lib();
    let mut number = 0;
    // SAFETY: that the library checks what it is given is what is tested.
    unsafe {
        assert_eq!(lib.nvmlDeviceGetCount_v2(ptr::null_mut()), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlSystemGetDriverVersion(ptr::null_mut(), 80), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlDeviceGetHandleByUUID(ptr::null(), ptr::null_mut()), INVALID_ARGUMENT);
        for handle in [0usize, 1, 255, 257, 2 * 256, usize::MAX] {
            let handle = ptr::without_provenance_mut(handle);
            assert_eq!(lib.nvmlDeviceGetMinorNumber(handle, &mut number), INVALID_ARGUMENT, "{handle:?}");
        }
    }
}

#[test]
fn in_a_container_only_what_has_its_node_is_seen() {
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!(
            "skipped: this host has an NVIDIA driver, so it does not look like a container without a GPU"
        );
        return;
    }
    let host = TestHost::new("t4");
    let elsewhere = host.state_dir(0).join("libnvidia-ml.so.1");
    fs::copy(host.driver(NVML), &elsewhere).unwrap();
    let error = Nvml::builder().lib_path(elsewhere.as_os_str()).init().err().unwrap();
    assert!(matches!(error, NvmlError::DriverNotLoaded));
}

#[test]
fn the_libraries_have_a_drivers_names_and_need_the_c_library_alone() {
    let host = TestHost::new("t4");
    for (library, soname) in [(NVML, "libnvidia-ml.so.1"), (CUDA, "libcuda.so.1")] {
        let dynamic = run(Command::new("readelf").arg("-d").arg(host.driver(library))).out;
        assert!(dynamic.contains(&format!("soname: [{soname}]")), "{dynamic}");
        assert!(!dynamic.contains("libgcc_s"), "{dynamic}");
    }
}

#[test]
fn libcuda_knows_its_version_and_finds_no_device() {
    let host = TestHost::new("old-driver");
    // SAFETY: the functions have the types of cuda.h.
    unsafe {
        let cuda = libloading::Library::new(host.driver(CUDA)).unwrap();
        let version = cuda.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"cuDriverGetVersion").unwrap();
        let init = cuda.get::<unsafe extern "C" fn(u32) -> i32>(b"cuInit").unwrap();
        let mut number = 0;
        assert_eq!((version(&mut number), number), (0, 11040));
        assert_eq!(version(ptr::null_mut()), 1);
        assert_eq!(init(0), 100);
    }
}
