//! The container's cgroup: resource limits, device rules, and one handle by which everything in it can be killed.
//!
//! Wherever a cgroup v2 hierarchy is mounted the container has a directory there, because its first process can be born
//! in it (CLONE_INTO_CGROUP) and because device rules need nothing else. A v1 hierarchy is joined only for a limit that
//! was asked for and that v2 does not serve: each join takes a lock of the whole machine and can last 10 ms.
//!
//! A directory is `gpurun/ID` below the highest cgroup, from the hierarchy's root down to our own, that we may write:
//! for root the hierarchy's root, as Docker's `cgroupfs` driver has it; for a user what systemd delegated to him.

mod limits;

pub use limits::{CpuQuota, Limits, Swap};

use crate::{
    error::{Code, Error, OrFail, Result},
    sys::bpf::{DeviceKind, DeviceRule, restrict_devices},
};
use limits::{Controller, Setting};
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
const LEGACY: [&str; 6] = ["memory", "cpu", "cpuset", "blkio", "pids", "devices"];

/// Where the v1 hierarchy of a controller is mounted.
pub fn legacy_mount(controller: &str) -> Option<PathBuf> {
    Some(Path::new(MOUNTS).join(controller)).filter(|path| is_mounted(path, CGROUP_SUPER_MAGIC))
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
    /// Makes the container's cgroup with these limits. `None` if nothing was asked for and there is no cgroup that we may
    /// write, as for most ordinary users; where [`Cgroup::restrict`] is to follow there is always one.
    ///
    /// # Errors
    /// [`Code::Limit`] if a limit cannot be honoured, [`Code::Cgroup`] if the cgroup cannot be made. Nothing is left
    /// behind then.
    pub fn create(id: &str, limits: &Limits, restricted: bool) -> Result<Option<Self>> {
        let directory = directory(id)?;
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
        left.retain(|controller| controller.is_limited(limits));

        let parent = limits.parent.as_deref();
        let start = |mount: &Path, controller: Option<&str>| match parent {
            None => Ok(own.highest_writable(mount, controller)),
            Some(parent) => below(mount, parent).map(Some),
        };
        let start_of = |controller: &str| match legacy_mount(controller) {
            Some(mount) => start(&mount, Some(controller)),
            None => Ok(None),
        };
        let start = match self.layout.unified() {
            Some(mount) => start(&mount, None)?,
            None => None,
        };
        if let Some(start) = &start {
            let offered = read(&start.join("cgroup.controllers"));
            let (here, elsewhere): (Vec<_>, Vec<_>) = left
                .into_iter()
                .partition(|one| offered.split_whitespace().any(|name| name == one.name(true)));
            left = elsewhere;
            self.fill_unified(start, directory, &here, limits)?;
        }
        for controller in left {
            let settings = controller.settings(limits, false);
            if settings.is_empty() {
                tracing::warn!(
                    "{} has no effect: the cgroups of this host are of version 1",
                    controller.options(limits)
                );
                continue;
            }
            let start = start_of(controller.name(false))?
                .ok_or_else(|| not_delegated(controller, limits, start.as_deref()))?;
            let path = start.join(directory);
            fs::create_dir_all(&path)
                .map_err(|error| controller.failed(limits, format!("mkdir {}: {error}", path.display())))?;
            self.legacy.push(path.clone());
            if controller == Controller::Cpuset {
                inherit_processors(&start.join(DIRECTORY))
                    .and_then(|()| inherit_processors(&path))
                    .map_err(|error| controller.failed(limits, error))?;
            }
            set(&path, controller, limits, &settings)?;
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
        enable(start, controllers, limits)?;
        enable(&start.join(DIRECTORY), controllers, limits)?;
        for controller in controllers {
            let settings = controller.settings(limits, true);
            if settings.is_empty() {
                tracing::warn!(
                    "{} has no effect: the cgroups of this host are of version 2",
                    controller.options(limits)
                );
            }
            set(&path, *controller, limits, &settings)?;
        }
        Ok(())
    }

    /// Opens the cgroup to the devices of `rules` alone. Until then it is open to all, so nothing of the container's may run:
    /// the kernel checks the program while the container's root is being made.
    ///
    /// # Errors
    /// [`Code::Cgroup`] if the rules cannot be made.
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

    /// Puts this process into the container's cgroup, so that the kernel memory which it allocates for the container counts there.
    pub fn enter(&self) -> io::Result<()> {
        let unified = self.unified.iter().map(|(path, _)| path);
        unified.chain(&self.legacy).try_for_each(|path| write(&path.join("cgroup.procs"), "0"))
    }

    /// The directory in cgroup v2.
    pub fn unified_path(&self) -> Option<PathBuf> {
        self.unified.as_ref().map(|(path, _)| path.clone())
    }

    /// Kills all processes of a cgroup v2 and of those below it.
    pub fn kill(path: &Path) {
        kill(path);
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
    ///
    /// `parent` is the cgroup of `--cgroup-parent`.
    pub fn remove_stale(id: &str, parent: Option<&Path>) -> Result<()> {
        let directory = directory(id)?;
        let own = Place::read();
        let unified = Layout::current().unified().map(|mount| (mount, None));
        let legacy = LEGACY.iter().filter_map(|&name| Some((legacy_mount(name)?, Some(name))));
        for (mount, controller) in unified.into_iter().chain(legacy) {
            let start = match parent {
                None => own.highest_writable(&mount, controller),
                Some(parent) => Some(mount.join(parent)),
            };
            if let Some(start) = start {
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

fn not_delegated(controller: Controller, limits: &Limits, start: Option<&Path>) -> Error {
    let name = controller.name(start.is_some());
    let error = match start {
        Some(start) => controller
            .failed(limits, format!("the cgroup {} does not offer the {name} controller", start.display())),
        None => controller
            .failed(limits, format!("there is no cgroup with the {name} controller that gpurun may write")),
    };
    let option = controller.options(limits);
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
fn enable(path: &Path, controllers: &[Controller], limits: &Limits) -> Result<()> {
    let control = path.join("cgroup.subtree_control");
    let already = read(&control);
    let missing: Vec<_> = controllers
        .iter()
        .filter(|one| !already.split_whitespace().any(|name| name == one.name(true)))
        .map(|one| format!("+{}", one.name(true)))
        .collect();
    let Some(first) = controllers.first().filter(|_| !missing.is_empty()) else {
        return Ok(());
    };
    let failed = |error| first.failed(limits, format!("write {missing:?} to {}: {error}", control.display()));
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

fn set(path: &Path, controller: Controller, limits: &Limits, settings: &[Setting]) -> Result<()> {
    for Setting { file, value, option, may_be_absent } in settings {
        match write(&path.join(file), value) {
            Err(error) if *may_be_absent && error.kind() == io::ErrorKind::NotFound => {
                if let Some(option) = option {
                    tracing::warn!("{option} has no effect: this kernel has no {file}");
                }
            }
            Err(error) => {
                let failed = controller
                    .failed(limits, format!("write {value} to {}: {error}", path.join(file).display()));
                return Err(match available(path, file) {
                    Some(list) => failed.fix(format!(
                        "ask for some of those that are available here: --{} {list}",
                        file.replace('.', "-")
                    )),
                    None => failed,
                });
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// The processors or memory nodes that a cgroup may ask for, for a file that lists them.
fn available(path: &Path, file: &str) -> Option<String> {
    let online = match file {
        "cpuset.cpus" => "/sys/devices/system/cpu/online",
        "cpuset.mems" => "/sys/devices/system/node/online",
        _ => return None,
    };
    let parent = path.parent()?;
    [parent.join(format!("{file}.effective")), parent.join(file), PathBuf::from(online)]
        .iter()
        .map(|source| read(source).trim().to_owned())
        .find(|list| !list.is_empty())
}

/// Makes `parent` in a hierarchy, and gives the controllers of v2 to everything on the way. A slice's name holds those above it
/// (systemd.slice(5)): `a-b.slice` is `a.slice/a-b.slice`.
fn below(mount: &Path, parent: &Path) -> Result<PathBuf> {
    let path = mount.join(parent);
    fs::create_dir_all(&path).map_err(|error| {
        Error::new(Code::Cgroup, format!("the cgroup {} of --cgroup-parent cannot be made", path.display()))
            .cause(error)
            .fix("name a cgroup below which gpurun may make others, or leave --cgroup-parent out")
    })?;
    if is_mounted(mount, CGROUP2_SUPER_MAGIC) {
        let mut at = mount.to_owned();
        for part in parent {
            let offered = read(&at.join("cgroup.controllers"));
            for controller in offered.split_whitespace() {
                // Missing controllers are reported when their limits are set.
                let _ = write(&at.join("cgroup.subtree_control"), &format!("+{controller}"));
            }
            at.push(part);
        }
    }
    Ok(path)
}

/// Copies processors and memory nodes from the parent. A new cpuset cgroup of v1 is empty, and no process can join it until
/// it has both (cgroup-v1/cpusets.rst).
fn inherit_processors(path: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, parent) = (path.join(file), path.join("..").join(file));
        if fs::read_to_string(&own)?.trim().is_empty() {
            write(&own, fs::read_to_string(parent)?.trim())?;
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
mod tests;
