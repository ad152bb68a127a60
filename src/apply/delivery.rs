//! Puts on file systems what another engine's container needs there before its config.json can say it: the few small files of
//! the loader in its root, and the rest in [`Tree`]s of ours.
//!
//! ```text
//! /usr/local/nvidia       a tree: mount points and links, read-only   ◄─ one mount, the same for every container
//!   lib64/libcuda.so.550  the host's file                             ◄─ gathered on the tree before, or a mount for each
//!   lib64/libcuda.so.1    a link of the tree
//! /etc/ld.so.cache        written into the container's root, where ldconfig and apt may change it again
//! ```
//!
//! The driver's directory cannot be one of the host's own: links to the host's files lead nowhere in a container, and hard
//! links need one file system (/run is another one than /usr). With the tree below them the driver's files leave nothing in the
//! container's root, so an image that is committed from it holds nothing of the driver but an empty directory.

use super::{
    bundle::ContainerRoot,
    gathering,
    loader::Prepared,
    oci_spec::{Bind, BindKind, DEFAULT_SHM_SIZES},
    rootfs::{Found, Layers, Root},
    tree::Tree,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    plan::{DRIVER_DIR, Injection, Mount, Symlink},
};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::{fd::OwnedFd, fs::Mode, mount::FsPickFlags};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Where it goes.
#[derive(Debug)]
pub struct Destination<'a> {
    /// The container's root.
    pub root: &'a ContainerRoot,
    /// The same, to be read.
    pub image: &'a Layers,
    /// The host's uid and gid of the container's root, where that is not root itself.
    pub owner: Option<(u32, u32)>,
    /// Where gpurun keeps its trees.
    pub state_dir: &'a Path,
    /// Who makes the mounts.
    pub mounted_by: MountedBy,
}

/// Who makes the mounts that a container needs for what is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountedBy {
    /// The low-level runtime, from a copy of this process' mount namespace: so that may be one of our own.
    RuntimeFromHere,
    /// The low-level runtime, in a mount namespace that is there already.
    RuntimeElsewhere,
    /// gpurun itself.
    Gpurun,
}

/// A small file of the container's root: path, content, mode.
type SmallFile<'a> = (&'a Path, &'a [u8], u32);

impl Destination<'_> {
    /// Delivers, and says which mounts the container needs beyond that.
    ///
    /// # Errors
    /// [`Code::Rootfs`] where something of the image stands in the way, [`Code::StateDir`] where gpurun's own directory cannot be used.
    pub fn deliver(&self, injection: &Injection, prepared: &Prepared) -> Result<Vec<Bind>> {
        // What we make is for every user of the container to read, whatever the engine's umask; the low-level runtime gets that back.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o022));
        let binds = self.put(injection, prepared);
        rustix::process::umask(umask);
        binds
    }

    fn put(&self, injection: &Injection, prepared: &Prepared) -> Result<Vec<Bind>> {
        let (trees, links) = trees(injection, prepared);
        let (in_proc, ours): (Vec<_>, Vec<_>) =
            injection.files.iter().partition(|file| file.path.0.starts_with("/proc"));
        let files: Vec<SmallFile<'_>> = prepared
            .files
            .iter()
            .map(|(path, content, mode)| (path.as_path(), content.as_slice(), *mode))
            .chain(ours.into_iter().map(|file| (file.path.0.as_path(), file.content.as_bytes(), 0o444)))
            .collect();
        let (of_driver, others): (Vec<_>, Vec<_>) =
            injection.mounts.iter().map(bind).partition(|bind| bind.target.starts_with(DRIVER_DIR));

        let mut binds = Vec::new();
        for (directory, tree) in &trees {
            let place = tree.place(self.state_dir)?;
            let is_drivers = *directory == Path::new(DRIVER_DIR);
            let gathered = is_drivers
                && self.mounted_by == MountedBy::RuntimeFromHere
                && gathering::gather(&place, directory, &of_driver)?;
            binds.push(read_only(place, directory.to_path_buf()));
            if is_drivers && !gathered {
                binds.extend(of_driver.iter().cloned());
            }
        }
        binds.extend(others);
        // runc mounts nothing inside /proc but a handful of files that it names itself (libcontainer, checkProcMount), so with it
        // the driver's parameters stay as the host has them: its libraries may make device nodes, which the cgroup lets nobody
        // open.
        for file in in_proc.into_iter().filter(|_| self.mounted_by == MountedBy::Gpurun) {
            let source = Tree::place_file(file.content.as_bytes(), self.state_dir)?;
            binds.push(read_only(source, file.path.0.clone()));
        }
        if self.root.writable {
            self.write(&files, &links)?;
            return Ok(binds);
        }
        let mut binds = on_read_only(self.image, binds)?;
        binds.extend(self.covered(&files)?);
        Ok(binds)
    }

    fn write(&self, files: &[SmallFile<'_>], links: &[&Symlink]) -> Result<()> {
        let directory =
            self.root.directory.try_clone().or_fail(Code::Internal, || "no descriptor is left")?;
        let directory = Root::new(directory);
        as_owner(self.owner, || {
            files.iter().try_for_each(|(path, content, mode)| directory.write(path, content, *mode))?;
            links.iter().try_for_each(|symlink| directory.symlink(&symlink.link.0, &symlink.target))
        })
    }

    /// Mounts for what cannot be written: files that are there are covered, and there is no ldconfig that would have to change
    /// them.
    fn covered(&self, files: &[SmallFile<'_>]) -> Result<Vec<Bind>> {
        let covered: Vec<&Path> =
            files.iter().map(|(path, ..)| *path).filter(|path| has_file(self.image, path)).collect();
        let mut tree = Tree::default();
        for (path, content, _) in files.iter().filter(|(path, ..)| covered.contains(path)) {
            tree.file(below_root(path), content);
        }
        if tree.is_empty() {
            return Ok(Vec::new());
        }
        let place = tree.place(self.state_dir)?;
        Ok(covered.iter().map(|path| read_only(place.join(below_root(path)), path.to_path_buf())).collect())
    }
}

/// What lies in trees, by where these appear in the container, and the links that lie in its root.
fn trees<'a>(injection: &Injection, prepared: &'a Prepared) -> (BTreeMap<&'a Path, Tree>, Vec<&'a Symlink>) {
    let mut trees: BTreeMap<&Path, Tree> = BTreeMap::new();
    for mount in &injection.mounts {
        if let Ok(below) = mount.target.0.strip_prefix(DRIVER_DIR) {
            trees.entry(Path::new(DRIVER_DIR)).or_default().file(below, b"");
        }
    }
    let mut links = Vec::new();
    for symlink in &prepared.symlinks {
        let link = symlink.link.0.as_path();
        let directory = match link.parent() {
            _ if link.starts_with(DRIVER_DIR) => Some(Path::new(DRIVER_DIR)),
            // The low-level runtime mounts a new /dev, in which nothing is that lies in the root.
            Some(parent) if link.starts_with("/dev") => Some(parent),
            _ => None,
        };
        match directory.and_then(|directory| Some((directory, link.strip_prefix(directory).ok()?))) {
            Some((directory, below)) => trees.entry(directory).or_default().link(below, &symlink.target),
            None => links.push(symlink),
        }
    }
    (trees, links)
}

fn bind(mount: &Mount) -> Bind {
    Bind {
        source: mount.source.0.clone(),
        target: mount.target.0.clone(),
        kind: if mount.read_only { BindKind::ReadOnly } else { BindKind::Socket },
    }
}

fn read_only(source: PathBuf, target: PathBuf) -> Bind {
    Bind { source, target, kind: BindKind::ReadOnly }
}

fn below_root(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Gives a tmpfs that an engine mounted for one container or pod (a descriptor of its root) this size, if it has an engine's default.
///
/// # Errors
/// [`Code::Mount`] when the kernel refuses it.
pub fn grow_shm(shm: &OwnedFd, size: u64) -> Result<()> {
    /// TMPFS_MAGIC (linux/magic.h)
    const TMPFS: u64 = 0x0102_1994;
    let failed = || "the container's /dev/shm cannot be given another size";
    let fs = rustix::fs::fstatfs(shm).or_fail(Code::Mount, failed)?;
    // Fields as wide as the machine's word.
    let number = |value: i64| u64::try_from(value).unwrap_or_default();
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let (kind, total) =
        (number(fs.f_type as i64), u64::from(fs.f_blocks).saturating_mul(number(fs.f_bsize as i64)));
    let is_hosts = |stat: rustix::fs::Stat| {
        rustix::fs::stat("/dev/shm")
            .is_ok_and(|host| (host.st_dev, host.st_ino) == (stat.st_dev, stat.st_ino))
    };
    if kind != TMPFS || !DEFAULT_SHM_SIZES.contains(&total) || rustix::fs::fstat(shm).is_ok_and(is_hosts) {
        return Ok(());
    }
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let picked = rustix::mount::fspick(shm, "", flags).or_fail(Code::Mount, failed)?;
    rustix::mount::fsconfig_set_string(&picked, "size", size.to_string()).or_fail(Code::Mount, failed)?;
    rustix::mount::fsconfig_reconfigure(&picked).or_fail(Code::Mount, failed)
}

/// The mounts for which a file system that nobody can write to has a place.
fn on_read_only(image: &Layers, mut binds: Vec<Bind>) -> Result<Vec<Bind>> {
    let exists = |path: &Path| path.to_str().is_some_and(|path| image.exists(path));
    if binds.iter().any(|bind| bind.target == Path::new(DRIVER_DIR)) && !exists(Path::new(DRIVER_DIR)) {
        return Err(Error::new(
            Code::Rootfs,
            format!("the container's root is on a read-only file system and has no directory {DRIVER_DIR}"),
        )
        .fix(format!(
            "make {DRIVER_DIR} in the image, or let the engine give the container a writable layer"
        )));
    }
    binds.retain(|bind| {
        ["/dev", DRIVER_DIR].iter().any(|mounted| bind.target.starts_with(mounted)) || exists(&bind.target)
    });
    Ok(binds)
}

fn has_file(image: &Layers, path: &Path) -> bool {
    matches!(path.to_str().and_then(|path| image.find(path)), Some((_, Found::File(_))))
}

/// Does something as the container's own root, so that what it makes belongs to the container and may no more than that user.
pub(super) fn as_owner<T>(owner: Option<(u32, u32)>, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some((uid, gid)) = owner else { return act() };
    let before_gid = setfsgid(Gid::from_raw(gid));
    let before_uid = setfsuid(Uid::from_raw(uid));
    let result = act();
    setfsuid(before_uid);
    setfsgid(before_gid);
    result
}
