//! `--security-opt`.

use super::usage;
use crate::error::Result;

/// Whether the system call filter is on.
pub fn seccomp(options: &[String]) -> Result<bool> {
    let mut on = true;
    for option in options {
        match option.replace(':', "=").as_str() {
            "seccomp=unconfined" => on = false,
            "seccomp=builtin" | "no-new-privileges" | "no-new-privileges=true" => {}
            _ => {
                return Err(usage(format!("--security-opt {option:?} is not known"))
                    .fix("seccomp=unconfined turns the filter off; no-new-privileges is always on"));
            }
        }
    }
    Ok(on)
}
