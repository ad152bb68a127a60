//! The command line of an OCI runtime, as runc and crun read it. Nothing of it is changed; it goes on as it came.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

/// What the wrapper needs to know of its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeArgs {
    /// Whether it is `create` or `run`, which make a container of a bundle.
    pub makes_container: bool,
    /// `--bundle`; the working directory where it is not said.
    pub bundle: PathBuf,
    /// `--log`
    pub log: Option<PathBuf>,
    /// `--log-format json`
    pub log_json: bool,
    /// `--debug`
    pub debug: bool,
    /// `--systemd-cgroup`, crun's `--cgroup-manager systemd`: systemd makes the container's cgroup, as a unit.
    pub systemd_cgroup: bool,
}

/// Options before the verb whose value may be the next word (runc(8), crun(1)). Any other is a switch.
const GLOBAL: [&str; 7] = ["log", "log-format", "log-level", "root", "criu", "rootless", "cgroup-manager"];
/// The same behind `create` and `run`.
const CREATE: [&str; 8] =
    ["b", "bundle", "f", "config", "console-socket", "pid-file", "pidfd-socket", "preserve-fds"];

impl RuntimeArgs {
    /// Reads the words behind the program's name.
    pub fn scan(words: &[OsString]) -> Self {
        let mut args = Self {
            makes_container: false,
            bundle: ".".into(),
            log: None,
            log_json: false,
            debug: false,
            systemd_cgroup: false,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if let Some((name, attached)) = option(word) {
                let known: &[&str] = if args.makes_container { &CREATE } else { &GLOBAL };
                let value = match attached {
                    None if known.contains(&name) => words.next().map(OsString::as_os_str),
                    attached => attached,
                };
                match (args.makes_container, name) {
                    (false, "debug") => args.debug = value.is_none_or(|value| value == "true"),
                    (false, "systemd-cgroup") => {
                        args.systemd_cgroup = value.is_none_or(|value| value == "true");
                    }
                    (false, "cgroup-manager") => {
                        args.systemd_cgroup = value.is_some_and(|value| value == "systemd");
                    }
                    (false, "log") => args.log = value.map(PathBuf::from),
                    (false, "log-format") => args.log_json = value.is_some_and(|value| value == "json"),
                    (true, "b" | "bundle") => args.bundle = value.map_or(args.bundle, PathBuf::from),
                    _ => {}
                }
            } else if args.makes_container {
                // The container's name; crun reads options behind it, too.
                if word == "--" {
                    break;
                }
            } else if word == "create" || word == "run" {
                args.makes_container = true;
            } else {
                break;
            }
        }
        args
    }
}

/// An option's name and the value in the same word. Go's programs take one dash for two.
pub fn option(word: &OsStr) -> Option<(&str, Option<&OsStr>)> {
    let bytes = word.as_bytes();
    let rest =
        bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-")).filter(|rest| !rest.is_empty())?;
    let end = rest.iter().position(|&byte| byte == b'=').unwrap_or(rest.len());
    let name = std::str::from_utf8(&rest[..end]).unwrap_or_default();
    Some((name, rest.get(end + 1..).map(OsStr::from_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scan(line: &str) -> RuntimeArgs {
        RuntimeArgs::scan(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn a_container_is_made_by_create_and_run_alone() {
        for (line, bundle) in [
            ("", None),
            ("--version", None),
            ("-v", None),
            ("features", None),
            ("state create", None),
            ("kill create KILL", None),
            ("start --bundle create", None),
            ("--root create state x", None),
            ("--root=create delete --force create", None),
            ("-- create x", None),
            ("create x", Some(".")),
            ("create create", Some(".")),
            ("run -d run", Some(".")),
            ("create --bundle /b x", Some("/b")),
            ("create --bundle=/b x", Some("/b")),
            ("create -b /b x", Some("/b")),
            ("create -b=/b x", Some("/b")),
            ("create -bundle /b x", Some("/b")),
            ("create x -b /b", Some("/b")),
            ("create -- x -b /b", Some(".")),
            ("create --bundle=/a=b x", Some("/a=b")),
            ("create --bundle /a -b /b x", Some("/b")),
            ("create --bundle", Some(".")),
            ("create --pid-file --bundle --bundle /b x", Some("/b")),
            (
                "create --no-pivot --bundle /b --pid-file /p --console-socket /c --preserve-fds 2 x",
                Some("/b"),
            ),
            ("--root /r --log /l --log-format json --systemd-cgroup create --bundle /b x", Some("/b")),
            ("--criu /c --rootless auto create -b b x", Some("b")),
            ("--bundle /b create x", None),
            ("--cgroup-manager systemd --debug run -b b x", Some("b")),
        ] {
            let args = scan(line);
            assert_eq!(
                args.makes_container.then_some(args.bundle.as_path()),
                bundle.map(std::path::Path::new),
                "{line}"
            );
        }
    }

    #[test]
    fn systemd_makes_the_cgroup_where_it_is_said_before_the_verb() {
        for (line, said) in [
            ("--systemd-cgroup create x", true),
            ("--systemd-cgroup=true create x", true),
            ("--systemd-cgroup=false create x", false),
            ("--cgroup-manager systemd create x", true),
            ("--cgroup-manager=cgroupfs create x", false),
            ("create --systemd-cgroup x", false),
        ] {
            assert_eq!(scan(line).systemd_cgroup, said, "{line}");
        }
    }

    #[test]
    fn the_log_is_where_the_runtimes_own_is() {
        let args = scan("--log /run/log.json --log-format=json --debug create --log /no x");
        assert_eq!(
            (args.log.as_deref(), args.log_json, args.debug),
            (Some("/run/log.json".as_ref()), true, true)
        );
        let args = scan("--log-format text --debug=false --log");
        assert_eq!((args.log, args.log_json, args.debug), (None, false, false));
    }

    proptest! {
        #[test]
        fn any_words_are_scanned(words in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..8), 0..8)) {
            RuntimeArgs::scan(&words.iter().map(|word| OsStr::from_bytes(word).to_owned()).collect::<Vec<_>>());
        }
    }
}
