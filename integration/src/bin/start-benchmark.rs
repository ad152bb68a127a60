//! Starts a container and waits for its end, with gpurun and with others, in turn, and prints the medians and their ratios.
//!
//! `integration/bench` prepares what it needs. Absolute times are this machine's; the ratios are what is compared.

use gpurun_integration::{TestHost, cached, dist};
use std::{
    env, fs,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

struct Contender {
    name: &'static str,
    command: Command,
    times: Vec<Duration>,
}

fn main() {
    let rounds: usize = env::args().nth(1).map_or(100, |n| n.parse().expect("the number of rounds"));
    let root = cached("images/debian-python/root");
    let host = TestHost::new("8xh100");
    let namespace = Namespace::new();
    let bundles = tempfile::tempdir().expect("a temporary directory");
    let mut contenders = vec![
        contender("gpurun, 8 GPUs", gpurun(&host, &["--gpus", "all"], &root)),
        contender("gpurun, no GPU", gpurun(&host, &[], &root)),
        contender("gpurun as a user, 8 GPUs", gpurun_as_user(&host, &root)),
        contender("runc run, no GPU", runtime(Command::new("runc"), bundles.path(), "runc", &root, &[])),
        contender(
            "crun run, no GPU",
            runtime(crun(&namespace), bundles.path(), "crun", &root, &["--cgroup-manager=cgroupfs"]),
        ),
        contender("/bin/true itself", Command::new("/bin/true")),
    ];
    for round in 0..rounds + 3 {
        for contender in &mut contenders {
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
    let median = |contender: &Contender| {
        let mut times = contender.times.clone();
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1000.0
    };
    let [runc, crun] = [3, 4].map(|n| median(&contenders[n]));
    println!(
        "| start to exit of /bin/true, median of {rounds} | ms | of runc | of crun |\n|---|---|---|---|"
    );
    for contender in &contenders {
        let ms = median(contender);
        println!("| {} | {ms:.1} | {:.2} | {:.2} |", contender.name, ms / runc, ms / crun);
    }
    println!("\nlauncher while its container runs: {} kB resident", resident(&host, &root));
    println!("start-path binary: {} kB", fs::metadata(dist("gpurun")).expect("dist/gpurun").len() / 1024);
}

fn contender(name: &'static str, command: Command) -> Contender {
    Contender { name, command, times: Vec::new() }
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
