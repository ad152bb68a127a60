//! The GPUs of a caller that may not open all of them, because of a batch job's device cgroup or the permissions of the
//! nodes.

use gpurun_integration::{
    Caller, Ended, TestHost,
    bundle::{Bundle, Hierarchies},
    description, dist, must, rootfs, run, unique,
};
use serde_json::json;
use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

const LIST: &str = "ls /dev | grep -E '^nvidia[0-9]+$' | tr '\\n' ' '";

/// A batch job: a device cgroup that denies these nodes.
struct Job(PathBuf);

impl Job {
    /// `None` on a host without the v1 hierarchy of device rules: see [`in_a_job_of_cgroup_v2`].
    fn denying(nodes: &[(u32, u32)]) -> Option<Self> {
        let hierarchy = Path::new("/sys/fs/cgroup/devices");
        if !hierarchy.join("devices.deny").exists() && !hierarchy.join("tasks").exists() {
            return None;
        }
        let job = Self(hierarchy.join(unique()));
        fs::create_dir(&job.0).unwrap();
        for (major, minor) in nodes {
            fs::write(job.0.join("devices.deny"), format!("c {major}:{minor} rwm")).unwrap();
        }
        Some(job)
    }

    /// A command in the job.
    fn run(&self, command: &mut Command) -> Ended {
        let file = self.0.join("cgroup.procs");
        // SAFETY: between fork and exec the closure opens and writes one file, and takes no lock.
        unsafe { command.pre_exec(move || fs::write(&file, "0")) };
        run(command)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        gpurun_integration::until("the end of the job's cgroup", || fs::remove_dir(&self.0).is_ok());
    }
}

fn node(host: &TestHost, gpu: usize) -> PathBuf {
    host.path().join(format!("dev/nvidia{}", description("8xh100").gpus[gpu].minor))
}

/// The nodes of these GPUs, as `ls` sorts them.
fn nodes(gpus: &[usize]) -> String {
    let mut names: Vec<String> =
        gpus.iter().map(|gpu| format!("nvidia{}", description("8xh100").gpus[*gpu].minor)).collect();
    names.sort();
    names.iter().map(|name| format!("{name} ")).collect()
}

/// The container's nodes for a request, or the paragraph that refuses it.
fn asks(host: &TestHost, caller: Caller, job: Option<&Job>, gpus: &str) -> Result<String, String> {
    let image = rootfs("busybox");
    let mut command = host.command(caller, &format!("--gpus {gpus}"), &image, &["sh", "-c", LIST]);
    let ended = match job {
        Some(job) => job.run(&mut command),
        None => run(&mut command),
    };
    match ended.code {
        0 => Ok(ended.out),
        125 => Err(ended.err),
        _ => panic!("{ended:?}"),
    }
}

fn is_refused(answer: Result<String, String>, cause: &str) {
    let refusal = answer.expect_err(cause);
    assert!(refusal.starts_with("error[GPU-0024]: "), "{refusal}");
    assert!(refusal.contains(cause) && refusal.contains("\n  fix: "), "{refusal}");
}

#[test]
fn a_job_gets_the_gpus_of_its_cgroup() {
    let host = TestHost::new("8xh100");
    let described = description("8xh100");
    let foreign: Vec<_> = [0, 1, 2, 4, 5, 6].map(|gpu: usize| (195, described.gpus[gpu].minor)).into();
    let Some(job) = Job::denying(&foreign) else {
        eprintln!("the host has device rules of cgroup v2 alone");
        return;
    };
    for caller in Caller::EACH {
        let job = Some(&job);
        assert_eq!(asks(&host, caller, None, "all").unwrap(), nodes(&[0, 1, 2, 3, 4, 5, 6, 7]));
        assert_eq!(asks(&host, caller, job, "all").unwrap(), nodes(&[3, 7]), "{caller:?}");
        assert_eq!(asks(&host, caller, job, "1").unwrap(), nodes(&[3]), "{caller:?}");
        assert_eq!(asks(&host, caller, job, "device=7").unwrap(), nodes(&[7]));
        is_refused(asks(&host, caller, job, "3"), "the caller may open only 2");
        is_refused(asks(&host, caller, job, "device=0"), "device cgroup");
        is_refused(asks(&host, caller, job, &format!("device={}", described.gpus[0].uuid)), "device cgroup");
    }
    let ended = job.run(host.gpurun().arg("ls"));
    assert_eq!(ended.out.matches("cannot be opened").count(), 6, "{ended:?}");
    let ended = job.run(host.gpurun().arg("doctor"));
    let line = ended.out.lines().find(|line| line.contains(" access ")).unwrap_or_default();
    assert!(line.starts_with("wrong") && line.contains("GPU 0, GPU 1, GPU 2, GPU 4"), "{ended:?}");
}

#[test]
fn a_job_without_a_gpu_gets_none() {
    let host = TestHost::new("8xh100");
    let all: Vec<_> = description("8xh100").gpus.iter().map(|gpu| (195, gpu.minor)).collect();
    let Some(job) = Job::denying(&all) else { return };
    for gpus in ["all", "1", "device=3"] {
        is_refused(asks(&host, Caller::Root, Some(&job), gpus), "device cgroup");
    }
    // A request for the driver without a GPU opens nothing.
    assert_eq!(asks(&host, Caller::Root, Some(&job), "device=none").unwrap(), "");
    let control = Job::denying(&[(195, 255)]).unwrap();
    is_refused(asks(&host, Caller::Root, Some(&control), "all"), "/dev/nvidiactl cannot be opened");
}

#[test]
fn a_node_that_only_root_may_open_is_refused_to_others() {
    let host = TestHost::new("8xh100");
    let closed = node(&host, 2);
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(asks(&host, Caller::User, None, "all").unwrap(), nodes(&[0, 1, 3, 4, 5, 6, 7]));
    assert_eq!(asks(&host, Caller::User, None, "3").unwrap(), nodes(&[0, 1, 3]));
    is_refused(asks(&host, Caller::User, None, "device=2"), "permission denied");
    assert_eq!(asks(&host, Caller::Root, None, "device=2").unwrap(), nodes(&[2]));
    let ended = run(host.gpurun_as_user().args(["ls", "--json"]));
    assert!(ended.code != 0 || ended.out.contains("\"closed\""), "{ended:?}");
    let listed = must(host.gpurun_as_user().arg("ls"));
    assert!(listed.contains("GPU 2 cannot be opened") && listed.contains("0600"), "{listed}");
    for gpu in 0..8 {
        fs::set_permissions(node(&host, gpu), fs::Permissions::from_mode(0o600)).unwrap();
    }
    is_refused(asks(&host, Caller::User, None, "all"), "permission denied");
}

/// In cgroup v2 device rules are BPF programs. This runs gpurun in a runc container, which has such rules, on a mounted host.
#[test]
fn device_rules_of_every_form_are_seen() {
    let host = TestHost::new("8xh100");
    must(host.gpurun().arg("ls"));
    let minor = description("8xh100").gpus[3].minor;
    for hierarchies in [Hierarchies::Own, Hierarchies::Unified] {
        let bundle = Bundle::of("busybox");
        let env = [
            format!("GPURUN_SIMULATED_HOST={}", host.path().display()),
            format!("GPURUN_STATE_DIR={}", host.state_dir(0).display()),
            "HOME=/root".to_owned(),
        ];
        let env: Vec<&str> = env.iter().map(String::as_str).collect();
        let mut spec = bundle.configure(&env, &["/bin/gpurun", "ls"]);
        for (source, target) in [
            (dist("gpurun"), PathBuf::from("/bin/gpurun")),
            (host.path(), host.path()),
            (host.state_dir(0), host.state_dir(0)),
        ] {
            let mount =
                json!({"destination": target, "type": "bind", "source": source, "options": ["rbind", "ro"]});
            spec["mounts"].as_array_mut().unwrap().push(mount);
        }
        let rules = spec["linux"]["resources"]["devices"].as_array_mut().unwrap();
        for minor in [minor, 255] {
            rules.push(json!({"allow": true, "type": "c", "major": 195, "minor": minor, "access": "rwm"}));
        }
        bundle.write(&spec);
        let dir = bundle.dir.path();
        let mut command = hierarchies.command(Path::new("/usr/sbin/runc"));
        let ended = run(command
            .arg("--root")
            .arg(dir.join("state"))
            .args(["run", "--bundle"])
            .arg(dir)
            .arg(unique()));
        assert_eq!(ended.code, 0, "{hierarchies:?} {ended:?}");
        assert_eq!(ended.out.matches("cannot be opened").count(), 7, "{hierarchies:?} {ended:?}");
        assert!(!ended.out.contains("GPU 3 cannot") && ended.out.contains("device cgroup"), "{ended:?}");
    }
}
