//! The subordinate ids of an ordinary user: additional ids for the user's containers (subuid(5)).
//!
//! The administrator assigns them in /etc/subuid and /etc/subgid, by login name or by uid, or in a directory service that
//! `subid:` of nsswitch.conf(5) names. The setuid programs newuidmap and newgidmap write them into a user namespace. They look
//! up the caller's name in the name service switch, so only callers with an account there can use a range; see
//! [`super::host_account`].

use super::{
    caller::Caller,
    host_account::{HostAccount, run_for_answer, sources},
};
use crate::{
    error::{Code, Error, Result},
    text_file::TextFile,
};
use std::path::Path;

/// The ids that a range must have to be used: all ids of a container except the caller's own.
const NEEDED: u32 = 65_535;
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;
/// The programs that write the ids of a namespace (newuidmap(1)).
const HELPERS: [&str; 2] = ["/usr/bin/newuidmap", "/usr/bin/newgidmap"];
/// The program that asks the directory service (getsubids(1), shadow 4.9).
const GETSUBIDS: &str = "/usr/bin/getsubids";

/// The first subordinate uid and gid of a user; [`NEEDED`] ids follow each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subordinate {
    /// The first uid on the host.
    pub first_uid: u32,
    /// The first gid on the host.
    pub first_gid: u32,
}

/// A range of ids: the first one and their count.
type Range = (u32, u32);

/// The ranges of a user on the host.
struct Ranges {
    account: HostAccount,
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl Subordinate {
    /// The caller's subordinate ids, if the host assigns any and has the programs that write them.
    pub fn of(caller: &Caller) -> Option<Self> {
        let ranges = Ranges::of(caller)?;
        let (first_uid, first_gid) = (first_long(&ranges.uids)?, first_long(&ranges.gids)?);
        let missing = HELPERS.into_iter().find(|helper| !Path::new(helper).exists());
        if let Some(missing) = missing {
            tracing::debug!(missing, "the caller's subordinate ids cannot be used");
            return None;
        }
        Some(Self { first_uid, first_gid })
    }
}

/// Whether a container with these ids maps them as Podman does, which takes every range of a user, one after the other
/// (containers/storage, `idtools`).
pub fn are_as_podman_maps_them(caller: &Caller) -> bool {
    let fits = |ranges: &[Range]| ranges.is_empty() || ranges.len() == 1 && first_long(ranges).is_some();
    Ranges::of(caller).is_none_or(|ranges| fits(&ranges.uids) && fits(&ranges.gids))
}

/// The report of `doctor` about the caller's subordinate ids.
///
/// # Errors
/// [`Code::Namespace`] if the host assigns ids that cannot be used.
pub fn check(caller: &Caller) -> Result<String> {
    if caller.uid == 0 {
        return Ok("root needs none".into());
    }
    let uid = caller.uid;
    let Some(ranges) = Ranges::of(caller) else {
        return Ok(format!(
            "none for uid {uid}: containers have one id, and chown to others fails (usermod --add-subuids 100000-165535 \
             --add-subgids 100000-165535 NAME)"
        ));
    };
    let name = &ranges.account.name;
    let wrong = |what: String, fix: String| Err(Error::new(Code::Namespace, what).fix(fix));
    for (kind, file, option, all) in
        [("uids", "/etc/subuid", "subuids", &ranges.uids), ("gids", "/etc/subgid", "subgids", &ranges.gids)]
    {
        let other = if kind == "uids" { &ranges.gids } else { &ranges.uids };
        let add = format!(
            "usermod --add-{option} 100000-165535 {name}, with a range that no other user has in {file}"
        );
        match (all.is_empty(), other.is_empty()) {
            (true, true) => {
                return Ok(format!(
                    "none for {name}: containers have one id, and chown to others fails ({add})"
                ));
            }
            (true, false) => {
                return wrong(format!("{name} has subordinate ids, but no {kind} in {file}"), add);
            }
            _ if first_long(all).is_none() => {
                return wrong(format!("no range of {name} in {file} has {NEEDED} ids"), add);
            }
            _ => {}
        }
    }
    if let Some(missing) = HELPERS.into_iter().find(|helper| !Path::new(helper).exists()) {
        let what = format!("{name} has subordinate ids, but {missing}, which maps them, is missing");
        return wrong(what, "apt-get install uidmap, or dnf install shadow-utils".into());
    }
    let source = if ranges.account.in_passwd { "/etc/passwd" } else { "the name service switch" };
    let first = |ranges: &[Range]| first_long(ranges).unwrap_or_default();
    Ok(format!(
        "{name} (of {source}) has {NEEDED} uids from {} and gids from {}",
        first(&ranges.uids),
        first(&ranges.gids)
    ))
}

impl Ranges {
    /// `None` if the host assigns no ids at all, or the caller has no account. The account is looked up last, because that may
    /// run a program.
    fn of(caller: &Caller) -> Option<Self> {
        let file = |path| TextFile::read(Path::new(path), MAX_FILE).ok();
        let (uids, gids) = (file("/etc/subuid"), file("/etc/subgid"));
        let switch = file("/etc/nsswitch.conf");
        let switch = switch.as_ref().map(|file| String::from_utf8_lossy(file.bytes()).into_owned());
        let from_service =
            sources(&switch.unwrap_or_default(), "subid").iter().any(|source| source != "files");
        let gives_none = |file: &Option<TextFile>| file.as_ref().is_none_or(|file| file.bytes().is_empty());
        if !from_service && gives_none(&uids) && gives_none(&gids) {
            return None;
        }
        let account = HostAccount::of_uid(caller.uid)?;
        if from_service {
            let ask = |arguments: &[&str]| {
                run_for_answer(GETSUBIDS, arguments).map(|answer| answered(&answer)).unwrap_or_default()
            };
            let (uids, gids) = (ask(&[&account.name]), ask(&["-g", &account.name]));
            return Some(Self { account, uids, gids });
        }
        let names = [account.name.as_str(), &caller.uid.to_string()].map(str::to_owned);
        let ranges = |file: Option<TextFile>| file.map(|file| listed(&file, &names)).unwrap_or_default();
        Some(Self { uids: ranges(uids), gids: ranges(gids), account })
    }
}

/// The ranges of a user in the text of /etc/subuid or /etc/subgid: `NAME:FIRST:COUNT`.
fn listed(file: &TextFile, names: &[String; 2]) -> Vec<Range> {
    let range = |line: &str| {
        let mut fields = line.trim().split(':');
        let name = fields.next()?;
        let range = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        names.iter().any(|own| own == name).then_some(range)
    };
    file.lines().filter_map(|line| range(line.text().ok()?)).collect()
}

/// The ranges in the answer of getsubids(1): `0: NAME FIRST COUNT`.
fn answered(answer: &str) -> Vec<Range> {
    let range = |line: &str| {
        let mut words = line.split_whitespace().rev();
        let (count, first) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((first, count))
    };
    answer.lines().filter_map(range).collect()
}

/// The start of the first range that is long enough.
fn first_long(ranges: &[Range]) -> Option<u32> {
    let long = |&&(first, count): &&Range| count >= NEEDED && first.checked_add(NEEDED).is_some();
    ranges.iter().find(long).map(|&(first, _)| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_and_by_number_in_any_text_file() {
        let names = ["me".to_owned(), "1000".to_owned()];
        for (text, expected) in [
            ("x:1:70000\nme:100000:10\nme:200000:65536\n", vec![(100_000, 10), (200_000, 65_536)]),
            ("\u{feff}me:200000:65536\r\n", vec![(200_000, 65_536)]),
            ("1000:200000:65536", vec![(200_000, 65_536)]),
            (" me:200000:65536 \n", vec![(200_000, 65_536)]),
            ("me:200000\nme:x:65536\nme:-1:65536\n:1:2\n#me:1:70000\n", vec![]),
        ] {
            assert_eq!(listed(&TextFile::from(text.as_bytes().to_vec()), &names), expected, "{text:?}");
        }
        let latin = TextFile::from(b"Jos\xe9:1:70000\nme:200000:65536\n".to_vec());
        assert_eq!(listed(&latin, &names), [(200_000, 65_536)]);
        assert_eq!(
            answered("0: alice 100000 65536\n1: alice 300000 10\n"),
            [(100_000, 65_536), (300_000, 10)]
        );
        assert_eq!(answered("Error fetching ranges\n"), []);
    }

    #[test]
    fn the_first_long_range_counts() {
        assert_eq!(first_long(&[(1, 10), (200_000, 65_535), (300_000, 65_536)]), Some(200_000));
        assert_eq!(first_long(&[(4_294_967_290, 65_536)]), None);
        assert_eq!(first_long(&[]), None);
    }
}
