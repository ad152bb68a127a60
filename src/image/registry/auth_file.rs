//! Files of credentials, as `docker login` and `podman login` write them (containers-auth.json(5); Docker's config.json has the same
//! keys).
//!
//! The rule of [`go_json`] applies: whatever Docker or containers/image accept is accepted with the same value. A byte order
//! mark and an empty file are also accepted, because people edit these files.

use crate::{
    error::{Code, Error, OrFail, Result},
    formats::go_json,
    image::reference::{DOCKER_HUB, DOCKER_HUB_ALIAS, DOCKER_HUB_HOST, DOCKER_HUB_KEY},
};
use serde::Deserialize;
use std::collections::BTreeMap;

/// A secret that authenticates a user to a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// A name and a password, as the bytes that were typed.
    Password {
        /// The name; not empty.
        user: Vec<u8>,
        /// The password; not empty.
        password: Vec<u8>,
    },
    /// The token that `docker login` received from a registry that supports OAuth 2.
    IdentityToken(String),
}

/// The entry of a file for one repository.
#[derive(PartialEq, Eq)]
pub enum Entry {
    /// The secret itself.
    Secret(Secret),
    /// The name of the helper `docker-credential-NAME` that is configured for this host.
    Helper(String),
    /// The name of the helper `docker-credential-NAME` that keeps all credentials of this file.
    Store(String),
    /// The entry holds no secret, for this reason.
    Unusable(String),
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: BTreeMap<String, Login>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    auth: String,
    identitytoken: String,
    username: String,
    password: String,
}

/// Looks up a repository. `legacy` is the format of `~/.dockercfg`, which has only logins.
///
/// # Errors
/// [`Code::NotAuthorised`] if the file or the entry is damaged.
pub fn look_up(bytes: &[u8], legacy: bool, host: &str, repository: &str) -> Result<Option<Entry>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    let parsed = if legacy {
        go_json::from_slice(bytes).map(|auths| AuthFile { auths, ..AuthFile::default() })
    } else {
        go_json::from_slice::<AuthFile>(bytes)
    };
    let file =
        parsed.or_fail(Code::NotAuthorised, || "it is not what `docker login` and `podman login` write")?;
    let own = normal_host(host);
    let helper = |(key, helper): (&String, &String)| {
        (normal_key(key, true) == own && !helper.is_empty()).then(|| helper.clone())
    };
    if let Some(helper) = file.cred_helpers.iter().find_map(helper) {
        return Ok(Some(Entry::Helper(helper)));
    }
    let mut unusable = None;
    for (key, login) in matching(&file.auths, &own, repository, legacy) {
        match login.secret() {
            Ok(Some(secret)) => return Ok(Some(Entry::Secret(secret))),
            Ok(None) => {}
            Err(Fault::Skipped(why)) => unusable = Some(format!("its entry {key:?} {why}")),
            Err(Fault::Damaged(why)) => {
                return Err(Error::new(Code::NotAuthorised, format!("its entry {key:?} is damaged"))
                    .cause(why)
                    .fix(format!("write it again: docker login {host}, or podman login {host}")));
            }
        }
    }
    if !file.creds_store.is_empty() {
        return Ok(Some(Entry::Store(file.creds_store)));
    }
    Ok(unusable.map(Entry::Unusable))
}

/// The entries for a repository, the most specific first: keys may name a repository or a prefix of it (Podman), a host, or
/// an address that begins with the host (old versions of Docker).
fn matching<'a>(
    auths: &'a BTreeMap<String, Login>,
    host: &str,
    repository: &str,
    legacy: bool,
) -> Vec<(&'a String, &'a Login)> {
    let mut found = Vec::new();
    let mut path = format!("{host}/{repository}");
    loop {
        // An exact spelling takes precedence over an address.
        let exact = auths.iter().filter(|(key, _)| key.as_str() == path);
        let spelled = |key: &str| key != path && normal_key(key, legacy) == path;
        found.extend(exact.chain(auths.iter().filter(|(key, _)| spelled(key))));
        if path.len() <= host.len() {
            return found;
        }
        path.truncate(path.rfind('/').unwrap_or(0));
    }
}

/// The host in lower case, with one name for the many of Docker Hub.
fn normal_host(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if [DOCKER_HUB_ALIAS, DOCKER_HUB_HOST].contains(&host.as_str()) { DOCKER_HUB.into() } else { host }
}

/// Normalises a key to `HOST[/PATH]`. The path of an address is dropped, as in containers/image.
fn normal_key(key: &str, cut: bool) -> String {
    let stripped = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let rest = stripped.unwrap_or(key);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = normal_host(host);
    if path.is_empty() || cut || stripped.is_some() { host } else { format!("{host}/{path}") }
}

/// The reason why a login has no secret.
enum Fault {
    /// Docker and Podman ignore such a login.
    Skipped(String),
    /// Podman fails on such a login.
    Damaged(String),
}

impl Login {
    fn secret(&self) -> Result<Option<Secret>, Fault> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Secret::IdentityToken(self.identitytoken.clone())));
        }
        let (user, password) = if self.auth.is_empty() {
            (self.username.clone().into_bytes(), self.password.clone().into_bytes())
        } else {
            decode(&self.auth)?
        };
        Ok(password_of(user, password))
    }
}

/// Both a name and a password are required (distribution, `ErrNoBasicAuthCredentials`).
pub fn password_of(user: Vec<u8>, password: Vec<u8>) -> Option<Secret> {
    (!user.is_empty() && !password.is_empty()).then_some(Secret::Password { user, password })
}

/// `NAME:PASSWORD` in base64. As in Go, line breaks are ignored and unused bits may be set; other white space is ignored as well.
fn decode(auth: &str) -> Result<(Vec<u8>, Vec<u8>), Fault> {
    use base64::{
        Engine,
        alphabet::STANDARD,
        engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig},
    };
    let engine =
        GeneralPurpose::new(&STANDARD, GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true));
    let text: String = auth.chars().filter(|letter| !letter.is_ascii_whitespace()).collect();
    let bytes =
        engine.decode(text).map_err(|error| Fault::Damaged(format!("auth is not base64: {error}")))?;
    let colon = bytes.iter().position(|&byte| byte == b':');
    let colon = colon.ok_or_else(|| Fault::Skipped("has no colon between name and password".into()))?;
    let mut password = &bytes[colon + 1..];
    // Old versions of Docker padded it.
    while let [0, rest @ ..] | [rest @ .., 0] = password {
        password = rest;
    }
    Ok((bytes[..colon].to_vec(), password.to_vec()))
}

/// The addresses under which a credential helper may keep a host's credentials: those of `docker login`, then of `podman login`.
pub fn helper_addresses(host: &str) -> Vec<String> {
    let host = normal_host(host);
    if host == DOCKER_HUB { vec![DOCKER_HUB_KEY.into(), host] } else { vec![host] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(text: &str, host: &str, repository: &str) -> String {
        match look_up(text.as_bytes(), false, host, repository) {
            Ok(Some(Entry::Secret(Secret::Password { user, password }))) => {
                format!("{}:{}", user.escape_ascii(), password.escape_ascii())
            }
            Ok(Some(Entry::Secret(Secret::IdentityToken(token)))) => format!("token {token}"),
            Ok(Some(Entry::Helper(name))) => format!("helper {name}"),
            Ok(Some(Entry::Store(name))) => format!("store {name}"),
            Ok(Some(Entry::Unusable(why))) => format!("unusable: {why}"),
            Ok(None) => "none".into(),
            Err(error) => format!("error: {}: {}", error.what(), error.cause_line()),
        }
    }

    #[test]
    fn the_most_specific_entry_is_used() {
        // a:x, b:x, c:x, d:x
        let text = r#"{"auths": {
            "h:5000": {"auth": "YTp4"}, "h:5000/team": {"auth": "Yjp4"}, "https://old.example/v1/": {"auth": "Yzp4"},
            "HUB": {"auth": "ZDp4"}, "t.example": {"auth": "YTp4", "identitytoken": "T"}, "e.example": {}, "n.example": null},
            "credHelpers": {"gcr.example": "gcloud"}}"#
            .replace("HUB", DOCKER_HUB_KEY);
        for (host, repository, expected) in [
            ("h:5000", "app", "a:x"),
            ("h:5000", "team/app", "b:x"),
            ("h:5000", "team", "b:x"),
            ("h:5000", "teammates/app", "a:x"),
            ("h:5001", "app", "none"),
            ("h", "app", "none"),
            ("H:5000", "app", "a:x"),
            ("old.example", "app", "c:x"),
            ("docker.io", "library/ubuntu", "d:x"),
            ("t.example", "app", "token T"),
            ("gcr.example", "app", "helper gcloud"),
            ("GCR.example", "app", "helper gcloud"),
            ("e.example", "app", "none"),
            ("n.example", "app", "none"),
        ] {
            assert_eq!(found(&text, host, repository), expected, "{host}/{repository}");
        }
    }

    #[test]
    fn every_spelling_of_a_host_is_found_and_no_other_host() {
        let one = |key: &str| format!(r#"{{"auths": {{"{key}": {{"auth": "YTp4"}}}}}}"#);
        for key in [
            "h.example",
            "H.Example",
            "h.example/",
            "https://h.example",
            "http://h.example",
            "https://h.example/",
            "https://h.example/v1/",
            "https://h.example/v2/",
            "https://h.example/v1/users/",
            "https://h.example/some/path",
            "h.example/a",
            "h.example/a/b",
        ] {
            assert_eq!(found(&one(key), "h.example", "a/b"), "a:x", "{key}");
        }
        for key in [
            "h.example.evil",
            "https://h.example.evil/",
            "evil/h.example",
            "h.example:5000",
            "h.example/b",
            "h.example/a/b/c",
            "example",
            "*.example",
            "",
        ] {
            assert_eq!(found(&one(key), "h.example", "a/b"), "none", "{key}");
        }
        for key in [
            DOCKER_HUB_KEY,
            "docker.io",
            "index.docker.io",
            "registry-1.docker.io",
            "https://registry-1.docker.io/v2/",
            "docker.io/library",
            "https://index.docker.io/v1/users/",
        ] {
            assert_eq!(found(&one(key), "docker.io", "library/ubuntu"), "a:x", "{key}");
        }
    }

    #[test]
    fn a_login_is_read_as_docker_and_podman_read_it() {
        for (login, expected) in [
            (r#"{"auth": "YTp4"}"#, "a:x"),
            (r#"{"Auth": "YTp4"}"#, "a:x"),
            (r#"{"auth": "YT\np4\r\n"}"#, "a:x"),
            (r#"{"auth": " YTp4 "}"#, "a:x"),
            (r#"{"auth": "YTp4AAA="}"#, "a:x"),
            (r#"{"auth": "YTpiOmM="}"#, "a:b:c"),
            // Unused bits of the last digit.
            (r#"{"auth": "YTpiOmN="}"#, "a:b:c"),
            // Latin-1.
            (r#"{"auth": "YTrk"}"#, "a:\\xe4"),
            (r#"{"username": "a", "password": "x"}"#, "a:x"),
            (r#"{"auth": "YTp4", "username": "b", "password": "y"}"#, "a:x"),
            // No name, no password, neither of both.
            (r#"{"auth": "Ong="}"#, "none"),
            (r#"{"auth": "YTo="}"#, "none"),
            (r#"{"auth": "Og=="}"#, "none"),
            (r#"{"username": "", "password": ""}"#, "none"),
            (r#"{"auth": null}"#, "none"),
            (r#"{"auth": "YTo=", "identitytoken": "T"}"#, "token T"),
            (r#"{"auth": "YQ=="}"#, "unusable: its entry \"h\" has no colon between name and password"),
        ] {
            assert_eq!(found(&format!("{{\"auths\": {{\"h\": {login}}}}}"), "h", "r"), expected, "{login}");
        }
        for damaged in
            [r#"{"auth": "!"}"#, r#"{"auth": "YTp4Y"}"#, r#"{"auth": "YTo"}"#, r#"{"auth": 1}"#, "[]", "1"]
        {
            let said = found(&format!("{{\"auths\": {{\"h\": {damaged}}}}}"), "h", "r");
            assert!(said.starts_with("error: "), "{damaged}: {said}");
        }
        // Another host's entry may be damaged.
        assert_eq!(found(r#"{"auths": {"h": {"auth": "!"}, "g": {"auth": "YTp4"}}}"#, "g", "r"), "a:x");
    }

    #[test]
    fn a_file_is_read_however_it_was_edited() {
        let text =
            "{\"auths\": {\"h\": {\"auth\": \"YTp4\"}}, \"HttpHeaders\": {\"x\": 1}, \"psFormat\": \"x\"}";
        let windows = text.replace(' ', "\r\n");
        for text in
            [text.to_owned(), format!("\u{feff}{text}"), windows.clone(), format!("\u{feff}{windows}\r\n")]
        {
            assert_eq!(found(&text, "h", "r"), "a:x", "{text:?}");
        }
        for empty in [
            "",
            "\n",
            "\u{feff}\r\n",
            "{}",
            r#"{"auths": null}"#,
            r#"{"credsStore": ""}"#,
            r#"{"credsStore": null}"#,
        ] {
            assert_eq!(found(empty, "h", "r"), "none", "{empty:?}");
        }
        for broken in ["{", "[]", "auth", r#"{"auths": []}"#, r#"{"auths": {}} x"#] {
            assert!(found(broken, "h", "r").starts_with("error: "), "{broken:?}");
        }
        assert_eq!(
            found(r#"{"auths": {"h": {}}, "credsStore": "desktop.exe"}"#, "h", "r"),
            "store desktop.exe"
        );
        assert_eq!(found(r#"{"auths": {"h": {"auth": "YTp4"}}, "credsStore": "pass"}"#, "h", "r"), "a:x");
        let legacy =
            look_up(br#"{"https://h/v1/": {"auth": "YTp4", "email": "x"}}"#, true, "h", "r").unwrap();
        assert!(matches!(legacy, Some(Entry::Secret(_))));
    }

    proptest! {
        #[test]
        fn any_file_is_understood_or_refused(text in ".{0,80}") { let _ = look_up(text.as_bytes(), false, "h", "a/b"); }
        #[test]
        fn any_login_is_understood_or_refused(auth in "[A-Za-z0-9+/= ]{0,20}") {
            let _ = found(&format!(r#"{{"auths":{{"h":{{"auth":"{auth}"}}}}}}"#), "h", "a/b");
        }
    }
}
