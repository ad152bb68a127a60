//! A blob on its way, read from its first byte on while it comes.
//!
//! Where the network is slower than who reads, several connections write it to files, piece by piece. They stay where a pull is
//! killed or the network fails, and the next one goes on from there. The name of each is where its first byte belongs, and its
//! length says how far it came. Nothing in them is believed: what is read is checked when all of it was read.
//!
//! Where the network is quicker, which the first piece shows, one connection is enough, and files would only cost time: the rest
//! goes to the reader as it comes.

use super::{
    client::Client,
    failure::{Attempts, Failure},
    http::Paced,
    progress::Line,
};
use crate::{
    error::{Code, Error, Result},
    image::{Digest, layer::Layer},
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
    time::{Duration, Instant},
};
use ureq::{
    BodyReader,
    http::{StatusCode, header},
};

/// So many bytes of progress, and the attempts are counted afresh.
const PROGRESS: u64 = 256 << 10;
/// Long enough that the question for the next costs little, short enough that the first is soon there.
const PIECE: u64 = 8 << 20;
/// Registries limit what one connection gets, so that many fetch a blob …
const CONNECTIONS: usize = 4;
/// … if one has not brought a piece by then.
const SOON: Duration = Duration::from_millis(300);
/// What a connection delivers is written in steps of this size.
const STEP: usize = 256 << 10;

/// What all blobs of an image share.
pub struct Shared {
    /// The error of the first failed piece, because an [`io::Error`] cannot carry it; the other pieces then end as well.
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
    client: &'a Client<'a>,
    digest: &'a Digest,
    /// Addresses for a blob that the registry does not have.
    urls: &'a [String],
    size: u64,
    directory: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    shared: &'a Shared,
    line: &'a Line<'a>,
}

struct State {
    pieces: Vec<Piece>,
    /// Whether the registry sends parts; unknown before its first answer.
    parts: Option<bool>,
    /// Whether the reader has a connection of its own; unknown before the first piece is there.
    direct: Option<bool>,
    /// How far the reader is.
    at: u64,
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
        client: &'a Client<'a>,
        layer: &'a Layer,
        digest: &'a Digest,
        directory: OwnedFd,
        shared: &'a Shared,
        line: &'a Line<'a>,
    ) -> Self {
        let size = layer.size;
        let mut pieces = Vec::new();
        for start in (0..size.div_ceil(PIECE)).map(|piece| piece * PIECE) {
            let length = statat(&directory, start.to_string(), AtFlags::SYMLINK_NOFOLLOW)
                .map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
            // One that is too long is not ours.
            let length = if length > PIECE.min(size - start) { 0 } else { length };
            pieces.push(Piece { length, taken: false });
        }
        // What an earlier pull could not finish is worth keeping.
        let direct = pieces.iter().any(|piece: &Piece| piece.length > 0).then_some(false);
        let state = State { pieces, parts: None, direct, at: 0, begun: false, stopped: false };
        let blob = Self {
            client,
            digest,
            urls: &layer.urls,
            size,
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
        PIECE.min(self.size - start(piece))
    }

    /// Fetches pieces until none are left, or the reader has ended.
    pub fn fetch(&self) {
        let mut patience = Patience::default();
        while let Some(piece) = self.take() {
            let received = self.shared.with_connection(|| self.receive(piece, &mut patience.progress));
            if let Err(error) = self.again(received, &mut patience) {
                self.shared.fail(error);
            }
            lock(&self.state).pieces[piece].taken = false;
            self.changed.notify_all();
        }
    }

    /// Waits after a failure, if another attempt makes sense.
    fn again(&self, received: Result<(), Failure>, patience: &mut Patience) -> Result<()> {
        if received.is_ok() || patience.progress >= PROGRESS {
            *patience = Patience::default();
        }
        let waited = received.or_else(|failure| {
            patience.attempts.after(failure, |pause, why| {
                let _waiting = self.client.status().waiting(why.to_owned());
                let state = lock(&self.state);
                let _ = self.changed.wait_timeout_while(state, pause, |state| !state.stopped);
            })
        });
        waited.map_err(|error| error.context(format!("the layer {} cannot be fetched", self.digest)))
    }

    /// Ends all [`fetch`](Self::fetch)es.
    pub fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_all();
    }

    /// The next piece to be fetched. One connection is enough until it has answered and has taken its time, and it stays the
    /// only one where the registry sends no parts.
    fn take(&self) -> Option<usize> {
        let mut state = lock(&self.state);
        let started = Instant::now();
        loop {
            if state.stopped || self.shared.failed().is_some() {
                return None;
            }
            // What the reader had by his own connection is not missing.
            let missing = |at: &usize| {
                let Piece { length, taken } = state.pieces[*at];
                !taken && length < self.length(*at) && state.at < start(*at) + self.length(*at)
            };
            let next = (0..state.pieces.len()).find(missing)?;
            let slow = state.direct == Some(false) || (state.direct.is_none() && started.elapsed() >= SOON);
            let alone = state.pieces.iter().all(|piece| !piece.taken) && state.direct != Some(true);
            if alone || (slow && state.parts == Some(true)) {
                state.pieces[next].taken = true;
                return Some(next);
            }
            state = self.changed.wait_timeout(state, SOON).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// One request: the rest of a piece, or what more the registry insists on.
    fn receive(&self, piece: usize, progress: &mut u64) -> Result<(), Failure> {
        let mut at = start(piece) + lock(&self.state).pieces[piece].length;
        let mut end = start(piece) + self.length(piece);
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
            let state = lock(&self.state);
            if state.stopped || state.direct == Some(true) || self.shared.failed().is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Asks for the bytes from `at` to `end`. Where the registry sends no parts, `end` becomes the blob's.
    fn connect(&self, at: u64, end: &mut u64) -> Result<Paced<BodyReader<'static>>, Failure> {
        let range = (at > 0 || *end < self.size).then_some(at..*end);
        let response = self.client.get_blob(self.digest, self.size, self.urls, range.as_ref()).map_err(
            |mut failure| {
                // A restarting registry refuses connections for a while.
                failure.again |= lock(&self.state).begun && failure.error.code() == Code::Registry;
                failure
            },
        )?;
        let headers = response.headers();
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let wrong = |cause: String| {
            let what = "the registry sends something else than it promised";
            let fix = "pull again; if it stays, have the image pushed again, or name a mirror in gpurun's registry-mirrors";
            Failure::lasting(Error::new(Code::ImageBroken, what).cause(cause).fix(fix))
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
        let mut body = Paced::new(response.into_body().into_reader());
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
            let piece = number(at);
            let offset = at - start(piece);
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
            if *length == self.length(piece) && state.direct.is_none() {
                state.direct = Some(state.at < start(piece) + self.length(piece) / 2);
            }
            drop(state);
            self.changed.notify_all();
        }
        Ok(())
    }

    fn open(&self, piece: usize, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.directory, start(piece).to_string(), flags, Mode::RUSR | Mode::WUSR).map_err(failed)
    }

    /// From the first byte on, while it comes.
    pub fn reader(&self) -> Reader<'_, 'a> {
        Reader { blob: self, at: 0, file: None, stream: None, patience: Patience::default() }
    }
}

/// Where a piece begins.
fn start(piece: usize) -> u64 {
    piece as u64 * PIECE
}

/// Which piece a byte is in.
fn number(at: u64) -> usize {
    usize::try_from(at / PIECE).unwrap_or(usize::MAX)
}

/// What a connection has met until now.
#[derive(Default)]
struct Patience {
    attempts: Attempts,
    /// Bytes since they were counted last.
    progress: u64,
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
        _ => Error::new(Code::Store, "a part of a layer cannot be kept")
            .cause(errno)
            .fix("name a directory on a local filesystem in GPURUN_STORE"),
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
    stream: Option<Stream>,
    patience: Patience,
}

/// A connection of the reader's own.
struct Stream {
    body: Paced<BodyReader<'static>>,
    /// Where it is left again.
    end: u64,
    /// When the piece began that is read, and how long the network was waited for since.
    began: Instant,
    waited: Duration,
}

impl Reader<'_, '_> {
    /// Waits until there are bytes in the files; `None` if the reader has to see to it himself.
    fn ready(&self) -> io::Result<Option<u64>> {
        let (blob, piece) = (self.blob, number(self.at));
        let mut state = lock(&blob.state);
        state.at = self.at;
        loop {
            let ready = state.pieces[piece].length.saturating_sub(self.at - start(piece));
            if ready > 0 {
                return Ok(Some(ready));
            }
            if let Some(error) = blob.shared.failed() {
                return Err(io::Error::other(error.what().to_owned()));
            }
            if state.direct == Some(true) && !state.pieces[piece].taken {
                return Ok(None);
            }
            // It may be another blob that fails.
            state = blob.changed.wait_timeout(state, SOON).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn read_kept(&mut self, ready: u64, buffer: &mut [u8]) -> Result<usize> {
        let (blob, piece) = (self.blob, number(self.at));
        let file = match self.file.take() {
            Some((opened, file)) if opened == piece => file,
            _ => blob.open(piece, OFlags::RDONLY)?,
        };
        let wanted = usize::try_from(ready).unwrap_or(usize::MAX).min(buffer.len());
        let count = pread(&file, &mut buffer[..wanted], self.at - start(piece)).map_err(failed)?;
        self.file = Some((piece, file));
        Ok(count)
    }

    /// Reads what comes; 0 where that is for others to fetch from now on.
    fn read_stream(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        let blob = self.blob;
        let mut stream = if let Some(stream) = self.stream.take() {
            stream
        } else {
            let mut end = blob.size;
            let body = blob.connect(self.at, &mut end)?;
            Stream { body, end, began: Instant::now(), waited: Duration::ZERO }
        };
        let left = PIECE - self.at % PIECE;
        let wanted = usize::try_from(left.min(stream.end - self.at)).unwrap_or(usize::MAX).min(buffer.len());
        let asked = Instant::now();
        let count = stream.body.read(&mut buffer[..wanted]).map_err(|error| blob.client.cut(error))?;
        stream.waited += asked.elapsed();
        if count == 0 {
            return Err(blob.client.cut("the stream ended"));
        }
        blob.line.advance(count as u64);
        self.patience.progress += count as u64;
        self.at += count as u64;
        let mut state = lock(&blob.state);
        (state.begun, state.at) = (true, self.at);
        if self.at.is_multiple_of(PIECE) || self.at == stream.end {
            // The network has become the slower one.
            if stream.waited > stream.began.elapsed() / 2 {
                state.direct = Some(false);
                blob.changed.notify_all();
            }
            (stream.began, stream.waited) = (Instant::now(), Duration::ZERO);
        }
        if state.direct == Some(true) && self.at < stream.end {
            self.stream = Some(stream);
        }
        Ok(count)
    }
}

impl Read for Reader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let say = |error: &Error| io::Error::other(error.what().to_owned());
        while self.at < self.blob.size && !buffer.is_empty() {
            let ready = if self.stream.is_some() { None } else { self.ready()? };
            if let Some(ready) = ready {
                let count = self.read_kept(ready, buffer).map_err(|error| say(&error))?;
                self.at += count as u64;
                return Ok(count);
            }
            let shared = self.blob.shared;
            match self.read_stream(buffer) {
                Ok(count) => return Ok(count),
                Err(failure) => self.blob.again(Err(failure), &mut self.patience).map_err(|error| {
                    let said = say(&error);
                    shared.fail(error);
                    said
                })?,
            }
        }
        Ok(0)
    }
}
