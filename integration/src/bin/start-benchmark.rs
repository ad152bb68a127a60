//! Starts a container and waits for its end, with gpurun and with others, in turn, and prints the medians and their ratios.
//!
//! `integration/bench` prepares what it needs. Absolute times are this machine's; the ratios are what is compared.

use gpurun::formats::cdi::Document;
use gpurun_integration::{
    TestHost, cached,
    cdi::inject,
    copy_of_root, dist,
    engines::{Cgroups, Machine, Suite},
    must,
};
use std::{
    collections::hash_map::RandomState,
    env, fs,
    hash::BuildHasher,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

struct Contender {
    name: &'static str,
    command: Command,
    /// A bundle's configuration, which the runtime edits: written anew for each start, as an engine does.
    bundle: Option<(PathBuf, Vec<u8>)>,
    times: Vec<Duration>,
}

fn main() {
    let rounds: usize = env::args().nth(1).map_or(100, |n| n.parse().expect("the number of rounds"));
    let root = cached("images/debian-python/root");
    let bundles = tempfile::tempdir().expect("a temporary directory");
    launcher(rounds, bundles.path(), &root);
    wrapper(rounds);
    documents(rounds);
    engine(rounds);
}

/// The launcher, on a host with stand-ins for the driver's files.
fn launcher(rounds: usize, bundles: &Path, root: &Path) {
    let host = TestHost::new("8xh100");
    let namespace = Namespace::new();
    let mut contenders = vec![
        contender("gpurun, 8 GPUs", gpurun(&host, &["--gpus", "all"], root)),
        contender("gpurun, no GPU", gpurun(&host, &[], root)),
        contender("gpurun as a user, 8 GPUs", gpurun_as_user(&host, root)),
        contender("runc run, no GPU", runtime(Command::new("runc"), bundles, "runc", root, &[])),
        contender(
            "crun run, no GPU",
            runtime(crun(&namespace), bundles, "crun", root, &["--cgroup-manager=cgroupfs"]),
        ),
        contender("/bin/true itself", Command::new("/bin/true")),
    ];
    take_turns(rounds, &mut contenders);
    let [runc, crun] = [3, 4].map(|n| median(&contenders[n]));
    println!(
        "| start to exit of /bin/true, median of {rounds} | ms | of runc | of crun |\n|---|---|---|---|"
    );
    for contender in &contenders {
        let ms = median(contender);
        println!("| {} | {ms:.1} | {:.2} | {:.2} |", contender.name, ms / runc, ms / crun);
    }
    println!("\nlauncher while its container runs: {} kB resident", resident(&host, root));
    println!("start-path binary: {} kB", fs::metadata(dist("gpurun")).expect("dist/gpurun").len() / 1024);
}

/// The runtime that engines call, above runc: with the specification that Docker 28.5 writes, with its bundle in memory as
/// Docker's are, and on the files of a real driver.
fn wrapper(rounds: usize) {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let root = copy_of_root("debian-python");
    let bundles = tempfile::tempdir_in("/run").expect("a temporary directory");
    let make = |name: &'static str, runtime: &Path, wish: Option<&str>| {
        let bundle = bundles.path().join(name.replace([' ', ','], "-"));
        fs::create_dir(&bundle).expect("a new directory");
        let mut spec: serde_json::Value =
            serde_json::from_str(include_str!("../../docker-28.5.json")).expect("JSON");
        spec["root"]["path"] = root.path().display().to_string().into();
        let env = spec["process"]["env"].as_array_mut().expect("a list");
        if let Some(wish) = wish {
            env.push(format!("NVIDIA_VISIBLE_DEVICES={wish}").into());
            env.push("NVIDIA_DRIVER_CAPABILITIES=all".into());
        }
        // The calls of an engine.
        let mut command = Command::new("sh");
        command
            .args([
                "-ec",
                "$0 --root $1 create --bundle $2 $3; $0 --root $1 start $3; $0 --root $1 delete --force $3",
            ])
            .args([runtime, &bundles.path().join("state"), &bundle])
            .arg(format!("benchmark-{}", bundles.path().file_name().expect("it has one").display()))
            .env("GPURUN_SIMULATED_HOST", host.path())
            .env("GPURUN_STATE_DIR", host.state_dir(0));
        Contender {
            bundle: Some((bundle.join("config.json"), spec.to_string().into())),
            ..contender(name, command)
        }
    };
    let (runc, gpurun) = (Path::new("runc"), dist("gpurun-runtime"));
    let mut contenders = [
        make("runc, no GPU", runc, None),
        make("gpurun-runtime and runc, nothing asked for", &gpurun, None),
        make("gpurun-runtime and runc, 1 GPU", &gpurun, Some("0")),
        make("gpurun-runtime and runc, 8 GPUs", &gpurun, Some("all")),
    ];
    take_turns(rounds, &mut contenders);
    compare("create, start and delete of /bin/true", rounds, &contenders);
}

/// What engines do that read CDI documents: the document of eight GPUs, its hook, and a container of it under plain runc.
fn documents(rounds: usize) {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let output = tempfile::tempdir().expect("a temporary directory");
    let generate = |state: Option<&str>| {
        let mut command = host.gpurun();
        command.args(["cdi", "generate", "--hook"]).arg(dist("gpurun-hook"));
        command.arg("--output").arg(output.path().join("nvidia.yaml"));
        // A place in which no snapshot can be: NVML is read each time.
        state.map(|state| command.env("GPURUN_STATE_DIR", state));
        command
    };
    let mut hook = Command::new(dist("gpurun-hook"));
    hook.arg("nothing").stderr(Stdio::null());
    let mut contenders = [
        contender("/bin/true itself", Command::new("/bin/true")),
        contender("gpurun-hook, for nothing", hook),
        contender("gpurun cdi generate, from the snapshot", generate(None)),
        contender("gpurun cdi generate, NVML read afresh", generate(Some("/dev/null"))),
    ];
    take_turns(rounds, &mut contenders);
    compare("to its exit", rounds, &contenders);

    let text = generate_text(&host);
    let document = Document::parse(&text).expect("a CDI document");
    let root = copy_of_root("debian-python");
    let bundles = tempfile::tempdir_in("/run").expect("a temporary directory");
    let make = |name: &'static str, devices: &[&str]| {
        let bundle = bundles.path().join(name.replace([' ', ','], "-"));
        fs::create_dir(&bundle).expect("a new directory");
        let mut spec: serde_json::Value =
            serde_json::from_str(include_str!("../../docker-28.5.json")).expect("JSON");
        spec["root"]["path"] = root.path().display().to_string().into();
        if !devices.is_empty() {
            inject(&document, devices, &mut spec);
        }
        let mut command = Command::new("runc");
        command
            .args(["run", "--bundle"])
            .arg(&bundle)
            .arg(format!("benchmark-{}", bundles.path().file_name().expect("it has one").display()));
        Contender {
            bundle: Some((bundle.join("config.json"), spec.to_string().into())),
            ..contender(name, command)
        }
    };
    let mut contenders = [
        make("runc, no GPU", &[]),
        make("runc, document, 1 GPU", &["0"]),
        make("runc, document, 8 GPUs", &["all"]),
    ];
    take_turns(rounds, &mut contenders);
    compare("create, start and delete of /bin/true", rounds, &contenders);
}

fn generate_text(host: &TestHost) -> String {
    must(host.gpurun().args(["cdi", "generate", "--hook"]).arg(dist("gpurun-hook")))
}

/// The same as users see it: `docker run` of Docker 28.5 with its default runtime and with gpurun's.
fn engine(rounds: usize) {
    let machine = Machine::start(Suite::Sid, Cgroups::V1);
    machine.start_docker();
    let archive = cached("images/busybox/docker.tar");
    let loaded = machine.command(&["docker", "load", "-qi", &archive.display().to_string()]).status();
    assert!(loaded.expect("docker starts").success());
    let run = |name, options: &[&str]| {
        let words = [&["docker", "run", "--rm", "--network=none"], options, &["busybox", "true"]].concat();
        contender(name, machine.command(&words))
    };
    let mut contenders = [
        run("docker run, runc, no GPU", &["--runtime=runc"]),
        run("docker run, gpurun-runtime, nothing asked for", &["--runtime=gpurun"]),
        run("docker run, gpurun-runtime, 8 GPUs", &["--runtime=gpurun", "--env=NVIDIA_VISIBLE_DEVICES=all"]),
    ];
    take_turns(rounds, &mut contenders);
    compare("docker run --rm busybox true", rounds, &contenders);
}

/// A table of medians, and of what they are of the first contender's.
fn compare(what: &str, rounds: usize, contenders: &[Contender]) {
    let first = median(&contenders[0]);
    println!("\n| {what}, median of {rounds} | ms | of the first |\n|---|---|---|");
    for contender in contenders {
        let ms = median(contender);
        println!("| {} | {ms:.1} | {:.2} |", contender.name, ms / first);
    }
}

fn take_turns(rounds: usize, contenders: &mut [Contender]) {
    let mut order: Vec<usize> = (0..contenders.len()).collect();
    for round in 0..rounds + 3 {
        // What one leaves to be cleaned up slows the next: each comes after each.
        order.sort_by_key(|_| BuildHasher::hash_one(&RandomState::new(), round));
        for &at in &order {
            let contender = &mut contenders[at];
            if let Some((config, content)) = &contender.bundle {
                fs::write(config, content).expect("config.json can be written");
            }
            let started = Instant::now();
            let status = contender.command.stdin(Stdio::null()).status().expect("it starts");
            let took = started.elapsed();
            assert!(status.success(), "{}: {status}", contender.name);
            // The first rounds fill caches: the inventory's snapshot, the page cache.
            if round >= 3 {
                contender.times.push(took);
            }
        }
    }
}

fn median(contender: &Contender) -> f64 {
    let mut times = contender.times.clone();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn contender(name: &'static str, command: Command) -> Contender {
    Contender { name, command, bundle: None, times: Vec::new() }
}

fn gpurun(host: &TestHost, options: &[&str], root: &Path) -> Command {
    let mut command = host.gpurun();
    command.args(options).arg(format!("rootfs:{}", root.display())).arg("/bin/true");
    command
}

fn gpurun_as_user(host: &TestHost, root: &Path) -> Command {
    let mut command = host.gpurun_as_user();
    command.args(["--gpus", "all"]).arg(format!("rootfs:{}", root.display())).arg("/bin/true");
    command
}

/// crun of Debian sid. It refuses a host with both cgroup versions, so it starts in a mount namespace in which the second
/// one is taken away; the way there is one system call, no program.
fn crun(namespace: &Namespace) -> Command {
    let mut command = Command::new(cached("crun/usr/bin/crun"));
    let mounts =
        fs::File::open(format!("/proc/{}/ns/mnt", namespace.0.id())).expect("the namespace's process lives");
    // SAFETY: between fork and exec the closure makes one system call and touches no lock and no heap.
    unsafe {
        command.pre_exec(move || Ok(nix::sched::setns(&mounts, nix::sched::CloneFlags::CLONE_NEWNS)?));
    }
    command
}

/// A process that keeps a mount namespace without /sys/fs/cgroup/unified.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let script = "umount /sys/fs/cgroup/unified 2>/dev/null; echo ready; exec sleep infinity";
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut ready = [0; 6];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut ready).expect("it says ready");
        Self(child)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("the process is ours");
    }
}

/// `run` of an OCI runtime, on the specification that `runc spec` writes, with this root.
fn runtime(mut command: Command, bundles: &Path, name: &str, root: &Path, options: &[&str]) -> Command {
    let bundle: PathBuf = bundles.join(name);
    fs::create_dir(&bundle).expect("a new directory");
    let made = Command::new("runc").arg("spec").current_dir(&bundle).status().expect("runc starts");
    assert!(made.success());
    let config = bundle.join("config.json");
    let mut spec: serde_json::Value =
        serde_json::from_slice(&fs::read(&config).expect("config.json")).expect("JSON");
    spec["root"]["path"] = root.display().to_string().into();
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["/bin/true"]);
    // Neither gpurun nor runc raises this limit where the machine does not allow it.
    spec["process"].as_object_mut().expect("an object").remove("rlimits");
    fs::write(&config, spec.to_string()).expect("config.json can be written");
    command.args(options).arg("run").arg("--bundle").arg(&bundle).arg(format!("benchmark-{name}"));
    command
}

/// RssAnon and RssFile of gpurun while a container sleeps.
fn resident(host: &TestHost, root: &Path) -> u64 {
    let mut command = host.gpurun();
    command.args(["--gpus", "all"]).arg(format!("rootfs:{}", root.display())).args(["sleep", "1"]);
    let mut child = command.spawn().expect("gpurun starts");
    std::thread::sleep(Duration::from_millis(500));
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    assert!(child.wait().expect("it ends").success());
    line.split_whitespace().nth(1).and_then(|kb| kb.parse().ok()).expect("a number")
}
