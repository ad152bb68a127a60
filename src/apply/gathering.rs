//! The driver's files gathered to one mount, in a mount namespace that ends with the low-level runtime.
//!
//! A runtime makes each mount of a specification by itself, 0.1 ms for runc, and the driver has dozens of files. Gathered
//! beforehand they are one. On the host's own mount table they would stay for good; so this process, which becomes the runtime,
//! leaves for a mount namespace of its own, and nothing is seen or left outside.
//!
//! Everything else of that namespace has to be as it was: what the engine mounts later must reach containers that asked for it
//! (`rshared`, `rslave`). So its mounts stay peers of the host's (mount_namespaces(7), "Shared subtrees"), but for the moment in
//! which ours is attached: it would travel to every peer of the mount that it lies on.

use super::{host_object::HostObject, mount, rootfs::Root};
use crate::{
    error::{Code, OrFail, Result},
    sys::mount::{Flags, restrict},
};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::MoveMountFlags,
};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// What the files of the driver are mounted with.
pub const READ_ONLY: Flags = Flags { read_only: true, nosuid: true, nodev: true, noexec: false };

/// Mounts objects of the host on the mount points in `directory`, by their paths below it. Afterwards this process is in a
/// new mount namespace, and the mounts are visible only there.
///
/// `false`: this process may not, or the kernel cannot (it is older than 5.15), and nothing has changed.
///
/// # Errors
/// [`Code::Mount`] if a file cannot be mounted; nothing has changed then.
pub fn gather(directory: &Path, objects: &[(PathBuf, HostObject)]) -> Result<bool> {
    let failed = || "the process' mount namespace cannot be opened";
    let hosts = File::open("/proc/self/ns/mnt").or_fail(Code::Mount, failed)?;
    // Opened now, before the mounts change; read only if needed.
    let table = File::open("/proc/self/mountinfo").or_fail(Code::Mount, failed)?;
    let Some(root) = mount_root(directory) else { return Ok(false) };
    let open = |path: &Path| rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let Ok(hosts_mount) = open(&root) else { return Ok(false) };
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        return Ok(false);
    }
    let gathered = (|| {
        let own = open(&root).or_fail(Code::Mount, || format!("{} cannot be opened", root.display()))?;
        restrict(own.as_fd(), Flags::default(), false)
            .or_fail(Code::Mount, || format!("{} cannot be made private", root.display()))?;
        attach_all(directory, objects)?;
        Ok(rejoin(&hosts_mount, &own).is_ok() || !is_shared(table, &hosts_mount))
    })();
    if !matches!(gathered, Ok(true)) {
        setns(hosts, CloneFlags::CLONE_NEWNS)
            .or_fail(Code::Mount, || "the way back to the host's mount namespace is closed")?;
    }
    gathered
}

fn attach_all(directory: &Path, objects: &[(PathBuf, HostObject)]) -> Result<()> {
    let tree = HostObject::file(directory, READ_ONLY)?;
    let point = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .or_fail(Code::Mount, || format!("{} cannot be opened", directory.display()))?;
    mount::attach(tree.mount(), &point, directory)?;
    let copy = tree.mount().try_clone().or_fail(Code::Internal, || "out of descriptors")?;
    let tree = Root::new(copy);
    for (below, object) in objects {
        let point = tree
            .open(below, OFlags::PATH)
            .or_fail(Code::Mount, || format!("there is no mount point for {}", below.display()))?;
        mount::attach(object.mount(), &point, below)?;
    }
    Ok(())
}

/// The root of the mount that a directory lies on. `None` on a kernel before 5.8, which does not tell.
fn mount_root(directory: &Path) -> Option<PathBuf> {
    let directory = std::fs::canonicalize(directory).ok()?;
    directory.ancestors().find_map(|path| {
        let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()).ok()?;
        stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT).then(|| path.to_path_buf())
    })
}

/// Makes `own` a peer of the mount it was copied from again (Linux 5.15). What lies on it already does not travel.
fn rejoin(hosts: &OwnedFd, own: &OwnedFd) -> rustix::io::Result<()> {
    let how = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_SET_GROUP;
    match rustix::mount::move_mount(hosts, "", own, "", how) {
        Err(Errno::INTR) => rejoin(hosts, own),
        result => result,
    }
}

/// Whether a mount has peers or a master; what cannot be known is taken for shared. The kernel says EINVAL to [`rejoin`] for a
/// private mount as it does for a flag that it does not know.
fn is_shared(mut table: File, hosts: &OwnedFd) -> bool {
    let mut lines = Vec::new();
    if table.read_to_end(&mut lines).is_err() {
        return true;
    }
    let id = rustix::fs::statx(hosts, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
    let Ok(id) = id.map(|stat| stat.stx_mnt_id.to_string()) else { return true };
    // proc_pid_mountinfo(5): the first field is the number, and optional fields end with a lone hyphen.
    let fields = |line| <[u8]>::split(line, |&byte| byte == b' ');
    let mut lines = lines.split(|&byte| byte == b'\n');
    let line = lines.find(|line| fields(line).next() == Some(id.as_bytes()));
    line.is_none_or(|line| {
        fields(line)
            .take_while(|field| *field != b"-")
            .any(|field| field.starts_with(b"shared:") || field.starts_with(b"master:"))
    })
}
