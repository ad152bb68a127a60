//! Writes into a mounted root, through descriptors.

use crate::{
    error::{Code, Error, OrFail, Result},
    inventory::DeviceNode,
    regular_file::{self, look_at},
};
use nix::unistd::{setfsgid, setfsuid};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    io::Read,
    os::unix::ffi::OsStrExt,
    path::Path,
};

/// A mounted root of a container in which no process runs yet.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    how: ResolveFlags,
    keeps_owners: bool,
}

impl Root {
    /// The root behind this descriptor.
    pub fn new(root: OwnedFd) -> Self {
        Self { directory: root, how: ResolveFlags::empty(), keeps_owners: false }
    }

    /// Gives new files to the owner of their directory. For a container with a user namespace, in which root is a different user
    /// of the host.
    #[must_use]
    pub fn keeping_owners(self, keeps_owners: bool) -> Self {
        Self { keeps_owners, ..self }
    }

    /// Does not cross mounts below the root: if an engine has already mounted volumes, a path through one of them leads to files
    /// of the host or of another container.
    pub fn without_mounts(root: OwnedFd) -> Self {
        Self { directory: root, how: ResolveFlags::NO_XDEV, keeps_owners: false }
    }

    /// Opens `path` inside the root; its links are also resolved inside.
    pub fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::empty())
    }

    /// Whether an open directory is the root.
    pub fn is_itself(&self, directory: &OwnedFd) -> bool {
        let identity = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        identity(directory).is_some_and(|found| Some(found) == identity(&self.directory))
    }

    fn resolve(&self, path: &Path, flags: OFlags, how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let path = relative(path);
        loop {
            let how = how | self.how | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            match rustix::fs::openat2(&self.directory, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                // A rename may have raced the resolution (openat2(2)), so it is retried.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// The directory `path`, made with its parents where it is absent (0755, owned by the container's root).
    pub fn directory(&self, path: &Path) -> Result<OwnedFd> {
        self.make_directory(path).map_err(|errno| match errno {
            Errno::XDEV => {
                Error::new(Code::Rootfs, format!("{} of the container is on a volume", path.display()))
                    .cause(
                        "gpurun does not write to volumes, which may belong to the host or another container",
                    )
                    .fix("mount the volume at another place")
            }
            errno => {
                let what = format!("the image has no directory {} and none can be made", path.display());
                Error::new(Code::Rootfs, what)
                    .cause(errno)
                    .fix(format!("make the directory in the image: RUN mkdir -p {}", path.display()))
            }
        })
    }

    fn make_directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::INVAL) };
        let parent = self.make_directory(parent)?;
        match self.make_in(&parent, || rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        // NOFOLLOW: a dangling link there is an error, not a way out of the root.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, name, flags, Mode::empty())
    }

    /// Opens the mount point `path` for a file; an empty file is made if nothing exists there.
    pub fn mount_point(&self, path: &Path) -> Result<OwnedFd> {
        match self.open(path, OFlags::PATH) {
            Err(Errno::NOENT) => {}
            result => {
                return result.or_fail(Code::Rootfs, || {
                    format!("{} of the image cannot be mounted over", path.display())
                });
            }
        }
        let (parent, name) = self.parent(path)?;
        unlink_dangling(&parent, name)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        self.make_in(&parent, || rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644)))
            .or_fail(Code::Rootfs, || format!("{} cannot be made in the image", path.display()))
    }

    /// The directory `path`, if no component of it is a link.
    pub fn plain_directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, OFlags::PATH | OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS)
    }

    /// Opens a directory to mount a kernel file system on. No component may be a link, because the paths masked beneath it are
    /// given by name.
    pub fn kernel_mount_point(&self, path: &Path) -> Result<OwnedFd> {
        match self.plain_directory(path) {
            Err(Errno::NOENT) => self.directory(path),
            Err(errno) => Err(not_plain(path, errno)),
            Ok(fd) => Ok(fd),
        }
    }

    /// Writes a file in place of an existing one; a link is replaced, not followed.
    pub fn write(&self, path: &Path, content: &[u8], mode: u32) -> Result<()> {
        let failed = || format!("{} cannot be written in the container's root", path.display());
        let (parent, name) = self.parent(path)?;
        // A reused root already has the file. Replacing it costs half a millisecond on ext4, which then writes the new blocks
        // immediately (auto_da_alloc).
        if says(&parent, name, content, mode) {
            return Ok(());
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        self.make_in(&parent, || {
            let temporary = temporary(&parent, name);
            let file = rustix::fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(mode))?;
            std::io::Write::write_all(&mut std::fs::File::from(file), content)?;
            rustix::fs::renameat(&parent, &temporary, &parent, name)?;
            Ok::<(), std::io::Error>(())
        })
        .or_fail(Code::Rootfs, failed)
    }

    /// Whether a file with this content and mode already exists.
    #[cfg(test)]
    pub(super) fn is_written(&self, path: &Path, content: &[u8], mode: u32) -> bool {
        self.parent(path).is_ok_and(|(parent, name)| says(&parent, name, content, mode))
    }

    /// Makes a device node. `false` if this process may not make nodes, as in a user namespace. An existing node of the same
    /// device is kept; anything else there is an error.
    pub fn device_node(&self, node: &DeviceNode) -> Result<bool> {
        let path = &node.container_path.0;
        let failed = || format!("the device node {} cannot be made", path.display());
        let (parent, name) = self.parent(path)?;
        let device = rustix::fs::makedev(node.major, node.minor);
        let mode = Mode::from_raw_mode(node.mode & 0o777);
        match rustix::fs::mknodat(&parent, name, FileType::CharacterDevice, mode, device) {
            Err(Errno::PERM) => return Ok(false),
            Err(Errno::EXIST) => {
                let there = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .or_fail(Code::Rootfs, failed)?;
                let kind = FileType::from_raw_mode(there.st_mode);
                if (kind, there.st_rdev) == (FileType::CharacterDevice, device) {
                    return Ok(true);
                }
                return Err(Error::new(Code::Rootfs, failed()).cause("something else is there").fix(
                    format!(
                        "remove {} from the image, or do not ask for another device there",
                        path.display()
                    ),
                ));
            }
            made => made.or_fail(Code::DeviceNodeMissing, failed)?,
        }
        if (node.uid, node.gid) != (0, 0) {
            let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
            rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .or_fail(Code::DeviceNodeMissing, failed)?;
        }
        Ok(true)
    }

    /// Makes a link to `target`, in place of an existing file or link.
    pub fn symlink(&self, link: &Path, target: &Path) -> Result<()> {
        let (parent, name) = self.parent(link)?;
        if rustix::fs::readlinkat(&parent, name, Vec::new())
            .is_ok_and(|old| old.as_bytes() == target.as_os_str().as_bytes())
        {
            return Ok(());
        }
        let failed = || format!("the link {} cannot be made in the container's root", link.display());
        self.make_in(&parent, || match rustix::fs::symlinkat(target, &parent, name) {
            Err(Errno::EXIST) => {
                let temporary = temporary(&parent, name);
                rustix::fs::symlinkat(target, &parent, &temporary)?;
                rustix::fs::renameat(&parent, &temporary, &parent, name)
            }
            result => result,
        })
        .or_fail(Code::Rootfs, failed)
    }

    /// Makes something in a directory. The owner of a directory may write to it whatever its mode (Fedora ships `/` and
    /// `/usr/bin` as 0555), and the new file belongs to that owner.
    fn make_in<T>(&self, directory: &OwnedFd, make: impl FnOnce() -> T) -> T {
        match rustix::fs::fstat(directory) {
            Ok(stat) if self.keeps_owners => as_owner((stat.st_uid, stat.st_gid), make),
            _ => make(),
        }
    }

    /// The parent directory of `path`, made where it is absent, and the last name.
    pub fn parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr)> {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok((self.directory(parent)?, name)),
            _ => Err(Error::new(Code::Rootfs, format!("{} is not a path of a file", path.display()))),
        }
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The error for an image with a link or a file in the place of a directory of the kernel's.
pub fn not_plain(path: &Path, cause: Errno) -> Error {
    Error::new(Code::Rootfs, format!("the image's {} is not a plain directory", path.display()))
        .cause(cause)
        .fix(format!(
            "build the image without a link at that path: RUN rm {} in its Dockerfile",
            path.display()
        ))
}

/// Runs `act` as a user of the host, so that new files belong to that user. The modes of directories are ignored.
fn as_owner<T>((uid, gid): (u32, u32), act: impl FnOnce() -> T) -> T {
    let before_gid = setfsgid(nix::unistd::Gid::from_raw(gid));
    let before_uid = setfsuid(nix::unistd::Uid::from_raw(uid));
    if uid != 0 {
        // setfsuid(2) from root clears this capability. If it cannot be raised again, the directory's mode applies.
        let _ = caps::raise(None, caps::CapSet::Effective, caps::Capability::CAP_DAC_OVERRIDE);
    }
    let result = act();
    setfsuid(before_uid);
    setfsgid(before_gid);
    result
}

/// Whether a regular file has this content and mode.
fn says(parent: &OwnedFd, name: &OsStr, content: &[u8], mode: u32) -> bool {
    let Ok((found, stat)) = look_at(parent, name) else { return false };
    if stat.st_mode & 0o7777 != mode || u64::try_from(stat.st_size) != Ok(content.len() as u64) {
        return false;
    }
    let Ok((file, _)) = regular_file::open(&found) else { return false };
    let mut old = Vec::with_capacity(content.len());
    let limit = content.len() as u64 + 1;
    file.take(limit).read_to_end(&mut old).is_ok() && old == content
}

/// Removes a link that leads nowhere.
fn unlink_dangling(parent: &OwnedFd, name: &OsStr) -> Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => {
            Err(errno).or_fail(Code::Rootfs, || format!("the link {} leads nowhere", name.display()))
        }
    }
}

/// A temporary name beside `name`. An existing file of that name is a leftover of a killed gpurun in a reused root, and is
/// removed; O_EXCL fails if another one appears.
fn temporary(parent: &OwnedFd, name: &OsStr) -> OsString {
    let mut temporary = OsString::from(".gpurun-");
    temporary.push(name);
    let _ = rustix::fs::unlinkat(parent, &temporary, AtFlags::empty());
    temporary
}

/// openat2 with RESOLVE_IN_ROOT takes both, but an empty path names nothing.
fn relative(path: &Path) -> &Path {
    match path.strip_prefix("/") {
        Ok(rest) if rest.as_os_str().is_empty() => Path::new("."),
        Ok(rest) => rest,
        Err(_) => path,
    }
}

/// Opens a host path that gpurun itself made, without following a link in its last component.
pub fn open_host_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        CWD,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn nothing_is_written_outside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "untouched").unwrap();
        symlink(&outside, root.join("etc")).unwrap();
        symlink("../../outside", root.join("var")).unwrap();
        symlink("../outside/file", root.join("link")).unwrap();
        let fd = Root::new(open_host_directory(&root).unwrap());
        // The links lead to absent paths inside the root. Making them inside is fine, outside is not.
        let _ = fd.write(Path::new("/etc/file"), b"hostile", 0o644);
        let _ = fd.write(Path::new("/var/file"), b"hostile", 0o644);
        let _ = fd.symlink(Path::new("/etc/x"), Path::new("y"));
        let _ = fd.mount_point(Path::new("/link"));
        let _ = fd.directory(Path::new("/var/new/deep"));
        fd.write(Path::new("/link"), b"ours", 0o600).unwrap();
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"untouched");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read(root.join("link")).unwrap(), b"ours");
        fd.symlink(Path::new("/link"), Path::new("elsewhere")).unwrap();
        assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("elsewhere"));
        assert!(fd.kernel_mount_point(Path::new("/etc")).is_err());
    }
}
