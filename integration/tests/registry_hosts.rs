//! Whom a pull asks, what it shows of itself and what it believes: registries.conf, certificates of clients, helpers with
//! credentials; and what it says when nothing comes of it.

use gpurun_integration::{
    Caller, Ended, TestHost, certificates, must,
    registry::{Fault, Packed, Proxy, Registry},
    run, temporary,
};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

fn fails(ended: &Ended, code: &str) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().filter(|line| line.starts_with("error")).count(), 1, "{ended:?}");
}

/// The home of who pulls.
fn home(host: &TestHost, caller: Caller) -> PathBuf {
    must(host.gpurun_of(caller).arg("config"));
    host.store(caller.uid()).with_file_name(format!("home-{}", caller.uid()))
}

fn write(home: &Path, path: &str, text: &str) {
    let path = home.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
}

#[test]
fn registries_conf_says_where_images_are_and_which_are_not_to_be_had() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    registry.push("mirrored/ml", "1", &Packed::of("busybox", "gzip"));
    let digest = registry.push("inside/ml", "2", &Packed::of("busybox", "zstd"));
    let (mirror, own) =
        (Proxy::before(&registry, |_| Fault::Pass), Proxy::before(&registry, |_| Fault::Pass));
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let home = home(&host, caller);
        let pull = |image: &str| run(host.gpurun_of(caller).args(["pull", image]));
        let asked =
            |proxy: &Proxy, path: &str| proxy.requests().iter().filter(|one| one.path.contains(path)).count();
        write(
            &home,
            ".config/containers/registries.conf",
            &format!(
                "unqualified-search-registries = [\"elsewhere.invalid\"]
                 [[registry]]\nprefix = \"hub.invalid/team\"\nlocation = \"{}/inside\"
                 [[registry.mirror]]\nlocation = \"{}/mirrored\"
                 [[registry]]\nlocation = \"bad.invalid\"\nblocked = true",
                own.address, mirror.address
            ),
        );
        let before = (asked(&mirror, "/v2/mirrored/"), asked(&own, "/v2/inside/"));
        assert_eq!(pull("hub.invalid/team/ml:1").code, 0);
        assert!(asked(&mirror, "/v2/mirrored/") > before.0 && asked(&own, "/v2/inside/") == before.1);
        // What the mirror lacks is where the prefix leads; under the name that was typed it is known.
        assert_eq!(pull("hub.invalid/team/ml:2").code, 0);
        assert!(asked(&own, "/v2/inside/") > before.1);
        assert_eq!(pull(&format!("hub.invalid/team/ml@{digest}")).code, 0);
        assert_eq!(host.ok(caller, "", "hub.invalid/team/ml:2", "echo it runs"), "it runs\n");
        let ended = pull("bad.invalid/a");
        fails(&ended, "GPU-0024");
        assert!(ended.err.contains("registries.conf") && ended.err.contains("blocked"), "{ended:?}");
        // A drop-in speaks for its prefix alone, and after the main file.
        write(
            &home,
            ".config/containers/registries.conf.d/50-own.conf",
            &format!("[[registry]]\nprefix = \"bad.invalid\"\nlocation = \"{}/inside\"", own.address),
        );
        assert_eq!(pull("bad.invalid/ml:2").code, 0);
        // gpurun's own mirrors of a host take the place of those there.
        let before = asked(&mirror, "/v2/mirrored/");
        write(
            &home,
            "config.toml",
            &format!("registry-mirrors = {{ \"hub.invalid\" = [\"http://{}\"] }}", own.address),
        );
        let ended = run(host
            .gpurun_of(caller)
            .arg("--config")
            .arg(home.join("config.toml"))
            .args(["pull", "hub.invalid/team/ml:2"]));
        assert_eq!((ended.code, asked(&mirror, "/v2/mirrored/")), (0, before), "{ended:?}");
        write(&home, ".config/containers/registries.conf.d/60-bad.conf", "[[registry]\n");
        let ended = pull("hub.invalid/team/ml:1");
        fails(&ended, "GPU-0002");
        assert!(ended.err.contains("60-bad.conf"), "{ended:?}");
    }
}

#[test]
fn a_registry_that_registries_conf_calls_insecure_is_believed_and_others_are_not() {
    let (storage, files) = (temporary(), certificates());
    let plain = Registry::plain(storage.path());
    plain.push("ml", "1", &Packed::of("busybox", "gzip"));
    let tls =
        Registry::tls(storage.path(), &files.path().join("tls.crt"), &files.path().join("tls.key"), None);
    // This machine's own is believed in any case: so it is reached by another name, which a proxy leads there.
    let port = tls.address.rsplit(':').next().unwrap();
    let image = format!("ml.test.invalid:{port}/ml:1");
    let host = TestHost::new("t4");
    let home = home(&host, Caller::Root);
    let (proxy, _) = gpurun_integration::registry::tunnel(tls.address.clone());
    let pull = || run(host.gpurun().args(["pull", &image]).env("HTTPS_PROXY", format!("http://{proxy}")));
    let ended = pull();
    fails(&ended, "GPU-0047");
    assert!(ended.err.contains("certificate"), "{ended:?}");
    write(
        &home,
        ".config/containers/registries.conf",
        "[[registry]]\nprefix = \"*.test.invalid\"\ninsecure = true",
    );
    let ended = pull();
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn a_registry_that_demands_a_certificate_of_its_client_gets_the_one_of_certs_d() {
    let (storage, files) = (temporary(), certificates());
    let plain = Registry::plain(storage.path());
    plain.push("ml", "1", &Packed::of("busybox", "gzip"));
    let file = |name: &str| files.path().join(name);
    let tls = Registry::tls(storage.path(), &file("tls.crt"), &file("tls.key"), Some(&file("ca.crt")));
    let others = certificates();
    let image = format!("{}/ml:1", tls.address);
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let home = home(&host, caller);
        let directory = format!(".config/containers/certs.d/{}", tls.address);
        let put = |name: &str, from: &Path| {
            let to = home.join(&directory).join(name);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(from, &to).unwrap();
            chown(&to, Some(caller.uid()), None).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        };
        let pull = || run(host.gpurun_of(caller).args(["pull", &image]));
        put("ca.crt", &file("ca.crt"));
        let ended = pull();
        fails(&ended, "GPU-0048");
        assert!(ended.err.contains("client.cert") && ended.err.contains("client.key"), "{ended:?}");
        // A certificate without its key, and one of another authority.
        put("client.cert", &file("tls.crt"));
        let ended = pull();
        fails(&ended, "GPU-0047");
        assert!(ended.err.contains("client.key"), "{ended:?}");
        put("client.key", &others.path().join("tls.key"));
        fails(&pull(), "GPU-0047");
        put("client.cert", &others.path().join("tls.crt"));
        fails(&pull(), "GPU-0048");
        put("client.cert", &file("tls.crt"));
        put("client.key", &file("tls.key"));
        let ended = pull();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(host.ok(caller, "", &image, "echo it runs"), "it runs\n");
    }
}

#[test]
fn a_password_that_docker_credential_pass_keeps_is_had_from_it() {
    let (storage, files) = (temporary(), certificates());
    let file = |name: &str| files.path().join(name);
    Registry::plain(storage.path()).push("team/ml", "1", &Packed::of("busybox", "gzip"));
    must(Command::new("htpasswd").args(["-Bbc"]).arg(file("passwords")).args(["me", "secret"]));
    let guarded = Registry::guarded(storage.path(), &file("tls.crt"), &file("tls.key"), &file("passwords"));
    let image = format!("{}/team/ml:1", guarded.address);
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        let home = home(&host, caller);
        // As the caller in his home, where his keys are.
        let sh = |script: &str| {
            let mut command = Command::new("setpriv");
            let id = caller.uid().to_string();
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-ec", script]);
            command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", &home).current_dir(&home);
            must(&mut command)
        };
        let pull = || run(host.gpurun_of(caller).args(["pull", &image]));
        write(
            &home,
            ".docker/config.json",
            &format!("{{\"credHelpers\": {{{:?}: \"pass\"}}}}", guarded.address),
        );
        sh(
            "mkdir -m 700 .gnupg; gpg --batch --quiet --passphrase '' --quick-generate-key tests 2>&1; pass init tests",
        );
        fails(&pull(), "GPU-0048");
        let store = |password: &str| {
            let secret = format!(
                r#"{{"ServerURL": "{}", "Username": "me", "Secret": "{password}"}}"#,
                guarded.address
            );
            sh(&format!("echo '{secret}' | docker-credential-pass store"));
        };
        store("wrong");
        fails(&pull(), "GPU-0048");
        store("secret");
        let ended = pull();
        assert_eq!(ended.code, 0, "{ended:?}");
        sh("gpgconf --kill all");
        // A helper that is named and not there.
        write(&home, ".docker/config.json", r#"{"credsStore": "nowhere"}"#);
        let ended = pull();
        fails(&ended, "GPU-0048");
        assert!(ended.err.contains("docker-credential-nowhere"), "{ended:?}");
    }
}

#[test]
fn another_machines_image_is_fetched_but_run_by_an_emulator_alone() {
    let storage = temporary();
    let registry = Registry::plain(storage.path());
    let base = Packed::of("busybox", "gzip");
    let mut manifests = Vec::new();
    for architecture in ["arm64", "s390x"] {
        let image = base.clone().edit(|config, _| {
            config["architecture"] = architecture.into();
            config["config"]["Env"] = json!([format!("FOR={architecture}")]);
        });
        let digest = registry.push("others", architecture, &image);
        manifests.push(json!({
            "mediaType": image.manifest()["mediaType"], "digest": digest, "size": image.manifest().to_string().len(),
            "platform": {"os": "linux", "architecture": architecture},
        }));
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    });
    registry.put_manifest("others", "all", &index);
    let proxy = Proxy::before(&registry, |_| Fault::Pass);
    let dir = temporary();
    let oci = format!("oci:{}", dir.path().join("oci").display());
    must(
        Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--all", "--src-tls-verify=false"])
            .args([&format!("docker://{}/others:all", registry.address), &format!("{oci}:1")]),
    );
    for caller in Caller::EACH {
        let host = TestHost::new("t4");
        for image in [format!("{}/others:all", proxy.address), format!("{oci}:1")] {
            let pull = |options: &[&str]| run(host.gpurun_of(caller).arg("pull").args(options).arg(&image));
            let ended = pull(&[]);
            fails(&ended, "GPU-0045");
            assert!(
                ended.err.contains("linux/arm64, linux/s390x") && ended.err.contains("linux/amd64"),
                "{ended:?}"
            );
            let asked = proxy.requests().len();
            let message = host.refused(caller, "--platform linux/arm64", &image, "GPU-0045");
            assert!(message.contains("linux/arm64") && message.contains("qemu-user-static"), "{message}");
            assert_eq!(proxy.requests().len(), asked, "nothing is fetched that cannot run");
            let ended = pull(&["--platform", "linux/arm64"]);
            assert_eq!(ended.code, 0, "{ended:?}");
            let ended = pull(&["--platform", "linux/ppc64le"]);
            fails(&ended, "GPU-0045");
        }
        let listed = must(host.gpurun_of(caller).arg("images"));
        assert!(listed.lines().filter(|line| line.ends_with("(linux/arm64)")).count() == 2, "{listed}");
        // Registered, and open since: these programs are this machine's, so they run in any case.
        let entries = host.path().join("proc/sys/fs/binfmt_misc");
        fs::create_dir_all(&entries).unwrap();
        let entry = "enabled\ninterpreter /usr/bin/qemu-aarch64-static\nflags: F\noffset 0\n\
                     magic 7f454c460201010000000000000000000200b700\n";
        fs::write(entries.join("qemu-aarch64"), entry).unwrap();
        for image in [format!("{}/others:all", proxy.address), format!("{oci}:1")] {
            assert_eq!(host.ok(caller, "--platform linux/arm64", &image, "echo $FOR"), "arm64\n");
            host.refused(caller, "--platform linux/s390x", &image, "GPU-0045");
        }
    }
}
