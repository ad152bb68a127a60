//! A blob on its way: several connections write it to files, piece by piece, and it is read from its first byte on meanwhile.
//!
//! The files stay where a pull is killed or the network fails, and the next one goes on from there. The name of each is where
//! its first byte belongs, and its length says how far it came. Nothing in them is believed: what is read is checked when all
//! of it was read.

use super::{
    client::{Attempts, Client, Failure},
    progress::Line,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    image::Digest,
};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, Mode, OFlags, openat, statat},
    io::{Errno, pread, pwrite},
};
use std::{
    io::{self, Read},
    ops::Range,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use ureq::{
    BodyReader,
    http::{StatusCode, header},
};

/// So many bytes of progress, and the attempts are counted afresh.
const PROGRESS: u64 = 256 << 10;
/// A blob of so many bytes comes in pieces, because registries limit what one connection gets …
const LARGE: u64 = 64 << 20;
/// … of so many bytes each: long enough that the question for the next costs little, short enough that the first is soon there.
const PIECE: u64 = 16 << 20;
/// By so many connections at once.
const CONNECTIONS: usize = 4;
/// What a connection delivers is written in steps of this size.
const STEP: usize = 256 << 10;

/// What all blobs of an image share.
pub struct Shared {
    /// Why the first of them failed, since an [`io::Error`] has no room for it; then the others end, too.
    failure: Mutex<Option<Error>>,
    /// Connections that may still be made.
    free: Mutex<usize>,
    freed: Condvar,
}

impl Shared {
    /// For so many connections at once, whatever the number of blobs.
    pub fn new(connections: usize) -> Self {
        Self { failure: Mutex::new(None), free: Mutex::new(connections), freed: Condvar::new() }
    }

    /// Keeps the first failure.
    pub fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
    }

    /// The first failure.
    pub fn failed(&self) -> Option<Error> {
        lock(&self.failure).clone()
    }

    fn with_connection<T>(&self, work: impl FnOnce() -> T) -> T {
        let free = lock(&self.free);
        *self.freed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner) -= 1;
        let done = work();
        *lock(&self.free) += 1;
        self.freed.notify_one();
        done
    }
}

/// A blob of a registry and the files that it is written to.
pub struct Blob<'a> {
    client: &'a Client,
    digest: &'a Digest,
    size: u64,
    /// The length of each piece but the last.
    piece: u64,
    directory: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    shared: &'a Shared,
    line: &'a Line,
}

struct State {
    pieces: Vec<Piece>,
    /// Whether the registry sends parts; unknown before its first answer.
    parts: Option<bool>,
    /// A byte has come.
    begun: bool,
    /// Nobody reads any more.
    stopped: bool,
}

#[derive(Clone, Copy)]
struct Piece {
    /// So many bytes of it are there.
    length: u64,
    /// A connection works on it.
    taken: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Blob<'a> {
    /// With what an earlier pull left in this directory. Nothing is asked yet.
    pub fn new(
        client: &'a Client,
        digest: &'a Digest,
        size: u64,
        directory: OwnedFd,
        shared: &'a Shared,
        line: &'a Line,
    ) -> Self {
        let piece = if size < LARGE { size.max(1) } else { PIECE };
        let mut pieces = Vec::new();
        for start in (0..size).step_by(usize::try_from(piece).unwrap_or(usize::MAX)) {
            let length = statat(&directory, start.to_string(), AtFlags::SYMLINK_NOFOLLOW)
                .map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
            // One that is too long is not ours.
            let length = if length > piece.min(size - start) { 0 } else { length };
            pieces.push(Piece { length, taken: false });
        }
        let state = State { pieces, parts: None, begun: false, stopped: false };
        let blob = Self {
            client,
            digest,
            size,
            piece,
            directory,
            state: Mutex::new(state),
            changed: Condvar::new(),
            shared,
            line,
        };
        line.advance(blob.present());
        blob
    }

    /// So many bytes of it are there.
    pub fn present(&self) -> u64 {
        lock(&self.state).pieces.iter().map(|piece| piece.length).sum()
    }

    /// So many threads should [fetch](Self::fetch) it.
    pub fn connections(&self) -> usize {
        let state = lock(&self.state);
        (0..state.pieces.len())
            .filter(|&at| state.pieces[at].length < self.length(at))
            .count()
            .min(CONNECTIONS)
    }

    /// Where a piece ends, counted from its start.
    fn length(&self, piece: usize) -> u64 {
        self.piece.min(self.size - self.start(piece))
    }

    fn start(&self, piece: usize) -> u64 {
        piece as u64 * self.piece
    }

    /// Fetches pieces until there are none, or nobody wants them.
    pub fn fetch(&self) {
        let mut attempts = Attempts::default();
        let mut progress = 0;
        while let Some(piece) = self.take() {
            let received = self.shared.with_connection(|| self.receive(piece, &mut progress));
            if received.is_ok() || progress >= PROGRESS {
                (attempts, progress) = (Attempts::default(), 0);
            }
            let ended = received.or_else(|failure| {
                attempts.after(failure, |pause| {
                    let state = lock(&self.state);
                    let _ = self.changed.wait_timeout_while(state, pause, |state| !state.stopped);
                })
            });
            if let Err(error) = ended {
                self.shared.fail(error.context(format!("the layer {} cannot be fetched", self.digest)));
            }
            lock(&self.state).pieces[piece].taken = false;
            self.changed.notify_all();
        }
    }

    /// Ends all [`fetch`](Self::fetch)es.
    pub fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_all();
    }

    /// The next piece to be fetched. Until it is known whether the registry sends parts one connection is enough, and it
    /// stays the only one if not.
    fn take(&self) -> Option<usize> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped || self.shared.failed().is_some() {
                return None;
            }
            let alone = state.parts != Some(true);
            let missing =
                |at: &usize| !state.pieces[*at].taken && state.pieces[*at].length < self.length(*at);
            let next = (0..state.pieces.len()).find(missing)?;
            if !alone || state.pieces.iter().all(|piece| !piece.taken) {
                state.pieces[next].taken = true;
                return Some(next);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One request: the rest of a piece, or what more the registry insists on.
    fn receive(&self, piece: usize, progress: &mut u64) -> Result<(), Failure> {
        let mut at = self.start(piece) + lock(&self.state).pieces[piece].length;
        let mut end = self.start(piece) + self.length(piece);
        let mut body = self.connect(at, &mut end)?;
        let mut buffer = vec![0; STEP];
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(STEP);
            let (count, cut) = fill(&mut body, &mut buffer[..wanted]);
            self.keep(at, &buffer[..count]).map_err(Failure::lasting)?;
            at += count as u64;
            *progress += count as u64;
            if let Some(cause) = cut {
                return Err(self.client.cut(cause));
            }
            if lock(&self.state).stopped || self.shared.failed().is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Asks for the bytes from `at` to `end`. Where the registry sends no parts, `end` becomes the blob's.
    fn connect(&self, at: u64, end: &mut u64) -> Result<BodyReader<'static>, Failure> {
        let range = (at > 0 || *end < self.size).then_some(at..*end);
        let response =
            self.client.get(&format!("blobs/{}", self.digest), range.as_ref()).map_err(|mut failure| {
                // A registry that restarts refuses connections for a while.
                failure.again |= lock(&self.state).begun && failure.error.code() == Code::Registry;
                failure
            })?;
        let headers = response.headers();
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let wrong = |cause: String| {
            let what = "the registry sends something else than it promised";
            Failure::lasting(Error::new(Code::ImageBroken, what).cause(cause))
        };
        let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
        let part = response.status() == StatusCode::PARTIAL_CONTENT;
        let (start, total) = if part {
            let sent = text(header::CONTENT_RANGE).unwrap_or_default();
            let (part, total) = content_range(sent)
                .filter(|(part, _)| part.contains(&at))
                .ok_or_else(|| wrong(format!("{sent:?} instead of bytes from {at} on")))?;
            // It may be less than what was asked for.
            *end = part.end.min(*end);
            (part.start, total)
        } else {
            (0, length)
        };
        if let Some(total) = total.filter(|&total| total != self.size) {
            return Err(wrong(format!("the blob {} has {total} bytes, not {}", self.digest, self.size)));
        }
        if !part {
            *end = self.size;
        }
        let known = lock(&self.state).parts.replace(part);
        if known.is_none() {
            self.changed.notify_all();
        }
        let mut body = response.into_body().into_reader();
        // A registry that knows no ranges begins at the beginning.
        let skip = at - start;
        match io::copy(&mut (&mut body).take(skip), &mut io::sink()) {
            Ok(count) if count == skip => Ok(body),
            Ok(_) => Err(self.client.cut("the stream ended")),
            Err(error) => Err(self.client.cut(error)),
        }
    }

    /// Writes to the files what belongs there.
    fn keep(&self, mut at: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let piece = usize::try_from(at / self.piece).or_fail(Code::Internal, || "a piece's number")?;
            let offset = at - self.start(piece);
            let rest = usize::try_from(self.length(piece) - offset).unwrap_or(usize::MAX).min(bytes.len());
            let file = self.open(piece, OFlags::WRONLY | OFlags::CREATE)?;
            let written =
                rustix::io::retry_on_intr(|| pwrite(&file, &bytes[..rest], offset)).map_err(failed)?;
            at += written as u64;
            bytes = &bytes[written..];
            let mut state = lock(&self.state);
            state.begun = true;
            let length = &mut state.pieces[piece].length;
            self.line.advance((offset + written as u64).saturating_sub(*length));
            *length = (*length).max(offset + written as u64);
            drop(state);
            self.changed.notify_all();
        }
        Ok(())
    }

    fn open(&self, piece: usize, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.directory, self.start(piece).to_string(), flags, Mode::RUSR | Mode::WUSR).map_err(failed)
    }

    /// From the first byte on, while it comes.
    pub fn reader(&self) -> Reader<'_, 'a> {
        Reader { blob: self, at: 0, file: None }
    }
}

/// Reads until the buffer is full; how much came, and what ended it before that.
fn fill(body: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<String>) {
    let mut filled = 0;
    while filled < buffer.len() {
        match body.read(&mut buffer[filled..]) {
            Ok(0) => return (filled, Some("the stream ended".into())),
            Ok(count) => filled += count,
            Err(error) => return (filled, Some(error.to_string())),
        }
    }
    (filled, None)
}

fn failed(errno: Errno) -> Error {
    match errno {
        Errno::NOSPC | Errno::DQUOT => Error::new(Code::NoSpace, "the image store's filesystem is full")
            .fix("make room on it, or name a directory on another filesystem in GPURUN_STORE"),
        _ => Error::new(Code::Store, "a part of a layer cannot be kept").cause(errno),
    }
}

/// `bytes 0-9/10`: which bytes, and of how many, if that is known (RFC 9110, section 14.4).
fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    Some((start.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?, total.parse().ok()))
}

/// Reads a [`Blob`]; waits for what is not there yet.
pub struct Reader<'b, 'a> {
    blob: &'b Blob<'a>,
    at: u64,
    /// The piece that is open.
    file: Option<(usize, OwnedFd)>,
}

impl Read for Reader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let blob = self.blob;
        if self.at == blob.size || buffer.is_empty() {
            return Ok(0);
        }
        let piece = usize::try_from(self.at / blob.piece).map_err(io::Error::other)?;
        let offset = self.at - blob.start(piece);
        let mut state = lock(&blob.state);
        let ready = loop {
            let ready = state.pieces[piece].length.saturating_sub(offset);
            if ready > 0 {
                break ready;
            }
            if let Some(error) = blob.shared.failed() {
                return Err(io::Error::other(error.what().to_owned()));
            }
            // It may be another blob that fails.
            let waited = blob.changed.wait_timeout(state, Duration::from_millis(200));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        if self.file.as_ref().is_none_or(|(opened, _)| *opened != piece) {
            let file = blob.open(piece, OFlags::RDONLY);
            self.file = Some((piece, file.map_err(|error| io::Error::other(error.what().to_owned()))?));
        }
        let Some((_, file)) = &self.file else { return Ok(0) };
        let wanted = usize::try_from(ready).unwrap_or(usize::MAX).min(buffer.len());
        let count = pread(file, &mut buffer[..wanted], offset)?;
        self.at += count as u64;
        Ok(count)
    }
}
