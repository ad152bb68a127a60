//! Keeps the node's labels as they should be, through the API server.

use crate::{
    api_server::{ApiServer, LATER},
    labels::Labels,
};
use gpurun::error;
use serde_json::json;
use std::{
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

/// A node that was taken out of the cluster and is back has none.
const AGAIN: Duration = Duration::from_secs(600);

/// Lets the node have these labels, and none that were set here before.
fn label(api_server: &ApiServer, node: &str, labels: &Labels) -> error::Result<()> {
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}});
    api_server.apply(&format!("/api/v1/nodes/{node}"), &object).map(drop).map_err(|error| {
        error.context(format!("the node {node} cannot be labelled")).fix(
            "let the plugin's account `patch` `nodes` (the chart: labels.target=node), or use --labels-file",
        )
    })
}

/// Labels the node each time that there are other labels, and now and then, until there will be none. What fails is tried again.
pub fn keep(api_server: &ApiServer, node: &str, newest: &Receiver<Labels>) {
    let Ok(mut labels) = newest.recv() else { return };
    loop {
        let next = match label(api_server, node, &labels) {
            Ok(()) => others(newest, &labels),
            Err(error) => {
                tracing::error!("{error}");
                newest.recv_timeout(LATER)
            }
        };
        match next {
            Ok(others) => labels = others,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn others(newest: &Receiver<Labels>, labels: &Labels) -> Result<Labels, RecvTimeoutError> {
    let until = Instant::now() + AGAIN;
    loop {
        let next = newest.recv_timeout(until.saturating_duration_since(Instant::now()))?;
        if next != *labels {
            return Ok(next);
        }
    }
}
