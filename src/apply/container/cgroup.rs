//! The container's cgroup: resource limits, device rules, and one handle by which everything in it can be killed.
//!
//! Wherever a cgroup v2 hierarchy is mounted the container has a directory there, because its first process can be born
//! in it (CLONE_INTO_CGROUP) and because device rules need nothing else. A v1 hierarchy is joined only for a limit that
//! was asked for and that v2 does not serve: each join takes a lock of the whole machine and can last 10 ms.
//!
//! A directory is `gpurun/ID` below the highest cgroup, from the hierarchy's root down to our own, that we may write:
//! for root the hierarchy's root, as Docker's `cgroupfs` driver has it; for a user what systemd delegated to him.

use crate::{
    error::{Code, Error, OrFail, Result},
    sys::bpf::{DeviceKind, DeviceRule, restrict_devices},
};
use rustix::{
    fs::{Access, access, statfs},
    io::Errno,
    process::{Pid, Signal, getpid, kill_process},
};
use std::{
    fs,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

/// Where systemd, and everyone after it, mounts the hierarchies (systemd.io/CGROUP_DELEGATION, "Three Different Tree
/// Setups").
const MOUNTS: &str = "/sys/fs/cgroup";

/// Our directory below the cgroup that we start from; each container has one inside.
const DIRECTORY: &str = "gpurun";

/// Where the launcher moves when it must leave the cgroup that the container's is made in.
const LAUNCHER: &str = "gpurun-launcher";

/// What a container may use of the machine; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// Bytes of memory; as much again of swap, as Docker has it.
    pub memory: Option<u64>,
    /// Processors' worth of time; 1.5 is one and a half.
    pub cpus: Option<f64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// Which hierarchies a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// cgroup v2 at /sys/fs/cgroup.
    Unified,
    /// cgroup v2 at /sys/fs/cgroup/unified, v1 hierarchies beside it.
    Hybrid,
    /// v1 hierarchies only.
    Legacy,
    /// None.
    Absent,
}

impl Layout {
    /// That of this host. Asks for the mounted file systems' types, because a mount table also lists what other mounts hide.
    pub fn current() -> Self {
        if is_mounted(Path::new(MOUNTS), CGROUP2_SUPER_MAGIC) {
            Self::Unified
        } else if is_mounted(&Path::new(MOUNTS).join("unified"), CGROUP2_SUPER_MAGIC) {
            Self::Hybrid
        } else if LEGACY.iter().any(|name| legacy_mount(name).is_some()) {
            Self::Legacy
        } else {
            Self::Absent
        }
    }

    /// Where cgroup v2 is mounted.
    pub fn unified(self) -> Option<PathBuf> {
        match self {
            Self::Unified => Some(MOUNTS.into()),
            Self::Hybrid => Some(Path::new(MOUNTS).join("unified")),
            Self::Legacy | Self::Absent => None,
        }
    }
}

/// linux/magic.h.
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;

fn is_mounted(path: &Path, file_system: i64) -> bool {
    // `f_type`'s own type differs between the C libraries.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    statfs(path).is_ok_and(|found| found.f_type as i64 == file_system)
}

/// The v1 hierarchies that we may have joined; `cpu` may be a link to `cpu,cpuacct`.
const LEGACY: [&str; 4] = ["memory", "cpu", "pids", "devices"];

/// Where the v1 hierarchy of a controller is mounted.
pub fn legacy_mount(controller: &str) -> Option<PathBuf> {
    Some(Path::new(MOUNTS).join(controller)).filter(|path| is_mounted(path, CGROUP_SUPER_MAGIC))
}

/// One kind of limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Controller {
    Memory,
    Cpu,
    Pids,
}

/// A file of a cgroup, and what is written there.
struct Setting {
    file: &'static str,
    value: String,
    /// Absent on a kernel that does not account swap; the limit on memory holds without it.
    may_be_absent: bool,
}

fn setting(file: &'static str, value: &impl ToString) -> Setting {
    Setting { file, value: value.to_string(), may_be_absent: false }
}

impl Controller {
    const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
        }
    }

    fn option(self) -> &'static str {
        match self {
            Self::Memory => "--memory",
            Self::Cpu => "--cpus",
            Self::Pids => "--pids-limit",
        }
    }

    /// What `limits` want of this controller in cgroup v2 (else v1); empty where they want nothing. In this order: v1
    /// refuses a limit on memory and swap that is below the one on memory.
    fn settings(self, limits: &Limits, unified: bool) -> Vec<Setting> {
        /// Microseconds, the kernel's default and Docker's.
        const PERIOD: u32 = 100_000;
        let quota = |cpus: f64| format!("{:.0}", cpus * f64::from(PERIOD));
        match (self, unified) {
            (Self::Memory, true) => limits.memory.map_or_else(Vec::new, |bytes| {
                // v2 counts swap alone.
                let swap = Setting { may_be_absent: true, ..setting("memory.swap.max", &bytes) };
                vec![setting("memory.max", &bytes), swap]
            }),
            (Self::Memory, false) => limits.memory.map_or_else(Vec::new, |bytes| {
                // v1 counts memory and swap together.
                let both = setting("memory.memsw.limit_in_bytes", &bytes.saturating_mul(2));
                vec![setting("memory.limit_in_bytes", &bytes), Setting { may_be_absent: true, ..both }]
            }),
            (Self::Cpu, true) => limits
                .cpus
                .map(|cpus| setting("cpu.max", &format!("{} {PERIOD}", quota(cpus))))
                .into_iter()
                .collect(),
            (Self::Cpu, false) => limits.cpus.map_or_else(Vec::new, |cpus| {
                vec![setting("cpu.cfs_period_us", &PERIOD), setting("cpu.cfs_quota_us", &quota(cpus))]
            }),
            (Self::Pids, _) => limits.pids.map(|pids| setting("pids.max", &pids)).into_iter().collect(),
        }
    }

    fn failed(self, cause: impl std::fmt::Display) -> Error {
        Error::new(Code::Limit, format!("the limit of {} cannot be set", self.option())).cause(cause)
    }
}

/// One container's cgroup. Nothing happens when it is dropped: a copy of it lives in the container's first process.
#[derive(Debug)]
pub struct Cgroup {
    layout: Layout,
    /// Where it is beneath the cgroup that we start from.
    directory: PathBuf,
    /// The directory in cgroup v2, open for CLONE_INTO_CGROUP.
    unified: Option<(PathBuf, OwnedFd)>,
    /// Directories in v1 hierarchies.
    legacy: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the container's cgroup with these limits. `None` where nothing was asked for and there is no cgroup that we may
    /// write, as for most ordinary users; where [`Cgroup::restrict`] is to follow there is always one.
    ///
    /// # Errors
    /// [`Code::Limit`] where a limit cannot be honoured, [`Code::Cgroup`] where the cgroup cannot be made. Nothing is left
    /// behind then.
    pub fn create(id: &str, limits: &Limits, restricted: bool) -> Result<Option<Self>> {
        let directory = directory(id)?;
        if limits.cpus.is_some_and(|cpus| !(cpus.is_finite() && cpus >= 0.01)) {
            // The kernel's least quota is a millisecond in 100.
            return Err(Controller::Cpu.failed("the kernel takes 0.01 processors or more"));
        }
        let mut cgroup = Self { layout: Layout::current(), directory, unified: None, legacy: Vec::new() };
        match cgroup.fill(limits) {
            Ok(()) if cgroup.unified.is_none() && cgroup.legacy.is_empty() && !restricted => Ok(None),
            Ok(()) => Ok(Some(cgroup)),
            Err(error) => {
                // What went wrong first is what the user must know.
                let _ = cgroup.remove();
                Err(error)
            }
        }
    }

    fn fill(&mut self, limits: &Limits) -> Result<()> {
        let directory = &self.directory.clone();
        let own = Place::read();
        let mut left: Vec<Controller> = Controller::ALL.into();
        left.retain(|controller| !controller.settings(limits, true).is_empty());

        let start = self.layout.unified().and_then(|mount| own.highest_writable(&mount, None));
        if let Some(start) = &start {
            let offered = read(&start.join("cgroup.controllers"));
            let (here, elsewhere): (Vec<_>, Vec<_>) =
                left.into_iter().partition(|one| offered.split_whitespace().any(|name| name == one.name()));
            left = elsewhere;
            self.fill_unified(start, directory, &here, limits)?;
        }
        for controller in left {
            let name = controller.name();
            let start = legacy_mount(name)
                .and_then(|mount| own.highest_writable(&mount, Some(name)))
                .ok_or_else(|| not_delegated(controller, start.as_deref()))?;
            let path = start.join(directory);
            fs::create_dir_all(&path)
                .map_err(|error| controller.failed(format!("mkdir {}: {error}", path.display())))?;
            self.legacy.push(path.clone());
            set(&path, controller, &controller.settings(limits, false))?;
        }
        Ok(())
    }

    fn fill_unified(
        &mut self,
        start: &Path,
        directory: &Path,
        controllers: &[Controller],
        limits: &Limits,
    ) -> Result<()> {
        let path = start.join(directory);
        make(&path)?;
        let open = fs::File::open(&path)
            .or_fail(Code::Cgroup, || format!("the cgroup {} cannot be opened", path.display()));
        let open = open.inspect_err(|_| {
            let _ = fs::remove_dir(&path);
        })?;
        self.unified = Some((path.clone(), open.into()));
        enable(start, controllers)?;
        enable(&start.join(DIRECTORY), controllers)?;
        for controller in controllers {
            set(&path, *controller, &controller.settings(limits, true))?;
        }
        Ok(())
    }

    /// Opens the cgroup to the devices of `rules` alone. Until then it is open to all, so nothing of the container's may run:
    /// the kernel checks the program while the container's root is being made.
    ///
    /// # Errors
    /// [`Code::Cgroup`] where the rules cannot be made.
    pub fn restrict(&mut self, rules: &[DeviceRule]) -> Result<()> {
        match &self.unified {
            Some((path, fd)) => restrict_devices(fd.as_fd(), rules).or_fail(Code::Cgroup, || {
                format!("the devices of the cgroup {} cannot be restricted", path.display())
            }),
            None => self.restrict_legacy(&Place::read(), &self.directory.clone(), rules),
        }
    }

    /// Device rules where no cgroup v2 is mounted (Documentation/admin-guide/cgroup-v1/devices.rst).
    fn restrict_legacy(&mut self, own: &Place, directory: &Path, rules: &[DeviceRule]) -> Result<()> {
        let start = legacy_mount("devices")
            .and_then(|mount| own.highest_writable(&mount, Some("devices")))
            .ok_or_else(|| {
            Error::new(Code::Cgroup, "the container's devices cannot be restricted")
                .cause("there is no cgroup hierarchy for devices that gpurun may write")
                .fix("mount cgroup2 at /sys/fs/cgroup, writable")
        })?;
        let path = start.join(directory);
        let failed = || format!("the devices of the cgroup {} cannot be restricted", path.display());
        make(&path)?;
        self.legacy.push(path.clone());
        write(&path.join("devices.deny"), "a").or_fail(Code::Cgroup, failed)?;
        for line in rules.iter().flat_map(legacy_lines) {
            write(&path.join("devices.allow"), &line).or_fail(Code::Cgroup, failed)?;
        }
        Ok(())
    }

    /// The directory in cgroup v2, for CLONE_INTO_CGROUP.
    pub fn dir_fd(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(|(_, fd)| fd.as_fd())
    }

    /// Puts a process into the v1 hierarchies, if there are any to join: the container's first process, before it starts
    /// anything.
    pub fn join(&self, pid: Pid) -> Result<()> {
        for path in &self.legacy {
            write(&path.join("cgroup.procs"), &pid.as_raw_nonzero().to_string())
                .or_fail(Code::Cgroup, || {
                    format!("the container cannot be put into the cgroup {}", path.display())
                })?;
        }
        Ok(())
    }

    /// Whether the kernel killed a process of the container because of the memory limit (cgroup-v2.rst, "memory.events";
    /// cgroup-v1/memory.rst, "memory.oom_control").
    pub fn ran_out_of_memory(&self) -> bool {
        let unified = self.unified.iter().map(|(path, _)| path.join("memory.events"));
        let legacy = self.legacy.iter().map(|path| path.join("memory.oom_control"));
        unified.chain(legacy).any(|file| {
            let kills =
                read(&file).lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse::<u64>().ok());
            kills.is_some_and(|kills| kills > 0)
        })
    }

    /// The container's directories in v1 hierarchies, and where a container looks for them.
    pub fn legacy_view(&self) -> Vec<(PathBuf, PathBuf)> {
        let hierarchy =
            |path: &PathBuf| Some(Path::new(MOUNTS).join(path.strip_prefix(MOUNTS).ok()?.iter().next()?));
        self.legacy.iter().filter_map(|path| Some((path.clone(), hierarchy(path)?))).collect()
    }

    /// Kills what is left in the cgroup and removes it.
    pub fn remove(self) -> Result<()> {
        let unified = self.unified.into_iter().map(|(path, _)| path);
        unified.chain(self.legacy).try_for_each(|path| remove(&path))
    }

    /// [`Cgroup::remove`] for a container whose launcher was killed.
    pub fn remove_stale(id: &str) -> Result<()> {
        let directory = directory(id)?;
        let own = Place::read();
        let unified = Layout::current().unified().map(|mount| (mount, None));
        let legacy = LEGACY.iter().filter_map(|&name| Some((legacy_mount(name)?, Some(name))));
        for (mount, controller) in unified.into_iter().chain(legacy) {
            if let Some(start) = own.highest_writable(&mount, controller) {
                remove(&start.join(&directory))?;
            }
        }
        Ok(())
    }
}

/// `gpurun/ID`. Ids are gpurun's own, but they come back from file names.
fn directory(id: &str) -> Result<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if id.is_empty() || !id.bytes().all(plain) {
        return Err(Error::new(Code::Cgroup, format!("{id:?} is not a container's id")));
    }
    Ok(Path::new(DIRECTORY).join(id))
}

/// A process' place in each hierarchy, /proc/PID/cgroup.
pub struct Place(String);

impl Place {
    fn read() -> Self {
        Self(read(Path::new("/proc/self/cgroup")))
    }

    /// That of another process.
    pub fn of(pid: i32) -> io::Result<Self> {
        fs::read_to_string(format!("/proc/{pid}/cgroup")).map(Self)
    }

    /// `HIERARCHY:CONTROLLERS:PATH`; the hierarchy of cgroup v2 is 0 and names no controllers (cgroups(7)).
    pub fn path(&self, controller: Option<&str>) -> Option<&str> {
        self.0.lines().find_map(|line| {
            let (hierarchy, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let fits = match controller {
                None => hierarchy == "0" && controllers.is_empty(),
                Some(wanted) => controllers.split(',').any(|one| one == wanted),
            };
            fits.then_some(path)
        })
    }

    /// The directory of a cgroup in its hierarchy.
    ///
    /// # Errors
    /// [`Code::Cgroup`] for a path with `..`: it leads out of our cgroup namespace, where we have no say.
    pub fn beneath(mount: &Path, path: &str) -> Result<PathBuf> {
        if path.split('/').any(|part| part == "..") {
            return Err(Error::new(
                Code::Cgroup,
                format!("the cgroup {path} is not in this cgroup namespace"),
            ));
        }
        Ok(mount.join(path.trim_start_matches('/')))
    }

    /// The highest cgroup from the hierarchy's root down to our own in which we may make directories and from which we
    /// may move processes: a process moves only within a cgroup whose `cgroup.procs` the mover may write (cgroup-v2.rst,
    /// "Delegation Containment").
    fn highest_writable(&self, mount: &Path, controller: Option<&str>) -> Option<PathBuf> {
        // A path with `..` leads out of our cgroup namespace, where we have no say.
        let own = self.path(controller).filter(|path| !path.split('/').any(|part| part == ".."));
        let mut place = mount.to_owned();
        let mut parts = own.unwrap_or_default().split('/').filter(|part| !part.is_empty());
        loop {
            let writable = |path: &Path| access(path, Access::WRITE_OK).is_ok();
            if writable(&place) && writable(&place.join("cgroup.procs")) {
                return Some(place);
            }
            place.push(parts.next()?);
        }
    }
}

fn not_delegated(controller: Controller, start: Option<&Path>) -> Error {
    let name = controller.name();
    let error =
        match start {
            Some(start) => controller
                .failed(format!("the cgroup {} does not offer the {name} controller", start.display())),
            None => controller
                .failed(format!("there is no cgroup with the {name} controller that gpurun may write")),
        };
    let option = controller.option();
    if rustix::process::geteuid().is_root() {
        error.fix(format!(
            "mount cgroup2 at {MOUNTS}, writable and with the {name} controller, or leave {option} out"
        ))
    } else {
        error.fix(format!(
            "on a host with cgroup v2 use: systemd-run --user --scope -p Delegate=yes gpurun …; or leave {option} out"
        ))
    }
}

/// Lets children of the cgroup v2 `path` have these controllers.
fn enable(path: &Path, controllers: &[Controller]) -> Result<()> {
    let control = path.join("cgroup.subtree_control");
    let already = read(&control);
    let missing: Vec<_> = controllers
        .iter()
        .filter(|one| !already.split_whitespace().any(|name| name == one.name()))
        .map(|one| format!("+{}", one.name()))
        .collect();
    let Some(first) = controllers.first().filter(|_| !missing.is_empty()) else {
        return Ok(());
    };
    let failed = |error| first.failed(format!("write {missing:?} to {}: {error}", control.display()));
    match write(&control, &missing.join(" ")) {
        // A cgroup with processes of its own cannot limit its children (cgroup-v2.rst, "No Internal Process Constraint").
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            step_aside(path, getpid()).map_err(failed)?;
            write(&control, &missing.join(" ")).map_err(failed)
        }
        result => result.map_err(failed),
    }
}

/// Moves the launcher out of the cgroup v2 `path` if it is alone there: in a scope made for it, that is.
fn step_aside(path: &Path, launcher: Pid) -> io::Result<()> {
    let own = launcher.as_raw_nonzero().to_string();
    let processes = read(&path.join("cgroup.procs"));
    if processes.lines().any(|pid| pid != own) {
        let message = format!(
            "{} holds other processes, which only their owner may move into a cgroup below it",
            path.display()
        );
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
    }
    let aside = path.join(LAUNCHER);
    match fs::create_dir(&aside) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => write(&aside.join("cgroup.procs"), &own),
    }
}

/// Makes a container's directory, which must be new, in ours, which mostly exists.
fn make(path: &Path) -> Result<()> {
    let made = match path.parent().map(fs::create_dir) {
        Some(Err(error)) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::create_dir(path),
    };
    made.or_fail(Code::Cgroup, || format!("the cgroup {} cannot be made", path.display()))
}

fn set(path: &Path, controller: Controller, settings: &[Setting]) -> Result<()> {
    for Setting { file, value, may_be_absent } in settings {
        match write(&path.join(file), value) {
            Err(error) if *may_be_absent && error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(
                    controller.failed(format!("write {value} to {}: {error}", path.join(file).display()))
                );
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// The lines that `devices.allow` wants for a rule; its `a` takes no numbers, so "both kinds" is two lines.
pub fn legacy_lines(rule: &DeviceRule) -> Vec<String> {
    let kinds = match rule.kind {
        DeviceKind::Char => "c",
        DeviceKind::Block => "b",
        DeviceKind::All => "cb",
    };
    let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
    let access = [(rule.read, 'r'), (rule.write, 'w'), (rule.mknod, 'm')];
    let access: String =
        access.into_iter().filter_map(|(allowed, letter)| allowed.then_some(letter)).collect();
    if access.is_empty() {
        return Vec::new();
    }
    let line = |kind| format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor));
    kinds.chars().map(line).collect()
}

/// Reads a file of the kernel's; what is not there says nothing.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Writes one value in one write(2), as cgroup files want it, and makes no file.
pub fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

fn remove(path: &Path) -> Result<()> {
    remove_tree(path, 0).or_fail(Code::Cgroup, || format!("the cgroup {} cannot be removed", path.display()))
}

/// Removes a cgroup, those that the container made below it, and before that what runs in them. Killed processes leave
/// when they get to it, so this waits up to a second for them.
fn remove_tree(path: &Path, depth: u32) -> io::Result<()> {
    /// A container could make cgroups deeper than we care to follow.
    const DEEPEST: u32 = 32;
    let mut pause = Duration::from_millis(1);
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && pause < Duration::from_millis(512) => {}
            result => return result,
        }
        kill(path);
        if depth < DEEPEST {
            for child in
                fs::read_dir(path)?.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
            {
                remove_tree(&child.path(), depth + 1)?;
            }
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
}

/// Kills a cgroup's processes: at once with `cgroup.kill` (v2, since Linux 5.14), else one by one.
fn kill(path: &Path) {
    if write(&path.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for line in read(&path.join("cgroup.procs")).lines() {
        // 0 stands for a process outside of our pid namespace.
        if let Some(pid) = line.parse().ok().filter(|&pid| pid > 0).and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    use std::process::{Child, Command, Output, Stdio};

    /// Whether the kernel lets this process make cgroups; says so where not.
    fn root(test: &str) -> bool {
        let root = rustix::process::geteuid().is_root() && Layout::current() != Layout::Absent;
        if !root {
            eprintln!("{test}: skipped, making cgroups needs root and a cgroup hierarchy");
        }
        root
    }

    fn id(test: &str) -> String {
        format!("test-{test}-{}", std::process::id())
    }

    /// A shell that runs `script` once it is in the cgroup.
    fn start(cgroup: &Cgroup, script: &str) -> Child {
        let mut shell = Command::new("sh")
            .args(["-c", &format!("read -r go; {script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        if let Some((path, _)) = &cgroup.unified {
            write(&path.join("cgroup.procs"), &shell.id().to_string()).unwrap();
        }
        cgroup.join(Pid::from_child(&shell)).unwrap();
        shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
        shell
    }

    fn run(cgroup: &Cgroup, script: &str) -> Output {
        start(cgroup, script).wait_with_output().unwrap()
    }

    fn paths(cgroup: &Cgroup) -> Vec<PathBuf> {
        cgroup.unified.iter().map(|(path, _)| path.clone()).chain(cgroup.legacy.clone()).collect()
    }

    #[test]
    fn a_memory_limit_kills_what_exceeds_it() {
        if !root("memory") {
            return;
        }
        let limits = Limits { memory: Some(48 << 20), ..Limits::default() };
        let cgroup = Cgroup::create(&id("memory"), &limits, false).unwrap().unwrap();
        let allocate = |size| format!("dd if=/dev/zero of=/dev/null bs={size} count=1; echo survived: $?");
        let said = |output: Output| String::from_utf8(output.stdout).unwrap();
        assert_eq!(said(run(&cgroup, &allocate("8M"))), "survived: 0\n");
        assert_eq!(said(run(&cgroup, &allocate("200M"))), "survived: 137\n");
        cgroup.remove().unwrap();
    }

    #[test]
    fn a_limit_of_processes_stops_a_fork() {
        if !root("pids") {
            return;
        }
        let limits = Limits { pids: Some(3), ..Limits::default() };
        let cgroup = Cgroup::create(&id("pids"), &limits, false).unwrap().unwrap();
        assert!(run(&cgroup, "sleep 0 & sleep 0 & wait").status.success());
        assert!(!run(&cgroup, "sleep 1 & sleep 1 & sleep 1 & wait").status.success());
        cgroup.remove().unwrap();
    }

    #[test]
    fn a_limit_of_processors_is_written_as_a_quota() {
        if !root("cpus") {
            return;
        }
        let limits = Limits { cpus: Some(1.5), ..Limits::default() };
        let cgroup = Cgroup::create(&id("cpus"), &limits, false).unwrap().unwrap();
        let written: Vec<String> = paths(&cgroup)
            .iter()
            .flat_map(|path| {
                ["cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"].map(|file| read(&path.join(file)))
            })
            .filter(|text| !text.is_empty())
            .collect();
        assert!(written == ["150000 100000\n"] || written == ["150000\n", "100000\n"], "{written:?}");
        cgroup.remove().unwrap();
        for nonsense in [0.0, -1.0, f64::NAN, f64::INFINITY, 0.001] {
            let limits = Limits { cpus: Some(nonsense), ..Limits::default() };
            assert_eq!(Cgroup::create(&id("cpus"), &limits, false).unwrap_err().code(), Code::Limit);
        }
    }

    #[test]
    fn only_the_devices_of_the_rules_open() {
        if !root("devices") {
            return;
        }
        let directory = tempfile::tempdir_in("/dev").unwrap();
        let node = |name: &str, minor| {
            let path = directory.path().join(name);
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(CWD, &path, FileType::CharacterDevice, mode, makedev(1, minor)).unwrap();
            path.display().to_string()
        };
        let (null, zero) = (node("null", 3), node("zero", 5));
        let read_zero = DeviceRule {
            kind: DeviceKind::Char,
            major: Some(1),
            minor: Some(5),
            read: true,
            write: false,
            mknod: false,
        };
        let mut cgroup = Cgroup::create(&id("devices"), &Limits::default(), true).unwrap().unwrap();
        cgroup.restrict(&[read_zero]).unwrap();
        assert!(cgroup.dir_fd().is_some() || cgroup.layout == Layout::Legacy);
        let works = |script: &str| run(&cgroup, script).status.success();
        assert!(works(&format!(": < {zero}")));
        assert!(!works(&format!(": > {zero}")));
        assert!(!works(&format!(": < {null}")));
        assert!(!works(&format!("mknod {}/full c 1 7", directory.path().display())));
        cgroup.remove().unwrap();
        let bare = Cgroup::create(&id("devices"), &Limits::default(), false).unwrap().unwrap();
        assert!(run(&bare, &format!(": < {null}")).status.success());
        bare.remove().unwrap();
    }

    #[test]
    fn v1_hierarchies_restrict_devices_where_there_is_no_v2() {
        if !root("devices of v1") {
            return;
        }
        if legacy_mount("devices").is_none() {
            eprintln!("devices of v1: skipped, no such hierarchy is mounted");
            return;
        }
        let directory = directory(&id("legacy")).unwrap();
        let mut cgroup = Cgroup { layout: Layout::Legacy, directory, unified: None, legacy: Vec::new() };
        let mut rules = [DeviceRule {
            kind: DeviceKind::All,
            major: Some(1),
            minor: None,
            read: true,
            write: false,
            mknod: false,
        }; 2];
        rules[1].read = false;
        cgroup.restrict(&rules).unwrap();
        assert_eq!(read(&cgroup.legacy[0].join("devices.list")), "c 1:* r\nb 1:* r\n");
        assert!(run(&cgroup, ": < /dev/zero").status.success());
        assert!(!run(&cgroup, ": > /dev/zero").status.success());
        // v1 has no cgroup.kill.
        let mut shell = start(&cgroup, "exec sleep 1000");
        cgroup.remove().unwrap();
        assert!(!shell.wait().unwrap().success());
    }

    #[test]
    fn what_a_killed_launcher_left_is_killed_and_removed() {
        if !root("stale") {
            return;
        }
        let id = id("stale");
        let limits = Limits { pids: Some(100), memory: Some(1 << 30), ..Limits::default() };
        let cgroup = Cgroup::create(&id, &limits, false).unwrap().unwrap();
        let again = Cgroup::create(&id, &limits, false).unwrap_err();
        assert_eq!(again.code(), Code::Cgroup, "an id is used once");
        let mut shell = start(&cgroup, "echo ready; sleep 1000 & sleep 1000");
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
        let paths = paths(&cgroup);
        for path in &paths {
            fs::create_dir_all(path.join("made/inside")).unwrap();
        }
        drop(cgroup);
        assert!(paths.iter().all(|path| path.exists()));
        Cgroup::remove_stale(&id).unwrap();
        assert!(!paths.iter().any(|path| path.exists()), "{paths:?}");
        assert!(!shell.wait().unwrap().success());
        Cgroup::remove_stale(&id).unwrap();
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        if !root("failure") {
            return;
        }
        let id = id("failure");
        // The kernel takes no such number of processes.
        let limits = Limits { pids: Some(u64::MAX), memory: Some(1 << 30), ..Limits::default() };
        let error = Cgroup::create(&id, &limits, false).unwrap_err();
        assert_eq!(error.code(), Code::Limit);
        assert!(error.what().contains("--pids-limit"), "{error}");
        let mut mounts =
            Layout::current().unified().into_iter().chain(LEGACY.into_iter().filter_map(legacy_mount));
        assert!(mounts.all(|mount| !mount.join(directory(&id).unwrap()).exists()));
    }

    #[test]
    fn a_user_without_a_cgroup_runs_without_but_not_with_a_limit() {
        let delegated =
            Layout::current().unified().and_then(|mount| Place::read().highest_writable(&mount, None));
        if rustix::process::geteuid().is_root() || delegated.is_some() {
            eprintln!("user: skipped, this is root or a user with a cgroup of his own");
            return;
        }
        let id = id("user");
        assert!(Cgroup::create(&id, &Limits::default(), false).unwrap().is_none());
        let limits = Limits { memory: Some(1 << 30), ..Limits::default() };
        let error = Cgroup::create(&id, &limits, false).unwrap_err();
        assert_eq!(error.code(), Code::Limit);
        assert!(error.fix_line().contains("Delegate=yes"), "{error}");
        Cgroup::remove_stale(&id).unwrap();
    }

    #[test]
    fn the_launcher_steps_aside_only_where_it_is_alone() {
        let Some(mount) = Layout::current().unified().filter(|_| root("aside")) else { return };
        let path = mount.join(id("aside"));
        fs::create_dir(&path).unwrap();
        let procs = path.join("cgroup.procs");
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        write(&procs, &other.id().to_string()).unwrap();
        assert!(step_aside(&path, getpid()).unwrap_err().to_string().contains("other processes"));
        assert!(!path.join(LAUNCHER).exists());
        step_aside(&path, Pid::from_child(&other)).unwrap();
        assert_eq!(read(&procs), "");
        assert_eq!(read(&path.join(LAUNCHER).join("cgroup.procs")), format!("{}\n", other.id()));
        other.kill().unwrap();
        other.wait().unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn ids_are_plain_names() {
        for id in ["", "..", "a/b", "a\0", ".hidden"] {
            assert!(Cgroup::remove_stale(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn our_own_place_is_found_by_hierarchy() {
        let own = Place(
            "12:cpu,cpuacct:/a\n3:name=systemd:/s:x\n2:cpu,cpuset:/no\n0::/user.slice/x.scope\n".into(),
        );
        assert_eq!(own.path(Some("cpu")), Some("/a"));
        assert_eq!(own.path(Some("name=systemd")), Some("/s:x"));
        assert_eq!(own.path(None), Some("/user.slice/x.scope"));
        assert_eq!(own.path(Some("memory")), None);
        assert_eq!(Place(String::new()).path(None), None);
    }

    #[test]
    fn the_start_is_the_highest_cgroup_that_is_ours() {
        let mount = tempfile::tempdir().unwrap();
        let own = Place("0::/user/service/scope\n".into());
        let start = || own.highest_writable(mount.path(), None);
        assert_eq!(start(), None);
        // No cgroup.procs that may be written above it: `service` is what was delegated.
        fs::create_dir_all(mount.path().join("user/service/scope")).unwrap();
        fs::write(mount.path().join("user/service/scope/cgroup.procs"), "").unwrap();
        assert_eq!(start(), Some(mount.path().join("user/service/scope")));
        fs::write(mount.path().join("user/service/cgroup.procs"), "").unwrap();
        assert_eq!(start(), Some(mount.path().join("user/service")));
        let outside = Place("0::/../service\n".into());
        assert_eq!(outside.highest_writable(&mount.path().join("user"), None), None);
    }

    #[test]
    fn v2_gets_the_values_that_docker_writes() {
        let limits = Limits { memory: Some(4096), cpus: Some(0.5), pids: Some(7) };
        let written: Vec<(&str, String)> = Controller::ALL
            .iter()
            .flat_map(|controller| controller.settings(&limits, true))
            .map(|setting| (setting.file, setting.value))
            .collect();
        let expected = [
            ("memory.max", "4096"),
            ("memory.swap.max", "4096"),
            ("cpu.max", "50000 100000"),
            ("pids.max", "7"),
        ];
        assert_eq!(written, expected.map(|(file, value)| (file, value.to_owned())));
        assert!(Controller::ALL.iter().all(|one| one.settings(&Limits::default(), true).is_empty()));
    }
}
