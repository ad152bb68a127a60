//! What every GPU container shares: the driver's files and control nodes.

use super::{CachedLibrary, DRIVER_DIR, DevicePart, File, Injection, Mount, Symlink, select};
use crate::{
    error::{Code, Error, Result},
    inventory::{ContainerPath, DaemonObject, DriverFile, FileKind, Inventory},
    vocabulary::DriverCapability,
};
use std::path::{Path, PathBuf};

/// The control nodes and the capabilities that need them; `None`: all do. A node that is not here nobody gets.
const CONTROL_NODES: [(&str, Option<DriverCapability>); 4] = [
    ("/dev/nvidiactl", None),
    ("/dev/nvidia-uvm", Some(DriverCapability::COMPUTE)),
    ("/dev/nvidia-uvm-tools", Some(DriverCapability::COMPUTE)),
    ("/dev/nvidia-modeset", Some(DriverCapability::DISPLAY.union(DriverCapability::GRAPHICS))),
];

/// Nodes without which a capability does not work at all, and what makes them.
const NEEDED_NODES: [(&str, DriverCapability, &str); 2] = [
    (
        "/dev/nvidiactl",
        DriverCapability::all(),
        "run `nvidia-smi` as root, which makes it, or `nvidia-modprobe -c 0`",
    ),
    (
        "/dev/nvidia-uvm",
        DriverCapability::COMPUTE,
        "run `nvidia-modprobe -u -c 0` as root, which loads nvidia-uvm and makes it",
    ),
];

/// Libraries without which a capability does not work at all: programs that miss them fall back to the CPU.
const NEEDED_LIBRARIES: [(&str, DriverCapability); 2] =
    [("libcuda.so.", DriverCapability::COMPUTE), ("libnvidia-ml.so.", DriverCapability::UTILITY)];

/// The driver's part of a container with these capabilities: everything but GPUs.
pub fn shared(inventory: &Inventory, capabilities: DriverCapability) -> Result<Injection> {
    let driver = &inventory.driver;
    complete(inventory, capabilities)?;
    let mut injection = Injection::default();
    for file in driver.files.iter().filter(|file| is_needed(file, capabilities)) {
        add_file(&mut injection, file);
    }
    let wanted = |path: &Path| {
        CONTROL_NODES.iter().any(|(name, needs)| {
            path == Path::new(name) && needs.is_none_or(|needs| capabilities.intersects(needs))
        })
    };
    let nodes = driver.control_nodes.iter().filter(|node| wanted(&node.container_path.0)).cloned().collect();
    injection.add(DevicePart { nodes, ..DevicePart::default() });
    injection.files.extend(driver.params.as_deref().and_then(params));
    Ok(injection)
}

fn is_needed(file: &DriverFile, capabilities: DriverCapability) -> bool {
    let is_32bit = matches!(file.kind, FileKind::Library { is_32bit: true, .. });
    (file.capabilities - DriverCapability::COMPAT32).intersects(capabilities)
        && (!is_32bit || capabilities.contains(DriverCapability::COMPAT32))
}

/// Refuses a driver that lacks what a capability cannot do without.
fn complete(inventory: &Inventory, capabilities: DriverCapability) -> Result<()> {
    let driver = &inventory.driver;
    for (beginning, capability) in NEEDED_LIBRARIES {
        let present = driver.files.iter().any(|file| {
            matches!(&file.kind, FileKind::Library { name, is_32bit: false, .. } if name.starts_with(beginning))
        });
        if capabilities.contains(capability) && !present {
            let (version, root) = (&driver.version, driver.root.0.display());
            return Err(Error::new(
                Code::DriverIncomplete,
                format!(
                    "the driver lacks {beginning}{version}, which the capability {} needs",
                    capability.names().join(" ")
                ),
            )
            .cause(format!("it is in no library directory of {root}"))
            .fix(format!(
                "install the driver's libraries, version {version}, or say where they are with --driver-root"
            )));
        }
    }
    for (path, needs, fix) in NEEDED_NODES {
        if !capabilities.intersects(needs) {
            continue;
        }
        // It is missing, or there with another number than the kernel's, which only the inventory can see.
        let is_it = |subject: &String| path.strip_prefix("/dev/") == Some(subject);
        if let Some(problem) = inventory.problems.iter().find(|problem| problem.subjects.iter().any(is_it)) {
            return Err(select::error_of(problem));
        }
        let Some(node) = driver.control_nodes.iter().find(|node| node.container_path.0 == Path::new(path))
        else {
            return Err(
                Error::new(Code::DeviceNodeMissing, format!("the device node {path} is missing")).fix(fix)
            );
        };
        if let Some(denial) = inventory.closed.get(&node.path.0) {
            return Err(select::denied(format!("the device node {path} cannot be opened"), node, *denial));
        }
    }
    Ok(())
}

fn add_file(injection: &mut Injection, file: &DriverFile) {
    let mut mount = |target: &Path, daemon: Option<DaemonObject>| {
        injection.mounts.push(Mount {
            source: file.path.clone(),
            target: ContainerPath(target.into()),
            daemon,
        });
    };
    match &file.kind {
        FileKind::Firmware(path) => mount(&path.0, None),
        FileKind::Socket(path) => mount(&path.0, Some(file.daemon.unwrap_or_default())),
        FileKind::Config(path) => {
            let (target, link) = in_driver_dir(&path.0);
            mount(&target, None);
            injection.symlinks.push(link);
        }
        FileKind::XorgModule(path) => {
            let (target, module) = in_driver_dir(&path.0);
            mount(&target, None);
            injection.symlinks.push(module);
            // The X server loads `libglxserver_nvidia.so`, whatever the version.
            let name = path.0.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some((stem, _)) = name.split_once(".so.") {
                let link = ContainerPath(path.0.with_file_name(format!("{stem}.so")));
                injection.symlinks.push(Symlink { link, target: name.into() });
            }
        }
        FileKind::Binary(name) => {
            let target = Path::new(DRIVER_DIR).join("bin").join(name);
            mount(&target, None);
            // Not every image has our directory in PATH; all have this one.
            injection
                .symlinks
                .push(Symlink { link: ContainerPath(Path::new("/usr/bin").join(name)), target });
        }
        FileKind::Library { name, soname, links, is_32bit, subdirectory } => {
            let root = library_dir(*is_32bit);
            let dir = subdirectory.as_ref().map_or_else(|| root.clone(), |below| root.join(below));
            mount(&dir.join(name), None);
            // Libraries are loaded by their SONAME, `libcuda.so.1`; the other names lead to it.
            let soname = soname.as_ref().unwrap_or(name);
            let mut link = |link: &str, target: PathBuf| {
                injection.symlinks.push(Symlink { link: ContainerPath(dir.join(link)), target });
            };
            if soname != name {
                link(soname, name.into());
            }
            for other in links.iter().filter(|other| *other != soname && *other != name) {
                // `gbm/nvidia-drm_gbm.so` leads one directory up.
                let up: PathBuf = other.matches('/').map(|_| "..").collect();
                link(other, up.join(soname));
            }
            let names = std::iter::once(soname)
                .chain(links.iter().filter(|other| *other != soname && !other.contains('/')));
            injection.libraries.extend(names.map(|name| CachedLibrary {
                soname: name.clone(),
                path: ContainerPath(dir.join(name)),
                is_32bit: *is_32bit,
            }));
            for dir in [root, dir] {
                if !injection.library_dirs.iter().any(|known| known.0 == dir) {
                    injection.library_dirs.push(ContainerPath(dir));
                }
            }
        }
    }
}

/// The path in the driver's directory for a file that programs expect at `path`, and the link to it. A low-level runtime
/// takes 0.1 ms for each mount, and the driver's directory is a single mount. Loaders of Vulkan, EGL, OpenCL and X follow
/// links: Debian's own packages install these files as links to /etc/alternatives.
fn in_driver_dir(path: &Path) -> (PathBuf, Symlink) {
    let target = Path::new(DRIVER_DIR).join(path.strip_prefix("/").unwrap_or(path));
    (target.clone(), Symlink { link: ContainerPath(path.into()), target })
}

fn library_dir(is_32bit: bool) -> PathBuf {
    Path::new(DRIVER_DIR).join(if is_32bit { "lib" } else { "lib64" })
}

/// The driver's parameters with `ModifyDeviceFiles: 0`. The driver's libraries make device nodes that are missing,
/// and correct those that they find, when the file says 1: inside a container that is nobody's wish.
pub fn params(host: &str) -> Option<File> {
    const MODIFY: &str = "ModifyDeviceFiles: 1";
    host.lines().any(|line| line.trim() == MODIFY).then(|| File {
        path: ContainerPath("/proc/driver/nvidia/params".into()),
        content: host
            .lines()
            .flat_map(|line| [if line.trim() == MODIFY { "ModifyDeviceFiles: 0" } else { line }, "\n"])
            .collect(),
    })
}
