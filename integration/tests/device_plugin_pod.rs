//! gpurun-device-plugin as a pod: its image, the host's root under another name, the node's labels.

use gpurun_integration::{
    Caller, TestHost, description, dist,
    kubelet::{Kubelet, Plugin},
    must, project, run, temporary, until,
};
use std::{fs, process::Command};

const GPU: &str = "nvidia.com/gpu";

#[test]
fn what_the_pod_has_elsewhere_is_called_by_the_hosts_names() {
    let host = TestHost::new("t4");
    // The simulated host is the root of the node.
    let here = host.path().canonicalize().unwrap();
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let options =
        ["--container-driver-root", here.to_str().unwrap(), "--nvidia-cdi-hook-path=/opt/gpurun-hook"];
    let options = [&options[..], &["--device-list-strategy", "direct,cdi-cri"]].concat();
    let _plugin = Plugin::start(&host, &options);
    let inventory = run(host.gpurun().arg("inventory")).out;
    let gpu = gpurun::inventory::Inventory::from_json(inventory.as_bytes()).unwrap().gpus.remove(0).uuid;
    let said = kubelet.resource(GPU).allocate(&[&gpu]).unwrap();
    let devices: Vec<_> = said.devices.iter().map(|device| device.host_path.as_str()).collect();
    assert!(devices.contains(&"/dev/nvidia0") && devices.contains(&"/dev/nvidiactl"), "{devices:?}");
    let sources: Vec<_> = said.mounts.iter().map(|mount| mount.host_path.as_str()).collect();
    assert!(sources.iter().any(|path| path.ends_with("/libcuda.so.535.216.03")), "{sources:?}");
    let document = fs::read_to_string(here.join("cdi/k8s.device-plugin.nvidia.com-gpu.json")).unwrap();
    assert!(document.contains("\"/opt/gpurun-hook\""), "{document}");
    for text in [&*format!("{said:?}"), &document] {
        assert!(!text.contains(here.to_str().unwrap()), "{text}");
    }
}

#[test]
fn the_nodes_labels_follow_the_host() {
    let host = TestHost::new("a100-mig");
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let file = host.path().join("features.d/gpurun");
    let _plugin = Plugin::start(&host, &["--mig-strategy=mixed", "--labels-file", file.to_str().unwrap()]);
    kubelet.registration(GPU);
    let label = |name: &str| {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.map(String::from)
    };
    until("labels", || label("nvidia.com/mig-1g.5gb.count").as_deref() == Some("2"));
    assert_eq!(label("nvidia.com/gpu.product").as_deref(), Some("NVIDIA-A100-SXM4-40GB"));
    assert_eq!(label("nvidia.com/mig-1g.5gb.multiprocessors").as_deref(), Some("14"));
    assert_eq!(label("nvidia.com/mig.capable").as_deref(), Some("true"));

    let mut less = description("a100-mig");
    let minor = less.gpus[0].minor;
    let gone = less.gpus[0].mig.as_mut().unwrap().devices.remove(1);
    host.describe(&less);
    let [gpu_instance, compute_instance] = gone.cap_minors(minor);
    let capabilities = format!("proc/driver/nvidia/capabilities/gpu{minor}/mig/gi{}", gone.gpu_instance);
    fs::remove_dir_all(host.path().join(capabilities)).unwrap();
    for minor in [gpu_instance, compute_instance] {
        fs::remove_file(host.path().join(format!("dev/nvidia-caps/nvidia-cap{minor}"))).unwrap();
    }
    until("the other layout's labels", || label("nvidia.com/mig-1g.5gb.count").as_deref() == Some("1"));
    let names: Vec<_> =
        fs::read_dir(file.parent().unwrap()).unwrap().flatten().map(|it| it.file_name()).collect();
    assert_eq!(names, ["gpurun"], "node-feature-discovery reads every file of the directory");
}

/// The NVML reader is dynamic and finds its loader and its libraries in an image that has nothing else.
#[test]
fn the_plugins_image_is_made_of_its_programs_alone_and_they_run_in_it() {
    let made = temporary();
    let image = |name: &str| {
        let archive = made.path().join(name);
        let script = project().join("packaging/kubernetes/image");
        must(Command::new(script).arg("--dist").arg(dist("gpurun").parent().unwrap()).arg(&archive));
        archive
    };
    let (one, other) = (image("one.tar"), image("other.tar"));
    assert!(fs::read(&one).unwrap() == fs::read(other).unwrap(), "the same programs make the same image");
    let host = TestHost::new("t4");
    let reference = format!("oci-archive:{}", one.display());
    for (options, argument, says) in [
        ("", "--version", "gpurun-device-plugin "),
        ("--entrypoint /usr/bin/gpurun-nvml", "/nowhere/libnvidia-ml.so.1", "GPU-"),
        ("--entrypoint /usr/bin/gpurun-hook", "nothing", "gpurun-hook"),
    ] {
        let ended = run(&mut host.command(Caller::Root, options, &reference, &[argument]));
        assert!(format!("{}{}", ended.out, ended.err).contains(says), "{options}: {ended:?}");
    }
}
