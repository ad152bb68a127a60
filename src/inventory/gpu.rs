//! GPUs and MIG devices: NVML's facts, with the device nodes and what the kernel knows. A GPU that does not answer or has no
//! node costs itself, not the host.

use super::{
    mig::Minors,
    nvml, procfs,
    types::{DeviceNode, Fingerprint, Gpu, Host, MigDevice, Problem},
};
use crate::{error::Code, vocabulary::Version};
use std::path::Path;

/// The GPUs and what is wrong with the rest; every node that was looked for goes into the fingerprint.
pub fn assemble(
    host: &Host,
    facts: Vec<nvml::Gpu>,
    minors: &Minors,
    fingerprint: &mut Fingerprint,
) -> (Vec<Gpu>, Vec<Problem>) {
    let mut gpus = Vec::new();
    let mut problems = Vec::new();
    let mut lost = Vec::new();
    for gpu in facts {
        match gpu {
            nvml::Gpu::Lost(gpu) => lost.push(gpu),
            nvml::Gpu::Answers(facts) => {
                let path = format!("/dev/nvidia{}", facts.minor);
                match node(host, &path, fingerprint) {
                    Some(node) => {
                        gpus.push(answering(host, *facts, node, minors, fingerprint, &mut problems));
                    }
                    None => problems.push(Problem {
                        code: Code::DeviceNodeMissing.to_string(),
                        subjects: vec![facts.index.to_string(), facts.uuid, facts.pci],
                        what: format!(
                            "GPU {} has no device node {}",
                            facts.index,
                            host.device_path(Path::new(&path)).0.display()
                        ),
                        fix: format!("make it with `nvidia-modprobe -c {}`", facts.minor),
                    }),
                }
            }
        }
    }
    identify(host, &gpus, &problems, &mut lost);
    problems.extend(lost.into_iter().map(|gpu| Problem {
        code: Code::GpuLost.to_string(),
        what: format!("GPU {} does not answer: {}", gpu.index, gpu.words),
        subjects: [Some(gpu.index.to_string()), gpu.uuid, gpu.pci].into_iter().flatten().collect(),
        fix: "look for NVRM and Xid messages in `dmesg`; reset it with `nvidia-smi -r` or reboot, and ask for another GPU until then".into(),
    }));
    (gpus, problems)
}

/// The node, noted in the fingerprint whether or not it is there.
pub fn node(host: &Host, container_path: &str, fingerprint: &mut Fingerprint) -> Option<DeviceNode> {
    let path = Path::new(container_path);
    let node = host.device_node(path);
    let numbers = node.as_ref().map(|node| (node.major, node.minor));
    fingerprint.nodes.insert(host.device_path(path).0, numbers);
    node
}

fn answering(
    host: &Host,
    facts: nvml::AnsweringGpu,
    node: DeviceNode,
    minors: &Minors,
    fingerprint: &mut Fingerprint,
    problems: &mut Vec<Problem>,
) -> Gpu {
    // A MIG device cannot be opened if its guard has no node.
    let mig_devices = facts
        .mig_devices
        .into_iter()
        .filter_map(|mig| match cap_nodes(host, facts.minor, &mig, minors, fingerprint) {
            Ok(cap_nodes) => Some(MigDevice {
                index: mig.index,
                uuid: mig.uuid,
                gpu_instance: mig.gpu_instance,
                compute_instance: mig.compute_instance,
                profile: mig.profile.unwrap_or_default(),
                memory: mig.memory.unwrap_or_default(),
                resources: mig.resources,
                cap_nodes,
            }),
            Err(instance) => {
                problems.push(Problem {
                    code: Code::DeviceNodeMissing.to_string(),
                    subjects: vec![format!("{}:{}", facts.index, mig.index), mig.uuid],
                    what: format!(
                        "MIG device {}:{} has no device node for its instance {instance}",
                        facts.index, mig.index
                    ),
                    fix: format!(
                        "make it with `nvidia-modprobe -f /proc/driver/nvidia/capabilities/{instance}/access`"
                    ),
                });
                None
            }
        })
        .collect();
    let numa = procfs::read(&host.sys.join("bus/pci/devices").join(&facts.pci).join("numa_node"));
    let (major, minor) = facts.compute_capability.unwrap_or_default();
    Gpu {
        index: facts.index,
        minor: facts.minor,
        uuid: facts.uuid,
        dri_nodes: host.dri_nodes(&facts.pci),
        // -1 where the firmware tells none.
        numa_node: numa.and_then(|text| text.parse().ok()),
        pci: facts.pci,
        name: facts.name.unwrap_or_default(),
        brand: facts.brand.unwrap_or_else(|| "unknown".into()),
        architecture: facts.architecture.unwrap_or_else(|| "Unknown".into()),
        compute_capability: Version::of(major, minor),
        memory: facts.memory.unwrap_or_default(),
        persistence: facts.persistence,
        node,
        mig_capable: facts.mig_capable,
        mig_enabled: facts.mig_enabled,
        mig_devices,
        nvlinks: facts.nvlinks,
        topology: facts.topology,
        clique: facts.clique,
        vgpu: facts.vgpu,
    }
}

/// The nodes that guard the GPU instance and the compute instance, or the instance that has none.
fn cap_nodes(
    host: &Host,
    gpu_minor: u32,
    mig: &nvml::MigDevice,
    minors: &Minors,
    fingerprint: &mut Fingerprint,
) -> Result<Vec<DeviceNode>, String> {
    let (gi, ci) = (mig.gpu_instance, mig.compute_instance);
    let instance = format!("gpu{gpu_minor}/mig/gi{gi}");
    let both = [
        (minors.gpu_instance(gpu_minor, gi), instance.clone()),
        (minors.compute_instance(gpu_minor, gi, ci), format!("{instance}/ci{ci}")),
    ];
    both.into_iter()
        .map(|(minor, instance)| {
            let path = minor.map(|minor| format!("/dev/nvidia-caps/nvidia-cap{minor}"));
            path.and_then(|path| node(host, &path, fingerprint)).ok_or(instance)
        })
        .collect()
}

/// Names a lost GPU by exclusion where NVML cannot: if all but one of the module's GPUs are accounted for, it is that one.
fn identify(host: &Host, gpus: &[Gpu], problems: &[Problem], lost: &mut [nvml::LostGpu]) {
    let known = |pci: &String| {
        gpus.iter().any(|gpu| gpu.pci == *pci)
            || problems.iter().any(|problem| problem.subjects.contains(pci))
    };
    let mut rest: Vec<_> =
        procfs::module_gpus(&host.proc).into_iter().filter(|gpu| !known(&gpu.pci)).collect();
    if let ([lost], Some(only), true) = (lost, rest.pop(), rest.is_empty()) {
        lost.uuid = lost.uuid.take().or(only.uuid);
        lost.pci = lost.pci.take().or(Some(only.pci));
    }
}
