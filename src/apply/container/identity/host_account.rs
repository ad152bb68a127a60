//! Accounts of the host: a user's login name, the groups that list it, and the numbers of groups.
//!
//! The host's /etc/passwd and /etc/group are read first. Accounts of LDAP, SSSD or systemd-homed are in neither; they come
//! from the name service switch (nsswitch.conf(5)). Its modules are libraries, which a static program cannot load, so gpurun
//! runs the C library's `getent`: only if nsswitch.conf names a module beside the files, and only for a caller that is not in
//! /etc/passwd. An ordinary start runs no program here.

use crate::text_file::TextFile;
use std::{
    path::Path,
    process::{Command, Stdio},
};

/// The largest passwd or group file that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// The program that asks the name service switch (getent(1)).
const GETENT: &str = "/usr/bin/getent";

/// An account of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAccount {
    /// The login name.
    pub name: String,
    /// Whether the account is in /etc/passwd.
    pub in_passwd: bool,
}

impl HostAccount {
    /// The account of this uid. `None` if the host has none.
    pub fn of_uid(uid: u32) -> Option<Self> {
        let number = uid.to_string();
        let name_in = |text: &str| {
            text.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next().filter(|name| !name.is_empty())?;
                (fields.nth(1) == Some(&number)).then(|| name.to_owned())
            })
        };
        if let Some(name) = name_in(&host_file("/etc/passwd")) {
            return Some(Self { name, in_passwd: true });
        }
        let answer =
            has_source("passwd", &["files", "compat"]).then(|| getent(&["passwd", &number])).flatten()?;
        Some(Self { name: name_in(&answer)?, in_passwd: false })
    }

    /// The ids of the groups that list the account, without its primary group.
    pub fn groups(&self) -> Vec<u32> {
        // An account of a module may be in groups of the files, and the reverse.
        // systemd's module is on most hosts and knows no members of the groups in the files.
        let elsewhere = |database| has_source(database, &["files", "compat", "systemd"]);
        if (!self.in_passwd || elsewhere("group") || elsewhere("initgroups"))
            && let Some(answer) = getent(&["initgroups", &self.name])
        {
            return answer.split_whitespace().skip(1).filter_map(|gid| gid.parse().ok()).collect();
        }
        let lists = |members: &str| members.split(',').any(|member| member == self.name);
        let gid = |line: &str| {
            let fields: Vec<&str> = line.split(':').collect();
            fields.get(3).filter(|members| lists(members)).and_then(|_| fields[2].parse().ok())
        };
        host_file("/etc/group").lines().filter_map(gid).collect()
    }
}

/// The gid of a group of the host. `None` if there is no group of this name.
pub fn gid_of_group(name: &str) -> Option<u32> {
    let gid_in = |text: &str| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name) && !name.is_empty()).then(|| fields.nth(1)?.parse().ok()).flatten()
        })
    };
    gid_in(&host_file("/etc/group")).or_else(|| {
        // getent(1) would take a word with a leading hyphen for an option.
        let is_asked = !name.starts_with('-') && has_source("group", &["files", "compat", "systemd"]);
        gid_in(&is_asked.then(|| getent(&["group", name])).flatten()?)
    })
}

/// Reads a file of the host; empty if it is absent or unreadable. Bytes that are not UTF-8 are replaced.
fn host_file(path: &str) -> String {
    TextFile::read(Path::new(path), MAX_FILE)
        .map(|file| String::from_utf8_lossy(file.bytes()).into_owned())
        .unwrap_or_default()
}

/// Whether nsswitch.conf(5) names other sources of this database.
fn has_source(database: &str, beside: &[&str]) -> bool {
    let switch = host_file("/etc/nsswitch.conf");
    sources(&switch, database).iter().any(|source| !beside.contains(&source.as_str()))
}

/// The sources of a database in the text of nsswitch.conf, without the actions in brackets.
pub fn sources(text: &str, database: &str) -> Vec<String> {
    let line = text.lines().find_map(|line| {
        let line = line.split('#').next().unwrap_or_default();
        let (name, sources) = line.split_once(':')?;
        (name.trim() == database).then_some(sources)
    });
    let mut in_brackets = false;
    let mut sources = Vec::new();
    for word in line.unwrap_or_default().split_whitespace() {
        let opens = word.starts_with('[');
        if !in_brackets && !opens {
            sources.push(word.to_owned());
        }
        in_brackets = (in_brackets || opens) && !word.ends_with(']');
    }
    sources
}

/// The answer of getent(1); `None` if it fails, or does not know the key.
fn getent(arguments: &[&str]) -> Option<String> {
    run_for_answer(GETENT, arguments)
}

/// The output of a host program, run without the caller's environment. `None` if it fails.
pub fn run_for_answer(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout).ok(),
        Ok(output) => {
            tracing::debug!(program, ?arguments, status = %output.status, "no answer");
            None
        }
        Err(error) => {
            tracing::debug!(program, %error, "cannot be run");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nsswitch_names_its_sources() {
        let text = "# passwd: nis\npasswd:   files systemd sss # ldap\n group: files [SUCCESS=merge] sss [NOTFOUND=return  TRYAGAIN=3] ldap\n\
                    subid: sss\nshadow:\n";
        for (database, expected) in [
            ("passwd", &["files", "systemd", "sss"][..]),
            ("group", &["files", "sss", "ldap"]),
            ("subid", &["sss"]),
            ("shadow", &[]),
            ("initgroups", &[]),
        ] {
            assert_eq!(sources(text, database), expected, "{database}");
        }
    }

    #[test]
    fn root_has_an_account_on_every_host() {
        let root = HostAccount::of_uid(0).unwrap();
        assert_eq!((root.name.as_str(), root.in_passwd), ("root", true));
        assert_eq!(HostAccount::of_uid(3_999_999_998), None);
        assert_eq!(gid_of_group("root"), Some(0));
        assert_eq!(
            (gid_of_group("no-such-group"), gid_of_group(""), gid_of_group("--help")),
            (None, None, None)
        );
    }
}
