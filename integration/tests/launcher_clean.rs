//! However a container ends, it leaves nothing behind, or its leftovers are removed while the next container runs.

use gpurun_integration::{
    Caller, SpawnPiped, TestHost, finish, must, processes_with, rootfs, run, unique, until,
};
use std::{
    fs,
    io::Read,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

fn busybox() -> String {
    rootfs("busybox")
}

/// The cgroups of these containers, in every hierarchy.
fn cgroups(ids: &[String]) -> Vec<PathBuf> {
    fn walk(dir: PathBuf, ids: &[String], depth: u32, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if ids.iter().any(|id| entry.file_name().to_string_lossy().contains(id.as_str())) {
                    found.push(entry.path());
                }
                if depth > 0 {
                    walk(entry.path(), ids, depth - 1, found);
                }
            }
        }
    }
    let mut found = Vec::new();
    walk("/sys/fs/cgroup".into(), ids, 5, &mut found);
    found
}

/// Whether anything below this host's directory is mounted where the host sees it.
fn mounted(host: &TestHost) -> bool {
    fs::read_to_string("/proc/mounts").unwrap().contains(host.path().parent().unwrap().to_str().unwrap())
}

fn nothing_is_left(host: &TestHost, caller: Caller, ids: &[String], mark: &str) {
    until("the end of the container's processes", || processes_with(mark).is_empty());
    assert_eq!(host.scratch(caller), [""; 0]);
    assert!(cgroups(ids).is_empty(), "{:?}", cgroups(ids));
    assert!(!mounted(host));
}

/// Waits until sweepers have removed the leftovers of killed launchers. They work while a container runs, and skip entries
/// younger than a second.
fn swept(host: &TestHost, caller: Caller, rest: &[&str]) {
    until("the end of the leftovers", || {
        host.ok(caller, "", &busybox(), "sleep 2");
        host.scratch(caller) == rest
    });
}

/// Starts a container that sleeps, with a mark by which its processes are known; waits until the command runs.
fn sleeper(host: &TestHost, caller: Caller, options: &str, mark: &str) -> (Child, String) {
    let before = host.scratch(caller);
    let script = "(sleep 1000 &); (sh -c 'sleep 1000; true' &); echo ready; exec sleep 1000";
    let mut child = host
        .command(caller, &format!("-e MARK={mark} {options}"), &busybox(), &["sh", "-c", script])
        .env("MARK", mark)
        .spawn_piped();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let id = host.scratch(caller).into_iter().find(|id| !before.contains(id)).expect("a scratch directory");
    (child, id)
}

/// The options of containers that have a cgroup with limits, where the caller may have one.
fn limits(caller: Caller) -> &'static str {
    match caller {
        Caller::Root => "-m 512m --cpus 2 --pids-limit 100 --gpus all",
        Caller::User => "--gpus all",
    }
}

#[test]
fn an_ordinary_end_leaves_nothing() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        let mark = unique();
        // Children that outlive the command go with it, and so do files that nobody may read.
        let script = "echo ready; (sleep 1000 &); mkdir -p /x/y; touch /x/y/z; chmod 0 /x/y /x; sleep 0.1";
        let options = format!("-e MARK={mark} -u 0 {}", limits(caller));
        let mut child = host
            .command(caller, &options, &busybox(), &["sh", "-c", script])
            .env("MARK", &mark)
            .spawn_piped();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let ids = host.scratch(caller);
        assert_eq!(ids.len(), 1);
        if caller == Caller::Root {
            assert!(!cgroups(&ids).is_empty(), "the test must find cgroups to be worth something");
        }
        assert!(processes_with(&mark).len() >= 2);
        assert_eq!(finish(child).code, 0);
        nothing_is_left(&host, caller, &ids, &mark);
    }
}

#[test]
fn a_failed_start_leaves_nothing() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        for (options, command) in [
            ("", "/nowhere"),
            ("--init", "/nowhere"),
            ("--tmpfs /etc/passwd", "true"),
            ("-v /dev/null:/etc", "true"),
            ("--ulimit nofile=99999999999", "true"),
            ("-u 0:no-group", "true"),
            ("--gpus 99", "true"),
        ] {
            let ended = run(&mut host.command(caller, options, &busybox(), &[command]));
            assert!(
                ended.code >= 125 && ended.err.starts_with("error[GPU-00"),
                "{caller:?} {options}: {ended:?}"
            );
            assert_eq!(host.scratch(caller), [""; 0], "{options}");
            assert!(!mounted(&host));
        }
    }
}

#[test]
fn a_killed_launcher_takes_its_container_along_and_its_files_go_while_the_next_one_runs() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        for options in ["", "--init", "-t", "--read-only", "-u 4242"] {
            let mark = unique();
            let (mut child, id) = sleeper(&host, caller, &format!("{options} {}", limits(caller)), &mark);
            assert!(processes_with(&mark).len() >= 3, "{options}");
            child.kill().unwrap();
            child.wait().unwrap();
            until("the end of the container's processes", || processes_with(&mark).is_empty());
            assert!(!mounted(&host));
            swept(&host, caller, &[]);
            nothing_is_left(&host, caller, &[id], &mark);
        }
    }
}

#[test]
fn a_launcher_killed_at_any_moment_leaves_nothing_behind() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        host.ok(caller, "--gpus all", &busybox(), "true");
        let mark = unique();
        let mut ids = Vec::new();
        let mut some_ran = 0;
        for round in 0..200 {
            let options =
                format!("-e MARK={mark} {} {}", if round % 2 == 0 { "--init" } else { "" }, limits(caller));
            let mut command =
                host.command(caller, &options, &busybox(), &["sh", "-c", "echo ran; sleep 1000"]);
            let mut child = command.env("MARK", &mark).stdin(Stdio::null()).spawn_piped();
            // The whole start, in steps of 0.15 ms.
            thread::sleep(Duration::from_micros(150 * round));
            ids.extend(host.scratch(caller));
            child.kill().unwrap();
            some_ran += u32::from(finish(child).out.contains("ran"));
        }
        ids.sort();
        ids.dedup();
        until("the end of the containers' processes", || processes_with(&mark).is_empty());
        assert!(!mounted(&host));
        swept(&host, caller, &[]);
        nothing_is_left(&host, caller, &ids, &mark);
        assert!(ids.len() > 5 && some_ran < 200, "{} scratch directories, {some_ran} ran", ids.len());
    }
}

#[test]
fn a_start_does_not_clean_up_what_runs() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        let (first_mark, second_mark) = (unique(), unique());
        let (first, first_id) = sleeper(&host, caller, limits(caller), &first_mark);
        let (second, second_id) = sleeper(&host, caller, limits(caller), &second_mark);
        assert_ne!(first_id, second_id);
        for _ in 0..5 {
            host.ok(caller, "--gpus device=0", &busybox(), "true");
        }
        let mut both = host.scratch(caller);
        both.sort();
        let mut expected = [first_id.clone(), second_id.clone()];
        expected.sort();
        assert_eq!(both, expected);
        let term = |child: &Child| must(Command::new("kill").args(["-KILL", &child.id().to_string()]));
        term(&first);
        assert_eq!(finish(first).code, 137);
        until("the end of the first", || processes_with(&first_mark).is_empty());
        assert!(processes_with(&second_mark).len() >= 3, "the second runs on");
        swept(&host, caller, &[second_id.as_str()]);
        term(&second);
        finish(second);
        swept(&host, caller, &[]);
        nothing_is_left(&host, caller, &[first_id, second_id], &second_mark);
    }
}

#[test]
fn many_start_at_once() {
    let host = TestHost::new("8xh100");
    for caller in Caller::EACH {
        let children: Vec<Child> = (0..16)
            .map(|n| {
                let script =
                    format!("echo {n} > /own; sleep 0.2; cat /own; nvidia-smi -L 2>/dev/null | wc -l");
                host.command(caller, "--gpus all", &rootfs("debian-python"), &["sh", "-c", &script])
                    .stdin(Stdio::null())
                    .spawn_piped()
            })
            .collect();
        for (n, child) in children.into_iter().enumerate() {
            let ended = finish(child);
            assert_eq!((ended.code, ended.out), (0, format!("{n}\n8\n")), "{}", ended.err);
        }
        assert_eq!(host.scratch(caller), [""; 0]);
    }
}

#[test]
fn a_container_is_gone_when_its_command_ends_although_its_children_hold_on() {
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let mark = unique();
        // A child that ignores every signal and holds the output.
        let script = "trap '' TERM HUP INT; (trap '' TERM HUP; while :; do sleep 1; done) & exit 5";
        let mut command = host.command(caller, &format!("-e MARK={mark}"), &busybox(), &["sh", "-c", script]);
        assert_eq!(run(command.env("MARK", &mark)).code, 5);
        nothing_is_left(&host, caller, &[], &mark);
    }
}
