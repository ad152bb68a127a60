//! gpurun as the prestart hook that dockerd adds for `--gpus`, called by real runc and crun.

use gpurun_integration::{
    Ended, TestHost,
    bundle::{Bundle, Hierarchies, asks, has_gpu_2, probed},
    cached, description, image, must, run, unique, until,
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    os::unix::{
        fs::{MetadataExt, chown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

const HOOK: &str = "nvidia-container-runtime-hook";

/// Every low-level runtime with every form of device rules.
const EACH: [(&str, Hierarchies); 4] = [
    ("runc", Hierarchies::Own),
    ("runc", Hierarchies::Unified),
    ("crun", Hierarchies::Legacy),
    ("crun", Hierarchies::Unified),
];

fn runtime(name: &str) -> PathBuf {
    if name == "crun" { cached("crun/usr/bin/crun") } else { "/usr/sbin/runc".into() }
}

/// Adds the hook to a specification as dockerd does, for a simulated host.
fn hooked(bundle: &Bundle, host: &TestHost, mut spec: Value, configuration: &str) -> Value {
    let file = bundle.dir.path().join("gpurun.toml");
    fs::write(&file, configuration).unwrap();
    let env = [
        format!("GPURUN_SIMULATED_HOST={}", host.path().display()),
        format!("GPURUN_STATE_DIR={}", host.state_dir(0).display()),
        format!("GPURUN_CONFIG={}", file.display()),
    ];
    let hook = json!({"path": bundle.link(HOOK), "args": [HOOK, "prestart"], "env": env});
    spec["hooks"] = json!({"prestart": [hook]});
    bundle.write(&spec);
    spec
}

/// A verb of the low-level runtime, with its options.
fn verb(bundle: &Bundle, name: &str, hierarchies: Hierarchies, words: &[&str]) -> Command {
    let mut command = hierarchies.command(&runtime(name));
    command.arg("--root").arg(bundle.dir.path().join("state")).args(words);
    command
}

/// `runtime run` to the container's end.
fn run_with(bundle: &Bundle, name: &str, hierarchies: Hierarchies) -> Ended {
    let dir = bundle.dir.path().to_str().unwrap();
    run(&mut verb(bundle, name, hierarchies, &["run", "--bundle", dir, &unique()]))
}

/// A container of busybox that asks for GPU 2 and does this.
fn busybox(host: &TestHost, script: &str) -> (Bundle, Value) {
    let bundle = Bundle::of("busybox");
    let spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=2"], &["sh", "-c", script]);
    let spec = hooked(&bundle, host, spec, "");
    (bundle, spec)
}

#[test]
fn a_container_gets_the_gpu_that_it_asks_for() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    for (name, hierarchies) in EACH {
        let bundle = Bundle::of("debian-python");
        hooked(&bundle, &host, asks(&bundle, "2"), "");
        let before = bundle.read();
        let saw = probed(&run_with(&bundle, name, hierarchies));
        has_gpu_2(&saw, "550.163.01");
        assert!(saw["write"].as_str().unwrap().contains("Read-only file system"), "{saw:#}");
        assert!(saw["shm"].as_u64().unwrap() > 64 << 20, "{saw:#}");
        assert_eq!(bundle.read(), before, "the configuration is the engine's");
        assert!(fs::read_dir(bundle.root().join("usr/local/nvidia")).unwrap().next().is_none());
    }
}

/// Opens nodes for reading and writing, and says what the kernel answers: 0, ENXIO where no driver is behind, EPERM where the
/// cgroup refuses.
const OPEN: &str = r#"
import errno, os, sys
for node in sys.argv[1:]:
    for word, flag in [("r", os.O_RDONLY), ("w", os.O_WRONLY)]:
        try:
            os.close(os.open(node, flag))
            print(node, word, 0)
        except OSError as error:
            print(node, word, errno.errorcode[error.errno])
"#;

/// What a container may open of these nodes, with the hook or without.
fn opened(bundle: &Bundle, host: Option<&TestHost>, how: (&str, Hierarchies), nodes: &[&str]) -> String {
    let words: Vec<&str> = ["python3", "-c", OPEN].iter().chain(nodes).copied().collect();
    let mut spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=2"], &words);
    spec["linux"]["resources"]["devices"]
        .as_array_mut()
        .unwrap()
        .push(json!({"allow": true, "type": "c", "major": 1, "minor": 7, "access": "r"}));
    match host {
        Some(host) => hooked(bundle, host, spec, ""),
        None => {
            bundle.write(&spec);
            spec
        }
    };
    let ended = run_with(bundle, how.0, how.1);
    assert_eq!(ended.code, 0, "{how:?} {ended:?}");
    ended.out
}

#[test]
fn the_gpus_can_be_opened_and_every_other_rule_of_the_engine_stays() {
    let host = TestHost::new("8xh100");
    let gpu = &description("8xh100").gpus[2];
    let own = format!("/dev/nvidia{}", gpu.minor);
    // Nodes of the image's own: another GPU, the kernel's log, memory, and a disk's number.
    let theirs = ["/opt/other-gpu", "/opt/kmsg", "/opt/full", "/opt/null", "/opt/disk"];
    for how in EACH {
        let bundle = Bundle::of("debian-python");
        let numbers = [(195, (gpu.minor + 1) % 8), (1, 11), (1, 7), (1, 3), (254, 0)];
        fs::create_dir_all(bundle.root().join("opt")).unwrap();
        for (node, (major, minor)) in theirs.iter().zip(numbers) {
            let kind = if node.ends_with("disk") { "b" } else { "c" };
            let node = bundle.root().join(&node[1..]);
            must(Command::new("mknod").arg(node).args([kind, &major.to_string(), &minor.to_string()]));
        }
        let before = opened(&bundle, None, how, &theirs);
        assert!(
            before.contains("/opt/kmsg r EPERM\n") && before.contains("/opt/null w 0\n"),
            "{how:?} {before}"
        );
        assert_eq!(opened(&bundle, Some(&host), how, &theirs), before, "{how:?}");
        let gpus = opened(&bundle, Some(&host), how, &[&own, "/dev/nvidiactl", "/dev/nvidia-uvm"]);
        assert_eq!(gpus.lines().count(), 6, "{gpus}");
        assert!(gpus.lines().all(|line| line.ends_with(" ENXIO") || line.ends_with(" 0")), "{how:?} {gpus}");
    }
}

/// A container that is created, and removed with this.
struct Created<'a> {
    bundle: &'a Bundle,
    how: (&'static str, Hierarchies),
    id: String,
}

impl<'a> Created<'a> {
    fn new(bundle: &'a Bundle, how: (&'static str, Hierarchies)) -> Self {
        let created = Self { bundle, how, id: unique() };
        // Its output would otherwise be waited for.
        let status = verb(
            bundle,
            how.0,
            how.1,
            &["create", "--bundle", bundle.dir.path().to_str().unwrap(), &created.id],
        )
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
        assert!(status.unwrap().success());
        created
    }

    fn verb(&self, words: &[&str]) -> Ended {
        run(&mut verb(self.bundle, self.how.0, self.how.1, words))
    }
}

impl Drop for Created<'_> {
    fn drop(&mut self) {
        self.verb(&["delete", "--force", &self.id]);
    }
}

#[test]
fn a_second_process_of_the_container_has_the_gpu_too() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let gpu = &description("8xh100").gpus[2];
    let node = format!("/dev/nvidia{}", gpu.minor);
    for how in EACH {
        let bundle = Bundle::of("debian-python");
        let spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=2"], &["sleep", "1000"]);
        hooked(&bundle, &host, spec, "");
        let container = Created::new(&bundle, how);
        assert_eq!(container.verb(&["start", &container.id]).code, 0);
        let ended = container.verb(&["exec", &container.id, "nvidia-smi", "-L"]);
        assert!(ended.code == 0 && ended.out.contains(&gpu.uuid), "{how:?} {ended:?}");
        let ended = container.verb(&["exec", &container.id, "python3", "-c", OPEN, &node]);
        assert!(ended.out.contains(" r ") && !ended.out.contains("EPERM"), "{how:?} {ended:?}");
    }
}

#[test]
fn who_asks_for_nothing_is_not_touched() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("busybox");
    for env in [&[][..], &["NVIDIA_VISIBLE_DEVICES=void"], &["NVIDIA_VISIBLE_DEVICES="]] {
        let spec =
            bundle.configure(env, &["sh", "-c", "ls /dev; ls /usr/local /etc; cat /proc/self/mountinfo"]);
        hooked(&bundle, &host, spec, "");
        let ended = run_with(&bundle, "runc", Hierarchies::Own);
        assert!(ended.code == 0 && ended.out.contains("null") && !ended.out.contains("nvidia"), "{ended:?}");
        assert_eq!(fs::read_dir(host.state_dir(0)).unwrap().count(), 0, "the host is not looked at");
    }
}

#[test]
fn a_refusal_is_what_the_runtime_says_and_nothing_is_left() {
    let host = TestHost::new("8xh100");
    let gone = TestHost::new("8xh100");
    fs::remove_file(gone.driver("usr/lib/x86_64-linux-gnu/libcuda.so.1")).ok();
    for (name, hierarchies) in EACH {
        let bundle = Bundle::of("busybox");
        for (env, configuration, code) in [
            (&["NVIDIA_VISIBLE_DEVICES=99"][..], "", "GPU-0021"),
            (&["NVIDIA_VISIBLE_DEVICES=gpu0"], "", "GPU-0020"),
            (&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99.0"], "", "GPU-0030"),
            (&["NVIDIA_VISIBLE_DEVICES=all"], "nonroot = \"require\"", "GPU-0024"),
            (&["NVIDIA_VISIBLE_DEVICES=all"], "nonrot = 1", "GPU-0002"),
        ] {
            let mut spec = bundle.configure(env, &["echo", "it ran"]);
            // crun shows a hook's words to nobody, but where it is told to.
            let said = bundle.dir.path().join("said");
            spec["annotations"] = json!({"run.oci.hooks.stderr": said});
            hooked(&bundle, &host, spec, configuration);
            let mut ended = run_with(&bundle, name, hierarchies);
            ended.err += &fs::read_to_string(&said).unwrap_or_default();
            let paragraph = format!("error[{code}]: ");
            assert!(
                ended.code != 0 && ended.err.contains(&paragraph) && ended.out.is_empty(),
                "{env:?} {ended:?}"
            );
            let upper = fs::read_dir(bundle.dir.path().join("upper")).unwrap().flatten();
            let left: Vec<_> = upper
                .map(|entry| entry.file_name())
                .filter(|name| name != "dev" && name != "proc" && name != "sys")
                .collect();
            assert!(left.is_empty(), "{name} {left:?}");
        }
    }
}

#[test]
fn a_read_only_root_gets_the_driver_too() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    for (name, hierarchies) in EACH {
        let bundle = Bundle::of("debian-python");
        let mut spec = asks(&bundle, "2");
        spec["root"]["readonly"] = json!(true);
        hooked(&bundle, &host, spec, "");
        has_gpu_2(&probed(&run_with(&bundle, name, hierarchies)), "550.163.01");
    }
}

#[test]
fn in_a_user_namespace_the_hosts_nodes_are_mounted() {
    const FIRST: u32 = 200_000;
    let host = TestHost::new("8xh100");
    let gpu = &description("8xh100").gpus[2];
    for (name, hierarchies) in EACH {
        let bundle = Bundle::empty();
        must(Command::new("cp").arg("-a").arg(image("debian-python", "root").join(".")).arg(bundle.root()));
        must(Command::new("chown").args(["-hR", &format!("{FIRST}:{FIRST}")]).arg(bundle.root()));
        chown(bundle.dir.path(), Some(FIRST), Some(FIRST)).unwrap();
        let script = format!(
            "import ctypes; ctypes.CDLL('libcuda.so.1'); import sys; sys.argv = ['', '/dev/nvidia{}', '/dev/nvidiactl']; exec({OPEN:?})",
            gpu.minor
        );
        let mut spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=2"], &["python3", "-c", &script]);
        let mapping = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        hooked(&bundle, &host, spec, "");
        let ended = run_with(&bundle, name, hierarchies);
        assert_eq!(ended.code, 0, "{name} {hierarchies:?} {ended:?}");
        assert_eq!(ended.out.lines().count(), 4, "{ended:?}");
        assert!(
            ended.out.lines().all(|line| line.ends_with(" ENXIO") || line.ends_with(" 0")),
            "{name} {ended:?}"
        );
        let cache = fs::metadata(bundle.root().join("etc/ld.so.cache")).unwrap();
        assert_eq!((cache.uid(), cache.gid(), cache.mode() & 0o777), (FIRST, FIRST, 0o644));
    }
}

/// The host's mounts that have to do with a bundle.
fn mounts_of(bundle: &Bundle) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = table.lines().filter(|line| line.contains(bundle.dir.path().to_str().unwrap()));
    ours.map(str::to_owned).collect()
}

/// A mount that goes with this.
struct Unmounted<'a>(&'a Path);

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(self.0));
    }
}

#[test]
fn nothing_is_mounted_on_the_host_where_the_container_shares_its_mounts() {
    let host = TestHost::new("8xh100");
    for how in [("runc", Hierarchies::Own), ("crun", Hierarchies::Unified)] {
        for propagation in ["shared", "rshared", "slave", ""] {
            let (bundle, mut spec) = busybox(&host, "sleep 1000");
            let volume = bundle.dir.path().join("volume");
            fs::create_dir(&volume).unwrap();
            must(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "volume"]).arg(&volume));
            let _unmounted = Unmounted(&volume);
            must(Command::new("mount").arg("--make-shared").arg(&volume));
            must(Command::new("mount").arg("--make-shared").arg(bundle.root()));
            spec["linux"]["rootfsPropagation"] = json!(propagation);
            let mode = if propagation.is_empty() { "rprivate" } else { propagation };
            spec["mounts"].as_array_mut().unwrap().push(json!({
                "destination": "/usr/local", "type": "bind", "source": volume, "options": ["rbind", "rw", mode],
            }));
            bundle.write(&spec);
            let before = mounts_of(&bundle);
            let seen = {
                let container = Created::new(&bundle, how);
                assert_eq!(container.verb(&["start", &container.id]).code, 0);
                let ended = container.verb(&["exec", &container.id, "cat", "/proc/self/mountinfo"]);
                // The volume hides /usr/local/nvidia, so the driver has a directory of its own.
                assert!(ended.out.contains("/nvidia-driver/lib64/libcuda.so"), "{ended:?}");
                let of_volume = ended.out.lines().find(|line| line.contains(" /usr/local ")).unwrap();
                assert_eq!(of_volume.contains(" shared:"), propagation.ends_with("shared"), "{of_volume}");
                // What the host mounts later still comes.
                let late = volume.join("late");
                fs::create_dir(&late).unwrap();
                must(Command::new("mount").args(["-t", "tmpfs", "late"]).arg(&late));
                let ended = container.verb(&[
                    "exec",
                    &container.id,
                    "grep",
                    "-c",
                    "/usr/local/late",
                    "/proc/self/mountinfo",
                ]);
                must(Command::new("umount").arg(&late));
                assert_eq!(
                    ended.out,
                    if propagation.is_empty() { "0\n" } else { "1\n" },
                    "{how:?} {propagation}"
                );
                mounts_of(&bundle)
            };
            assert_eq!(seen, before, "{how:?} {propagation}");
            assert_eq!(mounts_of(&bundle), before, "{how:?} {propagation}");
        }
    }
}

#[test]
fn a_hostile_root_or_volume_reaches_nothing_outside() {
    let host = TestHost::new("8xh100");
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "untouched").unwrap();
    let out = outside.path().to_str().unwrap();
    let deep = format!("../../../../../../../../../../..{out}");
    let of_root: [&[(&str, &str)]; 9] = [
        &[("etc/ld.so.cache", &format!("{out}/file"))],
        &[("etc/ld.so.cache", &format!("{deep}/file"))],
        &[("etc", out)],
        &[("etc", &deep)],
        &[("etc/ld.so.conf.d", &deep), ("usr/bin", out)],
        &[("etc/.gpurun-ld.so.cache", &format!("{out}/file")), ("usr/local", &deep)],
        &[("usr/local/nvidia", &deep), ("run", out)],
        &[("usr/local/nvidia", "/proc/1/root"), ("etc", "/proc/self/cwd")],
        &[("usr", &deep)],
    ];
    let of_volume: [&[(&str, &str)]; 4] = [
        &[("local/nvidia", out)],
        &[("local/nvidia", &deep), ("bin", &deep)],
        &[("local", &deep)],
        &[("local", "/proc/1/root")],
    ];
    let cases = of_root.iter().map(|links| (false, links)).chain(of_volume.iter().map(|links| (true, links)));
    for (is_volume, links) in cases {
        let bundle = Bundle::empty();
        let root = bundle.root();
        for part in ["lib64", "bin"] {
            fs::create_dir_all(root.join(part)).unwrap();
        }
        fs::write(root.join("lib64/ld-linux-x86-64.so.2"), "").unwrap();
        fs::copy(image("busybox", "root").join("bin/busybox"), root.join("bin/busybox")).unwrap();
        let volume = bundle.dir.path().join("volume");
        let base = if is_volume { &volume } else { &root };
        for (link, target) in links.iter() {
            let link = base.join(link);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(target, link).unwrap();
        }
        let mut spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["/bin/busybox", "true"]);
        if is_volume {
            spec["mounts"].as_array_mut().unwrap().push(json!({
                "destination": "/usr", "type": "bind", "source": volume, "options": ["rbind", "rw"],
            }));
        }
        hooked(&bundle, &host, spec, "");
        // Whether it starts is the image's business.
        let ended = run_with(&bundle, "runc", Hierarchies::Own);
        assert_eq!(fs::read_dir(out).unwrap().count(), 1, "{links:?} {ended:?}");
        assert_eq!(fs::read_to_string(outside.path().join("file")).unwrap(), "untouched", "{links:?}");
    }
}

#[test]
fn a_driver_whose_directory_is_a_link_into_a_file_system_of_the_kernel_has_another_one() {
    let host = TestHost::new("8xh100");
    for target in ["/proc", "/proc/self", "/sys", "../../proc/sys/kernel"] {
        let (bundle, _) = busybox(&host, "ls /nvidia-driver/lib64");
        fs::create_dir_all(bundle.root().join("usr/local")).unwrap();
        symlink(target, bundle.root().join("usr/local/nvidia")).unwrap();
        let ended = run_with(&bundle, "runc", Hierarchies::Own);
        assert!(ended.code == 0 && ended.out.contains("libcuda.so.1"), "{target} {ended:?}");
    }
}

#[test]
fn a_volume_over_etc_is_not_written() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    let volume = bundle.dir.path().join("volume");
    must(Command::new("cp").arg("-a").arg(image("debian-python", "root").join("etc")).arg(&volume));
    let cache = fs::read(volume.join("ld.so.cache")).unwrap();
    let mut spec = bundle.configure(
        &["NVIDIA_VISIBLE_DEVICES=2", "LD_LIBRARY_PATH=/usr/local/nvidia/lib64"],
        &["python3", "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"],
    );
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/etc", "type": "bind", "source": volume, "options": ["rbind", "rw"],
    }));
    hooked(&bundle, &host, spec, "");
    let ended = run_with(&bundle, "runc", Hierarchies::Own);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(fs::read(volume.join("ld.so.cache")).unwrap(), cache, "it may be the host's own");
    assert!(!volume.join("ld.so.conf.d/00-gpurun.conf").exists());
}

#[test]
fn the_drivers_parameters_say_that_no_node_is_to_be_made() {
    let host = TestHost::new("8xh100");
    let proc = host.path().join("driver-proc/nvidia");
    fs::create_dir_all(&proc).unwrap();
    fs::write(proc.join("params"), "ModifyDeviceFiles: 1\n").unwrap();
    let (bundle, mut spec) =
        busybox(&host, "cat /proc/driver/nvidia/params; echo 1 > /proc/driver/nvidia/params");
    // Stands in for the driver's directory; runc mounts nothing there.
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/proc/driver", "type": "bind", "source": proc.parent().unwrap(), "options": ["rbind", "rw"],
    }));
    bundle.write(&spec);
    let ended = run_with(&bundle, "crun", Hierarchies::Unified);
    assert!(
        ended.out.contains("ModifyDeviceFiles: 0\n") && ended.err.contains("Read-only file system"),
        "{ended:?}"
    );
    assert_eq!(fs::read_to_string(proc.join("params")).unwrap(), "ModifyDeviceFiles: 1\n");
}

#[test]
fn shared_memory_grows_unless_somebody_chose_its_size() {
    let host = TestHost::new("t4");
    let bundle = Bundle::of("busybox");
    let size = |own: &str, configuration: &str| {
        let mut spec =
            bundle.configure(&["NVIDIA_VISIBLE_DEVICES=0"], &["sh", "-c", "df -m /dev/shm | tail -1"]);
        for mount in spec["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev/shm" {
                mount["options"] = json!(["nosuid", "mode=1777", format!("size={own}")]);
            }
        }
        hooked(&bundle, &host, spec, configuration);
        let ended = run_with(&bundle, "runc", Hierarchies::Own);
        assert_eq!(ended.code, 0, "{ended:?}");
        ended.out.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    assert!(size("64m", "") > 500);
    assert_eq!(size("64m", "shm-size = \"300m\""), 300);
    assert_eq!(size("64000k", "shm-size = \"300m\""), 300);
    assert_eq!(size("64m", "shm-size = \"keep\""), 64);
    assert_eq!(size("100m", ""), 100);
}

#[test]
fn what_draws_gets_the_nodes_the_links_and_the_profile() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let gpu = &description("8xh100").gpus[2];
    let script = "cd /dev/dri/by-path && for link in *; do test -c $link && echo $link; done; \
                  cat /etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf";
    for (name, hierarchies) in EACH {
        let bundle = Bundle::of("debian-python");
        let spec = bundle.configure(
            &["NVIDIA_VISIBLE_DEVICES=2", "NVIDIA_DRIVER_CAPABILITIES=all"],
            &["sh", "-c", script],
        );
        hooked(&bundle, &host, spec, "");
        let ended = run_with(&bundle, name, hierarchies);
        assert_eq!(ended.code, 0, "{ended:?}");
        for kind in ["card", "render"] {
            assert!(ended.out.contains(&format!("{}-{kind}\n", gpu.pci)), "{ended:?}");
        }
        assert!(ended.out.contains(&format!("EGLVisibleDGPUDevices\",{:#x}]", 1 << gpu.minor)), "{ended:?}");
    }
}

#[test]
fn nodes_have_the_hosts_permissions_and_one_that_is_there_stays() {
    let host = TestHost::new("8xh100");
    let gpu = &description("8xh100").gpus[2];
    let node = host.path().join(format!("dev/nvidia{}", gpu.minor));
    must(Command::new("chmod").arg("0660").arg(&node));
    must(Command::new("chown").arg("7:44").arg(&node));
    let (bundle, mut spec) =
        busybox(&host, &format!("stat -c '%a %u %g' /dev/nvidia{} /dev/nvidiactl", gpu.minor));
    let device = json!({"path": "/dev/nvidiactl", "type": "c", "major": 195, "minor": 255, "fileMode": 0o600, "uid": 9, "gid": 9});
    spec["linux"]["devices"] = json!([device]);
    bundle.write(&spec);
    let ended = run_with(&bundle, "runc", Hierarchies::Own);
    assert_eq!(ended.out, "660 7 44\n600 9 9\n", "{ended:?}");
    // A device of another number is not ours to replace, and not the one that was asked for.
    spec["linux"]["devices"][0]["minor"] = json!(3);
    bundle.write(&spec);
    let ended = run_with(&bundle, "runc", Hierarchies::Own);
    assert!(ended.code != 0 && ended.err.contains("error[GPU-0057]"), "{ended:?}");
}

#[test]
fn a_daemons_socket_is_mounted_unless_a_volume_brought_it() {
    let host = TestHost::new("8xh100");
    let directory = host.driver("run/nvidia-persistenced");
    fs::create_dir_all(&directory).unwrap();
    let _daemon = UnixListener::bind(directory.join("socket")).unwrap();
    let script =
        "test -S /run/nvidia-persistenced/socket && grep -c persistenced/socket /proc/self/mountinfo";
    for (name, hierarchies) in [("runc", Hierarchies::Own), ("crun", Hierarchies::Unified)] {
        let (bundle, mut spec) = busybox(&host, script);
        let ended = run_with(&bundle, name, hierarchies);
        assert!(ended.code == 0 && ended.out == "1\n", "{ended:?}");
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/run", "type": "bind", "source": host.driver("run"), "options": ["rbind", "rw"],
        }));
        bundle.write(&spec);
        let ended = run_with(&bundle, name, hierarchies);
        assert!(ended.code == 1 && ended.out == "0\n", "grep finds none: {ended:?}");
    }
}

/// A process that waits in a mount namespace of its own, as a container's does.
struct Waits(Child);

impl Waits {
    fn after(script: &str) -> Self {
        let script = format!("{script}; echo; exec sleep 1000");
        let mut child =
            Command::new("unshare").args(["-m", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        Self(child)
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The hook with this state on standard input.
fn call(bundle: &Bundle, host: &TestHost, words: &[&str], state: &str) -> Ended {
    let mut child = Command::new(bundle.link(HOOK))
        .args(words)
        .env_clear()
        .env("GPURUN_SIMULATED_HOST", host.path())
        .env("GPURUN_STATE_DIR", host.state_dir(0))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A hook that does not read closes its end.
    let _ = child.stdin.take().unwrap().write_all(state.as_bytes());
    gpurun_integration::finish(child)
}

fn state(bundle: &Path, pid: u32) -> String {
    json!({"ociVersion": "1.0.2", "id": "x", "status": "creating", "pid": pid, "bundle": bundle}).to_string()
}

#[test]
fn only_a_container_of_its_own_root_and_mounts_is_entered() {
    let host = TestHost::new("8xh100");
    let (bundle, _) = busybox(&host, "true");
    let root = bundle.root();
    let upper = || fs::read_dir(bundle.dir.path().join("upper")).unwrap().count();
    let refused = |state: &str, code: &str| {
        let ended = call(&bundle, &host, &["prestart"], state);
        assert!(ended.code == 1 && ended.err.starts_with(&format!("error[{code}]: ")), "{state} {ended:?}");
        assert_eq!(upper(), 0, "{state}");
    };
    let dir = bundle.dir.path();
    refused(&state(dir, std::process::id()), "GPU-0050");
    let mut ended = Command::new("true").spawn().unwrap();
    until("the end of true", || {
        fs::read_to_string(format!("/proc/{}/stat", ended.id())).unwrap().contains(") Z ")
    });
    refused(&state(dir, ended.id()), "GPU-0050");
    let gone = ended.id();
    ended.wait().unwrap();
    refused(&state(dir, gone), "GPU-0050");
    let hidden = Waits::after(&format!("mount -t tmpfs tmpfs {}", root.display()));
    refused(&state(dir, hidden.0.id()), "GPU-0057");
    for broken in [
        "",
        "{}",
        "[]",
        "{\"pid\": 1}",
        &state(Path::new("relative"), 1),
        &state(&dir.join("no"), hidden.0.id()),
    ] {
        refused(broken, "GPU-0058");
    }

    // A runtime that has changed the root before it calls the hook.
    let changed = Waits::after(&format!(
        "cd {0} && mkdir -p dev && mount -t tmpfs tmpfs dev && mkdir old && pivot_root . old && umount -l /old",
        root.display()
    ));
    let ended = call(&bundle, &host, &["-debug", "prestart"], &state(dir, changed.0.id()));
    assert!(ended.code == 0 && ended.err.contains("device nodes"), "{ended:?}");
    let inside = PathBuf::from(format!("/proc/{}/root", changed.0.id()));
    assert!(inside.join("dev/nvidiactl").exists() && inside.join("usr/local/nvidia/lib64").exists());
}

#[test]
fn other_verbs_do_nothing_and_a_wrong_one_says_how() {
    let host = TestHost::new("8xh100");
    let (bundle, _) = busybox(&host, "true");
    for (words, code) in
        [(&["poststart"][..], 0), (&["poststop"], 0), (&["--version"], 0), (&[], 2), (&["create"], 2)]
    {
        let ended = call(&bundle, &host, words, "");
        assert_eq!(ended.code, code, "{words:?} {ended:?}");
        assert_eq!(ended.err.starts_with("Usage"), code == 2, "{ended:?}");
    }
}

/// A cgroup that goes with this.
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        until("the cgroup's end", || fs::remove_dir(&self.0).is_ok());
    }
}

/// crun runs hooks without a umask, and systemd believes every file below a unit's directory of drop-ins.
#[test]
fn nobody_else_may_write_to_what_systemd_reads() {
    let host = TestHost::new("8xh100");
    let (bundle, mut spec) = busybox(&host, "true");
    let name = unique();
    spec["linux"]["cgroupsPath"] = json!(format!("system.slice:{name}:x"));
    bundle.write(&spec);
    let hierarchy = ["/sys/fs/cgroup/devices", "/sys/fs/cgroup"]
        .map(Path::new)
        .into_iter()
        .find(|dir| dir.join("cgroup.procs").exists());
    let cgroup = Cgroup(hierarchy.unwrap().join(format!("{name}-x.scope")));
    fs::create_dir(&cgroup.0).unwrap();
    let waits = Waits::after("true");
    fs::write(cgroup.0.join("cgroup.procs"), waits.0.id().to_string()).unwrap();
    let script = "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system
        umask 0; \"$0\" prestart && cd /run/systemd && find . -printf '%y %m %f\n' | sort";
    let mut child = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(bundle.link(HOOK))
        .env("GPURUN_SIMULATED_HOST", host.path())
        .env("GPURUN_STATE_DIR", host.state_dir(0))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(state(bundle.dir.path(), waits.0.id()).as_bytes()).unwrap();
    let ended = gpurun_integration::finish(child);
    drop(waits);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.out.contains(&format!("d 755 {name}-x.scope.d\n")), "{ended:?}");
    assert!(ended.out.contains("f 644 50-gpurun.conf\n"), "{ended:?}");
}
