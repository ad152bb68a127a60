//! The installed containerd: its version and effective configuration.

use super::{Registration, containerd};
use crate::error::{Code, Error, OrFail, Result};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Directories of containerd besides PATH: k3s and RKE2 ship their own.
const DIRECTORIES: [&str; 4] =
    ["/usr/local/bin", "/usr/bin", "/var/lib/rancher/k3s/data/current/bin", "/var/lib/rancher/rke2/bin"];

/// containerd's program.
#[derive(Debug)]
pub struct Containerd(PathBuf);

impl Containerd {
    /// The first containerd in PATH or in the usual directories.
    pub fn find() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).chain(DIRECTORIES.map(PathBuf::from));
        let mut programs = dirs.filter(|dir| dir.is_absolute()).map(|dir| dir.join("containerd"));
        programs.find(|program| super::is_executable(program)).map(Self)
    }

    /// Major and minor version: `containerd github.com/containerd/containerd/v2 2.1.9 …`.
    pub fn version(&self) -> Option<(u32, u32)> {
        let text = self.output(&["--version"]).ok()?;
        let number = text.split_whitespace().nth(2)?.trim_start_matches('v');
        let mut parts = number.split(['.', '-', '~', '+']).map(|part| part.parse().ok());
        Some((parts.next()??, parts.next()??))
    }

    /// The whole configuration, with every import, as containerd reads it from this file.
    ///
    /// # Errors
    /// [`Code::Config`] with containerd's own message if it refuses the file.
    pub fn dump(&self, file: &Path) -> Result<String> {
        self.output(&["--config", &file.to_string_lossy(), "config", "dump"])
    }

    /// Fails if containerd does not read the runtime from this file, and warns if other settings prevent its use.
    ///
    /// # Errors
    /// [`Code::Config`], with a fix.
    pub fn verify(&self, file: &Path, wanted: &Registration) -> Result<()> {
        let name = file.display();
        let refused = |error: Error| {
            error.context(format!("containerd does not understand {name} with the runtime in it"))
        };
        let dump = self.dump(file).map_err(refused)?;
        let off = containerd::check(&dump, wanted).map_err(|why| {
            Error::new(Code::Config, format!("containerd does not take the runtime from {name}"))
                .cause(why)
                .fix(format!("compare with `containerd --config {name} config dump`: every imported file needs the version of {name}"))
        })?;
        for what in off {
            tracing::warn!("containerd: {what}");
        }
        Ok(())
    }

    fn output(&self, words: &[&str]) -> Result<String> {
        let failed = || format!("{} {} failed", self.0.display(), words.join(" "));
        let fix = || format!("run {} {}", self.0.display(), words.join(" "));
        let run = Command::new(&self.0).args(words).output().or_fail(Code::Config, failed);
        let output = run.map_err(|error| error.fix(fix()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().last().unwrap_or_default();
        Err(Error::new(Code::Config, failed())
            .cause(last)
            .fix("take what it names out of the file; `containerd config default` begins with the newest version that it reads"))
    }
}
