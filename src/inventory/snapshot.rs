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

/// Seconds and nanoseconds of a file's last change; `None` if there is no such file.
pub type Mtime = Option<(i64, i64)>;

/// Where root's own gpurun keeps its state; everyone may read the snapshot there.
pub const SYSTEM_STATE_DIR: &str = "/run/gpurun";
/// The largest snapshot that is read. Eight GPUs and a full driver have 40 kB.
const LIMIT: u64 = 8 << 20;
/// How long a snapshot with a lost GPU is believed: nothing that stat sees changes when it comes back.
const LOST_FOR: Duration = Duration::from_secs(60);

/// The inventory from a snapshot if one is true still, else what `read` reads, recorded in `state_dir`.
///
/// # Errors
/// Those of `read`; a snapshot that cannot be used or written is none.
pub fn current(host: &Host, state_dir: &Path, read: impl FnOnce() -> Result<Inventory>) -> Result<Inventory> {
    let name = file_name(host);
    let systems = (!geteuid().is_root()).then_some(Path::new(SYSTEM_STATE_DIR));
    for dir in systems.into_iter().chain([state_dir]) {
        match load(host, dir, &name) {
            Ok(inventory) => return Ok(inventory),
            Err(why) => tracing::debug!(dir = %dir.display(), "no snapshot is used: {why}"),
        }
    }
    anew(host, state_dir, read)
}

/// What `read` reads, recorded in `state_dir`.
///
/// # Errors
/// Those of `read`; a snapshot that cannot be written is none.
pub fn anew(host: &Host, state_dir: &Path, read: impl FnOnce() -> Result<Inventory>) -> Result<Inventory> {
    let inventory = read()?;
    if let Err(error) = store(&inventory, state_dir, &file_name(host)) {
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

/// Whether it belongs to root or this user, and no other user may write to it.
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

/// Identity of the object at a path: device, inode and ctime.
pub fn object(path: &Path) -> Option<(u64, u64, i64, i64)> {
    let stat = rustix::fs::lstat(path).ok()?;
    Some((stat.st_dev, stat.st_ino, stat.st_ctime, i64::try_from(stat.st_ctime_nsec).ok()?))
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
            objects: [].into(),
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
        if let Some((path, _)) = self.objects.iter().find(|(path, then)| object(path) != **then) {
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

/// The numbers of a character device; `None` for anything else.
pub fn numbers(path: &Path) -> Option<(u32, u32)> {
    let stat = rustix::fs::stat(path).ok()?;
    (FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
        .then(|| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::tests::SmallHost;
    use std::{
        cell::Cell,
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    /// Whether `current` had to read the host.
    fn reads(small: &SmallHost, state_dir: &Path) -> bool {
        let read = Cell::new(false);
        let inventory = current(&small.host, state_dir, || {
            read.set(true);
            small.read()
        })
        .unwrap();
        assert_eq!(inventory.driver.version.as_str(), "550.163.01");
        read.get()
    }

    fn snapshot(small: &SmallHost, state_dir: &Path) -> PathBuf {
        state_dir.join(file_name(&small.host))
    }

    #[test]
    fn a_snapshot_serves_until_one_of_the_facts_below_it_changes() {
        let small = SmallHost::new();
        let state = small.path("state/deep");
        assert!(reads(&small, &state));
        let first = current(&small.host, &state, || unreachable!()).unwrap();
        assert_eq!(first.to_json(), small.read().unwrap().to_json());
        let file = snapshot(&small, &state);
        assert_eq!(
            fs::metadata(&file).unwrap().mode() & 0o777,
            if geteuid().is_root() { 0o644 } else { 0o600 }
        );
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "the temporary file is gone");

        let changes: &[(&str, &dyn Fn())] = &[
            ("boot", &|| small.write("proc/sys/kernel/random/boot_id", "another")),
            ("majors", &|| small.write("proc/devices", "Character devices:\n195 nvidia\n511 nvidia-uvm\n")),
            ("a MIG instance", &|| {
                small.write("proc/driver/nvidia/capabilities/gpu0/mig/gi7/ci0/access", "");
            }),
            ("the instance made anew", &|| {
                let dir = small.path("proc/driver/nvidia/capabilities/gpu0/mig/gi7");
                // Kept, so that the new one cannot have its inode.
                fs::rename(dir.join("ci0"), small.path("old")).unwrap();
                fs::create_dir(dir.join("ci0")).unwrap();
            }),
            ("a GPU", &|| small.write("proc/driver/nvidia/gpus/0000:0f:00.0/information", "")),
            ("a library", &|| small.write("driver/usr/lib64/libother.so", "")),
            ("a socket", &|| small.write("driver/run/nvidia-persistenced/socket", "")),
            ("a node that was missing", &|| symlink("/dev/null", small.path("dev/nvidia-modeset")).unwrap()),
            ("a node's numbers", &|| {
                fs::remove_file(small.path("dev/nvidia0")).unwrap();
                symlink("/dev/zero", small.path("dev/nvidia0")).unwrap();
            }),
        ];
        for (what, change) in changes {
            assert!(!reads(&small, &state), "before {what}");
            change();
            assert!(reads(&small, &state), "{what}");
        }
        small.write("sys/module/nvidia/version", "535.216.03");
        assert_eq!(current(&small.host, &state, || small.read()).unwrap_err().code(), Code::VersionMismatch);
    }

    #[test]
    fn what_others_could_have_written_is_not_believed() {
        let small = SmallHost::new();
        let state = small.path("state");
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        assert!(reads(&small, &state));
        let file = snapshot(&small, &state);
        // A directory that is not trusted is not written to either, so each case starts from the good file.
        for (path, bad) in [(&file, 0o664), (&file, 0o646), (&state, 0o775), (&state, 0o777)] {
            let good = fs::metadata(path).unwrap().mode();
            mode(path, bad);
            assert!(reads(&small, &state), "{} with mode {bad:o}", path.display());
            mode(path, good & 0o7777);
            assert!(!reads(&small, &state));
        }
        let elsewhere = small.path("elsewhere.json");
        fs::rename(&file, &elsewhere).unwrap();
        symlink(&elsewhere, &file).unwrap();
        assert!(reads(&small, &state), "a link");
        assert!(fs::symlink_metadata(&file).unwrap().is_file(), "the link is replaced");
        let link = small.path("link");
        symlink(&state, &link).unwrap();
        assert!(reads(&small, &link), "a directory reached through a link");
        fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(reads(&small, &state), "a FIFO does not block");
        for garbage in ["", "{}", "null"] {
            fs::write(&file, garbage).unwrap();
            assert!(reads(&small, &state), "{garbage:?}");
        }
        if geteuid().is_root() {
            for path in [&file, &state] {
                rustix::fs::chown(path, Some(rustix::fs::Uid::from_raw(1234)), None).unwrap();
                assert!(reads(&small, &state), "{} of another user", path.display());
                rustix::fs::chown(path, Some(rustix::fs::Uid::ROOT), None).unwrap();
            }
        }
    }

    #[test]
    fn a_snapshot_that_cannot_be_written_is_no_failure() {
        let small = SmallHost::new();
        assert!(reads(&small, Path::new("/proc/nowhere")));
        assert!(reads(&small, Path::new("/dev/null")));
    }

    #[test]
    fn a_lost_gpu_is_believed_for_a_minute_only() {
        let small = SmallHost::new();
        let state = small.path("state");
        small.reader(r#"{"driver_version":"550.163.01","cuda_version":12040,"gpus":[{"lost":{"index":0,"words":"gone"}}]}"#);
        assert!(reads(&small, &state));
        assert!(!reads(&small, &state));
        let file = File::options().write(true).open(snapshot(&small, &state)).unwrap();
        file.set_modified(SystemTime::now() - LOST_FOR - Duration::from_secs(2)).unwrap();
        assert!(reads(&small, &state));
    }

    #[test]
    fn hosts_do_not_share_a_snapshot() {
        let (one, other) = (SmallHost::new(), SmallHost::new());
        let state = one.path("state");
        assert!(reads(&one, &state));
        assert!(reads(&other, &state));
        assert!(!reads(&one, &state) && !reads(&other, &state));
    }
}
