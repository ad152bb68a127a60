//! Makes detached mounts of new file systems, and attaches detached mounts to descriptors (fsopen(2), move_mount(2)). For
//! mounts of the host's files see [`super::host_object`].

use crate::{
    error::{Code, Error, Result},
    sys::mount::Flags,
};
use rustix::{
    fd::OwnedFd,
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags},
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
            ("tmpfs", Errno::INVAL) => error.fix("name a user and group that the container has, and values that tmpfs(5) permits: --tmpfs TARGET:uid=…,gid=…,size=…"),
            (_, Errno::PERM) => error.fix("run gpurun as root, or where user namespaces may mount (no seccomp filter or LSM against it)"),
            _ => error.fix(format!("see `dmesg`: the kernel must have the file system {filesystem}")),
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
            error.fix(format!("leave out the volume or the image's file at {}", shown.display()))
        }
    })
}
