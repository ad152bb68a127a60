//! What a container may call: the facts of Docker's default profile (`seccomp/default.json` of github.com/moby/profiles,
//! May 2026), for x86_64 and aarch64 with their 32-bit modes, in a table of our own.
//!
//! Where it differs from Docker's:
//! * `socketcall` is refused (Docker allows it and relies on AppArmor or SELinux, which gpurun does not load): it would
//!   be the way around the rule on address families, because a filter cannot look behind its pointer. 32-bit programs
//!   have `socket` and its kin as calls of their own since Linux 4.3.
//! * x32 is refused like a kernel without it does (ENOSYS); the driver has no x32 library.
//! * What Docker ties to a kernel of 4.8 or newer (`ptrace`) is always there: gpurun needs a newer one.

use caps::Capability as Cap;
use rustix::io::Errno;

/// What happens on a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Fail(Errno),
    /// Allowed if this argument is in one of these ascending, inclusive ranges; all its 64 bits count.
    AllowIfIn(u32, &'static [(u32, u32)]),
    /// Allowed if these bits of this argument's lower half are all clear.
    AllowIfClear(u32, u32),
}

/// For whom a row is meant.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whom {
    All,
    /// Containers with this capability.
    With(Cap),
    /// Containers without this capability.
    Without(Cap),
}

/// System calls that share a verdict.
pub(super) struct Row {
    pub(super) whom: Whom,
    pub(super) verdict: Verdict,
    /// By their names in the kernel's tables; a name that an architecture lacks means nothing there.
    pub(super) names: &'static str,
}

const fn row(whom: Whom, verdict: Verdict, names: &'static str) -> Row {
    Row { whom, verdict, names }
}

/// ARM's private calls (`__ARM_NR_breakpoint`, `_cacheflush`, `_set_tls` of the kernel's arm/unistd.h), far above
/// all others; no 32-bit ARM program starts without them.
pub(super) const ARM_PRIVATE: &[(u32, &str)] =
    &[(0x000f_0001, "breakpoint"), (0x000f_0002, "cacheflush"), (0x000f_0005, "set_tls")];

use Verdict::{Allow, AllowIfClear, AllowIfIn, Fail};
use Whom::{All, With, Without};

/// The profile. Of two rows on one call the first that applies decides; what no row names fails with EPERM.
pub(super) const PROFILE: &[Row] = &[
    // What programs need and the kernel guards by itself.
    row(
        All,
        Allow,
        "accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 \
            clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
            clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 \
            epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old \
            eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate \
            fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync \
            fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat fstatat64 fstatfs fstatfs64 \
            fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat \
            get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 \
            getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority \
            getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt \
            gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 \
            inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit \
            ioctl ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self \
            lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr _llseek \
            lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret \
            mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify \
            mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal \
            msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat \
            _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free \
            pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 \
            pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom \
            recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2 \
            restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn \
            rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max \
            sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler \
            sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
            sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send \
            sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid \
            setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority \
            setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid \
            setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd \
            signalfd4 sigprocmask sigreturn socketpair splice stat stat64 statfs statfs64 statmount statx symlink \
            symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun \
            timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime \
            timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask \
            uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid \
            waitpid write writev",
    ),
    // Debuggers. Safe since Linux 4.8, where a tracer cannot get around the filter any more.
    row(All, Allow, "process_vm_readv process_vm_writev ptrace"),
    // Architectures' own.
    row(
        All,
        Allow,
        "arch_prctl modify_ldt arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls",
    ),
    // The address families that containers use. Not among them: AF_ALG (38, CVE-2026-31431), AF_VSOCK (40, reaches the
    // hypervisor past every network namespace), and the dead ones (DECnet, Econet, ATM SVC, IrDA, WANPIPE, IUCV, CAIF).
    row(
        All,
        AllowIfIn(0, &[(0, 11), (13, 18), (21, 22), (24, 24), (26, 33), (35, 36), (39, 39), (41, 45)]),
        "socket",
    ),
    // ENOSYS rather than EPERM: a C library that tries it first falls back.
    row(All, Fail(Errno::NOSYS), "socketcall"),
    // PER_LINUX, PER_LINUX32, UNAME26 with each, and the question what is set.
    row(
        All,
        AllowIfIn(0, &[(0, 0), (8, 8), (0x2_0000, 0x2_0000), (0x2_0008, 0x2_0008), (u32::MAX, u32::MAX)]),
        "personality",
    ),
    // Threads and processes, but no new namespace: CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}.
    row(Without(Cap::CAP_SYS_ADMIN), AllowIfClear(0, 0x7e02_0000), "clone"),
    // Its flags are behind a pointer, so it is refused whole; glibc falls back to clone on ENOSYS alone.
    row(Without(Cap::CAP_SYS_ADMIN), Fail(Errno::NOSYS), "clone3"),
    row(
        With(Cap::CAP_SYS_ADMIN),
        Allow,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
            lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl \
            quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    row(With(Cap::CAP_DAC_READ_SEARCH), Allow, "open_by_handle_at"),
    row(With(Cap::CAP_SYS_BOOT), Allow, "reboot"),
    row(With(Cap::CAP_SYS_CHROOT), Allow, "chroot"),
    row(With(Cap::CAP_SYS_MODULE), Allow, "delete_module init_module finit_module"),
    row(With(Cap::CAP_SYS_PACCT), Allow, "acct"),
    row(With(Cap::CAP_SYS_PTRACE), Allow, "kcmp pidfd_getfd process_madvise"),
    row(With(Cap::CAP_SYS_RAWIO), Allow, "iopl ioperm"),
    row(With(Cap::CAP_SYS_TIME), Allow, "settimeofday stime clock_settime clock_settime64"),
    row(With(Cap::CAP_SYS_TTY_CONFIG), Allow, "vhangup"),
    row(With(Cap::CAP_SYS_NICE), Allow, "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    row(With(Cap::CAP_SYSLOG), Allow, "syslog"),
    row(With(Cap::CAP_BPF), Allow, "bpf"),
    row(With(Cap::CAP_PERFMON), Allow, "perf_event_open"),
];
