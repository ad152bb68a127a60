//! What was typed to `nvidia-ctk`: the command line of NVIDIA's toolkit, which roles and scripts call.

use super::{CdiFormat, CdiMode, CdiTransform};
use crate::{apply::cdi::NameStrategy, formats::cdi::DIRECTORIES, inventory::platform::tegra::LinkPattern};
use clap::{Args, Parser, Subcommand, ValueEnum, builder::FalseyValueParser};
use std::{ffi::OsString, path::PathBuf};
use tracing::level_filters::LevelFilter;

/// NVIDIA's toolkit, as far as gpurun stands in for it.
#[derive(Debug, Parser)]
#[command(name = "nvidia-ctk", version = concat!(env!("CARGO_PKG_VERSION"), " (gpurun)"))]
pub struct NvidiaCtk {
    /// Say more
    #[arg(short, long, env = "NVIDIA_CTK_DEBUG", value_parser = FalseyValueParser::new())]
    pub debug: bool,
    /// Say failures alone
    #[arg(short, long, env = "NVIDIA_CTK_QUIET", value_parser = FalseyValueParser::new())]
    pub quiet: bool,
    /// The toolkit's configuration file
    #[arg(id = "toolkit-config", long = "config", env = "NVIDIA_CTK_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl NvidiaCtk {
    /// What is said on standard error.
    pub fn log_level(&self) -> LevelFilter {
        match (self.quiet, self.debug) {
            (true, _) => LevelFilter::ERROR,
            (false, true) => LevelFilter::DEBUG,
            (false, false) => LevelFilter::WARN,
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell an engine of the runtime
    #[command(subcommand)]
    Runtime(Runtime),
    /// CDI documents
    #[command(subcommand)]
    Cdi(Cdi),
    /// A hook that a CDI document names; gpurun-hook does it
    #[command(disable_help_flag = true)]
    Hook {
        /// The hook and its flags
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// Prepare the host
    #[command(subcommand)]
    System(System),
    /// Print or change the toolkit's configuration
    Config(Config),
    /// Say nothing
    Info,
}

/// `nvidia-ctk cdi`
#[derive(Debug, Subcommand)]
pub enum Cdi {
    /// Write the document of this host's GPUs
    Generate(Box<CdiGenerate>),
    /// Change a document
    #[command(subcommand)]
    Transform(CdiTransform),
    /// List the devices that engines find
    List(CdiList),
}

/// `nvidia-ctk cdi generate`
#[derive(Debug, Args)]
pub struct CdiGenerate {
    /// Where it is written [default: standard output]
    #[arg(long, env = "NVIDIA_CTK_CDI_OUTPUT_FILE_PATH", value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Its format [default: what the file's name ends with, or yaml]
    #[arg(long, value_enum, env = "NVIDIA_CTK_CDI_GENERATE_OUTPUT_FORMAT")]
    pub format: Option<CdiFormat>,
    /// What it offers
    #[arg(
        long,
        alias = "discovery-mode",
        value_enum,
        default_value = "auto",
        env = "NVIDIA_CTK_CDI_GENERATE_MODE"
    )]
    pub mode: CdiMode,
    /// How the devices are called; each has every name
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["index", "uuid"],
          env = "NVIDIA_CTK_CDI_GENERATE_DEVICE_NAME_STRATEGIES")]
    pub device_name_strategy: Vec<NameStrategy>,
    /// Where the driver's files are
    #[arg(long, env = "NVIDIA_CTK_DRIVER_ROOT", value_name = "DIR")]
    pub driver_root: Option<PathBuf>,
    /// Where its device nodes are
    #[arg(long, env = "NVIDIA_CTK_DEV_ROOT", value_name = "DIR")]
    pub dev_root: Option<PathBuf>,
    /// The hook [default: gpurun-hook, beside nvidia-ctk]
    #[arg(long, alias = "nvidia-ctk-path", env = "NVIDIA_CTK_CDI_HOOK_PATH", value_name = "FILE")]
    pub nvidia_cdi_hook_path: Option<PathBuf>,
    /// What stands before the "/" in the names of the devices
    #[arg(long, alias = "cdi-vendor", env = "NVIDIA_CTK_CDI_GENERATE_VENDOR")]
    pub vendor: Option<String>,
    /// What stands before the "=" in the names of the devices
    #[arg(long, alias = "cdi-class", env = "NVIDIA_CTK_CDI_GENERATE_CLASS")]
    pub class: Option<String>,
    /// Which devices are in it: indices, UUIDs, GPU:MIG [default: all]
    #[arg(long, aliases = ["device-ids", "device", "devices"], value_name = "DEVICE", value_delimiter = ',',
          env = "NVIDIA_CTK_CDI_GENERATE_DEVICE_IDS")]
    pub device_id: Vec<String>,
    /// Leave out the device "all", which is every other at once
    #[arg(long, env = "NVIDIA_CTK_CDI_GENERATE_NO_ALL_DEVICE", value_parser = FalseyValueParser::new())]
    pub no_all_device: bool,
    /// Not used: no ldconfig is run
    #[arg(long, value_name = "FILE", env = "NVIDIA_CTK_CDI_GENERATE_LDCONFIG_PATH")]
    pub ldconfig_path: Option<PathBuf>,
    /// Not used: files are looked for in the driver root
    #[arg(
        long,
        value_name = "DIR",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_LIBRARY_SEARCH_PATHS"
    )]
    pub library_search_path: Vec<PathBuf>,
    /// Not used: files are looked for in the driver root
    #[arg(
        long,
        value_name = "DIR",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_CONFIG_SEARCH_PATHS"
    )]
    pub config_search_path: Vec<PathBuf>,
    /// Leave a hook out: its name, or "all"
    #[arg(
        long,
        alias = "disable-hooks",
        value_name = "HOOK",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS"
    )]
    pub disable_hook: Vec<String>,
    /// Not used: there is one hook
    #[arg(
        long,
        alias = "enable-hooks",
        value_name = "HOOK",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_ENABLED_HOOKS"
    )]
    pub enable_hook: Vec<String>,
    /// Not used
    #[arg(
        long,
        alias = "feature-flags",
        value_name = "FLAG",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS"
    )]
    pub feature_flag: Vec<String>,
    /// The lists of mode csv [default: the platform's own]
    #[arg(
        long = "csv.file",
        value_name = "FILE",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_CSV_FILES"
    )]
    pub csv_file: Vec<PathBuf>,
    /// Links that mode csv leaves out: a path, or **/NAME, with * and ?
    #[arg(
        long = "csv.ignore-pattern",
        value_name = "PATTERN",
        value_delimiter = ',',
        env = "NVIDIA_CTK_CDI_GENERATE_CSV_IGNORE_PATTERNS"
    )]
    pub csv_ignore_pattern: Vec<LinkPattern>,
    /// Not used: Tegra's lists do not say with which driver an image's own libraries are to be compared
    #[arg(
        long = "csv.compat-container-root",
        value_name = "DIR",
        env = "NVIDIA_CTK_CDI_GENERATE_CSV_COMPAT_CONTAINER_ROOT"
    )]
    pub csv_compat_container_root: Option<PathBuf>,
}

/// `nvidia-ctk cdi list`
#[derive(Debug, Args)]
pub struct CdiList {
    /// Directory of CDI specs; later directories take precedence
    #[arg(long, env = "NVIDIA_CTK_CDI_SPEC_DIRS", value_name = "DIR", value_delimiter = ',', default_values = DIRECTORIES)]
    pub spec_dir: Vec<PathBuf>,
}

/// `nvidia-ctk runtime`
#[derive(Debug, Subcommand)]
pub enum Runtime {
    /// Tell an engine of the runtime
    Configure(Configure),
}

/// `nvidia-ctk runtime configure`
#[derive(Debug, Args)]
pub struct Configure {
    /// Print what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The engine
    #[arg(long, value_enum, default_value = "docker")]
    pub runtime: Engine,
    /// The engine's file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Drop-in to write for containerd or CRI-O; --config is then the main file
    #[arg(long, value_name = "FILE")]
    pub drop_in_config: Option<PathBuf>,
    /// Not used: the engine is not run
    #[arg(long, value_name = "FILE")]
    pub executable_path: Option<PathBuf>,
    /// The engine's file, or a file of hooks.d
    #[arg(long, alias = "mode", value_enum, default_value = "config-file")]
    pub config_mode: ConfigMode,
    /// Where the engine's configuration is read: files alone
    #[arg(long, value_enum, default_value = "file")]
    pub config_source: ConfigSource,
    /// The file of hooks.d
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json"
    )]
    pub oci_hook_path: PathBuf,
    /// What the runtime is called
    #[arg(long, alias = "runtime-name", default_value = "nvidia")]
    pub nvidia_runtime_name: String,
    /// The runtime [default: nvidia-container-runtime, beside nvidia-ctk or in PATH]
    #[arg(long, alias = "runtime-path", value_name = "FILE")]
    pub nvidia_runtime_path: Option<PathBuf>,
    /// The hook [default: nvidia-container-runtime-hook, beside nvidia-ctk or in PATH]
    #[arg(long, value_name = "FILE")]
    pub nvidia_runtime_hook_path: Option<PathBuf>,
    /// Let it run the containers of those who name no runtime
    #[arg(long, alias = "set-as-default")]
    pub nvidia_set_as_default: bool,
    /// Let the engine read CDI documents
    #[arg(long = "cdi.enabled", aliases = ["cdi.enable", "enable-cdi"])]
    pub cdi: bool,
}

/// `--runtime`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// dockerd
    Docker,
    /// containerd
    Containerd,
    /// CRI-O
    Crio,
}

/// `--config-mode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConfigMode {
    /// The engine's file.
    #[value(alias = "config")]
    ConfigFile,
    /// A file of hooks.d.
    #[value(alias = "hook")]
    OciHook,
}

/// `--config-source`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConfigSource {
    /// The engine's files.
    File,
    /// What the engine itself says.
    Command,
}

/// `nvidia-ctk system`
#[derive(Debug, Subcommand)]
pub enum System {
    /// Make the device nodes that every GPU container shares
    CreateDeviceNodes(CreateDeviceNodes),
    /// Make the links in /dev/char by which systemd finds the device nodes
    CreateDevCharSymlinks(CreateDevCharSymlinks),
}

/// `nvidia-ctk system create-device-nodes`
#[derive(Debug, Args)]
pub struct CreateDeviceNodes {
    /// Where the driver is [default: $ROOT, $NVIDIA_DRIVER_ROOT, $DRIVER_ROOT, /]
    #[arg(long, aliases = ["driver-root"], value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Where the nodes are made [default: the driver root]
    #[arg(long, value_name = "DIR")]
    pub dev_root: Option<PathBuf>,
    /// Make nvidiactl, nvidia-modeset, nvidia-uvm and nvidia-uvm-tools
    #[arg(long)]
    pub control_devices: bool,
    /// Load the driver's modules first
    #[arg(long)]
    pub load_kernel_modules: bool,
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `nvidia-ctk system create-dev-char-symlinks`
#[derive(Debug, Args)]
pub struct CreateDevCharSymlinks {
    /// Where the links are made
    #[arg(long, value_name = "DIR", default_value = "/dev/char", env = "DEV_CHAR_PATH")]
    pub dev_char_path: PathBuf,
    /// Where the driver is [default: $ROOT, $NVIDIA_DRIVER_ROOT, $DRIVER_ROOT, /]
    #[arg(long, aliases = ["root"], value_name = "DIR")]
    pub driver_root: Option<PathBuf>,
    /// Not used: links are made to device nodes that are there
    #[arg(long)]
    pub create_all: bool,
    /// Load the driver's modules first
    #[arg(long)]
    pub load_kernel_modules: bool,
    /// Make the control nodes first
    #[arg(long)]
    pub create_device_nodes: bool,
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `nvidia-ctk config`
#[derive(Debug, Args)]
pub struct Config {
    /// Print the defaults instead.
    #[command(subcommand)]
    pub default: Option<Default>,
    /// The file [default: the one that the runtime reads]
    #[arg(short, long, visible_short_alias = 'f', value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Set a key: KEY=VALUE; a list's values stand between `:` or `,`; KEY alone is true; KEY=nil takes it out
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub set: Vec<String>,
    /// What stands between a list's values, in place of `:` and `,`
    #[arg(long, value_name = "SIGN", hide = true)]
    pub set_list_separator: Option<String>,
    /// Write the file, in place of printing it
    #[arg(short, long, conflicts_with = "output")]
    pub in_place: bool,
    /// Write this file
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `nvidia-ctk config default`
#[derive(Debug, Subcommand)]
pub enum Default {
    /// Print every key with its default
    #[command(aliases = ["create-default", "generate-default"])]
    Default {
        /// Write this file
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}
