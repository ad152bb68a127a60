//! Decides what a container gets. Touches nothing: no file, no clock, no environment.
#![forbid(unsafe_code)]

mod injection;
pub use injection::*;
