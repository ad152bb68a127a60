//! The container's side: from a fresh process in new namespaces to the user's command.
//!
//! It has one thread and a copy of the launcher's memory. Until `pivot_root` it sees the host and touches it only through what
//! the launcher decided; after that it sees the container alone, and before anything of the image's runs its privileges are gone.

use super::{
    assembly::{self, Steps},
    channel::Channel,
    command::{Command, TOO_LONG},
    handover, host_proc, host_root,
    identity::Groups,
    image_volumes,
    landlock::Confinement,
    layer::Layer,
    scratch::{UPPER, WORK},
    spec::{Container, Process, Rlimit, Volume},
    stdio, terminal, unix_sockets,
};
use crate::{
    apply::{
        mount,
        rootfs::{Layers, Root, open_host_directory},
    },
    error::{Code, Error, OrFail, Result},
    sys::{mount::Flags, process},
};
use caps::{CapSet, Capability};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    process::Signal,
    thread::{Gid, Uid},
};
use std::{
    convert::Infallible,
    ffi::CString,
    path::{Path, PathBuf},
};

/// What the child needs besides the container itself.
#[derive(Debug)]
pub struct Entry<'a> {
    /// The container.
    pub container: &'a Container,
    /// Descriptors of its lower directories, topmost first.
    pub layers: &'a Layers,
    /// What its root is made of.
    pub steps: Steps,
    /// The compiled system call filter.
    pub seccomp: Option<Vec<u8>>,
    /// Confinement of the container's processes.
    pub confinement: Confinement,
    /// The container's standard streams; unused with a terminal.
    pub streams: stdio::Inside,
}

/// Becomes the user's command. Returns only its failure.
pub fn enter(entry: Entry<'_>, channel: &Channel) -> Error {
    match become_command(entry, channel) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn become_command(entry: Entry<'_>, channel: &Channel) -> Result<Infallible> {
    let Entry { container, layers, steps, seccomp, confinement, streams } = entry;
    let process = &container.process;
    process::reset_signals();
    // Without ids nothing can be made here.
    if container.id_map.is_some() {
        channel.wait()?;
    }
    rustix::process::umask(Mode::empty());
    if !container.host_cgroups {
        // Not with clone3, which makes the launcher's cgroup the root of the new namespace instead of the container's.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)
            .or_fail(Code::Namespace, || "no cgroup namespace can be made")?;
    }
    // This is still the host's /proc, so no file of the image can cover it.
    host_proc::apply(container)?;
    // From here on no mount reaches the host. Mounts of the host reach the container only where an option asks for it.
    let receives = |volume: &Volume| matches!(volume, Volume::Bind { receives_mounts: true, .. });
    let propagation = if container.volumes.iter().any(receives) {
        MountPropagationFlags::DOWNSTREAM
    } else {
        MountPropagationFlags::PRIVATE
    };
    rustix::mount::mount_change("/", propagation | MountPropagationFlags::REC).map_err(|errno| {
        let error = Error::new(Code::Mount, "the container's mounts cannot be made private").cause(errno);
        match errno {
            Errno::INVAL => error.fix(
                "gpurun is in a chroot whose / is not a mount point: mount --bind DIR DIR before chroot DIR",
            ),
            _ => error,
        }
    })?;

    let (root, memory) = mount_root(container, layers, &steps)?;
    let program = if process.init {
        Some(own_program()?)
    } else if handover::is_needed(process)? {
        Some(handover::place(&memory)?)
    } else {
        None
    };
    drop(memory);
    assembly::assemble(&root, steps.mounts)?;
    // Before the volumes, which a link of the image's may lead over /dev: what lies there then is a stranger's.
    let terminal = if process.tty { Some(terminal::open(&root, process)?) } else { None };
    let null = stdio::open_null(&root)?;
    assembly::assemble(&root, steps.volumes)?;
    if let Some((master, _)) = &terminal {
        channel.send_terminal(master)?;
    }
    let failed = |what: &'static str| move || format!("{what} failed while entering the container");
    rustix::process::fchdir(&root).or_fail(Code::Mount, failed("fchdir"))?;
    // pivot_root(2), NOTES: with both the same, the old root lies on the new one and is taken off it.
    rustix::process::pivot_root(".", ".").or_fail(Code::Mount, failed("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .or_fail(Code::Mount, failed("umount of the host's root"))?;
    rustix::process::chdir("/").or_fail(Code::Mount, failed("chdir"))?;
    drop(root);

    if let Some(name) = &container.hostname {
        rustix::system::sethostname(name.as_bytes()).or_fail(Code::Namespace, failed("sethostname"))?;
    }
    if let Some(name) = &container.domainname {
        rustix::system::setdomainname(name.as_bytes()).or_fail(Code::Namespace, failed("setdomainname"))?;
    }
    if !container.host_network {
        loopback_up()?;
    }
    rustix::process::setsid().or_fail(Code::Internal, failed("setsid"))?;
    if let Some((_, slave)) = terminal {
        terminal::install(&slave)?;
    } else {
        streams.give_to(process.user.uid, process.user.gid);
        streams.install(&null)?;
    }
    drop(null);
    process.rlimits.iter().try_for_each(set_limit)?;
    let mut kept: Vec<BorrowedFd<'_>> = program.iter().map(AsFd::as_fd).chain([channel.as_fd()]).collect();
    process::close_others(&mut kept).or_fail(Code::Internal, failed("close_range"))?;
    // The launcher closes the cgroup to foreign devices meanwhile.
    if container.id_map.is_none() {
        channel.wait()?;
    }
    let confine = || confine(container, confinement, seccomp.as_deref(), program.as_ref(), channel);
    if !process.no_new_privileges {
        // Without no_new_privs this needs CAP_SYS_ADMIN, which is dropped next.
        confine()?;
    }
    drop_privileges(process, !container.privileged)?;
    // After the change of user, which clears it: a container dies with its launcher, however that ends.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .or_fail(Code::Internal, failed("prctl"))?;
    if channel.is_closed() {
        process::exit_now(137);
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    enter_directory(&process.cwd)
        .or_fail(Code::CannotRun, || {
            format!("the working directory {} cannot be entered", process.cwd.display())
        })
        .map_err(|error| error.fix("name a directory that the container's user may enter: -w /tmp"))?;
    if process.no_new_privileges {
        confine()?;
    }
    let command = Command::of(process)?;
    Err(match program {
        Some(program) if process.init => start_init(&program, command),
        Some(program) => handover::execute(&program, command, channel),
        None => command.execute(),
    })
}

/// Confines the container's processes: Landlock, separate Unix sockets, and the system call filter. Without the filter the
/// process leaves the host's session keyring instead.
fn confine(
    container: &Container,
    confinement: Confinement,
    seccomp: Option<&[u8]>,
    program: Option<&OwnedFd>,
    channel: &Channel,
) -> Result<()> {
    let unix_sockets = if unix_sockets::are_apart(container) { unix_sockets::stop(container)? } else { None };
    if let Some(listener) = &unix_sockets {
        channel.send_unix_sockets(listener)?;
    }
    confinement.enter(program.map(AsFd::as_fd), unix_sockets.is_some())?;
    // Only the supervisor keeps the descriptor open.
    drop(unix_sockets);
    match seccomp {
        Some(filter) => {
            crate::sys::seccomp::install(filter)
                .or_fail(Code::Seccomp, || "the system call filter cannot be installed")?;
        }
        // The filter denies access to keyrings.
        None => process::leave_keyring().or_fail(Code::Internal, || "the session keyring cannot be left")?,
    }
    Ok(())
}

/// Changes to a directory that the image or a volume may have made a link: one of /proc leads to whatever is open
/// (CVE-2024-21626), so it is not followed.
fn enter_directory(path: &Path) -> rustix::io::Result<()> {
    let root = Root::new(open_host_directory(Path::new("/"))?);
    rustix::process::fchdir(root.open(path, OFlags::PATH | OFlags::DIRECTORY)?)
}

/// Mounts the root (an overlay of the image's layers, gpurun's own layer and the container's scratch directory) and the
/// image's volumes. The path of the mount is used only in this mount namespace.
///
/// Also returns the memory file system that contains gpurun's layer, and is not part of the root.
fn mount_root(container: &Container, layers: &Layers, steps: &Steps) -> Result<(Root, OwnedFd)> {
    let (path, scratch) = container.scratch.open_by_path(&container.id)?;
    // On the scratch directory lies a file system in memory, with gpurun's layer and the root's mount point.
    let flags = Flags { nodev: true, ..Flags::default() };
    let memory = mount::new_filesystem("tmpfs", &[("mode", "0700".into())], flags)?;
    mount::attach(&memory, &scratch, &path)?;
    let added = directory_in(&memory, "layer")?;
    let layer = Layer::new(added, layers, container.privileged)?;
    // Before the mount points: a volume below the home must not make it root's.
    layer.home(&container.process.user)?;
    layer.image_volumes(&container.image_volumes)?;
    layer.populate(&steps.image, steps.mounts.iter().chain(&steps.volumes))?;
    directory_in(&memory, "root")?;
    // By descriptor: another user may be able to change a link in the path of the store, and a mount by that path would lie elsewhere.
    let target = PathBuf::from(format!("/proc/self/fd/{}/root", memory.as_raw_fd()));

    let is_host = layers.lowers().any(|(path, _)| path == Path::new("/"));
    if is_host && !container.privileged {
        let writable = (!container.read_only).then_some(&scratch);
        host_root::mount(container, &layer.into_directory(), writable, &target)?;
        let root =
            open_host_directory(&target).or_fail(Code::Mount, || "the container's root cannot be opened")?;
        let root = Root::new(root);
        image_volumes::mount(container, &root, &[], &scratch, &memory)?;
        return Ok((root, memory));
    }
    let lowers = lower_directories(layers, layer).map_err(|errno| no_overlay(container, errno))?;
    let mount = |upper: Option<&OwnedFd>| -> Result<rustix::io::Result<()>> {
        let writable = upper.map(|at| Ok((directory_in(at, UPPER)?, directory_in(at, WORK)?))).transpose()?;
        Ok(overlay(container, &lowers, writable.as_ref(), &target))
    };
    let mounted = match mount((!container.read_only).then_some(&scratch))? {
        // Not every file system can be an upper layer (another overlay, NFS, Lustre), nor one that is itself below: then what
        // the container writes into its root lies in memory.
        Err(Errno::INVAL | Errno::LOOP | Errno::OPNOTSUPP | Errno::REMOTE) if !container.read_only => {
            mount(Some(&memory))?
        }
        result => result,
    };
    mounted.map_err(|errno| no_overlay(container, errno))?;
    let root =
        open_host_directory(&target).or_fail(Code::Mount, || "the container's root cannot be opened")?;
    let root = Root::new(root);
    image_volumes::mount(container, &root, &lowers, &scratch, &memory)?;
    Ok((root, memory))
}

pub fn directory_in(at: impl AsFd, name: &str) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755))
        .and_then(|()| rustix::fs::openat(&at, name, flags, Mode::empty()))
        .or_fail(Code::Store, || "a directory of the container's root cannot be made")
}

/// The lower directories, topmost first. The launcher's own descriptors belong to the host's mount namespace, which overlayfs
/// refuses (clone_private_mount), so each is opened again and must be the same directory.
fn lower_directories(layers: &Layers, added: Layer) -> rustix::io::Result<Vec<OwnedFd>> {
    let again = layers.lowers().map(|(path, known)| {
        let again =
            rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let identity = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino));
        if identity(&again)? == identity(known)? { Ok(again) } else { Err(Errno::STALE) }
    });
    std::iter::once(Ok(added.into_directory())).chain(again).collect()
}

fn no_overlay(container: &Container, errno: Errno) -> Error {
    Error::new(Code::Mount, "the image's layers cannot be mounted as the container's root")
        .cause(format!("overlay: {errno}"))
        .fix(match errno {
            Errno::NODEV => "load the module: modprobe overlay",
            Errno::PERM if !container.privileged => {
                "overlayfs in a user namespace needs Linux 5.11 or newer; on an older kernel run gpurun as root"
            }
            Errno::INVAL => {
                "name a directory of a disk's file system (ext4, xfs, btrfs) in rootfs:DIR or GPURUN_STORE=DIR: overlayfs cannot be \
                 mounted over /proc, /sys and some network file systems"
            }
            _ => "see `dmesg | grep overlay` for the kernel's reason, or name another directory in GPURUN_STORE",
        })
}

/// Without `writable` (upper and work directory) the root cannot be written, and nothing is made on the disk.
pub fn overlay(
    container: &Container,
    lowers: &[OwnedFd],
    writable: Option<&(OwnedFd, OwnedFd)>,
    target: &Path,
) -> rustix::io::Result<()> {
    // By descriptor: no character needs escaping, and 128 layers fit into the one page that mount(2) takes.
    let path = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
    let lowerdir: Vec<String> = lowers.iter().map(path).collect();
    let mut data = format!("lowerdir={}", lowerdir.join(":"));
    if let Some((upper, work)) = writable {
        // volatile: nothing of this upper layer outlives the container, so it is never synced; without it the end of a
        // container waits for the disk.
        data = format!("{data},upperdir={},workdir={},volatile", path(upper), path(work));
    }
    if !container.privileged {
        // trusted.* belongs to the host's root, and the store marks its layers accordingly.
        data += ",userxattr";
    }
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount("overlay", target, "overlay", MountFlags::NODEV, Some(data.as_c_str()))
}

/// gpurun's own file as a read-only mount, for the container's pid 1 with `--init`: /proc/1/exe would otherwise be a way to write
/// the host's.
fn own_program() -> Result<OwnedFd> {
    use rustix::mount::OpenTreeFlags;
    let own = Path::new("/proc/self/exe");
    let failed = || "gpurun's own file cannot be cloned";
    // By its path: the link itself leads into the mount namespace of the launcher, which nothing can be cloned from here.
    let path = std::fs::read_link(own).or_fail(Code::Mount, failed)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = rustix::mount::open_tree(CWD, &path, flags).or_fail(Code::Mount, failed)?;
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let known = rustix::fs::stat(own).map(identity).or_fail(Code::Mount, failed)?;
    if rustix::fs::fstat(&clone).map(identity) != Ok(known) {
        return Err(Error::new(Code::Mount, format!("{} was replaced while it ran", path.display()))
            .fix("start the container again: `gpurun run …`"));
    }
    crate::sys::mount::restrict(
        clone.as_fd(),
        Flags { read_only: true, nosuid: true, nodev: true, noexec: false },
        false,
    )
    .or_fail(Code::Mount, || "gpurun's own file cannot be made read-only")?;
    Ok(clone)
}

/// Becomes gpurun's own init, which starts the command. Returns only the failure.
fn start_init(own: &OwnedFd, command: Command) -> Error {
    let words: Vec<CString> = std::iter::once(super::INIT_NAME.into()).chain(command.argv).collect();
    let error = process::fexecve(own.as_fd(), &words, &command.env);
    let is_too_long = error.raw_os_error() == Some(libc::E2BIG);
    let error = Error::new(Code::CannotRun, "gpurun cannot start itself in the container").cause(error);
    if is_too_long { error.fix(TOO_LONG) } else { error }
}

fn set_limit(limit: &Rlimit) -> Result<()> {
    let shown = |value: u64| if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() };
    let (_, hard) =
        nix::sys::resource::getrlimit(limit.resource).or_fail(Code::Limit, || "getrlimit failed")?;
    match nix::sys::resource::setrlimit(limit.resource, limit.soft, limit.hard) {
        Ok(()) => Ok(()),
        Err(errno) if limit.required => Err(Error::new(Code::Limit, format!("the limit {} cannot be {}:{}", limit.name, shown(limit.soft), shown(limit.hard)))
            .cause(errno)
            .fix(format!("the hard limit here is {}; ask for at most that, or raise it where gpurun is started (ulimit -H)", shown(hard)))),
        // Wished for, not asked for: as much as this process may have.
        Err(_) => nix::sys::resource::setrlimit(limit.resource, limit.soft.min(hard), hard)
            .or_fail(Code::Limit, || format!("the limit {} cannot be set", limit.name)),
    }
}

fn loopback_up() -> Result<()> {
    crate::sys::process::loopback_up()
        .or_fail(Code::Namespace, || "the loopback device of the container cannot be brought up")
}

fn become_user(uid: u32, gid: u32) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .or_fail(Code::User, || format!("gpurun cannot become {}:{}", uid.as_raw(), gid.as_raw()))
}

/// Capabilities, groups, ids, no_new_privs: in the order in which each still may be changed (capabilities(7)).
fn drop_privileges(process: &Process, rootless: bool) -> Result<()> {
    let user = &process.user;
    let failed = |what: &'static str| move || format!("{what} failed while dropping privileges");
    // Nobody can give what he does not have: root of an enclosing container lacks some, and so may `--cap-add ALL`'s.
    let own = caps::read(None, CapSet::Permitted).or_fail(Code::Internal, failed("capget"))?;
    let wanted: caps::CapsHashSet =
        capability_set(process.capabilities).intersection(&own).copied().collect();
    for capability in caps::all() {
        if !wanted.contains(&capability) {
            // EINVAL: this kernel is older than the capability.
            match caps::drop(None, CapSet::Bounding, capability) {
                Ok(()) => {}
                Err(_) if !caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) => {}
                Err(error) => {
                    return Err(error)
                        .or_fail(Code::Internal, failed("dropping a capability from the bounding set"));
                }
            }
        }
    }
    if let Groups::Set(groups) = &user.groups {
        let groups: Vec<Gid> = groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        match rustix::thread::set_thread_groups(&groups) {
            // As root of an enclosing user namespace in which setgroups(2) is denied (user_namespaces(7)).
            Err(Errno::PERM) if rootless => {}
            result => result.map_err(|errno| {
                Error::new(Code::User, format!("the groups {groups:?} cannot be set"))
                    .cause(errno)
                    .fix("leave out --group-add, or name groups that exist in this user namespace: /proc/self/gid_map")
            })?,
        }
    }
    let keeps = user.uid == 0;
    if keeps {
        rustix::thread::set_keep_capabilities(true).or_fail(Code::Internal, failed("prctl"))?;
    }
    become_user(user.uid, user.gid)?;
    let kept = if keeps { wanted } else { caps::CapsHashSet::new() };
    caps::clear(None, CapSet::Ambient).or_fail(Code::Internal, failed("clearing the ambient set"))?;
    // Effective first: it must stay within permitted.
    for (set, value) in [
        (CapSet::Effective, &kept),
        (CapSet::Permitted, &kept),
        (CapSet::Inheritable, &caps::CapsHashSet::new()),
    ] {
        caps::set(None, set, value).or_fail(Code::Internal, failed("capset"))?;
    }
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).or_fail(Code::Internal, failed("prctl"))?;
    }
    Ok(())
}

fn capability_set(mask: u64) -> caps::CapsHashSet {
    caps::all().into_iter().filter(|c: &Capability| mask & c.bitmask() != 0).collect()
}
