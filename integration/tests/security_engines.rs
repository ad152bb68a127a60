//! Attacks on what gpurun does as root for containers of other engines: by an image, and by whoever had a container before and
//! starts it again.

use gpurun_integration::{
    TestHost,
    bundle::{Bundle, asks, has_gpu_2, probed},
    must, with_compat,
};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::json;
use std::{fs, mem::MaybeUninit, os::unix::fs::symlink, path::Path, process::Command};

/// How often a file is opened while something is done.
fn opened(file: &Path, act: impl FnOnce()) -> usize {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, file, WatchFlags::OPEN).unwrap();
    act();
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    let mut count = 0;
    while let Ok(event) = events.next() {
        count += usize::from(event.events().contains(inotify::ReadFlags::OPEN));
    }
    count
}

/// A container may make any device node in its root, and open none of them; whoever opens a watchdog reboots the host, a tape
/// is rewound.
#[test]
fn no_device_node_in_a_root_is_opened() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    for file in ["etc/ld.so.cache", "etc/ld.so.conf.d/00-gpurun.conf"] {
        let bundle = Bundle::of("debian-python");
        let node = bundle.root().join(file);
        let _ = fs::remove_file(&node);
        must(Command::new("mknod").arg(&node).args(["c", "1", "3"]));
        asks(&bundle, "2");
        let count = opened(&node, || has_gpu_2(&probed(&bundle.run(&host, "")), "550.163.01"));
        assert_eq!(count, 0, "{file}");
    }
}

/// Ten thousand files, each of which takes a thousand look-ups to find, keep no processor of the host's busy: such a directory is
/// not a package's.
#[test]
fn a_directory_of_endless_libraries_is_not_taken_for_the_images_own_driver() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let root = with_compat("580.65.06", Some(r#"{"CUDA Version": "13.0", "Driver": [535, 550]}"#));
    let compat = root.path().join("usr/local/cuda-13.0/compat");
    let bundle = Bundle::empty();
    let starts = || {
        let mut spec = bundle.configure(
            &["NVIDIA_VISIBLE_DEVICES=2"],
            &[
                "python3",
                "-c",
                "import ctypes; ctypes.CDLL('libcuda.so.1'); print(open('/proc/self/maps').read())",
            ],
        );
        spec["root"]["path"] = json!(root.path());
        bundle.write(&spec);
        let ended = bundle.run(&host, "");
        assert_eq!(ended.code, 0, "{ended:?}");
        ended.out
    };
    assert!(starts().contains("/compat/libcuda.so.580.65.06"));
    for number in 0..300 {
        symlink("libcuda.so.1", compat.join(format!("libx.so.{number}"))).unwrap();
    }
    assert!(starts().contains("/usr/local/nvidia/lib64/libcuda.so.550"));
}
