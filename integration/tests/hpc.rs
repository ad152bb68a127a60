//! Programs of computing centres, where nobody is root: Apptainer and Charliecloud call `nvidia-container-cli`, as their users and
//! from inside a container that is being made.

use gpurun_integration::{
    cached, dist,
    engines::{Cgroups, Machine, Suite},
    run,
};

/// A machine with `nvidia-container-cli`, and a root of the user's own at /home/someone/root.
fn machine() -> Machine {
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    // Both hand nothing of their environment on, so the simulated host has to be named by somebody else.
    machine.sh(&format!(
        r#"set -e
        mkdir /opt/nvidia
        ln -s {gpurun} /opt/nvidia/nvidia-container-cli
        printf '#!/bin/sh\nGPURUN_SIMULATED_HOST=%s exec /opt/nvidia/nvidia-container-cli "$@"\n' $GPURUN_SIMULATED_HOST \
          > /usr/local/bin/nvidia-container-cli
        chmod 755 /usr/local/bin/nvidia-container-cli
        cp -a {root} /home/someone/root
        chown -R someone: /home/someone/root
        chmod -R u+w /home/someone/root"#,
        gpurun = dist("gpurun").display(),
        root = cached("images/debian-python/root").display(),
    ));
    machine
}

/// What `nvidia-smi -L` of the driver, and `python3`, see in a container.
const LOOK: &str =
    "nvidia-smi -L; python3 -c 'import ctypes; ctypes.CDLL(\"libcuda.so.1\"); print(\"CUDA is found\")'";

fn gpus(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with("GPU ") && line.contains("(UUID: GPU-")).count()
}

#[test]
fn apptainer_gives_the_gpus_that_are_asked_for_to_a_user_and_to_root() {
    let machine = machine();
    for (options, visible, count) in [
        (&["--userns"][..], "all", 8),
        (&["--fakeroot"], "all", 8),
        // Otherwise it shows the host's /dev.
        (&["--userns", "--contain"], "0,7", 2),
        (&["--fakeroot", "--contain"], "GPU-a0c6a359-8272-501c-8a2b-b0167ce9f6f9", 1),
    ] {
        let visible = format!("NVIDIA_VISIBLE_DEVICES={visible}");
        let words =
            [&["env", &visible, "apptainer", "exec", "--nvccli"], options, &["root", "sh", "-c", LOOK]]
                .concat();
        let ended = run(&mut machine.command_as_user(&words));
        assert_eq!(ended.code, 0, "{options:?}: {ended:?}");
        assert_eq!(gpus(&ended.out), count, "{options:?} {visible}: {ended:?}");
        assert!(ended.out.contains("CUDA is found"), "{options:?}: {ended:?}");
    }
    // Without Apptainer's own privileges, of which this machine lacks CAP_SYS_RESOURCE.
    let before = machine.sh("cat /proc/self/mountinfo");
    let words = ["apptainer", "exec", "--nvccli", "--no-privs", "/home/someone/root", "sh", "-c", LOOK];
    let ended = run(&mut machine.command(&words));
    assert_eq!((ended.code, gpus(&ended.out)), (0, 8), "{ended:?}");
    assert_eq!(machine.sh("cat /proc/self/mountinfo"), before, "nothing is mounted on the host");
}

#[test]
fn a_gpu_that_is_not_there_ends_apptainer_with_the_reason() {
    let machine = machine();
    let words =
        ["env", "NVIDIA_VISIBLE_DEVICES=9", "apptainer", "exec", "--nvccli", "--userns", "root", "true"];
    let ended = run(&mut machine.command_as_user(&words));
    assert_ne!(ended.code, 0, "{ended:?}");
    assert!(ended.err.contains("error[GPU-0021]") && ended.err.contains("fix:"), "{ended:?}");
}

#[test]
fn charliecloud_copies_the_drivers_files_into_an_image() {
    let machine = machine();
    // It copies them from where they are on the host.
    machine.sh("for file in $(nvidia-container-cli list --binaries --libraries); do
           mkdir -p $(dirname $file) && cp $GPURUN_SIMULATED_HOST/driver$file $file
         done");
    // A path with `/lib` in it is a library's to ch-fromhost, and Debian has the program below /usr/lib/nvidia.
    let script =
        "PATH=$PATH:/sbin; ch-fromhost --nvidia root && ch-run --write root -- /usr/local/lib/nvidia-smi -L";
    let ended = run(&mut machine.command_as_user(&["sh", "-ec", script]));
    assert_eq!((ended.code, gpus(&ended.out)), (0, 8), "{ended:?}");
}
