//! What the kubelet asks of one resource.

use crate::{
    api::device_plugin::{
        AllocateRequest, AllocateResponse, ContainerPreferredAllocationResponse, DevicePluginOptions, Empty,
        ListAndWatchResponse, PreStartContainerRequest, PreStartContainerResponse,
        PreferredAllocationRequest, PreferredAllocationResponse, device_plugin_server::DevicePlugin,
    },
    metrics::Metrics,
    preference, registration,
    resources::Resource,
    state::State,
};
use gpurun::error::{Code, Error, Result};
use std::{pin::Pin, sync::Arc, time::Instant};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Request, Response, Status};

/// The service of a resource.
#[derive(Debug, Clone)]
pub struct Server {
    /// Which one.
    pub resource: String,
    /// The newest state; none is there while nothing is offered.
    pub state: watch::Receiver<Option<Arc<State>>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Server {
    fn state(&self) -> Result<Arc<State>, Status> {
        self.state.borrow().clone().ok_or_else(|| Status::unavailable("nothing is offered"))
    }

    fn resource<'a>(&self, state: &'a State) -> Result<&'a Resource, Status> {
        state
            .resource(&self.resource)
            .ok_or_else(|| Status::unavailable(format!("{} is not offered any more", self.resource)))
    }
}

fn status(error: &Error) -> Status {
    let text = error.to_string();
    match error.code() {
        Code::UnknownGpu | Code::NotAllowed => Status::invalid_argument(text),
        _ => Status::failed_precondition(text),
    }
}

#[tonic::async_trait]
impl DevicePlugin for Server {
    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(registration::options()))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let name = self.resource.clone();
        let mut last = None;
        let lists = WatchStream::new(self.state.clone())
            // Ends when the resource is not offered any more: the kubelet keeps what was given out, and gives out no more.
            .map_while(move |state| {
                state.as_deref().and_then(|state| Some(state.list(state.resource(&name)?)))
            })
            .filter(move |list| last.replace(list.clone()).as_ref() != Some(list));
        Ok(Response::new(Box::pin(lists.map(Ok))))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let state = self.state()?;
        let resource = self.resource(&state)?;
        let responses = request.into_inner().container_requests.into_iter().map(|one| {
            let ids = preference::preferred(
                &state.inventory,
                resource,
                state.options.shared_policy,
                &one.available_device_i_ds,
                &one.must_include_device_i_ds,
                usize::try_from(one.allocation_size).unwrap_or(0),
            );
            ContainerPreferredAllocationResponse { device_i_ds: ids }
        });
        Ok(Response::new(PreferredAllocationResponse { container_responses: responses.collect() }))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let started = Instant::now();
        let state = self.state()?;
        let resource = self.resource(&state)?;
        let containers = request.into_inner().container_requests;
        let responses: Result<Vec<_>> =
            containers.iter().map(|container| state.allocate(resource, &container.devices_ids)).collect();
        self.metrics.allocation(&self.resource, responses.is_ok(), started.elapsed());
        match responses {
            Ok(container_responses) => Ok(Response::new(AllocateResponse { container_responses })),
            Err(error) => {
                tracing::warn!("{error}");
                Err(status(&error))
            }
        }
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        Ok(Response::new(PreStartContainerResponse {}))
    }
}
