//! mount_setattr(2), which no crate has.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// What a mount forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    /// MOUNT_ATTR_RDONLY
    pub read_only: bool,
    /// MOUNT_ATTR_NOSUID
    pub nosuid: bool,
    /// MOUNT_ATTR_NODEV
    pub nodev: bool,
    /// MOUNT_ATTR_NOEXEC
    pub noexec: bool,
}

impl Flags {
    /// Applies an option of mount(8), such as `ro` or `exec`. `false` if it is another option.
    pub fn set(&mut self, option: &str) -> bool {
        let (flag, value) = match option {
            "ro" => (&mut self.read_only, true),
            "rw" => (&mut self.read_only, false),
            "nosuid" => (&mut self.nosuid, true),
            "suid" => (&mut self.nosuid, false),
            "noexec" => (&mut self.noexec, true),
            "exec" => (&mut self.noexec, false),
            _ => return false,
        };
        *flag = value;
        true
    }

    /// The bits of `MOUNT_ATTR_*` in linux/mount.h.
    pub fn bits(self) -> u64 {
        u64::from(self.read_only)
            | u64::from(self.nosuid) << 1
            | u64::from(self.nodev) << 2
            | u64::from(self.noexec) << 3
    }
}

/// Adds `flags` to the mount behind `mount` (a descriptor of its root) and, with `recursive`, to those beneath it, and
/// makes them private: nothing mounted later travels in or out.
pub fn restrict(mount: BorrowedFd<'_>, flags: Flags, recursive: bool) -> io::Result<()> {
    let attr = MountAttr { attr_set: flags.bits(), attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    set(mount, &attr, recursive)
}

/// Makes the mount a slave: it receives mounts of its peers and propagates none.
pub fn restrict_slave(mount: BorrowedFd<'_>, flags: Flags, recursive: bool) -> io::Result<()> {
    let attr = MountAttr { attr_set: flags.bits(), attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
    set(mount, &attr, recursive)
}

/// What of the mounts that are made on one travels to others, or comes from them (mount_namespaces(7), "Shared subtrees").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// What its former peers mount comes; nothing goes.
    Slave,
    /// What is mounted goes to peers, of which there are none yet; a slave goes on hearing of its master.
    Shared,
}

/// Changes it for the mount behind `mount`, a descriptor of its root, and for no other.
pub fn set_propagation(mount: BorrowedFd<'_>, propagation: Propagation) -> io::Result<()> {
    let propagation = match propagation {
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    set(mount, &MountAttr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 }, false)
}

fn set(mount: BorrowedFd<'_>, attr: &MountAttr, recursive: bool) -> io::Result<()> {
    let at = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, `attr` is a live `struct mount_attr` of the size that is passed, and
    // the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            at,
            &raw const *attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
