//! The name of an image: where it is, as the user typed it.

use super::{Digest, prefix};
use crate::error::{Code, Error, OrFail, Result};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageReference {
    /// In a registry: `ubuntu:24.04`, `docker://nvcr.io/nvidia/cuda:12.4.1-base-ubuntu22.04`.
    Registry(RegistryName),
    /// `oci:DIR[:TAG]`, an OCI image layout in a directory.
    OciDir {
        /// The directory that holds `index.json`.
        path: PathBuf,
        /// The `org.opencontainers.image.ref.name` that is meant; needed where there are several.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`, the same in a tar file, which may be compressed.
    OciArchive {
        /// The tar file.
        path: PathBuf,
        /// As for a directory.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:REF]`, what `docker save` writes, which may be compressed.
    DockerArchive {
        /// The tar file.
        path: PathBuf,
        /// The repository tag that is meant, `ubuntu:24.04`; needed where there are several.
        reference: Option<String>,
    },
    /// `containers-storage:NAME`, an image of Podman's on this machine: a name as `podman images` has it, or an id.
    ContainersStorage(String),
    /// `docker-daemon:NAME`, an image of Docker's on this machine: a name, written out, or an id `sha256:…`.
    DockerDaemon(String),
    /// `rootfs:DIR`, an unpacked root.
    Rootfs(PathBuf),
    /// `host:`, the host's own root.
    Host,
}

/// The name of an image in a registry, written out (distribution/reference, "normalized name").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryName {
    /// `docker.io`, `localhost:5000`.
    pub host: String,
    /// `library/ubuntu`.
    pub repository: String,
    /// `latest` where neither a tag nor a digest was named.
    pub tag: Option<String>,
    /// What counts, where one was named; the tag beside it is a remark then.
    pub digest: Option<Digest>,
}

// The one registry that is known by heart, because Docker's grammar of references is: names without a host are its own.

macro_rules! docker_hub {
    ($before:literal, $behind:literal) => {
        concat!($before, "docker.io", $behind)
    };
}

/// Its name in references.
pub const DOCKER_HUB: &str = docker_hub!("", "");
/// Its older name.
pub const DOCKER_HUB_ALIAS: &str = docker_hub!("index.", "");
/// Where it is: not where its name says.
pub const DOCKER_HUB_HOST: &str = docker_hub!("registry-1.", "");
/// Under which `docker login` keeps its credentials: the address of its first interface.
pub const DOCKER_HUB_KEY: &str = docker_hub!("https://index.", "/v1/");

const KINDS: &str = "NAME[:TAG] or docker://NAME[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME:TAG], \
                     containers-storage:NAME[:TAG], docker-daemon:NAME[:TAG], rootfs:DIR, host:";

impl ImageReference {
    /// Reads an image's name. The file system is read only to recognize a path behind an unknown kind.
    ///
    /// The first colon after the kind ends the path, as skopeo has it (containers-transports(5)), so a path cannot
    /// hold one; `rootfs:` has no tag and takes any path.
    ///
    /// # Errors
    /// [`Code::ImageReference`] if the text is none of the kinds.
    pub fn parse(text: &str) -> Result<Self> {
        let broken = |cause: &str| {
            Error::new(Code::ImageReference, format!("{text:?} is not the name of an image"))
                .cause(cause)
                .fix(format!("write one of {KINDS}"))
        };
        if text.contains('\0') {
            return Err(broken("it holds a NUL"));
        }
        let (kind, rest) = text.split_once(':').unwrap_or(("", text));
        let path_and_tag = || -> Result<(PathBuf, Option<String>)> {
            let (path, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag)));
            match (path, tag) {
                ("", _) => Err(broken(&format!("{kind}: wants a path"))),
                (_, Some("")) => Err(broken("nothing follows the last colon")),
                (path, tag) => Ok((PathBuf::from(path), tag.map(str::to_owned))),
            }
        };
        match kind {
            "oci" => path_and_tag().map(|(path, tag)| Self::OciDir { path, tag }),
            "oci-archive" => path_and_tag().map(|(path, tag)| Self::OciArchive { path, tag }),
            "docker-archive" => {
                path_and_tag().map(|(path, reference)| Self::DockerArchive { path, reference })
            }
            // What an id may be, no host is called; and a name is asked for in two ways.
            "containers-storage" => match RegistryName::parse(rest) {
                Err(cause) if !rest.starts_with("sha256:") => Err(broken(&cause)),
                _ => Ok(Self::ContainersStorage(rest.into())),
            },
            "docker-daemon" if rest.starts_with("sha256:") => match Digest::parse(rest) {
                Ok(id) => Ok(Self::DockerDaemon(id.to_string())),
                Err(error) => Err(broken(error.what())),
            },
            "docker-daemon" => match RegistryName::parse(rest) {
                Ok(name) => Ok(Self::DockerDaemon(name.to_string())),
                Err(cause) => Err(broken(&cause)),
            },
            "rootfs" if rest.is_empty() => Err(broken("rootfs: wants a directory")),
            "rootfs" => Ok(Self::Rootfs(PathBuf::from(rest))),
            "host" if rest.is_empty() => Ok(Self::Host),
            "host" => Err(broken("host: stands alone")),
            _ => {
                if let Some((cause, fix)) = prefix::misspelt(text) {
                    return Err(Error::new(
                        Code::ImageReference,
                        format!("{text:?} is not the name of an image"),
                    )
                    .cause(cause)
                    .fix(fix));
                }
                let name = text.strip_prefix("docker://").unwrap_or(text);
                if name.starts_with(['/', '.', '~']) {
                    return Err(broken("it looks like a path, and a path needs its kind in front"));
                }
                RegistryName::parse(name).map(Self::Registry).map_err(|cause| broken(&cause))
            }
        }
    }

    /// The name by which the store remembers the image, whatever the working directory.
    ///
    /// # Errors
    /// [`Code::ImageReference`] if there is no working directory that a path could start at.
    pub fn absolute(&self) -> Result<Self> {
        let mut reference = self.clone();
        if let Self::OciDir { path, .. } | Self::OciArchive { path, .. } | Self::DockerArchive { path, .. } =
            &mut reference
        {
            *path = std::path::absolute(&*path)
                .or_fail(Code::ImageReference, || format!("{} is no path", path.display()))?;
        }
        Ok(reference)
    }

    /// The file or directory that the name points to.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::OciDir { path, .. }
            | Self::OciArchive { path, .. }
            | Self::DockerArchive { path, .. }
            | Self::Rootfs(path) => Some(path),
            Self::Registry(_) | Self::ContainersStorage(_) | Self::DockerDaemon(_) | Self::Host => None,
        }
    }
}

impl RegistryName {
    /// The grammar of distribution/reference: `[host[:port]/]path[:tag][@digest]`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, digest) = text.split_once('@').map_or((text, None), |(name, digest)| (name, Some(digest)));
        let digest = digest.map(Digest::parse).transpose().map_err(|error| error.what().to_owned())?;
        let (path, tag) = match name.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (name, None),
        };
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if let Some(tag) = tag {
            let good = tag.len() <= 128
                && tag.bytes().next().is_some_and(word)
                && tag.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'));
            if !good {
                return Err(format!("{tag:?} is not a tag: letters, digits, '_', '.' and '-', at most 128"));
            }
        }
        let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost";
        let (host, repository) = match path.split_once('/') {
            Some((host, repository)) if is_host(host) => (host, repository),
            _ => (DOCKER_HUB, path),
        };
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
            _ => (host, None),
        };
        if port.is_some_and(|port| port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err(format!("{host:?} is not a registry's host: its port is not a number"));
        }
        let good_label = |label: &str| {
            let outer = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
            outer(label.bytes().next())
                && outer(label.bytes().next_back())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        let good_host = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
            Some(address) => {
                !address.is_empty() && address.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':')
            }
            None => name.split('.').all(good_label),
        };
        if !good_host {
            return Err(format!("{host:?} is not a registry's host"));
        }
        let good_part = |part: &str| {
            let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            let mut between =
                part.split(|letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit());
            part.bytes().next().is_some_and(lower)
                && part.bytes().next_back().is_some_and(lower)
                && between.all(|signs| {
                    matches!(signs, "" | "." | "_" | "__") || signs.bytes().all(|sign| sign == b'-')
                })
        };
        if let Some(part) = repository.split('/').find(|part| !good_part(part)) {
            return Err(format!(
                "{part:?} is not a part of a repository's name: lower-case letters, digits, '.', '_' and '-'"
            ));
        }
        // The Hub's older name for itself, and its own images, which have no owner.
        let host = if host == DOCKER_HUB_ALIAS { DOCKER_HUB } else { host };
        let owned_by_none = host == DOCKER_HUB && !repository.contains('/');
        let repository = if owned_by_none { format!("library/{repository}") } else { repository.into() };
        if repository.len() > 255 {
            return Err("the repository's name is longer than 255 characters".into());
        }
        let tag = tag.or(if digest.is_none() { Some("latest") } else { None });
        Ok(Self { host: host.into(), repository, tag: tag.map(Into::into), digest })
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        self.tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))?;
        self.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, tag) = match self {
            Self::Registry(name) => return name.fmt(f),
            Self::ContainersStorage(name) => return write!(f, "containers-storage:{name}"),
            Self::DockerDaemon(name) => return write!(f, "docker-daemon:{name}"),
            Self::Host => return f.write_str("host:"),
            Self::Rootfs(path) => ("rootfs", path, &None),
            Self::OciDir { path, tag } => ("oci", path, tag),
            Self::OciArchive { path, tag } => ("oci-archive", path, tag),
            Self::DockerArchive { path, reference } => ("docker-archive", path, reference),
        };
        write!(f, "{kind}:{}", path.display())?;
        tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_is_read_and_written_back() {
        let text = |text: &str| Some(text.to_owned());
        for (typed, meant) in [
            ("oci:/a/b", ImageReference::OciDir { path: "/a/b".into(), tag: None }),
            ("oci:b:v1", ImageReference::OciDir { path: "b".into(), tag: text("v1") }),
            (
                "oci-archive:x.tar:docker.io/a/b:1",
                ImageReference::OciArchive { path: "x.tar".into(), tag: text("docker.io/a/b:1") },
            ),
            (
                "docker-archive:x.tar:a:1",
                ImageReference::DockerArchive { path: "x.tar".into(), reference: text("a:1") },
            ),
            ("containers-storage:own:1", ImageReference::ContainersStorage("own:1".into())),
            ("docker-daemon:docker.io/a/b:1", ImageReference::DockerDaemon("docker.io/a/b:1".into())),
            ("rootfs:/srv/a:b", ImageReference::Rootfs("/srv/a:b".into())),
            ("host:", ImageReference::Host),
        ] {
            let read = ImageReference::parse(typed).unwrap();
            assert_eq!(read, meant);
            assert_eq!(read.to_string(), typed);
        }
    }

    #[test]
    fn a_registrys_name_is_written_out() {
        let digest = Digest::of(b"");
        for (typed, meant) in [
            ("ubuntu", "docker.io/library/ubuntu:latest"),
            (&format!("docker://{DOCKER_HUB_ALIAS}/ubuntu:24.04"), "docker.io/library/ubuntu:24.04"),
            ("a/b", "docker.io/a/b:latest"),
            ("localhost/b", "localhost/b:latest"),
            ("localhost:5000/ml:1", "localhost:5000/ml:1"),
            ("[::1]:5000/ml", "[::1]:5000/ml:latest"),
            ("h-1.x/a__b---c.d_e", "h-1.x/a__b---c.d_e:latest"),
            ("nvcr.io/nvidia/cuda:12.4.1-base", "nvcr.io/nvidia/cuda:12.4.1-base"),
            (&format!("docker://a/b@{digest}"), &format!("docker.io/a/b@{digest}")),
            (&format!("h.x/b:v1@{digest}"), &format!("h.x/b:v1@{digest}")),
        ] {
            let read = ImageReference::parse(typed).unwrap();
            assert_eq!(read.to_string(), meant, "{typed}");
            assert_eq!(ImageReference::parse(meant).unwrap(), read);
        }
    }

    #[test]
    fn what_is_no_name_says_what_a_name_is() {
        for bad in [
            "",
            " ",
            "/srv/root",
            "./x.tar",
            "Ubuntu",
            "a:",
            "a//b",
            "a@sha256:12",
            "oci:",
            "oci::v1",
            "oci:a:",
            "containers-storage:",
            "containers-storage:../a",
            "docker-daemon:",
            "docker-daemon:a/../../b",
            "docker-daemon:a?b",
            "docker-daemon:sha256:12",
            "rootfs:",
            "host:/",
            "docker://",
            "-x",
            "a\0b",
            "a b",
            "a:ü",
            "h.x:0:8/a",
            "h.x./a",
            "h..x/a",
            "-h.x/a",
            "[::1/a",
            "[]:1/a",
            "a..b",
            "a._b",
            "a___b",
            &"a".repeat(248),
        ] {
            let error = ImageReference::parse(bad).unwrap_err();
            assert_eq!(error.code(), Code::ImageReference, "{bad:?}");
            assert!(error.fix_line().contains("oci-archive:FILE"), "{error}");
        }
    }
    proptest! {
        #[test]
        fn any_text_is_a_name_or_a_message(text in ".{0,60}") {
            if let Ok(reference) = ImageReference::parse(&text) {
                prop_assert_eq!(ImageReference::parse(&reference.to_string()).unwrap(), reference);
            }
        }
    }
}
