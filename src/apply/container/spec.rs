//! A container as a plain value: everything is decided, nothing is done yet.

use super::{cgroup::Limits, identity::Identity, user_namespace::IdMap};
use crate::{
    image::ScratchDir,
    inventory::DeviceNode,
    plan::Injection,
    sys::{
        bpf::{DeviceKind, DeviceRule},
        mount::Flags,
    },
    vocabulary::EnvVar,
};
use std::{ffi::OsString, net::IpAddr, path::PathBuf};

/// One container.
#[derive(Debug)]
pub struct Container {
    /// 12 hexadecimal digits: names its scratch directory and its cgroup.
    pub id: String,
    /// `--read-only`: nothing but the mounts can be written.
    pub read_only: bool,
    /// Where files are kept that the container writes into its root.
    pub scratch: ScratchDir,
    /// Where gpurun keeps its trees.
    pub state_dir: PathBuf,
    /// The command.
    pub process: Process,
    /// uts name; `None` keeps the host's.
    pub hostname: Option<String>,
    /// NIS domain name; `None` keeps the host's.
    pub domainname: Option<String>,
    /// Whether the container shares the host's UTS namespace, so that neither name can be set.
    pub host_uts: bool,
    /// Whether the container sees the host's processes.
    pub host_pid: bool,
    /// Whether the host's cgroup namespace is shared.
    pub host_cgroups: bool,
    /// Kernel parameters of the container's own namespaces, with dots, and their values.
    pub sysctls: Vec<(String, String)>,
    /// `--add-host`
    pub hosts: Vec<HostEntry>,
    /// `--dns` and others; `None` keeps the host's /etc/resolv.conf.
    pub dns: Option<Dns>,
    /// Whether the host's network is used; otherwise there is only a loopback device.
    pub host_network: bool,
    /// Whether `--network` was given. If the kernel cannot confine root on the host's network, the option is required.
    pub network_requested: bool,
    /// Whether the host's IPC objects and /dev/shm are used.
    pub host_ipc: bool,
    /// Size of /dev/shm in bytes; `None` is no /dev/shm.
    pub shm_size: Option<u64>,
    /// `-v`, `--mount`, `--tmpfs`, in the order in which they were given.
    pub volumes: Vec<Volume>,
    /// Paths that are always writable (see [`super::image_volumes`]), outer ones first.
    pub image_volumes: Vec<PathBuf>,
    /// `--device`, and every device of the host for `--privileged`.
    pub devices: Vec<HostDevice>,
    /// `--device-cgroup-rule`
    pub device_rules: Vec<DeviceRule>,
    /// Whether parts of /proc and /sys are hidden or read-only.
    pub masked_paths: bool,
    /// `--privileged`: any device opens, and /sys and cgroups can be written.
    pub all_devices: bool,
    /// `--pidfile`: the file for the pid of the container's first process, in the launcher's pid namespace.
    pub pid_file: Option<PathBuf>,
    /// Driver and devices.
    pub injection: Injection,
    /// Where each part of the injection goes in this image, with these volumes.
    pub placement: crate::apply::placement::Placement,
    /// cgroup limits.
    pub limits: Limits,
    /// User namespace, for a launcher without root.
    pub id_map: Option<IdMap>,
    /// Whether the launcher has the rights of the host's root: not in a user namespace, its own or one around it.
    pub privileged: bool,
}

/// The user's command.
#[derive(Debug)]
pub struct Process {
    /// Program and arguments; never empty.
    pub argv: Vec<OsString>,
    /// Environment.
    pub env: Vec<EnvVar>,
    /// Working directory, made if it is absent.
    pub cwd: PathBuf,
    /// Who runs it.
    pub user: Identity,
    /// `-t`
    pub tty: bool,
    /// `-i`
    pub interactive: bool,
    /// `--init`: gpurun-init is pid 1, forwards signals and reaps.
    pub init: bool,
    /// The number of the signal that asks the command to end: `--stop-signal`, else the image's STOPSIGNAL. `None` is SIGTERM.
    pub stop_signal: Option<i32>,
    /// Limits.
    pub rlimits: Vec<Rlimit>,
    /// Capabilities as a mask of `1 << CAP_*`: bounding, and for root also permitted and effective.
    pub capabilities: u64,
    /// `--security-opt seccomp=unconfined` turns it off.
    pub seccomp: bool,
    /// Whether no_new_privs is set.
    pub no_new_privileges: bool,
    /// `--oom-score-adj`
    pub oom_score_adj: Option<i32>,
}

/// One resource limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rlimit {
    /// Which.
    pub resource: nix::sys::resource::Resource,
    /// Docker's name for it: `nofile`.
    pub name: &'static str,
    /// Soft limit; `u64::MAX` is none.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is none.
    pub hard: u64,
    /// Whether the user asked: then it must be possible, otherwise it is only wished for.
    pub required: bool,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Path on the host, path in the container, and device numbers.
    pub node: DeviceNode,
    /// Character or block device.
    pub kind: DeviceKind,
    /// The permissions of the container.
    pub rule: DeviceRule,
}

/// A line of /etc/hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostEntry {
    /// The name.
    pub name: String,
    /// The address.
    pub address: IpAddr,
}

/// Replacements for lines of the host's /etc/resolv.conf; an empty list keeps the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Search domains; a single `.` clears the list.
    pub search: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Dns {
    /// The host's resolv.conf(5) with these replacements.
    pub fn over(&self, host: &[u8]) -> Vec<u8> {
        let host = String::from_utf8_lossy(host);
        let replaced = |line: &str| match line.split_whitespace().next() {
            Some("nameserver") => !self.servers.is_empty(),
            Some("search" | "domain") => !self.search.is_empty(),
            Some("options") => !self.options.is_empty(),
            _ => false,
        };
        let mut lines: Vec<String> = host.lines().filter(|line| !replaced(line)).map(str::to_owned).collect();
        lines.extend(self.servers.iter().map(|server| format!("nameserver {server}")));
        let search: Vec<&str> =
            self.search.iter().map(String::as_str).filter(|domain| *domain != ".").collect();
        if !search.is_empty() {
            lines.push(format!("search {}", search.join(" ")));
        }
        if !self.options.is_empty() {
            lines.push(format!("options {}", self.options.join(" ")));
        }
        lines.iter().flat_map(|line| [line.as_bytes(), b"\n"]).flatten().copied().collect()
    }
}

/// Something the user mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Volume {
    /// A host directory or file.
    Bind {
        /// On the host, absolute.
        source: PathBuf,
        /// In the container.
        target: PathBuf,
        /// `ro`
        read_only: bool,
        /// Whether mounts below the source are included.
        recursive: bool,
        /// `rslave`: whether later mounts of the host appear in the container.
        receives_mounts: bool,
    },
    /// An empty file system in memory.
    Tmpfs {
        /// In the container.
        target: PathBuf,
        /// Size, mode, owner and others, by the names that tmpfs(5) has for them.
        options: Vec<(&'static str, String)>,
        /// What the mount forbids.
        flags: Flags,
    },
}

impl Volume {
    /// Where it appears in the container.
    pub fn target(&self) -> &std::path::Path {
        match self {
            Self::Bind { target, .. } | Self::Tmpfs { target, .. } => target,
        }
    }

    /// The path on the host if the container may write there; `None` if the volume is read-only or in memory.
    pub fn writable_source(&self) -> Option<&std::path::Path> {
        match self {
            Self::Bind { source, read_only: false, .. } => Some(source),
            Self::Bind { .. } | Self::Tmpfs { .. } => None,
        }
    }
}
