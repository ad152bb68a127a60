//! Images from a registry: Debian's docker-registry, plain and with TLS and passwords, and a proxy that breaks what it passes on.

use gpurun_integration::{
    Caller, Ended, SpawnPiped, TestHost, certificates, dist, finish, must, processes_with,
    registry::{Fault, Packed, Proxy, Registry, Request, tunnel},
    run, temporary, unique, until,
};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};
use tempfile::TempDir;

struct Served {
    registry: Registry,
    storage: TempDir,
}

fn registry() -> Served {
    let storage = temporary();
    Served { registry: Registry::plain(storage.path()), storage }
}

fn pull(host: &TestHost, caller: Caller, options: &[&str], image: &str) -> Ended {
    run(host.gpurun_of(caller).arg("pull").args(options).arg(image))
}

fn pulled(host: &TestHost, caller: Caller, image: &str) {
    let ended = pull(host, caller, &[], image);
    assert_eq!(ended.code, 0, "{image}: {ended:?}");
}

/// Every image in the store is good, and nothing else is in it.
fn intact(host: &TestHost, caller: Caller) {
    let ended = run(host.gpurun_of(caller).args(["images", "--verify"]));
    assert_eq!(ended.code, 0, "{ended:?}");
    let left: Vec<_> = fs::read_dir(host.store(caller.uid()).join("tmp")).unwrap().flatten().collect();
    assert!(left.iter().all(|one| one.file_name().to_string_lossy().ends_with(".lock")), "{left:?}");
    assert_eq!(kept(host, caller, ""), 0, "parts of layers");
}

/// So many bytes of these blobs, all if the name is empty, wait for the next pull.
fn kept(host: &TestHost, caller: Caller, digest: &str) -> u64 {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let name = digest.trim_start_matches("sha256:");
    entries(&host.store(caller.uid()).join("parts"))
        .filter(|blob| name.is_empty() || name.starts_with(&*blob.file_name().unwrap().to_string_lossy()))
        .flat_map(|blob| entries(&blob).collect::<Vec<_>>())
        .map(|file| file.metadata().unwrap().len())
        .sum()
}

fn fails(ended: &Ended, code: &str) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().filter(|line| line.starts_with("error")).count(), 1, "{ended:?}");
}

fn blobs(requests: &[Request]) -> usize {
    requests.iter().filter(|request| request.path.contains("/blobs/")).count()
}

/// Five layers of every form, and busybox.
fn five_layers() -> Packed {
    Packed::of("busybox", "gzip")
        .with_layer("a", 3 << 20, "tar")
        .with_layer("b", 2 << 20, "tar+gzip")
        .with_layer("c", 2 << 20, "tar+zstd")
        .with_layer("d", 1 << 20, "tar+gzip")
}

#[test]
fn the_main_job_runs_from_a_registry_into_an_empty_store_and_the_second_time_without_one() {
    let host = TestHost::with_driver("8xh100", 550, "debian");
    let served = registry();
    served.registry.push("team/ml", "1", &Packed::of("debian-python", "gzip"));
    let image = format!("{}/team/ml:1", served.registry.address);
    let script = "import ctypes, numpy, os\nctypes.CDLL('libcuda.so.1')\n\
                  print(numpy.arange(4).sum(), sum(n[6:].isdigit() for n in os.listdir('/dev') if n.startswith('nvidia')))";
    let job = |caller| {
        let ended = run(&mut host.command(caller, "--gpus all", &image, &["python3", "-c", script]));
        assert_eq!((ended.code, ended.out.as_str()), (0, "6 8\n"), "{ended:?}");
        let progress = |line: &str| line.starts_with("gpurun: pulling ");
        assert!(
            ended.err.lines().all(progress),
            "a line every few seconds where stderr is no terminal: {ended:?}"
        );
    };
    Caller::EACH.into_iter().for_each(job);
    drop(served);
    Caller::EACH.into_iter().for_each(job);
    for caller in Caller::EACH {
        intact(&host, caller);
        let ended = run(&mut host.command(caller, "--pull always", &image, &["true"]));
        fails(&ended, "GPU-0047");
    }
}

#[test]
fn every_form_of_an_image_comes_whole() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    let base = Packed::of("busybox", "gzip");
    registry.push("forms", "gzip", &base);
    registry.push("forms", "zstd", &Packed::of("busybox", "zstd"));
    registry.push("forms", "docker", &base.clone().as_docker());
    let digest = registry.push("forms", "layers", &five_layers());
    let mut index =
        json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []});
    for architecture in ["arm64", "amd64"] {
        let image = base.clone().edit(|config, _| {
            config["architecture"] = architecture.into();
            config["config"]["Env"] = json!([format!("FOR={architecture}")]);
        });
        let digest = registry.push("forms", architecture, &image);
        index["manifests"].as_array_mut().unwrap().push(json!({
            "mediaType": image.manifest()["mediaType"], "digest": digest, "size": image.manifest().to_string().len(),
            "platform": {"os": "linux", "architecture": architecture},
        }));
    }
    registry.put_manifest("forms", "index", &index);
    let address = &registry.address;
    for caller in Caller::EACH {
        for tag in ["gzip", "zstd", "docker", "index"] {
            let out = host.ok(caller, "", &format!("{address}/forms:{tag}"), "echo it runs $FOR");
            assert!(out == if tag == "index" { "it runs amd64\n" } else { "it runs\n" }, "{tag}: {out}");
        }
        for name in [format!("{address}/forms:layers"), format!("docker://{address}/forms@{digest}")] {
            let out = host.ok(caller, "", &name, "cd /; wc -c a b c d | tail -n 1");
            assert_eq!(out.trim(), format!("{} total", 8 << 20), "{name}");
        }
        fails(&pull(&host, caller, &[], &format!("{address}/forms:arm64")), "GPU-0045");
        fails(&pull(&host, caller, &[], &format!("{address}/forms:nothing")), "GPU-0041");
        fails(&pull(&host, caller, &[], &format!("{address}/nothing/at/all")), "GPU-0041");
        let ended = pull(&host, caller, &["--platform", "linux/arm64"], &format!("{address}/forms:index"));
        assert_eq!(ended.code, 0, "{ended:?}");
        // The other machine's image does not take the place of ours.
        assert_eq!(host.ok(caller, "", &format!("{address}/forms:index"), "echo $FOR"), "amd64\n");
        intact(&host, caller);
    }
}

#[test]
fn a_digest_that_is_not_the_manifests_is_refused() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    let digest = registry.push("a", "1", &Packed::of("busybox", "gzip"));
    let other = registry.push("a", "2", &Packed::of("busybox", "zstd"));
    let manifest = Packed::of("busybox", "zstd").manifest().to_string();
    let proxy = Proxy::before(&registry, move |request| {
        if request.path.ends_with(&digest) {
            let kind = "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n";
            return Fault::Answer(200, kind.into(), manifest.clone());
        }
        Fault::Pass
    });
    let digest = Packed::of("busybox", "gzip").manifest().to_string();
    let digest = gpurun::image::Digest::of(digest.as_bytes());
    fails(&pull(&host, Caller::Root, &[], &format!("{}/a@{digest}", proxy.address)), "GPU-0043");
    pulled(&host, Caller::Root, &format!("{}/a@{other}", proxy.address));
    intact(&host, Caller::Root);
}

#[test]
fn tls_is_checked_and_credentials_are_found_where_docker_and_podman_keep_them() {
    let host = TestHost::new("t4");
    let Served { registry: plain, storage } = registry();
    plain.push("team/ml", "1", &Packed::of("busybox", "gzip"));
    let (ours, others) = (certificates(), certificates());
    let passwords = ours.path().join("passwords");
    must(Command::new("htpasswd").args(["-Bbc"]).arg(&passwords).args(["me", "secret"]));
    let guarded = Registry::guarded(
        storage.path(),
        &ours.path().join("tls.crt"),
        &ours.path().join("tls.key"),
        &passwords,
    );
    let address = &guarded.address;
    let image = format!("{address}/team/ml:1");
    for caller in Caller::EACH {
        let home = must(host.gpurun_of(caller).args(["config"]));
        assert!(!home.is_empty());
        let home = host.store(caller.uid()).with_file_name(format!("home-{}", caller.uid()));
        let write = |path: &str, text: &[u8]| {
            let path = home.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let again = |expected: &str| {
            run(host.gpurun_of(caller).args(["rmi", &image]));
            let mut command = host.gpurun_of(caller);
            command.args(["pull", &image]).env("PATH", format!("{}:/usr/bin:/bin", home.display()));
            let ended = run(&mut command);
            if expected == "good" {
                assert_eq!(ended.code, 0, "{ended:?}");
            } else {
                fails(&ended, expected);
            }
            ended.err
        };
        let authority = format!(".config/containers/certs.d/{address}/ca.crt");
        // This machine's own registry is believed; one with an authority of its own is checked all the same.
        again("GPU-0048");
        write(&authority, &fs::read(others.path().join("ca.crt")).unwrap());
        assert!(again("GPU-0047").contains("certificate"), "the cause is named");
        write(&authority, &fs::read(ours.path().join("ca.crt")).unwrap());
        let message = again("GPU-0048");
        assert!(message.contains(&format!("docker login {address}")), "{message}");
        // me:wrong, me:secret
        let docker = |auth: &str| json!({"auths": {address: {"auth": auth}}}).to_string();
        let config = write(".docker/config.json", docker("bWU6d3Jvbmc=").as_bytes());
        again("GPU-0048");
        write(".docker/config.json", docker("bWU6c2VjcmV0").as_bytes());
        again("good");
        assert_eq!(host.ok(caller, "", &image, "echo it runs"), "it runs\n");
        fs::remove_file(&config).unwrap();
        again("GPU-0048");
        let helper = "#!/bin/sh\nread -r address\n[ \"$1 $address\" = \"get ADDRESS\" ] || { echo credentials not found in native keychain; exit 1; }\n\
                      echo '{\"ServerURL\": \"x\", \"Username\": \"me\", \"Secret\": \"secret\"}'\n";
        let helper = write("docker-credential-test", helper.replace("ADDRESS", address).as_bytes());
        fs::set_permissions(helper, fs::Permissions::from_mode(0o755)).unwrap();
        for file in [json!({"credHelpers": {address: "test"}}), json!({"credsStore": "test"})] {
            write(".docker/config.json", file.to_string().as_bytes());
            again("good");
        }
        write(".docker/config.json", b"{");
        again("GPU-0048");
        fs::remove_file(&config).unwrap();
        intact(&host, caller);
    }
}

#[test]
fn tokens_are_had_where_the_registry_says() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &Packed::of("busybox", "gzip"));
    let tokens = Proxy::before(&registry, |request| {
        // With a name and a password, or posted with a token of `docker login`; else as anybody.
        let known =
            request.authorization.as_deref() == Some("Basic bWU6c2VjcmV0") || request.path == "/token";
        let whole = request.path.contains("service=tests") && request.path.contains("pull");
        let token = if known { "private" } else { "public" };
        if !whole && !known {
            return Fault::Answer(400, String::new(), String::new());
        }
        Fault::Answer(200, String::new(), json!({ "token": token }).to_string())
    });
    let realm = tokens.address.clone();
    let wanted = Arc::new(AtomicBool::new(false));
    let private = Arc::clone(&wanted);
    let proxy = Proxy::before(&registry, move |request| {
        let token = if private.load(Ordering::Relaxed) { "Bearer private" } else { "Bearer public" };
        if request.authorization.as_deref() == Some(token) {
            return Fault::Pass;
        }
        let challenge = format!(
            "WWW-Authenticate: Bearer realm=\"http://{realm}/token\",service=\"tests\",scope=\"repository:ml:pull\"\r\n"
        );
        Fault::Answer(401, challenge, String::new())
    });
    let image = format!("{}/ml:1", proxy.address);
    pulled(&host, Caller::Root, &image);
    wanted.store(true, Ordering::Relaxed);
    fails(&pull(&host, Caller::Root, &[], &image), "GPU-0048");
    let file = temporary();
    let path = file.path().join("auth.json");
    fs::write(
        &path,
        json!({"auths": {format!("{}/ml", proxy.address): {"auth": "bWU6c2VjcmV0"}}}).to_string(),
    )
    .unwrap();
    let with_file = || {
        let ended = run(host.gpurun().args(["pull", &image]).env("REGISTRY_AUTH_FILE", &path));
        assert_eq!(ended.code, 0, "{ended:?}");
        intact(&host, Caller::Root);
    };
    with_file();
    fs::write(&path, json!({"auths": {&proxy.address: {"identitytoken": "T"}}}).to_string()).unwrap();
    with_file();
    assert!(tokens.requests().iter().any(|request| request.path == "/token"));
}

#[test]
fn another_server_that_has_the_blobs_is_followed_to_without_our_token() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &five_layers());
    let elsewhere =
        Proxy::before(
            &registry,
            |request| if request.before == 0 { Fault::Cut(50_000) } else { Fault::Pass },
        );
    let other = elsewhere.address.clone();
    let proxy = Proxy::before(&registry, move |request| {
        if request.authorization.as_deref() != Some("Basic bWU6c2VjcmV0") {
            return Fault::Answer(401, "WWW-Authenticate: Basic realm=\"x\"\r\n".into(), String::new());
        }
        if request.path.contains("/blobs/") {
            return Fault::Answer(
                307,
                format!("Location: http://{other}{}\r\n", request.path),
                String::new(),
            );
        }
        Fault::Pass
    });
    let file = temporary();
    let path = file.path().join("auth.json");
    fs::write(&path, json!({"auths": {&proxy.address: {"auth": "bWU6c2VjcmV0"}}}).to_string()).unwrap();
    let image = format!("{}/ml:1", proxy.address);
    let ended = run(host.gpurun().args(["pull", &image]).env("REGISTRY_AUTH_FILE", &path));
    assert_eq!(ended.code, 0, "{ended:?}");
    let asked = elsewhere.requests();
    assert!(asked.len() > 5 && asked.iter().all(|request| request.authorization.is_none()), "{asked:?}");
    intact(&host, Caller::Root);
}

#[test]
fn a_proxy_of_the_network_is_obeyed() {
    let host = TestHost::new("t4");
    let Served { registry: plain, storage } = registry();
    plain.push("team/ml", "1", &Packed::of("busybox", "gzip"));
    let files = certificates();
    let passwords = files.path().join("passwords");
    must(Command::new("htpasswd").args(["-Bbc"]).arg(&passwords).args(["me", "secret"]));
    let guarded = Registry::guarded(
        storage.path(),
        &files.path().join("tls.crt"),
        &files.path().join("tls.key"),
        &passwords,
    );
    let (address, connects) = tunnel(guarded.address.clone());
    let config = files.path().join("config.toml");
    fs::write(&config, "insecure-registries = [\"registry.invalid\"]").unwrap();
    let auth = files.path().join("auth.json");
    fs::write(&auth, r#"{"auths": {"registry.invalid": {"auth": "bWU6c2VjcmV0"}}}"#).unwrap();
    let pull = |key: &str, value: &str| {
        let mut command = host.gpurun();
        command.arg("--config").arg(&config).args(["pull", "registry.invalid/team/ml:1"]);
        run(command
            .env("REGISTRY_AUTH_FILE", &auth)
            .env("HTTPS_PROXY", format!("http://{address}"))
            .env(key, value))
    };
    let ended = pull("NO_PROXY", "registry.other");
    assert_eq!(ended.code, 0, "{ended:?}");
    let seen = connects.lock().unwrap().clone();
    assert!(
        !seen.is_empty() && seen.iter().all(|line| line.starts_with("CONNECT registry.invalid:443 ")),
        "{seen:?}"
    );
    fails(&pull("NO_PROXY", "registry.invalid"), "GPU-0047");
    fs::write(&config, "").unwrap();
    let ended = pull("NO_PROXY", "registry.other");
    fails(&ended, "GPU-0047");
    assert!(ended.err.contains("certificate"), "{ended:?}");
}

#[test]
fn what_a_network_does_ends_in_the_image_or_in_one_error() {
    let Served { registry, storage: _storage } = registry();
    let packed = five_layers();
    registry.push("ml", "1", &packed);
    let big = packed.blob(1);
    let first = move |request: &Request, count: usize| request.path.ends_with(&big) && request.before < count;
    let busy = |seconds: u32| Fault::Answer(429, format!("Retry-After: {seconds}\r\n"), String::new());
    let broken = Fault::Answer(500, String::new(), r#"{"errors":[{"message":"disk on fire"}]}"#.into());
    // (what happens to the large blob, how often, how it ends)
    for (fault, count, end) in [
        (Fault::Cut(1 << 20), 2, ""),
        (Fault::Cut(0), 3, ""),
        // Always, but with progress each time.
        (Fault::Cut(700_000), 99, ""),
        (Fault::Cut(10), 99, "GPU-0047"),
        (Fault::Drop, 2, ""),
        (Fault::Drop, 99, "GPU-0047"),
        (busy(1), 2, ""),
        (busy(3600), 1, "GPU-0047"),
        (broken.clone(), 2, ""),
        (broken, 99, "GPU-0047"),
        (Fault::Answer(404, String::new(), String::new()), 99, "GPU-0042"),
        (Fault::Answer(200, String::new(), "something else".into()), 99, "GPU-0042"),
        (Fault::Garble, 99, "GPU-0043"),
        (Fault::Slow(64 << 10), 99, ""),
        (Fault::Hang, 1, ""),
    ] {
        let host = TestHost::new("t4");
        let (what, first) = (fault.clone(), first.clone());
        let well = Arc::new(AtomicBool::new(false));
        let healed = Arc::clone(&well);
        let proxy = Proxy::before(&registry, move |request| {
            if first(request, count) && !healed.load(Ordering::Relaxed) { fault.clone() } else { Fault::Pass }
        });
        let image = format!("{}/ml:1", proxy.address);
        let ended = pull(&host, Caller::Root, &[], &image);
        if end.is_empty() {
            assert_eq!(ended.code, 0, "{what:?}: {ended:?}");
            intact(&host, Caller::Root);
        } else {
            fails(&ended, end);
            well.store(true, Ordering::Relaxed);
            pulled(&host, Caller::Root, &image);
        }
        if matches!(what, Fault::Cut(1_048_576) | Fault::Hang) {
            let ranges: Vec<_> = proxy.requests().into_iter().filter_map(|request| request.range).collect();
            assert!(
                !ranges.is_empty() && ranges.iter().all(|range| range != "bytes=0-"),
                "{what:?}: {ranges:?}"
            );
        }
        assert_eq!(host.ok(Caller::Root, "", &image, "wc -c < /a"), format!("{}\n", 3 << 20), "{what:?}");
        intact(&host, Caller::Root);
    }
}

/// A layer of nine pieces that takes longer to inflate than to send, and busybox.
fn large() -> Packed {
    Packed::of("busybox", "gzip").with_layer("a", 92 << 20, "tar+gzip")
}

#[test]
fn a_large_layer_comes_in_pieces_whatever_the_network_does() {
    const THIRD: u64 = 32 << 20;
    let Served { registry, storage: _storage } = registry();
    let packed = large();
    registry.push("ml", "1", &packed);
    let (large, size) = (packed.blob(1), packed.layers[1].data.len() as u64);
    let mut changed = packed.layers[1].data.clone();
    changed[40 << 20] ^= 1;
    let (changed, shorter) =
        (registry.put_blob("ml", &changed), registry.put_blob("ml", &changed[..40 << 20]));
    let busy = Fault::Answer(429, "Retry-After: 1\r\n".into(), String::new());
    // (what happens, to requests from this byte on, how often, how it ends)
    let faults = [
        (Fault::Pass, 0, 0, ""),
        // Ranges are never understood; once they are not.
        (Fault::Whole, 0, 99, ""),
        (Fault::Whole, THIRD, 1, ""),
        (Fault::Half, 0, 99, ""),
        (Fault::Shifted, THIRD, 1, "GPU-0042"),
        (Fault::Cut(9 << 20), THIRD, 1, ""),
        (Fault::Cut(6 << 20), 0, 99, ""),
        (Fault::Slow(64 << 10), THIRD, 1, ""),
        (Fault::Cut(10), THIRD, 99, "GPU-0047"),
        (Fault::Drop, 0, 2, ""),
        (busy, THIRD, 1, ""),
        (Fault::Garble, THIRD, 1, "GPU-0043"),
        // Another blob than the one that the first pieces were of.
        (Fault::Other(changed), THIRD, 99, "GPU-0043"),
        (Fault::Other(shorter), THIRD, 99, "GPU-0042"),
    ];
    // A network that is slower than who reads, and one that is quicker, on which all but the first piece is one request.
    for (healthy, (fault, from, count, end)) in [Fault::Slow(256 << 10), Fault::Pass]
        .into_iter()
        .flat_map(|healthy| faults.iter().cloned().map(move |fault| (healthy.clone(), fault)))
    {
        let host = TestHost::new("t4");
        let (what, blob) = (format!("{fault:?} on {healthy:?}"), large.clone());
        let slow = healthy != Fault::Pass;
        let (from, whole, alone) = (if slow { from } else { from.min(1) }, fault == Fault::Whole, count == 0);
        let slows = matches!(fault, Fault::Slow(_));
        let left = Arc::new(AtomicUsize::new(count));
        let faults = Arc::clone(&left);
        let proxy = Proxy::before(&registry, move |request| {
            let hit =
                request.path.ends_with(&blob) && request.bytes().is_some_and(|range| range.start >= from);
            let spent =
                || faults.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if hit && spent().is_ok() { fault.clone() } else { healthy.clone() }
        });
        let image = format!("{}/ml:1", proxy.address);
        let ended = pull(&host, Caller::Root, &[], &image);
        let mut asked: Vec<_> = proxy
            .requests()
            .iter()
            .filter(|request| request.path.ends_with(&large))
            .map(|request| request.bytes().expect("a range"))
            .collect();
        asked.sort_by_key(|range| range.start);
        if end.is_empty() {
            assert_eq!(ended.code, 0, "{what}: {ended:?}");
        } else {
            fails(&ended, end);
            left.store(0, Ordering::SeqCst);
            pulled(&host, Caller::Root, &image);
        }
        if slow && alone {
            assert_eq!(asked.len(), 9, "{asked:?}");
            assert!(asked.windows(2).all(|pair| pair[0].end == pair[1].start), "{asked:?}");
            assert_eq!((asked[0].start, asked[8].end), (0, size));
        }
        if !slow && alone {
            assert_eq!(asked.len(), 2, "the first piece, and the rest: {asked:?}");
        }
        if slows {
            let first = asked.iter().filter(|range| range.start < 16 << 20).count();
            assert_eq!(first, 2, "what was read already is not fetched again: {asked:?}");
        }
        if whole && from == 0 {
            assert!(asked.len() <= 2, "one connection brings all: {asked:?}");
        }
        assert_eq!(host.ok(Caller::Root, "", &image, "wc -c < /a"), format!("{}\n", 92 << 20), "{what}");
        intact(&host, Caller::Root);
    }
}

/// What a pull leaves behind that is killed in the middle of this layer.
fn killed_halfway(host: &TestHost, caller: Caller, image: &str, blob: &str, size: u64) {
    let mark = unique();
    let mut command = host.gpurun_of(caller);
    let mut child = command.args(["pull", image]).env("MARK", &mark).spawn_piped();
    until("a third of the layer", || kept(host, caller, blob) > size / 3);
    child.kill().unwrap();
    child.wait().unwrap();
    until("the end of gpurun-pull", || processes_with(&mark).is_empty());
}

#[test]
fn what_came_before_a_kill_is_not_fetched_again() {
    let Served { registry, storage: _storage } = registry();
    for (tag, packed) in
        [("large", large()), ("small", Packed::of("busybox", "gzip").with_layer("b", 9 << 20, "tar"))]
    {
        registry.push("ml", tag, &packed);
        let (blob, size) = (packed.blob(1), packed.layers[1].data.len() as u64);
        let proxy = Proxy::before(&registry, |_| Fault::Slow(128 << 10));
        let image = format!("{}/ml:{tag}", proxy.address);
        for caller in Caller::EACH {
            let host = TestHost::new("t4");
            killed_halfway(&host, caller, &image, &blob, size);
            let (there, asked) = (kept(&host, caller, &blob), proxy.requests().len());
            pulled(&host, caller, &image);
            let ranges =
                proxy.requests().split_off(asked).into_iter().filter(|request| request.path.ends_with(&blob));
            let again: u64 = ranges
                .map(|request| request.bytes().expect("a range"))
                .map(|range| range.end - range.start)
                .sum();
            assert_eq!(again, size - there, "{tag}: {there} of {size} bytes were there");
            intact(&host, caller);
        }
        // After a power cut the files may hold anything.
        let host = TestHost::new("t4");
        killed_halfway(&host, Caller::Root, &image, &blob, size);
        let parts = fs::read_dir(host.store(0).join("parts")).unwrap().flatten();
        for file in parts.flat_map(|blob| fs::read_dir(blob.path()).unwrap()).flatten() {
            let length = file.metadata().unwrap().len();
            fs::write(file.path(), vec![0; usize::try_from(length).unwrap()]).unwrap();
        }
        pulled(&host, Caller::Root, &image);
        intact(&host, Caller::Root);
        must(host.gpurun().args(["rmi", &image]));
        killed_halfway(&host, Caller::Root, &image, &blob, size);
        must(host.gpurun().arg("prune"));
        assert_eq!(kept(&host, Caller::Root, ""), 0);
    }
}

#[test]
fn a_manifest_is_asked_for_again_too() {
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &Packed::of("busybox", "gzip"));
    for fault in [
        Fault::Drop,
        Fault::Cut(100),
        Fault::Answer(503, String::new(), String::new()),
        Fault::Answer(429, "Retry-After: 1\r\n".into(), String::new()),
    ] {
        let host = TestHost::new("t4");
        let proxy = Proxy::before(&registry, move |request| {
            if request.path.contains("/manifests/") && request.before < 2 {
                fault.clone()
            } else {
                Fault::Pass
            }
        });
        pulled(&host, Caller::Root, &format!("{}/ml:1", proxy.address));
    }
}

#[test]
fn the_second_start_reads_one_directory_and_three_files_of_the_store_and_opens_its_layers() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &five_layers());
    let image = format!("{}/ml:1", registry.address);
    host.ok(Caller::Root, "", &image, "true");
    let calls = temporary();
    let calls = calls.path().join("calls");
    let start = host.command(Caller::Root, "", &image, &["true"]);
    let mut traced = Command::new("strace");
    traced.args(["-f", "-y", "-s", "0", "-o"]).arg(&calls).arg(start.get_program()).args(start.get_args());
    for (name, value) in start.get_envs() {
        value.map(|value| traced.env(name, value));
    }
    must(&mut traced);
    let calls = fs::read_to_string(calls).unwrap();
    let store = host.store(0).display().to_string();
    // What the container writes, and what is read of the image itself, is no work on the store.
    let (scratch, content) = (format!("{store}/scratch"), format!("{store}/layers/"));
    let own = |line: &&str| {
        let inside = line.split_once(&content).is_some_and(|(_, rest)| rest[32..].starts_with('/'));
        line.contains(&store) && !line.contains(&scratch) && !line.contains("\"scratch") && !inside
    };
    let of = |names: &[&str]| -> Vec<&str> {
        let called = |line: &&str| {
            let call = line.split_whitespace().nth(1).unwrap_or_default();
            names.iter().any(|name| call.starts_with(&format!("{name}(")))
        };
        calls.lines().filter(own).filter(called).collect()
    };
    let listed = of(&["getdents64"]);
    assert!(
        !listed.is_empty() && listed.iter().all(|line| line.contains(&format!("<{store}/tmp>"))),
        "{listed:#?}"
    );
    for (directory, times) in [("images/", 1), ("blobs/", 1), ("stacks/", 1), ("parts", 0), ("layers/", 5)] {
        let opened = of(&["openat"]);
        let opened = opened.iter().filter(|line| line.contains(&format!("<{store}>, \"{directory}"))).count();
        assert_eq!(opened, times, "{directory}");
    }
    // One call for each file: the image's record, its configuration, and how its layers are put together.
    assert_eq!(of(&["read", "pread64"]).len(), 3, "{:#?}", of(&["read", "pread64"]));
    let changed = of(&[
        "write",
        "pwrite64",
        "mkdirat",
        "mkdir",
        "renameat",
        "renameat2",
        "unlinkat",
        "fsync",
        "syncfs",
    ]);
    // A sweeper may remove free locks while the container runs.
    let changed: Vec<_> = changed.into_iter().filter(|line| !line.contains(".lock\"")).collect();
    assert_eq!(changed, Vec::<&str>::new());
}

#[test]
fn eight_at_once_fetch_each_blob_once() {
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let Served { registry, storage: _storage } = registry();
        let packed = five_layers();
        registry.push("ml", "1", &packed);
        let proxy = Proxy::before(&registry, |_| Fault::Slow(256 << 10));
        let image = format!("{}/ml:1", proxy.address);
        let started: Vec<_> = (0..8)
            .map(|_| host.command(caller, "", &image, &["sh", "-c", "cat /a /b /c /d | wc -c"]).spawn_piped())
            .collect();
        for child in started {
            let ended = finish(child);
            assert_eq!((ended.code, ended.out.trim()), (0, (8 << 20).to_string().as_str()), "{ended:?}");
        }
        for layer in 0..packed.layers.len() {
            assert_eq!(proxy.count(&packed.blob(layer)), 1, "{:?}", proxy.requests());
        }
        assert_eq!(blobs(&proxy.requests()), packed.layers.len() + 1, "the configuration, too");
        intact(&host, caller);
    }
}

#[test]
fn killed_anywhere_the_next_pull_succeeds() {
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &five_layers());
    let proxy = Proxy::before(&registry, |_| Fault::Slow(256 << 10));
    let image = format!("{}/ml:1", proxy.address);
    let host = TestHost::new("t4");
    for moment in 0..50 {
        let mut child = host.gpurun().args(["pull", &image]).stdout(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(7 * moment));
        child.kill().unwrap();
        child.wait().unwrap();
        if moment % 10 == 9 {
            pulled(&host, Caller::Root, &image);
            intact(&host, Caller::Root);
            must(host.gpurun().args(["rmi", &image]));
        }
    }
    pulled(&host, Caller::Root, &image);
    assert_eq!(host.ok(Caller::Root, "", &image, "cat /a /b /c /d | wc -c"), format!("{}\n", 8 << 20));
    intact(&host, Caller::Root);
}

#[test]
fn who_fetches_goes_with_the_one_who_wants_it() {
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &Packed::of("busybox", "gzip"));
    let layer = Packed::of("busybox", "gzip").blob(0);
    let hung = layer.clone();
    let proxy = Proxy::before(&registry, move |request| {
        if request.path.ends_with(&hung) && request.before == 0 { Fault::Hang } else { Fault::Pass }
    });
    let (host, mark) = (TestHost::new("t4"), unique());
    let mut command = host.gpurun();
    let mut child =
        command.args(["pull", &format!("{}/ml:1", proxy.address)]).env("MARK", &mark).spawn_piped();
    until("half of the layer", || proxy.count(&layer) == 1);
    assert_eq!(processes_with(&mark).len(), 2);
    child.kill().unwrap();
    child.wait().unwrap();
    until("the end of gpurun-pull", || processes_with(&mark).is_empty());
    // By itself it would have asked again.
    assert_eq!(proxy.count(&layer), 1);
}

#[test]
fn no_layer_is_fetched_for_a_host_that_cannot_run_it_or_keep_it() {
    let host = TestHost::new("old-driver");
    let Served { registry, storage: _storage } = registry();
    let packed = Packed::of("cuda-99", "gzip");
    registry.push("cuda", "99", &packed);
    let large = Packed::of("busybox", "gzip").with_layer("a", 12 << 20, "tar+gzip");
    registry.push("large", "1", &large);
    let proxy = Proxy::before(&registry, |_| Fault::Pass);
    for caller in Caller::EACH {
        host.refused(caller, "--gpus all", &format!("{}/cuda:99", proxy.address), "GPU-0030");
    }
    assert_eq!(proxy.count(&packed.blob(0)), 0);
    let store = host.store(0);
    let script =
        format!("mount -t tmpfs -o size=8m none {0} && chmod 700 {0} && exec \"$@\"", store.display());
    let mut command = Command::new("unshare");
    let full = must(host.gpurun().arg("config"));
    assert!(full.contains("registry-mirrors"));
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(dist("gpurun"));
    command.args(["pull", &format!("{}/large:1", proxy.address)]);
    command.env("GPURUN_STORE", &store).env("HOME", host.store(0).with_file_name("home-0"));
    let ended = run(&mut command);
    fails(&ended, "GPU-0049");
    assert_eq!((proxy.count(&large.blob(0)), proxy.count(&large.blob(1))), (0, 0));
}

#[test]
fn layers_in_use_stay_and_others_go() {
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let Served { registry, storage: _storage } = registry();
        let base = Packed::of("busybox", "gzip");
        registry.push("one", "1", &base.clone().with_layer("a", 1 << 20, "tar"));
        registry.push("two", "1", &base.with_layer("b", 1 << 20, "tar"));
        let (one, two) = (format!("{}/one:1", registry.address), format!("{}/two:1", registry.address));
        pulled(&host, caller, &one);
        pulled(&host, caller, &two);
        let layers = || fs::read_dir(host.store(caller.uid()).join("layers")).unwrap().count();
        assert_eq!(layers(), 3);
        let script = "echo ready; until [ -e /tmp/go ]; do sleep 0.01; done; wc -c < /a";
        let go = temporary();
        fs::set_permissions(go.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let options = format!("-v {}:/tmp", go.path().display());
        let mut child = host.command(caller, &options, &one, &["sh", "-c", script]).spawn_piped();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let out = must(host.gpurun_of(caller).args(["rmi", &one]));
        assert!(out.starts_with("0 layers removed, 0 MiB freed\n1 more are in use"), "{out}");
        assert_eq!(layers(), 3);
        fs::write(go.path().join("go"), "").unwrap();
        let ended = finish(child);
        assert_eq!((ended.code, ended.out.trim()), (0, "1048576"), "{ended:?}");
        assert_eq!(must(host.gpurun_of(caller).arg("prune")), "1 layers removed, 1 MiB freed\n");
        assert_eq!(layers(), 2);
        assert_eq!(host.ok(caller, "", &two, "wc -c < /b"), "1048576\n");
        fails(&run(&mut host.command(caller, "--pull never", &one, &["true"])), "GPU-0041");
        fails(&run(host.gpurun_of(caller).args(["rmi", &one])), "GPU-0041");
        // A layer that is lost is found missing, and comes again.
        fs::rename(
            fs::read_dir(host.store(caller.uid()).join("layers")).unwrap().next().unwrap().unwrap().path(),
            go.path().join("away"),
        )
        .unwrap();
        let ended = run(host.gpurun_of(caller).args(["images", "--verify"]));
        assert!(ended.code == 1 && ended.out.contains("is not there"), "{ended:?}");
        fails(&run(&mut host.command(caller, "--pull never", &two, &["true"])), "GPU-0041");
        assert_eq!(host.ok(caller, "", &two, "wc -c < /b"), "1048576\n");
        intact(&host, caller);
    }
}

#[test]
fn a_tag_that_moved_is_seen_when_the_registry_is_asked() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    let say = |word: &str| {
        Packed::of("busybox", "gzip")
            .edit(|config, _| config["config"]["Env"] = json!([format!("WORD={word}")]))
    };
    registry.push("ml", "1", &say("old"));
    let proxy = Proxy::before(&registry, |_| Fault::Pass);
    let image = format!("{}/ml:1", proxy.address);
    let word = |options: &str| host.ok(Caller::Root, options, &image, "echo $WORD");
    assert_eq!(word(""), "old\n");
    registry.push("ml", "1", &say("new"));
    let asked = proxy.requests().len();
    assert_eq!(
        (word(""), word("--pull never"), word("--pull missing")),
        ("old\n".into(), "old\n".into(), "old\n".into())
    );
    assert_eq!(proxy.requests().len(), asked, "the second start asks nobody");
    assert_eq!(word("--pull always"), "new\n");
    let later = proxy.requests();
    assert!(later[asked..].iter().all(|request| !request.path.ends_with(&say("old").blob(0))), "{later:?}");
    assert_eq!(word("--pull always"), "new\n");
    assert_eq!(blobs(&proxy.requests()), blobs(&later), "the same image again is a manifest, and no blob");
}

#[test]
fn mirrors_are_asked_first_and_the_configuration_says_who_is_insecure() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    registry.push("library/ml", "1", &Packed::of("busybox", "gzip"));
    registry.push("library/ml", "2", &Packed::of("busybox", "gzip"));
    let healthy = Proxy::before(&registry, |_| Fault::Pass);
    let poor = Proxy::before(&registry, |request| {
        if request.path.ends_with("/1") {
            Fault::Answer(404, String::new(), String::new())
        } else {
            Fault::Pass
        }
    });
    let config = temporary();
    let path = config.path().join("config.toml");
    let mirrors = format!(
        "registry-mirrors = {{ \"docker.io\" = [\"http://{0}\"], \"registry.invalid\" = [\"http://{0}\"], \"{1}\" = [\"http://{0}\"] }}",
        poor.address, healthy.address
    );
    fs::write(&path, mirrors).unwrap();
    let pull = |image: &str| run(host.gpurun().arg("--config").arg(&path).args(["pull", image]));
    let ended = pull("ml:2");
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(healthy.requests().is_empty());
    // What the mirror lacks the host has.
    let ended = pull(&format!("{}/library/ml:1", healthy.address));
    assert_eq!(ended.code, 0, "{ended:?}");
    let ended = pull("registry.invalid/library/ml:1");
    fails(&ended, "GPU-0047");
    assert!(ended.err.contains("a mirror: "), "{ended:?}");
    fs::write(&path, "insecure-registries = \"no list\"").unwrap();
    fails(&pull("ml:2"), "GPU-0002");
}

#[test]
fn progress_is_an_object_a_line_where_it_is_asked_for() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    let packed = five_layers();
    registry.push("ml", "1", &packed);
    let proxy = Proxy::before(&registry, |_| Fault::Slow(32 << 10));
    let image = format!("{}/ml:1", proxy.address);
    let ended = pull(&host, Caller::Root, &["--progress", "json"], &image);
    let lines: Vec<Value> = ended.err.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let done: Vec<_> = lines.iter().filter(|line| line["done"] == true).collect();
    assert_eq!(done.len(), packed.layers.len(), "{ended:?}");
    assert!(done.iter().all(|line| line["bytes"] == line["size"]), "{ended:?}");
    assert!(lines.iter().any(|line| line["done"] == false), "{ended:?}");
    must(host.gpurun().args(["rmi", &image]));
    let ended = pull(&host, Caller::Root, &["--progress", "plain"], &image);
    let layers = ended.err.lines().filter(|line| line.starts_with("sha256:"));
    assert_eq!(layers.count(), packed.layers.len(), "{ended:?}");
    must(host.gpurun().args(["rmi", &image]));
    assert_eq!(pull(&host, Caller::Root, &["--progress", "none"], &image).err, "");
}

#[test]
fn memory_is_bounded_whatever_a_layers_size() {
    let host = TestHost::new("t4");
    let Served { registry, storage: _storage } = registry();
    registry.push("ml", "1", &Packed::of("busybox", "gzip").with_layer("a", 300 << 20, "tar"));
    let image = format!("{}/ml:1", registry.address);
    let mut child = host.gpurun().args(["pull", &image]).spawn_piped();
    let mut most = 0;
    until("the end of the pull", || {
        for id in fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))
            .unwrap_or_default()
            .split_whitespace()
        {
            let status = fs::read_to_string(Path::new("/proc").join(id).join("status")).unwrap_or_default();
            let peak = status
                .lines()
                .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
            most = most.max(peak.unwrap_or(0_u64));
        }
        child.try_wait().unwrap().is_some()
    });
    assert!(finish(child).code == 0 && most > 0 && most < 64 << 10, "{most} kB");
}
