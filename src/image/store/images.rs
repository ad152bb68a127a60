//! The images of a store: maps names to configurations and layers.

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

/// The shortest id prefix that names an image, as in Docker and Podman.
const MIN_ID: usize = 3;

/// The configuration and layers of a name when it was last opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The name, with its path made absolute.
    pub name: String,
    /// The configuration file's digest: the image's identity.
    pub id: Digest,
    /// The version of the image's file; `None` for images of registries, and for files that were written just before.
    pub stamp: Option<Version>,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// An image that was opened before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// The name with which it was opened.
    pub name: String,
    /// The configuration file's digest.
    pub id: Digest,
    /// Size of the layers as they were delivered, in bytes.
    pub size: u64,
    /// Size of the layers that other images share, in bytes.
    pub shared: u64,
    /// The layers, lowest first.
    pub layers: Vec<Digest>,
    /// How many layers are missing from the store, because the pull was killed or the image was only inspected.
    pub missing: usize,
    /// Build time in the configuration (RFC 3339), if any.
    pub created: Option<String>,
    /// When it was last opened.
    pub last_used: SystemTime,
}

impl Store {
    /// Removes a name; returns whether it existed. [`Store::prune`] removes the layers.
    pub fn forget(&self, name: &str) -> Result<bool> {
        match unlinkat(&self.directory, record_path(name), AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(damaged("a record cannot be removed", errno)),
        }
    }

    /// The names of the image with this id: `sha256:HEX`, HEX, or a prefix.
    ///
    /// # Errors
    /// [`Code::ImageNotFound`] if several ids have the prefix.
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

    /// Removes the configurations that no image uses. A file whose content does not match its digest is damaged or was not made
    /// by gpurun, and is kept.
    pub fn prune_blobs(&self) -> Result<()> {
        let blobs = self.names(BLOBS)?;
        let records = self.records()?;
        let used: HashSet<&str> = records.iter().map(|(record, _)| record.id.hex()).collect();
        for blob in blobs.iter().filter(|blob| !used.contains(blob.as_str())) {
            let path = format!("{BLOBS}/{blob}");
            let Some(digest) = Digest::parse_hex(blob) else { continue };
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

    /// Verifies an image and returns its defects: the configuration must match its digest, the layers must match the
    /// configuration, and each layer must exist. The files in a layer were checked when they were unpacked, and have no digests
    /// of their own.
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

    /// Reads a configuration file; `None` if it is missing or damaged.
    pub fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = self.read(&format!("{BLOBS}/{}", digest.hex())).ok()?;
        digest.matches(&bytes).then_some(bytes)
    }

    /// Writes a configuration file.
    pub fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        self.replace(&format!("{BLOBS}/{}", digest.hex()), bytes)
    }

    /// The record of a name. Marks it as used now.
    pub fn record(&self, name: &str) -> Option<Record> {
        let path = record_path(name);
        let record = self.record_of(name)?;
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times =
            Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: now };
        // A store on a full or read-only filesystem still serves its images.
        let _ = rustix::fs::utimensat(&self.directory, path, &times, AtFlags::SYMLINK_NOFOLLOW);
        Some(record)
    }

    fn record_of(&self, name: &str) -> Option<Record> {
        let record: Record = serde_json::from_slice(&self.read(&record_path(name)).ok()?).ok()?;
        (record.name == name).then_some(record)
    }

    /// Writes the record of a name.
    pub fn put_record(&self, record: &Record) -> Result<()> {
        let bytes = serde_json::to_vec(record)
            .map_err(|error| damaged("an image's record cannot be written", error))?;
        self.replace(&record_path(&record.name), &bytes)
    }

    /// The images of the store, last used first.
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

    /// Every readable record, with the time of its last use.
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

/// The build time in an image's configuration.
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
