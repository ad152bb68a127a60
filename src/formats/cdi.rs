//! A CDI document (Container Device Interface, SPEC.md): what it says that gpurun writes or checks. An unknown
//! field is an error, as it is to engines.

use super::yaml;
use crate::error::{Code, OrFail, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where engines look, those that come later before those that come earlier (SPEC.md, "CDI Spec directories").
pub const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// One document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    /// The version of the specification that a reader needs.
    pub cdi_version: String,
    /// `vendor/class`
    pub kind: String,
    /// For people and programs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// What can be asked for.
    pub devices: Vec<Device>,
    /// What every container gets that asks for any of them.
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// What stands behind `vendor/class=`.
    pub name: String,
    /// For people and programs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// What a container gets that asks for it.
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// Edits of an OCI configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ContainerEdits {
    /// `NAME=value`
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Device nodes, each allowed in the cgroup, too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub device_nodes: Vec<DeviceNode>,
    /// Mounts; engines sort them by depth.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Programs of the host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<Hook>,
    /// Groups of the container's user, from 0.7.0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub additional_gids: Vec<u32>,
    /// Cache and memory bandwidth, from 0.7.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intel_rdt: Option<IntelRdt>,
    /// Network interfaces of the host's that move into the container, from 1.1.0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net_devices: Vec<NetDevice>,
}

/// Classes of Intel's resource director: of other vendors' documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IntelRdt {
    /// The class' name.
    #[serde(rename = "closID", skip_serializing_if = "String::is_empty")]
    pub clos_id: String,
    /// What it has of the cache.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub l3_cache_schema: String,
    /// What it has of the memory's bandwidth.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mem_bw_schema: String,
    /// Up to 1.0.0.
    #[serde(rename = "enableCMT", skip_serializing_if = "Option::is_none")]
    pub enable_cmt: Option<bool>,
    /// Up to 1.0.0.
    #[serde(rename = "enableMBM", skip_serializing_if = "Option::is_none")]
    pub enable_mbm: Option<bool>,
    /// From 1.1.0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub schemata: Vec<String>,
    /// From 1.1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_monitoring: Option<bool>,
}

/// A network interface: of other vendors' documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetDevice {
    /// What it is called on the host.
    pub host_interface_name: String,
    /// What it is called in the container.
    pub name: String,
}

/// A device node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DeviceNode {
    /// In the container.
    pub path: String,
    /// On the host if it is another one, from 0.5.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_path: Option<String>,
    /// `c`: a character device.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Where it is absent, the engine reads the host's node at each start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major: Option<u32>,
    /// Goes with `major`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor: Option<u32>,
    /// Permission bits, in decimal as everything in JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_mode: Option<u32>,
    /// Of the cgroup's rule: `rwm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub permissions: Option<String>,
    /// Owner; where it is absent, the container's user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group; where it is absent, the container's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
}

/// A mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Mount {
    /// On the host; any word for a file system without a source.
    pub host_path: String,
    /// In the container.
    pub container_path: String,
    /// The file system's, where it is no bind mount; from 0.4.0.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// In the OCI specification's words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// A program that the low-level runtime runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Hook {
    /// When: `createContainer` is in the container's namespaces, with the host's files still in view.
    pub hook_name: String,
    /// The program.
    pub path: String,
    /// Its words, its name first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Its whole environment.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Seconds after which it is killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<i64>,
}

/// A document as YAML.
pub fn to_yaml(document: &impl Serialize) -> String {
    serde_norway::to_string(document).unwrap_or_default()
}

/// A document as JSON. Engines read it as YAML, so characters are escaped that YAML takes for line breaks or does not allow (YAML
/// 1.1, "c-printable" and "b-char").
pub fn to_json(document: &impl Serialize) -> String {
    let text = serde_json::to_string_pretty(document).unwrap_or_default() + "\n";
    let is_special = |c: char| {
        matches!(c, '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
    };
    if !text.contains(is_special) {
        return text;
    }
    text.chars().map(|c| if is_special(c) { format!("\\u{:04x}", u32::from(c)) } else { c.into() }).collect()
}

impl Document {
    /// Reads YAML, of which JSON is a part. A number in the place of a text is an error, as the specification has it.
    ///
    /// # Errors
    /// [`Code::Cdi`] when it is neither, or not a document.
    pub fn parse(text: &str) -> Result<Self> {
        let failed = || "this is no CDI document";
        // Straight from YAML each scalar would be a text, too.
        let value = yaml::from_str(text).or_fail(Code::Cdi, failed);
        value
            .and_then(|value| Self::deserialize(value).or_fail(Code::Cdi, failed))
            .map_err(|error| error.fix("`gpurun cdi generate` writes one"))
    }

    /// The common edits and each device's.
    pub fn edits(&self) -> impl Iterator<Item = &ContainerEdits> {
        std::iter::once(&self.container_edits)
            .chain(self.devices.iter().map(|device| &device.container_edits))
    }

    /// The lowest version of the specification that has everything the document uses (SPEC.md, "Released versions"; the
    /// library's specs-go/version.go). Engines refuse a document of a version that they do not know, and every field of
    /// another one, so a document asks for no more than it needs.
    pub fn lowest_version(&self) -> &'static str {
        let annotated =
            !self.annotations.is_empty() || self.devices.iter().any(|d| !d.annotations.is_empty());
        let of_1_1 = |rdt: &IntelRdt| !rdt.schemata.is_empty() || rdt.enable_monitoring.is_some();
        if self
            .edits()
            .any(|edits| !edits.net_devices.is_empty() || edits.intel_rdt.as_ref().is_some_and(of_1_1))
        {
            "1.1.0"
        } else if self.edits().any(|edits| !edits.additional_gids.is_empty() || edits.intel_rdt.is_some()) {
            "0.7.0"
        } else if annotated || self.kind.split_once('/').is_some_and(|(_, class)| class.contains('.')) {
            "0.6.0"
        } else if self.devices.iter().any(|device| !device.has_old_name())
            || self.edits().any(|edits| edits.device_nodes.iter().any(|node| node.host_path.is_some()))
        {
            "0.5.0"
        } else if self.edits().any(|edits| edits.mounts.iter().any(|mount| mount.kind.is_some())) {
            "0.4.0"
        } else {
            "0.3.0"
        }
    }
}

/// The versions of the specification.
const VERSIONS: [&str; 8] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];
/// When a hook can run.
const HOOK_NAMES: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

impl Document {
    /// What the specification forbids, for which engines refuse the document.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let kind = self.kind.split_once('/');
        let fits = |word: &str, longest| is_kind(word) && word.len() <= longest;
        if !kind.is_some_and(|(vendor, class)| fits(vendor, 253) && fits(class, 63)) {
            faults.push(format!("its kind {:?} is not vendor/class", self.kind));
        }
        if self.devices.is_empty() {
            faults.push("it defines no device".into());
        }
        let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
        let lowest = self.lowest_version();
        match place(&self.cdi_version) {
            None => faults.push(format!(
                "its version {:?} is none of CDI's: {}",
                self.cdi_version,
                VERSIONS.join(", ")
            )),
            own if own < place(lowest) => {
                faults
                    .push(format!("it says version {:?} and uses what came with {lowest}", self.cdi_version));
            }
            Some(_) => {}
        }
        for Device { name, container_edits, .. } in &self.devices {
            if !is_name(name) {
                faults.push(format!("a device cannot be called {name:?}"));
            }
            if *container_edits == ContainerEdits::default() {
                faults.push(format!("the device {name} has no edits"));
            }
        }
        faults.extend(self.edits().flat_map(ContainerEdits::faults));
        faults
    }
}

impl ContainerEdits {
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let hooks_env = self.hooks.iter().flat_map(|hook| &hook.env);
        for variable in self.env.iter().chain(hooks_env).filter(|one| one.find('=').is_none_or(|at| at == 0))
        {
            faults.push(format!("{variable:?} is not NAME=VALUE"));
        }
        for DeviceNode { path, host_path, kind, permissions, .. } in &self.device_nodes {
            if path.is_empty() || host_path.as_ref().is_some_and(String::is_empty) {
                faults.push("a device node has no path".into());
            }
            if kind.as_ref().is_some_and(|kind| !["b", "c", "u", "p"].contains(&kind.as_str())) {
                faults.push(format!("{path} has a type that is none of b, c, u and p"));
            }
            let letters = permissions.iter().flat_map(|letters| letters.chars());
            if letters.into_iter().any(|letter| !"rwm".contains(letter)) {
                faults.push(format!("{path} has permissions other than r, w and m"));
            }
        }
        if self.mounts.iter().any(|mount| mount.host_path.is_empty() || mount.container_path.is_empty()) {
            faults.push("a mount has not both of its paths".into());
        }
        for Hook { hook_name, path, timeout, .. } in &self.hooks {
            if !HOOK_NAMES.contains(&hook_name.as_str()) {
                faults.push(format!("a hook cannot be called {hook_name:?}"));
            }
            if !path.starts_with('/') {
                faults.push(format!("the hook's path {path:?} is not absolute"));
            }
            if timeout.is_some_and(|seconds| seconds <= 0) {
                faults.push(format!("the hook {path} has no time"));
            }
        }
        faults
    }
}

impl Device {
    /// Whether its name begins with a letter, as every name had to before 0.5.0.
    pub fn has_old_name(&self) -> bool {
        self.name.starts_with(|first: char| first.is_ascii_alphabetic())
    }
}

/// Whether a vendor or class can be one: letters, digits, `-`, `_` and `.`, a letter first, no sign last (SPEC.md, "Kind").
pub fn is_kind(word: &str) -> bool {
    word.starts_with(|first: char| first.is_ascii_alphabetic()) && is_name(word) && !word.contains(':')
}

/// Whether a device can be called so: letters, digits and, between them, `-`, `_`, `.` and `:` (SPEC.md, "CDI Devices").
pub fn is_name(word: &str) -> bool {
    let outer = |c: char| c.is_ascii_alphanumeric();
    word.starts_with(outer)
        && word.ends_with(outer)
        && word.chars().all(|c| outer(c) || matches!(c, '-' | '_' | '.' | ':'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_lowest_version_that_says_it() {
        let edit = |change: &dyn Fn(&mut Document)| {
            let mut document = Document { kind: "nvidia.com/gpu".into(), ..Document::default() };
            document.devices.push(Device { name: "gpu0".into(), ..Device::default() });
            change(&mut document);
            document.lowest_version()
        };
        assert_eq!(edit(&|_| ()), "0.3.0");
        let mount = |d: &mut Document| {
            d.container_edits.mounts.push(Mount { kind: Some("tmpfs".into()), ..Mount::default() });
        };
        assert_eq!(edit(&mount), "0.4.0");
        assert_eq!(edit(&|d| d.devices[0].name = "0".into()), "0.5.0");
        let node = DeviceNode { host_path: Some("/host/dev/nvidia0".into()), ..DeviceNode::default() };
        assert_eq!(edit(&|d| d.devices[0].container_edits.device_nodes.push(node.clone())), "0.5.0");
        assert_eq!(edit(&|d| d.kind = "nvidia.com/gpu.coherent".into()), "0.6.0");
        assert_eq!(edit(&|d| drop(d.annotations.insert("a".into(), "b".into()))), "0.6.0");
        assert_eq!(edit(&|d| d.container_edits.additional_gids.push(44)), "0.7.0");
    }

    #[test]
    fn names() {
        for good in ["0", "0:1", "gpu0", "GPU-aa", "all", "a_b.c"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-0", "0-", "a b", "a/b", "a=b", ":"] {
            assert!(!is_name(bad), "{bad}");
        }
        assert!(is_kind("nvidia.com") && !is_kind("0gpu") && !is_kind("a:b") && !is_kind(""));
    }

    #[test]
    fn yaml_and_json_say_the_same() {
        let mut document = Document { kind: "nvidia.com/gpu".into(), ..Document::default() };
        // The last ones are line breaks of YAML 1.1 and characters that it does not allow.
        for name in
            ["0", "0:1", "1e3", "yes", "GPU-00", "0x1", "a\u{85}\u{2028}b", "\u{7f}\u{9b}\u{feff}\u{ffff}"]
        {
            document.devices.push(Device { name: name.into(), ..Device::default() });
        }
        for text in [to_yaml(&document), to_json(&document)] {
            assert_eq!(Document::parse(&text).unwrap(), document, "{text}");
        }
        assert!(to_yaml(&document).contains("'0'"), "a name is no number: {}", to_yaml(&document));
        for text in ["", "- 1", "cdiVersion: [", "devices: 3", "\u{0}"] {
            assert_eq!(Document::parse(text).unwrap_err().code(), Code::Cdi, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,80}|[\\[\\]{}:,&*!|>'\"%@ a-z0-9\\n-]{0,80}") { let _ = Document::parse(&text); }
    }
}
