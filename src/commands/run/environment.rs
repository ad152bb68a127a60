//! `-e`, `--env-file` and `--env-host`.

use super::{env_file, usage};
use crate::{cli::Run, error::Result, vocabulary::EnvVar};
use std::{borrow::Cow, env::VarError};

/// The variables of the command line.
#[derive(Debug, Default)]
pub struct UserEnvironment {
    /// Variables with their values; the last one of a name counts.
    pub set: Vec<EnvVar>,
    /// Names of variables of the image that the container does not get.
    removed: Vec<String>,
}

impl UserEnvironment {
    /// The image's variables without those that the user removed.
    pub fn left_of<'a>(&self, image: &'a [EnvVar]) -> Cow<'a, [EnvVar]> {
        if self.removed.is_empty() {
            return image.into();
        }
        image.iter().filter(|(name, _)| !self.removed.contains(name)).cloned().collect()
    }

    fn set(&mut self, (name, value): EnvVar) {
        self.removed.retain(|removed| *removed != name);
        self.set.push((name, value));
    }

    /// Removes a variable of the image, and those that were set after the first `kept`.
    fn remove(&mut self, name: String, kept: usize) {
        let typed = self.set.split_off(kept);
        self.set.extend(typed.into_iter().filter(|(set, _)| *set != name));
        self.removed.push(name);
    }
}

/// `-e` and `--env-file`, files first, as Docker orders them. `-e NAME` of a variable that is not set removes the image's value
/// and that of an earlier `-e`, but not that of a file; in a file such a line means nothing.
pub fn environment(args: &Run) -> Result<UserEnvironment> {
    let mut env = UserEnvironment::default();
    for file in &args.env_file {
        env_file::read("--env-file", file, |name| std::env::var(name).ok())?
            .into_iter()
            .for_each(|var| env.set(var));
    }
    if args.env_host {
        // As in Podman, the container keeps its own values of these variables.
        own_variables()
            .filter(|(name, _)| !["PATH", "HOME", "HOSTNAME", "TERM"].contains(&name.as_str()))
            .for_each(|var| env.set(var));
    }
    let of_files = env.set.len();
    for text in &args.env {
        match text.strip_suffix('*').filter(|prefix| !prefix.contains('=')) {
            Some(prefix) => {
                own_variables().filter(|(name, _)| name.starts_with(prefix)).for_each(|var| env.set(var));
            }
            None => match variable(text)? {
                (name, Some(value)) => env.set((name, value)),
                (name, None) => env.remove(name, of_files),
            },
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
fn variable(text: &str) -> Result<(String, Option<String>)> {
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    if name.is_empty() || name.chars().any(char::is_whitespace) {
        return Err(usage(format!("{text:?} does not set a variable")).fix("write -e NAME=VALUE, or -e NAME"));
    }
    let value = match text.split_once('=') {
        Some((_, value)) => Some(value.to_owned()),
        None => match std::env::var(name) {
            Ok(value) => Some(value),
            Err(VarError::NotPresent) => None,
            Err(VarError::NotUnicode(_)) => {
                return Err(usage(format!("-e {name}: the variable's value is not UTF-8"))
                    .fix(format!("set it to UTF-8 text: -e {name}=VALUE")));
            }
        },
    };
    Ok((name.to_owned(), value))
}

/// An environment file, whose lines are also arguments of `-e`, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    env_file::fuzz(bytes);
    for line in crate::fuzz_targets::text(bytes).lines() {
        let _ = variable(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;

    #[test]
    fn a_variable_that_is_not_set_is_removed() {
        let image = [("A", "image"), ("B", "image")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let of = |words: &[&str]| {
            let env = environment(&run(words)).unwrap();
            let all: Vec<EnvVar> = env.left_of(&image).iter().chain(&env.set).cloned().collect();
            all.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of(&[]), "A=image B=image");
        assert_eq!(of(&["-e", "A"]), "B=image");
        assert_eq!(of(&["-e", "A=1", "-e", "A"]), "B=image");
        assert_eq!(of(&["-e", "A", "-e", "A=1"]), "A=image B=image A=1");
        assert_eq!(of(&["-e", "A="]), "A=image B=image A=");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "A=file\n").unwrap();
        assert_eq!(of(&["-e", "A=1", "-e", "A", "--env-file", file.to_str().unwrap()]), "B=image A=file");
    }
}
