//! A container's root: read through its layers before it is mounted, written through descriptors afterwards.
//!
//! Image paths are never joined to host paths. A path of the image, including its links, is resolved beneath a descriptor of
//! its root, so that no link leads out of the image.
//!
//! * [`Layers`] reads a root, mounted or not.
//! * [`Mounts`] records the mounts over a root and looks up paths: a path is on the root itself, on a file system in memory,
//!   or on a volume.
//! * [`Root`] writes into a mounted root.

mod layers;
mod mounts;
mod root;

pub use layers::{Found, Layers, Resolved};
pub use mounts::{DirectoryPlace, Kind, Mounts, Outside, Place};
pub use root::{Root, not_plain, open_host_directory};
