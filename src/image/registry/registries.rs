//! Reads Podman's registry configuration (containers-registries.conf(5), version 2, and the lists of version 1): other
//! locations, mirrors, blocked registries, and registries that need no certificate.
//!
//! `unqualified-search-registries` and short names are not read: a name without a host is Docker Hub's, as in Docker.

use crate::{
    error::{Code, Error, OrFail, Result},
    image::RegistryName,
    own_directory::{self, Purpose},
    text_file::TextFile,
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::ErrorKind,
    path::PathBuf,
};

/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// A place that may have an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `HOST[:PORT]`
    pub host: String,
    /// The repository's name there.
    pub repository: String,
    /// Whether its certificate is not checked, and it may speak plain HTTP.
    pub insecure: bool,
}

/// Where a name leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// To be asked first, one after the other.
    pub mirrors: Vec<Place>,
    /// And at last.
    pub own: Place,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    registry: Vec<Registry>,
    registries: BTreeMap<String, Listed>,
}

/// Version 1 has lists: `registries.block.registries`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Listed {
    registries: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Registry {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<Mirror>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Mirror {
    location: String,
    insecure: bool,
    #[serde(rename = "pull-from-mirror")]
    when: Which,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Which {
    #[default]
    #[serde(alias = "")]
    All,
    DigestOnly,
    TagOnly,
}

/// What the files of this machine and of this user say of a name.
///
/// # Errors
/// [`Code::Config`] if a file cannot be understood, [`Code::NotAllowed`] if the registry is blocked.
pub fn find(name: &RegistryName) -> Result<Places> {
    let mut all = BTreeMap::new();
    for path in files()? {
        let fail = || format!("{} cannot be used", path.display());
        let fix = |error: Error| {
            error.fix(format!("correct {0}, or make it readable: chmod a+r {0}", path.display()))
        };
        let file = match TextFile::read(&path, MAX_FILE) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            read => read.or_fail(Code::Config, fail).map_err(fix)?,
        };
        let text = file.text().or_fail(Code::Config, fail).map_err(fix)?;
        let registries = parse(text).map_err(|error| error.context(fail()))?;
        // Of two files about the same names the later one counts, whole.
        all.extend(registries.into_iter().map(|one| (one.prefix.clone(), one)));
    }
    let all: Vec<_> = all.into_values().collect();
    places(name, &all)
}

/// The main file, the user's in place of the machine's, and the drop-ins of both.
fn files() -> Result<Vec<PathBuf>> {
    if let Some(file) = env::var_os("CONTAINERS_REGISTRIES_CONF").filter(|file| !file.is_empty()) {
        return Ok(vec![file.into()]);
    }
    let own = own_directory::named_by("XDG_CONFIG_HOME", Purpose::Read)
        .or_else(|| own_directory::home(Purpose::Read).map(|home| home.join(".config")));
    let directories = [Some(PathBuf::from("/etc")), own].map(|dir| dir.map(|dir| dir.join("containers")));
    let mains = directories.iter().rev().flatten().map(|dir| dir.join("registries.conf"));
    let mut files: Vec<_> = mains.filter(|path| path.exists()).take(1).collect();
    for directory in directories.into_iter().flatten() {
        let directory = directory.join("registries.conf.d");
        let entries = match directory.read_dir() {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            read => read.or_fail(Code::Config, || format!("{} cannot be read", directory.display()))?,
        };
        let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        found.retain(|path| path.extension().is_some_and(|end| end == "conf"));
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

fn unusable(what: &str) -> Error {
    Error::new(Code::Config, what)
        .fix("correct the file, which Podman reads as well: containers-registries.conf(5) describes it")
}

fn parse(text: &str) -> Result<Vec<Registry>> {
    let File { mut registry, mut registries } = toml::from_str(text).map_err(|error: toml::de::Error| {
        Error::new(Code::Config, "it is not what containers-registries.conf(5) describes")
            .cause(error.message())
            .fix("correct the file, which Podman reads as well: containers-registries.conf(5) describes it")
    })?;
    for (kind, blocked) in [("block", true), ("insecure", false)] {
        let listed = registries.remove(kind).unwrap_or_default().registries;
        registry.extend(listed.into_iter().map(|location| Registry {
            location,
            blocked,
            insecure: !blocked,
            ..Registry::default()
        }));
    }
    for one in &mut registry {
        for text in [&mut one.prefix, &mut one.location]
            .into_iter()
            .chain(one.mirror.iter_mut().map(|mirror| &mut mirror.location))
        {
            text.truncate(text.trim_end_matches('/').len());
        }
        if one.prefix.is_empty() {
            one.prefix.clone_from(&one.location);
        }
        let is_pattern = one.prefix.starts_with("*.");
        if one.prefix.is_empty()
            || one.location.is_empty()
                && !is_pattern
                && one.mirror.is_empty()
                && !one.blocked
                && !one.insecure
        {
            return Err(unusable("a [[registry]] has neither prefix nor location"));
        }
        if one.mirror.iter().any(|mirror| mirror.location.is_empty()) {
            return Err(unusable(&format!("a [[registry.mirror]] of {} has no location", one.prefix)));
        }
        if one.mirror_by_digest_only && one.mirror.iter().any(|mirror| mirror.when != Which::All) {
            return Err(unusable(&format!(
                "the mirrors of {} have both mirror-by-digest-only and pull-from-mirror",
                one.prefix
            )));
        }
    }
    // Of two tables about the same names the first one counts.
    let mut seen = BTreeSet::new();
    registry.retain(|one| seen.insert(one.prefix.clone()));
    Ok(registry)
}

/// How much of the name the prefix stands for.
fn matching(name: &str, prefix: &str) -> Option<usize> {
    let end = match prefix.strip_prefix('*') {
        // Of the host alone, and of all of its last parts.
        Some(domain) => {
            let host = name.split('/').next().unwrap_or_default();
            let host = host.split(':').next().unwrap_or_default();
            (host.len() > domain.len() && host.ends_with(domain)).then_some(host.len())?
        }
        None => name.starts_with(prefix).then_some(prefix.len())?,
    };
    match name.as_bytes().get(end) {
        None | Some(b'/' | b'@') => Some(end),
        // Of a tag, not of a port: that containers/image takes a port for it, too, its authors call unintended.
        Some(b':') if prefix.contains('/') || prefix.starts_with('*') => Some(end),
        Some(_) => None,
    }
}

fn places(name: &RegistryName, all: &[Registry]) -> Result<Places> {
    let text = name.to_string();
    let found = all
        .iter()
        .filter_map(|one| Some((matching(&text, &one.prefix)?, one)))
        .max_by_key(|(_, one)| one.prefix.len());
    let here = Place { host: name.host.clone(), repository: name.repository.clone(), insecure: false };
    let Some((end, registry)) = found else { return Ok(Places { mirrors: Vec::new(), own: here }) };
    if registry.blocked {
        return Err(Error::new(
            Code::NotAllowed,
            format!("{name} may not be fetched: {} is blocked", registry.prefix),
        )
        .cause("registries.conf says so (/etc/containers, ~/.config/containers, and their registries.conf.d)")
        .fix(
            "name another registry; or ask the administrator to remove `blocked = true` from registries.conf",
        ));
    }
    let there = |location: &str, insecure: bool| -> Result<Place> {
        if location.is_empty() {
            return Ok(Place { insecure, ..here.clone() });
        }
        let moved = format!("{location}{}", &text[end..]);
        let host = location.split('/').next().unwrap_or_default();
        match RegistryName::parse(&moved) {
            Ok(moved) if moved.host == host => {
                Ok(Place { host: moved.host, repository: moved.repository, insecure })
            }
            _ => Err(Error::new(Code::Config, format!("registries.conf leads {name} to {moved:?}"))
                .cause("that is no image of a registry: HOST/REPOSITORY")
                .fix("correct location and prefix in registries.conf, which Podman reads as well")),
        }
    };
    let applies = |mirror: &&Mirror| match mirror.when {
        Which::All => !registry.mirror_by_digest_only || name.digest.is_some(),
        Which::DigestOnly => name.digest.is_some(),
        Which::TagOnly => name.digest.is_none(),
    };
    Ok(Places {
        mirrors: registry
            .mirror
            .iter()
            .filter(applies)
            .map(|mirror| there(&mirror.location, mirror.insecure))
            .collect::<Result<_>>()?,
        own: there(&registry.location, registry.insecure)?,
    })
}

/// A registries.conf, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz(text: &str) {
    let Ok(all) = parse(text) else { return };
    for name in ["r.example:5000/a/b", "docker.io/library/a"] {
        let Ok(name) = RegistryName::parse(name) else { continue };
        let Ok(Places { mirrors, own }) = places(&name, &all) else { continue };
        for place in mirrors.iter().chain([&own]) {
            let written = format!("{}/{}", place.host, place.repository);
            let read = RegistryName::parse(&written).expect("the name of an image");
            assert_eq!((&read.host, &read.repository), (&place.host, &place.repository), "{written}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Digest, ImageReference};
    use proptest::prelude::*;

    const FILE: &str = r#"
        unqualified-search-registries = ["a.example", "b.example"]
        short-name-mode = "enforcing"
        [[registry]]
        prefix = "hub.example"
        location = "inside.example:5000/hub/"
        [[registry.mirror]]
        location = "mirror.example/all"
        pull-from-mirror = ""
        [[registry.mirror]]
        location = "mirror.example:1/digests"
        insecure = true
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "mirror.example/tags"
        pull-from-mirror = "tag-only"
        [[registry]]
        prefix = "hub.example/"
        location = "second.example"
        [[registry]]
        prefix = "hub.example/team"
        location = "team.example"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "mirror.example"
        [[registry]]
        location = "bad.example"
        blocked = true
        [[registry]]
        prefix = "*.lab.example"
        insecure = true
        [registries.block]
        registries = ["old.example"]
        [aliases]
        ubi = "x.example/ubi"
    "#;

    fn found(name: &str) -> Result<Vec<String>> {
        let ImageReference::Registry(name) = ImageReference::parse(name).unwrap() else { panic!("{name}") };
        let Places { mirrors, own } = places(&name, &parse(FILE).unwrap())?;
        let show = |place: &Place| {
            format!("{}/{}{}", place.host, place.repository, if place.insecure { " insecure" } else { "" })
        };
        Ok(mirrors.iter().chain([&own]).map(show).collect())
    }

    #[test]
    fn a_name_leads_where_the_longest_prefix_says() {
        let digest = Digest::of(b"");
        for (name, expected) in [
            ("ubuntu", &["docker.io/library/ubuntu"][..]),
            (
                "hub.example/a/b:1",
                &["mirror.example/all/a/b", "mirror.example/tags/a/b", "inside.example:5000/hub/a/b"],
            ),
            (
                &format!("hub.example/a@{digest}"),
                &["mirror.example/all/a", "mirror.example:1/digests/a insecure", "inside.example:5000/hub/a"],
            ),
            ("hub.example/team/a:1", &["team.example/a"]),
            (&format!("hub.example/team/a@{digest}"), &["mirror.example/a", "team.example/a"]),
            (
                "hub.example/teams/a:1",
                &[
                    "mirror.example/all/teams/a",
                    "mirror.example/tags/teams/a",
                    "inside.example:5000/hub/teams/a",
                ],
            ),
            ("hub.example:5000/a", &["hub.example:5000/a"]),
            ("hub.example.org/a", &["hub.example.org/a"]),
            ("x.lab.example:5000/a", &["x.lab.example:5000/a insecure"]),
            ("lab.example/a", &["lab.example/a"]),
        ] {
            assert_eq!(found(name).unwrap(), expected, "{name}");
        }
        for blocked in ["bad.example/a", "old.example/a/b:1"] {
            assert_eq!(found(blocked).unwrap_err().code(), Code::NotAllowed, "{blocked}");
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bad in [
            "[",
            "registry = 1",
            "[[registry]]\ninsecure = true",
            "[[registry]]\nprefix = \"a.example\"",
            "[[registry]]\nlocation = 1",
            "[[registry]]\nlocation = \"a.example\"\n[[registry.mirror]]\ninsecure = true",
            "[[registry]]\nlocation = \"a.example\"\n[[registry.mirror]]\nlocation = \"b.example\"\npull-from-mirror = \"never\"",
            "[[registry]]\nlocation = \"a.example\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"b.example\"\n\
             pull-from-mirror = \"tag-only\"",
        ] {
            assert_eq!(parse(bad).unwrap_err().code(), Code::Config, "{bad}");
        }
        let all = parse("[[registry]]\nprefix = \"a.example/b\"\nlocation = \"nodot\"").unwrap();
        let ImageReference::Registry(name) = ImageReference::parse("a.example/b/c").unwrap() else {
            panic!()
        };
        assert_eq!(places(&name, &all).unwrap_err().code(), Code::Config);
    }

    proptest! {
        #[test]
        fn any_file_leads_somewhere_or_is_refused(prefix in "[a-z.*/:@]{0,12}", location in "[a-z.*/:@]{0,12}", name in "[a-z.]{1,8}(:1)?/[a-z/]{1,8}") {
            let text = format!("[[registry]]\nprefix = {prefix:?}\nlocation = {location:?}");
            if let (Ok(all), Ok(ImageReference::Registry(name))) = (parse(&text), ImageReference::parse(&name)) {
                let _ = places(&name, &all);
            }
        }
    }
}
