//! The device nodes that every GPU container shares, where nvidia-modprobe has not made them: on a host whose driver is in a
//! container, or before the first program that uses a GPU.

use crate::{
    error::{Code, Error, OrFail, Result},
    inventory::{DriverRoot, HostPath},
};
use rustix::fs::{CWD, FileType, Mode, makedev};
use std::{path::Path, process::Command};

/// The command that loads a module of the driver's; its root may be a directory of the host's.
pub fn modprobe(root: &DriverRoot, module: &str) -> Vec<String> {
    let chroot = (root.0 != Path::new("/")).then(|| ["chroot".to_owned(), root.0.display().to_string()]);
    chroot.into_iter().flatten().chain(["/sbin/modprobe".to_owned(), module.to_owned()]).collect()
}

/// Runs it.
pub fn run(command: &[String]) -> Result<()> {
    let failed = || format!("`{}` failed", command.join(" "));
    let [program, words @ ..] = command else { return Ok(()) };
    let ended = Command::new(program).args(words).output().or_fail(Code::NoDriver, failed)?;
    if ended.status.success() {
        return Ok(());
    }
    Err(Error::new(Code::NoDriver, failed()).cause(String::from_utf8_lossy(&ended.stderr).trim()))
}

/// Makes a node that everyone may open, as nvidia-modprobe does: the driver itself decides who may do what.
pub fn make(path: &HostPath, major: u32, minor: u32) -> Result<()> {
    let mode = Mode::from_raw_mode(0o666);
    let made = rustix::fs::mknodat(CWD, &path.0, FileType::CharacterDevice, mode, makedev(major, minor))
        // The process' umask has taken of it.
        .and_then(|()| rustix::fs::chmod(&path.0, mode));
    made.or_fail(Code::DeviceNodeMissing, || format!("{} cannot be made", path.0.display()))
}
