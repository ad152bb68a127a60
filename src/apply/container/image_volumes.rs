//! The directories of a container that are always writable: the image's VOLUMEs and, with `--read-only`, HOME.
//!
//! Docker makes an anonymous volume for each VOLUME, copies what the image has at that path, and removes it with `--rm`. Here
//! writes go to the container's scratch directory, which is removed at the end. Nothing is copied: if the image has a
//! directory there, an overlay shows it; otherwise a new directory is mounted. Owner and permissions are the image's.
//!
//! They are mounted first, so that no image can cover the driver, the kernel's file systems or a user's volume.

use super::{
    enter::{directory_in, overlay},
    scratch::VOLUMES,
    spec::{Container, Volume},
};
use crate::{
    apply::{
        mount,
        rootfs::{Found, Layers, Root},
    },
    error::{Code, Error, OrFail, Result},
    sys::mount::Flags,
};
use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{Gid, Mode, OFlags, Uid},
    io::Errno,
    mount::OpenTreeFlags,
};
use std::path::{Component, Path, PathBuf};

/// The most VOLUMEs of an image. Docker has no limit; each one costs a mount.
const MAX_VOLUMES: usize = 200;

/// The paths to mount, outer ones first: the image's VOLUMEs and, with `--read-only`, `home`; without paths that a user's
/// volume replaces or covers.
///
/// # Errors
/// [`Code::ImageBroken`] if the image has too many.
pub fn paths(declared: &[String], home: &Path, read_only: bool, volumes: &[Volume]) -> Result<Vec<PathBuf>> {
    if declared.len() > MAX_VOLUMES {
        return Err(Error::new(Code::ImageBroken, format!("the image has {} VOLUMEs", declared.len()))
            .cause(format!("gpurun mounts at most {MAX_VOLUMES}"))
            .fix("build the image with fewer VOLUME lines in its Dockerfile"));
    }
    let home = read_only.then_some(home).filter(|home| home.is_absolute());
    let mut paths: Vec<PathBuf> =
        declared.iter().filter_map(|path| normal(Path::new(path))).chain(home.and_then(normal)).collect();
    // The kernel's file systems are mounted there.
    paths.retain(|path| !["/proc", "/sys", "/dev"].iter().any(|kernels| path.starts_with(kernels)));
    paths.retain(|path| !volumes.iter().any(|volume| path.starts_with(volume.target())));
    paths.sort_by_cached_key(|path| (path.components().count(), path.clone()));
    paths.dedup();
    Ok(paths)
}

/// The path below `/` without `.`, `..` and doubled slashes; `None` is the root itself. As in Docker, a relative path starts
/// at `/`.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => drop(normal.pop()),
            _ => {}
        }
    }
    (normal != Path::new("/")).then_some(normal)
}

/// Mounts the volumes on a root that has no other mounts yet. `lowers` are the lower directories of its overlay, topmost
/// first. Writes go to `disk`, or to `memory` if overlayfs cannot use that file system.
pub fn mount(
    container: &Container,
    root: &Root,
    lowers: &[OwnedFd],
    disk: &OwnedFd,
    memory: &OwnedFd,
) -> Result<()> {
    if container.image_volumes.is_empty() {
        return Ok(());
    }
    let failed = || "the image's volumes cannot be mounted";
    let layers = Layers::of_descriptors(lowers).or_fail(Code::Internal, failed)?;
    let places = [directory_in(disk, VOLUMES)?, directory_in(memory, VOLUMES)?];
    for (n, path) in container.image_volumes.iter().enumerate() {
        let point = root
            .open(path, OFlags::PATH | OFlags::DIRECTORY)
            .or_fail(Code::Rootfs, || format!("the image's volume {} cannot be opened", path.display()))?;
        let failed = || format!("the image's volume {} cannot be mounted", path.display());
        // A link of the image leads to the root itself. A mount there would lie between the root and the host's root, which
        // pivot_root(2) stacks there to be unmounted.
        if is_same(&point, root).or_fail(Code::Mount, failed)? {
            continue;
        }
        let content = match layers.find(&path.to_string_lossy()) {
            Some((_, Found::Directory(merged))) if !is_empty(root, path).or_fail(Code::Mount, failed)? => {
                merged
            }
            _ => {
                let directory = copy_of(&point, &places[0], &n.to_string(), container.privileged)?;
                let how = OpenTreeFlags::AT_EMPTY_PATH;
                let mount = crate::apply::host_object::open_tree(&directory, how, "", path)?;
                let flags = Flags { nodev: true, ..Flags::default() };
                crate::sys::mount::restrict(mount.as_fd(), flags, false).or_fail(Code::Mount, failed)?;
                mount::attach(&mount, &point, path)?;
                continue;
            }
        };
        let over = |place: &OwnedFd| -> Result<rustix::io::Result<()>> {
            let upper = copy_of(&point, place, &n.to_string(), container.privileged)?;
            let work = directory_in(place, &format!("{n}-work"))?;
            let target = format!("/proc/self/fd/{}", point.as_raw_fd());
            Ok(overlay(container, &content, Some(&(upper, work)), Path::new(&target)))
        };
        let mounted = match over(&places[0])? {
            Err(Errno::INVAL | Errno::LOOP | Errno::OPNOTSUPP | Errno::REMOTE) => over(&places[1])?,
            result => result,
        };
        mounted.or_fail(Code::Mount, failed).map_err(|error| {
            error.fix(format!("mount a directory there, which takes its place: -v DIR:{}", path.display()))
        })?;
    }
    Ok(())
}

fn is_same(one: impl AsFd, other: impl AsFd) -> rustix::io::Result<bool> {
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    Ok(identity(rustix::fs::fstat(one)?) == identity(rustix::fs::fstat(other)?))
}

/// A new directory with the owner and the permissions of `like`.
fn copy_of(like: &OwnedFd, at: &OwnedFd, name: &str, owners: bool) -> Result<OwnedFd> {
    let made = directory_in(at, name)?;
    let copy = || {
        let stat = rustix::fs::fstat(like)?;
        if owners {
            rustix::fs::fchown(&made, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
        }
        rustix::fs::fchmod(&made, Mode::from_raw_mode(stat.st_mode & 0o7777))
    };
    copy().or_fail(Code::Store, || "a directory of the container cannot be given to its user")?;
    Ok(made)
}

/// Whether a directory of the root is empty for the container.
fn is_empty(root: &Root, path: &Path) -> rustix::io::Result<bool> {
    let directory = root.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    for entry in rustix::fs::Dir::read_from(&directory)? {
        let entry = entry?;
        if ![&b"."[..], b".."].contains(&entry.file_name().to_bytes()) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_the_images_without_what_is_the_users_or_the_kernels() {
        let volume = |target: &str| Volume::Tmpfs {
            target: target.into(),
            options: Vec::new(),
            flags: crate::sys::mount::Flags::default(),
        };
        let declared = [
            "/b/c",
            "a",
            "/b",
            "/b/",
            "//b/../b",
            "/",
            "../..",
            "/proc",
            "/dev/shm",
            "/sys/x",
            "/mine",
            "/mine/below",
            "/devices",
        ];
        let declared = declared.map(str::to_owned);
        let all = paths(&declared, Path::new("/root"), false, &[volume("/mine")]).unwrap();
        let expected = ["/a", "/b", "/devices", "/b/c"].map(PathBuf::from);
        assert!(expected.iter().all(|path| all.contains(path)) && all.len() == expected.len(), "{all:?}");
        assert!(
            all.iter().position(|path| path == Path::new("/b"))
                < all.iter().position(|path| path == Path::new("/b/c"))
        );
        assert_eq!(paths(&[], Path::new("/root"), true, &[]).unwrap(), [PathBuf::from("/root")]);
        for home in ["/", "relative", "/mine", "/mine/user"] {
            assert!(paths(&[], Path::new(home), true, &[volume("/mine")]).unwrap().is_empty(), "{home}");
        }
        let many: Vec<String> = (0..=MAX_VOLUMES).map(|n| format!("/{n}")).collect();
        assert!(paths(&many, Path::new("/root"), false, &[]).is_err());
    }
}
