//! What a container of another engine asks for: its config.json is read, never written here.

use super::{
    DeviceRequest, DeviceSelection, annotation::Asked, env::Environment, selection::visible_devices,
};
use crate::{error::Result, formats::oci::Spec, vocabulary::DriverCapability};

/// Whose word is accepted. Annotations always are: an engine lets only whom it trusts write them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// What the keys of annotations that ask for GPUs begin with.
    pub annotation_prefixes: Vec<String>,
    /// Mounts of /dev/null below /var/run/nvidia-container-devices.
    pub volume_mounts: bool,
    /// The environment of a container that is not privileged: its image may have written it.
    pub unprivileged_environment: bool,
    /// Variables that are read in place of `NVIDIA_VISIBLE_DEVICES` where one is set: a swarm's generic resources.
    pub swarm_resources: Vec<String>,
    /// Requests for IMEX channels.
    pub imex_channels: bool,
}

impl Default for Accepted {
    /// As Docker's users expect: annotations, and everybody's environment.
    fn default() -> Self {
        Self {
            annotation_prefixes: vec!["cdi.k8s.io/".into()],
            volume_mounts: false,
            unprivileged_environment: true,
            swarm_resources: Vec::new(),
            imex_channels: true,
        }
    }
}

const VISIBLE: &str = "NVIDIA_VISIBLE_DEVICES";
/// Where a device plugin mounts /dev/null once for each device; the rest of the path is the device's name.
const VOLUME_MOUNTS: &str = "/var/run/nvidia-container-devices/";

impl DeviceRequest {
    /// What the container asks for; `None` is a container without GPUs.
    ///
    /// The first of these that names a GPU decides which: annotations, volume mounts, the variables of
    /// [`Accepted::swarm_resources`], `NVIDIA_VISIBLE_DEVICES`. What narrows
    /// or describes (capabilities, requirements, `CUDA_VERSION`) is read from the environment in any case; gated features and
    /// IMEX channels only where the environment may ask.
    ///
    /// An image from before `NVIDIA_REQUIRE_CUDA` (it has `CUDA_VERSION` alone) asks for every GPU and every capability where
    /// it names none.
    pub fn from_oci(spec: &Spec, accepted: &Accepted) -> Result<Option<Self>> {
        let variables = spec.environment();
        let env = Environment::new(&variables);
        if env.get(VISIBLE) == Some("void") && has_gpu(spec) {
            // An engine that reads CDI documents was here already: they set this word so that nobody does it twice.
            return Ok(None);
        }
        // CAP_SYS_ADMIN is Docker's word for a container that may do nearly everything.
        let may_ask = accepted.unprivileged_environment || spec.is_bounded_by("CAP_SYS_ADMIN");

        let mut asked = annotations(spec, &accepted.annotation_prefixes)?;
        if asked.gpus.is_empty() && accepted.volume_mounts {
            volume_mounts(spec, &mut asked)?;
        }
        let legacy = env.legacy_cuda().is_some() && !env.requires_cuda();
        let swarm: Vec<&str> = accepted.swarm_resources.iter().filter_map(|name| env.get(name)).collect();
        let (variable, list) = match accepted.swarm_resources.first() {
            Some(name) if !swarm.is_empty() => (name.as_str(), Some(swarm.join(","))),
            _ => (VISIBLE, env.get(VISIBLE).map(Into::into)),
        };
        let selection = match list {
            _ if !asked.gpus.is_empty() => visible_devices(&asked.gpus.join(","), "the container")?,
            _ if !may_ask => None,
            None if legacy => Some(DeviceSelection::All),
            list => visible_devices(list.as_deref().unwrap_or_default(), variable)?,
        };
        let Some(selection) = selection else { return Ok(None) };

        let disable_require = env.disable_require();
        let mut request = Self {
            selection,
            filter: super::GpuFilter::default(),
            capabilities: env.capabilities()?.or(legacy.then(DriverCapability::all)),
            requirements: if disable_require { Vec::new() } else { env.requirements()? },
            image_cuda: if env.requires_cuda() { None } else { env.legacy_cuda() },
            disable_require,
            features: asked.features,
            imex_channels: asked.imex_channels,
        };
        if may_ask {
            request.features.extend(env.features()?);
            // `all` is what images for multi-node jobs say wherever they run.
            if env.get("NVIDIA_IMEX_CHANNELS").map(str::trim) != Some("all") {
                request.imex_channels.extend(env.imex_channels()?);
            }
        }
        if !accepted.imex_channels {
            request.imex_channels.clear();
        }
        request.features.sort_unstable();
        request.features.dedup();
        request.imex_channels.sort_unstable();
        request.imex_channels.dedup();
        Ok(Some(request))
    }
}

fn has_gpu(spec: &Spec) -> bool {
    let path = |device: &serde_json::Value| {
        device.get("path").and_then(|path| path.as_str()).is_some_and(|path| path.starts_with("/dev/nvidia"))
    };
    spec.list(&["linux", "devices"]).iter().any(path)
}

fn annotations(spec: &Spec, prefixes: &[String]) -> Result<Asked> {
    let mut asked = Asked::default();
    for (key, value) in spec.annotations() {
        if prefixes.iter().any(|prefix| key.starts_with(prefix.as_str())) {
            for name in value.split(',').map(str::trim) {
                asked.add(name, &format!("the annotation {key}"))?;
            }
        }
    }
    Ok(asked)
}

/// Below the directory a device is `0`, `cdi/nvidia.com/gpu/0`, `cdi/nvidia.com/gpu=0`, or `imex/0`.
fn volume_mounts(spec: &Spec, asked: &mut Asked) -> Result<()> {
    for mount in spec.mounts().filter(|mount| mount.source == "/dev/null") {
        let Some(name) = mount.destination.strip_prefix(VOLUME_MOUNTS) else { continue };
        let source = format!("the mount {}", mount.destination);
        if let Some(channel) = name.strip_prefix("imex/") {
            asked.add(&format!("nvidia.com/imex-channel={channel}"), &source)?;
        } else if let Some(qualified) = name.strip_prefix("cdi/") {
            let mut parts = qualified.splitn(3, '/');
            match (parts.next(), parts.next(), parts.next()) {
                (Some(vendor), Some(class), Some(device)) => {
                    asked.add(&format!("{vendor}/{class}={device}"), &source)?;
                }
                _ => asked.add(qualified, &source)?,
            }
        } else {
            asked.gpus.push(name.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        request::{DeviceId, DeviceSelection::*},
        vocabulary::{GatedFeature, Version},
    };
    use serde_json::{Value, json};

    fn ask(spec: &Value, accepted: &Accepted) -> Result<Option<DeviceRequest>> {
        DeviceRequest::from_oci(&Spec::parse(spec.to_string().as_bytes()).unwrap(), accepted)
    }

    fn with_env(env: &[&str]) -> Value {
        json!({"process": {"env": env}})
    }

    fn ids(names: &[&str]) -> DeviceSelection {
        Ids(names.iter().map(|name| name.parse::<DeviceId>().unwrap()).collect())
    }

    #[test]
    fn the_environment_asks() {
        for (env, meant) in [
            (&[][..], None),
            (&["NVIDIA_VISIBLE_DEVICES="], None),
            (&["NVIDIA_VISIBLE_DEVICES=void"], None),
            (&["NVIDIA_VISIBLE_DEVICES=none"], Some(DriverOnly)),
            (&["NVIDIA_VISIBLE_DEVICES=all"], Some(All)),
            (&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_VISIBLE_DEVICES=1"], Some(ids(&["1"]))),
            (&["NVIDIA_VISIBLE_DEVICES=runtime.nvidia.com/gpu=all"], Some(All)),
            (&["NVIDIA_VISIBLE_DEVICES=nvidia.com/gpu=0,nvidia.com/gpu=1"], Some(ids(&["0", "1"]))),
            (&["CUDA_VERSION=8.0.61"], Some(All)),
            (&["CUDA_VERSION=8.0.61", "NVIDIA_VISIBLE_DEVICES=void"], None),
            (&["CUDA_VERSION=12.4.1", "NVIDIA_REQUIRE_CUDA=cuda>=12.4"], None),
            (&["CUDA_VERSION=cu121"], None),
        ] {
            let request = ask(&with_env(env), &Accepted::default()).unwrap();
            assert_eq!(request.map(|request| request.selection), meant, "{env:?}");
        }
    }

    #[test]
    fn a_swarms_resources_go_before_what_the_image_says() {
        let accepted = Accepted { swarm_resources: vec!["A".into(), "B".into()], ..Accepted::default() };
        for (env, meant) in [
            (&["NVIDIA_VISIBLE_DEVICES=all"][..], Some(All)),
            (&["NVIDIA_VISIBLE_DEVICES=all", "B=GPU-0a"], Some(ids(&["GPU-0a"]))),
            (&["NVIDIA_VISIBLE_DEVICES=all", "B=GPU-0b", "A=GPU-0a"], Some(ids(&["GPU-0a", "GPU-0b"]))),
            (&["A=none"], Some(DriverOnly)),
            (&["NVIDIA_VISIBLE_DEVICES=all", "A=void"], None),
            (&["CUDA_VERSION=8.0.61", "A=1"], Some(ids(&["1"]))),
        ] {
            let request = ask(&with_env(env), &accepted).unwrap();
            assert_eq!(request.map(|request| request.selection), meant, "{env:?}");
        }
        assert_eq!(ask(&with_env(&["A=0"]), &Accepted::default()).unwrap(), None);
    }

    #[test]
    fn the_administrator_can_have_requests_for_channels_ignored() {
        let mut spec = with_env(&["NVIDIA_VISIBLE_DEVICES=0", "NVIDIA_IMEX_CHANNELS=1"]);
        spec["annotations"] = json!({"cdi.k8s.io/x": "nvidia.com/imex-channel=3"});
        assert_eq!(ask(&spec, &Accepted::default()).unwrap().unwrap().imex_channels, [1, 3]);
        let deaf = Accepted { imex_channels: false, ..Accepted::default() };
        assert!(ask(&spec, &deaf).unwrap().unwrap().imex_channels.is_empty());
    }

    #[test]
    fn a_legacy_image_gets_every_capability_and_its_cuda_is_checked() {
        let legacy = ask(&with_env(&["CUDA_VERSION=8.0.61"]), &Accepted::default()).unwrap().unwrap();
        assert_eq!(legacy.capabilities, Some(DriverCapability::all()));
        assert_eq!(legacy.image_cuda, Some(Version::of(8, 0)));
        let named = with_env(&["CUDA_VERSION=8.0.61", "NVIDIA_DRIVER_CAPABILITIES=utility"]);
        let named = ask(&named, &Accepted::default()).unwrap().unwrap();
        assert_eq!(named.capabilities, Some(DriverCapability::UTILITY));
    }

    #[test]
    fn annotations_go_before_mounts_and_mounts_before_the_environment() {
        let accepted = Accepted { volume_mounts: true, ..Accepted::default() };
        let mut spec = json!({
            "annotations": {
                "cdi.k8s.io/b": "nvidia.com/gpu=1,amd.com/gpu=7,nvidia.com/imex-channel=3",
                "cdi.k8s.io/a": "k8s.device-plugin.nvidia.com/gpu=GPU-0a, nvidia.com/gds=all",
                "other/x": "nvidia.com/gpu=6",
            },
            "mounts": [
                {"destination": "/var/run/nvidia-container-devices/2", "source": "/dev/null"},
                {"destination": "/var/run/nvidia-container-devices/cdi/nvidia.com/gpu/3", "source": "/dev/null"},
                {"destination": "/var/run/nvidia-container-devices/cdi/nvidia.com/gpu=4", "source": "/dev/null"},
                {"destination": "/var/run/nvidia-container-devices/5", "source": "/dev/zero"},
                {"destination": "/var/run/nvidia-container-devices/imex/9", "source": "/dev/null"},
            ],
            "process": {"env": ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_IMEX_CHANNELS=all"]},
        });
        let request = ask(&spec, &accepted).unwrap().unwrap();
        assert_eq!(request.selection, ids(&["GPU-0a", "1"]));
        assert_eq!((request.features, request.imex_channels), (vec![GatedFeature::Gds], vec![3]));
        spec["annotations"] = Value::Null;
        let request = ask(&spec, &accepted).unwrap().unwrap();
        assert_eq!(request.selection, ids(&["2", "3", "4"]));
        assert_eq!(request.imex_channels, [9]);
        assert_eq!(
            ask(&spec, &Accepted::default()).unwrap().unwrap().selection,
            All,
            "mounts are not accepted"
        );
    }

    #[test]
    fn an_environment_that_may_not_ask_gets_nothing_unless_the_container_is_privileged() {
        let strict = Accepted { unprivileged_environment: false, ..Accepted::default() };
        let mut spec = with_env(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_GDS=enabled"]);
        assert_eq!(ask(&spec, &strict).unwrap(), None);
        spec["process"]["capabilities"] = json!({"effective": ["CAP_SYS_ADMIN"]});
        assert_eq!(ask(&spec, &strict).unwrap(), None, "only the bounding set counts");
        spec["annotations"] = json!({"cdi.k8s.io/x": "nvidia.com/gpu=0"});
        let request = ask(&spec, &strict).unwrap().unwrap();
        assert_eq!(
            (request.selection, request.features),
            (ids(&["0"]), vec![]),
            "the environment adds no feature"
        );
        spec["process"]["capabilities"] = json!({"bounding": ["CAP_SYS_ADMIN"]});
        assert_eq!(ask(&spec, &strict).unwrap().unwrap().features, [GatedFeature::Gds]);
    }

    #[test]
    fn an_engine_that_did_it_already_is_believed() {
        let mut spec = with_env(&["NVIDIA_VISIBLE_DEVICES=void"]);
        spec["annotations"] = json!({"cdi.k8s.io/x": "nvidia.com/gpu=0"});
        assert!(ask(&spec, &Accepted::default()).unwrap().is_some());
        spec["linux"] = json!({"devices": [{"path": "/dev/nvidia0"}]});
        assert_eq!(ask(&spec, &Accepted::default()).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_understood_names_the_choices() {
        for (name, cause) in [
            ("gpu0", "it is not VENDOR/CLASS=DEVICE"),
            ("", "it is not VENDOR/CLASS=DEVICE"),
            ("nvidia.com/gpu=", "the device's name is missing"),
            ("nvidia.com/gpus=0", "there is no such class"),
        ] {
            let error =
                ask(&json!({"annotations": {"cdi.k8s.io/x": name}}), &Accepted::default()).unwrap_err();
            assert_eq!(error.cause_line(), cause, "{name}");
            assert!(error.fix_line().contains("imex-channel"), "{}", error.fix_line());
        }
    }
}
