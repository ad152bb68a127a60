//! Stands where libcuda.so.1 stands, on a host that has no GPU: it knows its version and finds no device.
#![allow(non_snake_case)]

#[path = "../../../src/simulated_host/description.rs"]
#[allow(dead_code)]
mod description;
#[path = "../../simulated-nvml/src/own_description.rs"]
#[allow(dead_code)]
mod own_description;

use std::ffi::{c_int, c_uint};

/// CUresult's numbers.
const CUDA_SUCCESS: c_int = 0;
const CUDA_ERROR_INVALID_VALUE: c_int = 1;
const CUDA_ERROR_NO_DEVICE: c_int = 100;
const CUDA_ERROR_UNKNOWN: c_int = 999;

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    CUDA_ERROR_NO_DEVICE
}

/// # Safety
/// `version` is null or points to an int, as cuda.h asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    let Some(own) = own_description::own() else { return CUDA_ERROR_UNKNOWN };
    let mut numbers = own.description.cuda.split('.').map(|part| part.parse().unwrap_or(0));
    let number = numbers.next().unwrap_or(0) * 1000 + numbers.next().unwrap_or(0) * 10;
    if version.is_null() {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // SAFETY: not null, and the caller promises an int.
    unsafe { version.write(number) };
    CUDA_SUCCESS
}
