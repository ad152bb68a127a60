//! Images: from a name to the directories that a container's root is stacked from.
//!
//! ```text
//!  text ─► ImageReference ─► Layout ─────► manifest ──► Image ─► root(): lower directories, topmost first
//!                            (a directory  (documents,     │
//!                             or a tar)     checked)       └─► layer ─► unpack, for each that the store lacks
//!         a registry's name ─► registry ─► the store, by a program of its own
//!         Docker's image ─► docker_daemon ─► a tar; Podman's ─► containers_storage ─► directories that are there
//! ```
//!
//! All of it is hostile input: names, documents, tar streams. Every byte is checked against its digest before a layer is
//! in the store; what is in the store is the caller's own and is trusted. A second start reads two small files.
#![forbid(unsafe_code)]

mod compression;
mod containers_storage;
mod digest;
mod docker_daemon;
mod layer;
mod layout;
mod manifest;
mod note;
mod platform;
mod prefix;
mod progress;
mod reference;
pub mod registry;
mod reserve;
mod scratch;
mod stack;
mod store;
mod tar;
pub mod tree;
mod unpack;

pub use digest::Digest;
pub use platform::Platform;
pub use reference::{ImageReference, RegistryName};
pub use registry::Pull;
pub use scratch::ScratchDir;
pub use store::{MARKED_DIRECTORY, Pruned, Store, StoredImage, clean_tmp, is_marked};
pub use unpack::Ownership;

use crate::{
    error::{Code, Error, Result},
    vocabulary::EnvVar,
};
use layer::Layer;
use layout::{Layout, Version};
use manifest::{ConfigFile, Defaults, Found};
use progress::Unpacking;
use registry::{Progress, Step, When};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::fstat,
};
use stack::{Assembly, Stack};
use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    num::NonZero,
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
    /// Directories that are writable even in a read-only root (VOLUME).
    pub volumes: Vec<String>,
    /// What ends the container: `SIGTERM`, `15`; `None`: SIGTERM.
    pub stop_signal: Option<String>,
    /// Whether the image has a HEALTHCHECK.
    pub has_healthcheck: bool,
}

/// An image that was found, with its configuration; its layers may be unpacked already.
#[derive(Debug)]
pub struct Image {
    config: ImageConfig,
    root: Root,
    /// Layers that must not be removed as long as this image is in use.
    held: RefCell<Vec<OwnedFd>>,
    root_is_caller: bool,
    progress: Progress,
}

#[derive(Debug)]
enum Root {
    /// Directories that are there, topmost first.
    Directories(Vec<PathBuf>),
    /// Layers of the store.
    Layers {
        id: Digest,
        /// Lowest first.
        layers: Vec<Layer>,
        /// Where missing ones come from.
        source: Box<Source>,
    },
}

/// Where an image's layers come from.
#[derive(Debug)]
enum Source {
    /// A directory or an archive, open if it had to be.
    Layout(ImageReference, Option<Layout>),
    /// A registry.
    Registry(RegistryName, Pull),
}

impl Source {
    /// Puts layers into the store that it lacks.
    fn fill(&self, missing: &[&Layer], store: &Store, progress: Progress) -> Result<()> {
        match self {
            Self::Registry(name, pull) if pull.when == When::Never => {
                let what = format!("{} layers of {name} are not on this machine", missing.len());
                Err(Error::new(Code::ImageNotFound, what).fix(format!("gpurun pull {name}")))
            }
            Self::Registry(name, pull) => registry::order(store, name, Step::Layers, pull),
            Self::Layout(reference, Some(layout)) => {
                unpack_missing(missing, layout, reference, store, progress)
            }
            Self::Layout(reference, None) => {
                let layout = open_layout(reference, store, progress)?;
                unpack_missing(missing, &layout, reference, store, progress)
            }
        }
    }
}

impl Image {
    /// Finds an image and reads its configuration. No layer is read.
    ///
    /// # Errors
    /// [`Code::ImageNotFound`] if there is none of that name, [`Code::ImageBroken`] and [`Code::DigestMismatch`] if its
    /// documents are wrong, [`Code::WrongPlatform`] if it is for another machine; what [`registry::order`] meets.
    pub fn open(reference: &ImageReference, store: &Store, pull: &Pull) -> Result<Self> {
        // Before the bytes are read: if they change meanwhile, the next start sees another version.
        let version = match reference {
            ImageReference::Registry(name) => return Self::of_registry(name, store, pull),
            ImageReference::ContainersStorage(name) => return Self::of_podman(name, &pull.platform),
            ImageReference::Rootfs(path) => return Self::directory(path),
            ImageReference::Host => return Self::directory(Path::new("/")),
            ImageReference::DockerDaemon(name) => Some(Version::Id(docker_daemon::describe(name)?.id)),
            ImageReference::OciDir { path, .. } => Version::of_file(&path.join("index.json")),
            ImageReference::OciArchive { path, .. } | ImageReference::DockerArchive { path, .. } => {
                Version::of_file(path)
            }
        };
        let name = registry::record_name(&reference.absolute()?, &pull.platform);
        if let Some(record) = store.record(&name)
            && record.stamp.is_some()
            && record.stamp == version
            && let Some(config) = store.blob(&record.id)
        {
            let config = ImageConfig::read(&config, &pull.platform)?;
            let source = Box::new(Source::Layout(reference.clone(), None));
            let root = Root::Layers { id: record.id, layers: record.layers, source };
            return Ok(Self::new(config, root, pull.progress));
        }
        let layout = open_layout(reference, store, pull.progress)?;
        let found = match reference {
            ImageReference::DockerArchive { reference, .. } => {
                manifest::from_docker(&layout, reference.as_deref(), &pull.platform)
            }
            // What was saved is what was asked for.
            ImageReference::DockerDaemon(_) => manifest::from_docker(&layout, None, &pull.platform),
            ImageReference::OciDir { tag, .. } | ImageReference::OciArchive { tag, .. } => {
                manifest::from_oci(&layout, tag.as_deref(), &pull.platform)
            }
            _ => Err(Error::new(Code::Internal, "this kind of image has no documents")
                .fix("report it: gpurun --version, the command, and this message")),
        };
        let Found { id, config, layers } =
            found.map_err(|error| error.context(format!("{name} cannot be used")))?;
        let parsed = ImageConfig::read(&config, &pull.platform)?;
        store.put_blob(&id, &config)?;
        let stamp = version.filter(Version::is_settled);
        store.put_record(&Record { name, id: id.clone(), stamp, layers: layers.clone() })?;
        let source = Box::new(Source::Layout(reference.clone(), Some(layout)));
        Ok(Self::new(parsed, Root::Layers { id, layers, source }, pull.progress))
    }

    /// Where it lies: nothing of it comes into the store.
    fn of_podman(name: &str, platform: &Platform) -> Result<Self> {
        let containers_storage::Found { config, layers } = containers_storage::find(name)?;
        let config = ImageConfig::read(&config, platform)?;
        let mut image = Self::new(config, Root::Directories(layers), Progress::None);
        image.root_is_caller = !rustix::process::geteuid().is_root();
        Ok(image)
    }

    /// If the store has the name, no registry is asked.
    fn of_registry(name: &RegistryName, store: &Store, pull: &Pull) -> Result<Self> {
        let key = registry::record_name(name, &pull.platform);
        let known = || store.record(&key).and_then(|record| Some((store.blob(&record.id)?, record)));
        let found = match pull.when {
            When::Always => {
                registry::order(store, name, Step::Documents, pull)?;
                known()
            }
            When::Missing => match known() {
                None => {
                    registry::order(store, name, Step::UnknownDocuments, pull)?;
                    known()
                }
                found => found,
            },
            When::Never => known(),
        };
        let (config, record) = found.ok_or_else(|| {
            Error::new(Code::ImageNotFound, format!("{key} is not on this machine"))
                .fix(format!("gpurun pull {name}"))
        })?;
        let source = Box::new(Source::Registry(name.clone(), pull.clone()));
        let config = ImageConfig::read(&config, &pull.platform)?;
        let root = Root::Layers { id: record.id, layers: record.layers, source };
        Ok(Self::new(config, root, pull.progress))
    }

    fn new(config: ImageConfig, root: Root, progress: Progress) -> Self {
        Self { config, root, held: RefCell::default(), root_is_caller: false, progress }
    }

    /// Whether the files' owners are right only where the container's root is the caller, and its other users the caller's
    /// subordinate ids: so they are in an ordinary user's Podman.
    pub fn root_is_caller(&self) -> bool {
        self.root_is_caller
    }

    /// What a container of it gets that the user says nothing about.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// The configuration file's digest, which tells images apart; an unpacked root has none.
    pub fn id(&self) -> Option<&Digest> {
        match &self.root {
            Root::Directories(_) => None,
            Root::Layers { id, .. } => Some(id),
        }
    }

    /// The directories of the root, topmost first, as overlayfs takes its lower directories. Layers that the store lacks
    /// are unpacked first. They stay as long as this value lives.
    ///
    /// Mount them `nodev`, and with `userxattr` unless root of the initial user namespace does: whiteouts are made for that.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`], [`Code::ImageBroken`] and [`Code::LayerRefused`] if a layer is not what it should be,
    /// [`Code::Store`] if it cannot be kept.
    pub fn root(&self, store: &Store) -> Result<Vec<PathBuf>> {
        let (layers, source) = match &self.root {
            Root::Directories(paths) => return Ok(paths.clone()),
            Root::Layers { layers, source, .. } => (layers, source),
        };
        let ids: Vec<&Digest> = layers.iter().map(|layer| &layer.diff_id).collect();
        // overlayfs refuses to stack a directory twice (ELOOP). Where a layer comes twice, the upper one alone shows the
        // same: all that the lower one has is in the upper one too.
        let mut seen = HashSet::new();
        let layers: Vec<_> = layers.iter().rev().filter(|layer| seen.insert(&layer.diff_id)).collect();
        let mut held = self.held.borrow_mut();
        // Retried if another process removes a layer after it was found.
        for _ in 0..3 {
            held.clear();
            let mut missing = Vec::new();
            for layer in &layers {
                match store.hold_layer(&layer.diff_id)? {
                    Some(lock) => held.push(lock),
                    None => missing.push(*layer),
                }
            }
            if !missing.is_empty() {
                source.fill(&missing, store, self.progress)?;
                continue;
            }
            let stack = match store.stack(&ids) {
                Some(stack) => stack,
                None => assemble(&ids, &layers, &held, store, false)?,
            };
            let paths = layers.iter().take(stack.visible).map(|layer| store.layer_path(&layer.diff_id));
            if !stack.has_facts {
                return Ok(paths.collect());
            }
            let facts = stack.own_digest();
            if let Some(lock) = store.hold_layer(&facts)? {
                held.insert(0, lock);
                return Ok(std::iter::once(store.layer_path(&facts)).chain(paths).collect());
            }
            assemble(&ids, &layers, &held, store, true)?;
        }
        Err(Error::new(Code::Store, "the image's layers are removed as soon as they are there")
            .fix("let no `gpurun rmi` or `gpurun prune` run meanwhile"))
    }

    /// Checks that the paths of [`Image::root`] still lead to the store's directories: a link in the path may have been changed
    /// meanwhile.
    ///
    /// # Errors
    /// [`Code::Store`] if a path leads elsewhere.
    pub fn check_opened<'a>(&self, opened: impl Iterator<Item = &'a OwnedFd>) -> Result<()> {
        let identity = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
        for (held, opened) in self.held.borrow().iter().zip(opened) {
            if identity(held).is_err() || identity(held) != identity(opened) {
                let what = "the image store was replaced by another directory while the container started";
                return Err(Error::new(Code::Store, what)
                    .fix("name a directory in GPURUN_STORE that only you can rename or replace"));
            }
        }
        Ok(())
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
        Ok(Self::new(config, Root::Directories(vec![found]), Progress::None))
    }
}

impl ImageConfig {
    fn read(file: &[u8], platform: &Platform) -> Result<Self> {
        let file: ConfigFile = manifest::parse(file, "the image's configuration")?;
        // Again at every start: a store may be carried to another machine.
        file.check_platform(platform)?;
        let Defaults { env, entrypoint, cmd, user, working_dir, labels, volumes, stop_signal, healthcheck } =
            file.config;
        let words =
            env.iter().chain(&entrypoint).chain(&cmd).chain([&user, &working_dir]).chain(volumes.keys());
        if words.into_iter().any(|word| word.contains('\0')) {
            return Err(Error::new(Code::ImageBroken, "a word of the image's configuration holds a NUL")
                .cause("no command line, variable or path can hold one")
                .fix("rebuild the image without it: look for it with `skopeo inspect --config`"));
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
            // NONE disables the HEALTHCHECK of a parent image.
            has_healthcheck: healthcheck["Test"][0].as_str().is_some_and(|kind| kind != "NONE"),
        })
    }
}

/// `NAME=value`; a variable without a value is empty, one without a name is none.
fn variable(text: &str) -> Option<EnvVar> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
}

/// Computes how the layers are stacked, and records it in the store. `ids` are all layers, lowest first; `layers` are the
/// distinct layers, topmost first, with their directories.
fn assemble(
    ids: &[&Digest],
    layers: &[&Layer],
    held: &[OwnedFd],
    store: &Store,
    again: bool,
) -> Result<Stack> {
    let notes = layers.iter().zip(held).map(|(layer, held)| Ok((held.as_fd(), store.note(&layer.diff_id)?)));
    let assembly = Assembly::new(notes.collect::<Result<_>>()?, Store::ownership())?;
    let stack = Stack::new(ids, assembly.visible(), again || assembly.needs_facts()?);
    if stack.has_facts {
        store.add_layer(&stack.own_digest(), |root| assembly.write_facts(root))?;
    }
    store.put_stack(&stack)?;
    Ok(stack)
}

fn open_layout(reference: &ImageReference, store: &Store, progress: Progress) -> Result<Layout> {
    match reference {
        ImageReference::OciDir { path, .. } => Layout::directory(path),
        ImageReference::OciArchive { path, .. } | ImageReference::DockerArchive { path, .. } => {
            Layout::archive(path, store, progress)
        }
        ImageReference::DockerDaemon(name) => docker_daemon::save(name, store, progress),
        _ => Err(Error::new(Code::Internal, "this kind of image has no files")
            .fix("report it: gpurun --version, the command, and this message")),
    }
}

/// The most layers to unpack at a time. Each takes some MB of memory, and fewer already saturate a disk.
const MAX_WORKERS: usize = 16;

/// Unpacks layers of a layout, as many at a time as there are processors.
fn unpack_missing(
    missing: &[&Layer],
    layout: &Layout,
    reference: &ImageReference,
    store: &Store,
    progress: Progress,
) -> Result<()> {
    let _reserved = store.reserve(missing.iter().copied())?;
    let total = missing.iter().fold(0, |sum: u64, layer| sum.saturating_add(layer.size));
    store.check_room(total)?;
    let ownership = Store::ownership();
    let workers = thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    let unpacking = Unpacking::start(format!("unpacking {reference}"), Some(total), progress);
    unpack_all(missing, workers, |layer| {
        store.add_layer(&layer.diff_id, |root| {
            layer.unpack(unpacking.count(layout.open(&layer.path)?), root, ownership)
        })
    })
}

/// Does this with each layer, so many at a time; the first failure ends it. Large ones come first, so that none of them is
/// left for one processor at the end.
fn unpack_all(
    layers: &[&Layer],
    workers: NonZero<usize>,
    unpack: impl Fn(&Layer) -> Result<()> + Sync,
) -> Result<()> {
    let mut layers = layers.to_vec();
    layers.sort_by_key(|layer| Reverse(layer.size));
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        while let Some(layer) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = unpack(layer) {
                next.store(layers.len(), Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers.get().min(layers.len()).min(MAX_WORKERS) {
            scope.spawn(work);
        }
        work();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
