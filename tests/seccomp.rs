//! The system call filter on the real kernel. A filter is one thread's, so each test gives it to a thread of its own.

use gpurun::{apply::container::seccomp::filter, sys::seccomp::install};

/// Raw result of a system call made behind the filter of a container that keeps `capabilities`.
fn behind_filter(capabilities: u64, call: libc::c_long, arguments: [libc::c_long; 3]) -> Result<i64, i32> {
    std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        install(&filter(capabilities)).unwrap();
        let [a, b, c] = arguments;
        // SAFETY: the calls of these tests take numbers or null pointers and change nothing.
        match unsafe { libc::syscall(call, a, b, c) } {
            -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
            result => Ok(result),
        }
    })
    .join()
    .unwrap()
}

#[test]
fn what_docker_allows_works() {
    assert_eq!(behind_filter(0, libc::SYS_getpid, [0; 3]), Ok(i64::from(std::process::id())));
    assert!(behind_filter(0, libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0]).is_ok());
    assert!(behind_filter(0, libc::SYS_personality, [0xffff_ffff, 0, 0]).is_ok());
}

#[test]
fn what_docker_refuses_fails_with_eperm() {
    let new_user = libc::CLONE_NEWUSER | libc::SIGCHLD;
    for (call, first) in [
        (libc::SYS_mount, 0),
        (libc::SYS_unshare, 0),
        (libc::SYS_keyctl, 0),
        (libc::SYS_setns, -1),
        (libc::SYS_bpf, -1),
        (libc::SYS_clone, new_user.into()),
        (libc::SYS_socket, libc::AF_ALG.into()),
        (libc::SYS_socket, libc::AF_VSOCK.into()),
        (libc::SYS_personality, 0x0004_0000),
    ] {
        assert_eq!(behind_filter(0, call, [first, 0, 0]), Err(libc::EPERM), "{call}");
    }
}

#[test]
fn what_libraries_try_first_fails_with_enosys() {
    assert_eq!(behind_filter(0, libc::SYS_clone3, [0; 3]), Err(libc::ENOSYS));
    assert_eq!(behind_filter(0, 9999, [0; 3]), Err(libc::ENOSYS));
}

#[test]
fn a_capability_opens_its_calls() {
    let admin = 1 << 21;
    // unshare(0) succeeds for everyone whom the filter lets through; clone3 without arguments is EINVAL there.
    assert_eq!(behind_filter(admin, libc::SYS_unshare, [0; 3]), Ok(0));
    assert_eq!(behind_filter(admin, libc::SYS_clone3, [0; 3]), Err(libc::EINVAL));
}

#[test]
fn what_is_no_program_is_refused() {
    std::thread::spawn(|| {
        rustix::thread::set_no_new_privs(true).unwrap();
        assert!(install(&[0; 7]).is_err());
        assert!(install(&[]).is_err());
        assert!(install(&[0xff; 16]).is_err());
    })
    .join()
    .unwrap();
}
