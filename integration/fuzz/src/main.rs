//! One program for all targets: `GPURUN_FUZZ_TARGET` names the one that it fuzzes.
//!
//! Memory is limited by the allocator and not by libFuzzer's `-rss_limit_mb`, which counts the corpus and the fuzzer itself, and is
//! compared once a second.
#![no_main]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The most memory that an input may take, in bytes.
const MAX_MEMORY: usize = 300 << 20;

/// The system's allocator, which ends the process when more than [`MAX_MEMORY`] is in use. libFuzzer is C++ and does not use it.
struct Limited {
    in_use: AtomicUsize,
}

#[global_allocator]
static ALLOCATOR: Limited = Limited { in_use: AtomicUsize::new(0) };

impl Limited {
    fn add(&self, bytes: usize) {
        if self.in_use.fetch_add(bytes, Ordering::Relaxed) + bytes > MAX_MEMORY {
            // The message also needs memory.
            self.in_use.store(0, Ordering::Relaxed);
            eprintln!("an input takes more than {} MiB of memory", MAX_MEMORY >> 20);
            std::process::abort();
        }
    }
}

// SAFETY: the system's allocator does the work; counting does not touch what it returns.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.in_use.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while the content is copied.
        self.add(size);
        self.in_use.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

fn target() -> fn(&[u8]) {
    let wanted = std::env::var("GPURUN_FUZZ_TARGET").unwrap_or_default();
    let all = gpurun::fuzz_targets::TARGETS.iter().chain(gpurun_device_plugin::fuzz_targets::TARGETS);
    let found = all.clone().find(|(name, _)| *name == wanted).map(|(_, target)| *target);
    found.unwrap_or_else(|| {
        let names: Vec<_> = all.map(|(name, _)| *name).collect();
        eprintln!("GPURUN_FUZZ_TARGET names none of: {}", names.join(" "));
        std::process::exit(2)
    })
}

/// Lets libFuzzer keep an input that overflows the stack: its handler of SIGSEGV needs a stack of its own (sigaltstack(2)), and
/// libFuzzer keeps the flag `SA_ONSTACK` if it is set.
fn set_signal_stack() {
    let stack = Box::leak(vec![0_u8; 256 << 10].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack is never freed, and the action is the default one.
    let set = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_ONSTACK;
        libc::sigaltstack(&raw const stack, std::ptr::null_mut())
            | libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut())
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

libfuzzer_sys::fuzz_target!(
    init: set_signal_stack(),
    |bytes: &[u8]| {
        static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
        TARGET.get_or_init(target)(bytes);
    }
);
