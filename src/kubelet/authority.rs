//! Lets kubelets in that name a path as their HTTP/2 authority. Go's gRPC names what it dialled, and until Kubernetes 1.26 the kubelet
//! dialled `/var/lib/kubelet/device-plugins/nvidia-gpu.sock`, later `%2Fvar%2Flib…`. Neither is an authority (RFC 9113, 8.3.1;
//! RFC 3986, 3.2), so the h2 library ends such a stream; and nobody reads it on a Unix socket. In each header block its literal
//! is therefore overwritten by one of the same length that is an authority.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a client sends first (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// Length, type, flags and stream of a frame (RFC 9113, 4.1).
const FRAME_HEADER: usize = 9;
/// HEADERS (RFC 9113, 6.2) and its flags.
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;
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
    /// Bytes that go through as they are.
    through: usize,
    /// The beginning of a header, or of a frame that is to be changed.
    held: Vec<u8>,
    /// What is to be read, and how far it was.
    ready: Vec<u8>,
    read: usize,
}

impl<T> Lenient<T> {
    /// Reads from the client's very first byte.
    pub fn new(inner: T) -> Self {
        Self { inner, frames: Frames { through: PREFACE, held: Vec::new(), ready: Vec::new(), read: 0 } }
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
            let wanted = self.wanted() - self.held.len();
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = rest;
            if self.held.len() < FRAME_HEADER {
                continue;
            }
            if self.held[3] != HEADERS {
                self.through = self.length();
            } else if self.held.len() == self.wanted() {
                let flags = self.held[4];
                overwrite_authority(block(&mut self.held[FRAME_HEADER..], flags));
            } else {
                continue;
            }
            self.ready.append(&mut self.held);
        }
    }

    /// How much must be held before it is known what to do.
    fn wanted(&self) -> usize {
        match self.held.get(3) {
            Some(&HEADERS) if self.held.len() >= FRAME_HEADER => FRAME_HEADER + self.length(),
            _ => FRAME_HEADER,
        }
    }

    fn length(&self) -> usize {
        self.held.iter().take(3).fold(0, |length, byte| length << 8 | usize::from(*byte))
    }
}

/// The header block of a HEADERS frame.
fn block(payload: &mut [u8], flags: u8) -> &mut [u8] {
    let (mut start, mut end) = (0, payload.len());
    if flags & PADDED != 0 {
        start += 1;
        end = end.saturating_sub(payload.first().copied().unwrap_or(0).into());
    }
    if flags & PRIORITY != 0 {
        start += 5;
    }
    payload.get_mut(start..end).unwrap_or_default()
}

/// Walks the fields of a header block (RFC 7541, 6) as far as they are whole.
fn overwrite_authority(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while at < block.len() {
        let (prefix, is_literal) = match block[at] {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            0..0x20 => (4, true),
        };
        let name = integer(block, &mut at, prefix)?;
        if !is_literal {
            continue;
        }
        if name == 0 {
            let length = integer(block, &mut at, 7)?;
            at = at.checked_add(length)?;
        }
        let value = at;
        let length = integer(block, &mut at, 7)?;
        let end = at.checked_add(length)?;
        if name == AUTHORITY {
            // No longer Huffman's code.
            *block.get_mut(value)? &= 0x7f;
            block.get_mut(at..end)?.fill(HARMLESS);
        }
        at = end;
    }
    Some(())
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

    #[test]
    fn padding_priority_and_huffmans_code_do_not_hide_it() {
        let plain = fields(b"/a/b");
        let mut huffman = plain.clone();
        huffman[7] |= 0x80;
        let padded = [&[3][..], &[0; 5], &huffman, &[0; 3]].concat();
        let wanted = [&[3][..], &[0; 5], &fields(b"kkkk"), &[0; 3]].concat();
        let sent = [vec![b'P'; PREFACE], frame(HEADERS, PADDED | PRIORITY, &padded)].concat();
        assert_eq!(through(&[&sent])[PREFACE..], frame(HEADERS, PADDED | PRIORITY, &wanted));
    }

    #[test]
    fn a_long_authority_has_a_long_length() {
        let mut block = [&[0x41, 0x7f | 0x80, 73][..], &[b'%'; 200], &[0x82]].concat();
        overwrite_authority(&mut block).unwrap();
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
