//! What the host has: driver, GPUs, files, device nodes. Reads and decides nothing.
#![forbid(unsafe_code)]

mod types;
pub use types::*;
