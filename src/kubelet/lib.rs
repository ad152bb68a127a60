//! The node's device plugin: advertises GPUs and their health to the kubelet, and tells it what allocated containers get.
//!
//! ```text
//!  inventory (watched) ─► resources ─┐                     ┌─► server ◄── kubelet: ListAndWatch, Allocate, GetPreferredAllocation
//!                                    ├─► State ─► plugin ──┤              (plan ─► Injection ─► response; preference)
//!  gpurun-nvml --watch ─► events ─► health                 ├─► registration ──► kubelet
//!               MPS daemons ◄─► mps ─┘                     ├─► dra ◄── kubelet: claims; ──► API server: ResourceSlices
//!  health_file: for the next process                       ├─► labels ─► node_labels ──► API server, or a file
//!                                    pods (device users) ──┴─► metrics ─► http_server ◄── Prometheus, probe ◄── kubelet
//! ```
//!
//! The advertised devices are a function of the inventory, and a container gets the plan's [`gpurun::plan::Injection`], as
//! from gpurun's other programs.
#![forbid(unsafe_code)]

pub mod api;
mod api_server;
mod authority;
mod back_off;
pub mod config;
mod dra;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz_targets;
pub mod grpc;
mod health;
mod health_file;
mod http_server;
mod labels;
mod metrics;
mod mps;
mod node_labels;
mod plugin;
mod pods;
mod preference;
pub mod probe;
mod registration;
mod resources;
mod response;
mod server;
mod socket;
mod state;

pub use plugin::serve;
