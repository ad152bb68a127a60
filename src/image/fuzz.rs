//! Parsers of images, for [`crate::fuzz_targets`].

use super::{
    Ownership, Platform,
    layout::Layout,
    manifest,
    tar::{Entry, Kind, Reader},
    unpack,
};
use crate::{error::Code, fuzz_targets::file};
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::fs;

/// Reads an archive: every entry with its data.
pub(crate) fn tar(bytes: &[u8]) {
    read_entries(bytes);
    read_entries(&with_checksums(bytes));
}

fn read_entries(bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    while let Ok(Some(entry)) = reader.next_entry() {
        check(&entry);
        let mut data = 0;
        loop {
            match reader.data(4096, |_| Ok(())) {
                Ok(0) => break,
                Ok(count) => data += count,
                Err(_) => return,
            }
        }
        let stored = match &entry.regions {
            Some(regions) => regions.iter().map(|region| region.length).sum(),
            None => entry.size,
        };
        assert_eq!(data, stored, "the data of an entry has another length than its header says");
    }
}

fn check(entry: &Entry) {
    assert!(entry.mode <= 0o7777 && (0..1_000_000_000).contains(&entry.mtime.tv_nsec));
    assert!(entry.uid != u32::MAX && entry.gid != u32::MAX, "chown(2) leaves the owner -1 unchanged");
    assert!(matches!(entry.kind, Kind::File | Kind::Other(_)) || entry.size == 0);
    let mut end = 0;
    for region in entry.regions.iter().flatten() {
        assert!(region.offset >= end, "regions overlap");
        end = region.offset + region.length;
    }
    assert!(entry.regions.is_none() || end <= entry.size, "a region lies beyond the end of its file");
}

/// The archive with valid checksums in all blocks that look like headers. A fuzzer does not find checksums.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_exact_mut(512) {
        if block[257..].starts_with(b"ustar") || block[154..156] == *b"\0 " {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    bytes
}

/// Unpacks a layer. Nothing may be made beside its directory.
///
/// # Panics
/// Also if there is no temporary directory.
pub(crate) fn layer(bytes: &[u8]) {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let root = parent.path().join("root");
    fs::create_dir(&root).expect("a directory");
    let directory =
        openat(CWD, &root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("just made");
    for ownership in [Ownership::Image, Ownership::Caller] {
        let bytes = with_checksums(bytes);
        if let Err(error) = unpack::unpack(bytes.as_slice(), rustix::fd::AsFd::as_fd(&directory), ownership) {
            // Not the machine's fault; but a sparse file may be larger than its filesystem.
            assert!(
                [Code::ImageBroken, Code::LayerRefused, Code::NoSpace].contains(&error.code()),
                "{error}"
            );
        }
        let names =
            fs::read_dir(&parent).expect("the directory").map(|entry| entry.expect("an entry").file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["root"], "a layer has left its root");
        super::tree::empty_open(&directory).expect("a layer that was unpacked can be removed");
    }
}

/// Follows the documents of an archive that `docker save` or skopeo wrote.
pub(crate) fn archive(bytes: &[u8]) {
    let platform = Platform::new("linux", "amd64");
    let Some(layout) = file(&with_checksums(bytes)).and_then(|file| Layout::archive_of(file).ok()) else {
        return;
    };
    for name in [None, Some("latest")] {
        let found =
            [manifest::from_oci(&layout, name, &platform), manifest::from_docker(&layout, name, &platform)];
        for error in found.into_iter().filter_map(Result::err) {
            let faults = [Code::ImageBroken, Code::ImageNotFound, Code::DigestMismatch, Code::WrongPlatform];
            assert!(faults.contains(&error.code()), "{error}");
        }
    }
}

/// Parses indexes, manifests and configurations.
pub(crate) fn documents(bytes: &[u8]) {
    manifest::fuzz(bytes);
}
