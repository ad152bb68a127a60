//! Attacks that other engines fell to, and those that gpurun's own design invites.

use gpurun_integration::{Caller, TestHost, copy_of_root, dist, rootfs, temporary};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
};

fn busybox() -> String {
    rootfs("busybox")
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The same command under a limit of prlimit(1).
fn limited(limit: &str, command: &Command) -> Command {
    let mut limited = Command::new("prlimit");
    limited.arg(limit).arg(command.get_program()).args(command.get_args());
    limited.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    limited.current_dir(command.get_current_dir().unwrap_or(Path::new("/")));
    limited
}

/// CVE-2024-21626: until the command runs, its process has directories of the host's open, and paths of the image's and of
/// volumes are resolved.
#[test]
fn no_path_leads_through_a_descriptor_to_the_host() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for descriptor in 3..20 {
            let volume = temporary();
            symlink(format!("/proc/self/fd/{descriptor}"), volume.path().join("link")).unwrap();
            let options = format!("-u 0 -v {}:/data -w /data/link", volume.path().display());
            let ended = host.sh(caller, &options, &busybox(), "ls -d ../../../../../../../../work; pwd");
            assert_eq!(ended.code, 126, "{caller:?} {descriptor}: {ended:?}");
            assert!(ended.out.is_empty() && ended.err.contains("working directory"), "{ended:?}");

            // Standard input is the container's null device, whatever a volume lies over.
            let image = copy_of_root("busybox");
            symlink("/dev", image.path().join("data")).unwrap();
            let volume = temporary();
            symlink(format!("/proc/self/fd/{descriptor}"), volume.path().join("null")).unwrap();
            let options = format!("-u 0 -v {}:/data", volume.path().display());
            let image = format!("rootfs:{}", image.path().display());
            let ended =
                host.sh(caller, &options, &image, "readlink /proc/self/fd/0; test -c /proc/self/fd/0");
            assert_eq!(
                (ended.code, ended.out.as_str()),
                (0, "/dev/null\n"),
                "{caller:?} {descriptor}: {ended:?}"
            );

            let command = format!("/proc/self/fd/{descriptor}/../../../../../../../../../../bin/sh");
            let image = copy_of_root("busybox");
            script(&image.path().join("script"), &format!("#!{command}\n"));
            let image = format!("rootfs:{}", image.path().display());
            for command in [command.as_str(), "/script"] {
                let ended = gpurun_integration::run(&mut host.command(caller, "-u 0", &image, &[command]));
                assert!(matches!(ended.code, 126 | 127) && ended.out.is_empty(), "{command}: {ended:?}");
            }
        }
    }
}

/// CVE-2019-5736: /proc/self/exe of the process that execs the command is gpurun's own file.
#[test]
fn the_hosts_gpurun_cannot_be_changed_from_a_container() {
    let host = TestHost::new("t4");
    let image = copy_of_root("busybox");
    // Whatever the kernel opens as the command or its interpreter becomes /proc/1/exe, and under this name it starts another.
    symlink("/proc/self/exe", image.path().join("gpurun-init")).unwrap();
    script(&image.path().join("script"), "#!/gpurun-init /evil\n");
    script(
        &image.path().join("evil"),
        "#!/bin/sh\nreadlink /proc/1/exe\nchmod 4777 /proc/1/exe\n(echo x >>/proc/1/exe)\ntrue\n",
    );
    let name = format!("rootfs:{}", image.path().display());
    let own = dist("gpurun");
    let before = fs::metadata(&own).unwrap();
    for options in ["-u 0", "-u 0 --init", "-u 0 --security-opt seccomp=unconfined", ""] {
        for command in [&["/gpurun-init", "/evil"][..], &["/script"], &["/evil"]] {
            let ended = gpurun_integration::run(&mut host.command(Caller::Root, options, &name, command));
            let after = fs::metadata(&own).unwrap();
            let same = (after.mode(), after.mtime_nsec()) == (before.mode(), before.mtime_nsec());
            if !same {
                fs::set_permissions(&own, before.permissions()).unwrap();
            }
            assert!(same, "{options} {command:?}: {:o} {ended:?}", after.mode());
        }
    }
    // The failure of a command that comes to run by way of gpurun's own file is told like any other.
    for options in ["-u 0", ""] {
        let ended = host.sh(Caller::Root, options, &busybox(), "exit 3");
        assert_eq!((ended.code, ended.err.as_str()), (3, ""));
        let mut command = host.gpurun();
        command.args(["run", "--json"]).args(options.split_whitespace()).args([&busybox(), "nosuch"]);
        let ended = gpurun_integration::run(&mut command);
        assert_eq!(ended.code, 127, "{ended:?}");
        assert!(ended.err.starts_with(r#"{"error":"GPU-0061""#), "{ended:?}");
    }
}

/// What is masked in /proc, and every device of a container without root, is a node of the host's.
#[test]
fn nobody_changes_the_hosts_device_nodes() {
    let host = TestHost::new("t4");
    let nodes = ["/dev/null", "/dev/zero", "/dev/tty"].map(|path| (path, fs::metadata(path).unwrap()));
    for caller in Caller::EACH {
        let out = host.ok(
            caller,
            "-u 0",
            &busybox(),
            "for f in $(awk '$5 ~ \"^/(proc|dev)/\" { print $5 }' /proc/self/mountinfo); do test -c $f && chmod 600 $f && echo $f; done
             echo x >/dev/null && head -c 1 /dev/zero | wc -c",
        );
        for (path, before) in &nodes {
            let after = fs::metadata(path).unwrap();
            if after.mode() != before.mode() {
                fs::set_permissions(path, before.permissions()).unwrap();
            }
            assert_eq!(after.mode(), before.mode(), "{caller:?}: {path}");
        }
        assert_eq!(out.trim(), "1", "{caller:?}: no node of the host's, and devices can be written and read");
    }
}

/// A directory that is deeper than a stack, a path or the number of descriptors, and one that its owner has closed.
#[test]
fn no_tree_that_a_container_leaves_stays() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let script = "mkdir -p /tmp/t && cd /tmp/t
            # One more level on top each time, because a name longer than a page cannot be entered.
            for i in $(seq 15); do
              path=$(seq -s / 100 | tr -d ' ')
              mkdir -p n/$path && { test -d d && mv d n/$path/d; mv n d; }
            done
            mkdir -p closed/inner/file && chmod 0 closed/inner closed";
        let gpurun = host.command(caller, "", &busybox(), &["sh", "-c", script]);
        let ended = gpurun_integration::run(&mut limited("--nofile=1024:20000", &gpurun));
        assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{caller:?}");
        assert!(host.scratch(caller).is_empty(), "{caller:?}: {:?}", host.scratch(caller));
    }
}

/// 13 MB of cache that name the same 8 MB in each entry: 3 TB.
#[test]
fn an_image_does_not_make_the_launcher_read_more_than_it_holds() {
    let host = TestHost::new("t4");
    let image = copy_of_root("busybox");
    let (entries, length) = (200_000_u32, 8_u32 << 20);
    let strings = 48 + entries * 24;
    let mut cache = b"glibc-ld.so.cache1.1".to_vec();
    for word in [entries, length + 1, 2, 0, 0, 0, 0] {
        cache.extend(word.to_ne_bytes());
    }
    for _ in 0..entries {
        for word in [0x303, strings, strings, 0, 0, 0] {
            cache.extend(word.to_ne_bytes());
        }
    }
    cache.resize(cache.len() + length as usize, b'a');
    cache.push(0);
    let path = image.path().join("etc/ld.so.cache");
    let _ = fs::remove_file(&path);
    fs::write(&path, cache).unwrap();
    let image = format!("rootfs:{}", image.path().display());
    let gpurun = host.command(Caller::Root, "--gpus all", &image, &["true"]);
    let ended = gpurun_integration::run(&mut limited("--as=1000000000", &gpurun));
    assert_eq!((ended.code, ended.err.as_str()), (0, ""));
}

/// Whoever makes a directory of the demo's first owns the library that root then loads.
#[test]
fn the_demo_takes_no_directory_that_somebody_else_made() {
    let host = TestHost::new("t4");
    let theirs = temporary();
    let dir = theirs.path().join("demo");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(gpurun_integration::USER), None).unwrap();
    let mut command = host.gpurun();
    let ended = gpurun_integration::run(command.args(["demo", "--keep"]).arg(&dir));
    assert_eq!(ended.code, 125, "{ended:?}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

/// A store is cleaned of what is in its `tmp`; `/` and many a home have a `tmp`, too.
#[test]
fn a_directory_that_is_no_store_is_not_cleaned() {
    let host = TestHost::new("t4");
    let dir = temporary();
    fs::create_dir(dir.path().join("tmp")).unwrap();
    fs::write(dir.path().join("tmp/precious"), "x").unwrap();
    let ended = gpurun_integration::run(
        host.command(Caller::Root, "", &busybox(), &["true"]).env("GPURUN_STORE", dir.path()),
    );
    assert_eq!(ended.code, 125, "{ended:?}");
    assert!(dir.path().join("tmp/precious").exists());
    let mut command = host.command(Caller::User, "", &busybox(), &["true"]);
    let ended = gpurun_integration::run(command.env_remove("HOME").env_remove("GPURUN_STORE"));
    assert!(ended.code == 125 && ended.err.contains("HOME"), "{ended:?}");
}
