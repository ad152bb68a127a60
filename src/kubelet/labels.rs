//! The node's labels, by which pods choose nodes: those of NVIDIA's GPU feature discovery. A function of the inventory and of
//! what is offered; written to a file that node-feature-discovery reads.

use crate::resources::{GPU, MigStrategy, Resource, SharingStrategy};
use gpurun::inventory::{Gpu, Inventory, MigDevice};
use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs,
    path::Path,
    time::SystemTime,
};

/// Names with their values, as Kubernetes allows them.
pub type Labels = BTreeMap<String, String>;

/// The longest value of a label (Kubernetes: "Labels and Selectors").
const LONGEST_VALUE: usize = 63;

/// What the kernel says of the machine, beside the inventory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Machine {
    /// `DGX A100`: the firmware's name for it (DMI).
    pub product: Option<String>,
    /// Whether every GPU is a controller without a display (PCI class 0x0302), or one with (0x0300).
    pub mode: Option<Mode>,
}

/// What the GPUs are for, by their PCI class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 3D controllers
    Compute,
    /// VGA controllers
    Graphics,
}

impl Machine {
    /// Reads sysfs, and who the machine is from another file where the administrator names one.
    pub fn read(sys: &Path, type_file: Option<&Path>, inventory: &Inventory) -> Self {
        let text = |path: &Path| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let mode = |gpu: &Gpu| {
            let class = text(&sys.join("bus/pci/devices").join(&gpu.pci).join("class"))?;
            match class.get(..6)? {
                "0x0302" => Some(Mode::Compute),
                "0x0300" => Some(Mode::Graphics),
                _ => None,
            }
        };
        let mut modes: Vec<Option<Mode>> = inventory.gpus.iter().map(mode).collect();
        modes.dedup();
        Self {
            product: text(type_file.unwrap_or(&sys.join("class/dmi/id/product_name")))
                .filter(|name| !name.is_empty()),
            mode: if let [mode] = modes[..] { mode } else { None },
        }
    }
}

/// The node's labels.
pub fn labels(inventory: &Inventory, machine: &Machine, resources: &[Resource], mig: MigStrategy) -> Labels {
    let mut labels = Labels::new();
    let mut put = |name: &str, text: &str| {
        labels.insert(format!("nvidia.com/{name}"), value(text));
    };
    put("gpu.machine", machine.product.as_deref().unwrap_or("unknown"));
    put(
        "gpu.mode",
        match machine.mode {
            Some(Mode::Compute) => "compute",
            Some(Mode::Graphics) => "graphics",
            None => "unknown",
        },
    );
    put("mig.capable", bool_word(inventory.gpus.iter().any(|gpu| gpu.mig_capable)));
    match mig {
        MigStrategy::None => {}
        MigStrategy::Single => put("mig.strategy", "single"),
        MigStrategy::Mixed => put("mig.strategy", "mixed"),
    }
    put("vgpu.present", bool_word(inventory.gpus.iter().any(|gpu| gpu.vgpu)));
    let mut cliques: Vec<_> = inventory.gpus.iter().map(|gpu| gpu.clique.as_deref()).collect();
    cliques.dedup();
    // Pods of one job go where all are in one fabric; a node in two is in none.
    if let [Some(clique)] = cliques[..] {
        put("gpu.clique", clique);
    }
    // Nothing is offered where one of its GPUs is too old for it.
    let by_mps =
        |resource: &Resource| resource.shared.is_some_and(|shared| shared.by == SharingStrategy::Mps);
    put("mps.capable", bool_word(resources.iter().any(by_mps)));
    versions(inventory, &mut put);
    for resource in resources {
        resource_labels(inventory, resource, &mut put);
    }
    labels
}

fn bool_word(it: bool) -> &'static str {
    if it { "true" } else { "false" }
}

/// Both generations of the names, which NVIDIA's discovery writes side by side.
fn versions(inventory: &Inventory, put: &mut impl FnMut(&str, &str)) {
    let driver = inventory.driver.version.to_string();
    let part = |n: usize| driver.split('.').nth(n).unwrap_or_default();
    put("cuda.driver-version.full", &driver);
    for (n, new, old) in [
        (0, "cuda.driver-version.major", "cuda.driver.major"),
        (1, "cuda.driver-version.minor", "cuda.driver.minor"),
        (2, "cuda.driver-version.revision", "cuda.driver.rev"),
    ] {
        put(new, part(n));
        put(old, part(n));
    }
    let cuda = inventory.driver.cuda.to_string();
    let (major, minor) = cuda.split_once('.').unwrap_or((&cuda, "0"));
    put("cuda.runtime-version.full", &cuda);
    for (new, old, text) in [
        ("cuda.runtime-version.major", "cuda.runtime.major", major),
        ("cuda.runtime-version.minor", "cuda.runtime.minor", minor),
    ] {
        put(new, text);
        put(old, text);
    }
}

/// `nvidia.com/gpu.product`, `nvidia.com/mig-1g.5gb.product`, …
fn resource_labels(inventory: &Inventory, resource: &Resource, put: &mut impl FnMut(&str, &str)) {
    let renamed = resource.name.strip_suffix(".shared");
    let base = renamed.unwrap_or(&resource.name);
    let name = base.strip_prefix("nvidia.com/").unwrap_or(base);
    let Some((gpu, part)) = typical(inventory, resource) else { return };
    let mut put = |what: &str, text: &str| put(&format!("{name}.{what}"), text);

    let mut product = gpu.name.replace(' ', "-");
    if let Some(part) = part {
        let _ = write!(product, "-MIG-{}", part.profile);
    }
    // A pod that asks for the plain name has to be able to tell.
    if resource.shared.is_some() && renamed.is_none() {
        product.push_str("-SHARED");
    }
    put("product", &product);
    put("count", &resource.devices.len().to_string());
    put("replicas", &resource.replicas().to_string());
    let strategy = match resource.shared.map(|shared| shared.by) {
        None => "none",
        Some(SharingStrategy::TimeSlicing) => "time-slicing",
        Some(SharingStrategy::Mps) => "mps",
    };
    put("sharing-strategy", strategy);
    put("memory", &(part.map_or(gpu.memory, |part| part.memory) >> 20).to_string());
    if base == GPU {
        let capability = gpu.compute_capability.to_string();
        let (major, minor) = capability.split_once('.').unwrap_or((&capability, "0"));
        put("family", &family(gpu));
        put("compute.major", major);
        put("compute.minor", minor);
    }
    if let Some(has) = part.and_then(|part| part.resources.as_ref()) {
        for (what, number) in [
            ("multiprocessors", has.multiprocessors),
            ("slices.gi", has.gpu_instance_slices),
            ("slices.ci", has.compute_instance_slices),
            ("engines.copy", has.copy_engines),
            ("engines.decoder", has.decoders),
            ("engines.encoder", has.encoders),
            ("engines.jpeg", has.jpeg_engines),
            ("engines.ofa", has.ofa_engines),
        ] {
            put(what, &number.to_string());
        }
    }
}

/// The GPU of which the resource has most, and the MIG device if it is one: a label has one value. Of equals the first.
fn typical<'a>(inventory: &'a Inventory, resource: &Resource) -> Option<(&'a Gpu, Option<&'a MigDevice>)> {
    let offered: Vec<_> = resource
        .devices
        .iter()
        .filter_map(|device| {
            inventory.gpus.iter().find_map(|gpu| {
                let part = gpu.mig_devices.iter().find(|part| part.uuid == device.uuid);
                (gpu.uuid == device.uuid || part.is_some()).then_some((gpu, part))
            })
        })
        .collect();
    let mut of_name: HashMap<&str, usize> = HashMap::new();
    for (gpu, _) in &offered {
        *of_name.entry(&gpu.name).or_default() += 1;
    }
    offered.into_iter().rev().max_by_key(|(gpu, _)| of_name[gpu.name.as_str()])
}

/// The architecture's name as NVIDIA's discovery writes it.
fn family(gpu: &Gpu) -> String {
    match gpu.architecture.to_lowercase().as_str() {
        "ada" => "ada-lovelace".into(),
        "unknown" => "undefined".into(),
        known => known.into(),
    }
}

/// Text as a label's value: letters, digits, `-`, `_`, `.`, and a letter or digit at both ends.
fn value(text: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let replaced: String =
        text.trim().chars().map(|c| if allowed(c) { c } else { '-' }).take(LONGEST_VALUE).collect();
    replaced.trim_matches(|c: char| !c.is_ascii_alphanumeric()).into()
}

/// When labels last were others, in seconds since 1970: with them, and of the same time as long as they are the same.
pub fn stamp(labels: &mut Labels, before: Option<&Labels>, now: SystemTime) {
    const NAME: &str = "nvidia.com/gfd.timestamp";
    let is_stamp = |name: &String| name == NAME;
    let same =
        before.is_some_and(|before| before.iter().filter(|(name, _)| !is_stamp(name)).eq(labels.iter()));
    let now = || now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs().to_string();
    let time = before.filter(|_| same).and_then(|before| before.get(NAME).cloned()).unwrap_or_else(now);
    labels.insert(NAME.into(), time);
}

/// As node-feature-discovery reads them ("Local feature source"): one `name=value` a line.
pub fn text(labels: &Labels) -> String {
    labels.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{Replicated, Sharing, resources};

    fn host(name: &str) -> Inventory {
        let path = format!("{}/../../tests/hosts/{name}.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn shared(by: SharingStrategy, rename: bool) -> Sharing {
        let replicated = Replicated { name: GPU.into(), replicas: 4 };
        Sharing { by, rename_by_default: rename, resources: vec![replicated], ..Sharing::default() }
    }

    fn of(host: &Inventory, mig: MigStrategy, sharing: &Sharing) -> Labels {
        let machine = Machine { product: Some("DGX H100".into()), mode: Some(Mode::Compute) };
        labels(host, &machine, &resources(host, mig, sharing).unwrap(), mig)
    }

    #[test]
    fn the_labels_are_those_of_nvidias_discovery() {
        insta::assert_snapshot!("8xh100", text(&of(&host("8xh100"), MigStrategy::None, &Sharing::default())));
        insta::assert_snapshot!(
            "a100-mig-mixed",
            text(&of(&host("a100-mig"), MigStrategy::Mixed, &Sharing::default()))
        );
    }

    #[test]
    fn a_shared_gpu_says_so_in_its_product_or_in_its_resource() {
        for (by, word, mps_capable) in
            [(SharingStrategy::TimeSlicing, "time-slicing", "false"), (SharingStrategy::Mps, "mps", "true")]
        {
            for (rename, product) in
                [(false, "NVIDIA-H100-80GB-HBM3-SHARED"), (true, "NVIDIA-H100-80GB-HBM3")]
            {
                let labels = of(&host("8xh100"), MigStrategy::None, &shared(by, rename));
                let label = |name: &str| labels[&format!("nvidia.com/{name}")].as_str();
                assert_eq!(label("gpu.product"), product);
                assert_eq!([label("gpu.replicas"), label("gpu.count")], ["4", "8"]);
                assert_eq!([label("gpu.sharing-strategy"), label("mps.capable")], [word, mps_capable]);
            }
        }
    }

    #[test]
    fn the_time_is_that_of_the_last_change() {
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let labels = |count: &str| Labels::from([("nvidia.com/gpu.count".to_owned(), count.to_owned())]);
        let time = |labels: &Labels| labels["nvidia.com/gfd.timestamp"].clone();
        let mut first = labels("8");
        stamp(&mut first, None, at(100));
        let mut same = labels("8");
        stamp(&mut same, Some(&first), at(200));
        let mut less = labels("7");
        stamp(&mut less, Some(&same), at(300));
        assert_eq!([time(&first), time(&same), time(&less)], ["100", "100", "300"]);
    }

    #[test]
    fn a_fabric_is_named_where_all_gpus_are_in_it() {
        let mut host = host("8xh100");
        let clique = |host: &Inventory| {
            of(host, MigStrategy::None, &Sharing::default()).get("nvidia.com/gpu.clique").cloned()
        };
        assert_eq!(clique(&host), None);
        let name = "0a1b2c3d-0000-0000-0000-00000000abcd.4";
        host.gpus.iter_mut().for_each(|gpu| gpu.clique = Some(name.into()));
        assert_eq!(clique(&host).as_deref(), Some(name));
        host.gpus[7].clique = None;
        assert_eq!(clique(&host), None);
    }

    #[test]
    fn of_several_kinds_the_one_is_named_of_which_there_are_most() {
        let mut host = host("8xh100");
        for gpu in &mut host.gpus[..3] {
            gpu.name = "Tesla T4".into();
        }
        let labels = of(&host, MigStrategy::None, &Sharing::default());
        assert_eq!(labels["nvidia.com/gpu.product"], "NVIDIA-H100-80GB-HBM3");
        assert_eq!(labels["nvidia.com/gpu.count"], "8");
    }

    #[test]
    fn a_value_is_one_that_kubernetes_takes() {
        for (text, is) in [
            ("NVIDIA RTX 6000 Ada Generation", "NVIDIA-RTX-6000-Ada-Generation"),
            ("X (rev. 2)", "X--rev.-2"),
            ("_-.", ""),
            ("ö", ""),
        ] {
            assert_eq!(value(text), is);
        }
        assert_eq!(value(&"x".repeat(100)).len(), 63);
    }

    #[test]
    fn the_machine_is_read_from_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        let inventory = host("8xh100");
        assert_eq!(Machine::read(sys.path(), None, &inventory), Machine::default());
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("class/dmi/id/product_name", "DGX H100\n");
        for gpu in &inventory.gpus {
            write(&format!("bus/pci/devices/{}/class", gpu.pci), "0x030200\n");
        }
        let machine = Machine::read(sys.path(), None, &inventory);
        let other = sys.path().join("class/dmi/id/product_name");
        fs::write(sys.path().join("type"), "p5.48xlarge\n").unwrap();
        let named = Machine::read(sys.path(), Some(&sys.path().join("type")), &inventory);
        assert_eq!(named.product.as_deref(), Some("p5.48xlarge"), "{}", other.display());
        assert_eq!(machine, Machine { product: Some("DGX H100".into()), mode: Some(Mode::Compute) });
        write(&format!("bus/pci/devices/{}/class", inventory.gpus[3].pci), "0x030000\n");
        assert_eq!(Machine::read(sys.path(), None, &inventory).mode, None, "one of them drives a display");
    }
}
