//! What one GPU, MIG device or feature needs: its device nodes.

use super::{DevicePart, File, Mount, Selected, Symlink};
use crate::{
    error::{Code, Error, Result},
    inventory::{ContainerPath, DeviceNode, Driver},
    vocabulary::{DriverCapability, GatedFeature},
};
use std::path::Path;

/// The capabilities that draw: they need DRM's nodes, too.
const DRAWING: DriverCapability = DriverCapability::DISPLAY.union(DriverCapability::GRAPHICS);

/// What makes the nodes of a gated feature.
fn remedy(feature: GatedFeature) -> (&'static str, &'static str) {
    match feature {
        GatedFeature::Gds => ("GPUDirect Storage", "load its module: `modprobe nvidia-fs`"),
        GatedFeature::Mofed => ("InfiniBand verbs", "load their modules: `modprobe -a ib_uverbs rdma_ucm`"),
        GatedFeature::NvSwitch => {
            ("NVSwitch", "leave out NVIDIA_NVSWITCH: only the fabric manager of an NVSwitch host needs it")
        }
        GatedFeature::GdrCopy => ("GDRCopy", "load its module: `modprobe gdrdrv`"),
        GatedFeature::Imex => (
            "IMEX",
            "have the driver make channels: its module's parameter NVreg_CreateImexChannel0=1 makes channel 0",
        ),
        GatedFeature::MigConfig => (
            "MIG configuration",
            "run `nvidia-modprobe -f /proc/driver/nvidia/capabilities/mig/config` as root",
        ),
        GatedFeature::MigMonitor => (
            "MIG monitoring",
            "run `nvidia-modprobe -f /proc/driver/nvidia/capabilities/mig/monitor` as root",
        ),
    }
}

/// The part of one GPU or MIG device.
pub fn device(selected: Selected<'_>, capabilities: DriverCapability) -> DevicePart {
    let gpu = selected.gpu;
    let mut part = DevicePart { nodes: vec![gpu.node.clone()], ..DevicePart::default() };
    match selected.mig {
        // A MIG device is opened through its GPU's node by who can open the two capability nodes; it does not draw.
        Some(mig) => part.nodes.extend(mig.cap_nodes.iter().cloned()),
        None if capabilities.intersects(DRAWING) => {
            for node in &gpu.dri_nodes {
                part.symlinks.extend(by_path(&gpu.pci, node));
                part.nodes.push(node.clone());
            }
        }
        None => {}
    }
    part
}

/// udev's link from a GPU's PCI address to one of its DRM nodes. There is no udev in a container.
fn by_path(pci: &str, node: &DeviceNode) -> Option<Symlink> {
    let name = node.container_path.0.file_name()?.to_str()?;
    let kind = if name.starts_with("card") {
        "card"
    } else if name.starts_with("renderD") {
        "render"
    } else {
        return None;
    };
    let link = ContainerPath(format!("/dev/dri/by-path/pci-{pci}-{kind}").into());
    Some(Symlink { link, target: Path::new("..").join(name) })
}

/// The part of a feature that the container asked for by name.
pub fn feature(driver: &Driver, feature: GatedFeature) -> Result<DevicePart> {
    let nodes: Vec<_> = gated(driver, feature).cloned().collect();
    if nodes.is_empty() {
        let (name, fix) = remedy(feature);
        return Err(Error::new(
            Code::DeviceNodeMissing,
            format!("the container asks for {name} and the host has no device node of it"),
        )
        .fix(fix));
    }
    let mounts = driver
        .gated_files
        .iter()
        .filter(|file| file.feature == feature)
        .map(|file| Mount { source: file.path.clone(), target: file.container_path.clone(), daemon: None })
        .collect();
    Ok(DevicePart { nodes, symlinks: Vec::new(), mounts })
}

/// What a feature offers to engines that choose later: IMEX its channels one by one, and each feature all that it has.
///
/// # Errors
/// [`Code::DeviceNodeMissing`] if the host has nothing of it.
pub fn offers(driver: &Driver, asked: GatedFeature) -> Result<Vec<(String, DevicePart)>> {
    let all = feature(driver, asked)?;
    let channel = |node: &DeviceNode| {
        let name = node.container_path.0.file_name()?.to_str()?.strip_prefix("channel")?.to_owned();
        Some((name, DevicePart { nodes: vec![node.clone()], ..DevicePart::default() }))
    };
    let mut offers: Vec<_> = match asked {
        GatedFeature::Imex => all.nodes.iter().filter_map(channel).collect(),
        _ => Vec::new(),
    };
    offers.push(("all".into(), all));
    Ok(offers)
}

/// The part of one IMEX channel.
pub fn imex_channel(driver: &Driver, channel: u32) -> Result<DevicePart> {
    let name = format!("channel{channel}");
    let called =
        |node: &&DeviceNode| node.container_path.0.file_name().is_some_and(|file| file == name.as_str());
    let node = gated(driver, GatedFeature::Imex).find(called).ok_or_else(|| {
        Error::new(
            Code::DeviceNodeMissing,
            format!("the container asks for IMEX channel {channel} and the host has no /dev/nvidia-caps-imex-channels/{name}"),
        )
        .fix(remedy(GatedFeature::Imex).1)
    })?;
    Ok(DevicePart { nodes: vec![node.clone()], ..DevicePart::default() })
}

fn gated(driver: &Driver, feature: GatedFeature) -> impl Iterator<Item = &DeviceNode> {
    driver.gated_nodes.iter().filter(move |(gate, _)| *gate == feature).map(|(_, node)| node)
}

/// [`profile`] of the GPUs that are selected, for who draws.
pub(super) fn application_profile(selected: &[Selected<'_>], capabilities: DriverCapability) -> Option<File> {
    let minors = selected.iter().map(|device| device.gpu.minor);
    capabilities.intersects(DRAWING).then(|| profile(minors))?
}

/// Tells the driver's EGL which GPUs it may use, as a bit for each minor number: it finds every GPU of the host and
/// fails on the first whose node it cannot open. (Application profiles: chapter of that name in the driver's README.)
pub fn profile(minors: impl Iterator<Item = u32>) -> Option<File> {
    let mask = minors.filter_map(|minor| 1u64.checked_shl(minor)).fold(0, std::ops::BitOr::bitor);
    (mask != 0).then(|| File {
        path: ContainerPath("/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf".into()),
        content: format!(
            "{{\"profiles\":[{{\"name\":\"_container_\",\"settings\":[\"EGLVisibleDGPUDevices\",{mask:#x}]}}],\
             \"rules\":[{{\"pattern\":[],\"profile\":\"_container_\"}}]}}\n"
        ),
    })
}
