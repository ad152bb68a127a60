//! `gpurun configure`: tells an engine of gpurun, in the engine's own configuration, and takes it out again.
//!
//! One file an engine, of functions from text to text; what is read and written is here.

mod containerd;
mod crio;
mod docker;
mod podman;

use crate::{
    apply::config_file::ConfigFile,
    cli::{Configure, Engine},
    error::{Code, Error, OrFail, Result},
    formats::oci_hook,
    out, output,
};
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
    let own = std::env::current_exe().or_fail(Code::Internal, || "/proc/self/exe cannot be read")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = own
        .parent()
        .map(Path::to_owned)
        .into_iter()
        .chain(std::env::split_paths(&path).filter(|dir| dir.is_absolute()));
    let runs = |file: &PathBuf| {
        file.metadata().is_ok_and(|stat| stat.is_file() && stat.permissions().mode() & 0o111 != 0)
    };
    dirs.map(|dir| dir.join(name)).find(runs).ok_or_else(|| {
        Error::new(Code::Usage, format!("{name} was not found"))
            .cause(format!("it is neither beside {} nor in PATH", own.display()))
            .fix("install it, or name it with --path")
    })
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
    let (files, read) = files(order)?;
    for file in files {
        change(order, &file, &read)?;
    }
    Ok(0)
}

/// Nothing is written before the file is understood.
const MEND: &str = "mend the file, or name another one; it is as it was";

fn change(order: &Order, file: &ConfigFile, read: &[String]) -> Result<()> {
    let name = &order.wanted.name;
    let path = file.path().display();
    let in_file = |error: Error| error.context(format!("{path} cannot be used")).fix(MEND);
    let old = file.text().unwrap_or_default();
    let kept = ConfigFile::open(&file.kept(name))?;
    let new = if order.remove {
        removed(order, old, kept.text().unwrap_or_default())
    } else {
        added(order, old, read)
    };
    // A file that was not there before, and in which nothing is left, goes.
    let new = Some(new.map_err(in_file)?).filter(|new| !new.trim().is_empty() || kept.text().is_some());
    if file.text() == new.as_deref() || (file.text().is_none() && order.remove) {
        out!("{path} needs no change")?;
        return Ok(());
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

fn added(order: &Order, text: &str, read: &[String]) -> Result<String> {
    let wanted = &order.wanted;
    match order.engine {
        _ if order.hook => Ok(oci_hook::prestart(Path::new(&wanted.path))),
        Engine::Docker => docker::add(text, wanted),
        Engine::Containerd => containerd::add(text, read, wanted),
        Engine::Crio => crio::add(text, read, wanted),
        Engine::Podman => podman::add(text, wanted),
    }
}

fn removed(order: &Order, text: &str, before: &str) -> Result<String> {
    let wanted = &order.wanted;
    match order.engine {
        _ if order.hook && (text.is_empty() || oci_hook::is_prestart(text)) => Ok(before.to_owned()),
        _ if order.hook => {
            Err(Error::new(Code::Config, "it is not as gpurun wrote it").fix("remove it by hand"))
        }
        Engine::Docker => docker::remove(text, before, wanted),
        Engine::Containerd => containerd::remove(text, before, wanted),
        Engine::Crio => crio::remove(text, before, wanted),
        Engine::Podman => podman::remove(text, before, wanted),
    }
}

/// The files to be changed, and the text of others that say what they build on, in the order in which the engine reads them.
fn files(order: &Order) -> Result<(Vec<ConfigFile>, Vec<String>)> {
    let path = order.file.clone().map_or_else(|| usual_file(order), Ok)?;
    match order.engine {
        _ if order.hook => Ok((vec![ConfigFile::open(&path)?], Vec::new())),
        Engine::Containerd => containerd_files(order, &path),
        Engine::Crio => Ok((vec![ConfigFile::open(&path)?], crio_files(&path)?)),
        Engine::Docker | Engine::Podman => Ok((vec![ConfigFile::open(&path)?], Vec::new())),
    }
}

fn usual_file(order: &Order) -> Result<PathBuf> {
    let name = &order.wanted.name;
    let root = rustix::process::geteuid().is_root();
    // Docker and Podman of an ordinary user read files of the user's own.
    let dir = |of_root: &str| -> Result<PathBuf> {
        let named = |key| std::env::var_os(key).map(PathBuf::from).filter(|dir: &PathBuf| dir.is_absolute());
        let users = || named("XDG_CONFIG_HOME").or_else(|| Some(named("HOME")?.join(".config")));
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
/// have it, since other tools copy the table.
fn containerd_files(order: &Order, main: &Path) -> Result<(Vec<ConfigFile>, Vec<String>)> {
    let mut files = vec![ConfigFile::open(main)?];
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
    if order.remove {
        let has =
            |file: &ConfigFile| file.text().is_some_and(|text| containerd::has_name(text, &order.wanted));
        if files.iter().any(has) {
            files.retain(has);
        } else {
            files.truncate(1);
        }
        return Ok((files, Vec::new()));
    }
    let file = files.remove(chosen);
    Ok((vec![file], files.iter().filter_map(|file| file.text().map(str::to_owned)).collect()))
}

/// CRI-O reads crio.conf, and then the drop-ins in their order.
fn crio_files(drop_in: &Path) -> Result<Vec<String>> {
    let Some(dir) = drop_in.parent().filter(|dir| dir.extension().is_some_and(|ending| ending == "d")) else {
        return Ok(Vec::new());
    };
    let mut paths = vec![dir.with_extension("")];
    paths.extend(matching(&dir.join("*"))?);
    paths
        .iter()
        .filter(|path| path.as_path() != drop_in && path.is_file())
        .map(|path| Ok(ConfigFile::open(path)?.text().unwrap_or_default().to_owned()))
        .collect()
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
