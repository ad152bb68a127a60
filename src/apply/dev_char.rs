//! The links `/dev/char/MAJOR:MINOR` to device nodes, by which systemd finds the devices that a unit may use.
//!
//! A runtime with the systemd cgroup driver names a container's devices to systemd by these links, and leaves out what has none
//! (runc, libcontainer/cgroups/systemd). The kernel makes them for devices of its driver model, which NVIDIA's are not. Without
//! them a container works until `systemctl daemon-reload` lets systemd set the rules of its unit anew.

use crate::{
    error::{Code, OrFail, Result},
    inventory::DeviceNode,
};
use rustix::{
    fs::{CWD, Mode},
    io::Errno,
};
use std::{os::unix::ffi::OsStrExt, path::Path};

/// Makes the links in `directory` (`/dev/char`) that are absent or lead elsewhere, and says which it made.
///
/// # Errors
/// [`Code::DeviceNodeMissing`] if one cannot be made.
pub fn link_all(directory: &Path, nodes: &[DeviceNode]) -> Result<Vec<String>> {
    let mut made = Vec::new();
    for node in nodes {
        let name = format!("{}:{}", node.major, node.minor);
        if link(&directory.join(&name), &node.path.0).or_fail(Code::DeviceNodeMissing, || {
            format!("the link {}/{name} cannot be made", directory.display())
        })? {
            made.push(name);
        }
    }
    Ok(made)
}

fn link(link: &Path, node: &Path) -> rustix::io::Result<bool> {
    let says = |target: rustix::io::Result<std::ffi::CString>| {
        target.is_ok_and(|target| target.as_bytes() == node.as_os_str().as_bytes())
    };
    let current = || rustix::fs::readlinkat(CWD, link, Vec::new());
    // One that leads to the device by another name is the kernel's or udev's.
    let leads_there = || {
        let device = |path| rustix::fs::stat(path).map(|stat| stat.st_rdev);
        device(link).is_ok_and(|linked| device(node) == Ok(linked))
    };
    if says(current()) || leads_there() {
        return Ok(false);
    }
    if let Some(directory) = link.parent() {
        match rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    // Left by a driver that had other numbers.
    match rustix::fs::unlink(link) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno),
    }
    match rustix::fs::symlink(node, link) {
        // Another start made it meanwhile.
        Err(Errno::EXIST) => Ok(false),
        result => result.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{ContainerPath, HostPath};
    use std::{fs, os::unix::fs::symlink};

    fn node(path: &Path, minor: u32) -> DeviceNode {
        let path = path.to_path_buf();
        let (mode, uid, gid) = (0o666, 0, 0);
        DeviceNode {
            path: HostPath(path.clone()),
            container_path: ContainerPath(path),
            major: 195,
            minor,
            mode,
            uid,
            gid,
        }
    }

    #[test]
    fn absent_and_stale_links_are_made_and_right_ones_left() {
        let dir = tempfile::tempdir().unwrap();
        let links = dir.path().join("char");
        let nodes = [node(Path::new("/dev/nvidia0"), 0), node(Path::new("/dev/nvidiactl"), 255)];
        assert_eq!(link_all(&links, &nodes).unwrap(), ["195:0", "195:255"]);
        assert_eq!(fs::read_link(links.join("195:255")).unwrap(), Path::new("/dev/nvidiactl"));
        assert!(link_all(&links, &nodes).unwrap().is_empty(), "once is enough");
        fs::remove_file(links.join("195:0")).unwrap();
        symlink("/dev/nvidia7", links.join("195:0")).unwrap();
        assert_eq!(link_all(&links, &nodes).unwrap(), ["195:0"], "a stale one");
        // udev writes ../null for /dev/null.
        let null = [node(Path::new("/dev/null"), 3)];
        symlink("/dev/../dev/null", links.join("195:3")).unwrap();
        assert!(link_all(&links, &null).unwrap().is_empty());
        assert_eq!(fs::read_link(links.join("195:3")).unwrap(), Path::new("/dev/../dev/null"));
    }

    #[test]
    fn a_link_that_cannot_be_made_is_a_message() {
        let dir = tempfile::tempdir().unwrap();
        let links = dir.path().join("char");
        fs::write(&links, "").unwrap();
        let error = link_all(&links, &[node(Path::new("/dev/nvidia0"), 0)]).unwrap_err();
        assert_eq!(error.code(), Code::DeviceNodeMissing);
    }
}
