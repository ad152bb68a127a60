//! `gpurun ls`: the GPUs, one a line, and what is wrong with others.

use super::Context;
use crate::{
    error::Result,
    inventory::Inventory,
    out,
    plan::{self, Selected},
};
use serde_json::json;

/// Prints them.
pub fn run(context: &Context) -> Result<u8> {
    let inventory = context.inventory_of_caller()?;
    let closed: Vec<_> =
        devices(&inventory).filter_map(|device| Some((device, plan::closed(&inventory, device)?))).collect();
    if context.json {
        let closed: Vec<_> = closed
            .iter()
            .map(|(device, error)| json!({"id": device.id().to_string(), "uuid": device.uuid(), "cause": error.cause_line()}))
            .collect();
        out!(
            "{:#}",
            json!({
                "driver": inventory.driver.version,
                "cuda": inventory.driver.cuda,
                "gpus": inventory.gpus,
                "problems": inventory.problems,
                "closed": closed,
            })
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
    for (_, error) in &closed {
        out!("!    [{}] {}: {}; {}", error.code(), error.what(), error.cause_line(), error.fix_line())?;
    }
    for problem in &inventory.problems {
        out!("!    [{}] {}; {}", problem.code, problem.what, problem.fix)?;
    }
    Ok(0)
}

/// Every GPU, and every MIG device.
pub(super) fn devices(inventory: &Inventory) -> impl Iterator<Item = Selected<'_>> {
    inventory.gpus.iter().flat_map(|gpu| {
        let parts = gpu.mig_devices.iter().map(move |mig| Selected { gpu, mig: Some(mig) });
        std::iter::once(Selected { gpu, mig: None }).chain(parts)
    })
}

#[allow(clippy::cast_precision_loss)]
fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
