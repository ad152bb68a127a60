//! The host's file systems, for the image `host:`.

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

/// The mount points below `/` that hold files, from the text of mountinfo (proc(5)), outermost first.
pub fn host_mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(kind)) = (before.split(' ').nth(4), after.split(' ').next()) else { continue };
        // Octal escapes stand for space, tab, newline and backslash.
        let point =
            point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
        let outside = [
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
        if point != "/"
            && !NOT_FILES.contains(&kind)
            && !outside.iter().any(|o| Path::new(&point).starts_with(o))
        {
            points.push(point.into());
        }
    }
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

    #[test]
    fn mounts_of_kernel_file_systems_are_left_out() {
        let text = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /home\\040x rw - xfs /dev/b rw\n3 1 0:5 / /proc rw - proc p rw\n\
                    4 2 8:3 / /home\\040x/y rw - ext4 c rw\n5 1 0:9 / /run rw - tmpfs t rw\nbroken";
        assert_eq!(host_mounts(text), [PathBuf::from("/home x")]);
    }
}
