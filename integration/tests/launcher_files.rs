//! The container's root: what may be written, what is mounted, and what a hostile image cannot make of it.

use gpurun_integration::{Caller, TestHost, copy_of_root, must, rootfs, temporary};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

fn busybox() -> String {
    rootfs("busybox")
}

/// A directory of the caller's with a file in it.
fn owned_dir(caller: Caller) -> TempDir {
    let dir = temporary();
    fs::write(dir.path().join("file"), "host\n").unwrap();
    for path in [dir.path().to_owned(), dir.path().join("file")] {
        chown(path, Some(caller.uid()), Some(caller.uid())).unwrap();
    }
    dir
}

/// Every path below with its kind, owner, size and times, for "nothing has changed".
fn listing(dir: &Path) -> Vec<String> {
    fn walk(path: &Path, found: &mut Vec<String>) {
        let stat = fs::symlink_metadata(path).unwrap();
        // A copy's files are hard links, and each link that another test makes of the same file changes its ctime.
        let ctime = if stat.nlink() > 1 && !stat.is_dir() { 0 } else { stat.ctime_nsec() };
        let numbers = (stat.mode(), stat.uid(), stat.gid(), stat.size(), stat.mtime_nsec(), ctime);
        let content = if stat.is_file() {
            String::from_utf8_lossy(&fs::read(path).unwrap()).chars().take(99).collect()
        } else {
            String::new()
        };
        found.push(format!("{} {numbers:?} {content}", path.display()));
        if stat.is_dir() {
            let mut entries: Vec<PathBuf> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            entries.sort();
            entries.iter().for_each(|entry| walk(entry, found));
        }
    }
    let mut found = Vec::new();
    walk(dir, &mut found);
    found
}

fn assert_unchanged(dir: &Path, before: &[String], what: &str) {
    let after = listing(dir);
    let gone = before.iter().filter(|line| !after.contains(line)).map(|line| format!("- {line}"));
    let new = after.iter().filter(|line| !before.contains(line)).map(|line| format!("+ {line}"));
    let changes: Vec<String> = gone.chain(new).collect();
    assert!(changes.is_empty(), "{what}: {} changed:\n{}", dir.display(), changes.join("\n"));
}

#[test]
fn volumes_are_mounted_read_only_or_not() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let dir = owned_dir(caller);
        let path = dir.path().display();
        for (options, target) in [
            (format!("-v {path}:/data"), "/data"),
            (format!("-v {path}:/deep/new/data:rw"), "/deep/new/data"),
            (format!("--mount type=bind,source={path},target=/etc"), "/etc"),
        ] {
            let out = host.ok(
                caller,
                &options,
                &busybox(),
                &format!("cat {target}/file; echo inside > {target}/new"),
            );
            assert_eq!(out, "host\n", "{options}");
            assert_eq!(fs::read_to_string(dir.path().join("new")).unwrap(), "inside\n", "{options}");
            fs::remove_file(dir.path().join("new")).unwrap();
        }
        for options in
            [format!("-v {path}:/data:ro"), format!("--mount type=bind,src={path},dst=/data,readonly")]
        {
            let before = listing(dir.path());
            let ended = host.sh(
                caller,
                &format!("-u 0 {options}"),
                &busybox(),
                "cat /data/file; echo x > /data/new; echo x > /data/file; chmod 777 /data; rm /data/file",
            );
            assert_ne!(ended.code, 0, "{ended:?}");
            assert_eq!(ended.out, "host\n");
            assert_eq!(ended.err.matches("Read-only file system").count(), 4, "{ended:?}");
            assert_unchanged(dir.path(), &before, "");
        }
        // A file, over one that the image has and over nothing.
        for target in ["/etc/group", "/a/new/file"] {
            let options = format!("-v {path}/file:{target}:ro");
            assert_eq!(host.ok(caller, &options, &busybox(), &format!("cat {target}")), "host\n");
        }
        // The outer of two comes first, whatever the order.
        let inner = owned_dir(caller);
        fs::create_dir(dir.path().join("inner")).unwrap();
        let options = format!("-v {}:/data/inner -v {path}:/data", inner.path().display());
        assert_eq!(
            host.ok(caller, &options, &busybox(), "ls /data /data/inner"),
            "/data:\nfile\ninner\n\n/data/inner:\nfile\n"
        );
    }
}

#[test]
fn what_lies_mounted_below_a_volume_is_read_only_with_it() {
    let host = TestHost::new("t4");
    let dir = owned_dir(Caller::Root);
    fs::create_dir(dir.path().join("below")).unwrap();
    let target = dir.path().join("below");
    must(Command::new("mount").args(["-t", "tmpfs", "gpurun-test"]).arg(&target));
    for caller in Caller::EACH {
        let ended = host.sh(
            caller,
            &format!("-u 0 -v {}:/data:ro", dir.path().display()),
            &busybox(),
            "touch /data/below/x",
        );
        assert!(ended.code != 0 && ended.err.contains("Read-only"), "{caller:?} {ended:?}");
    }
    must(Command::new("umount").arg(&target));
}

#[test]
fn a_source_that_is_not_there_is_an_error_and_is_not_made() {
    let host = TestHost::new("t4");
    let dir = temporary();
    for caller in Caller::EACH {
        for option in ["-v", "--mount"] {
            let source = dir.path().join("missing");
            let options = match option {
                "-v" => format!("-v {}:/data", source.display()),
                _ => format!("--mount type=bind,source={},target=/data", source.display()),
            };
            let error = host.refused(caller, &options, &busybox(), "GPU-0055");
            assert!(error.contains("missing") && error.contains("fix: "), "{error}");
            assert!(!source.exists());
        }
    }
}

#[test]
fn a_volumes_target_stays_inside_whatever_links_the_image_has() {
    let host = TestHost::new("t4");
    let (outside, root) = (temporary(), copy_of_root("busybox"));
    fs::write(outside.path().join("canary"), "alive").unwrap();
    let up = format!("../../../../../../../../..{}", outside.path().display());
    symlink(outside.path(), root.path().join("absolute")).unwrap();
    symlink(&up, root.path().join("relative")).unwrap();
    symlink(outside.path().join("canary"), root.path().join("file")).unwrap();
    symlink("/proc/1/root", root.path().join("magic")).unwrap();
    symlink("/proc/self/cwd", root.path().join("cwd")).unwrap();
    let image = format!("rootfs:{}", root.path().display());
    let (before, image_before) = (listing(outside.path()), listing(root.path()));
    for caller in Caller::EACH {
        let dir = owned_dir(caller);
        for target in [
            "/absolute",
            "/absolute/new/deep",
            "/relative",
            "/relative/new",
            "/file",
            "/magic",
            "/magic/tmp/x",
            "/cwd",
        ] {
            for source in [dir.path().to_owned(), dir.path().join("file")] {
                let options = format!("-v {}:{target}", source.display());
                let ended = host.sh(
                    caller,
                    &options,
                    &image,
                    &format!("cat {target} {target}/file 2>/dev/null; true"),
                );
                if ended.code == 0 {
                    assert_eq!(ended.out, "host\n", "{options}: {ended:?}");
                } else {
                    assert!(
                        ended.code == 125 && ended.err.starts_with("error[GPU-00"),
                        "{options}: {ended:?}"
                    );
                }
                assert_unchanged(outside.path(), &before, &options);
                assert_unchanged(root.path(), &image_before, &options);
            }
            host.sh(caller, &format!("--tmpfs {target} -w {target}"), &image, "true");
            assert_unchanged(outside.path(), &before, target);
        }
    }
}

#[test]
fn the_image_is_never_written() {
    let host = TestHost::new("t4");
    let root = copy_of_root("busybox");
    let before = listing(root.path());
    let image = format!("rootfs:{}", root.path().display());
    for caller in Caller::EACH {
        for options in ["-u 0 --gpus all", "--gpus all --read-only", "-u 77 --init"] {
            host.sh(caller, options, &image, "rm -rf /bin /etc; echo x > /new; chmod 777 /root");
            assert_unchanged(root.path(), &before, &format!("{caller:?} {options}"));
        }
        // And every container starts anew.
        assert_eq!(host.ok(caller, "", &image, "ls -d /new 2>/dev/null; ls /etc/group"), "/etc/group\n");
    }
}

#[test]
fn a_read_only_root_has_a_home_volumes_and_tmpfs() {
    let host = TestHost::new("t4");
    let script = "touch /x /etc/x /usr/x /bin/x 2>/dev/null; ls /x /etc/x /usr/x /bin/x 2>/dev/null; \
                  rm /etc/passwd 2>/dev/null && echo removed; set -e; touch $HOME/x /data/x /scratch/x /dev/shm/x; \
                  cat $HOME/kept/file; ls /usr/local/nvidia/lib64/libcuda.so.1 >/dev/null; nvidia-smi -L >/dev/null 2>&1";
    for caller in Caller::EACH {
        for (user, home) in [
            ("", if caller == Caller::Root { "/root" } else { "/home/user" }),
            ("-u 0", "/root"),
            ("-u 4242", "/home/user"),
            ("-u 33", "/var/www"),
        ] {
            let (data, kept) = (temporary(), owned_dir(caller));
            fs::set_permissions(data.path(), fs::Permissions::from_mode(0o777)).unwrap();
            let options = format!(
                "{user} --read-only --gpus all -v {}:/data -v {}:{home}/kept:ro --tmpfs /scratch",
                data.path().display(),
                kept.path().display()
            );
            assert_eq!(
                host.ok(caller, &options, &rootfs("debian-python"), script),
                "host\n",
                "{caller:?} {user}"
            );
            assert!(data.path().join("x").exists());
        }
    }
}

#[test]
fn everyone_has_a_home_and_temporary_directories() {
    let host = TestHost::new("t4");
    // An image without any of it, whose files are root's.
    let bare = copy_of_root("busybox");
    fs::remove_dir(bare.path().join("tmp")).unwrap();
    fs::remove_dir(bare.path().join("root")).unwrap();
    let bare = format!("rootfs:{}", bare.path().display());
    for caller in Caller::EACH {
        for image in [&busybox(), &rootfs("debian-python"), &bare] {
            for user in ["", "-u 0", "-u 4242", "-u 33:33"] {
                host.ok(
                    caller,
                    user,
                    image,
                    "set -e; touch $HOME/x /tmp/x /var/tmp/x; ls $HOME >/dev/null; cd; mkdir -p a/b",
                );
                assert_eq!(
                    host.ok(caller, user, image, "stat -c %a /tmp"),
                    "1777\n",
                    "{caller:?} {user} {image}"
                );
            }
        }
        // One that the user may not write is not his.
        let out = host.ok(
            caller,
            "-u daemon",
            &rootfs("debian-python"),
            "echo $HOME; touch $HOME/x && echo writable",
        );
        assert!(out.ends_with("writable\n"), "{caller:?} {out}");
    }
}

#[test]
fn tmpfs_has_its_size_and_mode() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let script = "stat -c %a /t; df -k /t | tail -1 | tr -s ' ' | cut -d ' ' -f 2; head -c 2000000 /dev/zero > /t/x 2>/dev/null || echo full; \
                      cp /bin/busybox /t/y 2>/dev/null; (/t/true) 2>&1 | grep -c denied";
        assert!(
            host.sh(caller, "--tmpfs /t:size=1m,mode=0700", &busybox(), script)
                .out
                .starts_with("700\n1024\nfull\n")
        );
        let run = "cp /bin/busybox /t/echo; /t/echo ran";
        assert_eq!(host.sh(caller, "--tmpfs /t", &busybox(), run).code, 126);
        assert_eq!(host.ok(caller, "--tmpfs /t:exec", &busybox(), run), "ran\n");
        assert_ne!(host.sh(caller, "--tmpfs /t:ro", &busybox(), "touch /t/x").code, 0);
        let mount = "--mount type=tmpfs,target=/t,tmpfs-size=2m,tmpfs-mode=1770";
        assert!(host.sh(caller, mount, &busybox(), script).out.starts_with("1770\n2048\n"));
    }
}

/// What a hostile image may have in the place of what gpurun makes or mounts there.
#[derive(Debug, Clone, Copy)]
enum Trap {
    Absolute,
    Upwards,
    Dangling,
    Loop,
    Fifo,
    File,
    Directory,
    Magic,
}

const TRAPS: [Trap; 8] = [
    Trap::Absolute,
    Trap::Upwards,
    Trap::Dangling,
    Trap::Loop,
    Trap::Fifo,
    Trap::File,
    Trap::Directory,
    Trap::Magic,
];

fn set(trap: Trap, at: &Path, canary: &Path) {
    if let Ok(old) = fs::symlink_metadata(at) {
        if old.is_dir() { fs::remove_dir_all(at) } else { fs::remove_file(at) }.unwrap();
    }
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    match trap {
        Trap::Absolute => symlink(canary, at),
        Trap::Upwards => symlink(format!("../../../../../../../../../..{}", canary.display()), at),
        Trap::Dangling => symlink(canary.join("not-there/at-all"), at),
        Trap::Loop => symlink(at.file_name().unwrap(), at),
        Trap::Fifo => return drop(must(Command::new("mkfifo").arg(at))),
        Trap::File => fs::write(at, "a file"),
        Trap::Directory => fs::create_dir(at).and_then(|()| fs::write(at.join("x"), "in the way")),
        Trap::Magic => symlink("/proc/self/root", at),
    }
    .unwrap();
}

#[test]
fn a_hostile_image_starts_or_is_refused_and_touches_nothing() {
    let host = TestHost::new("8xh100");
    let canary = temporary();
    for name in ["lib64", "ld.so.conf.d", "sub"] {
        fs::create_dir(canary.path().join(name)).unwrap();
    }
    for name in [
        "ld.so.cache",
        "passwd",
        "00-gpurun.conf",
        "hosts",
        "resolv.conf",
        "hostname",
        "group",
        "libcuda.so.1",
    ] {
        fs::write(canary.path().join(name), "canary").unwrap();
    }
    // Whoever could be led there could also write there.
    must(Command::new("chmod").args(["-R", "a+rwX"]).arg(canary.path()));
    let before = listing(canary.path());
    let mut started = 0;
    for place in [
        "dev",
        "dev/shm",
        "dev/pts",
        "proc",
        "sys",
        "etc",
        "etc/ld.so.conf.d",
        "etc/ld.so.cache",
        "etc/ld.so.conf.d/00-gpurun.conf",
        "etc/ld.so.conf",
        "etc/passwd",
        "etc/group",
        "etc/hosts",
        "etc/resolv.conf",
        "etc/hostname",
        "usr",
        "usr/local",
        "usr/local/nvidia",
        "usr/local/nvidia/lib64",
        "usr/local/cuda",
        "usr/local/cuda/compat",
        "usr/lib/x86_64-linux-gnu",
        "usr/lib/x86_64-linux-gnu/libcuda.so.1",
        "lib64/ld-linux-x86-64.so.2",
        "tmp",
        "var",
        "var/tmp",
        "home",
        "home/user",
        "root",
        "work",
    ] {
        for trap in TRAPS {
            let root = copy_of_root("busybox");
            // What makes gpurun write a loader's cache and links.
            fs::create_dir_all(root.path().join("lib64")).unwrap();
            fs::write(root.path().join("lib64/ld-linux-x86-64.so.2"), "").unwrap();
            fs::create_dir_all(root.path().join("usr/lib/x86_64-linux-gnu")).unwrap();
            set(trap, &root.path().join(place), canary.path());
            let image = format!("rootfs:{}", root.path().display());
            for (caller, options) in [
                (Caller::Root, "-u 0 --gpus all -w /work"),
                (Caller::Root, "-u 4242 --gpus device=0 --read-only -t"),
                (Caller::User, "--gpus all -w /work"),
            ] {
                let ended = host.sh(caller, options, &image, "echo it runs");
                let refused = [125, 126].contains(&ended.code) && ended.err.contains("error[GPU-00");
                assert!(ended.code == 0 || refused, "{place} {trap:?} {caller:?} {options}: {ended:?}");
                started += u32::from(ended.code == 0);
                assert_eq!(
                    listing(canary.path()),
                    before,
                    "{place} {trap:?} {caller:?} {options}: {ended:?}"
                );
            }
        }
    }
    assert!(started > 100, "only {started} started");
    for caller in Caller::EACH {
        assert!(host.scratch(caller).is_empty(), "{:?}", host.scratch(caller));
    }
}

#[test]
fn a_hostile_passwd_names_no_one_else() {
    let host = TestHost::new("t4");
    for passwd in [
        "root:x:0:0:root:/../../../..:/bin/sh\n",
        "root:x:0:0:root:relative:/bin/sh\n",
        "root:x:0:0:root:/proc/1/root:/bin/sh\n",
        "root:x:0:0:root:/dev/null:/bin/sh\n",
        "root:x:0:0:root:/etc/passwd:/bin/sh\n",
        "root:x:4294967295:0:root:/:/bin/sh\n",
        "root::::::\n\n:::\n",
        "\0\0\0",
    ] {
        let root = copy_of_root("busybox");
        fs::remove_file(root.path().join("etc/passwd")).unwrap();
        fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        let image = format!("rootfs:{}", root.path().display());
        for caller in Caller::EACH {
            for options in ["-u 0", "-u root", "-u 0 --read-only"] {
                let ended = host.sh(caller, options, &image, "id -u; touch $HOME/x && echo writable");
                let refused = ended.code == 125 && ended.err.starts_with("error[GPU-00");
                assert!(
                    refused || ended.out == "0\nwritable\n",
                    "{passwd:?} {caller:?} {options}: {ended:?}"
                );
            }
        }
    }
}

/// A link would lead the driver's device nodes away from the container's own /dev, and what is masked beneath /proc and /sys as well.
#[test]
fn a_link_in_the_place_of_a_kernels_directory_is_refused_wherever_it_leads() {
    let host = TestHost::new("t4");
    for (name, target) in [
        ("dev", "real"),
        ("dev", "/absent"),
        ("dev", "/../../../../tmp/absent"),
        ("dev", "dev"),
        ("proc", "absent"),
        ("sys", "/absent/deep"),
    ] {
        let root = copy_of_root("busybox");
        fs::create_dir(root.path().join("real")).unwrap();
        fs::remove_dir(root.path().join(name))
            .or_else(|_| fs::remove_dir_all(root.path().join(name)))
            .unwrap();
        symlink(target, root.path().join(name)).unwrap();
        let image = format!("rootfs:{}", root.path().display());
        for caller in Caller::EACH {
            let said = host.refused(caller, "--gpus all", &image, "GPU-0057");
            assert!(said.contains(&format!("/{name} is not a plain directory")), "{target}: {said}");
        }
    }
}
