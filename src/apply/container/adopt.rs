//! Directories of an image that belong to nobody in the container's user namespace: a root that root unpacked, started by an
//! ordinary user. The namespace gives no right over them (capabilities(7), "user_namespaces"), so not even its root could make
//! a file there. Made in the overlay's upper layer before it is mounted, they are the caller's, and overlayfs merges what the
//! image has into them.

use super::{
    assembly::Step,
    spec::{Container, IdMap},
};
use crate::apply::rootfs::{Found, Layers};
use rustix::{
    fd::OwnedFd,
    fs::{Mode, mkdirat},
    io::Errno,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The directories in which the container's own files are made and that are foreign to it, parents first, with their
/// permissions.
pub fn foreign(container: &Container, steps: &[&[Step]], image: &Layers) -> Vec<(PathBuf, Mode)> {
    let Some(map) = &container.id_map else { return Vec::new() };
    let user = &container.process.user;
    let other_home = Path::new("/home").join(&user.name);
    let mut foreign = BTreeMap::new();
    for path in steps.iter().copied().flatten().filter_map(Step::makes).chain([
        user.home.as_path(),
        &other_home,
        Path::new("/var/tmp"),
    ]) {
        // The nearest directory that is there is where the others are made.
        let Some(directory) = path.ancestors().find_map(|path| directory(image, path)) else {
            continue;
        };
        for path in directory.ancestors() {
            if let Some((_, Found::Directory(layers))) = path.to_str().and_then(|path| image.find(path))
                && let Some(Ok(stat)) = layers.first().map(rustix::fs::fstat)
                && path != Path::new("/")
            {
                foreign.insert(path.to_owned(), (stat.st_mode, is_mapped(map, stat.st_uid)));
            }
        }
    }
    // A directory of the caller's own below a foreign one is made, too, because its parent must be there.
    if foreign.values().all(|&(_, mapped)| mapped) {
        return Vec::new();
    }
    foreign.into_iter().map(|(path, (mode, _))| (path, Mode::from_raw_mode(mode & 0o7777 | 0o700))).collect()
}

fn directory(image: &Layers, path: &Path) -> Option<PathBuf> {
    match image.find(path.to_str()?)? {
        (path, Found::Directory(_)) => Some(path),
        _ => None,
    }
}

fn is_mapped(map: &IdMap, uid: u32) -> bool {
    map.uids.iter().any(|&(_, outside, count)| (outside..outside.saturating_add(count)).contains(&uid))
}

/// Makes them in the upper layer. The umask is empty.
pub fn make(upper: &OwnedFd, directories: &[(PathBuf, Mode)]) -> rustix::io::Result<()> {
    directories.iter().try_for_each(|(path, mode)| {
        match mkdirat(upper, path.strip_prefix("/").unwrap_or(path), *mode) {
            Err(Errno::EXIST) => Ok(()),
            result => result,
        }
    })
}
