//! Files that others read while they are written: CDI documents, a node's labels.

use crate::error::{Code, Error, OrFail, Result};
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};
use std::{
    fs::{File, FileType},
    io::Write as _,
    os::unix::fs::FileTypeExt,
    path::Path,
};

/// Atomically replaces a file at `path`; readers see the old or the new content. An equal file is left unchanged, so that
/// watchers of the directory do not read it again. Returns whether it was written.
///
/// # Errors
/// `code`
pub fn write(path: &Path, content: &str, code: Code) -> Result<bool> {
    let failed = || format!("{} cannot be written", path.display());
    let is_a = |is: fn(&FileType) -> bool| path.metadata().is_ok_and(|there| is(&there.file_type()));
    // Another user may have put a link there that leads to a disk.
    if is_a(FileType::is_block_device) {
        return Err(Error::new(code, failed())
            .cause("it is a block device")
            .fix(format!("remove {} or name another file", path.display())));
    }
    // /dev/stdout, /dev/null, a FIFO: there is nothing to take the place of.
    if is_a(|kind| !kind.is_file() && !kind.is_dir()) {
        return std::fs::write(path, content).or_fail(code, failed).map(|()| true);
    }
    if std::fs::read(path).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(false);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(code, failed()).cause("it is no path of a file"));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    std::fs::create_dir_all(parent).or_fail(code, failed)?;
    let directory =
        rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .or_fail(code, failed)?;
    // Neither an engine nor node-feature-discovery reads a name that begins like this.
    let temporary = format!(".{}.{}", name.to_string_lossy(), std::process::id());
    let written = (|| {
        match rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file =
            File::from(rustix::fs::openat(&directory, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(content.as_bytes())?;
        // World-readable, whatever the umask.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
        rustix::fs::renameat(&directory, &temporary, &directory, name)?;
        Ok::<_, std::io::Error>(())
    })();
    if written.is_err() {
        let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
    }
    written.or_fail(code, failed)?;
    Ok(true)
}

/// Takes a file away. True if there was one.
///
/// # Errors
/// `code`
pub fn remove(path: &Path, code: Code) -> Result<bool> {
    // A device node or a FIFO is written to, not replaced, so it is not removed either.
    if path.symlink_metadata().is_ok_and(|there| !there.is_file() && !there.is_symlink()) {
        return Ok(false);
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        result => result.or_fail(code, || format!("{} cannot be removed", path.display())).map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::MetadataExt};

    #[test]
    fn a_file_that_is_the_same_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/nvidia.yaml");
        let file = || fs::metadata(&path).map(|m| (m.ino(), m.mtime_nsec(), m.mode() & 0o777)).unwrap();
        assert!(write(&path, "one", Code::Cdi).unwrap());
        let first = file();
        assert_eq!(first.2, 0o644);
        assert!(!write(&path, "one", Code::Cdi).unwrap());
        assert_eq!(file(), first);
        assert!(write(&path, "two", Code::Cdi).unwrap());
        assert_ne!(file().0, first.0, "another file in its place");
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        let reader = std::thread::spawn({
            let fifo = fifo.clone();
            move || fs::read_to_string(fifo).unwrap()
        });
        assert!(write(&fifo, "three", Code::Cdi).unwrap());
        assert_eq!(reader.join().unwrap(), "three");
        assert!(!fs::metadata(&fifo).unwrap().is_file(), "it is one still");
        let (disk, link) = (dir.path().join("disk"), dir.path().join("link"));
        // A number that no disk has: opening it fails.
        let number = rustix::fs::makedev(0, 99);
        match rustix::fs::mknodat(
            rustix::fs::CWD,
            &disk,
            rustix::fs::FileType::BlockDevice,
            Mode::RWXU,
            number,
        ) {
            Ok(()) => {
                std::os::unix::fs::symlink(&disk, &link).unwrap();
                for path in [&disk, &link] {
                    let error = write(path, "four", Code::Cdi).unwrap_err();
                    assert_eq!(error.cause_line(), "it is a block device");
                }
            }
            Err(errno) => assert_eq!(errno, Errno::PERM),
        }
        assert_eq!(write(&path.join("x"), "y", Code::Cdi).unwrap_err().code(), Code::Cdi);
        assert_eq!(write(Path::new("/"), "y", Code::Cdi).unwrap_err().code(), Code::Cdi);
    }
}
