//! Decompresses streams within a bound on memory. The first bytes of a stream tell its format.
//!
//! The first bytes decide, as in containerd, because media types are sometimes wrong (an uncompressed layer with type
//! `tar.gzip`). gzip and zstd are supported. Other formats are named in the error: Docker and Podman do not write them.
//!
//! A zstd frame declares the memory for its window, and a blob of a few bytes can ask for 128 MiB. [`MAX_WINDOWS`] bounds all
//! windows of this process: a frame waits until its window fits, and holds no other window while it waits.

use super::layer::unreadable;
use crate::error::{Code, Error, Result};
use std::{
    io::{self, BufRead, Read},
    sync::{Condvar, Mutex, PoisonError},
};
use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer};

/// The number of bytes that tell the format of a stream.
pub const HEAD: usize = 6;
/// The largest window of a zstd frame, log2 of bytes: the limit of the zstd program without `--long`, and the window of its
/// highest level.
const MAX_WINDOW_LOG: u32 = 27;
/// The bound on all windows in bytes: the largest one and several common ones of 2 to 8 MiB.
const MAX_WINDOWS: u64 = (1 << MAX_WINDOW_LOG) + (32 << 20);
/// The longest header of a zstd frame (RFC 8878, 3.1.1.1), with its magic number.
const MAX_FRAME_HEADER: usize = 18;

/// Compression format of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Uncompressed.
    None,
    Gzip,
    Zstd,
    /// An unsupported format, by the name of its program.
    Other(&'static str),
}

impl Compression {
    /// Detects the format from the first [`HEAD`] bytes.
    pub fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // The last is a skippable frame, with which zstd:chunked may begin.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Other("xz"),
            [b'B', b'Z', b'h', b'1'..=b'9', b'1', b'A', ..]
            | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, ..] => Self::Other("bzip2"),
            [b'L', b'Z', b'I', b'P', 1, ..] => Self::Other("lzip"),
            [0x04, 0x22, 0x4d, 0x18, ..] => Self::Other("lz4"),
            [0x1f, 0x9d, ..] => Self::Other("compress"),
            [0x5d, 0, 0, ..] => Self::Other("lzma"),
            _ => Self::None,
        }
    }
}

/// Returns the decompressed stream.
///
/// # Errors
/// [`Code::ImageBroken`] for an unsupported format.
pub fn decompressor<'a, R: BufRead + 'a>(mut blob: R) -> Result<Box<dyn Read + 'a>> {
    let head = blob.fill_buf().map_err(|error| unreadable(&error))?;
    Ok(match Compression::of(head) {
        Compression::None => Box::new(blob),
        // Consecutive members form one stream: eStargz and pigz write them.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        Compression::Zstd => {
            Box::new(ZstdFrames { source: blob, head: Vec::new(), at: 0, state: State::Between })
        }
        Compression::Other(name) => return Err(not_read(name)),
    })
}

fn not_read(name: &str) -> Error {
    Error::new(Code::ImageBroken, format!("it is compressed with {name}, which gpurun does not read"))
        .cause("gzip, zstd and uncompressed archives and layers are read")
        .fix(format!(
            "decompress an archive first ({name} -d FILE); an image with such layers: \
             skopeo copy --dest-compress-format gzip SOURCE oci-archive:FILE"
        ))
}

/// Free memory for windows.
static FREE: Mutex<u64> = Mutex::new(MAX_WINDOWS);
static FREED: Condvar = Condvar::new();

/// A reservation of memory in bytes, released on drop.
struct Window(u64);

impl Window {
    /// Waits until the memory is free. The caller must hold no other window.
    fn acquire(size: u64) -> Self {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = FREED.wait_while(free, |free| *free < size).unwrap_or_else(PoisonError::into_inner);
        *free -= size;
        Self(size)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}

/// Consecutive zstd frames, including skippable ones.
struct ZstdFrames<R> {
    source: R,
    /// Bytes of a frame's header that were read ahead.
    head: Vec<u8>,
    /// How many bytes of `head` were consumed.
    at: usize,
    state: State,
}

enum State {
    /// At the start of a frame, or at the end.
    Between,
    /// In a frame. The context is reused for the frames that follow, as long as its window is large enough: zstd:chunked has
    /// thousands of them.
    Frame { context: DCtx<'static>, window: Window, ended: bool },
    /// In a skippable frame, with the number of bytes left.
    Skipped(u64),
}

impl<R: BufRead> ZstdFrames<R> {
    /// Bytes available without reading ahead.
    fn ready(&mut self) -> io::Result<&[u8]> {
        if self.at < self.head.len() { Ok(&self.head[self.at..]) } else { self.source.fill_buf() }
    }

    fn consume(&mut self, count: usize) {
        if self.at < self.head.len() {
            self.at += count;
        } else {
            self.source.consume(count);
        }
    }

    /// Reads ahead as many bytes as a frame header can have; fewer at the end.
    fn look(&mut self) -> io::Result<()> {
        self.head.drain(..self.at);
        self.at = 0;
        while self.head.len() < MAX_FRAME_HEADER {
            let ready = self.source.fill_buf()?;
            let count = ready.len().min(MAX_FRAME_HEADER - self.head.len());
            if count == 0 {
                break;
            }
            self.head.extend_from_slice(&ready[..count]);
            self.source.consume(count);
        }
        Ok(())
    }

    /// Goes to the next frame; `false` at the end.
    fn next_frame(&mut self) -> io::Result<bool> {
        self.look()?;
        if self.head.is_empty() {
            self.state = State::Between;
            return Ok(false);
        }
        if let [0x50..=0x5f, 0x2a, 0x4d, 0x18, length @ ..] = self.head.as_slice()
            && let Some(length) = length.first_chunk::<4>()
        {
            self.state = State::Skipped(8 + u64::from(u32::from_le_bytes(*length)));
            return Ok(true);
        }
        let size = window_size(&self.head)?;
        if let State::Frame { window, ended, .. } = &mut self.state
            && window.0 >= size
        {
            *ended = false;
            return Ok(true);
        }
        // The old window is released first, or two blobs could deadlock waiting for each other's window.
        self.state = State::Between;
        let window = Window::acquire(size);
        let mut context = DCtx::try_create().ok_or_else(|| io::Error::other("zstd cannot be set up"))?;
        context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(zstd_error)?;
        self.state = State::Frame { context, window, ended: false };
        Ok(true)
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let (head, at) = (&self.head, self.at);
            match &mut self.state {
                State::Between | State::Skipped(0) | State::Frame { ended: true, .. } => {
                    if !self.next_frame()? {
                        return Ok(0);
                    }
                }
                State::Skipped(left) => {
                    let left = *left;
                    let count = self.ready()?.len() as u64;
                    if count == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let count = count.min(left);
                    self.consume(usize::try_from(count).unwrap_or(usize::MAX));
                    self.state = State::Skipped(left - count);
                }
                State::Frame { context, ended, .. } => {
                    let ready = if at < head.len() { &head[at..] } else { self.source.fill_buf()? };
                    let at_end = ready.is_empty();
                    let mut input = InBuffer::around(ready);
                    let mut output = OutBuffer::around(buffer);
                    let hint = context.decompress_stream(&mut output, &mut input).map_err(zstd_error)?;
                    let (taken, made) = (input.pos(), output.pos());
                    *ended = hint == 0;
                    self.consume(taken);
                    if made > 0 {
                        return Ok(made);
                    }
                    if at_end && taken == 0 && hint != 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
    }
}

/// The memory of a frame's window in bytes (RFC 8878, 3.1.1.1.2); at least that of a frame without one.
fn window_size(head: &[u8]) -> io::Result<u64> {
    let damaged = || io::Error::other("it is not a zstd frame");
    let [0x28, 0xb5, 0x2f, 0xfd, descriptor, rest @ ..] = head else { return Err(damaged()) };
    let single_segment = descriptor & 0x20 != 0;
    let size = if single_segment {
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let (length, base) = [(1, 0), (2, 256), (4, 0), (8, 0)][usize::from(descriptor >> 6)];
        let field = rest.get(dictionary..dictionary + length).ok_or_else(damaged)?;
        let content = field.iter().rev().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
        content.saturating_add(base)
    } else {
        let window = *rest.first().ok_or_else(damaged)?;
        let base = 1_u64 << (10 + (window >> 3));
        base + base / 8 * u64::from(window & 7)
    };
    if size > 1 << MAX_WINDOW_LOG {
        return Err(io::Error::other(format!(
            "a zstd frame wants a window of {size} bytes, and at most {} are given to it (zstd --long={MAX_WINDOW_LOG})",
            1_u64 << MAX_WINDOW_LOG
        )));
    }
    // The decoder's buffers beside the window: two blocks of 128 KiB.
    Ok(size + (256 << 10))
}

fn zstd_error(code: zstd_safe::ErrorCode) -> io::Error {
    io::Error::other(zstd_safe::get_error_name(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::OrFail;
    use proptest::prelude::*;
    use std::{io::Write, thread};

    fn packed(data: &[u8], window_log: u32) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn unpacked(bytes: &[u8], chunk: usize) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        decompressor(io::BufReader::with_capacity(chunk, bytes))?
            .read_to_end(&mut out)
            .or_fail(Code::ImageBroken, || "")?;
        Ok(out)
    }

    #[test]
    fn frames_of_any_window_and_skippable_ones_are_one_stream() {
        let skippable = [&[0x51, 0x2a, 0x4d, 0x18, 5, 0, 0, 0][..], b"12345"].concat();
        let small = zstd::encode_all(&b"small"[..], 3).unwrap();
        let sevens = [7].repeat(300_000);
        let bytes = [
            skippable.clone(),
            small.clone(),
            packed(b"large", 27),
            skippable.clone(),
            packed(&sevens, 20),
            small,
            skippable,
        ]
        .concat();
        let expected = [&b"smalllarge"[..], &sevens, b"small"].concat();
        for chunk in [6, 19, 4096] {
            assert_eq!(unpacked(&bytes, chunk).unwrap(), expected, "{chunk}");
        }
        for cut in [12, bytes.len() - 20, bytes.len() - 2] {
            assert!(unpacked(&bytes[..cut], 100).is_err(), "{cut}");
        }
        // The zstd library also refuses a frame with a larger window.
        assert!(unpacked(&packed(b"x", 28), 100).unwrap_err().cause_line().contains("window"));
    }

    #[test]
    fn many_large_windows_at_once_wait_for_each_other() {
        let bytes = [packed(b"a", 20), packed(b"b", 27)].concat();
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| assert_eq!(unpacked(&bytes, 64).unwrap(), b"ab"));
            }
        });
        // Other tests of this process have windows as well.
        let wait = std::time::Duration::from_secs(60);
        let (free, _) =
            FREED.wait_timeout_while(FREE.lock().unwrap(), wait, |free| *free < MAX_WINDOWS).unwrap();
        assert_eq!(*free, MAX_WINDOWS);
    }

    #[test]
    fn what_is_not_read_is_named() {
        for (head, name) in [
            (&b"\xfd7zXZ\0\0\x04"[..], "xz"),
            (b"BZh91AY&SY", "bzip2"),
            (b"LZIP\x01", "lzip"),
            (b"\x04\x22\x4d\x18\x64", "lz4"),
            (b"\x1f\x9d\x90", "compress"),
        ] {
            let error = unpacked(head, 100).unwrap_err();
            assert!(error.what().contains(name) && error.fix_line().contains("-d FILE"), "{error}");
        }
        // A tar archive whose first name begins like one of them.
        for name in ["BZh91.txt", "LZIP/a", "usr/bin"] {
            assert_eq!(Compression::of(name.as_bytes()), Compression::None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn damaged_frames_end_in_an_error_or_in_bytes(at in 0_usize..60, byte in any::<u8>()) {
            let mut bytes = [packed(b"some text, some text, some text", 20), zstd::encode_all(&b"small"[..], 3).unwrap()].concat();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = unpacked(&bytes, 16);
        }
    }
}
