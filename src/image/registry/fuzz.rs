//! Parsers of registries' responses and users' files, for [`crate::fuzz_targets`].

use super::{
    address::Address,
    auth_file::{self, Entry, Secret},
    challenge::Challenge,
    registries, retry_after,
};
use crate::fuzz_targets::text;

/// A file of credentials.
pub(crate) fn auth_file(bytes: &[u8]) {
    for (host, repository) in [("r.example:5000", "a/b"), ("docker.io", "library/a"), ("", "")] {
        for legacy in [false, true] {
            match auth_file::look_up(bytes, legacy, host, repository) {
                Ok(Some(Entry::Secret(Secret::Password { user, password }))) => {
                    assert!(!user.is_empty() && !password.is_empty());
                }
                Ok(Some(Entry::Helper(name) | Entry::Store(name))) => assert!(!name.is_empty()),
                _ => {}
            }
        }
    }
}

/// `WWW-Authenticate` or `Location`, one header per line.
///
/// # Panics
/// If an address or a quoted realm does not read back as it was written.
pub(crate) fn headers(bytes: &[u8]) {
    let base = Address::parse("https://r.example:5000/v2/a/b/blobs/x?y=z").expect("an address");
    for line in text(bytes).lines() {
        let _ = Challenge::choose([line]);
        let _ = retry_after::seconds(line, 1_700_000_000);
        let quoted = line.replace('\\', r"\\").replace('"', "\\\"");
        let header = format!("Bearer scope=pull,realm=\"{quoted}\",service=\"{quoted}\"");
        let (scope, service) = (Some("pull".to_owned()), Some(line.to_owned()));
        let expected = Challenge::Bearer { realm: line.to_owned(), service, scope };
        assert_eq!(Challenge::choose([header.as_str()]), (!line.is_empty()).then_some(expected));

        for address in [base.join(line), Address::parse(line)].into_iter().flatten() {
            let written = address.with_query([("next", line)]).to_string();
            assert!(written.bytes().all(|byte| byte.is_ascii_graphic()), "{written:?} cannot be sent");
            for address in [address.clone(), Address::parse(&written).expect("an address")] {
                let written = address.to_string();
                assert_eq!(Address::parse(&written).as_ref(), Ok(&address));
                let after = &written[address.origin().to_string().len()..];
                assert!(after.starts_with('/'), "{written:?}: the path could be a part of the host");
                let path = after.split('?').next().unwrap_or_default();
                assert!(!path.split('/').any(|part| matches!(part, "." | "..")), "{written:?}");
            }
        }
    }
}

/// A registries.conf.
pub(crate) fn registries_conf(bytes: &[u8]) {
    registries::fuzz(text(bytes));
}
