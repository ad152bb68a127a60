//! Edits another engine's config.json so that its container gets the injection. Changes the value and nothing else; what must
//! lie on a file system first, `delivery` puts there.
//!
//! Editing twice is editing once: what is there already is replaced or left, never added again.

use super::{
    mount::{HOST_NODE, NOTHING},
    rootfs::{Kind, Layers, Mounts},
};
use crate::{
    error::{Code, Error, Result},
    formats::oci::Spec,
    inventory::{DaemonObject, DeviceNode},
    plan::{DRIVER_DIR, Injection},
    sys::mount::Flags,
    vocabulary::EnvVar,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A host file or directory in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub target: PathBuf,
    /// What it is, and so which rights it needs.
    pub kind: BindKind,
}

/// The options of a mount. All are private, nosuid: nothing that is mounted later on the host shows up in the container, and
/// nothing of the driver's is setuid on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindKind {
    /// The driver's files, and ours.
    ReadOnly,
    /// The mount of a daemon's verified socket or directory of sockets: read-only and noexec.
    Socket(DaemonObject),
    /// A device node, where none can be made.
    Device,
}

impl BindKind {
    /// The same for a mount that we make ourselves.
    pub fn flags(self) -> Flags {
        match self {
            Self::ReadOnly => Flags { read_only: true, nosuid: true, nodev: true, noexec: false },
            Self::Socket(_) => Flags { read_only: true, ..NOTHING },
            Self::Device => HOST_NODE,
        }
    }

    /// In the words of the OCI specification.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::ReadOnly => &["ro", "nosuid", "nodev", "rbind", "rprivate"],
            Self::Socket(_) => &["ro", "nosuid", "nodev", "noexec", "rbind", "rprivate"],
            Self::Device => &["nosuid", "noexec", "rbind", "rprivate"],
        }
    }
}

/// Programs of other toolkits that would do the same as we do, as hooks of the runtime or of a CDI document.
const PEER_HOOKS: [&str; 2] = ["nvidia-container-runtime-hook", "nvidia-container-toolkit"];
/// The hooks in which they may stand.
const HOOKS: [&str; 2] = ["prestart", "createRuntime"];

/// Adds `binds` in their order, and then the rest of the injection. `nodes` are the device nodes that the low-level runtime
/// must make; or mount, if it cannot make nodes (`may_make_nodes` is false), as in a user namespace.
///
/// Returns the sources of mounts of others' that were in the place of the driver's directory.
///
/// # Errors
/// [`Code::Bundle`] if the configuration has something else in the place of a list, [`Code::Volume`] if the host would get
/// the driver's mounts, too.
pub fn edit(
    spec: &mut Spec,
    injection: &Injection,
    binds: &[Bind],
    nodes: &[DeviceNode],
    may_make_nodes: bool,
) -> Result<Vec<PathBuf>> {
    remove_peer_hooks(spec)?;
    set_environment(spec, &injection.env)?;
    add_groups(spec, &injection.groups)?;
    // Where it cannot, it mounts the host's node of the same name instead, which is right unless the host has it elsewhere.
    let (made, bound): (Vec<_>, Vec<_>) =
        nodes.iter().partition(|node| may_make_nodes || node.path.0 == node.container_path.0);
    let bound = bound.into_iter().map(|node| Bind {
        source: node.path.0.clone(),
        target: node.container_path.0.clone(),
        kind: BindKind::Device,
    });
    let binds: Vec<Bind> = binds.iter().cloned().chain(bound).collect();
    refuse_shared(spec, &binds)?;
    let replaced = add_mounts(spec, &binds)?;
    for node in made {
        add_device(spec, node)?;
    }
    for node in &injection.devices {
        allow_device(spec, node)?;
    }
    Ok(replaced)
}

/// The mounts that the low-level runtime will make over the container's root. Mounts at the driver's directory are not
/// included, because [`edit`] removes them.
pub fn mounts(spec: &Spec, root: &Layers) -> Mounts {
    let mut mounts = Mounts::default();
    for mount in spec.list(&["mounts"]) {
        let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default();
        let options = mount.get("options").and_then(Value::as_array);
        let has = |wanted: &[&str]| {
            options.into_iter().flatten().any(|one| one.as_str().is_some_and(|one| wanted.contains(&one)))
        };
        let destination = Path::new("/").join(text("destination"));
        if destination.starts_with(DRIVER_DIR) {
            continue;
        }
        let source = Path::new(text("source"));
        let kind = match text("type") {
            _ if has(&["bind", "rbind"]) => {
                Kind::Volume { source: source.is_absolute().then(|| source.to_path_buf()) }
            }
            "tmpfs" => Kind::Memory,
            "proc" | "sysfs" | "cgroup" | "cgroup2" | "devpts" | "mqueue" => Kind::Kernel,
            _ => Kind::Volume { source: source.is_absolute().then(|| source.to_path_buf()) },
        };
        mounts.add(root, &destination, kind, has(&["ro", "rro"]));
    }
    mounts
}

fn remove_peer_hooks(spec: &mut Spec) -> Result<()> {
    let is_peers = |hook: &Value| {
        let path = hook.get("path").and_then(Value::as_str).unwrap_or_default();
        Path::new(path).file_name().is_some_and(|name| PEER_HOOKS.iter().any(|peer| name == *peer))
    };
    for hooks in HOOKS {
        if spec.list(&["hooks", hooks]).iter().any(is_peers) {
            spec.list_mut(&["hooks", hooks])?.retain(|hook| !is_peers(hook));
        }
    }
    Ok(())
}

fn set_environment(spec: &mut Spec, variables: &[EnvVar]) -> Result<()> {
    if variables.is_empty() {
        return Ok(());
    }
    let env = spec.list_mut(&["process", "env"])?;
    for (name, value) in variables {
        let is_it = |entry: &Value| {
            entry
                .as_str()
                .and_then(|entry| entry.strip_prefix(name.as_str()))
                .is_some_and(|rest| rest.starts_with('='))
        };
        env.retain(|entry| !is_it(entry));
        env.push(format!("{name}={value}").into());
    }
    Ok(())
}

fn add_groups(spec: &mut Spec, groups: &[u32]) -> Result<()> {
    for group in groups {
        let known = spec.list_mut(&["process", "user", "additionalGids"])?;
        let group = Value::from(*group);
        if !known.contains(&group) {
            known.push(group);
        }
    }
    Ok(())
}

/// A mount on a volume with shared propagation also appears on the host, and stays there after the container has ended.
fn refuse_shared(spec: &Spec, binds: &[Bind]) -> Result<()> {
    let is_shared = |mount: &&Value| {
        let options = mount.get("options").and_then(Value::as_array);
        options.into_iter().flatten().any(|option| option == "shared" || option == "rshared")
    };
    for volume in spec.list(&["mounts"]).iter().filter(is_shared) {
        let place = Path::new(volume["destination"].as_str().unwrap_or_default());
        if let Some(bind) = binds.iter().find(|bind| bind.target.starts_with(place)) {
            return Err(Error::new(
                Code::Volume,
                format!("the volume at {} is shared with the host", place.display()),
            )
            .cause(format!("a mount at {} would also appear on the host", bind.target.display()))
            .fix("mount it as a slave (`:rslave`), or at another place"));
        }
    }
    Ok(())
}

/// A mount that somebody asked for by name goes before one of the driver's files; the driver's own directory is ours, and
/// what an earlier edit put below it for another driver goes.
fn add_mounts(spec: &mut Spec, binds: &[Bind]) -> Result<Vec<PathBuf>> {
    if binds.is_empty() {
        return Ok(Vec::new());
    }
    let entry = |bind: &Bind| {
        json!({
            "destination": bind.target.to_string_lossy(),
            "type": "bind",
            "source": bind.source.to_string_lossy(),
            "options": bind.kind.options(),
        })
    };
    let ours: Vec<Value> = binds.iter().map(entry).collect();
    let destination = |mount: &Value| PathBuf::from(mount["destination"].as_str().unwrap_or_default());
    let mounts = spec.list_mut(&["mounts"])?;
    let mut replaced = Vec::new();
    mounts.retain(|mount| {
        let in_place = destination(mount).starts_with(DRIVER_DIR);
        if in_place && !ours.contains(mount) {
            replaced.extend(mount["source"].as_str().map(PathBuf::from));
        }
        !in_place && !ours.contains(mount)
    });
    for mount in ours {
        if mounts.iter().all(|known| destination(known) != destination(&mount)) {
            mounts.push(mount);
        }
    }
    Ok(replaced)
}

fn add_device(spec: &mut Spec, node: &DeviceNode) -> Result<()> {
    let path = node.container_path.0.to_string_lossy();
    let devices = spec.list_mut(&["linux", "devices"])?;
    devices.retain(|device| device.get("path").and_then(Value::as_str) != Some(&*path));
    devices.push(json!({
        "path": path,
        "type": "c",
        "major": node.major,
        "minor": node.minor,
        "fileMode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
    }));
    Ok(())
}

/// Later rules go before earlier ones, so ours is the last.
fn allow_device(spec: &mut Spec, node: &DeviceNode) -> Result<()> {
    let rule = json!({"allow": true, "type": "c", "major": node.major, "minor": node.minor, "access": "rwm"});
    let rules = spec.list_mut(&["linux", "resources", "devices"])?;
    rules.retain(|known| *known != rule);
    rules.push(rule);
    Ok(())
}

/// What Docker and containerd (64 MiB) and Podman (64000 kB) give where nobody says otherwise.
pub(super) const DEFAULT_SHM_SIZES: [u64; 2] = [64 << 20, 64_000 << 10];

/// Gives /dev/shm this size, if it is the container's own and has an engine's default.
///
/// # Errors
/// [`crate::error::Code::Bundle`] where `mounts` is not a list.
pub fn resize_shm(spec: &mut Spec, size: u64) -> Result<()> {
    let is_shm = |mount: &&mut Value| mount["destination"] == "/dev/shm" && mount["type"] == "tmpfs";
    for mount in spec.list_mut(&["mounts"])?.iter_mut().filter(|mount| mount.is_object()) {
        if !is_shm(&mount) {
            continue;
        }
        let options = mount.get_mut("options").and_then(Value::as_array_mut);
        for option in options.into_iter().flatten() {
            let asked = option.as_str().and_then(|option| option.strip_prefix("size=")).and_then(tmpfs_size);
            if asked.is_some_and(|asked| DEFAULT_SHM_SIZES.contains(&asked)) {
                *option = format!("size={size}").into();
            }
        }
    }
    Ok(())
}

/// The host directory that the container gets as /dev/shm, where the engine mounted one itself: Podman, a pod, Docker's
/// `--ipc shareable`.
pub fn engines_shm(spec: &Spec) -> Option<&Path> {
    let is_shm = |mount: &&Value| mount["destination"] == "/dev/shm" && mount["type"] != "tmpfs";
    let source = spec.list(&["mounts"]).iter().rfind(is_shm)?["source"].as_str()?;
    Some(Path::new(source)).filter(|source| source.is_absolute())
}

/// A tmpfs' `size=` in bytes; `None` also for a percentage, which is nobody's default. (tmpfs(5), memparse of the kernel.)
fn tmpfs_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{ContainerPath, HostPath};

    /// As containerd writes it, cut to what matters.
    fn engines() -> Spec {
        let spec = json!({
            "ociVersion": "1.0.2-dev",
            "process": {
                "user": {"uid": 0, "gid": 0, "additionalGids": [0, 44]},
                "args": ["sh"],
                "env": ["PATH=/usr/bin", "NVIDIA_VISIBLE_DEVICES=0", "NVIDIA_VISIBLE_DEVICES_X=1"],
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "mode=1777", "size=65536k"]},
                {"destination": "/usr/local/nvidia/lib64/libcuda.so.535", "type": "bind", "source": "/gone"},
                {"destination": "/etc/mine", "type": "bind", "source": "/home/mine"},
            ],
            "hooks": {"prestart": [
                {"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["nvidia-container-runtime-hook", "prestart"]},
                {"path": "/usr/bin/network"},
            ]},
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}, "future": {"x": 1}},
        });
        Spec::parse(spec.to_string().as_bytes()).unwrap()
    }

    fn node(path: &str, host: &str, minor: u32) -> DeviceNode {
        DeviceNode {
            path: HostPath(host.into()),
            container_path: ContainerPath(path.into()),
            major: 195,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 44,
        }
    }

    fn injection() -> Injection {
        Injection {
            devices: vec![
                node("/dev/nvidia0", "/dev/nvidia0", 0),
                node("/dev/nvidiactl", "/driver/dev/nvidiactl", 255),
            ],
            env: vec![("NVIDIA_VISIBLE_DEVICES".into(), "0".into())],
            groups: vec![44, 109],
            ..Injection::default()
        }
    }

    fn binds() -> Vec<Bind> {
        let bind =
            |source: &str, target: &str, kind| Bind { source: source.into(), target: target.into(), kind };
        vec![
            bind("/run/gpurun/trees/0", "/usr/local/nvidia", BindKind::ReadOnly),
            bind("/usr/lib/libcuda.so.550", "/usr/local/nvidia/lib64/libcuda.so.550", BindKind::ReadOnly),
            bind(
                "/run/nvidia-persistenced/socket",
                "/run/nvidia-persistenced/socket",
                BindKind::Socket(DaemonObject::default()),
            ),
            bind("/usr/share/mine", "/etc/mine", BindKind::ReadOnly),
        ]
    }

    fn pretty(spec: &Spec) -> String {
        format!("{:#}", serde_json::from_slice::<Value>(&spec.to_bytes()).unwrap())
    }

    #[test]
    fn an_edited_configuration() {
        let mut spec = engines();
        edit(&mut spec, &injection(), &binds(), &injection().devices, true).unwrap();
        resize_shm(&mut spec, 1 << 30).unwrap();
        insta::assert_snapshot!(pretty(&spec));
    }

    #[test]
    fn twice_is_once() {
        let mut once = engines();
        edit(&mut once, &injection(), &binds(), &injection().devices, true).unwrap();
        resize_shm(&mut once, 1 << 30).unwrap();
        let mut twice = once.clone();
        edit(&mut twice, &injection(), &binds(), &injection().devices, true).unwrap();
        resize_shm(&mut twice, 1 << 30).unwrap();
        assert_eq!(pretty(&once), pretty(&twice));
    }

    #[test]
    fn what_somebody_mounted_in_the_drivers_place_is_told() {
        let mut spec = engines();
        assert_eq!(
            edit(&mut spec, &injection(), &binds(), &injection().devices, true).unwrap(),
            [PathBuf::from("/gone")]
        );
        assert!(
            edit(&mut spec, &injection(), &binds(), &injection().devices, true).unwrap().is_empty(),
            "our own"
        );
    }

    #[test]
    fn nothing_is_mounted_on_a_volume_that_the_host_shares() {
        for (place, option, code) in [
            ("/usr/local", "rshared", Some(Code::Volume)),
            ("/", "shared", Some(Code::Volume)),
            ("/usr/local", "rslave", None),
            ("/usr/loc", "rshared", None),
            ("/data", "rshared", None),
        ] {
            let mut spec = engines();
            let volume = json!({"destination": place, "source": "/x", "options": ["rbind", option]});
            spec.list_mut(&["mounts"]).unwrap().push(volume);
            let edited = edit(&mut spec, &injection(), &binds(), &injection().devices, true);
            assert_eq!(edited.err().map(|error| error.code()), code, "{place} {option}");
        }
    }

    #[test]
    fn in_a_user_namespace_a_node_that_lies_elsewhere_is_mounted() {
        let mut spec = engines();
        edit(&mut spec, &injection(), &[], &injection().devices, false).unwrap();
        let devices = spec.list(&["linux", "devices"]);
        assert!(devices.len() == 1 && devices[0]["path"] == "/dev/nvidia0", "{devices:?}");
        let mount = spec.list(&["mounts"]).last().unwrap();
        assert_eq!(
            (&mount["source"], &mount["options"][0]),
            (&"/driver/dev/nvidiactl".into(), &"nosuid".into())
        );
        assert!(!mount["options"].as_array().unwrap().contains(&"nodev".into()));
        assert_eq!(spec.list(&["linux", "resources", "devices"]).len(), 3, "both are allowed");
    }

    #[test]
    fn shared_memory_of_a_size_that_somebody_chose_is_left() {
        for (options, kind, resized) in [
            (json!(["size=67108864"]), "tmpfs", true),
            (json!(["size=65536000"]), "tmpfs", true),
            (json!(["size=64m"]), "tmpfs", true),
            (json!(["size=65536k"]), "bind", false),
            (json!(["size=128m"]), "tmpfs", false),
            (json!(["size=50%"]), "tmpfs", false),
            (json!(["size=99999999999999999999g"]), "tmpfs", false),
            (json!(["size="]), "tmpfs", false),
            (json!([7]), "tmpfs", false),
            (json!({}), "tmpfs", false),
        ] {
            let spec = json!({"mounts": [7, {"destination": "/dev/shm", "type": kind, "options": options}]});
            let mut spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
            let before = spec.clone();
            resize_shm(&mut spec, 1 << 30).unwrap();
            assert_eq!(spec != before, resized, "{options}");
            assert_eq!(engines_shm(&spec), None, "there is no source");
            assert!(!resized || spec.list(&["mounts"])[1]["options"][0] == "size=1073741824");
        }
    }

    #[test]
    fn a_list_that_is_none_is_refused() {
        for broken in [
            json!({"process": 1}),
            json!({"linux": []}),
            json!({"mounts": "x"}),
            json!({"linux": {"devices": {}}}),
        ] {
            let mut spec = Spec::parse(broken.to_string().as_bytes()).unwrap();
            assert_eq!(
                edit(&mut spec, &injection(), &binds(), &injection().devices, true).unwrap_err().code(),
                Code::Bundle,
                "{broken}"
            );
        }
    }
}
