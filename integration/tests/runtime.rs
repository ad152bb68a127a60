//! gpurun as an OCI runtime above real runc and crun, on bundles such as engines make: an overlay over an image's root.

use gpurun_integration::{
    TestHost,
    bundle::{Bundle, LIBRARIES, asks, has_gpu_2, probed},
    cached, description, dist, image, run,
};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, chown, symlink},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

#[test]
fn a_container_gets_the_gpu_that_it_asks_for() {
    for runtime in ["runc", "crun"] {
        let host = TestHost::with_driver("8xh100", 550, "debian");
        let mut bundle = Bundle::of("debian-python");
        bundle.runtime = runtime;
        asks(&bundle, "2");
        let saw = probed(&bundle.run(&host, &configuration(runtime)));
        has_gpu_2(&saw, "550.163.01");
        assert!(saw["write"].as_str().unwrap().contains("Read-only file system"), "{saw:#}");
        assert!(saw["shm"].as_u64().unwrap() > 64 << 20, "{saw:#}");
        assert_eq!(bundle.read()["future"], json!({"field": [1, null, 1.5]}), "unknown fields survive");
        // The driver leaves nothing in the root but the directory that it was mounted on.
        assert!(fs::read_dir(bundle.root().join("usr/local/nvidia")).unwrap().next().is_none());
    }
}

fn configuration(runtime: &str) -> String {
    let path = if runtime == "crun" { cached("crun/usr/bin/crun") } else { runtime.into() };
    format!("runtimes = [{path:?}]\n")
}

#[test]
fn the_images_own_libraries_keep_their_order() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    bundle.configure(&["NVIDIA_VISIBLE_DEVICES=void"], &["ldconfig", "-p"]);
    let before = bundle.run(&host, "").out;
    asks(&bundle, "2");
    let saw = probed(&bundle.run(&host, ""));
    let own = |list: &Value| -> Vec<String> {
        let all = list.as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned());
        all.filter(|path| {
            !path.starts_with(LIBRARIES) && !path.contains("libcuda") && !path.contains("libnvidia")
        })
        .collect()
    };
    let before: Vec<_> = before
        .lines()
        .skip(1)
        .filter_map(|line| line.rsplit_once("=> "))
        .map(|(_, path)| path.to_owned())
        .collect();
    assert!(before.len() > 20);
    // The last line names the program that wrote the cache.
    let last = |mut list: Vec<String>| {
        list.retain(|path| path.starts_with('/'));
        list
    };
    assert_eq!(last(own(&saw["cache"])), before);
    assert_eq!(last(own(&saw["cache_after_ldconfig"])), before);
}

#[test]
fn a_container_that_is_started_again_gets_the_driver_of_that_day() {
    let bundle = Bundle::of("debian-python");
    for (branch, version) in [(535, "535.216.03"), (550, "550.163.01"), (535, "535.216.03")] {
        let host = TestHost::with_driver("8xh100", branch, "debian");
        asks(&bundle, "2");
        let saw = probed(&bundle.run(&host, ""));
        has_gpu_2(&saw, version);
        let major = version.split('.').next().unwrap();
        for list in ["files", "cache"] {
            let others = saw[list].as_array().unwrap().iter().filter(|file| {
                let file = file.as_str().unwrap();
                file.contains("nvidia") && file.contains(".so.5") && !file.contains(&format!(".so.{major}"))
            });
            assert_eq!(others.count(), 0, "{list}: {saw:#}");
        }
        let dangling = saw["cache"].as_array().unwrap().iter().filter(|path| {
            path.as_str()
                .unwrap()
                .strip_prefix(LIBRARIES)
                .is_some_and(|name| !saw["files"].as_array().unwrap().contains(&name[1..].into()))
        });
        assert_eq!(dangling.count(), 0, "{saw:#}");
    }
}

#[test]
fn an_image_that_was_committed_from_a_gpu_container_of_another_toolkit_starts() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    let root = bundle.root();
    // Empty files where mounts were, links to a driver that is gone, what a killed start left.
    fs::create_dir_all(root.join("usr/local/nvidia/lib64")).unwrap();
    for empty in [
        "usr/bin/nvidia-smi",
        "usr/lib/x86_64-linux-gnu/libcuda.so.535.216.03",
        "usr/lib/x86_64-linux-gnu/libcuda.so.1",
        "usr/local/nvidia/lib64/libcuda.so.535.216.03",
        "etc/.gpurun-ld.so.cache",
        "etc/ld.so.conf.d/.gpurun-00-gpurun.conf",
    ] {
        fs::write(root.join(empty), "").unwrap();
    }
    symlink("libcuda.so.535.216.03", root.join("usr/lib/x86_64-linux-gnu/libcuda.so")).unwrap();
    symlink("libcuda.so.535.216.03", root.join("usr/local/nvidia/lib64/libcuda.so.1")).unwrap();
    symlink("/nowhere/nvidia-ml", root.join("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")).unwrap();
    asks(&bundle, "2");
    has_gpu_2(&probed(&bundle.run(&host, "")), "550.163.01");
}

#[test]
fn who_asks_for_nothing_is_not_touched() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("busybox");
    for env in [&[][..], &["NVIDIA_VISIBLE_DEVICES=void"], &["NVIDIA_VISIBLE_DEVICES="]] {
        bundle.configure(env, &["sh", "-c", "ls /dev"]);
        let state = |path: &Path| {
            (
                fs::read(path).unwrap(),
                fs::metadata(path).map(|m| (m.ino(), m.mtime(), m.mtime_nsec())).unwrap(),
            )
        };
        let before = state(&bundle.config());
        let ended = bundle.run(&host, "");
        assert!(ended.code == 0 && ended.out.contains("null") && !ended.out.contains("nvidia"), "{ended:?}");
        assert_eq!(state(&bundle.config()), before);
        let state = fs::read_dir(host.state_dir(0)).unwrap().flatten().map(|entry| entry.file_name());
        assert_eq!(state.collect::<Vec<_>>(), ["low-level-runtimes"], "the host is not looked at");
    }
    // An image's own word may not be enough.
    bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["sh", "-c", "ls /dev"]);
    let ended = bundle.run(&host, "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n");
    assert!(ended.code == 0 && !ended.out.contains("nvidia"), "{ended:?}");
}

#[test]
fn every_other_verb_goes_to_the_runtime_as_it_came() {
    let host = TestHost::new("t4");
    for words in [
        &["--version"][..],
        &["spec", "--help"],
        &["state", "create"],
        &["--root", "/run/gpurun-test-runc", "list"],
    ] {
        let own = run(Command::new(dist("gpurun"))
            .arg0("gpurun-runtime")
            .args(words)
            .env("GPURUN_SIMULATED_HOST", host.path()));
        let runc = run(Command::new("/usr/sbin/runc").args(words));
        // runc's own errors have the time in them.
        assert_eq!((own.code, &own.out), (runc.code, &runc.out), "{words:?}");
    }
    // A broken configuration stops no container from being stopped.
    let file = host.path().join("broken.toml");
    fs::write(&file, "nonsense").unwrap();
    let ended = run(Command::new(dist("gpurun"))
        .arg0("nvidia-container-runtime")
        .arg("--version")
        .env("GPURUN_CONFIG", &file));
    assert!(ended.code == 0 && ended.out.contains("runc"), "{ended:?}");
}

#[test]
fn a_refusal_is_one_paragraph_on_standard_error_and_in_the_log() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("busybox");
    for (env, configuration, code) in [
        (&["NVIDIA_VISIBLE_DEVICES=99"][..], "", "GPU-0021"),
        (&["NVIDIA_VISIBLE_DEVICES=gpu0"], "", "GPU-0020"),
        (&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99.0"], "", "GPU-0030"),
        (
            &["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=video"],
            "supported-driver-capabilities = \"compute\"",
            "GPU-0022",
        ),
        (&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_MIG_CONFIG_DEVICES=all"], "", "GPU-0024"),
        (&["NVIDIA_VISIBLE_DEVICES=all"], "nonroot = \"require\"", "GPU-0024"),
        (&["NVIDIA_VISIBLE_DEVICES=all"], "nonrot = 1", "GPU-0002"),
        (&["NVIDIA_VISIBLE_DEVICES=all"], "runtimes = [\"/nowhere\"]", "GPU-0059"),
    ] {
        bundle.configure(env, &["true"]);
        let before = fs::read(bundle.config()).unwrap();
        let ended = bundle.run(&host, configuration);
        let paragraph = format!("error[{code}]: ");
        assert!(
            ended.code == 1 && ended.err.starts_with(&paragraph) && ended.out.is_empty(),
            "{env:?} {ended:?}"
        );
        let (level, message) = bundle.logged();
        assert_eq!((level.as_str(), message.as_str()), ("error", ended.err.trim_end()));
        assert_eq!(fs::read(bundle.config()).unwrap(), before, "config.json is untouched");
        assert_eq!(fs::read_dir(bundle.dir.path().join("upper")).unwrap().count(), 0, "so is the root");
    }
    let spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["true"]);
    for broken in [
        "{",
        "[]",
        &spec.to_string().replace("\"rootfs\"", "\"nowhere\""),
        &spec.to_string().replace("\"rootfs\"", "\"/\""),
    ] {
        fs::write(bundle.config(), broken).unwrap();
        let ended = bundle.run(&host, "");
        assert!(ended.code == 1 && ended.err.starts_with("error[GPU-005"), "{ended:?}");
        assert_eq!(fs::read_to_string(bundle.config()).unwrap(), broken);
    }
}

#[test]
fn a_hostile_root_reaches_nothing_outside() {
    let host = TestHost::new("8xh100");
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "untouched").unwrap();
    let out = outside.path().to_str().unwrap();
    let deep = format!("../../../../../../../../../../..{out}");
    let cases: [&[(&str, &str)]; 6] = [
        &[("etc/ld.so.cache", &format!("{out}/file"))],
        &[("etc/ld.so.cache", &format!("{deep}/file"))],
        &[("etc", out)],
        &[("etc", &deep)],
        &[("etc/ld.so.conf.d", &deep), ("usr/bin", out)],
        &[("etc/.gpurun-ld.so.cache", &format!("{out}/file")), ("usr/local", &deep)],
    ];
    for links in cases {
        let bundle = Bundle::empty();
        let root = bundle.root();
        for part in ["lib64", "bin"] {
            fs::create_dir_all(root.join(part)).unwrap();
        }
        fs::write(root.join("lib64/ld-linux-x86-64.so.2"), "").unwrap();
        fs::copy(image("busybox", "root").join("bin/busybox"), root.join("bin/busybox")).unwrap();
        for (link, target) in links {
            let link = root.join(link);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(target, link).unwrap();
        }
        bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["/bin/busybox", "true"]);
        // Whether it starts is the image's business.
        let ended = bundle.run(&host, "");
        assert_eq!(fs::read_dir(out).unwrap().count(), 1, "{links:?} {ended:?}");
        assert_eq!(fs::read_to_string(outside.path().join("file")).unwrap(), "untouched", "{links:?}");
    }
    // A cache that nobody ever writes to must not be waited for.
    let bundle = Bundle::of("debian-python");
    fs::remove_file(bundle.root().join("etc/ld.so.cache")).unwrap();
    assert_eq!(run(Command::new("mkfifo").arg(bundle.root().join("etc/ld.so.cache"))).code, 0);
    asks(&bundle, "all");
    assert_eq!(bundle.run(&host, "").code, 0);
}

#[test]
fn a_read_only_root_gets_the_driver_too() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    let mut spec = asks(&bundle, "2");
    spec["root"]["readonly"] = json!(true);
    bundle.write(&spec);
    has_gpu_2(&probed(&bundle.run(&host, "")), "550.163.01");
}

/// A file of the driver's that lies outside its own directory in the container.
fn add_configuration(host: &TestHost) {
    let file = host.driver("usr/share/glvnd/egl_vendor.d/10_nvidia.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, "vendor").unwrap();
}

#[test]
fn a_root_on_a_read_only_file_system_gets_it_if_it_has_the_directory() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    add_configuration(&host);
    let bundle = Bundle::of("debian-python");
    let read_only = || {
        let done = run(Command::new("mount").args(["-o", "remount,ro"]).arg(bundle.root()));
        assert_eq!(done.code, 0, "{done:?}");
    };
    read_only();
    asks(&bundle, "2");
    let ended = bundle.run(&host, "");
    assert!(ended.code == 1 && ended.err.contains("has no directory /usr/local/nvidia"), "{ended:?}");
    let done = run(Command::new("mount").args(["-o", "remount,rw"]).arg(bundle.root()));
    assert_eq!(done.code, 0, "{done:?}");
    fs::create_dir(bundle.root().join("usr/local/nvidia")).unwrap();
    read_only();
    bundle.configure(
        &["NVIDIA_VISIBLE_DEVICES=2", "NVIDIA_DRIVER_CAPABILITIES=all"],
        &[
            "python3",
            "-c",
            "import ctypes; ctypes.CDLL('libcuda.so.1'); ctypes.CDLL('libnvidia-ml.so.1'); print('loaded')",
        ],
    );
    let ended = bundle.run(&host, "");
    assert!(ended.code == 0 && ended.out == "loaded\n", "{ended:?}");
}

#[test]
fn in_a_user_namespace_what_is_written_belongs_to_the_containers_root() {
    const FIRST: u32 = 200_000;
    let host = TestHost::new("8xh100");
    let bundle = Bundle::empty();
    let copied =
        run(Command::new("cp").arg("-a").arg(image("distroless", "root").join(".")).arg(bundle.root()));
    assert_eq!(copied.code, 0, "{copied:?}");
    let chowned = run(Command::new("chown").args(["-hR", &format!("{FIRST}:{FIRST}")]).arg(bundle.root()));
    assert_eq!(chowned.code, 0, "{chowned:?}");
    chown(bundle.dir.path(), Some(FIRST), Some(FIRST)).unwrap();
    let mut spec =
        bundle.configure(&["NVIDIA_VISIBLE_DEVICES=2"], &["/app/probe", "libcuda.so.1", "libnvidia-ml.so.1"]);
    let mapping = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    bundle.write(&spec);
    let ended = bundle.run(&host, "");
    assert!(ended.code == 0 && ended.out.contains("libcuda.so.1: loaded"), "{ended:?}");
    let cache = fs::metadata(bundle.root().join("etc/ld.so.cache")).unwrap();
    assert_eq!((cache.uid(), cache.gid(), cache.mode() & 0o777), (FIRST, FIRST, 0o644));
    let minor = gpurun_integration::description("8xh100").gpus[2].minor;
    let device = bundle.read()["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .any(|mount| mount["destination"] == json!(format!("/dev/nvidia{minor}")));
    assert!(device, "the node lies elsewhere on the host, so it is mounted");
}

#[test]
fn images_without_a_cache_or_without_a_loader() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("distroless");
    bundle.configure(&["NVIDIA_VISIBLE_DEVICES=0"], &["/app/probe", "libcuda.so.1", "libnvidia-ml.so.1"]);
    let ended = bundle.run(&host, "");
    assert!(ended.code == 0 && ended.out.contains("libcuda.so.1: loaded"), "{ended:?}");
    let bundle = Bundle::of("busybox");
    bundle.configure(&["NVIDIA_VISIBLE_DEVICES=0"], &["ls", "/dev/nvidiactl", LIBRARIES]);
    let ended = bundle.run(&host, "");
    assert!(ended.code == 0 && ended.out.contains("libcuda.so.1"), "{ended:?}");
}

#[test]
fn annotations_and_mounts_ask_before_the_environment() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("busybox");
    let devices = |change: &dyn Fn(&mut Value), configuration: &str| {
        let mut spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["ls", "/dev"]);
        change(&mut spec);
        bundle.write(&spec);
        let ended = bundle.run(&host, configuration);
        assert_eq!(ended.code, 0, "{ended:?}");
        let digits =
            |name: &&str| name.strip_prefix("nvidia").is_some_and(|rest| rest.parse::<u32>().is_ok());
        ended.out.lines().filter(digits).count()
    };
    let mounts = |spec: &mut Value| {
        for name in ["0", "cdi/nvidia.com/gpu/1"] {
            spec["mounts"].as_array_mut().unwrap().push(json!({
                "destination": format!("/var/run/nvidia-container-devices/{name}"),
                "type": "bind", "source": "/dev/null", "options": ["bind"],
            }));
        }
    };
    let annotation = |spec: &mut Value| {
        mounts(spec);
        spec["annotations"] =
            json!({"cdi.k8s.io/plugin": "nvidia.com/gpu=3,nvidia.com/gpu=4,nvidia.com/gpu=5"});
    };
    let accepted = "accept-nvidia-visible-devices-as-volume-mounts = true\n";
    assert_eq!(devices(&|_| (), ""), 8);
    assert_eq!(devices(&mounts, ""), 8);
    assert_eq!(devices(&mounts, accepted), 2);
    assert_eq!(devices(&annotation, accepted), 3);
}

#[test]
fn shared_memory_of_an_engines_own_grows_unless_somebody_chose_its_size() {
    let host = TestHost::new("t4");
    let bundle = Bundle::of("busybox");
    let shm = bundle.dir.path().join("shm");
    fs::create_dir(&shm).unwrap();
    let size_with = |options: &str, configuration: &str| {
        let options = format!("mode=1777,size={options}");
        let mounted = run(Command::new("mount").args(["-t", "tmpfs", "shm", "-o", &options]).arg(&shm));
        assert_eq!(mounted.code, 0, "{mounted:?}");
        let mut spec =
            bundle.configure(&["NVIDIA_VISIBLE_DEVICES=0"], &["sh", "-c", "df -m /dev/shm | tail -1"]);
        for mount in spec["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev/shm" {
                *mount = json!({"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rprivate"]});
            }
        }
        bundle.write(&spec);
        let ended = bundle.run(&host, configuration);
        run(Command::new("umount").arg(&shm));
        assert_eq!(ended.code, 0, "{ended:?}");
        ended.out.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    assert!(size_with("64m", "") > 500);
    assert_eq!(size_with("64m", "shm-size = \"300m\""), 300);
    assert_eq!(size_with("64000k", "shm-size = \"300m\""), 300);
    assert_eq!(size_with("64m", "shm-size = \"keep\""), 64);
    assert_eq!(size_with("100m", ""), 100);
}

#[test]
fn what_draws_gets_the_nodes_the_links_and_the_profile() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    add_configuration(&host);
    let bundle = Bundle::of("debian-python");
    let script = "cd /dev/dri/by-path && for link in *; do test -c $link && echo $link; done; \
                  cat /etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf; cat /usr/share/glvnd/egl_vendor.d/10_nvidia.json";
    for _ in 0..2 {
        bundle.configure(
            &["NVIDIA_VISIBLE_DEVICES=2", "NVIDIA_DRIVER_CAPABILITIES=all"],
            &["sh", "-c", script],
        );
        let ended = bundle.run(&host, "");
        let gpu = &gpurun_integration::description("8xh100").gpus[2];
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.out.ends_with("vendor"), "{ended:?}");
        for kind in ["card", "render"] {
            assert!(ended.out.contains(&format!("{}-{kind}\n", gpu.pci)), "{ended:?}");
        }
        assert!(ended.out.contains(&format!("EGLVisibleDGPUDevices\",{:#x}]", 1 << gpu.minor)), "{ended:?}");
    }
}

/// A shared mount, as /run is on a host with systemd; gpurun's own directory and a volume are on it. The volume is the
/// container's, too, and what is mounted there later must reach it.
const SHARED_MOUNT: &str = r#"
shared=$1; shift
mount -t tmpfs shared "$shared" && mount --make-shared "$shared" && mkdir "$shared/state" "$shared/volume"
export GPURUN_STATE_DIR="$shared/state"
mounts() { cut -d' ' -f2- /proc/self/mountinfo | grep -F "$shared"; }
mounts > "$shared/before"
"$@" &
until [ -e "$shared/volume/runs" ]; do kill -0 $! || exit 1; sleep 0.01; done
mounts | diff "$shared/before" - || exit 1
mkdir "$shared/volume/late" && mount -t tmpfs late "$shared/volume/late" && touch "$shared/volume/late/file"
wait $! && umount "$shared/volume/late" && mounts | diff "$shared/before" -
"#;

#[test]
fn the_drivers_files_are_one_mount_that_the_host_never_sees_and_other_mounts_travel_as_ever() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    let shared = tempfile::tempdir().unwrap();
    let script =
        "touch /volume/runs; until [ -e /volume/late/file ]; do sleep 0.01; done; ls /usr/local/nvidia/lib64";
    let mut spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=2"], &["timeout", "20", "sh", "-c", script]);
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/volume", "type": "bind", "source": shared.path().join("volume"), "options": ["rbind", "rslave"],
    }));
    bundle.write(&spec);
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-euc", SHARED_MOUNT, "sh"]).arg(shared.path());
    command.arg(bundle.link("nvidia-container-runtime")).args(["run", "--bundle"]).arg(bundle.dir.path());
    command.arg(gpurun_integration::unique()).env("GPURUN_SIMULATED_HOST", host.path());
    let ended = run(&mut command);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.out.contains("libcuda.so.550.163.01"), "{ended:?}");
    let below = |mount: &&Value| mount["destination"].as_str().unwrap().starts_with("/usr/local/nvidia");
    assert_eq!(bundle.read()["mounts"].as_array().unwrap().iter().filter(below).count(), 1);
}

#[test]
fn what_the_administrator_set_holds_for_engines_containers() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("busybox");
    let log = bundle.dir.path().join("gpurun.log");
    let configuration = format!(
        "swarm-resource = \"DOCKER_RESOURCE_GPU\"\nlog-file = {log:?}\nlog-level = \"debug\"\n\
         supported-driver-capabilities = \"utility\"\n{}",
        configuration("runc")
    );
    // A service of a swarm names its GPU so, whatever the image says.
    let uuid = &gpurun_integration::description("8xh100").gpus[2].uuid;
    bundle.configure(
        &["NVIDIA_VISIBLE_DEVICES=all", &format!("DOCKER_RESOURCE_GPU={uuid}")],
        &["sh", "-c", "ls /dev; ls /usr/local/nvidia/lib64"],
    );
    let ended = bundle.run(&host, &configuration);
    assert_eq!(ended.code, 0, "{ended:?}");
    let gpus: Vec<&str> =
        ended.out.lines().filter(|name| name.trim_start_matches("nvidia").parse::<u32>().is_ok()).collect();
    assert_eq!(
        gpus,
        [format!("nvidia{}", gpurun_integration::description("8xh100").gpus[2].minor)],
        "{ended:?}"
    );
    assert!(
        ended.out.contains("libnvidia-ml.so") && !ended.out.contains("libcuda.so"),
        "utility alone: {ended:?}"
    );
    let logged = fs::read_to_string(&log).unwrap();
    assert!(logged.contains("level=debug msg=\"gpurun: 2 device nodes"), "{logged}");
    // What fails is said there, too; less is said where less is asked for.
    bundle.configure(&["NVIDIA_VISIBLE_DEVICES=99"], &["true"]);
    fs::remove_file(&log).unwrap();
    let ended = bundle.run(&host, &configuration.replace("\"debug\"", "\"info\""));
    let logged = fs::read_to_string(&log).unwrap();
    assert!(
        ended.code == 1 && logged.contains("GPU-0021") && logged.lines().count() == 1,
        "{logged} {ended:?}"
    );
}

#[test]
fn nvidias_configuration_holds_where_gpurun_has_none() {
    let host = TestHost::new("8xh100");
    let bundle = Bundle::of("busybox");
    let file = bundle.dir.path().join("nvidia-container-runtime/config.toml");
    fs::create_dir(file.parent().unwrap()).unwrap();
    for (text, gpus) in [
        ("[nvidia-container-runtime]\nmode = \"legacy\"\nanything = { else = 1 }\n", 8),
        ("accept-nvidia-visible-devices-envvar-when-unprivileged = false\n", 0),
    ] {
        fs::write(&file, text).unwrap();
        bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["sh", "-c", "ls /dev"]);
        let mut command = Command::new(dist("gpurun"));
        command
            .arg0("gpurun-runtime")
            .arg(format!("--root={}", bundle.dir.path().join("state").display()))
            .args(["run", "--bundle"])
            .arg(bundle.dir.path())
            .arg(gpurun_integration::unique())
            .env("GPURUN_SIMULATED_HOST", host.path())
            .env("GPURUN_STATE_DIR", host.state_dir(0))
            .env("XDG_CONFIG_HOME", bundle.dir.path());
        let ended = run(&mut command);
        assert_eq!(ended.code, 0, "{ended:?}");
        let is_gpu =
            |name: &&str| name.strip_prefix("nvidia").is_some_and(|rest| rest.parse::<u32>().is_ok());
        assert_eq!(ended.out.lines().filter(is_gpu).count(), gpus, "{text}: {ended:?}");
    }
}

#[test]
fn mig_devices_are_asked_for_by_number_and_by_uuid_and_configured_by_the_privileged() {
    let host = TestHost::new("a100-mig");
    let described = description("a100-mig");
    let devices = &described.gpus[0].mig.as_ref().unwrap().devices;
    let bundle = Bundle::of("busybox");
    let nodes = |env: &[&str], privileged: bool| {
        let mut spec = bundle.configure(env, &["sh", "-c", "ls -d /dev/nvidia? /dev/nvidia-caps/*"]);
        if privileged {
            spec["process"]["capabilities"]["bounding"].as_array_mut().unwrap().push("CAP_SYS_ADMIN".into());
            bundle.write(&spec);
        }
        let ended = bundle.run(&host, "");
        assert_eq!(ended.code, 0, "{env:?}: {ended:?}");
        ended.out.lines().map(String::from).collect::<Vec<_>>()
    };
    let by_number = nodes(&["NVIDIA_VISIBLE_DEVICES=0:1"], false);
    assert_eq!(by_number, nodes(&[&format!("NVIDIA_VISIBLE_DEVICES={}", devices[1].uuid)], false));
    assert_ne!(by_number, nodes(&["NVIDIA_VISIBLE_DEVICES=0:2"], false));
    // The GPU's node, and those of the GPU instance and of the compute instance.
    assert!(by_number.len() == 3 && by_number.contains(&"/dev/nvidia0".into()), "{by_number:?}");
    let both =
        ["NVIDIA_VISIBLE_DEVICES=0:1", "NVIDIA_MIG_CONFIG_DEVICES=all", "NVIDIA_MIG_MONITOR_DEVICES=all"];
    let configuring = nodes(&both, true);
    for node in ["/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia-caps/nvidia-cap2"] {
        assert!(configuring.contains(&node.into()) && !by_number.contains(&node.into()), "{configuring:?}");
    }
}
