//! Compares the command line of gpurun-runtime with the real runc and crun: gpurun must recognise the containers that they
//! create, and leave usage errors to them.

use gpurun::commands::runtime::args::{Dialect, NewContainer, RuntimeArgs};
use gpurun_integration::{
    Ended, TestHost,
    bundle::{Bundle, Hierarchies},
    cached, description, dist, image, run, unique,
};
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

const DIALECTS: [Dialect; 2] = [Dialect::Go, Dialect::Argp];

fn program(dialect: Dialect) -> PathBuf {
    match dialect {
        Dialect::Go => "/usr/sbin/runc".into(),
        Dialect::Argp => cached("crun/usr/bin/crun"),
    }
}

/// Two bundles, `a` and `b`; the directory is `a` itself, which has a second configuration. Each container prints its name.
struct Bundles {
    bundle: Bundle,
    state: tempfile::TempDir,
}

impl Bundles {
    fn new() -> Self {
        let bundle = Bundle::empty();
        let bundles = Self { bundle, state: tempfile::tempdir().unwrap() };
        let mut spec = bundles.bundle.configure(&[], &["/bin/echo", "a"]);
        spec["root"] = json!({"path": image("busybox", "root"), "readonly": true});
        let with = |name: &str| {
            let mut spec = spec.clone();
            spec["process"]["args"] = json!(["/bin/echo", name]);
            spec.to_string()
        };
        fs::write(bundles.dir().join("config.json"), with("a")).unwrap();
        fs::create_dir_all(bundles.dir().join("b")).unwrap();
        fs::write(bundles.dir().join("b/config.json"), with("b")).unwrap();
        fs::write(bundles.dir().join("c.json"), with("c")).unwrap();
        bundles
    }

    fn dir(&self) -> &Path {
        self.bundle.dir.path()
    }

    /// The words of a line: `B` is the path of bundle `b`, `C` the other configuration, `ID` a new name.
    fn words(&self, line: &str, root: &str) -> Vec<OsString> {
        let root = format!("--root={}", self.state.path().join(root).display());
        let words = line.split_whitespace().map(|word| {
            let (b, c) = (self.dir().join("b"), self.dir().join("c.json"));
            word.replace("{B}", &b.display().to_string())
                .replace("{C}", &c.display().to_string())
                .replace("{ID}", &unique())
        });
        [root].into_iter().chain(words).map(OsString::from).collect()
    }

    fn run(&self, program: &Path, words: &[OsString]) -> Ended {
        run(Hierarchies::Legacy
            .command(program)
            .args(words)
            .current_dir(self.dir())
            .env("GPURUN_CONFIG", self.state.path().join("config.toml"))
            .env("GPURUN_STATE_DIR", self.state.path().join("gpurun")))
    }

    /// The container that gpurun sees in the words.
    fn seen(&self, words: &[OsString], dialect: Dialect) -> Option<&'static str> {
        let NewContainer { bundle, config, .. } = RuntimeArgs::scan(words).new_container(words, dialect)?;
        let file = config.filter(|config| config != Path::new("config.json"));
        let file =
            file.map_or_else(|| self.dir().join(bundle).join("config.json"), |file| self.dir().join(file));
        let spec: Value = serde_json::from_slice(&fs::read(file).ok()?).unwrap();
        ["a", "b", "c"].into_iter().find(|name| spec["process"]["args"][1] == *name)
    }
}

/// Spellings of one option: apart, attached, with an equals sign, abbreviated.
fn spellings(long: &str, short: &str, value: &str) -> Vec<String> {
    let mut all = vec![
        format!("--{long} {value}"),
        format!("--{long}={value}"),
        format!("-{long} {value}"),
        format!("-{long}={value}"),
    ];
    all.push(format!("--{} {value}", &long[..long.len() - 1]));
    if !short.is_empty() {
        all.extend(["", " ", "="].map(|between| format!("-{short}{between}{value}")));
    }
    all
}

fn lines() -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let bundles = spellings("bundle", "b", "{B}");
    for option in &bundles {
        lines.push(format!("run {option} {{ID}}"));
        lines.push(format!("run {{ID}} {option}"));
        lines.push(format!("run {option} -- {{ID}}"));
        lines.push(format!("run --no-pivot {option} {{ID}}"));
    }
    for option in spellings("config", "f", "{C}").iter().chain(&spellings("config", "f", "c.json")) {
        lines.push(format!("run {option} {{ID}}"));
        lines.push(format!("run {option} --bundle . {{ID}}"));
    }
    lines.extend(
        spellings("config", "f", "config.json").iter().map(|option| format!("run {option} -b {{B}} {{ID}}")),
    );
    for line in [
        "run {ID}",
        "run -- {ID}",
        "-- run {ID}",
        "--debug -- run {ID}",
        "--log /dev/null run {ID}",
        "--log=/dev/null --log-format json run -b {B} {ID}",
        "--rootless false run {ID}",
        "--rootless=false run -b {B} {ID}",
        // Both runtimes rename a new file onto the path, so it must not name a device.
        "run --pid-file {B}.pid -b {B} {ID}",
        "run --pid-file={B}.pid {ID} -b {B}",
        "run --preserve-fds 0 -b {B} {ID}",
        "run --no-new-keyring --no-subreaper --bundle {B} {ID}",
        "run --bundle {B} --bundle . {ID}",
        "run --bundle . -b {B} {ID}",
        "run {ID} --bundle {B} --no-pivot",
        "run --no-pivot {ID} --bundle {B}",
    ] {
        lines.push(line.into());
    }
    lines
}

#[test]
fn gpurun_sees_the_container_that_runc_and_crun_create() {
    for dialect in DIALECTS {
        let bundles = Bundles::new();
        let mut created = 0;
        for line in lines() {
            let words = bundles.words(&line, "direct");
            let ended = bundles.run(&program(dialect), &words);
            if ended.code == 0 && ["a", "b", "c"].contains(&ended.out.trim()) {
                created += 1;
                assert_eq!(
                    bundles.seen(&words, dialect),
                    Some(ended.out.trim()),
                    "{dialect:?} {line}: {ended:?}"
                );
            }
        }
        // A test without containers would say nothing.
        assert!(created > 15, "{dialect:?}: {created}");
    }
}

#[test]
fn questions_and_mistakes_are_answered_by_the_low_level_runtime() {
    let host = TestHost::new("t4");
    for dialect in DIALECTS {
        let bundles = Bundles::new();
        let runtime = bundles.dir().join("gpurun-runtime");
        symlink(dist("gpurun"), &runtime).unwrap();
        fs::write(bundles.state.path().join("config.toml"), format!("runtimes = [{:?}]\n", program(dialect)))
            .unwrap();
        // A configuration that gpurun would refuse if it read it.
        let mut spec: Value =
            serde_json::from_slice(&fs::read(bundles.dir().join("config.json")).unwrap()).unwrap();
        spec["process"]["env"] = json!(["NVIDIA_VISIBLE_DEVICES=99"]);
        fs::write(bundles.dir().join("config.json"), spec.to_string()).unwrap();
        for line in [
            "create --help",
            "create -h",
            "run -h",
            "run --help x",
            "run x --help",
            "--help create x",
            "--version create x",
            "-v create x",
            "create",
            "run --bundle {B}",
            "create --bundle",
            "run x y",
            "create --no-such-option",
            "run -b /no/such/dir --no-such-option x",
            "create --no-such-option=1 -b /no/such/dir x",
            "no-such-command",
            "",
        ] {
            let direct = bundles.run(&program(dialect), &bundles.words(line, "direct"));
            let through = run(Hierarchies::Legacy
                .command(&runtime)
                .args(bundles.words(line, "direct"))
                .current_dir(bundles.dir())
                .env("GPURUN_SIMULATED_HOST", host.path())
                .env("GPURUN_CONFIG", bundles.state.path().join("config.toml"))
                .env("GPURUN_STATE_DIR", bundles.state.path().join("gpurun")));
            // The runtimes' own errors have the time in them.
            assert_eq!(
                (through.code, &through.out),
                (direct.code, &direct.out),
                "{dialect:?} {line}: {through:?}"
            );
            assert!(!through.err.contains("GPU-"), "{dialect:?} {line}: {through:?}");
        }
    }
}

#[test]
fn a_request_in_cruns_configuration_file_is_honoured() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundles = Bundles::new();
    let runtime = bundles.dir().join("gpurun-runtime");
    symlink(dist("gpurun"), &runtime).unwrap();
    let crun = program(Dialect::Argp);
    fs::write(bundles.state.path().join("config.toml"), format!("runtimes = [{crun:?}]\n")).unwrap();
    let asks = |devices: &str| {
        let mut spec: Value =
            serde_json::from_slice(&fs::read(bundles.dir().join("b/config.json")).unwrap()).unwrap();
        spec["process"]["env"] = json!([format!("NVIDIA_VISIBLE_DEVICES={devices}"), "PATH=/bin"]);
        spec["process"]["args"] = json!(["sh", "-c", "ls /dev"]);
        spec.to_string()
    };
    let through = |line: &str| {
        run(Hierarchies::Legacy
            .command(&runtime)
            .args(bundles.words(line, "through"))
            .current_dir(bundles.dir())
            .env("GPURUN_SIMULATED_HOST", host.path())
            .env("GPURUN_CONFIG", bundles.state.path().join("config.toml"))
            .env("GPURUN_STATE_DIR", bundles.state.path().join("gpurun")))
    };
    // The root of the cached image is shared, so this bundle has its own copy.
    let root = bundles.dir().join("rootfs");
    let copied = run(Command::new("cp").arg("-a").arg(image("busybox", "root").join(".")).arg(&root));
    assert_eq!(copied.code, 0, "{copied:?}");
    let node = format!("nvidia{}", description("8xh100").gpus[2].minor);
    for line in
        ["run -f {C} {ID}", "run -fc.json {ID}", "run --config=c.json {ID}", "run -b . --config {C} {ID}"]
    {
        let mut spec: Value = serde_json::from_str(&asks("2")).unwrap();
        spec["root"] = json!({"path": "rootfs"});
        fs::write(bundles.dir().join("c.json"), spec.to_string()).unwrap();
        let ended = through(line);
        assert!(ended.code == 0 && ended.out.lines().any(|name| name == node), "{line}: {ended:?}");
        spec["process"]["env"][0] = json!("NVIDIA_VISIBLE_DEVICES=99");
        fs::write(bundles.dir().join("c.json"), spec.to_string()).unwrap();
        let ended = through(line);
        assert!(ended.code == 1 && ended.err.contains("error[GPU-0021]"), "{line}: {ended:?}");
    }
}
