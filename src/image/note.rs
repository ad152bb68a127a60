//! Notes of unpacked layers: facts that depend on the layers below.
//!
//! A layer is unpacked alone and shared between images, so it cannot know what lies below it. Three facts depend on that, and
//! [`super::stack`] decides them for each image: the attributes of a directory that the layer does not name, whether a directory
//! that only whiteouts mention exists, and whether overlayfs hides the whiteouts of a directory.
//!
//! A note also marks a layer as made by gpurun, for [`super::store`].

use super::unpack::MAX_PATH;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The first line of a note.
const HEAD: &[u8] = b"gpurun layer 1\n";
/// The longest note, in bytes: some 200,000 directories.
pub const MAX_NOTE: usize = 4 << 20;
/// The bound on the names that all layers keep in memory while they are unpacked, in bytes.
const MAX_KEPT: usize = 64 << 20;
/// The bytes of names in use in this process.
static KEPT: AtomicUsize = AtomicUsize::new(0);

/// The reason why a directory is in a note.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// The layer adds entries to the directory without an entry for the directory itself.
    Unnamed,
    /// The layer only removes entries from the directory.
    Whiteouts,
    /// The directory holds whiteouts.
    Hides,
}

impl Fact {
    const ALL: [Self; 3] = [Self::Unnamed, Self::Whiteouts, Self::Hides];

    fn byte(self) -> u8 {
        match self {
            Self::Unnamed => b'u',
            Self::Whiteouts => b'w',
            Self::Hides => b'h',
        }
    }
}

/// Directories of a layer that depend on the layers below.
#[derive(Debug, Default)]
pub struct Note(PathList);

impl From<()> for Note {
    fn from((): ()) -> Self {
        Self::default()
    }
}

impl Note {
    /// Adds a directory by its path from the layer's root; `false` if the note would become too long.
    #[must_use]
    pub fn add(&mut self, fact: Fact, path: &[u8]) -> bool {
        self.0.push(fact.byte(), path) && self.0.coded.len() < MAX_NOTE
    }

    /// The format in the store.
    pub fn to_bytes(&self) -> Vec<u8> {
        [HEAD, &self.0.coded].concat()
    }

    /// Parses a note of the store; `None` if the bytes are not a note.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut note = Self::default();
        note.0.coded = bytes.strip_prefix(HEAD)?.to_vec();
        let mut known = true;
        let whole = note.0.each(|byte, _| {
            known &= Fact::ALL.iter().any(|fact| fact.byte() == byte);
            Some(())
        });
        (known && whole.is_some()).then_some(note)
    }

    /// Calls `visit` with each directory, in the order in which they were added, until it returns `None`.
    pub fn each(&self, mut visit: impl FnMut(Fact, &[u8]) -> Option<()>) -> Option<()> {
        self.0.each(|byte, path| {
            let fact = Fact::ALL.into_iter().find(|fact| fact.byte() == byte)?;
            visit(fact, path)
        })
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.0.coded.len()
    }
}

/// Prefix-compressed paths, each with a tag byte. Consecutive paths of an archive share long prefixes, so 150,000 paths of
/// 4,000 bytes fit in some MB.
#[derive(Debug, Default)]
pub struct PathList {
    coded: Vec<u8>,
    last: Vec<u8>,
    reserved: usize,
}

impl PathList {
    /// Adds a path with the caller's `tag`; `false` if all lists of this process exceed their bound.
    #[must_use]
    pub fn push(&mut self, tag: u8, path: &[u8]) -> bool {
        let shared = self.last.iter().zip(path).take_while(|(one, other)| one == other).count();
        let (Ok(before), Ok(after)) = (u16::try_from(shared), u16::try_from(path.len() - shared)) else {
            return false;
        };
        let added = 5 + usize::from(after);
        if KEPT.fetch_add(added, Ordering::Relaxed) + added > MAX_KEPT {
            KEPT.fetch_sub(added, Ordering::Relaxed);
            return false;
        }
        self.reserved += added;
        self.coded.push(tag);
        self.coded.extend_from_slice(&before.to_le_bytes());
        self.coded.extend_from_slice(&after.to_le_bytes());
        self.coded.extend_from_slice(&path[shared..]);
        self.last.truncate(shared);
        self.last.extend_from_slice(&path[shared..]);
        true
    }

    /// Calls `visit` with each path, in order, until it returns `None`. Also returns `None` if the bytes are damaged.
    pub fn each(&self, mut visit: impl FnMut(u8, &[u8]) -> Option<()>) -> Option<()> {
        let mut path = Vec::new();
        let mut rest = self.coded.as_slice();
        while let Some((head, after)) = rest.split_first_chunk::<5>() {
            let number = |low: usize| usize::from(u16::from_le_bytes([head[low], head[low + 1]]));
            let (shared, length) = (number(1), number(3));
            if shared > path.len() || shared + length > MAX_PATH {
                return None;
            }
            path.truncate(shared);
            path.extend_from_slice(after.get(..length)?);
            rest = &after[length..];
            visit(head[0], &path)?;
        }
        rest.is_empty().then_some(())
    }
}

impl Drop for PathList {
    fn drop(&mut self) {
        KEPT.fetch_sub(self.reserved, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_note_is_read_as_it_was_written(paths in proptest::collection::vec((0_usize..3, "[ab/]{0,12}"), 0..40)) {
            let mut note = Note::default();
            for (fact, path) in &paths {
                assert!(note.add(Fact::ALL[*fact], path.as_bytes()));
            }
            let mut read = Vec::new();
            let bytes = note.to_bytes();
            Note::from_bytes(&bytes).unwrap().each(|fact, path| {
                read.push((fact, path.to_vec()));
                Some(())
            }).unwrap();
            let written: Vec<_> = paths.iter().map(|(fact, path)| (Fact::ALL[*fact], path.clone().into_bytes())).collect();
            prop_assert_eq!(read, written);
        }

        #[test]
        fn damaged_notes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = Note::from_bytes(&[HEAD, &bytes].concat());
        }
    }

    #[test]
    fn deep_paths_with_one_parent_stay_short() {
        let mut list = PathList::default();
        let parent = "a/".repeat(1500);
        for n in 0..20_000 {
            assert!(list.push(0, format!("{parent}{n}").as_bytes()));
        }
        assert!(list.coded.len() < 20_000 * 12 + 4000, "{}", list.coded.len());
    }
}
