//! What has happened to devices, for the next process: an update of the plugin heals nothing.

use crate::health::{Clocks, Health, Remembered};
use gpurun::{
    apply::whole_file,
    error::{Code, OrFail, Result},
    inventory::Host,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The file.
#[derive(Debug)]
pub struct HealthFile {
    path: PathBuf,
    /// `/sys/module/nvidia`
    module: PathBuf,
    boot_id: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    boot_id: String,
    /// Its inode number: a module that is loaded anew, which resets every GPU, has another.
    module: u64,
    devices: BTreeMap<String, Remembered>,
}

impl HealthFile {
    /// In the directory where gpurun keeps what it knows of the host.
    pub fn new(state_dir: &Path, host: &Host) -> Self {
        Self {
            path: state_dir.join("device-health.json"),
            module: host.sys.join("module/nvidia"),
            boot_id: fs::read_to_string(host.proc.join("sys/kernel/random/boot_id"))
                .unwrap_or_default()
                .trim()
                .into(),
        }
    }

    /// What is known of the devices since the driver was loaded. A file that cannot be used is said, and not used.
    pub fn read(&self, health: &mut Health) {
        let failed =
            || format!("{} cannot be used: what happened to GPUs before is not known", self.path.display());
        let kept = match fs::read(&self.path) {
            Ok(text) => serde_json::from_slice::<Kept>(&text).or_fail(Code::StateDir, failed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => Err(error).or_fail(Code::StateDir, failed),
        };
        match kept {
            Ok(kept) if (&kept.boot_id, kept.module) == (&self.boot_id, self.module()) => {
                health.recall(Clocks::read(), kept.devices);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Keeps it.
    ///
    /// # Errors
    /// [`Code::StateDir`]
    pub fn write(&self, health: &Health) -> Result<()> {
        let devices = health.remember(Clocks::read());
        let kept = Kept { boot_id: self.boot_id.clone(), module: self.module(), devices };
        let text = serde_json::to_string(&kept).or_fail(Code::Internal, || "health is no JSON")?;
        whole_file::write(&self.path, &text, Code::StateDir).map(drop)
    }

    fn module(&self) -> u64 {
        fs::metadata(&self.module).map_or(0, |module| module.ino())
    }
}
