//! Advice for words that are not commands: Docker's and Podman's verbs, files, misspelt commands.

use crate::error::{Code, Error};
use std::path::Path;

/// Extensions of image files, and the kind of image.
const IMAGE_SUFFIXES: [(&str, &str); 9] = [
    (".sif", "sif"),
    (".sqsh", "sqsh"),
    (".squashfs", "sqsh"),
    (".tar", "archive"),
    (".tar.gz", "archive"),
    (".tgz", "archive"),
    (".tar.zst", "archive"),
    (".tar.xz", "archive"),
    (".tar.bz2", "archive"),
];

const IN_FOREGROUND: &str = "gpurun runs containers in the foreground: `ps -C gpurun` lists running containers, and ^C or kill ends one";
const LOGS: &str = "gpurun passes the container's output through: redirect it, gpurun run … > FILE 2>&1, or run it as a unit with \
                    systemd-run and read journalctl -u NAME";
const EXEC: &str = "enter a running container with nsenter: nsenter --target PID --all, where PID is in the file of gpurun run --pidfile";
const BUILD: &str = "build with buildah, podman build or docker buildx, and run the result: gpurun run containers-storage:NAME, or \
                     docker-daemon:NAME";
const LOGIN: &str = "log in with docker login, podman login or skopeo login: gpurun reads their files";
const COMPOSE: &str =
    "use docker compose or podman-compose with gpurun as their runtime: gpurun configure docker";
const FILES: &str = "containers are removed when they end: mount a directory, -v ./data:/data, and let the command write there";
const NETWORKS: &str = "containers have the host's network; --network none gives them only a loopback device";
const VOLUMES: &str = "gpurun keeps no volumes: make a directory and mount it, mkdir data, -v ./data:/data";
const COPY: &str = "copy images with skopeo copy, which supports every kind of image that gpurun reads";

const ENGINE: &str =
    "leave that word out: gpurun run [OPTIONS] IMAGE [COMMAND…] takes the place of its run command";
const LIST_GPUS: &str = "`gpurun ls` lists the GPUs";
const OTHER_PROGRAM: &str =
    "use docker, podman or apptainer for it: gpurun runs containers, and `gpurun --help` lists its commands";

/// A verb of Docker, Podman or Apptainer, and its replacement.
const ELSEWHERE: [(&str, &str); 91] = [
    ("docker", ENGINE),
    ("podman", ENGINE),
    ("nerdctl", ENGINE),
    ("nvidia-docker", ENGINE),
    ("apptainer", ENGINE),
    ("singularity", ENGINE),
    ("nvidia-smi", "name an image: gpurun run --gpus all IMAGE nvidia-smi; `gpurun ls` lists the GPUs"),
    ("gpu", LIST_GPUS),
    ("gpus", LIST_GPUS),
    ("devices", LIST_GPUS),
    ("check", "gpurun doctor checks the host"),
    ("status", "gpurun doctor checks the host"),
    ("untag", "gpurun rmi IMAGE removes a name from the store"),
    ("auto-update", "gpurun pull IMAGE fetches the image again"),
    ("artifact", OTHER_PROGRAM),
    ("cache", "gpurun images --usage shows what is stored, and gpurun prune frees what no image needs"),
    ("checkpoint", OTHER_PROGRAM),
    ("debug", EXEC),
    ("farm", OTHER_PROGRAM),
    ("healthcheck", OTHER_PROGRAM),
    ("init", OTHER_PROGRAM),
    ("key", OTHER_PROGRAM),
    ("machine", OTHER_PROGRAM),
    ("manifest", OTHER_PROGRAM),
    ("model", OTHER_PROGRAM),
    ("mount", OTHER_PROGRAM),
    ("node", OTHER_PROGRAM),
    ("play", "gpurun-device-plugin serves a cluster; kubectl starts pods in it"),
    ("plugin", OTHER_PROGRAM),
    ("quadlet", OTHER_PROGRAM),
    ("scout", OTHER_PROGRAM),
    ("secret", OTHER_PROGRAM),
    ("sign", OTHER_PROGRAM),
    ("trust", OTHER_PROGRAM),
    ("ps", IN_FOREGROUND),
    ("stop", IN_FOREGROUND),
    ("kill", IN_FOREGROUND),
    ("rm", IN_FOREGROUND),
    ("wait", IN_FOREGROUND),
    ("container", IN_FOREGROUND),
    (
        "pause",
        "send the signals yourself: kill -STOP PID and kill -CONT PID, with the PID of gpurun run --pidfile",
    ),
    (
        "unpause",
        "send the signals yourself: kill -STOP PID and kill -CONT PID, with the PID of gpurun run --pidfile",
    ),
    ("create", "gpurun run makes and starts a container in one step"),
    ("start", "gpurun run makes and starts a container in one step"),
    (
        "restart",
        "end it and run it again, or run it as a unit: systemd-run --user --unit NAME -p Restart=on-failure gpurun run …",
    ),
    ("exec", EXEC),
    ("attach", EXEC),
    ("shell", "gpurun run -it IMAGE sh"),
    ("instance", IN_FOREGROUND),
    ("logs", LOGS),
    ("events", LOGS),
    (
        "top",
        "ps on the host shows the container's processes; their pid namespace is that of the PID of gpurun run --pidfile",
    ),
    (
        "stats",
        "nvidia-smi shows the GPUs, and systemd-cgtop the processors and memory of the cgroups below gpurun/",
    ),
    ("inspect", "gpurun plan IMAGE shows what a container would get, and skopeo inspect describes an image"),
    ("history", "skopeo inspect --config docker://IMAGE shows an image's history"),
    ("cp", FILES),
    ("diff", FILES),
    ("commit", FILES),
    ("export", FILES),
    ("rename", "containers have no names that outlive them"),
    ("update", "end the container and run it with other limits"),
    ("port", NETWORKS),
    ("network", NETWORKS),
    ("volume", VOLUMES),
    ("build", BUILD),
    ("buildx", BUILD),
    ("builder", BUILD),
    ("login", LOGIN),
    ("logout", LOGIN),
    ("remote", LOGIN),
    ("compose", COMPOSE),
    ("up", COMPOSE),
    ("down", COMPOSE),
    ("stack", COMPOSE),
    ("swarm", COMPOSE),
    ("service", COMPOSE),
    ("pod", "start each container by itself: all have the host's network, and --ipc host shares memory"),
    ("kube", "gpurun-device-plugin serves a cluster; kubectl starts pods in it"),
    ("generate", "write a unit with the gpurun run line as ExecStart="),
    ("push", COPY),
    ("tag", COPY),
    ("save", COPY),
    ("load", "gpurun pull docker-archive:FILE, or run docker-archive:FILE at once"),
    ("import", "unpack the archive and run rootfs:DIR"),
    ("search", "look for images on the registry's own page, or with skopeo list-tags"),
    ("image", "gpurun images, gpurun pull, gpurun rmi and gpurun prune do it"),
    (
        "system",
        "gpurun images --usage shows what is used, gpurun prune frees it, and gpurun doctor checks the host",
    ),
    ("info", "gpurun doctor checks the host, gpurun inventory prints it, and gpurun config the settings"),
    ("context", "gpurun has no daemon, so there is nothing to connect to; over SSH: ssh HOST gpurun run …"),
    ("unshare", "gpurun run host: COMMAND runs a command on the host's files"),
    ("sh", "gpurun run -it IMAGE sh"),
];

/// Whether a word is certainly the name of an image.
pub fn is_explicit_reference(word: &str) -> bool {
    word.contains(['/', ':', '@'])
}

/// The error for a word that is not a command. `suggested` are similar commands.
pub fn unknown(word: &str, suggested: &[String]) -> Error {
    if word.is_empty() {
        return Error::new(Code::Usage, "the command is an empty word")
            .cause("a variable of the shell that is not set leaves nothing")
            .fix("`gpurun --help` lists the commands");
    }
    let error = Error::new(Code::Usage, format!("there is no command {word:?}"));
    let lower = word.to_lowercase();
    if lower != word && super::VERBS.contains(&lower.as_str()) {
        return error.fix(format!("did you mean gpurun {lower}?"));
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(verb, _)| *verb == word) {
        return error.fix(*instead);
    }
    if let Some((what, fix)) = local_image(word) {
        return error.cause(format!("{word} is {what}")).fix(fix);
    }
    let image =
        format!("`gpurun run {word}` runs an image of that name, and `gpurun --help` lists the commands");
    if suggested.is_empty() {
        return error.fix(image);
    }
    error.fix(format!("did you mean {}? {image}", suggested.join(" or ")))
}

/// The error for a local file or directory that was typed as an image without its kind. `None` if the word is not such a
/// path.
pub fn path_without_kind(word: &str) -> Option<Error> {
    let is_path = word.starts_with(['/', '.', '~']);
    let looks_like_archive = IMAGE_SUFFIXES.iter().any(|(suffix, _)| word.ends_with(suffix));
    if word.contains(':') || !(is_path || looks_like_archive) {
        return None;
    }
    let (what, fix) = local_image(word)?;
    Some(
        Error::new(
            Code::ImageReference,
            format!("{word:?} is {what}, and not the name of an image of a registry"),
        )
        .fix(fix),
    )
}

/// The kind of a file or directory, and the command to run it as an image.
fn local_image(word: &str) -> Option<(String, String)> {
    let path = Path::new(word);
    let stat = std::fs::metadata(path).ok()?;
    let shown = path.display();
    if stat.is_dir() {
        return Some(if path.join("index.json").exists() && path.join("oci-layout").exists() {
            ("a directory with an OCI image layout".into(), format!("gpurun run oci:{shown}"))
        } else {
            ("a directory".into(), format!("gpurun run rootfs:{shown} runs a command on the files in it"))
        });
    }
    let kind = IMAGE_SUFFIXES.iter().find(|(suffix, _)| word.ends_with(suffix)).map(|(_, kind)| *kind);
    Some(match kind {
        Some("sif") => (
            "a SIF image of Apptainer".into(),
            format!(
                "gpurun does not read SIF yet: apptainer build --sandbox DIR {shown}, and gpurun run rootfs:DIR"
            ),
        ),
        Some("sqsh") => (
            "a squashfs file".into(),
            format!(
                "gpurun does not read squashfs yet: unsquashfs -d DIR {shown}, and gpurun run rootfs:DIR"
            ),
        ),
        Some(_) => (
            "an archive".into(),
            format!(
                "gpurun run docker-archive:{shown} (of docker save), or gpurun run oci-archive:{shown} (of an OCI layout)"
            ),
        ),
        None => (
            "a file".into(),
            format!(
                "run it on the host's files: gpurun run host: {}{shown}; or in an image: gpurun run IMAGE COMMAND",
                if word.contains('/') { "" } else { "./" }
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_no_command_gets_its_own_advice() {
        let fix = |word: &str, suggested: &[&str]| {
            let suggested: Vec<String> = suggested.iter().map(|s| (*s).to_owned()).collect();
            unknown(word, &suggested).fix_line().to_owned()
        };
        assert!(fix("dcotor", &["doctor"]).starts_with("did you mean doctor? `gpurun run dcotor`"));
        assert_eq!(fix("RUN", &[]), "did you mean gpurun run?");
        assert!(fix("ubuntu", &[]).starts_with("`gpurun run ubuntu`"));
        assert!(fix("login", &[]).contains("podman login"));
        assert!(fix("load", &[]).contains("docker-archive:FILE"));
        assert!(fix("docker", &["doctor"]).starts_with("leave that word out: gpurun run"));
        assert!(fix("nvidia-smi", &[]).contains("IMAGE nvidia-smi"));
        assert_eq!(fix("", &[]), "`gpurun --help` lists the commands");
    }

    #[test]
    fn no_command_of_gpurun_has_advice_for_another_program() {
        for (index, (verb, _)) in ELSEWHERE.iter().enumerate() {
            assert!(!super::super::VERBS.contains(verb), "{verb}");
            assert!(ELSEWHERE[..index].iter().all(|(other, _)| other != verb), "{verb} stands twice");
        }
    }

    #[test]
    fn a_local_file_gets_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for name in ["image.sif", "train.tar", "x.tar.zst", "root.sqsh"] {
            std::fs::write(path(name), "").unwrap();
        }
        for (name, fix) in [
            ("image.sif", "SIF"),
            ("train.tar", "docker-archive:"),
            ("x.tar.zst", "oci-archive:"),
            ("root.sqsh", "unsquashfs"),
            ("", "rootfs:"),
        ] {
            assert!(path_without_kind(&path(name)).unwrap().fix_line().contains(fix), "{name}");
        }
        assert!(path_without_kind("/bin/sh").unwrap().fix_line().contains("host: /bin/sh;"));
        assert!(path_without_kind(&path("absent.tar")).is_none());
        assert!(path_without_kind("ubuntu").is_none());
        assert!(path_without_kind(&format!("rootfs:{}", path(""))).is_none());
    }
}
