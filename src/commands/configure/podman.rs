//! A drop-in of containers.conf(5).

use super::{Registration, is_ours};
use crate::{error::Result, formats::toml_document::TomlDocument};
use toml_edit::{Array, value};

const DEFAULT: &[&str] = &["engine", "runtime"];

/// Whether the runtime is there.
pub fn has(text: &str, wanted: &Registration) -> Result<bool> {
    let document = TomlDocument::parse(text)?;
    let paths = document.get(&["engine", "runtimes", &wanted.name]).and_then(|paths| paths.as_array());
    Ok(paths.is_some_and(|paths| {
        paths.iter().any(|path| path.as_str().is_some_and(|path| is_ours(path, wanted)))
    }))
}

/// The low-level runtime that Podman starts by default, by name or path: the one in the last file, else crun if it is
/// installed, because Podman prefers it to runc (containers/common, `findRuntime`).
pub fn low_level(files: &[&str], wanted: &Registration) -> Option<String> {
    let files: Vec<TomlDocument> = files.iter().filter_map(|text| TomlDocument::parse(text).ok()).collect();
    let ours = |name: &&str| *name != wanted.name && !is_ours(name, wanted);
    let installed = || Some("crun").filter(|name| super::low_level::is_in_path(name));
    let name = files.iter().rev().find_map(|file| file.text_at(DEFAULT).filter(ours)).or_else(installed)?;
    let paths = |file: &TomlDocument| {
        let paths = file.get(&["engine", "runtimes", name])?.as_array()?.clone();
        Some(paths.iter().filter_map(|path| path.as_str().map(str::to_owned)).collect::<Vec<_>>())
    };
    let paths = files.iter().rev().find_map(paths).unwrap_or_default();
    let exists = |path: &String| std::path::Path::new(path).exists();
    let path = paths.into_iter().find(exists).unwrap_or_else(|| name.to_owned());
    Some(path).filter(|path| !is_ours(path, wanted))
}

/// The file with the runtime.
pub fn add(text: &str, wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    if wanted.default {
        document.set(DEFAULT, value(&wanted.name))?;
    }
    document
        .set(&["engine", "runtimes", &wanted.name], value([&wanted.path].into_iter().collect::<Array>()))?;
    Ok(document.text())
}

/// The file without the runtime.
pub fn remove(text: &str, before: &str, wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    let earlier = TomlDocument::parse(before)?;
    document.restore(&["engine", "runtimes", &wanted.name], &earlier)?;
    if document.text_at(DEFAULT) == Some(&wanted.name) {
        document.restore(DEFAULT, &earlier)?;
    }
    Ok(document.text_after(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_in_names_the_runtime() {
        let wanted = Registration::of("gpurun");
        insta::assert_snapshot!(add("", &wanted).unwrap());
        let default = Registration { default: true, ..wanted.clone() };
        for before in
            ["", "# ours\n[engine]\nruntime = \"crun\" # why\n[engine.runtimes]\ncrun = [\"/bin/crun\"]\n"]
        {
            let added = add(before, &default).unwrap();
            assert!(has(&added, &wanted).unwrap() && !has(before, &wanted).unwrap());
            assert_eq!(add(&added, &default).unwrap(), added);
            assert_eq!(remove(&added, before, &wanted).unwrap(), before);
        }
    }
}
