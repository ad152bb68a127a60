//! Landlock confinement of a container's processes.
//!
//! A container on the host's network shares the abstract Unix sockets of the host. Any local process can pass it a descriptor
//! of the host's `/` through one, and a container of uid 0 would then open every file of the host. So before the command runs,
//! its process enters a Landlock domain:
//!
//! | restriction | kernel | effect |
//! |---|---|---|
//! | files | ABI 2 (Linux 5.19) | open, execute, create, rename, link, remove and truncate work only beneath the container's `/`, through every mount there. Descriptors from outside cannot be used for that, whether they were passed, inherited (CVE-2024-21626) or reached through /proc |
//! | abstract Unix sockets | ABI 6 (Linux 6.12) | the container connects only to its own sockets, not to X11, D-Bus or others
//! that trust the caller's uid. Not used where [`super::unix_sockets`] separates them |
//! | signals | ABI 6 | the container signals only its own processes |
//!
//! ABI 1 has no file domain: it forbids every rename between directories, which breaks package managers.
//!
//! Landlock does not restrict chmod, chown, utime, extended attributes, stat and chdir, nor connect(2) to a socket with a path
//! (as of ABI 7). The module [`super::unix_sockets`] prevents foreign descriptors from reaching containers.
//!
//! A Landlock domain that restricts files also forbids mount(2) and pivot_root(2) permanently. Containers that may mount
//! therefore
//! have no file domain: those with `CAP_SYS_ADMIN` (`--cap-add SYS_ADMIN`, `--privileged`), and those without a system call
//! filter, which make mounts in user namespaces of their own (bubblewrap, Apptainer, rootless Podman), unless their uid 0 is the
//! host's. The first kind could leave the container anyway; for the second kind the user disabled the protection explicitly.

use super::spec::Container;
use crate::{
    error::{Code, Error, Result},
    sys::landlock::{self, ABSTRACT_UNIX_SOCKETS, RUN_FILE, Ruleset, SIGNALS},
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    io::Errno,
};

/// ABI with which renames between directories can be allowed.
const FILES: u32 = 2;
/// ABI with scopes.
const SCOPES: u32 = 6;
/// The bit of CAP_SYS_ADMIN.
const SYS_ADMIN: u64 = 1 << 21;

/// What a container's domain restricts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confinement {
    /// LANDLOCK_ACCESS_FS_*; 0 restricts no files.
    rights: u64,
    scopes: bool,
}

/// The facts about a container that decide its confinement.
#[derive(Debug, Clone, Copy)]
struct Facts {
    /// Whether the container's uid 0 is the host's: root started it outside of any user namespace.
    is_host_root: bool,
    host_network: bool,
    /// Whether `--network` was given.
    network_requested: bool,
    may_mount: bool,
    filtered: bool,
}

impl Confinement {
    /// The confinement of this container on the running kernel.
    ///
    /// # Errors
    /// [`Code::Confinement`] if the host's root would share the host's network without a file domain and no option asks for that. Without
    /// scopes [`super::unix_sockets`] still keeps foreign descriptors out.
    pub fn of(container: &Container) -> Result<Self> {
        if container.all_devices {
            // `--privileged` asks for no confinement.
            return Ok(Self { rights: 0, scopes: false });
        }
        let process = &container.process;
        let facts = Facts {
            is_host_root: container.privileged && process.user.uid == 0,
            host_network: container.host_network,
            network_requested: container.network_requested,
            may_mount: process.capabilities & SYS_ADMIN != 0,
            filtered: process.seccomp,
        };
        Self::decide(landlock::abi(), facts)
    }

    fn decide(abi: u32, facts: Facts) -> Result<Self> {
        let shares_network = facts.is_host_root && facts.host_network;
        if shares_network && !facts.network_requested && abi < FILES {
            return Err(Error::new(
                Code::Confinement,
                "this kernel cannot confine a container of uid 0 on the host's network",
            )
            .cause(format!(
                "any process of the host could pass it a descriptor of the host's files; Landlock ABI {FILES} (Linux 5.19) forbids their use, and this kernel has ABI {abi}"
            ))
            .fix(
                "type --network host to run it nevertheless, or --network none, or -u 1000; or boot Linux 5.19 or newer with \
                 landlock in the kernel's option lsm=",
            ));
        }
        let mounts = facts.may_mount || (!facts.filtered && !facts.is_host_root);
        let rights = if abi >= FILES && !mounts { landlock::file_rights(abi) } else { 0 };
        Ok(Self { rights, scopes: abi >= SCOPES })
    }

    /// Confines this process. Its root is the container's, and it has no_new_privs. `program` is gpurun's own file outside of
    /// that root, if the process is about to execute it. With `sockets_are_apart` a supervisor of [`super::unix_sockets`] makes
    /// the sockets; they belong to no domain, so the scope would refuse abstract sockets among the container's own processes.
    pub fn enter(self, program: Option<BorrowedFd<'_>>, sockets_are_apart: bool) -> Result<()> {
        if self.rights == 0 && !self.scopes {
            return Ok(());
        }
        let scopes = match (self.scopes, sockets_are_apart) {
            (false, _) => 0,
            (true, true) => SIGNALS,
            (true, false) => SIGNALS | ABSTRACT_UNIX_SOCKETS,
        };
        self.enforce(program, scopes).map_err(|error| {
            Error::new(Code::Confinement, "the container's process cannot be confined")
                .cause(format!("Landlock: {error}"))
                .fix("start gpurun outside of other sandboxes: the kernel nests sixteen domains")
        })
    }

    fn enforce(self, program: Option<BorrowedFd<'_>>, scopes: u64) -> std::io::Result<()> {
        let rules = Ruleset::new(self.rights, scopes)?;
        if self.rights != 0 {
            let open = |path| -> rustix::io::Result<Option<OwnedFd>> {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::open(path, flags, Mode::empty()) {
                    Ok(fd) => Ok(Some(fd)),
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
                    Err(errno) => Err(errno),
                }
            };
            // mq_open(3) uses the kernel's own mount of the message queues, which is not beneath "/".
            for directory in ["/", "/dev/mqueue"] {
                if let Some(directory) = open(directory)? {
                    rules.allow_beneath(directory.as_fd(), self.rights)?;
                }
            }
            if let Some(program) = program {
                rules.allow_beneath(program, RUN_FILE)?;
            }
        }
        rules.enforce()
    }
}

/// The report of `gpurun doctor` about Landlock.
///
/// # Errors
/// [`Code::Confinement`] if containers of root must ask for the host's network.
pub fn landlock() -> Result<String> {
    let facts = Facts {
        is_host_root: true,
        host_network: true,
        network_requested: false,
        may_mount: false,
        filtered: true,
    };
    let abi = landlock::abi();
    Confinement::decide(abi, facts).map(|_| format!("ABI {abi}: containers use no file of the host"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Facts = Facts {
        is_host_root: true,
        host_network: true,
        network_requested: false,
        may_mount: false,
        filtered: true,
    };

    fn files(abi: u32, facts: Facts) -> bool {
        Confinement::decide(abi, facts).unwrap().rights != 0
    }

    #[test]
    fn root_must_ask_for_the_hosts_network_where_the_kernel_cannot_confine_it() {
        for abi in 0..FILES {
            let error = Confinement::decide(abi, ROOT).unwrap_err();
            assert!(error.fix_line().contains("--network host"), "{error}");
            for facts in [
                Facts { network_requested: true, ..ROOT },
                Facts { is_host_root: false, ..ROOT },
                Facts { host_network: false, ..ROOT },
            ] {
                Confinement::decide(abi, facts).unwrap();
            }
        }
        for abi in FILES..=SCOPES {
            let confinement = Confinement::decide(abi, ROOT).unwrap();
            assert_eq!((confinement.rights != 0, confinement.scopes), (true, abi >= SCOPES));
        }
    }

    #[test]
    fn files_are_confined_unless_the_container_may_mount() {
        let typed = Facts { network_requested: true, ..ROOT };
        let user = Facts { is_host_root: false, ..ROOT };
        assert!(!files(1, typed) && files(2, typed) && files(7, ROOT) && files(7, user));
        assert!(!files(7, Facts { may_mount: true, ..ROOT }));
        assert!(files(7, Facts { filtered: false, ..ROOT }));
        assert!(!files(7, Facts { filtered: false, ..user }));
    }
}
