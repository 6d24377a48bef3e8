//! The heap of a group of MPI ranks: loads and stores inside a node, MPI between nodes.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use fused_moe_core::Rank;

use super::rank::Group;
use super::watchdog::Wait;
use super::window::Window;
use crate::deadline::Deadline;
use crate::error::{Awaited, Result, TransportError};
use crate::handshake;
use crate::heap::{Heap, Payload, Signal, Until};
use crate::segment::Segment;
use crate::symmetric::{HeapSize, SymOffset, SymWord};

/// Looks at the awaited word between two looks at the clock.
const LOOKS_PER_CLOCK: u32 = 64;

/// A heap as one rank of a group of MPI ranks sees it.
pub(super) struct MpiHeap {
    group: Arc<Group>,
    window: Arc<Window>,
}

/// Where the memory of a rank is, for this one.
enum Reach<'a> {
    /// Mapped.
    Direct(&'a Segment),
    /// On another node.
    Remote,
}

impl MpiHeap {
    pub(super) fn new(group: Arc<Group>, window: Arc<Window>) -> Self {
        Self { group, window }
    }

    fn reach(&self, rank: Rank) -> Result<Reach<'_>> {
        let world_size = self.group.comm.size();
        if rank.index() >= world_size {
            return Err(TransportError::NoSuchRank { rank, world_size });
        }
        Ok(self.window.segment(rank.index()).map_or(Reach::Remote, Reach::Direct))
    }

    fn check_range(&self, offset: SymOffset, len: usize) -> Result<()> {
        let size = self.window.size();
        match offset.0.checked_add(len) {
            Some(end) if end <= size.bytes => Ok(()),
            _ => Err(TransportError::OutOfBounds { offset, len, size }),
        }
    }

    fn no_such_word(&self, word: SymWord) -> TransportError {
        TransportError::NoSuchWord { word, size: self.window.size() }
    }

    fn word<'s>(&self, segment: &'s Segment, word: SymWord) -> Result<&'s AtomicU64> {
        segment.word(word).ok_or_else(|| self.no_such_word(word))
    }

    /// A word of this rank.
    fn own_word(&self, word: SymWord) -> Result<&AtomicU64> {
        match self.reach(self.group.rank())? {
            Reach::Direct(own) => self.word(own, word),
            Reach::Remote => Err(self.no_such_word(word)),
        }
    }

    fn completion(&self, of: Rank) -> Wait {
        Wait::new(of, Awaited::Completion, self.group.deadline())
    }
}

// SAFETY: inside a node, signals are release stores and acquire loads, with non-temporal stores drained before, and puts
// are complete when they return. Between nodes, a signal is sent when the payload before it, or what came before a
// fence, has been flushed: it is complete in the target's memory. Words arrive whole, by accumulate, while their
// owner is inside MPI. Pointers come from segments, which check the range and live as long as the window.
unsafe impl Heap for MpiHeap {
    fn rank(&self) -> Rank {
        self.group.rank()
    }

    fn size(&self) -> HeapSize {
        self.window.size()
    }

    unsafe fn put_nbi(&self, to: Rank, payload: Payload<'_>) -> Result<()> {
        let Payload { offset, bytes } = payload;
        self.check_range(offset, bytes.len())?;
        match self.reach(to)? {
            Reach::Direct(segment) => {
                let size = self.window.size();
                let target = segment.payload(offset, bytes.len());
                let target = target.ok_or(TransportError::OutOfBounds { offset, len: bytes.len(), size })?;
                // SAFETY: the range was checked; the caller promises that the source does not overlap it and that no
                // one else touches it.
                unsafe { target.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            }
            Reach::Remote => self.group.session.call(self.completion(to), || {
                // SAFETY: the range was checked, and the caller keeps the bytes until `quiet`, which flushes.
                unsafe { self.window.put(to.index(), offset, bytes) }
            }),
        }
        self.group.traffic.count_payload(self.group.distance(to), bytes.len());
        Ok(())
    }

    unsafe fn put_signal(&self, to: Rank, payload: Payload<'_>, signal: Signal) -> Result<()> {
        self.own_word(signal.word)?;
        // SAFETY: the caller makes the promises of `put_nbi`.
        unsafe { self.put_nbi(to, payload)? };
        if let Reach::Remote = self.reach(to)? {
            self.group.session.call(self.completion(to), || self.window.flush(to.index()));
        }
        self.signal_set(to, signal)
    }

    fn signal_set(&self, to: Rank, signal: Signal) -> Result<()> {
        match self.reach(to)? {
            Reach::Direct(segment) => handshake::set(self.word(segment, signal.word)?, signal.value),
            Reach::Remote => {
                self.own_word(signal.word)?;
                self.group.session.call(self.completion(to), || {
                    // SAFETY: the word exists here, so it does there.
                    unsafe { self.window.set(to.index(), signal.word, signal.value) }
                });
            }
        }
        self.group.traffic.count_signal(self.group.distance(to));
        Ok(())
    }

    fn signal_wait_until(&self, word: SymWord, until: Until, from: Rank, deadline: Deadline) -> Result<u64> {
        let value = self.own_word(word)?;
        self.reach(from)?;
        let Group { session, node, .. } = &*self.group;
        let wait = || {
            let awaited = Awaited::Signal { word, until, last_seen: value.load(Ordering::Relaxed) };
            Wait::new(from, awaited, deadline)
        };
        for look in 1.. {
            if let Some(seen) = handshake::see(value, until) {
                return Ok(seen);
            }
            session.call(wait(), || node.progress());
            if look % LOOKS_PER_CLOCK == 0 && deadline.remaining().is_none() {
                session.fail(wait());
            }
            if self.group.crowded {
                std::thread::yield_now();
            }
        }
        session.fail(wait())
    }

    fn signal_read(&self, word: SymWord) -> Result<u64> {
        Ok(handshake::read(self.own_word(word)?))
    }

    fn atomic_fetch_add(&self, to: Rank, word: SymWord, n: u64) -> Result<u64> {
        self.own_word(word)?;
        let Reach::Direct(segment) = self.reach(to)? else {
            return Err(TransportError::OtherNode { rank: to });
        };
        let before = handshake::take(self.word(segment, word)?, n);
        self.group.traffic.count_signal(self.group.distance(to));
        Ok(before)
    }

    fn fence(&self) {
        handshake::drain_streaming_stores();
        fence(Ordering::Release);
        self.group.flush(&self.window, self.group.deadline());
    }

    fn quiet(&self, deadline: Deadline) -> Result<()> {
        handshake::drain_streaming_stores();
        fence(Ordering::SeqCst);
        self.group.flush(&self.window, deadline);
        Ok(())
    }

    fn peer_ptr(&self, of: Rank, offset: SymOffset, len: usize) -> Result<Option<NonNull<u8>>> {
        self.check_range(offset, len)?;
        Ok(match self.reach(of)? {
            Reach::Direct(segment) => segment.payload(offset, len),
            Reach::Remote => None,
        })
    }

    fn local_ptr(&self, offset: SymOffset, len: usize) -> Result<NonNull<u8>> {
        let start = self.peer_ptr(self.group.rank(), offset, len)?;
        start.ok_or(TransportError::OutOfBounds { offset, len, size: self.window.size() })
    }

    fn count_direct(&self, with: Rank, bytes: usize) {
        if with.index() < self.group.comm.size() {
            self.group.traffic.count_payload(self.group.distance(with), bytes);
        }
    }
}
