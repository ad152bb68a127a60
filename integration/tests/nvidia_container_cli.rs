//! gpurun as `nvidia-container-cli`, as Charliecloud, enroot, Apptainer and NVIDIA's own hook call it.

use gpurun_integration::{
    Ended, SpawnPiped, TestHost, USER, bundle::Bundle, description, dist, finish, image, must, run, temporary,
};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const NAME: &str = "nvidia-container-cli";

/// A command with the host's variables.
fn with_host(host: &TestHost, uid: u32, mut command: Command) -> Command {
    command.env("GPURUN_SIMULATED_HOST", host.path()).env("GPURUN_STATE_DIR", host.state_dir(uid));
    command
}

fn cli(host: &TestHost, words: &[&str]) -> Ended {
    let mut command = Command::new(dist("gpurun"));
    command.arg0(NAME).args(words);
    run(&mut with_host(host, 0, command))
}

fn lines(host: &TestHost, words: &[&str]) -> Vec<String> {
    let ended = cli(host, words);
    assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{words:?}: {ended:?}");
    ended.out.lines().map(String::from).collect()
}

#[test]
fn what_is_listed_is_what_the_driver_has() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let all = lines(&host, &["list"]);
    // This driver root has no modprobe; whoever lists wants to know what there is all the same.
    let ended = cli(&host, &["-k", "list"]);
    assert!(ended.code == 0 && ended.out.lines().eq(&all) && ended.err.contains("modprobe"), "{ended:?}");
    let files: Vec<_> = all.iter().filter(|path| !path.starts_with("/dev/")).collect();
    for path in &files {
        assert!(host.driver(&path[1..]).symlink_metadata().is_ok_and(|file| !file.is_symlink()), "{path}");
    }
    let libraries = lines(&host, &["list", "--libraries"]);
    for name in
        ["libcuda.so.550.163.01", "libnvidia-ml.so.550.163.01", "libnvidia-ptxjitcompiler.so.550.163.01"]
    {
        assert_eq!(
            libraries.iter().filter(|path| path.ends_with(&format!("/{name}"))).count(),
            1,
            "{libraries:#?}"
        );
    }
    let programs = lines(&host, &["--user", "--debug=/dev/null", "list", "--binaries", "--ipcs"]);
    assert!(programs.contains(&"/usr/lib/nvidia/current/nvidia-smi".into()), "{programs:?}");
    assert!(programs.iter().all(|path| !path.contains(".so")), "{programs:?}");
    let firmware = lines(&host, &["list", "-f"]);
    assert!(firmware.iter().all(|path| path.ends_with(".bin")), "{firmware:?}");
    assert_eq!(
        lines(&host, &["list", "-d", "1,0", "-d", "5"]),
        ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"]
            .map(String::from)
            .into_iter()
            .chain([1, 0, 5].map(|index| format!("nvidia{}", description("8xh100").gpus[index].minor)))
            .map(|name| format!("/dev/{name}"))
            .collect::<Vec<_>>()
    );
    assert!(lines(&host, &["list", "--compat32"]).is_empty(), "nothing is asked for");
    let ended = cli(&host, &["list", "-d", "9"]);
    assert!(ended.code != 0 && ended.err.contains("there is no GPU 9"), "{ended:?}");

    let mig = TestHost::new("a100-mig");
    assert_eq!(
        lines(&mig, &["list", "-d", "0:1", "--mig-config=all"])[4..].len(),
        4,
        "its GPU, two parts, the right"
    );
}

#[test]
fn what_is_told_of_the_driver_has_libnvidia_containers_form() {
    let host = TestHost::new("8xh100");
    let gpu = &description("8xh100").gpus[0];
    let csv = lines(&host, &["info", "--csv"]);
    assert_eq!(csv[0], "NVRM version,CUDA version");
    assert_eq!(csv[3], "Device Index,Device Minor,Model,Brand,GPU UUID,Bus Location,Architecture");
    let bus = format!("0000{}", gpu.pci.to_uppercase());
    assert_eq!(csv[4], format!("0,{},{},{},{},{bus},9.0", gpu.minor, gpu.name, gpu.brand, gpu.uuid));
    assert_eq!(csv.len(), 12);
    let text = lines(&host, &["info"]);
    assert_eq!(text[0], format!("NVRM version:   {}", description("8xh100").driver));
    assert_eq!((text[2].as_str(), text[7].clone()), ("", format!("GPU UUID:       {}", gpu.uuid)));
}

/// A process that waits in a mount namespace of its own until it is told to go on with a script.
fn waiting(root: &Path, script: &str) -> (std::process::Child, u32) {
    let script = format!("echo ready; read line; {script}");
    let mut child = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .arg(root)
        .stdin(Stdio::piped())
        .spawn_piped();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let id = child.id();
    (child, id)
}

#[test]
fn a_container_that_waits_is_given_its_gpus() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let bundle = Bundle::of("debian-python");
    let root = bundle.root();
    let load = "import ctypes; ctypes.CDLL(\"libcuda.so.1\"); print(\"loaded\")";
    let (mut child, pid) =
        waiting(&root, &format!("ls $0/dev; chroot $0 nvidia-smi -L; chroot $0 python3 -c '{load}'"));
    let path = root.to_str().unwrap();
    let configure = |more: &[&str]| {
        let words = [
            "configure",
            "--device=2",
            "--compute",
            "--utility",
            "--ldconfig=@/sbin/ldconfig",
            "--no-cgroups",
        ];
        cli(&host, &[&words, more].concat())
    };
    // Not the host's mounts, not the host's root, not another's, and not what the host cannot give.
    for (words, why) in [
        (&[path][..], "no mount namespace of its own"),
        (&[&format!("--pid={pid}"), "/"], "is the host's own"),
        (&[&format!("--pid={pid}"), "--require=cuda>=99.0", path], "cuda>=99.0"),
        (&["--pid=-1", path], "is not in"),
    ] {
        let ended = configure(words);
        assert!(ended.code != 0 && ended.err.contains(why), "{words:?}: {ended:?}");
    }
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!("{path}/usr")));
    let ended = configure(&[&format!("--pid={pid}"), "--require=cuda>=12.0 driver>=600", path]);
    assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{ended:?}");
    child.stdin.take().unwrap().write_all(b"go on\n").unwrap();
    let ended = finish(child);
    let gpu = &description("8xh100").gpus[2];
    assert!(ended.code == 0 && ended.out.ends_with("loaded\n") && ended.out.contains(&gpu.uuid), "{ended:?}");
    let nodes = ended.out.lines().filter(|line| line.starts_with("nvidia")).count();
    assert_eq!(nodes, 4, "nvidiactl, uvm, its tools and the GPU: {ended:?}");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!("{path}/usr")));
}

/// As enroot and Apptainer call it: by an ordinary user, inside the container's namespaces, without a process.
#[test]
fn in_a_users_own_namespaces_it_gives_the_gpus_without_a_process() {
    let host = TestHost::new("8xh100");
    let work = temporary();
    let root = work.path().join("root");
    must(Command::new("cp").arg("-a").arg(image("distroless", "root")).arg(&root));
    must(Command::new("chown").args(["-hR", &USER.to_string()]).arg(&root));
    must(Command::new("chown").arg(USER.to_string()).arg(work.path()));
    let program: PathBuf = work.path().join(NAME);
    symlink(dist("gpurun"), &program).unwrap();
    let script = "set -e; mount --rbind $0 $0; mkdir -p $0/dev; mount -t tmpfs none $0/dev; \
                  $1 --user configure --no-cgroups --device=all --compute --utility --ldconfig=@/sbin/ldconfig $0; \
                  ls $0/dev; chroot $0 /app/probe libcuda.so.1 libnvidia-ml.so.1";
    let id = USER.to_string();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all"])
        .args(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script])
        .args([&root, &program])
        .current_dir(work.path());
    let ended = run(&mut with_host(&host, USER, command));
    assert!(ended.code == 0 && ended.out.contains("libcuda.so.1: loaded"), "{ended:?}");
    assert_eq!(ended.out.lines().filter(|line| line.starts_with("nvidia")).count(), 8 + 3, "{ended:?}");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(root.to_str().unwrap()));
}
