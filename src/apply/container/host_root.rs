//! `host:` for a launcher without root. In its user namespace the mounts below `/` are locked to it (mount_namespaces(7),
//! "Restrictions on mount namespaces"), and overlayfs takes no lower directory with such mounts. The directories in `/` have
//! none, as a rule, so each gets an overlay of its own on a root in memory.

use super::{assembly, enter::directory_in, enter::overlay, spec::Container};
use crate::{
    apply::rootfs::{Root, open_host_directory},
    error::{Code, OrFail, Result},
    sys::mount::{Flags, restrict},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FileType, OFlags},
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
    let memory = assembly::new_filesystem("tmpfs", &[("mode", "0755".into())], flags)?;
    assembly::attach(&memory, &open_host_directory(target).or_fail(Code::Mount, failed)?, target)?;
    let root = Root::new(memory);
    let host = open_host_directory(Path::new("/")).or_fail(Code::Mount, failed)?;
    let empty = directory_in(root.as_fd(), ".gpurun-empty")?;
    for name in names(&host).or_fail(Code::Mount, failed)?.union(&names(added).or_fail(Code::Mount, failed)?)
    {
        let path = Path::new("/").join(name);
        let (ours, theirs) = (kind(added, name), kind(&host, name));
        let from_host = theirs == Some(FileType::Directory) && !NOT_THE_HOSTS.iter().any(|own| name == own);
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
                    .map(|(_, at)| rustix::fs::openat(at, name, flags, rustix::fs::Mode::empty()))
                    .collect::<rustix::io::Result<Vec<_>>>()
                    .or_fail(Code::Mount, failed)?;
                // overlayfs wants two where it has no upper one.
                lowers.push(empty.try_clone().or_fail(Code::Mount, failed)?);
                let text = name.to_string_lossy();
                let place = writable
                    .map(|at| {
                        Ok((
                            directory_in(at, &format!("upper-{text}"))?,
                            directory_in(at, &format!("work-{text}"))?,
                        ))
                    })
                    .transpose()?;
                if let (Some((upper, _)), Some(top)) = (&place, lowers.first()) {
                    // /tmp is everyone's, a home its owner's: overlayfs shows the permissions of the upper directory.
                    let mode = rustix::fs::fstat(top).or_fail(Code::Mount, failed)?.st_mode & 0o7777;
                    rustix::fs::fchmod(upper, rustix::fs::Mode::from_raw_mode(mode | 0o700))
                        .or_fail(Code::Mount, failed)?;
                }
                let point = root.directory(&path)?;
                match overlay(container, &lowers, place.as_ref(), &target.join(name)) {
                    Ok(()) => {}
                    // It has mounts of its own after all: all of it as it is, to be read.
                    Err(Errno::INVAL) if ours.is_none() => {
                        let read_only = Flags { read_only: true, nosuid: true, nodev: true, noexec: false };
                        let tree = assembly::clone_of_host(&path, true, read_only)?;
                        assembly::attach(&tree, &point, &path)?;
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
