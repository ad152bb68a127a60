//! `gpurun ls`: the GPUs, one a line, and what is wrong with others.

use super::Context;
use crate::error::Result;
use crate::out;
use serde_json::json;

/// Prints them.
pub fn run(context: &Context) -> Result<u8> {
    let inventory = context.inventory()?;
    if context.json {
        out!(
            "{:#}",
            json!({"driver": inventory.driver.version, "cuda": inventory.driver.cuda, "gpus": inventory.gpus, "problems": inventory.problems})
        )?;
        return Ok(0);
    }
    out!("driver {}, CUDA up to {}", inventory.driver.version, inventory.driver.cuda)?;
    for gpu in &inventory.gpus {
        let numa = gpu.numa_node.map_or_else(String::new, |node| format!("  NUMA {node}"));
        let mig = if gpu.mig_enabled { "  MIG" } else { "" };
        out!(
            "{:<4} {}  {}  {:.0} GiB  sm_{}{}  {}{numa}{mig}",
            gpu.index,
            gpu.uuid,
            gpu.name,
            gibibytes(gpu.memory),
            gpu.compute_capability.major(),
            gpu.compute_capability.minor(),
            gpu.pci,
        )?;
        for mig in &gpu.mig_devices {
            out!(
                "{:<4} {}  {}  {:.0} GiB",
                format!("{}:{}", gpu.index, mig.index),
                mig.uuid,
                mig.profile,
                gibibytes(mig.memory)
            )?;
        }
    }
    for problem in &inventory.problems {
        out!("!    [{}] {}; {}", problem.code, problem.what, problem.fix)?;
    }
    Ok(0)
}

#[allow(clippy::cast_precision_loss)]
fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
