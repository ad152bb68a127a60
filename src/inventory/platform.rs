//! Hosts whose driver is not found through NVML: Windows' (WSL) and Tegra's (Jetson). A container has its files where the host
//! has them, because the libraries look for each other by path.

use super::{
    driver_files,
    driver_root::{Found, OpenRoot},
    elf, procfs,
    types::{ContainerPath, DeviceNode, Host, HostPath},
};
use crate::error::Result;
use rustix::fs::FileType;
use std::path::{Component, Path, PathBuf};

pub mod tegra;
pub mod wsl;

/// Which driver a host has, if it is none of NVML's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// The Windows Subsystem for Linux.
    Wsl,
    /// Linux for Tegra, which may also have NVML.
    Tegra,
}

impl Platform {
    /// What the host's files say, by a stat of each: the same as go-nvlib's `ResolvePlatform` looks at.
    pub fn of(host: &Host) -> Option<Self> {
        let is_file = |path: &str| host.driver_root.host_path(&ContainerPath(path.into())).0.is_file();
        let family = || procfs::read(&host.sys.join("devices/soc0/family")).unwrap_or_default();
        if is_file(wsl::DXCORE) {
            Some(Self::Wsl)
        } else if is_file(tegra::RELEASE) || family().to_ascii_lowercase().starts_with("tegra") {
            Some(Self::Tegra)
        } else {
            None
        }
    }
}

/// What a container of such a host gets.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PlatformDriver {
    /// Device nodes.
    pub nodes: Vec<DeviceNode>,
    /// Files and directories.
    pub files: Vec<PlatformFile>,
    /// Links, and what they say.
    pub links: Vec<(ContainerPath, PathBuf)>,
    /// What should be there and is not.
    pub warnings: Vec<String>,
}

/// A file or directory of the driver.
#[derive(Debug, PartialEq, Eq)]
pub struct PlatformFile {
    /// The file itself, every link resolved inside the driver root.
    pub path: HostPath,
    /// What the host calls it, and so the container.
    pub container_path: ContainerPath,
    /// By which name the loader knows it; `None`: it is no shared library of this machine.
    pub soname: Option<String>,
}

/// A driver that is being found.
struct Search<'a> {
    host: &'a Host,
    root: OpenRoot<'a>,
    driver: PlatformDriver,
    directories: Vec<PathBuf>,
}

/// As many links as the kernel follows (path_resolution(7)).
const MAX_LINKS: usize = 40;

impl<'a> Search<'a> {
    fn new(host: &'a Host) -> Result<Self> {
        let root = host.driver_root.open()?;
        Ok(Self { host, root, driver: PlatformDriver::default(), directories: Vec::new() })
    }

    fn has(&self, path: &Path) -> bool {
        self.driver.files.iter().any(|file| file.container_path.0 == path)
            || self.driver.links.iter().any(|(link, _)| link.0 == path)
    }

    fn missing(&mut self, path: &Path) {
        self.driver.warnings.push(format!("{} is not on this host and is left out", path.display()));
    }

    fn node(&mut self, path: &Path) {
        match self.host.device_node(path) {
            Some(node) if self.driver.nodes.contains(&node) => {}
            Some(node) => self.driver.nodes.push(node),
            None => self.missing(path),
        }
    }

    fn directory(&mut self, path: &Path) {
        match self.root.find(path).filter(|found| found.kind == FileType::Directory) {
            Some(found) => self.add(found, path),
            None => self.missing(path),
        }
    }

    /// The file to which `path` leads, and the links on the way to it: each link that a path ends with. Directories that are
    /// links are none of them, so that the path is the container's whatever it has there.
    fn file(&mut self, path: &Path) {
        let Some(end) = self.root.find(path) else { return self.missing(path) };
        let mut at = path.to_path_buf();
        let mut links = Vec::new();
        while let Some(target) = self.root.link(&at).filter(|target| is_plain(target)) {
            if links.len() == MAX_LINKS {
                break;
            }
            let next = normal(&at.parent().unwrap_or(&at).join(&target));
            links.push((ContainerPath(std::mem::replace(&mut at, next)), target));
        }
        // `..` behind a directory that is a link: the file takes the link's place.
        if self.root.find(&at).is_none_or(|found| found.path != end.path) {
            links.clear();
            at = path.into();
        }
        for (link, target) in links {
            if !self.has(&link.0) {
                self.driver.links.push((link, target));
            }
        }
        self.add(end, &at);
    }

    fn add(&mut self, found: Found, container_path: &Path) {
        if found.kind == FileType::Directory {
            self.directories.push(container_path.into());
        }
        if !self.has(container_path) {
            let soname = self.soname(container_path);
            let container_path = ContainerPath(container_path.into());
            self.driver.files.push(PlatformFile { path: found.path, container_path, soname });
        }
    }

    fn soname(&self, path: &Path) -> Option<String> {
        let name =
            path.file_name()?.to_str().filter(|name| name.starts_with("lib") && name.contains(".so"))?;
        let library = elf::read(self.root.open_file(path)?).filter(|library| !library.is_32bit)?;
        Some(library.soname.unwrap_or_else(|| name.into()))
    }

    /// Adds the names by which libraries are loaded, where the host has made no links.
    fn finish(mut self) -> PlatformDriver {
        let mut wanted = Vec::new();
        for file in &self.driver.files {
            let path = &file.container_path.0;
            let (Some(soname), Some(name)) = (&file.soname, path.file_name().and_then(|name| name.to_str()))
            else {
                continue;
            };
            wanted.push((path.with_file_name(soname), PathBuf::from(name)));
            let others = driver_files::other_names(name);
            wanted.extend(others.map(|other| (path.with_file_name(other), PathBuf::from(soname))));
        }
        for (link, target) in wanted {
            if !self.has(&link) {
                self.driver.links.push((ContainerPath(link), target));
            }
        }
        // What is in a directory that is mounted is as the host has it, and there is no place for a link of ours.
        let inside = |path: &Path| self.directories.iter().any(|directory| path.starts_with(directory));
        self.driver.links.retain(|(link, _)| !inside(&link.0));
        self.driver
    }
}

/// Whether a document can say it: `--link TARGET::LINK` is text, and one line.
fn is_plain(path: &Path) -> bool {
    path.to_str().is_some_and(|text| !text.contains("::") && !text.contains(char::is_control))
}

/// Without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::from("/"), |mut whole, part| {
        match part {
            Component::ParentDir => drop(whole.pop()),
            Component::Normal(name) => whole.push(name),
            _ => {}
        }
        whole
    })
}
