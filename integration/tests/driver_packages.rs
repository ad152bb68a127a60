//! Debian's real driver, as far as it answers without a GPU.

use gpurun_integration::{TestHost, driver_packages, run};
use std::{path::Path, process::Command};

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

#[test]
fn the_real_libcuda_tells_which_cuda_it_speaks() {
    for (branch, expected) in [(535, 12020), (550, 12040)] {
        let path = driver_packages(branch, "flat").join(LIBRARIES).join("libcuda.so.1");
        // SAFETY: the function has the type of cuda.h.
        let (result, version) = unsafe {
            let cuda = libloading::Library::new(path).unwrap();
            let ask = cuda.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"cuDriverGetVersion").unwrap();
            let mut version = 0;
            (ask(&mut version), version)
        };
        assert_eq!((result, version), (0, expected));
    }
}

#[test]
fn debians_layout_reaches_the_libraries_through_absolute_links() {
    for branch in [535, 550] {
        let root = driver_packages(branch, "debian");
        let link = |path: &Path| std::fs::read_link(root.join(path.strip_prefix("/").unwrap())).unwrap();
        for name in ["libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-ptxjitcompiler.so.1"] {
            let alternative = link(&Path::new("/").join(LIBRARIES).join(name));
            assert!(alternative.starts_with("/etc/alternatives"), "{}", alternative.display());
            assert_eq!(link(&alternative), Path::new("/").join(LIBRARIES).join("nvidia/current").join(name));
        }
        assert_eq!(
            link(&link(Path::new("/usr/bin/nvidia-smi"))),
            Path::new("/usr/lib/nvidia/current/nvidia-smi")
        );
    }
}

#[test]
fn the_real_nvidia_smi_lists_the_simulated_gpus_as_the_stand_in_does() {
    for branch in [535, 550] {
        for name in ["8xh100", "a100-mig", "t4"] {
            let list = |host: &TestHost| {
                run(Command::new(host.driver("usr/bin/nvidia-smi"))
                    .arg("-L")
                    .env("LD_LIBRARY_PATH", host.driver(LIBRARIES)))
            };
            let real = list(&TestHost::with_driver(name, branch, "flat"));
            let stand_in = list(&TestHost::new(name));
            assert_eq!(real.code, 0, "{real:?}");
            assert_eq!(real.out, stand_in.out);
            assert!(real.out.starts_with("GPU 0: ") && real.out.contains("(UUID: GPU-"), "{real:?}");
            assert!(stand_in.err.contains("simulated"), "{stand_in:?}");
        }
    }
}
