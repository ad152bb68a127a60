//! Records which low-level runtime creates the containers of an engine, so that `sys/freestanding/runtime.rs` can start and delete
//! them without gpurun. That program documents the file.

use crate::{
    apply::whole_file,
    commands::engine::in_user_namespace,
    error::{Code, Result},
};
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

/// More engines than a machine has. The program reads 16 KiB.
const ENGINES: usize = 32;

/// Records the runtime for a `--root`. Only root has such a file.
///
/// # Errors
/// [`Code::NoRuntime`] if another runtime is recorded, and the file can be neither replaced nor removed.
pub fn keep(state_dir: &Path, root: Option<&Path>, runtime: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() || in_user_namespace() {
        return Ok(());
    }
    let path = path(state_dir);
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    let Some(content) = with(&known, root.unwrap_or(Path::new("")), runtime) else {
        return Ok(());
    };
    let Err(error) = whole_file::write(&path, &content, Code::NoRuntime) else { return Ok(()) };
    tracing::debug!(%error, "gpurun-runtime takes longer without its record");
    whole_file::remove(&path, Code::NoRuntime).map(drop)
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("low-level-runtimes")
}

/// The new content of the file; `None` if it is as it should be.
fn with(known: &str, root: &Path, runtime: &Path) -> Option<String> {
    let text = |path: &Path| path.to_str().filter(|text| !text.contains(['\t', '\n'])).map(str::to_owned);
    let of_root =
        |line: &&str| line.split_once('\t').is_some_and(|(key, _)| OsStr::new(key) == root.as_os_str());
    let line = text(root).zip(text(runtime)).map(|(root, runtime)| format!("{root}\t{runtime}"));
    let mut others: Vec<&str> = known.lines().filter(|line| !of_root(line)).collect();
    let current: Vec<&str> = known.lines().filter(of_root).collect();
    if current == line.as_deref().into_iter().collect::<Vec<_>>() {
        return None;
    }
    others.drain(..others.len().saturating_sub(ENGINES - 1));
    let lines = others.into_iter().chain(line.as_deref());
    Some(lines.fold(String::new(), |content, line| content + line + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_root_has_one_line() {
        let with = |known: &str, root: &str, runtime: &str| with(known, Path::new(root), Path::new(runtime));
        assert_eq!(with("", "/run/a", "/bin/runc").as_deref(), Some("/run/a\t/bin/runc\n"));
        assert_eq!(with("/run/a\t/bin/runc\n", "/run/a", "/bin/runc"), None);
        assert_eq!(
            with("/run/a\t/bin/runc\n", "/run/a", "/bin/crun").as_deref(),
            Some("/run/a\t/bin/crun\n"),
            "it is replaced"
        );
        assert_eq!(
            with("/run/a\t/bin/runc\n", "", "/bin/crun").as_deref(),
            Some("/run/a\t/bin/runc\n\t/bin/crun\n"),
            "without --root"
        );
        assert_eq!(with("", "/run/\n", "/bin/runc"), None, "what has no line is not recorded");
        assert_eq!(
            with("/run/a\t/x\n", "/run/a", "/bin/\n").as_deref(),
            Some(""),
            "nor does an old line stay"
        );
        let many = (0..100).fold(String::new(), |known, n| with(&known, &format!("/{n}"), "/r").unwrap());
        assert_eq!((many.lines().count(), many.lines().last()), (ENGINES, Some("/99\t/r")));
    }
}
