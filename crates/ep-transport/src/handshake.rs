//! The handshake by which one rank hands memory to another: which access is ordered before which, and nothing else.
//!
//! A rank writes payload and [`set`]s a word; whoever sees the new value by [`see`] or [`poll`] has the payload. Rows
//! of memory that several ranks write to are [`take`]n first. Words are never added to and zeroed to signal
//! anything: a signal is an epoch, so a late look at an old one is only a look too early.
//!
//! This is generic over its words, and a heap does nothing to a word but through here, so `model` can run the same code on
//! words that a model checker reorders.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Silence;
use crate::heap::Until;

#[cfg(test)]
mod model;

/// A 64-bit word that several ranks access.
pub(crate) trait Word {
    /// As [`AtomicU64::load`].
    fn load(&self, order: Ordering) -> u64;
    /// As [`AtomicU64::store`].
    fn store(&self, value: u64, order: Ordering);
    /// As [`AtomicU64::fetch_add`].
    fn fetch_add(&self, n: u64, order: Ordering) -> u64;
    /// As [`AtomicU64::compare_exchange_weak`], giving no order.
    fn replace(&self, current: u64, new: u64) -> Result<u64, u64>;
    /// As [`std::sync::atomic::fence`].
    fn fence(&self, order: Ordering);
}

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    fn fetch_add(&self, n: u64, order: Ordering) -> u64 {
        self.fetch_add(n, order)
    }

    fn replace(&self, current: u64, new: u64) -> Result<u64, u64> {
        self.compare_exchange_weak(current, new, Ordering::Relaxed, Ordering::Relaxed)
    }

    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

/// Sets a signal: whoever sees it sees all that this thread wrote before, non-temporal stores included.
pub(crate) fn set(word: &impl Word, value: u64) {
    drain_streaming_stores();
    word.store(value, Ordering::Release);
}

/// The value of a word, and with it what its setter wrote before.
pub(crate) fn read(word: &impl Word) -> u64 {
    word.load(Ordering::Acquire)
}

/// The value of a word if it fulfils `until`.
pub(crate) fn see(word: &impl Word, until: Until) -> Option<u64> {
    Some(read(word)).filter(|&value| until.holds(value))
}

/// One look of a wait for `word`, whose setter may be gone: the value, or that none will come.
///
/// `has_departed` is asked with the order of an acquire load, and its answer set by a release store after the
/// setter's last signal.
pub(crate) fn poll(
    word: &impl Word,
    until: Until,
    has_departed: impl FnOnce() -> bool,
) -> Option<Result<u64, Silence>> {
    match see(word, until) {
        Some(value) => Some(Ok(value)),
        // It may have set the signal and left between the two looks, so look again.
        None if has_departed() => Some(see(word, until).ok_or(Silence::Departed)),
        None => None,
    }
}

/// Takes `n` of what `word` counts, typically rows; returns the first of them.
pub(crate) fn take(word: &impl Word, n: u64) -> u64 {
    drain_streaming_stores();
    word.fetch_add(n, Ordering::AcqRel)
}

/// Orders the non-temporal stores of this thread before its next store. They are exempt from the ordering that
/// x86 gives to all other stores, and from what a release store means.
pub(crate) fn drain_streaming_stores() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of SSE, which every x86-64 has, and touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
