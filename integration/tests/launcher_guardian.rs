//! A container ends with its launcher, also when its first process has cancelled the kernel's death signal.

use gpurun_integration::{Caller, SpawnPiped, TestHost, finish, processes_with, rootfs, unique, until};
use std::io::Read;

/// Changing the uid clears the death signal, as gosu and su-exec do; a program can also clear it itself.
const CLEARS: [(Caller, &str, &[&str]); 3] = [
    (
        Caller::Root,
        "-u 0",
        &["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", "sleep", "1000"],
    ),
    (Caller::Root, "-u 4242", &["python3", "-c", CANCEL]),
    (Caller::User, "", &["python3", "-c", CANCEL]),
];

/// PR_SET_PDEATHSIG is 1.
const CANCEL: &str =
    "import ctypes, time; ctypes.CDLL(None).prctl(1, 0); print('cancelled', flush=True); time.sleep(1000)";

#[test]
fn a_container_without_a_death_signal_ends_with_its_killed_launcher() {
    let host = TestHost::new("t4");
    for (caller, options, words) in CLEARS {
        let mark = unique();
        let options = format!("-e MARK={mark} {options}");
        let mut child = host.command(caller, &options, &rootfs("debian-python"), words).spawn().unwrap();
        let is_running = || {
            processes_with(&mark).iter().any(|pid| {
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                line.starts_with(b"sleep\0") || line.starts_with(b"python3\0")
            })
        };
        until("the command", is_running);
        if words[0] == "python3" {
            // Its line is written after the call.
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        until("the end of the container", || processes_with(&mark).is_empty());
    }
}

/// Without a pid namespace the kernel ends only the first process. The others are in sessions of their own, one of them in
/// user and mount namespaces below the container's, and one is another user of the container.
const LEAVES: &str = "setsid sleep 1000 & (setsid sleep 1000 &) & \
    unshare -Ur setsid sleep 1000 & \
    python3 -c 'import os, time\nfor _ in range(5):\n  if os.fork() == 0: os.setsid()\ntime.sleep(1000)' & \
sleep 1; echo ready; ";

#[test]
fn no_process_outlives_a_container_on_the_hosts_pid_namespace() {
    let host = TestHost::new("t4");
    for (caller, options) in [
        (Caller::Root, "--cap-add SYS_ADMIN"),
        (Caller::Root, "--cap-add SYS_ADMIN -u 4242"),
        (Caller::User, "--security-opt seccomp=unconfined"),
        (Caller::User, "--security-opt seccomp=unconfined -u 0"),
    ] {
        for (end, is_killed) in [("exit 3", false), ("sleep 1000", true)] {
            let mark = unique();
            let options = format!("--pid host -e MARK={mark} {options}");
            let script = LEAVES.to_owned() + end;
            let mut child = host
                .command(caller, &options, &rootfs("debian-python"), &["sh", "-c", &script])
                .spawn_piped();
            child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
            if is_killed {
                child.kill().unwrap();
            }
            let code = finish(child).code;
            assert_eq!(code, if is_killed { 137 } else { 3 }, "{caller:?} {options}");
            if is_killed {
                until("the end of the processes", || processes_with(&mark).is_empty());
            }
            assert_eq!(processes_with(&mark), [0; 0], "{caller:?} {options}");
        }
    }
}
