//! What tells that the host is not what it was: the kernel's messages about modules and devices, and changes in the directories
//! where the driver has its files and nodes. It says that a look is worth it; [`Fingerprint::change`] is the look.
//!
//! In /proc and /sys inotify(7) sees nothing. What changes there is preceded or followed by something that is seen: a module
//! is loaded with a message, and who makes a MIG device opens and closes /dev/nvidiactl.

use super::{
    driver_files,
    types::{Fingerprint, Host, Inventory},
};
use crate::error::{Code, OrFail, Result};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::OwnedFd,
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    ffi::{OsStr, OsString},
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::Path,
    time::Duration,
};

/// Directories of nodes, from the dev root.
const NODE_DIRS: [&str; 5] =
    ["dev", "dev/nvidia-caps", "dev/nvidia-caps-imex-channels", "dev/dri", "dev/infiniband"];
/// Every program that speaks to the driver opens it, and closes it when it has changed what it came to change.
const CONTROL_NODE: &str = "dev/nvidiactl";
/// Of the kernel's messages those about modules (the driver's own), PCI devices (which the driver takes and leaves) and DRM nodes.
const SUBSYSTEMS: [&[u8]; 3] = [b"SUBSYSTEM=module", b"SUBSYSTEM=pci", b"SUBSYSTEM=drm"];
/// The group of the kernel's own messages (lib/kobject_uevent.c); udev's is another one.
const KERNEL_GROUP: u32 = 1;
/// What comes within this time is looked at once: a package brings hundreds of files.
const TOGETHER: Duration = Duration::from_millis(100);

/// Names in a directory; `None`: all of them.
type Names = Option<BTreeSet<OsString>>;

/// Tells what the host has, and again each time that is not true any more, for ever. A host that cannot be read is read again
/// when something has happened: a driver in the middle of its upgrade.
///
/// # Errors
/// Those of [`Watch::new`] and [`Watch::wait`].
pub fn follow(host: &Host, state_dir: &Path, mut tell: impl FnMut(Result<Inventory>)) -> Result<Infallible> {
    let mut watch = Watch::new()?;
    loop {
        watch.places(host, None)?;
        let inventory = Inventory::current(host, state_dir);
        let fingerprint = inventory.as_ref().ok().map(|inventory| inventory.fingerprint.clone());
        tell(inventory);
        let Some(fingerprint) = fingerprint else {
            watch.wait()?;
            continue;
        };
        watch.places(host, Some(&fingerprint))?;
        // Looked at first: what changed while it was read was not watched yet.
        while fingerprint.change(host).is_none() {
            watch.wait()?;
            watch.places(host, Some(&fingerprint))?;
        }
    }
}

/// A host that is being watched. It costs nothing while nothing happens.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    uevents: OwnedFd,
    watched: BTreeMap<i32, Names>,
}

impl Watch {
    /// Hears the kernel, and watches no place yet.
    ///
    /// # Errors
    /// [`Code::Inventory`] if the kernel does not let us: inotify(7) has limits for each user.
    pub fn new() -> Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .or_fail(Code::Inventory, || "inotify cannot be used")?;
        Ok(Self { inotify, uevents: uevents()?, watched: BTreeMap::new() })
    }

    /// Watches the places of a driver, whether or not one is there, and those that a fingerprint was made of. What is made anew
    /// is no longer watched, so each time something has happened this is to be said again.
    ///
    /// # Errors
    /// As for [`Watch::new`].
    pub fn places(&mut self, host: &Host, fingerprint: Option<&Fingerprint>) -> Result<()> {
        for directory in NODE_DIRS {
            self.add(&host.dev_root.join(directory))?;
        }
        for directory in driver_files::library_dirs(&host.driver_root) {
            self.add(&directory)?;
        }
        for path in fingerprint.iter().flat_map(|fingerprint| fingerprint.mtimes.keys()) {
            self.add(path)?;
        }
        self.add_control_node(host)
    }

    /// Waits until something has happened.
    ///
    /// # Errors
    /// [`Code::Internal`]
    pub fn wait(&mut self) -> Result<()> {
        let failed = || "the kernel's messages cannot be waited for";
        loop {
            let mut both = [&self.inotify, &self.uevents].map(|fd| PollFd::new(fd, PollFlags::IN));
            match poll(&mut both, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).or_fail(Code::Internal, failed),
            }
            std::thread::sleep(TOGETHER);
            let files = self.files_changed().or_fail(Code::Internal, failed)?;
            let devices = self.devices_changed().or_fail(Code::Internal, failed)?;
            if files || devices {
                return Ok(());
            }
        }
    }

    /// A directory is watched itself; what is a file, or not there, in the nearest directory above that is.
    fn add(&mut self, path: &Path) -> Result<()> {
        const CHANGES: WatchFlags = WatchFlags::CREATE
            .union(WatchFlags::DELETE)
            .union(WatchFlags::MOVE)
            .union(WatchFlags::ATTRIB)
            .union(WatchFlags::DELETE_SELF)
            .union(WatchFlags::MOVE_SELF)
            .union(WatchFlags::ONLYDIR);
        let mut below: Option<&OsStr> = None;
        for directory in path.ancestors() {
            match self.register(directory, CHANGES, below.map(OsStr::to_owned)) {
                Ok(()) => return Ok(()),
                Err(Errno::NOENT | Errno::NOTDIR) => below = directory.file_name(),
                Err(errno) => {
                    return Err(errno)
                        .or_fail(Code::Inventory, || format!("{} cannot be watched", directory.display()))
                        .map_err(|error| error.fix("raise fs.inotify.max_user_watches with sysctl"));
                }
            }
        }
        Ok(())
    }

    fn add_control_node(&mut self, host: &Host) -> Result<()> {
        let node = host.dev_root.join(CONTROL_NODE);
        match self.register(&node, WatchFlags::CLOSE_WRITE, None) {
            // Its directory is watched.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => {
                Err(errno).or_fail(Code::Inventory, || format!("{} cannot be watched", node.display()))
            }
        }
    }

    fn register(&mut self, path: &Path, what: WatchFlags, name: Option<OsString>) -> rustix::io::Result<()> {
        let number = inotify::add_watch(&self.inotify, path, what)?;
        match (self.watched.get_mut(&number), name) {
            (Some(Some(names)), Some(name)) => drop(names.insert(name)),
            (None, Some(name)) => drop(self.watched.insert(number, Some([name].into()))),
            (_, None) => drop(self.watched.insert(number, None)),
            (Some(None), Some(_)) => {}
        }
        Ok(())
    }

    fn files_changed(&self) -> rustix::io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut events = Reader::new(&self.inotify, &mut buffer);
        let mut changed = false;
        loop {
            match events.next() {
                Ok(event) => {
                    let names = self.watched.get(&event.wd());
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    changed |= match (names, name) {
                        // Without a name it is about the directory itself.
                        (Some(Some(names)), Some(name)) => names.contains(name),
                        (Some(_), _) => true,
                        (None, _) => event.events().contains(ReadFlags::QUEUE_OVERFLOW),
                    };
                }
                Err(Errno::AGAIN) => return Ok(changed),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn devices_changed(&self) -> rustix::io::Result<bool> {
        let mut message = [0; 8 << 10];
        let mut changed = false;
        loop {
            match rustix::net::recv(&self.uevents, &mut message, RecvFlags::DONTWAIT) {
                Ok((length, _)) => changed |= is_about_devices(message.get(..length).unwrap_or_default()),
                // More than the socket holds: some were lost.
                Err(Errno::NOBUFS) => changed = true,
                Err(Errno::AGAIN) => return Ok(changed),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// `add@/module/nvidia`, then `NAME=value`, a zero byte between them.
fn is_about_devices(message: &[u8]) -> bool {
    message.split(|byte| *byte == 0).any(|field| SUBSYSTEMS.contains(&field))
}

fn uevents() -> Result<OwnedFd> {
    let failed = || "the kernel's messages about devices cannot be heard";
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::KOBJECT_UEVENT),
    )
    .or_fail(Code::Inventory, failed)?;
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, KERNEL_GROUP))
        .or_fail(Code::Inventory, failed)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::tests::SmallHost;
    use std::{fs, os::unix::fs::symlink, sync::mpsc, thread};

    /// Whether the change wakes the watch; one that does not is followed by one that does, to have an end.
    fn wakes(small: &SmallHost, change: impl FnOnce()) -> bool {
        let mut watch = Watch::new().unwrap();
        watch.places(&small.host, Some(&small.read().unwrap().fingerprint)).unwrap();
        // Its own reading is not waited for.
        thread::sleep(TOGETHER);
        watch.files_changed().unwrap();
        let (woke, awake) = mpsc::channel();
        let waiting = thread::spawn(move || {
            watch.wait().unwrap();
            woke.send(()).unwrap();
        });
        change();
        let woken = awake.recv_timeout(TOGETHER * 5).is_ok();
        symlink("/dev/null", small.path("dev/nvidia-end")).unwrap();
        waiting.join().unwrap();
        fs::remove_file(small.path("dev/nvidia-end")).unwrap();
        woken
    }

    #[test]
    fn what_a_fingerprint_holds_is_watched_and_nothing_beside_it() {
        let small = SmallHost::new();
        small.write("driver/usr/lib64/other.so", "");
        assert!(wakes(&small, || fs::remove_file(small.path("driver/usr/lib64/other.so")).unwrap()));
        assert!(wakes(&small, || symlink("/dev/null", small.path("dev/nvidia1")).unwrap()));
        assert!(wakes(&small, || small.write("dev/nvidia-caps/nvidia-cap75", "")));
        assert!(wakes(&small, || small.write("driver/run/nvidia-persistenced/socket", "")), "a new socket");
        assert!(wakes(&small, || small.write("driver/etc/ld.so.cache", "")), "a new cache");
        // The kernel's messages about what other programs do on this machine wake it as well.
        let sleeps = |path: &str| (0..3).any(|_| !wakes(&small, || small.write(path, "")));
        assert!(sleeps("driver/etc/passwd"));
        assert!(sleeps("driver/run/other/socket"));
    }

    #[test]
    fn of_the_kernels_messages_those_about_modules_and_gpus_count() {
        for (message, counts) in [
            (
                &b"add@/module/nvidia\0ACTION=add\0DEVPATH=/module/nvidia\0SUBSYSTEM=module\0SEQNUM=7\0"[..],
                true,
            ),
            (b"bind@/devices/pci0000:00/0000:00:05.0\0SUBSYSTEM=pci\0DRIVER=nvidia\0", true),
            (b"add@/devices/virtual/net/veth0\0SUBSYSTEM=net\0", false),
            (b"add@/module\0NOTSUBSYSTEM=module\0", false),
            (b"", false),
        ] {
            assert_eq!(is_about_devices(message), counts, "{}", String::from_utf8_lossy(message));
        }
    }
}
