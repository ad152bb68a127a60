//! Tests against the answers of the real Docker, recorded by `integration/docker-answers/record`.

use super::*;
use crate::apply::rootfs::Layers;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{fs, os::unix::fs::symlink};

/// The content of a test case's file.
fn answers(subject: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/docker-answers").join(subject);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Decodes bytes that the table writes as Latin-1.
fn bytes(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
}

/// Puts what a file of the table is at a path.
fn lay_down(path: &Path, what: &Value, fill: Option<u64>) {
    if let Some(text) = what.as_str() {
        let fill = "x".repeat(usize::try_from(fill.unwrap_or(70_000)).unwrap());
        fs::write(path, bytes(&text.replace('%', &fill))).unwrap();
    } else if let Some(target) = what["link"].as_str() {
        symlink(target, path).unwrap();
    } else if what["fifo"].is_boolean() {
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, path, fifo, 0o644.into(), 0).unwrap();
    } else if what["directory"].is_boolean() {
        fs::create_dir(path).unwrap();
    }
}

/// An image with these accounts.
fn image(table: &Value, case: &Value) -> (tempfile::TempDir, Layers) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["etc", "other"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    for name in ["passwd", "group"] {
        let file = case[name].as_str().unwrap();
        lay_down(&dir.path().join("etc").join(name), &table[name][file], table["fill"][file].as_u64());
    }
    lay_down(&dir.path().join("other/passwd"), &table["linked passwd"], None);
    let layers = Layers::open(vec![dir.path().into()]).unwrap();
    (dir, layers)
}

fn request<'a>(layers: &'a Layers, user: Option<&'a str>, injection: &'a Injection) -> IdentityRequest<'a> {
    IdentityRequest {
        image_user: "",
        user,
        group_add: &[],
        home: None,
        image_env: &[],
        layers,
        volumes: &[],
        read_only: false,
        injection,
    }
}

#[test]
fn users_and_groups_are_resolved_as_docker_resolves_them() {
    let table = answers("users.json");
    let (root, nothing) = (Caller::new(0, 0, 0), Injection::default());
    let mut wrong = Vec::new();
    for entry in table["cases"].as_array().unwrap() {
        let case = &entry["case"];
        let (_dir, layers) = image(&table, case);
        let typed = case["user"].as_str().unwrap();
        let added = case["group-add"].as_array().into_iter().flatten();
        let added: Vec<String> = added.map(|group| group.as_str().unwrap().to_owned()).collect();
        let (user, image_user) = if case["from"] == "-u" { (Some(typed), "") } else { (None, typed) };
        let request = IdentityRequest { image_user, group_add: &added, ..request(&layers, user, &nothing) };
        let answer = match Identity::resolve(&request, &root, false) {
            Ok((identity, _)) => {
                let Groups::Set(groups) = identity.groups else { panic!("root sets groups") };
                json!({"uid": identity.uid, "gid": identity.gid, "groups": groups})
            }
            Err(error) => {
                assert!(!error.fix_line().is_empty(), "{error}");
                json!({"refused": error.to_string()})
            }
        };
        let expected = if entry["ours"].is_null() { &entry["docker"] } else { &entry["ours"] };
        assert_eq!(entry["ours"].is_null(), entry["why"].is_null(), "a difference has a reason: {entry}");
        let both_refuse = answer["refused"].is_string() && expected["refused"].is_string();
        if answer != *expected && !both_refuse {
            wrong.push(format!("{case}\n    expected {expected}\n    is {answer}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// A caller without root in these groups, and the map that the host gives its container.
fn ordinary(subordinate: bool) -> (Caller, IdMap) {
    let caller = Caller::with_groups(1000, 1000, 1000, &[44, 1000, 2000]);
    let ids = subordinate.then_some(Subordinate { first_uid: 100_000, first_gid: 200_000 });
    let map = id_map::id_map(33, 33, &caller, ids);
    (caller, map)
}

fn with_node(mode: u32, uid: u32, gid: u32) -> Injection {
    use crate::inventory::{ContainerPath, DeviceNode, HostPath};
    let node = DeviceNode {
        path: HostPath("/dev/nvidia0".into()),
        container_path: ContainerPath("/dev/nvidia0".into()),
        major: 195,
        minor: 0,
        mode,
        uid,
        gid,
    };
    Injection { devices: vec![node], ..Injection::default() }
}

#[test]
fn without_root_the_callers_groups_are_kept_or_replaced_as_a_whole() {
    use Groups::{Kept, Set};
    let user = Resolved { uid: 33, gid: 33, groups: vec![29, 70_000] };
    let open = with_node(0o666, 0, 0);
    // mode, uid and gid of the node; whether the identity is the caller's; --group-add; the groups, or the refused option.
    let cases = [
        (0o666, 0, 0, true, &[][..], Ok(Kept)),
        (0o666, 0, 0, false, &[], Ok(Set(vec![29, 33]))),
        (0o666, 0, 0, false, &[(7, "7")], Ok(Set(vec![7, 29, 33]))),
        (0o666, 0, 0, true, &[(7, "7")], Ok(Set(vec![7, 29, 33]))),
        // The caller's groups on the host, including the primary one.
        (0o666, 0, 0, false, &[(44, "video")], Ok(Kept)),
        (0o666, 0, 0, false, &[(1000, "1000")], Ok(Kept)),
        (0o666, 0, 0, false, &[(44, "video"), (7, "x")], Err("--group-add x")),
        (0o666, 0, 0, false, &[(65_536, "65536")], Err("below 65536")),
        // A node that the caller opens by a supplementary group.
        (0o660, 0, 44, false, &[], Ok(Kept)),
        (0o660, 0, 44, false, &[(7, "x")], Err("/dev/nvidia0")),
        // By its uid, by its primary group, or not at all.
        (0o660, 1000, 44, false, &[], Ok(Set(vec![29, 33]))),
        (0o660, 0, 1000, false, &[], Ok(Set(vec![29, 33]))),
        (0o660, 0, 45, false, &[], Ok(Set(vec![29, 33]))),
    ];
    let (caller, map) = ordinary(true);
    for (mode, uid, gid, is_callers, added, expected) in cases {
        let injection = with_node(mode, uid, gid);
        let added: Vec<_> = added.iter().map(|&(gid, typed)| AddedGroup { typed, gid }).collect();
        match (groups_without_root(&user, &added, is_callers, false, &map, &caller, &injection), expected) {
            (Ok(groups), Ok(expected)) => assert_eq!(groups, expected, "{mode:o} {uid}:{gid} {is_callers}"),
            (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{error}"),
            (result, expected) => {
                panic!("{mode:o} {uid}:{gid} {is_callers}: {result:?}, expected {expected:?}")
            }
        }
    }
    assert_eq!(groups_without_root(&user, &[], false, true, &map, &caller, &open).unwrap(), Kept);
    // Without subordinate ids setgroups(2) is denied.
    let (caller, map) = ordinary(false);
    let add = |gid, typed| [AddedGroup { typed, gid }];
    assert_eq!(groups_without_root(&user, &add(44, "44"), false, false, &map, &caller, &open).unwrap(), Kept);
    let error = groups_without_root(&user, &add(45, "45"), false, false, &map, &caller, &open).unwrap_err();
    assert!(error.to_string().contains("--group-add 45") && error.to_string().contains("usermod"), "{error}");
}

#[test]
fn an_identity_comes_whole_from_the_image_or_whole_from_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(
        dir.path().join("etc/passwd"),
        "root:x:0:0::/root:\nhostile:x:1000:0::/h:\napp:x:1001:1002::/:\n",
    )
    .unwrap();
    fs::write(dir.path().join("etc/group"), "root:x:0:hostile\nshadow:x:42:hostile,root,app\n").unwrap();
    let layers = Layers::open(vec![dir.path().into()]).unwrap();
    let nothing = Injection::default();
    // Under sudo: uid, gid and groups are those of sudo's caller; the image's files add none.
    let person = Caller::with_groups(0, 1000, 1000, &[44]);
    let of = |caller: &Caller, image_user: &str, user| {
        let request = IdentityRequest { image_user, ..request(&layers, user, &nothing) };
        let (identity, _) = Identity::resolve(&request, caller, false).unwrap();
        (identity.uid, identity.gid, identity.groups)
    };
    for image_user in ["", "0", "root", "root:shadow", "0:42", ":42", ":"] {
        assert_eq!(of(&person, image_user, None), (1000, 1000, Groups::Set(vec![44, 1000])), "{image_user}");
    }
    // `-u` and the image's own USER are resolved in the image, without the caller's groups.
    assert_eq!(of(&person, "app", None), (1001, 1002, Groups::Set(vec![42, 1002])));
    assert_eq!(of(&person, "", Some("hostile")), (1000, 0, Groups::Set(vec![0, 42])));
    assert_eq!(of(&person, "app", Some("0")), (0, 0, Groups::Set(vec![0, 42])));
    assert_eq!(of(&person, "app", Some("")), (1001, 1002, Groups::Set(vec![42, 1002])));
    // For root, the container's user is the image's root.
    let root = Caller::with_groups(0, 0, 0, &[0, 10]);
    assert_eq!(of(&root, "", None), (0, 0, Groups::Set(vec![0, 42])));
}

/// The image names its group 0 `video`, and gives the name of the host's group 0 another number.
#[test]
fn a_group_that_is_added_for_the_user_behind_sudo_has_the_hosts_number() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/root:\napp:x:1001:1002::/:\n").unwrap();
    fs::write(dir.path().join("etc/group"), "root:x:42:\ngroup-of-the-image:x:0:\n").unwrap();
    let layers = Layers::open(vec![dir.path().into()]).unwrap();
    let nothing = Injection::default();
    let behind_sudo = Caller::with_groups(0, 1000, 1000, &[]);
    let of = |caller: &Caller, user, added: &str| {
        let group_add = [added.to_owned()];
        let request = IdentityRequest { group_add: &group_add, ..request(&layers, user, &nothing) };
        Identity::resolve(&request, caller, false).map(|(identity, _)| identity.groups)
    };
    assert_eq!(of(&behind_sudo, None, "root").unwrap(), Groups::Set(vec![0, 1000]));
    assert_eq!(of(&behind_sudo, None, "44").unwrap(), Groups::Set(vec![44, 1000]));
    for unknown in ["group-of-the-image", "", "--help"] {
        let error = of(&behind_sudo, None, unknown).unwrap_err();
        assert_eq!(error.code(), Code::User);
        assert!(error.fix_line().contains("--group-add GID"), "{error}");
    }
    // Identities of the image have the image's groups.
    assert_eq!(of(&behind_sudo, Some("app"), "root").unwrap(), Groups::Set(vec![42, 1002]));
    assert_eq!(of(&Caller::new(0, 0, 0), None, "root").unwrap(), Groups::Set(vec![0, 42]));
}

#[test]
fn an_unknown_user_gets_lines_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("etc")).unwrap();
    let layers = Layers::open(vec![dir.path().into()]).unwrap();
    let nothing = Injection::default();
    let root = Caller::new(0, 0, 0);
    for (passwd, group, user, line, group_line) in [
        (
            "root:x:0:0::/root:",
            "root:x:0:",
            "4242:7",
            "user:x:4242:7::/home/user:/bin/sh\n",
            Some("user:x:7:\n"),
        ),
        (
            "user:x:1000:1000::/home/user:/bin/sh\n",
            "root:x:0:\n",
            "4242",
            "user-2:x:4242:0::/home/user-2:/bin/sh\n",
            None,
        ),
        ("a:x:1:1:::\n", "user:x:9:\n", "4242:9", "user-2:x:4242:9::/home/user-2:/bin/sh\n", None),
        (
            "user:x:1:1:::\nuser-2:x:2:2:::\n",
            "user-3:x:9:\n",
            "4242:9",
            "user-4:x:4242:9::/home/user-4:/bin/sh\n",
            None,
        ),
        ("a:x:1:1:::\n", "a:x:1:\n", "0", "root:x:0:0::/root:/bin/sh\n", Some("root:x:0:\n")),
    ] {
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        fs::write(dir.path().join("etc/group"), group).unwrap();
        let (identity, _) = Identity::resolve(&request(&layers, Some(user), &nothing), &root, false).unwrap();
        let text = |file: Option<Vec<u8>>| file.map(|file| String::from_utf8(file).unwrap());
        let written = text(identity.passwd).unwrap();
        assert!(written.starts_with(passwd) && written.ends_with(&format!("\n{line}")), "{user}: {written}");
        assert_eq!(
            text(identity.group).map(|file| file[group.len()..].trim_start().to_owned()).as_deref(),
            group_line,
            "{user}"
        );
    }
}

proptest! {
    #[test]
    fn no_account_file_makes_it_panic(
        wanted in ".{0,20}",
        passwd in proptest::collection::vec(any::<u8>(), 0..100),
        group in "[a-z0-9:,\n#]{0,60}",
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        fs::write(dir.path().join("etc/group"), group).unwrap();
        let layers = Layers::open(vec![dir.path().into()]).unwrap();
        let nothing = Injection::default();
        let added = [wanted.clone()];
        let request = IdentityRequest { group_add: &added, ..request(&layers, Some(&wanted), &nothing) };
        let _ = Identity::resolve(&request, &Caller::new(0, 0, 0), false);
    }
}
