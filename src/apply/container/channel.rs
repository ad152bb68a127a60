//! What launcher and child tell each other until the command runs: "go", the terminal, a failure. The child's end closes
//! with its execve, so silence means that the command runs.

use crate::{
    error::{Code, Error, OrFail, Result},
    sys::handover,
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, IoSlice, IoSliceMut},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    },
};
use std::mem::MaybeUninit;

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// What the child says.
#[derive(Debug)]
pub enum Said {
    /// The command runs, or the child is gone.
    Nothing,
    /// The terminal's master side.
    Terminal(OwnedFd),
    /// The descriptor by which its Unix sockets are supervised.
    UnixSockets(OwnedFd),
    /// The command cannot be executed; see [`super::command::Command::failure`].
    NotExecuted {
        /// The index of the path.
        path: Option<usize>,
        /// The error of execve(2).
        errno: i32,
    },
    /// It failed.
    Failure(Error),
}

/// Messages that carry a descriptor.
const TERMINAL: &[u8] = b"tty";
const UNIX_SOCKETS: &[u8] = b"unix";

/// A failure's paragraph is shorter.
const MAX_MESSAGE: usize = 16 << 10;

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// Both ends.
    pub fn pair() -> Result<(Self, Self)> {
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .or_fail(Code::Internal, || "no socket pair can be made")?;
        Ok((Self(a), Self(b)))
    }

    /// The launcher: what the child waits for is done.
    pub fn go(&self) -> Result<()> {
        // A child that is gone already has said why, or will be found when it is waited for.
        match rustix::net::send(&self.0, b"go", SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(errno) => {
                Err(errno).or_fail(Code::Internal, || "the container's process cannot be told to start")
            }
        }
    }

    /// The child: waits for [`Channel::go`].
    pub fn wait(&self) -> Result<()> {
        match rustix::io::retry_on_intr(|| rustix::net::recv(&self.0, &mut [0u8; 2][..], RecvFlags::empty()))
        {
            Ok((_, 2)) => Ok(()),
            Ok(_) => Err(Error::new(Code::Internal, "the launcher went away before its container was ready")),
            Err(errno) => Err(errno).or_fail(Code::Internal, || "the launcher cannot be heard"),
        }
    }

    /// Called by the child: sends the terminal's master side.
    pub fn send_terminal(&self, master: &OwnedFd) -> Result<()> {
        self.send_descriptor(TERMINAL, master)
    }

    /// Called by the child: sends the descriptor by which its Unix sockets are supervised.
    pub fn send_unix_sockets(&self, listener: &OwnedFd) -> Result<()> {
        self.send_descriptor(UNIX_SOCKETS, listener)
    }

    fn send_descriptor(&self, name: &[u8], descriptor: &OwnedFd) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: [BorrowedFd<'_>; 1] = [descriptor.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&self.0, &[IoSlice::new(name)], &mut control, SendFlags::NOSIGNAL)
            .or_fail(Code::Internal, || "a descriptor cannot be handed to the launcher")?;
        Ok(())
    }

    /// The child: says why there is no command.
    pub fn send_failure(&self, error: &Error) {
        let message = error.to_json().to_string();
        // If the launcher cannot be reached it has ended, and nothing would read the message.
        let _ = rustix::net::send(
            &self.0,
            &message.as_bytes()[..message.len().min(MAX_MESSAGE)],
            SendFlags::NOSIGNAL,
        );
    }

    /// The launcher: the next thing that the child says.
    pub fn receive(&self) -> Result<Said> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let length = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => break message.bytes,
                // A child that ended with our "go" unread makes the kernel say so once (unix_release_sock), before it hands out
                // what the child said.
                Err(Errno::CONNRESET | Errno::INTR) => {}
                Err(errno) => {
                    return Err(errno).or_fail(Code::Internal, || "the container's process cannot be heard");
                }
            }
        };
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        if let Some((path, errno)) =
            <&[u8; handover::MESSAGE]>::try_from(&bytes[..length]).ok().and_then(handover::parse)
        {
            return Ok(Said::NotExecuted { path, errno });
        }
        Ok(match (length, descriptor) {
            (0, _) => Said::Nothing,
            (length, Some(listener)) if bytes[..length] == *UNIX_SOCKETS => Said::UnixSockets(listener),
            (_, Some(master)) => Said::Terminal(master),
            (length, None) => {
                let failure =
                    serde_json::from_slice(&bytes[..length]).ok().and_then(|value| Error::from_json(&value));
                Said::Failure(failure.unwrap_or_else(|| {
                    Error::new(Code::Internal, "the container's process failed without a reason")
                }))
            }
        })
    }

    /// Whether the other end is closed.
    pub fn is_closed(&self) -> bool {
        let mut poll = [PollFd::new(&self.0, PollFlags::empty())];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut poll, Some(&now)).is_ok() && poll[0].revents().contains(PollFlags::HUP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_a_child_that_did_not_listen_is_heard() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.go().unwrap();
        theirs.send_failure(&Error::new(Code::Rootfs, "it failed"));
        drop(theirs);
        assert!(matches!(ours.receive().unwrap(), Said::Failure(error) if error.what() == "it failed"));
        assert!(matches!(ours.receive().unwrap(), Said::Nothing));
        ours.go().unwrap();
    }
}
