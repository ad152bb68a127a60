//! Parses authentication challenges of registries (RFC 9110, section 11.6.1: `WWW-Authenticate`).

use std::collections::BTreeMap;

/// A challenge of a supported scheme.
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    /// Name and password with each request.
    Basic,
    /// A token of a token service (distribution specification, token authentication).
    Bearer {
        /// The address of the token service.
        realm: String,
        /// The name of the registry at the token service.
        service: Option<String>,
        /// The rights that the token is to carry.
        scope: Option<String>,
    },
}

impl Challenge {
    /// Chooses among the values of all headers, which hold one challenge or several each. A token is preferred to a password,
    /// as in containerd: it is also given without an account, and it is not the password.
    pub fn choose<'a>(values: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut known: Vec<Self> = values.into_iter().flat_map(challenges).collect();
        let token = known.iter().position(|challenge| *challenge != Self::Basic);
        if known.is_empty() { None } else { Some(known.swap_remove(token.unwrap_or(0))) }
    }

    fn new(scheme: &str, mut parameters: BTreeMap<String, String>) -> Option<Self> {
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        Some(Self::Bearer {
            realm: parameters.remove("realm").filter(|realm| !realm.is_empty())?,
            service: parameters.remove("service"),
            scope: parameters.remove("scope"),
        })
    }
}

/// Parses the challenges of one header: `Negotiate, Basic realm="x", Bearer realm="y",service=z`. A word that is followed by
/// another word, and not by `=`, is a scheme.
fn challenges(mut text: &str) -> Vec<Challenge> {
    let (mut found, mut scheme, mut parameters) = (Vec::new(), "", BTreeMap::new());
    loop {
        text = text.trim_start_matches([' ', '\t', ',', ';']);
        let end = text.find([' ', '\t', ',', ';', '=', '"']).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        let after = rest.trim_start_matches([' ', '\t']);
        if let Some(value) = after.strip_prefix('=').filter(|_| !word.is_empty() && !scheme.is_empty()) {
            let value = value.trim_start_matches([' ', '\t']);
            let (value, rest) = if let Some(quoted) = value.strip_prefix('"') {
                unquote(quoted)
            } else {
                let end = value.find([' ', '\t', ',', ';']).unwrap_or(value.len());
                (value[..end].to_owned(), &value[end..])
            };
            // The first of two is used: the second may have been added on the way.
            parameters.entry(word.to_ascii_lowercase()).or_insert(value);
            text = rest;
            continue;
        }
        found.extend(Challenge::new(scheme, std::mem::take(&mut parameters)));
        if text.is_empty() {
            return found;
        }
        scheme = word;
        text = if word.is_empty() { text.get(1..).unwrap_or_default() } else { rest };
    }
}

/// Splits off a quoted string whose first quote is already removed; a backslash escapes the next character.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, next)| next)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges_are_understood() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(Into::into),
                scope: scope.map(Into::into),
            })
        };
        let scope = "repository:a/b:pull";
        let whole = r#"Bearer realm="https://auth.example/token",service="registry, the first",scope="repository:a/b:pull""#;
        for (value, expected) in [
            (whole, bearer("https://auth.example/token", Some("registry, the first"), Some(scope))),
            ("bearer  realm = \"x\" , service=y", bearer("x", Some("y"), None)),
            ("BEARER\trealm=x", bearer("x", None, None)),
            (r#"Bearer realm="a\"b\\c""#, bearer("a\"b\\c", None, None)),
            (r#"Bearer realm="first",realm="second""#, bearer("first", None, None)),
            (r#"Bearer realm="x" service="y""#, bearer("x", Some("y"), None)),
            (r#"Bearer realm="x";service="y","#, bearer("x", Some("y"), None)),
            (r#"Bearer ,realm="x""#, bearer("x", None, None)),
            ("Bearer realm=x,service=caf\u{e9}", bearer("x", Some("caf\u{e9}"), None)),
            (r#"Bearer error="invalid_token",error_description="a, b",realm="x""#, bearer("x", None, None)),
            // Several in one header.
            (r#"Basic realm="x", Bearer realm="y",service=z"#, bearer("y", Some("z"), None)),
            (r#"Bearer realm="y",service=z, Basic realm="x""#, bearer("y", Some("z"), None)),
            (r#"Negotiate, Bearer realm="y""#, bearer("y", None, None)),
            (r#"NTLM TlRMTVNT==, Bearer realm="y""#, bearer("y", None, None)),
            (r#"Negotiate YII=, Basic realm="x""#, Some(Challenge::Basic)),
            (
                r#"Digest realm="d", qop="auth,auth-int", nonce="n", Bearer realm="y""#,
                bearer("y", None, None),
            ),
            (r#"Bearer error="invalid_request", Basic realm="x""#, Some(Challenge::Basic)),
            (r#"Basic realm="a, Bearer realm=b""#, Some(Challenge::Basic)),
            (r#"realm="x""#, None),
            ("Digest realm=d", None),
            (r#"Bearer realm="open"#, bearer("open", None, None)),
            ("basic realm=x", Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("Bearer", None),
            ("Bearer realm=\"\"", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(Challenge::choose([value]), expected, "{value}");
        }
        // Several headers.
        let token = "Bearer realm=x";
        for values in [&["Basic realm=y", token][..], &[token, "Basic realm=y"], &["Negotiate", "", token]] {
            assert_eq!(Challenge::choose(values.iter().copied()), bearer("x", None, None), "{values:?}");
        }
        assert_eq!(Challenge::choose(["Negotiate", "Basic realm=y"]), Some(Challenge::Basic));
        assert_eq!(Challenge::choose([]), None);
    }

    proptest! {
        #[test]
        fn any_challenge_is_understood_or_not(text in ".{0,80}") { let _ = Challenge::choose([text.as_str()]); }
    }
}
