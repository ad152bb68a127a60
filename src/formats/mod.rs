//! Other people's file formats, as they define them.
#![forbid(unsafe_code)]

pub mod cdi;
pub mod cdi_root;
pub mod cuda_compat;
pub mod go_json;
pub mod json_document;
pub mod ldcache;
pub mod mountinfo;
pub mod oci;
pub mod oci_hook;
pub mod toml_document;
pub mod yaml;
