//! The request's values.

use crate::vocabulary::{DriverCapability, GatedFeature, Version};
use std::{cmp::Ordering, fmt};

/// A request for GPUs. A container that has none is not a GPU container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRequest {
    /// Which GPUs.
    pub selection: DeviceSelection,
    /// Which of them will do; empty where they were named.
    pub filter: GpuFilter,
    /// Driver capabilities; `None` if not requested, so that policy decides.
    pub capabilities: Option<DriverCapability>,
    /// What the image requires of the host; all must hold.
    pub requirements: Vec<Requirement>,
    /// What the image says it was built with, where it has no requirement on CUDA: `CUDA_VERSION`, a label.
    pub image_cuda: Option<Version>,
    /// `NVIDIA_DISABLE_REQUIRE`: nothing is checked.
    pub disable_require: bool,
    /// Features that the container asked for by name (`NVIDIA_GDS=enabled`). IMEX is asked for by channel instead.
    pub features: Vec<GatedFeature>,
    /// The N of each /dev/nvidia-caps-imex-channels/channelN that is asked for.
    pub imex_channels: Vec<u32>,
}

/// Which GPUs are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSelection {
    /// All of them.
    All,
    /// The driver without a device (`none`).
    DriverOnly,
    /// The first so many.
    Count(u32),
    /// These, in the order in which they were named, without duplicates.
    Ids(Vec<DeviceId>),
}

/// What a GPU must have to be taken by `all` or by a number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuFilter {
    /// `arch>=9.0`: the least compute capability.
    pub arch: Option<Version>,
    /// `mem>=40GiB`: the least memory in bytes, of a MIG device its own.
    pub memory: Option<u64>,
}

/// By which name a GPU or MIG device is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceId {
    /// NVML's index.
    Index(u32),
    /// `i:j`: MIG device j of GPU i.
    Mig(u32, u32),
    /// `GPU-…` or `MIG-…`, or a beginning of it that fits one device.
    Uuid(String),
    /// A PCI address in sysfs' form, `0000:65:00.0`.
    Pci(String),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::Mig(gpu, device) => write!(f, "{gpu}:{device}"),
            Self::Uuid(text) | Self::Pci(text) => f.write_str(text),
        }
    }
}

/// One `NVIDIA_REQUIRE_*` variable: alternatives, each a list of conditions that must all hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    /// The variable, for messages.
    pub variable: String,
    /// OR of ANDs; neither list is empty.
    pub alternatives: Vec<Vec<Condition>>,
}

/// `cuda>=12.4`, `brand=tesla`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The newest CUDA that the driver speaks.
    Cuda(Comparison, Version),
    /// The driver's version.
    Driver(Comparison, Version),
    /// A GPU's compute capability.
    Arch(Comparison, Version),
    /// A GPU's brand, whatever its case.
    Brand {
        /// As written.
        name: String,
        /// `=`, not `!=`.
        wanted: bool,
    },
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cuda(comparison, version) => write!(f, "cuda{comparison}{version}"),
            Self::Driver(comparison, version) => write!(f, "driver{comparison}{version}"),
            Self::Arch(comparison, version) => write!(f, "arch{comparison}{version}"),
            Self::Brand { name, wanted } => write!(f, "brand{}{name}", if *wanted { "=" } else { "!=" }),
        }
    }
}

/// How a condition compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `=`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
}

impl Comparison {
    /// Every comparison as it is written; one that another begins with comes after it, so that the first match is
    /// the longest.
    pub const ALL: [(&'static str, Self); 6] = [
        ("<=", Self::LessOrEqual),
        (">=", Self::GreaterOrEqual),
        ("!=", Self::NotEqual),
        ("=", Self::Equal),
        ("<", Self::Less),
        (">", Self::Greater),
    ];

    /// Whether it holds between an actual value and the value of the condition, which compare like this.
    pub fn holds(self, actual_to_wanted: Ordering) -> bool {
        match self {
            Self::Equal => actual_to_wanted.is_eq(),
            Self::NotEqual => actual_to_wanted.is_ne(),
            Self::Less => actual_to_wanted.is_lt(),
            Self::LessOrEqual => actual_to_wanted.is_le(),
            Self::Greater => actual_to_wanted.is_gt(),
            Self::GreaterOrEqual => actual_to_wanted.is_ge(),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(_, comparison)| comparison == self).map_or("", |(text, _)| text))
    }
}
