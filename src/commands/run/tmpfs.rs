//! `--tmpfs TARGET[:OPTIONS]`, with the options that Docker accepts (moby, volume/mounts/linux_parser.go).

use super::{mounts::target, sizes::size, usage};
use crate::{apply::container::spec::Volume, error::Result, sys::mount::Flags};

/// Options of a file system in memory with this mode and size.
pub fn options(mode: u32, size: Option<String>) -> Vec<(&'static str, String)> {
    std::iter::once(("mode", format!("{mode:04o}"))).chain(size.map(|size| ("size", size))).collect()
}

/// The mount.
pub fn tmpfs(text: &str) -> Result<Volume> {
    let (path, typed) = text.split_once(':').unwrap_or((text, ""));
    let mut all = options(0o1777, None);
    let mut flags = Flags { read_only: false, nosuid: true, nodev: true, noexec: true };
    let not_a_number = |name: &str| {
        usage(format!("--tmpfs {text:?}: {name} is not a number"))
            .fix(format!("write --tmpfs {path}:{name}=1000"))
    };
    for option in typed.split(',').filter(|_| !typed.is_empty()) {
        let (name, value) = match option.split_once('=') {
            Some(("size", value)) => ("size", tmpfs_size(value)?),
            Some(("mode", value)) => {
                let mode = octal(value).ok_or_else(|| {
                    usage(format!("--tmpfs {text:?}: the mode {value:?} is not octal"))
                        .fix(format!("write octal digits: --tmpfs {path}:mode=1777"))
                })?;
                ("mode", format!("{mode:04o}"))
            }
            Some((name @ ("uid" | "gid"), value)) => {
                let id: u32 = value.parse().map_err(|_| not_a_number(name))?;
                (if name == "uid" { "uid" } else { "gid" }, id.to_string())
            }
            Some((name @ ("nr_inodes" | "nr_blocks"), value)) => {
                let number = size(name, value).map_err(|_| not_a_number(name))?;
                (if name == "nr_inodes" { "nr_inodes" } else { "nr_blocks" }, number.to_string())
            }
            Some(("mpol", value)) if !value.is_empty() => ("mpol", value.to_owned()),
            None if flags.set(option) || TMPFS_DEFAULTS.contains(&option) => continue,
            _ => {
                return Err(usage(format!("--tmpfs {text:?} has the option {option:?}")).fix(
                    "write `--tmpfs TARGET:OPTIONS` with size=, mode=, uid=, gid=, nr_inodes=, nr_blocks=, mpol=, exec, suid or ro",
                ));
            }
        };
        all.retain(|(known, _)| *known != name);
        all.push((name, value));
    }
    Ok(Volume::Tmpfs { target: target("--tmpfs", path)?, options: all, flags })
}

/// Bytes, or a part of memory (tmpfs(5)).
fn tmpfs_size(text: &str) -> Result<String> {
    let percent = text.strip_suffix('%').and_then(|number| number.parse::<u8>().ok());
    match percent.filter(|percent| *percent <= 100) {
        Some(percent) => Ok(format!("{percent}%")),
        None => Ok(size("--tmpfs size", text)?.to_string()),
    }
}

/// Options of `--tmpfs` that have no effect: no other mount is a peer of a new file system, devices on a volume cannot be opened
/// unless the container may open all devices, and times and synchronous writes mean nothing in memory.
const TMPFS_DEFAULTS: [&str; 21] = [
    "defaults",
    "nodev",
    "dev",
    "async",
    "sync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
];

/// Permission bits.
pub fn octal(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}
