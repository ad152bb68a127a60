//! What gpurun adds to a container's root: an overlay layer of its own in memory, above the image's.
//!
//! Written through the mounted overlay, each file would first have its directories copied up to the disk, which costs far more
//! than the write (and ext4 gets slower with each file that was deleted in the last minutes); and a launcher without root could
//! not write at all where the image's directories belong to somebody else.

use super::{assembly::Step, identity::Identity};
use crate::{
    apply::rootfs::{Found, Layers},
    error::{Code, Error, OrFail, Result},
};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, Gid, Mode, OFlags, Uid, XattrFlags},
    io::Errno,
};
use std::path::{Component, Path, PathBuf};

/// The layer, seen together with the image beneath it.
#[derive(Debug)]
pub struct Layer {
    directory: OwnedFd,
    /// This one first.
    layers: Layers,
    /// Whether directories get the owners that they have in the image.
    owners: bool,
}

impl Layer {
    /// `directory` is empty and not used by another process.
    pub fn new(directory: OwnedFd, image: &Layers, owners: bool) -> Result<Self> {
        let layers =
            image.beneath(&directory).or_fail(Code::Internal, || "a descriptor cannot be duplicated")?;
        Ok(Self { directory, layers, owners })
    }

    /// Lays down files, links and directories, and mount points for the mounts to come. Steps beneath a mount point are left
    /// for when that is mounted.
    pub fn populate<'a>(&self, image: &[Step], mounts: impl Iterator<Item = &'a Step>) -> Result<()> {
        for step in image {
            match step {
                Step::File { path, content, mode } => self.file(path, content, *mode)?,
                Step::Symlink { link, target } => self.symlink(link, target)?,
                Step::Directory { path, mode, owner } => self.new_directory(path, *mode, *owner)?,
                _ => {}
            }
        }
        let mut covered: Vec<&Path> = Vec::new();
        for step in mounts {
            let (target, directory) = match step {
                Step::Mount { target, .. } => (target, true),
                Step::Bind { source, target, .. } | Step::BindSlave { source, target, .. } => {
                    (target, source.is_dir())
                }
                _ => continue,
            };
            if !covered.iter().any(|mount| target.starts_with(mount)) && self.find(target).is_none() {
                if directory {
                    self.directory(target)?;
                } else {
                    self.file(target, b"", 0o644)?;
                }
            }
            covered.push(target);
        }
        Ok(())
    }

    /// Makes the user's home if the image does not have it. A home from `-e` that is not a plain absolute path is skipped.
    pub fn home(&self, user: &Identity) -> Result<()> {
        let is_plain = !user.home.components().any(|component| component == Component::ParentDir);
        if user.home.is_absolute() && is_plain {
            self.new_directory(&user.home, 0o750, (user.uid, user.gid))?;
        }
        Ok(())
    }

    /// Makes the directories of the image's volumes that the image does not have.
    pub fn image_volumes(&self, paths: &[PathBuf]) -> Result<()> {
        for path in paths {
            match self.find(path) {
                None => drop(self.directory(path)?),
                Some(Found::Directory(_)) => {}
                Some(_) => {
                    let what = format!("the image's volume {} is not a directory", path.display());
                    return Err(Error::new(Code::Rootfs, what).cause("the image has a file there").fix(
                        format!("mount a file there, which takes its place: -v FILE:{}", path.display()),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Its directory.
    pub fn into_directory(self) -> OwnedFd {
        self.directory
    }

    fn find(&self, path: &Path) -> Option<Found> {
        self.layers.find(path.to_str()?).map(|(_, found)| found)
    }

    /// The layer's own directory for `path` of the image, its parents too; made where the image has none.
    fn directory(&self, path: &Path) -> Result<OwnedFd> {
        let failed = || format!("{} cannot be made in the container's root", path.display());
        // PATH_MAX: an image may name a working directory of any length, and each part is a step deeper here.
        if path.as_os_str().len() >= 4096 {
            return Err(Errno::NAMETOOLONG).or_fail(Code::Rootfs, || "a path of the image is too long");
        }
        match path.to_str().and_then(|path| self.layers.find(path)) {
            Some((resolved, Found::Directory(_))) => self.copy(&resolved).or_fail(Code::Rootfs, failed),
            Some(_) => Err(Error::new(Code::Rootfs, failed())
                .cause(format!("{} of the image is not a directory", path.display()))
                .fix(format!(
                    "name another path with -v or -w, or build the image without that file: RUN rm {} in its Dockerfile",
                    path.display()
                ))),
            None => {
                let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                    return Err(Error::new(Code::Rootfs, failed()));
                };
                let parent = self.directory(parent)?;
                // A link of the image's that leads nowhere is hidden by it.
                let made = rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))
                    .and_then(|()| open(&parent, name))
                    .or_fail(Code::Rootfs, failed)?;
                if !self.owners {
                    // The image may have a directory there that the caller cannot find.
                    make_opaque(&made);
                }
                Ok(made)
            }
        }
    }

    /// A directory of the image's in this layer, with the permissions that it has there.
    fn copy(&self, resolved: &Path) -> rustix::io::Result<OwnedFd> {
        let mut here = self.directory.try_clone().map_err(|_| Errno::MFILE)?;
        let mut prefix = PathBuf::from("/");
        for name in resolved.iter().skip(1) {
            prefix.push(name);
            here = match open(&here, name) {
                Err(Errno::NOENT) => {
                    let Some(Found::Directory(merged)) = self.find(&prefix) else {
                        return Err(Errno::NOTDIR);
                    };
                    let stat = rustix::fs::fstat(merged.first().ok_or(Errno::NOTDIR)?)?;
                    rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o700))?;
                    let made = open(&here, name)?;
                    if self.owners {
                        rustix::fs::fchown(
                            &made,
                            Some(Uid::from_raw(stat.st_uid)),
                            Some(Gid::from_raw(stat.st_gid)),
                        )?;
                    }
                    rustix::fs::fchmod(&made, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
                    if !self.owners
                        && merged.iter().any(|lower| matches!(open(lower, ".".as_ref()), Err(Errno::ACCESS)))
                    {
                        make_opaque(&made);
                    }
                    made
                }
                opened => opened?,
            };
        }
        Ok(here)
    }

    fn parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a std::ffi::OsStr)> {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok((self.directory(parent)?, name)),
            _ => Err(Error::new(Code::Rootfs, format!("{} is not a path of a file", path.display()))),
        }
    }

    fn file(&self, path: &Path, content: &[u8], mode: u32) -> Result<()> {
        let failed = || format!("{} cannot be written in the container's root", path.display());
        let (parent, name) = self.parent(path)?;
        let write = || {
            clear(&parent, name)?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(mode))
        };
        let file = write().or_fail(Code::Rootfs, failed)?;
        std::io::Write::write_all(&mut std::fs::File::from(file), content).or_fail(Code::Rootfs, failed)
    }

    fn symlink(&self, link: &Path, target: &Path) -> Result<()> {
        let (parent, name) = self.parent(link)?;
        clear(&parent, name)
            .and_then(|()| rustix::fs::symlinkat(target, &parent, name))
            .or_fail(Code::Rootfs, || {
                format!("the link {} cannot be made in the container's root", link.display())
            })
    }

    /// A directory with an owner of its own; one that the image has stays as it is, but for its owner where that is nobody.
    fn new_directory(&self, path: &Path, mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
        match path.to_str().and_then(|path| self.layers.find(path)) {
            None => {}
            // Without root, a directory of somebody else's cannot be copied up by overlayfs, even where everyone may write.
            Some((resolved, Found::Directory(_))) if !self.owners => {
                // In this namespace its owner is the container's user.
                return self
                    .copy(&resolved)
                    .and_then(|copy| {
                        let mode = rustix::fs::fstat(&copy)?.st_mode & 0o7777 | 0o700;
                        rustix::fs::fchmod(&copy, Mode::from_raw_mode(mode))
                    })
                    .or_fail(Code::Rootfs, || format!("{} cannot be made writable", path.display()));
            }
            Some(_) => return Ok(()),
        }
        let made = self.directory(path)?;
        // Without root everything is made by the caller, who is the container's user; other ids may not exist for him.
        let owned = if self.owners {
            rustix::fs::fchown(&made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        } else {
            Ok(())
        };
        owned
            .and_then(|()| rustix::fs::fchmod(&made, Mode::from_raw_mode(mode)))
            .or_fail(Code::Rootfs, || format!("{} cannot be given to its user", path.display()))
    }
}

/// Hides the directories of the layers below. The caller cannot look into one of them (/root, mode 0700), and a directory that is
/// merged with it could not be read either. A file system without such attributes leaves them merged.
fn make_opaque(directory: &OwnedFd) {
    let _ = rustix::fs::fsetxattr(directory, "user.overlay.opaque", b"y", XattrFlags::empty());
}

fn open(at: &OwnedFd, name: &std::ffi::OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

/// Removes what gpurun itself has put there before.
fn clear(parent: &OwnedFd, name: &std::ffi::OsStr) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::rootfs::open_host_directory;
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    fn tree() -> (tempfile::TempDir, Layer) {
        let dir = tempfile::tempdir().unwrap();
        let (image, layer, outside) =
            (dir.path().join("image"), dir.path().join("layer"), dir.path().join("outside"));
        for path in ["image/etc", "image/usr/lib/deep", "layer", "outside"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::set_permissions(image.join("usr/lib"), fs::Permissions::from_mode(0o711)).unwrap();
        fs::write(image.join("etc/passwd"), "image").unwrap();
        symlink("usr/lib", image.join("lib")).unwrap();
        symlink(&outside, image.join("absolute")).unwrap();
        symlink("../../outside", image.join("relative")).unwrap();
        symlink("../run/stub.conf", image.join("etc/resolv.conf")).unwrap();
        let layers = Layers::open(vec![image]).unwrap();
        let directory = open_host_directory(&layer).unwrap();
        let made = Layer::new(directory, &layers, rustix::process::geteuid().is_root()).unwrap();
        (dir, made)
    }

    #[test]
    fn what_is_written_lies_where_the_image_leads_and_nowhere_else() {
        let (dir, layer) = tree();
        let in_layer = |path: &str| dir.path().join("layer").join(path);
        layer.file(Path::new("/lib/libx"), b"ours", 0o644).unwrap();
        assert_eq!(
            fs::read(in_layer("usr/lib/libx")).unwrap(),
            b"ours",
            "the image's link is followed inside"
        );
        assert_eq!(
            in_layer("usr/lib").metadata().unwrap().mode() & 0o7777,
            0o711,
            "directories keep their mode"
        );
        layer.file(Path::new("/etc/resolv.conf"), b"ours", 0o644).unwrap();
        assert_eq!(
            fs::read(in_layer("etc/resolv.conf")).unwrap(),
            b"ours",
            "a link in the last place is replaced"
        );
        layer.symlink(Path::new("/usr/lib/l"), Path::new("a")).unwrap();
        layer.symlink(Path::new("/usr/lib/l"), Path::new("b")).unwrap();
        assert_eq!(fs::read_link(in_layer("usr/lib/l")).unwrap(), Path::new("b"));
        for path in ["/absolute/file", "/relative/file", "/absolute/new/file"] {
            layer.file(Path::new(path), b"hostile", 0o644).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
        assert!(
            layer
                .file(Path::new("/etc/passwd/x"), b"", 0o644)
                .unwrap_err()
                .to_string()
                .contains("not a directory")
        );
    }

    #[test]
    fn a_path_that_no_program_could_name_is_refused() {
        let (_dir, layer) = tree();
        let error = layer.directory(Path::new(&"/a".repeat(1 << 20))).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
        layer.directory(Path::new(&"/a".repeat(2000))).unwrap();
    }
}
