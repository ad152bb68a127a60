//! Whole images, made by the real tar, gzip and zstd, and layers that want to harm.

mod stacks;

use super::{
    unpack::{Ownership, unpack},
    *,
};
use proptest::prelude::*;
use rustix::fs::{CWD, Mode, openat};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    process::Command,
};
use tempfile::TempDir;

fn root() -> bool {
    let root = Store::ownership() == Ownership::Image;
    if !root {
        eprintln!("skipped: device nodes, owners and trusted attributes need root");
    }
    root
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

// ---- layers by hand ----

/// An entry whose name and link are put into the header as they are.
#[derive(Clone, Debug)]
struct Raw {
    name: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    mode: u32,
    data: Vec<u8>,
    pax: Vec<(&'static str, Vec<u8>)>,
}

fn raw(kind: u8, name: &str, link: &str) -> Raw {
    Raw { name: name.into(), link: link.into(), kind, mode: 0o755, data: Vec::new(), pax: Vec::new() }
}
fn file(name: &str, data: &str) -> Raw {
    Raw { data: data.into(), ..raw(b'0', name, "") }
}
fn directory(name: &str) -> Raw {
    raw(b'5', name, "")
}

fn archive(entries: &[Raw]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for entry in entries {
        builder.append_pax_extensions(entry.pax.iter().map(|(key, value)| (*key, value.as_slice()))).unwrap();
        let mut header = ::tar::Header::new_ustar();
        header.set_mode(entry.mode);
        header.set_size(entry.data.len() as u64);
        header.set_uid(1234);
        header.set_gid(2345);
        header.set_mtime(1_600_000_000);
        if matches!(entry.kind, b'3' | b'4') {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        let old = header.as_old_mut();
        old.linkflag[0] = entry.kind;
        old.name[..entry.name.len()].copy_from_slice(&entry.name);
        old.linkname[..entry.link.len()].copy_from_slice(&entry.link);
        header.set_cksum();
        builder.append(&header, entry.data.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A directory to unpack into, beside one that must not change.
struct Scene {
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/canary"), "alive").unwrap();
        Self { directory }
    }
    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("root").join(path)
    }
    fn outside(&self) -> PathBuf {
        self.directory.path().join("outside")
    }
    fn unpack(&self, entries: &[Raw]) -> Result<()> {
        self.unpack_bytes(&archive(entries), Store::ownership())
    }
    fn unpack_bytes(&self, bytes: &[u8], ownership: Ownership) -> Result<()> {
        let root = openat(CWD, self.path(""), tree::DIRECTORY, Mode::empty()).unwrap();
        unpack(bytes, rustix::fd::AsFd::as_fd(&root), ownership).map(drop)
    }
    fn assert_nothing_outside(&self) {
        let outside: Vec<_> =
            fs::read_dir(self.outside()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(outside, ["canary"]);
        let canary = fs::symlink_metadata(self.outside().join("canary")).unwrap();
        assert_eq!(fs::read_to_string(self.outside().join("canary")).unwrap(), "alive");
        assert_eq!(canary.nlink(), 1);
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
    }
    fn refuses(&self, entries: &[Raw], name: &str) {
        let error = self.unpack(entries).unwrap_err();
        assert_eq!(error.code(), Code::LayerRefused, "{error}");
        assert!(error.what().contains(name), "{error}");
        self.assert_nothing_outside();
    }
}

#[test]
fn names_stay_inside_the_root() {
    let scene = Scene::new();
    for (name, path) in [
        ("../outside/x", "outside/x"),
        ("a/../../outside/x", "outside/x"),
        ("/../x", "x"),
        ("a/../b", "b"),
        ("a/b/../../c", "c"),
        ("./a/.././d/", "d"),
        (".../..e", ".../..e"),
    ] {
        for entry in [file(name, "x"), directory(name), raw(b'2', name, "x"), raw(b'6', name, "")] {
            scene.unpack(&[entry]).unwrap();
            assert!(scene.path(path).symlink_metadata().is_ok(), "{name}");
            assert!(!scene.path("a").exists(), "{name}: only the cleaned name counts");
            scene.assert_nothing_outside();
        }
        // The target of a hard link is such a name as well.
        scene.unpack(&[file(path, "x"), raw(b'1', "link", name)]).unwrap();
        assert_eq!(scene.path("link").metadata().unwrap().nlink(), 2, "{name}");
    }
    for root in ["..", "a/..", "/", "a/../.."] {
        scene.refuses(&[file(root, "x")], root);
        scene.refuses(&[raw(b'1', "a", root)], "\"a\"");
        scene.unpack(&[directory(root)]).unwrap();
    }
    scene.refuses(&[raw(b'1', "a", "../outside/canary")], "\"a\"");
    let scene = Scene::new();
    scene.unpack(&[file("/etc/absolute", "x"), file(".//./b//c", "y")]).unwrap();
    assert_eq!(fs::read_to_string(scene.path("etc/absolute")).unwrap(), "x");
    assert_eq!(fs::read_to_string(scene.path("b/c")).unwrap(), "y");
    scene.assert_nothing_outside();
}

#[test]
fn links_resolve_inside_the_root_only() {
    let scene = Scene::new();
    let outside = scene.outside();
    let outside = outside.to_str().unwrap();
    // The link leads out by its text; inside the root it leads nowhere, and nothing is made at its end.
    for target in [outside, "../outside", "../../../../../../../../tmp"] {
        let written = scene.unpack(&[raw(b'2', "out", target), file("out/x", "x")]);
        assert_eq!(written.unwrap_err().code(), Code::LayerRefused, "{target}");
        scene.assert_nothing_outside();
    }
    // Through a link that stays inside it is as with every engine: /lib -> usr/lib.
    scene
        .unpack(&[
            directory("usr/lib"),
            raw(b'2', "lib", "/usr/lib"),
            file("lib/x", "x"),
            file("up/x", ""),
            raw(b'2', "up/back", "../../../usr"),
            file("up/back/y", "y"),
        ])
        .unwrap();
    assert_eq!(fs::read_to_string(scene.path("usr/lib/x")).unwrap(), "x");
    assert_eq!(fs::read_to_string(scene.path("usr/y")).unwrap(), "y");
    // A file in the place of a link replaces the link and leaves its target alone.
    scene.unpack(&[raw(b'2', "l", &format!("{outside}/canary")), file("l", "mine")]).unwrap();
    assert_eq!(fs::read_to_string(scene.path("l")).unwrap(), "mine");
    // So does a directory; its owner, mode and time are its own.
    scene
        .unpack(&[raw(b'2', "d", outside), Raw { mode: 0o700, ..directory("d") }, file("d/x", "x")])
        .unwrap();
    assert!(scene.path("d/x").exists());
    scene.assert_nothing_outside();
}

#[test]
fn hard_links_stay_in_the_layer() {
    let scene = Scene::new();
    let canary = scene.outside().join("canary");
    symlink(&canary, scene.path("to-canary")).unwrap();
    symlink(scene.outside(), scene.path("to-outside")).unwrap();
    scene.refuses(&[raw(b'1', "x", canary.to_str().unwrap())], "\"x\"");
    scene.refuses(&[raw(b'1', "x", "to-outside/canary")], "\"x\"");
    scene.refuses(&[raw(b'1', "x", "missing")], "\"x\"");
    scene.refuses(&[directory("d"), raw(b'1', "x", "d")], "\"x\"");
    scene.refuses(&[raw(b'1', "x", "/")], "\"x\"");
    scene.refuses(&[file(".wh.gone", ""), raw(b'1', "x", "gone")], "\"x\"");
    // A link to a link is to the link, not to where it leads.
    scene
        .unpack(&[
            raw(b'1', "x", "to-canary"),
            file("x", "mine"),
            raw(b'1', "y", "x"),
            raw(b'1', "y", "x"),
            raw(b'1', "y", "y"),
        ])
        .unwrap();
    assert_eq!(fs::metadata(scene.path("x")).unwrap().ino(), fs::metadata(scene.path("y")).unwrap().ino());
    scene.assert_nothing_outside();
}

#[test]
fn a_name_that_comes_again_replaces_what_was_there() {
    let scene = Scene::new();
    scene
        .unpack(&[
            file("a", "first"),
            file("a", "second"),
            directory("d/e"),
            file("d/e/f", "x"),
            file("d", "now a file"),
            file("g", "x"),
            directory("g"),
            file("g/h", "y"),
            directory("k"),
            file("k/kept", "x"),
            Raw { mode: 0o711, ..directory("k") },
            // The open directory goes away beneath the unpacker.
            file("m/n/o", "x"),
            file("m", ""),
            file("m", "gone"),
            directory("m"),
            file("m/n/p", "x"),
        ])
        .unwrap();
    assert_eq!(fs::read_to_string(scene.path("a")).unwrap(), "second");
    assert_eq!(fs::read_to_string(scene.path("d")).unwrap(), "now a file");
    assert_eq!(fs::read_to_string(scene.path("g/h")).unwrap(), "y");
    assert!(scene.path("k/kept").exists());
    assert_eq!(scene.path("k").metadata().unwrap().mode() & 0o7777, 0o711);
    assert!(scene.path("m/n/p").exists() && !scene.path("m/n/o").exists());
}

#[test]
fn what_the_image_says_of_a_file_is_kept_and_what_it_may_not_say_is_not() {
    let scene = Scene::new();
    let pax = |pairs: &[(&'static str, &[u8])]| {
        pairs.iter().map(|(key, value)| (*key, value.to_vec())).collect::<Vec<_>>()
    };
    let capability = b"\x01\0\0\x02\0\x20\0\n\0\0\0\0\0\0\0\0\0\0\0\0".as_slice();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    scene
        .unpack(&[
            Raw {
                mode: 0o4711,
                pax: pax(&[
                    ("mtime", b"1500000000.123456789"),
                    ("SCHILY.xattr.security.capability", capability),
                    ("SCHILY.xattr.user.note", b"a\nb"),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                    ("SCHILY.xattr.trusted.x", b"y"),
                    ("SCHILY.xattr.user.overlay.opaque", b"y"),
                    ("SCHILY.xattr.user.overlay.whiteout", b"y"),
                    ("SCHILY.xattr.security.selinux", b"label"),
                    ("SCHILY.xattr.system.posix_acl_access", b"x"),
                ]),
                ..file("bin/tool", "#!")
            },
            Raw {
                mode: 0o1777,
                pax: pax(&[
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                    ("SCHILY.xattr.user.overlay.opaque", b"y"),
                ]),
                ..directory("tmp")
            },
            Raw { pax: pax(&[("path", long.as_bytes())]), ..file("short", "x") },
            Raw { mode: 0o600, ..raw(b'6', "pipe", "") },
            raw(b'2', "link", "../anything at all"),
            file("tmp/later", "x"),
        ])
        .unwrap();
    let tool = scene.path("bin/tool").metadata().unwrap();
    assert_eq!((tool.mode() & 0o7777, tool.mtime(), tool.mtime_nsec()), (0o4711, 1_500_000_000, 123_456_789));
    let mut names = vec![0_u8; 4096];
    let length = rustix::fs::listxattr(scene.path("bin/tool"), &mut names[..]).unwrap();
    let names = String::from_utf8(names[..length].to_vec()).unwrap();
    assert!(names.contains("user.note"));
    let mut names: Vec<_> = names.split_terminator('\0').collect();
    names.retain(|name| !name.starts_with("user.note") && !name.starts_with("security."));
    assert_eq!(names, [""; 0]);
    assert_eq!(rustix::fs::listxattr(scene.path("tmp"), &mut [0_u8; 100][..]).unwrap(), 0);
    assert_eq!(scene.path("tmp").metadata().unwrap().mode() & 0o7777, 0o1777);
    assert_eq!(
        scene.path("tmp").metadata().unwrap().mtime(),
        1_600_000_000,
        "although a file came into it later"
    );
    assert!(scene.path(&long).exists());
    assert!(scene.path("pipe").metadata().unwrap().file_type().is_fifo());
    assert_eq!(fs::read_link(scene.path("link")).unwrap(), Path::new("../anything at all"));
    assert_eq!(fs::symlink_metadata(scene.path("link")).unwrap().mtime(), 1_600_000_000);
    if root() {
        assert_eq!((tool.uid(), tool.gid()), (1234, 2345));
        assert_eq!(fs::symlink_metadata(scene.path("link")).unwrap().uid(), 1234);
        let mut value = [0_u8; 64];
        let length =
            rustix::fs::getxattr(scene.path("bin/tool"), "security.capability", &mut value[..]).unwrap();
        assert_eq!(&value[..length], capability);
        scene.unpack(&[Raw { mode: 0o666, ..raw(b'3', "null", "") }, raw(b'4', "disk", "")]).unwrap();
        let null = scene.path("null").metadata().unwrap();
        assert_eq!((null.rdev(), null.mode() & 0o7777, null.uid()), (rustix::fs::makedev(1, 3), 0o666, 1234));
        assert!(scene.path("disk").metadata().unwrap().file_type().is_block_device());
    }
}

#[test]
fn an_ordinary_users_layer_is_his_and_can_be_removed() {
    let scene = Scene::new();
    let bytes = archive(&[
        Raw { mode: 0, ..directory("d") },
        file("d/f", "x"),
        raw(b'3', "null", ""),
        directory("o"),
        file("o/.wh..wh..opq", ""),
        file(".wh.w", ""),
    ]);
    scene.unpack_bytes(&bytes, Ownership::Caller).unwrap();
    let directory = scene.path("d").metadata().unwrap();
    assert_eq!((directory.mode() & 0o777, directory.uid()), (0o700, rustix::process::geteuid().as_raw()));
    assert!(!scene.path("null").exists());
    let mut value = [0_u8; 8];
    assert_eq!(rustix::fs::getxattr(scene.path("o"), "user.overlay.opaque", &mut value[..]), Ok(1));
    assert!(fs::symlink_metadata(scene.path("w")).unwrap().file_type().is_char_device());
}

#[test]
fn what_makes_no_sense_is_refused_by_its_name() {
    let scene = Scene::new();
    let long = "x/".repeat(2100);
    for (entry, name) in [
        (file(".wh.", ""), ".wh."),
        (file("a/.wh..", ""), ".wh.."),
        (file(".wh...", ""), ".wh..."),
        (file(".wh.a/b", ""), ".wh.a/b"),
        (raw(b'Z', "odd", ""), "odd"),
        (raw(b'2', "empty", ""), "empty"),
        (file("./", ""), "./"),
        (Raw { pax: vec![("path", long.into_bytes())], ..file("long", "") }, "x/x/x"),
        (file(&"n".repeat(99), "").with_path(&"n".repeat(300)), "nnn"),
    ] {
        scene.refuses(&[entry], name);
    }
    let nul = Raw { pax: vec![("path", b"a\0b".to_vec())], ..file("nul", "") };
    assert_eq!(scene.unpack(&[nul]).unwrap_err().code(), Code::ImageBroken, "as Go has it");
    scene.refuses(&[file("f", ""), file("f/g", "")], "f/g");
    scene.refuses(&[raw(b'2', "loop", "loop"), file("loop/g", "")], "loop/g");
}

impl Raw {
    fn with_path(mut self, path: &str) -> Self {
        self.pax.push(("path", path.into()));
        self
    }
}

/// The kernel's overlayfs says what the whiteouts mean.
#[test]
fn whiteouts_hide_the_lower_layers_only() {
    if !root() {
        return;
    }
    for ownership in [Ownership::Image, Ownership::Caller] {
        let scene = Scene::new();
        let lower = [
            file("gone", ""),
            file("both", "lower"),
            file("d/x", ""),
            file("opaque/lower", ""),
            file("replaced/lower", ""),
            file("before/lower", ""),
            file("implied/lower", ""),
            file("kept/lower", ""),
        ];
        let upper = [
            file(".wh.gone", ""),
            file("both", "upper"),
            file(".wh.both", ""),
            file("d/.wh.x", ""),
            file(".wh.never-there", ""),
            directory("opaque"),
            file("opaque/upper", ""),
            file("opaque/.wh..wh..opq", ""),
            file(".wh.replaced", ""),
            directory("replaced"),
            file("replaced/upper", ""),
            directory("before"),
            file("before/upper", ""),
            file(".wh.before", ""),
            file(".wh.implied", ""),
            file("implied/upper", ""),
            file("kept/upper", ""),
            file(".wh..wh.plnk/12.34", ""),
            file(".wh..wh.aufs", ""),
        ];
        for (name, entries) in [("lower", &lower[..]), ("upper", &upper[..])] {
            fs::create_dir(scene.path(name)).unwrap();
            let root = openat(CWD, scene.path(name), tree::DIRECTORY, Mode::empty()).unwrap();
            unpack(archive(entries).as_slice(), rustix::fd::AsFd::as_fd(&root), ownership).unwrap();
        }
        fs::create_dir(scene.path("merged")).unwrap();
        let options = if ownership == Ownership::Caller { "userxattr," } else { "" };
        let script = format!(
            "cd {} && mount -t overlay overlay -o {options}lowerdir=upper:lower merged && cd merged && find . -type f | sort && cat both",
            scene.path("").display()
        );
        let seen = run("unshare", &["-m", "sh", "-c", &script]);
        let expected = "./before/upper\n./both\n./implied/upper\n./kept/lower\n./kept/upper\n./opaque/upper\n./replaced/upper\nupper";
        assert_eq!(seen, expected, "{ownership:?}");
    }
}

fn any_raw() -> impl Strategy<Value = Raw> {
    let name = prop_oneof![
        "(/|\\.\\./|a/|b/|l/|\\./|\\.wh\\.|\\.wh\\.\\.wh\\.\\.opq|a|b|l|c){0,5}",
        Just("l/../../outside/canary".to_owned()),
    ];
    let link = prop_oneof![
        "(/|\\.\\./|a|b|l){0,5}",
        Just("../outside".to_owned()),
        Just("../outside/canary".to_owned()),
        Just("/".to_owned())
    ];
    let kind = prop_oneof![Just(b'0'), Just(b'1'), Just(b'2'), Just(b'5'), Just(b'6'), any::<u8>()];
    (kind, name, link, 0u32..0o10000, ".{0,20}").prop_map(|(kind, name, link, mode, data)| Raw {
        mode,
        data: data.into(),
        ..raw(kind, &name, &link)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_archive_writes_outside(entries in proptest::collection::vec(any_raw(), 0..12), hurt in proptest::option::of((any::<prop::sample::Index>(), any::<u8>()))) {
        let scene = Scene::new();
        let mut bytes = archive(&entries);
        if let Some((at, byte)) = hurt {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for ownership in [Store::ownership(), Ownership::Caller] {
            if let Err(error) = scene.unpack_bytes(&bytes, ownership) {
                prop_assert!(matches!(error.code(), Code::LayerRefused | Code::ImageBroken), "{}", error);
            }
            scene.assert_nothing_outside();
        }
    }
}

// ---- whole images ----

/// Writes OCI layouts and docker archives of trees, with the real tar.
struct Maker {
    directory: TempDir,
}

#[derive(Clone, Copy)]
enum Pack {
    Plain,
    Gzip,
    Zstd,
}

impl Maker {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["layout/blobs/sha256", "save"] {
            fs::create_dir_all(directory.path().join(name)).unwrap();
        }
        fs::write(directory.path().join("layout/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { directory }
    }
    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }
    fn text(&self, path: &str) -> String {
        self.path(path).to_str().unwrap().to_owned()
    }
    fn store(&self) -> Store {
        Store::open(&self.path("store")).unwrap()
    }
    /// A tree with all that tar can hold.
    fn tree(&self, name: &str) -> PathBuf {
        let tree = self.path(name);
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::create_dir_all(tree.join("long").join("n".repeat(120)).join("m".repeat(120))).unwrap();
        fs::write(tree.join("long").join("n".repeat(120)).join("m".repeat(120)).join("file"), name).unwrap();
        let noise: Vec<u8> =
            (0..3_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(tree.join("usr/bin/big"), noise).unwrap();
        fs::set_permissions(tree.join("usr/bin/big"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(tree.join("usr/bin/big"), tree.join("usr/bin/same")).unwrap();
        symlink("usr/bin", tree.join("bin")).unwrap();
        fs::hard_link(tree.join("bin"), tree.join("bin2")).unwrap();
        fs::write(tree.join("empty"), "").unwrap();
        let mut sparse = fs::File::create(tree.join("sparse")).unwrap();
        sparse.write_all(b"start").unwrap();
        for at in 1..40_u64 {
            std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", at << 20).unwrap();
        }
        sparse.set_len(64 << 20).unwrap();
        rustix::fs::setxattr(tree.join("empty"), "user.note", b"a\nb", rustix::fs::XattrFlags::CREATE)
            .unwrap();
        run("mkfifo", &[tree.join("pipe").to_str().unwrap()]);
        run(
            "touch",
            &[
                "-h",
                "-d",
                "2001-02-03 04:05:06.789012345",
                tree.join("bin").to_str().unwrap(),
                tree.join("usr/bin").to_str().unwrap(),
            ],
        );
        tree
    }
    fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(self.path("layout/blobs/sha256").join(digest.hex()), bytes).unwrap();
        digest
    }
    fn tar(&self, tree: &Path, flags: &[&str]) -> Vec<u8> {
        let file = self.text("layer.tar");
        run("tar", &[&["-C", tree.to_str().unwrap(), "-cf", &file], flags, &["."]].concat());
        fs::read(file).unwrap()
    }
    /// Adds a layer: its descriptor and diff_id.
    fn layer(&self, tar: &[u8], pack: Pack) -> (serde_json::Value, Digest) {
        let file = self.text("layer.pack");
        fs::write(&file, tar).unwrap();
        let kind = match pack {
            Pack::Plain => "application/vnd.oci.image.layer.v1.tar",
            Pack::Gzip => {
                run("sh", &["-c", &format!("gzip -1n < {file} > {file}.gz && mv {file}.gz {file}")]);
                "application/vnd.docker.image.rootfs.diff.tar.gzip"
            }
            Pack::Zstd => {
                run("sh", &["-c", &format!("zstd -q -1 < {file} > {file}.zst && mv {file}.zst {file}")]);
                "application/vnd.oci.image.layer.v1.tar+zstd"
            }
        };
        let bytes = fs::read(file).unwrap();
        (json!({"mediaType": kind, "digest": self.blob(&bytes), "size": bytes.len()}), Digest::of(tar))
    }
    fn config(diff_ids: &[Digest]) -> serde_json::Value {
        json!({
            "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }, "os": "linux", "history": null,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {
                "Env": ["PATH=/bin", "A=b=c", "EMPTY", "=x"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": null, "User": "1000:users",
                "WorkingDir": "/srv", "Labels": {"a": "b"}, "Volumes": {"/data": {}}, "StopSignal": "SIGINT", "Unknown": [1]
            }
        })
    }
    /// Adds a manifest: its descriptor.
    fn manifest(&self, config: &serde_json::Value, layers: &[serde_json::Value]) -> serde_json::Value {
        let config = config.to_string();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": self.blob(config.as_bytes()), "size": config.len()},
            "layers": layers
        }).to_string();
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": self.blob(manifest.as_bytes()), "size": manifest.len()})
    }
    fn index(&self, manifests: &[serde_json::Value]) {
        fs::write(
            self.path("layout/index.json"),
            json!({"schemaVersion": 2, "manifests": manifests}).to_string(),
        )
        .unwrap();
    }
    /// An image of one small layer.
    fn small(&self, content: &str) -> serde_json::Value {
        let (layer, diff_id) = self.layer(&archive(&[file("etc/name", content)]), Pack::Gzip);
        self.manifest(&Self::config(&[diff_id]), &[layer])
    }
    fn pack(&self, directory: &str, file: &str) -> String {
        run("tar", &["-C", &self.text(directory), "-cf", &self.text(file), "."]);
        self.text(file)
    }
    fn open(&self, reference: &str) -> Result<Image> {
        Image::open(&ImageReference::parse(reference).unwrap(), &self.store(), &Pull::default())
    }
}

fn with(mut value: serde_json::Value, key: &str, member: serde_json::Value) -> serde_json::Value {
    value[key] = member;
    value
}

/// All that a tree is, as text: with fractions of seconds and attributes, or as far as GNU headers go.
fn description(tree: &Path, exact: bool) -> String {
    let time = if exact { "%T@" } else { "%Ts" };
    let script = format!(
        "cd {} && find . ! -type d -printf '%p %y %m %U %G %n {time} %s %l\\n' | sort && \
         find . -type d -printf '%p %m %U %G {time}\\n' | sort && find . -type f | sort | xargs sha256sum",
        tree.display()
    );
    let mut note = [0_u8; 8];
    let note = exact.then(|| {
        rustix::fs::getxattr(tree.join("empty"), "user.note", &mut note[..])
            .map(|length| note[..length].to_vec())
    });
    run("sh", &["-c", &script]) + &format!("{note:?}")
}

#[test]
fn real_tars_come_out_as_they_went_in() {
    let maker = Maker::new();
    let tree = maker.tree("tree");
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    let kinds = [
        (vec!["--format=pax", "--xattrs"], Pack::Gzip),
        (vec!["--format=pax", "--xattrs", "--sparse"], Pack::Zstd),
        (vec!["--format=pax", "--xattrs", "--sparse", "--sparse-version=0.0"], Pack::Plain),
        (vec!["--format=pax", "--xattrs", "--sparse", "--sparse-version=0.1"], Pack::Plain),
        (vec!["--format=gnu", "--sparse"], Pack::Gzip),
        (vec!["--format=gnu"], Pack::Zstd),
    ];
    for (flags, pack) in &kinds {
        // The PAX header holds tar's process id by default; so do not expect the same bytes twice.
        let (layer, diff_id) = maker.layer(&maker.tar(&tree, flags), *pack);
        layers.push(layer);
        diff_ids.push(diff_id);
    }
    maker.index(&[maker.manifest(&Maker::config(&diff_ids), &layers)]);
    let image = maker.open(&format!("oci:{}", maker.text("layout"))).unwrap();
    let directories = image.root(&maker.store()).unwrap();
    assert_eq!(directories.len(), kinds.len());
    for (directory, (flags, _)) in directories.iter().rev().zip(&kinds) {
        let exact = flags[0] == "--format=pax";
        assert_eq!(description(directory, exact), description(&tree, exact), "{flags:?}");
        let sparse = directory.join("sparse").metadata().unwrap();
        if flags.contains(&"--sparse") {
            assert!(sparse.blocks() * 512 < 8 << 20, "holes stay holes: {} {flags:?}", sparse.blocks());
        }
        assert_eq!(fs::read(directory.join("sparse")).unwrap(), fs::read(tree.join("sparse")).unwrap());
        assert_eq!(
            fs::metadata(directory.join("usr/bin/big")).unwrap().ino(),
            fs::metadata(directory.join("usr/bin/same")).unwrap().ino()
        );
    }
}

#[test]
fn the_configuration_is_read_and_docker_words_are_understood() {
    let maker = Maker::new();
    maker.index(&[maker.small("x")]);
    let image = maker.open(&format!("oci:{}", maker.text("layout"))).unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        image.config(),
        &ImageConfig {
            env: vec![pair("PATH", "/bin"), pair("A", "b=c"), pair("EMPTY", "")],
            entrypoint: vec!["/bin/sh".into(), "-c".into()],
            cmd: Vec::new(),
            user: "1000:users".into(),
            working_dir: "/srv".into(),
            labels: BTreeMap::from([pair("a", "b")]),
            volumes: vec!["/data".into()],
            stop_signal: Some("SIGINT".into()),
            has_healthcheck: false,
        }
    );
    let host = maker.open("host:").unwrap();
    assert_eq!(
        (host.root(&maker.store()).unwrap(), host.config().cmd.as_slice(), host.id()),
        (vec![PathBuf::from("/")], &["/bin/sh".to_owned()][..], None)
    );
    let rootfs = maker.open(&format!("rootfs:{}/./layout/../save", maker.text(""))).unwrap();
    assert_eq!(rootfs.root(&maker.store()).unwrap(), [maker.path("save").canonicalize().unwrap()]);
    assert_eq!(maker.open("rootfs:/nowhere").unwrap_err().code(), Code::ImageNotFound);
    let never = Pull { when: registry::When::Never, ..Pull::default() };
    let error =
        Image::open(&ImageReference::parse("ubuntu:24.04").unwrap(), &maker.store(), &never).unwrap_err();
    assert_eq!(error.code(), Code::ImageNotFound);
    assert_eq!(error.fix_line(), "gpurun pull docker.io/library/ubuntu:24.04", "{error}");
}

#[test]
fn tags_and_platforms_choose_and_the_choices_are_named() {
    let maker = Maker::new();
    let name = |name: &str| json!({"org.opencontainers.image.ref.name": name});
    let (one, two) = (maker.small("one"), maker.small("two"));
    maker.index(&[with(one.clone(), "annotations", name("1")), with(two.clone(), "annotations", name("2"))]);
    let layout = format!("oci:{}", maker.text("layout"));
    let id = |reference: &str| maker.open(reference).unwrap().id().unwrap().clone();
    assert_ne!(id(&format!("{layout}:1")), id(&format!("{layout}:2")));
    for reference in [layout.clone(), format!("{layout}:3")] {
        let error = maker.open(&reference).unwrap_err();
        assert_eq!(error.code(), Code::ImageNotFound);
        assert!(error.fix_line().contains("1, 2"), "{error}");
    }
    // A nested index of several platforms, with an attestation as BuildKit adds it.
    let platform = |value: &serde_json::Value, os: &str, architecture: &str| {
        with(value.clone(), "platform", json!({"os": os, "architecture": architecture}))
    };
    let nested = |manifests: &[serde_json::Value]| {
        let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
        maker.index(&[json!({"mediaType": "application/vnd.docker.distribution.manifest.list.v2+json", "digest": maker.blob(index.as_bytes()), "size": index.len()})]);
    };
    let this = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    nested(&[
        platform(&one, "linux", "s390x"),
        platform(&one, "unknown", "unknown"),
        platform(&two, "linux", this),
    ]);
    let chosen = maker.open(&layout).unwrap();
    let directory = chosen.root(&maker.store()).unwrap();
    assert_eq!(fs::read_to_string(directory[0].join("etc/name")).unwrap(), "two");
    nested(&[platform(&one, "linux", "s390x"), platform(&one, "windows", this)]);
    let error = maker.open(&layout).unwrap_err();
    assert_eq!(error.code(), Code::WrongPlatform);
    assert!(error.to_string().contains("linux/s390x, windows/"), "{error}");
    // No platform in the index: the configuration knows.
    maker.index(&[
        maker.manifest(&with(Maker::config(&[Digest::of(b"")]), "architecture", json!("s390x")), &[])
    ]);
    assert_eq!(maker.open(&layout).unwrap_err().code(), Code::WrongPlatform);
}

#[test]
fn indexes_that_multiply_are_refused() {
    let maker = Maker::new();
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut descriptor = maker.small("x");
    for _ in 0..3 {
        let index = json!({"schemaVersion": 2, "manifests": vec![descriptor; 12]}).to_string();
        descriptor = json!({"mediaType": kind, "digest": maker.blob(index.as_bytes()), "size": index.len()});
    }
    maker.index(&[descriptor]);
    let error = maker.open(&format!("oci:{}", maker.text("layout"))).unwrap_err();
    assert_eq!(error.code(), Code::ImageBroken);
    assert!(error.to_string().contains("more than 100 indexes"), "{error}");
}

#[test]
fn archives_of_both_kinds_open_and_a_second_start_reads_no_tar() {
    let maker = Maker::new();
    let tar = archive(&[file("etc/name", "docker")]);
    let (layer, diff_id) = maker.layer(&tar, Pack::Gzip);
    let config = Maker::config(std::slice::from_ref(&diff_id));
    maker.index(&[maker.manifest(&config, &[layer])]);
    let hex = Digest::of(config.to_string().as_bytes()).hex().to_owned();
    fs::create_dir_all(maker.path("save/abc")).unwrap();
    fs::write(maker.path("save/abc/real.tar"), &tar).unwrap();
    symlink("../abc/real.tar", maker.path("save/abc/layer.tar")).unwrap();
    fs::write(maker.path(&format!("save/{hex}.json")), config.to_string()).unwrap();
    let saved = json!([{"Config": format!("{hex}.json"), "RepoTags": ["ml:1", "host.example/a/b"], "Layers": ["abc/layer.tar"]}]);
    fs::write(maker.path("save/manifest.json"), saved.to_string()).unwrap();
    let docker = maker.pack("save", "docker.tar");
    run("gzip", &["-k", &docker]);
    let oci = maker.pack("layout", "oci.tar");
    run("zstd", &["-q", &oci, "-o", &format!("{oci}.zst")]);
    std::thread::sleep(std::time::Duration::from_millis(60));
    let references = [
        format!("docker-archive:{docker}"),
        format!("docker-archive:{docker}:docker.io/library/ml:1"),
        format!("docker-archive:{docker}:host.example/a/b:latest"),
        format!("docker-archive:{docker}.gz:ml:1"),
        format!("oci-archive:{oci}"),
        format!("oci-archive:{oci}.zst"),
    ];
    let mut roots = HashSet::new();
    for reference in &references {
        let image = maker.open(reference).unwrap();
        assert_eq!(image.id().unwrap().hex(), hex, "{reference}");
        roots.insert(image.root(&maker.store()).unwrap());
    }
    assert_eq!(roots.len(), 1, "one layer, however it came");
    let root = roots.into_iter().next().unwrap();
    assert_eq!(fs::read_to_string(root[0].join("etc/name")).unwrap(), "docker");
    // Overwritten in place with its times put back as far as anybody can: nobody looks into it again unless it changed.
    let listed = maker.store().images().unwrap();
    assert_eq!(listed.len(), references.len());
    assert!(listed.iter().all(|image| image.size > 0 && image.id.hex() == hex));
    let warm = maker.open(&references[0]).unwrap();
    let Root::Layers { source, .. } = &warm.root else { panic!("{warm:?}") };
    assert!(matches!(**source, Source::Layout(_, None)), "a second start opens no archive");
    assert_eq!(warm.root(&maker.store()).unwrap(), root);
    // A layer that was removed comes back, from the archive.
    fs::remove_dir_all(&root[0]).unwrap();
    assert_eq!(warm.root(&maker.store()).unwrap(), root);
    assert!(root[0].join("etc/name").exists());
    // A damaged record or blob is no record, and a changed archive is another one.
    for name in ["images", "blobs"] {
        for entry in fs::read_dir(maker.path("store").join(name)).unwrap() {
            fs::write(entry.unwrap().path(), "{").unwrap();
        }
        assert_eq!(maker.open(&references[0]).unwrap().id().unwrap().hex(), hex);
    }
    fs::write(&docker, "no tar at all").unwrap();
    assert_eq!(maker.open(&references[0]).unwrap_err().code(), Code::ImageBroken);
    let error = maker.open(&format!("docker-archive:{oci}")).unwrap_err();
    assert!(error.fix_line().contains("oci-archive"), "{error}");
    assert_eq!(maker.open("oci-archive:/nowhere.tar").unwrap_err().code(), Code::ImageNotFound);
    assert_eq!(
        maker.open(&format!("oci-archive:{}", maker.text("layout"))).unwrap_err().code(),
        Code::ImageNotFound
    );
}

#[test]
fn bytes_that_are_not_those_promised_never_become_a_layer() {
    let maker = Maker::new();
    let layout = format!("oci:{}", maker.text("layout"));
    let tar = archive(&[file("a", &"text ".repeat(50_000))]);
    for pack in [Pack::Plain, Pack::Gzip, Pack::Zstd] {
        let (layer, diff_id) = maker.layer(&tar, pack);
        let blob = maker.path("layout/blobs/sha256").join(&layer["digest"].as_str().unwrap()[7..]);
        let whole = fs::read(&blob).unwrap();
        let fails = |code: Code, config: &[Digest]| {
            maker.index(&[maker.manifest(&Maker::config(config), std::slice::from_ref(&layer))]);
            let error = maker.open(&layout).unwrap().root(&maker.store()).unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            for place in ["layers", "tmp"] {
                assert_eq!(fs::read_dir(maker.path("store").join(place)).unwrap().count(), 0, "{place}");
            }
        };
        // The content is not the configuration's.
        fails(Code::DigestMismatch, &[Digest::of(b"other")]);
        // A bit falls, anywhere; the end is cut; something is added.
        for at in [0, 3, whole.len() / 2, whole.len() - 1] {
            let mut hurt = whole.clone();
            hurt[at] ^= 0x10;
            fs::write(&blob, hurt).unwrap();
            fails(Code::DigestMismatch, std::slice::from_ref(&diff_id));
        }
        fs::write(&blob, &whole[..whole.len() - 9]).unwrap();
        fails(Code::DigestMismatch, std::slice::from_ref(&diff_id));
        fs::write(&blob, [whole.as_slice(), b"more"].concat()).unwrap();
        fails(Code::DigestMismatch, std::slice::from_ref(&diff_id));
        fs::remove_file(&blob).unwrap();
        fails(Code::ImageBroken, std::slice::from_ref(&diff_id));
        symlink("/etc/hostname", &blob).unwrap();
        fails(Code::ImageBroken, std::slice::from_ref(&diff_id));
        fs::remove_file(&blob).unwrap();
    }
    // A document that was changed after it was named.
    let manifest = maker.small("x");
    let path = maker.path("layout/blobs/sha256").join(&manifest["digest"].as_str().unwrap()[7..]);
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("schemaVersion", "schemaversion")).unwrap();
    maker.index(&[manifest]);
    assert_eq!(maker.open(&layout).unwrap_err().code(), Code::DigestMismatch);
}

#[test]
fn a_refused_entry_leaves_nothing_and_a_repeated_layer_is_stacked_once() {
    let maker = Maker::new();
    let layout = format!("oci:{}", maker.text("layout"));
    let (bad, bad_id) = maker.layer(&archive(&[file("fine", ""), raw(b'1', "evil", "absent")]), Pack::Gzip);
    maker.index(&[maker.manifest(&Maker::config(&[bad_id]), &[bad])]);
    let error = maker.open(&layout).unwrap().root(&maker.store()).unwrap_err();
    assert_eq!(error.code(), Code::LayerRefused);
    assert!(error.to_string().contains("evil"), "{error}");
    assert_eq!(fs::read_dir(maker.path("store/layers")).unwrap().count(), 0);
    let (a, a_id) = maker.layer(&archive(&[file("a", "")]), Pack::Gzip);
    let (b, b_id) = maker.layer(&archive(&[file("b", "")]), Pack::Zstd);
    maker.index(&[
        maker.manifest(&Maker::config(&[a_id.clone(), b_id.clone(), a_id.clone()]), &[a.clone(), b, a])
    ]);
    let store = maker.store();
    assert_eq!(
        maker.open(&layout).unwrap().root(&store).unwrap(),
        [store.layer_path(&a_id), store.layer_path(&b_id)]
    );
}

#[test]
fn eight_at_once_make_one_layer_and_a_killed_one_leaves_nothing() {
    let maker = Maker::new();
    let layout = format!("oci:{}", maker.text("layout"));
    maker.index(&[maker.small("shared")]);
    let fills = AtomicUsize::new(0);
    let diff_id = Digest::of(b"counted");
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let store = maker.store();
                let image =
                    Image::open(&ImageReference::parse(&layout).unwrap(), &store, &Pull::default()).unwrap();
                assert!(image.root(&store).unwrap()[0].join("etc/name").exists());
                let fill = |_: rustix::fd::BorrowedFd<'_>| {
                    fills.fetch_add(1, Ordering::SeqCst);
                    thread::sleep(std::time::Duration::from_millis(20));
                    Ok(())
                };
                store.add_layer(&diff_id, fill).unwrap();
            });
        }
    });
    assert_eq!(fills.into_inner(), 1);
    assert_eq!(fs::read_dir(maker.path("store/tmp")).unwrap().count(), 0);
    // Leftovers of a killed process (partial layer and file, unlocked), a file that a process works on, and foreign files.
    let diff_id = Digest::of(b"half");
    let temporary = |name: &str| maker.path("store/tmp").join(name);
    let busy = "b".repeat(32);
    let mark = |path: PathBuf| fs::set_permissions(path, fs::Permissions::from_mode(0o1700)).unwrap();
    let half = || {
        fs::create_dir_all(temporary(&diff_id.hex()[..32]).join("a/b/c")).unwrap();
        mark(temporary(&diff_id.hex()[..32]));
    };
    half();
    fs::create_dir_all(temporary(&busy).join("a")).unwrap();
    mark(temporary(&busy));
    let written = temporary(&format!("{}.1", "c".repeat(64)));
    fs::write(&written, "x").unwrap();
    mark(written);
    let mut kept = vec![busy.clone()];
    for foreign in ["mine", "half.1", &"d".repeat(32), &"e".repeat(64), &format!("{}.7", "f".repeat(32))] {
        fs::create_dir_all(temporary(foreign).join("a")).unwrap();
        kept.push(foreign.into());
    }
    for foreign in
        ["half.2", &"1".repeat(64), &format!("{}.1", "2".repeat(64)), &format!("{}.lock", "3".repeat(32))]
    {
        fs::write(temporary(foreign), "x").unwrap();
        kept.push(foreign.into());
    }
    kept.sort();
    let lock = fs::File::open(temporary(&busy)).unwrap();
    lock.lock().unwrap();
    let store = maker.store();
    assert!(temporary(&diff_id.hex()[..32]).exists(), "opening a store waits for no leftovers");
    store.clean().unwrap();
    let mut left: Vec<_> =
        fs::read_dir(maker.path("store/tmp")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, kept.iter().map(std::ffi::OsString::from).collect::<Vec<_>>());
    // Half of the layer that is made is set aside, and removed later.
    half();
    store.add_layer(&diff_id, |_| Ok(())).unwrap();
    assert_eq!(fs::read_dir(store.layer_path(&diff_id)).unwrap().count(), 0);
    assert_eq!(fs::read_dir(maker.path("store/tmp")).unwrap().count(), left.len() + 1);
    store.clean().unwrap();
    assert_eq!(fs::read_dir(maker.path("store/tmp")).unwrap().count(), left.len());
    // A directory of the layer's name that gpurun did not make is not used.
    let diff_id = Digest::of(b"foreign");
    fs::create_dir_all(temporary(&diff_id.hex()[..32]).join("a")).unwrap();
    let error = store.add_layer(&diff_id, |_| Ok(())).unwrap_err();
    assert!(error.code() == Code::Store && error.fix_line().contains("mv "), "{error}");
    assert!(temporary(&diff_id.hex()[..32]).join("a").exists());
}

/// A layer that was being removed when its process was killed; its name is free meanwhile.
#[test]
fn a_layer_that_is_removed_carries_the_mark() {
    let maker = Maker::new();
    let store = maker.store();
    let diff_id = Digest::of(b"removed");
    store.add_layer(&diff_id, |_| Ok(())).unwrap();
    fs::create_dir_all(store.layer_path(&diff_id).join("a/b")).unwrap();
    fs::set_permissions(store.layer_path(&diff_id), fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(store.prune().unwrap().removed, 1);
    assert!(!store.layer_path(&diff_id).exists());
    assert_eq!(fs::read_dir(maker.path("store/tmp")).unwrap().count(), 0);
}

#[test]
fn prune_leaves_foreign_entries_among_partial_downloads() {
    let maker = Maker::new();
    let store = maker.store();
    let parts = |name: &str| maker.path("store/parts").join(name.repeat(32));
    fs::write(parts("d"), "x").unwrap();
    std::os::unix::fs::symlink("/etc", parts("e")).unwrap();
    fs::create_dir_all(parts("f").join("0")).unwrap();
    for (name, mode) in [("0", 0o1700), ("1", 0o700)] {
        fs::create_dir(parts(name)).unwrap();
        fs::write(parts(name).join("4096"), "x").unwrap();
        fs::set_permissions(parts(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    store.prune().unwrap();
    let mut left: Vec<_> =
        fs::read_dir(maker.path("store/parts")).unwrap().map(|entry| entry.unwrap().path()).collect();
    left.sort();
    assert_eq!(left, ["1", "d", "e", "f"].map(parts));
}

/// The one that waited locks a directory that is gone, and must see it.
#[test]
fn who_waits_for_one_that_fails_does_it_himself() {
    let maker = Maker::new();
    let diff_id = Digest::of(b"tried twice");
    let started = std::sync::Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            let failed = maker.store().add_layer(&diff_id, |_| {
                started.wait();
                thread::sleep(std::time::Duration::from_millis(100));
                Err::<(), _>(Error::new(Code::LayerRefused, "no"))
            });
            assert_eq!(failed.unwrap_err().code(), Code::LayerRefused);
        });
        started.wait();
        maker.store().add_layer(&diff_id, |_| Ok(())).unwrap();
    });
    assert!(maker.store().has_layer(&diff_id));
}

#[test]
fn a_store_that_others_could_change_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/store");
    drop(Store::open(&path).unwrap());
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
    assert_eq!(Store::open(&path).unwrap_err().code(), Code::Store);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(Store::open(&path).is_ok());
    if root() {
        std::os::unix::fs::chown(&path, Some(4321), None).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert!(error.what().contains("belongs to user 4321"), "{error}");
    }
    fs::write(directory.path().join("file"), "").unwrap();
    assert_eq!(Store::open(&directory.path().join("file")).unwrap_err().code(), Code::Store);
}

#[test]
fn images_that_are_none_say_what_they_are() {
    let maker = Maker::new();
    let layout = format!("oci:{}", maker.text("layout"));
    let broken = |part: &str| {
        let error = maker.open(&layout).unwrap_err();
        assert_eq!(error.code(), Code::ImageBroken, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    broken("index.json");
    fs::write(maker.path("layout/index.json"), "[]").unwrap();
    broken("cannot be understood");
    maker.index(&[]);
    assert_eq!(maker.open(&layout).unwrap_err().code(), Code::ImageNotFound);
    let (layer, diff_id) = maker.layer(&archive(&[]), Pack::Plain);
    let config = Maker::config(&[diff_id]);
    maker.index(&[maker.manifest(&config, &[])]);
    broken("0 layers and the configuration 1");
    maker.index(&[maker.manifest(&Maker::config(&[]), &[])]);
    broken("no layers");
    maker.index(&[maker.manifest(
        &config,
        &[with(layer.clone(), "mediaType", json!("application/vnd.oci.image.layer.v1.tar+encrypted"))],
    )]);
    broken("+encrypted");
    maker.index(&[
        maker.manifest(&config, &[with(layer.clone(), "digest", json!("sha256:../../../../etc/passwd"))])
    ]);
    broken("not a digest");
    let nul = with(config, "config", json!({"Env": ["A=\0"]}));
    maker.index(&[maker.manifest(&nul, &[layer])]);
    broken("NUL");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any byte of any document changed: an image, or an error, and never more.
    #[test]
    fn mutated_documents_never_panic(at in any::<prop::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 1..4), which in 0usize..2) {
        let maker = Maker::new();
        let (layer, diff_id) = maker.layer(&archive(&[file("a", "")]), Pack::Plain);
        let mutate = |text: String| {
            let mut text = text.into_bytes();
            let at = at.index(text.len());
            let end = (at + bytes.len()).min(text.len());
            text.splice(at..end, bytes.iter().copied());
            text
        };
        let config = Maker::config(&[diff_id]);
        maker.index(&[maker.manifest(&config, std::slice::from_ref(&layer))]);
        let saved = json!([{"Config": "config", "RepoTags": ["a:1"], "Layers": ["layer"]}]).to_string();
        fs::write(maker.path("save/layer"), archive(&[file("a", "")])).unwrap();
        if which == 0 {
                let index = fs::read_to_string(maker.path("layout/index.json")).unwrap();
                fs::write(maker.path("layout/index.json"), mutate(index)).unwrap();
                fs::write(maker.path("save/config"), mutate(config.to_string())).unwrap();
                fs::write(maker.path("save/manifest.json"), saved).unwrap();
        } else {
                fs::write(maker.path("save/config"), config.to_string()).unwrap();
                fs::write(maker.path("save/manifest.json"), mutate(saved)).unwrap();
        }
        let docker = maker.pack("save", "docker.tar");
        let hurt = mutate(String::from_utf8_lossy(&fs::read(&docker).unwrap()).into_owned());
        fs::write(maker.path("hurt.tar"), hurt).unwrap();
        for reference in [format!("oci:{}", maker.text("layout")), format!("docker-archive:{docker}"), format!("oci-archive:{}", maker.text("hurt.tar"))] {
            if let Ok(image) = maker.open(&reference) {
                let _ = image.root(&maker.store());
            }
        }
    }
}
