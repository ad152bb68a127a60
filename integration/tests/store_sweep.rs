//! Leftovers of killed launchers are removed while containers run, and no start waits for that.

use gpurun_integration::{Caller, SpawnPiped, TestHost, finish, image, must, rootfs, until};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Sets the mode by which gpurun recognises its own directories.
fn mark(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o1700)).unwrap();
}

/// Directories as killed launchers leave them, older than a second.
fn leave(host: &TestHost, caller: Caller, count: usize, files: usize) {
    let scratch = host.store(caller.uid()).join("scratch");
    for n in 0..count {
        let upper = scratch.join(format!("{n:012x}")).join("upper");
        fs::create_dir_all(&upper).unwrap();
        for file in 0..files {
            fs::write(upper.join(file.to_string()), "").unwrap();
        }
        mark(upper.parent().unwrap());
    }
    must(Command::new("chown").args(["-R", &format!("{0}:{0}", caller.uid())]).arg(&scratch));
    std::thread::sleep(Duration::from_millis(2100));
}

fn left(host: &TestHost, caller: Caller) -> usize {
    host.scratch(caller).len()
}

#[test]
fn a_start_removes_nothing_before_its_command_runs() {
    for (count, files) in [(500, 0), (1, 10_000)] {
        let host = TestHost::new("t4");
        for caller in Caller::EACH {
            host.ok(caller, "", &rootfs("busybox"), "true");
            leave(&host, caller, count, files);
            let mut child = host
                .command(caller, "", &rootfs("busybox"), &["sh", "-c", "echo ready; exec sleep 1000"])
                .spawn_piped();
            let mut ready = [0; 6];
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
            // All except those that a sweeper of low priority can remove in the time of an echo.
            assert!(count == 1 || left(&host, caller) > count / 2, "{}", left(&host, caller));
            until("the end of the leftovers", || left(&host, caller) == 1);
            child.kill().unwrap();
            finish(child);
        }
    }
}

/// The sweeper ends with the launcher, in the middle of its work, and the next one continues.
#[test]
fn short_commands_do_not_wait_and_many_of_them_clean_up_together() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        host.ok(caller, "", &rootfs("busybox"), "true");
        leave(&host, caller, 100, 3);
        let started = Instant::now();
        while left(&host, caller) > 0 {
            let children: Vec<_> = (0..4)
                .map(|_| host.command(caller, "", &rootfs("busybox"), &["sleep", "0.3"]).spawn_piped())
                .collect();
            for child in children {
                assert_eq!(finish(child).code, 0);
            }
            assert!(started.elapsed() < Duration::from_secs(120), "{} are left", left(&host, caller));
        }
        until("the end of the sweepers", || sweepers(&host.store(caller.uid())) == 0);
    }
}

/// Processes that have a descriptor of this store.
fn sweepers(store: &Path) -> usize {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|process| {
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|one| fs::read_link(one.path()).ok()).any(|target| target.starts_with(store))
    })
    .count()
}

/// Half a layer, as a killed process leaves it.
fn leave_half_a_layer(host: &TestHost, caller: Caller) -> PathBuf {
    host.ok(caller, "", &rootfs("busybox"), "true");
    let tmp = host.store(caller.uid()).join("tmp");
    let half = tmp.join("a".repeat(32));
    fs::create_dir_all(half.join("usr/lib")).unwrap();
    mark(&half);
    must(Command::new("chown").args(["-R", &caller.uid().to_string()]).arg(tmp));
    half
}

#[test]
fn a_start_that_unpacks_an_image_does_not_remove_half_a_layer_of_another_one() {
    let host = TestHost::new("t4");
    let archive = format!("docker-archive:{}", image("busybox", "docker.tar").display());
    for caller in Caller::EACH {
        let half = leave_half_a_layer(&host, caller);
        // The lock of the store's sweepers: with it, only the start itself could remove anything.
        let sweepers = fs::File::open(host.store(caller.uid()).join("scratch")).unwrap();
        sweepers.lock().unwrap();
        host.ok(caller, "", &archive, "true");
        assert!(half.join("usr/lib").exists(), "{caller:?}");
    }
}

#[test]
fn a_killed_pulls_files_go_while_a_container_runs() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let half = leave_half_a_layer(&host, caller);
        let child = host.command(caller, "", &rootfs("busybox"), &["sleep", "1000"]).spawn_piped();
        until("the end of the half layer", || !half.exists());
        let mut child = child;
        child.kill().unwrap();
        finish(child);
    }
}
