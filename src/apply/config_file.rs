//! A configuration file of somebody else's: whoever reads it sees the old one or the new one, and what it was before is kept
//! beside it.

use crate::{
    error::{Code, OrFail, Result},
    regular_file,
    text_file::TextFile,
};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

/// Real ones have 1 to 50 kB.
const MAX: u64 = 4 << 20;

/// The fix for a file that cannot be changed.
const AS_ROOT: &str = "run the command as root (sudo), or name a file that you may write";

/// A file that may be there.
#[derive(Debug)]
pub struct ConfigFile {
    /// Where it is, after every link: a link stays one.
    path: PathBuf,
    content: Option<Content>,
}

#[derive(Debug)]
struct Content {
    /// What the file begins with, before `text`.
    byte_order_mark: &'static str,
    text: String,
    mode: Mode,
    owner: (Uid, Gid),
}

impl ConfigFile {
    /// Reads it, if it is there.
    ///
    /// # Errors
    /// [`Code::Config`] when it is no regular file, no text, or larger than 4 MiB.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).map_err(|error| {
            error.fix("name a text file that can be read: `--file FILE`; nothing was changed")
        })
    }

    fn read(path: &Path) -> Result<Self> {
        let failed = || format!("{} cannot be read", path.display());
        let real = match fs::canonicalize(path) {
            Ok(real) => real,
            Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => {
                return Ok(Self {
                    path: std::path::absolute(path).or_fail(Code::Config, failed)?,
                    content: None,
                });
            }
            Err(error) => return Err(error).or_fail(Code::Config, failed),
        };
        let found = rustix::fs::open(&real, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .or_fail(Code::Config, failed)?;
        let (file, stat) = regular_file::open(&found).or_fail(Code::Config, failed)?;
        let file = TextFile::from_open(file, MAX).or_fail(Code::Config, failed)?;
        let text = file.text().or_fail(Code::Config, failed)?.to_owned();
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        Ok(Self {
            path: real,
            content: Some(Content {
                byte_order_mark: file.byte_order_mark(),
                text,
                mode: Mode::from_raw_mode(stat.st_mode),
                owner,
            }),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says; `None` if it is not there.
    pub fn text(&self) -> Option<&str> {
        self.content.as_ref().map(|content| content.text.as_str())
    }

    /// Where it is kept as it was before `name` was put in. Not in a directory whose files the engine reads all: CRI-O asks for
    /// no ending.
    pub fn kept(&self, name: &str) -> PathBuf {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let dir = if dir.extension().is_some_and(|ending| ending == "d") {
            dir.parent().unwrap_or(dir)
        } else {
            dir
        };
        let mut file: OsString = self.path.file_name().unwrap_or_default().into();
        file.push(format!(".{name}-backup"));
        dir.join(file)
    }

    /// Keeps it as it is now, as what it was before `name` was put in.
    ///
    /// # Errors
    /// [`Code::Config`] when that cannot be written.
    pub fn keep(&self, name: &str) -> Result<()> {
        let kept = self.kept(name);
        match &self.content {
            Some(content) => {
                let whole = [content.byte_order_mark, &content.text].concat();
                write(&kept, &whole, content.mode, Some(content.owner))
            }
            None => remove(&kept),
        }
    }

    /// Forgets what it was before `name` was put in.
    ///
    /// # Errors
    /// [`Code::Config`] when it cannot be removed.
    pub fn forget(&self, name: &str) -> Result<()> {
        remove(&self.kept(name))
    }

    /// Puts this text in its place, with its mode and owner, or removes it. The directories above it are made.
    ///
    /// # Errors
    /// [`Code::Config`] when it cannot be written; then the old one is there, untouched.
    pub fn replace(&self, text: Option<&str>) -> Result<()> {
        let Some(text) = text else { return remove(&self.path) };
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)
                .or_fail(Code::Config, || format!("{} cannot be made", dir.display()))
                .map_err(|error| error.fix(AS_ROOT))?;
        }
        let Some(content) = &self.content else {
            return write(&self.path, text, Mode::from_raw_mode(0o644), None);
        };
        write(&self.path, &[content.byte_order_mark, text].concat(), content.mode, Some(content.owner))
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error)
            .or_fail(Code::Config, || format!("{} cannot be removed", path.display()))
            .map_err(|error| error.fix(AS_ROOT)),
        _ => Ok(()),
    }
}

fn write(path: &Path, text: &str, mode: Mode, owner: Option<(Uid, Gid)>) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    // No directory of drop-ins takes a file that ends like this for its own, and no second gpurun takes it.
    temporary.push(format!(".gpurun-{}", std::process::id()));
    let written = (|| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(&temporary, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(text.as_bytes())?;
        if let Some((uid, gid)) = owner {
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        rustix::fs::fchmod(&file, mode)?;
        // An engine that does not start after a power cut is worse than a slow command.
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
        .or_fail(Code::Config, || format!("{} cannot be written", path.display()))
        .map_err(|error| error.fix(AS_ROOT))
}
