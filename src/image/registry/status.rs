//! The state of a running pull: progress, and what it waits for.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Written by the fetching threads, read by [`Board`](super::progress::Board).
#[derive(Default)]
pub struct Status {
    waits: Mutex<Waits>,
    /// Received bytes of layers, and their total.
    bytes: AtomicU64,
    total_bytes: AtomicU64,
    /// Finished layers, and their total.
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

/// Progress of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// Received bytes of layers.
    pub bytes: u64,
    /// Bytes of all layers to fetch; 0 until known.
    pub total_bytes: u64,
    /// Layers in the store.
    pub layers: usize,
    /// Layers to fetch.
    pub total_layers: usize,
}

impl Status {
    /// Starts a wait for `what`; dropping the result ends it.
    pub fn waiting(&self, what: String) -> Waiting<'_> {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.next += 1;
        let number = waits.next;
        waits.current.insert(number, (Instant::now(), what));
        Waiting { status: self, number }
    }

    /// The longest current wait: its duration and what it waits for.
    pub fn longest_wait(&self) -> Option<(Duration, String)> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, what) = waits.current.values().next()?;
        Some((since.elapsed(), what.clone()))
    }

    /// Sets the totals.
    pub fn expect(&self, layers: usize, bytes: u64) {
        self.total_layers.store(layers, Ordering::Relaxed);
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Counts received bytes.
    pub fn advance(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a finished layer.
    pub fn layer_done(&self) {
        self.layers.fetch_add(1, Ordering::Relaxed);
    }

    /// The current progress.
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
