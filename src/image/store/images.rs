//! The images of a store: which name stands for which configuration and layers.

use super::{BLOBS, Digest, IMAGES, Store, Version, damaged, marker::is_hex, short};
use crate::{
    error::{Code, Error, Result},
    image::{layer::Layer, manifest},
};
use rustix::{
    fs::{AtFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, statat, unlinkat},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    time::{Duration, SystemTime},
};

/// The fewest digits by which an image can be named, as with Docker's and Podman's commands.
const MIN_ID: usize = 3;

/// What an image's name stood for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The name, with its path made absolute.
    pub name: String,
    /// The configuration file's digest: the image's identity.
    pub id: Digest,
    /// Which version of the image that was; `None` where its file had only just been written, and of a registry's.
    pub stamp: Option<Version>,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// An image that was opened before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// As it was opened.
    pub name: String,
    /// The configuration file's digest.
    pub id: Digest,
    /// Of its layers as they were delivered, in bytes.
    pub size: u64,
    /// Of those that other images have, too.
    pub shared: u64,
    /// Its layers, lowest first.
    pub layers: Vec<Digest>,
    /// How many of its layers are not in the store: its pull was killed, or it was only looked at.
    pub missing: usize,
    /// When it was built, as its configuration says (RFC 3339); `None` where that says nothing.
    pub created: Option<String>,
    /// When it was opened last.
    pub last_used: SystemTime,
}

impl Store {
    /// Forgets a name; whether it was known. Layers go when [`Store::prune`] comes.
    pub fn forget(&self, name: &str) -> Result<bool> {
        match unlinkat(&self.directory, record_path(name), AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(damaged("a record cannot be removed", errno)),
        }
    }

    /// The names of the image whose id begins so: `sha256:HEX`, HEX, or its first digits.
    ///
    /// # Errors
    /// [`Code::ImageNotFound`] where several images' ids begin so.
    pub fn names_of_id(&self, id: &str) -> Result<Vec<String>> {
        let hex = id.strip_prefix("sha256:").unwrap_or(id);
        if hex.len() < MIN_ID || !is_hex(hex, hex.len()) {
            return Ok(Vec::new());
        }
        let records = self.records()?;
        let found: Vec<_> = records.iter().filter(|(record, _)| record.id.hex().starts_with(hex)).collect();
        if found.iter().any(|(record, _)| record.id != found[0].0.id) {
            let ids: Vec<_> = found.iter().map(|(record, _)| &record.id.hex()[..12]).collect();
            return Err(Error::new(
                Code::ImageNotFound,
                format!("the ids of several images begin with {hex}"),
            )
            .cause(ids.join(", "))
            .fix("type more digits of the id, or the name (`gpurun images`)"));
        }
        Ok(found.into_iter().map(|(record, _)| record.name.clone()).collect())
    }

    /// Removes the configurations of which no image is made. One whose content is not what its name promises was not made by
    /// gpurun, or is damaged, and stays.
    pub fn prune_blobs(&self) -> Result<()> {
        let blobs = self.names(BLOBS)?;
        let records = self.records()?;
        let used: HashSet<&str> = records.iter().map(|(record, _)| record.id.hex()).collect();
        for blob in blobs.iter().filter(|blob| !used.contains(blob.as_str())) {
            let path = format!("{BLOBS}/{blob}");
            let Ok(digest) = Digest::parse(blob) else { continue };
            if !self.read(&path).is_ok_and(|bytes| digest.matches(&bytes)) {
                continue;
            }
            match unlinkat(&self.directory, path, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(damaged("a configuration cannot be removed", errno)),
            }
        }
        Ok(())
    }

    /// What is wrong with an image: its configuration is read and checked against its digest, the layers' names against
    /// the configuration, and each layer must be there. The files in a layer were checked when they were unpacked, and bear
    /// no digest of their own.
    pub fn verify(&self, name: &str) -> Vec<String> {
        let Some(record) = self.record_of(name) else { return vec!["its record cannot be read".into()] };
        let Some(config) = self.blob(&record.id) else {
            return vec![format!("its configuration {} is missing or damaged", record.id)];
        };
        let mut wrong = Vec::new();
        match manifest::diff_ids(&config) {
            Err(error) => wrong.push(error.what().to_owned()),
            Ok(ids) if !ids.iter().eq(record.layers.iter().map(|layer| &layer.diff_id)) => {
                wrong.push("its layers are not those of its configuration".into());
            }
            Ok(_) => {}
        }
        for layer in record.layers.iter().filter(|layer| !self.has_layer(&layer.diff_id)) {
            wrong.push(format!("its layer {} is not there", layer.diff_id));
        }
        wrong
    }

    /// A configuration file; `None` where there is none that is whole.
    pub fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = self.read(&format!("{BLOBS}/{}", digest.hex())).ok()?;
        digest.matches(&bytes).then_some(bytes)
    }

    /// Keeps a configuration file.
    pub fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        self.replace(&format!("{BLOBS}/{}", digest.hex()), bytes)
    }

    /// What a name stood for when it was last opened, and marks it as used now.
    pub fn record(&self, name: &str) -> Option<Record> {
        let path = record_path(name);
        let record = self.record_of(name)?;
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times =
            Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: now };
        // A store on a full or read-only filesystem still serves what it has.
        let _ = rustix::fs::utimensat(&self.directory, path, &times, AtFlags::SYMLINK_NOFOLLOW);
        Some(record)
    }

    fn record_of(&self, name: &str) -> Option<Record> {
        let record: Record = serde_json::from_slice(&self.read(&record_path(name)).ok()?).ok()?;
        (record.name == name).then_some(record)
    }

    /// Keeps what a name stands for.
    pub fn put_record(&self, record: &Record) -> Result<()> {
        let bytes = serde_json::to_vec(record)
            .map_err(|error| damaged("an image's record cannot be written", error))?;
        self.replace(&record_path(&record.name), &bytes)
    }

    /// The images that were opened before, last used first.
    pub fn images(&self) -> Result<Vec<StoredImage>> {
        let records = self.records()?;
        let mut owners: HashMap<&Digest, usize> = HashMap::new();
        for (record, _) in &records {
            let own: HashSet<_> = record.layers.iter().map(|layer| &layer.diff_id).collect();
            for id in own {
                *owners.entry(id).or_default() += 1;
            }
        }
        let total = |layers: &mut dyn Iterator<Item = &Layer>| {
            layers.fold(0, |sum: u64, layer| sum.saturating_add(layer.size))
        };
        let mut found: Vec<StoredImage> = records
            .iter()
            .map(|(record, last_used)| StoredImage {
                size: total(&mut record.layers.iter()),
                shared: total(&mut record.layers.iter().filter(|layer| owners[&layer.diff_id] > 1)),
                layers: record.layers.iter().map(|layer| layer.diff_id.clone()).collect(),
                missing: record.layers.iter().filter(|layer| !self.has_layer(&layer.diff_id)).count(),
                created: self.blob(&record.id).and_then(|config| created(&config)),
                name: record.name.clone(),
                id: record.id.clone(),
                last_used: *last_used,
            })
            .collect();
        found.sort_by(|a, b| b.last_used.cmp(&a.last_used).then_with(|| a.name.cmp(&b.name)));
        Ok(found)
    }

    /// Every record that can be read, and when it was used last.
    pub fn records(&self) -> Result<Vec<(Record, SystemTime)>> {
        let mut found = Vec::new();
        for name in self.names(IMAGES)? {
            let path = format!("{IMAGES}/{name}");
            let record = self.read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let stat = statat(&self.directory, &path, AtFlags::SYMLINK_NOFOLLOW);
            let (Some(record), Ok(stat)) = (record, stat) else { continue };
            let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
            found.push((record, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)));
        }
        Ok(found)
    }
}

/// When an image was built, as its configuration says.
fn created(config: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Created {
        created: Option<String>,
    }
    serde_json::from_slice::<Created>(config).ok()?.created
}

fn record_path(name: &str) -> String {
    format!("{IMAGES}/{}", short(&Digest::of(name.as_bytes())))
}
