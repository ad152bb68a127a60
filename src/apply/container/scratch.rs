//! The directory that receives a container's writes.
//!
//! Every running launcher holds an exclusive flock(2) on its directory. The kernel releases the lock when the launcher ends
//! for any reason, so a directory with a free lock is stale, and [`super::sweep`] removes it. Directories are made, locked
//! and removed by the descriptor of the store, never by its path: another user could change a link in that path to redirect
//! the removal.

use super::user_namespace::{self, IdMap};
use crate::{
    error::{Code, Error, OrFail, Result},
    image::{MARKED_DIRECTORY, ScratchDir, tree},
};
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, mkdirat, openat},
    io::Errno,
};
use std::{
    ffi::CString,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

/// A directory of one container's: `upper` and `work` of its overlay, and the place where its own mount namespace mounts the root.
#[derive(Debug)]
pub struct Scratch {
    pub(super) all: ScratchDir,
    name: CString,
    lock: OwnedFd,
    /// In a launcher without root: whose files may lie here.
    pub(super) id_map: Option<IdMap>,
}

/// The file of a scratch directory with the container's `--cgroup-parent`. The container does not see it.
pub const CGROUP_PARENT: &str = "cgroup-parent";

/// The directories that are made in a scratch directory, alone or with a suffix that begins with "-". [`super::sweep`] leaves alone
/// what holds anything else.
pub const UPPER: &str = "upper";
/// The overlay's work directory, see [`UPPER`].
pub const WORK: &str = "work";
/// What is written into the image's volumes, see [`UPPER`]. A `--read-only` container has nothing else.
pub const VOLUMES: &str = "volumes";

impl Scratch {
    /// Makes the directory `id` beneath `all`.
    pub fn create(all: &ScratchDir, id: &str, id_map: Option<IdMap>) -> Result<Self> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::new(Code::Store, format!("no scratch directory can be made in {}", all.path.display()))
                .cause(cause)
                .fix("make room on the filesystem (df, df -i), or name another directory in GPURUN_STORE")
        };
        let name = CString::new(id).map_err(|error| failed(&error))?;
        let all = all.try_clone().map_err(|error| failed(&error))?;
        loop {
            mkdirat(&all.directory, &name, MARKED_DIRECTORY).map_err(|errno| failed(&errno))?;
            // A sweeper may mistake the new directory for a stale one before it is locked. Then this waits for the sweeper and makes
            // the directory again.
            match lock(&all.directory, &name) {
                Ok(lock) => return Ok(Self { all, name, lock, id_map }),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(&errno)),
            }
        }
    }

    /// Records the `--cgroup-parent`, for the sweeper that removes the cgroup if this launcher is killed.
    ///
    /// # Errors
    /// [`Code::Store`] if it cannot be written.
    pub fn remember_cgroup_parent(&self, parent: &Path) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        openat(&self.lock, CGROUP_PARENT, flags, Mode::RUSR)
            .map_err(io::Error::from)
            .and_then(|file| io::Write::write_all(&mut File::from(file), parent.as_os_str().as_bytes()))
            .or_fail(Code::Store, || "a file of the scratch directory cannot be written")
            .map_err(|error| {
                error
                    .fix("make room on the filesystem (df, df -i), or name another directory in GPURUN_STORE")
            })
    }

    /// Removes the directory. The container must be gone.
    pub fn remove(self) -> Result<()> {
        let removed = remove_tree(&self.all.directory, &self.name, self.id_map.as_ref());
        drop(self.lock);
        removed
            .or_fail(Code::Store, || {
                format!("{} cannot be removed", self.all.path.join(&*self.name.to_string_lossy()).display())
            })
            .map_err(|error| error.fix("run `gpurun prune`, which tries again"))
    }
}

/// The directory's lock; ENOENT if the directory was removed before it was locked.
fn lock(all: &OwnedFd, name: &CString) -> rustix::io::Result<OwnedFd> {
    let directory = openat(all, name, tree::DIRECTORY, Mode::empty())?;
    rustix::io::retry_on_intr(|| flock(&directory, FlockOperation::LockExclusive))?;
    if tree::is_named(all, name, &directory) { Ok(directory) } else { Err(Errno::NOENT) }
}

/// rm -rf of what a hostile process may have made. Files of the caller's subordinate ids are removed in a user namespace that
/// has these; its process ends with this one.
pub fn remove_tree(parent: &OwnedFd, name: &CString, id_map: Option<&IdMap>) -> io::Result<()> {
    match (tree::remove(parent, name), id_map) {
        (Err(Errno::ACCESS | Errno::PERM), Some(map)) if map.helpers => {
            // The directory itself stays: its parent is nothing of the namespace's.
            let inside = || {
                let with_parent =
                    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
                with_parent.is_ok() && tree::empty(parent, name).is_ok()
            };
            user_namespace::run_inside(map, inside).map_err(io::Error::other)?;
            Ok(tree::remove(parent, name)?)
        }
        (removed, _) => Ok(removed?),
    }
}
