//! Device nodes, with the numbers that they really have.

use super::{
    mig::Minors,
    procfs,
    types::{ContainerPath, DeviceNode, Host, HostPath, Problem},
};
use crate::{error::Code, vocabulary::GatedFeature};
use rustix::fs::{FileType, major, minor, stat};
use std::path::Path;

/// Where the nodes of MIG capabilities are (driver README, "Multi-Instance GPU").
const CAPS_DIR: &str = "/dev/nvidia-caps";
/// Where the nodes of IMEX channels are.
const IMEX_DIR: &str = "/dev/nvidia-caps-imex-channels";

/// The nodes that every GPU container shares: NVML and CUDA open the first, CUDA the next two, display the last.
pub const CONTROL: &[&str] =
    &["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"];

/// The same with their numbers: by which names of /proc/devices the major one is found, and the minor one (driver README,
/// "How and why are device nodes created", and nvidia-modprobe).
const CONTROL_NUMBERS: &[(&str, &[&str], u32)] = &[
    // Older modules are called nvidia-frontend there.
    ("/dev/nvidiactl", &["nvidia", "nvidia-frontend"], 255),
    ("/dev/nvidia-modeset", &["nvidia", "nvidia-frontend"], 254),
    ("/dev/nvidia-uvm", &["nvidia-uvm"], 0),
    ("/dev/nvidia-uvm-tools", &["nvidia-uvm"], 1),
];

/// A control node's path, and its numbers where its module is loaded.
pub type ControlNode = (HostPath, Option<(u32, u32)>);

impl Host {
    /// The control nodes that are not there.
    pub fn missing_control_nodes(&self) -> Vec<ControlNode> {
        let devices = procfs::read(&self.proc.join("devices")).unwrap_or_default();
        let majors: Vec<_> = procfs::device_majors(&devices).collect();
        let major =
            |names: &[&str]| majors.iter().find(|(_, name)| names.contains(name)).map(|(major, _)| *major);
        CONTROL_NUMBERS
            .iter()
            .map(|(path, names, minor)| {
                (self.device_path(Path::new(path)), major(names).map(|major| (major, *minor)))
            })
            .filter(|(path, _)| path.0.symlink_metadata().is_err())
            .collect()
    }

    /// Where `/dev/…` of a container is on this host.
    pub fn device_path(&self, container_path: &Path) -> HostPath {
        HostPath(self.dev_root.join(container_path.strip_prefix("/").unwrap_or(container_path)))
    }

    /// The node that a container calls `container_path`; `None` when there is none or it is not a character device.
    pub fn device_node(&self, container_path: &Path) -> Option<DeviceNode> {
        let path = self.device_path(container_path);
        let stat = stat(&path.0).ok()?;
        (FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice).then(|| DeviceNode {
            path,
            container_path: ContainerPath(container_path.into()),
            major: major(stat.st_rdev),
            minor: minor(stat.st_rdev),
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
        })
    }

    /// Every node of the driver's that a container may get but those of gated features: GPUs, control nodes, MIG capabilities.
    pub fn driver_nodes(&self) -> Vec<DeviceNode> {
        const GATED: [&str; 3] = ["nvidia-fs", "nvidia-nvswitch", "nvidia-nvlink"];
        let named = |dir: &str| {
            let names = procfs::names(&self.device_path(Path::new(dir)).0).into_iter();
            let wanted = |name: &String| {
                name.starts_with("nvidia") && !GATED.iter().any(|gated| name.starts_with(gated))
            };
            names
                .filter(wanted)
                .filter_map(|name| self.device_node(&Path::new(dir).join(name)))
                .collect::<Vec<_>>()
        };
        [named("/dev"), named(CAPS_DIR)].concat()
    }

    /// /dev/nvidia-caps/nvidia-cap`minor`.
    pub fn cap_node(&self, minor: u32) -> Option<DeviceNode> {
        self.device_node(&Path::new(CAPS_DIR).join(format!("nvidia-cap{minor}")))
    }

    /// The card and render nodes that the kernel's DRM made for a PCI device.
    pub fn dri_nodes(&self, pci: &str) -> Vec<DeviceNode> {
        procfs::names(&self.sys.join("bus/pci/devices").join(pci).join("drm"))
            .iter()
            .filter(|name| numbered(name, "card").or_else(|| numbered(name, "renderD")).is_some())
            .filter_map(|name| self.device_node(&Path::new("/dev/dri").join(name)))
            .collect()
    }

    /// The nodes that a container gets only when it asks for their feature.
    pub fn gated_nodes(&self, minors: &Minors) -> Vec<(GatedFeature, DeviceNode)> {
        let mut nodes = Vec::new();
        let mut all = |feature, dir: &str, accept: &dyn Fn(&str) -> Option<u32>| {
            let mut names: Vec<_> = procfs::names(&self.device_path(Path::new(dir)).0)
                .into_iter()
                .filter_map(|name| Some((accept(&name)?, name)))
                .collect();
            names.sort_unstable();
            nodes.extend(
                names
                    .iter()
                    .filter_map(|(_, name)| Some((feature, self.device_node(&Path::new(dir).join(name))?))),
            );
        };
        // One node for each NVMe or distributed file system that GPUDirect Storage serves.
        all(GatedFeature::Gds, "/dev", &|name| numbered(name, "nvidia-fs"));
        // Verbs for each adapter, and the connection manager that all of them share.
        all(GatedFeature::Mofed, "/dev/infiniband", &|name| {
            numbered(name, "uverbs").or_else(|| (name == "rdma_cm").then_some(u32::MAX))
        });
        all(GatedFeature::NvSwitch, "/dev", &|name| {
            numbered(name, "nvidia-nvswitch").or_else(|| (name == "nvidia-nvswitchctl").then_some(u32::MAX))
        });
        all(GatedFeature::GdrCopy, "/dev", &|name| (name == "gdrdrv").then_some(0));
        all(GatedFeature::Imex, IMEX_DIR, &|name| numbered(name, "channel"));
        let caps = [(GatedFeature::MigConfig, minors.config), (GatedFeature::MigMonitor, minors.monitor)];
        nodes.extend(caps.into_iter().filter_map(|(feature, minor)| Some((feature, self.cap_node(minor?)?))));
        nodes
    }
}

/// What keeps CUDA from starting although NVML answers: /dev/nvidia-uvm is missing, or has a number from before a reboot.
pub fn unified_memory_problem(control_nodes: &[DeviceNode], proc_devices: &str) -> Option<Problem> {
    let node = control_nodes.iter().find(|node| node.container_path.0 == Path::new("/dev/nvidia-uvm"));
    let major =
        procfs::device_majors(proc_devices).find(|(_, name)| *name == "nvidia-uvm").map(|(major, _)| major);
    let what = match (node, major) {
        (None, _) => "the device node /dev/nvidia-uvm is missing, without which CUDA cannot start".into(),
        (Some(node), Some(major)) if node.major != major => format!(
            "the device node {} has major number {}, but the kernel uses {major} for nvidia-uvm since the last reboot",
            node.path.0.display(),
            node.major
        ),
        _ => return None,
    };
    Some(Problem {
        code: Code::DeviceNodeMissing.to_string(),
        subjects: vec!["nvidia-uvm".into()],
        what,
        fix: "run `modprobe nvidia-uvm && rm -f /dev/nvidia-uvm && nvidia-modprobe -u -c 0` as root".into(),
    })
}

/// The number behind `prefix`, where nothing else follows.
fn numbered(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A host whose device nodes are the kernel's own memory devices, so that no privilege is needed.
    fn host(dir: &Path, nodes: &[(&str, &str)]) -> Host {
        for (node, device) in nodes {
            let path = dir.join(node);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(device, path).unwrap();
        }
        Host::simulated(dir)
    }

    #[test]
    fn a_node_has_its_real_numbers_and_must_be_a_character_device() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(
            dir.path(),
            &[("dev/nvidia0", "/dev/null"), ("dev/nvidia1", "/etc/passwd"), ("dev/nvidia2", "/nowhere")],
        );
        let node = host.device_node(Path::new("/dev/nvidia0")).unwrap();
        assert_eq!((node.major, node.minor, node.mode), (1, 3, 0o666));
        assert_eq!(node.path.0, dir.path().join("dev/nvidia0"));
        assert_eq!(node.container_path.0, Path::new("/dev/nvidia0"));
        assert_eq!(host.device_node(Path::new("/dev/nvidia1")), None);
        assert_eq!(host.device_node(Path::new("/dev/nvidia2")), None);
        assert_eq!(host.device_node(Path::new("/dev/nvidia3")), None);
    }

    #[test]
    fn control_nodes_that_are_not_there_have_the_numbers_of_their_module() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), &[("dev/nvidia-modeset", "/nowhere")]);
        assert_eq!(CONTROL_NUMBERS.len(), CONTROL.len());
        assert!(host.missing_control_nodes().iter().all(|(_, numbers)| numbers.is_none()));
        std::fs::create_dir(dir.path().join("proc")).unwrap();
        let devices = "Character devices:\n195 nvidia-frontend\n510 nvidia-uvm\n\nBlock devices:\n";
        std::fs::write(dir.path().join("proc/devices"), devices).unwrap();
        let missing = host.missing_control_nodes();
        let named: Vec<_> =
            missing.iter().map(|(path, at)| (path.0.file_name().unwrap().to_str().unwrap(), *at)).collect();
        assert_eq!(
            named,
            [
                ("nvidiactl", Some((195, 255))),
                ("nvidia-uvm", Some((510, 0))),
                ("nvidia-uvm-tools", Some((510, 1)))
            ]
        );
    }

    #[test]
    fn gated_nodes_come_by_feature_and_in_order_of_number() {
        let dir = tempfile::tempdir().unwrap();
        let null = |node| (node, "/dev/null");
        let host = host(
            dir.path(),
            &[
                null("dev/nvidia-fs10"),
                null("dev/nvidia-fs2"),
                null("dev/nvidia-fs-other"),
                null("dev/infiniband/uverbs0"),
                null("dev/infiniband/rdma_cm"),
                null("dev/infiniband/umad0"),
                null("dev/nvidia-nvswitch0"),
                null("dev/nvidia-nvswitchctl"),
                null("dev/gdrdrv"),
                null("dev/nvidia-caps-imex-channels/channel0"),
                null("dev/nvidia-caps/nvidia-cap1"),
                null("dev/nvidia-caps/nvidia-cap2"),
            ],
        );
        let minors = Minors::parse("config 1\nmonitor 2\n");
        let nodes = host.gated_nodes(&minors);
        let names: Vec<_> = nodes.iter().map(|(_, node)| node.container_path.0.to_str().unwrap()).collect();
        assert_eq!(
            names,
            [
                "/dev/nvidia-fs2",
                "/dev/nvidia-fs10",
                "/dev/infiniband/uverbs0",
                "/dev/infiniband/rdma_cm",
                "/dev/nvidia-nvswitch0",
                "/dev/nvidia-nvswitchctl",
                "/dev/gdrdrv",
                "/dev/nvidia-caps-imex-channels/channel0",
                "/dev/nvidia-caps/nvidia-cap1",
                "/dev/nvidia-caps/nvidia-cap2",
            ]
        );
        let driver: Vec<_> = host.driver_nodes().into_iter().map(|node| node.container_path.0).collect();
        assert_eq!(
            driver,
            [Path::new("/dev/nvidia-caps/nvidia-cap1"), Path::new("/dev/nvidia-caps/nvidia-cap2")]
        );
        assert_eq!(nodes[8].0, GatedFeature::MigConfig);
        assert_eq!(nodes[9].0, GatedFeature::MigMonitor);
    }
}
