//! The step between the launcher's child and the user's command, where the command's user could change gpurun's own file.
//!
//! Whoever execs a hostile command must not have a file behind /proc/self/exe that this command may write: the kernel opens it
//! for `#!/proc/self/exe` (CVE-2019-5736). So the child first execs gpurun again, from a read-only mount, and that execs the
//! command. Nobody pays for it who could not change the file anyway.

use super::{channel::Channel, enter};
use crate::{
    error::{Code, Error, OrFail, Result},
    sys::process,
};
use std::{
    ffi::{CStr, CString, OsStr},
    os::{
        fd::{AsFd, AsRawFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
};

/// As what gpurun is called when all that is left to do is to exec the command.
pub const HANDOVER_NAME: &CStr = c"gpurun-handover";

/// The words before the command's own. Leaves the channel open for the program that they start.
pub fn words(channel: &Channel) -> Result<Vec<CString>> {
    rustix::io::fcntl_setfd(channel.as_fd(), rustix::io::FdFlags::empty())
        .or_fail(Code::Internal, || "the launcher's descriptor cannot be kept")?;
    let number = CString::new(channel.as_fd().as_raw_fd().to_string())
        .or_fail(Code::Internal, || "a number holds a NUL")?;
    Ok(vec![HANDOVER_NAME.into(), number])
}

/// Becomes the command in `arguments`, whose first word is the number of the launcher's descriptor. Returns the exit code
/// of a failure, which the launcher has been told.
///
/// # Errors
/// When there is no launcher.
pub fn run(arguments: &[CString]) -> Result<u8> {
    let [number, argv @ ..] = arguments else {
        return Err(Error::new(Code::Usage, "there is no command to run"));
    };
    let number = number.to_str().ok().and_then(|number| number.parse().ok()).unwrap_or(-1);
    let channel = Channel::inherited(number)?;
    // Rust's runtime ignores SIGPIPE, and the command would inherit that.
    process::reset_signals();
    let error = become_command(argv);
    channel.send_failure(&error);
    Ok(error.code().exit_code())
}

/// execve(2) of the command with this program's own environment. Returns only its failure.
pub fn become_command(argv: &[CString]) -> Error {
    let Some(command) = argv.first() else {
        return Error::new(Code::Usage, "there is no command to run");
    };
    let env: Vec<CString> = std::env::vars_os()
        .filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok())
        .collect();
    let path = std::env::var("PATH").unwrap_or_default();
    let name = OsStr::from_bytes(command.to_bytes());
    let candidates = enter::candidates(name, &path);
    let candidates: Vec<CString> =
        candidates.into_iter().filter_map(|c| CString::new(c.into_os_string().into_vec()).ok()).collect();
    enter::run_first(name, &candidates, argv, &env)
}
