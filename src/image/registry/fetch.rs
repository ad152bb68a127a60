//! What gpurun-pull does: from a registry into the store.

use super::{
    Order, Step,
    blob::{Blob, Shared},
    client::{CONNECTIONS, Client},
    progress::Board,
    record_name,
    status::Status,
};
use crate::{
    error::{Code, Error, OrFail, Result},
    image::{
        Digest,
        layer::Layer,
        manifest,
        note::Note,
        store::{Record, Store},
        unpack_all,
    },
};
use rustix::fd::BorrowedFd;
use std::{cell::Cell, num::NonZero, thread, time::Duration};

/// So many layers come side by side at least; each has a few MB in memory, and what its compression wants.
const AT_ONCE: NonZero<usize> = NonZero::new(4).unwrap();

/// How long partial downloads are kept to be resumed.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Carries it out.
///
/// # Errors
/// [`Code::Registry`], [`Code::NotAuthorised`], [`Code::ImageNotFound`] if there is nothing to be had, [`Code::NoSpace`]
/// before anything is fetched that there is no room for, and all that unpacking can meet.
pub fn carry_out(order: &Order) -> Result<()> {
    // ureq leaves it to programs which implementation of cryptography they bring.
    rustls::crypto::ring::default_provider().install_default().map_err(|_| {
        Error::new(Code::Internal, "cryptography is set up twice")
            .fix("report this fault, with `gpurun --version`")
    })?;
    let store = Store::open(&order.store)?.with_quota(order.quota);
    let status = Status::default();
    let board = Board::new(order.pull.progress, &status, order.name.to_string());
    board.watch(|| match order.step {
        Step::Layers => layers(order, &store, &board, &status),
        Step::Documents | Step::UnknownDocuments => documents(order, &store, &status),
    })
}

fn documents(order: &Order, store: &Store, status: &Status) -> Result<()> {
    let name = record_name(&order.name, &order.pull.platform);
    // Of several that want the same image one asks, and the others find what it found.
    let waiting = status.waiting(format!("another gpurun that pulls {name}"));
    let _lock = store.lock(&name)?;
    drop(waiting);
    let known = || store.record(&name).is_some_and(|record| store.blob(&record.id).is_some());
    if order.step == Step::UnknownDocuments && known() {
        return Ok(());
    }
    let client = Client::new(&order.name, &order.pull, status)?;
    let (top, bytes) = client.resolve()?;
    let mut found = manifest::follow(vec![top.clone()], &order.pull.platform, |descriptor| {
        if descriptor.digest.to_string() == top.digest {
            return Ok(bytes.clone());
        }
        match store.blob(&descriptor.digest) {
            Some(bytes) => manifest::check_document(descriptor, bytes),
            None => client.read(descriptor),
        }
    })
    .map_err(|error| error.context(format!("{} cannot be used", order.name)))?;
    for layer in found.layers.iter_mut().filter(|layer| layer.size == 0) {
        if let Some(digest) = &layer.digest {
            layer.size = client.length(digest, &layer.urls)?;
        }
    }
    store.put_blob(&found.id, &found.config)?;
    store.put_record(&Record { name, id: found.id, stamp: None, layers: found.layers })
}

fn layers(order: &Order, store: &Store, board: &Board<'_>, status: &Status) -> Result<()> {
    let name = record_name(&order.name, &order.pull.platform);
    let record = store.record(&name).ok_or_else(|| {
        Error::new(Code::ImageNotFound, format!("the store does not know {name}"))
            .fix(format!("gpurun pull {}", order.name))
    })?;
    let waiting = status.waiting("another gpurun that brings layers into the store".into());
    let _reserved = store.reserve(&record.layers)?;
    drop(waiting);
    let missing: Vec<&Layer> =
        record.layers.iter().filter(|layer| !store.has_layer(&layer.diff_id)).collect();
    // Of the one that is finished last both forms are there.
    let largest = missing.iter().map(|layer| layer.size).max().unwrap_or(0);
    store.check_room(missing.iter().fold(largest, |sum, layer| sum.saturating_add(layer.size)))?;
    store.remove_old_parts(KEPT)?;
    let client = Client::new(&order.name, &order.pull, status)?;
    status.expect(missing.len(), missing.iter().fold(0, |sum: u64, layer| sum.saturating_add(layer.size)));
    let shared = Shared::new(CONNECTIONS);
    let pulling = Pulling { store, client: &client, board, shared: &shared };
    let workers = thread::available_parallelism().or_fail(Code::Internal, || "processors")?.max(AT_ONCE);
    let done = unpack_all(&missing, workers, |layer| {
        // The other layers stop as well, because the image is useless without this one.
        pulling.layer(layer).inspect_err(|error| shared.fail(error.clone()))
    });
    // Where a stream failed, all else failed because of it.
    shared
        .failed()
        .map_or(done, Err)
        .map_err(|error| error.context(format!("{} cannot be fetched", order.name)))
}

struct Pulling<'a> {
    store: &'a Store,
    client: &'a Client<'a>,
    board: &'a Board<'a>,
    shared: &'a Shared,
}

impl Pulling<'_> {
    /// Puts a layer into the store.
    fn layer(&self, layer: &Layer) -> Result<()> {
        let digest = layer.digest.as_ref().ok_or_else(|| {
            Error::new(Code::ImageBroken, "a layer of the image has no digest, so it cannot be fetched")
                .fix("gpurun rmi IMAGE, then gpurun pull IMAGE")
        })?;
        let resumed = Cell::new(false);
        let add = || self.store.add_layer(&layer.diff_id, |root| self.unpack(layer, digest, root, &resumed));
        let mut added = add();
        // After a power cut the files of an earlier pull hold anything.
        if resumed.get() && added.is_err() && self.shared.failed().is_none() {
            self.store.remove_parts(digest)?;
            added = add();
        }
        let network = self.shared.failed().is_some_and(|error| error.code() != Code::NoSpace);
        if added.is_ok() || !network {
            self.store.remove_parts(digest)?;
        }
        added
    }

    fn unpack(
        &self,
        layer: &Layer,
        digest: &Digest,
        root: BorrowedFd<'_>,
        resumed: &Cell<bool>,
    ) -> Result<Note> {
        let line = self.board.line(digest, layer.size);
        let waiting = self.client.status().waiting(format!("another gpurun that fetches the layer {digest}"));
        let parts = self.store.parts(digest)?;
        drop(waiting);
        let blob = Blob::new(self.client, layer, digest, parts, self.shared, &line);
        resumed.set(blob.present() > 0);
        thread::scope(|scope| {
            for _ in 0..blob.connections() {
                scope.spawn(|| blob.fetch());
            }
            let unpacked = layer.unpack(blob.reader(), root, Store::ownership());
            blob.stop();
            unpacked.inspect(|_| line.done())
        })
    }
}
