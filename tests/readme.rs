//! The README is the manual's front: what it says of codes and options is what the program has.

use clap::CommandFactory;
use gpurun::{cli::Cli, error::Code};

const README: &str = include_str!("../README.md");

#[test]
fn every_error_code_is_explained() {
    for code in Code::ALL {
        let row = format!("| {code} | {} | {} |", code.exit_code(), code.meaning());
        assert!(README.contains(&row), "README.md lacks the row\n{row}");
    }
}

/// The options of a command and of every command below it.
fn options(command: &clap::Command) -> Vec<String> {
    let own = command.get_arguments().filter_map(|argument| argument.get_long().map(String::from));
    own.chain(command.get_subcommands().flat_map(options)).collect()
}

#[test]
fn every_verb_and_every_option_that_is_named_exists() {
    let command = Cli::command();
    for verb in command.get_subcommands() {
        let name = verb.get_name();
        assert!(
            name == "run" || README.contains(&format!("gpurun {name}")),
            "README.md does not show `gpurun {name}`"
        );
    }
    let known = options(&command);
    // Other programs have options of their own.
    let ours: String = README
        .lines()
        .filter(|line| !["$ docker", "$ podman"].iter().any(|other| line.starts_with(other)))
        .flat_map(|line| [line, "\n"])
        .collect();
    for word in ours.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')) {
        if let Some(option) =
            word.strip_prefix("--").filter(|o| o.starts_with(|c: char| c.is_ascii_lowercase()))
        {
            let elsewhere = ["keep", "help", "rm", "all"];
            assert!(
                known.iter().any(|known| known == option) || elsewhere.contains(&option),
                "README.md names --{option}, which does not exist"
            );
        }
    }
}
