//! Bundles as engines make them: an overlay over an image's root, and runc's own template of a configuration.

use crate::{Ended, TestHost, description, dist, image, run, unique};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// Which cgroup hierarchies a low-level runtime sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hierarchies {
    /// This machine's.
    Own,
    /// Those of v1 alone; crun refuses a host with both.
    Legacy,
    /// cgroup v2 alone, where device rules are programs.
    Unified,
}

impl Hierarchies {
    /// The program, with these at /sys/fs/cgroup.
    pub fn command(self, program: &Path) -> Command {
        let script = match self {
            Self::Own => return Command::new(program),
            Self::Legacy => "umount /sys/fs/cgroup/unified 2>/dev/null || true",
            Self::Unified => "umount -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        };
        // What is mounted goes on appearing on the host, as it would without the namespace, but for what is below /sys.
        let mut command = Command::new("unshare");
        command
            .args(["-m", "--propagation", "unchanged", "sh", "-c"])
            .args([
                &format!("mount --make-rprivate /sys; {script}; program=$1; shift; exec \"$program\" \"$@\""),
                "sh",
            ])
            .arg(program);
        command
    }
}

/// A container's bundle. Its root is removed with it; what it wrote stays until then, as with a stopped container.
pub struct Bundle {
    /// The bundle.
    pub dir: TempDir,
    /// `runc`, or `crun`.
    pub runtime: &'static str,
    mounted: bool,
}

impl Bundle {
    /// A container of an image of the cache: an overlay, whose upper directory is `upper`.
    pub fn of(name: &str) -> Self {
        let mut bundle = Self::empty();
        let dir = bundle.dir.path().to_owned();
        for part in ["upper", "work"] {
            fs::create_dir(dir.join(part)).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            image(name, "root").display(),
            dir.join("upper").display(),
            dir.join("work").display()
        );
        let mounted =
            run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(bundle.root()));
        assert_eq!(mounted.code, 0, "{mounted:?}");
        bundle.mounted = true;
        bundle
    }

    /// A container whose root is an empty directory.
    pub fn empty() -> Self {
        let dir = tempfile::Builder::new().prefix("gpurun-bundle-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        Self { dir, runtime: "runc", mounted: false }
    }

    /// The container's root.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.json")
    }

    /// Writes config.json as an engine does before each start: runc's own template, with this.
    pub fn configure(&self, env: &[&str], args: &[&str]) -> Value {
        let _ = fs::remove_file(self.config());
        let spec = run(Command::new("runc").args(["spec", "--bundle"]).arg(self.dir.path()));
        assert_eq!(spec.code, 0, "{spec:?}");
        let mut spec: Value = serde_json::from_slice(&fs::read(self.config()).unwrap()).unwrap();
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        spec["process"]["env"] = [path].iter().chain(env).map(|one| Value::from(*one)).collect();
        spec["process"]["args"] = json!(args);
        spec["process"]["terminal"] = json!(false);
        spec["root"] = json!({"path": "rootfs", "readonly": false});
        spec["future"] = json!({"field": [1, null, 1.5]});
        self.write(&spec);
        spec
    }

    /// Writes config.json.
    pub fn write(&self, spec: &Value) {
        fs::write(self.config(), spec.to_string()).unwrap();
    }

    /// Reads it.
    pub fn read(&self) -> Value {
        serde_json::from_slice(&fs::read(self.config()).unwrap()).unwrap()
    }

    /// Where the runtime logs.
    pub fn log(&self) -> PathBuf {
        self.dir.path().join("log.json")
    }

    /// The last message of the log, as an engine takes it for its own.
    pub fn logged(&self) -> (String, String) {
        let log = fs::read_to_string(self.log()).unwrap();
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        (last["level"].as_str().unwrap().into(), last["msg"].as_str().unwrap().into())
    }

    /// `runtime run`, with what the administrator configured.
    pub fn run(&self, host: &TestHost, configuration: &str) -> Ended {
        let file = self.dir.path().join("gpurun.toml");
        fs::write(&file, configuration).unwrap();
        let mut words: Vec<String> = ["--log-format", "json", "--log"].map(String::from).into();
        words.push(self.log().display().to_string());
        words.push(format!("--root={}", self.dir.path().join("state").display()));
        words.extend(["run".into(), "--bundle".into(), self.dir.path().display().to_string(), unique()]);
        let mut command = if self.runtime == "crun" {
            Hierarchies::Legacy.command(&self.link("nvidia-container-runtime"))
        } else {
            let mut command = Command::new(dist("gpurun"));
            command.arg0("gpurun-runtime");
            command
        };
        run(command
            .args(words)
            .env("GPURUN_SIMULATED_HOST", host.path())
            .env("GPURUN_STATE_DIR", host.state_dir(0))
            .env("GPURUN_CONFIG", file))
    }

    /// gpurun under another name, as a link.
    pub fn link(&self, name: &str) -> PathBuf {
        let link = self.dir.path().join(name);
        let _ = symlink(dist("gpurun"), &link);
        link
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(self.root()).status();
        }
    }
}

/// Prints what a program in a container can use, as JSON.
pub const PROBE: &str = r#"
import ctypes, json, os, subprocess
def shell(command): return subprocess.run(command, shell=True, capture_output=True, text=True).stdout
def loaded(library):
    ctypes.CDLL(library)
    return sorted({line.split()[-1] for line in open("/proc/self/maps") if library[:-2] in line})
nodes = sorted("/dev/" + name for name in os.listdir("/dev") if name.startswith("nvidia"))
nodes = [node for node in nodes if not os.path.isdir(node)]
shm = os.statvfs("/dev/shm")
cached = lambda: [line.split()[-1] for line in shell("ldconfig -p").splitlines()[1:]]
print(json.dumps({
    "libcuda": loaded("libcuda.so.1"), "nvml": loaded("libnvidia-ml.so.1"),
    "smi": shell("nvidia-smi -L"),
    "nodes": {node: f"{os.major(os.stat(node).st_rdev)}:{os.minor(os.stat(node).st_rdev)}" for node in nodes},
    "uid": os.getuid(), "groups": os.getgroups(), "visible": os.environ["NVIDIA_VISIBLE_DEVICES"],
    "shm": shm.f_blocks * shm.f_frsize,
    "files": sorted(os.listdir("/usr/local/nvidia/lib64")),
    "write": shell("touch /usr/local/nvidia/x 2>&1"),
    "cache": cached(), "cache_after_ldconfig": [shell("ldconfig"), cached()][1],
    "after_ldconfig": shell("python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); print(\"loaded\")'"),
}))
"#;

/// Where the driver's libraries are.
pub const LIBRARIES: &str = "/usr/local/nvidia/lib64";

/// A container that asks for these GPUs and says what it sees.
pub fn asks(bundle: &Bundle, devices: &str) -> Value {
    bundle.configure(
        &[&format!("NVIDIA_VISIBLE_DEVICES={devices}"), "NVIDIA_DRIVER_CAPABILITIES=compute,utility"],
        &["python3", "-c", PROBE],
    )
}

/// What it says.
pub fn probed(ended: &Ended) -> Value {
    assert_eq!(ended.code, 0, "{ended:?}");
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

/// What every container that asked for GPU 2 of the eight must see.
pub fn has_gpu_2(saw: &Value, version: &str) {
    assert_eq!(saw["libcuda"], json!([format!("{LIBRARIES}/libcuda.so.{version}")]));
    assert_eq!(saw["nvml"], json!([format!("{LIBRARIES}/libnvidia-ml.so.{version}")]));
    assert_eq!(saw["smi"].as_str().unwrap().lines().count(), 1, "{saw:#}");
    let gpu = &description("8xh100").gpus[2];
    assert!(saw["smi"].as_str().unwrap().contains(&gpu.uuid), "{saw:#}");
    let node = format!("/dev/nvidia{}", gpu.minor);
    assert_eq!(saw["nodes"][&node], json!(format!("195:{}", gpu.minor)));
    assert_eq!(saw["nodes"].as_object().unwrap().len(), 4, "nvidiactl, uvm and its tools: {saw:#}");
    assert_eq!(saw["visible"], "2");
    assert_eq!(saw["after_ldconfig"], "loaded\n");
}
