//! Directories from environment variables, if they belong to the caller.
//!
//! After `su` and `sudo -u` XDG_RUNTIME_DIR, XDG_DATA_HOME and HOME may still name directories of the previous user. gpurun
//! could not write there, or its files would belong to the wrong user. Such a variable counts as unset.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The directory in a variable, if it is absolute and belongs to the caller. For a missing directory the nearest existing
/// parent decides, which may also belong to root.
pub fn named_by(variable: &str) -> Option<PathBuf> {
    let directory = std::env::var_os(variable).map(PathBuf::from)?;
    (directory.is_absolute() && is_callers(&directory)).then_some(directory)
}

fn is_callers(directory: &Path) -> bool {
    let caller = rustix::process::geteuid().as_raw();
    match std::fs::metadata(directory) {
        Ok(found) => found.uid() == caller,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let above = directory.ancestors().skip(1).find_map(|above| std::fs::metadata(above).ok());
            above.is_some_and(|above| [0, caller].contains(&above.uid()))
        }
        Err(_) => false,
    }
}
