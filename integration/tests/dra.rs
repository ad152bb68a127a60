//! gpurun-device-plugin as a driver of claims (Dynamic Resource Allocation), with a kubelet and an API server of ours: no
//! Kubernetes that knows it can be had where these tests run.

use gpurun_integration::{
    TestHost,
    api_server::{ApiServer, NODE, SLICE},
    description,
    kubelet::{Driver, Plugin, driver_says, lose},
    run, until,
};
use serde_json::{Value, json};
use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// Of the host with eight GPUs, in NVML's order.
const MINORS: [u32; 8] = [3, 2, 1, 0, 7, 6, 5, 4];
const SERVICES: [&str; 4] =
    ["v1.DRAPlugin", "v1beta1.DRAPlugin", "v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth"];
const CDI: &str = "k8s.device-plugin.nvidia.com/gpu=";

/// The host goes last.
struct Node {
    plugin: Plugin,
    api_server: ApiServer,
    host: TestHost,
}

impl Node {
    fn new(host: &str, version: &'static str) -> Self {
        let api_server = ApiServer::start(version);
        let host = TestHost::new(host);
        for directory in ["registry", "plugins"] {
            fs::create_dir(host.path().join(directory)).unwrap();
        }
        let plugin = start(&api_server, &host);
        Self { plugin, api_server, host }
    }

    /// Kills it, and starts another.
    fn restart(&mut self) {
        self.plugin.signal("-KILL");
        self.plugin.end();
        self.plugin = start(&self.api_server, &self.host);
    }

    fn gpus(&self) -> Vec<gpurun::inventory::Gpu> {
        let ended = run(self.host.gpurun().arg("inventory"));
        gpurun::inventory::Inventory::from_json(ended.out.as_bytes()).expect("its own words").gpus
    }
}

fn start(api_server: &ApiServer, host: &TestHost) -> Plugin {
    let directory = |name: &str| host.path().join(name).to_str().unwrap().to_owned();
    let options = [
        "--dra".to_owned(),
        format!("--node-name={NODE}"),
        format!("--kubelet-registrar-directory-path={}", directory("registry")),
        format!("--kubelet-plugins-directory-path={}", directory("plugins")),
    ];
    api_server.plugin(host, &options.each_ref().map(String::as_str))
}

fn generation(api_server: &ApiServer) -> u64 {
    api_server.slice(SLICE).unwrap_or_default()["spec"]["pool"]["generation"].as_u64().unwrap_or(0)
}

#[test]
fn the_scheduler_knows_the_devices_that_are_well_whoever_takes_the_slice_away() {
    for version in ["v1", "v1beta1"] {
        let node = Node::new("8xh100", version);
        let all = MINORS.map(|minor| format!("gpu-{minor}"));
        let all = all.each_ref().map(String::as_str);
        node.api_server.until_devices(&all);
        let slice = node.api_server.slice(SLICE).unwrap();
        assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], "uid-of-node-1");
        assert_eq!(slice["spec"]["nodeName"], NODE);
        let first = &slice["spec"]["devices"][0];
        let said = if version == "v1" { first } else { &first["basic"] };
        assert_eq!(said["attributes"]["productName"], json!({"string": "NVIDIA H100 80GB HBM3"}));

        let (lost, before) = (node.gpus()[3].uuid.clone(), generation(&node.api_server));
        lose(&node.host, &lost, true);
        let without: Vec<_> = all.into_iter().filter(|name| *name != "gpu-0").collect();
        node.api_server.until_devices(&without);
        assert!(generation(&node.api_server) > before);
        lose(&node.host, &lost, false);
        node.api_server.until_devices(&all);

        node.api_server.remove_slice(SLICE);
        node.api_server.until_devices(&all);
        // Another program's for the same devices goes, and its generation is not above ours; another node's stays.
        let spec = |node: &str| json!({"driver": "gpu.nvidia.com", "nodeName": node, "pool": {"name": node, "generation": 70}});
        node.api_server.put_slice("node-2-of-another", &spec("node-2"));
        node.api_server.put_slice("node-1-of-another", &spec(NODE));
        until("it to go", || node.api_server.slice("node-1-of-another").is_none());
        until("a newer generation", || generation(&node.api_server) > 70);
        assert!(node.api_server.slice("node-2-of-another").is_some());
        node.api_server.until_devices(&all);
    }
}

#[test]
fn without_devices_there_is_no_slice() {
    let node = Node::new("t4", "v1");
    node.api_server.until_devices(&["gpu-0"]);
    let (uvm, elsewhere) = (node.host.path().join("dev/nvidia-uvm"), node.host.path().join("uvm"));
    fs::rename(&uvm, &elsewhere).unwrap();
    until("the slice to go", || node.api_server.slice(SLICE).is_none());
    fs::rename(&elsewhere, &uvm).unwrap();
    node.api_server.until_devices(&["gpu-0"]);
}

#[test]
fn a_claim_is_prepared_once_and_stays_so_through_a_kill_and_not_through_a_boot() {
    let mut node = Node::new("8xh100", "v1");
    until("devices", || node.api_server.devices().len() == 8);
    let driver = Driver::find(&node.host);
    assert_eq!(driver.info(), ("DRAPlugin", "gpu.nvidia.com", SERVICES.to_vec()));
    node.api_server.allocate("train", "uid-1", &["gpu-0", "gpu-7"]);
    let by_minor = |minor: u32| {
        let gpus = node.gpus();
        format!("{CDI}{}", gpus.iter().find(|gpu| gpu.minor == minor).unwrap().uuid)
    };
    let has = Ok([0, 7].map(|minor| (format!("gpu-{minor}"), vec![by_minor(minor)])).to_vec());
    assert_eq!(driver.prepare("v1", "train", "uid-1"), has);
    let document =
        fs::read_to_string(node.host.path().join("cdi/k8s.device-plugin.nvidia.com-gpu.json")).unwrap();
    let document: Value = serde_json::from_str(&document).unwrap();
    let names: Vec<_> =
        document["devices"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    for name in [by_minor(0), by_minor(7)] {
        assert!(names.contains(&name.strip_prefix(CDI).unwrap()), "{names:?} lacks {name}");
    }
    // The claim is not read again.
    node.api_server.remove_claim("train");
    assert_eq!(driver.prepare("v1beta1", "train", "uid-1"), has);

    node.restart();
    let driver = Driver::find(&node.host);
    until("the first state", || driver.prepare("v1", "train", "uid-1") == has);
    // Whoever else has got one of its devices waits.
    node.api_server.allocate("eager", "uid-2", &["gpu-7"]);
    let refused = driver.prepare("v1", "eager", "uid-2").unwrap_err();
    assert!(refused.contains("GPU-0024") && refused.contains("ml/train has it"), "{refused}");
    assert_eq!(driver.unprepare("train", "uid-1"), "");
    assert_eq!(driver.unprepare("train", "uid-1"), "", "it is taken back");
    assert!(driver.prepare("v1", "eager", "uid-2").is_ok());
    assert!(driver.prepare("v1", "train", "uid-1").unwrap_err().contains("the claim is gone"));

    fs::write(node.host.path().join("proc/sys/kernel/random/boot_id"), "another\n").unwrap();
    node.restart();
    let driver = Driver::find(&node.host);
    node.api_server.allocate("train", "uid-1", &["gpu-7"]);
    until("the first state", || driver.prepare("v1", "train", "uid-1").is_ok());

    node.plugin.signal("-TERM");
    assert_eq!(node.plugin.end(), Some(0));
    for socket in ["registry/gpu.nvidia.com-reg.sock", "plugins/gpu.nvidia.com/dra.sock"] {
        assert!(!node.host.path().join(socket).exists(), "the kubelet learns of the end by {socket}");
    }
}

#[test]
fn pods_are_told_how_their_devices_are() {
    let node = Node::new("8xh100", "v1");
    until("devices", || node.api_server.devices().len() == 8);
    let driver = Driver::find(&node.host);
    for version in ["v1", "v1alpha1"] {
        let health = driver.health(version);
        assert!(health.len() == 8 && health.values().all(|how| how == "Healthy"), "{health:?}");
    }
    let gpu = node.gpus().into_iter().find(|gpu| gpu.minor == 5).unwrap().uuid;
    driver_says(&node.host, &format!("xid {gpu} 79"));
    until("the slice without it", || node.api_server.devices().len() == 7);
    let health = driver.health("v1");
    assert!(health["gpu-5"].contains("79") && health["gpu-4"] == "Healthy", "{health:?}");
}

/// Two would each keep their own claims.
#[test]
fn a_second_driver_on_the_node_waits_for_the_first_ones_end() {
    let mut node = Node::new("8xh100", "v1");
    until("devices", || node.api_server.devices().len() == 8);
    let driver = Driver::find(&node.host);
    node.api_server.allocate("train", "uid-1", &["gpu-0"]);
    assert!(driver.prepare("v1", "train", "uid-1").is_ok());
    let mut second = start(&node.api_server, &node.host);
    thread::sleep(Duration::from_secs(1));
    assert!(driver.prepare("v1", "train", "uid-1").is_ok(), "the first has its sockets still");
    node.plugin.signal("-TERM");
    node.plugin.end();
    let driver = Driver::find(&node.host);
    node.api_server.remove_claim("train");
    until("the second's first state", || driver.prepare("v1", "train", "uid-1").is_ok());
    second.signal("-TERM");
    assert_eq!(second.end(), Some(0));
}

#[test]
fn what_cannot_be_prepared_says_why() {
    let node = Node::new("8xh100", "v1");
    until("devices", || node.api_server.devices().len() == 8);
    let driver = Driver::find(&node.host);
    let refused = |name: &str, uid: &str| driver.prepare("v1", name, uid).unwrap_err();
    node.api_server.allocate("other", "uid-new", &["gpu-0"]);
    assert!(refused("other", "uid-old").contains("another one of the same name"));
    node.api_server.allocate("unknown", "uid-1", &["gpu-77"]);
    assert!(refused("unknown", "uid-1").contains("gpu-77 cannot be given to the claim"));
    node.api_server.put_claim("waits", "uid-2", &Value::Null);
    assert!(refused("waits", "uid-2").contains("no devices yet"));
    let config = json!([{"opaque": {"driver": "gpu.nvidia.com", "parameters": {"kind": "GpuConfig", "sharing": {"strategy": "MPS"}}}}]);
    let results = json!([{"request": "gpus", "driver": "gpu.nvidia.com", "pool": NODE, "device": "gpu-0"}]);
    node.api_server.put_claim("shares", "uid-3", &json!({"devices": {"results": results, "config": config}}));
    let said = refused("shares", "uid-3");
    assert!(said.contains("the claim ml/shares is not prepared") && said.contains("fix:"), "{said}");

    // A GPU that goes between the scheduler and the kubelet, and one that goes after it was prepared.
    node.api_server.allocate("early", "uid-4", &["gpu-0"]);
    assert!(driver.prepare("v1", "early", "uid-4").is_ok());
    let gpu = node.gpus().into_iter().find(|gpu| gpu.minor == 0).unwrap().uuid;
    driver_says(&node.host, &format!("xid {gpu} 79"));
    until("the slice without it", || node.api_server.devices().len() == 7);
    node.api_server.allocate("late", "uid-5", &["gpu-0"]);
    assert!(refused("late", "uid-5").contains("GPU-0015"));
    assert!(driver.prepare("v1", "early", "uid-4").is_ok(), "its containers have it already");
}

#[test]
fn a_mig_device_is_a_claims_until_its_layout_is_another() {
    let node = Node::new("a100-mig", "v1");
    until("devices", || !node.api_server.devices().is_empty());
    let names = node.api_server.devices();
    let part = &names[0];
    assert!(part.contains("-mig-1g5gb-"), "{names:?}");
    let driver = Driver::find(&node.host);
    node.api_server.allocate("infer", "uid-1", &[part]);
    let prepared = driver.prepare("v1", "infer", "uid-1").unwrap();
    assert!(prepared[0].1[0].starts_with(&format!("{CDI}MIG-")), "{prepared:?}");

    let mut less = description("a100-mig");
    let minor = less.gpus[0].minor;
    let gone = less.gpus[0].mig.as_mut().unwrap().devices.remove(0);
    node.host.describe(&less);
    let capabilities = format!("proc/driver/nvidia/capabilities/gpu{minor}/mig/gi{}", gone.gpu_instance);
    fs::remove_dir_all(node.host.path().join(capabilities)).unwrap();
    for minor in gone.cap_minors(minor) {
        fs::remove_file(node.host.path().join(format!("dev/nvidia-caps/nvidia-cap{minor}"))).unwrap();
    }
    until("the other layout", || node.api_server.devices().len() == names.len() - 1);
    assert!(!node.api_server.devices().contains(part), "the first of them is gone");
    let refused = driver.prepare("v1", "infer", "uid-1").unwrap_err();
    assert!(refused.contains("is not there any more") && refused.contains("delete the pod"), "{refused}");
    assert_eq!(driver.unprepare("infer", "uid-1"), "");
}

#[test]
fn a_cluster_without_it_is_told_of_and_a_node_needs_its_name() {
    let api_server = ApiServer::start("none");
    let host = TestHost::new("t4");
    let options = ["--dra", "--node-name="];
    let mut plugin = api_server.plugin(&host, &options);
    assert_eq!(plugin.end(), Some(125));
    let ended = run(&mut Plugin::command(&host, &["--dra", "--node-name=n"]));
    assert!(
        ended.code == 125 && ended.err.contains("GPU-0071") && ended.err.contains("run as a pod"),
        "{ended:?}"
    );
    let file = host.path().join("config.yaml");
    fs::write(
        &file,
        "version: v1\nsharing: {timeSlicing: {resources: [{name: nvidia.com/gpu, replicas: 2}]}}\n",
    )
    .unwrap();
    let ended = run(&mut Plugin::command(&host, &["--dra", "--config-file", file.to_str().unwrap()]));
    assert!(ended.err.contains("GPU-0002") && ended.err.contains("share its devices"), "{ended:?}");
}

/// Figures for who looks at them; what is asserted is that everything is answered.
#[test]
fn many_claims_are_prepared_and_taken_back() {
    let node = Node::new("8xh100", "v1");
    until("devices", || node.api_server.devices().len() == 8);
    let driver = Driver::find(&node.host);
    let mut times = Vec::new();
    for number in 0..200 {
        let (name, uid) = (format!("claim-{number}"), format!("uid-{number}"));
        node.api_server.allocate(&name, &uid, &[&format!("gpu-{}", number % 8)]);
        let started = Instant::now();
        assert!(driver.prepare("v1", &name, &uid).is_ok(), "{name}");
        times.push(started.elapsed());
        assert_eq!(driver.unprepare(&name, &uid), "");
    }
    times.sort_unstable();
    let status = fs::read_to_string(format!("/proc/{}/status", node.plugin.id())).unwrap();
    let memory: Vec<_> = status.lines().filter(|line| line.contains("Rss") || line.contains("RSS")).collect();
    println!("claims: p50 {:?} p99 {:?} with an API server of Python; {memory:?}", times[100], times[198]);
}
