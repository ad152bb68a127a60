//! Whiteouts: names of lower layers that this layer removes (OCI image specification, layer.md, "Whiteouts").
//!
//! They do not affect entries of the layer itself, before or after them in the archive. So they are collected, and applied
//! after all other entries. Paths below a removed directory need no whiteouts: kaniko writes them, in any order, and a
//! directory made to hold them would bring the removed one back.

use super::{Unpacker, c_string, failed, is_whiteout, names, open_directory, refused, stat, too_many_names};
use crate::{
    error::{Code, Error, Result},
    image::{
        note::{Fact, Note},
        tar::Entry,
    },
};
use rustix::{
    fd::OwnedFd,
    fs::{FileType, Mode, XattrFlags, fsetxattr, makedev, mkdirat, mknodat},
    io::Errno,
};
use std::{collections::HashSet, ffi::CStr, hash::BuildHasher};

/// Removes the name.
const NAME: u8 = b'n';
/// Removes all that lower layers have in the directory.
const CONTENT: u8 = b'c';

impl Unpacker<'_> {
    /// Records the whiteout `.wh.HIDDEN` in the directory `parent`, to be applied at the end.
    pub fn note_whiteout(&mut self, parent: &[u8], hidden: &[u8], entry: &Entry) -> Result<()> {
        let noted = match hidden {
            b"" | b"." | b".." => return Err(refused(&entry.path, "a whiteout of no name")),
            b".wh..opq" => self.whiteouts.push(CONTENT, parent),
            _ => self.whiteouts.push(NAME, &names::join(parent, hidden)),
        };
        if noted { Ok(()) } else { Err(too_many_names(&entry.path)) }
    }

    pub fn apply_whiteouts(&mut self, note: &mut Note) -> Result<()> {
        let list = std::mem::take(&mut self.whiteouts);
        let mut whiteouts = Whiteouts { made: HashSet::new(), last: None, note };
        let mut done = Ok(());
        let whole = list.each(|kind, path| {
            done = whiteouts.apply(self, kind, path);
            done.as_ref().ok().copied()
        });
        done?;
        whole.ok_or_else(|| too_many_names(b""))
    }

    /// Makes the directory opaque, so that only this layer's content shows.
    fn set_opaque(&self, directory: &OwnedFd) -> Result<()> {
        let attribute = self.ownership.opaque();
        fsetxattr(directory, attribute, b"y", XattrFlags::empty()).map_err(|errno| {
            Error::new(Code::Store, "the image store's filesystem takes no overlay attributes")
                .cause(format!("fsetxattr {}: {errno}", attribute.to_string_lossy()))
                .fix("put the store (GPURUN_STORE) on a local filesystem such as ext4, xfs or btrfs")
        })
    }
}

struct Whiteouts<'a> {
    /// Hashes of the directories that were made only for whiteouts.
    made: HashSet<u64>,
    /// The last directory that was recorded as holding whiteouts.
    last: Option<Vec<u8>>,
    note: &'a mut Note,
}

impl Whiteouts<'_> {
    fn apply(&mut self, unpacker: &mut Unpacker<'_>, kind: u8, path: &[u8]) -> Result<()> {
        if kind == CONTENT {
            return match self.directory(unpacker, path)? {
                Some(directory) => {
                    let own =
                        open_directory(&directory, c".").map_err(|errno| failed(path, "openat", errno))?;
                    unpacker.set_opaque(&own)
                }
                None => Ok(()),
            };
        }
        let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], path),
        };
        let name = c_string(name, path)?;
        let Some(directory) = self.directory(unpacker, parent)? else { return Ok(()) };
        match stat(&directory, &name).map_err(|errno| failed(path, "fstatat", errno))? {
            None => {}
            Some(there) if !FileType::from_raw_mode(there.st_mode).is_dir() => return Ok(()),
            Some(_) if self.made.contains(&unpacker.unnamed.hasher.hash_one(path)) => {
                // The directory holds only whiteouts, so it is removed.
                unpacker.remove(&directory, &name, path)?;
            }
            Some(_) => {
                // Removed and made again: it must not show content of the directory below.
                unpacker.unnamed.remove(path);
                let own = open_directory(&directory, &name).map_err(|errno| failed(path, "openat", errno))?;
                return unpacker.set_opaque(&own);
            }
        }
        unpacker.reserve.take(unpacker.root, 0, 1)?;
        make(&directory, &name, path)?;
        if !parent.is_empty() && self.last.as_deref() != Some(parent) {
            self.last = Some(parent.to_vec());
            if !self.note.add(Fact::Hides, parent) {
                return Err(too_many_names(path));
            }
        }
        Ok(())
    }

    /// Opens the directory, and makes it if the layer does not have it. `None` if no lower layer can show through there.
    fn directory(
        &mut self,
        unpacker: &mut Unpacker<'_>,
        path: &[u8],
    ) -> Result<Option<std::rc::Rc<OwnedFd>>> {
        match unpacker.existing_parent(path) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            done => return done.map(Some).map_err(|errno| failed(path, "openat2", errno)),
        }
        let mut parent = unpacker.resolve(b"").map_err(|errno| failed(path, "openat2", errno))?;
        for (so_far, name) in names::prefixes(path) {
            let name = c_string(name, path)?;
            match stat(&parent, &name).map_err(|errno| failed(path, "fstatat", errno))? {
                None => {
                    mkdirat(&parent, &name, Mode::RWXU).map_err(|errno| failed(path, "mkdirat", errno))?;
                    let made =
                        open_directory(&parent, &name).map_err(|errno| failed(path, "openat", errno))?;
                    unpacker.own(&made, 0, 0, 0o755).map_err(|errno| failed(path, "fchmod", errno))?;
                    unpacker.reserve.take(unpacker.root, 0, 1)?;
                    self.made.insert(unpacker.unnamed.hasher.hash_one(so_far));
                    if !self.note.add(Fact::Whiteouts, so_far) {
                        return Err(too_many_names(path));
                    }
                }
                Some(there) if is_whiteout(&there) => return Ok(None),
                Some(_) => {}
            }
            parent = match unpacker.resolve(so_far) {
                // A file of this layer, or a dangling link in it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                done => done.map_err(|errno| failed(path, "openat2", errno))?,
            };
        }
        unpacker.existing_parent(path).map(Some).map_err(|errno| failed(path, "openat2", errno))
    }
}

fn make(parent: &OwnedFd, name: &CStr, path: &[u8]) -> Result<()> {
    match mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)) {
        Ok(()) => Ok(()),
        Err(errno @ (Errno::PERM | Errno::OPNOTSUPP)) => {
            Err(Error::new(Code::Store, "the image store's filesystem takes no whiteouts")
                .cause(format!("mknodat: {errno}"))
                .fix(
                    "put the store (GPURUN_STORE) on a local filesystem such as ext4, xfs or btrfs; \
                      without root the kernel must be 5.11 or newer",
                ))
        }
        Err(errno) => Err(failed(path, "mknodat", errno)),
    }
}
