//! Compiles src/sys/freestanding/handover.rs, a program of its own that gpurun contains.

use std::{env, ffi::OsString, path::PathBuf, process::Command};

const DIRECTORY: &str = "src/sys/freestanding";

fn main() {
    println!("cargo::rerun-if-changed={DIRECTORY}");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.arg(format!("@{DIRECTORY}/rustc.options")).arg("--target").arg(variable("TARGET"));
    rustc.arg("-o").arg(PathBuf::from(variable("OUT_DIR")).join("handover"));
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = OsString::from("-Clinker=");
        option.push(linker);
        rustc.arg(option);
    }
    match rustc.arg(format!("{DIRECTORY}/handover.rs")).status() {
        Ok(status) if status.success() => {}
        result => panic!("{DIRECTORY}/handover.rs cannot be compiled: {result:?}"),
    }
}
