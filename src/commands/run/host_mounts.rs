//! The host's file systems, for the image `host:`.

use crate::formats::mountinfo;
use std::path::{Path, PathBuf};

/// File systems that show kernel or machine state instead of storing files.
const NOT_FILES: [&str; 22] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "pstore",
    "bpf",
    "configfs",
    "fusectl",
    "hugetlbfs",
    "autofs",
    "binfmt_misc",
    "efivarfs",
    "rpc_pipefs",
    "nsfs",
    "ramfs",
    "tmpfs",
];

/// Directories that a container has of its own, or that hold what is not for it.
const OUTSIDE: [&str; 9] = [
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/var/lib/gpurun",
    "/var/lib/docker",
    "/var/lib/containers",
    "/etc",
];

/// The mount points below `/` that hold files, from the bytes of mountinfo (proc_pid_mountinfo(5)), outermost first.
pub fn host_mounts(table: &[u8]) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo::entries(table)
        .filter(|entry| !NOT_FILES.contains(&entry.filesystem.as_str()))
        .map(|entry| entry.mount_point)
        .filter(|point| point != Path::new("/") && !OUTSIDE.iter().any(|outside| point.starts_with(outside)))
        .collect();
    points.sort_by_key(|point| point.components().count());
    // Binds are recursive, so nested mounts are included.
    let mut kept: Vec<PathBuf> = Vec::new();
    for point in points {
        if !kept.iter().any(|outer| point.starts_with(outer)) {
            kept.push(point);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    #[test]
    fn mounts_of_kernel_file_systems_are_left_out() {
        let text = b"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /home\\040x rw - xfs /dev/b rw\n3 1 0:5 / /proc rw - proc p rw\n\
                    4 2 8:3 / /home\\040x/y rw - ext4 c rw\n5 1 0:9 / /run rw - tmpfs t rw\nbroken\n\
                    6 1 8:4 / /m\xfcsik rw - ext4 d rw\n";
        assert_eq!(host_mounts(text), [Path::new("/home x"), Path::new(OsStr::from_bytes(b"/m\xfcsik"))]);
    }
}
