//! Lowers the plan's parts to a CDI document: the shared part to the edits that every container gets, each device's part to
//! its own.
//!
//! ```text
//! /usr/local/nvidia       a tmpfs: mount points and links leave nothing in the container's root
//!   lib64/libcuda.so.550  the host's file, a mount of the engine's
//!   lib64/libcuda.so.1    a link ─┐
//! /etc/ld.so.cache        written ├─ by one hook, `gpurun-hook all`
//! ```

use super::oci_spec::BindKind;
use crate::{
    error::{Code, Error, Result},
    formats::cdi::{ContainerEdits, Device, DeviceNode, Document, Hook, Mount, is_kind},
    inventory,
    plan::{self, DRIVER_DIR, DevicePart, Injection, Parts, Selected, Symlink},
    request::DeviceId,
    vocabulary::Version,
};
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// What the caller chooses.
#[derive(Debug, Clone)]
pub struct Options {
    /// `nvidia.com`
    pub vendor: String,
    /// `gpu`
    pub class: String,
    /// How devices are called; each has every name.
    pub names: Vec<NameStrategy>,
    /// Which devices; `None`: each.
    pub only: Option<Vec<DeviceId>>,
    /// Whether there is a device `all`, which is every other at once.
    pub all: bool,
    /// The hook's program on the host.
    pub hook: PathBuf,
    /// The newest version of the specification that the engine reads; `None`: no engine in particular.
    pub newest: Option<Version>,
}

/// How a device is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NameStrategy {
    /// `0`, and `0:1` for a MIG device
    Index,
    /// `GPU-…`, `MIG-…`
    Uuid,
    /// `gpu0`, `mig0:1`
    TypeIndex,
}

impl NameStrategy {
    fn name(self, device: Selected<'_>) -> String {
        match self {
            Self::Index => device.id().to_string(),
            Self::Uuid => device.uuid().into(),
            Self::TypeIndex => format!("{}{}", if device.mig.is_some() { "mig" } else { "gpu" }, device.id()),
        }
    }
}

/// Engines and, ascending, from which release of theirs on they read which version of the specification. It follows from the
/// release of the CDI library (tags.cncf.io/container-device-interface) in their go.mod.
const ENGINES: [(&str, &[(&str, &str)]); 4] = [
    ("podman", &[("4.1", "0.4.0"), ("4.3", "0.5.0"), ("4.8", "0.6.0"), ("5.1", "0.7.0")]),
    ("docker", &[("25", "0.6.0"), ("27", "0.7.0")]),
    ("containerd", &[("1.7", "0.5.0"), ("2.0", "0.7.0")]),
    ("cri-o", &[("1.29", "0.6.0"), ("1.31", "0.7.0")]),
];

/// The newest version of the specification that an engine reads: `podman@4.3`; without a release, the engine's newest one.
///
/// # Errors
/// [`Code::Usage`] for an engine or a release that reads none.
pub fn newest_for(engine: &str) -> Result<Version> {
    let (name, release) =
        engine.split_once('@').map_or((engine, None), |(name, release)| (name, Some(release)));
    let usage = |what: String| {
        let known: Vec<_> = ENGINES.iter().map(|(name, from)| format!("{name}@{}", from[0].0)).collect();
        Error::new(Code::Usage, what).fix(format!("name one of {}, or a later release", known.join(", ")))
    };
    let Some((_, releases)) = ENGINES.iter().find(|(known, _)| *known == name) else {
        return Err(usage(format!("the engine {name:?} is not known")));
    };
    let version = |text: &str| text.parse::<Version>().map_err(&usage);
    let release = release.map(version).transpose()?;
    let mut newest = None;
    for (from, reads) in *releases {
        if release.as_ref().is_none_or(|release| version(from).is_ok_and(|from| *release >= from)) {
            newest = Some(version(reads)?);
        }
    }
    newest.ok_or_else(|| usage(format!("{engine} reads no CDI documents")))
}

/// The document, and what it cannot say.
///
/// # Errors
/// [`Code::Cdi`] if a name cannot be one, or where nothing is left of the document in the version that may be used.
pub fn document(parts: &Parts<'_>, options: &Options) -> Result<(Document, Vec<String>)> {
    let chosen = |device: &Selected<'_>| options.only.as_ref().is_none_or(|ids| ids.contains(&device.id()));
    let chosen: Vec<_> = parts.devices.iter().filter(|(device, _)| chosen(device)).collect();
    let mut devices = Vec::new();
    for strategy in &options.names {
        for (selected, part) in &chosen {
            devices.push(device(strategy.name(*selected), part.nodes.iter()));
        }
    }
    if options.all {
        devices.push(device("all".into(), chosen.iter().flat_map(|(_, part)| &part.nodes)));
    }
    // Those of a device are made where the container has its node.
    let links = parts.devices.iter().flat_map(|(_, part)| &part.symlinks);
    let env = vec![format!("{FINGERPRINT}={}", fingerprint(parts))];
    let hook = Hook { env, ..hook(&parts.shared, links, &options.hook) };
    let edits = edits(&parts.shared, vec![hook]);
    let (document, mut warnings) = finished(devices, edits, options)?;
    warnings.extend(parts.shared.warnings.iter().cloned());
    warnings.extend(left_out(&parts.shared));
    Ok((document, warnings))
}

/// The document of a feature's devices, by their names. Whoever asks for one asks for a GPU as well, and so has the driver.
///
/// # Errors
/// As for [`document`].
pub fn feature(offers: &[(String, DevicePart)], options: &Options) -> Result<(Document, Vec<String>)> {
    let devices = offers
        .iter()
        .map(|(name, part)| {
            let mut device = device(name.clone(), part.nodes.iter());
            device.container_edits.mounts = part.mounts.iter().map(mount).collect();
            device
        })
        .collect();
    finished(devices, ContainerEdits::default(), options)
}

/// The document of a host with one device, which has these names: all of a driver that is not found through NVML. It has no
/// fingerprint, as no check knows such hosts.
///
/// # Errors
/// As for [`document`].
pub fn platform(injection: &Injection, names: &[&str], options: &Options) -> Result<(Document, Vec<String>)> {
    let devices = names.iter().map(|name| device((*name).into(), injection.devices.iter())).collect();
    let nodeless = Injection { devices: Vec::new(), ..injection.clone() };
    let hook = hook(injection, [], &options.hook);
    let (document, mut warnings) = finished(devices, edits(&nodeless, vec![hook]), options)?;
    warnings.extend(injection.warnings.iter().cloned());
    Ok((document, warnings))
}

/// The document of containers that manage GPUs, who make device nodes themselves: the driver's parameters stay as they are.
///
/// # Errors
/// As for [`document`].
pub fn management(injection: &Injection, options: &Options) -> Result<(Document, Vec<String>)> {
    let links = injection.symlinks.iter().map(link);
    let folders = injection.library_dirs.iter().map(|directory| format!("--folder={}", text(&directory.0)));
    let hook = |name: &str, flags: Vec<String>| Hook {
        hook_name: CREATE_CONTAINER.into(),
        path: text(&options.hook),
        args: ["gpurun-hook".to_owned(), name.to_owned()].into_iter().chain(flags).collect(),
        ..Hook::default()
    };
    let hooks = vec![hook("create-symlinks", links.collect()), hook("update-ldcache", folders.collect())];
    let nodeless = Injection { devices: Vec::new(), ..injection.clone() };
    finished(vec![device("all".into(), injection.devices.iter())], edits(&nodeless, hooks), options)
}

/// The document in the version that it needs and the engine reads, and what was left out for that.
fn finished(
    devices: Vec<Device>,
    container_edits: ContainerEdits,
    options: &Options,
) -> Result<(Document, Vec<String>)> {
    for word in [&options.vendor, &options.class] {
        if !is_kind(word) {
            return Err(Error::new(Code::Cdi, format!("{word:?} cannot be a CDI vendor or class"))
                .fix("letters, digits, -, _ and ., a letter first: --vendor nvidia.com --class gpu"));
        }
    }
    let mut document = Document {
        kind: format!("{}/{}", options.vendor, options.class),
        devices,
        container_edits,
        ..Document::default()
    };
    let mut warnings = Vec::new();
    match &options.newest {
        Some(newest) => warnings.extend(keep_below(&mut document, newest)?),
        // Every host with a DRM node would need 0.7.0 for them, and hardly any container does: the CDI library makes each node
        // the container's user's own.
        None => drop(take_groups(&mut document)),
    }
    document.cdi_version = document.lowest_version().into();
    Ok((document, warnings))
}

/// What a check compares to know whether a document is about the host as it is now: the parts that it was made of. Not the
/// inventory's own fingerprint, which is another one after each reboot. One number for each of [`CHANGES`], in their order.
pub fn fingerprint(parts: &Parts<'_>) -> String {
    let nodes: Vec<_> =
        parts.shared.devices.iter().chain(parts.devices.iter().flat_map(|(_, part)| &part.nodes)).collect();
    let devices: Vec<_> = parts
        .devices
        .iter()
        .map(|(device, part)| {
            let paths: Vec<_> = part.nodes.iter().map(|node| &node.container_path).collect();
            let rest = DevicePart { nodes: Vec::new(), ..part.clone() };
            (device.id().to_string(), device.uuid(), paths, rest)
        })
        .collect();
    let shared = Injection { warnings: Vec::new(), devices: Vec::new(), ..parts.shared.clone() };
    [hash(&shared), hash(&devices), hash(&nodes)].join("-")
}

/// What of a host may be another than it was.
pub const CHANGES: [&str; 3] = [
    "the driver's files are not those that they were when it was written",
    "the host's GPUs or MIG devices are not those that they were when it was written",
    "a device node has another number or mode than when it was written, as after a reboot",
];

/// The first of [`CHANGES`] between two fingerprints of documents.
pub fn change(then: &str, now: &str) -> Option<&'static str> {
    let pairs = then.split('-').zip(now.split('-')).zip(CHANGES);
    let known = pairs.filter(|((then, now), _)| then != now).map(|(_, change)| change).next();
    known.or((then != now).then_some("another release of gpurun wrote it"))
}

fn hash(value: &impl serde::Serialize) -> String {
    let text = serde_json::to_vec(value).unwrap_or_default();
    Sha256::digest(text).iter().take(8).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Under which name the hook's environment holds the fingerprint. The hook reads no environment; there every version of the
/// specification and every rewriting of a document keeps it, which is true of no annotation and no comment.
pub const FINGERPRINT: &str = "GPURUN_HOST";

fn device<'a>(name: String, nodes: impl Iterator<Item = &'a inventory::DeviceNode>) -> Device {
    let mut edits = ContainerEdits::default();
    for node in nodes {
        add_node(&mut edits, node);
    }
    Device { name, container_edits: edits, ..Device::default() }
}

/// The driver's own major number is registered (Documentation/admin-guide/devices.txt); the kernel gives out the others when a
/// module is loaded. Where the document leaves those out, the engine reads the host's node at each start, so that a reboot
/// makes no document wrong.
const REGISTERED_MAJOR: u32 = 195;

fn add_node(edits: &mut ContainerEdits, node: &inventory::DeviceNode) {
    let (path, host) = (text(&node.container_path.0), text(&node.path.0));
    let registered = node.major == REGISTERED_MAJOR;
    let entry = DeviceNode {
        host_path: (host != path).then_some(host),
        path,
        kind: Some("c".into()),
        major: registered.then_some(node.major),
        minor: registered.then_some(node.minor),
        file_mode: Some(node.mode),
        permissions: Some("rwm".into()),
        uid: None,
        gid: (node.gid != 0).then_some(node.gid),
    };
    // MIG devices share their GPU's node.
    if edits.device_nodes.contains(&entry) {
        return;
    }
    edits.device_nodes.push(entry);
    if node.mode & 0o006 != 0o006 && node.gid != 0 && !edits.additional_gids.contains(&node.gid) {
        edits.additional_gids.push(node.gid);
    }
}

fn edits(shared: &Injection, hooks: Vec<Hook>) -> ContainerEdits {
    let mut edits = ContainerEdits {
        env: shared.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        hooks,
        ..ContainerEdits::default()
    };
    for node in &shared.devices {
        add_node(&mut edits, node);
    }
    if shared.mounts.iter().any(|mount| mount.target.0.starts_with(DRIVER_DIR)) {
        edits.mounts.push(Mount {
            host_path: "tmpfs".into(),
            container_path: DRIVER_DIR.into(),
            kind: Some("tmpfs".into()),
            options: ["nosuid", "nodev", "mode=755", "size=1m"].map(String::from).into(),
        });
    }
    edits.mounts.extend(shared.mounts.iter().filter(|mount| is_fixed(mount)).map(mount));
    edits
}

/// Whether only root can replace the object at this path: a spec is written once and read for months.
fn is_fixed(mount: &plan::Mount) -> bool {
    !mount.daemon.is_some_and(|daemon| daemon.is_replaceable)
}

/// The message about a path that is left out of a spec, with the option that mounts it.
fn left_out(injection: &Injection) -> impl Iterator<Item = String> {
    injection.mounts.iter().filter(|mount| !is_fixed(mount)).map(|mount| {
        let path = mount.target.0.display();
        format!(
            "{path} is not in the CDI spec, because users other than root can replace it: start containers that need it with \
             -v {path}:{path}"
        )
    })
}

fn mount(mount: &plan::Mount) -> Mount {
    let kind = mount.daemon.map_or(BindKind::ReadOnly, BindKind::Socket);
    Mount {
        host_path: text(&mount.source.0),
        container_path: text(&mount.target.0),
        kind: None,
        options: kind.options().iter().map(ToString::to_string).collect(),
    }
}

fn link(link: &Symlink) -> String {
    format!("--link={}::{}", text(&link.target), text(&link.link.0))
}

/// When hooks run: in the container's namespaces, with the host's files still in view.
const CREATE_CONTAINER: &str = "createContainer";

/// One process for everything that is no mount and no node.
fn hook<'a>(shared: &'a Injection, more: impl IntoIterator<Item = &'a Symlink>, program: &Path) -> Hook {
    let mut args = vec!["gpurun-hook".to_owned(), "all".to_owned()];
    if let Some(host) = &shared.forward_compat {
        args.push(format!("--host-driver-version={}", host.driver));
        args.push(format!("--host-cuda-version={}", host.cuda));
    }
    args.extend(shared.library_dirs.iter().map(|directory| format!("--folder={}", text(&directory.0))));
    args.extend(shared.libraries.iter().map(|library| format!("--library={}", text(&library.path.0))));
    args.extend(shared.symlinks.iter().chain(more).map(link));
    Hook { hook_name: CREATE_CONTAINER.into(), path: text(program), args, ..Hook::default() }
}

/// Takes the groups for device nodes out of a document.
fn take_groups(document: &mut Document) -> Vec<u32> {
    let edits = document.devices.iter_mut().map(|device| &mut device.container_edits);
    let mut gids = Vec::new();
    for edits in std::iter::once(&mut document.container_edits).chain(edits) {
        gids.append(&mut edits.additional_gids);
    }
    gids.sort_unstable();
    gids.dedup();
    gids
}

/// Takes out of a document what versions above `newest` brought.
fn keep_below(document: &mut Document, newest: &Version) -> Result<Vec<String>> {
    let below = |version: &str| version.parse::<Version>().is_ok_and(|version| *newest < version);
    let mut warnings = Vec::new();
    if below("0.7.0") {
        let gids = take_groups(document);
        if !gids.is_empty() {
            warnings.push(format!(
                "CDI {newest} cannot add groups to the container's user: a program that changes its user there needs {gids:?} to \
                 open device nodes that not everybody may open"
            ));
        }
    }
    if below("0.5.0") {
        let (kept, left_out): (Vec<_>, Vec<_>) = document.devices.drain(..).partition(Device::has_old_name);
        document.devices = kept;
        if !left_out.is_empty() {
            let names: Vec<_> = left_out.iter().map(|device| device.name.as_str()).collect();
            warnings.push(format!(
                "CDI {newest} has no names that begin with a digit: {} are left out; --device-name-strategy type-index names \
                 them gpu0, gpu1",
                names.join(", ")
            ));
        }
    }
    let lowest = document.lowest_version();
    if below(lowest) {
        return Err(Error::new(Code::Cdi, format!("what this host needs cannot be said in CDI {newest}"))
            .cause(format!(
                "it needs {lowest}: device nodes that are elsewhere on the host, or a class with a dot"
            ))
            .fix("name a newer engine, or leave out --engine"));
    }
    Ok(warnings)
}

/// JSON and YAML know text alone; driver files with other names do not exist.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_reads_what_its_release_reads() {
        let newest = |engine| newest_for(engine).map(|version| version.to_string()).map_err(|e| e.code());
        for (engine, version) in [
            ("podman@4.3", "0.5.0"),
            ("podman@4.3.1", "0.5.0"),
            ("podman@4.2", "0.4.0"),
            ("podman@5.8.1", "0.7.0"),
            ("podman", "0.7.0"),
            ("docker@25", "0.6.0"),
            ("docker@25.0.5", "0.6.0"),
            ("containerd@1.7.24", "0.5.0"),
        ] {
            assert_eq!(newest(engine).as_deref(), Ok(version), "{engine}");
        }
        for engine in ["podman@3.4", "docker@24.0.7", "rkt", "", "podman@", "podman@new"] {
            assert_eq!(newest(engine), Err(Code::Usage), "{engine}");
        }
    }
}
