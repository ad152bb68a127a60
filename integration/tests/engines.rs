//! Docker, containerd and Podman, old and new, as people ask them for GPUs: above runc and crun, with and without root, with
//! either kind of cgroups.

use gpurun_integration::{
    Ended, description,
    engines::{Cgroups, Machine, Suite},
    image, run, unique,
};
use serde_json::{Value, json};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
    time::Instant,
};

/// What a user types, or a kubelet sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cli {
    Docker,
    Podman,
    /// The same of an ordinary user.
    RootlessPodman,
    Ctr,
    Cri,
}

/// How a request for GPUs reaches gpurun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asks {
    /// `-e NVIDIA_VISIBLE_DEVICES=…`
    Environment,
    /// `--gpus …`
    Gpus,
    /// A pod's annotation with CDI names.
    Annotation,
}

/// A way in which people start GPU containers.
#[derive(Debug, Clone, Copy)]
struct Way {
    cli: Cli,
    /// Docker's runtime, or the low-level runtime below gpurun's.
    runtime: &'static str,
    asks: Asks,
}

const fn way(cli: Cli, runtime: &'static str, asks: Asks) -> Way {
    Way { cli, runtime, asks }
}

const WAYS: [Way; 10] = [
    way(Cli::Docker, "gpurun", Asks::Environment),
    way(Cli::Docker, "gpurun", Asks::Gpus),
    way(Cli::Ctr, "runc", Asks::Environment),
    way(Cli::Cri, "gpurun", Asks::Environment),
    way(Cli::Cri, "gpurun", Asks::Annotation),
    way(Cli::Podman, "runc", Asks::Environment),
    way(Cli::Podman, "crun", Asks::Environment),
    way(Cli::RootlessPodman, "runc", Asks::Environment),
    way(Cli::RootlessPodman, "crun", Asks::Environment),
    way(Cli::Docker, "runc", Asks::Gpus),
];

const RUNTIME: &str = "/usr/local/bin/gpurun-runtime";
/// An image for machine learning, which asks for all GPUs itself where nobody else says what.
const CUDA_IMAGE: &str = "debian-python";
/// One that asks for nothing.
const PLAIN_IMAGE: &str = "busybox";

impl Way {
    /// Runs a container to its end; `devices` as `NVIDIA_VISIBLE_DEVICES` names them, `None` asks for nothing.
    fn run(self, machine: &Machine, devices: Option<&str>, options: &str, image: &str, command: &[&str]) -> Ended {
        if self.cli == Cli::Cri {
            return self.run_pod(machine, devices, image, command);
        }
        let name = unique();
        let mut words: Vec<&str> = match self.cli {
            Cli::Docker => vec!["docker", "run", "--rm", "--runtime", self.runtime],
            Cli::Podman | Cli::RootlessPodman => {
                vec!["podman", "--runtime", RUNTIME, "run", "--rm"]
            }
            _ => vec!["ctr", "-n", "k8s.io", "run", "--rm", "--runc-binary", RUNTIME],
        };
        let asked = devices.map(|devices| match self.asks {
            Asks::Gpus if devices == "all" => "--gpus=all".into(),
            Asks::Gpus => format!("--gpus=\"device={devices}\""),
            _ => format!("--env=NVIDIA_VISIBLE_DEVICES={devices}"),
        });
        words.extend(asked.as_deref());
        words.extend(options.split_whitespace());
        // Podman holds an archive's short name for one of its own, containerd knows none.
        let reference = match self.cli {
            Cli::Podman | Cli::RootlessPodman => format!("localhost/{image}:latest"),
            _ => format!("docker.io/library/{image}:latest"),
        };
        words.push(&reference);
        words.extend((self.cli == Cli::Ctr).then_some(name.as_str()));
        words.extend(command);
        run(&mut if self.cli == Cli::RootlessPodman {
            machine.command_as_user(&words)
        } else {
            machine.command(&words)
        })
    }

    /// The same as a pod with one container.
    fn run_pod(self, machine: &Machine, devices: Option<&str>, image: &str, command: &[&str]) -> Ended {
        let name = unique();
        let logs = machine.shared().join(&name).display().to_string();
        let (mut environment, mut annotation) = (String::new(), String::new());
        match (self.asks, devices) {
            (_, None) => {}
            (Asks::Annotation, Some(devices)) => {
                annotation = format!(r#"annotations {{ key: "cdi.k8s.io/test" value: "nvidia.com/gpu={devices}" }}"#);
            }
            (_, Some(devices)) => {
                environment = format!(r#"envs {{ key: "NVIDIA_VISIBLE_DEVICES" value: "{devices}" }}"#);
            }
        }
        let pod = format!(
            r#"{{ metadata {{ name: "{name}" uid: "{name}" namespace: "default" }} log_directory: "{logs}"
                 linux {{ security_context {{ namespace_options {{ network: NODE }} }} }} }}"#
        );
        let command: Vec<String> = command.iter().map(|word| format!("command: {}", json!(word))).collect();
        let container = format!(
            r#"{{ metadata {{ name: "{name}" }} image {{ image: "docker.io/library/{image}:latest" }} log_path: "log"
                 linux {{}} {environment} {annotation} {} }}"#,
            command.join(" ")
        );
        let sandbox = id(&cri(machine, "RunPodSandbox", &format!(r#"config {pod} runtime_handler: "{}""#, self.runtime)));
        let created = format!(r#"pod_sandbox_id: "{sandbox}" config {container} sandbox_config {pod}"#);
        let container = id(&cri(machine, "CreateContainer", &created));
        let container = format!(r#"container_id: "{container}""#);
        let mut ended = cri(machine, "StartContainer", &container);
        if ended.code == 0 {
            let status = loop {
                let status = cri(machine, "ContainerStatus", &container);
                if status.code != 0 || status.out.contains("CONTAINER_EXITED") {
                    break status;
                }
            };
            let code = status.out.lines().find_map(|line| line.trim().strip_prefix("exit_code: ")?.parse().ok());
            // TIME STREAM TAG TEXT
            let log = std::fs::read_to_string(machine.shared().join(&name).join("log")).unwrap_or_default();
            let stream = |wanted: &str| -> String {
                let lines = log.lines().map(|line| line.splitn(4, ' ').collect::<Vec<_>>());
                lines
                    .filter(|fields| fields.get(1) == Some(&wanted))
                    .filter_map(|fields| Some(format!("{}\n", fields.get(3)?)))
                    .collect()
            };
            ended = Ended { code: code.unwrap_or(0), out: stream("stdout"), err: stream("stderr") };
        }
        let sandbox = format!(r#"pod_sandbox_id: "{sandbox}""#);
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            let done = cri(machine, method, &sandbox);
            assert_eq!(done.code, 0, "{method}: {done:?}");
        }
        ended
    }
}

fn cri(machine: &Machine, method: &str, request: &str) -> Ended {
    let call = concat!(env!("CARGO_MANIFEST_DIR"), "/cri/call");
    run(&mut machine.command(&["sh", "-c", r#"printf %s "$2" | "$0" "$1""#, call, method, request]))
}

/// The only string in a response that makes something.
fn id(response: &Ended) -> String {
    let id = response.out.split('"').nth(1);
    id.unwrap_or_else(|| panic!("{response:?}")).into()
}

/// Loads images into an engine.
fn load(command: &mut dyn FnMut(&[&str]) -> Command, loader: &[&str], images: &[&str]) {
    for name in images {
        let archive = image(name, "docker.tar");
        let archive = archive.to_str().unwrap();
        let ended = run(&mut command(&[loader, &[archive]].concat()));
        assert_eq!(ended.code, 0, "{loader:?} {archive}: {ended:?}");
    }
}

const IMAGES: [&str; 5] = [CUDA_IMAGE, PLAIN_IMAGE, "distroless", "musl", "pause"];

fn start_docker(machine: &Machine) {
    machine.start_docker();
    load(&mut |words| machine.command(words), &["docker", "load", "-qi"], &IMAGES);
}

fn start_containerd(machine: &Machine) {
    machine.start_containerd();
    load(&mut |words| machine.command(words), &["ctr", "-n", "k8s.io", "image", "import"], &IMAGES);
}

const PODMAN_LOAD: [&str; 3] = ["podman", "load", "-qi"];

fn start_podman(machine: &Machine) {
    load(&mut |words| machine.command(words), &PODMAN_LOAD, &IMAGES);
    load(&mut |words| machine.command_as_user(words), &PODMAN_LOAD, &IMAGES[..2]);
}

/// Prints what a program in a container can use, as JSON.
const PROBE: &str = r#"
import ctypes, json, os, subprocess
def loaded(library):
    try: ctypes.CDLL(library)
    except OSError as error: return str(error)
    return [line.split()[-1] for line in open("/proc/self/maps") if library[:-2] in line][0]
def numbers(node): return f"{os.major(os.stat(node).st_rdev)}:{os.minor(os.stat(node).st_rdev)}"
nodes = ["/dev/" + name for name in os.listdir("/dev") if name.startswith("nvidia")]
try: smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
except OSError as error: smi = str(error)
shm = os.statvfs("/dev/shm")
print(json.dumps({
    "cuda": loaded("libcuda.so.1"), "smi": smi, "shm": shm.f_blocks * shm.f_frsize,
    "nodes": sorted(os.path.basename(node) for node in nodes if not os.path.isdir(node)),
}))
"#;

fn probe(way: Way, machine: &Machine, devices: &str) -> Value {
    let ended = way.run(machine, Some(devices), "", CUDA_IMAGE, &["python3", "-c", PROBE]);
    assert_eq!(ended.code, 0, "{devices}: {ended:?}");
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{devices}: {error}: {ended:?}"))
}

/// What every engine must do, however it is asked.
fn checks(way: Way, machine: &Machine) {
    let gpus = description("8xh100").gpus;
    let cuda = "/usr/local/nvidia/lib64/libcuda.so.550.163.01";
    let common = ["nvidia-uvm", "nvidia-uvm-tools", "nvidiactl"];
    let nodes = |minors: &[u32]| -> Value {
        let own = minors.iter().map(|minor| format!("nvidia{minor}"));
        let mut all: Vec<String> = own.chain(common.map(String::from)).collect();
        all.sort();
        all.into()
    };

    let all = probe(way, machine, "all");
    assert_eq!((&all["cuda"], all["smi"].as_array().unwrap().len()), (&json!(cuda), 8), "{all}");
    assert_eq!(all["nodes"], nodes(&gpus.iter().map(|gpu| gpu.minor).collect::<Vec<_>>()), "{all}");
    assert!(all["shm"].as_u64().unwrap() > 64 << 20, "{all}");

    let gpu = &gpus[5];
    let one = probe(way, machine, &gpu.uuid);
    assert_eq!((&one["cuda"], one["smi"].as_array().unwrap().len()), (&json!(cuda), 1), "{one}");
    assert!(one["smi"][0].as_str().unwrap().contains(&gpu.uuid), "{one}");
    assert_eq!(one["nodes"], nodes(&[gpu.minor]), "{one}");

    // There are no words for it in --gpus and in CDI.
    if way.asks == Asks::Environment {
        let none = probe(way, machine, "none");
        assert_eq!((&none["cuda"], &none["smi"]), (&json!(cuda), &json!(["No devices found."])), "{none}");
        assert_eq!(none["nodes"], nodes(&[]), "{none}");
    }

    let script = "ls -d /dev/nvidia* /usr/local/nvidia; env | grep NVIDIA; echo it ran";
    let nothing = way.run(machine, None, "", PLAIN_IMAGE, &["sh", "-c", script]);
    assert!(nothing.code == 0 && nothing.out == "it ran\n", "{nothing:?}");

    let refused = way.run(machine, Some("99"), "", CUDA_IMAGE, &["echo", "it ran"]);
    assert!(refused.code != 0 && refused.out.is_empty(), "{refused:?}");
    assert!(refused.err.contains("error[GPU-0021]: ") && refused.err.contains("fix: "), "{refused:?}");
}

fn every_way(suite: Suite, cgroups: Cgroups) {
    let started = Instant::now();
    let machine = Machine::start(suite, cgroups);
    let at = |what: &str| eprintln!("{suite:?} {cgroups:?} {:.1} s: {what}", started.elapsed().as_secs_f32());
    start_docker(&machine);
    at("docker");
    start_containerd(&machine);
    at("containerd");
    start_podman(&machine);
    at("podman");
    let failed: Vec<Way> = WAYS
        .into_iter()
        .filter(|way| {
            machine.hand_over_to(if way.runtime == "crun" { "crun" } else { "runc" });
            let failed = catch_unwind(AssertUnwindSafe(|| checks(*way, &machine))).is_err();
            at(&format!("{way:?} {failed}"));
            failed
        })
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(machine.sh("pgrep -l 'shim|conmon|runc|crun|gpurun' || true"), "", "nothing is left running");
}

#[test]
fn bookworms_engines_give_what_is_asked_for() {
    every_way(Suite::Bookworm, Cgroups::V1);
}

#[test]
fn bookworms_engines_give_what_is_asked_for_where_there_is_cgroup_2_alone() {
    every_way(Suite::Bookworm, Cgroups::V2);
}

#[test]
fn sids_engines_give_what_is_asked_for() {
    every_way(Suite::Sid, Cgroups::V1);
}

#[test]
fn sids_engines_give_what_is_asked_for_where_there_is_cgroup_2_alone() {
    every_way(Suite::Sid, Cgroups::V2);
}
