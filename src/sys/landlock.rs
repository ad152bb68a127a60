//! Landlock (landlock(7), Documentation/userspace-api/landlock.rst), which neither libc nor rustix has.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// `struct landlock_ruleset_attr` of linux/landlock.h. Older kernels accept the longer structure while its tail is zero.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`, which is packed.
#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

/// LANDLOCK_ACCESS_FS_EXECUTE and LANDLOCK_ACCESS_FS_READ_FILE: what is allowed on a program's own file.
pub const RUN_FILE: u64 = 1 | 1 << 2;
/// LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, since ABI 6.
pub const ABSTRACT_UNIX_SOCKETS: u64 = 1;
/// LANDLOCK_SCOPE_SIGNAL, since ABI 6.
pub const SIGNALS: u64 = 1 << 1;

/// The kernel's Landlock ABI version; 0 without Landlock.
pub fn abi() -> u32 {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel reads no memory: the pointer must be null and the size zero.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}

/// The LANDLOCK_ACCESS_FS_* rights that a kernel with this ABI can restrict.
pub fn file_rights(abi: u32) -> u64 {
    let bits = match abi {
        0 => 0,
        1 => 13,
        // LANDLOCK_ACCESS_FS_REFER: links and renames between directories.
        2 => 14,
        // LANDLOCK_ACCESS_FS_TRUNCATE
        3 | 4 => 15,
        // LANDLOCK_ACCESS_FS_IOCTL_DEV
        _ => 16,
    };
    (1 << bits) - 1
}

/// A ruleset before it is enforced.
#[derive(Debug)]
pub struct Ruleset(OwnedFd);

impl Ruleset {
    /// A ruleset that denies `rights` on every file, and keeps what `scopes` name within the domain.
    ///
    /// # Errors
    /// EOPNOTSUPP where Landlock is compiled in and disabled, EINVAL for a right that the kernel does not know, ENOMSG where
    /// nothing is restricted.
    pub fn new(rights: u64, scopes: u64) -> io::Result<Self> {
        let attr = RulesetAttr { handled_access_fs: rights, handled_access_net: 0, scoped: scopes };
        // SAFETY: `attr` is a live structure of the size that is passed, which the kernel only reads.
        let fd = unsafe {
            libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0_u32)
        };
        match i32::try_from(fd) {
            // SAFETY: the kernel has just returned this new descriptor (close-on-exec), which nothing else owns.
            Ok(fd) if fd >= 0 => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Allows `rights` on the file or directory behind `fd`, and on everything beneath that directory.
    ///
    /// # Errors
    /// EINVAL for rights that the ruleset does not restrict, or that a regular file cannot have.
    pub fn allow_beneath(&self, fd: BorrowedFd<'_>, rights: u64) -> io::Result<()> {
        const LANDLOCK_RULE_PATH_BENEATH: libc::c_int = 1;
        let attr = PathBeneathAttr { allowed_access: rights, parent_fd: fd.as_raw_fd() };
        // SAFETY: `attr` is a live structure of the rule type that is passed, which the kernel only reads; it takes its own
        // reference to the file.
        let result = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                self.0.as_raw_fd(),
                LANDLOCK_RULE_PATH_BENEATH,
                &raw const attr,
                0_u32,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Permanently enforces the ruleset on the calling thread and its future children. The caller must have set no_new_privs.
    ///
    /// # Errors
    /// E2BIG below sixteen other domains.
    pub fn enforce(&self) -> io::Result<()> {
        // SAFETY: takes a descriptor and no pointer.
        let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0_u32) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
