//! Parsers of registries' responses and users' files, for [`crate::fuzz_targets`].

use super::{address::Address, auth_file, challenge::Challenge, registries};
use crate::fuzz_targets::text;

/// A file of credentials.
pub(crate) fn auth_file(bytes: &[u8]) {
    for (host, repository) in [("r.example:5000", "a/b"), ("docker.io", "library/a"), ("", "")] {
        for legacy in [false, true] {
            let _ = auth_file::look_up(bytes, legacy, host, repository);
        }
    }
}

/// `WWW-Authenticate` or `Location`, a header a line.
pub(crate) fn headers(bytes: &[u8]) {
    let base = Address::parse("https://r.example:5000/v2/a/b/blobs/x");
    for line in text(bytes).lines() {
        let _ = Challenge::choose([line]);
        let _ = super::retry_after::seconds(line, 1_700_000_000);
        let _ = base.as_ref().map(|base| base.join(line));
    }
}

/// A registries.conf.
pub(crate) fn registries_conf(bytes: &[u8]) {
    registries::fuzz(text(bytes));
}
