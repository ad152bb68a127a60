//! The README is the manual's front: what it says of codes and options is what the program has.

use gpurun::{
    cli,
    config::{SETTINGS, Setting},
    error::Code,
};

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
fn everything_that_can_be_set_is_in_the_table_and_nothing_else() {
    let code = |name: &str| if name.is_empty() { String::new() } else { format!("`{name}` ") };
    let row = |setting: &Setting| {
        let ways =
            [setting.option, setting.variable, setting.key].map(|way| format!("| {}", code(way))).concat();
        let default =
            if setting.default.is_empty() { String::new() } else { format!("{} ", setting.default) };
        format!("{ways}| {default}| {} |", setting.meaning)
    };
    let told: Vec<String> = SETTINGS.iter().map(row).collect();
    let table = README.split("| option | variable | key in config.toml | default | |").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert_eq!(
        rows,
        told,
        "README.md's table and config::SETTINGS differ; this is what it should be:\n{}",
        told.join("\n")
    );
}

#[test]
fn every_option_that_can_be_set_exists() {
    let command = cli::command();
    let run = command.find_subcommand("run").unwrap();
    let known: Vec<&str> =
        run.get_arguments().chain(command.get_arguments()).filter_map(clap::Arg::get_long).collect();
    for option in SETTINGS.iter().filter_map(|setting| setting.option.strip_prefix("--")) {
        assert!(known.contains(&option), "config::SETTINGS names --{option}");
    }
}

#[test]
fn every_verb_and_every_option_that_is_named_exists() {
    let command = cli::command();
    for verb in command.get_subcommands() {
        let name = verb.get_name();
        assert!(
            name == "run" || README.contains(&format!("gpurun {name}")),
            "README.md does not show `gpurun {name}`"
        );
    }
    let known = options(&command);
    // Other programs have options of their own; the device plugin's are checked by its own tests.
    let (before, kubernetes) = README.split_once("\n## Kubernetes\n").unwrap();
    let (_, after) = kubernetes.split_once("\n## ").unwrap();
    let ours: String = before
        .lines()
        .chain(after.lines())
        .filter(|line| !["$ docker", "$ podman", "$ packaging"].iter().any(|other| line.starts_with(other)))
        .flat_map(|line| [line, "\n"])
        .collect();
    for word in ours.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')) {
        if let Some(option) =
            word.strip_prefix("--").filter(|o| o.starts_with(|c: char| c.is_ascii_lowercase()))
        {
            let elsewhere = [
                "keep",
                "help",
                "rm",
                "all",
                "device",
                "annotation",
                "nvccli",
                "userns",
                "fakeroot",
                "nvidia",
            ];
            assert!(
                known.iter().any(|known| known == option) || elsewhere.contains(&option),
                "README.md names --{option}, which does not exist"
            );
        }
    }
}
