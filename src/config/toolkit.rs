//! The keys of NVIDIA's config.toml: which of them mean something here. Where gpurun has no configuration of its own, the
//! administrator's decisions in that file hold.

use crate::error::{Code, Error, OrFail, Result};
use crate::own_directory::{self, Purpose};
use std::{fmt::Write, path::PathBuf};
use toml::{Table, Value};
use toml_edit::Item;

/// What a key's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`
    Flag,
    /// A text.
    Text,
    /// A list of texts.
    List,
}

/// What becomes of a key.
#[derive(Debug, Clone, Copy)]
pub enum Fate {
    /// It is this key of ours, with the same values.
    Is(&'static str),
    /// With this value it turns this key of ours, a switch, off.
    TurnsOff {
        /// The value, as TOML writes it.
        with: &'static str,
        /// The switch.
        key: &'static str,
    },
    /// Nothing, for this reason.
    Nothing(&'static str),
}

/// A key of NVIDIA's.
#[derive(Debug)]
pub struct ToolkitKey {
    /// The tables that it is in and its name.
    pub path: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// As TOML writes it; `None` if nothing is the default.
    pub default: Option<&'static str>,
    /// What becomes of it here.
    pub fate: Fate,
}

const fn key(path: &'static str, kind: Kind, default: Option<&'static str>, fate: Fate) -> ToolkitKey {
    ToolkitKey { path, kind, default, fate }
}

use Fate::{Is, Nothing, TurnsOff};
use Kind::{Flag, List, Text};

const NO_CLI: Fate = Nothing("no nvidia-container-cli is run");
const NO_MODES: Fate = Nothing("there is one mode for every container");
const ONE_DOCUMENT: Fate = Nothing("CDI documents are read by engines, and not by the runtime");
const NO_TEGRA: Fate = Nothing("lists of Tegra's files are not read");

/// Every key of version 1.20, in the order of its file.
pub const KEYS: &[ToolkitKey] = &[
    key("disable-require", Flag, Some("false"), Is("disable-require")),
    key("swarm-resource", Text, None, Is("swarm-resource")),
    key(
        "accept-nvidia-visible-devices-envvar-when-unprivileged",
        Flag,
        Some("true"),
        Is("accept-nvidia-visible-devices-envvar-when-unprivileged"),
    ),
    key(
        "accept-nvidia-visible-devices-as-volume-mounts",
        Flag,
        Some("false"),
        Is("accept-nvidia-visible-devices-as-volume-mounts"),
    ),
    key(
        "supported-driver-capabilities",
        Text,
        Some("\"compat32,compute,display,graphics,ngx,utility,video\""),
        Is("supported-driver-capabilities"),
    ),
    key("nvidia-container-cli.root", Text, None, Is("driver-root")),
    key("nvidia-container-cli.path", Text, None, NO_CLI),
    key("nvidia-container-cli.debug", Text, None, NO_CLI),
    key("nvidia-container-cli.ldcache", Text, None, NO_CLI),
    key("nvidia-container-cli.environment", List, Some("[]"), NO_CLI),
    key(
        "nvidia-container-cli.load-kmods",
        Flag,
        Some("true"),
        Nothing("a container's start loads no kernel module"),
    ),
    key("nvidia-container-cli.no-pivot", Flag, None, NO_CLI),
    key(
        "nvidia-container-cli.no-cgroups",
        Flag,
        Some("false"),
        Nothing("device rules are the engine's, in its specification"),
    ),
    key("nvidia-container-cli.user", Text, None, NO_CLI),
    key("nvidia-container-cli.ldconfig", Text, Some("\"@/sbin/ldconfig\""), Nothing("no ldconfig is run")),
    key("nvidia-container-runtime.debug", Text, Some("\"/dev/null\""), Is("log-file")),
    key("nvidia-container-runtime.log-level", Text, Some("\"info\""), Is("log-level")),
    key("nvidia-container-runtime.runtimes", List, Some("[\"runc\", \"crun\"]"), Is("runtimes")),
    key("nvidia-container-runtime.mode", Text, Some("\"auto\""), NO_MODES),
    key(
        "nvidia-container-runtime.modes.csv.mount-spec-path",
        Text,
        Some("\"/etc/nvidia-container-runtime/host-files-for-container.d\""),
        NO_TEGRA,
    ),
    key("nvidia-container-runtime.modes.csv.compat-container-root", Text, None, NO_TEGRA),
    key("nvidia-container-runtime.modes.cdi.default-kind", Text, Some("\"nvidia.com/gpu\""), ONE_DOCUMENT),
    key(
        "nvidia-container-runtime.modes.cdi.annotation-prefixes",
        List,
        Some("[\"cdi.k8s.io/\"]"),
        Is("annotation-prefixes"),
    ),
    key(
        "nvidia-container-runtime.modes.cdi.spec-dirs",
        List,
        Some("[\"/etc/cdi\", \"/var/run/cdi\"]"),
        ONE_DOCUMENT,
    ),
    key("nvidia-container-runtime.modes.jit-cdi.nvcdi-feature-flags", List, None, ONE_DOCUMENT),
    key(
        "nvidia-container-runtime.modes.jit-cdi.nvcdi-disable-hooks",
        List,
        None,
        Nothing("no hook is added"),
    ),
    key(
        "nvidia-container-runtime.modes.legacy.cuda-compat-mode",
        Text,
        Some("\"ldconfig\""),
        TurnsOff { with: "\"disabled\"", key: "forward-compat" },
    ),
    key(
        "nvidia-container-runtime-hook.path",
        Text,
        Some("\"nvidia-container-runtime-hook\""),
        Nothing("no hook is added"),
    ),
    key("nvidia-container-runtime-hook.skip-mode-detection", Flag, Some("false"), NO_MODES),
    key("nvidia-ctk.path", Text, Some("\"nvidia-ctk\""), Nothing("no hook is added")),
    key(
        "features.allow-cuda-compat-libs-from-container",
        Flag,
        None,
        Nothing("they are used wherever their ELF note allows it"),
    ),
    key("features.allow-ldconfig-from-container", Flag, None, Nothing("nothing of an image's is run")),
    key(
        "features.allow-unknown-oci-spec-fields",
        Flag,
        None,
        Nothing("unknown fields always stay as they are"),
    ),
    key(
        "features.disable-cuda-compat-lib-hook",
        Flag,
        None,
        TurnsOff { with: "true", key: "forward-compat" },
    ),
    key(
        "features.disable-imex-channel-creation",
        Flag,
        None,
        Nothing("no channel is ever made: it must be there"),
    ),
    key("features.ignore-imex-channel-requests", Flag, None, Is("ignore-imex-channel-requests")),
    key(
        "features.no-additional-gids-for-device-nodes",
        Flag,
        None,
        Nothing("a device's group is the container's only where it must be"),
    ),
];

/// Where NVIDIA's programs look for it.
pub fn file() -> PathBuf {
    let named = |key| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("NVIDIA_CTK_CONFIG_FILE_PATH").unwrap_or_else(|| {
        let directory =
            own_directory::named_by("XDG_CONFIG_HOME", Purpose::Read).unwrap_or_else(|| "/etc".into());
        directory.join("nvidia-container-runtime/config.toml")
    })
}

/// What NVIDIA's file says in our keys, and what of it is set and means nothing here, and why.
pub fn ours(theirs: &Table) -> (Table, Vec<(&'static str, &'static str)>) {
    let (mut table, mut unused) = (Table::new(), Vec::new());
    for key in KEYS {
        let mut parts = key.path.split('.');
        let first = parts.next().and_then(|part| theirs.get(part));
        let value = parts.fold(first, |value, part| value?.get(part));
        // An empty text is their way to say nothing.
        let Some(value) = value.filter(|value| value.as_str() != Some("")) else { continue };
        match key.fate {
            Fate::Is(ours) => {
                table.insert(ours.into(), value.clone());
            }
            Fate::TurnsOff { with, key } => {
                if value.to_string() == with {
                    table.insert(key.into(), Value::Boolean(false));
                }
            }
            Fate::Nothing(reason) => {
                if key.default != Some(value.to_string().as_str()) {
                    unused.push((key.path, reason));
                }
            }
        }
    }
    (table, unused)
}

/// Checks the type of every key that gpurun uses.
///
/// # Errors
/// [`Code::Config`] with the line, the key and the expected type.
pub fn check(text: &str) -> Result<()> {
    let failed = |line: usize, what: String| {
        Err(Error::new(Code::Config, "a value has the wrong type")
            .cause(format!("line {line}: {what}"))
            .fix("correct that line; `nvidia-ctk config default` prints every key with a value of its type"))
    };
    let document = toml_edit::Document::parse(text).or_fail(Code::Config, || "it is not TOML")?;
    let line = |item: &Item| {
        let start = item.span().map_or(0, |span| span.start);
        text.get(..start).unwrap_or_default().matches('\n').count() + 1
    };
    for key in KEYS.iter().filter(|key| !matches!(key.fate, Fate::Nothing(_))) {
        let mut item = document.as_item();
        let mut names = key.path.split('.').peekable();
        let mut so_far = String::new();
        while let Some(name) = names.next() {
            let Some(inner) = item.get(name) else { break };
            so_far = if so_far.is_empty() { name.to_owned() } else { format!("{so_far}.{name}") };
            item = inner;
            if names.peek().is_some() && !item.is_table_like() {
                return failed(line(item), format!("{so_far} is a table, and here a {}", item.type_name()));
            }
        }
        if so_far != key.path {
            continue;
        }
        let (fits, kind) = match key.kind {
            Kind::Flag => (item.is_bool(), "true or false"),
            Kind::Text => (item.is_str(), "a text"),
            Kind::List => (
                item.as_array().is_some_and(|list| list.iter().all(toml_edit::Value::is_str)),
                "a list of texts",
            ),
        };
        if !fits {
            return failed(line(item), format!("{so_far} is {kind}, and here a {}", item.type_name()));
        }
        let levels = ["", "panic", "fatal", "error", "warn", "warning", "info", "debug", "trace"];
        if key.path.ends_with(".log-level") && item.as_str().is_some_and(|level| !levels.contains(&level)) {
            return failed(line(item), format!("{so_far} is one of {}", levels[1..].join(", ")));
        }
    }
    Ok(())
}

/// What NVIDIA calls this key of ours.
pub fn name_of(ours: &str) -> Option<&'static str> {
    let is_ours = |key: &&ToolkitKey| match key.fate {
        Fate::Is(name) | Fate::TurnsOff { key: name, .. } => name == ours,
        Fate::Nothing(_) => false,
    };
    KEYS.iter().find(is_ours).map(|key| key.path)
}

/// NVIDIA's file with its defaults; what nothing is the default of stands there as a comment.
pub fn default_text() -> String {
    let (mut text, mut table) = (String::new(), "");
    for key in KEYS {
        let (within, name) = key.path.rsplit_once('.').unwrap_or(("", key.path));
        if within != table {
            table = within;
            let _ = writeln!(text, "\n[{table}]");
        }
        let nothing = match key.kind {
            Kind::Flag => "false",
            Kind::Text => "\"\"",
            Kind::List => "[]",
        };
        let _ = match key.default {
            Some(value) => writeln!(text, "{name} = {value}"),
            None => writeln!(text, "#{name} = {nothing}"),
        };
    }
    text
}
