//! One table for every way into a container. The existing files of its root decide where the driver goes, in the same way for
//! the launcher, the runtime, the prestart hook and the CDI hook.
//!
//! In each cell the loader finds the driver and the container can open the nodes, or the start fails with a code and a fix.
//! Volumes are unchanged afterwards, byte by byte, and the host has no additional mount.

use gpurun::formats::cdi::Document;
use gpurun_integration::{
    Caller, Ended, TestHost,
    bundle::{Bundle, Hierarchies},
    cached,
    cdi::inject,
    description, dist, must, run, unique,
};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Destination {
    Launcher,
    Runtime(&'static str),
    Prestart,
    Cdi(&'static str),
}

const DESTINATIONS: [Destination; 6] = [
    Destination::Launcher,
    Destination::Runtime("runc"),
    Destination::Runtime("crun"),
    Destination::Prestart,
    Destination::Cdi("runc"),
    Destination::Cdi("crun"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Directory,
    Link,
    DanglingLink,
    ReadOnlyVolume,
    WritableVolume,
    Tmpfs,
}

const STANDINGS: [Standing; 6] = [
    Standing::Directory,
    Standing::Link,
    Standing::DanglingLink,
    Standing::ReadOnlyVolume,
    Standing::WritableVolume,
    Standing::Tmpfs,
];

const PLACES: [&str; 7] =
    ["/usr/local", "/usr/local/nvidia", "/etc", "/etc/ld.so.conf.d", "/etc/nvidia", "/dev", "/dev/dri"];

const GPU: usize = 2;

/// A root with glibc and a shell, with an obstacle at one path, and the volume over it.
struct Cell {
    bundle: Bundle,
    standing: Standing,
    place: &'static str,
}

impl Cell {
    fn new(host: &TestHost, standing: Standing, place: &'static str) -> Self {
        let bundle = Bundle::of("cuda");
        let root = bundle.root();
        let at = root.join(&place[1..]);
        fs::create_dir_all(&at).unwrap();
        fs::create_dir_all(root.join("opt")).unwrap();
        match standing {
            Standing::Directory | Standing::ReadOnlyVolume | Standing::WritableVolume | Standing::Tmpfs => {}
            Standing::Link => {
                must(Command::new("cp").arg("-a").arg(&at).arg(root.join("opt/real")));
                fs::remove_dir_all(&at).unwrap();
                symlink("/opt/real", &at).unwrap();
            }
            Standing::DanglingLink => {
                fs::remove_dir_all(&at).unwrap();
                symlink("/opt/absent/deep", &at).unwrap();
            }
        }
        let volume = bundle.dir.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("marker"), place).unwrap();
        // As in a host's own /dev.
        if place.starts_with("/dev") {
            let nodes = host.path().join(&place[1..]);
            must(Command::new("cp").arg("-a").arg(nodes.join(".")).arg(&volume));
        }
        if place == "/dev" {
            for (name, minor) in
                [("null", "3"), ("zero", "5"), ("full", "7"), ("random", "8"), ("urandom", "9")]
            {
                must(
                    Command::new("mknod").args(["-m", "666"]).arg(volume.join(name)).args(["c", "1", minor]),
                );
            }
            must(Command::new("mknod").args(["-m", "666"]).arg(volume.join("tty")).args(["c", "5", "0"]));
            for name in ["pts", "shm", "mqueue"] {
                fs::create_dir(volume.join(name)).unwrap();
            }
            fs::write(volume.join("console"), "").unwrap();
            symlink("pts/ptmx", volume.join("ptmx")).unwrap();
            for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
                symlink(format!("/proc/self/fd{target}"), volume.join(link)).unwrap();
            }
            symlink("/proc/kcore", volume.join("core")).unwrap();
        }
        Self { bundle, standing, place }
    }

    fn volume(&self) -> PathBuf {
        self.bundle.dir.path().join("volume")
    }

    /// The volume as an entry of config.json.
    fn mount(&self) -> Option<Value> {
        let options = match self.standing {
            Standing::ReadOnlyVolume => "ro",
            Standing::WritableVolume => "rw",
            Standing::Tmpfs => {
                return Some(json!({
                    "destination": self.place, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"],
                }));
            }
            _ => return None,
        };
        Some(json!({
            "destination": self.place, "type": "bind", "source": self.volume(), "options": ["rbind", options],
        }))
    }

    /// The volume as an option of the launcher.
    fn option(&self) -> String {
        let (volume, place) = (self.volume(), self.place);
        match self.standing {
            Standing::ReadOnlyVolume => format!("-v {}:{place}:ro", volume.display()),
            Standing::WritableVolume => format!("-v {}:{place}", volume.display()),
            Standing::Tmpfs => format!("--tmpfs {place}"),
            _ => String::new(),
        }
    }

    /// The configuration that an engine writes.
    fn configure(&self, env: &[&str]) -> Value {
        let script = script();
        let mut spec = self.bundle.configure(env, &["sh", "-c", &script]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        match self.mount() {
            // An engine mounts one object at a path, before mounts below it.
            Some(mount) if self.place == "/dev" => {
                mounts.retain(|other| {
                    let destination = other["destination"].as_str().unwrap();
                    !destination.starts_with("/dev")
                });
                mounts.insert(1, mount);
            }
            mount => mounts.extend(mount),
        }
        self.bundle.write(&spec);
        spec
    }

    fn start(&mut self, host: &TestHost, document: &Document, destination: Destination) -> Ended {
        let gpu = format!("NVIDIA_VISIBLE_DEVICES={GPU}");
        let asks = [gpu.as_str(), "NVIDIA_DRIVER_CAPABILITIES=all"];
        match destination {
            Destination::Launcher => {
                let options = format!("--gpus {GPU},capabilities=all {}", self.option())
                    .replace(&format!("--gpus {GPU},"), &format!("--gpus device={GPU},"));
                let image = format!("rootfs:{}", self.bundle.root().display());
                host.sh(Caller::Root, &options, &image, &script())
            }
            Destination::Runtime(runtime) => {
                self.configure(&asks);
                self.bundle.runtime = runtime;
                let path = if runtime == "crun" { cached("crun/usr/bin/crun") } else { runtime.into() };
                self.bundle.run(host, &format!("runtimes = [{path:?}]\n"))
            }
            Destination::Prestart => {
                let mut spec = self.configure(&asks);
                let env = [
                    format!("GPURUN_SIMULATED_HOST={}", host.path().display()),
                    format!("GPURUN_STATE_DIR={}", host.state_dir(0).display()),
                ];
                let name = "nvidia-container-runtime-hook";
                let hook = json!({"path": self.bundle.link(name), "args": [name, "prestart"], "env": env});
                spec["hooks"] = json!({"prestart": [hook]});
                self.bundle.write(&spec);
                self.start_with("runc")
            }
            Destination::Cdi(runtime) => {
                let mut spec = self.configure(&[]);
                inject(document, &[&GPU.to_string()], &mut spec);
                self.bundle.write(&spec);
                self.start_with(runtime)
            }
        }
    }

    /// Only the low-level runtime.
    fn start_with(&self, runtime: &str) -> Ended {
        let mut command = match runtime {
            "crun" => Hierarchies::Legacy.command(&cached("crun/usr/bin/crun")),
            _ => Command::new("runc"),
        };
        let dir = self.bundle.dir.path();
        run(command.arg("--root").arg(dir.join("state")).args(["run", "--bundle"]).arg(dir).arg(unique()))
    }
}

/// Loads the driver's libraries as a program does, and opens the nodes.
fn script() -> String {
    let minor = description("8xh100").gpus[GPU].minor;
    format!(
        "/app/probe libcuda.so.1 libnvidia-ml.so.1 | grep 'so.1:'; \
         for node in nvidiactl nvidia-uvm nvidia{minor}; do (: <> /dev/$node) 2>&1 | grep -q 'No such device or' && echo open; done"
    )
}

const WORKS: &str = "libcuda.so.1: loaded\nlibnvidia-ml.so.1: loaded\nopen\nopen\nopen\n";

/// Names, kinds, modes, owners, times and content.
fn state_of(directory: &Path) -> String {
    let script = "find . -printf '%p %y %m %U %G %l %T@ %C@\\n' | sort; find . -type f -exec sha256sum {} +";
    must(Command::new("sh").args(["-c", script]).current_dir(directory))
}

/// The host's mounts that belong to a bundle.
fn mounts_of(bundle: &Bundle) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = bundle.dir.path().to_str().unwrap();
    table.lines().filter(|line| line.contains(path)).map(str::to_owned).collect()
}

/// Accepted failures of a cell, with their reasons.
fn may_fail(destination: Destination, standing: Standing, place: &str) -> bool {
    let is_link = matches!(standing, Standing::Link | Standing::DanglingLink);
    match (destination, standing, place) {
        // No runtime mounts a new /dev through a link of the image, because masked paths below it are given by name.
        (_, _, "/dev") if is_link => true,
        // The launcher's own /dev has the nodes; a second one over it would hide them.
        (Destination::Launcher, Standing::Tmpfs, "/dev") => true,
        // The engine makes the mount points of a CDI spec before gpurun's hook runs: runc makes none on a read-only volume, crun
        // none through a dangling link.
        (Destination::Cdi(_), Standing::ReadOnlyVolume, "/usr/local") => true,
        (Destination::Cdi("crun"), Standing::DanglingLink, "/usr/local" | "/usr/local/nvidia") => true,
        _ => false,
    }
}

/// Cells in which the low-level runtime makes an empty directory on a volume, for a mount of a CDI spec.
fn engine_writes(destination: Destination, place: &str) -> bool {
    matches!(destination, Destination::Cdi(_)) && place == "/usr/local"
}

#[test]
fn every_destination_places_the_driver_in_the_same_way() {
    let failures: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            DESTINATIONS.into_iter().map(|destination| scope.spawn(move || row(destination))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a row of the table")).collect()
    });
    assert!(failures.is_empty(), "{} cells\n{}", failures.len(), failures.join("\n"));
}

fn row(destination: Destination) -> Vec<String> {
    let host = TestHost::new("8xh100");
    let text = must(host.gpurun().args(["cdi", "generate", "--hook"]).arg(dist("gpurun-hook")));
    let document = Document::parse(&text).unwrap();
    let mut failures = Vec::new();
    for standing in STANDINGS {
        for place in PLACES {
            let mut cell = Cell::new(&host, standing, place);
            let before = state_of(&cell.volume());
            let mounts = mounts_of(&cell.bundle);
            let ended = cell.start(&host, &document, destination);
            let name = format!("{destination:?} {standing:?} {place}");
            let mut fails = |what: &str| failures.push(format!("{name}: {what}: {ended:?}"));
            let works = ended.code == 0 && ended.out == WORKS;
            // gpurun's own errors have a fix; those of the low-level runtime do not.
            let is_ours = ended.err.contains("error[GPU-");
            let is_refused = ended.code != 0 && (!is_ours || ended.err.contains("fix: "));
            let may_be_refused = is_refused && may_fail(destination, standing, place);
            if !works && !may_be_refused {
                fails("the container does not have the driver");
            }
            if state_of(&cell.volume()) != before && !engine_writes(destination, place) {
                fails("the volume has changed");
            }
            let scratch = host.scratch(Caller::Root);
            if !scratch.is_empty() || mounts_of(&cell.bundle) != mounts {
                fails(&format!("left on the host: {scratch:?} {:?}", mounts_of(&cell.bundle)));
            }
        }
    }
    failures
}

/// Directories of the root that only their owner may write, and a container's root that is a different user on the host.
#[test]
fn directory_owners_and_modes_do_not_stop_a_container_with_a_user_namespace() {
    const FIRST: u32 = 200_000;
    let host = TestHost::new("8xh100");
    for runtime in ["runc", "crun"] {
        for (owner, mode) in [(FIRST, "0555"), (0, "0755"), (0, "0555"), (FIRST + 7, "0755")] {
            let mut bundle = Bundle::empty();
            bundle.runtime = runtime;
            let root = bundle.root();
            must(
                Command::new("cp")
                    .arg("-a")
                    .arg(gpurun_integration::image("cuda", "root").join("."))
                    .arg(&root),
            );
            fs::create_dir_all(root.join("usr/bin")).unwrap();
            must(Command::new("chown").args(["-hR", &format!("{owner}:{owner}")]).arg(&root));
            must(
                Command::new("chmod")
                    .arg(mode)
                    .args(["", "usr", "usr/bin", "etc"].map(|path| root.join(path))),
            );
            let minor = description("8xh100").gpus[GPU].minor;
            let script = format!("/app/probe libcuda.so.1 | grep 'so.1:'; ls /dev/nvidia{minor}");
            let mut spec = bundle.configure(
                &[&format!("NVIDIA_VISIBLE_DEVICES={GPU}"), "NVIDIA_DRIVER_CAPABILITIES=all"],
                &["sh", "-c", &script],
            );
            let mapping = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
            spec["linux"]["uidMappings"] = mapping.clone();
            spec["linux"]["gidMappings"] = mapping;
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
            bundle.write(&spec);
            std::os::unix::fs::chown(bundle.dir.path(), Some(FIRST), Some(FIRST)).unwrap();
            let path = if runtime == "crun" { cached("crun/usr/bin/crun") } else { runtime.into() };
            let ended = bundle.run(&host, &format!("runtimes = [{path:?}]\n"));
            let expected = format!("libcuda.so.1: loaded\n/dev/nvidia{minor}\n");
            assert_eq!((ended.code, &ended.out), (0, &expected), "{runtime} {owner} {mode}: {ended:?}");
            let owner_of = |path: &str| {
                use std::os::unix::fs::MetadataExt;
                fs::symlink_metadata(root.join(path)).unwrap().uid()
            };
            assert_eq!((owner_of("usr/bin/nvidia-smi"), owner_of("etc/ld.so.cache")), (owner, owner));
        }
    }
}

/// A volume over /dev without the nodes hides every GPU, so the start fails.
#[test]
fn a_volume_over_dev_without_nodes_is_refused() {
    for destination in [Destination::Launcher, Destination::Runtime("runc"), Destination::Prestart] {
        let host = TestHost::new("8xh100");
        let mut cell = Cell::new(&host, Standing::WritableVolume, "/dev");
        fs::remove_file(cell.volume().join("nvidiactl")).unwrap();
        let before = state_of(&cell.volume());
        let document = Document::default();
        let ended = cell.start(&host, &document, destination);
        assert!(ended.code != 0 && ended.out.is_empty(), "{destination:?} {ended:?}");
        assert!(
            ended.err.contains("error[GPU-0014]") && ended.err.contains("fix: "),
            "{destination:?} {ended:?}"
        );
        assert_eq!(state_of(&cell.volume()), before, "{destination:?}");
    }
}
