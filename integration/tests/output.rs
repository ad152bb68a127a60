//! Every command that prints: a closed pipe ends it silently, a full disk is one error, and a closed standard error is no failure.

use gpurun_integration::{TestHost, dist, temporary};
use std::{
    fs::{File, OpenOptions},
    io::{Read, pipe},
    os::unix::{fs::symlink, process::ExitStatusExt},
    path::PathBuf,
    process::{Command, Stdio},
};

/// The programs' names, each a link to gpurun.
fn names() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = temporary();
    let names = ["nvidia-ctk", "nvidia-container-cli", "nvidia-container-runtime-hook"];
    let links: Vec<PathBuf> = names.iter().map(|name| dir.path().join(name)).collect();
    for link in &links {
        symlink(dist("gpurun"), link).expect("the directory is ours");
    }
    (dir, links)
}

/// Every command that prints something on a simulated host.
fn commands(host: &TestHost, links: &[PathBuf]) -> Vec<Command> {
    let lines = [
        "--help",
        "--version",
        "version",
        "-h",
        "help run",
        "help cdi generate",
        "run --help",
        "plan --help",
        "ls",
        "ls --json",
        "doctor",
        "doctor --json",
        "inventory",
        "config",
        "config --json",
        "cdi generate",
        "cdi list",
        "cdi validate",
        "cdi validate --json",
        "completions bash",
        "completions zsh",
        "completions fish",
        "images",
        "images --json",
        "plan --gpus all host:",
        "plan --json --gpus all host:",
        "prune",
        "configure docker --dry-run --file /nonexistent/daemon.json",
    ];
    let gpurun = lines.iter().map(|line| {
        let mut command = host.gpurun();
        command.args(line.split(' '));
        command
    });
    let others = [
        (0, "--help"),
        (0, "--version"),
        (0, "cdi generate"),
        (0, "cdi list"),
        (0, "config"),
        (1, "--help"),
        (1, "--version"),
        (1, "info"),
        (1, "list"),
        (2, "-version"),
    ];
    let linked = others.iter().map(|(name, line)| {
        let mut command = host.gpurun();
        let mut linked = Command::new(&links[*name]);
        linked.env_clear().envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        command = linked;
        command.args(line.split(' '));
        command
    });
    let mut hook = Command::new(dist("gpurun-hook"));
    hook.arg("--version");
    gpurun.chain(linked).chain([hook]).collect()
}

/// Whether the command prints anything at all to a pipe that is read.
fn prints(command: &mut Command) -> bool {
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .expect("it starts");
    !output.stdout.is_empty()
}

#[test]
fn a_closed_pipe_ends_every_command_silently() {
    let host = TestHost::new("8xh100");
    let (_dir, links) = names();
    let mut printed = 0;
    for mut command in commands(&host, &links) {
        if !prints(&mut command) {
            continue;
        }
        printed += 1;
        let (reader, writer) = pipe().expect("a pipe");
        drop(reader);
        let child = command.stdout(writer).stderr(Stdio::piped()).spawn().expect("it starts");
        // `command` also holds a copy of the pipe.
        let output = child.wait_with_output().expect("it ends");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(141), "{command:?}: {:?} {err}", output.status.signal());
        assert!(!err.contains("error[") && !err.contains("panicked"), "{command:?}: {err}");
    }
    assert!(printed > 30, "{printed}");
}

#[test]
fn a_full_disk_is_one_error_of_every_command() {
    let host = TestHost::new("8xh100");
    let (_dir, links) = names();
    for mut command in commands(&host, &links) {
        if !prints(&mut command) {
            continue;
        }
        let full = OpenOptions::new().write(true).open("/dev/full").expect("devtmpfs");
        let child = command.stdout(full).stderr(Stdio::piped()).spawn().expect("it starts");
        let output = child.wait_with_output().expect("it ends");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{command:?}: {err}");
        let texts = ["error[GPU-0003]: standard output cannot be written", "{\"error\":\"GPU-0003\""];
        let failures: usize = texts.iter().map(|text| err.matches(text).count()).sum();
        assert_eq!(failures, 1, "{command:?}: {err}");
        assert!(err.contains("No space left") && err.contains("fix"), "{command:?}: {err}");
    }
}

#[test]
fn a_closed_standard_error_changes_no_exit_code() {
    let host = TestHost::new("8xh100");
    for (line, code) in [
        ("run --gpus all", 125),
        ("--bogus", 125),
        ("dcotor", 125),
        ("--log debug ls", 0),
        ("run --log debug --gpus 99 host: true", 125),
        ("--json run --gpus 99 host: true", 125),
    ] {
        for sink in ["pipe", "full"] {
            let mut command = host.gpurun();
            command.args(line.split(' ')).stdin(Stdio::null()).stdout(Stdio::piped());
            if sink == "pipe" {
                let (reader, writer) = pipe().expect("a pipe");
                drop(reader);
                command.stderr(writer);
            } else {
                command.stderr(File::options().write(true).open("/dev/full").expect("devtmpfs"));
            }
            let mut child = command.spawn().expect("it starts");
            let mut out = String::new();
            child.stdout.take().expect("it is a pipe").read_to_string(&mut out).expect("it is text");
            assert_eq!(child.wait().expect("it ends").code(), Some(code), "{line} {sink}");
        }
    }
}
