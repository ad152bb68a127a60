//! The command line: `[nvidia-ctk] hook NAME --flag=value --flag value …`, in the peer's grammar.

use std::{ffi::OsString, path::Path};

/// What was said.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Which hook.
    pub hook: Option<String>,
    flags: Vec<(String, String)>,
}

/// Flags without a value.
const SWITCHES: [&str; 4] = ["debug", "d", "quiet", "q"];

impl Words {
    /// Reads a command line, the program's name first.
    pub fn of(arguments: impl Iterator<Item = OsString>) -> Self {
        // A configuration is JSON, so nothing but text can come from it.
        let mut words = arguments.map(|word| word.to_string_lossy().into_owned());
        let called = words.next().unwrap_or_default();
        let mut read = Self::default();
        let is_ctk = Path::new(&called).file_name().is_some_and(|name| name == "nvidia-ctk");
        let mut words = words.peekable();
        while let Some(word) = words.next() {
            let dashes =
                word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|flag| !flag.is_empty());
            match dashes {
                Some("version" | "v") if read.hook.is_none() => read.hook = Some(word),
                Some(flag) => {
                    if let Some((flag, value)) = flag.split_once('=') {
                        read.flags.push((flag.into(), value.into()));
                    } else if !SWITCHES.contains(&flag) {
                        let value = words.next_if(|next| !next.starts_with("--")).unwrap_or_default();
                        read.flags.push((flag.into(), value));
                    }
                }
                None if read.hook.is_none() && is_ctk && word == "hook" => {}
                None if read.hook.is_none() => read.hook = Some(word),
                None => {}
            }
        }
        read
    }

    /// Every value of a flag, in order.
    pub fn all(&self, flag: &str) -> impl Iterator<Item = &str> {
        self.flags.iter().filter(move |(name, _)| name == flag).map(|(_, value)| value.as_str())
    }

    /// The last value of a flag, if it is not empty.
    pub fn last(&self, flag: &str) -> Option<&str> {
        self.all(flag).last().filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Words {
        Words::of(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_peers_grammar_is_read() {
        let read = words("nvidia-cdi-hook create-symlinks --link a::/b --link=c::/d=e");
        assert_eq!(read.hook.as_deref(), Some("create-symlinks"));
        assert_eq!(read.all("link").collect::<Vec<_>>(), ["a::/b", "c::/d=e"]);
        for line in [
            "/usr/bin/nvidia-ctk --debug hook chmod --mode 755 --path /a",
            "/usr/bin/gpurun-hook --quiet chmod -mode=755 -path /a",
        ] {
            let read = words(line);
            assert_eq!(
                (read.hook.as_deref(), read.last("mode"), read.last("path")),
                (Some("chmod"), Some("755"), Some("/a"))
            );
        }
        assert_eq!(words("nvidia-cdi-hook"), Words::default());
        assert_eq!(words("nvidia-cdi-hook hook x").hook.as_deref(), Some("hook"), "a name like any other");
        let read = words("h all --new --link=a::/b --host-driver-version=");
        assert_eq!((read.all("link").count(), read.last("host-driver-version")), (1, None));
    }
}
