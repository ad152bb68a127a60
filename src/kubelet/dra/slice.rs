//! What the scheduler is told of the node's devices. A function of the state.

use super::DRIVER;
use crate::state::State;
use gpurun::{
    inventory::{Driver, Gpu, Inventory},
    plan::Selected,
    vocabulary::Version,
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, fs, path::Path};

/// The most devices of a ResourceSlice (`ResourceSliceMaxDevices`).
const MOST_DEVICES: usize = 128;
/// The longest text of an attribute, in bytes (`DeviceAttributeMaxValueLength`).
const LONGEST_TEXT: usize = 64;

/// The version of the API in which objects are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiVersion {
    /// Kubernetes 1.34 and newer.
    V1,
    /// 1.32 and newer.
    V1Beta1,
}

impl ApiVersion {
    /// As it is in paths.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V1Beta1 => "v1beta1",
        }
    }
}

/// The devices of the state.
pub fn all(state: &State) -> impl Iterator<Item = Selected<'_>> {
    let devices = state.resources.iter().flat_map(|resource| &resource.devices);
    devices.filter_map(|device| state.device(&device.uuid))
}

/// Those that are well.
pub fn offered(state: &State) -> impl Iterator<Item = Selected<'_>> {
    all(state).filter(|device| !state.unhealthy.contains_key(device.uuid()))
}

/// A device's name in the pool: `gpu-0`, `gpu-0-mig-1g5gb-7-0`. The profile is in it, because instances of another layout have the
/// same numbers, and a claim must not get one of those.
pub fn name(device: Selected<'_>) -> String {
    let minor = device.gpu.minor;
    match device.mig {
        None => format!("gpu-{minor}"),
        Some(part) => {
            let profile: String =
                part.profile.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
            format!("gpu-{minor}-mig-{profile}-{}-{}", part.gpu_instance, part.compute_instance)
        }
    }
}

/// A device's description: NVIDIA's names of attributes and capacities, and Kubernetes' own.
pub fn described(device: Selected<'_>, driver: &Driver, roots: &BTreeMap<String, String>) -> Described {
    let gpu = device.gpu;
    let mut attributes = Map::new();
    let mut text = |name: &str, text: &str| {
        if !text.is_empty() {
            attributes.insert(name.into(), json!({"string": at_most(text, LONGEST_TEXT)}));
        }
    };
    text("type", if device.mig.is_some() { "mig" } else { "gpu" });
    text("uuid", device.uuid());
    text("productName", &gpu.name);
    text("brand", brand(&gpu.brand));
    text("architecture", if gpu.architecture == "Ada" { "Ada Lovelace" } else { &gpu.architecture });
    text("pcieBusID", &gpu.pci);
    text("resource.kubernetes.io/pciBusID", &gpu.pci);
    if let Some(root) = roots.get(&gpu.pci) {
        text("resource.kubernetes.io/pcieRoot", root);
    }
    if let Some(part) = device.mig {
        text("parentUUID", &gpu.uuid);
        text("profile", &part.profile);
    }
    for (name, version) in [
        ("cudaComputeCapability", &gpu.compute_capability),
        ("driverVersion", &driver.version),
        ("cudaDriverVersion", &driver.cuda),
    ] {
        attributes.insert(name.into(), json!({"version": semantic(version)}));
    }
    if let Some(node) = gpu.numa_node {
        attributes.insert("numa".into(), json!({"int": node}));
    }
    let mut capacity = Map::new();
    let mut amount = |name: &str, amount: u64| {
        capacity.insert(name.into(), json!({"value": quantity(amount)}));
    };
    amount("memory", device.mig.map_or(gpu.memory, |part| part.memory));
    if let Some(has) = device.mig.and_then(|part| part.resources.as_ref()) {
        for (name, number) in [
            ("multiprocessors", has.multiprocessors),
            ("copyEngines", has.copy_engines),
            ("decoders", has.decoders),
            ("encoders", has.encoders),
            ("jpegEngines", has.jpeg_engines),
            ("ofaEngines", has.ofa_engines),
        ] {
            amount(name, number.into());
        }
    }
    Described { name: name(device), attributes, capacity }
}

/// A device as it is published.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    name: String,
    attributes: Map<String, Value>,
    capacity: Map<String, Value>,
}

impl Described {
    fn object(&self, version: ApiVersion) -> Value {
        let said = json!({"attributes": self.attributes, "capacity": self.capacity});
        match version {
            ApiVersion::V1Beta1 => json!({"name": self.name, "basic": said}),
            ApiVersion::V1 => {
                json!({"name": self.name, "attributes": said["attributes"], "capacity": said["capacity"]})
            }
        }
    }
}

/// The ResourceSlices of a node's pool, by their names.
pub fn slices(
    devices: &[Described],
    version: ApiVersion,
    node: &str,
    node_uid: &str,
    generation: u64,
) -> BTreeMap<String, Value> {
    let count = devices.len().div_ceil(MOST_DEVICES);
    let slice = |(number, devices): (usize, &[Described])| {
        let name = format!("{node}-{DRIVER}-{number}");
        let devices: Vec<_> = devices.iter().map(|device| device.object(version)).collect();
        let slice = json!({
            "apiVersion": format!("resource.k8s.io/{}", version.as_str()),
            "kind": "ResourceSlice",
            "metadata": {
                "name": name,
                // It goes with its node.
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid, "controller": true}
                ],
            },
            "spec": {
                "driver": DRIVER,
                "nodeName": node,
                "pool": {"name": node, "generation": generation, "resourceSliceCount": count},
                "devices": devices,
            },
        });
        (name, slice)
    };
    devices.chunks(MOST_DEVICES).enumerate().map(slice).collect()
}

/// The PCIe root complex of each GPU, `pci0000:64`, by its PCI address: devices below the same one are near each other.
pub fn pcie_roots(sys: &Path, inventory: &Inventory) -> BTreeMap<String, String> {
    let root = |gpu: &Gpu| {
        // ../../../devices/pci0000:64/0000:64:00.0/0000:65:00.0
        let link = fs::read_link(sys.join("bus/pci/devices").join(&gpu.pci)).ok()?;
        let mut words = link.iter().map(|word| word.to_string_lossy());
        words
            .find(|word| word.starts_with("pci") && word.contains(':'))
            .map(|root| (gpu.pci.clone(), root.into()))
    };
    inventory.gpus.iter().filter_map(root).collect()
}

/// A brand as NVIDIA's driver writes it.
fn brand(word: &str) -> &str {
    let known = [
        "Unknown",
        "Quadro",
        "Tesla",
        "NVS",
        "Grid",
        "GeForce",
        "Titan",
        "NvidiaVApps",
        "NvidiaVPC",
        "NvidiaVCS",
        "NvidiaVWS",
        "NvidiaCloudGaming",
        "QuadroRTX",
        "NvidiaRTX",
        "Nvidia",
        "GeForceRTX",
        "TitanRTX",
    ];
    known.into_iter().find(|known| known.eq_ignore_ascii_case(word)).unwrap_or(word)
}

/// `550.163.01` as semver.org writes it: three numbers without zeros in front.
fn semantic(version: &Version) -> String {
    let mut numbers = version.as_str().split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    format!("{}.{}.{}", next(), next(), next())
}

/// In the form in which the API server keeps it: the largest unit in which it is a whole number.
fn quantity(amount: u64) -> String {
    let (mut amount, mut unit) = (amount, 0);
    let units = ["", "Ki", "Mi", "Gi", "Ti"];
    while amount != 0 && amount.is_multiple_of(1024) && unit + 1 < units.len() {
        amount /= 1024;
        unit += 1;
    }
    format!("{amount}{}", units[unit])
}

fn at_most(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config,
        resources::{MigStrategy, Sharing, resources},
    };
    use gpurun::plan::Policy;
    use k8s_openapi::{Resource, api::resource, serde::de::DeserializeOwned};

    fn state(host: &str) -> State {
        let path = format!("{}/../../tests/hosts/{host}.json", env!("CARGO_MANIFEST_DIR"));
        let inventory: Inventory = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let resources = resources(&inventory, MigStrategy::Mixed, &Sharing::default()).unwrap();
        State {
            options: config::tests::options(&["--dra"], "version: v1"),
            policy: Policy::default(),
            inventory,
            resources,
            unhealthy: BTreeMap::new(),
        }
    }

    fn published(state: &State, version: ApiVersion) -> Vec<Value> {
        let roots = [("0000:1a:00.0".to_owned(), "pci0000:16".to_owned())].into();
        let devices: Vec<_> =
            offered(state).map(|device| described(device, &state.inventory.driver, &roots)).collect();
        slices(&devices, version, "node-1", "uid-1", 7).into_values().collect()
    }

    /// What the API server keeps of it is what was written: it drops what it does not know.
    fn is_kept<T: Resource + DeserializeOwned + serde::Serialize>(slice: &Value) {
        let read: T = serde_json::from_value(slice.clone()).unwrap();
        let mut kept = serde_json::to_value(read).unwrap();
        // Left out where there is none.
        kept.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        assert_eq!(&kept, slice);
    }

    #[test]
    fn slices_are_what_the_api_server_knows() {
        for host in ["8xh100", "a100-mig", "t4-old"] {
            let state = state(host);
            for slice in published(&state, ApiVersion::V1) {
                is_kept::<resource::v1::ResourceSlice>(&slice);
            }
            for slice in published(&state, ApiVersion::V1Beta1) {
                is_kept::<resource::v1beta1::ResourceSlice>(&slice);
            }
        }
    }

    #[test]
    fn whole_gpus_and_mig_devices_are_described() {
        let text = |host| serde_json::to_string_pretty(&published(&state(host), ApiVersion::V1)).unwrap();
        insta::assert_snapshot!("slices-a100-mig", text("a100-mig"));
        let slices = published(&state("8xh100"), ApiVersion::V1);
        let devices = slices[0]["spec"]["devices"].as_array().unwrap();
        let names: Vec<_> = devices.iter().map(|device| device["name"].as_str().unwrap()).collect();
        assert_eq!(names, [2, 3, 0, 1, 6, 7, 4, 5].map(|minor| format!("gpu-{minor}")));
    }

    #[test]
    fn a_device_that_is_not_well_is_not_offered() {
        let mut state = state("8xh100");
        let gpu = state.inventory.gpus[3].uuid.clone();
        state.unhealthy.insert(gpu.clone(), "XID 79".into());
        let uuids: Vec<_> = offered(&state).map(|device| device.uuid().to_owned()).collect();
        assert!(uuids.len() == 7 && !uuids.contains(&gpu), "{uuids:?}");
    }

    #[test]
    fn many_devices_are_several_slices_of_one_pool() {
        let state = state("t4-old");
        let device = offered(&state).next().unwrap();
        let one = described(device, &state.inventory.driver, &BTreeMap::new());
        let many = vec![one; MOST_DEVICES + 1];
        let slices = slices(&many, ApiVersion::V1, "n", "u", 3);
        let names: Vec<_> = slices.keys().map(String::as_str).collect();
        assert_eq!(names, ["n-gpu.nvidia.com-0", "n-gpu.nvidia.com-1"]);
        for slice in slices.values() {
            assert_eq!(slice["spec"]["pool"], json!({"name": "n", "generation": 3, "resourceSliceCount": 2}));
        }
    }

    #[test]
    fn amounts_and_versions_are_written_as_kubernetes_writes_them() {
        for (amount, text) in
            [(0, "0"), (132, "132"), (1024, "1Ki"), (85_899_345_920, "80Gi"), (81_559 << 20, "81559Mi")]
        {
            assert_eq!(quantity(amount), text);
        }
        for (version, text) in
            [("550.163.01", "550.163.1"), ("12.4", "12.4.0"), ("9", "9.0.0"), ("1.2.3.4", "1.2.3")]
        {
            assert_eq!(semantic(&version.parse().unwrap()), text);
        }
        assert_eq!(at_most(&"ö".repeat(40), LONGEST_TEXT).len(), 64);
        assert_eq!(at_most("xö", 2), "x");
    }

    #[test]
    fn the_root_complex_is_in_the_link_of_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        let state = state("t4-old");
        let devices = sys.path().join("bus/pci/devices");
        fs::create_dir_all(&devices).unwrap();
        assert!(pcie_roots(sys.path(), &state.inventory).is_empty());
        let pci = &state.inventory.gpus[0].pci;
        let link = format!("../../../devices/pci0000:64/0000:64:00.0/{pci}");
        std::os::unix::fs::symlink(link, devices.join(pci)).unwrap();
        assert_eq!(pcie_roots(sys.path(), &state.inventory)[pci], "pci0000:64");
    }
}
