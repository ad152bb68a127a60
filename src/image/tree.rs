//! Measures, locks and removes trees of image content of any depth. No link is followed, and no mount is crossed.

use crate::regular_file::{look_at, reopen};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{
        AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags, Stat, chmodat,
        fchmod, flock, fstat, openat, openat2, renameat_with, statat, unlinkat,
    },
    io::{Errno, Result},
};
use std::{
    collections::HashSet,
    ffi::{CStr, CString},
};

/// How a directory of image content is opened: as itself, never through a link.
pub const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Prefix of directories that [`remove`] has moved up; a number follows.
pub const LIFTED: &str = ".lifted-";

/// Takes an exclusive lock (flock(2)) on a regular file or a directory; `None` if another process holds it, if the name no longer
/// leads to the locked file, or for an object of another kind.
pub fn lock_if_free(parent: &OwnedFd, name: &CStr) -> Option<OwnedFd> {
    let (found, stat) = look_at(parent, name).ok()?;
    if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::Directory | FileType::RegularFile) {
        return None;
    }
    let file = reopen(&found, OFlags::RDONLY).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    is_named(parent, name, &file).then_some(file)
}

/// Whether the name still leads to the file: its owner may have finished between open and lock.
pub fn is_named(parent: &OwnedFd, name: &CStr, file: &OwnedFd) -> bool {
    let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
    let named = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map(identity);
    named.is_ok() && named == fstat(file).map(identity)
}

/// What a directory and all that is in it take on the disk, in bytes; a file of several names once. No name in it may be longer
/// than a path can be, as those of layers are not.
///
/// # Errors
/// The kernel's.
pub fn usage(parent: impl AsFd, name: &str) -> Result<u64> {
    let mut total = 0;
    let mut seen = HashSet::new();
    let mut todo = vec![CString::new(name).map_err(|_| Errno::INVAL)?];
    while let Some(path) = todo.pop() {
        let directory = openat(&parent, &path, DIRECTORY, Mode::empty())?;
        total += blocks(&fstat(&directory)?);
        each(&directory, |child| {
            let stat = statat(&directory, child, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(stat.st_mode).is_dir() {
                let path = [path.to_bytes(), b"/", child.to_bytes()].concat();
                todo.push(CString::new(path).map_err(|_| Errno::INVAL)?);
            } else if stat.st_nlink == 1 || seen.insert((stat.st_dev, stat.st_ino)) {
                total += blocks(&stat);
            }
            Ok(())
        })?;
    }
    Ok(total)
}

/// stat(2) counts in units of 512 bytes, whatever the filesystem's.
fn blocks(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

/// Removes a file or a directory with its content. It is not an error if it does not exist. No link is followed.
///
/// Directories can be nested deeper than a stack or a path allows. Instead of descending, the contents of each directory are moved
/// up to the top one, once, so two descriptors are enough. Missing permissions are added to directories of the caller. No other
/// process may change the tree. Mounts in the tree are kept, with their content.
///
/// # Errors
/// Errors of the kernel: EACCES and EPERM for files of another user, EXDEV for a mount in the tree.
pub fn remove(parent: impl AsFd, name: &CStr) -> Result<()> {
    match unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    empty(&parent, name)?;
    unlinkat(&parent, name, AtFlags::REMOVEDIR)
}

/// Removes all that is in a directory, as [`remove`] does.
pub fn empty(parent: impl AsFd, name: &CStr) -> Result<()> {
    empty_open(&open(&parent, name)?)
}

/// Removes all that is in an open directory, as [`remove`] does.
pub fn empty_open(top: &OwnedFd) -> Result<()> {
    let mut moved = 0;
    loop {
        let mut empty = true;
        each(top, |child| {
            empty = false;
            remove_or_lift(top, child, &mut moved)
        })?;
        if empty {
            return Ok(());
        }
    }
}

fn remove_or_lift(top: &OwnedFd, name: &CStr, moved: &mut u64) -> Result<()> {
    match unlinkat(top, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        done => return done,
    }
    match unlinkat(top, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        done => return done,
    }
    let inner = open(top, name)?;
    each(&inner, |child| match unlinkat(&inner, child, AtFlags::empty()) {
        Err(Errno::ISDIR) => loop {
            *moved += 1;
            match renameat_with(&inner, child, top, format!("{LIFTED}{moved}"), RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                // A directory that moves has its `..` written.
                Err(Errno::ACCESS) => {
                    open(&inner, child)?;
                }
                done => break done,
            }
        },
        done => done,
    })
}

/// Opens a directory that its owner may read, enter and change from then on.
fn open(parent: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    let open = || {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        rustix::io::retry_on_intr(|| openat2(&parent, name, DIRECTORY, Mode::empty(), resolve))
    };
    let directory = match open() {
        Err(Errno::ACCESS) => {
            chmodat(&parent, name, Mode::RWXU, AtFlags::empty())?;
            open()?
        }
        opened => opened?,
    };
    if !Mode::from_raw_mode(fstat(&directory)?.st_mode).contains(Mode::RWXU) {
        fchmod(&directory, Mode::RWXU)?;
    }
    Ok(directory)
}

fn each(directory: &OwnedFd, mut visit: impl FnMut(&CStr) -> Result<()>) -> Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            visit(entry.file_name())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, mkdirat};

    #[test]
    fn mounts_in_a_tree_are_kept() {
        use rustix::mount::{UnmountFlags, mount_bind, unmount};
        let directory = tempfile::tempdir().unwrap();
        let (tree, kept) = (directory.path().join("t/a/b"), directory.path().join("kept"));
        std::fs::create_dir_all(&tree).unwrap();
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), "x").unwrap();
        if mount_bind(&kept, &tree).is_err() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let top = openat(CWD, directory.path(), DIRECTORY, Mode::empty()).unwrap();
        let removed = remove(&top, c"t");
        unmount(&tree, UnmountFlags::DETACH).unwrap();
        assert!(removed.is_err());
        assert!(kept.join("file").exists());
        remove(&top, c"t").unwrap();
    }

    #[test]
    fn a_tree_deeper_than_a_path_goes_and_links_are_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let top = openat(CWD, directory.path(), DIRECTORY, Mode::empty()).unwrap();
        mkdirat(&top, "t", Mode::RWXU).unwrap();
        let mut current = openat(&top, "t", DIRECTORY, Mode::empty()).unwrap();
        for depth in 0..3000 {
            rustix::fs::symlinkat(outside.path(), &current, "link").unwrap();
            mkdirat(&current, "closed", Mode::empty()).unwrap();
            mkdirat(&current, ".lifted-3", Mode::RWXU).unwrap();
            mkdirat(&current, "d", Mode::RWXU).unwrap();
            current = openat(&current, "d", DIRECTORY, Mode::empty())
                .unwrap_or_else(|error| panic!("{depth}: {error}"));
            fchmod(&current, if depth % 2 == 0 { Mode::RWXU } else { Mode::XUSR | Mode::WUSR }).unwrap();
        }
        remove(&top, c"t").unwrap();
        remove(&top, c"t").unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(outside.path().join("kept").exists());
    }
}
