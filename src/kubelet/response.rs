//! Lowers an [`Injection`] to what the kubelet tells the container runtime.
//!
//! | strategy | the runtime has to know |
//! |---|---|
//! | `envvar`, `volume-mounts` | `gpurun-runtime`, or NVIDIA's |
//! | `cdi-annotations`, `cdi-cri` | CDI |
//! | `direct` | nothing |

use crate::api::device_plugin::{CdiDevice, ContainerAllocateResponse, DeviceSpec, Mount};
use clap::ValueEnum;
use gpurun::{
    plan::{DRIVER_DIR, Injection},
    vocabulary::GatedFeature,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// How a container gets its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// `NVIDIA_VISIBLE_DEVICES`
    Envvar,
    /// Mounts under /var/run/nvidia-container-devices
    VolumeMounts,
    /// Annotations with the names of CDI devices
    CdiAnnotations,
    /// Names of CDI devices (Kubernetes 1.28 and newer)
    CdiCri,
    /// The device nodes and the driver's files themselves
    Direct,
}

/// What the administrator chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// All that are to be answered with.
    pub strategies: Vec<Strategy>,
    /// The device nodes go with every strategy.
    pub pass_device_specs: bool,
    /// The beginning of an annotation's key: `cdi.k8s.io/`.
    pub annotation_prefix: String,
    /// What every container gets besides its devices.
    pub features: Vec<GatedFeature>,
    /// Likewise, the N of each channel.
    pub imex_channels: Vec<u32>,
}

/// Vendor of the CDI devices and class of GPUs, as in NVIDIA's device plugin.
pub const CDI_VENDOR: &str = "k8s.device-plugin.nvidia.com";
/// See [`CDI_VENDOR`].
pub const CDI_CLASS: &str = "gpu";
/// Where `volume-mounts` puts a file for each device.
const REQUESTS: &str = "/var/run/nvidia-container-devices";
/// A container's variable for devices.
const VISIBLE: &str = "NVIDIA_VISIBLE_DEVICES";
/// The class of IMEX channels as CDI devices.
pub const CDI_IMEX: &str = "imex-channel";
/// How a feature is asked for: by a variable, or by the CDI device `all` of a class.
pub const FEATURES: [(GatedFeature, &str, &str); 3] = [
    (GatedFeature::GdrCopy, "NVIDIA_GDRCOPY", "gdrcopy"),
    (GatedFeature::Gds, "NVIDIA_GDS", "gds"),
    (GatedFeature::Mofed, "NVIDIA_MOFED", "mofed"),
];
/// Where every dynamic loader looks that has found nothing in its cache: Debian's and musl's in the first, Red Hat's in the second.
const LOADER_DIRS: [&str; 2] = ["/usr/lib", "/usr/lib64"];

/// The answer for a container that gets these devices, by the names that they have in environments and documents.
pub fn response(injection: &Injection, names: &[String], shape: &Shape) -> ContainerAllocateResponse {
    let mut response = ContainerAllocateResponse::default();
    let features = || FEATURES.iter().filter(|(feature, ..)| shape.features.contains(feature));
    for strategy in &shape.strategies {
        match strategy {
            Strategy::Envvar => {
                response.envs.insert(VISIBLE.into(), names.join(","));
            }
            Strategy::VolumeMounts => {
                response.envs.insert(VISIBLE.into(), REQUESTS.into());
                response.mounts.extend(names.iter().map(|name| Mount {
                    container_path: format!("{REQUESTS}/{name}"),
                    host_path: "/dev/null".into(),
                    read_only: false,
                }));
            }
            Strategy::CdiAnnotations => {
                // One key for each container of a pod: containerd 1.x reads the sandbox's annotations, too.
                let key = names.first().map(|name| name.replace(':', "-")).unwrap_or_default();
                response.annotations.insert(
                    format!("{}nvidia-device-plugin_{key}", shape.annotation_prefix),
                    cdi_names(names, shape).join(","),
                );
            }
            Strategy::CdiCri => {
                response
                    .cdi_devices
                    .extend(cdi_names(names, shape).into_iter().map(|name| CdiDevice { name }));
            }
            Strategy::Direct => {
                // Whoever reads the variable after this must not inject a second time.
                response.envs.insert(VISIBLE.into(), "void".into());
                response.mounts.extend(files(injection));
            }
        }
    }
    if shape.strategies.iter().any(|one| matches!(one, Strategy::Envvar | Strategy::VolumeMounts)) {
        response
            .envs
            .extend(features().map(|(_, variable, _)| ((*variable).to_owned(), "enabled".to_owned())));
        if !shape.imex_channels.is_empty() {
            let channels: Vec<_> = shape.imex_channels.iter().map(ToString::to_string).collect();
            response.envs.insert("NVIDIA_IMEX_CHANNELS".into(), channels.join(","));
        }
    }
    if shape.pass_device_specs || shape.strategies.contains(&Strategy::Direct) {
        response.devices = injection
            .devices
            .iter()
            .map(|node| DeviceSpec {
                container_path: text(&node.container_path.0),
                host_path: text(&node.path.0),
                permissions: "rw".into(),
            })
            .collect();
    }
    response
}

/// The CDI devices, in full, of a container that gets these devices.
pub fn cdi_names(names: &[String], shape: &Shape) -> Vec<String> {
    let gpus = names.iter().map(|name| format!("{CDI_VENDOR}/{CDI_CLASS}={name}"));
    let features = FEATURES.iter().filter(|(feature, ..)| shape.features.contains(feature));
    let features = features.map(|(.., class)| format!("{CDI_VENDOR}/{class}=all"));
    let channels = shape.imex_channels.iter().map(|n| format!("{CDI_VENDOR}/{CDI_IMEX}={n}"));
    gpus.chain(features).chain(channels).collect()
}

/// The driver's files where programs find them without a link, a loader's cache or a variable: every name that leads to a file is
/// a mount of it. Nobody could make links in the container, its cache is the image's, and a LD_LIBRARY_PATH from here would take
/// the place of the image's own.
fn files(injection: &Injection) -> Vec<Mount> {
    // The container runtime mounts by path, and the object there may change until then.
    let is_fixed = |mount: &&gpurun::plan::Mount| !mount.daemon.is_some_and(|daemon| daemon.is_replaceable);
    let mounts: BTreeMap<&Path, &gpurun::plan::Mount> =
        injection.mounts.iter().filter(is_fixed).map(|mount| (mount.target.0.as_path(), mount)).collect();
    let links: BTreeMap<&Path, &Path> =
        injection.symlinks.iter().map(|link| (link.link.0.as_path(), link.target.as_path())).collect();
    // `libcuda.so` leads to `libcuda.so.1`, and that to the file.
    let source = |name: &Path| {
        let mut path = name.to_path_buf();
        for _ in 0..4 {
            if let Some(mount) = mounts.get(path.as_path()) {
                return Some(*mount);
            }
            path = path.parent().unwrap_or(Path::new("/")).join(links.get(path.as_path())?);
        }
        None
    };
    let libraries = injection.libraries.iter().filter(|library| !library.is_32bit).flat_map(|library| {
        LOADER_DIRS.map(|dir| (Path::new(dir).join(&library.soname), library.path.0.as_path()))
    });
    let elsewhere = |path: &Path| !path.starts_with(DRIVER_DIR);
    let linked = links.keys().filter(|link| elsewhere(link)).map(|link| (link.to_path_buf(), *link));
    let plain =
        mounts.keys().filter(|target| elsewhere(target)).map(|target| (target.to_path_buf(), *target));
    let by_target: BTreeMap<PathBuf, &gpurun::plan::Mount> = libraries
        .chain(linked)
        .chain(plain)
        .filter_map(|(target, name)| Some((target, source(name)?)))
        .collect();
    by_target
        .into_iter()
        .map(|(target, mount)| Mount {
            container_path: text(&target),
            host_path: text(&mount.source.0),
            read_only: true,
        })
        .collect()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpurun::{
        inventory::{ContainerPath, DaemonObject, DeviceNode, HostPath},
        plan::{self, CachedLibrary, Symlink},
    };

    fn injection() -> Injection {
        let lib = |name: &str| ContainerPath(Path::new("/usr/local/nvidia/lib64").join(name));
        let mount = |source: &str, target: ContainerPath, daemon| plan::Mount {
            source: HostPath(source.into()),
            target,
            daemon,
        };
        let bin = ContainerPath("/usr/local/nvidia/bin/nvidia-smi".into());
        let socket = "/run/nvidia-persistenced/socket";
        Injection {
            mounts: vec![
                mount("/lib/libcuda.so.550", lib("libcuda.so.550"), None),
                mount("/usr/bin/nvidia-smi", bin.clone(), None),
                mount(socket, ContainerPath(socket.into()), Some(DaemonObject::default())),
            ],
            symlinks: vec![
                Symlink { link: lib("libcuda.so.1"), target: "libcuda.so.550".into() },
                Symlink { link: lib("libcuda.so"), target: "libcuda.so.1".into() },
                Symlink { link: ContainerPath("/usr/bin/nvidia-smi".into()), target: bin.0 },
            ],
            libraries: ["libcuda.so.1", "libcuda.so"]
                .map(|name| CachedLibrary { soname: name.into(), path: lib(name), is_32bit: false })
                .into(),
            devices: vec![DeviceNode {
                path: HostPath("/host/dev/nvidia0".into()),
                container_path: ContainerPath("/dev/nvidia0".into()),
                major: 195,
                minor: 0,
                mode: 0o666,
                uid: 0,
                gid: 0,
            }],
            ..Injection::default()
        }
    }

    fn answer(strategies: &[Strategy], pass_device_specs: bool) -> ContainerAllocateResponse {
        let shape = Shape {
            strategies: strategies.into(),
            pass_device_specs,
            annotation_prefix: "cdi.k8s.io/".into(),
            features: vec![GatedFeature::Gds],
            imex_channels: vec![0],
        };
        response(&injection(), &["GPU-a".into(), "GPU-b".into()], &shape)
    }

    #[test]
    fn each_strategy_says_it_in_its_own_words() {
        let said = answer(&[Strategy::Envvar], false);
        let envs = [(VISIBLE, "GPU-a,GPU-b"), ("NVIDIA_GDS", "enabled"), ("NVIDIA_IMEX_CHANNELS", "0")];
        assert_eq!(said.envs, envs.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        assert!(said.mounts.is_empty() && said.devices.is_empty());
        let said = answer(&[Strategy::VolumeMounts], true);
        assert_eq!(said.envs[VISIBLE], "/var/run/nvidia-container-devices");
        let targets: Vec<_> = said.mounts.iter().map(|mount| mount.container_path.as_str()).collect();
        assert_eq!(
            targets,
            ["/var/run/nvidia-container-devices/GPU-a", "/var/run/nvidia-container-devices/GPU-b"]
        );
        assert_eq!(said.devices[0].host_path, "/host/dev/nvidia0");
        let names = "k8s.device-plugin.nvidia.com/gpu=GPU-a,k8s.device-plugin.nvidia.com/gpu=GPU-b,\
                     k8s.device-plugin.nvidia.com/gds=all,k8s.device-plugin.nvidia.com/imex-channel=0";
        let said = answer(&[Strategy::CdiAnnotations, Strategy::CdiCri], false);
        assert_eq!(said.annotations["cdi.k8s.io/nvidia-device-plugin_GPU-a"], names);
        assert_eq!(said.cdi_devices.len(), 4);
        assert!(said.envs.is_empty());
    }

    #[test]
    fn directly_every_name_of_a_file_is_a_mount_of_it() {
        let said = answer(&[Strategy::Direct], false);
        assert_eq!(said.envs[VISIBLE], "void");
        let mounts: Vec<_> = said
            .mounts
            .iter()
            .map(|mount| (mount.container_path.as_str(), mount.host_path.as_str(), mount.read_only))
            .collect();
        assert_eq!(
            mounts,
            [
                ("/run/nvidia-persistenced/socket", "/run/nvidia-persistenced/socket", true),
                ("/usr/bin/nvidia-smi", "/usr/bin/nvidia-smi", true),
                ("/usr/lib/libcuda.so", "/lib/libcuda.so.550", true),
                ("/usr/lib/libcuda.so.1", "/lib/libcuda.so.550", true),
                ("/usr/lib64/libcuda.so", "/lib/libcuda.so.550", true),
                ("/usr/lib64/libcuda.so.1", "/lib/libcuda.so.550", true),
            ]
        );
        assert_eq!(
            (said.devices[0].container_path.as_str(), said.devices[0].permissions.as_str()),
            ("/dev/nvidia0", "rw")
        );
    }
}
