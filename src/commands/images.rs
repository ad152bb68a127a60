//! `gpurun images`: what is unpacked in the store.

use super::Context;
use crate::{error::Result, image::Store};

/// Prints it.
pub fn run(context: &Context) -> Result<u8> {
    let images = Store::open(&context.store_dir)?.images()?;
    if context.json {
        println!("{:#}", serde_json::json!(images));
        return Ok(0);
    }
    for image in images {
        println!("{image}");
    }
    Ok(0)
}
