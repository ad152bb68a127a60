//! `gpurun-runtime`: becomes the low-level runtime or gpurun.
//!
//! Engines call an OCI runtime four times or more for each container, and gpurun has work to do only for `create` and `run`. This
//! program uses neither std nor a C library, so it adds little to the other calls. It becomes gpurun
//!
//! * if any word is `create` or `run`,
//! * if it does not run as root, whose state directory is the one that it knows,
//! * if `GPURUN_CONFIG` is set, which decides about the low-level runtime,
//! * if there is no record, or the program that it names cannot be executed.
//!
//! Otherwise it becomes the low-level runtime of the last container that was created with the same `--root`, so that the runtime
//! that created a container also starts and deletes it. gpurun records that runtime (`commands/runtime/record.rs`) in the file
//! `low-level-runtimes` of its state directory, a line `ROOT<tab>PATH` for each directory. The file counts only if it belongs to root and
//! no other user may write it.
//!
//! gpurun is the file of that name beside this program. It is called by this program's name.
#![no_std]
#![no_main]
#![no_builtins]

use core::{ffi::c_char, mem::MaybeUninit};

mod kernel;
mod memory;
use kernel::{AT_FDCWD, call, exit, number};

const O_NONBLOCK: usize = 0o4000;
const O_CLOEXEC: usize = 0o2_000_000;
#[cfg(target_arch = "x86_64")]
const O_NOFOLLOW: usize = 0o400_000;
#[cfg(target_arch = "aarch64")]
const O_NOFOLLOW: usize = 0o100_000;

const DEFAULT: &[u8] = b"/run/gpurun";
const RECORD: &[u8] = b"/low-level-runtimes\0";

/// PATH_MAX
const PATH: usize = 4096;
/// The longest record that is read.
const LONGEST: usize = 16 << 10;

/// Memory that is zero until it is written, and is not part of the file.
static mut PATHNAME: [u8; PATH] = [0; PATH];
static mut CONTENT: [u8; LONGEST] = [0; LONGEST];

/// A string of the kernel's, without its NUL.
///
/// SAFETY: `string` ends with NUL and is not changed while the slice is used.
unsafe fn bytes(string: *const c_char) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: it reads to the NUL and no further.
    while unsafe { *string.add(length) } != 0 {
        length += 1;
    }
    // SAFETY: these bytes have just been read.
    unsafe { core::slice::from_raw_parts(string.cast(), length) }
}

/// SAFETY: `stack` is what the kernel passed to `_start`: the number of words, that many pointers to them, a null pointer, and
/// the pointers to the environment with a null pointer behind them (execve(2), arch/*/include/asm/elf.h).
unsafe extern "C" fn run(stack: *mut usize) -> ! {
    // SAFETY: it is the number of words.
    let count = unsafe { *stack };
    // SAFETY: the pointers follow it, and after the words and their null pointer comes the environment.
    let (words, environment) =
        unsafe { (stack.add(1).cast::<*const c_char>(), stack.add(count + 2).cast::<*const c_char>()) };
    // SAFETY: both lists are the kernel's.
    unsafe {
        become_recorded(words, count, environment);
        become_gpurun(words, environment)
    }
}

/// Returns if the low-level runtime is not known here.
///
/// SAFETY: `words` are `count` strings, `environment` is a list of strings that ends with a null pointer.
unsafe fn become_recorded(words: *mut *const c_char, count: usize, environment: *const *const c_char) {
    let mut root: &[u8] = b"";
    let mut at = 1;
    while at < count {
        // SAFETY: there are that many words.
        let word = unsafe { bytes(*words.add(at)) };
        at += 1;
        if word == b"create" || word == b"run" {
            return;
        }
        let option = word.strip_prefix(b"--").or(word.strip_prefix(b"-")).unwrap_or(b"");
        if option == b"root" && at < count {
            // SAFETY: there are that many words.
            root = unsafe { bytes(*words.add(at)) };
        } else if let Some(value) = option.strip_prefix(b"root=") {
            root = value;
        }
    }
    // SAFETY: it takes no memory.
    if count == 0 || unsafe { call(number::GETEUID, [0; 6]) } != 0 {
        return;
    }
    let mut directory = DEFAULT;
    let mut variable = environment;
    // SAFETY: the list ends with a null pointer.
    while let text = unsafe { *variable }
        && !text.is_null()
    {
        // SAFETY: it is one of the strings.
        let text = unsafe { bytes(text) };
        if text.starts_with(b"GPURUN_CONFIG=") {
            return;
        }
        match text.strip_prefix(b"GPURUN_STATE_DIR=") {
            Some([]) | None => {}
            Some(named) => directory = named,
        }
        // SAFETY: it is not the null pointer at the end.
        variable = unsafe { variable.add(1) };
    }
    // SAFETY: this program has one thread, and nothing else uses the two buffers meanwhile.
    let (path, content) = unsafe { (&mut *(&raw mut PATHNAME), &mut *(&raw mut CONTENT)) };
    let Some(program) = record(path, directory, content).and_then(|content| lookup(content, root)) else {
        return;
    };
    // SAFETY: `lookup` returns a string that ends with NUL, and there is a word before the first option to replace. The call returns
    // only if the program cannot be executed, and the word is then put back.
    unsafe {
        let name = *words;
        *words = program.as_ptr().cast();
        call(number::EXECVE, [program.as_ptr().addr(), words.addr(), environment.addr(), 0, 0, 0]);
        *words = name;
    }
}

/// The content of the record in this directory.
fn record<'a>(
    path: &mut [u8; PATH],
    directory: &[u8],
    content: &'a mut [u8; LONGEST],
) -> Option<&'a mut [u8]> {
    let name = path.get_mut(..directory.len() + RECORD.len())?;
    let (before, after) = name.split_at_mut_checked(directory.len())?;
    before.copy_from_slice(directory);
    after.copy_from_slice(RECORD);
    let flags = O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW;
    // SAFETY: the path ends with NUL.
    let file = unsafe { call(number::OPENAT, [AT_FDCWD, name.as_ptr().addr(), flags, 0, 0, 0]) };
    let file = usize::try_from(file).ok()?;
    let mut stat = MaybeUninit::<Stat>::zeroed();
    // SAFETY: `Stat` is as long as the kernel's structure.
    let failed = unsafe { call(number::FSTAT, [file, stat.as_mut_ptr().addr(), 0, 0, 0, 0]) };
    // SAFETY: zeroes are a value of its fields.
    let stat = unsafe { stat.assume_init() };
    if failed != 0 || stat.uid != 0 || stat.mode & 0o170_022 != 0o100_000 {
        return None;
    }
    // SAFETY: the kernel writes at most this many bytes.
    let length = unsafe { call(number::READ, [file, content.as_mut_ptr().addr(), LONGEST, 0, 0, 0]) };
    content.get_mut(..usize::try_from(length).ok()?)
}

/// The path that is recorded for this directory, with NUL in place of its line's end.
fn lookup<'a>(content: &'a mut [u8], root: &[u8]) -> Option<&'a [u8]> {
    let mut rest = content;
    loop {
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let (line, after) = rest.split_at_mut_checked(end + 1)?;
        rest = after;
        let path = line.strip_prefix(root).and_then(|line| line.strip_prefix(b"\t"));
        if path.is_some_and(|path| path.first() == Some(&b'/')) {
            *line.last_mut()? = 0;
            return line.get(root.len() + 1..);
        }
    }
}

/// SAFETY: both are lists of strings that end with a null pointer.
unsafe fn become_gpurun(words: *const *const c_char, environment: *const *const c_char) -> ! {
    // SAFETY: this program has one thread, and nothing else uses the buffer meanwhile.
    let path = unsafe { &mut *(&raw mut PATHNAME) };
    // SAFETY: the kernel writes at most this many bytes; there is room for gpurun's name behind them.
    let length = unsafe {
        call(
            number::READLINKAT,
            [AT_FDCWD, c"/proc/self/exe".as_ptr().addr(), path.as_mut_ptr().addr(), PATH - 8, 0, 0],
        )
    };
    let own = usize::try_from(length).ok().and_then(|length| path.get(..length)).unwrap_or(b"");
    let directory = own.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    if let Some(name) = path.get_mut(directory..directory + 7) {
        name.copy_from_slice(b"gpurun\0");
        // SAFETY: the path ends with NUL; both lists end with a null pointer.
        unsafe { call(number::EXECVE, [path.as_ptr().addr(), words.addr(), environment.addr(), 0, 0, 0]) };
    }
    let message = b"error[GPU-0059]: gpurun's own program gpurun cannot be executed\n  cause: it is not beside gpurun-runtime, or /proc is \
                    not mounted\n  fix: install gpurun beside gpurun-runtime, as its packages do\n";
    // SAFETY: the kernel reads these bytes. Nothing can be done if they cannot be written.
    unsafe { call(number::WRITE, [2, message.as_ptr().addr(), message.len(), 0, 0, 0]) };
    // runc's exit code for every failure.
    exit(1)
}

/// struct stat of x86_64 and of the other 64-bit machines (include/uapi/asm-generic/stat.h).
#[repr(C)]
struct Stat {
    dev: u64,
    ino: u64,
    #[cfg(target_arch = "x86_64")]
    nlink: u64,
    mode: u32,
    #[cfg(not(target_arch = "x86_64"))]
    nlink: u32,
    uid: u32,
    rest: [u64; 16],
}
