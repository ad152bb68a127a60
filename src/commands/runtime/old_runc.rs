//! Checks for old versions of runc, with which a hostile container can create files on the host (CVE-2024-45310).
//!
//! runc before 1.1.14 and 1.2.0-rc.3 makes mount points on a volume by path. A container that renames directories of a shared
//! volume meanwhile redirects it to other host paths. A CDI spec has one mount for each driver file; gpurun-runtime has only
//! one mount, and makes no mount points on a volume.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The first release that is not affected.
const FIXED: (u32, u32, u32) = (1, 1, 14);
/// Where packages and engines install runc.
const PATHS: [&str; 5] = [
    "/usr/bin/runc",
    "/usr/sbin/runc",
    "/usr/local/bin/runc",
    "/usr/local/sbin/runc",
    "/usr/libexec/crio/runc",
];

/// The affected programs and their versions.
pub fn find() -> Vec<(PathBuf, String)> {
    let mut found: Vec<(PathBuf, String)> = Vec::new();
    for path in PATHS.map(Path::new) {
        let Ok(real) = std::fs::canonicalize(path) else { continue };
        let Ok(output) = Command::new(&real).arg("--version").env_clear().output() else { continue };
        let Some(version) = version(&String::from_utf8_lossy(&output.stdout)) else { continue };
        if is_old(&version) && found.iter().all(|(known, _)| *known != real) {
            found.push((real, version));
        }
    }
    found
}

/// The first line is `runc version 1.1.5+ds1`.
fn version(output: &str) -> Option<String> {
    output.lines().next()?.strip_prefix("runc version ").map(str::to_owned)
}

/// Compares release numbers only: distributions may have patched an old release without changing its number.
fn is_old(version: &str) -> bool {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    let mut numbers = version[..end].split('.').map(|number| number.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else { return false };
    let patch = numbers.next().flatten().unwrap_or(0);
    let is_early_candidate = (major, minor, patch) == (1, 2, 0)
        && ["-rc.1", "-rc.2"].iter().any(|rc| version[end..].starts_with(rc));
    (major, minor, patch) < FIXED || is_early_candidate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_before_the_fix_are_old() {
        for (version, old) in [
            ("1.1.5+ds1", true),
            ("1.0.0-rc93", true),
            ("1.1.13", true),
            ("1.1.14", false),
            ("1.1.15-0ubuntu1", false),
            ("1.2.0-rc.2", true),
            ("1.2.0-rc.3", false),
            ("1.3.6", false),
            ("unknown", false),
            ("", false),
        ] {
            assert_eq!(is_old(version), old, "{version}");
        }
        assert_eq!(version("runc version 1.1.5+ds1\ncommit: x\n").as_deref(), Some("1.1.5+ds1"));
        assert_eq!(version("crun version 1.28\n"), None);
    }
}
