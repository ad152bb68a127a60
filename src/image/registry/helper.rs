//! Runs a credential helper (docker/docker-credential-helpers): an address on its standard input, an answer on its output.
//!
//! A helper is bounded: it may print so much, and it may run so long. It is over when its process has ended, not when its output is
//! closed: a helper may start an agent that inherits the output and lives on.

use crate::error::{Code, Error, OrFail, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, OwnedFd},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use std::{
    ffi::OsStr,
    io::Write,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// The bounds of a helper.
#[derive(Clone, Copy)]
pub struct Limits {
    /// The most bytes of its standard output, and of its standard error.
    bytes: usize,
    /// The longest time until it ends.
    time: Duration,
}

impl Limits {
    /// Secrets have a few kB. A helper may ask its user for a password.
    pub const DEFAULT: Self = Self { bytes: 64 << 10, time: Duration::from_secs(60) };
}

/// Kills the helper when it is dropped, unless it has ended.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where it has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `program get` with the address of a registry as its input.
///
/// # Errors
/// [`Code::NotAuthorised`] where it cannot be run, prints too much or runs too long.
pub fn run(program: &OsStr, address: &str, limits: Limits) -> Result<Output> {
    let shown = program.display();
    let fail = || format!("the credential helper {shown} failed");
    let child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .or_fail(Code::NotAuthorised, || format!("the credential helper {shown} cannot be run"))?;
    let mut helper = Running(child);
    if let Some(mut input) = helper.0.stdin.take() {
        // A helper without credentials may end without reading. A pipe takes an address whether it is read or not.
        let _ = input.write_all(address.as_bytes());
    }
    let mut wait = || {
        let ended = pidfd_open(Pid::from_child(&helper.0), PidfdFlags::empty())?;
        let pipes = [helper.0.stdout.take().map(OwnedFd::from), helper.0.stderr.take().map(OwnedFd::from)];
        read_until_it_ends(&ended, pipes, limits)
    };
    let [stdout, stderr] = wait()
        .or_fail(Code::NotAuthorised, fail)?
        .map_err(|why| Error::new(Code::NotAuthorised, fail()).cause(why))?;
    let status = helper.0.wait().or_fail(Code::NotAuthorised, fail)?;
    Ok(Output { status, stdout, stderr })
}

/// What comes from the pipes until the process ends; the inner error is the limit that it passed.
fn read_until_it_ends(
    ended: &OwnedFd,
    mut pipes: [Option<OwnedFd>; 2],
    limits: Limits,
) -> rustix::io::Result<Result<[Vec<u8>; 2], String>> {
    for pipe in pipes.iter().flatten() {
        fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?;
    }
    let deadline = Instant::now() + limits.time;
    let mut output = [Vec::new(), Vec::new()];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Err(format!("it did not end within {} s, and was killed", limits.time.as_secs_f32())));
        }
        let mut polled = vec![PollFd::new(ended, PollFlags::IN)];
        polled.extend(pipes.iter().flatten().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(&mut polled, Some(&left)) {
            Err(Errno::INTR) => continue,
            done => done?,
        };
        let has_ended = !polled[0].revents().is_empty();
        for (pipe, bytes) in pipes.iter_mut().zip(&mut output) {
            if let Some(open) = pipe
                && read_what_is_there(open, bytes, limits.bytes)?
            {
                *pipe = None;
            }
            if bytes.len() > limits.bytes {
                return Ok(Err(format!("it printed more than {} bytes, and was killed", limits.bytes)));
            }
        }
        if has_ended {
            return Ok(Ok(output));
        }
    }
}

/// Reads a pipe up to a few bytes past the limit. Returns whether its end was reached.
fn read_what_is_there(pipe: impl AsFd, bytes: &mut Vec<u8>, limit: usize) -> rustix::io::Result<bool> {
    let mut chunk = [0; 4096];
    while bytes.len() <= limit {
        match rustix::io::read(&pipe, &mut chunk) {
            Ok(0) => return Ok(true),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    /// Runs a helper that is this script, with short limits.
    fn run_script(script: &str) -> (Result<Output>, Duration) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-test");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let started = Instant::now();
        let limits = Limits { bytes: 1000, time: Duration::from_secs(2) };
        let output = loop {
            match run(path.as_os_str(), "https://registry.example", limits) {
                // Another test's fork may still have the file open for writing (ETXTBSY).
                Err(error) if error.cause_line().contains("busy") => {}
                done => break done,
            }
        };
        (output, started.elapsed())
    }

    #[test]
    fn a_helpers_answer_is_read_whole() {
        let (output, _) = run_script("read address; echo \"$address\"; echo why >&2; exit 3");
        let output = output.unwrap();
        assert_eq!(output.stdout, b"https://registry.example\n");
        assert_eq!((output.stderr.as_slice(), output.status.code()), (&b"why\n"[..], Some(3)));
    }

    #[test]
    fn a_helper_that_prints_for_ever_is_killed() {
        for script in ["exec yes", "exec yes >&2"] {
            let (output, took) = run_script(script);
            let error = output.unwrap_err();
            assert!(error.what().contains("docker-credential-test failed"), "{}", error.what());
            assert!(error.cause_line().contains("more than 1000 bytes"), "{}", error.cause_line());
            assert!(took < Duration::from_secs(2), "{took:?}");
        }
    }

    #[test]
    fn a_helper_that_hangs_is_killed() {
        let (output, took) = run_script("exec sleep 1000");
        let error = output.unwrap_err();
        assert!(error.what().contains("docker-credential-test failed"), "{}", error.what());
        assert!(error.cause_line().contains("within 2 s"), "{}", error.cause_line());
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[test]
    fn a_helper_is_over_although_its_child_holds_the_output() {
        let (output, took) = run_script("sleep 30 & echo '{}'");
        assert_eq!(output.unwrap().stdout, b"{}\n");
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
}
