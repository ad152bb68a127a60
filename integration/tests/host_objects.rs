//! The driver's daemons have sockets in directories that other users may write: objects of such users are not mounted.

use gpurun_integration::{
    Caller, TestHost,
    bundle::{Bundle, Hierarchies},
    cached, dist, must, rootfs, run, unique, until,
};
use serde_json::json;
use std::{
    fs,
    io::Write,
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        net::UnixListener,
    },
    path::PathBuf,
    process::{Command, Stdio},
};

/// A host with a world-writable /tmp and an MPS daemon of root.
fn with_mps() -> (TestHost, PathBuf) {
    let host = TestHost::new("t4");
    let tmp = host.driver("tmp");
    let mps = tmp.join("nvidia-mps");
    fs::create_dir_all(&mps).unwrap();
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(mps.join("control"), "the daemon's").unwrap();
    (host, mps)
}

const LOOK: &str = "cat /tmp/nvidia-mps/control 2>&1; touch /tmp/nvidia-mps/x 2>&1; true";

/// The content of /tmp/nvidia-mps in a container, for each destination that mounts it.
fn seen(host: &TestHost) -> Vec<(String, String)> {
    printed(host, LOOK)
}

/// What a script prints in a container, for each destination that mounts daemons' objects.
fn printed(host: &TestHost, script: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let launched = host.sh(Caller::Root, "--gpus all", &rootfs("busybox"), script);
    assert_eq!(launched.code, 0, "{launched:?}");
    all.push(("launcher".to_owned(), launched.out));
    for runtime in ["runc", "crun"] {
        let mut bundle = Bundle::of("busybox");
        bundle.runtime = runtime;
        bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["sh", "-c", script]);
        let path = if runtime == "crun" { cached("crun/usr/bin/crun") } else { runtime.into() };
        let ended = bundle.run(host, &format!("runtimes = [{path:?}]\n"));
        assert_eq!(ended.code, 0, "{runtime} {ended:?}");
        all.push((format!("runtime above {runtime}"), ended.out));
    }
    let bundle = Bundle::of("busybox");
    let mut spec = bundle.configure(&["NVIDIA_VISIBLE_DEVICES=all"], &["sh", "-c", script]);
    let env = [
        format!("GPURUN_SIMULATED_HOST={}", host.path().display()),
        format!("GPURUN_STATE_DIR={}", host.state_dir(0).display()),
    ];
    let name = "nvidia-container-runtime-hook";
    let hook = json!({"path": bundle.link(name), "args": [name, "prestart"], "env": env});
    spec["hooks"] = json!({"prestart": [hook]});
    bundle.write(&spec);
    let dir = bundle.dir.path();
    let mut command = Hierarchies::Own.command("/usr/sbin/runc".as_ref());
    let ended =
        run(command.arg("--root").arg(dir.join("state")).args(["run", "--bundle"]).arg(dir).arg(unique()));
    assert_eq!(ended.code, 0, "{ended:?}");
    all.push(("prestart hook".to_owned(), ended.out));
    all
}

#[test]
fn a_daemons_directory_is_mounted_read_only() {
    let (host, mps) = with_mps();
    for (destination, saw) in seen(&host) {
        assert!(saw.starts_with("the daemon's"), "{destination}: {saw}");
        assert!(saw.contains("Read-only file system"), "{destination}: {saw}");
    }
    assert!(!mps.join("x").exists());
}

#[test]
fn objects_of_another_user_are_not_mounted() {
    let (host, mps) = with_mps();
    seen(&host);
    let secret = host.driver("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("control"), "root's secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    let times = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    let before = times(&mps);
    let set = |path: &PathBuf| {
        let file = fs::File::open(path).unwrap();
        file.set_times(fs::FileTimes::new().set_modified(before)).unwrap();
    };
    for trap in ["another user's directory", "a link", "a directory that everyone may write to"] {
        let _ = fs::remove_dir_all(&mps).or_else(|_| fs::remove_file(&mps));
        match trap {
            "a link" => {
                symlink(&secret, &mps).unwrap();
                set(&secret);
            }
            _ => {
                fs::create_dir(&mps).unwrap();
                fs::write(mps.join("control"), "a stranger's").unwrap();
                if trap.starts_with("another") {
                    chown(&mps, Some(54321), Some(54321)).unwrap();
                } else {
                    fs::set_permissions(&mps, fs::Permissions::from_mode(0o777)).unwrap();
                }
                // The owner can set the mtime.
                set(&mps);
            }
        }
        for (destination, saw) in seen(&host) {
            assert!(!saw.contains("stranger") && !saw.contains("secret"), "{trap}, {destination}: {saw}");
        }
    }
}

#[test]
fn a_spec_names_no_object_that_can_be_replaced() {
    let (host, _) = with_mps();
    let directory = host.driver("run/nvidia-persistenced");
    fs::create_dir_all(&directory).unwrap();
    let _daemon = UnixListener::bind(directory.join("socket")).unwrap();
    let generate = || run(host.gpurun().args(["cdi", "generate", "--hook"]).arg(dist("gpurun-hook")));
    let ended = generate();
    assert!(ended.code == 0 && !ended.out.contains("nvidia-mps"), "{ended:?}");
    assert!(ended.err.contains("-v /tmp/nvidia-mps:/tmp/nvidia-mps"), "not reported: {ended:?}");
    assert!(ended.out.contains("nvidia-persistenced/socket"), "root's own directory: {}", ended.out);
    let socket = ended.out.split("nvidia-persistenced/socket").last().expect("root's own directory");
    assert!(socket.contains("- ro\n"), "{socket:.400}");
    chown(&directory, Some(54321), None).unwrap();
    assert!(!generate().out.contains("nvidia-persistenced/socket"), "the daemon's user can replace it");
}

/// The real control daemon, which starts without a GPU, gives its directory the mode 0777.
#[test]
fn of_an_open_directory_only_the_daemons_own_objects_are_mounted() {
    for branch in ["driver-535", "driver-550"] {
        let host = TestHost::new("t4");
        let tmp = host.driver("tmp");
        fs::create_dir_all(&tmp).unwrap();
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).unwrap();
        let mps = tmp.join("nvidia-mps");
        let control = || {
            let program = cached(&format!("{branch}/debian/usr/bin/nvidia-cuda-mps-control"));
            let mut command = Command::new(program);
            command
                .env("CUDA_MPS_PIPE_DIRECTORY", &mps)
                .env("CUDA_MPS_LOG_DIRECTORY", host.path().join("log"));
            command
        };
        must(control().arg("-d"));
        until("the daemon's socket", || mps.join("control").exists());
        assert_eq!(
            fs::metadata(&mps).unwrap().permissions().mode() & 0o7777,
            0o777,
            "the daemon has changed"
        );
        let _strangers = UnixListener::bind(mps.join("stranger")).unwrap();
        chown(mps.join("stranger"), Some(54321), Some(54321)).unwrap();
        let found = printed(&host, "ls -F /tmp/nvidia-mps");
        // Another user's socket in its place.
        fs::rename(mps.join("control"), mps.join("aside")).unwrap();
        fs::rename(mps.join("stranger"), mps.join("control")).unwrap();
        let replaced = printed(&host, "ls -F /tmp/nvidia-mps 2>&1; true");
        fs::rename(mps.join("aside"), mps.join("control")).unwrap();
        let mut quit = control().stdin(Stdio::piped()).spawn().unwrap();
        quit.stdin.take().unwrap().write_all(b"quit\n").unwrap();
        quit.wait().unwrap();
        for (destination, saw) in found {
            assert_eq!(saw, "control=\nlog|\n", "{branch} {destination}");
        }
        for (destination, saw) in replaced {
            assert!(!saw.contains("control") && !saw.contains("stranger"), "{branch} {destination}: {saw}");
        }
    }
}
