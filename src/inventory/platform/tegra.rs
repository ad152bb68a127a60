//! Linux for Tegra (Jetson): what a container gets is listed in files of the platform's own, a line for each path (libnvidia-container,
//! branch jetson, design/mount_plugins.md).

use super::{PlatformDriver, Search, is_plain};
use crate::{
    error::{Code, Error, Result},
    inventory::types::{Gpu, Host},
};
use std::path::{Component, Path, PathBuf};

/// Says which release of Linux for Tegra it is; containers look for it.
pub const RELEASE: &str = "/etc/nv_tegra_release";

/// The lists of the base system. Others in their directory are of JetPack's, and were for images that lack CUDA.
pub const FILES: [&str; 3] = [
    "/etc/nvidia-container-runtime/host-files-for-container.d/devices.csv",
    "/etc/nvidia-container-runtime/host-files-for-container.d/drivers.csv",
    // Gone since release 36.
    "/etc/nvidia-container-runtime/host-files-for-container.d/l4t.csv",
];

/// The longest seen has 20 kB.
const LIMIT: u64 = 1 << 20;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `dev`: a device node.
    Device,
    /// `dir`: a directory.
    Directory,
    /// `lib`: a file.
    File,
    /// `sym`: a link, and what it leads to.
    Link,
}

/// A line.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is about.
    pub kind: Kind,
    /// Absolute, without `.` and `..`.
    pub path: PathBuf,
}

/// Reads the lines of a list: those that say something, and what is wrong with those that cannot be understood.
pub fn parse(text: &str) -> impl Iterator<Item = std::result::Result<Entry, String>> {
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).enumerate();
    let said = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    said.map(|(number, line)| entry(line).map_err(|what| format!("line {}: {what}", number + 1)))
}

fn entry(line: &str) -> std::result::Result<Entry, String> {
    let (kind, path) = line.split_once(',').ok_or_else(|| format!("{line:?} is not TYPE, PATH"))?;
    let kind = match kind.trim() {
        "dev" => Kind::Device,
        "dir" => Kind::Directory,
        "lib" => Kind::File,
        "sym" => Kind::Link,
        other => return Err(format!("the type {other:?} is none of dev, dir, lib and sym")),
    };
    let typed = path.trim();
    let path = Path::new(typed);
    let is_name = |part: &Component<'_>| matches!(part, Component::Normal(_));
    let mut parts = path.components();
    if parts.next() != Some(Component::RootDir)
        || parts.clone().next().is_none()
        || !parts.all(|part| is_name(&part))
        || !is_plain(path)
    {
        return Err(format!("{typed:?} is not an absolute path below /"));
    }
    Ok(Entry { kind, path: path.components().collect() })
}

/// Whether a GPU that NVML knows is a Tegra's own, of which NVML knows little: `Orin (nvgpu)`, `NVIDIA Thor` (go-nvlib,
/// `HasOnlyIntegratedGPUs`).
pub fn has(gpu: &Gpu) -> bool {
    gpu.name.contains("(nvgpu)") || gpu.name.contains("NVIDIA Thor")
}

/// Finds what these lists name, or if there are none, those of [`FILES`] that are there; `ignored` are links that are not wanted.
///
/// # Errors
/// [`Code::Cdi`] if no list is there, or none names a device node of this host.
pub fn find(host: &Host, named: &[PathBuf], ignored: &[LinkPattern]) -> Result<PlatformDriver> {
    let mut search = Search::new(host)?;
    let mut entries = Vec::new();
    let own = FILES.iter().map(PathBuf::from).filter(|list| search.root.find(list).is_some());
    let lists = if named.is_empty() { own.collect() } else { named.to_vec() };
    for list in &lists {
        let Some(bytes) = search.root.read(list, LIMIT) else {
            search.missing(list);
            continue;
        };
        for line in parse(&String::from_utf8_lossy(&bytes)) {
            match line {
                Ok(entry) => entries.push(entry),
                Err(what) => search.driver.warnings.push(format!("{}, {what}", list.display())),
            }
        }
    }
    let is_ignored =
        |entry: &Entry| entry.kind == Kind::Link && ignored.iter().any(|one| one.matches(&entry.path));
    entries.retain(|entry| !is_ignored(entry));
    for entry in &entries {
        match entry.kind {
            Kind::Device => search.node(&entry.path),
            Kind::Directory => search.directory(&entry.path),
            Kind::File | Kind::Link => search.file(&entry.path),
        }
    }
    if search.driver.nodes.is_empty() {
        let warnings = &search.driver.warnings;
        return Err(Error::new(Code::Cdi, "the lists of Tegra's files name no device node of this host")
            .cause(match warnings.first() {
                None => format!("there is no {}", FILES.join(", no ")),
                Some(first) => format!("{first}; {} others", warnings.len() - 1),
            })
            .fix("on a Jetson install the package: apt-get install nvidia-l4t-init; elsewhere leave out --mode csv"));
    }
    if search.root.find(Path::new(RELEASE)).is_some() {
        search.file(Path::new(RELEASE));
    }
    Ok(search.finish())
}

/// `**/NAME` is a name in any directory, anything else a whole path; `*` and `?` match within one name.
#[derive(Debug, Clone)]
pub struct LinkPattern {
    pattern: glob::Pattern,
    name_alone: bool,
}

impl std::str::FromStr for LinkPattern {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let name = text.strip_prefix("**/");
        let pattern =
            glob::Pattern::new(name.unwrap_or(text)).map_err(|error| format!("{text:?}: {error}"))?;
        Ok(Self { pattern, name_alone: name.is_some() })
    }
}

impl LinkPattern {
    fn matches(&self, path: &Path) -> bool {
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
        let matched = if self.name_alone { path.file_name().map(Path::new) } else { Some(path) };
        matched.is_some_and(|matched| self.pattern.matches_path_with(matched, options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_line_by_line() {
        let text = "\u{feff}dev, /dev/nvhost-ctrl\r\n\n# comment\n  lib ,  /usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1  \n\
                    sym,/usr/lib/./libcuda.so\ndir, /usr/share/a b, c/\n";
        let read: Vec<_> = parse(text).map(Result::unwrap).map(|entry| (entry.kind, entry.path)).collect();
        let path = |text: &str| PathBuf::from(text);
        assert_eq!(
            read,
            [
                (Kind::Device, path("/dev/nvhost-ctrl")),
                (Kind::File, path("/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1")),
                (Kind::Link, path("/usr/lib/libcuda.so")),
                (Kind::Directory, path("/usr/share/a b, c")),
            ]
        );
        assert_eq!(read[2].1.as_os_str(), "/usr/lib/libcuda.so");
    }

    #[test]
    fn a_line_that_cannot_be_one_is_named_and_costs_no_other() {
        for line in [
            "lib",
            "lib /usr/lib/libcuda.so",
            ",",
            "lib,",
            ", /dev/null",
            "blk, /dev/sda",
            "LIB, /a",
            "lib, usr/lib/libcuda.so",
            "dir, /",
            "dir, /.",
            "dir, /usr/..",
            "lib, /usr/lib/../../etc/shadow",
            "sym, /usr/lib/a::/etc/passwd",
            "lib, /usr/lib/a\u{7}b",
            "lib, /usr/lib/a\0b",
        ] {
            let text = format!("dev, /dev/a\n{line}\ndev, /dev/b\n");
            let read: Vec<_> = parse(&text).collect();
            assert_eq!(read.len(), 3, "{line:?}");
            assert!(read[0].is_ok() && read[2].is_ok(), "{line:?}");
            let what = read[1].as_ref().unwrap_err();
            assert!(what.starts_with("line 2: "), "{line:?}: {what}");
        }
        assert_eq!(parse("").count() + parse("\n \r\n#\n").count(), 0);
    }

    #[test]
    fn links_are_ignored_by_name_or_by_path() {
        let matches =
            |pattern: &str, path: &str| pattern.parse::<LinkPattern>().unwrap().matches(Path::new(path));
        assert!(matches("**/*.so", "/usr/lib/libcuda.so"));
        assert!(!matches("**/*.so", "/usr/lib/libcuda.so.1"));
        assert!(matches("**/*.so.[0-9]", "/usr/lib/libcuda.so.1"));
        assert!(matches("/usr/lib/*.so", "/usr/lib/libcuda.so"));
        assert!(!matches("/usr/*.so", "/usr/lib/libcuda.so"), "no star goes over a slash");
        assert!(!matches("*.so", "/usr/lib/libcuda.so"));
        assert!("[".parse::<LinkPattern>().is_err());
    }
}
