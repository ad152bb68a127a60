//! The launcher's side while the command runs: signals go in, the terminal's bytes go both ways, and the end is waited for.

use crate::error::{Code, OrFail, Result};
use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, OwnedFd},
    io::Errno,
    process::{WaitId, WaitIdOptions},
    termios::{OptionalActions, Termios},
};

/// Docker's `--sig-proxy` forwards all but those that speak of the launcher itself: its children, its terminal's job
/// control, its own faults.
const FORWARDED: [Signal; 11] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGVTALRM,
    Signal::SIGIO,
    Signal::SIGWINCH,
];

/// The signals that are forwarded, blocked from here on and read by descriptor, so that none is lost and none interrupts.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them. Before the child is made: a signal that comes between is kept for it.
    pub fn block() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in FORWARDED {
            set.add(signal);
        }
        let make = || {
            nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        };
        make().map(Self).or_fail(Code::Internal, || "signals cannot be read by descriptor")
    }
}

/// Forwards until the process behind `pidfd` ends. Its exit code, 128+n if signal n killed it.
pub fn relay(pidfd: &OwnedFd, signals: &Signals, terminal: Option<OwnedFd>, interactive: bool) -> Result<u8> {
    let mut terminal = terminal.map(|master| Terminal::new(master, interactive));
    loop {
        let (mut ended, mut signalled, mut input, mut output) = (false, false, false, false);
        {
            let stdin = rustix::stdio::stdin();
            let mut polled = vec![PollFd::new(pidfd, PollFlags::IN), PollFd::new(&signals.0, PollFlags::IN)];
            if let Some(terminal) = &terminal {
                polled.push(PollFd::new(&terminal.master, PollFlags::IN));
                if terminal.reads_stdin {
                    polled.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
                }
            }
            match rustix::event::poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).or_fail(Code::Internal, || "poll failed"),
            }
            let ready = |n: usize| polled.get(n).is_some_and(|p| !p.revents().is_empty());
            (ended, signalled, output, input) =
                (ended | ready(0), signalled | ready(1), output | ready(2), input | ready(3));
        }
        if signalled {
            forward(pidfd, signals, terminal.as_ref());
        }
        if let Some(open) = &mut terminal {
            if input {
                open.copy_input();
            }
            // Nobody shows what the command writes, or it has closed its side: to go on polling would be to spin. The command
            // sees its terminal hung up, as when a remote login breaks.
            if output && !open.copy_output() {
                terminal = None;
            }
        }
        if ended {
            if let Some(terminal) = &mut terminal {
                terminal.drain();
            }
            return exit_code(pidfd);
        }
    }
}

fn forward(pidfd: &OwnedFd, signals: &Signals, terminal: Option<&Terminal>) {
    while let Ok(Some(info)) = signals.0.read_signal() {
        match (Signal::try_from(info.ssi_signo.cast_signed()), terminal) {
            (Ok(Signal::SIGWINCH), Some(terminal)) => terminal.resize(),
            (Ok(signal), _) => {
                let signal = rustix::process::Signal::from_named_raw(signal as i32);
                // ESRCH: it has ended, and the next poll says so.
                let _ = signal.map(|signal| rustix::process::pidfd_send_signal(pidfd, signal));
            }
            (Err(_), _) => {}
        }
    }
}

fn exit_code(pidfd: &OwnedFd) -> Result<u8> {
    let status = rustix::io::retry_on_intr(|| {
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
    })
    .or_fail(Code::Internal, || "the container's end cannot be waited for")?;
    let code =
        status.and_then(|s| s.exit_status().or_else(|| s.terminating_signal().map(|signal| 128 + signal)));
    Ok(code.and_then(|code| u8::try_from(code & 0xff).ok()).unwrap_or(255))
}

/// The container's terminal, and the one that the launcher was started on.
struct Terminal {
    master: OwnedFd,
    reads_stdin: bool,
    restore: Option<Termios>,
}

impl Terminal {
    fn new(master: OwnedFd, interactive: bool) -> Self {
        let mut restore = None;
        if interactive && let Ok(own) = rustix::termios::tcgetattr(rustix::stdio::stdin()) {
            let mut raw = own.clone();
            raw.make_raw();
            if rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).is_ok() {
                restore = Some(own);
            }
        }
        let terminal = Self { master, reads_stdin: interactive, restore };
        terminal.resize();
        terminal
    }

    fn resize(&self) {
        // Where the launcher has no terminal, the container's keeps its size.
        if let Ok(size) = rustix::termios::tcgetwinsize(rustix::stdio::stdout()) {
            let _ = rustix::termios::tcsetwinsize(&self.master, size);
        }
    }

    fn copy_input(&mut self) {
        let mut bytes = [0; 4096];
        match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
            Ok(0) => {
                // The end of the input is a character on a terminal: VEOF, as the line discipline has it by default.
                self.reads_stdin = false;
                let _ = write_all(&self.master, &[4]);
            }
            Ok(length) => {
                if write_all(&self.master, &bytes[..length]).is_err() {
                    self.reads_stdin = false;
                }
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.reads_stdin = false,
        }
    }

    /// Whether there may be more.
    fn copy_output(&mut self) -> bool {
        let mut bytes = [0; 16 << 10];
        match rustix::io::read(&self.master, &mut bytes) {
            Ok(length @ 1..) => write_all(rustix::stdio::stdout(), &bytes[..length]).is_ok(),
            Err(Errno::INTR) => true,
            // EIO: nobody has the other side open any more.
            _ => false,
        }
    }

    /// What the command wrote before it ended.
    fn drain(&mut self) {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            let ready = {
                let mut polled = [PollFd::new(&self.master, PollFlags::IN)];
                rustix::event::poll(&mut polled, Some(&now)).is_ok()
                    && polled[0].revents().contains(PollFlags::IN)
            };
            if !(ready && self.copy_output()) {
                return;
            }
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

fn write_all(fd: impl AsFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
