//! The cellar: every unsafe block of gpurun, each behind a safe function.
#![allow(unsafe_code)]

pub mod dynamic;
