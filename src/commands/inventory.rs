//! `gpurun inventory`: everything gpurun knows of the host, read afresh.

use super::Context;
use crate::{
    error::{Code, OrFail, Result},
    inventory::Inventory,
    out,
};

/// Prints it as JSON.
pub fn run(context: &Context) -> Result<u8> {
    let inventory = Inventory::read(&context.host)?;
    let text = serde_json::to_string_pretty(&inventory)
        .or_fail(Code::Inventory, || "the inventory cannot be written as JSON")?;
    out!("{text}")?;
    Ok(0)
}
