//! What the tests on a real kernel share: simulated hosts, images, and gpurun as it was built into `dist/`.
//!
//! `integration/run` builds and fetches what is needed first; a test that misses something panics and says so.

use gpurun::simulated_host::{Description, DriverFiles, lay_out};
use std::{
    env, fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// The ordinary user that tests become: in no /etc/passwd, without subordinate ids.
pub const USER: u32 = 54321;

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("integration/ lies in the project")
}

fn existing(path: PathBuf) -> PathBuf {
    assert!(path.exists(), "{} is missing: run integration/run first", path.display());
    path
}

/// A program or library of `dist/`.
pub fn dist(name: &str) -> PathBuf {
    existing(project().join("dist").join(name))
}

/// A file or directory of the cache that the scripts in `integration/` fill.
pub fn cached(name: &str) -> PathBuf {
    let cache = env::var_os("GPURUN_TEST_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(env::var_os("XDG_CACHE_HOME").unwrap_or_else(|| "/var/cache".into()))
            .join("gpurun-tests")
    });
    existing(cache.join(name))
}

/// Debian's real driver of a branch, `debian` or `flat`.
pub fn driver_packages(branch: u32, layout: &str) -> PathBuf {
    cached(&format!("driver-{branch}/{layout}"))
}

/// A form of a test image: `root`, `oci`, `oci.tar`, `docker.tar`, `docker.tar.gz` or `docker.tar.zst`.
pub fn image(name: &str, form: &str) -> PathBuf {
    cached(&format!("images/{name}/{form}"))
}

/// A description from `integration/hosts`.
pub fn description(name: &str) -> Description {
    let path = project().join("integration/hosts").join(name).with_extension("json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A simulated host, with a state directory and an image store of its own. Everything goes when it is dropped.
pub struct TestHost {
    dir: TempDir,
}

impl TestHost {
    /// One of `integration/hosts`, with stand-ins for the driver's files.
    pub fn new(name: &str) -> Self {
        Self::with(&description(name), DriverFiles::StandIns)
    }

    /// One of `integration/hosts` on the files of a real driver, whose version it takes over.
    pub fn with_driver(name: &str, branch: u32, layout: &str) -> Self {
        let (version, cuda) = match branch {
            535 => ("535.216.03", "12.2"),
            550 => ("550.163.01", "12.4"),
            other => panic!("there is no driver {other}"),
        };
        let description = Description { driver: version.into(), cuda: cuda.into(), ..description(name) };
        Self::with(&description, DriverFiles::Unpacked(&driver_packages(branch, layout)))
    }

    /// Any description on any driver.
    pub fn with(description: &Description, driver: DriverFiles) -> Self {
        let dir = tempfile::Builder::new().prefix("gpurun-test-").tempdir().expect("a temporary directory");
        // Ordinary users must reach it, too.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("the directory is ours");
        let stand_ins = dist("libsimulated_nvml.so");
        let stand_ins = stand_ins.parent().expect("dist/");
        lay_out(&dir.path().join("host"), description, stand_ins, driver)
            .unwrap_or_else(|error| panic!("{error}"));
        Self { dir }
    }

    /// What `GPURUN_SIMULATED_HOST` says: the directory with `driver`, `dev`, `proc` and `sys`.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("host")
    }

    /// A file under the driver root.
    pub fn driver(&self, path: &str) -> PathBuf {
        self.path().join("driver").join(path)
    }

    /// Where this user's gpurun keeps its state.
    pub fn state_dir(&self, uid: u32) -> PathBuf {
        self.own_dir("state", uid)
    }

    /// Where this user's gpurun keeps images.
    pub fn store(&self, uid: u32) -> PathBuf {
        self.own_dir("store", uid)
    }

    fn own_dir(&self, kind: &str, uid: u32) -> PathBuf {
        let dir = self.dir.path().join(format!("{kind}-{uid}"));
        if !dir.exists() {
            fs::create_dir(&dir).expect("a new directory");
            chown(&dir, Some(uid), Some(uid)).expect("root may chown, others their own");
        }
        dir
    }

    /// `gpurun` on this host, as root.
    pub fn gpurun(&self) -> Command {
        self.with_environment(Command::new(dist("gpurun")), 0)
    }

    /// `gpurun` on this host, as [`USER`], who owns nothing but a state directory and a store.
    pub fn gpurun_as_user(&self) -> Command {
        let mut command = Command::new("setpriv");
        let id = USER.to_string();
        command
            .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all"])
            .arg(dist("gpurun"));
        self.with_environment(command, USER)
    }

    fn with_environment(&self, mut command: Command, uid: u32) -> Command {
        let home = self.own_dir("home", uid);
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &home)
            .env("GPURUN_SIMULATED_HOST", self.path())
            .env("GPURUN_STATE_DIR", self.state_dir(uid))
            .env("GPURUN_STORE", self.store(uid))
            .current_dir(home);
        command
    }
}

/// What a command printed and how it ended, for assertions that show all of it.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; a signal's number plus 128.
    pub code: i32,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub err: String,
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ended {
    use std::os::unix::process::ExitStatusExt;
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended {
        code: output.status.code().or_else(|| Some(128 + output.status.signal()?)).unwrap_or(-1),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}
