//! The dynamic loader's cache, /etc/ld.so.cache, as glibc writes it (glibc `elf/cache.c`, `sysdeps/generic/dl-cache.h`).

/// One line of `ldconfig -p`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name that programs load, `libcuda.so.1`.
    pub name: &'a [u8],
    /// Where it is.
    pub path: &'a [u8],
    /// Kind of ELF file: `0x0303` is x86-64, `0x0003` is i386 (`FLAG_*` of `ldconfig.h`).
    pub flags: u32,
    /// Hardware capabilities that the file needs (or the index of a `glibc-hwcaps` subdirectory); 0 for most.
    pub hwcap: u64,
}

const NEW_MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const OLD_MAGIC: &[u8] = b"ld.so-1.7.0";
/// `struct cache_file`: magic, padding, number of entries.
const OLD_HEADER: usize = 16;
/// `struct file_entry`: flags, key, value.
const OLD_ENTRY: usize = 12;
/// `struct cache_file_new`: magic and version, counts, byte order, extension offset, unused words.
const NEW_HEADER: usize = 48;
/// `struct file_entry_new`: flags, key, value, osversion, hwcap.
const NEW_ENTRY: usize = 24;

/// Every entry of a cache in the host's byte order. Both layouts that ldconfig writes are read: the new format alone
/// (default since glibc 2.32) and the old one with the new one behind it (`ldconfig -c compat`).
///
/// # Errors
/// A sentence when the bytes are no such cache or an entry points outside of it. An old-format cache alone, last written
/// by glibc 2.1, is refused, too.
pub fn parse(bytes: &[u8]) -> Result<Vec<Entry<'_>>, &'static str> {
    let cache = new_format(bytes).ok_or("it is not a loader cache of the form glibc-ld.so.cache1.1")?;
    let count = word(cache, 20).ok_or("its header is cut short")? as usize;
    let table_size = count.checked_mul(NEW_ENTRY).ok_or("it promises more entries than fit")?;
    let table =
        cache.get(NEW_HEADER..).and_then(|rest| rest.get(..table_size)).ok_or("its table is cut short")?;
    table
        .chunks_exact(NEW_ENTRY)
        .map(|entry| {
            Some(Entry {
                flags: word(entry, 0)?,
                name: text(cache, word(entry, 4)?)?,
                path: text(cache, word(entry, 8)?)?,
                hwcap: u64::from_ne_bytes(entry.get(16..24)?.try_into().ok()?),
            })
        })
        .collect::<Option<_>>()
        .ok_or("an entry points outside of it")
}

/// The new-format cache within `bytes`; its string offsets count from its own beginning.
fn new_format(bytes: &[u8]) -> Option<&[u8]> {
    let cache = if bytes.starts_with(OLD_MAGIC) {
        let entries = (word(bytes, 12)? as usize).checked_mul(OLD_ENTRY)?;
        // ALIGN_CACHE: the new header is aligned for its 64-bit words.
        bytes.get(entries.checked_add(OLD_HEADER)?.checked_next_multiple_of(8)?..)?
    } else {
        bytes
    };
    cache.starts_with(NEW_MAGIC).then_some(cache)
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

fn text(cache: &[u8], offset: u32) -> Option<&[u8]> {
    let rest = cache.get(offset as usize..)?;
    rest.get(..rest.iter().position(|&byte| byte == 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A cache as ldconfig would write it.
    fn written(entries: &[(&str, &str, u32)]) -> Vec<u8> {
        let mut strings = Vec::new();
        let mut table = Vec::new();
        for (name, path, flags) in entries {
            let mut offset_of = |text: &str| {
                let offset = NEW_HEADER + entries.len() * NEW_ENTRY + strings.len();
                strings.extend_from_slice(text.as_bytes());
                strings.push(0);
                u32::try_from(offset).unwrap().to_ne_bytes()
            };
            table.extend_from_slice(&flags.to_ne_bytes());
            table.extend_from_slice(&offset_of(name));
            table.extend_from_slice(&offset_of(path));
            table.extend_from_slice(&[0; 12]);
        }
        let mut cache = NEW_MAGIC.to_vec();
        cache.extend_from_slice(&u32::try_from(entries.len()).unwrap().to_ne_bytes());
        cache.extend_from_slice(&u32::try_from(strings.len()).unwrap().to_ne_bytes());
        cache.extend_from_slice(&[0; 20]);
        cache.extend_from_slice(&table);
        cache.extend_from_slice(&strings);
        cache
    }

    const ENTRIES: &[(&str, &str, u32)] = &[
        ("libcuda.so.1", "/usr/lib64/libcuda.so.1", 0x0303),
        ("libcuda.so.1", "/usr/lib/libcuda.so.1", 0x0003),
        ("libc.so.6", "/lib64/libc.so.6", 0x0303),
    ];

    fn assert_entries(bytes: &[u8]) {
        let entries = parse(bytes).unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[1].name, b"libcuda.so.1");
        assert_eq!(entries[1].path, b"/usr/lib/libcuda.so.1");
        assert_eq!((entries[1].flags, entries[1].hwcap), (3, 0));
    }

    #[test]
    fn both_layouts_give_the_same_entries() {
        let new = written(ENTRIES);
        assert_entries(&new);
        // Three old entries end at 52; the new header begins at 56.
        let mut compat = OLD_MAGIC.to_vec();
        compat.push(0);
        compat.extend_from_slice(&3u32.to_ne_bytes());
        compat.extend_from_slice(&[0xff; 3 * OLD_ENTRY + 4]);
        compat.extend_from_slice(&new);
        assert_entries(&compat);
    }

    #[test]
    fn the_cache_of_this_machine_is_read() {
        let Ok(bytes) = std::fs::read("/etc/ld.so.cache") else { return };
        let entries = parse(&bytes).unwrap();
        assert!(entries.iter().any(|entry| entry.name == b"libc.so.6" && entry.path.starts_with(b"/")));
    }

    #[test]
    fn what_is_cut_short_or_points_outside_is_refused() {
        let whole = written(ENTRIES);
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "cut to {end} bytes");
        }
        let mut outside = whole.clone();
        outside[NEW_HEADER + 4..NEW_HEADER + 8].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(parse(&outside).is_err());
        let mut many = whole;
        many[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(parse(&many).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_cache_or_a_sentence(noise in proptest::collection::vec(any::<u8>(), 0..400), old in any::<bool>()) {
            let mut bytes = if old { OLD_MAGIC.to_vec() } else { NEW_MAGIC.to_vec() };
            bytes.extend_from_slice(&noise);
            let _ = parse(&bytes);
            let _ = parse(&noise);
        }

        #[test]
        fn a_damaged_cache_never_panics(at in 0usize..120, value in any::<u8>()) {
            let mut bytes = written(ENTRIES);
            bytes[at] = value;
            let _ = parse(&bytes);
        }
    }
}
