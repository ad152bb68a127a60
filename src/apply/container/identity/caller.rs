//! The host user who calls gpurun, as the kernel reports it; under sudo, the user that sudo reports.
//!
//! `SUDO_UID` and `SUDO_GID` are environment variables, so any process can set them. They are used only if the real and the
//! effective uid are 0: such a process can become any user anyway. The groups of the user behind sudo come from the host's own
//! account database, never from an image. doas and pkexec set no such variables, so under them the caller is root.

use super::host_account::HostAccount;
use crate::error::{Code, Error, Result};

/// A user of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The effective uid of gpurun: 0 is root, or root of an enclosing user namespace.
    pub euid: u32,
    /// The user's uid.
    pub uid: u32,
    /// The user's primary gid.
    pub gid: u32,
    /// Where the user's supplementary groups come from.
    groups: GroupSource,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum GroupSource {
    /// The groups of this process (getgroups(2)).
    Process,
    /// The host's account database, because the groups of this process are root's.
    Database,
    #[cfg(test)]
    Given(Vec<u32>),
}

impl Caller {
    /// The user who called this process.
    ///
    /// # Errors
    /// [`Code::User`] if `SUDO_UID` or `SUDO_GID` is used and is not an id.
    pub fn current() -> Result<Self> {
        let (ruid, euid) = (rustix::process::getuid().as_raw(), rustix::process::geteuid().as_raw());
        let gid = rustix::process::getgid().as_raw();
        let process = Self { euid, uid: ruid, gid, groups: GroupSource::Process };
        if (ruid, euid) != (0, 0) {
            return Ok(process);
        }
        let variable = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        match behind_sudo(variable("SUDO_UID").as_deref(), variable("SUDO_GID").as_deref())? {
            Some((uid, gid)) => Ok(Self { euid, uid, gid, groups: GroupSource::Database }),
            None => Ok(process),
        }
    }

    /// The supplementary groups of the caller on the host.
    pub fn groups(&self) -> Vec<u32> {
        match &self.groups {
            GroupSource::Process => rustix::process::getgroups()
                .unwrap_or_default()
                .into_iter()
                .map(rustix::process::Gid::as_raw)
                .collect(),
            GroupSource::Database => {
                HostAccount::of_uid(self.uid).map(|account| account.groups()).unwrap_or_default()
            }
            #[cfg(test)]
            GroupSource::Given(groups) => groups.clone(),
        }
    }
}

/// The user behind sudo, unless that is root. Without sudo both variables are empty or absent.
fn behind_sudo(uid: Option<&str>, gid: Option<&str>) -> Result<Option<(u32, u32)>> {
    let id = |name: &str, value: Option<&str>| match value.filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(text) => match text.parse::<u32>() {
            // 4294967295 would leave the uid of the process, which is root's, unchanged.
            Ok(id) if id != u32::MAX && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(Some(id)),
            _ => Err(Error::new(Code::User, format!("{name} is {text:?}, which is not an id"))
                .cause("sudo sets it to the id of its caller, and containers run as that user")
                .fix("start gpurun without it: env -u SUDO_UID -u SUDO_GID gpurun …")),
        },
    };
    let (uid, gid) = (id("SUDO_UID", uid)?, id("SUDO_GID", gid)?);
    match (uid, gid) {
        (None | Some(0), _) => Ok(None),
        (Some(uid), Some(gid)) => Ok(Some((uid, gid))),
        (Some(_), None) => Err(Error::new(Code::User, "SUDO_UID is set and SUDO_GID is not")
            .cause("sudo sets both, so something else has changed them")
            .fix("start gpurun without it: env -u SUDO_UID gpurun …")),
    }
}

#[cfg(test)]
impl Caller {
    /// A caller for tests.
    pub fn new(euid: u32, uid: u32, gid: u32) -> Self {
        Self::with_groups(euid, uid, gid, &[])
    }

    /// A caller with supplementary groups, for tests.
    pub fn with_groups(euid: u32, uid: u32, gid: u32, groups: &[u32]) -> Self {
        Self { euid, uid, gid, groups: GroupSource::Given(groups.to_vec()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sudo_variables_name_an_ordinary_user_or_are_ignored() {
        for (uid, gid, expected) in [
            (None, None, None),
            (None, Some("77"), None),
            (Some(""), Some(""), None),
            (Some("0"), Some("0"), None),
            (Some("0"), Some("77"), None),
            (Some("1000"), Some("77"), Some((1000, 77))),
            (Some("1000"), Some("0"), Some((1000, 0))),
            (Some("4294967294"), Some("1"), Some((4_294_967_294, 1))),
        ] {
            assert_eq!(behind_sudo(uid, gid).unwrap(), expected, "{uid:?} {gid:?}");
        }
        for (uid, gid) in [
            (Some("4294967295"), Some("1000")),
            (Some("1000"), Some("4294967295")),
            (Some("4294967296"), Some("1000")),
            (Some("99999999999999999999"), Some("1000")),
            (Some("-1"), Some("1000")),
            (Some("+1000"), Some("1000")),
            (Some("0x0"), Some("0")),
            (Some(" 1000"), Some("1000")),
            (Some("alice"), Some("1000")),
            (Some("1000"), None),
            (Some("1000"), Some("")),
            (None, Some("x")),
        ] {
            let error = behind_sudo(uid, gid).unwrap_err();
            assert!(error.to_string().contains("env -u SUDO_UID"), "{uid:?} {gid:?}: {error}");
        }
    }
}
