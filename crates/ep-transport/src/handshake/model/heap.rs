//! A heap whose words and payload a model checker watches.

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fused_moe_core::Rank;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use loom::sync::{Condvar, Mutex};

use crate::deadline::Deadline;
use crate::doorbell::Futex;
use crate::error::{Awaited, Result, Silence, TransportError};
use crate::handshake::{self, Word};
use crate::heap::{Heap, Payload, Signal, Until};
use crate::symmetric::{HeapSize, SymOffset, SymWord};

/// Bytes of payload that are watched as one, and the size of every put.
pub(super) const CELL: usize = 8;

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// Nothing.
    Sound,
    /// Signals are set without releasing what was written before.
    RelaxedSet,
    /// Signals are seen without acquiring what was written before them.
    RelaxedLook,
    /// A wait takes any epoch but none for the one it waits for.
    AnyEpoch,
    /// Rows are counted from zero again a round early, while the peers still take some.
    EarlyRearm,
    /// The memory of a round is written again before its reader has said that it is done.
    EarlyReuse,
    /// A waiter takes its peer's leaving for an answer without looking again.
    OneLook,
    /// Nothing comes between a change and the look for sleepers, nor between going to sleep and the last look.
    NoFence,
}

/// A word with the orderings of a [`Mutant`].
pub(super) struct ModelWord {
    word: AtomicU64,
    mutant: Mutant,
}

impl ModelWord {
    pub(super) fn new(mutant: Mutant) -> Self {
        Self { word: AtomicU64::new(0), mutant }
    }
}

impl Word for ModelWord {
    fn load(&self, order: Ordering) -> u64 {
        self.word.load(if self.mutant == Mutant::RelaxedLook { Ordering::Relaxed } else { order })
    }

    fn store(&self, value: u64, order: Ordering) {
        self.word.store(value, if self.mutant == Mutant::RelaxedSet { Ordering::Relaxed } else { order });
    }

    fn fetch_add(&self, n: u64, order: Ordering) -> u64 {
        self.word.fetch_add(n, order)
    }

    fn replace(&self, current: u64, new: u64) -> std::result::Result<u64, u64> {
        self.word.compare_exchange(current, new, Ordering::Relaxed, Ordering::Relaxed)
    }

    fn fence(&self, order: Ordering) {
        if self.mutant != Mutant::NoFence {
            loom::sync::atomic::fence(order);
        }
    }
}

/// One rank's part of the heap.
struct Segment {
    words: Vec<ModelWord>,
    payload: Vec<UnsafeCell<[u8; CELL]>>,
    departed: AtomicBool,
}

/// The memory of all ranks.
pub(super) struct Memory {
    segments: Vec<Segment>,
    size: HeapSize,
    mutant: Mutant,
}

// SAFETY: cells are shared on purpose; that no two accesses race is what the checker verifies.
unsafe impl Sync for Memory {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Memory {}

impl Memory {
    pub(super) fn new(ranks: usize, size: HeapSize, mutant: Mutant) -> Arc<Self> {
        let segment = |_| Segment {
            words: (0..size.words).map(|_| ModelWord::new(mutant)).collect(),
            payload: (0..size.bytes.div_ceil(CELL)).map(|_| UnsafeCell::new([0; CELL])).collect(),
            departed: AtomicBool::new(false),
        };
        Arc::new(Self { segments: (0..ranks).map(segment).collect(), size, mutant })
    }
}

/// The heap as one rank sees it. A wait gives up after a number of looks: there is no clock in a model.
pub(super) struct ModelHeap {
    memory: Arc<Memory>,
    rank: Rank,
    looks: Cell<u32>,
}

// SAFETY: as of `Memory`; a handle is used by one thread.
unsafe impl Sync for ModelHeap {}

impl ModelHeap {
    /// The heap of `rank`, all of whose waits together take `looks` looks in vain.
    pub(super) fn new(memory: &Arc<Memory>, rank: u32, looks: u32) -> Self {
        Self { memory: Arc::clone(memory), rank: Rank(rank), looks: Cell::new(looks) }
    }

    fn segment(&self, rank: Rank) -> &Segment {
        &self.memory.segments[rank.index()]
    }

    /// Reads `CELL` bytes of this rank.
    pub(super) fn row(&self, offset: SymOffset) -> [u8; CELL] {
        self.peer_row(self.rank, offset)
    }

    /// Reads `CELL` bytes of `of`.
    pub(super) fn peer_row(&self, of: Rank, offset: SymOffset) -> [u8; CELL] {
        // SAFETY: the checker fails the run if the access races with a write.
        self.segment(of).payload[offset.0 / CELL].with(|row| unsafe { *row })
    }

    /// Says that this rank sets no more signals.
    pub(super) fn depart(&self) {
        self.segment(self.rank).departed.store(true, Ordering::Release);
    }
}

// SAFETY: only for the checks of this module, which use no pointers; the words go through `handshake`.
unsafe impl Heap for ModelHeap {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> HeapSize {
        self.memory.size
    }

    unsafe fn put_nbi(&self, to: Rank, payload: Payload<'_>) -> Result<()> {
        let bytes: [u8; CELL] = payload.bytes.try_into().expect("a put is one cell");
        let cell = &self.segment(to).payload[payload.offset.0 / CELL];
        // SAFETY: the checker fails the run if the access races with another.
        cell.with_mut(|row| unsafe { *row = bytes });
        Ok(())
    }

    unsafe fn put_signal(&self, to: Rank, payload: Payload<'_>, signal: Signal) -> Result<()> {
        // SAFETY: the caller makes the promises of `put_nbi`.
        unsafe { self.put_nbi(to, payload)? };
        self.signal_set(to, signal)
    }

    fn signal_set(&self, to: Rank, signal: Signal) -> Result<()> {
        handshake::set(&self.segment(to).words[signal.word.0], signal.value);
        Ok(())
    }

    fn signal_wait_until(&self, word: SymWord, until: Until, from: Rank, _: Deadline) -> Result<u64> {
        let value = &self.segment(self.rank).words[word.0];
        let mutant = self.memory.mutant;
        let until = if mutant == Mutant::AnyEpoch { Until::Ge(1) } else { until };
        let has_departed = || self.segment(from).departed.load(Ordering::Acquire);
        let silence = loop {
            let look = match mutant {
                Mutant::OneLook => handshake::see(value, until)
                    .map(Ok)
                    .or_else(|| has_departed().then_some(Err(Silence::Departed))),
                _ => handshake::poll(value, until, has_departed),
            };
            match look {
                Some(Ok(value)) => return Ok(value),
                Some(Err(silence)) => break silence,
                None if self.looks.get() == 0 => break Silence::Deadline,
                None => self.looks.set(self.looks.get() - 1),
            }
            loom::thread::yield_now();
        };
        let awaited = Awaited::Signal { word, until, last_seen: 0 };
        Err(TransportError::PeerLost { rank: from, awaited, silence })
    }

    fn signal_read(&self, word: SymWord) -> Result<u64> {
        Ok(handshake::read(&self.segment(self.rank).words[word.0]))
    }

    fn atomic_fetch_add(&self, to: Rank, word: SymWord, n: u64) -> Result<u64> {
        Ok(handshake::take(&self.segment(to).words[word.0], n))
    }

    /// Nothing: setting a signal releases, and no heap promises less.
    fn fence(&self) {}

    fn quiet(&self, _: Deadline) -> Result<()> {
        Ok(())
    }

    fn peer_ptr(&self, _: Rank, _: SymOffset, _: usize) -> Result<Option<NonNull<u8>>> {
        Ok(None)
    }

    fn local_ptr(&self, offset: SymOffset, len: usize) -> Result<NonNull<u8>> {
        Err(TransportError::OutOfBounds { offset, len, size: self.size() })
    }

    fn count_direct(&self, _: Rank, _: usize) {}
}

/// A futex: its queue is a lock and a condition, as in the kernel.
#[derive(Default)]
pub(super) struct ModelFutex {
    word: AtomicU32,
    queue: Mutex<()>,
    wake: Condvar,
}

impl Futex for ModelFutex {
    fn load(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    fn increment(&self) {
        self.word.fetch_add(1, Ordering::Release);
    }

    /// Sleeps for ever if no one wakes it: a missed ring is then a deadlock, which the checker reports.
    fn sleep_while(&self, value: u32, _: Duration) {
        let queue = self.queue.lock().expect("no thread panics with the lock");
        if self.word.load(Ordering::Relaxed) == value {
            drop(self.wake.wait(queue));
        }
    }

    fn wake_all(&self) {
        drop(self.queue.lock());
        self.wake.notify_all();
    }
}
