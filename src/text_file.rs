//! Text files that users, administrators and other programs wrote.
//!
//! Such a file may begin with a byte order mark, end its lines with CR LF, lack the last newline, hold bytes that are not UTF-8,
//! be a FIFO that nothing ever writes to, or be of any size. [`TextFile`] checks its kind before it is opened, bounds its
//! size, and hands out its lines with their numbers, so that an error can name the file and the line.
#![forbid(unsafe_code)]

use crate::regular_file;
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{CWD, FileType, Mode, OFlags},
};
use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// The byte order mark of UTF-8, with which some editors of Windows begin a file.
const BYTE_ORDER_MARK: &str = "\u{feff}";
/// `PIPEFS_MAGIC` of linux/magic.h: the file system of pipes that have no name.
const PIPEFS_MAGIC: u64 = 0x5049_5045;

/// The content of a text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFile {
    bytes: Vec<u8>,
    has_byte_order_mark: bool,
}

/// A line of a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// Line number, from 1.
    pub number: usize,
    /// Bytes of the line, without LF or CR LF.
    pub bytes: &'a [u8],
}

impl TextFile {
    /// Reads a file of at most `limit` bytes: a regular file, /dev/null, or a pipe without a name, which is what `<(command)`
    /// and /dev/stdin of a shell are.
    ///
    /// # Errors
    /// Errors of the system; or a sentence, if the file is of another kind (a FIFO, a terminal, a directory) or too large.
    pub fn read(path: &Path, limit: u64) -> io::Result<Self> {
        let found = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        check_kind(&found)?;
        Self::from_open(File::from(regular_file::reopen(&found, OFlags::RDONLY)?), limit)
    }

    /// Reads an open file of at most `limit` bytes.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub fn from_open(file: File, limit: u64) -> io::Result<Self> {
        let mut bytes = Vec::new();
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            let most = match limit {
                _ if limit > 0 && limit.is_multiple_of(1 << 20) => format!("{} MiB", limit >> 20),
                _ => format!("{limit} bytes"),
            };
            return Err(io::Error::other(format!("it is larger than {most}")));
        }
        Ok(Self::from(bytes))
    }

    /// The byte order mark with which the file begins, or nothing.
    pub fn byte_order_mark(&self) -> &'static str {
        if self.has_byte_order_mark { BYTE_ORDER_MARK } else { "" }
    }

    /// The bytes, without a byte order mark.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The lines. A newline at the end of the file does not start another line.
    pub fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        let text = self.bytes.strip_suffix(b"\n").unwrap_or(&self.bytes);
        let none = self.bytes.is_empty();
        text.split(|&byte| byte == b'\n')
            .enumerate()
            .filter(move |_| !none)
            .map(|(n, line)| Line { number: n + 1, bytes: line.strip_suffix(b"\r").unwrap_or(line) })
    }

    /// The whole text.
    ///
    /// # Errors
    /// A sentence that names the line where it is not UTF-8.
    pub fn text(&self) -> io::Result<&str> {
        if let Some(bad) = self.lines().find(|line| std::str::from_utf8(line.bytes).is_err()) {
            bad.text()?;
        }
        std::str::from_utf8(&self.bytes).map_err(io::Error::other)
    }
}

impl From<Vec<u8>> for TextFile {
    fn from(mut bytes: Vec<u8>) -> Self {
        let has_byte_order_mark = bytes.starts_with(BYTE_ORDER_MARK.as_bytes());
        if has_byte_order_mark {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        Self { bytes, has_byte_order_mark }
    }
}

impl<'a> Line<'a> {
    /// The line as text.
    ///
    /// # Errors
    /// A sentence that names the line where it is not UTF-8.
    pub fn text(&self) -> io::Result<&'a str> {
        std::str::from_utf8(self.bytes).map_err(|error| {
            let byte = self.bytes.get(error.valid_up_to()).copied().unwrap_or_default();
            let kind = match self.bytes {
                [0xff, 0xfe, ..] | [0xfe, 0xff, ..] if self.number == 1 => "the file is not UTF-8 but UTF-16",
                _ => "the file is not UTF-8",
            };
            io::Error::other(format!("{kind}: line {} has the byte 0x{byte:02x}", self.number))
        })
    }
}

fn check_kind(found: &OwnedFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(found)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice if stat.st_rdev == rustix::fs::makedev(1, 3) => Ok(()),
        // The open of a pipe without a name does not wait for a writer, unlike that of a FIFO.
        FileType::Fifo if is_nameless_pipe(found) => Ok(()),
        _ => regular_file::check(&stat),
    }
}

fn is_nameless_pipe(fd: impl AsFd) -> bool {
    // `f_type`'s own type differs between the C libraries.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast, clippy::cast_sign_loss)]
    rustix::fs::fstatfs(fd).is_ok_and(|found| found.f_type as u64 == PIPEFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn lines(bytes: &[u8]) -> Vec<(usize, String)> {
        let file = TextFile::from(bytes.to_vec());
        file.lines().map(|line| (line.number, String::from_utf8_lossy(line.bytes).into_owned())).collect()
    }

    #[test]
    fn lines_end_with_lf_or_cr_lf_and_the_last_one_may_lack_it() {
        let two = vec![(1, "a".to_owned()), (2, "b".to_owned())];
        for text in ["a\nb\n", "a\nb", "a\r\nb\r\n", "\u{feff}a\nb"] {
            assert_eq!(lines(text.as_bytes()), two, "{text:?}");
        }
        assert_eq!(lines(b""), []);
        assert_eq!(lines("\u{feff}".as_bytes()), []);
        assert_eq!(lines(b"\n\n"), [(1, String::new()), (2, String::new())]);
        assert_eq!(lines(b"a\rb\r\r\n"), [(1, "a\rb\r".to_owned())], "CR alone ends no line");
    }

    #[test]
    fn what_is_not_utf_8_is_reported_with_its_line() {
        for (bytes, says) in [
            (&b"a\nwei\xdf\n"[..], "not UTF-8: line 2 has the byte 0xdf"),
            (b"\xff\xfea\0", "UTF-16: line 1"),
        ] {
            let file = TextFile::from(bytes.to_vec());
            assert!(file.text().unwrap_err().to_string().contains(says), "{says}");
        }
        assert_eq!(TextFile::from(b"\xef\xbb\xbfx\0\n".to_vec()).text().unwrap(), "x\0\n");
    }

    #[test]
    fn fifos_do_not_block_and_endless_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        for (path, says) in [
            (fifo.as_path(), "a FIFO"),
            (dir.path(), "a directory"),
            (Path::new("/dev/zero"), "a device"),
            (Path::new("/nowhere/at/all"), "No such file"),
        ] {
            let error = TextFile::read(path, 10).unwrap_err();
            assert!(error.to_string().contains(says), "{}: {error}", path.display());
        }
        assert_eq!(TextFile::read(Path::new("/dev/null"), 10).unwrap().bytes(), b"");
        let file = dir.path().join("file");
        fs::write(&file, "0123456789").unwrap();
        assert_eq!(TextFile::read(&file, 10).unwrap().bytes(), b"0123456789");
        assert!(TextFile::read(&file, 9).unwrap_err().to_string().contains("larger than 9 bytes"));
        let (reader, mut writer) = std::io::pipe().unwrap();
        io::Write::write_all(&mut writer, b"A=1\n").unwrap();
        drop(writer);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        assert_eq!(TextFile::read(Path::new(&path), 10).unwrap().bytes(), b"A=1\n");
    }
}
