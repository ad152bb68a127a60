//! The plan's answer: everything that a container gets, as one plain value.

use crate::{
    inventory::{ContainerPath, DaemonObject, DeviceNode, HostPath},
    vocabulary::{EnvVar, Version},
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The place of the driver in a container. CUDA images have its `bin` in PATH and its `lib64` in
/// LD_LIBRARY_PATH already, so it works there even where no loader cache can be written.
pub const DRIVER_DIR: &str = "/usr/local/nvidia";

/// The driver's directory in a container in which a volume or a file is in the way of [`DRIVER_DIR`].
pub const OTHER_DRIVER_DIR: &str = "/nvidia-driver";

/// What a GPU container gets. Each destination carries it out its own way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Injection {
    /// Host files and sockets, and where they appear.
    pub mounts: Vec<Mount>,
    /// Device nodes, each with a cgroup rule `rw`(`m`).
    pub devices: Vec<DeviceNode>,
    /// Links that must exist in the container's root.
    pub symlinks: Vec<Symlink>,
    /// Small files whose content gpurun writes itself, bound read-only over what is there.
    pub files: Vec<File>,
    /// Variables that are set, last word over the image's.
    pub env: Vec<EnvVar>,
    /// Directories for /etc/ld.so.conf.d, first searched first.
    pub library_dirs: Vec<ContainerPath>,
    /// What the loader's cache must know.
    pub libraries: Vec<CachedLibrary>,
    /// Whether the image's own newer CUDA driver libraries may be used, if they fit by the ELF-note rule.
    pub forward_compat: Option<ForwardCompat>,
    /// Groups that the container's user needs for device nodes that are not open to all.
    pub groups: Vec<u32>,
    /// What the user should be told although the container starts.
    pub warnings: Vec<String>,
}

impl Injection {
    /// Moves the driver's directory to another path in the container.
    #[must_use]
    pub fn relocated(mut self, to: &Path) -> Self {
        let relocate = |path: &mut PathBuf| {
            if let Ok(below) = path.strip_prefix(DRIVER_DIR) {
                *path = if below == Path::new("") { to.into() } else { to.join(below) };
            }
        };
        self.mounts.iter_mut().for_each(|mount| relocate(&mut mount.target.0));
        for symlink in &mut self.symlinks {
            relocate(&mut symlink.link.0);
            relocate(&mut symlink.target);
        }
        self.library_dirs.iter_mut().for_each(|directory| relocate(&mut directory.0));
        self.libraries.iter_mut().for_each(|library| relocate(&mut library.path.0));
        self
    }

    /// Adds what another part of the container needs. MIG devices share their GPU's node, and nodes their group.
    pub(super) fn add(&mut self, part: DevicePart) {
        fn missing<T: PartialEq>(all: &mut Vec<T>, more: Vec<T>) {
            for one in more {
                if !all.contains(&one) {
                    all.push(one);
                }
            }
        }
        // A node that only some may open is opened through its group, unless that is root's own.
        let groups = part.nodes.iter().filter(|node| node.mode & 0o006 != 0o006 && node.gid != 0);
        missing(&mut self.groups, groups.map(|node| node.gid).collect());
        missing(&mut self.devices, part.nodes);
        missing(&mut self.symlinks, part.symlinks);
        missing(&mut self.mounts, part.mounts);
    }
}

/// What one device or feature adds to a container: nodes, links to them, and what is read beside them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DevicePart {
    /// Its device nodes.
    pub nodes: Vec<DeviceNode>,
    /// Links under /dev/dri/by-path.
    pub symlinks: Vec<Symlink>,
    /// Host files and directories of a feature.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
}

/// One host file, directory or socket in the container. Always read-only, nosuid, nodev, private: a socket is connected to
/// through a read-only mount as well, and a container must not change or remove the host's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// On the host.
    pub source: HostPath,
    /// In the container.
    pub target: ContainerPath,
    /// A daemon's socket or directory of sockets, as the inventory verified it; `None` for the driver's files. Not a fact of the
    /// plan: it changes when the daemon is started again.
    #[serde(skip)]
    pub daemon: Option<DaemonObject>,
}

/// `link` points to `target`, as text, in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Symlink {
    /// Where the link is.
    pub link: ContainerPath,
    /// What it says.
    pub target: PathBuf,
}

/// A file with content of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct File {
    /// Where it appears.
    pub path: ContainerPath,
    /// What it says.
    pub content: String,
}

/// A library that the dynamic loader must find.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CachedLibrary {
    /// The name that programs load: the SONAME.
    pub soname: String,
    /// Where that name is in the container.
    pub path: ContainerPath,
    /// ELFCLASS32.
    pub is_32bit: bool,
}

/// What the ELF-note rule compares an image's libcuda with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForwardCompat {
    /// The host's driver.
    pub driver: Version,
    /// The newest CUDA that it speaks.
    pub cuda: Version,
    /// The image's CUDA, where nothing but the image's own libraries can run it: if they do not fit (see
    /// [`super::forward_compat::decide`]), the container must not start but end with [`super::cuda::too_new`].
    pub needed_for: Option<Version>,
}
