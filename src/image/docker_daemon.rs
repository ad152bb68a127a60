//! Images that Docker keeps, saved through its socket (Docker Engine API).
//!
//! The requests are HTTP/1.0, which every version of Docker supports: a response is a head and a body up to the end of the
//! connection. The reader detects a truncated body, because a tar archive has an end marker and its parts have digests.

use super::{layout::Layout, progress::Unpacking, registry::Progress, store::Store};
use crate::{
    error::{Code, Error, OrFail, Result},
    formats::go_json,
};
use rustix::{
    io::Errno,
    net::{
        self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use serde::Deserialize;
use std::{
    env,
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The longest silence of the daemon while it saves an image. It packs a layer while it sends it.
const SILENCE: Duration = Duration::from_secs(120);
/// The longest time for what the daemon knows of an image, from the request to the end of the answer.
const DESCRIBING: Duration = Duration::from_secs(60);
/// A wait that is reported.
const LONG_WAIT: Duration = Duration::from_secs(1);
/// The longest head, and the longest document: that of an image has a few kB.
const MAX_DOCUMENT: u64 = 8 << 20;

/// What Docker says of an image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Described {
    /// The image id in Docker. With the containerd image store it is the digest of the manifest.
    pub id: String,
    /// The size of its files in bytes.
    #[serde(default)]
    pub size: i64,
}

/// What the daemon knows of an image.
///
/// # Errors
/// [`Code::ImageNotFound`] if it has no such image, [`Code::Registry`] if it cannot be asked.
pub fn describe(name: &str) -> Result<Described> {
    let mut bytes = Vec::new();
    ask(&format!("/images/{name}/json"), name, Some(DESCRIBING))?
        .take(MAX_DOCUMENT)
        .read_to_end(&mut bytes)
        .or_fail(Code::Registry, || "Docker's daemon does not answer")
        .map_err(|error| error.fix("check it: `docker version`, `systemctl status docker`"))?;
    go_json::from_slice(&bytes)
        .or_fail(Code::Registry, || "Docker's daemon sent an unexpected response")
        .map_err(|error| {
            error.fix("check the socket: `docker version` asks it; DOCKER_HOST=unix://PATH names another one")
        })
}

/// Has the daemon save the image, into a file of the store that has no name.
///
/// # Errors
/// Those of [`describe`]; [`Code::NoSpace`] if the store has no room for it.
pub fn save(name: &str, store: &Store, progress: Progress) -> Result<Layout> {
    // Once as it is saved, and once unpacked.
    let size = u64::try_from(describe(name)?.size).unwrap_or(0);
    store.check_room(size.saturating_mul(2))?;
    let mut file = store.unnamed_file()?;
    let unpacking = Unpacking::start(format!("copying {name} from Docker"), Some(size), progress);
    store.fill(&mut file, &mut unpacking.count(ask(&format!("/images/{name}/get"), name, None)?))?;
    drop(unpacking);
    Layout::archive_of(file)
        .map_err(|error| error.context(format!("what Docker saved of {name} cannot be read")))
}

/// The daemon's side of a connection. A read that takes long is reported once, by a line on stderr.
struct Answer {
    stream: UnixStream,
    socket: PathBuf,
    /// When all of the answer must be here; `None` bounds each silence instead, and the reports are left to the caller's progress.
    deadline: Option<Instant>,
    reported: bool,
}

impl Read for Answer {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(deadline) = self.deadline else {
            self.stream.set_read_timeout(Some(SILENCE))?;
            return self.stream.read(bytes).map_err(|error| silent(error, SILENCE));
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(silent(ErrorKind::WouldBlock.into(), DESCRIBING));
            }
            self.stream.set_read_timeout(Some(if self.reported { left } else { left.min(LONG_WAIT) }))?;
            match self.stream.read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.reported {
                        self.reported = true;
                        tracing::warn!("waiting for Docker's daemon at {}", self.socket.display());
                    }
                }
                done => return done,
            }
        }
    }
}

/// The error of a read that timed out (EAGAIN, "Resource temporarily unavailable") in words.
fn silent(error: io::Error, limit: Duration) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => {
            io::Error::new(ErrorKind::TimedOut, format!("no answer came within {} s", limit.as_secs()))
        }
        _ => error,
    }
}

/// Connects with a bound on the time, since a daemon that hangs accepts no connection and its backlog fills up. Writes have the same
/// bound. `reported` is set where a line on stderr says that the daemon is waited for.
fn connect(socket: &Path, reported: &mut bool) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&stream, Timeout::Send, Some(LONG_WAIT))?;
    let mut connected = net::connect(&stream, &address);
    set_socket_timeout(&stream, Timeout::Send, Some(DESCRIBING))?;
    if connected == Err(Errno::AGAIN) {
        *reported = true;
        tracing::warn!("waiting for Docker's daemon at {}", socket.display());
        connected = net::connect(&stream, &address);
    }
    connected.map_err(|errno| silent(errno.into(), DESCRIBING))?;
    Ok(stream.into())
}

/// The body of an answer. `within` bounds the whole answer, and otherwise each silence is bounded.
fn ask(path: &str, name: &str, within: Option<Duration>) -> Result<impl Read> {
    let socket = socket()?;
    let fail = || format!("Docker's daemon cannot be asked at {}", socket.display());
    let mut reported = false;
    let mut stream = connect(&socket, &mut reported).map_err(|error| {
        Error::new(Code::Registry, fail()).cause(&error).fix(match error.kind() {
            std::io::ErrorKind::PermissionDenied => "run gpurun as root, or as a user of the group docker",
            _ => "start it (systemctl start docker), or name its socket: DOCKER_HOST=unix:///run/user/1000/docker.sock",
        })
    })?;
    stream
        .write_all(format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n").as_bytes())
        .map_err(|error| unanswered(&fail(), &error))?;
    let deadline = within.map(|within| Instant::now() + within);
    let answer = Answer { stream, socket: socket.clone(), deadline, reported };
    let mut reader = BufReader::with_capacity(256 << 10, answer);
    let status = head(&mut reader).map_err(|error| unanswered(&fail(), &error))?;
    if status == 200 {
        return Ok(reader);
    }
    let mut said = Vec::new();
    reader.take(64 << 10).read_to_end(&mut said).map_err(|error| unanswered(&fail(), &error))?;
    let said = complaint(&said);
    Err(if status == 404 {
        Error::new(Code::ImageNotFound, format!("Docker has no image {name}"))
            .cause(said)
            .fix("`docker images` lists those that are there; `docker pull` or `docker build` makes more")
    } else {
        Error::new(Code::Registry, format!("Docker's daemon cannot serve {name}"))
            .cause(format!("{status}: {said}"))
            .fix(format!("try `docker save {name}`; `journalctl -u docker` says more"))
    })
}

fn unanswered(what: &str, cause: &dyn std::fmt::Display) -> Error {
    Error::new(Code::Registry, what)
        .cause(cause)
        .fix("see whether `docker images` works, and the daemon's log: journalctl -u docker")
}

/// The status of an answer, read up to its body.
fn head(reader: &mut impl BufRead) -> std::io::Result<u16> {
    let mut lines = reader.take(64 << 10);
    let mut status = None;
    loop {
        let mut line = Vec::new();
        lines.read_until(b'\n', &mut line)?;
        let text = String::from_utf8_lossy(&line);
        match (status, text.trim_end()) {
            (Some(status), "") if !line.is_empty() => return Ok(status),
            (None, first) if first.starts_with("HTTP/1.") => {
                status = first.split(' ').nth(1).and_then(|word| word.parse().ok());
            }
            (Some(_), rest) if !rest.is_empty() => {}
            _ => return Err(std::io::Error::other("that is no answer in HTTP")),
        }
    }
}

fn complaint(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Message {
        message: String,
    }
    let said = go_json::from_slice::<Message>(body)
        .map_or_else(|_| String::from_utf8_lossy(body).chars().take(200).collect(), |error| error.message);
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Where the daemon listens: `DOCKER_HOST`, else where a daemon of root's does. Another machine's daemon would mean this user's
/// certificates or ssh.
fn socket() -> Result<PathBuf> {
    let Ok(host) = env::var("DOCKER_HOST") else { return Ok("/var/run/docker.sock".into()) };
    match host.strip_prefix("unix://") {
        Some(path) => Ok(path.into()),
        None if host.is_empty() => Ok("/var/run/docker.sock".into()),
        None => Err(Error::new(Code::Registry, format!("Docker's daemon cannot be asked at {host}"))
            .cause("DOCKER_HOST names it, and only sockets of this machine are spoken to (unix://PATH)")
            .fix("on that machine: docker save -o FILE IMAGE; then docker-archive:FILE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answers_head_ends_where_its_body_begins() {
        let mut answer = &b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nbody"[..];
        assert_eq!(head(&mut answer).unwrap(), 404);
        assert_eq!(answer, b"body");
        for bad in
            [&b""[..], b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 x\r\n\r\n"]
        {
            assert!(head(&mut &*bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_daemon_that_is_silent_is_given_up() {
        let (stream, silent_daemon) = UnixStream::pair().unwrap();
        let deadline = Some(Instant::now() + Duration::from_millis(1500));
        let mut answer = Answer { stream, socket: "docker.sock".into(), deadline, reported: false };
        let error = answer.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(answer.reported);
        drop(silent_daemon);
    }

    #[test]
    fn a_daemon_that_accepts_no_connection_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        net::listen(&listener, 0).unwrap();
        let (mut first, mut second) = (false, false);
        // A backlog of 0 holds one connection.
        let waiting = connect(&path, &mut first).unwrap();
        let accepted = std::thread::scope(|scope| {
            let connected = scope.spawn(|| connect(&path, &mut second).is_ok());
            std::thread::sleep(2 * LONG_WAIT);
            let _first = net::accept(&listener).unwrap();
            connected.join().unwrap()
        });
        drop(waiting);
        assert!(accepted && !first && second);
    }

    proptest! {
        #[test]
        fn any_head_has_a_status_or_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = head(&mut &bytes[..]);
        }
    }
}
