//! The configuration: each key's meaning and default, once.
#![forbid(unsafe_code)]

use crate::{
    error::{Code, OrFail, Result},
    plan::Policy,
    request::Accepted,
    vocabulary::DriverCapability,
};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Read when no other file is named; it need not be there.
pub const DEFAULT_FILE: &str = "/etc/gpurun/config.toml";

/// The file's keys. A key that is not here is an error: a misspelt one must not be ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Where the driver's files are.
    pub driver_root: Option<PathBuf>,
    /// Where its device nodes are.
    pub dev_root: Option<PathBuf>,
    /// Size of /dev/shm where nobody says otherwise: a size, `auto` for half of memory (the default), or `keep` for what the
    /// engine chose (64 MB, as a rule).
    pub shm_size: Option<String>,
    /// Driver capabilities that containers may have: `compute,utility`; `all` is the default.
    pub supported_driver_capabilities: Option<String>,
    /// Whether `NVIDIA_REQUIRE_*` and CUDA versions go unchecked.
    pub disable_require: bool,
    /// Low-level OCI runtimes, by path or by name in PATH; the first that is there is used. `runc`, then `crun` by default.
    pub runtimes: Option<Vec<String>>,
    /// Whether a container's own environment may ask for GPUs if it is not privileged. An image can say
    /// `NVIDIA_VISIBLE_DEVICES=all` to an engine by itself, so a cluster that shares nodes says no; the default is yes.
    pub accept_nvidia_visible_devices_envvar_when_unprivileged: Option<bool>,
    /// Whether mounts of /dev/null below /var/run/nvidia-container-devices ask for GPUs: a user of a cluster can name a variable
    /// but not such a mount.
    pub accept_nvidia_visible_devices_as_volume_mounts: bool,
    /// What the keys of annotations that ask for GPUs begin with; `cdi.k8s.io/` by default.
    pub annotation_prefixes: Option<Vec<String>>,
    /// Whether an engine's GPU container may run as uid 0.
    pub nonroot: Nonroot,
}

/// `nonroot`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nonroot {
    /// It runs as whom the engine says.
    #[default]
    Keep,
    /// One that would run as uid 0 is refused.
    Require,
}

impl Config {
    /// Reads `file`, or the default one if it is there.
    pub fn load(file: Option<&Path>) -> Result<Self> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .map_err(|error| error.context(format!("{} cannot be used", path.display()))),
            Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(error) => Err(error).or_fail(Code::Config, || format!("{} cannot be read", path.display())),
        }
    }

    /// Reads the text of a configuration file.
    pub fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            crate::error::Error::new(Code::Config, "the configuration is not understood")
                .cause(error.message())
                .fix("gpurun's README lists the keys")
        })
    }

    /// Who may ask an engine's container for GPUs.
    pub fn accepted(&self) -> Accepted {
        let default = Accepted::default();
        Accepted {
            annotation_prefixes: self.annotation_prefixes.clone().unwrap_or(default.annotation_prefixes),
            volume_mounts: self.accept_nvidia_visible_devices_as_volume_mounts,
            unprivileged_environment: self
                .accept_nvidia_visible_devices_envvar_when_unprivileged
                .unwrap_or(default.unprivileged_environment),
        }
    }

    /// What the administrator allows.
    pub fn policy(&self) -> Result<Policy> {
        let mut policy = Policy { disable_require: self.disable_require, ..Policy::default() };
        if let Some(names) = &self.supported_driver_capabilities {
            let allowed = crate::request::capability::parse(names, "supported-driver-capabilities", &[])?;
            policy.supported_capabilities = allowed.unwrap_or(DriverCapability::empty());
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_or_refused() {
        let config = Config::parse("driver-root = \"/run/nvidia/driver\"\nshm-size = \"8g\"\n").unwrap();
        assert_eq!(config.driver_root.as_deref(), Some(Path::new("/run/nvidia/driver")));
        let message = Config::parse("drivr-root = \"/\"").unwrap_err().to_string();
        assert!(message.starts_with("error[GPU-0002]") && message.contains("drivr-root"), "{message}");
    }
}
