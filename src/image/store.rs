//! The store: unpacked layers and the small files that say which image is made of which.
//!
//! ```text
//! layers/HEX   a layer's directory, named by the first half of its diff_id; there means whole and checked
//! blobs/HEX    a configuration file, named by its digest and checked against it whenever it is read
//! images/HEX   what an image's name stood for when it was last opened; HEX is the name's digest, its time the last use
//! parts/HEX    what came of a layer's blob before the network failed or a pull was killed; HEX is the blob's digest
//! tmp/NAME     whatever is not finished; locked (flock) as long as somebody works on it
//! ```

use super::{Digest, layer::Layer, layout::Version, tree, unpack::Ownership};
use crate::error::{Code, Error, OrFail, Result};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        AtFlags, Dir, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, flock,
        fstat, fstatvfs, mkdirat, openat, renameat, statat, syncfs, unlinkat,
    },
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::CString,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// The most that a file of `images` or `blobs` holds; the documents that they come from are bounded alike.
const MAX_FILE: u64 = 8 << 20;
/// Digits of a diff_id that name a layer's directory. 128 bits cannot be forged, and overlayfs takes the names of all
/// lower directories in one page of mount options where the kernel is older than 6.5.
const SHORT: usize = 32;

/// Where images are kept.
#[derive(Debug)]
pub struct Store {
    directory: OwnedFd,
    path: PathBuf,
    /// What all layers may take on the disk, in bytes.
    quota: Option<u64>,
}

/// What an image's name stood for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The name, with its path made absolute.
    pub name: String,
    /// The configuration file's digest: the image's identity.
    pub id: Digest,
    /// Which version of the image that was; `None` where its file had only just been written, and of a registry's.
    pub stamp: Option<Version>,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// What [`Store::prune`] did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pruned {
    /// So many layers are gone.
    pub removed: usize,
    /// So many are not, because containers run on them.
    pub in_use: usize,
    /// So many bytes of the disk are free again.
    pub freed: u64,
}

/// An image that was opened before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// As it was opened.
    pub name: String,
    /// The configuration file's digest.
    pub id: Digest,
    /// Of its layers as they were delivered, in bytes.
    pub size: u64,
    /// Of those that other images have, too.
    pub shared: u64,
    /// Its layers, lowest first.
    pub layers: Vec<Digest>,
    /// When it was opened last.
    pub last_used: SystemTime,
}

fn failed(what: &str, cause: impl std::fmt::Display) -> Error {
    Error::new(Code::Store, format!("the image store cannot be used: {what}")).cause(cause)
}

fn full() -> Error {
    Error::new(Code::NoSpace, "the image store's filesystem is full")
        .fix("make room on it, or name a directory on another filesystem in GPURUN_STORE")
}

impl Store {
    /// Opens a store, makes it where there is none, and clears away what a killed process left.
    ///
    /// The directory is the caller's own and closed to others: layers hold set-user-ID programs of any age, which
    /// nobody may run outside a container.
    ///
    /// # Errors
    /// [`Code::Store`] where the directory cannot be made, is somebody else's, or can be written by others.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = std::path::absolute(directory).map_err(|error| failed("its name is no path", error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = || openat(rustix::fs::CWD, &path, flags, Mode::empty());
        let opened = match open() {
            Err(Errno::NOENT) => {
                use std::os::unix::fs::DirBuilderExt;
                let mut builder = std::fs::DirBuilder::new();
                builder.recursive(true).mode(0o700).create(&path).map_err(|error| {
                    failed(&format!("{} cannot be made", path.display()), error)
                        .fix("name a directory that you may write in GPURUN_STORE")
                })?;
                open()
            }
            done => done,
        };
        let fd = opened.map_err(|errno| {
            failed(&format!("{} cannot be opened", path.display()), errno)
                .fix("name a directory of your own in GPURUN_STORE")
        })?;
        let stat = fstat(&fd).map_err(|errno| failed("fstat", errno))?;
        let (owner, me) = (stat.st_uid, rustix::process::geteuid().as_raw());
        if owner != me {
            return Err(Error::new(
                Code::Store,
                format!("the image store {} belongs to user {owner}, not to {me}", path.display()),
            )
            .cause("what somebody else can change must not become a container's root")
            .fix("name a directory of your own in GPURUN_STORE"));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(Error::new(
                Code::Store,
                format!("the image store {} can be written by others", path.display()),
            )
            .cause(format!("its mode is {:o}", stat.st_mode & 0o7777))
            .fix(format!("chmod 700 {}", path.display())));
        }
        let store = Self { directory: fd, path, quota: None };
        store.clean()?;
        Ok(store)
    }

    /// The same with a bound on what its layers take on the disk, in bytes.
    #[must_use]
    pub fn with_quota(self, quota: Option<u64>) -> Self {
        Self { quota, ..self }
    }

    /// What its layers may take on the disk, in bytes.
    pub fn quota(&self) -> Option<u64> {
        self.quota
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a layer's directory is or will be.
    pub fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.path.join("layers").join(short(diff_id))
    }

    /// Whether a layer is there, whole.
    pub fn has_layer(&self, diff_id: &Digest) -> bool {
        self.exists(&format!("layers/{}", short(diff_id)))
    }

    /// Keeps a layer from being removed as long as the result is open; `None` where it is not there.
    pub fn hold_layer(&self, diff_id: &Digest) -> Result<Option<OwnedFd>> {
        let path = format!("layers/{}", short(diff_id));
        let directory = match openat(&self.directory, &path, tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            done => done.map_err(|errno| failed("a layer cannot be opened", errno))?,
        };
        // Who has it alone has only just made it, or is removing it, and then the name is gone.
        rustix::io::retry_on_intr(|| flock(&directory, FlockOperation::LockShared))
            .map_err(|errno| failed("flock", errno))?;
        Ok(self.is(&path, &directory).then_some(directory))
    }

    /// Waits until no other process works on what is called so; until the result is dropped, none will.
    pub fn lock(&self, name: &str) -> Result<OwnedFd> {
        let path = format!("tmp/{}.lock", short(&Digest::of(name.as_bytes())));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let file = openat(&self.directory, &path, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|errno| failed("a lock cannot be made", errno))?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                .map_err(|errno| failed("flock", errno))?;
            // The next start clears it away.
            if self.is(&path, &file) {
                return Ok(file);
            }
        }
    }

    /// Fails where so many bytes do not fit: what is unpacked is seldom smaller than what it came as. A hundredth of the
    /// filesystem stays free, as when layers are written.
    ///
    /// # Errors
    /// [`Code::NoSpace`]
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        let space = fstatvfs(&self.directory).map_err(|errno| failed("fstatvfs", errno))?;
        let free = space.f_bavail.saturating_sub(space.f_blocks / 100).saturating_mul(space.f_frsize);
        if bytes <= free {
            return Ok(());
        }
        let what = format!(
            "the image's layers have {} MB, and there is room for {} MB",
            bytes / 1_000_000,
            free / 1_000_000
        );
        Err(Error::new(Code::NoSpace, what)
            .cause(format!("the image store is {}", self.path.display()))
            .fix("make room (`gpurun images`, `gpurun rmi`), or name a directory on another filesystem in GPURUN_STORE"))
    }

    /// Fails where layers that are not here would pass the quota, by their sizes as they are delivered. Where there is a quota,
    /// nobody else brings layers until the result is dropped: two that come at once might each find room.
    ///
    /// # Errors
    /// [`Code::NoSpace`]
    pub fn reserve<'a>(&self, layers: impl IntoIterator<Item = &'a Layer>) -> Result<Option<OwnedFd>> {
        let Some(quota) = self.quota else { return Ok(None) };
        let lock = self.lock("quota")?;
        let missing = layers.into_iter().filter(|layer| !self.has_layer(&layer.diff_id));
        let wanted = missing.fold(0, |sum: u64, layer| sum.saturating_add(layer.size));
        let used: u64 = self.usage()?.values().sum();
        if wanted == 0 || used.saturating_add(wanted) <= quota {
            return Ok(Some(lock));
        }
        let mb = |bytes: u64| bytes.div_ceil(1_000_000);
        let what = format!(
            "the image's layers have {} MB, and the store's quota leaves {} MB",
            mb(wanted),
            quota.saturating_sub(used) / 1_000_000
        );
        let unused = self.unused()?;
        let fix = match unused.iter().map(|name| self.usage_of(name)).sum::<Result<u64>>()? {
            0 => "remove images that you do without (`gpurun images`, `gpurun rmi`), or raise store-quota in the configuration".into(),
            free => format!("`gpurun prune` frees {} MB; or raise store-quota in the configuration", mb(free)),
        };
        let cause = format!(
            "{} has {} MB of layers, and store-quota is {} MB",
            self.path.display(),
            mb(used),
            quota / 1_000_000
        );
        Err(Error::new(Code::NoSpace, what).cause(cause).fix(fix))
    }

    /// What each layer takes on the disk, in bytes, by its directory's name.
    pub fn usage(&self) -> Result<BTreeMap<String, u64>> {
        let names = self.names("layers")?;
        names.into_iter().map(|name| Ok((name.clone(), self.usage_of(&name)?))).collect()
    }

    /// What an image's layers take on the disk, in bytes, and how much of that other images have, too.
    pub fn usage_of_image(
        &self,
        image: &StoredImage,
        usage: &BTreeMap<String, u64>,
        all: &[StoredImage],
    ) -> (u64, u64) {
        let size = |digest: &&Digest| usage.get(short(digest)).copied().unwrap_or(0);
        let own: HashSet<&Digest> = image.layers.iter().collect();
        let others: HashSet<&Digest> =
            all.iter().filter(|other| other.name != image.name).flat_map(|other| &other.layers).collect();
        (own.iter().map(size).sum(), own.intersection(&others).map(size).sum())
    }

    fn usage_of(&self, layer: &str) -> Result<u64> {
        match tree::usage(&self.directory, &format!("layers/{layer}")) {
            // Removed meanwhile.
            Err(Errno::NOENT) => Ok(0),
            done => done.map_err(|errno| failed("a layer cannot be measured", errno)),
        }
    }

    /// The layers of which no image is made.
    fn unused(&self) -> Result<Vec<String>> {
        // Layers before images: a pull writes the image first, so none of its layers is here without it.
        let mut layers = self.names("layers")?;
        let records = self.records()?;
        let used: HashSet<&str> = records
            .iter()
            .flat_map(|(record, _)| &record.layers)
            .map(|layer| short(&layer.diff_id))
            .collect();
        layers.retain(|layer| !used.contains(layer.as_str()));
        Ok(layers)
    }

    /// Forgets a name; whether it was known. Layers go when [`Store::prune`] comes.
    pub fn forget(&self, name: &str) -> Result<bool> {
        match unlinkat(&self.directory, record_path(name), AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(failed("a record cannot be removed", errno)),
        }
    }

    /// Removes the layers and configurations of which no image is made, but for layers that a container runs on.
    pub fn prune(&self) -> Result<Pruned> {
        let (unused, blobs) = (self.unused()?, self.names("blobs")?);
        let records = self.records()?;
        let configurations: HashSet<&str> = records.iter().map(|(record, _)| record.id.hex()).collect();
        self.remove_old_parts(Duration::ZERO)?;
        let mut pruned = Pruned::default();
        for layer in &unused {
            let size = self.usage_of(layer)?;
            if self.remove_layer(layer)? {
                pruned.removed += 1;
                pruned.freed += size;
            } else {
                pruned.in_use += 1;
            }
        }
        for blob in blobs.iter().filter(|blob| !configurations.contains(blob.as_str())) {
            match unlinkat(&self.directory, format!("blobs/{blob}"), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed("a configuration cannot be removed", errno)),
            }
        }
        Ok(pruned)
    }

    /// Whether it is gone; not, where somebody holds it.
    fn remove_layer(&self, name: &str) -> Result<bool> {
        let fail = |errno| failed("a layer cannot be removed", errno);
        let path = format!("layers/{name}");
        let directory = match openat(&self.directory, &path, tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(true),
            done => done.map_err(fail)?,
        };
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(false),
            done => done.map_err(fail)?,
        }
        // Gone at once: who is killed here leaves no half of a layer where a whole one is looked for.
        let temporary = format!("tmp/{name}.{}", std::process::id());
        match renameat(&self.directory, &path, &self.directory, &temporary) {
            Err(Errno::NOENT) => return Ok(true),
            done => done.map_err(fail)?,
        }
        tree::remove(&self.directory, &c_string(&temporary)?).map_err(fail)?;
        Ok(true)
    }

    /// Where a blob's bytes are kept until its layer is there; nobody else has it as long as the result is open.
    pub fn parts(&self, blob: &Digest) -> Result<OwnedFd> {
        let path = format!("parts/{}", short(blob));
        loop {
            for path in ["parts", &path] {
                match mkdirat(&self.directory, path, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(failed("a directory cannot be made", errno)),
                }
            }
            let directory = match openat(&self.directory, &path, tree::DIRECTORY, Mode::empty()) {
                Err(Errno::NOENT) => continue,
                done => done.map_err(|errno| failed("a directory cannot be opened", errno))?,
            };
            rustix::io::retry_on_intr(|| flock(&directory, FlockOperation::LockExclusive))
                .map_err(|errno| failed("flock", errno))?;
            if self.is(&path, &directory) {
                return Ok(directory);
            }
        }
    }

    /// Removes them, but where somebody works on them.
    pub fn remove_parts(&self, blob: &Digest) -> Result<()> {
        self.remove_unused(&format!("parts/{}", short(blob)), Duration::ZERO)
    }

    /// Removes those of every blob that nothing came of for so long.
    pub fn remove_old_parts(&self, age: Duration) -> Result<()> {
        if self.exists("parts") {
            for name in self.names("parts")? {
                self.remove_unused(&format!("parts/{name}"), age)?;
            }
        }
        Ok(())
    }

    fn remove_unused(&self, path: &str, age: Duration) -> Result<()> {
        let fail = |errno| failed("a part of a layer cannot be removed", errno);
        let directory = match openat(&self.directory, path, tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            done => done.map_err(fail)?,
        };
        let changed = fstat(&directory).map_err(fail)?.st_mtime;
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(changed).unwrap_or(0));
        let free = || flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok();
        if changed.elapsed().unwrap_or_default() < age || !free() || !self.is(path, &directory) {
            return Ok(());
        }
        tree::remove(&self.directory, &c_string(path)?).map_err(fail)
    }

    /// What is wrong with an image: its configuration is read and checked against its digest, the layers' names against
    /// the configuration, and each layer must be there. The files in a layer were checked when they were unpacked, and bear
    /// no digest of their own.
    pub fn verify(&self, name: &str) -> Vec<String> {
        let Some(record) = self.record_of(name) else { return vec!["its record cannot be read".into()] };
        let Some(config) = self.blob(&record.id) else {
            return vec![format!("its configuration {} is missing or damaged", record.id)];
        };
        let mut wrong = Vec::new();
        match super::manifest::diff_ids(&config) {
            Err(error) => wrong.push(error.what().to_owned()),
            Ok(ids) if !ids.iter().eq(record.layers.iter().map(|layer| &layer.diff_id)) => {
                wrong.push("its layers are not those of its configuration".into());
            }
            Ok(_) => {}
        }
        for layer in record.layers.iter().filter(|layer| !self.has_layer(&layer.diff_id)) {
            wrong.push(format!("its layer {} is not there", layer.diff_id));
        }
        wrong
    }

    /// Makes a layer's directory with what `fill` puts into it; nothing, if it is there already. Another process that
    /// makes the same one is waited for. `fill` checks what it writes before it returns.
    pub fn add_layer(&self, diff_id: &Digest, fill: impl FnOnce(BorrowedFd<'_>) -> Result<()>) -> Result<()> {
        let name = short(diff_id);
        let temporary = format!("tmp/{name}");
        let fail = |what: &'static str| move |errno: Errno| failed(what, errno);
        let lock = loop {
            match mkdirat(&self.directory, &temporary, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed("a directory cannot be made", errno)),
            }
            let directory = match openat(&self.directory, &temporary, tree::DIRECTORY, Mode::empty()) {
                // Finished or cleared away by somebody else meanwhile.
                Err(Errno::NOENT) => continue,
                done => done.map_err(fail("a directory cannot be opened"))?,
            };
            rustix::io::retry_on_intr(|| flock(&directory, FlockOperation::LockExclusive))
                .map_err(fail("flock"))?;
            if self.is(&temporary, &directory) {
                break directory;
            }
        };
        if self.has_layer(diff_id) {
            return tree::remove(&self.directory, &c_string(&temporary)?)
                .map_err(fail("a directory cannot be removed"));
        }
        // What a killed process left behind, minus the directory that the lock is on.
        let emptied = || -> Result<(), Errno> {
            for entry in Dir::read_from(&lock)? {
                let entry = entry?;
                if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                    tree::remove(&lock, entry.file_name())?;
                }
            }
            rustix::fs::fchmod(&lock, Mode::from_raw_mode(0o755))
        };
        emptied().map_err(fail("a directory cannot be emptied"))?;
        let made = fill(lock.as_fd()).and_then(|()| {
            // All of it is on the disk before its name says so.
            syncfs(&lock).map_err(fail("syncfs"))?;
            renameat(&self.directory, &temporary, &self.directory, format!("layers/{name}"))
                .map_err(fail("rename"))
        });
        if made.is_err() {
            // The failure to report is the first one; what stays is cleared away by the next start.
            let _ = tree::remove(&self.directory, &c_string(&temporary)?);
        }
        made
    }

    /// A configuration file; `None` where there is none that is whole.
    pub fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = self.read(&format!("blobs/{}", digest.hex())).ok()?;
        digest.matches(&bytes).then_some(bytes)
    }

    /// Keeps a configuration file.
    pub fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        self.replace(&format!("blobs/{}", digest.hex()), bytes)
    }

    /// What a name stood for when it was last opened, and marks it as used now.
    pub fn record(&self, name: &str) -> Option<Record> {
        let path = record_path(name);
        let record = self.record_of(name)?;
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times =
            Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: now };
        // A store on a full or read-only filesystem still serves what it has.
        let _ = rustix::fs::utimensat(&self.directory, path, &times, AtFlags::SYMLINK_NOFOLLOW);
        Some(record)
    }

    fn record_of(&self, name: &str) -> Option<Record> {
        let record: Record = serde_json::from_slice(&self.read(&record_path(name)).ok()?).ok()?;
        (record.name == name).then_some(record)
    }

    /// Keeps what a name stands for.
    pub fn put_record(&self, record: &Record) -> Result<()> {
        let bytes =
            serde_json::to_vec(record).or_fail(Code::Internal, || "an image's record cannot be written")?;
        self.replace(&record_path(&record.name), &bytes)
    }

    /// The images that were opened before, last used first.
    pub fn images(&self) -> Result<Vec<StoredImage>> {
        let records = self.records()?;
        let mut owners: HashMap<&Digest, usize> = HashMap::new();
        for (record, _) in &records {
            let own: HashSet<_> = record.layers.iter().map(|layer| &layer.diff_id).collect();
            for id in own {
                *owners.entry(id).or_default() += 1;
            }
        }
        let total = |layers: &mut dyn Iterator<Item = &Layer>| {
            layers.fold(0, |sum: u64, layer| sum.saturating_add(layer.size))
        };
        let mut found: Vec<StoredImage> = records
            .iter()
            .map(|(record, last_used)| StoredImage {
                size: total(&mut record.layers.iter()),
                shared: total(&mut record.layers.iter().filter(|layer| owners[&layer.diff_id] > 1)),
                layers: record.layers.iter().map(|layer| layer.diff_id.clone()).collect(),
                name: record.name.clone(),
                id: record.id.clone(),
                last_used: *last_used,
            })
            .collect();
        found.sort_by(|a, b| b.last_used.cmp(&a.last_used).then_with(|| a.name.cmp(&b.name)));
        Ok(found)
    }

    /// Every record that can be read, and when it was used last.
    fn records(&self) -> Result<Vec<(Record, SystemTime)>> {
        let mut found = Vec::new();
        for name in self.names("images")? {
            let path = format!("images/{name}");
            let record = self.read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let stat = statat(&self.directory, &path, AtFlags::SYMLINK_NOFOLLOW);
            let (Some(record), Ok(stat)) = (record, stat) else { continue };
            let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
            found.push((record, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)));
        }
        Ok(found)
    }

    fn names(&self, directory: &str) -> Result<Vec<String>> {
        let opened = openat(&self.directory, directory, tree::DIRECTORY, Mode::empty());
        let entries = opened.and_then(Dir::new).map_err(|errno| failed(directory, errno))?;
        let mut names = Vec::new();
        for entry in entries {
            let name =
                entry.map_err(|errno| failed(directory, errno))?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// How layers are written here: root's store keeps the image's owners. In a user namespace even root has no
    /// `trusted.*` attributes (user_namespaces(7)), and overlayfs there is mounted with `userxattr`.
    pub fn ownership() -> Ownership {
        let all_users = || std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_all(&map));
        if rustix::process::geteuid().is_root() && all_users() { Ownership::Image } else { Ownership::Caller }
    }

    /// A file that has no name and goes when it is closed.
    pub fn unnamed_file(&self) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = openat(&self.directory, "tmp", flags, Mode::RUSR | Mode::WUSR);
        file.map(File::from).map_err(|errno| failed("O_TMPFILE", errno))
    }

    /// Writes all of a stream to a file, and stops before the filesystem is full.
    pub fn fill(&self, file: &mut File, stream: &mut dyn Read) -> Result<()> {
        let mut piece = 64 << 20;
        while piece > 0 {
            let space = fstatvfs(&self.directory).map_err(|errno| failed("fstatvfs", errno))?;
            if space.f_bavail < space.f_blocks / 100 {
                return Err(full().cause("less than a hundredth of it is free"));
            }
            piece = io::copy(&mut stream.take(64 << 20), file).map_err(|error| match error.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => full().cause(error),
                _ => Error::new(Code::ImageBroken, "the stream cannot be read or kept").cause(error),
            })?;
        }
        Ok(())
    }

    /// Clears away what nobody works on any more; makes the directories of a new store.
    fn clean(&self) -> Result<()> {
        let temporary = match openat(&self.directory, "tmp", tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => {
                for name in ["layers", "blobs", "images", "tmp"] {
                    match mkdirat(&self.directory, name, Mode::RWXU) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => {
                            return Err(failed(
                                &format!("{} cannot be made", self.path.join(name).display()),
                                errno,
                            ));
                        }
                    }
                }
                return Ok(());
            }
            done => done.map_err(|errno| failed("tmp cannot be opened", errno))?,
        };
        // The last that a new store gets: without the others it is somebody's home, or `/`, and nothing there is ours to remove.
        if ["layers", "blobs", "images"].iter().any(|name| !self.exists(name)) {
            let what = format!("{} has a directory tmp and is no store", self.path.display());
            return Err(Error::new(Code::Store, what).fix("name a directory of its own in GPURUN_STORE"));
        }
        for entry in Dir::read_from(&temporary).map_err(|errno| failed("tmp", errno))? {
            let entry = entry.map_err(|errno| failed("tmp", errno))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(file) = openat(&temporary, name, flags, Mode::empty()) else { continue };
            let path = format!("tmp/{}", name.to_string_lossy());
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() && self.is(&path, &file) {
                // A failure costs room, not correctness: the next start tries again.
                let _ = tree::remove(&temporary, name);
            }
        }
        Ok(())
    }

    fn exists(&self, path: &str) -> bool {
        statat(&self.directory, path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Whether this name still is this file: between opening and locking it, its owner may have finished.
    fn is(&self, path: &str, file: &OwnedFd) -> bool {
        let named = statat(&self.directory, path, AtFlags::SYMLINK_NOFOLLOW);
        match (named, fstat(file)) {
            (Ok(named), Ok(file)) => (named.st_dev, named.st_ino) == (file.st_dev, file.st_ino),
            _ => false,
        }
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let file = openat(
            &self.directory,
            path,
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        // Nearly all of them fit: one call instead of six that ask for ever more.
        let mut bytes = Vec::with_capacity(16 << 10);
        File::from(file).take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Puts a file in place at once: readers see the old one or the new one. Not synced: what a power cut leaves of it is
    /// taken for nothing when it is read.
    fn replace(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let (_, name) = path.rsplit_once('/').unwrap_or_default();
        let temporary = format!("tmp/{name}.{}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fail = |errno| failed(&format!("{path} cannot be written"), errno);
        let mut file = loop {
            let file = openat(&self.directory, &temporary, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive)).map_err(fail)?;
            if self.is(&temporary, &file) {
                break File::from(file);
            }
        };
        file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => full().cause(error),
            _ => failed(&format!("{path} cannot be written"), error),
        })?;
        renameat(&self.directory, &temporary, &self.directory, path).map_err(fail)
    }
}

/// Whether a user namespace's uid_map is the initial one's: every user, each as himself.
fn maps_all(map: &str) -> bool {
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

fn short(diff_id: &Digest) -> &str {
    &diff_id.hex()[..SHORT]
}

fn record_path(name: &str) -> String {
    format!("images/{}", short(&Digest::of(name.as_bytes())))
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).or_fail(Code::Internal, || "a name of the store holds a NUL")
}
