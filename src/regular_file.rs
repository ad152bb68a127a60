//! Opens regular files in places where users, images or containers may have put something else.
//!
//! open(2) of a device node calls its driver, which may act: a tape rewinds, a watchdog starts. open(2) of a FIFO wakes the
//! process at its other end. O_NONBLOCK prevents neither. So a path is first opened with O_PATH, which calls no driver, and only
//! a regular file is then opened for reading, by that descriptor: the name may lead to something else by then.
//!
//! A descriptor is opened again through /proc/self/fd, which every caller has.
#![forbid(unsafe_code)]

use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{FileType, Mode, OFlags, Stat},
    io::Errno,
};
use std::{fs::File, io};

/// Opens a name of a directory with O_PATH and stats it. A link is not followed.
pub fn look_at(directory: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<(OwnedFd, Stat)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    Ok((found, stat))
}

/// Opens the object behind an O_PATH descriptor with `flags`. The caller has checked its kind.
pub fn reopen(found: impl AsFd, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let name = format!("/proc/self/fd/{}", found.as_fd().as_raw_fd());
    match rustix::fs::open(name, flags | OFlags::CLOEXEC, Mode::empty()) {
        // There is no /proc. As ENOENT it would mean an absent file, which many callers take for an empty one.
        Err(Errno::NOENT) => Err(Errno::NOSYS),
        result => result,
    }
}

/// Opens the regular file behind an O_PATH descriptor for reading.
///
/// # Errors
/// Errors of the system; or a sentence, if the object is of another kind.
pub fn open(found: impl AsFd) -> io::Result<(File, Stat)> {
    let stat = rustix::fs::fstat(&found)?;
    check(&stat)?;
    Ok((File::from(reopen(found, OFlags::RDONLY)?), stat))
}

/// Whether this is a regular file.
///
/// # Errors
/// A sentence that names the other kind.
pub fn check(stat: &Stat) -> io::Result<()> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Symlink => "a link",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "a special file",
    };
    Err(io::Error::other(format!("it is {kind}, not a regular file")))
}
