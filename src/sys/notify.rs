//! Notifications of a system call filter (seccomp_unotify(2)): a supervisor answers chosen system calls of other processes.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// SECCOMP_IOCTL_NOTIF_* of linux/seccomp.h.
const RECEIVE: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
const SEND: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;
const ID_VALID: libc::Ioctl = 0x4008_2102_u32 as libc::Ioctl;
const ADD_FD: libc::Ioctl = 0x4018_2103_u32 as libc::Ioctl;

/// Puts `filter` on the calling thread, as [`super::seccomp::install`] does, and returns the descriptor by which a supervisor
/// receives what the filter answers with SECCOMP_RET_USER_NOTIF.
///
/// # Errors
/// EBUSY if a filter of an enclosing container already has a supervisor: the kernel allows only one.
pub fn install(filter: &[u8]) -> io::Result<OwnedFd> {
    /// Linux 5.19: a signal does not interrupt a call that the supervisor has received, which would repeat it.
    const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    match super::seccomp::set(filter, flags | WAIT_KILLABLE_RECV) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => super::seccomp::set(filter, flags),
        result => result,
    }
    .and_then(|fd| {
        let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        // SAFETY: with SECCOMP_FILTER_FLAG_NEW_LISTENER the call returns a new descriptor (close-on-exec) that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    })
}

/// Lets caller and supervisor wake each other on the same processor (Linux 6.6), which takes a third off a call. An older kernel
/// wakes as it does.
pub fn wake_on_one_processor(listener: BorrowedFd<'_>) {
    const SET_FLAGS: libc::Ioctl = 0x4008_2104_u32 as libc::Ioctl;
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: the request takes a number and touches no memory.
    unsafe { libc::ioctl(listener.as_raw_fd(), SET_FLAGS, SYNC_WAKE_UP) };
}

/// A system call that waits for its result.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    id: u64,
    /// The calling thread, as the supervisor's pid namespace numbers it.
    pub thread: u32,
    /// Number in the table of the caller's architecture.
    pub number: i32,
    /// Arguments.
    pub arguments: [u64; 6],
}

/// Receives the next call.
///
/// # Errors
/// ENOENT where the caller was killed meanwhile.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Call> {
    // SAFETY: the structure consists of integers, for which zero is valid; the kernel wants it zeroed and fills it.
    let call = unsafe {
        let mut call: libc::seccomp_notif = std::mem::zeroed();
        if libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) != 0 {
            return Err(io::Error::last_os_error());
        }
        call
    };
    Ok(Call { id: call.id, thread: call.pid, number: call.data.nr, arguments: call.data.args })
}

/// Whether the caller still waits. Then files that were opened by its thread id belong to the caller.
pub fn is_waiting(listener: BorrowedFd<'_>, call: &Call) -> bool {
    // SAFETY: the kernel reads one u64, which lives until the call returns.
    unsafe { libc::ioctl(listener.as_raw_fd(), ID_VALID, &raw const call.id) == 0 }
}

/// Answers with a result, or with an error number.
///
/// # Errors
/// ENOENT where the caller was killed meanwhile.
pub fn answer(listener: BorrowedFd<'_>, call: &Call, result: io::Result<i64>) -> io::Result<()> {
    let (val, error) = match result {
        Ok(val) => (val, 0),
        Err(error) => (0, -error.raw_os_error().unwrap_or(libc::EPERM)),
    };
    send(listener, libc::seccomp_notif_resp { id: call.id, val, error, flags: 0 })
}

/// Lets the kernel execute the call. Not safe for calls that the filter must block: the caller may have changed the memory
/// that its arguments point to.
///
/// # Errors
/// ENOENT where the caller was killed meanwhile.
pub fn permit(listener: BorrowedFd<'_>, call: &Call) -> io::Result<()> {
    const SECCOMP_USER_NOTIF_FLAG_CONTINUE: u32 = 1;
    let flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    send(listener, libc::seccomp_notif_resp { id: call.id, val: 0, error: 0, flags })
}

fn send(listener: BorrowedFd<'_>, response: libc::seccomp_notif_resp) -> io::Result<()> {
    // SAFETY: the kernel reads the structure, which lives until the call returns.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const response) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the caller a copy of `fd` and answers with its number there.
///
/// # Errors
/// EMFILE where the caller is out of descriptors, ENOENT where it was killed meanwhile.
pub fn answer_with(
    listener: BorrowedFd<'_>,
    call: &Call,
    fd: BorrowedFd<'_>,
    close_on_exec: bool,
) -> io::Result<()> {
    /// Linux 5.14: both in one step.
    const SECCOMP_ADDFD_FLAG_SEND: u32 = 1 << 1;
    match add_fd(listener, call, fd, close_on_exec, SECCOMP_ADDFD_FLAG_SEND) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let number = give(listener, call, fd, close_on_exec)?;
            answer(listener, call, Ok(number.into()))
        }
        result => result.map(drop),
    }
}

/// Gives the caller a copy of `fd`, and returns its number there.
///
/// # Errors
/// As for [`answer_with`].
pub fn give(
    listener: BorrowedFd<'_>,
    call: &Call,
    fd: BorrowedFd<'_>,
    close_on_exec: bool,
) -> io::Result<i32> {
    add_fd(listener, call, fd, close_on_exec, 0)
}

fn add_fd(
    listener: BorrowedFd<'_>,
    call: &Call,
    fd: BorrowedFd<'_>,
    close_on_exec: bool,
    flags: u32,
) -> io::Result<i32> {
    let request = libc::seccomp_notif_addfd {
        id: call.id,
        flags,
        srcfd: fd.as_raw_fd().cast_unsigned(),
        newfd: 0,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
    };
    // SAFETY: the kernel reads the structure, which lives until the call returns, and takes its own reference to the file.
    let number = unsafe { libc::ioctl(listener.as_raw_fd(), ADD_FD, &raw const request) };
    if number >= 0 { Ok(number) } else { Err(io::Error::last_os_error()) }
}

/// socketpair(2) of the family AF_UNIX with a type and a protocol that a process asked for.
///
/// # Errors
/// The kernel's.
pub fn unix_pair(kind: i32, protocol: i32) -> io::Result<[OwnedFd; 2]> {
    let mut pair = [-1; 2];
    // SAFETY: the kernel writes two numbers into `pair`; on success these are new descriptors that nothing else owns.
    unsafe {
        match libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, protocol, pair.as_mut_ptr()) {
            0 => Ok(pair.map(|fd| OwnedFd::from_raw_fd(fd))),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// socket(2) of the family AF_UNIX with a type and a protocol that a process asked for.
///
/// # Errors
/// The kernel's.
pub fn unix_socket(kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers; on success it returns a new descriptor that nothing else owns.
    unsafe {
        match libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, protocol) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The beginning of `struct ifreq`: a name and a number. It is the same for 32-bit programs.
pub const INTERFACE: usize = 20;

/// SIOCGIFNAME or SIOCGIFINDEX on a socket: completes name or number of a network interface.
///
/// # Errors
/// ENODEV where there is no such interface; EINVAL for another request.
// The requests' own type differs between the C libraries; they have 16 bits.
#[allow(clippy::cast_possible_truncation)]
pub fn interface(socket: BorrowedFd<'_>, request: u32, about: &mut [u8; INTERFACE]) -> io::Result<()> {
    let request = [libc::SIOCGIFNAME, libc::SIOCGIFINDEX]
        .into_iter()
        .find(|known| *known as u32 == request)
        .ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
    let mut whole = [0_u8; size_of::<libc::ifreq>()];
    whole[..INTERFACE].copy_from_slice(about);
    // SAFETY: both requests read and write one `struct ifreq`, of which `whole` has the size; the kernel minds no alignment.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, whole.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    about.copy_from_slice(&whole[..INTERFACE]);
    Ok(())
}
