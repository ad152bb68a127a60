//! Accepts clients with a path as HTTP/2 `:authority`. gRPC sends the address that it dialled: gRPC-Go until Kubernetes 1.26
//! `/var/lib/kubelet/device-plugins/nvidia-gpu.sock`, later gRPC-Go and C-core (Python, C++) `var%2Flib…`. Neither is a valid
//! authority (RFC 9113, 8.3.1; RFC 3986, 3.2), so the h2 library resets the stream with PROTOCOL_ERROR. On a Unix socket the
//! authority has no use. Each literal value of `:authority` is therefore overwritten by an authority of the same length
//! before h2 reads it.
//!
//! HPACK (RFC 7541) has three ways to name `:authority` before a literal value: by the static table (Go), as a literal name
//! in plain letters or in Huffman code (C-core), and by the dynamic table. For the dynamic table, the names that the client
//! adds are tracked. Values need no tracking, because an entry already has the overwritten value.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Length of the client's preface (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// Length, type, flags and stream of a frame (RFC 9113, 4.1).
const FRAME_HEADER: usize = 9;
/// HEADERS (RFC 9113, 6.2) and its flags.
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// CONTINUATION (RFC 9113, 6.10)
const CONTINUATION: u8 = 9;
/// A longer header block is passed on unchanged; h2 refuses it.
const MOST_HELD: usize = 1 << 20;
/// Entries of the static table (RFC 7541, appendix A), of which `:authority` is the first.
const STATIC_ENTRIES: usize = 61;
const AUTHORITY: usize = 1;
/// The name as a literal, in plain letters and in Huffman code.
const NAME: &[u8] = b":authority";
const NAME_IN_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// A dynamic table of 4096 bytes, HTTP/2's default and h2's, has no more entries (RFC 7541, 4.1).
const DYNAMIC_ENTRIES: usize = 4096 / 32;
/// Stands for a whole authority.
const HARMLESS: u8 = b'k';

/// A client's connection.
#[derive(Debug)]
pub struct Lenient<T> {
    inner: T,
    frames: Frames,
}

#[derive(Debug)]
struct Frames {
    /// How many bytes pass unchanged.
    through: usize,
    /// The beginning of a frame's header, or the frames of a header block.
    held: Vec<u8>,
    /// Where the newest frame begins in `held`.
    frame: usize,
    /// The fragments of the header block in `held`.
    fragments: Vec<std::ops::Range<usize>>,
    names: Names,
    /// Bytes for the reader, and how many of them it has.
    ready: Vec<u8>,
    read: usize,
}

impl<T> Lenient<T> {
    /// Reads a connection from its first byte.
    pub fn new(inner: T) -> Self {
        let frames = Frames {
            through: PREFACE,
            held: Vec::new(),
            frame: 0,
            fragments: Vec::new(),
            names: Names::default(),
            ready: Vec::new(),
            read: 0,
        };
        Self { inner, frames }
    }
}

impl Frames {
    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.through > 0 {
                let (now, rest) = bytes.split_at(self.through.min(bytes.len()));
                self.ready.extend_from_slice(now);
                self.through -= now.len();
                bytes = rest;
                continue;
            }
            let wanted = self.frame + self.wanted() - self.held.len();
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = rest;
            if self.held.len() - self.frame < FRAME_HEADER {
                continue;
            }
            if !self.is_of_block() || self.held.len() > MOST_HELD {
                self.through = self.frame + FRAME_HEADER + self.length() - self.held.len();
                self.release();
            } else if self.held.len() == self.frame + self.wanted() {
                self.end_frame();
            }
        }
    }

    /// Bytes of the newest frame that are held before anything is decided.
    fn wanted(&self) -> usize {
        if self.held.len() - self.frame < FRAME_HEADER || !self.is_of_block() {
            return FRAME_HEADER;
        }
        FRAME_HEADER + self.length()
    }

    /// Whether the newest frame begins or continues a header block.
    fn is_of_block(&self) -> bool {
        let kind = self.held[self.frame + 3];
        kind == HEADERS && self.frame == 0 || kind == CONTINUATION && self.frame > 0
    }

    fn length(&self) -> usize {
        self.held[self.frame..].iter().take(3).fold(0, |length, byte| length << 8 | usize::from(*byte))
    }

    fn end_frame(&mut self) {
        let (kind, flags) = (self.held[self.frame + 3], self.held[self.frame + 4]);
        let start = self.frame + FRAME_HEADER;
        let flags_of_headers = if kind == HEADERS { flags } else { 0 };
        self.fragments.push(fragment(&self.held[start..], flags_of_headers, start));
        if flags & END_HEADERS == 0 {
            self.frame = self.held.len();
            return;
        }
        // Fields may be cut anywhere.
        let mut block: Vec<u8> =
            self.fragments.iter().flat_map(|range| &self.held[range.clone()]).copied().collect();
        self.names.overwrite_authority(&mut block);
        let mut written = block.as_slice();
        for range in &self.fragments {
            let (now, rest) = written.split_at(range.len());
            self.held[range.clone()].copy_from_slice(now);
            written = rest;
        }
        self.release();
    }

    fn release(&mut self) {
        self.ready.append(&mut self.held);
        self.fragments.clear();
        self.frame = 0;
    }
}

/// The header block fragment of the frame with its payload at `start`.
fn fragment(payload: &[u8], flags: u8, start: usize) -> std::ops::Range<usize> {
    let (mut from, mut to) = (0, payload.len());
    if flags & PADDED != 0 {
        from += 1;
        to = to.saturating_sub(payload.first().copied().unwrap_or(0).into());
    }
    if flags & PRIORITY != 0 {
        from += 5;
    }
    let from = from.min(payload.len());
    start + from..start + to.max(from)
}

/// Whether each entry of the client's dynamic table is named `:authority`, newest first. Evicted entries are the oldest ones
/// and are no longer referenced, so they need no tracking.
#[derive(Debug, Default)]
struct Names(VecDeque<bool>);

impl Names {
    /// Walks the complete fields of a header block (RFC 7541, 6).
    fn overwrite_authority(&mut self, block: &mut [u8]) -> Option<()> {
        let mut at = 0;
        while at < block.len() {
            let (prefix, is_literal, is_added) = match block[at] {
                0x80.. => (7, false, false),
                0x40..0x80 => (6, true, true),
                0x20..0x40 => (5, false, false),
                0..0x20 => (4, true, false),
            };
            let index = integer(block, &mut at, prefix)?;
            if !is_literal {
                continue;
            }
            let is_authority = match index {
                0 => {
                    let is_huffman = block.get(at)? & 0x80 != 0;
                    let length = integer(block, &mut at, 7)?;
                    let name = block.get(at..at.checked_add(length)?)?;
                    at += length;
                    name == if is_huffman { NAME_IN_HUFFMAN } else { NAME }
                }
                1..=STATIC_ENTRIES => index == AUTHORITY,
                _ => self.0.get(index - STATIC_ENTRIES - 1).copied().unwrap_or(false),
            };
            let value = at;
            let length = integer(block, &mut at, 7)?;
            let end = at.checked_add(length)?;
            if is_authority {
                // Plain letters from now on.
                *block.get_mut(value)? &= 0x7f;
                block.get_mut(at..end)?.fill(HARMLESS);
            }
            if is_added {
                self.0.push_front(is_authority);
                self.0.truncate(DYNAMIC_ENTRIES);
            }
            at = end;
        }
        Some(())
    }
}

/// RFC 7541, 5.1
fn integer(block: &[u8], at: &mut usize, prefix: u32) -> Option<usize> {
    let mask = (1 << prefix) - 1;
    let mut value = usize::from(block.get(*at)? & mask);
    *at += 1;
    if value < usize::from(mask) {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = *block.get(*at)?;
        *at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

impl<T: AsyncRead + Unpin> AsyncRead for Lenient<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.frames.read == this.frames.ready.len() {
            this.frames.ready.clear();
            this.frames.read = 0;
            let mut bytes = [0; 4096];
            let mut buffer = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.frames.feed(buffer.filled());
        }
        let waiting = &this.frames.ready[this.frames.read..];
        let now = waiting.len().min(to.remaining());
        to.put_slice(&waiting[..now]);
        this.frames.read += now;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Lenient<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Reads the frames of a client at once and byte by byte; both must give the same result.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut whole = Lenient::new(()).frames;
    whole.feed(bytes);
    let mut single = Lenient::new(()).frames;
    bytes.chunks(1).for_each(|byte| single.feed(byte));
    assert_eq!((&whole.ready, &whole.held), (&single.ready, &single.held));
    assert_eq!(whole.ready.len() + whole.held.len(), bytes.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// POST, http, a path, and an authority in plain letters, as Go writes them; then an indexed field.
    fn fields(authority: &[u8]) -> Vec<u8> {
        let length = u8::try_from(authority.len()).unwrap();
        [&[0x83, 0x86, 0x45, 2, b'/', b'x', 0x41, length], authority, &[0xbf]].concat()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn through(pieces: &[&[u8]]) -> Vec<u8> {
        let mut frames = Lenient::new(()).frames;
        for piece in pieces {
            frames.feed(piece);
        }
        frames.ready
    }

    #[test]
    fn a_path_becomes_an_authority_of_its_length_however_it_comes() {
        let sent = [
            vec![b'P'; PREFACE],
            frame(4, 0, &[9; 6]),
            frame(HEADERS, 4, &fields(b"/run/x.sock")),
            frame(0, 0, b"A/"),
        ];
        let wanted = [
            vec![b'P'; PREFACE],
            frame(4, 0, &[9; 6]),
            frame(HEADERS, 4, &fields(b"kkkkkkkkkkk")),
            frame(0, 0, b"A/"),
        ];
        let (sent, wanted) = (sent.concat(), wanted.concat());
        assert_eq!(through(&[&sent]), wanted);
        let bytes: Vec<&[u8]> = sent.chunks(1).collect();
        assert_eq!(through(&bytes), wanted);
    }

    /// A header block as h2 receives it.
    fn overwritten(blocks: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut names = Names::default();
        let overwrite = |block: &Vec<u8>| {
            let mut block = block.clone();
            names.overwrite_authority(&mut block).expect("it is whole");
            block
        };
        blocks.iter().map(overwrite).collect()
    }

    /// The first block of grpcio 1.85 on a Unix socket: every name except `:scheme` and `:method` is a literal.
    #[test]
    fn c_cores_literal_names_are_recognised() {
        let block = |authority: &[u8]| {
            let fields: [&[u8]; 6] = [
                b"\x40\x05:path\x2c/v1beta1.DevicePlugin/GetDevicePluginOptions",
                b"\x40\x0a:authority\x19",
                authority,
                b"\x83\x86\x40\x0ccontent-type\x10application/grpc\x40\x02te\x08trailers",
                b"\x40\x14grpc-accept-encoding\x17identity, deflate, gzip\x40\x0cgrpc-timeout\x04400m",
                b"\x40\x0auser-agent\x30grpc-python/1.85.3 grpc-c/58.0.0 (linux; chttp2)",
            ];
            fields.concat()
        };
        let [read] = <[_; 1]>::try_from(overwritten(&[block(b"tmp%2Fplugin-cap%2Fx.sock")])).unwrap();
        assert_eq!(read, block(&[HARMLESS; 25]));
    }

    #[test]
    fn every_way_to_name_the_authority_is_recognised() {
        let huffman = [&[0x40, 0x88][..], NAME_IN_HUFFMAN].concat();
        let plain = [&[0x40, 10][..], NAME].concat();
        for (name, kind) in [(&[0x41][..], "indexed"), (&plain, "literal"), (&huffman, "Huffman")] {
            let first = |value: &[u8]| [&[0x83], name, &[4], value, &[0x40, 1, b'x', 1, b'y']].concat();
            // The table has x (62) and the authority (63), and then the authority's new value before them.
            let second = |value: &[u8]| [&[0x7f, 0, 4], value, &[0xbe, 0x0f, 47, 4], value].concat();
            let sent = [first(b"/a/b"), second(b"/c/d")];
            assert_eq!(overwritten(&sent), [first(b"kkkk"), second(b"kkkk")], "{kind}");
        }
        for first in [0x01, 0x11, 0x41] {
            let block = |value: &[u8]| [&[first, 4], value].concat();
            assert_eq!(overwritten(&[block(b"/a/b")]), [block(b"kkkk")]);
        }
        for first in [0x00, 0x10, 0x40] {
            let block = |value: &[u8]| [&[first, 10], NAME, &[4], value].concat();
            assert_eq!(overwritten(&[block(b"/a/b")]), [block(b"kkkk")]);
            let other = [&[first, 10], &b":authoritz"[..], &[4], b"/a/b"].concat();
            assert_eq!(overwritten(std::slice::from_ref(&other)), [other]);
        }
    }

    #[test]
    fn a_block_in_several_frames_is_one_block() {
        let block = |value: &[u8]| [&[0x83, 0x40, 10][..], NAME, &[4], value, &[0x82]].concat();
        let frames = |block: &[u8]| {
            let (first, rest) = block.split_at(7);
            let (second, third) = rest.split_at(8);
            let padded = [&[2], first, &[0; 2]].concat();
            [
                vec![b'P'; PREFACE],
                frame(HEADERS, PADDED, &padded),
                frame(CONTINUATION, 0, second),
                frame(CONTINUATION, END_HEADERS, third),
                frame(0, 1, b"data"),
            ]
            .concat()
        };
        let (sent, wanted) = (frames(&block(b"/a/b")), frames(&block(b"kkkk")));
        assert_eq!(through(&[&sent]), wanted);
        assert_eq!(through(&sent.chunks(1).collect::<Vec<_>>()), wanted);
    }

    #[test]
    fn padding_priority_and_huffmans_code_do_not_hide_it() {
        let plain = fields(b"/a/b");
        let mut huffman = plain.clone();
        huffman[7] |= 0x80;
        let padded = [&[3][..], &[0; 5], &huffman, &[0; 3]].concat();
        let wanted = [&[3][..], &[0; 5], &fields(b"kkkk"), &[0; 3]].concat();
        let sent = [vec![b'P'; PREFACE], frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &padded)].concat();
        assert_eq!(through(&[&sent])[PREFACE..], frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &wanted));
    }

    #[test]
    fn a_long_authority_has_a_long_length() {
        let mut block = [&[0x41, 0x7f | 0x80, 73][..], &[b'%'; 200], &[0x82]].concat();
        Names::default().overwrite_authority(&mut block).unwrap();
        assert_eq!(block, [&[0x41, 0x7f, 73][..], &[HARMLESS; 200], &[0x82]].concat());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_added(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = Lenient::new(()).frames;
            frames.feed(&bytes);
            prop_assert_eq!(frames.ready.len() + frames.held.len(), bytes.len());
        }
    }
}
