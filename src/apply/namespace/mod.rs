//! Gives GPUs to a container that exists already: a prestart hook's way. Its first process waits in namespaces of its own, what
//! the engine wants mounted is mounted, and nothing of the image has run (runtime-spec, config.md, "Prestart").
//!
//! ```text
//! first    the root that the bundle names is the one in the process' mount namespace, or nothing is done
//! host     what the container gets of the host is copied to detached mounts, while the host's paths still mean the host's
//! root     device nodes, beneath a descriptor of the container's root: no link of the image's leads out of it
//! inside   in the container's mount namespace each copy is attached, again beneath that descriptor
//! ```
//!
//! runc and crun call the hook before pivot_root(2): the container's root is then a directory in its mount namespace, and a
//! volume of the engine's may lie over any place in it.

pub mod devices;
mod systemd;

use super::{
    bundle::ContainerRoot,
    delivery::{grow_shm, note},
    host_object::HostObject,
    mount::{HOST_NODE, attach},
    oci_spec::{Bind, BindKind},
    rootfs::{Mounts, Outside, Root},
};
use crate::{
    error::{Code, Error, OrFail, Result},
    formats::mountinfo,
    inventory::DeviceNode,
    sys::mount::{Propagation, set_propagation},
};
use nix::sched::{CloneFlags, setns};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags, StatxFlags},
    process::{Pid, PidfdFlags, pidfd_open},
};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// A container whose first process waits for the hook's end.
#[derive(Debug)]
pub struct Waiting {
    /// Of its mount namespace.
    root: Root,
    /// `/` of its first process.
    top: Root,
    namespace: OwnedFd,
    /// The mount table at the time of opening.
    table: Vec<u8>,
    mounts: Mounts,
}

/// Mounts that are to be shared again, by their numbers.
type Muted = Vec<(u64, OwnedFd)>;

impl Waiting {
    /// Finds the container's mount namespace and, in it, the root that its bundle names. `may_be_ours` is whether that may be this
    /// process' own namespace, which the host's never is in a user namespace.
    ///
    /// # Errors
    /// [`Code::Namespace`] if the process is gone, or has no mount namespace of its own; [`Code::Rootfs`] if its root is
    /// another one.
    pub fn open(pid: i32, root: &ContainerRoot, may_be_ours: bool) -> Result<Self> {
        let failed = || format!("the container's process {pid} cannot be looked into");
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let open =
            |name: &str, flags| rustix::fs::open(proc.join(name), flags | OFlags::CLOEXEC, Mode::empty());
        let id = Pid::from_raw(pid).ok_or_else(|| Error::new(Code::Namespace, failed()))?;
        let process = pidfd_open(id, PidfdFlags::empty()).or_fail(Code::Namespace, failed)?;
        let top = Root::new(open("root", OFlags::PATH | OFlags::DIRECTORY).or_fail(Code::Namespace, failed)?);
        let namespace = open("ns/mnt", OFlags::RDONLY).or_fail(Code::Namespace, failed)?;
        let table: File = open("mountinfo", OFlags::RDONLY).or_fail(Code::Namespace, failed)?.into();
        // It has not ended, so the number was not another's when the descriptors were opened.
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        if poll(&mut ended, Some(&Timespec::default())).or_fail(Code::Namespace, failed)? != 0 {
            return Err(Error::new(Code::Namespace, failed()).cause("it has ended"));
        }
        let own = rustix::fs::stat("/proc/self/ns/mnt").or_fail(Code::Namespace, failed)?;
        let is_ours = identity(&namespace).or_fail(Code::Namespace, failed)? == (own.st_dev, own.st_ino);
        if is_ours && !may_be_ours {
            return Err(Error::new(Code::Namespace, "the container has no mount namespace of its own")
                .cause("the driver's files would be mounted on the host")
                .fix("let the engine give it one: {\"type\": \"mount\"} in linux.namespaces of its config.json"));
        }
        let wanted = identity(&root.directory).or_fail(Code::Bundle, failed)?;
        // A runtime that has changed the root already has it at `/`.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let real = std::fs::canonicalize(&root.path).unwrap_or_else(|_| root.path.clone());
        let (path, root) = [real.as_path(), Path::new("/")]
            .into_iter()
            .filter_map(|path| Some((path, top.open(path, flags).ok()?)))
            .find(|(_, found)| identity(found) == Ok(wanted))
            .ok_or_else(|| {
                Error::new(Code::Rootfs, format!("the container's root is not {}", root.path.display()))
                    .cause(format!("in the mount namespace of process {pid} something else is there"))
                    .fix("start the container again: its engine mounts the root")
            })?;
        let mut bytes = Vec::new();
        { table }
            .read_to_end(&mut bytes)
            .or_fail(Code::Namespace, || "the container's mounts cannot be read")?;
        let host = std::fs::read("/proc/self/mountinfo")
            .or_fail(Code::Namespace, || "the host's mounts cannot be read")?;
        let outside = if is_ours { Outside::Tool } else { Outside::Host(&host) };
        let mounts = Mounts::of_namespace(&bytes, path, &proc.join("root"), outside);
        Ok(Self { root: Root::new(root), top, namespace, table: bytes, mounts })
    }

    /// What is mounted over the container's root.
    pub fn mounts(&self) -> &Mounts {
        &self.mounts
    }

    /// Lets a tmpfs at the container's /dev/shm that has an engine's default size have this one.
    ///
    /// # Errors
    /// [`Code::Mount`] when the kernel refuses it.
    pub fn grow_shm(&self, size: u64) -> Result<()> {
        self.root
            .open(Path::new("/dev/shm"), OFlags::PATH | OFlags::DIRECTORY)
            .map_or(Ok(()), |shm| grow_shm(&shm, size))
    }

    /// Makes the device nodes and mounts the files. This process is in the container's mount namespace afterwards, where the
    /// host's paths are no longer valid, so this is the last step. Returns the parts that were left out and the reasons.
    ///
    /// `nodes` are those that are to be made; `has_user_namespace` is as for [`super::delivery`]; `may_make_nodes` is false in a
    /// user namespace, where a device node cannot be opened unless it is the host's own (user_namespaces(7)).
    ///
    /// # Errors
    /// [`Code::Mount`], [`Code::Rootfs`], [`Code::DeviceNodeMissing`].
    pub fn give(
        self,
        nodes: &[DeviceNode],
        binds: &[Bind],
        has_user_namespace: bool,
        may_make_nodes: bool,
    ) -> Result<Vec<String>> {
        let waiting = Self { root: self.root.keeping_owners(has_user_namespace), ..self };
        let mut notes = Vec::new();
        let mut objects: Vec<(HostObject, &Path)> = Vec::new();
        // The engine mounts a new /proc, which has the driver's files if the host has them.
        let is_there = |bind: &&Bind| {
            !bind.target.starts_with("/proc") || waiting.root.open(&bind.target, OFlags::PATH).is_ok()
        };
        for bind in binds.iter().filter(is_there) {
            match open(bind) {
                Ok(object) => objects.push((object, &bind.target)),
                // The driver works without its daemons' sockets.
                Err(error) if matches!(bind.kind, BindKind::Socket(_)) => notes.push(note(&error)),
                Err(error) => return Err(error),
            }
        }
        for node in nodes.iter().filter(|_| !may_make_nodes) {
            objects.push((HostObject::node(node, HOST_NODE)?, &node.container_path.0));
        }
        // Nodes have the host's permissions, whatever mask the engine has.
        rustix::process::umask(Mode::empty());
        for node in nodes.iter().filter(|_| may_make_nodes) {
            if !waiting.root.device_node(node)? {
                return Err(Error::new(
                    Code::DeviceNodeMissing,
                    "the container's device nodes cannot be made",
                )
                .cause("this process has no CAP_MKNOD")
                .fix("let the engine run its hooks as root, or name gpurun-runtime as its runtime"));
            }
        }
        setns(&waiting.namespace, CloneFlags::CLONE_NEWNS)
            .or_fail(Code::Namespace, || "the container's mount namespace cannot be entered")?;
        let mut muted: Muted = Vec::new();
        for (object, target) in objects {
            waiting.attach(&object, target, &mut muted)?;
        }
        muted.iter().try_for_each(|(_, mount)| {
            set_propagation(mount.as_fd(), Propagation::Shared)
                .or_fail(Code::Mount, || "a mount of the container cannot be shared again")
        })?;
        Ok(notes)
    }

    fn attach(&self, object: &HostObject, target: &Path, muted: &mut Muted) -> Result<()> {
        let failed = || format!("{} of the container cannot be read", target.display());
        let point = if object.is_directory() {
            self.root.directory(target)?
        } else {
            self.root.mount_point(target)?
        };
        refuse_kernels(&point, target)?;
        // A volume of the engine's brought it: `-v /run:/run` has the daemon's socket.
        if identity(&point).or_fail(Code::Mount, failed)? == object.identity() {
            return Ok(());
        }
        self.mute(&point, muted)?;
        attach(object.mount(), &point, target)
    }

    /// Where `point` lies on a mount that has peers, which are the host's (a volume `:shared`), what is mounted there would appear
    /// at theirs and stay. This mount alone becomes a slave of theirs then, and is to be shared again: it still hears of what
    /// they mount, and they no longer of what is mounted here.
    fn mute(&self, point: &OwnedFd, muted: &mut Muted) -> Result<()> {
        let failed = || "the container's mounts cannot be told apart";
        let mount_id = |fd: &OwnedFd| {
            rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map(|stat| stat.stx_mnt_id)
        };
        let id = mount_id(point).or_fail(Code::Mount, failed)?;
        // What is not in the table was attached since, by us, and is private.
        let Some(path) = mountinfo::shared_mount_point(&self.table, id) else { return Ok(()) };
        if muted.iter().any(|(known, _)| *known == id) {
            return Ok(());
        }
        let mount = self.top.open(&path, OFlags::PATH).or_fail(Code::Mount, failed)?;
        if mount_id(&mount).or_fail(Code::Mount, failed)? != id {
            return Err(Error::new(Code::Mount, failed())
                .cause(format!("another one lies over {}, which has peers on the host", path.display())));
        }
        set_propagation(mount.as_fd(), Propagation::Slave)
            .or_fail(Code::Mount, || format!("{} cannot be kept from the host", path.display()))?;
        muted.push((id, mount));
        Ok(())
    }
}

fn open(bind: &Bind) -> Result<HostObject> {
    match bind.kind {
        BindKind::Socket(known) => HostObject::of_daemon(&bind.source, known, bind.kind.flags()),
        BindKind::ReadOnly | BindKind::Device => HostObject::file(&bind.source, bind.kind.flags()),
    }
}

/// Refuses a link of the image's that leads into /proc or /sys: the runtime has still to write its security labels there.
fn refuse_kernels(point: &OwnedFd, target: &Path) -> Result<()> {
    /// PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC (linux/magic.h)
    const KERNELS: [i64; 4] = [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270];
    let failed = || format!("{} of the container cannot be mounted over", target.display());
    let fs = rustix::fs::fstatfs(point).or_fail(Code::Mount, failed)?;
    // `f_type`'s own type differs between the C libraries.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let is_kernels = KERNELS.contains(&(fs.f_type as i64));
    if is_kernels && !target.starts_with("/proc") {
        return Err(Error::new(Code::Rootfs, failed())
            .cause("a link leads into a file system of the kernel")
            .fix(format!("build the image without a link at {}", target.display())));
    }
    Ok(())
}

fn identity(fd: &impl AsFd) -> rustix::io::Result<(u64, u64)> {
    rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}
