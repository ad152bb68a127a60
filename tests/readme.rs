//! Compares the codes, settings, commands and options in README.md and the pages in `packaging/doc` with the code that owns
//! them.

use gpurun::{
    cli,
    config::{SETTINGS, Setting},
    error::Code,
};
use std::{fs, path::Path};

/// The largest README in bytes: it is a front page, and longer text belongs on a separate page.
const README_BYTES: usize = 9 * 1024;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// README.md and every page, with its name.
fn pages() -> Vec<(String, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/doc");
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| format!("packaging/doc/{}", entry.unwrap().file_name().to_string_lossy()))
        .collect();
    names.sort();
    names.insert(0, "README.md".into());
    names.into_iter().map(|name| (name.clone(), read(&name))).collect()
}

#[test]
fn the_readme_is_a_front_page() {
    let bytes = read("README.md").len();
    assert!(bytes <= README_BYTES, "README.md has {bytes} bytes, more than {README_BYTES}");
}

#[test]
fn every_error_code_is_explained() {
    let page = read("packaging/doc/errors.md");
    for code in Code::ALL {
        let row = format!("| {code} | {} | {} | {} |", code.exit_code(), code.meaning(), code.fix());
        assert!(page.contains(&row), "packaging/doc/errors.md lacks the row\n{row}");
    }
}

#[test]
fn every_setting_is_in_the_table_and_nothing_else() {
    let code = |name: &str| if name.is_empty() { String::new() } else { format!("`{name}` ") };
    let row = |setting: &Setting| {
        let ways =
            [setting.option, setting.variable, setting.key].map(|way| format!("| {}", code(way))).concat();
        let default =
            if setting.default.is_empty() { String::new() } else { format!("{} ", setting.default) };
        format!("{ways}| {default}| {} |", setting.meaning)
    };
    let expected: Vec<String> = SETTINGS.iter().map(row).collect();
    let page = read("packaging/doc/configuration.md");
    let table = page.split("| option | variable | key in config.toml | default | |").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert_eq!(
        rows,
        expected,
        "packaging/doc/configuration.md and config::SETTINGS differ; the table should be:\n{}",
        expected.join("\n")
    );
}

#[test]
fn every_option_of_a_setting_exists() {
    let command = cli::command();
    let run = command.find_subcommand("run").unwrap();
    let known: Vec<&str> =
        run.get_arguments().chain(command.get_arguments()).filter_map(clap::Arg::get_long).collect();
    for option in SETTINGS.iter().filter_map(|setting| setting.option.strip_prefix("--")) {
        assert!(known.contains(&option), "config::SETTINGS names --{option}");
    }
}

#[test]
fn every_command_is_shown() {
    let all: String = pages().into_iter().map(|(_, text)| text).collect();
    for command in cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
        let shown = format!("gpurun {}", command.get_name());
        assert!(all.contains(&shown), "no page shows `{shown}`");
    }
}

/// The options of a command and of every command below it.
fn options(command: &clap::Command) -> Vec<String> {
    let own = command.get_arguments().flat_map(|argument| {
        let aliases = argument.get_all_aliases().unwrap_or_default();
        argument.get_long().into_iter().chain(aliases).map(String::from).collect::<Vec<_>>()
    });
    own.chain(command.get_subcommands().flat_map(options)).collect()
}

#[test]
fn every_option_on_a_command_line_of_gpurun_exists() {
    let known = options(&cli::command());
    for (name, text) in pages() {
        for line in text.lines().filter_map(|line| line.strip_prefix("$ gpurun ")) {
            let line = line.split(" #").next().unwrap_or_default();
            for word in line.split_whitespace() {
                let Some(option) = word.strip_prefix("--").filter(|option| !option.is_empty()) else {
                    continue;
                };
                let option = option.split('=').next().unwrap_or_default();
                // Words after the image are the command's: `python3 train.py --epochs 3`.
                let of_command = line.split_once("python3").is_some_and(|(_, after)| after.contains(word));
                assert!(
                    of_command || known.iter().any(|known| known == option),
                    "{name} shows --{option}, which does not exist: {line}"
                );
            }
        }
    }
}

#[test]
fn every_link_leads_to_a_file() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in pages() {
        let directory = project.join(&name).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if !file.is_empty() && !file.contains("://") {
                assert!(directory.join(file).exists(), "{name} links to {file}, which does not exist");
            }
        }
    }
}
