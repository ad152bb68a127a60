//! Unpacked images, entry by entry beside what umoci makes of the same layers; and skopeo, which pushes and verifies them.

use gpurun::image::{Digest, Image, ImageReference, Pull, Store};
use gpurun_integration::{
    Caller, TestHost,
    engines::{Cgroups, Machine, Suite},
    image, must,
    registry::Registry,
    run, temporary,
};
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// All that an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    /// A link's target; the digest of a file's bytes, with their number.
    content: OsString,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The other names of the same file.
    same_as: BTreeSet<PathBuf>,
}

type Tree = BTreeMap<PathBuf, Entry>;

/// Everything below a directory, and the directory itself.
fn tree(top: &Path) -> Tree {
    let (mut found, mut names) = (Tree::new(), BTreeMap::<(u64, u64), BTreeSet<PathBuf>>::new());
    let mut todo = vec![top.to_owned()];
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let name = Path::new("/").join(path.strip_prefix(top).unwrap());
        let mut content = OsString::new();
        let kind = match kind {
            kind if kind.is_dir() => {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                "directory"
            }
            kind if kind.is_symlink() => {
                content = fs::read_link(&path).unwrap().into();
                "link"
            }
            kind if kind.is_file() => {
                content = format!("{} {}", stat.len(), Digest::of(&fs::read(&path).unwrap())).into();
                "file"
            }
            kind if kind.is_fifo() => "fifo",
            kind if kind.is_block_device() => "block device",
            _ => "character device",
        };
        if kind != "directory" {
            names.entry((stat.dev(), stat.ino())).or_default().insert(name.clone());
        }
        let entry = Entry {
            kind,
            mode: stat.mode() & 0o7777,
            owner: (stat.uid(), stat.gid()),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            device: if kind.ends_with("device") { stat.rdev() } else { 0 },
            content,
            xattrs: if matches!(kind, "directory" | "file") { xattrs(&path) } else { BTreeMap::new() },
            same_as: BTreeSet::new(),
        };
        found.insert(name, entry);
    }
    for all in names.into_values() {
        for name in &all {
            let others = all.iter().filter(|other| *other != name).cloned().collect();
            found.get_mut(name).unwrap().same_as = others;
        }
    }
    found
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut list = [0; 4096];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = [0; 4096];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
            (OsString::from_vec(name.to_vec()), value[..length].to_vec())
        })
        .collect()
}

/// What two trees do not have alike, in words.
fn differences(ours: &Tree, theirs: &Tree) -> Vec<String> {
    let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let differ = names.into_iter().filter(|name| ours.get(*name) != theirs.get(*name));
    differ
        .map(|name| format!("{}:\n  {:?}\n  {:?}", name.display(), ours.get(name), theirs.get(name)))
        .collect()
}

/// How a layer's tree is packed: GNU tar's options.
type Form = &'static [&'static str];
const PAX: Form = &["--format=posix", "--xattrs", "--xattrs-include=*"];
/// Whole seconds, no attributes, and names in entries of their own.
const GNU_SPARSE: Form = &["--format=gnu", "--sparse"];
const FORMS: [Form; 6] = [
    PAX,
    &["--format=posix", "--xattrs", "--xattrs-include=*", "--sparse"],
    &["--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.1"],
    &["--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.0"],
    GNU_SPARSE,
    &["--format=gnu"],
];

struct Layout {
    dir: TempDir,
    layers: Vec<(String, Vec<u8>)>,
}

impl Layout {
    fn new() -> Self {
        Self { dir: temporary(), layers: Vec::new() }
    }

    /// The next layer is what these lines of Python put into the archive `tar`.
    fn write_by_hand(&mut self, script: &str) {
        let script = format!("{HAND}\n{script}\ntar.close()");
        let packed = self.dir.path().join("layer.tar");
        must(Command::new("python3").args(["-c", &script]).arg(&packed));
        self.layers.push(("tar".into(), fs::read(&packed).unwrap()));
    }

    /// Packs a tree as the next layer.
    fn add(&mut self, tree: &Path, form: Form) {
        let packed = self.dir.path().join("layer.tar");
        let mut command = Command::new("tar");
        command
            .args(["--numeric-owner", "--sort=name"])
            .args(form)
            .arg("-C")
            .arg(tree)
            .arg("-cf")
            .arg(&packed)
            .arg(".");
        must(&mut command);
        self.layers.push(("tar".into(), fs::read(&packed).unwrap()));
    }

    fn blob(&self, data: &[u8], kind: &str) -> Value {
        let digest = Digest::of(data);
        let blobs = self.dir.path().join("oci/blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(digest.hex()), data).unwrap();
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest.to_string(), "size": data.len()})
    }

    /// Writes the layout, with the tag `1`; where it is.
    fn write(&self) -> PathBuf {
        let diff_ids: Vec<_> = self.layers.iter().map(|(_, data)| Digest::of(data).to_string()).collect();
        // umoci wants a history; skopeo an architecture.
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": diff_ids.iter().map(|_| json!({"created_by": "a test"})).collect::<Vec<_>>(),
        });
        let layers: Vec<_> =
            self.layers.iter().map(|(kind, data)| self.blob(data, &format!("layer.v1.{kind}"))).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(config.to_string().as_bytes(), "config.v1+json"), "layers": layers,
        });
        let mut top = self.blob(manifest.to_string().as_bytes(), "manifest.v1+json");
        top["annotations"] = json!({"org.opencontainers.image.ref.name": "1"});
        let oci = self.dir.path().join("oci");
        fs::write(oci.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
        fs::write(oci.join("index.json"), json!({"schemaVersion": 2, "manifests": [top]}).to_string())
            .unwrap();
        oci
    }
}

/// A function that adds an entry of a kind that no `tar` of a tree comes to.
const HAND: &str = "
import io, sys, tarfile
tar = tarfile.open(sys.argv[1], 'w', format=tarfile.PAX_FORMAT)
def add(name, kind=tarfile.REGTYPE, link='', data=b'', mode=0o644, mtime=1700000000.5):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size, entry.mode, entry.mtime = kind, link, len(data), mode, mtime
    entry.devmajor, entry.devminor = 1, 3
    tar.addfile(entry, io.BytesIO(data))";

/// gpurun's tree: its layers stacked as a container has them.
fn ours(host: &TestHost, reference: &str) -> Tree {
    let store = Store::open(&host.store(0)).unwrap();
    let image = Image::open(&ImageReference::parse(reference).unwrap(), &store, &Pull::default()).unwrap();
    let lowers = image.root(&store).unwrap();
    let (empty, top) = (temporary(), temporary());
    let mut all: Vec<String> = lowers.iter().map(|path| path.display().to_string()).collect();
    // An overlay has two layers at least.
    all.push(empty.path().display().to_string());
    let script =
        format!("mount -t overlay overlay -o ro,lowerdir={} {}", all.join(":"), top.path().display());
    must(Command::new("sh").args(["-c", &script]));
    let found = tree(top.path());
    must(Command::new("umount").arg(top.path()));
    found
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
    };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// One of everything.
fn lowest(top: &Path) {
    let sh = |script: &str| {
        must(Command::new("sh").args(["-ec", script]).current_dir(top));
    };
    sh("mkdir -p bin etc/deep/er home/app var/lib/many run/closed
        echo one > etc/one; echo two > etc/two; echo deep > etc/deep/er/file
        for i in 1 2 3; do echo $i > var/lib/many/$i; done
        ln etc/one etc/also-one; ln etc/one home/one; ln -s ../etc/one home/link; ln -s /nowhere/at/all home/dangling
        ln -s target home/twice; ln home/twice home/the-same-link
        touch empty; printf x > bin/tool; printf y > bin/setgid
        mkfifo home/fifo; mknod home/null c 1 3; mknod home/disk b 259 70000
        printf start > sparse; truncate -s 3M sparse; printf middle >> sparse; truncate -s 8M sparse
        truncate -s 1M hole; printf end >> hole; truncate -s 2M all-hole
        chown 1001:1002 home/app home/link; chown 3000000:4000000 etc/two; chmod 4755 bin/tool; chmod 2711 bin/setgid
        chmod 1777 run; chmod 2770 home/app; chmod 000 run/closed; chmod 0 etc/two; chmod 640 home/null");
    let long = "long-".repeat(40);
    let directory = top.join("l").join(&long).join(&long);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("file"), "long").unwrap();
    fs::hard_link(directory.join("file"), directory.join("another name of the file")).unwrap();
    symlink(format!("/{long}/{long}"), top.join("l/link")).unwrap();
    fs::write(top.join("etc/ümlaut 你好"), "utf-8").unwrap();
    fs::write(top.join(OsStr::from_bytes(b"etc/latin-\xe9\n\\")), "not utf-8").unwrap();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::setxattr(top.join(path), name, value, XattrFlags::empty()).unwrap();
    };
    // cap_net_raw+ep (capability.h, VFS_CAP_REVISION_2): the byte after the first four is a newline's neighbour.
    set("bin/tool", "security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    set("empty", "user.note", b"of three\nlines=\n");
    set("etc/deep", "user.directory", &[0, 255, 10]);
    for (path, seconds, nanoseconds) in [
        ("etc/one", 1_000_000_000, 123_456_789),
        ("home/link", 1_100_000_000, 1),
        ("home/fifo", 1_200_000_000, 999_999_999),
        ("empty", -86_400, 0),
        ("hole", 8_589_934_592, 5),
        ("etc/deep/er", 1_300_000_000, 500_000_000),
        ("etc/deep", 1_400_000_000, 0),
        ("etc", 1_500_000_000, 250_000_000),
        ("run", 0, 0),
        ("", 1_600_000_000, 7),
    ] {
        set_mtime(&top.join(path), seconds, nanoseconds);
    }
}

/// Removes, replaces and hides what is below.
fn edits(top: &Path) {
    let sh = |script: &str| {
        must(Command::new("sh").args(["-ec", script]).current_dir(top));
    };
    sh("mkdir -p etc/deep var/lib/many home bin
        touch etc/.wh.two home/.wh.the-same-link home/.wh.null .wh.all-hole
        # Opaque, with something of its own.
        touch var/lib/many/.wh..wh..opq; echo new > var/lib/many/2
        # A directory for a file, a file for a directory, a link for a file.
        mkdir -p empty/inside; echo now > empty/inside/a-directory; echo file > etc/deep/er; ln -s empty/inside hole
        # One name of three is another file now, the mode and the owner of a directory change.
        echo changed > etc/also-one; chmod 700 home; chown 5:6 home
        # Gone and here again in one layer.
        touch bin/.wh.tool; echo again > bin/tool; chmod 755 bin/tool
        ln bin/tool bin/tool-too");
    set_mtime(&top.join("var/lib/many/2"), 1_700_000_000, 111);
    set_mtime(&top.join("home"), 1_700_000_001, 222);
    set_mtime(&top.join("etc/deep"), 1_700_000_002, 333);
    set_mtime(&top.join("etc"), 1_700_000_003, 444);
}

fn two_trees(dir: &Path) -> (PathBuf, PathBuf) {
    let (low, high) = (dir.join("low"), dir.join("high"));
    fs::create_dir(&low).unwrap();
    fs::create_dir(&high).unwrap();
    lowest(&low);
    edits(&high);
    (low, high)
}

/// Without what a tar of that form cannot say.
fn as_packed(mut tree: Tree, form: Form) -> Tree {
    if form[0] == "--format=gnu" {
        for entry in tree.values_mut() {
            entry.mtime.1 = 0;
            entry.xattrs.clear();
        }
    }
    tree
}

/// umoci's tree of these layers. It knows no sparse entries of GNU's kind (type S), which Docker and containerd unpack and the
/// OCI image specification does not exclude (layer.md, "File Types"): it gets the same trees without holes.
fn umocis(trees: &[&Path], form: Form) -> Tree {
    let form = if form == GNU_SPARSE { &form[..1] } else { form };
    let mut layout = Layout::new();
    trees.iter().for_each(|tree| layout.add(tree, form));
    let bundle = layout.dir.path().join("bundle");
    let image = format!("{}:1", layout.write().display());
    must(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    tree(&bundle.join("rootfs"))
}

fn assert_same(what: &str, ours: &Tree, theirs: &Tree) {
    let differ = differences(ours, theirs);
    assert!(differ.is_empty(), "{what}: ours, and it:\n{}", differ.join("\n"));
}

#[test]
fn a_tree_is_umocis_entry_by_entry_and_what_was_packed() {
    let dir = temporary();
    let (low, high) = two_trees(dir.path());
    for form in FORMS {
        let host = TestHost::new("t4");
        let mut layout = Layout::new();
        layout.add(&low, form);
        let mine = ours(&host, &format!("oci:{}:1", layout.write().display()));
        assert!(mine.len() > 40 && mine[Path::new("/etc/one")].same_as.len() == 2, "{mine:?}");
        assert_same(&format!("{form:?}: what was packed"), &mine, &as_packed(tree(&low), form));
        assert_same(&format!("{form:?}: umoci's"), &mine, &umocis(&[&low], form));
        layout.add(&high, form);
        let mine = ours(&host, &format!("oci:{}:1", layout.write().display()));
        for gone in ["/etc/two", "/var/lib/many/1", "/home/null", "/all-hole"] {
            assert!(!mine.contains_key(Path::new(gone)), "{gone}");
        }
        assert_eq!(mine[Path::new("/etc/one")].same_as.len(), 1, "one of three names is another file");
        assert_same(&format!("{form:?}: umoci's with two layers"), &mine, &umocis(&[&low, &high], form));
    }
}

#[test]
fn entries_in_an_order_that_no_tree_is_packed_in_come_out_as_umocis() {
    let host = TestHost::new("t4");
    let mut layout = Layout::new();
    layout.write_by_hand(
        "for directory in ['.', 'a', 'b', 'b/in', 'c']: add(directory, tarfile.DIRTYPE, mode=0o755)
for file in ['a/low', 'b/low', 'b/in/low', 'c/low', 'c/other']: add(file, data=b'low')",
    );
    layout.write_by_hand(
        "
# Names with what does not count, and absolute ones.
add('./a//x', data=b'x')
add('/a/absolute', data=b'absolute')
# A device and a link with two names; a link to what is itself a name of another.
add('a/null', tarfile.CHRTYPE); add('a/null-too', tarfile.LNKTYPE, 'a/null')
add('a/link', tarfile.SYMTYPE, 'nowhere'); add('a/link-too', tarfile.LNKTYPE, './a/link')
add('a/y', tarfile.LNKTYPE, '/a/x'); add('a/z', tarfile.LNKTYPE, 'a/y')
# Twice; and a directory once more after what is in it.
add('a/twice', data=b'first', mode=0o600); add('a/twice', data=b'second', mode=0o640)
add('a', tarfile.DIRTYPE, mode=0o711, mtime=1600000000.25)
add('b', tarfile.DIRTYPE, mode=0o755); add('c', tarfile.DIRTYPE, mode=0o755)
# Opaque, said after an entry of its own, and a whiteout after the entry that takes the place.
add('b/own', data=b'own'); add('b/.wh..wh..opq'); add('b/in', tarfile.DIRTYPE, mode=0o700)
add('c/low', data=b'new'); add('c/.wh.low'); add('c/.wh.other'); add('c/.wh.never')
# The root itself.
add('./', tarfile.DIRTYPE, mode=0o750, mtime=1500000000.75)",
    );
    let oci = layout.write();
    let mine = ours(&host, &format!("oci:{}:1", oci.display()));
    let bundle = layout.dir.path().join("bundle");
    must(Command::new("umoci").args(["unpack", "--image", &format!("{}:1", oci.display())]).arg(&bundle));
    assert_same("umoci's", &mine, &tree(&bundle.join("rootfs")));
    // A directory that a layer has something in and does not describe stays as the layer below has it, as with umoci and
    // containerd.
    layout.write_by_hand("add('a/implied', data=b'x')");
    let oci = layout.write();
    let mine = ours(&host, &format!("oci:{}:1", oci.display()));
    let bundle = layout.dir.path().join("implied");
    must(Command::new("umoci").args(["unpack", "--image", &format!("{}:1", oci.display())]).arg(&bundle));
    let theirs = tree(&bundle.join("rootfs"));
    // umoci keeps the times of such a directory as well.
    for directory in ["/", "/a"] {
        let (own, other) = (&mine[Path::new(directory)], &theirs[Path::new(directory)]);
        assert_eq!((own.mode, own.owner), (other.mode, other.owner), "{directory}");
    }
    assert_eq!(mine[Path::new("/a")].mode, 0o711);
    assert!(mine.contains_key(Path::new("/a/x")));
}

/// skopeo, a client that is not ours.
fn skopeo(words: &[&str]) -> String {
    must(Command::new("skopeo").args(["--insecure-policy"]).args(words))
}

#[test]
fn what_skopeo_pushes_is_pulled_whole_and_what_is_pulled_is_what_skopeo_finds() {
    let dir = temporary();
    let (low, high) = two_trees(dir.path());
    let mut layout = Layout::new();
    layout.add(&low, PAX);
    layout.add(&high, PAX);
    let oci = format!("oci:{}:1", layout.write().display());
    let theirs = umocis(&[&low, &high], PAX);
    for (tag, options) in [
        ("oci", &["--format=oci"][..]),
        ("docker", &["--format=v2s2"]),
        ("zstd", &["--format=oci", "--dest-compress-format=zstd"]),
        ("plain", &["--preserve-digests"]),
    ] {
        let host = TestHost::new("t4");
        // skopeo remembers where it has seen a layer, and would not compress it again.
        let storage = temporary();
        let registry = Registry::plain(storage.path());
        let name = format!("docker://{}/team/tree:{tag}", registry.address);
        skopeo(&[&["copy", "-q", "--dest-tls-verify=false"], options, &[&oci, &name]].concat());
        let kind = skopeo(&["inspect", "--raw", "--tls-verify=false", &name]);
        let expected = match tag {
            "docker" => "docker.image.rootfs.diff.tar.gzip",
            "oci" => "tar+gzip",
            "plain" => "v1.tar\"",
            _ => "tar+zstd",
        };
        assert!(kind.contains(expected), "{tag}: {kind}");
        let id = must(host.gpurun().args(["pull", &name]));
        assert_same(tag, &ours(&host, &name), &theirs);
        // The image's identity is the configuration's digest, and the manifest that skopeo verifies names it.
        let manifest: Value = serde_json::from_str(&kind).unwrap();
        assert_eq!(manifest["config"]["digest"], id.trim(), "{tag}");
        let copy = dir.path().join(tag);
        skopeo(&["copy", "-q", "--src-tls-verify=false", &name, &format!("dir:{}", copy.display())]);
        let config = fs::read(copy.join(id.trim().trim_start_matches("sha256:"))).unwrap();
        assert_eq!(Digest::of(&config).to_string(), id.trim(), "{tag}");
        // By the digest that skopeo computes it is the same image.
        let digest = skopeo(&["inspect", "--tls-verify=false", "--format={{.Digest}}", &name]);
        let by_digest = format!("docker://{}/team/tree@{}", registry.address, digest.trim());
        assert_eq!(must(host.gpurun().args(["pull", &by_digest])), id, "{tag}");
    }
    // What skopeo makes of an archive is read, too.
    for kind in ["oci-archive", "docker-archive"] {
        let host = TestHost::new("t4");
        let file = format!("{kind}:{}", dir.path().join(kind).display());
        skopeo(&["copy", "-q", &oci, &format!("{file}:tree:1")]);
        assert_same(kind, &ours(&host, &format!("{file}:tree:1")), &theirs);
    }
}

#[test]
fn podmans_zstd_chunked_is_unpacked_as_any_other() {
    let dir = temporary();
    let (low, high) = two_trees(dir.path());
    let mut layout = Layout::new();
    layout.add(&low, PAX);
    layout.add(&high, PAX);
    // skopeo 1.9 leaves out the archive's end there, so that its digest is another one.
    let machine = Machine::start(Suite::Sid, Cgroups::possible()[0]);
    let shared = machine.shared().display();
    let oci = layout.write();
    skopeo(&["copy", "-q", &format!("oci:{}:1", oci.display()), &format!("oci-archive:{shared}/tree.tar")]);
    machine.sh(&format!(
        "podman load -qi {shared}/tree.tar && podman tag $(podman images -q) tree:1 &&
         podman push -q --compression-format=zstd:chunked tree:1 oci:{shared}/chunked:1"
    ));
    let pushed =
        run(Command::new("grep").arg("-rl").arg("zstd-chunked.manifest-position").arg(machine.shared()));
    assert_eq!(pushed.out.lines().count(), 1, "{pushed:?}");
    let host = TestHost::new("t4");
    assert_same("umoci's", &ours(&host, &format!("oci:{shared}/chunked:1")), &umocis(&[&low, &high], PAX));
}

#[test]
fn a_user_has_the_same_tree_but_for_owners_and_devices() {
    let dir = temporary();
    let (low, high) = two_trees(dir.path());
    let base = image("busybox", "root");
    let mut layout = Layout::new();
    for tree in [&base, &low, &high] {
        layout.add(tree, PAX);
    }
    let reference = format!("oci:{}:1", layout.write().display());
    let host = TestHost::new("t4");
    // /var itself has gpurun's /var/tmp, made at the start.
    let script = "cd /; find bin/tool bin/tool-too empty home hole l run sparse var/lib -exec stat -c '%n %F %a %s %Y %h' {} + | sort
                  sha256sum bin/tool sparse var/lib/many/2; for link in home/twice home/link hole; do readlink $link; done";
    let seen = |caller| host.ok(caller, "-u 0", &reference, script);
    let (root, user) = (seen(Caller::Root), seen(Caller::User));
    let ours = |text: &str| -> Vec<String> {
        // A user's directories are open to himself, and devices are nobody's to make.
        let lines = text.lines().filter(|line| !line.contains("home/disk"));
        lines.map(|line| line.replace("run/closed directory 0 ", "run/closed directory 700 ")).collect()
    };
    assert!(root.contains("home/disk block special file"), "{root}");
    assert_eq!(ours(&user), ours(&root));
}
