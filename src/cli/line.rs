//! Splits a command line at its image: `gpurun [run] [OPTIONS] IMAGE [ARG…]`. As in Docker and Podman, every word after IMAGE
//! belongs to the container, even if it looks like an option.
//!
//! The image is the first word that is neither an option nor the value of an option. The words before it are normalised (each
//! option in one word with its value, flags without a value), so that clap decides nothing: pflag's rules are applied only
//! here.

use crate::error::{Code, Error, Result};
use clap::{Arg, ArgAction, Command};
use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

/// The options at the front of a command line.
#[derive(Debug, Default)]
pub struct Front {
    /// The options, each in one word.
    pub options: Vec<OsString>,
    /// How many words they took, including a `--`.
    pub length: usize,
    /// Whether one of them is an option of `run`, not a global option.
    pub has_own: bool,
    /// Whether `--` ended them.
    pub escaped: bool,
    /// Whether the last one of `options` is unknown.
    pub unknown: bool,
    /// Sentences about words that were probably meant otherwise.
    pub notes: Vec<String>,
    /// Flags in the order of their first use, with their last value.
    flags: Vec<(String, bool)>,
}

/// Reads options up to the first word that is not an option.
///
/// # Errors
/// [`Code::Usage`] for `--flag=VALUE` where VALUE is not a boolean.
pub fn front(command: &Command, words: &[OsString]) -> Result<Front> {
    let mut front = Front::default();
    while let Some(word) = words.get(front.length) {
        let next = words.get(front.length + 1);
        let bytes = word.as_bytes();
        if bytes == b"--" {
            front.length += 1;
            front.escaped = true;
            break;
        }
        let read = match bytes {
            [b'-', b'-', name @ ..] => front.long(command, word, name, next)?,
            [b'-', letters @ ..] if !letters.is_empty() => {
                let read = front.cluster(command, word, letters, next)?;
                // Where the first letter is unknown, `respelt` says the same.
                if front.options.last() != Some(word) {
                    front.notes.extend(single_hyphen(command, letters));
                }
                read
            }
            _ if begins_with_another_dash(word) => {
                front.options.push(word.clone());
                front.unknown = true;
                1
            }
            _ => break,
        };
        front.length += read;
        if front.unknown {
            break;
        }
    }
    let on = front.flags.iter().filter(|(_, on)| *on).map(|(name, _)| OsString::from(format!("--{name}")));
    // An unknown option stays last, because the words after it cannot be interpreted.
    let at = front.options.len() - usize::from(front.unknown);
    front.options.splice(at..at, on.collect::<Vec<_>>());
    Ok(front)
}

/// The note about `-env` and the like: pflag reads one-letter options after a single hyphen, so `-env A=b` is `-e nv` and the image
/// `A=b` (Docker 28.5).
fn single_hyphen(command: &Command, letters: &[u8]) -> Option<String> {
    let name = letters.split(|byte| *byte == b'=').next().and_then(|name| std::str::from_utf8(name).ok())?;
    (name.len() > 1 && long(command, name).is_some())
        .then(|| format!("-{name} is read as one-letter options, as Docker reads it; the option is --{name}"))
}

/// Characters that text processors put in place of hyphens.
const OTHER_DASHES: [char; 6] = ['\u{2010}', '\u{2011}', '\u{2012}', '\u{2013}', '\u{2014}', '\u{2212}'];

fn begins_with_another_dash(word: &OsStr) -> bool {
    word.to_str().is_some_and(|word| word.starts_with(OTHER_DASHES))
}

/// Our error for an unknown option that is a known one in another spelling: capitals, one dash in place of two, another
/// character in place of a hyphen.
pub fn respelt(command: &Command, typed: &OsStr) -> Option<Error> {
    let typed = typed.to_str()?;
    let (name, value) = typed.split_once('=').map_or((typed, None), |(name, value)| (name, Some(value)));
    let name = name.trim_start_matches('-').trim_start_matches(OTHER_DASHES).trim_start_matches('-');
    let name = name.replace(OTHER_DASHES, "-").replace('_', "-").to_lowercase();
    let meant = match (name.as_bytes(), long(command, &name)) {
        (_, Some(_)) => format!("--{name}"),
        ([letter], None) if short(command, *letter).is_some() => format!("-{name}"),
        (letters, None) if is_flags(command, letters) => format!("-{name}"),
        _ if begins_with_another_dash(OsStr::new(typed)) => {
            return Some(
                Error::new(Code::Usage, format!("there is no option {typed}"))
                    .cause("it begins with another character than the hyphen of the keyboard")
                    .fix("type its dashes again; `gpurun run --help` lists what there is"),
            );
        }
        _ => return None,
    };
    let value = value.map_or_else(String::new, |value| format!("={value}"));
    Some(
        Error::new(Code::Usage, format!("there is no option {typed}"))
            .fix(format!("did you mean {meant}{value}?")),
    )
}

impl Front {
    /// `--name`, `--name=value`, `--name value`. Returns the number of words.
    fn long(
        &mut self,
        command: &Command,
        word: &OsStr,
        name: &[u8],
        next: Option<&OsString>,
    ) -> Result<usize> {
        let (name, value) = match name.iter().position(|byte| *byte == b'=') {
            Some(at) => (&name[..at], Some(&name[at + 1..])),
            None => (name, None),
        };
        let found = std::str::from_utf8(name).ok().and_then(|name| long(command, name));
        let Some(arg) = found else {
            self.options.push(word.to_owned());
            self.unknown = true;
            return Ok(1);
        };
        self.note(arg);
        if is_flag(arg) {
            let typed = format!("--{}", String::from_utf8_lossy(name));
            self.set(arg, value, OsStr::new(&typed))?;
            return Ok(1);
        }
        match next.filter(|_| value.is_none() && takes_next_word(arg)) {
            Some(next) => {
                self.options.push(joined(word, next));
                Ok(2)
            }
            None if value.is_none() && takes_next_word(arg) => Err(missing_value(arg, word)),
            None => {
                self.options.push(word.to_owned());
                Ok(1)
            }
        }
    }

    /// `-it`, `-itv/a:/b`, `-v /a:/b`, `-t=false`. Returns the number of words.
    fn cluster(
        &mut self,
        command: &Command,
        word: &OsStr,
        letters: &[u8],
        next: Option<&OsString>,
    ) -> Result<usize> {
        let mut rest = letters;
        while let [letter, behind @ ..] = rest {
            let Some(arg) = short(command, *letter) else {
                let shown = if rest.len() == letters.len() { word.to_owned() } else { dashed(&[*letter]) };
                self.options.push(shown);
                self.unknown = true;
                return Ok(1);
            };
            self.note(arg);
            if is_flag(arg) {
                if let [b'=', value @ ..] = behind {
                    self.set(arg, Some(value), &dashed(&[*letter]))?;
                    return Ok(1);
                }
                self.set(arg, None, word)?;
                rest = behind;
                continue;
            }
            let (value, words) = match (behind, next) {
                ([], Some(next)) => (next.as_bytes(), 2),
                ([], None) => return Err(missing_value(arg, &dashed(&[*letter]))),
                ([b'=', value @ ..] | value, _) => (value, 1),
            };
            self.options.push(joined(&dashed(&[*letter]), OsStr::from_bytes(value)));
            return Ok(words);
        }
        Ok(1)
    }

    fn note(&mut self, arg: &Arg) {
        let of_every_command =
            arg.is_global_set() || matches!(arg.get_action(), ArgAction::Help | ArgAction::Version);
        self.has_own |= !of_every_command;
    }

    /// Sets a flag. `typed` is the option as the user wrote it.
    fn set(&mut self, arg: &Arg, value: Option<&[u8]>, typed: &OsStr) -> Result<()> {
        let name = arg.get_long().unwrap_or_default().to_owned();
        let on = match value {
            None => true,
            Some(text) => boolean(text).ok_or_else(|| {
                let (text, typed) = (String::from_utf8_lossy(text), typed.to_string_lossy());
                Error::new(Code::Usage, format!("{typed}={text} is neither true nor false"))
                    .fix(format!("write {typed} or {typed}=false"))
            })?,
        };
        match self.flags.iter_mut().find(|(known, _)| *known == name) {
            Some(flag) => flag.1 = on,
            None => self.flags.push((name, on)),
        }
        Ok(())
    }
}

/// Go's strconv.ParseBool, as Docker and Podman use for flags.
pub fn boolean(text: &[u8]) -> Option<bool> {
    match text {
        b"1" | b"t" | b"T" | b"true" | b"TRUE" | b"True" => Some(true),
        b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False" => Some(false),
        _ => None,
    }
}

fn long<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| {
        arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    })
}

fn short(command: &Command, letter: u8) -> Option<&Arg> {
    command.get_arguments().find(|arg| arg.get_short() == Some(letter.into()))
}

/// Whether these letters are flags, as in `-it`.
fn is_flags(command: &Command, letters: &[u8]) -> bool {
    !letters.is_empty() && letters.iter().all(|letter| short(command, *letter).is_some_and(is_flag))
}

/// Whether an option is a boolean flag.
fn is_flag(arg: &Arg) -> bool {
    !arg.get_action().takes_values()
}

/// Whether the value may be the next word. As in pflag, not if the option has a meaning without a value.
fn takes_next_word(arg: &Arg) -> bool {
    !arg.is_require_equals_set()
}

/// `typed` is the option as the user wrote it.
fn missing_value(arg: &Arg, typed: &OsStr) -> Error {
    let value = arg.get_value_names().and_then(|names| names.first()).map_or("VALUE", |name| name.as_str());
    let typed = typed.to_string_lossy();
    Error::new(Code::Usage, format!("{typed} wants a value"))
        .fix(format!("write {typed} {value}; `gpurun run --help` lists what there is"))
}

fn dashed(letters: &[u8]) -> OsString {
    OsString::from_vec([b"-", letters].concat())
}

fn joined(option: &OsStr, value: &OsStr) -> OsString {
    OsString::from_vec([option.as_bytes(), b"=", value.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::run_command;

    fn read(words: &str) -> (String, usize) {
        let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        let front = front(&run_command("run"), &words).unwrap();
        let options: Vec<_> = front.options.iter().map(|word| word.to_str().unwrap()).collect();
        (options.join(" "), front.length)
    }

    #[test]
    fn options_are_read_as_pflag_reads_them() {
        for (typed, options, length) in [
            ("IMAGE -e A=b", "", 0),
            ("-e A=b IMAGE", "-e=A=b", 2),
            ("-eA=b IMAGE", "-e=A=b", 1),
            ("-e=A=b IMAGE", "-e=A=b", 1),
            ("--env A=b IMAGE", "--env=A=b", 2),
            ("--env=A=b IMAGE", "--env=A=b", 1),
            ("-it IMAGE", "--interactive --tty", 1),
            ("-itw /x IMAGE", "-w=/x --interactive --tty", 2),
            ("-t=false IMAGE", "", 1),
            ("-it -t=0 IMAGE", "--interactive", 2),
            ("--init=f --init=T IMAGE", "--init", 2),
            ("--rm true", "--rm", 1),
            ("-- IMAGE", "", 1),
            ("--entrypoint -- IMAGE", "--entrypoint=--", 2),
            ("--name -x IMAGE", "--name=-x", 2),
            ("--net host IMAGE", "--net=host", 2),
            ("--sig-proxy IMAGE", "--sig-proxy", 1),
            ("--sig-proxy=false IMAGE", "--sig-proxy=false", 1),
            ("-itd IMAGE", "--interactive --tty --detach", 1),
            ("--gpu all IMAGE", "--gpu", 1),
            ("-iX IMAGE", "--interactive -X", 1),
            ("- IMAGE", "", 0),
            ("-ip 80:80 IMAGE", "-p=80:80 --interactive", 2),
            ("-eenv=1 IMAGE", "-e=env=1", 1),
            ("-uroot IMAGE", "-u=root", 1),
        ] {
            assert_eq!(read(typed), (options.to_owned(), length), "{typed}");
        }
    }

    #[test]
    fn booleans_are_gos() {
        for text in ["1", "t", "T", "true", "TRUE", "True"] {
            assert_eq!(boolean(text.as_bytes()), Some(true));
        }
        for text in ["yes", "on", "", "tRUE", "2"] {
            assert_eq!(boolean(text.as_bytes()), None);
        }
        let words = [OsString::from("--rm=yes")];
        let error = front(&run_command("run"), &words).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error[GPU-0001]: --rm=yes is neither true nor false\n  fix: write --rm or --rm=false"
        );
    }

    #[test]
    fn bytes_that_are_not_text_are_options_values_and_images() {
        let odd = OsString::from_vec(b"\xff".to_vec());
        let command = run_command("run");
        assert_eq!(front(&command, std::slice::from_ref(&odd)).unwrap().length, 0);
        assert_eq!(front(&command, &["-v".into(), odd.clone(), "x".into()]).unwrap().length, 2);
        assert!(front(&command, &[OsString::from_vec(b"--\xff".to_vec())]).unwrap().unknown);
        assert!(front(&command, &[OsString::from_vec(b"-\xff".to_vec())]).unwrap().unknown);
    }
}
