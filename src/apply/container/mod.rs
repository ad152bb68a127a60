//! Our own container, in this process: no daemon, no other runtime, one fork.

mod assembly;
pub mod cgroup;
mod channel;
mod command;
mod enter;
mod guardian;
mod handover;
mod host_proc;
mod host_root;
pub mod identity;
pub mod image_volumes;
pub mod init;
pub mod landlock;
mod layer;
mod process_files;
mod relay;
mod scratch;
pub mod seccomp;
mod signals;
pub mod spec;
mod stdio;
mod survivors;
mod sweep;
mod terminal;
mod unix_sockets;
pub mod user_namespace;

use crate::{
    apply::{loader::SmallFile, rootfs::Layers, tree::Tree},
    error::{Code, Error, OrFail, Result},
    sys::{
        bpf::{DeviceKind, DeviceRule},
        process::{self, Clone},
    },
};
use assembly::{CgroupView, Step};
use cgroup::{Cgroup, Layout};
use channel::{Channel, Said};
use command::Command;
use guardian::Guardian;
pub use init::INIT_NAME;
use landlock::Confinement;
use relay::Running;
use rustix::fd::{AsFd, OwnedFd};
use scratch::Scratch;
use signals::{PidOne, Signals};
use spec::{Container, Process};
use std::path::PathBuf;
use survivors::Survivors;

/// Runs the container to its end. The command's exit code.
///
/// # Errors
/// When the command does not come to run; then nothing of the container is left.
pub fn run(container: Container, layers: Layers) -> Result<u8> {
    let confinement = Confinement::of(&container)?;
    let seccomp = container.process.seccomp.then(|| seccomp::filter(container.process.capabilities));
    let (ours, theirs) = Channel::pair()?;
    let signals = Signals::block()?;
    let (inside, outside) = stdio::connect(&container.process)?;

    let covers = covers(&container)?;
    let scratch = Scratch::create(&container.scratch, &container.id, container.id_map.clone())?;
    if let Some(parent) = &container.limits.parent
        && let Err(error) = scratch.remember_cgroup_parent(parent)
    {
        return Err(after(error, scratch.remove()));
    }
    let mut cgroup = match Cgroup::create(&container.id, &container.limits, container.privileged) {
        Ok(cgroup) => cgroup,
        Err(error) => return Err(after(error, scratch.remove())),
    };
    let entry = enter::Entry {
        steps: assembly::steps(&container, &cgroup_view(cgroup.as_ref()), host_files(&container), covers),
        seccomp,
        confinement,
        streams: inside,
        layers: &layers,
        container: &container,
    };
    let started = start(entry, ours, theirs, cgroup.as_mut());
    let Process { interactive, stop_signal, .. } = container.process;
    let (memory, has_user_namespace) = (container.limits.memory, container.id_map.is_some());
    // What the start needed is not needed to wait: the launcher of a container that runs for weeks stays small.
    drop((container, layers));
    process::release_memory();
    if started.is_ok() {
        scratch.sweep_beside();
    }
    let result = started.and_then(|Started { pid_one, survivors, guardian, terminal, unix_sockets }| {
        let running = Running {
            pid_one,
            streams: outside,
            terminal,
            unix_sockets,
            has_user_namespace,
            counted_in: cgroup.as_ref().filter(|_| memory.is_some()),
            interactive,
            stop_signal,
        };
        let result = relay::relay(running, &signals);
        if let Some(survivors) = survivors {
            survivors.end();
        }
        drop(guardian);
        result
    });
    if let (Ok(1..), Some(limit), Some(cgroup)) = (&result, memory, &cgroup)
        && cgroup.ran_out_of_memory()
    {
        tracing::warn!("{}", out_of_memory(limit));
    }
    let removed = cgroup.map_or(Ok(()), Cgroup::remove).and(scratch.remove());
    match (result, removed) {
        (Ok(code), removed) => {
            if let Err(error) = removed {
                // The command has its own exit code; the next start removes what is left.
                tracing::debug!(%error, "left for the next start to remove");
            }
            Ok(code)
        }
        (Err(error), removed) => Err(after(error, removed)),
    }
}

/// The failure that came first is the one to report.
fn after(error: Error, cleaned: Result<()>) -> Error {
    match cleaned {
        Ok(()) => error,
        Err(second) => error.cause(second.what()),
    }
}

/// The message for a process that was killed by the memory limit.
fn out_of_memory(limit: u64) -> String {
    let (amount, unit) = match limit {
        _ if limit.is_multiple_of(1 << 30) => (limit >> 30, "g"),
        _ if limit.is_multiple_of(1 << 20) => (limit >> 20, "m"),
        _ if limit.is_multiple_of(1 << 10) => (limit >> 10, "k"),
        _ => (limit, "b"),
    };
    format!(
        "the container exceeded its memory limit (-m {amount}{unit}), and the kernel killed one of its processes; \
         raise the limit: -m {}{unit}",
        amount.saturating_mul(2)
    )
}

struct Started {
    pid_one: PidOne,
    survivors: Option<Survivors>,
    /// `None` if it could not be started.
    guardian: Option<Guardian>,
    terminal: Option<OwnedFd>,
    unix_sockets: Option<OwnedFd>,
}

fn start(
    entry: enter::Entry<'_>,
    ours: Channel,
    theirs: Channel,
    cgroup: Option<&mut Cgroup>,
) -> Result<Started> {
    let container = entry.container;
    let clone = process::clone_into(namespaces(container), cgroup.as_deref().and_then(Cgroup::dir_fd))
        .map_err(|error| refused(&error))?;
    let (pidfd, pid) = match clone {
        Clone::Child => {
            // Its own copy of the launcher's end would keep it from seeing that the launcher is gone.
            drop(ours);
            let error = enter::enter(entry, &theirs);
            theirs.send_failure(&error);
            process::exit_now(i32::from(error.code().exit_code()));
        }
        Clone::Parent(pidfd, pid) => (pidfd, pid),
    };
    drop((theirs, entry.streams));
    let survivors =
        container.host_pid.then(|| Survivors::of(pid, container.id_map.is_some(), cgroup.as_deref()));
    let survivors =
        survivors.transpose().or_fail(Code::Namespace, || "the container's user namespace cannot be opened");
    // What only the launcher can do for the child, while that makes its root.
    let prepared = survivors
        .and_then(|survivors| prepare(container, pid, cgroup).and_then(|()| ours.go()).map(|()| survivors));
    let survivors = prepared.as_ref().ok().and_then(Option::as_ref);
    let guardian = guardian::start(pidfd.as_fd(), survivors)
        .inspect_err(|error| {
            tracing::warn!(
                "a container that changes its user will outlive a killed launcher: no guardian can be started ({error})"
            );
        })
        .ok();
    let talked = prepared.and_then(|survivors| {
        let (mut terminal, mut unix_sockets) = (None, None);
        loop {
            match ours.receive()? {
                Said::Nothing => return Ok((survivors, terminal, unix_sockets)),
                Said::Terminal(master) => terminal = Some(master),
                Said::UnixSockets(listener) => unix_sockets = Some(listener),
                Said::NotExecuted { path, errno } => {
                    return Err(Command::of(&container.process)?.failure(path, errno));
                }
                Said::Failure(error) => return Err(error),
            }
        }
    });
    let talked = talked.and_then(|ready| write_pid_file(container, pid).map(|()| ready));
    match talked {
        Ok((survivors, terminal, unix_sockets)) => {
            Ok(Started { pid_one: PidOne::new(pidfd, pid), survivors, guardian, terminal, unix_sockets })
        }
        Err(error) => {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            let options = rustix::process::WaitIdOptions::EXITED;
            let _ = rustix::io::retry_on_intr(|| {
                rustix::process::waitid(
                    rustix::process::WaitId::PidFd(rustix::fd::AsFd::as_fd(&pidfd)),
                    options,
                )
            });
            Err(error)
        }
    }
}

/// `--pidfile`
fn write_pid_file(container: &Container, pid: i32) -> Result<()> {
    let Some(path) = &container.pid_file else { return Ok(()) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    // A misspelt path is not made, as Docker and Podman do not make it.
    parent
        .map_or(Ok(()), |parent| std::fs::metadata(parent).map(drop))
        .or_fail(Code::Usage, || format!("--pidfile {} cannot be written", path.display()))
        .and_then(|()| crate::apply::whole_file::write(path, &pid.to_string(), Code::Usage).map(drop))
        .map_err(|error| {
            error.fix(
                "name a file in a directory that exists and that you may write: --pidfile ./container.pid",
            )
        })
}

fn prepare(container: &Container, pid: i32, cgroup: Option<&mut Cgroup>) -> Result<()> {
    if let Some(map) = &container.id_map {
        user_namespace::write_id_map(pid, map)?;
    }
    if let (Some(cgroup), Some(pid)) = (cgroup, rustix::process::Pid::from_raw(pid)) {
        if container.privileged && !container.all_devices {
            cgroup.restrict(&device_rules(container))?;
        }
        cgroup.join(pid)?;
    }
    Ok(())
}

fn namespaces(container: &Container) -> u64 {
    let mut flags = libc::CLONE_NEWNS;
    for (wanted, flag) in [
        (container.id_map.is_some(), libc::CLONE_NEWUSER),
        (!container.host_pid, libc::CLONE_NEWPID),
        (!container.host_uts, libc::CLONE_NEWUTS),
        (!container.host_ipc, libc::CLONE_NEWIPC),
        (!container.host_network, libc::CLONE_NEWNET),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    u64::from(flags.unsigned_abs())
}

fn refused(error: &std::io::Error) -> Error {
    let what = Error::new(Code::Namespace, "the kernel refuses to make the container's namespaces");
    match error.raw_os_error() {
        Some(libc::EPERM) => what.cause(format!("clone3: {error}")).fix(
            "ordinary users need unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1 and \
             kernel.apparmor_restrict_unprivileged_userns=0 where the host has these keys; or run gpurun as root",
        ),
        Some(libc::ENOSPC) => what.cause(format!("clone3: {error}")).fix("raise the limits in /proc/sys/user/max_*_namespaces"),
        Some(libc::ENOSYS) => what.cause(format!("clone3: {error}")).fix("gpurun needs Linux 5.12 or newer"),
        _ => what.cause(format!("clone3: {error}")),
    }
}

/// What the container's cgroup allows: the devices that every container has, and the GPU's. Without root there is no such
/// rule, and no node can be made either: what is not mounted is not there.
fn device_rules(container: &Container) -> Vec<DeviceRule> {
    let standard = assembly::STANDARD_DEVICES.iter().map(|&(_, major, minor)| (major, Some(minor)));
    // 136 is the first of the pseudo-terminals, 5:2 is ptmx.
    let terminals = [(5, Some(2)), (136, None)];
    let gpus = container.injection.devices.iter().map(|n| (n.major, Some(n.minor)));
    let rule = |(major, minor)| DeviceRule {
        kind: DeviceKind::Char,
        major: Some(major),
        minor,
        read: true,
        write: true,
        mknod: true,
    };
    // As Docker has it, any node may be made: package managers and debootstrap do so. Not that it could be opened.
    let nodes = [DeviceKind::Char, DeviceKind::Block].map(|kind| DeviceRule {
        kind,
        major: None,
        minor: None,
        read: false,
        write: false,
        mknod: true,
    });
    let asked =
        container.devices.iter().map(|device| device.rule).chain(container.device_rules.iter().copied());
    standard.chain(terminals).chain(gpus).map(rule).chain(nodes).chain(asked).collect()
}

/// How the container sees its cgroup.
fn cgroup_view(cgroup: Option<&Cgroup>) -> CgroupView {
    match (Layout::current(), cgroup) {
        (Layout::Unified, _) => CgroupView::Unified,
        (_, Some(cgroup)) => CgroupView::Legacy(cgroup.legacy_view()),
        (_, None) => CgroupView::Legacy(Vec::new()),
    }
}

/// The small files to mount; each is a file on the host.
fn covers(container: &Container) -> Result<Vec<Step>> {
    let cover = |file: &SmallFile| {
        let source = Tree::place_file(&file.content, &container.state_dir)?;
        Ok(Step::Cover { source, target: file.path.clone() })
    };
    container.placement.covers.iter().map(cover).collect()
}

/// The files by which a container knows its host's network, as Docker writes them.
fn host_files(container: &Container) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let name = container
        .hostname
        .clone()
        .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
    let full_name = match &container.domainname {
        Some(domain) => format!("{name}.{domain} {name}"),
        None => name.clone(),
    };
    let host = |path: &str| if container.host_network { std::fs::read(path).ok() } else { None };
    let own = || format!("127.0.0.1 localhost {full_name}\n::1 localhost {full_name}\n").into_bytes();
    let hosts = if container.host_network { host("/etc/hosts") } else { Some(own()) };
    if hosts.is_some() || !container.hosts.is_empty() {
        let mut hosts = hosts.unwrap_or_default();
        if hosts.last().is_some_and(|last| *last != b'\n') {
            hosts.push(b'\n');
        }
        for entry in &container.hosts {
            hosts.extend(format!("{}\t{}\n", entry.address, entry.name).into_bytes());
        }
        files.push(("/etc/hosts".into(), hosts));
    }
    let resolv = host("/etc/resolv.conf");
    match &container.dns {
        Some(dns) => files.push(("/etc/resolv.conf".into(), dns.over(&resolv.unwrap_or_default()))),
        None => files.extend(resolv.map(|content| ("/etc/resolv.conf".into(), content))),
    }
    files.push(("/etc/hostname".into(), (name + "\n").into_bytes()));
    files
}
