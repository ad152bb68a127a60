//! Attacks that other engines fell to, and those that gpurun's own design invites.

use gpurun_integration::{Caller, TestHost, copy_of_root, dist, rootfs, temporary};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

fn busybox() -> String {
    rootfs("busybox")
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
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
