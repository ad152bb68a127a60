//! Images: from a name to the directories that a container's root is stacked from.
//!
//! ```text
//!  text ─► ImageReference ─► Layout ─────► manifest ──► Image ─► root(): lower directories, topmost first
//!                            (a directory  (documents,     │
//!                             or a tar)     checked)       └─► layer ─► unpack, for each that the store lacks
//! ```
//!
//! All of it is hostile input: names, documents, tar streams. Every byte is checked against its digest before a layer is
//! in the store; what is in the store is the caller's own and is trusted. A second start reads two small files.
#![forbid(unsafe_code)]

mod digest;
mod layer;
mod layout;
mod manifest;
mod reference;
mod store;
mod tar;
pub mod tree;
mod unpack;

pub use digest::Digest;
pub use reference::ImageReference;
pub use store::{Store, StoredImage};
pub use unpack::Ownership;

use crate::{
    error::{Code, Error, OrFail, Result},
    vocabulary::EnvVar,
};
use layer::Layer;
use layout::{Layout, Stamp};
use manifest::{ConfigFile, Defaults, Found};
use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use store::Record;

/// What a shell finds its commands by where an image says nothing; Docker's default.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container of the image gets that the user says nothing about (OCI image specification, config.md).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// The environment.
    pub env: Vec<EnvVar>,
    /// The first words of the command, which `--entrypoint` replaces.
    pub entrypoint: Vec<String>,
    /// The words after them, which the user's own replace.
    pub cmd: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty: root.
    pub user: String,
    /// Where the command starts; empty: `/`.
    pub working_dir: String,
    /// The author's remarks.
    pub labels: BTreeMap<String, String>,
    /// Directories whose content should outlive the image's.
    pub volumes: Vec<String>,
    /// What ends the container: `SIGTERM`, `15`; `None`: SIGTERM.
    pub stop_signal: Option<String>,
}

/// An image that was found, with its configuration; its layers may be unpacked already.
#[derive(Debug)]
pub struct Image {
    config: ImageConfig,
    root: Root,
}

#[derive(Debug)]
enum Root {
    /// A directory that is there.
    Directory(PathBuf),
    /// Layers of the store.
    Layers {
        id: Digest,
        reference: ImageReference,
        /// Lowest first.
        layers: Vec<Layer>,
        /// Where missing ones come from, if that is open already.
        layout: Option<Layout>,
    },
}

impl Image {
    /// Finds an image and reads its configuration. No layer is read.
    ///
    /// # Errors
    /// [`Code::ImageNotFound`] where there is none of that name, [`Code::ImageBroken`] and [`Code::DigestMismatch`] where its
    /// documents are wrong, [`Code::WrongPlatform`] where it is for another machine.
    pub fn open(reference: &ImageReference, store: &Store) -> Result<Self> {
        let version = match reference {
            ImageReference::Registry(name) => {
                let what = format!("{name:?} is not on this machine, and this build pulls nothing yet");
                return Err(Error::new(Code::ImageNotFound, what)
                    .fix(format!(
                        "fetch it with `skopeo copy docker://{name} oci-archive:image.tar` and run oci-archive:image.tar, \
                         or with `docker save -o image.tar {name}` and run docker-archive:image.tar"
                    )));
            }
            ImageReference::Rootfs(path) => return Self::directory(path),
            ImageReference::Host => return Self::directory(Path::new("/")),
            ImageReference::OciDir { path, .. } => path.join("index.json"),
            ImageReference::OciArchive { path, .. } | ImageReference::DockerArchive { path, .. } => {
                path.clone()
            }
        };
        let name = absolute_name(reference)?;
        // Before the bytes are read: if they change meanwhile, the next start sees another version.
        let stamp = Stamp::of(&version);
        if let Some(record) = store.record(&name)
            && record.stamp.is_some()
            && record.stamp == stamp
            && let Some(config) = store.blob(&record.id)
        {
            let config = ImageConfig::read(&config)?;
            let root = Root::Layers {
                id: record.id,
                reference: reference.clone(),
                layers: record.layers,
                layout: None,
            };
            return Ok(Self { config, root });
        }
        let layout = open_layout(reference, store)?;
        let found = match reference {
            ImageReference::DockerArchive { reference, .. } => {
                manifest::from_docker(&layout, reference.as_deref())
            }
            ImageReference::OciDir { tag, .. } | ImageReference::OciArchive { tag, .. } => {
                manifest::from_oci(&layout, tag.as_deref())
            }
            _ => Err(Error::new(Code::Internal, "this kind of image has no documents")),
        };
        let Found { id, config, layers } =
            found.map_err(|error| error.context(format!("{name} cannot be used")))?;
        let parsed = ImageConfig::read(&config)?;
        store.put_blob(&id, &config)?;
        let stamp = stamp.filter(Stamp::is_settled);
        store.put_record(&Record { name, id: id.clone(), stamp, layers: layers.clone() })?;
        let root = Root::Layers { id, reference: reference.clone(), layers, layout: Some(layout) };
        Ok(Self { config: parsed, root })
    }

    /// What a container of it gets that the user says nothing about.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// The configuration file's digest, which tells images apart; an unpacked root has none.
    pub fn id(&self) -> Option<&Digest> {
        match &self.root {
            Root::Directory(_) => None,
            Root::Layers { id, .. } => Some(id),
        }
    }

    /// The directories of the root, topmost first, as overlayfs takes its lower directories. Layers that the store lacks
    /// are unpacked first.
    ///
    /// Mount them `nodev`, and with `userxattr` unless root of the initial user namespace does: whiteouts are made for that.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`], [`Code::ImageBroken`] and [`Code::LayerRefused`] where a layer is not what it should be,
    /// [`Code::Store`] where it cannot be kept.
    pub fn root(&self, store: &Store) -> Result<Vec<PathBuf>> {
        let (reference, layers, layout) = match &self.root {
            Root::Directory(path) => return Ok(vec![path.clone()]),
            Root::Layers { reference, layers, layout, .. } => (reference, layers, layout),
        };
        // overlayfs refuses to stack a directory twice (ELOOP). Where a layer comes twice, the upper one alone shows the
        // same: all that the lower one has is in the upper one too.
        let mut seen = HashSet::new();
        let layers: Vec<_> = layers.iter().rev().filter(|layer| seen.insert(&layer.diff_id)).collect();
        let missing: Vec<_> =
            layers.iter().copied().filter(|layer| !store.has_layer(&layer.diff_id)).collect();
        if !missing.is_empty() {
            match layout {
                Some(layout) => unpack_missing(&missing, layout, store)?,
                None => unpack_missing(&missing, &open_layout(reference, store)?, store)?,
            }
        }
        Ok(layers.iter().map(|layer| store.layer_path(&layer.diff_id)).collect())
    }

    fn directory(path: &Path) -> Result<Self> {
        let found = path.canonicalize().ok().filter(|path| path.is_dir()).ok_or_else(|| {
            Error::new(Code::ImageNotFound, format!("there is no directory {}", path.display())).fix(
                "rootfs: takes the top directory of an unpacked root; \
                      a tar file of an image is oci-archive: or docker-archive:",
            )
        })?;
        let config = ImageConfig {
            env: vec![("PATH".into(), DEFAULT_PATH.into())],
            cmd: vec!["/bin/sh".into()],
            ..ImageConfig::default()
        };
        Ok(Self { config, root: Root::Directory(found) })
    }
}

impl ImageConfig {
    fn read(file: &[u8]) -> Result<Self> {
        let file: ConfigFile = manifest::parse(file, "the image's configuration")?;
        // Again at every start: a store may be carried to another machine.
        file.check_platform()?;
        let Defaults { env, entrypoint, cmd, user, working_dir, labels, volumes, stop_signal } = file.config;
        let words =
            env.iter().chain(&entrypoint).chain(&cmd).chain([&user, &working_dir]).chain(volumes.keys());
        if words.into_iter().any(|word| word.contains('\0')) {
            return Err(Error::new(Code::ImageBroken, "a word of the image's configuration holds a NUL")
                .cause("no command line, variable or path can hold one"));
        }
        Ok(Self {
            env: env.iter().filter_map(|text| variable(text)).collect(),
            entrypoint,
            cmd,
            user,
            working_dir,
            labels,
            volumes: volumes.into_keys().collect(),
            stop_signal: Some(stop_signal).filter(|signal| !signal.is_empty()),
        })
    }
}

/// `NAME=value`; a variable without a value is empty, one without a name is none.
fn variable(text: &str) -> Option<EnvVar> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
}

fn open_layout(reference: &ImageReference, store: &Store) -> Result<Layout> {
    match reference {
        ImageReference::OciDir { path, .. } => Layout::directory(path),
        ImageReference::OciArchive { path, .. } | ImageReference::DockerArchive { path, .. } => {
            Layout::archive(path, store)
        }
        _ => Err(Error::new(Code::Internal, "this kind of image has no files")),
    }
}

/// The name by which an image is remembered, whatever the working directory.
fn absolute_name(reference: &ImageReference) -> Result<String> {
    let mut reference = reference.clone();
    if let ImageReference::OciDir { path, .. }
    | ImageReference::OciArchive { path, .. }
    | ImageReference::DockerArchive { path, .. } = &mut reference
    {
        *path = std::path::absolute(&*path)
            .or_fail(Code::ImageReference, || format!("{} is no path", path.display()))?;
    }
    Ok(reference.to_string())
}

/// Unpacks layers, as many at a time as there are processors; the first failure ends it.
fn unpack_missing(missing: &[&Layer], layout: &Layout, store: &Store) -> Result<()> {
    let ownership = Store::ownership();
    let workers = thread::available_parallelism().map_or(1, usize::from).min(missing.len());
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        while let Some(layer) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            let unpacked = store
                .add_layer(&layer.diff_id, |root| layer.unpack(layout.open(&layer.path)?, root, ownership));
            if let Err(error) = unpacked {
                next.store(missing.len(), Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests;
