//! `--mount`: fields of one CSV record (docker/cli, opts/mount.go).

use super::{
    mounts::{PROPAGATION, source, target},
    sizes::size,
    tmpfs, usage,
};
use crate::{
    apply::container::spec::Volume,
    cli::is_true,
    error::{Error, Result},
    request::csv,
    sys::mount::Flags,
};
use std::path::PathBuf;

/// The fields of `--mount` (docker/cli, opts/mount.go).
struct Fields<'a> {
    text: &'a str,
    kind: String,
    source: Option<String>,
    target: Option<String>,
    read_only: bool,
    recursive: bool,
    receives_mounts: bool,
    bytes: Option<u64>,
    mode: u32,
    /// Keys of one type, such as `tmpfs-size`.
    typed: Vec<String>,
}

impl<'a> Fields<'a> {
    fn bad(text: &str, what: &str) -> Error {
        usage(format!("--mount {text:?}: {what}")).fix(
            "write --mount type=bind,source=/data,target=/data[,readonly] or --mount type=tmpfs,target=/x[,tmpfs-size=1g]",
        )
    }

    fn parse(text: &'a str) -> Result<Self> {
        let mut fields = Self {
            text,
            kind: "volume".into(),
            source: None,
            target: None,
            read_only: false,
            recursive: true,
            receives_mounts: false,
            bytes: None,
            mode: 0o1777,
            typed: Vec::new(),
        };
        for field in csv::record(text).map_err(|why| Self::bad(text, why))? {
            let (key, value) =
                field.split_once('=').map_or((field.as_str(), None), |(key, value)| (key, Some(value)));
            fields.set(&key.to_ascii_lowercase(), value, &field)?;
        }
        let kind = fields.kind.as_str();
        if let Some(other) = fields.typed.iter().find(|key| !key.starts_with(&format!("{kind}-"))) {
            return Err(Self::bad(text, &format!("{other:?} has no effect with type={kind}")));
        }
        Ok(fields)
    }

    fn set(&mut self, key: &str, value: Option<&str>, field: &str) -> Result<()> {
        let text = self.text;
        let unknown = || Self::bad(text, &format!("{field:?} is not known"));
        let boolean = |value: Option<&str>| value.map_or(Some(true), is_true).ok_or_else(unknown);
        if ["bind-", "tmpfs-", "volume-"].iter().any(|kind| key.starts_with(kind)) {
            self.typed.push(key.to_owned());
        }
        match (key, value) {
            ("type", Some(value)) => self.kind = value.to_ascii_lowercase(),
            ("source" | "src", Some(value)) => {
                self.source = Some(value.to_owned()).filter(|path| !path.is_empty());
            }
            ("target" | "dst" | "destination", Some(value)) => self.target = Some(value.to_owned()),
            ("readonly" | "ro", value) => self.read_only = boolean(value)?,
            ("rw", value) => self.read_only = !boolean(value)?,
            ("bind-nonrecursive", value) => self.recursive = !boolean(value)?,
            ("bind-recursive", Some("disabled")) => self.recursive = false,
            ("bind-recursive", Some("enabled" | "readonly")) => self.recursive = true,
            ("bind-recursive", Some("writable")) => {
                return Err(usage(format!("--mount {text:?}: {field:?} cannot be served"))
                    .cause("a read-only mount makes the mounts below it read-only")
                    .fix("leave out readonly, or mount the writable directory by itself: -v SOURCE/SUB:TARGET/SUB"));
            }
            ("bind-propagation", Some("rslave" | "slave")) => self.receives_mounts = true,
            ("bind-propagation", Some("rshared" | "shared")) => {
                return Err(usage(format!("--mount {text:?}: {field:?} cannot be served")).fix(PROPAGATION));
            }
            ("tmpfs-size", Some(value)) => self.bytes = Some(size("--mount tmpfs-size", value)?),
            ("tmpfs-mode", Some(value)) => {
                self.mode = tmpfs::octal(value).ok_or_else(|| {
                    usage(format!("--mount {text:?}: the mode {value:?} is not octal"))
                        .fix("write octal digits: --mount type=tmpfs,target=/x,tmpfs-mode=1777")
                })?;
            }
            ("volume-opt" | "volume-driver" | "volume-subpath", Some(_))
                if field != "volume-driver=local" =>
            {
                return Err(usage(format!(
                    "--mount {text:?}: {field:?} needs a volume, and gpurun keeps no volumes yet"
                ))
                .fix("mount a directory of the host: --mount type=bind,source=/data,target=/data"));
            }
            ("bind-propagation", Some("rprivate" | "private"))
            | ("consistency" | "relabel" | "volume-driver", Some(_))
            | ("volume-nocopy" | "volume-label" | "z" | "shared", _) => {}
            _ => return Err(unknown()),
        }
        Ok(())
    }

    fn target(&self) -> Result<PathBuf> {
        target("--mount", self.target.as_deref().ok_or_else(|| Self::bad(self.text, "there is no target"))?)
    }
}

/// The target of an anonymous volume; `None` for any other mount, and for errors, which [`mount`] reports.
pub fn anonymous(text: &str) -> Option<Result<PathBuf>> {
    let fields = Fields::parse(text).ok()?;
    (fields.kind == "volume" && fields.source.is_none()).then(|| fields.target())
}

/// The mount; `None` is an anonymous volume.
pub fn mount(text: &str) -> Result<Option<Volume>> {
    let fields = Fields::parse(text)?;
    let to = fields.target()?;
    let shown = to.display();
    match (fields.kind.as_str(), fields.source.as_deref()) {
        ("bind", Some(from)) => Ok(Some(Volume::Bind {
            source: source("--mount", from, &format!("type=bind,source=SOURCE,target={shown}"))?,
            target: to,
            read_only: fields.read_only,
            recursive: fields.recursive,
            receives_mounts: fields.receives_mounts,
        })),
        ("bind", None) => Err(Fields::bad(text, "there is no source")),
        ("tmpfs", None) => Ok(Some(Volume::Tmpfs {
            target: to,
            options: tmpfs::options(fields.mode, fields.bytes.map(|bytes| bytes.to_string())),
            flags: Flags { read_only: fields.read_only, nosuid: true, nodev: true, noexec: false },
        })),
        ("tmpfs", Some(_)) => Err(Fields::bad(text, "a tmpfs has no source")),
        ("volume", None) => Ok(None),
        ("volume", Some(path)) if path.starts_with(['/', '.', '~']) => {
            Err(usage(format!("--mount {text:?}: a volume has a name, and {path:?} is a path"))
                .fix(format!("add type=bind: --mount type=bind,source={path},target={shown}")))
        }
        ("volume", Some(name)) => {
            Err(usage(format!("--mount {text:?}: gpurun keeps no volumes yet")).fix(format!(
                "mount a directory: mkdir -p ./{name}, and --mount type=bind,source=./{name},target={shown}"
            )))
        }
        ("image", _) => Err(usage(format!("--mount {text:?}: the type \"image\" cannot be served"))
            .fix(format!("unpack the image and mount its directory: --mount type=bind,source=DIR,target={shown},readonly"))),
        (other, _) => Err(Fields::bad(text, &format!("the type {other:?} cannot be served"))),
    }
}
