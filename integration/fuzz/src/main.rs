//! One program for all targets: `GPURUN_FUZZ_TARGET` names the one that it fuzzes.
#![no_main]

use std::sync::OnceLock;

fn target() -> fn(&[u8]) {
    let wanted = std::env::var("GPURUN_FUZZ_TARGET").unwrap_or_default();
    let all = gpurun::fuzz_targets::TARGETS.iter().chain(gpurun_device_plugin::fuzz_targets::TARGETS);
    let found = all.clone().find(|(name, _)| *name == wanted).map(|(_, target)| *target);
    found.unwrap_or_else(|| {
        let names: Vec<_> = all.map(|(name, _)| *name).collect();
        eprintln!("GPURUN_FUZZ_TARGET names none of: {}", names.join(" "));
        std::process::exit(2)
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    TARGET.get_or_init(target)(bytes);
});
