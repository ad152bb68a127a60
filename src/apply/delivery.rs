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
    gathering::{self, READ_ONLY},
    host_object::HostObject,
    loader::SmallFile,
    oci_spec::{Bind, BindKind, DEFAULT_SHM_SIZES},
    placement::Placement,
    rootfs::{Layers, Root},
    tree::Tree,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    plan::{Mount, Symlink},
};
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
    /// Whether the container has a user namespace, so that its root is a different user on the host.
    pub has_user_namespace: bool,
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

/// Mounts and notes that are left to the caller.
#[derive(Debug, Default)]
pub struct Delivery {
    /// Mounts, in their order.
    pub binds: Vec<Bind>,
    /// Parts that were left out and the reasons, one sentence each.
    pub notes: Vec<String>,
}

/// The directory of the daemons' sockets in the driver's tree; they are numbered.
const DAEMONS: &str = "daemons";

impl Destination<'_> {
    /// Delivers, and says which mounts the container needs beyond that.
    ///
    /// # Errors
    /// [`Code::Rootfs`] if something of the image stands in the way, [`Code::StateDir`] if gpurun's own directory cannot be used.
    pub fn deliver(&self, placement: &Placement) -> Result<Delivery> {
        // What we make is for every user of the container to read, whatever the engine's umask; the low-level runtime gets that back.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o022));
        let delivery = self.put(placement);
        rustix::process::umask(umask);
        delivery
    }

    fn put(&self, placement: &Placement) -> Result<Delivery> {
        let mut delivery = Delivery { notes: placement.notes.clone(), ..Delivery::default() };
        let (trees, links) = trees(placement);
        let (of_driver, others): (Vec<_>, Vec<_>) =
            placement.mounts.iter().partition(|mount| mount.target.0.starts_with(&placement.driver_dir));
        let (daemons, others): (Vec<&Mount>, Vec<&Mount>) =
            others.into_iter().partition(|mount| mount.daemon.is_some());
        for (directory, tree) in trees {
            if directory == placement.driver_dir {
                self.put_driver(&placement.driver_dir, tree, &of_driver, &daemons, &mut delivery)?;
            } else {
                delivery.binds.push(read_only(tree.place(self.state_dir)?, directory));
            }
        }
        delivery.binds.extend(others.into_iter().map(bind));
        for file in &placement.covers {
            // runc allows mounts on only a few files of /proc (libcontainer, checkProcMount), so below runc the driver's parameters
            // stay those of the host. Its libraries may then make device nodes, which the device cgroup blocks.
            if file.path.starts_with("/proc") && self.mounted_by != MountedBy::Gpurun {
                continue;
            }
            let source = Tree::place_file(&file.content, self.state_dir)?;
            delivery.binds.push(read_only(source, file.path.clone()));
        }
        if self.root.writable {
            self.write(&placement.files, &links, &mut delivery)?;
            if self.has_user_namespace && self.mounted_by != MountedBy::Gpurun {
                self.make_mount_points(placement, &delivery.binds);
            }
        } else {
            self.cover(placement, &links, &mut delivery)?;
        }
        Ok(delivery)
    }

    /// The driver's directory with its files, and the sockets of its daemons.
    fn put_driver(
        &self,
        driver_dir: &Path,
        mut tree: Tree,
        files: &[&Mount],
        daemons: &[&Mount],
        delivery: &mut Delivery,
    ) -> Result<()> {
        if self.mounted_by != MountedBy::RuntimeFromHere {
            delivery.binds.push(read_only(tree.place(self.state_dir)?, driver_dir.to_path_buf()));
            delivery.binds.extend(files.iter().copied().map(bind));
            self.add_daemons(daemons, delivery);
            return Ok(());
        }
        let mut objects = Vec::new();
        for mount in files {
            let below = mount.target.0.strip_prefix(driver_dir).unwrap_or(&mount.target.0);
            objects.push((below.to_path_buf(), HostObject::file(&mount.source.0, READ_ONLY)?));
        }
        let mut sockets = Vec::new();
        for mount in daemons {
            match open_daemon(mount) {
                Ok(object) => {
                    let below = Path::new(DAEMONS).join(sockets.len().to_string());
                    if object.is_directory() {
                        tree.directory(&below);
                    } else {
                        tree.file(&below, b"");
                    }
                    objects.push((below.clone(), object));
                    sockets.push((below, *mount));
                }
                Err(error) => delivery.notes.push(note(&error)),
            }
        }
        let place = tree.place(self.state_dir)?;
        let gathered = gathering::gather(&place, &objects)?;
        delivery.binds.push(read_only(place.clone(), driver_dir.to_path_buf()));
        if !gathered {
            delivery.binds.extend(files.iter().copied().map(bind));
            self.add_daemons(daemons, delivery);
            return Ok(());
        }
        for (below, mount) in sockets {
            delivery.binds.push(Bind { source: place.join(below), ..bind(mount) });
        }
        Ok(())
    }

    /// A low-level runtime mounts by path, so objects that another user can replace in between are left out.
    fn add_daemons(&self, daemons: &[&Mount], delivery: &mut Delivery) {
        for mount in daemons {
            if self.mounted_by == MountedBy::Gpurun
                || !mount.daemon.is_some_and(|daemon| daemon.is_replaceable)
            {
                delivery.binds.push(bind(mount));
            } else {
                let path = mount.source.0.display();
                delivery.notes.push(format!("{path} is left out: users other than root can replace it"));
            }
        }
    }

    fn write(&self, files: &[SmallFile], links: &[&Symlink], delivery: &mut Delivery) -> Result<()> {
        let root = self.writable_root()?;
        for file in files {
            match root.write(&file.path, &file.content, file.mode) {
                Err(error) if !file.is_needed => delivery.notes.push(note(&error)),
                result => result?,
            }
        }
        for link in links {
            if let Err(error) = root.symlink(&link.link.0, &link.target) {
                delivery.notes.push(note(&error));
            }
        }
        Ok(())
    }

    /// A low-level runtime makes mount points as the container's root, which may lack permission in directories of other users of
    /// the host. If gpurun cannot make a mount point either, the runtime reports it.
    fn make_mount_points(&self, placement: &Placement, binds: &[Bind]) {
        let Ok(root) = self.writable_root() else { return };
        let is_in_root = |bind: &&Bind| {
            bind.target == placement.driver_dir || !bind.target.starts_with(&placement.driver_dir)
        };
        for bind in binds.iter().filter(is_in_root).filter(|bind| !bind.target.starts_with("/dev")) {
            let made = if bind.source.is_dir() {
                root.directory(&bind.target).map(drop)
            } else {
                root.mount_point(&bind.target).map(drop)
            };
            if let Err(error) = made {
                tracing::debug!("left to the runtime: {error}");
            }
        }
    }

    fn writable_root(&self) -> Result<Root> {
        let directory = self.root.directory.try_clone().or_fail(Code::Internal, || "out of descriptors")?;
        Ok(Root::without_mounts(directory).keeping_owners(self.has_user_namespace))
    }

    /// Adds mounts for a read-only root: existing paths are mounted over, and the other parts are left out.
    fn cover(&self, placement: &Placement, links: &[&Symlink], delivery: &mut Delivery) -> Result<()> {
        let exists = |path: &Path| path.to_str().is_some_and(|path| self.image.exists(path));
        let driver_dir = &placement.driver_dir;
        if delivery.binds.iter().any(|bind| bind.target == *driver_dir) && !exists(driver_dir) {
            let driver_dir = driver_dir.display();
            return Err(Error::new(
                Code::Rootfs,
                format!(
                    "the container's root is on a read-only file system and has no directory {driver_dir}"
                ),
            )
            .fix(format!(
                "make {driver_dir} in the image, or let the engine give the container a writable layer"
            )));
        }
        delivery.binds.retain(|bind| {
            bind.target.starts_with("/dev") || bind.target.starts_with(driver_dir) || exists(&bind.target)
        });
        let mut tree = Tree::default();
        let covered: Vec<&Path> = placement
            .files
            .iter()
            .map(|file| file.path.as_path())
            .filter(|path| self.image.is_file(path))
            .collect();
        for file in placement.files.iter().filter(|file| covered.contains(&file.path.as_path())) {
            tree.file(below_root(&file.path), &file.content);
        }
        if !tree.is_empty() {
            let place = tree.place(self.state_dir)?;
            let covers =
                covered.iter().map(|path| read_only(place.join(below_root(path)), path.to_path_buf()));
            delivery.binds.extend(covers);
        }
        // A driver file that programs find by this link.
        for link in links.iter().filter(|link| self.image.is_file(&link.link.0)) {
            let file = placement.mounts.iter().find(|mount| mount.target.0 == link.target);
            delivery.binds.extend(file.map(|file| Bind { target: link.link.0.clone(), ..bind(file) }));
        }
        Ok(())
    }
}

/// Opens a daemon's socket or directory.
fn open_daemon(mount: &Mount) -> Result<HostObject> {
    let kind = BindKind::Socket(mount.daemon.unwrap_or_default());
    HostObject::of_daemon(&mount.source.0, mount.daemon.unwrap_or_default(), kind.flags())
}

/// A non-fatal failure, in one line.
pub fn note(error: &Error) -> String {
    format!("{}: {}; {}", error.what(), error.cause_line(), error.fix_line())
}

/// What lies in trees, by where these appear in the container, and the links that lie in its root.
fn trees(placement: &Placement) -> (BTreeMap<PathBuf, Tree>, Vec<&Symlink>) {
    let driver_dir = placement.driver_dir.as_path();
    let mut trees: BTreeMap<PathBuf, Tree> = BTreeMap::new();
    for mount in &placement.mounts {
        if let Ok(below) = mount.target.0.strip_prefix(driver_dir) {
            trees.entry(driver_dir.into()).or_default().file(below, b"");
        }
    }
    let mut links = Vec::new();
    for symlink in &placement.symlinks {
        let link = symlink.link.0.as_path();
        let directory = match link.parent() {
            _ if link.starts_with(driver_dir) => Some(driver_dir),
            // The low-level runtime mounts a new /dev, in which nothing is that lies in the root.
            Some(parent) if link.starts_with("/dev") => Some(parent),
            _ => None,
        };
        match directory.and_then(|directory| Some((directory, link.strip_prefix(directory).ok()?))) {
            Some((directory, below)) => {
                trees.entry(directory.into()).or_default().link(below, &symlink.target);
            }
            None => links.push(symlink),
        }
    }
    (trees, links)
}

fn bind(mount: &Mount) -> Bind {
    Bind {
        source: mount.source.0.clone(),
        target: mount.target.0.clone(),
        kind: mount.daemon.map_or(BindKind::ReadOnly, BindKind::Socket),
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
