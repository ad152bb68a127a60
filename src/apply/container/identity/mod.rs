//! Decides the user, groups and HOME of the container's command: the image's USER, `-u`, or the caller.
//!
//! Uid, gid and groups come all from the image or all from the caller.
//!
//! * `-u` and an image's USER that is not root are resolved against the image's files, as Docker does: uid, gid and groups.
//! * An image with USER root, or without USER, runs as the caller, with the caller's uid, gid and groups on the host; the image's
//!   /etc/passwd and /etc/group give it no group, and behind sudo a name of `--group-add` is a group of the host: volumes obey its
//!   number. Where the caller is root, that is the image's root. The same files are readable, files written into volumes belong to
//!   the caller, and a program that escapes has only the caller's rights. `-u 0` asks for root.
//!
//! **Groups without root.** A container of an ordinary user runs as that user on the host, and the kernel lets only root add
//! groups. A process can keep the caller's groups, which the container shows as 65534; or, with subordinate ids, replace all of
//! them by groups of the container. The caller's groups are kept if the identity is the caller's, if `--group-add` names
//! `keep-groups` or one of the caller's groups, and if a GPU's device node needs one of them: such a container would otherwise
//! silently run on the CPU. Requests that need both kinds of groups are refused.

mod accounts;
mod caller;
mod home;
mod host_account;
mod id_map;
mod subordinate;
#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use accounts::fuzz;
pub use caller::Caller;
pub use subordinate::{are_as_podman_maps_them, check as check_subordinate_ids};

use super::{spec::Volume, user_namespace::IdMap};
use crate::{
    apply::rootfs::{Found, Layers},
    error::{Code, Error, Result},
    plan::Injection,
    vocabulary::EnvVar,
};
use accounts::{Accounts, Resolved};
use home::{HomeSources, HostIds};
use std::path::{Path, PathBuf};
use subordinate::Subordinate;

/// The value of `--group-add` that keeps the caller's groups, as in Podman and crun.
const KEEP_GROUPS: &str = "keep-groups";

/// A user of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The uid in the container.
    pub uid: u32,
    /// The primary gid in the container.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Groups,
    /// The home directory: the value of HOME.
    pub home: PathBuf,
    /// The image's /etc/passwd with a line added for this user; `None` if the user is in the file.
    pub passwd: Option<Vec<u8>>,
    /// The image's /etc/group with a line added for the primary group; `None` if the group is in the file.
    pub group: Option<Vec<u8>>,
}

/// The supplementary groups of the container's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Groups {
    /// Groups to set with setgroups(2). As in Docker, the primary group is among them.
    Set(Vec<u32>),
    /// The groups that the launcher's process has.
    Kept,
}

/// Inputs for the decision.
#[derive(Debug)]
pub struct IdentityRequest<'a> {
    /// The image's USER.
    pub image_user: &'a str,
    /// `-u`.
    pub user: Option<&'a str>,
    /// `--group-add`.
    pub group_add: &'a [String],
    /// The value of HOME in `-e` or `--env-file`.
    pub home: Option<&'a str>,
    /// The image's environment.
    pub image_env: &'a [EnvVar],
    /// The image's files.
    pub layers: &'a Layers,
    /// What is mounted into the container.
    pub volumes: &'a [Volume],
    /// `--read-only`.
    pub read_only: bool,
    /// The GPUs' part of the container.
    pub injection: &'a Injection,
}

impl Identity {
    /// Decides the command's user; and for a launcher without root, how the container's ids map to the host's.
    /// `root_is_caller`: an image with USER root runs as the container's root, which is the caller on the host
    /// ([`crate::image::Image::root_is_caller`]).
    ///
    /// # Errors
    /// [`Code::User`] if the image does not have a name, an id is out of range, or groups cannot be set.
    pub fn resolve(
        request: &IdentityRequest<'_>,
        caller: &Caller,
        root_is_caller: bool,
    ) -> Result<(Self, Option<IdMap>)> {
        let accounts = Accounts::read(request.layers)?;
        // An empty -u counts as absent, as in Docker.
        let typed = request.user.filter(|user| !user.is_empty());
        let mut user = accounts.resolve(typed.unwrap_or(request.image_user))?;
        let is_callers = typed.is_none() && user.uid == 0 && caller.uid != 0 && !root_is_caller;
        if is_callers {
            user = Resolved { uid: caller.uid, gid: caller.gid, groups: Vec::new() };
        }
        // Root's groups obey volumes, so an image must not choose the number of the caller's group.
        let is_of_host = is_callers && caller.euid == 0;
        let gid_of = |group| if is_of_host { host_group(group) } else { accounts.additional_group(group) };
        let added = request
            .group_add
            .iter()
            .filter(|group| *group != KEEP_GROUPS)
            .map(|group| Ok(AddedGroup { typed: group, gid: gid_of(group)? }))
            .collect::<Result<Vec<_>>>()?;
        let keeps = request.group_add.iter().any(|group| group == KEEP_GROUPS);
        let (groups, id_map) = if caller.euid == 0 {
            (groups_of_root(&user, &added, is_callers || keeps, caller, request.injection), None)
        } else {
            let subordinate = Subordinate::of(caller);
            let map = id_map::id_map(user.uid, user.gid, caller, subordinate);
            let groups =
                groups_without_root(&user, &added, is_callers, keeps, &map, caller, request.injection)?;
            (groups, Some(map))
        };
        Ok((complete(&user, groups, &accounts, request, caller), id_map))
    }
}

/// A group of `--group-add`.
struct AddedGroup<'a> {
    typed: &'a str,
    gid: u32,
}

/// The gid of an argument of `--group-add` for a container that runs as the user behind sudo.
fn host_group(typed: &str) -> Result<u32> {
    if let Some(gid) = accounts::number_in_range(typed)? {
        return Ok(gid);
    }
    host_account::gid_of_group(typed).ok_or_else(|| {
        Error::new(Code::User, format!("--group-add {typed}: the host has no such group"))
            .cause(
                "the container runs as the user behind sudo, whose groups are the host's and not the image's",
            )
            .fix("give the number, --group-add GID; or a user of the image with that user's groups, -u NAME")
    })
}

fn groups_of_root(
    user: &Resolved,
    added: &[AddedGroup<'_>],
    callers: bool,
    caller: &Caller,
    injection: &Injection,
) -> Groups {
    let callers = if callers { caller.groups() } else { Vec::new() };
    let added = added.iter().map(|group| group.gid);
    let all = [user.gid].into_iter().chain(user.groups.iter().copied()).chain(callers).chain(added);
    let mut groups: Vec<u32> = all.chain(injection.groups.iter().copied()).collect();
    groups.sort_unstable();
    groups.dedup();
    Groups::Set(groups)
}

/// See the module's documentation. Ids in `injection` and of the caller are the host's, the others the container's.
fn groups_without_root(
    user: &Resolved,
    added: &[AddedGroup<'_>],
    is_callers: bool,
    keeps: bool,
    map: &IdMap,
    caller: &Caller,
    injection: &Injection,
) -> Result<Groups> {
    let own = caller.groups();
    // A group of the caller cannot be mapped to a gid of the container, so the group is kept.
    let (of_caller, of_container): (Vec<_>, Vec<_>) =
        added.iter().partition(|group| group.gid == caller.gid || own.contains(&group.gid));
    let node = injection.devices.iter().find(|node| needs_group(node, caller) && own.contains(&node.gid));
    let refused = |group: &AddedGroup<'_>| {
        Error::new(Code::User, format!("--group-add {} cannot be given to the container", group.typed))
    };
    if !map.helpers {
        return match of_container.first() {
            Some(group) => Err(refused(group)
                .cause(format!(
                    "the container has the caller's groups, {} is not one of them, and only root can add groups",
                    group.gid
                ))
                .fix(
                    "add the caller to the group on the host (usermod -aG), give the caller subordinate ids \
                     (usermod --add-subuids and --add-subgids), or leave --group-add out",
                )),
            None => Ok(Groups::Kept),
        };
    }
    let reason = match (node, of_caller.first()) {
        (Some(node), _) => {
            Some(format!("{} is open to group {} of the host only", node.path.0.display(), node.gid))
        }
        (None, Some(group)) => {
            Some(format!("--group-add {} is a group of the caller on the host", group.typed))
        }
        (None, None) if keeps => Some(format!("--group-add {KEEP_GROUPS}")),
        (None, None) => None,
    };
    match (reason, of_container.first()) {
        (Some(reason), Some(group)) => Err(refused(group)
            .cause(format!(
                "the container keeps the caller's groups ({reason}), which leaves no room for its own"
            ))
            .fix(format!("leave out --group-add {}, or run gpurun as root", group.typed))),
        (Some(_), None) => Ok(Groups::Kept),
        (None, None) if is_callers => Ok(Groups::Kept),
        (None, _) => {
            let unmapped = of_container.iter().find(|group| !id_map::maps_gid(map, group.gid));
            if let Some(group) = unmapped {
                return Err(refused(group)
                    .cause("without root a container has the groups 0 to 65535")
                    .fix("give a gid below 65536, or run gpurun as root"));
            }
            let image = user.groups.iter().copied().filter(|&gid| id_map::maps_gid(map, gid));
            let mut groups: Vec<u32> = [user.gid]
                .into_iter()
                .chain(image)
                .chain(of_container.iter().map(|group| group.gid))
                .collect();
            groups.sort_unstable();
            groups.dedup();
            Ok(Groups::Set(groups))
        }
    }
}

/// Whether neither the caller's uid nor its primary group opens a device node for reading and writing.
fn needs_group(node: &crate::inventory::DeviceNode, caller: &Caller) -> bool {
    let shift = match node {
        node if node.uid == caller.uid => 6,
        node if node.gid == caller.gid => 3,
        _ => 0,
    };
    node.mode >> shift & 0o6 != 0o6
}

fn complete(
    user: &Resolved,
    groups: Groups,
    accounts: &Accounts,
    request: &IdentityRequest<'_>,
    caller: &Caller,
) -> Identity {
    let &Resolved { uid, gid, .. } = user;
    let line = accounts.user(uid);
    let known_name = line.and_then(|line| directory_name(line.name)).map(str::to_owned);
    let (wanted, own_home) = if uid == 0 { ("root", Some(&b"/root"[..])) } else { ("user", None) };
    let name = known_name.unwrap_or_else(|| accounts.unused_name(wanted));
    let supplementary = if let Groups::Set(groups) = &groups { groups.as_slice() } else { &[] };
    let image_home = request.image_env.iter().rev().find(|(name, _)| name == "HOME");
    let home = HomeSources {
        typed: request.home,
        image: image_home.map(|(_, value)| value.as_str()),
        account: line.map(|line| line.home).or(own_home),
        name: &name,
        ids: &HostIds::new(uid, gid, supplementary, caller),
        layers: request.layers,
        volumes: request.volumes,
        read_only: request.read_only,
    }
    .choose();
    let append = |file: &[u8], line: String| {
        let mut file = file.to_vec();
        if !file.is_empty() && !file.ends_with(b"\n") {
            file.push(b'\n');
        }
        file.extend_from_slice(line.as_bytes());
        file
    };
    // A field of passwd(5) can hold neither character.
    let field = home.to_str().filter(|home| !home.contains([':', '\n'])).unwrap_or("/");
    let passwd =
        line.is_none().then(|| append(accounts.passwd(), format!("{name}:x:{uid}:{gid}::{field}:/bin/sh\n")));
    let group = (!accounts.has_group(gid))
        .then(|| append(accounts.group(), format!("{}:x:{gid}:\n", accounts.unused_name(wanted))));
    Identity { uid, gid, groups, home, passwd, group }
}

/// The login name, if it is also a valid directory name.
fn directory_name(name: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(name).ok()?;
    let is_plain = |c: char| c.is_alphanumeric() || "._-".contains(c);
    (!name.is_empty() && name.len() < 64 && !name.starts_with('.') && name.chars().all(is_plain))
        .then_some(name)
}

/// What stands at a path of the image.
fn find(layers: &Layers, path: &Path) -> Option<Found> {
    layers.find(path.to_str()?).map(|(_, found)| found)
}
