//! A CUDA kernel on every GPU that this process sees, through the driver's API alone: no toolkit is needed to build or run it.
//! `integration/gpu` runs it in a container.

use libloading::{Library, Symbol};
use std::{
    ffi::{c_char, c_int, c_uint, c_void},
    process::ExitCode,
    ptr,
};

/// out[i] = i * 3 + 1, for `n` elements. PTX 6.0 for compute capability 3.0: every driver of today compiles it for its GPU.
const PTX: &str = concat!(
    ".version 6.0\n.target sm_30\n.address_size 64\n",
    ".visible .entry fill(.param .u64 out, .param .u32 n)\n{\n",
    ".reg .pred %p<2>;\n.reg .b32 %r<7>;\n.reg .b64 %d<5>;\n",
    "ld.param.u64 %d1, [out];\nld.param.u32 %r1, [n];\n",
    "mov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\nmov.u32 %r4, %tid.x;\n",
    "mad.lo.s32 %r5, %r2, %r3, %r4;\nsetp.ge.u32 %p1, %r5, %r1;\n@%p1 bra DONE;\n",
    "cvta.to.global.u64 %d2, %d1;\nmul.wide.u32 %d3, %r5, 4;\nadd.s64 %d4, %d2, %d3;\n",
    "mad.lo.s32 %r6, %r5, 3, 1;\nst.global.u32 [%d4], %r6;\nDONE:\nret;\n}\n\0"
);

const COUNT: u32 = 1 << 20;
const THREADS: u32 = 256;

fn main() -> ExitCode {
    match run() {
        Ok(devices) => {
            println!("{devices} GPUs computed {COUNT} elements each");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<c_int, String> {
    // SAFETY: the driver's library has no initialiser with demands on its caller.
    let cuda = unsafe { Library::new("libcuda.so.1") }.map_err(|error| error.to_string())?;
    let cuda = Cuda(&cuda);
    let mut devices = 0;
    // SAFETY (this block): every function is called with the types of cuda.h, and every pointer is to a live value of them.
    unsafe {
        cuda.call::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit", |f| f(0))?;
        cuda.call::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDeviceGetCount", |f| f(&raw mut devices))?;
        for device in 0..devices {
            compute(&cuda, device)?;
        }
    }
    if devices == 0 { Err("there is no GPU".into()) } else { Ok(devices) }
}

/// # Safety
/// `cuda` is the driver's library, initialised.
unsafe fn compute(cuda: &Cuda<'_>, device: c_int) -> Result<(), String> {
    type Handle = *mut c_void;
    let (mut context, mut module, mut kernel): (Handle, Handle, Handle) =
        (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    let mut memory: u64 = 0;
    let bytes = COUNT as usize * 4;
    let mut result = vec![0u32; COUNT as usize];
    // SAFETY: as in `run`; the kernel's arguments are a device pointer and a 32-bit number, as its PTX declares, and it writes
    // within the `bytes` that were allocated.
    unsafe {
        cuda.call::<unsafe extern "C" fn(*mut Handle, c_int) -> c_int>("cuDevicePrimaryCtxRetain", |f| {
            f(&raw mut context, device)
        })?;
        cuda.call::<unsafe extern "C" fn(Handle) -> c_int>("cuCtxSetCurrent", |f| f(context))?;
        cuda.call::<unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int>("cuModuleLoadData", |f| {
            f(&raw mut module, PTX.as_ptr().cast())
        })?;
        cuda.call::<unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int>(
            "cuModuleGetFunction",
            |f| f(&raw mut kernel, module, c"fill".as_ptr()),
        )?;
        cuda.call::<unsafe extern "C" fn(*mut u64, usize) -> c_int>("cuMemAlloc_v2", |f| {
            f(&raw mut memory, bytes)
        })?;
        let mut count = COUNT;
        let mut arguments: [*mut c_void; 2] = [(&raw mut memory).cast(), (&raw mut count).cast()];
        type Launch = unsafe extern "C" fn(
            Handle,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            Handle,
            *mut *mut c_void,
            *mut *mut c_void,
        ) -> c_int;
        cuda.call::<Launch>("cuLaunchKernel", |f| {
            f(
                kernel,
                COUNT / THREADS,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                ptr::null_mut(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })?;
        cuda.call::<unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int>("cuMemcpyDtoH_v2", |f| {
            f(result.as_mut_ptr().cast(), memory, bytes)
        })?;
        cuda.call::<unsafe extern "C" fn(u64) -> c_int>("cuMemFree_v2", |f| f(memory))?;
        cuda.call::<unsafe extern "C" fn(c_int) -> c_int>("cuDevicePrimaryCtxRelease_v2", |f| f(device))?;
    }
    match result.iter().zip(0u32..).find(|(value, i)| **value != i * 3 + 1) {
        None => Ok(()),
        Some((value, i)) => Err(format!("GPU {device} computed {value} for element {i}")),
    }
}

struct Cuda<'a>(&'a Library);

impl Cuda<'_> {
    /// Calls a function of the library by its name; an error with CUDA's number.
    ///
    /// # Safety
    /// `F` is the function's type in cuda.h.
    unsafe fn call<F: Copy>(&self, name: &str, call: impl FnOnce(F) -> c_int) -> Result<(), String> {
        // SAFETY: the caller vouches for the type.
        let function: Symbol<'_, F> =
            unsafe { self.0.get(name.as_bytes()) }.map_err(|error| error.to_string())?;
        match call(*function) {
            0 => Ok(()),
            error => Err(format!("{name} failed with CUDA error {error}")),
        }
    }
}
