//! What the tests on a real kernel share: simulated hosts, images, and gpurun as it was built into `dist/`.
//!
//! `integration/run` builds and fetches what is needed first; a test that misses something panics and says so.

pub mod api_server;
pub mod bundle;
pub mod cdi;
pub mod cluster;
pub mod engines;
pub mod kubelet;
pub mod registry;
mod terminal;
pub mod web;

pub use terminal::on_a_terminal;

use gpurun::simulated_host::{Description, DriverFiles, lay_out};
use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Where a driver of stand-ins has its libraries.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The ordinary user that tests become: in no /etc/passwd, without subordinate ids.
pub const USER: u32 = 54321;

/// Who starts gpurun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// root
    Root,
    /// [`USER`]
    User,
}

impl Caller {
    /// Both: most of what a container does must not depend on it.
    pub const EACH: [Self; 2] = [Self::Root, Self::User];

    /// Its uid.
    pub fn uid(self) -> u32 {
        match self {
            Self::Root => 0,
            Self::User => USER,
        }
    }
}

pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("integration/ lies in the project")
}

fn existing(path: PathBuf) -> PathBuf {
    assert!(path.exists(), "{} is missing: run integration/run first", path.display());
    path
}

/// A program or library of `dist/`; of its copy in the cache, where ordinary users cannot reach the project's directory.
pub fn dist(name: &str) -> PathBuf {
    let enterable = |dir: &Path| fs::metadata(dir).is_ok_and(|stat| stat.permissions().mode() & 0o001 != 0);
    let dist = project().join("dist");
    if dist.ancestors().all(enterable) { existing(dist.join(name)) } else { cached("dist").join(name) }
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

/// A test image's unpacked root, as gpurun takes it.
pub fn rootfs(name: &str) -> String {
    format!("rootfs:{}", image(name, "root").display())
}

/// A temporary directory that ordinary users reach, on the file system of the cache, so that files of it may be linked.
pub fn temporary() -> TempDir {
    let cache = cached("images");
    let dir = tempfile::Builder::new().prefix(".test-").tempdir_in(cache).expect("a temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("the directory is ours");
    dir
}

/// A root of a test image's files that a test may add to and remove from. Those of the large image are links: they may be
/// replaced, not written, and nobody may pack that image meanwhile (tar sees their ctime change).
pub fn copy_of_root(name: &str) -> TempDir {
    let dir = temporary();
    let how = if name == "debian-python" { "-al" } else { "-a" };
    must(Command::new("cp").arg(how).arg(image(name, "root").join(".")).arg(dir.path()));
    dir
}

/// Packs a root with options of `integration/pack-image`; the result has every form of an image.
pub fn pack(root: &Path, options: &[&str]) -> TempDir {
    let dir = temporary();
    must(
        Command::new(project().join("integration/pack-image"))
            .args(["--name", "test"])
            .args(options)
            .arg(root)
            .arg(dir.path().join("packed")),
    );
    must(Command::new("chmod").args(["-R", "a+rX"]).arg(dir.path()));
    dir
}

/// An image of Debian with a libcuda of its own, as a cuda-compat package puts it there.
pub fn with_compat(version: &str, note: Option<&str>) -> TempDir {
    let root = copy_of_root("debian-python");
    let dir = root.path().join("usr/local/cuda-13.0/compat");
    fs::create_dir_all(&dir).expect("the directory is ours");
    symlink("cuda-13.0", root.path().join("usr/local/cuda")).expect("the directory is ours");
    let note = note.map_or_else(String::new, |json| {
        let json = json.replace('"', "\\\"");
        format!(
            "__attribute__((section(\".note.cuda.fwd_compatibility\"), used, aligned(4))) static const struct \
             {{ unsigned name_size, size, type; char name[20], text[sizeof \"{json}\"]; }} \
             note = {{ 19, sizeof \"{json}\", 1, \"NVIDIA Corporation\", \"{json}\" }};"
        )
    });
    let work = temporary();
    let source = work.path().join("libcuda.c");
    fs::write(&source, format!("{note} int cuDriverGetVersion(int *v) {{ *v = 13000; return 0; }}"))
        .expect("the directory is ours");
    let library = dir.join(format!("libcuda.so.{version}"));
    must(Command::new("cc").args(["-shared", "-Wl,-soname,libcuda.so.1", "-o"]).arg(library).arg(source));
    symlink(format!("libcuda.so.{version}"), dir.join("libcuda.so.1")).expect("the directory is ours");
    symlink("libcuda.so.1", dir.join("libcuda.so")).expect("the directory is ours");
    root
}

/// A certificate authority and a certificate for this machine, in PEM: ca.crt, tls.crt, tls.key.
pub fn certificates() -> TempDir {
    certificates_for("DNS:localhost,IP:127.0.0.1")
}

/// The same for other names.
pub fn certificates_for(names: &str) -> TempDir {
    let dir = temporary();
    let openssl = |words: &str| {
        must(Command::new("openssl").args(words.split_whitespace()).current_dir(dir.path()));
    };
    openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt");
    openssl("req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout tls.key -out tls.csr");
    fs::write(dir.path().join("names"), format!("subjectAltName={names}\n")).expect("the directory is ours");
    openssl(
        "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out tls.crt",
    );
    dir
}

/// Runs a command that a test needs to succeed.
pub fn must(command: &mut Command) -> String {
    let ended = run(command);
    assert_eq!(ended.code, 0, "{command:?}: {ended:?}");
    ended.out
}

/// A description from `integration/hosts`.
pub fn description(name: &str) -> Description {
    let path = project().join("integration/hosts").join(name).with_extension("json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The same with the version of a driver of [`driver_packages`].
pub fn of_driver(name: &str, branch: u32) -> Description {
    let (version, cuda) = match branch {
        535 => ("535.216.03", "12.2"),
        550 => ("550.163.01", "12.4"),
        other => panic!("there is no driver {other}"),
    };
    Description { driver: version.into(), cuda: cuda.into(), ..description(name) }
}

/// A stand-in's file with another description, in place, or a new one of another driver. It is never shorter meanwhile: programs
/// have it mapped.
pub(crate) fn rewrite(library: &Path, stand_in: &str, description: &Description) {
    let mut bytes = fs::read(dist(stand_in)).expect("dist/");
    description.append_to(&mut bytes).expect("it is memory");
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(library);
    file.and_then(|mut file| file.write_all(&bytes).and_then(|()| file.set_len(bytes.len() as u64)))
        .expect("the directory is ours");
}

/// Who has a simulated host.
pub trait Simulated {
    /// What `GPURUN_SIMULATED_HOST` says: the directory with `driver`, `dev`, `proc` and `sys`.
    fn directory(&self) -> PathBuf;
}

impl Simulated for TestHost {
    fn directory(&self) -> PathBuf {
        self.path()
    }
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
        Self::with(&of_driver(name, branch), DriverFiles::Unpacked(&driver_packages(branch, layout)))
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

    /// Lets the driver's libraries, of which there are stand-ins, say that the host is like this. Their files stay, so that no
    /// directory changes.
    pub fn describe(&self, description: &Description) {
        let root = self.path().canonicalize().expect("it is laid out").join("driver");
        let description = Description { driver_root: Some(root.clone()), ..description.clone() };
        for (name, stand_in) in
            [("libnvidia-ml", "libsimulated_nvml.so"), ("libcuda", "libsimulated_cuda.so")]
        {
            let path = root.join(LIBRARIES).join(format!("{name}.so.{}", description.driver));
            rewrite(&path, stand_in, &description);
        }
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

    /// `gpurun` on this host, as root or as [`USER`].
    pub fn gpurun_of(&self, caller: Caller) -> Command {
        match caller {
            Caller::Root => self.gpurun(),
            Caller::User => self.gpurun_as_user(),
        }
    }

    /// `gpurun run OPTIONS IMAGE COMMAND…`; the options are words with blanks between them.
    pub fn command(&self, caller: Caller, options: &str, image: &str, command: &[&str]) -> Command {
        let mut gpurun = self.gpurun_of(caller);
        gpurun.arg("run").args(options.split_whitespace()).arg(image).args(command);
        gpurun
    }

    /// The same with a shell script, to its end.
    pub fn sh(&self, caller: Caller, options: &str, image: &str, script: &str) -> Ended {
        run(&mut self.command(caller, options, image, &["sh", "-c", script]))
    }

    /// What the script wrote; it must succeed.
    pub fn ok(&self, caller: Caller, options: &str, image: &str, script: &str) -> String {
        let ended = self.sh(caller, options, image, script);
        assert_eq!(ended.code, 0, "{caller:?} {options} {script}: {ended:?}");
        ended.out
    }

    /// The failure of a container that must not start; the code that it must have, `GPU-0021`.
    pub fn refused(&self, caller: Caller, options: &str, image: &str, code: &str) -> String {
        let ended = self.sh(caller, options, image, "echo it ran");
        assert!(ended.code == 125 && ended.out.is_empty(), "{caller:?} {options}: {ended:?}");
        assert!(ended.err.starts_with(&format!("error[{code}]: ")), "{caller:?} {options}: {ended:?}");
        ended.err
    }

    /// What gpurun keeps of containers that run, and of those whose launcher was killed.
    pub fn scratch(&self, caller: Caller) -> Vec<String> {
        let entries = fs::read_dir(self.store(caller.uid()).join("scratch"));
        entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect()
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

/// A command that does not end within this time hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a command to its end, without input.
pub fn run(command: &mut Command) -> Ended {
    finish(command.stdin(Stdio::null()).spawn_piped())
}

/// Starts a command whose output is wanted.
pub trait SpawnPiped {
    /// Standard output and error are pipes.
    fn spawn_piped(&mut self) -> Child;
}

impl SpawnPiped for Command {
    fn spawn_piped(&mut self) -> Child {
        let spawned = self.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        spawned.unwrap_or_else(|error| panic!("{self:?}: {error}"))
    }
}

/// Waits for the end of a command and of its output; kills it and fails the test if it hangs.
pub fn finish(mut child: Child) -> Ended {
    use std::os::unix::process::ExitStatusExt;
    fn reader(pipe: Option<impl io::Read + Send + 'static>) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let (out, err) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let started = Instant::now();
    let (status, hung) = loop {
        if let Some(status) = child.try_wait().expect("our own child") {
            break (status, false);
        }
        if started.elapsed() > PATIENCE {
            child.kill().expect("our own child");
            break (child.wait().expect("our own child"), true);
        }
        thread::sleep(Duration::from_millis(1));
    };
    let ended = Ended {
        code: status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(-1),
        out: out.join().expect("a reader does not panic"),
        err: err.join().expect("a reader does not panic"),
    };
    assert!(!hung, "it did not end by itself: {ended:?}");
    ended
}

/// Waits until it is so.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "never came: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A name that no other test has, in this process or another.
pub fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("gpurun-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The processes that have this word in their environment.
pub fn processes_with(word: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|id| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.windows(word.len()).any(|window| window == word.as_bytes())
    })
    .collect()
}
