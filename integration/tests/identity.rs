//! The host identity of a container's command: ids, groups, device nodes and volumes, for root, under sudo, and for users
//! with and without subordinate ids, with accounts in files or in the name service switch.

use gpurun_integration::{
    Caller, Ended, TestHost, USER, copy_of_root, dist, must, pack, rootfs, run, temporary,
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::Command,
};
use tempfile::TempDir;

fn busybox() -> String {
    rootfs("busybox")
}

/// A command in a mount namespace with these files of /etc in place of the host's.
fn with_etc(etc: &Path, before: &str, command: &Command) -> Command {
    let mut inside = Command::new("unshare");
    let script = format!(
        "cd \"$0\"; for f in *; do [ -e /etc/$f ] || touch /etc/$f; mount --bind $f /etc/$f; done; {before} cd \"$HOME\"; exec \"$@\""
    );
    inside.args(["-m", "sh", "-ec", &script]).arg(etc).arg(command.get_program()).args(command.get_args());
    inside.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    inside
}

/// Files of /etc: the host's, with these lines added.
fn etc(lines: &[(&str, &str)]) -> TempDir {
    let dir = temporary();
    for (name, line) in lines {
        let own = if *name == "nsswitch.conf" {
            String::new()
        } else {
            fs::read_to_string(format!("/etc/{name}")).unwrap_or_default()
        };
        fs::write(dir.path().join(name), format!("{own}{line}\n")).unwrap();
    }
    dir
}

/// `gpurun run` of [`USER`] in these groups.
fn user_in_groups(host: &TestHost, groups: &str, options: &str, script: &str) -> Command {
    let own = host.command(Caller::User, options, &busybox(), &["sh", "-c", script]);
    let mut command = Command::new("setpriv");
    let id = USER.to_string();
    command.args(["--reuid", &id, "--regid", &id, "--groups", groups, "--inh-caps=-all"]);
    command.arg(dist("gpurun")).args(own.get_args().skip_while(|word| *word != "run"));
    command.env_clear().envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.current_dir(own.get_current_dir().unwrap());
    command
}

const ACCOUNT: &str = "gpurun-tester:x:54321:54321::/nowhere:/bin/sh";

#[test]
fn under_sudo_the_container_has_the_groups_of_the_caller_and_none_of_the_image() {
    let host = TestHost::new("t4");
    // The image adds the caller's uid, under another name, to groups that have rights on the host.
    let hostile = copy_of_root("busybox");
    let write = |name: &str, text: String| fs::write(hostile.path().join("etc").join(name), text).unwrap();
    write("passwd", format!("root:x:0:0::/root:/bin/sh\nx:x:{USER}:0::/:/bin/sh\n"));
    write("group", "root:x:0:x\ndisk:x:6:x\nshadow:x:42:x,gpurun-tester\n".into());
    let image = format!("rootfs:{}", hostile.path().display());
    let etc = etc(&[("passwd", ACCOUNT), ("group", "gpurun-a:x:7001:gpurun-tester\ngpurun-b:x:7002:root")]);
    let command =
        host.command(Caller::Root, "", &image, &["sh", "-c", "id -u; id -g; grep Groups /proc/self/status"]);
    let mut command = with_etc(etc.path(), "", &command);
    let ended = run(command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", USER.to_string()));
    let words: Vec<&str> = ended.out.split_whitespace().collect();
    assert_eq!(
        words,
        [&USER.to_string(), &USER.to_string(), "Groups:", "7001", &USER.to_string()],
        "{ended:?}"
    );
}

#[test]
fn a_sudo_variable_that_names_no_user_is_refused() {
    let host = TestHost::new("t4");
    for (uid, gid) in [
        ("4294967295", "1000"),
        ("1000", "4294967295"),
        ("4294967296", "0"),
        ("-1", "1"),
        ("x", "1"),
        ("1000", ""),
    ] {
        let mut command = host.command(Caller::Root, "", &busybox(), &["id", "-u"]);
        let ended = run(command.env("SUDO_UID", uid).env("SUDO_GID", gid));
        assert!(ended.code == 125 && ended.out.is_empty(), "{uid}:{gid}: {ended:?}");
        assert!(ended.err.starts_with("error[GPU-0054]: SUDO_") && ended.err.contains("fix: "), "{ended:?}");
        // For users other than root it is an ordinary variable.
        let mut command = host.command(Caller::User, "", &busybox(), &["id", "-u"]);
        assert_eq!(run(command.env("SUDO_UID", uid).env("SUDO_GID", gid)).out, format!("{USER}\n"));
    }
    let mut command = host.command(Caller::Root, "", &busybox(), &["id", "-u"]);
    assert_eq!(run(command.env("SUDO_UID", "0").env("SUDO_GID", "0")).out, "0\n");
}

/// The nodes of a host with one GPU: only group 44 may open them.
fn close_nodes(host: &TestHost) {
    for entry in fs::read_dir(host.path().join("dev")).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("nvidia") && !entry.path().is_dir() {
            chown(entry.path(), Some(0), Some(44)).unwrap();
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o660)).unwrap();
        }
    }
}

/// Prints "open" if the permissions of the node let this process open it; there is no driver behind it.
const OPENS: &str = "(: < /dev/nvidia0) 2>&1 | grep -q 'ermission denied' && echo closed || echo open";

#[test]
fn a_callers_group_opens_a_gpu_with_and_without_subordinate_ids() {
    let host = TestHost::new("t4");
    close_nodes(&host);
    let accounts = [
        ("passwd", ACCOUNT),
        ("subuid", "gpurun-tester:700000:65536"),
        ("subgid", "gpurun-tester:800000:65536"),
    ];
    let subordinate = etc(&accounts);
    for options in [
        "--gpus all",
        "--gpus all -u 0",
        "--gpus all -u 33:33",
        "--gpus all --group-add 44",
        "--gpus all --group-add keep-groups",
    ] {
        let command = user_in_groups(&host, "44", options, OPENS);
        for ended in [run(&mut with_etc(subordinate.path(), "", &command)), run(&mut { command })] {
            assert_eq!(ended.out, "open\n", "{options}: {ended:?}");
        }
    }
    let map = "wc -l < /proc/self/uid_map";
    let mapped = run(&mut with_etc(subordinate.path(), "", &user_in_groups(&host, "44", "--gpus all", map)));
    assert_ne!(mapped.out, "1\n", "the subordinate ids are used: {mapped:?}");
    // The container cannot have its own groups and the caller's.
    let both = user_in_groups(&host, "44", "--gpus all --group-add 7", OPENS);
    for ended in [run(&mut with_etc(subordinate.path(), "", &both)), run(&mut { both })] {
        assert!(ended.code == 125 && ended.err.contains("--group-add 7"), "{ended:?}");
    }
}

#[test]
fn groups_are_added_by_name_or_number_or_refused() {
    let host = TestHost::new("t4");
    let groups = "grep Groups /proc/self/status";
    let of = |ended: Ended| ended.out.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        of(host.sh(
            Caller::Root,
            "-u 33:33 --group-add audio --group-add 44 --group-add 44",
            &rootfs("debian-python"),
            groups
        )),
        ["29", "33", "44"]
    );
    host.refused(Caller::Root, "--group-add no-such-group", &busybox(), "GPU-0054");
    // Without root: a group of the caller is kept; another one is refused.
    let ended = run(&mut user_in_groups(&host, "44", "--group-add 44", groups));
    assert_eq!(of(ended), ["65534"], "the kernel's number for an id that is not mapped");
    let ended = run(&mut user_in_groups(&host, "44", "--group-add 45", groups));
    assert!(
        ended.code == 125 && ended.err.contains("--group-add 45") && ended.err.contains("fix: "),
        "{ended:?}"
    );
    let subordinate =
        etc(&[("passwd", ACCOUNT), ("subuid", "54321:700000:65536"), ("subgid", "54321:800000:65536")]);
    let command = user_in_groups(&host, "44", "-u 0 --group-add 45", groups);
    assert_eq!(of(run(&mut with_etc(subordinate.path(), "", &command))), ["0", "45"]);
}

#[test]
fn files_on_a_volume_obey_the_callers_groups_alone() {
    // A directory of root and the caller's group, and one of a group that the image claims.
    let host = TestHost::new("t4");
    let data = temporary();
    for (name, gid) in [("own", 7001), ("others", 42)] {
        let dir = data.path().join(name);
        fs::create_dir(&dir).unwrap();
        chown(&dir, Some(0), Some(gid)).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).unwrap();
    }
    let hostile = copy_of_root("busybox");
    fs::write(hostile.path().join("etc/passwd"), format!("root:x:0:0::/root:\nx:x:{USER}:42::/:\n")).unwrap();
    fs::write(hostile.path().join("etc/group"), "shadow:x:42:x,root\n").unwrap();
    let packed = pack(hostile.path(), &["--user", "root:shadow"]);
    let image = format!("oci:{}:zstd", packed.path().join("packed/oci").display());
    let etc = etc(&[("passwd", ACCOUNT), ("group", "gpurun-a:x:7001:gpurun-tester")]);
    let options = format!("-v {}:/data", data.path().display());
    let script = "touch /data/own/x && echo own; touch /data/others/x 2>/dev/null && echo others; true";
    let command = host.command(Caller::Root, &options, &image, &["sh", "-c", script]);
    let mut command = with_etc(etc.path(), "", &command);
    let ended = run(command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", USER.to_string()));
    assert_eq!(ended.out, "own\n", "{ended:?}");
    assert_eq!(fs::metadata(data.path().join("own/x")).unwrap().uid(), USER);
}

/// A module of the name service switch that knows one user, in one group, as LDAP and SSSD do.
fn name_service() -> TempDir {
    let dir = temporary();
    let source = dir.path().join("nss.c");
    fs::write(&source, include_str!("../name-service.c")).unwrap();
    let library = dir.path().join("libnss_gpuruntest.so.2");
    must(Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(library).arg(&source));
    fs::remove_file(source).unwrap();
    dir
}

#[test]
fn a_user_of_the_name_service_switch_has_subordinate_ids_and_groups() {
    let host = TestHost::new("t4");
    let module = name_service();
    let libraries = "/usr/lib/x86_64-linux-gnu";
    // The module is mounted over the host's libraries, in a separate mount namespace.
    let before =
        format!("mount -t overlay -o lowerdir={}:{libraries} overlay {libraries};", module.path().display());
    let map = "cat /proc/self/uid_map; cat /proc/self/gid_map";
    let own = host.command(Caller::User, "-u 0", &busybox(), &["sh", "-c", map]);
    let numbers =
        |ended: &Ended| -> Vec<String> { ended.out.split_whitespace().map(str::to_owned).collect() };
    let switch = ("nsswitch.conf", "passwd: files gpuruntest\ngroup: files gpuruntest");
    let files =
        etc(&[switch, ("subuid", "directory-user:700000:65536"), ("subgid", "directory-user:800000:65536")]);
    let ended = run(&mut with_etc(files.path(), &before, &own));
    let expected = ["0", "54321", "1", "1", "700000", "65535", "0", "54321", "1", "1", "800000", "65535"];
    assert_eq!(numbers(&ended), expected, "{ended:?}");
    // doctor reports the ids, and what is missing.
    let mut doctor = host.gpurun_as_user();
    doctor.arg("doctor");
    let ended = run(&mut with_etc(files.path(), &before, &doctor));
    let line = ended.out.lines().find(|line| line.contains("subordinate ids")).unwrap_or_default();
    assert!(
        line.starts_with("ok") && line.contains("directory-user (of the name service switch)"),
        "{ended:?}"
    );
    let half = etc(&[switch, ("subuid", "directory-user:700000:65536")]);
    let ended = run(&mut with_etc(half.path(), &before, &doctor));
    assert!(
        ended.out.contains("directory-user has subordinate ids, but no gids in /etc/subgid"),
        "{ended:?}"
    );
    // Under sudo the groups come from the directory service.
    let command = host.command(Caller::Root, "", &busybox(), &["grep", "Groups", "/proc/self/status"]);
    let mut command = with_etc(files.path(), &before, &command);
    let ended = run(command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", USER.to_string()));
    assert_eq!(numbers(&ended), ["Groups:", "7001", &USER.to_string()], "{ended:?}");
}

#[test]
fn home_is_writable_on_volumes_beside_other_accounts_and_in_a_read_only_root() {
    let host = TestHost::new("t4");
    let root = copy_of_root("busybox");
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    fs::create_dir_all(root.path().join("home/user/kept")).unwrap();
    fs::set_permissions(root.path().join("home/user"), fs::Permissions::from_mode(0o700)).unwrap();
    chown(root.path().join("home/user"), Some(1000), Some(1000)).unwrap();
    let packed = pack(root.path(), &["--env", "HOME=/root"]);
    let image = format!("oci:{}:zstd", packed.path().join("packed/oci").display());
    let script = "set -e; touch $HOME/x; cd; [ $(grep -c \"^user:\" /etc/passwd) = 1 ]; grep -c \":$(id -u):[0-9]*:\" /etc/passwd; id -un >/dev/null";
    for caller in Caller::EACH {
        for user in ["", "-u 0", "-u 4242", "-u 4242:4242", "-u user", "-u 1000", "-u 1000:5"] {
            for more in [
                "",
                "--read-only",
                "-v /tmp:/home",
                "-v /tmp:/home --read-only",
                "--tmpfs /root",
                "-e HOME=/new/home",
            ] {
                let out = host.ok(caller, &format!("{user} {more}"), &image, script);
                assert_eq!(out, "1\n", "{caller:?} {user} {more}");
            }
        }
    }
    // A read-only root also shows the image's content of HOME.
    let out = host.ok(
        Caller::Root,
        "-u user -e HOME= --read-only",
        &image,
        "echo $HOME; ls $HOME; touch $HOME/kept/../x",
    );
    assert_eq!(out, "/home/user\nkept\n");
}

#[test]
fn every_user_can_use_the_volumes_of_the_image() {
    let host = TestHost::new("t4");
    let root = copy_of_root("busybox");
    fs::create_dir_all(root.path().join("data/inside")).unwrap();
    fs::create_dir_all(root.path().join("usr/local/lib")).unwrap();
    let config = r#"{"Volumes": {"/data": {}, "/absent/deep": {}, "/usr/local": {}, "/dev": {}, "/data/inside/new": {}}}"#;
    let packed = pack(root.path(), &["--config", config]);
    let image = format!("oci:{}:zstd", packed.path().join("packed/oci").display());
    let script = "set -e; ls -d /data/inside /usr/local/lib /dev/null /usr/local/nvidia/lib64/libcuda.so.1 >/dev/null; \
                  touch /data/x /data/inside/x /data/inside/new/x /absent/deep/x /usr/local/x; \
                  for p in /data /absent/deep /usr/local /data/inside/new; do grep -c \" $p \" /proc/mounts; done";
    for caller in Caller::EACH {
        for options in ["-u 0 --gpus all", "-u 0 --gpus all --read-only"] {
            for _ in 0..2 {
                assert_eq!(host.ok(caller, options, &image, script), "1\n1\n1\n1\n", "{caller:?} {options}");
            }
        }
        assert!(host.scratch(caller).is_empty(), "{:?}", host.scratch(caller));
    }
    assert!(!root.path().join("data/x").exists());
}

#[test]
fn no_volume_of_an_image_leads_out_of_it_or_over_what_gpurun_mounts() {
    use std::os::unix::fs::symlink;
    let host = TestHost::new("t4");
    let root = copy_of_root("busybox");
    let links = [
        ("slash", "/"),
        ("up", "../../../../.."),
        ("proc-root", "/proc/1/root"),
        ("proc", "/proc"),
        ("dev", "/dev"),
        ("driver", "/usr/local/nvidia"),
        ("loop", "link-loop"),
        ("bin", "/bin"),
    ];
    for (name, target) in links {
        symlink(target, root.path().join(format!("link-{name}"))).unwrap();
    }
    let script = "set -e; ls /proc/self/status /dev/null /usr/local/nvidia/lib64/libcuda.so.1 >/dev/null; \
                  grep -c . /proc/mounts >/dev/null; [ ! -e /var/cache/gpurun-tests ]; cd /..; [ ! -e /var/cache/gpurun-tests ]; echo inside";
    for (name, _) in links {
        let config = format!(r#"{{"Volumes": {{"/link-{name}": {{}}, "/link-{name}/below/it": {{}}}}}}"#);
        let packed = pack(root.path(), &["--config", &config]);
        let image = format!("oci:{}:zstd", packed.path().join("packed/oci").display());
        for caller in Caller::EACH {
            for options in [
                "-u 0 --gpus all",
                "-u 0 --gpus all --read-only",
                "--gpus all -e HOME=/link-slash --read-only",
            ] {
                let ended = host.sh(caller, options, &image, script);
                let refused = ended.code == 125 && ended.err.contains("fix: ");
                assert!(refused || ended.out == "inside\n", "{name} {caller:?} {options}: {ended:?}");
            }
            assert!(host.scratch(caller).is_empty());
        }
    }
}

/// HOME and the like name directories of another user after su(1) and `sudo -E`.
#[test]
fn directories_of_another_user_are_ignored_in_one_line() {
    let host = TestHost::new("t4");
    let (own, others) = (temporary(), temporary());
    chown(own.path(), Some(USER), Some(USER)).unwrap();
    chown(others.path(), Some(54322), Some(54322)).unwrap();
    let image = busybox();
    let start: &[&str] = &["run", &image, "true"];
    let pull: &[&str] = &["pull", "localhost:1/nothing"];
    for (caller, variable, words) in [
        (Caller::User, "HOME", start),
        (Caller::User, "XDG_RUNTIME_DIR", start),
        (Caller::User, "XDG_DATA_HOME", start),
        (Caller::User, "XDG_CONFIG_HOME", start),
        (Caller::User, "XDG_CONFIG_HOME", pull),
        (Caller::User, "XDG_RUNTIME_DIR", pull),
        (Caller::User, "XDG_CONFIG_HOME", &["configure", "docker", "--path", "/r", "--dry-run"]),
        (Caller::Root, "XDG_CONFIG_HOME", start),
        (Caller::Root, "TMPDIR", &["demo"]),
    ] {
        let mut command = host.gpurun_of(caller);
        command.args(words).env("HOME", own.path()).env_remove("SUDO_UID");
        if variable == "XDG_RUNTIME_DIR" || variable == "XDG_DATA_HOME" {
            command.env_remove("GPURUN_STATE_DIR").env_remove("GPURUN_STORE");
        }
        if variable == "HOME" && caller == Caller::User {
            // Without an account there is no other home, and the message says what to type.
            command.env_remove("GPURUN_STATE_DIR").env_remove("GPURUN_STORE");
        }
        if variable == "TMPDIR" {
            command.env_remove("GPURUN_SIMULATED_HOST");
        }
        let ended = run(command.env(variable, others.path()));
        let lines = ended.err.lines().filter(|line| line.contains(&format!("WARN {variable}="))).count();
        assert_eq!(lines, 1, "{caller:?} {variable} {words:?}: {ended:?}");
        assert!(ended.err.contains("belongs to uid 54322") && ended.err.contains("su - USER"), "{ended:?}");
        if words == start && variable != "HOME" {
            assert_eq!(ended.code, 0, "{caller:?} {variable}: {ended:?}");
        }
        assert_eq!(fs::read_dir(others.path()).unwrap().count(), 0, "{variable}");
    }
}
