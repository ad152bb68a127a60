//! The documents of hosts whose driver is not found through NVML, Jetson and WSL: trees in the shape that Linux for Tegra and Windows
//! give them, with libraries of this machine. No such machine was there.

use gpurun::{
    formats::cdi::{Document, to_json},
    simulated_host::Description,
};
use gpurun_integration::{
    Ended, TestHost,
    bundle::Bundle,
    cdi::{inject, refused_by_schema},
    description, dist, must, run, temporary, unique,
};
use serde_json::Value;
use std::{
    fs,
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// A host with these files.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: temporary() };
        for part in ["driver", "dev", "proc", "sys", "state"] {
            fs::create_dir(host.path(part)).unwrap();
        }
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    /// A path of the driver root whose directory is there.
    fn driver(&self, path: &str) -> PathBuf {
        let path = self.path("driver").join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn write(&self, path: &str, content: &str) {
        fs::write(self.driver(path), content).unwrap();
    }

    /// `libsimulated_cuda.so` has the SONAME `libcuda.so.1`, the other `libnvidia-ml.so.1`.
    fn library(&self, path: &str, stand_in: &str) {
        fs::copy(dist(&format!("libsimulated_{stand_in}.so")), self.driver(path)).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        symlink(target, self.driver(path)).unwrap();
    }

    /// With the numbers of /dev/null.
    fn node(&self, path: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        must(Command::new("mknod").args(["-m", "666"]).arg(path).args(["c", "1", "3"]));
    }

    fn command(&self, called: &str) -> Command {
        let mut command = Command::new(dist("gpurun"));
        command.arg0(called).env("GPURUN_SIMULATED_HOST", self.dir.path());
        command.env("GPURUN_STATE_DIR", self.path("state"));
        command
    }

    fn generate(&self, options: &[&str]) -> Ended {
        run(self.command("gpurun").args(["cdi", "generate", "--hook"]).arg(dist("gpurun-hook")).args(options))
    }

    fn document(&self, options: &[&str]) -> Document {
        let ended = self.generate(options);
        Document::parse(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
    }

    /// What the document says, and what is said beside it; the host's directory is called HOST.
    fn golden(&self) -> String {
        let ended = run(self.command("gpurun").args(["cdi", "generate", "--hook", "/usr/bin/gpurun-hook"]));
        assert_eq!(ended.code, 0, "{ended:?}");
        let host = self.dir.path().to_str().unwrap();
        format!("{}---\n{}", ended.out, ended.err).replace(host, "HOST")
    }
}

const LISTS: &str = "/etc/nvidia-container-runtime/host-files-for-container.d";
const LIBRARIES: &str = "/usr/lib/aarch64-linux-gnu/nvidia";

/// A Jetson Orin in the shape of release 36, with the list that release 35 had beside the two; not every line is of this board.
fn jetson() -> Host {
    let host = Host::new();
    host.write("/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n");
    for node in ["/dev/nvmap", "/dev/nvhost-ctrl-gpu", "/dev/nvgpu/igpu0/ctrl", "/dev/dri/renderD128"] {
        host.node(node);
    }
    host.write(
        &format!("{LISTS}/devices.csv"),
        "dev, /dev/fb0\ndev, /dev/nvmap\ndev, /dev/nvhost-ctrl-gpu\ndev, /dev/nvgpu/igpu0/ctrl\ndev, /dev/nvmap\n\
         dev, /dev/dri/renderD128\n",
    );
    host.library(&format!("{LIBRARIES}/libcuda.so.1.1"), "cuda");
    host.link(&format!("{LIBRARIES}/libcuda.so.1"), "libcuda.so.1.1");
    host.link(&format!("{LIBRARIES}/libcuda.so"), "libcuda.so.1.1");
    host.link("/usr/lib/aarch64-linux-gnu/libcuda.so", "nvidia/libcuda.so");
    // No link of its SONAME on this host.
    host.library(&format!("{LIBRARIES}/libnvidia-ml.so.540.4.0"), "nvml");
    host.link("/usr/lib/aarch64-linux-gnu/tegra", "nvidia");
    host.write(&format!("{LIBRARIES}/nvidia.json"), "{\"ICD\":{}}");
    host.link("/usr/share/glvnd/egl_vendor.d/10_nvidia.json", "/usr/lib/aarch64-linux-gnu/tegra/nvidia.json");
    host.link("/lib", "usr/lib");
    host.write("/usr/lib/firmware/tegra23x/nvhost_nvdec050_desc_prod.bin", "firmware");
    host.write("/usr/sbin/nvidia-smi", "#!/bin/sh\necho smi\n");
    host.link("/usr/lib/aarch64-linux-gnu/libleak.so", "/../../../etc/passwd");
    host.write(
        &format!("{LISTS}/drivers.csv"),
        "lib, /usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1\nsym, /usr/lib/aarch64-linux-gnu/libcuda.so\n\
         sym, /usr/lib/aarch64-linux-gnu/nvidia/libcuda.so\nsym, /usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1\n\
         lib, /usr/lib/aarch64-linux-gnu/tegra/libnvidia-ml.so.540.4.0\n\
         lib, /usr/lib/aarch64-linux-gnu/nvidia/libnvcucompat.so\nlib, /usr/sbin/nvidia-smi\n\
         sym, /usr/share/glvnd/egl_vendor.d/10_nvidia.json\n\
         lib, /lib/firmware/tegra23x/nvhost_nvdec050_desc_prod.bin\nsym, /usr/lib/aarch64-linux-gnu/libleak.so\n",
    );
    host.write("/usr/share/nvidia/tegra/profile.json", "{}");
    host.link("/usr/share/nvidia/tegra/default.json", "profile.json");
    host.library("/usr/share/nvidia/tegra/libnvidia-ml.so.540", "nvml");
    // Leads to a directory.
    host.link("/usr/share/nvidia/current", "tegra");
    host.write(
        &format!("{LISTS}/l4t.csv"),
        "\r\nsym, /usr/share/nvidia/tegra/default.json\r\nsym, /usr/share/nvidia/current\r\nlib /usr/lib/x\r\n\
         lib, /usr/share/nvidia/tegra/libnvidia-ml.so.540\r\ndir, /usr/share/nvidia/tegra\r\n\
         lib, /usr/lib/../../etc/shadow\r\n",
    );
    host
}

const PACKAGE: &str = "/usr/lib/wsl/drivers/nv_dispi.inf_amd64_c5b5db3e12daa5e3";
const OLD_PACKAGE: &str = "/usr/lib/wsl/drivers/nv_dispi.inf_amd64_f00ba4f00ba4f00b";

/// WSL 2 after an upgrade of Windows' driver, of which the package that was replaced is there still.
fn windows() -> Host {
    let host = Host::new();
    host.node("/dev/dxg");
    // Its SONAME is its name, as no stand-in's is.
    let dxcore = host.driver("/usr/lib/wsl/lib/libdxcore.so");
    let words = ["-shared", "-nostdlib", "-Wl,-soname,libdxcore.so", "-x", "c", "/dev/null", "-o"];
    must(Command::new("gcc").args(words).arg(dxcore));
    host.write("/usr/lib/wsl/drivers/iigd_dch.inf_amd64_0/libigc.so", "Intel's");
    for (package, loader) in [(PACKAGE, "new"), (OLD_PACKAGE, "old")] {
        for (name, stand_in) in
            [("libcuda.so.1.1", "cuda"), ("libcuda_loader.so", "cuda"), ("libnvidia-ml.so.1", "nvml")]
        {
            host.library(&format!("{package}/{name}"), stand_in);
        }
        let path = host.driver(&format!("{package}/libcuda_loader.so"));
        fs::write(&path, [fs::read(&path).unwrap(), loader.into()].concat()).unwrap();
        host.library(&format!("{package}/libnvidia-ml_loader.so"), "nvml");
        for name in ["libnvidia-ptxjitcompiler.so.1", "nvcubins.bin", "nvwgf2umx.dll", "nvlddmkm.sys"] {
            host.write(&format!("{package}/{name}"), name);
        }
        host.write(&format!("{package}/nvidia-smi"), "#!/bin/sh\necho smi\n");
        must(Command::new("chmod").arg("755").arg(host.driver(&format!("{package}/nvidia-smi"))));
    }
    fs::copy(
        host.driver(&format!("{PACKAGE}/libcuda_loader.so")),
        host.driver("/usr/lib/wsl/lib/libcuda.so.1.1"),
    )
    .unwrap();
    host
}

#[test]
fn a_jetson_has_the_document_of_its_lists() {
    let host = jetson();
    insta::assert_snapshot!("jetson", host.golden());
    let auto = host.generate(&[]);
    assert_eq!(host.generate(&["--mode", "csv"]).out, auto.out);
}

#[test]
fn windows_has_the_document_of_the_package_in_force() {
    let host = windows();
    insta::assert_snapshot!("wsl", host.golden());
    let auto = host.generate(&[]);
    assert_eq!(host.generate(&["--mode", "wsl"]).out, auto.out);
    // Where Windows' own libraries do not tell, one is taken, and it is said which.
    fs::remove_file(host.driver("/usr/lib/wsl/lib/libcuda.so.1.1")).unwrap();
    let ended = host.generate(&[]);
    assert!(ended.err.contains(&format!("{OLD_PACKAGE} is used, and not {PACKAGE}")), "{ended:?}");
    fs::remove_file(host.path("dev/dxg")).unwrap();
    let ended = host.generate(&[]);
    assert!(ended.code == 125 && ended.err.starts_with("error[GPU-0014]"), "{ended:?}");
}

#[test]
fn both_documents_satisfy_the_schema_in_every_version() {
    let mut documents: Vec<Value> = Vec::new();
    for host in [jetson(), windows()] {
        for options in [
            &[][..],
            &["--engine", "podman@4.3"],
            &["--engine", "docker@27"],
            &["--class", "a.b", "--vendor", "v.org"],
        ] {
            let document = host.document(options);
            assert_eq!(document.faults(), [""; 0]);
            documents.push(serde_json::from_str(&to_json(&document)).unwrap());
        }
    }
    assert_eq!(refused_by_schema(&documents), []);
}

/// What a container of the document's says in which this runs.
fn container(document: &Document, script: &str) -> String {
    let bundle = Bundle::of("debian-python");
    let mut spec = bundle.configure(&[], &["sh", "-c", script]);
    inject(document, &["all"], &mut spec);
    bundle.write(&spec);
    let state = bundle.dir.path().join("state");
    must(
        Command::new("runc")
            .arg("--root")
            .arg(state)
            .args(["run", "--bundle"])
            .arg(bundle.dir.path())
            .arg(unique()),
    )
}

/// Loads both by their SONAME, and says which files they are.
const LOADS: &str = "python3 - <<'END'
import ctypes
for name in 'libcuda.so.1', 'libnvidia-ml.so.1', 'libcuda.so':
    ctypes.CDLL(name)
print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'libcuda' in line or 'libnvidia' in line}), sep='\\n')
END
";

#[test]
fn a_container_on_a_jetson_loads_the_driver_also_after_ldconfig() {
    let host = jetson();
    let script = format!(
        "set -e; {LOADS} ldconfig; {LOADS} find /dev/nv* -type c | sort; readlink /usr/lib/aarch64-linux-gnu/libcuda.so
         cat /usr/share/glvnd/egl_vendor.d/10_nvidia.json /usr/share/nvidia/tegra/default.json; echo
         head -c 5 /etc/nv_tegra_release; echo; cat /lib/firmware/tegra23x/*; echo $NVIDIA_VISIBLE_DEVICES
         touch /usr/share/nvidia/tegra/new 2>/dev/null || echo read-only; ls -A /usr/local/nvidia 2>/dev/null | wc -l"
    );
    let loaded =
        format!("{LIBRARIES}/libcuda.so.1.1\n/usr/lib/aarch64-linux-gnu/tegra/libnvidia-ml.so.540.4.0\n");
    let mut lines: Vec<&str> = loaded.lines().collect();
    lines.sort_unstable();
    let loaded = lines.join("\n");
    assert_eq!(
        container(&host.document(&[]), &script),
        format!(
            "{loaded}\n{loaded}\n/dev/nvgpu/igpu0/ctrl\n/dev/nvhost-ctrl-gpu\n/dev/nvmap\nnvidia/libcuda.so\n{{\"ICD\":{{}}}}{{}}\n\
             # R36\nfirmwarevoid\nread-only\n0\n"
        )
    );
}

#[test]
fn a_container_on_windows_loads_the_loader_and_has_nvidia_smi() {
    let host = windows();
    let script = format!(
        "set -e; {LOADS} ldconfig; {LOADS} test -c /dev/dxg; nvidia-smi; readlink /usr/bin/nvidia-smi"
    );
    let loaded = format!("{PACKAGE}/libcuda_loader.so\n{PACKAGE}/libnvidia-ml.so.1\n");
    assert_eq!(
        container(&host.document(&[]), &script),
        format!("{loaded}{loaded}smi\n{PACKAGE}/nvidia-smi\n")
    );
}

fn names(host: &Host, options: &[&str]) -> Vec<String> {
    host.document(options).devices.into_iter().map(|device| device.name).collect()
}

#[test]
fn the_devices_are_named_as_far_as_they_have_names() {
    let (jetson, windows) = (jetson(), windows());
    assert_eq!(names(&jetson, &[]), ["0", "all"]);
    let ways = ["--device-name-strategy", "type-index", "--no-all-device", "--device-id", "0"];
    assert_eq!(names(&jetson, &ways), ["gpu0"]);
    assert_eq!(names(&windows, &["--device-id", "all"]), ["all"]);
    for (host, options, code) in [
        (&jetson, &["--device-name-strategy", "uuid", "--no-all-device"][..], "GPU-0001"),
        (&jetson, &["--device-id", "1"], "GPU-0021"),
        (&windows, &["--device-id", "0"], "GPU-0021"),
        (&windows, &["--no-all-device"], "GPU-0001"),
    ] {
        let ended = host.generate(options);
        assert!(
            ended.code == 125 && ended.err.starts_with(&format!("error[{code}]")),
            "{options:?} {ended:?}"
        );
    }
}

#[test]
fn nvidias_flags_choose_lists_and_links() {
    let host = jetson();
    let ctk = |words: &[&str]| {
        let mut command = host.command("nvidia-ctk");
        run(command.args(["cdi", "generate", "--nvidia-cdi-hook-path"]).arg(dist("gpurun-hook")).args(words))
    };
    assert_eq!(ctk(&["--mode", "csv"]).out, host.generate(&[]).out);
    host.write("/opt/own.csv", "dev, /dev/nvmap\nsym, /usr/lib/aarch64-linux-gnu/libcuda.so\n");
    let list = |more: &[&str]| {
        let ended = ctk(&[&["--csv.file", "/opt/own.csv", "--csv.file", "/opt/none.csv"], more].concat());
        assert!(ended.err.contains("/opt/none.csv is not on this host"), "{ended:?}");
        (Document::parse(&ended.out).unwrap(), ended.err)
    };
    let (document, _) = list(&[]);
    assert_eq!(document.devices[0].container_edits.device_nodes.len(), 1);
    let targets = |document: &Document| {
        document.container_edits.mounts.iter().map(|mount| mount.container_path.clone()).collect::<Vec<_>>()
    };
    let release = "/etc/nv_tegra_release".to_owned();
    assert_eq!(targets(&document), [format!("{LIBRARIES}/libcuda.so.1.1"), release.clone()]);
    for pattern in ["**/*.so", "/usr/lib/*/libcuda.so"] {
        assert_eq!(
            targets(&list(&["--csv.ignore-pattern", pattern]).0),
            std::slice::from_ref(&release),
            "{pattern}"
        );
    }
    let (other, said) = list(&["--csv.compat-container-root", "/usr/local/cuda/compat_orin"]);
    assert_eq!(other, document);
    assert_eq!(said.matches("--csv.compat-container-root is not used: ").count(), 1, "{said}");
    assert_eq!(ctk(&["--csv.ignore-pattern", "["]).code, 125);
}

#[test]
fn auto_takes_nvml_unless_it_knows_nothing_but_tegras_own_gpu() {
    let kind = |host: &TestHost| {
        let text = must(host.gpurun().args(["cdi", "generate", "--hook", "/h"]));
        text.contains("/dev/nvidiactl")
    };
    let t4 = description("t4");
    let named = |name: &str| {
        let mut gpus = t4.gpus.clone();
        gpus[0].name = name.into();
        Description { gpus, ..t4.clone() }
    };
    for (name, by_nvml) in [("Tesla T4", true), ("Orin (nvgpu)", false), ("NVIDIA Thor", false)] {
        let host = TestHost::with(&named(name), gpurun::simulated_host::DriverFiles::StandIns);
        assert!(kind(&host), "no file of Tegra's is there");
        must(Command::new("mknod").arg(host.path().join("dev/nvmap")).args(["c", "1", "3"]));
        let list = host.driver(&format!("{}/devices.csv", &LISTS[1..]));
        fs::create_dir_all(list.parent().unwrap()).unwrap();
        fs::write(&list, "dev, /dev/nvmap\n").unwrap();
        // One of the two files says it.
        let family: PathBuf = host.path().join("sys/devices/soc0/family");
        fs::create_dir_all(family.parent().unwrap()).unwrap();
        fs::write(&family, "Tegra\n").unwrap();
        assert_eq!(kind(&host), by_nvml, "{name}");
        fs::write(&family, "jep106:0426\n").unwrap();
        assert!(kind(&host), "{name}");
    }
    let host = TestHost::new("t4");
    let dxcore: &Path = &host.driver("usr/lib/wsl/lib/libdxcore.so");
    fs::create_dir_all(dxcore.parent().unwrap()).unwrap();
    fs::write(dxcore, "").unwrap();
    let ended = run(host.gpurun().args(["cdi", "generate", "--hook", "/h"]));
    assert!(ended.code == 125 && ended.err.contains("/dev/dxg"), "WSL takes precedence over NVML: {ended:?}");
}

#[test]
fn refresh_writes_what_auto_takes() {
    let host = jetson();
    let path = host.path("nvidia.json");
    for says in ["is written: the driver that Tegra's lists name", "is up to date"] {
        let mut gpurun = host.command("gpurun");
        let ended = run(gpurun.args(["cdi", "refresh", "--hook", "/h", "--output"]).arg(&path));
        assert!(ended.code == 0 && ended.out.contains(says), "{ended:?}");
    }
    let dirs = host.dir.path().to_str().unwrap();
    let listed = must(host.command("gpurun").args(["cdi", "list", "--spec-dir", dirs]));
    assert_eq!(listed, "nvidia.com/gpu=0\nnvidia.com/gpu=all\n");
}
