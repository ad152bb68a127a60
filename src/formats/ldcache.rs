//! glibc's /etc/ld.so.cache (sysdeps/generic/dl-cache.h): read, and written again with more entries.
//!
//! Writing it takes a fraction of a millisecond where forking ldconfig takes milliseconds, and no program runs over a
//! container's root. Only the format `glibc-ld.so.cache1.1` is written; every glibc since 2.2 reads it.

/// What a cache holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cache {
    /// In the order of the file: names descending, the loader takes the first that fits.
    pub entries: Vec<Entry>,
    /// Names of the glibc-hwcaps directories that entries refer to by number (`x86-64-v3`, …), in the file's order.
    pub hwcaps: Vec<Vec<u8>>,
}

/// One library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The SONAME that programs ask for.
    pub name: Vec<u8>,
    /// The file.
    pub path: Vec<u8>,
    /// Kind and machine: one of the `FLAGS_*`.
    pub flags: u32,
    /// Oldest kernel, mostly 0.
    pub os_version: u32,
    /// Legacy hardware bits, or with [`HWCAP_EXTENSION`] a number in [`Cache::hwcaps`].
    pub hwcap: u64,
}

/// ELF_LIBC6 alone: i386.
pub const FLAGS_I386: u32 = 0x0003;
/// FLAG_X8664_LIB64 | ELF_LIBC6.
pub const FLAGS_X86_64: u32 = 0x0303;
/// FLAG_AARCH64_LIB64 | ELF_LIBC6.
pub const FLAGS_AARCH64: u32 = 0x0a03;
/// DL_CACHE_HWCAP_EXTENSION: the upper half says that the lower is an index.
pub const HWCAP_EXTENSION: u64 = 1 << 62;

/// The flags of this machine's own libraries.
pub const FLAGS_NATIVE: u32 = if cfg!(target_arch = "aarch64") { FLAGS_AARCH64 } else { FLAGS_X86_64 };

const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const OLD_MAGIC: &[u8] = b"ld.so-1.7.0\0";
const OLD_ENTRY: usize = 12;
const HEADER: usize = 48;
const ENTRY: usize = 24;
const EXTENSION_MAGIC: u32 = 0xeaa4_2174;
const TAG_HWCAPS: u32 = 1;

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The strings of a cache. Entries may share them (glibc lets a name be the end of its path), so a hostile file could name one
/// long string in each of its entries and come to terabytes: what is read is bounded by the file's own length.
struct Strings<'a> {
    bytes: &'a [u8],
    left: usize,
}

impl<'a> Strings<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, left: bytes.len().saturating_mul(4) }
    }

    fn at(&mut self, at: u32) -> Option<Vec<u8>> {
        let rest = self.bytes.get(at as usize..)?;
        let rest = &rest[..rest.len().min(self.left)];
        let text = &rest[..rest.iter().position(|&b| b == 0)?];
        self.left -= text.len();
        Some(text.to_vec())
    }
}

impl Cache {
    /// Reads a cache; `None` if it is not one, or damaged. A cache in the old format alone is not one: no glibc of this
    /// century writes it.
    pub fn parse(file: &[u8]) -> Option<Self> {
        let bytes = if file.starts_with(OLD_MAGIC) {
            // The new cache follows the old one, aligned to 8 bytes (ALIGN_CACHE).
            let count = u32_at(file, OLD_MAGIC.len())? as usize;
            let old = (OLD_MAGIC.len() + 4).checked_add(count.checked_mul(OLD_ENTRY)?)?;
            file.get(old.checked_next_multiple_of(8)?..)?
        } else {
            file
        };
        if !bytes.starts_with(MAGIC) {
            return None;
        }
        let count = u32_at(bytes, 20)? as usize;
        if count.checked_mul(ENTRY)?.checked_add(HEADER)? > bytes.len() {
            return None;
        }
        let mut strings = Strings::of(bytes);
        let entries = (0..count)
            .map(|n| {
                let at = HEADER + n * ENTRY;
                Some(Entry {
                    flags: u32_at(bytes, at)?,
                    name: strings.at(u32_at(bytes, at + 4)?)?,
                    path: strings.at(u32_at(bytes, at + 8)?)?,
                    os_version: u32_at(bytes, at + 12)?,
                    hwcap: u64_at(bytes, at + 16)?,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        let extension = u32_at(bytes, 32)?;
        let hwcaps =
            if extension == 0 { Vec::new() } else { hwcaps(bytes, &mut strings, extension as usize)? };
        Some(Self { entries, hwcaps })
    }

    /// Puts libraries in; what the cache had under the same name for the same machine goes.
    pub fn replace(&mut self, added: Vec<Entry>) {
        self.entries.retain(|old| !added.iter().any(|new| new.name == old.name && new.flags == old.flags));
        self.entries.splice(0..0, added);
        // Stable: among equals the order of the file stays, which is the order of the image's library directories.
        self.entries.sort_by(|a, b| compare(&b.name, &a.name));
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let strings_at = HEADER + self.entries.len() * ENTRY;
        let mut strings = Vec::new();
        let mut table = Vec::with_capacity(self.entries.len() * ENTRY);
        let mut keep = |text: &[u8]| {
            let at = length(strings_at + strings.len());
            strings.extend_from_slice(text);
            strings.push(0);
            at
        };
        for entry in &self.entries {
            let (name, path) = (keep(&entry.name), keep(&entry.path));
            for word in [entry.flags, name, path, entry.os_version] {
                table.extend_from_slice(&word.to_ne_bytes());
            }
            table.extend_from_slice(&entry.hwcap.to_ne_bytes());
        }
        let hwcaps: Vec<u32> = self.hwcaps.iter().map(|text| keep(text)).collect();
        let strings_length = strings.len();
        while !(strings_at + strings.len()).is_multiple_of(4) {
            strings.push(0);
        }
        let extension = if hwcaps.is_empty() { 0 } else { length(strings_at + strings.len()) };

        let mut file = MAGIC.to_vec();
        for word in [length(self.entries.len()), length(strings_length), FLAGS_ENDIAN, extension, 0, 0, 0] {
            file.extend_from_slice(&word.to_ne_bytes());
        }
        file.extend(table);
        file.extend(strings);
        if extension != 0 {
            let data_at = extension + 8 + 16;
            for word in [EXTENSION_MAGIC, 1, TAG_HWCAPS, 0, data_at, length(hwcaps.len() * 4)] {
                file.extend_from_slice(&word.to_ne_bytes());
            }
            for at in hwcaps {
                file.extend_from_slice(&at.to_ne_bytes());
            }
        }
        file
    }
}

/// `cache_file_new_flags_endian_*`: glibc 2.33 and later refuse a cache of the other byte order.
const FLAGS_ENDIAN: u32 = if cfg!(target_endian = "little") { 2 } else { 3 << 24 };

/// A cache of more than 4 GiB cannot be: it is made of an image's file that was read with a bound.
fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn hwcaps(bytes: &[u8], strings: &mut Strings<'_>, at: usize) -> Option<Vec<Vec<u8>>> {
    if u32_at(bytes, at)? != EXTENSION_MAGIC {
        return None;
    }
    for n in 0..u32_at(bytes, at + 4)?.min(64) as usize {
        let section = at + 8 + n * 16;
        if u32_at(bytes, section)? == TAG_HWCAPS {
            let (offset, size) =
                (u32_at(bytes, section + 8)? as usize, u32_at(bytes, section + 12)? as usize);
            let names = bytes.get(offset..offset.checked_add(size)?)?;
            return names.chunks_exact(4).map(|at| strings.at(u32_at(at, 0)?)).collect();
        }
    }
    Some(Vec::new())
}

/// `_dl_cache_libcmp`: digits compare as numbers, and a digit sorts after any other character.
fn compare(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    use std::cmp::Ordering;
    let (mut a, mut b) = (a, b);
    loop {
        match (a.first(), b.first()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(x), Some(y)) => match (x.is_ascii_digit(), y.is_ascii_digit()) {
                (true, false) => return Ordering::Greater,
                (false, true) => return Ordering::Less,
                (true, true) => {
                    let (x, y) = (digits(&mut a), digits(&mut b));
                    let order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
                    if order != Ordering::Equal {
                        return order;
                    }
                }
                (false, false) if x != y => return x.cmp(y),
                (false, false) => (a, b) = (&a[1..], &b[1..]),
            },
        }
    }
}

/// Takes the number at the front; its digits without leading zeros.
fn digits<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    *text = rest;
    let zeros = number.iter().position(|&b| b != b'0').unwrap_or(number.len());
    &number[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(name: &str, path: &str) -> Entry {
        Entry { name: name.into(), path: path.into(), flags: FLAGS_NATIVE, os_version: 0, hwcap: 0 }
    }

    #[test]
    fn the_hosts_own_cache_survives_a_round_trip() {
        let bytes = std::fs::read("/etc/ld.so.cache").unwrap();
        let cache = Cache::parse(&bytes).unwrap();
        assert!(cache.entries.iter().any(|e| e.name == b"libc.so.6"));
        assert_eq!(Cache::parse(&cache.to_bytes()).unwrap(), cache);
        let mut sorted = cache.clone();
        sorted.replace(Vec::new());
        assert_eq!(sorted, cache, "our order is ldconfig's order");
    }

    #[test]
    fn glibc_reads_what_we_write() {
        let mut cache = Cache::parse(&std::fs::read("/etc/ld.so.cache").unwrap()).unwrap();
        let before = cache.entries.len();
        cache.hwcaps.push(b"x86-64-v9".to_vec());
        cache.replace(vec![
            entry("libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1"),
            entry("libc.so.6", "/ours/libc.so.6"),
        ]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), cache.to_bytes()).unwrap();
        let output = std::process::Command::new("/sbin/ldconfig")
            .arg("-p")
            .arg("-C")
            .arg(file.path())
            .output()
            .unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && listed.starts_with(&format!("{} libs", before + 1)), "{listed}");
        assert!(
            listed.contains("libcuda.so.1 (libc6,x86-64) => /usr/local/nvidia/lib64/libcuda.so.1"),
            "{listed}"
        );
        assert!(listed.contains("libc.so.6 (libc6,x86-64) => /ours/libc.so.6"), "{listed}");
    }

    #[test]
    fn a_string_that_every_entry_names_does_not_fill_the_memory() {
        let mut cache = Cache::default();
        cache.replace((0..200_000).map(|_| entry("", "")).collect());
        let mut bytes = cache.to_bytes();
        let strings = u32::try_from(bytes.len()).unwrap();
        bytes.extend(vec![b'a'; 1 << 20]);
        bytes.push(0);
        for entry in bytes[HEADER..HEADER + 200_000 * ENTRY].chunks_exact_mut(ENTRY) {
            entry[4..8].copy_from_slice(&strings.to_ne_bytes());
        }
        // 200 GB, if it were read.
        assert_eq!(Cache::parse(&bytes), None);
        let mut shared = Cache::default();
        shared.replace(
            (0..100).map(|n| entry(&format!("lib{n}.so.1"), &format!("/lib/lib{n}.so.1"))).collect(),
        );
        assert_eq!(Cache::parse(&shared.to_bytes()), Some(shared));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), old in any::<bool>()) {
            let magic = if old { OLD_MAGIC } else { MAGIC };
            bytes.splice(0..0, magic.iter().copied());
            if let Some(cache) = Cache::parse(&bytes) { let _ = cache.to_bytes(); }
        }
        #[test]
        fn a_damaged_cache_is_read_or_refused(at in 0usize..1200, byte in any::<u8>()) {
            let mut cache = Cache { entries: Vec::new(), hwcaps: vec![b"x86-64-v2".to_vec()] };
            cache.replace((0..20).map(|n| entry(&format!("lib{n}.so.1"), "/lib/x")).collect());
            let mut bytes = cache.to_bytes();
            if let Some(b) = bytes.get_mut(at) { *b = byte; }
            let _ = Cache::parse(&bytes);
        }
    }
}
