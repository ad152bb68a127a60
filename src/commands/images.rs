//! `gpurun images`, `pull`, `rmi`, `prune`: the store, and what comes into it and leaves it.

use super::Context;
use crate::{
    cli::Pulling,
    error::{Code, Error, Result},
    image::{Image, ImageReference, Store, registry::When},
};

/// Prints what is in it.
pub fn list(context: &Context) -> Result<u8> {
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

/// Prints what is wrong with it; 1 if anything is.
pub fn verify(context: &Context) -> Result<u8> {
    let store = Store::open(&context.store_dir)?;
    let checked: Vec<_> =
        store.images()?.into_iter().map(|image| (store.verify(&image.name), image.name)).collect();
    if context.json {
        let all: Vec<_> =
            checked.iter().map(|(wrong, name)| serde_json::json!({"name": name, "wrong": wrong})).collect();
        println!("{:#}", serde_json::json!(all));
    } else {
        for (wrong, name) in &checked {
            println!("{name}: {}", if wrong.is_empty() { "good".to_owned() } else { wrong.join("; ") });
        }
    }
    Ok(u8::from(checked.iter().any(|(wrong, _)| !wrong.is_empty())))
}

/// Brings images into it.
pub fn pull(context: &Context, pulling: &Pulling, images: &[String]) -> Result<u8> {
    let store = Store::open(&context.store_dir)?;
    let pull = context.pull(When::Always, pulling);
    for text in images {
        let image = Image::open(&ImageReference::parse(text)?, &store, &pull)?;
        image.root(&store)?;
        let Some(id) = image.id() else { continue };
        if context.json {
            println!("{}", serde_json::json!({"name": text, "id": id.to_string()}));
        } else {
            println!("{id}");
        }
    }
    Ok(0)
}

/// Removes images from it, and what only they needed.
pub fn remove(context: &Context, names: &[String]) -> Result<u8> {
    let store = Store::open(&context.store_dir)?;
    for text in names {
        // As it is listed, or as it was typed when it came.
        let known =
            store.forget(text)? || store.forget(&ImageReference::parse(text)?.absolute()?.to_string())?;
        if !known {
            return Err(Error::new(Code::ImageNotFound, format!("there is no image {text:?} in the store"))
                .fix("`gpurun images` lists them"));
        }
    }
    tell(context, &store)
}

/// Removes from it what no image needs.
pub fn prune(context: &Context) -> Result<u8> {
    tell(context, &Store::open(&context.store_dir)?)
}

fn tell(context: &Context, store: &Store) -> Result<u8> {
    let pruned = store.prune()?;
    if context.json {
        println!("{}", serde_json::json!({"removed": pruned.removed, "in_use": pruned.in_use}));
        return Ok(0);
    }
    println!("{} layers removed", pruned.removed);
    if pruned.in_use > 0 {
        println!("{} more are in use by containers: `gpurun prune` removes them later", pruned.in_use);
    }
    Ok(0)
}
