//! The documents of an image: index, manifest, configuration (OCI image specification; Docker image manifest version 2,
//! schema 2; `docker save`'s manifest.json), and the way from one to the next.
//!
//! The types are ours and not oci-spec's: engines write `null` and leave out what the specification demands, and Docker's
//! media types and fields are not in it.

use super::{Digest, layer::Layer, layout::Layout};
use crate::error::{Code, Error, OrFail, Result};
use serde::{Deserialize, Deserializer, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

/// An index of indexes of indexes is all that anybody has seen.
const MAX_DEPTH: usize = 4;
/// overlayfs takes no more lower directories (OVL_MAX_STACK).
const MAX_LAYERS: usize = 500;

/// Media types of indexes.
pub const INDEXES: &[&str] =
    &["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// Media types of manifests.
pub const MANIFESTS: &[&str] =
    &["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIGS: &[&str] =
    &["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Each may be followed by how it is compressed, which the bytes themselves say better.
const LAYERS: &[&str] = &[
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// What points to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default, deserialize_with = "nullable")]
    pub media_type: String,
    /// Its bytes.
    pub digest: Digest,
    /// How many.
    pub size: u64,
    /// Which machine it is for.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Remarks.
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
}

/// A kind of machine, in GOARCH's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    os: String,
    #[serde(default, deserialize_with = "nullable")]
    variant: String,
}

impl Default for Platform {
    /// This machine's.
    fn default() -> Self {
        Self { architecture: architecture().into(), os: "linux".into(), variant: String::new() }
    }
}

impl Platform {
    /// Whether this machine's processor runs it: its own programs, and those of its 32-bit predecessor.
    pub fn is_native(&self) -> bool {
        let here = architecture();
        let runs = (here, self.architecture.as_str());
        here == self.architecture || matches!(runs, ("amd64", "386") | ("arm64", "arm"))
    }

    /// How ELF files call the machine (elf.h, `EM_*`).
    pub fn elf_machine(&self) -> Option<u16> {
        Some(match self.architecture.as_str() {
            "386" => 3,
            "ppc64le" => 21,
            "s390x" => 22,
            "arm" => 40,
            "amd64" => 62,
            "arm64" => 183,
            "riscv64" => 243,
            "loong64" => 258,
            _ => return None,
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl FromStr for Platform {
    type Err = String;
    /// `linux/ARCHITECTURE[/VARIANT]`, as Docker's `--platform`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split('/');
        let (os, architecture) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (variant, more) = (words.next().unwrap_or_default(), words.next());
        let word = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if os != "linux" || architecture.is_empty() || more.is_some() || !word(architecture) || !word(variant)
        {
            return Err(
                "a platform is linux/amd64 or linux/arm64, with a variant behind: linux/amd64/v3".into()
            );
        }
        Ok(Self { architecture: architecture.into(), os: os.into(), variant: variant.into() })
    }
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    #[serde(deserialize_with = "nullable")]
    layers: Vec<Descriptor>,
}

/// An entry of `docker save`'s manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default, deserialize_with = "nullable")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    layers: Vec<String>,
}

/// An image's configuration file, as far as it matters here.
#[derive(Debug, Deserialize)]
pub struct ConfigFile {
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    os: String,
    /// What a container gets that says nothing else.
    #[serde(default, deserialize_with = "nullable")]
    pub config: Defaults,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(deserialize_with = "nullable")]
    diff_ids: Vec<Digest>,
}

/// `config` of the configuration file, as it is written there.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Defaults {
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub entrypoint: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub cmd: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub user: String,
    #[serde(deserialize_with = "nullable")]
    pub working_dir: String,
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "nullable")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "nullable")]
    pub stop_signal: String,
    /// Docker's object; of any shape, because it has no effect here.
    pub healthcheck: serde_json::Value,
}

/// Go writes an empty list as `null`.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
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
pub fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes).or_fail(Code::ImageBroken, || format!("{what} cannot be understood"))
}

impl ConfigFile {
    /// Fails where such a machine cannot run the image.
    pub fn check_platform(&self, wanted: &Platform) -> Result<()> {
        let same = |has: &str, wanted: &str| has.is_empty() || has == wanted;
        if same(&self.os, &wanted.os) && same(&self.architecture, &wanted.architecture) {
            return Ok(());
        }
        Err(wrong_platform(&format!("{}/{}", self.os, self.architecture), wanted))
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
    parse::<Manifest>(manifest, "the image's manifest").map(|manifest| manifest.config.digest)
}

/// This machine's architecture in the words of GOARCH, which images use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn wrong_platform(has: &str, wanted: &Platform) -> Error {
    let whose = if *wanted == Platform::default() { "this machine is" } else { "what was asked for is" };
    Error::new(Code::WrongPlatform, format!("the image is for {has}, and {whose} {wanted}"))
        .fix(format!("get the image for {wanted}, or see that it is built for it; --platform fetches what is for another machine"))
}

/// Follows `index.json` to the image of this name and platform.
pub fn from_oci(layout: &Layout, tag: Option<&str>, platform: &Platform) -> Result<Found> {
    if !layout.has("index.json") {
        let fix = if layout.has("manifest.json") {
            "there is a manifest.json: if `docker save` wrote it, name it docker-archive:FILE"
        } else {
            "name what `skopeo copy … oci:DIR`, `podman save --format oci-archive` or \
             `docker buildx build -o type=oci` wrote"
        };
        return Err(Error::new(Code::ImageBroken, "there is no index.json, so this is no OCI image").fix(fix));
    }
    let index: Index = parse(&layout.read("index.json")?, "index.json of the image")?;
    let tops = choose_tag(index.manifests, tag)?;
    follow(tops, platform, |descriptor| read_blob(layout, descriptor))
}

/// Goes from these descriptors to the image for this platform. `read` gives a document's bytes, checked against its
/// descriptor.
pub fn follow(
    tops: Vec<Descriptor>,
    platform: &Platform,
    mut read: impl FnMut(&Descriptor) -> Result<Vec<u8>>,
) -> Result<Found> {
    let mut manifests = Vec::new();
    collect_manifests(&mut read, tops, MAX_DEPTH, &mut manifests)?;
    let descriptor = choose_platform(&manifests, platform)?;
    let manifest: Manifest = parse(&read(descriptor)?, "the image's manifest")?;
    if !CONFIGS.contains(&manifest.config.media_type.as_str()) {
        let kind = &manifest.config.media_type;
        return Err(Error::new(
            Code::ImageBroken,
            format!("this is an artifact of type {kind:?}, not a container image"),
        ));
    }
    let config = read(&manifest.config)?;
    let parsed: ConfigFile = parse(&config, "the image's configuration")?;
    parsed.check_platform(platform)?;
    let diff_ids = parsed.diff_ids();
    check_layers(manifest.layers.len(), diff_ids.len())?;
    let layers = manifest.layers.into_iter().zip(diff_ids).map(|(blob, diff_id)| {
        if !LAYERS.iter().any(|kind| {
            matches!(blob.media_type.strip_prefix(kind), Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
        }) {
            return Err(Error::new(
                Code::ImageBroken,
                format!("a layer of type {:?} cannot be unpacked", blob.media_type),
            ));
        }
        Ok(Layer { diff_id, path: blob_path(&blob.digest), digest: Some(blob.digest), size: blob.size })
    });
    Ok(Found { id: manifest.config.digest, layers: layers.collect::<Result<_>>()?, config })
}

/// Follows `manifest.json`, which `docker save` writes, to the image of this name.
pub fn from_docker(layout: &Layout, reference: Option<&str>, platform: &Platform) -> Result<Found> {
    if !layout.has("manifest.json") {
        let error =
            Error::new(Code::ImageBroken, "there is no manifest.json, so `docker save` did not write this");
        return Err(if layout.has("index.json") {
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
    let id = Digest::of(&config);
    // Docker names the file by its digest, `HEX.json` or `blobs/sha256/HEX`; others may not.
    let file = image.config.rsplit('/').next().unwrap_or_default();
    if let Ok(promised) = Digest::parse(file.strip_suffix(".json").unwrap_or(file)) {
        promised.verify(&id, "the image's configuration")?;
    }
    let parsed: ConfigFile = parse(&config, "the image's configuration")?;
    parsed.check_platform(platform)?;
    let diff_ids = parsed.diff_ids();
    check_layers(image.layers.len(), diff_ids.len())?;
    let layers = image.layers.iter().zip(diff_ids).map(|(path, diff_id)| {
        Ok(Layer { diff_id, digest: None, size: layout.open(path)?.length(), path: path.clone() })
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
    Err(Error::new(Code::ImageBroken, error))
}

/// The descriptors of that name; without one, all of them if they have at most one name.
fn choose_tag(manifests: Vec<Descriptor>, tag: Option<&str>) -> Result<Vec<Descriptor>> {
    let names = |descriptor: &Descriptor| {
        // The second is how containerd and Docker write the whole name.
        ["org.opencontainers.image.ref.name", "io.containerd.image.name"]
            .map(|key| descriptor.annotations.get(key).cloned())
    };
    if let Some(tag) = tag {
        let found: Vec<_> = manifests
            .iter()
            .filter(|one| names(one).iter().flatten().any(|name| name == tag))
            .cloned()
            .collect();
        if !found.is_empty() {
            return Ok(found);
        }
    } else {
        let named: BTreeSet<_> =
            manifests.iter().map(|one| names(one).into_iter().flatten().next()).collect();
        let digests: BTreeSet<_> = manifests.iter().map(|one| &one.digest).collect();
        if digests.len() == 1 || (named.len() == 1 && !manifests.is_empty()) {
            return Ok(manifests);
        }
    }
    let all: Vec<_> = manifests.iter().filter_map(|one| names(one).into_iter().flatten().next()).collect();
    Err(which_one(tag, all.iter().map(String::as_str)))
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
    descriptors: Vec<Descriptor>,
    depth: usize,
    into: &mut Vec<Descriptor>,
) -> Result<()> {
    for descriptor in descriptors {
        let kind = descriptor.media_type.as_str();
        if MANIFESTS.contains(&kind) {
            into.push(descriptor);
        } else if INDEXES.contains(&kind) {
            if depth == 0 || into.len() > 1000 {
                return Err(Error::new(Code::ImageBroken, "the image's indexes are nested too deeply"));
            }
            let index: Index = parse(&read(&descriptor)?, "an index of the image")?;
            collect_manifests(read, index.manifests, depth - 1, into)?;
        }
    }
    Ok(())
}

/// The first that is for such a machine (OCI image specification, image-index.md). One that names no platform may be; one
/// without a variant runs everywhere, `amd64/v3` does not.
fn choose_platform<'a>(manifests: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor> {
    let rank = |descriptor: &&Descriptor| match &descriptor.platform {
        None => Some(2),
        Some(platform) if platform.os != wanted.os || platform.architecture != wanted.architecture => None,
        Some(platform) if platform.variant == wanted.variant => Some(0),
        Some(platform) if !wanted.variant.is_empty() && !platform.variant.is_empty() => None,
        Some(platform) if matches!(platform.variant.as_str(), "" | "v1" | "v8") => Some(0),
        Some(_) => Some(1),
    };
    let chosen = manifests.iter().filter(|one| rank(one).is_some()).min_by_key(rank);
    chosen.ok_or_else(|| {
        let all: BTreeSet<_> = manifests
            .iter()
            .filter_map(|one| one.platform.as_ref())
            // Build attestations call themselves so.
            .filter(|platform| platform.os != "unknown")
            .map(Platform::to_string)
            .collect();
        if all.is_empty() {
            return Error::new(Code::ImageBroken, "the image's index names no image manifest");
        }
        wrong_platform(&all.into_iter().collect::<Vec<_>>().join(", "), wanted)
    })
}

fn read_blob(layout: &Layout, descriptor: &Descriptor) -> Result<Vec<u8>> {
    check_document(descriptor, layout.read(&blob_path(&descriptor.digest))?)
}

/// These bytes, if they are the ones that the descriptor promises.
pub fn check_document(descriptor: &Descriptor, bytes: Vec<u8>) -> Result<Vec<u8>> {
    descriptor.digest.verify(&Digest::of(&bytes), "a document of the image")?;
    if bytes.len() as u64 != descriptor.size {
        return Err(Error::new(
            Code::ImageBroken,
            format!("{} has {} bytes, not {}", descriptor.digest, bytes.len(), descriptor.size),
        ));
    }
    Ok(bytes)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Docker's short names, written out: `ubuntu` is `docker.io/library/ubuntu:latest`.
fn full_name(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let name = name.strip_prefix("library/").unwrap_or(name);
    let tagged = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
    if tagged { name.to_owned() } else { format!("{name}:latest") }
}
