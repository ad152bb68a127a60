//! The program that executes a container's command: a static ELF file of 1.6 KB. `freestanding/handover.rs` describes its words
//! and its message; `build.rs` compiles it for the same machine.

/// The file.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/handover"));

/// The length of its message.
pub const MESSAGE: usize = 12;

/// Reads its message: the index of the path that could not be executed, `None` if no path exists, and the error of execve(2).
pub fn parse(message: &[u8; MESSAGE]) -> Option<(Option<usize>, i32)> {
    let [kind @ .., i0, i1, i2, i3, e0, e1, e2, e3] = message;
    let index = u32::from_ne_bytes([*i0, *i1, *i2, *i3]);
    let index = if index == u32::MAX { None } else { Some(usize::try_from(index).ok()?) };
    (kind == b"exec").then_some((index, i32::from_ne_bytes([*e0, *e1, *e2, *e3])))
}
