//! Debian's docker-registry on this machine, images in it, and a proxy before it that does what networks do.

use crate::{image, must, temporary};
use gpurun::image::Digest;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// A registry, stopped when it is dropped. What is pushed to one is there for others on the same directory.
pub struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`
    pub address: String,
    _config: TempDir,
}

impl Registry {
    /// Plain HTTP, for everybody.
    pub fn plain(storage: &Path) -> Self {
        Self::start(storage, json!({}))
    }

    /// TLS with this certificate and key, for users of this password file.
    pub fn guarded(storage: &Path, certificate: &Path, key: &Path, passwords: &Path) -> Self {
        Self::start(
            storage,
            json!({
                "http": {"tls": {"certificate": certificate, "key": key}},
                "auth": {"htpasswd": {"realm": "tests", "path": passwords}},
            }),
        )
    }

    /// TLS with this certificate and key, for everybody, or for clients with a certificate of this authority.
    pub fn tls(storage: &Path, certificate: &Path, key: &Path, clients: Option<&Path>) -> Self {
        let mut tls = json!({"certificate": certificate, "key": key});
        if let Some(authority) = clients {
            tls["clientcas"] = json!([authority]);
        }
        Self::start(storage, json!({"http": {"tls": tls}}))
    }

    fn start(storage: &Path, more: Value) -> Self {
        let mut config = json!({
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": storage}},
            "http": {"addr": "127.0.0.1:0"},
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            if config[key].is_null() {
                config[key] = json!({});
            }
            for (name, value) in value.as_object().into_iter().flatten() {
                config[key][name] = value.clone();
            }
        }
        let dir = temporary();
        let path = dir.path().join("config.yml");
        fs::write(&path, config.to_string()).expect("the directory is ours");
        let mut child = Command::new("docker-registry")
            .args([Path::new("serve"), &path])
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry: {error}: run integration/run first"));
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).expect("its log") > 0, "docker-registry does not start");
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ',']).next().expect("an address").trim().to_owned();
            }
        };
        thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { child, address, _config: dir }
    }

    /// Puts a blob into a repository.
    pub fn put_blob(&self, repository: &str, data: &[u8]) -> String {
        let digest = Digest::of(data).to_string();
        let started = self.ask("POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[]);
        assert_eq!(started.status, 202, "{}", String::from_utf8_lossy(&started.body));
        let place = started.header("location").expect("a place to put the blob");
        let place = place.split_once(&self.address).map_or(place.as_str(), |(_, path)| path);
        let mark = if place.contains('?') { '&' } else { '?' };
        let put = self.ask("PUT", &format!("{place}{mark}digest={digest}"), "application/octet-stream", data);
        assert_eq!(put.status, 201, "{}", String::from_utf8_lossy(&put.body));
        digest
    }

    /// Puts a manifest or an index into a repository.
    pub fn put_manifest(&self, repository: &str, tag: &str, manifest: &Value) -> String {
        let data = manifest.to_string();
        let kind = manifest["mediaType"].as_str().expect("a media type");
        let put = self.ask("PUT", &format!("/v2/{repository}/manifests/{tag}"), kind, data.as_bytes());
        assert_eq!(put.status, 201, "{}", String::from_utf8_lossy(&put.body));
        Digest::of(data.as_bytes()).to_string()
    }

    /// Puts an image there; the manifest's digest.
    pub fn push(&self, repository: &str, tag: &str, packed: &Packed) -> String {
        for blob in [&packed.config].into_iter().chain(packed.layers.iter().map(|layer| &layer.data)) {
            self.put_blob(repository, blob);
        }
        self.put_manifest(repository, tag, &packed.manifest())
    }

    fn ask(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\n", self.address);
        ask(&self.address, &head, body)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A layer of a packed image.
#[derive(Clone)]
pub struct PackedLayer {
    /// Its media type.
    pub kind: String,
    /// Its blob.
    pub data: Vec<u8>,
    /// The digest of what is in it.
    pub diff_id: String,
}

/// An image's configuration and layers.
#[derive(Clone)]
pub struct Packed {
    /// The configuration's media type.
    pub kind: String,
    /// The configuration.
    pub config: Vec<u8>,
    /// The layers, lowest first.
    pub layers: Vec<PackedLayer>,
}

impl Packed {
    /// A test image with its layer compressed so: `gzip`, `zstd`.
    pub fn of(name: &str, compression: &str) -> Self {
        Self::read(&image(name, "oci"), compression)
    }

    /// The image of this tag in an OCI layout.
    pub fn read(oci: &Path, tag: &str) -> Self {
        let read = |digest: &Value| {
            let hex = digest.as_str().and_then(|text| text.strip_prefix("sha256:")).expect("a digest");
            fs::read(oci.join("blobs/sha256").join(hex)).expect("the image is whole")
        };
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
        let index = parse(&fs::read(oci.join("index.json")).expect("the image is whole"));
        let all = index["manifests"].as_array().expect("manifests");
        let chosen = all
            .iter()
            .find(|one| one["annotations"]["org.opencontainers.image.ref.name"] == tag)
            .expect("a tag");
        let manifest = parse(&read(&chosen["digest"]));
        let config = read(&manifest["config"]["digest"]);
        let diff_ids = parse(&config)["rootfs"]["diff_ids"].clone();
        let layers =
            manifest["layers"].as_array().expect("layers").iter().enumerate().map(|(i, layer)| PackedLayer {
                kind: layer["mediaType"].as_str().expect("a media type").into(),
                data: read(&layer["digest"]),
                diff_id: diff_ids[i].as_str().expect("a digest").into(),
            });
        Self {
            kind: manifest["config"]["mediaType"].as_str().expect("a media type").into(),
            layers: layers.collect(),
            config,
        }
    }

    /// The same with another layer on top: a file `/NAME` of so many bytes that do not compress, as `tar`, `tar+gzip` or
    /// `tar+zstd`.
    #[must_use]
    pub fn with_layer(mut self, name: &str, size: usize, form: &str) -> Self {
        let dir = temporary();
        // Not random, but nothing that a compressor sees through; gzip has a quarter to take away, or it would only copy.
        let mask = if form == "tar+gzip" { 0x3f } else { 0xff };
        let mut state = size as u64 ^ u64::from(name.bytes().next().unwrap_or(1)) << 32;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8 & mask
        })
        .take(size)
        .collect();
        fs::write(dir.path().join(name), bytes).expect("the directory is ours");
        let tar: PathBuf = dir.path().join("layer.tar");
        must(Command::new("tar").args(["-C", &dir.path().display().to_string(), "-cf"]).arg(&tar).arg(name));
        let diff_id = Digest::of(&fs::read(&tar).expect("a tar file")).to_string();
        let file = match form {
            "tar" => tar,
            "tar+gzip" => {
                must(Command::new("gzip").args(["-1", "-k"]).arg(&tar));
                dir.path().join("layer.tar.gz")
            }
            _ => {
                must(Command::new("zstd").arg("-q").arg(&tar));
                dir.path().join("layer.tar.zst")
            }
        };
        let data = fs::read(file).expect("a layer");
        self.layers.push(PackedLayer {
            kind: format!("application/vnd.oci.image.layer.v1.{form}"),
            data,
            diff_id,
        });
        self.edit(|config, layers| {
            config["rootfs"]["diff_ids"] = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        })
    }

    /// The same with another configuration.
    #[must_use]
    pub fn edit(mut self, edit: impl FnOnce(&mut Value, &[PackedLayer])) -> Self {
        let mut config: Value = serde_json::from_slice(&self.config).expect("JSON");
        edit(&mut config, &self.layers);
        self.config = config.to_string().into_bytes();
        self
    }

    /// The same as Docker pushes it (image manifest version 2, schema 2).
    #[must_use]
    pub fn as_docker(mut self) -> Self {
        self.kind = "application/vnd.docker.container.image.v1+json".into();
        for layer in &mut self.layers {
            layer.kind = "application/vnd.docker.image.rootfs.diff.tar.gzip".into();
        }
        self
    }

    /// Its manifest.
    pub fn manifest(&self) -> Value {
        let descriptor = |kind: &str, data: &[u8]| json!({"mediaType": kind, "digest": Digest::of(data).to_string(), "size": data.len()});
        let docker = self.kind.contains("docker");
        let media_type = if docker {
            "application/vnd.docker.distribution.manifest.v2+json"
        } else {
            "application/vnd.oci.image.manifest.v1+json"
        };
        json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": descriptor(&self.kind, &self.config),
            "layers": self.layers.iter().map(|layer| descriptor(&layer.kind, &layer.data)).collect::<Vec<_>>(),
        })
    }

    /// The digest of a layer's blob.
    pub fn blob(&self, layer: usize) -> String {
        Digest::of(&self.layers[layer].data).to_string()
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<String> {
        header(&self.head, name)
    }
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned()))
}

fn ask(address: &str, head: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).expect("the registry runs");
    let head = format!("{head}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("the registry reads");
    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader).expect("the registry answers");
    let mut body = Vec::new();
    match header(&head, "content-length").and_then(|length| length.parse().ok()) {
        Some(length) => reader.take(length).read_to_end(&mut body),
        None => reader.read_to_end(&mut body),
    }
    .expect("the registry answers");
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
    Answer { status, head, body }
}

/// Up to the empty line; `None` if there is no HTTP.
fn read_head(reader: &mut impl BufRead) -> Option<String> {
    let mut head = String::new();
    loop {
        let before = head.len();
        // A TLS hello is no text.
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
        if head[before..].trim().is_empty() {
            return Some(head);
        }
    }
}

/// What the proxy does with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    Pass,
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// It ends before the answer.
    Drop,
    /// Another answer: status, header lines, body.
    Answer(u16, String, String),
    /// A byte of the body is another.
    Garble,
    /// So many bytes of the body each 10 ms.
    Slow(usize),
    /// Half of the body comes, and then nothing for a minute.
    Hang,
    /// Range is not understood.
    Whole,
    /// Half of the range comes, and is called that.
    Half,
    /// The range is called another one.
    Shifted,
    /// Another blob is sent, of this digest.
    Other(String),
}

/// What was asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// `/v2/ml/blobs/sha256:…`
    pub path: String,
    /// The value of Range.
    pub range: Option<String>,
    /// The value of Authorization.
    pub authorization: Option<String>,
    /// So often was the path asked for before.
    pub before: usize,
}

impl Request {
    /// The bytes that it asks for; `None`: all of them.
    pub fn bytes(&self) -> Option<Range<u64>> {
        let (start, end) = self.range.as_deref()?.strip_prefix("bytes=")?.split_once('-')?;
        Some(start.parse().ok()?..end.parse::<u64>().ok()? + 1)
    }
}

/// A proxy of the network (RFC 9110, CONNECT) that leads everywhere to one address; its own, and the lines that it got.
pub fn tunnel(to: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&lines);
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut reader = BufReader::new(client.try_clone().expect("a descriptor"));
            let Some(head) = read_head(&mut reader) else { continue };
            log.lock().expect("no panic").push(head.lines().next().unwrap_or_default().to_owned());
            let mut server = TcpStream::connect(&to).expect("the registry runs");
            let mut back = server.try_clone().expect("a descriptor");
            let _ = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            thread::spawn(move || std::io::copy(&mut reader, &mut server));
            thread::spawn(move || std::io::copy(&mut back, &mut client));
        }
    });
    (address, lines)
}

type Decide = dyn Fn(&Request) -> Fault + Send + Sync;

/// Stands before a registry.
pub struct Proxy {
    /// `127.0.0.1:PORT`
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Proxy {
    /// Passes on what `decide` lets it. It ends with the test's process.
    pub fn before(registry: &Registry, decide: impl Fn(&Request) -> Fault + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let counts = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
        let (log, upstream) = (Arc::clone(&requests), registry.address.clone());
        let decide: Arc<Decide> = Arc::new(decide);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (log, counts) = (Arc::clone(&log), Arc::clone(&counts));
                let (decide, upstream) = (Arc::clone(&decide), upstream.clone());
                thread::spawn(move || serve(client, &upstream, &log, &counts, &*decide));
            }
        });
        Self { address, requests }
    }

    /// What was asked until now.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no panic").clone()
    }

    /// How often a blob was asked for.
    pub fn count(&self, digest: &str) -> usize {
        self.requests().iter().filter(|request| request.path.ends_with(digest)).count()
    }
}

fn serve(
    mut client: TcpStream,
    upstream: &str,
    log: &Mutex<Vec<Request>>,
    counts: &Mutex<HashMap<String, usize>>,
    decide: &Decide,
) {
    let mut reader = BufReader::new(client.try_clone().expect("a descriptor"));
    let Some(head) = read_head(&mut reader) else {
        let _ =
            client.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    };
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let before = {
        let mut counts = counts.lock().expect("no panic");
        let count = counts.entry(path.clone()).or_default();
        *count += 1;
        *count - 1
    };
    let request = Request {
        path: path.clone(),
        range: header(&head, "range"),
        authorization: header(&head, "authorization"),
        before,
    };
    let fault = decide(&request);
    log.lock().expect("no panic").push(request.clone());
    let answer = match &fault {
        Fault::Drop => return,
        Fault::Answer(status, headers, body) => {
            let _ = write!(
                client,
                "HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            return;
        }
        _ => {
            let path = match &fault {
                Fault::Other(digest) => format!("{}/{digest}", path.rsplit_once('/').expect("a blob").0),
                _ => path,
            };
            let range = match (&fault, request.bytes()) {
                (Fault::Whole, _) | (_, None) => None,
                (Fault::Half, Some(range)) => {
                    Some((range.start, u64::midpoint(range.start, range.end).max(range.start + 1)))
                }
                (_, Some(range)) => Some((range.start, range.end)),
            };
            let mut passed = format!("GET {path} HTTP/1.1\r\nHost: {upstream}\r\n");
            passed.extend(header(&head, "accept").map(|value| format!("Accept: {value}\r\n")));
            passed.extend(range.map(|(start, end)| format!("Range: bytes={start}-{}\r\n", end - 1)));
            let mut answer = ask(upstream, &passed, &[]);
            if fault == Fault::Shifted {
                answer.head = answer.head.replace("Content-Range: bytes ", "Content-Range: bytes 1");
            }
            answer
        }
    };
    let mut body = answer.body;
    let sent = write!(
        client,
        "{}Connection: close\r\n\r\n",
        answer
            .head
            .lines()
            .filter(|line| !line.is_empty())
            .fold(String::new(), |head, line| head + line + "\r\n")
    );
    if sent.is_err() {
        return;
    }
    let mut send = |bytes: &[u8]| client.write_all(bytes).is_ok();
    let half = body.len() / 2;
    match fault {
        Fault::Cut(at) => {
            send(&body[..at.min(body.len())]);
        }
        Fault::Garble => {
            body[half] ^= 1;
            send(&body);
        }
        Fault::Slow(step) => {
            for piece in body.chunks(step) {
                if !send(piece) {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        Fault::Hang => {
            send(&body[..half]);
            thread::sleep(Duration::from_secs(60));
        }
        _ => {
            send(&body);
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}
