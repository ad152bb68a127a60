//! Writes a layer's tar stream into a directory, as a lower directory of overlayfs.
//!
//! The stream is hostile. Every name is resolved by the kernel with the layer's directory as root, so links lead nowhere
//! else; the last component is never followed. What an image may not decide (overlayfs' own attributes, SELinux labels)
//! is left out, and an entry that asks for what cannot be meant well is refused by its name.
//!
//! Whiteouts are applied after all other entries, so their position in the archive does not matter (OCI image specification,
//! layer.md, "Whiteouts"). Facts that depend on the layers below are recorded in the layer's note.

mod names;
mod whiteouts;

use super::{
    note::{Fact, Note, PathList},
    reserve::{Reserve, room},
    store::full,
    tar::{Entry, Kind, Reader},
    tree,
};
use crate::error::{Code, Error, Result};
use names::{Place, aufs_metadata, c_string};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
        XattrFlags, chownat, fchmod, fchown, fsetxattr, fstatvfs, ftruncate, futimens, linkat, makedev,
        mkdirat, mknodat, openat, openat2, statat, symlinkat, utimensat,
    },
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::{CStr, CString},
    hash::{BuildHasher, RandomState},
    io::BufRead,
    rc::Rc,
};

/// As many entries as an ext4 filesystem of common size has inodes; a layer with more is made to harm.
const MAX_ENTRIES: u64 = 10_000_000;
/// PATH_MAX without its NUL: no program in the container could name what is longer.
pub const MAX_PATH: usize = 4095;
/// Extended attributes that an image may set; everything else belongs to the host: `trusted.*` and `user.overlay.*`
/// steer overlayfs, `security.selinux` is the host's policy, access control lists name the host's users.
const XATTRS: &[(&[u8], &str)] =
    &[(b"security.capability", "file capabilities, as of ping"), (b"user.", "programs' own")];
/// Overlayfs' own attributes under `user.`, used where a layer is mounted with `userxattr`.
const USER_OVERLAY: &[u8] = b"user.overlay.";

/// Whose the files become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// The image's numbers, device nodes too, and `trusted.overlay.*` marks: the store of root.
    Image,
    /// All of them the caller's, who can remove them again, and `user.overlay.*` marks: everybody else's store.
    Caller,
}

impl Ownership {
    /// overlayfs' attribute of an opaque directory (overlayfs documentation, "whiteouts and opaque directories").
    pub fn opaque(self) -> &'static CStr {
        match self {
            Self::Image => c"trusted.overlay.opaque",
            Self::Caller => c"user.overlay.opaque",
        }
    }
}

/// Whether an image may set this extended attribute.
pub fn is_allowed_xattr(name: &[u8]) -> bool {
    let allowed = |(allowed, _): &(&[u8], &str)| {
        if allowed.ends_with(b".") { name.starts_with(allowed) } else { name == *allowed }
    };
    XATTRS.iter().any(allowed) && !name.starts_with(USER_OVERLAY)
}

/// Unpacks a tar stream into this empty directory. The stream is read up to the archive's end, not further. Returns the
/// layer's note.
///
/// # Errors
/// [`Code::ImageBroken`] if the stream is not a tar archive, [`Code::LayerRefused`] for an entry that must not be unpacked,
/// [`Code::NoSpace`] and [`Code::Store`] if the filesystem is full or fails.
pub fn unpack<R: BufRead>(stream: R, root: BorrowedFd<'_>, ownership: Ownership) -> Result<Note> {
    let mut reader = Reader::new(stream);
    let mut unpacker = Unpacker {
        root,
        ownership,
        parent: None,
        directories: PathList::default(),
        times: Vec::new(),
        unnamed: Unnamed::default(),
        whiteouts: PathList::default(),
        reserve: Reserve::default(),
    };
    let mut count = 0_u64;
    while let Some(entry) = reader.next_entry()? {
        count += 1;
        if count > MAX_ENTRIES {
            return Err(refused(&entry.path, format!("a layer of more than {MAX_ENTRIES} entries")));
        }
        unpacker.entry(&entry, &mut reader)?;
    }
    unpacker.finish()
}

/// An error that names the entry.
fn refused(path: &[u8], cause: impl Into<String>) -> Error {
    let shown: String = String::from_utf8_lossy(path).chars().take(200).collect();
    Error::new(Code::LayerRefused, format!("a layer holds {shown:?}, which must not be unpacked"))
        .cause(cause.into())
        .fix("rebuild the image without this entry: `docker build --no-cache .`")
}

/// The error for a layer whose names exceed their memory bound.
fn too_many_names(path: &[u8]) -> Error {
    refused(path, "the layer has more directories and whiteouts than fit in memory")
}

/// The error of a failed system call on behalf of an entry.
fn failed(path: &[u8], call: &str, errno: Errno) -> Error {
    let shown: String = String::from_utf8_lossy(path).chars().take(200).collect();
    match errno {
        Errno::NOSPC | Errno::DQUOT => full(),
        // What only the entry can be the reason of.
        Errno::NAMETOOLONG
        | Errno::NOTDIR
        | Errno::LOOP
        | Errno::XDEV
        | Errno::INVAL
        | Errno::FBIG
        | Errno::MLINK
        | Errno::NOENT
        | Errno::EXIST
        | Errno::PERM
        | Errno::ISDIR => refused(path, format!("{call}: {errno}")),
        _ => Error::new(Code::Store, format!("{shown:?} of a layer cannot be written"))
            .cause(format!("{call}: {errno}"))
            .fix("put the store (GPURUN_STORE) on a local filesystem such as ext4, xfs or btrfs"),
    }
}

struct Unpacker<'a> {
    root: BorrowedFd<'a>,
    ownership: Ownership,
    /// The directory that was written to last: archives go directory by directory.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Directories with an entry in the layer.
    directories: PathList,
    /// Times of these directories in the same order. They are set at the end, because writing into a directory changes its time.
    times: Vec<Timespec>,
    unnamed: Unnamed,
    /// Whiteouts to apply at the end.
    whiteouts: PathList,
    reserve: Reserve,
}

/// Directories that were made for their content, without an entry so far.
#[derive(Default)]
struct Unnamed {
    /// In the order of their creation; a later entry may name some of them.
    made: PathList,
    /// Hashes of the directories without an entry. The key is random, so no archive can choose names that collide.
    hashes: HashSet<u64>,
    hasher: RandomState,
    /// Whether the layer has an entry for its root.
    root_is_named: bool,
}

impl Unnamed {
    #[must_use]
    fn add(&mut self, path: &[u8]) -> bool {
        self.hashes.insert(self.hasher.hash_one(path));
        self.made.push(0, path)
    }

    fn remove(&mut self, path: &[u8]) {
        if path.is_empty() {
            self.root_is_named = true;
        } else if !self.hashes.is_empty() {
            self.hashes.remove(&self.hasher.hash_one(path));
        }
    }

    fn contains(&self, path: &[u8]) -> bool {
        !self.hashes.is_empty() && self.hashes.contains(&self.hasher.hash_one(path))
    }
}

impl Unpacker<'_> {
    fn entry<R: BufRead>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<()> {
        let Some(place) = Place::of(&entry.path, &entry.path)? else {
            return match entry.kind {
                Kind::Directory => self.describe_directory(
                    &self.root.try_clone_to_owned().map_err(|error| {
                        Error::new(Code::Internal, "a descriptor cannot be duplicated")
                            .cause(error)
                            .fix("raise the number of open files (ulimit -n)")
                    })?,
                    entry,
                    b"",
                ),
                _ => Err(refused(&entry.path, "the root can only be a directory")),
            };
        };
        let name = place.name.to_bytes();
        if place.parent.split(|&byte| byte == b'/').any(|part| part.starts_with(b".wh..wh."))
            || aufs_metadata(name)
        {
            tracing::debug!(entry = %String::from_utf8_lossy(&entry.path), "passed over: metadata of aufs");
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.note_whiteout(&place.parent, hidden, entry);
        }
        self.reserve.take(self.root, 0, 1)?;
        let parent = self.open_parent(&place.parent, &entry.path)?;
        match entry.kind {
            Kind::Directory => self.directory(&parent, &place, entry),
            Kind::File => self.file(&parent, &place.name, entry, reader),
            Kind::HardLink => self.hard_link(&parent, &place.name, entry),
            Kind::Symlink => {
                let target = symlink_text(entry)?;
                self.replacing(&parent, &place.name, entry, "symlink", |parent, name| {
                    symlinkat(&target, parent, name)
                })?;
                self.describe_node(&parent, &place.name, entry)
            }
            Kind::Fifo => self.node(&parent, &place.name, entry, FileType::Fifo),
            Kind::CharDevice => self.node(&parent, &place.name, entry, FileType::CharacterDevice),
            Kind::BlockDevice => self.node(&parent, &place.name, entry, FileType::BlockDevice),
            Kind::Other(flag) => {
                Err(refused(&entry.path, format!("an entry of the unknown type {:?}", char::from(flag))))
            }
        }
    }

    /// Applies the whiteouts and then the directory times.
    fn finish(mut self) -> Result<Note> {
        let mut note = Note::default();
        let mut fits = self.unnamed.root_is_named || note.add(Fact::Unnamed, b"");
        self.apply_whiteouts(&mut note)?;
        let made = std::mem::take(&mut self.unnamed.made);
        let whole = made.each(|_, path| {
            fits &= !self.unnamed.contains(path) || note.add(Fact::Unnamed, path);
            Some(())
        });
        if !fits || whole.is_none() {
            return Err(too_many_names(b""));
        }
        let (directories, all) = (std::mem::take(&mut self.directories), std::mem::take(&mut self.times));
        let mut all = all.into_iter();
        let mut done = Ok(());
        let _ = directories.each(|_, path| {
            done = all.next().map_or(Ok(()), |mtime| self.set_directory_time(path, mtime));
            done.as_ref().ok().copied()
        });
        done.map(|()| note)
    }

    fn set_directory_time(&mut self, path: &[u8], mtime: Timespec) -> Result<()> {
        let times = times(mtime);
        let done = match Place::of(path, path)? {
            None => futimens(self.root, &times),
            Some(place) => match self.existing_parent(&place.parent) {
                Ok(parent) if is_directory(&parent, &place.name) => {
                    utimensat(&*parent, &place.name, &times, AtFlags::SYMLINK_NOFOLLOW)
                }
                // A later entry has replaced it.
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
                Err(errno) => Err(errno),
            },
        };
        done.map_err(|errno| failed(path, "utimensat", errno))
    }

    /// The directory of this name, made where it is missing: archives need not name every parent.
    fn open_parent(&mut self, path: &[u8], entry: &[u8]) -> Result<Rc<OwnedFd>> {
        let directory = match self.existing_parent(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => {
                self.make_parents(path, entry)?;
                self.existing_parent(path)
            }
            done => done,
        };
        directory.map_err(|errno| failed(entry, "openat2", errno))
    }

    fn existing_parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, Errno> {
        if let Some((cached, directory)) = &self.parent
            && cached == path
        {
            return Ok(Rc::clone(directory));
        }
        let directory = Rc::new(self.resolve(path)?);
        self.parent = Some((path.to_vec(), Rc::clone(&directory)));
        Ok(directory)
    }

    /// Opens a directory with links resolved inside the root.
    fn resolve(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            // A rename anywhere on the host while `..` of a link is resolved makes the kernel start over (openat2(2)).
            match openat2(self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return done,
            }
        }
    }

    fn make_parents(&mut self, path: &[u8], entry: &[u8]) -> Result<()> {
        let mut parent = self.resolve(b"").map_err(|errno| failed(entry, "openat2", errno))?;
        for (so_far, name) in names::prefixes(path) {
            let name = c_string(name, entry)?;
            match mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(entry, "mkdirat", errno)),
                Ok(()) => {
                    // Not changed by the umask or a set-group-ID parent.
                    let directory =
                        open_directory(&parent, &name).map_err(|errno| failed(entry, "openat", errno))?;
                    self.own(&directory, 0, 0, 0o755).map_err(|errno| failed(entry, "fchmod", errno))?;
                    self.reserve.take(self.root, 0, 1)?;
                    if !self.unnamed.add(so_far) {
                        return Err(too_many_names(entry));
                    }
                }
            }
            parent = self.resolve(so_far).map_err(|errno| failed(entry, "openat2", errno))?;
        }
        Ok(())
    }

    fn directory(&mut self, parent: &OwnedFd, place: &Place, entry: &Entry) -> Result<()> {
        let name = &place.name;
        if let Err(errno) = mkdirat(parent, name, Mode::RWXU) {
            let there = if errno == Errno::EXIST { stat(parent, name) } else { Err(errno) };
            let there = there.map_err(|errno| failed(&entry.path, "mkdirat", errno))?;
            if !there.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir()) {
                self.remove(parent, name, &entry.path)?;
                mkdirat(parent, name, Mode::RWXU).map_err(|errno| failed(&entry.path, "mkdirat", errno))?;
            }
        }
        let directory = open_directory(parent, name).map_err(|errno| failed(&entry.path, "openat", errno))?;
        self.describe_directory(&directory, entry, &place.path())
    }

    fn describe_directory(&mut self, directory: &OwnedFd, entry: &Entry, path: &[u8]) -> Result<()> {
        // An ordinary user must be able to write into it, and to remove it one day.
        let mode = if self.ownership == Ownership::Caller { entry.mode | 0o700 } else { entry.mode };
        self.own(directory, entry.uid, entry.gid, mode)
            .map_err(|errno| failed(&entry.path, "fchown", errno))?;
        self.set_xattrs(directory, entry)?;
        self.unnamed.remove(path);
        if !self.directories.push(0, path) {
            return Err(too_many_names(&entry.path));
        }
        self.times.push(entry.mtime);
        Ok(())
    }

    fn file<R: BufRead>(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        entry: &Entry,
        reader: &mut Reader<R>,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = self.replacing(parent, name, entry, "openat", |parent, name| {
            openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
        })?;
        let fail = |errno| failed(&entry.path, "write", errno);
        match &entry.regions {
            None => self.copy(&file, 0, entry.size, entry, reader)?,
            Some(regions) => {
                for region in regions {
                    self.copy(&file, region.offset, region.length, entry, reader)?;
                }
                ftruncate(&file, entry.size).map_err(fail)?;
            }
        }
        // Writing and changing the owner take set-user-ID bits and capabilities away, so these come after.
        if self.ownership == Ownership::Image {
            fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).map_err(fail)?;
        }
        self.set_xattrs(&file, entry)?;
        fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(fail)?;
        futimens(&file, &times(entry.mtime)).map_err(fail)
    }

    fn copy<R: BufRead>(
        &mut self,
        file: &OwnedFd,
        mut offset: u64,
        mut length: u64,
        entry: &Entry,
        reader: &mut Reader<R>,
    ) -> Result<()> {
        while length > 0 {
            let (reserve, root) = (&mut self.reserve, self.root);
            let count = reader.data(length, |mut rest| {
                reserve.take(root, rest.len() as u64, 0)?;
                while !rest.is_empty() {
                    match rustix::io::pwrite(file, rest, offset) {
                        Ok(written) => {
                            offset += written as u64;
                            rest = &rest[written..];
                        }
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(failed(&entry.path, "write", errno)),
                    }
                }
                Ok(())
            })?;
            length -= count;
        }
        Ok(())
    }

    /// A second name of a file of this layer. The target's last component is not followed, so the link is to what the
    /// layer holds there, be it a symbolic link.
    fn hard_link(&mut self, parent: &Rc<OwnedFd>, name: &CStr, entry: &Entry) -> Result<()> {
        let target = Place::of(&entry.link, &entry.path)?
            .ok_or_else(|| refused(&entry.path, "a hard link to the root"))?;
        let missing = || {
            refused(
                &entry.path,
                format!(
                    "a hard link to {:?}, which the layer does not hold",
                    String::from_utf8_lossy(&entry.link)
                ),
            )
        };
        let directory = self.existing_parent(&target.parent).map_err(|_| missing())?;
        let there = stat(&directory, &target.name).ok().flatten().ok_or_else(missing)?;
        if FileType::from_raw_mode(there.st_mode).is_dir() {
            return Err(refused(&entry.path, "a hard link to a directory"));
        }
        if is_whiteout(&there) {
            return Err(missing());
        }
        if let Ok(Some(already)) = stat(parent, name)
            && (already.st_dev, already.st_ino) == (there.st_dev, there.st_ino)
        {
            return Ok(());
        }
        self.replacing(parent, name, entry, "linkat", |parent, name| {
            linkat(&*directory, &target.name, parent, name, AtFlags::empty())
        })
    }

    fn node(&mut self, parent: &OwnedFd, name: &CStr, entry: &Entry, kind: FileType) -> Result<()> {
        let device = if kind == FileType::Fifo { 0 } else { makedev(entry.device.0, entry.device.1) };
        let made = if kind != FileType::Fifo && self.ownership == Ownership::Caller {
            Err(Errno::PERM)
        } else {
            self.remove_if_there(parent, name, entry)?;
            mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)
        };
        match made {
            // Only root makes devices; a container has those that it is given, so it misses nothing.
            Err(Errno::PERM) if kind != FileType::Fifo => {
                tracing::debug!(entry = %String::from_utf8_lossy(&entry.path), "passed over: a device node");
                Ok(())
            }
            Err(errno) => Err(failed(&entry.path, "mknodat", errno)),
            Ok(()) => self.describe_node(parent, name, entry),
        }
    }

    /// Owner, mode and time of what cannot be opened. Attributes are only on files and directories: the kernel refuses
    /// `user.*` elsewhere (xattr(7)), and a capability makes no sense there.
    fn describe_node(&self, parent: &OwnedFd, name: &CStr, entry: &Entry) -> Result<()> {
        let fail = |errno| failed(&entry.path, "fchownat", errno);
        if self.ownership == Ownership::Image {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        }
        if entry.kind != Kind::Symlink {
            // Only this process uses its temporary directory, so no link can appear here meanwhile.
            rustix::fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                .map_err(fail)?;
        }
        utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(fail)
    }

    /// Makes something that must not be there yet; what an earlier entry made gives way, as with every engine.
    fn replacing<T>(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        entry: &Entry,
        call: &str,
        make: impl Fn(&OwnedFd, &CStr) -> rustix::io::Result<T>,
    ) -> Result<T> {
        let made = match make(parent, name) {
            Err(Errno::EXIST) => {
                self.remove(parent, name, &entry.path)?;
                make(parent, name)
            }
            done => done,
        };
        made.map_err(|errno| failed(&entry.path, call, errno))
    }

    fn remove_if_there(&mut self, parent: &OwnedFd, name: &CStr, entry: &Entry) -> Result<()> {
        match stat(parent, name) {
            Ok(None) => Ok(()),
            Ok(Some(_)) => self.remove(parent, name, &entry.path),
            Err(errno) => Err(failed(&entry.path, "fstatat", errno)),
        }
    }

    fn remove(&mut self, parent: &OwnedFd, name: &CStr, entry: &[u8]) -> Result<()> {
        // The open parent may be what goes, or lie beneath it, or its name may have led over it.
        self.parent = None;
        tree::remove(parent, name).map_err(|errno| failed(entry, "unlinkat", errno))
    }

    fn set_xattrs(&mut self, file: &OwnedFd, entry: &Entry) -> Result<()> {
        for (name, value) in &entry.xattrs {
            let set = if is_allowed_xattr(name) {
                self.reserve.take(self.root, value.len() as u64, 0)?;
                fsetxattr(file, c_string(name, &entry.path)?, value, XattrFlags::empty())
            } else {
                Err(Errno::PERM)
            };
            match set {
                Ok(()) => {}
                // Not allowed for images, for this user, or on this filesystem.
                Err(Errno::PERM | Errno::OPNOTSUPP) => tracing::debug!(
                    entry = %String::from_utf8_lossy(&entry.path),
                    name = %String::from_utf8_lossy(name),
                    "passed over: an extended attribute"
                ),
                Err(errno) => return Err(self.xattr_failed(entry, name, value.len(), errno)),
            }
        }
        Ok(())
    }

    /// ext4 holds the attributes of a file in its inode and one block, and answers ENOSPC where they do not fit (xattr(7)): that
    /// is a full filesystem only where there are no free blocks.
    fn xattr_failed(&self, entry: &Entry, name: &[u8], length: usize, errno: Errno) -> Error {
        let has_room = || fstatvfs(self.root).is_ok_and(|space| room(&space).0 > 2 * length as u64);
        if !matches!(errno, Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)
            || errno == Errno::NOSPC && !has_room()
        {
            return failed(&entry.path, "fsetxattr", errno);
        }
        let shown: String = String::from_utf8_lossy(&entry.path).chars().take(200).collect();
        let what =
            format!("an extended attribute of {shown:?} of a layer does not fit on the store's filesystem");
        Error::new(Code::Store, what)
            .cause(format!("{} has {length} bytes: fsetxattr: {errno}", String::from_utf8_lossy(name)))
            .fix("put the store (GPURUN_STORE) on a filesystem with large attributes such as xfs")
    }

    fn own(&self, directory: &OwnedFd, uid: u32, gid: u32, mode: u32) -> rustix::io::Result<()> {
        if self.ownership == Ownership::Image {
            fchown(directory, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        fchmod(directory, Mode::from_raw_mode(mode))
    }
}

fn symlink_text(entry: &Entry) -> Result<CString> {
    if entry.link.is_empty() || entry.link.len() > MAX_PATH {
        return Err(refused(&entry.path, "a symbolic link to nothing or to a name that is too long"));
    }
    c_string(&entry.link, &entry.path)
}

fn open_directory(parent: impl AsFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, tree::DIRECTORY, Mode::empty())
}

fn stat(parent: impl AsFd, name: &CStr) -> rustix::io::Result<Option<Stat>> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        done => done.map(Some),
    }
}

fn is_directory(parent: impl AsFd, name: &CStr) -> bool {
    matches!(stat(parent, name), Ok(Some(stat)) if FileType::from_raw_mode(stat.st_mode).is_dir())
}

/// A character device 0:0 is overlayfs' whiteout.
fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == makedev(0, 0)
}

fn times(mtime: Timespec) -> Timestamps {
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: mtime }
}
