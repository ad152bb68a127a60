//! Arguments of `gpurun run` and `gpurun plan`: Docker's options, with Docker's names.
//!
//! Options that are accepted without effect or refused with advice are in [`super::foreign`].

use clap::{
    Args,
    builder::{OsStringValueParser, TypedValueParser},
};
use std::{ffi::OsString, path::PathBuf};

/// Options for pulls from registries.
#[derive(Debug, Args)]
pub struct Pulling {
    /// Platform of the image: linux/amd64, linux/arm64 [default: this machine's]
    #[arg(long, value_name = "PLATFORM", help_heading = "Image")]
    pub platform: Option<crate::image::Platform>,
    /// Progress display on stderr
    #[arg(long, value_enum, default_value = "auto", help_heading = "Image")]
    pub progress: crate::image::registry::Progress,
}

/// Docker's options, with Docker's grammar.
#[derive(Debug, Args)]
pub struct Run {
    /// When to ask the registry
    #[arg(long, value_enum, default_value = "missing", help_heading = "Image")]
    pub pull: crate::image::registry::When,
    /// Options of the pull.
    #[command(flatten)]
    pub pulling: Pulling,
    /// Show no progress of a pull
    #[arg(short = 'q', long, help_heading = "Image")]
    pub quiet: bool,
    /// GPUs: all, a number, or "device=0,GPU-…,0:1"; also capabilities=…
    #[arg(long, value_name = "REQUEST", help_heading = "GPU")]
    pub gpus: Option<String>,
    /// Apptainer's name for --gpus all
    #[arg(long, hide = true)]
    pub nv: bool,
    /// Device: a CDI name (nvidia.com/gpu=0), or HOST[:CONTAINER[:rwm]] (/dev/fuse)
    #[arg(long, value_name = "DEVICE", help_heading = "GPU")]
    pub device: Vec<String>,
    /// Runtime that Docker would use: nvidia lets the image ask for GPUs
    #[arg(long, value_name = "NAME", hide = true)]
    pub runtime: Option<String>,
    /// Set a variable; NAME alone and PREFIX* take values from gpurun's environment
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Read variables from a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Pass all variables of gpurun's environment
    #[arg(long)]
    pub env_host: bool,
    /// Mount a host directory or file: SOURCE:TARGET[:ro]
    #[arg(short = 'v', long = "volume", value_name = "SOURCE:TARGET[:ro]", help_heading = "Files")]
    pub volume: Vec<String>,
    /// Apptainer's form of --volume: SOURCE[:TARGET[:ro]],…
    #[arg(short = 'B', long, value_name = "SOURCE[:TARGET]", hide = true, help_heading = "Files")]
    pub bind: Vec<String>,
    /// Mount: type=bind,source=…,target=…[,readonly] or type=tmpfs,target=…[,tmpfs-size=…]
    #[arg(long, value_name = "MOUNT", help_heading = "Files")]
    pub mount: Vec<String>,
    /// Mount an empty directory in memory: TARGET[:size=…,mode=…,uid=…,gid=…,exec,ro]
    #[arg(long, value_name = "TARGET[:OPTIONS]", help_heading = "Files")]
    pub tmpfs: Vec<String>,
    /// Make the root read-only (HOME, /tmp through --tmpfs and the volumes stay writable)
    #[arg(long, help_heading = "Files")]
    pub read_only: bool,
    /// Size of /dev/shm [default: half of memory]
    #[arg(long, value_name = "SIZE", help_heading = "Files")]
    pub shm_size: Option<String>,
    /// Write the container's ID to a new file
    #[arg(long, value_name = "FILE", value_parser = path_or_empty(), help_heading = "Files")]
    pub cidfile: Option<PathBuf>,
    /// Write the host's process ID of the container's first process to a file
    #[arg(long, value_name = "FILE", value_parser = path_or_empty(), help_heading = "Files")]
    pub pidfile: Option<PathBuf>,
    /// Working directory
    #[arg(short = 'w', long, value_name = "DIR", value_parser = path_or_empty())]
    pub workdir: Option<PathBuf>,
    /// User: NAME|UID[:GROUP|GID] [default: the image's, or the caller if that is root]
    #[arg(short = 'u', long, value_name = "USER[:GROUP]", help_heading = "User")]
    pub user: Option<String>,
    /// Add a group by name or number, or keep-groups: the groups of the caller
    #[arg(long, value_name = "GROUP", help_heading = "User")]
    pub group_add: Vec<String>,
    /// User namespace: host, or keep-id (the caller's own uid and gid)
    #[arg(long, value_name = "MODE", help_heading = "User")]
    pub userns: Option<String>,
    /// Give root a capability: CAP_NAME, NAME or ALL
    #[arg(long, value_name = "CAPABILITY", help_heading = "User")]
    pub cap_add: Vec<String>,
    /// Remove a capability from root
    #[arg(long, value_name = "CAPABILITY", help_heading = "User")]
    pub cap_drop: Vec<String>,
    /// seccomp=unconfined, systempaths=unconfined, no-new-privileges=false, label=disable
    #[arg(long, value_name = "OPTION", help_heading = "User")]
    pub security_opt: Vec<String>,
    /// All capabilities and devices, no system call filter, no masked or read-only paths
    #[arg(long, help_heading = "User")]
    pub privileged: bool,
    /// Run this instead of the image's entrypoint
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
    /// Host name in the container
    #[arg(short = 'h', long, value_name = "NAME", help_heading = "Namespaces")]
    pub hostname: Option<String>,
    /// NIS domain name in the container
    #[arg(long, value_name = "NAME", help_heading = "Namespaces")]
    pub domainname: Option<String>,
    /// host, or none: only a loopback device [default: host]
    #[arg(long, visible_alias = "net", value_name = "NETWORK", help_heading = "Namespaces")]
    pub network: Vec<String>,
    /// Add a line to /etc/hosts: NAME:ADDRESS
    #[arg(long, value_name = "NAME:ADDRESS", help_heading = "Namespaces")]
    pub add_host: Vec<String>,
    /// Name server in /etc/resolv.conf
    #[arg(long, value_name = "ADDRESS", help_heading = "Namespaces")]
    pub dns: Vec<String>,
    /// Search domain in /etc/resolv.conf; "." clears the list
    #[arg(long, value_name = "DOMAIN", help_heading = "Namespaces")]
    pub dns_search: Vec<String>,
    /// Option in /etc/resolv.conf
    #[arg(long, alias = "dns-opt", value_name = "OPTION", help_heading = "Namespaces")]
    pub dns_option: Vec<String>,
    /// private, host (the host's /dev/shm and IPC objects) or none (no /dev/shm) [default: private]
    #[arg(long, value_name = "MODE", help_heading = "Namespaces")]
    pub ipc: Option<String>,
    /// host: see the host's processes
    #[arg(long, value_name = "MODE", help_heading = "Namespaces")]
    pub pid: Option<String>,
    /// host: share the host's name
    #[arg(long, value_name = "MODE", help_heading = "Namespaces")]
    pub uts: Option<String>,
    /// private or host [default: private]
    #[arg(long, value_name = "MODE", help_heading = "Namespaces")]
    pub cgroupns: Option<String>,
    /// Set a parameter of the container's namespaces: net.core.somaxconn=1024
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Namespaces")]
    pub sysctl: Vec<String>,
    /// Limit: NAME=SOFT[:HARD] (nofile, memlock, nproc, stack, …); -1 is the highest permitted limit
    #[arg(long, value_name = "NAME=SOFT[:HARD]", help_heading = "Limits")]
    pub ulimit: Vec<String>,
    /// Limits of memory, processors and block devices.
    #[command(flatten)]
    pub resources: Resources,
    /// Rule for the container's devices: c 10:* rwm
    #[arg(long, value_name = "RULE", help_heading = "Limits")]
    pub device_cgroup_rule: Vec<String>,
    /// Parent of the container's cgroup
    #[arg(long, value_name = "CGROUP", help_heading = "Limits")]
    pub cgroup_parent: Option<String>,
    /// Preference for the kernel to kill the container if memory runs out (-1000 to 1000)
    #[arg(long, value_name = "NUMBER", help_heading = "Limits")]
    pub oom_score_adj: Option<i32>,
    /// Signal to send to the command when gpurun receives SIGTERM [default: the image's, or SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// Do not warn that the image's HEALTHCHECK is not run
    #[arg(long, hide = true)]
    pub no_healthcheck: bool,
    /// Name of the run
    #[arg(long, value_name = "NAME", hide = true)]
    pub name: Option<String>,
    /// Streams to pass
    #[arg(short = 'a', long, value_name = "STREAM", hide = true)]
    pub attach: Vec<String>,
    /// Metadata of the container
    #[arg(short = 'l', long, value_name = "NAME=VALUE", hide = true)]
    pub label: Vec<String>,
    /// Metadata of the container, from a file
    #[arg(long, value_name = "FILE", hide = true)]
    pub label_file: Vec<PathBuf>,
    /// Metadata for the runtime
    #[arg(long, value_name = "NAME=VALUE", hide = true)]
    pub annotation: Vec<String>,
    /// NAME[:TAG][@DIGEST] of a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF], rootfs:DIR, or host:
    pub image: String,
    /// Command and arguments, passed unchanged [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// A path that may be empty.
fn path_or_empty() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

impl Run {
    /// Drops empty values: as in Docker, `-w "$DIR"` of a variable that is not set is the same as no `-w`.
    pub(super) fn without_empty_values(mut self) -> Self {
        for path in [&mut self.workdir, &mut self.cidfile, &mut self.pidfile] {
            path.take_if(|path| path.as_os_str().is_empty());
        }
        for text in [
            &mut self.user,
            &mut self.hostname,
            &mut self.domainname,
            &mut self.stop_signal,
            &mut self.name,
            &mut self.runtime,
            &mut self.ipc,
            &mut self.pid,
            &mut self.uts,
            &mut self.cgroupns,
            &mut self.userns,
            &mut self.cgroup_parent,
        ] {
            text.take_if(|text| text.is_empty());
        }
        self
    }
}

/// Options for the container's cgroup.
#[derive(Debug, Default, Args)]
pub struct Resources {
    /// Memory limit (512m, 16g)
    #[arg(short = 'm', long, value_name = "SIZE", help_heading = "Limits")]
    pub memory: Option<String>,
    /// Memory and swap together; -1 is unlimited swap [default: twice the memory]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub memory_swap: Option<String>,
    /// Memory that is protected from reclaim (cgroup v2), or reclaimed last (v1)
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub memory_reservation: Option<String>,
    /// Tendency to swap out memory, 0 to 100 (cgroup v1)
    #[arg(long, value_name = "NUMBER", hide = true, help_heading = "Limits")]
    pub memory_swappiness: Option<i64>,
    /// Pause processes instead of killing them if memory runs out (cgroup v1)
    #[arg(long, hide = true, help_heading = "Limits")]
    pub oom_kill_disable: bool,
    /// Number of CPUs (1.5)
    #[arg(long, value_name = "NUMBER", help_heading = "Limits")]
    pub cpus: Option<f64>,
    /// Weight against other containers [kernel's default: 1024]
    #[arg(short = 'c', long, value_name = "WEIGHT", help_heading = "Limits")]
    pub cpu_shares: Option<i64>,
    /// Period of --cpu-quota in microseconds
    #[arg(long, value_name = "USEC", hide = true, help_heading = "Limits")]
    pub cpu_period: Option<i64>,
    /// Processor time in each period in microseconds
    #[arg(long, value_name = "USEC", hide = true, help_heading = "Limits")]
    pub cpu_quota: Option<i64>,
    /// CPUs to use (0-3, 0,1)
    #[arg(long, value_name = "CPUS", help_heading = "Limits")]
    pub cpuset_cpus: Option<String>,
    /// NUMA nodes to use memory from (0-3, 0,1)
    #[arg(long, value_name = "NODES", help_heading = "Limits")]
    pub cpuset_mems: Option<String>,
    /// Weight of block I/O against other containers, 10 to 1000
    #[arg(long, value_name = "WEIGHT", hide = true, help_heading = "Limits")]
    pub blkio_weight: Option<u16>,
    /// Number of processes; -1 is no limit
    #[arg(long, value_name = "NUMBER", help_heading = "Limits")]
    pub pids_limit: Option<i64>,
}
