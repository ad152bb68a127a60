//! From a layer's blob to its directory: inflate, check, unpack.

use super::{
    digest::{Digest, Hasher, HashingReader},
    unpack::{Ownership, unpack},
};
use crate::error::{Code, Error, OrFail, Result};
use rustix::fd::BorrowedFd;
use serde::{Deserialize, Serialize};
use std::{
    io::{self, BufReader, Read},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

/// How much a layer may inflate to, in bytes: far beyond any real one, and an end to one that inflates for ever.
const MAX_LAYER: u64 = 1 << 40;
/// Inflated bytes travel to the writer in pieces of this size …
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
}

impl Layer {
    /// Unpacks the blob into an empty directory; success means that every byte was what the digests promise.
    ///
    /// One thread reads, inflates and hashes while the caller's writes files: either takes about as long.
    pub fn unpack(&self, blob: impl Read + Send, root: BorrowedFd<'_>, ownership: Ownership) -> Result<()> {
        thread::scope(|scope| {
            let (sender, receiver) = sync_channel(CHUNKS);
            let inflating = thread::Builder::new()
                .spawn_scoped(scope, move || self.inflate(blob, &sender))
                .or_fail(Code::Internal, || "a thread cannot be started")?;
            let mut chunks = Chunks { receiver, current: Vec::new(), read: 0 };
            let unpacked = unpack(&mut chunks, root, ownership);
            if !unpacked.as_ref().is_err_and(|error| error.code() != Code::ImageBroken) {
                // Past the archive's end there may be padding, which the digest covers. And damaged bytes look like a
                // broken archive: only the digest, at the end, says which it is.
                while chunks.receiver.recv().is_ok() {}
            }
            drop(chunks);
            let inflated =
                inflating.join().map_err(|_| Error::new(Code::Internal, "the inflating thread panicked"))?;
            match (inflated, unpacked) {
                // The writer gave up, and the other thread only because of it.
                (Ok(()), unpacked) => unpacked,
                (Err(inflated), _) => Err(inflated),
            }
        })
        .map_err(|error| error.context(format!("the layer {} cannot be unpacked", self.diff_id)))
    }

    fn inflate(&self, blob: impl Read, sender: &SyncSender<Vec<u8>>) -> Result<()> {
        let mut blob = BufReader::with_capacity(CHUNK, HashingReader::new(blob));
        let mut hasher = Hasher::new();
        let mut total = 0_u64;
        let inflated = {
            let mut stream = decompressor(&mut blob)?;
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                match (&mut stream).take(CHUNK as u64).read_to_end(&mut chunk) {
                    Ok(0) => break Ok(()),
                    Ok(count) => total += count as u64,
                    Err(error) => break Err(error),
                }
                if total > MAX_LAYER {
                    return Err(Error::new(
                        Code::LayerRefused,
                        format!("it inflates to more than {MAX_LAYER} bytes"),
                    ));
                }
                hasher.update(&chunk);
                if sender.send(chunk).is_err() {
                    return Ok(());
                }
            }
        };
        let digest = blob.into_inner().finish().or_fail(Code::ImageBroken, || "its blob cannot be read")?;
        if let Some(promised) = &self.digest {
            promised.verify(&digest, "its blob")?;
        }
        inflated.or_fail(Code::ImageBroken, || "its blob cannot be decompressed")?;
        self.diff_id.verify(&hasher.finish(), "its content")
    }
}

/// The stream within: what the first bytes say counts, because media types in the wild are wrong now and then
/// (an uncompressed layer that is called `tar.gzip`); containerd does the same.
pub fn decompressor<'a, R: io::BufRead + 'a>(mut blob: R) -> Result<Box<dyn Read + 'a>> {
    let head = blob.fill_buf().or_fail(Code::ImageBroken, || "its blob cannot be read")?;
    Ok(match head {
        // Several members one after the other are one stream: eStargz and pigz write them.
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        // The second is a skippable frame, with which zstd:chunked may begin.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            Box::new(zstd::Decoder::with_buffer(blob).or_fail(Code::Internal, || "zstd cannot be set up")?)
        }
        _ => Box::new(blob),
    })
}

/// The writer's end of the pipe. Where the other thread stopped early this just ends, and that thread says why.
struct Chunks {
    receiver: Receiver<Vec<u8>>,
    current: Vec<u8>,
    read: usize,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.current.len() {
            self.current = self.receiver.recv().unwrap_or_default();
            self.read = 0;
        }
        let rest = &self.current[self.read..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.read += count;
        Ok(count)
    }
}
