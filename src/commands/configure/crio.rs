//! A drop-in of crio.conf(5).

use super::{Registration, is_ours};
use crate::{
    error::Result,
    formats::toml_document::{TomlDocument, copy},
};
use toml_edit::{Item, value};

const RUNTIMES: [&str; 3] = ["crio", "runtime", "runtimes"];
const DEFAULT: &[&str] = &["crio", "runtime", "default_runtime"];

/// Whether the runtime is there.
pub fn has(text: &str, wanted: &Registration) -> Result<bool> {
    let document = TomlDocument::parse(text)?;
    Ok(document.text_at(&at(wanted, "runtime_path")).is_some_and(|path| is_ours(path, wanted)))
}

/// The low-level runtime that CRI-O starts by default, by name or path; `None` if no file names one. The last file that names
/// one takes precedence.
pub fn low_level(files: &[&str], wanted: &Registration) -> Option<String> {
    let files: Vec<TomlDocument> = files.iter().filter_map(|text| TomlDocument::parse(text).ok()).collect();
    let last = |path: &[&str]| {
        let ours = |text: &&str| *text != wanted.name && !is_ours(text, wanted);
        files.iter().rev().find_map(|file| file.text_at(path).filter(ours)).map(str::to_owned)
    };
    let path = |name: &str| {
        let entry = |key| last(&[RUNTIMES.as_slice(), &[name, key]].concat());
        let is_vm = entry("runtime_type").is_some_and(|kind| kind == "vm");
        entry("runtime_path").filter(|path| !path.is_empty() && !is_vm)
    };
    match last(DEFAULT) {
        // Without a path CRI-O looks up the name in PATH.
        Some(name) => Some(path(&name).unwrap_or(name)),
        None => path("crun").or_else(|| path("runc")),
    }
}

/// The file with the runtime, which is what the default runtime is in the files that CRI-O reads, but for its path: where conmon
/// is and which annotations are allowed is said there.
pub fn add(text: &str, read: &[String], wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    if !has(text, wanted)? {
        let read: Vec<_> = read.iter().map(|text| TomlDocument::parse(text)).collect::<Result<_>>()?;
        let default =
            read.iter().rev().find_map(|file| file.text_at(DEFAULT)).filter(|name| *name != wanted.name);
        let low_level = default.into_iter().chain(["crun", "runc"]).find_map(|name| {
            let table = read.iter().rev().find_map(|file| file.get(&[RUNTIMES.as_slice(), &[name]].concat()));
            // A runtime of type vm is a shim; its keys are not those of an OCI runtime.
            table.filter(|table| table.get("runtime_type").and_then(Item::as_str) != Some("vm"))
        });
        if let Some(low_level) = low_level {
            document.set(&[RUNTIMES.as_slice(), &[&wanted.name]].concat(), copy(low_level))?;
        }
    }
    document.set(&at(wanted, "runtime_path"), value(&wanted.path))?;
    document.set(&at(wanted, "runtime_type"), value("oci"))?;
    if wanted.default {
        document.set(DEFAULT, value(&wanted.name))?;
    }
    Ok(document.text())
}

/// The file without the runtime.
pub fn remove(text: &str, before: &str, wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    let earlier = TomlDocument::parse(before)?;
    document.restore(&[RUNTIMES.as_slice(), &[&wanted.name]].concat(), &earlier)?;
    if document.text_at(DEFAULT) == Some(&wanted.name) {
        document.restore(DEFAULT, &earlier)?;
    }
    Ok(document.text_after(before))
}

fn at<'a>(wanted: &'a Registration, key: &'a str) -> [&'a str; 5] {
    [RUNTIMES[0], RUNTIMES[1], RUNTIMES[2], &wanted.name, key]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_is_what_the_default_one_is_but_for_its_path() {
        let wanted = Registration { default: true, ..Registration::of("gpurun") };
        let main = "[crio.runtime]\ndefault_runtime = \"runc\"\n[crio.runtime.runtimes.runc]\nruntime_path = \"/r\"\n";
        let packaged = "[crio.runtime]\ndefault_runtime = \"crun\"\n\n[crio.runtime.runtimes.crun]\n# where\n\
                        runtime_path = \"/usr/libexec/crio/crun\"\nruntime_root = \"/run/crun\"\nmonitor_path = \"/usr/libexec/crio/conmon\"\n\
                        allowed_annotations = [\n    \"io.containers.trace-syscall\",\n]\n";
        let added = add("", &[main.into(), packaged.into()], &wanted).unwrap();
        insta::assert_snapshot!(added);
        assert_eq!(add(&added, &[main.into(), packaged.into()], &wanted).unwrap(), added, "twice is once");
        assert_eq!(add(&added, &[], &wanted).unwrap(), added, "and what was copied stays");
        assert_eq!(remove(&added, "", &wanted).unwrap(), "");
        let vm = "[crio.runtime]\ndefault_runtime = \"kata\"\n[crio.runtime.runtimes.kata]\nruntime_path = \"/k\"\nruntime_type = \"vm\"\n\
                  runtime_config_path = \"/c\"\n";
        let beside_vm = add("", &[packaged.into(), vm.into()], &wanted).unwrap();
        assert!(
            beside_vm.contains("monitor_path") && !beside_vm.contains("runtime_config_path"),
            "{beside_vm}"
        );
        let crun = Some("/usr/libexec/crio/crun".to_owned());
        assert_eq!(low_level(&[main, packaged], &wanted), crun);
        assert_eq!(low_level(&[main, packaged, &added], &wanted), crun, "also with gpurun as the default");
        assert_eq!(low_level(&[packaged, main], &wanted), Some("/r".into()));
        assert_eq!(
            low_level(&["[crio.runtime]\ndefault_runtime = \"crun\"\n"], &wanted),
            Some("crun".into())
        );
        assert_eq!(low_level(&[""], &wanted), None);
        insta::assert_snapshot!("alone", add("", &[], &Registration::of("gpurun")).unwrap());
    }
}
