//! What was typed. What it means is decided elsewhere: nothing here looks at the world.
#![forbid(unsafe_code)]
// These comments are the help text, in which brackets mean "optional".
#![allow(rustdoc::broken_intra_doc_links)]

pub mod nvidia_container_cli;
pub mod nvidia_ctk;

use crate::inventory::platform::tegra::LinkPattern;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Starts GPU containers: no daemon, no other runtime, no other toolkit.
#[derive(Debug, Parser)]
#[command(
    name = "gpurun",
    version,
    after_help = "gpurun --gpus all IMAGE CMD… is short for gpurun run --gpus all IMAGE CMD…"
)]
pub struct Cli {
    /// Where things are, and how much is said.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The names of the verbs, by which a command line without one is known to be `run`.
pub const VERBS: [&str; 15] = [
    "run",
    "plan",
    "ls",
    "doctor",
    "inventory",
    "images",
    "pull",
    "rmi",
    "prune",
    "cdi",
    "configure",
    "config",
    "demo",
    "completions",
    "help",
];

/// Options of every verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Where the driver's files are (`/`, `/run/nvidia/driver`)
    #[arg(long, global = true, env = "GPURUN_DRIVER_ROOT", value_name = "DIR", help_heading = "Host")]
    pub driver_root: Option<PathBuf>,
    /// Where the device nodes are, if not in the driver root
    #[arg(long, global = true, env = "GPURUN_DEV_ROOT", value_name = "DIR", help_heading = "Host")]
    pub dev_root: Option<PathBuf>,
    /// A simulated host (see gpurun demo --keep) in place of the real one
    #[arg(long, global = true, env = "GPURUN_SIMULATED_HOST", value_name = "DIR", help_heading = "Host")]
    pub simulated_host: Option<PathBuf>,
    /// The configuration file [default: /etc/gpurun/config.toml, if it is there]
    #[arg(long, global = true, env = "GPURUN_CONFIG", value_name = "FILE", help_heading = "Host")]
    pub config: Option<PathBuf>,
    /// What is logged to stderr: error, warn, info, debug, trace
    #[arg(
        long,
        global = true,
        env = "GPURUN_LOG",
        default_value = "warn",
        value_name = "LEVEL",
        help_heading = "Host"
    )]
    pub log: tracing::level_filters::LevelFilter,
    /// How it is logged
    #[arg(long, global = true, value_enum, default_value = "text", help_heading = "Host")]
    pub log_format: LogFormat,
    /// Answers and failures as JSON
    #[arg(long, global = true, help_heading = "Host")]
    pub json: bool,
}

impl Global {
    /// Those that take a value.
    pub const HAS_VALUE: [&str; 6] =
        ["--driver-root", "--dev-root", "--simulated-host", "--config", "--log", "--log-format"];
}

/// `--log-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// An object a line.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new container
    Run(Box<Run>),
    /// Say what a container would get, and start nothing
    Plan(Box<Run>),
    /// List the GPUs
    Ls,
    /// Check the host, and say what is wrong and what to do
    Doctor(CdiDirectories),
    /// Print everything gpurun knows of the host as JSON (a bug report; a fixture)
    Inventory,
    /// List the images that are unpacked in the store
    Images {
        /// Check each: its configuration by its digest, its layers by the configuration and for being there
        #[arg(long, conflicts_with = "usage")]
        verify: bool,
        /// Measure what each takes on the disk
        #[arg(long)]
        usage: bool,
    },
    /// Fetch images from a registry, or unpack them from an archive, into the store
    Pull {
        /// How they are had
        #[command(flatten)]
        pulling: Pulling,
        /// NAME[:TAG][@DIGEST], docker://… or any other image
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove images from the store, and the layers that no other image needs
    Rmi {
        /// As `gpurun images` lists them
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove the layers that no image in the store needs
    Prune,
    /// CDI documents: for docker, podman, containerd and CRI-O
    #[command(subcommand)]
    Cdi(Cdi),
    /// Tell an engine of gpurun, or take gpurun out of its configuration
    Configure(Configure),
    /// Print every key of the configuration: what it is, where that comes from, what it means
    Config,
    /// Run the main job on this machine and print what the container saw
    Demo(Demo),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

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

/// `gpurun configure`
#[derive(Debug, Args)]
pub struct Configure {
    /// Whose configuration is changed
    #[arg(value_enum)]
    pub engine: Engine,
    /// What the runtime is called: docker run --runtime NAME
    #[arg(long, default_value = "gpurun", value_name = "NAME")]
    pub name: String,
    /// The program [default: the gpurun-runtime beside gpurun, or in PATH]
    #[arg(long, value_name = "FILE")]
    pub path: Option<PathBuf>,
    /// The engine's file [default: the one that it reads]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Let it run the containers of those who name no runtime
    #[arg(long)]
    pub set_as_default: bool,
    /// Let the engine read CDI documents, too
    #[arg(long)]
    pub cdi: bool,
    /// For podman and crio: a file of hooks.d in place of a runtime
    #[arg(long, conflicts_with_all = ["set_as_default", "cdi"])]
    pub hook: bool,
    /// Take out what was put in (with --cdi: its switch, too)
    #[arg(long)]
    pub remove: bool,
    /// Print what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The engines that gpurun can be made known to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// dockerd
    Docker,
    /// containerd, as Kubernetes uses it
    Containerd,
    /// CRI-O
    Crio,
    /// Podman
    Podman,
}

/// `gpurun demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Simulate this host even if the machine has a driver: 8xh100, a100-mig, t4, one-lost-gpu, old-driver, slow-init
    #[arg(long, value_name = "NAME")]
    pub simulate: Option<String>,
    /// Lay the simulated host out in this directory, print how to use it, and leave it there
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

/// How images of registries are had.
#[derive(Debug, Args)]
pub struct Pulling {
    /// The image for this kind of machine: linux/amd64, linux/arm64 [default: this one's]
    #[arg(long, value_name = "PLATFORM", help_heading = "Image")]
    pub platform: Option<crate::image::Platform>,
    /// How the fetching is shown on stderr
    #[arg(long, value_enum, default_value = "auto", help_heading = "Image")]
    pub progress: crate::image::registry::Progress,
}

/// Docker's options, with Docker's grammar.
#[derive(Debug, Args)]
pub struct Run {
    /// When the registry is asked
    #[arg(long, value_enum, default_value = "missing", help_heading = "Image")]
    pub pull: crate::image::registry::When,
    /// How the image is had
    #[command(flatten)]
    pub pulling: Pulling,
    /// GPUs: all, a number, or "device=0,GPU-…,0:1"; also capabilities=…
    #[arg(long, value_name = "REQUEST", help_heading = "GPU")]
    pub gpus: Option<String>,
    /// Set a variable; NAME alone takes it from gpurun's own environment
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Read variables from a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Mount a host directory or file: SOURCE:TARGET[:ro]
    #[arg(short = 'v', long = "volume", value_name = "SOURCE:TARGET[:ro]", help_heading = "Files")]
    pub volume: Vec<String>,
    /// Mount: type=bind,source=…,target=…[,readonly] or type=tmpfs,target=…[,tmpfs-size=…]
    #[arg(long, value_name = "MOUNT", help_heading = "Files")]
    pub mount: Vec<String>,
    /// Mount an empty directory in memory: TARGET[:size=…,mode=…,exec,ro]
    #[arg(long, value_name = "TARGET[:OPTIONS]", help_heading = "Files")]
    pub tmpfs: Vec<String>,
    /// Make the root read-only (HOME, /tmp through --tmpfs and the volumes stay writable)
    #[arg(long, help_heading = "Files")]
    pub read_only: bool,
    /// Size of /dev/shm [default: half of memory]
    #[arg(long, value_name = "SIZE", help_heading = "Files")]
    pub shm_size: Option<String>,
    /// Working directory
    #[arg(short = 'w', long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// User: NAME|UID[:GROUP|GID] [default: the image's, or the caller if that is root]
    #[arg(short = 'u', long, value_name = "USER[:GROUP]", help_heading = "User")]
    pub user: Option<String>,
    /// Another group of the user, by name or number, or keep-groups: the groups of gpurun's caller
    #[arg(long, value_name = "GROUP", help_heading = "User")]
    pub group_add: Vec<String>,
    /// Give root a capability: CAP_NAME, NAME or ALL
    #[arg(long, value_name = "CAPABILITY", help_heading = "User")]
    pub cap_add: Vec<String>,
    /// Take a capability from root
    #[arg(long, value_name = "CAPABILITY", help_heading = "User")]
    pub cap_drop: Vec<String>,
    /// seccomp=unconfined: no system call filter; no-new-privileges is always on
    #[arg(long, value_name = "OPTION", help_heading = "User")]
    pub security_opt: Vec<String>,
    /// Run this in place of the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Pass standard input
    #[arg(short = 'i', long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Run a pid 1 that forwards signals and reaps
    #[arg(long)]
    pub init: bool,
    /// Remove the container at its end: it always is
    #[arg(long, hide = true)]
    pub rm: bool,
    /// Host name in the container
    #[arg(long, value_name = "NAME", help_heading = "Namespaces")]
    pub hostname: Option<String>,
    /// host, or none: a loopback device alone
    #[arg(long, visible_alias = "net", value_enum, default_value = "host", help_heading = "Namespaces")]
    pub network: Network,
    /// private, or host: the host's /dev/shm and IPC objects
    #[arg(long, value_enum, default_value = "private", help_heading = "Namespaces")]
    pub ipc: Ipc,
    /// Limit: NAME=SOFT[:HARD] (nofile, memlock, nproc, stack, …)
    #[arg(long, value_name = "NAME=SOFT[:HARD]", help_heading = "Limits")]
    pub ulimit: Vec<String>,
    /// Memory limit (512m, 16g)
    #[arg(short = 'm', long, value_name = "SIZE", help_heading = "Limits")]
    pub memory: Option<String>,
    /// Number of CPUs (1.5)
    #[arg(long, value_name = "NUMBER", help_heading = "Limits")]
    pub cpus: Option<f64>,
    /// Number of processes; -1 is no limit
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, help_heading = "Limits")]
    pub pids_limit: Option<i64>,
    /// NAME[:TAG][@DIGEST] of a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF], rootfs:DIR, or host:
    pub image: String,
    /// The command and its arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `--network`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// The host's.
    Host,
    /// A loopback device alone.
    None,
}

/// `--ipc`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ipc {
    /// Its own.
    Private,
    /// The host's.
    Host,
}
