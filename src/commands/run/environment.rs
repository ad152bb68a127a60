//! `-e`, `--env-file` and `--env-host`.

use super::{env_file, usage};
use crate::{cli::Run, error::Result, vocabulary::EnvVar};

/// `-e` and `--env-file`, files first, as Docker orders them.
pub fn environment(args: &Run) -> Result<Vec<EnvVar>> {
    let mut env = Vec::new();
    for file in &args.env_file {
        env.extend(env_file::read(file, |name| std::env::var(name).ok())?);
    }
    if args.env_host {
        // As in Podman, the container keeps its own values of these variables.
        env.extend(
            own_variables()
                .filter(|(name, _)| !["PATH", "HOME", "HOSTNAME", "TERM"].contains(&name.as_str())),
        );
    }
    for text in &args.env {
        match text.strip_suffix('*').filter(|prefix| !prefix.contains('=')) {
            Some(prefix) => env.extend(own_variables().filter(|(name, _)| name.starts_with(prefix))),
            None => env.extend(variable(text)?),
        }
    }
    Ok(env)
}

/// gpurun's own environment, as far as it is text.
fn own_variables() -> impl Iterator<Item = EnvVar> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// `NAME=VALUE`, or `NAME` for the value in gpurun's environment; `None` if it is unset there.
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

/// An environment file, whose lines are also arguments of `-e`, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    env_file::fuzz(bytes);
    for line in crate::fuzz_targets::text(bytes).lines() {
        let _ = variable(line);
    }
}
