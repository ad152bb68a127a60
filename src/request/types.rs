//! The request's values.

use crate::vocabulary::{DriverCapability, GatedFeature, Version};

/// A request for GPUs. A container that has none is not a GPU container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRequest {
    /// Which GPUs.
    pub selection: DeviceSelection,
    /// What of the driver; `None` where nobody said, so that policy decides.
    pub capabilities: Option<DriverCapability>,
    /// What the image requires of the host; all must hold.
    pub requirements: Vec<Requirement>,
    /// What the image says it was built with, where it has no requirement on CUDA: `CUDA_VERSION`, a label.
    pub image_cuda: Option<Version>,
    /// `NVIDIA_DISABLE_REQUIRE`: nothing is checked.
    pub disable_require: bool,
    /// Features that the container asked for by name (`NVIDIA_GDS=enabled`).
    pub features: Vec<GatedFeature>,
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

/// By which name a GPU or MIG device is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceId {
    /// NVML's index.
    Index(u32),
    /// `i:j`: MIG device j of GPU i.
    Mig(u32, u32),
    /// `GPU-…` or `MIG-…`, or a beginning of it that fits one device.
    Uuid(String),
    /// A PCI address.
    Pci(String),
}

/// One `NVIDIA_REQUIRE_*` variable: alternatives, each a list of conditions that must all hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    /// The variable, for messages.
    pub variable: String,
    /// OR of ANDs.
    pub alternatives: Vec<Vec<Condition>>,
}

/// `cuda>=12.4`, `brand=tesla`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// What is compared.
    pub property: Property,
    /// How.
    pub comparison: Comparison,
    /// With what, as written; `brand` compares text, the others versions.
    pub value: String,
}

/// What a condition may speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Property {
    /// The newest CUDA that the driver speaks.
    Cuda,
    /// The driver's version.
    Driver,
    /// A GPU's compute capability.
    Arch,
    /// A GPU's brand.
    Brand,
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
