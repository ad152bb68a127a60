//! The config.json of an OCI bundle (runtime-spec, config.md and config-linux.md) as a JSON value: engines put fields there
//! that the specification of today does not have, and all of them survive an edit.

use crate::{
    error::{Code, Error, OrFail, Result},
    vocabulary::EnvVar,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// A container's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec(Value);

/// One entry of `mounts`, as far as gpurun reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry<'a> {
    /// Where it appears.
    pub destination: &'a str,
    /// A host path, or any word for a file system without one.
    pub source: &'a str,
}

/// The fix for a malformed config.json.
const BY_HAND: &str =
    "start the container again, for which its engine writes another config.json; by hand, use `runc spec`";

impl Spec {
    /// Reads a config.json.
    ///
    /// # Errors
    /// [`Code::Bundle`] when it is not a JSON object.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match serde_json::from_slice(bytes) {
            Ok(spec @ Value::Object(_)) => Ok(Self(spec)),
            Ok(_) => {
                Err(Error::new(Code::Bundle, "the container's config.json is not a JSON object").fix(BY_HAND))
            }
            Err(error) => Err(error)
                .or_fail(Code::Bundle, || "the container's config.json is not JSON")
                .map_err(|error| error.fix(BY_HAND)),
        }
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_string().into_bytes()
    }

    /// What is at a path of keys; `None` also where JSON says null, which Go writes for an empty list.
    pub fn at(&self, path: &[&str]) -> Option<&Value> {
        path.iter().try_fold(&self.0, |value, key| value.get(key)).filter(|value| !value.is_null())
    }

    /// The entries of a list; none where it is absent.
    pub fn list(&self, path: &[&str]) -> &[Value] {
        self.at(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// The list at a path of keys, made with the objects around it where it is absent.
    ///
    /// # Errors
    /// [`Code::Bundle`] when something else is in its place.
    pub fn list_mut(&mut self, path: &[&str]) -> Result<&mut Vec<Value>> {
        let mut here = &mut self.0;
        for (depth, key) in path.iter().enumerate() {
            let Value::Object(object) = here else { return Err(misplaced(&path[..depth], "an object")) };
            here = object.entry(*key).or_insert(Value::Null);
            if here.is_null() {
                *here = if depth + 1 == path.len() {
                    Value::Array(Vec::new())
                } else {
                    Value::Object(Map::new())
                };
            }
        }
        here.as_array_mut().ok_or_else(|| misplaced(path, "a list"))
    }

    /// `process.env`, split at the first `=`.
    pub fn environment(&self) -> Vec<EnvVar> {
        let variable = |entry: &Value| {
            let (name, value) = entry.as_str()?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        self.list(&["process", "env"]).iter().filter_map(variable).collect()
    }

    /// `annotations`, sorted by key.
    pub fn annotations(&self) -> Vec<(&str, &str)> {
        let object = self.at(&["annotations"]).and_then(Value::as_object);
        let mut all: Vec<_> = object
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
            .collect();
        all.sort_unstable();
        all
    }

    /// `mounts`, in their order.
    pub fn mounts(&self) -> impl Iterator<Item = MountEntry<'_>> {
        self.list(&["mounts"]).iter().filter_map(|mount| {
            Some(MountEntry {
                destination: mount.get("destination")?.as_str()?,
                source: mount.get("source").and_then(Value::as_str).unwrap_or_default(),
            })
        })
    }

    /// Whether the container's processes could ever have this capability (`CAP_SYS_ADMIN`).
    pub fn is_bounded_by(&self, capability: &str) -> bool {
        self.list(&["process", "capabilities", "bounding"]).iter().any(|one| one.as_str() == Some(capability))
    }

    /// `root.path`: absolute, or relative to the bundle.
    pub fn root_path(&self) -> Option<&str> {
        self.at(&["root", "path"])?.as_str()
    }

    /// The user that the container's first process runs as; the specification's default is 0.
    pub fn uid(&self) -> u64 {
        self.at(&["process", "user", "uid"]).and_then(Value::as_u64).unwrap_or(0)
    }

    /// The limit of the container's memory in bytes; `None` if there is none.
    pub fn memory_limit(&self) -> Option<u64> {
        self.at(&["linux", "resources", "memory", "limit"])?.as_u64().filter(|&limit| limit > 0)
    }

    /// The unit that systemd makes for the container, where the engine has it make the cgroup: `linux.cgroupsPath` is
    /// `SLICE:PREFIX:NAME` then (runc, docs/systemd.md).
    pub fn systemd_scope(&self) -> Option<String> {
        let mut parts = self.at(&["linux", "cgroupsPath"])?.as_str()?.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(_), Some(""), Some(name), None) => Some(format!("{name}.scope")),
            (Some(_), Some(prefix), Some(name), None) => Some(format!("{prefix}-{name}.scope")),
            _ => None,
        }
    }

    /// Whether the container gets a user namespace of its own.
    pub fn has_user_namespace(&self) -> bool {
        self.namespace("user").is_some()
    }

    /// Whether the low-level runtime makes the container's mount namespace as a copy of its own, and joins none that is there.
    pub fn has_new_mount_namespace(&self) -> bool {
        self.namespace("mount").is_some_and(|one| one.get("path").is_none_or(|path| path == ""))
    }

    fn namespace(&self, kind: &str) -> Option<&Value> {
        let is_it = |one: &&Value| one.get("type").and_then(Value::as_str) == Some(kind);
        self.list(&["linux", "namespaces"]).iter().find(is_it)
    }

    /// The host's uid and gid of the container's root, where the configuration maps them.
    pub fn mapped_root(&self) -> Option<(u32, u32)> {
        let id = |key: &str| {
            let mapping = self
                .list(&["linux", key])
                .iter()
                .find(|one| one.get("containerID").and_then(Value::as_u64) == Some(0))?;
            mapping.get("hostID")?.as_u64()?.try_into().ok()
        };
        Some((id("uidMappings")?, id("gidMappings")?))
    }
}

/// What a low-level runtime writes to a hook's standard input (runtime-spec, runtime.md, "State"), as far as hooks read it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct State {
    /// The container's first process, as the host numbers it; 0 before there is one.
    #[serde(default)]
    pub pid: i32,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The container's root, absolute or relative to the bundle: crun says it, runc does not.
    pub root: Option<PathBuf>,
}

impl State {
    /// Reads it.
    ///
    /// # Errors
    /// [`Code::Bundle`] when it is something else.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let what = || "standard input holds no OCI state of a container";
        let fix = "hooks are run by a low-level runtime, runc or crun";
        let state: Self =
            serde_json::from_slice(bytes).or_fail(Code::Bundle, what).map_err(|error| error.fix(fix))?;
        if !state.bundle.is_absolute() {
            return Err(Error::new(Code::Bundle, what())
                .cause("its bundle is not an absolute path")
                .fix(fix));
        }
        Ok(state)
    }

    /// The container's first process.
    ///
    /// # Errors
    /// [`Code::Bundle`] when there is none yet.
    pub fn process(&self) -> Result<i32> {
        if self.pid > 0 {
            return Ok(self.pid);
        }
        Err(Error::new(Code::Bundle, "the container has no process yet")
            .fix("configure this program as a `prestart` hook: runc and crun run it when the container has a process"))
    }
}

fn misplaced(path: &[&str], wanted: &str) -> Error {
    let key = path.join(".");
    Error::new(Code::Bundle, format!("{key} of the container's config.json is not {wanted}")).fix(format!(
        "make {key} {wanted} in config.json, or start the container again if an engine wrote it"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_nobody_knows_survives_in_its_order() {
        let text = r#"{"zeta":1.5,"ociVersion":"1.9.9","process":{"new":[null,{"a":18446744073709551615}]},"annotations":null}"#;
        let spec = Spec::parse(text.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(spec.to_bytes()).unwrap(), text);
    }

    #[test]
    fn lists_are_made_where_they_are_absent_and_nothing_is_overwritten() {
        let mut spec = Spec::parse(br#"{"linux":{"devices":null},"hooks":7,"mounts":{}}"#).unwrap();
        spec.list_mut(&["linux", "devices"]).unwrap().push(1.into());
        spec.list_mut(&["process", "user", "additionalGids"]).unwrap();
        assert_eq!(spec.list_mut(&["hooks", "prestart"]).unwrap_err().code(), Code::Bundle);
        assert_eq!(spec.list_mut(&["mounts"]).unwrap_err().code(), Code::Bundle);
        assert_eq!(
            String::from_utf8(spec.to_bytes()).unwrap(),
            r#"{"linux":{"devices":[1]},"hooks":7,"mounts":{},"process":{"user":{"additionalGids":[]}}}"#
        );
    }

    #[test]
    fn what_is_no_configuration_is_a_message() {
        for bytes in [&b""[..], b"{", b"[]", b"null", b"\xff"] {
            assert_eq!(Spec::parse(bytes).unwrap_err().code(), Code::Bundle, "{bytes:?}");
        }
    }

    #[test]
    fn a_cgroup_that_systemd_makes_is_a_scope() {
        for (path, scope) in [
            ("system.slice:docker:1", Some("docker-1.scope")),
            (":cri-containerd:1", Some("cri-containerd-1.scope")),
            ("machine.slice::1", Some("1.scope")),
            ("/docker/1", None),
            ("", None),
            ("a:b", None),
            ("a:b:c:d", None),
        ] {
            let spec = Spec(serde_json::json!({"linux": {"cgroupsPath": path}}));
            assert_eq!(spec.systemd_scope().as_deref(), scope, "{path}");
        }
    }

    #[test]
    fn a_state_is_read_with_and_without_what_crun_adds() {
        let runc =
            r#"{"ociVersion":"1.0.2","id":"x","status":"creating","pid":7,"bundle":"/b","annotations":{}}"#;
        let bundle = PathBuf::from("/b");
        let read = |text: &str| State::parse(text.as_bytes());
        assert_eq!(read(runc).unwrap(), State { pid: 7, bundle: bundle.clone(), root: None });
        let crun = read(r#"{"bundle":"\/b","root":"/b/merged"}"#).unwrap();
        assert_eq!(crun, State { pid: 0, bundle, root: Some("/b/merged".into()) });
        for text in [
            "",
            "{}",
            "[]",
            r#"{"bundle":3}"#,
            r#"{"pid":1}"#,
            r#"{"bundle":"b"}"#,
            r#"{"pid":"1","bundle":"/b"}"#,
        ] {
            assert_eq!(read(text).unwrap_err().code(), Code::Bundle, "{text}");
        }
        assert_eq!(read(runc).unwrap().process().unwrap(), 7);
        for pid in ["0", "-1"] {
            let state = read(&format!(r#"{{"pid":{pid},"bundle":"/b"}}"#)).unwrap();
            assert_eq!(state.process().unwrap_err().code(), Code::Bundle, "{pid}");
        }
    }

    proptest! {
        #[test]
        fn any_state_is_read(bytes: Vec<u8>) { let _ = State::parse(&bytes); }

        #[test]
        fn any_value_is_read(text in r#"\{("(process|linux|mounts|env|root|path|annotations)":(\{\}|\[\]|\[1,"a=b"\]|null|"x"|\{"env":\[3\]\})){0,1}\}"#) {
            if let Ok(spec) = Spec::parse(text.as_bytes()) {
                let _ = (spec.environment(), spec.annotations(), spec.mounts().count(), spec.root_path(), spec.uid());
                let _ = (spec.memory_limit(), spec.has_user_namespace(), spec.mapped_root(), spec.is_bounded_by("CAP_SYS_ADMIN"));
            }
        }
    }
}
