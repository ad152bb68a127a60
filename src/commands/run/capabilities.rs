//! `--cap-add` and `--cap-drop`.

use super::usage;
use crate::{
    cli::Run,
    error::{Code, Error, OrFail, Result},
};

/// The bit of CAP_SYS_ADMIN, which Docker takes for privileged.
pub const SYS_ADMIN: u64 = 1 << 21;

/// Docker's default capabilities for root (oci/caps/defaults.go).
const DEFAULT_CAPABILITIES: [caps::Capability; 14] = {
    use caps::Capability as C;
    [
        C::CAP_CHOWN,
        C::CAP_DAC_OVERRIDE,
        C::CAP_FSETID,
        C::CAP_FOWNER,
        C::CAP_MKNOD,
        C::CAP_NET_RAW,
        C::CAP_SETGID,
        C::CAP_SETUID,
        C::CAP_SETFCAP,
        C::CAP_SETPCAP,
        C::CAP_NET_BIND_SERVICE,
        C::CAP_SYS_CHROOT,
        C::CAP_KILL,
        C::CAP_AUDIT_WRITE,
    ]
};

/// Applies `--cap-add` and `--cap-drop` to the default set, which only root has. On the host's network the set lacks NET_RAW,
/// which would let the container read and forge the packets of every program on the host.
pub fn capabilities(args: &Run, root: bool) -> Result<u64> {
    let mask = |names: &[String]| -> Result<u64> {
        names.iter().try_fold(0, |mask, name| {
            let upper = name.to_ascii_uppercase();
            if upper == "ALL" {
                return Ok(caps::all().iter().fold(mask, |mask, c| mask | c.bitmask()));
            }
            let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
            let capability: caps::Capability = full.parse().map_err(|_| {
                usage(format!("there is no capability {name:?}"))
                    .fix("capabilities(7) lists them: SYS_PTRACE, NET_ADMIN, …")
            })?;
            Ok(mask | capability.bitmask())
        })
    };
    let mut default =
        if root { DEFAULT_CAPABILITIES.iter().fold(0, |mask, c| mask | c.bitmask()) } else { 0 };
    if super::namespaces::network(&args.network)? {
        default &= !caps::Capability::CAP_NET_RAW.bitmask();
    }
    if args.privileged {
        default = mask(&["ALL".to_owned()])?;
    }
    let (added, dropped) = (mask(&args.cap_add)?, mask(&args.cap_drop)?);
    // As in Docker, a named capability overrides ALL of the other option.
    let all = |names: &[String]| names.iter().any(|n| n.eq_ignore_ascii_case("all"));
    Ok(if all(&args.cap_drop) { mask(&args.cap_add)? } else { (default | added) & !dropped })
}

/// Refuses a named capability that this process does not hold; `ALL` means all that it holds.
pub fn can_give(args: &Run) -> Result<()> {
    let own = caps::read(None, caps::CapSet::Permitted).or_fail(Code::Internal, || "capget failed")?;
    let named = args.cap_add.iter().filter(|name| !name.eq_ignore_ascii_case("all"));
    for name in named {
        let full = name.to_ascii_uppercase();
        let full = if full.starts_with("CAP_") { full } else { format!("CAP_{full}") };
        if full.parse().is_ok_and(|capability| !own.contains(&capability)) {
            return Err(Error::new(Code::User, format!("{full} cannot be given to the container"))
                .cause("gpurun does not hold it itself")
                .fix("start gpurun where root holds it, or leave it out"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;

    #[test]
    fn capabilities_are_dockers() {
        let mask = |words: &[&str], root| capabilities(&run(words), root).unwrap();
        assert_eq!(mask(&["--network", "none"], true), 0xa804_25fb, "Docker's CapBnd");
        assert_eq!(mask(&[], true), 0xa804_05fb, "without NET_RAW");
        assert_eq!(mask(&[], false), 0);
        assert_eq!(mask(&["--cap-drop", "all", "--cap-add", "cap_kill"], true), 1 << 5);
        assert_eq!(mask(&["--cap-add", "SYS_PTRACE", "--cap-drop", "MKNOD"], true), 0xa004_05fb | 1 << 19);
        assert!(capabilities(&run(&["--cap-add", "FLY"]), true).is_err());
    }
}
