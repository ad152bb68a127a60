//! Requests to the servers of a registry: the registry itself, the stores that it redirects to, and its token service.
//!
//! Certificates, authorities and proxies belong to a host, so there is one agent for each. Redirects are followed here and not by
//! the HTTP library, because they decide which server receives a secret; see the rules in the documentation of [the
//! module](super).

use super::{
    Pull,
    address::{Address, Origin},
    certificates,
    failure::{Failure, transport},
    status::Status,
};
use crate::error::{Code, Error, Result};
use std::{
    collections::BTreeMap,
    io::{self, Read},
    ops::Range,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use ureq::{
    Agent, Body, Proxy,
    http::{Response, StatusCode, header},
};

/// Parallel connections to a registry: one connection rarely uses the whole bandwidth.
pub const CONNECTIONS: usize = 8;
/// Read timeout.
const SILENCE: Duration = Duration::from_secs(20);
/// The longest time for the head of a response, even if bytes keep arriving.
const HEAD: Duration = Duration::from_secs(60);
/// The most consecutive redirects, as in Go.
const REDIRECTS: usize = 10;

/// The agents of one registry.
pub struct Http {
    trust: Trust,
    agents: Mutex<BTreeMap<Origin, Agent>>,
}

/// The hosts for which plain HTTP, or TLS with an unchecked certificate, is allowed.
pub struct Trust {
    /// `insecure-registries` of the configuration.
    pub listed: Vec<String>,
    /// Whether the registry itself is configured as insecure; then the servers that it leads to are insecure as well.
    pub registry: bool,
}

/// A GET request, or a POST request with a form.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Address of the request.
    pub address: &'a Address,
    /// The value of Authorization, for this origin only.
    pub authorization: Option<&'a str>,
    /// The accepted media types.
    pub accept: &'a str,
    /// The requested bytes.
    pub range: Option<&'a Range<u64>>,
    /// The fields of the form.
    pub form: Option<&'a [(&'a str, &'a str)]>,
    /// Whether the digest of the content is known, so that any server may send it.
    pub verified: bool,
    /// The longest time for the body of the response. [`Paced`] is not enough: the HTTP library reads trailers that never end
    /// without returning.
    pub time: Duration,
}

/// A response that is not a redirect.
pub struct Answer {
    /// The response itself.
    pub response: Response<Body>,
    /// The address that sent the response.
    pub from: Address,
    /// Whether a redirect led to another origin.
    pub left: bool,
}

impl Trust {
    /// The trust that is configured for a registry. `insecure` is set by registries.conf or a mirror's address.
    ///
    /// # Errors
    /// If `host` is not a host; the text lacks its subject.
    pub fn of(host: &str, insecure: bool, pull: &Pull) -> Result<Self, String> {
        let names = [Origin::parse(true, host)?.names(), Origin::parse(false, host)?.names()].concat();
        let listed = |name: &String| pull.insecure.iter().any(|one| one.eq_ignore_ascii_case(name));
        let registry = insecure || names.iter().any(listed);
        Ok(Self { listed: pull.insecure.clone(), registry })
    }

    /// Whether plain HTTP is allowed for this host if TLS fails. Not if an authority is configured for this host.
    ///
    /// # Errors
    /// If `host` is not a host; the text lacks its subject.
    pub fn may_be_plain(&self, host: &str) -> Result<bool, String> {
        let origin = Origin::parse(true, host)?;
        Ok(self.accepts_any_certificate(&origin) && !certificates::has_authorities(&origin))
    }

    /// Whether the certificates of this host are not checked.
    fn accepts_any_certificate(&self, origin: &Origin) -> bool {
        self.registry || self.lists(origin)
    }

    /// Whether the host is listed as insecure or is this machine.
    pub fn lists(&self, origin: &Origin) -> bool {
        let listed = |name: &String| self.listed.iter().any(|one| one.eq_ignore_ascii_case(name));
        origin.is_loopback() || origin.names().iter().any(listed)
    }

    /// Whether a response of one server may lead to another server. `verified`: the digest of the content there is known.
    ///
    /// # Errors
    /// The reason for the refusal.
    pub fn may_lead(&self, from: &Origin, to: &Origin, verified: bool) -> Result<(), &'static str> {
        if to.is_https() || from == to {
            Ok(())
        } else if from.is_https() {
            Err("it leads from an encrypted connection to one that is not")
        } else if self.registry || self.lists(to) || verified {
            Ok(())
        } else {
            Err("it leads to another host over plain HTTP, and no digest verifies what comes from there")
        }
    }
}

impl Http {
    /// Makes the agents; opens no connection.
    pub fn new(trust: Trust) -> Self {
        Self { trust, agents: Mutex::default() }
    }

    /// The trust of this registry.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Sends a request, and follows redirects.
    pub fn send(&self, request: &Request<'_>, status: &Status) -> Result<Answer, Failure> {
        let mut at = request.address.clone();
        let mut left = false;
        for _ in 0..=REDIRECTS {
            let response = self.send_once(request, &at, left, status)?;
            let Some(reference) = redirect(&response) else { return Ok(Answer { response, from: at, left }) };
            let next = at.join(&reference).and_then(|next| {
                self.trust.may_lead(at.origin(), next.origin(), request.verified)?;
                Ok(next)
            });
            let next = next.map_err(|why| not_followed(&at, &reference, &why))?;
            if request.form.is_some() && !repeats_post(&response, &at, &next) {
                return Err(not_followed(&at, &reference, "it would carry a secret to another server"));
            }
            // After a redirect to another origin that server decides where requests go, so no request carries a secret.
            left |= next.origin() != at.origin();
            at = next;
        }
        Err(Failure::lasting(
            Error::new(Code::Registry, format!("{} redirects without end", request.address.origin().host()))
                .cause(format!("{REDIRECTS} redirects, the last one to {}", at.public()))
                .fix("tell the registry's administrator, or name a mirror: registry-mirrors in gpurun's configuration"),
        ))
    }

    fn send_once(
        &self,
        request: &Request<'_>,
        at: &Address,
        left: bool,
        status: &Status,
    ) -> Result<Response<Body>, Failure> {
        let _waiting = status.waiting(at.origin().host());
        let agent = self.agent(at.origin()).map_err(Failure::lasting)?;
        let authorization = request.authorization.filter(|_| !left);
        let sent = if let Some(form) = request.form {
            let mut post = agent
                .post(at.to_string())
                .config()
                .timeout_recv_body(Some(request.time))
                .build()
                .header(header::ACCEPT_ENCODING, "identity");
            if let Some(value) = authorization {
                post = post.header(header::AUTHORIZATION, value);
            }
            post.send_form(form.iter().copied())
        } else {
            let mut get = agent
                .get(at.to_string())
                .config()
                .timeout_recv_body(Some(request.time))
                .build()
                .header(header::ACCEPT, request.accept)
                // A blob's digest is that of the stored bytes, so no content coding may be applied.
                .header(header::ACCEPT_ENCODING, "identity");
            if let Some(value) = authorization {
                get = get.header(header::AUTHORIZATION, value);
            }
            if let Some(range) = request.range {
                get = get.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
            }
            get.call()
        };
        sent.map_err(|error| transport(&error, at, proxy_of(at.origin()).as_deref()))
    }

    fn agent(&self, origin: &Origin) -> Result<Agent> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = agents.get(origin) {
            return Ok(agent.clone());
        }
        let tls = certificates::configure(origin, self.trust.accepts_any_certificate(origin))?;
        let agent: Agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .user_agent(concat!("gpurun/", env!("CARGO_PKG_VERSION")))
            // As in Go, no proxy is used for this machine.
            .proxy(if origin.is_loopback() { None } else { Proxy::try_from_env() })
            .max_idle_connections_per_host(CONNECTIONS)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(HEAD))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .build()
            .into();
        agents.insert(origin.clone(), agent.clone());
        Ok(agent)
    }
}

/// The proxy for a host, for messages.
fn proxy_of(origin: &Origin) -> Option<String> {
    let proxy = Proxy::try_from_env().filter(|_| !origin.is_loopback())?;
    let exempt = origin.to_string().parse().is_ok_and(|uri| proxy.is_no_proxy(&uri));
    (!exempt).then(|| format!("{}:{}", proxy.host(), proxy.port()))
}

/// The Location of a redirect that Go's client would also follow.
fn redirect(response: &Response<Body>) -> Option<String> {
    let follows = matches!(
        response.status(),
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    );
    let location = response.headers().get(header::LOCATION).filter(|_| follows)?;
    Some(String::from_utf8_lossy(location.as_bytes()).into_owned())
}

/// Whether a redirect repeats a POST at the same origin.
fn repeats_post(response: &Response<Body>, at: &Address, next: &Address) -> bool {
    let keeps = matches!(response.status(), StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT);
    keeps && at.origin() == next.origin()
}

fn not_followed(at: &Address, reference: &str, why: &str) -> Failure {
    let host = at.origin().host();
    let shown: String = reference.split('?').next().unwrap_or_default().chars().take(200).collect();
    Failure::lasting(
        Error::new(Code::Registry, format!("{host} redirects to an address that is not followed"))
            .cause(format!("{shown:?}: {why}"))
            .fix("have the registry redirect to https addresses, or serve the blobs itself (docker-registry: `redirect: disable: true`)"),
    )
}

/// A body with a minimum speed: a silent server fails, and also one that sends a byte every few seconds.
pub struct Paced<R> {
    body: R,
    /// Time of the reads, and their bytes, since the last check.
    waited: Duration,
    bytes: u64,
    /// The deadline for the whole body.
    deadline: Option<Instant>,
}

/// The minimum speed is [`SLOWEST`] bytes in this time.
const WINDOW: Duration = Duration::from_secs(30);
const SLOWEST: u64 = 16 << 10;

impl<R> Paced<R> {
    /// Starts now, without a deadline.
    pub fn new(body: R) -> Self {
        Self { body, waited: Duration::ZERO, bytes: 0, deadline: None }
    }

    /// Sets a deadline for the whole body.
    #[must_use]
    pub fn for_seconds(self, seconds: u64) -> Self {
        Self { deadline: Instant::now().checked_add(Duration::from_secs(seconds)), ..self }
    }

    /// Fails if the body arrived too slowly so far.
    fn check(&mut self, count: usize, took: Duration) -> io::Result<()> {
        let slow = |text: String| io::Error::new(io::ErrorKind::TimedOut, text);
        self.waited += took;
        self.bytes += count as u64;
        if self.deadline.is_some_and(|deadline| Instant::now() > deadline) {
            return Err(slow("it did not come in time".into()));
        }
        if self.waited >= WINDOW {
            if self.bytes < SLOWEST {
                return Err(slow(format!("{} bytes came in {} s", self.bytes, self.waited.as_secs())));
            }
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        Ok(())
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let asked = Instant::now();
        let count = self.body.read(buffer)?;
        if count > 0 {
            self.check(count, asked.elapsed())?;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_trickles_is_cut() {
        let seconds = Duration::from_secs;
        let mut body = Paced::new(io::empty());
        for _ in 0..14 {
            body.check(1, seconds(2)).unwrap();
        }
        assert_eq!(body.check(1, seconds(2)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut body = Paced::new(io::empty());
        for _ in 0..100 {
            body.check(16 << 10, seconds(10)).unwrap();
        }
        let mut late = Paced::new(io::empty()).for_seconds(0);
        std::thread::sleep(Duration::from_millis(2));
        assert!(late.check(1 << 20, Duration::ZERO).is_err());
    }

    /// The library reads trailers inside of one call, so no check between two reads sees them.
    #[test]
    fn trailers_without_end_are_cut() {
        use std::{io::Write, net::TcpListener};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::parse(&format!("http://{}/", listener.local_addr().unwrap())).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n");
            while stream.write_all(b"A: b\r\n").is_ok() {}
        });
        let http = Http::new(Trust { listed: Vec::new(), registry: true });
        let request = Request {
            address: &address,
            authorization: None,
            accept: "*/*",
            range: None,
            form: None,
            verified: false,
            time: Duration::from_secs(1),
        };
        let Ok(answer) = http.send(&request, &Status::default()) else { panic!("no answer") };
        let mut body = Paced::new(answer.response.into_body().into_reader());
        assert!(body.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn an_encrypted_connection_leads_only_to_encrypted_ones() {
        let origin = |text: &str| Address::parse(text).unwrap().origin().clone();
        let trust = |registry: bool| Trust { listed: vec!["lab.example:5000".into()], registry };
        // (from, to, registry insecure, verified, follows)
        for (from, to, registry, verified, follows) in [
            ("https://r.example", "https://c.example", false, false, true),
            ("https://r.example", "http://c.example", false, true, false),
            ("https://r.example", "http://c.example", true, true, false),
            ("https://r.example", "http://r.example", true, true, false),
            ("https://127.0.0.1:1", "http://127.0.0.1:1", true, true, false),
            ("http://r.example", "https://c.example", false, false, true),
            ("http://r.example", "http://r.example", false, false, true),
            ("http://r.example", "http://c.example", false, false, false),
            ("http://r.example", "http://c.example", false, true, true),
            ("http://r.example", "http://c.example", true, false, true),
            ("http://r.example", "http://127.0.0.1:2", false, false, true),
            ("http://r.example", "http://LAB.example:5000", false, false, true),
            ("http://r.example", "http://lab.example", false, false, false),
        ] {
            let led = trust(registry).may_lead(&origin(from), &origin(to), verified);
            assert_eq!(led.is_ok(), follows, "{from} {to} {registry} {verified}: {led:?}");
        }
    }
}
