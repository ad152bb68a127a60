//! Options for namespaces: `--network`, `--ipc`, `--pid`, `--uts`, `--cgroupns`, `--userns`; and `--sysctl`, because its
//! parameters belong to namespaces.

use super::usage;
use crate::{cli::Run, error::Result};

/// The namespaces that are shared with the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    /// The host's network; otherwise only a loopback device.
    pub host_network: bool,
    /// IPC objects and /dev/shm.
    pub ipc: Ipc,
    /// The host's processes.
    pub host_pid: bool,
    /// The host's name.
    pub host_uts: bool,
    /// The host's view of cgroups.
    pub host_cgroups: bool,
    /// `--userns keep-id`: the user is the caller by number.
    pub keep_id: bool,
    /// Parameters below /proc/sys, with dots, and their values.
    pub sysctls: Vec<(String, String)>,
}

/// `--ipc`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipc {
    /// The container's own IPC objects and /dev/shm.
    Private,
    /// The container's own IPC objects, and no /dev/shm.
    WithoutShm,
    /// The host's IPC objects and /dev/shm.
    Host,
}

/// Parses the options.
///
/// # Errors
/// [`crate::error::Code::Usage`] for modes that need another container or a network, with what to do instead.
pub fn namespaces(args: &Run) -> Result<Namespaces> {
    let mut namespaces = Namespaces {
        host_network: network(&args.network)?,
        ipc: ipc(args.ipc.as_deref())?,
        host_pid: is_host(
            "pid",
            args.pid.as_deref(),
            "leave it out for processes of its own, or write --pid host",
        )?,
        host_uts: is_host(
            "uts",
            args.uts.as_deref(),
            "leave it out for a name of its own, or write --uts host",
        )?,
        host_cgroups: is_host(
            "cgroupns",
            args.cgroupns.as_deref(),
            "write --cgroupns private or --cgroupns host",
        )?,
        keep_id: keeps_id(args.userns.as_deref())?,
        sysctls: Vec::new(),
    };
    if namespaces.host_uts && (args.hostname.is_some() || args.domainname.is_some()) {
        return Err(usage("--uts host keeps the host's name, and --hostname or --domainname sets another")
            .fix("leave out --uts host, or --hostname and --domainname"));
    }
    namespaces.sysctls = args.sysctl.iter().map(|text| sysctl(text, &namespaces)).collect::<Result<_>>()?;
    Ok(namespaces)
}

/// Whether the container has the host's network.
pub fn network(typed: &[String]) -> Result<bool> {
    match typed {
        [] => Ok(true),
        [one] if one == "host" => Ok(true),
        [one] if one == "none" => Ok(false),
        other => Err(usage(format!("--network {}: gpurun makes no networks", other.join(" --network "))).fix(
            "write `--network host` (the default: every port of the container is a port of the host) or `--network none` (only a loopback device)",
        )),
    }
}

fn ipc(typed: Option<&str>) -> Result<Ipc> {
    match typed.unwrap_or("private") {
        "private" | "shareable" | "" => Ok(Ipc::Private),
        "none" => Ok(Ipc::WithoutShm),
        "host" => Ok(Ipc::Host),
        other => Err(usage(format!("--ipc {other} cannot be served"))
            .fix("start both containers with --ipc host, which share the host's /dev/shm; choose from private, host, none")),
    }
}

/// Parses an option for a namespace that is private or the host's.
fn is_host(option: &str, typed: Option<&str>, fix: &str) -> Result<bool> {
    match typed {
        None | Some("" | "private") => Ok(false),
        Some("host") => Ok(true),
        Some(other) => Err(usage(format!("--{option} {other} cannot be served")).fix(fix)),
    }
}

fn keeps_id(typed: Option<&str>) -> Result<bool> {
    match typed {
        // The host's user namespace is the default for root; as in Podman, an ordinary user always needs a new one.
        None | Some("" | "host") => Ok(false),
        Some("keep-id") => Ok(true),
        Some(other) => Err(usage(format!("--userns {other} cannot be served")).fix(
            "choose from host and keep-id (the caller's own uid and gid); -u UID:GID chooses any other user",
        )),
    }
}

/// Parses `NAME=VALUE` for a parameter of the container's own namespaces, by runc's list (libcontainer/configs/validate).
fn sysctl(text: &str, namespaces: &Namespaces) -> Result<(String, String)> {
    const IPC: [&str; 8] =
        ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];
    let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
        return Err(usage(format!("--sysctl {text:?} does not set a parameter"))
            .fix("write --sysctl NAME=VALUE: --sysctl kernel.shmmax=68719476736"));
    };
    // sysctl(8): if a slash precedes the first dot, slashes separate and dots belong to names.
    let name = match (name.find('/'), name.find('.')) {
        (Some(slash), dot) if dot.is_none_or(|dot| slash < dot) => {
            name.replace('.', "\0").replace('/', ".").replace('\0', "/")
        }
        _ => name.to_owned(),
    };
    let refused =
        |why: &str, fix: &str| Err(usage(format!("--sysctl {name} cannot be set")).cause(why).fix(fix));
    // The host's /proc/sys has the parameters of every namespace.
    let path = name.replace('/', "\0").replace('.', "/").replace('\0', ".");
    let exists =
        || name.starts_with("net.") || std::fs::symlink_metadata(format!("/proc/sys/{path}")).is_ok();
    if name.split(['.', '/']).any(|word| word.is_empty() || word.trim() != word)
        || value.contains('\0')
        || !exists()
    {
        return refused(
            "it is not the name of a parameter",
            "`sysctl -a` lists the names; write --sysctl NAME=VALUE, without blanks at the =",
        );
    }
    if IPC.iter().any(|known| name.strip_prefix("kernel.") == Some(known)) || name.starts_with("fs.mqueue.") {
        return match namespaces.ipc {
            Ipc::Host => refused(
                "the container has the host's IPC objects",
                "leave out --ipc host, or set it on the host: sysctl -w",
            ),
            Ipc::Private | Ipc::WithoutShm => Ok((name, value.to_owned())),
        };
    }
    if name.starts_with("net.") {
        return if namespaces.host_network {
            refused(
                "the container has the host's network",
                "add --network none, or set it on the host: sysctl -w",
            )
        } else {
            Ok((name, value.to_owned()))
        };
    }
    if name == "kernel.domainname" && !namespaces.host_uts {
        return Ok((name, value.to_owned()));
    }
    refused(
        "it belongs to the whole host and to no container",
        &format!("set it on the host: sysctl -w '{name}={}'", value.trim()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;

    fn refused(words: &[&str]) -> String {
        let error = namespaces(&run(words)).unwrap_err();
        assert!(!error.fix_line().is_empty(), "{error}");
        error.to_string()
    }

    #[test]
    fn modes_are_dockers() {
        let of = |words: &[&str]| namespaces(&run(words)).unwrap();
        let default = of(&[]);
        assert!(
            default.host_network && default.ipc == Ipc::Private && !default.host_pid && !default.host_uts
        );
        assert!(!of(&["--net=none"]).host_network);
        assert_eq!(of(&["--ipc", "shareable"]).ipc, Ipc::Private);
        assert_eq!(of(&["--ipc=none"]).ipc, Ipc::WithoutShm);
        assert!(of(&["--pid=host", "--uts=host", "--cgroupns", "host"]).host_pid);
        assert!(of(&["--userns", "keep-id"]).keep_id && !of(&["--userns=host"]).keep_id);
        for words in [
            &["--network", "mynet"] as &[_],
            &["--network", "host", "--network", "none"],
            &["--ipc", "container:abc"],
            &["--pid", "container:abc"],
            &["--userns", "auto"],
            &["--cgroupns", "x"],
            &["--uts", "host", "-h", "x"],
        ] {
            refused(words);
        }
        assert!(refused(&["--network", "mynet"]).contains("--network host"));
    }

    #[test]
    fn parameters_of_the_containers_own_namespaces_can_be_set() {
        let of = |words: &[&str]| namespaces(&run(words)).unwrap().sysctls;
        let own = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
        assert_eq!(of(&["--sysctl", "kernel.shmmax=1"]), own("kernel.shmmax", "1"));
        assert_eq!(of(&["--sysctl", "kernel/sem=1 2 3 4"]), own("kernel.sem", "1 2 3 4"));
        assert_eq!(
            of(&["--sysctl", "net.core.somaxconn=9", "--network=none"]),
            own("net.core.somaxconn", "9")
        );
        let name = of(&["--sysctl", "net/ipv4/conf/eth0.1/forwarding=1", "--network=none"]).remove(0).0;
        assert_eq!(name, "net.ipv4.conf.eth0/1.forwarding");
        for (words, why) in [
            (&["--sysctl", "net.core.somaxconn=9"] as &[_], "host's network"),
            (&["--sysctl", "kernel.shmmax=1", "--ipc", "host"], "host's IPC"),
            (&["--sysctl", "vm.overcommit_memory=1"], "whole host"),
            (&["--sysctl", "kernel..x=1"], "not the name"),
            (&["--sysctl", "KERNEL.MSGMAX=1"], "not the name"),
            (&["--sysctl", "kernel.msgmax = 1"], "not the name"),
            (&["--sysctl", "nonsense=1"], "not the name"),
            (&["--sysctl", "vm.swappiness=1"], "sysctl -w 'vm.swappiness=1'"),
            (&["--sysctl", "kernel.shmmax"], "does not set"),
            (&["--sysctl", "net.../x=1", "--network=none"], "not the name"),
        ] {
            assert!(refused(words).contains(why), "{words:?}");
        }
    }
}
