//! The plugin's parsers of bytes that other programs wrote, as functions that a fuzzer calls (`integration/fuzz`).

use crate::{authority, config::file::File, dra};

/// The name, also of the directory with the seeds, and the function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of this crate.
pub const TARGETS: &[Target] =
    &[("dra_checkpoint", dra::fuzz), ("http2_frames", authority::fuzz), ("plugin_config", plugin_config)];

fn plugin_config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match File::parse(text) {
        Ok(file) => assert!(file.sharing.resources.iter().all(|entry| entry.replicas > 1)),
        Err(error) => assert!(!error.fix_line().is_empty(), "{error} has no fix"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_read_without_a_fault() {
        let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/fuzz/seeds");
        for (name, target) in TARGETS {
            let entries = std::fs::read_dir(seeds.join(name)).unwrap();
            let paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            assert!(!paths.is_empty(), "{name} has no seeds");
            for path in paths {
                let input = std::fs::read(&path).unwrap();
                // A panic of the target is reported with the name of its input.
                let ended = std::panic::catch_unwind(|| target(&input));
                assert!(ended.is_ok(), "the input {} made the target {name} panic", path.display());
            }
        }
    }
}
