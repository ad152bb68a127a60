//! Records the low-level runtime that an engine uses without gpurun (see `config::engines`).

use super::{Order, containerd, crio, docker, podman};
use crate::{
    apply::config_file::ConfigFile,
    cli::Engine,
    config::engines::{ContainerEngine, EngineRuntimes},
    error::Result,
    out, output,
};
use similar::TextDiff;
use std::path::{Path, PathBuf};

/// The directories in which the runtime looks up names.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Records the low-level runtime of the engine's effective configuration, or removes the record. `texts` are the engine's
/// files in reading order. Each is preceded by its text before gpurun was added, because the default may be gpurun by now.
pub fn note(order: &Order, texts: &[&str]) -> Result<()> {
    let engine = match order.engine {
        _ if order.hook => return Ok(()),
        Engine::Docker => ContainerEngine::Docker,
        Engine::Containerd => ContainerEngine::Containerd,
        Engine::Crio => ContainerEngine::Crio,
        Engine::Podman => ContainerEngine::Podman,
    };
    let runtime = if order.remove { None } else { effective(order, texts) };
    let old = EngineRuntimes::load()?;
    if runtime.as_deref() == old.of(engine) {
        return Ok(());
    }
    let mut new = old;
    new.set(engine, runtime.clone());
    let path = EngineRuntimes::file();
    if !rustix::process::geteuid().is_root() {
        // Only the administrator can write the file, which rootless engines share.
        if let Some(runtime) = runtime.filter(|_| is_in_path("runc")) {
            tracing::warn!(
                "gpurun hands over to runc, and this engine uses {0}: an administrator can set runtimes = [{0:?}] in /etc/gpurun/config.toml",
                runtime.display().to_string()
            );
        }
        return Ok(());
    }
    let file = ConfigFile::open(&path)?;
    let text = new.text();
    if order.dry_run {
        let (before, after) = (file.text().unwrap_or_default(), text.as_deref().unwrap_or_default());
        let (a, b) = (format!("a{}", path.display()), format!("b{}", path.display()));
        output::write(
            TextDiff::from_lines(before, after).unified_diff().header(&a, &b).to_string().as_bytes(),
        )?;
        return Ok(());
    }
    file.replace(text.as_deref())?;
    let path = path.display();
    match runtime {
        Some(runtime) => {
            let runtime = runtime.display();
            out!("{path} is written; gpurun hands over to {runtime}, as the engine does")?;
        }
        None => out!("{path} is written; gpurun hands over to runc or crun")?,
    }
    Ok(())
}

/// The runtime to record: any except runc in the usual directories, which is tried first anyway.
fn effective(order: &Order, texts: &[&str]) -> Option<PathBuf> {
    let wanted = &order.wanted;
    let runtime = match order.engine {
        Engine::Docker => docker::low_level(texts, wanted),
        Engine::Containerd => containerd::low_level(texts, wanted),
        Engine::Crio => crio::low_level(texts, wanted),
        Engine::Podman => podman::low_level(texts, wanted),
    };
    let runtime = PathBuf::from(runtime?);
    let is_runc = runtime.file_name().is_some_and(|name| name == "runc");
    let is_in_path = runtime
        .parent()
        .is_none_or(|dir| dir == Path::new("") || std::env::split_paths(PATH).any(|usual| usual == dir));
    Some(runtime).filter(|_| !(is_runc && is_in_path))
}

/// Whether a program is in one of the usual directories.
pub fn is_in_path(name: &str) -> bool {
    std::env::split_paths(PATH).any(|dir| super::is_executable(&dir.join(name)))
}
