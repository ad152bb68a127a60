//! CDI documents, as engines read them.

use crate::{SpawnPiped, finish};
use gpurun::formats::cdi::{Document, Hook, Mount};
use serde_json::{Value, json};
use std::{
    fs,
    io::{Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    process::Command,
};

/// What the CDI library of engines does (pkg/cdi/container-edits.go): the edits of each device that is asked for, then those that
/// all share.
pub fn inject(document: &Document, devices: &[&str], spec: &mut Value) {
    let named = |name: &&str| {
        document.devices.iter().find(|device| device.name == **name).unwrap_or_else(|| panic!("{name}"))
    };
    let edits = devices.iter().map(|name| &named(name).container_edits).chain([&document.container_edits]);
    fn list<'a>(value: &'a mut Value, keys: &[&str]) -> &'a mut Vec<Value> {
        let at = keys.iter().fold(value, |here, key| &mut here[*key]);
        if at.is_null() {
            *at = json!([]);
        }
        at.as_array_mut().expect("a list")
    }
    for edit in edits {
        list(spec, &["process", "env"]).extend(edit.env.iter().map(|one| Value::from(one.as_str())));
        for node in &edit.device_nodes {
            let host = node.host_path.as_ref().unwrap_or(&node.path);
            let (mut major, mut minor) = (node.major.unwrap_or(0), node.minor.unwrap_or(0));
            if node.kind.is_none() || major == 0 {
                let stat = fs::symlink_metadata(host).expect("the node is there");
                assert!(stat.file_type().is_char_device(), "{host}");
                (major, minor) = (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
            }
            let mut device = json!({"path": node.path, "type": "c", "major": major, "minor": minor});
            for (key, value) in [("fileMode", node.file_mode), ("uid", node.uid), ("gid", node.gid)] {
                if let Some(value) = value {
                    device[key] = value.into();
                }
            }
            list(spec, &["linux", "devices"]).push(device);
            let access = node.permissions.as_deref().unwrap_or("rwm");
            list(spec, &["linux", "resources", "devices"])
                .push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": access}));
        }
        for Mount { host_path, container_path, kind, options } in &edit.mounts {
            let mounts = list(spec, &["mounts"]);
            mounts.retain(|mount| mount["destination"] != json!(container_path));
            let mut mount = json!({"source": host_path, "destination": container_path, "options": options});
            if let Some(kind) = kind {
                mount["type"] = json!(kind);
            }
            mounts.push(mount);
        }
        list(spec, &["mounts"])
            .sort_by_key(|mount| mount["destination"].as_str().expect("a path").matches('/').count());
        for Hook { hook_name, path, args, env, .. } in &edit.hooks {
            list(spec, &["hooks", hook_name]).push(json!({"path": path, "args": args, "env": env}));
        }
        list(spec, &["process", "user", "additionalGids"])
            .extend(edit.additional_gids.iter().map(|gid| Value::from(*gid)));
    }
}

/// Debian's python3-jsonschema: a line for each document that the schema refuses, its place in the list and why.
const VALIDATOR: &str = "
import json, jsonschema, sys
validator = jsonschema.Draft202012Validator(json.load(open(sys.argv[1])))
for number, document in enumerate(json.load(sys.stdin)):
    for error in list(validator.iter_errors(document))[:1]:
        print(number, error.json_path, error.message.splitlines()[0])
";

/// Which documents the schema of tests/ refuses, and why.
pub fn refused_by_schema(documents: &[Value]) -> Vec<(usize, String)> {
    let mut stdin = tempfile::tempfile().unwrap();
    stdin.write_all(json!(documents).to_string().as_bytes()).unwrap();
    stdin.rewind().unwrap();
    let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/cdi-schema.json");
    let python = Command::new("/usr/bin/python3").args(["-c", VALIDATOR, schema]).stdin(stdin).spawn_piped();
    let ended = finish(python);
    assert_eq!(ended.code, 0, "{ended:?}");
    let line = |line: &str| line.split_once(' ').map(|(number, why)| (number.parse().unwrap(), why.into()));
    ended.out.lines().filter_map(line).collect()
}
