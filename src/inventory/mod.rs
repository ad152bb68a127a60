//! What the host has: driver, GPUs, files, device nodes. Reads and decides nothing.
//!
//! ```text
//! driver        which kernel module is loaded ──► driver_files   its files, found in the driver_root (elf)
//!                                                  │
//! gpu           GPUs with their nodes ◄── nvml ◄───┘   libnvidia-ml, loaded by the program gpurun-nvml
//!               (device_node, mig, procfs)
//! snapshot      all of it as it was last read, and whether it is true still
//! watch         when that is worth another look
//! access        which device nodes this process may open
//! platform      the drivers that NVML does not find: Windows', Tegra's
//! ```
#![forbid(unsafe_code)]

mod access;
pub mod binfmt;
mod device_node;
mod driver;
mod driver_files;
mod driver_root;
pub mod elf;
mod gpu;
mod mig;
pub mod nvml;
pub mod platform;
mod procfs;
mod snapshot;
mod types;
pub mod watch;

pub use driver_root::{Found, OpenRoot};
pub use snapshot::{SYSTEM_STATE_DIR, numbers};
pub use types::*;

use crate::{
    error::{Code, Error, OrFail, Result},
    vocabulary::Version,
};
use std::path::{Path, PathBuf};

impl Host {
    /// A host with the driver's files below `driver_root` and its device nodes below `dev_root`, which is the driver root
    /// unless it is named.
    pub fn new(driver_root: PathBuf, dev_root: Option<PathBuf>) -> Self {
        // What is found becomes the source of mounts, made from elsewhere.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let driver_root = absolute(driver_root);
        Self {
            dev_root: dev_root.map_or_else(|| driver_root.clone(), absolute),
            driver_root: DriverRoot(driver_root),
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }

    /// A host in a directory, for machines without a GPU: the driver root is `dir/driver`, device nodes are in `dir/dev`,
    /// the kernel's files in `dir/proc` and `dir/sys`.
    pub fn simulated(dir: &Path) -> Self {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
        Self {
            driver_root: DriverRoot(dir.join("driver")),
            proc: dir.join("proc"),
            sys: dir.join("sys"),
            dev_root: dir,
        }
    }
}

impl Inventory {
    /// Reads the host afresh. Runs `gpurun-nvml`.
    ///
    /// # Errors
    /// [`Code::NoDriver`], [`Code::NvmlMissing`], [`Code::NvmlFailed`], [`Code::VersionMismatch`],
    /// [`Code::DeviceNodeMissing`] when the driver as a whole cannot be used. What is wrong with one GPU goes to `problems`.
    pub fn read(host: &Host) -> Result<Self> {
        Self::read_by(host, nvml::find_reader)
    }

    /// The inventory from a snapshot in `state_dir` if that is true still, else [`Inventory::read`] and a new snapshot. An
    /// ordinary user is also served by root's snapshot in [`SYSTEM_STATE_DIR`]. A snapshot counts only if it and its
    /// directory are root's or the user's own and nobody else may write to them.
    ///
    /// # Errors
    /// Those of [`Inventory::read`].
    pub fn current(host: &Host, state_dir: &Path) -> Result<Self> {
        snapshot::current(host, state_dir, || Self::read(host))
    }

    /// [`Inventory::read`], and a new snapshot of it.
    ///
    /// # Errors
    /// Those of [`Inventory::read`].
    pub fn anew(host: &Host, state_dir: &Path) -> Result<Self> {
        snapshot::anew(host, state_dir, || Self::read(host))
    }

    /// Reads what [`Inventory::to_json`] wrote.
    ///
    /// # Errors
    /// [`Code::Inventory`] when it is something else.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes)
            .or_fail(Code::Inventory, || "the recorded inventory cannot be understood")
    }

    /// One line of JSON: a recorded host.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The same host as a process calls it to which the directory `from` of this one is `to`: a container has the host's root
    /// somewhere, and who mounts on the host's side wants the host's names. Paths that are not below `from` stay.
    #[must_use]
    pub fn renamed(mut self, from: &Path, to: &Path) -> Self {
        let rename = |path: &mut PathBuf| {
            if let Ok(below) = path.strip_prefix(from) {
                *path = if below.as_os_str().is_empty() { to.into() } else { to.join(below) };
            }
        };
        let driver = &mut self.driver;
        rename(&mut driver.root.0);
        driver.files.iter_mut().for_each(|file| rename(&mut file.path.0));
        driver.gated_files.iter_mut().for_each(|file| rename(&mut file.path.0));
        let of_driver =
            driver.control_nodes.iter_mut().chain(driver.gated_nodes.iter_mut().map(|(_, node)| node));
        let of_gpus = self.gpus.iter_mut().flat_map(|gpu| {
            let of_parts = gpu.mig_devices.iter_mut().flat_map(|part| &mut part.cap_nodes);
            [&mut gpu.node].into_iter().chain(&mut gpu.dri_nodes).chain(of_parts)
        });
        of_driver.chain(of_gpus).for_each(|node| rename(&mut node.path.0));
        self
    }

    fn read_by(host: &Host, find_reader: impl FnOnce() -> Result<PathBuf>) -> Result<Self> {
        let version = driver::loaded_version(host).or_else(|error| {
            // A root that does not exist explains more than a driver that is not found.
            host.driver_root.open()?;
            Err(error)
        })?;
        // Before the slow reading: what changes meanwhile is noticed at the next start.
        let mut fingerprint = Fingerprint::of_kernel(host);
        let root = host.driver_root.open()?;
        let found = driver_files::find(host, &root, &version)?;
        fingerprint.mtimes = found.watched;
        fingerprint.objects = found.objects;

        let facts = nvml::read(&find_reader()?, &found.nvml, found.cuda.as_ref())
            .map_err(|error| without_control_node(host, error))?;
        let read = facts.driver_version.parse().ok();
        if let Some(other) = read.filter(|read| *read != version) {
            return Err(driver::mismatch(&version, &[other], &host.driver_root.0.display().to_string()));
        }
        let text = |path: &str| procfs::read(&host.proc.join(path));
        let minors = mig::Minors::parse(&text("driver/nvidia-caps/mig-minors").unwrap_or_default());
        let (gpus, mut problems) = gpu::assemble(host, facts.gpus, &minors, &mut fingerprint);
        let control_nodes: Vec<DeviceNode> =
            device_node::CONTROL.iter().filter_map(|path| gpu::node(host, path, &mut fingerprint)).collect();
        if !gpus.is_empty() {
            let majors = text("devices").unwrap_or_default();
            problems.extend(device_node::unified_memory_problem(&control_nodes, &majors));
        }
        let gated_nodes = host.gated_nodes(&minors);
        fingerprint.nodes.extend(
            gated_nodes.iter().map(|(_, node)| (node.path.0.clone(), Some((node.major, node.minor)))),
        );
        let cuda = facts.cuda_version.unwrap_or_default();
        Ok(Self {
            fingerprint,
            driver: Driver {
                version,
                cuda: Version::of(cuda / 1000, cuda % 1000 / 10),
                root: host.driver_root.clone(),
                files: found.files,
                control_nodes,
                gated_nodes,
                gated_files: found.gated,
                params: text("driver/nvidia/params"),
            },
            gpus,
            problems,
            closed: [].into(),
        })
    }
}

/// NVML says "driver not loaded" also when the module is loaded but its control node is missing.
fn without_control_node(host: &Host, error: Error) -> Error {
    let node = Path::new("/dev/nvidiactl");
    if error.code() != Code::NoDriver || host.device_node(node).is_some() {
        return error;
    }
    let what = format!("the driver's control node {} is missing", host.device_path(node).0.display());
    Error::new(Code::DeviceNodeMissing, what)
        .cause(format!("the kernel module is loaded, but {}", error.cause_line()))
        .fix("make the nodes with `nvidia-modprobe -c 0 -u` (nvidia-persistenced and nvidia-smi do so as root)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_renamed_wherever_it_says_where_something_is() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/a100-mig.json");
        let there = String::from_utf8(std::fs::read(path).unwrap()).unwrap();
        let host = Inventory::from_json(there.as_bytes()).unwrap();
        let as_json = |host: &Inventory| serde_json::to_value(host).unwrap();
        let inside = host.clone().renamed(Path::new("/"), Path::new("/driver-root"));
        let text = String::from_utf8(inside.to_json()).unwrap();
        assert!(!text.contains("\"path\":\"/usr") && !text.contains("\"path\":\"/dev"), "{text}");
        assert_eq!(inside.driver.root.0, Path::new("/driver-root"));
        assert_eq!(inside.gpus[0].node.path.0, Path::new("/driver-root/dev/nvidia0"));
        assert_eq!(inside.gpus[0].node.container_path, host.gpus[0].node.container_path);
        assert_eq!(as_json(&inside.renamed(Path::new("/driver-root"), Path::new("/"))), as_json(&host));
    }
    use std::{fs, os::unix::fs::symlink};

    /// A host in a directory with one GPU and a reader that is a shell script. Its nodes are links to the kernel's own
    /// memory devices, so that no privilege is needed.
    pub(super) struct SmallHost {
        pub(super) host: Host,
        dir: tempfile::TempDir,
    }

    const ONE_GPU: &str = r#"{"driver_version":"550.163.01","cuda_version":12040,"gpus":[GPU]}"#;
    const GPU: &str = r#"{"answers":{"index":0,"minor":0,"uuid":"GPU-aa","pci":"0000:07:00.0","name":"NVIDIA A100",
        "brand":"nvidia","architecture":"Ampere","compute_capability":[8,0],"memory":42,"persistence":true,"mig_enabled":true,
        "mig_devices":[{"index":0,"uuid":"MIG-bb","gpu_instance":7,"compute_instance":0,"profile":"1g.5gb","memory":5}],
        "nvlinks":{},"topology":{}}}"#;

    impl SmallHost {
        pub(super) fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let small = Self { host: Host::simulated(dir.path()), dir };
            small.write("sys/module/nvidia/version", "550.163.01\n");
            small.write("sys/bus/pci/devices/0000:07:00.0/numa_node", "1\n");
            small.write("proc/devices", "Character devices:\n195 nvidia\n  1 nvidia-uvm\n");
            small.write("proc/sys/kernel/random/boot_id", "boot\n");
            small.write(
                "proc/driver/nvidia/gpus/0000:07:00.0/information",
                "GPU UUID: \t GPU-aa\nDevice Minor: \t 0\n",
            );
            small.write(
                "proc/driver/nvidia-caps/mig-minors",
                "config 1\ngpu0/gi7/access 66\ngpu0/gi7/ci0/access 67\n",
            );
            fs::create_dir(small.path("dev")).unwrap();
            fs::create_dir(small.path("dev/nvidia-caps")).unwrap();
            for node in
                ["nvidiactl", "nvidia-uvm", "nvidia0", "nvidia-caps/nvidia-cap66", "nvidia-caps/nvidia-cap67"]
            {
                symlink("/dev/null", small.path("dev").join(node)).unwrap();
            }
            elf::tests::compile(&small.path("driver/usr/lib64/libnvidia-ml.so.550.163.01"), &[]);
            small.reader(&ONE_GPU.replace("GPU]", &format!("{GPU}]")));
            small
        }
        pub(super) fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }
        pub(super) fn write(&self, name: &str, text: &str) {
            let path = self.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        /// Lets the reader print this.
        pub(super) fn reader(&self, answer: &str) {
            nvml::tests::script(&self.path("reader"), &format!("cat <<'END'\n{answer}\nEND"));
        }
        pub(super) fn read(&self) -> Result<Inventory> {
            Inventory::read_by(&self.host, || Ok(self.path("reader")))
        }
        fn only_problem(&self) -> Problem {
            let inventory = self.read().unwrap();
            let [problem] = &inventory.problems[..] else { panic!("{:?}", inventory.problems) };
            problem.clone()
        }
    }

    #[test]
    fn facts_of_nvml_the_kernel_and_dev_come_together() {
        let small = SmallHost::new();
        let inventory = small.read().unwrap();
        assert_eq!(inventory.problems, []);
        assert_eq!(
            (inventory.driver.version.as_str(), inventory.driver.cuda.as_str()),
            ("550.163.01", "12.4")
        );
        let [gpu] = &inventory.gpus[..] else { panic!() };
        assert_eq!(
            (gpu.uuid.as_str(), gpu.numa_node, gpu.compute_capability.as_str()),
            ("GPU-aa", Some(1), "8.0")
        );
        assert_eq!(gpu.node.container_path.0, Path::new("/dev/nvidia0"));
        let [mig] = &gpu.mig_devices[..] else { panic!() };
        let caps: Vec<_> = mig.cap_nodes.iter().map(|node| node.container_path.0.to_str().unwrap()).collect();
        assert_eq!(caps, ["/dev/nvidia-caps/nvidia-cap66", "/dev/nvidia-caps/nvidia-cap67"]);
        let again = Inventory::from_json(&inventory.to_json()).unwrap();
        assert_eq!(again.to_json(), inventory.to_json());
    }

    #[test]
    fn a_missing_node_costs_what_it_belongs_to_and_no_more() {
        let small = SmallHost::new();
        fs::remove_file(small.path("dev/nvidia-caps/nvidia-cap67")).unwrap();
        let problem = small.only_problem();
        assert_eq!(problem.subjects, ["0:0", "MIG-bb"]);
        assert!(problem.fix.contains("gpu0/mig/gi7/ci0/access"), "{problem:?}");
        assert!(small.read().unwrap().gpus[0].mig_devices.is_empty());

        let small = SmallHost::new();
        fs::remove_file(small.path("dev/nvidia0")).unwrap();
        let problem = small.only_problem();
        assert_eq!(
            (problem.code.as_str(), &problem.subjects[..]),
            ("GPU-0014", &["0", "GPU-aa", "0000:07:00.0"].map(String::from)[..])
        );
        assert!(small.read().unwrap().gpus.is_empty());
    }

    #[test]
    fn a_lost_gpu_is_named_by_exclusion() {
        let small = SmallHost::new();
        small.write("proc/driver/nvidia/gpus/0000:0f:00.0/information", "GPU UUID: \t GPU-cc\n");
        let lost = r#"{"lost":{"index":1,"words":"fell off"}}"#;
        small.reader(&ONE_GPU.replace("GPU]", &format!("{GPU},{lost}]")));
        let problem = small.only_problem();
        assert_eq!(problem.subjects, ["1", "GPU-cc", "0000:0f:00.0"]);
        assert!(problem.what.contains("fell off"));
        assert_eq!(small.read().unwrap().gpus.len(), 1);
        // Two that are unaccounted for cannot be told apart.
        small.write("proc/driver/nvidia/gpus/0000:1f:00.0/information", "GPU UUID: \t GPU-dd\n");
        assert_eq!(small.only_problem().subjects, ["1"]);
    }

    #[test]
    fn cuda_without_unified_memory_is_a_problem() {
        let small = SmallHost::new();
        small.write("proc/devices", "Character devices:\n195 nvidia\n510 nvidia-uvm\n");
        assert!(small.only_problem().what.contains("major number 1, but the kernel uses 510"));
        fs::remove_file(small.path("dev/nvidia-uvm")).unwrap();
        let problem = small.only_problem();
        assert!(problem.what.contains("missing") && problem.fix.contains("nvidia-modprobe -u"));
    }

    #[test]
    fn a_module_that_nvml_sees_differently_is_a_mismatch() {
        let small = SmallHost::new();
        small.reader(&ONE_GPU.replace("GPU]", "]").replace("550.163.01", "535.216.03"));
        assert_eq!(small.read().unwrap_err().code(), Code::VersionMismatch);
    }

    #[test]
    fn a_driver_that_nvml_does_not_find_lacks_its_control_node() {
        let small = SmallHost::new();
        small.reader(
            r#"{"error":"GPU-0010","what":"no driver","cause":"NVIDIA driver is not loaded","fix":"f"}"#,
        );
        assert_eq!(small.read().unwrap_err().code(), Code::NoDriver);
        fs::remove_file(small.path("dev/nvidiactl")).unwrap();
        let error = small.read().unwrap_err();
        assert_eq!(error.code(), Code::DeviceNodeMissing);
        assert!(error.fix_line().contains("nvidia-modprobe"), "{error}");
    }

    #[test]
    fn recorded_garbage_is_an_error() {
        assert_eq!(Inventory::from_json(b"{\"gpus\":[]}").unwrap_err().code(), Code::Inventory);
    }
}
