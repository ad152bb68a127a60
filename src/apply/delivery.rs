//! Puts on file systems what another engine's container needs there before its config.json can say it: the few small files of
//! the loader in its root, and the rest in [`Tree`]s of ours.
//!
//! ```text
//! /usr/local/nvidia       a tree: mount points and links, read-only   ◄─ one mount, the same for every container
//!   lib64/libcuda.so.550  the host's file                             ◄─ one mount for each file
//!   lib64/libcuda.so.1    a link of the tree
//! /etc/ld.so.cache        written into the container's root, where ldconfig and apt may change it again
//! ```
//!
//! The driver's directory as a whole cannot be one mount: links to the host's files lead nowhere in a container, hard links
//! need one file system (/run is another one than /usr), and mounts gathered on the host beforehand would stay in its mount
//! table. With the tree below them the single mounts leave nothing in the container's root, so an image that is committed from
//! it holds nothing of the driver but an empty directory.

use super::{
    bundle::ContainerRoot,
    loader::Prepared,
    oci_spec::{Bind, BindKind, DEFAULT_SHM_SIZES},
    rootfs::{Found, Layers, Root},
    tree::Tree,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    plan::{DRIVER_DIR, Injection},
};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::{fd::OwnedFd, fs::Mode, mount::FsPickFlags};
use std::{collections::BTreeMap, path::Path};

/// Does it, and says which mounts the container needs for it. `owner` is the host's uid and gid of the container's root, where
/// that is not root itself.
///
/// # Errors
/// [`Code::Rootfs`] where something of the image stands in the way, [`Code::Bundle`] where gpurun's own directory cannot be used.
pub fn deliver(
    root: &ContainerRoot,
    image: &Layers,
    owner: Option<(u32, u32)>,
    injection: &Injection,
    prepared: &Prepared,
    state_dir: &Path,
) -> Result<Vec<Bind>> {
    // What we make is for every user of the container to read, whatever the engine's umask; the low-level runtime gets that back.
    let umask = rustix::process::umask(Mode::from_raw_mode(0o022));
    let binds = put(root, image, owner, injection, prepared, state_dir);
    rustix::process::umask(umask);
    binds
}

/// A small file of the container's root: path, content, mode.
type SmallFile<'a> = (&'a Path, &'a [u8], u32);

fn put(
    root: &ContainerRoot,
    image: &Layers,
    owner: Option<(u32, u32)>,
    injection: &Injection,
    prepared: &Prepared,
    state_dir: &Path,
) -> Result<Vec<Bind>> {
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
    // runc mounts nothing inside /proc but a handful of files that it names itself (libcontainer, checkProcMount), so the
    // driver's parameters stay as the host has them: its libraries may make device nodes, which the cgroup lets nobody open.
    let ours = injection.files.iter().filter(|file| !file.path.0.starts_with("/proc"));
    let files: Vec<SmallFile<'_>> = prepared
        .files
        .iter()
        .map(|(path, content, mode)| (path.as_path(), content.as_slice(), *mode))
        .chain(ours.map(|file| (file.path.0.as_path(), file.content.as_bytes(), 0o444)))
        .collect();

    let read_only = |source, target| Bind { source, target, kind: BindKind::ReadOnly };
    let mut binds = Vec::new();
    for (directory, tree) in &trees {
        binds.push(read_only(tree.place(state_dir)?, directory.to_path_buf()));
    }
    binds.extend(injection.mounts.iter().map(|mount| Bind {
        source: mount.source.0.clone(),
        target: mount.target.0.clone(),
        kind: if mount.read_only { BindKind::ReadOnly } else { BindKind::Socket },
    }));
    if root.writable {
        let directory = root.directory.try_clone().or_fail(Code::Internal, || "no descriptor is left")?;
        let directory = Root::new(directory);
        as_owner(owner, || {
            files.iter().try_for_each(|(path, content, mode)| directory.write(path, content, *mode))?;
            links.iter().try_for_each(|symlink| directory.symlink(&symlink.link.0, &symlink.target))
        })?;
    } else {
        binds = on_read_only(image, binds)?;
        // What can be covered is; there is no ldconfig that would have to change it.
        let mut tree = Tree::default();
        let covered: Vec<_> = files.iter().filter(|(path, ..)| has_file(image, path)).collect();
        for (path, content, _) in &covered {
            tree.file(path.strip_prefix("/").unwrap_or(path), content);
        }
        if !tree.is_empty() {
            let place = tree.place(state_dir)?;
            binds.extend(covered.iter().map(|(path, ..)| {
                read_only(place.join(path.strip_prefix("/").unwrap_or(path)), path.to_path_buf())
            }));
        }
    }
    Ok(binds)
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
