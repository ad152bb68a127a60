//! The driver root, and how a file is found in it: every link, absolute ones too, is followed inside the root, because
//! Debian reaches the driver through absolute links (/etc/alternatives) and a driver container's root is not `/`.

use super::types::{ContainerPath, DriverRoot, HostPath};
use crate::{
    error::{Code, OrFail, Result},
    regular_file,
};
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io::Read,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

impl DriverRoot {
    /// `path` as it is called inside the driver root.
    pub fn container_path(&self, path: &HostPath) -> Option<ContainerPath> {
        let inside = path.0.strip_prefix(&self.0).ok()?;
        Some(ContainerPath(Path::new("/").join(inside)))
    }

    /// Where `path` of the driver root is on the host. Links are not followed here; [`OpenRoot::find`] does that.
    pub fn host_path(&self, path: &ContainerPath) -> HostPath {
        HostPath(self.0.join(inside(&path.0)))
    }

    /// Opens the root for look-ups.
    ///
    /// # Errors
    /// [`Code::NoDriver`] when it is not a directory.
    pub fn open(&self) -> Result<OpenRoot<'_>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&self.0, flags, Mode::empty())
            .or_fail(Code::NoDriver, || format!("the driver root {} cannot be opened", self.0.display()))
            .map_err(|error| {
                error.fix("name the directory that holds the driver's files with --driver-root")
            })?;
        let real = path_of(&fd)
            .or_fail(Code::Internal, || format!("/proc/self/fd does not name {}", self.0.display()))?;
        Ok(OpenRoot { root: self, fd, real })
    }
}

/// A driver root that is open.
#[derive(Debug)]
pub struct OpenRoot<'a> {
    root: &'a DriverRoot,
    fd: OwnedFd,
    real: PathBuf,
}

/// What a path of the root leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file itself, no link on the way.
    pub path: HostPath,
    /// Regular, directory, socket, …
    pub kind: FileType,
    /// Its owner.
    pub uid: u32,
}

impl OpenRoot<'_> {
    /// Follows `path` inside the root. `None` when it leads nowhere.
    pub fn find(&self, path: &Path) -> Option<Found> {
        self.found(&self.open_at(path, OFlags::PATH).ok()?)
    }

    /// The same, but refuses when the last part is a link: for directories such as /tmp in which anyone may make one.
    pub fn find_no_link(&self, path: &Path) -> Option<Found> {
        let found = self.found(&self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW).ok()?)?;
        (found.kind != FileType::Symlink).then_some(found)
    }

    /// What `path` says if its last part is a link.
    pub fn link(&self, path: &Path) -> Option<PathBuf> {
        let link = self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW).ok()?;
        let target = rustix::fs::readlinkat(link, "", Vec::new()).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(target.as_bytes())))
    }

    /// The names in a directory, sorted; none when there is no such directory.
    pub fn names(&self, dir: &Path) -> Vec<String> {
        let Ok(fd) = self.open_at(dir, OFlags::RDONLY | OFlags::DIRECTORY) else { return Vec::new() };
        let Ok(entries) = rustix::fs::Dir::new(fd) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().to_str().ok().map(String::from)).collect();
        names.sort_unstable();
        names
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, path: &Path) -> Option<File> {
        Some(regular_file::open(self.open_at(path, OFlags::PATH).ok()?).ok()?.0)
    }

    /// Reads a file that is not larger than `limit` bytes.
    pub fn read(&self, path: &Path, limit: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let size = self.open_file(path)?.take(limit + 1).read_to_end(&mut bytes).ok()?;
        (size as u64 <= limit).then_some(bytes)
    }

    fn open_at(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        if self.real == Path::new("/") {
            // In `/` every link is inside; kernels before 5.6 know no openat2.
            return rustix::fs::open(Path::new("/").join(inside(path)), flags, Mode::empty());
        }
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(&self.fd, inside(path), flags, Mode::empty(), resolve) {
                // The kernel could not rule out that a rename or mount raced the resolution (openat2(2)): again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    fn found(&self, fd: &OwnedFd) -> Option<Found> {
        let stat = rustix::fs::fstat(fd).ok()?;
        let path = path_of(fd).ok()?;
        let path = HostPath(self.root.0.join(path.strip_prefix(&self.real).ok()?));
        Some(Found { path, kind: FileType::from_raw_mode(stat.st_mode), uid: stat.st_uid })
    }
}

/// `path` without its leading slash; the root itself is `.`, since an empty path means nothing to the kernel.
fn inside(path: &Path) -> &Path {
    match path.strip_prefix("/") {
        Ok(rest) if rest.as_os_str().is_empty() => Path::new("."),
        Ok(rest) => rest,
        Err(_) => path,
    }
}

fn path_of(fd: &OwnedFd) -> rustix::io::Result<PathBuf> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
    Ok(PathBuf::from(OsStr::from_bytes(link.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_stay_inside_the_root_and_the_answer_names_the_file_itself() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("usr/lib/nvidia/current");
        std::fs::create_dir_all(&current).unwrap();
        std::fs::create_dir_all(dir.path().join("etc/alternatives")).unwrap();
        std::fs::write(current.join("libcuda.so.550"), "x").unwrap();
        // As Debian does it: relative, absolute, relative.
        symlink("libcuda.so.550", current.join("libcuda.so.1")).unwrap();
        symlink("/usr/lib/nvidia/current/libcuda.so.1", dir.path().join("etc/alternatives/libcuda.so.1"))
            .unwrap();
        symlink("/etc/alternatives/libcuda.so.1", dir.path().join("usr/lib/libcuda.so.1")).unwrap();
        symlink("/etc/passwd", dir.path().join("etc/outside")).unwrap();
        symlink("../../../../../../../etc/passwd", dir.path().join("etc/above")).unwrap();

        // A root that is itself reached through a link keeps the name that the user gave.
        let link = dir.path().join("root");
        symlink(".", &link).unwrap();
        for root in [dir.path(), &link] {
            let root = DriverRoot(root.into());
            let open = root.open().unwrap();
            let found = open.find(Path::new("/usr/lib/libcuda.so.1")).unwrap();
            assert_eq!(found.path.0, root.0.join("usr/lib/nvidia/current/libcuda.so.550"));
            assert_eq!(found.kind, FileType::RegularFile);
            assert_eq!(
                root.container_path(&found.path).unwrap().0,
                Path::new("/usr/lib/nvidia/current/libcuda.so.550")
            );
            assert_eq!(open.read(Path::new("/usr/lib/libcuda.so.1"), 1).unwrap(), b"x");
            assert_eq!(open.read(Path::new("/usr/lib/libcuda.so.1"), 0), None);
            assert_eq!(open.find(Path::new("/etc/outside")), None);
            assert_eq!(open.find(Path::new("/etc/above")), None);
            assert_eq!(open.find_no_link(Path::new("/usr/lib/libcuda.so.1")), None);
            let says = |path: &str| open.link(Path::new(path));
            assert_eq!(says("/etc/above").unwrap(), Path::new("../../../../../../../etc/passwd"));
            assert_eq!((says("/etc"), says("/nowhere")), (None, None));
            assert_eq!(open.names(Path::new("/etc/alternatives")), [".", "..", "libcuda.so.1"]);
        }
        assert!(DriverRoot(dir.path().join("nowhere")).open().is_err());
    }

    #[test]
    fn the_hosts_own_root_is_a_driver_root_too() {
        let root = DriverRoot("/".into());
        let found = root.open().unwrap().find(Path::new("/proc/self/../version")).unwrap();
        assert_eq!(found.path.0, Path::new("/proc/version"));
    }
}
