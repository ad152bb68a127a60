//! Who the command runs as: the image's USER, `-u`, the caller; and what a user namespace must be told of it.

use super::user_namespace::IdMap;
use crate::{
    apply::rootfs::Layers,
    error::{Code, Error, Result},
};
use std::path::{Component, Path, PathBuf};

/// A user of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// uid
    pub uid: u32,
    /// gid
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Login name.
    pub name: String,
    /// Home directory.
    pub home: PathBuf,
    /// The image's /etc/passwd with a line for this user, where it has none.
    pub passwd: Option<Vec<u8>>,
    /// The image's /etc/group with a line for its group, where it has none.
    pub group: Option<Vec<u8>>,
}

/// The host's user who calls gpurun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Effective uid of gpurun.
    pub euid: u32,
    /// The person's uid: behind sudo the one of SUDO_UID.
    pub uid: u32,
    /// The person's gid.
    pub gid: u32,
}

impl Caller {
    /// Who calls. Only root believes SUDO_UID: whoever is not root could only name himself.
    pub fn current() -> Self {
        let euid = rustix::process::geteuid().as_raw();
        let sudo = |key| std::env::var(key).ok().filter(|_| euid == 0).and_then(|id| id.parse().ok());
        match (sudo("SUDO_UID"), sudo("SUDO_GID")) {
            (Some(uid), Some(gid)) => Self { euid, uid, gid },
            _ => Self {
                euid,
                uid: rustix::process::getuid().as_raw(),
                gid: rustix::process::getgid().as_raw(),
            },
        }
    }
}

/// No passwd or group file that people wrote is larger.
const MAX_FILE: u64 = 4 << 20;

/// Resolves `USER[:GROUP]` of the image, or of `-u` where `asked`, against the image's own files.
///
/// An image that says root, or nothing, is run as the caller: the same files are readable, what it writes into volumes
/// belongs to the person, and a program that escapes is nobody special. `-u 0` asks for root.
pub fn resolve(image_user: &str, asked: Option<&str>, caller: &Caller, image: &Layers) -> Result<Identity> {
    let passwd = image.read("/etc/passwd", MAX_FILE).unwrap_or_default();
    let group = image.read("/etc/group", MAX_FILE).unwrap_or_default();
    let wanted = asked.unwrap_or(image_user);
    let found = find(wanted, &passwd, &group)?;
    let (uid, gid) =
        if asked.is_none() && found.uid == 0 { (caller.uid, caller.gid) } else { (found.uid, found.gid) };
    Ok(complete(uid, gid, &passwd, &group))
}

struct Ids {
    uid: u32,
    gid: u32,
}

/// Lines of a passwd or group file, split into fields.
fn lines(file: &[u8]) -> impl Iterator<Item = Vec<&str>> {
    file.split(|&b| b == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(|line| line.split(':').collect())
}

fn id(fields: &[&str], n: usize) -> Option<u32> {
    fields.get(n)?.parse().ok()
}

fn find(wanted: &str, passwd: &[u8], group: &[u8]) -> Result<Ids> {
    let (user, group_name) = wanted.split_once(':').map_or((wanted, None), |(u, g)| (u, Some(g)));
    let user = if user.is_empty() { "0" } else { user };
    let unknown = |kind: &str, name: &str, file: &str| {
        Error::new(Code::User, format!("the image has no {kind} {name:?}"))
            .cause(format!("{file} of the image does not name it, and it is not a number"))
            .fix(format!("give a number, -u UID:GID, or a {kind} that the image has"))
    };
    // A name of digits is looked up as a name first, as Docker does.
    let by_name =
        lines(passwd).find(|f| f.first() == Some(&user)).and_then(|f| Some((id(&f, 2)?, id(&f, 3)?)));
    let (uid, primary) = match (by_name, user.parse::<u32>()) {
        (Some(found), _) => found,
        (None, Ok(uid)) => {
            (uid, lines(passwd).find(|f| id(f, 2) == Some(uid)).and_then(|f| id(&f, 3)).unwrap_or(uid))
        }
        (None, Err(_)) => return Err(unknown("user", user, "/etc/passwd")),
    };
    let gid = match group_name {
        None | Some("") => primary,
        Some(name) => {
            match (lines(group).find(|f| f.first() == Some(&name)).and_then(|f| id(&f, 2)), name.parse()) {
                (Some(gid), _) | (None, Ok(gid)) => gid,
                (None, Err(_)) => return Err(unknown("group", name, "/etc/group")),
            }
        }
    };
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Error::new(Code::User, format!("{wanted:?} is not a user"))
            .cause("4294967295 is the kernel's word for nobody at all"));
    }
    Ok(Ids { uid, gid })
}

/// Whether a home can be there: accounts of services have /dev/null, too.
fn can_be_made(home: &Path) -> bool {
    home.is_absolute()
        && !home.components().any(|component| component == Component::ParentDir)
        && !["/dev", "/proc", "/sys"].iter().any(|kernels| home.starts_with(kernels))
}

fn complete(uid: u32, gid: u32, passwd: &[u8], group: &[u8]) -> Identity {
    let known = lines(passwd).find(|f| id(f, 2) == Some(uid));
    let name =
        known.as_ref().and_then(|f| f.first()).map_or_else(|| "user".to_owned(), |name| (*name).to_owned());
    let home = known.as_ref().and_then(|f| f.get(5)).map(PathBuf::from).filter(|home| can_be_made(home));
    let groups = lines(group)
        .filter(|f| {
            f.get(3).is_some_and(|members| members.split(',').any(|member| member == name)) && known.is_some()
        })
        .filter_map(|f| id(&f, 2))
        .collect();
    let append = |file: &[u8], line: String| {
        let mut file = file.to_vec();
        if !file.is_empty() && !file.ends_with(b"\n") {
            file.push(b'\n');
        }
        file.extend_from_slice(line.as_bytes());
        file
    };
    let known_group = lines(group).any(|f| id(&f, 2) == Some(gid));
    Identity {
        uid,
        gid,
        groups,
        passwd: known
            .is_none()
            .then(|| append(passwd, format!("{name}:x:{uid}:{gid}::/home/{name}:/bin/sh\n"))),
        group: (!known_group).then(|| append(group, format!("{name}:x:{gid}:\n"))),
        home: home.unwrap_or_else(|| PathBuf::from("/home").join(&name)),
        name,
    }
}

/// The ranges that /etc/subuid or /etc/subgid (subuid(5)) give to this user: the first of 65,535 ids or more.
fn subordinate(file: &str, names: [&str; 2]) -> Option<(u32, u32)> {
    let range = |f: Vec<&str>| if names.contains(f.first()?) { Some((id(&f, 1)?, id(&f, 2)?)) } else { None };
    lines(file.as_bytes())
        .filter_map(range)
        .find(|&(start, count)| count >= 65_535 && start.checked_add(65_535).is_some())
}

/// How a launcher without root maps ids: the container's user is the caller, so that volumes and devices open as
/// usual. The ids beside it, which package managers need, are the caller's subordinate ones where the host has given him some
/// and has the helpers that may map them.
pub fn id_map(user: &Identity, caller: &Caller) -> IdMap {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let login = login_name(&read("/etc/passwd"), caller.uid);
    let number = caller.uid.to_string();
    let names = [login.as_deref().unwrap_or(&number), &number];
    let helpers =
        ["/usr/bin/newuidmap", "/usr/bin/newgidmap"].iter().all(|p| std::path::Path::new(p).exists());
    match (subordinate(&read("/etc/subuid"), names), subordinate(&read("/etc/subgid"), names)) {
        (Some((uids, _)), Some((gids, _))) if helpers => IdMap {
            uids: spread(user.uid, caller.uid, uids),
            gids: spread(user.gid, caller.gid, gids),
            helpers: true,
        },
        _ => IdMap {
            uids: vec![(user.uid, caller.uid, 1)],
            gids: vec![(user.gid, caller.gid, 1)],
            helpers: false,
        },
    }
}

/// Whether [`id_map`] for root gives the ids that Podman gives: it takes every range of the caller's, one after the other
/// (containers/storage, `idtools`).
pub fn ids_are_podmans(caller: &Caller) -> bool {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let login = login_name(&read("/etc/passwd"), caller.uid);
    let number = caller.uid.to_string();
    let names = [login.as_deref().unwrap_or(&number), &number];
    ["/etc/subuid", "/etc/subgid"].iter().all(|path| one_range(&read(path), names))
}

/// None, or one that is long enough.
fn one_range(file: &str, names: [&str; 2]) -> bool {
    let own = lines(file.as_bytes()).filter(|f| f.first().is_some_and(|name| names.contains(name))).count();
    own == 0 || own == 1 && subordinate(file, names).is_some()
}

fn login_name(passwd: &str, uid: u32) -> Option<String> {
    lines(passwd.as_bytes()).find(|f| id(f, 2) == Some(uid)).and_then(|f| Some((*f.first()?).to_owned()))
}

/// 65,536 ids of which `inside` is `own` and the others are subordinate, without a gap.
fn spread(inside: u32, own: u32, subordinate: u32) -> Vec<(u32, u32, u32)> {
    let mut ranges = vec![(inside, own, 1)];
    let below = inside.min(65_536);
    if below > 0 {
        ranges.push((0, subordinate, below.min(65_535)));
    }
    if inside < 65_535 {
        ranges.push((inside + 1, subordinate + below, 65_535 - inside));
    }
    ranges
}

/// A user's words, a passwd and a group file, separated by zero bytes, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let wanted = crate::fuzz_targets::text(parts.next().unwrap_or_default());
    let (passwd, group) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if let Ok(ids) = find(wanted, passwd, group) {
        let _ = complete(ids.uid, ids.gid, passwd, group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/bash\napp:x:1001:1002::/srv/app:/bin/sh\n77:x:5:5::/x:/bin/sh";
    const GROUP: &[u8] = b"root:x:0:\nvideo:x:44:app,root\napp:x:1002:\n";

    fn ids(wanted: &str) -> Result<(u32, u32)> {
        find(wanted, PASSWD, GROUP).map(|ids| (ids.uid, ids.gid))
    }

    #[test]
    fn users_resolve_as_docker_resolves_them() {
        for (wanted, expected) in [
            ("", (0, 0)),
            ("app", (1001, 1002)),
            ("1001", (1001, 1002)),
            ("app:video", (1001, 44)),
            ("4242:7", (4242, 7)),
            ("77", (5, 5)),
            ("0:0", (0, 0)),
        ] {
            assert_eq!(ids(wanted).unwrap(), expected, "{wanted}");
        }
        let message = ids("nobody-here").unwrap_err().to_string();
        assert!(
            message.contains("error[GPU-0054]: the image has no user \"nobody-here\"")
                && message.contains("fix:"),
            "{message}"
        );
        assert!(ids("app:nogroup").is_err() && ids("4294967295").is_err());
    }

    #[test]
    fn an_unknown_uid_gets_an_entry_and_a_home() {
        let known = complete(1001, 1002, PASSWD, GROUP);
        assert_eq!(
            (known.home.to_str(), known.groups.as_slice(), known.passwd),
            (Some("/srv/app"), &[44][..], None)
        );
        let unknown = complete(4242, 4242, PASSWD, GROUP);
        assert!(unknown.passwd.unwrap().ends_with(b"/x:/bin/sh\nuser:x:4242:4242::/home/user:/bin/sh\n"));
        assert!(unknown.group.unwrap().ends_with(b"user:x:4242:\n"));
    }

    #[test]
    fn the_map_has_every_id_once_and_the_user_is_the_caller() {
        assert_eq!(
            subordinate("x:1:70000\nme:100000:10\nme:200000:65536\n", ["me", "1000"]),
            Some((200_000, 65_536))
        );
        assert!(
            one_range("x:1:70000\nx:1:2\nme:200000:65536\n", ["me", "1000"]) && one_range("", ["me", "1000"])
        );
        assert!(
            !one_range("me:1:70000\n1000:200000:65536\n", ["me", "1000"])
                && !one_range("me:1:10", ["me", "1000"])
        );
        for inside in [0, 1, 1000, 65_534, 65_535, 65_536, 4_000_000_000] {
            let ranges = spread(inside, 1000, 100_000);
            assert_eq!(ranges[0], (inside, 1000, 1));
            let rest: u32 = ranges[1..].iter().map(|r| r.2).sum();
            assert_eq!(rest, 65_535, "{inside}: {ranges:?}");
            assert!(ranges[1..].iter().all(|r| inside < r.0 || inside >= r.0 + r.2), "{inside}: {ranges:?}");
            assert!(
                ranges[1..].iter().all(|r| r.1 >= 100_000 && r.1 + r.2 <= 165_535),
                "{inside}: {ranges:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_passwd_makes_it_panic(wanted in ".{0,20}", passwd in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(ids) = find(&wanted, &passwd, &passwd) { let _ = complete(ids.uid, ids.gid, &passwd, &passwd); }
        }
    }
}
