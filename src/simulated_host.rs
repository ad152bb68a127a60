//! A host with a driver and GPUs that do not exist, laid out in a directory: for `gpurun demo` where there is no GPU, and
//! for tests.
//!
//! ```text
//! DIR/driver   the driver root: stand-in libraries, or a real driver's files with NVML alone replaced
//! DIR/dev      device nodes            (the dev root is DIR)
//! DIR/proc     what the kernel module tells in procfs
//! DIR/sys      and in sysfs
//! DIR/events   a FIFO: `xid GPU-… 79` is an error of that GPU's
//! DIR/gpus     a file GPU-… in it that says `lost` takes that GPU away from NVML
//! ```
#![forbid(unsafe_code)]

mod description;
pub use description::*;

use crate::error::{Code, Error, OrFail, Result};
use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// Where Debian and Ubuntu keep libraries.
const LIBRARY_DIR: &str = "usr/lib/x86_64-linux-gnu";
/// Major numbers: the first two are NVIDIA's and DRM's own (kernel: admin-guide/devices.txt), the others are handed out
/// when the modules are loaded.
const NVIDIA: u32 = 195;
const DRM: u32 = 226;
const NVIDIA_UVM: u32 = 510;
const NVIDIA_CAPS: u32 = 236;

/// Where the driver's files come from.
#[derive(Debug, Clone, Copy)]
pub enum DriverFiles<'a> {
    /// Stand-ins for libnvidia-ml, libcuda and nvidia-smi, and nothing else.
    StandIns,
    /// A real driver's files, unpacked here; NVML alone is replaced, because the real one wants a GPU. Hard links where
    /// the file system allows them, so nobody may write to the files of the simulated host.
    Unpacked(&'a Path),
}

/// Lays out a simulated host in `dir`, which must be empty and the caller's own, or absent. `stand_ins` is the directory with
/// `libsimulated_nvml.so`, `libsimulated_cuda.so` and `simulated-nvidia-smi`, as `packaging/build` leaves them in `dist`.
///
/// Who may not make device nodes gets links to /dev/null in their place, which is a character device, too.
///
/// # Errors
/// [`Code::Inventory`] when the description holds what cannot be a name, or when a file cannot be written.
pub fn lay_out(dir: &Path, description: &Description, stand_ins: &Path, driver: DriverFiles) -> Result<()> {
    check_names(description)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .and_then(|()| own_and_empty(dir))
        .and_then(|dir| {
            let driver_root = dir.join("driver");
            let description = Description { driver_root: Some(driver_root.clone()), ..description.clone() };
            match driver {
                DriverFiles::StandIns => stand_in_driver(&driver_root, &description, stand_ins),
                DriverFiles::Unpacked(source) => {
                    unpacked_driver(source, &driver_root, &description, stand_ins)
                }
            }?;
            device_nodes(&dir.join("dev"), &description)?;
            mknodat(CWD, dir.join("events"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            fs::create_dir(dir.join("gpus"))?;
            let unified_memory = rustix::fs::major(fs::metadata(dir.join("dev/nvidia-uvm"))?.rdev());
            procfs(&dir.join("proc"), &description, unified_memory)?;
            sysfs(&dir.join("sys"), &description)
        })
        .or_fail(Code::Inventory, || format!("no simulated host can be laid out in {}", dir.display()))
}

/// The directory's real name. Whoever else may change it could put a library of his own there, which is loaded.
fn own_and_empty(dir: &Path) -> io::Result<PathBuf> {
    let real = dir.canonicalize()?;
    let stat = real.metadata()?;
    if stat.uid() != rustix::process::geteuid().as_raw() || stat.mode() & 0o022 != 0 {
        return Err(io::Error::other("it belongs to somebody else, or others may write to it"));
    }
    match fs::read_dir(&real)?.next() {
        None => Ok(real),
        Some(_) => Err(io::ErrorKind::DirectoryNotEmpty.into()),
    }
}

/// What becomes part of a path must be a name and nothing else.
fn check_names(description: &Description) -> Result<()> {
    let of = |text: &str, allowed: &str| {
        text.starts_with(|c: char| c.is_ascii_hexdigit()) && text.chars().all(|c| allowed.contains(c))
    };
    if !of(&description.driver, ".0123456789") {
        return Err(Error::new(Code::Inventory, "the description's driver version is none")
            .cause(&description.driver));
    }
    match description.gpus.iter().find(|gpu| !of(&gpu.pci, ":.0123456789abcdef")) {
        Some(gpu) => {
            Err(Error::new(Code::Inventory, "the description's PCI address is none").cause(&gpu.pci))
        }
        None => Ok(()),
    }
}

fn stand_in_driver(root: &Path, description: &Description, stand_ins: &Path) -> io::Result<()> {
    let libraries = root.join(LIBRARY_DIR);
    fs::create_dir_all(&libraries)?;
    for (name, stand_in) in [("libnvidia-ml", "libsimulated_nvml.so"), ("libcuda", "libsimulated_cuda.so")] {
        let file = format!("{name}.so.{}", description.driver);
        write_library(&stand_ins.join(stand_in), &libraries.join(&file), description)?;
        symlink(file, libraries.join(format!("{name}.so.1")))?;
        symlink(format!("{name}.so.1"), libraries.join(format!("{name}.so")))?;
    }
    fs::create_dir_all(root.join("usr/bin"))?;
    copy(&stand_ins.join("simulated-nvidia-smi"), &root.join("usr/bin/nvidia-smi"))
}

fn unpacked_driver(from: &Path, to: &Path, description: &Description, stand_ins: &Path) -> io::Result<()> {
    let nvml = format!("libnvidia-ml.so.{}", description.driver);
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            unpacked_driver(&source, &target, description, stand_ins)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, target)?;
        } else if entry.file_name() == nvml.as_str() {
            write_library(&stand_ins.join("libsimulated_nvml.so"), &target, description)?;
        } else if fs::hard_link(&source, &target).is_err() {
            copy(&source, &target)?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to).map(|_| ()).map_err(|error| at(from, &error))
}

fn write_library(stand_in: &Path, path: &Path, description: &Description) -> io::Result<()> {
    let mut from = BufReader::new(File::open(stand_in).map_err(|error| at(stand_in, &error))?);
    let mut to = BufWriter::new(File::create_new(path).map_err(|error| at(path, &error))?);
    io::copy(&mut from, &mut to)?;
    description.append_to(&mut to)?;
    to.into_inner()?.set_permissions(fs::Permissions::from_mode(0o755))
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn device_nodes(dev: &Path, description: &Description) -> io::Result<()> {
    let node = |name: &str, major, minor, mode| device_node(&dev.join(name), major, minor, mode);
    node("nvidiactl", NVIDIA, 255, 0o666)?;
    node("nvidia-modeset", NVIDIA, 254, 0o666)?;
    node("nvidia-uvm", NVIDIA_UVM, 0, 0o666)?;
    node("nvidia-uvm-tools", NVIDIA_UVM, 1, 0o666)?;
    node("nvidia-caps/nvidia-cap1", NVIDIA_CAPS, 1, 0o400)?; // mig/config
    node("nvidia-caps/nvidia-cap2", NVIDIA_CAPS, 2, 0o444)?; // mig/monitor
    for (number, gpu) in (0..).zip(&description.gpus) {
        node(&format!("nvidia{}", gpu.minor), NVIDIA, gpu.minor, 0o666)?;
        node(&format!("dri/card{number}"), DRM, number, 0o660)?;
        node(&format!("dri/renderD{}", 128 + number), DRM, 128 + number, 0o660)?;
        for mig in migs(gpu) {
            let [instance, compute] = mig.cap_minors(gpu.minor);
            for minor in [instance, compute] {
                node(&format!("nvidia-caps/nvidia-cap{minor}"), NVIDIA_CAPS, minor, 0o444)?;
            }
        }
    }
    Ok(())
}

/// Two MIG devices may share a GPU instance, and so its node: one that is there already stays.
fn device_node(path: &Path, major: u32, minor: u32, mode: u32) -> io::Result<()> {
    make_parent(path)?;
    match mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(mode), makedev(major, minor)) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode)), // whatever the umask
        Err(Errno::EXIST) => Ok(()),
        Err(Errno::PERM) => symlink("/dev/null", path),
        Err(error) => Err(at(path, &error.into())),
    }
}

fn migs(gpu: &SimulatedGpu) -> &[SimulatedMig] {
    gpu.mig.as_ref().filter(|mig| mig.enabled).map_or(&[], |mig| &mig.devices)
}

/// What the driver's README and NVIDIA's MIG guide say of /proc/driver/nvidia, /proc/driver/nvidia-caps; and two files of
/// the kernel's own that say whether the host is the one that it was.
fn procfs(proc: &Path, description: &Description, unified_memory: u32) -> io::Result<()> {
    let put = |name: PathBuf, text: String| put(&proc.join(name), &text);
    let version = &description.driver;
    put(
        "devices".into(),
        format!(
            "Character devices:\n  1 mem\n{NVIDIA} nvidia\n{NVIDIA} nvidia-modeset\n{NVIDIA} nvidiactl\n{DRM} drm\n\
             {NVIDIA_CAPS} nvidia-caps\n{unified_memory} nvidia-uvm\n\nBlock devices:\n  7 loop\n"
        ),
    )?;
    put("sys/kernel/random/boot_id".into(), fs::read_to_string("/proc/sys/kernel/random/boot_id")?)?;
    put("sys/kernel/osrelease".into(), fs::read_to_string("/proc/sys/kernel/osrelease")?)?;
    let nvidia = Path::new("driver/nvidia");
    put(
        nvidia.join("version"),
        format!(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  (simulated by gpurun)\nGCC version:  none\n"
        ),
    )?;
    put(
        nvidia.join("params"),
        "ModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\n".into(),
    )?;
    let capabilities = nvidia.join("capabilities");
    let capability = |name: PathBuf, minor: u32, mode: u32| {
        put(name, format!("DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: 1\n"))
    };
    capability(capabilities.join("mig/config"), 1, 0o400)?;
    capability(capabilities.join("mig/monitor"), 2, 0o444)?;
    let mut minors = vec!["config 1".to_string(), "monitor 2".to_string()];
    for gpu in &description.gpus {
        let SimulatedGpu { name, uuid, pci, minor, .. } = gpu;
        put(
            nvidia.join("gpus").join(pci).join("information"),
            format!(
                "Model: \t\t {name}\nIRQ:   \t\t 0\nGPU UUID: \t {uuid}\nBus Type: \t PCIe\nBus Location: \t {pci}\n\
                 Device Minor: \t {minor}\nGPU Firmware: \t {version}\nGPU Excluded:\t No\n"
            ),
        )?;
        for mig in migs(gpu) {
            let SimulatedMig { gpu_instance, compute_instance, .. } = mig;
            let [instance, compute] = mig.cap_minors(gpu.minor);
            let dir = capabilities.join(format!("gpu{minor}/mig/gi{gpu_instance}"));
            let access = format!("gpu{minor}/gi{gpu_instance}/access {instance}");
            if !minors.contains(&access) {
                capability(dir.join("access"), instance, 0o444)?;
                minors.push(access);
            }
            capability(dir.join(format!("ci{compute_instance}/access")), compute, 0o444)?;
            minors.push(format!("gpu{minor}/gi{gpu_instance}/ci{compute_instance}/access {compute}"));
        }
    }
    put("driver/nvidia-caps/mig-minors".into(), minors.join("\n") + "\n")
}

/// The module's version, and the GPUs on the PCI bus with the DRM nodes that belong to them (kernel: ABI/testing/sysfs-bus-pci).
fn sysfs(sys: &Path, description: &Description) -> io::Result<()> {
    put(&sys.join("module/nvidia/version"), &format!("{}\n", description.driver))?;
    for (number, gpu) in description.gpus.iter().enumerate() {
        let device = sys.join("bus/pci/devices").join(&gpu.pci);
        put(&device.join("vendor"), "0x10de\n")?;
        put(&device.join("class"), "0x030200\n")?; // 3D controller
        let node = gpu.numa_node.map_or("-1".into(), |node| node.to_string());
        put(&device.join("numa_node"), &format!("{node}\n"))?;
        fs::create_dir_all(device.join(format!("drm/card{number}")))?;
        fs::create_dir_all(device.join(format!("drm/renderD{}", 128 + number)))?;
    }
    Ok(())
}

fn put(path: &Path, text: &str) -> io::Result<()> {
    make_parent(path)?;
    File::create_new(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| at(path, &error))
}

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Cursor, os::unix::fs::FileTypeExt};

    const HOSTS: [&str; 6] = [
        include_str!("../integration/hosts/8xh100.json"),
        include_str!("../integration/hosts/a100-mig.json"),
        include_str!("../integration/hosts/old-driver.json"),
        include_str!("../integration/hosts/one-lost-gpu.json"),
        include_str!("../integration/hosts/slow-init.json"),
        include_str!("../integration/hosts/t4.json"),
    ];

    /// Libraries of no use but to be copied; whether the real ones load is seen in `integration/`.
    fn stand_ins(dir: &Path) -> PathBuf {
        let dir = dir.join("dist");
        fs::create_dir(&dir).unwrap();
        for name in ["libsimulated_nvml.so", "libsimulated_cuda.so", "simulated-nvidia-smi"] {
            fs::write(dir.join(name), name).unwrap();
        }
        dir
    }

    #[test]
    fn each_host_of_the_tests_is_laid_out_and_carried_by_its_libraries() {
        for (number, host) in HOSTS.iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let description: Description = serde_json::from_str(host).unwrap();
            let host = dir.path().join(number.to_string());
            lay_out(&host, &description, &stand_ins(dir.path()), DriverFiles::StandIns).unwrap();
            let root = host.canonicalize().unwrap().join("driver");
            for name in ["libnvidia-ml.so", "libcuda.so.1"] {
                let mut library = File::open(root.join(LIBRARY_DIR).join(name)).unwrap();
                let carried = Description::read_from(&mut library).unwrap().unwrap();
                assert_eq!(carried, Description { driver_root: Some(root.clone()), ..description.clone() });
            }
            for gpu in &description.gpus {
                let node = fs::metadata(host.join(format!("dev/nvidia{}", gpu.minor))).unwrap();
                assert!(node.file_type().is_char_device());
                let information = host.join("proc/driver/nvidia/gpus").join(&gpu.pci).join("information");
                assert!(fs::read_to_string(information).unwrap().contains(&gpu.uuid));
            }
        }
    }

    #[test]
    fn mig_devices_have_the_drivers_own_numbers_in_every_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut description: Description = serde_json::from_str(HOSTS[1]).unwrap();
        // A second compute instance of the first GPU instance.
        let devices = &mut description.gpus[0].mig.as_mut().unwrap().devices;
        devices.push(SimulatedMig { compute_instance: 1, ..devices[0].clone() });
        let host = dir.path().join("host");
        lay_out(&host, &description, &stand_ins(dir.path()), DriverFiles::StandIns).unwrap();
        let read = |name| fs::read_to_string(host.join("proc/driver").join(name)).unwrap();
        let minors = read("nvidia-caps/mig-minors");
        assert!(minors.contains("gpu0/gi7/access 66\ngpu0/gi7/ci0/access 67\n"), "{minors}");
        assert_eq!(minors.matches("gpu0/gi7/access 66").count(), 1);
        assert!(minors.contains("gpu0/gi7/ci1/access 68\n"), "{minors}");
        assert!(read("nvidia/capabilities/gpu0/mig/gi7/ci0/access").starts_with("DeviceFileMinor: 67\n"));
        let node = fs::metadata(host.join("dev/nvidia-caps/nvidia-cap67")).unwrap();
        assert!(node.file_type().is_char_device());
        if rustix::process::geteuid().is_root() && node.rdev() != fs::metadata("/dev/null").unwrap().rdev() {
            assert_eq!((node.rdev(), node.mode() & 0o777), (makedev(NVIDIA_CAPS, 67), 0o444));
        }
    }

    #[test]
    fn of_an_unpacked_driver_nvml_alone_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("real/usr/lib/nvidia/current");
        fs::create_dir_all(&current).unwrap();
        for name in ["libnvidia-ml.so.535.216.03", "libcuda.so.535.216.03"] {
            fs::write(current.join(name), "real").unwrap();
        }
        symlink("/etc/alternatives/x", current.join("libcuda.so.1")).unwrap();
        let description: Description = serde_json::from_str(HOSTS[5]).unwrap();
        let host = dir.path().join("host");
        let real = dir.path().join("real");
        lay_out(&host, &description, &stand_ins(dir.path()), DriverFiles::Unpacked(&real)).unwrap();
        let laid_out = host.join("driver/usr/lib/nvidia/current");
        assert_eq!(fs::read(laid_out.join("libcuda.so.535.216.03")).unwrap(), b"real");
        assert_eq!(fs::read_link(laid_out.join("libcuda.so.1")).unwrap(), Path::new("/etc/alternatives/x"));
        assert!(
            fs::read(laid_out.join("libnvidia-ml.so.535.216.03"))
                .unwrap()
                .starts_with(b"libsimulated_nvml.so")
        );
        assert_eq!(fs::read(current.join("libnvidia-ml.so.535.216.03")).unwrap(), b"real");
    }

    #[test]
    fn nothing_is_written_outside_the_directory_or_over_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let stand_ins = stand_ins(dir.path());
        let mut description: Description = serde_json::from_str(HOSTS[5]).unwrap();
        let failure = |description: &Description, host: &str| {
            lay_out(&dir.path().join(host), description, &stand_ins, DriverFiles::StandIns)
                .unwrap_err()
                .to_string()
        };
        assert!(failure(&description, "dist").contains("dist"));
        description.gpus[0].pci = "0000/../../up".into();
        assert!(failure(&description, "host").contains("0000/../../up"));
        description.gpus[0].pci = "0000:00:1e.0".into();
        description.driver = "../550".into();
        assert!(failure(&description, "host").contains("../550"));
        assert!(!dir.path().join("host").exists());
    }

    #[test]
    fn a_file_that_carries_no_description_is_no_simulated_library() {
        for bytes in
            [&b""[..], b"GPURUNSM", b"{}\xff\xff\xff\xff\0\0\0\0GPURUNSM", b"{}\x02\0\0\0\0\0\0\0GPURUNSX"]
        {
            assert_eq!(Description::read_from(&mut Cursor::new(bytes)).unwrap(), None);
        }
        assert!(Description::read_from(&mut Cursor::new(b"{}\x02\0\0\0\0\0\0\0GPURUNSM")).is_err());
    }

    #[test]
    fn a_directory_that_others_can_change_is_not_laid_out() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join("host");
        fs::create_dir(&host).unwrap();
        fs::set_permissions(&host, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_and_empty(&host).is_err(), "anyone may write");
        fs::set_permissions(&host, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(own_and_empty(&host).is_ok());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&host, Some(1234), None).unwrap();
            assert!(own_and_empty(&host).is_err(), "somebody else's");
        }
    }
}
