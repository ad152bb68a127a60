//! Decodes a header block like Go's archive/tar (`format.go`, `strconv.go`, `reader.go`).

use super::{BLOCK, broken};
use crate::error::Result;

/// The format of a header, by its magic number and version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Unix version 7: no device numbers, no prefix.
    V7,
    /// POSIX ustar and pax.
    Ustar,
    /// Schily's star: a shorter prefix.
    Star,
    /// GNU before POSIX: times where others have a prefix.
    Gnu,
}

/// A header block with a valid checksum.
pub struct Header<'a> {
    block: &'a [u8; BLOCK],
    format: Format,
}

impl<'a> Header<'a> {
    /// Verifies the checksum. Old writers (Solaris, SunOS) count bytes above 127 as negative, so both sums are accepted.
    pub fn new(block: &'a [u8; BLOCK]) -> Result<Self> {
        let parts = [&block[..148], &block[156..]];
        // In the sum the checksum field counts as blanks.
        let blanks = 8 * i64::from(b' ');
        let unsigned =
            || parts.iter().flat_map(|part| part.iter()).map(|&byte| i64::from(byte)).sum::<i64>() + blanks;
        let signed = || {
            parts.iter().flat_map(|part| part.iter()).map(|&byte| i64::from(byte.cast_signed())).sum::<i64>()
                + blanks
        };
        let promised = octal(&block[148..156]);
        if promised != Some(unsigned()) && promised != Some(signed()) {
            return Err(broken("a header's checksum is wrong"));
        }
        let format = match (&block[257..263], &block[263..265], &block[508..512]) {
            (b"ustar\0", _, b"tar\0") => Format::Star,
            (b"ustar\0", ..) => Format::Ustar,
            (b"ustar ", b" \0", _) => Format::Gnu,
            _ => Format::V7,
        };
        Ok(Self { block, format })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The type flag, unchanged.
    pub fn type_flag(&self) -> u8 {
        self.block[156]
    }

    /// The name, with its prefix.
    pub fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.block[..100]);
        let prefix = match self.format {
            Format::V7 => &[],
            Format::Ustar => until_nul(&self.block[345..500]),
            Format::Star => until_nul(&self.block[345..476]),
            // Old versions of Go's writer put a prefix there. As in Go, it is a prefix if the times before it are not numbers and it
            // is ASCII.
            Format::Gnu => {
                let times = [345..357, 357..369].map(|field| &self.block[field]);
                let good = times.iter().all(|field| field[0] == 0 || number(field).is_some());
                let prefix = until_nul(&self.block[345..500]);
                if good || !prefix.is_ascii() { &[] } else { prefix }
            }
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// The target of a link.
    pub fn link(&self) -> Vec<u8> {
        until_nul(&self.block[157..257]).to_vec()
    }

    /// Mode; only the permission bits have a meaning.
    pub fn mode(&self) -> Result<i64> {
        self.number("mode", 100..108)
    }

    /// Owner.
    pub fn uid(&self) -> Result<i64> {
        self.number("uid", 108..116)
    }

    /// Group.
    pub fn gid(&self) -> Result<i64> {
        self.number("gid", 116..124)
    }

    /// Length of the data, in bytes.
    pub fn size(&self) -> Result<i64> {
        self.number("size", 124..136)
    }

    /// Seconds since 1970.
    pub fn mtime(&self) -> Result<i64> {
        self.number("mtime", 136..148)
    }

    /// Major and minor number; 0 in version 7, which lacks them.
    pub fn device(&self) -> Result<(i64, i64)> {
        match self.format {
            Format::V7 => Ok((0, 0)),
            _ => Ok((self.number("devmajor", 329..337)?, self.number("devminor", 337..345)?)),
        }
    }

    /// The first data regions of a sparse file in the old GNU format, and whether blocks with more regions follow.
    pub fn sparse_regions(&self) -> (&'a [u8], bool) {
        (&self.block[386..482], self.block[482] != 0)
    }

    /// The length of a sparse file in the old GNU format, including holes.
    pub fn real_size(&self) -> Result<i64> {
        self.number("realsize", 483..495)
    }

    fn number(&self, name: &str, field: std::ops::Range<usize>) -> Result<i64> {
        let bytes = &self.block[field];
        number(bytes).ok_or_else(|| {
            broken(format!(
                "the field {name} of a header is not a number: {:?}",
                String::from_utf8_lossy(bytes)
            ))
        })
    }
}

/// Parses a number: octal in ASCII, or two's complement in base 256 if the first bit is set; `None` if malformed.
pub fn number(field: &[u8]) -> Option<i64> {
    match field {
        [first, ..] if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

fn base_256(field: &[u8]) -> Option<i64> {
    // The first bit marks base 256, the second is the sign.
    let invert = if field[0] & 0x40 == 0 { 0 } else { 0xff };
    let mut value = 0_u64;
    for (at, &byte) in field.iter().enumerate() {
        let byte = if at == 0 { (byte ^ invert) & 0x7f } else { byte ^ invert };
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if invert == 0 { value } else { !value })
}

/// Parses octal digits between blanks and NULs. No digits are 0: writers fill unused fields with either.
fn octal(field: &[u8]) -> Option<i64> {
    let is_filling = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !is_filling(byte)) else { return Some(0) };
    let end = field.iter().rposition(|byte| !is_filling(byte)).unwrap_or(start);
    let digits = until_nul(&field[start..=end]);
    let mut value = 0_u64;
    for &digit in digits {
        let digit = Some(digit).filter(|digit| (b'0'..=b'7').contains(digit))? - b'0';
        value = value.checked_mul(8)?.checked_add(u64::from(digit))?;
    }
    Some(value.cast_signed())
}

/// The bytes before the first NUL.
pub fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of Go's `TestParseNumeric` (archive/tar, `strconv_test.go`).
    #[test]
    fn numbers_are_gos() {
        for (field, value) in [
            (&b""[..], Some(0)),
            (b"\x80", Some(0)),
            (b"\x80\x00", Some(0)),
            (b"\x80\x00\x00", Some(0)),
            (b"\xbf", Some((1 << 6) - 1)),
            (b"\xbf\xff", Some((1 << 14) - 1)),
            (b"\xbf\xff\xff", Some((1 << 22) - 1)),
            (b"\xff", Some(-1)),
            (b"\xff\xff", Some(-1)),
            (b"\xff\xff\xff", Some(-1)),
            (b"\xc0", Some(-(1 << 6))),
            (b"\xc0\x00", Some(-(1 << 14))),
            (b"\xc0\x00\x00", Some(-(1 << 22))),
            (b"\x87\x76\xa2\x22\xeb\x8a\x72\x61", Some(537_795_476_381_659_745)),
            (b"\x80\x00\x00\x00\x07\x76\xa2\x22\xeb\x8a\x72\x61", Some(537_795_476_381_659_745)),
            (b"\xf7\x76\xa2\x22\xeb\x8a\x72\x61", Some(-615_126_028_225_187_231)),
            (b"\xff\xff\xff\xff\xf7\x76\xa2\x22\xeb\x8a\x72\x61", Some(-615_126_028_225_187_231)),
            (b"\x80\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\x80\x00\x00\x00\x00\x00\x00\x00", None),
            (b"\xff\x80\x00\x00\x00\x00\x00\x00\x00", Some(i64::MIN)),
            (b"\xff\x7f\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\xf5\xec\xd1\xc7\x7e\x5f\x26\x48\x81\x9f\x8f\x9b", None),
            (b"0000000\x00", Some(0)),
            (b" \x0000000\x00", Some(0)),
            (b" \x0000003\x00", Some(3)),
            (b"00000000227\x00", Some(0o227)),
            (b"032033\x00 ", Some(0o32033)),
            (b"320330\x00 ", Some(0o320_330)),
            (b"0000660\x00 ", Some(0o660)),
            (b"\x00 0000660\x00 ", Some(0o660)),
            (b"0123456789abcdef", None),
            (b"0123456789\x00abcdef", None),
            (b"01234567\x0089abcdef", Some(342_391)),
            (b"0123\x7e\x5f\x264123", None),
            (b"+7", None),
            (b"-7", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }
}
