//! Compiles src/sys/handover/program.rs, a program of its own that gpurun contains.

use std::{env, path::PathBuf, process::Command};

const SOURCE: &str = "src/sys/handover/program.rs";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "bin",
        "--crate-name",
        "handover",
        "--deny",
        "warnings",
    ]);
    rustc.arg("--target").arg(variable("TARGET"));
    rustc.arg("-o").arg(PathBuf::from(variable("OUT_DIR")).join("handover")).arg(SOURCE);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("linker=");
        option.push(linker);
        rustc.arg("-C").arg(option);
    }
    // No C library and no start files. A page for the code and one for the headers is all that it maps.
    for option in [
        "panic=abort",
        "opt-level=s",
        "strip=symbols",
        "relocation-model=static",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-Wl,--build-id=none,-z,noseparate-code,-z,norelro,-z,max-page-size=4096",
    ] {
        rustc.args(["-C", option]);
    }
    match rustc.status() {
        Ok(status) if status.success() => {}
        result => panic!("{SOURCE} cannot be compiled: {result:?}"),
    }
}
