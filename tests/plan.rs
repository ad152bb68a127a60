//! What containers get on three hosts, and what they are told where they get nothing.

use gpurun::{
    error::{Code, Result},
    inventory::{FileKind, Inventory, Problem},
    plan::{self, Injection, Policy},
    request::{Comparison, Condition, DeviceRequest, DeviceSelection, GpuFilter, Requirement},
    vocabulary::{DriverCapability, EnvVar, GatedFeature, Version},
};
use proptest::prelude::*;
use std::{collections::BTreeMap, fs, path::Path};

fn host(name: &str) -> Inventory {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts").join(name).with_extension("json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// What `--gpus` and an image's variables ask for.
fn request(gpus: &str, image: &[(&str, &str)]) -> DeviceRequest {
    let image: Vec<EnvVar> = image.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    DeviceRequest::from_cli(Some(gpus), &[], &image, &BTreeMap::new()).unwrap().unwrap()
}

fn ask(inventory: &Inventory, gpus: &str, image: &[(&str, &str)]) -> Result<Injection> {
    plan::plan(inventory, &request(gpus, image), &Policy::default())
}

fn refusal(inventory: &Inventory, gpus: &str, image: &[(&str, &str)]) -> String {
    ask(inventory, gpus, image).unwrap_err().to_string()
}

fn nodes(injection: &Injection) -> Vec<String> {
    injection.devices.iter().map(|node| node.container_path.0.display().to_string()).collect()
}

/// The nodes of GPUs alone, in order.
fn gpus(injection: &Injection) -> Vec<String> {
    let is_gpu =
        |path: &String| path.strip_prefix("/dev/nvidia").is_some_and(|rest| rest.parse::<u32>().is_ok());
    nodes(injection).into_iter().filter(is_gpu).collect()
}

#[test]
fn the_plans_of_three_hosts() {
    for (name, on, gpus, image) in [
        ("8xh100-one", "8xh100", "device=2", &[][..]),
        ("8xh100-everything", "8xh100", "2,capabilities=all", &[("CUDA_VERSION", "12.6.1")][..]),
        ("8xh100-driver-only", "8xh100", "device=none,capabilities=utility", &[][..]),
        ("a100-mig-all", "a100-mig", "all", &[][..]),
        ("t4-old-all", "t4-old", "all", &[("CUDA_VERSION", "11.0.3")][..]),
    ] {
        insta::assert_json_snapshot!(name, ask(&host(on), gpus, image).unwrap_or_else(|e| panic!("{e}")));
    }
}

#[test]
fn forward_compatibility_is_the_administrators_to_allow() {
    let (host, request) = (host("t4-old"), request("all", &[("CUDA_VERSION", "11.0.3")]));
    let asked = |forward_compat| plan::plan(&host, &request, &Policy { forward_compat, ..Policy::default() });
    assert!(asked(true).unwrap().forward_compat.is_some());
    assert!(asked(false).unwrap().forward_compat.is_none());
    // What only the image's own libraries could run is refused then.
    let newer = self::request("all", &[("CUDA_VERSION", "12.6.1")]);
    let refusal =
        plan::plan(&host, &newer, &Policy { forward_compat: false, ..Policy::default() }).unwrap_err();
    assert_eq!(refusal.code(), Code::CudaTooNew);
}

#[test]
fn a_gpu_is_found_by_every_name_and_given_once() {
    let h100 = host("8xh100");
    // Index 1 has minor number 3.
    for name in
        ["1", "GPU-00000001-1111-2222-3333-000000000001", "gpu-00000001", "2a:00.0", "00000000:2A:00.0"]
    {
        assert_eq!(gpus(&ask(&h100, &format!("device={name}"), &[]).unwrap()), ["/dev/nvidia3"], "{name}");
    }
    let twice = ask(&h100, "\"device=3,1,GPU-00000003,1\"", &[]).unwrap();
    assert_eq!(gpus(&twice), ["/dev/nvidia1", "/dev/nvidia3"]);
    let selected =
        plan::select(&h100, &request("\"device=1,GPU-00000001,2a:00.0\"", &[]), DriverCapability::COMPUTE);
    assert_eq!(selected.unwrap().len(), 1);
    assert_eq!(gpus(&ask(&h100, "3", &[]).unwrap()), ["/dev/nvidia2", "/dev/nvidia3", "/dev/nvidia0"]);
    assert_eq!(gpus(&ask(&h100, "all", &[]).unwrap()).len(), 8);
}

#[test]
fn mig_devices_are_given_with_their_gpu_and_two_nodes() {
    let a100 = host("a100-mig");
    for name in ["0:1", "MIG-00000001-aaaa-bbbb-cccc-000000000001", "mig-00000001"] {
        let given = ask(&a100, &format!("device={name}"), &[]).unwrap();
        assert_eq!(
            nodes(&given)[3..],
            ["/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap75", "/dev/nvidia-caps/nvidia-cap76"],
            "{name}"
        );
    }
    // Both need the GPU's node, and it is there once. The GPU in MIG mode itself is not part of `all`.
    let all = ask(&a100, "all", &[]).unwrap();
    assert_eq!(gpus(&all), ["/dev/nvidia0", "/dev/nvidia1"]);
    assert_eq!(all.devices.len(), 3 + 1 + 4 + 1);
    assert_eq!(all.env, [("NVIDIA_VISIBLE_DEVICES".to_owned(), "all".to_owned())]);
    // One that fell off the bus is told of, what is wrong with modeset is not.
    assert_eq!(
        all.warnings,
        ["GPU 2 (0000:47:00.0) does not answer: it fell off the bus (XID 79); reset or power-cycle the host"]
    );
    // nvidia-smi may look at the whole.
    let smi = ask(&a100, "device=0,capabilities=utility", &[]).unwrap();
    assert_eq!(nodes(&smi), ["/dev/nvidiactl", "/dev/nvidia0"]);
    let two = ask(&a100, "2", &[]).unwrap();
    assert_eq!(two.env[0].1, "0:0,0:1");
}

#[test]
fn what_is_not_there_is_never_left_out_in_silence() {
    let (h100, a100, mut t4) = (host("8xh100"), host("a100-mig"), host("t4-old"));
    let choices = "0:0 (1g.5gb, MIG-00000000-aaaa-bbbb-cccc-000000000000), 0:1 (1g.5gb, \
                   MIG-00000001-aaaa-bbbb-cccc-000000000001), 1 (NVIDIA A100-SXM4-40GB, GPU-a1000001-0000-0000-0000-000000000001)";
    for (device, kind) in [("99", "GPU"), ("0:2", "MIG device"), ("1:0", "MIG device"), ("GPU-beef", "GPU")] {
        assert_eq!(
            refusal(&a100, &format!("device={device}"), &[]),
            format!(
                "error[GPU-0021]: there is no {kind} {device} on this host\n  cause: the host has {choices}\n  \
                 fix: ask for one of these, or for `all`"
            )
        );
    }
    assert_eq!(
        refusal(&t4, "2", &[]),
        "error[GPU-0021]: 2 GPUs were asked for and the host has only 1\n  \
         cause: the host has 0 (Tesla T4, GPU-74000000-0000-0000-0000-000000000000)\n  fix: ask for 1 or fewer, or for `all`"
    );
    assert_eq!(
        refusal(&t4, "1,arch>=9.0,mem>=40GiB", &[]),
        "error[GPU-0021]: a GPU with arch>=9.0 and mem>=40960MiB was asked for and the host has none\n  \
         cause: the host has 0 (Tesla T4, GPU-74000000-0000-0000-0000-000000000000)\n  fix: ask for one of these, or for `all`"
    );
    let lost = "GPU 2 (0000:47:00.0) does not answer: it fell off the bus (XID 79)";
    for name in ["2", "GPU-a1000002", "47:00.0", "2:0"] {
        assert_eq!(
            refusal(&a100, &format!("device={name}"), &[]),
            format!("error[GPU-0015]: {lost}\n  fix: reset or power-cycle the host")
        );
    }
    assert_eq!(
        refusal(&a100, "4", &[]),
        format!(
            "error[GPU-0015]: 4 GPUs were asked for and the host has only 3\n  cause: {lost}\n  fix: reset or power-cycle the host"
        )
    );
    assert!(refusal(&h100, "device=GPU-0", &[]).starts_with(
        "error[GPU-0021]: GPU-0 begins the UUID of more than one GPU\n  cause: it fits 0 (NVIDIA H100 80GB HBM3, GPU-00000000"
    ));
    assert!(refusal(&h100, "device=GPU-0", &[]).ends_with("\n  fix: write more of the UUID"));
    assert_eq!(
        refusal(&a100, "device=0", &[]),
        format!(
            "error[GPU-0021]: GPU 0 is in MIG mode and cannot be used as a whole\n  cause: its MIG devices are {}\n  \
             fix: ask for one of these, or for `all`",
            choices.split_once(", 1 (").unwrap().0
        )
    );
    t4.gpus[0].mig_enabled = true;
    assert_eq!(
        refusal(&t4, "device=0", &[]),
        "error[GPU-0021]: GPU 0 is in MIG mode and cannot be used as a whole\n  cause: it has no MIG devices\n  \
         fix: make MIG devices with `nvidia-smi mig -cgi … -C`, or end MIG mode"
    );
    t4.gpus.clear();
    for gpus in ["all", "1"] {
        assert_eq!(
            refusal(&t4, gpus, &[]),
            "error[GPU-0021]: a GPU was asked for and the host has none\n  \
             cause: the host has none that a container could use\n  fix: `gpurun doctor` says why"
        );
    }
    assert!(ask(&t4, "device=none", &[]).is_ok());
}

#[test]
fn filters_take_the_gpus_that_fit() {
    let a100 = host("a100-mig");
    let given = ask(&a100, "1,mem>=40GiB", &[]).unwrap();
    assert_eq!((gpus(&given), given.env[0].1.as_str()), (vec!["/dev/nvidia1".into()], "1"));
    assert_eq!(ask(&a100, "all,mem>=5GB,arch>=8.0", &[]).unwrap().env[0].1, "0:0,0:1,1");
}

#[test]
fn a_driver_without_what_a_capability_needs_is_refused() {
    let without = |library: &str| {
        let mut host = host("t4-old");
        host.driver.files.retain(
            |file| !matches!(&file.kind, FileKind::Library { name, is_32bit: false, .. } if name.starts_with(library)),
        );
        host
    };
    assert_eq!(
        refusal(&without("libcuda.so"), "all", &[]),
        "error[GPU-0032]: the driver lacks libcuda.so.450.80.02, which the capability compute needs\n  \
         cause: it is in no library directory of /\n  \
         fix: install the driver's libraries, version 450.80.02, or say where they are with --driver-root"
    );
    assert!(refusal(&without("libnvidia-ml.so"), "all", &[]).contains("which the capability utility needs"));
    assert!(ask(&without("libcuda.so"), "all,capabilities=utility", &[]).is_ok());
    // A 32-bit libcuda is no libcuda.
    let mut only_32bit = host("8xh100");
    only_32bit.driver.files.retain(|file| {
        !matches!(&file.kind, FileKind::Library { name, is_32bit: false, .. } if name.starts_with("libcuda"))
    });
    assert!(ask(&only_32bit, "all", &[]).is_err());

    let mut no_nodes = host("t4-old");
    no_nodes.driver.control_nodes.retain(|node| node.container_path.0 == Path::new("/dev/nvidiactl"));
    assert_eq!(
        refusal(&no_nodes, "all", &[]),
        "error[GPU-0014]: the device node /dev/nvidia-uvm is missing\n  \
         fix: run `nvidia-modprobe -u -c 0` as root, which loads nvidia-uvm and makes it"
    );
    assert!(ask(&no_nodes, "all,capabilities=utility", &[]).is_ok());
    // Since a reboot it may also have a number that is no longer its own.
    let mut stale = host("t4-old");
    stale.problems.push(Problem {
        code: "GPU-0014".into(),
        subjects: vec!["nvidia-uvm".into()],
        what: "the device node /dev/nvidia-uvm has major number 510, but the kernel uses 511".into(),
        fix: "remove it".into(),
    });
    assert_eq!(
        refusal(&stale, "all", &[]),
        "error[GPU-0014]: the device node /dev/nvidia-uvm has major number 510, but the kernel uses 511\n  fix: remove it"
    );
    assert!(ask(&stale, "all,capabilities=utility", &[]).is_ok());
    no_nodes.driver.control_nodes.clear();
    assert_eq!(
        refusal(&no_nodes, "all,capabilities=utility", &[]),
        "error[GPU-0014]: the device node /dev/nvidiactl is missing\n  \
         fix: run `nvidia-smi` as root, which makes it, or `nvidia-modprobe -c 0`"
    );
}

#[test]
fn capabilities_are_enforced() {
    let h100 = host("8xh100");
    let video = ask(&h100, "device=0,capabilities=video", &[]).unwrap();
    assert_eq!(nodes(&video), ["/dev/nvidiactl", "/dev/nvidia2"]);
    assert!(
        video.forward_compat.is_none() && !video.symlinks.iter().any(|l| l.link.0.ends_with("nvidia-smi"))
    );
    let with_32bit = |caps: &str| {
        let given = ask(&h100, &format!("device=0,\"capabilities={caps}\""), &[]).unwrap();
        given.libraries.iter().any(|library| library.is_32bit)
    };
    assert!(with_32bit("compute,compat32") && !with_32bit("compute") && !with_32bit("utility,compat32"));

    let policy = Policy {
        supported_capabilities: DriverCapability::COMPUTE | DriverCapability::UTILITY,
        ..Policy::default()
    };
    assert_eq!(
        plan::plan(&h100, &request("all,\"capabilities=compute,video,graphics\"", &[]), &policy)
            .unwrap_err()
            .to_string(),
        "error[GPU-0022]: the driver capability graphics, video is not allowed on this host\n  \
         fix: ask for compute, utility, or have the administrator add it to supported-driver-capabilities"
    );
    let all = plan::plan(&h100, &request("device=0,capabilities=all", &[]), &policy).unwrap();
    assert_eq!(all, {
        let mut plain = ask(&h100, "device=0", &[]).unwrap();
        plain.env.push(("NVIDIA_DRIVER_CAPABILITIES".into(), "all".into()));
        plain
    });
}

#[test]
fn gated_features_come_by_name_alone() {
    let h100 = host("8xh100");
    let mut asked = request("device=0", &[]);
    asked.features = vec![GatedFeature::Gds, GatedFeature::GdrCopy];
    asked.imex_channels = vec![0];
    let given = plan::plan(&h100, &asked, &Policy::default()).unwrap();
    assert_eq!(
        nodes(&given)[4..],
        ["/dev/nvidia-fs0", "/dev/gdrdrv", "/dev/nvidia-caps-imex-channels/channel0"]
    );
    assert_eq!(given.groups, [4242], "gdrdrv is open to its group alone");

    asked.imex_channels = vec![5];
    assert_eq!(
        plan::plan(&h100, &asked, &Policy::default()).unwrap_err().to_string(),
        "error[GPU-0014]: the container asks for IMEX channel 5 and the host has no \
         /dev/nvidia-caps-imex-channels/channel5\n  \
         fix: have the driver make channels: its module's parameter NVreg_CreateImexChannel0=1 makes channel 0"
    );
    asked.features = vec![GatedFeature::Mofed];
    assert_eq!(
        plan::plan(&h100, &asked, &Policy::default()).unwrap_err().to_string(),
        "error[GPU-0014]: the container asks for InfiniBand verbs and the host has no device node of it\n  \
         fix: load their modules: `modprobe -a ib_uverbs rdma_ucm`"
    );
}

#[test]
fn mig_is_managed_by_the_privileged() {
    let a100 = host("a100-mig");
    let mut asked = request("device=0", &[]);
    asked.features = vec![GatedFeature::MigConfig, GatedFeature::MigMonitor];
    assert_eq!(
        plan::plan(&a100, &asked, &Policy::default()).unwrap_err().to_string(),
        "error[GPU-0024]: managing MIG devices needs a container with CAP_SYS_ADMIN\n  \
         cause: NVIDIA_MIG_CONFIG_DEVICES and NVIDIA_MIG_MONITOR_DEVICES concern every container on the host's GPUs\n  \
         fix: add --cap-add SYS_ADMIN, or leave the variable out"
    );
    let given = plan::plan(&a100, &asked, &Policy { privileged: true, ..Policy::default() }).unwrap();
    assert_eq!(
        nodes(&given)[3..],
        ["/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia-caps/nvidia-cap2"]
    );
}

#[test]
fn requirements_are_checked_on_every_selected_gpu() {
    let (h100, a100, t4) = (host("8xh100"), host("a100-mig"), host("t4-old"));
    let require = |value| [("NVIDIA_REQUIRE_CUDA", value)];
    assert!(ask(&h100, "all", &require("cuda>=12.4")).is_ok());
    // What NVIDIA's images say: forward compatibility is in the alternatives.
    let nvidias = "cuda>=12.6 brand=tesla,driver>=450,driver<451 brand=nvidia,driver>=535,driver<536";
    assert!(ask(&t4, "all", &require(nvidias)).unwrap().forward_compat.is_some());
    assert!(ask(&a100, "all", &require(nvidias)).is_ok());
    let way_out = "; NVIDIA_DISABLE_REQUIRE=1 tries it all the same";
    for (host, value, text) in [
        (
            &h100,
            nvidias,
            "the image requires cuda>=12.6 and driver 550.163.01 speaks CUDA 12.4\n  cause: the image's NVIDIA_REQUIRE_CUDA \
             says so, and none of its 2 other alternatives holds either\n  fix: install driver 560.28.03 or newer, or use an \
             image for CUDA 12.4 (a tag such as `12.4`)",
        ),
        (
            &h100,
            "cuda>=99 cuda>=98",
            "the image requires cuda>=99 and driver 550.163.01 speaks CUDA 12.4\n  cause: the image's NVIDIA_REQUIRE_CUDA \
             says so, and its other alternative does not hold either\n  fix: use an image for CUDA 12.4 (a tag such as \
             `12.4`): no driver known to this gpurun speaks CUDA 99",
        ),
        (
            &t4,
            "cuda>=11.0,driver>=470.57.02",
            "the image requires driver>=470.57.02 and the driver is 450.80.02\n  cause: the image's NVIDIA_REQUIRE_CUDA \
             says so\n  fix: install driver 470.57.02 or newer",
        ),
        (
            &t4,
            "cuda<11",
            "the image requires cuda<11 and driver 450.80.02 speaks CUDA 11.0\n  cause: the image's NVIDIA_REQUIRE_CUDA \
             says so\n  fix: install a driver for which cuda<11 holds",
        ),
        (
            &t4,
            "arch>=8.0",
            "the image requires arch>=8.0 and GPU 0 (Tesla T4, GPU-74000000-0000-0000-0000-000000000000) has compute \
             capability 7.5\n  cause: the image's NVIDIA_REQUIRE_CUDA says so\n  fix: ask for a GPU for which arch>=8.0 holds",
        ),
        (
            &t4,
            "brand!=TESLA",
            "the image requires brand!=TESLA and GPU 0 (Tesla T4, GPU-74000000-0000-0000-0000-000000000000) is of brand \
             tesla\n  cause: the image's NVIDIA_REQUIRE_CUDA says so\n  fix: ask for a GPU for which brand!=TESLA holds",
        ),
    ] {
        assert_eq!(refusal(host, "all", &require(value)), format!("error[GPU-0030]: {text}{way_out}"));
    }
    // One GPU of several is enough to refuse; the others are not asked when they are not selected.
    let mut mixed = host("8xh100");
    mixed.gpus[7].compute_capability = Version::of(8, 0);
    assert!(
        ask(&mixed, "7", &require("arch>=9.0")).is_ok() && ask(&mixed, "8", &require("arch>=9.0")).is_err()
    );
    // Without a GPU there is no brand to object to.
    assert!(ask(&t4, "device=none", &require("brand=quadro,arch>=99")).is_ok());
    let off = [("NVIDIA_REQUIRE_CUDA", "cuda>=99"), ("NVIDIA_DISABLE_REQUIRE", "true")];
    assert!(ask(&t4, "all", &off).is_ok());
    let lenient = Policy { disable_require: true, ..Policy::default() };
    assert!(plan::plan(&t4, &request("all", &require("cuda>=99")), &lenient).is_ok());
}

#[test]
fn an_image_that_only_says_its_cuda_gets_a_verdict() {
    let (a100, mut t4) = (host("a100-mig"), host("t4-old"));
    let made_for = |version| [("CUDA_VERSION", version)];
    assert_eq!(
        refusal(&t4, "all", &made_for("99.0")),
        "error[GPU-0031]: the image is made for CUDA 99.0 and driver 450.80.02 speaks CUDA 11.0 at most\n  \
         fix: use an image for CUDA 11.0 (a tag such as `11.0`): no driver known to this gpurun speaks CUDA 99.0"
    );
    let minor = ask(&a100, "device=1", &made_for("12.4.1")).unwrap();
    assert_eq!(minor.warnings.len(), 1);
    assert!(minor.forward_compat.is_some_and(|host| host.needed_for.is_none()));
    // Newer by one major: the image's own libraries decide, where the GPU takes them.
    let major = ask(&a100, "device=1", &made_for("13.0.1")).unwrap();
    assert_eq!(major.forward_compat.unwrap().needed_for, Some(Version::of(13, 0)));
    assert_eq!(major.warnings, [""; 0]);
    t4.gpus[0].brand = "GeForce".into();
    assert_eq!(ask(&t4, "all", &made_for("12.0.0")).unwrap_err().code(), Code::CudaTooNew);
    assert_eq!(ask(&t4, "all", &made_for("11.0.3")).unwrap().forward_compat, None);
    // nvidia-smi does not mind.
    assert!(ask(&t4, "all,capabilities=utility", &made_for("12.0.0")).is_ok());
    assert!(ask(&t4, "all", &[("CUDA_VERSION", "12.0.0"), ("NVIDIA_DISABLE_REQUIRE", "1")]).is_ok());
}

/// A condition, and the same as (property, comparison, value), for a model that shares no code with the plan.
fn condition() -> impl Strategy<Value = (Condition, (usize, usize, u32))> {
    (0usize..4, 0usize..6, 0u32..4).prop_map(|(property, how, value)| {
        let version = Version::of(value, 0);
        let comparison = Comparison::ALL[how].1;
        let condition = match property {
            0 => Condition::Cuda(comparison, version),
            1 => Condition::Driver(comparison, version),
            2 => Condition::Arch(comparison, version),
            _ => Condition::Brand { name: format!("B{value}"), wanted: how % 2 == 0 },
        };
        (condition, (property, how, value))
    })
}

/// `facts` are the host's values of the four properties.
fn model(facts: [u32; 4], (property, how, value): (usize, usize, u32)) -> bool {
    let actual = facts[property];
    if property == 3 {
        return (actual == value) == (how % 2 == 0);
    }
    match Comparison::ALL[how].0 {
        "=" => actual == value,
        "!=" => actual != value,
        "<" => actual < value,
        "<=" => actual <= value,
        ">" => actual > value,
        _ => actual >= value,
    }
}

proptest! {
    #[test]
    fn requirements_hold_when_a_naive_model_says_so(
        required in proptest::collection::vec(proptest::collection::vec(proptest::collection::vec(condition(), 1..4), 1..4), 0..3),
        facts in proptest::array::uniform4(0u32..4),
    ) {
        let expected = required.iter().all(|alternatives| {
            alternatives.iter().any(|all| all.iter().all(|(_, condition)| model(facts, *condition)))
        });
        // As text, through the parser, so that both are held against the model.
        let image: Vec<(String, String)> = required.iter().enumerate().map(|(i, alternatives)| {
            let words = alternatives.iter().map(|all| {
                all.iter().map(|(condition, ..)| condition.to_string()).collect::<Vec<_>>().join(",")
            });
            (format!("NVIDIA_REQUIRE_{i}"), words.collect::<Vec<_>>().join(" "))
        }).collect();
        let mut inventory = host("t4-old");
        let [cuda, driver, arch, brand] = facts;
        inventory.driver.cuda = Version::of(cuda, 0);
        inventory.driver.version = Version::of(driver, 0);
        inventory.gpus[0].compute_capability = Version::of(arch, 0);
        inventory.gpus[0].brand = format!("b{brand}");
        let asked = DeviceRequest::from_cli(Some("all"), &[], &image, &BTreeMap::new()).unwrap().unwrap();
        let planned = plan::plan(&inventory, &asked, &Policy::default());
        match planned {
            Ok(_) => prop_assert!(expected),
            Err(error) => {
                prop_assert!(!expected, "{}", error);
                prop_assert_eq!(error.code(), Code::Unsatisfied);
            }
        }
    }

    #[test]
    fn any_request_is_a_plan_or_a_message(
        gpus in "all|[0-9]{1,2}|\"device=[0-9:]{1,4}(,(GPU|MIG|gpu)-[0-9a]{1,9}){0,3}\"|device=[0-9a-f]{1,4}:[0-9]{1,2}:0.0",
        capabilities in 0u8..128,
        on in proptest::sample::select(vec!["8xh100", "a100-mig", "t4-old"]),
        cuda in 0u32..20,
    ) {
        let user: Vec<EnvVar> = vec![];
        if let Ok(Some(mut asked)) = DeviceRequest::from_cli(Some(&gpus), &user, &[], &BTreeMap::new()) {
            asked.capabilities = Some(DriverCapability::from_bits_truncate(capabilities));
            asked.image_cuda = Some(Version::of(cuda, 0));
            if let Ok(injection) = plan::plan(&host(on), &asked, &Policy::default()) {
                // Nothing is given twice, and what was asked for is there.
                for (i, node) in injection.devices.iter().enumerate() {
                    prop_assert!(!injection.devices[..i].contains(node), "{:?}", node);
                }
                let mut targets: Vec<_> = injection.mounts.iter().map(|mount| &mount.target).collect();
                targets.sort();
                let count = targets.len();
                targets.dedup();
                prop_assert_eq!(targets.len(), count);
                prop_assert!(asked.selection == DeviceSelection::DriverOnly || !self::gpus(&injection).is_empty());
            }
        }
    }
}

#[test]
fn a_requirement_without_alternatives_is_refused_and_does_not_panic() {
    let mut asked = DeviceRequest { filter: GpuFilter::default(), ..request("all", &[]) };
    asked.requirements = vec![Requirement { variable: "X".into(), alternatives: Vec::new() }];
    assert_eq!(
        plan::plan(&host("t4-old"), &asked, &Policy::default()).unwrap_err().what(),
        "the host does not satisfy X"
    );
}
