//! Parse, serve, print a failure, return the exit code.
#![forbid(unsafe_code)]

use clap::Parser;
use gpurun::{
    cli::LogFormat,
    error::{Code, OrFail, Result},
    output,
};
use gpurun_device_plugin::{config::Cli, serve};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.global.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::fail(&error, json).into(),
    }
}

fn run(cli: Cli) -> Result<()> {
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
