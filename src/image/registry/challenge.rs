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
    /// Parses the value of a header.
    pub fn parse(value: &str) -> Option<Self> {
        let value = value.trim();
        let (scheme, rest) = value.split_once([' ', '\t']).unwrap_or((value, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut words = parameters(rest);
        Some(Self::Bearer {
            realm: words.remove("realm").filter(|realm| !realm.is_empty())?,
            service: words.remove("service"),
            scope: words.remove("scope"),
        })
    }
}

/// Parses `a="b, c", d=e`; in a quoted string a backslash escapes the next character.
fn parameters(mut text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    while let Some((name, rest)) = text.split_once('=') {
        let name = name.trim_matches([' ', '\t', ',']).to_ascii_lowercase();
        let rest = rest.trim_start();
        let (value, after) = if let Some(quoted) = rest.strip_prefix('"') {
            unquote(quoted)
        } else {
            let (value, after) = rest.split_once(',').unwrap_or((rest, ""));
            (value.trim().to_owned(), after)
        };
        // The first of two is used: the second may have been added on the way.
        found.entry(name).or_insert(value);
        text = after;
    }
    found
}

/// Splits off a quoted string whose first quote is already removed.
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
            (r#"Bearer realm="open"#, bearer("open", None, None)),
            ("basic realm=x", Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("Bearer", None),
            ("Bearer realm=\"\"", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(value), expected, "{value}");
        }
    }

    proptest! {
        #[test]
        fn any_challenge_is_understood_or_not(text in ".{0,80}") { let _ = Challenge::parse(&text); }
    }
}
