//! The container that a hook is run for: its root, beneath descriptors.

use gpurun::{
    apply::{
        bundle::{Bundle, ContainerRoot},
        host_object::open_tree,
        loader::SmallFile,
        mount::{self, NOTHING},
        placement::{self, DriverMount},
        rootfs::{Layers, Mounts, Outside, Place, Root},
    },
    error::{Code, Error, OrFail, Result},
    formats::oci::State,
    output,
    plan::{Injection, Symlink},
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
/// A container that is made and not yet started.
#[derive(Debug)]
pub struct Container {
    /// Its root, for reading.
    pub image: Layers,
    /// The same with what is mounted in it.
    whole: Root,
    /// The same without: volumes are the host's or another container's.
    root: Root,
    /// The mounts in the container.
    mounts: Mounts,
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
        let copy = || root.directory.try_clone().or_fail(Code::Internal, || "out of descriptors");
        Ok(Self {
            image: Layers::mounted(&root.directory).or_fail(Code::Internal, || "out of descriptors")?,
            whole: Root::new(copy()?),
            root: Root::without_mounts(copy()?),
            mounts: Mounts::of_namespace(&table, &path, Path::new("/"), Outside::Unknown),
        })
    }

    /// Looks at what is at a path of the container. A device node may be a mount, where none can be made.
    pub fn look(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.whole.open(path, OFlags::PATH)
    }

    /// Opens what is at a path of the container to change it: nothing on a volume.
    pub fn open(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        match self.mounts.place(&self.image, path) {
            Place::Root { path } => self.root.open(&path, OFlags::PATH),
            Place::Memory { path, .. } => self.whole.open(&path, OFlags::PATH),
            Place::Volume { .. } => Err(Errno::XDEV),
            Place::Nowhere => Err(Errno::NOENT),
        }
    }

    /// Makes a link, if it has a place. A link beside a device node is made only if the container has the node.
    pub fn link(&self, link: &Symlink) -> Result<()> {
        let path = normal(&link.link.0)?;
        let target = &link.target;
        if path.starts_with("/dev") {
            let mut node = path.parent().unwrap_or(&path).to_path_buf();
            for part in target.components() {
                if part == Component::ParentDir {
                    node.pop();
                } else {
                    node.push(part);
                }
            }
            if self.look(&node).is_err() {
                return Ok(());
            }
        }
        let made = match self.mounts.place_of_entry(&self.image, &path) {
            Place::Root { path } => self.root.symlink(&path, target),
            Place::Memory { path, is_mount_point: false } => self.whole.symlink(&path, target),
            // With `-v /dev:/dev` the host's links are already there.
            _ if path.starts_with("/dev") => return Ok(()),
            _ => Err(on_a_volume(&path)),
        };
        // The links in a spec are additional to the names in the loader's cache.
        if let Err(error) = made {
            note(&error);
        }
        Ok(())
    }

    /// Writes a file. An optional file without a place is left out.
    pub fn write(&self, file: &SmallFile) -> Result<()> {
        let path = normal(&file.path)?;
        let written = match self.mounts.place_of_entry(&self.image, &path) {
            Place::Root { path } => self.root.write(&path, &file.content, file.mode),
            Place::Memory { path, is_mount_point: false } => {
                self.whole.write(&path, &file.content, file.mode)
            }
            _ => Err(on_a_volume(&path)),
        };
        match written {
            Err(error) if !file.is_needed => note(&error),
            result => result?,
        }
        Ok(())
    }

    /// Places the loader's files and the injection's links.
    pub fn lay(&self, injection: &Injection) -> Result<PathBuf> {
        let placement = placement::place(&self.image, &self.mounts, injection, DriverMount::Done)?;
        for note in &placement.notes {
            output::report(&format_args!("gpurun-hook: {note}"));
        }
        // The driver's mount points are below the volume, and runc before 1.1.14 makes them by path (CVE-2024-45310).
        let above = placement.driver_dir.parent().unwrap_or(&placement.driver_dir);
        if let Place::Volume { path, .. } = self.mounts.place(&self.image, above) {
            let path = path.display();
            output::report(&format_args!(
                "gpurun-hook: a volume is mounted over {path}: the engine has made the driver's mount points on it"
            ));
        }
        placement.files.iter().chain(&placement.covers).try_for_each(|file| self.write(file))?;
        for link in &placement.symlinks {
            if link.link.0.starts_with(&placement.driver_dir) {
                self.link_driver(link)?;
            } else {
                self.link(link)?;
            }
        }
        Ok(placement.driver_dir)
    }

    /// Makes a link that programs need to load a driver library: without it they would run on the CPU.
    fn link_driver(&self, link: &Symlink) -> Result<()> {
        let path = normal(&link.link.0)?;
        match self.mounts.place_of_entry(&self.image, &path) {
            Place::Root { path } => self.root.symlink(&path, &link.target),
            Place::Memory { path, .. } => self.whole.symlink(&path, &link.target),
            Place::Volume { .. } | Place::Nowhere => Err(on_a_volume(&path)),
        }
    }

    /// Makes the new file system that an engine mounted at `path` read-only from here on, if there is one and if we may.
    pub fn seal(&self, path: &Path) {
        let Place::Memory { path, is_mount_point: true } = self.mounts.place(&self.image, path) else {
            return;
        };
        if let Ok(directory) = self.whole.open(&path, OFlags::PATH | OFlags::DIRECTORY) {
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
    let file = open_tree(&tmpfs, OpenTreeFlags::empty(), "content", shown);
    // In the container's mount namespace `/` is the host's until pivot_root, and so is this /proc.
    rustix::mount::unmount(format!("/proc/self/fd/{}", tmpfs.as_raw_fd()), UnmountFlags::DETACH)
        .or_fail(Code::Mount, || "a mount of the hook's own cannot be taken away")?;
    let file = file?;
    restrict(file.as_fd(), Flags { read_only: true, ..NOTHING }, false)
        .or_fail(Code::Mount, || format!("{} cannot be made read-only", shown.display()))?;
    mount::attach(&file, point, shown)
}

fn on_a_volume(path: &Path) -> Error {
    Error::new(
        Code::Rootfs,
        format!("{} of the container is on a volume, or a file is in its way", path.display()),
    )
    .cause("gpurun does not write to volumes, which may belong to the host or another container")
    .fix(format!("mount the volume at another place than a directory of {}", path.display()))
}

/// Reports an omitted part. runc and crun show a hook's standard error if the hook fails, and log it on request.
pub fn note(error: &Error) {
    output::report(&format_args!("gpurun-hook: {}; {}", error.what(), error.cause_line()));
}

/// A path without `..`, which would be taken off the name before a link is followed: documents have none.
fn normal(path: &Path) -> Result<PathBuf> {
    let is_plain =
        |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_) | Component::CurDir);
    if path.is_absolute() && path.components().all(is_plain) {
        return Ok(path.into());
    }
    Err(Error::new(Code::Usage, format!("{} is not a path in a container", path.display())).fix(
        "write the CDI spec again with `gpurun cdi generate`; paths in it are absolute and have no `..`",
    ))
}

/// The content of a host's file of procfs; `None` if there is none.
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
