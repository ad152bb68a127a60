//! The mounts over a container's root, and lookup of paths through them.
//!
//! The launcher, the runtime, the prestart hook and the CDI hook share [`Mounts`]. The launcher fills it from the options,
//! the runtime from config.json, and both hooks from /proc/PID/mountinfo.

use super::{Found, Layers, Resolved};
use crate::formats::mountinfo;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::OsStr,
    path::{Path, PathBuf},
};

/// The mounts of a container, in the order in which they are made: a later one lies on an earlier one.
#[derive(Debug, Default)]
pub struct Mounts(Vec<Mounted>);

#[derive(Debug)]
struct Mounted {
    /// The mount point, without links.
    path: PathBuf,
    kind: Kind,
    read_only: bool,
}

/// The kind of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Files of the host or of another container. Nothing is written there.
    Volume {
        /// The root of the mount as this process can open it; `None` if unknown.
        source: Option<PathBuf>,
    },
    /// An empty file system that belongs to this container alone.
    Memory,
    /// A file system of the kernel: proc, sysfs, cgroup, devpts.
    Kernel,
}

/// What is known of the mounts outside a container's namespace. A tmpfs there is a volume, and another one is the container's own.
#[derive(Debug, Clone, Copy)]
pub enum Outside<'a> {
    /// The host's mount table: the container's own tmpfs is not in it.
    Host(&'a [u8]),
    /// Nothing. The container's own tmpfs is mounted as a whole, and only beneath the root.
    Unknown,
    /// A container tool without privileges has made this namespace, and the root in it. Its own tmpfs holds the root's mount point
    /// (Apptainer's session directory), or is mounted as a whole.
    Tool,
}

/// A directory of a container, which may not exist yet.
#[derive(Debug, Clone)]
pub struct DirectoryPlace {
    path: PathBuf,
    ended: bool,
    below: PathBuf,
}

/// The result of looking up a path of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The container's own root.
    Root {
        /// The path without links. If it is absent, it can be made.
        path: PathBuf,
    },
    /// The container's own file system in memory.
    Memory {
        /// The path without links.
        path: PathBuf,
        /// Whether it is the mount point itself.
        is_mount_point: bool,
    },
    /// A volume.
    Volume {
        /// The path without links.
        path: PathBuf,
        /// The object on the volume; `None` if nothing exists, or a link of the volume is on the way.
        found: Option<FileType>,
        /// Device numbers of the object; 0 unless it is a device node.
        device: u64,
        /// Whether it is the mount point itself.
        is_mount_point: bool,
    },
    /// The path does not exist and cannot be made: a file is in place of a directory, links form a loop, or a file system of the
    /// kernel or a read-only one in memory is there.
    Nowhere,
}

impl Place {
    /// The path without links, if it exists or can be made.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Root { path } | Self::Memory { path, .. } | Self::Volume { path, .. } => Some(path),
            Self::Nowhere => None,
        }
    }
}

impl Mounts {
    /// Adds a mount. Links to its mount point are resolved in the root, as runtimes do.
    pub fn add(&mut self, root: &Layers, mount_point: &Path, kind: Kind, read_only: bool) {
        let Some(resolved) = self.resolve(root, mount_point) else { return };
        self.0.push(Mounted { path: below(&resolved.path, &resolved.below), kind, read_only });
    }

    /// What is mounted in the root at `root`, as the mount table of a namespace has it. `view` is the directory by which this
    /// process sees that namespace's `/`.
    ///
    /// Before the root is changed the namespace's table has the host's mounts too, and a volume comes from one of them.
    pub fn of_namespace(table: &[u8], root: &Path, view: &Path, outside: Outside<'_>) -> Self {
        let entries: Vec<_> = mountinfo::entries(table).collect();
        let of_host: HashSet<_> = match outside {
            Outside::Host(table) => mountinfo::entries(table).map(|entry| entry.device).collect(),
            Outside::Unknown | Outside::Tool => HashSet::new(),
        };
        let is_own = |entry: &mountinfo::Entry| {
            let mut same = entries.iter().filter(|other| other.device == entry.device);
            match outside {
                Outside::Host(_) => !of_host.contains(&entry.device),
                Outside::Unknown => {
                    entry.root == Path::new("/") && same.all(|other| other.mount_point.starts_with(root))
                }
                Outside::Tool => {
                    same.any(|other| other.root == Path::new("/") && root.starts_with(&other.mount_point))
                        || entry.root == Path::new("/")
                }
            }
        };
        let mounted = |entry: &mountinfo::Entry| {
            let path = entry.mount_point.strip_prefix(root).ok().filter(|path| *path != Path::new(""))?;
            let kind = match entry.filesystem.as_str() {
                "tmpfs" if is_own(entry) => Kind::Memory,
                "proc" | "sysfs" | "cgroup" | "cgroup2" | "devpts" | "mqueue" => Kind::Kernel,
                _ => Kind::Volume {
                    source: Some(
                        view.join(entry.mount_point.strip_prefix("/").unwrap_or(&entry.mount_point)),
                    ),
                },
            };
            Some(Mounted { path: Path::new("/").join(path), kind, read_only: entry.read_only })
        };
        Self(entries.iter().filter_map(mounted).collect())
    }

    /// Looks up a path; follows a link in the last component.
    pub fn place(&self, root: &Layers, path: &Path) -> Place {
        self.resolve(root, path).filter(|resolved| resolved.is_open).map_or(Place::Nowhere, |resolved| {
            self.judge(&below(&resolved.path, &resolved.below), resolved.ended)
        })
    }

    /// Looks up a name in a directory; does not follow a link in the last component, which is to be replaced.
    pub fn place_of_entry(&self, root: &Layers, path: &Path) -> Place {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Place::Nowhere };
        self.directory(root, parent).map_or(Place::Nowhere, |directory| self.place_in(&directory, name))
    }

    /// Looks up a directory, to look up several names in it. `None` if it cannot be a directory.
    pub fn directory(&self, root: &Layers, path: &Path) -> Option<DirectoryPlace> {
        let Resolved { path, ended, below, is_open, found } = self.resolve(root, path)?;
        let is_directory = matches!(found, None | Some(Found::Directory(_)));
        (is_open && is_directory).then_some(DirectoryPlace { path, ended, below })
    }

    /// Looks up a name in a directory.
    pub fn place_in(&self, directory: &DirectoryPlace, name: &OsStr) -> Place {
        let DirectoryPlace { path, ended, below } = directory;
        if *ended {
            return self.judge(&self::below(path, below).join(name), true);
        }
        let path = path.join(name);
        let ended = self.at(&path).is_some();
        self.judge(&path, ended)
    }

    fn resolve(&self, root: &Layers, path: &Path) -> Option<Resolved> {
        root.resolve(path, |here| self.at(here).is_some())
    }

    /// The topmost mount at exactly this path.
    fn at(&self, path: &Path) -> Option<&Mounted> {
        self.0.iter().rfind(|mount| mount.path == path)
    }

    /// `ended`: a mount is there or above.
    fn judge(&self, path: &Path, ended: bool) -> Place {
        let path = path.to_path_buf();
        if !ended {
            return Place::Root { path };
        }
        // Mounts may be nested.
        let Some(mount) = path.ancestors().find_map(|above| self.at(above)) else { return Place::Nowhere };
        let is_mount_point = mount.path == path;
        match &mount.kind {
            Kind::Kernel => Place::Nowhere,
            Kind::Memory if mount.read_only && !is_mount_point => Place::Nowhere,
            Kind::Memory => Place::Memory { path, is_mount_point },
            Kind::Volume { source } => {
                let below = path.strip_prefix(&mount.path).unwrap_or(Path::new(""));
                let (found, device) = source.as_deref().and_then(|source| seen(source, below)).unzip();
                Place::Volume { path: path.clone(), found, device: device.unwrap_or(0), is_mount_point }
            }
        }
    }
}

/// Joins two paths. `Path::join` would add a slash for an empty path.
fn below(path: &Path, below: &Path) -> PathBuf {
    if below == Path::new("") { path.into() } else { path.join(below) }
}

/// Looks up a path below the root of a volume.
fn seen(source: &Path, below: &Path) -> Option<(FileType, u64)> {
    let open = || {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let source = rustix::fs::openat(CWD, source, flags, Mode::empty())?;
        if below == Path::new("") {
            return Ok(source);
        }
        // A link of a volume leads to a path of the container, which is not looked up here.
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        loop {
            match rustix::fs::openat2(&source, below, flags, Mode::empty(), how) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    };
    let stat = open().and_then(rustix::fs::fstat).ok()?;
    Some((FileType::from_raw_mode(stat.st_mode), stat.st_rdev))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn a_tmpfs_is_the_containers_own_unless_it_comes_from_outside() {
        let host = b"1 0 8:1 / / rw - ext4 a rw\n2 1 0:5 / /run rw - tmpfs t rw\n";
        let table = b"2 1 0:5 / /run rw - tmpfs t rw\n3 1 0:9 / /session rw - tmpfs t rw\n\
                      4 3 0:9 /dev /session/final/dev rw - tmpfs t rw\n5 3 0:5 /x /session/final/x rw - tmpfs t rw\n\
                      6 3 0:7 / /session/final/own rw - tmpfs t rw\n";
        let layers = Layers::open(vec![tempfile::tempdir().unwrap().keep()]).unwrap();
        let own = |outside: Outside<'_>| {
            let mounts =
                Mounts::of_namespace(table, Path::new("/session/final"), Path::new("/nowhere"), outside);
            ["/dev/file", "/x/file", "/own/file"]
                .map(|path| matches!(mounts.place(&layers, Path::new(path)), Place::Memory { .. }))
        };
        assert_eq!(own(Outside::Host(host)), [true, false, true]);
        assert_eq!(own(Outside::Unknown), [false, false, true]);
        assert_eq!(own(Outside::Tool), [true, false, true]);
    }

    #[test]
    fn a_path_is_on_the_root_in_memory_on_a_volume_or_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (root, volume) = (dir.path().join("root"), dir.path().join("volume"));
        for path in ["root/usr/local", "root/etc", "root/opt/real", "volume/nvidia", "volume/deep"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(root.join("file"), "").unwrap();
        fs::write(volume.join("ld.so.cache"), "").unwrap();
        symlink("/opt/real", root.join("link")).unwrap();
        symlink("/opt/absent/deep", root.join("dangling")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("/data/deep", root.join("to-volume")).unwrap();
        symlink("..", volume.join("up")).unwrap();
        let layers = Layers::open(vec![root]).unwrap();
        let mut mounts = Mounts::default();
        let volumes = |source: &Path| Kind::Volume { source: Some(source.into()) };
        mounts.add(&layers, Path::new("/proc"), Kind::Kernel, false);
        mounts.add(&layers, Path::new("/data"), volumes(&volume), false);
        mounts.add(&layers, Path::new("/memory"), Kind::Memory, false);
        mounts.add(&layers, Path::new("/sealed"), Kind::Memory, true);
        mounts.add(&layers, Path::new("/link/in"), Kind::Memory, false);
        mounts.add(&layers, Path::new("/data/deep/in"), Kind::Memory, false);
        let root = |path: &str| Place::Root { path: path.into() };
        let memory = |path: &str, is_mount_point| Place::Memory { path: path.into(), is_mount_point };
        let volume = |path: &str, found, is_mount_point| Place::Volume {
            path: path.into(),
            found,
            device: 0,
            is_mount_point,
        };
        for (path, place) in [
            ("/usr/local/nvidia", root("/usr/local/nvidia")),
            ("/a/b/c", root("/a/b/c")),
            ("/link/x", root("/opt/real/x")),
            ("/dangling/x", root("/opt/absent/deep/x")),
            ("/file", root("/file")),
            ("/file/x", Place::Nowhere),
            ("/loop/x", Place::Nowhere),
            ("/proc/driver", Place::Nowhere),
            ("/data", volume("/data", Some(FileType::Directory), true)),
            ("/data/nvidia", volume("/data/nvidia", Some(FileType::Directory), false)),
            ("/data/absent/x", volume("/data/absent/x", None, false)),
            ("/data/up/volume/nvidia", volume("/data/up/volume/nvidia", None, false)),
            ("/to-volume", volume("/data/deep", Some(FileType::Directory), false)),
            ("/memory", memory("/memory", true)),
            ("/memory/x/y", memory("/memory/x/y", false)),
            ("/sealed/x", Place::Nowhere),
            ("/opt/real/in/x", memory("/opt/real/in/x", false)),
            ("/to-volume/in/x", memory("/data/deep/in/x", false)),
        ] {
            assert_eq!(mounts.place(&layers, Path::new(path)), place, "{path}");
        }
        for (path, place) in [
            ("/link", root("/link")),
            ("/dangling", root("/dangling")),
            ("/dangling/x", root("/opt/absent/deep/x")),
            ("/data/ld.so.cache", volume("/data/ld.so.cache", Some(FileType::RegularFile), false)),
            ("/memory", memory("/memory", true)),
            ("/memory/x", memory("/memory/x", false)),
            ("/file/x", Place::Nowhere),
            ("/", Place::Nowhere),
        ] {
            assert_eq!(mounts.place_of_entry(&layers, Path::new(path)), place, "{path}");
        }
    }
}
