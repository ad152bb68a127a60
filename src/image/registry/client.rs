//! Requests: to mirrors and the host itself, with whatever proof of identity it wants, again where that may help.

use super::{
    Pull,
    auth::{self, Challenge, Credentials},
    certificates,
    registries::{self, Place, Places},
};
use crate::{
    error::{Code, Error, Result},
    image::{
        RegistryName,
        layout::MAX_DOCUMENT,
        manifest::{Descriptor, INDEXES, MANIFESTS, check_document},
        reference::{DOCKER_HUB, DOCKER_HUB_HOST},
    },
};
use serde::Deserialize;
use std::{
    io::{ErrorKind, Read},
    net::IpAddr,
    ops::Range,
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};
use ureq::{
    Agent, Body, Proxy, Timeout,
    http::{Response, StatusCode, header},
};

/// A server that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(20);
/// So many connections to a registry at once: one seldom fills a line, and a registry serves others, too.
pub const CONNECTIONS: usize = 8;
/// How often a request is made before it has failed.
const ATTEMPTS: u32 = 5;
/// The first pause between two attempts; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_millis(250);
/// Nobody waits longer than so for a registry that wants a pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A request that failed.
pub struct Failure {
    /// How.
    pub error: Error,
    /// Whether another attempt may succeed.
    pub again: bool,
    /// After how long, if the registry says so.
    pub pause: Option<Duration>,
}

impl Failure {
    /// That does not change by itself.
    pub fn lasting(error: Error) -> Self {
        Self { error, again: false, pause: None }
    }
    /// That another attempt may not meet.
    fn passing(error: Error) -> Self {
        Self { error, again: true, pause: None }
    }
}

/// Attempts at one thing.
#[derive(Default)]
pub struct Attempts(u32);

impl Attempts {
    /// Has somebody wait before the next one.
    ///
    /// # Errors
    /// The failure, where there is no next one.
    pub fn after(&mut self, failure: Failure, wait: impl FnOnce(Duration)) -> Result<()> {
        self.0 += 1;
        let Failure { error, again, pause } = failure;
        let pause = pause.unwrap_or(PAUSE * 2_u32.pow(self.0.min(ATTEMPTS) - 1));
        if !again || pause > LONGEST_PAUSE {
            return Err(error);
        }
        if self.0 >= ATTEMPTS {
            return Err(error.cause(format!("{ATTEMPTS} attempts failed")));
        }
        wait(pause);
        Ok(())
    }
}

/// A registry, as far as one repository is concerned.
pub struct Client {
    name: RegistryName,
    /// Mirrors, then the host itself.
    endpoints: Vec<Endpoint>,
}

/// What serves the repository.
struct Endpoint {
    /// `https://HOST/v2/REPOSITORY`, and where plain HTTP is allowed that.
    bases: Vec<String>,
    /// The one that answered.
    base: OnceLock<usize>,
    agent: Agent,
    repository: String,
    /// What stands between, in words.
    proxy: Option<String>,
    credentials: Option<Credentials>,
    /// The header that was accepted last.
    authorization: Mutex<Option<String>>,
}

impl Client {
    /// Nothing is asked yet.
    ///
    /// # Errors
    /// Where certificates or credentials cannot be read.
    pub fn new(name: &RegistryName, pull: &Pull) -> Result<Self> {
        let Places { mirrors, own } = registries::find(name)?;
        let mut endpoints = match pull.mirrors.get(&name.host) {
            Some(ours) => {
                ours.iter().map(|address| Endpoint::new(address, &name.repository, false, pull)).collect()
            }
            None => mirrors.iter().map(|place| Endpoint::at(place, pull)).collect::<Result<Vec<_>>>(),
        }?;
        endpoints.push(Endpoint::at(&own, pull)?);
        Ok(Self { name: name.clone(), endpoints })
    }

    /// What the name stands for: a descriptor of a manifest or an index, and its bytes.
    pub fn resolve(&self) -> Result<(Descriptor, Vec<u8>)> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Typed {
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let wanted = match (&self.name.digest, &self.name.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        };
        let (kind, bytes) = self.document(&format!("manifests/{wanted}"))?;
        let digest = crate::image::Digest::of(&bytes);
        if let Some(promised) = &self.name.digest {
            promised.verify(&digest, format!("the manifest of {}", self.name))?;
        }
        let typed: Typed = crate::image::manifest::parse(&bytes, "the image's manifest")?;
        let known = |kind: &String| INDEXES.contains(&kind.as_str()) || MANIFESTS.contains(&kind.as_str());
        // The document's own word; manifests of OCI's first version have none, and then the registry's word counts.
        let media_type = typed.media_type.filter(known).or(kind.clone().filter(known)).unwrap_or_default();
        if media_type.is_empty() {
            let kind = kind.unwrap_or_default();
            return Err(Error::new(Code::ImageBroken, format!("{} is no container image", self.name))
                .cause(format!("the registry calls it {kind:?}"))
                .fix(if typed.manifests.is_none() && kind.contains("manifest.v1") {
                    "push it again with a tool of this decade: Docker's first manifests cannot be checked"
                } else {
                    "name an image; charts, signatures and other artifacts have no root"
                }));
        }
        let descriptor = Descriptor {
            media_type,
            digest,
            size: bytes.len() as u64,
            platform: None,
            annotations: std::collections::BTreeMap::default(),
        };
        Ok((descriptor, bytes))
    }

    /// A manifest or a configuration, checked.
    pub fn read(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let kind = descriptor.media_type.as_str();
        let is_manifest = INDEXES.contains(&kind) || MANIFESTS.contains(&kind);
        let place = if is_manifest { "manifests" } else { "blobs" };
        let (_, bytes) = self.document(&format!("{place}/{}", descriptor.digest))?;
        check_document(descriptor, bytes)
    }

    fn document(&self, path: &str) -> Result<(Option<String>, Vec<u8>)> {
        let mut attempts = Attempts::default();
        loop {
            let failure = match self.get(path, None) {
                Err(failure) => failure,
                Ok(response) => {
                    let kind = response.headers().get(header::CONTENT_TYPE);
                    let kind = kind
                        .and_then(|kind| kind.to_str().ok())
                        .map(|kind| kind.split(';').next().unwrap_or_default().trim().to_owned());
                    let mut bytes = Vec::new();
                    let reader = response.into_body().into_reader();
                    match reader.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes) {
                        Ok(_) if bytes.len() as u64 > MAX_DOCUMENT => {
                            let what = format!("{path} of {} is too long", self.name);
                            return Err(Error::new(Code::ImageBroken, what).cause(format!(
                                "a document of at most {MAX_DOCUMENT} bytes makes sense there"
                            )));
                        }
                        Ok(_) => return Ok((kind, bytes)),
                        Err(error) => self.cut(error),
                    }
                }
            };
            attempts.after(failure, thread::sleep)?;
        }
    }

    /// One attempt: the file or some bytes of it, from whoever has it.
    pub fn get(&self, path: &str, range: Option<&Range<u64>>) -> Result<Response<Body>, Failure> {
        let mut before: Vec<Error> = Vec::new();
        let mut last = None;
        for endpoint in &self.endpoints {
            match endpoint.get(path, range, &self.name) {
                Ok(response) => return Ok(response),
                Err(failure) => {
                    let failure = endpoint.explain(failure);
                    before.extend(last.replace(failure).map(|failure: Failure| failure.error));
                }
            }
        }
        let mut failure = last
            .unwrap_or_else(|| Failure::lasting(Error::new(Code::Internal, "a client without endpoints")));
        for error in before {
            failure.error =
                failure.error.cause(format!("a mirror: {}: {}", error.what(), error.cause_line()));
        }
        Err(failure)
    }

    /// What a connection that ends too early comes to.
    pub fn cut(&self, error: impl std::fmt::Display) -> Failure {
        let what = format!("the connection to {} was cut", self.name.host);
        Failure::passing(unreachable(what).cause(error))
    }
}

fn unreachable(what: String) -> Error {
    Error::new(Code::Registry, what).fix(
        "check the registry's name and the network; HTTPS_PROXY names a proxy and NO_PROXY what is asked without, registry-mirrors \
         in gpurun's configuration who is asked first",
    )
}

/// Whether a host is this machine: Docker believes such registries without certificates, too (dockerd(8),
/// "insecure registries").
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, _)) => name,
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Endpoint {
    fn at(place: &Place, pull: &Pull) -> Result<Self> {
        Self::new(&place.host, &place.repository, place.insecure, pull)
    }

    /// `address` is a host, or a base address with its scheme.
    fn new(address: &str, repository: &str, insecure: bool, pull: &Pull) -> Result<Self> {
        let (scheme, rest) =
            address.split_once("://").map_or((None, address), |(scheme, rest)| (Some(scheme), rest));
        let rest = rest.trim_end_matches('/');
        let host = rest.split('/').next().unwrap_or_default();
        let loopback = is_loopback(host);
        let insecure = insecure || loopback || pull.insecure.iter().any(|one| one == host);
        let tls = certificates::configure(host, insecure)?;
        let schemes = match scheme {
            Some("http") => vec!["http"],
            None if tls.disable_verification() => vec!["https", "http"],
            None | Some("https") => vec!["https"],
            Some(_) => {
                let what = format!("registry-mirrors: {address:?} is no address of HTTP");
                return Err(Error::new(Code::Config, what));
            }
        };
        let place = if rest == DOCKER_HUB { DOCKER_HUB_HOST } else { rest };
        let bases = schemes.iter().map(|scheme| format!("{scheme}://{place}/v2/{repository}")).collect();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .user_agent(concat!("gpurun/", env!("CARGO_PKG_VERSION")))
            // As with Go's clients, which other engines use, no proxy stands between a machine and itself.
            .proxy(if loopback { None } else { Proxy::try_from_env() })
            .max_idle_connections_per_host(CONNECTIONS)
            .timeout_connect(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .build();
        Ok(Self {
            bases,
            base: OnceLock::new(),
            agent: agent.into(),
            credentials: auth::find(host, repository)?,
            repository: repository.into(),
            proxy: Proxy::try_from_env()
                .filter(|proxy| {
                    !loopback && !format!("https://{host}").parse().is_ok_and(|uri| proxy.is_no_proxy(&uri))
                })
                .map(|proxy| format!("{}:{}", proxy.host(), proxy.port())),
            authorization: Mutex::new(None),
        })
    }

    fn get(
        &self,
        path: &str,
        range: Option<&Range<u64>>,
        name: &RegistryName,
    ) -> Result<Response<Body>, Failure> {
        let (base, mut response) = self.answer(path, range)?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
            let challenge = challenges.iter().find_map(|value| Challenge::parse(value.to_str().ok()?));
            if let Some(header) = self.authorize(challenge, base, name)? {
                *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(header);
                response = self.send(base, path, range).map_err(|error| transport(&error, base))?;
            }
        }
        understand(response, base, path, name)
    }

    /// Adds to a failure what only the endpoint knows.
    fn explain(&self, mut failure: Failure) -> Failure {
        let Failure { error, .. } = &failure;
        let more = match (error.code(), &self.proxy, &self.credentials) {
            (Code::NotAuthorised, _, None) => "nobody is logged in there".into(),
            (Code::NotAuthorised, _, Some(_)) => "the credentials that are kept for it were shown".into(),
            (Code::Registry, Some(proxy), _) => format!("asked through the proxy {proxy}"),
            _ => return failure,
        };
        failure.error = failure.error.cause(more);
        failure
    }

    /// What the endpoint says, and the base that says it; the first that says anything stays the one.
    fn answer(&self, path: &str, range: Option<&Range<u64>>) -> Result<(&str, Response<Body>), Failure> {
        let bases = match self.base.get() {
            Some(&chosen) => &self.bases[chosen..=chosen],
            None => &self.bases[..],
        };
        let mut failure = Failure::lasting(Error::new(Code::Internal, "an endpoint without an address"));
        for base in bases {
            match self.send(base, path, range) {
                Ok(response) => {
                    self.base.get_or_init(|| self.bases.iter().position(|one| one == base).unwrap_or(0));
                    return Ok((base, response));
                }
                Err(error) => failure = transport(&error, base),
            }
        }
        Err(failure)
    }

    fn send(
        &self,
        base: &str,
        path: &str,
        range: Option<&Range<u64>>,
    ) -> Result<Response<Body>, ureq::Error> {
        let accept = [MANIFESTS, INDEXES, &["*/*"]].concat().join(", ");
        let mut request = self.agent.get(format!("{base}/{path}")).header(header::ACCEPT, accept);
        if let Some(value) = &*self.authorization.lock().unwrap_or_else(PoisonError::into_inner) {
            request = request.header(header::AUTHORIZATION, value);
        }
        if let Some(range) = range {
            request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        }
        request.call()
    }

    /// The header that the challenge wants; `None` where we have nothing for it.
    fn authorize(
        &self,
        challenge: Option<Challenge>,
        base: &str,
        name: &RegistryName,
    ) -> Result<Option<String>, Failure> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let (realm, service, scope) = match (challenge, &self.credentials) {
            (Some(Challenge::Bearer { realm, service, scope }), _) => (realm, service, scope),
            (Some(Challenge::Basic), Some(Credentials::Password { user, password })) => {
                return Ok(Some(auth::basic(user, password)));
            }
            _ => return Ok(None),
        };
        // A password does not leave an encrypted connection for one that is not.
        if base.starts_with("https:") && !realm.starts_with("https:") {
            let what = format!("the registry wants a token of {realm}, and that is not encrypted");
            return Err(Failure::lasting(Error::new(Code::NotAuthorised, what)));
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let service = service.as_deref();
        let answer = if let Some(Credentials::IdentityToken(token)) = &self.credentials {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("refresh_token", token),
                ("scope", &scope),
                ("client_id", "gpurun"),
            ];
            form.extend(service.map(|service| ("service", service)));
            self.agent.post(&realm).send_form(form)
        } else {
            let mut request = self.agent.get(&realm).query("scope", &scope);
            if let Some(service) = service {
                request = request.query("service", service);
            }
            if let Some(Credentials::Password { user, password }) = &self.credentials {
                request = request.header(header::AUTHORIZATION, auth::basic(user, password));
            }
            request.call()
        };
        let response = answer.map_err(|error| transport(&error, &realm))?;
        let response = understand(response, &realm, "", name)?;
        let mut bytes = Vec::new();
        let read = response.into_body().into_reader().take(MAX_DOCUMENT).read_to_end(&mut bytes);
        let token = read.ok().and_then(|_| serde_json::from_slice::<Token>(&bytes).ok());
        match token.and_then(|token| token.token.or(token.access_token)) {
            Some(token) => Ok(Some(format!("Bearer {token}"))),
            None => Err(Failure::passing(unreachable(format!("{realm} gave no token")))),
        }
    }
}

/// The answer, if it is what was asked for.
fn understand(
    response: Response<Body>,
    base: &str,
    path: &str,
    name: &RegistryName,
) -> Result<Response<Body>, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let seconds =
        response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let pause = seconds.map(Duration::from_secs);
    let said = complaint(response.into_body());
    let host = base.split('/').nth(2).unwrap_or(base);
    // As it is called where one logs in.
    let host = if host == DOCKER_HUB_HOST { DOCKER_HUB } else { host };
    let cause = if said.is_empty() { status.to_string() } else { format!("{status}: {said}") };
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let what = format!("{host} does not give {name} to us");
            Failure::lasting(Error::new(Code::NotAuthorised, what).cause(cause).fix(format!(
                "log in, `docker login {host}` or `podman login {host}`, as somebody who may have it; and check the name: \
                 registries say this of what does not exist, too"
            )))
        }
        StatusCode::NOT_FOUND if path.starts_with("blobs/") => {
            let what = format!("the registry has lost a part of {name}");
            Failure::lasting(Error::new(Code::ImageBroken, what).cause(format!("{path}: {cause}")))
        }
        StatusCode::NOT_FOUND => {
            let what = format!("there is no image {name}");
            Failure::lasting(
                Error::new(Code::ImageNotFound, what).cause(cause).fix(format!("check the repository's name and the tag: `skopeo list-tags docker://{}/{}` lists those that are there", name.host, name.repository)),
            )
        }
        StatusCode::TOO_MANY_REQUESTS => {
            let what = format!("{host} serves nothing more for now: too many requests");
            let error = Error::new(Code::Registry, what).cause(cause).fix(match seconds {
                Some(seconds) => {
                    format!("wait {seconds} seconds, or log in: who is known may ask more often")
                }
                None => "wait, or log in: who is known may ask more often".into(),
            });
            Failure { error, again: true, pause }
        }
        _ => {
            let error = Error::new(Code::Registry, format!("{host} cannot serve {name}"))
                .cause(cause)
                .fix("try it again later: it is the registry that failed, or what stands before it");
            let again = status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT;
            Failure { error, again, pause }
        }
    })
}

/// The words of a registry's own errors.
fn complaint(body: Body) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    #[serde(default)]
    #[derive(Default)]
    struct One {
        message: String,
    }
    let mut bytes = Vec::new();
    let _ = body.into_reader().take(64 << 10).read_to_end(&mut bytes);
    let errors = serde_json::from_slice::<Errors>(&bytes).map(|all| all.errors).unwrap_or_default();
    errors.into_iter().map(|one| one.message).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
}

/// A request that had no answer.
fn transport(error: &ureq::Error, base: &str) -> Failure {
    let host = base.split('/').nth(2).unwrap_or(base);
    let again = match error {
        // A name that is unknown and a port that is closed stay so; a connection that was cut does not.
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
                Some(tls) => insecure(host, tls),
                None => untrusted(host, cause),
            }
        }
        ureq::Error::Rustls(cause) => insecure(host, cause),
        ureq::Error::Io(cause) => unreachable(format!("{host} cannot be reached")).cause(cause),
        _ => unreachable(format!("{host} cannot be reached")).cause(error),
    };
    Failure { error, again, pause: None }
}

/// A handshake that one of the two ended.
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
            let what = format!("{host} wants a certificate of who asks, or refuses the one that it got");
            Error::new(Code::NotAuthorised, what).cause(cause).fix(format!(
                "put the certificate and its key into /etc/containers/certs.d/{host}/client.cert and client.key \
                 (of an ordinary user: ~/.config/containers/certs.d)"
            ))
        }
        // rustls does not know what a server without TLS says.
        rustls::Error::InvalidMessage(_) => Error::new(Code::Registry, format!("{host} does not speak TLS"))
            .cause(cause)
            .fix(format!(
                "if it is meant to speak plain HTTP: insecure-registries = [{host:?}] in gpurun's configuration, or insecure = true \
                 in registries.conf"
            )),
        _ => untrusted(host, cause),
    }
}

fn untrusted(host: &str, cause: impl std::fmt::Display) -> Error {
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

    #[test]
    fn loopback_is_this_machine_alone() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.8.8.8", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "127.0.0.1.example:80", "[::2]:1", "a:127"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
