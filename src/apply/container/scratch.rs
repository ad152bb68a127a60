//! Where a container's writes go, and what a launcher that was killed leaves behind.
//!
//! Every running launcher holds an exclusive flock(2) on its directory. The kernel releases it when the launcher
//! is gone, however it went; so a directory whose lock can be had belongs to nobody, and the next start removes it.

use super::{
    cgroup,
    user_namespace::{self, IdMap},
};
use crate::{
    error::{Code, OrFail, Result},
    image::tree,
};
use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::CString,
    fs, io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

/// A directory of one container's: `upper` and `work` of its overlay, and the place where its own mount namespace mounts the root.
#[derive(Debug)]
pub struct Scratch {
    /// Where it is.
    pub path: PathBuf,
    lock: OwnedFd,
    /// In a launcher without root: whose files may lie here.
    id_map: Option<IdMap>,
}

/// The file of a scratch directory with the container's `--cgroup-parent`. The container does not see it.
const CGROUP_PARENT: &str = "cgroup-parent";

impl Scratch {
    /// Makes the directory `id` beneath `all`, and removes what earlier launchers left there.
    pub fn create(all: &Path, id: &str, id_map: Option<IdMap>) -> Result<Self> {
        let failed = || format!("no scratch directory can be made in {}", all.display());
        fs::create_dir_all(all).or_fail(Code::Store, failed)?;
        sweep(all, id_map.as_ref());
        let path = all.join(id);
        loop {
            use std::os::unix::fs::DirBuilderExt;
            fs::DirBuilder::new().mode(0o700).create(&path).or_fail(Code::Store, failed)?;
            // Another launcher may take the new directory for a stale one before it is locked; then it is waited for, and
            // what it has removed is made again.
            match lock(&path, FlockOperation::LockExclusive) {
                Ok(lock) => return Ok(Self { path, lock, id_map }),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno).or_fail(Code::Store, failed),
            }
        }
    }

    /// Remembers the cgroup below which the container's is made, for the launcher that removes what this one leaves.
    ///
    /// # Errors
    /// [`Code::Store`] where it cannot be written.
    pub fn remember_cgroup_parent(&self, parent: &Path) -> Result<()> {
        fs::write(self.path.join(CGROUP_PARENT), parent.as_os_str().as_bytes())
            .or_fail(Code::Store, || format!("{} cannot be written", self.path.display()))
    }

    /// Removes the directory. The container must be gone.
    pub fn remove(self) -> Result<()> {
        let removed = remove_tree(&self.path, self.id_map.as_ref());
        drop(self.lock);
        removed.or_fail(Code::Store, || format!("{} cannot be removed", self.path.display()))
    }
}

/// The directory's lock; ENOENT if the directory is not there any more when it is had.
fn lock(path: &Path, how: FlockOperation) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&fd, how))?;
    // Whoever had it before may have removed it, and its owner made it again.
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let locked = rustix::fs::fstat(&fd).map(identity)?;
    if rustix::fs::lstat(path).map(identity)? == locked { Ok(fd) } else { Err(Errno::NOENT) }
}

/// Removes the directories and cgroups of launchers that are gone. What cannot be removed now stays for the next start.
fn sweep(all: &Path, id_map: Option<&IdMap>) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        if let Ok(_lock) = lock(&entry.path(), FlockOperation::NonBlockingLockExclusive) {
            let id = entry.file_name();
            let parent = fs::read_to_string(entry.path().join(CGROUP_PARENT)).ok().map(PathBuf::from);
            let result = cgroup::Cgroup::remove_stale(&id.to_string_lossy(), parent.as_deref())
                .map(|()| remove_tree(&entry.path(), id_map));
            tracing::debug!(id = %id.display(), ?result, "removed what a killed launcher left");
        }
    }
}

/// rm -rf of what a hostile process may have made. Files of the caller's subordinate ids are removed in a user namespace that
/// has these.
fn remove_tree(path: &Path, id_map: Option<&IdMap>) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let name = CString::new(name.as_bytes())?;
    let parent = rustix::fs::open(parent, tree::DIRECTORY, Mode::empty())?;
    match (tree::remove(&parent, &name), id_map) {
        (Err(Errno::ACCESS | Errno::PERM), Some(map)) if map.helpers => {
            // The directory itself stays: its parent is nothing of the namespace's.
            let inside = || tree::empty(&parent, &name).is_ok();
            user_namespace::run_inside(map, inside).map_err(io::Error::other)?;
            Ok(tree::remove(&parent, &name)?)
        }
        (removed, _) => Ok(removed?),
    }
}
