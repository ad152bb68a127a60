//! Directories from environment variables, if they belong to the caller.
//!
//! After `su`, `sudo -E` and `sudo -u` the variables HOME, `XDG_*` and TMPDIR may still name directories of the previous user. gpurun
//! could not write there, its files would belong to the wrong user, or another user's configuration would decide what
//! this user runs. Such a variable counts as unset, and one line says so. Behind sudo, the directories of the user who typed sudo
//! count as well, because that user chose this environment. What is only read may also belong to root, whom every user trusts.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs::Metadata,
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

/// The variables that were ignored.
static IGNORED: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());

/// What is done with a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Files of others are read there: credentials, configuration.
    Read,
    /// gpurun keeps its own files there.
    Write,
}

/// The directory in a variable, if it is absolute and belongs to the caller. For a missing directory the nearest existing
/// parent decides, which may also belong to root.
pub fn named_by(variable: &'static str, purpose: Purpose) -> Option<PathBuf> {
    let directory = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())?;
    let mut owners = callers();
    if purpose == Purpose::Read {
        owners.push(0);
    }
    match stranger(&directory, &owners) {
        None => Some(directory),
        Some(why) => {
            ignore(variable, &directory, &why);
            None
        }
    }
}

/// The home directory: HOME, or else the one of the caller's account.
pub fn home(purpose: Purpose) -> Option<PathBuf> {
    named_by("HOME", purpose).or_else(home_of_account)
}

/// The directory for temporary files: TMPDIR, or /tmp. Such a directory usually belongs to root.
pub fn temporary() -> PathBuf {
    let named = std::env::var_os("TMPDIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let owners = [callers(), vec![0]].concat();
    match named.map(|directory| (stranger(&directory, &owners), directory)) {
        Some((None, directory)) => directory,
        Some((Some(why), directory)) => {
            ignore("TMPDIR", &directory, &why);
            "/tmp".into()
        }
        None => "/tmp".into(),
    }
}

/// The variables that were ignored so far. A program that gpurun starts must not read them either.
pub fn ignored() -> Vec<&'static str> {
    IGNORED.lock().map(|ignored| ignored.iter().copied().collect()).unwrap_or_default()
}

/// What /etc/passwd says of the caller outside of any user namespace: Apptainer calls `nvidia-container-cli` with an empty
/// environment.
pub fn home_of_account() -> Option<PathBuf> {
    let mapped: Vec<u64> = std::fs::read_to_string("/proc/self/uid_map")
        .ok()?
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let inside = u64::from(rustix::process::geteuid().as_raw());
    let uid = mapped.chunks_exact(3).find_map(|range| {
        let offset = inside.checked_sub(range[0]).filter(|offset| *offset < range[2])?;
        Some((range[1] + offset).to_string())
    })?;
    let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
    accounts
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&uid.as_str()))
        .and_then(|fields| fields.get(5).map(PathBuf::from))
        .filter(|home| home.is_absolute())
}

/// The uids of the caller: that of this process, and for root that of the user behind sudo.
fn callers() -> Vec<u32> {
    let own = rustix::process::geteuid().as_raw();
    let behind_sudo = || std::env::var("SUDO_UID").ok()?.parse::<u32>().ok();
    let is_root = own == 0 && rustix::process::getuid().is_root();
    [own].into_iter().chain(is_root.then(behind_sudo).flatten()).collect()
}

/// Why a directory is not one of these users'; `None` if it is.
fn stranger(directory: &Path, owners: &[u32]) -> Option<String> {
    let of = |path: &Path, found: &Metadata, owners: &[u32]| {
        let owner = found.uid();
        (!owners.contains(&owner)).then(|| format!("{} belongs to uid {owner}", path.display()))
    };
    match std::fs::metadata(directory) {
        Ok(found) => of(directory, &found, owners),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let above = directory.ancestors().skip(1);
            let mut above = above.filter_map(|path| Some((path, std::fs::metadata(path).ok()?)));
            let (path, found) = above.next()?;
            of(path, &found, &[owners, &[0]].concat())
        }
        Err(error) => Some(format!("{}: {error}", directory.display())),
    }
}

fn ignore(variable: &'static str, directory: &Path, why: &str) {
    if IGNORED.lock().is_ok_and(|mut ignored| ignored.insert(variable)) {
        tracing::warn!(
            "{variable}={} is ignored: {why}, and gpurun runs as uid {}; log in as this user (su - USER, sudo -i), or unset {variable}",
            directory.display(),
            rustix::process::geteuid().as_raw()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::chown;

    #[test]
    fn a_directory_is_its_owners_and_a_missing_one_its_parents() {
        let dir = tempfile::tempdir().unwrap();
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(stranger(dir.path(), &[own]), None);
        assert_eq!(stranger(&dir.path().join("absent/deep"), &[own]), None);
        let other = own + 1;
        for path in [dir.path().to_path_buf(), dir.path().join("absent/deep")] {
            let why = stranger(&path, &[other]).filter(|_| own != 0);
            assert!(own == 0 || why.unwrap().contains(&format!("belongs to uid {own}")));
        }
        if own == 0 {
            chown(dir.path(), Some(54321), None).unwrap();
            assert!(stranger(dir.path(), &[0]).unwrap().ends_with("belongs to uid 54321"));
            assert!(stranger(&dir.path().join("absent"), &[0]).unwrap().ends_with("belongs to uid 54321"));
            assert_eq!(stranger(dir.path(), &[0, 54321]), None);
        }
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(stranger(&file.join("below"), &[own]).unwrap().contains("Not a directory"));
        assert_eq!(stranger(Path::new("/nowhere/at/all"), &[own]), None, "/ is root's");
    }
}
