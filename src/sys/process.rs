//! Making a process in new namespaces, and the last steps before it becomes the user's command.

use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{CWD, Mode},
    mount::{MountPropagationFlags, MoveMountFlags},
    process::Signal,
};
use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
    time::{Duration, Instant},
};

/// Which side of [`clone_into`] this is.
#[derive(Debug)]
pub enum Clone {
    /// The parent, with the child's pidfd and its pid as the parent sees it.
    Parent(OwnedFd, i32),
    /// The child.
    Child,
}

/// linux/sched.h; libc's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// clone3(2) with `flags` (`CLONE_NEW*`), a pidfd, SIGCHLD at the end and, where `cgroup` is given, a start in that cgroup
/// (kernel 5.7: the only way into a cgroup that costs no later migration).
///
/// # Errors
/// The kernel's; and `EBUSY` when the process has more than one thread, because the child would inherit their locks.
pub fn clone_into(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Clone> {
    be_alone()?;
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data for which all zeroes is the documented "nothing asked for".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: without CLONE_VM the child has a copy of this address space, like fork(2)'s. This process has one thread
    // (checked above), so no lock of the allocator or of std is held by anybody else in the copy. `args` and `pidfd` live
    // until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match result {
        0 => Ok(Clone::Child),
        // SAFETY: the kernel has just put a new descriptor there that nobody else owns.
        pid if pid > 0 => {
            Ok(Clone::Parent(unsafe { OwnedFd::from_raw_fd(pidfd) }, i32::try_from(pid).unwrap_or(-1)))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes sure that this process has one thread. Those that unpacked layers are still seen for a moment after they were joined:
/// std's scopes wait for their last word, and pthread_join(3) for a number that the kernel clears before the thread is gone.
fn be_alone() -> io::Result<()> {
    let started = Instant::now();
    while std::fs::read_dir("/proc/self/task")?.count() != 1 {
        if started.elapsed() > Duration::from_secs(1) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// fork(2): the child's pid, or 0 in the child. For where [`clone_into`] is refused: Docker's system call filter answers
/// clone3(2) with ENOSYS, because it cannot look at flags in memory.
///
/// # Errors
/// The kernel's; and `EBUSY` when the process has more than one thread, because the child would inherit their locks.
pub fn fork() -> io::Result<i32> {
    be_alone()?;
    // SAFETY: this process has one thread (checked above), so in the child's copy nobody else holds a lock.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid),
    }
}

/// What the command runs has a mount namespace of its own, with this detached mount on /dev/shm, and is killed when the thread
/// ends that starts it.
pub fn with_own_shm(command: &mut Command, shm: OwnedFd) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            // It has ended meanwhile.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        unshare(CloneFlags::CLONE_NEWNS)?;
        let no_way_out = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", no_way_out)?;
        let itself = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(&shm, c"", CWD, c"/dev/shm", itself)?)
    };
    // SAFETY: in the child of a process with several threads, before execve(2), it makes system calls alone: nothing allocates, and
    // nothing takes a lock.
    unsafe { command.pre_exec(prepare) };
}

/// Closes every descriptor but standard input, output and error and those of `kept`, those too that somebody else's program
/// left open. Close-on-exec would be too late: as long as a descriptor is open, a path of the image's (a working directory,
/// a command, the interpreter of a script) may lead through it, /proc/self/fd/N/../.., out of the container.
///
/// For the container's first process alone, whose next step is execve(2) or _exit(2): whoever owned a closed descriptor must
/// not use it any more.
pub fn close_others(kept: &mut [BorrowedFd<'_>]) -> io::Result<()> {
    let close = |first: u32, last: u32| {
        if first > last {
            return Ok(());
        }
        // SAFETY: no memory is touched; that the owners of these descriptors are never heard of again is the caller's word.
        let result = unsafe { libc::close_range(first, last, 0) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    kept.sort_by_key(AsRawFd::as_raw_fd);
    let mut first = 3;
    for fd in kept {
        let fd = fd.as_raw_fd().unsigned_abs();
        if fd > first {
            close(first, fd - 1)?;
        }
        first = first.max(fd + 1);
    }
    close(first, u32::MAX)
}

/// Gives every signal its default action and blocks none: ignored signals and the mask survive execve(2), and std ignores
/// SIGPIPE.
pub fn reset_signals() {
    /// The size of the kernel's signal mask, which the call insists on.
    const MASK: usize = 8;
    // The kernel's own call: the C library keeps 32 and 33 to itself, and a parent may have ignored these as well. All zeroes is the
    // kernel's `struct sigaction` with SIG_DFL, no flags and an empty mask, on every machine.
    let default = [0_u64; 8];
    for signal in 1..=64 {
        // SAFETY: the kernel reads the structure, which is smaller than `default`; SIG_DFL installs no handler. Numbers that cannot
        // be set (SIGKILL, SIGSTOP) are refused with EINVAL, which changes nothing.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                MASK,
            );
        }
    }
    // SAFETY: a zeroed sigset_t is made valid by sigemptyset before it is read; both live on this stack.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Resets inherited state; `main` of each program calls it first. SIGCHLD gets its default action: the kernel reaps
/// the children of a process that ignores it, and their exit codes are lost (`env --ignore-signal=CHLD`). All signals are
/// unblocked. A umask that takes the owner's own rights loses these bits: gpurun could not enter the directories that it makes.
/// Closed standard streams need no handling: std opens /dev/null in their place before `main`, so that no file
/// gets number 0, 1 or 2.
pub fn normalize() {
    // SAFETY: SIG_DFL installs no handler. The mask is made valid by sigemptyset before it is read; both live on this stack. Both
    // calls have valid arguments and cannot fail.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    let all = Mode::RWXU | Mode::RWXG | Mode::RWXO;
    rustix::process::umask(rustix::process::umask(all) & (Mode::RWXG | Mode::RWXO));
}

/// The user namespace above a user namespace (ioctl_ns(2), NS_GET_PARENT).
///
/// # Errors
/// EPERM if it is above that of this process.
pub fn parent_namespace(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_PARENT: libc::Ioctl = 0xb702 as libc::Ioctl;
    // SAFETY: the request takes no argument; on success it returns a new descriptor (close-on-exec) that nothing else owns.
    unsafe {
        match libc::ioctl(namespace.as_raw_fd(), NS_GET_PARENT) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Lets traced children and threads go on. A process that calls PTRACE_TRACEME makes its parent the tracer, and stops at each signal
/// until the tracer continues it (ptrace(2)); gpurun traces no process. A signal is delivered then, except those that only
/// a tracer sees: SIGTRAP of execve(2), and stops, which a tracer would end.
pub fn release_traced() {
    loop {
        // SAFETY: the structure consists of integers and pointers, for which zero is valid; the kernel fills it.
        let (stopped, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let options = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
            (libc::waitid(libc::P_ALL, 0, &raw mut info, options) == 0, info)
        };
        // SAFETY: waitid(2) has filled the fields of SIGCHLD, or they are zero, which is no process.
        let (pid, signal) = unsafe { (info.si_pid(), info.si_status()) };
        if !stopped || pid == 0 {
            return;
        }
        if info.si_code == libc::CLD_TRAPPED {
            release(pid, signal);
        }
    }
}

/// Lets a traced child go on that stopped at a signal, and traces it no longer: see [`release_traced`].
pub fn release(pid: i32, signal: i32) {
    let is_tracers =
        [libc::SIGTRAP, libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal);
    let delivered: libc::c_long = if is_tracers { 0 } else { signal.into() };
    // SAFETY: the request touches no memory of this process. ESRCH, if the process was killed meanwhile, changes nothing.
    unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, 0, delivered) };
}

/// Whether this process ignores a signal.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: sigaction with a null action only reads; it fills `current`, for which all zeroes is valid.
    unsafe {
        let mut current: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut current) == 0
            && current.sa_sigaction == libc::SIG_IGN
    }
}

/// pidfd_send_signal(2) with a number: real-time signals have no names.
///
/// # Errors
/// ESRCH where the process has ended, EINVAL for a number that is not a signal.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes a descriptor, a number and a null pointer, which stands for the information that kill(2) would send.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0_u32,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// execve(2); returns only its failure.
pub fn execve(program: &CStr, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end with a null pointer, and every string in them is NUL-terminated and outlives the call.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// execveat(2) of the file behind `program` itself; returns only its failure.
pub fn fexecve(program: BorrowedFd<'_>, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: as for execve; the empty path with AT_EMPTY_PATH names the descriptor.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Ends the process at once, without running destructors or exit handlers that belong to its parent's copy.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes any status and does not return.
    unsafe { libc::_exit(code) }
}

/// Brings up `lo` of this network namespace (netdevice(7)).
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: the socket is open, and `request` is a live ifreq with a NUL-terminated name, which the kernel reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A session keyring of this process's own (keyctl(2), KEYCTL_JOIN_SESSION_KEYRING): the caller's holds his Kerberos tickets
/// and file system keys. A kernel without keyrings has none to leave.
pub fn leave_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring; nothing is read or written.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    };
    match io::Error::last_os_error() {
        error if result < 0 && error.raw_os_error() != Some(libc::ENOSYS) => Err(error),
        _ => Ok(()),
    }
}

/// Gives freed memory back to the kernel: what waits for a container should hold little.
pub fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim only returns free pages; live allocations stay where they are.
    unsafe {
        libc::malloc_trim(0);
    }
}
