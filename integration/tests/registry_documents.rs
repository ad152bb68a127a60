//! Documents and responses of old and careless registries: whatever Go's programs accept is accepted, and whatever they
//! refuse is refused in one paragraph with a fix.

use gpurun_integration::{
    Caller, Ended, SpawnPiped, TestHost, must,
    registry::Packed,
    run,
    web::{Asked, Reply, Served, Web},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

fn busybox() -> Packed {
    Packed::of("busybox", "gzip")
}

fn pull(host: &TestHost, web: &Web) -> Ended {
    let image = format!("{}/ml:1", web.address);
    run(host.gpurun().args(["rmi", &image]));
    run(host.gpurun().args(["pull", &image]))
}

fn serving(served: Served) -> Web {
    Web::http().answering(move |asked| served.reply(asked))
}

fn refused(ended: &Ended, code: &str, words: &[&str]) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().count(), 3, "one paragraph with a fix: {ended:?}");
    assert!(!ended.err.contains('\u{fffd}') && !ended.err.contains("cause: error["), "{ended:?}");
    assert!(words.iter().all(|word| ended.err.contains(word)), "{words:?}: {ended:?}");
}

#[test]
fn a_configuration_is_an_images_by_the_types_that_docker_accepts() {
    let host = TestHost::new("t4");
    for kind in [
        json!("application/vnd.oci.image.config.v1+json"),
        json!("application/vnd.docker.container.image.v1+json"),
        json!("application/octet-stream"),
        json!("application/json"),
        json!("text/html"),
        json!("text/html; charset=utf-8"),
        json!(""),
        Value::Null,
    ] {
        let mut manifest = busybox().manifest();
        manifest["config"]["mediaType"] = kind.clone();
        if kind.is_null() {
            manifest["config"].as_object_mut().unwrap().remove("mediaType");
        }
        let web = serving(Served::with_manifest(&busybox(), &manifest.to_string()));
        let ended = pull(&host, &web);
        assert_eq!(ended.code, 0, "{kind}: {ended:?}");
        assert_eq!(host.ok(Caller::Root, "", &format!("{}/ml:1", web.address), "echo it runs"), "it runs\n");
    }
    for (kind, artifact, named) in [
        ("application/vnd.cncf.helm.config.v1+json", None, "application/vnd.cncf.helm.config.v1+json"),
        (
            "application/vnd.oci.empty.v1+json",
            Some("application/vnd.example.model"),
            "application/vnd.example.model",
        ),
        ("application/vnd.docker.plugin.v1+json", None, "plugin"),
    ] {
        let mut manifest = busybox().manifest();
        manifest["config"]["mediaType"] = kind.into();
        manifest["artifactType"] = json!(artifact);
        let web = serving(Served::with_manifest(&busybox(), &manifest.to_string()));
        refused(&pull(&host, &web), "GPU-0042", &[named, "not a container image", "oras pull"]);
    }
}

/// The same image with a different digest in each place.
fn in_sha512(packed: &Packed) -> (Served, Value) {
    let digest = |bytes: &[u8]| {
        let dir = gpurun_integration::temporary();
        fs::write(dir.path().join("x"), bytes).unwrap();
        let out = must(Command::new("sha512sum").arg(dir.path().join("x")));
        format!("sha512:{}", out.split(' ').next().unwrap())
    };
    let mut manifest = packed.manifest();
    let mut served = Served::of(packed);
    manifest["config"]["digest"] = digest(&packed.config).into();
    served.add_blob(&digest(&packed.config), &packed.config);
    for (i, layer) in packed.layers.iter().enumerate() {
        manifest["layers"][i]["digest"] = digest(&layer.data).into();
        served.add_blob(&digest(&layer.data), &layer.data);
    }
    let text = manifest.to_string();
    served.add("manifests/1", manifest["mediaType"].as_str().unwrap(), text.as_bytes());
    served.add(
        &format!("manifests/{}", digest(text.as_bytes())),
        manifest["mediaType"].as_str().unwrap(),
        text.as_bytes(),
    );
    (
        served,
        json!({"mediaType": manifest["mediaType"], "digest": digest(text.as_bytes()), "size": text.len()}),
    )
}

#[test]
fn digests_of_other_algorithms_are_read_where_they_are_needed() {
    let host = TestHost::new("t4");
    // A compressed layer and an uncompressed one.
    let (mut served, mut descriptor) = in_sha512(&busybox().with_layer("a", 1 << 20, "tar"));
    let digest = descriptor["digest"].as_str().unwrap().to_owned();
    descriptor["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let other = |digest: Value, size: Value| json!({"mediaType": descriptor["mediaType"], "digest": digest, "size": size, "platform": {"os": "linux", "architecture": "s390x"}});
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            other(json!("blake3:00"), json!(1)), other(json!("sha1:x"), json!(-1)), other(Value::Null, Value::Null),
            other(json!(""), json!(1)), descriptor,
        ],
    });
    served.add("manifests/1", "application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
    let web = serving(served);
    let ended = pull(&host, &web);
    assert_eq!(ended.code, 0, "{ended:?}");
    for name in [format!("{}/ml:1", web.address), format!("{}/ml@{digest}", web.address)] {
        assert_eq!(host.ok(Caller::Root, "", &name, "wc -c < /a"), "1048576\n", "{name}");
    }
    must(host.gpurun().args(["images", "--verify"]));
    // The selected image must have a supported digest.
    let mut index = index;
    index["manifests"][4]["digest"] = json!("blake3:00");
    let mut served = Served::of(&busybox());
    served.add("manifests/1", "application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
    refused(&pull(&host, &serving(served)), "GPU-0042", &["blake3:00", "sha512"]);
    // The bytes must match the digest.
    let (mut served, _) = in_sha512(&busybox());
    let (_, changed) = in_sha512(&busybox().edit(|config, _| config["author"] = json!("x")));
    served.add(
        &format!("manifests/{}", changed["digest"].as_str().unwrap()),
        "application/vnd.oci.image.manifest.v1+json",
        b"{}",
    );
    let web = serving(served);
    let ended = run(host
        .gpurun()
        .args(["pull", &format!("{}/ml@{}", web.address, changed["digest"].as_str().unwrap())]));
    refused(&ended, "GPU-0043", &["sha512:"]);
}

/// The manifest with other keys of its layer; `None` removes a key.
fn with_layer(manifest: &Value, keys: &[(&str, Option<Value>)]) -> String {
    let mut manifest = manifest.clone();
    let layer = manifest["layers"][0].as_object_mut().unwrap();
    for (key, value) in keys {
        match value {
            Some(value) => layer.insert((*key).into(), value.clone()),
            None => layer.remove(*key),
        };
    }
    manifest.to_string()
}

#[test]
fn an_entry_of_an_index_is_chosen_by_its_platform() {
    let host = TestHost::new("t4");
    let manifest = busybox().manifest();
    let kind = manifest["mediaType"].as_str().unwrap();
    let own = json!({"mediaType": kind, "digest": gpurun::image::Digest::of(manifest.to_string().as_bytes()).to_string(),
        "size": manifest.to_string().len(), "platform": {"os": "linux", "architecture": "amd64"}});
    let with = |changes: Value| {
        let mut entry = own.clone();
        for (key, value) in changes.as_object().unwrap() {
            entry[key] = value.clone();
        }
        entry
    };
    let other = with(json!({"digest": format!("sha256:{}", "0".repeat(64)),
        "platform": {"os": "linux", "architecture": "s390x"}}));
    let attestation =
        with(json!({"digest": other["digest"], "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}));
    let artifact = with(
        json!({"mediaType": "application/vnd.example.note", "digest": other["digest"], "platform": null}),
    );
    let serve = |entries: Value| {
        let mut served = Served::of(&busybox());
        let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries});
        served.add("manifests/1", "application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
        served.add(
            &format!("manifests/{}", own["digest"].as_str().unwrap()),
            kind,
            manifest.to_string().as_bytes(),
        );
        pull(&host, &serving(served))
    };
    for (what, changes) in [
        ("as it should be", json!({})),
        ("no type", json!({"mediaType": null})),
        ("a type with a parameter", json!({"mediaType": format!("{kind}; charset=utf-8")})),
        ("a type in capitals", json!({"mediaType": kind.to_uppercase()})),
        ("an unknown type", json!({"mediaType": "application/json"})),
        ("another size", json!({"size": 5})),
        ("no size", json!({"size": null})),
        ("an unknown size", json!({"size": -1})),
        ("words of uname", json!({"platform": {"os": "Linux", "architecture": "x86_64"}})),
        ("no platform", json!({"platform": null})),
        ("the first variant", json!({"platform": {"os": "linux", "architecture": "amd64", "variant": "v1"}})),
    ] {
        let ended = serve(json!([attestation, artifact, other, with(changes)]));
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
    }
    for (what, entries, code, words) in [
        ("no entry", json!([]), "GPU-0042", &["names no image manifest"][..]),
        ("an artifact", json!([artifact]), "GPU-0042", &["names no image manifest"]),
        (
            "other machines",
            json!([attestation, artifact, other]),
            "GPU-0045",
            &["linux/s390x", "linux/amd64"],
        ),
        (
            "half a platform",
            json!([with(json!({"platform": {"architecture": "amd64"}}))]),
            "GPU-0045",
            &["linux/amd64"],
        ),
    ] {
        let ended = serve(entries);
        assert_ne!(ended.code, 0, "{what}");
        refused(&ended, code, words);
    }
}

#[test]
fn documents_are_read_as_go_reads_them() {
    let host = TestHost::new("t4");
    let manifest = busybox().manifest();
    let text = manifest.to_string();
    let kind = manifest["mediaType"].as_str().unwrap();
    for (what, changed) in [
        (
            "keys in another case",
            text.replace("\"config\"", "\"Config\"").replace("\"layers\"", "\"LAYERS\""),
        ),
        ("a key twice", text.replacen('{', "{\"layers\": [], \"config\": {\"size\": 1}, ", 1)),
        ("null", text.replacen('{', "{\"annotations\": null, \"subject\": null, \"manifests\": null, ", 1)),
        (
            "unknown keys",
            text.replacen('{', &format!("{{\"x\": {}{}, ", "[".repeat(2000), "]".repeat(2000)), 1),
        ),
        ("white space", format!("\r\n\t {} \n", serde_json::to_string_pretty(&manifest).unwrap())),
        ("no type", {
            let mut m = manifest.clone();
            m.as_object_mut().unwrap().remove("mediaType");
            m.to_string()
        }),
        ("letters that Unicode folds to ASCII", text.replace("\"layers\"", "\"layer\u{17f}\"")),
        ("a layer without a type and a size", with_layer(&manifest, &[("mediaType", None), ("size", None)])),
        ("a layer of no size", with_layer(&manifest, &[("size", Some(json!(0)))])),
        ("a layer of an unknown size", with_layer(&manifest, &[("size", Some(json!(-1)))])),
        ("a layer of type tar", with_layer(&manifest, &[("mediaType", Some(json!("application/x-tar")))])),
        (
            "a layer of any type",
            with_layer(&manifest, &[("mediaType", Some(json!("application/octet-stream")))]),
        ),
        (
            "a layer that must not be distributed",
            with_layer(
                &manifest,
                &[("mediaType", Some(json!("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip")))],
            ),
        ),
        ("a configuration of another size", {
            let mut m = manifest.clone();
            m["config"]["size"] = json!(7);
            m.to_string()
        }),
    ] {
        let ended = pull(&host, &serving(Served::with_manifest(&busybox(), &changed)));
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
    }
    for (what, changed, words) in [
        ("a byte order mark", format!("\u{feff}{text}"), &["byte order mark"][..]),
        ("more behind it", format!("{text}{text}"), &["trailing characters"]),
        ("cut", text[..text.len() / 2].to_owned(), &["cannot be understood"]),
        ("nothing", String::new(), &["it is empty"]),
        ("a page", "<html>Welcome to the hotel</html>".into(), &["cannot be understood"]),
        ("a number", text.replace("\"size\":", "\"size\":1e2, \"x\":"), &["size"]),
        ("a damaged digest", text.replace("sha256:", "sha256:../"), &["sha256:../", "is not a digest"]),
        ("both", text.replacen('{', "{\"manifests\": [], ", 1), &["CVE-2021-41190"]),
        (
            "the type of an index",
            text.replacen(kind, "application/vnd.oci.image.index.v1+json", 1),
            &["CVE-2021-41190"],
        ),
        ("bare digits", text.replace("sha256:", ""), &["is not a digest"]),
        (
            "an encrypted layer",
            with_layer(
                &manifest,
                &[("mediaType", Some(json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")))],
            ),
            &["+encrypted", "--decryption-key"],
        ),
        (
            "the first version",
            r#"{"schemaVersion": 1, "name": "ml", "fsLayers": []}"#.into(),
            &["first version"],
        ),
    ] {
        let ended = pull(&host, &serving(Served::with_manifest(&busybox(), &changed)));
        assert_ne!(ended.code, 0, "{what}");
        refused(&ended, "GPU-0042", words);
    }
}

#[test]
fn a_configuration_of_millions_of_entries_needs_little_memory() {
    let host = TestHost::new("t4");
    let many: serde_json::Map<_, _> = (0..400_000).map(|i| (format!("/v{i}"), json!({}))).collect();
    let packed = busybox().edit(|config, _| config["config"]["Volumes"] = many.into());
    assert!(packed.config.len() < 8 << 20);
    let web = serving(Served::of(&packed));
    let image = format!("{}/ml:1", web.address);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 250000; exec \"$@\"", "sh"]).arg(host.gpurun().get_program());
    for (key, value) in host.gpurun().get_envs() {
        value.map(|value| command.env(key, value));
    }
    refused(&run(command.args(["pull", &image])), "GPU-0042", &["entries"]);
}

#[test]
fn a_token_is_an_answers_token_or_its_access_token() {
    let host = TestHost::new("t4");
    let tokens = Web::http();
    let (realm, image) = (tokens.url("/token"), Served::of(&busybox()));
    let registry = Web::http().answering(move |asked| {
        if asked.authorization() == "Bearer T" {
            return image.reply(asked);
        }
        Reply::challenge(format!("Bearer realm=\"{realm}\""))
    });
    for answer in [
        json!({"token": "T"}),
        json!({"access_token": "T"}),
        json!({"token": "", "access_token": "T"}),
        json!({"token": null, "access_token": "T"}),
        json!({"Token": "T", "expires_in": "soon"}),
    ] {
        tokens.answer(move |_| Reply::ok(answer.to_string()));
        let ended = pull(&host, &registry);
        assert_eq!(ended.code, 0, "{ended:?}");
    }
    for (status, code, words) in [
        (404, "GPU-0048", &["token service", "404", "/token"][..]),
        (410, "GPU-0048", &["token service"]),
        (400, "GPU-0048", &["denied", "so sorry"]),
        (401, "GPU-0048", &["denied", "so sorry", "docker login"]),
        (403, "GPU-0048", &["denied"]),
        (418, "GPU-0047", &["418"]),
    ] {
        tokens.answer(move |_| {
            Reply::new(status).body(r#"{"errors": [{"message": "so\nsorry"}], "details": null}"#)
        });
        refused(&pull(&host, &registry), code, words);
    }
    for answer in ["{}", "", r#"{"token": ""}"#, "{\"token\": \"T\\r\\nX: y\"}"] {
        tokens.answer(move |_| Reply::ok(answer));
        refused(&pull(&host, &registry), "GPU-0047", &["gave no token"]);
    }
}

#[test]
fn no_coding_is_asked_for_and_a_document_that_has_one_is_decoded() {
    let host = TestHost::new("t4");
    let image = Served::of(&busybox());
    let web = Web::http().answering(move |asked: &Asked| {
        let reply = image.reply(asked);
        if !asked.path.contains("/manifests/") {
            return reply;
        }
        let dir = gpurun_integration::temporary();
        let file = dir.path().join("x");
        fs::write(&file, busybox().manifest().to_string()).unwrap();
        must(Command::new("gzip").arg(&file));
        let kind = "application/vnd.oci.image.manifest.v1+json";
        Reply::ok(fs::read(file.with_extension("gz")).unwrap())
            .header("Content-Encoding", "gzip")
            .header("Content-Type", kind)
    });
    let ended = pull(&host, &web);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(web.asked().iter().all(|one| one.headers["accept-encoding"] == "identity"), "{:#?}", web.asked());
}

#[test]
fn waits_are_shown() {
    let host = TestHost::new("t4");
    let web = Web::http().answering(|_| Reply::new(429).header("Retry-After", "50"));
    let image = format!("{}/ml:1", web.address);
    for (options, words) in [
        (&[][..], ["gpurun: pulling", "waiting for", "too many requests", "50 s"]),
        (&["--progress", "json"], ["waiting_for", "seconds", "too many requests", "50 s"]),
    ] {
        let mut command = host.gpurun();
        let mut child = command.arg("pull").args(options).arg(&image).stdout(Stdio::null()).spawn_piped();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
}
