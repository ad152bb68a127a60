//! A container as a plain value: everything is decided, nothing is done yet.

use super::{cgroup::Limits, identity::Identity, user_namespace::IdMap};
use crate::{image::ScratchDir, plan::Injection, vocabulary::EnvVar};
use std::{ffi::OsString, path::PathBuf};

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
    /// Whether the host's network is used; otherwise there is only a loopback device.
    pub host_network: bool,
    /// Whether `--network` was typed. Some kernels cannot confine root on the host's network, which then must be asked for.
    pub network_requested: bool,
    /// Whether the host's IPC objects and /dev/shm are used.
    pub host_ipc: bool,
    /// Size of /dev/shm in bytes.
    pub shm_size: u64,
    /// `-v`, `--mount`, `--tmpfs`, in the order in which they were given.
    pub volumes: Vec<Volume>,
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
    /// `--init`: a process of ours is pid 1, forwards signals and reaps.
    pub init: bool,
    /// The number of the signal that asks the command to end: `--stop-signal`, else the image's STOPSIGNAL. `None` is SIGTERM.
    pub stop_signal: Option<i32>,
    /// Limits.
    pub rlimits: Vec<Rlimit>,
    /// Capabilities as a mask of `1 << CAP_*`: bounding, and for root permitted and effective, too.
    pub capabilities: u64,
    /// `--security-opt seccomp=unconfined` turns it off.
    pub seccomp: bool,
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
    },
    /// An empty file system in memory.
    Tmpfs {
        /// In the container.
        target: PathBuf,
        /// Bytes; `None` is the kernel's default, half of memory.
        size: Option<u64>,
        /// Permission bits.
        mode: u32,
        /// `exec`: programs on it may be run (Docker's default forbids it for --tmpfs).
        exec: bool,
        /// `ro`
        read_only: bool,
    },
}

impl Volume {
    /// Where it appears in the container.
    pub fn target(&self) -> &std::path::Path {
        match self {
            Self::Bind { target, .. } | Self::Tmpfs { target, .. } => target,
        }
    }
}
