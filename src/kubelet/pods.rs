//! Which pods have which devices: only the kubelet knows. For messages and metrics; nothing is decided by it.

use crate::{
    dra::DRIVER,
    grpc,
    pod_resources_api::{ListPodResourcesRequest, pod_resources_lister_client::PodResourcesListerClient},
    resources::device_of,
    response::{CDI_CLASS, CDI_VENDOR},
    state::State,
};
use std::{path::PathBuf, time::Duration};
use tokio::time::timeout;

/// A kubelet that answers takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks the kubelet.
#[derive(Debug, Clone)]
pub struct Pods {
    /// Its socket; `None`: it is not asked.
    pub socket: Option<PathBuf>,
}

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
    /// Every device of the state that a container has; `None` where nobody knows.
    pub async fn held(&self, state: &State) -> Option<Vec<Held>> {
        let socket = self.socket.as_deref()?;
        let asked = async {
            let channel = grpc::connect(socket).await.ok()?;
            let response = PodResourcesListerClient::new(channel).list(ListPodResourcesRequest {}).await;
            Some(response.ok()?.into_inner().pod_resources)
        };
        let pods = timeout(PATIENCE, asked).await.ok()??;
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
                    if let Some(uuid) = name.and_then(|name| state.uuid(name)) {
                        has(DRIVER, uuid);
                    }
                }
            }
        }
        Some(held)
    }
}
