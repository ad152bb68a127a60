//! The inventory as it was last read, and whether it is still true. Reading NVML takes from 10 ms to a minute; a start that
//! finds a snapshot takes a file and a handful of stats instead.

use super::{
    procfs,
    types::{Fingerprint, Host, Inventory},
};
use crate::error::{Code, Error, OrFail, Result};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat},
    process::geteuid,
};
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    fs::File,
    io::{Read, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Seconds and nanoseconds of a file's last change; `None` where there is no such file.
pub type Mtime = Option<(i64, i64)>;

/// Where root's own gpurun keeps its state; everyone may read the snapshot there.
pub const SYSTEM_STATE_DIR: &str = "/run/gpurun";
/// The largest snapshot that is read. Eight GPUs and a full driver have 40 kB.
const LIMIT: u64 = 8 << 20;
/// How long a snapshot with a lost GPU is believed: nothing that stat sees changes when it comes back.
const LOST_FOR: Duration = Duration::from_secs(60);

/// The inventory from a snapshot if one is true still, else read afresh and recorded in `state_dir`.
///
/// # Errors
/// Those of [`Inventory::read`]; a snapshot that cannot be used or written is none.
pub fn current(host: &Host, state_dir: &Path) -> Result<Inventory> {
    let name = file_name(host);
    let systems = (!geteuid().is_root()).then_some(Path::new(SYSTEM_STATE_DIR));
    for dir in systems.into_iter().chain([state_dir]) {
        match load(host, dir, &name) {
            Ok(inventory) => return Ok(inventory),
            Err(why) => tracing::debug!(dir = %dir.display(), "no snapshot is used: {why}"),
        }
    }
    let inventory = Inventory::read(host)?;
    if let Err(error) = store(&inventory, state_dir, &name) {
        tracing::debug!("the inventory's snapshot cannot be written: {error}");
    }
    Ok(inventory)
}

/// A snapshot is about one set of roots.
fn file_name(host: &Host) -> String {
    let mut hash = Sha256::new();
    for root in [&host.driver_root.0, &host.dev_root, &host.proc, &host.sys] {
        hash.update(root.as_os_str().as_bytes());
        hash.update([0]);
    }
    let mut name = String::from("inventory-");
    for byte in hash.finalize().iter().take(8) {
        let _ = write!(name, "{byte:02x}");
    }
    name + ".json"
}

/// Reads a snapshot that is ours or root's and true still.
fn load(host: &Host, dir: &Path, name: &str) -> Result<Inventory> {
    let dir = open_dir(dir)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::openat(&dir, name, flags, Mode::empty())
        .or_fail(Code::Inventory, || format!("{name} cannot be opened"))?;
    let stat = trusted(&file, FileType::RegularFile)?;
    let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size).unwrap_or(0).min(1 << 20));
    File::from(file)
        .take(LIMIT)
        .read_to_end(&mut bytes)
        .or_fail(Code::Inventory, || format!("{name} cannot be read"))?;
    let inventory = Inventory::from_json(&bytes)?;
    if let Some(changed) = inventory.fingerprint.change(host) {
        return Err(Error::new(Code::Inventory, format!("{changed} changed since it was written")));
    }
    let lost = Code::GpuLost.to_string();
    if inventory.problems.iter().any(|problem| problem.code == lost) && age(&stat) > LOST_FOR {
        return Err(Error::new(Code::Inventory, "a GPU was lost when it was written"));
    }
    Ok(inventory)
}

/// Writes the snapshot beside its place and renames it there: a reader sees the old one or the new one.
fn store(inventory: &Inventory, dir: &Path, name: &str) -> Result<()> {
    let root = geteuid().is_root();
    // Facts about the host are no secret; what root knows saves every user the reading.
    let (dir_mode, file_mode) = if root { (0o755, 0o644) } else { (0o700, 0o600) };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(dir_mode)
        .create(dir)
        .or_fail(Code::Inventory, || format!("{} cannot be made", dir.display()))?;
    let dir = open_dir(dir)?;
    let temporary = format!("{name}.{}", std::process::id());
    let written = (|| {
        // Left behind by a process with our number that was killed.
        let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&dir, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(&inventory.to_json())?;
        // After the umask.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(file_mode))?;
        rustix::fs::renameat(&dir, &temporary, &dir, name)?;
        Ok::<_, std::io::Error>(())
    })();
    if written.is_err() {
        let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
    }
    written.or_fail(Code::Inventory, || format!("{name} cannot be written"))
}

fn open_dir(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty())
        .or_fail(Code::Inventory, || format!("{} cannot be opened", dir.display()))?;
    trusted(&fd, FileType::Directory)?;
    Ok(fd)
}

/// Root's or our own, and nobody else may write to it.
fn trusted(fd: impl AsFd, kind: FileType) -> Result<Stat> {
    let stat = rustix::fs::fstat(fd).or_fail(Code::Inventory, || "fstat")?;
    let ours = stat.st_uid == 0 || stat.st_uid == geteuid().as_raw();
    if FileType::from_raw_mode(stat.st_mode) == kind && ours && stat.st_mode & 0o022 == 0 {
        Ok(stat)
    } else {
        Err(Error::new(
            Code::Inventory,
            format!("a {kind:?} of user {} with mode {:o} is not trusted", stat.st_uid, stat.st_mode),
        ))
    }
}

fn age(stat: &Stat) -> Duration {
    let written = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
    // A clock that was set back makes it old, not young.
    written.elapsed().unwrap_or(Duration::MAX)
}

/// When a file changed last.
pub fn mtime(path: &Path) -> Mtime {
    let stat = rustix::fs::stat(path).ok()?;
    Some((stat.st_mtime, i64::try_from(stat.st_mtime_nsec).ok()?))
}

impl Fingerprint {
    /// What the kernel tells now. Files and nodes are added as they are looked at.
    pub fn of_kernel(host: &Host) -> Self {
        Self {
            writer: env!("CARGO_PKG_VERSION").into(),
            boot_id: boot_id(host),
            module_version: module_version(host),
            device_majors: device_majors(host),
            pci_gpus: procfs::names(&procfs::gpus_dir(&host.proc)),
            mig_layout: mig_layout(host),
            mtimes: [].into(),
            nodes: [].into(),
        }
    }

    /// The first thing that is not what it was, cheapest look first.
    pub fn change(&self, host: &Host) -> Option<String> {
        let kernel = [
            ("gpurun's version", self.writer == env!("CARGO_PKG_VERSION")),
            ("the boot id", self.boot_id == boot_id(host)),
            ("the kernel module's version", self.module_version == module_version(host)),
        ];
        if let Some((name, _)) = kernel.iter().find(|(_, same)| !same) {
            return Some((*name).into());
        }
        if let Some((path, _)) = self.mtimes.iter().find(|(path, then)| mtime(path) != **then) {
            return Some(path.display().to_string());
        }
        if let Some((path, _)) = self.nodes.iter().find(|(path, then)| numbers(path) != **then) {
            return Some(path.display().to_string());
        }
        if self.device_majors != device_majors(host) {
            return Some("/proc/devices".into());
        }
        if self.pci_gpus != procfs::names(&procfs::gpus_dir(&host.proc)) {
            return Some("the set of GPUs".into());
        }
        (self.mig_layout != mig_layout(host)).then(|| "the MIG layout".into())
    }
}

fn boot_id(host: &Host) -> String {
    procfs::read(&host.proc.join("sys/kernel/random/boot_id")).unwrap_or_default()
}

fn module_version(host: &Host) -> String {
    procfs::read(&host.sys.join("module/nvidia/version")).unwrap_or_default()
}

fn device_majors(host: &Host) -> String {
    let text = procfs::read(&host.proc.join("devices")).unwrap_or_default();
    let lines: Vec<_> = procfs::device_majors(&text).map(|(major, name)| format!("{major} {name}")).collect();
    lines.join("\n")
}

/// gpuM/mig, gpuM/mig/giG and gpuM/mig/giG/ciC below /proc/driver/nvidia/capabilities, with inode numbers.
fn mig_layout(host: &Host) -> Vec<String> {
    let capabilities = host.proc.join("driver/nvidia/capabilities");
    let mut layout = Vec::new();
    for gpu in procfs::names(&capabilities).iter().filter(|name| name.starts_with("gpu")) {
        let mig = PathBuf::from(gpu).join("mig");
        for (gi, inode) in children(&capabilities, &mig, "gi") {
            layout.push(format!("{}:{inode}", gi.display()));
            for (ci, inode) in children(&capabilities, &gi, "ci") {
                layout.push(format!("{}:{inode}", ci.display()));
            }
        }
    }
    layout
}

fn children(base: &Path, dir: &Path, prefix: &str) -> Vec<(PathBuf, u64)> {
    use std::os::unix::fs::DirEntryExt;
    let Ok(entries) = std::fs::read_dir(base.join(dir)) else { return Vec::new() };
    let mut children: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().starts_with(prefix.as_bytes()))
        .map(|entry| (dir.join(entry.file_name()), entry.ino()))
        .collect();
    children.sort_unstable();
    children
}

fn numbers(path: &Path) -> Option<(u32, u32)> {
    let stat = rustix::fs::stat(path).ok()?;
    (FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
        .then(|| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}
