//! The Windows Subsystem for Linux: one device node for all GPUs, and a driver that is Windows' own. Its files are in a directory of
//! Windows' driver store, where libdxcore tells the others to look for them.

use super::{PlatformDriver, Search};
use crate::{
    error::{Code, Error, Result},
    inventory::types::{ContainerPath, Host},
};
use std::path::{Path, PathBuf};

/// The library that speaks to Windows' graphics kernel.
pub const DXCORE: &str = "/usr/lib/wsl/lib/libdxcore.so";
/// Its device node.
const NODE: &str = "/dev/dxg";
/// The driver store: a directory for each driver package, those that were replaced among them.
const STORE: &str = "/usr/lib/wsl/drivers";
/// Only NVIDIA's packages have it.
const CUDA: &str = "libcuda.so.1.1";
/// What the host's own programs load, and a copy of it in the package that is in force. It loads the other.
const LOADER: (&str, &str) = ("/usr/lib/wsl/lib/libcuda.so.1.1", "libcuda_loader.so");
/// It has 170 kB.
const LOADER_LIMIT: u64 = 16 << 20;

/// What a package must have.
const FILES: [&str; 8] = [
    // CUDA, and what finds it for programs.
    CUDA,
    LOADER.1,
    // Its compiler, its kernels, and its way to the device node.
    "libnvidia-ptxjitcompiler.so.1",
    "nvcubins.bin",
    "libnvdxgdmal.so.1",
    // NVML, what finds it, and who uses it.
    "libnvidia-ml.so.1",
    "libnvidia-ml_loader.so",
    "nvidia-smi",
];

/// Whether a package's file is for Linux' side: later drivers have more than [`FILES`], and some of them load Windows' libraries.
fn is_wanted(name: &str) -> bool {
    let ends = |end: &str| Path::new(name).extension().is_some_and(|extension| extension == end);
    FILES.contains(&name) || name.contains(".so") || ends("bin") || ends("dll")
}

/// Finds the driver.
///
/// # Errors
/// [`Code::NoDriver`] if Windows has given this system none, [`Code::DeviceNodeMissing`] if its node is missing.
pub fn find(host: &Host) -> Result<PlatformDriver> {
    let mut search = Search::new(host)?;
    if search.root.find(Path::new(DXCORE)).is_none() {
        return Err(none(format!("{DXCORE} is not there")));
    }
    search.node(Path::new(NODE));
    if search.driver.nodes.is_empty() {
        return Err(Error::new(Code::DeviceNodeMissing, format!("the device node {NODE} is missing"))
            .fix("update the Windows Subsystem for Linux (`wsl --update`), and use version 2 of it"));
    }
    let package = package(&mut search)?;
    search.file(Path::new(DXCORE));
    for name in FILES {
        if search.root.find(&package.join(name)).is_none() {
            search.missing(&package.join(name));
        }
    }
    let mut names = search.root.names(&package);
    names.retain(|name| is_wanted(name));
    // Both have the SONAME of the library that is meant, and who comes first has the link of that name.
    names.sort_by_key(|name| !name.contains("_loader.so"));
    for name in names {
        search.file(&package.join(name));
    }
    let smi = package.join("nvidia-smi");
    let mut driver = search.finish();
    if driver.files.iter().any(|file| file.container_path.0 == smi) {
        driver.links.push((ContainerPath("/usr/bin/nvidia-smi".into()), smi));
    }
    Ok(driver)
}

/// The package that is in force: if there are several of NVIDIA's, the one from which the host's own libraries are.
fn package(search: &mut Search<'_>) -> Result<PathBuf> {
    let root = &search.root;
    let mut packages: Vec<PathBuf> =
        root.names(Path::new(STORE)).iter().map(|name| Path::new(STORE).join(name)).collect();
    packages.retain(|package| root.find(&package.join(CUDA)).is_some());
    if packages.len() > 1 {
        let bytes = |path: &Path| root.read(path, LOADER_LIMIT);
        let in_force = bytes(Path::new(LOADER.0));
        let is_it = |package: &PathBuf| in_force.is_some() && bytes(&package.join(LOADER.1)) == in_force;
        if packages.iter().any(is_it) {
            packages.retain(is_it);
        }
    }
    let used = packages.pop().ok_or_else(|| none(format!("no package in {STORE} has {CUDA}")))?;
    if !packages.is_empty() {
        let others: Vec<_> = packages.iter().map(|package| package.display().to_string()).collect();
        search.driver.warnings.push(format!(
            "several packages of the driver are there: {} is used, and not {}",
            used.display(),
            others.join(", ")
        ));
    }
    Ok(used)
}

fn none(cause: String) -> Error {
    Error::new(Code::NoDriver, "Windows has given this system no NVIDIA driver")
        .cause(cause)
        .fix("install NVIDIA's driver on Windows, and run `wsl --shutdown` there")
}
