//! The loaded kernel module, and whether the driver's libraries are its own.

use super::{procfs, types::Host};
use crate::{
    error::{Code, Error, Result},
    vocabulary::Version,
};

/// The version of the kernel module that is loaded.
///
/// # Errors
/// [`Code::NoDriver`] when none is, with what the PCI bus and the other drivers show.
pub fn loaded_version(host: &Host) -> Result<Version> {
    procfs::read(&host.sys.join("module/nvidia/version"))
        .and_then(|text| text.parse().ok())
        .or_else(|| version_line(&procfs::read(&host.proc.join("driver/nvidia/version"))?))
        .ok_or_else(|| no_driver(host))
}

/// The version in /proc/driver/nvidia/version: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue …`, or
/// `… Open Kernel Module for x86_64  550.163.01  Release Build …`.
fn version_line(text: &str) -> Option<Version> {
    let (_, rest) = text.lines().next()?.split_once("Kernel Module")?;
    rest.split_whitespace().find(|word| word.contains('.'))?.parse().ok()
}

fn no_driver(host: &Host) -> Error {
    let error = Error::new(Code::NoDriver, "no NVIDIA driver is loaded on this host");
    let on_the_bus = procfs::names(&host.sys.join("bus/pci/devices")).into_iter().find(|device| {
        let fact = |name| procfs::read(&host.sys.join("bus/pci/devices").join(device).join(name));
        // 0x10de is NVIDIA; class 0x03 is a display controller (PCI ID repository).
        fact("vendor").as_deref() == Some("0x10de")
            && fact("class").is_some_and(|class| class.starts_with("0x03"))
    });
    match on_the_bus {
        Some(device) if host.sys.join("module/nouveau").exists() => error
            .cause(format!("the GPU at {device} is held by the nouveau driver"))
            .fix("blacklist nouveau, install NVIDIA's driver and reboot"),
        Some(device) => error
            .cause(format!("the GPU at {device} has no driver: the kernel module nvidia is not loaded"))
            .fix("load it with `modprobe nvidia`, or install the NVIDIA driver if there is no such module"),
        None => {
            error.cause("no GPU of NVIDIA is on the PCI bus and the kernel module nvidia is not loaded").fix(
                "run on a host with an NVIDIA GPU and its driver, or try `gpurun demo`, which simulates one",
            )
        }
    }
}

/// The failure when the driver root holds libraries, but of other versions.
pub fn mismatch(module: &Version, libraries: &[Version], root: &str) -> Error {
    let libraries: Vec<&str> = libraries.iter().map(Version::as_str).collect();
    let libraries = libraries.join(" and ");
    Error::new(
        Code::VersionMismatch,
        format!("the kernel module nvidia is version {module}, but the driver's libraries in {root} are version {libraries}"),
    )
    .cause("the driver was upgraded or replaced while its old kernel module stayed loaded")
    .fix("reboot, or stop what uses the GPUs and reload the module: `rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && modprobe nvidia`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_module_tells_its_version_in_sysfs_and_in_procfs() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::simulated(dir.path());
        for line in [
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr  8 12:41:17 UTC 2025\nGCC version: 12.2.0\n",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.163.01  Release Build  (builder)\n",
        ] {
            write(&host.proc.join("driver/nvidia/version"), line);
            assert_eq!(loaded_version(&host).unwrap().as_str(), "550.163.01");
        }
        write(&host.sys.join("module/nvidia/version"), "535.216.03\n");
        assert_eq!(loaded_version(&host).unwrap().as_str(), "535.216.03");
    }

    #[test]
    fn without_a_module_the_bus_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::simulated(dir.path());
        let failure = || loaded_version(&host).unwrap_err();
        assert_eq!(failure().code(), Code::NoDriver);
        assert!(failure().fix_line().contains("demo"));
        let gpu = host.sys.join("bus/pci/devices/0000:65:00.0");
        write(&gpu.join("vendor"), "0x10de\n");
        write(&gpu.join("class"), "0x030200\n");
        assert!(failure().fix_line().contains("modprobe nvidia"));
        fs::create_dir_all(host.sys.join("module/nouveau")).unwrap();
        assert!(failure().cause_line().contains("0000:65:00.0 is held by the nouveau"));
    }
}
