//! Unix sockets of a container on the host's network.
//!
//! Abstract Unix sockets belong to a network namespace. On the host's network every local process can therefore connect to a
//! socket of the container, and the container to those of the host: X11, D-Bus, and any process that passes it a descriptor of
//! the host's files. Landlock forbids the second direction and not the first, and a passed descriptor of a directory is enough for
//! chmod(2), chown(2) and connect(2), which Landlock does not restrict: uid 0 would be root of the host.
//!
//! So a container on the host's network keeps its network devices there, and its Unix sockets elsewhere. A system call filter
//! stops `socket(AF_UNIX, …)`, and a supervisor answers it with a socket of a network namespace in which there is nothing else.
//! Names of abstract sockets are then the container's own, as in a container with a network of its own. Sockets with a path work
//! as before, because a path has no network namespace, and so does socketpair(2), whose sockets have no name.
//!
//! ```text
//! container: socket(AF_UNIX) ──► kernel ──► supervisor: makes the socket in its namespace ──► kernel ──► descriptor
//! ```
//!
//! The supervisor is a process of the launcher's that starts with the first such call, so a container without Unix sockets pays
//! for the filter alone. It ends with the container, and with the launcher.
//!
//! The C libraries ask for the number of a network interface through any socket, an AF_UNIX one first (if_nametoindex(3)). These
//! two requests are answered from the host's network, where the container's interfaces are.
//!
//! Other ways to make a Unix socket are closed by the container's own filter: socketcall(2), x32 and io_uring. Without that
//! filter (`--security-opt seccomp=unconfined`, `--privileged`) there is no supervisor either.

use super::spec::Container;
use crate::{
    error::{Code, OrFail, Result},
    sys::{notify, process},
};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType},
    process::{PidfdFlags, PidfdGetfdFlags, Signal},
};
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// AUDIT_ARCH_* and the numbers of socket(2) and ioctl(2), of this machine's own table and of its 32-bit one.
#[cfg(target_arch = "x86_64")]
const TABLES: [(u32, u32, u32); 2] = [(0xc000_003e, 41, 16), (0x4000_0003, 359, 54)];
#[cfg(target_arch = "aarch64")]
const TABLES: [(u32, u32, u32); 2] = [(0xc000_00b7, 198, 29), (0x4000_0028, 281, 54)];

/// Whether a container's Unix sockets are kept apart.
pub fn are_apart(container: &Container) -> bool {
    container.host_network && container.process.seccomp
}

/// In the container's process: stops its Unix sockets from here on. The descriptor is for [`supervise`]; `None` inside another
/// container that has a supervisor, whose namespace the sockets then belong to.
pub fn stop() -> Result<Option<OwnedFd>> {
    match notify::install(&filter()) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        Err(error) => {
            Err(error).or_fail(Code::Seccomp, || "the container's Unix sockets cannot be kept apart")
        }
    }
}

/// Classic BPF, `struct sock_filter` after `struct sock_filter`.
fn filter() -> Vec<u8> {
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    /// Offsets in `struct seccomp_data`: number, architecture, lower halves of the first two arguments.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    const FIRST: u32 = 16;
    const SECOND: u32 = 24;
    let [(native, socket, ioctl), (compat, compat_socket, compat_ioctl)] = TABLES;
    let number = |request: u64| u32::try_from(request).unwrap_or(0);
    let instructions: [(u16, u8, u8, u32); 16] = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 0, 3, native),
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, 5, 0, socket),
        (JUMP_EQUAL, 6, 10, ioctl),
        (JUMP_EQUAL, 0, 9, compat),
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, 1, 0, compat_socket),
        (JUMP_EQUAL, 2, 6, compat_ioctl),
        (LOAD, 0, 0, FIRST),
        (JUMP_EQUAL, 3, 4, libc::AF_UNIX.unsigned_abs()),
        (LOAD, 0, 0, SECOND),
        (JUMP_EQUAL, 1, 0, number(libc::SIOCGIFNAME as u64)),
        (JUMP_EQUAL, 0, 1, number(libc::SIOCGIFINDEX as u64)),
        (RETURN, 0, 0, NOTIFY),
        (RETURN, 0, 0, ALLOW),
    ];
    let bytes = |(code, if_true, if_false, k): (u16, u8, u8, u32)| {
        let ([c0, c1], [k0, k1, k2, k3]) = (code.to_ne_bytes(), k.to_ne_bytes());
        [c0, c1, if_true, if_false, k0, k1, k2, k3]
    };
    instructions.into_iter().flat_map(bytes).collect()
}

/// In the launcher: starts the supervisor. `user_namespace` is a process in the container's user namespace, where it has one: only
/// there may an ordinary user make a network namespace.
pub fn supervise(listener: OwnedFd, user_namespace: Option<BorrowedFd<'_>>) -> Result<()> {
    let launcher = rustix::process::getpid();
    let user_namespace = user_namespace
        .map(|process| process.try_clone_to_owned())
        .transpose()
        .or_fail(Code::Internal, || "a descriptor cannot be copied")?;
    let child =
        process::fork().or_fail(Code::Internal, || "the supervisor of Unix sockets cannot be started")?;
    if child == 0 {
        let code = match serve(&listener, user_namespace, launcher) {
            Ok(()) => 0,
            Err(error) => {
                // The calls that wait fail with ENOSYS when the listener is closed.
                eprintln!(
                    "warning: the container has no Unix sockets: no network namespace can be made for them: {error}; raise \
                     /proc/sys/user/max_net_namespaces, or use --network none"
                );
                1
            }
        };
        process::exit_now(code);
    }
    Ok(())
}

fn serve(
    listener: &OwnedFd,
    user_namespace: Option<OwnedFd>,
    launcher: rustix::process::Pid,
) -> io::Result<()> {
    let mut kept: Vec<BorrowedFd<'_>> =
        [listener].into_iter().chain(&user_namespace).map(AsFd::as_fd).collect();
    process::close_others(&mut kept)?;
    // Before the namespace is left: for questions about the host's interfaces.
    let host = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let queue = Path::new("/proc/sys/net/unix/max_dgram_qlen");
    let length = std::fs::read(queue);
    if let Some(process) = &user_namespace {
        setns(process, CloneFlags::CLONE_NEWUSER)?;
    }
    unshare(CloneFlags::CLONE_NEWNET)?;
    // systemd raises this limit from 10 on the host, and programs were tested there.
    let _ = length.and_then(|length| std::fs::write(queue, length));
    drop(user_namespace);
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // The launcher's streams are not kept open by this process.
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    // After the change of user namespace, which clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(launcher) {
        return Ok(());
    }
    loop {
        let mut polled = [PollFd::new(listener, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        // The last process with the filter has ended.
        if !polled[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        let listener = listener.as_fd();
        // ENOENT: the process was killed meanwhile, here and below.
        let Ok(call) = notify::receive(listener) else { continue };
        let number = call.number.unsigned_abs();
        if TABLES.iter().any(|(_, socket, _)| *socket == number) {
            if let Err(error) = make_socket(listener, &call) {
                let _ = notify::answer(listener, &call, Err(error));
            }
        } else {
            answer_about_interface(listener, &call, &host);
        }
    }
}

/// The lower half of an argument, as the kernel takes an `int`.
fn int(argument: u64) -> i32 {
    #[allow(clippy::cast_possible_truncation)]
    let low = argument as u32;
    low.cast_signed()
}

fn make_socket(listener: BorrowedFd<'_>, call: &notify::Call) -> io::Result<()> {
    let (kind, protocol) = (int(call.arguments[1]), int(call.arguments[2]));
    let socket = notify::unix_socket(kind, protocol)?;
    notify::answer_with(listener, call, socket.as_fd(), kind & libc::SOCK_CLOEXEC != 0)
}

/// Answers about the host's interfaces where the question was asked through a Unix socket; through any other the kernel answers.
fn answer_about_interface(listener: BorrowedFd<'_>, call: &notify::Call, host: &OwnedFd) {
    let answered = asked_through_unix_socket(call).unwrap_or(false).then(|| {
        let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", call.thread))?;
        if !notify::is_waiting(listener, call) {
            return Err(Errno::SRCH.into());
        }
        let mut about = [0; notify::INTERFACE];
        let fault = |_| io::Error::from(Errno::FAULT);
        memory.read_exact_at(&mut about, call.arguments[2]).map_err(fault)?;
        notify::interface(host.as_fd(), u64::from(int(call.arguments[1]).cast_unsigned()), &mut about)?;
        memory.write_all_at(&about, call.arguments[2]).map_err(fault)?;
        Ok(0)
    });
    let _ = match answered {
        Some(result) => notify::answer(listener, call, result),
        None => notify::permit(listener, call),
    };
}

fn asked_through_unix_socket(call: &notify::Call) -> io::Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", call.thread))?;
    let process = status
        .lines()
        .find_map(|line| rustix::process::Pid::from_raw(line.strip_prefix("Tgid:")?.trim().parse().ok()?))
        .ok_or(Errno::SRCH)?;
    let process = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
    let socket = rustix::process::pidfd_getfd(process, int(call.arguments[0]), PidfdGetfdFlags::empty())?;
    Ok(rustix::net::sockopt::socket_domain(&socket)? == AddressFamily::UNIX)
}
