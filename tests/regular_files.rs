//! Files in places where others may put something else: FIFOs and device nodes are never opened.

use gpurun::{
    apply::{bundle::Bundle, config_file::ConfigFile, rootfs::Layers},
    image::{Image, ImageReference, Pull, Store},
    inventory::DriverRoot,
    regular_file,
    text_file::TextFile,
};
use rustix::fs::{CWD, FileType, Mode, OFlags, inotify};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A way to read the file `NAME` of a directory. Reads what is there, or fails.
type Reader = (&'static str, &'static str, fn(&Path) -> bool);

fn readers() -> [Reader; 9] {
    fn image(prefix: &str, path: &Path) -> bool {
        let store = tempfile::tempdir().unwrap();
        let store = Store::open(&store.path().join("store")).unwrap();
        let reference = ImageReference::parse(&format!("{prefix}:{}", path.display())).unwrap();
        Image::open(&reference, &store, &Pull::default()).is_ok()
    }
    [
        ("TextFile", "file", |dir| TextFile::read(&dir.join("file"), 1 << 20).is_ok()),
        ("OpenRoot", "file", |dir| {
            let root = DriverRoot(dir.into());
            root.open().unwrap().open_file(Path::new("/file")).is_some()
        }),
        ("Layers", "file", |dir| Layers::open(vec![dir.into()]).unwrap().read("/file", 100).is_some()),
        ("Bundle", "config.json", |dir| Bundle::open(dir, None).is_ok()),
        ("Bundle with --config", "own.json", |dir| Bundle::open(dir, Some(&dir.join("own.json"))).is_ok()),
        ("ConfigFile", "file", |dir| ConfigFile::open(&dir.join("file")).is_ok()),
        ("archive", "file.tar", |dir| image("oci-archive", &dir.join("file.tar"))),
        ("layout", "index.json", |dir| image("oci", dir)),
        ("layout's version", "oci-layout", |dir| image("oci", dir)),
    ]
}

/// Descriptor that counts how often a file is opened.
fn watch(path: &Path) -> rustix::fd::OwnedFd {
    let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&events, path, inotify::WatchFlags::OPEN).unwrap();
    events
}

fn was_opened(events: &rustix::fd::OwnedFd) -> bool {
    rustix::io::read(events, &mut [0_u8; 256]) != Err(rustix::io::Errno::AGAIN)
}

#[test]
fn fifos_and_device_nodes_are_never_opened() {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: device nodes need root");
    }
    let kinds = [(FileType::Fifo, 0), (FileType::CharacterDevice, rustix::fs::makedev(1, 5))];
    for (kind, device) in kinds.into_iter().filter(|(kind, _)| is_root || *kind == FileType::Fifo) {
        for (what, name, read) in readers() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(name);
            rustix::fs::mknodat(CWD, &path, kind, Mode::RUSR | Mode::WUSR, device).unwrap();
            let events = watch(&path);
            assert!(!read(dir.path()), "{what}: {kind:?}");
            assert!(!was_opened(&events), "{what} opened a {kind:?}");
        }
    }
    // The watch notices an open.
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("file");
    fs::write(&path, "x").unwrap();
    let events = watch(&path);
    assert!(TextFile::read(&path, 10).is_ok() && was_opened(&events));
}

#[test]
fn a_regular_file_is_opened_by_the_descriptor_that_was_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "first").unwrap();
    let found = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    fs::rename(&path, dir.path().join("other")).unwrap();
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let (file, stat) = regular_file::open(&found).unwrap();
    assert_eq!((std::io::read_to_string(file).unwrap().as_str(), stat.st_size), ("first", 5));
    let fifo = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert_eq!(regular_file::open(&fifo).unwrap_err().to_string(), "it is a FIFO, not a regular file");
}
