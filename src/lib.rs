//! gpurun starts GPU containers.
//!
//! Host facts and a request go in, one plain value called an [`plan::Injection`] comes out, and each destination carries it
//! out its own way:
//!
//! ```text
//!  inventory ──┐
//!  (what the   │                               ┌► container   gpurun IMAGE CMD: our own container, in process
//!   host has)  ├─► plan ─► Injection ─► apply ─┼► oci_spec    gpurun-runtime: edits config.json, becomes runc or crun
//!  request  ───┘  (pure)   (a value)            ├► namespace   nvidia-container-runtime-hook: a container that exists already
//!  (what is                                     └► cdi         a document from which engines inject by themselves
//!   asked for)
//! ```
//!
//! A fifth one is a package of its own, `src/kubelet`: what a Kubernetes node's kubelet is told.
//!
//! `inventory` reads and decides nothing; `plan` decides and touches nothing; `apply` does and decides nothing. Imports go one
//! way: request, inventory → plan → apply. `image` brings a root; `sys` holds every unsafe block behind a safe function.
#![deny(unsafe_code)]

pub mod apply;
pub mod cli;
pub mod commands;
pub mod config;
pub mod error;
pub mod formats;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz_targets;
pub mod image;
pub mod inventory;
pub mod output;
pub mod own_directory;
pub mod plan;
pub mod programs;
pub mod regular_file;
pub mod request;
pub mod simulated_host;
pub mod sys;
pub mod text_file;
pub mod vocabulary;
