//! gpurun-device-plugin with other programs: clients of its sockets and metrics, other plugins, manifests with empty values.

use gpurun_integration::{
    TestHost, dist,
    kubelet::{Kubelet, Plugin},
    must, run, until,
};
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

const GPU: &str = "nvidia.com/gpu";
const SOCKET: &str = "nvidia-gpu.sock";

/// Every variable of the plugin's options, from its help.
fn variables() -> Vec<String> {
    let help = run(Command::new(dist("gpurun-device-plugin")).arg("--help").stdin(Stdio::null())).out;
    let found = help.split("[env: ").skip(1).filter_map(|rest| rest.split(['=', ']']).next());
    found.map(str::to_owned).collect()
}

fn healthy(kubelet: &Kubelet, resource: &str) -> usize {
    let mut service = kubelet.resource(resource);
    let mut lists = service.watch();
    lists.until("devices", |devices| !devices.is_empty());
    lists.ids("Healthy").len()
}

/// The plugin's log goes to a file of the host.
fn start_logged(host: &TestHost, options: &[&str]) -> Plugin {
    let log = fs::File::create(host.path().join("log")).unwrap();
    Plugin::of(host, Plugin::command(host, options).stderr(log).spawn().unwrap())
}

fn log(host: &TestHost) -> String {
    fs::read_to_string(host.path().join("log")).unwrap()
}

#[test]
fn an_empty_variable_is_the_same_as_none() {
    let variables = variables();
    assert!(variables.len() > 30 && variables.iter().any(|name| name == "MIG_STRATEGY"), "{variables:?}");
    let host = TestHost::new("8xh100");
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let mut command = Plugin::command(&host, &[]);
    for name in &variables {
        if !["GPURUN_SIMULATED_HOST", "KUBELET_SOCKET"].contains(&name.as_str()) {
            command.env(name, "");
        }
    }
    let _plugin = Plugin::of(&host, command.spawn().unwrap());
    kubelet.registration(GPU);
    assert_eq!(healthy(&kubelet, GPU), 8);
    // Other programs with the same options.
    for name in &variables {
        let mut gpurun = host.gpurun();
        gpurun.arg("ls");
        if name.starts_with("GPURUN_") && name != "GPURUN_SIMULATED_HOST" {
            gpurun.env(name, "");
        }
        let ended = run(&mut gpurun);
        assert_eq!(ended.code, 0, "{name}=: {ended:?}");
    }
}

#[test]
fn a_plugin_removes_no_socket_of_another_one() {
    let host = TestHost::new("8xh100");
    let directory = Plugin::directory(&host);
    let kubelet = Kubelet::start(&directory);
    let mut old = start_logged(&host, &[]);
    kubelet.registration(GPU);
    let inode = |path: &Path| fs::metadata(path).map(|file| file.ino()).ok();
    let first = inode(&directory.join(SOCKET));
    assert!(first.is_some());
    // A surge update: the new pod is ready before the old one ends.
    let new = Plugin::start(&host, &[]);
    until("the new plugin's socket", || inode(&directory.join(SOCKET)).is_some_and(|now| Some(now) != first));
    let id = new.id().to_string();
    until("the old plugin's warning", || log(&host).contains(&format!("process {id} (gpurun-device-p")));
    old.signal("-TERM");
    assert_eq!(old.end(), Some(0));
    assert_eq!(new.sockets(), [SOCKET]);
    assert_eq!(healthy(&kubelet, GPU), 8);
}

#[test]
fn a_plugin_whose_socket_is_removed_registers_again() {
    let host = TestHost::new("8xh100");
    let directory = Plugin::directory(&host);
    let kubelet = Kubelet::start(&directory);
    let plugin = Plugin::start(&host, &[]);
    kubelet.registration(GPU);
    for round in 0..3 {
        let before = kubelet.resources().len();
        fs::remove_file(directory.join(SOCKET)).unwrap();
        until("another registration", || kubelet.resources().len() > before);
        assert_eq!(healthy(&kubelet, GPU), 8, "round {round}");
        assert_eq!(plugin.sockets(), [SOCKET]);
    }
}

#[test]
fn a_plugin_waits_for_another_one_and_warns() {
    let host = TestHost::new("8xh100");
    let directory = Plugin::directory(&host);
    let kubelet = Kubelet::start(&directory);
    let plugin = start_logged(&host, &[]);
    kubelet.registration(GPU);
    let before = kubelet.resources().len();
    // NVIDIA's plugin removes the socket by name, listens, and removes it by name when it ends.
    fs::remove_file(directory.join(SOCKET)).unwrap();
    until("another registration", || kubelet.resources().len() > before);
    let before = kubelet.resources().len();
    let other = directory.join("other.sock");
    let listener = UnixListener::bind(&other).unwrap();
    fs::rename(&other, directory.join(SOCKET)).unwrap();
    let words = format!("process {} ", std::process::id());
    until("a warning that names the other program", || {
        log(&host).lines().any(|line| line.contains(&words) && line.contains(SOCKET))
    });
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(kubelet.resources().len(), before, "it does not fight");
    drop(listener);
    fs::remove_file(directory.join(SOCKET)).unwrap();
    until("another registration", || kubelet.resources().len() > before);
    assert_eq!(healthy(&kubelet, GPU), 8);
    assert_eq!(plugin.sockets(), [SOCKET]);
}

/// The bytes of grpcio 1.85 (gRPC's C-core) for a call on a Unix socket: names are literals, and the authority is the
/// socket's path with escaped slashes.
fn c_core_request(authority: &[u8]) -> Vec<u8> {
    let length = u8::try_from(authority.len()).unwrap();
    let fields: [&[u8]; 6] = [
        b"\x40\x05:path\x2c/v1beta1.DevicePlugin/GetDevicePluginOptions",
        b"\x40\x0a:authority",
        &[length],
        authority,
        b"\x83\x86\x40\x0ccontent-type\x10application/grpc\x40\x02te\x08trailers",
        b"\x40\x14grpc-accept-encoding\x17identity, deflate, gzip\x40\x0auser-agent\x30grpc-python/1.85.3 grpc-c/58.0.0 (linux; chttp2)",
    ];
    let block = fields.concat();
    let size = u32::try_from(block.len()).unwrap().to_be_bytes();
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice(),
        &[&size[1..], &[1, 4, 0, 0, 0, 1]].concat(),
        &block,
        b"\0\0\x05\0\x01\0\0\0\x01\0\0\0\0\0",
    ]
    .concat()
}

/// The types of the response frames for stream 1, until it ends.
fn answer_frames(stream: &mut UnixStream) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).expect("a frame");
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).expect("its payload");
        if head[8] == 1 {
            frames.push((head[3], payload));
            if head[3] == 3 || head[4] & 1 != 0 && head[3] <= 1 {
                return frames;
            }
        }
    }
}

#[test]
fn clients_of_c_core_are_answered() {
    let host = TestHost::new("t4");
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let _plugin = Plugin::start(&host, &[]);
    kubelet.registration(GPU);
    let socket = Plugin::directory(&host).join(SOCKET);
    for authority in
        ["var%2Flib%2Fkubelet%2Fdevice-plugins%2Fnvidia-gpu.sock", "/var/lib/kubelet/x.sock", "localhost"]
    {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(&c_core_request(authority.as_bytes())).unwrap();
        let frames = answer_frames(&mut stream);
        // A reset (type 3) has the code PROTOCOL_ERROR.
        let kinds: Vec<u8> = frames.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [1, 0, 1], "{authority}: {frames:?}");
    }
}

fn metrics(address: &str) -> std::io::Result<String> {
    let mut client = TcpStream::connect(address)?;
    client.set_read_timeout(Some(Duration::from_secs(30)))?;
    client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut text = String::new();
    client.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn silent_connections_keep_neither_prometheus_nor_the_kubelet_out() {
    let host = TestHost::new("t4");
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("0.0.0.0:{port}");
    let probes = host.path().join("probe.sock");
    let probe = |question: &str| {
        run(Command::new(dist("gpurun-device-plugin"))
            .env_clear()
            .env("PROBE_SOCKET", &probes)
            .arg(format!("--probe={question}"))
            .stdin(Stdio::null()))
    };
    assert!(probe("live").err.contains("no plugin answers"));
    let options = ["--metrics-address", &address, "--probe-socket", &probes.to_string_lossy()];
    let mut plugin = Plugin::start(&host, &options);
    kubelet.registration(GPU);
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.extend((0..10).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()));
        let text = metrics(&format!("127.0.0.1:{port}")).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "after {} connections: {text}", silent.len());
    }
    assert_eq!((probe("live").code, probe("ready").code), (0, 0));
    plugin.signal("-TERM");
    assert_eq!(plugin.end(), Some(0));
    assert!(!probes.exists(), "its socket goes with it");

    let without = TestHost::new("t4");
    fs::rename(without.path().join("dev/nvidia-uvm"), without.path().join("uvm")).unwrap();
    let _kubelet = Kubelet::start(&Plugin::directory(&without));
    let _plugin = Plugin::start(&without, &["--probe-socket", &probes.to_string_lossy()]);
    until("it lives", || probe("live").code == 0);
    let not = probe("ready");
    assert!(
        not.code == 125 && not.err.contains("no devices are offered") && not.err.contains("fix:"),
        "{not:?}"
    );
}

fn with_config(text: &str) -> (TestHost, String) {
    let host = TestHost::new("8xh100");
    let file = host.path().join("config.yaml");
    fs::write(&file, text).unwrap();
    let file = file.to_string_lossy().into_owned();
    (host, file)
}

#[test]
fn the_configuration_is_read_as_nvidias_plugin_reads_it_and_warned_of_once() {
    let entries = "[{name: nvidia.com/gpu, rename: nvidia.com/gpu.shared, devices: [0], replicas: 2}, {name: mig-1g.5gb, replicas: 3}]";
    let (host, file) = with_config(&format!(
        "FLAGS: {{failOnInitError: yes}}\nsharing: {{timeSlicing: {{resources: {entries}}}}}\n"
    ));
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let plugin = start_logged(&host, &["-config-file", &file]);
    kubelet.registration(GPU);
    assert_eq!(healthy(&kubelet, GPU), 16);
    for _ in 0..2 {
        let before = kubelet.resources().len();
        plugin.signal("-HUP");
        until("another registration", || kubelet.resources().len() > before);
    }
    let log = log(&host);
    for words in [
        "`rename` in",
        "`devices` in",
        "has no effect for nvidia.com/mig-1g.5gb: this node offers nvidia.com/gpu",
    ] {
        assert_eq!(log.matches(words).count(), 1, "{words}: {log}");
    }
}

#[test]
fn too_many_replicas_are_refused_with_the_number_that_works() {
    let (host, file) = with_config("sharing: {timeSlicing: {resources: [{name: gpu, replicas: 20000}]}}\n");
    let _kubelet = Kubelet::start(&Plugin::directory(&host));
    let plugin = start_logged(&host, &["--config-file", &file]);
    until("a refusal", || log(&host).contains("20000 replicas of 8 devices is more than the kubelet reads"));
    assert_eq!(plugin.sockets(), Vec::<String>::new());
    let log = log(&host);
    let (_, most) = log.split_once("set `replicas` to ").unwrap();
    let most: u32 = most.split(' ').next().unwrap().parse().unwrap();
    fs::write(&file, format!("sharing: {{timeSlicing: {{resources: [{{name: gpu, replicas: {most}}}]}}}}\n"))
        .unwrap();
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    plugin.signal("-HUP");
    kubelet.registration(GPU);
    assert_eq!(healthy(&kubelet, GPU), usize::try_from(most).unwrap() * 8);
}

#[test]
fn a_broken_file_ends_the_plugin_with_the_place_and_a_fix() {
    for (text, words) in [
        ("version: v7\n", "v7"),
        ("flags: {failOnInitError: 'true'}\n", "flags.failOnInitError"),
        ("sharing: {mps: {resources: [{name: gpu, replicas: 1}]}}\n", "sharing.mps.resources[0].replicas"),
        ("flags: {deviceDiscoveryStrategy: tegra}\n", "tegra"),
    ] {
        let (host, file) = with_config(text);
        let ended = run(&mut Plugin::command(&host, &["--config-file", &file]));
        assert!(
            ended.code == 125 && ended.err.contains(words) && ended.err.contains("fix:"),
            "{text}: {ended:?}"
        );
    }
    // What is not a regular file, or never ends, is not read.
    let (host, file) = with_config("# caf\u{e9}\n");
    let fifo = host.path().join("fifo");
    must(Command::new("mkfifo").arg(&fifo));
    fs::write(&file, b"# one\n# caf\xe9\n").unwrap();
    for (file, words) in [
        (file.as_str(), "line 2"),
        (fifo.to_str().unwrap(), "cannot be read"),
        ("/dev/zero", "cannot be read"),
        ("/etc", "cannot be read"),
        ("/absent", "No such file"),
    ] {
        let ended = run(&mut Plugin::command(&host, &["--config-file", file]));
        assert!(ended.code == 125 && ended.err.contains(words), "{file}: {ended:?}");
    }
}
