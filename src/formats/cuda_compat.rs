//! The note by which a `libcuda.so` of a cuda-compat package says on which drivers it runs: ELF section
//! `.note.cuda.fwd_compatibility`, owner "NVIDIA Corporation", a JSON object as its description.

use object::{
    Endianness,
    elf::FileHeader64,
    read::{
        ReadCache,
        elf::{FileHeader, SectionHeader},
    },
};

const SECTION: &[u8] = b".note.cuda.fwd_compatibility";
const OWNER: &[u8] = b"NVIDIA Corporation";
/// The notes seen have some hundred bytes.
const MAX_NOTE: u64 = 64 << 10;
/// A library has some dozens; the header's own field ends at 65,279, and what is beyond it a sparse file can promise for free.
const MAX_SECTIONS: u32 = 10_000;

/// The note of this library; `None` if it has none or is not an ELF file.
pub fn note(library: std::fs::File) -> Option<String> {
    let cache = ReadCache::new(library);
    // Headers and this one section are read. What reads the symbols, too, takes as much memory as an image's file says.
    let header = FileHeader64::<Endianness>::parse(&cache).ok()?;
    let endian = header.endian().ok()?;
    if header.shnum(endian, &cache).ok()? > MAX_SECTIONS {
        return None;
    }
    let sections = header.sections(endian, &cache).ok()?;
    let (_, section) = sections.section_by_name(endian, SECTION)?;
    if section.sh_size(endian) > MAX_NOTE {
        return None;
    }
    description(section.data(endian, &cache).ok()?)
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

    #[test]
    fn neither_symbols_nor_endless_sections_are_read() {
        let names = b"\0.note.cuda.fwd_compatibility\0";
        let mut content = Vec::new();
        for word in [19_u32, 2, 1] {
            content.extend(word.to_le_bytes());
        }
        content.extend(b"NVIDIA Corporation\0\0{}");
        let found = |sections: u64| {
            let mut bytes = vec![0; 1024];
            let mut put = |at: usize, word: &[u8]| bytes[at..at + word.len()].copy_from_slice(word);
            put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
            // e_type and e_machine, e_shoff, e_ehsize, e_shentsize, e_shstrndx. e_shnum stays 0: the first section's size is it.
            for (at, byte) in [(16, 3), (18, 62), (20, 1), (40, 64), (52, 64), (58, 64), (62, 2)] {
                put(at, &[byte]);
            }
            put(64 + 32, &sections.to_le_bytes());
            // sh_name, sh_type, sh_offset, sh_size, sh_link, sh_entsize: SHT_SYMTAB without end, SHT_STRTAB, SHT_NOTE.
            let mut section = |at: usize, [name, kind, offset, size, link, entry]: [u64; 6]| {
                put(at, &name.to_le_bytes()[..4]);
                put(at + 4, &kind.to_le_bytes()[..4]);
                put(at + 24, &offset.to_le_bytes());
                put(at + 32, &size.to_le_bytes());
                put(at + 40, &link.to_le_bytes()[..4]);
                put(at + 56, &entry.to_le_bytes());
            };
            section(128, [0, 2, 512, 24 << 50, 2, 24]);
            section(192, [0, 3, 512, names.len() as u64, 0, 0]);
            section(256, [1, 7, 640, content.len() as u64, 0, 0]);
            put(512, names);
            put(640, &content);
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            file.as_file().set_len(64 << 20).unwrap();
            note(std::fs::File::open(file.path()).unwrap())
        };
        assert_eq!(found(4).as_deref(), Some("{}"));
        assert_eq!(found(MAX_SECTIONS.into()).as_deref(), Some("{}"));
        assert_eq!(found(u64::from(MAX_SECTIONS) + 1), None);
    }

    proptest! {
        #[test]
        fn no_note_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) { let _ = description(&bytes); }
    }
}
