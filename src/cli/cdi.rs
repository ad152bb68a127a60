//! Arguments of `gpurun cdi` and its subcommands.

use crate::inventory::platform::tegra::LinkPattern;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// `gpurun cdi`
#[derive(Debug, Subcommand)]
pub enum Cdi {
    /// Write a CDI spec of this host's GPUs
    Generate(CdiGenerate),
    /// Write the CDI spec where engines find it, if it has changed
    Refresh(CdiRefresh),
    /// Change a CDI spec
    #[command(subcommand)]
    Transform(CdiTransform),
    /// List the devices that engines find
    List(CdiDirectories),
    /// Check the CDI specs that engines find; report problems and fixes
    Validate(CdiDirectories),
}

/// `gpurun cdi generate`
#[derive(Debug, Args)]
pub struct CdiGenerate {
    /// Output file, usually /etc/cdi/nvidia.yaml [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// What it says.
    #[command(flatten)]
    pub document: CdiDocument,
}

/// `gpurun cdi refresh`
#[derive(Debug, Args)]
pub struct CdiRefresh {
    /// Output file
    #[arg(long, value_name = "FILE", default_value = "/var/run/cdi/nvidia.yaml")]
    pub output: PathBuf,
    /// Keep running, and update the spec when the driver, its device nodes, GPUs or MIG devices change
    #[arg(long)]
    pub watch: bool,
    /// What it says.
    #[command(flatten)]
    pub document: CdiDocument,
}

/// Content of a CDI spec of this host.
#[derive(Debug, Args)]
pub struct CdiDocument {
    /// Format [default: by the extension of the output file, or yaml]
    #[arg(long, value_enum)]
    pub format: Option<CdiFormat>,
    /// Kind of devices in the spec
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: CdiMode,
    /// Write only what this engine can read: podman, docker, containerd or cri-o; "@RELEASE" may follow
    #[arg(long, value_name = "ENGINE[@RELEASE]")]
    pub engine: Option<String>,
    /// CDI vendor [default: nvidia.com; management.nvidia.com in mode management]
    #[arg(long, value_name = "NAME")]
    pub vendor: Option<String>,
    /// CDI class [default: gpu, or the class of the mode]
    #[arg(long, value_name = "NAME")]
    pub class: Option<String>,
    /// Naming schemes for devices; a device has a name in each scheme
    #[arg(long, value_enum, default_values = ["index", "uuid"])]
    pub device_name_strategy: Vec<crate::apply::cdi::NameStrategy>,
    /// Devices in the spec: indices, UUIDs, GPU:MIG [default: all]
    #[arg(long, value_name = "DEVICE", value_delimiter = ',')]
    pub device_id: Vec<String>,
    /// Leave out the device "all", which combines all devices
    #[arg(long)]
    pub no_all_device: bool,
    /// Path of gpurun-hook on the host [default: beside this program]
    #[arg(long, value_name = "FILE")]
    pub hook: Option<PathBuf>,
    /// CSV files for mode csv [default: those of the platform]
    #[arg(long = "csv.file", value_name = "FILE", value_delimiter = ',')]
    pub csv_file: Vec<PathBuf>,
    /// Links to leave out in mode csv: a path, or **/NAME, with * and ?
    #[arg(long = "csv.ignore-pattern", value_name = "PATTERN", value_delimiter = ',')]
    pub csv_ignore_pattern: Vec<LinkPattern>,
}

/// `--mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CdiMode {
    /// The mode for this host: csv, wsl, or else nvml.
    Auto,
    /// GPUs and MIG devices, found through NVML.
    Nvml,
    /// All device nodes of the driver as one device, for containers that manage GPUs.
    Management,
    /// GPUDirect Storage.
    Gds,
    /// InfiniBand verbs.
    Mofed,
    /// NVSwitch.
    Nvswitch,
    /// GDRCopy.
    Gdrcopy,
    /// IMEX channels.
    Imex,
    /// Tegra (Jetson): the files in the platform's lists.
    Csv,
    /// The Windows Subsystem for Linux.
    Wsl,
}

/// `gpurun cdi transform`
#[derive(Debug, Subcommand)]
pub enum CdiTransform {
    /// Replace a directory at the beginning of paths
    Root(CdiTransformRoot),
}

/// `cdi transform root`
#[derive(Debug, Args)]
pub struct CdiTransformRoot {
    /// Directory to replace
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub from: PathBuf,
    /// Replacement
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub to: PathBuf,
    /// Paths to change: on the host or in the container
    #[arg(long, value_enum, default_value = "host")]
    pub relative_to: RelativeTo,
    /// CDI spec to read; "-" is standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub input: PathBuf,
    /// Output file [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `--relative-to`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RelativeTo {
    /// Paths of the host.
    Host,
    /// Paths in the container.
    Container,
}

/// `--format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CdiFormat {
    /// YAML
    Yaml,
    /// JSON
    Json,
}

/// Directories of CDI specs.
#[derive(Debug, Args)]
pub struct CdiDirectories {
    /// Directory of CDI specs; later directories take precedence
    #[arg(long = "spec-dir", value_name = "DIR", value_delimiter = ',', default_values = crate::formats::cdi::DIRECTORIES)]
    pub directories: Vec<PathBuf>,
}
