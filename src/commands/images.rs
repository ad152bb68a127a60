//! `gpurun images`, `pull`, `rmi`, `prune`: the store, and what comes into it and leaves it.

use super::Context;
use crate::{
    cli::Pulling,
    error::{Code, Error, Result},
    image::{Image, ImageReference, Store, registry::When},
    out,
};

/// Prints what is in it: the sizes of layers as they were delivered, with `usage` what they take on the disk.
pub fn list(context: &Context, usage: bool) -> Result<u8> {
    let store = context.store()?;
    let mut images = store.images()?;
    let measured = usage.then(|| store.usage()).transpose()?;
    if let Some(measured) = &measured {
        let sizes: Vec<_> =
            images.iter().map(|image| store.usage_of_image(image, measured, &images)).collect();
        for (image, size) in images.iter_mut().zip(sizes) {
            (image.size, image.shared) = size;
        }
    }
    let total: Option<u64> = measured.map(|measured| measured.values().sum());
    if context.json {
        let all: Vec<_> = images
            .iter()
            .map(|image| {
                serde_json::json!({
                    "name": image.name, "id": image.id.to_string(), "created": image.created, "size": image.size,
                    "shared": image.shared, "complete": image.missing == 0,
                })
            })
            .collect();
        let all = match total {
            None => serde_json::json!(all),
            Some(total) => serde_json::json!({"images": all, "total": total, "quota": store.quota()}),
        };
        out!("{all:#}")?;
        return Ok(0);
    }
    out!("{:12}  {:10}  {:>12}  {:>12}  NAME", "IMAGE ID", "CREATED", "SIZE", "SHARED")?;
    for image in images {
        let (size, shared) = (image.size >> 20, image.shared >> 20);
        // RFC 3339 begins with the date.
        let created = image.created.as_deref().and_then(|time| time.get(..10)).unwrap_or("-");
        let missing = match image.missing {
            0 => String::new(),
            missing => format!("  (incomplete: {missing} of {} layers are missing)", image.layers.len()),
        };
        out!(
            "{}  {created:10}  {size:>8} MiB  {shared:>8} MiB  {}{missing}",
            &image.id.hex()[..12],
            image.name
        )?;
    }
    if let Some(total) = total {
        let quota = store.quota().map_or_else(String::new, |quota| format!(" of {} MiB", quota >> 20));
        out!("{:12}  {:>8} MiB{quota} for all layers in {}", "", total >> 20, store.path().display())?;
    }
    Ok(0)
}

/// Prints the ids of the images, each once, for `gpurun rmi`.
pub fn ids(context: &Context) -> Result<u8> {
    let images = context.store()?.images()?;
    let ids: std::collections::BTreeSet<String> =
        images.iter().map(|image| image.id.hex()[..12].to_owned()).collect();
    if context.json {
        out!("{:#}", serde_json::json!(ids))?;
    } else {
        for id in ids {
            out!("{id}")?;
        }
    }
    Ok(0)
}

/// Prints what is wrong with it; 1 if anything is.
pub fn verify(context: &Context) -> Result<u8> {
    let store = context.store()?;
    let checked: Vec<_> =
        store.images()?.into_iter().map(|image| (store.verify(&image.name), image.name)).collect();
    if context.json {
        let all: Vec<_> =
            checked.iter().map(|(wrong, name)| serde_json::json!({"name": name, "wrong": wrong})).collect();
        out!("{:#}", serde_json::json!(all))?;
    } else {
        for (wrong, name) in &checked {
            out!("{name}: {}", if wrong.is_empty() { "good".to_owned() } else { wrong.join("; ") })?;
        }
    }
    Ok(u8::from(checked.iter().any(|(wrong, _)| !wrong.is_empty())))
}

/// Brings images into it.
pub fn pull(context: &Context, pulling: &Pulling, quiet: bool, images: &[String]) -> Result<u8> {
    let store = context.store()?;
    let pull = context.pull(When::Always, pulling, quiet)?;
    for text in images {
        let image = Image::open(&ImageReference::parse(text)?, &store, &pull)?;
        image.root(&store)?;
        let Some(id) = image.id() else { continue };
        if context.json {
            out!("{}", serde_json::json!({"name": text, "id": id.to_string()}))?;
        } else {
            out!("{id}")?;
        }
    }
    // A start leaves this to its sweeper; a machine that only pulls has none.
    if let Err(error) = store.clean() {
        tracing::debug!(%error, "leftovers of killed pulls stay");
    }
    Ok(0)
}

/// Removes images from it, and what only they needed.
pub fn remove(context: &Context, names: &[String]) -> Result<u8> {
    let store = context.store()?;
    for text in names {
        // By the listed name or the typed one first, and then by id, as in `docker rmi` and `podman rmi`.
        let reference = ImageReference::parse(text).and_then(|reference| reference.absolute());
        let known = store.forget(text)?
            || reference.as_ref().is_ok_and(|name| store.forget(&name.to_string()).unwrap_or(false))
            || remove_by_id(&store, text)?;
        if !known {
            reference?;
            return Err(Error::new(Code::ImageNotFound, format!("there is no image {text:?} in the store"))
                .fix("`gpurun images` lists them"));
        }
    }
    tell(context, &store)
}

/// Removes the image with this id, which must have only one name. Returns whether it existed.
fn remove_by_id(store: &Store, id: &str) -> Result<bool> {
    let names = store.names_of_id(id)?;
    match names.as_slice() {
        [] => Ok(false),
        [name] => store.forget(name),
        several => Err(Error::new(Code::Usage, format!("the image {id} has {} names", several.len()))
            .cause(several.join(", "))
            .fix(format!("gpurun rmi {}", several.join(" ")))),
    }
}

/// Removes from it what no image needs.
pub fn prune(context: &Context) -> Result<u8> {
    tell(context, &context.store()?)
}

fn tell(context: &Context, store: &Store) -> Result<u8> {
    let pruned = store.prune()?;
    if context.json {
        out!(
            "{}",
            serde_json::json!({"removed": pruned.removed, "in_use": pruned.in_use, "freed": pruned.freed})
        )?;
        return Ok(0);
    }
    out!("{} layers removed, {} MiB freed", pruned.removed, pruned.freed >> 20)?;
    if pruned.in_use > 0 {
        out!("{} more are in use by containers: `gpurun prune` removes them later", pruned.in_use)?;
    }
    Ok(0)
}
