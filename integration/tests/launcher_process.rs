//! The command as a process: how it ends, what it is given, who it is.

use gpurun_integration::{
    Caller, SpawnPiped, TestHost, USER, copy_of_root, finish, image, must, on_a_terminal, pack, rootfs, run,
    temporary,
};
use std::{
    fs,
    io::{Read, Write},
    process::{Command, Stdio},
};

/// A host without any driver: containers that ask for no GPU must not need one.
fn host() -> TestHost {
    let host = TestHost::new("t4");
    fs::remove_dir_all(host.path()).unwrap();
    host
}

fn busybox() -> String {
    rootfs("busybox")
}

#[test]
fn exit_codes_are_dockers() {
    let host = host();
    let root = copy_of_root("busybox");
    fs::write(root.path().join("bin/text"), "no first line\n").unwrap();
    fs::write(root.path().join("bin/lost"), "#!/nowhere/interpreter\n").unwrap();
    must(Command::new("chmod").args(["755"]).arg(root.path().join("bin/lost")));
    let image = format!("rootfs:{}", root.path().display());
    for caller in Caller::EACH {
        for (script, code) in [
            ("true", 0),
            ("exit 3", 3),
            ("exit 255", 255),
            ("kill -9 $$", 137),
            ("kill -15 $$", 143),
            ("kill -6 $$", 134),
        ] {
            // As a child of the shell, because pid 1 is not killed by signals that it sends itself.
            let under_init = host.sh(caller, "--init", &image, script);
            assert_eq!(under_init.code, code, "{script}: {under_init:?}");
            if !script.starts_with("kill") {
                assert_eq!(host.sh(caller, "", &image, script).code, code, "{script}");
            }
        }
        for options in ["", "--init"] {
            for (command, code, error) in [
                ("/bin/text", 126, "error[GPU-0060]: "),
                ("/etc", 126, "error[GPU-0060]: "),
                ("text", 126, "error[GPU-0060]: "),
                ("/nowhere", 127, "error[GPU-0061]: "),
                ("no-such-command", 127, "error[GPU-0061]: "),
                ("lost", 127, "error[GPU-0061]: "),
            ] {
                let ended = run(&mut host.command(caller, options, &image, &[command]));
                assert_eq!(ended.code, code, "{options} {command}: {ended:?}");
                assert!(ended.err.starts_with(error), "{options} {command}: {ended:?}");
            }
        }
    }
    for options in ["--nonsense", "--cpus many", "--memory lots", "--network bridge", "-v x"] {
        let ended = run(&mut host.command(Caller::Root, options, &image, &["true"]));
        assert!(ended.code == 125 && ended.err.starts_with("error[GPU-0001]: "), "{options}: {ended:?}");
    }
}

#[test]
fn json_failures_are_objects() {
    let host = host();
    for options in ["--nonsense", "-v /nowhere-at-all:/x", "--user nobody-here"] {
        let ended = run(&mut host.command(Caller::Root, &format!("--json {options}"), &busybox(), &["true"]));
        let error: serde_json::Value =
            serde_json::from_str(&ended.err).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
        assert!(error["error"].as_str().unwrap().starts_with("GPU-00") && ended.code == 125);
    }
}

#[test]
fn environment_is_the_images_then_the_users() {
    let host = host();
    let dir =
        pack(&image("busybox", "root"), &["--env", "A=image", "--env", "B=image", "--env", "LANG=C.UTF-8"]);
    let reference = format!("oci:{}:zstd", dir.path().join("packed/oci").display());
    let file = dir.path().join("env");
    fs::write(&file, "# a comment\n\nB=file\nC=file # not a comment\n  D=\"quoted\"\nINHERITED\nABSENT\n")
        .unwrap();
    for caller in Caller::EACH {
        let options =
            format!("--env-file {} -e C=typed -e E= -e INHERITED2 -e HOME=/elsewhere", file.display());
        let mut command = host.command(caller, &options, &reference, &["env"]);
        command.env("INHERITED", "1").env("INHERITED2", "2").env("SECRET", "not to be seen");
        let ended = run(&mut command);
        let own = format!("HOSTNAME={}", must(&mut Command::new("hostname")).trim());
        assert!(ended.out.lines().any(|line| line == own), "{ended:?}");
        let mut lines: Vec<&str> = ended.out.lines().filter(|line| *line != own).collect();
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                "A=image",
                "B=file",
                "C=typed",
                "D=\"quoted\"",
                "E=",
                "HOME=/elsewhere",
                "INHERITED2=2",
                "INHERITED=1",
                "LANG=C.UTF-8",
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            ],
            "{ended:?}"
        );
    }
}

#[test]
fn workdir_and_entrypoint() {
    let host = host();
    for caller in Caller::EACH {
        assert_eq!(host.ok(caller, "-w /etc", &busybox(), "pwd"), "/etc\n");
        // It is made where it is not there, and it is the user's.
        assert_eq!(
            host.ok(caller, "-w /new/deep -u 77:78", &busybox(), "pwd; touch x; stat -c %u:%g ."),
            "/new/deep\n77:78\n"
        );
        let ended = run(&mut host.command(caller, "-w /etc/passwd", &busybox(), &["true"]));
        assert!(ended.code == 125 || ended.code == 126, "{ended:?}");
        let ended = run(&mut host.command(caller, "--entrypoint echo", &busybox(), &["a", "-b"]));
        assert_eq!(ended.out, "a -b\n", "{ended:?}");
    }
}

#[test]
fn standard_input_is_passed_to_its_end_with_i_and_empty_without() {
    let host = host();
    for caller in Caller::EACH {
        for (options, expected) in [("-i", 300_000), ("-i --init", 300_000), ("", 0)] {
            let mut child =
                host.command(caller, options, &busybox(), &["wc", "-c"]).stdin(Stdio::piped()).spawn_piped();
            let mut input = child.stdin.take().unwrap();
            let writer = std::thread::spawn(move || drop(input.write_all(&[b'x'; 300_000])));
            let ended = finish(child);
            writer.join().unwrap();
            assert_eq!(ended.out.trim(), expected.to_string(), "{options}: {ended:?}");
        }
    }
}

#[test]
fn large_output_arrives_whole_and_a_closed_reader_ends_it() {
    let host = host();
    let out = host.ok(Caller::User, "", &busybox(), "head -c 3000000 /dev/zero | tr '\\0' x");
    assert_eq!(out.len(), 3_000_000);
    let mut child = host.command(Caller::User, "", &busybox(), &["yes"]).spawn_piped();
    let mut some = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    // SIGPIPE is what ends `yes` everywhere; pid 1 gets EPIPE.
    assert_ne!(finish(child).code, 0);
}

#[test]
fn a_terminal_is_a_terminal() {
    let host = host();
    for caller in Caller::EACH {
        for options in ["-i -t", "-it --init"] {
            let command = host.command(
                caller,
                options,
                &busybox(),
                &["sh", "-c", "tty; stty size; trap 'stty size; echo changed' WINCH; echo ready; while ! read line; do :; done; echo got $line; test -t 0 && test -t 1 && test -t 2; echo $TERM $?"],
            );
            let script = r#"[["wait", "ready"], ["resize", [50, 120]], ["wait", "changed"], ["type", "hello\n"], ["wait", "got hello"]]"#;
            let ended = on_a_terminal(&command, script);
            assert_eq!(ended.code, 0, "{options}: {ended:?}");
            let lines: Vec<&str> = ended.out.lines().map(str::trim_end).collect();
            for line in ["/dev/pts/0", "40 100", "50 120", "got hello", "xterm 0"] {
                assert!(lines.contains(&line), "{caller:?} {options} {line}: {lines:?}");
            }
        }
    }
}

#[test]
fn control_c_ends_the_command_and_control_d_its_input() {
    let host = host();
    for caller in Caller::EACH {
        let command = host.command(caller, "-it --init", &busybox(), &["sh", "-c", "echo ready; sleep 100"]);
        let ended = on_a_terminal(&command, r#"[["wait", "ready"], ["type", "\u0003"]]"#);
        assert_eq!(ended.code, 130, "{ended:?}");
        let command = host.command(
            caller,
            "-it",
            &busybox(),
            &["sh", "-c", "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 1; done"],
        );
        let ended = on_a_terminal(&command, r#"[["wait", "ready"], ["type", "\u0003"]]"#);
        assert!(ended.code == 7 && ended.out.contains("caught"), "{ended:?}");
        let command = host.command(caller, "-it", &busybox(), &["sh", "-c", "echo ready; cat; echo over"]);
        let ended = on_a_terminal(&command, r#"[["wait", "ready"], ["type", "\u0004"], ["wait", "over"]]"#);
        assert_eq!(ended.code, 0, "{ended:?}");
    }
}

#[test]
fn t_without_a_terminal_outside_is_one_inside() {
    let host = host();
    for caller in Caller::EACH {
        let ended = host.sh(
            caller,
            "-t",
            &busybox(),
            "tty; echo err >&2; head -c 200000 /dev/zero | tr '\\0' x; echo; echo last",
        );
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.out.starts_with("/dev/pts/0\r\nerr\r\n") && ended.out.ends_with("x\r\nlast\r\n"));
        assert_eq!(ended.out.matches('x').count(), 200_000);
        let ended = host.sh(caller, "-i -t", &busybox(), "true");
        assert!(ended.code == 125 && ended.err.contains("terminal"), "{ended:?}");
    }
}

#[test]
fn a_terminal_that_nobody_reads_is_hung_up() {
    let host = host();
    for caller in Caller::EACH {
        let mut child =
            host.command(caller, "-t", &busybox(), &["sh", "-c", "echo ready; yes"]).spawn_piped();
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 5]).unwrap();
        drop(out);
        assert_ne!(finish(child).code, 0);
    }
}

#[test]
fn a_command_that_closes_its_terminal_goes_on_and_costs_nothing() {
    let host = host();
    let script = "exec sleep 1 <&- >&- 2>&-";
    let command = host.command(Caller::Root, "-t", &busybox(), &["sh", "-c", script]);
    let mut timed = Command::new("/usr/bin/env");
    timed.args(["bash", "-c", "time \"$@\"", "bash"]).arg(command.get_program()).args(command.get_args());
    timed
        .env_clear()
        .env("TIMEFORMAT", "%U %S")
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = run(&mut timed);
    assert_eq!(ended.code, 0, "{ended:?}");
    let processor: f64 = ended.err.split_whitespace().map(|seconds| seconds.parse::<f64>().unwrap()).sum();
    assert!(processor < 0.5, "the launcher spins: {ended:?}");
}

#[test]
fn signals_reach_the_command() {
    let host = host();
    for caller in Caller::EACH {
        for options in ["", "--init", "-t", "-t --init"] {
            for (signal, code) in [("TERM", 41), ("INT", 42), ("HUP", 43), ("USR1", 44), ("QUIT", 45)] {
                let script = format!("trap 'exit {code}' {signal}; echo ready; while :; do sleep 0.02; done");
                let mut child =
                    host.command(caller, options, &busybox(), &["sh", "-c", &script]).spawn_piped();
                child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
                must(Command::new("kill").args([format!("-{signal}"), child.id().to_string()]));
                let ended = finish(child);
                assert_eq!(ended.code, code, "{options} {signal}: {ended:?}");
            }
        }
        // One that the command does not handle kills it, where it is not pid 1.
        let mut child = host
            .command(caller, "--init", &busybox(), &["sh", "-c", "echo ready; exec sleep 100"])
            .spawn_piped();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
        must(Command::new("kill").args(["-TERM", &child.id().to_string()]));
        assert_eq!(finish(child).code, 143);
    }
}

#[test]
fn init_is_pid_one_and_reaps() {
    let host = host();
    // Orphans: their parent is gone when they end.
    let script = "for i in 1 2 3 4 5; do (sleep 0 & ) ; done; sleep 0.3; cat /proc/1/comm; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l; echo $$";
    for caller in Caller::EACH {
        let out = host.ok(caller, "--init", &busybox(), script);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[1], "0", "{out}");
        assert_ne!(lines[2], "1", "{out}");
        assert_eq!(host.ok(caller, "", &busybox(), "echo $$"), "1\n");
        // gpurun's own file cannot be reached and written through its process.
        let out = host.sh(
            caller,
            "--init -u 0",
            &busybox(),
            "(echo x >> /proc/1/exe) 2>&1; touch /proc/1/exe 2>&1; true",
        );
        assert!(!out.out.is_empty(), "{out:?}");
    }
    assert_eq!(must(Command::new(gpurun_integration::dist("gpurun")).arg("--version")).lines().count(), 1);
}

#[test]
fn the_user_is_the_images_or_the_caller() {
    let host = host();
    let who = "id -u; id -g; echo $HOME; touch $HOME/x && echo writable; grep -c \"^[^:]*:x:$(id -u):\" /etc/passwd; whoami";
    let by_user = |user: &str| {
        let dir = pack(&image("busybox", "root"), &["--user", user]);
        let reference = format!("oci:{}:zstd", dir.path().join("packed/oci").display());
        (dir, reference)
    };
    let (_a, root) = by_user("0");
    let (_b, numbered) = by_user("1234:99");
    for caller in Caller::EACH {
        let uid = caller.uid();
        let name = if uid == 0 { "root" } else { "user" };
        let home = if uid == 0 { "/root" } else { "/home/user" };
        let own = format!("{uid}\n{uid}\n{home}\nwritable\n1\n{name}\n");
        for image in [busybox(), root.clone()] {
            assert_eq!(host.ok(caller, "", &image, who), own, "{image}");
        }
        assert_eq!(host.ok(caller, "", &numbered, who), "1234\n99\n/home/user\nwritable\n1\nuser\n");
        assert_eq!(
            host.ok(caller, "-u 0", &numbered, "id -u; id -g; touch $HOME/x && whoami"),
            "0\n0\nroot\n"
        );
        assert_eq!(
            host.ok(caller, "-u 4242:4343", &busybox(), who),
            "4242\n4343\n/home/user\nwritable\n1\nuser\n"
        );
        for wrong in ["nobody-here", "root:no-group", "0:no-group", "-1", "4294967295"] {
            let error = host.refused(caller, &format!("--user={wrong}"), &busybox(), "GPU-0054");
            assert!(error.contains(wrong.trim_start_matches("root:").trim_start_matches("0:")), "{error}");
        }
    }
    let (_c, named) = by_user("www-data");
    host.refused(Caller::Root, "", &named, "GPU-0054");
    for caller in Caller::EACH {
        assert_eq!(
            host.ok(caller, "-u www-data", &rootfs("debian-python"), "id -un; id -u"),
            "www-data\n33\n"
        );
        let options = "-u www-data:audio";
        assert_eq!(
            host.ok(caller, options, &rootfs("debian-python"), "id -gn; touch $HOME/x && echo writable"),
            "audio\nwritable\n"
        );
    }
}

#[test]
fn behind_sudo_the_person_is_the_caller() {
    let host = host();
    let dir = temporary();
    let mut command = host.command(
        Caller::Root,
        &format!("-v {}:/data", dir.path().display()),
        &busybox(),
        &["sh", "-c", "id -u; id -g; touch $HOME/x && echo writable; cat /proc/self/status | grep CapEff"],
    );
    must(Command::new("chmod").arg("777").arg(dir.path()));
    let ended = run(command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", "77"));
    assert_eq!(ended.out, format!("{USER}\n77\nwritable\nCapEff:\t0000000000000000\n"), "{ended:?}");
    // An ordinary user cannot name somebody else.
    let mut command = host.command(Caller::User, "", &busybox(), &["id", "-u"]);
    assert_eq!(run(command.env("SUDO_UID", "0").env("SUDO_GID", "0")).out, format!("{USER}\n"));
}

#[test]
fn files_of_the_user_belong_to_the_caller_outside() {
    use std::os::unix::fs::{MetadataExt, chown};
    let host = host();
    for user in ["", "-u 0", "-u 33:33"] {
        let dir = temporary();
        chown(dir.path(), Some(USER), Some(USER)).unwrap();
        let options = format!("{user} -v {}:/data", dir.path().display());
        host.ok(Caller::User, &options, &busybox(), "echo x > /data/file; mkdir /data/dir");
        for name in ["file", "dir"] {
            let made = fs::metadata(dir.path().join(name)).unwrap();
            assert_eq!((made.uid(), made.gid()), (USER, USER), "{user}");
        }
    }
}

#[test]
fn subordinate_ids_are_mapped_where_the_host_gives_some() {
    // newuidmap(1) knows the caller by name; files that say so lie over the host's in a mount namespace of this test's own.
    let host = host();
    let dir = temporary();
    let with = |name: &str, line: String| {
        let own = fs::read_to_string(format!("/etc/{name}")).unwrap_or_default();
        fs::write(dir.path().join(name), format!("{own}{line}\n")).unwrap();
    };
    with("passwd", format!("gpurun-tester:x:{USER}:{USER}::/nowhere:/bin/sh"));
    with("subuid", "gpurun-tester:700000:65536".into());
    with("subgid", "gpurun-tester:800000:65536".into());
    let own = host.command(
        Caller::User,
        "-u 0 --cap-add ALL",
        &busybox(),
        &["sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; touch /tmp/x; chown 33:44 /tmp/x; stat -c %u:%g /tmp/x; id -G"],
    );
    let mut inside = Command::new("unshare");
    let script = "cd \"$0\"; for f in passwd subuid subgid; do mount --bind $f /etc/$f; done; cd \"$HOME\"; exec \"$@\"";
    inside.args(["-m", "sh", "-ec", script]).arg(dir.path()).arg(own.get_program()).args(own.get_args());
    inside.env_clear().envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = run(&mut inside);
    assert_eq!(ended.code, 0, "{ended:?}");
    let numbers: Vec<Vec<&str>> = ended.out.lines().map(|line| line.split_whitespace().collect()).collect();
    let caller = USER.to_string();
    assert_eq!(numbers[0], ["0", &caller, "1"], "{ended:?}");
    assert_eq!(numbers[1], ["1", "700000", "65535"], "{ended:?}");
    assert_eq!(numbers[3], ["1", "800000", "65535"], "{ended:?}");
    assert!(ended.out.contains("\n33:44\n"), "{ended:?}");
    assert!(
        host.scratch(Caller::User).is_empty(),
        "files of other ids are removed, too: {:?}",
        host.scratch(Caller::User)
    );
}

/// As if the shell's profile had a wrong umask: what gpurun makes must still be usable by its owner.
#[test]
fn a_umask_that_takes_the_owners_rights_makes_a_usable_store() {
    for caller in Caller::EACH {
        for umask in ["777", "700", "077"] {
            let host = TestHost::new("t4");
            for _ in 0..2 {
                let command =
                    host.command(caller, "", &busybox(), &["sh", "-c", "umask; echo x > /tmp/x; cat /tmp/x"]);
                let mut under = Command::new("sh");
                under.args(["-c", "umask $0; exec \"$@\"", umask]);
                under.arg(command.get_program()).args(command.get_args());
                for (name, value) in command.get_envs() {
                    match value {
                        Some(value) => under.env(name, value),
                        None => under.env_remove(name),
                    };
                }
                let ended = run(&mut under);
                assert_eq!(
                    (ended.code, ended.out.as_str()),
                    (0, "0022\nx\n"),
                    "{caller:?} {umask}: {ended:?}"
                );
            }
        }
    }
}
