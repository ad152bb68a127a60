//! The user's command: the paths at which it may be, execve(2), and what its failure means.

use super::spec::Process;
use crate::{
    error::{Code, Error, Result},
    sys::process,
};
use rustix::fs::{Access, AtFlags, CWD};
use std::{
    ffi::{CString, OsStr},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// What to do about E2BIG (execve(2), "Limits on size of arguments and environment").
pub const TOO_LONG: &str = "shorten it: one argument or variable may have 128 KiB, and all together a quarter of the stack's limit (`ulimit -s`); \
                            pass more in a file: -v ./FILE:/FILE";

/// A command as execve(2) takes it.
#[derive(Debug)]
pub struct Command {
    /// The paths at which it may be, in the order in which they are tried.
    pub paths: Vec<CString>,
    /// Its words.
    pub argv: Vec<CString>,
    /// Its environment, as NAME=VALUE.
    pub env: Vec<CString>,
}

impl Command {
    /// The command of a container.
    ///
    /// # Errors
    /// If a word or a variable contains NUL.
    pub fn of(process: &Process) -> Result<Self> {
        let env = &process.env;
        let path = env.iter().rev().find(|(name, _)| name == "PATH").map_or("", |(_, value)| value.as_str());
        Ok(Self {
            paths: paths(&process.argv[0], path).iter().map(c_string).collect::<Result<_>>()?,
            argv: process.argv.iter().map(c_string).collect::<Result<_>>()?,
            env: env
                .iter()
                .map(|(name, value)| c_string(format!("{name}={value}")))
                .collect::<Result<_>>()?,
        })
    }

    /// Becomes the command. Returns only the failure.
    pub fn execute(&self) -> Error {
        let mut refused = None;
        for (index, path) in self.paths.iter().enumerate() {
            let error = process::execve(path, &self.argv, &self.env);
            if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) {
                refused.get_or_insert((index, error.raw_os_error().unwrap_or(libc::EINVAL)));
            }
        }
        let exists = |path: &CString| {
            rustix::fs::accessat(CWD, path.as_c_str(), Access::EXISTS, AtFlags::empty()).is_ok()
        };
        let (path, errno) = match refused {
            Some((index, errno)) => (Some(index), errno),
            None => (self.paths.iter().position(exists), libc::ENOENT),
        };
        self.failure(path, errno)
    }

    /// The failure of execve(2): the index of the first path that could not be executed, `None` if no path exists, and the
    /// error. The error is ENOENT if the file exists, but not its interpreter.
    pub fn failure(&self, path: Option<usize>, errno: i32) -> Error {
        let name = OsStr::from_bytes(self.argv.first().map_or(b"", |name| name.to_bytes()));
        let Some(path) = path.and_then(|index| self.paths.get(index)) else {
            return Error::new(
                Code::CommandNotFound,
                format!("the command \"{}\" was not found in the container", name.display()),
            )
            .fix(if name.as_bytes().contains(&b' ') {
                "write each argument as a word of its own, without quotes around them all: gpurun run IMAGE echo a b; with --entrypoint \
                 they stand behind the image; `sh -c \"…\"` runs a line of a shell"
            } else {
                "check its spelling, or name it with its path; `--entrypoint sh` starts a shell in the image"
            });
        };
        let path = path.to_string_lossy();
        if errno == libc::ENOENT {
            return Error::new(Code::CommandNotFound, format!("{path} cannot be started"))
                .cause("the file is there, but the interpreter or the dynamic loader that it names is not")
                .fix("check its first line (#!) or install the C library that it was built for");
        }
        Error::new(Code::CannotRun, format!("{path} cannot be run"))
            .cause(io::Error::from_raw_os_error(errno))
            .fix(match errno {
                libc::ENOEXEC => "a script needs its interpreter in the first line, such as #!/bin/sh; a program must be for this machine: `gpurun pull --platform linux/amd64 IMAGE`, or linux/arm64, as `uname -m` says",
                libc::EACCES => {
                    "name a program, not a directory, and make it executable for the container's user (chmod +x), not on a mount with noexec"
                }
                libc::E2BIG => TOO_LONG,
                _ => "check the file's type and mode: `gpurun run --entrypoint ls IMAGE -l PATH`",
            })
    }
}

/// The paths at which a command may be: itself, or below each directory of PATH.
pub fn paths(command: &OsStr, path: &str) -> Vec<PathBuf> {
    if command.as_bytes().contains(&b'/') {
        return vec![command.into()];
    }
    let directory = |d: &str| Path::new(if d.is_empty() { "." } else { d }).join(command);
    path.split(':').map(directory).collect()
}

fn c_string(text: impl AsRef<OsStr>) -> Result<CString> {
    let text = text.as_ref();
    CString::new(text.as_bytes()).map_err(|_| {
        Error::new(Code::CannotRun, format!("{} holds a NUL character", text.display()))
            .fix("take the NUL character out of the command or out of the -e option")
    })
}
