//! Tests which credential is sent to which host (see the table in `src/image/registry/mod.rs`) with real servers. R is the
//! registry, S the server that it redirects to, T its token service and E a host that must never receive a credential.

use gpurun_integration::{
    Caller, Ended, TestHost, certificates_for, must,
    registry::Packed,
    run, temporary,
    web::{Asked, Reply, Served, Web, names},
};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// `me:secret`
const BASIC: &str = "Basic bWU6c2VjcmV0";

fn served() -> Served {
    Served::of(&Packed::of("busybox", "gzip"))
}

/// The four servers, and a user who is logged in to R.
struct World {
    r: Web,
    s: Web,
    t: Web,
    e: Web,
    host: TestHost,
    files: TempDir,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Login {
    Nobody,
    Password,
    IdentityToken,
    Helper,
}

const LOGINS: [Login; 4] = [Login::Nobody, Login::Password, Login::IdentityToken, Login::Helper];

impl World {
    /// All on this machine, so that no server needs a trusted certificate.
    fn new(https: bool) -> Self {
        let files = certificates_for("IP:127.0.0.1,IP:127.0.0.2,DNS:localhost");
        let web = |address: &str| Web::at(address, https.then_some(files.path()));
        let world = Self {
            r: web("127.0.0.1:0"),
            s: web("127.0.0.2:0"),
            t: web("127.0.0.3:0"),
            e: web("127.0.0.4:0"),
            host: TestHost::new("t4"),
            files,
        };
        let image = served();
        let everything = image.clone();
        world.s.answer(move |asked| everything.reply(asked));
        world.t.answer(|_| Reply::ok(json!({"token": "T"}).to_string()));
        world.e.answer(|_| Reply::ok(json!({"token": "E"}).to_string()));
        world.r.answer(move |asked| image.reply(asked));
        world
    }

    fn login(&self, login: Login, host: &str) -> PathBuf {
        let path = self.files.path().join("auth.json");
        let helper = self.files.path().join("docker-credential-test");
        let file = match login {
            Login::Nobody => json!({}),
            Login::Password => json!({"auths": {host: {"auth": "bWU6c2VjcmV0"}}}),
            Login::IdentityToken => json!({"auths": {host: {"identitytoken": "IDENTITY"}}}),
            Login::Helper => json!({"credHelpers": {host: "test"}}),
        };
        fs::write(&path, file.to_string()).unwrap();
        let asked = self.files.path().join("helper-asked").display().to_string();
        let script = format!(
            "#!/bin/sh\ncat >> {asked}; echo >> {asked}\necho '{{\"Username\": \"me\", \"Secret\": \"secret\"}}'\n"
        );
        fs::write(&helper, script).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Pulls from R as a user who is logged in there.
    fn pull(&self, login: Login) -> Ended {
        let auth = self.login(login, &self.r.address);
        self.pull_with(&auth, &format!("{}/ml:1", self.r.address), &[])
    }

    fn pull_with(&self, auth: &Path, image: &str, environment: &[(&str, &str)]) -> Ended {
        [&self.r, &self.s, &self.t, &self.e].into_iter().for_each(Web::forget);
        run(self.host.gpurun().args(["rmi", image]));
        run(self.host.gpurun().arg("prune"));
        let path = format!("{}:/usr/bin:/bin", self.files.path().display());
        let mut command = self.host.gpurun();
        command.args(["pull", image]).env("REGISTRY_AUTH_FILE", auth).env("PATH", path);
        run(command.envs(environment.iter().copied()))
    }
}

fn good(ended: &Ended) {
    assert_eq!(ended.code, 0, "{ended:?}");
}

fn refused(ended: &Ended, code: &str, words: &[&str]) {
    assert!(ended.code == 125 && ended.err.starts_with(&format!("error[{code}]: ")), "{code}: {ended:?}");
    assert_eq!(ended.err.lines().count(), 3, "one paragraph with a fix: {ended:?}");
    assert!(words.iter().all(|word| ended.err.contains(word)), "{words:?}: {ended:?}");
}

/// R serves the image to requests with this header, and answers others with this challenge.
fn guarded(
    r: &Web,
    challenge: String,
    header: &'static str,
    image: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
) {
    r.answer(move |asked| {
        if asked.authorization() == header { image(asked) } else { Reply::challenge(challenge.as_str()) }
    });
}

/// Each program sends one request without credentials, and then requests with these.
fn only(asked: &[Asked], header: &str) -> bool {
    let anonymous = asked.iter().filter(|one| one.authorization().is_empty()).count();
    anonymous <= 2 && asked.iter().all(|one| ["", header].contains(&one.authorization()))
}

/// Every request of a blob goes to another server.
fn blobs_at(to: String) -> impl Fn(&Asked) -> Reply {
    let image = served();
    move |asked| {
        if asked.path.contains("/blobs/") {
            Reply::redirect(format!("{to}{}", asked.path))
        } else {
            image.reply(asked)
        }
    }
}

#[test]
fn a_password_goes_to_the_registry_and_its_token_service_alone() {
    for https in [false, true] {
        let world = World::new(https);
        for login in [Login::Password, Login::Helper] {
            guarded(&world.r, "Basic realm=\"x\"".into(), BASIC, blobs_at(world.s.url("")));
            good(&world.pull(login));
            let asked = world.r.asked();
            assert_eq!(asked[0].authorization(), "", "nothing before a challenge");
            assert!(only(&asked, BASIC), "{asked:#?}");
            assert!(!world.s.asked().is_empty() && !world.s.saw_a_secret(), "{:#?}", world.s.asked());

            let challenge = format!("Bearer realm=\"{}\",service=\"tests\"", world.t.url("/token"));
            guarded(&world.r, challenge, "Bearer T", blobs_at(world.s.url("")));
            good(&world.pull(login));
            assert!(only(&world.r.asked(), "Bearer T"));
            assert!(world.t.asked().iter().all(|one| one.authorization() == BASIC));
            assert_eq!(world.t.asked()[0].path, "/token?service=tests&scope=repository:ml:pull");
            assert!(!world.s.saw_a_secret() && world.e.asked().is_empty());
        }
        let helper = fs::read_to_string(world.files.path().join("helper-asked")).unwrap();
        assert!(helper.lines().all(|line| line == world.r.address), "{helper}");
        // Identity tokens are posted to T, and nothing else is.
        let challenge = format!("Bearer realm=\"{}\"", world.t.url("/token"));
        guarded(&world.r, challenge, "Bearer T", blobs_at(world.s.url("")));
        good(&world.pull(Login::IdentityToken));
        let asked = world.t.asked();
        assert!(
            asked.iter().all(|one| one.method == "POST" && one.body.contains("refresh_token=IDENTITY")),
            "{asked:#?}"
        );
        assert!(!world.s.saw_a_secret() && world.r.asked().iter().all(|one| one.body.is_empty()));
        // T receives no request without a name.
        good(&world.pull(Login::Nobody));
        assert!(!world.t.saw_a_secret() && !world.t.asked().is_empty());
    }
}

#[test]
fn another_servers_challenge_is_not_answered() {
    for https in [false, true] {
        let world = World::new(https);
        let evil = format!("Bearer realm=\"{}\",service=\"x\"", world.e.url("/token"));
        for (login, challenge) in
            LOGINS.into_iter().flat_map(|login| [(login, evil.as_str()), (login, "Basic realm=\"x\"")])
        {
            let challenge = challenge.to_owned();
            world.s.answer(move |_| Reply::challenge(challenge.as_str()));
            // R requires no credentials, but S does.
            world.r.answer(blobs_at(world.s.url("")));
            let ended = world.pull(login);
            refused(&ended, "GPU-0048", &[&world.s.address, &world.r.address, "redirects"]);
            assert!(
                world.e.asked().is_empty() && !world.s.saw_a_secret() && !world.r.saw_a_secret(),
                "{login:?}"
            );
        }
        // Manifests as well as blobs.
        let (to, login) = (world.s.url(""), Login::Password);
        world.r.answer(move |asked| Reply::redirect(format!("{to}{}", asked.path)));
        let challenge = evil.clone();
        world.s.answer(move |_| Reply::challenge(challenge.as_str()));
        refused(&world.pull(login), "GPU-0048", &["redirects"]);
        assert!(world.e.asked().is_empty() && !world.s.saw_a_secret());
    }
}

#[test]
fn redirects_keep_credentials_within_the_origin_only() {
    let world = World::new(false);
    let image = served();
    let basic = || "Basic realm=\"x\"".to_owned();
    // Within R: by path, and by the full address in other spellings.
    let port = world.r.address.rsplit(':').next().unwrap().to_owned();
    for to in [
        "/elsewhere".to_owned(),
        format!("//{}/elsewhere", world.r.address),
        world.r.url("/elsewhere"),
        format!("HTTP://127.0.0.1:0{port}/elsewhere#f"),
    ] {
        let image = image.clone();
        let target = to.clone();
        guarded(&world.r, basic(), BASIC, move |asked| match asked.path.strip_prefix("/elsewhere") {
            None => Reply::redirect(target.replace("/elsewhere", &format!("/elsewhere{}", asked.path))),
            Some(path) => image.reply(&Asked { path: path.into(), ..asked.clone() }),
        });
        good(&world.pull(Login::Password));
        let there: Vec<_> =
            world.r.asked().into_iter().filter(|one| one.path.starts_with("/elsewhere")).collect();
        assert!(
            !there.is_empty() && there.iter().all(|one| one.authorization() == BASIC),
            "{to}: {there:#?}"
        );
    }
    // Another port, another host, another name of the same machine: another origin.
    let other_name = format!("http://localhost:{port}");
    for to in [world.s.url(""), other_name] {
        let target = to.clone();
        let image = image.clone();
        world.r.answer(move |asked| {
            let own = asked.headers.get("host").is_some_and(|host| host.starts_with("127.0.0.1"));
            match (own, asked.authorization()) {
                (true, BASIC) if asked.path.contains("/blobs/") => {
                    Reply::redirect(format!("{target}{}", asked.path))
                }
                (true, "") => Reply::challenge("Basic realm=\"x\""),
                _ => image.reply(asked),
            }
        });
        good(&world.pull(Login::Password));
        let others = world.r.asked().into_iter().filter(|one| one.headers["host"].starts_with("localhost"));
        assert!(others.chain(world.s.asked()).all(|one| one.authorization().is_empty()), "{to}");
    }
    // There and back: a request that S redirects to R carries no credentials.
    let (s, r) = (world.s.url(""), world.r.url("/private"));
    guarded(&world.r, basic(), BASIC, move |asked| {
        if asked.path.contains("/blobs/") {
            Reply::redirect(format!("{s}{}", asked.path))
        } else {
            image.reply(asked)
        }
    });
    world.s.answer(move |_| Reply::redirect(r.as_str()));
    refused(&world.pull(Login::Password), "GPU-0048", &["redirects"]);
    let private: Vec<_> = world.r.asked().into_iter().filter(|one| one.path == "/private").collect();
    assert!(!private.is_empty() && private.iter().all(|one| one.authorization().is_empty()), "{private:#?}");
}

#[test]
fn an_encrypted_registry_leads_to_encrypted_servers_alone() {
    let world = World::new(true);
    let plain = Web::at("127.0.0.5:0", None);
    let image = served();
    plain.answer(move |asked| {
        if asked.path.starts_with("/token") { Reply::ok(r#"{"token": "T"}"#) } else { image.reply(asked) }
    });
    for part in ["/blobs/", "/manifests/"] {
        let (to, image) = (plain.url(""), served());
        guarded(&world.r, "Basic realm=\"x\"".into(), BASIC, move |asked| {
            if asked.path.contains(part) {
                Reply::redirect(format!("{to}{}", asked.path))
            } else {
                image.reply(asked)
            }
        });
        refused(&world.pull(Login::Password), "GPU-0047", &["encrypted", "redirect"]);
        assert!(plain.asked().is_empty(), "{part}");
    }
    for login in LOGINS {
        let challenge = format!("Bearer realm=\"{}\"", plain.url("/token"));
        guarded(&world.r, challenge, "Bearer T", |_| Reply::new(500));
        refused(&world.pull(login), "GPU-0048", &["token service", "encrypted"]);
        assert!(plain.asked().is_empty(), "{login:?}");
    }
}

#[test]
fn an_ambiguous_address_of_a_token_service_is_refused() {
    let world = World::new(true);
    let at = &world.e.address;
    for realm in [
        "/token".to_owned(),
        "token".to_owned(),
        "file:///etc/shadow".to_owned(),
        "ftp://127.0.0.1/token".to_owned(),
        format!("https://user:password@{at}/token"),
        format!("https://{}@{at}/token", world.r.address),
        format!("https://{at}\\\\@127.0.0.1/token"),
        "http://auth.invalid/token".to_owned(),
        "https://[::1/token".to_owned(),
        "https:///token".to_owned(),
    ] {
        let challenge = format!("Bearer realm=\"{realm}\"");
        guarded(&world.r, challenge, "Bearer T", |_| Reply::new(500));
        for login in [Login::Password, Login::IdentityToken] {
            refused(&world.pull(login), "GPU-0048", &["token service"]);
            assert!(world.e.asked().is_empty(), "{realm}");
        }
    }
    // A fragment is dropped, a query stays.
    guarded(&world.r, format!("Bearer realm=\"{}\"", world.t.url("/token?a=b#f")), "Bearer T", {
        let image = served();
        move |asked| image.reply(asked)
    });
    good(&world.pull(Login::Password));
    assert_eq!(world.t.asked()[0].path, "/token?a=b&scope=repository:ml:pull");
}

#[test]
fn a_token_service_that_redirects_passes_no_secret_on() {
    let world = World::new(true);
    let challenge = format!("Bearer realm=\"{}\"", world.t.url("/token"));
    let image = served();
    guarded(&world.r, challenge, "Bearer E", move |asked| image.reply(asked));
    let to = world.e.url("/token");
    world.t.answer(move |_| Reply::redirect(to.as_str()));
    good(&world.pull(Login::Password));
    assert!(world.t.saw_a_secret() && !world.e.asked().is_empty() && !world.e.saw_a_secret());
    refused(&world.pull(Login::IdentityToken), "GPU-0047", &["secret"]);
    assert!(world.e.asked().is_empty());
}

#[test]
fn a_layer_that_the_registry_lacks_comes_from_an_address_of_the_manifest_without_credentials() {
    let world = World::new(true);
    let packed = Packed::of("busybox", "gzip");
    let layer = packed.manifest()["layers"][0]["digest"].as_str().unwrap().to_owned();
    let there = world.s.url(&format!("/v2/ml/blobs/{layer}"));
    let plain = Web::at("127.0.0.5:0", None).answering(|_| Reply::ok("never"));
    let serve = |urls: &[&str], has_it: bool| {
        let mut manifest = packed.manifest();
        manifest["layers"][0]["urls"] = json!(urls);
        manifest["layers"][0]["mediaType"] =
            json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
        let (image, layer) = (Served::with_manifest(&packed, &manifest.to_string()), layer.clone());
        guarded(&world.r, "Basic realm=\"x\"".into(), BASIC, move |asked| {
            if !has_it && asked.path.ends_with(&layer) { Reply::new(404) } else { image.reply(asked) }
        });
        world.pull(Login::Password)
    };
    for urls in
        [&[there.as_str()][..], &["https://127.0.0.1:1/", &there], &["file:///etc/passwd", "/rel", &there]]
    {
        good(&serve(urls, false));
        assert!(!world.s.asked().is_empty() && !world.s.saw_a_secret(), "{urls:?}");
    }
    good(&serve(&[&there], true));
    assert!(world.s.asked().is_empty(), "the registry has it");
    for (urls, words) in [
        (&[][..], &["lost a part"][..]),
        (&["file:///etc/passwd"], &["file:///etc/passwd", "only http and https"]),
        (&[plain.url("/x").as_str()], &["encrypted connection"]),
    ] {
        refused(&serve(urls, false), "GPU-0042", words);
    }
    assert!(plain.asked().is_empty(), "an encrypted registry does not lead there");
}

#[test]
fn of_several_challenges_the_token_services_is_answered() {
    let world = World::new(false);
    let bearer = format!("Bearer realm=\"{}\",service=\"a, b\"", world.t.url("/token"));
    for (login, password) in [(Login::Nobody, ""), (Login::Password, BASIC)] {
        for challenges in [
            vec![format!("Basic realm=\"x\", {bearer}")],
            vec![format!("Negotiate, {bearer}, Basic realm=\"x\"")],
            vec![format!("NTLM TlRMTVNTUAAC==, {bearer}")],
            vec!["Basic realm=\"x\"".to_owned(), bearer.clone()],
            vec!["Digest realm=\"x\", qop=\"auth,auth-int\"".to_owned(), bearer.clone()],
        ] {
            let (image, shown) = (served(), challenges.clone());
            world.r.answer(move |asked| {
                if asked.authorization() == "Bearer T" {
                    return image.reply(asked);
                }
                shown
                    .iter()
                    .fold(Reply::new(401), |reply, one| reply.header("WWW-Authenticate", one.as_str()))
            });
            good(&world.pull(login));
            let asked = world.t.asked();
            assert!(asked.iter().all(|one| one.authorization() == password), "{challenges:?}: {asked:?}");
            assert!(
                asked[0].path.contains("service=a%2C%20b") || asked[0].path.contains("service=a,%20b"),
                "{asked:?}"
            );
            assert!(
                only(&world.r.asked(), "Bearer T"),
                "{challenges:?}: the password is the token service's alone"
            );
        }
    }
    // A registry without a token service.
    let image = served();
    guarded(&world.r, "Negotiate YII=, Basic realm=\"x\"".into(), BASIC, move |asked| image.reply(asked));
    good(&world.pull(Login::Password));
}

#[test]
fn redirects_end() {
    let world = World::new(false);
    let (r, s) = (world.r.url("/a"), world.s.url("/b"));
    world.r.answer(move |_| Reply::redirect(s.as_str()));
    world.s.answer(move |_| Reply::redirect(r.as_str()));
    refused(&world.pull(Login::Password), "GPU-0047", &["redirects without end"]);
    assert!(world.r.asked().len() + world.s.asked().len() <= 12);
    for bad in ["", "file:///etc/shadow", "http://user@127.0.0.1/", "gopher://127.0.0.1/", "http://"] {
        world.r.answer(move |_| Reply::redirect(bad));
        refused(&world.pull(Login::Password), "GPU-0047", &["redirects to an address that is not followed"]);
    }
    // A redirect without an address is an ordinary response.
    world.r.answer(|_| Reply::new(302));
    refused(&world.pull(Login::Password), "GPU-0047", &["302"]);
}

#[test]
fn a_client_certificate_is_shown_to_the_host_that_it_is_for() {
    let world = World::new(true);
    let home = temporary();
    let directory = home.path().join(".config/containers/certs.d").join(&world.r.address);
    fs::create_dir_all(&directory).unwrap();
    for (name, from) in [("ca.crt", "ca.crt"), ("client.cert", "tls.crt"), ("client.key", "tls.key")] {
        fs::copy(world.files.path().join(from), directory.join(name)).unwrap();
    }
    let challenge = format!("Bearer realm=\"{}\"", world.t.url("/token"));
    guarded(&world.r, challenge, "Bearer T", blobs_at(world.s.url("")));
    let auth = world.login(Login::Password, &world.r.address);
    let home = home.path().display().to_string();
    let ended = world.pull_with(&auth, &format!("{}/ml:1", world.r.address), &[("HOME", &home)]);
    good(&ended);
    let shown = |web: &Web| web.asked().iter().filter(|one| one.client_certificate).count();
    assert_eq!((shown(&world.r), shown(&world.s), shown(&world.t)), (world.r.asked().len(), 0, 0));
    assert!(!world.s.asked().is_empty() && !world.t.asked().is_empty());
}

#[test]
fn a_mirror_is_a_host_of_its_own() {
    let world = World::new(false);
    let config = world.files.path().join("config.toml");
    fs::write(
        &config,
        format!("registry-mirrors = {{ \"{}\" = [\"{}\"] }}", world.r.address, world.s.url("")),
    )
    .unwrap();
    world.s.answer(|_| Reply::challenge("Basic realm=\"x\""));
    let image = served();
    guarded(&world.r, "Basic realm=\"x\"".into(), BASIC, move |asked| image.reply(asked));
    let auth = world.login(Login::Password, &world.r.address);
    let mut command = world.host.gpurun();
    command.arg("--config").arg(&config).args(["pull", &format!("{}/ml:1", world.r.address)]);
    good(&run(command.env("REGISTRY_AUTH_FILE", &auth)));
    assert!(!world.s.asked().is_empty() && !world.s.saw_a_secret(), "{:#?}", world.s.asked());
}

/// Hosts with names, which a proxy forwards to servers on this machine, so that no host is trusted as this machine.
#[test]
fn hosts_with_names_are_told_apart_and_checked() {
    let host = TestHost::new("t4");
    let files = certificates_for("DNS:r.test.invalid,DNS:s.test.invalid,DNS:auth.test.invalid");
    let (r, s, auth) = (Web::https(files.path()), Web::https(files.path()), Web::https(files.path()));
    let hosts = [
        ("r.test.invalid:443", &r),
        ("s.test.invalid:443", &s),
        ("auth.test.invalid:443", &auth),
        ("plain.test.invalid:80", &s),
    ];
    let proxy = names(hosts.map(|(name, web)| (name.to_owned(), web.address.clone())).into());
    let home = temporary();
    let trusted = |names: &[&str]| {
        let all = home.path().join(".config/containers/certs.d");
        let _ = fs::remove_dir_all(&all);
        for name in names {
            fs::create_dir_all(all.join(name)).unwrap();
            fs::copy(files.path().join("ca.crt"), all.join(name).join("ca.crt")).unwrap();
        }
    };
    let file = files.path().join("auth.json");
    let login =
        |key: &str| fs::write(&file, json!({"auths": {key: {"auth": "bWU6c2VjcmV0"}}}).to_string()).unwrap();
    let pull = |image: &str| {
        [&r, &s, &auth].into_iter().for_each(|web| web.forget());
        run(host.gpurun().args(["rmi", image]));
        run(host.gpurun().arg("prune"));
        let mut command = host.gpurun();
        command.args(["pull", image]).env("REGISTRY_AUTH_FILE", &file).env("HOME", home.path());
        run(command.env("HTTPS_PROXY", format!("http://{proxy}")))
    };
    let image = served();
    s.answer(move |asked| image.reply(asked));
    auth.answer(|_| Reply::ok(r#"{"token": "T"}"#));
    let everywhere = ["r.test.invalid", "s.test.invalid:443", "auth.test.invalid"];
    for (to, same) in [
        ("https://s.test.invalid", false),
        ("https://R.Test.Invalid:443", true),
        ("https://r.test.invalid", true),
    ] {
        trusted(&everywhere);
        login("r.test.invalid");
        let image = served();
        r.answer(move |asked| match (asked.authorization(), asked.path.strip_prefix("/moved")) {
            ("Bearer T", Some(path)) => image.reply(&Asked { path: path.into(), ..asked.clone() }),
            ("Bearer T", None) if asked.path.contains("/blobs/") && same => {
                Reply::redirect(format!("{to}/moved{}", asked.path))
            }
            ("Bearer T", None) if asked.path.contains("/blobs/") => {
                Reply::redirect(format!("{to}{}", asked.path))
            }
            ("Bearer T", None) => image.reply(asked),
            _ => Reply::challenge("Bearer realm=\"https://auth.test.invalid/token\""),
        });
        good(&pull("r.test.invalid/ml:1"));
        assert_eq!(auth.asked()[0].authorization(), BASIC);
        assert!(!s.saw_a_secret() && s.asked().is_empty() == same, "{to}");
    }
    // The name is found in any case and under addresses; a part of it is not enough.
    for (key, known) in [
        ("R.TEST.invalid", true),
        ("https://r.test.invalid/v1/users/", true),
        ("test.invalid", false),
        ("r.test.invalid.", false),
    ] {
        login(key);
        good(&pull("r.test.invalid/ml:1"));
        assert_eq!(auth.saw_a_secret(), known, "{key}");
    }
    // An authority for R says nothing about S and T.
    login("r.test.invalid");
    trusted(&everywhere[..1]);
    refused(&pull("r.test.invalid/ml:1"), "GPU-0047", &["auth.test.invalid", "certificate"]);
    assert!(auth.asked().is_empty());
    // An encrypted registry never leads to plain HTTP.
    trusted(&everywhere);
    r.answer(|_| Reply::challenge("Bearer realm=\"http://plain.test.invalid/token\""));
    refused(&pull("r.test.invalid/ml:1"), "GPU-0048", &["plain.test.invalid", "encrypted"]);
    r.answer(|_| Reply::redirect("http://plain.test.invalid/v2/ml/manifests/1"));
    refused(&pull("r.test.invalid/ml:1"), "GPU-0047", &["plain.test.invalid", "encrypted"]);
    assert!(s.asked().is_empty());
}

#[test]
fn files_of_credentials_are_found_where_they_are_written() {
    let world = World::new(false);
    let image = served();
    guarded(&world.r, "Basic realm=\"x\"".into(), BASIC, move |asked| image.reply(asked));
    let auth = json!({"auths": {&world.r.address: {"auth": "bWU6c2VjcmV0"}}}).to_string();
    let name = format!("{}/ml:1", world.r.address);
    for caller in Caller::EACH {
        let home = temporary();
        let write = |path: &str, text: &str| {
            let path = home.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let inside = |path: &str| home.path().join(path).display().to_string();
        // A directory at /run/containers that this test alone sees.
        let pull = |environment: &[(&str, &str)]| {
            run(world.host.gpurun_of(caller).args(["rmi", &name]));
            let gpurun = world.host.gpurun_of(caller);
            let mut command = std::process::Command::new("unshare");
            let script = "mkdir -p /run/containers && mount --bind \"$0\" /run/containers && exec \"$@\"";
            command
                .args(["-m", "sh", "-c", script, &inside("run")])
                .arg(gpurun.get_program())
                .args(gpurun.get_args());
            for (key, value) in gpurun.get_envs() {
                match value {
                    Some(value) => command.env(key, value),
                    None => command.env_remove(key),
                };
            }
            command.args(["pull", &name]).env("HOME", home.path()).env_remove("REGISTRY_AUTH_FILE");
            run(command
                .env_remove("XDG_RUNTIME_DIR")
                .env_remove("DOCKER_CONFIG")
                .envs(environment.iter().copied()))
        };
        fs::create_dir_all(home.path().join("run")).unwrap();
        let missing = pull(&[]);
        refused(
            &missing,
            "GPU-0048",
            &["not logged in", &inside(".docker/config.json"), "/run/containers/", "docker login"],
        );
        for (path, environment) in [
            (&*format!("run/{}/auth.json", caller.uid()), &[][..]),
            (".config/containers/auth.json", &[]),
            (".docker/config.json", &[]),
            (
                ".docker/config.json",
                &[
                    ("REGISTRY_AUTH_FILE", ""),
                    ("DOCKER_CONFIG", ""),
                    ("XDG_RUNTIME_DIR", ""),
                    ("XDG_CONFIG_HOME", ""),
                ],
            ),
            ("runtime/containers/auth.json", &[("XDG_RUNTIME_DIR", &*inside("runtime"))]),
            ("config/containers/auth.json", &[("XDG_CONFIG_HOME", &*inside("config"))]),
            ("docker/config.json", &[("DOCKER_CONFIG", &*inside("docker"))]),
            ("my-auth.json", &[("REGISTRY_AUTH_FILE", &*inside("my-auth.json"))]),
        ] {
            let written = write(path, &auth);
            good(&pull(environment));
            fs::write(&written, format!("\u{feff}{}\r\n", auth.replace('{', "{\r\n"))).unwrap();
            good(&pull(environment));
            // Credentials that are refused are named with their place.
            fs::write(&written, auth.replace("bWU6c2VjcmV0", "bWU6d3Jvbmc=")).unwrap();
            let shown = written.display().to_string().replace(&inside("run/"), "/run/containers/");
            refused(&pull(environment), "GPU-0048", &["\"me\" in", &shown]);
            fs::remove_file(&written).unwrap();
        }
        let legacy = write(
            ".dockercfg",
            &json!({format!("http://{}/v1/", world.r.address): {"auth": "bWU6c2VjcmV0", "email": ""}})
                .to_string(),
        );
        good(&pull(&[]));
        fs::remove_file(legacy).unwrap();
        if caller == Caller::User {
            let secret = write(".docker/config.json", &auth);
            fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
            refused(&pull(&[]), "GPU-0048", &[&secret.display().to_string(), "Permission denied"]);
            let environment = [("REGISTRY_AUTH_FILE", &*secret.display().to_string())];
            refused(
                &pull(&environment),
                "GPU-0048",
                &[&secret.display().to_string(), "Permission denied", "chmod"],
            );
        }
    }
}

#[test]
fn a_helper_that_fails_is_named_and_a_store_blocks_no_public_image() {
    let world = World::new(false);
    let file = world.files.path().join("auth.json");
    let helper = world.files.path().join("docker-credential-broken");
    fs::write(&helper, "#!/bin/sh\necho 'gpg: decryption failed:\nNo secret key' >&2\nexit 1\n").unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let name = format!("{}/ml:1", world.r.address);
    for (store, words) in [
        ("desktop.exe", &["docker-credential-desktop.exe", "No such file"][..]),
        ("broken", &["docker-credential-broken", "gpg: decryption failed: No secret key"]),
        ("../x", &["../x"]),
    ] {
        fs::write(&file, json!({"credsStore": store, "auths": {&world.r.address: {}}}).to_string()).unwrap();
        let image = served();
        world.r.answer(move |asked| image.reply(asked));
        good(&world.pull_with(&file, &name, &[]));
        world.r.answer(|_| Reply::challenge("Basic realm=\"x\""));
        refused(&world.pull_with(&file, &name, &[]), "GPU-0048", words);
        // The helper is configured for this host.
        let image = served();
        world.r.answer(move |asked| image.reply(asked));
        fs::write(&file, json!({"credHelpers": {&world.r.address: store}}).to_string()).unwrap();
        refused(&world.pull_with(&file, &name, &[]), "GPU-0048", words);
        fs::write(&file, json!({"credHelpers": {"other.invalid": store}}).to_string()).unwrap();
        good(&world.pull_with(&file, &name, &[]));
    }
    // An empty answer means no credentials.
    fs::write(&helper, "#!/bin/sh\necho '{\"Username\": \"\", \"Secret\": \"\"}'\n").unwrap();
    fs::write(&file, json!({"credsStore": "broken"}).to_string()).unwrap();
    world.r.answer(|_| Reply::challenge("Basic realm=\"x\""));
    refused(&world.pull_with(&file, &name, &[]), "GPU-0048", &["docker-credential-broken has none"]);
    assert!(!world.r.saw_a_secret());
    must(world.host.gpurun().arg("images"));
}
