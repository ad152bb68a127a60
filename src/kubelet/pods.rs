//! Which pods have which devices: only the kubelet knows. For messages and metrics; nothing is decided by it.

use crate::{
    api::pod_resources::{
        ListPodResourcesRequest, PodResources, pod_resources_lister_client::PodResourcesListerClient,
    },
    dra::DRIVER,
    grpc,
    resources::device_of,
    response::{CDI_CLASS, CDI_VENDOR},
    state::State,
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

/// A kubelet that answers takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// An answer is true for so long: whatever makes us ask, the kubelet has better to do.
const TRUE_FOR: Duration = Duration::from_secs(1);

/// Asks the kubelet.
#[derive(Debug, Clone)]
pub struct Pods {
    /// Its socket; `None`: it is not asked.
    socket: Option<PathBuf>,
    last: Arc<Mutex<Option<Answer>>>,
}

/// What the kubelet has said, or that it has not, and when.
type Answer = (Instant, Option<Vec<PodResources>>);

/// A device, or a replica of one, that a container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The resource by which it was asked for; the driver's name where a claim has it.
    pub resource: String,
    /// Its UUID.
    pub device: String,
    /// Of the pod.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// The container's name in it.
    pub container: String,
}

impl Pods {
    /// Of a kubelet with this socket; `None`: nobody is asked.
    pub fn new(socket: Option<PathBuf>) -> Self {
        Self { socket, last: Arc::default() }
    }

    /// One question at a time.
    async fn list(&self) -> Option<Vec<PodResources>> {
        let socket = self.socket.as_deref()?;
        let mut last = self.last.lock().await;
        if let Some((when, pods)) = last.as_ref()
            && when.elapsed() < TRUE_FOR
        {
            return pods.clone();
        }
        let asked = async {
            let channel = grpc::connect(socket).await.ok()?;
            let response = PodResourcesListerClient::new(channel).list(ListPodResourcesRequest {}).await;
            Some(response.ok()?.into_inner().pod_resources)
        };
        let pods = timeout(PATIENCE, asked).await.ok().flatten();
        *last = Some((Instant::now(), pods.clone()));
        pods
    }

    /// The devices of the state that containers have; `None` if unknown.
    pub async fn held(&self, state: &State) -> Option<Vec<Held>> {
        let pods = self.list().await?;
        let mut held = Vec::new();
        for pod in pods {
            for container in pod.containers {
                let mut has = |resource: &str, device: &str| {
                    held.push(Held {
                        resource: resource.into(),
                        device: device.into(),
                        namespace: pod.namespace.clone(),
                        pod: pod.name.clone(),
                        container: container.name.clone(),
                    });
                };
                for devices in &container.devices {
                    if state.resource(&devices.resource_name).is_some() {
                        let ids = devices.device_ids.iter();
                        ids.for_each(|id| has(&devices.resource_name, device_of(id)));
                    }
                }
                let claims = container.dynamic_resources.iter().flat_map(|claim| &claim.claim_resources);
                for device in claims.flat_map(|claim| &claim.cdi_devices) {
                    let ours = device.name.strip_prefix(CDI_VENDOR).and_then(|rest| rest.strip_prefix('/'));
                    let name = ours.and_then(|rest| rest.strip_prefix(CDI_CLASS)?.strip_prefix('='));
                    // Claims' devices have their UUIDs there, whatever those of resources have.
                    if let Some(uuid) = name.filter(|name| state.device(name).is_some()) {
                        has(DRIVER, uuid);
                    }
                }
            }
        }
        Some(held)
    }
}
