//! Resolves a user string (`-u`, USER) with an image's /etc/passwd and /etc/group.
//!
//! The rules are those of Docker 28.5 (`moby/sys/user`), including the surprising ones:
//!
//! * A string that is a number is always an id, and must lie in 0…2147483647. A line whose *name* is that number is ignored
//!   (CVE-2016-3697).
//! * A uid without a line has gid 0.
//! * The first line that matches counts. Missing and malformed numbers of a line are 0; an id beyond 2147483647 is refused.
//! * Blanks around a line are ignored. Lines that begin with `#` are comments in /etc/group, and users in /etc/passwd.
//! * A line of /etc/passwd has at most 65535 bytes.
//! * A missing file, or a directory in its place, counts as an empty file.
//!
//! `integration/docker-answers/users.json` has the real Docker's answers and, where gpurun differs, the reason. A test compares
//! them with this module.

use crate::{
    apply::rootfs::{Found, Layers},
    error::{Code, Error, OrFail, Result},
};
use std::io::Read;

/// The largest passwd or group file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// The longest line of a passwd file, in bytes: Go's `bufio.MaxScanTokenSize`, which includes the newline.
const MAX_LINE: usize = 64 * 1024;
/// The largest id, by Docker's rule. It leaves out what 32-bit systems call negative, and 4294967295, which setresuid(2) takes
/// for "unchanged".
const MAX_ID: i64 = (1 << 31) - 1;

/// The text of both files.
#[derive(Debug, Default)]
pub struct Accounts {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

/// The result of resolving a user string.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The user's id.
    pub uid: u32,
    /// The primary group's id.
    pub gid: u32,
    /// The groups that list the user; empty if the string names a group.
    pub groups: Vec<u32>,
}

/// A user's line in /etc/passwd (passwd(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PasswdLine<'a> {
    /// The login name.
    pub name: &'a [u8],
    /// The home directory.
    pub home: &'a [u8],
    uid: i64,
    gid: i64,
}

/// A group's line in /etc/group (group(5)).
struct GroupLine<'a> {
    name: &'a [u8],
    gid: i64,
    members: &'a [u8],
}

impl Accounts {
    /// Reads both files of an image.
    ///
    /// # Errors
    /// [`Code::User`] if a file cannot be read, or is too large.
    pub fn read(image: &Layers) -> Result<Self> {
        Ok(Self { passwd: read(image, "/etc/passwd")?, group: read(image, "/etc/group")? })
    }

    /// The passwd file's text.
    pub fn passwd(&self) -> &[u8] {
        &self.passwd
    }

    /// The group file's text.
    pub fn group(&self) -> &[u8] {
        &self.group
    }

    /// The first line of this uid in /etc/passwd.
    pub fn user(&self, uid: u32) -> Option<PasswdLine<'_>> {
        self.users().find(|line| line.uid == i64::from(uid))
    }

    /// Whether /etc/group has a line of this gid.
    pub fn has_group(&self, gid: u32) -> bool {
        self.groups().any(|line| line.gid == i64::from(gid))
    }

    /// A login and group name that neither file has: `wanted`, or `wanted` with a number appended.
    pub fn unused_name(&self, wanted: &str) -> String {
        let users = self.users().map(|line| line.name);
        let taken: std::collections::HashSet<&[u8]> =
            users.chain(self.groups().map(|line| line.name)).collect();
        let numbered = (2u32..).map(|n| format!("{wanted}-{n}"));
        let mut names = std::iter::once(wanted.to_owned()).chain(numbered);
        names.find(|name| !taken.contains(name.as_bytes())).unwrap_or_default()
    }

    /// Resolves `USER[:GROUP]`; empty is root.
    ///
    /// # Errors
    /// [`Code::User`] if a name is unknown, or an id is out of range.
    pub fn resolve(&self, wanted: &str) -> Result<Resolved> {
        if self.passwd.split(|&byte| byte == b'\n').any(|line| line.len() >= MAX_LINE) {
            return Err(Error::new(Code::User, "a line of the image's /etc/passwd is too long")
                .cause("lines may have at most 65535 bytes, as in Docker")
                .fix("correct /etc/passwd in the image"));
        }
        let (user, group) = wanted.split_once(':').unwrap_or((wanted, ""));
        let (uid, gid) = (number_in_range(user)?, number_in_range(group)?);
        let line = self.users().find(|line| match (user, uid) {
            ("", _) => line.uid == 0,
            (_, Some(uid)) => line.uid == i64::from(uid),
            _ => line.name == user.as_bytes(),
        });
        let mut found = match (line, user, uid) {
            (Some(line), ..) => Resolved {
                uid: id_of_line(line.uid, "user", line.name)?,
                gid: id_of_line(line.gid, "primary group of the user", line.name)?,
                groups: Vec::new(),
            },
            (None, "", _) => Resolved::default(),
            (None, _, Some(uid)) => Resolved { uid, ..Resolved::default() },
            (None, ..) => return Err(unknown("user", user, "/etc/passwd")),
        };
        if !group.is_empty() {
            found.gid = gid.map_or_else(|| self.group_named(group), Ok)?;
        } else if let Some(name) = line.map(|line| line.name).filter(|name| !name.is_empty()) {
            found.groups = self
                .groups()
                .filter(|line| line.members.split(|&byte| byte == b',').any(|member| member == name))
                .map(|line| id_of_line(line.gid, "group", line.name))
                .collect::<Result<_>>()?;
        }
        Ok(found)
    }

    /// Resolves an argument of `--group-add`: a gid, or a name of /etc/group.
    ///
    /// # Errors
    /// [`Code::User`] if the name is unknown, or the id is out of range.
    pub fn additional_group(&self, wanted: &str) -> Result<u32> {
        number_in_range(wanted)?.map_or_else(|| self.group_named(wanted), Ok)
    }

    fn group_named(&self, name: &str) -> Result<u32> {
        let line = self.groups().find(|line| line.name == name.as_bytes());
        let line = line.filter(|_| !name.is_empty()).ok_or_else(|| unknown("group", name, "/etc/group"))?;
        id_of_line(line.gid, "group", line.name)
    }

    fn users(&self) -> impl Iterator<Item = PasswdLine<'_>> {
        lines(&self.passwd).map(|line| {
            let field = fields(line);
            PasswdLine {
                name: field(0),
                uid: number_or_zero(field(2)),
                gid: number_or_zero(field(3)),
                home: field(5),
            }
        })
    }

    fn groups(&self) -> impl Iterator<Item = GroupLine<'_>> {
        lines(&self.group).filter(|line| !line.starts_with(b"#")).map(|line| {
            let field = fields(line);
            GroupLine { name: field(0), gid: number_or_zero(field(2)), members: field(3) }
        })
    }
}

fn read(image: &Layers, path: &str) -> Result<Vec<u8>> {
    let failed = || format!("the image's {path} cannot be read");
    let fix = || format!("correct {path} in the image, or remove it");
    // Something else, such as a FIFO, holds no accounts.
    let Some((_, Found::File(file))) = image.find(path) else { return Ok(Vec::new()) };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .or_fail(Code::User, failed)
        .map_err(|error| error.fix(fix()))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::new(Code::User, failed()).cause("it is larger than 4 MiB").fix(fix()));
    }
    Ok(bytes)
}

/// The lines that are not blank, without the blanks around them.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&byte| byte == b'\n').map(trim).filter(|line| !line.is_empty())
}

/// Go's `bytes.TrimSpace`: removes Unicode white space; the bytes need not be UTF-8.
fn trim(line: &[u8]) -> &[u8] {
    if let Ok(text) = std::str::from_utf8(line) {
        return text.trim().as_bytes();
    }
    let blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0x0b;
    let start = line.iter().position(|byte| !blank(byte)).unwrap_or(line.len());
    let end = line.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    &line[start..end]
}

/// Returns the fields of a line by number; a missing field is empty.
fn fields<'a>(line: &'a [u8]) -> impl Fn(usize) -> &'a [u8] {
    move |n| line.split(|&byte| byte == b':').nth(n).unwrap_or_default()
}

/// Parses like Go's `strconv.Atoi`; `None` if it is not a number. Numbers beyond 64 bits saturate.
fn parse_number(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] | digits => (false, digits),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits
        .iter()
        .fold(0i64, |value, digit| value.saturating_mul(10).saturating_add(i64::from(digit - b'0')));
    Some(if negative { -value } else { value })
}

/// The number in a field; 0 if it is not a number, as in Docker.
fn number_or_zero(field: &[u8]) -> i64 {
    parse_number(field).unwrap_or(0)
}

fn id_in_range(id: i64) -> Option<u32> {
    u32::try_from(id).ok().filter(|_| id <= MAX_ID)
}

/// The id in a typed string; `None` if it is not a number.
pub fn number_in_range(typed: &str) -> Result<Option<u32>> {
    let Some(number) = parse_number(typed.as_bytes()) else { return Ok(None) };
    id_in_range(number).map(Some).ok_or_else(|| {
        Error::new(Code::User, format!("{typed:?} is not a user or group id"))
            .cause(format!("ids are 0 to {MAX_ID}"))
            .fix("give an id in this range, -u UID:GID, or a name that the image has")
    })
}

fn id_of_line(id: i64, kind: &str, name: &[u8]) -> Result<u32> {
    id_in_range(id).ok_or_else(|| {
        let name = String::from_utf8_lossy(name);
        Error::new(Code::User, format!("the image's {kind} {name:?} has an id out of range"))
            .cause(format!("ids are 0 to {MAX_ID}"))
            .fix("correct /etc/passwd or /etc/group in the image, or give numbers: -u UID:GID")
    })
}

fn unknown(kind: &str, name: &str, file: &str) -> Error {
    Error::new(Code::User, format!("the image has no {kind} {name:?}"))
        .cause(format!("{file} of the image does not name it, and it is not a number"))
        .fix(format!("give a number, -u UID:GID, or a {kind} that the image has"))
}

/// A user string, a passwd and a group file, separated by zero bytes, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let wanted = crate::fuzz_targets::text(parts.next().unwrap_or_default());
    let passwd = parts.next().unwrap_or_default().to_vec();
    let accounts = Accounts { passwd, group: parts.next().unwrap_or_default().to_vec() };
    let in_range = |id: u32| i64::from(id) <= MAX_ID;
    if let Ok(resolved) = accounts.resolve(wanted) {
        let mut ids = [resolved.uid, resolved.gid].into_iter().chain(resolved.groups);
        assert!(ids.all(in_range), "an id is out of range");
        let _ = (accounts.user(resolved.uid), accounts.has_group(resolved.gid));
    }
    assert!(
        accounts.additional_group(wanted).is_ok_and(in_range) || accounts.additional_group(wanted).is_err()
    );
    let unused = accounts.unused_name(wanted);
    assert!(accounts.users().all(|line| line.name != unused.as_bytes()), "the name is in use");
}
