//! Parse, dispatch (also on the name it is called by), print a failure, return the exit code.
#![forbid(unsafe_code)]

use gpurun::{
    apply::container,
    cli::{
        self, Cli, Command, Global, LogFormat, Parsed, Request, nvidia_container_cli::NvidiaContainerCli,
        nvidia_ctk::NvidiaCtk,
    },
    commands::{self, Context},
    error::{Error, Result},
    output,
};
use std::{
    ffi::{CString, OsString},
    os::unix::ffi::OsStrExt,
    path::Path,
    process::ExitCode,
};
use tracing::level_filters::LevelFilter;

fn main() -> ExitCode {
    gpurun::sys::process::normalize();
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
    let mut json = false;
    let result = match called.as_bytes() {
        name if name == container::INIT_NAME.to_bytes() => container::init::run(&words(&arguments)),
        b"nvidia-ctk" => nvidia_ctk(&arguments),
        b"nvidia-container-cli" => nvidia_container_cli(&arguments),
        _ => {
            let Parsed { json: wanted, request, notes } = cli::parse(&arguments);
            json = wanted;
            match request {
                Ok(request) => dispatch(request, &notes),
                Err(error) => Err(notes.iter().fold(error, Error::cause)),
            }
        }
    };
    let code = result.and_then(|code| output::flush().map(|()| code));
    ExitCode::from(code.unwrap_or_else(|error| output::fail(&error, json)))
}

/// The words behind the name, as execve(2) takes them.
fn words(arguments: &[OsString]) -> Vec<CString> {
    arguments.iter().skip(1).filter_map(|word| CString::new(word.as_bytes()).ok()).collect()
}

/// Requested help goes to standard output.
fn print(text: &str) -> Result<u8> {
    output::write(text.as_bytes()).map(|()| 0)
}

fn nvidia_ctk(arguments: &[OsString]) -> Result<u8> {
    match cli::parse_as_go::<NvidiaCtk>(arguments, "nvidia-ctk --help")? {
        Ok(ctk) => {
            log(ctk.log_level(), LogFormat::Text);
            commands::nvidia_ctk::run(&ctk)
        }
        Err(help) => print(&help),
    }
}

fn nvidia_container_cli(arguments: &[OsString]) -> Result<u8> {
    match cli::parse_with::<NvidiaContainerCli>(arguments, "nvidia-container-cli --help")? {
        Ok(cli) => {
            log(LevelFilter::WARN, LogFormat::Text);
            commands::nvidia_container_cli::run(&cli)
        }
        Err(help) => print(&help),
    }
}

fn dispatch(request: Request, notes: &[String]) -> Result<u8> {
    let start = |global: &Global| {
        log(global.log, global.log_format);
        for note in notes {
            tracing::warn!("{note}");
        }
        Context::new(global)
    };
    match request {
        Request::Print(text) => print(&text),
        Request::Run(global, args) => commands::run::run(&start(&global)?, &args),
        Request::Plan(global, args) => commands::plan::run(&start(&global)?, &args),
        Request::Other(cli) => other(*cli),
    }
}

fn other(cli: Cli) -> Result<u8> {
    log(cli.global.log, cli.global.log_format);
    let context = || Context::new(&cli.global);
    match cli.command {
        Command::Ls => commands::ls::run(&context()?),
        Command::Doctor(args) => commands::doctor::run(&context()?, &args.directories),
        Command::Inventory => commands::inventory::run(&context()?),
        Command::Images { verify: true, .. } => commands::images::verify(&context()?),
        Command::Images { quiet: true, .. } => commands::images::ids(&context()?),
        Command::Images { usage, .. } => commands::images::list(&context()?, usage),
        Command::Pull { pulling, quiet, images } => {
            commands::images::pull(&context()?, &pulling, quiet, &images)
        }
        Command::Rmi { images, .. } => commands::images::remove(&context()?, &images),
        Command::Prune { .. } => commands::images::prune(&context()?),
        Command::Cdi(command) => commands::cdi::run(&context()?, &command),
        Command::Demo(args) => commands::demo::run(context()?, &args),
        Command::Configure(args) => commands::configure::run(&args),
        Command::Config => commands::config::run(&cli.global),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut cli::command(), "gpurun", &mut script);
            output::write(&script).map(|()| 0)
        }
    }
}

fn log(level: LevelFilter, format: LogFormat) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .with_target(false)
        .without_time();
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
