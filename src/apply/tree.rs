//! Small directories of ours on the host, which containers get as one mount each: mount points, links and little files that
//! need no place in the container's own root then.
//!
//! A tree is named by what is in it, made once, and shared by every container that wants the same. It is never changed and
//! never removed while the host runs: removing a mount point takes the mount away from a container that has it. In /run it
//! has some dozens of inodes for each version of the driver.

use super::rootfs::{Root, open_host_directory};
use crate::error::{Code, Error, Result};
use rustix::{
    fs::{CWD, fstat},
    io::Errno,
    process::geteuid,
};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    ffi::CString,
    fmt::Write,
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
};

/// What is in it, by its path below the tree.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, Entry>);

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    File(Vec<u8>),
    Link(PathBuf),
    Directory,
}

impl Tree {
    /// Adds a file; an empty one is a mount point.
    pub fn file(&mut self, path: &Path, content: &[u8]) {
        self.0.insert(path.into(), Entry::File(content.into()));
    }

    /// Adds an empty directory: a mount point.
    pub fn directory(&mut self, path: &Path) {
        self.0.insert(path.into(), Entry::Directory);
    }

    /// Adds a link.
    pub fn link(&mut self, path: &Path, target: &Path) {
        self.0.insert(path.into(), Entry::Link(target.into()));
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where it is below `state_dir`, made there if it was not.
    ///
    /// # Errors
    /// [`Code::StateDir`] when it cannot be made, or when others could have written what is there.
    pub fn place(&self, state_dir: &Path) -> Result<PathBuf> {
        let trees = state_dir.join("trees");
        let place = trees.join(self.name());
        match trusted(&place) {
            Err(Errno::NOENT) => {}
            Ok(true) if trusted(&trees) == Ok(true) && trusted(state_dir) == Ok(true) => return Ok(place),
            // The outermost directory that is wrong: what is below it is no safer.
            result => {
                let wrong = [state_dir, &trees].into_iter().find(|path| trusted(path) != Ok(true));
                return Err(match wrong {
                    Some(path) => untrusted(path, state_dir, trusted(path).err()),
                    None => untrusted(&place, state_dir, result.err()),
                });
            }
        }
        for directory in [state_dir, &trees] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .map_err(|error| not_made(directory, &error))?;
            // Checked before anything is made in it: another user may have put a link there.
            match trusted(directory) {
                Ok(true) => {}
                result => return Err(untrusted(directory, state_dir, result.err())),
            }
        }
        // Only a directory that this call has made is removed: an existing one belongs to another process.
        let name = new_name()?;
        let new = trees.join(&name);
        std::fs::DirBuilder::new().mode(0o755).create(&new).map_err(|error| not_made(&new, &error))?;
        let made = open_host_directory(&new).map_err(|errno| not_made(&new, &errno)).and_then(|directory| {
            self.fill(&Root::new(directory))?;
            match std::fs::rename(&new, &place) {
                // Another start made it meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOTEMPTY)) => {
                    Ok(false)
                }
                result => result.map(|()| true).map_err(|error| not_made(&place, &error)),
            }
        });
        if !matches!(made, Ok(true)) {
            let name = CString::new(name).unwrap_or_default();
            let removed =
                open_host_directory(&trees).and_then(|trees| crate::image::tree::remove(&trees, &name));
            tracing::debug!(?removed, path = %new.display(), "removed a tree that is not needed");
        }
        made.map(|_| place)
    }

    /// Where a file with this content is, made as [`Self::place`] does.
    ///
    /// Binding a file of ours needs one that is mounted somewhere: before Linux 6.15 open_tree(2) copies nothing of a mount that
    /// is attached nowhere.
    ///
    /// # Errors
    /// As for [`Self::place`].
    pub fn place_file(content: &[u8], state_dir: &Path) -> Result<PathBuf> {
        let name = Path::new("content");
        let mut tree = Self::default();
        tree.file(name, content);
        Ok(tree.place(state_dir)?.join(name))
    }

    fn fill(&self, root: &Root) -> Result<()> {
        for (path, entry) in &self.0 {
            let path = Path::new("/").join(path);
            match entry {
                Entry::File(content) => root.write(&path, content, 0o444)?,
                Entry::Link(target) => root.symlink(&path, target)?,
                Entry::Directory => drop(root.directory(&path)?),
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        let mut hash = Sha256::new();
        for (path, entry) in &self.0 {
            let (kind, content) = match entry {
                Entry::File(content) => ("file", content.as_slice()),
                Entry::Link(target) => ("link", target.as_os_str().as_bytes()),
                Entry::Directory => ("directory", &[][..]),
            };
            let path = path.as_os_str().as_bytes();
            // Lengths first: no two trees are written the same.
            hash.update(format!("{kind} {} {}\n", path.len(), content.len()));
            hash.update(path);
            hash.update(content);
        }
        let mut name = String::new();
        for byte in hash.finalize().iter().take(16) {
            let _ = write!(name, "{byte:02x}");
        }
        name
    }
}

/// A name for a tree that is being made: the process, and 64 random bits.
fn new_name() -> Result<String> {
    let mut bytes = [0_u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| not_made(Path::new("a name"), &errno))?;
    Ok(format!(".new-{}-{:016x}", std::process::id(), u64::from_le_bytes(bytes)))
}

fn not_made(path: &Path, cause: &dyn std::fmt::Display) -> Error {
    Error::new(Code::StateDir, format!("{} cannot be made", path.display())).cause(cause).fix(
        "name a directory that you may write in GPURUN_STATE_DIR, or make room on its filesystem (df, df -i)",
    )
}

/// Whether a directory belongs to this user and no other user may write to it.
fn trusted(path: &Path) -> rustix::io::Result<bool> {
    let fd = rustix::fs::openat(
        CWD,
        path,
        rustix::fs::OFlags::PATH
            | rustix::fs::OFlags::DIRECTORY
            | rustix::fs::OFlags::NOFOLLOW
            | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let stat = fstat(&fd)?;
    Ok(stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o022 == 0)
}

/// `path` is the state directory, which the user may have named, or one that gpurun made below it.
fn untrusted(path: &Path, state_dir: &Path, errno: Option<Errno>) -> Error {
    let error = Error::new(Code::StateDir, format!("{} cannot be used", path.display()));
    let error = match errno {
        Some(errno) => error.cause(errno),
        None => error.cause("it belongs to another user, or another user may write to it"),
    };
    error.fix(if path == state_dir {
        "name a directory of your own in GPURUN_STATE_DIR, which no other user may write".to_owned()
    } else {
        format!(
            "remove {}: gpurun makes it again; or name another directory in GPURUN_STATE_DIR",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn tree(link: &str) -> Tree {
        let mut tree = Tree::default();
        tree.file(Path::new("lib64/libcuda.so.550"), b"");
        tree.link(Path::new("lib64/libcuda.so.1"), Path::new(link));
        tree
    }

    #[test]
    fn a_tree_is_made_once_and_another_one_beside_it() {
        let state = tempfile::tempdir().unwrap();
        let state_dir = state.path().join("deep/state");
        let place = tree("libcuda.so.550").place(&state_dir).unwrap();
        assert_eq!(fs::read(place.join("lib64/libcuda.so.1")).unwrap(), b"");
        let before = fs::metadata(&place).unwrap().modified().unwrap();
        assert_eq!(tree("libcuda.so.550").place(&state_dir).unwrap(), place);
        assert_eq!(fs::metadata(&place).unwrap().modified().unwrap(), before);
        let other = tree("libcuda.so.535").place(&state_dir).unwrap();
        assert_eq!(fs::read_link(other.join("lib64/libcuda.so.1")).unwrap(), Path::new("libcuda.so.535"));
        assert_eq!(fs::read_dir(state_dir.join("trees")).unwrap().count(), 2, "nothing is left over");
    }

    #[test]
    fn files_of_others_are_not_removed() {
        let state = tempfile::tempdir().unwrap();
        let foreign = state.path().join("trees").join(format!(".new-{}", std::process::id()));
        fs::create_dir_all(&foreign).unwrap();
        fs::write(foreign.join("file"), "x").unwrap();
        tree("x").place(state.path()).unwrap();
        assert_eq!(fs::read(foreign.join("file")).unwrap(), b"x");
    }

    #[test]
    fn what_others_could_have_written_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let place = tree("x").place(state.path()).unwrap();
        for path in [&place, &state.path().join("trees"), &state.path().to_path_buf()] {
            let mode = fs::metadata(path).unwrap().permissions();
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
            assert_eq!(
                tree("x").place(state.path()).unwrap_err().code(),
                Code::StateDir,
                "{}",
                path.display()
            );
            fs::set_permissions(path, mode).unwrap();
        }
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = tree("x").place(state.path()).unwrap_err();
        assert!(!error.fix_line().contains("remove"), "{error}");
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let aside = state.path().join("aside");
        fs::rename(&place, &aside).unwrap();
        std::os::unix::fs::symlink(&aside, &place).unwrap();
        assert!(tree("x").place(state.path()).is_err(), "a link");
    }
}
