//! What gpurun-pull does: from a registry into the store.

use super::{Order, Step, blob::Blob, client::Client, progress::Board, record_name};
use crate::{
    error::{Code, Error, OrFail, Result},
    image::{
        layer::Layer,
        manifest,
        store::{Record, Store},
        unpack_all,
    },
};
use std::{
    num::NonZero,
    sync::{Mutex, PoisonError},
    thread,
};

/// Layers come side by side, because one connection seldom fills a line; each has at most a few MB in memory, and what its
/// compression wants.
const AT_ONCE: NonZero<usize> = NonZero::new(4).unwrap();

/// Carries it out.
///
/// # Errors
/// [`Code::Registry`], [`Code::NotAuthorised`], [`Code::ImageNotFound`] where there is nothing to be had, [`Code::NoSpace`]
/// before anything is fetched that there is no room for, and all that unpacking can meet.
pub fn carry_out(order: &Order) -> Result<()> {
    // ureq leaves it to programs which implementation of cryptography they bring.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| Error::new(Code::Internal, "cryptography is set up twice"))?;
    let store = Store::open(&order.store)?.with_quota(order.quota);
    match order.step {
        Step::Layers => layers(order, &store),
        Step::Documents | Step::UnknownDocuments => documents(order, &store),
    }
}

fn documents(order: &Order, store: &Store) -> Result<()> {
    let name = record_name(&order.name, &order.pull.platform);
    // Of several that want the same image one asks, and the others find what it found.
    let _lock = store.lock(&name)?;
    let known = || store.record(&name).is_some_and(|record| store.blob(&record.id).is_some());
    if order.step == Step::UnknownDocuments && known() {
        return Ok(());
    }
    let client = Client::new(&order.name, &order.pull)?;
    let (top, bytes) = client.resolve()?;
    let found = manifest::follow(vec![top.clone()], &order.pull.platform, |descriptor| {
        if descriptor.digest == top.digest {
            return Ok(bytes.clone());
        }
        match store.blob(&descriptor.digest) {
            Some(bytes) => manifest::check_document(descriptor, bytes),
            None => client.read(descriptor),
        }
    })
    .map_err(|error| error.context(format!("{} cannot be used", order.name)))?;
    store.put_blob(&found.id, &found.config)?;
    store.put_record(&Record { name, id: found.id, stamp: None, layers: found.layers })
}

fn layers(order: &Order, store: &Store) -> Result<()> {
    let name = record_name(&order.name, &order.pull.platform);
    let record = store
        .record(&name)
        .ok_or_else(|| Error::new(Code::ImageNotFound, format!("the store does not know {name}")))?;
    let _reserved = store.reserve(&record.layers)?;
    let missing: Vec<&Layer> =
        record.layers.iter().filter(|layer| !store.has_layer(&layer.diff_id)).collect();
    store.check_room(missing.iter().fold(0, |sum: u64, layer| sum.saturating_add(layer.size)))?;
    let client = Client::new(&order.name, &order.pull)?;
    let board = Board::new(order.pull.progress);
    let ownership = Store::ownership();
    let workers = thread::available_parallelism().or_fail(Code::Internal, || "processors")?.max(AT_ONCE);
    let failure = Mutex::new(None);
    let done = unpack_all(&missing, workers, |layer| {
        store
            .add_layer(&layer.diff_id, |root| {
                let digest = layer.digest.as_ref().ok_or_else(|| {
                    Error::new(
                        Code::ImageBroken,
                        "a layer of the image has no digest, so it cannot be fetched",
                    )
                })?;
                let line = board.line(digest, layer.size);
                let blob = Blob::new(&client, digest, layer.size, &failure, &line);
                layer.unpack(blob, root, ownership).inspect(|()| line.done())
            })
            .inspect_err(|error| {
                // The other layers stop, too: without this one nobody needs them.
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
            })
    });
    // Where a stream failed, all else failed because of it.
    let first = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    first.map_or(done, Err).map_err(|error| error.context(format!("{} cannot be fetched", order.name)))
}
