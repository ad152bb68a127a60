//! containerd's config.toml, versions 1 to 4 (containerd-config.toml(5)).
//!
//! gpurun adds no drop-in by itself: before 2.1 containerd replaces the whole table of its CRI plugin with that of a file which is imported
//! later, so that a drop-in must hold a copy of all of it, and hides from then on what is changed in the file that people know.

use super::{Registration, is_ours};
use crate::{
    error::{Code, Error, Result},
    formats::toml_document::{TomlDocument, copy},
};
use toml_edit::{Item, Table, value};

/// The name of the CRI plugin in version 1, 2, and since 3.
const PLUGINS: [&str; 3] = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
/// The shim of runc and of those that take its place.
const RUNC: &str = "io.containerd.runc.v2";

/// What a file imports: paths, with `*` in their names, relative to the file.
pub fn imports(text: &str) -> Result<Vec<String>> {
    let document = TomlDocument::parse(text)?;
    let list = document.get(&["imports"]).and_then(|list| list.as_array());
    Ok(list.into_iter().flatten().filter_map(|path| path.as_str().map(str::to_owned)).collect())
}

/// The main file with another pattern in its `imports`, after those that are there. A main file without a version gets
/// `version`.
pub fn import(text: &str, pattern: &str, version: i64) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    let list = imports(text)?.into_iter().chain([pattern.to_owned()]).collect::<toml_edit::Array>();
    if document.is_empty() {
        document.set(&["version"], value(version))?;
    }
    document.set(&["imports"], value(list))?;
    Ok(document.text())
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

/// The table layout of a file.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// The version for a file without one: that of the file which imports it. `None` for a file that nothing imports.
    pub version: Option<i64>,
    /// Whether the file needs the whole table of the CRI plugin, because it replaces the table of earlier files.
    pub whole_table: bool,
}

/// The version in a file.
pub fn version(text: &str) -> Result<Option<i64>> {
    Ok(TomlDocument::parse(text)?.get(&["version"]).and_then(Item::as_integer))
}

/// The file with the runtime, which is what the default runtime is, but for its program: whether systemd makes its cgroups is
/// said there. `read` are the other files that containerd reads, in that order.
pub fn add(text: &str, read: &[String], layout: Layout, wanted: &Registration) -> Result<String> {
    let mut document = TomlDocument::parse(text)?;
    let version = match (document.get(&["version"]).and_then(Item::as_integer), layout.version) {
        (Some(version @ 2..), _) => version,
        (None, Some(version @ 2..)) => {
            document.set(&["version"], value(version))?;
            version
        }
        (None | Some(1), _) => {
            make_version_2(&mut document)?;
            2
        }
        (Some(version), _) => {
            return Err(Error::new(
                Code::Config,
                format!("there is no version {version} of containerd's configuration"),
            )
            .fix("set version = 2 in the file"));
        }
    };
    let plugin = if version == 2 { PLUGINS[1] } else { PLUGINS[2] };
    let at = |keys: &[&'static str]| -> Vec<&str> { [&["plugins", plugin], keys].concat() };
    let read: Vec<_> = read.iter().map(|text| TomlDocument::parse(text)).collect::<Result<_>>()?;
    if layout.whole_table
        && document.get(&at(&[])).is_none()
        && let Some(table) = read.iter().rev().find_map(|file| file.get(&at(&[])))
    {
        document.set(&at(&[]), copy(table))?;
    }
    let ours = [at(&["containerd", "runtimes"]).as_slice(), &[&wanted.name]].concat();
    if document.get(&ours).is_none() {
        let files = || std::iter::once(&document).chain(read.iter().rev());
        let default = at(&["containerd", "default_runtime_name"]);
        let default = files().find_map(|file| file.text_at(&default)).filter(|name| *name != wanted.name);
        // Another shim, such as Kata's, has no program in its options, and its table says nothing about containers of runc's.
        let is_runc = |table: &&Item| {
            let kind = table.get("runtime_type").and_then(Item::as_str);
            kind.is_none_or(|kind| kind.is_empty() || kind == RUNC)
        };
        let low_level = default.into_iter().chain(["runc", "crun"]).find_map(|name| {
            let path = [at(&["containerd", "runtimes"]).as_slice(), &[name]].concat();
            files().find_map(|file| file.get(&path)).filter(is_runc)
        });
        let has_none = files().all(|file| file.get(&at(&["containerd", "runtimes"])).is_none());
        let table = low_level.map_or_else(|| Item::Table(Table::new()), copy);
        if has_none && layout.version.is_none() {
            // A table of runtimes replaces the one that containerd 1 was built with, which has its default.
            document.set(&at(&["containerd", "runtimes", "runc", "runtime_type"]), value(RUNC))?;
        }
        document.set(&ours, table)?;
    }
    let inside = |keys: &[&'static str]| -> Vec<&str> { [ours.as_slice(), keys].concat() };
    if document.text_at(&inside(&["runtime_type"])) != Some(RUNC) {
        document.set(&inside(&["runtime_type"]), value(RUNC))?;
    }
    document.set(&inside(&["options", "BinaryName"]), value(&wanted.path))?;
    if wanted.default {
        document.set(&at(&["containerd", "default_runtime_name"]), value(&wanted.name))?;
    }
    if wanted.cdi {
        document.set(&at(&["enable_cdi"]), value(true))?;
    }
    Ok(document.text())
}

/// Converts a file of version 1 (or without a version) to version 2. containerd 2 reads version 1, but loses
/// the tables of its CRI plugin; every release since 1.3 reads version 2, which calls plugins by their full names
/// (containerd's v1MigratePluginName) and refuses short ones in `disabled_plugins`.
fn make_version_2(document: &mut TomlDocument) -> Result<()> {
    document.set(&["version"], value(2))?;
    for list in ["disabled_plugins", "required_plugins"] {
        let Some(names) = document.get(&[list]).and_then(Item::as_array) else { continue };
        let names: Vec<String> =
            names.iter().filter_map(|name| name.as_str()).map(full_plugin_name).collect();
        document.set(&[list], value(names.iter().collect::<toml_edit::Array>()))?;
    }
    document.rename_keys(&["plugins"], full_plugin_name)
}

/// The name of a plugin in version 2.
fn full_plugin_name(name: &str) -> String {
    let kind = match name {
        _ if name.contains('.') => return name.to_owned(),
        "cgroups" => "monitor",
        "linux" => "runtime",
        "scheduler" => "gc",
        "bolt" => "metadata",
        "task" => return "io.containerd.runtime.v2.task".into(),
        "opt" | "restart" | "tracing" => "internal",
        "otlp" => "tracing.processor",
        "aufs" | "btrfs" | "devmapper" | "native" | "overlayfs" | "zfs" => "snapshotter",
        _ if name.ends_with("-service") => "service",
        _ => "grpc",
    };
    format!("io.containerd.{kind}.v1.{name}")
}

/// The low-level runtime that containerd starts by default, by name or path; `None` for runc in PATH. The last of `files` to
/// name a default counts.
pub fn low_level(files: &[&str], wanted: &Registration) -> Option<String> {
    let files: Vec<TomlDocument> = files.iter().filter_map(|text| TomlDocument::parse(text).ok()).collect();
    PLUGINS.iter().find_map(|plugin| {
        let at = |keys: &[&str]| {
            let path = [&["plugins", plugin, "containerd"], keys].concat();
            let other = |text: &&str| *text != wanted.name && !is_ours(text, wanted);
            files.iter().rev().find_map(|file| file.text_at(&path).filter(other)).map(str::to_owned)
        };
        let name = at(&["default_runtime_name"]).unwrap_or_else(|| "runc".into());
        // Other types are shims without an OCI command line.
        let is_runc = at(&["runtimes", &name, "runtime_type"]).is_none_or(|kind| kind == RUNC);
        at(&["runtimes", &name, "options", "BinaryName"]).filter(|path| is_runc && !path.is_empty())
    })
}

/// Checks the runtime in `containerd config dump`: `Err` if it is missing, else warnings.
pub fn check(dump: &str, wanted: &Registration) -> std::result::Result<Vec<String>, String> {
    let document = TomlDocument::parse(dump).map_err(|error| error.cause_line())?;
    let mut off = Vec::new();
    let disabled = document.get(&["disabled_plugins"]).and_then(Item::as_array);
    for name in disabled.into_iter().flatten().filter_map(|name| name.as_str()) {
        if PLUGINS.contains(&name) || name == "io.containerd.cri.v1.images" {
            off.push(format!(
                "its CRI plugin is disabled, so that Kubernetes cannot use it: take {name:?} out of disabled_plugins"
            ));
        }
    }
    let plugin = PLUGINS.iter().find(|plugin| {
        let options = ["plugins", plugin, "containerd", "runtimes", &wanted.name, "options", "BinaryName"];
        document.text_at(&options) == Some(&wanted.path)
    });
    let Some(plugin) = plugin else {
        // containerd 1.6 prints no table of a plugin that is disabled.
        let why = format!("it reads no runtime {} with the program {}", wanted.name, wanted.path);
        return if off.is_empty() { Err(why) } else { Ok(off) };
    };
    let default = ["plugins", plugin, "containerd", "default_runtime_name"];
    if wanted.default && document.text_at(&default) != Some(&wanted.name) {
        off.push(format!("another file sets default_runtime_name to {:?}", document.text_at(&default)));
    }
    let cdi = document.get(&["plugins", plugin, "enable_cdi"]).and_then(Item::as_bool);
    if wanted.cdi && cdi != Some(true) {
        off.push("it reads no CDI specs: containerd 1.7 and later do".into());
    }
    Ok(off)
}

/// The file without the runtime.
pub fn remove(text: &str, before: &str, wanted: &Registration) -> Result<String> {
    if !has_name(text, wanted) {
        return TomlDocument::parse(text).map(|_| text.to_owned());
    }
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
    // The file may have been one of version 1 without a version.
    let mut upgraded = TomlDocument::parse(before)?;
    let version = |file: &TomlDocument| file.get(&["version"]).and_then(Item::as_integer);
    match (version(&earlier), version(&document)) {
        (None | Some(1), Some(2)) => make_version_2(&mut upgraded)?,
        (None, Some(new)) => upgraded.set(&["version"], value(new))?,
        _ => {}
    }
    if document.text_after(&upgraded.text()) == upgraded.text() {
        return Ok(before.to_owned());
    }
    Ok(document.text_after(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: fn() -> Registration =
        || Registration { default: true, cdi: true, ..Registration::of("gpurun") };

    const MAIN: Layout = Layout { version: None, whole_table: false };

    fn added(text: &str, read: &[&str]) -> String {
        let version = read.first().and_then(|main| version(main).unwrap());
        let layout = Layout { version, whole_table: false };
        let read: Vec<String> = read.iter().map(ToString::to_string).collect();
        let added = add(text, &read, layout, &WANTED()).unwrap();
        assert_eq!(add(&added, &read, layout, &WANTED()).unwrap(), added, "twice is once");
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
    fn a_file_without_a_version_becomes_one_of_version_2() {
        insta::assert_snapshot!(added(
            "disabled_plugins = [\"restart\", \"cri\"]\nroot = \"/x\" # why\n\n[plugins.cri]\n  # ours\n  enable_selinux = true\n[plugins.opt]\npath = \"/opt\"\n# end\n",
            &[]
        ));
        assert!(added("version = 1\n", &[]).starts_with("version = 2\n"));
    }

    #[test]
    fn the_runtime_is_runcs_shim_whatever_the_default_is() {
        let table = |name: &str, kind: &str| {
            format!(
                "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\nruntime_type = \"{kind}\"\n"
            )
        };
        let default = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"kata\"\n";
        let kata = table("kata", "io.containerd.kata.v2");
        let runc = format!("{}options.SystemdCgroup = true\n", table("runc", RUNC));
        for (text, copied) in [
            (format!("{default}{kata}"), false),
            (format!("{default}{kata}{runc}"), true),
            (format!("{default}{}", table("gpurun", "io.containerd.kata.v2")), false),
        ] {
            let added = added(&text, &[]);
            let document = TomlDocument::parse(&added).unwrap();
            let at = |key: &[&str]| {
                let path = ["plugins", PLUGINS[1], "containerd", "runtimes", "gpurun"];
                document.get(&[path.as_slice(), key].concat()).cloned()
            };
            assert_eq!(at(&["runtime_type"]).unwrap().as_str(), Some(RUNC), "{added}");
            assert_eq!(at(&["options", "SystemdCgroup"]).is_some(), copied, "{added}");
        }
    }

    #[test]
    fn the_low_level_runtime_is_that_of_the_default() {
        let crun = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndefault_runtime_name = 'crun'\n\
                    [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.crun]\nruntime_type = 'io.containerd.runc.v2'\n\
                    options.BinaryName = '/usr/libexec/crun'\n";
        assert_eq!(low_level(&[crun], &WANTED()).as_deref(), Some("/usr/libexec/crun"));
        assert_eq!(low_level(&["", "["], &WANTED()), None);
        assert_eq!(low_level(&[&crun.replace("runc.v2", "kata.v2")], &WANTED()), None);
        assert_eq!(low_level(&[&crun.replace("/usr/libexec/crun", &WANTED().path)], &WANTED()), None);
    }

    #[test]
    fn what_containerd_reads_is_checked() {
        let dump = "version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n[plugins.'io.containerd.cri.v1.runtime']\nenable_cdi = true\n\
                    [plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'runc'\n\
                    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gpurun.options]\nBinaryName = '/usr/local/bin/gpurun-runtime'\n";
        let off = check(dump, &WANTED()).unwrap();
        assert!(off.len() == 2 && off[0].contains("disabled_plugins") && off[1].contains("runc"), "{off:?}");
        let without = dump.replace("gpurun.options", "nvidia.options");
        assert_eq!(check(&without, &WANTED()).unwrap().len(), 1, "a disabled plugin has no tables");
        assert!(check(&without.replace("disabled", "enabled"), &WANTED()).is_err());
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
        assert_eq!(add(&edited, &[], MAIN, &WANTED()).unwrap(), edited);
    }

    #[test]
    fn a_file_without_the_runtime_is_unchanged() {
        assert_eq!(remove("version = 4\n", "", &WANTED()).unwrap(), "version = 4\n");
    }

    #[test]
    fn a_version_that_does_not_exist_is_refused() {
        assert!(add("version = -1\n", &[], MAIN, &WANTED()).is_err());
        assert!(add("version = 2\nplugins = 1\n", &[], MAIN, &WANTED()).is_err());
    }

    #[test]
    fn imports_are_added() {
        let pattern = "/etc/containerd/conf.d/*.toml";
        let new = import("", pattern, 2).unwrap();
        assert_eq!(new, "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n");
        let text = "# main\nversion = 3\nimports = [\"/a.toml\"] # why\n\n[plugins]\n";
        let new = import(text, pattern, 2).unwrap();
        assert_eq!(imports(&new).unwrap(), ["/a.toml", pattern]);
        assert!(new.starts_with("# main\nversion = 3\n"), "{new}");
        assert!(import("[", pattern, 2).is_err());
    }

    #[test]
    fn imports_are_read() {
        assert_eq!(imports("imports = [\"/a/*.toml\", \"b.toml\"]\n").unwrap(), ["/a/*.toml", "b.toml"]);
        assert!(imports("").unwrap().is_empty() && imports("[").is_err());
    }
}
