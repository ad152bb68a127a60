//! Who asks: credentials as Docker and Podman keep them, and what a registry's challenge wants.

use crate::{
    error::{Code, Error, OrFail, Result},
    image::reference::{DOCKER_HUB, DOCKER_HUB_ALIAS, DOCKER_HUB_KEY},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    io::{ErrorKind, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

/// What proves who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password.
    Password {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// What `docker login` got in exchange for them, where the registry speaks OAuth 2.
    IdentityToken(String),
}

/// A file of credentials (containers-auth.json(5); Docker's config.json has the same keys).
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    identitytoken: Option<String>,
}

/// Where the credentials of a registry are.
enum Place {
    /// Here.
    Here(Credentials),
    /// A program `docker-credential-NAME` has them, under this address.
    Helper(String, String),
}

/// The credentials for a repository; none where nobody logged in.
///
/// # Errors
/// [`Code::NotAuthorised`] where a file cannot be understood, or its helper fails.
pub fn find(host: &str, repository: &str) -> Result<Option<Credentials>> {
    for path in files() {
        let bytes = match std::fs::read_to_string(&path) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            read => read.or_fail(Code::NotAuthorised, || format!("{} cannot be read", path.display()))?,
        };
        let place = look_up(&bytes, host, repository).map_err(|error| {
            error.context(format!("the credentials in {} cannot be used", path.display()))
        })?;
        match place {
            Some(Place::Here(credentials)) => return Ok(Some(credentials)),
            Some(Place::Helper(name, address)) => {
                if let Some(credentials) = ask_helper(&name, &address)? {
                    return Ok(Some(credentials));
                }
            }
            None => {}
        }
    }
    Ok(None)
}

/// The files, in the order in which Podman looks (containers-auth.json(5)); `DOCKER_CONFIG` is Docker's.
fn files() -> Vec<PathBuf> {
    let directory = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(file) = std::env::var_os("REGISTRY_AUTH_FILE").filter(|file| !file.is_empty()) {
        return vec![file.into()];
    }
    let runtime = directory("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
    let docker = directory("DOCKER_CONFIG").or_else(|| directory("HOME").map(|home| home.join(".docker")));
    runtime.into_iter().chain(docker.map(|dir| dir.join("config.json"))).collect()
}

fn look_up(text: &str, host: &str, repository: &str) -> Result<Option<Place>> {
    let not_understood = "it is not what `docker login` or `podman login` writes";
    let file: AuthFile = serde_json::from_str(text).or_fail(Code::NotAuthorised, || not_understood)?;
    let own = if host == DOCKER_HUB { DOCKER_HUB_KEY } else { host };
    if let Some(helper) = file.cred_helpers.get(host).or_else(|| file.cred_helpers.get(own)) {
        return Ok(Some(Place::Helper(helper.clone(), own.to_owned())));
    }
    for key in keys(host, repository) {
        let Some(entry) = file.auths.get(&key) else { continue };
        if let Some(token) = entry.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Some(Place::Here(Credentials::IdentityToken(token.clone()))));
        }
        if let Some(auth) = entry.auth.as_ref().filter(|auth| !auth.is_empty()) {
            return decode(auth)
                .map(|credentials| Some(Place::Here(credentials)))
                .ok_or_else(|| Error::new(Code::NotAuthorised, format!("its entry {key:?} is damaged")));
        }
    }
    Ok(file.creds_store.map(|helper| Place::Helper(helper, own.to_owned())))
}

/// The most special first: Podman's keys may name a repository or a part of it; Docker's may be addresses.
fn keys(host: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = format!("{host}/{repository}");
    while path.len() > host.len() {
        keys.push(path.clone());
        path.truncate(path.rfind('/').unwrap_or(0));
    }
    if host == DOCKER_HUB {
        keys.extend([DOCKER_HUB_KEY, DOCKER_HUB_ALIAS, DOCKER_HUB].map(str::to_owned));
    } else {
        keys.push(host.to_owned());
        for scheme in ["https", "http"] {
            keys.extend(["", "/", "/v1/", "/v2/"].map(|path| format!("{scheme}://{host}{path}")));
        }
    }
    keys
}

fn decode(auth: &str) -> Option<Credentials> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let bytes = STANDARD.decode(auth.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Credentials::Password { user: user.into(), password: password.trim_end_matches('\0').into() })
}

/// `docker-credential-NAME get` (docker/docker-credential-helpers): an address in, an object out.
fn ask_helper(name: &str, address: &str) -> Result<Option<Credentials>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let program = format!("docker-credential-{name}");
    let fail = || format!("the credential helper {program} failed");
    if name.contains('/') {
        return Err(Error::new(Code::NotAuthorised, fail()).cause("a helper's name is no path"));
    }
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .or_fail(Code::NotAuthorised, fail)?;
    if let Some(mut input) = child.stdin.take() {
        // One that has nothing for anybody may not read it.
        let _ = input.write_all(address.as_bytes());
    }
    let output = child.wait_with_output().or_fail(Code::NotAuthorised, fail)?;
    if !output.status.success() {
        // The helpers' library prints failures to stdout, and this one is an answer.
        let said = String::from_utf8_lossy(&output.stdout);
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(Error::new(Code::NotAuthorised, fail()).cause(said.trim()));
    }
    let answer: Answer = serde_json::from_slice(&output.stdout).or_fail(Code::NotAuthorised, fail)?;
    Ok(Some(if answer.username == "<token>" {
        Credentials::IdentityToken(answer.secret)
    } else {
        Credentials::Password { user: answer.username, password: answer.secret }
    }))
}

/// `Authorization: Basic` (RFC 7617).
pub fn basic(user: &str, password: &str) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// What a registry wants of who asks (RFC 7235, `WWW-Authenticate`).
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    /// Name and password with each request.
    Basic,
    /// A token that is had elsewhere (distribution specification's token authentication).
    Bearer {
        /// Where.
        realm: String,
        /// For whom.
        service: Option<String>,
        /// For what.
        scope: Option<String>,
    },
}

impl Challenge {
    /// From a header's value; a registry names one scheme a header.
    pub fn parse(value: &str) -> Option<Self> {
        let (scheme, rest) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut words = parameters(rest);
        Some(Self::Bearer {
            realm: words.remove("realm")?,
            service: words.remove("service"),
            scope: words.remove("scope"),
        })
    }
}

/// `a="b, c",d=e`
fn parameters(mut text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    while let Some((name, rest)) = text.split_once('=') {
        let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
        let rest = rest.trim_start();
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(',').unwrap_or((rest, "")),
        };
        found.insert(name, value.trim().to_owned());
        text = after;
    }
    found
}

/// A file of credentials, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz(text: &str) {
    for (host, repository) in [("r.example:5000", "a/b"), (DOCKER_HUB, "library/a"), ("", "")] {
        let _ = look_up(text, host, repository);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn user(text: &str, host: &str, repository: &str) -> String {
        match look_up(text, host, repository).unwrap() {
            Some(Place::Here(Credentials::Password { user, .. })) => user,
            Some(Place::Here(Credentials::IdentityToken(token))) => format!("token {token}"),
            Some(Place::Helper(name, address)) => format!("{name} {address}"),
            None => "nobody".into(),
        }
    }

    #[test]
    fn the_most_special_entry_counts() {
        // a:x, b:x, c:x, d:x
        let text = r#"{"auths": {
            "h:5000": {"auth": "YTp4"}, "h:5000/team": {"auth": "Yjp4"}, "https://old.example/v1/": {"auth": "Yzp4"},
            "HUB": {"auth": "ZDp4"}, "t.example": {"auth": "YTp4", "identitytoken": "T"}, "e.example": {}},
            "credHelpers": {"gcr.example": "gcloud"}}"#
            .replace("HUB", DOCKER_HUB_KEY);
        let text = text.as_str();
        assert_eq!(user(text, "h:5000", "app"), "a");
        assert_eq!(user(text, "h:5000", "team/app"), "b");
        assert_eq!(user(text, "h:5000", "teammates/app"), "a");
        assert_eq!(user(text, "old.example", "app"), "c");
        assert_eq!(user(text, "docker.io", "library/ubuntu"), "d");
        assert_eq!(user(text, "t.example", "app"), "token T");
        assert_eq!(user(text, "gcr.example", "app"), "gcloud gcr.example");
        assert_eq!(user(text, "e.example", "app"), "nobody");
        let stored = r#"{"auths": {"h:5000": {}}, "credsStore": "pass"}"#;
        assert_eq!(user(stored, "h:5000", "app"), "pass h:5000");
        assert_eq!(user(stored, "docker.io", "a/b"), format!("pass {DOCKER_HUB_KEY}"));
        assert!(
            look_up("[", "h", "r").is_err() && look_up(r#"{"auths":{"h":{"auth":"!"}}}"#, "h", "r").is_err()
        );
    }

    #[test]
    fn challenges_are_understood() {
        let bearer = Challenge::parse(
            r#"Bearer realm="https://auth.example/token",service="registry, the first",scope="repository:a/b:pull""#,
        );
        assert_eq!(
            bearer,
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".into(),
                service: Some("registry, the first".into()),
                scope: Some("repository:a/b:pull".into()),
            })
        );
        assert_eq!(Challenge::parse("basic realm=x"), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Bearer"), None);
        assert_eq!(Challenge::parse("Negotiate"), None);
    }

    proptest! {
        #[test]
        fn any_challenge_is_understood_or_none(text in ".{0,80}") { let _ = Challenge::parse(&text); }
        #[test]
        fn any_file_is_understood_or_refused(text in ".{0,80}") { let _ = look_up(&text, "h", "a/b"); }
    }
}
