//! Images from registries (OCI distribution specification).
//!
//! ```text
//!  gpurun ── Order (JSON, stdin) ──► gpurun-pull: fetch ─► client ─► http (redirects), credentials, token, registries
//!         ◄── a failure (stdout) ──               │  └───► blob (resumes) ─► inflate ─► hash ─► write
//!                                                 └──────► the store
//! ```
//!
//! The client is a program of its own, because name services (NSS) are libraries that a static program cannot load, and because
//! neither TLS nor HTTP belongs on the start path. The two programs share the store and nothing else.
//!
//! # Trust boundary
//!
//! Registries, the servers that they redirect to, and their token services are hostile. Their responses are bounded in bytes
//! and in time, and checked against a digest if one is known.
//!
//! # Which credential is sent to which host
//!
//! R is the server that was asked: the registry of the image's name, or one of its mirrors, which are hosts of their own. S is a
//! server that R redirects to. T is the token service that R's own challenge names. An origin is scheme, host and port.
//!
//! | credential | from | is sent to | when |
//! |---|---|---|---|
//! | name and password | files and helpers, looked up by R's name | R | R answers 401 with `Basic`; afterwards with each request to R's origin |
//! | name and password | the same | T, as `Basic` | R answers 401 with `Bearer`; T's address is https, or [plain HTTP is allowed](#plain-http) |
//! | identity token | the same | T, in a POST | the same; a redirect is followed at T's origin only |
//! | token | T | R | with each request to R's origin |
//! | client certificate | `certs.d/HOST[:PORT]` | that host and port | in its TLS handshake, whether it is R, S or T |
//! | output of a helper | `docker-credential-NAME get`, asked for R's name | as name and password, or as identity token | the same |
//! | name and password in the URL of a proxy | `HTTPS_PROXY` | that proxy | with each connection through it |
//! | nothing | | an address in the manifest (`urls` of a layer) | the registry does not have the layer |
//! | nothing | | S | always: credentials are dropped at the first redirect to another origin and stay dropped, even if S redirects back to R |
//!
//! A challenge from S is not answered. A challenge from R counts after redirects within R's origin. `Authorization` is kept across
//! those and no others. Redirects of T follow the same rule.
//!
//! # Plain HTTP
//!
//! R is asked over plain HTTP if TLS fails, and the configuration marks R as insecure or R is this machine. An https server
//! never leads to an http server, neither by a redirect nor by the address of a token service. An http server leads to
//! another http server if the configuration marks R or the other one as insecure, if the other one is this machine, or if the
//! digest of the content is known and no secret is sent. So a manifest that is requested by tag is not fetched from there.
//!
//! Certificates of R are not checked if the configuration marks R as insecure or R is this machine, and `certs.d` has no
//! authority for R. Servers that R leads to are checked unless the configuration marks R or that server as insecure.

mod address;
mod auth_file;
mod blob;
mod certificates;
mod challenge;
mod client;
mod credentials;
mod failure;
pub mod fetch;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod helper;
mod http;
mod progress;
mod registries;
mod retry_after;
mod status;
mod token;

use super::{Platform, RegistryName, Store};
use crate::{
    error::{Code, Error, OrFail, Result},
    own_directory, programs,
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

/// The name of the program that pulls images.
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
    /// A bar for each layer on a terminal, a line every few seconds elsewhere.
    #[default]
    Auto,
    /// A line for each layer that is in the store, and one every few seconds.
    Plain,
    /// An object a line.
    Json,
    /// Nothing.
    None,
}

/// Options for pulls from registries.
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
    let fix =
        |error: Error| error.fix(format!("install {PULLER} again beside gpurun; GPURUN_LOG=debug says more"));
    let order = serde_json::to_vec(&order).or_fail(Code::Internal, fail).map_err(fix)?;
    let mut command = Command::new(&program);
    // Reported once is enough.
    for variable in own_directory::ignored() {
        command.env_remove(variable);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .or_fail(Code::Registry, fail)
        .map_err(fix)?;
    let (Some(mut input), Some(mut output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(fix(Error::new(Code::Internal, fail())));
    };
    let written = input.write_all(&order);
    drop(input);
    let mut answer = Vec::new();
    output
        .read_to_end(&mut answer)
        .or_fail(Code::Internal, || format!("{PULLER} does not answer"))
        .map_err(fix)?;
    let status = child.wait().or_fail(Code::Internal, fail).map_err(fix)?;
    if let Some(error) = serde_json::from_slice(&answer).ok().and_then(|value| Error::from_json(&value)) {
        return Err(error);
    }
    written.or_fail(Code::Internal, fail).map_err(fix)?;
    if status.success() {
        return Ok(());
    }
    Err(fix(Error::new(Code::Registry, format!("{PULLER} did not finish")).cause(status)))
}
