//! `gpurun configure` and `nvidia-ctk`: the real programs on an engine's files.

use gpurun_integration::{Ended, TestHost, USER, dist, must, run};
use rustix::fs::{CWD, FileType, Mode};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

const RUNTIME: &str = "/opt/gpurun-runtime";

/// Each engine with a file as its user may have written it.
const ENGINES: [(&str, &str); 4] = [
    (
        "docker",
        "{\n\t\"features\": {\"buildkit\": true},\n\t\"runtimes\": {\n\t\t\"x\": { \"path\" : \"/x\" }\n\t},\n\t\"mtu\": 1.50e3\n}",
    ),
    (
        "containerd",
        "# ours\nversion = 3\n\n[plugins.'io.containerd.cri.v1.runtime'.containerd] # here\ndefault_runtime_name = 'crun'\n\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun]\nruntime_type = 'io.containerd.runc.v2'\n\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun.options]\nSystemdCgroup = true\n# end",
    ),
    ("crio", "[crio.runtime]\n# why\ndefault_runtime = \"crun\"\n"),
    ("podman", "[engine]\nruntime = \"crun\" # why\n\n[containers]\npids_limit = 0\n"),
];

/// A directory like /etc, and the program that changes it.
struct Etc(TempDir);

impl Etc {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("gpurun-etc-").tempdir().unwrap())
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// Every file with its content; a link with where it leads.
    fn all(&self) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        let mut dirs = vec![self.0.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_symlink() {
                    found.insert(path.clone(), fs::read_link(path).unwrap().display().to_string());
                } else if path.is_dir() {
                    dirs.push(path);
                } else {
                    found.insert(path.clone(), fs::read_to_string(path).unwrap());
                }
            }
        }
        found
    }
}

/// gpurun, with its records of engines in `notes`/engines.toml.
fn gpurun(notes: &Path) -> Command {
    let mut command = Command::new(dist("gpurun"));
    command.env("GPURUN_CONFIG", notes.join("config.toml"));
    command
}

/// The runtime without records of engines, which other tests cover.
fn configure(engine: &str, file: &Path, options: &[&str]) -> Ended {
    let notes = tempfile::tempdir().unwrap();
    configure_with_notes(notes.path(), engine, file, options)
}

fn configure_with_notes(notes: &Path, engine: &str, file: &Path, options: &[&str]) -> Ended {
    let command = [&["configure", engine, "--path", RUNTIME, "--file"][..]].concat();
    let mut ended = run(gpurun(notes).args(command).arg(file).args(options));
    let is_note = |line: &&str| line.contains("engines.toml");
    let lines: Vec<&str> = ended.out.lines().filter(|line| !is_note(line)).collect();
    if options.contains(&"--dry-run") {
        let end = ended.out.find("engines.toml").and_then(|at| ended.out[..at].rfind("--- a"));
        ended.out.truncate(end.unwrap_or(ended.out.len()));
    } else {
        ended.out = lines.iter().map(|line| format!("{line}\n")).collect();
    }
    ended
}

fn done(ended: &Ended) -> &str {
    assert!(ended.code == 0 && ended.err.is_empty(), "{ended:?}");
    &ended.out
}

fn refused(ended: &Ended, code: &str, with: &str) {
    assert!(ended.code == 125 && ended.out.is_empty(), "{ended:?}");
    assert!(ended.err.starts_with(&format!("error[{code}]: ")) && ended.err.contains(with), "{ended:?}");
}

#[test]
fn twice_is_once_and_what_is_taken_out_leaves_no_trace() {
    for (engine, text) in ENGINES {
        for text in [Some(text), None] {
            let etc = Etc::new();
            let file =
                text.map_or(etc.0.path().join("new/dir/engine.conf"), |text| etc.file("engine.conf", text));
            let before = etc.all();
            let out = done(&configure(engine, &file, &["--set-as-default"])).to_owned();
            assert!(out.contains(" is written; ") && out.lines().count() == 1, "{engine}: {out}");
            let after = fs::read_to_string(&file).unwrap();
            assert!(after.contains(RUNTIME) && after.contains("gpurun"), "{engine}: {after}");
            for line in text.unwrap_or_default().lines().filter(|line| !line.contains("crun")) {
                assert!(after.contains(line), "{engine} lost {line}: {after}");
            }
            if engine == "containerd" && text.is_some() {
                assert_eq!(
                    after.matches("SystemdCgroup = true").count(),
                    2,
                    "as the default runtime: {after}"
                );
            }
            if text.is_some() {
                let kept = fs::read_to_string(etc.0.path().join("engine.conf.gpurun-backup")).unwrap();
                assert_eq!(Some(kept.as_str()), text);
            }
            let stat = fs::metadata(&file).unwrap();
            let all = etc.all();
            assert!(done(&configure(engine, &file, &["--set-as-default"])).contains("needs no change"));
            let again = fs::metadata(&file).unwrap();
            assert_eq!(
                (stat.ino(), stat.mtime_nsec()),
                (again.ino(), again.mtime_nsec()),
                "{engine}: it was written"
            );
            assert_eq!(etc.all(), all);
            done(&configure(engine, &file, &["--remove"]));
            assert_eq!(etc.all(), before, "{engine}");
            assert!(done(&configure(engine, &file, &["--remove"])).contains("needs no change"));
            assert_eq!(etc.all(), before, "{engine}");
        }
    }
}

#[test]
fn a_backup_is_from_before_the_first_run_and_edits_since_survive_the_removal() {
    for (engine, text) in ENGINES {
        let etc = Etc::new();
        let file = etc.file("engine.conf", text);
        done(&configure(engine, &file, &[]));
        let edit = |text: String| text.replacen("crun", "youki", 1).replacen("/x", "/y", 1);
        fs::write(&file, edit(fs::read_to_string(&file).unwrap())).unwrap();
        done(&configure(engine, &file, &["--set-as-default"]));
        let kept = etc.0.path().join("engine.conf.gpurun-backup");
        assert_eq!(fs::read_to_string(&kept).unwrap(), text, "{engine}: the second run has written it");
        done(&configure(engine, &file, &["--remove"]));
        let left = fs::read_to_string(&file).unwrap();
        assert!(!left.contains("gpurun") && !kept.exists(), "{engine}: {left}");
        // The default is what it was when we came; all else is what it is now.
        assert_eq!(left, if engine == "docker" { edit(text.into()) } else { text.into() }, "{engine}");
    }
}

#[test]
fn a_dry_run_prints_a_difference_that_patch_understands_and_writes_nothing() {
    for (engine, text) in ENGINES {
        let etc = Etc::new();
        let file = etc.file("engine.conf", text);
        let before = etc.all();
        let options = ["--set-as-default", "--dry-run"];
        let difference = done(&configure(engine, &file, &options)).to_owned();
        assert_eq!(etc.all(), before, "{engine}");
        assert!(difference.starts_with("--- a/") && difference.contains("\n@@ "), "{difference}");
        assert!(
            difference.lines().any(|line| line.starts_with('+') && line.contains(RUNTIME)),
            "{difference}"
        );
        done(&configure(engine, &file, &options[..1]));
        let after = fs::read_to_string(&file).unwrap();
        let added: Vec<&str> = difference.lines().skip(2).filter_map(|line| line.strip_prefix('+')).collect();
        assert!(
            !added.is_empty() && added.iter().all(|line| after.lines().any(|one| one == *line)),
            "{difference}"
        );
        let without = done(&configure(engine, &file, &["--remove", "--dry-run"])).to_owned();
        assert!(without.lines().any(|line| line.starts_with('-') && line.contains(RUNTIME)), "{without}");
        assert_eq!(fs::read_to_string(&file).unwrap(), after);
    }
}

#[test]
fn a_file_that_cannot_be_understood_is_refused_with_its_place_and_not_touched() {
    for (engine, text, place) in [
        ("docker", "{\n  \"a\": 1\n  \"b\": 2\n}\n", "line 3 column 3"),
        ("docker", "{\n  // a comment\n}\n", "line 2 column 3"),
        ("docker", "{\"runtimes\": []}", "`runtimes` is no object"),
        ("containerd", "version = 2\n[plugins\n", "line 2 column 9"),
        ("containerd", "version = 2\nplugins = 1\n", "`plugins` is no table"),
        ("crio", "[crio]\nx = \n", "line 2 column 5"),
        ("podman", "[engine]\n[engine]\n", "line 2 column"),
    ] {
        let etc = Etc::new();
        let file = etc.file("engine.conf", text);
        let before = etc.all();
        for options in [&[][..], &["--remove"], &["--dry-run"]] {
            let ended = configure(engine, &file, options);
            if options == ["--remove"] && place.contains("is no") {
                continue;
            }
            refused(&ended, "GPU-0002", place);
            assert!(ended.err.contains(file.to_str().unwrap()), "{ended:?}");
            assert_eq!(etc.all(), before, "{engine} {options:?}");
        }
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let etc = Etc::new();
    let fifo = etc.0.path().join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let large = etc.0.path().join("large");
    fs::File::create(&large).unwrap().set_len(100 << 20).unwrap();
    let binary = etc.0.path().join("binary");
    fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    let nowhere = etc.0.path().join("nowhere");
    symlink("/no/such/file", &nowhere).unwrap();
    let around = etc.0.path().join("around");
    symlink("around", &around).unwrap();
    for (engine, _) in ENGINES {
        refused(&configure(engine, etc.0.path(), &[]), "GPU-0002", "not a regular file");
        refused(&configure(engine, &fifo, &[]), "GPU-0002", "not a regular file");
        refused(&configure(engine, &large, &[]), "GPU-0002", "larger than 4 MiB");
        refused(&configure(engine, &binary, &[]), "GPU-0002", "UTF-8");
        refused(&configure(engine, &nowhere, &[]), "GPU-0002", "No such file");
        refused(&configure(engine, &around, &[]), "GPU-0002", "symbolic links");
        refused(&configure(engine, &fifo.join("x"), &[]), "GPU-0002", "Not a directory");
    }
}

#[test]
fn a_link_stays_one_and_mode_and_owner_stay() {
    let etc = Etc::new();
    let real = etc.file("real/daemon.json", "{}\n");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    chown(&real, Some(USER), Some(USER + 1)).unwrap();
    let link = etc.0.path().join("daemon.json");
    symlink("real/daemon.json", &link).unwrap();
    done(&configure("docker", &link, &[]));
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("real/daemon.json"));
    for file in [&real, &etc.0.path().join("real/daemon.json.gpurun-backup")] {
        let stat = fs::metadata(file).unwrap();
        assert_eq!(
            (stat.uid(), stat.gid(), stat.mode() & 0o7777),
            (USER, USER + 1, 0o640),
            "{}",
            file.display()
        );
    }
    done(&configure("docker", &link, &["--remove"]));
    assert_eq!(fs::read_to_string(&real).unwrap(), "{}\n");
    assert_eq!(etc.all().len(), 2, "{:?}", etc.all());
}

#[test]
fn of_containerds_files_the_one_that_counts_is_changed() {
    let etc = Etc::new();
    let plugin = "[plugins.'io.containerd.grpc.v1.cri']\n";
    let main = etc.file(
        "config.toml",
        &format!(
            "version = 2\nimports = ['conf.d/*.toml', '/no/such/*.toml']\n{plugin}enable_selinux = true\n"
        ),
    );
    let other = etc.file("conf.d/10-other.toml", "version = 2\n[metrics]\naddress = ''\n");
    // Without a table of the plugin's in a later file the main one counts.
    done(&configure("containerd", &main, &["--cdi"]));
    assert!(fs::read_to_string(&main).unwrap().contains(RUNTIME));
    assert!(fs::read_to_string(&main).unwrap().contains("enable_cdi = true"));
    done(&configure("containerd", &main, &["--cdi", "--remove"]));
    assert!(!fs::read_to_string(&main).unwrap().contains("cdi = true"));
    // Another tool's copy of the table hides it before containerd 2.1.
    let copy = etc.file("conf.d/99-nvidia.toml", &format!("version = 2\n{plugin}enable_selinux = true\n"));
    let before = etc.all();
    done(&configure("containerd", &main, &[]));
    assert!(fs::read_to_string(&copy).unwrap().contains(RUNTIME));
    assert!(!fs::read_to_string(&main).unwrap().contains(RUNTIME));
    // The tool copies ours, too: all of them lose it.
    fs::copy(&copy, etc.0.path().join("conf.d/99-z.toml")).unwrap();
    done(&configure("containerd", &main, &["--remove"]));
    assert!(etc.all().values().all(|text| !text.contains(RUNTIME)), "{:?}", etc.all());
    fs::remove_file(etc.0.path().join("conf.d/99-z.toml")).unwrap();
    assert_eq!(etc.all(), before);
    // A broken file that is imported is named.
    fs::write(&other, "[").unwrap();
    refused(&configure("containerd", &main, &[]), "GPU-0002", "10-other.toml");
}

#[test]
fn crios_drop_in_takes_conmon_from_the_file_before_it_and_its_backup_is_not_read_by_crio() {
    let etc = Etc::new();
    etc.file("crio.conf", "[crio.runtime.runtimes.crun]\nmonitor_path = \"/no\"\n");
    etc.file("crio.conf.d/10-crio.conf", "[crio.runtime]\ndefault_runtime = \"crun\"\n[crio.runtime.runtimes.crun]\nmonitor_path = \"/usr/libexec/crio/conmon\"\n");
    let file = etc.file("crio.conf.d/99-gpurun.conf", "# ours\n");
    done(&configure("crio", &file, &[]));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("/usr/libexec/crio/conmon") && text.contains("# ours\n"), "{text}");
    let names: Vec<_> =
        fs::read_dir(file.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(etc.0.path().join("99-gpurun.conf.gpurun-backup").exists());
}

#[test]
fn a_hook_of_hooks_d_comes_and_goes() {
    for engine in ["podman", "crio"] {
        let etc = Etc::new();
        let file = etc.0.path().join("hooks.d/gpurun.json");
        done(&configure(engine, &file, &["--hook"]));
        let hook: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!((&hook["hook"]["path"], &hook["hook"]["args"][1]), (&RUNTIME.into(), &"prestart".into()));
        assert!(done(&configure(engine, &file, &["--hook"])).contains("needs no change"));
        done(&configure(engine, &file, &["--hook", "--remove"]));
        assert!(etc.all().is_empty(), "{:?}", etc.all());
        fs::write(&file, "{}").unwrap();
        refused(&configure(engine, &file, &["--hook", "--remove"]), "GPU-0002", "with `mv`");
        assert_eq!(fs::read_to_string(&file).unwrap(), "{}");
    }
    for engine in ["docker", "containerd"] {
        refused(&configure(engine, Path::new("/no/such/file"), &["--hook"]), "GPU-0001", "hooks.d");
    }
}

#[test]
fn a_command_line_that_makes_no_sense_changes_nothing() {
    let etc = Etc::new();
    let file = etc.file("daemon.json", "{}");
    for options in [
        &["--name", ""][..],
        &["--name", "a b"],
        &["--name", "../x"],
        &["--name", "runc"],
        &["--path", "relative"],
        &["--hook", "--cdi"],
        &["--no-such-option"],
    ] {
        let ended = run(Command::new(dist("gpurun"))
            .args(["configure", "docker", "--file"])
            .arg(&file)
            .args(options));
        refused(&ended, "GPU-0001", "");
    }
    refused(&run(Command::new(dist("gpurun")).args(["configure", "lxd"])), "GPU-0001", "lxd");
    assert_eq!(etc.all().values().collect::<Vec<_>>(), ["{}"]);
}

#[test]
fn the_runtime_beside_the_program_is_registered() {
    let etc = Etc::new();
    let file = etc.0.path().join("daemon.json");
    must(Command::new(dist("gpurun")).args(["configure", "docker", "--file"]).arg(&file));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(dist("gpurun-runtime").to_str().unwrap()), "{text}");
    // Where there is none, that is said.
    let alone = etc.0.path().join("gpurun");
    // By another process: one that another test forks meanwhile would have the file open for writing, and it could not be run.
    must(Command::new("cp").arg(dist("gpurun")).arg(&alone));
    let ended =
        run(Command::new(&alone).env("PATH", "/no").args(["configure", "docker", "--file"]).arg(&file));
    refused(&ended, "GPU-0001", "gpurun-runtime was not found");
}

#[test]
fn an_ordinary_users_engines_have_files_of_the_users() {
    let host = TestHost::new("t4");
    for (engine, file) in
        [("docker", "docker/daemon.json"), ("podman", "containers/containers.conf.d/99-gpurun.conf")]
    {
        let ended = run(host.gpurun_as_user().args(["configure", engine, "--path", RUNTIME]));
        let config = host.path().parent().unwrap().join(format!("home-{USER}/.config")).join(file);
        assert!(done(&ended).contains(config.to_str().unwrap()), "{ended:?}");
        assert!(fs::read_to_string(&config).unwrap().contains(RUNTIME));
    }
    let ended = run(host.gpurun_as_user().args([
        "configure",
        "containerd",
        "--path",
        RUNTIME,
        "--file",
        "/etc/no-such.toml",
    ]));
    refused(&ended, "GPU-0002", "Permission denied");
}

fn nvidia_ctk(words: &[&str]) -> Command {
    let mut command = Command::new(dist("gpurun"));
    command.arg0("nvidia-ctk").args(words);
    command
}

#[test]
fn nvidia_ctk_configures_as_nvidias_does() {
    let etc = Etc::new();
    let file = etc.file("daemon.json", "{\n    \"features\": {\n        \"other\": true\n    }\n}\n");
    let words = [
        "runtime",
        "configure",
        "--runtime=docker",
        "--nvidia-runtime-path",
        "/usr/bin/nvidia-container-runtime",
        "--set-as-default",
        "--cdi.enabled",
    ];
    let ended = run(nvidia_ctk(&words).arg("--config").arg(&file));
    done(&ended);
    let text: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(
        text,
        serde_json::json!({
            "features": {"other": true, "cdi": true},
            "runtimes": {"nvidia": {"path": "/usr/bin/nvidia-container-runtime"}},
            "default-runtime": "nvidia",
        })
    );
    let drop_in = etc.0.path().join("crio.conf.d/99-nvidia.toml");
    let main =
        etc.file("main.conf", "[crio.runtime.runtimes.crun]\nmonitor_path = \"/usr/libexec/crio/conmon\"\n");
    let main = main.to_str().unwrap();
    let words = [
        "runtime",
        "configure",
        "--runtime",
        "crio",
        "--config",
        main,
        "--runtime-path",
        "/r",
        "--config-source=command",
        "--drop-in-config",
    ];
    let ended = run(nvidia_ctk(&words).arg(&drop_in));
    assert!(
        ended.code == 0
            && ended.err.contains("--config-source")
            && !ended.err.contains("--config is not used"),
        "{ended:?}"
    );
    let text = fs::read_to_string(&drop_in).unwrap();
    assert!(
        text.contains("[crio.runtime.runtimes.nvidia]") && text.contains("/usr/libexec/crio/conmon"),
        "{text}"
    );
    // --config alone is the file to change, not one below /etc.
    let alone = etc.0.path().join("alone.conf");
    let words_alone = ["runtime", "configure", "--runtime=crio", "--runtime-path=/r", "--config"];
    assert!(done(&run(nvidia_ctk(&words_alone).arg(&alone))).contains("alone.conf is written"));
    assert!(fs::read_to_string(&alone).unwrap().contains("[crio.runtime.runtimes.nvidia]"));
    assert!(!Path::new("/etc/crio/crio.conf.d/99-nvidia.toml").exists());
    let ended = run(nvidia_ctk(&["--quiet"]).args(words).arg(&drop_in));
    assert!(done(&ended).contains("needs no change"));
    // containerd's drop-in, which the main file imports from then on.
    let (main, conf_d) = (etc.file("containerd.toml", "version = 2\n# mine\n"), etc.0.path().join("conf.d"));
    let drop_in = conf_d.join("99-nvidia.toml");
    let containerd = || {
        let mut command =
            nvidia_ctk(&["runtime", "configure", "--runtime=containerd", "--runtime-path=/r", "--config"]);
        run(command.arg(&main).arg("--drop-in-config").arg(&drop_in))
    };
    let ended = containerd();
    let out = done(&ended);
    assert!(out.contains("containerd.toml is written") && out.contains("99-nvidia.toml is written"), "{out}");
    let text = fs::read_to_string(&main).unwrap();
    assert!(text.starts_with("version = 2\n") && text.ends_with("# mine\n"), "{text}");
    assert!(text.contains(&format!("imports = [\"{}/*.toml\"]", conf_d.display())), "{text}");
    let text = fs::read_to_string(&drop_in).unwrap();
    assert!(text.contains("version = 2") && text.contains("BinaryName = \"/r\""), "{text}");
    assert!(done(&containerd()).contains("needs no change"));
    assert!(!Path::new("/etc/containerd/conf.d").exists());
    let hook = etc.0.path().join("hooks.d/x.json");
    let words = [
        "runtime",
        "configure",
        "--config-mode=oci-hook",
        "--nvidia-runtime-hook-path",
        "/h/hook",
        "--oci-hook-path",
    ];
    done(&run(nvidia_ctk(&words).arg(&hook)));
    assert!(fs::read_to_string(&hook).unwrap().contains("\"/h/hook\""));
    for words in [&["no-such-command"][..], &[], &["runtime"], &["runtime", "configure", "--runtime", "lxd"]]
    {
        refused(&run(&mut nvidia_ctk(words)), "GPU-0001", "");
    }
    assert!(done(&run(&mut nvidia_ctk(&["--version"]))).starts_with("nvidia-ctk "));
    assert_eq!(done(&run(&mut nvidia_ctk(&["info"]))), "");
}

#[test]
fn nvidia_ctk_changes_nvidias_configuration_which_holds_where_gpurun_has_none() {
    let etc = Etc::new();
    let file = etc.0.path().join("nvidia-container-runtime/config.toml");
    let with = |command: &mut Command| run(command.env("XDG_CONFIG_HOME", etc.0.path()));
    let set = [
        "config",
        "--in-place",
        "--set",
        "nvidia-container-cli.root=/run/nvidia/driver",
        "--set",
        "disable-require",
    ];
    done(&with(&mut nvidia_ctk(&set)));
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        text.contains("disable-require = true") && text.contains("root = \"/run/nvidia/driver\""),
        "{text}"
    );
    let ended = with(&mut nvidia_ctk(&["config", "-i", "--set", "nvidia-container-runtime.mode=cdi"]));
    assert!(ended.code == 0 && ended.err.contains("no effect"), "{ended:?}");
    let out = done(&with(Command::new(dist("gpurun")).arg("config"))).to_owned();
    for line in [
        format!("driver-root = /run/nvidia/driver    ({}: nvidia-container-cli.root)", file.display()),
        format!("disable-require = true    ({}: disable-require)", file.display()),
        "nonroot = keep    (default)".into(),
        "nvidia-container-runtime.mode: there is one mode for every container".into(),
    ] {
        assert!(out.lines().any(|one| one == line), "{line}\n{out}");
    }
    let typed = with(
        Command::new(dist("gpurun"))
            .args(["config", "--driver-root", "/typed"])
            .env("GPURUN_DEV_ROOT", "/named"),
    );
    assert!(done(&typed).contains("driver-root = /typed    (--driver-root)"), "{typed:?}");
    assert!(typed.out.contains("dev-root = /named    (GPURUN_DEV_ROOT)"), "{typed:?}");
    // A file of gpurun's own takes its place.
    let own = etc.file("own.toml", "shm-size = \"1g\"\n");
    let out = done(&with(Command::new(dist("gpurun")).args(["config", "--config"]).arg(&own))).to_owned();
    assert!(out.contains("disable-require = false") && out.contains("shm-size = 1g"), "{out}");
    fs::write(&file, "[").unwrap();
    refused(
        &with(Command::new(dist("gpurun")).arg("config")),
        "GPU-0002",
        "nvidia-container-runtime/config.toml",
    );
    refused(
        &with(Command::new(dist("gpurun")).args(["config", "--config", "/no/such"])),
        "GPU-0002",
        "/no/such",
    );
    let text = done(&with(&mut nvidia_ctk(&["config", "default"]))).to_owned();
    assert!(text.contains("annotation-prefixes = [\"cdi.k8s.io/\"]"), "{text}");
}

#[test]
fn nvidia_ctk_makes_the_control_nodes_and_their_links() {
    let etc = Etc::new();
    let dir = etc.0.path();
    etc.file("proc/devices", "Character devices:\n195 nvidia\n510 nvidia-uvm\n\nBlock devices:\n");
    fs::create_dir_all(dir.join("dev")).unwrap();
    let with = |words: &[&str]| run(nvidia_ctk(words).env("GPURUN_SIMULATED_HOST", dir));
    let nodes = ["system", "create-device-nodes", "--control-devices"];
    let dry = with(&[&nodes[..], &["--dry-run"]].concat());
    assert_eq!(done(&dry).lines().count(), 4, "{dry:?}");
    assert_eq!(fs::read_dir(dir.join("dev")).unwrap().count(), 0);
    done(&with(&nodes));
    done(&with(&nodes));
    for (name, major, minor) in [
        ("nvidiactl", 195, 255),
        ("nvidia-modeset", 195, 254),
        ("nvidia-uvm", 510, 0),
        ("nvidia-uvm-tools", 510, 1),
    ] {
        let stat = fs::metadata(dir.join("dev").join(name)).unwrap();
        let device = (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
        assert_eq!((device, stat.mode() & 0o7777), ((major, minor), 0o666), "{name}");
    }
    let links = dir.join("char");
    let words = ["system", "create-dev-char-symlinks", "--dev-char-path", links.to_str().unwrap()];
    assert_eq!(done(&with(&[&words[..], &["--dry-run"]].concat())).lines().count(), 4);
    assert!(!links.exists());
    done(&with(&words));
    assert_eq!(fs::read_link(links.join("510:1")).unwrap(), dir.join("dev/nvidia-uvm-tools"));
    assert_eq!(fs::read_dir(&links).unwrap().count(), 4);
}
