//! What a pull says when nothing comes of it, word for word: what happened, why, and what to do.

use gpurun_integration::{
    TestHost, certificates, must,
    registry::{Fault, Packed, Proxy, Registry, tunnel},
    run, temporary,
};
use std::{fs, process::Command};

#[test]
fn each_failure_is_one_paragraph_that_says_what_to_do() {
    let (storage, files) = (temporary(), certificates());
    let file = |name: &str| files.path().join(name);
    let plain = Registry::plain(storage.path());
    plain.push("ml", "1", &Packed::of("busybox", "gzip"));
    must(Command::new("htpasswd").args(["-Bbc"]).arg(file("passwords")).args(["me", "secret"]));
    let guarded = Registry::guarded(storage.path(), &file("tls.crt"), &file("tls.key"), &file("passwords"));
    let (to_tls, _) = tunnel(guarded.address.clone());
    let (to_plain, _) = tunnel(plain.address.clone());
    let answering = |status: u16, head: &str, body: &str| {
        let (head, body) = (head.to_owned(), body.to_owned());
        Proxy::before(&plain, move |_| Fault::Answer(status, head.clone(), body.clone())).address
    };
    let denied = answering(
        403,
        "",
        r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#,
    );
    let limited = answering(429, "Retry-After: 3600\r\n", "");
    let broken = answering(502, "Retry-After: 3600\r\n", "<html>Bad Gateway</html>");
    fs::write(
        file("auth.json"),
        format!("{{\"auths\": {{\"{}\": {{\"auth\": \"bWU6d3Jvbmc=\"}}}}}}", guarded.address),
    )
    .unwrap();
    let simulated = TestHost::new("t4");
    let said = |host: &str, name: &str, variables: &[(&str, String)]| {
        let image = format!("{host}/{name}");
        let ended = run(simulated.gpurun().args(["pull", &image]).envs(variables.iter().cloned()));
        assert!(ended.code == 125 && ended.out.is_empty(), "{image}: {ended:?}");
        let said = ended.err.replace(host, "HOST").replace(&to_tls, "PROXY").replace(&to_plain, "PROXY");
        let said = said.replace(&file("auth.json").display().to_string(), "FILE");
        // The default places, which depend on the caller.
        let Some((before, rest)) = said.split_once("for HOST are in /") else { return said };
        let (places, after) = rest.split_once('\n').expect("a fix");
        assert!(
            places.contains("run/containers/0/auth.json") && places.contains(".docker/config.json"),
            "{places}"
        );
        format!("{before}for HOST are in FILES\n{after}")
    };
    let proxy = |address: &str| vec![("HTTPS_PROXY", format!("http://{address}"))];
    let network = "check the registry's name and the network; HTTPS_PROXY names a proxy, NO_PROXY the hosts that need none, and \
                   registry-mirrors in gpurun's configuration the mirrors that are asked first";
    let login = "log in, `docker login HOST` or `podman login HOST`, with an account that may read it; and check the name: \
                 registries also deny access to images that do not exist";
    let (plain, guarded, unknown) = (&plain.address, &guarded.address, "registry.invalid");
    for (host, name, variables, expected) in [
        // A tag and a repository that are not there.
        (
            plain.as_str(),
            "ml:none",
            vec![],
            "error[GPU-0041]: there is no image HOST/ml:none
  cause: 404 Not Found: manifest unknown
  fix: check the repository's name and the tag: `skopeo list-tags docker://HOST/ml` lists those that are there"
                .into(),
        ),
        (
            plain,
            "none/ml:1",
            vec![],
            "error[GPU-0041]: there is no image HOST/none/ml:1
  cause: 404 Not Found: manifest unknown
  fix: check the repository's name and the tag: `skopeo list-tags docker://HOST/none/ml` lists those that are there"
                .into(),
        ),
        // A host that is not there, and one that does not listen.
        (
            unknown,
            "ml:1",
            vec![],
            format!(
                "error[GPU-0047]: HOST cannot be reached
  cause: failed to lookup address information: Name or service not known
  fix: {network}"
            ),
        ),
        (
            "127.0.0.1:1",
            "ml:1",
            vec![],
            format!(
                "error[GPU-0047]: HOST cannot be reached
  cause: Connection refused (os error 111)
  fix: {network}"
            ),
        ),
        // Nobody logged in, or as somebody who is unknown, or may not.
        (
            guarded,
            "ml:1",
            vec![],
            format!(
                "error[GPU-0048]: HOST denied access to HOST/ml:1
  cause: 401 Unauthorized: authentication required: not logged in: no credentials for HOST are in FILES
  fix: {login}"
            ),
        ),
        (
            guarded,
            "ml:1",
            vec![("REGISTRY_AUTH_FILE", file("auth.json").display().to_string())],
            format!(
                "error[GPU-0048]: HOST denied access to HOST/ml:1
  cause: 401 Unauthorized: authentication required: the credentials that were sent are \"me\" in FILE
  fix: {login}"
            ),
        ),
        (
            &denied,
            "ml:1",
            vec![],
            format!(
                "error[GPU-0048]: HOST denied access to HOST/ml:1
  cause: 403 Forbidden: requested access to the resource is denied: not logged in: no credentials for HOST are in FILES
  fix: {login}"
            ),
        ),
        // An authority that nobody knows; plain HTTP where TLS should be; a proxy that is not there.
        (
            unknown,
            "ml:1",
            proxy(&to_tls),
            "error[GPU-0047]: no trusted connection to HOST can be made
  cause: invalid peer certificate: UnknownIssuer: asked through the proxy PROXY
  fix: put the certificate of its authority into /etc/containers/certs.d/HOST/ca.crt (of an ordinary user: ~/.config/containers/certs.d)"
                .into(),
        ),
        (
            unknown,
            "ml:1",
            proxy(&to_plain),
            "error[GPU-0047]: HOST does not speak TLS
  cause: received corrupt message of type InvalidContentType: asked through the proxy PROXY
  fix: if it is meant to speak plain HTTP: insecure-registries = [\"HOST\"] in gpurun's configuration, or insecure = true in registries.conf"
                .into(),
        ),
        (
            unknown,
            "ml:1",
            proxy("127.0.0.1:1"),
            format!(
                "error[GPU-0047]: HOST cannot be reached
  cause: Connection refused (os error 111): asked through the proxy 127.0.0.1:1
  fix: {network}"
            ),
        ),
        // A registry that has had enough of us, and one that is down.
        (
            &limited,
            "ml:1",
            vec![],
            "error[GPU-0047]: HOST has reached its rate limit: too many requests
  cause: 429 Too Many Requests
  fix: wait 3600 seconds, or log in, `docker login HOST`: authenticated clients get a higher rate limit"
                .into(),
        ),
        (
            &broken,
            "ml:1",
            vec![],
            "error[GPU-0047]: HOST cannot serve HOST/ml:1
  cause: 502 Bad Gateway
  fix: try again later: the registry failed, or a proxy in front of it; registry-mirrors in gpurun's configuration names others"
                .into(),
        ),
    ] {
        assert_eq!(said(host, name, &variables), format!("{expected}\n"));
    }
}
