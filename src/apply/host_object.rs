//! Objects of the host that go into a container: opened once, verified on the descriptor, and mounted by that descriptor.
//!
//! Mounting by path after a check is a race: if another user can write to a directory on the way, /tmp/nvidia-mps may become
//! a link to one of root's directories. So gpurun mounts only [`HostObject`]s. For mounts that a low-level runtime makes by
//! path, gpurun first mounts the object in its own directory (see [`super::gathering`]).

use crate::{
    error::{Code, Error, OrFail, Result},
    inventory::{DaemonObject, DeviceNode},
    regular_file::look_at,
    sys::mount::{Flags, restrict, restrict_slave},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat},
    io::Errno,
    mount::OpenTreeFlags,
    process::geteuid,
};
use std::path::Path;

/// An open object of the host, as a detached mount, which is invisible until it is attached.
#[derive(Debug)]
pub struct HostObject {
    mount: OwnedFd,
    stat: Stat,
}

impl HostObject {
    /// Opens a file or directory that the user named. Links are followed, and with `recursive` mounts below it are included.
    ///
    /// # Errors
    /// [`Code::Volume`] if it does not exist, [`Code::Mount`] if it cannot be mounted.
    pub fn named(path: &Path, flags: Flags, recursive: bool) -> Result<Self> {
        let how = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
        Self::open(CWD, path, path, how, flags)
    }

    /// Like [`Self::named`], but the mount stays a slave of its peers on the host: later mounts there appear here.
    ///
    /// # Errors
    /// As for [`Self::named`].
    pub fn slave(path: &Path, flags: Flags, recursive: bool) -> Result<Self> {
        let how = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
        let mount = open_tree(CWD, how, path, path)?;
        let stat = rustix::fs::statat(&mount, "", AtFlags::EMPTY_PATH)
            .or_fail(Code::Mount, || format!("{} cannot be read", path.display()))?;
        restrict_slave(mount.as_fd(), flags, recursive)
            .or_fail(Code::Mount, || format!("{} cannot be restricted", path.display()))?;
        Ok(Self { mount, stat })
    }

    /// Opens a file or directory of the driver or of gpurun. The last component of its path must not be a link.
    ///
    /// # Errors
    /// [`Code::Volume`] if it does not exist, [`Code::Mount`] if it is of another kind or cannot be mounted.
    pub fn file(path: &Path, flags: Flags) -> Result<Self> {
        let object = Self::open(CWD, path, path, OpenTreeFlags::AT_SYMLINK_NOFOLLOW, flags)?;
        match object.kind() {
            FileType::RegularFile | FileType::Directory => Ok(object),
            kind => Err(unexpected(path, kind)),
        }
    }

    /// Opens a socket or FIFO of a daemon, or a directory of sockets. Users other than root may be able to write to a directory on the way:
    /// objects that they could have put there are refused, and links there are not followed.
    ///
    /// If the inventory verified an object, it must still be the same one. In a user namespace the owner proves nothing, because all
    /// unmapped users of the host have the same id there.
    ///
    /// # Errors
    /// [`Code::Mount`] if the object is not the daemon's, or cannot be mounted.
    pub fn of_daemon(path: &Path, known: DaemonObject, flags: Flags) -> Result<Self> {
        let failed = || format!("{} cannot be opened", path.display());
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::new(Code::Mount, failed())
                .fix("name the daemon's socket by its absolute path, e.g. /run/nvidia-persistenced/socket"));
        };
        let real = std::fs::canonicalize(parent).or_fail(Code::Mount, failed)?;
        let flags_of_root = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut here = rustix::fs::open("/", flags_of_root, Mode::empty()).or_fail(Code::Mount, failed)?;
        let mut directory = rustix::fs::fstat(&here).or_fail(Code::Mount, failed)?;
        for name in real.iter().skip(1) {
            let (next, stat) = look_at(&here, name).or_fail(Code::Mount, failed)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                return Err(unexpected(path, FileType::from_raw_mode(stat.st_mode)));
            }
            if known.inode == 0 {
                verify_owner(path, &directory, &stat)?;
            }
            (here, directory) = (next, stat);
        }
        let object = Self::open(&here, Path::new(name), path, OpenTreeFlags::AT_SYMLINK_NOFOLLOW, flags)?;
        if known.inode == 0 {
            verify_owner(path, &directory, &object.stat)?;
        } else if object.identity() != (known.device, known.inode) {
            return Err(Error::new(Code::Mount, format!("{} is not mounted", path.display()))
                .cause("it was replaced a moment ago")
                .fix("start the container again; `gpurun ls` reads the host again"));
        }
        match object.kind() {
            FileType::Directory if object.stat.st_mode & 0o1002 == 0o002 => {
                Err(Error::new(Code::Mount, format!("{} is not mounted", path.display()))
                    .cause("every user may replace the sockets in it")
                    .fix(format!("chmod o-w {}", path.display())))
            }
            FileType::Socket | FileType::Fifo | FileType::Directory => Ok(object),
            kind => Err(unexpected(path, kind)),
        }
    }

    /// Opens a device node of the host, if it is still the same device.
    ///
    /// # Errors
    /// [`Code::DeviceNodeMissing`] if it is a different device, [`Code::Mount`] if it cannot be mounted.
    pub fn node(node: &DeviceNode, flags: Flags) -> Result<Self> {
        let object = Self::named(&node.path.0, flags, false)?;
        if object.stat.st_rdev == rustix::fs::makedev(node.major, node.minor) {
            return Ok(object);
        }
        let (path, major, minor) = (node.path.0.display(), node.major, node.minor);
        Err(Error::new(Code::DeviceNodeMissing, format!("{path} is not device {major}:{minor}"))
            .fix("start the container again: the driver's nodes are read at each start; `gpurun doctor` checks them"))
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == FileType::Directory
    }

    /// Device and inode number.
    pub fn identity(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    /// The detached mount.
    pub fn mount(&self) -> &OwnedFd {
        &self.mount
    }

    /// Converts into the detached mount.
    pub fn into_mount(self) -> OwnedFd {
        self.mount
    }

    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Sets the flags of the mount before it is attached.
    fn open(at: impl AsFd, path: &Path, shown: &Path, how: OpenTreeFlags, flags: Flags) -> Result<Self> {
        let recursive = how.contains(OpenTreeFlags::AT_RECURSIVE);
        let mount = open_tree(at, how, path, shown)?;
        let stat = rustix::fs::statat(&mount, "", AtFlags::EMPTY_PATH)
            .or_fail(Code::Mount, || format!("{} cannot be read", shown.display()))?;
        restrict(mount.as_fd(), flags, recursive)
            .or_fail(Code::Mount, || format!("{} cannot be restricted", shown.display()))?;
        Ok(Self { mount, stat })
    }
}

/// Refuses an object that a user with write access to its directory could have put there: its owner must be root, the caller,
/// or the owner of the directory.
fn verify_owner(path: &Path, directory: &Stat, object: &Stat) -> Result<()> {
    let is_ours = |uid: u32| uid == 0 || uid == geteuid().as_raw();
    let many_write =
        directory.st_mode & 0o002 != 0 || directory.st_mode & 0o020 != 0 && directory.st_gid != 0;
    let is_open = many_write || !is_ours(directory.st_uid);
    if !is_open || is_ours(object.st_uid) || !many_write && object.st_uid == directory.st_uid {
        return Ok(());
    }
    Err(Error::new(Code::Mount, format!("{} is not mounted", path.display()))
        .cause(format!("it belongs to uid {}, who may not be the driver's daemon", object.st_uid))
        .fix(format!("see who made it (ls -l {}), and start the driver's daemon as root", path.display())))
}

fn unexpected(path: &Path, kind: FileType) -> Error {
    Error::new(Code::Mount, format!("{} is not mounted", path.display()))
        .cause(format!("a {kind:?} is in its place"))
        .fix(format!("look at {}: reinstall the driver, or start its daemon again", path.display()))
}

/// A detached copy of the mount at `path`, beneath `at`; `shown` is for messages.
///
/// # Errors
/// [`Code::Volume`] if nothing exists at the path, [`Code::Mount`] otherwise.
pub fn open_tree(
    at: impl AsFd,
    how: OpenTreeFlags,
    path: impl rustix::path::Arg,
    shown: &Path,
) -> Result<OwnedFd> {
    let how = how | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(at, path, how).map_err(|errno| {
        let code = if errno == Errno::NOENT { Code::Volume } else { Code::Mount };
        let error = Error::new(code, format!("{} cannot be mounted", shown.display()))
            .cause(format!("open_tree: {errno}"));
        match errno {
            Errno::NOENT => error.fix(format!("make {} on the host first", shown.display())),
            Errno::PERM => error.fix("run gpurun as root, or where user namespaces may mount"),
            _ => error.fix(format!("mount another directory than {}", shown.display())),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::{
            fs::{PermissionsExt, chown, symlink},
            net::UnixListener,
        },
    };

    const READ_ONLY: Flags = Flags { read_only: true, nosuid: true, nodev: true, noexec: true };

    /// Objects that another user could put into /tmp in place of a daemon's directory. Needs root for mounts.
    #[test]
    fn objects_that_another_user_could_have_made_are_refused() {
        if !geteuid().is_root() {
            eprintln!("skipped: a mount needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("tmp");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o1777)).unwrap();
        let secret = dir.path().join("secret");
        fs::create_dir(&secret).unwrap();
        let mps = open.join("nvidia-mps");
        let refused = |what: &str| {
            let error = HostObject::of_daemon(&mps, DaemonObject::default(), READ_ONLY).expect_err(what);
            assert_eq!(error.code(), Code::Mount, "{what}: {error}");
            assert!(!error.fix_line().is_empty(), "{what}");
        };
        fs::create_dir(&mps).unwrap();
        assert!(HostObject::of_daemon(&mps, DaemonObject::default(), READ_ONLY).unwrap().is_directory());
        let identity = HostObject::of_daemon(&mps, DaemonObject::default(), READ_ONLY).unwrap().identity();
        let known = DaemonObject { device: identity.0, inode: identity.1, is_replaceable: true };
        HostObject::of_daemon(&mps, known, READ_ONLY).unwrap();
        fs::rename(&mps, open.join("aside")).unwrap();
        fs::create_dir(&mps).unwrap();
        assert!(HostObject::of_daemon(&mps, known, READ_ONLY).is_err(), "another directory of root's");
        fs::set_permissions(&mps, fs::Permissions::from_mode(0o777)).unwrap();
        refused("a directory that everyone may write to");
        fs::set_permissions(&mps, fs::Permissions::from_mode(0o755)).unwrap();
        chown(&mps, Some(54321), None).unwrap();
        refused("another user's directory");
        fs::remove_dir(&mps).unwrap();
        symlink(&secret, &mps).unwrap();
        refused("a link");
        fs::remove_file(&mps).unwrap();
        fs::write(&mps, "").unwrap();
        refused("a file");
        // A directory of the daemon's own user.
        let daemons = dir.path().join("nvidia-persistenced");
        fs::create_dir(&daemons).unwrap();
        let socket = daemons.join("socket");
        let _daemon = UnixListener::bind(&socket).unwrap();
        for path in [&daemons, &socket] {
            chown(path, Some(54321), None).unwrap();
        }
        HostObject::of_daemon(&socket, DaemonObject::default(), READ_ONLY).unwrap();
        chown(&socket, Some(54322), None).unwrap();
        assert!(
            HostObject::of_daemon(&socket, DaemonObject::default(), READ_ONLY).is_err(),
            "a third user's socket"
        );
        fs::remove_file(&socket).unwrap();
        symlink(&secret, &socket).unwrap();
        assert!(
            HostObject::of_daemon(&socket, DaemonObject::default(), READ_ONLY).is_err(),
            "a link of the daemon's user"
        );
    }
}
