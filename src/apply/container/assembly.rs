//! What a container's root is made of, written down as data and then done in one loop.

use super::spec::{Container, Volume};
use crate::{
    apply::{
        delivery::note,
        host_object::{HostObject, open_tree},
        mount::{HOST_NODE, NOTHING, attach, new_filesystem},
        oci_spec::BindKind,
        rootfs::Root,
    },
    error::{Code, Error, OrFail, Result},
    inventory::DeviceNode,
    plan::{self, Symlink},
    sys::{
        bpf::DeviceKind,
        mount::{Flags, restrict},
    },
};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FileType, OFlags},
    io::Errno,
    mount::OpenTreeFlags,
};
use std::path::{Path, PathBuf};

/// One step. Paths without a host side are the container's.
#[derive(Debug)]
pub enum Step {
    /// A new file system of the kernel's.
    Mount { filesystem: &'static str, options: Vec<(&'static str, String)>, target: PathBuf, flags: Flags },
    /// A directory or file of the host's.
    Bind { source: PathBuf, target: PathBuf, flags: Flags, recursive: bool },
    /// A driver file or a daemon's socket. A socket that was replaced since the inventory verified it is skipped.
    Driver { mount: plan::Mount },
    /// A bind mount that also shows what the host mounts below the source later (mount_namespaces(7), MS_SLAVE).
    BindSlave { source: PathBuf, target: PathBuf, flags: Flags, recursive: bool },
    /// A path of the container's own, read-only from here on; nothing where it is absent.
    ReadOnly { target: PathBuf },
    /// A mount of an earlier step, read-only from here on.
    Seal { target: PathBuf },
    /// A path of the container's that must not be seen: /dev/null over a file, an empty directory over a directory.
    Mask { target: PathBuf },
    /// The host's own device node, mounted over the node of a volume. Skipped if the volume has no such node.
    NodeOver { node: DeviceNode },
    /// Directories to hide. All of them show the same empty file system: one for each of 256 processors takes milliseconds.
    MaskDirectories { targets: Vec<PathBuf> },
    /// A character device in the container's /dev.
    Node { node: DeviceNode },
    /// A directory with its owner and permissions.
    Directory { path: PathBuf, mode: u32, owner: (u32, u32) },
    /// A file that is written into the root.
    File { path: PathBuf, content: Vec<u8>, mode: u32 },
    /// Our file on the host, mounted read-only over a file of a volume or in memory. Skipped for absent paths in /proc.
    Cover { source: PathBuf, target: PathBuf },
    /// A link.
    Symlink { link: PathBuf, target: PathBuf },
}

/// Docker's `MaskedPaths` (daemon/pkg/oci/defaults.go) without the paths of each processor: see [`thermal_throttles`].
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// The counters of each processor that show what other containers compute, as Docker 28 masks them (GHSA-6fw5-f8r9-fgfm). They
/// exist on Intel processors without a hypervisor. If the first one is absent, the others are not looked up.
fn thermal_throttles() -> impl Iterator<Item = PathBuf> {
    let of = |number: u32| PathBuf::from(format!("/sys/devices/system/cpu/cpu{number}/thermal_throttle"));
    let possible = if of(0).is_dir() {
        std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default()
    } else {
        String::new()
    };
    processors(&possible).into_iter().map(of).filter(|path| path.is_dir())
}

/// The numbers of a list of processors, `0-3,8` (cputopology.rst).
fn processors(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// Docker's `ReadonlyPaths`.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Minor numbers of the devices that every container has (Documentation/admin-guide/devices.txt).
pub const STANDARD_DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const DEVICES: Flags = Flags { read_only: false, nosuid: true, nodev: false, noexec: true };

/// What the container sees at /sys/fs/cgroup.
#[derive(Debug)]
pub enum CgroupView {
    /// cgroup v2, its own cgroup as the root.
    Unified,
    /// Its directories in v1 hierarchies, and where they appear.
    Legacy(Vec<(PathBuf, PathBuf)>),
}

/// The work on a container's root.
#[derive(Debug)]
pub struct Steps {
    /// What is laid down in the image before the root is mounted.
    pub image: Vec<Step>,
    /// What is mounted on it, in its order: later ones lie on earlier ones.
    pub mounts: Vec<Step>,
    /// The user's mounts, including those on the home directory, and then the driver.
    pub volumes: Vec<Step>,
}

/// All of it.
pub fn steps(
    container: &Container,
    cgroups: &CgroupView,
    host_files: Vec<(PathBuf, Vec<u8>)>,
    covers: Vec<Step>,
) -> Steps {
    let rootless = !container.privileged;
    let mut mounts = kernel_file_systems(container, rootless, cgroups);
    mounts.extend(devices(container, rootless));
    if container.masked_paths {
        mounts.extend(READ_ONLY.map(|path| Step::ReadOnly { target: path.into() }));
        mounts.extend(MASKED.map(|path| Step::Mask { target: path.into() }));
        mounts.push(Step::MaskDirectories { targets: thermal_throttles().collect() });
    }
    let mut image = files(container, host_files);
    let links = container.placement.symlinks.iter();
    let link = |s: &Symlink| Step::Symlink { link: s.link.0.clone(), target: s.target.clone() };
    let (beside_driver, in_image): (Vec<_>, Vec<_>) = links
        .partition(|s| s.link.0.starts_with(&container.placement.driver_dir) || s.link.0.starts_with("/dev"));
    image.extend(in_image.into_iter().map(link));
    // After the volumes, so that none of them hides the driver.
    let mut volumes: Vec<Step> =
        container.volumes.iter().map(|one| volume(one, container.all_devices)).collect();
    volumes.extend(nodes_of_volumes(container));
    volumes.extend(driver(container, beside_driver.into_iter().map(link)));
    volumes.extend(covers);
    Steps { image, mounts, volumes }
}

fn kernel_file_systems(container: &Container, rootless: bool, cgroups: &CgroupView) -> Vec<Step> {
    let mount = |filesystem, target: &str, flags, options: &[(&'static str, &str)]| Step::Mount {
        filesystem,
        target: target.into(),
        flags,
        options: options.iter().map(|&(key, value)| (key, value.to_owned())).collect(),
    };
    let bind = |source: &Path, target: &Path, flags, recursive| Step::Bind {
        source: source.into(),
        target: target.into(),
        flags,
        recursive,
    };
    let read_only = Flags { read_only: !container.all_devices, ..NOTHING };
    // Mounting procfs needs rights over the pid namespace that it shows, and sysfs over the network namespace. Without root the
    // launcher has no rights over the host's namespaces.
    let proc = if rootless && container.host_pid {
        bind(Path::new("/proc"), Path::new("/proc"), NOTHING, true)
    } else {
        mount("proc", "/proc", NOTHING, &[])
    };
    let mut steps = vec![
        proc,
        // Docker's size: programs that write ordinary files into /dev must not fill the host's memory.
        mount("tmpfs", "/dev", DEVICES, &[("mode", "0755"), ("size", "65536k")]),
        mount("devpts", "/dev/pts", DEVICES, &[("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620")]),
    ];
    if container.host_ipc {
        steps.push(bind(Path::new("/dev/shm"), Path::new("/dev/shm"), NOTHING, false));
        // Root mounts a new mqueue, because not every host mounts it. It shows the queues of the namespace, wherever it is mounted.
        if !rootless {
            steps.push(mount("mqueue", "/dev/mqueue", NOTHING, &[]));
        } else if Path::new("/dev/mqueue").is_dir() {
            steps.push(bind(Path::new("/dev/mqueue"), Path::new("/dev/mqueue"), NOTHING, false));
        }
    } else {
        if let Some(size) = container.shm_size {
            steps.push(mount("tmpfs", "/dev/shm", NOTHING, &[("mode", "1777"), ("size", &size.to_string())]));
        }
        steps.push(mount("mqueue", "/dev/mqueue", NOTHING, &[]));
    }
    // A new sysfs needs rights over the network namespace that it shows (sysfs_init_fs_context), and a launcher without
    // root has none over the host's.
    steps.push(if rootless && container.host_network {
        bind(Path::new("/sys"), Path::new("/sys"), read_only, true)
    } else {
        mount("sysfs", "/sys", read_only, &[])
    });
    match cgroups {
        CgroupView::Unified => steps.push(mount("cgroup2", "/sys/fs/cgroup", read_only, &[])),
        CgroupView::Legacy(directories) => {
            steps.push(mount("tmpfs", "/sys/fs/cgroup", NOTHING, &[("mode", "0755"), ("size", "64k")]));
            steps.extend(directories.iter().map(|(source, target)| bind(source, target, read_only, false)));
            steps.push(Step::Seal { target: "/sys/fs/cgroup".into() });
        }
    }
    steps
}

fn devices(container: &Container, rootless: bool) -> Vec<Step> {
    // Without root there is no mknod: the host's own nodes are mounted.
    let node = |path: &Path, target: &Path, node: Option<DeviceNode>| match node {
        Some(node) if !rootless => Step::Node { node },
        _ => Step::Bind { source: path.into(), target: target.into(), flags: HOST_NODE, recursive: false },
    };
    let standard = standard_nodes().map(|wanted| {
        let path = wanted.path.0.clone();
        node(&path, &path, Some(wanted))
    });
    let gpus =
        container.placement.nodes.iter().map(|n| node(&n.path.0, &n.container_path.0, Some(n.clone())));
    let link = |link: &str, target: &str| Step::Symlink { link: link.into(), target: target.into() };
    let links = [
        link("/dev/fd", "/proc/self/fd"),
        link("/dev/stdin", "/proc/self/fd/0"),
        link("/dev/stdout", "/proc/self/fd/1"),
        link("/dev/stderr", "/proc/self/fd/2"),
        link("/dev/ptmx", "pts/ptmx"),
    ];
    // The plan provides the GPU nodes, also with `--privileged`, which names every device.
    let taken = |path: &Path| container.injection.devices.iter().any(|node| node.container_path.0 == path);
    let asked =
        container.devices.iter().filter(|device| !taken(&device.node.container_path.0)).map(|device| {
            let (source, target) = (&device.node.path.0, &device.node.container_path.0);
            match device.kind {
                DeviceKind::Char if !rootless => Step::Node { node: device.node.clone() },
                _ => Step::Bind {
                    source: source.clone(),
                    target: target.clone(),
                    flags: HOST_NODE,
                    recursive: false,
                },
            }
        });
    standard.chain(gpus).chain(asked).chain(links).collect()
}

fn standard_nodes() -> impl Iterator<Item = DeviceNode> {
    STANDARD_DEVICES.iter().map(|&(name, major, minor)| {
        let path = Path::new("/dev").join(name);
        DeviceNode {
            path: crate::inventory::HostPath(path.clone()),
            container_path: crate::inventory::ContainerPath(path),
            major,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        }
    })
}

/// Devices on a volume cannot be opened. For a volume at /dev, the nodes that the container may open are mounted over it.
fn nodes_of_volumes(container: &Container) -> Vec<Step> {
    let nodes = &container.placement.nodes_of_volumes;
    let over_dev = container.volumes.iter().any(|volume| volume.target() == Path::new("/dev"));
    let standard = standard_nodes().filter(|_| over_dev);
    standard.chain(nodes.iter().cloned()).map(|node| Step::NodeOver { node }).collect()
}

fn files(container: &Container, host_files: Vec<(PathBuf, Vec<u8>)>) -> Vec<Step> {
    let user = &container.process.user;
    let mut steps: Vec<Step> =
        host_files.into_iter().map(|(path, content)| Step::File { path, content, mode: 0o644 }).collect();
    let accounts = [("/etc/passwd", &user.passwd), ("/etc/group", &user.group)];
    steps.extend(accounts.into_iter().filter_map(|(path, content)| {
        Some(Step::File { path: path.into(), content: content.clone()?, mode: 0o644 })
    }));
    steps.extend(container.placement.files.iter().map(|file| Step::File {
        path: file.path.clone(),
        content: file.content.clone(),
        mode: file.mode,
    }));
    // What programs expect, and images built FROM scratch do not have.
    for path in ["/tmp", "/var/tmp"] {
        steps.push(Step::Directory { path: path.into(), mode: 0o1777, owner: (0, 0) });
    }
    if container.process.cwd != Path::new("/") {
        steps.push(Step::Directory {
            path: container.process.cwd.clone(),
            mode: 0o755,
            owner: (user.uid, user.gid),
        });
    }
    steps
}

fn driver(container: &Container, links: impl Iterator<Item = Step>) -> Vec<Step> {
    let placement = &container.placement;
    let any = placement.mounts.iter().any(|mount| mount.target.0.starts_with(&placement.driver_dir));
    let mut steps = Vec::new();
    if any {
        // The mount points of the driver's files and the links beside them lie in memory: nothing of the image is copied up.
        steps.push(Step::Mount {
            filesystem: "tmpfs",
            target: placement.driver_dir.clone(),
            flags: Flags { read_only: false, nosuid: true, nodev: true, noexec: false },
            options: vec![("mode", "0755".into()), ("size", "1m".into())],
        });
    }
    steps.extend(placement.mounts.iter().map(|mount| Step::Driver { mount: mount.clone() }));
    steps.extend(links);
    if any {
        steps.push(Step::Seal { target: placement.driver_dir.clone() });
    }
    steps
}

fn volume(volume: &Volume, all_devices: bool) -> Step {
    match volume {
        Volume::Bind { source, target, read_only, recursive, receives_mounts } => {
            // Programs on a volume may be setuid. Devices on a volume cannot be opened, unless the container may open all devices.
            let flags = Flags { read_only: *read_only, nosuid: false, nodev: !all_devices, noexec: false };
            let (source, target) = (source.clone(), target.clone());
            if *receives_mounts {
                Step::BindSlave { source, target, flags, recursive: *recursive }
            } else {
                Step::Bind { source, target, flags, recursive: *recursive }
            }
        }
        Volume::Tmpfs { target, options, flags } => Step::Mount {
            filesystem: "tmpfs",
            target: target.clone(),
            flags: *flags,
            options: options.clone(),
        },
    }
}

/// Does the steps. The root is mounted, and this mount namespace is the container's.
pub fn assemble(root: &Root, steps: Vec<Step>) -> Result<()> {
    steps.into_iter().try_for_each(|step| perform(root, step))
}

fn perform(root: &Root, step: Step) -> Result<()> {
    match step {
        Step::Mount { filesystem, options, target, flags } => {
            let mount = new_filesystem(filesystem, &options, flags)?;
            let point = match filesystem {
                "proc" | "sysfs" => root.kernel_mount_point(&target)?,
                _ if target == Path::new("/dev") => root.kernel_mount_point(&target)?,
                _ => directory_below(root, &target)?,
            };
            attach(&mount, &point, &target)
        }
        Step::Bind { source, target, flags, recursive } => {
            attach_host(root, &HostObject::named(&source, flags, recursive)?, &source, &target)
        }
        Step::BindSlave { source, target, flags, recursive } => {
            attach_host(root, &HostObject::slave(&source, flags, recursive)?, &source, &target)
        }
        Step::Driver { mount } => match mount.daemon {
            None => {
                let flags = BindKind::ReadOnly.flags();
                attach_object(root, &HostObject::file(&mount.source.0, flags)?, &mount.target.0)
            }
            Some(known) => {
                let flags = BindKind::Socket(known).flags();
                match HostObject::of_daemon(&mount.source.0, known, flags) {
                    Ok(object) => attach_object(root, &object, &mount.target.0),
                    // The driver works without its daemons.
                    Err(error) => {
                        tracing::warn!("{}", note(&error));
                        Ok(())
                    }
                }
            }
        },
        Step::ReadOnly { target } => {
            let Some(own) = existing(root, &target)? else { return Ok(()) };
            let mount =
                open_tree(&own, OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::AT_RECURSIVE, "", &target)?;
            restrict(mount.as_fd(), Flags { read_only: true, ..Flags::default() }, true)
                .or_fail(Code::Mount, || format!("{} cannot be made read-only", target.display()))?;
            attach(&mount, &own, &target)
        }
        Step::Seal { target } => {
            let Some(own) = existing(root, &target)? else { return Ok(()) };
            restrict(own.as_fd(), Flags { read_only: true, ..Flags::default() }, false)
                .or_fail(Code::Mount, || format!("{} cannot be made read-only", target.display()))
        }
        Step::Mask { target } => {
            let Some(own) = existing(root, &target)? else { return Ok(()) };
            let is_directory =
                rustix::fs::fstat(&own).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_dir());
            let mount = if is_directory {
                empty_directory()?
            } else {
                // The host's own null device, by its numbers: what lies in the container's /dev is not trusted to be one.
                let null = HostObject::named(Path::new("/dev/null"), HOST_NODE, false)?.into_mount();
                let stat = rustix::fs::fstat(&null).or_fail(Code::Mount, || "/dev/null cannot be read")?;
                if stat.st_rdev != rustix::fs::makedev(1, 3) {
                    return Err(Error::new(Code::Mount, "the host's /dev/null is not the null device")
                        .fix("make it again as root: rm /dev/null && mknod -m 666 /dev/null c 1 3"));
                }
                null
            };
            attach(&mount, &own, &target)
        }
        Step::MaskDirectories { targets } => mask_directories(root, &targets),
        Step::Node { node } => make_node(root, &node),
        Step::NodeOver { node } => {
            let path = &node.container_path.0;
            let Some(point) = existing(root, path)? else { return Ok(()) };
            attach(HostObject::node(&node, HOST_NODE)?.mount(), &point, path)
        }
        Step::Cover { source, target } => {
            let object = HostObject::file(&source, Flags { read_only: true, ..NOTHING })?;
            if !target.starts_with("/proc") {
                return attach_object(root, &object, &target);
            }
            let Some(point) = existing(root, &target)? else { return Ok(()) };
            attach(object.mount(), &point, &target)
        }
        Step::Symlink { link, target } => root.symlink(&link, &target),
        // Laid down before the root was mounted.
        Step::File { .. } | Step::Directory { .. } => Ok(()),
    }
}

fn attach_object(root: &Root, object: &HostObject, target: &Path) -> Result<()> {
    let point =
        if object.is_directory() { directory_below(root, target)? } else { root.mount_point(target)? };
    attach(object.mount(), &point, target)
}

/// The directory `target`, which the mount will cover. A link of the image must not lead the mount over the whole root, or over
/// /proc; Docker refuses both.
fn directory_below(root: &Root, target: &Path) -> Result<OwnedFd> {
    /// linux/magic.h
    const PROC_SUPER_MAGIC: u64 = 0x9fa0;
    let point = root.directory(target)?;
    // `f_type`'s own type differs between the C libraries.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast, clippy::cast_sign_loss)]
    let is_proc = || rustix::fs::fstatfs(&point).is_ok_and(|found| found.f_type as u64 == PROC_SUPER_MAGIC);
    let place = match target {
        _ if root.is_itself(&point) => "/",
        target if !target.starts_with("/proc") && is_proc() => "/proc",
        _ => return Ok(point),
    };
    Err(Error::new(Code::Volume, format!("{} in the image is a link to {place}", target.display()))
        .cause(format!("the mount would hide the container's {place}"))
        .fix("mount it at a path that is not a link in the image: -v SOURCE:/mnt, --tmpfs /mnt"))
}

fn attach_host(root: &Root, object: &HostObject, source: &Path, target: &Path) -> Result<()> {
    check_kind(root, source, target, object.is_directory())?;
    attach_object(root, object, target)
}

/// An empty directory that stays empty.
fn empty_directory() -> Result<OwnedFd> {
    new_filesystem("tmpfs", &[("size", "0".into())], Flags { read_only: true, ..NOTHING })
}

fn mask_directories(root: &Root, targets: &[PathBuf]) -> Result<()> {
    let mut first: Option<&PathBuf> = None;
    for target in targets {
        let Some(own) = existing(root, target)? else { continue };
        // Kernels before 6.15 clone only mounts that are attached, so the first mask is cloned.
        let mounted = first.map(|path| existing(root, path)).transpose()?.flatten();
        let mask = match mounted {
            None => empty_directory()?,
            Some(mounted) => open_tree(&mounted, OpenTreeFlags::AT_EMPTY_PATH, "", target)?,
        };
        attach(&mask, &own, target)?;
        first.get_or_insert(target);
    }
    Ok(())
}

/// Refuses to mount a directory on a file, or a file on a directory.
fn check_kind(root: &Root, source: &Path, target: &Path, is_directory: bool) -> Result<()> {
    let Some(there) = existing(root, target)? else { return Ok(()) };
    let covers_directory =
        rustix::fs::fstat(&there).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_dir());
    if is_directory == covers_directory {
        return Ok(());
    }
    let kind = |is_directory| if is_directory { "a directory" } else { "a file" };
    let (source, target) = (source.display(), target.display());
    let what = format!(
        "{source} is {}, and {target} in the container is {}",
        kind(is_directory),
        kind(covers_directory)
    );
    Err(Error::new(Code::Volume, what).cause("a mount needs two files, or two directories").fix(format!(
        "mount it at another path: -v {source}:{target}-2, or name {} on the host",
        kind(covers_directory)
    )))
}

/// What is at `path`; `None` if nothing is, or a kernel without that file.
fn existing(root: &Root, path: &Path) -> Result<Option<OwnedFd>> {
    match root.open(path, OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno).or_fail(Code::Mount, || format!("{} cannot be opened", path.display())),
    }
}

fn make_node(root: &Root, node: &DeviceNode) -> Result<()> {
    let path = &node.container_path.0;
    // Root of an enclosing container may not make nodes: the host's is mounted.
    if root.device_node(node)? {
        Ok(())
    } else {
        attach_object(root, &HostObject::node(node, HOST_NODE)?, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_read_as_the_kernel_writes_it() {
        assert_eq!(processors("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(processors("0\n"), [0]);
        assert_eq!(processors("\n"), [] as [u32; 0]);
        assert_eq!(processors("x-1,-,4294967296"), [] as [u32; 0]);
    }
}
