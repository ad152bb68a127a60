//! What the kernel and the driver tell in /proc and /sys.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// The largest file of the kernel's that is read here; /proc/devices has 2 kB.
const LIMIT: u64 = 256 * 1024;

/// A small text file of the kernel, without the white space at its end; `None` if it is absent or cannot be read.
pub fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(LIMIT).read_to_string(&mut text).ok()?;
    text.truncate(text.trim_end().len());
    Some(text)
}

/// The names in a directory of the kernel, sorted; none where it is absent.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// The driver's lines of /proc/devices: `(major, name)` of the character devices whose names begin with `nvidia`.
pub fn device_majors(proc_devices: &str) -> impl Iterator<Item = (u32, &str)> {
    proc_devices
        .lines()
        .skip_while(|line| *line != "Character devices:")
        .take_while(|line| *line != "Block devices:")
        .filter_map(|line| line.trim().split_once(' '))
        .filter_map(|(major, name)| Some((major.parse().ok()?, name.trim())))
        .filter(|(_, name)| name.starts_with("nvidia"))
}

/// A GPU as the kernel module knows it, whether or not it still answers.
#[derive(Debug, PartialEq, Eq)]
pub struct ModuleGpu {
    /// PCI address in sysfs' form.
    pub pci: String,
    /// `GPU-…`; absent while the driver has not initialised it (`GPU-????????-…`).
    pub uuid: Option<String>,
    /// The N of /dev/nvidiaN.
    pub minor: Option<u32>,
}

/// Every GPU under /proc/driver/nvidia/gpus (driver README, "The /proc interface").
pub fn module_gpus(proc: &Path) -> Vec<ModuleGpu> {
    let dir = gpus_dir(proc);
    names(&dir)
        .into_iter()
        .map(|pci| {
            let text = read(&dir.join(&pci).join("information")).unwrap_or_default();
            let value = |key: &str| {
                text.lines()
                    .filter_map(|line| line.split_once(':'))
                    .find(|(name, _)| name.trim() == key)
                    .map(|(_, value)| value.trim())
            };
            ModuleGpu {
                uuid: value("GPU UUID").filter(|uuid| !uuid.contains('?')).map(String::from),
                minor: value("Device Minor").and_then(|minor| minor.parse().ok()),
                pci,
            }
        })
        .collect()
}

/// Where the kernel module lists its GPUs by PCI address.
pub fn gpus_dir(proc: &Path) -> PathBuf {
    proc.join("driver/nvidia/gpus")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn majors_are_those_of_character_devices() {
        let text = "Character devices:\n  1 mem\n195 nvidia\n195 nvidiactl\n235 nvidia-caps\n510 nvidia-uvm\n\n\
                    Block devices:\n  7 nvidia-not\n";
        let majors: Vec<_> = device_majors(text).collect();
        assert_eq!(majors, [(195, "nvidia"), (195, "nvidiactl"), (235, "nvidia-caps"), (510, "nvidia-uvm")]);
    }

    #[test]
    fn a_gpu_that_was_never_initialised_has_no_uuid() {
        let dir = tempfile::tempdir().unwrap();
        for (pci, text) in [
            (
                "0000:07:00.0",
                "Model: \t\t NVIDIA A100\nGPU UUID: \t GPU-12-34\nBus Location: \t 0000:07:00.0\nDevice Minor: \t 3\n",
            ),
            ("0000:0f:00.0", "GPU UUID: \t GPU-????????-????\nDevice Minor: \t 0\n"),
        ] {
            let gpu = gpus_dir(dir.path()).join(pci);
            std::fs::create_dir_all(&gpu).unwrap();
            std::fs::write(gpu.join("information"), text).unwrap();
        }
        let gpus = module_gpus(dir.path());
        assert_eq!(
            gpus[0],
            ModuleGpu { pci: "0000:07:00.0".into(), uuid: Some("GPU-12-34".into()), minor: Some(3) }
        );
        assert_eq!(gpus[1], ModuleGpu { pci: "0000:0f:00.0".into(), uuid: None, minor: Some(0) });
    }

    proptest! {
        #[test]
        fn any_text_has_majors_or_none(text in "(Character devices:\n)?([ 0-9a-z-]{0,20}\n){0,6}") {
            let _ = device_majors(&text).count();
        }
    }
}
