//! Recognizes misspelt and foreign kinds in front of an image's name, which the grammar of registries takes for an image and its
//! tag: `rotfs:rb` is a valid name at Docker Hub.

use std::path::Path;

const KINDS: [&str; 7] =
    ["oci-archive", "docker-archive", "containers-storage", "docker-daemon", "rootfs", "oci", "host"];

/// Names of at most this length are compared without regard to case and dashes alone: `ghost:5` and `ocr:1` are images.
const SHORT: usize = 4;

const SKOPEO: &str = "copy it with skopeo copy {} oci:DIR, and run oci:DIR";
const APPTAINER: &str = "apptainer build --sandbox DIR {}, and gpurun run rootfs:DIR";
const PATH: &str = "write its kind in front: docker-archive:FILE, oci-archive:FILE, oci:DIR or rootfs:DIR";

/// Kinds of skopeo, Apptainer and enroot that gpurun does not read, and what to do; `{}` is what was typed.
const FOREIGN: [(&str, &str); 11] = [
    ("dir:", SKOPEO),
    ("ostree:", SKOPEO),
    ("sif:", APPTAINER),
    ("library:", APPTAINER),
    ("shub:", APPTAINER),
    ("oras:", APPTAINER),
    ("tarball:", "unpack it, `mkdir DIR && tar -xf FILE -C DIR`, and run rootfs:DIR"),
    ("docker-tar:", "write docker-archive:FILE"),
    ("file://", PATH),
    ("dockerd://", "write docker-daemon:NAME"),
    ("podman://", "write containers-storage:NAME"),
];

/// What is wrong with the kind of an image, and what to write. `None` where it names an image of a registry.
pub fn misspelt(text: &str) -> Option<(String, String)> {
    let lower = text.to_ascii_lowercase();
    for scheme in ["https://", "http://"] {
        if lower.starts_with(scheme) {
            let name = &text[scheme.len()..];
            return Some((format!("{scheme} is not part of an image's name"), format!("write {name}")));
        }
    }
    let (kind, rest) = text.split_once(':')?;
    let port = rest.split('/').next().unwrap_or_default();
    if kind.is_empty() || kind.contains(['/', '.', '@', '[']) {
        return None;
    }
    if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    if let Some((kind, fix)) = FOREIGN.iter().find(|(kind, _)| lower.starts_with(kind)) {
        return Some((format!("gpurun does not read images of the kind {kind}"), fix.replace("{}", text)));
    }
    let plain = kind.to_ascii_lowercase().replace('_', "-");
    if plain == "docker" && rest.contains('/') && !text.starts_with("docker://") {
        let name = rest.trim_start_matches('/');
        return Some((format!("{kind}: wants // behind it"), format!("write docker://{name}")));
    }
    let is_near =
        |known: &str| plain == known || known.len() > SHORT && distance(&plain, known) <= known.len() / 5;
    if let Some(known) = KINDS.iter().find(|known| is_near(known)) {
        return Some((format!("{kind}: is not a kind of image"), format!("did you mean {known}:{rest}?")));
    }
    let is_path = rest.starts_with(['/', '.', '~']) || rest.contains('/') || rest.contains(".tar");
    (is_path && Path::new(rest).exists())
        .then(|| (format!("{kind}: is not a kind of image, and {rest} is a path"), PATH.to_owned()))
}

/// How many letters are added, left out, replaced or exchanged with their neighbour (optimal string alignment).
pub fn distance(left: &str, right: &str) -> usize {
    let (left, right) = (left.as_bytes(), right.as_bytes());
    let mut before_last = Vec::new();
    let mut last: Vec<usize> = (0..=right.len()).collect();
    for (row, letter) in left.iter().enumerate() {
        let mut current = vec![row + 1];
        for (column, other) in right.iter().enumerate() {
            let replaced = last[column] + usize::from(letter != other);
            let mut least = replaced.min(last[column + 1] + 1).min(current[column] + 1);
            let is_exchanged =
                row > 0 && column > 0 && *letter == right[column - 1] && left[row - 1] == *other;
            if is_exchanged {
                least = least.min(before_last[column - 1] + 1);
            }
            current.push(least);
        }
        before_last = std::mem::replace(&mut last, current);
    }
    last[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_kinds_get_the_right_one() {
        for (typed, part) in [
            ("docker-archve:x.tar", "docker-archive:x.tar"),
            ("oci-achive:x.tar", "oci-archive:x.tar"),
            ("docker_archive:x.tar", "docker-archive:x.tar"),
            ("rotfs:rb", "rootfs:rb"),
            ("rootsf:rb", "rootfs:rb"),
            ("containers-storge:x", "containers-storage:x"),
            ("docker-deamon:x", "docker-daemon:x"),
            ("OCI:x", "oci:x"),
            ("HOST:", "host:"),
            ("docker:nvcr.io/nvidia/cuda", "docker://nvcr.io/nvidia/cuda"),
            ("https://nvcr.io/nvidia/cuda:1", "write nvcr.io/nvidia/cuda:1"),
            ("sif:x.sif", "--sandbox DIR sif:x.sif"),
            ("dir:/x", "skopeo copy dir:/x"),
            ("library://alpine", "library://alpine"),
            ("file:///x.tar", "docker-archive:FILE"),
            ("tar:/etc/passwd", "docker-archive:FILE"),
        ] {
            let (cause, fix) = misspelt(typed).expect(typed);
            assert!(fix.contains(part), "{typed}: {cause}: {fix}");
        }
    }

    #[test]
    fn names_of_registries_stay_what_they_are() {
        for name in [
            "ubuntu",
            "ubuntu:24.04",
            "docker:dind",
            "docker:24",
            "docker://ubuntu",
            "ghost:alpine",
            "ocr:latest",
            "localhost:5000/dir:1",
            "dir:5000/x",
            "registry.example.com:443/oci-achive:x",
            "nvcr.io/nvidia/cuda:12.4.1-base",
            "root:latest",
        ] {
            assert_eq!(misspelt(name), None, "{name}");
        }
    }
}
