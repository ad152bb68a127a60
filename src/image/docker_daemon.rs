//! Images that Docker keeps, saved through its socket (Docker Engine API).
//!
//! The requests are HTTP/1.0, which every version of Docker supports: a response is a head and a body up to the end of the
//! connection. The reader detects a truncated body, because a tar archive has an end marker and its parts have digests.

use super::{layout::Layout, progress::Unpacking, registry::Progress, store::Store};
use crate::{
    error::{Code, Error, OrFail, Result},
    formats::go_json,
};
use serde::Deserialize;
use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

/// Read timeout. The daemon packs a layer while it sends it.
const SILENCE: Duration = Duration::from_secs(120);
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
    ask(&format!("/images/{name}/json"), name)?
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
    store.fill(&mut file, &mut unpacking.count(ask(&format!("/images/{name}/get"), name)?))?;
    drop(unpacking);
    Layout::archive_of(file)
        .map_err(|error| error.context(format!("what Docker saved of {name} cannot be read")))
}

/// The body of an answer.
fn ask(path: &str, name: &str) -> Result<impl Read> {
    let socket = socket()?;
    let fail = || format!("Docker's daemon cannot be asked at {}", socket.display());
    let mut stream = UnixStream::connect(&socket).map_err(|error| {
        Error::new(Code::Registry, fail()).cause(&error).fix(match error.kind() {
            std::io::ErrorKind::PermissionDenied => "run gpurun as root, or as a user of the group docker",
            _ => "start it (systemctl start docker), or name its socket: DOCKER_HOST=unix:///run/user/1000/docker.sock",
        })
    })?;
    stream
        .set_read_timeout(Some(SILENCE))
        .and_then(|()| stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n").as_bytes()))
        .map_err(|error| unanswered(&fail(), &error))?;
    let mut reader = BufReader::with_capacity(256 << 10, stream);
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

    proptest! {
        #[test]
        fn any_head_has_a_status_or_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = head(&mut &bytes[..]);
        }
    }
}
