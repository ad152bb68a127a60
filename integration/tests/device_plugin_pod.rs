//! gpurun-device-plugin as a pod: its image, the host's root under another name, the node's labels.

use gpurun::simulated_host::DriverFiles;
use gpurun_integration::{
    Caller, TestHost, certificates, description, dist, driver_packages,
    kubelet::{Kubelet, Plugin},
    must, project, run, temporary, until,
};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
};

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

#[test]
fn a_machine_of_a_larger_fabric_says_so_and_when_labels_were_others() {
    let mut host = description("8xh100");
    let clique = "0a1b2c3d-1111-2222-3333-00000000abcd.32766";
    host.gpus.iter_mut().for_each(|gpu| gpu.clique = Some(clique.into()));
    let host = TestHost::with(&host, DriverFiles::StandIns);
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let file = host.path().join("features.d/gpurun");
    let options = ["--labels-file", file.to_str().unwrap()];
    let plugin = Plugin::start(&host, &options);
    kubelet.registration(GPU);
    let labels = fs::read_to_string(&file).unwrap();
    assert!(labels.contains(&format!("nvidia.com/gpu.clique={clique}\n")), "{labels}");
    assert!(
        labels.contains("nvidia.com/gfd.timestamp=") && labels.contains("nvidia.com/vgpu.present=false\n")
    );
    drop(plugin);
    let _plugin = Plugin::start(&host, &[&options[..], &["--no-timestamp"]].concat());
    until("no time", || !fs::read_to_string(&file).unwrap().contains("timestamp"));
}

/// Takes one request in, answers with the status that it was started with, and prints what it got.
const API_SERVER: &str = r#"
import http.server, json, ssl, sys
class Api(http.server.BaseHTTPRequestHandler):
    def do_PATCH(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = {"path": self.path, "account": self.headers["Authorization"], "kind": self.headers["Content-Type"], "body": body}
        print(json.dumps(said), flush=True)
        answer = b'{"kind": "Status", "message": "nodes is forbidden"}'
        if sys.argv[3] == "200":
            # More than the kernel keeps for who does not read.
            answer = b"{" + b" " * (15 << 20) + b"}"
        self.send_response(int(sys.argv[3]))
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        print("answered", flush=True)
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Api)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
"#;

/// A process, and the lines that it writes. It ends with the test.
struct Process(Child, mpsc::Receiver<String>);

impl Process {
    fn new(child: Child, pipe: impl Read + Send + 'static) -> Self {
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(pipe).lines().map_while(Result::ok).try_for_each(|next| line.send(next))
        });
        Self(child, lines)
    }

    /// Waits for the next line with these words.
    fn line_with(&self, words: &str) -> String {
        let mut line = None;
        until(&format!("a line with {words:?}"), || {
            line = self.1.try_recv().ok().filter(|line| line.contains(words));
            line.is_some()
        });
        line.expect("it was waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("our own child");
    }
}

fn api_server(certificates: &Path, answer: &str) -> Process {
    let mut command = Command::new("python3");
    command.args(["-c", API_SERVER]).arg(certificates.join("tls.crt")).arg(certificates.join("tls.key"));
    let mut child = command.arg(answer).stdout(Stdio::piped()).spawn().unwrap();
    let pipe = child.stdout.take().unwrap();
    Process::new(child, pipe)
}

/// The plugin with a pod's account, where every pod has it.
fn in_a_pod(host: &TestHost, certificates: &Path, port: &str) -> Process {
    let script = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && d=/run/secrets/kubernetes.io/serviceaccount \
        && mkdir -p $d && cp $0/ca.crt $d && echo secret > $d/token && exec \"$@\"";
    let plugin = Plugin::command(host, &["--mig-strategy=mixed", "--label-node", "node-1"]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(certificates);
    command.arg(plugin.get_program()).args(plugin.get_args());
    command.env("KUBERNETES_SERVICE_HOST", "127.0.0.1").env("KUBERNETES_SERVICE_PORT", port);
    command.envs(plugin.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let pipe = child.stderr.take().unwrap();
    Process::new(child, pipe)
}

#[test]
fn the_node_is_labelled_through_the_api_server() {
    let certificates = certificates();
    let server = api_server(certificates.path(), "200");
    let port = server.line_with("");
    let host = TestHost::new("a100-mig");
    let kubelet = Kubelet::start(&Plugin::directory(&host));
    let _plugin = in_a_pod(&host, certificates.path(), &port);
    kubelet.registration(GPU);
    let said: serde_json::Value = serde_json::from_str(&server.line_with("path")).unwrap();
    assert_eq!(said["path"], "/api/v1/nodes/node-1?fieldManager=gpurun-device-plugin&force=true");
    assert_eq!(said["account"], "Bearer secret");
    assert_eq!(said["kind"], "application/apply-patch+yaml");
    assert_eq!(
        (&said["body"]["kind"], &said["body"]["metadata"]["name"]),
        (&"Node".into(), &"node-1".into())
    );
    let labels = &said["body"]["metadata"]["labels"];
    assert_eq!(labels["nvidia.com/mig-1g.5gb.count"], "2");
    assert_eq!(labels["nvidia.com/gpu.family"], "ampere");
    // An API server says in its log that somebody has not listened to the end.
    server.line_with("answered");
}

#[test]
fn gpus_are_offered_where_the_node_cannot_be_labelled() {
    let (ours, others) = (certificates(), certificates());
    for (authorities, reason) in [(&ours, "nodes is forbidden"), (&others, "invalid peer certificate")] {
        let server = api_server(ours.path(), "403");
        let port = server.line_with("");
        let host = TestHost::new("t4");
        let kubelet = Kubelet::start(&Plugin::directory(&host));
        let plugin = in_a_pod(&host, authorities.path(), &port);
        kubelet.registration(GPU);
        plugin.line_with("error[GPU-0071]");
        let cause = plugin.line_with("");
        assert!(cause.contains(reason), "{cause}");
    }
    let ended = run(&mut Plugin::command(&TestHost::new("t4"), &["--label-node", "node-1"]));
    assert!(ended.code == 125 && ended.err.contains("error[GPU-0071]"), "no pod: {ended:?}");
    assert!(ended.err.contains("fix:"), "{ended:?}");
    let ended = run(&mut Plugin::command(&TestHost::new("t4"), &["--config-file", "/nowhere"]));
    assert!(ended.err.contains("error[GPU-0002]") && ended.err.contains("fix:"), "{ended:?}");
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
    // A program of the driver's, which has nothing but what is in the image.
    let driver = driver_packages(550, "flat");
    let mps = format!(
        "-v {}:/driver-root:ro --entrypoint /driver-root/usr/bin/nvidia-cuda-mps-control",
        driver.display()
    );
    for (options, argument, says) in [
        ("", "--version", "gpurun-device-plugin "),
        ("--entrypoint /usr/bin/gpurun-nvml", "/nowhere/libnvidia-ml.so.1", "GPU-"),
        ("--entrypoint /usr/bin/gpurun-hook", "nothing", "gpurun-hook"),
        (&mps, "no-daemon", "Cannot find MPS control daemon"),
    ] {
        let ended = run(&mut host.command(Caller::Root, options, &reference, &[argument]));
        assert!(format!("{}{}", ended.out, ended.err).contains(says), "{options}: {ended:?}");
    }
}
