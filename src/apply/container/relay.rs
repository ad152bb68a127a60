//! The launcher while the command runs: it forwards signals and streams, and waits for the end.
//!
//! One thread polls everything, and its writes never block: a slow reader of standard output must not delay standard error or
//! a signal. A stream therefore alternates between waiting for its source and waiting for its destination.

use super::{
    signals::{PidOne, Signals},
    stdio::Outside,
    terminal::Terminal,
    unix_sockets,
};
use crate::error::{Code, Error, OrFail, Result};
use nix::sys::signal::Signal;
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::FileType,
    io::Errno,
    net::SendFlags,
    pipe::SpliceFlags,
};

/// The launcher's handles on a running container.
#[derive(Debug)]
pub struct Running {
    /// The container's first process.
    pub pid_one: PidOne,
    /// The launcher's ends of its pipes.
    pub streams: Outside,
    /// The master side of its terminal.
    pub terminal: Option<OwnedFd>,
    /// The descriptor by which its Unix sockets are supervised.
    pub unix_sockets: Option<OwnedFd>,
    /// Whether the container has its own user namespace.
    pub has_user_namespace: bool,
    /// `-i`
    pub interactive: bool,
    /// The stop signal, sent instead of SIGTERM.
    pub stop_signal: Option<i32>,
}

/// Forwards until the container ends, and returns its exit code; 128+n if signal n killed it.
///
/// # Errors
/// If the container's output could not be written, unless its reader has closed the stream.
pub fn relay(running: Running, signals: &Signals) -> Result<u8> {
    let Running { mut pid_one, streams, terminal, mut unix_sockets, has_user_namespace, .. } = running;
    let Running { interactive, stop_signal, .. } = running;
    let mut terminal = terminal.map(|master| Terminal::new(master, interactive));
    let mut input = streams.input.map(|pipe| Flow::new(End::Standard(0), End::Own(pipe)));
    let outputs = [(streams.output, 1), (streams.error, 2)];
    let mut outputs: Vec<Flow> = outputs
        .into_iter()
        .filter_map(|(pipe, number)| Some(Flow::new(End::Own(pipe?), End::Standard(number))))
        .collect();
    let mut lost = None;
    let mut ended = false;
    while !(ended && outputs.is_empty() && terminal.is_none()) {
        // Everything that the container wrote before its end is available immediately.
        let patience = if ended && outputs.iter().all(|flow| !flow.waits_for_destination()) {
            Some(0)
        } else {
            (pid_one.is_doubtful() && !ended).then_some(50_000_000)
        };
        let patience = patience.map(|tv_nsec| rustix::time::Timespec { tv_sec: 0, tv_nsec });
        let mut ready = Ready::default();
        {
            let mut polled = Polled::default();
            if !ended {
                polled.add(What::End, pid_one.as_fd(), PollFlags::IN);
                polled.add(What::Signal, signals.as_fd(), PollFlags::IN);
                if let Some(listener) = &unix_sockets {
                    polled.add(What::UnixSocket, listener.as_fd(), PollFlags::IN);
                }
            }
            if let Some(terminal) = &terminal {
                polled.add(What::Shown, terminal.as_fd(), PollFlags::IN);
                if terminal.reads_stdin {
                    polled.add(What::Typed, rustix::stdio::stdin(), PollFlags::IN);
                }
            }
            if let Some(input) = &input {
                let (fd, events) = input.waits_for();
                polled.add(What::Input, fd, events);
            }
            for (at, flow) in outputs.iter().enumerate() {
                let (fd, events) = flow.waits_for();
                polled.add(What::Output(at), fd, events);
            }
            polled.wait(patience, &mut ready)?;
        }
        if ready.nothing {
            pid_one.look_again();
        }
        if ready.signal {
            while let Some(signal) = signals.next() {
                match (signal, &terminal) {
                    (Signal::SIGWINCH, Some(terminal)) => terminal.resize(),
                    (Signal::SIGTERM, _) => pid_one.signal(stop_signal.unwrap_or(libc::SIGTERM)),
                    (signal, _) => pid_one.signal(signal as i32),
                }
            }
        }
        if ready.unix_socket.is_some()
            && let Some(listener) = unix_sockets.take()
            // POLLHUP alone: the last process with the filter has ended.
            && ready.unix_socket.is_some_and(|events| events.contains(PollFlags::IN))
        {
            unix_sockets::supervise(&listener, has_user_namespace.then(|| pid_one.as_fd()))?;
        }
        if let Some(open) = &mut terminal {
            if ready.typed {
                open.copy_input(&mut pid_one);
            }
            // Without a reader, or after the command has closed its side, further polling would spin. The command sees its
            // terminal hung up, as after a lost remote login.
            let over = if ready.shown { !open.copy_output() } else { ended };
            if over {
                terminal = None;
            }
        }
        if ready.input && input.as_mut().is_some_and(|flow| flow.advance() != Next::Wait) {
            input = None;
        }
        let mut at = 0;
        outputs.retain_mut(|flow| {
            let is_ready = ready.outputs[at];
            at += 1;
            match if is_ready { flow.advance() } else { Next::Wait } {
                Next::Wait => is_ready || !ended || flow.waits_for_destination(),
                Next::Over => false,
                Next::Failed(errno) => {
                    lost = lost.or(Some((flow.to.name(), errno)));
                    false
                }
            }
        });
        if ready.end {
            ended = true;
            input = None;
            signals.unblock();
            if let Some(terminal) = &mut terminal {
                terminal.reads_stdin = false;
            }
        }
    }
    let code = pid_one.exit_code()?;
    match lost {
        None => Ok(code),
        Some((name, errno)) => {
            Err(Error::new(Code::Internal, format!("what the container wrote to {name} is lost"))
                .cause(errno)
                .cause(format!("its command ended with {code}"))
                .fix(format!("make room where {name} goes, or redirect it: gpurun run … > FILE")))
        }
    }
}

/// A source of events.
#[derive(Debug, Clone, Copy)]
enum What {
    End,
    Signal,
    UnixSocket,
    Shown,
    Typed,
    Input,
    Output(usize),
}

/// The events of one poll.
#[derive(Debug, Default)]
struct Ready {
    /// The timeout expired first.
    nothing: bool,
    end: bool,
    signal: bool,
    unix_socket: Option<PollFlags>,
    shown: bool,
    typed: bool,
    input: bool,
    outputs: [bool; 2],
}

#[derive(Default)]
struct Polled<'a> {
    what: Vec<What>,
    fds: Vec<PollFd<'a>>,
}

impl<'a> Polled<'a> {
    fn add(&mut self, what: What, fd: BorrowedFd<'a>, events: PollFlags) {
        self.what.push(what);
        self.fds.push(PollFd::from_borrowed_fd(fd, events));
    }

    fn wait(&mut self, patience: Option<rustix::time::Timespec>, ready: &mut Ready) -> Result<()> {
        match rustix::event::poll(&mut self.fds, patience.as_ref()) {
            Ok(happened) => ready.nothing = happened == 0,
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno).or_fail(Code::Internal, || "poll failed"),
        }
        for (what, fd) in self.what.iter().zip(&self.fds) {
            if fd.revents().is_empty() {
                continue;
            }
            match *what {
                What::End => ready.end = true,
                What::Signal => ready.signal = true,
                What::UnixSocket => ready.unix_socket = Some(fd.revents()),
                What::Shown => ready.shown = true,
                What::Typed => ready.typed = true,
                What::Input => ready.input = true,
                What::Output(at) => ready.outputs[at] = true,
            }
        }
        Ok(())
    }
}

/// One end of a stream.
#[derive(Debug)]
enum End {
    /// The launcher's end of a pipe to the container.
    Own(OwnedFd),
    /// The launcher's own 0, 1 or 2.
    Standard(u8),
}

impl End {
    fn name(&self) -> &'static str {
        match self {
            Self::Standard(1) => "standard output",
            _ => "standard error",
        }
    }

    fn kind(&self) -> Option<FileType> {
        rustix::fs::fstat(self).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(pipe) => pipe.as_fd(),
            Self::Standard(0) => rustix::stdio::stdin(),
            Self::Standard(1) => rustix::stdio::stdout(),
            Self::Standard(_) => rustix::stdio::stderr(),
        }
    }
}

/// The next step of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Wait,
    /// The source is at its end, or the reader has closed the stream.
    Over,
    /// The destination cannot be written.
    Failed(Errno),
}

/// Bytes from one descriptor to another.
#[derive(Debug)]
struct Flow {
    from: End,
    to: End,
    /// Whether both are files or pipes, so that splice(2) moves pages without a copy and without blocking.
    splices: bool,
    /// Whether the destination never blocks: a regular file, or the launcher's end of a pipe.
    never_blocks: bool,
    is_socket: bool,
    /// Whether splice(2) found the destination full.
    full: bool,
    /// Bytes that were read and not yet written.
    pending: Vec<u8>,
}

impl Flow {
    fn new(from: End, to: End) -> Self {
        let moves = |end: &End| matches!(end.kind(), Some(FileType::Fifo | FileType::RegularFile));
        Self {
            splices: moves(&from) && moves(&to),
            never_blocks: matches!(to, End::Own(_)) || to.kind() == Some(FileType::RegularFile),
            is_socket: to.kind() == Some(FileType::Socket),
            full: false,
            pending: Vec::new(),
            from,
            to,
        }
    }

    fn waits_for_destination(&self) -> bool {
        self.full || !self.pending.is_empty()
    }

    fn waits_for(&self) -> (BorrowedFd<'_>, PollFlags) {
        if self.waits_for_destination() {
            (self.to.as_fd(), PollFlags::OUT)
        } else {
            (self.from.as_fd(), PollFlags::IN)
        }
    }

    /// Continues when the descriptor of [`Flow::waits_for`] is ready.
    fn advance(&mut self) -> Next {
        if !self.pending.is_empty() {
            return self.write();
        }
        if self.splices { self.splice() } else { self.read() }
    }

    fn splice(&mut self) -> Next {
        /// More than a pipe holds.
        const MOST: usize = 1 << 20;
        match rustix::pipe::splice(&self.from, None, &self.to, None, MOST, SpliceFlags::NONBLOCK) {
            Ok(0) => Next::Over,
            Ok(_) => {
                self.full = false;
                Next::Wait
            }
            // The other side is not ready.
            Err(Errno::AGAIN) => {
                self.full = !self.full;
                Next::Wait
            }
            // A file that was opened with O_APPEND, or a file system without it.
            Err(Errno::INVAL) => {
                (self.splices, self.full) = (false, false);
                Next::Wait
            }
            Err(errno) => failed(errno),
        }
    }

    fn read(&mut self) -> Next {
        /// A pipe's capacity.
        const MOST: usize = 64 << 10;
        self.pending.reserve_exact(MOST);
        match rustix::io::read(&self.from, rustix::buffer::spare_capacity(&mut self.pending)) {
            Ok(0) => Next::Over,
            Ok(_) if self.never_blocks => self.write(),
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => Next::Wait,
            // A closed terminal, or a directory.
            Err(_) => Next::Over,
        }
    }

    fn write(&mut self) -> Next {
        /// PIPE_BUF: where poll(2) reports room, a pipe has room for as much.
        const LEAST: usize = 4096;
        let written = if self.is_socket {
            rustix::net::send(&self.to, &self.pending, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        } else {
            let most = if self.never_blocks { self.pending.len() } else { self.pending.len().min(LEAST) };
            rustix::io::write(&self.to, &self.pending[..most])
        };
        match written {
            Ok(written) => {
                self.pending.drain(..written);
                Next::Wait
            }
            Err(errno) => failed(errno),
        }
    }
}

fn failed(errno: Errno) -> Next {
    match errno {
        Errno::INTR | Errno::AGAIN => Next::Wait,
        // The reader has closed the stream, so the container gets EPIPE as well.
        Errno::PIPE | Errno::CONNRESET => Next::Over,
        errno => Next::Failed(errno),
    }
}
