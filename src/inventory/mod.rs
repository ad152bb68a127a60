//! What the host has: driver, GPUs, files, device nodes. Reads and decides nothing.
//!
//! ```text
//! driver        which kernel module is loaded ──► driver_files   its files, found in the driver_root (ldcache, elf)
//!                                                  │
//! gpu           GPUs with their nodes ◄── nvml ◄───┘   libnvidia-ml, loaded by the program gpurun-nvml
//!               (device_node, mig, procfs)
//! snapshot      all of it as it was last read, and whether it is true still
//! ```
#![forbid(unsafe_code)]

mod device_node;
mod driver;
mod driver_files;
mod driver_root;
mod elf;
mod gpu;
pub mod ldcache;
mod mig;
pub mod nvml;
mod procfs;
mod snapshot;
mod types;

pub use driver_root::{Found, OpenRoot};
pub use snapshot::SYSTEM_STATE_DIR;
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
        Self::read_by(host, &nvml::find_reader)
    }

    /// The inventory from a snapshot in `state_dir` if that is true still, else [`Inventory::read`] and a new snapshot. An
    /// ordinary user is also served by root's snapshot in [`SYSTEM_STATE_DIR`]. A snapshot counts only if it and its
    /// directory are root's or the user's own and nobody else may write to them.
    ///
    /// # Errors
    /// Those of [`Inventory::read`].
    pub fn current(host: &Host, state_dir: &Path) -> Result<Self> {
        snapshot::current(host, state_dir)
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

    fn read_by(host: &Host, find_reader: &dyn Fn() -> Result<PathBuf>) -> Result<Self> {
        let version = driver::loaded_version(host)?;
        // Before the slow reading: what changes meanwhile is noticed at the next start.
        let mut fingerprint = Fingerprint::of_kernel(host);
        let root = host.driver_root.open()?;
        let found = driver_files::find(host, &root, &version)?;
        fingerprint.mtimes = found.watched;

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
                params: text("driver/nvidia/params"),
            },
            gpus,
            problems,
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
