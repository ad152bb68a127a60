//! Calls into the driver's libraries that nvml-wrapper has no method for. Only the dynamic program `gpurun-nvml` uses them.

use libloading::os::unix::{Library, RTLD_NOW, Symbol};
use nvml_wrapper::{
    Device,
    error::{NvmlError, nvml_sym, nvml_try},
};
use std::ffi::{OsStr, c_int};

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
