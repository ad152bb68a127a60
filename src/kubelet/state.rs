//! What the node offers at a time, and every answer that follows from it.

use crate::{
    api::device_plugin::{ContainerAllocateResponse, Device, ListAndWatchResponse, NumaNode, TopologyInfo},
    config::Options,
    mps::Place,
    resources::{Resource, Shared, SharingStrategy},
    response,
};
use gpurun::{
    error::{Code, Error, Result},
    inventory::Inventory,
    plan::{self, Policy, Selected},
    request::{DeviceId, DeviceRequest, DeviceSelection, GpuFilter},
};
use std::collections::{BTreeMap, BTreeSet};

/// Everything that answers depend on.
#[derive(Debug)]
pub struct State {
    /// What the administrator set.
    pub options: Options,
    /// The rules of gpurun's own configuration.
    pub policy: Policy,
    /// What the host has.
    pub inventory: Inventory,
    /// What is offered of it.
    pub resources: Vec<Resource>,
    /// UUIDs of devices that must not be given out, and why.
    pub unhealthy: BTreeMap<String, String>,
}

impl State {
    /// The resource of this name, if it is offered.
    pub fn resource(&self, name: &str) -> Option<&Resource> {
        self.resources.iter().find(|resource| resource.name == name)
    }

    /// A GPU or MIG device that is there, by its UUID.
    pub fn device(&self, uuid: &str) -> Option<Selected<'_>> {
        self.inventory.gpus.iter().find_map(|gpu| {
            let mig = gpu.mig_devices.iter().find(|part| part.uuid == uuid);
            (gpu.uuid == uuid || mig.is_some()).then_some(Selected { gpu, mig })
        })
    }

    /// The kubelet's list.
    pub fn list(&self, resource: &Resource) -> ListAndWatchResponse {
        let devices = resource.ids().map(|(id, device)| Device {
            id,
            health: if self.unhealthy.contains_key(&device.uuid) { "Unhealthy" } else { "Healthy" }.into(),
            topology: device.numa_node.map(|node| TopologyInfo { nodes: vec![NumaNode { id: node.into() }] }),
        });
        ListAndWatchResponse { devices: devices.collect() }
    }

    /// What a container gets with these of the kubelet's ids.
    ///
    /// # Errors
    /// [`Code::UnknownGpu`], [`Code::NotAllowed`] for too many replicas, [`Code::GpuLost`] for a device that is not healthy, and
    /// those of the plan.
    pub fn allocate(&self, resource: &Resource, ids: &[String]) -> Result<ContainerAllocateResponse> {
        let mut seen = BTreeSet::new();
        let mut uuids = Vec::new();
        for id in ids {
            let uuid = &resource.device(id)?.uuid;
            if seen.insert(uuid) {
                uuids.push(uuid);
            }
        }
        let one_alone = self.options.sharing.fail_requests_greater_than_one.unwrap_or(false);
        if resource.shared.is_some() && ids.len() > 1 && one_alone {
            return Err(Error::new(
                Code::NotAllowed,
                format!("{} of {} are asked for, and one is allowed", ids.len(), resource.name),
            )
            .cause(match self.options.sharing.by {
                SharingStrategy::TimeSlicing => {
                    "replicas of a shared GPU are no more of it than one, and failRequestsGreaterThanOne is set"
                }
                SharingStrategy::Mps => "an MPS control daemon gives a program one part of one GPU",
            })
            .fix("ask for one"));
        }
        for uuid in &uuids {
            if let Some(why) = self.unhealthy.get(*uuid) {
                return Err(Error::new(Code::GpuLost, format!("{uuid} is not given out: {why}")));
            }
        }
        let request = DeviceRequest {
            selection: DeviceSelection::Ids(
                uuids.iter().map(|uuid| DeviceId::Uuid((*uuid).clone())).collect(),
            ),
            filter: GpuFilter::default(),
            capabilities: None,
            requirements: Vec::new(),
            image_cuda: None,
            disable_require: false,
            features: self.options.shape.features.clone(),
            imex_channels: self.options.shape.imex_channels.clone(),
        };
        let injection = plan::plan(&self.inventory, &request, &self.policy)?;
        let selected = plan::select(&self.inventory, &request, self.policy.supported_capabilities)?;
        let names: Vec<String> = selected.iter().map(|device| self.options.ids.name(*device)).collect();
        let mut response = response::response(&injection, &names, &self.options.shape);
        if let (Some(Shared { by: SharingStrategy::Mps, .. }), [uuid]) = (resource.shared, &uuids[..]) {
            Place::of(&self.options.mps_root, uuid).join(&mut response);
        }
        Ok(response)
    }
}
