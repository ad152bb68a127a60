//! CDI documents under real runc and crun, and the hooks that they name on roots that wish the host ill.

use gpurun::formats::cdi::{ContainerEdits, Document, Hook, Mount};
use gpurun_integration::{
    Ended, SpawnPiped, TestHost,
    bundle::{Bundle, Hierarchies, LIBRARIES, PROBE, probed},
    cached,
    cdi::inject,
    description, dist, finish, image, must, run, unique, with_compat,
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{Seek, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

fn generate(host: &TestHost, options: &[&str]) -> Document {
    let text = must(host.gpurun().args(["cdi", "generate", "--hook"]).arg(dist("gpurun-hook")).args(options));
    Document::parse(&text).unwrap()
}

/// `runc run`, `crun run`.
fn start(bundle: &Bundle, runtime: &str) -> Ended {
    let mut command = match runtime {
        "crun" => Hierarchies::Legacy.command(&cached("crun/usr/bin/crun")),
        _ => Command::new("runc"),
    };
    let state = bundle.dir.path().join("state");
    run(command.arg("--root").arg(state).args(["run", "--bundle"]).arg(bundle.dir.path()).arg(unique()))
}

const RUNTIMES: [&str; 2] = ["runc", "crun"];

/// A container of the document's, that says what it sees.
fn asks(bundle: &Bundle, document: &Document, devices: &[&str]) -> Value {
    let mut spec = bundle.configure(&[], &["python3", "-c", PROBE]);
    inject(document, devices, &mut spec);
    bundle.write(&spec);
    spec
}

fn has_gpu_2(saw: &Value, version: &str) {
    assert_eq!(saw["libcuda"], json!([format!("{LIBRARIES}/libcuda.so.{version}")]), "{saw:#}");
    assert_eq!(saw["nvml"], json!([format!("{LIBRARIES}/libnvidia-ml.so.{version}")]));
    let gpu = &description("8xh100").gpus[2];
    let smi = saw["smi"].as_str().unwrap();
    assert!(smi.lines().count() == 1 && smi.contains(&gpu.uuid), "{saw:#}");
    let node = format!("/dev/nvidia{}", gpu.minor);
    assert_eq!(saw["nodes"][&node], json!(format!("195:{}", gpu.minor)));
    assert_eq!(saw["nodes"].as_object().unwrap().len(), 5, "nvidiactl, uvm, its tools, modeset: {saw:#}");
    assert_eq!((&saw["visible"], &saw["after_ldconfig"]), (&json!("void"), &json!("loaded\n")), "{saw:#}");
}

#[test]
fn a_container_gets_the_device_that_its_engine_was_asked_for() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let document = generate(&host, &[]);
    for runtime in RUNTIMES {
        let uuid = description("8xh100").gpus[2].uuid.clone();
        for device in ["2", &uuid] {
            let bundle = Bundle::of("debian-python");
            asks(&bundle, &document, &[device]);
            let saw = probed(&start(&bundle, runtime));
            has_gpu_2(&saw, "550.163.01");
            assert!(saw["write"].as_str().unwrap().contains("Read-only file system"), "{runtime}: {saw:#}");
            // The driver leaves nothing in the root but the directory that it was mounted on.
            assert!(fs::read_dir(bundle.root().join("usr/local/nvidia")).unwrap().next().is_none());
        }
    }
    let bundle = Bundle::of("debian-python");
    asks(&bundle, &document, &["all"]);
    assert_eq!(probed(&start(&bundle, "runc"))["smi"].as_str().unwrap().lines().count(), 8);
}

#[test]
fn a_container_that_is_started_again_gets_the_driver_of_that_day() {
    let bundle = Bundle::of("debian-python");
    for (branch, version) in [(535, "535.216.03"), (550, "550.163.01"), (535, "535.216.03")] {
        let host = TestHost::with_driver("8xh100", branch, "debian");
        asks(&bundle, &generate(&host, &["--format", "json"]), &["2"]);
        let saw = probed(&start(&bundle, "runc"));
        has_gpu_2(&saw, version);
        let stale = saw["cache"].as_array().unwrap().iter().filter(|path| {
            let name = path.as_str().unwrap().strip_prefix(LIBRARIES);
            name.is_some_and(|name| {
                !name[1..].contains('/') && !saw["files"].as_array().unwrap().contains(&name[1..].into())
            })
        });
        assert_eq!(stale.count(), 0, "{saw:#}");
    }
}

#[test]
fn a_read_only_root_and_a_user_namespace_are_no_hindrance() {
    const FIRST: u32 = 200_000;
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let document = generate(&host, &[]);
    for runtime in RUNTIMES {
        let bundle = Bundle::of("debian-python");
        let mut spec = asks(&bundle, &document, &["2"]);
        spec["root"]["readonly"] = json!(true);
        bundle.write(&spec);
        has_gpu_2(&probed(&start(&bundle, runtime)), "550.163.01");
    }
    let host = TestHost::new("8xh100");
    let document = generate(&host, &[]);
    let bundle = Bundle::empty();
    must(Command::new("cp").arg("-a").arg(image("distroless", "root").join(".")).arg(bundle.root()));
    must(Command::new("chown").args(["-hR", &format!("{FIRST}:{FIRST}")]).arg(bundle.root()));
    chown(bundle.dir.path(), Some(FIRST), Some(FIRST)).unwrap();
    let mut spec = bundle.configure(&[], &["/app/probe", "libcuda.so.1", "libnvidia-ml.so.1"]);
    let mapping = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    // Nodes of another place cannot be made there, whoever asks for them: the engine's business.
    let mut nodeless = document.clone();
    nodeless.container_edits.device_nodes.clear();
    inject(&nodeless, &[], &mut spec);
    bundle.write(&spec);
    let ended = start(&bundle, "runc");
    assert!(ended.code == 0 && ended.out.contains("libcuda.so.1: loaded"), "{ended:?}");
    let cache = fs::metadata(bundle.root().join("etc/ld.so.cache")).unwrap();
    assert_eq!((cache.uid(), cache.gid(), cache.mode() & 0o777), (FIRST, FIRST, 0o644));
}

#[test]
fn images_without_a_cache_or_without_a_loader_and_parts_of_a_gpu() {
    let host = TestHost::new("a100-mig");
    let document = generate(&host, &[]);
    let mig = document.devices.iter().find(|device| device.name.contains(':')).expect("a MIG device").clone();
    let bundle = Bundle::of("busybox");
    let mut spec = bundle
        .configure(&[], &["sh", "-c", "ls /dev/nvidia-caps; readlink /usr/local/nvidia/lib64/libcuda.so.1"]);
    inject(&document, &[&mig.name], &mut spec);
    bundle.write(&spec);
    let ended = start(&bundle, "runc");
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.out.lines().filter(|line| line.starts_with("nvidia-cap")).count() == 2, "{ended:?}");
    assert!(ended.out.contains("libcuda.so.5"), "{ended:?}");
    let bundle = Bundle::of("distroless");
    let mut spec = bundle.configure(&[], &["/app/probe", "libcuda.so.1", "libnvidia-ml.so.1"]);
    inject(&document, &["all"], &mut spec);
    bundle.write(&spec);
    let ended = start(&bundle, "runc");
    assert!(ended.code == 0 && ended.out.contains("libcuda.so.1: loaded"), "{ended:?}");
}

#[test]
fn who_draws_gets_links_to_its_own_nodes_and_the_profile() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let document = generate(&host, &[]);
    for runtime in RUNTIMES {
        let bundle = Bundle::of("debian-python");
        let script = "cd /dev/dri/by-path && ls && for link in *; do test -c $link || exit 3; done; \
                      cat /etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf";
        let mut spec = bundle.configure(&[], &["sh", "-c", script]);
        inject(&document, &["2"], &mut spec);
        bundle.write(&spec);
        let ended = start(&bundle, runtime);
        let gpu = &description("8xh100").gpus[2];
        assert_eq!(ended.code, 0, "{runtime}: {ended:?}");
        assert_eq!(ended.out.matches("pci-").count(), 2, "{ended:?}");
        assert!(ended.out.contains(&format!("pci-{}-card", gpu.pci)), "{ended:?}");
        assert!(ended.out.contains(&format!("EGLVisibleDGPUDevices\",{:#x}]", 1 << gpu.minor)), "{ended:?}");
    }
}

/// Device nodes of every feature, with the numbers of /dev/null: a name a line.
const FEATURES: &str = "nvidia-fs0 nvidia-fs1 infiniband/uverbs0 infiniband/rdma_cm nvidia-nvswitchctl nvidia-nvswitch0 gdrdrv \
                        nvidia-caps-imex-channels/channel0 nvidia-caps-imex-channels/channel12";

fn with_features(name: &str) -> TestHost {
    let host = TestHost::new(name);
    for node in FEATURES.split_whitespace() {
        let path = host.path().join("dev").join(node);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        must(Command::new("mknod").args(["-m", "666"]).arg(path).args(["c", "1", "3"]));
    }
    fs::create_dir_all(host.driver("run/udev/data")).unwrap();
    fs::create_dir_all(host.driver("etc")).unwrap();
    fs::write(host.driver("etc/cufile.json"), "{}").unwrap();
    host
}

#[test]
fn features_are_devices_of_documents_of_their_own() {
    let host = with_features("8xh100");
    let without = TestHost::new("8xh100");
    let gpus = generate(&host, &[]);
    for (mode, kind, nodes) in [
        ("gds", "nvidia.com/gds", &["nvidia-fs0", "nvidia-fs1"][..]),
        ("mofed", "nvidia.com/mofed", &["infiniband/rdma_cm", "infiniband/uverbs0"]),
        ("nvswitch", "nvidia.com/nvswitch", &["nvidia-nvswitch0", "nvidia-nvswitchctl"]),
        ("gdrcopy", "nvidia.com/gdrcopy", &["gdrdrv"]),
        (
            "imex",
            "nvidia.com/imex-channel",
            &["nvidia-caps-imex-channels/channel0", "nvidia-caps-imex-channels/channel12"],
        ),
    ] {
        let document = generate(&host, &["--mode", mode]);
        assert_eq!(document.kind, kind);
        let bundle = Bundle::of("busybox");
        let script = "cd /dev; find . -type c | grep -e fs -e infini -e switch -e gdr -e channel | cut -c3- | sort; \
                      ls -d /run/udev/data /etc/cufile.json 2>/dev/null; echo done";
        let mut spec = bundle.configure(&[], &["sh", "-c", script]);
        inject(&document, &["all"], &mut spec);
        inject(&gpus, &["2"], &mut spec);
        bundle.write(&spec);
        let ended = start(&bundle, "runc");
        let files = if mode == "gds" { "/etc/cufile.json\n/run/udev/data\n" } else { "" };
        assert_eq!(ended.out, format!("{}\n{files}done\n", nodes.join("\n")), "{mode}: {ended:?}");
        let words = ["cdi", "generate", "--mode", mode, "--hook", "/bin/true"];
        let ended = run(without.gpurun().args(words));
        assert!(ended.code == 125 && ended.err.starts_with("error[GPU-0014]"), "{mode}: {ended:?}");
    }
    let channels = generate(&host, &["--mode", "imex"]);
    let names: Vec<_> = channels.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["0", "12", "all"]);
    assert_eq!(channels.devices[1].container_edits.device_nodes.len(), 1);
    // The runtime gives the same.
    let bundle = Bundle::of("busybox");
    let spec = bundle.configure(
        &["NVIDIA_VISIBLE_DEVICES=0", "NVIDIA_GDS=enabled"],
        &["sh", "-c", "ls /dev/nvidia-fs* /etc/cufile.json; ls /run/udev"],
    );
    bundle.write(&spec);
    let mut command = host.gpurun();
    command.arg0("gpurun-runtime").arg("--root").arg(bundle.dir.path().join("state"));
    let ended = run(command.args(["run", "--bundle"]).arg(bundle.dir.path()).arg(unique()));
    assert_eq!((ended.code, ended.out.lines().last()), (0, Some("data")), "{ended:?}");
    assert_eq!(ended.out.lines().count(), 4, "{ended:?}");

    for (mode, code) in [("csv", "GPU-0070"), ("wsl", "GPU-0010")] {
        let ended = run(host.gpurun().args(["cdi", "generate", "--mode", mode, "--hook", "/bin/true"]));
        assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]")), "{ended:?}");
    }
}

#[test]
fn who_manages_gpus_gets_every_node_and_may_make_others() {
    let host = with_features("a100-mig");
    let document = generate(&host, &["--mode", "management"]);
    assert_eq!((document.kind.as_str(), document.devices.len()), ("management.nvidia.com/gpu", 1));
    for runtime in RUNTIMES {
        let bundle = Bundle::of("debian-python");
        let script = "cd /dev; find . -type c | grep nvidia | cut -c3- | sort | tr '\\n' ' '; nvidia-smi -L | wc -l; \
                      python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\")' && echo loaded";
        let mut spec = bundle.configure(&[], &["sh", "-c", script]);
        inject(&document, &["all"], &mut spec);
        bundle.write(&spec);
        let ended = start(&bundle, runtime);
        assert!(ended.code == 0 && ended.out.ends_with("loaded\n"), "{runtime}: {ended:?}");
        let nodes: Vec<_> = ended.out.lines().next().unwrap().split(' ').collect();
        for node in [
            "nvidia0",
            "nvidia1",
            "nvidiactl",
            "nvidia-caps/nvidia-cap1",
            "nvidia-caps-imex-channels/channel12",
        ] {
            assert!(nodes.contains(&node), "{node}: {ended:?}");
        }
        assert!(!nodes.iter().any(|node| node.contains("fs") || node.contains("switch")), "{ended:?}");
    }
    let hooks: Vec<_> = document.container_edits.hooks.iter().map(|hook| hook.args[1].as_str()).collect();
    assert_eq!(hooks, ["create-symlinks", "update-ldcache"], "the driver's parameters stay");
}

#[test]
fn a_document_moves_with_its_driver() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let dir = tempfile::tempdir().unwrap();
    let (whole, elsewhere) = (dir.path().join("nvidia.yaml"), dir.path().join("elsewhere"));
    let hook = dist("gpurun-hook");
    must(host.gpurun().args(["cdi", "generate", "--output"]).arg(&whole).arg("--hook").arg(&hook));
    // The host's files are reached by another name, as those of a driver container are from outside it.
    symlink(host.path(), &elsewhere).unwrap();
    let mut ctk = Command::new(dist("gpurun"));
    ctk.arg0("nvidia-ctk")
        .args(["cdi", "transform", "root", "--from"])
        .arg(host.path())
        .arg("--to")
        .arg(&elsewhere);
    let ended = finish(ctk.stdin(fs::File::open(&whole).unwrap()).spawn_piped());
    let moved = Document::parse(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let sources = |document: &Document| {
        let mounts = document.container_edits.mounts.clone().into_iter().map(|mount| mount.host_path);
        mounts
            .chain(document.container_edits.device_nodes.iter().filter_map(|node| node.host_path.clone()))
            .collect::<Vec<_>>()
    };
    assert!(
        sources(&moved).iter().all(|path| path == "tmpfs" || path.starts_with(elsewhere.to_str().unwrap()))
    );
    let bundle = Bundle::of("debian-python");
    asks(&bundle, &moved, &["2"]);
    has_gpu_2(&probed(&start(&bundle, "runc")), "550.163.01");

    let back = dir.path().join("back.json");
    let mut gpurun = host.gpurun();
    let words = ["cdi", "transform", "root", "--relative-to", "host", "--input", "-", "--from"];
    gpurun.args(words).arg(&elsewhere).arg("--to").arg(host.path()).arg("--output").arg(&back);
    let file = dir.path().join("moved.yaml");
    fs::write(&file, gpurun::formats::cdi::to_yaml(&moved)).unwrap();
    let ended = finish(gpurun.stdin(fs::File::open(&file).unwrap()).spawn_piped());
    assert_eq!(ended.code, 0, "{ended:?}");
    let text = fs::read_to_string(&back).unwrap();
    assert!(text.starts_with('{'));
    assert_eq!(
        Document::parse(&text).unwrap(),
        Document::parse(&fs::read_to_string(&whole).unwrap()).unwrap()
    );
}

/// A document as NVIDIA's toolkit writes it: files in the image's own library directory, and a hook for each thing.
fn peers_document(host: &TestHost, hook: &Path) -> Document {
    let directory = "/usr/lib/x86_64-linux-gnu";
    let mut edits =
        ContainerEdits { env: vec!["NVIDIA_VISIBLE_DEVICES=void".into()], ..ContainerEdits::default() };
    let options = ["ro", "nosuid", "nodev", "rbind", "rprivate"].map(String::from);
    let mut add = |host_path: &Path, container_path: String| {
        edits.mounts.push(Mount {
            host_path: host_path.display().to_string(),
            container_path,
            options: options.to_vec(),
            ..Mount::default()
        });
    };
    for name in ["libcuda.so.550.163.01", "libnvidia-ml.so.550.163.01"] {
        add(&host.driver(&directory[1..]).join(name), format!("{directory}/{name}"));
    }
    add(&host.driver("usr/bin/nvidia-smi"), "/usr/bin/nvidia-smi".into());
    let hooks: [&[&str]; 5] = [
        &[
            "create-symlinks",
            "--link",
            "libcuda.so.550.163.01::/usr/lib/x86_64-linux-gnu/libcuda.so.1",
            "--link",
            "libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so",
            "--link",
            "libnvidia-ml.so.550.163.01::/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
        ],
        &["enable-cuda-compat", "--host-driver-version=550.163.01"],
        &["update-ldcache", "--folder", directory, "--folder", "/usr/lib/x86_64-linux-gnu/vdpau"],
        &["disable-device-node-modification"],
        &["a-hook-of-next-year", "--with", "flags"],
    ];
    let name = hook.file_name().unwrap().to_str().unwrap().to_owned();
    let before: &[&str] = if name == "nvidia-ctk" { &["hook"] } else { &[] };
    for words in hooks {
        let args = [name.as_str()].iter().chain(before).chain(words).map(ToString::to_string).collect();
        let env = vec!["NVIDIA_CTK_DEBUG=false".into()];
        edits.hooks.push(Hook {
            hook_name: "createContainer".into(),
            path: hook.display().to_string(),
            args,
            env,
            ..Hook::default()
        });
    }
    Document { container_edits: edits, ..generate(host, &[]) }
}

#[test]
fn a_document_of_nvidias_toolkit_works_with_our_hooks() {
    let host = TestHost::with_driver("8xh100", 550, "flat");
    let directory = tempfile::tempdir().unwrap();
    for name in ["nvidia-cdi-hook", "nvidia-ctk"] {
        let hook = directory.path().join(name);
        symlink(dist("gpurun-hook"), &hook).unwrap();
        for runtime in RUNTIMES {
            let bundle = Bundle::of("debian-python");
            let script = "ldconfig -p | grep libcuda.so.1; nvidia-smi -L; \
                          python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); ctypes.CDLL(\"libnvidia-ml.so.1\")' && \
                          ldconfig && python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); ctypes.CDLL(\"libz.so.1\")' && echo loaded";
            let before =
                must(Command::new("chroot").arg(bundle.root()).args(["ldconfig", "-p"])).lines().count();
            let mut spec = bundle.configure(&[], &["sh", "-c", script]);
            let mut document = peers_document(&host, &hook);
            document.container_edits.device_nodes = generate(&host, &[]).container_edits.device_nodes;
            inject(&document, &["2"], &mut spec);
            bundle.write(&spec);
            let ended = start(&bundle, runtime);
            assert!(ended.code == 0 && ended.out.ends_with("loaded\n"), "{name} {runtime}: {ended:?}");
            assert!(ended.out.contains("/usr/lib/x86_64-linux-gnu/libcuda.so.1"), "{ended:?}");
            let gpu = &description("8xh100").gpus[2];
            assert!(ended.out.contains(&gpu.uuid), "{ended:?}");
            assert!(before > 20);
            assert!(fs::read_link(bundle.root().join("usr/lib/x86_64-linux-gnu/libcuda.so.1")).is_ok());
        }
    }
}

/// Runs a hook on a root, as crun does.
fn hook(root: &Path, words: &[&str]) -> Ended {
    hook_with(
        &json!({"ociVersion": "1.0.2", "status": "creating", "pid": 1, "bundle": "/nowhere", "root": root})
            .to_string(),
        words,
    )
}

fn hook_with(state: &str, words: &[&str]) -> Ended {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(state.as_bytes()).unwrap();
    file.rewind().unwrap();
    finish(Command::new(dist("gpurun-hook")).env_clear().args(words).stdin(file).spawn_piped())
}

/// Every hook, with paths in every directory that one of them writes to.
const HOOKS: [&[&str]; 7] = [
    &["create-symlinks", "--link", "x.so.1::/usr/lib/x86_64-linux-gnu/x.so", "--link", "y::/etc/deep/link"],
    &["update-ldcache", "--folder", "/usr/lib/x86_64-linux-gnu", "--folder", "/opt/lib"],
    &["enable-cuda-compat", "--host-driver-version=470.82.01", "--host-cuda-version=11.4"],
    &["disable-device-node-modification"],
    &["update-application-profile"],
    &[
        "chmod",
        "--mode",
        "777",
        "--path",
        "/etc/deep",
        "--path",
        "/etc/ld.so.cache",
        "--path",
        "/usr/lib/file",
    ],
    &[
        "all",
        "--host-driver-version=470.82.01",
        "--host-cuda-version=11.4",
        "--folder=/usr/local/nvidia/lib64",
        "--library=/usr/local/nvidia/lib64/libcuda.so.1",
        "--link=libcuda.so.470::/usr/local/nvidia/lib64/libcuda.so.1",
        "--link=/usr/local/nvidia/bin/nvidia-smi::/usr/bin/nvidia-smi",
    ],
];

/// A root with a C library's loader, a library, a GPU's node and files of CUDA, so that each hook has something to do.
fn lay_root(root: &Path) {
    for part in [
        "lib64",
        "bin",
        "dev",
        "etc/ld.so.conf.d",
        "usr/lib/x86_64-linux-gnu",
        "opt/lib",
        "usr/local/cuda/compat",
    ] {
        fs::create_dir_all(root.join(part)).unwrap();
    }
    fs::write(root.join("lib64/ld-linux-x86-64.so.2"), "").unwrap();
    for library in ["usr/lib/x86_64-linux-gnu/libx.so.1", "opt/lib/liby.so.1"] {
        fs::copy(dist("libsimulated_cuda.so"), root.join(library)).unwrap();
    }
    must(Command::new("mknod").arg(root.join("dev/nvidia0")).args(["c", "195", "0"]));
}

/// What a directory holds, with owners, modes and content.
fn state_of(directory: &Path) -> String {
    must(
        Command::new("sh")
            .args([
                "-c",
                "find . -printf '%p %y %m %U %l %C@\\n' | sort; find . -type f -exec sha256sum {} +",
            ])
            .current_dir(directory),
    )
}

#[test]
fn a_hostile_root_reaches_nothing_outside() {
    let outside = tempfile::tempdir().unwrap();
    for part in [
        "ld.so.conf.d",
        "deep",
        "x86_64-linux-gnu",
        "nvidia/lib64",
        "lib/x86_64-linux-gnu",
        "bin",
        "local/nvidia",
    ] {
        fs::create_dir_all(outside.path().join(part)).unwrap();
    }
    for file in ["ld.so.cache", "file", "ld.so.conf.d/00-gpurun.conf", "deep/link", "x86_64-linux-gnu/x.so"] {
        fs::write(outside.path().join(file), "untouched").unwrap();
    }
    let before = state_of(outside.path());
    let out = outside.path().to_str().unwrap();
    let up = format!("{}{out}", "../".repeat(20));
    let mut refused = 0;
    for path in [
        "etc",
        "etc/ld.so.conf.d",
        "etc/ld.so.cache",
        "etc/ld.so.conf",
        "etc/.gpurun-ld.so.cache",
        "etc/deep",
        "etc/deep/link",
        "etc/nvidia",
        "usr",
        "usr/lib",
        "usr/lib/x86_64-linux-gnu",
        "usr/bin",
        "usr/local",
        "usr/local/nvidia",
        "usr/local/nvidia/lib64",
        "usr/local/cuda",
        "usr/local/cuda/compat",
        "opt",
        "opt/lib",
        "dev",
        "dev/nvidia0",
        "etc/nvidia/nvidia-application-profiles-rc.d",
        "usr/lib/file",
    ] {
        for target in [out, &up, "/", "..", "../../../../../../..", "FIFO"] {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("root");
            fs::create_dir(&root).unwrap();
            lay_root(&root);
            let place = root.join(path);
            let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir_all(&place));
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            if target == "FIFO" {
                must(Command::new("mkfifo").arg(&place));
            } else {
                symlink(target, &place).unwrap();
            }
            for words in HOOKS {
                let ended = hook(&root, words);
                refused += u32::from(ended.code != 0);
                assert!(
                    ended.code <= 1 && !ended.err.contains("panicked"),
                    "{path} -> {target} {words:?}: {ended:?}"
                );
                // Notes about what is only optional come first.
                let is_explained = ended.err.lines().any(|line| line.starts_with("error[GPU-"));
                assert!(ended.code == 0 || is_explained, "{ended:?}");
            }
            let beside: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(beside, ["root"], "{path} -> {target}");
        }
    }
    assert_eq!(state_of(outside.path()), before);
    assert!(refused > 0, "none of these was refused");
}

/// How often a hook runs while the root changes: a second for each 1,000.
const ROUNDS: u32 = 10_000;

/// Directories of a root through which hooks go, and files that they write.
const SWAPPED: [&str; 13] = [
    "etc",
    "etc/ld.so.conf.d",
    "etc/ld.so.cache",
    "etc/deep",
    "etc/nvidia",
    "etc/nvidia/nvidia-application-profiles-rc.d",
    "usr",
    "usr/lib",
    "usr/lib/x86_64-linux-gnu",
    "usr/bin",
    "usr/local",
    "usr/local/nvidia",
    "usr/local/nvidia/lib64",
];

/// While hooks work, each directory of their paths is for moments a link out of the root, or a FIFO. They run in a root of their
/// own, so that what leaves the container's comes to lie where it is seen and does no harm.
#[test]
fn a_root_that_changes_meanwhile_reaches_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    must(Command::new("cp").arg("-a").arg(image("busybox", "root")).arg(&outside));
    let root = outside.join("container");
    for host in [&outside, &root] {
        fs::create_dir_all(host).unwrap();
        lay_root(host);
        for part in SWAPPED.into_iter().filter(|part| !part.ends_with("cache")) {
            fs::create_dir_all(host.join(part)).unwrap();
        }
        fs::write(host.join("etc/ld.so.cache"), "").unwrap();
    }
    fs::copy(dist("gpurun-hook"), outside.join("hook")).unwrap();
    let state = |root: &str| json!({"bundle": "/nowhere", "root": root}).to_string();
    fs::write(outside.join("state"), state("/container")).unwrap();
    let without = |what: &Path| {
        let script = "find . -path ./container -prune -o -printf '%p %y %m %U %l %C@\\n' | sort";
        must(Command::new("sh").args(["-c", script]).current_dir(what))
    };
    let before = without(&outside);
    let traps: Vec<_> = ["/", "..", "../..", "/dev/zero", "FIFO"].into_iter().zip(0..).collect();
    for (target, number) in &traps {
        let trap = root.join(number.to_string());
        match *target {
            "FIFO" => drop(must(Command::new("mkfifo").arg(trap))),
            target => symlink(target, trap).unwrap(),
        }
    }
    let words = HOOKS.map(|words| format!("/hook {} < /state 2>&1; echo \"code $?\"", words.join(" ")));
    let each = u32::try_from(HOOKS.len()).unwrap();
    // In ten parts, each of which may take a while where others work, too.
    let rounds = ROUNDS.div_ceil(10 * each);
    let script = format!(
        "mount -t proc proc $0/proc && exec chroot $0 sh -c 'for round in $(seq {rounds}); do {}; done; echo done'",
        words.join("; "),
    );
    let stop = AtomicBool::new(false);
    let said = std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let exchange = |one: &Path, other: &Path| {
                let (cwd, how) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
                rustix::fs::renameat_with(cwd, one, cwd, other, how).is_ok()
            };
            let mut swaps = 0_u64;
            // RENAME_EXCHANGE: at each moment there is the one or the other.
            for part in SWAPPED.into_iter().cycle() {
                for (_, number) in &traps {
                    let (place, trap) = (root.join(part), root.join(number.to_string()));
                    for _ in 0..20 {
                        // What one hook makes can be away for a moment.
                        if exchange(&place, &trap) {
                            swaps += 1;
                            while !exchange(&place, &trap) {}
                        }
                    }
                }
                if stop.load(Ordering::Relaxed) {
                    return swaps;
                }
            }
            swaps
        });
        let said: Vec<Ended> = (0..10)
            .map(|_| {
                let words = ["-m", "--propagation", "private", "sh", "-c", &script];
                run(Command::new("unshare").args(words).arg(&outside))
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(swapper.join().unwrap() > 10_000, "swaps");
        said
    });
    for part in &said {
        assert!(part.code == 0 && part.out.ends_with("done\n"), "{:.2000} {}", part.out, part.err);
        assert!(!part.out.contains("panicked"), "{}", part.out);
    }
    let codes =
        |code: &str| said.iter().flat_map(|part| part.out.lines()).filter(|line| *line == code).count();
    let (done, refused) = (codes("code 0"), codes("code 1"));
    assert_eq!(done + refused, usize::try_from(10 * rounds * each).unwrap(), "no other code");
    assert!(done > 100 && refused > 100, "{done} {refused}");
    let after = without(&outside);
    let changed: Vec<&str> = after.lines().filter(|line| !before.contains(line)).collect();
    assert!(after == before, "{changed:#?}");
}

#[test]
fn a_volume_is_not_written_to() {
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("ld.so.conf.d")).unwrap();
    let before = state_of(volume.path());
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    lay_root(&root);
    must(Command::new("mount").arg("--bind").arg(volume.path()).arg(root.join("etc")));
    let ended: Vec<Ended> = HOOKS.iter().map(|words| hook(&root, words)).collect();
    must(Command::new("umount").arg(root.join("etc")));
    assert_eq!(state_of(volume.path()), before);
    // A link of the image's leads to a volume.
    for (link, number) in [("usr/local/nvidia", 6), ("dev", 0)] {
        let place = root.join(link);
        fs::remove_dir_all(&place).unwrap_or_default();
        symlink("/data", &place).unwrap();
        fs::create_dir_all(root.join("data")).unwrap();
        must(Command::new("mount").arg("--bind").arg(volume.path()).arg(root.join("data")));
        fs::create_dir_all(volume.path().join("lib64")).unwrap();
        let words = [HOOKS[number], &["--link", "a::/dev/b"]].concat();
        let ended = hook(&root, &words);
        let found = volume.path().join("lib64/libcuda.so.1").is_symlink();
        must(Command::new("umount").arg(root.join("data")));
        fs::remove_dir(volume.path().join("lib64")).unwrap();
        assert!(!found, "{link}: {ended:?}");
        if number == 6 {
            assert!(ended.err.starts_with("error[GPU-0057]"), "{ended:?}");
        }
    }
    // What a volume keeps out is only optional: it is named, and the container starts.
    for number in [0, 1, 6] {
        assert!(ended[number].code == 0 && ended[number].err.contains("volume"), "{:?}", ended[number]);
    }
}

/// What a document makes in the container's own /dev and /usr/local/nvidia goes to no volume that lies there in their place.
#[test]
fn a_volume_in_the_place_of_the_drivers_directory_or_of_dev_is_not_written_to() {
    for (place, link) in [("/dev", "/dev/y"), ("/usr/local/nvidia", "/usr/local/nvidia/lib64/x")] {
        for runtime in RUNTIMES {
            let bundle = Bundle::of("busybox");
            let volume = bundle.dir.path().join("volume");
            fs::create_dir(&volume).unwrap();
            fs::write(volume.join("null"), "").unwrap();
            let mut spec = bundle.configure(&[], &["true"]);
            spec["mounts"].as_array_mut().unwrap().push(json!({
                "destination": place, "type": "bind", "source": volume, "options": ["bind", "rw"],
            }));
            let args = ["gpurun-hook", "all", "--link", &format!("null::{link}")];
            spec["hooks"] = json!({"createContainer": [{"path": dist("gpurun-hook"), "args": args}]});
            bundle.write(&spec);
            let ended = start(&bundle, runtime);
            assert_eq!(must(Command::new("ls").arg(&volume)), "null\n", "{place} {runtime} {ended:?}");
            assert_eq!(ended.err.contains("hook"), place != "/dev", "{place} {runtime} {ended:?}");
        }
    }
}

/// A link of an image's names what its user may not read: the hook may, and writes for everybody.
#[test]
fn nothing_of_a_volume_or_of_the_kernel_is_copied_to_where_an_images_user_can_read_it() {
    const SECRET: &str = "/very/secret";
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("secret"), format!("{SECRET}\n")).unwrap();
    fs::set_permissions(volume.path().join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    for runtime in RUNTIMES {
        for (target, word) in [("/data/secret", SECRET), ("../../../proc/version", "version")] {
            for (file, words) in
                [("etc/ld-musl-x86_64.path", HOOKS[6]), ("etc/ld.so.conf.d/00-gpurun-compat.conf", HOOKS[1])]
            {
                let bundle = Bundle::of("busybox");
                let root = bundle.root();
                lay_root(&root);
                fs::create_dir_all(root.join("lib")).unwrap();
                fs::write(root.join("lib/ld-musl-x86_64.so.1"), "").unwrap();
                symlink(target, root.join(file)).unwrap();
                let mut spec =
                    bundle.configure(&[], &["sh", "-c", "cat /etc/*.path /etc/ld.so.conf.d/00-gpurun.conf"]);
                spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
                spec["mounts"].as_array_mut().unwrap().push(json!({
                    "destination": "/data", "type": "bind", "source": volume.path(), "options": ["bind", "ro"],
                }));
                let args = [&["gpurun-hook"], words].concat();
                spec["hooks"] = json!({"createContainer": [{"path": dist("gpurun-hook"), "args": args}]});
                bundle.write(&spec);
                let ended = start(&bundle, runtime);
                assert!(ended.code == 0 && ended.out.contains("lib"), "{runtime} {target} {file}: {ended:?}");
                assert!(!ended.out.contains(word), "{runtime} {target} {file}: {ended:?}");
            }
        }
    }
}

#[test]
fn a_device_node_that_is_a_mount_counts_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("dev/dri")).unwrap();
    for (node, numbers) in [("nvidia3", ["195", "3"]), ("dri/card3", ["226", "3"])] {
        let hosts = dir.path().join("node");
        must(Command::new("mknod").arg(&hosts).arg("c").args(numbers));
        fs::write(root.join("dev").join(node), "").unwrap();
        must(Command::new("mount").arg("--bind").arg(&hosts).arg(root.join("dev").join(node)));
        fs::remove_file(&hosts).unwrap();
    }
    let links = [
        "--link",
        "../card3::/dev/dri/by-path/pci-3-card",
        "--link",
        "../card4::/dev/dri/by-path/pci-4-card",
    ];
    let ended = [
        hook(&root, &["update-application-profile"]),
        hook(&root, &[&["create-symlinks"], &links[..]].concat()),
    ];
    for node in ["nvidia3", "dri/card3"] {
        must(Command::new("umount").arg(root.join("dev").join(node)));
    }
    assert!(ended.iter().all(|ended| ended.code == 0), "{ended:?}");
    let profile =
        fs::read_to_string(root.join("etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf"))
            .unwrap();
    assert!(profile.contains("EGLVisibleDGPUDevices\",0x8]"), "{profile}");
    let made: Vec<_> =
        fs::read_dir(root.join("dev/dri/by-path")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(made, ["pci-3-card"]);
}

#[test]
fn a_hook_that_is_not_known_or_not_named_does_no_harm() {
    let nothing = tempfile::tempdir().unwrap();
    for words in [&[][..], &["new-in-2027", "--flag", "x"], &["hook"], &["--debug"]] {
        let ended = hook(nothing.path(), words);
        assert!(
            ended.code == 0
                && (ended.err.contains("none runs") || ended.err.contains("is unknown and ignored")),
            "{words:?} {ended:?}"
        );
    }
    for (state, code) in [
        ("", "GPU-0058"),
        ("{}", "GPU-0058"),
        (r#"{"bundle":"/nowhere"}"#, "GPU-0058"),
        (r#"{"bundle":"/nowhere","root":"/nowhere"}"#, "GPU-0058"),
        (r#"{"bundle":"/nowhere","root":"/"}"#, "GPU-0057"),
    ] {
        let ended = hook_with(state, &["update-ldcache"]);
        assert!(ended.code == 1 && ended.err.starts_with(&format!("error[{code}]: ")), "{state}: {ended:?}");
    }
    for words in [
        &["create-symlinks", "--link", "x"][..],
        &["create-symlinks", "--link", "x::../y"],
        &["chmod", "--path", "/x"],
    ] {
        let ended = hook(nothing.path(), words);
        assert!(ended.code == 1 && ended.err.starts_with("error[GPU-0001]"), "{words:?} {ended:?}");
    }
    // In documents of NVIDIA's toolkit in the place of one that is not wanted.
    let ended = hook_with("", &["noop"]);
    assert!(ended.code == 0 && ended.err.is_empty(), "{ended:?}");
    // The state may be in a file.
    let state = nothing.path().join("state.json");
    fs::write(&state, json!({"bundle": "/nowhere", "root": nothing.path()}).to_string()).unwrap();
    let spec = format!("--container-spec={}", state.display());
    let ended = hook_with("", &["create-symlinks", "--link", "x::/a/spec", &spec]);
    assert_eq!((ended.code, nothing.path().join("a/spec").is_symlink()), (0, true), "{ended:?}");
    // As NVIDIA's older documents name them.
    let ctk = nothing.path().join("nvidia-ctk");
    symlink(dist("gpurun"), &ctk).unwrap();
    let state = json!({"bundle": "/nowhere", "root": nothing.path()}).to_string();
    let mut stdin = tempfile::tempfile().unwrap();
    stdin.write_all(state.as_bytes()).unwrap();
    stdin.rewind().unwrap();
    let words = ["--quiet", "hook", "create-symlinks", "--link", "x::/a/ctk"];
    let ended = finish(Command::new(&ctk).args(words).stdin(stdin).spawn_piped());
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(fs::read_link(nothing.path().join("a/ctk")).unwrap(), Path::new("x"));
    // A bundle says where its root is, where the state does not.
    let bundle = tempfile::tempdir().unwrap();
    fs::create_dir(bundle.path().join("rootfs")).unwrap();
    fs::write(bundle.path().join("config.json"), r#"{"root":{"path":"rootfs"}}"#).unwrap();
    let ended =
        hook_with(&json!({"bundle": bundle.path()}).to_string(), &["create-symlinks", "--link", "x::/a/b"]);
    assert_eq!(
        (ended.code, fs::read_link(bundle.path().join("rootfs/a/b")).unwrap()),
        (0, "x".into()),
        "{ended:?}"
    );
}

#[test]
fn the_images_own_newer_driver_goes_before_the_hosts_and_is_forgotten_when_it_is_no_longer_right() {
    let image = with_compat("580.65.06", Some(r#"{"CUDA Version": "13.0", "Driver": [535, 550]}"#));
    let root = image.path();
    let compat = |driver: &str| {
        let words =
            ["enable-cuda-compat", &format!("--host-driver-version={driver}"), "--host-cuda-version=12.2"];
        let ended = hook(root, &words);
        assert_eq!(ended.code, 0, "{ended:?}");
        fs::read_to_string(root.join("etc/ld.so.conf.d/00-gpurun-compat.conf")).unwrap_or_default()
    };
    // The loader's answer, after the cache that the hook wrote and after the one that ldconfig writes.
    let libcuda = || {
        let ended = hook(root, &["update-ldcache", "--folder", "/usr/local/nvidia/lib64"]);
        assert_eq!(ended.code, 0, "{ended:?}");
        let script = "import ctypes; ctypes.CDLL('libcuda.so.1'); print([l.split()[-1] for l in open('/proc/self/maps') if 'libcuda' in l][0])";
        let mut seen = Vec::new();
        for before in ["true", "ldconfig"] {
            let command =
                format!("mount -t proc proc proc && chroot . {before} && chroot . python3 -c \"{script}\"");
            seen.push(must(Command::new("unshare").args(["-m", "sh", "-c", &command]).current_dir(root)));
        }
        assert_eq!(seen[0], seen[1]);
        seen.remove(0)
    };
    let hosts = root.join("usr/local/nvidia/lib64");
    fs::create_dir_all(&hosts).unwrap();
    fs::copy(dist("libsimulated_cuda.so"), hosts.join("libcuda.so.550.1")).unwrap();
    symlink("libcuda.so.550.1", hosts.join("libcuda.so.1")).unwrap();
    assert_eq!(compat("550.163.01"), "/usr/local/cuda-13.0/compat\n");
    assert_eq!(libcuda(), "/usr/local/cuda-13.0/compat/libcuda.so.580.65.06\n");
    assert_eq!(compat("580.95.05"), "");
    assert_eq!(libcuda(), "/usr/local/nvidia/lib64/libcuda.so.550.1\n");

    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    must(
        Command::new("cp")
            .arg("-a")
            .arg(root.join("usr/local/cuda-13.0"))
            .arg(root.join("usr/local/cuda"))
            .arg(bundle.root().join("usr/local")),
    );
    asks(&bundle, &generate(&host, &[]), &["2"]);
    assert_eq!(
        probed(&start(&bundle, "runc"))["libcuda"],
        json!(["/usr/local/cuda-13.0/compat/libcuda.so.580.65.06"])
    );
}

#[test]
fn the_drivers_libraries_are_told_to_make_no_device_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("proc/driver/nvidia")).unwrap();
    fs::write(root.join("proc/driver/nvidia/params"), "ModifyDeviceFiles: 1\nOther: 2\n").unwrap();
    let state = dir.path().join("state");
    fs::write(&state, json!({"bundle": "/nowhere", "root": root}).to_string()).unwrap();
    // /proc/driver is there on every host; in a mount namespace of our own it has NVIDIA's directory, too.
    let script = "mount -t tmpfs none /proc/driver && mkdir /proc/driver/nvidia && cp $0/proc/driver/nvidia/params /proc/driver/nvidia && \
                  $1 disable-device-node-modification < $2 && cat $0/proc/driver/nvidia/params && \
                  ! (echo x > $0/proc/driver/nvidia/params) 2>/dev/null && grep -c $0 /proc/self/mountinfo";
    let seen = must(
        Command::new("unshare")
            .args(["-m", "sh", "-c", script])
            .arg(&root)
            .arg(dist("gpurun-hook"))
            .arg(&state),
    );
    assert_eq!(seen, "ModifyDeviceFiles: 0\nOther: 2\n1\n", "one mount, on one file");
    // Through a link of the image's nothing is mounted: it could lead to a volume that the host sees.
    let params = root.join("proc/driver/nvidia");
    fs::rename(&params, root.join("elsewhere")).unwrap();
    symlink("/elsewhere", &params).unwrap();
    let script = "mount -t tmpfs none /proc/driver && mkdir /proc/driver/nvidia && cp $0/elsewhere/params /proc/driver/nvidia && \
                  $1 disable-device-node-modification < $2 && cat $0/elsewhere/params && ! grep $0 /proc/self/mountinfo";
    let seen = must(
        Command::new("unshare")
            .args(["-m", "sh", "-c", script])
            .arg(&root)
            .arg(dist("gpurun-hook"))
            .arg(&state),
    );
    assert_eq!(seen, "ModifyDeviceFiles: 1\nOther: 2\n");
    fs::remove_file(&params).unwrap();
    fs::rename(root.join("elsewhere"), &params).unwrap();
    // Who may not mount does without.
    let script = "mount -t tmpfs none /proc/driver && mkdir /proc/driver/nvidia && cp $0/proc/driver/nvidia/params /proc/driver/nvidia && \
                  setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin $1 disable-device-node-modification < $2 && cat $0/proc/driver/nvidia/params";
    let seen = must(
        Command::new("unshare")
            .args(["-m", "sh", "-c", script])
            .arg(&root)
            .arg(dist("gpurun-hook"))
            .arg(&state),
    );
    assert_eq!(seen, "ModifyDeviceFiles: 1\nOther: 2\n");
}

#[test]
fn no_variable_of_the_environment_changes_anything() {
    let dir = tempfile::tempdir().unwrap();
    let headers = must(Command::new("readelf").arg("-lW").arg(dist("gpurun-hook")));
    assert!(
        headers.contains("LOAD") && !headers.contains("INTERP"),
        "no loader that would read LD_PRELOAD: {headers}"
    );
    let ended = run(Command::new(dist("gpurun-hook"))
        .arg0("nvidia-cdi-hook")
        .env("LD_PRELOAD", dir.path().join("no.so"))
        .env("GPURUN_DRIVER_ROOT", "/nowhere")
        .arg("--version"));
    assert!(ended.code == 0 && ended.err.is_empty() && ended.out.starts_with("gpurun-hook"), "{ended:?}");
    let mode = fs::metadata(dist("gpurun-hook")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7000, 0, "not setuid");
}

#[test]
fn documents_are_checked() {
    let host = TestHost::new("8xh100");
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("etc"), dir.path().join("run"));
    let dirs = format!("{},{}", first.display(), second.display());
    let file = first.join("nvidia.yaml");
    let generate = |path: &Path| {
        must(
            host.gpurun()
                .args(["cdi", "generate", "--hook"])
                .arg(dist("gpurun-hook"))
                .arg("--output")
                .arg(path),
        );
    };
    let validate = || run(host.gpurun().args(["cdi", "validate", "--spec-dir", &dirs]));
    let says = |what: &str| {
        let ended = validate();
        assert!(ended.code == 1 && ended.out.contains(what), "{what}: {ended:?}");
    };
    generate(&file);
    let stat = || fs::metadata(&file).map(|m| (m.ino(), m.mtime(), m.mtime_nsec())).unwrap();
    let (text, before) = (fs::read_to_string(&file).unwrap(), stat());
    generate(&file);
    assert_eq!(stat(), before, "what is the same is not written again");
    let ended = validate();
    assert!(ended.code == 0 && ended.out.contains("nothing is wrong"), "{ended:?}");
    let as_nvidias = dir.path().join("nvidia-ctk");
    symlink(dist("gpurun"), &as_nvidias).unwrap();
    let nvidias = run(Command::new(&as_nvidias)
        .args(["cdi", "generate", "--nvidia-cdi-hook-path"])
        .arg(dist("gpurun-hook"))
        .env("GPURUN_SIMULATED_HOST", host.path())
        .env("GPURUN_STATE_DIR", host.state_dir(0)));
    assert_eq!((nvidias.code, nvidias.out.as_str()), (0, text.as_str()), "{nvidias:?}");
    let uuid = &description("8xh100").gpus[6].uuid;
    let some = |words: &[&str], environment: &[(&str, &str)]| {
        let mut nvidias = Command::new(&as_nvidias);
        nvidias.args(["cdi", "generate", "--nvidia-cdi-hook-path"]).arg(dist("gpurun-hook")).args(words);
        let simulated = [("GPURUN_SIMULATED_HOST", host.path()), ("GPURUN_STATE_DIR", host.state_dir(0))];
        run(nvidias.envs(simulated).envs(environment.iter().copied()))
    };
    let chosen = some(&["--device-id", "2", "--devices", uuid, "--no-all-device"], &[]);
    let names: Vec<String> =
        Document::parse(&chosen.out).unwrap().devices.into_iter().map(|d| d.name).collect();
    assert_eq!(names, ["2", "6", &description("8xh100").gpus[2].uuid, uuid], "{chosen:?}");
    let names = format!("2,{uuid}");
    let environment = [
        ("NVIDIA_CTK_CDI_GENERATE_DEVICE_IDS", names.as_str()),
        ("NVIDIA_CTK_CDI_GENERATE_NO_ALL_DEVICE", "true"),
    ];
    assert_eq!(some(&[], &environment).out, chosen.out);
    fs::write(&file, &chosen.out).unwrap();
    assert_eq!(validate().code, 0, "some of the host's devices are no fault");
    assert_eq!(some(&["--device-id", "all"], &[]).out, text);
    for (words, code) in [
        (&["--device-id", "9"][..], "GPU-0021"),
        (&["--device-id", "none"], "GPU-0020"),
        (&["--device-id", "0", "--mode", "gds"], "GPU-0001"),
        (&["--mode", "csv", "--csv.file", "/etc/x.csv"], "GPU-0070"),
    ] {
        let ended = some(words, &[]);
        assert!(ended.code != 0 && ended.err.contains(&format!("error[{code}]: ")), "{words:?} {ended:?}");
    }
    // Disabled hooks are left out.
    let ended = some(&["--disable-hook=all"], &[]);
    assert!(!ended.out.contains("hooks:") && ended.out.contains("libcuda.so."), "{ended:?}");
    assert!(text.contains("hooks:") && ended.err.contains("LD_LIBRARY_PATH"), "{ended:?}");
    let ended = some(&["--disable-hook", "update-ldcache,enable-cuda-compat"], &[]);
    assert!(ended.out.contains("- create-symlinks") && !ended.out.contains("- update-ldcache"), "{ended:?}");
    // What is not honoured is said.
    let flags = "--ldconfig-path=/l --library-search-path=/l --config-search-path=/c --enable-hook=chmod \
                 --feature-flag=disable-ipc-discoverer --csv.file=/f --csv.ignore-pattern=x --csv.compat-container-root=/r";
    for flag in flags.split_whitespace() {
        let ended = some(&[flag], &[]);
        let name = flag.split('=').next().unwrap();
        assert!(ended.out == text && ended.err.contains(&format!("{name} is not used: ")), "{ended:?}");
        assert_eq!(ended.err.lines().count(), 1, "{ended:?}");
    }
    generate(&file);
    let listed = must(host.gpurun().args(["cdi", "list", "--spec-dir", &dirs]));
    assert!(listed.lines().count() == 17 && listed.contains("nvidia.com/gpu=all\n"), "{listed}");

    fs::copy(&file, first.join("other.yaml")).unwrap();
    says("so engines refuse it");
    fs::remove_file(first.join("other.yaml")).unwrap();
    generate(&second.join("nvidia.json"));
    says("it takes precedence over");
    fs::remove_file(second.join("nvidia.json")).unwrap();
    for (from, to, what) in [
        ("libcuda.so.550", "libcuda.so.549", "is not there"),
        ("--host-driver-version=550", "--host-driver-version=535", "is running"),
        ("GPURUN_HOST=", "GPURUN_HOST=0", "not those that they were"),
        ("cdiVersion: 0.5.0", "cdiVersion: 0.3.0", "what came with 0.5.0"),
        ("minor: 255", "minor: 254", "it says that"),
        ("kind: nvidia.com/gpu", "kind: gpu", "is not vendor/class"),
        ("name: all", "name: a b", "cannot be called"),
        ("kind:", "kin:", "no CDI document"),
    ] {
        assert!(text.contains(from), "{from}");
        fs::write(&file, text.replacen(from, to, usize::MAX)).unwrap();
        says(what);
    }
    generate(&file);
    assert_eq!(validate().code, 0);
    // A MIG change, a lost GPU, another driver: the document is about another host.
    let other = TestHost::new("t4");
    let ended = run(other.gpurun().args(["cdi", "validate", "--spec-dir", &dirs]));
    assert!(ended.code == 1, "{ended:?}");
}
