//! A container's root: read through its layers before it is mounted, written through descriptors afterwards.
//!
//! Image paths are never joined to host paths. A path of the image, including its links, is resolved beneath a descriptor of
//! its root, so that no link leads out of the image.
//!
//! * [`Layers`] reads a root, mounted or not.
//! * [`Mounts`] records the mounts over a root and looks up paths: a path is on the root itself, on a file system in memory,
//!   or on a volume.
//! * [`Root`] writes into a mounted root.

mod layers;
mod mounts;
mod root;

pub use layers::{Found, Layers, Resolved};
pub use mounts::{DirectoryPlace, Kind, Mounts, Outside, Place};
pub use root::{Root, not_plain, open_host_directory};

use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, Stat},
    io::Errno,
};
use std::fs::File;

/// Opens a name of a directory with O_PATH and stats it. No driver is called, and a link is not followed.
pub fn look_at(directory: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<(OwnedFd, Stat)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    Ok((found, stat))
}

/// Opens the regular file behind a descriptor of [`look_at`] for reading.
///
/// The name is not resolved again: it may lead to a device node by now, and opening a device node uses the device.
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
