//! /proc/PID/mountinfo (proc_pid_mountinfo(5)).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

/// Where the mount of this number is mounted, if it has peers or may have: the optional field `shared:N`.
pub fn shared_mount_point(table: &[u8], id: u64) -> Option<PathBuf> {
    let id = id.to_string();
    let line = table
        .split(|&byte| byte == b'\n')
        .find(|line| line.split(|&byte| byte == b' ').next() == Some(id.as_bytes()))?;
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
    let mut fields = line.split(|&byte| byte == b' ').skip(4);
    let mount_point = fields.next()?;
    let is_shared = fields.take_while(|field| *field != b"-").any(|field| field.starts_with(b"shared:"));
    is_shared.then(|| OsString::from_vec(unescaped(mount_point)).into())
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file system's device numbers.
    pub device: (u32, u32),
    /// The mounted directory of the file system: `/` for the whole file system.
    pub root: PathBuf,
    /// The mount point.
    pub mount_point: PathBuf,
    /// Whether the mount or the file system is read-only.
    pub read_only: bool,
    /// `tmpfs`, `overlay`, `proc`
    pub filesystem: String,
}

/// The lines of the table, in the order of the mounts.
pub fn entries(table: &[u8]) -> impl Iterator<Item = Entry> {
    table.split(|&byte| byte == b'\n').filter_map(entry)
}

fn entry(line: &[u8]) -> Option<Entry> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let path = |field: &[u8]| PathBuf::from(OsString::from_vec(unescaped(field)));
    let is_read_only = |field: &[u8]| field.split(|&byte| byte == b',').any(|option| option == b"ro");
    let mut fields = line.split(|&byte| byte == b' ').skip(2);
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let (root, mount_point) = (path(fields.next()?), path(fields.next()?));
    let read_only = is_read_only(fields.next()?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let filesystem = text(fields.next()?);
    let read_only = read_only || fields.nth(1).is_some_and(is_read_only);
    Some(Entry { device, root, mount_point, read_only, filesystem })
}

/// The kernel writes blank, tab, newline and backslash as `\040`: three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, behind)) = rest.split_first() {
        let digits = behind
            .get(..3)
            .filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        let value = digits.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        bytes.push(value.unwrap_or(first));
        rest = if value.is_some() { &behind[3..] } else { behind };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    const TABLE: &[u8] = b"22 67 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        36 22 0:40 /a /usr/lo\\040cal\\134x rw master:7 shared:12 - tmpfs shared:1 rw\n\
        37 22 0:41 / /proc rw master:7 - proc shared:1 rw\n\
        3 22 0:42 / /dev rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_mount_has_peers_where_an_optional_field_says_so() {
        for (id, path) in [(22, Some("/")), (36, Some("/usr/lo cal\\x")), (37, None), (3, None), (2, None)] {
            assert_eq!(shared_mount_point(TABLE, id).as_deref(), path.map(Path::new), "{id}");
        }
        assert!(shared_mount_point(&std::fs::read("/proc/self/mountinfo").unwrap(), 0).is_none());
    }

    #[test]
    fn a_line_has_device_root_mount_point_and_type() {
        let entries: Vec<_> = entries(TABLE).collect();
        assert_eq!(entries.len(), 4);
        let expected = Entry {
            device: (0, 40),
            root: "/a".into(),
            mount_point: "/usr/lo cal\\x".into(),
            read_only: false,
            filesystem: "tmpfs".into(),
        };
        assert_eq!(entries[1], expected);
        let read_only: Vec<_> =
            super::entries(b"1 2 0:1 / /a ro - ext4 /dev/x rw\n1 2 0:1 / /b rw - ext4 /dev/x ro,x\n")
                .map(|entry| entry.read_only)
                .collect();
        assert_eq!(read_only, [true, true]);
    }

    proptest! {
        #[test]
        fn any_table_is_read(table: Vec<u8>) {
            let _ = (shared_mount_point(&table, 1), unescaped(&table), entries(&table).count());
        }
    }
}
