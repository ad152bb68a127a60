//! What happens to the GPUs of a simulated host while programs watch them. Whoever wants something to happen says so in the host's
//! directory:
//!
//! ```text
//! DIR/gpus/GPU-…   `lost`: the GPU does not answer; `unwatched`: its events cannot be had. No file: neither
//! DIR/compute-modes/GPU-…   its compute mode, which NVML sets; no file: the default, 0
//! DIR/events       a FIFO: `xid GPU-… 79`, also with a GPU instance and a compute instance behind it, is an error of the GPU's;
//!                  anything else ends a wait
//! ```

use crate::{
    Answer,
    description::{Description, SimulatedGpu, State},
    in_container,
    own_description::own,
};
use nvml_wrapper_sys::bindings::{
    nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST, nvmlReturn_enum_NVML_ERROR_NO_PERMISSION,
    nvmlReturn_enum_NVML_ERROR_TIMEOUT, nvmlReturn_enum_NVML_ERROR_UNKNOWN,
};
use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::Read,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::PathBuf,
    sync::{Mutex, OnceLock},
    thread,
    time::Duration,
};

pub const LOST: &str = "lost";
pub const UNWATCHED: &str = "unwatched";

/// An XID error.
pub struct XidError {
    /// The GPU's place in the description.
    pub gpu: usize,
    pub xid: u64,
    /// GPU instance and compute instance; `u32::MAX` where there is none.
    pub instance: [u32; 2],
}

/// Places of the GPUs whose errors are waited for.
static REGISTERED: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

fn directory() -> Option<PathBuf> {
    let root = own()?.description.driver_root.as_ref()?;
    (!in_container()).then(|| root.parent().map(PathBuf::from))?
}

/// What was said of the GPU.
pub fn told(gpu: &SimulatedGpu) -> Option<String> {
    let word = std::fs::read_to_string(directory()?.join("gpus").join(&gpu.uuid)).ok()?;
    Some(word.trim().to_owned())
}

/// The compute mode that was set.
pub fn compute_mode(gpu: &SimulatedGpu) -> Option<u32> {
    let text = std::fs::read_to_string(directory()?.join("compute-modes").join(&gpu.uuid)).ok()?;
    text.trim().parse().ok()
}

/// Sets it.
pub fn set_compute_mode(gpu: &SimulatedGpu, mode: u32) -> Answer {
    let unknown = |_| nvmlReturn_enum_NVML_ERROR_UNKNOWN;
    let directory = directory().ok_or(nvmlReturn_enum_NVML_ERROR_NO_PERMISSION)?.join("compute-modes");
    std::fs::create_dir_all(&directory).map_err(unknown)?;
    std::fs::write(directory.join(&gpu.uuid), format!("{mode}\n")).map_err(unknown)
}

pub fn register(gpu: usize) {
    REGISTERED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(gpu);
}

pub fn forget() {
    REGISTERED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
}

fn registered() -> BTreeSet<usize> {
    REGISTERED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
}

fn any_is_lost(host: &Description) -> bool {
    registered()
        .iter()
        .filter_map(|&place| host.gpus.get(place))
        .any(|gpu| gpu.state == State::Lost || told(gpu).is_some_and(|word| word == LOST))
}

/// The FIFO. Opened for writing, too, it never ends.
fn fifo() -> Option<&'static File> {
    static FIFO: OnceLock<Option<File>> = OnceLock::new();
    FIFO.get_or_init(|| {
        let path = directory()?.join("events");
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .ok()
    })
    .as_ref()
}

/// The next error, `TIMEOUT` or `GPU_IS_LOST`.
pub fn wait(host: &Description, milliseconds: u32) -> Answer<XidError> {
    if any_is_lost(host) {
        return Err(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
    }
    let Some(fifo) = fifo() else {
        thread::sleep(Duration::from_millis(milliseconds.into()));
        return Err(nvmlReturn_enum_NVML_ERROR_TIMEOUT);
    };
    let line = line(fifo, milliseconds).unwrap_or_default();
    let mut words = line.split_whitespace();
    if words.next() != Some("xid") {
        return Err(if any_is_lost(host) {
            nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST
        } else {
            nvmlReturn_enum_NVML_ERROR_TIMEOUT
        });
    }
    let uuid = words.next().unwrap_or_default();
    let gpu = host.gpus.iter().position(|gpu| gpu.uuid == uuid).ok_or(nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
    let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
    let xid = number().ok_or(nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
    let mut instance = || number().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
    Ok(XidError { gpu, xid, instance: [instance(), instance()] })
}

/// The next line, if one comes in time. Lines are short, and so written at once.
fn line(mut fifo: &File, milliseconds: u32) -> Option<String> {
    let mut wanted = libc::pollfd { fd: fifo.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let limit = i32::try_from(milliseconds).unwrap_or(i32::MAX);
    // SAFETY: one structure is there, which is ours and writable; the descriptor is open.
    if unsafe { libc::poll(&raw mut wanted, 1, limit) } != 1 {
        return None;
    }
    let mut line = Vec::new();
    let mut byte = [0];
    while fifo.read(&mut byte).ok()? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).ok()
}
