//! The hooks that a CDI document names, as one program: those of NVIDIA's nvidia-cdi-hook, with its flags, and `all`, which is
//! what gpurun's own documents need, in one process.
//!
//! A low-level runtime runs them as `createContainer`: in the container's namespaces, before the root is changed, so that `/` is the
//! host's still. They run with the runtime's rights over files that an image made: nothing of the image's is executed or
//! loaded, no environment is read, and every path is resolved beneath a descriptor of the container's root.
#![forbid(unsafe_code)]

mod container;
mod hooks;
mod words;

use gpurun::{out, output};
use std::process::ExitCode;
use words::Words;

fn main() -> ExitCode {
    gpurun::sys::process::normalize();
    let words = Words::of(std::env::args_os());
    match words.hook.as_deref() {
        Some("--version" | "-v") => {
            let written = out!("gpurun-hook {}", env!("CARGO_PKG_VERSION")).and_then(|()| output::flush());
            return written.map_or_else(|error| output::fail(&error, false).into(), |()| ExitCode::SUCCESS);
        }
        // In documents of NVIDIA's toolkit in the place of a hook that is not wanted.
        Some("noop") => return ExitCode::SUCCESS,
        Some(name) => {
            if let Some(hook) = hooks::named(name) {
                // What we make is for every user of the container to read.
                rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
                return match container::Container::of_state(words.last("container-spec"))
                    .and_then(|container| hook(&container, &words))
                {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => {
                        output::report(&error.for_engine());
                        ExitCode::FAILURE
                    }
                };
            }
            // A document may be newer than this program, and a container without the newest is better than none.
            output::report(&format_args!("gpurun-hook: the hook {name:?} is unknown and ignored"));
        }
        None => output::report(&"gpurun-hook: no hook is named, so none runs"),
    }
    ExitCode::SUCCESS
}
