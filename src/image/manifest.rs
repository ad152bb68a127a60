//! The documents of an image: index, manifest and configuration (OCI image specification; Docker image manifest version 2,
//! schema 2; `docker save`'s manifest.json), and the way from one to the next.
//!
//! One rule decides what is accepted: **documents that Go's `encoding/json` and containers/image or Docker accept are
//! accepted with the same value; documents that they refuse are refused, with a better message.** [`go_json`] implements the
//! rule for the syntax. For the contents it means:
//!
//! * A document is an image configuration if its media type is in [`CONFIGS`], which includes the wrong types that Docker
//!   accepts.
//! * A layer may have any media type, or none: its bytes tell the compression, and its digests whether it is the layer.
//!   Encrypted layers are refused by their type.
//! * An entry of an index may have any media type, or none: if it is chosen for its platform, it is read as a manifest.
//! * The digest of a document is parsed when the document is needed: an index may name other platforms' images with an
//!   unknown algorithm.
//! * Digests are checked, sizes are not: containers/image and Docker take the size of a manifest or layer for a hint.
//! * A document that could be read both as an index and as a manifest, by its keys or by its media type, is refused
//!   (CVE-2021-41190).
//! * A key that gpurun does not use may have a value of any type.
//!
//! The types are not those of the oci-spec crate, which follows the specification more strictly than the engines do.

use super::{Digest, Platform, layer::Layer, layout::Layout, platform::wrong_platform};
use crate::{
    error::{Code, Error, OrFail, Result},
    formats::go_json,
};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use std::collections::{BTreeMap, BTreeSet};

/// The deepest nesting of indexes. Real images have up to two levels.
const MAX_DEPTH: usize = 4;
/// Manifests that all indexes of an image may name together.
const MAX_MANIFESTS: usize = 10_000;
/// Indexes that are read for an image. Four levels that name each other many times would be read for years.
const MAX_INDEXES: usize = 100;
/// overlayfs takes no more lower directories (OVL_MAX_STACK).
const MAX_LAYERS: usize = 500;

/// Media types of indexes.
pub const INDEXES: &[&str] =
    &["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// Media types of manifests.
pub const MANIFESTS: &[&str] =
    &["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
/// Media types of configurations. The last four were written by old registries and clients (`python:3.5.1-alpine`, `redis:2`);
/// Docker keeps the same list (moby, `distribution.ImageTypes`).
const CONFIGS: &[&str] = &[
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",
    "application/json",
    "text/html",
    "",
];

/// A checked reference to a blob (OCI image specification, descriptor.md).
#[derive(Debug, Clone)]
pub struct Descriptor {
    /// The kind of document or layer.
    pub media_type: String,
    /// The digest of the blob.
    pub digest: Digest,
    /// The length of the blob in bytes, as far as the writer knew it; 0 if unknown.
    pub size: u64,
    /// Addresses of a blob that registries may not have.
    pub urls: Vec<String>,
}

/// An unchecked reference to a blob. It becomes a [`Descriptor`] when it is needed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RawDescriptor {
    /// The kind of document or layer; may be empty.
    pub media_type: String,
    /// `ALGORITHM:HEX`, of any algorithm.
    pub digest: String,
    /// The length in bytes, if the writer knew it.
    pub size: i64,
    /// The machine that a manifest is for.
    pub platform: Option<Platform>,
    /// Addresses of a layer that must not be distributed by registries.
    urls: Vec<String>,
    annotations: BTreeMap<String, String>,
}

impl RawDescriptor {
    /// The descriptor of these bytes.
    pub fn of(media_type: String, digest: &Digest, bytes: &[u8]) -> Self {
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        Self { media_type, digest: digest.to_string(), size, ..Self::default() }
    }

    /// Checks the digest.
    ///
    /// # Errors
    /// [`Code::ImageBroken`]
    pub fn check(self) -> Result<Descriptor> {
        let digest = Digest::parse(&self.digest)?;
        let size = u64::try_from(self.size).unwrap_or(0);
        Ok(Descriptor { media_type: self.media_type, digest, size, urls: self.urls })
    }

    /// The names of an image in an index.
    fn names(&self) -> impl Iterator<Item = &String> {
        // containerd and Docker write the whole name in the second annotation.
        ["org.opencontainers.image.ref.name", "io.containerd.image.name"]
            .into_iter()
            .filter_map(|key| self.annotations.get(key))
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Index {
    media_type: String,
    manifests: Vec<RawDescriptor>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    config: RawDescriptor,
    #[serde(default)]
    layers: Vec<RawDescriptor>,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
    #[serde(default)]
    fs_layers: Option<IgnoredAny>,
}

impl Index {
    fn parse(bytes: &[u8], what: &str) -> Result<Self> {
        let index: Self = parse(bytes, what)?;
        let has_keys = index.config.is_some() || index.layers.is_some() || index.fs_layers.is_some();
        if has_keys || MANIFESTS.contains(&plain_type(&index.media_type).as_str()) {
            return Err(ambiguous(what));
        }
        Ok(index)
    }
}

impl Manifest {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let what = "the image's manifest";
        let manifest: Self = parse(bytes, what)?;
        let has_keys = manifest.manifests.is_some() || manifest.fs_layers.is_some();
        if has_keys || INDEXES.contains(&plain_type(&manifest.media_type).as_str()) {
            return Err(ambiguous(what));
        }
        Ok(manifest)
    }
}

/// The error for a document that is an index and a manifest.
pub fn ambiguous(what: &str) -> Error {
    broken(format!("{what} has the keys or the media type of an index and those of a manifest"))
        .cause("programs would disagree about the image that it describes (CVE-2021-41190)")
}

/// A media type without parameters, in lower case.
pub fn plain_type(kind: &str) -> String {
    kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// An error about a damaged image, with the general fix.
fn broken(what: impl Into<String>) -> Error {
    Error::new(Code::ImageBroken, what).fix(REBUILD)
}

const REBUILD: &str = "have the image built or copied again, with `docker buildx build` or `skopeo copy`; \
                       `skopeo inspect --raw IMAGE` shows its manifest";

/// An entry of `docker save`'s manifest.json.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Saved {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

/// The used keys of an image's configuration file.
#[derive(Debug, Deserialize)]
pub struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    /// What a container gets that says nothing else.
    #[serde(default)]
    pub config: Defaults,
    rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// `config` of the configuration file, as it is written there.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Defaults {
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub user: String,
    pub working_dir: String,
    pub labels: BTreeMap<String, String>,
    pub volumes: BTreeMap<String, Option<IgnoredAny>>,
    pub stop_signal: String,
    /// Docker's object, in any form, because gpurun ignores it.
    pub healthcheck: serde_json::Value,
}

/// What the documents of an image come to.
#[derive(Debug)]
pub struct Found {
    /// The configuration file's digest: the image's identity.
    pub id: Digest,
    /// The configuration file.
    pub config: Vec<u8>,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// Reads one of the image's documents.
///
/// # Errors
/// [`Code::ImageBroken`], with a cause of one line.
pub fn parse<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    go_json::from_slice(bytes)
        .or_fail(Code::ImageBroken, || format!("{what} cannot be understood"))
        .map_err(|error| error.fix(REBUILD))
}

impl ConfigFile {
    /// Fails where such a machine cannot run the image.
    pub fn check_platform(&self, wanted: &Platform) -> Result<()> {
        Platform::new(&self.os, &self.architecture).check(wanted)
    }

    /// The layers' identities, lowest first.
    fn diff_ids(self) -> Vec<Digest> {
        self.rootfs.diff_ids
    }
}

/// The layers' identities by this configuration file, lowest first.
pub fn diff_ids(config: &[u8]) -> Result<Vec<Digest>> {
    Ok(parse::<ConfigFile>(config, "the image's configuration")?.diff_ids())
}

/// What a manifest says is its configuration.
pub fn config_digest(manifest: &[u8]) -> Result<Digest> {
    Digest::parse(&Manifest::parse(manifest)?.config.digest)
}

/// Follows `index.json` to the image of this name and platform.
pub fn from_oci(layout: &Layout, tag: Option<&str>, platform: &Platform) -> Result<Found> {
    if !layout.has("index.json")? {
        let fix = if layout.has("manifest.json")? {
            "there is a manifest.json: if `docker save` wrote it, name it docker-archive:FILE"
        } else {
            "name what `skopeo copy … oci:DIR`, `podman save --format oci-archive` or \
             `docker buildx build -o type=oci` wrote"
        };
        return Err(Error::new(Code::ImageBroken, "there is no index.json, so this is no OCI image").fix(fix));
    }
    let index = Index::parse(&layout.read("index.json")?, "index.json of the image")?;
    let tops = choose_tag(index.manifests, tag)?;
    follow(tops, platform, |descriptor| read_blob(layout, descriptor))
}

/// Resolves these descriptors to the image for this platform. `read` returns a document's bytes, checked against its
/// descriptor.
pub fn follow(
    tops: Vec<RawDescriptor>,
    platform: &Platform,
    mut read: impl FnMut(&Descriptor) -> Result<Vec<u8>>,
) -> Result<Found> {
    let mut manifests = Vec::new();
    collect_manifests(&mut read, tops, platform, MAX_DEPTH, &mut 0, &mut manifests)?;
    let descriptor = choose_platform(manifests, platform)?.check()?;
    let manifest = Manifest::parse(&read(&descriptor)?)?;
    let kind = manifest.config.media_type.as_str();
    if !CONFIGS.contains(&plain_type(kind).as_str()) {
        let kind = if manifest.artifact_type.is_empty() { kind } else { &manifest.artifact_type };
        return Err(not_an_image(kind));
    }
    let config_descriptor = manifest.config.check()?;
    let config = read(&config_descriptor)?;
    let parsed: ConfigFile = parse(&config, "the image's configuration")?;
    parsed.check_platform(platform)?;
    let diff_ids = parsed.diff_ids();
    check_layers(manifest.layers.len(), diff_ids.len())?;
    let layers = manifest.layers.into_iter().zip(diff_ids).map(|(blob, diff_id)| {
        if plain_type(&blob.media_type).ends_with("+encrypted") {
            let what = format!("a layer of type {:?} cannot be unpacked", blob.media_type);
            return Err(Error::new(Code::ImageBroken, what)
                .fix("decrypt the image first: `skopeo copy --decryption-key KEY SOURCE oci-archive:FILE`"));
        }
        let blob = blob.check()?;
        let path = blob_path(&blob.digest);
        Ok(Layer { diff_id, path, digest: Some(blob.digest), size: blob.size, urls: blob.urls })
    });
    Ok(Found { id: config_descriptor.digest, layers: layers.collect::<Result<_>>()?, config })
}

/// The error for a document that does not describe a container image.
pub fn not_an_image(kind: &str) -> Error {
    Error::new(Code::ImageBroken, format!("this is an artifact of type {kind:?}, not a container image"))
        .fix("name an image; charts, signatures and other artifacts have no root file system, and `oras pull` fetches them")
}

/// Follows `manifest.json`, which `docker save` writes, to the image of this name.
pub fn from_docker(layout: &Layout, reference: Option<&str>, platform: &Platform) -> Result<Found> {
    if !layout.has("manifest.json")? {
        let error =
            Error::new(Code::ImageBroken, "there is no manifest.json, so `docker save` did not write this");
        return Err(if layout.has("index.json")? {
            error.fix("there is an index.json: name it oci-archive:FILE")
        } else {
            error.fix("write it with `docker save -o FILE IMAGE` or `skopeo copy docker://IMAGE docker-archive:FILE`")
        });
    }
    let bytes = layout.read("manifest.json")?;
    let saved: Vec<Saved> = parse(&bytes, "manifest.json of the image")?;
    let wanted = reference.map(full_name);
    let mut matching = saved.iter().filter(|image| {
        wanted.as_ref().is_none_or(|wanted| image.repo_tags.iter().any(|tag| full_name(tag) == *wanted))
    });
    let first = matching.next();
    let several = matching.any(|other| first.is_some_and(|first| first.config != other.config));
    let image = match first {
        Some(image) if !several => image,
        _ => {
            return Err(which_one(
                reference,
                saved.iter().flat_map(|image| &image.repo_tags).map(String::as_str),
            ));
        }
    };
    let config = layout.read(&image.config)?;
    // Docker names the file by its digest, `HEX.json` or `blobs/sha256/HEX`; others may not.
    let file = image.config.rsplit('/').next().unwrap_or_default();
    let id = match Digest::parse_hex(file.strip_suffix(".json").unwrap_or(file)) {
        Some(promised) => {
            promised.verify_bytes(&config, "the image's configuration")?;
            promised
        }
        None => Digest::of(&config),
    };
    let parsed: ConfigFile = parse(&config, "the image's configuration")?;
    parsed.check_platform(platform)?;
    let diff_ids = parsed.diff_ids();
    check_layers(image.layers.len(), diff_ids.len())?;
    let layers = image.layers.iter().zip(diff_ids).map(|(path, diff_id)| {
        let size = layout.open(path)?.length();
        Ok(Layer { diff_id, digest: None, size, path: path.clone(), urls: Vec::new() })
    });
    Ok(Found { id, layers: layers.collect::<Result<_>>()?, config })
}

fn check_layers(blobs: usize, diff_ids: usize) -> Result<()> {
    let error = match blobs {
        _ if blobs != diff_ids => format!("the manifest has {blobs} layers and the configuration {diff_ids}"),
        0 => "the image has no layers".into(),
        _ if blobs > MAX_LAYERS => format!("the image has {blobs} layers; the kernel can stack {MAX_LAYERS}"),
        _ => return Ok(()),
    };
    Err(broken(error))
}

/// The descriptors of that name; without one, all of them if they have at most one name.
fn choose_tag(manifests: Vec<RawDescriptor>, tag: Option<&str>) -> Result<Vec<RawDescriptor>> {
    if let Some(tag) = tag {
        let named = |one: &&RawDescriptor| one.names().any(|name| name == tag);
        let found: Vec<_> = manifests.iter().filter(named).cloned().collect();
        if !found.is_empty() {
            return Ok(found);
        }
    } else {
        let named: BTreeSet<_> = manifests.iter().map(|one| one.names().next()).collect();
        let digests: BTreeSet<_> = manifests.iter().map(|one| &one.digest).collect();
        if digests.len() == 1 || (named.len() == 1 && !manifests.is_empty()) {
            return Ok(manifests);
        }
    }
    let all = manifests.iter().filter_map(|one| one.names().next());
    Err(which_one(tag, all.map(String::as_str)))
}

fn which_one<'a>(wanted: Option<&str>, names: impl Iterator<Item = &'a str>) -> Error {
    let names = names.take(20).collect::<Vec<_>>().join(", ");
    let names = if names.is_empty() { "none that has a name".to_owned() } else { names };
    match wanted {
        Some(wanted) => Error::new(Code::ImageNotFound, format!("there is no image {wanted:?} in it"))
            .fix(format!("it holds: {names}")),
        None => Error::new(Code::ImageNotFound, "it is not clear which image in it is meant")
            .fix(format!("put a colon and a name behind it; it holds: {names}")),
    }
}

/// All image manifests beneath these descriptors.
fn collect_manifests(
    read: &mut impl FnMut(&Descriptor) -> Result<Vec<u8>>,
    descriptors: Vec<RawDescriptor>,
    platform: &Platform,
    depth: usize,
    indexes: &mut usize,
    into: &mut Vec<RawDescriptor>,
) -> Result<()> {
    for descriptor in descriptors {
        if into.len() >= MAX_MANIFESTS {
            return Err(broken(format!("the image's indexes name more than {MAX_MANIFESTS} manifests")));
        }
        if INDEXES.contains(&plain_type(&descriptor.media_type).as_str()) {
            if descriptor.platform.as_ref().is_some_and(|own| own.rank(platform).is_none()) {
                continue;
            }
            if depth == 0 {
                return Err(broken("the image's indexes are nested too deeply"));
            }
            *indexes += 1;
            if *indexes > MAX_INDEXES {
                return Err(broken(format!("the image has more than {MAX_INDEXES} indexes")));
            }
            let index = Index::parse(&read(&descriptor.check()?)?, "an index of the image")?;
            collect_manifests(read, index.manifests, platform, depth - 1, indexes, into)?;
        } else {
            into.push(descriptor);
        }
    }
    Ok(())
}

/// The first of the best matches for the platform. A manifest without a platform may match; an entry of an unknown media type
/// matches by its platform alone.
fn choose_platform(manifests: Vec<RawDescriptor>, wanted: &Platform) -> Result<RawDescriptor> {
    let is_known = |one: &RawDescriptor| {
        let kind = plain_type(&one.media_type);
        kind.is_empty() || MANIFESTS.contains(&kind.as_str())
    };
    let rank = |one: &RawDescriptor| match &one.platform {
        Some(own) => own.rank(wanted).map(|rank| (!is_known(one), rank)),
        None => is_known(one).then_some((false, 2)),
    };
    let all: BTreeSet<_> = manifests
        .iter()
        .filter_map(|one| one.platform.as_ref())
        .filter(|platform| platform.is_known())
        .map(Platform::to_string)
        .collect();
    let chosen = manifests.into_iter().filter(|one| rank(one).is_some()).min_by_key(|one| rank(one));
    // Registries keep manifests and blobs apart, so the type that it is read as counts from here on.
    let is_manifest = |one: &RawDescriptor| MANIFESTS.contains(&plain_type(&one.media_type).as_str());
    let chosen = chosen.map(|one| {
        if is_manifest(&one) { one } else { RawDescriptor { media_type: MANIFESTS[0].into(), ..one } }
    });
    chosen.ok_or_else(|| {
        if all.is_empty() {
            return broken("the image's index names no image manifest");
        }
        wrong_platform(&all.into_iter().collect::<Vec<_>>().join(", "), wanted)
    })
}

fn read_blob(layout: &Layout, descriptor: &Descriptor) -> Result<Vec<u8>> {
    check_document(descriptor, layout.read(&blob_path(&descriptor.digest))?)
}

/// These bytes, if they are the ones that the descriptor promises.
pub fn check_document(descriptor: &Descriptor, bytes: Vec<u8>) -> Result<Vec<u8>> {
    descriptor.digest.verify_bytes(&bytes, "a document of the image")?;
    Ok(bytes)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Docker's short names, written out: `ubuntu` is `docker.io/library/ubuntu:latest`.
fn full_name(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let name = name.strip_prefix("library/").unwrap_or(name);
    let tagged = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    if tagged { name.to_owned() } else { format!("{name}:latest") }
}

/// Documents of any kind with zero bytes between them, for [`crate::fuzz_targets`]. The first is parsed as each kind, and is the
/// index that leads to the others.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz(bytes: &[u8]) {
    let documents: Vec<_> = bytes.split(|&byte| byte == 0).collect();
    let bytes = documents[0];
    let platform = Platform::new("linux", "amd64");
    let _ = parse::<Vec<Saved>>(bytes, "the list of images");
    let _ = (diff_ids(bytes), config_digest(bytes));
    let _ = super::ImageConfig::read(bytes, &platform);
    let Ok(index) = Index::parse(bytes, "the index") else { return };
    for tag in [None, Some("latest")] {
        let Ok(tops) = choose_tag(index.manifests.clone(), tag) else { continue };
        // A fuzzer does not find digests: the first digit of a digest is the number of the document.
        let mut reads = 0;
        let found = follow(tops, &platform, |descriptor| {
            reads += 1;
            assert!(reads <= MAX_INDEXES + 2, "a few documents make a program read many");
            let number = usize::from_str_radix(&descriptor.digest.hex()[..1], 16).unwrap_or_default();
            Ok(documents[number % documents.len()].to_vec())
        });
        let Ok(found) = found else { continue };
        assert!((1..=MAX_LAYERS).contains(&found.layers.len()));
        let known = diff_ids(&found.config).expect("it was read before");
        assert!(found.layers.iter().map(|layer| &layer.diff_id).eq(&known), "layers and identities differ");
    }
}
