//! What a simulated host has, as JSON. It lies behind the last byte of the simulated driver's own libraries, so that they
//! answer the same on the host and in every container that they are mounted into.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

/// Ends a library that carries a description.
const MAGIC: [u8; 8] = *b"GPURUNSM";
/// A description is a few kilobytes; anything larger is not one.
const LARGEST: u64 = 1 << 20;

/// A host with a driver and GPUs that do not exist.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The driver's version, `550.163.01`.
    pub driver: String,
    /// The newest CUDA that it speaks, `12.4`.
    pub cuda: String,
    /// How long `nvmlInit` takes, in seconds.
    #[serde(default)]
    pub init_seconds: f64,
    /// What `nvmlInit` fails with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_error: Option<InitError>,
    /// Its GPUs in NVML's order, which is the order of their PCI addresses.
    pub gpus: Vec<SimulatedGpu>,
    /// The driver root in which the library lies, written when the host is laid out. A library that is found anywhere
    /// else is in a container and shows only what has its node in /dev, as the real one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_root: Option<PathBuf>,
}

/// Why a driver's library may refuse to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InitError {
    /// The kernel module is not loaded.
    DriverNotLoaded,
    /// The kernel module has another version than the library.
    LibRmVersionMismatch,
    /// The device nodes may not be opened.
    NoPermission,
    /// What NVML says when the device cgroup refuses.
    Unknown,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulatedGpu {
    /// Product name.
    pub name: String,
    /// `GPU-…`.
    pub uuid: String,
    /// The N of /dev/nvidiaN.
    pub minor: u32,
    /// PCI address in sysfs' form.
    pub pci: String,
    /// NVML's brand in lower case, `nvidia-rtx`.
    pub brand: String,
    /// `Hopper`.
    pub architecture: String,
    /// `9.0`.
    pub compute_capability: String,
    /// Bytes.
    pub memory: u64,
    /// The kernel's NUMA node, where it knows one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// GPUs with the same number are behind one PCIe switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcie_switch: Option<u32>,
    /// Whether the driver keeps it initialised.
    #[serde(default)]
    pub persistence: bool,
    /// MIG, where the GPU knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mig: Option<Mig>,
    /// The NVLink fabric of several machines that it is part of, `CLUSTER-UUID.CLIQUE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clique: Option<String>,
    /// NVLinks that are up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nvlinks: Vec<NvLinks>,
    /// Whether it answers.
    #[serde(default)]
    pub state: State,
}

/// Whether a GPU answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It does.
    #[default]
    Ok,
    /// It fell off the bus: every question about it ends with `NVML_ERROR_GPU_IS_LOST`.
    Lost,
}

/// NVLinks to one neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvLinks {
    /// PCI address of the other end.
    pub to: String,
    /// How many.
    pub links: u32,
}

/// A GPU's MIG mode and what it is cut into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mig {
    /// Whether MIG mode is on.
    pub enabled: bool,
    /// Its MIG devices in NVML's order.
    #[serde(default)]
    pub devices: Vec<SimulatedMig>,
}

/// One MIG device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulatedMig {
    /// `MIG-…`.
    pub uuid: String,
    /// `3g.20gb`, or `1c.3g.20gb` for a part of a GPU instance.
    pub profile: String,
    /// GPU instance id.
    pub gpu_instance: u32,
    /// Compute instance id.
    pub compute_instance: u32,
    /// Bytes.
    pub memory: u64,
}

impl SimulatedMig {
    /// Minor numbers of the nvidia-cap nodes of its GPU instance and of its compute instance. The driver numbers them by
    /// 15 GPU instances of 8 compute instances for each GPU, after `config` (1) and `monitor` (2).
    pub fn cap_minors(&self, gpu_minor: u32) -> [u32; 2] {
        let instance = 3 + gpu_minor * 15 * 9 + self.gpu_instance * 9;
        [instance, instance + 1 + self.compute_instance]
    }
}

impl Description {
    /// Writes the description behind the library that was written before.
    pub fn append_to(&self, library: &mut impl Write) -> io::Result<()> {
        let json = serde_json::to_vec(self)?;
        library.write_all(&json)?;
        library.write_all(&(json.len() as u64).to_le_bytes())?;
        library.write_all(&MAGIC)
    }

    /// Reads the description that a library carries; `None` if it carries none.
    pub fn read_from(library: &mut (impl Read + Seek)) -> io::Result<Option<Self>> {
        let end = library.seek(SeekFrom::End(0))?;
        if end < 16 {
            return Ok(None);
        }
        library.seek(SeekFrom::End(-16))?;
        let (mut length, mut magic) = ([0; 8], [0; 8]);
        library.read_exact(&mut length)?;
        library.read_exact(&mut magic)?;
        let length = u64::from_le_bytes(length);
        if magic != MAGIC || length > LARGEST.min(end - 16) {
            return Ok(None);
        }
        library.seek(SeekFrom::Start(end - 16 - length))?;
        // In one piece: a reader of JSON asks for one byte at a time.
        let mut json = Vec::new();
        library.take(length).read_to_end(&mut json)?;
        Ok(Some(serde_json::from_slice(&json)?))
    }
}
