//! Standard output and standard error: all output of gpurun's programs goes through this module.
//!
//! A closed pipe ends a program silently with exit code 141, as if SIGPIPE had ended it (`gpurun config | head -1`). A full
//! disk or another failure of standard output is one error with a code. A failure of standard error is ignored: there is no
//! other place to report it, and the exit code stays what it is.

use crate::error::{Code, Error, Result};
use std::{
    fmt,
    io::{self, Write},
};

/// Writes to standard output.
///
/// # Errors
/// [`Code::OutputClosed`] if the reader has closed the pipe, which `main` does not report; [`Code::Output`] if the bytes
/// cannot be written.
pub fn write(bytes: &[u8]) -> Result<()> {
    written(io::stdout().lock().write_all(bytes))
}

/// Writes a line to standard output; the macro `out!` calls it.
///
/// # Errors
/// As [`write`].
pub fn write_line(text: fmt::Arguments<'_>) -> Result<()> {
    write(format!("{text}\n").as_bytes())
}

/// Flushes standard output. A program calls it before it exits or starts another program.
///
/// # Errors
/// As [`write`].
pub fn flush() -> Result<()> {
    written(io::stdout().lock().flush())
}

fn written(result: io::Result<()>) -> Result<()> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Error::new(Code::OutputClosed, "the reader of standard output is gone")
            .fix("read the output to its end (`gpurun … | cat`), or ignore exit code 141"),
        _ => Error::new(Code::Output, "standard output cannot be written")
            .cause(error)
            .fix("free space where it is redirected to, or redirect it elsewhere: > FILE"),
    })
}

/// Writes a message to standard error.
pub fn report(message: &dyn fmt::Display) {
    let line = format!("{message}\n");
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// Reports a failure, as JSON if requested, and returns the exit code.
pub fn fail(error: &Error, json: bool) -> u8 {
    match error.code() {
        Code::OutputClosed => {}
        _ if json => report(&error.to_json()),
        _ => report(error),
    }
    error.code().exit_code()
}

/// Writes a line to standard output: `out!("{name}: {size}")?`.
#[macro_export]
macro_rules! out {
    ($($arguments:tt)*) => {
        $crate::output::write_line(format_args!($($arguments)*))
    };
}
