//! HTTP and HTTPS servers for tests, which send configured responses and record every request.

use crate::registry::Packed;
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

/// A request as it came.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// GET, POST.
    pub method: String,
    /// With its query.
    pub path: String,
    /// By their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// What was posted.
    pub body: String,
    /// The client showed a certificate.
    pub client_certificate: bool,
}

impl Asked {
    /// The value of Authorization; empty without one.
    pub fn authorization(&self) -> &str {
        self.headers.get("authorization").map_or("", String::as_str)
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    /// An answer with this status and nothing else.
    pub fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    /// 200 with this body.
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::new(200) }
    }

    /// 307 to this reference.
    pub fn redirect(to: impl Into<String>) -> Self {
        Self::new(307).header("Location", to)
    }

    /// 401 with this challenge.
    pub fn challenge(challenge: impl Into<String>) -> Self {
        Self::new(401).header("WWW-Authenticate", challenge)
    }

    /// The same with a header more.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same with this body.
    #[must_use]
    pub fn body(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..self }
    }
}

type Decide = dyn Fn(&Asked) -> Reply + Send + Sync;

/// A server. It ends with the test's process.
pub struct Web {
    /// `127.0.0.1:PORT`
    pub address: String,
    scheme: &'static str,
    asked: Arc<Mutex<Vec<Asked>>>,
    decide: Arc<Mutex<Arc<Decide>>>,
}

impl Web {
    /// Plain HTTP.
    pub fn http() -> Self {
        Self::start("127.0.0.1:0", None)
    }

    /// TLS with the certificate `tls.crt` and key `tls.key` of this directory. It accepts client certificates of `ca.crt` and
    /// demands none.
    pub fn https(files: &Path) -> Self {
        Self::start("127.0.0.1:0", Some(tls(files)))
    }

    /// The same at an address of its own.
    pub fn at(address: &str, files: Option<&Path>) -> Self {
        Self::start(address, files.map(tls))
    }

    fn start(address: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind(address).expect("a port");
        let web = Self {
            address: listener.local_addr().expect("an address").to_string(),
            scheme: if tls.is_some() { "https" } else { "http" },
            asked: Arc::default(),
            decide: Arc::new(Mutex::new(Arc::new(|_: &Asked| Reply::new(404)))),
        };
        let (asked, decide) = (Arc::clone(&web.asked), Arc::clone(&web.decide));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (asked, decide, tls) = (Arc::clone(&asked), Arc::clone(&decide), tls.clone());
                thread::spawn(move || match tls {
                    None => drop(serve(client, false, &asked, &decide)),
                    Some(tls) => {
                        let Ok(session) = ServerConnection::new(tls) else { return };
                        let mut stream = StreamOwned::new(session, client);
                        // The handshake, so that the client's certificate is known.
                        if stream.conn.complete_io(&mut stream.sock).is_ok() {
                            let certificate = stream.conn.peer_certificates().is_some();
                            let _ = serve(stream, certificate, &asked, &decide);
                        }
                    }
                });
            }
        });
        web
    }

    /// Decides about all requests from now on.
    #[must_use]
    pub fn answering(self, decide: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        self.answer(decide);
        self
    }

    /// The same.
    pub fn answer(&self, decide: impl Fn(&Asked) -> Reply + Send + Sync + 'static) {
        *self.decide.lock().expect("no panic") = Arc::new(decide);
    }

    /// `SCHEME://ADDRESS/PATH`
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// What was asked until now.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no panic").clone()
    }

    /// Whether a credential was received: in a header, a form, or an address.
    pub fn saw_a_secret(&self) -> bool {
        self.asked().iter().any(|one| {
            !one.authorization().is_empty() || one.client_certificate || one.body.contains("refresh_token")
        })
    }

    /// Forgets what was asked.
    pub fn forget(&self) {
        self.asked.lock().expect("no panic").clear();
    }
}

fn tls(files: &Path) -> Arc<ServerConfig> {
    let file = |name: &str| files.join(name);
    let chain =
        CertificateDer::pem_file_iter(file("tls.crt")).expect("PEM").map(|one| one.expect("PEM")).collect();
    let key = PrivateKeyDer::from_pem_file(file("tls.key")).expect("PEM");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("ca.crt")).expect("PEM")).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let clients = clients.allow_unauthenticated().build().expect("a verifier");
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions");
    Arc::new(config.with_client_cert_verifier(clients).with_single_cert(chain, key).expect("a certificate"))
}

/// One request of a connection.
fn serve(
    stream: impl Read + Write,
    client_certificate: bool,
    log: &Mutex<Vec<Asked>>,
    decide: &Mutex<Arc<Decide>>,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut asked = Asked { method, path, client_certificate, ..Asked::default() };
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        asked.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = asked.headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut body = Vec::new();
    (&mut reader).take(length).read_to_end(&mut body).ok()?;
    asked.body = String::from_utf8_lossy(&body).into_owned();
    let decide = Arc::clone(&decide.lock().expect("no panic"));
    let reply = decide(&asked);
    log.lock().expect("no panic").push(asked);
    let headers: String = reply.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let stream = reader.get_mut();
    write!(
        stream,
        "HTTP/1.1 {} X\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
        reply.status,
        reply.body.len()
    )
    .ok()?;
    stream.write_all(&reply.body).ok()?;
    stream.flush().ok()
}

/// An image as a registry serves it, in the repository `ml` with the tag `1`.
#[derive(Clone)]
pub struct Served(BTreeMap<String, (String, Vec<u8>)>);

impl Served {
    /// All documents and layers.
    pub fn of(packed: &Packed) -> Self {
        Self::with_manifest(packed, &packed.manifest().to_string())
    }

    /// The same with another manifest.
    pub fn with_manifest(packed: &Packed, manifest: &str) -> Self {
        let mut served = Self(BTreeMap::new());
        for blob in [&packed.config].into_iter().chain(packed.layers.iter().map(|layer| &layer.data)) {
            served.add_blob(&gpurun::image::Digest::of(blob).to_string(), blob);
        }
        let parsed: serde_json::Value = serde_json::from_str(manifest).unwrap_or_default();
        let kind = parsed["mediaType"].as_str().unwrap_or("application/json");
        served.add("manifests/1", kind, manifest.as_bytes());
        let digest = gpurun::image::Digest::of(manifest.as_bytes());
        served.add(&format!("manifests/{digest}"), kind, manifest.as_bytes());
        served
    }

    /// A document or blob more, by its path below the repository.
    pub fn add(&mut self, path: &str, kind: &str, bytes: &[u8]) {
        self.0.insert(format!("/v2/ml/{path}"), (kind.into(), bytes.to_vec()));
    }

    /// A blob more.
    pub fn add_blob(&mut self, digest: &str, bytes: &[u8]) {
        self.add(&format!("blobs/{digest}"), "application/octet-stream", bytes);
    }

    /// The answer to a request of this path.
    pub fn reply(&self, asked: &Asked) -> Reply {
        match self.0.get(asked.path.split('?').next().unwrap_or_default()) {
            None => Reply::new(404),
            Some((kind, bytes)) => match range(asked, bytes.len()) {
                None => Reply::ok(bytes.clone()).header("Content-Type", kind.as_str()),
                Some((start, end)) => Reply::new(206)
                    .body(&bytes[start..end])
                    .header("Content-Range", format!("bytes {start}-{}/{}", end - 1, bytes.len())),
            },
        }
    }
}

fn range(asked: &Asked, length: usize) -> Option<(usize, usize)> {
    let (start, last) = asked.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((start.parse().ok()?, last.parse::<usize>().ok()?.saturating_add(1).min(length)))
}

/// A proxy (RFC 9110, CONNECT) that leads each host name to an address of this machine, and nowhere else.
pub fn names(hosts: BTreeMap<String, String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut reader = BufReader::new(client.try_clone().expect("a descriptor"));
            let mut head = String::new();
            while reader.read_line(&mut head).is_ok_and(|count| count > 2) {}
            let target = head.split_whitespace().nth(1).unwrap_or_default();
            let Some(to) = hosts.get(target) else {
                let _ = client.write_all(b"HTTP/1.1 502 X\r\nContent-Length: 0\r\n\r\n");
                continue;
            };
            let mut server = TcpStream::connect(to).expect("the server runs");
            let mut back = server.try_clone().expect("a descriptor");
            let _ = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            thread::spawn(move || std::io::copy(&mut reader, &mut server));
            thread::spawn(move || std::io::copy(&mut back, &mut client));
        }
    });
    address
}
