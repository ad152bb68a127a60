//! A container's root: read through its layers before it is mounted, written through descriptors after.
//!
//! Nothing here joins a path of the image's to a path of the host's. A path of the image's is resolved beneath a
//! descriptor of its root, its links too, so that no link of an image leads out of it.

use crate::{
    error::{Code, Error, OrFail, Result},
    inventory::DeviceNode,
};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    io::Read,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Component, Path, PathBuf},
};

/// How many links one path may go through: the kernel's own limit (MAXSYMLINKS, path_resolution(7)).
const MAX_LINKS: u32 = 40;
/// How many names may be looked up for one path, again after each `..`: paths that are meant well have a dozen, and links that
/// lead up and down the longest possible paths have a million.
const MAX_LOOKS: usize = 1000;
/// How many names of a directory's are read in each layer.
const MAX_LISTED: usize = 10_000;

/// An image's root before it is mounted: overlayfs layers, topmost first.
#[derive(Debug)]
pub struct Layers {
    paths: Vec<PathBuf>,
    descriptors: Vec<OwnedFd>,
    /// Whether volumes are mounted in it already.
    is_mounted: bool,
}

/// What a path leads to.
#[derive(Debug)]
pub enum Found {
    /// A directory, merged of these, topmost first.
    Directory(Vec<OwnedFd>),
    /// A regular file, open for reading.
    File(std::fs::File),
    /// Something else: a device, a FIFO, a socket.
    Other,
}

enum Looked {
    Link(PathBuf),
    Found(Found),
}

impl Layers {
    /// Opens the lower directories of an overlay, topmost first.
    pub fn open(lowers: Vec<PathBuf>) -> Result<Self> {
        let open = |path: &PathBuf| {
            rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .or_fail(Code::Store, || format!("the image's directory {} cannot be opened", path.display()))
        };
        let descriptors = lowers.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { descriptors, paths: lowers, is_mounted: false })
    }

    /// A root in which an engine has mounted volumes and the kernel's file systems already. What lies there is found, and none of
    /// it is [read](Self::read): a user of the container's may be forbidden to, and what is read is written again for everybody.
    pub fn mounted(root: &OwnedFd) -> std::io::Result<Self> {
        Ok(Self { descriptors: vec![root.try_clone()?], paths: Vec::new(), is_mounted: true })
    }

    /// The directories and their descriptors, topmost first.
    pub fn lowers(&self) -> impl Iterator<Item = (&Path, &OwnedFd)> {
        self.paths.iter().map(PathBuf::as_path).zip(&self.descriptors)
    }

    /// The same layers beneath a directory that has no path.
    pub fn beneath(&self, top: &OwnedFd) -> std::io::Result<Self> {
        let descriptors = [top].into_iter().chain(&self.descriptors).map(OwnedFd::try_clone);
        let descriptors = descriptors.collect::<std::io::Result<_>>()?;
        Ok(Self { descriptors, paths: Vec::new(), is_mounted: self.is_mounted })
    }

    /// Layers of directories that are open already, topmost first.
    pub fn of_descriptors(directories: &[OwnedFd]) -> std::io::Result<Self> {
        let descriptors = directories.iter().map(OwnedFd::try_clone).collect::<std::io::Result<_>>()?;
        Ok(Self { descriptors, paths: Vec::new(), is_mounted: false })
    }

    /// Where `path` leads, as the mounted overlay would say: its name after all links, and what is there.
    /// `None` if there is nothing, or a link that leads nowhere.
    pub fn find(&self, path: &str) -> Option<(PathBuf, Found)> {
        let (mut links, mut looks) = (0, 0);
        let mut todo = names(Path::new(path));
        let mut done: Vec<OsString> = Vec::new();
        let mut here = self.top()?;
        while let Some(name) = todo.pop() {
            looks += 1;
            if name == ".." {
                done.pop();
                looks += done.len();
            }
            if looks > MAX_LOOKS {
                return None;
            }
            if name == ".." {
                here = self.walk(&done)?;
                continue;
            }
            match look(&here, &name)? {
                Looked::Found(Found::Directory(directory)) => {
                    here = directory;
                    done.push(name);
                }
                Looked::Found(found) => {
                    done.push(name);
                    return todo
                        .is_empty()
                        .then(|| (Path::new("/").join(done.iter().collect::<PathBuf>()), found));
                }
                Looked::Link(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    if target.is_absolute() {
                        done.clear();
                        here = self.top()?;
                    }
                    todo.extend(names(&target));
                }
            }
        }
        Some((Path::new("/").join(done.iter().collect::<PathBuf>()), Found::Directory(here)))
    }

    /// The content of a regular file of at most `limit` bytes; `None` if there is none, or if it is larger.
    pub fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>> {
        let file = if self.is_mounted {
            let top = Root::without_mounts(self.descriptors.first()?.try_clone().ok()?);
            let found = top.open(Path::new(path), OFlags::PATH).ok()?;
            let stat = rustix::fs::fstat(&found).ok()?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return None;
            }
            // What was looked at is what is read, whoever changes the path meanwhile.
            std::fs::File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?
        } else {
            let (_, Found::File(file)) = self.find(path)? else { return None };
            file
        };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).ok()?;
        (bytes.len() as u64 <= limit).then_some(bytes)
    }

    /// Whether there is anything at `path`.
    pub fn exists(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    /// The names in a directory, sorted.
    pub fn list(&self, path: &str) -> Vec<OsString> {
        let Some((_, Found::Directory(layers))) = self.find(path) else { return Vec::new() };
        let mut names: Vec<OsString> = Vec::new();
        for layer in &layers {
            let Ok(directory) = rustix::fs::Dir::read_from(layer) else { continue };
            names.extend(
                directory
                    .flatten()
                    .take(MAX_LISTED)
                    .map(|entry| OsString::from_vec(entry.file_name().to_bytes().to_vec())),
            );
        }
        names.sort();
        names.dedup();
        names.retain(|name| name != "." && name != ".." && look(&layers, name).is_some());
        names
    }

    fn top(&self) -> Option<Vec<OwnedFd>> {
        self.descriptors.iter().map(|fd| fd.try_clone().ok()).collect()
    }

    fn walk(&self, names: &[OsString]) -> Option<Vec<OwnedFd>> {
        names.iter().try_fold(self.top()?, |here, name| match look(&here, name)? {
            Looked::Found(Found::Directory(directory)) => Some(directory),
            _ => None,
        })
    }
}

/// The names of a path, last first.
fn names(path: &Path) -> Vec<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().rev().filter_map(name).collect()
}

/// One name in a merged directory: overlayfs' rules (Documentation/filesystems/overlayfs.rst, "Merging directories",
/// "whiteouts and opaque directories").
fn look(directories: &[OwnedFd], name: &OsStr) -> Option<Looked> {
    let mut merged = Vec::new();
    for directory in directories {
        let Ok(stat) = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let open = |flags| {
            rustix::fs::openat(directory, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let fd = open(OFlags::RDONLY | OFlags::DIRECTORY).ok()?;
                let opaque = directories.len() > 1
                    && ["trusted.overlay.opaque", "user.overlay.opaque"]
                        .iter()
                        .any(|key| matches!(rustix::fs::fgetxattr(&fd, *key, &mut [0u8; 1][..]), Ok(1)));
                merged.push(fd);
                if opaque {
                    break;
                }
            }
            _ if !merged.is_empty() => break,
            FileType::CharacterDevice if stat.st_rdev == 0 => return None,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new()).ok()?;
                return Some(Looked::Link(PathBuf::from(OsString::from_vec(target.into_bytes()))));
            }
            FileType::RegularFile => {
                // NONBLOCK: should the name become a FIFO between the two calls, the open must not wait.
                return Some(Looked::Found(Found::File(
                    open(OFlags::RDONLY | OFlags::NONBLOCK).ok()?.into(),
                )));
            }
            _ => return Some(Looked::Found(Found::Other)),
        }
    }
    (!merged.is_empty()).then_some(Looked::Found(Found::Directory(merged)))
}

/// A container's root that is mounted and that nobody runs in yet.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    how: ResolveFlags,
}

impl Root {
    /// The root behind this descriptor.
    pub fn new(root: OwnedFd) -> Self {
        Self { directory: root, how: ResolveFlags::empty() }
    }

    /// The same without what is mounted below it: where an engine has mounted volumes already, a path through one of them
    /// leads to files of the host or of another container.
    pub fn without_mounts(root: OwnedFd) -> Self {
        Self { directory: root, how: ResolveFlags::NO_XDEV }
    }

    /// Opens `path` inside the root, its links resolved inside, too.
    pub fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::empty())
    }

    fn resolve(&self, path: &Path, flags: OFlags, how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let path = relative(path);
        loop {
            let how = how | self.how | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            match rustix::fs::openat2(&self.directory, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                // The kernel could not rule out that a rename raced the resolution (openat2(2)): again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// The directory `path`, made with its parents where it is absent (0755, owned by the container's root).
    pub fn directory(&self, path: &Path) -> Result<OwnedFd> {
        self.make_directory(path).map_err(|errno| match errno {
            Errno::XDEV => Error::new(
                Code::Rootfs,
                format!("{} of the container is on a volume", path.display()),
            )
            .cause("what is mounted there may be the host's, or another container's, and is not written to")
            .fix("mount the volume at another place"),
            errno => {
                let what = format!("the image has no directory {} and none can be made", path.display());
                Error::new(Code::Rootfs, what).cause(errno)
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
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        // NOFOLLOW: what stood there as a link that leads nowhere is an error, not a way out.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, name, flags, Mode::empty())
    }

    /// Something at `path` that a file can be mounted on; an empty file is made where there is nothing.
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
        rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644))
            .or_fail(Code::Rootfs, || format!("{} cannot be made in the image", path.display()))
    }

    /// The directory `path`, if no component of it is a link.
    pub fn plain_directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, OFlags::PATH | OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS)
    }

    /// A directory that a kernel file system can be mounted on: no component may be a link, because what is masked
    /// beneath it is named by path.
    pub fn kernel_mount_point(&self, path: &Path) -> Result<OwnedFd> {
        match self.plain_directory(path) {
            Err(Errno::NOENT) => self.directory(path),
            Err(errno) => Err(Error::new(
                Code::Rootfs,
                format!("the image's {} is not a plain directory", path.display()),
            )
            .cause(errno)
            .fix("build the image without a link in that place")),
            Ok(fd) => Ok(fd),
        }
    }

    /// A file with this content, in place of what is there; a link there is replaced, not followed.
    pub fn write(&self, path: &Path, content: &[u8], mode: u32) -> Result<()> {
        let failed = || format!("{} cannot be written in the container's root", path.display());
        let (parent, name) = self.parent(path)?;
        // In a root that is used again it is there. To replace a file costs half a millisecond on ext4, which writes the new
        // one's blocks at once then (auto_da_alloc).
        if says(&parent, name, content, mode) {
            return Ok(());
        }
        let temporary = temporary(&parent, name);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(mode))
            .or_fail(Code::Rootfs, failed)?;
        std::io::Write::write_all(&mut std::fs::File::from(file), content).or_fail(Code::Rootfs, failed)?;
        rustix::fs::renameat(&parent, &temporary, &parent, name).or_fail(Code::Rootfs, failed)
    }

    /// A device node. `false` where this process may make none, as in a user namespace. The same device that is there already
    /// stays as it is; anything else is not ours to replace.
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
                return Err(Error::new(Code::Rootfs, failed()).cause("something else is there"));
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

    /// A link that says `target`, in place of a file or link that is there.
    pub fn symlink(&self, link: &Path, target: &Path) -> Result<()> {
        let (parent, name) = self.parent(link)?;
        if rustix::fs::readlinkat(&parent, name, Vec::new())
            .is_ok_and(|old| old.as_bytes() == target.as_os_str().as_bytes())
        {
            return Ok(());
        }
        let failed = || format!("the link {} cannot be made in the container's root", link.display());
        match rustix::fs::symlinkat(target, &parent, name) {
            Err(Errno::EXIST) => {
                let temporary = temporary(&parent, name);
                rustix::fs::symlinkat(target, &parent, &temporary).or_fail(Code::Rootfs, failed)?;
                rustix::fs::renameat(&parent, &temporary, &parent, name).or_fail(Code::Rootfs, failed)
            }
            result => result.or_fail(Code::Rootfs, failed),
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

/// Whether a regular file has this content and mode.
fn says(parent: &OwnedFd, name: &OsStr, content: &[u8], mode: u32) -> bool {
    // Looked at before it is opened: to open a device can be to use it, and a container may make any node in its root.
    let is_like_it = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && stat.st_mode & 0o7777 == mode
            && u64::try_from(stat.st_size) == Ok(content.len() as u64)
    });
    if !is_like_it {
        return false;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::openat(parent, name, flags, Mode::empty()) else { return false };
    let mut old = Vec::with_capacity(content.len());
    let limit = content.len() as u64 + 1;
    std::fs::File::from(file).take(limit).read_to_end(&mut old).is_ok() && old == content
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

/// A name beside `name` that no image uses on purpose. What is there was left by a gpurun that was killed in a root that is
/// used again; O_EXCL finds out if it is something else.
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

/// Opens a host path that gpurun itself made, without following a link in its last place.
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

    fn tree() -> (tempfile::TempDir, Layers) {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("upper"), dir.path().join("lower"));
        for path in ["upper/etc", "upper/opt/new", "lower/etc", "lower/opt/old", "lower/usr/lib"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(lower.join("etc/passwd"), "lower").unwrap();
        fs::write(lower.join("etc/group"), "lower").unwrap();
        fs::write(upper.join("etc/passwd"), "upper").unwrap();
        symlink("usr/lib", lower.join("lib")).unwrap();
        symlink("/../../../../etc/group", upper.join("etc/abs")).unwrap();
        symlink("loop", upper.join("etc/loop")).unwrap();
        let layers = Layers::open(vec![upper, lower]).unwrap();
        (dir, layers)
    }

    #[test]
    fn layers_read_like_the_mounted_overlay() {
        let (dir, layers) = tree();
        assert_eq!(layers.read("/etc/passwd", 100).unwrap(), b"upper");
        assert_eq!(layers.read("etc/group", 100).unwrap(), b"lower");
        assert_eq!(layers.read("etc/group", 3), None, "larger than the limit");
        assert_eq!(layers.read("/etc/abs", 100).unwrap(), b"lower", "an absolute link stays inside");
        assert!(!layers.exists("/etc/loop") && !layers.exists("/etc/passwd/x") && !layers.exists("/nope"));
        assert_eq!(layers.find("/lib").unwrap().0, Path::new("/usr/lib"));
        assert_eq!(layers.list("/opt"), ["new", "old"]);
        if rustix::process::geteuid().is_root() {
            fs::remove_file(dir.path().join("upper/etc/abs")).unwrap();
            let etc = open_host_directory(&dir.path().join("upper/etc")).unwrap();
            rustix::fs::mknodat(&etc, "group", FileType::CharacterDevice, Mode::empty(), 0).unwrap();
            assert!(!layers.exists("/etc/group"), "a whiteout hides what is below");
            assert_eq!(layers.list("/etc"), ["loop", "passwd"]);
            rustix::fs::setxattr(
                dir.path().join("upper/opt"),
                "trusted.overlay.opaque",
                b"y",
                rustix::fs::XattrFlags::empty(),
            )
            .unwrap();
            assert_eq!(layers.list("/opt"), ["new"], "an opaque directory hides what is below");
        }
    }

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
        // The links lead to places inside the root that do not exist; making them there is fine, outside is not.
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

    #[test]
    fn links_up_and_down_end_the_search_and_deep_paths_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let deep = ["a"; 200].join("/");
        fs::create_dir_all(dir.path().join(&deep)).unwrap();
        fs::write(dir.path().join(&deep).join("file"), "x").unwrap();
        // 40 times 200 names down and up again, each step up a walk of its own: 800,000 names.
        let there_and_back = format!("/{deep}{}", "/..".repeat(200));
        for n in 0..39 {
            symlink(format!("{there_and_back}/l{}", n + 1), dir.path().join(format!("l{n}"))).unwrap();
        }
        fs::write(dir.path().join("l39"), "end").unwrap();
        let layers = Layers::open(vec![dir.path().into()]).unwrap();
        assert_eq!(layers.read(&format!("/{deep}/../a/file"), 9).unwrap(), b"x");
        assert_eq!(layers.read("/l39", 9).unwrap(), b"end");
        assert!(layers.find("/l38").is_none(), "20,000 names for one link");
    }
}
