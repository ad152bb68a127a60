//! Carries an Injection out. Does and decides nothing.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod cdi;
pub mod config_file;
pub mod container;
pub mod delivery;
pub mod dev_char;
pub mod device_nodes;
pub mod gathering;
pub mod host_object;
pub mod loader;
pub mod mount;
pub mod namespace;
pub mod oci_spec;
pub mod placement;
pub mod rootfs;
pub mod tree;
pub mod whole_file;
