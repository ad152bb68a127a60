//! The host changes between two starts, or is not what it should be; and the host itself as the image.

use gpurun::simulated_host::{Description, DriverFiles, InitError, SimulatedMig};
use gpurun_integration::{Caller, Ended, TestHost, description, must, rootfs, run};
use std::{fs, os::unix::fs::symlink, process::Command};

fn busybox() -> String {
    rootfs("busybox")
}

fn debian() -> String {
    rootfs("debian-python")
}

/// Puts another host in the place of this one, as an upgrade or a reboot does.
fn replace(host: &TestHost, description: &Description, driver: DriverFiles) {
    fs::remove_dir_all(host.path()).unwrap();
    let stand_ins = gpurun_integration::dist("libsimulated_nvml.so");
    gpurun::simulated_host::lay_out(&host.path(), description, stand_ins.parent().unwrap(), driver).unwrap();
}

#[test]
fn an_upgraded_driver_is_seen_at_the_next_start() {
    let old = Description { driver: "550.163.01".into(), cuda: "12.4".into(), ..description("t4") };
    let host = TestHost::with(&old, DriverFiles::StandIns);
    for caller in Caller::EACH {
        let libraries = || host.ok(caller, "--gpus all", &busybox(), "ls /usr/local/nvidia/lib64");
        assert!(libraries().contains("libcuda.so.550.163.01"));
        assert!(libraries().contains("libcuda.so.550.163.01"), "from the snapshot");
        let newer = Description { driver: "570.86.10".into(), cuda: "12.8".into(), ..description("t4") };
        replace(&host, &newer, DriverFiles::StandIns);
        let after = libraries();
        assert!(after.contains("libcuda.so.570.86.10") && !after.contains("550"), "{after}");
        assert!(
            host.ok(caller, "--gpus all", &debian(), "ldconfig -p; nvidia-smi -L 2>&1").contains("Tesla T4")
        );
        replace(&host, &old, DriverFiles::StandIns);
        assert!(libraries().contains("libcuda.so.550.163.01"));
    }
}

#[test]
fn gpus_and_mig_devices_that_come_and_go_are_seen_at_the_next_start() {
    let host = TestHost::new("a100-mig");
    let mut changed = description("a100-mig");
    changed.gpus[0].mig.as_mut().unwrap().devices = vec![SimulatedMig {
        uuid: "MIG-11111111-2222-3333-4444-555555555555".into(),
        profile: "7g.40gb".into(),
        gpu_instance: 0,
        compute_instance: 0,
        memory: 40 << 30,
    }];
    for caller in Caller::EACH {
        let list = || host.ok(caller, "--gpus all", &debian(), "nvidia-smi -L 2>/dev/null");
        let before = list();
        assert_eq!(before.matches("MIG-").count(), 3, "{before}");
        replace(&host, &changed, DriverFiles::StandIns);
        let after = list();
        assert_eq!(after.matches("MIG-").count(), 1, "{after}");
        assert!(
            after.contains("MIG-11111111")
                && host.sh(caller, "--gpus device=0:1", &busybox(), "true").code == 125
        );
        // MIG mode ended.
        let mut whole = changed.clone();
        whole.gpus[0].mig.as_mut().unwrap().enabled = false;
        replace(&host, &whole, DriverFiles::StandIns);
        assert!(!list().contains("MIG-") && host.sh(caller, "--gpus device=0", &busybox(), "true").code == 0);
        // One GPU less.
        let mut fewer = whole.clone();
        fewer.gpus.remove(0);
        replace(&host, &fewer, DriverFiles::StandIns);
        assert_eq!(list().matches("GPU ").count(), 1);
        replace(&host, &description("a100-mig"), DriverFiles::StandIns);
    }
}

#[test]
fn a_node_that_changed_is_seen_at_the_next_start() {
    let host = TestHost::new("8xh100");
    host.ok(Caller::Root, "--gpus all", &busybox(), "true");
    let node = host.path().join("dev/nvidia5");
    let index = description("8xh100").gpus.iter().position(|gpu| gpu.minor == 5).unwrap();
    fs::remove_file(&node).unwrap();
    for caller in Caller::EACH {
        let out = host.ok(caller, "--gpus all", &busybox(), "ls /dev | grep -c 'nvidia[0-9]'");
        assert_eq!(out, "7\n");
        host.refused(caller, &format!("--gpus device={index}"), &busybox(), "GPU-0014");
    }
    must(Command::new("mknod").args(["-m", "666"]).arg(&node).args(["c", "195", "5"]));
    assert_eq!(host.ok(Caller::Root, "--gpus all", &busybox(), "ls /dev | grep -c 'nvidia[0-9]'"), "8\n");
}

#[test]
fn libraries_of_another_version_than_the_module_are_refused() {
    let host = TestHost::new("t4");
    host.ok(Caller::Root, "--gpus all", &busybox(), "true");
    // The package was upgraded, the module was not.
    fs::write(host.path().join("sys/module/nvidia/version"), "550.163.01\n").unwrap();
    let version = host.path().join("proc/driver/nvidia/version");
    let text = fs::read_to_string(&version).unwrap().replace("535.216.03", "550.163.01");
    fs::write(&version, text).unwrap();
    for caller in Caller::EACH {
        let error = host.refused(caller, "--gpus all", &busybox(), "GPU-0013");
        assert!(
            error.contains("550.163.01") && error.contains("535.216.03") && error.contains("fix: "),
            "{error}"
        );
        assert_eq!(host.ok(caller, "", &busybox(), "echo fine"), "fine\n");
    }
}

#[test]
fn a_host_that_cannot_say_what_it_has_is_refused_with_its_reason() {
    for (failure, code) in [
        (InitError::DriverNotLoaded, "GPU-0010"),
        (InitError::LibRmVersionMismatch, "GPU-0013"),
        (InitError::NoPermission, "GPU-0012"),
        (InitError::Unknown, "GPU-0012"),
    ] {
        let description = Description { init_error: Some(failure), ..description("t4") };
        let host = TestHost::with(&description, DriverFiles::StandIns);
        for caller in Caller::EACH {
            let error = host.refused(caller, "--gpus all", &busybox(), code);
            assert!(error.contains("fix: "), "{failure:?}: {error}");
        }
    }
    let host = TestHost::new("t4");
    fs::remove_dir_all(host.path().join("sys/module")).unwrap();
    fs::remove_dir_all(host.path().join("proc/driver")).unwrap();
    host.refused(Caller::User, "--gpus all", &busybox(), "GPU-0010");
    let host = TestHost::new("t4");
    for entry in fs::read_dir(host.driver("usr/lib/x86_64-linux-gnu")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    host.refused(Caller::User, "--gpus all", &busybox(), "GPU-0011");
}

#[test]
fn a_snapshot_that_another_user_wrote_is_not_believed() {
    let host = TestHost::new("t4");
    host.ok(Caller::User, "--gpus all", &busybox(), "true");
    // The same file in a directory that is not the caller's: the forger names a GPU that is not there.
    let theirs = host.state_dir(gpurun_integration::USER);
    for entry in fs::read_dir(&theirs).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        if text.contains("Tesla T4") {
            fs::write(&path, text.replace("Tesla T4", "Forged GPU")).unwrap();
        }
    }
    let options = "--gpus all";
    let mut as_root = host.command(Caller::Root, options, &busybox(), &["true"]);
    let mut inventory = host.gpurun();
    inventory.arg("inventory").env("GPURUN_STATE_DIR", &theirs);
    // Nothing of ours is kept where another user could exchange it.
    let refused = run(as_root.env("GPURUN_STATE_DIR", &theirs));
    assert!(refused.code == 125 && refused.err.starts_with("error[GPU-0017]: "), "{refused:?}");
    assert!(!must(inventory.arg("--json")).contains("Forged GPU"));
    fs::remove_dir_all(&theirs).unwrap();
    symlink("/etc", &theirs).unwrap();
    let before = fs::read_dir("/etc").unwrap().count();
    run(host.command(Caller::Root, options, &busybox(), &["true"]).env("GPURUN_STATE_DIR", &theirs));
    assert_eq!(fs::read_dir("/etc").unwrap().count(), before);
}

fn on_host(host: &TestHost, caller: Caller, options: &str, script: &str) -> Ended {
    host.sh(caller, options, "host:", script)
}

#[test]
fn the_host_itself_is_an_image() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    for caller in Caller::EACH {
        let name = gpurun_integration::unique();
        let script = format!(
            "set -e; nvidia-smi -L | wc -l; touch $HOME/x /tmp/{name}; ls /usr/bin/env; pwd; ! ls /dev/vda 2>/dev/null; ls -d /proc/[0-9]* | wc -l"
        );
        let ended = on_host(&host, caller, "--gpus all", &script);
        assert_eq!(ended.code, 0, "{caller:?} {ended:?}");
        assert!(ended.out.starts_with("8\n/usr/bin/env\n/\n"), "{ended:?}");
        assert!(
            !std::path::Path::new("/tmp").join(&name).exists(),
            "it is written above the host, not to it"
        );
        // What is mounted on the host below / is there, and not to be written.
        let ended = on_host(
            &host,
            caller,
            "-u 0",
            "touch /etc/gpurun-was-here /usr/gpurun-was-here; rm -f /etc/hostname; true",
        );
        assert_eq!(ended.code, 0, "{ended:?}");
        for path in ["/etc/gpurun-was-here", "/usr/gpurun-was-here"] {
            assert!(!std::path::Path::new(path).exists());
        }
        assert_eq!(on_host(&host, caller, "", "exit 9").code, 9);
    }
}

#[test]
fn the_host_as_a_read_only_image() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        let script = "nvidia-smi -L 2>/dev/null | wc -l; touch /x /etc/x /usr/x /tmp/x 2>/dev/null; ls /x /etc/x /usr/x /tmp/x 2>/dev/null; touch $HOME/x && echo home";
        let ended = on_host(&host, caller, "--gpus all --read-only", script);
        assert_eq!((ended.code, ended.out.as_str()), (0, "8\nhome\n"), "{caller:?} {ended:?}");
    }
}

#[test]
fn the_demo_runs_for_everyone() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let ended = run(host
            .gpurun_of(caller)
            .args(["demo", "--simulate", "8xh100"])
            .env_remove("GPURUN_SIMULATED_HOST"));
        assert_eq!(ended.code, 0, "{caller:?} {ended:?}");
        assert!(ended.out.contains("GPU 7") && ended.out.contains("GPU-8cefbf6e"), "{ended:?}");
    }
}

#[test]
fn a_host_with_file_systems_below_its_directories_is_an_image_for_a_user() {
    let host = TestHost::new("t4");
    // gpurun puts something of its own into /var, and a docker host has mounts below it.
    let script = "ls /var/local /var/lib >/dev/null; cat /var/local/mounted; touch /tmp/x /var/tmp/x $HOME/x; echo written";
    for options in ["", "-u 0", "--read-only --tmpfs /tmp --tmpfs /var/tmp"] {
        let own = host.command(Caller::User, options, "host:", &["sh", "-ec", script]);
        let mut inside = Command::new("unshare");
        let mounts = "mount -t tmpfs tmpfs /var/local; echo below > /var/local/mounted; mount -t tmpfs -o mode=700 tmpfs /root; \
             mkdir /root/closed; mount --bind /usr/share /root/closed; cd \"$HOME\"; exec \"$@\"";
        inside.args(["-m", "sh", "-ec", mounts, "sh"]).arg(own.get_program()).args(own.get_args());
        inside.env_clear().envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let ended = run(&mut inside);
        assert_eq!((ended.code, ended.out.as_str()), (0, "below\nwritten\n"), "{options}: {ended:?}");
    }
}
