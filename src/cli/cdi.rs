//! Arguments of `gpurun cdi` and its subcommands.

use crate::inventory::platform::tegra::LinkPattern;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// `gpurun cdi`
#[derive(Debug, Subcommand)]
pub enum Cdi {
    /// Write the document of this host's GPUs
    Generate(CdiGenerate),
    /// Write it where engines find it, if it is not that already
    Refresh(CdiRefresh),
    /// Change a document
    #[command(subcommand)]
    Transform(CdiTransform),
    /// List the devices that engines find
    List(CdiDirectories),
    /// Check the documents that engines find, and say what is wrong and what to do
    Validate(CdiDirectories),
}

/// `gpurun cdi generate`
#[derive(Debug, Args)]
pub struct CdiGenerate {
    /// Where it is written, /etc/cdi/nvidia.yaml as a rule [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// What it says.
    #[command(flatten)]
    pub document: CdiDocument,
}

/// `gpurun cdi refresh`
#[derive(Debug, Args)]
pub struct CdiRefresh {
    /// Where it is written
    #[arg(long, value_name = "FILE", default_value = "/var/run/cdi/nvidia.yaml")]
    pub output: PathBuf,
    /// Stay, and write it again whenever the driver, its device nodes, GPUs or MIG devices change
    #[arg(long)]
    pub watch: bool,
    /// What it says.
    #[command(flatten)]
    pub document: CdiDocument,
}

/// What a document of this host says.
#[derive(Debug, Args)]
pub struct CdiDocument {
    /// Its format [default: what the file's name ends with, or yaml]
    #[arg(long, value_enum)]
    pub format: Option<CdiFormat>,
    /// What it offers
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: CdiMode,
    /// Use nothing that this engine cannot read: podman, docker, containerd or cri-o, with its release behind "@"
    #[arg(long, value_name = "ENGINE[@RELEASE]")]
    pub engine: Option<String>,
    /// What stands before the "/" in the names of the devices [default: nvidia.com, in mode management management.nvidia.com]
    #[arg(long, value_name = "NAME")]
    pub vendor: Option<String>,
    /// What stands before the "=" in the names of the devices [default: gpu, or what the mode offers]
    #[arg(long, value_name = "NAME")]
    pub class: Option<String>,
    /// How the devices are called; each has every name
    #[arg(long, value_enum, default_values = ["index", "uuid"])]
    pub device_name_strategy: Vec<crate::apply::cdi::NameStrategy>,
    /// Which devices are in it: indices, UUIDs, GPU:MIG [default: all]
    #[arg(long, value_name = "DEVICE", value_delimiter = ',')]
    pub device_id: Vec<String>,
    /// Leave out the device "all", which is every other at once
    #[arg(long)]
    pub no_all_device: bool,
    /// Where the program gpurun-hook is on the host [default: beside this program]
    #[arg(long, value_name = "FILE")]
    pub hook: Option<PathBuf>,
    /// The lists of mode csv [default: the platform's own]
    #[arg(long = "csv.file", value_name = "FILE", value_delimiter = ',')]
    pub csv_file: Vec<PathBuf>,
    /// Links that mode csv leaves out: a path, or **/NAME, with * and ?
    #[arg(long = "csv.ignore-pattern", value_name = "PATTERN", value_delimiter = ',')]
    pub csv_ignore_pattern: Vec<LinkPattern>,
}

/// `--mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CdiMode {
    /// What this host has: csv, wsl, or else nvml.
    Auto,
    /// GPUs and MIG devices, found through NVML.
    Nvml,
    /// Every node of the driver at once, for containers that manage GPUs.
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
    /// Tegra (Jetson): what the platform's lists name.
    Csv,
    /// The Windows Subsystem for Linux.
    Wsl,
}

/// `gpurun cdi transform`
#[derive(Debug, Subcommand)]
pub enum CdiTransform {
    /// Put another directory in the place of one with which paths begin
    Root(CdiTransformRoot),
}

/// `cdi transform root`
#[derive(Debug, Args)]
pub struct CdiTransformRoot {
    /// The directory that is replaced
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub from: PathBuf,
    /// The one that takes its place
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub to: PathBuf,
    /// Whose paths
    #[arg(long, value_enum, default_value = "host")]
    pub relative_to: RelativeTo,
    /// The document; "-" is standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub input: PathBuf,
    /// Where the result is written [default: standard output]
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

/// Where the documents are.
#[derive(Debug, Args)]
pub struct CdiDirectories {
    /// A directory of CDI documents; one that is named later goes before
    #[arg(long = "spec-dir", value_name = "DIR", value_delimiter = ',', default_values = crate::formats::cdi::DIRECTORIES)]
    pub directories: Vec<PathBuf>,
}
