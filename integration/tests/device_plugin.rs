//! gpurun-device-plugin on simulated hosts, with a kubelet of ours.

use gpurun::simulated_host::{Description, DriverFiles};
use gpurun_device_plugin::api::device_plugin::{ContainerAllocateResponse, Device};
use gpurun_integration::{
    TestHost, description, dist,
    kubelet::{Kubelet, Lists, Plugin, driver_says, lose},
    run, until,
};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

const GPU: &str = "nvidia.com/gpu";

/// The host goes last.
struct Node {
    plugin: Plugin,
    kubelet: Kubelet,
    host: TestHost,
}

impl Node {
    fn start(host: TestHost, options: &[&str]) -> Self {
        let kubelet = Kubelet::start(&Plugin::directory(&host));
        let plugin = Plugin::start(&host, options);
        kubelet.registration(GPU);
        Self { host, plugin, kubelet }
    }

    fn new(name: &str, options: &[&str]) -> Self {
        Self::start(TestHost::new(name), options)
    }

    fn gpu(&self, number: usize) -> String {
        self.host_gpus()[number].clone()
    }

    fn host_gpus(&self) -> Vec<String> {
        let ended = run(self.host.gpurun().arg("inventory"));
        let inventory = gpurun::inventory::Inventory::from_json(ended.out.as_bytes()).expect("its own words");
        inventory.gpus.into_iter().map(|gpu| gpu.uuid).collect()
    }

    fn lists(&self) -> Lists {
        let mut lists = self.kubelet.resource(GPU).watch();
        lists.until("devices", |devices| !devices.is_empty());
        lists
    }

    /// The driver is watched, so what it says next is heard.
    fn until_watched(&self) {
        until("gpurun-nvml --watch", || {
            self.plugin.children().keys().any(|id| {
                let wait = fs::read_to_string(format!("/proc/{id}/wchan")).unwrap_or_default();
                let fds = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
                let opened = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
                !wait.is_empty() && opened.into_iter().any(|file| file.ends_with("host/events"))
            })
        });
    }
}

/// As the text of a golden file; the host's directory has another name each time.
fn golden(response: &ContainerAllocateResponse, host: &Path) -> String {
    let mut lines = Vec::new();
    let mut envs: Vec<_> = response.envs.iter().map(|(name, value)| format!("env {name}={value}")).collect();
    envs.sort_unstable();
    lines.extend(envs);
    lines.extend(response.annotations.iter().map(|(key, value)| format!("annotation {key}: {value}")));
    lines.extend(response.cdi_devices.iter().map(|device| format!("cdi {}", device.name)));
    lines.extend(
        response
            .devices
            .iter()
            .map(|node| format!("device {} {} {}", node.container_path, node.host_path, node.permissions)),
    );
    lines.extend(response.mounts.iter().map(|mount| {
        let ro = if mount.read_only { "ro" } else { "rw" };
        format!("mount {} {} {ro}", mount.container_path, mount.host_path)
    }));
    lines.join("\n").replace(&*host.to_string_lossy(), "HOST")
}

fn matches_golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/device-plugin").join(name);
    if std::env::var_os("GPURUN_WRITE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("{actual}\n")).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(golden.trim_end(), actual, "{name}; GPURUN_WRITE_GOLDEN=1 writes it anew");
}

fn sixteen() -> Description {
    let mut host = description("8xh100");
    let more = host.gpus.clone().into_iter().map(|mut gpu| {
        gpu.uuid = gpu.uuid.replace("GPU-", "GPU-f");
        gpu.uuid.pop();
        gpu.pci = gpu.pci.replace("0000:", "0001:");
        gpu.minor += 8;
        gpu.nvlinks.iter_mut().for_each(|link| link.to = link.to.replace("0000:", "0001:"));
        gpu
    });
    host.gpus.extend(more);
    host
}

#[test]
fn each_strategy_answers_as_it_did_on_each_host() {
    let hosts: [(&str, Description, &str); 4] = [
        ("1", description("t4"), "none"),
        ("8", description("8xh100"), "none"),
        ("16", sixteen(), "none"),
        ("mig", description("a100-mig"), "mixed"),
    ];
    for (name, description, mig) in hosts {
        for strategy in ["envvar", "volume-mounts", "cdi-annotations", "cdi-cri", "direct"] {
            let host = TestHost::with(&description, DriverFiles::StandIns);
            let node = Node::start(host, &["--device-list-strategy", strategy, "--mig-strategy", mig]);
            let resource = if name == "mig" { "nvidia.com/mig-1g.5gb" } else { GPU };
            let mut service = node.kubelet.resource(resource);
            let mut lists = service.watch();
            lists.until("devices", |devices| !devices.is_empty());
            let all = lists.ids("Healthy");
            let ids: Vec<&str> = all.iter().copied().take(2).collect();
            let response = service.allocate(&ids).unwrap();
            matches_golden(
                &format!("{name}-{strategy}.txt"),
                &golden(&response, &node.host.path().canonicalize().unwrap()),
            );
            if strategy == "envvar" {
                let whole = service.allocate(&all).unwrap();
                assert_eq!(whole.envs["NVIDIA_VISIBLE_DEVICES"], all.join(","));
            }
            if strategy.starts_with("cdi") {
                let document = node.host.path().join("cdi/k8s.device-plugin.nvidia.com-gpu.json");
                let text = fs::read_to_string(document).unwrap();
                assert!(ids.iter().all(|id| text.contains(&format!("\"name\": \"{id}\""))), "{text}");
                let ended = run(node
                    .host
                    .gpurun()
                    .args(["cdi", "validate", "--spec-dir"])
                    .arg(node.host.path().join("cdi")));
                assert_eq!(ended.code, 0, "{ended:?}");
            }
        }
    }
}

#[test]
fn the_kubelet_is_told_of_each_resource_and_of_what_is_near() {
    let node = Node::new("a100-mig", &["--mig-strategy", "mixed"]);
    for resource in [GPU, "nvidia.com/mig-1g.5gb", "nvidia.com/mig-3g.20gb"] {
        let (request, _) = node.kubelet.registration(resource);
        assert_eq!(request.version, "v1beta1");
        assert!(request.options.unwrap().get_preferred_allocation_available);
        assert_eq!(request.endpoint, resource.replace("nvidia.com/", "nvidia-") + ".sock");
    }
    let mut lists = node.kubelet.resource("nvidia.com/mig-1g.5gb").watch();
    let numa = |device: &Device| device.topology.as_ref().map(|near| near.nodes[0].id);
    lists.until("two, near the first node", |devices| {
        devices.len() == 2 && devices.iter().all(|device| numa(device) == Some(0))
    });
    let near = Node::new("8xh100", &[]);
    let all = near.host_gpus();
    let without_first: Vec<&str> = all[1..].iter().map(String::as_str).collect();
    let mut chosen = near.kubelet.resource(GPU).preferred(&without_first, 2);
    chosen.sort_unstable();
    let mut pair = [all[2].clone(), all[3].clone()];
    pair.sort_unstable();
    assert_eq!(chosen, pair, "of one PCIe switch");
}

#[test]
fn what_does_not_exist_or_is_too_much_is_refused() {
    let host = TestHost::new("t4");
    let file = host.path().join("config.yaml");
    let sharing = "failRequestsGreaterThanOne: true\n    resources: [{name: nvidia.com/gpu, replicas: 3}]";
    fs::write(&file, format!("version: v1\nsharing:\n  timeSlicing:\n    {sharing}\n")).unwrap();
    let node = Node::start(host, &["--config-file", &file.to_string_lossy()]);
    let mut service = node.kubelet.resource(GPU);
    let uuid = node.gpu(0);
    let ids: Vec<String> = (0..4).map(|number| format!("{uuid}::{number}")).collect();
    let given = service.allocate(&[&ids[2]]).unwrap();
    assert_eq!(given.envs["NVIDIA_VISIBLE_DEVICES"], uuid);
    for (wanted, code) in
        [(&[ids[3].as_str()][..], "GPU-0021"), (&["GPU-x"], "GPU-0021"), (&[&ids[0], &ids[1]], "GPU-0024")]
    {
        let refusal = service.allocate(wanted).unwrap_err();
        assert!(refusal.message().starts_with(&format!("error[{code}]")), "{refusal:?}");
    }
}

#[test]
fn a_new_kubelet_is_told_at_once() {
    let mut node = Node::new("8xh100", &[]);
    for round in 0..5 {
        drop(node.kubelet);
        let started = Instant::now();
        node.kubelet = Kubelet::start(&Plugin::directory(&node.host));
        let (_, when) = node.kubelet.registration(GPU);
        println!("re-registration {round}: {} us", when.duration_since(started).as_micros());
        assert_eq!(node.lists().ids("Healthy").len(), 8);
    }
}

#[test]
fn an_error_makes_its_gpu_unhealthy_and_no_other_and_it_recovers() {
    let node = Node::new("8xh100", &[]);
    let mut lists = node.lists();
    node.until_watched();
    let gpu = node.gpu(3);
    driver_says(&node.host, &format!("xid {gpu} 13"));
    let said = driver_says(&node.host, &format!("xid {gpu} 94"));
    let heard = lists.until_unhealthy(&[&gpu]);
    println!("XID to list: {} us", heard.duration_since(said).as_micros());
    let refusal = node.kubelet.resource(GPU).allocate(&[&gpu]).unwrap_err();
    assert!(refusal.message().contains("XID 94"), "{refusal:?}");
    let recovered = lists.until_unhealthy(&[]);
    println!("healthy again after {} ms", recovered.duration_since(heard).as_millis());
    node.kubelet.resource(GPU).allocate(&[&gpu]).unwrap();

    driver_says(&node.host, &format!("xid {gpu} 48"));
    lists.until_unhealthy(&[&gpu]);
    lose(&node.host, &gpu, true);
    driver_says(&node.host, "look");
    // Nothing but its coming back makes it healthy.
    std::thread::sleep(Duration::from_millis(300));
    assert!(lists.is_quiet());
    lose(&node.host, &gpu, false);
    driver_says(&node.host, "look");
    lists.until_unhealthy(&[]);
}

#[test]
fn a_lost_gpu_takes_no_other_with_it_and_comes_back() {
    let node = Node::new("8xh100", &[]);
    let mut lists = node.lists();
    node.until_watched();
    let gpu = node.gpu(5);
    let said = lose(&node.host, &gpu, true);
    let heard = lists.until_unhealthy(&[&gpu]);
    println!("lost to list: {} us", heard.duration_since(said).as_micros());
    // Also when the host is read again meanwhile, by whatever happens to it.
    fs::write(node.host.driver("usr/lib/x86_64-linux-gnu/libother.so"), "").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let others: Vec<String> = node.host_gpus();
    assert_eq!(others.len(), 7);
    let mut again = node.lists();
    assert_eq!((again.ids("Healthy").len(), again.ids("Unhealthy")), (7, vec![gpu.as_str()]));
    let given = node.kubelet.resource(GPU).allocate(&[&others[0]]).unwrap();
    assert_eq!(given.envs["NVIDIA_VISIBLE_DEVICES"], others[0]);
    node.until_watched();
    lose(&node.host, &gpu, false);
    again.until_unhealthy(&[]);
    node.kubelet.resource(GPU).allocate(&[&gpu]).unwrap();
}

#[test]
fn an_nvml_that_dies_takes_nothing_with_it() {
    let node = Node::new("8xh100", &[]);
    let mut lists = node.lists();
    node.until_watched();
    let (first, _) = node.plugin.children().pop_first().expect("gpurun-nvml");
    let (blind, file) = (node.gpu(2), node.host.path().join("gpus").join(node.gpu(2)));
    fs::write(&file, "unwatched").unwrap();
    assert_eq!(run(Command::new("kill").args(["-ABRT", &first.to_string()])).code, 0);
    let gpu = node.gpu(0);
    node.kubelet.resource(GPU).allocate(&[&gpu]).unwrap();
    until("another gpurun-nvml", || node.plugin.children().keys().any(|id| *id != first));
    // The other one can be used, and nobody would know if it broke.
    lists.until_unhealthy(&[&blind]);
    fs::remove_file(file).unwrap();
    lists.until_unhealthy(&[]);
    driver_says(&node.host, &format!("xid {gpu} 79"));
    lists.until_unhealthy(&[&gpu]);
}

#[test]
fn an_error_of_a_mig_device_is_not_its_neighbours() {
    let node = Node::new("a100-mig", &["--mig-strategy", "mixed"]);
    let mut lists = node.kubelet.resource("nvidia.com/mig-1g.5gb").watch();
    lists.until("devices", |devices| devices.len() == 2);
    node.until_watched();
    let parent = &description("a100-mig").gpus[0];
    let second = &parent.mig.as_ref().unwrap().devices[1];
    driver_says(
        &node.host,
        &format!("xid {} 95 {} {}", parent.uuid, second.gpu_instance, second.compute_instance),
    );
    lists.until_unhealthy(&[&second.uuid]);
    assert_eq!(lists.ids("Healthy").len(), 1);
}

#[test]
fn another_mig_layout_is_another_list() {
    let node = Node::new("a100-mig", &["--mig-strategy", "mixed"]);
    let mut lists = node.kubelet.resource("nvidia.com/mig-1g.5gb").watch();
    lists.until("devices", |devices| devices.len() == 2);
    let mut less = description("a100-mig");
    let minor = less.gpus[0].minor;
    let gone = less.gpus[0].mig.as_mut().unwrap().devices.remove(1);
    node.host.describe(&less);
    let (gi, ci) = (gone.gpu_instance, gone.compute_instance);
    let host = node.host.path();
    fs::remove_dir_all(host.join(format!("proc/driver/nvidia/capabilities/gpu{minor}/mig/gi{gi}/ci{ci}")))
        .unwrap();
    let [_, compute] = gone.cap_minors(minor);
    fs::remove_file(host.join(format!("dev/nvidia-caps/nvidia-cap{compute}"))).unwrap();
    lists.until("one is left", |devices| devices.len() == 1);
    assert_ne!(lists.ids("Healthy"), [gone.uuid.as_str()]);
}

#[test]
fn nothing_is_offered_before_the_driver_is_whole() {
    let host = TestHost::new("t4");
    let uvm = host.path().join("dev/nvidia-uvm");
    let elsewhere = host.path().join("uvm");
    fs::rename(&uvm, &elsewhere).unwrap();
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let plugin = Plugin::start(&host, &[]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(kubelet.resources(), Vec::<String>::new());
    assert_eq!(plugin.sockets(), Vec::<String>::new());
    fs::rename(&elsewhere, &uvm).unwrap();
    kubelet.registration(GPU);

    let bare = TestHost::new("t4");
    fs::remove_file(bare.path().join("sys/module/nvidia/version")).unwrap();
    fs::remove_file(bare.path().join("proc/driver/nvidia/version")).unwrap();
    let ended = run(&mut Plugin::command(&bare, &["--fail-on-init-error"]));
    assert!(ended.code == 125 && ended.err.contains("GPU-0010"), "{ended:?}");
}

#[test]
fn killed_and_started_again_it_takes_its_place() {
    let mut node = Node::new("8xh100", &[]);
    node.until_watched();
    let child = *node.plugin.children().first_key_value().expect("gpurun-nvml").0;
    node.plugin.signal("-KILL");
    node.plugin.end();
    until("gpurun-nvml ends, too", || !Path::new(&format!("/proc/{child}")).exists());
    assert_eq!(node.plugin.sockets(), ["nvidia-gpu.sock"], "it is left behind");
    let before = node.kubelet.resources().len();
    node.plugin = Plugin::start(&node.host, &[]);
    until("another registration", || node.kubelet.resources().len() > before);
    assert_eq!(node.lists().ids("Healthy").len(), 8);
    node.plugin.signal("-TERM");
    assert_eq!(node.plugin.end(), Some(0));
    assert_eq!(node.plugin.sockets(), Vec::<String>::new());
}

#[test]
fn a_gpu_that_needs_a_reset_needs_it_whoever_asks() {
    let mut node = Node::new("8xh100", &[]);
    node.until_watched();
    let (sick, lost) = (node.gpu(2), node.gpu(5));
    let mut lists = node.lists();
    driver_says(&node.host, &format!("xid {sick} 48"));
    lists.until_unhealthy(&[&sick]);
    lose(&node.host, &lost, true);
    lists.until_unhealthy(&[&sick, &lost]);
    let again = |node: &mut Node| {
        node.plugin.signal("-KILL");
        node.plugin.end();
        let before = node.kubelet.resources().len();
        node.plugin = Plugin::start(&node.host, &[]);
        until("another registration", || node.kubelet.resources().len() > before);
        node.lists()
    };
    // Meanwhile one of them has come back.
    fs::remove_file(node.host.path().join("gpus").join(&lost)).unwrap();
    assert_eq!(again(&mut node).ids("Unhealthy"), [&sick]);
    // One that comes back in another process' time.
    node.until_watched();
    let mut lists = node.lists();
    lose(&node.host, &lost, true);
    lists.until_unhealthy(&[&sick, &lost]);
    let mut lists = again(&mut node);
    node.until_watched();
    lose(&node.host, &lost, false);
    lists.until("it is back", |devices| devices.iter().any(|one| one.id == lost && one.health == "Healthy"));
    fs::write(node.host.path().join("proc/sys/kernel/random/boot_id"), "another\n").unwrap();
    assert_eq!(again(&mut node).ids("Healthy").len(), 8);
    let file = node.host.state_dir(0).join("device-health.json");
    fs::write(&file, "{").unwrap();
    assert_eq!(again(&mut node).ids("Healthy").len(), 8, "a damaged file is not used");
}

#[test]
fn another_configuration_is_read_when_it_is_told() {
    let host = TestHost::new("8xh100");
    let file = host.path().join("config.yaml");
    fs::write(&file, "version: v1\n").unwrap();
    let node = Node::start(host, &["--config-file", &file.to_string_lossy()]);
    assert_eq!(node.lists().ids("Healthy").len(), 8);
    let sharing = "renameByDefault: true\n    resources: [{name: nvidia.com/gpu, replicas: 2}]";
    fs::write(&file, format!("version: v1\nsharing:\n  timeSlicing:\n    {sharing}\n")).unwrap();
    node.plugin.signal("-HUP");
    let mut lists = node.kubelet.resource("nvidia.com/gpu.shared").watch();
    lists.until("replicas", |devices| devices.len() == 16);
    until("the other socket", || node.plugin.sockets() == ["nvidia-gpu.shared.sock"]);
    // One that cannot be used changes nothing.
    fs::write(&file, "version: v7\n").unwrap();
    node.plugin.signal("-HUP");
    std::thread::sleep(Duration::from_millis(200));
    node.kubelet.resource("nvidia.com/gpu.shared").allocate(&[&format!("{}::0", node.gpu(0))]).unwrap();
}

/// An address that nobody has: the kernel gives it out.
fn unused_address() -> String {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("127.0.0.1:{port}")
}

fn get(address: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let mut client = std::net::TcpStream::connect(address).unwrap();
    client.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    text
}

fn has_lines(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|one| one == *line), "{line}\n{text}");
    }
}

#[test]
fn metrics_are_told_to_who_asks_and_nobody_listens_otherwise() {
    let host = TestHost::new("t4");
    let address = unused_address();
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let plugin = Plugin::start(&host, &["--metrics-address", &address]);
    kubelet.registration(GPU);
    let node = Node { host, plugin, kubelet };
    node.until_watched();
    let gpu = node.gpu(0);
    node.kubelet.resource(GPU).allocate(&[&gpu]).unwrap();
    let mut lists = node.lists();
    driver_says(&node.host, &format!("xid {gpu} 79"));
    lists.until_unhealthy(&[&gpu]);
    let text = get(&address, "/metrics");
    has_lines(
        &text,
        &[
            "gpurun_allocations_total{resource=\"nvidia.com/gpu\",result=\"given\"} 1",
            &format!("gpurun_xid_errors_total{{gpu=\"{gpu}\",xid=\"79\"}} 1"),
            &format!("gpurun_device_healthy{{resource=\"nvidia.com/gpu\",device=\"{gpu}\"}} 0"),
            "gpurun_allocation_duration_seconds_count 1",
            "gpurun_pod_resources_up 0",
        ],
    );
    assert!(!text.contains("in_use"), "nobody knows: {text}");
    assert!(get(&address, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/readyz").starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/other").starts_with("HTTP/1.1 404"));
}

#[test]
fn pods_are_named_that_have_a_device() {
    let host = TestHost::new("8xh100");
    let file = host.path().join("config.yaml");
    let sharing = "resources: [{name: nvidia.com/gpu, replicas: 4}]";
    fs::write(&file, format!("version: v1\nsharing: {{timeSlicing: {{{sharing}}}}}\n")).unwrap();
    let (socket, address) = (host.path().join("pods.sock"), unused_address());
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let pods = kubelet.tell_pods(&socket);
    let options = [
        "--log-format=json",
        "--metrics-address",
        &address,
        "--pod-resources-socket",
        &socket.to_string_lossy(),
        "--config-file",
        &file.to_string_lossy(),
    ];
    let mut process = Plugin::command(&host, &options).stderr(Stdio::piped()).spawn().unwrap();
    let said = process.stderr.take().unwrap();
    let plugin = Plugin::of(&host, process);
    kubelet.registration(GPU);
    let node = Node { host, plugin, kubelet };
    node.until_watched();
    let gpus = node.host_gpus();
    let replica = |gpu: usize, number: u32| format!("{}::{number}", gpus[gpu]);
    pods.have("train", GPU, &[&replica(3, 0), &replica(3, 2), &replica(4, 1)], &[]);
    pods.have("other", "example.com/nic", &["nic-0"], &[]);
    pods.have(
        "claims",
        GPU,
        &[],
        &[&format!("k8s.device-plugin.nvidia.com/gpu={}", gpus[5]), "example.com/x=y"],
    );
    let text = get(&address, "/metrics");
    assert!(!text.contains("example.com"), "others' devices are others': {text}");
    has_lines(
        &text,
        &[
            "gpurun_pod_resources_up 1",
            "gpurun_replicas_in_use{resource=\"nvidia.com/gpu\"} 3",
            "gpurun_replicas_in_use{resource=\"gpu.nvidia.com\"} 1",
            &format!(
                "gpurun_device_in_use{{resource=\"nvidia.com/gpu\",device=\"{}\",namespace=\"ml\",pod=\"train\",container=\"main\"}} 2",
                gpus[3]
            ),
        ],
    );

    // A program can make errors as fast as it likes.
    for gpu in [3, 3, 3, 3, 0] {
        driver_says(&node.host, &format!("xid {} 13", gpus[gpu]));
    }
    let (line, lines) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(said).lines().map_while(Result::ok).all(|one| line.send(one).is_ok())
    });
    let mut told = BTreeMap::new();
    while told.len() < 2 {
        let line = lines.recv_timeout(Duration::from_secs(60)).expect("what has happened is told");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let fields = line["fields"].clone();
        if fields["message"].as_str().unwrap().contains("XID 13") {
            let device = fields["device"].as_str().unwrap().to_owned();
            assert!(told.insert(device, fields).is_none(), "it was said a moment ago: {line}");
        }
    }
    let (named, free) = (&told[&gpus[3]], &told[&gpus[0]]);
    assert_eq!([&named["namespace"], &named["pod"], &named["container"]], ["ml", "train", "main"]);
    assert!(free.get("pod").is_none(), "{free}");
}

/// A kubelet that says nothing.
#[test]
fn nobody_waits_for_a_kubelet_that_does_not_tell_of_pods() {
    let host = TestHost::new("8xh100");
    let (socket, address) = (host.path().join("pods.sock"), unused_address());
    let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let socket = socket.to_string_lossy();
    let options = ["--metrics-address", &address, "--pod-resources-socket", &socket];
    let plugin = Plugin::start(&host, &options);
    kubelet.registration(GPU);
    let node = Node { host, plugin, kubelet };
    node.until_watched();
    let mut lists = node.lists();
    let gpu = node.gpu(2);
    driver_says(&node.host, &format!("xid {gpu} 79"));
    lists.until_unhealthy(&[&gpu]);
    has_lines(&get(&address, "/metrics"), &["gpurun_pod_resources_up 0"]);
    drop(silent);
}

/// Figures for who looks at them; what is asserted is that everything is answered.
#[test]
fn a_thousand_allocations_are_answered() {
    let node = Node::new("8xh100", &["--device-list-strategy", "direct"]);
    let all = node.host_gpus();
    let ids: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut service = node.kubelet.resource(GPU);
    let started = Instant::now();
    let mut times: Vec<Duration> = (0..2000)
        .map(|_| {
            let one = Instant::now();
            assert_eq!(service.allocate(&ids).unwrap().devices.len(), 8 + 3);
            one.elapsed()
        })
        .collect();
    let total = started.elapsed();
    times.sort_unstable();
    let memory = |id: u32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default().to_owned()
    };
    println!(
        "p50 {:?} p99 {:?}, {:.0}/s, {} and {:?}; {}",
        times[1000],
        times[1980],
        2000.0 / total.as_secs_f64(),
        memory(node.plugin.id()),
        node.plugin.children().keys().map(|id| memory(*id)).collect::<Vec<_>>(),
        dist("gpurun-device-plugin").display()
    );
}

#[test]
fn help_names_the_peers_options() {
    let ended = run(Command::new(dist("gpurun-device-plugin")).arg("--help").stdin(Stdio::null()));
    for option in
        ["--mig-strategy", "--device-list-strategy", "--kubelet-socket", "--config-file", "--metrics-address"]
    {
        assert!(ended.out.contains(option), "{ended:?}");
    }
}
