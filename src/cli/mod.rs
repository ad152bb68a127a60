//! The command line: argument types, and the split between gpurun's and the container's words.
//!
//! `run`, `plan` and their short form are split at the image before clap parses them ([`line`]); clap alone parses every
//! other command. This module only parses; `commands` decides what an option means.
#![forbid(unsafe_code)]
// These comments are the help text, in which brackets mean "optional".
#![allow(rustdoc::broken_intra_doc_links)]

mod cdi;
pub mod environment;
mod foreign;
pub mod go_flags;
mod line;
mod message;
pub mod nvidia_container_cli;
pub mod nvidia_ctk;
mod run;
mod verbs;

pub use cdi::{
    Cdi, CdiDirectories, CdiDocument, CdiFormat, CdiGenerate, CdiMode, CdiRefresh, CdiTransform,
    CdiTransformRoot, RelativeTo,
};
pub use run::{Pulling, Resources, Run};
pub use verbs::path_without_kind;

use crate::error::{Code, Error, Result};
use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use environment::without_empty_variables;
use std::{ffi::OsString, path::PathBuf};

/// Starts GPU containers: no daemon, no other runtime, no other toolkit.
#[derive(Debug, Parser)]
#[command(
    name = "gpurun",
    version,
    after_help = "gpurun --gpus all IMAGE CMD… is short for gpurun run --gpus all IMAGE CMD…; an image without /, : or @ in its \
                  name needs the word run, or an option in front"
)]
pub struct Cli {
    /// Global options.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The names of the commands. A test compares them with the parser's.
pub const VERBS: [&str; 15] = [
    "run",
    "plan",
    "ls",
    "doctor",
    "inventory",
    "images",
    "pull",
    "rmi",
    "prune",
    "cdi",
    "configure",
    "config",
    "demo",
    "completions",
    "help",
];

/// The request of a command line.
#[derive(Debug)]
pub enum Request {
    /// Run a container.
    Run(Global, Box<Run>),
    /// Show what a container would get.
    Plan(Global, Box<Run>),
    /// Another command.
    Other(Box<Cli>),
    /// Help or the version.
    Print(String),
}

/// A parsed command line.
#[derive(Debug)]
pub struct Parsed {
    /// Whether failures are printed as JSON.
    pub json: bool,
    /// The request.
    pub request: Result<Request>,
    /// Sentences about words that were probably meant otherwise.
    pub notes: Vec<String>,
}

impl Parsed {
    fn new(json: bool, request: Result<Request>) -> Self {
        Self { json, request, notes: Vec::new() }
    }
}

/// A boolean as Docker reads it (Go's strconv.ParseBool).
pub fn is_true(text: &str) -> Option<bool> {
    line::boolean(text.as_bytes())
}

/// Reads the words of `gpurun`, its own name first.
pub fn parse(words: &[OsString]) -> Parsed {
    let words = words.get(1..).unwrap_or_default();
    // `-h` alone asks for help; before an image it is the host name.
    if words.len() == 1 && words[0] == "-h" {
        return other(words);
    }
    let command = run_command("run");
    let front = match line::front(&command, words) {
        Ok(front) => front,
        Err(error) => return Parsed::new(false, Err(error)),
    };
    let length = front.length;
    let next = words.get(length);
    let verb = next.and_then(|word| word.to_str()).unwrap_or_default();
    let short_form =
        front.has_own || front.escaped || front.unknown || (front.length == 0 && is_reference(next));
    match verb {
        "run" | "plan" if !front.has_own && !front.escaped && !front.unknown => {
            let command = if verb == "plan" { run_command("plan") } else { command };
            container(command, front, &words[length + 1..])
        }
        _ if front.has_own && !front.escaped && !front.unknown && VERBS.contains(&verb) => Parsed::new(
            asks_for_json(&front.options),
            Err(Error::new(Code::Usage, format!("the command {verb} stands behind options of gpurun run"))
                .fix(format!(
                    "write gpurun {verb} first; for an image of that name write gpurun run … {verb}"
                ))),
        ),
        _ if short_form || is_reference(next) => container(command, front, &words[length..]),
        "version" => Parsed::new(false, Ok(Request::Print(Cli::command().render_version()))),
        _ => other(words),
    }
}

/// Whether a word is certainly an image.
fn is_reference(word: Option<&OsString>) -> bool {
    word.is_some_and(|word| verbs::is_explicit_reference(&word.to_string_lossy()))
}

/// `run` and `plan`. `before` are options in front of `rest`; more may follow a command's name.
fn container(command: clap::Command, before: line::Front, mut rest: &[OsString]) -> Parsed {
    let mut options = before.options;
    let mut unknown = before.unknown;
    let mut notes = before.notes;
    if !(before.has_own || before.escaped || before.unknown) {
        match line::front(&command, rest) {
            Ok(front) => {
                options.extend(front.options);
                unknown |= front.unknown;
                notes.extend(front.notes);
                rest = if front.unknown { &[] } else { &rest[front.length..] };
            }
            Err(error) => return Parsed { notes, ..Parsed::new(asks_for_json(&options), Err(error)) },
        }
    } else if before.unknown {
        rest = &[];
    }
    let json = asks_for_json(&options);
    if let Some(error) = options.last().filter(|_| unknown).and_then(|word| line::respelt(&command, word)) {
        return Parsed { json, request: Err(error), notes };
    }
    let is_plan = command.get_name() == "plan";
    // No options follow, only the image and the container's words.
    let line =
        std::iter::once("gpurun".into()).chain(options).chain(["--".into()]).chain(rest.iter().cloned());
    let help = if is_plan { "gpurun plan --help" } else { "gpurun run --help" };
    let request = command
        .bin_name(if is_plan { "gpurun plan" } else { "gpurun run" })
        .try_get_matches_from(line)
        .map_err(|error| printed_or_refused(&error, help))
        .and_then(|matches| foreign::check(&matches).map(|()| matches).map_err(Err))
        .and_then(|matches| run_of(&matches).map_err(|error| printed_or_refused(&error, help)));
    let request = match request {
        Ok((global, run)) if is_plan => Ok(Request::Plan(global, Box::new(run))),
        Ok((global, run)) => Ok(Request::Run(global, Box::new(run))),
        Err(answer) => answer.map(Request::Print),
    };
    Parsed { json, request, notes }
}

fn run_of(matches: &ArgMatches) -> std::result::Result<(Global, Run), clap::Error> {
    Ok((Global::from_arg_matches(matches)?, Run::from_arg_matches(matches)?.without_empty_values()))
}

/// Every other command.
fn other(words: &[OsString]) -> Parsed {
    let json = asks_for_json(words);
    let line = std::iter::once("gpurun".into()).chain(words.iter().cloned());
    let command = command();
    let help = help_of(&command, words);
    let request = match command.try_get_matches_from(line) {
        Ok(matches) => match Cli::from_arg_matches(&matches) {
            Ok(cli) => known_place(&cli, &matches).map(|()| Request::Other(Box::new(cli))),
            Err(error) => printed_or_refused(&error, &help).map(Request::Print),
        },
        Err(error) => match (error.kind(), error.get(clap::error::ContextKind::InvalidSubcommand)) {
            // Only for gpurun itself: `cdi` and others have their own commands.
            (clap::error::ErrorKind::InvalidSubcommand, Some(clap::error::ContextValue::String(word)))
                if words
                    .iter()
                    .find(|word| !word.to_string_lossy().starts_with('-') && *word != "help")
                    .is_some_and(|w| w == word.as_str()) =>
            {
                Err(verbs::unknown(word, &message::suggested_commands(&error)))
            }
            _ => printed_or_refused(&error, &help).map(Request::Print),
        },
    };
    Parsed::new(json, request)
}

/// The command that prints the help of the subcommand in a line that cannot be parsed.
fn help_of(command: &clap::Command, words: &[OsString]) -> String {
    let (mut command, mut line) = (command, "gpurun".to_owned());
    for word in words.iter().filter_map(|word| word.to_str()).filter(|word| *word != "help") {
        if let Some(found) = command.find_subcommand(word) {
            line = format!("{line} {word}");
            command = found;
        }
    }
    format!("{line} --help")
}

/// Refuses `configure --config FILE`, which NVIDIA's toolkit has for the engine's file: gpurun's own option of that name is
/// accepted by every command, and the engine's usual file would be changed in place of FILE.
fn known_place(cli: &Cli, matches: &ArgMatches) -> Result<()> {
    let typed = |matches: &ArgMatches| {
        matches.try_contains_id("config").is_ok_and(|known| known)
            && matches.value_source("config") == Some(clap::parser::ValueSource::CommandLine)
    };
    let is_typed = typed(matches) || matches.subcommand().is_some_and(|(_, matches)| typed(matches));
    let (Command::Configure(_), Some(file), true) = (&cli.command, &cli.global.config, is_typed) else {
        return Ok(());
    };
    Err(Error::new(Code::Usage, "--config is the configuration of gpurun itself, not the engine's file").fix(
        format!(
            "did you mean --file {0}? To name gpurun's own configuration write GPURUN_CONFIG={0} gpurun configure …",
            file.display()
        ),
    ))
}

/// Reads another program's words with clap alone. `Err` within the result is help that was asked for.
///
/// # Errors
/// [`Code::Usage`], with what the parser knows.
pub fn parse_with<P: Parser>(words: &[OsString], help: &str) -> Result<std::result::Result<P, String>> {
    answered(environment::parse(words.iter().cloned()), help)
}

/// Parses the command line of another program in the grammar of Go's `flag`.
///
/// # Errors
/// [`Code::Usage`], with what the parser knows.
pub fn parse_as_go<P: Parser>(words: &[OsString], help: &str) -> Result<std::result::Result<P, String>> {
    answered(go_flags::parse(words.iter().cloned()), help)
}

fn answered<P>(
    parsed: std::result::Result<P, clap::Error>,
    help: &str,
) -> Result<std::result::Result<P, String>> {
    match parsed {
        Ok(parsed) => Ok(Ok(parsed)),
        Err(error) => printed_or_refused(&error, help).map(Err),
    }
}

/// Help goes to standard output; everything else is an error.
fn printed_or_refused(error: &clap::Error, help: &str) -> Result<String> {
    if error.use_stderr() {
        return Err(message::explain(error, help));
    }
    Ok(error.render().to_string())
}

fn asks_for_json(words: &[OsString]) -> bool {
    words.iter().take_while(|word| *word != "--").any(|word| word == "--json")
}

/// The parser of gpurun with all of its commands, for help and completions.
pub fn command() -> clap::Command {
    // In front of the others, as in VERBS.
    without_empty_variables(Cli::command())
        .mut_subcommands(|command| command.display_order(2))
        .subcommand(run_command("run").display_order(0))
        .subcommand(run_command("plan").display_order(1))
}

/// The parser of `run` or `plan`: options, IMAGE and COMMAND.
pub fn run_command(name: &'static str) -> clap::Command {
    let command = clap::Command::new(name)
        .after_help("Docker's and Podman's other options are accepted where they change nothing, or refused with what to do instead.")
        .args_override_self(true)
        // -h is the host name, as with Docker.
        .disable_help_flag(true)
        .arg(Arg::new("help").long("help").action(ArgAction::Help).help("Print help"))
        // `--version` prints it.
        .display_name("gpurun")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_version_flag(true)
        .arg(Arg::new("version").short('V').long("version").action(ArgAction::Version).hide(true));
    // The comments of these structures would become the command's description, which is therefore set last.
    let command = foreign::add(Run::augment_args(Global::augment_args(command))).about(match name {
        "plan" => "Show what a container would get, without starting it",
        _ => "Run a command in a new container",
    });
    without_empty_variables(command).mut_args(|arg| {
        // pflag: an option's value may begin with a dash.
        if arg.get_action().takes_values() && !arg.is_positional() {
            arg.allow_hyphen_values(true)
        } else {
            arg
        }
    })
}

/// Options of every verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Root of the driver's files (`/`, `/run/nvidia/driver`)
    #[arg(long, global = true, env = "GPURUN_DRIVER_ROOT", value_name = "DIR", help_heading = "Host")]
    pub driver_root: Option<PathBuf>,
    /// Root of the device nodes [default: the driver root]
    #[arg(long, global = true, env = "GPURUN_DEV_ROOT", value_name = "DIR", help_heading = "Host")]
    pub dev_root: Option<PathBuf>,
    /// Use a simulated host (see gpurun demo --keep) instead of the real one
    #[arg(long, global = true, env = "GPURUN_SIMULATED_HOST", value_name = "DIR", help_heading = "Host")]
    pub simulated_host: Option<PathBuf>,
    /// Configuration file [default: /etc/gpurun/config.toml, if it exists]
    #[arg(long, global = true, env = "GPURUN_CONFIG", value_name = "FILE", help_heading = "Host")]
    pub config: Option<PathBuf>,
    /// Log level for stderr: error, warn, info, debug, trace
    #[arg(
        long,
        global = true,
        env = "GPURUN_LOG",
        default_value = "warn",
        value_name = "LEVEL",
        help_heading = "Host"
    )]
    pub log: tracing::level_filters::LevelFilter,
    /// Log format
    #[arg(long, global = true, value_enum, default_value = "text", help_heading = "Host")]
    pub log_format: LogFormat,
    /// Print results and errors as JSON
    #[arg(long, global = true, help_heading = "Host")]
    pub json: bool,
}

/// `--log-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the GPUs
    Ls,
    /// Check the host; report problems and fixes
    Doctor(CdiDirectories),
    /// Print everything gpurun knows of the host as JSON (a bug report; a fixture)
    Inventory,
    /// List the images that are unpacked in the store
    Images {
        /// Verify config digests and that every layer is present
        #[arg(long, conflicts_with = "usage")]
        verify: bool,
        /// Show disk usage of each image
        #[arg(long)]
        usage: bool,
        /// Print only ids
        #[arg(short = 'q', long, conflicts_with_all = ["verify", "usage"])]
        quiet: bool,
    },
    /// Fetch images from a registry, or unpack them from an archive, into the store
    Pull {
        /// Options of the pull.
        #[command(flatten)]
        pulling: Pulling,
        /// Show no progress
        #[arg(short = 'q', long)]
        quiet: bool,
        /// NAME[:TAG][@DIGEST], docker://… or any other image
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove images from the store, and the layers that no other image needs
    Rmi {
        /// Docker's and Podman's option, which changes nothing
        #[arg(short = 'f', long, hide = true)]
        force: bool,
        /// Names as in `gpurun images`
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove the layers that no image in the store needs
    Prune {
        /// Docker's and Podman's option, which changes nothing: no question is asked
        #[arg(short = 'f', long, hide = true)]
        force: bool,
    },
    /// Write and check CDI specs for docker, podman, containerd and CRI-O
    #[command(subcommand)]
    Cdi(Cdi),
    /// Register gpurun with a container engine, or unregister it
    Configure(Configure),
    /// Print every configuration key with its value, source and meaning
    Config,
    /// Run a GPU container on this machine and print what it sees
    Demo(Demo),
    /// Print completions for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
}

/// `gpurun configure`
#[derive(Debug, Args)]
pub struct Configure {
    /// Container engine
    #[arg(value_enum)]
    pub engine: Engine,
    /// Name of the runtime: docker run --runtime NAME
    #[arg(long, default_value = "gpurun", value_name = "NAME")]
    pub name: String,
    /// Path of gpurun-runtime [default: beside gpurun, or in PATH]
    #[arg(long, value_name = "FILE")]
    pub path: Option<PathBuf>,
    /// Configuration file of the engine [default: the file that it reads]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Make gpurun the engine's default runtime
    #[arg(long)]
    pub set_as_default: bool,
    /// Also enable CDI in the engine
    #[arg(long)]
    pub cdi: bool,
    /// For podman and crio: install a hook in hooks.d instead of a runtime
    #[arg(long, conflicts_with_all = ["set_as_default", "cdi"])]
    pub hook: bool,
    /// Remove gpurun from the engine's configuration (with --cdi: also disable CDI)
    #[arg(long)]
    pub remove: bool,
    /// Print the changes without writing them
    #[arg(long)]
    pub dry_run: bool,
}

/// The supported container engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// dockerd
    Docker,
    /// containerd, as Kubernetes uses it
    Containerd,
    /// CRI-O
    Crio,
    /// Podman
    Podman,
}

/// `gpurun demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Simulate this host even if the machine has a driver: 8xh100, a100-mig, t4, one-lost-gpu, old-driver, slow-init
    #[arg(long, value_name = "NAME")]
    pub simulate: Option<String>,
    /// Write the simulated host to this directory, print how to use it, and keep it
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

#[cfg(test)]
mod tests;
