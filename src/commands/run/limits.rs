//! `--ulimit`, and the limits of the container's cgroup.

use super::{sizes::size, usage};
use crate::{
    apply::container::{
        cgroup::{CpuQuota, Limits, Swap},
        spec::Rlimit,
    },
    cli::{Resources, Run},
    error::{Code, OrFail, Result},
};
use nix::sys::resource::{Resource, getrlimit};
use std::path::PathBuf;

/// The smallest memory limit of Docker, in bytes.
const LEAST_MEMORY: u64 = 6 << 20;
/// The kernel's default period and Docker's, in microseconds.
const PERIOD: u64 = 100_000;

/// The limits of the container's cgroup, by Docker's rules (daemon/daemon_unix.go, verifyPlatformContainerResources).
///
/// # Errors
/// [`Code::Usage`] for values that the kernel or Docker refuses.
pub fn limits(args: &Run) -> Result<Limits> {
    let typed = &args.resources;
    let memory = bytes("--memory", typed.memory.as_deref())?;
    let memory_reservation = bytes("--memory-reservation", typed.memory_reservation.as_deref())?;
    for (option, limit) in [("--memory", memory), ("--memory-reservation", memory_reservation)] {
        if limit.is_some_and(|limit| limit < LEAST_MEMORY) {
            return Err(usage(format!("{option}: a container needs 6 MiB at least"))
                .fix(format!("write {option} 6m or more")));
        }
    }
    if let (Some(memory), Some(reservation)) = (memory, memory_reservation)
        && memory < reservation
    {
        return Err(usage("--memory is below --memory-reservation")
            .fix("raise --memory, or lower --memory-reservation"));
    }
    Ok(Limits {
        memory,
        swap: swap(typed, memory)?,
        memory_reservation,
        swappiness: match typed.memory_swappiness {
            None | Some(-1) => None,
            Some(number) => Some(in_range("--memory-swappiness", number, 0, 100)?),
        },
        oom_kill_disable: typed.oom_kill_disable,
        cpu: cpu(typed)?,
        // The kernel's bounds, which Docker relies on.
        cpu_shares: match typed.cpu_shares {
            None | Some(0) => None,
            Some(shares) => Some(in_range("--cpu-shares", shares, 0, i64::MAX)?.clamp(2, 262_144)),
        },
        cpuset_cpus: list("--cpuset-cpus", typed.cpuset_cpus.as_deref())?,
        cpuset_mems: list("--cpuset-mems", typed.cpuset_mems.as_deref())?,
        blkio_weight: match typed.blkio_weight {
            None | Some(0) => None,
            Some(weight) => {
                in_range("--blkio-weight", weight.into(), 10, 1000)?;
                Some(weight)
            }
        },
        pids: typed.pids_limit.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0),
        parent: args.cgroup_parent.as_deref().map(parent).transpose()?.flatten(),
    })
}

fn bytes(option: &str, text: Option<&str>) -> Result<Option<u64>> {
    Ok(text.map(|text| size(option, text)).transpose()?.filter(|&bytes| bytes > 0))
}

fn in_range(option: &str, number: i64, least: i64, most: i64) -> Result<u64> {
    let bad = || {
        let range = if most == i64::MAX {
            format!("{least} or more")
        } else {
            format!("a number from {least} to {most}")
        };
        usage(format!("{option} {number} is out of range")).fix(format!("write {range}: {option} {least}"))
    };
    u64::try_from(number).ok().filter(|_| (least..=most).contains(&number)).ok_or_else(bad)
}

fn swap(typed: &Resources, memory: Option<u64>) -> Result<Option<Swap>> {
    let Some(text) = typed.memory_swap.as_deref() else { return Ok(None) };
    let swap = match text {
        "-1" => Some(Swap::Unlimited),
        text => bytes("--memory-swap", Some(text))?.map(Swap::Total),
    };
    match (swap, memory) {
        (Some(Swap::Total(_)), None) => {
            Err(usage("--memory-swap counts memory and swap together, and there is no --memory")
                .fix("add --memory, which is at most as large"))
        }
        (Some(Swap::Total(total)), Some(memory)) if total < memory => {
            Err(usage("--memory-swap is below --memory")
                .fix("--memory-swap counts memory and swap together: raise it"))
        }
        (swap, _) => Ok(swap),
    }
}

fn cpu(typed: &Resources) -> Result<Option<CpuQuota>> {
    if let Some(cpus) = typed.cpus {
        if typed.cpu_period.is_some_and(|n| n != 0) || typed.cpu_quota.is_some_and(|n| n != 0) {
            return Err(usage("--cpus cannot be used together with --cpu-period or --cpu-quota")
                .fix("leave --cpus out, or write it alone"));
        }
        if cpus == 0.0 {
            return Ok(None);
        }
        // The kernel's smallest quota is one millisecond in 100.
        if !(cpus.is_finite() && (0.01..=1_000_000.0).contains(&cpus)) {
            return Err(usage(format!("--cpus {cpus} is out of range")).fix("write 0.01 or more: --cpus 1.5"));
        }
        // In range, so neither the sign nor the size is lost.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let quota = (cpus * PERIOD as f64).round() as u64;
        return Ok(Some(CpuQuota { quota: Some(quota), period: PERIOD, options: "--cpus" }));
    }
    let (period, quota) = (typed.cpu_period.unwrap_or(0), typed.cpu_quota.unwrap_or(0));
    if period == 0 && quota <= 0 {
        return Ok(None);
    }
    let options = match (period, quota) {
        (0, _) => "--cpu-quota",
        (_, 0) => "--cpu-period",
        _ => "--cpu-period and --cpu-quota",
    };
    let period = if period == 0 { PERIOD } else { in_range("--cpu-period", period, 1000, 1_000_000)? };
    let quota = if quota <= 0 { None } else { Some(in_range("--cpu-quota", quota, 1000, i64::MAX)?) };
    Ok(Some(CpuQuota { quota, period, options }))
}

/// A list of processors or memory nodes, `0-3,8`.
fn list(option: &str, text: Option<&str>) -> Result<Option<String>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let number =
        |text: &str| text.parse::<u32>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    let is_range = |part: &str| match part.split_once('-') {
        Some((first, last)) => number(first).zip(number(last)).is_some_and(|(first, last)| first <= last),
        None => number(part).is_some(),
    };
    if text.split(',').all(is_range) {
        return Ok(Some(text.to_owned()));
    }
    Err(usage(format!("{option} {text:?} is not a list"))
        .fix(format!("write numbers and ranges: {option} 0-3,8; `lscpu -e` shows them")))
}

/// `--cgroup-parent`, relative to the root of the hierarchies. The name of a slice contains its parent slices
/// (systemd.slice(5)).
fn parent(text: &str) -> Result<Option<PathBuf>> {
    let relative = text.trim_matches('/');
    if relative.split('/').any(|part| part == ".." || part == ".") || relative.contains('\0') {
        return Err(usage(format!("--cgroup-parent {text:?} is not the path of a cgroup")).fix(
            "write a path below the root of the hierarchies: /jobs/training, or a slice: jobs-training.slice",
        ));
    }
    if relative.is_empty() {
        return Ok(None);
    }
    let Some(slice) = relative.strip_suffix(".slice").filter(|slice| !slice.contains('/')) else {
        return Ok(Some(relative.into()));
    };
    let ends = slice.match_indices('-').map(|(at, _)| at).chain([slice.len()]);
    Ok(Some(ends.map(|end| format!("{}.slice", &slice[..end])).collect()))
}

/// Docker's names (go-units ulimit.go) for the kernel's limits.
const LIMITS: [(&str, Resource); 15] = [
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

/// The default limit on descriptors: programs that close every possible descriptor take seconds if the limit is 10⁹, as
/// systemd sets it for daemons.
const NOFILE: u64 = 1_048_576;

/// Defaults for GPU programs (locked memory for RDMA and NCCL), overridden by `--ulimit`.
pub fn rlimits(typed: &[String]) -> Result<Vec<Rlimit>> {
    let mut limits = vec![
        Rlimit {
            resource: Resource::RLIMIT_MEMLOCK,
            name: "memlock",
            soft: u64::MAX,
            hard: u64::MAX,
            required: false,
        },
        Rlimit {
            resource: Resource::RLIMIT_NOFILE,
            name: "nofile",
            soft: NOFILE,
            hard: NOFILE,
            required: false,
        },
    ];
    for text in typed {
        let limit = rlimit(text)?;
        limits.retain(|other| other.resource != limit.resource);
        limits.push(limit);
    }
    Ok(limits)
}

fn rlimit(text: &str) -> Result<Rlimit> {
    let bad = || {
        let names = LIMITS.map(|(name, _)| name).join(", ");
        usage(format!("--ulimit {text:?} is not NAME=SOFT[:HARD]"))
            .fix(format!("names are {names}; -1 is as high as permitted"))
    };
    let (name, value) = text.split_once('=').ok_or_else(bad)?;
    let (name, resource) = LIMITS.into_iter().find(|(known, _)| *known == name).ok_or_else(bad)?;
    let number = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        _ => text.parse::<u64>().map_err(|_| bad()),
    };
    let (soft, hard) = value.split_once(':').unwrap_or((value, value));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(usage(format!("--ulimit {text:?}: the soft limit is above the hard one"))
            .fix(format!("write --ulimit {name}=SOFT:HARD with a HARD of at least SOFT")));
    }
    let permitted = permitted(resource)?;
    if hard == u64::MAX && permitted < u64::MAX {
        tracing::warn!(
            "--ulimit {text}: the limit is {permitted}, as high as is permitted here; to raise it start gpurun as root or raise the hard \
             limit (ulimit -H, /etc/security/limits.conf)"
        );
        // -1 asks for the permitted maximum.
        return Ok(Rlimit { resource, name, soft: soft.min(permitted), hard: permitted, required: true });
    }
    Ok(Rlimit { resource, name, soft, hard, required: true })
}

/// The highest limit that this process may set. Raising its hard limit needs a capability (getrlimit(2)), which root of an
/// enclosing container may lack. The kernel always refuses `RLIM_INFINITY` for files (fs.nr_open).
fn permitted(resource: Resource) -> Result<u64> {
    let may_raise =
        caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_RESOURCE).unwrap_or(false);
    if may_raise && resource != Resource::RLIMIT_NOFILE {
        return Ok(u64::MAX);
    }
    let (_, hard) = getrlimit(resource).or_fail(Code::Internal, || "getrlimit failed")?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::run::tests::run;
    use proptest::prelude::*;

    #[test]
    fn limits_are_dockers() {
        let limits = rlimits(&["nofile=1024:2048".into(), "memlock=-1".into()]).unwrap();
        assert_eq!(limits.len(), 2);
        assert_eq!(limits[1].hard, permitted(Resource::RLIMIT_MEMLOCK).unwrap());
        assert_eq!(
            (limits[0].name, limits[0].soft, limits[0].hard, limits[0].required),
            ("nofile", 1024, 2048, true)
        );
        for text in ["nofile", "files=1", "nofile=2:1", "nofile=x"] {
            assert!(!rlimits(&[text.into()]).unwrap_err().fix_line().is_empty(), "{text}");
        }
    }

    #[test]
    fn limits_of_the_cgroup_are_dockers() {
        let of = |words: &[&str]| limits(&run(words)).unwrap();
        assert_eq!(of(&[]), Limits::default());
        assert_eq!(
            of(&["--memory", "0", "--cpus", "0", "--pids-limit=-1", "--cpuset-cpus", ""]),
            Limits::default()
        );
        let memory = of(&["-m", "1g", "--memory-swap", "2g", "--memory-reservation", "512m"]);
        assert_eq!(memory.swap, Some(Swap::Total(2 << 30)));
        assert_eq!(memory.memory_reservation, Some(512 << 20));
        assert_eq!(of(&["-m", "1g", "--memory-swap", "-1"]).swap, Some(Swap::Unlimited));
        assert_eq!(of(&["--cpus", "1.5"]).cpu.unwrap().quota, Some(150_000));
        let quota = of(&["--cpu-period", "50000", "--cpu-quota", "25000"]).cpu.unwrap();
        assert_eq!((quota.quota, quota.period), (Some(25_000), 50_000));
        assert_eq!(of(&["--cpu-quota=-1"]).cpu, None);
        assert_eq!(of(&["-c", "1"]).cpu_shares, Some(2));
        assert_eq!(of(&["--cpuset-cpus", "0-3,8"]).cpuset_cpus.as_deref(), Some("0-3,8"));
        assert_eq!(of(&["--cgroup-parent", "/a/b/"]).parent, Some("a/b".into()));
        assert_eq!(of(&["--cgroup-parent", "a-b.slice"]).parent, Some("a.slice/a-b.slice".into()));
        for words in [
            &["-m", "1m"] as &[_],
            &["-m", "1g", "--memory-swap", "512m"],
            &["--memory-swap", "1g"],
            &["-m", "512m", "--memory-reservation", "1g"],
            &["--cpus", "0.001"],
            &["--cpus", "NaN"],
            &["--cpus=-1"],
            &["--cpus", "1", "--cpu-quota", "1000"],
            &["--cpu-period", "10"],
            &["--cpu-shares=-1"],
            &["--cpuset-cpus", "3-0"],
            &["--cpuset-mems", "a"],
            &["--blkio-weight", "5"],
            &["--memory-swappiness", "101"],
            &["--cgroup-parent", "../x"],
        ] {
            let error = limits(&run(words)).unwrap_err();
            assert!(!error.fix_line().is_empty(), "{words:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_limit_or_an_error(text in ".{0,40}") {
            let _ = rlimits(&[text]);
        }
    }
}
