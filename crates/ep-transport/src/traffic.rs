//! What a rank moved, counted where it is moved.

use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes and operations that one rank has issued on all its heaps since it joined.
///
/// Collectives (all-gather, barrier, allocate) set a layer up and are not counted. The difference of two
/// snapshots is the traffic between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Payload bytes written to, or read directly from, other ranks.
    pub remote_bytes: u64,
    /// The part of `remote_bytes` that crossed a (real or simulated) node boundary.
    pub internode_bytes: u64,
    /// Transfers of at least one byte that make up `remote_bytes`.
    pub remote_puts: u64,
    /// Payload bytes put into this rank's own heap by the same operations.
    pub local_bytes: u64,
    /// Signals set and counters added to on other ranks, 8 bytes each, not part of `remote_bytes`.
    pub signals: u64,
}

impl Sub for Traffic {
    type Output = Self;

    /// The traffic since the snapshot `before`.
    fn sub(self, before: Self) -> Self {
        Self {
            remote_bytes: self.remote_bytes - before.remote_bytes,
            internode_bytes: self.internode_bytes - before.internode_bytes,
            remote_puts: self.remote_puts - before.remote_puts,
            local_bytes: self.local_bytes - before.local_bytes,
            signals: self.signals - before.signals,
        }
    }
}

/// Where the target of a transfer is, as seen from the rank that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distance {
    Own,
    SameNode,
    OtherNode,
}

/// The running counters. On their own cache line: every put of a rank's threads adds to them.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct TrafficCounters {
    remote_bytes: AtomicU64,
    internode_bytes: AtomicU64,
    remote_puts: AtomicU64,
    local_bytes: AtomicU64,
    signals: AtomicU64,
}

impl TrafficCounters {
    pub(crate) fn count_payload(&self, distance: Distance, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let bytes = bytes as u64;
        if distance == Distance::Own {
            self.local_bytes.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        self.remote_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.remote_puts.fetch_add(1, Ordering::Relaxed);
        if distance == Distance::OtherNode {
            self.internode_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn count_signal(&self, distance: Distance) {
        if distance != Distance::Own {
            self.signals.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> Traffic {
        Traffic {
            remote_bytes: self.remote_bytes.load(Ordering::Relaxed),
            internode_bytes: self.internode_bytes.load(Ordering::Relaxed),
            remote_puts: self.remote_puts.load(Ordering::Relaxed),
            local_bytes: self.local_bytes.load(Ordering::Relaxed),
            signals: self.signals.load(Ordering::Relaxed),
        }
    }
}
