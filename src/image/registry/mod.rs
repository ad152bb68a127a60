//! Images from registries (OCI distribution specification).
//!
//! ```text
//!  gpurun ── Order (JSON, stdin) ──► gpurun-pull: fetch ─► client ─► auth, certificates, registries
//!         ◄── a failure (stdout) ──               │  └───► blob (resumes) ─► inflate ─► hash ─► write
//!                                                 └──────► the store
//! ```
//!
//! The client is a program of its own: name services (NSS) are libraries that a static program cannot load, and the start
//! path carries neither TLS nor HTTP. The two share the store and nothing else.

mod auth;
mod blob;
mod certificates;
mod client;
pub mod fetch;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod progress;
mod registries;

use super::{RegistryName, Store, manifest::Platform};
use crate::{
    error::{Code, Error, OrFail, Result},
    programs,
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt,
    io::{Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

/// The program that fetches.
pub const PULLER: &str = "gpurun-pull";

/// When a registry is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// Each time: the tag may stand for another image by now.
    Always,
    /// Where the store does not know the name.
    #[default]
    Missing,
    /// Not at all.
    Never,
}

/// How progress is shown, on stderr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// A bar a layer on a terminal, nothing elsewhere.
    #[default]
    Auto,
    /// A line for each layer that is there.
    Plain,
    /// An object a line.
    Json,
    /// Nothing.
    None,
}

/// How images of registries are had.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Pull {
    /// When the registry is asked.
    #[serde(skip)]
    pub when: When,
    /// For which machine.
    pub platform: Platform,
    /// How progress is shown.
    pub progress: Progress,
    /// Hosts whose certificates are not checked and that may speak plain HTTP.
    pub insecure: Vec<String>,
    /// Base addresses that are tried before a host itself.
    pub mirrors: BTreeMap<String, Vec<String>>,
}

/// What is to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// What the name stands for, and its configuration; only if the store does not know the name.
    UnknownDocuments,
    /// The same, whatever the store knows.
    Documents,
    /// The layers that the store lacks.
    Layers,
}

/// What gpurun-pull is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// Where images are kept.
    pub store: PathBuf,
    /// What layers may take there, in bytes.
    pub quota: Option<u64>,
    /// Of the image.
    pub name: RegistryName,
    /// What of it.
    pub step: Step,
    /// How.
    pub pull: Pull,
}

/// The name under which the store knows an image: another machine's image does not take the place of this one's.
pub fn record_name(name: &impl fmt::Display, platform: &Platform) -> String {
    if *platform == Platform::default() { name.to_string() } else { format!("{name} ({platform})") }
}

/// Has gpurun-pull carry out an order.
///
/// # Errors
/// What it says.
pub fn order(store: &Store, name: &RegistryName, step: Step, pull: &Pull) -> Result<()> {
    let program = programs::find(PULLER, Code::Registry)?;
    let order = Order {
        store: store.path().into(),
        quota: store.quota(),
        name: name.clone(),
        step,
        pull: pull.clone(),
    };
    let fail = || format!("{} cannot be run", program.display());
    let order = serde_json::to_vec(&order).or_fail(Code::Internal, fail)?;
    let mut child = Command::new(&program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .or_fail(Code::Registry, fail)?;
    let (Some(mut input), Some(mut output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(Error::new(Code::Internal, fail()));
    };
    let written = input.write_all(&order);
    drop(input);
    let mut answer = Vec::new();
    output.read_to_end(&mut answer).or_fail(Code::Internal, || format!("{PULLER} does not answer"))?;
    let status = child.wait().or_fail(Code::Internal, fail)?;
    if let Some(error) = serde_json::from_slice(&answer).ok().and_then(|value| Error::from_json(&value)) {
        return Err(error);
    }
    written.or_fail(Code::Internal, fail)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::new(Code::Registry, format!("{PULLER} did not finish")).cause(status))
}
