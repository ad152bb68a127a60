//! `-v`, `--mount`, `--bind` and `--tmpfs`.

use super::{mount_option, mount_option::mount, tmpfs::tmpfs, usage};
use crate::{
    apply::{
        container::spec::Volume,
        rootfs::{Found, Layers},
    },
    cli::Run,
    error::{Code, Error, Result},
};
use std::path::{Component, Path, PathBuf};

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
    distinct(&mut all)?;
    // A stable sort: outer mounts first, and mounts of the same depth in the typed order.
    all.sort_by_key(|volume| volume.target().components().count());
    Ok(all)
}

/// Drops repeated mounts, and refuses two mounts with one target, of which the container would see only one. As in Docker, the
/// last `--tmpfs` of a target counts.
fn distinct(all: &mut Vec<Volume>) -> Result<()> {
    let mut seen: Vec<Volume> = Vec::new();
    for volume in all.drain(..) {
        match seen.iter_mut().find(|known| known.target() == volume.target()) {
            None => seen.push(volume),
            Some(known) if *known == volume => {}
            Some(known @ Volume::Tmpfs { .. }) if matches!(volume, Volume::Tmpfs { .. }) => *known = volume,
            Some(known) => return Err(same_target(known.target())),
        }
    }
    *all = seen;
    Ok(())
}

fn same_target(target: &Path) -> Error {
    let target = target.display();
    usage(format!("two volumes are to be mounted on {target}"))
        .fix(format!("leave one of them out, or give it another target: -v SOURCE:{target}-2"))
}

/// The directories of `-v TARGET` and of `--mount type=volume` without a source. Like Docker's anonymous volumes with `--rm`
/// they show the image's content and are removed with the container.
pub fn anonymous(args: &Run) -> Result<Vec<PathBuf>> {
    let short = args.volume.iter().filter(|text| !text.contains(':')).map(|text| target("-v", text));
    let long = args.mount.iter().filter_map(|text| mount_option::anonymous(text));
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

/// Parses a path in the container.
pub fn target(option: &str, text: &str) -> Result<PathBuf> {
    let bad = |what: &str| {
        usage(format!("{option}: the target {text:?} {what}")).fix(format!(
            "name a path in the container that begins with /: {}",
            if option == "--tmpfs" { "--tmpfs /scratch" } else { "/data" }
        ))
    };
    if text.is_empty() {
        return Err(bad("is empty"));
    }
    if !text.starts_with('/') {
        return Err(bad("is not an absolute path"));
    }
    // As Docker does it, without a look at links.
    let mut path = PathBuf::from("/");
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => _ = path.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    match path.to_str() {
        Some("/") => Err(bad("is the container's root")),
        Some("/proc") => Err(bad("shows the container's processes")),
        _ => Ok(path),
    }
}

/// Parses a path of the host. As in Docker, a path begins with `/` or `.`, and anything else is the name of a volume. `line` is
/// the option with that source in place of `SOURCE`.
pub fn source(option: &str, text: &str, line: &str) -> Result<PathBuf> {
    let with = |source: &str| quoted(&line.replace("SOURCE", source));
    if text.is_empty() {
        return Err(usage(format!("{option}: the source is empty"))
            .cause("a variable of the shell that is not set leaves nothing")
            .fix(format!("name a path of the host: {option} {}", with("/data"))));
    }
    if text == "~" || text.starts_with("~/") {
        return Err(usage(format!("{option}: {text:?} is not a path"))
            .cause("the shell replaces ~ only at the beginning of a word and outside quotes")
            .fix(format!(
                "write $HOME: {option} \"{}\"",
                line.replace("SOURCE", &text.replacen('~', "$HOME", 1))
            )));
    }
    let path = std::path::absolute(text).map_err(|error| {
        usage(format!("{option}: the source {text:?} is not a path"))
            .cause(error)
            .fix(format!("write an absolute path: {option} {}", with("/data")))
    })?;
    if !text.starts_with(['/', '.']) {
        let own = format!("./{text}");
        let error =
            usage(format!("{option}: {text:?} is the name of a volume, and gpurun keeps no volumes yet"));
        return Err(if path.exists() {
            error.fix(format!("to mount the directory write {option} {}", with(&own)))
        } else {
            error.fix(format!("mount a directory: mkdir -p {}, and {option} {}", quoted(&own), with(&own)))
        });
    }
    if std::fs::symlink_metadata(&path).is_err() {
        let shown = quoted(&path.to_string_lossy());
        return Err(Error::new(Code::Volume, format!("{} does not exist on the host", path.display()))
            .cause(
                "gpurun makes no directory on the host for a mount: a misspelt path would be an empty volume",
            )
            .fix(if path.extension().is_some() {
                format!("correct the path, or make the file: touch {shown}")
            } else {
                format!("correct the path, or mkdir -p {shown}")
            }));
    }
    Ok(path)
}

/// A word for a shell, in quotes where it needs them.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-:=,+@%~…".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
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
            | "private" | "rbind" | "exec" | "suid" => {}
            "bind" => self.recursive = false,
            _ => return false,
        }
        true
    }

    /// Parses `ro,z,…`. As in Docker, each kind of option may be there once.
    fn set_all(&mut self, options: &str) -> std::result::Result<(), String> {
        const KINDS: [&[&str]; 4] = [
            &["ro", "rw", "readonly"],
            &["z", "Z"],
            &["cached", "delegated", "consistent", "default"],
            &["rslave", "slave", "rprivate", "private"],
        ];
        let mut kinds = [false; 4];
        for option in options.split(',') {
            if !self.set(option) {
                return Err(option.to_owned());
            }
            if let Some(kind) = KINDS.iter().position(|kind| kind.contains(&option))
                && std::mem::replace(&mut kinds[kind], true)
            {
                return Err(options.to_owned());
            }
        }
        Ok(())
    }

    fn volume(self) -> Volume {
        let Self { source, target, read_only, recursive, receives_mounts } = self;
        Volume::Bind { source, target, read_only, recursive, receives_mounts }
    }
}

/// The fix of `rshared`.
pub const PROPAGATION: &str = "mounts made in a container never reach the host: write rslave, which lets mounts of the host reach \
                           the container";

fn volume(text: &str) -> Result<Volume> {
    let fields: Vec<&str> = text.split(':').collect();
    let ([from, to] | [from, to, _]) = fields.as_slice() else {
        return Err(usage(format!("-v {text:?} is not SOURCE:TARGET[:OPTIONS]"))
            .fix("write -v /data:/data or -v /data:/data:ro; --mount type=bind,source=…,target=… takes paths with colons"));
    };
    let line = ["SOURCE", to].into_iter().chain(fields.get(2).copied()).collect::<Vec<_>>().join(":");
    let mut bind = bind_of(source("-v", from, &line)?, target("-v", to)?);
    if let Some(options) = fields.get(2) {
        bind.set_all(options).map_err(|option| {
            usage(format!("-v {text:?} has the option {option:?}")).fix(match option.as_str() {
                "shared" | "rshared" => PROPAGATION.to_owned(),
                "U" => format!("give the directory to the user yourself: chown -R UID:GID {}", quoted(from)),
                "O" => format!("copy the directory, or mount it read-only: -v {}", quoted(&format!("{from}:{to}:ro"))),
                "" => format!("leave out the last colon: -v {}", quoted(&format!("{from}:{to}"))),
                _ => "write `-v SOURCE:TARGET:OPTIONS` with one each of ro or rw, z or Z, rslave or rprivate, cached, delegated or \
                      consistent, and nocopy"
                    .to_owned(),
            })
        })?;
    }
    Ok(bind.volume())
}

/// Apptainer's `SOURCE[:TARGET[:ro]]`.
fn bind(text: &str) -> Result<Volume> {
    let (from, rest) = text.split_once(':').unwrap_or((text, text));
    let (to, options) = rest.split_once(':').unwrap_or((rest, "rw"));
    let path = source("--bind", from, &format!("SOURCE:{rest}"))?;
    let to = if rest == text { target("--bind", &path.to_string_lossy())? } else { target("--bind", to)? };
    let mut bind = bind_of(path, to);
    if bind.set_all(options).is_err() {
        return Err(usage(format!("--bind {text:?} has the option {options:?}")).fix("write `:ro` or `:rw`"));
    }
    Ok(bind.volume())
}

/// `-v`, `--mount` and `--tmpfs`, for [`crate::fuzz_targets`].
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = crate::fuzz_targets::text(bytes);
    let all = [volume(text).ok(), mount(text).ok().flatten(), tmpfs(text).ok(), bind(text).ok()];
    for volume in all.iter().flatten() {
        let mut components = volume.target().components();
        assert_eq!(components.next(), Some(std::path::Component::RootDir), "{volume:?}");
        assert!(components.all(|part| matches!(part, std::path::Component::Normal(_))), "{volume:?}");
        assert_ne!(volume.target(), Path::new("/"));
    }
    if let Ok(fields) = crate::request::csv::record(text) {
        let quoted: Vec<_> =
            fields.iter().map(|field| format!("\"{}\"", field.replace('"', "\"\""))).collect();
        assert_eq!(crate::request::csv::record(&quoted.join(",")), Ok(fields));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{commands::run::tests::run, sys::mount::Flags};
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
            options: [
                ("mode", "1777"),
                ("size", "1048576"),
                ("uid", "1000"),
                ("gid", "1000"),
                ("nr_inodes", "1024"),
            ]
            .map(|(name, value)| (name, value.to_owned()))
            .to_vec(),
            flags: Flags { read_only: false, nosuid: true, nodev: true, noexec: false },
        };
        assert_eq!(volumes(&args).unwrap(), [tmpfs, bind("/a", false), bind("/a/b", true)]);
        for (option, text) in [
            ("-v", "/nope-there:/x"),
            ("-v", "cache:/x"),
            ("-v", "/tmp:x"),
            ("-v", "/tmp:/"),
            ("-v", "/tmp:/.."),
            ("-v", "/tmp:/proc"),
            ("-v", "/tmp:/x:"),
            ("-v", "/tmp::/x"),
            ("-v", ":/x"),
            ("-v", ""),
            ("-v", "~/data:/x"),
            ("-v", "/tmp:/x:ro,rw"),
            ("-v", "/tmp:/x:z,Z"),
            ("-v", "/tmp:/x:ro,ro"),
            ("-v", "/tmp:/x:cached,delegated"),
            ("-v", "a b:/x"),
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
            ("--mount", "type=image,source=x,target=/x"),
            ("--mount", "source=/tmp,target=/x"),
            ("--mount", "type=bind,source=tmp,target=/x"),
            ("--mount", "type=bind,source=,target=/x"),
            ("--mount", "type=bind,source=/tmp,target=/x,tmpfs-size=1m"),
            ("--mount", "type=bind,source=/tmp,target=/x,volume-nocopy"),
            ("--mount", "type=tmpfs,target=/x,bind-propagation=rslave"),
            ("--mount", "type=tmpfs,target=/x,tmpfs-mode=9"),
            ("--mount", "type=volume,target=/x,volume-opt=type=tmpfs"),
            ("--mount", "type=bind,source=/tmp,target=/x,readonly,bind-recursive=writable"),
            ("--tmpfs", "/x:mode=9"),
            ("--tmpfs", "/x:size=101%"),
            ("--tmpfs", "/proc"),
            ("--tmpfs", ""),
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
            assert!(error.what().contains("the container's root"), "{root}: {error}");
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
