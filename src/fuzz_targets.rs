//! Parsers of bytes from other programs, as functions for the fuzzer (`integration/fuzz`). An error is a valid result; a
//! panic, a hang or unbounded memory is a bug. The tests replay the inputs in `integration/fuzz/seeds`.

use crate::{
    apply::container::identity,
    commands::run::{environment, host_mounts, mounts},
    formats::{
        cdi, cuda_compat,
        ldcache::Cache,
        mountinfo,
        oci::{Spec, State},
    },
    image,
    inventory::elf,
    request::{Accepted, DeviceRequest},
};
use std::{collections::BTreeMap, fs::File, io::Write};

/// The name, also of the directory with the seeds, and the function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    ("accounts", identity::fuzz),
    ("auth_files", image::registry::fuzz::auth_file),
    ("cdi_specs", cdi_spec),
    ("elf_notes", elf_notes),
    ("env_files", environment::fuzz),
    ("gpus", gpus),
    ("http_headers", image::registry::fuzz::headers),
    ("image_documents", image::fuzz::documents),
    ("ld_so_cache", ld_so_cache),
    ("mountinfo", mounts_of_process),
    ("mounts", mounts::fuzz),
    ("oci_config", oci_config),
    ("registries_conf", image::registry::fuzz::registries_conf),
    ("tar", image::fuzz::tar),
];

/// The input as text; parsers of text skip input that is not UTF-8.
pub fn text(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
    }
}

fn cdi_spec(bytes: &[u8]) {
    let Ok(document) = cdi::Document::parse(text(bytes)) else { return };
    let _ = (document.faults(), document.lowest_version(), document.edits().count());
    let written = cdi::to_json(&document);
    assert!(cdi::Document::parse(&written).is_ok(), "what was written is not read: {written}");
}

/// The parsers map files.
fn file(bytes: &[u8]) -> Option<File> {
    let fd = rustix::fs::memfd_create("input", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let mut file = File::from(fd);
    file.write_all(bytes).ok()?;
    Some(file)
}

fn elf_notes(bytes: &[u8]) {
    let (Some(one), Some(other)) = (file(bytes), file(bytes)) else { return };
    let _ = (cuda_compat::note(one), elf::read(other));
}

fn gpus(bytes: &[u8]) {
    let mut lines = text(bytes).splitn(3, '\n');
    let gpus = lines.next();
    let variable = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let user: Vec<_> = lines.next().and_then(variable).into_iter().collect();
    let image: Vec<_> = lines.next().and_then(variable).into_iter().collect();
    let _ = DeviceRequest::from_cli(gpus, &user, &image, &BTreeMap::new());
    let _ = DeviceRequest::from_cli(None, &user, &image, &BTreeMap::new());
}

fn ld_so_cache(bytes: &[u8]) {
    let Some(cache) = Cache::parse(bytes) else { return };
    let written = cache.to_bytes();
    assert!(Cache::parse(&written).is_some(), "a cache that was written is not read");
}

fn mounts_of_process(bytes: &[u8]) {
    for id in [0, 22, u64::MAX] {
        let _ = mountinfo::shared_mount_point(bytes, id);
    }
    let _ = mountinfo::entries(bytes).count();
    let _ = host_mounts::host_mounts(text(bytes));
}

fn oci_config(bytes: &[u8]) {
    let _ = State::parse(bytes).map(|state| state.process());
    let Ok(mut spec) = Spec::parse(bytes) else { return };
    let _ = DeviceRequest::from_oci(&spec, &Accepted::default());
    let _ = (spec.environment(), spec.annotations(), spec.mounts().count(), spec.root_path(), spec.uid());
    let _ = (spec.memory_limit(), spec.systemd_scope(), spec.mapped_root(), spec.has_user_namespace());
    let _ = spec.list_mut(&["process", "env"]).map(|list| list.len());
    assert!(Spec::parse(&spec.to_bytes()).is_ok(), "a configuration that was written is not read");
}

/// Runs a target on each of its seeds. Returns their number.
///
/// # Panics
/// If the target panics, or the directory cannot be read.
pub fn replay(target: Target) -> usize {
    let seeds =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fuzz/seeds").join(target.0);
    let entries = std::fs::read_dir(&seeds).unwrap_or_else(|error| panic!("{}: {error}", seeds.display()));
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort_unstable();
    for path in &paths {
        let input = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // A panic of the target is reported with the name of its input.
        let ended = std::panic::catch_unwind(|| target.1(&input));
        assert!(ended.is_ok(), "the input {} made the target {} panic", path.display(), target.0);
    }
    paths.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_read_without_a_fault() {
        for target in TARGETS {
            assert!(replay(*target) > 0, "{} has no seeds", target.0);
        }
    }
}
