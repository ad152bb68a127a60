//! gpurun's own container, in process.
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod seccomp;
