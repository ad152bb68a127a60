//! An OCI bundle: the directory that an engine made for one container, with its config.json and its root.

use crate::{
    error::{Code, Error, OrFail, Result},
    formats::oci::Spec,
    regular_file,
};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, Gid, Mode, OFlags, StatVfsMountFlags, Uid},
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
};

const CONFIG: &str = "config.json";
/// Engines write 10 to 100 kB; the environment of a process, which is the largest part, is bounded by the kernel at 6 MB.
const MAX_CONFIG: u64 = 16 << 20;

/// A bundle that is open.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    /// The configuration file and its directory.
    config: PathBuf,
    directory: OwnedFd,
    mode: Mode,
    owner: (Uid, Gid),
}

/// The root of a container that does not run yet.
#[derive(Debug)]
pub struct ContainerRoot {
    /// Where it is on the host.
    pub path: PathBuf,
    /// Open for look-ups.
    pub directory: OwnedFd,
    /// Whether its file system can be written to at all.
    pub writable: bool,
}

impl ContainerRoot {
    /// Opens a container's root.
    ///
    /// # Errors
    /// [`Code::Bundle`] when there is none, [`Code::Rootfs`] when it is the host's own.
    pub fn open(path: PathBuf) -> Result<Self> {
        let failed = || format!("the container's root {} cannot be opened", path.display());
        let directory =
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .or_fail(Code::Bundle, failed)?;
        let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let own = identity(rustix::fs::fstat(&directory).or_fail(Code::Bundle, failed)?);
        if rustix::fs::stat("/").is_ok_and(|host| identity(host) == own) {
            // The loader's cache that would be written is the host's.
            return Err(Error::new(Code::Rootfs, "the container's root is the host's own")
                .fix("leave out NVIDIA_VISIBLE_DEVICES and --gpus: a container in the host's root has the host's GPUs already"));
        }
        let writable =
            rustix::fs::fstatvfs(&directory).is_ok_and(|fs| !fs.f_flag.contains(StatVfsMountFlags::RDONLY));
        Ok(Self { path, directory, writable })
    }
}

impl Bundle {
    /// Opens a bundle and reads its config.json, or the file `config` of crun's `--config`. That path is relative to the working
    /// directory, but the exact text `config.json` is relative to the bundle (crun's src/create.c).
    ///
    /// # Errors
    /// [`Code::Bundle`] if it is not a bundle.
    pub fn open(path: &Path, config: Option<&Path>) -> Result<(Self, Spec)> {
        let named = config.filter(|config| *config != Path::new(CONFIG));
        // A symbolic link is kept, and its target replaced.
        let named = named.map(|config| config.canonicalize().unwrap_or_else(|_| config.into()));
        let config = named.unwrap_or_else(|| path.join(CONFIG));
        let failed = || format!("{} cannot be read", config.display());
        let parent = config.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = rustix::fs::open(
            parent.unwrap_or(Path::new(".")),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .or_fail(Code::Bundle, failed)?;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = rustix::fs::openat(&directory, name_of(&config), flags, Mode::empty())
            .or_fail(Code::Bundle, failed)?;
        let (file, stat) = regular_file::open(&found).or_fail(Code::Bundle, failed)?;
        let mut bytes = Vec::new();
        file.take(MAX_CONFIG + 1).read_to_end(&mut bytes).or_fail(Code::Bundle, failed)?;
        if bytes.len() as u64 > MAX_CONFIG {
            return Err(Error::new(Code::Bundle, failed())
                .cause(format!("it is larger than {} MiB", MAX_CONFIG >> 20)));
        }
        let bundle = Self {
            path: path.into(),
            config,
            directory,
            mode: Mode::from_raw_mode(stat.st_mode),
            owner: (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid)),
        };
        Ok((bundle, Spec::parse(&bytes)?))
    }

    /// Opens the container's root.
    ///
    /// # Errors
    /// [`Code::Bundle`] when there is none, [`Code::Rootfs`] when it is the host's own.
    pub fn root(&self, spec: &Spec) -> Result<ContainerRoot> {
        let named = spec.root_path().filter(|path| !path.is_empty()).ok_or_else(|| {
            Error::new(Code::Bundle, "the container's config.json names no root")
                .fix("set `root.path` in config.json; `runc spec` writes an example")
        })?;
        // An absolute path replaces the bundle's.
        ContainerRoot::open(self.path.join(named))
    }

    /// Atomically replaces the configuration; readers see the old or the new content.
    ///
    /// It is not synced to disk: no container survives a crash of the host, and the engine writes a new one for the next start.
    ///
    /// # Errors
    /// [`Code::Bundle`] if it cannot be written; the old one is then unchanged.
    pub fn replace(&self, spec: &Spec) -> Result<()> {
        let failed = || format!("{} cannot be replaced", self.config.display());
        let name = name_of(&self.config);
        let temporary = format!(".{}.gpurun-{}", name.to_string_lossy(), std::process::id());
        // Left by a process of our number that was killed.
        let _ = rustix::fs::unlinkat(&self.directory, &temporary, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let written = (|| {
            let file = rustix::fs::openat(&self.directory, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
            let mut file = File::from(file);
            file.write_all(&spec.to_bytes())?;
            rustix::fs::fchown(&file, Some(self.owner.0), Some(self.owner.1))?;
            rustix::fs::fchmod(&file, self.mode)?;
            rustix::fs::renameat(&self.directory, &temporary, &self.directory, name)?;
            Ok::<_, std::io::Error>(())
        })();
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.directory, &temporary, AtFlags::empty());
        }
        written.or_fail(Code::Bundle, failed)
    }
}

fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or(path.as_os_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn a_configuration_is_replaced_with_its_owner_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join(CONFIG);
        fs::write(&config, r#"{"root":{"path":"rootfs"}}"#).unwrap();
        fs::set_permissions(&config, fs::Permissions::from_mode(0o640)).unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let (bundle, mut spec) = Bundle::open(dir.path(), None).unwrap();
        let root = bundle.root(&spec).unwrap();
        assert_eq!((root.path, root.writable), (dir.path().join("rootfs"), true));
        spec.list_mut(&["mounts"]).unwrap();
        bundle.replace(&spec).unwrap();
        assert_eq!(fs::read_to_string(&config).unwrap(), r#"{"root":{"path":"rootfs"},"mounts":[]}"#);
        assert_eq!(fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn what_is_no_bundle_is_a_message() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join(CONFIG);
        assert_eq!(Bundle::open(dir.path(), None).unwrap_err().code(), Code::Bundle);
        rustix::fs::mknodat(rustix::fs::CWD, &config, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(
            Bundle::open(dir.path(), None).unwrap_err().cause_line(),
            "it is a FIFO, not a regular file"
        );
        fs::remove_file(&config).unwrap();
        fs::write(&config, r#"{"root":{"path":"/"}}"#).unwrap();
        let (bundle, spec) = Bundle::open(dir.path(), None).unwrap();
        assert_eq!(bundle.root(&spec).unwrap_err().code(), Code::Rootfs);
        for text in [
            "{}",
            r#"{"root":{"path":""}}"#,
            r#"{"root":{"path":"nowhere"}}"#,
            r#"{"root":{"path":"config.json"}}"#,
        ] {
            fs::write(&config, text).unwrap();
            let (bundle, spec) = Bundle::open(dir.path(), None).unwrap();
            assert_eq!(bundle.root(&spec).unwrap_err().code(), Code::Bundle, "{text}");
        }
        File::create(&config).unwrap().set_len(MAX_CONFIG + 1).unwrap();
        assert_eq!(Bundle::open(dir.path(), None).unwrap_err().cause_line(), "it is larger than 16 MiB");
    }
}
