//! Other people's file formats, as they define them.
#![forbid(unsafe_code)]

pub mod cuda_compat;
pub mod ldcache;
pub mod mountinfo;
pub mod oci;
