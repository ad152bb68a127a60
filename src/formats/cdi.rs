//! A CDI document (Container Device Interface, SPEC.md): what it says that gpurun writes or checks. Unknown fields are ignored.

use crate::error::{Code, OrFail, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where engines look, those that come later before those that come earlier (SPEC.md, "CDI Spec directories").
pub const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// One document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
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
#[serde(rename_all = "camelCase")]
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
#[serde(rename_all = "camelCase", default)]
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
}

/// A device node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
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
#[serde(rename_all = "camelCase", default)]
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
#[serde(rename_all = "camelCase", default)]
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
}

/// A document as YAML.
pub fn to_yaml(document: &impl Serialize) -> String {
    serde_norway::to_string(document).unwrap_or_default()
}

/// A document as JSON.
pub fn to_json(document: &impl Serialize) -> String {
    serde_json::to_string_pretty(document).unwrap_or_default() + "\n"
}

impl Document {
    /// Reads YAML, of which JSON is a part.
    ///
    /// # Errors
    /// [`Code::Cdi`] when it is neither, or not a document.
    pub fn parse(text: &str) -> Result<Self> {
        serde_norway::from_str(text).or_fail(Code::Cdi, || "this is no CDI document")
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
        if self.edits().any(|edits| !edits.additional_gids.is_empty()) {
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
        for name in ["0", "0:1", "1e3", "yes", "GPU-00", "0x1"] {
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
