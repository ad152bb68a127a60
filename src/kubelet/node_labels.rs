//! Keeps the node's labels as they should be, through the API server.

use crate::{
    api_server::{ApiServer, PATIENCE},
    labels::Labels,
};
use gpurun::error::Result;
use serde_json::json;
use std::sync::mpsc::{Receiver, RecvTimeoutError};

/// Lets the node have these labels, and none that were set here before.
fn label(api_server: &ApiServer, node: &str, labels: &Labels) -> Result<()> {
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}});
    api_server.apply(&format!("/api/v1/nodes/{node}"), &object).map(drop).map_err(|error| {
        error.context(format!("the node {node} cannot be labelled")).fix(
            "let the plugin's account `patch` `nodes` (the chart: labels.target=node), or use --labels-file",
        )
    })
}

/// Labels the node each time that there are other labels, until there will be none. What fails is tried again.
pub fn keep(api_server: &ApiServer, node: &str, newest: &Receiver<Labels>) {
    let Ok(mut labels) = newest.recv() else { return };
    loop {
        let next = match label(api_server, node, &labels) {
            Ok(()) => newest.iter().find(|others| *others != labels).ok_or(RecvTimeoutError::Disconnected),
            Err(error) => {
                tracing::error!("{error}");
                newest.recv_timeout(PATIENCE)
            }
        };
        match next {
            Ok(others) => labels = others,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
