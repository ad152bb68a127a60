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

/// Where the file system with these device numbers is mounted, by the whole of it or a part.
pub fn mount_points(table: &[u8], (major, minor): (u32, u32)) -> impl Iterator<Item = PathBuf> {
    let device = format!("{major}:{minor}");
    table.split(|&byte| byte == b'\n').filter_map(move |line| {
        let mut fields = line.split(|&byte| byte == b' ').skip(2);
        let is_it = fields.next()? == device.as_bytes();
        let mount_point = fields.nth(1).filter(|_| is_it)?;
        Some(OsString::from_vec(unescaped(mount_point)).into())
    })
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
    fn a_file_system_is_where_its_device_is_mounted() {
        let of = |device| mount_points(TABLE, device).collect::<Vec<_>>();
        assert_eq!(of((0, 40)), [Path::new("/usr/lo cal\\x")]);
        assert_eq!(of((254, 0)), [Path::new("/")]);
        assert!(of((0, 4)).is_empty());
    }

    proptest! {
        #[test]
        fn any_table_is_read(table: Vec<u8>) {
            let _ = (shared_mount_point(&table, 1), unescaped(&table), mount_points(&table, (0, 1)).count());
        }
    }
}
