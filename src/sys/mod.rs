//! The cellar: every unsafe block of gpurun, each behind a safe function. What rustix, nix and caps already make
//! safe is used where it is needed and does not pass through here.
#![allow(unsafe_code)]

pub mod bpf;
pub mod dynamic;
pub mod handover;
pub mod landlock;
pub mod mount;
pub mod notify;
pub mod process;
pub mod seccomp;
