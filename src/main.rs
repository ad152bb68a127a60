//! Parse, dispatch (also on the name it is called by), print a failure, return the exit code.
#![forbid(unsafe_code)]

use clap::{CommandFactory, Parser};
use gpurun::{
    apply::container,
    cli::{
        Cli, Command, Global, LogFormat, VERBS, environment, go_flags,
        nvidia_container_cli::NvidiaContainerCli, nvidia_ctk::NvidiaCtk,
    },
    commands::{self, Context},
    error::{Code, Error, Result},
};
use std::{
    ffi::{CString, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
    process::ExitCode,
};
use tracing::level_filters::LevelFilter;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let called = arguments
        .first()
        .map_or("", |name| Path::new(name).file_name().and_then(|n| n.to_str()).unwrap_or(""));
    if commands::runtime::NAMES.contains(&called) {
        return ExitCode::from(commands::runtime::run(arguments.get(1..).unwrap_or_default()));
    }
    if commands::hook::NAMES.contains(&called) {
        return ExitCode::from(commands::hook::run(arguments.get(1..).unwrap_or_default()));
    }
    let json = arguments.iter().take_while(|a| *a != "--").any(|a| a == "--json");
    let result = match called.as_bytes() {
        name if name == container::INIT_NAME.to_bytes() => container::init::run(&words(&arguments)),
        name if name == container::HANDOVER_NAME.to_bytes() => container::handover::run(&words(&arguments)),
        b"nvidia-ctk" => nvidia_ctk(arguments),
        b"nvidia-container-cli" => nvidia_container_cli(arguments),
        _ => dispatch(with_verb(arguments)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            if json {
                eprintln!("{}", error.to_json());
            } else {
                eprintln!("{error}");
            }
            ExitCode::from(error.code().exit_code())
        }
    }
}

/// The words behind the name, as execve(2) takes them.
fn words(arguments: &[OsString]) -> Vec<CString> {
    arguments.iter().skip(1).filter_map(|word| CString::new(word.as_bytes()).ok()).collect()
}

/// `gpurun --gpus all IMAGE` is `gpurun run --gpus all IMAGE`: where no verb stands first, it is `run`.
fn with_verb(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let is_verb = |word: &OsString| {
        word.to_str().is_some_and(|w| VERBS.contains(&w) || matches!(w, "-h" | "--help" | "-V" | "--version"))
    };
    // Options of every verb may stand before it; those that take a value have it behind "=" or as the next word.
    let mut at = 1;
    while let Some(word) = arguments.get(at).and_then(|w| w.to_str()) {
        match word {
            _ if Global::HAS_VALUE.contains(&word) => at += 2,
            "--json" => at += 1,
            _ if Global::HAS_VALUE
                .iter()
                .any(|option| word.strip_prefix(option).is_some_and(|rest| rest.starts_with('='))) =>
            {
                at += 1;
            }
            _ => break,
        }
    }
    if arguments.get(at).is_some_and(|word| !is_verb(word)) {
        arguments.insert(at, OsString::from_vec(b"run".to_vec()));
    }
    arguments
}

/// What was typed; `None` where that was a question for help, which is answered.
fn parsed<P: Parser>(parsed: clap::error::Result<P>, help: &str) -> Result<Option<P>> {
    match parsed {
        Ok(parsed) => Ok(Some(parsed)),
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            Ok(None)
        }
        Err(error) => {
            let text = error.render().to_string();
            let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            Err(Error::new(Code::Usage, first).fix(help))
        }
    }
}

fn nvidia_ctk(arguments: Vec<OsString>) -> Result<u8> {
    let Some(ctk) = parsed::<NvidiaCtk>(go_flags::parse(arguments), "nvidia-ctk --help")? else {
        return Ok(0);
    };
    log(ctk.log_level(), LogFormat::Text);
    commands::nvidia_ctk::run(&ctk)
}

fn nvidia_container_cli(arguments: Vec<OsString>) -> Result<u8> {
    let help = "nvidia-container-cli --help, nvidia-container-cli configure --help";
    let Some(cli) = parsed::<NvidiaContainerCli>(environment::parse(arguments), help)? else { return Ok(0) };
    log(LevelFilter::WARN, LogFormat::Text);
    commands::nvidia_container_cli::run(&cli)
}

fn dispatch(arguments: Vec<OsString>) -> Result<u8> {
    let Some(cli) = parsed::<Cli>(environment::parse(arguments), "gpurun --help, gpurun run --help")? else {
        return Ok(0);
    };
    log(cli.global.log, cli.global.log_format);
    let context = || Context::new(&cli.global);
    match cli.command {
        Command::Run(args) => commands::run::run(&context()?, &args),
        Command::Plan(args) => commands::plan::run(&context()?, &args),
        Command::Ls => commands::ls::run(&context()?),
        Command::Doctor(args) => commands::doctor::run(&context()?, &args.directories),
        Command::Inventory => commands::inventory::run(&context()?),
        Command::Images { verify: true, .. } => commands::images::verify(&context()?),
        Command::Images { usage, .. } => commands::images::list(&context()?, usage),
        Command::Pull { pulling, images } => commands::images::pull(&context()?, &pulling, &images),
        Command::Rmi { images } => commands::images::remove(&context()?, &images),
        Command::Prune => commands::images::prune(&context()?),
        Command::Cdi(command) => commands::cdi::run(&context()?, &command),
        Command::Demo(args) => commands::demo::run(context()?, &args),
        Command::Configure(args) => commands::configure::run(&args),
        Command::Config => commands::config::run(&cli.global),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "gpurun", &mut std::io::stdout());
            Ok(0)
        }
    }
}

fn log(level: LevelFilter, format: LogFormat) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time();
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
