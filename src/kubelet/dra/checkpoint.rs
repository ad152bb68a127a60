//! The prepared claims. They are kept in a file, so that the successor of a killed process knows them.

use gpurun::{
    apply::whole_file,
    error::{Code, Error, OrFail, Result},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// The prepared claims, and their file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kept: Kept,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    /// After a reboot no container runs that has a device, and devices may be others.
    boot_id: String,
    /// By UID.
    claims: BTreeMap<String, Prepared>,
}

impl Kept {
    fn parse(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).or_fail(Code::StateDir, || "it is not a checkpoint of this program")
    }
}

/// Reads a checkpoint for the fuzzer: a written checkpoint must read back equal.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok(kept) = Kept::parse(bytes) else { return };
    let text = serde_json::to_string(&kept).expect("it was JSON");
    assert_eq!(Kept::parse(text.as_bytes()).expect("it was written"), kept);
    let all = Checkpoint { path: PathBuf::new(), kept };
    for (uid, claim) in &all.kept.claims {
        let _ = (all.holder(uid, claim), all.holder("", claim));
    }
}

/// A claim that is prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Of the claim.
    pub namespace: String,
    /// Of the claim.
    pub name: String,
    /// What it has got.
    pub devices: Vec<Device>,
}

/// A device of a prepared claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The request in the claim.
    pub request: String,
    /// Name in the pool.
    pub name: String,
    /// Its own.
    pub uuid: String,
    /// That of the GPU which it is, or is a part of.
    pub gpu: String,
    /// See [`super::claim::Allocated::admin`].
    pub admin: bool,
}

impl Checkpoint {
    /// What a process of this boot has left. A file that cannot be understood is said, laid aside and not used.
    pub fn open(path: &Path, boot_id: &str) -> Self {
        let nothing = || Kept { boot_id: boot_id.into(), claims: BTreeMap::new() };
        let failed = || format!("{} cannot be used", path.display());
        let kept = match fs::read(path) {
            Ok(text) => Kept::parse(&text).map_err(|error| error.context(failed())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(nothing()),
            Err(error) => Err(error).or_fail(Code::StateDir, failed),
        };
        let kept = kept.unwrap_or_else(|error| {
            let aside = path.with_extension("damaged");
            let fix = format!("it is {} now; drain the node before claims get its devices", aside.display());
            tracing::error!("{}", error.fix(fix));
            let _ = fs::rename(path, aside);
            nothing()
        });
        Self { path: path.into(), kept: if kept.boot_id == boot_id { kept } else { nothing() } }
    }

    /// The claim of this UID, if it is prepared.
    pub fn claim(&self, uid: &str) -> Option<&Prepared> {
        self.kept.claims.get(uid)
    }

    /// How many are prepared.
    pub fn len(&self) -> usize {
        self.kept.claims.len()
    }

    /// A claim is prepared.
    ///
    /// # Errors
    /// [`Code::NotAllowed`] if another one has a device of it: the pod that was deleted by force may run still.
    /// [`Code::StateDir`] if it cannot be kept; then it is not prepared.
    pub fn prepare(&mut self, uid: &str, claim: Prepared) -> Result<()> {
        if let Some((other, device)) = self.holder(uid, &claim) {
            return Err(Error::new(Code::NotAllowed, format!("{device} is another claim's still"))
                .cause(format!("{}/{} has it, and was not given back yet", other.namespace, other.name))
                .fix(format!(
                    "wait until its pod has ended; if the kubelet has forgotten it, drain the node, remove {} and start the \
                     plugin again",
                    self.path.display()
                )));
        }
        let before = self.kept.claims.insert(uid.into(), claim);
        self.write().inspect_err(|_| match before {
            Some(before) => drop(self.kept.claims.insert(uid.into(), before)),
            None => drop(self.kept.claims.remove(uid)),
        })
    }

    /// A claim is taken back, if it was prepared.
    ///
    /// # Errors
    /// [`Code::StateDir`] if that cannot be kept; then it is prepared still.
    pub fn take_back(&mut self, uid: &str) -> Result<()> {
        let Some(before) = self.kept.claims.remove(uid) else { return Ok(()) };
        self.write().inspect_err(|_| drop(self.kept.claims.insert(uid.into(), before)))
    }

    /// The other claim that has a device of this one, and the device's name.
    fn holder(&self, uid: &str, claim: &Prepared) -> Option<(&Prepared, &str)> {
        // A GPU that was cut, or is whole again, while a claim has it.
        let is_part = |one: &Device, whole: &Device| one.gpu == whole.uuid;
        let is_both = |one: &Device, other: &Device| {
            let same = one.uuid == other.uuid || is_part(one, other) || is_part(other, one);
            same && !one.admin && !other.admin
        };
        let others = self.kept.claims.iter().filter(|(other, _)| *other != uid);
        others.into_iter().find_map(|(_, other)| {
            let taken = |device: &&Device| claim.devices.iter().any(|own| is_both(own, device));
            Some((other, other.devices.iter().find(taken)?.name.as_str()))
        })
    }

    fn write(&self) -> Result<()> {
        let text = serde_json::to_string(&self.kept).or_fail(Code::Internal, || "claims are no JSON")?;
        whole_file::write(&self.path, &text, Code::StateDir).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(uuid: &str, admin: bool) -> Prepared {
        let (request, name) = ("gpus".into(), "gpu-0".into());
        let gpu = uuid.split_once('.').map_or(uuid, |(gpu, _)| gpu).into();
        let device = Device { request, name, uuid: uuid.into(), gpu, admin };
        Prepared { namespace: "ml".into(), name: "train".into(), devices: vec![device] }
    }

    #[test]
    fn what_is_prepared_outlives_the_process_and_not_the_boot() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("checkpoint.json");
        let mut first = Checkpoint::open(&path, "boot 1");
        first.prepare("uid-1", claim("GPU-0", false)).unwrap();
        first.prepare("uid-2", claim("GPU-1", false)).unwrap();
        first.take_back("uid-2").unwrap();
        first.take_back("unknown").unwrap();
        let next = Checkpoint::open(&path, "boot 1");
        assert_eq!((next.claim("uid-1"), next.len()), (Some(&claim("GPU-0", false)), 1));
        assert_eq!(Checkpoint::open(&path, "boot 2").len(), 0);
        fs::write(&path, "{\"bootId\": \"bo").unwrap();
        assert_eq!(Checkpoint::open(&path, "boot 1").len(), 0);
    }

    #[test]
    fn a_device_is_one_claims_and_those_who_watch_over_it_see_it_too() {
        let directory = tempfile::tempdir().unwrap();
        let mut all = Checkpoint::open(&directory.path().join("checkpoint.json"), "boot");
        all.prepare("uid-1", claim("GPU-0", false)).unwrap();
        all.prepare("uid-1", claim("GPU-0", false)).unwrap();
        let error = all.prepare("uid-2", claim("GPU-0", false)).unwrap_err();
        assert!(error.to_string().contains("ml/train has it"), "{error}");
        all.prepare("watcher", claim("GPU-0", true)).unwrap();
        assert!(all.prepare("uid-3", claim("GPU-0.part", false)).is_err(), "a part of somebody's GPU");
        all.take_back("uid-1").unwrap();
        all.prepare("uid-2", claim("GPU-0.part", false)).unwrap();
        all.prepare("uid-3", claim("GPU-0.other", false)).unwrap();
        assert!(all.prepare("uid-4", claim("GPU-0", false)).is_err(), "a GPU whose parts are somebody's");
    }

    #[test]
    fn what_cannot_be_kept_is_not_prepared() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let path = file.join("checkpoint.json");
        let mut all = Checkpoint::open(&path, "boot");
        assert!(all.prepare("uid-1", claim("GPU-0", false)).is_err());
        assert!(all.claim("uid-1").is_none());
    }
}
