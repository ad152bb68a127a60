//! What a container of a host gets whose driver is not found through NVML: all of it, where the host has it.

use super::{CachedLibrary, DevicePart, Injection, Mount, Symlink};
use crate::inventory::{ContainerPath, platform::PlatformDriver};
use std::path::Path;

/// The whole driver. Capabilities are no matter: the host's lists do not say them.
pub fn platform(driver: PlatformDriver) -> Injection {
    let mut injection = Injection {
        // Whoever reads the variable after this must not inject a second time.
        env: vec![("NVIDIA_VISIBLE_DEVICES".into(), "void".into())],
        warnings: driver.warnings,
        ..Injection::default()
    };
    for file in &driver.files {
        let (Some(soname), Some(directory)) = (&file.soname, file.container_path.0.parent()) else {
            continue;
        };
        let path = ContainerPath(directory.join(soname));
        let known = |path: &ContainerPath| injection.libraries.iter().any(|library| library.path == *path);
        if !known(&path) {
            injection.libraries.push(CachedLibrary { soname: soname.clone(), path, is_32bit: false });
        }
        if !injection.library_dirs.iter().any(|known: &ContainerPath| known.0 == Path::new(directory)) {
            injection.library_dirs.push(ContainerPath(directory.into()));
        }
    }
    injection.add(DevicePart {
        nodes: driver.nodes,
        symlinks: driver.links.into_iter().map(|(link, target)| Symlink { link, target }).collect(),
        mounts: driver
            .files
            .into_iter()
            .map(|file| Mount { source: file.path, target: file.container_path, daemon: None })
            .collect(),
    });
    injection
}
