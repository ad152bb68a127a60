//! Decides where in a container each part of an injection goes, depending on what already exists there. The launcher, the
//! runtime, the prestart hook and the CDI hook share these rules.
//!
//! * Nothing is written to a volume. Existing paths of a volume can be mounted over, in the container's own mount namespace.
//! * The driver's directory goes to /usr/local/nvidia, over a volume that is mounted exactly there. Where a volume or a file is in
//!   the way, it goes to /nvidia-driver.
//! * The loader's cache is written into the root, or mounted over the cache of a volume. Where neither is possible, each library
//!   gets a link in a directory that the loader searches after its cache. The CDI hook sees the root with its volumes alone, and
//!   so not the image's cache below one: it always makes links then.
//! * Device nodes are made in the container's own /dev. A volume over /dev must have them, or the container does not start.
//! * Everything else is optional: if it has no place, it is left out with a note.

use super::{
    loader::{self, COMPAT_DIR, LD_SO_CACHE, Prepared, SmallFile},
    rootfs::{DirectoryPlace, Layers, Mounts, Place},
};
use crate::{
    error::{Code, Error, Result},
    inventory::{ContainerPath, DeviceNode},
    plan::{DRIVER_DIR, Injection, Mount, OTHER_DRIVER_DIR, Symlink},
};
use rustix::fs::FileType;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

/// The paths of an injection in one container. No path has a link on its way.
#[derive(Debug, Default)]
pub struct Placement {
    /// Where the driver's directory is mounted.
    pub driver_dir: PathBuf,
    /// Host files and sockets. The mount point exists, or can be made on the root or in memory.
    pub mounts: Vec<Mount>,
    /// Device nodes to make or mount, without nodes that a volume already has.
    pub nodes: Vec<DeviceNode>,
    /// Device nodes that a volume has already.
    pub nodes_of_volumes: Vec<DeviceNode>,
    /// Small files to write into the root.
    pub files: Vec<SmallFile>,
    /// Small files to mount, over a file of a volume or in memory.
    pub covers: Vec<SmallFile>,
    /// Links in the driver's directory, in /dev and in the root.
    pub symlinks: Vec<Symlink>,
    /// Parts that were left out and the reasons, one sentence each.
    pub notes: Vec<String>,
}

/// The program that mounts the driver's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverMount {
    /// gpurun, which can choose another directory.
    ByUs,
    /// An engine has mounted it already, as a CDI spec says.
    Done,
}

/// Places everything.
///
/// # Errors
/// [`Code::DeviceNodeMissing`] if a volume over /dev has no node of a GPU, and those of [`loader::prepare`].
pub fn place(
    root: &Layers,
    mounts: &Mounts,
    injection: &Injection,
    driver_mount: DriverMount,
) -> Result<Placement> {
    let mut placer =
        Placer { root, mounts, driver_mount, directories: HashMap::new(), placement: Placement::default() };
    let mut injection = injection.clone();
    let driver_dir = placer.driver_dir(&injection);
    if driver_dir != Path::new(DRIVER_DIR) {
        injection = injection.relocated(&driver_dir);
    }
    placer.placement.driver_dir = driver_dir;
    // A volume may hide the image's own CUDA libraries.
    let has_compat = matches!(mounts.place(root, Path::new(COMPAT_DIR)), Place::Root { .. });
    let Prepared { files, symlinks, without_cache } = loader::prepare(root, &injection, has_compat)?;
    placer.loader_files(files, &without_cache);
    for file in injection.files {
        placer.file(SmallFile {
            path: file.path.0,
            content: file.content.into_bytes(),
            mode: 0o444,
            is_needed: false,
        });
    }
    for symlink in symlinks {
        placer.symlink(symlink);
    }
    for mount in injection.mounts {
        placer.mount(mount);
    }
    injection.devices.into_iter().try_for_each(|node| placer.node(node))?;
    Ok(placer.placement)
}

struct Placer<'a> {
    root: &'a Layers,
    mounts: &'a Mounts,
    driver_mount: DriverMount,
    /// Cache of directory lookups: a dozen links go to the same directory.
    directories: HashMap<PathBuf, Option<DirectoryPlace>>,
    placement: Placement,
}

impl Placer<'_> {
    fn note(&mut self, note: String) {
        self.placement.notes.push(note);
    }

    /// Looks up a name in a directory, without following a link.
    fn entry(&mut self, path: &Path) -> Place {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Place::Nowhere };
        let look = || self.mounts.directory(self.root, parent);
        let directory = self.directories.entry(parent.into()).or_insert_with(look);
        directory.as_ref().map_or(Place::Nowhere, |directory| self.mounts.place_in(directory, name))
    }

    fn is_drivers(&self, path: &Path) -> bool {
        path.starts_with(&self.placement.driver_dir)
    }

    /// Where the driver's directory can be mounted.
    fn driver_dir(&mut self, injection: &Injection) -> PathBuf {
        let wanted = Path::new(DRIVER_DIR);
        let has_driver = injection.mounts.iter().any(|mount| mount.target.0.starts_with(wanted));
        let place = self.mounts.place(self.root, wanted);
        let in_way = match &place {
            Place::Root { path } if !self.root.is_file(path) => return path.clone(),
            Place::Memory { path, .. } => return path.clone(),
            Place::Volume { path, is_mount_point, found, .. } => {
                let is_directory = found.is_none_or(|found| found == FileType::Directory);
                if *is_mount_point && is_directory {
                    if has_driver {
                        self.note(format!("the volume at {DRIVER_DIR} is covered by the driver"));
                    }
                    return path.clone();
                }
                "a volume is"
            }
            Place::Root { .. } | Place::Nowhere => {
                "a file, a loop of links or a file system of the kernel is"
            }
        };
        if self.driver_mount == DriverMount::Done || !has_driver {
            return place.path().unwrap_or(wanted).to_path_buf();
        }
        self.note(format!("the driver is in {OTHER_DRIVER_DIR}: {in_way} in the way of {DRIVER_DIR}"));
        OTHER_DRIVER_DIR.into()
    }

    fn loader_files(&mut self, files: Vec<SmallFile>, without_cache: &[Symlink]) {
        for file in files {
            let is_cache = file.path == Path::new(LD_SO_CACHE);
            if self.file(file) || !is_cache {
                continue;
            }
            let before = self.placement.symlinks.len();
            for symlink in without_cache {
                self.symlink(symlink.clone());
            }
            if self.placement.symlinks.len() == before {
                let directory = self.placement.driver_dir.join("lib64");
                self.note(format!(
                    "the loader does not find the driver: volumes lie over its cache and its directories; set \
                     LD_LIBRARY_PATH={}",
                    directory.display()
                ));
            }
        }
    }

    /// Whether the file has a place.
    fn file(&mut self, file: SmallFile) -> bool {
        // The kernel's file system is mounted first, so one of its files can be mounted over.
        let place = if file.path.starts_with("/proc") {
            Place::Memory { path: file.path.clone(), is_mount_point: false }
        } else {
            self.entry(&file.path)
        };
        match place {
            Place::Root { path } => self.placement.files.push(SmallFile { path, ..file }),
            Place::Memory { path, .. } => self.placement.covers.push(SmallFile { path, ..file }),
            Place::Volume { path, found: Some(FileType::RegularFile), .. }
                if self.driver_mount == DriverMount::ByUs =>
            {
                self.placement.covers.push(SmallFile { path, ..file });
            }
            Place::Volume { .. } | Place::Nowhere => {
                self.note(format!("{} is left out: {}", file.path.display(), IN_THE_WAY));
                return false;
            }
        }
        true
    }

    fn symlink(&mut self, symlink: Symlink) {
        // The driver's directory is a new file system that holds only the driver.
        let link = if self.is_drivers(&symlink.link.0) {
            symlink.link.0.clone()
        } else {
            match self.entry(&symlink.link.0) {
                Place::Root { path } | Place::Memory { path, is_mount_point: false } => path,
                // The content of a volume is the user's choice.
                Place::Memory { .. } | Place::Volume { .. } | Place::Nowhere => {
                    let (link, target) = (symlink.link.0.display(), symlink.target.display());
                    let note = format!("the link {link} to {target} is left out: {IN_THE_WAY}");
                    // The host's /dev as a volume has udev's links already.
                    if symlink.link.0.starts_with("/dev") {
                        tracing::debug!("{note}");
                    } else {
                        self.note(note);
                    }
                    return;
                }
            }
        };
        self.placement.symlinks.push(Symlink { link: ContainerPath(link), ..symlink });
    }

    fn mount(&mut self, mount: Mount) {
        if self.is_drivers(&mount.target.0) {
            self.placement.mounts.push(mount);
            return;
        }
        match self.mounts.place(self.root, &mount.target.0) {
            Place::Root { path }
            | Place::Memory { path, .. }
            | Place::Volume { path, found: Some(_), .. } => {
                self.placement.mounts.push(Mount { target: ContainerPath(path), ..mount });
            }
            Place::Volume { .. } | Place::Nowhere => {
                self.note(format!("{} is left out: {IN_THE_WAY}", mount.target.0.display()));
            }
        }
    }

    fn node(&mut self, node: DeviceNode) -> Result<()> {
        let shown = node.container_path.0.display().to_string();
        let device = rustix::fs::makedev(node.major, node.minor);
        match self.entry(&node.container_path.0) {
            Place::Root { path } | Place::Memory { path, is_mount_point: false } => {
                self.placement.nodes.push(DeviceNode { container_path: ContainerPath(path), ..node });
            }
            Place::Volume { path, found: Some(FileType::CharacterDevice), device: there, .. }
                if there == device =>
            {
                let node = DeviceNode { container_path: ContainerPath(path), ..node };
                self.placement.nodes_of_volumes.push(node);
            }
            // An engine's own mount of a node, whose source is not known.
            Place::Volume { is_mount_point: true, .. } => {}
            _ if node.container_path.0.starts_with(DRAWING_NODES) => {
                self.note(format!("the device node {shown} is left out: {IN_THE_WAY}"));
            }
            _ => {
                let directory = node.container_path.0.parent().unwrap_or(Path::new("/dev")).display();
                return Err(Error::new(
                    Code::DeviceNodeMissing,
                    format!("the volume over {directory} has no device node {shown} {}:{}", node.major, node.minor),
                )
                .cause("nothing is made on a volume, which may be the host's own directory")
                .fix(format!(
                    "leave out the volume over {directory}, or mount one that has the node, such as the host's: -v /dev:/dev"
                )));
            }
        }
        Ok(())
    }
}

/// The reason why an optional part is left out.
const IN_THE_WAY: &str = "a volume or a file is in the way";
/// DRM nodes are optional: compute works without them, and users often mount the host's own directory.
const DRAWING_NODES: &str = "/dev/dri";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{apply::rootfs::Kind, inventory::HostPath, plan::CachedLibrary};
    use std::{fs, os::unix::fs::symlink};

    fn injection() -> Injection {
        let library = Path::new(DRIVER_DIR).join("lib64/libcuda.so.1");
        let mount = |source: &str, target: PathBuf| Mount {
            source: HostPath(source.into()),
            target: ContainerPath(target),
            daemon: None,
        };
        let node = |path: &str| DeviceNode {
            path: HostPath(path.into()),
            container_path: ContainerPath(path.into()),
            major: 1,
            minor: 3,
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        Injection {
            mounts: vec![
                mount("/lib/libcuda.so.550", library.with_file_name("libcuda.so.550")),
                mount("/run/socket", "/run/daemon/socket".into()),
            ],
            devices: vec![node("/dev/nvidia0"), node("/dev/dri/card0")],
            symlinks: vec![
                Symlink { link: ContainerPath(library.clone()), target: "libcuda.so.550".into() },
                Symlink {
                    link: ContainerPath("/dev/dri/by-path/pci-0-card".into()),
                    target: "../card0".into(),
                },
            ],
            library_dirs: vec![ContainerPath(library.parent().unwrap().into())],
            libraries: vec![CachedLibrary {
                soname: "libcuda.so.1".into(),
                path: ContainerPath(library),
                is_32bit: false,
            }],
            ..Injection::default()
        }
    }

    /// A root with glibc, and these volumes over it.
    struct Case {
        dir: tempfile::TempDir,
        mounts: Mounts,
        root: Layers,
    }

    impl Case {
        fn new(lay: impl FnOnce(&Path), over: &[&str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("root");
            for path in ["lib64", "etc/ld.so.conf.d", "usr/local", "usr/lib/x86_64-linux-gnu", "dev"] {
                fs::create_dir_all(root.join(path)).unwrap();
            }
            fs::write(root.join("lib64/ld-linux-x86-64.so.2"), "").unwrap();
            fs::write(root.join("etc/ld.so.cache"), "").unwrap();
            fs::create_dir(dir.path().join("volume")).unwrap();
            lay(dir.path());
            let root = Layers::open(vec![root]).unwrap();
            let mut mounts = Mounts::default();
            mounts.add(&root, Path::new("/dev"), Kind::Memory, false);
            for path in over {
                let source = Some(dir.path().join("volume"));
                mounts.add(&root, Path::new(path), Kind::Volume { source }, false);
            }
            Self { dir, mounts, root }
        }

        fn place(&self) -> Result<Placement> {
            place(&self.root, &self.mounts, &injection(), DriverMount::ByUs)
        }
    }

    fn paths(files: &[SmallFile]) -> Vec<&str> {
        files.iter().map(|file| file.path.to_str().unwrap()).collect()
    }

    #[test]
    fn a_plain_root_takes_everything_in_its_own_place() {
        let placement = Case::new(|_| (), &[]).place().unwrap();
        assert_eq!(placement.driver_dir, Path::new(DRIVER_DIR));
        assert_eq!(placement.notes, [""; 0]);
        assert_eq!((placement.mounts.len(), placement.nodes.len()), (2, 2));
        assert_eq!(
            paths(&placement.files),
            ["/etc/ld.so.cache", "/etc/ld.so.conf.d/00-gpurun.conf", "/etc/ld.so.conf"]
        );
        assert!(placement.covers.is_empty());
    }

    #[test]
    fn the_driver_goes_elsewhere_where_a_volume_or_a_file_is_in_its_way() {
        let in_place = |lay: fn(&Path), over: &[&str]| {
            let placement = Case::new(lay, over).place().unwrap();
            let cache = placement.files.iter().find(|file| file.path.ends_with("ld.so.cache")).unwrap();
            let names = String::from_utf8_lossy(&cache.content).into_owned();
            let library = placement.driver_dir.join("lib64/libcuda.so.1").display().to_string();
            assert!(names.contains(&library), "{library}");
            assert!(placement.mounts[0].target.0.starts_with(&placement.driver_dir));
            placement.driver_dir.display().to_string()
        };
        assert_eq!(in_place(|_| (), &["/usr/local/nvidia"]), DRIVER_DIR);
        assert_eq!(in_place(|_| (), &["/usr/local"]), OTHER_DRIVER_DIR);
        let has_directory = |dir: &Path| fs::create_dir(dir.join("volume/nvidia")).unwrap();
        assert_eq!(
            in_place(has_directory, &["/usr/local"]),
            OTHER_DRIVER_DIR,
            "the volume's own is not covered"
        );
        let file = |dir: &Path| fs::write(dir.join("root/usr/local/nvidia"), "").unwrap();
        assert_eq!(in_place(file, &[]), OTHER_DRIVER_DIR);
        let link = |dir: &Path| symlink("/opt/driver", dir.join("root/usr/local/nvidia")).unwrap();
        assert_eq!(in_place(link, &[]), "/opt/driver");
        assert_eq!(in_place(link, &["/opt"]), OTHER_DRIVER_DIR);
        let looped = |dir: &Path| symlink("nvidia", dir.join("root/usr/local/nvidia")).unwrap();
        assert_eq!(in_place(looped, &[]), OTHER_DRIVER_DIR);
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_covered_or_replaced_by_links() {
        let placement = Case::new(|_| (), &["/etc"]).place().unwrap();
        assert!(placement.files.is_empty() && placement.covers.is_empty());
        let links: Vec<_> = placement.symlinks.iter().map(|link| link.link.0.to_str().unwrap()).collect();
        assert!(links.contains(&"/usr/lib/x86_64-linux-gnu/libcuda.so.1"), "{links:?}");
        let has_cache = |dir: &Path| fs::write(dir.join("volume/ld.so.cache"), "").unwrap();
        let placement = Case::new(has_cache, &["/etc"]).place().unwrap();
        assert_eq!(paths(&placement.covers), ["/etc/ld.so.cache"]);
        let placement = Case::new(|_| (), &["/etc", "/usr"]).place().unwrap();
        assert!(
            placement.notes.iter().any(|note| note.contains("LD_LIBRARY_PATH=")),
            "{:?}",
            placement.notes
        );
    }

    #[test]
    fn a_volume_over_dev_must_have_the_nodes_of_gpus() {
        let case = Case::new(|_| (), &["/dev"]);
        let error = case.place().unwrap_err();
        assert!(error.code() == Code::DeviceNodeMissing && error.what().contains("/dev/nvidia0"), "{error}");
        assert!(!case.dir.path().join("volume/nvidia0").exists());
        let placement = Case::new(|_| (), &["/dev/dri"]).place().unwrap();
        assert_eq!(placement.nodes.len(), 1, "{:?}", placement.notes);
        assert_eq!(placement.notes.len(), 1, "the node: {:?}", placement.notes);
    }
}
