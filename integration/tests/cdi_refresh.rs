//! `gpurun cdi refresh`: a document that follows its host.

use gpurun::simulated_host::{Description, SimulatedMig};
use gpurun_integration::{Ended, SpawnPiped, TestHost, description, dist, finish, must, run, until};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::symlink,
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A host with a document of its own.
struct Refreshed {
    host: TestHost,
    directory: tempfile::TempDir,
}

impl Refreshed {
    fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { host: TestHost::new(name), directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("cdi/nvidia.yaml")
    }

    fn document(&self) -> String {
        fs::read_to_string(self.path()).unwrap_or_default()
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = self.host.gpurun();
        command.args(["cdi", "refresh", "--hook"]).arg(dist("gpurun-hook")).arg("--output").arg(self.path());
        command.args(options);
        command
    }

    fn validate(&self) -> Ended {
        run(self.host.gpurun().args(["cdi", "validate", "--spec-dir"]).arg(self.path().parent().unwrap()))
    }

    /// What `gpurun doctor` says of documents: a line, and one with what to do.
    fn diagnosis(&self) -> String {
        let ended = run(self.host.gpurun().args(["doctor", "--spec-dir"]).arg(self.path().parent().unwrap()));
        let lines: Vec<&str> = ended.out.lines().collect();
        let about = lines.iter().zip(lines.iter().skip(1)).filter(|(line, _)| line.contains("CDI documents"));
        about.map(|(line, next)| format!("{line}\n{next}\n")).collect()
    }

    /// What a document of this host says that is made by a gpurun that knows nothing of it yet.
    fn afresh(&self) -> String {
        let state = tempfile::tempdir().unwrap();
        let mut command = self.host.gpurun();
        command.env("GPURUN_STATE_DIR", state.path().join("state")).args(["cdi", "generate", "--hook"]);
        must(command.arg(dist("gpurun-hook")))
    }

    fn put(&self, path: &str, text: &str) {
        fs::write(self.host.path().join(path), text).unwrap();
    }

    fn node(&self, name: &str, major: u32, minor: u32) {
        let path = self.host.path().join("dev").join(name);
        let _ = fs::remove_file(&path);
        mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(major, minor))
            .expect("root makes device nodes");
    }

    /// nvidia-uvm is loaded again, with another major number.
    fn another_major(&self, major: u32) {
        let devices = fs::read_to_string(self.host.path().join("proc/devices")).unwrap();
        let others = devices.lines().filter(|line| !line.ends_with(" nvidia-uvm"));
        let with = others.flat_map(|line| {
            let module = (line == "Block devices:").then(|| format!("{major} nvidia-uvm\n\n"));
            [module.unwrap_or_default(), format!("{line}\n")]
        });
        let text: String = with.collect();
        self.put("proc/devices", &text.replace("\n\n510", "\n510"));
        self.node("nvidia-uvm", major, 0);
        self.node("nvidia-uvm-tools", major, 1);
    }
}

/// `refresh --watch`; it ends with the test.
struct Watcher(Child);

impl Watcher {
    /// Its first document is there.
    fn start(refreshed: &Refreshed) -> Self {
        let watcher = Self(refreshed.command(&["--watch"]).spawn_piped());
        until("the first document", || refreshed.document().contains("name: all"));
        watcher
    }

    fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        assert_eq!(run(Command::new("kill").args([name, &id])).code, 0);
    }

    /// The change makes the document stale, which is said with what to do, and the watcher makes it true again.
    fn sees(&self, refreshed: &Refreshed, what: &str, says: &str, change: impl FnOnce()) {
        self.signal("-STOP");
        let before = refreshed.document();
        change();
        let ended = refreshed.validate();
        assert!(ended.code == 1 && ended.out.contains(says), "{what}: {ended:?}");
        assert!(ended.out.contains("; write it again with `gpurun cdi generate`"), "{what}: {ended:?}");
        let diagnosis = refreshed.diagnosis();
        assert!(diagnosis.starts_with("wrong CDI documents"), "{what}: {diagnosis}");
        assert!(diagnosis.contains("[GPU-0070]") && diagnosis.contains(says), "{what}: {diagnosis}");
        assert!(diagnosis.contains("\n      fix: write it again"), "{what}: {diagnosis}");
        self.signal("-CONT");
        let started = Instant::now();
        until(what, || refreshed.document() != before);
        println!("{what}: {} ms", started.elapsed().as_millis());
        until(what, || refreshed.validate().code == 0);
        assert_eq!(refreshed.document(), refreshed.afresh(), "{what}");
        assert!(refreshed.diagnosis().starts_with("ok    CDI documents    1, nothing is wrong"), "{what}");
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn another_driver_another_major_and_another_mig_layout_are_in_the_document_by_themselves() {
    let refreshed = Refreshed::new("a100-mig");
    let first = description("a100-mig");
    let watcher = Watcher::start(&refreshed);
    assert_eq!(refreshed.validate().code, 0);

    // The document leaves the number to the engine, and it was made of another one.
    watcher.sees(
        &refreshed,
        "a reboot",
        "another number or mode than when it was written, as after a reboot",
        || {
            refreshed.put("proc/sys/kernel/random/boot_id", "7f3c1f9e-0000-4000-8000-000000000000\n");
            refreshed.another_major(507);
        },
    );
    assert!(!refreshed.document().contains("507") && refreshed.document().contains("nvidia-uvm-tools"));

    let mut less = first.clone();
    let gone = less.gpus[0].mig.as_mut().unwrap().devices.pop().unwrap();
    let [_, compute] = gone.cap_minors(less.gpus[0].minor);
    let names = format!("it names {}, which this host does not have", gone.uuid);
    watcher.sees(&refreshed, "another MIG layout", &names, || {
        refreshed.host.describe(&less);
        let (gi, ci) = (gone.gpu_instance, gone.compute_instance);
        let instance = format!("proc/driver/nvidia/capabilities/gpu{}/mig/gi{gi}/ci{ci}", less.gpus[0].minor);
        fs::remove_dir_all(refreshed.host.path().join(instance)).unwrap();
        fs::remove_file(refreshed.host.path().join(format!("dev/nvidia-caps/nvidia-cap{compute}"))).unwrap();
    });
    assert!(!refreshed.document().contains(&gone.uuid) && !refreshed.document().contains("name: 0:2"));

    // It comes back with another id and another UUID, as when it is made anew.
    let mut more = less.clone();
    let new = SimulatedMig { uuid: gone.uuid.replace("4426a5a7", "00000001"), gpu_instance: 1, ..gone };
    more.gpus[0].mig.as_mut().unwrap().devices.push(new.clone());
    let names = format!("it does not name {}", new.uuid);
    watcher.sees(&refreshed, "a new MIG device", &names, || {
        refreshed.host.describe(&more);
        let minor = more.gpus[0].minor;
        let instance = format!("proc/driver/nvidia/capabilities/gpu{minor}/mig/gi1/ci0");
        fs::create_dir_all(refreshed.host.path().join(instance)).unwrap();
        let [gi, ci] = new.cap_minors(minor);
        let minors = format!("gpu{minor}/gi1/access {gi}\ngpu{minor}/gi1/ci0/access {ci}\n");
        let all = "proc/driver/nvidia-caps/mig-minors";
        let others = fs::read_to_string(refreshed.host.path().join(all)).unwrap();
        refreshed.put(all, &(others + &minors));
        for cap in [gi, ci] {
            refreshed.node(&format!("nvidia-caps/nvidia-cap{cap}"), 236, cap);
        }
    });
    assert!(refreshed.document().contains("name: 0:2") && refreshed.document().contains("nvidia-cap13"));

    let newer = Description { driver: "580.65.06".into(), cuda: "13.0".into(), ..more };
    let says = "it is for driver 550.163.01, and 580.65.06 is running";
    watcher.sees(&refreshed, "another driver", says, || {
        let libraries = refreshed.host.driver(LIBRARIES);
        refreshed.put("sys/module/nvidia/version", "580.65.06\n");
        for name in ["libnvidia-ml", "libcuda"] {
            fs::remove_file(libraries.join(format!("{name}.so.{}", first.driver))).unwrap();
            fs::remove_file(libraries.join(format!("{name}.so.1"))).unwrap();
            symlink(format!("{name}.so.580.65.06"), libraries.join(format!("{name}.so.1"))).unwrap();
        }
        refreshed.host.describe(&newer);
    });
    let document = refreshed.document();
    assert!(
        document.contains("--host-driver-version=580.65.06") && document.contains("--host-cuda-version=13.0")
    );
    assert!(document.contains("libcuda.so.580.65.06") && !document.contains("550.163.01"), "{document}");
}

#[test]
fn what_changes_in_proc_and_sys_alone_is_seen_by_the_nodes_and_the_kernels_messages() {
    let refreshed = Refreshed::new("a100-mig");
    let first = description("a100-mig");
    let watcher = Watcher::start(&refreshed);
    // One that can be opened and closed, as nvidia-smi does it: there is no driver behind the simulated one.
    let says = "is 195:255, and it is 1:3";
    watcher.sees(&refreshed, "another control node", says, || refreshed.node("nvidiactl", 1, 3));
    // Made anew it is the same to the document, and is to be watched again.
    refreshed.node("nvidiactl", 1, 3);
    std::thread::sleep(Duration::from_millis(500));
    let mut less = first.clone();
    let gone = less.gpus[0].mig.as_mut().unwrap().devices.pop().unwrap();
    let names = format!("it names {}, which this host does not have", gone.uuid);
    watcher.sees(&refreshed, "a MIG device that is gone, whose node stays", &names, || {
        refreshed.host.describe(&less);
        let (gi, ci) = (gone.gpu_instance, gone.compute_instance);
        let instance = format!("proc/driver/nvidia/capabilities/gpu{}/mig/gi{gi}/ci{ci}", less.gpus[0].minor);
        fs::remove_dir_all(refreshed.host.path().join(instance)).unwrap();
        drop(OpenOptions::new().write(true).open(refreshed.host.path().join("dev/nvidiactl")).unwrap());
    });

    // Debian's upgrade: the libraries are there first, and do not fit until the module is loaded anew.
    let newer = Description { driver: "580.65.06".into(), ..less };
    let before = refreshed.document();
    refreshed.host.describe(&newer);
    for name in ["libnvidia-ml", "libcuda"] {
        let file = format!("{name}.so.{}", first.driver);
        fs::remove_file(refreshed.host.driver(LIBRARIES).join(file)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(refreshed.document(), before, "a driver in between is in no document");
    let devices = fs::read_dir("/sys/bus/pci/devices").expect("a PCI bus, whose devices have messages");
    let device = devices.flatten().next().expect("a PCI device").path().join("uevent");
    let says = "it is for driver 550.163.01, and 580.65.06 is running";
    watcher.sees(&refreshed, "the module of the new driver", says, || {
        refreshed.put("sys/module/nvidia/version", "580.65.06\n");
        fs::write(device, "change").expect("root may have the kernel send a message");
    });
    watcher.signal("-TERM");
}

#[test]
fn a_host_without_a_driver_gets_its_document_when_the_driver_comes() {
    let refreshed = Refreshed::new("t4");
    let version = refreshed.host.path().join("sys/module/nvidia/version");
    let text = fs::read_to_string(&version).unwrap();
    fs::remove_file(&version).unwrap();
    fs::remove_file(refreshed.host.path().join("proc/driver/nvidia/version")).unwrap();
    fs::create_dir_all(refreshed.path().parent().unwrap()).unwrap();
    fs::write(refreshed.path(), "another's").unwrap();
    let ended = run(&mut refreshed.command(&[]));
    assert!(ended.code == 125 && ended.err.contains("is not a CDI spec, and is left as it is"), "{ended:?}");
    assert_eq!(refreshed.document(), "another's");
    let before_the_driver = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: []\n";
    fs::write(refreshed.path(), before_the_driver).unwrap();
    let ended = run(&mut refreshed.command(&[]));
    assert!(ended.code == 0 && ended.out.contains("is left as it is: no NVIDIA driver"), "{ended:?}");
    assert_eq!(refreshed.document(), before_the_driver);

    let watcher = refreshed.command(&["--watch"]).spawn_piped();
    fs::write(&version, text).unwrap();
    refreshed.node("nvidia-modeset", 195, 254);
    until("the document", || refreshed.document().contains("name: all"));
    assert_eq!(run(Command::new("kill").arg(watcher.id().to_string())).code, 0);
    let ended = finish(watcher);
    assert_eq!((ended.code, ended.err.as_str()), (128 + 15, ""), "{ended:?}");

    let ended = run(&mut refreshed.command(&[]));
    assert!(ended.code == 0 && ended.out.contains("is up to date"), "{ended:?}");
}

#[test]
fn whenever_it_is_killed_the_document_is_the_old_one_or_the_new_one() {
    let refreshed = Refreshed::new("8xh100");
    let write = || assert_eq!(run(&mut refreshed.command(&[])).code, 0);
    let both = [507, 508].map(|major| {
        refreshed.another_major(major);
        write();
        refreshed.document()
    });
    assert_ne!(both[0], both[1]);
    let started = Instant::now();
    refreshed.another_major(507);
    write();
    let took = started.elapsed();
    let mut seen = [0, 0];
    for round in 0..60u32 {
        refreshed.another_major(507 + round % 2);
        let mut child = refreshed.command(&[]).spawn_piped();
        std::thread::sleep(took * (round % 20) / 16);
        child.kill().unwrap();
        child.wait().unwrap();
        let document = refreshed.document();
        let which = both.iter().position(|one| *one == document);
        seen[which.unwrap_or_else(|| panic!("neither: {document}"))] += 1;
    }
    println!("one took {} ms; {seen:?}", took.as_millis());
}
