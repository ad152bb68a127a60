//! The container that a hook is run for: its root, beneath descriptors.

use gpurun::{
    apply::{
        bundle::{Bundle, ContainerRoot},
        loader::Prepared,
        rootfs::{Layers, Root},
    },
    error::{Code, Error, OrFail, Result},
    formats::oci::State,
    plan::{DRIVER_DIR, Symlink},
};
use rustix::{
    fd::OwnedFd,
    fs::{CWD, FileType, Mode, OFlags},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};
use std::{
    io::Read,
    os::fd::{AsFd, AsRawFd},
    path::{Component, Path, PathBuf},
};

/// A state has some hundred bytes and the engine's annotations.
const MAX_STATE: u64 = 16 << 20;
/// The root's file systems that a hook may write to.
const OWN_MOUNTS: [&str; 2] = [DRIVER_DIR, "/dev"];

/// A container that is made and not yet started.
#[derive(Debug)]
pub struct Container {
    /// Its root, for reading.
    pub image: Layers,
    /// Its root with what is mounted in it.
    whole: Root,
    /// Its root and [`OWN_MOUNTS`], each without what is mounted below: volumes are the host's or another container's.
    own: Vec<(&'static Path, Root)>,
}

impl Container {
    /// The container whose state is on standard input.
    pub fn of_state() -> Result<Self> {
        let mut bytes = Vec::new();
        let read = std::io::stdin().lock().take(MAX_STATE).read_to_end(&mut bytes);
        read.or_fail(Code::Bundle, || "standard input cannot be read")?;
        let state = State::parse(&bytes)?;
        let root = if let Some(root) = state.root {
            ContainerRoot::open(root)?
        } else {
            let (bundle, spec) = Bundle::open(&state.bundle)?;
            bundle.root(&spec)?
        };
        Self::beneath(&root.directory)
    }

    fn beneath(root: &OwnedFd) -> Result<Self> {
        let copy = || root.try_clone().or_fail(Code::Internal, || "no descriptor is left");
        let image =
            Layers::open(Vec::new())?.beneath(root).or_fail(Code::Internal, || "no descriptor is left")?;
        let whole = Root::new(copy()?);
        let mut own = vec![(Path::new("/"), Root::without_mounts(copy()?))];
        for mount in OWN_MOUNTS.map(Path::new) {
            if let Ok(directory) = whole.open(mount, OFlags::PATH | OFlags::DIRECTORY) {
                own.push((mount, Root::without_mounts(directory)));
            }
        }
        Ok(Self { image, whole, own })
    }

    /// The file system of ours on which `path` is, and its path there.
    fn place<'a>(&self, path: &'a Path) -> (&Root, &'a Path) {
        let below = |(mount, root)| Some((root, path.strip_prefix(mount).ok()?));
        let mut found = self.own.iter().rev().filter_map(|(mount, root)| below((*mount, root)));
        // Only a path that is not absolute is below none, and it means the same.
        found.next().unwrap_or((&self.whole, path))
    }

    /// Opens what is at a path of the container, and not on a volume.
    pub fn open(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let (root, path) = self.place(path);
        root.open(path, OFlags::PATH)
    }

    /// Makes a link.
    pub fn link(&self, link: &Symlink) -> Result<()> {
        let path = normal(&link.link.0)?;
        let target = &link.target;
        if path.starts_with("/dev") {
            // One beside a device node, which this container has or has not.
            let mut node = path.parent().unwrap_or(&path).to_path_buf();
            for part in target.components() {
                if part == Component::ParentDir {
                    node.pop();
                } else {
                    node.push(part);
                }
            }
            if self.open(&node).is_err() {
                return Ok(());
            }
        }
        let (root, path) = self.place(&path);
        root.symlink(path, target)
    }

    /// Writes a file.
    pub fn write(&self, path: &Path, content: &[u8], mode: u32) -> Result<()> {
        let path = normal(path)?;
        let (root, path) = self.place(&path);
        root.write(path, content, mode)
    }

    /// Writes and links what the loader needs.
    pub fn lay(&self, prepared: &Prepared) -> Result<()> {
        prepared.files.iter().try_for_each(|(path, content, mode)| self.write(path, content, *mode))?;
        prepared.symlinks.iter().try_for_each(|link| self.link(link))
    }

    /// Makes what an engine mounted at `path` read-only from here on, if it is a mount and if we may.
    pub fn seal(&self, path: &Path) {
        if let Ok(directory) = self.whole.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            let read_only = gpurun::sys::mount::Flags { read_only: true, ..Default::default() };
            let _ = gpurun::sys::mount::restrict(directory.as_fd(), read_only, false);
        }
    }

    /// Covers the file at `path` with this content, read-only; nothing happens where there is none, or where mounting is not
    /// permitted, as in some user namespaces.
    pub fn cover(&self, path: &Path, content: &[u8]) -> Result<()> {
        let (Ok(point), Some(Ok(directory))) = (
            self.whole.open(path, OFlags::PATH),
            path.parent().map(|parent| self.whole.open(parent, OFlags::PATH | OFlags::DIRECTORY)),
        ) else {
            return Ok(());
        };
        match covered(&point, &directory, content) {
            Err(error) if error.code() == Code::NotAllowed => Ok(()),
            result => result,
        }
    }
}

fn covered(point: &OwnedFd, directory: &OwnedFd, content: &[u8]) -> Result<()> {
    let failed = |errno: Errno| {
        let code = if matches!(errno, Errno::PERM | Errno::ACCESS) { Code::NotAllowed } else { Code::Mount };
        Error::new(code, "a file of the container's /proc cannot be covered").cause(errno)
    };
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let tmpfs = (|| {
        let new = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&new, "mode", "0755")?;
        rustix::mount::fsconfig_set_string(&new, "size", "64k")?;
        rustix::mount::fsconfig_create(&new)?;
        rustix::mount::fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    })()
    .map_err(failed)?;
    let copy = tmpfs.try_clone().or_fail(Code::Internal, || "no descriptor is left")?;
    Root::new(copy).write(Path::new("/content"), content, 0o444)?;
    // Kernels before 6.15 clone a mount only where it is mounted, so it is, for a moment.
    rustix::mount::move_mount(&tmpfs, "", directory, "", empty).map_err(failed)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let file = rustix::mount::open_tree(&tmpfs, "content", flags);
    // In the container's mount namespace `/` is the host's until pivot_root, and so is this /proc.
    rustix::mount::unmount(format!("/proc/self/fd/{}", tmpfs.as_raw_fd()), UnmountFlags::DETACH)
        .map_err(failed)?;
    let file = file.map_err(failed)?;
    let read_only = gpurun::sys::mount::Flags { read_only: true, nosuid: true, nodev: true, noexec: true };
    gpurun::sys::mount::restrict(file.as_fd(), read_only, false)
        .or_fail(Code::Mount, || "a mount cannot be made read-only")?;
    rustix::mount::move_mount(&file, "", point, "", empty).map_err(failed)
}

/// A path without `..`, which would be taken off the name before a link is followed: documents have none.
fn normal(path: &Path) -> Result<PathBuf> {
    let is_plain =
        |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_) | Component::CurDir);
    if path.is_absolute() && path.components().all(is_plain) {
        return Ok(path.into());
    }
    Err(Error::new(Code::Usage, format!("{} is not a path in a container", path.display()))
        .fix("write the CDI document anew; paths in it are absolute and have no `..`"))
}

/// The content of a host's file of procfs; `None` where there is none.
pub fn proc_file(path: &Path) -> Option<String> {
    let fd =
        rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .ok()?;
    let mut text = String::new();
    std::fs::File::from(fd).take(1 << 20).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The numbers of a character device; `None` for anything else.
pub fn character_device(fd: &OwnedFd) -> Option<(u32, u32)> {
    let stat = rustix::fs::fstat(fd).ok()?;
    (FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
        .then(|| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}
