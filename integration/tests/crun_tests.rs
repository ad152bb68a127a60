//! crun's own tests: every case that crun passes alone also passes with gpurun-runtime above it, with no GPU requested and
//! with all GPUs in every container.

use gpurun_integration::{
    cached,
    engines::{Cgroups, Machine, Suite},
};
use std::{collections::BTreeSet, fs, process::Command, thread};

/// A case that shows that the containers of a run have GPUs.
const HAS_A_GPU: &str = r#"
from tests_utils import *
def has_a_gpu():
    config = base_config()
    config["process"]["args"] = ["/init", "access", "/dev/nvidia0"]
    run_and_get_output(config)
    return 0
tests_main({"has-a-gpu": has_a_gpu})
"#;

const CRUN: &str = "/usr/bin/crun";
const GPURUN: &str = "/usr/local/bin/gpurun-runtime";

#[test]
#[ignore = "integration/run --all fetches crun's tests"]
fn cases_that_crun_passes_pass_above_it() {
    let [alone, unchanged, with_gpus] = thread::scope(|scope| {
        [(CRUN, ""), (GPURUN, ""), (GPURUN, "NVIDIA_VISIBLE_DEVICES=all")]
            .map(|(runtime, environment)| scope.spawn(move || passed(runtime, environment)))
            .map(|column| column.join().expect("the tests run"))
    });
    assert!(alone.len() > 50, "crun alone passes {alone:#?}");
    assert!(with_gpus.contains("tests/test_gpu.py has-a-gpu"), "{with_gpus:#?}");
    let lost = |passed| alone.difference(passed).collect::<Vec<_>>();
    assert!(
        lost(&unchanged).is_empty() && lost(&with_gpus).is_empty(),
        "lost without GPUs: {:#?}, with: {:#?}",
        lost(&unchanged),
        lost(&with_gpus)
    );
}

/// Copies the tests into the machine and adds the variable to their containers' configuration.
fn prepare(machine: &Machine, environment: &str) {
    let directory = machine.shared().join("crun-tests");
    let copied = Command::new("cp").arg("-a").arg(cached("crun-tests")).arg(&directory).status().expect("cp");
    assert!(copied.success());
    if environment.is_empty() {
        return;
    }
    let utilities = directory.join("tests/tests_utils.py");
    let text = fs::read_to_string(&utilities).expect("crun's tests");
    let changed = text.replace("\"TERM=xterm\"", &format!("\"TERM=xterm\", {environment:?}"));
    assert_ne!(text, changed, "{} has another configuration", utilities.display());
    fs::write(&utilities, changed).expect("the copy");
    fs::write(directory.join("tests/test_gpu.py"), HAS_A_GPU).expect("the copy");
}

/// The cases, each after its file's name, that pass with this runtime in a machine of its own; a case that crun skips is not
/// one. Containers get one more environment variable.
fn passed(runtime: &str, environment: &str) -> BTreeSet<String> {
    // On a hybrid host only the hierarchies of version 1 have controllers.
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    machine.hand_over_to("crun");
    prepare(&machine, environment);
    let directory = machine.shared().join("crun-tests");
    // sd-notify-proxy gives a start two seconds, so a file with a failure is run a second time on a busy machine. A process in
    // a frozen cgroup survives the machine, and the tests leave some.
    let output = machine.sh(&format!(
        "cd {}
         export OCI_RUNTIME={runtime} PYTHONPATH=tests
         for file in tests/test_*.py; do
           for _ in 1 2; do
             timeout 120 python3 $file < /dev/null 2> /dev/null > output || true
             sed -n \"s#^ok [0-9]* - #$file #p\" output
             grep -q '^not ok' output || break
           done
         done
         find /sys/fs/cgroup/freezer -name freezer.state 2> /dev/null | while read -r state; do
           echo THAWED 2> /dev/null > $state || true
         done",
        directory.display(),
    ));
    output.lines().filter(|line| !line.ends_with("#SKIP")).map(str::to_owned).collect()
}
