//! What a library says of itself: its class and its SONAME. Headers and the few strings needed are read, never the file:
//! libcuda alone has 30 MB.

use object::{
    Endianness, FileKind,
    elf::{self, FileHeader32, FileHeader64},
    read::{
        ReadCache, ReadRef,
        elf::{Dyn, FileHeader, ProgramHeader},
    },
};
use std::fs::File;

/// The longest SONAME that is believed; file names end at 255.
const NAME_LIMIT: u64 = 256;
/// The most program headers. A library has about a dozen. A header may promise 2^32, which a sparse file holds for free.
const MAX_SEGMENTS: u32 = 1000;
/// The longest dynamic section in bytes. libcuda's has about 500.
const MAX_DYNAMIC: u64 = 64 << 10;

/// The facts.
#[derive(Debug, PartialEq, Eq)]
pub struct Library {
    /// ELFCLASS32.
    pub is_32bit: bool,
    /// DT_SONAME.
    pub soname: Option<String>,
}

/// Reads the facts of a shared library that can run on this machine; `None` for anything else.
pub fn read(file: File) -> Option<Library> {
    let cache = ReadCache::new(file);
    let (is_32bit, soname) = match FileKind::parse(&cache).ok()? {
        FileKind::Elf64 => (false, soname::<FileHeader64<Endianness>, _>(&cache, MACHINE_64)?),
        FileKind::Elf32 => (true, soname::<FileHeader32<Endianness>, _>(&cache, MACHINE_32)?),
        _ => return None,
    };
    Some(Library { is_32bit, soname })
}

/// A driver for both machines lies side by side in multiarch layouts; only the one that runs here counts.
const MACHINE_64: elf::Machine = if cfg!(target_arch = "aarch64") { elf::EM_AARCH64 } else { elf::EM_X86_64 };
const MACHINE_32: elf::Machine = if cfg!(target_arch = "aarch64") { elf::EM_ARM } else { elf::EM_386 };

#[expect(
    clippy::option_option,
    reason = "not a library of this machine, and one without SONAME, are two answers"
)]
fn soname<'data, Elf: FileHeader<Endian = Endianness>, R: ReadRef<'data>>(
    data: R,
    machine: elf::Machine,
) -> Option<Option<String>> {
    let header = Elf::parse(data).ok()?;
    let endian = header.endian().ok()?;
    if header.e_machine(endian) != machine || header.e_type(endian) != elf::ET_DYN {
        return None;
    }
    if header.phnum(endian, data).ok()? > MAX_SEGMENTS {
        return None;
    }
    let segments = header.program_headers(endian, data).ok()?;
    let segment = segments.iter().find(|segment| segment.p_type(endian) == elf::PT_DYNAMIC)?;
    if segment.p_filesz(endian).into() > MAX_DYNAMIC {
        return None;
    }
    let dynamic = segment.dynamic(endian, data).ok()??;
    let value = |tag: elf::DynamicTag| {
        let entry = dynamic.iter().find(|entry| entry.tag(endian) == tag)?;
        Some(entry.d_val(endian).into())
    };
    let Some(name) = value(elf::DT_SONAME) else { return Some(None) };
    let address = value(elf::DT_STRTAB)?.checked_add(name)?;
    // The table is named by its address in memory; the segment that is loaded there says where it is in the file.
    let offset =
        segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD).find_map(|segment| {
            let within = address.checked_sub(segment.p_vaddr(endian).into())?;
            (within < segment.p_filesz(endian).into()).then_some(())?;
            within.checked_add(segment.p_offset(endian).into())
        })?;
    let end = offset.checked_add(NAME_LIMIT)?.min(data.len().ok()?);
    let name = data.read_bytes_at_until(offset..end, 0).ok()?;
    Some(Some(std::str::from_utf8(name).ok()?.into()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::{path::Path, process::Command};

    /// Compiles an empty shared library.
    pub(in crate::inventory) fn compile(path: &Path, arguments: &[&str]) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let status = Command::new("cc")
            .args(["-shared", "-nostdlib", "-x", "c", "/dev/null", "-o"])
            .arg(path)
            .args(arguments)
            .status()
            .unwrap();
        assert!(status.success());
    }

    #[test]
    fn class_and_soname_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib.so");
        let facts = |arguments: &[&str]| {
            compile(&path, arguments);
            read(File::open(&path).unwrap())
        };
        assert_eq!(
            facts(&["-Wl,-soname,libcuda.so.1"]),
            Some(Library { is_32bit: false, soname: Some("libcuda.so.1".into()) })
        );
        assert_eq!(facts(&[]), Some(Library { is_32bit: false, soname: None }));
        if cfg!(target_arch = "x86_64") {
            assert_eq!(
                facts(&["-m32", "-Wl,-soname,libcuda.so.1"]),
                Some(Library { is_32bit: true, soname: Some("libcuda.so.1".into()) })
            );
        }
    }

    #[test]
    fn what_is_no_library_is_none_and_a_damaged_one_never_panics() {
        assert_eq!(read(File::open("/dev/null").unwrap()), None);
        assert_eq!(read(File::open(std::env::current_exe().unwrap().parent().unwrap()).unwrap()), None);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib.so");
        compile(&path, &["-Wl,-soname,libcuda.so.1"]);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..0x400.min(whole.len()) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            std::fs::write(&path, &bytes).unwrap();
            let _ = read(File::open(&path).unwrap());
            std::fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(read(File::open(&path).unwrap()), None, "cut to {at} bytes");
        }
    }
}
