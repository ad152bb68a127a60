//! What is asked for. Reads strings alone: no file, no clock, no environment but the one it is given.
#![forbid(unsafe_code)]

mod types;
pub use types::*;
