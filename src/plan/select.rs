//! From the names of GPUs to the GPUs.

use crate::{
    error::{Code, Error, Result},
    inventory::{Denial, DeviceNode, Gpu, Inventory, MigDevice, Problem},
    request::{DeviceId, DeviceRequest, DeviceSelection, GpuFilter},
    vocabulary::{DriverCapability, GatedFeature},
};
use std::fmt;

/// A device that a container gets: a GPU, or a MIG device of it.
#[derive(Debug, Clone, Copy)]
pub struct Selected<'a> {
    /// The GPU.
    pub gpu: &'a Gpu,
    /// The part of it, if it is not the whole.
    pub mig: Option<&'a MigDevice>,
}

impl Selected<'_> {
    /// The GPU's or the MIG device's.
    pub fn uuid(&self) -> &str {
        self.mig.map_or(&self.gpu.uuid, |mig| &mig.uuid)
    }

    /// By which a user would ask for it.
    pub fn id(&self) -> DeviceId {
        self.mig.map_or(DeviceId::Index(self.gpu.index), |mig| DeviceId::Mig(self.gpu.index, mig.index))
    }

    fn has(&self, filter: &GpuFilter) -> bool {
        let memory = self.mig.map_or(self.gpu.memory, |mig| mig.memory);
        filter.arch.as_ref().is_none_or(|least| self.gpu.compute_capability >= *least)
            && filter.memory.is_none_or(|least| memory >= least)
    }

    fn is(&self, other: &Selected<'_>) -> bool {
        self.id() == other.id()
    }
}

impl fmt::Display for Selected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.id())?;
        // NVML does not know every name.
        let what = self.mig.map_or(&self.gpu.name, |mig| &mig.profile);
        if !what.is_empty() {
            write!(f, "{what}, ")?;
        }
        write!(f, "{})", self.uuid())
    }
}

/// The devices that are asked for, in the order in which they were, each once. Never fewer than were asked for:
/// a program that misses a GPU falls back to the CPU in silence.
pub fn select<'a>(
    inventory: &'a Inventory,
    request: &DeviceRequest,
    capabilities: DriverCapability,
) -> Result<Vec<Selected<'a>>> {
    match &request.selection {
        DeviceSelection::DriverOnly => Ok(Vec::new()),
        DeviceSelection::All => all(inventory, &request.filter),
        DeviceSelection::Count(count) => {
            let mut fitting = fitting(inventory, &request.filter);
            let count = usize::try_from(*count).unwrap_or(usize::MAX);
            if fitting.len() < count {
                return Err(too_few(inventory, &request.filter, count, fitting.len()));
            }
            fitting.truncate(count);
            Ok(fitting)
        }
        DeviceSelection::Ids(ids) => {
            let whole_mig_gpu = !capabilities.contains(DriverCapability::COMPUTE)
                || request.features.contains(&GatedFeature::MigConfig)
                || request.features.contains(&GatedFeature::MigMonitor);
            named(inventory, ids, whole_mig_gpu)
        }
    }
}

/// The devices of these names, each once; whether a GPU in MIG mode may be one.
pub fn named<'a>(
    inventory: &'a Inventory,
    ids: &[DeviceId],
    whole_mig_gpu: bool,
) -> Result<Vec<Selected<'a>>> {
    let mut selected: Vec<Selected<'_>> = Vec::new();
    for id in ids {
        let device = one(inventory, id)?;
        if let Some(error) = closed(inventory, device) {
            return Err(error);
        }
        if device.mig.is_none() && device.gpu.mig_enabled && !whole_mig_gpu {
            return Err(mig_parent(device));
        }
        if !selected.iter().any(|before| before.is(&device)) {
            selected.push(device);
        }
    }
    Ok(selected)
}

/// The devices that the caller can use: all devices except those with nodes that the caller may not open.
fn usable(inventory: &Inventory) -> impl Iterator<Item = Selected<'_>> {
    present(inventory).filter(|device| closed_node(inventory, *device).is_none())
}

/// The node of a device that the caller may not open.
fn closed_node<'a>(inventory: &'a Inventory, device: Selected<'a>) -> Option<(&'a DeviceNode, Denial)> {
    let capabilities = device.mig.into_iter().flat_map(|mig| &mig.cap_nodes);
    std::iter::once(&device.gpu.node)
        .chain(capabilities)
        .find_map(|node| Some((node, *inventory.closed.get(&node.path.0)?)))
}

/// The error for a device that the caller may not open; `None` for other devices.
pub fn closed(inventory: &Inventory, device: Selected<'_>) -> Option<Error> {
    let (node, denial) = closed_node(inventory, device)?;
    Some(denied(format!("GPU {} cannot be opened", device.id()), node, denial))
}

/// The error for a device node that the caller may not open.
pub(super) fn denied(what: String, node: &DeviceNode, denial: Denial) -> Error {
    let path = node.path.0.display();
    let error = Error::new(Code::NotAllowed, what);
    match denial {
        Denial::DeviceCgroup => error
            .cause(format!("{path}: the device cgroup of this process does not allow it, as in a batch job that has other GPUs"))
            .fix("ask for a GPU that the job has (`gpurun ls`), or ask the batch system for more GPUs"),
        Denial::Permissions => error
            .cause(format!("{path}: permission denied: its mode is {:04o}, its owner {}:{}", node.mode, node.uid, node.gid))
            .fix(format!("let the caller open it: `usermod -aG GROUP USER` with the node's group, or `chmod 0666 {path}`")),
    }
}

/// The usable devices: every GPU that is not in MIG mode, and every MIG device.
fn present(inventory: &Inventory) -> impl Iterator<Item = Selected<'_>> {
    inventory.gpus.iter().flat_map(|gpu| {
        let whole = (!gpu.mig_enabled).then_some(Selected { gpu, mig: None });
        let parts = gpu.mig_devices.iter().filter(|_| gpu.mig_enabled);
        whole.into_iter().chain(parts.map(move |mig| Selected { gpu, mig: Some(mig) }))
    })
}

/// Every device that a program can compute on; one at least.
pub(super) fn all<'a>(inventory: &'a Inventory, filter: &GpuFilter) -> Result<Vec<Selected<'a>>> {
    let fitting = fitting(inventory, filter);
    if fitting.is_empty() { Err(too_few(inventory, filter, 1, 0)) } else { Ok(fitting) }
}

fn fitting<'a>(inventory: &'a Inventory, filter: &GpuFilter) -> Vec<Selected<'a>> {
    usable(inventory).filter(|device| device.has(filter)).collect()
}

/// The one device that `id` names.
fn one<'a>(inventory: &'a Inventory, id: &DeviceId) -> Result<Selected<'a>> {
    let whole = inventory.gpus.iter().map(|gpu| Selected { gpu, mig: None });
    let parts = inventory
        .gpus
        .iter()
        .flat_map(|gpu| gpu.mig_devices.iter().map(move |mig| Selected { gpu, mig: Some(mig) }));
    let mut all = whole.chain(parts);
    let found = match id {
        DeviceId::Index(_) | DeviceId::Mig(..) => all.find(|device| device.id() == *id),
        DeviceId::Pci(address) => all.find(|device| device.gpu.pci.eq_ignore_ascii_case(address)),
        DeviceId::Uuid(beginning) => {
            let fitting: Vec<_> = all.filter(|device| begins(device.uuid(), beginning)).collect();
            match fitting.as_slice() {
                [only] => Some(*only),
                [] => None,
                several => {
                    let whole = several.iter().find(|device| device.uuid().len() == beginning.len());
                    return whole.copied().ok_or_else(|| {
                        Error::new(Code::UnknownGpu, format!("{id} begins the UUID of more than one GPU"))
                            .cause(format!("it fits {}", list(several)))
                            .fix("write more of the UUID")
                    });
                }
            }
        }
    };
    found.ok_or_else(|| match inventory.problems.iter().find(|problem| concerns(problem, id)) {
        Some(problem) => error_of(problem),
        None => unknown(inventory, id),
    })
}

fn begins(whole: &str, beginning: &str) -> bool {
    whole.get(..beginning.len()).is_some_and(|start| start.eq_ignore_ascii_case(beginning))
}

/// Whether the problem is about the GPU that `id` names.
fn concerns(problem: &Problem, id: &DeviceId) -> bool {
    problem.subjects.iter().any(|subject| match (subject.parse::<DeviceId>(), id) {
        (Ok(DeviceId::Uuid(uuid)), DeviceId::Uuid(beginning)) => begins(&uuid, beginning),
        (Ok(DeviceId::Index(lost)), DeviceId::Mig(gpu, _)) => lost == *gpu,
        (Ok(subject), id) => subject == *id,
        (Err(_), _) => false,
    })
}

/// The problems that are about a GPU, whichever.
pub(super) fn lost_gpus(inventory: &Inventory) -> impl Iterator<Item = &Problem> {
    let names_gpu =
        |problem: &&Problem| problem.subjects.iter().any(|subject| subject.parse::<DeviceId>().is_ok());
    inventory.problems.iter().filter(names_gpu)
}

/// What a request for the part of the host that has this problem ends with.
pub(super) fn error_of(problem: &Problem) -> Error {
    let code = Code::ALL.iter().find(|code| code.to_string() == problem.code);
    Error::new(code.copied().unwrap_or(Code::GpuLost), problem.what.clone()).fix(problem.fix.clone())
}

fn unknown(inventory: &Inventory, id: &DeviceId) -> Error {
    let kind = if matches!(id, DeviceId::Mig(..)) { "MIG device" } else { "GPU" };
    let error = Error::new(Code::UnknownGpu, format!("there is no {kind} {id} on this host"));
    with_choices(error, inventory)
}

fn with_choices(error: Error, inventory: &Inventory) -> Error {
    let devices: Vec<_> = usable(inventory).collect();
    if devices.is_empty() {
        error.cause("the host has none that a container could use").fix("`gpurun doctor` says why")
    } else {
        error.cause(format!("the host has {}", list(&devices))).fix("ask for one of these, or for `all`")
    }
}

fn too_few(inventory: &Inventory, filter: &GpuFilter, asked: usize, found: usize) -> Error {
    let GpuFilter { arch, memory } = filter;
    let conditions = [
        arch.as_ref().map(|arch| format!("arch>={arch}")),
        memory.map(|bytes| format!("mem>={}MiB", bytes >> 20)),
    ];
    let conditions: Vec<_> = conditions.into_iter().flatten().collect();
    let with =
        if conditions.is_empty() { String::new() } else { format!(" with {}", conditions.join(" and ")) };
    let closed =
        present(inventory).filter(|device| device.has(filter)).find_map(|device| closed(inventory, device));
    let has = if found == 0 { "none".into() } else { format!("only {found}") };
    let what = match asked {
        1 => format!("a GPU{with} was asked for and the host has {has}"),
        _ => format!("{asked} GPUs{with} were asked for and the host has {has}"),
    };
    // A GPU that cannot be opened, or does not answer, is the likelier reason than a wrong number.
    if let Some(closed) = closed {
        let what = what.replace("the host has", "the caller may open");
        return closed.context(what);
    }
    match lost_gpus(inventory).next() {
        Some(problem) if conditions.is_empty() => error_of(problem).context(what),
        _ => {
            let error = Error::new(Code::UnknownGpu, what);
            // The nearest fix stays.
            let error =
                if found == 0 { error } else { error.fix(format!("ask for {found} or fewer, or for `all`")) };
            with_choices(error, inventory)
        }
    }
}

/// CUDA finds no device in a container that has the node of a GPU in MIG mode and none of its MIG devices.
fn mig_parent(device: Selected<'_>) -> Error {
    let parts: Vec<_> =
        device.gpu.mig_devices.iter().map(|mig| Selected { gpu: device.gpu, mig: Some(mig) }).collect();
    let error = Error::new(
        Code::UnknownGpu,
        format!("GPU {} is in MIG mode and cannot be used as a whole", device.id()),
    );
    if parts.is_empty() {
        error
            .cause("it has no MIG devices")
            .fix("make MIG devices with `nvidia-smi mig -cgi … -C`, or end MIG mode")
    } else {
        error.cause(format!("its MIG devices are {}", list(&parts))).fix("ask for one of these, or for `all`")
    }
}

fn list(devices: &[Selected<'_>]) -> String {
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
