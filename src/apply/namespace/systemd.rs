//! systemd's rules for the devices of a container's scope. It writes them again at each `systemctl daemon-reload`, from what the
//! engine said at the start and from drop-ins, which it reads then and not before (systemd.unit(5), "DeviceAllow=" of
//! systemd.resource-control(5)).

use crate::{
    error::{Code, OrFail, Result},
    inventory::DeviceNode,
};
use std::{fmt::Write as _, fs, io, path::Path};

/// Where the units of a running system manager get drop-ins; absent where systemd does not run.
pub const UNITS: &str = "/run/systemd/system";

const DROP_IN: &str = "50-gpurun.conf";
/// What the cgroup is named behind, in the drop-in's first line: it says when the drop-in has had its day.
const CGROUP: &str = "# Of the container in ";

/// The cgroup directory of this scope, which `cgroup` is or lies in. A login session is a scope, too, and not ours to restrict, so
/// it must be the container's by its name; and the scopes of a user's manager have no device rules.
pub fn unit<'a>(cgroup: &'a Path, scope: Option<&str>) -> Option<&'a Path> {
    let is_users =
        |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"user@"));
    if cgroup.ancestors().any(is_users) {
        return None;
    }
    let scope = scope?;
    cgroup.ancestors().find(|path| path.file_name().is_some_and(|name| name == scope))
}

/// Writes the drop-in of a unit, below `units`.
///
/// # Errors
/// [`Code::Cgroup`] when it cannot be written.
pub fn allow(units: &Path, unit: &Path, nodes: &[DeviceNode]) -> Result<()> {
    let mut text = format!("{CGROUP}{}\n[Scope]\n", unit.display());
    for node in nodes {
        // systemd finds the numbers by this link; a node's own path may be another one on the host.
        let _ = writeln!(text, "DeviceAllow=/dev/char/{}:{} rwm", node.major, node.minor);
    }
    let mut directory = unit.file_name().unwrap_or_default().to_owned();
    directory.push(".d");
    let directory = units.join(directory);
    fs::create_dir_all(&directory)
        .and_then(|()| fs::write(directory.join(DROP_IN), text))
        .or_fail(Code::Cgroup, || format!("{} cannot be written", directory.join(DROP_IN).display()))
}

/// Removes the drop-ins of containers that are gone.
///
/// # Errors
/// [`Code::Cgroup`] when one cannot be removed.
pub fn forget(units: &Path) -> Result<()> {
    let failed = || format!("old drop-ins in {} cannot be removed", units.display());
    for entry in fs::read_dir(units).or_fail(Code::Cgroup, failed)? {
        let directory = entry.or_fail(Code::Cgroup, failed)?.path();
        let file = directory.join(DROP_IN);
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let cgroup = text.lines().next().and_then(|line| line.strip_prefix(CGROUP));
        if cgroup.is_some_and(|cgroup| !Path::new(cgroup).exists()) {
            gone(fs::remove_file(&file)).or_fail(Code::Cgroup, failed)?;
            gone(fs::remove_dir(&directory)).or_fail(Code::Cgroup, failed)?;
        }
    }
    Ok(())
}

/// Another hook may remove it at the same time, and somebody else may keep a drop-in of his own beside ours.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{ContainerPath, HostPath};

    #[test]
    fn a_scope_of_the_system_manager_is_a_unit() {
        let docker = "/sys/fs/cgroup/system.slice/docker-1.scope";
        let libpod = "/sys/fs/cgroup/machine.slice/libpod-1.scope";
        for (cgroup, scope, found) in [
            (docker, Some("docker-1.scope"), Some(docker)),
            (&*format!("{libpod}/container"), Some("libpod-1.scope"), Some(libpod)),
            (
                "/sys/fs/cgroup/user.slice/user@1.service/user.slice/libpod-1.scope",
                Some("libpod-1.scope"),
                None,
            ),
            ("/sys/fs/cgroup/user.slice/session-3.scope/docker-1", Some("docker-1.scope"), None),
            ("/sys/fs/cgroup/user.slice/session-3.scope/1", None, None),
        ] {
            assert_eq!(unit(Path::new(cgroup), scope), found.map(Path::new), "{cgroup}");
        }
    }

    #[test]
    fn a_drop_in_lives_as_long_as_its_cgroup() {
        let dir = tempfile::tempdir().unwrap();
        let (units, cgroups) = (dir.path().join("units"), dir.path().join("cgroups"));
        let scope = cgroups.join("docker-1.scope");
        for directory in [&units, &scope, &units.join("docker-2.scope.d")] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(units.join("docker-2.scope.d/50-gpurun.conf"), "# somebody else's\n").unwrap();
        let node = |major, minor| DeviceNode {
            path: HostPath("/driver/dev/nvidia0".into()),
            container_path: ContainerPath("/dev/nvidia0".into()),
            major,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        allow(&units, &scope, &[node(195, 0), node(195, 255)]).unwrap();
        allow(&units, &scope, &[node(195, 0), node(195, 255)]).unwrap();
        let file = units.join("docker-1.scope.d/50-gpurun.conf");
        let expected = "[Scope]\nDeviceAllow=/dev/char/195:0 rwm\nDeviceAllow=/dev/char/195:255 rwm\n";
        assert_eq!(fs::read_to_string(&file).unwrap().split_once('\n').unwrap().1, expected);
        forget(&units).unwrap();
        assert!(file.exists());
        fs::remove_dir(&scope).unwrap();
        forget(&units).unwrap();
        assert!(!file.parent().unwrap().exists());
        assert!(units.join("docker-2.scope.d/50-gpurun.conf").exists());
    }
}
