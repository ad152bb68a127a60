//! Compares gpurun with the answers of the real Docker, recorded by `integration/docker-answers/record`.

use gpurun_integration::{Caller, Ended, TestHost, cached, must, pack, project, rootfs, run, temporary};
use serde_json::{Value, json};
use std::{
    cell::RefCell,
    collections::HashMap,
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
};
use tempfile::TempDir;

fn answers(subject: &str) -> Value {
    let path = project().join("integration/docker-answers").join(subject).with_extension("json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Decodes bytes that the table writes as Latin-1.
fn bytes(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
}

/// The root of the recorder's images.
fn root(files: &Value) -> TempDir {
    let dir = temporary();
    let path = |name: &str| dir.path().join(name);
    for name in ["bin", "etc", "other", "root", "srv/app", "tmp"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    fs::set_permissions(path("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy(cached("images/busybox/root/bin/busybox"), path("bin/busybox")).unwrap();
    for name in [
        "sh", "cat", "cut", "grep", "hostname", "touch", "ls", "stat", "tr", "true", "sed", "sort", "env",
        "mkdir",
    ] {
        symlink("busybox", path("bin").join(name)).unwrap();
    }
    for (name, what) in files.as_object().unwrap() {
        if let Some(text) = what.as_str() {
            fs::write(path(name), bytes(text)).unwrap();
        } else if let Some(target) = what["link"].as_str() {
            symlink(target, path(name)).unwrap();
        } else if what["directory"].is_boolean() {
            fs::create_dir_all(path(name)).unwrap();
            let id = |n: usize| what["owner"][n].as_u64().map(|id| u32::try_from(id).unwrap());
            chown(path(name), id(0), id(1)).unwrap();
            let mode = u32::try_from(what["mode"].as_u64().unwrap_or(0o755)).unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
    }
    dir
}

/// The root as an image with these fields in its configuration.
fn image(files: &Value, config: &Value) -> (TempDir, String) {
    let packed = pack(root(files).path(), &["--config", &config.to_string()]);
    let reference = format!("oci:{}:zstd", packed.path().join("packed/oci").display());
    (packed, reference)
}

/// Compares each case with Docker's answer, or with `ours` for an intended difference.
fn compare(subject: &str, table: &Value, answer: impl Fn(&Value) -> Ended, parsed: impl Fn(&str) -> Value) {
    let mut wrong = Vec::new();
    for entry in table["cases"].as_array().unwrap() {
        let expected = if entry["ours"].is_null() { &entry["docker"] } else { &entry["ours"] };
        assert_eq!(entry["ours"].is_null(), entry["why"].is_null(), "a difference has a reason: {entry}");
        let ended = answer(&entry["case"]);
        let is_as_expected = match expected["refused"].as_str() {
            Some(_) => {
                ended.code == 125 && ended.err.starts_with("error[GPU-") && ended.err.contains("\n  fix: ")
            }
            None => ended.code == 0 && parsed(&ended.out) == *expected,
        };
        if !is_as_expected {
            wrong.push(format!("{}\n  expected {expected}\n  is {ended:?}", entry["case"]));
        }
    }
    assert!(wrong.is_empty(), "{subject}: {} differ\n{}", wrong.len(), wrong.join("\n"));
}

fn words(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().map(|word| word.as_str().unwrap()).collect()
}

/// An image for each pair of files and configuration, made once.
#[derive(Default)]
struct Images(HashMap<String, (TempDir, String)>);

impl Images {
    fn get(&mut self, files: &Value, config: &Value) -> String {
        let made = self.0.entry(format!("{files}{config}")).or_insert_with(|| image(files, config));
        made.1.clone()
    }
}

#[test]
fn processes_have_the_ids_that_docker_gives_them() {
    let (host, mut table) = (TestHost::new("t4"), answers("users"));
    // A unit test compares the resolution of names. This test runs the processes of every tenth case.
    let cases = table["cases"].as_array().unwrap().iter().step_by(10).cloned().collect();
    table["cases"] = Value::Array(cases);
    let answer = |case: &Value| {
        let text = |kind: &str| {
            let name = case[kind].as_str().unwrap();
            let fill = table["fill"][name].as_u64().unwrap_or(70_000);
            let what = &table[kind][name];
            what.as_str().map_or(what.clone(), |text| {
                text.replace('%', &"x".repeat(usize::try_from(fill).unwrap())).into()
            })
        };
        let files = json!({"etc/passwd": text("passwd"), "etc/group": text("group"), "other/passwd": table["linked passwd"]});
        let dir = root(&files);
        let reference = format!("rootfs:{}", dir.path().display());
        let script = "grep -E '^(Uid|Gid|Groups):' /proc/self/status";
        let mut command = host.gpurun();
        command.arg("run");
        // An unpacked root has no USER.
        command.arg(format!("--user={}", case["user"].as_str().unwrap()));
        for group in words(&case["group-add"]) {
            command.arg(format!("--group-add={group}"));
        }
        run(command.args([&reference, "sh", "-c", script]))
    };
    let parsed = |out: &str| {
        let numbers = |name: &str| {
            let line = out.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().map(|word| word.parse().unwrap()).collect::<Vec<u32>>()
        };
        json!({"uid": numbers("Uid:")[0], "gid": numbers("Gid:")[0], "groups": numbers("Groups:")})
    };
    compare("users", &table, answer, parsed);
}

#[test]
fn home_exists_and_is_writable_in_all_cases() {
    let (host, table) = (TestHost::new("t4"), answers("homes"));
    let images = RefCell::new(Images::default());
    let answer = |case: &Value| {
        let files = json!({
            "etc/passwd": if case["passwd"] == true { table["passwd"].clone() } else { Value::Null },
            "srv/own": {"directory": true, "owner": [1006, 1006]},
            "home": {"directory": true},
            "home/user": {"directory": true, "owner": [1011, 1011], "mode": 0o700},
        });
        let path = "PATH=/bin".to_owned();
        let env: Vec<String> =
            case["image"].as_str().map(|home| format!("HOME={home}")).into_iter().chain([path]).collect();
        let reference = images.borrow_mut().get(&files, &json!({ "Env": env }));
        let mut command = host.gpurun();
        command.args(["run", "-u", case["user"].as_str().unwrap()]).env("HOME", "/root");
        if let Some(typed) = case["typed"].as_str() {
            command.args(["-e", typed]);
        }
        let script = "echo \"$HOME\"; [ -d \"$HOME\" ] && echo exists; touch \"$HOME/.x\" 2>/dev/null && echo writable; true";
        run(command.args([&reference, "sh", "-c", script]))
    };
    let parsed = |out: &str| {
        let mut lines = out.lines();
        let home = lines.next().unwrap();
        let words: Vec<&str> = lines.collect();
        json!({"home": home, "exists": words.contains(&"exists"), "writable": words.contains(&"writable")})
    };
    compare("homes", &table, answer, parsed);
}

#[test]
fn volumes_of_users_and_images_are_dockers() {
    let (host, table) = (TestHost::new("t4"), answers("volumes"));
    let images = RefCell::new(Images::default());
    let shared = temporary();
    let dir = shared.path();
    fs::write(dir.join("file"), "host\n").unwrap();
    fs::create_dir(dir.join("directory")).unwrap();
    fs::write(dir.join("directory/inside"), "host\n").unwrap();
    must(std::process::Command::new("mkfifo").arg(dir.join("fifo")));
    symlink("file", dir.join("link")).unwrap();
    symlink("nowhere", dir.join("dangling")).unwrap();
    let answer = |case: &Value| {
        let volumes: serde_json::Map<_, _> =
            words(&case["VOLUME"]).into_iter().map(|path| (path.to_owned(), json!({}))).collect();
        let reference =
            images.borrow_mut().get(&table["image"], &json!({"Volumes": volumes, "Env": ["PATH=/bin"]}));
        let mut command = host.gpurun();
        command.arg("run");
        for option in words(&case["options"]) {
            command.arg(option.replace("DIR", &dir.display().to_string()));
        }
        run(command.args([&reference, "sh", "-c", case["script"].as_str().unwrap()]))
    };
    let parsed = |out: &str| json!({"out": out.replace(&dir.display().to_string(), "DIR")});
    compare("volumes", &table, answer, parsed);
    assert!(host.scratch(Caller::Root).is_empty(), "what was written into volumes is removed");
}

#[test]
fn files_of_variables_are_dockers() {
    let (host, mut table) = (TestHost::new("t4"), answers("env-files"));
    // The texts are compared by a unit test.
    let files = table["files"].clone();
    let cases = table["cases"].as_array().unwrap().iter();
    let cases = cases.filter(|entry| {
        files[entry["case"]["file"].as_str().unwrap()].is_null() || !entry["case"]["options"].is_null()
    });
    table["cases"] = cases.cloned().collect();
    let dir = temporary();
    let image = rootfs("busybox");
    let answer = |case: &Value| {
        let name = case["file"].as_str().unwrap();
        let path = if name == "/dev/null" { name.into() } else { dir.path().join(name) };
        match name {
            "directory" => fs::create_dir(&path).unwrap(),
            "missing" | "/dev/null" => {}
            _ => fs::write(&path, bytes(files[name].as_str().unwrap())).unwrap(),
        }
        let mut command = host.gpurun();
        command.arg("run").arg("--env-file").arg(path).args(words(&case["options"]));
        run(command.args([&image, "env"]))
    };
    let parsed = |out: &str| {
        let mut lines: Vec<&str> = out.lines().collect();
        lines.retain(|line| !["PATH=", "HOSTNAME=", "HOME="].iter().any(|own| line.starts_with(own)));
        lines.sort_unstable();
        json!({ "env": lines })
    };
    compare("env-files", &table, answer, parsed);
}

#[test]
fn options_have_dockers_grammar() {
    let (host, table) = (TestHost::new("t4"), answers("options"));
    let images = RefCell::new(Images::default());
    let config = json!({"Env": ["OF_IMAGE=image", "PATH=/bin"]});
    let answer = |case: &Value| {
        let reference = images.borrow_mut().get(&json!({}), &config);
        let mut command = host.gpurun();
        command.args(["run", "--network", "none"]).args(words(&case["options"])).env("INHERITED", "yes");
        run(command.args([&reference, "sh", "-c", case["script"].as_str().unwrap()]))
    };
    compare("options", &table, answer, |out| json!({ "out": out }));
}
