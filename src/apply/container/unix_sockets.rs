//! Unix sockets of a container on the host's network.
//!
//! Abstract Unix sockets belong to a network namespace. On the host's network every local process can therefore connect to a
//! socket of the container, and the container to those of the host: X11, D-Bus, and any process that passes it a descriptor of
//! the host's files. Landlock forbids the second direction and not the first, and a passed descriptor of a directory is enough for
//! chmod(2), chown(2) and connect(2), which Landlock does not restrict: uid 0 would be root of the host.
//!
//! So a container on the host's network uses the host's network devices, but not its Unix sockets. A system call filter
//! stops socket(2) and socketpair(2) of the family AF_UNIX, and a supervisor answers them with sockets of an otherwise empty
//! network namespace. Names of abstract sockets are then the container's own, as in a container with a network of its own.
//! Sockets with a path work as before, because a path has no network namespace. Pairs are stopped because bind(2) gives a name
//! to each end of any pair, and a name that the container has on the host is not available to the host's programs.
//!
//! ```text
//! container: socket(AF_UNIX) ──► kernel ──► supervisor: makes the socket in its namespace ──► kernel ──► descriptor
//! ```
//!
//! The supervisor is a child of the launcher that starts with the first such call, so a container without Unix sockets pays
//! only for the filter. It ends with the container, and with the launcher. A pair costs about 40 µs more than without it, on a
//! virtual machine where a pair costs 19 µs; the wake-ups are most of that.
//!
//! With `--memory` the supervisor moves to the container's cgroup, because the kernel counts the memory of a socket where it is
//! made. The move takes up to 10 ms, so it is not done without a limit. The supervisor makes each socket with the ids of its
//! caller, because the kernel takes the owner of a socket (fchmod(2), SO_PEERCRED of a pair) from there.
//!
//! The C libraries ask for the number of a network interface through any socket, an AF_UNIX one first (if_nametoindex(3)). These
//! two requests are answered from the host's network, where the container's interfaces are.
//!
//! Other ways to make a Unix socket are refused with ENOSYS: socketcall(2), x32 and io_uring. So the separation does not depend on
//! the container's own filter (`--security-opt seccomp=unconfined`). Only `--privileged` has none.

use super::{
    cgroup::Cgroup,
    process_files::{ProcessFiles, status_line},
    spec::Container,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    sys::{notify, process},
};
use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::{Gid, Uid, getegid, geteuid, setegid, seteuid},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal},
};
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// A system call table: its AUDIT_ARCH_*, and the numbers of the calls that are stopped.
struct Table {
    arch: u32,
    socket: u32,
    socketpair: u32,
    ioctl: u32,
}

/// This machine's own table and its 32-bit one.
#[cfg(target_arch = "x86_64")]
const TABLES: [Table; 2] = [
    Table { arch: 0xc000_003e, socket: 41, socketpair: 53, ioctl: 16 },
    Table { arch: 0x4000_0003, socket: 359, socketpair: 360, ioctl: 54 },
];
#[cfg(target_arch = "aarch64")]
const TABLES: [Table; 2] = [
    Table { arch: 0xc000_00b7, socket: 198, socketpair: 199, ioctl: 29 },
    Table { arch: 0x4000_0028, socket: 281, socketpair: 288, ioctl: 54 },
];

/// Whether a container's Unix sockets are separated from the host's. Not with `--privileged`, which asks for no confinement.
pub fn are_apart(container: &Container) -> bool {
    container.host_network && !container.all_devices
}

/// Called in the container's process: installs the filter. Returns the descriptor for [`supervise`]. A process has at most one
/// supervisor (seccomp(2), EBUSY): inside another gpurun container the sockets belong to the namespace of that container's
/// supervisor, and the answer is `None`. A supervisor of another program cannot be told from one of gpurun.
///
/// # Errors
/// [`Code::Confinement`] if there is another supervisor and uid 0 of the host would share the host's network although no option
/// asks for that; [`Code::Seccomp`] if the kernel refuses the filter.
pub fn stop(container: &Container) -> Result<Option<OwnedFd>> {
    let is_host_root = container.privileged && container.process.user.uid == 0;
    match notify::install(&filter()) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            if is_host_root && !container.network_requested {
                let what = "the container's Unix sockets cannot be separated from the host's";
                return Err(Error::new(Code::Confinement, what)
                    .cause("gpurun runs under another seccomp supervisor, and a process has at most one")
                    .fix("type --network host to run it nevertheless, or --network none, or -u 1000"));
            }
            Ok(None)
        }
        Err(error) => Err(error).or_fail(
            Code::Seccomp,
            || "the filter that separates the container's Unix sockets cannot be installed",
        ),
    }
}

/// Classic BPF, `struct sock_filter` after `struct sock_filter`.
// The requests' own type differs between the C libraries; they have 16 bits.
#[allow(clippy::cast_possible_truncation)]
fn filter() -> Vec<u8> {
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// Offsets in `struct seccomp_data`: number, architecture, lower halves of the first two arguments.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    const FIRST: u32 = 16;
    const SECOND: u32 = 24;
    const JUMP_AT_LEAST: u16 = 0x35;
    /// The same number in every table since Linux 5.1. io_uring makes and connects sockets without socket(2).
    const IO_URING_SETUP: u32 = 425;
    /// Calls of the x32 table have this bit; on other machines no call has it.
    const X32: u32 = 0x4000_0000;
    /// socketcall(2) of 32-bit x86. Its arguments are in memory, which a filter cannot read.
    const SOCKETCALL: u32 = 102;
    /// Indices of the instructions where these begin.
    const SOCKET: usize = 15;
    const IOCTL: usize = 17;
    const STOP: usize = 20;
    const ALLOW: usize = 21;
    const REFUSE: usize = 22;
    let [own, compat] = TABLES;
    let socketcall = if cfg!(target_arch = "x86_64") { SOCKETCALL } else { u32::MAX };
    // Code, the instructions that follow if it is equal and if not, operand.
    let instructions: [(u16, usize, usize, u32); 23] = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 2, 8, own.arch),
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, REFUSE, 4, X32),
        (JUMP_EQUAL, REFUSE, 5, IO_URING_SETUP),
        (JUMP_EQUAL, SOCKET, 6, own.socket),
        (JUMP_EQUAL, SOCKET, 7, own.socketpair),
        (JUMP_EQUAL, IOCTL, ALLOW, own.ioctl),
        (JUMP_EQUAL, 9, ALLOW, compat.arch),
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, REFUSE, 11, IO_URING_SETUP),
        (JUMP_EQUAL, REFUSE, 12, socketcall),
        (JUMP_EQUAL, SOCKET, 13, compat.socket),
        (JUMP_EQUAL, SOCKET, 14, compat.socketpair),
        (JUMP_EQUAL, IOCTL, ALLOW, compat.ioctl),
        (LOAD, 0, 0, FIRST),
        (JUMP_EQUAL, STOP, ALLOW, libc::AF_UNIX.unsigned_abs()),
        (LOAD, 0, 0, SECOND),
        (JUMP_EQUAL, STOP, 19, libc::SIOCGIFNAME as u32),
        (JUMP_EQUAL, STOP, ALLOW, libc::SIOCGIFINDEX as u32),
        (RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        (RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        (RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
    ];
    let bytes = |(at, (code, if_true, if_false, k)): (usize, (u16, usize, usize, u32))| {
        // Jumps count from the next instruction; other instructions have no jumps.
        let offset = |target: usize| u8::try_from(target.saturating_sub(at + 1)).unwrap_or(0);
        let ([c0, c1], [k0, k1, k2, k3]) = (code.to_ne_bytes(), k.to_ne_bytes());
        [c0, c1, offset(if_true), offset(if_false), k0, k1, k2, k3]
    };
    instructions.into_iter().enumerate().flat_map(bytes).collect()
}

/// Called in the launcher: starts the supervisor. `user_namespace` is a process in the container's user namespace, if it has
/// one: only there may an ordinary user make a network namespace. `cgroup` is the one in which the memory of sockets counts.
pub fn supervise(
    listener: &OwnedFd,
    user_namespace: Option<BorrowedFd<'_>>,
    cgroup: Option<&Cgroup>,
) -> Result<()> {
    let launcher = rustix::process::getpid();
    let user_namespace = user_namespace
        .map(|process| process.try_clone_to_owned())
        .transpose()
        .or_fail(Code::Internal, || "a descriptor cannot be copied")?;
    let child =
        process::fork().or_fail(Code::Internal, || "the supervisor of Unix sockets cannot be started")?;
    if child == 0 {
        let code = match serve(listener, user_namespace, cgroup, launcher) {
            Ok(()) => 0,
            Err(error) => {
                // The calls that wait fail with ENOSYS when the listener is closed.
                tracing::warn!(
                    "the container has no Unix sockets, because their supervisor cannot be set up ({error}): raise \
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
    cgroup: Option<&Cgroup>,
    launcher: rustix::process::Pid,
) -> io::Result<()> {
    let mut kept: Vec<BorrowedFd<'_>> =
        [listener].into_iter().chain(&user_namespace).map(AsFd::as_fd).collect();
    process::close_others(&mut kept)?;
    cgroup.map_or(Ok(()), Cgroup::enter)?;
    // All of these before the namespaces change: files of processes, and queries about the host's interfaces.
    let processes = ProcessFiles::open().ok();
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
    // So that this process does not keep the launcher's streams open.
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    die_with_launcher()?;
    if rustix::process::getppid() != Some(launcher) {
        return Ok(());
    }
    notify::wake_on_one_processor(listener.as_fd());
    let supervisor = Supervisor { listener: listener.as_fd(), processes, host };
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
        // ENOENT, here and below: the process was killed meanwhile.
        let Ok(call) = notify::receive(supervisor.listener) else { continue };
        let number = call.number.unsigned_abs();
        // The numbers of these calls do not collide between the two tables.
        let answered = if TABLES.iter().any(|table| table.ioctl == number) {
            supervisor.answer_about_interface(&call);
            Ok(())
        } else if TABLES.iter().any(|table| table.socket == number) {
            supervisor.make_socket(&call)
        } else {
            supervisor.make_pair(&call)
        };
        if let Err(error) = answered {
            let _ = notify::answer(supervisor.listener, &call, Err(error));
        }
    }
}

/// The kernel clears this when a process changes its ids or its user namespace.
fn die_with_launcher() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
}

struct Supervisor<'a> {
    listener: BorrowedFd<'a>,
    /// `None` if /proc shows another pid namespace, and no other may be mounted.
    processes: Option<ProcessFiles>,
    /// A socket of the host's network.
    host: OwnedFd,
}

impl Supervisor<'_> {
    fn make_socket(&self, call: &notify::Call) -> io::Result<()> {
        let (kind, protocol) = (int(call.arguments[1]), int(call.arguments[2]));
        let socket = self.as_caller(call, || notify::unix_socket(kind, protocol))?;
        notify::answer_with(self.listener, call, socket.as_fd(), kind & libc::SOCK_CLOEXEC != 0)
    }

    fn make_pair(&self, call: &notify::Call) -> io::Result<()> {
        let (kind, protocol) = (int(call.arguments[1]), int(call.arguments[2]));
        let memory = self.memory_of(call)?;
        let mut numbers = Vec::new();
        for socket in self.as_caller(call, || notify::unix_pair(kind, protocol))? {
            let close_on_exec = kind & libc::SOCK_CLOEXEC != 0;
            numbers.extend(notify::give(self.listener, call, socket.as_fd(), close_on_exec)?.to_ne_bytes());
        }
        memory.write_all_at(&numbers, call.arguments[3]).map_err(|_| Errno::FAULT)?;
        notify::answer(self.listener, call, Ok(0))
    }

    /// Makes something with the effective ids of the caller, which then owns it.
    fn as_caller<T>(&self, call: &notify::Call, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(processes) = &self.processes else { return make() };
        let status = processes.read(call.thread, "status")?;
        // Otherwise the thread id may have been reused.
        if !notify::is_waiting(self.listener, call) {
            return Err(Errno::SRCH.into());
        }
        let effective = |name| {
            let ids = status_line(&status, name)?;
            ids.split_whitespace().nth(1).and_then(|id| id.parse().ok()).ok_or(Errno::SRCH)
        };
        let (uid, gid) = (Uid::from_raw(effective("Uid")?), Gid::from_raw(effective("Gid")?));
        let (own_uid, own_gid) = (geteuid(), getegid());
        if (uid, gid) == (own_uid, own_gid) {
            return make();
        }
        setegid(gid).and_then(|()| seteuid(uid))?;
        let made = make();
        seteuid(own_uid).and_then(|()| setegid(own_gid))?;
        die_with_launcher()?;
        made
    }

    /// Opens the caller's memory.
    fn memory_of(&self, call: &notify::Call) -> io::Result<File> {
        let processes = self.processes.as_ref().ok_or(Errno::NOSYS)?;
        let memory = processes.file(call.thread, "mem", OFlags::RDWR)?;
        // Otherwise the thread id may have been reused.
        if notify::is_waiting(self.listener, call) { Ok(memory) } else { Err(Errno::SRCH.into()) }
    }

    /// Answers a query about the host's interfaces if it uses a Unix socket; the kernel answers queries on other sockets.
    fn answer_about_interface(&self, call: &notify::Call) {
        let answered = self.asked_through_unix_socket(call).unwrap_or(false).then(|| {
            let memory = self.memory_of(call)?;
            let mut about = [0; notify::INTERFACE];
            let fault = |_| io::Error::from(Errno::FAULT);
            memory.read_exact_at(&mut about, call.arguments[2]).map_err(fault)?;
            notify::interface(self.host.as_fd(), int(call.arguments[1]).cast_unsigned(), &mut about)?;
            memory.write_all_at(&about, call.arguments[2]).map_err(fault)?;
            Ok(0)
        });
        let _ = match answered {
            Some(result) => notify::answer(self.listener, call, result),
            None => notify::permit(self.listener, call),
        };
    }

    fn asked_through_unix_socket(&self, call: &notify::Call) -> io::Result<bool> {
        let processes = self.processes.as_ref().ok_or(Errno::NOSYS)?;
        let status = processes.read(call.thread, "status")?;
        let process =
            status_line(&status, "Tgid")?.parse().ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        let process = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
        let socket = rustix::process::pidfd_getfd(process, int(call.arguments[0]), PidfdGetfdFlags::empty())?;
        Ok(rustix::net::sockopt::socket_domain(&socket)? == AddressFamily::UNIX)
    }
}

/// The lower half of an argument, as the kernel takes an `int`.
fn int(argument: u64) -> i32 {
    #[allow(clippy::cast_possible_truncation)]
    let low = argument as u32;
    low.cast_signed()
}
