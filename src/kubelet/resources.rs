//! What the node offers: resources, the devices of each, and how often each device is given out. A function of the inventory and of
//! what the administrator set.

use crate::mps;
use clap::ValueEnum;
use gpurun::{
    error::{Code, Error, Result},
    inventory::{Gpu, Inventory, MigDevice},
};

/// Vendor prefix of resource names.
pub const VENDOR: &str = "nvidia.com/";
/// Suffix of a shared resource's name.
const SHARED: &str = ".shared";
/// The name of whole GPUs.
pub const GPU: &str = "nvidia.com/gpu";
/// Between a device's UUID and the number of its replica.
const REPLICA: &str = "::";
/// The longest name behind the vendor's (Kubernetes: "Object Names and IDs", DNS labels).
const LONGEST_NAME: usize = 63;

/// How MIG devices are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum MigStrategy {
    /// Not at all, and no GPU in MIG mode either.
    #[default]
    None,
    /// As `nvidia.com/gpu`: every GPU is in MIG mode, and all MIG devices have one profile.
    Single,
    /// By profile, `nvidia.com/mig-1g.5gb`, besides the whole GPUs.
    Mixed,
}

/// One resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// `nvidia.com/gpu`
    pub name: String,
    /// Its devices, in NVML's order.
    pub devices: Vec<Device>,
    /// How they are shared, where they are.
    pub shared: Option<Shared>,
}

/// How the devices of a resource are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// What divides a device.
    pub by: SharingStrategy,
    /// How often each device is given out.
    pub replicas: u32,
}

/// What divides a device among those that it is given to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SharingStrategy {
    /// The driver: they take turns, and nothing keeps one from all of the memory.
    #[default]
    TimeSlicing,
    /// An MPS control daemon: each has its part of the memory and of the processors.
    Mps,
}

/// A GPU or MIG device of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its own.
    pub uuid: String,
    /// NUMA node of the GPU, where the kernel knows one.
    pub numa_node: Option<u32>,
}

/// Shared resources (NVIDIA's `sharing.timeSlicing` or `sharing.mps`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sharing {
    /// The sharing method.
    pub by: SharingStrategy,
    /// A shared resource has the name `….shared`.
    pub rename_by_default: bool,
    /// Whether containers that request several replicas are refused: two replicas give no larger share of the GPU than one.
    pub fail_requests_greater_than_one: bool,
    /// One entry for a resource.
    pub resources: Vec<Replicated>,
}

/// A resource that is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replicated {
    /// `nvidia.com/gpu`
    pub name: String,
    /// Replicas of each device; at least two.
    pub replicas: u32,
}

impl Sharing {
    /// The entries without a resource on this node.
    pub fn without_resource<'a>(&'a self, offered: &'a [Resource]) -> impl Iterator<Item = &'a str> {
        let is_offered = |name: &str| {
            offered
                .iter()
                .any(|one| one.shared.is_some() && one.name.strip_suffix(SHARED).unwrap_or(&one.name) == name)
        };
        self.resources.iter().map(|entry| entry.name.as_str()).filter(move |name| !is_offered(name))
    }
}

impl Resource {
    /// How often each device is given out.
    pub fn replicas(&self) -> u32 {
        self.shared.map_or(1, |shared| shared.replicas)
    }

    /// What the kubelet calls its devices, each with the device: `GPU-…`, and `GPU-…::0` of one that is shared.
    pub fn ids(&self) -> impl Iterator<Item = (String, &Device)> {
        self.devices.iter().flat_map(move |device| {
            (0..self.replicas()).map(move |number| {
                let id = match self.shared {
                    Some(_) => format!("{}{REPLICA}{number}", device.uuid),
                    None => device.uuid.clone(),
                };
                (id, device)
            })
        })
    }

    /// The device that the kubelet means.
    ///
    /// # Errors
    /// [`Code::UnknownGpu`]
    pub fn device(&self, id: &str) -> Result<&Device> {
        let number = |number: &str| number.parse::<u32>().ok();
        let found = match (self.shared, id.split_once(REPLICA)) {
            (None, None) => Some(id),
            (Some(shared), Some((uuid, n))) => number(n).filter(|n| *n < shared.replicas).map(|_| uuid),
            _ => None,
        };
        found.and_then(|uuid| self.devices.iter().find(|device| device.uuid == uuid)).ok_or_else(|| {
            Error::new(Code::UnknownGpu, format!("{} has no device {id:?}", self.name))
                .cause("the kubelet has not read the newest list yet, or remembers one of before a change")
        })
    }

    /// Its socket's name: `nvidia-gpu.sock`.
    pub fn socket(&self) -> String {
        format!("nvidia-{}.sock", without_vendor(&self.name))
    }
}

/// The device of one of the kubelet's ids, of any resource: without the number of a replica.
pub fn device_of(id: &str) -> &str {
    id.split_once(REPLICA).map_or(id, |(uuid, _)| uuid)
}

fn without_vendor(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, name)| name)
}

/// The resources of a node.
///
/// # Errors
/// [`Code::Config`] if the GPUs are not what the strategy is for, or where something cannot be shared.
pub fn resources(inventory: &Inventory, mig: MigStrategy, sharing: &Sharing) -> Result<Vec<Resource>> {
    let mut resources: Vec<Resource> = Vec::new();
    let mut offer = |name: &str, device: Device| match resources.iter_mut().find(|known| known.name == name) {
        Some(known) => known.devices.push(device),
        None => {
            resources.push(Resource { name: name.into(), devices: vec![device], shared: None });
        }
    };
    if mig == MigStrategy::Single {
        homogeneous(inventory)?;
    }
    for gpu in &inventory.gpus {
        if !gpu.mig_enabled {
            offer(GPU, Device { uuid: gpu.uuid.clone(), numa_node: gpu.numa_node });
            continue;
        }
        for part in gpu.mig_devices.iter().filter(|part| has_whole_instance(part)) {
            let device = Device { uuid: part.uuid.clone(), numa_node: gpu.numa_node };
            match mig {
                MigStrategy::None => {}
                MigStrategy::Single => offer(GPU, device),
                MigStrategy::Mixed => offer(&mig_name(&part.profile)?, device),
            }
        }
    }
    share(&mut resources, inventory, sharing)?;
    Ok(resources)
}

/// `1c.2g.10gb` is a part of a GPU instance, which shares its memory with other parts.
fn has_whole_instance(part: &MigDevice) -> bool {
    !part.profile.split('.').any(|word| word.ends_with('c')) && !part.profile.is_empty()
}

/// `1g.10gb+me` is no name of Kubernetes'.
fn mig_name(profile: &str) -> Result<String> {
    let name = format!("nvidia.com/mig-{}", profile.replace('+', "."));
    if without_vendor(&name).len() > LONGEST_NAME {
        return Err(Error::new(
            Code::Config,
            format!("the MIG profile {profile} is too long for a resource"),
        ));
    }
    Ok(name)
}

fn homogeneous(inventory: &Inventory) -> Result<()> {
    let (cut, whole): (Vec<&Gpu>, Vec<&Gpu>) = inventory.gpus.iter().partition(|gpu| gpu.mig_enabled);
    let mut profiles: Vec<&str> =
        cut.iter().flat_map(|gpu| &gpu.mig_devices).map(|part| part.profile.as_str()).collect();
    profiles.sort_unstable();
    profiles.dedup();
    let cause = if cut.is_empty() {
        return Ok(());
    } else if !whole.is_empty() {
        format!("{} GPUs are in MIG mode and {} are not", cut.len(), whole.len())
    } else if let [_] = profiles[..] {
        return Ok(());
    } else {
        format!("they have the profiles {}", profiles.join(", "))
    };
    Err(Error::new(Code::Config, "the MIG strategy `single` is for GPUs that are all cut alike")
        .cause(cause)
        .fix("use the MIG strategy `mixed`, or cut them alike"))
}

fn share(resources: &mut [Resource], inventory: &Inventory, sharing: &Sharing) -> Result<()> {
    for entry in &sharing.resources {
        // Nodes with different GPUs share the file.
        let Some(resource) = resources.iter_mut().find(|resource| resource.name == entry.name) else {
            continue;
        };
        if sharing.by == SharingStrategy::Mps {
            mps::can_share(resource, inventory, entry.replicas).map_err(|cause| {
                Error::new(Code::Config, format!("the resource {} cannot be shared by MPS", entry.name))
                    .cause(cause)
                    .fix("change sharing.mps in the plugin's configuration file")
            })?;
        }
        resource.shared = Some(Shared { by: sharing.by, replicas: entry.replicas });
        if sharing.rename_by_default {
            resource.name.push_str(SHARED);
        }
    }
    Ok(())
}

/// Whether the name is valid after the vendor prefix (Kubernetes: "DNS subdomain names").
pub fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        label.bytes().next().is_some_and(is_plain)
            && label.bytes().next_back().is_some_and(is_plain)
            && label.bytes().all(|byte| is_plain(byte) || byte == b'-')
    };
    name.len() <= LONGEST_NAME && name.split('.').all(is_label)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::file::tests::time_slicing as sharing;
    use gpurun::inventory::{ContainerPath, DeviceNode, Driver, DriverRoot, Fingerprint, HostPath};

    fn node(path: &str) -> DeviceNode {
        let path = std::path::PathBuf::from(path);
        DeviceNode {
            path: HostPath(path.clone()),
            container_path: ContainerPath(path),
            major: 195,
            minor: 0,
            mode: 0o666,
            uid: 0,
            gid: 0,
        }
    }

    /// A node with GPUs `GPU-0`, `GPU-1`, …; one with profiles is cut into MIG devices `MIG-0-0`, `MIG-0-1`, ….
    pub(crate) fn inventory(gpus: &[&[&str]]) -> Inventory {
        let gpu = |(index, profiles): (u32, &&[&str])| Gpu {
            index,
            minor: index,
            uuid: format!("GPU-{index}"),
            pci: format!("0000:{index:02x}:00.0"),
            name: String::new(),
            brand: String::new(),
            architecture: String::new(),
            compute_capability: gpurun::vocabulary::Version::of(9, 0),
            memory: 0,
            numa_node: Some(index / 4),
            persistence: None,
            node: node(&format!("/dev/nvidia{index}")),
            dri_nodes: Vec::new(),
            mig_capable: true,
            mig_enabled: !profiles.is_empty(),
            mig_devices: (0..)
                .zip(profiles.iter())
                .map(|(number, profile)| MigDevice {
                    index: number,
                    uuid: format!("MIG-{index}-{number}"),
                    gpu_instance: number + 7,
                    compute_instance: 0,
                    profile: (*profile).into(),
                    memory: 0,
                    resources: None,
                    cap_nodes: vec![node(&format!("/dev/nvidia-caps/nvidia-cap{number}"))],
                })
                .collect(),
            nvlinks: [].into(),
            topology: [].into(),
            clique: None,
            vgpu: false,
        };
        Inventory {
            fingerprint: Fingerprint {
                writer: String::new(),
                boot_id: String::new(),
                module_version: String::new(),
                device_majors: String::new(),
                pci_gpus: (0..gpus.len()).map(|index| format!("0000:{index:02x}:00.0")).collect(),
                mig_layout: Vec::new(),
                mtimes: [].into(),
                objects: [].into(),
                nodes: [].into(),
            },
            driver: Driver {
                version: "550.163.01".parse().unwrap(),
                cuda: "12.4".parse().unwrap(),
                root: DriverRoot("/".into()),
                files: Vec::new(),
                control_nodes: vec![node("/dev/nvidiactl")],
                gated_nodes: Vec::new(),
                gated_files: Vec::new(),
                params: None,
            },
            gpus: (0..).zip(gpus).map(gpu).collect(),
            problems: Vec::new(),
            closed: [].into(),
        }
    }

    fn offered(gpus: &[&[&str]], mig: MigStrategy, sharing: &Sharing) -> Vec<String> {
        let resources = resources(&inventory(gpus), mig, sharing).unwrap();
        resources
            .iter()
            .map(|resource| {
                let ids: Vec<_> = resource.ids().map(|(id, _)| id).collect();
                format!("{}: {}", resource.name, ids.join(" "))
            })
            .collect()
    }

    const CUT: &[&[&str]] = &[&["1g.5gb", "1g.5gb", "1c.3g.20gb", "1g.10gb+me"], &[]];

    #[test]
    fn a_mig_strategy_says_what_is_offered() {
        let none = Sharing::default();
        assert_eq!(offered(CUT, MigStrategy::None, &none), ["nvidia.com/gpu: GPU-1"]);
        assert_eq!(
            offered(CUT, MigStrategy::Mixed, &none),
            [
                "nvidia.com/mig-1g.5gb: MIG-0-0 MIG-0-1",
                "nvidia.com/mig-1g.10gb.me: MIG-0-3",
                "nvidia.com/gpu: GPU-1"
            ]
        );
        assert_eq!(
            offered(&[&["1g.5gb", "1g.5gb"], &["1g.5gb"]], MigStrategy::Single, &none),
            ["nvidia.com/gpu: MIG-0-0 MIG-0-1 MIG-1-0"]
        );
        assert_eq!(offered(&[&[], &[]], MigStrategy::Single, &none), ["nvidia.com/gpu: GPU-0 GPU-1"]);
        for mixture in [CUT, &[&["1g.5gb"], &["3g.20gb"]]] {
            let error = resources(&inventory(mixture), MigStrategy::Single, &none).unwrap_err();
            assert!(error.fix_line().contains("mixed"), "{error}");
        }
    }

    #[test]
    fn a_mig_device_is_where_its_gpu_is() {
        let gpus: [&[&str]; 5] = [&[], &[], &[], &[], &["1g.5gb"]];
        let resources = resources(&inventory(&gpus), MigStrategy::Mixed, &Sharing::default()).unwrap();
        assert_eq!(resources[1].devices, [Device { uuid: "MIG-4-0".into(), numa_node: Some(1) }]);
        assert_eq!(resources[1].socket(), "nvidia-mig-1g.5gb.sock");
    }

    #[test]
    fn a_shared_device_has_an_id_for_each_replica() {
        let twice = sharing("{resources: [{name: nvidia.com/gpu, replicas: 2}]}");
        assert_eq!(
            offered(&[&[], &[]], MigStrategy::None, &twice),
            ["nvidia.com/gpu: GPU-0::0 GPU-0::1 GPU-1::0 GPU-1::1"]
        );
        let renamed = sharing("{renameByDefault: true, resources: [{name: gpu, replicas: 2}]}");
        assert_eq!(
            offered(&[&[]], MigStrategy::None, &renamed),
            ["nvidia.com/gpu.shared: GPU-0::0 GPU-0::1"]
        );
        // NVIDIA's plugin warns and keeps the name.
        let named = sharing("{resources: [{name: gpu, rename: nvidia.com/gpu.shared, replicas: 2}]}");
        assert_eq!(offered(&[&[]], MigStrategy::None, &named), ["nvidia.com/gpu: GPU-0::0 GPU-0::1"]);
        let elsewhere = sharing("{resources: [{name: mig-1g.5gb, replicas: 3}]}");
        assert_eq!(offered(&[&[]], MigStrategy::None, &elsewhere), ["nvidia.com/gpu: GPU-0"]);
    }

    #[test]
    fn an_entry_without_a_resource_is_known() {
        let both = "[{name: gpu, replicas: 2}, {name: mig-1g.5gb, replicas: 2}]";
        for rename in [false, true] {
            let sharing = sharing(&format!("{{renameByDefault: {rename}, resources: {both}}}"));
            let resources = resources(&inventory(&[&[]]), MigStrategy::Mixed, &sharing).unwrap();
            assert_eq!(sharing.without_resource(&resources).collect::<Vec<_>>(), ["nvidia.com/mig-1g.5gb"]);
        }
    }

    #[test]
    fn an_id_is_a_device_of_the_resource_or_nothing() {
        let whole = resources(&inventory(&[&[]]), MigStrategy::None, &Sharing::default()).unwrap();
        assert_eq!(whole[0].device("GPU-0").unwrap().uuid, "GPU-0");
        let shared = sharing("{resources: [{name: gpu, replicas: 2}]}");
        let shared = resources(&inventory(&[&[]]), MigStrategy::None, &shared).unwrap();
        assert_eq!(shared[0].device("GPU-0::1").unwrap().uuid, "GPU-0");
        for (resource, id) in [
            (&whole[0], "GPU-1"),
            (&whole[0], "GPU-0::0"),
            (&shared[0], "GPU-0"),
            (&shared[0], "GPU-0::2"),
            (&shared[0], "GPU-0::x"),
            (&shared[0], ""),
        ] {
            assert_eq!(resource.device(id).unwrap_err().code(), Code::UnknownGpu, "{id}");
        }
    }
}
