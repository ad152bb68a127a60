//! Common option lines of `docker run`, `podman run` and `apptainer exec`: each works as in Docker, or is refused with an
//! alternative.

use gpurun_integration::{Caller, Ended, TestHost, rootfs, run, temporary};
use std::{fs, path::Path};

fn host() -> TestHost {
    TestHost::new("8xh100")
}

fn busybox() -> String {
    rootfs("busybox")
}

/// Lines that start, as typed before `IMAGE true`.
const ACCEPTED: &[&str] = &[
    "--gpus all -i --rm",
    "--gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -i --rm",
    "--gpus all -v /anon",
    "--gpus all --network host",
    "--gpus all --net=host",
    "--gpus all --network none",
    "--privileged -v /dev:/dev",
    "--gpus all --privileged",
    "--gpus all --cap-add SYS_PTRACE",
    "--gpus all --security-opt label=disable",
    "--gpus all --security-opt label:disable",
    "--gpus all --security-opt no-new-privileges",
    "--gpus all --security-opt no-new-privileges:false",
    "--gpus all --security-opt systempaths=unconfined",
    "--gpus all --security-opt apparmor=unconfined",
    "--gpus all --device /dev/fuse",
    "--gpus all --device /dev/fuse:/dev/fuse:rwm",
    "--device nvidia.com/gpu=all",
    "--device nvidia.com/gpu=0 --device nvidia.com/gpu=1",
    "--runtime=nvidia --gpus all",
    "--runtime nvidia -e NVIDIA_VISIBLE_DEVICES=all",
    "-e NVIDIA_VISIBLE_DEVICES=all",
    "--gpus device=0,1",
    "--gpus \"device=0,1\"",
    "--gpus \"capabilities=compute,utility,video\"",
    "--gpus \"device=all\"",
    "--gpus=1",
    "--gpus 0",
    "--nv",
    "-u 1000:1000 --gpus all",
    "--user root --gpus all",
    "--add-host db:10.0.0.1 --gpus all",
    "--add-host host.docker.internal:host-gateway --gpus all",
    "--dns 8.8.8.8 --gpus all",
    "-h trainer --gpus all",
    "--label a=b -l c=d --gpus all",
    "--annotation a=b --gpus all",
    "--pid host --gpus all",
    "--pid=host --uts=host --gpus all",
    "--memory 4g --cpus 2 --gpus all",
    "-m 4g --memory-reservation 2g --gpus all",
    "-m 4g --memory-swap -1 --gpus all",
    "--cpuset-cpus 0 --gpus all",
    "--cpu-shares 512 --gpus all",
    "--pids-limit 100 --gpus all",
    "--oom-score-adj 500 --gpus all",
    "--oom-kill-disable -m 4g --gpus all",
    "--entrypoint /bin/true --gpus all",
    "--init --gpus all",
    "--init=true --rm=true -t=false --gpus all",
    "--stop-signal SIGINT --stop-timeout 60 --gpus all",
    "--no-healthcheck --gpus all",
    "--restart no --gpus all",
    "--mount type=tmpfs,target=/mnt,tmpfs-size=64m --gpus all",
    "--mount type=bind,source=/tmp,target=/mnt,readonly --gpus all",
    "-v /tmp:/mnt:ro,z --gpus all",
    "-v /tmp:/mnt:Z --gpus all",
    "-v /tmp:/mnt:delegated --gpus all",
    "-v /tmp:/mnt:rslave --gpus all",
    "-v .:/mnt --gpus all",
    "-e A=b --env C=d --gpus all",
    "--env=A=b --gpus all",
    "--env-host --gpus all",
    "--pull=never --gpus all",
    "--pull missing --gpus all",
    "--expose 8000 --gpus all",
    "--group-add 44 --gpus all",
    "--userns=host --gpus all",
    "--userns keep-id --gpus all",
    "--cgroupns host --gpus all",
    "--cgroup-parent /gpurun-option-lines --gpus all",
    "--read-only --tmpfs /tmp --gpus all",
    "--sig-proxy=true --gpus all",
    "-a stdin -a stdout -a stderr --gpus all",
    "--isolation default --gpus all",
    "--bind /tmp:/mnt --gpus all",
    "--volume=/tmp:/mnt --gpus all",
    "--ulimit nofile=1024:1024 --gpus all",
    "--gpus all -i --rm --name x --replace",
    "--security-opt=label=disable --security-opt seccomp=unconfined --gpus=all --ipc=host --name t",
    "--interactive --gpus all",
    "--device-cgroup-rule c\u{a0}10:*\u{a0}rwm --gpus all",
    "--sysctl kernel.shmmax=68719476736 --gpus all",
    "--shm-size=8g --gpus all",
    "--domainname example.org --gpus all",
    "--ipc=shareable --gpus all",
    "--ipc none --gpus all",
    "-w /a -w /b --gpus all",
    "--log-driver none --gpus all",
    "-q --gpus all",
    // vLLM, TGI, Triton, NGC, llama.cpp, ComfyUI, JupyterLab, NIM, DeepSpeed.
    "--runtime nvidia --gpus all -v /tmp:/root/.cache/huggingface -e HUGGING_FACE_HUB_TOKEN=t --ipc=host",
    "--gpus all --shm-size 1g -v /tmp:/data -e HF_TOKEN=t",
    "--gpus=1 --rm --net=host -v /tmp:/models",
    "--gpus all -i --rm --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v /tmp:/workspace -w /workspace",
    "--gpus all --cap-add=SYS_NICE --shm-size=.5g --cpuset-cpus 0",
    "--gpus \"device=0\",capabilities=utility --platform amd64",
    "--gpus all -u 0 --add-host host.docker.internal:host-gateway --stop-timeout 30 --expose 8188/tcp",
    "--gpus all -e JUPYTER_TOKEN -e GRANT_SUDO=yes --user root -w /home",
    "--gpus all -e NGC_API_KEY -v /tmp:/opt/nim/.cache -u 1000 --tmpfs /run:exec,suid,mode=755,size=10%",
    "--gpus all --network=host --privileged --ulimit nofile=1024:1024 --pids-limit -1 --cpus 1.0",
    "--gpus all -w= -h= --name= --cidfile= --pull= --platform= --stop-signal=",
    "--gpus all --platform linux/x86_64 --pull missing --label-file /dev/null",
];

/// Lines that are refused, with a word of the fix.
const REFUSED: &[(&str, &str)] = &[
    ("--gpus all -p 8888:8888", "host's network"),
    ("-p 127.0.0.1:8000:8000 --gpus all", "host's network"),
    ("-P --gpus all", "host's network"),
    ("-d --gpus all", "systemd-run"),
    ("-itd --gpus all", "systemd-run"),
    ("-dit --gpus all", "systemd-run"),
    ("--detach=true --gpus all", "systemd-run"),
    (
        "-d --gpus all --name ollama --restart unless-stopped -p 11434:11434 -v ollama:/root/.ollama",
        "systemd-run",
    ),
    ("--restart unless-stopped --gpus all", "systemd-run"),
    ("--gpus all -v ollama:/root/.ollama", "mkdir -p ./ollama"),
    ("--mount type=volume,source=vol,target=/mnt --gpus all", "mkdir -p ./vol"),
    ("-v relative/dir:/mnt --gpus all", "./relative/dir"),
    ("--volumes-from other --gpus all", "-v options"),
    ("--gpus all --network mynet", "--network host"),
    ("--gpus all --device /dev/infiniband-absent:/dev/infiniband", "ls -l /dev/infiniband-absent"),
    ("--device amd.com/gpu=0", "--device /dev/"),
    ("--ipc container:abc --gpus all", "--ipc host"),
    ("--pid container:abc --gpus all", "--pid host"),
    ("--health-cmd true --health-interval 5s --gpus all", "health checks"),
    ("--link db --gpus all", "localhost"),
    ("--storage-opt size=10G --gpus all", "GPURUN_STORE"),
    ("-a stdout --gpus all", "2>/dev/null"),
    ("--sig-proxy=false --gpus all", "setsid"),
    ("--isolation hyperv --gpus all", "namespaces"),
    ("--hooks-dir /x --gpus all", "OCI hooks"),
    ("--use-api-socket --gpus all", "docker.sock"),
    ("--userns auto --gpus all", "keep-id"),
    ("--sysctl vm.overcommit_memory=1 --gpus all", "sysctl -w"),
    ("--sysctl net.core.somaxconn=1024 --gpus all", "--network none"),
    ("--security-opt seccomp=/profile.json --gpus all", "seccomp=unconfined"),
    ("--security-opt apparmor=docker-default --gpus all", "aa-exec"),
    ("--runtime kata --gpus all", "Docker or Podman"),
    ("--log-driver json-file --gpus all", "> FILE"),
    ("-v /tmp:/mnt:rshared --gpus all", "rslave"),
    ("-v /tmp:/mnt:U --gpus all", "chown"),
    ("--secret x --gpus all", "/run/secrets"),
    ("--pod x --gpus all", "--ipc host"),
    ("--device-read-bps /dev/sda:1m --gpus all", "IOReadBandwidthMax"),
    ("--memory-swap 1g --gpus all", "--memory"),
    ("--ip 10.0.0.2 --gpus all", "--runtime gpurun"),
    ("--gpu all", "did you mean --gpus?"),
    ("--gpus 0-3", "write --gpus device=0,1,2,3"),
    ("--gpus device=0-1,3", "write --gpus device=0,1,3"),
    ("--gpus GPU-0a1b2c3d", "write --gpus device=GPU-0a1b2c3d"),
    ("--gpus ALL", "write --gpus all"),
    ("--gpus 9", "ask for 8 or fewer"),
    ("-v ~/models:/models", "-v \"$HOME/models:/models\""),
    ("--mount type=bind,src=~/m,dst=/m", "--mount \"type=bind,source=$HOME/m,target=/m\""),
    ("--mount source=/tmp,target=/m", "--mount type=bind,source=/tmp,target=/m"),
    ("--mount type=bind,src=data,dst=/m", "mkdir -p ./data, and --mount type=bind,source=./data,target=/m"),
    ("-v my\u{a0}data:/m", "mkdir -p './my data', and -v './my data:/m'"),
    ("-v :/m", "-v /data:/m"),
    ("-v /tmp:/m -v /usr:/m", "another target"),
    ("-v /tmp:/m:", "leave out the last colon: -v /tmp:/m"),
    ("-v /tmp:/m:U", "chown -R UID:GID /tmp"),
    ("-v /tmp:/m:O", "-v /tmp:/m:ro"),
    ("-w ~/x", "-w /root"),
    ("-w $HOME", "-w /root"),
    ("-w ./src", "-w /src"),
    ("--tmpfs /x:mode=9", "--tmpfs /x:mode=1777"),
    ("--sysctl KERNEL.MSGMAX=1", "sysctl -a"),
    ("--sysctl vm.swappiness=1", "sysctl -w 'vm.swappiness=1'"),
    ("--device /dev/null:ro", "--device /dev/X:/dev/Y:rwm"),
    ("--device nvidia.com/gpu", "--device nvidia.com/gpu=all"),
    ("--entrypoint=", "name one after the image"),
    ("-it", "write -i in place of -it"),
];

/// A no-break space represents a blank inside a word.
fn run_line(host: &TestHost, line: &str) -> Ended {
    let mut command = host.gpurun();
    command.arg("run").args(line.split_whitespace_words()).arg(busybox());
    if !line.contains("--entrypoint") {
        command.arg("true");
    }
    run(&mut command)
}

trait Words {
    fn split_whitespace_words(&self) -> Vec<String>;
}

impl Words for str {
    fn split_whitespace_words(&self) -> Vec<String> {
        self.split(' ').filter(|word| !word.is_empty()).map(|word| word.replace('\u{a0}', " ")).collect()
    }
}

#[test]
fn option_lines_are_served_or_refused_with_advice() {
    let host = host();
    for line in ACCEPTED {
        let ended = run_line(&host, line);
        assert_eq!(ended.code, 0, "{line}: {ended:?}");
    }
    for (line, advice) in REFUSED {
        let ended = run_line(&host, line);
        assert_eq!(ended.code, 125, "{line}: {ended:?}");
        let fix =
            ended.err.lines().find_map(|text| text.trim_start().strip_prefix("fix: ")).unwrap_or_default();
        assert!(fix.contains(advice), "{line}: {ended:?}");
        assert!(!ended.err.contains("unexpected argument"), "{line}: {ended:?}");
    }
    let _ = fs::remove_dir("/sys/fs/cgroup/unified/gpurun-option-lines/gpurun");
    let _ = fs::remove_dir("/sys/fs/cgroup/unified/gpurun-option-lines");
    println!("{} lines are served, {} refused", ACCEPTED.len(), REFUSED.len());
}

#[test]
fn commands_that_cannot_be_run_get_their_own_advice() {
    let host = host();
    for caller in Caller::EACH {
        for (options, words, code, advice) in [
            ("", &["echo a b"][..], 127, "each argument as a word of its own"),
            ("--entrypoint echo\u{a0}a", &[], 127, "each argument as a word of its own"),
            ("", &[""], 127, "name a command"),
            ("", &["/etc"], 126, "not a directory"),
            ("-w /etc/passwd", &["true"], 126, "-w /tmp"),
            ("-w /etc/passwd/x", &["true"], 125, "another path with -v or -w"),
        ] {
            let mut command = host.gpurun_of(caller);
            command.arg("run").args(options.split_whitespace_words()).arg(busybox()).args(words);
            let ended = run(&mut command);
            assert_eq!(ended.code, code, "{caller:?} {options} {words:?}: {ended:?}");
            let fix = ended.err.split_once("fix: ").unwrap_or_default().1;
            assert!(fix.contains(advice), "{options} {words:?}: {ended:?}");
        }
    }
}

#[test]
fn limits_are_in_the_containers_cgroup() {
    let host = host();
    let root = |options: &str, script: &str| host.ok(Caller::Root, options, &busybox(), script);
    let value = |options: &str, v1: &str, v2: &str| {
        root(options, &format!("cd /sys/fs/cgroup; cat {v1} 2>/dev/null || cat {v2}")).trim_end().to_owned()
    };
    assert!(["512", "20"].contains(&value("--cpu-shares 512", "cpu/cpu.shares", "cpu.weight").as_str()));
    assert_eq!(
        value("-m 64m --memory-reservation 32m", "memory/memory.soft_limit_in_bytes", "memory.low"),
        "33554432"
    );
    assert_eq!(value("-m 64m", "memory/memory.limit_in_bytes", "memory.max"), "67108864");
    let quota = value("--cpu-period 50000 --cpu-quota 25000", "cpu/cpu.cfs_quota_us", "cpu.max");
    assert!(["25000", "25000 50000"].contains(&quota.as_str()), "{quota}");
    assert_eq!(root("--cpuset-cpus 0", "grep Cpus_allowed_list /proc/self/status | cut -f2"), "0\n");
    assert_eq!(root("--oom-score-adj 321", "cat /proc/self/oom_score_adj"), "321\n");
    let below = root("--cgroup-parent /gpurun-test-parent --cgroupns host", "cat /proc/self/cgroup");
    assert!(below.contains("/gpurun-test-parent/gpurun/"), "{below}");
    for mount in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
        let _ = fs::remove_dir(format!("{mount}/gpurun-test-parent/gpurun"));
        let _ = fs::remove_dir(format!("{mount}/gpurun-test-parent"));
    }
}

#[test]
fn namespaces_and_their_parameters_are_as_asked() {
    let host = host();
    for caller in Caller::EACH {
        let ok = |options: &str, script: &str| host.ok(caller, options, &busybox(), script);
        assert_eq!(ok("--ipc none", "ls -d /dev/shm 2>/dev/null || echo none"), "none\n");
        assert_eq!(
            ok("-h foo --domainname ex.org", "hostname; cat /proc/sys/kernel/domainname"),
            "foo\nex.org\n"
        );
        let own_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        assert_eq!(ok("--uts host", "hostname"), format!("{own_name}\n"));
        assert_eq!(ok("", "echo $$"), "1\n");
        assert_ne!(ok("--pid host", "echo $$"), "1\n");
        let hosts = ok(
            "--add-host db:10.0.0.1 --add-host me=host-gateway --add-host me:host-gateway",
            "cat /etc/hosts",
        );
        assert!(hosts.contains("\n10.0.0.1\tdb\n127.0.0.1\tme\n"), "{hosts}");
        let resolv =
            ok("--dns 8.8.8.8 --dns ::1 --dns-search x.org --dns-option ndots:2", "cat /etc/resolv.conf");
        assert!(
            resolv.ends_with("nameserver 8.8.8.8\nnameserver ::1\nsearch x.org\noptions ndots:2\n"),
            "{resolv}"
        );
    }
    let ok = |options: &str, script: &str| host.ok(Caller::Root, options, &busybox(), script);
    assert_eq!(ok("--sysctl kernel.shmmax=12345678", "cat /proc/sys/kernel/shmmax"), "12345678\n");
    assert_eq!(
        ok("--network none --sysctl net.core.somaxconn=77", "cat /proc/sys/net/core/somaxconn"),
        "77\n"
    );
    assert_ne!(fs::read_to_string("/proc/sys/kernel/shmmax").unwrap(), "12345678\n");
}

#[test]
fn security_options_disable_the_named_confinement() {
    let host = host();
    let status = |options: &str| {
        host.ok(
            Caller::Root,
            options,
            &busybox(),
            "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | cut -f2 | tr '\\n' ' '",
        )
    };
    assert_eq!(status(""), "1 2 ");
    assert_eq!(status("--security-opt no-new-privileges=false"), "0 2 ");
    assert_eq!(status("--security-opt no-new-privileges=false -u 1000"), "0 2 ");
    // The filter that separates Unix sockets stays on the host's network.
    assert_eq!(status("--security-opt seccomp=unconfined"), "1 2 ");
    assert_eq!(status("--security-opt seccomp=unconfined --network none"), "1 0 ");
    assert_eq!(status("--privileged"), "0 0 ");
    let ok = |options: &str, script: &str| host.ok(Caller::Root, options, &busybox(), script);
    let read_only = "mount | grep -c ' /proc/sys .*[(,]ro[,)]'; true";
    assert_eq!(ok("", read_only), "1\n");
    assert_eq!(ok("--security-opt systempaths=unconfined", read_only), "0\n");
    assert_eq!(ok("--privileged", read_only), "0\n");
    assert_eq!(ok("--privileged", "mount | grep -c ' /sys type sysfs (rw'"), "1\n");
}

#[test]
fn devices_of_the_host_are_given_as_asked() {
    let host = host();
    for caller in Caller::EACH {
        let ok = |options: &str, script: &str| host.ok(caller, options, &busybox(), script);
        assert_eq!(ok("--device /dev/zero:/dev/nothing", "head -c 3 /dev/nothing | wc -c"), "3\n");
    }
    let gpus = |options: &str| {
        host.ok(Caller::Root, options, &busybox(), "ls /dev | grep -cE '^nvidia[0-9]+$'; true")
    };
    assert_eq!(gpus("--device nvidia.com/gpu=all"), "8\n");
    assert_eq!(gpus("--device nvidia.com/gpu=0 --device nvidia.com/gpu=3"), "2\n");
    assert_eq!(gpus("--gpus device=0,1"), "2\n");
    assert_eq!(gpus("--nv"), "8\n");
    assert_eq!(gpus("--runtime nvidia"), "0\n");
    // A device without write permission cannot be written, even by root.
    let denied = "echo x > /dev/full-ro 2>&1 | grep -c 'not permitted'; true";
    assert_eq!(host.ok(Caller::Root, "--device /dev/full:/dev/full-ro:r", &busybox(), denied), "0\n");
}

#[test]
fn files_name_the_container() {
    let host = host();
    let dir = temporary();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let options = format!("--cidfile {} --pidfile {}", path("cid"), path("pid"));
    host.ok(Caller::Root, &options, &busybox(), "true");
    assert_eq!(fs::read_to_string(path("cid")).unwrap().len(), 12);
    assert!(fs::read_to_string(path("pid")).unwrap().parse::<u32>().is_ok());
    let refused = host.refused(Caller::Root, &format!("--cidfile {}", path("cid")), &busybox(), "GPU-0001");
    assert!(refused.contains("fix: name a new file"), "{refused}");
    let absent = run(&mut host.command(
        Caller::Root,
        &format!("--cidfile {}", path("gone")),
        &busybox(),
        &["absent-command"],
    ));
    assert!(absent.code == 127 && !Path::new(&path("gone")).exists(), "{absent:?}");
}

#[test]
fn a_file_is_not_mounted_on_a_directory() {
    let host = host();
    for (options, says) in [
        ("-v /etc/passwd:/tmp", "is a file on the host, and /tmp is a directory in the image"),
        ("-v /tmp:/etc/passwd", "is a directory on the host, and /etc/passwd is a file in the image"),
    ] {
        let refused = host.refused(Caller::Root, options, &busybox(), "GPU-0055");
        assert!(refused.contains(says) && refused.contains("fix: "), "{refused}");
    }
}

#[test]
fn a_rank_that_is_not_passed_is_reported() {
    let host = host();
    let with = |options: &str| {
        run(host
            .command(Caller::Root, options, &busybox(), &["env"])
            .env("OMPI_COMM_WORLD_RANK", "1")
            .env("OMPI_X", "y"))
    };
    let warned = with("");
    assert!(warned.code == 0 && warned.err.contains("-e 'OMPI_*'"), "{warned:?}");
    let passed = with("-e OMPI_*");
    assert!(passed.err.is_empty() && passed.out.contains("OMPI_X=y"), "{passed:?}");
}
