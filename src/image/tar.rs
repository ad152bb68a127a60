//! Reads a tar stream entry by entry: v7, ustar, GNU and PAX, with long names, extended attributes and sparse files.
//!
//! The fields of a header are decoded by the tar crate. The walk from header to header is ours, because that crate's
//! own splits PAX records at newlines (the bytes of a file capability may hold one), reads extended headers of any
//! length into memory, and does not know PAX sparse files. Where writers of tar disagree we read as Go's archive/tar
//! does, since that is what engines that made and tested the image read with.

use crate::error::{Code, Error, OrFail, Result};
use rustix::fs::Timespec;
use std::io::{self, BufRead, Read, Seek};
use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

const BLOCK: usize = 512;
/// The longest PAX header, long name or sparse map, in bytes; Go's archive/tar refuses more than 1 MiB as well.
const MAX_EXTENDED: u64 = 1 << 20;
/// The most data regions of a sparse file: as many as fit the longest map.
const MAX_REGIONS: usize = 1 << 16;

/// What an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; data follows.
    File,
    /// Another name of a file that came before.
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
    /// Something else: its type flag.
    Other(u8),
}

/// A run of data in a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where it lies in the file, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

/// One entry, as its headers describe it. Names are bytes, unchecked.
#[derive(Debug)]
pub struct Entry {
    /// What it is called.
    pub path: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// What it makes.
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
    /// Where the data lies in a sparse file; `None`: all of it, from the start.
    pub regions: Option<Vec<Region>>,
}

/// A tar stream.
pub struct Reader<R> {
    source: R,
    /// Bytes of the current entry's data that were not read yet.
    remaining: u64,
    /// Bytes that fill its last block.
    padding: u64,
}

fn broken(cause: impl Into<String>) -> Error {
    Error::new(Code::ImageBroken, "a tar archive of the image cannot be read").cause(cause.into())
}

impl<R: Read> Reader<R> {
    /// Over this source, which stands at the first header.
    pub fn new(source: R) -> Self {
        Self { source, remaining: 0, padding: 0 }
    }

    /// The next entry; `None` at the end of the archive. Data that nobody read is passed over.
    ///
    /// # Errors
    /// [`Code::ImageBroken`] where the bytes are no tar archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let left = self.remaining + self.padding;
        let passed = io::copy(&mut (&mut self.source).take(left), &mut io::sink())
            .map_err(|error| broken(error.to_string()))?;
        if passed < left {
            return Err(broken("it ends within an entry"));
        }
        (self.remaining, self.padding) = (0, 0);

        let mut pax = Pax::default();
        let (mut long_name, mut long_link) = (None, None);
        let mut extended = false;
        loop {
            let mut header = Header::new_old();
            let more = self.fill(header.as_mut_bytes())?;
            if !more || header.as_bytes().iter().all(|&byte| byte == 0) {
                let mut second = [0; BLOCK];
                if extended || (more && self.fill(&mut second)? && second.iter().any(|&byte| byte != 0)) {
                    return Err(broken("it ends where a header should be"));
                }
                return Ok(None);
            }
            check_sum(&header)?;
            let size = header.entry_size().map_err(|error| broken(error.to_string()))?;
            extended = true;
            match header.entry_type().as_byte() {
                b'x' => pax = Pax::parse(&self.extension(size)?)?,
                b'L' => long_name = Some(until_nul(self.extension(size)?)),
                b'K' => long_link = Some(until_nul(self.extension(size)?)),
                // Defaults for all that follows. Only git writes them (a comment), and Docker passes over them too.
                b'g' => drop(self.extension(size)?),
                flag => {
                    let mut entry = self.entry(flag, &header, size, pax)?;
                    entry.path = long_name.unwrap_or(entry.path);
                    entry.link = long_link.unwrap_or(entry.link);
                    return Ok(Some(entry));
                }
            }
        }
    }

    fn entry(&mut self, flag: u8, header: &Header, size: u64, pax: Pax) -> Result<Entry> {
        let path = pax.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let kind = match flag {
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
        let stored = match kind {
            Kind::File | Kind::Other(_) => pax.size.unwrap_or(size),
            _ => 0,
        };
        self.remaining = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        if stored.checked_add(BLOCK as u64).is_none() {
            return Err(broken("an entry is longer than 64 bits can say"));
        }
        let (size, regions) = if flag == b'S' {
            self.gnu_sparse(header)?
        } else if pax.sparse_in_data {
            let size = pax.sparse_size.ok_or_else(|| broken("a sparse file has no length"))?;
            (size, Some(self.sparse_map_in_data()?))
        } else if let Some(numbers) = pax.sparse_map {
            (pax.sparse_size.unwrap_or(stored), Some(pairs(&numbers)?))
        } else {
            (stored, None)
        };
        check_regions(regions.as_deref(), size, self.remaining)?;
        let id = |pax: Option<u64>, header: io::Result<u64>| {
            // A blank field, which old writers leave, is root.
            u32::try_from(pax.or(header.ok()).unwrap_or(0))
                .or_fail(Code::ImageBroken, || "an owner of the image has no 32-bit number")
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => {
                let number = |field: io::Result<Option<u32>>| {
                    field.ok().flatten().ok_or_else(|| broken("a device has no number"))
                };
                (number(header.device_major())?, number(header.device_minor())?)
            }
            _ => (0, 0),
        };
        Ok(Entry {
            link: pax
                .link
                .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
                .unwrap_or_default(),
            kind,
            mode: header.mode().map_err(|error| broken(error.to_string()))? & 0o7777,
            uid: id(pax.uid, header.uid())?,
            gid: id(pax.gid, header.gid())?,
            mtime: pax.mtime.unwrap_or(Timespec {
                // Base-256 fields hold two's complement: times before 1970 are negative.
                tv_sec: header.mtime().unwrap_or(0).cast_signed(),
                tv_nsec: 0,
            }),
            device,
            xattrs: pax.xattrs,
            path,
            size,
            regions,
        })
    }

    /// The old GNU form: four regions in the header, then blocks with 21 more each.
    fn gnu_sparse(&mut self, header: &Header) -> Result<(u64, Option<Vec<Region>>)> {
        let gnu = header.as_gnu().ok_or_else(|| broken("a sparse file has no GNU header"))?;
        let size = gnu.real_size().map_err(|error| broken(error.to_string()))?;
        let mut regions = Vec::new();
        let mut add = |sparse: &[GnuSparseHeader]| -> Result<()> {
            for region in sparse.iter().take_while(|region| !region.is_empty()) {
                let number = |field: io::Result<u64>| field.map_err(|error| broken(error.to_string()));
                regions.push(Region { offset: number(region.offset())?, length: number(region.length())? });
            }
            if regions.len() > MAX_REGIONS {
                Err(broken("a sparse file has too many regions"))
            } else {
                Ok(())
            }
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut next = GnuExtSparseHeader::new();
            if !self.fill(next.as_mut_bytes())? {
                return Err(broken("it ends within a sparse file's map"));
            }
            add(&next.sparse)?;
            // A block without a region would make an endless map.
            more = next.is_extended() && !next.sparse[0].is_empty();
        }
        Ok((size, Some(regions)))
    }

    /// PAX sparse format 1.0: the data begins with lines of decimal numbers, a count and then offset and length of each
    /// region, filled up to a block (GNU tar manual, "PAX Format, Version 1.0").
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
                    if digits.len() > 20 {
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

    /// The content of an extended header, with the padding that follows it.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_EXTENDED {
            return Err(broken(format!(
                "an extended header of {size} bytes; at most {MAX_EXTENDED} make sense"
            )));
        }
        let mut content = Vec::new();
        let padded = size.next_multiple_of(BLOCK as u64);
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

    /// Fills the buffer; `false` where the source ends before its first byte.
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

impl<R: BufRead> Reader<R> {
    /// Hands on, without a copy, what lies ready of the current entry's data, up to so many bytes; how many those were, 0 at
    /// its end. A sparse file's regions come one after the other, without holes.
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
    /// Where the current entry's data begins, if none of it was read; passes over it without reading.
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

/// The header's bytes added up, its own field counted as blanks.
fn check_sum(header: &Header) -> Result<()> {
    let bytes = header.as_bytes();
    let sum: u32 =
        bytes[..148].iter().chain(&bytes[156..]).map(|&byte| u32::from(byte)).sum::<u32>() + 8 * 32;
    if header.cksum().is_ok_and(|promised| promised == sum) {
        Ok(())
    } else {
        Err(broken("a header's checksum is wrong"))
    }
}

/// Regions ascend, do not overlap, lie in the file, and together are the data that is there.
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

fn pairs(numbers: &[u64]) -> Result<Vec<Region>> {
    if !numbers.len().is_multiple_of(2) || numbers.len() > 2 * MAX_REGIONS {
        return Err(broken("a sparse file's map is not made of pairs"));
    }
    Ok(numbers.chunks_exact(2).map(|pair| Region { offset: pair[0], length: pair[1] }).collect())
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    bytes
}

fn decimal(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Seconds since 1970 with a fraction, perhaps negative: `1700000000.123456789`.
fn timestamp(text: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole = i64::try_from(decimal(whole.as_bytes())?).ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'));
    Some(match (negative, nanos) {
        (false, _) => Timespec { tv_sec: whole, tv_nsec: nanos },
        (true, 0) => Timespec { tv_sec: -whole, tv_nsec: 0 },
        // The kernel's nanoseconds count upwards from the second before.
        (true, _) => Timespec { tv_sec: -whole - 1, tv_nsec: 1_000_000_000 - nanos },
    })
}

/// What a PAX extended header says about the entry that follows (POSIX pax, "pax Extended Header"). A record that is
/// not known is passed over.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Timespec>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Length with holes, every sparse format.
    sparse_size: Option<u64>,
    /// Format 1.0: the map is in the data.
    sparse_in_data: bool,
    /// Formats 0.0 and 0.1: offsets and lengths by turns.
    sparse_map: Option<Vec<u64>>,
}

impl Pax {
    /// Records are `LENGTH KEY=VALUE\n`; LENGTH counts itself, so values hold any byte.
    fn parse(mut bytes: &[u8]) -> Result<Self> {
        let malformed = || broken("a PAX header is malformed");
        let mut pax = Self::default();
        let mut sparse_name = None;
        while !bytes.is_empty() {
            let blank = bytes.iter().take(20).position(|&byte| byte == b' ').ok_or_else(malformed)?;
            let length = decimal(&bytes[..blank])
                .and_then(|length| usize::try_from(length).ok())
                .ok_or_else(malformed)?;
            let record = bytes.get(blank + 1..length).ok_or_else(malformed)?;
            bytes = &bytes[length..];
            let [record @ .., b'\n'] = record else { return Err(malformed()) };
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(malformed)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let number = || decimal(value).ok_or_else(malformed);
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"linkpath" => pax.link = Some(value.to_vec()),
                b"size" => pax.size = Some(number()?),
                b"uid" => pax.uid = Some(number()?),
                b"gid" => pax.gid = Some(number()?),
                b"mtime" => pax.mtime = Some(timestamp(value).ok_or_else(malformed)?),
                b"GNU.sparse.name" => sparse_name = Some(value.to_vec()),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => pax.sparse_size = Some(number()?),
                b"GNU.sparse.major" => pax.sparse_in_data = number()? == 1,
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    pax.sparse_map.get_or_insert_default().push(number()?);
                }
                b"GNU.sparse.map" => {
                    let numbers = value.split(|&byte| byte == b',').map(decimal).collect::<Option<_>>();
                    pax.sparse_map = Some(numbers.ok_or_else(malformed)?);
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        pax.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        // The name in `path` is then one that only unpackers without sparse files would use.
        pax.path = sparse_name.or(pax.path);
        Ok(pax)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn walk(bytes: &[u8]) -> Result<Vec<Entry>> {
        let mut reader = Reader::new(bytes);
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            while reader.data(700, |_| Ok(()))? > 0 {}
            entries.push(entry);
        }
        Ok(entries)
    }

    fn sample() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let xattr = ("SCHILY.xattr.security.capability", &b"\x01\n19 path=smuggled\n\0"[..]);
        builder.append_pax_extensions([xattr, ("mtime", &b"-1.25"[..]), ("size", &b"3"[..])]).unwrap();
        let mut header = Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o4755);
        header.set_uid(5);
        builder.append_data(&mut header, "a", &b""[..]).unwrap();
        let mut bytes = builder.into_inner().unwrap();
        bytes.truncate(bytes.len() - 1024);
        bytes.extend_from_slice(b"abc");
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let mut builder = tar::Builder::new(bytes);
        let long = format!("{}/end", "long".repeat(60));
        let mut header = Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        builder.append_link(&mut header, &long, format!("../{long}")).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn values_with_newlines_stay_whole_and_pax_overrides() {
        let entries = walk(&sample()).unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(
            (entries[0].path.as_slice(), entries[0].size, entries[0].mode, entries[0].uid),
            (&b"a"[..], 3, 0o4755, 5)
        );
        assert_eq!(entries[0].xattrs[0].1, b"\x01\n19 path=smuggled\n\0");
        assert_eq!((entries[0].mtime.tv_sec, entries[0].mtime.tv_nsec), (-2, 750_000_000));
        assert_eq!(entries[1].kind, Kind::Symlink);
        assert_eq!(entries[1].path.len(), 244);
        assert!(entries[1].link.starts_with(b"../long"));
    }

    #[test]
    fn cut_off_and_endless_archives_are_broken() {
        let whole = sample();
        // A cut at a header is an end as well; anywhere else it is a fault.
        for length in [1, 511, 513, 600, 1024 + 512, whole.len() - 1024 - 100] {
            assert_eq!(walk(&whole[..length]).unwrap_err().code(), Code::ImageBroken, "{length}");
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        assert!(walk(header.as_bytes()).unwrap_err().cause_line().contains("extended header"));
    }

    #[test]
    fn a_sparse_map_fits_its_file() {
        let sparse = |map: &str, length: &str, data: &str| {
            let mut builder = tar::Builder::new(Vec::new());
            let pax = [("GNU.sparse.map", map.as_bytes()), ("GNU.sparse.size", length.as_bytes())];
            builder.append_pax_extensions(pax).unwrap();
            let mut header = Header::new_ustar();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, "f", data.as_bytes()).unwrap();
            walk(&builder.into_inner().unwrap())
        };
        let entries = sparse("0,3,10,2", "12", "abcde").unwrap();
        let regions = [Region { offset: 0, length: 3 }, Region { offset: 10, length: 2 }];
        assert_eq!((entries[0].size, entries[0].regions.as_deref()), (12, Some(&regions[..])));
        let most = u64::MAX.to_string();
        for (map, length, data) in [
            ("0,3,10,2", "12", "abcd"),
            ("0,3,10,2", "12", "abcdef"),
            ("0,3,10,2", "11", "abcde"),
            ("0,3,2,2", "12", "abcde"),
            ("10,2,0,3", "12", "abcde"),
            ("0,3,10", "12", "abc"),
            (&format!("{most},5"), &most, "abcde"),
            (&format!("0,{most},1,{most}"), &most, "abcde"),
        ] {
            assert_eq!(sparse(map, length, data).unwrap_err().code(), Code::ImageBroken, "{map}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) { let _ = walk(&bytes); }

        /// Mutated where it hurts: with the checksum put right again.
        #[test]
        fn mutated_archives_never_panic(at in 0usize..3072, byte in any::<u8>(), span in 1usize..12) {
            let mut bytes = sample();
            let end = (at + span).min(bytes.len());
            bytes[at..end].fill(byte);
            let start = at / 512 * 512;
            let mut header = Header::new_old();
            header.as_mut_bytes().copy_from_slice(&bytes[start..start + 512]);
            header.set_cksum();
            bytes[start..start + 512].copy_from_slice(header.as_bytes());
            let _ = walk(&bytes);
        }

        #[test]
        fn any_pax_header_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), key in "(GNU.sparse.[a-z]{3,8}|mtime|size|path)", value in ".{0,20}") {
            let _ = Pax::parse(&bytes);
            let record = format!(" {key}={value}\n");
            let _ = Pax::parse(format!("{}{record}", record.len() + 2).as_bytes());
        }
    }
}
