//! Makes the container's dynamic loader find the driver's libraries, whatever the image is: glibc with or without a cache,
//! musl, or no loader at all.
//!
//! The image's own libraries keep their order: one directory that holds the driver's files alone is put in front, so
//! `ldconfig` and `apt install` in the container go on working and give the same result.

use super::rootfs::{Found, Layers};
use crate::{
    error::Result,
    formats::{cuda_compat, ldcache},
    inventory::ContainerPath,
    plan::{
        CachedLibrary, DRIVER_DIR, ForwardCompat, Injection, OTHER_DRIVER_DIR, Symlink, cuda, forward_compat,
    },
    vocabulary::Version,
};
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Small files and links that a container's loader needs.
#[derive(Debug, Default)]
pub struct Prepared {
    /// The loader's own files.
    pub files: Vec<SmallFile>,
    /// The injection's links and the loader's.
    pub symlinks: Vec<Symlink>,
    /// A link to each library in a directory that every loader of the image searches, for a container whose loader's cache
    /// cannot be written.
    pub without_cache: Vec<Symlink>,
}

/// A small file that gpurun writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallFile {
    /// Path in the container.
    pub path: PathBuf,
    /// Content of the file.
    pub content: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Whether the driver is not found without the file. If an optional file fails, the container starts anyway.
    pub is_needed: bool,
}

/// Sorts before any other file of the directory that packages put there, so that a later ldconfig finds these first.
const LD_SO_CONF: &str = "/etc/ld.so.conf.d/00-gpurun.conf";
/// glibc's list of libraries.
pub const LD_SO_CACHE: &str = "/etc/ld.so.cache";
/// A cache has about 100 bytes a library; the largest seen (a desktop) has 200 kB.
pub const MAX_CACHE: u64 = 16 << 20;
/// Where NVIDIA's images and packages put the newer driver libraries.
pub const COMPAT_DIR: &str = "/usr/local/cuda/compat";
/// How many files may lie there: packages put a dozen. Each may be a link that takes a thousand look-ups, which we would make as
/// root and not on the container's account.
const MAX_COMPAT: usize = 200;

#[cfg(target_arch = "x86_64")]
mod machine {
    pub const GLIBC: &str = "/lib64/ld-linux-x86-64.so.2";
    pub const MUSL: &str = "/lib/ld-musl-x86_64.so.1";
    pub const MUSL_PATH: &str = "/etc/ld-musl-x86_64.path";
    pub const MULTIARCH: &str = "/usr/lib/x86_64-linux-gnu";
}
#[cfg(target_arch = "aarch64")]
mod machine {
    pub const GLIBC: &str = "/lib/ld-linux-aarch64.so.1";
    pub const MUSL: &str = "/lib/ld-musl-aarch64.so.1";
    pub const MUSL_PATH: &str = "/etc/ld-musl-aarch64.path";
    pub const MULTIARCH: &str = "/usr/lib/aarch64-linux-gnu";
}

/// Reads the image and returns the files to write. `has_compat` is whether the image's own newer driver libraries are in the
/// running container.
///
/// # Errors
/// [`crate::error::Code::CudaTooNew`] where the image can run on this driver with its own newer libraries alone, and has none that fit.
pub fn prepare(image: &Layers, injection: &Injection, has_compat: bool) -> Result<Prepared> {
    if injection.libraries.is_empty() {
        return Ok(Prepared { symlinks: injection.symlinks.clone(), ..Prepared::default() });
    }
    let host = injection.forward_compat.as_ref().filter(|_| has_compat);
    let compat = host.and_then(|host| find_compat(image, COMPAT_DIR, host));
    if let (None, Some(ForwardCompat { driver, cuda: speaks, needed_for: Some(needed) })) =
        (&compat, &injection.forward_compat)
    {
        return Err(cuda::too_new(needed, driver, speaks));
    }
    let replaced =
        |soname: &str| compat.as_ref().is_some_and(|(_, ours)| ours.iter().any(|l| l.soname == soname));

    let mut libraries = compat.as_ref().map_or_else(Vec::new, |(_, libraries)| libraries.clone());
    libraries.extend(injection.libraries.iter().filter(|l| l.is_32bit || !replaced(&l.soname)).cloned());
    let mut directories: Vec<&Path> = compat.iter().map(|(directory, _)| directory.as_path()).collect();
    directories.extend(injection.library_dirs.iter().map(|d| d.0.as_path()));

    // LD_LIBRARY_PATH of CUDA images names the driver's directory, and it goes before the cache: the link by which the host's
    // libcuda is loaded must not be there when the image's is to be used.
    let mut symlinks: Vec<Symlink> = injection.symlinks.clone();
    symlinks.retain(|s| {
        !(injection.library_dirs.iter().any(|d| s.link.0.starts_with(&d.0))
            && s.link.0.file_name().is_some_and(|n| replaced(&n.to_string_lossy())))
    });
    let glibc = image.exists(machine::GLIBC) || image.exists(LD_SO_CACHE);
    let mut files = Vec::new();
    let mut without_cache = Vec::new();
    let file = |path: &str, content: Vec<u8>, is_needed| SmallFile {
        path: path.into(),
        content,
        mode: 0o644,
        is_needed,
    };
    if glibc {
        let old = image.read(LD_SO_CACHE, MAX_CACHE).and_then(|bytes| ldcache::Cache::parse(&bytes));
        let mut cache = old.unwrap_or_default();
        // What a start on another driver left in a root that is used again, or committed as an image.
        cache.entries.retain(|entry| !is_drivers(Path::new(OsStr::from_bytes(&entry.path))));
        cache.replace(libraries.iter().map(entry).collect());
        files.push(file(LD_SO_CACHE, cache.to_bytes(), true));
        let listed: String = directories.iter().map(|d| format!("{}\n", d.display())).collect();
        files.push(file(LD_SO_CONF, listed.into_bytes(), false));
        if !image.exists("/etc/ld.so.conf") {
            files.push(file("/etc/ld.so.conf", b"include /etc/ld.so.conf.d/*.conf\n".to_vec(), false));
        }
        let links = searched(image, &libraries);
        let is_known = |link: &&Symlink| {
            let name = link.link.0.file_name().unwrap_or_default();
            WELL_KNOWN.iter().any(|known| name == *known)
        };
        symlinks.extend(links.iter().filter(is_known).cloned());
        without_cache = links;
    }
    if image.exists(machine::MUSL) {
        // ldso/dynlink.c: this file replaces the built-in path, so that must be said, too, where the image has no file.
        let old = image
            .read(machine::MUSL_PATH, 64 << 10)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let old = old.unwrap_or_else(|| "/lib:/usr/local/lib:/usr/lib".into());
        let own = |word: &&str| !directories.contains(&Path::new(word)) && !is_drivers(Path::new(word));
        let images = old.split([':', '\n']).filter(|word| !word.is_empty()).filter(own).map(str::to_owned);
        let all: Vec<String> =
            images.chain(directories.iter().map(|directory| directory.display().to_string())).collect();
        files.push(file(machine::MUSL_PATH, (all.join(":") + "\n").into_bytes(), true));
    }
    Ok(Prepared { files, symlinks, without_cache })
}

/// Programs that look for these files by path, not through the loader: compilers (`-lcuda`), numba, old frameworks.
const WELL_KNOWN: [&str; 3] = ["libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1"];

/// A link to each library in the directory that glibc searches after its cache (ld.so(8)).
fn searched(image: &Layers, libraries: &[CachedLibrary]) -> Vec<Symlink> {
    let Some(directory) = [machine::MULTIARCH, "/usr/lib64"].into_iter().find(|d| image.exists(d)) else {
        return Vec::new();
    };
    let mut links: Vec<Symlink> = Vec::new();
    let elsewhere = |library: &&CachedLibrary| !library.is_32bit && !library.path.0.starts_with(directory);
    for library in libraries.iter().filter(elsewhere) {
        let link = |name: &str, target: &Path| Symlink {
            link: ContainerPath(Path::new(directory).join(name)),
            target: target.into(),
        };
        let mut add = |link: Symlink| {
            if links.iter().all(|known| known.link != link.link) {
                links.push(link);
            }
        };
        if library.soname == "libcuda.so.1" {
            add(link("libcuda.so", Path::new("libcuda.so.1")));
        }
        add(link(&library.soname, &library.path.0));
    }
    links
}

/// Whether an earlier start may have put the driver there.
fn is_drivers(path: &Path) -> bool {
    [DRIVER_DIR, OTHER_DRIVER_DIR].iter().any(|directory| path.starts_with(directory))
}

fn entry(library: &CachedLibrary) -> ldcache::Entry {
    ldcache::Entry {
        name: library.soname.clone().into_bytes(),
        path: library.path.0.as_os_str().as_encoded_bytes().to_vec(),
        flags: if library.is_32bit { ldcache::FLAGS_I386 } else { ldcache::FLAGS_NATIVE },
        os_version: 0,
        hwcap: 0,
    }
}

/// The image's own driver libraries, if it has exactly one libcuda there and that one is for this host.
pub fn find_compat(
    image: &Layers,
    directory: &str,
    host: &ForwardCompat,
) -> Option<(PathBuf, Vec<CachedLibrary>)> {
    // A link there is followed; what it leads to is the name that the loader gets, so a later change of the link does nothing.
    let (directory, Found::Directory(_)) = image.find(directory)? else { return None };
    let names: Vec<String> =
        image.list(directory.to_str()?).into_iter().filter_map(|n| n.into_string().ok()).collect();
    if names.len() > MAX_COMPAT {
        return None;
    }
    let file = |name: &str| match image.find(directory.join(name).to_str()?)? {
        (path, Found::File(file)) => Some((path, file)),
        _ => None,
    };
    let mut versioned = names.iter().filter_map(|name| {
        let version: Version = name.strip_prefix("libcuda.so.").filter(|v| v.contains('.'))?.parse().ok()?;
        Some((version, file(name)?.1))
    });
    let ((version, libcuda), None) = (versioned.next()?, versioned.next()) else { return None };
    if !forward_compat::decide(cuda_compat::note(libcuda).as_deref(), &version, host) {
        return None;
    }
    let soname = |name: &&String| {
        name.starts_with("lib")
            && name
                .rsplit_once(".so.")
                .is_some_and(|(_, v)| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit()))
    };
    let library = |name: &String| {
        file(name)?;
        Some(CachedLibrary {
            soname: name.clone(),
            path: ContainerPath(directory.join(name)),
            is_32bit: false,
        })
    };
    let libraries = names.iter().filter(soname).filter_map(library).collect();
    Some((directory.clone(), libraries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_root_that_is_used_again_names_each_directory_once() {
        let dir = tempfile::tempdir().unwrap();
        for directory in ["lib", "etc"] {
            fs::create_dir(dir.path().join(directory)).unwrap();
        }
        fs::write(dir.path().join(&machine::MUSL[1..]), "").unwrap();
        let path = dir.path().join(&machine::MUSL_PATH[1..]);
        let image = Layers::open(vec![dir.path().to_path_buf()]).unwrap();
        let lib64 = Path::new(DRIVER_DIR).join("lib64");
        let library = CachedLibrary {
            soname: "libcuda.so.1".into(),
            path: ContainerPath(lib64.join("libcuda.so.1")),
            is_32bit: false,
        };
        let injection = Injection {
            libraries: vec![library],
            library_dirs: vec![ContainerPath(lib64)],
            ..Injection::default()
        };
        for (before, after) in [
            (None, "/lib:/usr/local/lib:/usr/lib:/usr/local/nvidia/lib64\n"),
            (
                Some("/lib:/usr/local/lib:/usr/lib:/usr/local/nvidia/lib64\n"),
                "/lib:/usr/local/lib:/usr/lib:/usr/local/nvidia/lib64\n",
            ),
            (Some("/lib\n/opt/lib\n/usr/local/nvidia/lib\n"), "/lib:/opt/lib:/usr/local/nvidia/lib64\n"),
        ] {
            if let Some(before) = before {
                fs::write(&path, before).unwrap();
            }
            let files = prepare(&image, &injection, true).unwrap().files;
            let file = files.iter().find(|file| file.path == Path::new(machine::MUSL_PATH)).unwrap();
            assert_eq!(String::from_utf8_lossy(&file.content), after, "{before:?}");
        }
    }
}
