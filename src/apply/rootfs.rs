//! A container's root: read through its layers before it is mounted, written through descriptors afterwards.
//!
//! No path of the image is joined to a path of the host. A path of the image is resolved beneath a descriptor of its root, links
//! included, so that no link of an image leads out of it.
//!
//! * [`Layers`] reads a root, mounted or not.
//! * [`Mounts`] knows what lies over a root and answers what stands at a path of it: the root's own files, a file system in
//!   memory, or a volume.
//! * [`Root`] writes into a mounted root.

mod layers;
mod mounts;
mod root;

pub use layers::{Found, Layers, Resolved};
pub use mounts::{DirectoryPlace, Kind, Mounts, Outside, Place};
pub use root::{Root, open_host_directory};

use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, Stat},
    io::Errno,
};
use std::fs::File;

/// Opens a name of a directory to look at it. Nothing is read, no driver is called, and a link is not followed.
pub fn look_at(directory: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<(OwnedFd, Stat)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    Ok((found, stat))
}

/// Opens the regular file behind a descriptor of [`look_at`] for reading.
///
/// The name is not used a second time: opening a device node is using the device, and a name that was a regular file a moment ago
/// may be a device node now.
///
/// # Errors
/// `EINVAL` when it is not a regular file.
pub fn open_seen(found: BorrowedFd<'_>, stat: &Stat) -> rustix::io::Result<File> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let name = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::open(name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}
