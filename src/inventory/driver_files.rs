//! The driver's files: which there are, by tables, and where they are, by search.
//!
//! Names follow NVIDIA's driver README ("Installed Components"); directories follow the distributions that are named.

use super::{
    driver,
    driver_root::{Found, OpenRoot},
    elf, procfs,
    snapshot::{Mtime, mtime, object},
    types::{ContainerPath, DaemonObject, DriverFile, DriverRoot, FileKind, GatedFile, Host, HostPath},
};
use crate::{
    error::{Code, Error, Result},
    formats::ldcache,
    vocabulary::{DriverCapability as Cap, GatedFeature, Version},
};
use rustix::fs::FileType;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Where libraries are looked for, first match first. Those that do not exist cost nothing.
const LIBRARY_DIRS: &[&str] = &[
    // Red Hat, SUSE, Fedora.
    "/usr/lib64",
    // Debian and Ubuntu; below nvidia/current Debian keeps what its alternatives choose from.
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu/nvidia/current",
    "/lib64",
    "/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    // GKE and Container-Optimised OS; the second is the host directory that the first is made from.
    "/usr/local/nvidia/lib64",
    "/home/kubernetes/bin/nvidia/lib64",
    // NixOS.
    "/run/opengl-driver/lib",
    // Arch; and where Red Hat and SUSE keep 32-bit libraries.
    "/usr/lib",
    "/usr/lib/nvidia",
    // 32-bit libraries of Debian, Arch and NixOS.
    "/usr/lib/i386-linux-gnu",
    "/usr/lib/i386-linux-gnu/nvidia/current",
    "/lib/i386-linux-gnu",
    "/usr/lib32",
    "/run/opengl-driver-32/lib",
];

/// Directories below a library directory that hold modules of other programs: libvdpau looks into the first.
const MODULE_DIRS: &[&str] = &["vdpau"];

/// How the files of a group are versioned.
#[derive(PartialEq)]
enum Versioned {
    /// As the driver: `libcuda.so.550.163.01`.
    WithDriver,
    /// On their own, with at least so many numbers: `libnvidia-egl-wayland.so.1.1.18`.
    Alone(usize),
}

struct LibraryGroup {
    capabilities: Cap,
    versioned: Versioned,
    names: &'static [&'static str],
}

const GRAPHICS: Cap = Cap::GRAPHICS.union(Cap::DISPLAY);
const COMPUTE: Cap = Cap::COMPUTE.union(Cap::VIDEO);

const LIBRARIES: &[LibraryGroup] = &[
    // nvidia-smi and what watches GPUs: NVML, display configuration, NVSwitch.
    LibraryGroup {
        capabilities: Cap::UTILITY,
        versioned: Versioned::WithDriver,
        names: &["libnvidia-ml", "libnvidia-cfg", "libnvidia-nscq"],
    },
    // CUDA, OpenCL, their compilers and debugger. The codecs run on CUDA, so video needs them as well.
    LibraryGroup {
        capabilities: COMPUTE,
        versioned: Versioned::WithDriver,
        names: &[
            "libcuda",
            "libcudadebugger",
            "libnvidia-opencl",
            "libnvidia-ptxjitcompiler",
            "libnvidia-fatbinaryloader",
            "libnvidia-compiler",
            "libnvidia-pkcs11",
            "libnvidia-pkcs11-openssl3",
            "libnvidia-nvvm",
            "libnvidia-tileiras",
        ],
    },
    // Shared by CUDA and OpenGL: the GPU's compiler (split out of both in 545), and buffers that GBM hands out.
    LibraryGroup {
        capabilities: COMPUTE.union(GRAPHICS),
        versioned: Versioned::WithDriver,
        names: &["libnvidia-gpucomp", "libnvidia-allocator"],
    },
    // The newer of two NVVM versions that one driver may carry; versioned by NVVM.
    LibraryGroup { capabilities: COMPUTE, versioned: Versioned::Alone(1), names: &["libnvidia-nvvm70"] },
    // Codecs, optical flow, VDPAU.
    LibraryGroup {
        capabilities: Cap::VIDEO,
        versioned: Versioned::WithDriver,
        names: &["libvdpau_nvidia", "libnvidia-encode", "libnvidia-opticalflow", "libnvcuvid"],
    },
    // OpenGL, EGL, Vulkan, ray tracing, frame capture; the last four names are of drivers without GLVND.
    LibraryGroup {
        capabilities: GRAPHICS,
        versioned: Versioned::WithDriver,
        names: &[
            "libnvidia-eglcore",
            "libnvidia-glcore",
            "libnvidia-tls",
            "libnvidia-glsi",
            "libnvidia-fbc",
            "libnvidia-ifr",
            "libnvidia-rtcore",
            "libnvoptix",
            "libGLX_nvidia",
            "libEGL_nvidia",
            "libGLESv2_nvidia",
            "libGLESv1_CM_nvidia",
            "libnvidia-glvkspirv",
            "libnvidia-cbl",
            "libnvidia-vulkan-producer",
            "libGL",
            "libEGL",
            "libGLESv1_CM",
            "libGLESv2",
        ],
    },
    // NVAPI has a version of its own, which is 1.
    LibraryGroup { capabilities: GRAPHICS, versioned: Versioned::Alone(1), names: &["libnvidia-api"] },
    // EGL's external platforms are released on their own.
    LibraryGroup {
        capabilities: GRAPHICS,
        versioned: Versioned::Alone(2),
        names: &[
            "libnvidia-egl-gbm",
            "libnvidia-egl-wayland",
            "libnvidia-egl-wayland2",
            "libnvidia-egl-xcb",
            "libnvidia-egl-xlib",
        ],
    },
    // Super sampling.
    LibraryGroup { capabilities: Cap::NGX, versioned: Versioned::WithDriver, names: &["libnvidia-ngx"] },
];

/// A library of the driver's version that no group names: a later driver has split it out of one that does (as
/// `libnvidia-gpucomp` once was), so whatever is asked for may need it.
const UNLISTED: Cap = Cap::all().difference(Cap::COMPAT32);

/// Names beside SONAME that programs open whether or not the host has made the link. Relative to the library directory.
const LINKS: &[(&str, &str)] = &[
    // Programs built without the toolkit's stub dlopen this.
    ("libcuda", "libcuda.so"),
    // GLVND's fallback when the X server does not name a vendor.
    ("libGLX_nvidia", "libGLX_indirect.so.0"),
    // ffmpeg and OpenCV open the unversioned name.
    ("libnvidia-opticalflow", "libnvidia-opticalflow.so"),
    // Mesa's libgbm finds its back end by the DRM driver's name.
    ("libnvidia-allocator", "gbm/nvidia-drm_gbm.so"),
    // The Vulkan ICD for Wayland opens the unversioned name.
    ("libnvidia-vulkan-producer", "libnvidia-vulkan-producer.so"),
];

/// Those of a library's file, as far as they are in its directory.
pub(super) fn other_names(library: &str) -> impl Iterator<Item = &'static str> {
    let stem = split(library).map_or("", |(stem, _)| stem);
    LINKS.iter().filter(move |(of, name)| *of == stem && !name.contains('/')).map(|(_, name)| *name)
}

/// Where programs are looked for: a shell's PATH, then Debian's alternatives, GKE, COS, NixOS.
const BINARY_DIRS: &[&str] = &[
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/usr/lib/nvidia/current",
    "/usr/local/nvidia/bin",
    "/home/kubernetes/bin/nvidia/bin",
    "/run/current-system/sw/bin",
];

const BINARIES: &[(Cap, &[&str])] = &[
    // Looking at GPUs and the daemons that keep them and their fabric up; IMEX shares memory between nodes.
    (
        Cap::UTILITY,
        &[
            "nvidia-smi",
            "nvidia-debugdump",
            "nvidia-persistenced",
            "nv-fabricmanager",
            "nvidia-imex",
            "nvidia-imex-ctl",
        ],
    ),
    // Multi-process service.
    (Cap::COMPUTE, &["nvidia-cuda-mps-control", "nvidia-cuda-mps-server"]),
    // Writes an X server's configuration.
    (Cap::DISPLAY, &["nvidia-xconfig"]),
];

/// What configuration below /etc and /usr/share is looked for in: there; then GKE and COS, NixOS.
const CONFIG_DIRS: &[&str] = &[
    "/etc",
    "/usr/local/share",
    "/usr/share",
    "/usr/local/nvidia/share",
    "/usr/local/nvidia",
    "/home/kubernetes/bin/nvidia",
    "/run/opengl-driver/share",
];

/// Capability, directory in the container, path below it.
const CONFIGS: &[(Cap, &str, &[&str])] = &[
    // OpenCL's loader.
    (Cap::COMPUTE, "/etc", &["OpenCL/vendors/nvidia.icd"]),
    // Vulkan's loader.
    (
        GRAPHICS,
        "/etc",
        &[
            "vulkan/icd.d/nvidia_icd.json",
            "vulkan/icd.d/nvidia_icd.x86_64.json",
            "vulkan/icd.d/nvidia_icd.aarch64.json",
            "vulkan/icd.d/nvidia_layers.json",
            "vulkan/implicit_layer.d/nvidia_layers.json",
        ],
    ),
    // EGL's vendors and external platforms, and OptiX' weights.
    (
        GRAPHICS,
        "/usr/share",
        &[
            "glvnd/egl_vendor.d/10_nvidia.json",
            "egl/egl_external_platform.d/15_nvidia_gbm.json",
            "egl/egl_external_platform.d/10_nvidia_wayland.json",
            "egl/egl_external_platform.d/09_nvidia_wayland2.json",
            "egl/egl_external_platform.d/20_nvidia_xcb.json",
            "egl/egl_external_platform.d/20_nvidia_xlib.json",
            "nvidia/nvoptix.bin",
        ],
    ),
    // The X server.
    (
        Cap::DISPLAY,
        "/usr/share",
        &["X11/xorg.conf.d/10-nvidia.conf", "X11/xorg.conf.d/nvidia-drm-outputclass.conf"],
    ),
];

/// Daemons' sockets: capability, path, and whether it is one socket or a directory of them.
const SOCKETS: &[(Cap, &str, FileType)] = &[
    (Cap::UTILITY, "/run/nvidia-persistenced/socket", FileType::Socket),
    (Cap::UTILITY, "/run/nvidia-fabricmanager/socket", FileType::Socket),
    (Cap::COMPUTE, "/tmp/nvidia-mps", FileType::Directory),
];

/// What a program of the container needs of the MPS control daemon's directory: the socket to which libcuda connects, and the pipe
/// for its messages.
///
/// The daemon of the drivers 535 and 550 gives /tmp/nvidia-mps the mode 0777, whatever the umask is. Every user can put
/// sockets there, so the directory itself is mounted only where the administrator has changed the mode.
const MPS_OBJECTS: [(&str, FileType); 2] = [("control", FileType::Socket), ("log", FileType::Fifo)];

/// What libcufile reads beside the nodes of GPUDirect Storage: its configuration, and udev's database, which tells the drive below
/// a file system.
const GATED_FILES: &[(GatedFeature, &str, FileType)] = &[
    (GatedFeature::Gds, "/etc/cufile.json", FileType::RegularFile),
    (GatedFeature::Gds, "/run/udev", FileType::Directory),
];

/// Where X servers look for modules. Debian's look into /usr/lib/nvidia, too, which leads to the last; those of other images
/// do not, so what is found there goes to the first.
const XORG_DIRS: &[&str] = &[
    "/usr/lib/xorg/modules",
    "/usr/lib64/xorg/modules",
    "/usr/lib/x86_64-linux-gnu/nvidia/xorg",
    "/usr/lib64/nvidia/xorg",
    "/usr/lib/nvidia/xorg",
    "/usr/X11R6/lib/modules",
    "/usr/X11R6/lib64/modules",
    DEBIAN_XORG_DIR,
];
const DEBIAN_XORG_DIR: &str = "/usr/lib/nvidia/current";

/// The X driver and the GLX extension, and the kind of module that each is. `{V}` is the driver's version.
const XORG_MODULES: &[(&str, &str)] =
    &[("nvidia_drv.so", "drivers"), ("libglxserver_nvidia.so.{V}", "extensions")];

/// The GPU's own firmware, which the kernel module loads by this name below one of its firmware directories.
const FIRMWARE: &str = "gsp";

/// Whether the kernel loads firmware from the mount namespace of init (`kernel_read_file_from_path_initns`, which Linux 5.10
/// surely has). Older ones load it from that of the process that opens the GPU first, which may be a container's.
fn reads_firmware_for_itself(release: &str) -> bool {
    let end = release.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(release.len());
    release[..end].parse::<Version>().is_ok_and(|version| version >= Version::of(5, 10))
}

/// A driver's ld.so.cache is 20–300 kB.
const LDCACHE_LIMIT: u64 = 16 << 20;

/// The answer of [`find`].
#[derive(Debug)]
pub struct DriverFiles {
    /// The files, libraries first, in the order of the search.
    pub files: Vec<DriverFile>,
    /// What belongs to features that a container must ask for by name.
    pub gated: Vec<GatedFile>,
    /// libnvidia-ml of this machine's class.
    pub nvml: HostPath,
    /// libcuda of this machine's class, where there is one.
    pub cuda: Option<HostPath>,
    /// What was looked at, with the mtime before the look: a later one may change the answer.
    pub watched: BTreeMap<PathBuf, Mtime>,
    /// The sockets of daemons, with the identities of the objects that were verified.
    pub objects: BTreeMap<PathBuf, Option<(u64, u64, i64, i64)>>,
}

/// Finds the files of the driver with this version.
///
/// # Errors
/// [`Code::VersionMismatch`] when the libraries are another version's, [`Code::NvmlMissing`] when there are none.
pub fn find(host: &Host, root: &OpenRoot<'_>, version: &Version) -> Result<DriverFiles> {
    let mut search =
        Search { host, root, version, files: Vec::new(), watched: BTreeMap::new(), objects: BTreeMap::new() };
    let others = search.libraries();
    let library = |stem: &str| {
        let name = format!("{stem}.so.{version}");
        let native = |file: &&DriverFile| matches!(&file.kind, FileKind::Library { name: n, is_32bit: false, .. } if *n == name);
        search.files.iter().find(native).map(|file| file.path.clone())
    };
    let shown = host.driver_root.0.display().to_string();
    let (nvml, cuda) = match (library("libnvidia-ml"), library("libcuda")) {
        (Some(nvml), cuda) => (nvml, cuda),
        (None, _) if !others.is_empty() => return Err(driver::mismatch(version, &others, &shown)),
        (None, _) => {
            return Err(Error::new(Code::NvmlMissing, format!("the driver's library libnvidia-ml.so.{version} was not found in {shown}"))
                .cause("the kernel module is loaded, but the driver's user-space libraries are not installed where they are looked for")
                .fix("install the driver's libraries (Debian: libnvidia-ml1 libcuda1; Ubuntu: libnvidia-compute-…), or name the driver's root with --driver-root"));
        }
    };
    search.binaries();
    search.firmware();
    search.configs();
    search.sockets();
    search.xorg_modules();
    let gated = search.gated_files();
    let Search { files, watched, objects, .. } = search;
    Ok(DriverFiles { files, gated, nvml, cuda, watched, objects })
}

/// Where libraries are looked for on the host, whether or not a driver is there.
pub fn library_dirs(root: &DriverRoot) -> impl Iterator<Item = PathBuf> {
    LIBRARY_DIRS.iter().map(|dir| root.host_path(&ContainerPath(dir.into())).0)
}

struct Search<'a> {
    host: &'a Host,
    root: &'a OpenRoot<'a>,
    version: &'a Version,
    files: Vec<DriverFile>,
    watched: BTreeMap<PathBuf, Mtime>,
    objects: BTreeMap<PathBuf, Option<(u64, u64, i64, i64)>>,
}

impl Search<'_> {
    /// Adds the libraries; answers with the other driver versions of which there are libraries.
    fn libraries(&mut self) -> Vec<Version> {
        let mut dirs: Vec<PathBuf> = Vec::new();
        let mut queue: Vec<PathBuf> =
            LIBRARY_DIRS.iter().map(PathBuf::from).chain(self.cached_dirs()).collect();
        // Each file with all names that lead to it, in the order in which the files were found.
        let mut order: Vec<HostPath> = Vec::new();
        let mut names: BTreeMap<HostPath, BTreeSet<String>> = BTreeMap::new();
        while !queue.is_empty() {
            for dir in std::mem::take(&mut queue) {
                let Some(dir) = self.directory(&dir).filter(|dir| !dirs.contains(dir)) else { continue };
                dirs.push(dir.clone());
                queue.extend(MODULE_DIRS.iter().map(|below| dir.join(below)));
                for name in self.root.names(&dir) {
                    if self.group_of(&name).is_none() && !is_link_name(&name) {
                        continue;
                    }
                    let Some(found) = self.root.find(&dir.join(&name)) else { continue };
                    if found.kind != FileType::RegularFile {
                        continue;
                    }
                    // Debian's other branches (nvidia/tesla-470) and Nix' store are reached by links only.
                    if let Some(inside) =
                        self.inside(&found.path).and_then(|path| path.parent().map(PathBuf::from))
                    {
                        queue.push(inside);
                    }
                    if !names.contains_key(&found.path) {
                        order.push(found.path.clone());
                    }
                    names.entry(found.path).or_default().insert(name);
                }
            }
        }
        let mut others = BTreeMap::new();
        let mut taken = BTreeSet::new();
        for path in order {
            let Some(name) = path.0.file_name().and_then(OsStr::to_str).map(String::from) else { continue };
            if let Some(version) = self.other_version(&name) {
                others.insert(version.as_str().to_owned(), version);
            }
            let Some(capabilities) = self.group_of(&name) else { continue };
            let Some(facts) =
                self.inside(&path).and_then(|path| self.root.open_file(&path)).and_then(elf::read)
            else {
                tracing::debug!(path = %path.0.display(), "not a shared library of this machine");
                continue;
            };
            if !taken.insert((name.clone(), facts.is_32bit)) {
                continue;
            }
            let stem = split(&name).map_or("", |(stem, _)| stem);
            let mut links = names.remove(&path).unwrap_or_default();
            links.extend(LINKS.iter().filter(|(of, _)| *of == stem).map(|(_, link)| (*link).to_owned()));
            links.retain(|link| *link != name && Some(link) != facts.soname.as_ref());
            // libvdpau looks for its back ends in a directory of their own, wherever Debian keeps the file itself.
            let subdirectory = (stem == "libvdpau_nvidia").then(|| PathBuf::from("vdpau"));
            self.files.push(DriverFile {
                path,
                capabilities,
                kind: FileKind::Library {
                    name,
                    soname: facts.soname,
                    links: links.into_iter().collect(),
                    is_32bit: facts.is_32bit,
                    subdirectory,
                },
                daemon: None,
            });
        }
        others.into_values().collect()
    }

    /// The capabilities of a library's file name, if the name is that of a library of this driver.
    fn group_of(&self, name: &str) -> Option<Cap> {
        let (stem, version) = split(name)?;
        let with_driver = version == self.version.as_str();
        let listed = LIBRARIES.iter().find(|group| group.names.contains(&stem));
        match listed.map(|group| (group.capabilities, &group.versioned)) {
            Some((capabilities, Versioned::WithDriver)) if with_driver => Some(capabilities),
            Some((capabilities, Versioned::Alone(numbers))) => {
                let enough = version.split('.').count() >= *numbers && version.parse::<Version>().is_ok();
                enough.then_some(capabilities)
            }
            None if with_driver => Some(UNLISTED),
            _ => None,
        }
    }

    /// The version of another driver, if the name is that of one of its two libraries that no driver is without.
    fn other_version(&self, name: &str) -> Option<Version> {
        let (stem, version) = split(name)?;
        let version: Version = version.parse().ok().filter(|_| version.contains('.'))?;
        // Driver versions began at 1.0-7664; none with a first number below 100 supports containers. libcuda.so.1.1 is WSL's.
        (["libcuda", "libnvidia-ml"].contains(&stem) && version.major() >= 100 && version != *self.version)
            .then_some(version)
    }

    /// The directories of libcuda and NVML in the driver root's ld.so.cache.
    fn cached_dirs(&mut self) -> Vec<PathBuf> {
        let path = Path::new("/etc/ld.so.cache");
        self.watch(path);
        let Some(bytes) = self.root.read(path, LDCACHE_LIMIT) else { return Vec::new() };
        let entries = ldcache::Cache::parse(&bytes).unwrap_or_default().entries;
        let ours = |name: &[u8]| name.starts_with(b"libcuda.so") || name.starts_with(b"libnvidia-ml.so");
        let dirs: BTreeSet<&Path> = entries
            .iter()
            .filter(|entry| ours(&entry.name))
            .filter_map(|entry| Path::new(OsStr::from_bytes(&entry.path)).parent())
            .collect();
        dirs.into_iter().map(PathBuf::from).collect()
    }

    fn binaries(&mut self) {
        for (capabilities, names) in BINARIES {
            for name in *names {
                if let Some(path) = self.first(BINARY_DIRS, name, FileType::RegularFile) {
                    self.add(path, *capabilities, FileKind::Binary((*name).into()));
                }
            }
        }
    }

    fn firmware(&mut self) {
        let release = procfs::read(&self.host.proc.join("sys/kernel/osrelease")).unwrap_or_default();
        if reads_firmware_for_itself(&release) {
            return;
        }
        // The kernel's own order (kernel documentation, "Firmware search paths"); then NixOS.
        let custom = procfs::read(&self.host.sys.join("module/firmware_class/parameters/path"));
        let dirs = [
            custom.filter(|path| !path.is_empty()).unwrap_or_default(),
            format!("/lib/firmware/updates/{release}"),
            "/lib/firmware/updates".into(),
            format!("/lib/firmware/{release}"),
            "/lib/firmware".into(),
            "/run/current-system/firmware".into(),
        ];
        let below = format!("nvidia/{}", self.version);
        for dir in dirs.iter().filter(|dir| !dir.is_empty()) {
            let Some(dir) = self.directory(&Path::new(dir).join(&below)) else { continue };
            for name in self.root.names(&dir) {
                let ours =
                    name.starts_with(FIRMWARE) && Path::new(&name).extension() == Some(OsStr::new("bin"));
                let target = ContainerPath(Path::new("/lib/firmware").join(&below).join(&name));
                let known = |file: &DriverFile| file.kind == FileKind::Firmware(target.clone());
                if !ours || self.files.iter().any(known) {
                    continue;
                }
                if let Some(found) =
                    self.root.find(&dir.join(&name)).filter(|found| found.kind == FileType::RegularFile)
                {
                    self.add(found.path, UNLISTED, FileKind::Firmware(target));
                }
            }
        }
    }

    fn configs(&mut self) {
        for (capabilities, target, names) in CONFIGS {
            for name in *names {
                if let Some(path) = self.first(CONFIG_DIRS, name, FileType::RegularFile) {
                    self.add(
                        path,
                        *capabilities,
                        FileKind::Config(ContainerPath(Path::new(target).join(name))),
                    );
                }
            }
        }
    }

    fn sockets(&mut self) {
        for (capabilities, path, kind) in SOCKETS {
            let inside = Path::new(path);
            let host = self.host.driver_root.host_path(&ContainerPath(path.into())).0;
            let before = object(&host);
            // Its directory says who can replace it. One that every user writes to changes all the time, and never says more.
            if let Some(directory) = host.parent()
                && rustix::fs::stat(directory).is_ok_and(|stat| stat.st_mode & 0o002 == 0)
            {
                self.objects.insert(directory.to_owned(), object(directory));
            }
            // Anyone may make /tmp/nvidia-mps: as a link to a directory of root's, say. Only root's own is mounted.
            let trusted = |uid| uid == 0 || !path.starts_with("/tmp/");
            let found = self.root.find_no_link(inside);
            let found = found.filter(|found| found.kind == *kind && trusted(found.uid));
            let is_open = *kind == FileType::Directory
                && rustix::fs::stat(&host).is_ok_and(|stat| stat.st_mode & 0o1002 == 0o002);
            if found.is_some() && is_open {
                self.mps_objects(*capabilities, inside);
                continue;
            }
            self.objects.insert(host, before);
            if let Some(found) = found {
                self.add_daemon(found, *capabilities, inside, before);
            }
        }
    }

    /// The objects of an MPS control daemon of root in a directory that every user may write. The directory is not recorded,
    /// because other users could change it all the time.
    fn mps_objects(&mut self, capabilities: Cap, directory: &Path) {
        for (name, kind) in MPS_OBJECTS {
            let inside = directory.join(name);
            let host = self.host.driver_root.host_path(&ContainerPath(inside.clone())).0;
            let before = object(&host);
            self.objects.insert(host, before);
            let found = self.root.find_no_link(&inside);
            if let Some(found) = found.filter(|found| found.kind == kind && found.uid == 0) {
                self.add_daemon(found, capabilities, &inside, before);
            }
        }
    }

    fn add_daemon(
        &mut self,
        found: Found,
        capabilities: Cap,
        path: &Path,
        before: Option<(u64, u64, i64, i64)>,
    ) {
        let (device, inode) = before.map_or((0, 0), |(device, inode, ..)| (device, inode));
        let daemon = Some(DaemonObject { device, inode, is_replaceable: self.is_replaceable(path) });
        let kind = FileKind::Socket(ContainerPath(path.into()));
        self.files.push(DriverFile { path: found.path, capabilities, kind, daemon });
    }

    /// Whether a user other than root may write to a directory on the way to a path of the driver root.
    fn is_replaceable(&self, path: &Path) -> bool {
        let owner = self.root.find(Path::new("/")).map_or(0, |found| found.uid);
        path.ancestors().skip(1).any(|directory| {
            let path = self.host.driver_root.host_path(&ContainerPath(directory.into())).0;
            rustix::fs::stat(path).is_ok_and(|stat| {
                let group_writes = stat.st_mode & 0o020 != 0 && stat.st_gid != 0;
                stat.st_mode & 0o002 != 0 || group_writes || ![0, owner].contains(&stat.st_uid)
            })
        })
    }

    fn gated_files(&mut self) -> Vec<GatedFile> {
        let mut files = Vec::new();
        for (feature, path, kind) in GATED_FILES {
            self.watch(Path::new(path));
            let found = self.root.find(Path::new(path)).filter(|found| found.kind == *kind);
            files.extend(found.map(|found| GatedFile {
                feature: *feature,
                path: found.path,
                container_path: ContainerPath(path.into()),
            }));
        }
        files
    }

    fn xorg_modules(&mut self) {
        for (module, kind) in XORG_MODULES {
            let module = module.replace("{V}", self.version.as_str());
            let places = XORG_DIRS.iter().flat_map(|dir| {
                let dir = Path::new(dir);
                [dir.join(kind), dir.join("updates").join(kind), dir.into()]
            });
            for path in places.map(|place| place.join(&module)) {
                let Some(found) = self.root.find(&path).filter(|found| found.kind == FileType::RegularFile)
                else {
                    continue;
                };
                let target = if path.starts_with(DEBIAN_XORG_DIR) {
                    Path::new(XORG_DIRS[0]).join(kind).join(&module)
                } else {
                    path
                };
                self.add(found.path, Cap::DISPLAY, FileKind::XorgModule(ContainerPath(target)));
                break;
            }
        }
    }

    fn add(&mut self, path: HostPath, capabilities: Cap, kind: FileKind) {
        self.files.push(DriverFile { path, capabilities, kind, daemon: None });
    }

    /// The first of `dirs` that has `name`; every directory on the way is watched.
    fn first(&mut self, dirs: &[&str], name: &str, kind: FileType) -> Option<HostPath> {
        dirs.iter().find_map(|dir| {
            let path = Path::new(dir).join(name);
            path.parent().map(|dir| self.directory(dir));
            self.root.find(&path).filter(|found| found.kind == kind).map(|found| found.path)
        })
    }

    /// `dir` inside the root without links, watched; `None` when it is not a directory.
    fn directory(&mut self, dir: &Path) -> Option<PathBuf> {
        let found = self.root.find(dir).filter(|found| found.kind == FileType::Directory)?;
        let inside = self.inside(&found.path)?;
        self.watched.entry(found.path.0).or_insert_with_key(|path| mtime(path));
        Some(inside)
    }

    fn inside(&self, path: &HostPath) -> Option<PathBuf> {
        self.host.driver_root.container_path(path).map(|path| path.0)
    }

    fn watch(&mut self, path: &Path) {
        let path = self.host.driver_root.host_path(&ContainerPath(path.into())).0;
        self.watched.entry(path).or_insert_with_key(|path| mtime(path));
    }
}

/// `libcuda.so.550.163.01` is `libcuda` and `550.163.01`.
fn split(name: &str) -> Option<(&str, &str)> {
    name.split_once(".so.").filter(|(stem, _)| stem.starts_with("lib"))
}

/// Whether the name may be a link to a library of the driver: `libcuda.so`, `libcuda.so.1`.
fn is_link_name(name: &str) -> bool {
    let stem = split(name).map(|(stem, _)| stem).or_else(|| name.strip_suffix(".so"));
    stem.is_some_and(|stem| {
        stem.starts_with("libnvidia-") || LIBRARIES.iter().any(|group| group.names.contains(&stem))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::elf::tests::compile;
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
    };

    const V: &str = "550.163.01";

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(tree.path("/")).unwrap();
            tree
        }
        fn path(&self, inside: &str) -> PathBuf {
            self.0.path().join("driver").join(inside.trim_start_matches('/'))
        }
        fn library(&self, inside: &str, soname: &str) {
            compile(&self.path(inside), &[&format!("-Wl,-soname,{soname}")]);
        }
        fn library_32bit(&self, inside: &str, soname: &str) {
            compile(&self.path(inside), &["-m32", &format!("-Wl,-soname,{soname}")]);
        }
        fn file(&self, inside: &str) {
            fs::create_dir_all(self.path(inside).parent().unwrap()).unwrap();
            fs::write(self.path(inside), "x").unwrap();
        }
        fn link(&self, inside: &str, target: &str) {
            fs::create_dir_all(self.path(inside).parent().unwrap()).unwrap();
            symlink(target, self.path(inside)).unwrap();
        }
        fn find(&self) -> Result<DriverFiles> {
            let host = Host::simulated(self.0.path());
            find(&host, &host.driver_root.open().unwrap(), &V.parse().unwrap())
        }
        fn paths(&self) -> Vec<String> {
            let inside =
                |file: &DriverFile| file.path.0.strip_prefix(self.path("/")).unwrap().display().to_string();
            self.find().unwrap().files.iter().map(inside).collect()
        }
    }

    fn library<'a>(files: &'a [DriverFile], wanted: &str) -> &'a DriverFile {
        files
            .iter()
            .find(|file| matches!(&file.kind, FileKind::Library { name, .. } if name == wanted))
            .unwrap()
    }

    #[test]
    fn flat_layouts_are_found() {
        for dir in [
            "/usr/lib64",
            "/usr/lib/x86_64-linux-gnu",
            "/usr/local/nvidia/lib64",
            "/home/kubernetes/bin/nvidia/lib64",
        ] {
            let tree = Tree::new();
            tree.library(&format!("{dir}/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
            tree.library(&format!("{dir}/libcuda.so.{V}"), "libcuda.so.1");
            tree.link(&format!("{dir}/libcuda.so.1"), &format!("libcuda.so.{V}"));
            tree.file(&format!("{dir}/libc.so.6"));
            let found = tree.find().unwrap();
            assert_eq!(found.files.len(), 2, "{dir}");
            let DriverFile { path, capabilities, kind, .. } =
                library(&found.files, &format!("libcuda.so.{V}"));
            assert_eq!(*path.0, tree.path(&format!("{dir}/libcuda.so.{V}")));
            assert_eq!(Some(path), found.cuda.as_ref());
            assert_eq!(*capabilities, Cap::COMPUTE | Cap::VIDEO);
            let FileKind::Library { soname, links, is_32bit, subdirectory, .. } = kind else { panic!() };
            assert_eq!(soname.as_deref(), Some("libcuda.so.1"));
            assert_eq!(*links, ["libcuda.so"]);
            assert_eq!((*is_32bit, subdirectory), (false, &None));
        }
    }

    #[test]
    fn debians_alternatives_lead_to_files_inside_the_root() {
        let tree = Tree::new();
        let lib = "/usr/lib/x86_64-linux-gnu";
        // A branch whose directory no list of ours names.
        let real = "/usr/lib/x86_64-linux-gnu/nvidia/tesla-550";
        for (stem, soname) in [("libnvidia-ml", "libnvidia-ml.so.1"), ("libcuda", "libcuda.so.1")] {
            tree.library(&format!("{real}/{stem}.so.{V}"), soname);
            tree.link(&format!("{real}/{soname}"), &format!("{stem}.so.{V}"));
            tree.link(&format!("/etc/alternatives/glx--{soname}"), &format!("{real}/{soname}"));
            tree.link(&format!("{lib}/{soname}"), &format!("/etc/alternatives/glx--{soname}"));
        }
        // Only in the branch's own directory, and its development link only in the public one.
        tree.library(&format!("{real}/libnvidia-encode.so.{V}"), "libnvidia-encode.so.1");
        tree.link(&format!("{lib}/libnvidia-encode.so"), &format!("{real}/libnvidia-encode.so.{V}"));
        let found = tree.find().unwrap();
        assert_eq!(found.nvml.0, tree.path(&format!("{real}/libnvidia-ml.so.{V}")));
        assert_eq!(found.files.len(), 3);
        let FileKind::Library { links, .. } =
            &library(&found.files, &format!("libnvidia-encode.so.{V}")).kind
        else {
            panic!()
        };
        assert_eq!(*links, ["libnvidia-encode.so"]);
        assert!(found.watched.contains_key(&tree.path(real)));
    }

    #[test]
    fn nixos_links_into_its_store() {
        let tree = Tree::new();
        let store = "/nix/store/abc-nvidia-x11/lib";
        tree.library(&format!("{store}/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        tree.link("/run/opengl-driver", "/nix/store/def-graphics-drivers");
        for name in [format!("libnvidia-ml.so.{V}"), "libnvidia-ml.so.1".into()] {
            tree.link(&format!("/nix/store/def-graphics-drivers/lib/{name}"), &format!("{store}/{name}"));
        }
        tree.link(&format!("{store}/libnvidia-ml.so.1"), &format!("libnvidia-ml.so.{V}"));
        assert_eq!(tree.paths(), [format!("nix/store/abc-nvidia-x11/lib/libnvidia-ml.so.{V}")]);
    }

    #[test]
    fn a_directory_that_only_the_loaders_cache_knows_is_searched() {
        let tree = Tree::new();
        tree.library(&format!("/opt/gpu/lib/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        assert_eq!(tree.find().unwrap_err().code(), Code::NvmlMissing);
        tree.file("/etc/ld.so.conf");
        fs::write(tree.path("/etc/ld.so.conf"), "/opt/gpu/lib\n").unwrap();
        let ldconfig = ["/sbin/ldconfig", "/usr/sbin/ldconfig"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .unwrap();
        let status = std::process::Command::new(ldconfig).arg("-r").arg(tree.path("/")).status().unwrap();
        assert!(status.success());
        assert_eq!(tree.paths(), [format!("opt/gpu/lib/libnvidia-ml.so.{V}")]);
    }

    #[test]
    fn libraries_of_both_classes_are_told_apart_and_foreign_files_are_left_out() {
        let tree = Tree::new();
        tree.library(&format!("/usr/lib64/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        tree.library_32bit(&format!("/usr/lib/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        // The same library in a second directory, and a text file with a library's name.
        tree.library(&format!("/usr/local/nvidia/lib64/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        tree.file(&format!("/usr/lib64/libcuda.so.{V}"));
        let found = tree.find().unwrap();
        let classes: Vec<bool> = found
            .files
            .iter()
            .map(|file| matches!(file.kind, FileKind::Library { is_32bit: true, .. }))
            .collect();
        assert_eq!(classes, [false, true]);
        assert_eq!(found.nvml.0, tree.path(&format!("/usr/lib64/libnvidia-ml.so.{V}")));
        assert_eq!(found.cuda, None);
    }

    #[test]
    fn each_library_has_its_capabilities_links_and_place() {
        let tree = Tree::new();
        for (name, soname) in [
            ("libnvidia-ml.so.550.163.01", "libnvidia-ml.so.1"),
            ("vdpau/libvdpau_nvidia.so.550.163.01", "libvdpau_nvidia.so.1"),
            ("libGLX_nvidia.so.550.163.01", "libGLX_nvidia.so.0"),
            ("libnvidia-allocator.so.550.163.01", "libnvidia-allocator.so.1"),
            ("libnvidia-egl-wayland.so.1.1.18", "libnvidia-egl-wayland.so.1"),
            ("libnvidia-something-new.so.550.163.01", "libnvidia-something-new.so.1"),
            ("libnvidia-api.so.1", "libnvidia-api.so.1"),
            ("libGL.so.1.7.0", "libGL.so.1"),
            ("libnvidia-egl-wayland.so.1", "libnvidia-egl-wayland.so.1"),
        ] {
            tree.library(&format!("/usr/lib64/{name}"), soname);
        }
        let files = tree.find().unwrap().files;
        let fact = |name| {
            let file = library(&files, name);
            let FileKind::Library { links, subdirectory, .. } = &file.kind else { panic!() };
            (file.capabilities, links.join(" "), subdirectory.clone())
        };
        assert_eq!(fact("libvdpau_nvidia.so.550.163.01"), (Cap::VIDEO, String::new(), Some("vdpau".into())));
        assert_eq!(fact("libGLX_nvidia.so.550.163.01"), (GRAPHICS, "libGLX_indirect.so.0".into(), None));
        assert_eq!(
            fact("libnvidia-allocator.so.550.163.01"),
            (COMPUTE | GRAPHICS, "gbm/nvidia-drm_gbm.so".into(), None)
        );
        assert_eq!(fact("libnvidia-egl-wayland.so.1.1.18").0, GRAPHICS);
        assert_eq!(fact("libnvidia-something-new.so.550.163.01").0, UNLISTED);
        assert_eq!(fact("libnvidia-api.so.1").0, GRAPHICS);
        assert_eq!(files.len(), 7, "GLVND's libGL and a platform with one number are not the driver's");
    }

    #[test]
    fn libraries_of_another_version_are_a_mismatch_that_says_so() {
        let tree = Tree::new();
        tree.library("/usr/lib64/libcuda.so.535.216.03", "libcuda.so.1");
        tree.library("/usr/lib64/libnvidia-ml.so.535.216.03", "libnvidia-ml.so.1");
        let error = tree.find().unwrap_err();
        assert_eq!(error.code(), Code::VersionMismatch);
        assert!(error.what().contains("550.163.01") && error.what().contains("535.216.03"), "{error}");
        assert!(error.fix_line().contains("reboot"));
        // With the right ones beside them they do no harm.
        tree.library(&format!("/usr/local/nvidia/lib64/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        assert_eq!(tree.find().unwrap().files.len(), 1);
    }

    #[test]
    fn firmware_is_a_containers_business_on_old_kernels_alone() {
        for (release, itself) in [
            ("", false),
            ("x", false),
            ("4.18.0-553.el8_10.x86_64", false),
            ("5.4.0-200-generic", false),
            ("5.10.0", true),
            ("6.1.0-50-cloud-amd64", true),
            ("6.18", true),
        ] {
            assert_eq!(reads_firmware_for_itself(release), itself, "{release}");
        }
    }

    #[test]
    fn programs_firmware_configuration_sockets_and_x_modules_are_found() {
        let tree = Tree::new();
        tree.library(&format!("/usr/lib64/libnvidia-ml.so.{V}"), "libnvidia-ml.so.1");
        tree.file("/usr/lib/nvidia/current/nvidia-smi");
        tree.link("/usr/bin/nvidia-smi", "/usr/lib/nvidia/current/nvidia-smi");
        tree.file("/usr/local/nvidia/bin/nvidia-cuda-mps-control");
        tree.file(&format!("/lib/firmware/nvidia/{V}/gsp_ga10x.bin"));
        tree.file(&format!("/lib/firmware/nvidia/{V}/readme.txt"));
        tree.file("/lib/firmware/nvidia/535.216.03/gsp_ga10x.bin");
        tree.file("/usr/share/vulkan/icd.d/nvidia_icd.json");
        tree.file("/usr/lib/nvidia/current/nvidia_drv.so");
        tree.file(&format!("/usr/lib64/xorg/modules/extensions/libglxserver_nvidia.so.{V}"));
        fs::create_dir_all(tree.path("/run/nvidia-persistenced")).unwrap();
        let _socket = UnixListener::bind(tree.path("/run/nvidia-persistenced/socket")).unwrap();
        fs::create_dir_all(tree.path("/tmp")).unwrap();
        // As a hostile user would make it.
        tree.link("/tmp/nvidia-mps", "/lib/firmware");
        let found = tree.find().unwrap();
        let kinds: Vec<_> =
            found.files.iter().skip(1).map(|file| (file.capabilities, file.kind.clone())).collect();
        let at = |path: &str| ContainerPath(path.into());
        let wanted = [
            (Cap::UTILITY, FileKind::Binary("nvidia-smi".into())),
            (Cap::COMPUTE, FileKind::Binary("nvidia-cuda-mps-control".into())),
            (UNLISTED, FileKind::Firmware(at(&format!("/lib/firmware/nvidia/{V}/gsp_ga10x.bin")))),
            (GRAPHICS, FileKind::Config(at("/etc/vulkan/icd.d/nvidia_icd.json"))),
            (Cap::UTILITY, FileKind::Socket(at("/run/nvidia-persistenced/socket"))),
            (Cap::DISPLAY, FileKind::XorgModule(at("/usr/lib/xorg/modules/drivers/nvidia_drv.so"))),
            (
                Cap::DISPLAY,
                FileKind::XorgModule(at(&format!(
                    "/usr/lib64/xorg/modules/extensions/libglxserver_nvidia.so.{V}"
                ))),
            ),
        ];
        assert_eq!(kinds, wanted);
        assert_eq!(found.files[1].path.0, tree.path("/usr/lib/nvidia/current/nvidia-smi"));
        assert!(found.objects.contains_key(&tree.path("/tmp/nvidia-mps")));
        if rustix::process::geteuid().is_root() {
            fs::remove_file(tree.path("/tmp/nvidia-mps")).unwrap();
            fs::create_dir(tree.path("/tmp/nvidia-mps")).unwrap();
            assert!(
                tree.find().unwrap().files.iter().any(|f| f.kind == FileKind::Socket(at("/tmp/nvidia-mps")))
            );
            // As the daemon of the drivers 535 and 550 leaves it.
            let _daemon = UnixListener::bind(tree.path("/tmp/nvidia-mps/control")).unwrap();
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            fs::set_permissions(tree.path("/tmp/nvidia-mps"), open).unwrap();
            let sockets = || {
                let found = tree.find().unwrap();
                let sockets = found.files.into_iter().filter_map(|file| match file.kind {
                    FileKind::Socket(path) if path.0.starts_with("/tmp") => Some(path.0),
                    _ => None,
                });
                (sockets.collect::<Vec<_>>(), found.objects)
            };
            let (found, objects) = sockets();
            assert_eq!(found, [Path::new("/tmp/nvidia-mps/control")]);
            assert!(!objects.contains_key(&tree.path("/tmp/nvidia-mps")), "every user can change it");
            let control = tree.path("/tmp/nvidia-mps/control");
            assert!(objects[&control].is_some() && objects[&tree.path("/tmp/nvidia-mps/log")].is_none());
            let stranger = Some(rustix::fs::Uid::from_raw(1234));
            rustix::fs::chown(&control, stranger, None).unwrap();
            assert!(sockets().0.is_empty(), "another user's socket");
            fs::remove_file(&control).unwrap();
            std::os::unix::fs::symlink("/run/nvidia-persistenced/socket", &control).unwrap();
            assert!(sockets().0.is_empty(), "a link");
            rustix::fs::chown(tree.path("/tmp/nvidia-mps"), Some(rustix::fs::Uid::from_raw(1234)), None)
                .unwrap();
            assert!(
                !tree.find().unwrap().files.iter().any(|f| f.kind == FileKind::Socket(at("/tmp/nvidia-mps")))
            );
        }
    }
}
