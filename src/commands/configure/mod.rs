//! `gpurun configure`: tells an engine of gpurun, in the engine's own configuration, and takes it out again.
//!
//! One file an engine, of functions from text to text; what is read and written is here.

mod containerd;
mod crio;
mod docker;
mod installed;
mod low_level;
mod podman;

use crate::{
    apply::config_file::ConfigFile,
    cli::{Configure, Engine},
    error::{Code, Error, OrFail, Result},
    formats::oci_hook,
    out, output,
    own_directory::{self, Purpose},
};
use installed::Containerd;
use similar::TextDiff;
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// What an engine is told.
#[derive(Debug, Clone)]
pub struct Registration {
    /// How users call the runtime: `docker run --runtime NAME`.
    pub name: String,
    /// The program, absolute.
    pub path: String,
    /// Whether it runs the containers of those who name none.
    pub default: bool,
    /// Whether the engine reads CDI documents.
    pub cdi: bool,
}

/// What is to be done with an engine's configuration.
#[derive(Debug)]
pub struct Order {
    /// Whose it is.
    pub engine: Engine,
    /// Which of its files, if not the usual one.
    pub file: Option<PathBuf>,
    /// The main file, if `file` is a drop-in. CRI-O and containerd find it by the usual layout otherwise.
    pub source: Option<PathBuf>,
    /// What it is told. With `hook` its path is that of the prestart hook.
    pub wanted: Registration,
    /// A file of hooks.d in place of a runtime: for Podman and CRI-O.
    pub hook: bool,
    /// Takes it out instead.
    pub remove: bool,
    /// Says what would change, and changes nothing.
    pub dry_run: bool,
}

/// Where Podman and CRI-O look for hooks unless they are told otherwise.
const HOOKS_DIR: &str = "/usr/share/containers/oci/hooks.d";
/// The program that a file of hooks.d names.
pub const HOOK: &str = "nvidia-container-runtime-hook";

/// What was typed.
pub fn run(args: &Configure) -> Result<u8> {
    let program = if args.hook { HOOK } else { "gpurun-runtime" };
    let path = match &args.path {
        Some(path) => path.clone(),
        // What is taken out is known by its name.
        None if args.remove => PathBuf::from("/").join(program),
        None => find(program)?,
    };
    carry_out(&Order {
        engine: args.engine,
        file: args.file.clone(),
        source: None,
        wanted: Registration {
            name: args.name.clone(),
            path: absolute(&path)?,
            default: args.set_as_default,
            cdi: args.cdi,
        },
        hook: args.hook,
        remove: args.remove,
        dry_run: args.dry_run,
    })
}

/// A program that lies beside this one, or in PATH.
pub fn find(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()
        .or_fail(Code::Internal, || "/proc/self/exe cannot be read")
        .map_err(|error| error.fix("mount /proc, or name the program with --path"))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = own
        .parent()
        .map(Path::to_owned)
        .into_iter()
        .chain(std::env::split_paths(&path).filter(|dir| dir.is_absolute()));
    dirs.map(|dir| dir.join(name)).find(|file| is_executable(file)).ok_or_else(|| {
        Error::new(Code::Usage, format!("{name} was not found"))
            .cause(format!("it is neither beside {} nor in PATH", own.display()))
            .fix("install it, or name it with --path")
    })
}

fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|stat| stat.is_file() && stat.permissions().mode() & 0o111 != 0)
}

/// A path as an engine needs it, whose working directory is its own.
pub fn absolute(path: &Path) -> Result<String> {
    path.to_str().filter(|_| path.is_absolute()).map(str::to_owned).ok_or_else(|| {
        Error::new(Code::Usage, format!("{} is no absolute path", path.display())).fix("begin it with /")
    })
}

/// Changes the engine's file, says what was done, and what is to be done next.
pub fn carry_out(order: &Order) -> Result<u8> {
    let wanted = &order.wanted;
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if wanted.name.is_empty()
        || !wanted.name.chars().all(is_name)
        || ["runc", "crun"].contains(&wanted.name.as_str())
    {
        return Err(Error::new(Code::Usage, format!("a runtime cannot be called `{}`", wanted.name)).fix(
            "take letters, digits, -, _ and ., and no name that an engine has a runtime of its own for",
        ));
    }
    if order.hook && !matches!(order.engine, Engine::Podman | Engine::Crio) {
        return Err(Error::new(Code::Usage, "Docker and containerd read no hooks.d")
            .fix("leave out --hook: they are told of the runtime"));
    }
    if wanted.cdi && matches!(order.engine, Engine::Podman | Engine::Crio) {
        tracing::warn!("Podman and CRI-O read CDI documents without being told");
    }
    let files = files(order)?;
    for file in &files.change {
        change(order, file, &files)?;
    }
    let mut texts = files.read.clone();
    for file in &files.change {
        texts.extend(ConfigFile::open(&file.kept(&order.wanted.name))?.text().map(str::to_owned));
        texts.extend(file.text().map(str::to_owned));
    }
    low_level::note(order, &texts.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(0)
}

/// Nothing is written before the file is understood.
const MEND: &str = "correct the file, or name another one; it is unchanged";

fn change(order: &Order, file: &ConfigFile, files: &Files) -> Result<()> {
    let name = &order.wanted.name;
    let path = file.path().display();
    let in_file = |error: Error| error.context(format!("{path} cannot be used")).fix(MEND);
    let old = file.text().unwrap_or_default();
    let kept = ConfigFile::open(&file.kept(name))?;
    let new = if order.remove {
        removed(order, old, kept.text().unwrap_or_default())
    } else {
        added(order, file, files)
    };
    // A file that was not there before, and in which nothing is left, goes.
    let new = Some(new.map_err(in_file)?).filter(|new| !new.trim().is_empty() || kept.text().is_some());
    if file.text() == new.as_deref() || (file.text().is_none() && order.remove) {
        out!("{path} needs no change")?;
        return if order.remove || files.imports(file) { Ok(()) } else { verify(order, files) };
    }
    if order.dry_run {
        let diff = TextDiff::from_lines(old, new.as_deref().unwrap_or_default());
        let patch = diff.unified_diff().header(&format!("a{path}"), &format!("b{path}")).to_string();
        output::write(patch.as_bytes())?;
        return Ok(());
    }
    if !order.remove && !has(order, old).map_err(in_file)? {
        file.keep(name)?;
    }
    file.replace(new.as_deref())?;
    if order.remove {
        file.forget(name)?;
    } else if files.imports(file) {
        // The runtime is in the drop-in, which is written next.
        return out!("{path} is written; it imports the drop-in");
    } else if let Err(error) = verify(order, files) {
        file.replace(file.text())?;
        if kept.text().is_none() {
            file.forget(name)?;
        }
        return Err(error.cause(format!("{path} is unchanged")));
    }
    out!("{path} is {}; {}", if new.is_some() { "written" } else { "removed" }, next(order))?;
    Ok(())
}

/// Whether the engine was told already: then what the file was before is known, or there was none.
fn has(order: &Order, text: &str) -> Result<bool> {
    match order.engine {
        _ if order.hook => Ok(oci_hook::is_prestart(text)),
        Engine::Docker => docker::has(text, &order.wanted),
        Engine::Containerd => containerd::has(text, &order.wanted),
        Engine::Crio => crio::has(text, &order.wanted),
        Engine::Podman => podman::has(text, &order.wanted),
    }
}

/// Checks the file with the installed containerd, if any.
fn verify(order: &Order, files: &Files) -> Result<()> {
    let Some((containerd, root)) = files.containerd.as_ref().zip(files.root.as_ref()) else { return Ok(()) };
    if order.dry_run { Ok(()) } else { containerd.verify(root, &order.wanted) }
}

fn added(order: &Order, file: &ConfigFile, files: &Files) -> Result<String> {
    let (wanted, text) = (&order.wanted, file.text().unwrap_or_default());
    if let Some((_, pattern)) = files.import.as_ref().filter(|_| files.imports(file)) {
        return containerd::import(text, pattern, files.layout.version.unwrap_or(2));
    }
    match order.engine {
        _ if order.hook => Ok(oci_hook::prestart(Path::new(&wanted.path))),
        Engine::Docker => docker::add(text, wanted),
        Engine::Containerd => containerd::add(text, &files.read, files.layout, wanted),
        Engine::Crio => crio::add(text, &files.read, wanted),
        Engine::Podman => podman::add(text, wanted),
    }
}

fn removed(order: &Order, text: &str, before: &str) -> Result<String> {
    let wanted = &order.wanted;
    match order.engine {
        _ if order.hook && (text.is_empty() || oci_hook::is_prestart(text)) => Ok(before.to_owned()),
        _ if order.hook => Err(Error::new(Code::Config, "it is not as gpurun wrote it")
            .fix("move it out of hooks.d yourself, with `mv`")),
        Engine::Docker => docker::remove(text, before, wanted),
        Engine::Containerd => containerd::remove(text, before, wanted),
        Engine::Crio => crio::remove(text, before, wanted),
        Engine::Podman => podman::remove(text, before, wanted),
    }
}

/// The files of an engine.
#[derive(Debug)]
struct Files {
    /// Files to change.
    change: Vec<ConfigFile>,
    /// Texts of the other files that the engine reads first, in reading order.
    read: Vec<String>,
    /// Layout of containerd's tables.
    layout: containerd::Layout,
    /// containerd's main file, which imports all others.
    root: Option<PathBuf>,
    /// A main file of containerd that does not import the drop-in yet, and the pattern that does.
    import: Option<(PathBuf, String)>,
    /// The installed containerd.
    containerd: Option<Containerd>,
}

impl Files {
    fn of(change: Vec<ConfigFile>, read: Vec<String>) -> Self {
        let layout = containerd::Layout { version: None, whole_table: false };
        Self { change, read, layout, root: None, import: None, containerd: None }
    }

    /// Whether this is the main file that gets only an import.
    fn imports(&self, file: &ConfigFile) -> bool {
        self.import.as_ref().is_some_and(|(main, _)| main == file.path())
    }
}

fn files(order: &Order) -> Result<Files> {
    let path = order.file.clone().map_or_else(|| usual_file(order), Ok)?;
    match order.engine {
        _ if order.hook => Ok(Files::of(vec![ConfigFile::open(&path)?], Vec::new())),
        Engine::Containerd => containerd_files(order, &path),
        Engine::Crio => {
            let read = crio_files(&path, order.source.as_deref())?;
            Ok(Files::of(vec![ConfigFile::open(&path)?], read))
        }
        Engine::Podman => Ok(Files::of(vec![ConfigFile::open(&path)?], podman_files(&path)?)),
        Engine::Docker => Ok(Files::of(vec![ConfigFile::open(&path)?], Vec::new())),
    }
}

fn usual_file(order: &Order) -> Result<PathBuf> {
    let name = &order.wanted.name;
    let root = rustix::process::geteuid().is_root();
    // Docker and Podman of an ordinary user read files of the user's own.
    let dir = |of_root: &str| -> Result<PathBuf> {
        let below_home = || own_directory::home(Purpose::Write).map(|home| home.join(".config"));
        let users = || own_directory::named_by("XDG_CONFIG_HOME", Purpose::Write).or_else(below_home);
        let dir = if root { Some("/etc".into()) } else { users() };
        dir.map(|dir| dir.join(of_root)).ok_or_else(|| {
            Error::new(Code::Usage, "it is not known where the engine's configuration is: HOME is not set")
                .fix("name it with --file")
        })
    };
    Ok(match order.engine {
        _ if order.hook => Path::new(HOOKS_DIR).join(format!("{name}.json")),
        Engine::Docker => dir("docker/daemon.json")?,
        Engine::Containerd => "/etc/containerd/config.toml".into(),
        Engine::Crio => format!("/etc/crio/crio.conf.d/99-{name}.conf").into(),
        Engine::Podman => dir("containers/containers.conf.d")?.join(format!("99-{name}.conf")),
    })
}

/// Of the main file and those that it imports, the last with a table of the CRI plugin's: that table is the one that counts
/// before containerd 2.1, and one of those that do since. The main file where none has one. To take the runtime out: all that
/// have it, since other tools copy the table. A drop-in that was named is changed itself.
fn containerd_files(order: &Order, named: &Path) -> Result<Files> {
    let installed = Containerd::find();
    let main = order.source.clone().or_else(|| main_of_drop_in(named));
    let mut files = vec![ConfigFile::open(main.as_deref().unwrap_or(named))?];
    let (mut at, mut chosen) = (0, 0);
    while let Some(file) = files.get(at) {
        let text = file.text().unwrap_or_default();
        let in_file =
            |error: Error| error.context(format!("{} cannot be used", file.path().display())).fix(MEND);
        if containerd::has_plugin(text).map_err(in_file)? {
            chosen = at;
        }
        let dir = file.path().parent().unwrap_or(Path::new("/")).to_owned();
        for pattern in containerd::imports(text).map_err(in_file)? {
            for path in matching(&dir.join(pattern))? {
                let imported = ConfigFile::open(&path)?;
                if imported.text().is_some() && files.iter().all(|file| file.path() != imported.path()) {
                    files.push(imported);
                }
            }
        }
        at += 1;
    }
    let mut layout = containerd::Layout { version: None, whole_table: false };
    if main.is_some() {
        let drop_in = ConfigFile::open(named)?;
        files.retain(|file| file.path() != drop_in.path());
        chosen = files.len();
        let text = files.first().and_then(ConfigFile::text).unwrap_or_default();
        let version = containerd::version(text)?.or_else(|| version_of_directory(named));
        layout.version = Some(version.unwrap_or(2));
        let replaces =
            installed.as_ref().and_then(Containerd::version).is_some_and(|version| version < (2, 1));
        layout.whole_table = replaces;
        files.push(drop_in);
    }
    let root = Some(files[0].path().to_owned()).filter(|_| main.is_none() || files[0].text().is_some());
    if order.remove {
        let has =
            |file: &ConfigFile| file.text().is_some_and(|text| containerd::has_name(text, &order.wanted));
        if main.is_some() {
            files.drain(..chosen);
        } else if files.iter().any(has) {
            files.retain(has);
        } else {
            files.truncate(1);
        }
        return Ok(Files::of(files, Vec::new()));
    }
    let file = files.remove(chosen);
    let mut change = vec![file];
    let mut import = None;
    if order.source.is_some()
        && let Some(main) = files.first()
        && !imports_file(main, named)?
    {
        let directory = named.parent().unwrap_or(Path::new("/"));
        import = Some((main.path().to_owned(), directory.join("*.toml").display().to_string()));
        change.insert(0, ConfigFile::open(main.path())?);
    }
    if chosen > 0 && main.is_none() {
        // An imported file must have the version of the main file.
        layout.version = files.first().and_then(|main| containerd::version(main.text()?).ok().flatten());
    }
    let read = files.iter().filter_map(|file| file.text().map(str::to_owned)).collect();
    // The main file is there once it imports the drop-in.
    let root = root.or_else(|| import.as_ref().map(|(main, _)| main.clone()));
    Ok(Files { root, containerd: installed, layout, import, ..Files::of(change, read) })
}

/// Whether containerd's main file imports this file, which may be absent.
fn imports_file(main: &ConfigFile, file: &Path) -> Result<bool> {
    let directory = main.path().parent().unwrap_or(Path::new("/"));
    let patterns = containerd::imports(main.text().unwrap_or_default())?;
    let is_match = |pattern: String| {
        let pattern = directory.join(pattern).to_string_lossy().into_owned();
        glob::Pattern::new(&pattern).is_ok_and(|pattern| pattern.matches_path(file))
    };
    Ok(patterns.into_iter().any(is_match))
}

/// The main file of a drop-in, by the usual layout: /etc/containerd/config.toml and conf.d, or config.toml and
/// config-v3.toml.d side by side, as in k3s and RKE2. `None` if the path is not a drop-in.
fn main_of_drop_in(path: &Path) -> Option<PathBuf> {
    Some(drop_ins_of(path)?.with_file_name("config.toml"))
}

/// k3s writes a main file of version N from the template config-vN.toml.tmpl; without a number it is version 2.
fn version_of_directory(drop_in: &Path) -> Option<i64> {
    let name = drop_in.parent()?.file_name()?.to_str()?;
    match name.strip_prefix("config-v").and_then(|rest| rest.strip_suffix(".toml.d")) {
        Some(number) => number.parse().ok(),
        None => (name == "config.toml.d").then_some(2),
    }
}

/// CRI-O reads crio.conf, and then the drop-ins in their order.
fn crio_files(drop_in: &Path, main: Option<&Path>) -> Result<Vec<String>> {
    let beside = || drop_ins_of(drop_in).map(|dir| dir.with_extension(""));
    let mut paths: Vec<PathBuf> = main.map(Path::to_owned).or_else(beside).into_iter().collect();
    paths.extend(drop_ins(drop_in)?);
    texts(&paths, drop_in)
}

/// The directory, if it is a drop-in directory.
fn drop_ins_of(file: &Path) -> Option<&Path> {
    file.parent().filter(|dir| dir.extension().is_some_and(|ending| ending == "d"))
}

/// The files beside a drop-in, in order.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>> {
    drop_ins_of(file).map_or_else(|| Ok(Vec::new()), |dir| matching(&dir.join("*")))
}

fn texts(paths: &[PathBuf], without: &Path) -> Result<Vec<String>> {
    let others = paths.iter().filter(|path| path.as_path() != without && path.is_file());
    others.map(|path| Ok(ConfigFile::open(path)?.text().unwrap_or_default().to_owned())).collect()
}

/// Podman reads the containers.conf of the distribution, that of the host, and then the drop-ins in order.
fn podman_files(drop_in: &Path) -> Result<Vec<String>> {
    let mut paths = vec![PathBuf::from("/usr/share/containers/containers.conf")];
    paths.extend(drop_ins_of(drop_in).map(|dir| dir.with_extension("")));
    paths.extend(drop_ins(drop_in)?);
    texts(&paths, drop_in)
}

/// The files of a pattern with one `*` in the last name at most, in order.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let unknown = || {
        Error::new(Code::Config, format!("the files of {} cannot be found", pattern.display()))
            .fix("name the file that is to be changed with --file")
    };
    let (dir, name) =
        pattern.parent().zip(pattern.file_name().and_then(|name| name.to_str())).ok_or_else(unknown)?;
    let wild = |text: &str| text.contains(['*', '?', '[', '\\']);
    let (start, end) = name.split_once('*').unwrap_or((name, ""));
    if wild(start) || wild(end) || dir.to_str().is_none_or(wild) {
        return Err(unknown());
    }
    if !name.contains('*') {
        return Ok(vec![pattern.into()]);
    }
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(Vec::new()) };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        })
        .collect();
    names.sort_unstable();
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// What the engine needs to see it.
fn next(order: &Order) -> &'static str {
    match order.engine {
        Engine::Podman => "Podman reads it at its next start of a container",
        // Only rootless Docker reads the user's own file.
        Engine::Docker if !rustix::process::geteuid().is_root() && order.file.is_none() => {
            "next, for rootless Docker: systemctl --user restart docker; for the system's: sudo gpurun configure docker"
        }
        // Runtimes are read again on SIGHUP; the CDI switch is not.
        Engine::Docker if !order.wanted.cdi => "next: systemctl reload docker",
        Engine::Docker => "next: systemctl restart docker",
        Engine::Containerd => "next: systemctl restart containerd",
        Engine::Crio => "next: systemctl restart crio",
    }
}

/// Whether a runtime's program is the one that we would name, wherever it lies: what an engine was told by hand or by an earlier
/// version is replaced.
fn is_ours(path: &str, wanted: &Registration) -> bool {
    Path::new(path).file_name() == Path::new(&wanted.path).file_name()
}

#[cfg(test)]
impl Registration {
    /// A runtime as `gpurun configure` registers it.
    fn of(name: &str) -> Self {
        Self { name: name.into(), path: "/usr/local/bin/gpurun-runtime".into(), default: false, cdi: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_directories_of_drop_ins() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.toml", "a.toml", "a.conf", ".toml"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names = |pattern: &str| -> Option<Vec<String>> {
            let found = matching(&dir.path().join(pattern)).ok()?;
            Some(found.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect())
        };
        assert_eq!(names("*.toml").unwrap(), [".toml", "a.toml", "b.toml"]);
        assert_eq!(names("a*").unwrap(), ["a.conf", "a.toml"]);
        assert_eq!(names("x.toml").unwrap(), ["x.toml"]);
        assert!(matching(Path::new("/no/such/dir/*.toml")).unwrap().is_empty());
        for unknown in ["*.*", "[ab].toml", "?.toml", "a\\*"] {
            assert_eq!(names(unknown), None, "{unknown}");
        }
        assert!(matching(Path::new("/etc/*/x.toml")).is_err());
    }
}
