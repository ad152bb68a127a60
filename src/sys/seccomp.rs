//! seccomp(2).

use std::io;

/// Lays `filter` (instructions of classic BPF, `struct sock_filter` after `struct sock_filter`) on the calling thread
/// and its future children. It can never be taken off. The caller has set no_new_privs or has CAP_SYS_ADMIN.
///
/// SECCOMP_FILTER_FLAG_SPEC_ALLOW as runc sets it: without it kernels before 5.16 switch the speculative-store-bypass
/// mitigation on for every filtered process, which costs compute-bound programs several per cent.
///
/// # Errors
/// EINVAL where `filter` is not a program; EACCES without no_new_privs; ENOSYS or EINVAL on a kernel without seccomp.
pub fn install(filter: &[u8]) -> io::Result<()> {
    set(filter, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW).map(drop)
}

/// SECCOMP_SET_MODE_FILTER with these flags; what the kernel returns.
pub(super) fn set(filter: &[u8], flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let instructions = filter.len() / size_of::<libc::sock_filter>();
    if !filter.len().is_multiple_of(size_of::<libc::sock_filter>()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let program = libc::sock_fprog {
        len: u16::try_from(instructions).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies `len` instructions of 8 bytes out of `filter`, which lives until the call returns and is
    // as long; it neither writes there nor minds alignment.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result >= 0 { Ok(result) } else { Err(io::Error::last_os_error()) }
}
