//! `gpurun configure` on machines with the real engines, and gpurun-runtime above the engines' own low-level runtimes.

use gpurun_integration::{
    Ended,
    engines::{Cgroups, Machine, Suite},
    run,
};

/// Every containerd, with the newest version of its configuration.
const CONTAINERDS: [(Suite, i64); 2] = [(Suite::Bookworm, 2), (Suite::Sid, 3)];

fn machine(suite: Suite) -> Machine {
    Machine::start(suite, Cgroups::possible()[0])
}

fn sh(machine: &Machine, script: &str) -> Ended {
    run(&mut machine.command(&["sh", "-c", script]))
}

/// Writes a file, runs `gpurun configure containerd`, and returns the configuration that containerd then reads.
fn configured(machine: &Machine, file: &str, text: &str, options: &str) -> (Ended, String) {
    machine.sh(&format!("mkdir -p $(dirname {file}); cat > {file} <<'END'\n{text}END"));
    let ended = sh(machine, &format!("gpurun configure containerd --file {file} {options}"));
    let main =
        file.replace("/config-v3.toml.d/99.toml", "/config.toml").replace("/conf.d/99.toml", "/config.toml");
    let dump = sh(machine, &format!("containerd --config {main} config dump"));
    assert_eq!(dump.code, 0, "{text}: {dump:?}");
    (ended, dump.out)
}

fn has_runtime(dump: &str) -> bool {
    dump.lines().any(|line| line.contains(".containerd.runtimes.gpurun.options]"))
        && dump.lines().any(|line| line.contains("BinaryName") && line.contains("gpurun-runtime"))
}

#[test]
fn the_installed_containerd_reads_what_was_written_whatever_version_the_file_had() {
    for (suite, newest) in CONTAINERDS {
        let machine = machine(suite);
        for text in [
            "root = \"/var/lib/containerd\"\n\n[debug]\n  level = \"info\"\n".into(),
            "version = 1\n[plugins.cri.containerd]\n  snapshotter = \"native\"\n".into(),
            "version = 1\n[plugins.opt]\npath = \"/opt/x\"\n".into(),
            "required_plugins = [\"restart\"]\n".into(),
            "version = 2\n".into(),
            format!("version = {newest}\n"),
            String::new(),
            "\n# a comment\n".into(),
        ] {
            let (ended, dump) = configured(&machine, "/etc/x/config.toml", &text, "--set-as-default");
            assert!(ended.code == 0 && ended.err.is_empty(), "{suite:?} {text}: {ended:?}");
            assert!(has_runtime(&dump), "{suite:?} {text}: {dump}");
            assert!(
                dump.lines().any(|line| line.contains("default_runtime_name") && line.contains("gpurun")),
                "{suite:?} {text}: {dump}"
            );
            let again =
                sh(&machine, "gpurun configure containerd --file /etc/x/config.toml --set-as-default");
            assert!(again.code == 0 && again.out.contains("needs no change"), "{again:?}");
            machine.sh("gpurun configure containerd --file /etc/x/config.toml --remove");
            let left = machine.sh("cat /etc/x/config.toml 2>/dev/null || true");
            assert_eq!(left, text, "{suite:?}");
        }
    }
}

#[test]
fn a_disabled_cri_plugin_stays_disabled_and_is_reported() {
    for (suite, _) in CONTAINERDS {
        let machine = machine(suite);
        let (ended, dump) = configured(&machine, "/etc/x/config.toml", "disabled_plugins = [\"cri\"]\n", "");
        assert!(ended.code == 0 && ended.err.contains("CRI plugin is disabled"), "{ended:?}");
        assert!(dump.contains("io.containerd.grpc.v1.cri"), "{dump}");
        // After the plugin is enabled, containerd has the runtime.
        machine.sh("sed -i '/disabled_plugins/d' /etc/x/config.toml");
        assert!(has_runtime(&machine.sh("containerd --config /etc/x/config.toml config dump")));
    }
}

#[test]
fn a_drop_in_gets_the_version_of_its_main_file() {
    let machine = machine(Suite::Sid);
    // As k3s writes it.
    let main = "version = 3\nimports = [\"/etc/k/config-v3.toml.d/*.toml\"]\n\n\
                [plugins.'io.containerd.cri.v1.runtime']\nenable_selinux = false\n\n\
                [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\n\
                [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nSystemdCgroup = true\n";
    let files = "mkdir -p /etc/k/config-v3.toml.d; cat > /etc/k/config.toml";
    machine.sh(&format!("{files} <<'END'\n{main}END"));
    for text in ["", "# mine\n"] {
        let (ended, dump) = configured(&machine, "/etc/k/config-v3.toml.d/99.toml", text, "--set-as-default");
        assert!(ended.code == 0 && ended.err.is_empty(), "{ended:?}");
        assert!(has_runtime(&dump), "{dump}");
        let drop_in = machine.sh("cat /etc/k/config-v3.toml.d/99.toml");
        assert!(drop_in.contains("version = 3") && drop_in.contains("SystemdCgroup = true"), "{drop_in}");
        assert_eq!(machine.sh("cat /etc/k/config.toml"), main);
        machine.sh("gpurun configure containerd --file /etc/k/config-v3.toml.d/99.toml --remove");
        assert_eq!(machine.sh("cat /etc/k/config-v3.toml.d/99.toml 2>/dev/null || true"), text);
    }
    // containerd ignores a drop-in of version 2 beside a main file of version 3, so it is refused and unchanged.
    let (ended, _) = configured(&machine, "/etc/k/config-v3.toml.d/99.toml", "version = 2\n", "");
    assert!(
        ended.code == 125 && ended.err.contains("error[GPU-0002]") && ended.err.contains("fix: "),
        "{ended:?}"
    );
    assert_eq!(machine.sh("cat /etc/k/config-v3.toml.d/99.toml"), "version = 2\n");
    // Before k3s has written its main file, the name of the directory tells the version.
    machine.sh("rm -r /etc/k; mkdir -p /etc/k/config-v3.toml.d");
    machine.sh("gpurun configure containerd --file /etc/k/config-v3.toml.d/99.toml");
    assert!(machine.sh("cat /etc/k/config-v3.toml.d/99.toml").starts_with("version = 3\n"));
}

#[test]
fn a_version_that_the_installed_containerd_does_not_read_is_refused_and_the_file_stays() {
    let machine = machine(Suite::Sid);
    machine.sh("mkdir -p /etc/x; echo 'version = 4' > /etc/x/config.toml");
    let ended = sh(&machine, "gpurun configure containerd --file /etc/x/config.toml");
    assert!(ended.code == 125 && ended.err.contains("got `4`") && ended.err.contains("fix: "), "{ended:?}");
    assert_eq!(machine.sh("cat /etc/x/config.toml; ls /etc/x"), "version = 4\nconfig.toml\n");
}

#[test]
fn the_runtime_hands_over_to_what_the_engine_uses_without_it() {
    let machine = machine(Suite::Sid);
    // CRI-O's packages keep crun outside of PATH.
    machine.sh("set -e
         rm -rf /etc/gpurun
         mkdir -p /usr/libexec/crio /etc/crio/crio.conf.d
         mv $(command -v crun) /usr/libexec/crio/crun
         mv $(command -v runc) /usr/libexec/runc.real
         cat > /etc/crio/crio.conf.d/10-crio.conf <<'END'
[crio.runtime]
default_runtime = \"crun\"
[crio.runtime.runtimes.crun]
runtime_path = \"/usr/libexec/crio/crun\"
runtime_root = \"/run/crun\"
END");
    let version = |root: &str| sh(&machine, &format!("gpurun-runtime {root} --version"));
    assert!(version("--root /run/crun").err.contains("GPU-0059"));
    let out = machine.sh("gpurun configure crio");
    assert!(out.contains("/usr/libexec/crio/crun"), "{out}");
    assert!(version("--root /run/crun").out.contains("crun version"));
    // Docker's default is also crun, at a different path.
    machine.sh(
        "set -e
         ln /usr/libexec/crio/crun /opt/crun
         ln /usr/libexec/runc.real /usr/local/bin/runc
         printf '\\357\\273\\277{\"default-runtime\": \"crun\", \"runtimes\": {\"crun\": {\"path\": \"/opt/crun\"}}}' > /etc/docker/daemon.json
         gpurun configure docker",
    );
    let docker = version("--root /var/run/docker/runtime-gpurun/moby");
    assert!(docker.out.contains("crun version"), "{docker:?}");
    assert!(version("--root /run/containerd/runc/k8s.io").out.contains("runc version"));
    // The administrator's own choice takes precedence.
    machine.hand_over_to("runc");
    assert!(version("--root /run/crun").out.contains("runc version"));
    machine
        .sh("rm /etc/gpurun/config.toml; gpurun configure docker --remove; gpurun configure crio --remove");
    assert!(version("--root /run/crun").out.contains("runc version"));
    assert_eq!(machine.sh("cat /etc/gpurun/engines.toml 2>/dev/null || true"), "");
    let mark = machine.sh("head -c 3 /etc/docker/daemon.json | od -An -tx1");
    assert_eq!(mark.trim(), "ef bb bf", "the byte order mark stays");
}

#[test]
fn engines_show_a_failure_of_the_runtime_whole() {
    for suite in [Suite::Bookworm, Suite::Sid] {
        let machine = machine(suite);
        let archive = gpurun_integration::image("busybox", "docker.tar").display().to_string();
        machine.sh(&format!("podman load -qi {archive}"));
        machine.start_docker();
        machine.sh(&format!("docker load -qi {archive}"));
        // A missing configuration, one that a user may not read, and a missing low-level runtime.
        for (prepare, code) in [
            ("echo 'runtimes = [\"/no/such/runc\"]' > /etc/gpurun/config.toml", "GPU-0059"),
            ("echo 'log-level = 1' > /etc/gpurun/config.toml", "GPU-0002"),
            ("rm -f /etc/gpurun/config.toml; mkdir /etc/gpurun/config.toml", "GPU-0002"),
            (
                "rmdir /etc/gpurun/config.toml; printf 'runtimes = [\"/etc/not-a-runtime\"]\\n' > /etc/gpurun/config.toml; printf '#!/no/such/interpreter\\n' > /etc/not-a-runtime; chmod 755 /etc/not-a-runtime",
                "GPU-0059",
            ),
        ] {
            machine.sh(prepare);
            for engine in [
                "podman --runtime gpurun run --rm localhost/busybox",
                "docker run --rm --runtime gpurun busybox",
            ] {
                let words = engine.replace("run --rm", "run --rm -e NVIDIA_VISIBLE_DEVICES=all");
                let ended = sh(&machine, &format!("{words} true"));
                // Podman 5 lets the runtime's own standard error through as well, ahead of its answer.
                let shown = ended.err.lines().rfind(|line| line.contains(&format!("error[{code}]: ")));
                let shown = shown.unwrap_or_else(|| panic!("{suite:?} {engine} {code}: {ended:?}"));
                assert!(shown.contains("; cause: ") && shown.contains("; fix: "), "{shown}");
                assert_ne!(ended.code, 127, "the container's command is not what is missing: {ended:?}");
            }
        }
    }
}
