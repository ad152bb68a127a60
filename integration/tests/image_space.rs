//! What images take, what they may take, and what happens when there is no more.

use gpurun_integration::{
    Caller, Ended, SpawnPiped, TestHost, finish, must,
    registry::{Fault, Packed, Proxy, Registry},
    run, temporary,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const MIB: usize = 1 << 20;

fn fails(ended: &Ended, code: &str) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().filter(|line| line.starts_with("error")).count(), 1, "{ended:?}");
}

/// What du(1) says of a directory, in bytes.
fn du(path: &Path) -> u64 {
    let out = must(Command::new("du").args(["-s", "--block-size=1"]).arg(path));
    out.split_whitespace().next().unwrap().parse().unwrap()
}

fn layers(host: &TestHost, caller: Caller) -> usize {
    fs::read_dir(host.store(caller.uid()).join("layers")).unwrap().count()
}

/// The images of a store are good, and nothing that is not finished is in it.
fn intact(mut verify: Command, store: &Path) {
    let ended = run(verify.args(["images", "--verify"]));
    assert!(ended.code == 0 || ended.out.contains("is not there"), "{ended:?}");
    assert!(!ended.out.contains("damaged") && !ended.out.contains("cannot be read"), "{ended:?}");
    let left: Vec<_> =
        fs::read_dir(store.join("tmp")).unwrap().flatten().map(|one| one.file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".lock")), "{left:?}");
}

#[test]
fn sizes_are_those_of_the_layers_and_what_prune_frees_is_told() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    let base = Packed::of("busybox", "gzip");
    let size = |packed: &Packed| packed.layers.iter().map(|layer| layer.data.len() as u64).sum::<u64>();
    let (one, two) =
        (base.clone().with_layer("a", 3 * MIB, "tar"), base.clone().with_layer("b", 2 * MIB, "tar"));
    registry.push("one", "1", &one);
    registry.push("two", "1", &two);
    let name = |image: &str| format!("{}/{image}:1", registry.address);
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let list = |options: &[&str]| -> Value {
            serde_json::from_str(&must(host.gpurun_of(caller).args(["--json", "images"]).args(options)))
                .unwrap()
        };
        must(host.gpurun_of(caller).args(["pull", &name("one")]));
        assert_eq!((&list(&[])[0]["size"], &list(&[])[0]["shared"]), (&size(&one).into(), &0.into()));
        must(host.gpurun_of(caller).args(["pull", &name("two")]));
        for listed in list(&[]).as_array().unwrap() {
            let packed = if listed["name"] == name("one") { &one } else { &two };
            assert_eq!((&listed["size"], &listed["shared"]), (&size(packed).into(), &size(&base).into()));
        }
        let usage = list(&["--usage"]);
        let store = host.store(caller.uid()).join("layers");
        let each: Vec<u64> = fs::read_dir(&store).unwrap().map(|layer| du(&layer.unwrap().path())).collect();
        assert_eq!(usage["total"], each.iter().sum::<u64>());
        let sum = |key: &str| {
            usage["images"].as_array().unwrap().iter().map(|one| one[key].as_u64().unwrap()).sum::<u64>()
        };
        assert_eq!(sum("size") - sum("shared") / 2, each.iter().sum::<u64>(), "{usage}");
        let text = must(host.gpurun_of(caller).args(["images", "--usage"]));
        assert!(text.lines().last().unwrap().contains("MiB for all layers in "), "{text}");
        assert_eq!(
            must(host.gpurun_of(caller).args(["rmi", &name("one")])),
            "1 layers removed, 3 MiB freed\n"
        );
        let rest = list(&["--usage"])["total"].as_u64().unwrap();
        assert!(
            rest < each.iter().sum::<u64>() - 3 * MIB as u64
                && rest == list(&["--usage"])["images"][0]["size"].as_u64().unwrap()
        );
    }
}

#[test]
fn a_pull_that_would_pass_the_quota_is_refused_before_its_first_layer() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    let base = Packed::of("busybox", "gzip");
    for (name, size) in [("one", 3), ("two", 3), ("last", 3)] {
        registry.push(name, "1", &base.clone().with_layer(name, size * MIB, "tar"));
    }
    let proxy = Proxy::before(&registry, |_| Fault::Slow(256 << 10));
    let name = |image: &str| format!("{}/{image}:1", proxy.address);
    let dir = temporary();
    let config = dir.path().join("config.toml");
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let gpurun = |words: &[&str]| {
            let mut command = host.gpurun_of(caller);
            command.arg("--config").arg(&config).args(words);
            command
        };
        // busybox takes 2 MB: one of the others fits, and a second does not.
        fs::write(&config, "store-quota = \"7m\"").unwrap();
        assert_eq!(run(&mut gpurun(&["pull", &name("one")])).code, 0);
        let asked = || proxy.requests().iter().filter(|request| request.path.contains("/two/blobs/")).count();
        let before = asked();
        let ended = run(&mut gpurun(&["pull", &name("two")]));
        fails(&ended, "GPU-0049");
        assert!(ended.err.contains("store-quota is 7 MB") && ended.err.contains("gpurun rmi"), "{ended:?}");
        // Its configuration came, its layer did not; and who runs it is told the same.
        assert_eq!((asked() - before, layers(&host, caller)), (1, 2));
        fails(&run(&mut gpurun(&["run", &name("two"), "true"])), "GPU-0049");
        assert_eq!(run(&mut gpurun(&["run", &name("one"), "true"])).code, 0, "what is there runs");
        // Layers that no image needs are worth a word: another tool took the record away.
        let records = host.store(caller.uid()).join("images");
        let record = fs::read_dir(&records)
            .unwrap()
            .map(|one| one.unwrap().path())
            .find(|path| fs::read_to_string(path).unwrap().contains("/one:1"));
        fs::remove_file(record.unwrap()).unwrap();
        let ended = run(&mut gpurun(&["pull", &name("two")]));
        fails(&ended, "GPU-0049");
        assert!(ended.err.contains("`gpurun prune` frees 4 MB"), "{ended:?}");
        assert_eq!(must(&mut gpurun(&["prune"])), "1 layers removed, 3 MiB freed\n");
        // Of two at once that have room one at a time, one comes.
        let children: Vec<_> =
            ["two", "last"].map(|image| gpurun(&["pull", &name(image)]).spawn_piped()).into_iter().collect();
        let mut codes: Vec<_> = children.into_iter().map(|child| finish(child).code).collect();
        codes.sort_unstable();
        assert_eq!((codes, layers(&host, caller)), (vec![0, 125], 2));
        // An archive is held to it as well.
        let oci = dir.path().join(format!("oci-{}", caller.uid()));
        must(
            Command::new("skopeo")
                .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"])
                .args([format!("docker://{}/one:1", registry.address), format!("oci:{}:1", oci.display())]),
        );
        fails(&run(&mut gpurun(&["pull", &format!("oci:{}:1", oci.display())])), "GPU-0049");
        fs::write(&config, "store-quota = \"16m\"").unwrap();
        assert_eq!(run(&mut gpurun(&["pull", &format!("oci:{}:1", oci.display())])).code, 0);
        assert!(must(&mut gpurun(&["images", "--usage"])).contains(" of 16 MiB for all layers"));
        intact(gpurun(&[]), &host.store(caller.uid()));
        fs::write(&config, "store-quota = \"much\"").unwrap();
        let ended = run(&mut gpurun(&["images"]));
        assert!(ended.code == 125 && ended.err.contains("store-quota"), "{ended:?}");
    }
}

/// A small filesystem in memory that goes with the value.
struct Small(PathBuf);

impl Small {
    fn at(path: PathBuf, caller: Caller, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        let options = format!("mode=700,uid={0},gid={0},{options}", caller.uid());
        must(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(&path));
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_fills_up_ends_a_pull_in_one_error_and_leaves_the_store_whole() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    // 200 MB of zeroes, in a few kB: nobody can know before.
    let dir = temporary();
    let swelling = dir.path().join("root");
    fs::create_dir(&swelling).unwrap();
    must(
        Command::new("dd")
            .args(["if=/dev/zero", "bs=1M", "count=200", "status=none"])
            .arg(format!("of={}", swelling.join("zeroes").display())),
    );
    let packed = gpurun_integration::pack(&swelling, &[]);
    let archives = packed.path().join("packed");
    registry.push("good", "1", &Packed::of("busybox", "gzip"));
    must(Command::new("skopeo").args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"]).args([
        format!("oci:{}:zstd", archives.join("oci").display()),
        format!("docker://{}/swells:1", registry.address),
    ]));
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let small = Small::at(host.store(caller.uid()), caller, "size=64m");
        must(host.gpurun_of(caller).args(["pull", &format!("{}/good:1", registry.address)]));
        for image in [
            format!("{}/swells:1", registry.address),
            format!("oci-archive:{}:gzip", archives.join("oci.tar").display()),
            format!("docker-archive:{}", archives.join("docker.tar.zst").display()),
        ] {
            let ended = run(host.gpurun_of(caller).args(["pull", &image]));
            fails(&ended, "GPU-0049");
            intact(host.gpurun_of(caller), &small.0);
        }
        assert_eq!(layers(&host, caller), 1);
        let good = format!("{}/good:1", registry.address);
        let ended = run(host.gpurun_of(caller).args(["run", "--read-only", &good, "echo", "it runs"]));
        assert_eq!((ended.code, ended.out.as_str()), (0, "it runs\n"), "{ended:?}");
    }
}

#[test]
fn an_archive_for_which_there_is_no_room_is_refused_before_its_first_layer() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    registry.push("large", "1", &Packed::of("busybox", "gzip").with_layer("a", 30 * MIB, "tar"));
    let dir = temporary();
    let oci = format!("oci:{}:1", dir.path().join("oci").display());
    must(
        Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"])
            .args([&format!("docker://{}/large:1", registry.address), &oci]),
    );
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let small = Small::at(host.store(caller.uid()), caller, "size=24m");
        for image in [&oci, &format!("{}/large:1", registry.address)] {
            let ended = run(host.gpurun_of(caller).args(["pull", image]));
            fails(&ended, "GPU-0049");
            assert!(ended.err.contains("MB, and there is room for"), "{ended:?}");
            assert_eq!(layers(&host, caller), 0, "nothing was begun");
        }
        intact(host.gpurun_of(caller), &small.0);
    }
}
