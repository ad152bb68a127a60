//! Cgroups on the real kernel.

use super::*;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::process::{Child, Command, Output, Stdio};

/// Whether the kernel lets this process make cgroups. Prints a notice if not.
fn root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root() && Layout::current() != Layout::Absent;
    if !root {
        eprintln!("{test}: skipped, making cgroups needs root and a cgroup hierarchy");
    }
    root
}

fn id(test: &str) -> String {
    format!("test-{test}-{}", std::process::id())
}

/// A shell that runs `script` once it is in the cgroup.
fn start(cgroup: &Cgroup, script: &str) -> Child {
    let mut shell = Command::new("sh")
        .args(["-c", &format!("read -r go; {script}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    if let Some((path, _)) = &cgroup.unified {
        write(&path.join("cgroup.procs"), &shell.id().to_string()).unwrap();
    }
    cgroup.join(Pid::from_child(&shell)).unwrap();
    shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
    shell
}

fn run(cgroup: &Cgroup, script: &str) -> Output {
    start(cgroup, script).wait_with_output().unwrap()
}

fn paths(cgroup: &Cgroup) -> Vec<PathBuf> {
    cgroup.unified.iter().map(|(path, _)| path.clone()).chain(cgroup.legacy.clone()).collect()
}

#[test]
fn a_memory_limit_kills_what_exceeds_it() {
    if !root("memory") {
        return;
    }
    let limits = Limits { memory: Some(48 << 20), ..Limits::default() };
    let cgroup = Cgroup::create(&id("memory"), &limits, false).unwrap().unwrap();
    let allocate = |size| format!("dd if=/dev/zero of=/dev/null bs={size} count=1; echo survived: $?");
    let said = |output: Output| String::from_utf8(output.stdout).unwrap();
    assert_eq!(said(run(&cgroup, &allocate("8M"))), "survived: 0\n");
    assert_eq!(said(run(&cgroup, &allocate("200M"))), "survived: 137\n");
    cgroup.remove().unwrap();
}

#[test]
fn a_limit_of_processes_stops_a_fork() {
    if !root("pids") {
        return;
    }
    let limits = Limits { pids: Some(3), ..Limits::default() };
    let cgroup = Cgroup::create(&id("pids"), &limits, false).unwrap().unwrap();
    assert!(run(&cgroup, "sleep 0 & sleep 0 & wait").status.success());
    assert!(!run(&cgroup, "sleep 1 & sleep 1 & sleep 1 & wait").status.success());
    cgroup.remove().unwrap();
}

#[test]
fn a_limit_of_processors_is_written_as_a_quota() {
    if !root("cpus") {
        return;
    }
    let limits = Limits {
        cpu: Some(CpuQuota { quota: Some(150_000), period: 100_000, options: "--cpus" }),
        ..Limits::default()
    };
    let cgroup = Cgroup::create(&id("cpus"), &limits, false).unwrap().unwrap();
    let written: Vec<String> = paths(&cgroup)
        .iter()
        .flat_map(|path| {
            ["cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"].map(|file| read(&path.join(file)))
        })
        .filter(|text| !text.is_empty())
        .collect();
    assert!(written == ["150000 100000\n"] || written == ["150000\n", "100000\n"], "{written:?}");
    cgroup.remove().unwrap();
}

#[test]
fn only_the_devices_of_the_rules_open() {
    if !root("devices") {
        return;
    }
    let directory = tempfile::tempdir_in("/dev").unwrap();
    let node = |name: &str, minor| {
        let path = directory.path().join(name);
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, &path, FileType::CharacterDevice, mode, makedev(1, minor)).unwrap();
        path.display().to_string()
    };
    let (null, zero) = (node("null", 3), node("zero", 5));
    let read_zero = DeviceRule {
        kind: DeviceKind::Char,
        major: Some(1),
        minor: Some(5),
        read: true,
        write: false,
        mknod: false,
    };
    let mut cgroup = Cgroup::create(&id("devices"), &Limits::default(), true).unwrap().unwrap();
    cgroup.restrict(&[read_zero]).unwrap();
    assert!(cgroup.dir_fd().is_some() || cgroup.layout == Layout::Legacy);
    let works = |script: &str| run(&cgroup, script).status.success();
    assert!(works(&format!(": < {zero}")));
    assert!(!works(&format!(": > {zero}")));
    assert!(!works(&format!(": < {null}")));
    assert!(!works(&format!("mknod {}/full c 1 7", directory.path().display())));
    cgroup.remove().unwrap();
    let bare = Cgroup::create(&id("devices"), &Limits::default(), false).unwrap().unwrap();
    assert!(run(&bare, &format!(": < {null}")).status.success());
    bare.remove().unwrap();
}

#[test]
fn v1_hierarchies_restrict_devices_where_there_is_no_v2() {
    if !root("devices of v1") {
        return;
    }
    if legacy_mount("devices").is_none() {
        eprintln!("devices of v1: skipped, no such hierarchy is mounted");
        return;
    }
    let directory = directory(&id("legacy")).unwrap();
    let mut cgroup = Cgroup { layout: Layout::Legacy, directory, unified: None, legacy: Vec::new() };
    let mut rules = [DeviceRule {
        kind: DeviceKind::All,
        major: Some(1),
        minor: None,
        read: true,
        write: false,
        mknod: false,
    }; 2];
    rules[1].read = false;
    cgroup.restrict(&rules).unwrap();
    assert_eq!(read(&cgroup.legacy[0].join("devices.list")), "c 1:* r\nb 1:* r\n");
    assert!(run(&cgroup, ": < /dev/zero").status.success());
    assert!(!run(&cgroup, ": > /dev/zero").status.success());
    // v1 has no cgroup.kill.
    let mut shell = start(&cgroup, "exec sleep 1000");
    cgroup.remove().unwrap();
    assert!(!shell.wait().unwrap().success());
}

#[test]
fn what_a_killed_launcher_left_is_killed_and_removed() {
    if !root("stale") {
        return;
    }
    let id = id("stale");
    let limits = Limits { pids: Some(100), memory: Some(1 << 30), ..Limits::default() };
    let cgroup = Cgroup::create(&id, &limits, false).unwrap().unwrap();
    let again = Cgroup::create(&id, &limits, false).unwrap_err();
    assert_eq!(again.code(), Code::Cgroup, "an id is used once");
    let mut shell = start(&cgroup, "echo ready; sleep 1000 & sleep 1000");
    std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
    let paths = paths(&cgroup);
    for path in &paths {
        fs::create_dir_all(path.join("made/inside")).unwrap();
    }
    drop(cgroup);
    assert!(paths.iter().all(|path| path.exists()));
    Cgroup::remove_stale(&id, None).unwrap();
    assert!(!paths.iter().any(|path| path.exists()), "{paths:?}");
    assert!(!shell.wait().unwrap().success());
    Cgroup::remove_stale(&id, None).unwrap();
}

#[test]
fn a_failure_leaves_nothing_behind() {
    if !root("failure") {
        return;
    }
    let id = id("failure");
    // The kernel takes no such number of processes.
    let limits = Limits { pids: Some(u64::MAX), memory: Some(1 << 30), ..Limits::default() };
    let error = Cgroup::create(&id, &limits, false).unwrap_err();
    assert_eq!(error.code(), Code::Limit);
    assert!(error.what().contains("--pids-limit"), "{error}");
    let mut mounts =
        Layout::current().unified().into_iter().chain(LEGACY.into_iter().filter_map(legacy_mount));
    assert!(mounts.all(|mount| !mount.join(directory(&id).unwrap()).exists()));
}

#[test]
fn a_user_without_a_cgroup_runs_without_but_not_with_a_limit() {
    let delegated =
        Layout::current().unified().and_then(|mount| Place::read().highest_writable(&mount, None));
    if rustix::process::geteuid().is_root() || delegated.is_some() {
        eprintln!("user: skipped, this is root or a user with a cgroup of his own");
        return;
    }
    let id = id("user");
    assert!(Cgroup::create(&id, &Limits::default(), false).unwrap().is_none());
    let limits = Limits { memory: Some(1 << 30), ..Limits::default() };
    let error = Cgroup::create(&id, &limits, false).unwrap_err();
    assert_eq!(error.code(), Code::Limit);
    assert!(error.fix_line().contains("Delegate=yes"), "{error}");
    Cgroup::remove_stale(&id, None).unwrap();
}

#[test]
fn the_launcher_steps_aside_only_where_it_is_alone() {
    let Some(mount) = Layout::current().unified().filter(|_| root("aside")) else { return };
    let path = mount.join(id("aside"));
    fs::create_dir(&path).unwrap();
    let procs = path.join("cgroup.procs");
    let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
    write(&procs, &other.id().to_string()).unwrap();
    assert!(step_aside(&path, getpid()).unwrap_err().to_string().contains("other processes"));
    assert!(!path.join(LAUNCHER).exists());
    step_aside(&path, Pid::from_child(&other)).unwrap();
    assert_eq!(read(&procs), "");
    assert_eq!(read(&path.join(LAUNCHER).join("cgroup.procs")), format!("{}\n", other.id()));
    other.kill().unwrap();
    other.wait().unwrap();
    remove(&path).unwrap();
}

#[test]
fn ids_are_plain_names() {
    for id in ["", "..", "a/b", "a\0", ".hidden"] {
        assert!(Cgroup::remove_stale(id, None).is_err(), "{id:?}");
    }
}

#[test]
fn our_own_place_is_found_by_hierarchy() {
    let own =
        Place("12:cpu,cpuacct:/a\n3:name=systemd:/s:x\n2:cpu,cpuset:/no\n0::/user.slice/x.scope\n".into());
    assert_eq!(own.path(Some("cpu")), Some("/a"));
    assert_eq!(own.path(Some("name=systemd")), Some("/s:x"));
    assert_eq!(own.path(None), Some("/user.slice/x.scope"));
    assert_eq!(own.path(Some("memory")), None);
    assert_eq!(Place(String::new()).path(None), None);
}

#[test]
fn the_start_is_the_highest_cgroup_that_is_ours() {
    let mount = tempfile::tempdir().unwrap();
    let own = Place("0::/user/service/scope\n".into());
    let start = || own.highest_writable(mount.path(), None);
    assert_eq!(start(), None);
    // No cgroup.procs that may be written above it: `service` is what was delegated.
    fs::create_dir_all(mount.path().join("user/service/scope")).unwrap();
    fs::write(mount.path().join("user/service/scope/cgroup.procs"), "").unwrap();
    assert_eq!(start(), Some(mount.path().join("user/service/scope")));
    fs::write(mount.path().join("user/service/cgroup.procs"), "").unwrap();
    assert_eq!(start(), Some(mount.path().join("user/service")));
    let outside = Place("0::/../service\n".into());
    assert_eq!(outside.highest_writable(&mount.path().join("user"), None), None);
}
