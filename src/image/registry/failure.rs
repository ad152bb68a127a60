//! Failures of requests: their errors with fixes, and whether a retry may succeed.

use super::{address::Address, retry_after};
use crate::{
    error::{Code, Error, Result},
    formats::go_json,
    image::{
        RegistryName,
        reference::{DOCKER_HUB, DOCKER_HUB_HOST},
    },
};
use serde::Deserialize;
use std::{
    fmt::Display,
    io::{ErrorKind, Read},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use ureq::{
    Body, Timeout,
    http::{Response, StatusCode, header},
};

/// The most attempts at one request.
const ATTEMPTS: u32 = 5;
/// The first pause between two attempts; it doubles each time.
const PAUSE: Duration = Duration::from_millis(250);
/// The longest Retry-After that is obeyed.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The time for all attempts without progress.
const PATIENCE: Duration = Duration::from_secs(180);

/// A request that failed.
pub struct Failure {
    /// The error to report after the last attempt.
    pub error: Error,
    /// Whether a retry may succeed.
    pub again: bool,
    /// The pause that the registry requests (Retry-After).
    pub pause: Option<Duration>,
}

impl Failure {
    /// A failure that a retry cannot fix.
    pub fn lasting(error: Error) -> Self {
        Self { error, again: false, pause: None }
    }

    /// A failure that a retry may avoid.
    pub fn passing(error: Error) -> Self {
        Self { error, again: true, pause: None }
    }

    /// Adds a cause.
    #[must_use]
    pub fn cause(mut self, cause: impl Display) -> Self {
        self.error = self.error.cause(cause);
        self
    }
}

/// Counts attempts since the last progress.
#[derive(Default)]
pub struct Attempts {
    failed: u32,
    since: Option<Instant>,
}

impl Attempts {
    /// Calls `wait` with the pause and the reason before the next attempt.
    ///
    /// # Errors
    /// The failure, if no attempt is left.
    pub fn after(&mut self, failure: Failure, wait: impl FnOnce(Duration, &str)) -> Result<()> {
        self.failed += 1;
        let Failure { error, again, pause } = failure;
        let asked = pause.is_some();
        let pause = pause.unwrap_or(PAUSE * 2_u32.pow(self.failed.min(ATTEMPTS) - 1));
        if !again || pause > LONGEST_PAUSE {
            return Err(error);
        }
        if self.failed >= ATTEMPTS {
            return Err(error.cause(format!("{ATTEMPTS} attempts failed")));
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() + pause > PATIENCE {
            return Err(error.cause(format!(
                "{} attempts in {} seconds failed, and the registry asks for {} more",
                self.failed,
                since.elapsed().as_secs(),
                pause.as_secs()
            )));
        }
        let why = error.what();
        let why = if asked { format!("{why}; it asked for {} s", pause.as_secs()) } else { why.to_owned() };
        wait(pause, &why);
        Ok(())
    }
}

/// A failure of the network or of the registry's name.
pub fn unreachable(what: String) -> Error {
    Error::new(Code::Registry, what).fix(
        "check the registry's name and the network; HTTPS_PROXY names a proxy, NO_PROXY the hosts that need none, and \
         registry-mirrors in gpurun's configuration the mirrors that are asked first",
    )
}

/// The name of a host for `docker login`.
pub fn login_name(address: &Address) -> String {
    let host = address.origin().host();
    if host == DOCKER_HUB_HOST { DOCKER_HUB.into() } else { host }
}

/// The error for access denied by a registry or its token service. `who` is the host for `docker login`.
pub fn denied(host: &str, name: &RegistryName, who: &str, cause: impl Display) -> Failure {
    Failure::lasting(Error::new(Code::NotAuthorised, format!("{host} denied access to {name}")).cause(cause).fix(format!(
        "log in, `docker login {who}` or `podman login {who}`, with an account that may read it; and check the name: \
         registries also deny access to images that do not exist"
    )))
}

/// The status and the registry's own words.
pub fn status_line(response: Response<Body>) -> String {
    let status = response.status();
    let said = complaint(response.into_body());
    if said.is_empty() { status.to_string() } else { format!("{status}: {said}") }
}

/// The failure for an error status of a registry or of a server that it redirects to. For denied access see [`denied`].
pub fn refused(response: Response<Body>, from: &Address, path: &str, name: &RegistryName) -> Failure {
    let status = response.status();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seconds = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| retry_after::seconds(value.to_str().ok()?, now));
    let pause = seconds.map(Duration::from_secs);
    let cause = status_line(response);
    let host = login_name(from);
    match status {
        StatusCode::NOT_FOUND if path.starts_with("blobs/") => {
            let what = format!("the registry has lost a part of {name}");
            Failure::lasting(
                Error::new(Code::ImageBroken, what)
                    .cause(format!("{path}: {cause}"))
                    .fix(format!("have {name} pushed again, or pull another tag")),
            )
        }
        StatusCode::NOT_FOUND => {
            let what = format!("there is no image {name}");
            Failure::lasting(Error::new(Code::ImageNotFound, what).cause(cause).fix(format!(
                "check the repository's name and the tag: `skopeo list-tags docker://{}/{}` lists those that are there",
                name.host, name.repository
            )))
        }
        StatusCode::TOO_MANY_REQUESTS => {
            let what = format!("{host} has reached its rate limit: too many requests");
            let login =
                format!("log in, `docker login {host}`: authenticated clients get a higher rate limit");
            let error = Error::new(Code::Registry, what).cause(cause).fix(match seconds {
                Some(seconds) => format!("wait {seconds} seconds, or {login}"),
                None => format!("wait, or {login}"),
            });
            Failure { error, again: true, pause }
        }
        _ => {
            let error = Error::new(Code::Registry, format!("{host} cannot serve {name}"))
                .cause(cause)
                .fix("try again later: the registry failed, or a proxy in front of it; registry-mirrors in gpurun's configuration names others");
            let again = status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT;
            Failure { error, again, pause }
        }
    }
}

/// The error message in a registry's response, in one line.
fn complaint(body: Body) -> String {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Errors {
        #[serde(rename = "errors")]
        all: Vec<One>,
        // Token services, and others that follow RFC 6749.
        details: String,
        error_description: String,
        message: String,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct One {
        code: String,
        message: String,
    }
    let mut bytes = Vec::new();
    let reader = super::http::Paced::new(body.into_reader()).for_seconds(10);
    let _ = reader.take(64 << 10).read_to_end(&mut bytes);
    let Errors { all, details, error_description, message } = go_json::from_slice(&bytes).unwrap_or_default();
    let words = |one: One| if one.message.is_empty() { one.code } else { one.message };
    let all = all.into_iter().map(words).chain([details, error_description, message]);
    let words: Vec<String> = all
        .map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|text| !text.is_empty())
        .collect();
    words.join("; ").chars().take(400).collect()
}

/// The failure of a request without a response.
pub fn transport(error: &ureq::Error, to: &Address, proxy: Option<&str>) -> Failure {
    let host = to.origin().host();
    let again = match error {
        // Unknown names and closed ports are permanent; cut connections are not.
        ureq::Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::BrokenPipe
                | ErrorKind::UnexpectedEof
                | ErrorKind::TimedOut
        ),
        ureq::Error::Timeout(timeout) => *timeout != Timeout::Connect,
        ureq::Error::Protocol(_) | ureq::Error::BodyStalled => true,
        _ => false,
    };
    let error = match error {
        ureq::Error::Io(cause) if cause.kind() == ErrorKind::InvalidData => {
            match cause.get_ref().and_then(|inner| inner.downcast_ref()) {
                Some(tls) => insecure(&host, tls),
                None => untrusted(&host, cause),
            }
        }
        ureq::Error::Rustls(cause) => insecure(&host, cause),
        ureq::Error::Io(cause) => unreachable(format!("{host} cannot be reached")).cause(cause),
        _ => unreachable(format!("{host} cannot be reached")).cause(error),
    };
    let failure = Failure { error, again, pause: None };
    match proxy {
        Some(proxy) if failure.error.code() == Code::Registry => {
            failure.cause(format!("asked through the proxy {proxy}"))
        }
        _ => failure,
    }
}

/// A TLS handshake that failed.
fn insecure(host: &str, cause: &rustls::Error) -> Error {
    use rustls::AlertDescription as Alert;
    let wants_another = |alert| {
        matches!(
            alert,
            Alert::BadCertificate
                | Alert::CertificateRequired
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::UnsupportedCertificate
                | Alert::CertificateExpired
                | Alert::CertificateRevoked
                | Alert::CertificateUnknown
        )
    };
    match cause {
        rustls::Error::AlertReceived(alert) if wants_another(*alert) => {
            let what = format!("{host} wants a client certificate, or refuses the one that it got");
            Error::new(Code::NotAuthorised, what).cause(cause).fix(format!(
                "put the certificate and its key into /etc/containers/certs.d/{host}/client.cert and client.key \
                 (of an ordinary user: ~/.config/containers/certs.d)"
            ))
        }
        // rustls cannot parse the response of a server without TLS.
        rustls::Error::InvalidMessage(_) => Error::new(Code::Registry, format!("{host} does not speak TLS"))
            .cause(cause)
            .fix(format!(
                "if it is meant to speak plain HTTP: insecure-registries = [{host:?}] in gpurun's configuration, or insecure = true \
                 in registries.conf"
            )),
        _ => untrusted(host, cause),
    }
}

fn untrusted(host: &str, cause: impl Display) -> Error {
    Error::new(Code::Registry, format!("no trusted connection to {host} can be made"))
        .cause(cause)
        .fix(format!(
            "put the certificate of its authority into /etc/containers/certs.d/{host}/ca.crt (of an ordinary user: \
             ~/.config/containers/certs.d)"
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(seconds: Option<u64>) -> Failure {
        let error = Error::new(Code::Registry, "busy").fix("wait");
        Failure { error, again: true, pause: seconds.map(Duration::from_secs) }
    }

    #[test]
    fn attempts_are_limited_by_number_pause_and_time() {
        let mut attempts = Attempts::default();
        let mut pauses = Vec::new();
        let last = loop {
            if let Err(error) =
                attempts.after(busy(None), |pause, why| pauses.push((pause.as_millis(), why.to_owned())))
            {
                break error;
            }
        };
        assert_eq!(pauses.iter().map(|(pause, _)| *pause).collect::<Vec<_>>(), [250, 500, 1000, 2000]);
        assert!(last.cause_line().contains("5 attempts failed"), "{last}");
        let said = |failure| {
            let mut why = String::new();
            Attempts::default().after(failure, |_, text| why = text.to_owned()).map(|()| why)
        };
        assert_eq!(said(busy(Some(59))).unwrap(), "busy; it asked for 59 s");
        assert!(said(busy(Some(61))).is_err());
        assert!(said(Failure::lasting(Error::new(Code::Registry, "gone").fix("x"))).is_err());
        let long_ago = Instant::now().checked_sub(Duration::from_secs(170));
        let mut late = Attempts { failed: 1, since: long_ago };
        assert!(late.after(busy(Some(30)), |_, _| panic!("no wait")).is_err());
    }
}
