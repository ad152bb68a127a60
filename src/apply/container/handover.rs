//! The step between the launcher's child and the command of a container, where the command's user could change gpurun's own file.
//!
//! While a process executes a command, /proc/self/exe is still the program that it was. A command that is a script with the first
//! line `#!/proc/self/exe` makes the kernel open that file, and the container's root could then write it (CVE-2019-5736). So the
//! child first executes a small program, [`crate::sys::handover`], from a file in the container's own memory file system. That
//! program executes the command. What a container does to this file changes no other container and nothing of the host.

use super::{
    channel::Channel,
    command::{Command, TOO_LONG},
    spec::Process,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    sys::{handover::PROGRAM, process},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{Mode, OFlags},
};
use std::{
    ffi::{CStr, CString},
    fs::File,
    io::Write,
    os::fd::AsRawFd,
};

const NAME: &CStr = c"gpurun-handover";

/// Whether the container's user could write gpurun's own file, or make it setuid.
pub fn is_needed(process: &Process) -> Result<bool> {
    let stat =
        rustix::fs::stat("/proc/self/exe").or_fail(Code::Internal, || "gpurun's own file is not there")?;
    let user = &process.user;
    // The owner as this user namespace has it. The group's bits also bound those of access control lists.
    Ok(user.uid == 0 || stat.st_uid == user.uid || stat.st_mode & 0o022 != 0)
}

/// Writes the program to the container's memory file system, which is not part of its root.
pub fn place(memory: &OwnedFd) -> Result<OwnedFd> {
    let failed = || "the program that starts the command cannot be written";
    let open = |flags| {
        rustix::fs::openat(memory, NAME, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o555))
            .or_fail(Code::Internal, failed)
    };
    let file = open(OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY)?;
    File::from(file).write_all(PROGRAM).or_fail(Code::Internal, failed)?;
    open(OFlags::PATH)
}

/// Executes the program, which executes the command. Returns only the failure.
pub fn execute(program: &OwnedFd, command: Command, channel: &Channel) -> Error {
    // The program closes the channel when it executes the command.
    if let Err(errno) = rustix::io::fcntl_setfd(channel.as_fd(), rustix::io::FdFlags::empty()) {
        return Error::new(Code::Internal, "the launcher's descriptor cannot be kept").cause(errno);
    }
    let Command { paths, argv, env } = command;
    let number = |number: usize| CString::new(number.to_string()).unwrap_or_default();
    let descriptor = usize::try_from(channel.as_fd().as_raw_fd()).unwrap_or_default();
    let mut words = vec![NAME.into(), number(descriptor), number(paths.len())];
    words.extend(paths);
    words.extend(argv);
    let error = process::fexecve(program.as_fd(), &words, &env);
    let is_too_long = error.raw_os_error() == Some(libc::E2BIG);
    let error =
        Error::new(Code::CannotRun, "the program that starts the command cannot be executed").cause(error);
    if is_too_long { error.fix(TOO_LONG) } else { error }
}
