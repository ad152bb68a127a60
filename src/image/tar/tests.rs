//! Hand-made archives, with the results of Go's archive/tar.

use super::*;
use ::tar::Header;
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
    let mut builder = ::tar::Builder::new(Vec::new());
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
    let mut builder = ::tar::Builder::new(bytes);
    let long = format!("{}/end", "long".repeat(60));
    let mut header = Header::new_gnu();
    header.set_entry_type(::tar::EntryType::Symlink);
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
    // A cut before a header is an end; anywhere else it is an error.
    for length in [1, 511, 513, 600, 1024 + 512, whole.len() - 1024 - 100] {
        assert_eq!(walk(&whole[..length]).unwrap_err().code(), Code::ImageBroken, "{length}");
    }
    let mut header = Header::new_ustar();
    header.set_entry_type(::tar::EntryType::XHeader);
    header.set_size(1 << 40);
    header.set_cksum();
    assert!(walk(header.as_bytes()).unwrap_err().cause_line().contains("extended header"));
}

#[test]
fn a_missing_end_is_an_end_as_with_go() {
    let entry = [block("f", b'0', USTAR, &[(124, b"00000000004\0")]).as_slice(), b"data"].concat();
    // Without the padding of the last entry, and with a part of it.
    for length in [entry.len(), entry.len() + 1, 1023] {
        let mut bytes = entry.clone();
        bytes.resize(length, 0);
        assert_eq!(walk(&bytes).unwrap().len(), 1, "{length}");
        let mut reader = Reader::new(bytes.as_slice());
        reader.next_entry().unwrap().unwrap();
        assert_eq!(reader.read_past_data(|_| 512).unwrap(), 512);
        assert!(reader.next_entry().unwrap().is_none(), "{length}");
    }
    assert!(walk(&entry[..515]).is_err(), "its data is cut");
}

#[test]
fn a_sparse_map_fits_its_file() {
    let sparse = |map: &str, length: &str, data: &str| {
        let mut builder = ::tar::Builder::new(Vec::new());
        let count = map.split(',').count().div_ceil(2).to_string();
        let pax = [("map", map), ("size", length), ("numblocks", count.as_str())];
        let pax = pax.map(|(key, value)| (format!("GNU.sparse.{key}"), value));
        builder
            .append_pax_extensions(pax.iter().map(|(key, value)| (key.as_str(), value.as_bytes())))
            .unwrap();
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

    /// Mutates headers and corrects the checksum.
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
}

/// A header block of bytes at offsets, with a valid checksum.
fn block(name: &str, flag: u8, magic: &[u8], fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000001\0");
    put(116, b"0000002\0");
    put(124, b"00000000000\0");
    put(136, b"14000000000\0");
    put(156, &[flag]);
    put(257, magic);
    for (at, bytes) in fields {
        put(*at, bytes);
    }
    put(148, b"        ");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

const V7: &[u8] = b"";
const USTAR: &[u8] = b"ustar\x0000";
const GNU: &[u8] = b"ustar  \0";

/// An extended header of this kind with this content.
fn extended(flag: u8, content: &[u8]) -> Vec<u8> {
    let size = format!("{:011o}\0", content.len());
    let mut bytes = block("header", flag, USTAR, &[(124, size.as_bytes())]);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn one(bytes: &[u8]) -> Result<Entry> {
    walk(bytes).map(|mut entries| entries.pop().expect("an entry"))
}

#[test]
fn a_version_7_directory_is_one_by_its_slash_whatever_gives_the_name() {
    let plain = block("d/", 0, V7, &[]);
    let long = [extended(b'L', b"long/d/\0"), block("short", 0, GNU, &[])].concat();
    let pax = [extended(b'x', b"14 path=a/d//\n"), block("short", 0, USTAR, &[])].concat();
    for bytes in [&plain, &long, &pax] {
        // A header follows, not data, whatever size the directory claims.
        let followed = [bytes.as_slice(), &block("f", b'0', USTAR, &[])].concat();
        let entries = walk(&followed).unwrap();
        assert_eq!(entries.iter().map(|entry| entry.kind).collect::<Vec<_>>(), [Kind::Directory, Kind::File]);
    }
    let sized = [block("d/", 0, V7, &[(124, b"00000001000\0")]), block("f", b'0', USTAR, &[])].concat();
    assert_eq!(walk(&sized).unwrap().len(), 2);
    // Not if the flag marks a file, and not without the slash.
    assert_eq!(one(&block("d/", b'0', USTAR, &[])).unwrap().kind, Kind::File);
    assert_eq!(one(&block("d", 0, V7, &[])).unwrap().kind, Kind::File);
    let renamed = [extended(b'x', b"10 path=f\n"), block("d/", 0, USTAR, &[])].concat();
    assert_eq!(one(&renamed).unwrap().kind, Kind::File);
}

#[test]
fn signed_checksums_count() {
    let mut bytes = block("na\u{ef}ve", b'0', USTAR, &[]);
    bytes[148..156].fill(b' ');
    let sum: i32 = bytes.iter().map(|&byte| i32::from(byte.cast_signed())).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(one(&bytes).unwrap().path, "na\u{ef}ve".as_bytes());
    bytes[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 1).as_bytes());
    assert!(walk(&bytes).unwrap_err().cause_line().contains("checksum"));
}

#[test]
fn prefixes_and_numbers_are_those_of_the_format() {
    let at = |magic: &[u8], fields: &[(usize, &[u8])]| {
        one(&block("name", b'3', magic, fields))
            .map(|entry| (String::from_utf8(entry.path).unwrap(), entry.device))
    };
    let number = (329, &b"0000012\0"[..]);
    assert_eq!(at(USTAR, &[(345, b"dir"), number]).unwrap(), ("dir/name".into(), (10, 0)));
    assert_eq!(at(V7, &[(345, b"dir"), number]).unwrap(), ("name".into(), (0, 0)));
    assert_eq!(at(GNU, &[(345, b"14000000000\0"), number]).unwrap(), ("name".into(), (10, 0)));
    assert_eq!(at(GNU, &[(345, b"dir"), number]).unwrap().0, "dir/name", "Go's own writer");
    // star: 131 bytes of prefix, then times, and a trailer.
    let star = [(345, &b"dir"[..]), (476, b"14000000000\0"), (508, b"tar\0"), number];
    assert_eq!(at(b"ustar\0", &star).unwrap().0, "dir/name");
    // A malformed number refuses the archive, even in a field that the entry does not need.
    for field in [100, 108, 116, 124, 136] {
        let error = one(&block("f", b'0', V7, &[(field, b"12x4567\0")])).unwrap_err();
        assert!(error.cause_line().contains("not a number"), "{field}: {error}");
    }
    assert!(one(&block("f", b'0', USTAR, &[(329, b"12x4567\0")])).is_err());
    assert!(one(&block("f", b'0', V7, &[(329, b"12x4567\0")])).is_ok(), "version 7 has no such field");
    // As the engines pass them to the kernel.
    for (number, expected) in
        [(&b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], u32::MAX), (b"\x80\0\0\x04\0\0\0\x05", 5)]
    {
        assert_eq!(at(GNU, &[(329, number)]).unwrap().1, (expected, 0));
    }
    // Two's complement: before 1970, and old Solaris' nobody.
    let odd = [
        (136, &b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"[..]),
        (108, b"\xff\xff\xff\xff\xff\xff\xff\xfe"),
    ];
    let entry = one(&block("f", b'0', GNU, &odd)).unwrap();
    assert_eq!((entry.mtime.tv_sec, entry.uid, entry.gid), (-2, 4_294_967_294, 2));
    let nobody = [extended(b'x', b"18 uid=4294967295\n"), block("f", b'0', USTAR, &[])].concat();
    assert!(one(&nobody).is_err() || one(&nobody).unwrap().uid == 0);
    assert!(
        one(&block("f", b'0', GNU, &[(124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")])).is_err()
    );
}

#[test]
fn what_comes_before_an_entry_counts_as_with_go() {
    let file = block("name", b'0', USTAR, &[]);
    let name = |before: &[&[u8]]| {
        let bytes = [&before.concat(), file.as_slice()].concat();
        one(&bytes).map(|entry| String::from_utf8(entry.path).unwrap())
    };
    let (pax, long) = (extended(b'x', b"12 path=pax\n"), extended(b'L', b"long\0rest"));
    assert_eq!(name(&[&pax]).unwrap(), "pax");
    assert_eq!(name(&[&long]).unwrap(), "long");
    assert_eq!(name(&[&long, &pax]).unwrap(), "long");
    assert!(name(&[&pax, &extended(b'x', b"8 path=2\n")]).is_err(), "malformed");
    assert_eq!(name(&[&pax, &extended(b'x', b"10 path=2\n")]).unwrap(), "2", "the last one");
    assert_eq!(name(&[&extended(b'x', b"8 path=\n")]).unwrap(), "name", "an empty value");
    assert_eq!(name(&[&extended(b'L', b"\0")]).unwrap(), "name", "an empty long name");
    // Go returns a global header as an entry of its own.
    let global = extended(b'g', b"22 comment=0123456789\n");
    assert_eq!(name(&[&pax, &global]).unwrap(), "name");
    assert_eq!(name(&[&global, &pax]).unwrap(), "pax");
    assert!(name(&[&extended(b'g', b"nonsense")]).is_err());
    // As in Go, an end marker instead of an entry is the end.
    assert_eq!(walk(&[pax.as_slice(), &[0; 1024]].concat()).unwrap().len(), 0);
    assert!(walk(&[&[0; 512][..], &file].concat()).is_err(), "one block of zeros is not the end");
}

#[test]
fn data_that_belongs_to_no_file_is_bounded() {
    // 2,000 extended headers of 1 MiB before one entry, and whiteouts with data.
    let large = extended(b'x', format!("1048576 comment={}\n", "x".repeat(1_048_576 - 17)).as_bytes());
    let error = walk(&large.repeat(70)).unwrap_err();
    assert!(error.cause_line().contains("belong to no file"), "{error}");
    assert!(walk(&[large.repeat(30), block("f", b'0', USTAR, &[])].concat()).is_ok());
}
