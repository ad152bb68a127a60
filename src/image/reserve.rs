//! Keeps a reserve free on the store's filesystem.
//!
//! A small blob can unpack to any number of bytes and files, and a filesystem without free blocks or inodes stops the whole host.
//! So every write (bytes, directories, links) leaves a hundredth of both free. Filesystems without a fixed number of inodes
//! (btrfs, xfs with dynamic inodes) report 0 inodes; for them only blocks count.

use super::store::full;
use crate::error::{Code, Error, Result};
use rustix::{
    fd::AsFd,
    fs::{StatVfs, fstatvfs},
};

/// The reserve is one in this many blocks and inodes.
const SHARE: u64 = 100;
/// The most bytes to write between two checks of the filesystem.
const MOST_BYTES: u64 = 64 << 20;
/// The most files to make between two checks.
const MOST_FILES: u64 = 4096;
/// A writer may take one part in this many of the free space above the reserve before it checks again. At most
/// [`super::MAX_WORKERS`] writers run at a time, so together they take less than the free space.
const STEP: u64 = 32;
/// The cost of a name, an inode or an attribute besides its content: a block.
const BLOCK: u64 = 4096;

/// Counts what one writer takes, and checks the filesystem from time to time.
#[derive(Debug, Default)]
pub struct Reserve {
    bytes: u64,
    files: u64,
}

/// Free space above the reserve in bytes, and in inodes if their number is fixed.
pub fn room(space: &StatVfs) -> (u64, Option<u64>) {
    let bytes = space.f_bavail.saturating_sub(space.f_blocks / SHARE).saturating_mul(space.f_frsize);
    let files = (space.f_files > 0).then(|| space.f_favail.saturating_sub(space.f_files / SHARE));
    (bytes, files)
}

impl Reserve {
    /// Must be called before each write to this filesystem, with the bytes of content and the number of new files.
    ///
    /// # Errors
    /// [`Code::NoSpace`] if the write would use the reserve.
    pub fn take(&mut self, filesystem: impl AsFd, bytes: u64, files: u64) -> Result<()> {
        let bytes = bytes.saturating_add(files.saturating_mul(BLOCK));
        if bytes <= self.bytes && files <= self.files {
            self.bytes -= bytes;
            self.files -= files;
            return Ok(());
        }
        let space = fstatvfs(filesystem).map_err(|errno| {
            Error::new(Code::Store, "the store's filesystem cannot be measured")
                .cause(errno)
                .fix("check it with df, or name a directory on another filesystem in GPURUN_STORE")
        })?;
        let (free, inodes) = room(&space);
        if free < bytes {
            return Err(full().cause("less than a hundredth of it would be free"));
        }
        if inodes.is_some_and(|inodes| inodes < files) {
            return Err(full().cause("less than a hundredth of its inodes would be free (df -i)"));
        }
        self.bytes = MOST_BYTES.min((free - bytes) / STEP);
        self.files = MOST_FILES.min(inodes.map_or(u64::MAX, |inodes| (inodes - files) / STEP));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(free: u64, inodes: u64) -> StatVfs {
        let dir = tempfile::tempdir().unwrap();
        let mut space = rustix::fs::statvfs(dir.path()).unwrap();
        (space.f_frsize, space.f_blocks, space.f_bavail) = (4096, 1000, free);
        (space.f_files, space.f_favail) = (inodes * 2, inodes);
        space
    }

    #[test]
    fn a_hundredth_of_blocks_and_inodes_is_reserved() {
        assert_eq!(room(&space(9, 1)), (0, Some(1)));
        assert_eq!(room(&space(11, 0)), (4096, None), "no fixed number of inodes");
        assert_eq!(room(&space(1000, 1000)).1, Some(980));
    }
}
