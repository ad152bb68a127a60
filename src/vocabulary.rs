//! The field's words that both sides speak: the request asks in them and the inventory answers in them.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

bitflags::bitflags! {
    /// What of the driver a container may use: `NVIDIA_DRIVER_CAPABILITIES` and `--gpus capabilities=…`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct DriverCapability: u8 {
        /// 32-bit libraries of the other capabilities.
        const COMPAT32 = 1;
        /// CUDA and OpenCL.
        const COMPUTE = 2;
        /// X11 display.
        const DISPLAY = 4;
        /// OpenGL and Vulkan.
        const GRAPHICS = 8;
        /// Deep-learning super sampling.
        const NGX = 16;
        /// nvidia-smi and NVML.
        const UTILITY = 32;
        /// Video codecs.
        const VIDEO = 64;
    }
}

impl DriverCapability {
    /// What a container gets that names none.
    pub const DEFAULT: Self = Self::UTILITY.union(Self::COMPUTE);

    /// Their names as users write them.
    pub fn names(self) -> Vec<String> {
        self.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect()
    }
}

/// A dotted version: a driver's (`550.163.01`), CUDA's (`12.4`), a compute capability (`9.0`).
/// Compared number by number; missing numbers count as zero, so `12` equals `12.0`. Printed as it was written,
/// because file names carry the zeros (`libcuda.so.550.163.01`).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    text: String,
    numbers: Vec<u32>,
}

impl Version {
    /// `major.minor`.
    pub fn of(major: u32, minor: u32) -> Self {
        Self { text: format!("{major}.{minor}"), numbers: vec![major, minor] }
    }
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
    /// The first number.
    pub fn major(&self) -> u32 {
        self.numbers.first().copied().unwrap_or(0)
    }
    /// The second number, 0 where there is none.
    pub fn minor(&self) -> u32 {
        self.numbers.get(1).copied().unwrap_or(0)
    }
    fn significant(&self) -> &[u32] {
        let end = self.numbers.iter().rposition(|&n| n != 0).map_or(0, |last| last + 1);
        &self.numbers[..end]
    }
}

impl FromStr for Version {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text
            .split('.')
            .map(|part| if part.bytes().all(|b| b.is_ascii_digit()) { part.parse().ok() } else { None })
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| format!("{text:?} is not a version such as 12.4"))?;
        Ok(Self { text: text.into(), numbers })
    }
}
impl TryFrom<String> for Version {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.text
    }
}
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.significant() == other.significant()
    }
}
impl Eq for Version {}
impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Version {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.significant().cmp(other.significant())
    }
}

/// A feature whose device nodes a container gets only when it asks by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GatedFeature {
    /// GPUDirect Storage, /dev/nvidia-fs*.
    Gds,
    /// Mellanox OFED, /dev/infiniband/{uverbs*,rdma_cm}.
    Mofed,
    /// NVSwitch, /dev/nvidia-nvswitch*.
    NvSwitch,
    /// GDRCopy, /dev/gdrdrv.
    GdrCopy,
    /// IMEX channels, /dev/nvidia-caps-imex-channels/channelN.
    Imex,
    /// MIG configuration (privileged), the cap node of `config`.
    MigConfig,
    /// MIG monitoring (privileged), the cap node of `monitor`.
    MigMonitor,
}

/// A variable of an environment, as `NAME=value` pairs travel everywhere here.
pub type EnvVar = (String, String);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_compare_by_number() {
        let v = |text: &str| text.parse::<Version>().unwrap();
        assert!(v("12.10") > v("12.9") && v("12") == v("12.0.0") && v("550.163.01") == v("550.163.1"));
        assert!(v("535.104.05") < v("550.54"));
    }
    proptest! {
        #[test]
        fn any_text_is_a_version_or_a_message(text in ".{0,60}") { let _ = text.parse::<Version>(); }
    }
}
