//! What each hook does.

use crate::{
    container::{Container, character_device, note, proc_file},
    words::Words,
};
use gpurun::{
    apply::loader::{self, COMPAT_DIR, LD_SO_CACHE, MAX_CACHE, SmallFile},
    error::{Code, Error, OrFail, Result},
    formats::ldcache,
    inventory::{ContainerPath, elf},
    plan::{CachedLibrary, ForwardCompat, Injection, Symlink, device, driver},
    vocabulary::Version,
};
use rustix::io::Errno;
use std::{
    collections::HashSet,
    ffi::OsStr,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::Path,
};

/// A hook.
pub type Hook = fn(&Container, &Words) -> Result<()>;

/// The hook of this name.
pub fn named(name: &str) -> Option<Hook> {
    Some(match name {
        "all" => all,
        "create-symlinks" => create_symlinks,
        "enable-cuda-compat" => enable_cuda_compat,
        "update-ldcache" => update_ldcache,
        "disable-device-node-modification" => disable_device_node_modification,
        "update-application-profile" => update_application_profile,
        "chmod" => chmod,
        _ => return None,
    })
}

/// What gpurun's documents need: `--link`, `--library` (a name that the loader must know, by its path), `--folder` (for later
/// runs of ldconfig), `--host-driver-version` and `--host-cuda-version` (an image's own newer libraries may be used).
fn all(container: &Container, words: &Words) -> Result<()> {
    let library = |path: &str| {
        let name = Path::new(path).file_name()?.to_str()?.to_owned();
        Some(CachedLibrary { soname: name, path: ContainerPath(path.into()), is_32bit: false })
    };
    let injection = Injection {
        symlinks: links(words)?,
        libraries: words.all("library").filter_map(library).collect(),
        library_dirs: words.all("folder").map(|folder| ContainerPath(folder.into())).collect(),
        forward_compat: host(words)?,
        ..Injection::default()
    };
    let driver_dir = container.lay(&injection)?;
    // Both are optional.
    for helps in [update_application_profile, disable_device_node_modification] {
        if let Err(error) = helps(container, words) {
            note(&error);
        }
    }
    container.seal(&driver_dir);
    Ok(())
}

/// `--link TARGET::LINK`
fn create_symlinks(container: &Container, words: &Words) -> Result<()> {
    links(words)?.iter().try_for_each(|link| container.link(link))
}

fn links(words: &Words) -> Result<Vec<Symlink>> {
    let link = |pair: &str| match pair.split_once("::") {
        Some((target, link)) if !target.is_empty() => {
            Ok(Symlink { link: ContainerPath(link.into()), target: target.into() })
        }
        _ => Err(Error::new(Code::Usage, format!("--link {pair} is not TARGET::LINK"))
            .fix("write the CDI spec again with `gpurun cdi generate`")),
    };
    words.all("link").map(link).collect()
}

/// Names the directory of an image's own newer driver libraries to the loader, for `update-ldcache` and later runs of ldconfig.
const COMPAT_CONF: &str = "/etc/ld.so.conf.d/00-gpurun-compat.conf";

/// `--host-driver-version`, `--host-cuda-version`, `--cuda-compat-container-root`
fn enable_cuda_compat(container: &Container, words: &Words) -> Result<()> {
    let Some(host) = host(words)? else { return Ok(()) };
    let directory = words.last("cuda-compat-container-root").unwrap_or(COMPAT_DIR);
    let listed = match loader::find_compat(&container.image, directory, &host) {
        Some((directory, _)) => format!("{}\n", directory.display()),
        // What a start on an older driver left.
        None if container.image.exists(COMPAT_CONF) => String::new(),
        None => return Ok(()),
    };
    container.write(&SmallFile {
        path: COMPAT_CONF.into(),
        content: listed.into_bytes(),
        mode: 0o644,
        is_needed: false,
    })
}

/// What an image's libraries are compared with. Where the document does not say the host's CUDA, a library that names no
/// driver branches is not used.
fn host(words: &Words) -> Result<Option<ForwardCompat>> {
    let version = |flag: &str| -> Result<Option<Version>> {
        let parsed = words.last(flag).map(str::parse).transpose();
        parsed.or_fail(Code::Usage, || format!("--{flag} is not understood"))
    };
    let cuda = version("host-cuda-version")?.unwrap_or_else(|| Version::of(u32::MAX, 0));
    let driver = version("host-driver-version")?;
    Ok(driver.map(|driver| ForwardCompat { driver, cuda, needed_for: None }))
}

/// `--folder`: what the loader's cache lacks of the libraries there is added; the image's own stay in their order.
fn update_ldcache(container: &Container, words: &Words) -> Result<()> {
    let image = &container.image;
    let compat = image.read(COMPAT_CONF, 4096).and_then(|bytes| String::from_utf8(bytes).ok());
    // `enable-cuda-compat` writes one line.
    let compat = compat.as_deref().unwrap_or_default().lines().take(1);
    let folders: Vec<&str> =
        compat.chain(words.all("folder")).filter(|folder| folder.starts_with('/')).collect();
    let cache = image
        .read(LD_SO_CACHE, MAX_CACHE)
        .and_then(|bytes| ldcache::Cache::parse(&bytes))
        .unwrap_or_default();
    let cached: HashSet<&Path> =
        cache.entries.iter().map(|entry| Path::new(OsStr::from_bytes(&entry.path))).collect();
    let known: HashSet<&Path> = cached.iter().filter_map(|path| path.parent()).collect();

    let mut libraries: Vec<CachedLibrary> = Vec::new();
    for folder in folders.iter().map(Path::new) {
        let names = image.list(&folder.to_string_lossy());
        for name in &names {
            let path = folder.join(name);
            let Some(name) = name.to_str().filter(|name| name.starts_with("lib") && name.contains(".so"))
            else {
                continue;
            };
            if cached.contains(path.as_path()) {
                continue;
            }
            let Some((_, gpurun::apply::rootfs::Found::File(file))) =
                path.to_str().and_then(|path| image.find(path))
            else {
                continue;
            };
            let Some(library) = elf::read(file) else { continue };
            let soname = library.soname.unwrap_or_else(|| name.to_owned());
            let has_link = names.iter().any(|other| *other == *soname);
            let path = if has_link { folder.join(&soname) } else { path };
            let is_32bit = library.is_32bit;
            if libraries.iter().all(|known| (&known.soname, known.is_32bit) != (&soname, is_32bit)) {
                libraries.push(CachedLibrary { soname, path: ContainerPath(path), is_32bit });
            }
        }
    }
    // ldconfig also searches the loader's default directories.
    let new = folders.iter().filter(|folder| !known.contains(Path::new(folder)));
    let library_dirs = new.map(|folder| ContainerPath((*folder).into())).collect();
    container.lay(&Injection { libraries, library_dirs, ..Injection::default() }).map(drop)
}

/// The driver's libraries make and change device nodes where the driver's parameters say so; in a container they must not.
fn disable_device_node_modification(container: &Container, _: &Words) -> Result<()> {
    let host = proc_file(Path::new("/proc/driver/nvidia/params"));
    match host.as_deref().and_then(driver::params) {
        Some(file) => container.cover(&file.path.0, file.content.as_bytes()),
        None => Ok(()),
    }
}

/// The driver's major number (Documentation/admin-guide/devices.txt).
const NVIDIA_MAJOR: u32 = 195;

/// Tells the driver's EGL which GPUs the container has.
fn update_application_profile(container: &Container, _: &Words) -> Result<()> {
    let minors = (0..u64::BITS).filter(|minor| {
        let node = format!("/dev/nvidia{minor}");
        let node = container.look(Path::new(&node)).ok();
        node.as_ref().and_then(character_device).is_some_and(|numbers| is_gpu(numbers, *minor))
    });
    match device::profile(minors) {
        Some(file) => container.write(&SmallFile {
            path: file.path.0,
            content: file.content.into_bytes(),
            mode: 0o444,
            is_needed: false,
        }),
        None => Ok(()),
    }
}

fn is_gpu((major, minor): (u32, u32), named: u32) -> bool {
    major == NVIDIA_MAJOR && minor == named
}

/// `--mode OCTAL --path …`: crun once gave directories that it made for mounts a mode that shut users out.
fn chmod(container: &Container, words: &Words) -> Result<()> {
    let mode = words.last("mode").unwrap_or_default();
    let bits = u32::from_str_radix(mode, 8).ok().filter(|bits| *bits <= 0o7777);
    let bits = bits.ok_or_else(|| Error::new(Code::Usage, format!("--mode {mode} is not an octal mode")))?;
    for path in words.all("path") {
        let failed = || format!("the mode of {path} cannot be changed");
        let found = match container.open(Path::new(path)) {
            // The mode of a directory on a volume is its owner's choice.
            Err(Errno::NOENT | Errno::XDEV) => continue,
            result => result.or_fail(Code::Rootfs, failed)?,
        };
        // A descriptor of a path alone has a mode to change through its name in /proc alone.
        let name = format!("/proc/self/fd/{}", found.as_raw_fd());
        match rustix::fs::chmod(name, rustix::fs::Mode::from_raw_mode(bits)) {
            Err(Errno::PERM) | Ok(()) => {}
            Err(errno) => return Err(errno).or_fail(Code::Rootfs, failed),
        }
    }
    Ok(())
}
