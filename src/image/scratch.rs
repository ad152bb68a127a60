//! The directory of a store that holds the containers' writes to their roots.

use super::tree;
use crate::error::{Code, Error, Result};
use rustix::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// `scratch` of a store, opened once with the store; and `tmp`, because the sweeper cleans both.
#[derive(Debug)]
pub struct ScratchDir {
    /// The path, for messages, and for mounts, which are made in another mount namespace.
    pub path: PathBuf,
    /// The descriptor, used to make and remove everything in it.
    pub directory: OwnedFd,
    /// The store's `tmp`.
    pub temporary: OwnedFd,
}

impl ScratchDir {
    /// Duplicates the descriptors.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let (directory, temporary) = (self.directory.try_clone()?, self.temporary.try_clone()?);
        Ok(Self { path: self.path.clone(), directory, temporary })
    }

    /// Opens the container's own directory by path in the mount namespace of the calling process, because mounts on descriptors
    /// of another namespace are not allowed. Checks that it is the directory that was made.
    ///
    /// # Errors
    /// [`Code::Mount`] if it is a different directory.
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
