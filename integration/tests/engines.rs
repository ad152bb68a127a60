//! Docker, containerd and Podman, old and new, as people ask them for GPUs: above runc and crun, with and without root, with
//! either kind of cgroups.

use gpurun::simulated_host::{SimulatedGpu, SimulatedMig};
use gpurun_integration::{
    Ended, cached, description, dist,
    engines::{Cgroups, Machine, Suite},
    image,
    kubelet::Kubelet,
    processes_with, run, unique, until,
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::Command,
    thread,
};

/// What a user types, or a kubelet sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cli {
    Docker,
    /// The same of an ordinary user.
    RootlessDocker,
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
    /// `--device nvidia.com/gpu=…`, a pod's CDI devices: the engine reads the document that gpurun wrote.
    Cdi,
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

const WAYS: [Way; 19] = [
    way(Cli::Docker, "gpurun", Asks::Environment),
    way(Cli::Docker, "gpurun", Asks::Gpus),
    way(Cli::Docker, "runc", Asks::Gpus),
    way(Cli::RootlessDocker, "gpurun", Asks::Environment),
    way(Cli::Ctr, "runc", Asks::Environment),
    way(Cli::Cri, "gpurun", Asks::Environment),
    way(Cli::Cri, "gpurun", Asks::Annotation),
    way(Cli::Podman, "runc", Asks::Environment),
    way(Cli::Podman, "crun", Asks::Environment),
    way(Cli::RootlessPodman, "runc", Asks::Environment),
    way(Cli::RootlessPodman, "crun", Asks::Environment),
    way(Cli::Docker, "runc", Asks::Cdi),
    way(Cli::Docker, "gpurun", Asks::Cdi),
    way(Cli::Ctr, "runc", Asks::Cdi),
    way(Cli::Cri, "runc", Asks::Cdi),
    way(Cli::Podman, "runc", Asks::Cdi),
    way(Cli::Podman, "crun", Asks::Cdi),
    way(Cli::RootlessPodman, "runc", Asks::Cdi),
    way(Cli::RootlessPodman, "crun", Asks::Cdi),
];

impl Cli {
    /// A command of whoever uses it.
    fn command(self, machine: &Machine, words: &[&str]) -> Command {
        if matches!(self, Self::RootlessPodman | Self::RootlessDocker) {
            machine.command_as_user(words)
        } else {
            machine.command(words)
        }
    }
}

const RUNTIME: &str = "/usr/local/bin/gpurun-runtime";
/// An image for machine learning, which asks for all GPUs itself where nobody else says what.
const CUDA_IMAGE: &str = "cuda";
/// One that asks for nothing.
const PLAIN_IMAGE: &str = "busybox";

impl Way {
    /// Whether the engine may read the request itself, as containerd 2 does with annotations: a CDI document has all that a
    /// driver can, cannot enlarge /dev/shm, and it is the engine who refuses what is not in it.
    fn may_be_the_engines_own(self) -> bool {
        matches!(self.asks, Asks::Cdi | Asks::Annotation)
    }

    /// Runs a container to its end; `devices` as `NVIDIA_VISIBLE_DEVICES` names them, `None` asks for nothing.
    fn run(
        self,
        machine: &Machine,
        devices: Option<&str>,
        options: &str,
        image: &str,
        command: &[&str],
    ) -> Ended {
        if self.cli == Cli::Cri {
            return self.run_pod(machine, devices, image, command);
        }
        let name = unique();
        // A document needs no runtime of ours. ctr would set a weight, for which a host may lack the controller.
        let ours = |name: &'static str| if self.asks == Asks::Cdi { self.runtime } else { name };
        let start = match self.cli {
            Cli::Docker | Cli::RootlessDocker => format!("docker run --rm --runtime {}", self.runtime),
            Cli::Podman | Cli::RootlessPodman => {
                format!("podman --runtime {} run --rm --cap-add=MKNOD", ours("gpurun"))
            }
            _ => format!("ctr -n k8s.io run --rm --cpu-shares=0 --runc-binary {}", ours(RUNTIME)),
        };
        let mut words: Vec<&str> = start.split(' ').collect();
        let asked = devices.map(|devices| match self.asks {
            Asks::Gpus if devices == "all" => "--gpus=all".into(),
            Asks::Gpus => format!("--gpus=\"device={devices}\""),
            Asks::Cdi => format!("--device=nvidia.com/gpu={devices}"),
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
        run(&mut self.cli.command(machine, &words))
    }

    /// The same as a pod with one container.
    fn run_pod(self, machine: &Machine, devices: Option<&str>, image: &str, command: &[&str]) -> Ended {
        let name = unique();
        let logs = machine.shared().join(&name).display().to_string();
        let request = match (self.asks, devices) {
            (_, None) => String::new(),
            (Asks::Annotation, Some(devices)) => {
                format!(r#"annotations {{ key: "cdi.k8s.io/test" value: "nvidia.com/gpu={devices}" }}"#)
            }
            // In full, as a kubelet has it from a device plugin or a driver of claims.
            (Asks::Cdi, Some(name)) if name.contains('=') => format!(r#"CDI_devices {{ name: "{name}" }}"#),
            (Asks::Cdi, Some(devices)) => format!(r#"CDI_devices {{ name: "nvidia.com/gpu={devices}" }}"#),
            (_, Some(devices)) => format!(r#"envs {{ key: "NVIDIA_VISIBLE_DEVICES" value: "{devices}" }}"#),
        };
        let pod = format!(
            r#"{{ metadata {{ name: "{name}" uid: "{name}" namespace: "default" }} log_directory: "{logs}"
                 linux {{ security_context {{ namespace_options {{ network: NODE }} }} }} }}"#
        );
        let command: Vec<String> = command.iter().map(|word| format!("command: {}", json!(word))).collect();
        let container = format!(
            r#"{{ metadata {{ name: "{name}" }} image {{ image: "docker.io/library/{image}:latest" }} log_path: "log"
                 linux {{}} {request} {} }}"#,
            command.join(" ")
        );
        let sandbox = id(&cri(
            machine,
            "RunPodSandbox",
            &format!(r#"config {pod} runtime_handler: "{}""#, self.runtime),
        ));
        let created = format!(r#"pod_sandbox_id: "{sandbox}" config {container} sandbox_config {pod}"#);
        let made = cri(machine, "CreateContainer", &created);
        let ended = if made.code == 0 { run_container(machine, &id(&made), &logs) } else { made };
        let sandbox = format!(r#"pod_sandbox_id: "{sandbox}""#);
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            let done = cri(machine, method, &sandbox);
            assert_eq!(done.code, 0, "{method}: {done:?}");
        }
        ended
    }
}

/// A container of a pod to its end, which its log tells: lines of TIME STREAM TAG TEXT.
fn run_container(machine: &Machine, container: &str, logs: &str) -> Ended {
    let container = format!(r#"container_id: "{container}""#);
    let started = cri(machine, "StartContainer", &container);
    if started.code != 0 {
        return started;
    }
    let mut status = started;
    until("the container ends", || {
        status = cri(machine, "ContainerStatus", &container);
        status.code != 0 || status.out.contains("CONTAINER_EXITED")
    });
    let code = status.out.lines().find_map(|line| line.trim().strip_prefix("exit_code: ")?.parse().ok());
    let log = fs::read_to_string(Path::new(logs).join("log")).unwrap_or_default();
    let stream = |wanted: &str| -> String {
        let lines = log.lines().map(|line| line.splitn(4, ' ').collect::<Vec<_>>());
        let own = lines.filter(|fields| fields.get(1) == Some(&wanted));
        own.filter_map(|fields| Some(format!("{}\n", fields.get(3)?))).collect()
    };
    // 0 is what protobuf leaves out.
    Ended { code: code.unwrap_or(status.code), out: stream("stdout"), err: stream("stderr") }
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

/// Starts an engine, if it is one that has to run, and loads images.
fn start(machine: &Machine, cli: Cli, images: &[&str]) {
    let loader: &[&str] = match cli {
        Cli::Docker => {
            machine.start_docker();
            &["docker", "load", "-qi"]
        }
        Cli::RootlessDocker => {
            machine.start_rootless_docker();
            &["docker", "load", "-qi"]
        }
        Cli::Ctr | Cli::Cri => {
            machine.start_containerd();
            &["ctr", "-n", "k8s.io", "image", "import"]
        }
        Cli::Podman | Cli::RootlessPodman => &["podman", "load", "-qi"],
    };
    for name in images {
        let archive = image(name, "docker.tar");
        let words = [loader, &[archive.to_str().unwrap()]].concat();
        let ended = run(&mut cli.command(machine, &words));
        assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
    }
}

/// What a program in a container can use, in parts. No driver stands behind the nodes: who may open them is told that there
/// is no such device. Nodes of other GPUs and of other MIG devices, made in the container, must not be opened.
const PROBE: &str = "readlink /usr/local/nvidia/lib64/libcuda.so.1; /app/probe libcuda.so.1 | tail -n 1
     echo --; nvidia-smi -L
     echo --; df -k /dev/shm | awk 'END { print $2 }'
     echo --; cd /dev; nodes=$(for node in nvidia* nvidia-caps/*; do [ ! -c $node ] || echo $node; done); echo \"$nodes\"
     echo --; for node in $nodes; do (: < $node); done 2>&1 | grep -v 'No such device or address'
     other() { [ -e $1 ] || { mknod /tmp/other c $2 $3 && (: < /tmp/other); rm -f /tmp/other; }; }
     { for minor in 0 1 2 3 4 5 6 7; do other nvidia$minor 195 $minor; done
       for minor in 1 2 21 22 66 67 75 76; do other nvidia-caps/nvidia-cap$minor 236 $minor; done
     } 2>&1 | grep -v 'Operation not permitted'";
/// What it says where the driver is there, up to nvidia-smi.
const LOADED: &str = "libcuda.so.550.163.01\nlibcuda.so.1: loaded\n";

/// The same, read.
#[derive(Debug)]
struct Saw {
    gpus: Vec<String>,
    shm: u64,
    nodes: Vec<String>,
}

fn probe(way: Way, machine: &Machine, devices: &str) -> Saw {
    let ended = way.run(machine, Some(devices), "", CUDA_IMAGE, &["sh", "-c", PROBE]);
    let parts: Vec<&str> = ended.out.split("--\n").collect();
    let [driver, gpus, shm, nodes, access] = parts[..] else { panic!("{devices}: {ended:?}") };
    assert_eq!((driver, access), (LOADED, ""), "{devices}: {ended:?}");
    let lines = |text: &str| text.lines().map(String::from).collect();
    let mut nodes: Vec<String> = lines(nodes);
    // A document is for every capability.
    nodes.retain(|node| node != "nvidia-modeset" || !way.may_be_the_engines_own());
    Saw { gpus: lines(gpus), shm: shm.trim().parse().unwrap(), nodes }
}

/// As kubelets of Kubernetes 1.28 and newer hand on what they are answered, for a resource as for a claim.
#[test]
fn containerd_finds_the_device_that_the_device_plugin_names() {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    start(&machine, Cli::Cri, &["pause", CUDA_IMAGE]);
    let sockets = machine.shared().join("kubelet");
    fs::create_dir(&sockets).unwrap();
    let kubelet = Kubelet::start(&sockets);
    machine.sh(&format!(
        "{} --device-list-strategy cdi-cri --kubelet-socket {}/kubelet.sock > /var/log/plugin.log 2>&1 &",
        dist("gpurun-device-plugin").display(),
        sockets.display()
    ));
    let gpu = &description("8xh100").gpus[5];
    let answer = kubelet.resource("nvidia.com/gpu").allocate(&[&gpu.uuid]).unwrap();
    let names: Vec<_> = answer.cdi_devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, [format!("k8s.device-plugin.nvidia.com/gpu={}", gpu.uuid)]);
    let saw = probe(way(Cli::Cri, "runc", Asks::Cdi), &machine, names[0]);
    assert!(saw.gpus.len() == 1 && saw.gpus[0].contains(&gpu.uuid), "{saw:?}");
    let nodes = [format!("nvidia{}", gpu.minor)].into_iter();
    let nodes: Vec<_> =
        nodes.chain(["nvidia-uvm", "nvidia-uvm-tools", "nvidiactl"].map(String::from)).collect();
    assert_eq!(saw.nodes.iter().collect::<BTreeSet<_>>(), nodes.iter().collect(), "{saw:?}");
}

/// What every engine must do, however it is asked.
fn checks(way: Way, machine: &Machine) {
    let gpus = description("8xh100").gpus;
    let nodes = |minors: &mut dyn Iterator<Item = u32>| {
        let mut all: Vec<String> = minors.map(|minor| format!("nvidia{minor}")).collect();
        all.extend(["nvidia-uvm", "nvidia-uvm-tools", "nvidiactl"].map(String::from));
        all.sort();
        all
    };

    let all = probe(way, machine, "all");
    assert_eq!((all.gpus.len(), &all.nodes), (8, &nodes(&mut gpus.iter().map(|gpu| gpu.minor))), "{all:?}");
    assert!(all.shm > 64 << 10 || way.may_be_the_engines_own(), "{all:?}");

    let gpu = &gpus[5];
    let one = probe(way, machine, &gpu.uuid);
    assert!(one.gpus.len() == 1 && one.gpus[0].contains(&gpu.uuid), "{one:?}");
    assert_eq!(one.nodes, nodes(&mut [gpu.minor].into_iter()), "{one:?}");

    // There are no words for it in --gpus and in CDI.
    if way.asks == Asks::Environment {
        let none = probe(way, machine, "none");
        assert_eq!(
            (&none.gpus[..], &none.nodes),
            (&["No devices found.".into()][..], &nodes(&mut [].into_iter()))
        );
    }

    let script = "ls -d /dev/nvidia* /usr/local/nvidia; env | grep NVIDIA; echo it ran";
    let nothing = way.run(machine, None, "", PLAIN_IMAGE, &["sh", "-c", script]);
    assert!(nothing.code == 0 && nothing.out == "it ran\n", "{nothing:?}");

    let refused = way.run(machine, Some("99"), "", CUDA_IMAGE, &["echo", "it ran"]);
    assert!(refused.code != 0 && refused.out.is_empty(), "{refused:?}");
    let ours = refused.err.contains("error[GPU-0021]: ") && refused.err.contains("fix: ");
    // Who reads the document refuses what is not in it, and containerd 2 reads annotations, too.
    let engines =
        refused.err.contains("nvidia.com/gpu=99") && matches!(way.asks, Asks::Cdi | Asks::Annotation);
    assert!(ours || engines, "{refused:?}");
}

/// On a host with a GPU that is cut into MIG devices and one that is not.
fn checks_of_mig(way: Way, machine: &Machine) {
    let description = description("a100-mig");
    let [cut, whole] = &description.gpus[..] else { panic!("two GPUs") };
    let parts = &cut.mig.as_ref().unwrap().devices;
    // MIG devices have one minor number for their GPU instance and one for their compute instance.
    let caps = |part: &SimulatedMig| {
        part.cap_minors(cut.minor).map(|minor| format!("nvidia-caps/nvidia-cap{minor}"))
    };
    let expected = |gpus: &[&SimulatedGpu], parts: &[SimulatedMig]| {
        let mut nodes: Vec<String> = gpus.iter().map(|gpu| format!("nvidia{}", gpu.minor)).collect();
        nodes.extend(["nvidia-uvm", "nvidia-uvm-tools", "nvidiactl"].map(String::from));
        nodes.extend(parts.iter().flat_map(caps));
        nodes.sort();
        nodes
    };
    let asked = [
        ("1", &[whole][..], &[][..]),
        ("0:0", &[cut], &parts[..1]),
        (&parts[2].uuid, &[cut], &parts[2..]),
        ("all", &[cut, whole], parts),
    ];
    // At once: an engine mostly waits.
    thread::scope(|scope| {
        for (devices, gpus, parts) in asked {
            scope.spawn(move || {
                let mut saw = probe(way, machine, devices);
                saw.nodes.sort();
                assert_eq!(saw.nodes, expected(gpus, parts), "{devices}: {saw:?}");
                let uuids = gpus.iter().map(|gpu| &gpu.uuid).chain(parts.iter().map(|part| &part.uuid));
                let uuids: Vec<_> = uuids.collect();
                let is_there = |uuid: &&String| saw.gpus.iter().any(|line| line.contains(*uuid));
                assert!(saw.gpus.len() == uuids.len() && uuids.iter().all(is_there), "{devices}: {saw:?}");
            });
        }
    });
}

/// What the engines of a suite know: Docker 20.10 and containerd 1.6 are older than CDI.
fn ways(suite: Suite) -> impl Iterator<Item = Way> {
    let podman = |way: &Way| matches!(way.cli, Cli::Podman | Cli::RootlessPodman);
    WAYS.into_iter().filter(move |way| suite == Suite::Sid || way.asks != Asks::Cdi || podman(way))
}

/// Why this host cannot run containers in this way, whoever asks.
fn cannot(way: &Way, machine: &Machine) -> Option<&'static str> {
    let says = |script: &str| run(&mut machine.command(&["sh", "-c", script])).code == 0;
    let cgroup_2 = says("test -e /sys/fs/cgroup/cgroup.controllers");
    if way.cli == Cli::Cri && cgroup_2 && !says("grep -qw cpu /sys/fs/cgroup/cgroup.controllers") {
        return Some(
            "a pod's sandbox gets a cpu.weight, and the host has its cpu controller in a hierarchy of version 1",
        );
    }
    if way.cli == Cli::Podman
        && way.runtime == "crun"
        && cgroup_2
        && says("crun --version | grep -q '^crun version 1.8'")
        && !says("ulimit -l unlimited")
    {
        return Some(
            "crun 1.8 wants unlimited memory for its eBPF programs, and root here may not raise limits",
        );
    }
    None
}

/// Not by eprintln: a test that passes shows nothing of that.
fn left_out_of_the_tests(suite: Suite, cgroups: Cgroups, why: &str) {
    let _ = writeln!(io::stderr(), "{suite:?} with cgroup {cgroups:?}: left out: {why}");
}

fn every_way(suite: Suite, cgroups: Cgroups) {
    if !Cgroups::possible().contains(&cgroups) {
        return left_out_of_the_tests(suite, cgroups, "this host has no such hierarchies");
    }
    let machine = Machine::start(suite, cgroups);
    start(&machine, Cli::Docker, &[CUDA_IMAGE, PLAIN_IMAGE]);
    start(&machine, Cli::Cri, &[CUDA_IMAGE, PLAIN_IMAGE, "pause"]);
    start(&machine, Cli::Podman, &[CUDA_IMAGE, PLAIN_IMAGE]);
    start(&machine, Cli::RootlessDocker, &[CUDA_IMAGE, PLAIN_IMAGE]);
    start(&machine, Cli::RootlessPodman, &[CUDA_IMAGE, PLAIN_IMAGE]);
    let (possible, left_out): (Vec<Way>, Vec<Way>) =
        ways(suite).partition(|way| cannot(way, &machine).is_none());
    let reasons: BTreeSet<String> = left_out
        .iter()
        .filter_map(|way| Some(format!("{:?} above {}: {}", way.cli, way.runtime, cannot(way, &machine)?)))
        .collect();
    for reason in reasons {
        left_out_of_the_tests(suite, cgroups, &reason);
    }
    let fails = |way: &Way, checks: fn(Way, &Machine)| {
        machine.hand_over_to(if way.runtime == "crun" { "crun" } else { "runc" });
        catch_unwind(AssertUnwindSafe(|| checks(*way, &machine))).is_err()
    };
    let mut failed: Vec<Way> = possible.iter().filter(|way| fails(way, checks)).copied().collect();
    machine.become_host("a100-mig");
    let by_document = possible.into_iter().filter(|way| way.asks == Asks::Cdi);
    failed.extend(by_document.filter(|way| fails(way, checks_of_mig)));
    assert!(failed.is_empty(), "{failed:#?}");
    let containers = "docker ps -aq; podman ps -aq; ctr -n k8s.io containers ls -q";
    assert_eq!(machine.sh(containers), "", "every container is removed");
    // The last of them may be about to end.
    until("nothing is left running", || {
        machine.sh("pgrep 'shim|conmon|runc|crun|gpurun|sleep' || true").is_empty()
    });
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

const DOCKER: Way = way(Cli::Docker, "gpurun", Asks::Gpus);
const PODMAN: Way = way(Cli::Podman, "crun", Asks::Environment);

#[test]
fn every_c_librarys_loader_finds_the_driver_in_a_read_only_root_too() {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    machine.hand_over_to("crun");
    for way in [DOCKER, PODMAN] {
        start(&machine, way.cli, &[CUDA_IMAGE, "distroless", "musl"]);
        for options in ["", "--read-only"] {
            let probe =
                |image: &str, command: &[&str]| way.run(&machine, Some("all"), options, image, command);
            let glibc = probe(CUDA_IMAGE, &["sh", "-c", PROBE]);
            assert!(glibc.out.starts_with(LOADED), "{way:?} {options} {glibc:?}");
            // It has nothing that the real libcuda wants beside the C library.
            let distroless = probe("distroless", &["/app/probe", "libnvidia-ml.so.1"]);
            assert!(
                distroless.out.ends_with("libnvidia-ml.so.1: loaded\n"),
                "{way:?} {options} {distroless:?}"
            );
            // The driver is made for another C library: it is found, and has symbols that this one lacks.
            let musl = probe(
                "musl",
                &["sh", "-c", "cat /etc/ld-musl-x86_64.path; /app/probe libcuda.so.1 libcuda.so.2"],
            );
            assert!(
                musl.out.starts_with("/lib:/opt/lib:/usr/local/nvidia/lib64"),
                "{way:?} {options} {musl:?}"
            );
            assert!(
                musl.out.contains("/usr/local/nvidia/lib64/libcuda.so.1: "),
                "{way:?} {options} {musl:?}"
            );
        }
    }
}

#[test]
fn packages_are_installed_in_a_gpu_container_as_in_any() {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    machine.hand_over_to("crun");
    let package = cached("packages");
    let package = package.display();
    let own = "ldconfig -p | sed 's/.* => //' | grep '^/' | grep -v -e libyaml -e libcuda -e libnvidia -e /usr/local/nvidia";
    let script = format!(
        "set -e; {own}; echo --; apt-get -qq install -y {package}/libyaml.deb > /dev/null 2>&1; {own}; echo --; ldconfig; {own}; echo --
         python3 -c 'import ctypes; [ctypes.CDLL(name) for name in (\"libcuda.so.1\", \"libnvidia-ml.so.1\", \"libyaml-0.so.2\")]'
         nvidia-smi -L | wc -l"
    );
    for way in [DOCKER, way(Cli::Podman, "crun", Asks::Environment)] {
        start(&machine, way.cli, &["debian-python"]);
        let options = format!("--volume {package}:{package}:ro");
        let sh = |devices: &str, script: &str| {
            // Docker's --gpus has no word for "nothing".
            let way = Way { asks: if devices == "void" { Asks::Environment } else { way.asks }, ..way };
            let ended = way.run(&machine, Some(devices), &options, "debian-python", &["sh", "-c", script]);
            assert_eq!(ended.code, 0, "{way:?} {devices} {ended:?}");
            ended.out
        };
        let before = sh("void", own);
        assert!(before.lines().count() > 20, "{before}");
        assert_eq!(sh("all", &script), format!("{before}--\n{before}--\n{before}--\n8\n"), "{way:?}");
    }
}

#[test]
fn a_container_that_is_stopped_or_committed_starts_on_another_driver() {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    start(&machine, Cli::Docker, &[CUDA_IMAGE]);
    // The driver that is loaded, the GPUs that it has, and the versions that are seen in any place.
    let driver = "/app/probe libcuda.so.1 | tail -n 1; nvidia-smi -L | wc -l; \
        cd /usr/local/nvidia; { ls -R; strings /etc/ld.so.cache; } | sed -n 's/.*[.]so[.]\\(5[0-9.]*\\)$/\\1/p' | sort -u";
    let on = |version: &str| format!("libcuda.so.1: loaded\n8\n{version}\n");
    start(&machine, Cli::Podman, &[CUDA_IMAGE]);
    let podman = "podman --runtime gpurun";
    for (engine, asks) in [("docker", "--gpus all"), (podman, "--env NVIDIA_VISIBLE_DEVICES=all")] {
        let of = |container: &str| {
            let words: Vec<&str> = engine.split(' ').chain(container.split(' ')).collect();
            let ended = run(&mut machine.command(&[&words[..], &["sh", "-c", driver]].concat()));
            assert_eq!(ended.code, 0, "{engine} {ended:?}");
            ended.out
        };
        machine.sh(&format!("{engine} run --detach --name kept {asks} cuda sleep infinity"));
        assert_eq!(of("exec kept"), on("550.163.01"), "{engine}");
        machine.sh(&format!("{engine} stop -t 0 kept"));
        machine.install_driver(535);
        machine.sh(&format!("{engine} start kept"));
        assert_eq!(of("exec kept"), on("535.216.03"), "{engine}");
        machine.sh(&format!("{engine} commit kept committed && {engine} rm --force kept"));
        machine.install_driver(550);
        assert_eq!(of(&format!("run {asks} committed")), on("550.163.01"), "{engine}");
    }
}

#[test]
fn the_example_of_a_compose_file_becomes_healthy() {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    start(&machine, Cli::Docker, &[CUDA_IMAGE]);
    let compose = |words: &str| {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/compose");
        machine.sh(&format!("cd {directory} && docker compose -f compose.yaml -f simulated.yaml {words}"))
    };
    compose("--progress quiet up --wait --wait-timeout 60");
    let seen = "'nvidia-smi -L | wc -l; id -u; df -m /dev/shm | awk \"END { print \\$2 }\"; touch /x 2>/dev/null && echo writable'";
    let of = |service: &str| compose(&format!("exec -T {service} sh -c {seen} || true"));
    assert_eq!(of("training"), "8\n1000\n1024\n");
    let inference = of("inference");
    assert!(inference.starts_with("1\n0\n") && !inference.contains("writable"), "{inference}");
    let monitor = of("monitor");
    assert!(monitor.starts_with("8\n0\n") && monitor.ends_with("writable\n"), "{monitor}");
    let notebook = of("notebook");
    assert!(notebook.starts_with("2\n"), "{notebook}");
    assert_eq!(
        compose("ps --format '{{.Service}} {{.Health}}' | sort"),
        "inference healthy\nmonitor \nnotebook \ntraining \n"
    );
    compose("--progress quiet down --volumes --timeout 0");
    assert_eq!(machine.sh("docker ps -aq; pgrep -l 'shim|sleep' || true"), "");
}

#[test]
fn nothing_of_a_machine_is_left_on_the_host() {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    start(&machine, Cli::Docker, &[CUDA_IMAGE]);
    let word = unique();
    machine.sh(&format!("docker run --detach --gpus all --env WORD={word} cuda sleep infinity"));
    let (shared, cgroup) = (machine.shared().to_owned(), machine.cgroup());
    let mounted = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(shared.parent().unwrap().to_str().unwrap())
    };
    let cgroups = || run(Command::new("find").args(["/sys/fs/cgroup", "-name", &cgroup])).out;
    assert!(!mounted() && !cgroups().is_empty() && processes_with(&word).len() == 1);
    drop(machine);
    assert!(!mounted() && processes_with(&word).is_empty() && !shared.exists());
    assert_eq!(cgroups(), "");
}
