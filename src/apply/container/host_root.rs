//! `host:` for a launcher without root. In its user namespace the mounts below `/` are locked to it (mount_namespaces(7),
//! "Restrictions on mount namespaces"), and overlayfs takes no lower directory with such mounts. The directories in `/` have
//! none, as a rule, so each gets an overlay of its own on a root in memory.

use super::{
    enter::{directory_in, overlay},
    scratch::{UPPER, WORK},
    spec::Container,
};
use crate::{
    apply::{
        host_object::HostObject,
        mount,
        rootfs::{Root, open_host_directory},
    },
    error::{Code, OrFail, Result},
    sys::mount::{Flags, restrict},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use std::{collections::BTreeSet, ffi::OsString, path::Path};

/// Of the container's own, or of no use to it: sockets of the host's services.
const NOT_THE_HOSTS: [&str; 5] = ["proc", "sys", "dev", "run", "tmp"];

/// Mounts the root at `target`: gpurun's layer over the host's directories, writable with a place for that.
pub fn mount(
    container: &Container,
    added: &OwnedFd,
    writable: Option<&OwnedFd>,
    target: &Path,
) -> Result<()> {
    let failed = || "the host's directories cannot be made the container's root";
    let flags = Flags { nodev: true, ..Flags::default() };
    let memory = mount::new_filesystem("tmpfs", &[("mode", "0755".into())], flags)?;
    mount::attach(&memory, &open_host_directory(target).or_fail(Code::Mount, failed)?, target)?;
    let root = Root::new(memory);
    let host = open_host_directory(Path::new("/")).or_fail(Code::Mount, failed)?;
    let empty = directory_in(root.as_fd(), ".gpurun-empty")?;
    for name in names(&host).or_fail(Code::Mount, failed)?.union(&names(added).or_fail(Code::Mount, failed)?)
    {
        let path = Path::new("/").join(name);
        let (ours, theirs) = (kind(added, name), kind(&host, name));
        let from_host = theirs == Some(FileType::Directory)
            && !NOT_THE_HOSTS.iter().any(|own| name == own)
            && !is_opaque(added, name);
        match (ours, theirs) {
            (None, Some(FileType::Symlink)) => {
                root.symlink(&path, &std::fs::read_link(&path).or_fail(Code::Mount, failed)?)?;
            }
            (Some(FileType::Symlink), _) => {
                let to = rustix::fs::readlinkat(added, name, Vec::new()).or_fail(Code::Mount, failed)?;
                root.symlink(&path, Path::new(&to.to_string_lossy().into_owned()))?;
            }
            (None, Some(FileType::Directory)) if !from_host => drop(root.directory(&path)?),
            (Some(FileType::Directory), _) | (None, Some(FileType::Directory)) => {
                let sources = [(ours.is_some(), added), (from_host, &host)];
                let lowers = sources.into_iter().filter(|(there, _)| *there);
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut lowers = lowers
                    .map(|(_, at)| rustix::fs::openat(at, name, flags, Mode::empty()))
                    .collect::<rustix::io::Result<Vec<_>>>()
                    .or_fail(Code::Mount, failed)?;
                // overlayfs wants two where it has no upper one.
                lowers.push(empty.try_clone().or_fail(Code::Mount, failed)?);
                let place = place(writable, name, "", lowers.first())?;
                let point = root.directory(&path)?;
                match overlay(container, &lowers, place.as_ref(), &target.join(name)) {
                    Ok(()) => {}
                    // It has mounts of its own after all: all of it as it is, to be read.
                    Err(Errno::INVAL) if ours.is_none() => {
                        let read_only = Flags { read_only: true, nosuid: true, nodev: true, noexec: false };
                        let tree = HostObject::named(&path, read_only, true)?;
                        mount::attach(tree.mount(), &point, &path)?;
                    }
                    Err(Errno::INVAL) => {
                        let beside = mount_points(added, &host, name).or_fail(Code::Mount, failed)?;
                        lowers.remove(1);
                        // The first attempt has marked its work directory as in use.
                        let place = self::place(writable, name, "again-", lowers.first())?;
                        overlay(container, &lowers, place.as_ref(), &target.join(name))
                            .or_fail(Code::Mount, failed)?;
                        for child in beside {
                            let read_only =
                                Flags { read_only: true, nosuid: true, nodev: true, noexec: false };
                            let tree = HostObject::named(&path.join(&child), read_only, true)?;
                            let point = root
                                .open(&path.join(&child), OFlags::PATH | OFlags::NOFOLLOW)
                                .or_fail(Code::Mount, failed)?;
                            mount::attach(tree.mount(), &point, &path.join(&child))?;
                        }
                    }
                    Err(errno) => return Err(errno).or_fail(Code::Mount, failed),
                }
            }
            _ => {}
        }
    }
    if container.read_only {
        restrict(root.as_fd(), Flags { read_only: true, ..Flags::default() }, false)
            .or_fail(Code::Mount, failed)?;
    }
    Ok(())
}

/// Upper and work directory for `name`, with the permissions of the topmost lower directory: /tmp is everyone's, a home its
/// owner's, and overlayfs shows those of the upper one.
fn place(
    writable: Option<&OwnedFd>,
    name: &OsString,
    mark: &str,
    top: Option<&OwnedFd>,
) -> Result<Option<(OwnedFd, OwnedFd)>> {
    let (Some(at), Some(top)) = (writable, top) else { return Ok(None) };
    let text = name.to_string_lossy();
    let upper = directory_in(at, &format!("{UPPER}-{mark}{text}"))?;
    let work = directory_in(at, &format!("{WORK}-{mark}{text}"))?;
    rustix::fs::fstat(top)
        .and_then(|stat| rustix::fs::fchmod(&upper, Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o700)))
        .or_fail(Code::Mount, || "a directory of the container's root cannot be opened to its users")?;
    Ok(Some((upper, work)))
}

/// For a directory of the host's that has mounts of its own and into which gpurun puts something: makes the places for the
/// host's entries beside gpurun's, and says which are to be mounted there. Nothing, where the user may not list it.
fn mount_points(added: &OwnedFd, host: &OwnedFd, name: &OsString) -> rustix::io::Result<Vec<OsString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |at| rustix::fs::openat(at, name, flags, Mode::empty());
    let ours = open(added)?;
    let Ok(theirs) = open(host) else { return Ok(Vec::new()) };
    let mut places = Vec::new();
    for child in names(&theirs)? {
        match (kind(&ours, &child), kind(&theirs, &child)) {
            (None, Some(FileType::Directory)) => {
                rustix::fs::mkdirat(&ours, &child, Mode::from_raw_mode(0o755))?;
                places.push(child);
            }
            (None, Some(FileType::RegularFile)) => {
                let make = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&ours, &child, make, Mode::from_raw_mode(0o644))?;
                places.push(child);
            }
            (None, Some(FileType::Symlink)) => {
                let to = rustix::fs::readlinkat(&theirs, &child, Vec::new())?;
                rustix::fs::symlinkat(to, &ours, &child)?;
            }
            _ => {}
        }
    }
    Ok(places)
}

/// Whether gpurun's directory stands for itself, because the user may not look into the host's. overlayfs knows that mark
/// below a lower directory, not on it.
fn is_opaque(at: &OwnedFd, name: &OsString) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
        .and_then(|directory| rustix::fs::fgetxattr(&directory, "user.overlay.opaque", &mut [0u8; 1][..]))
        .is_ok()
}

fn names(directory: &OwnedFd) -> rustix::io::Result<BTreeSet<OsString>> {
    use std::os::unix::ffi::OsStringExt;
    let entries = rustix::fs::Dir::read_from(directory)?;
    let names = entries.map(|entry| entry.map(|e| OsString::from_vec(e.file_name().to_bytes().to_vec())));
    let mut names = names.collect::<rustix::io::Result<BTreeSet<_>>>()?;
    names.retain(|name| name != "." && name != "..");
    Ok(names)
}

fn kind(at: &OwnedFd, name: &OsString) -> Option<FileType> {
    let stat = rustix::fs::statat(at, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}
