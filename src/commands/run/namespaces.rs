//! `--network`, `--ipc`: which of the host's namespaces the container shares.

use super::usage;
use crate::error::Result;

/// `--ipc`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipc {
    /// Its own IPC objects and /dev/shm.
    Private,
    /// The host's.
    Host,
}

/// Whether the container has the host's network; otherwise a loopback device alone.
pub fn network(typed: &[String]) -> Result<bool> {
    match typed {
        [] => Ok(true),
        [one] if one == "host" => Ok(true),
        [one] if one == "none" => Ok(false),
        other => Err(usage(format!("--network {}: gpurun makes no networks", other.join(" --network "))).fix(
            "write --network host (the default: every port of the container is a port of the host) or --network none (a loopback \
             device alone)",
        )),
    }
}

/// Reads `--ipc`.
pub fn ipc(typed: Option<&str>) -> Result<Ipc> {
    match typed.unwrap_or("private") {
        "private" | "shareable" | "" => Ok(Ipc::Private),
        "host" => Ok(Ipc::Host),
        other => Err(usage(format!("--ipc {other} is not possible")).fix("write --ipc host for the host's")),
    }
}
