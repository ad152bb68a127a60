//! What a container sees and may do, and what it may use of the machine.

use gpurun_integration::{Caller, TestHost, must, rootfs, run, temporary};
use std::{fs, path::Path, process::Command};

fn busybox() -> String {
    rootfs("busybox")
}

fn debian() -> String {
    rootfs("debian-python")
}

/// A value of /proc/self/status in the container.
fn status(out: &str, name: &str) -> String {
    let line = out.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_else(|| panic!("no {name}: {out}")).trim().to_owned()
}

#[test]
fn capabilities_filter_and_privileges_are_dockers() {
    let host = TestHost::new("t4");
    let none = "0000000000000000";
    for caller in Caller::EACH {
        for (options, effective, bounding) in [
            // NET_RAW is not given on the host's network.
            ("-u 0", "00000000a80405fb", "00000000a80405fb"),
            ("-u 0 --network none", "00000000a80425fb", "00000000a80425fb"),
            ("-u 0 --cap-add NET_RAW", "00000000a80425fb", "00000000a80425fb"),
            ("-u 1234", none, none),
            ("-u 0 --cap-drop ALL", none, none),
            ("-u 0 --cap-drop ALL --cap-add CHOWN", "0000000000000001", "0000000000000001"),
            ("-u 0 --cap-add SYS_PTRACE", "00000000a80c05fb", "00000000a80c05fb"),
        ] {
            for init in ["", "--init"] {
                let out = host.ok(caller, &format!("{options} {init}"), &busybox(), "cat /proc/self/status");
                assert_eq!(status(&out, "CapEff"), effective, "{caller:?} {options}");
                assert_eq!(status(&out, "CapPrm"), effective, "{caller:?} {options}");
                assert_eq!(status(&out, "CapBnd"), bounding, "{caller:?} {options}");
                assert_eq!(status(&out, "CapInh"), none, "{caller:?} {options}");
                assert_eq!(status(&out, "CapAmb"), none, "{caller:?} {options}");
                assert_eq!(status(&out, "NoNewPrivs"), "1");
                assert_eq!(status(&out, "Seccomp"), "2");
            }
        }
        // On the host's network a second filter separates Unix sockets.
        let options = "--network none --security-opt seccomp=unconfined";
        let out = host.ok(caller, options, &busybox(), "cat /proc/self/status");
        assert_eq!((status(&out, "Seccomp"), status(&out, "NoNewPrivs")), ("0".into(), "1".into()));
    }
}

#[test]
fn the_kernels_files_are_masked_and_read_only_as_dockers() {
    let host = TestHost::new("t4");
    let script = r#"
for f in /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/sched_debug /proc/interrupts; do
  test -e $f || continue
  test "$(head -c 1 $f | wc -c)" = 0 || echo "$f shows something"
done
for d in /proc/acpi /proc/scsi /proc/asound /sys/firmware /sys/devices/virtual/powercap /sys/devices/system/cpu/cpu*/thermal_throttle; do
  test -d $d || continue
  test -z "$(ls $d)" || echo "$d shows something"
done
for f in /proc/sys/kernel/hostname /proc/sys/vm/swappiness /proc/sysrq-trigger /proc/irq/default_smp_affinity; do
  test -e $f || continue
  (cat /dev/null >> $f) 2>/dev/null && echo "$f can be opened for writing"
done
(mkdir /sys/fs/cgroup/new || mkdir /sys/fs/cgroup/*/new) 2>/dev/null && echo "a cgroup can be made"
for f in $(find /sys/fs/cgroup -name '*.max' -o -name 'devices.allow' -o -name '*limit*' 2>/dev/null); do
  (: >> $f) 2>/dev/null && echo "$f can be opened for writing"
done
test "$(ls -d /proc/[0-9]* | wc -l)" -le 5 || echo "the host's processes show"
test "$(head -c 2 /proc/1/cmdline)" = sh || echo "pid 1 is not the command"
test "$(readlink /proc/1/cwd)" = / || echo "cwd of pid 1: $(readlink /proc/1/cwd)"
ls /proc/1/root/work /proc/1/root/var/cache/gpurun-tests 2>/dev/null && echo "the host's root shows"
true"#;
    for caller in Caller::EACH {
        for options in ["-u 0", "-u 0 --cap-add ALL", "-u 1234", "-u 0 --network none"] {
            assert_eq!(host.ok(caller, options, &busybox(), script), "", "{caller:?} {options}");
        }
    }
}

#[test]
fn nothing_is_mounted_unshared_or_entered() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        for command in [
            "mount -t tmpfs none /tmp",
            "mount -o remount,rw /proc/sys",
            "umount /proc/sys",
            "umount /proc/kcore",
            "unshare -m true",
            "unshare -U true",
            "chroot / mount -t proc none /proc",
            "hostname elsewhere",
            "nsenter -t 1 -m true",
            "ip link set lo down",
            "swapon /tmp",
            "losetup -f /bin/busybox",
        ] {
            let ended = host.sh(caller, "-u 0", &busybox(), command);
            assert_ne!(ended.code, 0, "{caller:?} {command}: {ended:?}");
        }
        // Even with every capability a user of the host's cannot undo the masks: they are locked together.
        if caller == Caller::User {
            let ended = host.sh(
                caller,
                "-u 0 --cap-add ALL --security-opt seccomp=unconfined",
                &busybox(),
                "mount -o remount,rw,bind /proc/sys && echo x > /proc/sys/kernel/core_pattern",
            );
            assert_ne!(ended.code, 0, "{ended:?}");
        }
    }
}

#[test]
fn the_mounts_are_the_containers_alone_and_say_little_of_the_host() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let out = host.ok(caller, "", &busybox(), "cat /proc/self/mountinfo");
        let roots: Vec<&str> = out.lines().filter(|line| line.split(' ').nth(4) == Some("/")).collect();
        assert_eq!(roots.len(), 1, "{out}");
        assert!(!out.contains("master:") && !out.contains("shared:"), "{out}");
        for line in out.lines() {
            let point = line.split(' ').nth(4).unwrap();
            assert!(
                ["/proc", "/sys", "/dev", "/"]
                    .iter()
                    .any(|top| point == *top || point.starts_with(&format!("{top}/"))),
                "{line}"
            );
        }
    }
}

/// A GPU's node in the simulated host belongs to no driver: to open it ends with "no such device" where the device rules let
/// the kernel look for one, and with "not permitted" where they do not.
#[test]
fn another_gpus_node_cannot_be_opened_even_if_it_is_made() {
    let host = TestHost::new("8xh100");
    let script = "open() { (: < $1) 2>&1 | sed 's/.*: //'; }; \
        for n in 0 1 2 3; do rm -f /dev/nvidia$n; mknod /dev/nvidia$n c 195 $n || exit 1; echo $n $(open /dev/nvidia$n); done; \
        mknod /disk b 254 0; mknod /mem c 1 1; mknod /kmsg c 1 11; for n in /disk /mem /kmsg; do echo $n $(open $n); done; open /dev/null";
    // Index 0 has minor number 3 and index 2 has 1.
    let out = host.ok(Caller::Root, "-u 0 --gpus \"device=0,2\"", &busybox(), script);
    let refused = "Operation not permitted";
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], format!("0 {refused}"), "{out}");
    assert_eq!(lines[2], format!("2 {refused}"), "{out}");
    for allowed in [1, 3] {
        assert!(lines[allowed].contains("No such device"), "{out}");
    }
    for (line, name) in [(4, "/disk"), (5, "/mem"), (6, "/kmsg")] {
        // The root is mounted nodev; both refusals are right.
        assert!(
            lines[line] == format!("{name} {refused}") || lines[line] == format!("{name} Permission denied"),
            "{out}"
        );
    }
    assert_eq!(lines.len(), 7, "{out}");
    let ended =
        host.sh(Caller::User, "-u 0 --cap-add ALL --gpus device=0", &busybox(), "mknod /tmp/n c 195 0");
    assert_ne!(ended.code, 0, "{ended:?}");
}

#[test]
fn standard_devices_work() {
    let host = TestHost::new("t4");
    let script = "set -e; echo x > /dev/null; test $(head -c 9 /dev/zero | wc -c) = 9; test $(head -c 9 /dev/urandom | wc -c) = 9; \
                  head -c 1 /dev/random > /tmp/r; ! echo x 2>/dev/null > /dev/full; echo a > /dev/stdout; echo b > /dev/fd/1; \
                  (: < /dev/tty) 2>/dev/null && exit 3; ls /dev/pts/ptmx /dev/ptmx >/dev/null; echo c >/dev/stderr";
    for caller in Caller::EACH {
        for user in ["-u 0", "-u 1234"] {
            let ended = host.sh(caller, user, &busybox(), script);
            assert_eq!(
                (ended.code, ended.out.as_str(), ended.err.as_str()),
                (0, "a\nb\n", "c\n"),
                "{caller:?} {user}: {ended:?}"
            );
        }
    }
}

const WRITE_100_MB: &str = "import mmap\nf = open('/dev/shm/x', 'w+b')\nf.truncate(100 << 20)\nm = mmap.mmap(f.fileno(), 0)\n\
                            for i in range(0, 100 << 20, 4096): m[i] = 1\nprint('written')";

#[test]
fn shared_memory_is_half_of_memory_or_what_is_asked_for() {
    let host = TestHost::new("t4");
    let total: u64 = {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().next().unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    for caller in Caller::EACH {
        let size = |options: &str| -> u64 {
            let out = host.ok(
                caller,
                options,
                &busybox(),
                "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2",
            );
            out.trim().parse::<u64>().unwrap() << 10
        };
        let half = size("");
        assert!(half.abs_diff(total / 2) < 1 << 20, "{half} of {total}");
        assert_eq!(size("--shm-size 64m"), 64 << 20);
        let write = |options: &str| {
            run(&mut host.command(caller, options, &debian(), &["python3", "-c", WRITE_100_MB]))
        };
        let ended = write("");
        assert_eq!((ended.code, ended.out.as_str()), (0, "written\n"), "{ended:?}");
        // SIGBUS, also where the program is pid 1: a fault is not ignored.
        assert_eq!(write("--shm-size 64m").code, 135);
        assert_eq!(write("--shm-size 64m --init").code, 135);
    }
}

#[test]
fn memory_and_its_shared_memory_are_limited() {
    let host = TestHost::new("t4");
    assert_eq!(
        host.ok(
            Caller::Root,
            "-m 256m",
            &busybox(),
            "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2"
        ),
        format!("{}\n", 128 << 10)
    );
    let eat = "x = bytearray(300 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nprint('ate')";
    let run =
        |options: &str| run(&mut host.command(Caller::Root, options, &debian(), &["python3", "-c", eat]));
    assert_eq!(run("-m 1g").out, "ate\n");
    for options in ["-m 128m", "-m 128m --init"] {
        let ended = run(options);
        assert_eq!(ended.code, 137, "{ended:?}");
    }
}

#[test]
fn processors_and_processes_are_limited() {
    let host = TestHost::new("t4");
    let script = "cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu*/cpu.cfs_quota_us /sys/fs/cgroup/cpu*/cpu.cfs_period_us";
    let out = host.ok(Caller::Root, "--cpus 1.5", &busybox(), script);
    let numbers: Vec<&str> = out.split_whitespace().collect();
    assert!(numbers[..2] == ["150000", "100000"], "{out}");
    let forks = "import os, time\nn = 0\ntry:\n  while n < 100:\n    if os.fork() == 0: time.sleep(2); os._exit(0)\n    n += 1\nexcept OSError: pass\nprint(n)";
    let ended = run(&mut host.command(Caller::Root, "--pids-limit 20", &debian(), &["python3", "-c", forks]));
    assert_eq!(ended.out, "19\n", "{ended:?}");
    let ended = run(&mut host.command(Caller::Root, "--pids-limit -1", &debian(), &["python3", "-c", forks]));
    assert_eq!(ended.out, "100\n", "{ended:?}");
    for options in ["--cpus 0.5", "-m 64m", "--pids-limit 9"] {
        // A user without a delegated cgroup is told, not served without the limit.
        let ended = host.sh(Caller::User, options, &busybox(), "echo ran");
        assert!(
            ended.code == 125 && ended.err.starts_with("error[GPU-0056]: ") && ended.err.contains("fix: "),
            "{ended:?}"
        );
    }
}

#[test]
fn resource_limits() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let out = host.ok(
            caller,
            "--ulimit nofile=77:99 --ulimit core=0",
            &busybox(),
            "ulimit -n; ulimit -Hn; ulimit -c",
        );
        assert_eq!(out, "77\n99\n0\n");
        let out = host.ok(caller, "", &busybox(), "ulimit -n");
        assert!(out.trim().parse::<u64>().unwrap() <= 1_048_576, "{out}");
    }
    // Root may lack the capability to raise it, in a container for instance; then it stays.
    let raise = run(Command::new("prlimit").args(["--memlock=unlimited:unlimited", "sh", "-c", "ulimit -l"]));
    let expected =
        if raise.code == 0 { raise.out } else { must(Command::new("sh").args(["-c", "ulimit -Hl"])) };
    assert_eq!(host.ok(Caller::Root, "", &busybox(), "ulimit -Hl"), expected);
    let mut limited = Command::new("prlimit");
    let own = host.command(Caller::User, "--ulimit nofile=5000", &busybox(), &["true"]);
    limited.arg("--nofile=1000:1000").arg(own.get_program()).args(own.get_args()).env_clear();
    limited.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = run(&mut limited);
    assert!(
        ended.code == 125 && ended.err.starts_with("error[GPU-0056]: ") && ended.err.contains("1000"),
        "{ended:?}"
    );
}

#[test]
fn names_network_and_ipc() {
    let host = TestHost::new("t4");
    let own = must(&mut Command::new("hostname"));
    for caller in Caller::EACH {
        assert_eq!(host.ok(caller, "", &busybox(), "hostname"), own);
        assert_eq!(
            host.ok(caller, "--hostname alpha", &busybox(), "hostname; cat /etc/hostname; echo $HOSTNAME"),
            "alpha\nalpha\nalpha\n"
        );
        assert_eq!(
            host.ok(
                caller,
                "--network none --hostname beta",
                &debian(),
                "hostname; getent hosts beta > /dev/null && echo resolves; ls /sys/class/net"
            ),
            "beta\nresolves\nlo\n"
        );
        let out = host.ok(caller, "--network none", &busybox(), "ip -o link; ip -o addr; ip route");
        assert!(out.contains("LOOPBACK,UP") && out.contains("127.0.0.1/8"), "{out}");
        assert_eq!(out.lines().filter(|line| !line.contains("lo")).count(), 0, "{out}");
        let interfaces = host.ok(caller, "", &busybox(), "ls /sys/class/net | sort");
        let mut expected: Vec<String> = fs::read_dir("/sys/class/net")
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        expected.sort();
        assert_eq!(interfaces.lines().collect::<Vec<_>>(), expected);
        assert_eq!(
            host.ok(caller, "", &busybox(), "cat /etc/resolv.conf"),
            fs::read_to_string("/etc/resolv.conf").unwrap_or_default()
        );

        let name = gpurun_integration::unique();
        let file = Path::new("/dev/shm").join(&name);
        fs::write(&file, "host's").unwrap();
        let read = format!("cat /dev/shm/{name} 2>/dev/null || echo none");
        let shared = host.ok(caller, "--ipc host", &busybox(), &read);
        let private = host.ok(caller, "", &busybox(), &read);
        fs::remove_file(&file).unwrap();
        assert_eq!((shared.as_str(), private.as_str()), ("host's", "none\n"));
        let namespace = |kind: &str, options: &str| {
            host.ok(caller, options, &busybox(), &format!("readlink /proc/self/ns/{kind}")).trim().to_owned()
        };
        let of_host =
            |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_str().unwrap().to_owned();
        assert_eq!(namespace("ipc", "--ipc host"), of_host("ipc"));
        assert_eq!(namespace("net", ""), of_host("net"));
        for kind in ["ipc", "mnt", "pid", "uts", "cgroup"] {
            assert_ne!(namespace(kind, ""), of_host(kind), "{kind}");
        }
        assert_ne!(namespace("net", "--network none"), of_host("net"));
        assert_eq!(namespace("user", "") == of_host("user"), caller == Caller::Root);
    }
}

#[test]
fn no_descriptor_of_the_launchers_reaches_the_command() {
    let host = TestHost::new("8xh100");
    let dir = temporary();
    for caller in Caller::EACH {
        for options in ["--gpus all", "--gpus all --init", "-t", "-u 0 --read-only"] {
            let command = host.command(
                caller,
                options,
                &busybox(),
                &["sh", "-c", "ls /proc/self/fd /proc/1/fd; ls /proc/self/fd/9/ 2>/dev/null"],
            );
            let mut with_nine = Command::new("bash");
            with_nine.args(["-c", "exec 9< \"$0\"; exec 12<> /dev/null; exec \"$@\""]).arg(dir.path());
            with_nine.arg(command.get_program()).args(command.get_args()).env_clear();
            with_nine.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let ended = run(&mut with_nine);
            // 3 is the directory that ls itself reads; of its own descriptors it has no more than that. gpurun's init has 3 and 4:
            // its signals, and the command's process.
            let numbers: Vec<&str> =
                ended.out.split_whitespace().filter(|word| word.parse::<u32>().is_ok()).collect();
            assert!(
                numbers.iter().all(|n| ["0", "1", "2", "3", "4", "10"].contains(n)),
                "{options}: {ended:?}"
            );
            assert!(!numbers.contains(&"9") && numbers.len() >= 6, "{options}: {ended:?}");
        }
    }
}
