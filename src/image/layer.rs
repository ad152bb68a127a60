//! From a layer's blob to its directory: inflate, check, unpack.

use super::{
    compression::{self, Compression},
    digest::{Digest, Hasher},
    note::Note,
    unpack::{Ownership, unpack},
};
use crate::error::{Code, Error, OrFail, Result};
use rustix::fd::BorrowedFd;
use serde::{Deserialize, Serialize};
use std::{
    io::{self, BufRead, Read},
    mem,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, Scope, ScopedJoinHandle},
};

/// How much a layer may inflate to, in bytes: far beyond any real one, and an end to one that inflates for ever.
const MAX_LAYER: u64 = 1 << 40;
/// The most bytes after the archive in a layer: tar(1) pads to a record of some kB, and endless zeros must not be hashed
/// forever.
const MAX_AFTER: u64 = 64 << 20;
/// Bytes travel from thread to thread in pieces of this size …
const CHUNK: usize = 256 << 10;
/// … of which so many may wait, so that memory stays bounded whatever the layer's size.
const CHUNKS: usize = 4;

/// One layer of an image, as its manifest and configuration describe it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Of the tar stream, uncompressed: the layer's identity.
    pub diff_id: Digest,
    /// Of the blob as it is stored; docker-archive does not say.
    pub digest: Option<Digest>,
    /// Where the blob is in its layout.
    pub path: String,
    /// Its length as it is stored, in bytes.
    pub size: u64,
    /// Addresses of a layer that the registry may not have (OCI image specification, "non-distributable layers").
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

impl Layer {
    /// Unpacks the blob into an empty directory; success means that every byte was what the digests promise.
    ///
    /// One thread reads and hashes the blob, one inflates it, and the caller's hashes the content and writes files.
    pub fn unpack(
        &self,
        mut blob: impl Read + Send,
        root: BorrowedFd<'_>,
        ownership: Ownership,
    ) -> Result<Note> {
        let mut head = Vec::new();
        let unpacked = match (&mut blob).take(compression::HEAD as u64).read_to_end(&mut head) {
            Ok(_) => thread::scope(|scope| {
                let compressed = Compression::of(&head) != Compression::None;
                let (sink, mut source) = pipe();
                // For an uncompressed blob one pass checks both digests, if they use the same algorithm.
                let apart = |digest: &&Digest| compressed || !digest.is_like(&self.diff_id);
                let promised = self.digest.as_ref().filter(apart);
                let blob = io::Cursor::new(head).chain(blob);
                let reading = start(scope, move || read(blob, promised, &sink))?;
                let mut inflating = None;
                if compressed {
                    let (sink, inflated) = pipe();
                    let stored = mem::replace(&mut source, inflated);
                    inflating = Some(start(scope, move || inflate(stored, &sink))?);
                }
                let mut content = Content { source, hasher: self.diff_id.hasher(), total: 0 };
                let unpacked = unpack(&mut content, root, ownership);
                let unpacked = match unpacked {
                    // Where the writer gave up, the others do so only because of it.
                    Err(error) if error.code() != Code::ImageBroken => {
                        drop(content);
                        Err(error)
                    }
                    // Damaged bytes look like a broken archive: only the digest, at the end, says which it is.
                    unpacked => content.finish().and_then(|digest| {
                        if let Some(promised) = self.digest.as_ref().filter(|digest| !apart(digest)) {
                            promised.verify(&digest, "its blob")?;
                        }
                        self.diff_id.verify(&digest, "its content")?;
                        unpacked
                    }),
                };
                // The first in the row is the reason of what comes after.
                let (read, inflated) = (join(reading), inflating.map_or(Ok(()), join));
                read.and(inflated).and(unpacked)
            }),
            Err(error) => Err(unreadable(&error)),
        };
        unpacked.map_err(|error| error.context(format!("the layer {} cannot be unpacked", self.diff_id)))
    }
}

/// Passes a blob on, and checks it, but where its content is the blob.
fn read(mut blob: impl Read, promised: Option<&Digest>, sink: &Sink) -> Result<()> {
    let mut hasher = promised.map_or_else(Hasher::new, Digest::hasher);
    loop {
        let chunk = sink.fill(&mut blob).map_err(|error| unreadable(&error))?;
        if chunk.length == 0 {
            break;
        }
        if promised.is_some() {
            hasher.update(chunk.content());
        }
        if !sink.send(chunk) {
            return Ok(());
        }
    }
    promised.map_or(Ok(()), |promised| promised.verify(&hasher.finish(), "its blob"))
}

fn inflate(mut source: Source, sink: &Sink) -> Result<()> {
    let inflated = {
        let mut stream = compression::decompressor(&mut source)?;
        loop {
            match sink.fill(&mut stream) {
                Err(error) => break Err(error),
                Ok(chunk) if chunk.length == 0 => break Ok(()),
                Ok(chunk) => {
                    if !sink.send(chunk) {
                        return Ok(());
                    }
                }
            }
        }
    };
    // What follows the stream has a part in the blob's digest; and damaged bytes are told by that.
    source.drain();
    inflated.map_err(|error| {
        Error::new(Code::ImageBroken, "its blob cannot be decompressed").cause(error).fix(
            "copy the image again (`skopeo copy`), or rebuild it: the blob was damaged, or is not what its first bytes say",
        )
    })
}

/// The error for a blob that cannot be read.
pub fn unreadable(error: &io::Error) -> Error {
    Error::new(Code::ImageBroken, "its blob cannot be read")
        .cause(error)
        .fix("check the disk or the network that it comes from (`dmesg`), and copy the image again")
}

fn start<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    work: impl FnOnce() -> Result<()> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, Result<()>>> {
    let started = thread::Builder::new().spawn_scoped(scope, work);
    started
        .or_fail(Code::Internal, || "a thread cannot be started")
        .map_err(|error| error.fix("raise the number of processes that you may have (ulimit -u)"))
}

fn join(thread: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| {
        Err(Error::new(Code::Internal, "a thread panicked")
            .fix("report it with the image's name and the output of `GPURUN_LOG=debug gpurun pull NAME`"))
    })
}

/// Bytes on their way from one thread to another.
struct Chunk {
    /// [`CHUNK`] long.
    bytes: Vec<u8>,
    /// So many of them are meant.
    length: usize,
}

impl Chunk {
    fn content(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Between two threads: chunks go one way, and back when they were read, so that none is made twice.
fn pipe() -> (Sink, Source) {
    let (full, filled) = sync_channel(CHUNKS);
    let (back, empty) = channel();
    let current = Chunk { bytes: Vec::new(), length: 0 };
    (Sink { full, empty }, Source { full: filled, empty: back, current, read: 0 })
}

struct Sink {
    full: SyncSender<Chunk>,
    empty: Receiver<Chunk>,
}

impl Sink {
    /// The next bytes of a stream; none at its end.
    fn fill(&self, stream: &mut impl Read) -> io::Result<Chunk> {
        let empty = self.empty.try_recv();
        let mut chunk = empty.unwrap_or_else(|_| Chunk { bytes: vec![0; CHUNK], length: 0 });
        chunk.length = 0;
        while chunk.length < CHUNK {
            match stream.read(&mut chunk.bytes[chunk.length..]) {
                Ok(0) => break,
                Ok(count) => chunk.length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(chunk)
    }

    /// `false` if the receiver has ended; the receiver reports the reason.
    fn send(&self, chunk: Chunk) -> bool {
        self.full.send(chunk).is_ok()
    }
}

/// Where the thread before stopped early this just ends, and that thread says why.
struct Source {
    full: Receiver<Chunk>,
    empty: Sender<Chunk>,
    current: Chunk,
    read: usize,
}

impl Source {
    fn give_back(&self, chunk: Chunk) {
        // Who fills them may have finished.
        let _ = self.empty.send(chunk);
    }

    fn ready(&self) -> &[u8] {
        &self.current.content()[self.read..]
    }

    /// Takes all that comes.
    fn drain(&self) {
        self.full.iter().for_each(|chunk| self.give_back(chunk));
    }
}

/// What a layer holds, hashed as it is read.
struct Content {
    source: Source,
    hasher: Hasher,
    total: u64,
}

impl Content {
    /// The digest, of what nobody read as well: past the archive's end there may be padding.
    fn finish(mut self) -> Result<Digest> {
        let end = self.total;
        while self.total <= MAX_LAYER && self.total - end <= MAX_AFTER {
            let Ok(ready @ 1..) = self.fill_buf().map(<[u8]>::len) else { return Ok(self.hasher.finish()) };
            self.consume(ready);
        }
        let what = if self.total > MAX_LAYER {
            format!("it inflates to more than {MAX_LAYER} bytes")
        } else {
            format!("more than {MAX_AFTER} bytes follow the end of its archive")
        };
        Err(Error::new(Code::LayerRefused, what)
            .fix("rebuild the image (`docker build --no-cache .`); no known builder writes such a layer"))
    }
}

impl BufRead for Content {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.total > MAX_LAYER { Ok(&[]) } else { self.source.fill_buf() }
    }

    fn consume(&mut self, count: usize) {
        self.hasher.update(&self.source.ready()[..count]);
        self.total += count as u64;
        self.source.consume(count);
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        copy_ready(self, buffer)
    }
}

/// What [`Read`] is to something that has its bytes ready.
fn copy_ready(from: &mut impl BufRead, buffer: &mut [u8]) -> io::Result<usize> {
    let ready = from.fill_buf()?;
    let count = ready.len().min(buffer.len());
    buffer[..count].copy_from_slice(&ready[..count]);
    from.consume(count);
    Ok(count)
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.read == self.current.length {
            let next = self.full.recv().unwrap_or(Chunk { bytes: Vec::new(), length: 0 });
            let used = mem::replace(&mut self.current, next);
            self.read = 0;
            if !used.bytes.is_empty() {
                self.give_back(used);
            }
        }
        Ok(self.ready())
    }

    fn consume(&mut self, count: usize) {
        self.read += count;
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        copy_ready(self, buffer)
    }
}
