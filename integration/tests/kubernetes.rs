//! gpurun-device-plugin on a whole Kubernetes, 1.20 above containerd 1.6, whose node has simulated GPUs and Debian's real driver. It is the
//! last that Debian has the sources of, and knows nothing of the CDI names in a plugin's answer (`cdi-cri`, 1.28): those are tested with a
//! kubelet of ours in device_plugin.rs, and what containerd makes of them in engines.rs.

use gpurun::simulated_host::{Description, SimulatedMig};
use gpurun_integration::{
    Simulated,
    cluster::Cluster,
    description, dist,
    kubelet::{driver_says, lose},
    must, of_driver, project, run,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::PathBuf, process::Command, thread, time::Duration};

const GPU: &str = "nvidia.com/gpu";
const MIG: &str = "nvidia.com/mig-1g.5gb";

/// There is no driver behind the simulated nodes: an open that the cgroup allows ends with ENXIO, and one that it forbids with
/// EPERM.
const LOOK: &str =
    "for node in /dev/nvidia[0-9]* /dev/nvidiactl; do (exec 3<> $node) 2>&1; done; nvidia-smi -L";

/// A pod with one container, which is given so many of a resource.
fn pod(name: &str, image: &str, resource: &str, count: u32, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "c", "image": format!("docker.io/library/{image}:latest"), "imagePullPolicy": "Never",
                "command": ["sh", "-c", script], "resources": {"limits": {resource: count}}
            }]
        }
    })
}

/// One that shows its GPUs.
fn looks(name: &str, resource: &str, count: u32) -> Value {
    pod(name, "cuda", resource, count, LOOK)
}

/// One that shows its GPUs, and keeps them.
fn stays(name: &str, resource: &str, count: u32) -> Value {
    pod(name, "cuda", resource, count, &format!("{LOOK}; echo that is all; sleep 10000"))
}

/// The UUIDs of what a pod is shown, which must be this number of GPUs, or MIG devices of so many; it may open their nodes and no other.
fn seen(said: &str, gpus: u32) -> BTreeSet<String> {
    let uuids = said.split("(UUID: ").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()));
    let (whole, parts): (BTreeSet<_>, BTreeSet<_>) = uuids.partition(|uuid| uuid.starts_with("GPU-"));
    let opened = said.matches("No such device or address").count();
    assert!(!said.contains("not permitted"), "{said}");
    assert_eq!((whole.len(), opened), (gpus as usize, gpus as usize + 1), "{said}");
    if parts.is_empty() { whole } else { parts }
}

trait Scripts {
    fn start_plugin(&self, options: &str);
    fn kill_plugin(&self);
    fn registrations(&self) -> usize;
    fn offers(&self, resource: &str, count: u32);
    fn state(&self, pod: &str) -> Value;
    fn says(&self, pod: &Value) -> String;
    fn until_running(&self, pod: &str) -> String;
    fn until_pending_for_want_of(&self, pod: &str, resource: &str);
    fn until_watched(&self);
    fn logs(&self, words: &[&str]);
    fn delete(&self, pods: &str);
}

impl Scripts for Cluster {
    /// Starts the plugin as a program of the node's.
    fn start_plugin(&self, options: &str) {
        self.node.sh(&format!(
            "{} --log info {options} >> /var/log/plugin.log 2>&1 & echo $! > /run/plugin.pid",
            dist("gpurun-device-plugin").display()
        ));
    }

    /// Kills it, until the node has no GPU to give.
    fn kill_plugin(&self) {
        self.node.sh("kill -9 $(cat /run/plugin.pid)");
        self.offers(GPU, 0);
    }

    /// How often the kubelet was told of whole GPUs.
    fn registrations(&self) -> usize {
        self.read("/var/log/plugin.log").matches("nvidia.com/gpu is registered").count()
    }

    /// Waits until the node object says that pods may have so many.
    fn offers(&self, resource: &str, count: u32) {
        self.until(&format!("{count} {resource}"), |cluster| {
            let node = cluster.get("/api/v1/nodes/node");
            node["status"]["allocatable"][resource].as_str() == Some(&count.to_string())
        });
    }

    fn state(&self, pod: &str) -> Value {
        self.get(&format!("/api/v1/namespaces/default/pods/{pod}"))["status"].clone()
    }

    /// What a pod says until its end. It goes then.
    fn says(&self, pod: &Value) -> String {
        let name = pod["metadata"]["name"].as_str().unwrap();
        self.apply(&pod.to_string());
        self.until(&format!("the end of {name}"), |cluster| {
            let phase = cluster.state(name)["phase"].clone();
            assert_ne!(phase, "Failed", "{}", cluster.state(name));
            phase == "Succeeded"
        });
        let said = self.kubectl(&format!("logs {name}"));
        self.delete(name);
        said
    }

    /// What a pod that stays says.
    fn until_running(&self, pod: &str) -> String {
        self.until(&format!("{pod} runs"), |cluster| cluster.state(pod)["phase"] == "Running");
        let said = || run(&mut self.node.command(&["kubectl", "logs", pod])).out;
        self.until(&format!("{pod} has looked"), |_| said().contains("that is all"));
        said()
    }

    fn until_pending_for_want_of(&self, pod: &str, resource: &str) {
        let why = format!("Insufficient {resource}");
        self.until(&format!("{pod}: {why}"), |cluster| {
            let events = cluster.get("/api/v1/namespaces/default/events");
            events["items"].as_array().into_iter().flatten().any(|event| {
                event["involvedObject"]["name"] == pod
                    && event["reason"] == "FailedScheduling"
                    && event["message"].as_str().is_some_and(|message| message.contains(&why))
            })
        });
        assert_eq!(self.state(pod)["phase"], "Pending");
    }

    /// Somebody waits for what the driver says.
    fn until_watched(&self) {
        let events = self.node.directory().join("events");
        let watched = format!("ls -l /proc/[0-9]*/fd 2> /dev/null | grep -q '{}'", events.display());
        self.until("gpurun-nvml --watch", |cluster| {
            run(&mut cluster.node.command(&["sh", "-c", &watched])).code == 0
        });
    }

    /// The plugin logs a line with these words.
    fn logs(&self, words: &[&str]) {
        self.until(&format!("{words:?} in the log"), |cluster| {
            let log = cluster.read("/var/log/plugin.log");
            log.lines().any(|line| words.iter().all(|word| line.contains(word)))
        });
    }

    fn delete(&self, pods: &str) {
        self.kubectl(&format!("delete pod {pods}"));
    }
}

#[test]
#[ignore = "integration/run --all makes Kubernetes, and runs it"]
fn pods_are_scheduled_to_gpus_and_see_theirs_by_each_strategy() {
    let cluster = Cluster::start();
    // The handler of `gpurun configure containerd`.
    cluster.apply(r#"{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "gpurun"}, "handler": "gpurun"}"#);
    for strategy in ["envvar", "volume-mounts", "cdi-annotations"] {
        cluster.start_plugin(&format!("--device-list-strategy {strategy}"));
        cluster.offers(GPU, 8);
        for count in [1, 2] {
            let mut pod = looks(&format!("{strategy}-{count}"), GPU, count);
            pod["spec"]["runtimeClassName"] = "gpurun".into();
            seen(&cluster.says(&pod), count);
        }
        cluster.kill_plugin();
    }

    // By a runtime that knows nothing of GPUs.
    cluster.start_plugin("--device-list-strategy direct");
    cluster.offers(GPU, 8);
    seen(&cluster.says(&looks("direct", GPU, 1)), 1);
    let probe = format!("/app/probe libcuda.so.1 libnvidia-ml.so.1; {LOOK}");
    let said = cluster.says(&pod("probe", "cuda", GPU, 2, &probe));
    seen(&said, 2);
    assert!(said.contains("libcuda.so.1: loaded") && said.contains("libnvidia-ml.so.1: loaded"), "{said}");
    let load = "python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); print(\"loaded\")'";
    let said =
        cluster.says(&pod("debian", "debian-python", GPU, 8, &format!("{load}; ldconfig; {load}; {LOOK}")));
    seen(&said, 8);
    assert_eq!(said.matches("loaded").count(), 2, "{said}");
    let said = cluster.says(&pod("none", "busybox", GPU, 0, "ls /dev | grep nvidia; echo looked"));
    assert_eq!(said.trim(), "looked");

    // More than there is waits until there is.
    cluster.apply(&stays("three", GPU, 3).to_string());
    seen(&cluster.until_running("three"), 3);
    cluster.apply(&stays("six", GPU, 6).to_string());
    cluster.until_pending_for_want_of("six", GPU);
    cluster.delete("three");
    seen(&cluster.until_running("six"), 6);
    cluster.apply(&looks("nine", GPU, 9).to_string());
    cluster.until_pending_for_want_of("nine", GPU);
    cluster.delete("six nine");
    cluster.kill_plugin();

    // gpurun's is the runtime of who names none.
    cluster.node.sh("set -e
         gpurun configure containerd --set-as-default
         kill $(pidof containerd)
         while pidof containerd; do sleep 0.1; done");
    cluster.node.start_containerd();
    cluster.start_plugin("--device-list-strategy envvar");
    cluster.offers(GPU, 8);
    seen(&cluster.says(&looks("default", GPU, 1)), 1);
    cluster.kill_plugin();

    // Without a kubelet to tell it listens all the same.
    let before = cluster.registrations();
    cluster.start_plugin("--kubelet-socket=");
    // The table shows the name that the socket had when it was bound.
    let listens = r"grep -qE '/var/lib/kubelet/device-plugins/\.[0-9a-f]{8}$' /proc/net/unix && \
                    test -S /var/lib/kubelet/device-plugins/nvidia-gpu.sock";
    cluster.until("its socket", |cluster| run(&mut cluster.node.command(&["sh", "-c", listens])).code == 0);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(cluster.registrations(), before);
}

#[test]
#[ignore = "integration/run --all makes Kubernetes, and runs it"]
fn a_running_pod_keeps_its_gpus_and_the_node_follows_what_happens_to_others() {
    let cluster = Cluster::start();
    let plugin = "--device-list-strategy direct --mig-strategy mixed";
    cluster.start_plugin(plugin);
    cluster.offers(GPU, 8);
    cluster.apply(&stays("stays", GPU, 3).to_string());
    let own = seen(&cluster.until_running("stays"), 3);
    let was = cluster.state("stays");
    let as_ever = || assert_eq!(cluster.state("stays")["containerStatuses"], was["containerStatuses"]);
    let others = |name: &str, count: u32| {
        let seen = seen(&cluster.says(&looks(name, GPU, count)), count);
        assert!(seen.is_disjoint(&own), "{name}: {seen:?} and {own:?}");
        as_ever();
        seen
    };
    let all: BTreeSet<_> = others("first", 5).union(&own).cloned().collect();

    let before = cluster.registrations();
    cluster.kill_kubelet();
    cluster.start_kubelet();
    cluster.until("the new kubelet is told", |cluster| cluster.registrations() > before);
    cluster.offers(GPU, 8);
    others("after-the-kubelet", 5);

    cluster.kill_plugin();
    as_ever();
    cluster.start_plugin(plugin);
    cluster.offers(GPU, 8);
    others("after-the-plugin", 5);

    // A GPU is lost that nobody has; another in use.
    cluster.until_watched();
    let [lost, sick] = [0, 1].map(|n| all.difference(&own).nth(n).unwrap().clone());
    lose(&cluster.node, &lost, true);
    cluster.offers(GPU, 7);
    assert_eq!(cluster.get("/api/v1/nodes/node")["status"]["capacity"][GPU], "8");
    assert!(!others("without-one", 4).contains(&lost));
    cluster.apply(&looks("waits", GPU, 5).to_string());
    cluster.until_pending_for_want_of("waits", GPU);
    lose(&cluster.node, &lost, false);
    cluster.offers(GPU, 8);
    assert!(seen(&cluster.says(&looks("waits", GPU, 5)), 5).contains(&lost));
    let in_use = own.first().unwrap();
    lose(&cluster.node, in_use, true);
    cluster.offers(GPU, 7);
    as_ever();
    // The kubelet has told whose it is.
    cluster.logs(&[
        &format!("device=\"{in_use}\""),
        "namespace=\"default\" pod=\"stays\" container=\"c\"",
        "does not answer",
    ]);
    lose(&cluster.node, in_use, false);
    cluster.offers(GPU, 8);

    // One has fallen off the bus, and is reset.
    cluster.until_watched();
    driver_says(&cluster.node, &format!("xid {sick} 79"));
    cluster.offers(GPU, 7);
    assert!(!others("without-the-sick", 4).contains(&sick));
    lose(&cluster.node, &sick, true);
    cluster.logs(&["does not answer", &format!("device=\"{sick}\"")]);
    lose(&cluster.node, &sick, false);
    cluster.offers(GPU, 8);
    assert!(others("with-the-healed", 5).contains(&sick));
    cluster.delete("stays");

    // Another machine: MIG devices, and other ones.
    cluster.kill_plugin();
    cluster.node.become_host("a100-mig");
    cluster.start_plugin(plugin);
    for (resource, count) in [(GPU, 1), (MIG, 2), ("nvidia.com/mig-3g.20gb", 1)] {
        cluster.offers(resource, count);
    }
    let [left, gone] = [0, 1].map(|number| mig_devices(&description("a100-mig"))[number].uuid.clone());
    set_mig_device(&cluster, 1, false);
    cluster.offers(MIG, 1);
    assert_eq!(seen(&cluster.says(&looks("one", MIG, 1)), 1), BTreeSet::from([left.clone()]));
    cluster.apply(&looks("two", MIG, 2).to_string());
    cluster.until_pending_for_want_of("two", MIG);
    set_mig_device(&cluster, 1, true);
    cluster.offers(MIG, 2);
    assert_eq!(seen(&cluster.says(&looks("two", MIG, 2)), 1), BTreeSet::from([left, gone]));
}

fn mig_devices(host: &Description) -> &Vec<SimulatedMig> {
    &host.gpus[0].mig.as_ref().unwrap().devices
}

/// Takes a MIG device of the node's first GPU away, as `nvidia-smi mig` does, or makes it again.
fn set_mig_device(cluster: &Cluster, number: usize, there: bool) {
    let whole = of_driver("a100-mig", 550);
    let (minor, device) = (whole.gpus[0].minor, mig_devices(&whole)[number].clone());
    let mut host = whole.clone();
    if !there {
        host.gpus[0].mig.as_mut().unwrap().devices.remove(number);
    }
    cluster.node.describe(&host);
    let directory = cluster.node.directory();
    let capabilities = format!("proc/driver/nvidia/capabilities/gpu{minor}/mig/gi{}", device.gpu_instance);
    let nodes = device.cap_minors(minor).map(|minor| format!("dev/nvidia-caps/nvidia-cap{minor}"));
    for name in nodes.into_iter().chain([capabilities]).map(PathBuf::from) {
        let (path, elsewhere) = (directory.join(&name), directory.join(name.file_name().unwrap()));
        let (from, to) = if there { (elsewhere, path) } else { (path, elsewhere) };
        fs::rename(from, to).unwrap();
    }
}

/// Manifests whose plugin takes a directory of the node's for the host, below the node's root as the pod has it. Nothing else is another.
fn on_simulated_host(cluster: &Cluster, manifests: &str) -> String {
    let variables = "          env:\n";
    let host = format!("/driver-root{}", cluster.node.directory().display());
    assert_eq!(manifests.matches(variables).count(), 1, "{manifests}");
    manifests.replace(
        variables,
        &format!("{variables}            - {{ name: GPURUN_SIMULATED_HOST, value: {host} }}\n"),
    )
}

#[test]
#[ignore = "integration/run --all makes Kubernetes, and runs it"]
fn the_manifest_and_the_chart_are_all_that_a_cluster_needs() {
    let cluster = Cluster::start();
    let image = cluster.node.shared().join("plugin.tar");
    let dist = dist("gpurun-device-plugin");
    must(
        Command::new(project().join("packaging/kubernetes/image"))
            .arg("--dist")
            .arg(dist.parent().unwrap())
            .arg(&image),
    );
    cluster.import(&image.to_string_lossy());
    let install = |manifests: &str| {
        cluster.apply(&on_simulated_host(&cluster, manifests));
        cluster.kubectl("rollout status --namespace kube-system daemonset/gpurun-device-plugin");
    };
    // Without what this Kubernetes does not know: claims, and rules of admission.
    let is_known =
        |one: &&str| !one.contains("kind: DeviceClass") && !one.contains("kind: ValidatingAdmission");
    let chart = |values: Value| {
        let mut command = Command::new(project().join("integration/chart"));
        let manifests = must(command.args(["--render", &values.to_string()]));
        manifests.split("\n---").filter(is_known).collect::<Vec<_>>().join("\n---")
    };

    let manifest = project().join("packaging/kubernetes/gpurun-device-plugin.yaml");
    install(&fs::read_to_string(manifest).unwrap());
    cluster.offers(GPU, 8);
    seen(&cluster.says(&looks("manifest", GPU, 1)), 1);
    let file = cluster.read("/etc/kubernetes/node-feature-discovery/features.d/gpurun");
    assert!(file.contains("nvidia.com/gpu.count=8"), "{file}");

    // Another release in its place, which has its GPUs from gpurun-runtime and no privileges.
    install(&chart(json!({"runtimeClassHandler": "gpurun", "runtimeClassName": "gpurun"})));
    cluster.offers(GPU, 8);
    seen(&cluster.says(&looks("unprivileged", GPU, 2)), 2);
    let plugin = cluster.node.sh("cat /proc/$(pidof gpurun-device-plugin)/status");
    assert!(plugin.contains("CapEff:\t0000000000000000\n"), "{plugin}");

    // Another, on another machine.
    cluster.node.become_host("a100-mig");
    install(&chart(json!({"labels": {"target": "node"}, "migStrategy": "mixed"})));
    for (resource, count) in [(GPU, 1), (MIG, 2)] {
        cluster.offers(resource, count);
    }
    seen(&cluster.says(&looks("chart", MIG, 1)), 1);
    let label = |name: &str| cluster.get("/api/v1/nodes/node")["metadata"]["labels"][name].clone();
    cluster.until("labels", |_| label("nvidia.com/mig-3g.20gb.count") == "1");
    assert_eq!(label("nvidia.com/gpu.product"), "NVIDIA-A100-SXM4-40GB");
    // Those that do not hold any more go, and no others.
    set_mig_device(&cluster, 2, false);
    cluster.until("less labels", |_| label("nvidia.com/mig-3g.20gb.count").is_null());
    assert_eq!(label("nvidia.com/mig-1g.5gb.count"), "2");
    assert_eq!(label("kubernetes.io/hostname"), "node");

    // What may the account do that others may not?
    let may = |account: &str| {
        let said =
            cluster.kubectl(&format!("auth can-i --list --as=system:serviceaccount:kube-system:{account}"));
        said.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<BTreeSet<_>>()
    };
    let more = || may("gpurun-device-plugin").difference(&may("default")).cloned().collect::<Vec<_>>();
    assert_eq!(more(), ["nodes [] [] [patch]"]);

    // This Kubernetes knows no claims: its kubelet and its API server say so, and the plugin does.
    install(&chart(json!({"dra": {"enabled": true}})));
    for words in ["no handler registered for plugin type: DRAPlugin", "error[GPU-0071]"] {
        cluster.until(words, |cluster| {
            cluster.kubectl("logs --namespace kube-system daemonset/gpurun-device-plugin").contains(words)
        });
    }
    assert_eq!(
        more(),
        [
            "nodes [] [] [get]",
            "resourceclaims.resource.k8s.io [] [] [get]",
            "resourceslices.resource.k8s.io [] [] [create patch delete list watch]",
        ]
    );
    let sockets = "ls /var/lib/kubelet/plugins_registry /var/lib/kubelet/plugins/gpu.nvidia.com";
    assert!(cluster.node.sh(sockets).contains("gpu.nvidia.com-reg.sock"));

    cluster.kubectl("delete --namespace kube-system daemonset/gpurun-device-plugin");
    cluster.offers(MIG, 0);
    cluster.until("the sockets to go", |cluster| {
        let left = cluster.node.sh("ls /var/lib/kubelet/device-plugins /var/lib/kubelet/plugins_registry");
        !left.contains("nvidia")
    });
}
