//! The layers of a store: makes, holds, measures and removes them.

use super::{
    Digest, LAYERS, NOTES, PARTS, SHORT, STACKS, Store, StoredImage, TMP, c_string, damaged, is_marked,
    marker::is_hex, numbered, set_aside, short, tree,
};
use crate::{
    error::{Code, Error, Result},
    image::{
        layer::Layer,
        note::{MAX_NOTE, Note},
        reserve,
        stack::Stack,
    },
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, fstatvfs, mkdirat, openat,
        renameat, statat, syncfs, unlinkat,
    },
    io::Errno,
};
use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::Read,
    path::PathBuf,
    time::{Duration, SystemTime},
};

/// A layer within its directory of `tmp`.
const CONTENT: &str = "content";

/// The result of [`Store::prune`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pruned {
    /// Layers that were removed.
    pub removed: usize,
    /// Unused layers that were kept, because containers run on them.
    pub in_use: usize,
    /// Freed bytes on disk.
    pub freed: u64,
}

impl Store {
    /// The path of a layer's directory, which may not exist yet.
    pub fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.path.join(LAYERS).join(short(diff_id))
    }

    /// Whether a layer exists, complete.
    pub fn has_layer(&self, diff_id: &Digest) -> bool {
        self.exists(&format!("{LAYERS}/{}", short(diff_id)))
    }

    /// Prevents removal of a layer as long as the result is open; `None` if the layer does not exist.
    pub fn hold_layer(&self, diff_id: &Digest) -> Result<Option<OwnedFd>> {
        let path = format!("{LAYERS}/{}", short(diff_id));
        let directory = match openat(&self.directory, &path, tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            done => done.map_err(|errno| damaged("a layer cannot be opened", errno))?,
        };
        // An exclusive holder is either creating the layer or deleting it; after a delete the path no longer exists.
        self.wait_for_lock(&directory, FlockOperation::NonBlockingLockShared, &path)?;
        Ok(self.is(&path, &directory).then_some(directory))
    }

    /// Fails if the bytes do not fit, because unpacked layers are rarely smaller than packed ones. A hundredth of the filesystem
    /// stays free, as when layers are written.
    ///
    /// # Errors
    /// [`Code::NoSpace`]
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        let space = fstatvfs(&self.directory).map_err(|errno| damaged("fstatvfs", errno))?;
        let (free, _) = reserve::room(&space);
        if bytes <= free {
            return Ok(());
        }
        // Half a layer that a killed process left may be what the disk lacks.
        self.clean()?;
        let space = fstatvfs(&self.directory).map_err(|errno| damaged("fstatvfs", errno))?;
        let (free, _) = reserve::room(&space);
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

    /// Fails if the missing layers would exceed the quota, by their packed sizes. With a quota the result holds a lock against
    /// other pulls: two concurrent pulls might each find room.
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
            0 => "remove images that you do not need (`gpurun images`, `gpurun rmi`), or raise store-quota in the configuration".into(),
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

    /// Disk usage of each layer in bytes, by the name of its directory.
    pub fn usage(&self) -> Result<BTreeMap<String, u64>> {
        let names = self.names(LAYERS)?;
        names.into_iter().map(|name| Ok((name.clone(), self.usage_of(&name)?))).collect()
    }

    /// Disk usage of an image's layers in bytes, and the part of it that other images share.
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
        match tree::usage(&self.directory, &format!("{LAYERS}/{layer}")) {
            // Removed meanwhile, or a foreign file.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(0),
            done => done.map_err(|errno| damaged("a layer cannot be measured", errno)),
        }
    }

    /// Layers that gpurun made and no image uses.
    fn unused(&self) -> Result<Vec<String>> {
        // Layers are listed before images: a pull writes its image first, so a listed layer of the pull has its image.
        let mut layers = self.names(LAYERS)?;
        let records = self.records()?;
        let stacks: Vec<Digest> = records
            .iter()
            .map(|(record, _)| Stack::digest(record.layers.iter().map(|layer| &layer.diff_id)))
            .collect();
        let used: HashSet<&str> = records
            .iter()
            .flat_map(|(record, _)| &record.layers)
            .map(|layer| short(&layer.diff_id))
            .chain(stacks.iter().map(short))
            .collect();
        layers.retain(|layer| {
            is_short_hex(layer) && !used.contains(layer.as_str()) && self.exists(&format!("{NOTES}/{layer}"))
        });
        Ok(layers)
    }

    /// Removes the layers and configurations that no image uses, except layers that a container runs on.
    pub fn prune(&self) -> Result<Pruned> {
        self.clean()?;
        let unused = self.unused()?;
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
        self.prune_stacks()?;
        self.prune_blobs()?;
        Ok(pruned)
    }

    /// Removes the stacks of removed images.
    fn prune_stacks(&self) -> Result<()> {
        let records = self.records()?;
        let used: HashSet<String> = records
            .iter()
            .map(|(record, _)| {
                short(&Stack::digest(record.layers.iter().map(|layer| &layer.diff_id))).to_owned()
            })
            .collect();
        let remove = |path: String| match unlinkat(&self.directory, path, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(damaged("a file cannot be removed", errno)),
        };
        for name in self.names(STACKS)? {
            let path = format!("{STACKS}/{name}");
            let ours = || {
                self.read(&path).is_ok_and(|bytes| {
                    Stack::from_bytes(&bytes).is_some_and(|stack| short(&stack.own_digest()) == name)
                })
            };
            if !used.contains(&name) && ours() {
                remove(path)?;
            }
        }
        Ok(())
    }

    /// Removes a layer; `false` if a process holds it.
    fn remove_layer(&self, name: &str) -> Result<bool> {
        let fail = |errno| damaged("a layer cannot be removed", errno);
        let path = format!("{LAYERS}/{name}");
        let directory = match openat(&self.directory, &path, tree::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(true),
            done => done.map_err(fail)?,
        };
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(false),
            done => done.map_err(fail)?,
        }
        // Renamed first, so that a process killed here leaves no partial layer under the name of a complete one.
        let temporary = format!("{TMP}/{}", numbered(name));
        let aside = self.locked_directory(&temporary)?;
        let renamed = renameat(&self.directory, &path, &aside, CONTENT);
        tree::remove(&self.directory, &c_string(&temporary)?).map_err(fail)?;
        match renamed {
            Err(Errno::NOENT) => return Ok(true),
            done => done.map_err(fail)?,
        }
        match unlinkat(&self.directory, format!("{NOTES}/{name}"), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(errno) => Err(fail(errno)),
        }
    }

    /// The directory for the partial download of a blob, locked exclusively as long as the result is open.
    pub fn parts(&self, blob: &Digest) -> Result<OwnedFd> {
        // Absent in a store of version 0.1.0.
        match mkdirat(&self.directory, PARTS, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(damaged("a directory cannot be made", errno)),
        }
        self.locked_directory(&format!("{PARTS}/{}", short(blob)))
    }

    /// Removes the partial download of a blob, unless a process uses it.
    pub fn remove_parts(&self, blob: &Digest) -> Result<()> {
        self.remove_unused(&format!("{PARTS}/{}", short(blob)), Duration::ZERO)
    }

    /// Removes the partial downloads of all blobs without progress for this time.
    pub fn remove_old_parts(&self, age: Duration) -> Result<()> {
        if self.exists(PARTS) {
            for name in self.names(PARTS)?.iter().filter(|name| is_short_hex(name)) {
                self.remove_unused(&format!("{PARTS}/{name}"), age)?;
            }
        }
        Ok(())
    }

    fn remove_unused(&self, path: &str, age: Duration) -> Result<()> {
        let fail = |errno| damaged("a part of a layer cannot be removed", errno);
        let directory = match openat(&self.directory, path, tree::DIRECTORY, Mode::empty()) {
            // gpurun makes directories here. Anything else is foreign, and stays.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            done => done.map_err(fail)?,
        };
        let stat = fstat(&directory).map_err(fail)?;
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
        let free = || flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok();
        // A part is a file named by the offset of its first byte.
        let ours = |directory: &OwnedFd| -> rustix::io::Result<bool> {
            for entry in Dir::read_from(directory)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let stat = statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                if !name.iter().all(u8::is_ascii_digit) || !FileType::from_raw_mode(stat.st_mode).is_file() {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if changed.elapsed().unwrap_or_default() < age
            || !is_marked(&stat)
            || !ours(&directory).map_err(fail)?
            || !free()
            || !self.is(path, &directory)
        {
            return Ok(());
        }
        tree::remove(&self.directory, &c_string(path)?).map_err(fail)
    }

    /// Makes a layer's directory and lets `fill` fill it, unless the layer exists. Waits for another process that makes the same
    /// layer. `fill` verifies what it writes, and returns the layer's note.
    pub fn add_layer<N: Into<Note>>(
        &self,
        diff_id: &Digest,
        fill: impl FnOnce(BorrowedFd<'_>) -> Result<N>,
    ) -> Result<()> {
        let name = short(diff_id);
        let temporary = format!("{TMP}/{name}");
        let temporaries = self.open_tmp()?;
        let fail = |what: &'static str| move |errno: Errno| damaged(what, errno);
        let lock = loop {
            let directory = self.locked_directory(&temporary)?;
            if set_aside(&temporaries, name, &directory).is_none() {
                break directory;
            }
        };
        let made = if self.has_layer(diff_id) { Ok(()) } else { self.make_layer(name, &lock, fill) };
        let removed = tree::remove(&self.directory, &c_string(&temporary)?);
        // The first failure is reported; leftovers are removed later.
        made.and(removed.map_err(fail("a directory cannot be removed")))
    }

    /// Makes a layer in a locked directory of `tmp`, and moves it to its place.
    fn make_layer<N: Into<Note>>(
        &self,
        name: &str,
        lock: &OwnedFd,
        fill: impl FnOnce(BorrowedFd<'_>) -> Result<N>,
    ) -> Result<()> {
        let fail = |what: &'static str| move |errno: Errno| damaged(what, errno);
        // What a killed process left and could not be set aside. The layer's own mode is the image's choice, so the layer is a
        // directory inside the one with the mark.
        let content = tree::empty_open(lock)
            .and_then(|()| mkdirat(lock, CONTENT, Mode::RWXU))
            .and_then(|()| openat(lock, CONTENT, tree::DIRECTORY, Mode::empty()))
            .map_err(fail("a layer's directory cannot be made"))?;
        rustix::fs::fchmod(&content, Mode::from_raw_mode(0o755)).map_err(fail("fchmod"))?;
        let note = fill(content.as_fd())?;
        // The note is written first: a layer without a note could never be removed.
        self.replace(&format!("{NOTES}/{name}"), &note.into().to_bytes())?;
        // Everything is synced before the rename.
        syncfs(lock).map_err(fail("syncfs"))?;
        renameat(lock, CONTENT, &self.directory, format!("{LAYERS}/{name}")).map_err(fail("rename"))
    }

    /// A layer's note; empty if an old version of gpurun, which wrote no notes, unpacked the layer.
    pub fn note(&self, diff_id: &Digest) -> Result<Note> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.directory, format!("{NOTES}/{}", short(diff_id)), flags, Mode::empty())
        {
            Err(Errno::NOENT) => return Ok(Note::default()),
            done => done.map_err(|errno| damaged("a layer's note cannot be opened", errno))?,
        };
        let mut bytes = Vec::new();
        File::from(file)
            .take(2 * MAX_NOTE as u64)
            .read_to_end(&mut bytes)
            .map_err(|error| damaged("a layer's note cannot be read", error))?;
        // After a power cut the file may hold zeros.
        Ok(Note::from_bytes(&bytes).unwrap_or_default())
    }

    /// Marks a layer of an adopted store as made by gpurun.
    pub fn note_adopted_layer(&self, name: &str) -> Result<()> {
        self.replace(&format!("{NOTES}/{name}"), &Note::default().to_bytes())
    }

    /// The recorded stack of these layers, lowest first, if any.
    pub fn stack(&self, layers: &[&Digest]) -> Option<Stack> {
        let digest = Stack::digest(layers.iter().copied());
        let stack = Stack::from_bytes(&self.read(&format!("{STACKS}/{}", short(&digest))).ok()?)?;
        (stack.own_digest() == digest).then_some(stack)
    }

    /// Records a stack.
    pub fn put_stack(&self, stack: &Stack) -> Result<()> {
        self.replace(&format!("{STACKS}/{}", short(&stack.own_digest())), &stack.to_bytes()?)
    }
}

/// Whether this is the name of a layer's directory.
pub fn is_short_hex(name: &str) -> bool {
    is_hex(name, SHORT)
}
