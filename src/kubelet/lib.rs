//! The node's device plugin: tells the kubelet of the GPUs, how they are, and what containers get that are given some.
//!
//! ```text
//!  inventory (watched) ─► resources ─┐                     ┌─► server ◄── kubelet: ListAndWatch, Allocate, GetPreferredAllocation
//!                                    ├─► State ─► plugin ──┤              (plan ─► Injection ─► response; preference)
//!  gpurun-nvml --watch ─► events ─► health                 ├─► registration ──► kubelet
//!               MPS daemons ◄─► mps ─┘    pods (who has what) ─┴─► metrics ◄── Prometheus
//! ```
//!
//! What is offered is a function of the inventory, and what a container gets is the plan's [`gpurun::plan::Injection`], as on every
//! other way.
#![forbid(unsafe_code)]

/// Messages and services of Kubernetes' device plugin API, v1beta1.
#[allow(missing_docs, clippy::pedantic)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/deviceplugin/v1beta1.rs"));
}
/// Messages and services of the kubelet's API of DRA drivers, v1.
#[allow(missing_docs, clippy::pedantic)]
pub mod dra_api {
    include!(concat!(env!("OUT_DIR"), "/dra/k8s.io.kubelet.pkg.apis.dra.v1.rs"));
}
/// How such a driver's devices are, v1.
#[allow(missing_docs, clippy::pedantic)]
pub mod dra_health_api {
    include!(concat!(env!("OUT_DIR"), "/dra_health/v1.rs"));
}
/// How a kubelet learns of a driver.
#[allow(missing_docs, clippy::pedantic)]
pub mod registration_api {
    include!(concat!(env!("OUT_DIR"), "/pluginregistration/pluginregistration.rs"));
}
/// Which pods have which devices, v1.
#[allow(missing_docs, clippy::pedantic)]
pub mod pod_resources_api {
    include!(concat!(env!("OUT_DIR"), "/podresources/v1.rs"));
}
mod api_server;
mod authority;
mod back_off;
pub mod config;
mod dra;
mod events;
pub mod grpc;
mod health;
mod health_file;
mod labels;
mod metrics;
mod mps;
mod node_labels;
mod plugin;
mod pods;
mod preference;
mod registration;
mod resources;
mod response;
mod server;
mod state;

pub use plugin::serve;
