//! `--device`, `--device-cgroup-rule`, and the devices of `--privileged`.

use super::usage;
use crate::{
    apply::container::spec::HostDevice,
    cli::Run,
    error::{Code, Error, OrFail, Result},
    inventory::{ContainerPath, DeviceNode, HostPath},
    request::DeviceId,
    sys::bpf::{DeviceKind, DeviceRule},
};
use rustix::fs::{FileType, Stat};
use std::path::{Path, PathBuf};

/// A request of `--device`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// NVIDIA GPUs, by the part of their CDI names behind `nvidia.com/gpu=`.
    pub gpus: Vec<String>,
    /// Nodes of the host.
    pub nodes: Vec<HostDevice>,
}

/// Parses `--device`; a directory means every device in it.
///
/// # Errors
/// [`Code::Usage`] for a word that is neither a CDI name nor a path, [`Code::DeviceNodeMissing`] for a path that is not a
/// device.
pub fn devices(args: &Run) -> Result<Devices> {
    let mut devices = Devices::default();
    for text in &args.device {
        match text.split_once('=') {
            None if text == "nvidia.com/gpu" => {
                return Err(usage(format!("--device {text} names no GPU"))
                    .fix("write --device nvidia.com/gpu=all or --device nvidia.com/gpu=0; `gpurun ls` lists the GPUs"));
            }
            Some(("nvidia.com/gpu", name)) => {
                let is_known = |one: &str| matches!(one, "all" | "none") || one.parse::<DeviceId>().is_ok();
                if !name.split(',').all(is_known) {
                    return Err(usage(format!("--device {text}: {name:?} is not a GPU's name")).fix(
                        "write --device nvidia.com/gpu=0, =all, =GPU-… or =0:1 (MIG); `gpurun ls` lists the GPUs",
                    ));
                }
                devices.gpus.push(name.to_owned());
            }
            Some((kind, _)) if !text.starts_with('/') && kind.contains('/') => {
                return Err(usage(format!("--device {text}: gpurun injects NVIDIA GPUs, and no other CDI devices"))
                    .fix("name the device nodes: --device /dev/…; or start it with Podman or Docker, which read CDI specs"));
            }
            _ => devices.nodes.extend(device(text)?),
        }
    }
    if args.privileged {
        let mut all = Vec::new();
        below(Path::new("/dev"), Path::new("/dev"), (true, true, true), 0, &mut all)?;
        all.retain(|node| {
            !devices.nodes.iter().any(|named| named.node.container_path == node.node.container_path)
        });
        devices.nodes.extend(all);
    }
    Ok(devices)
}

/// `HOST[:CONTAINER[:PERMISSIONS]]`; the second word may be the permissions.
fn device(text: &str) -> Result<Vec<HostDevice>> {
    let bad = |why: &str| {
        usage(format!("--device {text:?}: {why}"))
            .fix("write --device /dev/X, --device /dev/X:/dev/Y or --device /dev/X:/dev/Y:rwm; or a CDI name, nvidia.com/gpu=0")
    };
    let fields: Vec<&str> = text.split(':').collect();
    let (host, inside, access_word) = match fields.as_slice() {
        [host] => (*host, *host, "rwm"),
        [host, word] if word.starts_with('/') => (*host, *word, "rwm"),
        [host, word] => (*host, *host, *word),
        [host, inside, word] => (*host, *inside, *word),
        _ => return Err(bad("it has too many colons")),
    };
    let allowed = access(access_word).ok_or_else(|| bad("the permissions are some of r, w and m"))?;
    let absolute =
        |path: &str| path.starts_with('/') && !path.split('/').any(|part| part == "..") && path.len() > 1;
    if !absolute(host) || !absolute(inside) {
        return Err(bad("its paths begin with / and have no .."));
    }
    let (host, inside) = (Path::new(host), Path::new(inside));
    let stat = rustix::fs::stat(host)
        .or_fail(Code::DeviceNodeMissing, || format!("--device {text}: {} cannot be read", host.display()))
        .map_err(|error| {
            error.fix(format!(
                "`ls -l {}` on the host; load the device's driver, or correct the path",
                host.display()
            ))
        })?;
    if FileType::from_raw_mode(stat.st_mode).is_dir() {
        let mut all = Vec::new();
        below(host, inside, allowed, 0, &mut all)?;
        if all.is_empty() {
            return Err(Error::new(
                Code::DeviceNodeMissing,
                format!("--device {text}: {} holds no device", host.display()),
            )
            .fix(format!("to mount a directory write -v {0}:{0}", host.display())));
        }
        return Ok(all);
    }
    let node = node(host, inside, &stat, allowed).ok_or_else(|| {
        Error::new(Code::DeviceNodeMissing, format!("--device {text}: {} is not a device", host.display()))
            .fix(format!("to mount a file write -v {0}:{0}", host.display()))
    })?;
    Ok(vec![node])
}

type Access = (bool, bool, bool);

fn access(text: &str) -> Option<Access> {
    let known = !text.is_empty() && text.chars().all(|c| "rwm".contains(c));
    known.then(|| (text.contains('r'), text.contains('w'), text.contains('m')))
}

fn node(host: &Path, inside: &Path, stat: &Stat, (read, write, mknod): Access) -> Option<HostDevice> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => DeviceKind::Char,
        FileType::BlockDevice => DeviceKind::Block,
        _ => return None,
    };
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    Some(HostDevice {
        node: DeviceNode {
            path: HostPath(host.into()),
            container_path: ContainerPath(inside.into()),
            major,
            minor,
            mode: stat.st_mode & 0o777,
            uid: stat.st_uid,
            gid: stat.st_gid,
        },
        kind,
        rule: DeviceRule { kind, major: Some(major), minor: Some(minor), read, write, mknod },
    })
}

/// The devices in a directory, without those that every container has (runc, devices.GetDevices).
fn below(host: &Path, inside: &Path, access: Access, depth: u32, all: &mut Vec<HostDevice>) -> Result<()> {
    const OWN: [&str; 15] = [
        "pts",
        "shm",
        "fd",
        "mqueue",
        ".lxc",
        ".lxd-mounts",
        ".udev",
        "console",
        "null",
        "zero",
        "full",
        "tty",
        "random",
        "urandom",
        "ptmx",
    ];
    const DEEPEST: u32 = 8;
    let entries = std::fs::read_dir(host)
        .or_fail(Code::DeviceNodeMissing, || format!("{} cannot be read", host.display()))
        .map_err(|error| {
            error.fix(format!("name the devices that you may use: --device {}/…", host.display()))
        })?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.file_name().into()).collect();
    names.sort();
    for name in names {
        if inside == Path::new("/dev") && OWN.iter().any(|own| name == Path::new(own)) {
            continue;
        }
        // Links are left out, because their targets have their own names.
        let Ok(stat) = rustix::fs::lstat(host.join(&name)) else { continue };
        if FileType::from_raw_mode(stat.st_mode).is_dir() {
            if depth < DEEPEST {
                below(&host.join(&name), &inside.join(&name), access, depth + 1, all)?;
            }
        } else {
            all.extend(node(&host.join(&name), &inside.join(&name), &stat, access));
        }
    }
    Ok(())
}

/// `--device-cgroup-rule 'c 10:* rwm'`
pub fn rules(args: &Run) -> Result<Vec<DeviceRule>> {
    args.device_cgroup_rule.iter().map(|text| rule(text)).collect()
}

fn rule(text: &str) -> Result<DeviceRule> {
    let bad = || {
        usage(format!("--device-cgroup-rule {text:?} cannot be understood"))
            .fix("write KIND MAJOR:MINOR ACCESS: --device-cgroup-rule 'c 10:* rwm' (kinds are a, b, c; * is any number)")
    };
    let words: Vec<&str> = text.split(' ').collect();
    let [kind, numbers, access_text] = words.as_slice() else { return Err(bad()) };
    let kind = match *kind {
        "a" => DeviceKind::All,
        "b" => DeviceKind::Block,
        "c" => DeviceKind::Char,
        _ => return Err(bad()),
    };
    let (major, minor) = numbers.split_once(':').ok_or_else(bad)?;
    let number = |text: &str| match text {
        "*" => Ok(None),
        _ if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().map(Some).map_err(|_| bad()),
        _ => Err(bad()),
    };
    let (read, write, mknod) = access(access_text).ok_or_else(bad)?;
    Ok(DeviceRule { kind, major: number(major)?, minor: number(minor)?, read, write, mknod })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;

    #[test]
    fn devices_are_dockers_and_cdis() {
        let of = |words: &[&str]| devices(&run(words)).unwrap();
        assert_eq!(
            of(&["--device", "nvidia.com/gpu=all", "--device=nvidia.com/gpu=GPU-1"]).gpus,
            ["all", "GPU-1"]
        );
        let null = of(&["--device", "/dev/null:/dev/nothing:r"]).nodes.remove(0);
        assert_eq!((null.node.major, null.node.minor, null.kind), (1, 3, DeviceKind::Char));
        assert_eq!(null.node.container_path.0, Path::new("/dev/nothing"));
        assert_eq!((null.rule.read, null.rule.write, null.rule.mknod), (true, false, false));
        assert_eq!(of(&["--device", "/dev/null:rw"]).nodes[0].node.container_path.0, Path::new("/dev/null"));
        for text in [
            "/dev/absent",
            "/etc/passwd",
            "null",
            "/dev/null:x",
            "/dev/null:/a:x",
            "/dev/null:/a:r:w",
            "/dev/null:ro",
            "/dev/null:",
            "nvidia.com/gpu",
            "nvidia.com/gpu=",
            "amd.com/gpu=0",
            "nvidia.com/gpu=zzz",
            "/dev/../dev/null",
            "/etc",
        ] {
            let error = devices(&run(&["--device", text])).unwrap_err();
            assert!(!error.fix_line().is_empty(), "{text}: {error}");
        }
    }

    #[test]
    fn rules_are_the_kernels() {
        let of = |text: &str| rule(text).unwrap();
        let any = of("c 10:* rwm");
        assert_eq!((any.kind, any.major, any.minor, any.mknod), (DeviceKind::Char, Some(10), None, true));
        assert_eq!(of("a *:* r").kind, DeviceKind::All);
        for text in ["", "c 10:* x", "d 1:1 r", "c 10 r", "c 10:*", "c +1:1 r", "c 1:1  r"] {
            assert!(!rule(text).unwrap_err().fix_line().is_empty(), "{text}");
        }
    }
}
