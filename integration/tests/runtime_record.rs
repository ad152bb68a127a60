//! `gpurun-runtime` as engines call it: `create` and `run` go to gpurun, everything else to the low-level runtime that created
//! the containers of the same `--root`.

use gpurun_integration::{TestHost, bundle::Bundle, dist, run, unique};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::PathBuf,
    process::{Command, Stdio},
};

/// Programs that print their names and words.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new() -> Self {
        let programs = Self(tempfile::tempdir().unwrap());
        fs::copy(dist("gpurun-runtime"), programs.path("gpurun-runtime")).unwrap();
        for name in ["gpurun", "runc", "crun"] {
            programs.script(name);
        }
        programs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn script(&self, name: &str) {
        fs::write(self.path(name), format!("#!/bin/sh\necho {name} \"$@\"\n")).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn record(&self, lines: &[(&str, &str)]) {
        let line = |(root, name): &(&str, &str)| format!("{root}\t{}\n", self.path(name).display());
        fs::write(self.path("low-level-runtimes"), lines.iter().map(line).collect::<String>()).unwrap();
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(self.path("gpurun-runtime"));
        command.args(line.split(' ').filter(|word| !word.is_empty())).env("GPURUN_STATE_DIR", self.0.path());
        command
    }

    /// The program that the command line reached, which printed the same words.
    fn reached(&self, line: &str) -> String {
        let ended = run(&mut self.command(line));
        let (name, words) = ended.out.trim_end().split_once(' ').unwrap_or((ended.out.trim_end(), ""));
        assert_eq!((ended.code, words, ended.err.as_str()), (0, line, ""), "{line}");
        name.into()
    }
}

#[test]
fn only_new_containers_need_gpurun() {
    let programs = Programs::new();
    programs.record(&[("/run/a", "runc"), ("/run/b", "crun"), ("", "crun"), ("/run/gone", "gone")]);
    for (line, expected) in [
        ("--root /run/a start ID", "runc"),
        ("--root=/run/a --log /l --log-format json kill --all ID 9", "runc"),
        ("-root /run/a delete --force ID", "runc"),
        ("--root /run/b state ID", "crun"),
        ("--log /l --root /run/b exec --process p ID", "crun"),
        ("start ID", "crun"),
        ("--version", "crun"),
        ("", "crun"),
        // No record for this directory, or its program is gone.
        ("--root /run/c start ID", "gpurun"),
        ("--root /run/ start ID", "gpurun"),
        ("--root /run/a/ start ID", "gpurun"),
        ("--root /run/gone start ID", "gpurun"),
        // The last --root counts, as in runc and crun.
        ("--root /run/a --root /run/b start ID", "crun"),
        // New containers, and whatever may be one.
        ("--root /run/a create --bundle /b ID", "gpurun"),
        ("run ID", "gpurun"),
        ("--root /run/a start run", "gpurun"),
        ("--log create start ID", "gpurun"),
    ] {
        assert_eq!(programs.reached(line), expected, "{line}");
    }
}

#[test]
fn a_record_that_others_could_have_written_is_not_believed() {
    let programs = Programs::new();
    let record = programs.path("low-level-runtimes");
    let fresh = || {
        let _ = fs::remove_file(&record);
        programs.record(&[("", "runc")]);
        assert_eq!(programs.reached("start ID"), "runc");
    };
    fresh();
    fs::set_permissions(&record, fs::Permissions::from_mode(0o664)).unwrap();
    assert_eq!(programs.reached("start ID"), "gpurun", "the group may write it");
    fresh();
    chown(&record, Some(54321), None).unwrap();
    assert_eq!(programs.reached("start ID"), "gpurun", "it belongs to another user");
    fresh();
    fs::rename(&record, programs.path("other")).unwrap();
    symlink(programs.path("other"), &record).unwrap();
    assert_eq!(programs.reached("start ID"), "gpurun", "it is a link");
    for content in ["", "\t", "\t/bin/echo", "\techo\n", "\0\n", "\n\n\n"] {
        let _ = fs::remove_file(&record);
        fs::write(&record, content).unwrap();
        assert_eq!(programs.reached("start ID"), "gpurun", "{content:?}");
    }
    fresh();
    let mut command = programs.command("start ID");
    assert_eq!(run(command.env("GPURUN_CONFIG", "/nowhere")).out, "gpurun start ID\n");
    let setpriv = ["--reuid", "54321", "--regid", "54321", "--clear-groups"];
    fs::set_permissions(programs.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(setpriv).arg(programs.path("gpurun-runtime")).args(["start", "ID"]);
    assert_eq!(run(command.env("GPURUN_STATE_DIR", programs.0.path())).out, "gpurun start ID\n");
}

#[test]
fn without_gpurun_it_says_what_is_missing() {
    let programs = Programs::new();
    fs::remove_file(programs.path("gpurun")).unwrap();
    let ended = run(&mut programs.command("create ID"));
    assert!(ended.code == 1 && ended.err.starts_with("error[GPU-0059]: "), "{ended:?}");
    assert!(ended.err.contains("\n  fix: install gpurun beside gpurun-runtime"), "{ended:?}");
}

/// The life of a container under runc.
#[test]
fn the_runtime_that_creates_a_container_starts_and_deletes_it() {
    let host = TestHost::new("t4");
    let programs = tempfile::tempdir().unwrap();
    for name in ["gpurun", "gpurun-runtime", "gpurun-nvml"] {
        symlink(dist(name), programs.path().join(name)).unwrap();
    }
    let runtimes = tempfile::tempdir().unwrap();
    let calls = runtimes.path().join("calls");
    let runc = runtimes.path().join("runc");
    fs::write(&runc, format!("#!/bin/sh\necho \"$*\" >> {}\nexec /usr/sbin/runc \"$@\"\n", calls.display()))
        .unwrap();
    fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
    let bundle = Bundle::of("busybox");
    let spec =
        bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["/bin/sh", "-c", "ls /dev/nvidia0; exit 5"]);
    fs::write(bundle.dir.path().join("config.json"), spec.to_string()).unwrap();
    let root = runtimes.path().join("state");
    let id = unique();
    let call = |words: &[&str]| {
        let mut command = Command::new(programs.path().join("gpurun-runtime"));
        command.arg("--root").arg(&root).args(words);
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", runtimes.path().display()));
        command.env("GPURUN_SIMULATED_HOST", host.path()).env("GPURUN_STATE_DIR", host.state_dir(0));
        command
    };
    let bundle = bundle.dir.path().to_str().unwrap();
    for (words, code) in [
        (&["create", "--bundle", bundle, &id][..], 0),
        (&["state", &id], 0),
        (&["start", &id], 0),
        (&["delete", "--force", &id], 0),
        (&["state", &id], 1),
    ] {
        // The container keeps the streams, so a pipe would not end.
        let status = call(words).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{words:?}");
    }
    let called = fs::read_to_string(&calls).unwrap();
    let verbs: Vec<&str> = called.lines().map(|line| line.split(' ').nth(2).unwrap()).collect();
    assert_eq!(verbs, ["create", "state", "start", "delete", "state"]);
    let record = fs::read_to_string(host.state_dir(0).join("low-level-runtimes")).unwrap();
    assert_eq!(record, format!("{}\t{}\n", root.display(), runc.display()));
    // Where the record is, gpurun is not needed any more.
    fs::remove_file(programs.path().join("gpurun")).unwrap();
    assert_eq!(run(&mut call(&["state", &id])).code, 1);
}
