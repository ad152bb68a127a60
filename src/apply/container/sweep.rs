//! Removes leftovers of killed launchers and killed pulls while a container runs.
//!
//! A start does not wait for the removal, because a killed container may have written 100,000 files. When the command runs,
//! the launcher checks a few entries of the store, and if one is stale it forks a sweeper of low priority. The sweeper ends
//! with the launcher, even in the middle of its work, and the next sweeper continues. The launcher never waits for it.
//!
//! Each store has at most one sweeper, which holds an exclusive flock(2) on the store's `scratch`. Lock order: `scratch`,
//! then one entry at a time, both without waiting.
//!
//! An entry is removed only if it has the store's mark, its name is a container id, and it holds nothing but files that a launcher
//! makes.

use super::{
    cgroup,
    scratch::{CGROUP_PARENT, Scratch, UPPER, VOLUMES, WORK, remove_tree},
    user_namespace::IdMap,
};
use crate::{
    image::{ScratchDir, clean_tmp, is_marked, tree},
    regular_file::{self, look_at},
    sys::process::{self, Clone},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, flock, fstat, openat, statat},
    process::Signal,
};
use std::{
    ffi::{CStr, CString},
    io::Read,
    path::{Component, PathBuf},
    time::Duration,
};

/// How many entries the launcher checks. Where there are more, each start begins at another one.
const LOOKS: usize = 32;
/// A younger directory may belong to a launcher that has not locked it yet; and a sweeper of low priority must not hold a
/// lock that a start waits for.
const YOUNG: Duration = Duration::from_secs(1);
/// How often a sweeper checks again for entries that were too young.
const ROUNDS: u32 = 4;

impl Scratch {
    /// Looks for leftovers, and forks a sweeper to remove them. Failures are ignored, because the next start tries again.
    pub fn sweep_beside(&self) {
        if let Some(lock) = lock(&self.all)
            && let Err(error) = sweep_in_child(&self.all, &lock, self.id_map.as_ref())
        {
            tracing::debug!(%error, "leftovers stay for the next start");
        }
    }
}

/// The lock of the store's sweeper, if it is free and there are leftovers.
fn lock(all: &ScratchDir) -> Option<OwnedFd> {
    let own = openat(&all.directory, c".", tree::DIRECTORY, Mode::empty()).ok()?;
    flock(&own, FlockOperation::NonBlockingLockExclusive).ok()?;
    let start = usize::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_nsec);
    let start = start.unwrap_or_default();
    let stale = |directory, is_ours| has_stale(directory, is_ours, start);
    (stale(&own, is_id) || stale(&all.temporary, |name| !name.to_bytes().ends_with(b".lock"))).then_some(own)
}

/// Whether one of the entries is stale, of the [`LOOKS`] that follow the one with number `start`: entries that are in use or not
/// gpurun's must not hide the others for ever.
fn has_stale(directory: &OwnedFd, is_ours: fn(&CStr) -> bool, start: usize) -> bool {
    let names: Vec<CString> = names(directory).filter(|name| is_ours(name)).collect();
    let first = start.checked_rem(names.len()).unwrap_or_default();
    let is_stale = |name: &CString| {
        statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_marked(&stat))
            && tree::lock_if_free(directory, name).is_some()
    };
    names.iter().cycle().skip(first).take(LOOKS.min(names.len())).any(is_stale)
}

fn sweep_in_child(all: &ScratchDir, lock: &OwnedFd, id_map: Option<&IdMap>) -> std::io::Result<()> {
    let launcher = rustix::process::getpid();
    match process::clone_into(0, None)? {
        Clone::Parent(..) => Ok(()),
        Clone::Child => {
            let prepared = || -> rustix::io::Result<()> {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(launcher) {
                    return Err(rustix::io::Errno::SRCH);
                }
                // A reader of the container's output waits until every writer has closed it.
                let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
                rustix::stdio::dup2_stdin(&null)?;
                rustix::stdio::dup2_stdout(&null)?;
                rustix::stdio::dup2_stderr(&null)?;
                rustix::process::nice(19)?;
                Ok(())
            };
            let mut kept = [lock.as_fd(), all.directory.as_fd(), all.temporary.as_fd()];
            if prepared().is_ok() && process::close_others(&mut kept).is_ok() {
                sweep(all, id_map);
            }
            process::exit_now(0)
        }
    }
}

/// Removes stale entries, and waits for entries that are too young to judge.
fn sweep(all: &ScratchDir, id_map: Option<&IdMap>) {
    for _ in 0..ROUNDS {
        let mut young = false;
        for name in names(&all.directory).filter(|name| is_id(name)) {
            if is_young(&all.directory, &name) {
                young = true;
            } else if let Some(directory) = tree::lock_if_free(&all.directory, &name)
                && fstat(&directory).is_ok_and(|stat| is_marked(&stat))
                && is_scratch(&directory)
            {
                // Failures are left to the next sweeper.
                let _ = cgroup::Cgroup::remove_stale(
                    &name.to_string_lossy(),
                    cgroup_parent(&directory).as_deref(),
                )
                .map(|()| remove_tree(&all.directory, &name, id_map));
            }
        }
        let _ = clean_tmp(&all.temporary);
        if !young {
            return;
        }
        std::thread::sleep(YOUNG);
    }
}

fn names(directory: &OwnedFd) -> impl Iterator<Item = CString> + use<> {
    let entries = Dir::read_from(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_owned())
}

/// Whether the name is a container id: 12 hexadecimal digits.
fn is_id(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.len() == 12 && name.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a launcher made every top-level entry of the directory.
fn is_scratch(directory: &OwnedFd) -> bool {
    names(directory).all(|name| {
        let name = name.to_bytes();
        let made = [UPPER, WORK, VOLUMES, tree::LIFTED].iter().any(|start| {
            name == start.as_bytes()
                || name
                    .strip_prefix(start.as_bytes())
                    .is_some_and(|rest| rest.starts_with(b"-") || *start == tree::LIFTED)
        });
        matches!(name, b"." | b"..") || name == CGROUP_PARENT.as_bytes() || made
    })
}

/// The `--cgroup-parent` that the launcher recorded in this directory.
fn cgroup_parent(directory: &OwnedFd) -> Option<PathBuf> {
    let (found, _) = look_at(directory, CGROUP_PARENT).ok()?;
    let (file, _) = regular_file::open(&found).ok()?;
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).ok()?;
    // Written by `Limits::parent`: relative, and without "..".
    let path = PathBuf::from(text);
    path.components().all(|part| matches!(part, Component::Normal(_))).then_some(path)
}

fn is_young(directory: &OwnedFd, name: &CStr) -> bool {
    let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { return false };
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
    // After the clock was set back, an entry from the future counts as old.
    (0..=i64::try_from(YOUNG.as_secs()).unwrap_or(1)).contains(&(now - stat.st_ctime))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    fn area(path: &Path) -> ScratchDir {
        for name in ["scratch", "tmp"] {
            let _ = fs::create_dir(path.join(name));
        }
        let open = |name| crate::apply::rootfs::open_host_directory(&path.join(name)).unwrap();
        ScratchDir { path: path.join("scratch"), directory: open("scratch"), temporary: open("tmp") }
    }

    /// Makes directories, the first of each path with the mark.
    fn make(path: &Path, names: &[&str]) {
        for name in names {
            fs::create_dir_all(path.join(name)).unwrap();
            let top = path.join(name.split('/').next().unwrap());
            fs::set_permissions(top, fs::Permissions::from_mode(0o1700)).unwrap();
        }
    }

    #[test]
    fn only_stale_container_directories_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let all = area(dir.path());
        make(
            &all.path,
            &[
                "0123456789ab/upper/x/y",
                "0123456789ab/work/work",
                "00000000aaaa/.lifted-7",
                "00000000bbbb",
                "00000000ffff/volumes/0",
            ],
        );
        make(
            &all.path,
            &[
                "00000000cccc/upper-a1",
                "notes/upper",
                "0123456789AB/upper",
                "cafecafecafe/upper",
                "cafecafecafe/own",
            ],
        );
        fs::create_dir_all(all.path.join("0123456789ac/upper")).unwrap();
        let running = Scratch::create(&all, "00000000dddd", None).unwrap();
        std::thread::sleep(2 * YOUNG);
        let young = "00000000eeee";
        make(&all.path, &[young]);
        assert!(is_young(&all.directory, &CString::new(young).unwrap()));
        assert!(lock(&all).is_some(), "there is something to sweep");
        let other = openat(&all.directory, c".", tree::DIRECTORY, Mode::empty()).unwrap();
        flock(&other, FlockOperation::LockExclusive).unwrap();
        assert!(lock(&all).is_none(), "one sweeper at a time");
        drop(other);
        sweep(&all, None);
        let mut left: Vec<_> = fs::read_dir(&all.path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["00000000dddd", "0123456789AB", "0123456789ac", "cafecafecafe", "notes"]);
        running.remove().unwrap();
    }

    #[test]
    fn entries_that_stay_do_not_hide_a_stale_one() {
        let dir = tempfile::tempdir().unwrap();
        let all = area(dir.path());
        let running: Vec<Scratch> =
            (0..80).map(|n| Scratch::create(&all, &format!("{n:012x}"), None).unwrap()).collect();
        for n in 0..80 {
            fs::create_dir_all(all.path.join(format!("f{n:011x}/upper"))).unwrap();
        }
        let finds = || (0..200).filter(|&start| has_stale(&all.directory, is_id, start)).count();
        assert_eq!(finds(), 0);
        make(&all.path, &["00000000aaaa/upper"]);
        assert!(finds() > LOOKS / 2, "{}", finds());
        for one in running {
            one.remove().unwrap();
        }
    }
}
