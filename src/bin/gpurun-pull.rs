//! `gpurun-pull` reads from stdin what gpurun wants of a registry, puts it into the store, and prints nothing, or the failure
//! as an object. It is no program for people: `gpurun pull` is.
#![forbid(unsafe_code)]

use gpurun::{
    error::{Code, OrFail, Result},
    image::registry::{Order, fetch},
};
use std::{io::Write, process::ExitCode};

fn main() -> ExitCode {
    gpurun::sys::process::normalize();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Who would read it may be gone.
            let _ = writeln!(std::io::stdout(), "{}", error.to_json());
            error.code().exit_code().into()
        }
    }
}

fn run() -> Result<()> {
    // Who stops gpurun with a signal of its own stops this, too: a layer that nobody waits for is not fetched to its end.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .or_fail(Code::Internal, || "prctl")?;
    let order: Order = serde_json::from_reader(std::io::stdin().lock())
        .or_fail(Code::Usage, || "gpurun-pull is run by gpurun; `gpurun pull IMAGE` fetches an image")?;
    fetch::carry_out(&order)
}
