//! `gpurun doctor`: the checks behind every failure, ahead of time.

use super::{Context, cdi, runtime};
use crate::{
    apply::container::{
        cgroup::Layout,
        identity::{Caller, check_subordinate_ids},
        landlock,
    },
    config::Found,
    error::{Code, Error, Result},
    inventory::Inventory,
    out, plan,
};
use serde_json::json;
use std::path::{Path, PathBuf};

struct Check {
    name: &'static str,
    /// `Err` with its code, and what to do.
    result: std::result::Result<String, (String, String, String)>,
    /// A recommendation, although nothing is wrong.
    hint: Option<&'static str>,
}

impl Check {
    fn new(name: &'static str, result: std::result::Result<String, (String, String, String)>) -> Self {
        Self { name, result, hint: None }
    }
}

/// Prints every check; 0 if nothing is wrong, 1 otherwise.
pub fn run(context: &Context, cdi_directories: &[PathBuf]) -> Result<u8> {
    let mut checks = Vec::new();
    let mut inventory = Inventory::read(&context.host);
    if let Ok(inventory) = &mut inventory {
        inventory.find_closed();
    }
    match &inventory {
        Ok(inventory) => {
            let driver = &inventory.driver;
            checks.push(Check::new("driver", Ok(format!("{}, CUDA up to {}", driver.version, driver.cuda))));
            let files = format!("{} in {}", driver.files.len(), driver.root.0.display());
            checks.push(Check::new("driver files", Ok(files)));
            let names: Vec<String> =
                inventory.gpus.iter().map(|gpu| format!("{} {}", gpu.index, gpu.name)).collect();
            checks.push(Check::new("GPUs", Ok(format!("{}: {}", names.len(), names.join(", ")))));
            let slow: Vec<String> = inventory
                .gpus
                .iter()
                .filter(|gpu| gpu.persistence == Some(false))
                .map(|gpu| gpu.index.to_string())
                .collect();
            checks.push(persistence(&slow));
            checks.extend(inventory.problems.iter().map(|problem| {
                Check::new("host", Err((problem.code.clone(), problem.what.clone(), problem.fix.clone())))
            }));
            checks.push(access(inventory));
            checks.push(dev_char(inventory));
        }
        Err(error) => {
            let what = format!("{}: {}", error.what(), error.cause_line());
            let result = Err((error.code().to_string(), what, error.fix_line().to_owned()));
            checks.push(Check::new("driver", result));
        }
    }
    checks.extend(cdi_documents(cdi_directories, &inventory)?);
    checks.extend([
        configuration(context),
        user_namespaces(),
        subordinate_ids(),
        overlay(),
        shm(),
        cgroups(),
        confinement(),
    ]);
    let bad = checks.iter().filter(|check| check.result.is_err()).count();
    if context.json {
        let all: Vec<_> = checks
            .iter()
            .map(|check| match &check.result {
                Ok(what) => json!({"check": check.name, "ok": true, "what": what, "hint": check.hint}),
                Err((code, what, fix)) => {
                    json!({"check": check.name, "ok": false, "error": code, "what": what, "fix": fix})
                }
            })
            .collect();
        out!("{:#}", json!(all))?;
    } else {
        for check in &checks {
            match &check.result {
                Ok(what) => {
                    let (word, hint) = match check.hint {
                        Some(hint) => ("hint ", format!("\n      fix: {hint}")),
                        None => ("ok   ", String::new()),
                    };
                    out!("{word} {:<16} {what}{hint}", check.name)?;
                }
                Err((code, what, fix)) => {
                    out!("wrong {:<16} [{code}] {what}\n      fix: {fix}", check.name)?;
                }
            }
        }
    }
    Ok(u8::from(bad > 0))
}

fn missing(code: &str, what: &str, fix: &str) -> std::result::Result<String, (String, String, String)> {
    Err((code.into(), what.into(), fix.into()))
}

/// What engines read that inject GPUs themselves.
fn cdi_documents(directories: &[PathBuf], inventory: &Result<Inventory>) -> Result<Vec<Check>> {
    let name = "CDI documents";
    let cdi::Checked { files, findings } = cdi::checked(directories, inventory)?;
    let runc = if files.is_empty() { Vec::new() } else { runtime::old_runc::find() };
    let old = runc.into_iter().map(|(path, version)| Check::new("runc", Err((
            Code::NoRuntime.to_string(),
            format!(
                "{} is runc {version}: before 1.1.14 a container that shares a volume at /usr/local can make it create files on the \
                 host (CVE-2024-45310), unless the distribution has patched it",
                path.display()
            ),
            "upgrade runc to 1.1.14 or later, let engines use gpurun-runtime instead of CDI, or mount no volume over /usr/local"
                .into(),
        ))));
    let old: Vec<_> = old.collect();
    if findings.is_empty() {
        let what = match files.len() {
            0 => format!("none in {}", cdi::shown(directories)),
            count => format!("{count}, nothing is wrong"),
        };
        return Ok(std::iter::once(Check::new(name, Ok(what))).chain(old).collect());
    }
    let wrong = |cdi::Finding { path, what, fix }: cdi::Finding| {
        Check::new(name, Err((Code::Cdi.to_string(), format!("{}: {what}", path.display()), fix.into())))
    };
    Ok(findings.into_iter().map(wrong).chain(old).collect())
}

/// Without persistence mode the driver initialises a GPU for its first client and releases it after the last one.
fn persistence(slow: &[String]) -> Check {
    if slow.is_empty() {
        return Check::new("persistence", Ok("the driver keeps every GPU initialised".into()));
    }
    let what = format!(
        "persistence mode is off: GPUs {} are initialised at each start, which takes seconds",
        slow.join(", ")
    );
    let hint = Some("systemctl enable --now nvidia-persistenced, or nvidia-smi -pm 1");
    Check { hint, ..Check::new("persistence", Ok(what)) }
}

/// The effective configuration file, and its keys without effect.
fn configuration(context: &Context) -> Check {
    let found = Found::open(context.config_file.as_deref());
    let what = found.and_then(|found| {
        context.config.policy()?;
        Ok(match found {
            None => "defaults".into(),
            Some(found) if found.unused.is_empty() => found.path.display().to_string(),
            Some(found) => {
                let keys: Vec<&str> = found.unused.iter().map(|(key, _)| *key).collect();
                format!("{}; keys without effect (gpurun config): {}", found.path.display(), keys.join(", "))
            }
        })
    });
    let wrong = |error: Error| {
        let what = format!("{}: {}", error.what(), error.cause_line());
        (error.code().to_string(), what, error.fix_line().to_owned())
    };
    Check::new("configuration", what.map_err(wrong))
}

/// systemd allows a device to a scope by its number only if /dev/char has a link for it; else `daemon-reload` takes it away.
fn dev_char(inventory: &Inventory) -> Check {
    let nodes = inventory.driver.control_nodes.iter().chain(inventory.gpus.iter().map(|gpu| &gpu.node));
    let absent: Vec<String> = nodes
        .filter(|node| !Path::new(&format!("/dev/char/{}:{}", node.major, node.minor)).exists())
        .map(|node| node.container_path.0.display().to_string())
        .collect();
    Check::new(
        "/dev/char",
        if absent.is_empty() {
            Ok("every device node has its link".into())
        } else {
            let what = format!(
                "{} have no link there, so that a daemon-reload takes them from containers of systemd's",
                absent.join(", ")
            );
            Err((
                "GPU-0014".into(),
                what,
                "ln -s /dev/NAME /dev/char/MAJOR:MINOR for each, in a udev rule".into(),
            ))
        },
    )
}

/// The GPUs that the caller may open, which `--gpus all` selects.
fn access(inventory: &Inventory) -> Check {
    let closed: Vec<_> =
        super::ls::devices(inventory).filter_map(|device| plan::closed(inventory, device)).collect();
    let control =
        inventory.driver.control_nodes.iter().filter(|node| inventory.closed.contains_key(&node.path.0));
    let control: Vec<_> = control.map(|node| node.path.0.display().to_string()).collect();
    let result = match (closed.as_slice(), control.as_slice()) {
        ([], []) => Ok("this user may open every GPU".into()),
        ([], nodes) => {
            let what = format!("this user may not open {}", nodes.join(", "));
            Err((
                Code::NotAllowed.to_string(),
                what,
                format!("chmod 0666 {}, as nvidia-modprobe makes them", nodes.join(" ")),
            ))
        }
        ([first, ..], _) => {
            let names: Vec<_> =
                closed.iter().map(|error| error.what().replace(" cannot be opened", "")).collect();
            let what = format!("this user may not open {}: {}", names.join(", "), first.cause_line());
            Err((Code::NotAllowed.to_string(), what, first.fix_line().to_owned()))
        }
    };
    Check::new("access", result)
}

fn user_namespaces() -> Check {
    let read =
        |key: &str| std::fs::read_to_string(format!("/proc/sys/{key}")).unwrap_or_default().trim().to_owned();
    let result = if read("kernel/unprivileged_userns_clone") == "0" {
        missing(
            "GPU-0050",
            "ordinary users may not make user namespaces",
            "sysctl kernel.unprivileged_userns_clone=1",
        )
    } else if read("kernel/apparmor_restrict_unprivileged_userns") == "1" {
        missing(
            "GPU-0050",
            "AppArmor keeps ordinary users' namespaces from mounting",
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        )
    } else if read("user/max_user_namespaces") == "0" {
        missing("GPU-0050", "no user namespace may be made", "sysctl user.max_user_namespaces=15000")
    } else {
        Ok("ordinary users can start containers".into())
    };
    Check::new("user namespaces", result)
}

/// The caller's subordinate ids, for containers without root.
fn subordinate_ids() -> Check {
    let found = Caller::current().and_then(|caller| check_subordinate_ids(&caller));
    let failed =
        |error: Error| (error.code().to_string(), error.what().to_owned(), error.fix_line().to_owned());
    Check::new("subordinate ids", found.map_err(failed))
}

fn overlay() -> Check {
    let known = std::fs::read_to_string("/proc/filesystems")
        .unwrap_or_default()
        .lines()
        .any(|l| l.ends_with("\toverlay"));
    let result = if known {
        Ok("the kernel has it".into())
    } else {
        missing("GPU-0051", "the kernel has not loaded it", "modprobe overlay")
    };
    Check::new("overlayfs", result)
}

fn shm() -> Check {
    let system = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion)]
    let half = u64::from(system.totalram).saturating_mul(u64::from(system.mem_unit)) / 2;
    Check::new("/dev/shm", Ok(format!("containers get {} MiB by default (--shm-size)", half >> 20)))
}

fn confinement() -> Check {
    let result = landlock::landlock()
        .map_err(|error| (error.code().to_string(), error.what().to_owned(), error.fix_line().to_owned()));
    Check::new("landlock", result)
}

fn cgroups() -> Check {
    let what = match Layout::current() {
        Layout::Unified => "v2",
        Layout::Hybrid => "v1 with v2 beside it; device rules are v2's",
        Layout::Legacy => "v1 alone",
        Layout::Absent => "none: containers start without limits and device rules",
    };
    Check::new("cgroups", Ok(what.into()))
}
