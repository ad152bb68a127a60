//! The directory of a store in which containers have what they write into their roots.

use super::tree;
use crate::error::{Code, Error, Result};
use rustix::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// `scratch` of a store, opened once with the store; and `tmp` beside it, for what sweeps both.
#[derive(Debug)]
pub struct ScratchDir {
    /// Where it is. For mounts, which are made in another mount namespace, and for messages.
    pub path: PathBuf,
    /// Its descriptor, by which everything in it is made and removed.
    pub directory: OwnedFd,
    /// The store's `tmp`.
    pub temporary: OwnedFd,
}

impl ScratchDir {
    /// With descriptors of its own.
    ///
    /// # Errors
    /// The kernel's, out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let (directory, temporary) = (self.directory.try_clone()?, self.temporary.try_clone()?);
        Ok(Self { path: self.path.clone(), directory, temporary })
    }

    /// The container's own directory, opened by path in the mount namespace of the calling process: nothing can be mounted on a
    /// descriptor of another one. It must be the directory that was made.
    ///
    /// # Errors
    /// [`Code::Mount`] where it is not.
    pub fn open_by_path(&self, id: &str) -> Result<(PathBuf, OwnedFd)> {
        let path = self.path.join(id);
        let failed = |cause: &dyn std::fmt::Display| {
            Error::new(Code::Mount, format!("{} cannot be opened", path.display()))
                .cause(cause)
                .fix("name a directory in GPURUN_STORE that only you can rename or replace")
        };
        let name = std::ffi::CString::new(id).map_err(|error| failed(&error))?;
        let opened =
            rustix::fs::openat(rustix::fs::CWD, Path::new(&path), tree::DIRECTORY, rustix::fs::Mode::empty())
                .map_err(|errno| failed(&errno))?;
        if !tree::is_named(&self.directory, &name, &opened) {
            return Err(failed(&"the store was replaced by another directory while the container started"));
        }
        Ok((path, opened))
    }
}
