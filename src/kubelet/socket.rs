//! Unix sockets in directories that other programs change: the kubelet empties its directory at its start, and another plugin
//! may listen under the same name. A socket is made under a temporary name and renamed atomically. It is identified by its
//! inode, and removed only if the name still leads to that inode.

use gpurun::error::{Code, Error, OrFail, Result};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, Stat, open, rename, statat, unlink},
    io::Errno,
};
use std::{
    hash::{BuildHasher, RandomState},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};
use tokio::net::{UnixListener, UnixStream};

/// A socket that this process listens on.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// An open descriptor of the socket, so that its inode number is not reused.
    inode: OwnedFd,
}

/// The object under a socket's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// This socket.
    Ours,
    /// Nothing: the socket was removed.
    Gone,
    /// Another file.
    Taken,
}

impl Socket {
    /// Listens at this path, and replaces an existing file.
    ///
    /// # Errors
    /// [`Code::Config`]
    pub fn bind(path: &Path) -> Result<(UnixListener, Self)> {
        let failed = || format!("{} cannot be listened on", path.display());
        let fix = |error: Error| {
            let directory = path.parent().unwrap_or(Path::new("/"));
            error.fix(format!(
                "mount {} in the plugin's pod, writable for root (--kubelet-socket)",
                directory.display()
            ))
        };
        // A process id is not unique here: every pod has a process 1.
        let random = RandomState::new().hash_one(path) & 0xffff_ffff;
        let first = path.with_file_name(format!(".{random:08x}"));
        let listener = UnixListener::bind(&first).or_fail(Code::Config, failed).map_err(fix)?;
        let inode = open(&first, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let inode = inode.and_then(|inode| rename(&first, path).map(|()| inode));
        let inode = inode.inspect_err(|_| {
            let _ = unlink(&first);
        });
        let inode = inode.or_fail(Code::Config, failed).map_err(fix)?;
        Ok((listener, Self { path: path.into(), inode }))
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks the name. On errors other than absence the socket counts as unchanged.
    pub fn standing(&self) -> Standing {
        match (statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW), rustix::fs::fstat(&self.inode)) {
            (Err(Errno::NOENT | Errno::NOTDIR), _) => Standing::Gone,
            (Ok(named), Ok(own)) if !same(&named, &own) => Standing::Taken,
            _ => Standing::Ours,
        }
    }
}

fn same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.standing() == Standing::Ours {
            let _ = unlink(&self.path);
        }
    }
}

/// A description of the process that listens at a path; `None` if no process does.
pub async fn listener_of(path: &Path) -> Option<String> {
    let connection = UnixStream::connect(path).await.ok()?;
    let id = connection.peer_cred().ok()?.pid().filter(|id| *id > 0);
    Some(match id {
        Some(id) => {
            let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            format!("process {id} ({})", name.trim())
        }
        None => "a process outside this pod".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn within<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
    }

    #[test]
    fn a_socket_is_removed_by_its_owner_alone() {
        within(async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("gpu.sock");
            fs::write(&path, "left behind").unwrap();
            let (_old_listener, old) = Socket::bind(&path).unwrap();
            assert_eq!(old.standing(), Standing::Ours);
            let (_new_listener, new) = Socket::bind(&path).unwrap();
            assert_eq!((old.standing(), new.standing()), (Standing::Taken, Standing::Ours));
            drop(old);
            assert_eq!(new.standing(), Standing::Ours, "the older one leaves it");
            assert!(listener_of(&path).await.unwrap().contains(&std::process::id().to_string()));
            // Inode numbers of removed files are reused.
            fs::remove_file(&path).unwrap();
            assert_eq!(new.standing(), Standing::Gone);
            for _ in 0..50 {
                fs::write(&path, "").unwrap();
                assert_eq!(new.standing(), Standing::Taken);
                fs::remove_file(&path).unwrap();
            }
            fs::write(&path, "another's").unwrap();
            drop(new);
            assert!(path.exists() && fs::read_dir(directory.path()).unwrap().count() == 1);
            assert_eq!(listener_of(&path).await, None);
        });
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = within(async { Socket::bind(Path::new("/nowhere/gpu.sock")).unwrap_err() });
        assert!(error.to_string().contains("/nowhere/gpu.sock") && !error.fix_line().is_empty(), "{error}");
    }
}
