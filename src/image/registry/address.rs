//! Addresses of HTTP (RFC 3986): parsing, references relative to an address, and origins.
//!
//! An origin is scheme, host and port. Credentials belong to an origin, so two spellings of one origin must compare equal,
//! and ambiguous spellings must be refused:
//!
//! * Hosts are compared in lower case, IPv6 addresses by value, and a default port equals a missing port.
//! * A host with a trailing dot is a different host, as in Go.
//! * User names, backslashes, percent signs and non-ASCII letters in the host are refused.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv6Addr},
};

/// Scheme, host and port of a server. Displayed without the default port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    https: bool,
    /// In lower case; IPv6 addresses in brackets.
    host: String,
    port: u16,
}

/// An address of HTTP or HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    origin: Origin,
    /// Path and query, in the ASCII characters that may be sent. It begins with `/`.
    path: String,
}

impl Origin {
    /// `HOST[:PORT]`, as in an image's name.
    ///
    /// # Errors
    /// A sentence without its subject: "is …".
    pub fn parse(https: bool, text: &str) -> Result<Self, String> {
        if text.contains('@') {
            return Err("contains a user name".into());
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or("is not a host: a bracket is missing")?;
                let address: Ipv6Addr = host.parse().map_err(|_| "is not an IPv6 address".to_owned())?;
                (format!("[{address}]"), after.strip_prefix(':').or((after.is_empty()).then_some("")))
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host.to_ascii_lowercase(), Some(port)),
                None => (text.to_ascii_lowercase(), Some("")),
            },
        };
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if host.is_empty() || !host.starts_with('[') && !host.bytes().all(allowed) {
            return Err("is not a host's name or address".into());
        }
        let port = match port.ok_or("is not HOST:PORT")? {
            "" => Self::default_port(https),
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().ok().filter(|&port| port != 0).ok_or("has a port out of range")?
            }
            _ => return Err("has a port that is not a number".into()),
        };
        Ok(Self { https, host, port })
    }

    fn default_port(https: bool) -> u16 {
        if https { 443 } else { 80 }
    }

    /// Whether the connection is encrypted.
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// Whether the host is this machine: Docker trusts such registries without certificates (dockerd(8), "insecure registries").
    pub fn is_loopback(&self) -> bool {
        let name = self.host.trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// `HOST[:PORT]` without the default port.
    pub fn host(&self) -> String {
        if self.port == Self::default_port(self.https) {
            self.host.clone()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The names of the host in configuration files: `HOST:PORT`, and `HOST` if the port is the default.
    pub fn names(&self) -> Vec<String> {
        let with_port = format!("{}:{}", self.host, self.port);
        let plain = (self.port == Self::default_port(self.https)).then(|| self.host.clone());
        plain.into_iter().chain([with_port]).collect()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.https { "https" } else { "http" }, self.host())
    }
}

impl Address {
    /// An absolute address. A fragment is dropped.
    ///
    /// # Errors
    /// A sentence without its subject.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("is not an address: no https:// in front")?;
        let https = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            other => return Err(format!("is an address of {other:?}, and only http and https are spoken")),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let origin = Origin::parse(https, &rest[..end])?;
        Ok(Self { origin, path: path_and_query(&rest[end..]) })
    }

    /// Resolves a reference in a response from this address (RFC 3986, section 5.2).
    ///
    /// # Errors
    /// A sentence without its subject.
    pub fn join(&self, reference: &str) -> Result<Self, String> {
        let reference = reference.trim();
        let scheme_end = reference.find([':', '/', '?', '#']);
        if scheme_end.is_some_and(|end| reference[end..].starts_with(':')) {
            return Self::parse(reference);
        }
        let scheme = if self.origin.https { "https" } else { "http" };
        if reference.starts_with("//") {
            return Self::parse(&format!("{scheme}:{reference}"));
        }
        let own = self.path.split('?').next().unwrap_or_default();
        let text = match reference.chars().next() {
            None => return Err("is empty".into()),
            Some('/') => reference.to_owned(),
            Some('?' | '#') => format!("{own}{reference}"),
            Some(_) => format!("{}/{reference}", own.rsplit_once('/').map_or("", |(parent, _)| parent)),
        };
        Ok(Self { origin: self.origin.clone(), path: path_and_query(&text) })
    }

    /// Appends parameters to the query.
    #[must_use]
    pub fn with_query<'a>(&self, pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut path = self.path.clone();
        for (name, value) in pairs {
            path.push(if path.contains('?') { '&' } else { '?' });
            path.push_str(name);
            path.push('=');
            path.extend(value.bytes().map(|byte| match byte {
                _ if byte.is_ascii_alphanumeric() || b"-._~:/,".contains(&byte) => {
                    char::from(byte).to_string()
                }
                _ => format!("%{byte:02X}"),
            }));
        }
        Self { origin: self.origin.clone(), path }
    }

    /// Appends `path`, which needs no escaping.
    #[must_use]
    pub fn below(&self, path: &str) -> Self {
        Self { origin: self.origin.clone(), path: format!("{}/{path}", self.path) }
    }

    /// Scheme, host and port.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The address without its query, for messages: a query may be a signature that gives access.
    pub fn public(&self) -> String {
        format!("{}{}", self.origin, self.path.split('?').next().unwrap_or_default())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, self.path)
    }
}

/// Path and query without fragment and dot segments, percent-encoded where needed.
fn path_and_query(text: &str) -> String {
    let text = text.split('#').next().unwrap_or_default();
    let (path, query) = text.split_once('?').map_or((text, None), |(path, query)| (path, Some(query)));
    let mut parts: Vec<&str> = Vec::new();
    let mut last_is_directory = true;
    for part in path.split('/').skip(usize::from(path.starts_with('/'))) {
        last_is_directory = matches!(part, "." | "..");
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let mut whole = format!("/{}", parts.join("/"));
    if last_is_directory && !parts.is_empty() {
        whole.push('/');
    }
    if let Some(query) = query {
        whole.push('?');
        whole.push_str(query);
    }
    let mut encoded = String::with_capacity(whole.len());
    for byte in whole.bytes() {
        if matches!(byte, b'!'..=b'~') && !b"\"<>\\^`{|}".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin(text: &str) -> Origin {
        Address::parse(text).unwrap_or_else(|error| panic!("{text} {error}")).origin
    }

    #[test]
    fn two_spellings_of_an_origin_are_equal_and_two_origins_are_not() {
        for (one, other) in [
            ("https://r.example/a", "https://R.Example:443/b?c"),
            ("HTTP://r.example", "http://r.example:80"),
            ("https://r.example:", "https://r.example:0443/"),
            ("https://[::1]:5000/", "https://[0:0:0:0:0:0:0:1]:5000/"),
            ("https://r.example?q", "https://r.example#f"),
        ] {
            assert_eq!(origin(one), origin(other), "{one} {other}");
        }
        for (one, other) in [
            ("https://r.example/", "http://r.example/"),
            ("https://r.example/", "http://r.example:443/"),
            ("https://r.example/", "https://r.example:444/"),
            ("https://r.example/", "https://r.example./"),
            ("https://r.example/", "https://r.example.evil/"),
            ("https://r.example/", "https://evil/r.example"),
            ("https://127.0.0.1/", "https://[::ffff:127.0.0.1]/"),
        ] {
            assert_ne!(origin(one), origin(other), "{one} {other}");
        }
    }

    #[test]
    fn ambiguous_addresses_are_refused() {
        for bad in [
            "",
            "r.example",
            "/token",
            "//r.example/",
            "file:///etc/shadow",
            "ftp://r.example/",
            "https:r.example",
            "https://",
            "https:///path",
            "https://user@r.example/",
            "https://user:password@r.example/",
            "https://r.example@evil/",
            "https://r.example\\@evil/",
            "https://r.example\\.evil/",
            "https://r%2eexample/",
            "https://r example/",
            "https://r.example:port/",
            "https://r.example:0/",
            "https://r.example:65536/",
            "https://r.example:443:443/",
            "https://[::1/",
            "https://[::1]5000/",
            "https://[evil]/",
            "https://ex\u{e4}mple/",
            "javascript://r.example/",
        ] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn references_are_resolved_as_rfc_3986_says() {
        let base = Address::parse("https://r.example:5000/v2/a/blobs/x?k=v").unwrap();
        for (reference, expected) in [
            ("https://c.example/b?s=1%2F#f", "https://c.example/b?s=1%2F"),
            ("//c.example/b", "https://c.example/b"),
            ("/b", "https://r.example:5000/b"),
            ("y", "https://r.example:5000/v2/a/blobs/y"),
            ("../y", "https://r.example:5000/v2/a/y"),
            ("../../../../../y", "https://r.example:5000/y"),
            ("?z", "https://r.example:5000/v2/a/blobs/x?z"),
            (" /b c\u{e4} ", "https://r.example:5000/b%20c%C3%A4"),
            ("/a:b", "https://r.example:5000/a:b"),
            ("/a/./b/../c/", "https://r.example:5000/a/c/"),
        ] {
            assert_eq!(base.join(reference).unwrap().to_string(), expected, "{reference}");
        }
        for bad in ["", "mailto:x", "file:/etc/shadow", "//user@c.example/", "https:/c.example"] {
            assert!(base.join(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_query_grows() {
        let plain = Address::parse("https://a.example/token").unwrap();
        let grown = plain.with_query([("service", "a b"), ("scope", "repository:a/b:pull")]);
        assert_eq!(grown.to_string(), "https://a.example/token?service=a%20b&scope=repository:a/b:pull");
        let known = Address::parse("https://a.example/token?x=1").unwrap();
        assert_eq!(known.with_query([("y", "&")]).to_string(), "https://a.example/token?x=1&y=%26");
        assert_eq!(known.public(), "https://a.example/token");
    }

    #[test]
    fn only_addresses_of_this_machine_are_loopback() {
        for host in ["localhost", "LOCALHOST:5000", "127.0.0.1:1", "127.8.8.8", "[::1]:5000"] {
            assert!(Origin::parse(true, host).unwrap().is_loopback(), "{host}");
        }
        for host in
            ["localhost.example", "localhost.", "128.0.0.1", "127.0.0.1.example:80", "[::2]:1", "a:127"]
        {
            assert!(!Origin::parse(true, host).unwrap().is_loopback(), "{host}");
        }
    }

    proptest! {
        #[test]
        fn any_reference_is_an_address_or_refused(text in ".{0,60}") {
            let base = Address::parse("https://r.example/a/b").unwrap();
            if let Ok(address) = base.join(&text) {
                prop_assert_eq!(Address::parse(&address.to_string()).unwrap(), address);
            }
        }
    }
}
