//! Brings the image of `large-image` into a store with gpurun and with others, in turn, each time on a filesystem that nobody
//! used before, and prints medians and ratios.
//!
//! `integration/bench images` prepares what it needs. The filesystems are ext4, in memory: what is compared is work, not disks.

use gpurun_integration::{
    TestHost, cached,
    engines::{Cgroups, Machine, Suite},
    must,
    registry::{Packed, Registry},
};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;
use std::{
    collections::hash_map::RandomState,
    env, fs,
    hash::BuildHasher,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};
use tempfile::TempDir;

/// What one run took: seconds of the clock, of processors, and MB of the largest process.
#[derive(Clone, Copy)]
struct Run {
    wall: f64,
    cpu: f64,
    memory: f64,
}

struct Contender<'a> {
    name: &'a str,
    run: Box<dyn Fn() -> Run + 'a>,
    runs: Vec<Run>,
}

fn main() {
    let mut words = env::args().skip(1);
    let rounds: usize = match words.next().as_deref() {
        Some("measure") => return measured(&words.collect::<Vec<_>>()),
        rounds => rounds.map_or(5, |n| n.parse().expect("the number of rounds")),
    };
    let image = cached("images/large");
    let (oci, archives) = (image.join("oci"), memory());
    let host = TestHost::new("t4");

    let packed_archive = archives.path().join("docker-gzip.tar");
    archive_of_blobs(&oci, &packed_archive);
    let storage = memory();
    let registry = Registry::plain(storage.path());
    for tag in ["gzip", "zstd"] {
        registry.push("large", tag, &Packed::read(&oci, tag));
    }

    let gpurun = |image: String| {
        let host = &host;
        Box::new(move || {
            let disk = Disk::new();
            disk.mount(None, &disk.directory());
            let store = disk.directory().join("store");
            let run = measure(host.gpurun().args(["pull", &image]).env("GPURUN_STORE", store));
            disk.unmount();
            run
        }) as Box<dyn Fn() -> Run>
    };
    let (plain, packed) =
        (image.join("docker.tar").display().to_string(), packed_archive.display().to_string());
    let from = |tag: &str| format!("{}/large:{tag}", registry.address);
    let contender = |name, run| Contender { name, run, runs: Vec::new() };
    let machine = Machine::start(Suite::Sid, Cgroups::V1);
    let mut contenders = [
        contender("docker load 28.5, gzip", docker_load(&machine, &packed)),
        contender("docker load 28.5, not compressed", docker_load(&machine, &plain)),
        contender("skopeo copy and umoci unpack, gzip", skopeo_and_umoci(from("gzip"))),
        contender("gpurun, docker-archive:, gzip", gpurun(format!("docker-archive:{packed}"))),
        contender("gpurun, docker-archive:, not compressed", gpurun(format!("docker-archive:{plain}"))),
        contender("gpurun, oci:, gzip", gpurun(format!("oci:{}:gzip", oci.display()))),
        contender("gpurun, oci:, zstd", gpurun(format!("oci:{}:zstd", oci.display()))),
        contender("gpurun, a registry, gzip", gpurun(from("gzip"))),
        contender("gpurun, a registry, zstd", gpurun(from("zstd"))),
    ];
    let mut order: Vec<usize> = (0..contenders.len()).collect();
    for round in 0..rounds {
        order.sort_by_key(|_| BuildHasher::hash_one(&RandomState::new(), round));
        for &at in &order {
            let run = (contenders[at].run)();
            eprintln!(
                "{}: {:.2} s, {:.2} s of processors, {:.0} MB",
                contenders[at].name, run.wall, run.cpu, run.memory
            );
            contenders[at].runs.push(run);
        }
    }
    println!(
        "| 2 GB in 37 000 files, median of {rounds} | s | of docker load | of skopeo and umoci | CPU s | of docker load | peak MB |"
    );
    println!("|---|---|---|---|---|---|---|");
    let first = |value: fn(&Run) -> f64, at: usize| median(&contenders[at], value);
    for (at, contender) in contenders.iter().enumerate() {
        // What is not compressed is less work for all.
        let docker = usize::from(contender.name.ends_with("not compressed"));
        let (wall, cpu) = (median(contender, |run| run.wall), median(contender, |run| run.cpu));
        println!(
            "| {} | {wall:.1} | {:.2} | {:.2} | {cpu:.1} | {:.2} | {:.0} |",
            contender.name,
            wall / first(|run| run.wall, docker),
            wall / first(|run| run.wall, 2),
            cpu / first(|run| run.cpu, docker),
            median(contender, |run| run.memory),
        );
        if at == 8 {
            for (registry, layout) in [(7, 5), (8, 6)] {
                let ratio = first(|run| run.wall, registry) / first(|run| run.wall, layout);
                println!("\n{}: {ratio:.2} of {}", contenders[registry].name, contenders[layout].name);
            }
        }
    }
}

fn median(contender: &Contender, value: fn(&Run) -> f64) -> f64 {
    let mut values: Vec<f64> = contender.runs.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a file system in memory")
}

/// What `docker buildx build -o type=docker` writes: layers with gzip.
fn archive_of_blobs(oci: &Path, archive: &Path) {
    let packed = Packed::read(oci, "gzip");
    let path = |digest: &str| format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
    let layers: Vec<_> = (0..packed.layers.len()).map(|at| path(&packed.blob(at))).collect();
    let config = path(&gpurun::image::Digest::of(&packed.config).to_string());
    let manifest = json!([{"Config": config, "RepoTags": ["large:gzip"], "Layers": layers}]);
    let directory = archive.with_file_name("manifest");
    fs::create_dir(&directory).expect("a directory of ours");
    fs::write(directory.join("manifest.json"), manifest.to_string()).expect("a directory of ours");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(archive).arg("-C").arg(directory).arg("manifest.json").arg("-C").arg(oci);
    must(tar.arg(config).args(layers));
}

/// Runs in a process of its own, so that the kernel counts what it and those that it waits for took.
fn measure(command: &Command) -> Run {
    let mut measuring = Command::new(env::current_exe().expect("a path"));
    measuring.arg("measure").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => measuring.env(name, value),
            None => measuring.env_remove(name),
        };
    }
    let words: Vec<f64> =
        must(&mut measuring).split_whitespace().map(|word| word.parse().expect("a number")).collect();
    Run { wall: words[0], cpu: words[1], memory: words[2] }
}

fn measured(words: &[String]) {
    let started = Instant::now();
    let status = Command::new(&words[0]).args(&words[1..]).stdout(Stdio::null()).status().expect("it starts");
    let wall = started.elapsed().as_secs_f64();
    assert!(status.success(), "{words:?}: {status}");
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("the kernel counts");
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    println!(
        "{wall} {} {}",
        seconds(usage.user_time()) + seconds(usage.system_time()),
        usage.max_rss() as f64 / 1024.0
    );
}

/// A new ext4 on a loop device.
struct Disk {
    place: TempDir,
    device: String,
}

impl Disk {
    fn new() -> Self {
        let place = memory();
        let file = place.path().join("disk");
        fs::File::create(&file).and_then(|file| file.set_len(8 << 30)).expect("a sparse file");
        must(
            Command::new("mkfs.ext4")
                .args(["-qF", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
                .arg(&file),
        );
        let device = must(Command::new("losetup").args(["--find", "--show"]).arg(&file)).trim().to_owned();
        fs::create_dir(place.path().join("mounted")).expect("a directory of ours");
        Self { place, device }
    }

    fn directory(&self) -> PathBuf {
        self.place.path().join("mounted")
    }

    /// On this machine, or on that one.
    fn mount(&self, machine: Option<&Machine>, at: &Path) {
        let script = format!("mount -t ext4 {} {}", self.device, at.display());
        let Some(machine) = machine else { return drop(must(Command::new("sh").args(["-c", &script]))) };
        let number = self.device.trim_start_matches("/dev/loop");
        machine.sh(&format!("rm -f {0}; mknod {0} b 7 {number}; {script}", self.device));
    }

    fn unmount(&self) {
        must(Command::new("umount").arg(self.directory()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        must(Command::new("losetup").args(["--detach", &self.device]));
    }
}

/// Docker's own processes live on, so their time is what they have more afterwards.
fn docker_load<'a>(machine: &'a Machine, archive: &str) -> Box<dyn Fn() -> Run + 'a> {
    let archive = archive.to_owned();
    Box::new(move || {
        let disk = Disk::new();
        disk.mount(Some(machine), Path::new("/var/lib/docker"));
        // The machine has directories of this one as they were when it started.
        let inside = machine.path("/run/archive.tar");
        fs::write(&inside, "").expect("a file of its own");
        let source = fs::File::open(&archive).expect("the archive");
        machine.start_docker();
        let before = processors(machine);
        let mut load = machine.command(&["docker", "load", "-q"]);
        let started = Instant::now();
        let status = load.stdin(source).stdout(Stdio::null()).status().expect("docker starts");
        let wall = started.elapsed().as_secs_f64();
        assert!(status.success(), "docker load: {status}");
        let cpu = processors(machine) - before;
        let memory = machine.sh("grep -h VmHWM /proc/$(pidof dockerd)/status");
        let memory =
            memory.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).expect("kB") / 1024.0;
        machine.sh("kill $(pidof dockerd); while pidof dockerd containerd; do sleep 0.1; done >&2; umount /var/lib/docker");
        Run { wall, cpu, memory }
    })
}

/// Seconds that the processes of a machine took until now, with those that they waited for. The client is not there any more:
/// it only passes the archive on.
fn processors(machine: &Machine) -> f64 {
    let ticks = |line: &str| -> f64 {
        let fields = line.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.skip(11).take(4).map(|field| field.parse::<f64>().expect("a number")).sum()
    };
    machine
        .sh("cat /proc/$(pidof dockerd)/stat /proc/$(pidof containerd)/stat")
        .lines()
        .map(ticks)
        .sum::<f64>()
        / 100.0
}

/// The two that do without a daemon what engines do with one.
fn skopeo_and_umoci<'a>(image: String) -> Box<dyn Fn() -> Run + 'a> {
    Box::new(move || {
        let disk = Disk::new();
        disk.mount(None, &disk.directory());
        let script = format!(
            "cd {} && skopeo --insecure-policy copy --quiet --src-tls-verify=false docker://{image} oci:image:large && \
             umoci unpack --image image:large bundle",
            disk.directory().display()
        );
        let run = measure(Command::new("sh").args(["-c", &script]));
        disk.unmount();
        run
    })
}
