//! Decides what a container gets. Touches nothing: no file, no clock, no environment.
//!
//! ```text
//!  request ─► policy (which capabilities) ─► select (which GPUs) ─► requirement, cuda (will it run)
//!                                                                     │
//!                        Injection ◄─ driver (shared) + device (each) ◄┘
//! ```
#![forbid(unsafe_code)]

pub mod cuda;
pub mod device;
pub mod driver;
pub mod forward_compat;
mod injection;
mod platform;
mod policy;
mod requirement;
mod select;
pub use injection::*;
pub use platform::platform;
pub use policy::Policy;
pub use select::{Selected, closed, named, select};

use crate::{
    error::Result,
    inventory::{DeviceNode, Inventory},
    request::{DeviceRequest, DeviceSelection, GpuFilter},
    vocabulary::{DriverCapability, EnvVar, GatedFeature},
};
use cuda::Verdict;

/// Everything that the container gets. Fails where it would get less than was asked for, or could not use it.
pub fn plan(inventory: &Inventory, request: &DeviceRequest, policy: &Policy) -> Result<Injection> {
    let driver = &inventory.driver;
    let capabilities = policy.capabilities(request)?;
    let selected = select(inventory, request, capabilities)?;
    // First: a driver that lacks half of itself does not know its CUDA either.
    let mut injection = driver::shared(inventory, capabilities)?;
    let forward =
        policy.forward_compat && selected.iter().all(|device| cuda::takes_forward_compat(&device.gpu.brand));

    let mut warnings = Vec::new();
    let mut needed_for = None;
    if !(request.disable_require || policy.disable_require) {
        requirement::check(&request.requirements, driver, &selected)?;
        let image_cuda =
            request.image_cuda.as_ref().filter(|_| capabilities.contains(DriverCapability::COMPUTE));
        if let Some(image) = image_cuda {
            match cuda::verdict(image, &driver.cuda, forward) {
                Verdict::Fine => {}
                Verdict::MinorVersion => {
                    warnings.push(cuda::minor_version_warning(image, &driver.version, &driver.cuda));
                }
                Verdict::ForwardCompat => needed_for = Some(image.clone()),
                Verdict::Refusal => return Err(cuda::too_new(image, &driver.version, &driver.cuda)),
            }
        }
    }

    for device in &selected {
        injection.add(device::device(*device, capabilities));
    }
    for feature in &request.features {
        policy.allow(*feature)?;
        injection.add(device::feature(driver, *feature)?);
    }
    for channel in &request.imex_channels {
        injection.add(device::imex_channel(driver, *channel)?);
    }
    injection.files.extend(device::application_profile(&selected, capabilities));
    injection.env = environment(request, &selected);
    // Offered whenever it could help and not only where it must: the image's requirement may hold just because the
    // image brings its own libraries, and a newer minor version of them is wanted, too.
    injection.forward_compat = (forward && capabilities.contains(DriverCapability::COMPUTE))
        .then(|| ForwardCompat { driver: driver.version.clone(), cuda: driver.cuda.clone(), needed_for });
    if request.selection == DeviceSelection::All {
        // A lost GPU costs itself and not the host, but nobody should wonder where it is.
        warnings.extend(select::lost_gpus(inventory).map(|lost| format!("{}; {}", lost.what, lost.fix)));
    }
    injection.warnings = warnings;
    Ok(injection)
}

/// Whether there is anything on the host that a program can compute on.
pub fn has_devices(inventory: &Inventory) -> bool {
    select::all(inventory, &GpuFilter::default()).is_ok()
}

/// What a container could get, shared and for each device apart: for engines that choose later.
#[derive(Debug)]
pub struct Parts<'a> {
    /// What every container gets that has any device.
    pub shared: Injection,
    /// The devices that a container can compute on, and the part of each.
    pub devices: Vec<(Selected<'a>, DevicePart)>,
}

/// The parts of every device of the host.
///
/// # Errors
/// [`crate::error::Code::UnknownGpu`] where there is none, and those of a driver that lacks something.
pub fn parts(inventory: &Inventory, capabilities: DriverCapability) -> Result<Parts<'_>> {
    let mut shared = driver::shared(inventory, capabilities)?;
    let selected = select::all(inventory, &GpuFilter::default())?;
    let driver = &inventory.driver;
    // Whoever reads the variable after this must not inject a second time.
    shared.env = vec![("NVIDIA_VISIBLE_DEVICES".into(), "void".into())];
    shared.forward_compat =
        selected.iter().all(|device| cuda::takes_forward_compat(&device.gpu.brand)).then(|| ForwardCompat {
            driver: driver.version.clone(),
            cuda: driver.cuda.clone(),
            needed_for: None,
        });
    shared.warnings =
        select::lost_gpus(inventory).map(|lost| format!("{}; {}", lost.what, lost.fix)).collect();
    let part = |device| (device, device::device(device, capabilities));
    Ok(Parts { shared, devices: selected.into_iter().map(part).collect() })
}

/// What a container gets that manages the host's GPUs and makes MIG devices of them: the driver, these nodes of its, which are all
/// that there are, and the IMEX channels.
///
/// # Errors
/// Those of a driver that lacks something.
pub fn management(inventory: &Inventory, nodes: Vec<DeviceNode>) -> Result<Injection> {
    let mut injection = driver::shared(inventory, DriverCapability::all() - DriverCapability::COMPAT32)?;
    injection.env = vec![("NVIDIA_VISIBLE_DEVICES".into(), "void".into())];
    let channels = inventory.driver.gated_nodes.iter().filter(|(feature, _)| *feature == GatedFeature::Imex);
    let nodes = nodes.into_iter().chain(channels.map(|(_, node)| node.clone())).collect();
    injection.add(DevicePart { nodes, ..DevicePart::default() });
    Ok(injection)
}

/// What Docker tells a container about its request. An image says `all` there, whatever was asked for.
fn environment(request: &DeviceRequest, selected: &[Selected<'_>]) -> Vec<EnvVar> {
    let names = |ids: &mut dyn Iterator<Item = String>| ids.collect::<Vec<_>>().join(",");
    let devices = match &request.selection {
        DeviceSelection::All if request.filter == GpuFilter::default() => "all".into(),
        DeviceSelection::DriverOnly => "none".into(),
        DeviceSelection::Ids(ids) => names(&mut ids.iter().map(ToString::to_string)),
        DeviceSelection::All | DeviceSelection::Count(_) => {
            names(&mut selected.iter().map(|device| device.id().to_string()))
        }
    };
    let capabilities = request.capabilities.map(|asked| {
        let text = if asked.is_all() { "all".into() } else { asked.names().join(",") };
        ("NVIDIA_DRIVER_CAPABILITIES".into(), text)
    });
    std::iter::once(("NVIDIA_VISIBLE_DEVICES".into(), devices)).chain(capabilities).collect()
}
