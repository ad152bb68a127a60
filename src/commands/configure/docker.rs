//! dockerd's daemon.json ("Daemon configuration file" in Docker's dockerd reference).

use super::{Registration, is_ours};
use crate::{error::Result, formats::json_document::JsonDocument};
use serde_json::json;

const DEFAULT: &[&str] = &["default-runtime"];
const CDI: &[&str] = &["features", "cdi"];

/// Whether the runtime is there.
pub fn has(text: &str, wanted: &Registration) -> Result<bool> {
    let path = JsonDocument::parse(text)?.get(&["runtimes", &wanted.name, "path"]);
    Ok(path.as_ref().and_then(|path| path.as_str()).is_some_and(|path| is_ours(path, wanted)))
}

/// The low-level runtime that dockerd starts by default, by name or path; `None` for its own runc.
pub fn low_level(files: &[&str], wanted: &Registration) -> Option<String> {
    let is_other = |name: &String| *name != wanted.name;
    files.iter().rev().find_map(|text| {
        let document = JsonDocument::parse(text).ok()?;
        let name = document.get(DEFAULT)?.as_str().map(str::to_owned).filter(is_other)?;
        let entry = document.get(&["runtimes", &name])?;
        // A runtime with a type is a shim; the options of runc's shim name the program.
        let path = entry.get("path").or_else(|| entry.get("options")?.get("BinaryName"))?.as_str()?;
        Some(path.to_owned()).filter(|path| !path.is_empty() && !is_ours(path, wanted))
    })
}

/// The file with the runtime.
pub fn add(text: &str, wanted: &Registration) -> Result<String> {
    let mut document = JsonDocument::parse(text)?;
    let entry = ["runtimes", wanted.name.as_str()];
    let is_shim = |key: &str| document.get(&[entry[0], entry[1], key]).is_some_and(|value| !value.is_null());
    if is_shim("runtimeType") || is_shim("options") {
        // dockerd does not start with a runtime that has both a path and the keys of a shim.
        document.set(&entry, &json!({}))?;
    }
    document.set(&["runtimes", &wanted.name, "path"], &json!(wanted.path))?;
    if wanted.default {
        document.set(DEFAULT, &json!(wanted.name))?;
    }
    if wanted.cdi {
        document.set(CDI, &json!(true))?;
    }
    Ok(document.text())
}

/// The file without the runtime.
pub fn remove(text: &str, before: &str, wanted: &Registration) -> Result<String> {
    let mut document = JsonDocument::parse(text)?;
    let earlier = JsonDocument::parse(before)?;
    document.restore(&["runtimes", &wanted.name], &earlier)?;
    // dockerd does not start with a default runtime that it does not know.
    if document.get(DEFAULT).is_some_and(|default| default == wanted.name.as_str()) {
        document.restore(DEFAULT, &earlier)?;
    }
    if wanted.cdi {
        document.restore(CDI, &earlier)?;
    }
    document.text_after(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = r#"{
    "log-driver": "json-file",
    "log-opts": {"max-size": "10m"},
    "features": {
        "containerd-snapshotter": true
    },
    "default-runtime": "crun",
    "runtimes": {
        "crun": { "path": "/usr/bin/crun" }
    }
}
"#;

    #[test]
    fn the_users_own_keys_stay() {
        let wanted = Registration { default: true, cdi: true, ..Registration::of("gpurun") };
        let added = add(USERS, &wanted).unwrap();
        insta::assert_snapshot!(added);
        assert_eq!(add(&added, &wanted).unwrap(), added, "twice is once");
        assert!(has(&added, &wanted).unwrap() && !has(USERS, &wanted).unwrap());
        assert_eq!(remove(&added, USERS, &wanted).unwrap(), USERS);
        let crun = Some("/usr/bin/crun".to_owned());
        assert_eq!(low_level(&[USERS], &wanted), crun);
        assert_eq!(low_level(&[USERS, &added], &wanted), crun, "also with gpurun as the default");
        assert_eq!(low_level(&["{}"], &wanted), None);
    }

    #[test]
    fn a_byte_order_mark_is_read_as_dockerd_reads_it_and_stays() {
        let wanted = Registration::of("gpurun");
        let marked = format!("\u{feff}{USERS}");
        let added = add(&marked, &wanted).unwrap();
        assert!(added.starts_with("\u{feff}{") && has(&added, &wanted).unwrap());
        assert_eq!(add(&added, &wanted).unwrap(), added);
        assert_eq!(remove(&added, &marked, &wanted).unwrap(), marked);
    }

    #[test]
    fn nothing_in_the_place_of_an_object_is_an_object() {
        let wanted = Registration { default: true, cdi: true, ..Registration::of("gpurun") };
        for text in [
            "null",
            "{\"runtimes\": null, \"features\": null}",
            "{\"runtimes\": {\"gpurun\": null}, \"default-runtime\": null}",
        ] {
            let added = add(text, &wanted).unwrap();
            assert!(has(&added, &wanted).unwrap(), "{text}: {added}");
            assert_eq!(add(&added, &wanted).unwrap(), added, "{text}");
            assert_eq!(remove(&added, text, &wanted).unwrap(), text);
        }
    }

    #[test]
    fn a_shim_of_that_name_becomes_a_runtime_with_a_path_alone() {
        let wanted = Registration::of("gpurun");
        let text = "{\"runtimes\": {\"gpurun\": {\"runtimeType\": \"io.containerd.runc.v2\", \"options\": {\"BinaryName\": \"/x\"}}}}\n";
        let added = add(text, &wanted).unwrap();
        assert!(
            has(&added, &wanted).unwrap() && !added.contains("runtimeType") && !added.contains("options"),
            "{added}"
        );
        assert_eq!(add(&added, &wanted).unwrap(), added);
        let removed = remove(&added, text, &wanted).unwrap();
        assert_eq!(removed, text);
    }

    #[test]
    fn what_was_edited_since_stays() {
        let wanted = Registration { default: true, ..Registration::of("gpurun") };
        let added = add(USERS, &wanted).unwrap();
        let edited =
            added.replace("10m", "99m").replace("\"crun\": {", "\"other\": {\"path\": \"/o\"}, \"crun\": {");
        let removed = remove(&edited, USERS, &wanted).unwrap();
        assert!(
            removed.contains("99m") && removed.contains("other") && !removed.contains("gpurun"),
            "{removed}"
        );
        assert!(removed.contains("\"default-runtime\": \"crun\""), "{removed}");
        // A default that was chosen since is the user's.
        let chosen = added.replace("\"default-runtime\": \"gpurun\"", "\"default-runtime\": \"other\"");
        assert!(remove(&chosen, USERS, &wanted).unwrap().contains("\"default-runtime\": \"other\""));
        // Arguments that the user gave the runtime stay when it is configured again.
        let with_arguments =
            added.replace("gpurun-runtime\"", "gpurun-runtime\", \"runtimeArgs\": [\"--debug\"]");
        assert_eq!(add(&with_arguments, &wanted).unwrap(), with_arguments);
    }

    #[test]
    fn a_file_of_our_own_is_nothing_afterwards() {
        let wanted = Registration { default: true, cdi: true, ..Registration::of("gpurun") };
        let added = add("", &wanted).unwrap();
        insta::assert_snapshot!(added);
        assert_eq!(remove(&added, "", &wanted).unwrap(), "");
    }
}
