//! `gpurun images`: what is unpacked in the store.

use super::Context;
use crate::{error::Result, image::Store};

/// Prints it.
pub fn run(context: &Context) -> Result<u8> {
    let images = Store::open(&context.store_dir)?.images()?;
    if context.json {
        let all: Vec<_> = images
            .iter()
            .map(|image| serde_json::json!({"name": image.name, "id": image.id.to_string(), "size": image.size}))
            .collect();
        println!("{:#}", serde_json::json!(all));
        return Ok(0);
    }
    for image in images {
        println!("{}  {:>8} MiB  {}", &image.id.hex()[..12], image.size >> 20, image.name);
    }
    Ok(0)
}
