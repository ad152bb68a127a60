//! The marker of a store: decides where a store may be made, and recognises an existing one.
//!
//! gpurun deletes files in its store, so it must know that the directory is a store. A new store is made only in an absent or
//! empty directory, and its first file is the marker. Every other directory is refused and left unchanged, because users may
//! well type `GPURUN_STORE=$HOME`.
//!
//! Versions up to 0.1.0 wrote no marker. Such a store is adopted once, if it holds only what those versions wrote: each name
//! and kind is checked, and one foreign entry is enough to refuse it.

use super::{BLOBS, IMAGES, LAYERS, NOTES, PARTS, SCRATCH, STACKS, Store, TMP, failed, layers::is_short_hex};
use crate::{
    error::{Code, Error, Result},
    regular_file::{look_at, reopen},
};
use rustix::{
    fd::OwnedFd,
    fs::{
        AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat, flock, fstat, mkdirat, openat, statat,
        unlinkat,
    },
    io::Errno,
    process::geteuid,
};
use std::path::Path;

/// The file that makes a directory a store.
const NAME: &str = "gpurun-store";
/// Content of the marker. Each start compares only its length, so a later layout needs text of a different length.
const CONTENT: &[u8] = b"This directory is a gpurun image store, layout 1. gpurun deletes files in it.\n";
/// The mark of what gpurun makes in `scratch`, `parts` and `tmp` and may therefore delete: the sticky bit. mkdir(2) and open(2) set
/// it together with the name, so no entry of gpurun is ever without it; file systems keep it; and nothing else sets it on a
/// directory or file that only its owner may use.
const MARK: Mode = Mode::SVTX;
/// Mode of a marked directory.
pub const MARKED_DIRECTORY: Mode = MARK.union(Mode::RWXU);
/// Mode of a marked file.
pub const MARKED_FILE: Mode = MARK.union(Mode::RUSR).union(Mode::WUSR);
/// The directories of a store, in the order in which they are made.
const DIRECTORIES: [&str; 8] = [LAYERS, NOTES, STACKS, BLOBS, IMAGES, SCRATCH, PARTS, TMP];

/// Opens the directory of a store, and makes the directory where it is absent.
///
/// # Errors
/// [`Code::Store`] if it cannot be made or opened, belongs to another user, or others may write to it.
pub fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = || openat(rustix::fs::CWD, path, flags, Mode::empty());
    let opened = match open() {
        Err(Errno::NOENT) => {
            use std::os::unix::fs::DirBuilderExt;
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(path).map_err(|error| {
                failed(&format!("{} cannot be made", path.display()), error)
                    .fix("name a directory that you may write in GPURUN_STORE")
            })?;
            open()
        }
        done => done,
    };
    let directory = opened.map_err(|errno| {
        failed(&format!("{} cannot be opened", path.display()), errno)
            .fix("name a directory of your own in GPURUN_STORE")
    })?;
    let stat = fstat(&directory).map_err(|errno| failed("fstat", errno))?;
    let (owner, me) = (stat.st_uid, geteuid().as_raw());
    if owner != me {
        let what = format!("the image store {} belongs to user {owner}, not to {me}", path.display());
        return Err(Error::new(Code::Store, what)
            .cause("another user could change files that become a container's root")
            .fix("name a directory of your own in GPURUN_STORE"));
    }
    if stat.st_mode & 0o022 != 0 {
        let what = format!("the image store {} can be written by others", path.display());
        return Err(Error::new(Code::Store, what)
            .cause(format!("its mode is {:o}", stat.st_mode & 0o7777))
            .fix(format!("chmod 700 {}", path.display())));
    }
    Ok(directory)
}

/// Checks the marker; writes it in an empty directory.
///
/// # Errors
/// [`Code::Store`] if the directory is not a store and not empty.
pub fn check(store: &Store) -> Result<()> {
    // A marker that is being written is looked at again below the lock.
    if matches!(has_marker(store), Ok(true)) {
        return Ok(());
    }
    // Of two concurrent first starts, the second finds the marker of the first.
    rustix::io::retry_on_intr(|| flock(&store.directory, FlockOperation::LockExclusive))
        .map_err(|errno| failed("flock", errno))?;
    let begun = remove_empty_marker(store)
        .and_then(|()| has_marker(store))
        .and_then(|there| if there { Ok(()) } else { begin(store) });
    flock(&store.directory, FlockOperation::Unlock).map_err(|errno| failed("flock", errno))?;
    begun
}

/// A start that was killed between making the marker and writing it leaves an empty file of that name.
fn remove_empty_marker(store: &Store) -> Result<()> {
    let stat = statat(&store.directory, NAME, AtFlags::SYMLINK_NOFOLLOW);
    if stat.is_ok_and(|stat| is_kind(&stat, FileType::RegularFile) && stat.st_size == 0) {
        unlinkat(&store.directory, NAME, AtFlags::empty()).map_err(|errno| failed(NAME, errno))?;
    }
    Ok(())
}

/// Whether the marker is there; one system call, at each start.
fn has_marker(store: &Store) -> Result<bool> {
    let stat = match statat(&store.directory, NAME, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(false),
        done => done.map_err(|errno| failed(NAME, errno))?,
    };
    if is_kind(&stat, FileType::RegularFile) && u64::try_from(stat.st_size) == Ok(CONTENT.len() as u64) {
        return Ok(true);
    }
    Err(Error::new(Code::Store, format!("{} is a store of another version", store.path.display()))
        .cause(format!("its file {NAME} is not the one that this version of gpurun writes"))
        .fix("use the version of gpurun that made it, or name an empty directory in GPURUN_STORE"))
}

fn begin(store: &Store) -> Result<()> {
    let entries = store.names(".")?;
    if !entries.is_empty() {
        let legacy = legacy_layers(store, &entries)?;
        mark_legacy_entries(store)?;
        write_marker(store)?;
        for layer in legacy {
            store.note_adopted_layer(&layer)?;
        }
        return Ok(());
    }
    write_marker(store)
}

/// Makes the directories first: a marker means that all of them exist.
fn write_marker(store: &Store) -> Result<()> {
    let fail = |name: &str, errno: Errno| {
        failed(&format!("{} cannot be made", store.path.join(name).display()), errno)
            .fix("name a directory that you may write in GPURUN_STORE")
    };
    for name in DIRECTORIES {
        match mkdirat(&store.directory, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(fail(name, errno)),
        }
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let written = openat(&store.directory, NAME, flags, Mode::RUSR | Mode::RGRP | Mode::ROTH)
        .and_then(|file| rustix::io::write(&file, CONTENT));
    match written {
        Ok(count) if count == CONTENT.len() => Ok(()),
        done => {
            // A truncated marker would look like a store of another version.
            let _ = unlinkat(&store.directory, NAME, AtFlags::empty());
            Err(fail(NAME, done.err().unwrap_or(Errno::NOSPC)))
        }
    }
}

/// The layers of a store of a version that wrote no marker.
///
/// # Errors
/// [`Code::Store`], which names an entry that no such version wrote.
fn legacy_layers(store: &Store, entries: &[String]) -> Result<Vec<String>> {
    // A start that was killed before it wrote the marker leaves only empty directories.
    let begun = entries.iter().all(|name| DIRECTORIES.contains(&name.as_str()))
        && entries.iter().all(|name| store.names(name).is_ok_and(|names| names.is_empty()));
    if begun {
        return Ok(Vec::new());
    }
    let mut layers = Vec::new();
    for required in [LAYERS, BLOBS, IMAGES, TMP] {
        if !entries.iter().any(|name| name == required) {
            return Err(not_a_store(store, entries.first().map_or("", String::as_str)));
        }
    }
    for top in entries {
        let known: fn(&str, &Stat) -> bool = match top.as_str() {
            LAYERS | PARTS => |name, stat| is_short_hex(name) && is_kind(stat, FileType::Directory),
            BLOBS => |name, stat| is_hex(name, 64) && is_kind(stat, FileType::RegularFile),
            IMAGES => |name, stat| is_short_hex(name) && is_kind(stat, FileType::RegularFile),
            SCRATCH => |name, stat| is_hex(name, 12) && is_kind(stat, FileType::Directory),
            TMP => |name, _| is_temporary(name),
            _ => return Err(not_a_store(store, top)),
        };
        let opened = openat(&store.directory, top, super::tree::DIRECTORY, Mode::empty());
        let directory = opened.map_err(|_| not_a_store(store, top))?;
        for entry in Dir::read_from(&directory).map_err(|errno| failed(top, errno))? {
            let entry = entry.map_err(|errno| failed(top, errno))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "." || name == ".." {
                continue;
            }
            let stat = statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|errno| failed(top, errno))?;
            if stat.st_uid != geteuid().as_raw() && top != LAYERS || !known(&name, &stat) {
                return Err(not_a_store(store, &format!("{top}/{name}")));
            }
            if top == LAYERS {
                layers.push(name);
            }
        }
    }
    Ok(layers)
}

/// Marks the unfinished files of a store of a version that marked none, after [`legacy_layers`] has checked them.
fn mark_legacy_entries(store: &Store) -> Result<()> {
    for top in [SCRATCH, PARTS, TMP] {
        let directory = match openat(&store.directory, top, super::tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => continue,
            done => done.map_err(|errno| failed(top, errno))?,
        };
        for name in store.names(top)? {
            let (found, stat) = look_at(&directory, &name).map_err(|errno| failed(top, errno))?;
            if is_kind(&stat, FileType::Directory) || is_kind(&stat, FileType::RegularFile) {
                let marked = Mode::from_raw_mode(stat.st_mode) | MARK;
                reopen(&found, OFlags::RDONLY)
                    .and_then(|opened| rustix::fs::fchmod(opened, marked))
                    .map_err(|errno| failed(top, errno))?;
            }
        }
    }
    Ok(())
}

/// Whether gpurun made this entry of `scratch`, `parts` or `tmp`.
pub fn is_marked(stat: &Stat) -> bool {
    Mode::from_raw_mode(stat.st_mode).contains(MARK)
}

fn not_a_store(store: &Store, entry: &str) -> Error {
    let path = store.path.display();
    Error::new(Code::Store, format!("{path} is not an image store of gpurun, and not empty"))
        .cause(format!(
            "it holds {entry:?}; gpurun deletes files in its store, so it begins only in an empty directory"
        ))
        .fix(format!("GPURUN_STORE={}", store.path.join("gpurun").display()))
}

/// Whether a name of `tmp` is one that gpurun makes: digits of a digest, and then `.lock` or the number of a process.
pub fn is_temporary(name: &str) -> bool {
    let (digest, rest) = name.split_once('.').unwrap_or((name, "lock"));
    (is_short_hex(digest) || is_hex(digest, 64))
        && (rest == "lock" || !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether the text has this many hexadecimal digits, as [`crate::image::Digest`] writes them.
pub fn is_hex(name: &str, digits: usize) -> bool {
    name.len() == digits && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_kind(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}
