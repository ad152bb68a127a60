//! The CDI documents of whole hosts, from the files of real drivers to the last word: read the snapshots.

use gpurun::{
    formats::cdi::{ContainerEdits, Document},
    simulated_host::{Description, DriverFiles, SimulatedGpu},
};
use gpurun_integration::{TestHost, description, driver_packages, must, of_driver, run, temporary};
use serde::Serialize;
use std::{path::Path, process::Command};
use tempfile::TempDir;

/// Of the driver's files those that are in the smaller set of its packages, too.
const FILES: [&str; 9] = [
    "libcuda.so*",
    "libcudadebugger.so*",
    "libnvidia-gpucomp.so*",
    "libnvidia-ml.so*",
    "libnvidia-nvvm.so*",
    "libnvidia-pkcs11-openssl3.so*",
    "libnvidia-ptxjitcompiler.so*",
    "nvidia-smi",
    "*alternatives*",
];

/// The files of a real driver, moved by a script that runs in their directory.
fn driver(branch: u32, layout: &str, script: &str) -> TempDir {
    let dir = temporary();
    must(Command::new("cp").arg("-al").arg(driver_packages(branch, layout).join(".")).arg(dir.path()));
    let names: Vec<_> = FILES.iter().flat_map(|name| ["!", "-name", name]).collect();
    must(Command::new("find").arg(dir.path()).args(["-type", "f"]).args(names).arg("-delete"));
    must(Command::new("sh").args(["-ec", script]).current_dir(dir.path()));
    dir
}

/// Its document, a line for each thing in it; the host's directory is called HOST.
fn document(host: &TestHost) -> String {
    let words = ["cdi", "generate", "--hook", "/usr/bin/gpurun-hook", "--device-name-strategy"];
    let ways = ["index", "--device-name-strategy", "uuid", "--device-name-strategy", "type-index"];
    let text = must(host.gpurun().args(words).args(ways));
    let document = Document::parse(&text).unwrap();
    let mut lines = vec![format!("{} {}", document.cdi_version, document.kind)];
    for device in &document.devices {
        lines.push(format!("{}:", device.name));
        add(&mut lines, &device.container_edits);
    }
    lines.push("every device:".into());
    add(&mut lines, &document.container_edits);
    lines.join("\n").replace(host.path().to_str().unwrap(), "HOST")
}

fn add(lines: &mut Vec<String>, edits: &ContainerEdits) {
    fn each<T: Serialize>(lines: &mut Vec<String>, what: &str, all: &[T]) {
        lines.extend(all.iter().map(|one| format!("  {what} {}", serde_json::to_string(one).unwrap())));
    }
    each(lines, "env", &edits.env);
    each(lines, "node", &edits.device_nodes);
    each(lines, "mount", &edits.mounts);
    each(lines, "group", &edits.additional_gids);
    for hook in &edits.hooks {
        lines.push(format!("  hook {} {}", hook.hook_name, hook.path));
        each(lines, "  arg", &hook.args);
        // A number that is made of everything else, the host's directory among it.
        assert!(hook.env.len() == 1 && hook.env[0].starts_with("GPURUN_HOST="), "{hook:?}");
    }
}

/// Sixteen H200 as in two boards behind NVSwitches: NVML's order is that of PCI addresses, the kernel's that of probing.
fn sixteen() -> Description {
    let first = description("8xh100").gpus[0].clone();
    let gpu = |index: u32| SimulatedGpu {
        name: "NVIDIA H200".into(),
        uuid: format!("GPU-{index:08x}-2000-4000-8000-00000000141b"),
        minor: index ^ 5,
        pci: format!("0000:{:02x}:00.0", 0x10 + 0xb * index),
        memory: 150_754_820_096,
        numa_node: Some(index / 8),
        nvlinks: Vec::new(),
        ..first.clone()
    };
    Description { gpus: (0..16).map(gpu).collect(), ..of_driver("8xh100", 550) }
}

fn golden(name: &str, description: &Description, driver: &Path) {
    let host = TestHost::with(description, DriverFiles::Unpacked(driver));
    insta::assert_snapshot!(name, document(&host));
}

#[test]
fn sixteen_gpus_on_debians_driver_550() {
    golden("16xh200-550-debian", &sixteen(), driver(550, "debian", "").path());
}

#[test]
fn mig_devices_beside_a_whole_gpu_on_debians_driver_535() {
    golden("a100-mig-535-debian", &of_driver("a100-mig", 535), driver(535, "debian", "").path());
}

#[test]
fn a_driver_in_one_directory_for_libraries_as_red_hat_has_it() {
    let driver = driver(550, "flat", "mv usr/lib/x86_64-linux-gnu usr/lib64");
    golden("t4-550-usr-lib64", &of_driver("t4", 550), driver.path());
}

#[test]
fn a_driver_in_a_directory_of_its_own_as_nodes_in_the_cloud_have_it() {
    let script = "mkdir -p usr/local/nvidia; mv usr/lib/x86_64-linux-gnu usr/local/nvidia/lib64
                  mv usr/bin usr/local/nvidia/bin";
    golden("t4-535-usr-local-nvidia", &of_driver("t4", 535), driver(535, "flat", script).path());
}

#[test]
fn a_host_without_a_gpu_has_no_document() {
    let files = driver(550, "debian", "");
    let description = Description { gpus: Vec::new(), ..of_driver("t4", 550) };
    let host = TestHost::with(&description, DriverFiles::Unpacked(files.path()));
    let ended = run(host.gpurun().args(["cdi", "generate", "--hook", "/usr/bin/gpurun-hook"]));
    assert!(ended.code == 125 && ended.out.is_empty(), "{ended:?}");
    assert_eq!(
        ended.err,
        "error[GPU-0021]: no CDI document can be made\n  \
         cause: a GPU was asked for and the host has none: the host has none that a container could use\n  fix: `gpurun doctor` says why\n"
    );
    // One that was written when there were GPUs goes.
    let path = files.path().join("nvidia.yaml");
    std::fs::write(&path, "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: []\n").unwrap();
    for says in ["is removed", "is not written"] {
        let ended = run(host.gpurun().args(["cdi", "refresh", "--hook", "/h", "--output"]).arg(&path));
        assert!(ended.code == 0 && ended.out.contains(says) && !path.exists(), "{ended:?}");
    }
}
