//! Carries an injection out, one destination per module. Does and decides nothing.
#![forbid(unsafe_code)]

pub mod container;
