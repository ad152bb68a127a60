//! Parsers of images, for [`crate::fuzz_targets`].

use super::{manifest, tar::Reader};

/// Reads an archive: every entry with its data.
pub(crate) fn tar(bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    while let Ok(Some(_)) = reader.next_entry() {
        while matches!(reader.data(4096, |_| Ok(())), Ok(read) if read > 0) {}
    }
}

/// Parses indexes, manifests and configurations.
pub(crate) fn documents(bytes: &[u8]) {
    manifest::fuzz(bytes);
}
