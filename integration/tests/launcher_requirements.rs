//! Whether the host can run the image is decided before a layer is unpacked; the image's own newer driver libraries are used
//! where they fit.

use gpurun_integration::{Caller, TestHost, copy_of_root, image, must, pack, rootfs, run, with_compat};
use std::{fs, os::unix::fs::symlink, path::Path, process::Command};
use tempfile::TempDir;

fn packed(env: &[&str]) -> (TempDir, String) {
    let options: Vec<&str> = env.iter().flat_map(|variable| ["--env", variable]).collect();
    let dir = pack(&image("busybox", "root"), &options);
    let reference = format!("oci:{}:zstd", dir.path().join("packed/oci").display());
    (dir, reference)
}

/// How many layers this caller's store holds.
fn layers(host: &TestHost, caller: Caller) -> usize {
    fs::read_dir(host.store(caller.uid()).join("layers")).map_or(0, Iterator::count)
}

#[test]
fn an_image_for_a_cuda_that_no_driver_speaks_is_refused_before_a_layer_is_unpacked() {
    for (env, code) in [
        ("NVIDIA_REQUIRE_CUDA=cuda>=99", "GPU-0030"),
        ("CUDA_VERSION=99.0", "GPU-0031"),
        ("NVIDIA_REQUIRE_CUDA=cuda>=12.8 brand=tesla,driver>=535,driver<536", "GPU-0030"),
        ("NVIDIA_REQUIRE_ARCH=arch>=10.0", "GPU-0030"),
    ] {
        let host = TestHost::new("8xh100");
        let (_dir, reference) = packed(&[env]);
        for caller in Caller::EACH {
            let error = host.refused(caller, "--gpus all", &reference, code);
            assert!(error.contains("fix: "), "{error}");
            if env.contains("CUDA") {
                assert!(error.contains("550.163.01") && error.contains("12.4"), "{error}");
            }
            assert_eq!(layers(&host, caller), 0, "{env}");
            // Without a GPU nothing is required of one, and the user may insist.
            assert_eq!(host.ok(caller, "", &reference, "echo ran"), "ran\n");
            assert_eq!(layers(&host, caller), 1);
            assert_eq!(
                host.ok(caller, "--gpus all -e NVIDIA_DISABLE_REQUIRE=1", &reference, "echo ran"),
                "ran\n"
            );
        }
    }
}

#[test]
fn the_refusal_names_the_driver_that_would_do() {
    let host = TestHost::new("old-driver");
    let (_dir, reference) = packed(&["CUDA_VERSION=12.6.3"]);
    let error = host.refused(Caller::Root, "--gpus all", &reference, "GPU-0031");
    assert!(error.contains("470.82.01") && error.contains("560.28.03"), "{error}");
    let (_dir, reference) = packed(&["NVIDIA_REQUIRE_CUDA=cuda>=12.2"]);
    let error = host.refused(Caller::Root, "--gpus all", &reference, "GPU-0030");
    assert!(error.contains("11.4") && error.contains("535.54.03"), "{error}");
}

#[test]
fn a_newer_minor_version_runs_with_a_warning() {
    let host = TestHost::new("8xh100");
    let (_dir, reference) = packed(&["CUDA_VERSION=12.9.1"]);
    for caller in Caller::EACH {
        let ended = host.sh(caller, "--gpus all", &reference, "echo ran");
        assert_eq!((ended.code, ended.out.as_str()), (0, "ran\n"), "{ended:?}");
        assert!(ended.err.contains("WARN") && ended.err.contains("575.51.03"), "{ended:?}");
    }
    let (_dir, reference) = packed(&["CUDA_VERSION=12.4.1", "NVIDIA_REQUIRE_CUDA=cuda>=12.4"]);
    let ended = host.sh(Caller::Root, "--gpus all", &reference, "echo ran");
    assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{ended:?}");
}

/// What cuDriverGetVersion says, and from which file, with LD_LIBRARY_PATH as CUDA's images set it.
fn cuda(host: &TestHost, caller: Caller, root: &Path) -> String {
    let script = "import ctypes\nv = ctypes.c_int()\nctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(v))\n\
                  print(v.value, {l.split()[-1] for l in open('/proc/self/maps') if 'libcuda' in l})";
    let options = "--gpus all -e LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64";
    let image = format!("rootfs:{}", root.display());
    let ended = run(&mut host.command(caller, options, &image, &["python3", "-c", script]));
    assert_eq!(ended.code, 0, "{ended:?}");
    ended.out
}

#[test]
fn the_images_newer_libcuda_is_used_where_its_note_names_the_hosts_branch() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let own = "12040 {'/usr/local/nvidia/lib64/libcuda.so.550.163.01'}\n";
    let images = "13000 {'/usr/local/cuda-13.0/compat/libcuda.so.580.65.06'}\n";
    for (version, note, expected) in [
        ("580.65.06", Some(r#"{"Format": 1, "CUDA Version": "13.0", "Driver": [535, 550, 570]}"#), images),
        ("580.65.06", Some(r#"{"Format": 1, "CUDA Version": "13.0", "Driver": [535, 570]}"#), own),
        ("550.54.15", Some(r#"{"Format": 1, "CUDA Version": "12.4", "Driver": [535, 550]}"#), own),
        ("580.65.06", Some("no JSON"), own),
        ("580.65.06", None, own),
    ] {
        let root = with_compat(version, note);
        for caller in Caller::EACH {
            assert_eq!(cuda(&host, caller, root.path()), expected, "{caller:?} {version} {note:?}");
        }
    }
    // A GeForce takes none, whatever the note says.
    let mut description = gpurun_integration::description("t4");
    description.gpus[0].brand = "geforce".into();
    let stand_ins = gpurun::simulated_host::DriverFiles::StandIns;
    let host = TestHost::with(&description, stand_ins);
    let root = with_compat("580.65.06", Some(r#"{"Driver": [535, 550]}"#));
    assert!(!cuda(&host, Caller::Root, root.path()).contains("compat"));
}

#[test]
fn a_broken_compat_directory_is_no_reason_not_to_start() {
    let host = TestHost::new("t4");
    for build in [
        |dir: &Path| fs::write(dir.join("libcuda.so.580.65.06"), "not a library").unwrap(),
        |dir: &Path| symlink("/etc/shadow", dir.join("libcuda.so.580.65.06")).unwrap(),
        |dir: &Path| symlink("libcuda.so.580.65.06", dir.join("libcuda.so.580.65.06")).unwrap(),
        |dir: &Path| drop(must(Command::new("mkfifo").arg(dir.join("libcuda.so.580.65.06")))),
        |dir: &Path| fs::create_dir(dir.join("libcuda.so.580.65.06")).unwrap(),
    ] {
        let root = copy_of_root("busybox");
        let dir = root.path().join("usr/local/cuda/compat");
        fs::create_dir_all(&dir).unwrap();
        build(&dir);
        let image = format!("rootfs:{}", root.path().display());
        assert_eq!(host.ok(Caller::Root, "--gpus all", &image, "echo ran"), "ran\n");
    }
}

#[test]
fn an_image_that_needs_its_own_libcuda_and_has_none_that_fits_is_refused() {
    let host = TestHost::with_driver("8xh100", 535, "flat");
    let root = with_compat("580.65.06", Some(r#"{"CUDA Version": "13.0", "Driver": [535]}"#));
    let options = "--gpus all -e CUDA_VERSION=13.0.1";
    let script = "import ctypes; v = ctypes.c_int(); ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(v)); print(v.value)";
    for caller in Caller::EACH {
        let fitting = format!("rootfs:{}", root.path().display());
        let ended = run(&mut host.command(caller, options, &fitting, &["python3", "-c", script]));
        assert_eq!((ended.code, ended.out.as_str()), (0, "13000\n"), "{ended:?}");
        host.refused(caller, options, &rootfs("debian-python"), "GPU-0031");
    }
}
