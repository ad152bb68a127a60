//! The corridor: one file a verb, its pipeline on one screen.
#![forbid(unsafe_code)]

pub mod cdi;
mod cdi_hooks;
pub mod config;
pub mod configure;
pub mod demo;
pub mod doctor;
mod engine;
pub mod hook;
pub mod images;
pub mod inventory;
pub mod ls;
pub mod nvidia_container_cli;
pub mod nvidia_ctk;
pub mod plan;
pub mod run;
pub mod runtime;

use crate::{
    cli::{Global, Pulling, environment},
    config::Config,
    error::{Code, Error, Result},
    image::{
        Pull, Store,
        registry::{Progress, When},
    },
    inventory::{Host, Inventory},
    own_directory::{self, Purpose},
    plan::{Injection, Policy},
    request::DeviceRequest,
};
use std::path::PathBuf;

/// What every verb knows: where the host's facts are, where gpurun keeps its own, and what the administrator set.
#[derive(Debug)]
pub struct Context {
    /// Where the host's facts are read from.
    pub host: Host,
    /// The configuration.
    pub config: Config,
    /// The file that was named for it.
    pub config_file: Option<PathBuf>,
    /// Inventory snapshot, compiled filters: `GPURUN_STATE_DIR`.
    pub state_dir: PathBuf,
    /// Images and scratch directories: `GPURUN_STORE`.
    pub store_dir: PathBuf,
    /// `--json`
    pub json: bool,
    /// Whether containers have the caller's own access to devices: containers of the launcher, and of an engine without root.
    pub is_callers: bool,
}

impl Context {
    /// What was typed, and where nothing was, the configuration and the defaults.
    pub fn new(global: &Global) -> Result<Self> {
        let config = Config::load_or_broken(global.config.as_deref());
        let host = match &global.simulated_host {
            Some(dir) => Host::simulated(dir),
            None => Host::new(
                global
                    .driver_root
                    .as_ref()
                    .or(config.driver_root.as_ref())
                    .cloned()
                    .unwrap_or_else(|| "/".into()),
                global.dev_root.as_ref().or(config.dev_root.as_ref()).cloned(),
            ),
        };
        let root = rustix::process::geteuid().is_root();
        let dir = |key: &str, root_dir: &str, user_key: &'static str, user_dir: &str| {
            let named = environment::variable(key).map(PathBuf::from);
            let user = || own_directory::named_by(user_key, Purpose::Write).map(|d| d.join("gpurun"));
            let home = || {
                own_directory::home(Purpose::Write).map(|d| d.join(user_dir)).ok_or_else(|| {
                    // Not /tmp: another user could make the directory first and exchange files in it.
                    Error::new(
                        Code::Usage,
                        "there is no directory for gpurun's files: HOME is not set, or belongs to another user",
                    )
                    .fix(format!(
                        "export HOME=DIR or {key}=DIR with a directory of your own; after su, use su - USER"
                    ))
                })
            };
            match named {
                Some(dir) => Ok(dir),
                None if root => Ok(root_dir.into()),
                None => user().map_or_else(home, Ok),
            }
        };
        Ok(Self {
            host,
            config,
            config_file: global.config.clone(),
            state_dir: dir("GPURUN_STATE_DIR", "/run/gpurun", "XDG_RUNTIME_DIR", ".cache/gpurun")?,
            store_dir: dir("GPURUN_STORE", "/var/lib/gpurun", "XDG_DATA_HOME", ".local/share/gpurun")?,
            json: global.json,
            is_callers: true,
        })
    }

    /// The image store, with the bound that the administrator set.
    pub fn store(&self) -> Result<Store> {
        let quota = self
            .config
            .store_quota
            .as_deref()
            .map(|text| run::sizes::size("store-quota", text))
            .transpose()?;
        Ok(Store::open(&self.store_dir)?.with_quota(quota))
    }

    /// The settings for a pull. `quiet` overrides the kind of progress.
    ///
    /// # Errors
    /// [`Code::Config`] for a broken configuration, which may have named mirrors.
    pub fn pull(&self, when: When, pulling: &Pulling, quiet: bool) -> Result<Pull> {
        self.config.usable()?;
        Ok(Pull {
            when,
            platform: pulling.platform.clone().unwrap_or_default(),
            progress: if quiet { Progress::None } else { pulling.progress },
            insecure: self.config.insecure_registries.clone(),
            mirrors: self.config.registry_mirrors.clone(),
        })
    }

    /// The host's facts, from the snapshot if it is still true.
    ///
    /// # Errors
    /// [`Code::Config`] for a broken configuration, which may have named the driver's root.
    pub fn inventory(&self) -> Result<Inventory> {
        self.config.usable()?;
        Inventory::current(&self.host, &self.state_dir).map_err(|error| match self.host.proc.parent() {
            // A simulated host is a directory with its own proc.
            Some(dir) if !self.host.proc.is_dir() => Error::new(
                Code::Usage,
                format!("--simulated-host {} is not a simulated host", dir.display()),
            )
            .fix("name a directory that `gpurun demo --keep DIR` has made, or unset GPURUN_SIMULATED_HOST"),
            _ => error,
        })
    }

    /// The host's facts, and which nodes this process may open.
    pub fn inventory_of_caller(&self) -> Result<Inventory> {
        self.inventory().map(|inventory| self.seen_by_caller(inventory))
    }

    /// A container of root's engine is not in a cgroup of this process, so the access of this process is irrelevant.
    fn seen_by_caller(&self, mut inventory: Inventory) -> Inventory {
        if self.is_callers {
            inventory.find_closed();
        }
        inventory
    }

    /// What a container gets for what it asks. A GPU that was lost when the snapshot was written may be back, and nothing that stat
    /// sees has changed then: the host is read again before anybody is refused it.
    pub fn plan(&self, request: &DeviceRequest, policy: &Policy) -> Result<Injection> {
        match crate::plan::plan(&self.inventory_of_caller()?, request, policy) {
            Err(error) if error.code() == Code::GpuLost => {
                let inventory = Inventory::anew(&self.host, &self.state_dir)?;
                crate::plan::plan(&self.seen_by_caller(inventory), request, policy)
            }
            planned => planned,
        }
    }
}
