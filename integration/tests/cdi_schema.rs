//! What the specification says of documents, as a JSON schema: gpurun's own satisfy it, and what it refuses `cdi validate` refuses.

use gpurun::{
    apply::cdi::{self, NameStrategy, Options},
    error::Code,
    formats::cdi::{Document, to_json},
    inventory::Inventory,
    plan,
    vocabulary::DriverCapability,
};
use gpurun_integration::{TestHost, cdi::refused_by_schema, must, run};
use serde_json::{Value, json};
use std::{fs, path::Path, process::Command};

const HOSTS: [&str; 3] = ["8xh100", "a100-mig", "t4-old"];
const ENGINES: [&str; 11] = [
    "podman@4.1",
    "podman@4.3",
    "podman@4.8",
    "podman@5.1",
    "docker@25",
    "docker@27",
    "containerd@1.7",
    "containerd@2.0",
    "cri-o@1.29",
    "cri-o@1.31",
    "",
];

/// A recorded host; with `closed`, one whose nodes a group alone may open.
fn recorded(name: &str, closed: bool) -> Inventory {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/hosts").join(name).with_extension("json");
    let mut host: Inventory = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    for gpu in host.gpus.iter_mut().filter(|_| closed) {
        (gpu.node.mode, gpu.node.gid) = (0o660, 44);
    }
    host
}

#[test]
fn every_document_for_every_engine_satisfies_the_schema() {
    let mut versions: Vec<String> = Vec::new();
    let mut documents: Vec<Value> = Vec::new();
    let mut add = |text: &str| {
        // As an engine reads it.
        let document = Document::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(document.faults(), [""; 0]);
        versions.push(document.cdi_version.clone());
        documents.push(serde_json::from_str(&to_json(&document)).unwrap());
    };
    for host in HOSTS.iter().flat_map(|name| [recorded(name, false), recorded(name, true)]) {
        let parts = plan::parts(&host, DriverCapability::all() - DriverCapability::COMPAT32).unwrap();
        for engine in ENGINES {
            for names in [&[NameStrategy::Index, NameStrategy::Uuid][..], &[NameStrategy::TypeIndex]] {
                let newest = (!engine.is_empty()).then(|| cdi::newest_for(engine).unwrap());
                let options = Options {
                    vendor: "nvidia.com".into(),
                    class: "gpu".into(),
                    names: names.to_vec(),
                    only: None,
                    all: true,
                    hook: "/usr/bin/gpurun-hook".into(),
                    newest,
                };
                match cdi::document(&parts, &options) {
                    Ok((document, _)) => add(&to_json(&document)),
                    Err(error) => assert_eq!((error.code(), engine), (Code::Cdi, "podman@4.1"), "{error}"),
                }
            }
        }
    }
    let host = TestHost::new("a100-mig");
    for node in [
        "nvidia-fs0",
        "infiniband/uverbs0",
        "nvidia-nvswitch0",
        "gdrdrv",
        "nvidia-caps-imex-channels/channel0",
    ] {
        let path = host.path().join("dev").join(node);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        must(Command::new("mknod").args(["-m", "660"]).arg(path).args(["c", "1", "3"]));
    }
    let modes = ["auto", "management", "gds", "mofed", "nvswitch", "gdrcopy", "imex"];
    for mode in modes {
        for engine in &ENGINES[1..10] {
            add(&must(
                host.gpurun().args(["cdi", "generate", "--hook", "/h", "--mode", mode, "--engine", engine]),
            ));
        }
        let class = ["--class", "a.b"];
        add(&must(host.gpurun().args(["cdi", "generate", "--hook", "/h", "--mode", mode]).args(class)));
    }
    assert_eq!(refused_by_schema(&documents), []);
    for version in ["0.4.0", "0.5.0", "0.6.0", "0.7.0"] {
        assert!(versions.iter().any(|own| own == version), "{version}");
    }
}

/// Every field that the specification has, with nothing that is wrong on this host.
fn whole() -> Value {
    json!({
        "cdiVersion": "1.0.0",
        "kind": "vendor.org/class.part",
        "annotations": {"a": "b"},
        "devices": [
            {"name": "0:1", "annotations": {"a": "b"}, "containerEdits": {
                "deviceNodes": [{
                    "path": "/dev/x", "hostPath": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 438,
                    "permissions": "rwm", "uid": 0, "gid": 1
                }],
                "additionalGids": [44]
            }},
            {"name": "all", "containerEdits": {"env": ["A=b"]}}
        ],
        "containerEdits": {
            "env": ["A=b=c", "B="],
            "deviceNodes": [{"path": "/dev/null"}],
            "mounts": [{"hostPath": "tmpfs", "containerPath": "/a", "type": "tmpfs", "options": ["ro"]}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/sh", "args": ["sh"], "env": ["A=b"], "timeout": 5}],
            "additionalGids": [1],
            "intelRdt": {"closID": "c", "l3CacheSchema": "s", "memBwSchema": "s", "enableCMT": true, "enableMBM": false}
        }
    })
}

/// The least that a document is.
fn least() -> Value {
    json!({"cdiVersion": "0.3.0", "kind": "v/c", "devices": [{"name": "a", "containerEdits": {"env": ["A=b"]}}]})
}

#[test]
fn what_the_schema_refuses_validate_refuses() {
    let (edits, device) = ("/containerEdits", "/devices/0");
    let at = |place: &str, rest: &str| format!("{place}{rest}");
    let absent = Value::Null;
    // Where, and what stands there instead; null: nothing.
    let changes: Vec<(String, Value)> = vec![
        ("/cdiVersion".into(), absent.clone()),
        ("/cdiVersion".into(), json!("0.9.0")),
        ("/cdiVersion".into(), json!("1")),
        ("/cdiVersion".into(), json!(1.0)),
        ("/cdiVersion".into(), json!("0.6.0")),
        ("/kind".into(), absent.clone()),
        ("/kind".into(), json!("gpu")),
        ("/kind".into(), json!("vendor.org/a/b")),
        ("/kind".into(), json!("vendor.org/")),
        ("/kind".into(), json!("0vendor/class")),
        ("/kind".into(), json!(format!("vendor.org/{}", "c".repeat(64)))),
        ("/kind".into(), json!(format!("{}/class", "v".repeat(254)))),
        ("/annotations".into(), json!({"a": 1})),
        ("/annotations".into(), json!(["a"])),
        ("/other".into(), json!(1)),
        ("/devices".into(), absent.clone()),
        ("/devices".into(), json!([])),
        ("/devices".into(), json!({})),
        (at(device, "/name"), absent.clone()),
        (at(device, "/name"), json!("a b")),
        (at(device, "/name"), json!("-a")),
        (at(device, "/name"), json!("")),
        (at(device, "/name"), json!(0)),
        (at(device, "/other"), json!(1)),
        (at(device, "/containerEdits"), absent.clone()),
        (at(device, "/containerEdits"), json!({})),
        (at(device, "/annotations/a"), json!(true)),
        (at(edits, "/other"), json!([])),
        (at(edits, "/env/0"), json!("A")),
        (at(edits, "/env/0"), json!("=b")),
        (at(edits, "/env"), json!("A=b")),
        (at(device, "/containerEdits/deviceNodes/0/path"), absent.clone()),
        (at(device, "/containerEdits/deviceNodes/0/path"), json!("")),
        (at(device, "/containerEdits/deviceNodes/0/hostPath"), json!("")),
        (at(device, "/containerEdits/deviceNodes/0/type"), json!("x")),
        (at(device, "/containerEdits/deviceNodes/0/fileMode"), json!("0666")),
        (at(device, "/containerEdits/deviceNodes/0/permissions"), json!("rx")),
        (at(device, "/containerEdits/deviceNodes/0/uid"), json!(-1)),
        (at(device, "/containerEdits/deviceNodes/0/containerPath"), json!("/dev/x")),
        (at(device, "/containerEdits/additionalGids/0"), json!("video")),
        (at(edits, "/mounts/0/hostPath"), absent.clone()),
        (at(edits, "/mounts/0/containerPath"), json!("")),
        (at(edits, "/mounts/0/options"), json!("ro")),
        (at(edits, "/mounts/0/readonly"), json!(true)),
        (at(edits, "/hooks/0/hookName"), absent.clone()),
        (at(edits, "/hooks/0/hookName"), json!("createcontainer")),
        (at(edits, "/hooks/0/path"), absent),
        (at(edits, "/hooks/0/path"), json!("sh")),
        (at(edits, "/hooks/0/env/0"), json!("A")),
        (at(edits, "/hooks/0/timeout"), json!(0)),
        (at(edits, "/hooks/0/args"), json!("sh")),
        (at(edits, "/intelRdt/closID"), json!(1)),
        (at(edits, "/intelRdt/other"), json!("")),
    ];
    let mut documents: Vec<Value> =
        changes.iter().map(|(place, value)| changed(whole(), place, value)).collect();
    // Each field in a version that does not have it yet.
    for (version, place, value) in [
        ("0.3.0", at(edits, "/mounts"), json!([{"hostPath": "t", "containerPath": "/a", "type": "tmpfs"}])),
        ("0.4.0", at(edits, "/deviceNodes"), json!([{"path": "/dev/x", "hostPath": "/dev/null"}])),
        ("0.4.0", at(device, "/name"), json!("0")),
        ("0.5.0", "/annotations".into(), json!({"a": "b"})),
        ("0.5.0", at(device, "/annotations"), json!({"a": "b"})),
        ("0.5.0", "/kind".into(), json!("v/c.d")),
        ("0.6.0", at(device, "/containerEdits/additionalGids"), json!([1])),
        ("0.6.0", at(edits, "/intelRdt"), json!({"closID": "c"})),
    ] {
        let newer = changed(changed(least(), &place, &value), "/cdiVersion", &json!(version));
        documents.push(newer);
    }
    let bad = documents.len();
    documents.extend([whole(), least()]);

    let by_schema = refused_by_schema(&documents);
    let places: Vec<usize> = by_schema.iter().map(|(number, _)| *number).collect();
    let host = TestHost::new("t4");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vendor.json");
    for (number, document) in documents.iter().enumerate() {
        fs::write(&file, document.to_string()).unwrap();
        let ended = run(host.gpurun().args(["cdi", "validate", "--spec-dir"]).arg(dir.path()));
        let is_bad = number < bad;
        assert_eq!(places.contains(&number), is_bad, "the schema: {document:#}");
        assert_eq!(ended.code, i32::from(is_bad), "{number} {document:#} {ended:?}");
        assert_eq!(ended.out.lines().count(), 1, "one change, one finding: {ended:?}");
    }
}

/// The document with this value at a place.
fn changed(mut document: Value, place: &str, value: &Value) -> Value {
    let (parent, key) = place.rsplit_once('/').unwrap();
    if document.pointer(parent).is_none() {
        document = changed(document, parent, &json!({}));
    }
    match (document.pointer_mut(parent).unwrap(), value) {
        (Value::Object(object), Value::Null) => drop(object.remove(key)),
        (Value::Object(object), value) => drop(object.insert(key.into(), value.clone())),
        (Value::Array(list), value) => list[key.parse::<usize>().unwrap()] = value.clone(),
        (other, _) => panic!("{place}: {other}"),
    }
    document
}
