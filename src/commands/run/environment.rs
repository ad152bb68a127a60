//! `-e`, `--env-file` and `--env-host`.

use super::usage;
use crate::{
    cli::Run,
    error::{Code, OrFail, Result},
    vocabulary::EnvVar,
};

/// `-e` and `--env-file`, files first, as Docker orders them.
pub fn environment(args: &Run) -> Result<Vec<EnvVar>> {
    let mut env = Vec::new();
    for file in &args.env_file {
        let text = std::fs::read_to_string(file)
            .or_fail(Code::Usage, || format!("--env-file {} cannot be read", file.display()))
            .map_err(|error| error.fix("name a file of NAME=VALUE lines that you may read"))?;
        for line in text.lines() {
            let line = line.trim_start();
            if !line.is_empty() && !line.starts_with('#') {
                env.extend(variable(line)?);
            }
        }
    }
    for text in &args.env {
        env.extend(variable(text)?);
    }
    Ok(env)
}

/// `NAME=VALUE`, or `NAME` for the value that gpurun itself has; nothing if it has none.
fn variable(text: &str) -> Result<Option<EnvVar>> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, std::env::var(text).ok()),
    };
    if name.is_empty() || name.chars().any(char::is_whitespace) {
        return Err(usage(format!("{text:?} does not set a variable")).fix("write -e NAME=VALUE, or -e NAME"));
    }
    Ok(value.map(|value| (name.to_owned(), value)))
}

/// An environment file, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    for line in crate::fuzz_targets::text(bytes).lines() {
        let _ = variable(line);
    }
}
