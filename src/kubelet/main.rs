//! Parse, serve, print a failure, return the exit code.
#![forbid(unsafe_code)]

use gpurun::{
    cli::{LogFormat, parse_as_go},
    error::{Code, OrFail, Result},
    output,
};
use gpurun_device_plugin::{config::Cli, probe, serve};
use std::{ffi::OsString, process::ExitCode};

fn main() -> ExitCode {
    gpurun::sys::process::normalize();
    let words: Vec<OsString> = std::env::args_os().collect();
    let cli = match parse_as_go::<Cli>(&words, "gpurun-device-plugin --help") {
        Ok(Ok(cli)) => cli,
        Ok(Err(help)) => {
            return output::write(help.as_bytes())
                .map_or_else(|error| output::fail(&error, false).into(), |()| ExitCode::SUCCESS);
        }
        Err(error) => return output::fail(&error, words.iter().any(|word| word == "--json")).into(),
    };
    let json = cli.global.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::fail(&error, json).into(),
    }
}

fn run(cli: Cli) -> Result<()> {
    if let Some(question) = cli.flags.probe {
        return probe::ask(cli.flags.probe_socket.as_deref(), question);
    }
    let log = tracing_subscriber::fmt()
        .with_max_level(cli.global.log)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .with_target(false)
        .without_time();
    match cli.global.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.or_fail(Code::Internal, || "the kernel has no descriptors left")?;
    let result = runtime.block_on(serve(cli));
    // The inventory's thread waits for the kernel, and ends with the process.
    runtime.shutdown_background();
    result
}
