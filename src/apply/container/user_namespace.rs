//! A user namespace's ids, and work that must be done inside one.

use super::{channel::Channel, process_files};
use crate::{
    error::{Code, Error, OrFail, Result},
    sys::process::{self, Clone},
};
use rustix::{
    fd::AsFd,
    process::{WaitId, WaitIdOptions},
};

/// How the container's ids are called on the host: ranges as in uid_map (user_namespaces(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// inside, outside, count
    pub uids: Vec<(u32, u32, u32)>,
    /// inside, outside, count
    pub gids: Vec<(u32, u32, u32)>,
    /// Whether newuidmap and newgidmap write them; one id each a process may write itself.
    pub helpers: bool,
}

/// Writes uid_map and gid_map (user_namespaces(7)), with the host's setuid helpers where there is more than one id.
pub fn write_id_map(pid: i32, map: &IdMap) -> Result<()> {
    let failed = || "the container's user namespace cannot be given its ids";
    if map.helpers {
        for (helper, ranges) in [("/usr/bin/newuidmap", &map.uids), ("/usr/bin/newgidmap", &map.gids)] {
            let numbers = ranges
                .iter()
                .flat_map(|&(inside, outside, count)| [inside, outside, count])
                .map(|n| n.to_string());
            let output = std::process::Command::new(helper)
                .arg(pid.to_string())
                .args(numbers)
                .output()
                .or_fail(Code::Namespace, failed)?;
            if !output.status.success() {
                return Err(Error::new(Code::Namespace, failed())
                    .cause(String::from_utf8_lossy(&output.stderr).trim())
                    .fix("correct the caller's lines in /etc/subuid and /etc/subgid, or take them out: gpurun then maps one id"));
            }
        }
        return Ok(());
    }
    let lines = |ranges: &[(u32, u32, u32)]| {
        ranges.iter().map(|(i, o, n)| format!("{i} {o} {n}\n")).collect::<String>()
    };
    let write = |name: &str, content: &str| std::fs::write(format!("/proc/{pid}/{name}"), content);
    // Since Linux 3.19 an ordinary user may write gid_map only after giving up setgroups(2).
    write("setgroups", "deny")
        .and_then(|()| write("uid_map", &lines(&map.uids)))
        .and_then(|()| write("gid_map", &lines(&map.gids)))
        .or_fail(Code::Namespace, failed)
        .map_err(|error| {
            if process_files::is_own_proc() {
                return error;
            }
            error
                .cause("/proc shows another pid namespace than that of gpurun")
                .fix("mount a /proc for it: unshare --pid --fork --mount-proc gpurun …")
        })
}

/// Runs `work` in a child whose user namespace has these ids, with every capability over them; whether it succeeded.
/// Only root and this namespace can remove files of the caller's subordinate ids.
pub fn run_inside(map: &IdMap, work: impl FnOnce() -> bool) -> Result<bool> {
    let (ours, theirs) = Channel::pair()?;
    let flags = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    match process::clone_into(flags, None).or_fail(Code::Namespace, || "no user namespace can be made")? {
        Clone::Child => {
            drop(ours);
            process::exit_now(i32::from(theirs.wait().is_err() || !work()));
        }
        Clone::Parent(pidfd, pid) => {
            // Should the ids be refused, the child hears nothing and ends with a failure.
            let told = write_id_map(pid, map).and_then(|()| ours.go());
            drop((ours, theirs));
            let status = rustix::io::retry_on_intr(|| {
                rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
            })
            .or_fail(Code::Internal, || "a child cannot be waited for")?;
            told.map(|()| status.is_some_and(|status| status.exit_status() == Some(0)))
        }
    }
}
