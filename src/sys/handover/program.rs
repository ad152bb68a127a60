//! The program that executes a container's command.
//!
//! `build.rs` compiles it by itself: it uses neither std nor a C library, so that its start costs two page faults. It is called
//! with these words, and with the environment of the command:
//!
//! | word | meaning |
//! |---|---|
//! | 0 | `gpurun-handover` |
//! | 1 | the number of the descriptor that leads to the launcher, in decimal |
//! | 2 | how many paths follow, in decimal |
//! | 3… | the paths at which the command may be, in the order of PATH |
//! | then | the words of the command |
//!
//! If no path can be executed, it sends the launcher one message of 12 bytes: `exec`, the index of the path (u32), the error of
//! execve(2) (i32), both in the machine's byte order. The index is [`u32::MAX`] if no path exists.
#![no_std]
#![no_main]

use core::{
    arch::{asm, global_asm},
    ffi::c_char,
};

#[cfg(target_arch = "x86_64")]
mod number {
    pub(crate) const SENDTO: usize = 44;
    pub(crate) const EXECVE: usize = 59;
    pub(crate) const FCNTL: usize = 72;
    pub(crate) const EXIT_GROUP: usize = 231;
    pub(crate) const FACCESSAT: usize = 269;
}

/// include/uapi/asm-generic/unistd.h
#[cfg(target_arch = "aarch64")]
mod number {
    pub(crate) const SENDTO: usize = 206;
    pub(crate) const EXECVE: usize = 221;
    pub(crate) const FCNTL: usize = 25;
    pub(crate) const EXIT_GROUP: usize = 94;
    pub(crate) const FACCESSAT: usize = 48;
}

const ENOENT: isize = -2;
const ENOTDIR: isize = -20;
const AT_FDCWD: usize = (-100_isize).cast_unsigned();
const F_SETFD: usize = 2;
const FD_CLOEXEC: usize = 1;
const MSG_NOSIGNAL: usize = 0x4000;

// The kernel starts a program with the stack pointer at the number of its words.
#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "mov rdi, rsp", "and rsp, -16", "call {run}", "ud2", run = sym run);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "mov x0, sp", "bl {run}", "brk 1", run = sym run);

/// SAFETY: what the kernel does with the arguments must be sound for the caller, as for syscall(2).
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: usize, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the caller's word; the kernel changes rcx and r11 besides the result (syscall(2)).
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
             in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// SAFETY: what the kernel does with the arguments must be sound for the caller, as for syscall(2).
#[cfg(target_arch = "aarch64")]
unsafe fn call(number: usize, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the caller's word.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, in("x3") d, in("x4") e,
             in("x5") f, options(nostack));
    }
    result
}

/// SAFETY: `stack` is what the kernel passed to `_start`: the number of words, that many pointers to them, a null pointer, and
/// the pointers to the environment with a null pointer behind them (execve(2), arch/*/include/asm/elf.h).
unsafe extern "C" fn run(stack: *const usize) -> ! {
    // SAFETY: it is the number of words.
    let count = unsafe { *stack };
    // SAFETY: the pointers follow it, and after the words and their null pointer comes the environment.
    let (words, environment) = unsafe { (stack.add(1).cast::<*const c_char>(), stack.add(count + 2)) };
    if count < 4 {
        exit(127);
    }
    // SAFETY: there are at least four words.
    let (channel, paths) = unsafe { (decimal(*words.add(1)), decimal(*words.add(2))) };
    if paths == 0 || paths >= count - 3 {
        exit(127);
    }
    // SAFETY: F_SETFD changes a flag of a descriptor, and no memory.
    unsafe { call(number::FCNTL, [channel, F_SETFD, FD_CLOEXEC, 0, 0, 0]) };
    // SAFETY: `paths` words follow the third, as has been checked, and the command's own follow them.
    let (path, command) = unsafe { (words.add(3), words.add(3 + paths)) };
    let (mut index, mut error) = (u32::MAX, ENOENT);
    let mut at = 0;
    while at < paths {
        // SAFETY: the path is one of the words; both lists end with a null pointer.
        let result = unsafe {
            call(number::EXECVE, [(*path.add(at)).addr(), command.addr(), environment.addr(), 0, 0, 0])
        };
        if index == u32::MAX && result != ENOENT && result != ENOTDIR {
            (index, error) = (at as u32, result);
        }
        at += 1;
    }
    if index == u32::MAX {
        // A file whose interpreter does not exist gives ENOENT as well.
        while at > 0 {
            at -= 1;
            // SAFETY: the path is one of the words.
            let exists = unsafe { call(number::FACCESSAT, [AT_FDCWD, (*path.add(at)).addr(), 0, 0, 0, 0]) };
            if exists == 0 {
                index = at as u32;
            }
        }
    }
    let message = Message { kind: *b"exec", index, error: -(error as i32) };
    // SAFETY: the kernel reads these 12 bytes. A launcher that has ended needs no message.
    unsafe {
        call(number::SENDTO, [channel, (&raw const message).addr(), size_of::<Message>(), MSG_NOSIGNAL, 0, 0])
    };
    exit(if index == u32::MAX { 127 } else { 126 })
}

#[repr(C)]
struct Message {
    kind: [u8; 4],
    index: u32,
    error: i32,
}

/// SAFETY: `word` is a string that ends with NUL.
unsafe fn decimal(mut word: *const c_char) -> usize {
    let mut number = 0_usize;
    // SAFETY: it reads to the NUL and no further.
    while let digit @ b'0'..=b'9' = unsafe { *word }.cast_unsigned() {
        number = number.wrapping_mul(10).wrapping_add(usize::from(digit - b'0'));
        // SAFETY: as above.
        word = unsafe { word.add(1) };
    }
    number
}

fn exit(code: usize) -> ! {
    loop {
        // SAFETY: it ends the process, and reads no memory.
        unsafe { call(number::EXIT_GROUP, [code, 0, 0, 0, 0, 0]) };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(125)
}
