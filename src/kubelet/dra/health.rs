//! Tells the kubelet how the driver's devices are, for the status of the pods that have them.

use super::slice;
use crate::{
    api::dra_health::{
        DeviceHealth, DeviceIdentifier, HealthStatus, NodeWatchResourcesRequest, NodeWatchResourcesResponse,
        dra_resource_health_server::DraResourceHealth,
    },
    state::State,
};
use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Request, Response, Status};

/// So often the kubelet is told what it knows: otherwise it knows nothing any more by and by.
const AGAIN: Duration = Duration::from_secs(60);
/// After so many seconds without a word it does not know.
const TRUE_FOR: i64 = 180;

/// The service.
#[derive(Debug)]
pub struct Health {
    /// The pool of the devices.
    pub node: String,
    /// The newest state; none is there while nothing is offered.
    pub state: watch::Receiver<Option<Arc<State>>>,
}

#[tonic::async_trait]
impl DraResourceHealth for Health {
    type NodeWatchResourcesStream =
        Pin<Box<dyn Stream<Item = Result<NodeWatchResourcesResponse, Status>> + Send>>;

    async fn node_watch_resources(
        &self,
        _: Request<NodeWatchResourcesRequest>,
    ) -> Result<Response<Self::NodeWatchResourcesStream>, Status> {
        let (node, newest) = (self.node.clone(), self.state.clone());
        let mut names = BTreeMap::new();
        let changes = WatchStream::new(self.state.clone()).map(drop);
        let lists = changes.timeout_repeating(tokio::time::interval(AGAIN)).map(move |_| {
            let state = newest.borrow().clone();
            Ok(NodeWatchResourcesResponse { devices: list(state.as_deref(), &node, &mut names) })
        });
        Ok(Response::new(Box::pin(lists)))
    }
}

/// Every device whose name is known, by UUID: one that is gone has it still.
fn list(state: Option<&State>, node: &str, names: &mut BTreeMap<String, String>) -> Vec<DeviceHealth> {
    let Some(state) = state else { return Vec::new() };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let devices = state.resources.iter().flat_map(|resource| &resource.devices);
    let health = |uuid: &String| {
        if let Some(device) = state.device(uuid) {
            names.insert(uuid.clone(), slice::name(device));
        }
        let why = state.unhealthy.get(uuid);
        Some(DeviceHealth {
            device: Some(DeviceIdentifier { pool_name: node.into(), device_name: names.get(uuid)?.clone() }),
            health: if why.is_some() { HealthStatus::Unhealthy } else { HealthStatus::Healthy }.into(),
            last_updated_time: now.try_into().unwrap_or(i64::MAX),
            health_check_timeout_seconds: TRUE_FOR,
            message: why.cloned().unwrap_or_default(),
        })
    };
    devices.map(|device| &device.uuid).filter_map(health).collect()
}
