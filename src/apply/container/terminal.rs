//! A container's pseudo-terminal (`-t`). It is opened inside the container; the launcher relays its input and output.

use super::{
    relay::{Flow, Next},
    signals::PidOne,
    spec::Process,
};
use crate::{
    apply::rootfs::Root,
    error::{Code, OrFail, Result},
};
use rustix::{
    fd::OwnedFd,
    fs::{OFlags, Uid},
    pty::OpenptFlags,
    termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios},
};
use std::path::Path;

/// Called in the container's process: opens master and slave in the container's own devpts, so that ttyname(3) works inside.
pub fn open(root: &Root, process: &Process) -> Result<(OwnedFd, OwnedFd)> {
    let failed = || "no pseudo-terminal can be opened in the container";
    let master = root
        .open(Path::new("/dev/pts/ptmx"), OFlags::RDWR | OFlags::NOCTTY)
        .or_fail(Code::Internal, failed)?;
    rustix::pty::unlockpt(&master).or_fail(Code::Internal, failed)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .or_fail(Code::Internal, failed)?;
    let owner = Some(Uid::from_raw(process.user.uid));
    rustix::fs::fchown(&slave, owner, None).or_fail(Code::Internal, failed)?;
    Ok((master, slave))
}

/// Called in the container's process, a session leader: makes this its controlling terminal and its standard streams.
pub fn install(slave: &OwnedFd) -> Result<()> {
    let failed = || "the container's terminal cannot be made its controlling terminal";
    rustix::process::ioctl_tiocsctty(slave).or_fail(Code::Internal, failed)?;
    rustix::stdio::dup2_stdin(slave).or_fail(Code::Internal, failed)?;
    rustix::stdio::dup2_stdout(slave).or_fail(Code::Internal, failed)?;
    rustix::stdio::dup2_stderr(slave).or_fail(Code::Internal, failed)
}

/// The launcher's side: the container's terminal, and the terminal of the launcher.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    restore: Option<Termios>,
}

impl Terminal {
    /// Sets the launcher's own terminal to raw mode, if input is relayed (`-i`).
    pub fn new(master: OwnedFd, interactive: bool) -> Result<Self> {
        // The open file is the launcher's alone: the container's process closes its descriptor before the command starts.
        rustix::fs::fcntl_setfl(&master, OFlags::NONBLOCK)
            .or_fail(Code::Internal, || "the container's terminal cannot be set up")?;
        let mut restore = None;
        if interactive && let Ok(own) = rustix::termios::tcgetattr(rustix::stdio::stdin()) {
            let mut raw = own.clone();
            raw.make_raw();
            if rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).is_ok() {
                restore = Some(own);
            }
        }
        let terminal = Self { master, restore };
        terminal.resize();
        Ok(terminal)
    }

    /// Another descriptor of the master, for one direction.
    pub fn clone_master(&self) -> Result<OwnedFd> {
        self.master.try_clone().or_fail(Code::Internal, || "a descriptor cannot be copied")
    }

    /// Copies the size of the launcher's terminal, if there is one, to the container's.
    pub fn resize(&self) {
        if let Ok(size) = rustix::termios::tcgetwinsize(rustix::stdio::stdout()) {
            let _ = rustix::termios::tcsetwinsize(&self.master, size);
        }
    }

    /// Continues to copy the user's input to the container's terminal.
    pub fn advance_input(&self, flow: &mut Flow, pid_one: &mut PidOne) -> Next {
        if !flow.waits_for_destination() {
            match flow.read() {
                // The end of the input is a character on a terminal: VEOF, which is 4 by default.
                Next::Over => flow.end_with(&[4]),
                _ if flow.pending().is_empty() => return Next::Wait,
                _ => self.end_by_key(flow.pending(), pid_one),
            }
        }
        flow.write()
    }

    /// Ends the container where one of these keys is Ctrl-C or Ctrl-\ and the kernel would drop its signal, because pid 1 leads
    /// the terminal's foreground and has no handler. The kernel sends these signals itself, inside the container. Which keys they
    /// are and whether they mean signals now (ISIG) is what the command set: the master side shows the settings of the slave.
    fn end_by_key(&self, keys: &[u8], pid_one: &mut PidOne) {
        let is_signal = |termios: &Termios, key: u8| {
            [(SpecialCodeIndex::VINTR, libc::SIGINT), (SpecialCodeIndex::VQUIT, libc::SIGQUIT)]
                .into_iter()
                .find(|(code, _)| termios.special_codes[*code] == key)
                .map(|(_, signal)| signal)
        };
        // Printable keys are neither, so they need no system call.
        if !keys.iter().any(u8::is_ascii_control) {
            return;
        }
        let Ok(termios) = rustix::termios::tcgetattr(&self.master) else { return };
        if !termios.local_modes.contains(LocalModes::ISIG) {
            return;
        }
        // 0 is _POSIX_VDISABLE: the key is disabled.
        let Some(signal) = keys.iter().filter(|key| **key != 0).find_map(|key| is_signal(&termios, *key))
        else {
            return;
        };
        let foreground = rustix::termios::tcgetpgrp(&self.master).map(|group| group.as_raw_nonzero().get());
        if foreground == Ok(pid_one.pid()) {
            pid_one.end_unless_handled(signal);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(own) = &self.restore {
            let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, own);
        }
    }
}
