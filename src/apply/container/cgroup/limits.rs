//! Resource limits of a container, and the cgroup files that set them.

use crate::error::{Code, Error};
use std::path::PathBuf;

/// Resource limits of a container; `None` is no limit, or the kernel's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Swap; `None` is as much as memory, as in Docker.
    pub swap: Option<Swap>,
    /// Bytes of memory that are reclaimed last.
    pub memory_reservation: Option<u64>,
    /// How readily memory is swapped out, 0 to 100. cgroup v1 only.
    pub swappiness: Option<u64>,
    /// Whether processes wait when memory runs out, instead of being killed. cgroup v1 only.
    pub oom_kill_disable: bool,
    /// Processor time.
    pub cpu: Option<CpuQuota>,
    /// Weight of processor time against other cgroups, 2 to 262144; the default is 1024.
    pub cpu_shares: Option<u64>,
    /// Processors, as the kernel's lists have them: `0-3,8`.
    pub cpuset_cpus: Option<String>,
    /// NUMA nodes.
    pub cpuset_mems: Option<String>,
    /// Weight of block I/O against other cgroups, 10 to 1000.
    pub blkio_weight: Option<u16>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// The cgroup below which the container's is made, relative to the root of each hierarchy.
    pub parent: Option<PathBuf>,
}

/// A limit on swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swap {
    /// All swap of the host.
    Unlimited,
    /// Bytes of memory and swap together.
    Total(u64),
}

/// Processor time per period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuQuota {
    /// Microseconds; `None` is no limit.
    pub quota: Option<u64>,
    /// Microseconds.
    pub period: u64,
    /// The options that set the quota, for messages.
    pub options: &'static str,
}

/// One kind of limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controller {
    /// Memory and swap.
    Memory,
    /// Processor time.
    Cpu,
    /// Processors and memory nodes.
    Cpuset,
    /// Block devices.
    Io,
    /// Processes.
    Pids,
}

/// A cgroup file and the value to write.
#[derive(Debug)]
pub struct Setting {
    /// Name of the file.
    pub file: &'static str,
    /// The value.
    pub value: String,
    /// The option to name in a warning if the file is absent.
    pub option: Option<&'static str>,
    /// Whether the file is absent on some kernels.
    pub may_be_absent: bool,
}

fn setting(file: &'static str, value: &impl ToString) -> Setting {
    Setting { file, value: value.to_string(), option: None, may_be_absent: false }
}

impl Controller {
    /// Every one.
    pub const ALL: [Self; 5] = [Self::Memory, Self::Cpu, Self::Cpuset, Self::Io, Self::Pids];

    /// The kernel's name.
    pub fn name(self, unified: bool) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Cpuset => "cpuset",
            Self::Io if unified => "io",
            Self::Io => "blkio",
            Self::Pids => "pids",
        }
    }

    /// The options that ask for these limits.
    pub fn options(self, limits: &Limits) -> String {
        let all: &[(bool, &str)] = match self {
            Self::Memory => &[
                (limits.memory.is_some(), "--memory"),
                (limits.swap.is_some(), "--memory-swap"),
                (limits.memory_reservation.is_some(), "--memory-reservation"),
                (limits.swappiness.is_some(), "--memory-swappiness"),
                (limits.oom_kill_disable, "--oom-kill-disable"),
            ],
            Self::Cpu => &[
                (limits.cpu.is_some(), limits.cpu.map_or("", |cpu| cpu.options)),
                (limits.cpu_shares.is_some(), "--cpu-shares"),
            ],
            Self::Cpuset => &[
                (limits.cpuset_cpus.is_some(), "--cpuset-cpus"),
                (limits.cpuset_mems.is_some(), "--cpuset-mems"),
            ],
            Self::Io => &[(limits.blkio_weight.is_some(), "--blkio-weight")],
            Self::Pids => &[(limits.pids.is_some(), "--pids-limit")],
        };
        all.iter().filter(|(given, _)| *given).map(|(_, option)| *option).collect::<Vec<_>>().join(" and ")
    }

    /// Whether `limits` use this controller.
    pub fn is_limited(self, limits: &Limits) -> bool {
        !self.options(limits).is_empty()
    }

    /// The settings of this controller in cgroup v2 (else v1), as runc writes them. The order matters: v1 refuses a limit on
    /// memory and swap below the limit on memory.
    pub fn settings(self, limits: &Limits, unified: bool) -> Vec<Setting> {
        let settings: Vec<Option<Setting>> = match (self, unified) {
            (Self::Memory, true) => memory(limits),
            (Self::Memory, false) => legacy_memory(limits),
            (Self::Cpu, true) => vec![
                limits.cpu.map(|CpuQuota { quota, period, .. }| {
                    let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
                    setting("cpu.max", &format!("{quota} {period}"))
                }),
                // The whole range of v1 maps to the whole range of v2 (KEP 2254, as in runc).
                limits.cpu_shares.map(|shares| setting("cpu.weight", &(1 + (shares - 2) * 9999 / 262_142))),
            ],
            (Self::Cpu, false) => vec![
                limits.cpu.map(|cpu| setting("cpu.cfs_period_us", &cpu.period)),
                limits.cpu.and_then(|cpu| cpu.quota).map(|quota| setting("cpu.cfs_quota_us", &quota)),
                limits.cpu_shares.map(|shares| setting("cpu.shares", &shares)),
            ],
            (Self::Cpuset, _) => vec![
                limits.cpuset_cpus.as_ref().map(|list| setting("cpuset.cpus", list)),
                limits.cpuset_mems.as_ref().map(|list| setting("cpuset.mems", list)),
            ],
            (Self::Io, _) => vec![limits.blkio_weight.map(|weight| Setting {
                option: Some("--blkio-weight"),
                may_be_absent: true,
                ..if unified {
                    setting("io.weight", &(1 + (u32::from(weight) - 10) * 9999 / 990))
                } else {
                    setting("blkio.bfq.weight", &weight)
                }
            })],
            (Self::Pids, _) => vec![limits.pids.map(|pids| setting("pids.max", &pids))],
        };
        settings.into_iter().flatten().collect()
    }

    /// A failure to set its limits.
    pub fn failed(self, limits: &Limits, cause: impl std::fmt::Display) -> Error {
        Error::new(Code::Limit, format!("the limit of {} cannot be set", self.options(limits))).cause(cause)
    }
}

fn memory(limits: &Limits) -> Vec<Option<Setting>> {
    // v2 counts swap alone.
    let swap = limits.memory.map(|bytes| match limits.swap {
        None => bytes.to_string(),
        Some(Swap::Unlimited) => "max".to_owned(),
        Some(Swap::Total(total)) => total.saturating_sub(bytes).to_string(),
    });
    vec![
        limits.memory.map(|bytes| setting("memory.max", &bytes)),
        // Absent on a kernel that does not account swap. The limit on memory works without it.
        swap.map(|value| Setting { may_be_absent: true, ..setting("memory.swap.max", &value) }),
        limits.memory_reservation.map(|bytes| setting("memory.low", &bytes)),
    ]
}

fn legacy_memory(limits: &Limits) -> Vec<Option<Setting>> {
    // v1 counts memory and swap together.
    let both = limits.memory.map(|bytes| match limits.swap {
        None => bytes.saturating_mul(2).to_string(),
        Some(Swap::Unlimited) => "-1".to_owned(),
        Some(Swap::Total(total)) => total.to_string(),
    });
    vec![
        limits.memory.map(|bytes| setting("memory.limit_in_bytes", &bytes)),
        both.map(|value| Setting { may_be_absent: true, ..setting("memory.memsw.limit_in_bytes", &value) }),
        limits.memory_reservation.map(|bytes| setting("memory.soft_limit_in_bytes", &bytes)),
        limits.swappiness.map(|number| setting("memory.swappiness", &number)),
        limits.oom_kill_disable.then(|| setting("memory.oom_control", &1)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(limits: &Limits, unified: bool) -> Vec<String> {
        let settings = Controller::ALL.iter().flat_map(|one| one.settings(limits, unified));
        settings.map(|setting| format!("{} {}", setting.file, setting.value)).collect()
    }

    #[test]
    fn cgroups_get_the_values_that_docker_writes() {
        let cpu = CpuQuota { quota: Some(50_000), period: 100_000, options: "--cpus" };
        let limits = Limits { memory: Some(4096), cpu: Some(cpu), pids: Some(7), ..Limits::default() };
        assert_eq!(
            written(&limits, true),
            ["memory.max 4096", "memory.swap.max 4096", "cpu.max 50000 100000", "pids.max 7"]
        );
        let limits = Limits {
            memory: Some(4096),
            swap: Some(Swap::Total(6144)),
            memory_reservation: Some(2048),
            cpu_shares: Some(512),
            cpuset_cpus: Some("0,1".into()),
            cpuset_mems: Some("0".into()),
            blkio_weight: Some(500),
            ..Limits::default()
        };
        assert_eq!(
            written(&limits, true),
            [
                "memory.max 4096",
                "memory.swap.max 2048",
                "memory.low 2048",
                "cpu.weight 20",
                "cpuset.cpus 0,1",
                "cpuset.mems 0",
                "io.weight 4950"
            ]
        );
        assert_eq!(
            written(&limits, false),
            [
                "memory.limit_in_bytes 4096",
                "memory.memsw.limit_in_bytes 6144",
                "memory.soft_limit_in_bytes 2048",
                "cpu.shares 512",
                "cpuset.cpus 0,1",
                "cpuset.mems 0",
                "blkio.bfq.weight 500"
            ]
        );
        let unlimited = Limits { memory: Some(4096), swap: Some(Swap::Unlimited), ..Limits::default() };
        assert_eq!(written(&unlimited, true)[1], "memory.swap.max max");
        assert_eq!(written(&unlimited, false)[1], "memory.memsw.limit_in_bytes -1");
        for unified in [true, false] {
            assert!(written(&Limits::default(), unified).is_empty());
        }
    }
}
