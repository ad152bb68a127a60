//! `gpurun demo`: the main job on this machine, with what the container saw. Where there is no driver, on a host that is
//! simulated, and it says so.

use super::Context;
use crate::{
    cli::Demo,
    error::{Code, Error, OrFail, Result},
    inventory::{Host, Inventory, nvml},
    out, own_directory,
    simulated_host::{Description, DriverFiles, lay_out},
};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The hosts that can be simulated, as `integration/hosts` describes them.
const HOSTS: [(&str, &str); 6] = [
    ("8xh100", include_str!("../../integration/hosts/8xh100.json")),
    ("a100-mig", include_str!("../../integration/hosts/a100-mig.json")),
    ("t4", include_str!("../../integration/hosts/t4.json")),
    ("one-lost-gpu", include_str!("../../integration/hosts/one-lost-gpu.json")),
    ("old-driver", include_str!("../../integration/hosts/old-driver.json")),
    ("slow-init", include_str!("../../integration/hosts/slow-init.json")),
];

/// Runs it.
pub fn run(context: Context, args: &Demo) -> Result<u8> {
    let own = std::env::current_exe().or_fail(Code::Internal, || "/proc/self/exe cannot be read")?;
    let stand_ins = own.parent().unwrap_or(Path::new("/"));
    let simulate = match (&args.simulate, &args.keep) {
        (Some(name), _) => Some(name.as_str()),
        (None, Some(_)) => Some("8xh100"),
        (None, None) => match Inventory::read(&context.host) {
            Ok(_) => None,
            Err(error) if error.code() == Code::NoDriver => Some("8xh100"),
            Err(error) => return Err(error),
        },
    };
    let simulated = simulate.map(|name| Simulated::new(name, args.keep.as_deref(), stand_ins)).transpose()?;
    let host = simulated.as_ref().map(|simulated| simulated.dir.as_path());
    if let (Some(dir), Some(name)) = (host, simulate) {
        out!("This is a simulated host ({name}): no GPU here is real. Its files are in {}.", dir.display())?;
    }
    if args.keep.is_some() {
        let dir = host.map(Path::display);
        out!(
            "Use it:  GPURUN_SIMULATED_HOST={} gpurun --gpus all host: nvidia-smi",
            dir.map_or_else(String::new, |d| d.to_string())
        )?;
        return Ok(0);
    }
    let inventory = Inventory::read(&host.map_or(context.host, Host::simulated))?;
    out!(
        "The host has driver {} (CUDA up to {}) and {} GPUs.\n",
        inventory.driver.version,
        inventory.driver.cuda,
        inventory.gpus.len()
    )?;
    out!("$ gpurun --gpus all host: gpurun-nvml --probe")?;
    let (first, seen) = probe(&own, host)?;
    let mut warm = (0..5).map(|_| start_true(&own, host)).collect::<Result<Vec<_>>>()?;
    warm.sort();
    report(&seen)?;
    out!(
        "  time        {} ms with the program above, {} ms for /bin/true (median of 5)",
        millis(first),
        millis(warm[warm.len() / 2])
    )?;
    let missing = seen["gpus"].as_array().map_or(0, Vec::len) != inventory.gpus.len()
        && !inventory.gpus.iter().any(|gpu| gpu.mig_enabled);
    if missing {
        return Err(Error::new(Code::GpuLost, "the container does not see every GPU of the host")
            .cause(&seen["nvml_error"]));
    }
    Ok(0)
}

/// The files of a simulated driver, which lie beside gpurun's own program.
const STAND_INS: [&str; 3] = ["libsimulated_nvml.so", "libsimulated_cuda.so", "simulated-nvidia-smi"];

fn empty(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

struct Simulated {
    dir: PathBuf,
    temporary: bool,
}

impl Simulated {
    fn new(name: &str, keep: Option<&Path>, stand_ins: &Path) -> Result<Self> {
        let (_, text) = HOSTS.into_iter().find(|(known, _)| *known == name).ok_or_else(|| {
            Error::new(Code::Usage, format!("there is no simulated host {name:?}"))
                .fix(format!("choose from {}", HOSTS.map(|(n, _)| n).join(", ")))
        })?;
        let description: Description =
            serde_json::from_str(text).or_fail(Code::Internal, || "the description is damaged")?;
        // packaging/install leaves these out: a simulated driver must not lie beside a real one.
        if let Some(missing) = STAND_INS.into_iter().find(|name| !stand_ins.join(name).exists()) {
            return Err(Error::new(Code::Usage, "the simulated driver of gpurun demo is not installed")
                .cause(format!("{} does not exist", stand_ins.join(missing).display()))
                .fix("run it from the source tree: packaging/build, and dist/gpurun demo; `gpurun doctor` checks this machine"));
        }
        let dir = match keep {
            Some(dir) => dir.to_path_buf(),
            // An unguessable name, without access for others: libraries there run as the caller.
            None => nix::unistd::mkdtemp(&own_directory::temporary().join("gpurun-demo-XXXXXX"))
                .or_fail(Code::Internal, || "no temporary directory can be made")?,
        };
        let is_new = !dir.exists();
        let was_empty = is_new || std::fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_none());
        let simulated = Self { dir, temporary: keep.is_none() };
        let laid_out = lay_out(&simulated.dir, &description, stand_ins, DriverFiles::StandIns);
        if laid_out.is_err() && !simulated.temporary && was_empty {
            // A partial host is removed; an existing directory is emptied and kept.
            let _ = if is_new { std::fs::remove_dir_all(&simulated.dir) } else { empty(&simulated.dir) };
        }
        laid_out.map_err(|error| {
            error.fix("name a new or empty directory that you may write: gpurun demo --keep ./simulated-host")
        })?;
        Ok(simulated)
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        if self.temporary {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn gpurun(own: &Path, host: Option<&Path>) -> Command {
    let mut command = Command::new(own);
    if let Some(host) = host {
        command.env("GPURUN_SIMULATED_HOST", host);
    }
    command.args(["run", "--gpus", "all"]);
    command
}

/// The main job: a program in a container that loads the driver's libraries as any program does.
fn probe(own: &Path, host: Option<&Path>) -> Result<(Duration, Value)> {
    let reader = nvml::find_reader()?;
    let started = Instant::now();
    let output = gpurun(own, host)
        .arg("-v")
        .arg(format!("{}:/usr/local/bin/{}:ro", reader.display(), nvml::READER))
        .args(["host:", nvml::READER, "--probe"])
        .stderr(Stdio::inherit())
        .output()
        .or_fail(Code::Internal, || "gpurun cannot start itself")?;
    let took = started.elapsed();
    if !output.status.success() {
        return Err(Error::new(Code::Internal, "the container ended with a failure").cause(output.status));
    }
    let seen = serde_json::from_slice(&output.stdout)
        .or_fail(Code::Internal, || "the program in the container did not answer")?;
    Ok((took, seen))
}

fn start_true(own: &Path, host: Option<&Path>) -> Result<Duration> {
    let started = Instant::now();
    let status = gpurun(own, host)
        .args(["host:", "true"])
        .status()
        .or_fail(Code::Internal, || "gpurun cannot start itself")?;
    if status.success() {
        Ok(started.elapsed())
    } else {
        Err(Error::new(Code::Internal, "/bin/true failed in the container").cause(status))
    }
}

fn report(seen: &Value) -> Result<()> {
    out!("The container saw:")?;
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    for gpu in seen["gpus"].as_array().into_iter().flatten() {
        out!("  GPU {:<7} {}  {}", text(&gpu["index"]), text(&gpu["uuid"]), text(&gpu["name"]))?;
    }
    for library in seen["libraries"].as_array().into_iter().flatten() {
        out!("  library     {}", text(library))?;
    }
    match &seen["libcuda"]["cuda_version"] {
        Value::String(version) => out!("  CUDA        {version}, as libcuda answers")?,
        _ => out!("  CUDA        {}", text(&seen["libcuda"]["error"]))?,
    }
    out!("  /dev/shm    {} MiB", seen["shm_bytes"].as_u64().unwrap_or(0) >> 20)?;
    let writable = if seen["home_writable"].as_bool() == Some(true) { "writable" } else { "not writable" };
    out!("  user        uid {} gid {}, HOME {} ({writable})", seen["uid"], seen["gid"], text(&seen["home"]))
}

fn millis(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64() * 1000.0)
}
