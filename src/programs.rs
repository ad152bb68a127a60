//! gpurun's other programs: each does what the static one on the start path cannot.
#![forbid(unsafe_code)]

use crate::error::{Code, Error, OrFail, Result};
use std::path::{Path, PathBuf};

/// Where packages install them.
const LIBEXEC: &str = "/usr/libexec/gpurun";

/// Finds one: beside this program's own file, else where packages install it. No variable names it, because root runs it.
///
/// # Errors
/// With this code when it is at neither place.
pub fn find(name: &str, code: Code) -> Result<PathBuf> {
    let own = std::env::current_exe().or_fail(Code::Internal, || "/proc/self/exe cannot be read")?;
    let places = [own.parent().unwrap_or(Path::new("/")), Path::new(LIBEXEC)].map(|dir| dir.join(name));
    places.iter().find(|place| place.is_file()).cloned().ok_or_else(|| {
        Error::new(code, format!("gpurun's own program {name} was not found"))
            .cause(format!("it is neither {} nor {}", places[0].display(), places[1].display()))
            .fix(format!("install {name} beside gpurun, as its packages do"))
    })
}
