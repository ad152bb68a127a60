//! The processes of a container without a pid namespace of its own (`--pid host`), which outlive its first process.
//!
//! With a pid namespace the kernel kills every process when the first one ends. Without it, a container that root starts is ended
//! by its cgroup. An ordinary user's container may have no cgroup, but it has a user namespace, and no process can leave that for
//! the user namespace above. So the processes are found in /proc by their user namespace. The launcher made the namespace,
//! so it may read and kill processes of every id there (user_namespaces(7)).

use super::{cgroup::Cgroup, process_files};
use crate::sys::process;
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

/// How long processes that fork are chased.
const PATIENCE: Duration = Duration::from_secs(5);
/// A container can nest at most 32 user namespaces (user_namespaces(7)).
const DEEPEST: usize = 33;

/// What identifies these processes.
#[derive(Debug)]
pub struct Survivors {
    user_namespace: Option<OwnedFd>,
    cgroup: Option<PathBuf>,
}

impl Survivors {
    /// The processes of the container whose first process is `pid`.
    ///
    /// # Errors
    /// Errors of the system if its user namespace cannot be opened.
    pub fn of(pid: i32, has_user_namespace: bool, cgroup: Option<&Cgroup>) -> io::Result<Self> {
        let open = || {
            // Every process of the namespace that is found here is killed at the end.
            if !process_files::is_own_proc() {
                return Err(io::Error::other("/proc shows another pid namespace: unshare --mount-proc"));
            }
            let opened = rustix::fs::open(
                format!("/proc/{pid}/ns/user"),
                OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
            );
            opened.map_err(io::Error::from)
        };
        let user_namespace = has_user_namespace.then(open).transpose()?;
        Ok(Self { user_namespace, cgroup: cgroup.and_then(Cgroup::unified_path) })
    }

    /// The descriptor that [`Self::end`] needs.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.user_namespace.as_ref().map(AsFd::as_fd)
    }

    /// Kills the processes, and those that they start meanwhile.
    pub fn end(&self) {
        if let Some(cgroup) = &self.cgroup {
            Cgroup::kill(cgroup);
        }
        let Some(Ok(wanted)) = self.user_namespace.as_ref().map(rustix::fs::fstat) else { return };
        let started = Instant::now();
        while kill_each((wanted.st_dev, wanted.st_ino)) {
            if started.elapsed() > PATIENCE {
                tracing::warn!("processes of the container go on running: end them with kill -9 PID (ps -e)");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Kills each process of the user namespace and of those below it. Returns whether there was one.
fn kill_each(wanted: (u64, u64)) -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return false };
    let pids = entries.flatten().filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    let mut any = false;
    for pid in pids {
        // Opened first: if the number is reused afterwards, the signal reaches no process.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if is_in(pid, wanted) && !has_ended(&process) {
            any |= pidfd_send_signal(&process, Signal::KILL) != Err(Errno::SRCH);
        }
    }
    any
}

fn is_in(pid: Pid, wanted: (u64, u64)) -> bool {
    let path = format!("/proc/{}/ns/user", pid.as_raw_nonzero());
    let mut next = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
    for _ in 0..DEEPEST {
        let Some(namespace) = next else { return false };
        match rustix::fs::fstat(&namespace) {
            Ok(stat) if (stat.st_dev, stat.st_ino) == wanted => return true,
            // EPERM above the launcher's own.
            _ => next = process::parent_namespace(namespace.as_fd()).ok(),
        }
    }
    false
}

/// Whether the process is a zombie.
fn has_ended(process: &OwnedFd) -> bool {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
}
