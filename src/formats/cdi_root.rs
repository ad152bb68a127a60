//! A CDI document for a place where the host's files, or the container's, are below another directory: what NVIDIA's toolkit calls
//! `transform root`. Unknown fields are kept.

use crate::{
    error::{Code, Error, OrFail, Result},
    vocabulary::Version,
};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Whose paths are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Sources of mounts and nodes, programs of hooks.
    Host,
    /// Where mounts and nodes appear, and what hooks do there.
    Container,
}

fn with_fix(error: Error) -> Error {
    error.fix("`gpurun cdi generate` writes one")
}

/// The document with `to` in the place of `from` wherever a path begins with it.
///
/// # Errors
/// [`Code::Cdi`] if the text is no document.
pub fn transform(text: &str, from: &Path, to: &Path, whose: Whose) -> Result<Value> {
    let mut document: Value =
        super::yaml::from_str(text).or_fail(Code::Cdi, || "this is no CDI document").map_err(with_fix)?;
    if document.get("cdiVersion").is_none() {
        let error = Error::new(Code::Cdi, "this is no CDI document").cause("it has no cdiVersion");
        return Err(with_fix(error));
    }
    let root = Root { from, to, whose };
    let mut has_two_names = false;
    for device in list(&mut document, "devices") {
        has_two_names |= root.change_edits(device);
    }
    has_two_names |= root.change_edits(&mut document);
    // A node that has two names now needs a later version than one that had one.
    let version = |text: &str| text.parse::<Version>().ok();
    let own = document["cdiVersion"].as_str().and_then(version);
    if has_two_names && own < version("0.5.0") {
        document["cdiVersion"] = "0.5.0".into();
    }
    Ok(document)
}

struct Root<'a> {
    from: &'a Path,
    to: &'a Path,
    whose: Whose,
}

/// The hooks that the low-level runtime runs in the container's namespaces (OCI runtime specification, config.md, "Hooks"): their
/// arguments are the container's paths. The program of the second is the container's, too.
const CREATE: &str = "createContainer";
const START: &str = "startContainer";

impl Root<'_> {
    /// Whether a device node there has a name of its own on the host now.
    fn change_edits(&self, owner: &mut Value) -> bool {
        let Some(edits) = owner.get_mut("containerEdits") else { return false };
        let mut has_two_names = false;
        for node in list(edits, "deviceNodes") {
            // Where one name is said, it is both.
            if node.get("hostPath").is_none()
                && let Some(path) = node.get("path").cloned()
            {
                node["hostPath"] = path;
            }
            self.change_field(
                node,
                match self.whose {
                    Whose::Host => "hostPath",
                    Whose::Container => "path",
                },
            );
            if let Some(fields) = node.as_object_mut()
                && fields.get("hostPath") == fields.get("path")
            {
                fields.shift_remove("hostPath");
            }
            has_two_names |= node.get("hostPath").is_some();
        }
        for mount in list(edits, "mounts") {
            self.change_field(
                mount,
                match self.whose {
                    Whose::Host => "hostPath",
                    Whose::Container => "containerPath",
                },
            );
        }
        for hook in list(edits, "hooks") {
            let name = hook.get("hookName").and_then(Value::as_str).unwrap_or_default();
            let arguments_are = if [CREATE, START].contains(&name) { Whose::Container } else { Whose::Host };
            let program_is = if name == START { Whose::Container } else { Whose::Host };
            if program_is == self.whose {
                self.change_field(hook, "path");
            }
            if arguments_are == self.whose {
                // The first word is the program's name for itself.
                list(hook, "args").iter_mut().skip(1).for_each(|word| self.change(word));
            }
        }
        has_two_names
    }

    fn change_field(&self, owner: &mut Value, name: &str) {
        if let Some(value) = owner.get_mut(name) {
            self.change(value);
        }
    }

    /// A path, `--flag=PATH`, or the two of `TARGET::LINK`.
    fn change(&self, value: &mut Value) {
        let Value::String(text) = value else { return };
        let (flag, paths) = match text.split_once('=') {
            Some((flag, paths)) if flag.starts_with("--") => (format!("{flag}="), paths),
            _ => (String::new(), text.as_str()),
        };
        let changed: Vec<String> = paths.split("::").map(|path| self.moved(path)).collect();
        *text = flag + &changed.join("::");
    }

    fn moved(&self, path: &str) -> String {
        match Path::new(path).strip_prefix(self.from) {
            Ok(rest) if path.starts_with('/') => {
                let moved: PathBuf = self.to.join(rest).components().collect();
                moved.to_string_lossy().into_owned()
            }
            _ => path.into(),
        }
    }
}

fn list<'a>(value: &'a mut Value, key: &str) -> &'a mut [Value] {
    value.get_mut(key).and_then(Value::as_array_mut).map_or(&mut [], Vec::as_mut_slice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DOCUMENT: &str = r#"{"cdiVersion":"0.3.0","kind":"nvidia.com/gpu","new":1,
        "devices":[{"name":"0","containerEdits":{"deviceNodes":[
            {"path":"/dev/nvidia0","hostPath":"/driver/dev/nvidia0","x":2},{"path":"/driver/dev/nvidiactl"},{"path":"/dev/other"}]}}],
        "containerEdits":{
            "mounts":[{"hostPath":"/driver/usr/a.so","containerPath":"/usr/a.so"},{"hostPath":"/driver-old/b","containerPath":"/driver"},
                      {"hostPath":"tmpfs","containerPath":"/t"}],
            "hooks":[{"hookName":"createContainer","path":"/driver/bin/hook","args":["hook","--link","/driver/a::/driver/b","--folder=/driver/lib"]},
                     {"hookName":"prestart","path":"/bin/hook","args":["/driver/x","--flag","/driver/y"]},
                     {"hookName":"startContainer","path":"/driver/in"}]}}"#;

    fn of(from: &str, to: &str, whose: Whose) -> Value {
        transform(DOCUMENT, Path::new(from), Path::new(to), whose).unwrap()
    }

    #[test]
    fn the_hosts_paths_move_and_the_containers_stay() {
        let moved = of("/driver", "/", Whose::Host);
        let nodes = &moved["devices"][0]["containerEdits"]["deviceNodes"];
        assert_eq!(nodes[0], serde_json::json!({"path": "/dev/nvidia0", "x": 2}));
        assert_eq!(
            nodes[1],
            serde_json::json!({"path": "/driver/dev/nvidiactl", "hostPath": "/dev/nvidiactl"})
        );
        assert_eq!(nodes[2], serde_json::json!({"path": "/dev/other"}));
        let edits = &moved["containerEdits"];
        assert_eq!(edits["mounts"][0]["hostPath"], "/usr/a.so");
        assert_eq!(
            (&edits["mounts"][1]["hostPath"], &edits["mounts"][2]["hostPath"]),
            (&"/driver-old/b".into(), &"tmpfs".into())
        );
        let hooks = &edits["hooks"];
        assert_eq!(
            (&hooks[0]["path"], &hooks[0]["args"][2]),
            (&"/bin/hook".into(), &"/driver/a::/driver/b".into())
        );
        assert_eq!(hooks[1]["args"], serde_json::json!(["/driver/x", "--flag", "/y"]));
        assert_eq!((&hooks[2]["path"], &moved["new"]), (&"/driver/in".into(), &1.into()));
        assert_eq!(moved["cdiVersion"], "0.5.0");
    }

    #[test]
    fn the_containers_paths_move_and_the_hosts_stay() {
        let moved = of("/driver", "/run/d/", Whose::Container);
        let nodes = &moved["devices"][0]["containerEdits"]["deviceNodes"];
        assert_eq!(
            nodes[1],
            serde_json::json!({"path": "/run/d/dev/nvidiactl", "hostPath": "/driver/dev/nvidiactl"})
        );
        let edits = &moved["containerEdits"];
        assert_eq!(
            (&edits["mounts"][1]["hostPath"], &edits["mounts"][1]["containerPath"]),
            (&"/driver-old/b".into(), &"/run/d".into())
        );
        assert_eq!(
            edits["hooks"][0],
            serde_json::json!({"hookName": "createContainer", "path": "/driver/bin/hook",
                "args": ["hook", "--link", "/run/d/a::/run/d/b", "--folder=/run/d/lib"]})
        );
        assert_eq!(
            (&edits["hooks"][1]["args"][2], &edits["hooks"][2]["path"]),
            (&"/driver/y".into(), &"/run/d/in".into())
        );
        // Everything is below the root.
        assert_eq!(
            of("/", "/host", Whose::Host)["containerEdits"]["mounts"][0]["hostPath"],
            "/host/driver/usr/a.so"
        );
        assert_eq!(
            of("/", "/", Whose::Host)["containerEdits"],
            of("/x", "/y", Whose::Host)["containerEdits"]
        );
        for text in ["", "[]", "{", "devices: []"] {
            assert_eq!(
                transform(text, Path::new("/"), Path::new("/"), Whose::Host).unwrap_err().code(),
                Code::Cdi,
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_document_makes_it_panic(text in r#"\{"cdiVersion":0,"(devices|containerEdits)":(\{"(mounts|hooks|deviceNodes)":(\[\{"(path|hostPath|args)":([0-9]|"[a-z/:=-]{0,8}"|\["/::/"\])\}\]|7)\}|\[3\])\}"#) {
            let _ = transform(&text, Path::new("/a"), Path::new("/b"), Whose::Host);
            let _ = transform(&text, Path::new("/"), Path::new("b"), Whose::Container);
        }
    }
}
