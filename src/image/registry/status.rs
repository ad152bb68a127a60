//! What a pull is doing at the moment: how much has come, and what is waited for.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Written by those who fetch, read by [`Board`](super::progress::Board).
#[derive(Default)]
pub struct Status {
    waits: Mutex<Waits>,
    /// Bytes of layers that have come, and bytes of all layers that are fetched.
    bytes: AtomicU64,
    total_bytes: AtomicU64,
    /// Layers that are in the store, and layers that are fetched.
    layers: AtomicUsize,
    total_layers: AtomicUsize,
}

#[derive(Default)]
struct Waits {
    next: u64,
    current: BTreeMap<u64, (Instant, String)>,
}

/// Ends a wait when it is dropped.
#[must_use]
pub struct Waiting<'a> {
    status: &'a Status,
    number: u64,
}

/// How far a pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes of layers that have come.
    pub bytes: u64,
    /// Bytes of all layers that are fetched; 0 before that is known.
    pub total_bytes: u64,
    /// Layers that are in the store.
    pub layers: usize,
    /// Layers that are fetched.
    pub total_layers: usize,
}

impl Status {
    /// Something is waited for, from now until the result is dropped.
    pub fn waiting(&self, what: String) -> Waiting<'_> {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.next += 1;
        let number = waits.next;
        waits.current.insert(number, (Instant::now(), what));
        Waiting { status: self, number }
    }

    /// What has been waited for longest, and for how long.
    pub fn longest_wait(&self) -> Option<(Duration, String)> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, what) = waits.current.values().next()?;
        Some((since.elapsed(), what.clone()))
    }

    /// So many layers with so many bytes will be fetched.
    pub fn expect(&self, layers: usize, bytes: u64) {
        self.total_layers.store(layers, Ordering::Relaxed);
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// So many bytes more have come.
    pub fn advance(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// One layer more is in the store.
    pub fn layer_done(&self) {
        self.layers.fetch_add(1, Ordering::Relaxed);
    }

    /// How far the pull is.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            bytes: self.bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            layers: self.layers.load(Ordering::Relaxed),
            total_layers: self.total_layers.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waits = self.status.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.current.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_is_shown_until_it_ends() {
        let status = Status::default();
        assert_eq!(status.longest_wait(), None);
        let first = status.waiting("a".into());
        let second = status.waiting("b".into());
        assert_eq!(status.longest_wait().unwrap().1, "a");
        drop(first);
        assert_eq!(status.longest_wait().unwrap().1, "b");
        drop(second);
        assert_eq!(status.longest_wait(), None);
    }
}
