//! Stands where nvidia-smi stands on a simulated host: lists what libnvidia-ml.so.1 answers, in nvidia-smi's words, and
//! says that it is simulated.

#![allow(non_upper_case_globals)] // NVML's own names

use nvml_wrapper_sys::bindings::*;
use std::{
    ffi::{CStr, c_char},
    process::ExitCode,
};

fn main() -> ExitCode {
    // SAFETY: loading runs the library's initialisers; libnvidia-ml is what this program is for.
    let library = match unsafe { NvmlLib::new("libnvidia-ml.so.1") } {
        Ok(library) => library,
        Err(error) => {
            eprintln!("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system: {error}");
            return ExitCode::from(12);
        }
    };
    match list(&library) {
        Ok(lines) => {
            // Apart from the list, which scripts compare with the real one.
            eprintln!("nvidia-smi: simulated by gpurun, there is no GPU");
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(code) => {
            eprintln!("nvidia-smi (simulated by gpurun): NVML error {code}");
            ExitCode::from(u8::try_from(code).unwrap_or(255))
        }
    }
}

fn list(nvml: &NvmlLib) -> Result<Vec<String>, nvmlReturn_t> {
    let mut lines = Vec::new();
    // SAFETY: the functions have the types of nvml.h, and every pointer is to a local variable of the type they write.
    unsafe {
        check(nvml.nvmlInit_v2())?;
        let mut count = 0;
        check(nvml.nvmlDeviceGetCount_v2(&mut count))?;
        for index in 0..count {
            let mut gpu = std::ptr::null_mut();
            match nvml.nvmlDeviceGetHandleByIndex_v2(index, &mut gpu) {
                nvmlReturn_enum_NVML_SUCCESS => {}
                code => {
                    let text = CStr::from_ptr(nvml.nvmlErrorString(code)).to_string_lossy().into_owned();
                    lines.push(format!("Unable to determine the device handle for gpu {index}: {text}"));
                    continue;
                }
            }
            let name = text(|buffer, length| nvml.nvmlDeviceGetName(gpu, buffer, length))?;
            let uuid = text(|buffer, length| nvml.nvmlDeviceGetUUID(gpu, buffer, length))?;
            lines.push(format!("GPU {index}: {name} (UUID: {uuid})"));
            let mut mig = std::ptr::null_mut();
            let migs =
                (0..).take_while(|&at| nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, at, &mut mig) == 0);
            for at in migs.collect::<Vec<_>>() {
                check(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, at, &mut mig))?;
                let name = text(|buffer, length| nvml.nvmlDeviceGetName(mig, buffer, length))?;
                let uuid = text(|buffer, length| nvml.nvmlDeviceGetUUID(mig, buffer, length))?;
                let profile = name.rsplit(' ').next().unwrap_or_default();
                lines.push(format!("  MIG {profile:<11} Device {at:>2}: (UUID: {uuid})"));
            }
        }
        check(nvml.nvmlShutdown())?;
    }
    Ok(lines)
}

fn check(code: nvmlReturn_t) -> Result<(), nvmlReturn_t> {
    if code == nvmlReturn_enum_NVML_SUCCESS { Ok(()) } else { Err(code) }
}

fn text(question: impl FnOnce(*mut c_char, u32) -> nvmlReturn_t) -> Result<String, nvmlReturn_t> {
    let mut buffer = [0u8; 128];
    check(question(buffer.as_mut_ptr().cast(), buffer.len() as u32))?;
    Ok(CStr::from_bytes_until_nul(&buffer).unwrap_or_default().to_string_lossy().into_owned())
}

// See own_description.rs.
#[link(name = "gcc_eh", kind = "static", modifiers = "+whole-archive,-bundle")]
unsafe extern "C" {}
