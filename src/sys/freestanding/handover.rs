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

use core::ffi::c_char;

mod kernel;
use kernel::{AT_FDCWD, ENOENT, ENOTDIR, call, exit, number};

const F_SETFD: usize = 2;
const FD_CLOEXEC: usize = 1;
const MSG_NOSIGNAL: usize = 0x4000;

/// SAFETY: `stack` is what the kernel passed to `_start`: the number of words, that many pointers to them, a null pointer, and
/// the pointers to the environment with a null pointer behind them (execve(2), arch/*/include/asm/elf.h).
unsafe extern "C" fn run(stack: *mut usize) -> ! {
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
