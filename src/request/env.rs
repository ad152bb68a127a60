//! What the variables of an environment ask for.

use super::{capability, quoted, requirement};
use crate::{
    error::{Code, Error, Result},
    request::Requirement,
    vocabulary::{DriverCapability, EnvVar, GatedFeature, Version},
};
use std::collections::BTreeMap;

/// An environment to be read: of a name that is set twice the last value holds, as in a container.
pub(super) struct Environment<'a>(BTreeMap<&'a str, &'a str>);

/// The value that asks for a gated feature, by its variable. The MIG ones take `all` because they are about every GPU.
const FEATURES: [(&str, &str, GatedFeature); 6] = [
    ("NVIDIA_GDS", "enabled", GatedFeature::Gds),
    ("NVIDIA_MOFED", "enabled", GatedFeature::Mofed),
    ("NVIDIA_NVSWITCH", "enabled", GatedFeature::NvSwitch),
    ("NVIDIA_GDRCOPY", "enabled", GatedFeature::GdrCopy),
    ("NVIDIA_MIG_CONFIG_DEVICES", "all", GatedFeature::MigConfig),
    ("NVIDIA_MIG_MONITOR_DEVICES", "all", GatedFeature::MigMonitor),
];

impl<'a> Environment<'a> {
    pub(super) fn new(variables: impl IntoIterator<Item = &'a EnvVar>) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.as_str(), value.as_str())).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).copied()
    }

    /// `NVIDIA_DRIVER_CAPABILITIES`; `None` if it is absent or empty.
    pub(super) fn capabilities(&self) -> Result<Option<DriverCapability>> {
        const NAME: &str = "NVIDIA_DRIVER_CAPABILITIES";
        self.get(NAME).map_or(Ok(None), |list| capability::parse(list, NAME, &[]))
    }

    /// Every `NVIDIA_REQUIRE_*` that requires something. JetPack's names what a Tegra image mounts and is no
    /// condition.
    pub(super) fn requirements(&self) -> Result<Vec<Requirement>> {
        let variables = self.0.iter().filter(|(name, _)| {
            name.starts_with("NVIDIA_REQUIRE_") && !name.starts_with("NVIDIA_REQUIRE_JETPACK")
        });
        variables.filter_map(|(name, value)| requirement::parse(name, value).transpose()).collect()
    }

    /// `NVIDIA_DISABLE_REQUIRE`, true for the words that Go's strconv.ParseBool takes for true, since that is what
    /// images were written for; everything else is false.
    pub(super) fn disable_require(&self) -> bool {
        matches!(self.get("NVIDIA_DISABLE_REQUIRE"), Some("1" | "t" | "T" | "TRUE" | "true" | "True"))
    }

    /// The CUDA release of a legacy image, which has `CUDA_VERSION` and no `NVIDIA_REQUIRE_CUDA`. Other images use
    /// the name for something else (`cu121`), so what is not a version says nothing.
    pub(super) fn legacy_cuda(&self) -> Option<Version> {
        self.get("CUDA_VERSION").and_then(cuda_release)
    }

    /// Whether the image says itself which CUDA it requires.
    pub(super) fn requires_cuda(&self) -> bool {
        self.get("NVIDIA_REQUIRE_CUDA").is_some_and(|value| !value.trim().is_empty())
    }

    /// The gated features asked for by name.
    pub(super) fn features(&self) -> Result<Vec<GatedFeature>> {
        let mut asked = Vec::new();
        for (name, wanted, feature) in FEATURES {
            match self.get(name).map(str::trim) {
                None | Some("" | "disabled") => {}
                Some(value) if value == wanted => asked.push(feature),
                Some(value) => {
                    return Err(Error::new(
                        Code::BadRequest,
                        format!("{name}={value} cannot be understood", value = quoted(value)),
                    )
                    .fix(format!("say {name}={wanted}, or leave it out")));
                }
            }
        }
        Ok(asked)
    }

    /// `NVIDIA_IMEX_CHANNELS`: numbers of channels, without duplicates.
    pub(super) fn imex_channels(&self) -> Result<Vec<u32>> {
        const NAME: &str = "NVIDIA_IMEX_CHANNELS";
        imex_channels(self.get(NAME).unwrap_or_default(), NAME)
    }
}

/// A list of IMEX channels, without duplicates; `source` is who says it.
pub(super) fn imex_channels(list: &str, source: &str) -> Result<Vec<u32>> {
    // NVIDIA's driver numbers channels with 20 bits.
    const LAST: u32 = (1 << 20) - 1;
    let list = list.trim();
    let mut channels = Vec::new();
    for word in list.split(',').map(str::trim).filter(|_| !list.is_empty()) {
        let digits = word.bytes().all(|byte| byte.is_ascii_digit());
        match word.parse::<u32>() {
            Ok(channel) if digits && channel <= LAST => channels.push(channel),
            _ => {
                return Err(Error::new(
                    Code::BadRequest,
                    format!("{source} names {}, which is not an IMEX channel", quoted(word)),
                )
                .fix(format!("name channels by number, 0 to {LAST}, with commas between them")));
            }
        }
    }
    channels.sort_unstable();
    channels.dedup();
    Ok(channels)
}

/// The `12.4` of `12.4.1`: a CUDA driver knows releases, not updates.
pub(super) fn cuda_release(text: &str) -> Option<Version> {
    let version = text.trim().parse::<Version>().ok()?;
    Some(Version::of(version.major(), version.minor()))
}
