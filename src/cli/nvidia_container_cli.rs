//! What was typed to `nvidia-container-cli`: the command line of libnvidia-container, which Charliecloud, enroot, Apptainer and
//! NVIDIA's own hook call.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// libnvidia-container's program, as far as gpurun stands in for it.
#[derive(Debug, Parser)]
#[command(name = "nvidia-container-cli", version = concat!(env!("CARGO_PKG_VERSION"), " (gpurun)"))]
pub struct NvidiaContainerCli {
    /// Not used: failures are said on standard error
    #[arg(short, long, value_name = "FILE")]
    pub debug: Option<PathBuf>,
    /// Load the driver's modules and make its control nodes first
    #[arg(short = 'k', long)]
    pub load_kmods: bool,
    /// Not used: no root is changed
    #[arg(short, long)]
    pub no_pivot: bool,
    /// Not used: the driver is asked by a process of its own
    #[arg(short, long, value_name = "UID[:GID]", num_args = 0..=1, require_equals = true)]
    pub user: Option<Option<String>>,
    /// Where the driver is
    #[arg(short, long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Not used: files are looked for in the driver root
    #[arg(short, long, value_name = "FILE")]
    pub ldcache: Option<PathBuf>,
    /// Not used: no channel is made
    #[arg(long)]
    pub no_create_imex_channels: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print what the driver is and which GPUs there are
    Info {
        /// With commas
        #[arg(long)]
        csv: bool,
    },
    /// Print the driver's files, a path a line; without an option all of them
    List(List),
    /// Give a container that has been made and does not run yet its GPUs
    Configure(Box<Configure>),
}

/// Which devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct Devices {
    /// GPUs, by index or UUID
    #[arg(short, long, value_name = "ID")]
    pub device: Vec<String>,
    /// The right to make MIG devices: all
    #[arg(long, value_name = "ID")]
    pub mig_config: Option<String>,
    /// The right to watch MIG devices: all
    #[arg(long, value_name = "ID")]
    pub mig_monitor: Option<String>,
    /// IMEX channels
    #[arg(long, value_name = "N")]
    pub imex_channel: Vec<String>,
}

/// `nvidia-container-cli list`
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct List {
    /// Device nodes.
    #[command(flatten)]
    pub devices: Devices,
    /// Libraries
    #[arg(short, long)]
    pub libraries: bool,
    /// Programs
    #[arg(short, long)]
    pub binaries: bool,
    /// Daemons' sockets
    #[arg(short, long)]
    pub ipcs: bool,
    /// Firmware
    #[arg(short, long)]
    pub firmwares: bool,
    /// With --libraries, also list 32-bit libraries
    #[arg(long)]
    pub compat32: bool,
}

/// `nvidia-container-cli configure`
#[derive(Debug, Args)]
pub struct Configure {
    /// A process of the container [default: the one that calls this]
    #[arg(short, long, value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Device nodes.
    #[command(flatten)]
    pub devices: Devices,
    /// What must hold of the host, as in NVIDIA_REQUIRE_…
    #[arg(short, long, value_name = "CONDITIONS")]
    pub require: Vec<String>,
    /// Not used: no ldconfig is run
    #[arg(short, long, value_name = "FILE")]
    pub ldconfig: Option<String>,
    /// CUDA and OpenCL
    #[arg(short, long)]
    pub compute: bool,
    /// nvidia-smi and NVML
    #[arg(short, long)]
    pub utility: bool,
    /// Video codecs
    #[arg(short, long)]
    pub video: bool,
    /// OpenGL and Vulkan
    #[arg(short, long)]
    pub graphics: bool,
    /// X11
    #[arg(short = 'D', long)]
    pub display: bool,
    /// Super sampling
    #[arg(short, long)]
    pub ngx: bool,
    /// 32-bit libraries of the others
    #[arg(long)]
    pub compat32: bool,
    /// "disabled": an image's own newer CUDA driver libraries are not used
    #[arg(long, value_name = "MODE")]
    pub cuda_compat_mode: Option<String>,
    /// Leave the container's rules for devices as they are
    #[arg(long)]
    pub no_cgroups: bool,
    /// Leave out device nodes
    #[arg(long)]
    pub no_devbind: bool,
    /// The container's root, on the host
    pub rootfs: PathBuf,
}
