//! `--init`: pid 1 of the container, which starts the command, forwards every signal to it and reaps orphans.

use super::command::{self, Command};
use crate::{
    error::{Code, Error, OrFail, Result},
    sys::process,
};
use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{fd::AsFd, io::Errno, process::WaitOptions};
use std::{
    ffi::{CStr, CString, OsStr},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

/// The name by which gpurun is called when it is a container's pid 1.
pub const INIT_NAME: &CStr = c"gpurun-init";

/// Runs the command in `argv` as a child until it ends. Its exit code. Everything else about the container is done.
///
/// # Errors
/// When the command cannot be run.
pub fn run(argv: &[CString]) -> Result<u8> {
    if argv.is_empty() {
        return Err(Error::new(Code::Usage, "there is no command to run"));
    }
    let mut all = SigSet::all();
    // Blocked, these would be faults that never end.
    for signal in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE] {
        all.remove(signal);
    }
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None)
        .or_fail(Code::Internal, || "sigprocmask failed")?;
    let child = process::fork().or_fail(Code::Internal, || "the command's process cannot be made")?;
    if child == 0 {
        // A process group of its own in the terminal's foreground, so that Ctrl-C reaches the command and not this one twice.
        // Without a terminal there is none to take. SIGTTOU is still blocked here.
        let own = nix::unistd::getpid();
        let _ = nix::unistd::setpgid(own, own);
        let _ = nix::unistd::tcsetpgrp(rustix::stdio::stdin(), own);
        process::reset_signals();
        let error = command(argv).execute();
        crate::output::report(&error);
        process::exit_now(i32::from(error.code().exit_code()));
    }
    // By number: real-time signals have no names.
    let signals = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC)
        .or_fail(Code::Internal, || "signals cannot be read by descriptor")?;
    let command = rustix::process::Pid::from_raw(child)
        .ok_or(Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .or_fail(Code::Internal, || "the command's process cannot be opened")?;
    loop {
        let Some(info) = signals.read_signal().or_fail(Code::Internal, || "signals cannot be read")? else {
            continue;
        };
        let signal = info.ssi_signo.cast_signed();
        if signal != libc::SIGCHLD {
            // A command that has just ended needs no signal.
            let _ = process::send_signal(command.as_fd(), signal);
            continue;
        }
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                // The child has made its parent the tracer (PTRACE_TRACEME).
                Ok(Some((pid, status))) if status.stopped() => {
                    process::release(pid.as_raw_nonzero().get(), status.stopping_signal().unwrap_or(0));
                }
                Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == child => {
                    let code = status
                        .exit_status()
                        .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
                    return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255));
                }
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }
}

/// The command of these words, with this program's own environment.
fn command(argv: &[CString]) -> Command {
    let c_string = |bytes: Vec<u8>| CString::new(bytes).ok();
    let path = std::env::var("PATH").unwrap_or_default();
    let name = argv.first().map_or(OsStr::new(""), |name| OsStr::from_bytes(name.to_bytes()));
    Command {
        paths: command::paths(name, &path)
            .into_iter()
            .filter_map(|path| c_string(path.into_os_string().into_vec()))
            .collect(),
        argv: argv.to_vec(),
        env: std::env::vars_os()
            .filter_map(|(name, value)| c_string([name.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect(),
    }
}
