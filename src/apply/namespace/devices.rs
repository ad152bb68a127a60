//! The device rules of a container that another runtime started: ours are added, and every other stays as it is.
//!
//! In a v1 hierarchy that is a line in `devices.allow`. In cgroup v2 rules are programs, of which all must allow (so one of ours
//! beside them would allow nothing): each is replaced by itself with our rules in front.

use super::systemd;
use crate::{
    apply::{
        container::cgroup::{Layout, Place, legacy_lines, legacy_mount, write},
        dev_char,
    },
    error::{Code, Error, OrFail, Result},
    inventory::DeviceNode,
    sys::bpf::{DeviceKind, DeviceRule, Extended},
};
use rustix::fd::{AsFd, OwnedFd};
use std::{
    fs::File,
    path::{Path, PathBuf},
};

/// What is to be changed for a container to open its GPUs. Nothing is yet.
#[derive(Debug)]
pub struct Access<'a> {
    nodes: &'a [DeviceNode],
    rules: Vec<DeviceRule>,
    /// The directory in the v1 hierarchy, if it is the container's own.
    legacy: Option<PathBuf>,
    /// Directories in cgroup v2, and the programs for each.
    unified: Vec<(OwnedFd, Vec<Extended>)>,
    /// systemd's unit, by its cgroup's directory.
    unit: Option<PathBuf>,
}

impl<'a> Access<'a> {
    /// Reads the rules of the cgroups that the process `pid` is in. `scope` is systemd's unit, where it made them.
    ///
    /// # Errors
    /// [`Code::Cgroup`] if they cannot be read, or not be extended.
    pub fn read(pid: i32, nodes: &'a [DeviceNode], scope: Option<&str>) -> Result<Self> {
        let rules = nodes.iter().map(rule).collect::<Vec<_>>();
        let place =
            Place::of(pid).or_fail(Code::Cgroup, || format!("the cgroup of process {pid} cannot be read"))?;
        // The root of a hierarchy has no rules.
        let own = |controller| place.path(controller).filter(|path| *path != "/");
        let legacy = match (legacy_mount("devices"), own(Some("devices"))) {
            (Some(mount), Some(path)) => Some(Place::beneath(&mount, path)?),
            _ => None,
        };
        let mut unified = Vec::new();
        let mut lowest = None;
        if let (Some(mount), Some(path)) = (Layout::current().unified(), own(None)) {
            let directory = Place::beneath(&mount, path)?;
            for directory in up_to_unit(&directory, scope) {
                unified.push(extend(directory, &rules)?);
            }
            lowest = Some(directory);
        }
        let unit = [&legacy, &lowest]
            .into_iter()
            .flatten()
            .find_map(|path| systemd::unit(path, scope).map(Path::to_path_buf));
        Ok(Self { nodes, rules, legacy, unified, unit })
    }

    /// Lets the container open its devices, now and after systemd has written its rules again.
    ///
    /// # Errors
    /// [`Code::Cgroup`] when the kernel refuses it.
    pub fn grant(self) -> Result<()> {
        if let Some(directory) = self.legacy {
            let file = directory.join("devices.allow");
            for line in self.rules.iter().flat_map(legacy_lines) {
                write(&file, &line)
                    .or_fail(Code::Cgroup, || format!("{line} cannot be written to {}", file.display()))?;
            }
        }
        for (cgroup, programs) in self.unified {
            for program in programs {
                program.replace(cgroup.as_fd()).or_fail(
                    Code::Cgroup,
                    || "a device program of the container's cgroup cannot be replaced",
                )?;
            }
        }
        let units = Path::new(systemd::UNITS);
        if !units.is_dir() {
            return Ok(());
        }
        systemd::forget(units)?;
        let Some(unit) = self.unit else { return Ok(()) };
        dev_char::link_all(Path::new("/dev/char"), self.nodes)?;
        systemd::allow(units, &unit, self.nodes)
    }
}

fn rule(node: &DeviceNode) -> DeviceRule {
    DeviceRule {
        kind: DeviceKind::Char,
        major: Some(node.major),
        minor: Some(node.minor),
        read: true,
        write: true,
        mknod: true,
    }
}

/// The container's cgroup and those above it that are its own, too: crun makes one below systemd's unit, and each has rules.
fn up_to_unit<'a>(directory: &'a Path, scope: Option<&str>) -> Vec<&'a Path> {
    match systemd::unit(directory, scope) {
        Some(unit) => directory.ancestors().take_while(|path| path.starts_with(unit)).collect(),
        None => vec![directory],
    }
}

fn extend(directory: &Path, rules: &[DeviceRule]) -> Result<(OwnedFd, Vec<Extended>)> {
    let failed = || format!("the device programs of the cgroup {} cannot be extended", directory.display());
    let cgroup: OwnedFd = File::open(directory).or_fail(Code::Cgroup, failed)?.into();
    let programs = Extended::load_all(cgroup.as_fd(), rules).map_err(|error| {
        Error::new(Code::Cgroup, failed())
            .cause(error)
            .fix("let the engine start the container with gpurun-runtime, which needs no change of a cgroup")
    })?;
    Ok((cgroup, programs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_below_a_unit_is_restricted_by_both() {
        let (unit, scope) =
            (Path::new("/sys/fs/cgroup/machine.slice/libpod-1.scope"), Some("libpod-1.scope"));
        let below = unit.join("container");
        assert_eq!(up_to_unit(&below, scope), [&below, unit]);
        assert_eq!(up_to_unit(unit, scope), [unit]);
        assert_eq!(up_to_unit(&below, None), [&below]);
    }
}
