//! Reads a tar stream entry by entry: v7, ustar, star, GNU and PAX, with long names, extended attributes and sparse files.
//!
//! Writers of tar disagree, so one rule decides: whatever Go's archive/tar accepts is accepted with the same value, and
//! whatever it refuses is refused with a better message. The engines that make and test images read them with Go. We have our
//! own decoder because the tar crate normalises: type flag NUL becomes `0` (and a version 7 directory a file), signed
//! checksums are refused, numbers are unsigned, PAX records end at newlines (the bytes of a file capability may hold one),
//! extended headers have any length, and PAX sparse files are unsupported.
//!
//! Three differences from Go bound the cost of a hostile archive: the length of a name or sparse map is limited, data that
//! belongs to no file is skipped up to [`MAX_PASSED`], and an owner must be a 32-bit number. Type flags `7` (contiguous) and
//! `S` (sparse), which Docker refuses, are regular files.

mod header;
mod pax;

use crate::error::{Code, Error, Result};
use header::{Format, Header, number, until_nul};
use pax::{MAX_REGIONS, Pax, Sparse, decimal, pairs};
use rustix::fs::Timespec;
use std::io::{self, BufRead, Read, Seek};

const BLOCK: usize = 512;
/// The longest PAX header, long name or sparse map, in bytes; Go's archive/tar refuses more than 1 MiB as well.
const MAX_EXTENDED: u64 = 1 << 20;
/// The most bytes that belong to no file, such as extended headers and the data of whiteouts, beyond [`ALLOWED`] for each
/// entry. An archive of such bytes would otherwise be read forever without filling a disk.
const MAX_PASSED: u64 = 64 << 20;
/// Such bytes that each entry may have.
const ALLOWED: u64 = 64 << 10;

/// The kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; data follows.
    File,
    /// A hard link to an earlier file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// An unknown kind, with its type flag.
    Other(u8),
}

/// A run of data in a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// An entry, as its headers describe it. Names are unchecked bytes.
#[derive(Debug)]
pub struct Entry {
    /// The name.
    pub path: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// The kind.
    pub kind: Kind,
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last change.
    pub mtime: Timespec,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, in the order of the archive.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Length of the file, in bytes, holes included.
    pub size: u64,
    /// The data regions of a sparse file; `None` for other files.
    pub regions: Option<Vec<Region>>,
}

/// A tar stream.
pub struct Reader<R> {
    source: R,
    /// Bytes of the current entry's data that were not read yet.
    remaining: u64,
    /// Padding after the data, in bytes.
    padding: u64,
    /// Bytes that belonged to no file, minus [`ALLOWED`] for each entry.
    passed: u64,
}

fn broken(cause: impl Into<String>) -> Error {
    Error::new(Code::ImageBroken, "a tar archive of the image cannot be read").cause(cause.into()).fix(
        "save or download the image again (`docker save -o FILE NAME`); if that does not help, rebuild it",
    )
}

impl<R: Read> Reader<R> {
    /// A reader of this source, which is positioned at the first header.
    pub fn new(source: R) -> Self {
        Self { source, remaining: 0, padding: 0, passed: 0 }
    }

    /// The next entry; `None` at the end of the archive. Unread data is skipped.
    ///
    /// # Errors
    /// [`Code::ImageBroken`] if the bytes are not a tar archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.passed = self.passed.saturating_sub(ALLOWED);
        self.pass_over(self.remaining)?;
        if !self.skip_padding()? {
            return Ok(None);
        }

        let mut pax = Pax::default();
        let (mut long_name, mut long_link) = (Vec::new(), Vec::new());
        loop {
            let mut block = [0; BLOCK];
            if !self.fill(&mut block)? {
                return Ok(None);
            }
            if block == [0; BLOCK] {
                let mut second = [0; BLOCK];
                if self.fill(&mut second)? && second != [0; BLOCK] {
                    return Err(broken("a block of zeros is followed by something else"));
                }
                return Ok(None);
            }
            let header = Header::new(&block)?;
            let size = header.size()?;
            match header.type_flag() {
                b'x' => pax = Pax::parse(&self.extension(size)?)?,
                b'L' => long_name = until_nul(&self.extension(size)?).to_vec(),
                b'K' => long_link = until_nul(&self.extension(size)?).to_vec(),
                // Defaults for all following entries. Only git writes them (a comment), and Docker ignores them. Go returns such a
                // header as an entry, so headers before it are dropped.
                b'g' => {
                    Pax::parse(&self.extension(size)?)?;
                    pax = Pax::default();
                    long_name.clear();
                    long_link.clear();
                }
                _ => return self.entry(&header, pax, long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        mut pax: Pax,
        long_name: Vec<u8>,
        long_link: Vec<u8>,
    ) -> Result<Entry> {
        let not_empty = |bytes: &Vec<u8>| !bytes.is_empty();
        let mut path =
            Some(long_name).filter(not_empty).or_else(|| pax.path.take()).unwrap_or_else(|| header.path());
        let link =
            Some(long_link).filter(not_empty).or_else(|| pax.link.take()).unwrap_or_else(|| header.link());
        let kind = match header.type_flag() {
            // Before ustar a directory was a file whose name ends with a slash.
            0 if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        // Only files have data; some writers give links the size of what they point to.
        let has_data = matches!(kind, Kind::File | Kind::Other(_));
        let size = pax.size.map_or_else(|| header.size(), Ok)?;
        let stored = if has_data {
            u64::try_from(size).map_err(|_| broken(format!("an entry has the length {size}")))?
        } else {
            0
        };
        self.remaining = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        let mut length = stored;
        let mut regions = None;
        if header.type_flag() == b'S' {
            (length, regions) = self.gnu_sparse(header)?;
        } else if let Some((sparse, name, size)) = pax.sparse()? {
            if !has_data {
                return Err(broken("a sparse file is not a regular file"));
            }
            path = name.unwrap_or(path);
            length = match size {
                Some(size) => {
                    u64::try_from(size).map_err(|_| broken(format!("a sparse file has the length {size}")))?
                }
                None => stored,
            };
            regions = Some(match sparse {
                Sparse::Map(regions) => regions,
                Sparse::InData => self.sparse_map_in_data()?,
            });
        }
        check_regions(regions.as_deref(), length, self.remaining)?;
        let mtime = Timespec { tv_sec: header.mtime()?, tv_nsec: 0 };
        // Every number of a header is parsed, as in Go: a header with a malformed number is damaged.
        let (device, mode) = (header.device()?, header.mode()?);
        let (uid, gid) = (header.uid()?, header.gid()?);
        Ok(Entry {
            link,
            kind,
            mode: u32::try_from(mode & 0o7777).unwrap_or(0),
            uid: owner(pax.uid.unwrap_or(uid))?,
            gid: owner(pax.gid.unwrap_or(gid))?,
            mtime: pax.mtime.unwrap_or(mtime),
            device: match kind {
                Kind::CharDevice | Kind::BlockDevice => (device_number(device.0), device_number(device.1)),
                _ => (0, 0),
            },
            xattrs: pax.xattrs,
            path,
            size: length,
            regions,
        })
    }

    /// Reads the old GNU format: four regions in the header, then blocks of 21 regions.
    fn gnu_sparse(&mut self, header: &Header<'_>) -> Result<(u64, Option<Vec<Region>>)> {
        // star uses the same type flag with a different layout.
        if header.format() != Format::Gnu {
            return Err(broken("a sparse file has no GNU header"));
        }
        let length = header.real_size()?;
        let length =
            u64::try_from(length).map_err(|_| broken(format!("a sparse file has the length {length}")))?;
        let mut regions = Vec::new();
        let mut add = |fields: &[u8]| -> Result<()> {
            for region in fields.chunks_exact(24).take_while(|region| region[0] != 0) {
                let pair = [number(&region[..12]), number(&region[12..])];
                let [Some(offset), Some(length)] = pair else {
                    return Err(broken("a sparse file's map is not made of numbers"));
                };
                regions.extend(pairs(&[offset, length])?);
            }
            if regions.len() > MAX_REGIONS {
                Err(broken("a sparse file has too many regions"))
            } else {
                Ok(())
            }
        };
        let (fields, mut more) = header.sparse_regions();
        add(fields)?;
        while more {
            let mut block = [0; BLOCK];
            if !self.fill(&mut block)? {
                return Err(broken("it ends within a sparse file's map"));
            }
            self.count(BLOCK as u64)?;
            add(&block[..504])?;
            more = block[504] != 0;
        }
        Ok((length, Some(regions)))
    }

    /// Reads PAX sparse format 1.0: the data begins with lines of decimal numbers, a count and then offset and length of each
    /// region, padded to a block (GNU tar manual, "PAX Format, Version 1.0").
    fn sparse_map_in_data(&mut self) -> Result<Vec<Region>> {
        let (mut numbers, mut digits) = (Vec::new(), Vec::new());
        let mut wanted = 1_usize;
        while numbers.len() < wanted {
            let mut block = [0; BLOCK];
            if self.remaining < BLOCK as u64 || !self.fill(&mut block)? {
                return Err(broken("a sparse file's map is cut off"));
            }
            self.remaining -= BLOCK as u64;
            for &byte in &block {
                if numbers.len() == wanted {
                    break;
                }
                if byte != b'\n' {
                    digits.push(byte);
                    if digits.len() > BLOCK {
                        return Err(broken("a sparse file's map is not made of numbers"));
                    }
                    continue;
                }
                numbers.push(
                    decimal(&digits).ok_or_else(|| broken("a sparse file's map is not made of numbers"))?,
                );
                digits.clear();
                if let [count] = numbers[..] {
                    let count = usize::try_from(count).unwrap_or(usize::MAX);
                    if count > MAX_REGIONS {
                        return Err(broken("a sparse file has too many regions"));
                    }
                    wanted = 1 + 2 * count;
                }
            }
        }
        pairs(&numbers[1..])
    }

    /// Reads the content of an extended header and skips its padding.
    fn extension(&mut self, size: i64) -> Result<Vec<u8>> {
        let Some(size) = u64::try_from(size).ok().filter(|size| *size <= MAX_EXTENDED) else {
            return Err(broken(format!(
                "an extended header has {size} bytes, and at most {MAX_EXTENDED} are allowed"
            )));
        };
        let mut content = Vec::new();
        let padded = size.next_multiple_of(BLOCK as u64);
        self.count(padded + BLOCK as u64)?;
        (&mut self.source)
            .take(padded)
            .read_to_end(&mut content)
            .map_err(|error| broken(error.to_string()))?;
        if (content.len() as u64) < padded {
            return Err(broken("it ends within an extended header"));
        }
        content.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok(content)
    }

    /// Skips data that belongs to no file.
    fn pass_over(&mut self, bytes: u64) -> Result<()> {
        self.count(bytes)?;
        self.skip(bytes)
    }

    fn count(&mut self, bytes: u64) -> Result<()> {
        self.passed = self.passed.saturating_add(bytes);
        if self.passed > MAX_PASSED {
            return Err(broken(format!("it holds more than {MAX_PASSED} bytes that belong to no file")));
        }
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        let skipped = io::copy(&mut (&mut self.source).take(bytes), &mut io::sink())
            .map_err(|error| broken(error.to_string()))?;
        if skipped < bytes { Err(broken("it ends within an entry")) } else { Ok(()) }
    }

    /// Skips the padding after the data; `false` if the source ends there, which ends the archive as in Go.
    fn skip_padding(&mut self) -> Result<bool> {
        let padding = std::mem::take(&mut self.padding);
        self.remaining = 0;
        io::copy(&mut (&mut self.source).take(padding), &mut io::sink())
            .map(|skipped| skipped == padding)
            .map_err(|error| broken(error.to_string()))
    }

    /// Fills the buffer; `false` if the source ends before its first byte.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.source.read(&mut buffer[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(broken("it ends within a block")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(error.to_string())),
            }
        }
        Ok(true)
    }
}

impl<R: Read> Reader<R> {
    /// Reads past the current entry's data and returns its offset, if none of it was read. `position` is the offset of the
    /// source.
    pub fn read_past_data(&mut self, position: impl Fn(&R) -> u64) -> Result<u64> {
        let at = position(&self.source);
        let data = std::mem::take(&mut self.remaining);
        self.skip(data)?;
        Ok(at)
    }
}

impl<R: BufRead> Reader<R> {
    /// Passes buffered data of the current entry to `take`, up to `most` bytes and without a copy. Returns the number of bytes; 0
    /// at the end. The regions of a sparse file follow each other without holes.
    pub fn data(&mut self, most: u64, take: impl FnOnce(&[u8]) -> Result<()>) -> Result<u64> {
        let wanted = self.remaining.min(most);
        if wanted == 0 {
            return Ok(0);
        }
        let ready = self.source.fill_buf().map_err(|error| broken(error.to_string()))?;
        let count = ready.len().min(usize::try_from(wanted).unwrap_or(usize::MAX));
        if count == 0 {
            return Err(broken("it ends within an entry"));
        }
        take(&ready[..count])?;
        self.source.consume(count);
        self.remaining -= count as u64;
        Ok(count as u64)
    }
}

impl<R: Read + Seek> Reader<R> {
    /// Seeks past the current entry's data and returns its offset, if none of it was read.
    pub fn skip_data(&mut self) -> Result<u64> {
        let position = self.source.stream_position().map_err(|error| broken(error.to_string()))?;
        let next = position
            .checked_add(self.remaining + self.padding)
            .ok_or_else(|| broken("an entry is too long"))?;
        self.source.seek(io::SeekFrom::Start(next)).map_err(|error| broken(error.to_string()))?;
        (self.remaining, self.padding) = (0, 0);
        Ok(position)
    }
}

/// Converts an owner as Go passes it to the kernel. -2, the user nobody of old Solaris, is 4294967294. -1 leaves the owner of
/// a new file unchanged, which is root.
fn owner(number: i64) -> Result<u32> {
    let refused = || broken(format!("an owner has the number {number}, which no user can have"));
    let id = match u32::try_from(number) {
        Ok(id) => id,
        Err(_) => i32::try_from(number).map_err(|_| refused())?.cast_unsigned(),
    };
    Ok(if id == u32::MAX { 0 } else { id })
}

/// Converts a major or minor number like the engines, which pass its lowest 32 bits to mknod(2) (Go's `unix.Mkdev`).
fn device_number(number: i64) -> u32 {
    u32::try_from(number.cast_unsigned() & u64::from(u32::MAX)).unwrap_or_default()
}

/// Checks that regions ascend, do not overlap, lie in the file, and sum up to the length of the data.
fn check_regions(regions: Option<&[Region]>, size: u64, stored: u64) -> Result<()> {
    let Some(regions) = regions else { return Ok(()) };
    let (mut end, mut data) = (0_u64, 0_u64);
    for region in regions {
        let next =
            region.offset.checked_add(region.length).filter(|&next| region.offset >= end && next <= size);
        end = next.ok_or_else(|| broken("the regions of a sparse file overlap or lie outside"))?;
        data += region.length;
    }
    if data == stored {
        Ok(())
    } else {
        Err(broken("the regions of a sparse file are not as long as its data"))
    }
}

#[cfg(test)]
mod tests;
