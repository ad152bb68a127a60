//! Carries an Injection out. Does and decides nothing.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod cdi;
pub mod container;
pub mod delivery;
pub mod loader;
pub mod oci_spec;
pub mod rootfs;
pub mod tree;
