//! The heap of a group that shares memory: every operation is a load, a store or a copy.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use fused_moe_core::Rank;

use super::group::Member;
use crate::deadline::Deadline;
use crate::doorbell::Cause;
use crate::error::{Awaited, Result, Silence, TransportError};
use crate::handshake;
use crate::heap::{Heap, Payload, Signal, Until};
use crate::segment::Segment;
use crate::symmetric::{HeapSize, SymOffset, SymWord};
use crate::traffic::Distance;

/// A heap as one rank sees it.
pub(super) struct SharedHeap {
    member: Arc<Member>,
    size: HeapSize,
    /// One per rank, each kept alive by every handle: a peer's late put never hits unmapped memory.
    segments: Box<[Arc<Segment>]>,
}

impl SharedHeap {
    pub(super) fn new(member: Arc<Member>, size: HeapSize, segments: Box<[Arc<Segment>]>) -> Self {
        debug_assert!(segments.iter().all(|segment| segment.size() == size));
        Self { member, size, segments }
    }

    fn segment(&self, rank: Rank) -> Result<&Segment> {
        let world_size = self.segments.len();
        let segment = self.segments.get(rank.index()).map(Arc::as_ref);
        segment.ok_or(TransportError::NoSuchRank { rank, world_size })
    }

    fn word(&self, of: Rank, word: SymWord) -> Result<&AtomicU64> {
        self.segment(of)?.word(word).ok_or(TransportError::NoSuchWord { word, size: self.size })
    }

    fn payload(&self, of: Rank, offset: SymOffset, len: usize) -> Result<NonNull<u8>> {
        let start = self.segment(of)?.payload(offset, len);
        start.ok_or(TransportError::OutOfBounds { offset, len, size: self.size })
    }

    /// Stores a signal in `word`, which is that of `signal` at `to`, and wakes `to` if it sleeps on it.
    fn set(&self, to: Rank, word: &AtomicU64, signal: Signal) -> Result<()> {
        handshake::set(word, signal.value);
        self.notify(to, signal.word)
    }

    fn notify(&self, to: Rank, word: SymWord) -> Result<()> {
        self.member.group.seat(to)?.doorbell.ring(Cause::word(word));
        self.member.traffic.count_signal(self.member.distance(to));
        Ok(())
    }
}

// SAFETY: signals are release stores and acquire loads, with non-temporal stores drained before, and puts are
// complete when they return; pointers come from segments, which check the range and live as long as the handle.
unsafe impl Heap for SharedHeap {
    fn rank(&self) -> Rank {
        self.member.rank
    }

    fn size(&self) -> HeapSize {
        self.size
    }

    unsafe fn put_nbi(&self, to: Rank, payload: Payload<'_>) -> Result<()> {
        let Payload { offset, bytes } = payload;
        let target = self.payload(to, offset, bytes.len())?;
        // SAFETY: `payload` has checked the target range; the caller promises that the source does not overlap it
        // and that no one else touches it.
        unsafe { target.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        self.member.traffic.count_payload(self.member.distance(to), bytes.len());
        Ok(())
    }

    unsafe fn put_signal(&self, to: Rank, payload: Payload<'_>, signal: Signal) -> Result<()> {
        let word = self.word(to, signal.word)?;
        // SAFETY: the caller makes the promises of `put_nbi`.
        unsafe { self.put_nbi(to, payload)? };
        self.set(to, word, signal)
    }

    fn signal_set(&self, to: Rank, signal: Signal) -> Result<()> {
        let word = self.word(to, signal.word)?;
        self.set(to, word, signal)
    }

    fn signal_wait_until(&self, word: SymWord, until: Until, from: Rank, deadline: Deadline) -> Result<u64> {
        let value = self.word(self.member.rank, word)?;
        let group = &self.member.group;
        let setter = group.seat(from)?;
        let look = || handshake::poll(value, until, || setter.shuns_signals().is_some());
        let doorbell = &self.member.seat().doorbell;
        let outcome = doorbell.wait(Cause::word(word), group.spin, deadline, look);
        outcome.unwrap_or(Err(Silence::Deadline)).map_err(|silence| {
            let silence = match silence {
                Silence::Departed => setter.shuns_signals().unwrap_or(silence),
                other => other,
            };
            let (rank, silence) = self.member.blame(from, silence);
            let last_seen = value.load(Ordering::Relaxed);
            let awaited = Awaited::Signal { word, until, last_seen };
            TransportError::PeerLost { rank, awaited, silence }
        })
    }

    fn signal_read(&self, word: SymWord) -> Result<u64> {
        Ok(handshake::read(self.word(self.member.rank, word)?))
    }

    fn atomic_fetch_add(&self, to: Rank, word: SymWord, n: u64) -> Result<u64> {
        let counter = self.word(to, word)?;
        if self.member.distance(to) == Distance::OtherNode {
            return Err(TransportError::OtherNode { rank: to });
        }
        let before = handshake::take(counter, n);
        self.notify(to, word)?;
        Ok(before)
    }

    fn fence(&self) {
        handshake::drain_streaming_stores();
        fence(Ordering::Release);
    }

    fn quiet(&self, _deadline: Deadline) -> Result<()> {
        handshake::drain_streaming_stores();
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn peer_ptr(&self, of: Rank, offset: SymOffset, len: usize) -> Result<Option<NonNull<u8>>> {
        let start = self.payload(of, offset, len)?;
        Ok(Some(start).filter(|_| self.member.distance(of) != Distance::OtherNode))
    }

    fn local_ptr(&self, offset: SymOffset, len: usize) -> Result<NonNull<u8>> {
        self.payload(self.member.rank, offset, len)
    }

    fn count_direct(&self, with: Rank, bytes: usize) {
        if with.index() < self.segments.len() {
            self.member.traffic.count_payload(self.member.distance(with), bytes);
        }
    }
}
