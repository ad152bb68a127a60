//! The store: unpacked layers, and small files that map images to layers.
//!
//! ```text
//! gpurun-store  the marker, see [`marker`]
//! layers/HEX    a layer's directory, named by the first half of its diff_id; if it exists, it is complete and verified
//! notes/HEX     facts that depend on the layers below ([`super::note`]); also marks the layer as made by gpurun
//! stacks/HEX    how layers are stacked ([`super::stack`]); HEX is the digest of their diff_ids
//! blobs/HEX     a configuration file, named by its digest and checked against it whenever it is read
//! images/HEX    configuration and layers of an image's name; HEX is the digest of the name, the mtime is the last use
//! parts/HEX     a partial download of a layer's blob; HEX is the blob's digest
//! scratch/ID    writes of a running container to its root; locked (flock) by its launcher
//! tmp/NAME      unfinished files and layers; locked (flock) by the process that writes them
//! ```
//!
//! Trust boundary: the directory belongs to the caller, no other user may write to it, and it has the marker. It is opened
//! once, and every file is reached from that descriptor. gpurun removes only files that it recognises as its own: a layer has
//! a note, a configuration and a record are named by the digest of their content, and in `scratch`, `parts` and `tmp` an
//! entry has the mark (the sticky bit, see [`marker`]) and a name that gpurun makes.

mod images;
mod layers;
mod marker;

pub use images::{Record, StoredImage};
pub use layers::Pruned;
use layers::is_short_hex;
use marker::MARKED_FILE;
pub use marker::{MARKED_DIRECTORY, is_marked};

use super::{Digest, ScratchDir, layout::Version, reserve::Reserve, tree, unpack::Ownership};
use crate::{
    error::{Code, Error, Result},
    regular_file::{self, look_at},
};
use rustix::{
    fd::OwnedFd,
    fs::{
        AtFlags, Dir, FlockOperation, Mode, OFlags, RenameFlags, flock, fstat, mkdirat, openat, renameat,
        renameat_with, statat,
    },
    io::Errno,
};
use std::{
    ffi::CString,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// The largest file of `images` or `blobs`, in bytes; their source documents have the same bound.
const MAX_FILE: u64 = 8 << 20;
/// Digits of a diff_id that name a layer's directory. 128 bits cannot be forged, and overlayfs takes the names of all
/// lower directories in one page of mount options where the kernel is older than 6.5.
const SHORT: usize = 32;

const LAYERS: &str = "layers";
const NOTES: &str = "notes";
const STACKS: &str = "stacks";
const BLOBS: &str = "blobs";
const IMAGES: &str = "images";
const SCRATCH: &str = "scratch";
const PARTS: &str = "parts";
const TMP: &str = "tmp";

/// A store of images.
#[derive(Debug)]
pub struct Store {
    directory: OwnedFd,
    path: PathBuf,
    /// Quota of all layers on disk, in bytes.
    quota: Option<u64>,
}

fn failed(what: &str, cause: impl std::fmt::Display) -> Error {
    let cause = cause.to_string();
    let is_read_only = cause.contains("Read-only file system");
    let error = Error::new(Code::Store, format!("the image store cannot be used: {what}")).cause(cause);
    if is_read_only {
        return error.fix("name a directory on a file system that can be written in GPURUN_STORE");
    }
    error
}

/// The error for a failure of the store without a specific fix.
fn damaged(what: &str, cause: impl std::fmt::Display) -> Error {
    failed(what, cause)
        .fix("check the filesystem's health and permissions, or name an empty directory in GPURUN_STORE")
}

/// The error for a full filesystem.
pub fn full() -> Error {
    Error::new(Code::NoSpace, "the image store's filesystem is full")
        .fix("make room on it, or name a directory on another filesystem in GPURUN_STORE")
}

impl Store {
    /// Opens a store, and makes one in a directory that is absent or empty.
    ///
    /// Layers hold old set-user-ID programs, which must not run outside a container, so other users have no access to the
    /// directory. Leftovers of killed processes are kept: [`Store::clean`] and the launcher's sweeper remove them, so that no
    /// start waits for that.
    ///
    /// # Errors
    /// [`Code::Store`] if the directory cannot be made, belongs to another user, can be written by others, or is not a store and
    /// not empty.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = std::path::absolute(directory).map_err(|error| {
            failed("its name is not a path", error).fix("name a directory in GPURUN_STORE")
        })?;
        let store = Self { directory: marker::open_directory(&path)?, path, quota: None };
        marker::check(&store)?;
        Ok(store)
    }

    /// Sets the quota, in bytes.
    #[must_use]
    pub fn with_quota(self, quota: Option<u64>) -> Self {
        Self { quota, ..self }
    }

    /// The quota, in bytes.
    pub fn quota(&self) -> Option<u64> {
        self.quota
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Locks `name` until the result is dropped; waits for other processes that hold the lock.
    pub fn lock(&self, name: &str) -> Result<OwnedFd> {
        let path = format!("{TMP}/{}.lock", short(&Digest::of(name.as_bytes())));
        let failed =
            |cause: &dyn std::fmt::Display| damaged(&format!("the lock {path} cannot be used"), cause);
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        loop {
            let file = match openat(&self.directory, &path, flags, MARKED_FILE) {
                Err(Errno::EXIST) => match look_at(&self.directory, &path) {
                    Err(Errno::NOENT) => continue,
                    found => {
                        let (found, _) = found.map_err(|errno| failed(&errno))?;
                        regular_file::open(&found).map_err(|error| failed(&error))?.0.into()
                    }
                },
                made => made.map_err(|errno| failed(&errno))?,
            };
            self.wait_for_lock(&file, FlockOperation::NonBlockingLockExclusive, &path)?;
            // A sweeper may have removed the file meanwhile.
            if self.is(&path, &file) {
                return Ok(file);
            }
        }
    }

    /// Makes a marked directory, or opens the one that exists, and locks it exclusively; waits for other processes that hold the
    /// lock.
    ///
    /// # Errors
    /// [`Code::Store`] if something that gpurun did not make is at the path; it is left unchanged.
    fn locked_directory(&self, path: &str) -> Result<OwnedFd> {
        loop {
            match mkdirat(&self.directory, path, MARKED_DIRECTORY) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(damaged(&format!("{path} cannot be made"), errno)),
            }
            let cannot_open = |errno| damaged(&format!("{path} cannot be opened"), errno);
            let directory = match openat(&self.directory, path, tree::DIRECTORY, Mode::empty()) {
                // Finished or removed by another process meanwhile.
                Err(Errno::NOENT) => continue,
                done => done.map_err(cannot_open)?,
            };
            if !is_marked(&fstat(&directory).map_err(cannot_open)?) {
                let shown = self.path.join(path);
                return Err(Error::new(Code::Store, format!("{} is not gpurun's", shown.display()))
                    .cause("gpurun needs this name, and changes no directory that it did not make")
                    .fix(format!("move it out of the store: mv {} ~", shown.display())));
            }
            self.wait_for_lock(&directory, FlockOperation::NonBlockingLockExclusive, path)?;
            if self.is(path, &directory) {
                return Ok(directory);
            }
        }
    }

    /// Waits for a flock(2) on a file or directory of the store. After a second, a line names it by its `path`. `operation` is one
    /// that does not block.
    fn wait_for_lock(&self, file: &OwnedFd, operation: FlockOperation, path: &str) -> Result<()> {
        let started = Instant::now();
        let mut shown = false;
        loop {
            match flock(file, operation) {
                Ok(()) => return Ok(()),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(errno) => return Err(damaged("flock", errno)),
            }
            if started.elapsed() > Duration::from_secs(1) && !shown {
                shown = true;
                let path = self.path.join(path);
                tracing::warn!(
                    "waiting for another process that holds {} (fuser -v {0} names it)",
                    path.display()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn names(&self, directory: &str) -> Result<Vec<String>> {
        let opened = openat(&self.directory, directory, tree::DIRECTORY, Mode::empty());
        let entries = opened.and_then(Dir::new).map_err(|errno| damaged(directory, errno))?;
        let mut names = Vec::new();
        for entry in entries {
            let name =
                entry.map_err(|errno| damaged(directory, errno))?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// How layers are written: root's store keeps the image's owners. In a user namespace even root has no `trusted.*` attributes
    /// (user_namespaces(7)), and overlayfs there is mounted with `userxattr`.
    pub fn ownership() -> Ownership {
        let all_users = || std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_all(&map));
        if rustix::process::geteuid().is_root() && all_users() { Ownership::Image } else { Ownership::Caller }
    }

    /// An unnamed file, which is removed when it is closed.
    pub fn unnamed_file(&self) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = openat(&self.directory, TMP, flags, Mode::RUSR | Mode::WUSR);
        file.map(File::from).map_err(|errno| {
            failed("its filesystem has no unnamed files (O_TMPFILE)", errno)
                .fix("put the store (GPURUN_STORE) on a local filesystem such as ext4, xfs or btrfs")
        })
    }

    /// Copies a stream to a file without using the reserve of the filesystem.
    pub fn fill(&self, file: &mut File, stream: &mut dyn Read) -> Result<()> {
        let mut file = self.filler(file);
        let mut bytes = vec![0; 256 << 10];
        loop {
            let count = match stream.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Error::new(Code::ImageBroken, "the image's stream cannot be read")
                        .cause(error)
                        .fix("save or download the image again: `docker save -o FILE NAME`, `gpurun pull NAME`"));
                }
            };
            file.write(&bytes[..count])?;
        }
    }

    /// A writer for a file of the store, which does not use the reserve.
    pub fn filler<'a>(&'a self, file: &'a mut File) -> Filler<'a> {
        Filler { store: self, file, reserve: Reserve::default() }
    }

    /// Removes partial files of killed processes. It may take long, so starts do not call it.
    pub fn clean(&self) -> Result<()> {
        clean_tmp(&self.open_tmp()?)
    }

    fn open_tmp(&self) -> Result<OwnedFd> {
        openat(&self.directory, TMP, tree::DIRECTORY, Mode::empty()).map_err(|errno| damaged(TMP, errno))
    }

    /// The directory for the writes of running containers to their roots.
    pub fn scratch(&self) -> Result<ScratchDir> {
        // Absent in a store of version 0.1.0 without containers.
        let open = || openat(&self.directory, SCRATCH, tree::DIRECTORY, Mode::empty());
        let opened = match open() {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&self.directory, SCRATCH, Mode::RWXU).and_then(|()| open())
            }
            done => done,
        };
        let directory = opened.map_err(|errno| damaged(SCRATCH, errno))?;
        Ok(ScratchDir { path: self.path.join(SCRATCH), directory, temporary: self.open_tmp()? })
    }

    fn exists(&self, path: &str) -> bool {
        statat(&self.directory, path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Whether the name still leads to the file: its owner may have finished between open and lock.
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
        // Nearly all of them fit, and then one call is enough: less than was asked for is all that a regular file has.
        let mut bytes = vec![0; 16 << 10];
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut bytes))?;
        let is_whole = count < bytes.len();
        bytes.truncate(count);
        if !is_whole {
            File::from(file).take(MAX_FILE - count as u64).read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    }

    /// Atomically replaces a file; readers see the old or the new content. It is not synced: readers ignore a file that a power
    /// cut has damaged.
    fn replace(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let (_, name) = path.rsplit_once('/').unwrap_or_default();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fail = |errno| damaged(&format!("{path} cannot be written"), errno);
        let (temporary, mut file) = loop {
            let temporary = format!("{TMP}/{}", numbered(name));
            let file = match openat(&self.directory, &temporary, flags, MARKED_FILE) {
                Err(Errno::EXIST) => continue,
                made => made.map_err(fail)?,
            };
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive)).map_err(fail)?;
            if self.is(&temporary, &file) {
                break (temporary, File::from(file));
            }
        };
        file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => full().cause(error),
            _ => damaged(&format!("{path} cannot be written"), error),
        })?;
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)
            .and_then(|()| renameat(&self.directory, &temporary, &self.directory, path))
            .map_err(fail)
    }
}

/// A new name in `tmp` for a file or layer of this name.
fn numbered(name: &str) -> String {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    format!("{name}.{}{:09}", std::process::id(), now.tv_nsec)
}

/// A file of the store that is being written.
pub struct Filler<'a> {
    store: &'a Store,
    file: &'a mut File,
    reserve: Reserve,
}

impl Filler<'_> {
    /// Appends bytes.
    ///
    /// # Errors
    /// [`Code::NoSpace`] if the reserve would be used, [`Code::Store`] if the filesystem fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.reserve.take(&self.store.directory, bytes.len() as u64, 0)?;
        self.file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => full().cause(error),
            _ => damaged("a file cannot be written", error),
        })
    }
}

/// Renames half a layer that a killed process left. Its name is needed for the layer, and removing its content may take minutes.
/// Returns the new name; `None` where the directory is empty or cannot be renamed. `lock` is the locked directory `name`.
fn set_aside(temporary: &OwnedFd, name: &str, lock: &OwnedFd) -> Option<CString> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut entries = Dir::read_from(lock).ok()?.flatten();
    if !is_short_hex(name) || entries.all(|entry| matches!(entry.file_name().to_bytes(), b"." | b"..")) {
        return None;
    }
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let (seconds, next) = (now.tv_sec & 0xffff_ffff, NEXT.fetch_add(1, Ordering::Relaxed));
    let aside = format!("{name}{seconds:08x}{:08x}{:08x}{next:08x}", now.tv_nsec, std::process::id());
    renameat_with(temporary, name, temporary, &aside, RenameFlags::NOREPLACE).ok()?;
    CString::new(aside).ok()
}

/// Removes from a store's `tmp` what no process works on. What cannot be removed now stays for the next time.
///
/// An entry is recognised by its name and its mark.
///
/// # Errors
/// [`Code::Store`] if the directory cannot be read.
pub fn clean_tmp(temporary: &OwnedFd) -> Result<()> {
    for entry in Dir::read_from(temporary).map_err(|errno| damaged(TMP, errno))? {
        let entry = entry.map_err(|errno| damaged(TMP, errno))?;
        let name = entry.file_name();
        if !marker::is_temporary(&name.to_string_lossy()) {
            continue;
        }
        let Some(mut lock) = tree::lock_if_free(temporary, name) else { continue };
        if !fstat(&lock).is_ok_and(|stat| is_marked(&stat)) {
            continue;
        }
        let aside = set_aside(temporary, &name.to_string_lossy(), &lock);
        if let Some(aside) = &aside {
            // Processes that wait for this lock need the name and not the content: they go on while the content is removed.
            drop(lock);
            let Some(again) = tree::lock_if_free(temporary, aside) else { continue };
            lock = again;
        }
        let removed = tree::remove(temporary, aside.as_deref().unwrap_or(name));
        drop(lock);
        tracing::debug!(name = %name.to_string_lossy(), ?removed, "removed what a killed process left");
    }
    Ok(())
}

/// Whether a user namespace's uid_map is the initial one's: every user, each as himself.
fn maps_all(map: &str) -> bool {
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

fn short(diff_id: &Digest) -> &str {
    &diff_id.hex()[..SHORT]
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|error| damaged("a name in it holds a NUL", error))
}
