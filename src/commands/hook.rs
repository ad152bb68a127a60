//! `nvidia-container-runtime-hook`: the OCI prestart hook that dockerd adds for `docker run --gpus`, and that hooks.d names for
//! Podman and CRI-O. It gives a container that exists, and does not run yet, the GPUs that it asks for.

use super::{engine, runtime};
use crate::{
    apply::bundle::Bundle,
    error::{Code, Error, OrFail, Result},
    formats::oci::State,
    out, output,
};
use rustix::fs::Mode;
use std::{ffi::OsString, io::Read, path::PathBuf};

/// The names under which gpurun is this program; engines look for them in PATH.
pub const NAMES: [&str; 2] = ["nvidia-container-runtime-hook", "nvidia-container-toolkit"];

const USAGE: &str = "Usage of nvidia-container-runtime-hook:
  -config FILE   the configuration file
  -debug         say what is done
  -version       print the version

Commands:
  prestart       give a container its GPUs; its state comes on standard input
  poststart      nothing
  poststop       nothing";

/// Returns the exit code and prints the reason to standard error, which runc and crun pass on.
pub fn run(words: &[OsString]) -> u8 {
    let result = match Command::parse(words) {
        Some(Command::Prestart { config, debug }) => prestart(config, debug),
        Some(Command::Nothing) => Ok(()),
        Some(Command::Version) => out!("gpurun {}", env!("CARGO_PKG_VERSION")).and_then(|()| output::flush()),
        None => {
            output::report(&USAGE);
            return 2;
        }
    };
    result.map_or_else(
        |error| {
            // runc's exit code for every failure, except of standard output.
            if matches!(error.code(), Code::Output | Code::OutputClosed) {
                output::fail(&error, false)
            } else {
                output::report(&error.for_engine());
                1
            }
        },
        |()| 0,
    )
}

/// What the command line says.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Prestart { config: Option<PathBuf>, debug: bool },
    Nothing,
    Version,
}

impl Command {
    /// Options stand before the verb, with one dash or two, as in Go's programs.
    fn parse(words: &[OsString]) -> Option<Self> {
        let (mut config, mut debug) = (None, false);
        let mut words = words.iter();
        loop {
            let word = words.next()?;
            let Some((name, value)) = runtime::args::option(word) else {
                return match word.to_str()? {
                    "prestart" => Some(Self::Prestart { config, debug }),
                    "poststart" | "poststop" => Some(Self::Nothing),
                    _ => None,
                };
            };
            match (name, value) {
                ("config", Some(file)) => config = Some(file.into()),
                ("config", None) => config = Some(words.next()?.into()),
                ("debug", value) => debug = value.is_none_or(|value| value == "true"),
                ("version", None) => return Some(Self::Version),
                _ => return None,
            }
        }
    }
}

/// runc's and crun's have some hundred bytes, and the annotations, which the kernel does not bound.
const MAX_STATE: u64 = 16 << 20;

fn prestart(config: Option<PathBuf>, debug: bool) -> Result<()> {
    // crun runs hooks without a umask, and other users must not be able to write to our files on the host.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let state = state(std::io::stdin().lock())?;
    let context = engine::context(config)?;
    let (bundle, spec) = Bundle::open(&state.bundle, None).map_err(|error| {
        error.fix("start the container again, because its engine makes the bundle: `docker start NAME`")
    })?;
    let Some(injection) = engine::injection(&spec, &context)? else { return Ok(()) };
    if debug {
        output::report(&format_args!(
            "gpurun: {} device nodes, {} files",
            injection.devices.len(),
            injection.mounts.len()
        ));
        injection.warnings.iter().for_each(|warning| output::report(&format_args!("gpurun: {warning}")));
    }
    let root = bundle.root(&spec)?;
    let container = engine::Container { pid: state.process()?, root, may_be_ours: false, restrict: true };
    // runc and crun show a hook's standard error only if the hook fails, and log it on request.
    for note in engine::give(&container, &spec, &injection, &context)? {
        output::report(&format_args!("gpurun: {note}"));
    }
    Ok(())
}

fn state(input: impl Read) -> Result<State> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_STATE + 1).read_to_end(&mut bytes);
    read.or_fail(Code::Bundle, || "the container's state cannot be read from standard input")?;
    if bytes.len() as u64 > MAX_STATE {
        return Err(Error::new(Code::Bundle, "the container's state on standard input has no end"));
    }
    let state = State::parse(&bytes)?;
    if state.pid <= 0 {
        // As for createRuntime hooks, which may come before it.
        return Err(Error::new(Code::Bundle, "the state on standard input is not a container's")
            .cause("it has no pid"));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_read_as_the_peer_reads_it() {
        let prestart = |config: Option<&str>, debug| {
            Some(Command::Prestart { config: config.map(PathBuf::from), debug })
        };
        for (line, meant) in [
            ("prestart", prestart(None, false)),
            ("-config /c --debug prestart", prestart(Some("/c"), true)),
            ("--config=/c prestart", prestart(Some("/c"), false)),
            ("-config=/c -debug=false prestart more", prestart(Some("/c"), false)),
            ("poststart", Some(Command::Nothing)),
            ("-debug poststop", Some(Command::Nothing)),
            ("-version", Some(Command::Version)),
            ("--version prestart", Some(Command::Version)),
            ("", None),
            ("--config", None),
            ("--config /c", None),
            ("-help", None),
            ("createRuntime", None),
            ("--unknown prestart", None),
        ] {
            let words: Vec<_> = line.split_whitespace().map(OsString::from).collect();
            assert_eq!(Command::parse(&words), meant, "{line}");
        }
    }

    #[test]
    fn a_state_without_end_or_without_a_process_is_refused() {
        for text in [r#"{"pid":0,"bundle":"/x"}"#, r#"{"pid":-1,"bundle":"/x"}"#, r#"{"bundle":"/x"}"#] {
            assert_eq!(state(text.as_bytes()).unwrap_err().code(), Code::Bundle, "{text}");
        }
        assert_eq!(state(&br#"{"pid":1,"bundle":"/x"}"#[..]).unwrap().pid, 1);
        assert_eq!(state(std::io::repeat(b' ')).unwrap_err().code(), Code::Bundle);
    }
}
