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
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

/// gRPC's default limit on messages, in bytes, which the kubelet's client does not change.
const LONGEST_MESSAGE: usize = 4 << 20;
const UNHEALTHY: &str = "Unhealthy";

fn topology(device: &crate::resources::Device) -> Option<TopologyInfo> {
    device.numa_node.map(|node| TopologyInfo { nodes: vec![NumaNode { id: node.into() }] })
}

/// Everything that answers depend on.
#[derive(Debug)]
pub struct State {
    /// What the administrator set.
    pub options: Options,
    /// The policy of gpurun's configuration.
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
            health: if self.unhealthy.contains_key(&device.uuid) { UNHEALTHY } else { "Healthy" }.into(),
            topology: topology(device),
        });
        ListAndWatchResponse { devices: devices.collect() }
    }

    /// Checks that the device list of every resource fits in one gRPC message.
    ///
    /// # Errors
    /// [`Code::Config`] with the number of replicas that it can read.
    pub fn check_lists(&self) -> Result<()> {
        for resource in &self.resources {
            let devices = resource.devices.len();
            // The longest entry: an unhealthy device with the highest replica number.
            let entry = |device: &crate::resources::Device| {
                let entry = Device {
                    id: format!("{}::{}", device.uuid, resource.replicas()),
                    health: UNHEALTHY.into(),
                    topology: topology(device),
                };
                ListAndWatchResponse { devices: vec![entry] }.encoded_len()
            };
            let longest = resource.devices.iter().map(entry).max().unwrap_or(0);
            let replicas = usize::try_from(resource.replicas()).unwrap_or(usize::MAX);
            let size = devices.saturating_mul(replicas).saturating_mul(longest);
            if size > LONGEST_MESSAGE {
                let most = LONGEST_MESSAGE / (devices * longest);
                return Err(Error::new(
                    Code::Config,
                    format!(
                        "{} with {replicas} replicas of {devices} devices is more than the kubelet reads",
                        resource.name
                    ),
                )
                .cause(format!("the list has up to {size} bytes, and gRPC's limit is {LONGEST_MESSAGE}"))
                .fix(format!("set `replicas` to {most} or less in the plugin's configuration file")));
            }
        }
        Ok(())
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
        let one_alone = self.options.sharing.fail_requests_greater_than_one;
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
            .fix("request one in the pod: `nvidia.com/gpu.shared: 1`"));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{file::tests::time_slicing, tests::options},
        resources::{MigStrategy, resources, tests::inventory},
    };

    fn state(gpus: usize, replicas: u32) -> State {
        let mut inventory = inventory(&vec![&[][..]; gpus]);
        for gpu in &mut inventory.gpus {
            gpu.uuid = format!("GPU-{:08x}-0000-0000-0000-000000000000", gpu.index);
        }
        let sharing = time_slicing(&format!("{{resources: [{{name: gpu, replicas: {replicas}}}]}}"));
        State {
            options: options(&[], ""),
            policy: Policy::default(),
            resources: resources(&inventory, MigStrategy::None, &sharing).unwrap(),
            inventory,
            unhealthy: BTreeMap::new(),
        }
    }

    #[test]
    fn a_list_that_the_kubelet_cannot_read_is_refused_with_the_number_that_it_can() {
        assert!(state(8, 100).check_lists().is_ok());
        let error = state(8, u32::MAX).check_lists().unwrap_err();
        assert!(error.code() == Code::Config && error.to_string().contains("4194304"), "{error}");
        let error = state(8, 10_000).check_lists().unwrap_err();
        let most: u32 = error.fix_line().split_whitespace().find_map(|word| word.parse().ok()).unwrap();
        let most = state(8, most);
        assert!(most.check_lists().is_ok());
        let size = most.list(&most.resources[0]).encoded_len();
        assert!(size <= LONGEST_MESSAGE && size > LONGEST_MESSAGE * 9 / 10, "{size}");
    }
}
