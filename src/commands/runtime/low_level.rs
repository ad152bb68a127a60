//! The low-level runtime below gpurun-runtime: runc, crun, or what the engine uses without gpurun.

use crate::{
    config::{
        Config,
        engines::{ContainerEngine, EngineRuntimes},
    },
    error::{Code, Error, Result},
};
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The runtimes to try if neither the configuration nor the engine names one.
const RUNTIMES: [&str; 2] = ["runc", "crun"];
/// Directories to search after PATH: engines start their runtimes with any PATH, or without one.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The path of the first existing runtime of the configured `runtimes`. Without that key: the runtime that `gpurun configure`
/// recorded for the engine with this state directory, then runc and crun, then the records of other engines.
///
/// # Errors
/// [`Code::NoRuntime`] if none of them exists.
pub fn find(config: &Config, engines: &EngineRuntimes, root: Option<&Path>) -> Result<PathBuf> {
    let names = candidates(config, engines, root);
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A relative entry would be a directory that the container's user controls.
    let directories: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(std::env::split_paths(PATH))
        .filter(|dir| dir.is_absolute())
        .collect();
    let own = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let own = [Path::new("/proc/self/exe"), &own.with_file_name("gpurun-runtime")].map(identity);
    let is_runtime = |path: &PathBuf| {
        // A wrapper named runc would call itself forever.
        identity(path).is_some_and(|identity| !own.contains(&Some(identity)))
            && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
    };
    let mut paths = names.iter().flat_map(|name| {
        let absolute = name.is_absolute().then(|| name.clone());
        let is_name = name.components().count() == 1 && !name.is_absolute();
        let in_path = directories.iter().filter(move |_| is_name).map(move |directory| directory.join(name));
        absolute.into_iter().chain(in_path)
    });
    paths.find(is_runtime).ok_or_else(|| {
        let names: Vec<_> = names.iter().map(|name| name.display().to_string()).collect();
        Error::new(Code::NoRuntime, format!("none of the low-level runtimes {} is there", names.join(", ")))
            .cause(format!("names are looked for in {}:{PATH}", path.to_string_lossy()))
            .fix("install runc or crun, or name another by its path: runtimes = [\"/usr/bin/runc\"] in gpurun's configuration")
    })
}

fn candidates(config: &Config, engines: &EngineRuntimes, root: Option<&Path>) -> Vec<PathBuf> {
    // NVIDIA's config.toml spells the default out.
    if let Some(names) = config.runtimes.as_ref().filter(|names| **names != RUNTIMES) {
        return names.iter().map(PathBuf::from).collect();
    }
    let noted = engines.of(ContainerEngine::of_state_directory(root));
    let mut names: Vec<PathBuf> =
        noted.into_iter().chain(RUNTIMES.map(Path::new)).map(Path::to_owned).collect();
    names.extend(engines.all().filter(|path| Some(*path) != noted).map(Path::to_owned));
    names
}

/// Device and inode of a regular file, links followed.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|file| (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(runtimes: &[&str]) -> Config {
        Config { runtimes: Some(runtimes.iter().map(ToString::to_string).collect()), ..Config::default() }
    }

    #[test]
    fn the_first_runtime_that_is_there_and_not_ourselves() {
        let own = std::fs::canonicalize("/proc/self/exe").unwrap();
        let own = own.to_str().unwrap();
        for (names, found) in [
            (&["/bin/sh"][..], Some("/bin/sh")),
            (&["/nowhere/runc", "/etc", "/etc/passwd", "/bin/sh"], Some("/bin/sh")),
            (&[own, "/proc/self/exe", "/bin/sh"], Some("/bin/sh")),
            (&["bin/sh", "../bin/sh", "", "."], None),
        ] {
            assert_eq!(
                find(&config(names), &EngineRuntimes::default(), None).ok().as_deref(),
                found.map(Path::new),
                "{names:?}"
            );
        }
        assert!(find(&config(&["sh"]), &EngineRuntimes::default(), None).unwrap().ends_with("sh"), "by name");
        let error = find(&config(&["no-such-runtime"]), &EngineRuntimes::default(), None).unwrap_err();
        assert!(error.what().contains("no-such-runtime"), "{error}");
    }

    #[test]
    fn the_engines_own_runtime_comes_before_runc_and_crun_and_after_the_administrators() {
        let mut engines = EngineRuntimes::default();
        engines.set(ContainerEngine::Crio, Some("/usr/libexec/crio/crun".into()));
        engines.set(ContainerEngine::Docker, Some("/opt/crun".into()));
        let names = |runtimes: Option<&[&str]>, root: Option<&str>| {
            let config = runtimes.map_or_else(Config::default, config);
            candidates(&config, &engines, root.map(Path::new))
        };
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(
            names(None, Some("/run/crun")),
            paths(&["/usr/libexec/crio/crun", "runc", "crun", "/opt/crun"])
        );
        let nvidias_default = ["runc", "crun"];
        assert_eq!(
            names(Some(&nvidias_default), Some("/run/docker/runtime-x/moby")),
            paths(&["/opt/crun", "runc", "crun", "/usr/libexec/crio/crun"])
        );
        assert_eq!(names(None, None), paths(&["runc", "crun", "/opt/crun", "/usr/libexec/crio/crun"]));
        assert_eq!(names(Some(&["youki"]), Some("/run/crun")), paths(&["youki"]));
    }
}
