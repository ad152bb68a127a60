//! The kubelet itself, 1.20, above containerd 1.6, with gpurun-device-plugin on a node with eight simulated GPUs and Debian's real
//! driver. It is the last that Debian has the sources of; what newer ones add to the API is tested in device_plugin.rs.

use gpurun_integration::{
    cached,
    engines::{Cgroups, Machine, Suite},
    image, run, until,
};
use serde_json::Value;
use std::fs;

/// A node without a control plane: its pods are files. Tests may run without the right to lower OOM scores.
const CONFIGURATION: &str = r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failSwapOn: false
enforceNodeAllocatable: []
readOnlyPort: 10255
staticPodPath: /etc/kubernetes/manifests
fileCheckFrequency: 1s
resolvConf: ""
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: 50Mi}
"#;

struct Node {
    machine: Machine,
}

impl Node {
    /// A node whose containers are started by this runtime unless they name another.
    fn start(runtime: &str) -> Self {
        let machine = Machine::start(Suite::Bookworm, Cgroups::possible()[0]);
        let node = Self { machine };
        node.put("/etc/kubernetes/kubelet.yaml", CONFIGURATION);
        node.put(
            "/etc/gpurun/config.toml",
            "runtimes = [\"runc\"]\naccept-nvidia-visible-devices-as-volume-mounts = true\n",
        );
        fs::copy(cached("kubelet/kubelet"), node.machine.path("/usr/local/bin/kubelet")).unwrap();
        let script = "set -e
            mkdir -p /etc/kubernetes/manifests /var/lib/kubelet /var/log/pods
            mknod /dev/kmsg c 1 11
            mount --make-rshared /";
        node.machine.sh(script);
        if runtime == "gpurun" {
            node.machine.sh("gpurun configure containerd --set-as-default");
        }
        node.machine.start_containerd();
        for name in ["pause", "busybox", "cuda", "debian-python"] {
            node.machine.sh(&format!("ctr -n k8s.io image import {}", image(name, "docker.tar").display()));
        }
        node.start_kubelet();
        node
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.machine.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.machine.path(path)).unwrap_or_default()
    }

    fn start_kubelet(&self) {
        self.machine.sh("kubelet --config=/etc/kubernetes/kubelet.yaml --container-runtime=remote \
             --container-runtime-endpoint=unix:///run/containerd/containerd.sock --hostname-override=node \
             --node-ip=127.0.0.1 --cert-dir=/var/lib/kubelet/pki >> /var/log/kubelet.log 2>&1 &
             echo $! > /run/kubelet.pid");
        until("the kubelet's socket", || {
            run(&mut self.machine.command(&["test", "-S", "/var/lib/kubelet/device-plugins/kubelet.sock"]))
                .code
                == 0
        });
    }

    /// Starts the plugin in place of the one that runs, if any does.
    fn start_plugin(&self, strategy: &str) {
        let before = self.registrations();
        let programs = gpurun_integration::dist("gpurun-device-plugin");
        self.machine.sh(&format!(
            "[ ! -e /run/plugin.pid ] || kill -9 $(cat /run/plugin.pid)
             {} --log info --device-list-strategy {strategy} --mig-strategy mixed >> /var/log/plugin.log 2>&1 &
             echo $! > /run/plugin.pid",
            programs.display()
        ));
        self.until_registered(before);
    }

    fn registrations(&self) -> usize {
        self.read("/var/log/plugin.log").matches("nvidia.com/gpu is registered").count()
    }

    fn until_registered(&self, before: usize) {
        until("the registration", || self.registrations() > before);
    }

    /// What a pod with so many GPUs says, which ends with the word that its script ends with.
    fn pod(&self, name: &str, image: &str, gpus: u32, script: &str) -> String {
        let script = format!("{script}; echo that is all");
        self.manifest(name, image, gpus, &script);
        let mut said = String::new();
        until(name, || {
            let find = format!("cat /var/log/pods/default_{name}-node_*/c/0.log 2>/dev/null");
            said = run(&mut self.machine.command(&["sh", "-c", &find])).out;
            said.contains("that is all")
        });
        self.machine.sh(&format!("rm /etc/kubernetes/manifests/{name}.yaml"));
        until("its end", || self.status(name).is_none());
        let lines = said.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        lines.collect::<Vec<_>>().join("\n")
    }

    fn manifest(&self, name: &str, image: &str, gpus: u32, script: &str) {
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "hostNetwork": true, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "c", "image": format!("docker.io/library/{image}:latest"), "imagePullPolicy": "Never",
                    "command": ["sh", "-c", script], "resources": {"limits": {"nvidia.com/gpu": gpus}}
                }]
            }
        });
        // The kubelet reads names that end like this, and JSON is YAML.
        self.put(&format!("/etc/kubernetes/manifests/{name}.yaml"), &pod.to_string());
    }

    fn status(&self, name: &str) -> Option<Value> {
        let pods = self.machine.sh("curl -s http://127.0.0.1:10255/pods");
        let pods: Value = serde_json::from_str(&pods).ok()?;
        let own = |pod: &&Value| pod["metadata"]["name"].as_str().is_some_and(|own| own.starts_with(name));
        pods["items"].as_array()?.iter().find(own).map(|pod| pod["status"].clone())
    }
}

/// There is no driver behind the simulated nodes: an open that the cgroup allows ends with ENXIO, and one that it forbids with
/// EPERM.
const LOOK: &str = "ls /dev/nvidia[0-9]*; for node in /dev/nvidia[0-9]* /dev/nvidiactl; do (exec 3<> $node) 2>&1; done; \
                    nvidia-smi -L; env | grep NVIDIA_VISIBLE";

fn sees(said: &str, gpus: usize) {
    let opened = said.matches("No such device or address").count();
    assert_eq!(opened, gpus + 1, "{said}");
    assert_eq!(said.matches("(UUID: GPU-").count(), gpus, "{said}");
    assert!(!said.contains("not permitted"), "{said}");
}

#[test]
#[ignore = "integration/run --all makes the kubelet, and runs it"]
fn pods_get_gpus_directly_from_a_runtime_that_knows_nothing_of_them() {
    let node = Node::start("runc");
    node.start_plugin("direct");
    sees(&node.pod("one", "cuda", 1, LOOK), 1);
    let said = node.pod("two", "cuda", 2, &format!("/app/probe libcuda.so.1 libnvidia-ml.so.1; {LOOK}"));
    sees(&said, 2);
    assert!(said.contains("libcuda.so.1: loaded") && said.contains("libnvidia-ml.so.1: loaded"), "{said}");
    let python = "python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); print(\"loaded\")'; ldconfig; \
                  python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); print(\"again\")'";
    let said = node.pod("debian", "debian-python", 8, &format!("{python}; {LOOK}"));
    sees(&said, 8);
    assert!(said.contains("loaded") && said.contains("again"), "{said}");
    let none = node.pod("none", "busybox", 0, "ls /dev | grep nvidia; echo looked");
    assert!(none.starts_with("looked"), "{none}");

    node.manifest("many", "busybox", 9, "echo it ran");
    let mut status = Value::Null;
    until("what becomes of too much", || {
        status = node.status("many").unwrap_or_default();
        status["phase"] == "Failed"
    });
    assert!(status.to_string().contains("nvidia.com/gpu"), "{status}");
    node.machine.sh("rm /etc/kubernetes/manifests/many.yaml");

    // Another kubelet.
    let before = node.registrations();
    node.machine.sh("kill -9 $(cat /run/kubelet.pid)");
    node.start_kubelet();
    node.until_registered(before);
    sees(&node.pod("restarted", "cuda", 1, LOOK), 1);
    // Another plugin, while a pod runs that has a GPU of the first.
    node.manifest("stays", "busybox", 3, "sleep 1000");
    until("a running pod", || node.status("stays").unwrap_or_default()["phase"] == "Running");
    node.start_plugin("direct");
    sees(&node.pod("killed", "cuda", 5, LOOK), 5);
    assert_eq!(node.status("stays").unwrap_or_default()["phase"], "Running");
}

#[test]
#[ignore = "integration/run --all makes the kubelet, and runs it"]
fn pods_get_gpus_by_what_gpuruns_runtime_reads() {
    let node = Node::start("gpurun");
    for (number, strategy) in ["envvar", "volume-mounts", "cdi-annotations"].into_iter().enumerate() {
        node.start_plugin(strategy);
        sees(&node.pod(&format!("pod{number}"), "cuda", 2, LOOK), 2);
    }
    // Without a kubelet to tell it listens all the same.
    let before = node.registrations();
    node.machine.sh(&format!(
        "kill $(cat /run/plugin.pid); while [ -e /var/lib/kubelet/device-plugins/nvidia-gpu.sock ]; do sleep 0.1; done
         {} --log info --kubelet-socket= >> /var/log/plugin.log 2>&1 &
         while [ ! -e /var/lib/kubelet/device-plugins/nvidia-gpu.sock ]; do sleep 0.1; done; sleep 0.5",
        gpurun_integration::dist("gpurun-device-plugin").display()
    ));
    assert_eq!(node.registrations(), before);
}
