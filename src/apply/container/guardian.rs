//! Ends the container when its launcher is killed.
//!
//! The container's first process asks the kernel for SIGKILL at the end of the launcher (PR_SET_PDEATHSIG), which is the quickest
//! way. But the kernel clears that request when the process changes its uid, as entrypoints with gosu, su-exec or setpriv do, and
//! any program can clear it. Such a container would outlive a killed launcher and hold its GPUs. So a child of the launcher, the
//! guardian, waits for the end of either: when the launcher ends first, it kills the container.
//!
//! The guardian starts while the container's first process makes the root, so a start does not wait for it. It has a session of
//! its own, so that a signal for the launcher's process group does not reach it, and holds the container's
//! pidfd, a pipe that the launcher has open for writing, and what [`Survivors`] needs.

use super::survivors::Survivors;
use crate::sys::process::{self, Clone};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::Signal,
};
use std::io;

/// The launcher's end of the pipe. The guardian takes its end for the launcher's.
#[derive(Debug)]
pub struct Guardian(#[allow(dead_code, reason = "the descriptor is only held open")] OwnedFd);

/// Starts the guardian of the process behind a pidfd, and of the processes that outlive it.
///
/// # Errors
/// The system's, if there is no descriptor or no process left. The container then depends on PR_SET_PDEATHSIG.
pub fn start(container: BorrowedFd<'_>, survivors: Option<&Survivors>) -> io::Result<Guardian> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    match process::clone_into(0, None)? {
        Clone::Parent(..) => Ok(Guardian(writer)),
        Clone::Child => {
            drop(writer);
            let result = guard(container, survivors, &reader);
            process::exit_now(i32::from(result.is_err()));
        }
    }
}

fn guard(container: BorrowedFd<'_>, survivors: Option<&Survivors>, launcher: &OwnedFd) -> io::Result<()> {
    rustix::process::setsid()?;
    // A reader of the container's output waits until every writer has closed it.
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let others = survivors.and_then(Survivors::descriptor);
    let mut kept: Vec<BorrowedFd<'_>> = [container, launcher.as_fd()].into_iter().chain(others).collect();
    process::close_others(&mut kept)?;
    loop {
        let mut polled =
            [PollFd::from_borrowed_fd(container, PollFlags::IN), PollFd::new(launcher, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !polled[1].revents().is_empty() {
            // A process that has ended in the meantime needs no signal.
            let killed = match rustix::process::pidfd_send_signal(container, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => Ok(()),
                Err(errno) => Err(errno.into()),
            };
            if let Some(survivors) = survivors {
                survivors.end();
            }
            return killed;
        }
        if !polled[0].revents().is_empty() {
            // The launcher ends the others.
            return Ok(());
        }
    }
}
