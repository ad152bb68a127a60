//! Sharing by MPS, with the control daemon of real drivers, which needs no GPU, and libcuda, which asks it for one.

use gpurun_integration::{
    Caller, TestHost,
    kubelet::{Kubelet, Lists, Plugin},
    must, rootfs, run, until,
};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const GPU: &str = "nvidia.com/gpu";
/// nvml.h
const DEFAULT: &str = "0";
const EXCLUSIVE_PROCESS: &str = "3";

/// The host goes last.
struct Node {
    plugin: Plugin,
    kubelet: Kubelet,
    mounts: Mounts,
    host: TestHost,
}

/// What the plugin has mounted goes before the directory.
struct Mounts(PathBuf);

impl Drop for Mounts {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            run(Command::new("umount").arg("--lazy").arg(entry.path().join("shm")));
        }
        // Where a test has made it one.
        run(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

impl Node {
    fn new(host: &str, branch: u32, layout: &str) -> Self {
        Self::with(TestHost::with_driver(host, branch, layout), start)
    }

    fn with(host: TestHost, start: impl Fn(&TestHost) -> Plugin) -> Self {
        configure(&host, "mps: {resources: [{name: nvidia.com/gpu, replicas: 4}]}");
        let kubelet = Kubelet::start(&Plugin::directory(&host));
        let plugin = start(&host);
        kubelet.registration(GPU);
        let mounts = Mounts(host.path().join("mps"));
        Self { plugin, kubelet, mounts, host }
    }

    fn lists(&self) -> Lists {
        self.kubelet.resource(GPU).watch()
    }

    fn ready(&self) -> Lists {
        let mut lists = self.lists();
        lists.until_unhealthy(&[]);
        lists
    }

    /// Another configuration, under which the resource is made known again.
    fn reload(&self, sharing: &str) -> Lists {
        configure(&self.host, sharing);
        let before = self.kubelet.resources().len();
        self.plugin.signal("-HUP");
        until("another registration", || self.kubelet.resources().len() > before);
        self.lists()
    }

    fn place(&self, uuid: &str) -> PathBuf {
        self.mounts.0.join(uuid)
    }

    fn compute_mode(&self, uuid: &str) -> String {
        let file = self.host.path().join("compute-modes").join(uuid);
        fs::read_to_string(file).unwrap_or_default().trim().to_owned()
    }

    /// What the daemon of a GPU says.
    fn ask(&self, uuid: &str, command: &str) -> String {
        let control = self.host.driver("usr/bin/nvidia-cuda-mps-control");
        let mut ask = Command::new("sh");
        ask.args(["-c", "echo \"$1\" | exec \"$0\""]).arg(control).arg(command);
        must(ask.env("CUDA_MPS_PIPE_DIRECTORY", self.place(uuid).join("pipe"))).trim().to_owned()
    }

    /// The plugin's daemons, by their GPU.
    fn daemons(&self) -> BTreeMap<String, u32> {
        let of = |id: u32| {
            let environment = fs::read_to_string(format!("/proc/{id}/environ")).unwrap_or_default();
            let uuid = environment.split('\0').find_map(|one| one.strip_prefix("CUDA_VISIBLE_DEVICES="));
            Some((uuid?.to_owned(), id))
        };
        let children = self.plugin.children();
        // A thread's name has 15 letters.
        let daemons = children.into_iter().filter(|(_, name)| "nvidia-cuda-mps-control".starts_with(name));
        daemons.filter_map(|(id, _)| of(id)).collect()
    }
}

fn configure(host: &TestHost, sharing: &str) {
    fs::write(host.path().join("config.yaml"), format!("version: v1\nsharing:\n  {sharing}\n")).unwrap();
}

fn command(host: &TestHost) -> Command {
    let mut command = Plugin::command(host, &["--log", "info"]);
    for (option, file) in
        [("--config-file", "config.yaml"), ("--mps-root", "mps"), ("--labels-file", "labels")]
    {
        command.arg(option).arg(host.path().join(file));
    }
    command.stderr(log(host));
    command
}

fn log(host: &TestHost) -> Stdio {
    fs::File::options().create(true).append(true).open(host.path().join("log")).unwrap().into()
}

fn start(host: &TestHost) -> Plugin {
    Plugin::of(host, command(host).spawn().unwrap())
}

fn gpus(host: &TestHost) -> Vec<String> {
    let inventory = must(host.gpurun().arg("inventory"));
    let inventory = gpurun::inventory::Inventory::from_json(inventory.as_bytes()).unwrap();
    inventory.gpus.into_iter().map(|gpu| gpu.uuid).collect()
}

fn replicas(uuid: &str) -> Vec<String> {
    (0..4).map(|number| format!("{uuid}::{number}")).collect()
}

fn exists(id: u32) -> bool {
    Path::new(&format!("/proc/{id}")).exists()
}

#[test]
fn a_container_has_a_part_of_a_gpu() {
    for (branch, layout) in [(535, "flat"), (550, "debian")] {
        let node = Node::new("t4", branch, layout);
        node.ready();
        let uuid = &gpus(&node.host)[0];
        let place = node.place(uuid);
        let ids = replicas(uuid);
        let mut service = node.kubelet.resource(GPU);
        let given = service.allocate(&[&ids[2]]).unwrap();
        assert_eq!(given.envs["NVIDIA_VISIBLE_DEVICES"], *uuid);
        assert_eq!(given.envs["CUDA_MPS_PIPE_DIRECTORY"], "/mps/pipe");
        let mounts: Vec<_> = given
            .mounts
            .iter()
            .map(|one| (one.container_path.as_str(), Path::new(&one.host_path), one.read_only))
            .collect();
        let (pipe, shm) = (place.join("pipe"), place.join("shm"));
        assert_eq!(mounts, [("/mps/pipe", &*pipe, true), ("/dev/shm", &*shm, false)]);
        let refusal = service.allocate(&[&ids[0], &ids[1]]).unwrap_err();
        assert!(refusal.message().starts_with("error[GPU-0024]"), "{refusal:?}");

        assert_eq!(node.ask(uuid, "get_default_active_thread_percentage"), "25.0");
        // 15,360 MiB in four parts.
        assert_eq!(node.ask(uuid, "get_default_device_pinned_mem_limit 0"), "3G");
        assert_eq!(node.compute_mode(uuid), EXCLUSIVE_PROCESS);
        let labels = fs::read_to_string(node.host.path().join("labels")).unwrap();
        for label in ["mps.capable=true", "gpu.sharing-strategy=mps", "gpu.product=Tesla-T4-SHARED"] {
            assert!(labels.lines().any(|line| line == format!("nvidia.com/{label}")), "{label}\n{labels}");
        }
        let daemon = node.daemons()[uuid];
        let inside = format!("/proc/{daemon}/root/dev/shm");
        assert_eq!(fs::metadata(&inside).unwrap().dev(), fs::metadata(&shm).unwrap().dev());
        assert_eq!(fs::metadata(&inside).unwrap().mode() & 0o7777, 0o1777);
        assert_ne!(fs::metadata("/dev/shm").unwrap().dev(), fs::metadata(&shm).unwrap().dev());
    }
}

#[test]
fn a_program_in_a_container_computes_through_the_daemon() {
    let node = Node::new("t4", 550, "flat");
    node.ready();
    let uuid = &gpus(&node.host)[0];
    let given = node.kubelet.resource(GPU).allocate(&[&replicas(uuid)[0]]).unwrap();
    let mut options = format!("--gpus device={uuid}");
    for mount in &given.mounts {
        let how = if mount.read_only { ":ro" } else { "" };
        options += &format!(" -v {}:{}{how}", mount.host_path, mount.container_path);
    }
    options += &format!(" -e CUDA_MPS_PIPE_DIRECTORY={}", given.envs["CUDA_MPS_PIPE_DIRECTORY"]);
    let program = "python3 -c \"import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))\" && echo here > /dev/shm/file";
    let said = node.host.ok(Caller::Root, &options, &rootfs("debian-python"), program);
    // CUDA_ERROR_MPS_CONNECTION_FAILED: the server has found no GPU.
    assert_eq!(said.trim(), "805");
    assert_eq!(fs::read_to_string(node.place(uuid).join("shm/file")).unwrap(), "here\n");
    let log = fs::read_to_string(node.host.path().join("log")).unwrap();
    // The server runs, on the driver's libcuda, in the daemon's place.
    for words in ["NEW CLIENT", "Starting new server", "no CUDA-capable device is detected"] {
        assert!(log.lines().any(|line| line.contains("MPS: ") && line.contains(words)), "{words}\n{log}");
    }
    let lines: Vec<_> = log.lines().filter(|line| line.contains("NEW CLIENT")).collect();
    assert!(!lines.iter().any(|line| line.contains("NEW CLIENT 0 ")), "it has a pid here: {lines:?}");
}

/// A pod's mounts: those below the MPS root are the node's, too, and what a daemon has for itself is not even the pod's.
#[test]
fn in_a_pod_the_node_has_what_containers_are_sent_to() {
    let host = TestHost::with_driver("t4", 550, "flat");
    let mps = host.path().join("mps");
    fs::create_dir(&mps).unwrap();
    must(Command::new("mount").arg("--bind").args([&mps, &mps]));
    must(Command::new("mount").arg("--make-shared").arg(&mps));
    let node = Node::with(host, |host| {
        let plugin = command(host);
        let mut pod = Command::new("unshare");
        pod.args(["--mount", "--propagation=unchanged", "sh", "-c"]);
        pod.args(["mount --make-rshared / && exec \"$@\"", "sh"]);
        pod.arg(plugin.get_program()).args(plugin.get_args());
        pod.arg("--container-driver-root").arg(host.path().canonicalize().unwrap());
        pod.env_clear().envs(plugin.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Plugin::of(host, pod.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log(host)).spawn().unwrap())
    });
    node.ready();
    let uuid = &gpus(&node.host)[0];
    let shm = fs::metadata(node.place(uuid).join("shm")).unwrap().dev();
    assert_ne!(shm, fs::metadata(&node.mounts.0).unwrap().dev(), "it is mounted on the node");
    let seen_by = |id: u32| fs::metadata(format!("/proc/{id}/root/dev/shm")).unwrap().dev();
    assert_eq!(seen_by(node.daemons()[uuid]), shm);
    assert_ne!(seen_by(node.plugin.id()), shm);
}

#[test]
fn a_daemon_that_dies_takes_its_gpu_along_and_no_other_and_is_started_again() {
    let node = Node::new("8xh100", 550, "flat");
    let mut lists = node.ready();
    let uuid = &gpus(&node.host)[3];
    let before = node.daemons();
    assert_eq!(before.len(), 8);
    must(Command::new("kill").args(["-KILL", &before[uuid].to_string()]));
    let ids = replicas(uuid);
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    lists.until_unhealthy(&ids);
    let refusal = node.kubelet.resource(GPU).allocate(&ids[..1]).unwrap_err();
    assert!(refusal.message().contains("MPS control daemon ended"), "{refusal:?}");
    lists.until_unhealthy(&[]);
    let after = node.daemons();
    assert_ne!(after[uuid], before[uuid]);
    assert_eq!(after.len(), 8);
    assert!(before.iter().all(|(other, id)| other == uuid || after[other] == *id), "{before:?} {after:?}");
    assert_eq!(node.ask(uuid, "get_default_active_thread_percentage"), "25.0", "it has its limits again");
}

#[test]
fn daemons_end_with_the_plugin_and_containers_find_those_of_the_next() {
    let mut node = Node::new("t4", 550, "flat");
    node.ready();
    let uuid = gpus(&node.host).remove(0);
    let shm = fs::metadata(node.place(&uuid).join("shm")).unwrap().dev();
    for (signal, mode) in [("-KILL", EXCLUSIVE_PROCESS), ("-TERM", DEFAULT)] {
        let daemon = node.daemons()[&uuid];
        node.plugin.signal(signal);
        node.plugin.end();
        until("the daemon ends", || !exists(daemon));
        assert_eq!(node.compute_mode(&uuid), mode, "{signal}");
        node.plugin = start(&node.host);
        until("another daemon", || node.daemons().contains_key(&uuid));
        let mut lists = node.lists();
        lists.until_unhealthy(&[]);
        assert_eq!(node.compute_mode(&uuid), EXCLUSIVE_PROCESS);
        assert_eq!(fs::metadata(node.place(&uuid).join("shm")).unwrap().dev(), shm, "{signal}");
    }
}

#[test]
fn where_nothing_is_shared_any_more_nothing_is_left() {
    let mut node = Node::new("t4", 550, "flat");
    node.ready();
    let uuid = gpus(&node.host).remove(0);
    let daemon = node.daemons()[&uuid];
    let gone = |node: &Node| {
        until("the directory goes", || !node.place(&uuid).exists());
        assert_eq!(node.compute_mode(&uuid), DEFAULT);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(node.place(&uuid).to_str().unwrap()), "{mounts}");
    };
    let mut lists = node.reload("timeSlicing: {resources: [{name: nvidia.com/gpu, replicas: 2}]}");
    lists.until("replicas of the other kind", |devices| devices.len() == 2);
    gone(&node);
    assert!(!exists(daemon));

    let mut lists = node.reload("mps: {resources: [{name: nvidia.com/gpu, replicas: 4}]}");
    lists.until("well", |devices| devices.len() == 4 && devices.iter().all(|one| one.health == "Healthy"));
    // Of a process that could take nothing away.
    node.plugin.signal("-KILL");
    node.plugin.end();
    assert!(node.place(&uuid).exists());
    configure(&node.host, "timeSlicing: {resources: []}");
    node.plugin = start(&node.host);
    gone(&node);
}

#[test]
fn another_number_of_replicas_is_another_limit() {
    let node = Node::new("t4", 550, "flat");
    node.ready();
    let uuid = &gpus(&node.host)[0];
    let mut lists = node.reload("mps: {resources: [{name: nvidia.com/gpu, replicas: 2}]}");
    lists.until("two, and well", |devices| {
        devices.len() == 2 && devices.iter().all(|one| one.health == "Healthy")
    });
    assert_eq!(node.ask(uuid, "get_default_active_thread_percentage"), "50.0");
}

#[test]
fn a_driver_without_mps_is_said_to_be_and_offers_nothing() {
    let host = TestHost::new("t4");
    configure(&host, "mps: {resources: [{name: nvidia.com/gpu, replicas: 4}]}");
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let _plugin = start(&host);
    let log = || fs::read_to_string(host.path().join("log")).unwrap();
    until("it is said", || log().contains("error[GPU-0032]"));
    assert!(log().contains("nvidia-cuda-mps"), "{}", log());
    assert_eq!(kubelet.resources(), Vec::<String>::new());
}
