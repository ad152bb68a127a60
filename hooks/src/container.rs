//! The container that a hook is run for: its root, beneath descriptors.

use gpurun::{
    apply::{
        bundle::{Bundle, ContainerRoot},
        loader::Prepared,
        mount::{self, NOTHING},
        rootfs::{Layers, Root},
    },
    error::{Code, Error, OrFail, Result},
    formats::{mountinfo, oci::State},
    plan::{DRIVER_DIR, Symlink},
    sys::mount::{Flags, restrict},
};
use rustix::{
    fd::OwnedFd,
    fs::{CWD, FileType, Mode, OFlags},
    io::Errno,
    mount::{FsOpenFlags, OpenTreeFlags, UnmountFlags},
};
use std::{
    io::Read,
    os::fd::{AsFd, AsRawFd},
    path::{Component, Path, PathBuf},
};

/// A state has some hundred bytes and the engine's annotations.
const MAX_STATE: u64 = 16 << 20;
/// Where engines mount a new file system for the container, to which a hook may write; a volume can lie there in its place.
const OWN_MOUNTS: [&str; 2] = [DRIVER_DIR, "/dev"];

/// A container that is made and not yet started.
#[derive(Debug)]
pub struct Container {
    /// Its root, for reading.
    pub image: Layers,
    /// The same with what is mounted in it.
    whole: Root,
    /// The same without: volumes are the host's or another container's.
    root: Root,
    /// Those of [`OWN_MOUNTS`] that there are, likewise.
    mounts: Vec<(&'static Path, Root)>,
}

impl Container {
    /// The container whose state is in a file, or on standard input.
    pub fn of_state(file: Option<&str>) -> Result<Self> {
        let mut bytes = Vec::new();
        match file.filter(|file| *file != "-") {
            Some(file) => {
                std::fs::File::open(file).and_then(|file| file.take(MAX_STATE).read_to_end(&mut bytes))
            }
            None => std::io::stdin().lock().take(MAX_STATE).read_to_end(&mut bytes),
        }
        .or_fail(Code::Bundle, || "the container's state cannot be read")?;
        let state = State::parse(&bytes)?;
        let root = if let Some(root) = state.root {
            ContainerRoot::open(state.bundle.join(root))?
        } else {
            let (bundle, spec) = Bundle::open(&state.bundle, None)?;
            bundle.root(&spec)?
        };
        let failed = || "the container's mounts cannot be read";
        let path = std::fs::canonicalize(&root.path).or_fail(Code::Mount, failed)?;
        let table = std::fs::read("/proc/self/mountinfo").or_fail(Code::Mount, failed)?;
        Self::beneath(&root.directory, &path, &table)
    }

    /// The container with this root, which is at `path` in the namespace whose mounts `table` has.
    fn beneath(root: &OwnedFd, path: &Path, table: &[u8]) -> Result<Self> {
        let copy = || root.try_clone().or_fail(Code::Internal, || "no descriptor is left");
        let image = Layers::mounted(root).or_fail(Code::Internal, || "no descriptor is left")?;
        let whole = Root::new(copy()?);
        // Before the root is changed the host's mounts are there, too: a volume comes from one of them.
        let is_new = |directory: &OwnedFd| {
            rustix::fs::fstat(directory).is_ok_and(|stat| {
                let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
                mountinfo::mount_points(table, device).all(|point| point.starts_with(path))
            })
        };
        let mounted = |mount: &'static str| {
            // A link of the image's could lead to a volume.
            let directory = whole.plain_directory(Path::new(mount)).ok().filter(is_new)?;
            Some((Path::new(mount), Root::without_mounts(directory)))
        };
        let mounts = OWN_MOUNTS.into_iter().filter_map(mounted).collect();
        Ok(Self { image, root: Root::without_mounts(copy()?), mounts, whole })
    }

    /// The file system on which a path is, and the path there.
    fn place(&self, path: &Path) -> (&Root, PathBuf) {
        for (mount, root) in &self.mounts {
            if let Ok(below) = path.strip_prefix(mount) {
                return (root, Path::new("/").join(below));
            }
        }
        (&self.root, path.into())
    }

    /// Looks at what is at a path of the container. A device node may be a mount, where none can be made.
    pub fn look(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.whole.open(path, OFlags::PATH)
    }

    /// Opens what is at a path of the container to change it: nothing on a volume.
    pub fn open(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let (root, path) = self.place(path);
        root.open(&path, OFlags::PATH)
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
            // With `-v /dev:/dev` the links are the host's, too.
            if self.look(&node).is_err() || self.open(Path::new("/dev")).err() == Some(Errno::XDEV) {
                return Ok(());
            }
        }
        let (root, path) = self.place(&path);
        root.symlink(&path, target)
    }

    /// Writes a file.
    pub fn write(&self, path: &Path, content: &[u8], mode: u32) -> Result<()> {
        let path = normal(path)?;
        let (root, path) = self.place(&path);
        root.write(&path, content, mode)
    }

    /// Writes and links what the loader needs.
    pub fn lay(&self, prepared: &Prepared) -> Result<()> {
        prepared.files.iter().try_for_each(|(path, content, mode)| self.write(path, content, *mode))?;
        prepared.symlinks.iter().try_for_each(|link| self.link(link))
    }

    /// Makes the new file system that an engine mounted at `path` read-only from here on, if there is one and if we may.
    pub fn seal(&self, path: &Path) {
        if let Some((_, directory)) = self.mounts.iter().find(|(mount, _)| *mount == path) {
            let read_only = Flags { read_only: true, ..Default::default() };
            let _ = restrict(directory.as_fd(), read_only, false);
        }
    }

    /// Covers the file at `path` with this content, read-only; nothing happens where there is none, or where mounting is not
    /// permitted, as in some user namespaces.
    pub fn cover(&self, path: &Path, content: &[u8]) -> Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
        // Not through a link: on a volume that is shared with the host, the host would see what is mounted.
        let Ok(directory) = self.whole.plain_directory(parent) else { return Ok(()) };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(point) = rustix::fs::openat(&directory, name, flags, Mode::empty()) else { return Ok(()) };
        if !rustix::fs::fstat(&point).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_file()) {
            return Ok(());
        }
        // fsopen(2) asks for CAP_SYS_ADMIN, as every call after it does.
        match rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(Errno::PERM) => Ok(()),
            _ => covered(&point, &directory, content, path),
        }
    }
}

fn covered(point: &OwnedFd, directory: &OwnedFd, content: &[u8], shown: &Path) -> Result<()> {
    let options = [("mode", "0755".to_owned()), ("size", "64k".to_owned())];
    let tmpfs = mount::new_filesystem("tmpfs", &options, NOTHING)?;
    let copy = tmpfs.try_clone().or_fail(Code::Internal, || "no descriptor is left")?;
    Root::new(copy).write(Path::new("/content"), content, 0o444)?;
    // Kernels before 6.15 clone a mount only where it is mounted, so it is, for a moment.
    mount::attach(&tmpfs, directory, shown)?;
    let file = mount::open_tree(&tmpfs, OpenTreeFlags::empty(), "content", shown);
    // In the container's mount namespace `/` is the host's until pivot_root, and so is this /proc.
    rustix::mount::unmount(format!("/proc/self/fd/{}", tmpfs.as_raw_fd()), UnmountFlags::DETACH)
        .or_fail(Code::Mount, || "a mount of the hook's own cannot be taken away")?;
    let file = file?;
    restrict(file.as_fd(), Flags { read_only: true, ..NOTHING }, false)
        .or_fail(Code::Mount, || format!("{} cannot be made read-only", shown.display()))?;
    mount::attach(&file, point, shown)
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
