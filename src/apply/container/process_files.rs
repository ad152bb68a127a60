//! Files of other processes, `/proc/PID/…`, by the numbers that this process knows.
//!
//! /proc has the numbers of the pid namespace that it was mounted for. After `unshare --pid` or `nsenter --mount` that is not the
//! namespace of gpurun, and a number leads to a different process. The supervisor of Unix sockets writes to the memory of the
//! container's processes: through such a /proc it would write to the memory of any process of the host.

use crate::{apply::mount, error::Result};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use std::{
    fs::File,
    io::{self, Read},
};

/// A procfs of the pid namespace of this process.
#[derive(Debug)]
pub struct ProcessFiles(OwnedFd);

impl ProcessFiles {
    /// Opens /proc, or a procfs that is mounted nowhere if /proc shows another pid namespace.
    ///
    /// # Errors
    /// If that is not allowed: it needs CAP_SYS_ADMIN over the pid namespace.
    pub fn open() -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat(CWD, "/proc", flags, Mode::empty()) {
            Ok(mounted) if shows_own_namespace(&mounted) => Ok(Self(mounted)),
            _ => mount::new_filesystem("proc", &[], mount::NOTHING).map(Self),
        }
    }

    /// Opens the file `name` of a process.
    pub fn file(&self, pid: u32, name: &str, flags: OFlags) -> rustix::io::Result<File> {
        openat(&self.0, format!("{pid}/{name}"), flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
    }

    /// Reads the file `name` of a process.
    pub fn read(&self, pid: u32, name: &str) -> io::Result<String> {
        read_text(self.file(pid, name, OFlags::RDONLY)?)
    }
}

/// Reads a file of a process. The name of a process in its status is any bytes, and a long name is cut within a letter.
fn read_text(mut file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether /proc has the numbers that this process knows.
pub fn is_own_proc() -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, "/proc", flags, Mode::empty()).is_ok_and(shows_own_namespace)
}

/// Whether a procfs has the numbers that this process knows: NSpid lists the number of a process in the procfs' namespace and in
/// each one below it (proc_pid_status(5)).
fn shows_own_namespace(proc: impl AsFd) -> bool {
    let status = openat(proc, "self/status", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let Ok(status) = status.map_err(io::Error::from).and_then(|file| read_text(file.into())) else {
        return false;
    };
    status_line(&status, "NSpid").is_ok_and(|numbers| numbers.split_whitespace().count() == 1)
}

/// The value of a line of /proc/PID/status.
pub fn status_line<'a>(status: &'a str, name: &str) -> rustix::io::Result<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':').map(str::trim);
    status.lines().find_map(value).ok_or(Errno::SRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_number() {
        let files = ProcessFiles::open().unwrap();
        let own = std::process::id();
        let status = files.read(own, "status").unwrap();
        assert_eq!(status_line(&status, "Pid").unwrap(), own.to_string());
        assert_eq!(status_line(&status, "Pi"), Err(Errno::SRCH));
        assert!(files.read(u32::MAX, "status").is_err());
    }
}
