//! The inventory's values. They serialise: a host recorded as JSON is a fixture, a bug report and the cache of the
//! start path, all in one.

use crate::vocabulary::{DriverCapability, GatedFeature, Version};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// A path as this process can open it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostPath(pub PathBuf);

/// A path as a process in the container sees it: absolute, normalised.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ContainerPath(pub PathBuf);

/// Where the driver's files are: `/`, or the root of a driver container (`/run/nvidia/driver`).
/// Only it turns a [`HostPath`] into a [`ContainerPath`] and back; see `driver_root`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DriverRoot(pub PathBuf);

/// Everything gpurun knows of the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Inventory {
    /// What must be unchanged for this value to be true still.
    pub fingerprint: Fingerprint,
    /// The driver, which every GPU container shares.
    pub driver: Driver,
    /// The GPUs that answer and have their device node, in NVML's order (index ascending).
    pub gpus: Vec<Gpu>,
    /// What is wrong with the host without being wrong for every container: a lost GPU, a missing node.
    pub problems: Vec<Problem>,
    /// Device nodes that this process may not open, by their path on the host. Empty until [`Inventory::find_closed`] is called.
    #[serde(skip)]
    pub closed: BTreeMap<PathBuf, Denial>,
}

/// Why a device node cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// Owner, mode or an access control list: EACCES.
    Permissions,
    /// The device cgroup, as in a batch job: EPERM.
    DeviceCgroup,
}

/// The driver and its files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Driver {
    /// The version of the kernel module; all libraries must have the same version.
    pub version: Version,
    /// The newest CUDA that this driver speaks (`cuDriverGetVersion` of its own libcuda, else
    /// `nvmlSystemGetCudaDriverVersion_v2`); 0.0 where it has no libcuda.
    pub cuda: Version,
    /// Where its files are.
    pub root: DriverRoot,
    /// Libraries, programs, firmware, configuration, sockets.
    pub files: Vec<DriverFile>,
    /// nvidiactl, nvidia-uvm, nvidia-uvm-tools, nvidia-modeset: those that exist.
    pub control_nodes: Vec<DeviceNode>,
    /// The nodes of features that a container must ask for by name (GDS, MOFED, NVSWITCH, GDRCOPY, IMEX).
    pub gated_nodes: Vec<(GatedFeature, DeviceNode)>,
    /// What programs read that use them.
    #[serde(default)]
    pub gated_files: Vec<GatedFile>,
    /// The content of /proc/driver/nvidia/params, where there is one.
    pub params: Option<String>,
}

/// A file of the driver that a container may need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverFile {
    /// The regular file itself (or socket), every link resolved inside the driver root.
    pub path: HostPath,
    /// Which capabilities need it; a container gets it if it asks for any of them. A 32-bit library has those of its
    /// 64-bit twin and is for containers that ask for `compat32` as well.
    pub capabilities: DriverCapability,
    /// What it is, and so how it gets into a container.
    pub kind: FileKind,
    /// What identifies a daemon's socket or directory; `None` for other files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon: Option<DaemonObject>,
}

/// Identity of a daemon's verified socket or directory of sockets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonObject {
    /// Device number of the file system; 0 if not recorded.
    pub device: u64,
    /// Inode number; 0 if not recorded.
    pub inode: u64,
    /// Whether a user other than root can replace it, now or after the next boot: in /tmp, or in a directory of the daemon's own
    /// user.
    pub is_replaceable: bool,
}

/// How a file of the driver is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// A shared library.
    Library {
        /// Its file name under which it must be found, `libcuda.so.550.163.01`.
        name: String,
        /// DT_SONAME, `libcuda.so.1`; the loader's key.
        soname: Option<String>,
        /// Other names that programs open, relative to the library directory: `libcuda.so`, `gbm/nvidia-drm_gbm.so`.
        links: Vec<String>,
        /// 32-bit (ELFCLASS32), for `compat32`.
        is_32bit: bool,
        /// A directory under the library directory in which programs look for it: `vdpau`, `gbm`; mostly none.
        subdirectory: Option<PathBuf>,
    },
    /// A program; its name.
    Binary(String),
    /// GSP firmware; its path in the container.
    Firmware(ContainerPath),
    /// A configuration or data file; its path in the container.
    Config(ContainerPath),
    /// A daemon's socket or directory of sockets; its path in the container.
    Socket(ContainerPath),
    /// An X server's module; its path in the container.
    XorgModule(ContainerPath),
}

/// A file or directory of a feature that a container must ask for by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatedFile {
    /// Whose it is.
    pub feature: GatedFeature,
    /// Where it is on this host.
    pub path: HostPath,
    /// Where it is in the container.
    pub container_path: ContainerPath,
}

/// A character device under the dev root, with the numbers that it really has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Where it is on this host.
    pub path: HostPath,
    /// What it is called in the container: `/dev/nvidia0`.
    pub container_path: ContainerPath,
    /// Major number of the character device.
    pub major: u32,
    /// Minor number of the character device.
    pub minor: u32,
    /// Permission bits (usually 0o666).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group; a container's user needs it where `mode` is not 0o666.
    pub gid: u32,
}

/// One GPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gpu {
    /// NVML's number, by which users ask. Not the minor number.
    pub index: u32,
    /// The N of /dev/nvidiaN.
    pub minor: u32,
    /// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
    pub uuid: String,
    /// PCI address in sysfs' form, `0000:65:00.0`.
    pub pci: String,
    /// Product name, `NVIDIA H100 80GB HBM3`; empty where NVML does not tell.
    pub name: String,
    /// Brand in the words of `NVIDIA_REQUIRE_…=brand=…`: `tesla`, `geforce`, `nvidiartx`, …, `unknown`.
    pub brand: String,
    /// Architecture's name, `Hopper`; `Unknown` where the driver is newer than gpurun.
    pub architecture: String,
    /// Compute capability, `9.0`.
    pub compute_capability: Version,
    /// Memory in bytes.
    pub memory: u64,
    /// NUMA node, where the kernel knows one.
    pub numa_node: Option<u32>,
    /// Whether the driver keeps it initialised.
    pub persistence: Option<bool>,
    /// `/dev/nvidiaN`.
    pub node: DeviceNode,
    /// /dev/dri/cardN and renderDN, for display and graphics.
    pub dri_nodes: Vec<DeviceNode>,
    /// Whether it knows MIG mode, on or off.
    #[serde(default)]
    pub mig_capable: bool,
    /// Whether MIG mode is on.
    pub mig_enabled: bool,
    /// Its MIG devices, in NVML's order.
    pub mig_devices: Vec<MigDevice>,
    /// Number of NVLinks that are up, by the PCI address of the other end.
    pub nvlinks: BTreeMap<String, u32>,
    /// How near each other GPU is over PCIe, by its uuid (`single-bridge`, `same-numa-node`, …).
    pub topology: BTreeMap<String, String>,
    /// The NVLink fabric of several machines that it is part of, `CLUSTER-UUID.CLIQUE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clique: Option<String>,
    /// Whether it is a hypervisor's vGPU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub vgpu: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes what it is to skip by reference")]
fn is_false(it: &bool) -> bool {
    !it
}

/// One MIG device: a compute instance of a GPU instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigDevice {
    /// The `j` of `i:j`.
    pub index: u32,
    /// `MIG-xxxxxxxx-…`.
    pub uuid: String,
    /// GPU instance id.
    pub gpu_instance: u32,
    /// Compute instance id.
    pub compute_instance: u32,
    /// Profile's name, `1g.5gb`.
    pub profile: String,
    /// Memory in bytes.
    pub memory: u64,
    /// What else of the GPU it is, where NVML tells.
    #[serde(default)]
    pub resources: Option<MigResources>,
    /// /dev/nvidia-caps/nvidia-capN of the GPU instance and of the compute instance.
    pub cap_nodes: Vec<DeviceNode>,
}

/// A MIG device's part of its GPU (`nvmlDeviceAttributes_t`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigResources {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Slices of the GPU instance.
    pub gpu_instance_slices: u32,
    /// Slices of the compute instance.
    pub compute_instance_slices: u32,
    /// Copy engines, shared within the GPU instance, as the other engines are.
    pub copy_engines: u32,
    /// Video decoders.
    pub decoders: u32,
    /// Video encoders.
    pub encoders: u32,
    /// JPEG decoders.
    pub jpeg_engines: u32,
    /// Optical flow accelerators.
    pub ofa_engines: u32,
}

/// What is wrong with one part of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The code that a request for this part would end with, `GPU-0014`.
    pub code: String,
    /// By which words the part would be asked for: index and uuid of a lost GPU, as far as known.
    pub subjects: Vec<String>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub fix: String,
}

/// What an inventory depends on. Checked by a handful of stats before each start; see `snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Which gpurun wrote it: another version may know more.
    pub writer: String,
    /// /proc/sys/kernel/random/boot_id.
    pub boot_id: String,
    /// /sys/module/nvidia/version.
    pub module_version: String,
    /// The nvidia lines of /proc/devices.
    pub device_majors: String,
    /// PCI addresses of the GPUs that the kernel module drives.
    pub pci_gpus: Vec<String>,
    /// The MIG instances under /proc/driver/nvidia/capabilities, each with its inode number: an instance that was made
    /// anew under an old number has another one.
    pub mig_layout: Vec<String>,
    /// Directories and files whose change means another driver, with mtime (seconds, nanoseconds); `None` if absent.
    pub mtimes: BTreeMap<PathBuf, Option<(i64, i64)>>,
    /// Sockets and directories of daemons, links not followed: device, inode, and seconds and nanoseconds of the last change of
    /// the inode, which its owner cannot set (`utimensat(2)` sets the mtime alone); `None` if absent.
    #[serde(default)]
    pub objects: BTreeMap<PathBuf, Option<(u64, u64, i64, i64)>>,
    /// Device nodes with `major:minor`; `None` if absent.
    pub nodes: BTreeMap<PathBuf, Option<(u32, u32)>>,
}

/// Where the host's facts are read from. Everything is `/` on an ordinary host.
#[derive(Debug, Clone)]
pub struct Host {
    /// The driver's files.
    pub driver_root: DriverRoot,
    /// The root under which `dev/nvidia0` is looked for.
    pub dev_root: PathBuf,
    /// procfs; another directory on a simulated host.
    pub proc: PathBuf,
    /// sysfs; another directory on a simulated host.
    pub sys: PathBuf,
}
