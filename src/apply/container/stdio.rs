//! A container's standard streams.
//!
//! Without `-t` a container never holds a descriptor of the launcher's own streams. As in Docker it gets pipes, and the
//! launcher copies:
//!
//! | the launcher's stream is | the container's 0 | the container's 1 and 2 |
//! |---|---|---|
//! | a terminal | pipe | pipe |
//! | a regular file, opened with `>`, `>>` or `<` | pipe | pipe |
//! | a pipe | pipe of its own | pipe of its own |
//! | a socket (systemd, inetd) | pipe | pipe |
//! | another character device | pipe | pipe |
//! | /dev/null | pipe, at its end | /dev/null |
//! | closed: std has opened /dev/null before `main` | pipe, at its end | /dev/null |
//!
//! Without `-i` the container's 0 is /dev/null, whatever the launcher's is. With `-t` the container's 0, 1 and 2 are its own
//! pseudo-terminal, which receives input only with `-i`. /dev/null is always the container's own device. The rules are the
//! same for root and other users.
//!
//! A pipe belongs to the container's user, and every other user of the container may write to it: `> /dev/stdout` opens it
//! again, and the kernel checks permissions. If the launcher's 1 and 2 are the same file, the container's are the same pipe,
//! which keeps the order of writes to both. Two pipes keep no order between them.
//!
//! Why not pass the launcher's streams: on a terminal the container could read what is typed, take the terminal away
//! (TIOCEXCL) or change its settings; `> /dev/stdout` truncates a log file that was opened with `>>`, is refused to another user,
//! and fails on a socket (ENXIO); and O_NONBLOCK, which belongs to the open file, would reach the caller's other programs.
//!
//! No byte is lost at the end: when pid 1 has ended, the kernel has killed every other process of the container, and their
//! output is in the pipes, which [`super::relay`] drains. What processes outside write later, to descriptors that were passed to
//! them, is not copied.

use super::spec::Process;
use crate::{
    apply::rootfs::Root,
    error::{Code, Error, OrFail, Result},
    regular_file,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Gid, Mode, OFlags, Uid},
    pipe::PipeFlags,
};
use std::path::Path;

/// The container's ends; `None` is its /dev/null.
#[derive(Debug, Default)]
pub struct Inside {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

/// The launcher's ends, which do not block; `None` if there is nothing to copy.
#[derive(Debug, Default)]
pub struct Outside {
    /// Feeds the container's standard input.
    pub input: Option<OwnedFd>,
    /// What the container writes to its standard output; to both where they are the same file.
    pub output: Option<OwnedFd>,
    /// What it writes to its standard error.
    pub error: Option<OwnedFd>,
}

/// Makes the pipes of a container without a terminal.
pub fn connect(process: &Process) -> Result<(Inside, Outside)> {
    let (mut inside, mut outside) = (Inside::default(), Outside::default());
    if process.tty {
        return Ok((inside, outside));
    }
    if process.interactive {
        let (read, write) = pipe()?;
        do_not_block(&write)?;
        (inside.input, outside.input) = (Some(read), Some(write));
    }
    let (stdout, stderr) = (rustix::stdio::stdout(), rustix::stdio::stderr());
    if !is_null(stdout) {
        let (read, write) = pipe()?;
        do_not_block(&read)?;
        (inside.output, outside.output) = (Some(write), Some(read));
    }
    if is_same_file(stdout, stderr) {
        inside.error = inside
            .output
            .as_ref()
            .map(OwnedFd::try_clone)
            .transpose()
            .or_fail(Code::Internal, || "a descriptor cannot be copied")?;
    } else if !is_null(stderr) {
        let (read, write) = pipe()?;
        do_not_block(&read)?;
        (inside.error, outside.error) = (Some(write), Some(read));
    }
    Ok((inside, outside))
}

impl Inside {
    /// Gives the pipes to the container's user. Called while the process may still change owners.
    pub fn give_to(&self, uid: u32, gid: u32) {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        for (pipe, mode) in [(&self.input, 0o644), (&self.output, 0o622), (&self.error, 0o622)] {
            if let Some(pipe) = pipe {
                // In a user namespace with one id the pipe already belongs to the user, and no other owner is possible.
                let _ = rustix::fs::fchown(pipe, Some(uid), Some(gid));
                let _ = rustix::fs::fchmod(pipe, Mode::from_raw_mode(mode));
            }
        }
    }

    /// Makes these the standard streams of this process; `None` becomes the container's null device.
    pub fn install(self, null: &OwnedFd) -> Result<()> {
        let failed = || "the container's standard streams cannot be put in place";
        rustix::stdio::dup2_stdin(self.input.as_ref().unwrap_or(null)).or_fail(Code::Internal, failed)?;
        rustix::stdio::dup2_stdout(self.output.as_ref().unwrap_or(null)).or_fail(Code::Internal, failed)?;
        rustix::stdio::dup2_stderr(self.error.as_ref().unwrap_or(null)).or_fail(Code::Internal, failed)
    }
}

/// Opens the container's null device and checks its numbers: an image could have a link there that leads to a descriptor of
/// the host.
pub fn open_null(root: &Root) -> Result<OwnedFd> {
    let failed = || "the container's /dev/null cannot be opened";
    let null = root.open(Path::new("/dev/null"), OFlags::PATH).or_fail(Code::Internal, failed)?;
    if is_null(null.as_fd()) {
        regular_file::reopen(&null, OFlags::RDWR).or_fail(Code::Internal, failed)
    } else {
        Err(Error::new(Code::Internal, failed())
            .cause("it is not the null device")
            .fix("remove the /dev/null of the image or the volume"))
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).or_fail(Code::Internal, || "no pipe can be made")
}

fn do_not_block(end: &OwnedFd) -> Result<()> {
    rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK).or_fail(Code::Internal, || "a pipe cannot be set up")
}

fn is_null(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3)
    })
}

/// Whether both are the same file, so that one pipe can serve both.
fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let facts = |fd| {
        let stat = rustix::fs::fstat(fd).ok()?;
        let access = rustix::fs::fcntl_getfl(fd).ok()? & OFlags::RWMODE;
        Some((stat.st_dev, stat.st_ino, access != OFlags::RDONLY))
    };
    facts(one).is_some_and(|one| Some(one) == facts(other))
}
