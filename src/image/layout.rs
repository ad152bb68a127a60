//! Where an image's files come from: a directory, or the members of a tar archive.

use super::{
    compression::{self, Compression, decompressor},
    progress::Unpacking,
    registry::Progress,
    store::{Filler, Store},
    tar::{Entry, Kind, Reader},
    unpack::MAX_PATH,
};
use crate::{
    error::{Code, Error, Result},
    regular_file,
};
use rustix::{
    fd::OwnedFd,
    fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    cell::RefCell,
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Seek},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::Arc,
};

/// The longest JSON document of an image, in bytes. Registries refuse manifests above 4 MiB; configurations with a long
/// history are larger now and then.
pub const MAX_DOCUMENT: u64 = 8 << 20;
/// An image has a member or two for each layer; `docker save` of many images has a few hundred.
const MAX_MEMBERS: usize = 100_000;
/// The bound on the members' names in memory, in bytes: 160 for each of [`MAX_MEMBERS`].
const MAX_NAMES: usize = 16 << 20;

/// Which version of an image was read: one that has the same is not read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Version {
    /// Of the archive or the index.
    File(Stamp),
    /// What its keeper calls it.
    Id(String),
}

/// A file as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Version {
    /// Of the file of this name as it is now; `None` if there is none to be read.
    pub fn of_file(path: &Path) -> Option<Self> {
        let file = path.metadata().ok()?;
        Some(Self::File(Stamp {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            mtime: (file.mtime(), file.mtime_nsec()),
            ctime: (file.ctime(), file.ctime_nsec()),
        }))
    }

    /// Whether a change right after this one would show: file times move in steps of up to 10 ms (CONFIG_HZ=100).
    pub fn is_settled(&self) -> bool {
        let Self::File(stamp) = self else { return true };
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        let changed = nanos(stamp.ctime.0, stamp.ctime.1);
        nanos(now.tv_sec, now.tv_nsec) - changed > 50_000_000
    }
}

/// The files of an image.
#[derive(Debug)]
pub enum Layout {
    /// Below a directory, which no name leaves.
    Directory(OwnedFd),
    /// In a tar file, each at its place.
    Archive {
        /// The tar file, inflated.
        file: Arc<File>,
        /// What it holds, by name without `./` in front.
        members: HashMap<String, Member>,
    },
}

/// What a name of an archive stands for.
#[derive(Debug)]
pub enum Member {
    /// Bytes of the tar file.
    File {
        /// From here on.
        offset: u64,
        /// So many.
        size: u64,
    },
    /// Another member: `docker save` once wrote a layer that two images share as a link.
    Link(String),
}

impl Layout {
    /// An OCI image layout (OCI image specification, image-layout.md).
    pub fn directory(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat(CWD, path, flags, Mode::empty()) {
            Ok(directory) => Ok(Self::Directory(directory)),
            Err(errno @ (Errno::NOENT | Errno::NOTDIR)) => {
                Err(Error::new(Code::ImageNotFound, format!("there is no directory {}", path.display()))
                    .cause(errno)
                    .fix("oci: takes the directory that holds index.json; a tar file is oci-archive:FILE"))
            }
            Err(errno) => {
                Err(Error::new(Code::ImageNotFound, format!("{} cannot be opened", path.display()))
                    .cause(errno)
                    .fix(format!("ls -ld {}", path.display())))
            }
        }
    }

    /// A tar archive. One that is compressed is inflated into an unnamed file of the store, since its members are read in
    /// another order than they lie.
    pub fn archive(path: &Path, store: &Store, progress: Progress) -> Result<Self> {
        let refused = |cause: &dyn std::fmt::Display| {
            Error::new(Code::ImageNotFound, format!("{} cannot be opened", path.display()))
                .cause(cause)
                .fix("name a file that `docker save`, `podman save` or `skopeo copy` wrote; a directory is oci:DIR or rootfs:DIR")
        };
        let found = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let found = found.map_err(|errno| refused(&errno))?;
        let (file, stat) = regular_file::open(&found).map_err(|error| refused(&error))?;
        let unreadable = |error: &dyn std::fmt::Display| {
            Error::new(Code::ImageBroken, format!("{} cannot be read", path.display()))
                .cause(error)
                .fix("check the disk or the network filesystem that it is on (`dmesg`)")
        };
        let mut head = [0; compression::HEAD];
        let length = file.read_at(&mut head, 0).map_err(|error| unreadable(&error))?;
        let layout = if Compression::of(&head[..length]) == Compression::None {
            Self::archive_of(file)
        } else {
            let what = format!("decompressing {}", path.display());
            let unpacking = Unpacking::start(what, u64::try_from(stat.st_size).ok(), progress);
            Self::inflate(unpacking.count(file), store)
        };
        layout.map_err(|error| {
            error.context(format!("{} cannot be read as an image", path.display())).fix(
                "save it again: docker save -o FILE IMAGE, or skopeo copy docker://IMAGE oci-archive:FILE",
            )
        })
    }

    /// Decompresses an archive and indexes it in one pass, up to its end.
    fn inflate(compressed: impl Read, store: &Store) -> Result<Self> {
        let stream = decompressor(BufReader::with_capacity(256 << 10, compressed))?;
        let mut inflated = store.unnamed_file()?;
        let failure = RefCell::new(None);
        let copied = Copied { stream, to: store.filler(&mut inflated), written: 0, failure: &failure };
        let mut reader = Reader::new(BufReader::with_capacity(256 << 10, copied));
        let found = members(|| {
            let Some(entry) = reader.next_entry()? else { return Ok(None) };
            let position =
                |source: &BufReader<Copied<'_, _>>| source.get_ref().written - source.buffer().len() as u64;
            let offset = reader.read_past_data(position)?;
            Ok(Some((entry, offset)))
        });
        drop(reader);
        // On a full disk the archive only seems to be broken.
        let members = failure.into_inner().map_or(found, Err)?;
        Ok(Self::Archive { members, file: Arc::new(inflated) })
    }

    /// A tar archive that is not compressed.
    pub fn archive_of(mut file: File) -> Result<Self> {
        file.rewind().map_err(|error| {
            Error::new(Code::ImageBroken, "the archive cannot be read from its start")
                .cause(error)
                .fix("name a regular file: `docker-archive:FILE`, `oci-archive:FILE`")
        })?;
        let mut reader = Reader::new(&file);
        let members = members(|| {
            let Some(entry) = reader.next_entry()? else { return Ok(None) };
            let offset = reader.skip_data()?;
            Ok(Some((entry, offset)))
        })?;
        Ok(Self::Archive { members, file: Arc::new(file) })
    }

    /// The file of this name, to be read from its start.
    pub fn open(&self, name: &str) -> Result<Section> {
        let missing = || {
            Error::new(Code::ImageBroken, format!("the image lacks its file {name:?}"))
                .fix("copy or save the image again: `skopeo copy`, `docker save -o FILE NAME`")
        };
        match self {
            Self::Directory(directory) => {
                let found = look_beneath(directory, name).map_err(|errno| match errno {
                    Errno::NOENT => missing(),
                    _ => unreadable(name, errno),
                })?;
                let (file, stat) = regular_file::open(&found).map_err(|error| unreadable(name, error))?;
                let end = u64::try_from(stat.st_size).unwrap_or(0);
                Ok(Section { file: Arc::new(file), offset: 0, end })
            }
            Self::Archive { file, members } => {
                let mut name = normal(name);
                // A link to a link is one more than docker ever wrote.
                for _ in 0..3 {
                    match members.get(&name).ok_or_else(missing)? {
                        Member::Link(target) => name.clone_from(target),
                        Member::File { offset, size } => {
                            let end = offset.checked_add(*size).ok_or_else(missing)?;
                            return Ok(Section { file: Arc::clone(file), offset: *offset, end });
                        }
                    }
                }
                Err(missing().cause("its name leads round in links"))
            }
        }
    }

    /// Whether there is something of this name.
    ///
    /// # Errors
    /// [`Code::ImageBroken`] if that cannot be checked, for example without read permission.
    pub fn has(&self, name: &str) -> Result<bool> {
        match self {
            Self::Archive { members, .. } => Ok(members.contains_key(&normal(name))),
            Self::Directory(directory) => match look_beneath(directory, name) {
                Ok(_) => Ok(true),
                Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
                Err(errno) => Err(unreadable(name, errno)),
            },
        }
    }

    /// A JSON document, whole.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let mut section = self.open(name)?;
        let length = section.length();
        if length > MAX_DOCUMENT {
            return Err(Error::new(Code::ImageBroken, format!("{name:?} of the image has {length} bytes"))
                .cause(format!("a document of at most {MAX_DOCUMENT} bytes makes sense there"))
                .fix("rebuild the image with fewer LABEL and ENV lines in its Dockerfile"));
        }
        let mut bytes = Vec::new();
        section.read_to_end(&mut bytes).map_err(|error| unreadable(name, error))?;
        Ok(bytes)
    }
}

/// Part of a file. It is read at its offsets, so several threads may read one file.
#[derive(Debug)]
pub struct Section {
    file: Arc<File>,
    offset: u64,
    end: u64,
}

impl Section {
    /// In bytes.
    pub fn length(&self) -> u64 {
        self.end - self.offset
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.length()).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

fn look_beneath(directory: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat2(directory, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
}

fn unreadable(name: &str, cause: impl std::fmt::Display) -> Error {
    Error::new(Code::ImageBroken, format!("the image's file {name:?} cannot be read"))
        .cause(cause)
        .fix("make it readable for the user who runs gpurun: chmod -R u+rX DIRECTORY")
}

/// A reader that also writes all bytes to a file.
struct Copied<'a, R> {
    stream: R,
    to: Filler<'a>,
    /// The number of bytes that were read and written.
    written: u64,
    /// The reason for a failed write, because an [`io::Error`] cannot carry it.
    failure: &'a RefCell<Option<Error>>,
}

impl<R: Read> Read for Copied<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        if let Err(error) = self.to.write(&buffer[..count]) {
            let shown = io::Error::other(error.what().to_owned());
            self.failure.replace(Some(error));
            return Err(shown);
        }
        self.written += count as u64;
        Ok(count)
    }
}

/// Indexes the members of a tar file. `next` returns an entry and the offset of its data, and skips the data.
fn members(mut next: impl FnMut() -> Result<Option<(Entry, u64)>>) -> Result<HashMap<String, Member>> {
    let too_much = |what: String| {
        Error::new(Code::ImageBroken, what)
            .fix("name an archive that `docker save`, `podman save` or `skopeo copy` wrote")
    };
    let mut members = HashMap::new();
    let mut names = 0;
    while let Some((entry, offset)) = next()? {
        // No document can name what is longer.
        if entry.path.len().max(entry.link.len()) > MAX_PATH {
            return Err(too_much(format!(
                "an archive with a name of more than {MAX_PATH} bytes is not an image"
            )));
        }
        let name = normal(&String::from_utf8_lossy(&entry.path));
        let link = || String::from_utf8_lossy(&entry.link).into_owned();
        let member = match entry.kind {
            Kind::File if entry.regions.is_none() => Member::File { offset, size: entry.size },
            Kind::HardLink => Member::Link(normal(&link())),
            Kind::Symlink => {
                let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                Member::Link(normal(&format!("{directory}/{}", link())))
            }
            _ => continue,
        };
        names += name.len() + if let Member::Link(target) = &member { target.len() } else { 0 };
        members.insert(name, member);
        if members.len() > MAX_MEMBERS {
            return Err(too_much(format!("an archive of more than {MAX_MEMBERS} members is not an image")));
        }
        if names > MAX_NAMES {
            return Err(too_much(format!(
                "an archive whose names have more than {MAX_NAMES} bytes is not an image"
            )));
        }
    }
    Ok(members)
}

/// A member's name without what does not count; `..` takes back what is before it. Nothing on disk is meant by it.
fn normal(name: &str) -> String {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
