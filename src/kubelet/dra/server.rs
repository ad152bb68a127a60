//! What the kubelet asks of the driver.

use super::{
    DRIVER,
    checkpoint::{Checkpoint, Device, Prepared},
    claim,
    health::Health,
    publish::api_version,
    slice,
};
use crate::{
    api::dra::{
        self, Claim, NodePrepareResourceResponse, NodePrepareResourcesRequest, NodePrepareResourcesResponse,
        NodeUnprepareResourceResponse, NodeUnprepareResourcesRequest, NodeUnprepareResourcesResponse,
        dra_plugin_server::{self, DraPlugin, DraPluginServer},
    },
    api::dra_health::dra_resource_health_server::{self, DraResourceHealthServer},
    api::registration::{
        InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
        registration_server::Registration,
    },
    api_server::ApiServer,
    metrics::Metrics,
    response,
    state::State,
};
use gpurun::{
    error::{Code, Error, OrFail, Result},
    plan::Selected,
};
use http::Uri;
use hyper::body::Incoming;
use std::{
    convert::Infallible,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};
use tokio::sync::{Mutex, watch};
use tonic::{Request, Response, Status, body::Body};
use tower_service::Service;

/// Tells the kubelet where the driver answers.
#[derive(Debug)]
pub struct Registrar {
    /// The driver's socket.
    pub endpoint: PathBuf,
}

/// The services that the driver has, as kubelets name them (k8s.io/kubelet, pkg/apis/dra/…/types.go, `DRAPluginService`,
/// and pkg/apis/dra-health).
const SERVICES: [&str; 4] =
    ["v1.DRAPlugin", "v1beta1.DRAPlugin", "v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth"];

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "DRAPlugin".into(),
            name: DRIVER.into(),
            endpoint: self.endpoint.to_string_lossy().into_owned(),
            supported_versions: SERVICES.map(String::from).into(),
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = status.into_inner();
        if status.plugin_registered {
            tracing::info!("{DRIVER} is registered");
        } else {
            tracing::error!("the kubelet does not take {DRIVER}: {}", status.error);
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// The driver's services on one socket, each of which answers to its older versions, too: they have the same messages.
#[derive(Debug, Clone)]
pub struct Services {
    /// Of claims.
    pub claims: DraPluginServer<Claims>,
    /// Of devices' health.
    pub health: DraResourceHealthServer<Health>,
}

impl Service<http::Request<Incoming>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Incoming>) -> Self::Future {
        // /k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/NodePrepareResources
        let path = request.uri().path();
        let method = |service: &str| path.rsplit_once(service).map(|(_, method)| method);
        let (newest, is_health) = match (method(".DRAPlugin/"), method(".DRAResourceHealth/")) {
            (_, Some(method)) => (format!("/{}/{method}", dra_resource_health_server::SERVICE_NAME), true),
            (Some(method), None) => (format!("/{}/{method}", dra_plugin_server::SERVICE_NAME), false),
            (None, None) => (path.to_owned(), false),
        };
        if let Ok(newest) = newest.parse::<Uri>() {
            *request.uri_mut() = newest;
        }
        if is_health { self.health.call(request) } else { self.claims.call(request) }
    }
}

/// Claims, as the kubelet gives and takes them.
#[derive(Debug)]
pub struct Claims {
    /// The node's pool.
    pub node: String,
    /// It says what a claim has got.
    pub api_server: Arc<ApiServer>,
    /// The newest state; none is there while nothing is offered.
    pub state: watch::Receiver<Option<Arc<State>>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Which claims are prepared.
    pub checkpoint: Arc<Mutex<Checkpoint>>,
}

impl Claims {
    async fn prepare(&self, asked: &Claim) -> Result<Vec<dra::Device>> {
        let state = self.state.borrow().clone();
        let state = state.ok_or("the driver is not there, or something of it is not as it should be");
        let state = state.or_fail(Code::NoDriver, || "no device is offered")?;
        let known = self.checkpoint.lock().await.claim(&asked.uid).cloned();
        let prepared = if let Some(prepared) = known {
            prepared
        } else {
            let allocated = claim::allocated(self.read(asked).await?, &asked.uid, &self.node)?;
            let devices = allocated.into_iter().map(|one| device(&state, one)).collect::<Result<_>>()?;
            let prepared = Prepared { namespace: asked.namespace.clone(), name: asked.name.clone(), devices };
            let mut checkpoint = self.checkpoint.lock().await;
            checkpoint.prepare(&asked.uid, prepared.clone())?;
            self.metrics.claims(checkpoint.len());
            prepared
        };
        prepared.devices.iter().map(|device| self.named(&state, device)).collect()
    }

    async fn read(&self, asked: &Claim) -> Result<serde_json::Value> {
        let (namespace, name) = (asked.namespace.clone(), asked.name.clone());
        let api_server = Arc::clone(&self.api_server);
        let found = tokio::task::spawn_blocking(move || {
            let version = api_version(&api_server)?.as_str();
            let path =
                format!("/apis/resource.k8s.io/{version}/namespaces/{namespace}/resourceclaims/{name}");
            api_server.get(&path, &[])
        });
        found
            .await
            .or_fail(Code::Internal, || "a thread has ended early")?
            .map_err(|error| {
                error.fix("let the plugin's account `get` `resourceclaims` (the chart: dra.enabled=true)")
            })?
            .ok_or("the API server has no such claim")
            .or_fail(Code::BadRequest, || "the claim is gone")
    }

    /// What the kubelet tells the container runtime. A device that is not there any more would be one that no runtime finds.
    fn named(&self, state: &State, device: &Device) -> Result<dra::Device> {
        let there =
            state.device(&device.uuid).ok_or("the GPU does not answer, or MIG devices were made anew");
        let there = there.or_fail(Code::GpuLost, || format!("{} is not there any more", device.name));
        let there =
            there.map_err(|error| error.fix("delete the pod: another device can be allocated then"))?;
        Ok(dra::Device {
            request_names: vec![request_name(&device.request).into()],
            pool_name: self.node.clone(),
            device_name: device.name.clone(),
            cdi_device_ids: response::cdi_names(&[state.options.ids.name(there)], &state.options.shape),
        })
    }
}

/// The kubelet knows a request by its own name, without that of the alternative that the scheduler has chosen: `gpu/large`.
fn request_name(request: &str) -> &str {
    request.split_once('/').map_or(request, |(name, _)| name)
}

/// A device by its name in the pool. Who watches over devices may have one that is not well.
fn device(state: &State, allocated: claim::Allocated) -> Result<Device> {
    let is_it = |device: &Selected<'_>| slice::name(*device) == allocated.device;
    let found = slice::offered(state).find(is_it);
    let found = found.or_else(|| slice::all(state).find(is_it).filter(|_| allocated.admin));
    let found = found
        .ok_or("it is not well, or it is none of the GPUs and MIG devices any more that the scheduler knew");
    let found =
        found.or_fail(Code::GpuLost, || format!("{} cannot be given to the claim", allocated.device))?;
    Ok(Device {
        request: allocated.request,
        name: allocated.device,
        uuid: found.uuid().into(),
        gpu: found.gpu.uuid.clone(),
        admin: allocated.admin,
    })
}

#[tonic::async_trait]
impl DraPlugin for Claims {
    async fn node_prepare_resources(
        &self,
        request: Request<NodePrepareResourcesRequest>,
    ) -> Result<Response<NodePrepareResourcesResponse>, Status> {
        let mut response = NodePrepareResourcesResponse::default();
        for claim in request.into_inner().claims {
            let started = Instant::now();
            let prepared = self.prepare(&claim).await;
            self.metrics.allocation(DRIVER, prepared.is_ok(), started.elapsed());
            let answer = match prepared {
                Ok(devices) => NodePrepareResourceResponse { devices, error: String::new() },
                Err(error) => {
                    let error = error
                        .context(format!("the claim {}/{} is not prepared", claim.namespace, claim.name));
                    tracing::warn!("{error}");
                    NodePrepareResourceResponse { devices: Vec::new(), error: error.to_string() }
                }
            };
            response.claims.insert(claim.uid, answer);
        }
        Ok(Response::new(response))
    }

    async fn node_unprepare_resources(
        &self,
        request: Request<NodeUnprepareResourcesRequest>,
    ) -> Result<Response<NodeUnprepareResourcesResponse>, Status> {
        let mut response = NodeUnprepareResourcesResponse::default();
        let mut checkpoint = self.checkpoint.lock().await;
        for claim in request.into_inner().claims {
            let error = checkpoint.take_back(&claim.uid).err().map(|error: Error| {
                let error =
                    error.context(format!("the claim {}/{} is prepared still", claim.namespace, claim.name));
                tracing::warn!("{error}");
                error.to_string()
            });
            let answer = NodeUnprepareResourceResponse { error: error.unwrap_or_default() };
            response.claims.insert(claim.uid, answer);
        }
        self.metrics.claims(checkpoint.len());
        Ok(Response::new(response))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_known_by_its_own_name() {
        assert_eq!([request_name("gpu"), request_name("gpu/large")], ["gpu", "gpu"]);
    }
}
