//! Detached mounts: made or copied where nobody sees them, restricted, and attached to a descriptor when they are ready
//! (fsopen(2), open_tree(2), move_mount(2)).

use crate::{
    error::{Code, Error, OrFail, Result},
    inventory::DeviceNode,
    sys::mount::{Flags, restrict},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::CWD,
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags},
};
use std::path::Path;

/// Nothing but reading and writing.
pub const NOTHING: Flags = Flags { read_only: false, nosuid: true, nodev: true, noexec: true };

/// A device node of the host's. Read-only is the node, not the device: it can be written through, but no chmod(2) of the
/// container's root changes who may use the device on the host.
pub const HOST_NODE: Flags = Flags { read_only: true, nosuid: true, nodev: false, noexec: true };

/// A detached mount of a new file system.
pub fn new_filesystem(filesystem: &str, options: &[(&str, String)], flags: Flags) -> Result<OwnedFd> {
    let make = || {
        let context = rustix::mount::fsopen(filesystem, FsOpenFlags::FSOPEN_CLOEXEC)?;
        // What df and mount show as the device.
        rustix::mount::fsconfig_set_string(&context, "source", filesystem)?;
        for (key, value) in options {
            if value.is_empty() {
                rustix::mount::fsconfig_set_flag(&context, *key)?;
            } else {
                rustix::mount::fsconfig_set_string(&context, *key, value.as_str())?;
            }
        }
        rustix::mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::from_bits_retain(u32::try_from(flags.bits()).unwrap_or_default());
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().map_err(|errno| {
        let error = Error::new(Code::Mount, format!("mounting a new {filesystem} failed")).cause(format!("fsopen({filesystem:?}): {errno}"));
        match (filesystem, errno) {
            ("proc", Errno::PERM) => error.fix(
                "this process is itself in a container whose /proc is masked, and the kernel shows no other to it: start that one with \
                 --security-opt systempaths=unconfined, or gpurun on the host",
            ),
            (_, Errno::PERM) => error.fix("run gpurun as root, or where user namespaces may mount (no seccomp filter or LSM against it)"),
            _ => error,
        }
    })
}

/// A detached copy of what is mounted at a host path, restricted before anyone can see it.
pub fn clone_of_host(source: &Path, recursive: bool, flags: Flags) -> Result<OwnedFd> {
    let how = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let mount = open_tree(CWD, how, source, source)?;
    restrict(mount.as_fd(), flags, recursive)
        .or_fail(Code::Mount, || format!("{} cannot be restricted", source.display()))?;
    Ok(mount)
}

/// The same, which stays a slave of its former peers on the host.
pub fn slave_of_host(source: &Path, recursive: bool, flags: Flags) -> Result<OwnedFd> {
    let how = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let mount = open_tree(CWD, how, source, source)?;
    crate::sys::mount::restrict_slave(mount.as_fd(), flags, recursive)
        .or_fail(Code::Mount, || format!("{} cannot be restricted", source.display()))?;
    Ok(mount)
}

/// A detached mount of the host's own node, if it is still the device that it was.
pub fn node_of_host(node: &DeviceNode) -> Result<OwnedFd> {
    let path = node.path.0.display();
    let mount = clone_of_host(&node.path.0, false, HOST_NODE)?;
    let stat =
        rustix::fs::fstat(&mount).or_fail(Code::DeviceNodeMissing, || format!("{path} cannot be read"))?;
    if stat.st_rdev == rustix::fs::makedev(node.major, node.minor) {
        return Ok(mount);
    }
    let (major, minor) = (node.major, node.minor);
    Err(Error::new(Code::DeviceNodeMissing, format!("{path} is not device {major}:{minor}")))
}

/// A detached copy of the mount at `path`, beneath `at`; `shown` is for messages.
pub fn open_tree(
    at: impl AsFd,
    how: OpenTreeFlags,
    path: impl rustix::path::Arg,
    shown: &Path,
) -> Result<OwnedFd> {
    rustix::mount::open_tree(
        at,
        path,
        how | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(|errno| {
        let code = if errno == Errno::NOENT { Code::Volume } else { Code::Mount };
        let error = Error::new(code, format!("{} cannot be mounted", shown.display()))
            .cause(format!("open_tree: {errno}"));
        if errno == Errno::NOENT {
            error.fix(format!("make {} on the host first", shown.display()))
        } else {
            error
        }
    })
}

/// Puts a detached mount where `point` is; `shown` is for messages.
pub fn attach(mount: &OwnedFd, point: &OwnedFd, shown: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", point, "", flags).map_err(|errno| {
        let error = Error::new(Code::Mount, format!("mounting on {} failed", shown.display()))
            .cause(format!("move_mount: {errno}"));
        if errno == Errno::NOTDIR {
            error.fix("mount a file on a file, or a directory on a directory")
        } else {
            error
        }
    })
}
