//! The configuration: each key's meaning and default, once.
#![forbid(unsafe_code)]

pub mod engines;
pub mod toolkit;

use crate::{
    error::{Code, Error, OrFail, Result},
    plan::Policy,
    request::Accepted,
    text_file::TextFile,
    vocabulary::DriverCapability,
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// Read when no other file is named; it need not be there.
pub const DEFAULT_FILE: &str = "/etc/gpurun/config.toml";

/// The largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Something that can be set.
#[derive(Debug)]
pub struct Setting {
    /// The option of the command line.
    pub option: &'static str,
    /// The variable of the environment.
    pub variable: &'static str,
    /// The key of the file.
    pub key: &'static str,
    /// What holds where nobody says anything.
    pub default: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

const fn setting(
    option: &'static str,
    variable: &'static str,
    key: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> Setting {
    Setting { option, variable, key, default, meaning }
}

/// Everything that can be set, by which of the three ways; an empty name is no way.
pub const SETTINGS: &[Setting] = &[
    setting(
        "--driver-root",
        "GPURUN_DRIVER_ROOT",
        "driver-root",
        "`/`",
        "where the driver's files are; links inside resolve inside",
    ),
    setting("--dev-root", "GPURUN_DEV_ROOT", "dev-root", "the driver root", "where its device nodes are"),
    setting("--config", "GPURUN_CONFIG", "", "/etc/gpurun/config.toml", "an unknown key is an error"),
    setting(
        "--shm-size",
        "",
        "shm-size",
        "`auto`: half of memory",
        "size of /dev/shm; `keep` is what the engine chose",
    ),
    setting("", "", "supported-driver-capabilities", "`all`", "what containers may have of the driver"),
    setting("", "NVIDIA_DISABLE_REQUIRE", "disable-require", "`false`", "requirements are not checked"),
    setting(
        "",
        "",
        "forward-compat",
        "`true`",
        "an image's own newer CUDA driver libraries are used where they can be",
    ),
    setting(
        "",
        "",
        "runtimes",
        "`[\"runc\", \"crun\"]`",
        "what `gpurun-runtime` hands over to, by path or name; the first that is there",
    ),
    setting(
        "",
        "",
        "accept-nvidia-visible-devices-envvar-when-unprivileged",
        "`true`",
        "whether a container's own environment may ask an engine for GPUs",
    ),
    setting(
        "",
        "",
        "accept-nvidia-visible-devices-as-volume-mounts",
        "`false`",
        "whether mounts under /var/run/nvidia-container-devices may",
    ),
    setting("", "", "annotation-prefixes", "`[\"cdi.k8s.io/\"]`", "which annotations may"),
    setting(
        "",
        "",
        "swarm-resource",
        "none",
        "variables, between commas, that are read in place of `NVIDIA_VISIBLE_DEVICES` where one is set (`DOCKER_RESOURCE_GPU`)",
    ),
    setting(
        "",
        "",
        "ignore-imex-channel-requests",
        "`false`",
        "whether requests for IMEX channels are ignored",
    ),
    setting(
        "",
        "",
        "nonroot",
        "`keep`",
        "`require`: an engine's GPU container that would run as uid 0 is refused",
    ),
    setting(
        "",
        "",
        "log-file",
        "none",
        "where `gpurun-runtime` writes what it did, besides the engine's log",
    ),
    setting("", "", "log-level", "`info`", "how much of it: `error`, `warning`, `info`, `debug`"),
    setting(
        "",
        "",
        "insecure-registries",
        "none",
        "registries, `HOST[:PORT]`, whose certificates are not checked and that may speak plain HTTP; those on this machine may anyway",
    ),
    setting(
        "",
        "",
        "registry-mirrors",
        "none",
        "what is asked before a registry: `{ \"docker.io\" = [\"https://mirror.example\"] }`",
    ),
    setting("", "", "store-quota", "none", "what the layers of images may take on the disk: `200g`"),
    setting(
        "",
        "GPURUN_STATE_DIR",
        "",
        "/run/gpurun, `$XDG_RUNTIME_DIR/gpurun`",
        "what is known of the host",
    ),
    setting(
        "",
        "GPURUN_STORE",
        "",
        "/var/lib/gpurun, `$XDG_DATA_HOME/gpurun`",
        "images, and what containers write",
    ),
    setting("--log", "GPURUN_LOG", "", "`warn`", "what is logged to stderr"),
    setting("--log-format", "", "", "`text`", "how it is logged: `text`, `json`"),
    setting(
        "--simulated-host",
        "GPURUN_SIMULATED_HOST",
        "",
        "",
        "a directory in place of the host (`gpurun demo --keep DIR` makes one)",
    ),
    setting("--json", "", "", "", "answers and failures as JSON"),
];

/// The file's keys; [`SETTINGS`] says what they mean. A key that is not here is an error: a misspelt one must not be ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[allow(missing_docs)]
pub struct Config {
    pub driver_root: Option<PathBuf>,
    pub dev_root: Option<PathBuf>,
    pub shm_size: Option<String>,
    pub supported_driver_capabilities: Option<String>,
    pub disable_require: bool,
    pub forward_compat: Option<bool>,
    pub runtimes: Option<Vec<String>>,
    /// An image can say `NVIDIA_VISIBLE_DEVICES=all` to an engine by itself, so a cluster that shares nodes says no.
    pub accept_nvidia_visible_devices_envvar_when_unprivileged: Option<bool>,
    /// A user of a cluster can name a variable but not such a mount.
    pub accept_nvidia_visible_devices_as_volume_mounts: bool,
    pub annotation_prefixes: Option<Vec<String>>,
    pub swarm_resource: Option<String>,
    pub ignore_imex_channel_requests: bool,
    pub nonroot: Nonroot,
    pub log_file: Option<PathBuf>,
    pub log_level: LogLevel,
    pub insecure_registries: Vec<String>,
    pub registry_mirrors: BTreeMap<String, Vec<String>>,
    pub store_quota: Option<String>,
    /// The reason why the file cannot be used. Commands that depend on a key then fail; `images`, `doctor` and `config` work.
    #[serde(skip)]
    pub broken: Option<Error>,
}

/// `nonroot`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nonroot {
    /// It runs as whom the engine says.
    #[default]
    Keep,
    /// One that would run as uid 0 is refused.
    Require,
}

/// `log-level`, in the words of NVIDIA's, which are logrus'.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum LogLevel {
    #[serde(alias = "panic", alias = "fatal")]
    Error,
    #[serde(alias = "warn")]
    Warning,
    #[default]
    Info,
    #[serde(alias = "trace")]
    Debug,
}

/// A configuration as it was found.
#[derive(Debug, Default)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// Whether it is NVIDIA's.
    pub is_toolkits: bool,
    /// Text of the file.
    pub text: String,
    /// What it says, in our keys.
    pub table: toml::Table,
    /// The keys of NVIDIA's that the file sets and that mean nothing here, and why.
    pub unused: Vec<(&'static str, &'static str)>,
}

impl Found {
    /// The file that is named; else ours if it is there, else NVIDIA's if that is there.
    ///
    /// # Errors
    /// [`Code::Config`] when it cannot be read, or is no TOML.
    pub fn open(file: Option<&Path>) -> Result<Option<Self>> {
        let read = |path: &Path| TextFile::read(path, MAX_FILE)?.text().map(str::to_owned);
        let present = |path: &Path| match read(path) {
            Err(error) if file.is_none() && error.kind() == ErrorKind::NotFound => Ok(None),
            read => read
                .map(Some)
                .or_fail(Code::Config, || format!("{} cannot be read", path.display()))
                .map_err(|error| error.fix("name a file that can be in GPURUN_CONFIG or --config, or none")),
        };
        let ours = file.unwrap_or(Path::new(DEFAULT_FILE));
        if let Some(text) = present(ours)? {
            return Ok(Some(Self {
                path: ours.into(),
                is_toolkits: false,
                table: table(ours, &text)?,
                unused: Vec::new(),
                text,
            }));
        }
        let path = toolkit::file();
        let Some(text) = present(&path)? else { return Ok(None) };
        let (table, unused) = toolkit::ours(&table(&path, &text)?);
        Ok(Some(Self { path, is_toolkits: true, table, unused, text }))
    }
}

fn table(path: &Path, text: &str) -> Result<toml::Table> {
    toml::from_str(text)
        .map_err(|error| unusable(&place(text, &error)).context(format!("{} cannot be used", path.display())))
}

fn unusable(why: &str) -> Error {
    Error::new(Code::Config, "the configuration is not understood")
        .cause(why)
        .fix("correct the file; `gpurun config` lists the keys and what they mean")
}

/// The parser's message, with the line of the text and the key in that line.
fn place(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start);
    let number = text.get(..start).unwrap_or_default().matches('\n').count();
    let line = text.lines().nth(number).unwrap_or_default();
    match line.split_once('=') {
        Some((key, _)) if !line.trim_start().starts_with('#') => {
            format!("line {}, {}: {}", number + 1, key.trim(), error.message())
        }
        _ => format!("line {}: {}", number + 1, error.message()),
    }
}

impl Found {
    /// Parses the file.
    ///
    /// # Errors
    /// [`Code::Config`]: an unknown key, or a value that a key cannot have, with the line.
    pub fn config(&self) -> Result<Config> {
        let config = if self.is_toolkits {
            toolkit::check(&self.text).and_then(|()| Config::from_table(self.table.clone()))
        } else {
            toml::from_str(&self.text).map_err(|error| unusable(&place(&self.text, &error)))
        };
        config.map_err(|error| error.context(format!("{} cannot be used", self.path.display())))
    }
}

impl Config {
    /// What is set in the file that is named, or that is found; see [`Found::open`].
    ///
    /// # Errors
    /// [`Code::Config`]: an unknown key, a value that it cannot have.
    pub fn load(file: Option<&Path>) -> Result<Self> {
        let Some(found) = Found::open(file)? else { return Ok(Self::default()) };
        for (key, reason) in &found.unused {
            tracing::debug!("{}: {key} is not used: {reason}", found.path.display());
        }
        found.config()
    }

    /// Loads the configuration; on failure the defaults, with the reason in [`Config::broken`].
    pub fn load_or_broken(file: Option<&Path>) -> Self {
        Self::load(file).unwrap_or_else(|error| Self { broken: Some(error), ..Self::default() })
    }

    /// Fails if the configuration is broken, because the defaults are not the administrator's choice.
    ///
    /// # Errors
    /// [`Code::Config`]
    pub fn usable(&self) -> Result<()> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// What our keys say.
    pub fn from_table(table: toml::Table) -> Result<Self> {
        table.try_into().map_err(|error: toml::de::Error| unusable(error.message()))
    }

    /// Who may ask an engine's container for GPUs, and for what.
    pub fn accepted(&self) -> Accepted {
        let default = Accepted::default();
        let swarm = self.swarm_resource.as_deref().unwrap_or_default();
        Accepted {
            annotation_prefixes: self.annotation_prefixes.clone().unwrap_or(default.annotation_prefixes),
            volume_mounts: self.accept_nvidia_visible_devices_as_volume_mounts,
            unprivileged_environment: self
                .accept_nvidia_visible_devices_envvar_when_unprivileged
                .unwrap_or(default.unprivileged_environment),
            swarm_resources: swarm
                .split(',')
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .map(Into::into)
                .collect(),
            imex_channels: !self.ignore_imex_channel_requests,
        }
    }

    /// What the administrator allows.
    ///
    /// # Errors
    /// [`Code::Config`] for a broken configuration, [`Code::BadCapability`] for an unknown capability.
    pub fn policy(&self) -> Result<Policy> {
        self.usable()?;
        let default = Policy::default();
        let mut policy = Policy {
            disable_require: self.disable_require,
            forward_compat: self.forward_compat.unwrap_or(default.forward_compat),
            ..default
        };
        if let Some(names) = &self.supported_driver_capabilities {
            let allowed = crate::request::capability::parse(names, "supported-driver-capabilities", &[])?;
            policy.supported_capabilities = allowed.unwrap_or(DriverCapability::empty());
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(text: &str) -> Result<Config> {
        Config::from_table(text.parse().unwrap())
    }

    #[test]
    fn keys_are_known_or_refused() {
        let config = ours("driver-root = \"/run/nvidia/driver\"\nshm-size = \"8g\"\n").unwrap();
        assert_eq!(config.driver_root.as_deref(), Some(Path::new("/run/nvidia/driver")));
        let message = ours("drivr-root = \"/\"").unwrap_err().to_string();
        assert!(message.starts_with("error[GPU-0002]") && message.contains("drivr-root"), "{message}");
    }

    #[test]
    fn a_wrong_type_names_the_key_and_its_line() {
        let found = |is_toolkits, text: &str| {
            let table =
                if is_toolkits { toolkit::ours(&text.parse().unwrap()).0 } else { text.parse().unwrap() };
            Found { path: "/x".into(), is_toolkits, text: text.into(), table, unused: Vec::new() }
        };
        for (is_toolkits, text, place) in [
            (false, "# x\ndisable-require = \"yes\"\n", "line 2, disable-require: "),
            (false, "driver-root = 1", "line 1, driver-root: "),
            (false, "\nno-such-key = 1", "line 2, no-such-key: "),
            (
                true,
                "# x\ndisable-require = \"yes\"\n",
                "line 2: disable-require is true or false, and here a string",
            ),
            (
                true,
                "[nvidia-container-runtime]\n\ndebug = true\n",
                "line 3: nvidia-container-runtime.debug is a text, and here a boolean",
            ),
            (
                true,
                "[nvidia-container-runtime]\nruntimes = \"runc\"\n",
                "line 2: nvidia-container-runtime.runtimes is a list of texts, and here a string",
            ),
            (
                true,
                "nvidia-container-cli = 5\n",
                "line 1: nvidia-container-cli is a table, and here a integer",
            ),
            (
                true,
                "[nvidia-container-runtime]\nlog-level = \"loud\"\n",
                "line 2: nvidia-container-runtime.log-level is one of ",
            ),
        ] {
            let error = found(is_toolkits, text).config().unwrap_err();
            assert!(error.cause_line().contains(place), "{text}: {error}");
            assert!(error.what().contains("/x cannot be used"), "{error}");
        }
        let broken = Config { broken: Some(Error::new(Code::Config, "x")), ..Config::default() };
        assert!(broken.policy().is_err() && broken.usable().is_err());
    }

    #[test]
    fn every_key_has_its_meaning_and_every_meaning_its_key() {
        let message = ours("x = 1").unwrap_err().to_string();
        let known: Vec<&str> = message.split('`').skip(1).step_by(2).filter(|word| *word != "x").collect();
        let mut told: Vec<&str> =
            SETTINGS.iter().map(|setting| setting.key).filter(|key| !key.is_empty()).collect();
        assert!(known.len() > 10, "{message}");
        for key in known.iter().filter(|key| **key != "gpurun config") {
            assert!(told.contains(key), "SETTINGS lacks {key}");
            told.retain(|other| other != key);
        }
        assert!(told.is_empty(), "no such keys: {told:?}");
    }

    #[test]
    fn nvidias_decisions_hold() {
        let (table, unused) = toolkit::ours(
            &r#"
            disable-require = true
            swarm-resource = "DOCKER_RESOURCE_GPU, OTHER"
            accept-nvidia-visible-devices-envvar-when-unprivileged = false
            accept-nvidia-visible-devices-as-volume-mounts = true
            supported-driver-capabilities = "compute,utility"
            whatever = { is = "here" }
            [nvidia-container-cli]
            root = "/run/nvidia/driver"
            environment = []
            ldconfig = "@/sbin/ldconfig.real"
            [nvidia-container-runtime]
            debug = "/var/log/x.log"
            log-level = "warn"
            runtimes = ["docker-runc", "runc"]
            [nvidia-container-runtime.modes.cdi]
            annotation-prefixes = ["x/"]
            [nvidia-container-runtime.modes.legacy]
            cuda-compat-mode = "disabled"
            [features]
            ignore-imex-channel-requests = true
            "#
            .parse()
            .unwrap(),
        );
        assert_eq!(unused, [("nvidia-container-cli.ldconfig", "no ldconfig is run")]);
        let config = Config::from_table(table).unwrap();
        assert_eq!(
            config.accepted(),
            Accepted {
                annotation_prefixes: vec!["x/".into()],
                volume_mounts: true,
                unprivileged_environment: false,
                swarm_resources: vec!["DOCKER_RESOURCE_GPU".into(), "OTHER".into()],
                imex_channels: false,
            }
        );
        let policy = config.policy().unwrap();
        assert_eq!(policy.supported_capabilities, DriverCapability::DEFAULT);
        assert!(policy.disable_require && !policy.forward_compat);
        assert_eq!(config.driver_root.as_deref(), Some(Path::new("/run/nvidia/driver")));
        assert_eq!(config.log_file.as_deref(), Some(Path::new("/var/log/x.log")));
        assert_eq!((config.log_level, config.runtimes.unwrap().len()), (LogLevel::Warning, 2));
    }

    #[test]
    fn nvidias_own_defaults_change_nothing() {
        let text = toolkit::default_text();
        let (table, unused) = toolkit::ours(&text.parse().unwrap());
        assert!(unused.is_empty(), "{unused:?}");
        let config = Config::from_table(table).unwrap();
        assert_eq!(config.accepted(), Accepted::default());
        assert_eq!(config.policy().unwrap(), Policy::default());
        assert_eq!((config.driver_root, config.log_level), (None, LogLevel::Info));
        let (empty, _) = toolkit::ours(&"[nvidia-container-cli]\nroot = \"\"\n[features]\n".parse().unwrap());
        assert!(empty.is_empty(), "an empty text is nothing");
    }
}
