//! Parses PAX extended headers (POSIX pax, "pax Extended Header") like Go's archive/tar.

use super::{Region, broken};
use crate::error::{Error, Result};
use rustix::fs::Timespec;

/// The most data regions of a sparse file: as many as fit in the longest map.
pub const MAX_REGIONS: usize = 1 << 16;

/// The location of a sparse map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sparse {
    /// Formats 0.0 and 0.1: in the header.
    Map(Vec<Region>),
    /// Format 1.0: before the data.
    InData,
}

/// The map of a sparse file, and its name and its length with holes if the header has them.
pub type SparseFile = (Sparse, Option<Vec<u8>>, Option<i64>);

/// The records of an extended header about the next entry. Unknown records are ignored, and a record without a value keeps
/// the value of the header.
#[derive(Default)]
pub struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<i64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub mtime: Option<Timespec>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: SparseRecords,
}

/// The records of a sparse file, which are interpreted together.
#[derive(Default)]
struct SparseRecords {
    major: Vec<u8>,
    minor: Vec<u8>,
    name: Vec<u8>,
    size: Vec<u8>,
    real_size: Vec<u8>,
    count: Vec<u8>,
    map: Vec<u8>,
    /// Format 0.0 writes each number in a record of its own.
    numbers: Vec<i64>,
}

fn malformed() -> Error {
    broken("a PAX header is malformed")
}

impl Pax {
    /// Records are `LENGTH KEY=VALUE\n`; LENGTH counts itself, so values hold any byte.
    pub fn parse(mut bytes: &[u8]) -> Result<Self> {
        let mut pax = Self::default();
        while !bytes.is_empty() {
            let blank = bytes.iter().take(20).position(|&byte| byte == b' ').ok_or_else(malformed)?;
            let length = decimal(&bytes[..blank])
                .and_then(|length| usize::try_from(length).ok())
                .filter(|length| *length >= 5)
                .ok_or_else(malformed)?;
            let record = bytes.get(blank + 1..length).ok_or_else(malformed)?;
            bytes = &bytes[length..];
            let [record @ .., b'\n'] = record else { return Err(malformed()) };
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(malformed)?;
            pax.record(&record[..equals], &record[equals + 1..])?;
        }
        Ok(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let is_text = matches!(key, b"path" | b"linkpath" | b"uname" | b"gname");
        if key.is_empty() || key.contains(&0) || is_text && value.contains(&0) {
            return Err(malformed());
        }
        let number = || decimal(value).ok_or_else(malformed);
        let sparse = &mut self.sparse;
        match key {
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // Offsets and lengths alternate, beginning with an offset.
                let is_offset = key == b"GNU.sparse.offset";
                if is_offset != sparse.numbers.len().is_multiple_of(2)
                    || sparse.numbers.len() > 2 * MAX_REGIONS
                {
                    return Err(malformed());
                }
                sparse.numbers.push(number()?);
            }
            b"GNU.sparse.major" => sparse.major = value.to_vec(),
            b"GNU.sparse.minor" => sparse.minor = value.to_vec(),
            b"GNU.sparse.name" => sparse.name = value.to_vec(),
            b"GNU.sparse.size" => sparse.size = value.to_vec(),
            b"GNU.sparse.realsize" => sparse.real_size = value.to_vec(),
            b"GNU.sparse.numblocks" => sparse.count = value.to_vec(),
            b"GNU.sparse.map" => sparse.map = value.to_vec(),
            _ if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") => {}
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(timestamp(value).ok_or_else(malformed)?),
            // Not kept, but a malformed time is a malformed header, as in Go.
            b"atime" | b"ctime" => drop(timestamp(value).ok_or_else(malformed)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }

    /// The sparse file of the entry: the map, the real name (the header has a replacement), and the length with holes. `None` if
    /// the entry is not a sparse file, or of an unknown version.
    pub fn sparse(&mut self) -> Result<Option<SparseFile>> {
        let records = std::mem::take(&mut self.sparse);
        let sparse = match (records.major.as_slice(), records.minor.as_slice()) {
            (b"0", b"0" | b"1") => Sparse::Map(records.regions()?),
            (b"1", b"0") => Sparse::InData,
            (b"", b"") if !records.map.is_empty() || !records.numbers.is_empty() => {
                Sparse::Map(records.regions()?)
            }
            _ => return Ok(None),
        };
        let size = if records.size.is_empty() { records.real_size } else { records.size };
        let size = if size.is_empty() { None } else { Some(decimal(&size).ok_or_else(malformed)?) };
        Ok(Some((sparse, Some(records.name).filter(|name| !name.is_empty()), size)))
    }
}

impl SparseRecords {
    fn regions(&self) -> Result<Vec<Region>> {
        let bad = || broken("a sparse file's map is not made of pairs, as many as it says");
        let numbers = if !self.numbers.is_empty() {
            self.numbers.clone()
        } else if self.map.is_empty() {
            Vec::new()
        } else {
            self.map.split(|&byte| byte == b',').map(decimal).collect::<Option<_>>().ok_or_else(bad)?
        };
        let count = decimal(&self.count).and_then(|count| usize::try_from(count).ok()).ok_or_else(bad)?;
        if count > MAX_REGIONS || numbers.len() != 2 * count {
            return Err(bad());
        }
        pairs(&numbers)
    }
}

/// Alternating offsets and lengths.
pub fn pairs(numbers: &[i64]) -> Result<Vec<Region>> {
    let number =
        |number: i64| u64::try_from(number).map_err(|_| broken("a sparse file's map has a negative number"));
    numbers
        .chunks_exact(2)
        .map(|pair| Ok(Region { offset: number(pair[0])?, length: number(pair[1])? }))
        .collect()
}

/// Parses an integer with an optional sign.
pub fn decimal(digits: &[u8]) -> Option<i64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Parses seconds since 1970 with a fraction, possibly negative: `1700000000.123456789`.
fn timestamp(text: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds = decimal(whole.as_bytes())?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'));
    Some(match (whole.starts_with('-'), nanos) {
        (false, _) | (true, 0) => Timespec { tv_sec: seconds, tv_nsec: nanos },
        // The kernel counts nanoseconds upwards from the preceding second.
        (true, _) => Timespec { tv_sec: seconds.checked_sub(1)?, tv_nsec: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(key: &str, value: &str) -> Vec<u8> {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len();
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        format!("{length}{rest}").into_bytes()
    }

    /// The surprising cases of Go's `TestParsePAXTime` and `TestParsePAXRecord`.
    #[test]
    fn times_and_records_are_gos() {
        let time = |text: &str| timestamp(text.as_bytes()).map(|time| (time.tv_sec, time.tv_nsec));
        for (text, expected) in [
            ("1350244992.023960108", Some((1_350_244_992, 23_960_108))),
            ("1350244992.02396010", Some((1_350_244_992, 23_960_100))),
            ("1350244992.0239601089", Some((1_350_244_992, 23_960_108))),
            ("1350244992.3", Some((1_350_244_992, 300_000_000))),
            ("1350244992", Some((1_350_244_992, 0))),
            ("-1.000000001", Some((-2, 999_999_999))),
            ("-1.000000", Some((-1, 0))),
            ("-1.9999900000", Some((-2, 10_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("+5", Some((5, 0))),
            ("5.", Some((5, 0))),
            ("", None),
            ("0.5e3", None),
            ("-1-2", None),
            (".5", None),
            ("0xff", None),
            ("1 2", None),
        ] {
            assert_eq!(time(text), expected, "{text}");
        }
        for bad in [
            "9 atime=\n9",
            "11 atime=x\n",
            "14 ctime=1-1-1\n",
            "6 k=v",
            "6 k=v\n\n",
            "4 =\n",
            "2 \n",
            "7 =v12\n",
            "abc k=v\n",
            "-6 k=v\n",
            "11 path=a\0b\n",
        ] {
            assert!(Pax::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        let kept =
            Pax::parse(&[record("path", ""), record("size", ""), record("uid", "-2")].concat()).unwrap();
        assert_eq!(
            (kept.path, kept.size, kept.uid),
            (None, None, Some(-2)),
            "an empty value leaves the header's"
        );
    }

    proptest! {
        #[test]
        fn any_pax_header_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), key in "(GNU.sparse.[a-z]{3,9}|mtime|size|path)", value in ".{0,20}") {
            let _ = Pax::parse(&bytes).and_then(|mut pax| pax.sparse());
            let _ = Pax::parse(&record(&key, &value)).and_then(|mut pax| pax.sparse());
        }
    }
}
