//! Splits the names of a layer's entries.

use super::{MAX_PATH, refused};
use crate::error::Result;
use std::ffi::CString;

/// A name within the root: directory and last component.
pub struct Place {
    /// The directory's name, without slashes around it; empty for the root itself.
    pub parent: Vec<u8>,
    /// The last component.
    pub name: CString,
}

impl Place {
    /// The whole name again.
    pub fn path(&self) -> Vec<u8> {
        join(&self.parent, self.name.to_bytes())
    }

    /// Splits a name; `None` for the root. Absolute names are relative to the root, `./` and doubled slashes are dropped, and `..`
    /// drops the part before it: the root is its own parent. This is Go's `filepath.Clean("/" + name)`, as in Podman and umoci.
    pub fn of(path: &[u8], entry: &[u8]) -> Result<Option<Self>> {
        if path.len() > MAX_PATH {
            let cause = format!("a name of {} bytes; at most {MAX_PATH} can be used", path.len());
            return Err(refused(entry, cause));
        }
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in path.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        if path.contains(&0) {
            return Err(refused(entry, "a name with a NUL"));
        }
        let Some(name) = parts.pop() else { return Ok(None) };
        if parts.iter().any(|part| part.starts_with(b".wh.") && !part.starts_with(b".wh..wh.")) {
            return Err(refused(entry, "something inside a whiteout"));
        }
        Ok(Some(Self { parent: parts.join(&b'/'), name: c_string(name, entry)? }))
    }
}

/// Whether it is a bookkeeping file of aufs. Old layers have them, and they are skipped as in Docker.
pub fn aufs_metadata(name: &[u8]) -> bool {
    name.starts_with(b".wh..wh.") && name != b".wh..wh..opq"
}

/// `parent/name`.
pub fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// Each directory on the way to `path`, with its last component: `a` and `a`, `a/b` and `b`. Empty for the root.
pub fn prefixes(path: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let mut start = 0;
    ends.chain((!path.is_empty()).then_some(path.len())).map(move |end| {
        let name = &path[start..end];
        start = end + 1;
        (&path[..end], name)
    })
}

pub fn c_string(bytes: &[u8], entry: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| refused(entry, "a name with a NUL"))
}
