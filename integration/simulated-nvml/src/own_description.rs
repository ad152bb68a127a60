//! A library's own file, and the description behind its last byte.

use crate::description::Description;
use std::{
    ffi::{CStr, OsStr, c_void},
    fs::File,
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::OnceLock,
};

/// Where this library lies, and what it was told to simulate.
pub struct Own {
    pub path: PathBuf,
    pub description: Description,
}

/// Read once, from the file that the loader mapped. `None` where there is no description to be found.
pub fn own() -> Option<&'static Own> {
    static OWN: OnceLock<Option<Own>> = OnceLock::new();
    OWN.get_or_init(|| {
        let path = path()?;
        let description = Description::read_from(&mut File::open(&path).ok()?).ok()??;
        Some(Own { path: path.canonicalize().ok()?, description })
    })
    .as_ref()
}

fn path() -> Option<PathBuf> {
    let mut info = MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: the first argument is only looked up, the second is writable; `info` is read only if dladdr filled it.
    let info =
        unsafe { (libc::dladdr(path as *const c_void, info.as_mut_ptr()) != 0).then(|| info.assume_init())? };
    if info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr gives a string of the loader's that lives as long as the library is loaded.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
}

// Real drivers' libraries need nothing but the C library, and so they run in images that have no libgcc_s. The unwinder
// that Rust's std refers to is therefore linked in.
#[link(name = "gcc_eh", kind = "static", modifiers = "+whole-archive,-bundle")]
unsafe extern "C" {}
