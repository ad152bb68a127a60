//! What is asked for. Reads strings alone: no file, no clock, no environment but the one it is given.
//!
//! ```text
//!  --gpus ─────────────► selection ──┐
//!  -e NVIDIA_… ────────► env ────────┼─► cli ─► DeviceRequest
//!  image's ENV, labels ► requirement ┘
//!  config.json: annotation, mounts, environment ─► oci ─► DeviceRequest
//! ```
#![forbid(unsafe_code)]

mod annotation;
pub mod capability;
mod cli;
pub mod csv;
mod env;
mod oci;
mod requirement;
mod selection;
mod types;
pub use oci::Accepted;
pub use types::*;

/// Quotes user input for a message, and shortens long input.
fn quoted(text: &str) -> String {
    const READABLE: usize = 60;
    match text.char_indices().nth(READABLE) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}
