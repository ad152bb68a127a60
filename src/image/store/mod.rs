//! The store: unpacked layers and the small files that say which image is made of which.
//!
//! ```text
//! gpurun-store  the marker, see [`marker`]
//! layers/HEX    a layer's directory, named by the first half of its diff_id; there means whole and checked
//! notes/HEX     what the layer leaves to those below it ([`super::note`]), and the mark that gpurun made the layer
//! stacks/HEX    how layers are put together ([`super::stack`]); HEX is the digest of their diff_ids
//! blobs/HEX     a configuration file, named by its digest and checked against it whenever it is read
//! images/HEX    what an image's name stood for when it was last opened; HEX is the name's digest, its time the last use
//! parts/HEX     a partial download of a layer's blob; HEX is the blob's digest
//! scratch/ID    what a running container writes into its root; locked (flock) by its launcher
//! tmp/NAME      what is not finished; locked (flock) by the process that works on it
//! ```
//!
//! Trust boundary: the directory belongs to the caller, no other user may write to it, and it has the marker. It is opened once,
//! and every file is reached from that descriptor. Nothing is removed that does not carry gpurun's mark: a layer has a note, a
//! configuration and a record are named by the digest of what is in them, and in `scratch`, `parts` and `tmp` names, kinds and
//! content are those that gpurun makes.

mod images;
mod layers;
mod marker;

pub use images::{Record, StoredImage};
pub use layers::Pruned;

use super::{Digest, ScratchDir, layout::Version, reserve::Reserve, tree, unpack::Ownership};
use crate::error::{Code, Error, Result};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, flock, fstat, openat, renameat, statat},
    io::Errno,
};
use std::{
    ffi::CString,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

/// The most that a file of `images` or `blobs` holds; the documents that they come from are bounded alike.
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

/// Where images are kept.
#[derive(Debug)]
pub struct Store {
    directory: OwnedFd,
    path: PathBuf,
    /// What all layers may take on the disk, in bytes.
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

/// What another failure of the store is, where no better advice is known.
fn damaged(what: &str, cause: impl std::fmt::Display) -> Error {
    failed(what, cause)
        .fix("check the filesystem's health and permissions, or name an empty directory in GPURUN_STORE")
}

/// The error where the store's filesystem has no room left.
pub fn full() -> Error {
    Error::new(Code::NoSpace, "the image store's filesystem is full")
        .fix("make room on it, or name a directory on another filesystem in GPURUN_STORE")
}

impl Store {
    /// Opens a store, and makes one in a directory that is absent or empty.
    ///
    /// Layers hold set-user-ID programs of any age, which must not run outside a container, so the directory is closed to others.
    /// Leftovers of killed processes stay: [`Store::clean`] and the launcher's sweeper remove them, and no start waits for that.
    ///
    /// # Errors
    /// [`Code::Store`] where the directory cannot be made, belongs to another user, can be written by others, or holds something
    /// else than a store.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = std::path::absolute(directory).map_err(|error| {
            failed("its name is not a path", error).fix("name a directory in GPURUN_STORE")
        })?;
        let store = Self { directory: marker::open_directory(&path)?, path, quota: None };
        marker::check(&store)?;
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

    /// Waits until no other process works on what is called so; until the result is dropped, none will.
    pub fn lock(&self, name: &str) -> Result<OwnedFd> {
        let path = format!("{TMP}/{}.lock", short(&Digest::of(name.as_bytes())));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let file = openat(&self.directory, &path, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|errno| damaged("a lock cannot be made", errno))?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                .map_err(|errno| damaged("flock", errno))?;
            // A sweeper may have removed it meanwhile.
            if self.is(&path, &file) {
                return Ok(file);
            }
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

    /// How layers are written here: root's store keeps the image's owners. In a user namespace even root has no
    /// `trusted.*` attributes (user_namespaces(7)), and overlayfs there is mounted with `userxattr`.
    pub fn ownership() -> Ownership {
        let all_users = || std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_all(&map));
        if rustix::process::geteuid().is_root() && all_users() { Ownership::Image } else { Ownership::Caller }
    }

    /// A file that has no name and goes when it is closed.
    pub fn unnamed_file(&self) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = openat(&self.directory, TMP, flags, Mode::RUSR | Mode::WUSR);
        file.map(File::from).map_err(|errno| {
            failed("its filesystem has no unnamed files (O_TMPFILE)", errno)
                .fix("put the store (GPURUN_STORE) on a local filesystem such as ext4, xfs or btrfs")
        })
    }

    /// Writes all of a stream to a file, and stops before the filesystem is full.
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

    /// A file of the store that is written piece by piece, and never into the reserve.
    pub fn filler<'a>(&'a self, file: &'a mut File) -> Filler<'a> {
        Filler { store: self, file, reserve: Reserve::default() }
    }

    /// Removes what killed processes left half made. It may take long: a start does not call it.
    pub fn clean(&self) -> Result<()> {
        clean_tmp(&self.open_tmp()?)
    }

    fn open_tmp(&self) -> Result<OwnedFd> {
        openat(&self.directory, TMP, tree::DIRECTORY, Mode::empty()).map_err(|errno| damaged(TMP, errno))
    }

    /// Where containers write into their roots, as long as they run.
    pub fn scratch(&self) -> Result<ScratchDir> {
        // Absent in a store of version 0.1.0 that no container was run from.
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
        let temporary = format!("{TMP}/{name}.{}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fail = |errno| damaged(&format!("{path} cannot be written"), errno);
        let mut file = loop {
            let file = openat(&self.directory, &temporary, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive)).map_err(fail)?;
            if self.is(&temporary, &file) {
                break File::from(file);
            }
        };
        file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => full().cause(error),
            _ => damaged(&format!("{path} cannot be written"), error),
        })?;
        renameat(&self.directory, &temporary, &self.directory, path).map_err(fail)
    }
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
    /// [`Code::NoSpace`] where the reserve would be used, [`Code::Store`] where the filesystem fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.reserve.take(&self.store.directory, bytes.len() as u64, 0)?;
        self.file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => full().cause(error),
            _ => damaged("a file cannot be written", error),
        })
    }
}

/// Removes from a store's `tmp` what no process works on. What cannot be removed now stays for the next time.
///
/// # Errors
/// [`Code::Store`] where the directory cannot be read.
pub fn clean_tmp(temporary: &OwnedFd) -> Result<()> {
    for entry in Dir::read_from(temporary).map_err(|errno| damaged(TMP, errno))? {
        let entry = entry.map_err(|errno| damaged(TMP, errno))?;
        let name = entry.file_name();
        if !marker::is_temporary(&name.to_string_lossy()) {
            continue;
        }
        if let Some(_lock) = tree::lock_if_free(temporary, name) {
            let removed = tree::remove(temporary, name);
            tracing::debug!(name = %name.to_string_lossy(), ?removed, "removed what a killed process left");
        }
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
