//! Parses command lines in the grammar of Go's `flag` and urfave/cli, for NVIDIA's programs that gpurun replaces:
//! `-name value`, `--name=value`, `--switch=1`; the last of several values is used.

use super::environment::without_empty_variables;
use clap::{Arg, ArgAction, Command, Parser};
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

/// Parses such a command line; options that are not in it are taken from their variables.
///
/// # Errors
/// clap's errors, which include the output of `--help` and `--version`.
pub fn parse<P: Parser>(arguments: impl IntoIterator<Item = OsString>) -> Result<P, clap::Error> {
    let mut command = without_empty_variables(P::command()).args_override_self(true);
    let arguments = translated(&command, arguments);
    let mut matches = command.try_get_matches_from_mut(arguments)?;
    P::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// Parses the words of Go's `strconv.ParseBool`.
///
/// # Errors
/// A sentence that lists the words.
pub fn switch(word: &str) -> Result<bool, String> {
    match word {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it can be true, t, 1, false, f or 0".into()),
    }
}

/// Rewrites the command line for clap.
fn translated(root: &Command, arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut words = arguments.into_iter();
    let mut command = root;
    let mut read: Vec<OsString> = words.next().into_iter().collect();
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        let Some(flag) = bytes.strip_prefix(b"-").filter(|flag| !flag.is_empty()) else {
            if let Some(next) = word.to_str().and_then(|word| command.find_subcommand(word)) {
                command = next;
            }
            read.push(word);
            // The rest belongs to another program.
            if command.get_positionals().any(Arg::is_trailing_var_arg_set) {
                break;
            }
            continue;
        };
        let flag = flag.strip_prefix(b"-").unwrap_or(flag);
        if flag.is_empty() {
            read.push(word);
            break;
        }
        let (name, value) = match flag.iter().position(|byte| *byte == b'=') {
            Some(at) => (&flag[..at], Some(&flag[at + 1..])),
            None => (flag, None),
        };
        let Some((argument, dashed)) =
            std::str::from_utf8(name).ok().and_then(|name| find(root, command, name))
        else {
            read.push(word);
            continue;
        };
        match argument.get_action() {
            ArgAction::SetTrue | ArgAction::Count => {
                match value.map(|value| switch(&String::from_utf8_lossy(value))) {
                    None | Some(Ok(true)) => read.push(dashed.into()),
                    Some(Ok(false)) => {}
                    Some(Err(_)) => read.push(word),
                }
            }
            ArgAction::Set | ArgAction::Append => {
                let optional = argument.get_num_args().is_some_and(|range| range.min_values() == 0);
                let value = match value {
                    Some(value) => Some(OsStr::from_bytes(value).to_owned()),
                    None if optional => None,
                    // The value may begin with a dash.
                    None => words.next(),
                };
                let mut word = dashed.into_bytes();
                if let Some(value) = value {
                    word.push(b'=');
                    word.extend_from_slice(value.as_bytes());
                }
                read.push(OsString::from_vec(word));
            }
            _ => read.push(dashed.into()),
        }
    }
    read.extend(words);
    read
}

/// The option of this name (of the command, or global), and its spelling for clap.
fn find<'a>(root: &'a Command, command: &'a Command, name: &str) -> Option<(&'a Arg, String)> {
    let global = || root.get_arguments().filter(|argument| argument.is_global_set());
    let known = |argument: &&Arg| {
        argument.get_long() == Some(name) || argument.get_all_aliases().is_some_and(|all| all.contains(&name))
    };
    let mut letters = name.chars();
    let letter = letters.next().filter(|_| letters.next().is_none());
    let all = || command.get_arguments().chain(global());
    all().find(known).map(|argument| (argument, format!("--{name}"))).or_else(|| {
        let argument = all().find(|argument| letter.is_some() && argument.get_short() == letter)?;
        Some((argument, format!("-{name}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Parser)]
    struct Program {
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch)]
        enabled: Option<bool>,
        #[arg(short, long)]
        debug: bool,
        #[arg(long, alias = "older-name", value_delimiter = ',')]
        list: Vec<String>,
        #[arg(long)]
        root: Option<String>,
        #[command(subcommand)]
        verb: Option<Verb>,
    }

    #[derive(Debug, PartialEq, clap::Subcommand)]
    enum Verb {
        Make {
            #[arg(short, long)]
            output: Option<String>,
        },
        Hook {
            #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
            words: Vec<String>,
        },
    }

    fn read(line: &str) -> Program {
        let words = ["program"].into_iter().chain(line.split_whitespace()).map(OsString::from);
        parse(words).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn gos_grammar_is_read() {
        let none = || Program { enabled: None, debug: false, list: Vec::new(), root: None, verb: None };
        assert_eq!(read(""), none());
        for (words, value) in
            [("", true), ("=1", true), ("=T", true), ("=True", true), ("=f", false), ("=0", false)]
        {
            for dashes in ["-", "--"] {
                let enabled = Some(value);
                assert_eq!(read(&format!("{dashes}enabled{words}")), Program { enabled, ..none() });
                assert_eq!(read(&format!("{dashes}debug{words}")), Program { debug: value, ..none() });
            }
        }
        for line in ["--root=/a", "-root /a", "-root=/a", "--root /b --root /a"] {
            assert_eq!(read(line), Program { root: Some("/a".into()), ..none() }, "{line}");
        }
        assert_eq!(read("--root -x").root.as_deref(), Some("-x"));
        assert_eq!(read("--root=").root.as_deref(), Some(""));
        for line in ["--list a,b", "-list a -list=b", "--older-name a --list b", "-older-name=a,b"] {
            assert_eq!(read(line).list, ["a", "b"], "{line}");
        }
        for line in ["-debug make -output f", "--debug make --output=f", "-d make -o f", "--d=1 make --o=f"] {
            let verb = Some(Verb::Make { output: Some("f".into()) });
            assert_eq!(read(line), Program { debug: true, verb, ..none() }, "{line}");
        }
        let words = ["-root", "--debug=0"].map(String::from).to_vec();
        assert_eq!(read("hook -root --debug=0").verb, Some(Verb::Hook { words }));
    }

    #[test]
    fn what_go_refuses_is_refused() {
        for line in ["-unknown", "--enabled=maybe", "--debug=2", "--root", "---root=x", "make -root /a"] {
            let words = ["program"].into_iter().chain(line.split_whitespace()).map(OsString::from);
            assert!(parse::<Program>(words).is_err(), "{line}");
        }
    }
}
