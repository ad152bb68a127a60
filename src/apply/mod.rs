//! Carries an Injection out. Does and decides nothing.
#![forbid(unsafe_code)]

pub mod container;
pub mod loader;
pub mod rootfs;
