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
    image::{self, ImageReference},
    inventory::elf,
    request::{Accepted, DeviceRequest, DeviceSelection},
};
use std::{collections::BTreeMap, fs::File, io::Write, os::unix::ffi::OsStrExt, path::Path};

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
    ("image_archives", image::fuzz::archive),
    ("image_documents", image::fuzz::documents),
    ("image_names", image_names),
    ("layers", image::fuzz::layer),
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
    for written in [cdi::to_json(&document), cdi::to_yaml(&document)] {
        let read = cdi::Document::parse(&written);
        assert_eq!(read.ok().as_ref(), Some(&document), "what was written is not what is read: {written}");
    }
}

/// A file of these bytes, for parsers that map or seek.
pub(crate) fn file(bytes: &[u8]) -> Option<File> {
    let fd = rustix::fs::memfd_create("input", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let mut file = File::from(fd);
    file.write_all(bytes).ok()?;
    Some(file)
}

fn elf_notes(bytes: &[u8]) {
    // Headers can promise what a sparse file has for free.
    for length in [bytes.len() as u64, 1 << 40] {
        let made = || file(bytes).filter(|file| file.set_len(length).is_ok());
        let (Some(one), Some(other)) = (made(), made()) else { return };
        let _ = (cuda_compat::note(one), elf::read(other));
    }
}

fn gpus(bytes: &[u8]) {
    let mut lines = text(bytes).splitn(3, '\n');
    let gpus = lines.next();
    let variable = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let user: Vec<_> = lines.next().and_then(variable).into_iter().collect();
    let image: Vec<_> = lines.next().and_then(variable).into_iter().collect();
    for gpus in [gpus, None] {
        let Ok(Some(request)) = DeviceRequest::from_cli(gpus, &user, &image, &BTreeMap::new()) else {
            continue;
        };
        if let DeviceSelection::Ids(ids) = &request.selection {
            let names: Vec<_> = ids.iter().map(ToString::to_string).collect();
            let list = format!("\"device={}\"", names.join(","));
            let again = DeviceRequest::from_cli(Some(&list), &[], &[], &BTreeMap::new());
            assert_eq!(again.unwrap().unwrap().selection, request.selection, "{list}");
        }
        for requirement in &request.requirements {
            assert!(!requirement.alternatives.is_empty());
            assert!(requirement.alternatives.iter().all(|conditions| !conditions.is_empty()));
        }
    }
}

fn image_names(bytes: &[u8]) {
    let Ok(name) = ImageReference::parse(text(bytes)) else { return };
    let written = name.to_string();
    assert_eq!(ImageReference::parse(&written).ok().as_ref(), Some(&name), "{written}");
}

fn ld_so_cache(bytes: &[u8]) {
    let Some(mut cache) = Cache::parse(bytes) else { return };
    assert_eq!(
        Cache::parse(&cache.to_bytes()).as_ref(),
        Some(&cache),
        "a cache that was written reads differently"
    );
    let added = cache.entries.iter().step_by(2).take(20).cloned().collect();
    cache.replace(added);
    assert_eq!(Cache::parse(&cache.to_bytes()), Some(cache), "a cache that was changed reads differently");
}

fn mounts_of_process(bytes: &[u8]) {
    for id in [0, 22, u64::MAX] {
        let _ = mountinfo::shared_mount_point(bytes, id);
    }
    for entry in mountinfo::entries(bytes) {
        // As the kernel writes it (fs/proc_namespace.c, show_mountinfo).
        let escaped = |path: &Path| -> String {
            path.as_os_str().as_bytes().iter().map(|byte| format!("\\{byte:03o}")).collect()
        };
        let (root, point) = (escaped(&entry.root), escaped(&entry.mount_point));
        let mode = if entry.read_only { "ro" } else { "rw" };
        let ((major, minor), filesystem) = (entry.device, &entry.filesystem);
        let line = format!("7 1 {major}:{minor} {root} {point} {mode} shared:1 - {filesystem} source rw");
        assert_eq!(mountinfo::entries(line.as_bytes()).next().as_ref(), Some(&entry), "{line}");
        assert_eq!(mountinfo::shared_mount_point(line.as_bytes(), 7), Some(entry.mount_point));
    }
    let _ = host_mounts::host_mounts(bytes);
}

fn oci_config(bytes: &[u8]) {
    let _ = State::parse(bytes).map(|state| state.process());
    let Ok(mut spec) = Spec::parse(bytes) else { return };
    let _ = DeviceRequest::from_oci(&spec, &Accepted::default());
    let _ = (spec.environment(), spec.annotations(), spec.mounts().count(), spec.root_path(), spec.uid());
    let _ = (spec.memory_limit(), spec.systemd_scope(), spec.mapped_root(), spec.has_user_namespace());
    let _ = spec.list_mut(&["process", "env"]).map(|list| list.len());
    let written = spec.to_bytes();
    assert_eq!(Spec::parse(&written).ok(), Some(spec), "{}", text(&written));
}

/// Runs a target on each of its seeds. Returns their number.
///
/// # Panics
/// If the target panics, or the directory cannot be read.
#[cfg(test)]
fn replay(target: Target) -> usize {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fuzz/seeds").join(target.0);
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
