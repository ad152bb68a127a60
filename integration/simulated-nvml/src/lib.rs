//! Stands where libnvidia-ml.so.1 stands, on a host that has no GPU, and answers NVML's questions from the description
//! behind its own last byte.
//!
//! Function names, types and numbers are NVML's own; which question has which answer is in the API's reference.
#![allow(non_snake_case, non_upper_case_globals)] // NVML's own names

#[path = "../../../src/simulated_host/description.rs"]
#[allow(dead_code)]
mod description;
mod events;
mod own_description;

use description::{Description, InitError, SimulatedGpu, SimulatedMig, State};
use nvml_wrapper_sys::bindings::*;
use own_description::own;
use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    path::Path,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

type Answer<T = ()> = Result<T, nvmlReturn_t>;

const NOT_SUPPORTED: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NOT_FOUND: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const INVALID_ARGUMENT: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;

/// Where the caller wants an answer written.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    fn put(self, value: T) -> Answer {
        if self.0.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: an `Out` comes from a caller of NVML's API only, who must pass null or a pointer to a writable T.
        unsafe { self.0.write(value) };
        Ok(())
    }
}

impl Out<c_char> {
    fn put_text(self, text: &str, length: c_uint) -> Answer {
        if self.0.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        if text.len() >= length as usize {
            return Err(nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE);
        }
        // SAFETY: by NVML's API `length` bytes are writable here, which is more than the text and its zero need.
        unsafe {
            ptr::copy_nonoverlapping(text.as_ptr(), self.0.cast(), text.len());
            self.0.add(text.len()).write(0);
        }
        Ok(())
    }
}

/// A text of the caller's.
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    fn get(&self) -> Answer<&str> {
        if self.0.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: by NVML's API a text that is not null ends with a zero and lives until the function returns.
        unsafe { CStr::from_ptr(self.0) }.to_str().map_err(|_| INVALID_ARGUMENT)
    }
}

/// A GPU's or MIG device's handle. It is a number that is looked up, never an address that is followed: the GPU's place
/// in the description plus one, times 256, and the MIG device's plus one.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Handle(nvmlDevice_t);

enum Device<'a> {
    Gpu(&'a SimulatedGpu),
    Mig(&'a SimulatedGpu, &'a SimulatedMig),
}

impl Handle {
    fn of(gpu: usize, mig: Option<usize>) -> Self {
        Self(ptr::without_provenance_mut((gpu + 1) * 256 + mig.map_or(0, |mig| mig + 1)))
    }

    fn place(self) -> Answer<(usize, Option<usize>)> {
        let number = self.0.addr();
        Ok(((number / 256).checked_sub(1).ok_or(INVALID_ARGUMENT)?, (number % 256).checked_sub(1)))
    }

    fn device(self, host: &Description) -> Answer<Device<'_>> {
        let (gpu, mig) = self.place()?;
        let gpu = host.gpus.get(gpu).ok_or(INVALID_ARGUMENT)?;
        if gpu.state == State::Lost || events::told(gpu).is_some_and(|word| word == events::LOST) {
            return Err(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
        }
        Ok(match mig {
            None => Device::Gpu(gpu),
            Some(mig) => Device::Mig(gpu, migs(gpu).get(mig).ok_or(INVALID_ARGUMENT)?),
        })
    }

    /// The GPU itself; a MIG device's handle is not supported.
    fn gpu(self, host: &Description) -> Answer<&SimulatedGpu> {
        match self.device(host)? {
            Device::Gpu(gpu) => Ok(gpu),
            Device::Mig(..) => Err(NOT_SUPPORTED),
        }
    }

    /// The GPU itself, or that of the MIG device.
    fn any_gpu(self, host: &Description) -> Answer<&SimulatedGpu> {
        match self.device(host)? {
            Device::Gpu(gpu) | Device::Mig(gpu, _) => Ok(gpu),
        }
    }

    fn mig(self, host: &Description) -> Answer<&SimulatedMig> {
        match self.device(host)? {
            Device::Mig(_, mig) => Ok(mig),
            Device::Gpu(_) => Err(NOT_SUPPORTED),
        }
    }
}

fn migs(gpu: &SimulatedGpu) -> &[SimulatedMig] {
    gpu.mig.as_ref().filter(|mig| mig.enabled).map_or(&[], |mig| &mig.devices)
}

/// Whether the library is in a container rather than in the driver root that it was laid out in.
fn in_container() -> bool {
    own().is_some_and(|own| {
        own.description.driver_root.as_ref().is_some_and(|root| !own.path.starts_with(root))
    })
}

/// In a container NVML sees what has its node in /dev.
fn gpu_is_visible(gpu: &SimulatedGpu) -> bool {
    !in_container() || Path::new(&format!("/dev/nvidia{}", gpu.minor)).exists()
}

fn mig_is_visible(gpu: &SimulatedGpu, mig: &SimulatedMig) -> bool {
    let node = |minor| format!("/dev/nvidia-caps/nvidia-cap{minor}");
    !in_container() || mig.cap_minors(gpu.minor).into_iter().all(|minor| Path::new(&node(minor)).exists())
}

/// Places of the GPUs that can be seen; NVML's index counts them.
fn visible_gpus(host: &Description) -> impl Iterator<Item = usize> {
    (0..host.gpus.len()).filter(|&place| gpu_is_visible(&host.gpus[place]))
}

/// Gives out a GPU's handle. A lost one has none.
fn hand_out(host: &Description, gpu: usize, mig: Option<usize>, out: Out<Handle>) -> Answer {
    let handle = Handle::of(gpu, mig);
    handle.device(host)?;
    out.put(handle)
}

/// Fails as a driver older than `branch` fails that does not have the function yet.
fn since(host: &Description, branch: u32) -> Answer {
    let own: u32 = host.driver.split('.').next().and_then(|branch| branch.parse().ok()).unwrap_or(0);
    if own < branch { Err(nvmlReturn_enum_NVML_ERROR_FUNCTION_NOT_FOUND) } else { Ok(()) }
}

/// `12.4` as NVML and CUDA write it in a number, 12040.
fn cuda_number(version: &str) -> c_int {
    let (major, minor) = pair(version);
    major * 1000 + minor * 10
}

fn pair(version: &str) -> (c_int, c_int) {
    let mut numbers = version.split('.').map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// A profile's slices: `1c.3g.20gb` is 1 compute slice of a GPU instance of 3, `3g.20gb` is all 3.
fn slices(profile: &str) -> (c_uint, c_uint) {
    let count = |suffix| profile.split('.').find_map(|part| part.strip_suffix(suffix)?.parse().ok());
    let gpu_instance = count('g').unwrap_or(0);
    (count('c').unwrap_or(gpu_instance), gpu_instance)
}

fn characters<const N: usize>(text: &str) -> [c_char; N] {
    let mut characters = [0; N];
    for (to, from) in characters.iter_mut().take(N.saturating_sub(1)).zip(text.bytes()) {
        *to = from.cast_signed();
    }
    characters
}

/// `0000:65:00.0` in NVML's shape.
fn pci_info(address: &str) -> Answer<nvmlPciInfo_t> {
    let mut parts = address
        .split([':', '.'])
        .map(|part| c_uint::from_str_radix(part, 16).map_err(|_| nvmlReturn_enum_NVML_ERROR_UNKNOWN));
    let mut next = || parts.next().unwrap_or(Err(nvmlReturn_enum_NVML_ERROR_UNKNOWN));
    let (domain, bus, device) = (next()?, next()?, next()?);
    Ok(nvmlPciInfo_t {
        busIdLegacy: characters(&format!("{domain:04X}:{bus:02X}:{device:02X}.0")),
        domain,
        bus,
        device,
        pciDeviceId: 0x10DE, // NVIDIA's vendor id; the device's own is not simulated
        pciSubSystemId: 0x10DE,
        busId: characters(&format!("{domain:08X}:{bus:02X}:{device:02X}.0")),
    })
}

/// The neighbour at the other end of a link.
fn neighbour(gpu: &SimulatedGpu, link: c_uint) -> Answer<Option<&str>> {
    if link >= NVML_NVLINK_MAX_LINKS {
        return Err(INVALID_ARGUMENT);
    }
    if gpu.nvlinks.is_empty() {
        return Err(NOT_SUPPORTED);
    }
    let mut ends = gpu.nvlinks.iter().flat_map(|l| std::iter::repeat_n(l.to.as_str(), l.links as usize));
    Ok(ends.nth(link as usize))
}

fn memory(host: &Description, handle: Handle) -> Answer<u64> {
    Ok(match handle.device(host)? {
        Device::Gpu(gpu) => gpu.memory,
        Device::Mig(_, mig) => mig.memory,
    })
}

fn by_uuid(host: &Description, uuid: &str, out: Out<Handle>) -> Answer {
    for place in visible_gpus(host) {
        let gpu = &host.gpus[place];
        if gpu.uuid == uuid {
            return hand_out(host, place, None, out);
        }
        if let Some(mig) = migs(gpu).iter().position(|mig| mig.uuid == uuid && mig_is_visible(gpu, mig)) {
            return hand_out(host, place, Some(mig), out);
        }
    }
    Err(NOT_FOUND)
}

/// How often `nvmlInit_v2` was called without `nvmlShutdown`.
static INITIALISED: AtomicUsize = AtomicUsize::new(0);

fn initialise() -> Answer {
    let host = &own().ok_or(nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED)?.description;
    if host.init_seconds > 0.0 {
        thread::sleep(Duration::try_from_secs_f64(host.init_seconds).unwrap_or_default());
    }
    if in_container() && !Path::new("/dev/nvidiactl").exists() {
        return Err(nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED);
    }
    if let Some(error) = host.init_error {
        return Err(match error {
            InitError::DriverNotLoaded => nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED,
            InitError::LibRmVersionMismatch => nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            InitError::NoPermission => nvmlReturn_enum_NVML_ERROR_NO_PERMISSION,
            InitError::Unknown => nvmlReturn_enum_NVML_ERROR_UNKNOWN,
        });
    }
    INITIALISED.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

fn answer(question: impl FnOnce(&'static Description) -> Answer) -> nvmlReturn_t {
    let Some(own) = own().filter(|_| INITIALISED.load(Ordering::SeqCst) > 0) else {
        return nvmlReturn_enum_NVML_ERROR_UNINITIALIZED;
    };
    question(&own.description).err().unwrap_or(nvmlReturn_enum_NVML_SUCCESS)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> nvmlReturn_t {
    initialise().err().unwrap_or(nvmlReturn_enum_NVML_SUCCESS)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> nvmlReturn_t {
    nvmlInit_v2()
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> nvmlReturn_t {
    match INITIALISED.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1)) {
        Ok(_) => nvmlReturn_enum_NVML_SUCCESS,
        Err(_) => nvmlReturn_enum_NVML_ERROR_UNINITIALIZED,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(result: nvmlReturn_t) -> *const c_char {
    let text = match result {
        nvmlReturn_enum_NVML_SUCCESS => c"Success",
        nvmlReturn_enum_NVML_ERROR_UNINITIALIZED => c"Uninitialized",
        INVALID_ARGUMENT => c"Invalid Argument",
        NOT_SUPPORTED => c"Not Supported",
        nvmlReturn_enum_NVML_ERROR_NO_PERMISSION => c"Insufficient Permissions",
        NOT_FOUND => c"Not Found",
        nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE => c"Insufficient Size",
        nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED => c"Driver Not Loaded",
        nvmlReturn_enum_NVML_ERROR_FUNCTION_NOT_FOUND => c"Function Not Found",
        nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST => c"GPU is lost",
        nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH => c"Driver/library version mismatch",
        nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH => c"Argument version mismatch",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

/// What nvidia-smi asks for beside the public API: a table that begins with its own size and whose entries are not
/// documented. A real nvidia-smi lists devices although each of them answers that it is not supported.
#[repr(C)]
pub struct ExportTable {
    size: usize,
    entries: [extern "C" fn() -> nvmlReturn_t; 255],
}

static EXPORT_TABLE: ExportTable =
    ExportTable { size: size_of::<ExportTable>(), entries: [not_supported; 255] };

extern "C" fn not_supported() -> nvmlReturn_t {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInternalGetExportTable(
    table: Out<*const ExportTable>,
    _id: *const c_void,
) -> nvmlReturn_t {
    table.put(&raw const EXPORT_TABLE).err().unwrap_or(nvmlReturn_enum_NVML_SUCCESS)
}

macro_rules! questions {
    ($(fn $name:ident($host:ident $(, $argument:ident: $type:ty)*) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($argument: $type),*) -> nvmlReturn_t {
            answer(|$host| $body)
        }
    )*};
}

questions! {
    fn nvmlEventSetCreate(_host, set: Out<nvmlEventSet_t>) {
        events::forget();
        // There is one, and nobody looks behind it.
        set.put(ptr::without_provenance_mut(1))
    }
    fn nvmlEventSetFree(_host, _set: nvmlEventSet_t) { Ok(()) }
    fn nvmlDeviceGetSupportedEventTypes(host, device: Handle, types: Out<u64>) {
        device.gpu(host)?;
        types.put(u64::from(nvmlEventTypeXidCriticalError))
    }
    fn nvmlDeviceRegisterEvents(host, device: Handle, types: u64, _set: nvmlEventSet_t) {
        let gpu = device.gpu(host)?;
        if types & !u64::from(nvmlEventTypeXidCriticalError) != 0 {
            return Err(NOT_SUPPORTED);
        }
        if events::told(gpu).is_some_and(|word| word == events::UNWATCHED) {
            return Err(nvmlReturn_enum_NVML_ERROR_UNKNOWN);
        }
        events::register(device.place()?.0);
        Ok(())
    }
    fn nvmlEventSetWait_v2(host, _set: nvmlEventSet_t, data: Out<nvmlEventData_t>, milliseconds: c_uint) {
        let error = events::wait(host, milliseconds)?;
        data.put(nvmlEventData_t {
            device: Handle::of(error.gpu, None).0,
            eventType: u64::from(nvmlEventTypeXidCriticalError),
            eventData: error.xid,
            gpuInstanceId: error.instance[0],
            computeInstanceId: error.instance[1],
        })
    }

    fn nvmlSystemGetDriverVersion(host, version: Out<c_char>, length: c_uint) { version.put_text(&host.driver, length) }
    fn nvmlSystemGetNVMLVersion(host, version: Out<c_char>, length: c_uint) {
        version.put_text(&format!("{}.{}", pair(&host.cuda).0, host.driver), length)
    }
    fn nvmlSystemGetCudaDriverVersion(host, version: Out<c_int>) { version.put(cuda_number(&host.cuda)) }
    fn nvmlSystemGetCudaDriverVersion_v2(host, version: Out<c_int>) { version.put(cuda_number(&host.cuda)) }

    fn nvmlDeviceGetCount_v2(host, count: Out<c_uint>) { count.put(visible_gpus(host).count() as c_uint) }
    fn nvmlDeviceGetHandleByIndex_v2(host, index: c_uint, device: Out<Handle>) {
        let place = visible_gpus(host).nth(index as usize).ok_or(INVALID_ARGUMENT)?;
        hand_out(host, place, None, device)
    }
    fn nvmlDeviceGetHandleByUUID(host, uuid: Text, device: Out<Handle>) { by_uuid(host, uuid.get()?, device) }
    fn nvmlDeviceGetHandleByPciBusId_v2(host, address: Text, device: Out<Handle>) {
        // With a domain of four or of eight digits.
        let asked = address.get()?.to_ascii_lowercase();
        let place = visible_gpus(host)
            .find(|&place| {
                let own = host.gpus[place].pci.to_ascii_lowercase();
                asked == own || asked.strip_prefix("0000") == Some(&own)
            })
            .ok_or(NOT_FOUND)?;
        hand_out(host, place, None, device)
    }

    fn nvmlDeviceGetIndex(host, device: Handle, index: Out<c_uint>) {
        device.gpu(host)?;
        let (own, _) = device.place()?;
        index.put(visible_gpus(host).take_while(|&place| place < own).count() as c_uint)
    }
    fn nvmlDeviceGetMinorNumber(host, device: Handle, minor: Out<c_uint>) { minor.put(device.gpu(host)?.minor) }
    fn nvmlDeviceGetUUID(host, device: Handle, uuid: Out<c_char>, length: c_uint) {
        match device.device(host)? {
            Device::Gpu(gpu) => uuid.put_text(&gpu.uuid, length),
            Device::Mig(_, mig) => uuid.put_text(&mig.uuid, length),
        }
    }
    fn nvmlDeviceGetName(host, device: Handle, name: Out<c_char>, length: c_uint) {
        match device.device(host)? {
            Device::Gpu(gpu) => name.put_text(&gpu.name, length),
            Device::Mig(gpu, mig) => name.put_text(&format!("{} MIG {}", gpu.name, mig.profile), length),
        }
    }
    fn nvmlDeviceGetBrand(host, device: Handle, brand: Out<nvmlBrandType_t>) {
        brand.put(match device.any_gpu(host)?.brand.as_str() {
            "quadro" => nvmlBrandType_enum_NVML_BRAND_QUADRO,
            "tesla" => nvmlBrandType_enum_NVML_BRAND_TESLA,
            "geforce" => nvmlBrandType_enum_NVML_BRAND_GEFORCE,
            "titan" => nvmlBrandType_enum_NVML_BRAND_TITAN,
            "nvidia-rtx" => nvmlBrandType_enum_NVML_BRAND_NVIDIA_RTX,
            "nvidia" => nvmlBrandType_enum_NVML_BRAND_NVIDIA,
            "geforce-rtx" => nvmlBrandType_enum_NVML_BRAND_GEFORCE_RTX,
            _ => nvmlBrandType_enum_NVML_BRAND_UNKNOWN,
        })
    }
    fn nvmlDeviceGetArchitecture(host, device: Handle, architecture: Out<nvmlDeviceArchitecture_t>) {
        architecture.put(match device.any_gpu(host)?.architecture.as_str() {
            "Kepler" => NVML_DEVICE_ARCH_KEPLER,
            "Maxwell" => NVML_DEVICE_ARCH_MAXWELL,
            "Pascal" => NVML_DEVICE_ARCH_PASCAL,
            "Volta" => NVML_DEVICE_ARCH_VOLTA,
            "Turing" => NVML_DEVICE_ARCH_TURING,
            "Ampere" => NVML_DEVICE_ARCH_AMPERE,
            "Ada" => NVML_DEVICE_ARCH_ADA,
            "Hopper" => NVML_DEVICE_ARCH_HOPPER,
            "Blackwell" => NVML_DEVICE_ARCH_BLACKWELL,
            _ => NVML_DEVICE_ARCH_UNKNOWN,
        })
    }
    fn nvmlDeviceGetCudaComputeCapability(host, device: Handle, major: Out<c_int>, minor: Out<c_int>) {
        let capability = pair(&device.any_gpu(host)?.compute_capability);
        major.put(capability.0)?;
        minor.put(capability.1)
    }
    fn nvmlDeviceGetMemoryInfo(host, device: Handle, out: Out<nvmlMemory_t>) {
        let total = memory(host, device)?;
        out.put(nvmlMemory_t { total, free: total, used: 0 })
    }
    fn nvmlDeviceGetMemoryInfo_v2(host, device: Handle, out: Out<nvmlMemory_v2_t>) {
        since(host, 510)?;
        let total = memory(host, device)?;
        // The size of the structure and its version, which NVML wants to find there and leaves there.
        let version = size_of::<nvmlMemory_v2_t>() as c_uint | 2 << 24;
        out.put(nvmlMemory_v2_t { version, total, reserved: 0, free: total, used: 0 })
    }
    fn nvmlDeviceGetPciInfo_v3(host, device: Handle, pci: Out<nvmlPciInfo_t>) {
        pci.put(pci_info(&device.any_gpu(host)?.pci)?)
    }
    fn nvmlDeviceGetPersistenceMode(host, device: Handle, mode: Out<nvmlEnableState_t>) {
        mode.put(nvmlEnableState_t::from(device.gpu(host)?.persistence))
    }
    fn nvmlDeviceGetGpuFabricInfo(host, device: Handle, info: Out<nvmlGpuFabricInfo_t>) {
        since(host, 520)?;
        let clique = device.gpu(host)?.clique.as_ref().ok_or(NOT_SUPPORTED)?;
        let (cluster, clique) = clique.split_once('.').ok_or(NOT_SUPPORTED)?;
        let number = u128::from_str_radix(&cluster.replace('-', ""), 16).map_err(|_| NOT_SUPPORTED)?;
        info.put(nvmlGpuFabricInfo_t {
            clusterUuid: number.to_be_bytes(),
            status: nvmlReturn_enum_NVML_SUCCESS,
            cliqueId: clique.parse().map_err(|_| NOT_SUPPORTED)?,
            // NVML_GPU_FABRIC_STATE_COMPLETED
            state: 3,
        })
    }
    fn nvmlDeviceGetComputeMode(host, device: Handle, mode: Out<nvmlComputeMode_t>) {
        let set = events::compute_mode(device.any_gpu(host)?);
        mode.put(set.unwrap_or(nvmlComputeMode_enum_NVML_COMPUTEMODE_DEFAULT))
    }
    fn nvmlDeviceSetComputeMode(host, device: Handle, mode: nvmlComputeMode_t) {
        events::set_compute_mode(device.gpu(host)?, mode)
    }
    // Only where a GPU's memory is a NUMA node of its own (Grace); a PCIe device's node is in sysfs.
    fn nvmlDeviceGetNumaNodeId(host, device: Handle, _node: Out<c_uint>) {
        since(host, 530)?;
        device.gpu(host).and(Err(NOT_SUPPORTED))
    }
    fn nvmlDeviceGetUtilizationRates(host, device: Handle, rates: Out<nvmlUtilization_t>) {
        device.gpu(host)?;
        rates.put(nvmlUtilization_t { gpu: 0, memory: 0 })
    }
    fn nvmlDeviceGetComputeRunningProcesses_v3(
        host, device: Handle, count: Out<c_uint>, _infos: Out<nvmlProcessInfo_t>
    ) {
        since(host, 510)?;
        device.device(host)?;
        count.put(0)
    }
    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        host, device: Handle, count: Out<c_uint>, _infos: Out<nvmlProcessInfo_t>
    ) {
        since(host, 510)?;
        device.device(host)?;
        count.put(0)
    }

    fn nvmlDeviceGetNvLinkState(host, device: Handle, link: c_uint, active: Out<nvmlEnableState_t>) {
        active.put(nvmlEnableState_t::from(neighbour(device.gpu(host)?, link)?.is_some()))
    }
    fn nvmlDeviceGetNvLinkRemotePciInfo_v2(host, device: Handle, link: c_uint, pci: Out<nvmlPciInfo_t>) {
        pci.put(pci_info(neighbour(device.gpu(host)?, link)?.ok_or(NOT_SUPPORTED)?)?)
    }
    fn nvmlDeviceGetTopologyCommonAncestor(
        host, device1: Handle, device2: Handle, level: Out<nvmlGpuTopologyLevel_t>
    ) {
        let (a, b) = (device1.gpu(host)?, device2.gpu(host)?);
        level.put(if a.pci == b.pci {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_INTERNAL
        } else if a.pcie_switch.is_some() && a.pcie_switch == b.pcie_switch {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_SINGLE
        } else if a.numa_node == b.numa_node {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_NODE
        } else {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_SYSTEM
        })
    }

    fn nvmlDeviceGetMigMode(host, device: Handle, current: Out<c_uint>, pending: Out<c_uint>) {
        let mode = c_uint::from(device.gpu(host)?.mig.as_ref().ok_or(NOT_SUPPORTED)?.enabled);
        current.put(mode)?;
        pending.put(mode)
    }
    fn nvmlDeviceGetMaxMigDeviceCount(host, device: Handle, count: Out<c_uint>) {
        // Seven GPU instances are the most that any GPU with MIG can be cut into.
        count.put(if device.gpu(host)?.mig.is_some() { 7 } else { 0 })
    }
    fn nvmlDeviceGetMigDeviceHandleByIndex(host, device: Handle, index: c_uint, mig: Out<Handle>) {
        let gpu = device.gpu(host)?;
        let (place, _) = device.place()?;
        let found = (0..migs(gpu).len())
            .filter(|&mig| mig_is_visible(gpu, &migs(gpu)[mig]))
            .nth(index as usize)
            .ok_or(NOT_FOUND)?;
        hand_out(host, place, Some(found), mig)
    }
    fn nvmlDeviceIsMigDeviceHandle(host, device: Handle, answer: Out<c_uint>) {
        answer.put(c_uint::from(matches!(device.device(host)?, Device::Mig(..))))
    }
    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(host, mig: Handle, device: Out<Handle>) {
        mig.mig(host)?;
        hand_out(host, mig.place()?.0, None, device)
    }
    fn nvmlDeviceGetGpuInstanceId(host, mig: Handle, id: Out<c_uint>) { id.put(mig.mig(host)?.gpu_instance) }
    fn nvmlDeviceGetComputeInstanceId(host, mig: Handle, id: Out<c_uint>) { id.put(mig.mig(host)?.compute_instance) }
    fn nvmlDeviceGetAttributes_v2(host, mig: Handle, attributes: Out<nvmlDeviceAttributes_t>) {
        let mig = mig.mig(host)?;
        let (compute_slices, gpu_slices) = slices(&mig.profile);
        attributes.put(nvmlDeviceAttributes_t {
            multiprocessorCount: compute_slices * 14, // of an A100's slice
            sharedCopyEngineCount: gpu_slices,
            sharedDecoderCount: 0,
            sharedEncoderCount: 0,
            sharedJpegCount: 0,
            sharedOfaCount: 0,
            gpuInstanceSliceCount: gpu_slices,
            computeInstanceSliceCount: compute_slices,
            memorySizeMB: mig.memory >> 20,
        })
    }
}
