//! Chooses the container's HOME.
//!
//! Docker takes HOME from `-e`, the image's ENV or /etc/passwd, even if it does not exist or cannot be written. CUDA, Triton
//! and Hugging Face write their caches there, so gpurun ensures that HOME exists and is writable, for every uid. The value of
//! `-e` is used as it is. Other candidates are used only if the container's user can write them; the last ones are new
//! directories, `/home/NAME` first.

use super::{caller::Caller, find};
use crate::{
    apply::{
        container::spec::Volume,
        rootfs::{Found, Layers, Root, open_host_directory},
    },
    plan::DRIVER_DIR,
};
use rustix::fd::AsFd;
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

/// Ids on the host, as the kernel compares them with a file's owner and group.
#[derive(Debug)]
pub struct HostIds {
    /// The uid.
    pub uid: u32,
    /// The primary gid and the supplementary ones.
    pub gids: Vec<u32>,
    /// Whether permissions are ignored: the container's root.
    pub is_root: bool,
}

/// Inputs for the choice of HOME.
#[derive(Debug)]
pub struct HomeSources<'a> {
    /// The value of `-e` or `--env-file`.
    pub typed: Option<&'a str>,
    /// The value of the image's ENV.
    pub image: Option<&'a str>,
    /// The field of /etc/passwd.
    pub account: Option<&'a [u8]>,
    /// The login name, as a name for a directory.
    pub name: &'a str,
    /// The container's user.
    pub ids: &'a HostIds,
    /// The image.
    pub layers: &'a Layers,
    /// What is mounted into the container.
    pub volumes: &'a [Volume],
    /// `--read-only`.
    pub read_only: bool,
}

impl HomeSources<'_> {
    /// The directory.
    pub fn choose(&self) -> PathBuf {
        if let Some(typed) = self.typed.filter(|typed| !typed.is_empty()) {
            return typed.into();
        }
        // `-e HOME=` overrides the image's HOME.
        let image = self.image.filter(|home| !home.is_empty() && self.typed.is_none()).map(PathBuf::from);
        let account = self.account.filter(|home| std::str::from_utf8(home).is_ok());
        let account = account.map(|home| PathBuf::from(OsStr::from_bytes(home)));
        let own = PathBuf::from("/home").join(self.name);
        let others = (2..10).map(|n| PathBuf::from(format!("/home/{}-{n}", self.name)));
        // A volume may cover /home, and gpurun makes nothing on volumes.
        let beside = PathBuf::from(format!("/home-{}", self.name));
        let known = image.into_iter().chain(account).filter(|home| can_be_home(home));
        let mut places = known.chain([own.clone()]).chain(others).chain([beside]);
        places.find(|home| self.is_usable(home)).unwrap_or(own)
    }

    fn is_usable(&self, home: &Path) -> bool {
        let volume = self.volumes.iter().rfind(|volume| home.starts_with(volume.target()));
        if let Some(volume) = volume {
            // A volume mounted at exactly this path is meant as HOME.
            return volume.target() == home || self.is_writable_in(volume, home);
        }
        if home == Path::new("/") {
            return self.ids.is_root && !self.read_only;
        }
        match find(self.layers, home) {
            Some(Found::Directory(merged)) => merged.first().is_some_and(|top| self.ids.can_write(top)),
            Some(_) => false,
            // gpurun makes the directory if its parents are directories.
            None => home
                .ancestors()
                .skip(1)
                .find_map(|parent| find(self.layers, parent))
                .is_some_and(|found| matches!(found, Found::Directory(_))),
        }
    }

    /// Whether the directory exists on a volume and can be written.
    fn is_writable_in(&self, volume: &Volume, home: &Path) -> bool {
        let directory = || {
            let rest = home.strip_prefix(volume.target()).ok()?;
            let source = open_host_directory(volume.writable_source()?).ok()?;
            Root::new(source).plain_directory(rest).ok()
        };
        directory().is_some_and(|directory| self.ids.can_write(&directory))
    }
}

impl HostIds {
    /// The container's user on the host. Without root this is the caller, whatever its uid in the container.
    pub fn new(uid: u32, gid: u32, groups: &[u32], caller: &Caller) -> Self {
        let is_root = uid == 0;
        if caller.euid == 0 {
            Self { uid, gids: [&[gid], groups].concat(), is_root }
        } else {
            Self { uid: caller.uid, gids: [vec![caller.gid], caller.groups()].concat(), is_root }
        }
    }

    fn can_write(&self, directory: &impl AsFd) -> bool {
        self.is_root
            || rustix::fs::fstat(directory).is_ok_and(|stat| {
                let shift = match stat {
                    stat if stat.st_uid == self.uid => 6,
                    stat if self.gids.contains(&stat.st_gid) => 3,
                    _ => 0,
                };
                stat.st_mode >> shift & 0o3 == 0o3
            })
    }
}

/// Whether the path can be a home directory. Service accounts have /dev/null or nothing, and images may have anything.
fn can_be_home(home: &Path) -> bool {
    home.is_absolute()
        && home.as_os_str().len() < 1024
        && !home.as_os_str().as_bytes().contains(&0)
        && !home.components().any(|component| component == Component::ParentDir)
        && !["/dev", "/proc", "/sys", DRIVER_DIR].iter().any(|ours| home.starts_with(ours))
}
