//! A container ends with its launcher, also when its first process has cancelled the kernel's death signal.

use gpurun_integration::{Caller, TestHost, processes_with, rootfs, unique, until};

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
