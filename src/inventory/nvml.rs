//! NVML's facts. A static program cannot load the driver's library, so a second program, `gpurun-nvml`, does and prints
//! them as JSON; this module is what passes between the two, and the running of it.

use super::types::{HostPath, MigResources};
use crate::{
    error::{Code, Error, OrFail, Result},
    programs,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What NVML answers. An absent fact is one that this driver or this GPU does not know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Facts {
    /// The kernel module's version, as NVML sees it.
    pub driver_version: String,
    /// CUDA's version as CUDA writes it: 12040 is 12.4.
    pub cuda_version: Option<u32>,
    /// Every GPU that NVML counts, index ascending.
    pub gpus: Vec<Gpu>,
}

/// A GPU that NVML counts.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gpu {
    /// It answers.
    Answers(Box<AnsweringGpu>),
    /// It does not.
    Lost(LostGpu),
}

/// What NVML knows of a GPU that answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct AnsweringGpu {
    /// NVML's index.
    pub index: u32,
    /// The N of /dev/nvidiaN.
    pub minor: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// PCI address in sysfs' form.
    pub pci: String,
    /// Product name.
    pub name: Option<String>,
    /// Brand, one lower-case word.
    pub brand: Option<String>,
    /// Architecture's name.
    pub architecture: Option<String>,
    /// CUDA compute capability.
    pub compute_capability: Option<(u32, u32)>,
    /// Bytes.
    pub memory: Option<u64>,
    /// Persistence mode.
    pub persistence: Option<bool>,
    /// It knows MIG mode.
    #[serde(default)]
    pub mig_capable: bool,
    /// MIG mode is on.
    pub mig_enabled: bool,
    /// MIG devices.
    pub mig_devices: Vec<MigDevice>,
    /// Number of NVLinks that are up, by the PCI address of the other end.
    pub nvlinks: BTreeMap<String, u32>,
    /// How near each other GPU is over PCIe, by its uuid.
    pub topology: BTreeMap<String, String>,
    /// The NVLink fabric of several machines that it is part of, `CLUSTER-UUID.CLIQUE`.
    #[serde(default)]
    pub clique: Option<String>,
    /// It is a hypervisor's vGPU.
    #[serde(default)]
    pub vgpu: bool,
}

/// What is known of a GPU that does not answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct LostGpu {
    /// NVML's index.
    pub index: u32,
    /// `GPU-…`, where NVML still has it.
    pub uuid: Option<String>,
    /// PCI address in sysfs' form, where NVML still has it.
    pub pci: Option<String>,
    /// Why, in NVML's words.
    pub words: String,
}

/// A MIG device.
#[derive(Debug, Serialize, Deserialize)]
pub struct MigDevice {
    /// The `j` of `i:j`.
    pub index: u32,
    /// `MIG-…`.
    pub uuid: String,
    /// GPU instance id.
    pub gpu_instance: u32,
    /// Compute instance id.
    pub compute_instance: u32,
    /// `1g.5gb`.
    pub profile: Option<String>,
    /// Bytes.
    pub memory: Option<u64>,
    /// The rest of its part of the GPU.
    #[serde(default)]
    pub resources: Option<MigResources>,
}

/// What `gpurun-nvml --watch` prints, one a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// The driver reports an error.
    Xid {
        /// The GPU's.
        uuid: String,
        /// Its number.
        xid: u64,
        /// The MIG instance that it is about: GPU instance and, where it is about one of those, compute instance.
        instance: Option<(u32, Option<u32>)>,
    },
    /// A GPU does not answer any more.
    Lost {
        /// The GPU's.
        uuid: String,
        /// Why, in NVML's words.
        words: String,
    },
    /// One that did not answers.
    Answers {
        /// The GPU's.
        uuid: String,
    },
    /// NVML does not say what happens to this one.
    Unwatched {
        /// The GPU's.
        uuid: String,
        /// Why, in NVML's words.
        words: String,
    },
    /// Nothing has happened.
    Quiet,
}

/// How long `gpurun-nvml --watch` is silent at most.
pub const QUIET: Duration = Duration::from_secs(10);

/// Compute modes, by nvidia-smi's names: one process may compute on the GPU.
pub const EXCLUSIVE_PROCESS: &str = "EXCLUSIVE_PROCESS";
/// Any number of them may.
pub const DEFAULT: &str = "DEFAULT";

/// The program that reads NVML.
pub const READER: &str = "gpurun-nvml";
/// After so long the user is told what the wait is for: without persistence the driver initialises each GPU in 1–3 s.
const SLOW: Duration = Duration::from_secs(3);
/// After so long there is no hope left.
pub const HOPELESS: Duration = Duration::from_secs(120);
/// Eight GPUs have 10 kB of facts.
const OUTPUT_LIMIT: usize = 8 << 20;

/// Finds the reader.
///
/// # Errors
/// [`Code::NvmlFailed`] when it is not there.
pub fn find_reader() -> Result<PathBuf> {
    programs::find(READER, Code::NvmlFailed)
}

/// Runs the reader on the driver's libraries and waits for its answer.
///
/// # Errors
/// What the reader says (NVML's own failures), or [`Code::NvmlFailed`] when it does not answer within two minutes.
pub fn read(reader: &Path, nvml: &HostPath, cuda: Option<&HostPath>) -> Result<Facts> {
    let mut child = Command::new(reader)
        .arg(&nvml.0)
        .args(cuda.map(|cuda| &cuda.0))
        // The driver's library obeys variables (__NVML_DBG_*, LD_*); it gets none of the user's.
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .or_fail(Code::NvmlFailed, || format!("{} cannot be run", reader.display()))?;
    let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Error::new(Code::Internal, format!("{} has no pipes", reader.display())));
    };
    let (mut answer, mut complaint) = (Vec::new(), Vec::new());
    let (mut out_open, mut err_open) = (true, true);
    let start = Instant::now();
    let mut told = false;
    while out_open || err_open {
        let waited = start.elapsed();
        if waited >= HOPELESS {
            // Not waited for: a process that the driver keeps in the kernel does not die.
            let _ = child.kill();
            return Err(Error::new(Code::NvmlFailed, format!("the driver did not answer within {} seconds", HOPELESS.as_secs()))
                .cause(format!("NVML ({}) does not return", nvml.0.display()))
                .fix("look for NVRM messages in `dmesg`; a GPU that hangs needs a reset (`nvidia-smi -r`) or a reboot"));
        }
        if waited >= SLOW && !told {
            told = true;
            tracing::warn!(
                "the NVIDIA driver is slow to initialise; still waiting. It stays initialised when nvidia-persistenced runs \
                 (`systemctl enable --now nvidia-persistenced`) or with `nvidia-smi -pm 1`"
            );
        }
        let limit = if told { HOPELESS } else { SLOW }.saturating_sub(waited);
        let timeout = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(1),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let wanted = |open| if open { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(&out, wanted(out_open)), PollFd::new(&err, wanted(err_open))];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).or_fail(Code::Internal, || "poll on the reader's pipes"),
        }
        let ready = fds.map(|fd| !fd.revents().is_empty());
        out_open = out_open && (!ready[0] || more(&mut out, &mut answer)?);
        err_open = err_open && (!ready[1] || more(&mut err, &mut complaint)?);
    }
    let status = child.wait().or_fail(Code::Internal, || format!("waiting for {}", reader.display()))?;
    understand(&answer).unwrap_or_else(|| {
        let complaint = String::from_utf8_lossy(&complaint);
        Err(Error::new(
            Code::NvmlFailed,
            format!("the driver's library {} does not answer", nvml.0.display()),
        )
        .cause(format!("{READER} ended with {status}: {}", complaint.trim()))
        .fix("reinstall the driver; `nvidia-smi` should work on this host"))
    })
}

/// Reads what is there; false at the end.
fn more(pipe: &mut impl Read, into: &mut Vec<u8>) -> Result<bool> {
    let mut buffer = [0; 16 * 1024];
    let size = match pipe.read(&mut buffer) {
        Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(true),
        other => other.or_fail(Code::Internal, || format!("reading the answer of {READER}"))?,
    };
    into.extend_from_slice(buffer.get(..size).unwrap_or_default());
    if into.len() > OUTPUT_LIMIT {
        return Err(Error::new(Code::NvmlFailed, format!("{READER} does not stop talking")));
    }
    Ok(size > 0)
}

/// The facts or the failure that the reader printed; `None` for anything else.
fn understand(answer: &[u8]) -> Option<Result<Facts>> {
    if let Ok(facts) = serde_json::from_slice(answer) {
        return Some(Ok(facts));
    }
    Some(Err(Error::from_json(&serde_json::from_slice(answer).ok()?)?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Makes a reader of a shell script. Another process writes it: what this one has open for writing, a child of another
    /// test may hold open, too, and then nobody can run it (ETXTBSY).
    pub(in crate::inventory) fn script(reader: &Path, script: &str) {
        let text = reader.with_extension("text");
        std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        assert!(
            Command::new("install").args(["-m", "755"]).args([&text, reader]).status().unwrap().success()
        );
    }

    fn answer_of(commands: &str) -> Result<Facts> {
        let dir = tempfile::tempdir().unwrap();
        let reader = dir.path().join(READER);
        script(&reader, commands);
        read(&reader, &HostPath("/lib/nvml".into()), Some(&HostPath("/lib/cuda".into())))
    }

    #[test]
    fn the_reader_gets_two_paths_and_nothing_of_the_users() {
        let facts = answer_of(
            r#"[ "$1 $2 $#" = "/lib/nvml /lib/cuda 2" ] || exit 9
               [ -z "$HOME$USER$CARGO" ] || exit 8
               read line && exit 7
               echo noise >&2
               echo '{"driver_version":"550.1","cuda_version":12040,"gpus":[{"lost":{"index":3,"words":"gone"}}]}'"#,
        )
        .unwrap();
        assert_eq!(facts.cuda_version, Some(12040));
        assert!(matches!(&facts.gpus[..], [Gpu::Lost(LostGpu { index: 3, uuid: None, .. })]));
    }

    #[test]
    fn a_failure_of_the_reader_arrives_as_it_was() {
        let error = answer_of(r#"echo '{"error":"GPU-0013","what":"w","cause":"c","fix":"f"}'; exit 125"#)
            .unwrap_err();
        assert_eq!(error.to_string(), "error[GPU-0013]: w\n  cause: c\n  fix: f");
    }

    #[test]
    fn a_reader_that_dies_or_raves_is_a_failure_with_its_words() {
        let error = answer_of("echo 'symbol lookup error' >&2; kill -SEGV $$").unwrap_err();
        assert_eq!(error.code(), Code::NvmlFailed);
        assert!(error.cause_line().contains("symbol lookup error"), "{error}");
        assert_eq!(answer_of("echo '{}'").unwrap_err().code(), Code::NvmlFailed);
        assert_eq!(answer_of("exec cat /dev/zero").unwrap_err().code(), Code::NvmlFailed);
        assert_eq!(
            read(Path::new("/nowhere"), &HostPath("/".into()), None).unwrap_err().code(),
            Code::NvmlFailed
        );
    }
}
