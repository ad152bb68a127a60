//! The command line of an OCI runtime, as runc and crun read it. Every word is passed on unchanged.
//!
//! runc's parser is Go's `flag` behind urfave/cli, crun's is glibc's `argp`. They agree on `--name value` and `--name=value`, and
//! differ on words with a single dash: to runc `-bundle=/b` and `-b=/b` are long options, to crun `-b/b` is an option with its
//! value attached, and `-db /b` is two options. [`Dialect`] is that difference.
//!
//! Only a complete `create` or `run` is parsed. Everything else (help, a missing name, an unknown option without a bundle)
//! goes to the low-level runtime, which prints its own usage.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// The rules for options with a single dash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// runc: one dash is the same as two.
    Go,
    /// crun: letters, of which the last may have its value attached.
    Argp,
}

impl Dialect {
    /// The dialect of a low-level runtime, by the name of its program: crun is also installed as krun, crun-wasm and crun-vm.
    pub fn of(runtime: &Path) -> Self {
        let name = runtime.file_name().map(OsStr::as_bytes).unwrap_or_default();
        if name.starts_with(b"crun") || name.starts_with(b"krun") { Self::Argp } else { Self::Go }
    }
}

/// The options before the verb, and the position of the words of a new container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeArgs {
    /// Index of the first word behind `create` or `run`; `None` for other verbs and for questions such as `--help`.
    new_container_at: Option<usize>,
    /// `--root`: the directory in which the engine lets the runtime keep its state.
    pub root: Option<PathBuf>,
    /// `--log`
    pub log: Option<PathBuf>,
    /// `--log-format json`
    pub log_json: bool,
    /// `--debug`
    pub debug: bool,
    /// `--systemd-cgroup`, crun's `--cgroup-manager systemd`: systemd makes the container's cgroup, as a unit.
    pub systemd_cgroup: bool,
}

/// A container of a complete `create` or `run`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewContainer {
    /// `--bundle`; the working directory by default.
    pub bundle: PathBuf,
    /// crun's `--config`: the file that is read in place of the bundle's config.json.
    pub config: Option<PathBuf>,
    /// Whether an option is unknown to gpurun. The low-level runtime may support it, or refuse it.
    pub has_unknown_option: bool,
}

/// An option's name, and whether it takes a value.
type Known = (&'static str, bool);

/// Options before the verb (runc(8), crun(1)).
const GLOBAL: &[Known] = &[
    ("log", true),
    ("log-format", true),
    ("log-level", true),
    ("root", true),
    ("criu", true),
    ("rootless", true),
    ("cgroup-manager", true),
    ("debug", false),
    ("systemd-cgroup", false),
    ("help", false),
    ("usage", false),
    ("version", false),
    ("h", false),
    ("v", false),
    ("V", false),
    ("?", false),
];

/// Options behind `create` and `run`.
const NEW_CONTAINER: &[Known] = &[
    ("bundle", true),
    ("config", true),
    ("console-socket", true),
    ("pid-file", true),
    ("pidfd-socket", true),
    ("preserve-fds", true),
    ("detach", false),
    ("keep", false),
    ("no-new-keyring", false),
    ("no-pivot", false),
    ("no-subreaper", false),
    ("help", false),
    ("usage", false),
    ("b", true),
    ("f", true),
    ("d", false),
    ("h", false),
    ("?", false),
];

/// Options that ask for help or a version: nothing is created.
const QUESTIONS: [&str; 7] = ["help", "usage", "version", "h", "v", "V", "?"];

impl RuntimeArgs {
    /// Reads the words behind the program's name, up to the verb.
    pub fn scan(words: &[OsString]) -> Self {
        let mut args = Self::default();
        let mut at = 0;
        while let Some(word) = words.get(at) {
            at += 1;
            // Both parsers take the word after `--` as the verb.
            let verb = if word == "--" { words.get(at) } else { Some(word).filter(|word| !is_option(word)) };
            if let Some(verb) = verb {
                let behind = at + usize::from(word == "--");
                args.new_container_at = (verb == "create" || verb == "run").then_some(behind);
                break;
            }
            let Some(option) = Word::of(word).long(GLOBAL) else { continue };
            let value = option.value.or_else(|| {
                let next = words.get(at).filter(|_| option.takes_value);
                at += usize::from(next.is_some());
                next.map(OsString::as_os_str)
            });
            match option.name {
                "debug" => args.debug = value.is_none_or(is_true),
                "systemd-cgroup" => args.systemd_cgroup = value.is_none_or(is_true),
                "cgroup-manager" => args.systemd_cgroup = value.is_some_and(|value| value == "systemd"),
                "root" => args.root = value.map(PathBuf::from),
                "log" => args.log = value.map(PathBuf::from),
                "log-format" => args.log_json = value.is_some_and(|value| value == "json"),
                name if QUESTIONS.contains(&name) && value.is_none_or(is_true) => break,
                _ => {}
            }
        }
        args
    }

    /// The container that the command line creates; `None` if it creates none, because the verb is another or because the
    /// low-level runtime can only answer with its usage.
    pub fn new_container(&self, words: &[OsString], dialect: Dialect) -> Option<NewContainer> {
        let words = words.get(self.new_container_at?..)?;
        let mut new = NewContainer { bundle: ".".into(), config: None, has_unknown_option: false };
        let (mut names, mut at) = (0, 0);
        while let Some(word) = words.get(at) {
            at += 1;
            if word == "--" {
                names += words.len() - at;
                break;
            }
            if !is_option(word) {
                // runc also accepts options after the name.
                names += 1;
                continue;
            }
            let options = Word::of(word).options(dialect);
            new.has_unknown_option |= options.is_none();
            for option in options.unwrap_or_default() {
                let value = option.value.or_else(|| {
                    let next = words.get(at).filter(|_| option.takes_value);
                    at += usize::from(next.is_some());
                    next.map(OsString::as_os_str)
                });
                match option.name {
                    "b" | "bundle" => new.bundle = PathBuf::from(value?),
                    "f" | "config" => new.config = Some(PathBuf::from(value?)),
                    name if QUESTIONS.contains(&name) && value.is_none_or(is_true) => return None,
                    _ if option.takes_value && value.is_none() => return None,
                    _ => {}
                }
            }
        }
        // One of the names may be the value of an unknown option.
        let is_complete = names == 1 || (names > 1 && new.has_unknown_option);
        is_complete.then_some(new)
    }
}

/// A lone `-` is a name to both parsers.
fn is_option(word: &OsStr) -> bool {
    word.len() > 1 && word.as_bytes().starts_with(b"-")
}

/// The words for true of Go's `strconv.ParseBool`.
fn is_true(value: &OsStr) -> bool {
    ["1", "t", "T", "TRUE", "true", "True"].iter().any(|text| value == *text)
}

/// A known option with the value from the same word.
#[derive(Debug, Clone, Copy)]
struct Given<'a> {
    name: &'static str,
    takes_value: bool,
    value: Option<&'a OsStr>,
}

/// A word that begins with a dash.
#[derive(Debug, Clone, Copy)]
struct Word<'a> {
    /// Whether it begins with one dash and no more.
    single: bool,
    /// The word without its dashes.
    rest: &'a [u8],
}

impl<'a> Word<'a> {
    fn of(word: &'a OsStr) -> Self {
        let bytes = word.as_bytes();
        let two = bytes.strip_prefix(b"--");
        let rest = two.or_else(|| bytes.strip_prefix(b"-")).unwrap_or(bytes);
        Self { single: two.is_none(), rest }
    }

    /// The options of the word; `None` if one is unknown.
    fn options(self, dialect: Dialect) -> Option<Vec<Given<'a>>> {
        if !self.single || dialect == Dialect::Go {
            if let Some(option) = self.long(NEW_CONTAINER) {
                return Some(vec![option]);
            }
            if !self.single {
                return None;
            }
        }
        self.letters()
    }

    /// `--name`, `--name=value`, and as in getopt_long(3) a unique prefix of a name.
    fn long(self, known: &[Known]) -> Option<Given<'a>> {
        let end = self.rest.iter().position(|&byte| byte == b'=').unwrap_or(self.rest.len());
        let (typed, value) = (&self.rest[..end], self.rest.get(end + 1..).map(OsStr::from_bytes));
        let given = |&(name, takes_value): &Known| Given { name, takes_value, value };
        if let Some(option) = known.iter().find(|(name, _)| name.as_bytes() == typed) {
            return Some(given(option));
        }
        let mut begins =
            known.iter().filter(|(name, _)| name.len() > 1 && name.as_bytes().starts_with(typed));
        let only = begins.next().filter(|_| !typed.is_empty() && begins.next().is_none());
        only.map(given)
    }

    /// `-d`, `-bVALUE`, `-dbVALUE`
    fn letters(self) -> Option<Vec<Given<'a>>> {
        let mut options = Vec::new();
        for (at, letter) in self.rest.iter().enumerate() {
            let &(name, takes_value) = NEW_CONTAINER.iter().find(|(name, _)| name.as_bytes() == [*letter])?;
            let attached = self.rest.get(at + 1..).filter(|rest| takes_value && !rest.is_empty());
            options.push(Given { name, takes_value, value: attached.map(OsStr::from_bytes) });
            if takes_value {
                break;
            }
        }
        Some(options)
    }
}

/// The name and attached value of an option of the prestart hook, in Go's grammar: one dash is the same as two.
pub fn option(word: &OsStr) -> Option<(&str, Option<&OsStr>)> {
    if !is_option(word) {
        return None;
    }
    let rest = Word::of(word).rest;
    let end = rest.iter().position(|&byte| byte == b'=').unwrap_or(rest.len());
    let name = std::str::from_utf8(&rest[..end]).unwrap_or_default();
    Some((name, rest.get(end + 1..).map(OsStr::from_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn scan(line: &str) -> RuntimeArgs {
        RuntimeArgs::scan(&words(line))
    }

    fn new_container(line: &str, dialect: Dialect) -> Option<NewContainer> {
        let words = words(line);
        RuntimeArgs::scan(&words).new_container(&words, dialect)
    }

    #[test]
    fn only_a_complete_create_or_run_makes_a_container() {
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
            ("create", None),
            ("create --bundle /b", None),
            ("create --bundle", None),
            ("create x --bundle", None),
            ("create x y", None),
            ("create --help", None),
            ("create --help x", None),
            ("create x --help", None),
            ("create -h x", None),
            ("run -h", None),
            ("run -?", None),
            ("run --usage", None),
            ("--help create x", None),
            ("-h create x", None),
            ("--version create x", None),
            ("-v create x", None),
            ("help create x", None),
            ("--bundle create", None),
            ("create --help=false x", Some(".")),
            ("-- create x", Some(".")),
            ("--debug -- create x", Some(".")),
            ("create x", Some(".")),
            ("create -", Some(".")),
            ("create create", Some(".")),
            ("run -d run", Some(".")),
            ("create --bundle /b x", Some("/b")),
            ("create --bundle=/b x", Some("/b")),
            ("create -b /b x", Some("/b")),
            ("create -b/b x", Some("/b")),
            ("create --bundle= x", Some("")),
            ("create x -b /b", Some("/b")),
            ("create --bundle /a x --bundle /b", Some("/b")),
            ("create -b /b -- x", Some("/b")),
            ("create -- x -b /b", None),
            ("create --bundle=/a=b x", Some("/a=b")),
            ("create --bundle /a -b /b x", Some("/b")),
            ("create --pid-file --bundle --bundle /b x", Some("/b")),
            ("create --pid-file --help --bundle /b x", Some("/b")),
            (
                "create --no-pivot --bundle /b --pid-file /p --console-socket /c --preserve-fds 2 x",
                Some("/b"),
            ),
            ("--root /r --log /l --log-format json --systemd-cgroup create --bundle /b x", Some("/b")),
            ("--criu /c --rootless auto create -b b x", Some("b")),
            ("--bundle /b create x", None),
            ("--cgroup-manager systemd --debug run -b b x", Some("b")),
            // Unknown options may take values: the low-level runtime knows better.
            ("create --new-option value x", Some(".")),
            ("create --new-option x", Some(".")),
            ("create --new-option", None),
        ] {
            for dialect in [Dialect::Go, Dialect::Argp] {
                let found = new_container(line, dialect);
                let unknown = line.contains("new-option");
                assert_eq!(
                    found.as_ref().map(|new| (new.bundle.as_path(), new.has_unknown_option)),
                    bundle.map(|bundle| (Path::new(bundle), unknown)),
                    "{line} {dialect:?}"
                );
            }
        }
    }

    #[test]
    fn a_single_dash_is_read_as_the_low_level_runtime_reads_it() {
        for (line, go, argp) in [
            ("create -b=/b x", Some("/b"), Some("=/b")),
            ("create -bundle /b x", Some("/b"), None),
            ("create -bundle=/b x", Some("/b"), Some("undle=/b")),
            ("run -db /b x", Some("/b"), Some("/b")),
            ("run -db/b x", Some("/b"), Some("/b")),
            ("create --bun /b x", Some("/b"), Some("/b")),
        ] {
            let bundle = |dialect| new_container(line, dialect).map(|new| new.bundle);
            assert_eq!(bundle(Dialect::Go).as_deref(), go.map(Path::new), "{line}");
            assert_eq!(bundle(Dialect::Argp).as_deref(), argp.map(Path::new), "{line}");
        }
        for (program, dialect) in [
            ("/usr/bin/runc", Dialect::Go),
            ("/usr/libexec/crio/crun", Dialect::Argp),
            ("/usr/bin/krun", Dialect::Argp),
            ("/usr/bin/crun-wasm", Dialect::Argp),
            ("/usr/bin/youki", Dialect::Go),
        ] {
            assert_eq!(Dialect::of(Path::new(program)), dialect);
        }
    }

    #[test]
    fn cruns_configuration_file_is_seen() {
        for line in
            ["-f /c x", "-f/c x", "--config /c x", "--config=/c x", "--conf /c x", "-f /a --config /c x"]
        {
            let found = new_container(&format!("create -b /b {line}"), Dialect::Argp);
            let expected =
                NewContainer { bundle: "/b".into(), config: Some("/c".into()), has_unknown_option: false };
            assert_eq!(found, Some(expected), "{line}");
        }
        assert_eq!(
            new_container("create --con /c x", Dialect::Argp).map(|new| new.has_unknown_option),
            Some(true)
        );
    }

    #[test]
    fn systemd_makes_the_cgroup_where_an_option_before_the_verb_asks_for_it() {
        for (line, said) in [
            ("--systemd-cgroup create x", true),
            ("--systemd-cgroup=true create x", true),
            ("--systemd-cgroup=1 create x", true),
            ("--systemd-cgroup=false create x", false),
            ("--cgroup-manager systemd create x", true),
            ("--cgroup-manager=cgroupfs create x", false),
            ("create --systemd-cgroup x", false),
        ] {
            assert_eq!(scan(line).systemd_cgroup, said, "{line}");
        }
    }

    #[test]
    fn log_and_state_directory_are_those_of_the_runtime() {
        let args = scan(
            "--log /run/log.json --log-format=json --debug --root /run/crun create --log /no --root /no x",
        );
        assert_eq!(
            (args.log.as_deref(), args.log_json, args.debug, args.root.as_deref()),
            (Some("/run/log.json".as_ref()), true, true, Some("/run/crun".as_ref()))
        );
        let args = scan("--log-format text --debug=false --log");
        assert_eq!((args.log, args.log_json, args.debug), (None, false, false));
    }

    proptest! {
        #[test]
        fn any_words_are_scanned(words in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..8),
                prop_oneof!["create", "run", "--", "-", "-b", "-db", "--bundle=", "--log", "-=", "---"].prop_map(String::into_bytes),
            ],
            0..8
        )) {
            let words: Vec<OsString> = words.iter().map(|word| OsStr::from_bytes(word).to_owned()).collect();
            let args = RuntimeArgs::scan(&words);
            for dialect in [Dialect::Go, Dialect::Argp] {
                args.new_container(&words, dialect);
            }
        }
    }
}
