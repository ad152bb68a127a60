//! containerd's config.toml, versions 1 to 3 and later (containerd-config.toml(5)).
//!
//! No drop-in of ours: before 2.1 containerd replaces the whole table of its CRI plugin with that of a file which is imported
//! later, so that a drop-in must hold a copy of all of it, and hides from then on what is changed in the file that people know.

use super::{Registration, is_ours};
use crate::{
    error::{Code, Error, Result},
    formats::toml_document::{TomlDocument, copy},
};
use toml_edit::{Item, Table, value};

/// The name of the CRI plugin in version 1, 2, and since 3.
const PLUGINS: [&str; 3] = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
/// Understood by containerd 1.3 and all later ones.
const NEW_FILE: i64 = 2;

/// The shim of runc and of those that take its place.
const RUNC: &str = "io.containerd.runc.v2";

/// What a file imports: paths, with `*` in their names, relative to the file.
pub fn imports(text: &str) -> Result<Vec<String>> {
    let document = TomlDocument::parse(text)?;
    let list = document.get(&["imports"]).and_then(|list| list.as_array());
    Ok(list.into_iter().flatten().filter_map(|path| path.as_str().map(str::to_owned)).collect())
}

/// Whether a file has a table of the CRI plugin's.
pub fn has_plugin(text: &str) -> Result<bool> {
    let document = TomlDocument::parse(text)?;
    Ok(PLUGINS.iter().any(|plugin| document.get(&["plugins", plugin]).is_some()))
}

/// Whether the runtime is there.
pub fn has(text: &str, wanted: &Registration) -> Result<bool> {
    let document = TomlDocument::parse(text)?;
    Ok(PLUGINS.iter().any(|plugin| {
        document
            .text_at(&["plugins", plugin, "containerd", "runtimes", &wanted.name, "options", "BinaryName"])
            .is_some_and(|path| is_ours(path, wanted))
    }))
}

/// Whether a runtime of this name is there, wherever its program is. A file that cannot be read has none.
pub fn has_name(text: &str, wanted: &Registration) -> bool {
    TomlDocument::parse(text).is_ok_and(|document| {
        PLUGINS.iter().any(|plugin| {
            document.get(&["plugins", plugin, "containerd", "runtimes", &wanted.name]).is_some()
        })
    })
}

/// The file with the runtime, which is what the default runtime is, but for its program: whether systemd makes its cgroups is
/// said there. `read` are the other files that containerd reads, in that order.
pub fn add(text: &str, read: &[String], wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    let read: Vec<_> = read.iter().map(|text| TomlDocument::parse(text)).collect::<Result<_>>()?;
    let version = |file: &TomlDocument| file.get(&["version"]).and_then(Item::as_integer);
    let version = match version(&document).or_else(|| read.iter().find_map(version)) {
        Some(version) => version,
        None if document.is_empty() => {
            document.set(&["version"], value(NEW_FILE))?;
            NEW_FILE
        }
        None => 1,
    };
    let plugin = match version {
        1 => PLUGINS[0],
        2 => PLUGINS[1],
        3.. => PLUGINS[2],
        _ => {
            return Err(Error::new(
                Code::Config,
                format!("there is no version {version} of containerd's configuration"),
            ));
        }
    };
    let at = |keys: &[&'static str]| -> Vec<&str> { [&["plugins", plugin], keys].concat() };
    let ours = [at(&["containerd", "runtimes"]).as_slice(), &[&wanted.name]].concat();
    if document.get(&ours).is_none() {
        let files = || std::iter::once(&document).chain(read.iter().rev());
        let default = at(&["containerd", "default_runtime_name"]);
        let default = files().find_map(|file| file.text_at(&default)).filter(|name| *name != wanted.name);
        let low_level = default.into_iter().chain(["runc", "crun"]).find_map(|name| {
            files().find_map(|file| file.get(&[at(&["containerd", "runtimes"]).as_slice(), &[name]].concat()))
        });
        let has_none = files().all(|file| file.get(&at(&["containerd", "runtimes"])).is_none());
        let table = low_level.map_or_else(|| Item::Table(Table::new()), copy);
        if has_none {
            // A table of runtimes replaces the one that containerd 1 was built with, which has its default.
            document.set(&at(&["containerd", "runtimes", "runc", "runtime_type"]), value(RUNC))?;
        }
        document.set(&ours, table)?;
    }
    let inside = |keys: &[&'static str]| -> Vec<&str> { [ours.as_slice(), keys].concat() };
    if document.get(&inside(&["runtime_type"])).is_none() {
        document.set(&inside(&["runtime_type"]), value(RUNC))?;
    }
    document.set(&inside(&["options", "BinaryName"]), value(&wanted.path))?;
    if version == 1 {
        // The shim of containerd 1.2 and before calls it so.
        document.set(&inside(&["options", "Runtime"]), value(&wanted.path))?;
    }
    if wanted.default {
        document.set(&at(&["containerd", "default_runtime_name"]), value(&wanted.name))?;
    }
    if wanted.cdi {
        document.set(&at(&["enable_cdi"]), value(true))?;
    }
    Ok(document.text())
}

/// The file without the runtime.
pub fn remove(text: &str, before: &str, wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    let earlier = TomlDocument::parse(before)?;
    for plugin in PLUGINS {
        document.restore(&["plugins", plugin, "containerd", "runtimes", &wanted.name], &earlier)?;
        let runtimes = ["plugins", plugin, "containerd", "runtimes"];
        if document.is_only(&runtimes, "runc")
            && document.is_only(&[runtimes.as_slice(), &["runc"]].concat(), "runtime_type")
        {
            document.restore(&[runtimes.as_slice(), &["runc"]].concat(), &earlier)?;
        }
        let default = ["plugins", plugin, "containerd", "default_runtime_name"];
        if document.text_at(&default) == Some(&wanted.name) {
            document.restore(&default, &earlier)?;
        }
        if wanted.cdi {
            document.restore(&["plugins", plugin, "enable_cdi"], &earlier)?;
        }
    }
    if document.is_only(&[], "version") {
        document.restore(&["version"], &earlier)?;
    }
    Ok(document.text_after(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: fn() -> Registration =
        || Registration { default: true, cdi: true, ..Registration::of("gpurun") };

    fn added(text: &str, read: &[&str]) -> String {
        let read: Vec<String> = read.iter().map(ToString::to_string).collect();
        let added = add(text, &read, &WANTED()).unwrap();
        assert_eq!(add(&added, &read, &WANTED()).unwrap(), added, "twice is once");
        assert!(
            has(&added, &WANTED()).unwrap() && has_name(&added, &WANTED()) && has_plugin(&added).unwrap()
        );
        assert_eq!(remove(&added, text, &WANTED()).unwrap(), text, "and nothing afterwards");
        added
    }

    #[test]
    fn a_new_file() {
        insta::assert_snapshot!(added("", &[]));
    }

    #[test]
    fn version_1_is_what_names_no_version() {
        insta::assert_snapshot!(added("disabled_plugins = [\"restart\"]\n# end\n", &[]));
    }

    #[test]
    fn version_2_as_containerd_prints_it() {
        let text = "version = 2\n\n[plugins]\n\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    enable_cdi = false\n    sandbox_image = \"pause:3.9\" # ours\n\n    \
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n      default_runtime_name = \"runc\"\n\n      \
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes]\n\n        # the usual one\n        \
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n          runtime_type = \"io.containerd.runc.v2\"\n\n          \
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n            BinaryName = \"\"\n            # cgroups\n            SystemdCgroup = true\n\n  \
                    [plugins.\"io.containerd.internal.v1.opt\"]\n    path = \"/opt/containerd\"\n";
        insta::assert_snapshot!(added(text, &[]));
    }

    #[test]
    fn version_3_in_a_drop_in_that_names_no_version_beside_a_main_file_that_says_how_runc_is() {
        let main = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
                    options.SystemdCgroup = true\n";
        insta::assert_snapshot!(added(
            "[plugins.'io.containerd.cri.v1.runtime']\nmax_container_log_line_size = 1\n",
            &[main]
        ));
    }

    #[test]
    fn what_the_user_added_to_our_runtime_stays() {
        let edited = added("version = 2\n", &[]).replace("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.gpurun.options]", "pod_annotations = [\"x\"]\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.gpurun.options]");
        assert!(edited.contains("pod_annotations"));
        assert_eq!(add(&edited, &[], &WANTED()).unwrap(), edited);
    }

    #[test]
    fn a_version_that_does_not_exist_is_refused() {
        assert!(add("version = -1\n", &[], &WANTED()).is_err());
        assert!(add("version = 2\nplugins = 1\n", &[], &WANTED()).is_err());
    }

    #[test]
    fn imports_are_read() {
        assert_eq!(imports("imports = [\"/a/*.toml\", \"b.toml\"]\n").unwrap(), ["/a/*.toml", "b.toml"]);
        assert!(imports("").unwrap().is_empty() && imports("[").is_err());
    }
}
