//! `--security-opt` and `--privileged`, which reduce the container's confinement.

use super::usage;
use crate::{
    cli::{Run, is_true},
    error::Result,
};

/// Confinement of a container besides namespaces and capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Security {
    /// Docker's system call filter.
    pub seccomp: bool,
    /// Whether no_new_privs is set.
    pub no_new_privileges: bool,
    /// Parts of /proc and /sys are hidden or read-only.
    pub masked_paths: bool,
    /// `--privileged`: all of the host's devices, and /sys and cgroups can be written.
    pub privileged: bool,
}

/// Parses the options. `--privileged` applies first, and `--security-opt` can revert parts of it.
///
/// # Errors
/// [`crate::error::Code::Usage`] for unsupported values.
pub fn security(args: &Run) -> Result<Security> {
    let privileged = args.privileged;
    let mut security = Security {
        seccomp: !privileged,
        no_new_privileges: !privileged,
        masked_paths: !privileged,
        privileged,
    };
    for option in &args.security_opt {
        apply(&mut security, option)?;
    }
    Ok(security)
}

fn apply(security: &mut Security, option: &str) -> Result<()> {
    // Docker also accepts ":", the separator before 1.11.
    let (name, value) =
        option.split_once(['=', ':']).map_or((option, None), |(name, value)| (name, Some(value)));
    let refused = |fix: &str| Err(usage(format!("--security-opt {option} cannot be served")).fix(fix));
    match (name, value) {
        ("seccomp", Some("unconfined")) => security.seccomp = false,
        ("seccomp", Some("builtin" | "default")) => security.seccomp = true,
        ("seccomp", _) => {
            return refused(
                "gpurun reads no profiles: leave it out for Docker's default profile, or write seccomp=unconfined for none",
            );
        }
        ("no-new-privileges", None) => security.no_new_privileges = true,
        ("no-new-privileges", Some(value)) => match is_true(value) {
            Some(on) => security.no_new_privileges = on,
            None => return refused("write no-new-privileges=true or no-new-privileges=false"),
        },
        ("systempaths", Some("unconfined")) => security.masked_paths = false,
        ("unmask", Some(paths)) if paths.eq_ignore_ascii_case("all") => security.masked_paths = false,
        // gpurun sets no label, so containers have gpurun's own.
        ("label", Some("disable" | "nested")) | ("apparmor", Some("unconfined")) | ("disable", None) => {}
        ("label", Some(_)) => {
            tracing::warn!(
                "--security-opt {option} has no effect: gpurun sets no SELinux label, and the container has gpurun's own"
            );
        }
        ("apparmor", Some(_)) => {
            return refused(
                "gpurun loads no AppArmor profile: start gpurun itself in it: aa-exec -p PROFILE -- gpurun run …",
            );
        }
        ("mask" | "unmask", Some(_)) => {
            return refused(
                "systempaths=unconfined shows all of /proc and /sys; -v /dev/null:PATH hides a file",
            );
        }
        _ => {
            return refused(
                "choose from seccomp=unconfined, no-new-privileges=false, systempaths=unconfined, label=disable, apparmor=unconfined",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;

    #[test]
    fn security_options_are_dockers() {
        let of = |words: &[&str]| security(&run(words)).unwrap();
        let shown = |s: Security| [s.seccomp, s.no_new_privileges, s.masked_paths, s.privileged];
        assert_eq!(shown(of(&[])), [true, true, true, false]);
        assert_eq!(shown(of(&["--privileged"])), [false, false, false, true]);
        assert_eq!(
            shown(of(&[
                "--privileged",
                "--security-opt",
                "no-new-privileges",
                "--security-opt",
                "seccomp=builtin"
            ])),
            [true, true, false, true]
        );
        for option in ["no-new-privileges:false", "no-new-privileges=0", "no-new-privileges=F"] {
            assert!(!of(&["--security-opt", option]).no_new_privileges, "{option}");
        }
        assert!(!of(&["--security-opt=seccomp:unconfined"]).seccomp);
        assert!(!of(&["--security-opt", "systempaths=unconfined"]).masked_paths);
        assert!(!of(&["--security-opt", "unmask=ALL"]).masked_paths);
        for option in [
            "label=disable",
            "label:disable",
            "label=type:container_t",
            "apparmor=unconfined",
            "apparmor:unconfined",
        ] {
            assert_eq!(of(&["--security-opt", option]), of(&[]), "{option}");
        }
        for option in [
            "seccomp=/profile.json",
            "apparmor=docker-default",
            "mask=/proc",
            "credentialspec=file://x",
            "",
            "no-new-privileges=yes",
        ] {
            let error = security(&run(&["--security-opt", option])).unwrap_err();
            assert!(!error.fix_line().is_empty(), "{option}: {error}");
        }
    }
}
