//! The configuration: each key's meaning and default, once.
#![forbid(unsafe_code)]

use crate::{
    error::{Code, OrFail, Result},
    plan::Policy,
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
    /// Size of /dev/shm where nobody says otherwise: a size, or `auto` for half of memory.
    pub shm_size: Option<String>,
    /// Driver capabilities that containers may have: `compute,utility`; `all` is the default.
    pub supported_driver_capabilities: Option<String>,
    /// Whether `NVIDIA_REQUIRE_*` and CUDA versions go unchecked.
    pub disable_require: bool,
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
