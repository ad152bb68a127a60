//! What Docker's options mean. Nothing here looks at the world, but for the files that `--env-file` names.

use super::env_file;
use crate::{
    apply::container::spec::{Rlimit, Volume},
    cli::Run,
    error::{Code, Error, OrFail, Result},
    vocabulary::EnvVar,
};
use nix::sys::resource::Resource;
use std::path::{Path, PathBuf};

fn usage(what: impl Into<String>) -> Error {
    Error::new(Code::Usage, what)
}

/// Bytes from `64m`, `2g`, `1.5GiB`, `4096`; powers of 1024, as Docker counts (go-units RAMInBytes).
pub fn size(option: &str, text: &str) -> Result<u64> {
    let bad = || {
        usage(format!("{option} {text:?} is not a size"))
            .fix("write a number with b, k, m, g or t: 512m, 16g")
    };
    let lower = text.trim().to_ascii_lowercase();
    let end = lower.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let shift = match unit.trim().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let (whole, fraction) = number.split_once('.').ok_or_else(bad)?;
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    // Six digits are more than anyone writes, and what they mean is exact in integers.
    let digits: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let millionths: u64 = digits.parse().map_err(|_| bad())?;
    let whole = whole.checked_mul(1 << shift).ok_or_else(bad)?;
    whole
        .checked_add(((u128::from(millionths) << shift) / 1_000_000).try_into().map_err(|_| bad())?)
        .ok_or_else(bad)
}

/// `-e` and `--env-file`, files first, as Docker orders them.
pub fn environment(args: &Run) -> Result<Vec<EnvVar>> {
    let mut env = Vec::new();
    for file in &args.env_file {
        env.extend(env_file::read(file, |name| std::env::var(name).ok())?);
    }
    for text in &args.env {
        env.extend(variable(text)?);
    }
    Ok(env)
}

/// `NAME=VALUE`, or `NAME` for the value that gpurun itself has; nothing if it has none.
fn variable(text: &str) -> Result<Option<EnvVar>> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, std::env::var(text).ok()),
    };
    if name.is_empty() || name.chars().any(char::is_whitespace) {
        return Err(usage(format!("{text:?} does not set a variable")).fix("write -e NAME=VALUE, or -e NAME"));
    }
    Ok(value.map(|value| (name.to_owned(), value)))
}

/// The command: `--entrypoint` or the image's, and the arguments that were typed or the image's. `None` if there is none.
pub fn command(args: &Run, entrypoint: &[String], cmd: &[String]) -> Option<Vec<String>> {
    let (front, back) = match (&args.entrypoint, args.command.as_slice()) {
        // As with Docker, a new entrypoint drops the image's own arguments; an empty one drops the entrypoint alone.
        (Some(entry), typed) if entry.is_empty() => (Vec::new(), if typed.is_empty() { cmd } else { typed }),
        (Some(entry), typed) => (vec![entry.clone()], typed),
        (None, []) => (entrypoint.to_vec(), cmd),
        (None, typed) => (entrypoint.to_vec(), typed),
    };
    let argv: Vec<String> = front.into_iter().chain(back.iter().cloned()).collect();
    (!argv.is_empty()).then_some(argv)
}

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

/// Docker's names (go-units ulimit.go) for the kernel's limits.
const LIMITS: [(&str, Resource); 15] = [
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

/// The most descriptors that a container gets unasked: programs that close every possible one take seconds where the limit
/// is 10⁹, as systemd sets it for daemons.
const NOFILE: u64 = 1_048_576;

/// What GPU work wants (memory for RDMA locked, NCCL), and over it what `--ulimit` says.
pub fn rlimits(typed: &[String]) -> Result<Vec<Rlimit>> {
    let mut limits = vec![
        Rlimit {
            resource: Resource::RLIMIT_MEMLOCK,
            name: "memlock",
            soft: u64::MAX,
            hard: u64::MAX,
            required: false,
        },
        Rlimit {
            resource: Resource::RLIMIT_NOFILE,
            name: "nofile",
            soft: NOFILE,
            hard: NOFILE,
            required: false,
        },
    ];
    for text in typed {
        let bad = || {
            let names = LIMITS.map(|(name, _)| name).join(", ");
            usage(format!("--ulimit {text:?} is not NAME=SOFT[:HARD]"))
                .fix(format!("names are {names}; -1 is no limit"))
        };
        let (name, value) = text.split_once('=').ok_or_else(bad)?;
        let (name, resource) = LIMITS.into_iter().find(|(known, _)| *known == name).ok_or_else(bad)?;
        let number =
            |text: &str| if text == "-1" { Ok(u64::MAX) } else { text.parse::<u64>().map_err(|_| bad()) };
        let (soft, hard) = value.split_once(':').unwrap_or((value, value));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(usage(format!("--ulimit {text:?}: the soft limit is above the hard one")));
        }
        limits.retain(|limit| limit.resource != resource);
        limits.push(Rlimit { resource, name, soft, hard, required: true });
    }
    Ok(limits)
}

/// The bit of CAP_SYS_ADMIN, which Docker takes for privileged.
pub const SYS_ADMIN: u64 = 1 << 21;

/// Docker's default capabilities for root (oci/caps/defaults.go).
const DEFAULT_CAPABILITIES: [caps::Capability; 14] = {
    use caps::Capability as C;
    [
        C::CAP_CHOWN,
        C::CAP_DAC_OVERRIDE,
        C::CAP_FSETID,
        C::CAP_FOWNER,
        C::CAP_MKNOD,
        C::CAP_NET_RAW,
        C::CAP_SETGID,
        C::CAP_SETUID,
        C::CAP_SETFCAP,
        C::CAP_SETPCAP,
        C::CAP_NET_BIND_SERVICE,
        C::CAP_SYS_CHROOT,
        C::CAP_KILL,
        C::CAP_AUDIT_WRITE,
    ]
};

/// `--cap-add` and `--cap-drop` over the default set, which root alone has.
pub fn capabilities(args: &Run, root: bool) -> Result<u64> {
    let mask = |names: &[String]| -> Result<u64> {
        names.iter().try_fold(0, |mask, name| {
            let upper = name.to_ascii_uppercase();
            if upper == "ALL" {
                return Ok(caps::all().iter().fold(mask, |mask, c| mask | c.bitmask()));
            }
            let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
            let capability: caps::Capability = full.parse().map_err(|_| {
                usage(format!("there is no capability {name:?}"))
                    .fix("capabilities(7) lists them: SYS_PTRACE, NET_ADMIN, …")
            })?;
            Ok(mask | capability.bitmask())
        })
    };
    let default = if root { DEFAULT_CAPABILITIES.iter().fold(0, |mask, c| mask | c.bitmask()) } else { 0 };
    let (added, dropped) = (mask(&args.cap_add)?, mask(&args.cap_drop)?);
    // Docker: what is named wins over ALL on the other side.
    let all = |names: &[String]| names.iter().any(|n| n.eq_ignore_ascii_case("all"));
    Ok(if all(&args.cap_drop) { mask(&args.cap_add)? } else { (default | added) & !dropped })
}

/// Refuses a capability that was asked for by name and that this process has not got itself; `ALL` is all that it has.
pub fn can_give(args: &Run) -> Result<()> {
    let own = caps::read(None, caps::CapSet::Permitted).or_fail(Code::Internal, || "capget failed")?;
    let named = args.cap_add.iter().filter(|name| !name.eq_ignore_ascii_case("all"));
    for name in named {
        let full = name.to_ascii_uppercase();
        let full = if full.starts_with("CAP_") { full } else { format!("CAP_{full}") };
        if full.parse().is_ok_and(|capability| !own.contains(&capability)) {
            return Err(Error::new(Code::User, format!("{full} cannot be given to the container"))
                .cause("gpurun itself has not got it here")
                .fix("start gpurun where root has it, or leave it out"));
        }
    }
    Ok(())
}

/// Whether the system call filter is on.
pub fn seccomp(options: &[String]) -> Result<bool> {
    let mut on = true;
    for option in options {
        match option.replace(':', "=").as_str() {
            "seccomp=unconfined" => on = false,
            "seccomp=builtin" | "no-new-privileges" | "no-new-privileges=true" => {}
            _ => {
                return Err(usage(format!("--security-opt {option:?} is not known"))
                    .fix("seccomp=unconfined turns the filter off; no-new-privileges is always on"));
            }
        }
    }
    Ok(on)
}

/// File systems that hold the kernel's or the machine's state, not files.
const NOT_FILES: [&str; 22] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "pstore",
    "bpf",
    "configfs",
    "fusectl",
    "hugetlbfs",
    "autofs",
    "binfmt_misc",
    "efivarfs",
    "rpc_pipefs",
    "nsfs",
    "ramfs",
    "tmpfs",
];

/// The mount points below `/` that hold files, from the text of mountinfo (proc(5)), outermost first.
pub fn host_mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(kind)) = (before.split(' ').nth(4), after.split(' ').next()) else { continue };
        // Octal escapes stand for space, tab, newline and backslash.
        let point =
            point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
        let outside = [
            "/proc",
            "/sys",
            "/dev",
            "/run",
            "/tmp",
            "/var/lib/gpurun",
            "/var/lib/docker",
            "/var/lib/containers",
            "/etc",
        ];
        if point != "/"
            && !NOT_FILES.contains(&kind)
            && !outside.iter().any(|o| Path::new(&point).starts_with(o))
        {
            points.push(point.into());
        }
    }
    points.sort_by_key(|point| point.components().count());
    // What lies below another comes with it: binds are recursive.
    let mut kept: Vec<PathBuf> = Vec::new();
    for point in points {
        if !kept.iter().any(|outer| point.starts_with(outer)) {
            kept.push(point);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use proptest::prelude::*;

    fn run(words: &[&str]) -> Run {
        #[derive(Parser)]
        struct Only {
            #[command(flatten)]
            run: Run,
        }
        Only::parse_from([&["gpurun"], words, &["rootfs:/x"]].concat()).run
    }

    #[test]
    fn sizes_are_dockers() {
        for (text, bytes) in [
            ("64m", 64 << 20),
            ("2g", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("4096", 4096),
            ("1kb", 1024),
            ("0", 0),
            ("1 MB", 1 << 20),
        ] {
            assert_eq!(size("--shm-size", text).unwrap(), bytes, "{text}");
        }
        for text in ["", "m", "-1", "1x", "1.2.3", "99999999999999999999", "99999999t"] {
            assert!(
                size("--shm-size", text).unwrap_err().to_string().starts_with("error[GPU-0001]: --shm-size"),
                "{text}"
            );
        }
    }

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

    #[test]
    fn limits_and_capabilities_are_dockers() {
        let limits = rlimits(&["nofile=1024:2048".into(), "memlock=-1".into()]).unwrap();
        assert_eq!(limits.len(), 2);
        assert_eq!(
            (limits[0].name, limits[0].soft, limits[0].hard, limits[0].required),
            ("nofile", 1024, 2048, true)
        );
        for text in ["nofile", "files=1", "nofile=2:1", "nofile=x"] {
            assert!(rlimits(&[text.into()]).is_err(), "{text}");
        }
        let mask = |words: &[&str], root| capabilities(&run(words), root).unwrap();
        assert_eq!(mask(&[], true), 0xa804_25fb, "Docker's CapBnd");
        assert_eq!(mask(&[], false), 0);
        assert_eq!(mask(&["--cap-drop", "all", "--cap-add", "cap_kill"], true), 1 << 5);
        assert_eq!(mask(&["--cap-add", "SYS_PTRACE", "--cap-drop", "MKNOD"], true), 0xa004_25fb | 1 << 19);
        assert!(capabilities(&run(&["--cap-add", "FLY"]), true).is_err());
    }

    #[test]
    fn the_command_is_the_users_or_the_images() {
        let of = |words: &[&str], typed: &[&str]| {
            let mut args = run(words);
            args.command = typed.iter().map(|s| (*s).to_owned()).collect();
            command(&args, &["entry".into()], &["default".into()]).unwrap_or_default().join(" ")
        };
        assert_eq!(of(&[], &[]), "entry default");
        assert_eq!(of(&[], &["x", "-y"]), "entry x -y");
        assert_eq!(of(&["--entrypoint", "sh"], &[]), "sh");
        assert_eq!(of(&["--entrypoint", ""], &["x"]), "x");
    }

    #[test]
    fn a_host_root_shows_its_file_systems_of_files() {
        let text = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /home\\040x rw - xfs /dev/b rw\n3 1 0:5 / /proc rw - proc p rw\n\
                    4 2 8:3 / /home\\040x/y rw - ext4 c rw\n5 1 0:9 / /run rw - tmpfs t rw\nbroken";
        assert_eq!(host_mounts(text), [PathBuf::from("/home x")]);
    }

    proptest! {
        #[test]
        fn no_option_makes_it_panic(text in ".{0,40}") {
            let _ = (size("x", &text), volume(&text), mount(&text), tmpfs(&text), rlimits(std::slice::from_ref(&text)), variable(&text));
            let _ = (seccomp(std::slice::from_ref(&text)), host_mounts(&text));
        }
    }
}
