//! The main job: a program in a container finds the GPUs that were asked for, and the driver that belongs to them.

use gpurun_integration::{Caller, TestHost, description, image, must, rootfs, run};
use std::fs;
use std::{collections::BTreeSet, process::Command};

/// Loads the driver as programs do, and prints the files that the loader chose.
const LOAD: &str = r#"
import ctypes, numpy
for name in "libcuda.so.1", "libnvidia-ml.so.1":
    ctypes.CDLL(name)
version = ctypes.c_int()
ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
print("numpy", numpy.arange(4).sum(), "cuda", version.value)
for path in sorted({line.split()[-1] for line in open("/proc/self/maps") if "/nvidia" in line or "/cuda" in line}):
    print(path)
"#;

const LOADED: &str = "numpy 6 cuda 12040\n/usr/local/nvidia/lib64/libcuda.so.550.163.01\n\
                      /usr/local/nvidia/lib64/libnvidia-ml.so.550.163.01\n";

fn python(host: &TestHost, caller: Caller, options: &str, image: &str) -> String {
    let ended = run(&mut host.command(caller, options, image, &["python3", "-c", LOAD]));
    assert_eq!(ended.code, 0, "{caller:?} {image}: {ended:?}");
    ended.out
}

/// The names in /dev that begin with nvidia.
fn nodes(host: &TestHost, caller: Caller, options: &str) -> Vec<String> {
    let out = host.ok(caller, options, &rootfs("busybox"), "cd /dev; find nvidia* -type c | sort");
    out.lines().map(str::to_owned).collect()
}

const SHARED: [&str; 3] = ["nvidia-uvm", "nvidia-uvm-tools", "nvidiactl"];

fn with_shared(more: &[&str]) -> Vec<String> {
    let all: BTreeSet<&str> = SHARED.into_iter().chain(more.iter().copied()).collect();
    all.into_iter().map(str::to_owned).collect()
}

#[test]
fn python_loads_the_real_driver_through_the_loaders_cache() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    for caller in Caller::EACH {
        assert_eq!(python(&host, caller, "--gpus all", &rootfs("debian-python")), LOADED);
    }
}

#[test]
fn every_form_of_an_image_runs_the_job() {
    let host = TestHost::with_driver("8xh100", 550, "flat");
    let path = |form: &str| image("debian-python", form).display().to_string();
    for caller in Caller::EACH {
        for reference in [
            format!("oci:{}:gzip", path("oci")),
            format!("oci:{}:zstd", path("oci")),
            format!("oci-archive:{}:gzip", path("oci.tar")),
            format!("docker-archive:{}", path("docker.tar")),
            format!("docker-archive:{}", path("docker.tar.gz")),
            format!("docker-archive:{}", path("docker.tar.zst")),
        ] {
            assert_eq!(python(&host, caller, "--gpus all", &reference), LOADED, "{reference}");
        }
    }
}

#[test]
fn an_image_without_shell_or_cache_loads_the_driver() {
    // The stand-ins, because the real libcuda wants libm, which this image lacks.
    let host = TestHost::new("t4");
    for caller in Caller::EACH {
        let words = ["/app/probe", "libcuda.so.1", "libnvidia-ml.so.1"];
        let ended = run(&mut host.command(caller, "--gpus all", &rootfs("distroless"), &words));
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.out.contains("libcuda.so.1: loaded\nlibnvidia-ml.so.1: loaded\n"), "{ended:?}");
    }
}

#[test]
fn nvidia_smi_lists_inside_what_it_lists_outside() {
    for (name, layout) in [("8xh100", "debian"), ("a100-mig", "flat"), ("t4", "flat")] {
        let host = TestHost::with_driver(name, 550, layout);
        let libraries = host.driver("usr/lib/x86_64-linux-gnu");
        let smi = match layout {
            "debian" => host.driver("usr/lib/nvidia/current/nvidia-smi"),
            _ => host.driver("usr/bin/nvidia-smi"),
        };
        let library_path = format!("{0}:{0}/nvidia/current", libraries.display());
        let outside = must(Command::new(smi).arg("-L").env("LD_LIBRARY_PATH", library_path));
        assert_eq!(outside.matches("UUID: GPU-").count(), description(name).gpus.len(), "{outside}");
        for caller in Caller::EACH {
            let inside = host.ok(caller, "--gpus all", &rootfs("debian-python"), "nvidia-smi -L");
            assert_eq!(inside, outside, "{name} {caller:?}");
        }
    }
}

#[test]
fn ldconfig_in_the_container_changes_nothing() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let image = rootfs("debian-python");
    // What the image's own cache holds, without a driver.
    let own = host.ok(Caller::Root, "-u 0", &image, "ldconfig -p");
    let own: Vec<&str> = own.lines().skip(1).filter(|line| line.contains(" => ")).collect();
    assert!(own.len() > 20, "{own:?}");
    let script = "ldconfig -p; echo ---; touch /usr/lib /usr/lib/x86_64-linux-gnu; ldconfig; ldconfig -p; echo ---; \
                  python3 -c \"import ctypes, numpy; ctypes.CDLL('libcuda.so.1'); ctypes.CDLL('libnvidia-ml.so.1'); print('loads')\"";
    let out = host.ok(Caller::Root, "-u 0 --gpus all", &image, script);
    let [before, after, loads] = out.split("---\n").collect::<Vec<_>>()[..] else { panic!("{out}") };
    assert_eq!(loads, "loads\n");
    let of_image = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|line| line.contains(" => ") && !line.contains("/usr/local/nvidia/"))
            .filter(|line| !line.contains("libcuda") && !line.contains("libnvidia"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(of_image(before), own);
    assert_eq!(of_image(after), own);
    for listing in [before, after] {
        // The first of a name is the one that is loaded.
        for name in ["libcuda.so.1 ", "libnvidia-ml.so.1 ", "libnvidia-ptxjitcompiler.so.1 "] {
            let first = listing.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or(name);
            assert!(first.contains("=> /usr/local/nvidia/lib64/"), "{first}\n{listing}");
        }
    }
}

#[test]
fn gpus_all_gives_every_node_and_no_gpus_gives_none() {
    let host = TestHost::new("8xh100");
    let gpus: Vec<String> = (0..8).map(|n| format!("nvidia{n}")).collect();
    let gpus: Vec<&str> = gpus.iter().map(String::as_str).collect();
    for caller in Caller::EACH {
        assert_eq!(nodes(&host, caller, "--gpus all"), with_shared(&gpus));
        assert_eq!(nodes(&host, caller, ""), [""; 0]);
    }
    let out = host.ok(
        Caller::Root,
        "--gpus all",
        &rootfs("busybox"),
        "stat -c '%n %t:%T %a' /dev/nvidia3 /dev/nvidiactl",
    );
    assert_eq!(out, "/dev/nvidia3 c3:3 666\n/dev/nvidiactl c3:ff 666\n");
}

#[test]
fn a_gpus_node_is_the_one_of_its_minor_number() {
    let host = TestHost::new("8xh100");
    let told = description("8xh100");
    assert_ne!(told.gpus[1].minor, 1, "the description must tell index and minor number apart");
    for caller in Caller::EACH {
        for index in [0, 1, 5] {
            let gpu = &told.gpus[index];
            let node = format!("nvidia{}", gpu.minor);
            for name in [index.to_string(), gpu.uuid.clone(), gpu.pci.clone()] {
                assert_eq!(
                    nodes(&host, caller, &format!("--gpus device={name}")),
                    with_shared(&[&node]),
                    "{name}"
                );
            }
            let options = format!("--gpus device={index}");
            let smi = host.ok(caller, &options, &rootfs("debian-python"), "nvidia-smi -L");
            assert_eq!(smi, format!("GPU 0: {} (UUID: {})\n", gpu.name, gpu.uuid));
        }
    }
}

#[test]
fn what_is_asked_for_twice_is_given_once() {
    let host = TestHost::new("8xh100");
    let told = description("8xh100");
    let node = format!("nvidia{}", told.gpus[0].minor);
    for list in ["0,0".to_owned(), format!("0,{}", told.gpus[0].uuid)] {
        let options = format!("--gpus \"device={list}\"");
        assert_eq!(nodes(&host, Caller::Root, &options), with_shared(&[&node]), "{list}");
    }
}

#[test]
fn what_cannot_be_given_is_refused_with_the_choices() {
    let host = TestHost::new("8xh100");
    let forty = "1".repeat(40);
    let first = &description("8xh100").gpus[0].uuid;
    for caller in Caller::EACH {
        for (request, code) in [
            ("99", "GPU-0021"),
            ("device=99", "GPU-0021"),
            ("device=8", "GPU-0021"),
            ("device=GPU-00000000-0000-0000-0000-000000000000", "GPU-0021"),
            ("device=MIG-0", "GPU-0021"),
            ("device=0:0", "GPU-0021"),
        ] {
            let error = host.refused(caller, &format!("--gpus {request}"), &rootfs("busybox"), code);
            assert!(error.contains(first.as_str()) && error.contains("fix: "), "{request}: {error}");
        }
        for request in ["\"device=0,\"", "device=-1", "-2", "all,all", "everything", "device=", "device=0x1"]
        {
            let error = host.refused(caller, &format!("--gpus={request}"), &rootfs("busybox"), "GPU-0020");
            assert!(error.contains("fix: "), "{request}: {error}");
        }
        for request in [forty.clone(), format!("device={forty}")] {
            let ended = host.sh(caller, &format!("--gpus {request}"), &rootfs("busybox"), "echo it ran");
            assert!(ended.code == 125 && ended.err.contains("fix: ") && ended.out.is_empty(), "{ended:?}");
        }
    }
    // Docker: -1 is every GPU.
    assert_eq!(nodes(&host, Caller::Root, "--gpus=-1").len(), 8 + SHARED.len());
}

#[test]
fn a_mig_device_has_its_gpus_node_and_its_own_two_capabilities() {
    let host = TestHost::new("a100-mig");
    let gpu = &description("a100-mig").gpus[0];
    let migs = &gpu.mig.as_ref().unwrap().devices;
    for caller in Caller::EACH {
        for (index, mig) in migs.iter().enumerate() {
            let caps = mig.cap_minors(gpu.minor).map(|minor| format!("nvidia-caps/nvidia-cap{minor}"));
            let expected = with_shared(&["nvidia0", &caps[0], &caps[1]]);
            assert_eq!(nodes(&host, caller, &format!("--gpus device=0:{index}")), expected);
            assert_eq!(nodes(&host, caller, &format!("--gpus device={}", mig.uuid)), expected);
        }
    }
    let smi = host.ok(Caller::User, "--gpus device=0:1", &rootfs("debian-python"), "nvidia-smi -L");
    assert!(smi.contains(&migs[1].uuid) && !smi.contains(&migs[0].uuid), "{smi}");
    let error = host.refused(Caller::Root, "--gpus device=0", &rootfs("busybox"), "GPU-0021");
    assert!(error.contains("MIG mode") && error.contains(&migs[2].uuid), "{error}");
    // All: the three parts of the first, and the whole second.
    let all = nodes(&host, Caller::Root, "--gpus all");
    assert!(all.contains(&"nvidia1".to_owned()), "{all:?}");
    assert_eq!(all.iter().filter(|node| node.contains("nvidia-cap")).count(), 6);
}

#[test]
fn a_lost_gpu_costs_itself_and_says_so() {
    let host = TestHost::new("one-lost-gpu");
    for caller in Caller::EACH {
        assert_eq!(nodes(&host, caller, "--gpus all"), with_shared(&["nvidia0", "nvidia1", "nvidia3"]));
        let warned = host.sh(caller, "--gpus all", &rootfs("busybox"), "true");
        assert!(warned.err.contains("WARN") && warned.err.contains('2'), "{warned:?}");
        host.refused(caller, "--gpus device=2", &rootfs("busybox"), "GPU-0015");
        host.refused(caller, "--gpus 4", &rootfs("busybox"), "GPU-0015");
        assert_eq!(nodes(&host, caller, "--gpus device=3"), with_shared(&["nvidia3"]));
    }
}

#[test]
fn a_gpu_that_is_back_is_given_out_at_once() {
    let host = TestHost::new("8xh100");
    let uuid = &description("8xh100").gpus[3].uuid;
    let lost = host.path().join("gpus").join(uuid);
    for caller in Caller::EACH {
        fs::create_dir_all(lost.parent().unwrap()).unwrap();
        fs::write(&lost, "lost").unwrap();
        // The user's own snapshot, and root's, say so.
        let _ = fs::remove_dir_all(host.state_dir(caller.uid()));
        host.refused(caller, "--gpus device=3", &rootfs("busybox"), "GPU-0015");
        fs::remove_file(&lost).unwrap();
        assert_eq!(nodes(&host, caller, "--gpus device=3"), with_shared(&["nvidia0"]));
    }
}

#[test]
fn the_users_variable_asks_for_gpus_and_the_images_does_not() {
    let host = TestHost::new("8xh100");
    // Its configuration has NVIDIA_VISIBLE_DEVICES=all, as CUDA's images have.
    let image = format!("oci:{}:zstd", image("debian-python", "oci").display());
    let list = "ls /dev | grep nvidia | tr '\\n' ' '; ls /usr/local/nvidia 2>/dev/null; true";
    for caller in Caller::EACH {
        assert_eq!(host.ok(caller, "", &image, list), "");
        let given = host.ok(caller, "-e NVIDIA_VISIBLE_DEVICES=1", &image, list);
        assert!(given.starts_with("nvidia-uvm nvidia-uvm-tools nvidia2 nvidiactl "), "{given}");
        for nothing in ["void", ""] {
            assert_eq!(host.ok(caller, &format!("-e NVIDIA_VISIBLE_DEVICES={nothing}"), &image, list), "");
        }
        assert_eq!(host.ok(caller, "--gpus 0", &image, list), "");
    }
    // The driver without a GPU.
    let none = host.ok(
        Caller::Root,
        "-e NVIDIA_VISIBLE_DEVICES=none",
        &image,
        "ls /dev/nvidia[0-9]* 2>&1; ls /usr/local/nvidia/lib64",
    );
    assert!(none.contains("No such file") && none.contains("libnvidia-ml.so.1"), "{none}");
}

#[test]
fn a_capability_that_was_not_asked_for_is_not_there() {
    let host = TestHost::with_driver("t4", 550, "flat");
    for caller in Caller::EACH {
        let out = host.ok(
            caller,
            "--gpus all,capabilities=utility",
            &rootfs("debian-python"),
            "ls /dev /usr/local/nvidia/lib64; ldconfig -p; nvidia-smi -L",
        );
        assert!(!out.contains("libcuda") && !out.contains("nvidia-uvm"), "{out}");
        assert!(out.contains("libnvidia-ml.so.1") && out.contains("GPU 0: Tesla T4"), "{out}");
        host.refused(caller, "--gpus all,capabilities=flying", &rootfs("busybox"), "GPU-0022");
    }
}
