//! Environment variables of all programs. An empty variable counts as unset, because manifests and unit files write `NAME=`
//! for values that were not chosen.

use clap::{Command, Parser};
use std::ffi::OsString;

/// The value of a variable that is set and not empty.
pub fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Parses a command line; options that are not in it are taken from their variables.
///
/// # Errors
/// clap's errors, which include the output of `--help` and `--version`.
pub fn parse<P: Parser>(arguments: impl IntoIterator<Item = OsString>) -> Result<P, clap::Error> {
    let mut command = without_empty_variables(P::command());
    let mut matches = command.try_get_matches_from_mut(arguments)?;
    P::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// Removes the environment variable of each option, including subcommands, if the variable is empty.
pub(super) fn without_empty_variables(command: Command) -> Command {
    let command = command.mut_args(|argument| {
        let is_empty = argument.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
        if is_empty { argument.env(None::<&'static str>) } else { argument }
    });
    command.mut_subcommands(without_empty_variables)
}
