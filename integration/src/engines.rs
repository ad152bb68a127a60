//! Machines with real engines: system containers of the roots that `integration/engines` makes, each with a simulated host.

use crate::{Simulated, cached, dist, driver_packages, of_driver, project, rewrite, run, until};
use gpurun::simulated_host::{Description, DriverFiles, lay_out};
use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Which engines a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// Docker 20.10, containerd 1.6, Podman 4.3, runc 1.1, crun 1.8
    Bookworm,
    /// Docker 28.5, containerd 2.1, Podman 5.8, runc 1.3, crun 1.28
    Sid,
}

/// Which cgroup hierarchies it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// One for each controller; the rules for devices are a list.
    V1,
    /// One alone; the rules for devices are eBPF programs.
    V2,
}

impl Cgroups {
    /// Those that a machine can have on this host: of version 1 where the host has such hierarchies.
    pub fn possible() -> &'static [Self] {
        let hosts = fs::read_to_string("/proc/self/cgroup").expect("procfs");
        let has_v1 = hosts.lines().any(|line| !line.contains("::"));
        if has_v1 { &[Self::V1, Self::V2] } else { &[Self::V2] }
    }
}

/// A machine that runs. It goes, with all that runs in it, when it is dropped or when the test's process ends.
#[derive(Debug)]
pub struct Machine {
    supervisor: Child,
    init: u32,
    shared: PathBuf,
}

/// The user without privileges who uses Podman.
const SOMEONE: &str = "1000";

impl Machine {
    /// Starts one with eight GPUs and the driver 550 of Debian's packages.
    pub fn start(suite: Suite, cgroups: Cgroups) -> Self {
        let root = match suite {
            Suite::Bookworm => cached("engines/bookworm/root"),
            Suite::Sid => cached("engines/sid/root"),
        };
        let programs = dist("gpurun");
        let programs = programs.parent().expect("dist/");
        let mut supervisor = script()
            .arg("start")
            .arg(root)
            .arg(if cgroups == Cgroups::V1 { "v1" } else { "v2" })
            .args([programs, &cached("images"), &cached("packages"), &project().join("integration")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("integration/system-container");
        let mut line = String::new();
        let output = supervisor.stdout.as_mut().expect("it is a pipe");
        BufReader::new(output).read_line(&mut line).expect("it is a pipe");
        let (init, shared) = line.trim_end().split_once(' ').expect("the system container starts");
        let machine = Self { init: init.parse().expect("a number"), shared: shared.into(), supervisor };
        machine.install_driver(550);
        machine.configure(programs);
        machine
    }

    /// Gives it another driver, as an upgrade with a reboot does.
    pub fn install_driver(&self, branch: u32) {
        self.lay_out(&of_driver("8xh100", branch), branch);
    }

    /// Makes it another host of `integration/hosts`, of which the CDI document is.
    pub fn become_host(&self, name: &str) {
        self.lay_out(&of_driver(name, 550), 550);
        self.write_document();
    }

    /// Lets NVML say that the host is like this. It says so at once, and no directory changes.
    pub fn describe(&self, description: &Description) {
        let root = self.directory().join("driver");
        let library =
            format!("usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-ml.so.{}", description.driver);
        let description = Description { driver_root: Some(root.clone()), ..description.clone() };
        rewrite(&root.join(library), "libsimulated_nvml.so", &description);
    }

    fn lay_out(&self, description: &Description, branch: u32) {
        let host = self.directory();
        let _ = fs::remove_dir_all(&host);
        let stand_ins = dist("libsimulated_nvml.so");
        let stand_ins = stand_ins.parent().expect("dist/");
        lay_out(&host, description, stand_ins, DriverFiles::Unpacked(&driver_packages(branch, "debian")))
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// A file of it, as this machine sees it. Its links must be relative.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init)).join(inside.trim_start_matches('/'))
    }

    /// What its cgroups are called on this machine.
    pub fn cgroup(&self) -> String {
        format!("gpurun-machine-{}", self.supervisor.id())
    }

    /// A directory that has the same name on both sides.
    pub fn shared(&self) -> &Path {
        &self.shared
    }

    /// A command of root's in it.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = script();
        command.args(["run", &self.init.to_string()]).arg(self.simulated_host()).args(words);
        command
    }

    /// A command of an ordinary user's in it.
    pub fn command_as_user(&self, words: &[&str]) -> Command {
        let runtime_dir = format!("XDG_RUNTIME_DIR=/run/user/{SOMEONE}");
        let docker = format!("DOCKER_HOST=unix:///run/user/{SOMEONE}/docker.sock");
        let words = [
            &[
                "setpriv",
                "--reuid",
                SOMEONE,
                "--regid",
                SOMEONE,
                "--init-groups",
                "env",
                "--chdir=/home/someone",
            ][..],
            // Podman 4.3 would take a driver that copies whole images.
            &["HOME=/home/someone", &runtime_dir, "STORAGE_DRIVER=overlay", &docker],
            words,
        ]
        .concat();
        self.command(&words)
    }

    /// What a script of root's wrote; it must succeed.
    pub fn sh(&self, script: &str) -> String {
        let ended = run(&mut self.command(&["sh", "-c", script]));
        assert_eq!(ended.code, 0, "{script}: {ended:?}");
        ended.out
    }

    /// Starts Docker.
    pub fn start_docker(&self) {
        self.sh("dockerd > /var/log/dockerd.log 2>&1 &");
        self.until_it_answers("docker version");
    }

    /// Starts Docker as an ordinary user, on the network of its own machine.
    pub fn start_rootless_docker(&self) {
        // rootlesskit 1.1 takes one range for two where it asks getsubids(1). Links to what root's Docker has in /run are in the way.
        let script = "mkdir -p .config/docker
            sed s,/run/,$XDG_RUNTIME_DIR/, /etc/docker/daemon.json > .config/docker/daemon.json
            rootlesskit --subid-source=static --state-dir=$XDG_RUNTIME_DIR/rootlesskit --net=host --copy-up=/etc --copy-up=/run sh -c '
                rm -f /run/docker /run/containerd; exec dockerd --rootless --iptables=false --bridge=none
            ' > dockerd.log 2>&1 &";
        let started = run(&mut self.command_as_user(&["sh", "-ec", script]));
        assert_eq!(started.code, 0, "{started:?}");
        // Not `docker version`: 28.5 asks rootlesskit for a network of its own and falls over where there is none.
        until("docker ps", || run(&mut self.command_as_user(&["docker", "ps"])).code == 0);
    }

    /// Starts containerd, for ctr and for its CRI.
    pub fn start_containerd(&self) {
        self.sh("containerd > /var/log/containerd.log 2>&1 &");
        self.until_it_answers("ctr version");
    }

    fn until_it_answers(&self, question: &str) {
        until(question, || run(&mut self.command(&["sh", "-c", question])).code == 0);
    }

    /// What tells gpurun of the simulated host.
    fn simulated_host(&self) -> String {
        format!("GPURUN_SIMULATED_HOST={}", self.directory().display())
    }

    /// Says which low-level runtime gpurun's becomes.
    pub fn hand_over_to(&self, runtime: &str) {
        self.put("/etc/gpurun/config.toml", &format!("runtimes = [{runtime:?}]\n"));
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("it is absolute")).expect("a directory of its own");
        fs::write(&path, text).expect("a file of its own");
    }

    /// What an administrator does on a new host.
    fn configure(&self, programs: &Path) {
        self.put("/etc/docker/daemon.json", DOCKER);
        self.put("/etc/containerd/config.toml", CONTAINERD);
        self.put(
            "/etc/containers/containers.conf",
            &format!("{PODMAN}conmon_env_vars = [{:?}]\n", self.simulated_host()),
        );
        self.sh(&format!(
            "set -e
             ln -s {0}/gpurun {0}/gpurun-runtime /usr/local/bin
             ln -s {0}/gpurun /usr/local/bin/nvidia-container-runtime-hook
             gpurun configure docker --set-as-default
             gpurun configure containerd
             gpurun configure podman
             install -d -o {SOMEONE} -m 700 /run/user/{SOMEONE}",
            programs.display(),
        ));
        self.write_document();
        self.hand_over_to("runc");
    }

    fn write_document(&self) {
        // Without root, devices of a document are mounted from where they are in the container.
        self.sh(&format!(
            "set -e
             rm -rf /dev/nvidia* /dev/dri
             cp -a {}/host/dev/. /dev
             mkdir -p /etc/cdi
             gpurun cdi generate --engine podman@4.3 --output /etc/cdi/nvidia.yaml",
            self.shared.display()
        ));
    }
}

impl Simulated for Machine {
    fn directory(&self) -> PathBuf {
        self.shared.join("host")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.supervisor.stdin.take());
        let _ = self.supervisor.wait();
    }
}

fn script() -> Command {
    Command::new(project().join("integration/system-container"))
}

const DOCKER: &str = r#"{"hosts": ["unix:///run/docker.sock"]}
"#;

/// Annotations with CDI names come through to the runtime. Containers run without CAP_SYS_RESOURCE where the tests do: OOM
/// scores cannot be lowered.
const CONTAINERD: &str = r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/pause:latest"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    container_annotations = ["cdi.k8s.io/*"]
"#;

/// Without systemd and journald. The limits that Podman 4.3 sets by itself need CAP_SYS_RESOURCE, and it hands nothing of its
/// environment on.
const PODMAN: &str = r#"[containers]
netns = "none"
log_driver = "k8s-file"
pids_limit = 0
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"#;
