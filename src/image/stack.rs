//! Computes how the layers of an image are stacked, for the facts that depend on several layers.
//!
//! A layer is unpacked alone and shared between images, so three questions stay open ([`super::note`]). They are answered
//! here, once for each list of layers:
//!
//! * A directory without an entry in a layer keeps the mode, owner and attributes of the layers below, as in containerd and
//!   umoci. overlayfs takes them from the topmost directory.
//! * A directory that only whiteouts mention does not exist unless a layer below has it. A link or a file that a layer below
//!   has at its path stays, as in Docker's own layers, whose whiteouts are not applied through links.
//! * overlayfs hides whiteouts only in directories that it merges from several layers; in others it lists them.
//!
//! The result is one more layer on top, which holds only directories and whiteouts. Images of `docker build` do not need it.
//! overlayfs also ignores that the root of a layer is opaque, so layers below such a root are left out of the stack.
//!
//! Everything is read by descriptors of the layers' roots. Layers no longer change, and each parent of a path is known to be
//! a directory of that layer, so no link is followed.

use super::{
    Digest,
    note::{Fact, Note},
    tree,
    unpack::{Ownership, is_allowed_xattr},
};
use crate::error::{Code, Error, Result};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        AtFlags, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags, fchmod, fchown, fgetxattr,
        flistxattr, fsetxattr, fstat, futimens, linkat, makedev, mkdirat, mknodat, openat, statat,
    },
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
};

/// The most bytes of notes of one image.
const MAX_NOTES: usize = 16 << 20;

/// The record of the store about how layers are stacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// The layers, lowest first.
    layers: Vec<Digest>,
    /// How many layers are visible, from the topmost down: the others lie below an opaque root.
    pub visible: usize,
    /// Whether an additional layer lies on top, in the store under [`Stack::own_digest`].
    pub has_facts: bool,
}

impl Stack {
    /// A stack of these layers, lowest first.
    pub fn new(layers: &[&Digest], visible: usize, has_facts: bool) -> Self {
        Self { layers: layers.iter().copied().cloned().collect(), visible, has_facts }
    }

    /// The digest of a list of layers, lowest first.
    pub fn digest<'a>(layers: impl IntoIterator<Item = &'a Digest>) -> Digest {
        let mut text = "gpurun stack 1\n".to_owned();
        for layer in layers {
            text += &layer.to_string();
            text.push('\n');
        }
        Digest::of(text.as_bytes())
    }

    /// The digest of this stack's layers.
    pub fn own_digest(&self) -> Digest {
        Self::digest(&self.layers)
    }

    /// The format in the store.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| {
            Error::new(Code::Internal, "a stack of layers cannot be written")
                .cause(error)
                .fix("report it: gpurun --version, the command, and this message")
        })
    }

    /// Parses the format of the store; `None` if the bytes are not a stack.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// One layer of an [`Assembly`].
struct Level<'a> {
    root: BorrowedFd<'a>,
    note: Note,
    /// Hashes of the paths without an entry in the layer; in `whiteouts` those that only whiteouts mention. The key is random, so
    /// no image can choose paths that collide.
    unnamed: HashSet<u64>,
    whiteouts: HashSet<u64>,
    /// Hashes of directories that hold whiteouts.
    hides: HashSet<u64>,
}

/// Layers to be stacked, topmost first.
pub struct Assembly<'a> {
    levels: Vec<Level<'a>>,
    hasher: RandomState,
    ownership: Ownership,
}

/// A merged directory.
#[derive(Clone, Default)]
struct Merged {
    /// The layers that have the directory, topmost first. The first one with an entry for it decides its attributes.
    chain: Vec<usize>,
    /// How many of them contribute content; the others lie below an opaque directory.
    content: usize,
    /// The layer below them with something at the path that is not a directory, and that they would hide.
    under: Option<usize>,
}

/// What the additional layer holds at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// A directory with the attributes of this layer's directory.
    Directory(usize),
    /// A whiteout.
    Hidden,
    /// What this layer has there, which is not a directory.
    Other(usize),
}

impl<'a> Assembly<'a> {
    /// An assembly of these layers, topmost first, with their notes.
    ///
    /// # Errors
    /// [`Code::LayerRefused`] if the notes are too long for memory.
    pub fn new(layers: Vec<(BorrowedFd<'a>, Note)>, ownership: Ownership) -> Result<Self> {
        let total: usize = layers.iter().map(|(_, note)| note.length()).sum();
        if total > MAX_NOTES {
            let what = "too many directories have no entry in the layers of the image that use them";
            return Err(Error::new(Code::LayerRefused, what)
                .cause(format!("the paths take {total} bytes, and {MAX_NOTES} can be kept"))
                .fix("build the image again with `docker build` or `buildah build`, whose layers name their directories"));
        }
        let hasher = RandomState::new();
        let mut levels = Vec::new();
        for (root, note) in layers {
            let (mut unnamed, mut whiteouts, mut hides) = (HashSet::new(), HashSet::new(), HashSet::new());
            // Notes of the store are complete.
            let _ = note.each(|fact, path| {
                let facts = match fact {
                    Fact::Unnamed => &mut unnamed,
                    Fact::Whiteouts => &mut whiteouts,
                    Fact::Hides => &mut hides,
                };
                facts.insert(hasher.hash_one(path));
                Some(())
            });
            levels.push(Level { root, note, unnamed, whiteouts, hides });
        }
        let mut assembly = Self { levels, hasher, ownership };
        let opaque = (0..assembly.levels.len()).find(|&at| assembly.is_opaque(at, b"").unwrap_or(false));
        assembly.levels.truncate(opaque.map_or(usize::MAX, |at| at + 1));
        Ok(assembly)
    }

    /// How many layers are visible, from the topmost down.
    pub fn visible(&self) -> usize {
        self.levels.len()
    }

    /// Whether the additional layer is needed.
    pub fn needs_facts(&self) -> Result<bool> {
        let mut found = false;
        self.each_repair(|_, _, _| {
            found = true;
            Ok(false)
        })?;
        Ok(found)
    }

    /// Fills the additional layer.
    pub fn write_facts(&self, root: BorrowedFd<'_>) -> Result<()> {
        let fail = |errno: Errno| {
            Error::new(Code::Store, "the layer that completes an image's layers cannot be written")
                .cause(errno)
                .fix("put the store (GPURUN_STORE) on a local filesystem such as ext4, xfs or btrfs")
        };
        // Its root is the topmost one.
        let top = self.merged_root();
        self.copy_attributes(&top, b"", root).map_err(fail)?;
        self.each_repair(|path, walk, repair| {
            self.write(root, path, walk, repair).map_err(fail)?;
            Ok(true)
        })
    }

    /// Calls `visit` with each path that the additional layer must hold, and the merged directories from the root down to the
    /// path, until it returns `false`.
    fn each_repair(&self, mut visit: impl FnMut(&[u8], &[Merged], Repair) -> Result<bool>) -> Result<()> {
        let mut walk = Walk { path: Vec::new(), ends: Vec::new(), merged: vec![self.merged_root()] };
        let mut failure = Ok(true);
        for (at, level) in self.levels.iter().enumerate() {
            if !matches!(failure, Ok(true)) {
                break;
            }
            let _ = level.note.each(|_, path| {
                // The root alone needs no layer: gpurun's own layer lies above it and sets its attributes.
                let step = if path.is_empty() { return Some(()) } else { walk.go(self, path) };
                let step = step.and_then(|()| {
                    let Some(merged) = walk.merged.last() else { return Ok(true) };
                    // Each path is visited once, for the topmost layer that has the directory.
                    match self.repair(path, merged).filter(|_| merged.chain.first() == Some(&at)) {
                        Some(repair) => visit(path, &walk.merged, repair),
                        None => Ok(true),
                    }
                });
                failure = step;
                matches!(failure, Ok(true)).then_some(())
            });
        }
        failure.map(drop)
    }

    fn merged_root(&self) -> Merged {
        Merged { chain: (0..self.levels.len()).collect(), content: self.levels.len(), under: None }
    }

    /// The repair of a directory, if it needs one.
    fn repair(&self, path: &[u8], merged: &Merged) -> Option<Repair> {
        let hash = self.hasher.hash_one(path);
        let top = *merged.chain.first()?;
        if merged.chain.iter().all(|&at| self.levels[at].whiteouts.contains(&hash)) {
            // Whiteouts below a link or a file remove nothing, and do not make a directory of it.
            return (!path.is_empty()).then_some(merged.under.map_or(Repair::Hidden, Repair::Other));
        }
        let source = self.source(hash, merged);
        let differs = source.is_some_and(|source| source != top && !self.same_attributes(path, top, source));
        // overlayfs lists whiteouts in a directory of only one layer.
        let listed = merged.content == 1 && !path.is_empty() && self.levels[top].hides.contains(&hash);
        (differs || listed).then(|| Repair::Directory(source.unwrap_or(top)))
    }

    /// The topmost layer with an entry for the directory.
    fn source(&self, hash: u64, merged: &Merged) -> Option<usize> {
        let unnamed =
            |at: usize| self.levels[at].unnamed.contains(&hash) || self.levels[at].whiteouts.contains(&hash);
        merged.chain.iter().copied().find(|&at| !unnamed(at))
    }

    /// The subdirectory with the whole path `path` of a merged directory.
    fn child(&self, parent: &Merged, path: &[u8]) -> Result<Merged> {
        let fail = |errno| read_failed(path, errno);
        let hash = self.hasher.hash_one(path);
        let mut merged = Merged::default();
        let mut open = true;
        for &at in &parent.chain[..parent.content] {
            let level = &self.levels[at];
            let stat = match statat(level.root, path, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                done => done.map_err(fail)?,
            };
            let kind = FileType::from_raw_mode(stat.st_mode);
            if !kind.is_dir() {
                // A whiteout of overlayfs is nothing.
                let is_whiteout = kind.is_char_device() && stat.st_rdev == makedev(0, 0);
                merged.under = (!is_whiteout).then_some(at);
                break;
            }
            merged.chain.push(at);
            merged.content += usize::from(open);
            if self.is_opaque(at, path).map_err(fail)? {
                open = false;
                // An opaque directory without an entry in the layer is the directory below, emptied.
                if !level.unnamed.contains(&hash) && !level.whiteouts.contains(&hash) {
                    break;
                }
            }
        }
        Ok(merged)
    }

    fn open(&self, at: usize, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        openat(self.levels[at].root, path, tree::DIRECTORY, Mode::empty())
    }

    fn is_opaque(&self, at: usize, path: &[u8]) -> Result<bool, Errno> {
        let directory = self.open(at, path)?;
        Ok(matches!(fgetxattr(&directory, self.ownership.opaque(), &mut [0_u8; 1][..]), Ok(1)))
    }

    fn same_attributes(&self, path: &[u8], one: usize, other: usize) -> bool {
        let attributes = |at: usize| {
            let directory = self.open(at, path)?;
            Ok::<_, Errno>((key(&fstat(&directory)?), xattrs(&directory)?))
        };
        matches!((attributes(one), attributes(other)), (Ok(one), Ok(other)) if one == other)
    }

    fn write(&self, root: BorrowedFd<'_>, path: &[u8], walk: &[Merged], repair: Repair) -> Result<(), Errno> {
        let mut here = openat(root, c".", tree::DIRECTORY, Mode::empty())?;
        let ends: Vec<usize> = path
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/')
            .map(|(at, _)| at)
            .chain([path.len()])
            .collect();
        let mut start = 0;
        for (depth, &end) in ends.iter().enumerate() {
            let (name, so_far) = (&path[start..end], &path[..end]);
            start = end + 1;
            if name.is_empty() {
                continue;
            }
            if end == path.len() && !matches!(repair, Repair::Directory(_)) {
                let made = match repair {
                    // All layers of a store are on one filesystem.
                    Repair::Other(at) => linkat(self.levels[at].root, path, &here, name, AtFlags::empty()),
                    _ => mknodat(&here, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)),
                };
                return match made {
                    Err(Errno::EXIST) => Ok(()),
                    done => done,
                };
            }
            let made = match mkdirat(&here, name, Mode::RWXU) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(errno),
            };
            here = match openat(&here, name, tree::DIRECTORY, Mode::empty()) {
                // A parent is hidden or is not a directory, so this path is not seen.
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(()),
                opened => opened?,
            };
            if made {
                self.copy_attributes(
                    walk.get(depth + 1).unwrap_or(&Merged::default()),
                    so_far,
                    here.as_fd(),
                )?;
            }
        }
        Ok(())
    }

    /// Copies the attributes of the merged directory to a directory of the additional layer.
    fn copy_attributes(&self, merged: &Merged, path: &[u8], to: BorrowedFd<'_>) -> Result<(), Errno> {
        let source = self.source(self.hasher.hash_one(path), merged).or(merged.chain.first().copied());
        let Some(source) = source else { return Ok(()) };
        let from = self.open(source, path)?;
        let stat = fstat(&from)?;
        if self.ownership == Ownership::Image {
            fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
        }
        for (name, value) in xattrs(&from)? {
            fsetxattr(to, name.as_slice(), &value, XattrFlags::empty())?;
        }
        fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
        let time =
            |seconds, nanoseconds: u64| Timespec { tv_sec: seconds, tv_nsec: nanoseconds.cast_signed() };
        futimens(
            to,
            &Timestamps {
                last_access: time(stat.st_atime, stat.st_atime_nsec),
                last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
            },
        )
    }
}

/// The position of a walk through the merged directories. Consecutive paths share most of their parents.
struct Walk {
    path: Vec<u8>,
    /// The end offset of each component of the path.
    ends: Vec<usize>,
    /// The root, and one for each component.
    merged: Vec<Merged>,
}

impl Walk {
    fn go(&mut self, assembly: &Assembly<'_>, path: &[u8]) -> Result<()> {
        let ends: Vec<usize> = if path.is_empty() {
            Vec::new()
        } else {
            path.iter()
                .enumerate()
                .filter(|(_, byte)| **byte == b'/')
                .map(|(at, _)| at)
                .chain([path.len()])
                .collect()
        };
        let shared = self
            .ends
            .iter()
            .zip(&ends)
            .take_while(|(one, other)| one == other && self.path[..**one] == path[..**one])
            .count();
        self.merged.truncate(shared + 1);
        for &end in &ends[shared..] {
            let next = match self.merged.last() {
                Some(parent) => assembly.child(parent, &path[..end])?,
                None => Merged::default(),
            };
            self.merged.push(next);
        }
        self.path = path.to_vec();
        self.ends = ends;
        Ok(())
    }
}

fn read_failed(path: &[u8], errno: Errno) -> Error {
    let path = String::from_utf8_lossy(path);
    Error::new(Code::Store, format!("the directory {path:?} of a layer in the store cannot be read"))
        .cause(errno)
        .fix("remove the image and fetch it again: gpurun rmi NAME, gpurun pull NAME")
}

/// The compared attributes of a directory, without extended attributes.
fn key(stat: &Stat) -> (u32, u32, u32) {
    (stat.st_mode, stat.st_uid, stat.st_gid)
}

/// Name and value of an extended attribute.
type Xattr = (Vec<u8>, Vec<u8>);

/// The attributes that an image may set.
fn xattrs(directory: &OwnedFd) -> Result<Vec<Xattr>, Errno> {
    let mut names = vec![0; 64 << 10];
    let length = match flistxattr(directory, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        done => done?,
    };
    names.truncate(length);
    let mut found = Vec::new();
    for name in names.split(|&byte| byte == 0).filter(|name| is_allowed_xattr(name)) {
        let mut value = vec![0; 64 << 10];
        let length = fgetxattr(directory, name, &mut value[..])?;
        value.truncate(length);
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}
