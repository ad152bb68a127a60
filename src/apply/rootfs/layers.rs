//! Reads a root through its layers, by the rules of overlayfs.

use super::Root;
use crate::{
    error::{Code, OrFail, Result},
    regular_file::{self, look_at},
};
use rustix::{
    fd::OwnedFd,
    fs::{FileType, Mode, OFlags},
};
use std::{
    ffi::{OsStr, OsString},
    io::Read,
    os::unix::ffi::OsStringExt,
    path::{Component, Path, PathBuf},
};

/// How many links one path may go through: the kernel's own limit (MAXSYMLINKS, path_resolution(7)).
const MAX_LINKS: u32 = 40;
/// How many names may be looked up for one path; each `..` starts again from the root. Ordinary paths need a dozen, hostile
/// links a million.
const MAX_LOOKS: usize = 1000;
/// How many names of a directory are read in each layer.
const MAX_LISTED: usize = 10_000;

/// An image's root before it is mounted: overlayfs layers, topmost first.
#[derive(Debug)]
pub struct Layers {
    paths: Vec<PathBuf>,
    descriptors: Vec<OwnedFd>,
    /// Whether volumes are already mounted in it.
    is_mounted: bool,
}

/// The object at a path.
#[derive(Debug)]
pub enum Found {
    /// A merged directory: its directories in the layers, topmost first.
    Directory(Vec<OwnedFd>),
    /// A regular file, open for reading.
    File(std::fs::File),
    /// Something else: a device, a FIFO, a socket.
    Other,
}

/// A path without its links.
#[derive(Debug, Default)]
pub struct Resolved {
    /// The path without links; absent components keep their names.
    pub path: PathBuf,
    /// The object there; `None` if nothing exists, or another file system begins.
    pub found: Option<Found>,
    /// Whether another file system begins at `path`.
    pub ended: bool,
    /// The rest of the path below that.
    pub below: PathBuf,
    /// Whether the path exists or can be made: no file is in place of a directory.
    pub is_open: bool,
}

enum Looked {
    Link(PathBuf),
    Found(Found),
}

impl Layers {
    /// Opens the lower directories of an overlay, topmost first.
    pub fn open(lowers: Vec<PathBuf>) -> Result<Self> {
        let open = |path: &PathBuf| {
            rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .or_fail(Code::Store, || format!("the image's directory {} cannot be opened", path.display()))
        };
        let descriptors = lowers.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { descriptors, paths: lowers, is_mounted: false })
    }

    /// A root in which an engine has already mounted volumes and the kernel's file systems. Files there are found but not
    /// [read](Self::read): the container's user may lack access to them, and gpurun writes what it reads to world-readable files.
    pub fn mounted(root: &OwnedFd) -> std::io::Result<Self> {
        Ok(Self { descriptors: vec![root.try_clone()?], paths: Vec::new(), is_mounted: true })
    }

    /// The directories and their descriptors, topmost first.
    pub fn lowers(&self) -> impl Iterator<Item = (&Path, &OwnedFd)> {
        self.paths.iter().map(PathBuf::as_path).zip(&self.descriptors)
    }

    /// The same layers beneath a directory that has no path.
    pub fn beneath(&self, top: &OwnedFd) -> std::io::Result<Self> {
        let descriptors = [top].into_iter().chain(&self.descriptors).map(OwnedFd::try_clone);
        let descriptors = descriptors.collect::<std::io::Result<_>>()?;
        Ok(Self { descriptors, paths: Vec::new(), is_mounted: self.is_mounted })
    }

    /// Looks up `path` as the mounted overlay would: the path without links, and the object there.
    /// `None` if it does not exist, or is a dangling link.
    pub fn find(&self, path: &str) -> Option<(PathBuf, Found)> {
        let Resolved { path, found, is_open, .. } = self.resolve(Path::new(path), |_| false)?;
        found.filter(|_| is_open).map(|found| (path, found))
    }

    /// Layers of directories that are open already, topmost first.
    pub fn of_descriptors(directories: &[OwnedFd]) -> std::io::Result<Self> {
        let descriptors = directories.iter().map(OwnedFd::try_clone).collect::<std::io::Result<_>>()?;
        Ok(Self { descriptors, paths: Vec::new(), is_mounted: false })
    }

    /// Follows `path` and its links within the root. The walk stops where `ends` reports that another file system begins. `None`
    /// for a loop of links, or `..` after an absent component.
    pub fn resolve(&self, path: &Path, ends: impl Fn(&Path) -> bool) -> Option<Resolved> {
        let (mut links, mut looks) = (0, 0);
        let mut todo = names(path);
        let mut done = PathBuf::from("/");
        let mut here = Some(Found::Directory(self.top()?));
        while let Some(name) = todo.pop() {
            looks += if name == ".." { done.components().count() } else { 1 };
            if looks > MAX_LOOKS {
                return None;
            }
            if name != ".." && !matches!(here, Some(Found::File(_) | Found::Other)) && ends(&done.join(&name))
            {
                done.push(name);
                let below = todo.into_iter().rev().collect();
                return Some(Resolved { path: done, below, ended: true, is_open: true, found: None });
            }
            let directories = match &here {
                Some(Found::Directory(directories)) => directories,
                None if name != ".." => {
                    done.push(name);
                    continue;
                }
                None => return None,
                Some(_) => {
                    done.push(name);
                    done.extend(todo.into_iter().rev());
                    return Some(Resolved { path: done, ..Resolved::default() });
                }
            };
            if name == ".." {
                done.pop();
                here = Some(Found::Directory(self.walk(&done)?));
                continue;
            }
            match look(directories, &name) {
                Some(Looked::Link(target)) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    if target.is_absolute() {
                        done = PathBuf::from("/");
                        here = Some(Found::Directory(self.top()?));
                    }
                    todo.extend(names(&target));
                }
                Some(Looked::Found(found)) => {
                    done.push(name);
                    here = Some(found);
                }
                None => {
                    done.push(name);
                    here = None;
                }
            }
        }
        Some(Resolved { path: done, found: here, is_open: true, ..Resolved::default() })
    }

    /// Whether links lead from `path` to another path, or round in a circle; the last of them may lead nowhere.
    pub fn leads_elsewhere(&self, path: &Path) -> bool {
        self.resolve(path, |_| false).is_none_or(|resolved| resolved.path != path)
    }

    /// The content of a regular file of at most `limit` bytes; `None` if it is absent, of another kind, or larger.
    pub fn read(&self, path: &str, limit: u64) -> Option<Vec<u8>> {
        let file = if self.is_mounted {
            let top = Root::without_mounts(self.descriptors.first()?.try_clone().ok()?);
            let found = top.open(Path::new(path), OFlags::PATH).ok()?;
            regular_file::open(&found).ok()?.0
        } else {
            let (_, Found::File(file)) = self.find(path)? else { return None };
            file
        };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).ok()?;
        (bytes.len() as u64 <= limit).then_some(bytes)
    }

    /// Whether there is something other than a directory at `path`.
    pub fn is_file(&self, path: &Path) -> bool {
        let found = self.resolve(path, |_| false).and_then(|resolved| resolved.found);
        matches!(found, Some(Found::File(_) | Found::Other))
    }

    /// Whether there is anything at `path`.
    pub fn exists(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    /// The names in a directory, sorted.
    pub fn list(&self, path: &str) -> Vec<OsString> {
        let Some((_, Found::Directory(layers))) = self.find(path) else { return Vec::new() };
        let mut names: Vec<OsString> = Vec::new();
        for layer in &layers {
            let Ok(directory) = readable(layer).and_then(rustix::fs::Dir::new) else { continue };
            names.extend(
                directory
                    .flatten()
                    .take(MAX_LISTED)
                    .map(|entry| OsString::from_vec(entry.file_name().to_bytes().to_vec())),
            );
        }
        names.sort();
        names.dedup();
        names.retain(|name| name != "." && name != ".." && look(&layers, name).is_some());
        names
    }

    fn top(&self) -> Option<Vec<OwnedFd>> {
        self.descriptors.iter().map(|fd| fd.try_clone().ok()).collect()
    }

    fn walk(&self, path: &Path) -> Option<Vec<OwnedFd>> {
        path.iter().skip(1).try_fold(self.top()?, |here, name| match look(&here, name)? {
            Looked::Found(Found::Directory(directory)) => Some(directory),
            _ => None,
        })
    }
}

/// The names of a path, last first.
fn names(path: &Path) -> Vec<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().rev().filter_map(name).collect()
}

/// One name in a merged directory: overlayfs' rules (Documentation/filesystems/overlayfs.rst, "Merging directories",
/// "whiteouts and opaque directories").
fn look(directories: &[OwnedFd], name: &OsStr) -> Option<Looked> {
    let mut merged = Vec::new();
    for directory in directories {
        let Ok((found, stat)) = look_at(directory, name) else { continue };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let opaque = directories.len() > 1 && is_opaque(&found);
                merged.push(found);
                if opaque {
                    break;
                }
            }
            _ if !merged.is_empty() => break,
            FileType::CharacterDevice if stat.st_rdev == 0 => return None,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&found, "", Vec::new()).ok()?;
                return Some(Looked::Link(PathBuf::from(OsString::from_vec(target.into_bytes()))));
            }
            FileType::RegularFile => {
                return Some(Looked::Found(Found::File(regular_file::open(&found).ok()?.0)));
            }
            _ => return Some(Looked::Found(Found::Other)),
        }
    }
    (!merged.is_empty()).then_some(Looked::Found(Found::Directory(merged)))
}

/// Opens the directory for reading: an O_PATH descriptor gives neither names nor attributes.
fn readable(directory: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(directory, ".", flags, Mode::empty())
}

/// Whether a directory is opaque: it hides the directories of the layers below.
fn is_opaque(directory: &OwnedFd) -> bool {
    let Ok(directory) = readable(directory) else { return false };
    ["trusted.overlay.opaque", "user.overlay.opaque"]
        .iter()
        .any(|key| matches!(rustix::fs::fgetxattr(&directory, *key, &mut [0u8; 1][..]), Ok(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::rootfs::open_host_directory;
    use std::{fs, os::unix::fs::symlink};

    fn tree() -> (tempfile::TempDir, Layers) {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("upper"), dir.path().join("lower"));
        for path in ["upper/etc", "upper/opt/new", "lower/etc", "lower/opt/old", "lower/usr/lib"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(lower.join("etc/passwd"), "lower").unwrap();
        fs::write(lower.join("etc/group"), "lower").unwrap();
        fs::write(upper.join("etc/passwd"), "upper").unwrap();
        symlink("usr/lib", lower.join("lib")).unwrap();
        symlink("/../../../../etc/group", upper.join("etc/abs")).unwrap();
        symlink("loop", upper.join("etc/loop")).unwrap();
        let layers = Layers::open(vec![upper, lower]).unwrap();
        (dir, layers)
    }

    #[test]
    fn layers_read_like_the_mounted_overlay() {
        let (dir, layers) = tree();
        assert_eq!(layers.read("/etc/passwd", 100).unwrap(), b"upper");
        assert_eq!(layers.read("etc/group", 100).unwrap(), b"lower");
        assert_eq!(layers.read("etc/group", 3), None, "larger than the limit");
        assert_eq!(layers.read("/etc/abs", 100).unwrap(), b"lower", "an absolute link stays inside");
        assert!(!layers.exists("/etc/loop") && !layers.exists("/etc/passwd/x") && !layers.exists("/nope"));
        assert_eq!(layers.find("/lib").unwrap().0, Path::new("/usr/lib"));
        assert_eq!(layers.list("/opt"), ["new", "old"]);
        if rustix::process::geteuid().is_root() {
            fs::remove_file(dir.path().join("upper/etc/abs")).unwrap();
            let etc = open_host_directory(&dir.path().join("upper/etc")).unwrap();
            rustix::fs::mknodat(&etc, "group", FileType::CharacterDevice, Mode::empty(), 0).unwrap();
            assert!(!layers.exists("/etc/group"), "a whiteout hides what is below");
            assert_eq!(layers.list("/etc"), ["loop", "passwd"]);
            rustix::fs::setxattr(
                dir.path().join("upper/opt"),
                "trusted.overlay.opaque",
                b"y",
                rustix::fs::XattrFlags::empty(),
            )
            .unwrap();
            assert_eq!(layers.list("/opt"), ["new"], "an opaque directory hides what is below");
        }
    }

    /// A container may exchange names of its root while it is read, and opening a device node uses the device. A FIFO replaces
    /// the node in this test: inotify(7) reports each open of either.
    #[test]
    fn what_is_not_a_regular_file_is_never_opened() {
        use rustix::fs::{CWD, RenameFlags, inotify};
        let dir = tempfile::tempdir().unwrap();
        let (file, pipe) = (dir.path().join("file"), dir.path().join("pipe"));
        fs::write(&file, "content").unwrap();
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let opened = inotify::init(flags).unwrap();
        inotify::add_watch(&opened, &pipe, inotify::WatchFlags::OPEN).unwrap();
        let layers = Layers::open(vec![dir.path().into()]).unwrap();
        let root = Root::new(open_host_directory(dir.path()).unwrap());
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    rustix::fs::renameat_with(CWD, &file, CWD, &pipe, RenameFlags::EXCHANGE).unwrap();
                }
            });
            for _ in 0..20_000 {
                let _ = layers.read("/file", 100);
                let _ = root.is_written(Path::new("/file"), b"content", 0o644);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(rustix::io::read(&opened, &mut [0_u8; 64]).unwrap_err(), rustix::io::Errno::AGAIN);
    }

    #[test]
    fn links_up_and_down_end_the_search_and_deep_paths_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let deep = ["a"; 200].join("/");
        fs::create_dir_all(dir.path().join(&deep)).unwrap();
        fs::write(dir.path().join(&deep).join("file"), "x").unwrap();
        // 40 times 200 names down and up again, and each step up walks from the root: 800,000 names.
        let there_and_back = format!("/{deep}{}", "/..".repeat(200));
        for n in 0..39 {
            symlink(format!("{there_and_back}/l{}", n + 1), dir.path().join(format!("l{n}"))).unwrap();
        }
        fs::write(dir.path().join("l39"), "end").unwrap();
        let layers = Layers::open(vec![dir.path().into()]).unwrap();
        assert_eq!(layers.read(&format!("/{deep}/../a/file"), 9).unwrap(), b"x");
        assert_eq!(layers.read("/l39", 9).unwrap(), b"end");
        assert!(layers.find("/l38").is_none(), "20,000 names for one link");
    }
}
