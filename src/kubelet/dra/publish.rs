//! Reconciles the node's ResourceSlices at the API server. Other programs may delete them; the kubelet does so at its start.
//!
//! ```text
//!   Dra::offer ─ devices ─┐
//!                         ├─► a thread: compares, applies, deletes
//!   a thread: watches ────┘ slices that are there
//! ```

use super::{
    DRIVER,
    slice::{ApiVersion, Described, slices},
};
use crate::api_server::{ApiServer, LATER};
use gpurun::error::{Code, Error, OrFail, Result};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// The first delay before a foreign change is reverted.
const BREATH: Duration = Duration::from_secs(1);
/// After so long without another change it is the first again.
const QUIET: Duration = Duration::from_secs(300);

/// Tells the API server what there is.
#[derive(Debug)]
pub struct Publisher(Sender<News>);

enum News {
    /// What can be allocated.
    Offer(Vec<Described>),
    /// The slices that are there, by name.
    There(ApiVersion, BTreeMap<String, Slice>),
}

/// As much of a slice as says whether it is the one that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slice {
    resource_version: String,
    generation: u64,
}

impl Slice {
    fn of(object: &Value) -> Option<(String, Self)> {
        let metadata = &object["metadata"];
        let generation = object["spec"]["pool"]["generation"].as_u64().unwrap_or(0);
        let resource_version = metadata["resourceVersion"].as_str()?.to_owned();
        Some((metadata["name"].as_str()?.to_owned(), Self { resource_version, generation }))
    }
}

impl Publisher {
    /// Starts its threads. They end with the process.
    ///
    /// # Errors
    /// [`Code::Internal`]
    pub fn start(api_server: Arc<ApiServer>, node: String) -> Result<Self> {
        let (news, newest) = channel();
        let named = |name: &str| thread::Builder::new().name(name.into());
        let failed = || "no thread can be started";
        let (watched, api) = (news.clone(), Arc::clone(&api_server));
        let of_node = node.clone();
        named("slices: watch")
            .spawn(move || watch(&api, &of_node, &watched))
            .or_fail(Code::Internal, failed)?;
        let published = Published { api_server, node, applied: BTreeMap::new(), generation: 0 };
        named("slices").spawn(move || published.keep(&newest)).or_fail(Code::Internal, failed)?;
        Ok(Self(news))
    }

    /// What can be allocated from now on.
    pub fn offer(&self, devices: Vec<Described>) {
        // The thread lives as long as this does.
        let _ = self.0.send(News::Offer(devices));
    }
}

/// The version of the API to speak.
///
/// # Errors
/// [`Code::Cluster`] if the cluster has none that is known here.
pub fn api_version(api_server: &ApiServer) -> Result<ApiVersion> {
    let failed = "the cluster offers no dynamic resource allocation that gpurun knows";
    let group = api_server.get("/apis/resource.k8s.io", &[])?.unwrap_or_default();
    let versions = group["versions"].as_array().cloned().unwrap_or_default();
    let has = |wanted: &ApiVersion| versions.iter().any(|one| one["version"] == wanted.as_str());
    [ApiVersion::V1, ApiVersion::V1Beta1].into_iter().find(has).ok_or_else(|| {
        let names: Vec<_> = versions.iter().filter_map(|one| one["version"].as_str()).collect();
        Error::new(Code::Cluster, failed)
            .cause(format!("of resource.k8s.io it has the versions: {}", names.join(", ")))
            .fix("use Kubernetes 1.34 or newer, or 1.32 with resource.k8s.io/v1beta1 switched on; or leave --dra out")
    })
}

fn path(version: ApiVersion) -> String {
    format!("/apis/resource.k8s.io/{}/resourceslices", version.as_str())
}

/// Tells which slices of this node and driver there are, again each time that they are others.
fn watch(api_server: &ApiServer, node: &str, news: &Sender<News>) {
    let mut breath = BREATH;
    loop {
        let started = Instant::now();
        match watch_once(api_server, node, news) {
            Ok(true) if started.elapsed() > LATER => breath = BREATH,
            // One that ends at once is not to be had.
            Ok(true) => breath = (breath * 2).min(LATER),
            Ok(false) => return,
            Err(error) => {
                tracing::error!("{error}");
                breath = LATER;
            }
        }
        // Not all nodes at a time, after an API server has come back.
        thread::sleep(breath + breath.mul_f64(f64::from(started.elapsed().subsec_micros() % 1000) / 4000.0));
    }
}

/// Runs until the API server ends the watch; `false` if the receiver has ended.
fn watch_once(api_server: &ApiServer, node: &str, news: &Sender<News>) -> Result<bool> {
    let version = api_version(api_server)?;
    let path = path(version);
    let selector = format!("spec.driver={DRIVER},spec.nodeName={node}");
    let needs = |error: Error| {
        error.fix("let the plugin's account create, patch, delete, list and watch `resourceslices` (the chart: dra.enabled=true)")
    };
    let list = api_server.get(&path, &[("fieldSelector", &selector)]).map_err(needs)?.unwrap_or_default();
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut there: BTreeMap<String, Slice> = items.iter().filter_map(Slice::of).collect();
    if news.send(News::There(version, there.clone())).is_err() {
        return Ok(false);
    }
    let from = list["metadata"]["resourceVersion"].as_str().unwrap_or_default();
    let query = [("fieldSelector", selector.as_str()), ("resourceVersion", from)];
    for event in api_server.watch(&path, &query).map_err(needs)? {
        // A connection that ends within an event has ended.
        let Ok(event) = event else { break };
        let Some((name, slice)) = Slice::of(&event["object"]) else {
            // Too old a version (410): the list is read again.
            break;
        };
        if event["type"] == "DELETED" {
            there.remove(&name);
        } else {
            there.insert(name, slice);
        }
        if news.send(News::There(version, there.clone())).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What was published.
struct Published {
    api_server: Arc<ApiServer>,
    node: String,
    /// The slices as the API server said that they are.
    applied: BTreeMap<String, Slice>,
    generation: u64,
}

impl Published {
    fn keep(mut self, newest: &Receiver<News>) {
        let (mut offer, mut there) = (None, None);
        // When something is to be published; and whether it is an offer of ours, or something that somebody else has changed.
        let (mut due, mut ours) = (None::<Instant>, false);
        // Nobody is chased: the next time later, until it has been quiet.
        let (mut breath, mut changed) = (BREATH, Instant::now());
        loop {
            let next = match due.filter(|_| offer.is_some() && there.is_some()) {
                Some(due) => newest.recv_timeout(due.saturating_duration_since(Instant::now())),
                None => newest.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match next {
                Ok(News::Offer(devices)) => {
                    if offer.as_ref() != Some(&devices) {
                        self.generation += 1;
                        (due, ours) = (Some(Instant::now()), true);
                    }
                    offer = Some(devices);
                }
                Ok(News::There(version, slices)) => {
                    if there.is_none() {
                        (due, ours) = (Some(Instant::now()), true);
                    } else if slices == self.applied && !ours {
                        due = None;
                    } else if slices != self.applied && due.is_none() {
                        breath = if changed.elapsed() > QUIET { BREATH } else { (breath * 2).min(LATER) };
                        changed = Instant::now();
                        due = Some(changed + breath);
                    }
                    there = Some((version, slices));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let (Some(offer), Some((version, there))) = (&offer, &there) else {
                continue;
            };
            if due.is_none_or(|due| due > Instant::now()) {
                continue;
            }
            (due, ours) = match self.publish(offer, *version, there) {
                Ok(()) => (None, false),
                Err(error) => {
                    tracing::error!("{error}");
                    (Some(Instant::now() + LATER), true)
                }
            };
        }
    }

    fn publish(
        &mut self,
        devices: &[Described],
        version: ApiVersion,
        there: &BTreeMap<String, Slice>,
    ) -> Result<()> {
        let failed = |error: Error| {
            error.context("the node's devices are not published").fix(
                "let the plugin's account create, patch, delete, list and watch `resourceslices`, and get `nodes` (the chart: \
                 dra.enabled=true)",
            )
        };
        let uid = self.node_uid().map_err(failed)?;
        // Of a pool, the scheduler knows the slices of the newest generation alone.
        let others = there.iter().filter(|(name, slice)| self.applied.get(*name) != Some(*slice));
        let newest = others.map(|(_, slice)| slice.generation).max().unwrap_or(0);
        self.generation = self.generation.max(newest + 1);
        let wanted = slices(devices, version, &self.node, &uid, self.generation);
        for (name, slice) in &wanted {
            let said = self.api_server.apply(&format!("{}/{name}", path(version)), slice).map_err(failed)?;
            // At once: if a later one fails, this one is still nobody else's.
            self.applied.extend(Slice::of(&said));
        }
        // The watch may not have reported yet what was applied a moment ago.
        let known: BTreeSet<&String> = there.keys().chain(self.applied.keys()).collect();
        for name in known.into_iter().filter(|name| !wanted.contains_key(*name)) {
            self.api_server.delete(&format!("{}/{name}", path(version))).map_err(failed)?;
        }
        self.applied.retain(|name, _| wanted.contains_key(name));
        tracing::info!("{} devices are published", devices.len());
        Ok(())
    }

    /// The node's own: slices go with their node. It is another when a node was taken out of the cluster and is back.
    fn node_uid(&self) -> Result<String> {
        let node = self.api_server.get(&format!("/api/v1/nodes/{}", self.node), &[])?.unwrap_or_default();
        let uid = node["metadata"]["uid"].as_str().ok_or("the API server knows no such node");
        let uid = uid.or_fail(Code::Cluster, || format!("there is no node {}", self.node));
        let uid =
            uid.map_err(|error| error.fix("name this node as the cluster does: --node-name, NODE_NAME"))?;
        Ok(uid.to_owned())
    }
}
