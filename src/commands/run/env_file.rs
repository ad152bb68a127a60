//! Parses `--env-file` like Docker (docker/cli, `pkg/kvfile`): one variable per line.
//!
//! Blanks before a name are dropped, blanks after a value belong to it, and quotes have no meaning. A name alone takes the
//! value from gpurun's environment. `integration/docker-answers/env-files.json` has the real Docker's answers.

use crate::{
    error::{Code, Error, OrFail, Result},
    text_file::{Line, TextFile},
    vocabulary::EnvVar,
};
use std::path::Path;

/// The largest file, in bytes: more than an environment can hold (execve(2), "Limits on size of arguments and environment").
const MAX_FILE: u64 = 16 << 20;

/// Reads a file of `option`. `own` looks up a variable of gpurun's environment.
///
/// # Errors
/// [`Code::Usage`], with the file's name and the line.
pub fn read(option: &str, path: &Path, own: impl Fn(&str) -> Option<String>) -> Result<Vec<EnvVar>> {
    let file = TextFile::read(path, MAX_FILE)
        .or_fail(Code::Usage, || format!("{option} {} cannot be read", path.display()))
        .map_err(|error| error.fix("name a file of NAME=VALUE lines that you may read"))?;
    parse(option, &file, &path.display().to_string(), own)
}

fn parse(
    option: &str,
    file: &TextFile,
    name: &str,
    own: impl Fn(&str) -> Option<String>,
) -> Result<Vec<EnvVar>> {
    let mut variables = Vec::new();
    for line in file.lines() {
        let text = line
            .text()
            .or_fail(Code::Usage, || format!("{option} {name} cannot be read"))
            .map_err(|error| {
                error.fix(format!("save {name} as UTF-8: iconv -f {} -t UTF-8 {name}", encoding(file)))
            })?
            .trim_start();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, own(text)),
        };
        check(key, value.as_deref()).map_err(|cause| wrong_line(option, name, line, text, cause))?;
        variables.extend(value.map(|value| (key.to_owned(), value)));
    }
    Ok(variables)
}

/// What iconv calls the encoding of a file that is not UTF-8.
fn encoding(file: &TextFile) -> &'static str {
    match file.bytes() {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => "latin1",
    }
}

fn check(key: &str, value: Option<&str>) -> Result<(), &'static str> {
    if key.is_empty() {
        Err("there is no name before the =")
    } else if key.contains([' ', '\t']) {
        Err("a name holds no blanks; `export` and `NAME: VALUE` are other formats")
    } else if key.contains('\0') || value.is_some_and(|value| value.contains('\0')) {
        Err("it holds a NUL character")
    } else {
        Ok(())
    }
}

fn wrong_line(option: &str, file: &str, line: Line<'_>, text: &str, cause: &str) -> Error {
    let shown: String = text.chars().take(80).collect();
    Error::new(
        Code::Usage,
        format!("{option} {file}, line {}: {shown:?} does not set a variable", line.number),
    )
    .cause(cause)
    .fix(format!("write NAME=VALUE, or NAME alone, in line {} of {file}", line.number))
}

/// An environment file, for [`crate::fuzz_targets`]. A written file must read back equal.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz(bytes: &[u8]) {
    let own = |name: &str| name.len().is_multiple_of(2).then(|| name.to_owned());
    let Ok(variables) = parse("--env-file", &TextFile::from(bytes.to_vec()), "FILE", own) else { return };
    // The comment keeps a byte order mark in a name, and CR LF keeps a CR at the end of a value.
    let lines = variables.iter().map(|(name, value)| format!("{name}={value}\r\n"));
    let written: String = std::iter::once("#\n".to_owned()).chain(lines).collect();
    let read = parse("--env-file", &TextFile::from(written.clone().into_bytes()), "FILE", |_| None);
    assert_eq!(read.ok(), Some(variables), "{written}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn parsed(bytes: &[u8]) -> Result<Vec<EnvVar>> {
        let own = |name: &str| (name == "INHERITED").then(|| "yes".to_owned());
        parse("--env-file", &TextFile::from(bytes.to_vec()), "FILE", own)
    }

    #[test]
    fn another_encoding_is_named_for_iconv() {
        for (bytes, from) in [(&b"\xff\xfeA\0"[..], "-f UTF-16 -t UTF-8"), (b"A=wei\xdf", "-f latin1")] {
            let error = parsed(bytes).unwrap_err();
            assert!(error.fix_line().contains(from), "{error}");
        }
    }

    #[test]
    fn files_are_read_as_docker_reads_them() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/docker-answers/env-files.json");
        let table: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for entry in table["cases"].as_array().unwrap() {
            let name = entry["case"]["file"].as_str().unwrap();
            let Some(text) = table["files"][name].as_str().filter(|_| entry["case"]["options"].is_null())
            else {
                continue;
            };
            let fill = "x".repeat(usize::try_from(table["fill"][name].as_u64().unwrap_or(0)).unwrap());
            let bytes: Vec<u8> =
                text.replace('%', &fill).chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
            let answer = parsed(&bytes);
            let expected = if entry["ours"].is_null() { &entry["docker"] } else { &entry["ours"] };
            assert_eq!(entry["ours"].is_null(), entry["why"].is_null(), "a difference has a reason: {entry}");
            let Some(expected) = expected["env"].as_array() else {
                let error = answer.unwrap_err();
                assert!(error.to_string().contains("FILE") && error.to_string().contains("line "), "{error}");
                assert!(!error.fix_line().is_empty());
                continue;
            };
            // The last variable of each name is used. The recorder shortens long lines and reads bytes.
            let mut last = std::collections::BTreeMap::new();
            last.extend(answer.unwrap_or_else(|error| panic!("{name}: {error}")));
            last.retain(|name, _| name != "PATH");
            let mut shown: Vec<String> = last
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .map(|line| line.bytes().map(char::from).collect())
                .map(
                    |line: String| {
                        if line.len() < 1000 { line } else { format!("{}... {}", &line[..8], line.len()) }
                    },
                )
                .collect();
            shown.sort();
            let expected: Vec<&str> = expected.iter().map(|line| line.as_str().unwrap()).collect();
            assert_eq!(shown, expected, "{name}");
        }
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (bytes, says) in [
            (&b"A=1\n\nexport B=2\n"[..], "line 3"),
            (b"A=1\nB=wei\xdf\n", "line 2 has the byte 0xdf"),
            (b"A=x\0y\n", "NUL"),
            (b"=x", "no name"),
        ] {
            let error = parsed(bytes).unwrap_err().to_string();
            assert!(error.contains("FILE") && error.contains(says) && error.contains("fix:"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parsed(&bytes);
        }
    }
}
