//! Other people's file formats, as they define them.
#![forbid(unsafe_code)]

pub mod cdi;
pub mod cuda_compat;
pub mod ldcache;
pub mod oci;
