//! `gpurun cdi`: the document from which engines inject GPUs themselves, and a look at those that are there.

use super::{Context, cdi_hooks};
use crate::{
    apply::{
        cdi::{self, FINGERPRINT, NameStrategy, Options},
        whole_file,
    },
    cli::{
        Cdi, CdiDocument, CdiFormat, CdiGenerate, CdiMode, CdiRefresh, CdiTransform, CdiTransformRoot,
        RelativeTo,
    },
    error::{Code, Error, OrFail, Result},
    formats::{
        self,
        cdi::{DeviceNode, Document, Hook},
        cdi_root,
    },
    inventory::{
        Inventory, numbers,
        platform::{Platform, PlatformDriver, tegra, wsl},
        watch,
    },
    out, output, plan,
    request::DeviceId,
    text_file::TextFile,
    vocabulary::{DriverCapability, GatedFeature, Version},
};
use serde::Serialize;
use serde_json::json;
use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
};

/// The longest CDI spec that is read, in bytes. One of 16 GPUs with MIG has 200 kB.
const MAX_SPEC: u64 = 16 << 20;

/// Does what was asked for.
pub fn run(context: &Context, command: &Cdi) -> Result<u8> {
    match command {
        Cdi::Generate(args) => generate(context, args, &[]),
        Cdi::Refresh(args) if args.watch => keep_fresh(context, args),
        Cdi::Refresh(args) => refresh(context, args, || context.inventory()).map(|()| 0),
        Cdi::Transform(CdiTransform::Root(args)) => transform_root(args),
        Cdi::List(args) => list(&args.directories, context.json),
        Cdi::Validate(args) => validate(context, &args.directories),
    }
}

/// Writes the CDI spec of the host's GPUs, without disabled hooks.
pub fn generate(context: &Context, args: &CdiGenerate, disabled_hooks: &[String]) -> Result<u8> {
    let driver = driver(context, &args.document, || context.inventory())?;
    let content = content(context, driver, &args.document, disabled_hooks, args.output.as_deref())?;
    match &args.output {
        Some(path) => drop(write(path, &content)?),
        None => output::write(content.as_bytes())?,
    }
    Ok(0)
}

const WRITABLE: &str = "run the command as root, or name a file that you may write with --output";

/// Replaces a spec if it differs.
fn write(path: &Path, content: &str) -> Result<bool> {
    whole_file::write(path, content, Code::Cdi).map_err(|error| error.fix(WRITABLE))
}

/// What a document is about.
enum Driver {
    /// What NVML knows.
    Nvml(Box<Inventory>),
    /// What Tegra's lists name.
    Tegra(PlatformDriver),
    /// What Windows has given.
    Wsl(PlatformDriver),
}

/// The driver of this host that the mode names. With `auto` it is the one that NVIDIA's toolkit takes: Windows' where there is
/// its library, Tegra's where there is no NVML, or where NVML knows nothing but Tegra's own GPU.
fn driver(
    context: &Context,
    args: &CdiDocument,
    inventory: impl FnOnce() -> Result<Inventory>,
) -> Result<Driver> {
    let host = &context.host;
    let csv = || Ok(Driver::Tegra(tegra::find(host, &args.csv_file, &args.csv_ignore_pattern)?));
    let platform = match args.mode {
        CdiMode::Csv => return csv(),
        CdiMode::Wsl => Some(Platform::Wsl),
        CdiMode::Auto => Platform::of(host),
        _ => None,
    };
    let inventory = match platform {
        Some(Platform::Wsl) => return Ok(Driver::Wsl(wsl::find(host)?)),
        Some(Platform::Tegra) => match inventory() {
            Ok(inventory) if !inventory.gpus.iter().all(tegra::has) => inventory,
            _ => return csv(),
        },
        None => inventory()?,
    };
    Ok(Driver::Nvml(Box::new(inventory)))
}

/// What the document of this host says.
fn content(
    context: &Context,
    driver: Driver,
    args: &CdiDocument,
    disabled_hooks: &[String],
    output: Option<&Path>,
) -> Result<String> {
    let (vendor, class) = kind(args.mode);
    if !names_gpus(args.mode) && (args.no_all_device || !args.device_id.is_empty()) {
        return Err(Error::new(
            Code::Usage,
            "--device-id and --no-all-device choose GPUs, and this mode offers others",
        )
        .fix("leave them out, or use --mode nvml"));
    }
    let only = match &driver {
        Driver::Nvml(inventory) => chosen(inventory, &args.device_id)?,
        Driver::Tegra(_) | Driver::Wsl(_) => None,
    };
    let options = Options {
        vendor: args.vendor.clone().unwrap_or_else(|| vendor.into()),
        class: args.class.clone().unwrap_or_else(|| class.into()),
        names: args.device_name_strategy.clone(),
        only,
        all: !args.no_all_device,
        hook: args.hook.clone().map_or_else(find_hook, Ok)?,
        newest: args.engine.as_deref().map(cdi::newest_for).transpose()?,
    };
    if !matches!(driver, Driver::Tegra(_)) {
        for (flag, used) in [
            ("--csv.file", !args.csv_file.is_empty()),
            ("--csv.ignore-pattern", !args.csv_ignore_pattern.is_empty()),
        ] {
            if used {
                tracing::warn!("{flag} is not used: the driver of this host is not listed in files");
            }
        }
    }
    let (mut document, mut warnings) = match driver {
        Driver::Nvml(inventory) => of_nvml(context, &inventory, args.mode, &options)?,
        // The GPU of a Tegra has an index, but no UUID that could be had without NVML.
        Driver::Tegra(driver) => {
            let own = [(NameStrategy::Index, "0"), (NameStrategy::TypeIndex, "gpu0")];
            cdi::platform(&plan::platform(driver), &only_device(&own, args)?, &options)?
        }
        // Windows' GPUs are one device, which is all of them.
        Driver::Wsl(driver) => cdi::platform(&plan::platform(driver), &only_device(&[], args)?, &options)?,
    };
    warnings.extend(cdi_hooks::disable(&mut document, disabled_hooks));
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    Ok(text_of(&document, args.format, output))
}

/// The document of a mode whose facts are NVML's, and what it cannot say.
fn of_nvml(
    context: &Context,
    inventory: &Inventory,
    mode: CdiMode,
    options: &Options,
) -> Result<(Document, Vec<String>)> {
    let feature = |feature| cdi::feature(&plan::device::offers(&inventory.driver, feature)?, options);
    match mode {
        CdiMode::Management => {
            cdi::management(&plan::management(inventory, context.host.driver_nodes())?, options)
        }
        CdiMode::Gds => feature(GatedFeature::Gds),
        CdiMode::Mofed => feature(GatedFeature::Mofed),
        CdiMode::Nvswitch => feature(GatedFeature::NvSwitch),
        CdiMode::Gdrcopy => feature(GatedFeature::GdrCopy),
        CdiMode::Imex => feature(GatedFeature::Imex),
        CdiMode::Auto | CdiMode::Nvml | CdiMode::Csv | CdiMode::Wsl => {
            let parts = parts(inventory).map_err(|error| error.context("no CDI document can be made"))?;
            cdi::document(&parts, options)
        }
    }
}

/// How the one device of a host is called, that has these names of its own.
fn only_device(own: &[(NameStrategy, &'static str)], args: &CdiDocument) -> Result<Vec<&'static str>> {
    let is_unknown = |asked: &&String| *asked != "all" && own.iter().all(|(_, name)| asked != name);
    if let Some(unknown) = args.device_id.iter().find(is_unknown) {
        return Err(Error::new(Code::UnknownGpu, format!("the host has no device {unknown}"))
            .cause("its GPU is one device and is not found through NVML")
            .fix("use --device-id all, or leave it out"));
    }
    let mut names: Vec<&'static str> = args
        .device_name_strategy
        .iter()
        .filter_map(|wanted| own.iter().find(|(strategy, _)| strategy == wanted))
        .map(|(_, name)| *name)
        .collect();
    if !args.no_all_device {
        names.push("all");
    }
    if names.is_empty() {
        return Err(Error::new(Code::Usage, "the document would name no device")
            .cause("the host's device is called \"all\", and on a Tegra by its index; it has no UUID")
            .fix("leave out --no-all-device, or name devices by --device-name-strategy index"));
    }
    Ok(names)
}

/// The devices of these names; `None` for each.
fn chosen(inventory: &Inventory, names: &[String]) -> Result<Option<Vec<DeviceId>>> {
    if names.is_empty() || names.iter().any(|name| name == "all") {
        return Ok(None);
    }
    let id = |name: &String| {
        name.parse::<DeviceId>().map_err(|what| {
            Error::new(Code::BadRequest, "the device cannot be understood")
                .cause(what)
                .fix("name devices as `gpurun ls` does: --device-id 0,GPU-…,0:1")
        })
    };
    let ids: Vec<DeviceId> = names.iter().map(id).collect::<Result<_>>()?;
    let selected = plan::named(inventory, &ids, false)?;
    Ok(Some(selected.iter().map(plan::Selected::id).collect()))
}

fn names_gpus(mode: CdiMode) -> bool {
    matches!(mode, CdiMode::Auto | CdiMode::Nvml | CdiMode::Csv | CdiMode::Wsl)
}

/// Vendor and class of a mode's devices: those under which requests name them, too.
fn kind(mode: CdiMode) -> (&'static str, &'static str) {
    match mode {
        CdiMode::Management => ("management.nvidia.com", "gpu"),
        CdiMode::Gds => ("nvidia.com", "gds"),
        CdiMode::Mofed => ("nvidia.com", "mofed"),
        CdiMode::Nvswitch => ("nvidia.com", "nvswitch"),
        CdiMode::Gdrcopy => ("nvidia.com", "gdrcopy"),
        CdiMode::Imex => ("nvidia.com", "imex-channel"),
        CdiMode::Auto | CdiMode::Nvml | CdiMode::Csv | CdiMode::Wsl => ("nvidia.com", "gpu"),
    }
}

/// In the format that is named, or that the file's name ends with.
fn text_of(document: &impl Serialize, format: Option<CdiFormat>, output: Option<&Path>) -> String {
    let is_json = |path: &Path| path.extension().is_some_and(|extension| extension == "json");
    match format {
        Some(CdiFormat::Json) => formats::cdi::to_json(document),
        None if output.is_some_and(is_json) => formats::cdi::to_json(document),
        _ => formats::cdi::to_yaml(document),
    }
}

/// Writes the document if it is not what it should be, and removes it where there is no device that it could name. Where there
/// is no driver that it could be about, it is left as it is.
fn refresh(
    context: &Context,
    args: &CdiRefresh,
    inventory: impl FnOnce() -> Result<Inventory>,
) -> Result<()> {
    let path = args.output.display();
    check_is_spec(&args.output)?;
    let driver = match driver(context, &args.document, inventory) {
        Err(error) if error.code() == Code::NoDriver => {
            out!("{path} is left as it is: {}", error.what())?;
            return Ok(());
        }
        result => result?,
    };
    // One that named GPUs that are gone would start containers without them.
    if let Driver::Nvml(inventory) = &driver
        && names_gpus(args.document.mode)
        && !plan::has_devices(inventory)
    {
        let done = if whole_file::remove(&args.output, Code::Cdi).map_err(|error| error.fix(WRITABLE))? {
            "is removed"
        } else {
            "is not written"
        };
        out!("{path} {done}: no GPU of this host can be used, and `gpurun doctor` says why")?;
        return Ok(());
    }
    let about = match &driver {
        Driver::Nvml(inventory) => {
            format!("driver {}, {} GPUs", inventory.driver.version, inventory.gpus.len())
        }
        Driver::Tegra(_) => "the driver that Tegra's lists name".into(),
        Driver::Wsl(_) => "Windows' driver".into(),
    };
    let content = content(context, driver, &args.document, &[], Some(&args.output))?;
    if write(&args.output, &content)? {
        out!("{path} is written: {about}")?;
    } else {
        out!("{path} is up to date")?;
    }
    Ok(())
}

/// Fails where `--output` names a file that is not a CDI spec: a refresh replaces the file, and removes it on a host without GPUs.
fn check_is_spec(output: &Path) -> Result<()> {
    // /dev/stdout and FIFOs are written to, not replaced.
    if !output.metadata().is_ok_and(|there| there.is_file()) {
        return Ok(());
    }
    // If the file cannot be read, the write reports the reason.
    let Ok(content) = std::fs::read(output) else { return Ok(()) };
    let is_spec = |text: &str| {
        formats::yaml::from_str(text)
            .is_ok_and(|value| value["cdiVersion"].is_string() && value["kind"].is_string())
    };
    if content.is_empty() || std::str::from_utf8(&content).is_ok_and(is_spec) {
        return Ok(());
    }
    Err(Error::new(Code::Cdi, format!("{} is not a CDI spec, and is left as it is", output.display()))
        .cause("a refresh would replace the file")
        .fix("name another file in --output, such as /etc/cdi/nvidia.yaml"))
}

/// Refreshes until a signal ends it, which may be at any time: the document is replaced as a whole.
fn keep_fresh(context: &Context, args: &CdiRefresh) -> Result<u8> {
    let never = watch::follow(&context.host, &context.state_dir, |inventory| {
        // The document stays as it was until the rest has come.
        if let Err(error) = refresh(context, args, || inventory) {
            output::report(&error);
        }
    })?;
    match never {}
}

/// Puts another directory in the place of the one with which a document's paths begin.
pub fn transform_root(args: &CdiTransformRoot) -> Result<u8> {
    let mut text = String::new();
    let name = args.input.display();
    if args.input == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(&args.input).and_then(|mut file| file.read_to_string(&mut text))
    }
    .or_fail(Code::Cdi, || format!("{name} cannot be read"))
    .map_err(|error| error.fix("name a CDI spec that can be read with --input"))?;
    let whose = match args.relative_to {
        RelativeTo::Host => cdi_root::Whose::Host,
        RelativeTo::Container => cdi_root::Whose::Container,
    };
    let document = cdi_root::transform(&text, &args.from, &args.to, whose).map_err(|error| {
        error.context(format!("{name} cannot be transformed")).fix("name a CDI spec with --input")
    })?;
    let content = text_of(&document, None, args.output.as_deref());
    match &args.output {
        Some(path) => drop(write(path, &content)?),
        None => output::write(content.as_bytes())?,
    }
    Ok(0)
}

/// Whoever asks an engine for a device says nothing of capabilities, so the container gets what there is; but hardly one needs
/// 32-bit libraries, and each file is a mount.
fn parts(inventory: &Inventory) -> Result<plan::Parts<'_>> {
    plan::parts(inventory, DriverCapability::all() - DriverCapability::COMPAT32)
}

/// The hook's program, beside this one.
fn find_hook() -> Result<PathBuf> {
    let own = std::env::current_exe()
        .or_fail(Code::Internal, || "/proc/self/exe names no program")
        .map_err(|error| error.fix("mount /proc, or say where the hook is with --hook"))?;
    let hook = own.with_file_name("gpurun-hook");
    if hook.is_file() {
        return Ok(hook);
    }
    Err(Error::new(Code::Cdi, format!("the hook's program {} is not there", hook.display()))
        .cause("a container for which an engine reads the document would not start")
        .fix("install gpurun-hook beside gpurun, or say where it is with --hook"))
}

/// A file of a directory that engines read.
#[derive(Debug)]
struct Found {
    path: PathBuf,
    document: Result<Document>,
}

/// The documents, those that engines prefer last.
fn found(directories: &[PathBuf]) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for directory in directories {
        let entries = match std::fs::read_dir(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            result => result
                .or_fail(Code::Cdi, || format!("{} cannot be read", directory.display()))
                .map_err(|error| error.fix("name directories that can be read with --spec-dir"))?,
        };
        let mut paths: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension().is_some_and(|extension| extension == "json" || extension == "yaml")
            })
            .collect();
        paths.sort();
        for path in paths {
            let text = TextFile::read(&path, MAX_SPEC)
                .and_then(|file| Ok(file.text()?.to_owned()))
                .or_fail(Code::Cdi, || "it cannot be read")
                .map_err(|error| error.fix("run the command with sudo, or move the file out of the directory: `mv FILE FILE.old`"));
            all.push(Found { document: text.and_then(|text| Document::parse(&text)), path });
        }
    }
    Ok(all)
}

/// Each device by its full name, with the files that define it.
fn devices(found: &[Found]) -> BTreeMap<String, Vec<&Path>> {
    let mut devices: BTreeMap<String, Vec<&Path>> = BTreeMap::new();
    for (file, document) in found.iter().filter_map(|file| Some((file, file.document.as_ref().ok()?))) {
        for device in &document.devices {
            devices.entry(format!("{}={}", document.kind, device.name)).or_default().push(&file.path);
        }
    }
    devices
}

/// Prints the qualified device names, one per line. If there are none, the reason goes to standard error. The exit code is
/// always 0, as with `nvidia-ctk cdi list`.
pub fn list(directories: &[PathBuf], as_json: bool) -> Result<u8> {
    let found = found(directories)?;
    let devices = devices(&found);
    if found.is_empty() {
        output::report(&format_args!(
            "there is no CDI spec in {}; `gpurun cdi generate --output /etc/cdi/nvidia.yaml` writes one",
            shown(directories)
        ));
    }
    for (path, error) in found.iter().filter_map(|file| Some((&file.path, file.document.as_ref().err()?))) {
        let (path, why) = (path.display(), error.what());
        output::report(&format_args!("{path} is not a CDI spec: {why}; `gpurun cdi validate` says more"));
    }
    if as_json {
        out!("{:#}", json!(devices))?;
        return Ok(0);
    }
    for name in devices.keys() {
        out!("{name}")?;
    }
    Ok(0)
}

/// Prints what is wrong; 0 if nothing is, 1 otherwise.
fn validate(context: &Context, directories: &[PathBuf]) -> Result<u8> {
    let Checked { files, findings } = checked(directories, &context.inventory())?;
    if context.json {
        let all: Vec<_> = findings
            .iter()
            .map(|Finding { path, what, fix }| json!({"file": path, "what": what, "fix": fix}))
            .collect();
        out!("{:#}", json!({"files": files, "findings": all}))?;
    } else {
        for Finding { path, what, fix } in &findings {
            out!("!    {}: {what}; {fix}", path.display())?;
        }
        if files.is_empty() {
            out!("there is no CDI spec in {}", shown(directories))?;
        } else if findings.is_empty() {
            out!("{} CDI specs, nothing is wrong", files.len())?;
        }
    }
    Ok(u8::from(!findings.is_empty()))
}

/// Directories, as one names them in a sentence.
pub fn shown(directories: &[PathBuf]) -> String {
    let all: Vec<_> = directories.iter().map(|directory| directory.display().to_string()).collect();
    all.join(", ")
}

/// What a look at the documents found.
#[derive(Debug)]
pub struct Checked {
    /// The documents.
    pub files: Vec<PathBuf>,
    /// What is wrong with them.
    pub findings: Vec<Finding>,
}

/// Something that is wrong with a document.
#[derive(Debug)]
pub struct Finding {
    /// The document.
    pub path: PathBuf,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub fix: &'static str,
}

/// Looks at the documents that engines find, on a host that is like this.
pub fn checked(directories: &[PathBuf], inventory: &Result<Inventory>) -> Result<Checked> {
    let found = found(directories)?;
    let mut findings: Vec<Finding> = Vec::new();
    for (name, paths) in devices(&found) {
        for pair in paths.windows(2) {
            let [first, second] = pair else { continue };
            let (what, fix) = if first == second {
                (format!("it defines {name} twice"), REGENERATE)
            } else if first.parent() == second.parent() {
                (
                    format!("{} also defines {name}, so engines refuse it", first.display()),
                    "remove one of the two files",
                )
            } else {
                (
                    format!("it takes precedence over {}, which also defines {name}", first.display()),
                    "remove the one that is not meant",
                )
            };
            findings.push(Finding { path: second.to_path_buf(), what, fix });
        }
    }
    for Found { path, document } in &found {
        let finding = |(what, fix)| Finding { path: path.clone(), what, fix };
        match document {
            Ok(document) => findings.extend(check(document, inventory).into_iter().map(finding)),
            Err(error) => findings.push(finding((
                format!("{}: {}", error.what(), error.cause_line()),
                "move it out of the directory, or write it again",
            ))),
        }
    }
    Ok(Checked { files: found.into_iter().map(|file| file.path).collect(), findings })
}

const REGENERATE: &str = "write it again with `gpurun cdi generate`, or with what wrote it";

/// What is wrong with one document, and what to do.
fn check(document: &Document, inventory: &Result<Inventory>) -> Vec<(String, &'static str)> {
    let mut findings: Vec<_> = document.faults().into_iter().map(|what| (what, REGENERATE)).collect();
    let mut wrong = |what: String| findings.push((what, REGENERATE));
    let mut gone: Vec<&str> = Vec::new();
    for edits in document.edits() {
        let mounts = edits.mounts.iter().map(|mount| mount.host_path.as_str());
        let hooks = edits.hooks.iter().map(|hook| hook.path.as_str());
        let nodes = edits.device_nodes.iter().map(host_path);
        // File systems without a source have any word.
        for path in mounts.chain(hooks).chain(nodes).filter(|path| path.starts_with('/')) {
            if !Path::new(path).exists() && !gone.contains(&path) {
                gone.push(path);
            }
        }
    }
    match gone.as_slice() {
        [] => {}
        [only] => wrong(format!("{only} is not there")),
        [first, others @ ..] => {
            wrong(format!("{first} and {} other paths of the host are not there", others.len()));
        }
    }
    for node in document.edits().flat_map(|edits| &edits.device_nodes) {
        let path = host_path(node);
        let (Some(major), Some(now)) = (node.major, numbers(Path::new(path))) else { continue };
        if (major, node.minor.unwrap_or(0)) != now {
            wrong(format!(
                "it says that {path} is {major}:{}, and it is {}:{}",
                node.minor.unwrap_or(0),
                now.0,
                now.1
            ));
        }
    }
    let hooks: Vec<&Hook> = document.edits().flat_map(|edits| &edits.hooks).collect();
    let Some(driver) = hooks.iter().find_map(|hook| flag(hook, "--host-driver-version")) else {
        return findings;
    };
    let inventory = match inventory {
        Ok(inventory) => inventory,
        Err(error) => {
            findings.push((
                format!("it is for driver {driver}, and {}", error.what()),
                "`gpurun doctor` says more",
            ));
            return findings;
        }
    };
    let mut wrong = |what: String| findings.push((what, REGENERATE));
    let version = |text: &str| text.parse::<Version>().ok();
    let is_anothers = version(driver).is_none_or(|driver| driver != inventory.driver.version);
    if is_anothers {
        wrong(format!("it is for driver {driver}, and {} is running", inventory.driver.version));
    }
    let own = hooks
        .iter()
        .flat_map(|hook| &hook.env)
        .find_map(|variable| variable.strip_prefix(FINGERPRINT).and_then(|rest| rest.strip_prefix('=')));
    let parts = match parts(inventory) {
        Ok(parts) => parts,
        Err(error) => {
            let why =
                if plan::has_devices(inventory) { error.what() } else { "no GPU of this host can be used" };
            findings.push((format!("it names devices, and {why}"), "`gpurun doctor` says more"));
            return findings;
        }
    };
    let uuids: Vec<&str> = parts.devices.iter().map(|(device, _)| device.uuid()).collect();
    let names = document.devices.iter().map(|device| device.name.as_str());
    let (kept, gone): (Vec<_>, Vec<_>) = names
        .filter(|name| name.starts_with("GPU-") || name.starts_with("MIG-"))
        .partition(|name| uuids.contains(name));
    if !gone.is_empty() {
        wrong(format!("it names {}, which this host does not have", gone.join(", ")));
    }
    let change = own.and_then(|own| cdi::change(own, &cdi::fingerprint(&parts)));
    if let Some(change) = change.filter(|change| !is_anothers || *change != cdi::CHANGES[0]) {
        let new: Vec<&str> = uuids.into_iter().filter(|uuid| !kept.contains(uuid)).collect();
        let new = if kept.is_empty() || new.is_empty() {
            String::new()
        } else {
            format!("; it does not name {}", new.join(", "))
        };
        wrong(format!("{change}{new}"));
    }
    findings
}

fn host_path(node: &DeviceNode) -> &str {
    node.host_path.as_deref().unwrap_or(&node.path)
}

/// The value of a hook's flag, `--flag=value` or `--flag value`.
fn flag<'a>(hook: &'a Hook, name: &str) -> Option<&'a str> {
    let at = hook.args.iter().position(|word| word.split('=').next() == Some(name))?;
    match hook.args[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => hook.args.get(at + 1).map(String::as_str),
    }
}
