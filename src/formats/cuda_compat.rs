//! The note by which a `libcuda.so` of a cuda-compat package says on which drivers it runs: ELF section
//! `.note.cuda.fwd_compatibility`, owner "NVIDIA Corporation", a JSON object as its description.

use object::read::{Object, ObjectSection, ReadCache, elf::ElfFile64};

const SECTION: &[u8] = b".note.cuda.fwd_compatibility";
const OWNER: &[u8] = b"NVIDIA Corporation";
/// The notes seen have some hundred bytes.
const MAX_NOTE: u64 = 64 << 10;

/// The note of this library; `None` if it has none or is not an ELF file.
pub fn note(library: std::fs::File) -> Option<String> {
    let cache = ReadCache::new(library);
    let elf: ElfFile64<'_, object::Endianness, _> = ElfFile64::parse(&cache).ok()?;
    let section = elf.section_by_name_bytes(SECTION)?;
    if section.size() > MAX_NOTE {
        return None;
    }
    description(section.data().ok()?)
}

/// The description of a note with NVIDIA's name (`Elf64_Nhdr`, elf(5)).
fn description(note: &[u8]) -> Option<String> {
    let word = |at: usize| Some(u32::from_le_bytes(note.get(at..at + 4)?.try_into().ok()?) as usize);
    let (name_size, size) = (word(0)?, word(4)?);
    let name = note.get(12..12usize.checked_add(name_size)?)?;
    let start = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
    let text = note.get(start..start.checked_add(size)?)?;
    let text = text.split(|&b| b == 0).next()?;
    (name.strip_suffix(b"\0").unwrap_or(name) == OWNER).then(|| String::from_utf8(text.to_vec()).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn a_real_elf_file_with_the_note_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (source, library) = (dir.path().join("x.c"), dir.path().join("libcuda.so.550.54.15"));
        let json = r#"{\"Format\": 1, \"CUDA Version\": \"12.4\", \"Driver\": [470, 535]}"#;
        let code = format!(
            "__attribute__((section(\".note.cuda.fwd_compatibility\"), used, aligned(4))) static const struct \
             {{unsigned n, d, t; char name[20]; char desc[{}];}} note = {{19, sizeof \"{json}\", 1, \"NVIDIA Corporation\", \"{json}\"}};",
            json.len()
        );
        std::fs::write(&source, code).unwrap();
        let built = Command::new("cc").args(["-shared", "-o"]).arg(&library).arg(&source).status().unwrap();
        assert!(built.success());
        let text = note(std::fs::File::open(&library).unwrap()).unwrap();
        assert_eq!(text, r#"{"Format": 1, "CUDA Version": "12.4", "Driver": [470, 535]}"#);
        assert_eq!(note(std::fs::File::open("/bin/true").unwrap()), None);
        assert_eq!(note(std::fs::File::open(&source).unwrap()), None);
    }

    proptest! {
        #[test]
        fn no_note_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) { let _ = description(&bytes); }
    }
}
