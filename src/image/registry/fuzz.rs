//! Parsers of what registries and their users' files say, for [`crate::fuzz_targets`].

use super::{auth, registries};
use crate::fuzz_targets::text;

/// A file of credentials.
pub(crate) fn auth_file(bytes: &[u8]) {
    auth::fuzz(text(bytes));
}

/// `WWW-Authenticate`, a header a line.
pub(crate) fn headers(bytes: &[u8]) {
    for line in text(bytes).lines() {
        let _ = auth::Challenge::parse(line);
    }
}

/// A registries.conf.
pub(crate) fn registries_conf(bytes: &[u8]) {
    registries::fuzz(text(bytes));
}
