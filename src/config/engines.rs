//! `engines.toml`: the low-level runtime that each engine uses without gpurun, recorded by `gpurun configure`.
//!
//! An engine configures a runtime by one path, without a field for the low-level runtime below it. CRI-O keeps crun outside
//! of PATH, and Docker or containerd may use crun by default, so gpurun records it in its own file beside its configuration.
//! The administrator's `runtimes` takes precedence, and NVIDIA's config.toml stays effective.
//!
//! The runtime recognises the engine by `--root`, the state directory that an engine gives in every call for a container's whole
//! life: `start` and `delete` reach the same low-level runtime as `create`.

use super::DEFAULT_FILE;
use crate::{
    error::{Code, Error, OrFail, Result},
    text_file::TextFile,
};
use serde::Deserialize;
use std::{
    fmt::Write,
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// The longest file that is read, in bytes.
const MAX: u64 = 1 << 20;

/// A container engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerEngine {
    /// dockerd
    Docker,
    /// containerd, through its CRI, nerdctl or ctr
    Containerd,
    /// CRI-O
    Crio,
    /// Podman
    Podman,
}

impl ContainerEngine {
    /// The engine that gives its runtime this state directory: Docker `…/docker/runtime-NAME/moby`, containerd
    /// `/run/containerd/runc/NAMESPACE`, CRI-O the `runtime_root` of its handler, Podman none.
    pub fn of_state_directory(root: Option<&Path>) -> Self {
        let Some(root) = root else { return Self::Podman };
        let has = |name: &str| root.components().any(|part| part.as_os_str() == name);
        if has("docker") || has("moby") {
            Self::Docker
        } else if has("containerd") {
            Self::Containerd
        } else {
            Self::Crio
        }
    }
}

/// The content of the file.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineRuntimes {
    docker: Option<PathBuf>,
    containerd: Option<PathBuf>,
    crio: Option<PathBuf>,
    podman: Option<PathBuf>,
}

impl EngineRuntimes {
    /// The file: engines.toml beside the configuration file that `GPURUN_CONFIG` names, or in /etc/gpurun.
    pub fn file() -> PathBuf {
        let named = std::env::var_os("GPURUN_CONFIG").filter(|name| !name.is_empty()).map(PathBuf::from);
        named.unwrap_or_else(|| DEFAULT_FILE.into()).with_file_name("engines.toml")
    }

    /// Reads the file; an absent one is empty.
    ///
    /// # Errors
    /// [`Code::Config`] when it cannot be read or understood.
    pub fn load() -> Result<Self> {
        let path = Self::file();
        match TextFile::read(&path, MAX) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Ok(Self::default())
            }
            read => read
                .and_then(|file| Ok(file.text()?.to_owned()))
                .or_fail(Code::Config, || "it cannot be read")
                .and_then(|text| Self::parse(&text)),
        }
        .map_err(|error| {
            error
                .context(format!("{} cannot be used", path.display()))
                .fix("move it away, and run `gpurun configure ENGINE` again")
        })
    }

    /// Reads the text of the file.
    ///
    /// # Errors
    /// [`Code::Config`] when it is not understood.
    pub fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| {
            Error::new(Code::Config, "it is not a list of engines").cause(super::place(text, &error))
        })
    }

    /// The low-level runtime of an engine.
    pub fn of(&self, engine: ContainerEngine) -> Option<&Path> {
        match engine {
            ContainerEngine::Docker => self.docker.as_deref(),
            ContainerEngine::Containerd => self.containerd.as_deref(),
            ContainerEngine::Crio => self.crio.as_deref(),
            ContainerEngine::Podman => self.podman.as_deref(),
        }
    }

    /// Sets or removes the low-level runtime of an engine.
    pub fn set(&mut self, engine: ContainerEngine, runtime: Option<PathBuf>) {
        *match engine {
            ContainerEngine::Docker => &mut self.docker,
            ContainerEngine::Containerd => &mut self.containerd,
            ContainerEngine::Crio => &mut self.crio,
            ContainerEngine::Podman => &mut self.podman,
        } = runtime;
    }

    /// Every recorded runtime.
    pub fn all(&self) -> impl Iterator<Item = &Path> {
        [&self.docker, &self.containerd, &self.crio, &self.podman].into_iter().flatten().map(PathBuf::as_path)
    }

    /// The text of the file; `None` if it has no entries.
    pub fn text(&self) -> Option<String> {
        self.all().next()?;
        let mut text = String::from(
            "# Written by `gpurun configure`: the low-level runtime that each engine uses without gpurun.\n\
             # `runtimes` in config.toml takes precedence.\n",
        );
        for (name, path) in [
            ("docker", &self.docker),
            ("containerd", &self.containerd),
            ("crio", &self.crio),
            ("podman", &self.podman),
        ] {
            if let Some(path) = path {
                let _ = writeln!(text, "{name} = {}", toml::Value::from(path.to_string_lossy().as_ref()));
            }
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_known_by_its_state_directory() {
        for (root, engine) in [
            (Some("/var/run/docker/runtime-runc/moby"), ContainerEngine::Docker),
            (Some("/run/user/1000/docker/runtime-gpurun/moby"), ContainerEngine::Docker),
            (Some("/run/containerd/runc/moby"), ContainerEngine::Docker),
            (Some("/run/containerd/runc/k8s.io"), ContainerEngine::Containerd),
            (Some("/run/containerd/runc/default"), ContainerEngine::Containerd),
            (Some("/run/crun"), ContainerEngine::Crio),
            (Some("/run/runc"), ContainerEngine::Crio),
            (None, ContainerEngine::Podman),
        ] {
            assert_eq!(ContainerEngine::of_state_directory(root.map(Path::new)), engine, "{root:?}");
        }
    }

    #[test]
    fn recorded_runtimes_are_read_back() {
        let mut notes = EngineRuntimes::default();
        assert_eq!(notes.text(), None);
        notes.set(ContainerEngine::Crio, Some("/usr/libexec/crio/crun".into()));
        notes.set(ContainerEngine::Docker, Some("/opt/a \"b\"/crun".into()));
        let text = notes.text().unwrap();
        assert_eq!(EngineRuntimes::parse(&text).unwrap(), notes, "{text}");
        notes.set(ContainerEngine::Docker, None);
        notes.set(ContainerEngine::Crio, None);
        assert_eq!(notes.text(), None);
        let error = EngineRuntimes::parse("# x\ncrio = 1\n").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
