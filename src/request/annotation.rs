//! Devices by vendor and class, as CDI names them (`nvidia.com/gpu=0`): in annotations, and wherever else a GPU is named.

use super::{env::imex_channels, quoted};
use crate::{
    error::{Code, Error, Result},
    vocabulary::GatedFeature,
};

/// What one class of devices asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Gpu,
    ImexChannel,
    Feature(GatedFeature),
}

/// Classes by name.
const CLASSES: [(&str, Class); 6] = [
    ("gpu", Class::Gpu),
    ("imex-channel", Class::ImexChannel),
    ("gds", Class::Feature(GatedFeature::Gds)),
    ("mofed", Class::Feature(GatedFeature::Mofed)),
    ("gdrcopy", Class::Feature(GatedFeature::GdrCopy)),
    ("nvswitch", Class::Feature(GatedFeature::NvSwitch)),
];

/// Vendors under which NVIDIA's programs name the host's devices: CDI documents, the runtime's own, the node plugin's.
const VENDORS: [&str; 3] = ["nvidia.com", "runtime.nvidia.com", "k8s.device-plugin.nvidia.com"];

/// What a list of qualified names asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// GPUs by their names without vendor and class.
    pub(super) gpus: Vec<String>,
    pub(super) imex_channels: Vec<u32>,
    pub(super) features: Vec<GatedFeature>,
}

impl Asked {
    /// Adds one qualified name; another vendor's is the engine's business. `source` is who says it.
    pub(super) fn add(&mut self, name: &str, source: &str) -> Result<()> {
        let refuse = |cause: &str| {
            Error::new(
                Code::BadRequest,
                format!("{source} names {}, which cannot be understood", quoted(name)),
            )
            .cause(cause)
            .fix(format!(
                "name devices as nvidia.com/gpu=0, with a class from {}",
                CLASSES.map(|(name, _)| name).join(", ")
            ))
        };
        let Some((vendor, class, device)) = split(name) else {
            return Err(refuse("it is not VENDOR/CLASS=DEVICE"));
        };
        if !VENDORS.contains(&vendor) {
            return Ok(());
        }
        match CLASSES.into_iter().find(|(known, _)| *known == class) {
            _ if device.is_empty() => return Err(refuse("the device's name is missing")),
            Some((_, Class::Gpu)) => self.gpus.push(device.into()),
            Some((_, Class::ImexChannel)) => self.imex_channels.extend(imex_channels(device, source)?),
            Some((_, Class::Feature(feature))) => self.features.push(feature),
            None => return Err(refuse("there is no such class")),
        }
        Ok(())
    }
}

/// A GPU's name without vendor and class, if it has those of an NVIDIA GPU.
pub(super) fn gpu(name: &str) -> &str {
    match split(name) {
        Some((vendor, "gpu", device)) if VENDORS.contains(&vendor) => device,
        _ => name,
    }
}

fn split(name: &str) -> Option<(&str, &str, &str)> {
    let (kind, device) = name.split_once('=')?;
    let (vendor, class) = kind.split_once('/')?;
    Some((vendor, class, device))
}
