//! The launcher while the command runs: it forwards signals and streams, and waits for the end.
//!
//! One thread polls everything, and its writes never block: a slow reader of standard output must not delay standard error or
//! a signal. A stream therefore alternates between waiting for its source and waiting for its destination.
//!
//! The launcher's own terminal or pipe is opened again with O_NONBLOCK, because the caller's other programs share the
//! descriptor that the launcher inherited: they may take the bytes that POLLIN reported, or the room that POLLOUT reported. Where
//! that is not permitted, reads ask for RWF_NOWAIT, and a write is so small that it does not block after POLLOUT.
//!
//! After the container's end only the bytes that are buffered then are copied. The launcher waits for a slow reader, but for at
//! most [`GRACE`] without progress if a signal asked for the end, and not at all after another signal.

use super::{
    cgroup::Cgroup,
    signals::{self, PidOne, Signals},
    stdio::Outside,
    terminal::Terminal,
    unix_sockets,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    sys::process,
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags},
    io::{Errno, ReadWriteFlags},
    net::{RecvFlags, SendFlags},
    pipe::SpliceFlags,
};
use std::time::{Duration, Instant};

/// The longest wait for a reader that does not read, after a signal has ended the container.
const GRACE: Duration = Duration::from_secs(2);

/// The interval at which a signal that pid 1 blocks is checked again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The launcher's handles on a running container.
#[derive(Debug)]
pub struct Running<'a> {
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
    /// The container's cgroup, if it limits the memory.
    pub counted_in: Option<&'a Cgroup>,
    /// `-i`
    pub interactive: bool,
    /// The stop signal, sent instead of SIGTERM.
    pub stop_signal: Option<i32>,
}

/// Forwards until the container ends, and returns its exit code; 128+n if signal n killed it.
///
/// # Errors
/// If the container's output could not be written, unless its reader has closed the stream.
pub fn relay(running: Running<'_>, signals: &Signals) -> Result<u8> {
    let Running { mut pid_one, streams, terminal, mut unix_sockets, has_user_namespace, .. } = running;
    let Running { counted_in, interactive, stop_signal, .. } = running;
    let mut input = streams.input.map(|pipe| Flow::new(End::standard(0), End::Own(pipe)));
    let outputs = [(streams.output, 1), (streams.error, 2)];
    let mut outputs: Vec<Flow> = outputs
        .into_iter()
        .filter_map(|(pipe, number)| Some(Flow::new(End::Own(pipe?), End::standard(number))))
        .collect();
    let mut terminal = terminal.map(|master| Terminal::new(master, interactive)).transpose()?;
    if let Some(terminal) = &terminal {
        outputs.push(Flow::new(End::Own(terminal.clone_master()?), End::standard(1)));
        if interactive {
            input = Some(Flow::new(End::standard(0), End::Own(terminal.clone_master()?)));
        }
    }
    let mut lost = None;
    let mut ended = false;
    // The wait for a reader that does not read, after the container's end; `None` is without limit.
    let mut grace = None;
    let mut progress = Instant::now();
    // A signal after the container's end, because of which output is dropped.
    let mut cut_by = None;
    while !(ended && outputs.is_empty()) {
        // Everything that the container wrote before its end is available immediately.
        let patience = match ended {
            false => pid_one.is_doubtful().then_some(LOOK_AGAIN),
            true if !outputs.iter().any(Flow::waits_for_destination) => Some(Duration::ZERO),
            true => grace.map(|grace: Duration| grace.saturating_sub(progress.elapsed())),
        };
        let mut ready = Ready::default();
        {
            let mut polled = Polled::default();
            polled.add(What::Signal, signals.as_fd(), PollFlags::IN);
            if !ended {
                polled.add(What::End, pid_one.as_fd(), PollFlags::IN);
                if let Some(listener) = &unix_sockets {
                    polled.add(What::UnixSocket, listener.as_fd(), PollFlags::IN);
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
            if ended {
                break;
            }
            pid_one.look_again();
        }
        if ready.signal {
            while let Some(signal) = signals.next() {
                match (signal, &terminal) {
                    // The first process may have made the launcher its tracer.
                    (libc::SIGCHLD, _) => process::release_traced(),
                    (libc::SIGWINCH, Some(terminal)) => terminal.resize(),
                    (signal, _) if ended => {
                        if signals::ends_a_process(signal) {
                            cut_by = (grace.is_none()).then_some(signal).or(cut_by);
                            grace = Some(Duration::ZERO);
                        }
                    }
                    (signal, _) => {
                        if matches!(signal, libc::SIGTERM | libc::SIGINT | libc::SIGHUP) {
                            grace = Some(GRACE);
                        }
                        let stop = stop_signal.filter(|_| signal == libc::SIGTERM);
                        pid_one.signal(stop.unwrap_or(signal));
                    }
                }
            }
        }
        if ready.unix_socket.is_some()
            && let Some(listener) = unix_sockets.take()
            // POLLHUP alone: the last process with the filter has ended.
            && ready.unix_socket.is_some_and(|events| events.contains(PollFlags::IN))
        {
            unix_sockets::supervise(&listener, has_user_namespace.then(|| pid_one.as_fd()), counted_in)?;
        }
        if ready.input && input.as_ref().is_some_and(|flow| flow.from.is_in_background()) {
            // A background job that reads its terminal is stopped. In read(2) the kernel would stop it again after each SIGCONT,
            // before another signal is forwarded.
            let _ = rustix::process::kill_current_process_group(rustix::process::Signal::TTIN);
            // SIGCONT, unless the kernel stopped nothing: in an orphaned process group read(2) fails with EIO.
            if signals.are_pending() {
                continue;
            }
        }
        if ready.input
            && let Some(flow) = &mut input
        {
            let next = match &terminal {
                Some(terminal) => terminal.advance_input(flow, &mut pid_one),
                None => flow.advance(),
            };
            if next != Next::Wait {
                input = None;
            }
        }
        let mut at = 0;
        outputs.retain_mut(|flow| {
            let is_ready = ready.outputs[at];
            at += 1;
            let next = if is_ready { flow.advance() } else { Next::Wait };
            if std::mem::take(&mut flow.moved) {
                progress = Instant::now();
            }
            match next {
                Next::Wait => is_ready || !ended || flow.waits_for_destination(),
                Next::Over => false,
                Next::Failed(errno) => {
                    lost = lost.or(Some((flow.to.name(), errno)));
                    false
                }
            }
        });
        if terminal.is_some() && outputs.is_empty() {
            // Without a reader, or after the command has closed its side, further polling would spin. The command sees its
            // terminal hung up, as after a lost remote login.
            (input, terminal) = (None, None);
        }
        if ready.end {
            ended = true;
            progress = Instant::now();
            input = None;
            outputs.iter_mut().for_each(Flow::limit_to_buffered);
        }
    }
    let cut_by = cut_by.filter(|_| !outputs.is_empty());
    drop((outputs, terminal));
    signals.unblock();
    let code = pid_one.exit_code()?;
    let code = cut_by.and_then(|signal| u8::try_from(128 + signal).ok()).unwrap_or(code);
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

    fn wait(&mut self, patience: Option<Duration>, ready: &mut Ready) -> Result<()> {
        let patience = patience.and_then(|patience| rustix::time::Timespec::try_from(patience).ok());
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
                What::Input => ready.input = true,
                What::Output(at) => ready.outputs[at] = true,
            }
        }
        Ok(())
    }
}

/// One end of a stream.
#[derive(Debug)]
pub(super) enum End {
    /// The launcher's end of a pipe to the container, or the master of its terminal. It does not block.
    Own(OwnedFd),
    /// The launcher's own 0, 1 or 2.
    Standard(u8),
    /// The launcher's own 0, 1 or 2, opened again so that it does not block.
    Reopened(OwnedFd, u8),
}

impl End {
    /// The launcher's own 0, 1 or 2, opened again if it is a pipe or a terminal.
    fn standard(number: u8) -> Self {
        let end = Self::Standard(number);
        if !matches!(end.kind(), Some(FileType::Fifo)) && !end.is_terminal() {
            return end;
        }
        let access = if number == 0 { OFlags::RDONLY } else { OFlags::WRONLY };
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        // EACCES: it belongs to another user, as after su(1).
        match rustix::fs::open(format!("/proc/self/fd/{number}"), flags, Mode::empty()) {
            Ok(fd) => Self::Reopened(fd, number),
            Err(_) => end,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Standard(1) | Self::Reopened(_, 1) => "standard output",
            _ => "standard error",
        }
    }

    fn kind(&self) -> Option<FileType> {
        rustix::fs::fstat(self).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
    }

    fn is_pseudo_terminal(&self) -> bool {
        rustix::fs::fstat(self).is_ok_and(|stat| (136..=143).contains(&rustix::fs::major(stat.st_rdev)))
    }

    /// Whether this is the controlling terminal, and another process group is in its foreground.
    fn is_in_background(&self) -> bool {
        rustix::termios::tcgetpgrp(self).is_ok_and(|foreground| foreground != rustix::process::getpgrp())
    }

    /// Whether this is a terminal that can be opened again. Opening /dev/ptmx makes another pseudo-terminal, and /dev/tty0 is
    /// the console that is shown at the moment.
    fn is_terminal(&self) -> bool {
        let others = [(5, 2), (4, 0)].map(|(major, minor)| rustix::fs::makedev(major, minor));
        rustix::termios::isatty(self)
            && rustix::fs::fstat(self).is_ok_and(|stat| !others.contains(&stat.st_rdev))
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(fd) | Self::Reopened(fd, _) => fd.as_fd(),
            Self::Standard(0) => rustix::stdio::stdin(),
            Self::Standard(1) => rustix::stdio::stdout(),
            Self::Standard(_) => rustix::stdio::stderr(),
        }
    }
}

/// How a source is read without waiting, if another process has taken the bytes that poll(2) reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HowToRead {
    /// The descriptor does not block, or never waits: a regular file.
    Plainly,
    /// recv(2) with MSG_DONTWAIT.
    AsSocket,
    /// preadv2(2) with RWF_NOWAIT.
    WithoutWaiting,
}

impl HowToRead {
    fn of(source: &End) -> Self {
        match (source, source.kind()) {
            (_, Some(FileType::Socket)) => Self::AsSocket,
            (End::Standard(_), kind) if kind != Some(FileType::RegularFile) => Self::WithoutWaiting,
            _ => Self::Plainly,
        }
    }

    /// Appends to the buffer, at most its spare capacity.
    fn read(&mut self, source: &End, buffer: &mut Vec<u8>) -> rustix::io::Result<usize> {
        /// The current position, also of files that have none.
        const CURRENT: u64 = u64::MAX;
        match self {
            Self::Plainly => rustix::io::read(source, rustix::buffer::spare_capacity(buffer)),
            Self::AsSocket => {
                let spare = rustix::buffer::spare_capacity(buffer);
                rustix::net::recv(source, spare, RecvFlags::DONTWAIT).map(|(count, _)| count)
            }
            Self::WithoutWaiting => {
                buffer.resize(buffer.capacity(), 0);
                let mut into = [std::io::IoSliceMut::new(buffer)];
                let count = rustix::io::preadv2(source, &mut into, CURRENT, ReadWriteFlags::NOWAIT);
                buffer.truncate(*count.as_ref().unwrap_or(&0));
                // Not every driver can.
                if matches!(count, Err(Errno::OPNOTSUPP | Errno::SPIPE | Errno::INVAL | Errno::NOSYS)) {
                    *self = Self::Plainly;
                    return self.read(source, buffer);
                }
                count
            }
        }
    }
}

/// The next step of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Wait,
    /// The source is at its end, or the reader has closed the stream.
    Over,
    /// The destination cannot be written.
    Failed(Errno),
}

/// Bytes from one descriptor to another.
#[derive(Debug)]
pub(super) struct Flow {
    from: End,
    to: End,
    /// Whether both are files or pipes, so that splice(2) moves pages without a copy and without blocking.
    splices: bool,
    /// The most bytes of one write that does not block after POLLOUT.
    most: usize,
    is_socket: bool,
    is_terminal: bool,
    how_to_read: HowToRead,
    /// Whether splice(2) found the destination full.
    full: bool,
    /// Bytes that were read and not yet written.
    pending: Vec<u8>,
    /// Bytes to read until the end; `None` is without limit.
    left: Option<usize>,
    /// Whether bytes were written since the caller last cleared this.
    moved: bool,
}

impl Flow {
    fn new(from: End, to: End) -> Self {
        let kind = to.kind();
        let moves = |end: &End| matches!(end.kind(), Some(FileType::Fifo | FileType::RegularFile));
        let is_terminal = rustix::termios::isatty(&to);
        let most = match &to {
            End::Own(_) | End::Reopened(..) => usize::MAX,
            End::Standard(_) if kind == Some(FileType::RegularFile) => usize::MAX,
            // poll(2) reports a terminal with any room at all; a pseudo-terminal allocates room by 256 bytes (tty_buffer.c).
            End::Standard(_) if is_terminal => {
                if to.is_pseudo_terminal() {
                    256
                } else {
                    1
                }
            }
            // PIPE_BUF: where poll(2) reports room, a pipe has room for as much.
            End::Standard(_) => 4096,
        };
        Self {
            splices: moves(&from) && moves(&to),
            most,
            is_socket: kind == Some(FileType::Socket),
            is_terminal,
            how_to_read: HowToRead::of(&from),
            full: false,
            pending: Vec::new(),
            left: None,
            moved: false,
            from,
            to,
        }
    }

    pub fn waits_for_destination(&self) -> bool {
        self.full || !self.pending.is_empty()
    }

    fn waits_for(&self) -> (BorrowedFd<'_>, PollFlags) {
        if self.waits_for_destination() {
            (self.to.as_fd(), PollFlags::OUT)
        } else {
            (self.from.as_fd(), PollFlags::IN)
        }
    }

    /// Ends the stream after the bytes that are buffered now: a process outside may hold the other end and go on writing.
    fn limit_to_buffered(&mut self) {
        /// More than a pseudo-terminal buffers. FIONREAD does not count all of that (drivers/tty/pty.c, tty_buffer.c).
        const TERMINAL: usize = 64 << 10;
        let buffered = match self.from.kind() {
            Some(FileType::Fifo) => rustix::io::ioctl_fionread(&self.from).ok(),
            _ => None,
        };
        self.left = Some(buffered.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(TERMINAL));
        self.full &= self.left != Some(0);
    }

    /// Writes these bytes as the last ones.
    pub fn end_with(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        self.left = Some(0);
    }

    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Continues when the descriptor of [`Flow::waits_for`] is ready.
    fn advance(&mut self) -> Next {
        if !self.pending.is_empty() {
            return self.write();
        }
        if self.left == Some(0) {
            return Next::Over;
        }
        if self.splices {
            return self.splice();
        }
        match self.read() {
            Next::Wait if self.most == usize::MAX && !self.is_socket && !self.pending.is_empty() => {
                self.write()
            }
            next => next,
        }
    }

    fn splice(&mut self) -> Next {
        /// More than a pipe holds.
        const MOST: usize = 1 << 20;
        let most = self.left.unwrap_or(MOST).min(MOST);
        match rustix::pipe::splice(&self.from, None, &self.to, None, most, SpliceFlags::NONBLOCK) {
            Ok(0) => Next::Over,
            Ok(moved) => {
                (self.full, self.moved) = (false, true);
                self.count(moved)
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

    /// Reads into the empty buffer.
    pub fn read(&mut self) -> Next {
        /// A pipe's capacity.
        const MOST: usize = 64 << 10;
        self.pending.reserve_exact(MOST);
        match self.how_to_read.read(&self.from, &mut self.pending) {
            Ok(0) => Next::Over,
            Ok(_) => {
                self.pending.truncate(self.left.unwrap_or(usize::MAX));
                self.left = self.left.map(|left| left.saturating_sub(self.pending.len()));
                Next::Wait
            }
            Err(Errno::INTR | Errno::AGAIN) => Next::Wait,
            // A closed terminal, or a directory.
            Err(_) => Next::Over,
        }
    }

    pub fn write(&mut self) -> Next {
        let written = if self.is_socket {
            rustix::net::send(&self.to, &self.pending, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        } else {
            let mut most = self.pending.len().min(self.most);
            if self.is_terminal && self.most != usize::MAX {
                // Each other byte is a write of its own to the terminal (n_tty.c, process_output), which needs room again.
                let printable = |byte: &u8| matches!(byte, b' '..=b'~');
                most = self.pending[..most].iter().take_while(|byte| printable(byte)).count().max(1);
            }
            rustix::io::write(&self.to, &self.pending[..most])
        };
        match written {
            Ok(written) => {
                self.moved = true;
                self.pending.drain(..written);
                if self.pending.is_empty() { self.count(0) } else { Next::Wait }
            }
            // It was hung up.
            Err(Errno::IO) if self.is_terminal => Next::Over,
            Err(errno) => failed(errno),
        }
    }

    /// Counts bytes that were read. The stream is over when none are left.
    fn count(&mut self, read: usize) -> Next {
        self.left = self.left.map(|left| left.saturating_sub(read));
        if self.left == Some(0) { Next::Over } else { Next::Wait }
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
