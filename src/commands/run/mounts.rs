//! `-v`, `--mount` and `--tmpfs`.

use super::{sizes::size, usage};
use crate::{
    apply::container::spec::Volume,
    cli::Run,
    error::{Code, Error, Result},
};
use std::path::{Path, PathBuf};

/// `--tmpfs`, `-v` and `--mount`. Targets are absolute; sources that are not are beneath the working directory.
pub fn volumes(args: &Run) -> Result<Vec<Volume>> {
    let tmpfs = args.tmpfs.iter().map(|text| tmpfs(text));
    let volume = args.volume.iter().map(|text| volume(text));
    let mount = args.mount.iter().map(|text| mount(text));
    let mut all = tmpfs.chain(volume).chain(mount).collect::<Result<Vec<_>>>()?;
    // Outer mounts first, whatever the order in which they were typed; the same depth keeps its order.
    all.sort_by_key(|volume| volume.target().components().count());
    Ok(all)
}

fn target(option: &str, text: &str) -> Result<PathBuf> {
    let path = Path::new(text);
    if !path.is_absolute()
        || path.components().any(|c| c == std::path::Component::ParentDir)
        || path.parent().is_none()
    {
        return Err(usage(format!("{option}: the target {text:?} is not an absolute path below /"))
            .fix("write /path/in/the/container"));
    }
    Ok(path.components().collect())
}

fn source(option: &str, text: &str) -> Result<PathBuf> {
    let path = std::path::absolute(text)
        .map_err(|error| usage(format!("{option}: the source {text:?} is not a path")).cause(error))?;
    if !text.contains('/') && text != "." && text != ".." {
        return Err(usage(format!("{option}: {text:?} is the name of a volume, and gpurun keeps none"))
            .fix(format!("mount a directory: ./{text} or an absolute path")));
    }
    if std::fs::symlink_metadata(&path).is_err() {
        return Err(Error::new(Code::Volume, format!("{} does not exist on the host", path.display()))
            .cause(
                "gpurun makes no directory on the host for a mount: a misspelt path would be an empty volume",
            )
            .fix(format!("mkdir -p {}", path.display())));
    }
    Ok(path)
}

fn volume(text: &str) -> Result<Volume> {
    let fields: Vec<&str> = text.split(':').collect();
    let ([from, to] | [from, to, _]) = fields.as_slice() else {
        return Err(usage(format!("-v {text:?} is not SOURCE:TARGET[:OPTIONS]"))
            .fix("write -v /data:/data or -v /data:/data:ro"));
    };
    let mut read_only = false;
    for option in fields.get(2).into_iter().flat_map(|options| options.split(',')) {
        match option {
            "ro" => read_only = true,
            // SELinux labels and consistency hints: there is nothing to do for them here; propagation is always private.
            "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" | "rprivate" | "private" => {}
            other => {
                return Err(
                    usage(format!("-v {text:?} has the option {other:?}")).fix("options are ro, rw, z, Z")
                );
            }
        }
    }
    Ok(Volume::Bind { source: source("-v", from)?, target: target("-v", to)?, read_only })
}

fn mount(text: &str) -> Result<Volume> {
    let bad = |what: &str| {
        usage(format!("--mount {text:?}: {what}"))
            .fix("write type=bind,source=/data,target=/data[,readonly] or type=tmpfs,target=/x")
    };
    let (mut kind, mut from, mut to, mut read_only, mut bytes, mut mode) =
        ("volume", None, None, false, None, 0o1777);
    for field in text.split(',') {
        let (key, value) = field.split_once('=').map_or((field, None), |(key, value)| (key, Some(value)));
        match (key, value) {
            ("type", Some(value)) => kind = value,
            ("source" | "src", Some(value)) => from = Some(value),
            ("target" | "dst" | "destination", Some(value)) => to = Some(value),
            ("readonly" | "ro", None | Some("true" | "1")) => read_only = true,
            ("readonly" | "ro", Some("false" | "0")) => read_only = false,
            ("tmpfs-size", Some(value)) => bytes = Some(size("--mount tmpfs-size", value)?),
            ("tmpfs-mode", Some(value)) => {
                mode = octal(value).ok_or_else(|| bad("tmpfs-mode is not octal"))?;
            }
            ("bind-propagation", Some("rprivate" | "private")) | ("consistency", _) => {}
            _ => return Err(bad(&format!("{field:?} is not known"))),
        }
    }
    let to = target("--mount", to.ok_or_else(|| bad("there is no target"))?)?;
    match kind {
        "bind" => Ok(Volume::Bind {
            source: source("--mount", from.ok_or_else(|| bad("there is no source"))?)?,
            target: to,
            read_only,
        }),
        "tmpfs" => Ok(Volume::Tmpfs { target: to, size: bytes, mode, exec: true, read_only }),
        "volume" => Err(bad("gpurun keeps no volumes")),
        other => Err(bad(&format!("the type {other:?} is not known"))),
    }
}

fn tmpfs(text: &str) -> Result<Volume> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    let (mut bytes, mut mode, mut exec, mut read_only) = (None, 0o1777, false, false);
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option.split_once('=') {
            Some(("size", value)) => bytes = Some(size("--tmpfs size", value)?),
            Some(("mode", value)) => {
                mode =
                    octal(value).ok_or_else(|| usage(format!("--tmpfs {text:?}: the mode is not octal")))?;
            }
            None if option == "exec" => exec = true,
            None if option == "ro" => read_only = true,
            None if ["noexec", "nosuid", "nodev", "rw"].contains(&option) => {}
            _ => {
                return Err(usage(format!("--tmpfs {text:?} has the option {option:?}"))
                    .fix("options are size=, mode=, exec, ro"));
            }
        }
    }
    Ok(Volume::Tmpfs { target: target("--tmpfs", path)?, size: bytes, mode, exec, read_only })
}

fn octal(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

/// `-v`, `--mount` and `--tmpfs`, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = crate::fuzz_targets::text(bytes);
    let _ = (volume(text), mount(text), tmpfs(text));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;
    use proptest::prelude::*;

    #[test]
    fn mounts_are_dockers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        let args = run(&[
            "-v",
            &format!("{path}:/a/b:ro"),
            "--mount",
            &format!("type=bind,src={path},dst=/a"),
            "--tmpfs",
            "/t:size=1m,exec",
        ]);
        let bind = |target: &str, read_only| Volume::Bind {
            source: dir.path().into(),
            target: target.into(),
            read_only,
        };
        let tmpfs = Volume::Tmpfs {
            target: "/t".into(),
            size: Some(1 << 20),
            mode: 0o1777,
            exec: true,
            read_only: false,
        };
        assert_eq!(volumes(&args).unwrap(), [tmpfs, bind("/a", false), bind("/a/b", true)]);
        for (option, text) in [
            ("-v", "/nope-there:/x"),
            ("-v", "cache:/x"),
            ("-v", "/tmp:x"),
            ("-v", "/tmp:/"),
            ("-v", "/tmp:/../x"),
            ("-v", "/tmp:/x:shared"),
            ("-v", "/tmp"),
            ("--mount", "type=bind,target=/x"),
            ("--mount", "type=nfs,target=/x"),
            ("--tmpfs", "/x:size=huge"),
        ] {
            let error = volumes(&run(&[option, text])).unwrap_err();
            assert!(!error.fix_line().is_empty(), "{option} {text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_mount_or_an_error(text in ".{0,40}") {
            let _ = (volume(&text), mount(&text), tmpfs(&text));
        }
    }
}
