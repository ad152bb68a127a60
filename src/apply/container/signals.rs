//! Forwards signals to a container.
//!
//! Signals to the launcher go to the container's pid 1, as Docker's `--sig-proxy` forwards them, real-time signals included.
//! SIGTERM is the request to stop and becomes the container's stop signal (`--stop-signal`, the image's STOPSIGNAL). Signals
//! that the launcher's parent ignores (nohup, background jobs of a script) stay ignored.
//!
//! The kernel drops a signal to pid 1 whose action is the default (pid_namespaces(7)), so `sleep` as pid 1 would never end by
//! SIGTERM. [`PidOne`] therefore reads from /proc/PID/status what pid 1 does with the signal. Where it neither handles, ignores
//! nor blocks a signal that ends any other process, the container is killed and its exit code is 128 plus that signal's number.
//! This costs nothing at the start, and the command stays pid 1; our own init process would cost an exec and a fork. `--init`
//! does not need this: gpurun-init blocks all signals and passes them to the command, which is not pid 1 then.
//!
//! The same rule holds for Ctrl-C and Ctrl-\ on a container's terminal, where the kernel sends the signal inside the
//! container:
//! see [`super::terminal`].

use super::process_files::ProcessFiles;
use crate::{
    error::{Code, OrFail, Result},
    sys::process,
};
use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    process::{WaitId, WaitIdOptions, WaitIdStatus},
};
use std::io;

/// Signals about the launcher itself: its terminal's job control, its faults, its writes. SIGCHLD is read, and all others are
/// forwarded, including real-time signals. SIGKILL and SIGSTOP cannot be blocked.
const NOT_FORWARDED: [Signal; 11] = [
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGILL,
    Signal::SIGTRAP,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGSEGV,
    Signal::SIGSYS,
    Signal::SIGPIPE,
    Signal::SIGXFSZ,
];

/// The forwarded signals, and SIGCHLD. They are blocked while this value lives and read by descriptor, so that none is lost or interrupts.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    blocked: SigSet,
}

impl Signals {
    /// Blocks the signals. Called before the container's process is made, so that signals that arrive in between stay pending.
    pub fn block() -> Result<Self> {
        // SigSet can name real-time signals only all at once.
        let mut blocked = SigSet::all();
        for signal in Signal::iterator() {
            if NOT_FORWARDED.contains(&signal) || process::is_ignored(signal as i32) {
                blocked.remove(signal);
            }
        }
        let mut masked = blocked;
        // A write beyond RLIMIT_FSIZE then fails with EFBIG, which is reported like a full disk. The signal stays blocked and
        // pending. The command's mask is empty again.
        masked.add(Signal::SIGXFSZ);
        let make = || {
            nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&masked), None)?;
            SignalFd::with_flags(&blocked, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        };
        let descriptor = make().or_fail(Code::Internal, || "signals cannot be read by descriptor")?;
        Ok(Self { descriptor, blocked })
    }

    /// The number of the next signal that arrived and that the launcher's parent does not ignore.
    pub fn next(&self) -> Option<i32> {
        loop {
            let signal = self.descriptor.read_signal().ok()??.ssi_signo.cast_signed();
            if !process::is_ignored(signal) {
                return Some(signal);
            }
        }
    }

    /// Whether [`Signals::next`] may have a signal.
    pub fn are_pending(&self) -> bool {
        let mut poll = [PollFd::new(self, PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut poll, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Lets signals act on the launcher itself again, but drops those that arrived until now: the container has ended.
    pub fn unblock(&self) {
        while self.next().is_some() {}
        // Changing the mask of this thread to a valid one cannot fail.
        let _ = nix::sys::signal::sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&self.blocked), None);
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The first process of a container. Its pid stays its own until [`PidOne::exit_code`] has waited for it.
#[derive(Debug)]
pub struct PidOne {
    pidfd: OwnedFd,
    pid: i32,
    /// The signal for which the container was killed, because pid 1 does not handle it.
    ended_by: Option<i32>,
    /// A signal that pid 1 blocked when it arrived, and the number of checks left.
    doubtful: Option<(i32, u8)>,
}

impl PidOne {
    /// `pid` as the launcher sees it.
    pub fn new(pidfd: OwnedFd, pid: i32) -> Self {
        Self { pidfd, pid, ended_by: None, doubtful: None }
    }

    /// The pid as the launcher sees it. It is also the id of the process group, because pid 1 leads a session.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal, or kills the container if the kernel would drop a signal that ends other processes.
    pub fn signal(&mut self, signal: i32) {
        if !self.end_unless_handled(signal) {
            // ESRCH: pid 1 has ended, which the next poll reports.
            let _ = process::send_signal(self.pidfd.as_fd(), signal);
        }
    }

    /// Kills the container if the kernel drops this signal although it ends other processes. Returns whether it did.
    ///
    /// An init blocks a signal permanently; posix_spawn(3) and shells block it briefly while they start a program, and then the
    /// kernel drops it when it is unblocked. [`PidOne::look_again`] therefore checks again.
    pub fn end_unless_handled(&mut self, signal: i32) -> bool {
        /// Checks at intervals of 50 ms: one second.
        const LOOKS: u8 = 20;
        if !ends_a_process(signal) {
            return false;
        }
        match self.disposition(signal) {
            Disposition::Unhandled => self.end(signal),
            Disposition::Blocked => self.doubtful = Some((signal, LOOKS)),
            Disposition::Handled => {}
        }
        self.ended_by.is_some()
    }

    /// Whether [`PidOne::look_again`] is due, 50 ms from now.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful.is_some()
    }

    /// Kills the container if the signal is no longer blocked and has no handler.
    pub fn look_again(&mut self) {
        if let Some((signal, looks)) = self.doubtful.take() {
            match self.disposition(signal) {
                Disposition::Unhandled => self.end(signal),
                Disposition::Blocked if looks > 0 => self.doubtful = Some((signal, looks - 1)),
                Disposition::Blocked | Disposition::Handled => {}
            }
        }
    }

    fn disposition(&self, signal: i32) -> Disposition {
        let files = ProcessFiles::open();
        let read = |file: &str| {
            let files = files.as_ref().map_err(|error| io::Error::other(error.to_string()))?;
            files.read(self.pid.unsigned_abs(), file)
        };
        let masks = || disposition(&read("status").unwrap_or_default(), signal);
        match masks() {
            // sigwait(3), with which tini and dumb-init wait, takes the signals out of the mask while it waits. The mask is read
            // again, because that wait may have ended in between. If neither file can be read (Yama), it may be such a wait.
            Disposition::Unhandled => match waits_for_signals(read("syscall").ok(), read("wchan").ok()) {
                Some(false) => masks(),
                Some(true) => Disposition::Handled,
                None => Disposition::Blocked,
            },
            other => other,
        }
    }

    /// Kills the container; its exit code is that of pid 1 killed by this signal.
    fn end(&mut self, signal: i32) {
        self.ended_by.get_or_insert(signal);
        let _ = process::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Waits for the end of pid 1 and returns its exit code, or 128+n if signal n killed it.
    pub fn exit_code(&self) -> Result<u8> {
        let wait = || {
            rustix::io::retry_on_intr(|| {
                rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)
            })
            .or_fail(Code::Internal, || "the container's end cannot be waited for")
        };
        let mut status = wait()?;
        // Stops of a traced child are reported whatever the options are (wait(2) of Linux, ptrace(2)).
        while let Some(signal) = status.as_ref().and_then(WaitIdStatus::trapping_signal) {
            process::release(self.pid, signal);
            status = wait()?;
        }
        let code = status.and_then(|status| {
            let killed = |signal| match self.ended_by {
                Some(own) if signal == libc::SIGKILL => 128 + own,
                _ => 128 + signal,
            };
            status.exit_status().or_else(|| status.terminating_signal().map(killed))
        });
        Ok(code.and_then(|code| u8::try_from(code & 0xff).ok()).unwrap_or(255))
    }
}

impl AsFd for PidOne {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Whether the default action of a signal ends the process (signal(7)).
pub fn ends_a_process(signal: i32) -> bool {
    ![
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGURG,
        libc::SIGWINCH,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGSTOP,
    ]
    .contains(&signal)
}

/// Whether a process waits in sigwait(3), by its /proc/PID/syscall (number of the system call, or `running`) or /proc/PID/wchan
/// (the kernel's function, `0` if that is hidden). `None` if neither is known.
fn waits_for_signals(syscall: Option<String>, wchan: Option<String>) -> Option<bool> {
    /// rt_sigtimedwait and, for 32-bit programs, rt_sigtimedwait_time64; on x86_64 or aarch64.
    const NUMBERS: [&str; 3] = [if cfg!(target_arch = "aarch64") { "137" } else { "128" }, "177", "421"];
    match (syscall, wchan) {
        (Some(syscall), _) => Some(NUMBERS.contains(&syscall.split_whitespace().next().unwrap_or_default())),
        (None, Some(wchan)) if !matches!(wchan.as_str(), "" | "0") => {
            Some(wchan.starts_with("do_sigtimedwait"))
        }
        _ => None,
    }
}

/// The disposition of a signal in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disposition {
    /// Caught or ignored.
    Handled,
    /// Blocked, and neither caught nor ignored: inits block signals and wait for them.
    Blocked,
    /// The default action, which the kernel skips for pid 1.
    Unhandled,
}

/// Reads the disposition from /proc/PID/status (proc_pid_status(5)). A status without these lines counts as handled.
fn disposition(status: &str, signal: i32) -> Disposition {
    let has = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let mask = line.and_then(|hexadecimal| u64::from_str_radix(hexadecimal.trim(), 16).ok());
        mask.map(|mask| mask >> (signal - 1) & 1 == 1)
    };
    match ["SigIgn", "SigCgt", "SigBlk"].map(has) {
        [Some(false), Some(false), Some(false)] => Disposition::Unhandled,
        [Some(false), Some(false), Some(true)] => Disposition::Blocked,
        _ => Disposition::Handled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_signals_is_seen_in_either_file() {
        let text = |text: &str| Some(text.to_owned());
        let number = if cfg!(target_arch = "aarch64") { 137 } else { 128 };
        assert_eq!(waits_for_signals(text(&format!("{number} 0x7f 0x0\n")), None), Some(true));
        assert_eq!(waits_for_signals(text("running\n"), text("do_sigtimedwait")), Some(false));
        assert_eq!(waits_for_signals(None, text("do_sigtimedwait.isra.0")), Some(true));
        assert_eq!(waits_for_signals(None, text("hrtimer_nanosleep")), Some(false));
        assert_eq!(waits_for_signals(None, text("0")), None);
        assert_eq!(waits_for_signals(None, None), None);
    }

    #[test]
    fn a_signal_is_unhandled_if_it_is_in_no_mask() {
        let status = |blocked: u64, ignored: u64, caught: u64| {
            format!("Name:\tx\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n")
        };
        let term = 1 << (libc::SIGTERM - 1);
        for (blocked, ignored, caught, expected) in [
            (0, 0, 0, Disposition::Unhandled),
            (!term, !term, !term, Disposition::Unhandled),
            (term, 0, 0, Disposition::Blocked),
            (term, term, 0, Disposition::Handled),
            (0, term, 0, Disposition::Handled),
            (term, 0, term, Disposition::Handled),
        ] {
            assert_eq!(disposition(&status(blocked, ignored, caught), libc::SIGTERM), expected);
        }
        assert_eq!(disposition(&status(0, 0, 0), 64), Disposition::Unhandled);
        for broken in ["", "SigBlk: x", "SigBlk:\t0\n"] {
            assert_eq!(disposition(broken, libc::SIGTERM), Disposition::Handled);
        }
    }
}
