//! Images of Podman, Buildah and CRI-O, in place (containers/storage, driver `overlay`).
//!
//! ```text
//! overlay-images/images.json     names, and each image's topmost layer; images.lock
//! overlay-images/ID/manifest     the manifest; `=BASE64` of "sha256:…" the configuration
//! overlay-layers/layers.json     each layer's parent; layers.lock
//! overlay/ID/diff                a layer's files, as overlayfs takes them for a lower directory
//! ```
//!
//! Nothing is written there. The locks (fcntl(2), shared) are held while the files are read, as containers/storage does, and not
//! as long as a container runs: Podman takes the same ones alone for each pull and each removal, and would stand still meanwhile.

use super::{ImageReference, RegistryName, manifest};
use crate::{
    error::{Code, Error, Result},
    own_directory::{self, Purpose},
    regular_file,
    text_file::TextFile,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{CWD, FlockOperation, Mode, OFlags, ResolveFlags, fcntl_lock, fgetxattr, fstat, openat2},
    io::Errno,
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, HashMap},
    env,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The largest file that is read: images.json and layers.json of a store with thousands of images are some MB.
const MAX_FILE: u64 = 64 << 20;
/// How long to wait for a lock: longer than Podman takes to commit a large layer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Says that a file's owner and mode are in this attribute and not its own (storage.conf(5), `force_mask`).
const FORCED_MASK: &str = "user.containers.override_stat";

/// An image as it lies there.
#[derive(Debug)]
pub struct Found {
    /// Its configuration file.
    pub config: Vec<u8>,
    /// Its layers' directories, topmost first.
    pub layers: Vec<PathBuf>,
}

/// storage.conf(5), as far as it says where images are.
#[derive(Default, Deserialize)]
#[serde(default)]
struct StorageConf {
    storage: Storage,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Storage {
    driver: String,
    graphroot: String,
    rootless_storage_path: String,
    options: Options,
}

/// Where it is, beside the caller's own.
const SYSTEM_FILES: [&str; 2] = ["/etc/containers/storage.conf", "/usr/share/containers/storage.conf"];

#[derive(Default, Deserialize)]
#[serde(default)]
struct Options {
    additionalimagestores: Vec<String>,
}

#[derive(Deserialize)]
struct Image {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    digest: Option<String>,
    #[serde(default)]
    layer: String,
}

#[derive(Deserialize)]
struct Layer {
    id: String,
    #[serde(default)]
    parent: String,
    #[serde(default)]
    uidmap: Vec<IdMap>,
    #[serde(default)]
    gidmap: Vec<IdMap>,
    #[serde(default)]
    flags: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct IdMap {
    container_id: u32,
    host_id: u32,
}

/// A directory of containers/storage.
struct Graph {
    path: PathBuf,
    directory: OwnedFd,
}

fn unusable(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::new(Code::Store, format!("the container storage {} cannot be used", path.display())).cause(why)
}

/// The error with a general fix.
fn damaged(path: &Path, why: impl std::fmt::Display) -> Error {
    unusable(path, why).fix(
        "check it with `podman info` and `podman images`; or podman save --format oci-archive, and run oci-archive:FILE",
    )
}

/// Finds an image in the caller's container storage, and in the stores that its storage.conf adds.
///
/// # Errors
/// [`Code::Store`] if the storage cannot be used, [`Code::ImageNotFound`] if it has no such image.
pub fn find(name: &str) -> Result<Found> {
    let home = own_directory::home(Purpose::Read);
    let stores = stores(home.as_deref())?;
    let graphs: Vec<Graph> =
        stores.iter().filter_map(|path| Graph::open(path).transpose()).collect::<Result<_>>()?;
    if graphs.is_empty() {
        let all = stores.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        return Err(Error::new(Code::ImageNotFound, format!("there is no image {name} of Podman's"))
            .cause(format!("there is no container storage in {all}"))
            .fix("pull it as the same user: podman pull NAME; `sudo podman` has images of its own"));
    }
    let mut locks = Vec::new();
    let (mut names, mut layers) = (Vec::new(), HashMap::new());
    let mut found = None;
    for (at, graph) in graphs.iter().enumerate() {
        locks.push(graph.lock("overlay-images/images.lock")?);
        locks.push(graph.lock("overlay-layers/layers.lock")?);
        let images: Vec<Image> = graph.json("overlay-images/images.json")?;
        if found.is_none() {
            found = choose(&images, name)?.map(|image| (at, image.id.clone(), image.layer.clone()));
        }
        names.extend(images.into_iter().flat_map(|image| image.names.unwrap_or_default()));
        for layer in graph.json::<Layer>("overlay-layers/layers.json")? {
            layers.entry(layer.id.clone()).or_insert((at, layer));
        }
    }
    let Some((at, id, top)) = found else {
        names.sort();
        let names: Vec<_> = names.into_iter().take(20).collect();
        return Err(Error::new(Code::ImageNotFound, format!("Podman has no image {name}"))
            .cause(format!("it is not in {}", graphs[0].path.display()))
            .fix(format!("`podman pull`, or one of those that are there: {}", names.join(", "))));
    };
    let config = graphs[at].config(&id)?;
    let layers = stack(&graphs, &layers, &top)?;
    let diff_ids = manifest::diff_ids(&config)?;
    if diff_ids.len() != layers.len() {
        return Err(damaged(
            &graphs[at].path,
            format!("{name} has {} layers, and its configuration {}", layers.len(), diff_ids.len()),
        ));
    }
    Ok(Found { config, layers })
}

/// The image of this name, or of an id that begins so. Names are those of `podman images`: what was built here is in `localhost`.
fn choose<'a>(images: &'a [Image], wanted: &str) -> Result<Option<&'a Image>> {
    let named = |name: &str| {
        images.iter().find(|image| image.names.as_ref().is_some_and(|names| names.iter().any(|n| n == name)))
    };
    if let Ok(ImageReference::Registry(name)) = ImageReference::parse(wanted) {
        let here = format!("localhost/{wanted}{}", if wanted.contains([':', '@']) { "" } else { ":latest" });
        let with_digest = |name: &RegistryName| {
            let digest = name.digest.as_ref()?.to_string();
            let repository = format!("{}/{}", name.host, name.repository);
            images.iter().find(|image| {
                let of_it = |one: &String| {
                    one.rsplit_once([':', '@'])
                        .is_some_and(|(one, _)| one == repository || one == format!("{repository}@sha256"))
                };
                image.digest.as_ref() == Some(&digest) && image.names.iter().flatten().any(of_it)
            })
        };
        if let Some(image) = named(&name.to_string()).or_else(|| named(&here)).or_else(|| with_digest(&name))
        {
            return Ok(Some(image));
        }
    }
    let hex = wanted.strip_prefix("sha256:").unwrap_or(wanted);
    if hex.len() < 3 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut beginning_so = images.iter().filter(|image| image.id.starts_with(hex));
    let first = beginning_so.next();
    if beginning_so.next().is_some() {
        return Err(Error::new(
            Code::ImageNotFound,
            format!("the ids of several images of Podman's begin with {hex}"),
        )
        .fix("type more digits of the id, or the name; `podman images` lists both"));
    }
    Ok(first)
}

/// The directories from this layer down to the lowest.
fn stack(graphs: &[Graph], layers: &HashMap<String, (usize, Layer)>, top: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut id = top;
    while !id.is_empty() {
        let (at, layer) =
            layers.get(id).ok_or_else(|| damaged(&graphs[0].path, format!("its layer {id} is not there")))?;
        // One that is its own ancestor would go on for ever.
        if found.len() > layers.len() {
            return Err(damaged(&graphs[*at].path, format!("the layer {id} is its own parent")));
        }
        found.push(graphs[*at].layer(layer)?);
        id = &layer.parent;
    }
    Ok(found)
}

impl Graph {
    /// `None` if there is none.
    fn open(path: &Path) -> Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            opened => opened.map_err(|errno| damaged(path, errno))?,
        };
        let graph = Self { path: path.into(), directory };
        graph.check_owner(&graph.directory, "")?;
        for name in ["overlay-images", "overlay-layers", "overlay"] {
            let opened = match graph.open_beneath(name, flags) {
                Err(Errno::NOENT) => {
                    let other = ["vfs", "btrfs", "zfs"]
                        .into_iter()
                        .find(|driver| graph.open_beneath(&format!("{driver}-layers"), flags).is_ok());
                    return match other {
                        None => Ok(None),
                        Some(driver) => Err(unusable(path, format!("it is of the driver {driver}")).fix(
                            "gpurun reads the driver overlay (podman info); for others: podman save --format oci-archive",
                        )),
                    };
                }
                opened => opened.map_err(|errno| damaged(path, format!("{name}: {errno}")))?,
            };
            graph.check_owner(&opened, name)?;
        }
        Ok(Some(graph))
    }

    /// Files that another user can change must not become a container's root; and files of another user have owners of another
    /// user's ids.
    fn check_owner(&self, directory: impl AsFd, name: &str) -> Result<()> {
        let stat = fstat(directory).map_err(|errno| damaged(&self.path, errno))?;
        let (owner, me) = (stat.st_uid, rustix::process::geteuid().as_raw());
        let path = self.path.join(name);
        if owner != me {
            return Err(unusable(
                &self.path,
                format!("{} belongs to user {owner}, not to {me}", path.display()),
            )
            .fix("run gpurun as the user whose images they are"));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(unusable(&self.path, format!("{} can be written by others", path.display()))
                .fix(format!("chmod go-w {}", path.display())));
        }
        Ok(())
    }

    fn open_beneath(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Takes a shared lock that blocks writers until the result is dropped. After a second the wait is shown, and after
    /// [`PATIENCE`] it fails: Podman holds these locks during a commit, but a hanging process would hold them forever.
    fn lock(&self, name: &str) -> Result<Option<OwnedFd>> {
        let fail = |errno| damaged(&self.path, format!("{name}: {errno}"));
        let found = match self.open_beneath(name, OFlags::PATH) {
            // A read-only store may have no lock file.
            Err(Errno::NOENT) => return Ok(None),
            opened => opened.map_err(fail)?,
        };
        let file = match regular_file::open(&found) {
            Ok((file, _)) => OwnedFd::from(file),
            Err(error) => {
                return Err(unusable(&self.path, format!("{name}: {error}")).fix(format!(
                    "mv {0} {0}.old, and run podman info, which makes it again",
                    self.path.join(name).display()
                )));
            }
        };
        let started = Instant::now();
        let mut shown = false;
        loop {
            match fcntl_lock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(Some(file)),
                Err(Errno::AGAIN | Errno::ACCESS | Errno::INTR) => {}
                Err(errno) => return Err(fail(errno)),
            }
            let waited = started.elapsed();
            let path = self.path.join(name);
            if waited > PATIENCE {
                return Err(unusable(
                    &self.path,
                    format!("another process holds {name} since {} s", waited.as_secs()),
                )
                .fix(format!("end the process that holds it: fuser -v {}", path.display())));
            }
            if waited > Duration::from_secs(1) && !shown {
                shown = true;
                tracing::warn!(
                    "waiting for another process (podman, buildah, CRI-O) that holds {}",
                    path.display()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let fail = |cause: &dyn std::fmt::Display| damaged(&self.path, format!("{name}: {cause}"));
        let found = match self.open_beneath(name, OFlags::PATH) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened.map_err(|errno| fail(&errno))?,
        };
        let (file, _) = regular_file::open(&found).map_err(|error| fail(&error))?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes).map_err(|error| fail(&error))?;
        Ok(Some(bytes))
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<Vec<T>> {
        let Some(bytes) = self.read(name)? else { return Ok(Vec::new()) };
        serde_json::from_slice(&bytes).map_err(|error| damaged(&self.path, format!("{name}: {error}")))
    }

    /// An image's configuration, checked. The id alone does not lead to it: that of an image which was pulled in parts is another
    /// digest (containers/image, "TOC").
    fn config(&self, id: &str) -> Result<Vec<u8>> {
        let lacks = |what: &str| damaged(&self.path, format!("the image {id} has no {what}"));
        if !is_name(id) {
            return Err(damaged(&self.path, format!("{id:?} is not the id of an image")));
        }
        let manifest =
            self.read(&format!("overlay-images/{id}/manifest"))?.ok_or_else(|| lacks("manifest"))?;
        let digest = manifest::config_digest(&manifest)?;
        let file = format!("overlay-images/{id}/={}", STANDARD.encode(digest.to_string()));
        let config = self.read(&file)?.ok_or_else(|| lacks("configuration"))?;
        digest.verify_bytes(&config, "the image's configuration")?;
        Ok(config)
    }

    /// A layer's directory, if its files are as they must be for others than Podman.
    fn layer(&self, layer: &Layer) -> Result<PathBuf> {
        let id = &layer.id;
        let again = "podman save --format oci-archive, and run oci-archive:FILE";
        let bad = |why: &str| unusable(&self.path, format!("the layer {id} {why}"));
        if !is_name(id) {
            return Err(damaged(&self.path, format!("{id:?} is not the id of a layer")));
        }
        if layer.flags.get("incomplete").is_some_and(|flag| flag != false) {
            return Err(bad("is not finished").fix("`podman pull` the image again"));
        }
        if layer.uidmap.iter().chain(&layer.gidmap).any(|map| map.container_id != map.host_id) {
            return Err(bad("has the owners of a user namespace of its own").fix(again));
        }
        if self.open_beneath(&format!("overlay/{id}/composefs-data"), OFlags::PATH).is_ok() {
            return Err(bad("is kept by composefs, without a tree of its own").fix(again));
        }
        let diff = format!("overlay/{id}/diff");
        let opened = self
            .open_beneath(&diff, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|errno| bad(&format!("cannot be opened: {errno}")).fix(again))?;
        if fgetxattr(&opened, FORCED_MASK, &mut [0_u8; 64][..]) != Err(Errno::NODATA) {
            return Err(bad("has its owners and modes in attributes (force_mask)").fix(again));
        }
        Ok(self.path.join(diff))
    }
}

/// Whether it is one part of a path and no way out.
fn is_name(id: &str) -> bool {
    !id.is_empty()
        && !id.starts_with('.')
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// Where images are: the caller's own store, then those that are added to it. The first storage.conf that is there counts, as
/// with Podman; root's says by a key of its own where users' are.
fn stores(home: Option<&Path>) -> Result<Vec<PathBuf>> {
    let is_root = rustix::process::geteuid().is_root();
    let below_home = |key, path: &str| {
        own_directory::named_by(key, Purpose::Read).or_else(|| home.map(|home| home.join(path)))
    };
    let own = below_home("XDG_CONFIG_HOME", ".config").filter(|_| !is_root);
    let named = env::var_os("CONTAINERS_STORAGE_CONF").map(PathBuf::from).filter(|path| path.is_absolute());
    let own = named.or(own.map(|dir| dir.join("containers/storage.conf")));
    let mut conf = Storage::default();
    for (path, is_own) in
        own.iter().map(|path| (path.as_path(), true)).chain(SYSTEM_FILES.map(|path| (Path::new(path), false)))
    {
        let unreadable = |error| unusable_conf(path, "cannot be read", &error);
        let file = match TextFile::read(path, MAX_FILE) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            read => read.map_err(unreadable)?,
        };
        let read: StorageConf = toml::from_str(file.text().map_err(unreadable)?)
            .map_err(|error| unusable_conf(path, "cannot be understood", &error))?;
        conf = read.storage;
        if !is_own && !is_root {
            conf.graphroot = std::mem::take(&mut conf.rootless_storage_path);
        }
        break;
    }
    if !matches!(conf.driver.as_str(), "" | "overlay" | "overlay2") {
        let what = format!("Podman's images are kept by the driver {}", conf.driver);
        return Err(Error::new(Code::Store, what)
            .cause("storage.conf says so, and gpurun reads the driver overlay")
            .fix("podman save --format oci-archive, and run oci-archive:FILE"));
    }
    let default = if is_root {
        Some("/var/lib/containers/storage".into())
    } else {
        below_home("XDG_DATA_HOME", ".local/share").map(|data| data.join("containers/storage"))
    };
    let graphroot = Some(expand(&conf.graphroot, home)).filter(|path| path.is_absolute());
    let own = graphroot.or(default).ok_or_else(|| {
        Error::new(Code::Usage, "it is not known where Podman's images are: HOME is not set")
            .fix("`export HOME=DIR` with the directory of your account")
    })?;
    let added = conf.options.additionalimagestores.iter().map(|path| expand(path, home));
    Ok([own].into_iter().chain(added).collect())
}

fn unusable_conf(path: &Path, what: &str, cause: &dyn std::fmt::Display) -> Error {
    Error::new(Code::Store, format!("{} {what}", path.display()))
        .cause(cause)
        .fix(format!("correct {} (containers-storage.conf(5))", path.display()))
}

/// `$HOME`, `$USER` and `$UID` are what storage.conf(5) knows in a path.
fn expand(path: &str, home: Option<&Path>) -> PathBuf {
    let user = env::var("USER").unwrap_or_default();
    let home = home.map(|home| home.display().to_string()).unwrap_or_default();
    let uid = rustix::process::getuid().as_raw().to_string();
    path.replace("$HOME", &home).replace("$USER", &user).replace("$UID", &uid).into()
}

#[cfg(test)]
mod tests {
    use super::{super::Digest, *};

    fn image(id: &str, names: &[&str]) -> Image {
        let digest = Some(Digest::of(id.as_bytes()).to_string());
        Image {
            id: id.into(),
            names: Some(names.iter().map(|&name| name.into()).collect()),
            digest,
            layer: String::new(),
        }
    }

    #[test]
    fn an_image_is_known_by_each_of_its_names_and_the_beginning_of_its_id() {
        let images = [
            image("abc1", &["docker.io/library/busybox:latest", "localhost/own:1"]),
            image("abd2", &["quay.example/team/app:v2"]),
            Image { names: None, ..image("cafe", &[]) },
        ];
        let id = |name: &str| choose(&images, name).unwrap().map(|image| image.id.as_str());
        for name in [
            "busybox",
            "docker.io/library/busybox:latest",
            "library/busybox:latest",
            "own:1",
            "localhost/own:1",
            "abc",
            "sha256:abc1",
        ] {
            assert_eq!(id(name), Some("abc1"), "{name}");
        }
        assert_eq!(id("quay.example/team/app:v2"), Some("abd2"));
        assert_eq!(id(&format!("quay.example/team/app@{}", Digest::of(b"abd2"))), Some("abd2"));
        assert_eq!(id(&format!("quay.example/team/app@{}", Digest::of(b"abc1"))), None);
        assert_eq!(id("cafe"), Some("cafe"));
        for name in ["own", "app:v2", "ab", "busybox:1", "../../etc", ""] {
            assert_eq!(id(name), None, "{name}");
        }
        assert!(choose(&[image("abcd", &[]), image("abce", &[])], "abc").is_err());
    }
}
