//! Calls into the driver's libraries that nvml-wrapper has no method for. Only the dynamic program `gpurun-nvml` uses them.

use libloading::os::unix::{Library, RTLD_NOW, Symbol};
use nvml_wrapper::{
    Device, EventSet,
    bitmasks::event::EventTypes,
    error::{NvmlError, nvml_sym, nvml_try},
};
use std::{
    ffi::{OsStr, c_int},
    time::Duration,
};

/// Ids of a MIG device's GPU instance and compute instance (`nvmlDeviceGetGpuInstanceId`,
/// `nvmlDeviceGetComputeInstanceId`; since driver 450).
///
/// # Errors
/// NVML's own, and `FailedToLoadSymbol` from an older driver.
pub fn mig_instances(mig: &Device<'_>) -> Result<(u32, u32), NvmlError> {
    let lib = mig.nvml().lib();
    let gpu_instance = nvml_sym(lib.nvmlDeviceGetGpuInstanceId.as_ref())?;
    let compute_instance = nvml_sym(lib.nvmlDeviceGetComputeInstanceId.as_ref())?;
    let (mut gi, mut ci) = (0, 0);
    // SAFETY: the handle lives as long as the library, which `mig` borrows; both functions write one unsigned int.
    unsafe {
        nvml_try(gpu_instance(mig.handle(), &raw mut gi))?;
        nvml_try(compute_instance(mig.handle(), &raw mut ci))?;
    }
    Ok((gi, ci))
}

/// Lets the set hear of this device's XID errors (`nvmlDeviceRegisterEvents`); the wrapper's method frees the set where one device
/// of many refuses.
///
/// # Errors
/// NVML's own.
pub fn register_xid_errors(device: &Device<'_>, set: &EventSet<'_>) -> Result<(), NvmlError> {
    let register = nvml_sym(device.nvml().lib().nvmlDeviceRegisterEvents.as_ref())?;
    // SAFETY: both handles live as long as the library, which `device` and `set` borrow.
    unsafe { nvml_try(register(device.handle(), EventTypes::CRITICAL_XID_ERROR.bits(), set.handle())) }
}

/// An XID error.
#[derive(Debug)]
pub struct XidError<'nvml> {
    /// Whose it is.
    pub device: Device<'nvml>,
    /// Its number.
    pub xid: u64,
    /// GPU instance and compute instance that it is about, where MIG is on.
    pub instance: Option<(u32, Option<u32>)>,
}

/// The next XID error, or `Timeout` (`nvmlEventSetWait_v2`); the wrapper's method leaves the instances out.
///
/// # Errors
/// NVML's own.
pub fn next_xid_error<'nvml>(set: &EventSet<'nvml>, limit: Duration) -> Result<XidError<'nvml>, NvmlError> {
    /// What NVML puts in the place of an instance where there is none.
    const NONE: u32 = u32::MAX;
    let wait = nvml_sym(set.nvml.lib().nvmlEventSetWait_v2.as_ref())?;
    let milliseconds = limit.as_millis().try_into().unwrap_or(u32::MAX);
    // SAFETY: the structure consists of a pointer and integers, for which zero is a value; the set lives as long as the library,
    // which it borrows; the function fills the structure, with a handle that NVML has given out.
    unsafe {
        let mut data = std::mem::zeroed();
        nvml_try(wait(set.handle(), &raw mut data, milliseconds))?;
        let compute_instance = Some(data.computeInstanceId).filter(|id| *id != NONE);
        Ok(XidError {
            device: Device::new(data.device, set.nvml),
            xid: data.eventData,
            instance: (data.gpuInstanceId != NONE).then_some((data.gpuInstanceId, compute_instance)),
        })
    }
}

/// Whether both are the same device, also when it does not answer.
pub fn is_same(one: &Device<'_>, other: &Device<'_>) -> bool {
    // SAFETY: the handles are compared, and not used.
    unsafe { one.handle() == other.handle() }
}

/// The NVLink fabric of several machines that a GPU is part of, `CLUSTER-UUID.CLIQUE` (`nvmlDeviceGetGpuFabricInfo`, since driver
/// 520); `None` if it is part of none.
///
/// # Errors
/// NVML's own, and `FailedToLoadSymbol` from an older driver.
pub fn fabric_clique(device: &Device<'_>) -> Result<Option<String>, NvmlError> {
    /// NVML_GPU_FABRIC_STATE_COMPLETED
    const COMPLETED: u8 = 3;
    let fabric_info = nvml_sym(device.nvml().lib().nvmlDeviceGetGpuFabricInfo.as_ref())?;
    // SAFETY: the structure consists of integers, for which zero is a value; the handle lives as long as the library, which
    // `device` borrows; the function fills the structure.
    let info = unsafe {
        let mut info = std::mem::zeroed();
        nvml_try(fabric_info(device.handle(), &raw mut info))?;
        info
    };
    nvml_try(info.status)?;
    if info.state != COMPLETED || info.clusterUuid == [0; 16] {
        return Ok(None);
    }
    let mut uuid: String = info.clusterUuid.iter().map(|byte| format!("{byte:02x}")).collect();
    for dash in [8, 13, 18, 23] {
        uuid.insert(dash, '-');
    }
    Ok(Some(format!("{uuid}.{}", info.cliqueId)))
}

/// Memory in bytes by `nvmlDeviceGetMemoryInfo`, the only form that drivers before 510 have.
///
/// # Errors
/// NVML's own.
pub fn total_memory(device: &Device<'_>) -> Result<u64, NvmlError> {
    let memory_info = nvml_sym(device.nvml().lib().nvmlDeviceGetMemoryInfo.as_ref())?;
    // SAFETY: the structure consists of integers, for which zero is a value; the handle lives as long as the library, which
    // `device` borrows; the function fills the structure.
    unsafe {
        let mut memory = std::mem::zeroed();
        nvml_try(memory_info(device.handle(), &raw mut memory))?;
        Ok(memory.total)
    }
}

/// CUDA's version as the libcuda at `path` tells it (`cuDriverGetVersion`, which needs no device): 12040 is 12.4. `path` may
/// be a bare name, which the loader then searches for.
///
/// # Errors
/// The loader's words, or CUDA's number.
pub fn cuda_driver_version(path: &OsStr) -> Result<u32, String> {
    // SAFETY: loading runs the library's constructors; it is the driver's own, which every CUDA program loads.
    let library = unsafe { Library::open(Some(path), RTLD_NOW) }.map_err(|error| error.to_string())?;
    // SAFETY: this is the function's type in cuda.h: CUresult cuDriverGetVersion(int *).
    let get: Symbol<unsafe extern "C" fn(*mut c_int) -> c_int> =
        unsafe { library.get(b"cuDriverGetVersion\0") }.map_err(|error| error.to_string())?;
    let mut version = 0;
    // SAFETY: it writes one int; the library is loaded until the end of this function.
    let result = unsafe { get(&raw mut version) };
    // libcuda leaves threads and handlers behind that must not lose their code.
    std::mem::forget(library);
    match u32::try_from(version) {
        Ok(version) if result == 0 => Ok(version),
        _ => Err(format!("cuDriverGetVersion failed with CUDA error {result}")),
    }
}
