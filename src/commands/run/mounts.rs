//! `-v`, `--mount`, `--bind` and `--tmpfs`.

use super::{sizes::size, usage};
use crate::{
    apply::{
        container::spec::{TmpfsSize, Volume},
        rootfs::{Found, Layers},
    },
    cli::{Run, is_true},
    error::{Code, Error, Result},
    request::csv,
};
use std::path::{Path, PathBuf};

/// All mounts of the command line, outer ones first. Targets are absolute.
///
/// # Errors
/// [`Code::Usage`] for malformed options and for volumes that outlive the container, [`Code::Volume`] for a missing source.
pub fn volumes(args: &Run) -> Result<Vec<Volume>> {
    let tmpfs = args.tmpfs.iter().map(|text| tmpfs(text));
    let volume = args.volume.iter().filter(|text| text.contains(':')).map(|text| volume(text));
    let bind = args.bind.iter().flat_map(|list| list.split(',')).map(bind);
    let mount = args.mount.iter().filter_map(|text| mount(text).transpose());
    let mut all = tmpfs.chain(volume).chain(bind).chain(mount).collect::<Result<Vec<_>>>()?;
    // A stable sort: outer mounts first, and mounts of the same depth in the typed order.
    all.sort_by_key(|volume| volume.target().components().count());
    Ok(all)
}

/// The directories of `-v TARGET` and of `--mount type=volume` without a source. Like Docker's anonymous volumes with `--rm`
/// they show the image's content and are removed with the container.
pub fn anonymous(args: &Run) -> Result<Vec<PathBuf>> {
    let short = args.volume.iter().filter(|text| !text.contains(':')).map(|text| target("-v", text));
    let long = args.mount.iter().filter_map(|text| match Fields::parse(text) {
        Ok(fields) if fields.kind == "volume" && fields.source.is_none() => Some(fields.target()),
        // Reported by `volumes`.
        _ => None,
    });
    short.chain(long).collect()
}

/// Refuses a file over one of the image's directories, and the reverse.
///
/// # Errors
/// [`Code::Volume`], with both paths.
pub fn check_targets(volumes: &[Volume], layers: &Layers) -> Result<()> {
    for volume in volumes {
        let Volume::Bind { source, target, .. } = volume else { continue };
        let is_directory = source.is_dir();
        let (here, there) = match layers.find(&target.to_string_lossy()) {
            Some((_, Found::Directory(_))) if !is_directory => ("a file", "a directory"),
            Some((_, Found::File(_) | Found::Other)) if is_directory => ("a directory", "a file"),
            _ => continue,
        };
        let (source, target) = (source.display(), target.display());
        return Err(Error::new(Code::Volume, format!("{source} cannot be mounted on {target}"))
            .cause(format!("{source} is {here} on the host, and {target} is {there} in the image"))
            .fix(if is_directory {
                format!("mount the directory elsewhere, or one file of it: -v {source}/FILE:{target}")
            } else {
                format!("name a file in the directory: -v {source}:{target}/NAME")
            }));
    }
    Ok(())
}

fn target(option: &str, path: impl AsRef<Path>) -> Result<PathBuf> {
    let path = path.as_ref();
    if !path.is_absolute()
        || path.components().any(|c| c == std::path::Component::ParentDir)
        || path.parent().is_none()
    {
        let shown = path.to_string_lossy();
        return Err(usage(format!("{option}: the target {shown:?} is not an absolute path below /"))
            .fix("write /path/in/the/container"));
    }
    Ok(path.components().collect())
}

/// Parses a path of the host. As in Docker, a path begins with `/`, `.` or `~`, and anything else is the name of a volume.
fn source(option: &str, text: &str) -> Result<PathBuf> {
    let path = std::path::absolute(text).map_err(|error| {
        usage(format!("{option}: the source {text:?} is not a path"))
            .cause(error)
            .fix("write an absolute path: `-v SOURCE:/path/in/the/container`")
    })?;
    if !text.starts_with(['/', '.']) {
        let error =
            usage(format!("{option}: {text:?} is the name of a volume, and gpurun keeps no volumes yet"));
        return Err(if path.exists() {
            error.fix(format!("to mount the directory write ./{text}"))
        } else {
            error.fix(format!("mount a directory: mkdir -p ./{text}, and {option} ./{text}:…"))
        });
    }
    if std::fs::symlink_metadata(&path).is_err() {
        return Err(Error::new(Code::Volume, format!("{} does not exist on the host", path.display()))
            .cause(
                "gpurun makes no directory on the host for a mount: a misspelt path would be an empty volume",
            )
            .fix(if path.extension().is_some() {
                format!("correct the path, or make the file: {}", path.display())
            } else {
                format!("correct the path, or mkdir -p {}", path.display())
            }));
    }
    Ok(path)
}

/// The path with `..` resolved by its text, like Go's `filepath.Clean`.
fn without_parents(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut clean, part| {
        if part == std::path::Component::ParentDir {
            clean.pop();
        } else {
            clean.push(part);
        }
        clean
    })
}

/// A bind mount with Docker's defaults.
fn bind_of(source: PathBuf, target: PathBuf) -> Bind {
    Bind { source, target, read_only: false, recursive: true, receives_mounts: false }
}

struct Bind {
    source: PathBuf,
    target: PathBuf,
    read_only: bool,
    recursive: bool,
    receives_mounts: bool,
}

impl Bind {
    /// Parses an option after the target of `-v`. `false` if it is unknown.
    fn set(&mut self, option: &str) -> bool {
        match option {
            "ro" | "readonly" => self.read_only = true,
            "rslave" | "slave" => self.receives_mounts = true,
            // SELinux labels, consistency hints and copying into new volumes have no effect on a bind mount.
            "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" | "default" | "nocopy" | "rprivate"
            | "private" | "rbind" | "exec" | "suid" | "" => {}
            "bind" => self.recursive = false,
            _ => return false,
        }
        true
    }

    fn volume(self) -> Volume {
        let Self { source, target, read_only, recursive, receives_mounts } = self;
        Volume::Bind { source, target, read_only, recursive, receives_mounts }
    }
}

const PROPAGATION: &str = "mounts made in a container never reach the host: write rslave, which lets mounts of the host reach \
                           the container";

fn volume(text: &str) -> Result<Volume> {
    let fields: Vec<&str> = text.split(':').collect();
    let ([from, to] | [from, to, _]) = fields.as_slice() else {
        return Err(usage(format!("-v {text:?} is not SOURCE:TARGET[:OPTIONS]"))
            .fix("write -v /data:/data or -v /data:/data:ro"));
    };
    let mut bind = bind_of(source("-v", from)?, target("-v", to)?);
    for option in fields.get(2).into_iter().flat_map(|options| options.split(',')) {
        if !bind.set(option) {
            return Err(usage(format!("-v {text:?} has the option {option:?}")).fix(match option {
                "shared" | "rshared" => PROPAGATION,
                "U" => "give the directory to the user yourself: chown -R UID:GID SOURCE",
                "O" => "copy the directory, or mount it read-only: -v SOURCE:TARGET:ro",
                _ => "write `-v SOURCE:TARGET:OPTIONS` with ro, rw, z, Z, rslave, rprivate, nocopy, cached, delegated or consistent",
            }));
        }
    }
    Ok(bind.volume())
}

/// Apptainer's `SOURCE[:TARGET[:ro]]`.
fn bind(text: &str) -> Result<Volume> {
    let (from, rest) = text.split_once(':').unwrap_or((text, text));
    let (to, options) = rest.split_once(':').unwrap_or((rest, "rw"));
    let path = source("--bind", from)?;
    let to = if rest == text { target("--bind", without_parents(&path))? } else { target("--bind", to)? };
    let mut bind = bind_of(path, to);
    if !bind.set(options) {
        return Err(usage(format!("--bind {text:?} has the option {options:?}")).fix("write `:ro` or `:rw`"));
    }
    Ok(bind.volume())
}

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
}

impl<'a> Fields<'a> {
    fn bad(text: &str, what: &str) -> Error {
        usage(format!("--mount {text:?}: {what}")).fix(
            "write type=bind,source=/data,target=/data[,readonly] or type=tmpfs,target=/x[,tmpfs-size=1g]",
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
        };
        for field in csv::record(text).map_err(|why| Self::bad(text, why))? {
            let (key, value) =
                field.split_once('=').map_or((field.as_str(), None), |(key, value)| (key, Some(value)));
            fields.set(&key.to_ascii_lowercase(), value, &field)?;
        }
        Ok(fields)
    }

    fn set(&mut self, key: &str, value: Option<&str>, field: &str) -> Result<()> {
        let text = self.text;
        let unknown = || Self::bad(text, &format!("{field:?} is not known"));
        let boolean = |value: Option<&str>| value.map_or(Some(true), is_true).ok_or_else(unknown);
        match (key, value) {
            ("type", Some(value)) => self.kind = value.to_ascii_lowercase(),
            ("source" | "src", Some(value)) => self.source = Some(value.to_owned()),
            ("target" | "dst" | "destination", Some(value)) => self.target = Some(value.to_owned()),
            ("readonly" | "ro", value) => self.read_only = boolean(value)?,
            ("rw", value) => self.read_only = !boolean(value)?,
            ("bind-nonrecursive", value) => self.recursive = !boolean(value)?,
            ("bind-recursive", Some("disabled")) => self.recursive = false,
            ("bind-recursive", Some("enabled" | "readonly")) => self.recursive = true,
            ("bind-propagation", Some("rslave" | "slave")) => self.receives_mounts = true,
            ("bind-propagation", Some("rshared" | "shared")) => {
                return Err(usage(format!("--mount {text:?}: {field:?} cannot be served")).fix(PROPAGATION));
            }
            ("tmpfs-size", Some(value)) => self.bytes = Some(size("--mount tmpfs-size", value)?),
            ("tmpfs-mode", Some(value)) => {
                self.mode = octal(value).ok_or_else(|| Self::bad(text, "tmpfs-mode is not octal"))?;
            }
            ("bind-propagation", Some("rprivate" | "private"))
            | ("consistency" | "relabel", Some(_))
            | ("volume-nocopy" | "volume-label" | "z" | "shared", _) => {}
            _ => return Err(unknown()),
        }
        Ok(())
    }

    fn target(&self) -> Result<PathBuf> {
        target("--mount", self.target.as_deref().ok_or_else(|| Self::bad(self.text, "there is no target"))?)
    }
}

/// `None` is an anonymous volume.
fn mount(text: &str) -> Result<Option<Volume>> {
    let fields = Fields::parse(text)?;
    let to = fields.target()?;
    match (fields.kind.as_str(), &fields.source) {
        ("bind", Some(from)) => Ok(Some(Volume::Bind {
            source: source("--mount", from)?,
            target: to,
            read_only: fields.read_only,
            recursive: fields.recursive,
            receives_mounts: fields.receives_mounts,
        })),
        ("bind", None) => Err(Fields::bad(text, "there is no source")),
        ("tmpfs", None) => Ok(Some(Volume::Tmpfs {
            target: to,
            size: fields.bytes.map(TmpfsSize::Bytes),
            mode: fields.mode,
            more: Vec::new(),
            exec: true,
            read_only: fields.read_only,
        })),
        ("tmpfs", Some(_)) => Err(Fields::bad(text, "a tmpfs has no source")),
        ("volume", None) => Ok(None),
        ("volume", Some(name)) => {
            Err(usage(format!("--mount {text:?}: gpurun keeps no volumes yet")).fix(format!(
                "mount a directory: mkdir -p ./{name}, and type=bind,source=./{name},target={}",
                to.display()
            )))
        }
        (other, _) => Err(Fields::bad(text, &format!("the type {other:?} cannot be served"))),
    }
}

fn tmpfs(text: &str) -> Result<Volume> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    let (mut total, mut mode, mut exec, mut read_only) = (None, 0o1777, false, false);
    let mut more: Vec<(&'static str, u64)> = Vec::new();
    let mut number = |name: &'static str, value: Option<u64>| {
        let value = value.ok_or_else(|| {
            usage(format!("--tmpfs {text:?}: {name} is not a number"))
                .fix(format!("write --tmpfs TARGET:{name}=1000"))
        })?;
        more.retain(|(known, _)| *known != name);
        more.push((name, value));
        Ok::<_, Error>(())
    };
    let id = |value: &str| value.parse::<u32>().ok().map(u64::from);
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option.split_once('=') {
            Some(("size", value)) => total = Some(tmpfs_size(value)?),
            Some(("mode", value)) => {
                mode =
                    octal(value).ok_or_else(|| usage(format!("--tmpfs {text:?}: the mode is not octal")))?;
            }
            Some(("uid", value)) => number("uid", id(value))?,
            Some(("gid", value)) => number("gid", id(value))?,
            Some(("nr_blocks", value)) => number("nr_blocks", size("--tmpfs nr_blocks", value).ok())?,
            Some(("nr_inodes", value)) => number("nr_inodes", size("--tmpfs nr_inodes", value).ok())?,
            None if option == "exec" => exec = true,
            None if option == "noexec" => exec = false,
            None if option == "ro" => read_only = true,
            None if option == "rw" => read_only = false,
            // Times and synchronous writes mean nothing on a file system in memory.
            None if TMPFS_DEFAULTS.contains(&option) => {}
            _ => {
                return Err(usage(format!("--tmpfs {text:?} has the option {option:?}")).fix(
                    "write `--tmpfs TARGET:OPTIONS` with size=, mode=, uid=, gid=, nr_inodes=, nr_blocks=, exec or ro",
                ));
            }
        }
    }
    Ok(Volume::Tmpfs { target: target("--tmpfs", path)?, size: total, mode, more, exec, read_only })
}

/// `size=` of `--tmpfs`: a size, or a percentage of memory.
fn tmpfs_size(text: &str) -> Result<TmpfsSize> {
    let Some(percent) = text.strip_suffix('%') else {
        return size("--tmpfs size", text).map(TmpfsSize::Bytes);
    };
    percent.parse().map(TmpfsSize::Percent).map_err(|_| {
        usage(format!("--tmpfs size {text:?} is not a percentage of memory"))
            .fix("write a whole number: --tmpfs /x:size=50%; or a size: --tmpfs /x:size=16g")
    })
}

/// Options of `--tmpfs` that ask for what is the case anyway.
const TMPFS_DEFAULTS: [&str; 12] = [
    "nosuid",
    "nodev",
    "async",
    "sync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
];

fn octal(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

/// `-v`, `--mount`, `--tmpfs` and `--bind`, for [`crate::fuzz_targets`]. A target lies below `/`.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = crate::fuzz_targets::text(bytes);
    let all = [volume(text).ok(), mount(text).ok().flatten(), tmpfs(text).ok(), bind(text).ok()];
    for volume in all.iter().flatten() {
        let mut components = volume.target().components();
        assert_eq!(components.next(), Some(std::path::Component::RootDir), "{volume:?}");
        assert!(components.all(|part| matches!(part, std::path::Component::Normal(_))), "{volume:?}");
        assert_ne!(volume.target(), Path::new("/"));
        if let Volume::Tmpfs { mode, .. } = volume {
            assert!(*mode <= 0o7777);
        }
    }
    if let Ok(fields) = csv::record(text) {
        let quoted: Vec<_> =
            fields.iter().map(|field| format!("\"{}\"", field.replace('"', "\"\""))).collect();
        assert_eq!(csv::record(&quoted.join(",")), Ok(fields));
    }
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
            "/t:size=1m,exec,uid=1,uid=1000,gid=1000,nr_inodes=1k,nosuid,noatime",
        ]);
        let bind = |target: &str, read_only| Volume::Bind {
            source: dir.path().into(),
            target: target.into(),
            read_only,
            recursive: true,
            receives_mounts: false,
        };
        let tmpfs = Volume::Tmpfs {
            target: "/t".into(),
            size: Some(TmpfsSize::Bytes(1 << 20)),
            mode: 0o1777,
            more: vec![("uid", 1000), ("gid", 1000), ("nr_inodes", 1024)],
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
            ("-v", "relative/dir:/x"),
            ("-v", "/tmp:/x:U"),
            ("-v", "/"),
            ("--mount", "type=volume,source=vol,target=/x"),
            ("--mount", "type=tmpfs,source=/x,target=/x"),
            ("--mount", "type=bind,source=/tmp,target=/x,readonly=maybe"),
            ("--mount", "type=bind,source=/tmp,target=/x,bind-propagation=rshared"),
            ("--mount", "type=bind,\"source=/tmp,target=/x"),
            ("--mount", "type=bind,target=/x"),
            ("--mount", "type=nfs,target=/x"),
            ("--tmpfs", "/x:size=huge"),
            ("--tmpfs", "/x:size=50.5%"),
            ("--tmpfs", "/x:size=-1%"),
            ("--tmpfs", "/x:size=%"),
            ("--tmpfs", "/x:uid=root"),
        ] {
            let args = run(&[option, text]);
            let error = volumes(&args).and_then(|_| anonymous(&args)).unwrap_err();
            assert!(!error.fix_line().is_empty(), "{option} {text}: {error}");
        }
    }

    #[test]
    fn modes_and_quotes_are_dockers() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a,b");
        std::fs::create_dir(&odd).unwrap();
        let path = dir.path().display();
        let of = |option: &str, text: &str| volumes(&run(&[option, text])).unwrap().remove(0);
        let quoted = format!("type=bind,\"source={}\",target=/mnt,ro=1", odd.display());
        assert!(
            matches!(of("--mount", &quoted), Volume::Bind { source, read_only: true, .. } if source == odd),
            "a field in quotes holds commas"
        );
        for (mode, read_only, receives_mounts) in [
            ("ro,z", true, false),
            ("rslave", false, true),
            ("ro,rslave,Z", true, true),
            ("rprivate,nocopy,delegated", false, false),
        ] {
            let Volume::Bind { read_only: ro, receives_mounts: slave, .. } =
                of("-v", &format!("{path}:/x:{mode}"))
            else {
                panic!("it is a bind mount");
            };
            assert_eq!((ro, slave), (read_only, receives_mounts), "{mode}");
        }
        let shallow = format!("type=bind,source={path},target=/x,bind-recursive=disabled,readonly=false");
        assert!(matches!(of("--mount", &shallow), Volume::Bind { recursive: false, read_only: false, .. }));
        assert!(
            matches!(of("--bind", &path.to_string()), Volume::Bind { source, target, .. } if source == target)
        );
        let parent = of("--bind", &format!("{path}/../."));
        assert!(matches!(parent, Volume::Bind { target, .. } if Some(&*target) == dir.path().parent()));
        for root in ["/", "//", "/tmp/.."] {
            let error = volumes(&run(&["--bind", root])).unwrap_err();
            assert!(error.what().contains("below /"), "{root}: {error}");
        }
        let args = run(&["-v", "/anon", "--mount", "target=/other", "--mount", "type=volume,dst=/third"]);
        assert_eq!(anonymous(&args).unwrap(), ["/anon", "/other", "/third"].map(PathBuf::from));
        assert!(volumes(&args).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_a_mount_or_an_error(text in ".{0,40}") {
            let _ = (volume(&text), mount(&text), tmpfs(&text), bind(&text));
        }
    }
}
