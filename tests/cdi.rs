//! The CDI documents of recorded hosts.

use gpurun::{
    apply::cdi::{self, NameStrategy, Options},
    error::Code,
    formats::cdi::{Device, Document, is_kind, is_name, to_json, to_yaml},
    inventory::Inventory,
    plan::{self, Parts},
    vocabulary::DriverCapability,
};
use std::{collections::BTreeSet, fs, path::Path};

fn host(name: &str) -> Inventory {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts").join(name).with_extension("json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn parts(inventory: &Inventory) -> Parts<'_> {
    plan::parts(inventory, DriverCapability::all() - DriverCapability::COMPAT32)
        .unwrap_or_else(|e| panic!("{e}"))
}

fn options(engine: Option<&str>) -> Options {
    Options {
        vendor: "nvidia.com".into(),
        class: "gpu".into(),
        names: vec![NameStrategy::Index, NameStrategy::Uuid],
        only: None,
        all: true,
        hook: "/usr/bin/gpurun-hook".into(),
        newest: engine.map(|engine| cdi::newest_for(engine).unwrap()),
    }
}

fn document(inventory: &Inventory, options: &Options) -> (Document, Vec<String>) {
    let (document, warnings) = cdi::document(&parts(inventory), options).unwrap_or_else(|e| panic!("{e}"));
    is_valid(&document);
    (document, warnings)
}

/// What the specification's JSON schema asks for.
fn is_valid(document: &Document) {
    let (vendor, class) = document.kind.split_once('/').unwrap();
    assert!(is_kind(vendor) && is_kind(class));
    assert!(document.cdi_version.as_str() >= document.lowest_version() && !document.devices.is_empty());
    let names: BTreeSet<_> = document.devices.iter().map(|device| &device.name).collect();
    assert_eq!(names.len(), document.devices.len(), "each name once");
    assert!(names.iter().all(|name| is_name(name)));
    for edits in document.edits() {
        let once = |paths: Vec<&String>| paths.iter().collect::<BTreeSet<_>>().len() == paths.len();
        assert!(once(edits.mounts.iter().map(|mount| &mount.container_path).collect()));
        assert!(once(edits.device_nodes.iter().map(|node| &node.path).collect()));
        assert!(edits.device_nodes.iter().all(|node| node.host_path.as_ref() != Some(&node.path)));
        assert!(edits.env.iter().all(|variable| variable.find('=').is_some_and(|at| at > 0)));
        for node in &edits.device_nodes {
            assert!(
                node.path.starts_with("/dev/")
                    && node.host_path.as_ref().is_none_or(|path| path.starts_with('/'))
            );
            assert_eq!((node.kind.as_deref(), node.permissions.as_deref()), (Some("c"), Some("rwm")));
            assert!(node.file_mode.is_some_and(|mode| mode <= 0o777));
        }
        for mount in &edits.mounts {
            assert!(mount.container_path.starts_with('/') && !mount.host_path.is_empty());
        }
        assert!(
            edits.hooks.iter().all(|hook| hook.hook_name == "createContainer" && hook.path.starts_with('/'))
        );
    }
    for text in [to_yaml(document), to_json(document)] {
        assert_eq!(&Document::parse(&text).unwrap(), document);
    }
}

#[test]
fn the_documents_of_three_hosts() {
    for name in ["8xh100", "a100-mig", "t4-old"] {
        let inventory = host(name);
        let (first, _) = document(&inventory, &options(None));
        insta::assert_snapshot!(name, to_yaml(&first));
        assert_eq!(
            to_yaml(&document(&host(name), &options(None)).0),
            to_yaml(&first),
            "the same bytes each time"
        );
    }
}

#[test]
fn a_device_has_every_name_and_all_has_what_can_be_computed_on() {
    let inventory = host("a100-mig");
    let mut chosen = options(None);
    chosen.names = vec![NameStrategy::TypeIndex, NameStrategy::Uuid];
    chosen.vendor = "example.org".into();
    let (document, _) = document(&inventory, &chosen);
    assert_eq!(document.kind, "example.org/gpu");
    let names: Vec<_> = document.devices.iter().map(|device| device.name.as_str()).collect();
    let mig: Vec<_> = names.iter().filter(|name| name.starts_with("mig")).collect();
    assert!(
        !mig.is_empty() && mig.len() == names.iter().filter(|name| name.starts_with("MIG-")).count(),
        "{names:?}"
    );
    for gpu in inventory.gpus.iter().filter(|gpu| gpu.mig_enabled) {
        assert!(
            !names.contains(&format!("gpu{}", gpu.index).as_str()),
            "a GPU in MIG mode is no device: {names:?}"
        );
    }
    let all = document.devices.last().unwrap();
    let paths: Vec<_> = all.container_edits.device_nodes.iter().map(|node| &node.path).collect();
    assert_eq!(paths.iter().collect::<BTreeSet<_>>().len(), paths.len(), "each node once: {paths:?}");
    for bad in ["", "0gpu", "g/pu", "gpu-"] {
        let refused = cdi::document(&parts(&inventory), &Options { class: bad.into(), ..options(None) });
        assert_eq!(refused.unwrap_err().code(), Code::Cdi, "{bad}");
    }
}

#[test]
fn a_document_of_some_devices_has_those_and_is_about_the_same_host() {
    let inventory = host("a100-mig");
    let ids = ["0:1", "1"].map(|id| id.parse().unwrap());
    let some = Options { only: Some(ids.into()), all: false, ..options(None) };
    let (some, _) = document(&inventory, &some);
    let names: Vec<_> = some.devices.iter().map(|device| device.name.as_str()).collect();
    let uuids = ["MIG-00000001-aaaa-bbbb-cccc-000000000001", "GPU-a1000001-0000-0000-0000-000000000001"];
    assert_eq!(names, ["0:1", "1", uuids[0], uuids[1]]);
    let (whole, _) = document(&inventory, &options(None));
    assert_eq!(some.container_edits, whole.container_edits);
    assert!(some.devices.iter().all(|device| whole.devices.contains(device)));
    // `all` is every other of the same document.
    let one = Options { only: Some(vec!["0:1".parse().unwrap()]), ..options(None) };
    let devices = document(&inventory, &one).0.devices;
    assert_eq!(devices[2].name, "all");
    assert_eq!(devices[2].container_edits, devices[0].container_edits);
}

#[test]
fn an_older_engine_gets_what_it_can_read_and_is_told_what_is_left_out() {
    let mut inventory = host("8xh100");
    for gpu in &mut inventory.gpus {
        gpu.node.mode = 0o660;
        gpu.node.gid = 44;
    }
    let (newest, warnings) = document(&inventory, &options(Some("podman@5.8")));
    assert_eq!((newest.cdi_version.as_str(), warnings.len()), ("0.7.0", inventory.problems.len()));
    assert_eq!(newest.devices[0].container_edits.additional_gids, [44, 109]);
    assert_eq!(
        document(&inventory, &options(None)).0.cdi_version,
        "0.5.0",
        "what every engine of today reads"
    );
    let (older, warnings) = document(&inventory, &options(Some("podman@4.9.3")));
    assert!(older.cdi_version.as_str() < "0.7.0" && !to_yaml(&older).contains("additionalGids"));
    assert!(warnings.iter().any(|warning| warning.contains("[44, 109]")), "{warnings:?}");
    assert_eq!(older.devices[0].container_edits.device_nodes[0].gid, Some(44));

    // 0.4.0 knows neither a host path nor names that begin with a digit.
    for gpu in &mut inventory.gpus {
        gpu.node.path.0.clone_from(&gpu.node.container_path.0);
        gpu.dri_nodes.clear();
    }
    for node in &mut inventory.driver.control_nodes {
        node.path.0.clone_from(&node.container_path.0);
    }
    let (oldest, warnings) = document(&inventory, &options(Some("podman@4.2")));
    assert_eq!(oldest.cdi_version, "0.4.0");
    assert!(oldest.devices.iter().all(Device::has_old_name) && oldest.devices.len() > 1);
    assert!(warnings.iter().any(|warning| warning.contains("type-index")), "{warnings:?}");
    inventory.gpus[0].node.path.0 = "/run/nvidia/driver/dev/nvidia0".into();
    let refused = cdi::document(&parts(&inventory), &options(Some("podman@4.2"))).unwrap_err();
    assert_eq!(refused.code(), Code::Cdi);
    let (_, warnings) = document(&inventory, &options(Some("podman@4.3")));
    assert!(warnings.iter().all(|warning| !warning.contains("type-index")), "{warnings:?}");
}

#[test]
fn the_fingerprint_is_of_what_the_document_says_and_of_nothing_else() {
    let inventory = host("8xh100");
    let now = cdi::fingerprint(&parts(&inventory));
    let mut other = host("8xh100");
    other.fingerprint.boot_id = "another boot".into();
    other.gpus[0].persistence = Some(false);
    other.problems.clear();
    assert_eq!(cdi::fingerprint(&parts(&other)), now);
    assert_eq!(cdi::change(&now, &now), None);
    for (what, change) in [
        (0, (&|host: &mut Inventory| drop(host.driver.files.pop())) as &dyn Fn(&mut Inventory)),
        (0, &|host| host.driver.version = "999.1".parse().unwrap()),
        (1, &|host| drop(host.gpus.pop())),
        (1, &|host| host.gpus[0].uuid.push('0')),
        (2, &|host| host.gpus[0].node.minor = 77),
        (2, &|host| host.driver.control_nodes[1].major = 77),
        (2, &|host| host.gpus[0].node.mode = 0o600),
    ] {
        let mut other = host("8xh100");
        change(&mut other);
        assert_eq!(cdi::change(&now, &cdi::fingerprint(&parts(&other))), Some(cdi::CHANGES[what]));
    }
    assert!(cdi::change("008dde7bc68a09c9", &now).is_some(), "of an older release");
}

#[test]
fn a_host_without_a_gpu_has_no_document() {
    let mut inventory = host("8xh100");
    inventory.gpus.clear();
    let refused = plan::parts(&inventory, DriverCapability::COMPUTE).unwrap_err();
    assert!(refused.what().contains("GPU"), "{refused}");
}
