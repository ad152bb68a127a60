//! `--oom-score-adj` and `--sysctl`. The container's first process writes both into the host's /proc, for itself and its own
//! namespaces.
//!
//! The files of /proc/sys for IPC and network show the namespaces of the process that opens them (ipc/ipc_sysctl.c,
//! net/sysctl_net.c), so no /proc of the container is needed.

use super::spec::Container;
use crate::error::{Code, Error, Result};
use std::{fs::OpenOptions, io, io::Write, path::Path};

/// Writes the requested values, if any.
pub fn apply(container: &Container) -> Result<()> {
    if let Some(score) = container.process.oom_score_adj {
        write(Path::new("/proc/self/oom_score_adj"), &score.to_string()).map_err(|error| {
            Error::new(Code::Limit, format!("--oom-score-adj {score} cannot be set")).cause(error).fix(
                "only root with CAP_SYS_RESOURCE may lower it: write a number that is not below /proc/self/oom_score_adj, or start \
                 gpurun as root",
            )
        })?;
    }
    for (name, value) in &container.sysctls {
        // A slash in a name stands for a dot in the name of a network interface (sysctl(8)).
        let path = name.replace('.', "\0").replace('/', ".").replace('\0', "/");
        write(&Path::new("/proc/sys").join(path), value).map_err(|error| {
            let fix = if error.kind() == io::ErrorKind::NotFound {
                "`sysctl -a` lists the names; load the module that has it".to_owned()
            } else {
                format!("write a value that the kernel accepts: `sysctl {name}` shows the current one; some need gpurun as root")
            };
            Error::new(Code::Limit, format!("--sysctl {name}={value} cannot be set")).cause(error).fix(fix)
        })?;
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}
