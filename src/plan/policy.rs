//! What the administrator and the container's own rights allow.

use crate::{
    error::{Code, Error, Result},
    request::DeviceRequest,
    vocabulary::{DriverCapability, GatedFeature},
};

/// The rules that a request is held against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Which driver capabilities a container may have at all.
    pub supported_capabilities: DriverCapability,
    /// Requirements of images are not checked.
    pub disable_require: bool,
    /// An image's own newer CUDA driver libraries may be used.
    pub forward_compat: bool,
    /// The container has `CAP_SYS_ADMIN`, which Docker calls privileged: it may manage MIG.
    pub privileged: bool,
}

impl Default for Policy {
    /// Every capability, requirements checked, forward compatibility, not privileged.
    fn default() -> Self {
        Self {
            supported_capabilities: DriverCapability::all(),
            disable_require: false,
            forward_compat: true,
            privileged: false,
        }
    }
}

impl Policy {
    /// The capabilities that the container gets. `all`, and nothing said, mean what is allowed of it; a capability
    /// asked for by name that is not allowed is an error.
    pub(super) fn capabilities(&self, request: &DeviceRequest) -> Result<DriverCapability> {
        let asked = request.capabilities.unwrap_or(DriverCapability::DEFAULT);
        let refused = asked - self.supported_capabilities;
        if !refused.is_empty() && request.capabilities.is_some_and(|asked| !asked.is_all()) {
            return Err(Error::new(
                Code::BadCapability,
                format!("the driver capability {} is not allowed on this host", refused.names().join(", ")),
            )
            .fix(format!(
                "ask for {}, or have the administrator add it to supported-driver-capabilities",
                self.supported_capabilities.names().join(", ")
            )));
        }
        Ok(asked & self.supported_capabilities)
    }

    /// Refuses the MIG features to a container that could not use them on purpose.
    pub(super) fn allow(&self, feature: GatedFeature) -> Result<()> {
        if self.privileged || !matches!(feature, GatedFeature::MigConfig | GatedFeature::MigMonitor) {
            return Ok(());
        }
        Err(Error::new(Code::NotAllowed, "managing MIG devices needs a container with CAP_SYS_ADMIN")
            .cause("NVIDIA_MIG_CONFIG_DEVICES and NVIDIA_MIG_MONITOR_DEVICES concern every container on the host's GPUs")
            .fix("add --cap-add SYS_ADMIN, or leave the variable out"))
    }
}
