//! Sharing by MPS (NVIDIA: "Multi-Process Service"): each shared GPU has a control daemon of its own. It starts the server through which
//! programs of several containers compute, and gives each program a part of the GPU's memory and processors.
//!
//! ```text
//! MPS_ROOT/GPU-…/pipe     sockets; a container has them at /mps/pipe
//! MPS_ROOT/GPU-…/shm      a tmpfs: /dev/shm of the daemon, of its servers and of those containers
//! MPS_ROOT/GPU-…/log
//! MPS_ROOT/GPU-…/driver   links to the driver's programs and libraries, by the names that daemon and servers look for
//! ```
//!
//! A daemon for each GPU, and not for each resource: what happens to one happens to no other, and a server, which is one user's at a
//! time, keeps users of other GPUs waiting for nothing. A directory that is there says that its GPU is, or was, shared.

use crate::{
    api::device_plugin::{ContainerAllocateResponse, Mount},
    back_off::BackOff,
    resources::{Resource, Shared, SharingStrategy},
};
use gpurun::{
    apply::{host_object::HostObject, mount},
    error::{Code, Error, OrFail, Result},
    inventory::{
        FileKind, HostPath, Inventory,
        nvml::{self, DEFAULT, EXCLUSIVE_PROCESS},
    },
    sys::process,
    vocabulary::Version,
};
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::UnmountFlags,
};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    pin::pin,
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
    select,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// The daemon, and the program that speaks to it.
const CONTROL: &str = "nvidia-cuda-mps-control";
/// What it starts for a user.
const SERVER: &str = "nvidia-cuda-mps-server";
/// From the first that gives each program limits of its own (NVIDIA: "Volta MPS").
const FIRST_CAPABILITY: [u32; 2] = [7, 0];
/// Programs that a server has at most there.
const MOST_REPLICAS: u32 = 48;
/// The longest path of a socket (unix(7): sun_path without the zero at its end). The daemon cuts off the rest.
const LONGEST_SOCKET: usize = 107;
/// A daemon that has not answered in this time does not.
const ANSWERS: Duration = Duration::from_secs(10);
/// How long one waits that is told to quit, in seconds, for programs that compute.
const PATIENCE: u64 = 5;
/// Why a GPU is not given out at first.
pub const STARTED: &str = "its MPS control daemon is being started";
/// Where a container has the sockets.
const PIPE_IN_CONTAINER: &str = "/mps/pipe";
const SHM: &str = "/dev/shm";
const PIPE_VARIABLE: &str = "CUDA_MPS_PIPE_DIRECTORY";

/// Whether the resource can be shared like this; why not.
pub fn can_share(resource: &Resource, inventory: &Inventory, replicas: u32) -> Result<(), String> {
    if replicas > MOST_REPLICAS {
        return Err(format!("replicas is {replicas}, and MPS has {MOST_REPLICAS} programs at most"));
    }
    let first = Version::of(FIRST_CAPABILITY[0], FIRST_CAPABILITY[1]);
    for device in &resource.devices {
        let Some(gpu) = inventory.gpus.iter().find(|gpu| gpu.uuid == device.uuid) else {
            return Err("MPS is not for MIG devices; sharing.timeSlicing is".into());
        };
        if gpu.compute_capability < first {
            let has = &gpu.compute_capability;
            return Err(format!(
                "{} has compute capability {has}, and MPS gives limits from {first} on",
                gpu.uuid
            ));
        }
    }
    Ok(())
}

/// A GPU that is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The GPU's.
    pub uuid: String,
    /// What it has, in bytes.
    memory: u64,
    /// Among how many.
    replicas: u32,
}

/// What is shared by MPS.
pub fn shares(inventory: &Inventory, resources: &[Resource]) -> Vec<Share> {
    let shared = resources.iter().filter_map(|resource| match resource.shared {
        Some(Shared { by: SharingStrategy::Mps, replicas }) => Some((resource, replicas)),
        _ => None,
    });
    let devices = shared
        .flat_map(|(resource, replicas)| resource.devices.iter().map(move |device| (&device.uuid, replicas)));
    let share = |(uuid, replicas): (&String, u32)| {
        let gpu = inventory.gpus.iter().find(|gpu| gpu.uuid == *uuid)?;
        Some(Share { uuid: uuid.clone(), memory: gpu.memory, replicas })
    };
    devices.filter_map(share).collect()
}

/// What the driver has for it.
#[derive(Debug, PartialEq, Eq)]
pub struct Driver {
    nvml: HostPath,
    /// Names by which they are looked for, and files.
    files: BTreeMap<String, PathBuf>,
}

/// The driver has no such programs.
pub fn missing() -> Error {
    Error::new(Code::DriverIncomplete, "no GPU can be shared by MPS")
        .cause(format!("the driver has no {CONTROL}, {SERVER} or libnvidia-ml.so.1"))
        .fix("install the driver's programs for MPS (Debian: nvidia-cuda-mps), or share by sharing.timeSlicing")
}

impl Driver {
    /// Finds it.
    ///
    /// # Errors
    /// [`Code::DriverIncomplete`]
    pub fn of(inventory: &Inventory) -> Result<Self> {
        let mut files = BTreeMap::new();
        for file in &inventory.driver.files {
            let path = &file.path.0;
            match &file.kind {
                FileKind::Binary(name) if [CONTROL, SERVER].contains(&name.as_str()) => {
                    files.insert(name.clone(), path.clone());
                }
                FileKind::Library { name, soname, is_32bit: false, subdirectory: None, .. } => {
                    files.insert(name.clone(), path.clone());
                    files.extend(soname.clone().map(|soname| (soname, path.clone())));
                }
                _ => {}
            }
        }
        match files.get("libnvidia-ml.so.1") {
            Some(nvml) if files.contains_key(CONTROL) && files.contains_key(SERVER) => {
                Ok(Self { nvml: HostPath(nvml.clone()), files })
            }
            _ => Err(missing()),
        }
    }
}

/// How a GPU's daemon is.
#[derive(Debug)]
pub struct Standing {
    /// The GPU's.
    pub uuid: String,
    /// Why it does not answer; `None`: it does, and has its limits.
    pub down: Option<String>,
}

/// The daemons of a node.
#[derive(Debug)]
pub struct Daemons {
    root: PathBuf,
    standings: mpsc::UnboundedSender<Standing>,
    /// By the GPU's UUID.
    by_gpu: BTreeMap<String, Daemon>,
}

#[derive(Debug)]
struct Daemon {
    wanted: watch::Sender<Wanted>,
    task: JoinHandle<()>,
    down: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    driver: Arc<Driver>,
    what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    /// A daemon.
    Daemon(Share),
    /// None any more, and nothing of it.
    Nothing,
    /// The plugin ends. Containers stay, and find the next one's daemon where they found this one.
    End,
}

impl Daemons {
    /// Whose directories are below `root`. How they are is told.
    pub fn new(root: PathBuf, standings: mpsc::UnboundedSender<Standing>) -> Self {
        Self { root, standings, by_gpu: BTreeMap::new() }
    }

    /// These GPUs are shared, and no others: also none that a former process shared.
    pub fn keep(&mut self, shares: &[Share], driver: &Arc<Driver>) {
        let is_shared = |uuid: &str| shares.iter().any(|share| share.uuid == uuid);
        let left = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let left = left.filter_map(|entry| entry.file_name().into_string().ok());
        let others = left.filter(|name| name.starts_with("GPU-")).chain(self.by_gpu.keys().cloned());
        let others: Vec<String> = others.filter(|uuid| !is_shared(uuid)).collect();
        let wanted = shares.iter().map(|share| (share.uuid.clone(), What::Daemon(share.clone())));
        for (uuid, what) in wanted.chain(others.into_iter().map(|uuid| (uuid, What::Nothing))) {
            let wanted = Wanted { driver: Arc::clone(driver), what };
            let Some(daemon) = self.by_gpu.get_mut(&uuid) else {
                let (sender, receiver) = watch::channel(wanted);
                let standings = self.standings.clone();
                let keeper = Keeper { place: Place::of(&self.root, &uuid), uuid: uuid.clone(), standings };
                let task = tokio::spawn(keeper.keep(receiver));
                self.by_gpu.insert(uuid, Daemon { wanted: sender, task, down: Some(STARTED.into()) });
                continue;
            };
            let other = |was: &mut Wanted| {
                let other = *was != wanted;
                *was = wanted;
                other
            };
            if daemon.wanted.send_if_modified(other) {
                daemon.down = Some(STARTED.into());
            }
        }
    }

    /// Takes in how a daemon is. True if that is another than before.
    pub fn take(&mut self, standing: Standing) -> bool {
        let Some(daemon) = self.by_gpu.get_mut(&standing.uuid) else { return false };
        let changed = daemon.down != standing.down;
        daemon.down = standing.down;
        changed
    }

    /// Why a shared GPU must not be given out; `None`: it may.
    pub fn down(&self, uuid: &str) -> Option<String> {
        self.by_gpu.get(uuid).and_then(|daemon| daemon.down.clone())
    }

    /// Lets all of them end.
    pub async fn end(&mut self) {
        let daemons = std::mem::take(&mut self.by_gpu);
        for daemon in daemons.values() {
            daemon.wanted.send_modify(|wanted| wanted.what = What::End);
        }
        for daemon in daemons.into_values() {
            // One that panics has nothing to end any more.
            let _ = daemon.task.await;
        }
    }
}

/// Where a GPU's daemon and the programs of containers meet.
#[derive(Debug, Clone)]
pub struct Place(PathBuf);

impl Place {
    /// Below the root of all.
    pub fn of(root: &Path, uuid: &str) -> Self {
        Self(root.join(uuid))
    }

    fn pipe(&self) -> PathBuf {
        self.0.join("pipe")
    }

    fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    fn driver(&self) -> PathBuf {
        self.0.join("driver")
    }

    /// Brings a container there.
    pub fn join(&self, response: &mut ContainerAllocateResponse) {
        response.envs.insert(PIPE_VARIABLE.into(), PIPE_IN_CONTAINER.into());
        let mount = |container_path: &str, host_path: PathBuf, read_only| Mount {
            container_path: container_path.into(),
            host_path: host_path.to_string_lossy().into_owned(),
            read_only,
        };
        // Through a read-only mount sockets can be connected to, and a link that root's daemon would follow cannot be laid.
        response.mounts.extend([mount(PIPE_IN_CONTAINER, self.pipe(), true), mount(SHM, self.shm(), false)]);
    }

    /// Makes it.
    fn make(&self, driver: &Driver) -> Result<()> {
        let longest = self.pipe().join("control_privileged");
        if longest.as_os_str().len() > LONGEST_SOCKET {
            return Err(Error::new(Code::Mps, format!("{} is too long for a socket", longest.display()))
                .fix("name a shorter directory with --mps-root"));
        }
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move || format!("{path} cannot be made")
        };
        match fs::remove_dir_all(self.driver()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).or_fail(Code::Mps, failed(&self.driver()));
            }
            _ => {}
        }
        for path in [self.0.clone(), self.pipe(), self.shm(), self.0.join("log"), self.driver()] {
            fs::create_dir_all(&path).or_fail(Code::Mps, failed(&path))?;
        }
        // A server is the user's whose programs it serves.
        for path in [self.0.clone(), self.pipe(), self.driver()] {
            let everybody = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&path, everybody).or_fail(Code::Mps, failed(&path))?;
        }
        for (name, file) in &driver.files {
            let link = self.driver().join(name);
            symlink(file, &link).or_fail(Code::Mps, failed(&link))?;
        }
        self.mount_shm()
    }

    /// Mounts a tmpfs of the kernel's own size, half of memory, which containers know of that have it already.
    fn mount_shm(&self) -> Result<()> {
        let shm = self.shm();
        let failed = || format!("{} cannot be read", shm.display());
        let point = rustix::fs::openat(CWD, &shm, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let point = point.or_fail(Code::Mps, failed)?;
        let device = rustix::fs::fstat(&point).or_fail(Code::Mps, failed)?.st_dev;
        if device != fs::metadata(&self.0).or_fail(Code::Mps, failed)?.dev() {
            return Ok(());
        }
        let mode = [("mode", "1777".to_owned())];
        mount::attach(&mount::new_filesystem("tmpfs", &mode, mount::NOTHING)?, &point, &shm)
    }

    /// Takes it away.
    fn remove(&self) -> Result<()> {
        let failed = || format!("{} cannot be removed", self.0.display());
        match rustix::mount::unmount(self.shm(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // It is not mounted, or not there.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => return Err(errno).or_fail(Code::Mps, failed),
        }
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).or_fail(Code::Mps, failed)
            }
            _ => Ok(()),
        }
    }
}

/// What a program may have of its GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    /// Memory.
    mebibytes: u64,
    /// Of the processors.
    percentage: u32,
}

impl Limits {
    /// Equal parts.
    fn of(share: &Share) -> Self {
        let replicas = share.replicas.max(1);
        Self { mebibytes: (share.memory >> 20) / u64::from(replicas), percentage: 100 / replicas }
    }

    /// Whether the daemon's last two answers say so. From one GiB on it says how many of them, without the rest.
    fn are(self, answers: &str) -> bool {
        let mut last = answers.lines().rev();
        let percentage = last.next().and_then(|answer| answer.trim().parse::<f64>().ok());
        let memory = match self.mebibytes {
            mebibytes @ ..1024 => format!("{mebibytes}M"),
            mebibytes => format!("{}G", mebibytes >> 10),
        };
        percentage.is_some_and(|said| (said - f64::from(self.percentage)).abs() < 0.5)
            && last.next().is_some_and(|answer| answer.trim() == memory)
    }
}

/// Who keeps a GPU's daemon.
#[derive(Debug)]
struct Keeper {
    place: Place,
    uuid: String,
    standings: mpsc::UnboundedSender<Standing>,
}

impl Keeper {
    /// Until the end.
    async fn keep(self, mut wanted: watch::Receiver<Wanted>) {
        let mut back_off = BackOff::default();
        loop {
            let now = wanted.borrow_and_update().clone();
            let share = match &now.what {
                What::Daemon(share) => share,
                What::Nothing => {
                    self.let_all_compute(&now.driver).await;
                    if let Err(error) = self.place.remove() {
                        tracing::error!(device = self.uuid, "{error}");
                    }
                    back_off = BackOff::default();
                    if wanted.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
                What::End => return self.let_all_compute(&now.driver).await,
            };
            select! {
                () = sleep(back_off.wait()) => {}
                changed = wanted.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            }
            let started = Instant::now();
            let why = match self.run(share, &now.driver, &mut wanted).await {
                Ok(None) => {
                    self.tell(Some(STARTED.into()));
                    back_off = BackOff::default();
                    continue;
                }
                Ok(Some(how)) => format!("its MPS control daemon ended: {how}"),
                Err(error) => {
                    tracing::error!(device = self.uuid, "{error}");
                    format!("its MPS control daemon cannot be had: {}", error.what())
                }
            };
            self.tell(Some(why));
            back_off.ended(started.elapsed());
        }
    }

    fn tell(&self, down: Option<String>) {
        // Who listens lives as long as this does.
        let _ = self.standings.send(Standing { uuid: self.uuid.clone(), down });
    }

    /// Where the GPU is, or was, shared, any process may compute on it from now on.
    async fn let_all_compute(&self, driver: &Driver) {
        if self.place.0.exists()
            && let Err(error) = self.set_compute_mode(driver, DEFAULT).await
        {
            tracing::error!(device = self.uuid, "{error}");
        }
    }

    async fn set_compute_mode(&self, driver: &Driver, mode: &str) -> Result<()> {
        let reader = nvml::find_reader()?;
        let failed = || format!("{} cannot be run", reader.display());
        let mut command = Command::new(&reader);
        command.args(["--compute-mode", mode]).arg(&driver.nvml.0).arg(&self.uuid);
        let output = command.env_clear().current_dir("/").stdin(Stdio::null()).kill_on_drop(true).output();
        let output = timeout(nvml::HOPELESS, output).await.or_fail(Code::NvmlFailed, failed)?;
        let output = output.or_fail(Code::NvmlFailed, failed)?;
        if output.status.success() {
            return Ok(());
        }
        let said = serde_json::from_slice(&output.stdout).ok();
        Err(said.as_ref().and_then(Error::from_json).unwrap_or_else(|| {
            Error::new(Code::NvmlFailed, format!("the compute mode of {} cannot be set", self.uuid)).cause(
                format!("{} ended with {}: {}", reader.display(), output.status, words(&output.stderr)),
            )
        }))
    }

    /// Runs a daemon to its end, and says how it was; `None`: something else is wanted.
    async fn run(
        &self,
        share: &Share,
        driver: &Driver,
        wanted: &mut watch::Receiver<Wanted>,
    ) -> Result<Option<String>> {
        self.place.make(driver)?;
        // A program that misses the daemon would compute beside it otherwise, without limits and unseen.
        self.set_compute_mode(driver, EXCLUSIVE_PROCESS).await?;
        let mut child = self.start()?;
        let failed = || format!("{CONTROL} has no pipe");
        let out = child.stdout.take().ok_or("it is ours").or_fail(Code::Internal, failed)?;
        let mut lines = BufReader::new(out).lines();
        let mut last = String::new();
        let mut heard = true;
        let mut limits = pin!(self.set_limits(share));
        let mut ready = false;
        loop {
            select! {
                line = lines.next_line(), if heard => match line {
                    Ok(Some(line)) => {
                        self.log(&line);
                        last = line;
                    }
                    _ => heard = false,
                },
                set = &mut limits, if !ready => {
                    set?;
                    ready = true;
                    self.tell(None);
                }
                // A server that outlives it has its pipe, too.
                status = child.wait() => {
                    let status = status.or_fail(Code::Internal, failed)?;
                    return Ok(Some(format!("{status}; {last}")));
                }
                _ = wanted.changed() => break,
            }
        }
        self.quit(&mut child).await;
        Ok(None)
    }

    fn start(&self) -> Result<Child> {
        // Dropped before anybody waits: it has the daemon's mount.
        let shm = HostObject::file(&self.place.shm(), mount::NOTHING)?.into_mount();
        let mut command = self.command();
        command.arg("-f").stdin(Stdio::null()).stdout(Stdio::piped());
        process::with_own_shm(command.as_std_mut(), shm);
        command.kill_on_drop(true).spawn().or_fail(Code::Mps, || {
            format!("{CONTROL} cannot be run with {} as its {SHM}", self.place.shm().display())
        })
    }

    /// The driver's program, which finds server and libraries by these links.
    fn command(&self) -> Command {
        let mut command = Command::new(self.place.driver().join(CONTROL));
        command
            .env_clear()
            .env("PATH", self.place.driver())
            .env("LD_LIBRARY_PATH", self.place.driver())
            .env("CUDA_VISIBLE_DEVICES", &self.uuid)
            .env(PIPE_VARIABLE, self.place.pipe())
            .env("CUDA_MPS_LOG_DIRECTORY", self.place.0.join("log"))
            .current_dir("/");
        command
    }

    /// Its own words, and its servers'.
    fn log(&self, line: &str) {
        // It has no levels. "Failed to start : …", "Server encountered a fatal exception."
        if line.contains("Failed") || line.contains("fatal") {
            tracing::warn!(device = self.uuid, "MPS: {line}");
        } else {
            tracing::info!(device = self.uuid, "MPS: {line}");
        }
    }

    /// Waits until it answers, and gives it the limits that each program has then.
    async fn set_limits(&self, share: &Share) -> Result<()> {
        let limits = Limits::of(share);
        let Limits { mebibytes, percentage } = limits;
        // Its GPU is the only one that it sees.
        let commands = format!(
            "set_default_device_pinned_mem_limit 0 {mebibytes}M\n\
             set_default_active_thread_percentage {percentage}\n\
             get_default_device_pinned_mem_limit 0\n\
             get_default_active_thread_percentage\n"
        );
        let mut wait = Duration::from_millis(10);
        let output = loop {
            let output = self.ask(&commands).await?;
            if output.status.success() {
                break output;
            }
            if wait > ANSWERS / 2 {
                return Err(Error::new(
                    Code::Mps,
                    format!("the MPS control daemon of {} does not answer", self.uuid),
                )
                .cause(words(&output.stderr)));
            }
            sleep(wait).await;
            wait *= 2;
        };
        let said = words(&output.stdout);
        if limits.are(&said) {
            return Ok(());
        }
        Err(Error::new(
            Code::Mps,
            format!("the MPS control daemon of {} does not take its limits", self.uuid),
        )
        .cause(format!("it was told {commands:?}, and says {said:?}")))
    }

    async fn quit(&self, child: &mut Child) {
        if let Err(error) = self.ask(&format!("quit -t {PATIENCE}\n")).await {
            tracing::warn!(device = self.uuid, "{error}");
        }
        if timeout(ANSWERS, child.wait()).await.is_err() {
            let _ = child.start_kill();
        }
    }

    /// Says something to the daemon.
    async fn ask(&self, commands: &str) -> Result<Output> {
        let failed = || format!("{CONTROL} cannot speak to the daemon of {}", self.uuid);
        let asked = async {
            let mut command = self.command();
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
            let mut child = command.spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // One that finds no daemon reads nothing.
                let _ = stdin.write_all(commands.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        timeout(ANSWERS, asked).await.or_fail(Code::Mps, failed)?.or_fail(Code::Mps, failed)
    }
}

fn words(said: &[u8]) -> String {
    String::from_utf8_lossy(said).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::file::tests::time_slicing,
        resources::{MigStrategy, Sharing, resources, tests::inventory},
    };

    fn by_mps(text: &str) -> Sharing {
        Sharing { by: SharingStrategy::Mps, ..time_slicing(text) }
    }

    #[test]
    fn what_cannot_be_shared_by_mps_is_refused_and_it_is_said_why() {
        let two = "{resources: [{name: gpu, replicas: 2}]}";
        let many = "{resources: [{name: gpu, replicas: 49}]}";
        let cut: &[&[&str]] = &[&["1g.5gb"], &["1g.5gb"]];
        let mig = "{resources: [{name: mig-1g.5gb, replicas: 2}]}";
        let mut old = inventory(&[&[], &[]]);
        old.gpus[1].compute_capability = Version::of(6, 1);
        for (host, strategy, sharing, why) in [
            (&old, MigStrategy::None, two, "6.1"),
            (&inventory(&[&[]]), MigStrategy::None, many, "48"),
            (&inventory(cut), MigStrategy::Single, two, "MIG"),
            (&inventory(cut), MigStrategy::Mixed, mig, "MIG"),
        ] {
            let error = resources(host, strategy, &by_mps(sharing)).unwrap_err();
            assert!(error.code() == Code::Config && error.to_string().contains(why), "{why}: {error}");
            let in_turns = Sharing { by: SharingStrategy::TimeSlicing, ..by_mps(sharing) };
            assert!(resources(host, strategy, &in_turns).is_ok(), "{why}");
        }
        let host = inventory(&[&["1g.5gb"], &[]]);
        let mixed = resources(&host, MigStrategy::Mixed, &by_mps(two)).unwrap();
        let uuids: Vec<_> = shares(&host, &mixed).into_iter().map(|share| share.uuid).collect();
        assert_eq!(uuids, ["GPU-1"], "the whole GPU beside one that is cut");
    }

    #[test]
    fn each_program_has_an_equal_part_and_the_daemons_answer_says_so() {
        let limits = |memory, replicas| Limits::of(&Share { uuid: String::new(), memory, replicas });
        let h100 = limits(85_520_809_984, 3);
        assert_eq!(h100, Limits { mebibytes: 27186, percentage: 33 });
        for (answers, are) in [
            ("33.0\n26G\n33.0\n", true),
            ("33.0\n26G\n100.0\n", false),
            ("33.0\n27G\n33.0\n", false),
            ("33.0\n33.0\n", false),
            ("No default pinned memory limit set for the device!\n33.0", false),
            ("", false),
        ] {
            assert_eq!(h100.are(answers), are, "{answers:?}");
        }
        assert!(limits(1 << 30, 2).are("512M\n50.0\n") && !limits(0, 2).are("0G\n50.0\n"));
    }

    #[test]
    fn a_driver_without_its_programs_is_said_to_be() {
        let error = Driver::of(&inventory(&[&[]])).unwrap_err();
        assert!(
            error.code() == Code::DriverIncomplete && error.fix_line().contains("nvidia-cuda-mps"),
            "{error}"
        );
    }
}
