//! Symmetric memory: what one rank may do to another's.

use std::ptr::NonNull;

use fused_moe_core::Rank;

use crate::deadline::Deadline;
use crate::error::Result;
use crate::symmetric::{HeapSize, SymOffset, SymWord};

/// The condition under which a wait on a word ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The word equals the value.
    Eq(u64),
    /// The word is at least the value.
    Ge(u64),
}

impl Until {
    /// Whether a word of `value` fulfils the condition.
    pub const fn holds(self, value: u64) -> bool {
        match self {
            Until::Eq(wanted) => value == wanted,
            Until::Ge(wanted) => value >= wanted,
        }
    }
}

impl std::fmt::Display for Until {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Until::Eq(wanted) => write!(f, "== {wanted}"),
            Until::Ge(wanted) => write!(f, ">= {wanted}"),
        }
    }
}

/// A payload and the place in a heap that it goes to.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// Where it goes.
    pub offset: SymOffset,
    /// The bytes; there may be none.
    pub bytes: &'a [u8],
}

/// A word and the value to set it to. A signal is SET, never added to, and has one writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// The word.
    pub word: SymWord,
    /// Its new value.
    pub value: u64,
}

/// The same amount of memory on every rank, addressed alike, as one rank sees it.
///
/// A heap has a payload (bytes) and words (64-bit signals and counters). Words are only ever accessed atomically,
/// so operations on words are safe. Payload is plain memory; who may touch which bytes when is up to the
/// protocol of the caller, so operations on payload are unsafe.
///
/// # The access rule
/// While a rank writes a range of payload (from the start of the operation until it has completed: see Ordering),
/// no other thread on any rank reads or writes any byte of it; while a reference to a range exists, no one
/// writes it (shared) or touches it (exclusive). A protocol keeps the rule by handing a range over with a signal:
/// the writer's last access is ordered before the signal, the reader's first after its wait for it.
///
/// # Ordering
/// - `put_signal` and `signal_set` release: whoever sees the new value, by `signal_wait_until` or `signal_read`,
///   which acquire, sees all payload of the same `put_signal`. It also sees every earlier put of the setting
///   thread to the same rank if a [`fence`](Heap::fence) came between, and every earlier direct write (through
///   [`peer_ptr`](Heap::peer_ptr), non-temporal stores included) without one.
/// - A put may be under way when the call returns. [`quiet`](Heap::quiet) waits until all puts of this rank have
///   completed; the source of a put must not change before that.
/// - [`atomic_fetch_add`](Heap::atomic_fetch_add) acquires and releases.
/// - Puts and signals of two ranks, or to two ranks, have no order between them.
///
/// # Safety
/// An implementation keeps the ordering above. The pointers of [`local_ptr`](Heap::local_ptr) and
/// [`peer_ptr`](Heap::peer_ptr) are valid for reads and writes of the checked range, which is initialised, for as
/// long as the handle lives, and the payload is aligned to [`HEAP_ALIGN`](crate::HEAP_ALIGN).
pub unsafe trait Heap: Send + Sync {
    /// This rank.
    fn rank(&self) -> Rank;

    /// What each rank contributes.
    fn size(&self) -> HeapSize;

    /// Starts copying `payload` into `to`'s heap. Zero bytes are a no-op within bounds.
    ///
    /// # Errors
    /// [`OutOfBounds`](crate::TransportError::OutOfBounds), [`NoSuchRank`](crate::TransportError::NoSuchRank).
    ///
    /// # Safety
    /// The destination keeps the access rule. The source does not overlap it and stays unchanged until
    /// [`quiet`](Heap::quiet).
    unsafe fn put_nbi(&self, to: Rank, payload: Payload<'_>) -> Result<()>;

    /// Starts copying `payload` into `to`'s heap, and then sets `signal` there: whoever sees the signal sees the
    /// payload.
    ///
    /// # Errors
    /// As [`put_nbi`](Heap::put_nbi), [`NoSuchWord`](crate::TransportError::NoSuchWord). Nothing is written then.
    ///
    /// # Safety
    /// As [`put_nbi`](Heap::put_nbi).
    unsafe fn put_signal(&self, to: Rank, payload: Payload<'_>, signal: Signal) -> Result<()>;

    /// Sets a word of `to`.
    ///
    /// # Errors
    /// [`NoSuchRank`](crate::TransportError::NoSuchRank), [`NoSuchWord`](crate::TransportError::NoSuchWord).
    fn signal_set(&self, to: Rank, signal: Signal) -> Result<()>;

    /// Waits until a word of this rank fulfils `until` and returns its value. `from` is the rank that sets it:
    /// the wait ends early if that rank has left.
    ///
    /// # Errors
    /// [`PeerLost`](crate::TransportError::PeerLost) with `from` by the deadline;
    /// [`NoSuchRank`](crate::TransportError::NoSuchRank), [`NoSuchWord`](crate::TransportError::NoSuchWord).
    fn signal_wait_until(&self, word: SymWord, until: Until, from: Rank, deadline: Deadline) -> Result<u64>;

    /// The value of a word of this rank.
    ///
    /// # Errors
    /// [`NoSuchWord`](crate::TransportError::NoSuchWord).
    fn signal_read(&self, word: SymWord) -> Result<u64>;

    /// Adds `n` to a word of `to` (wrapping) and returns the value before. Inside a node only.
    ///
    /// # Errors
    /// [`OtherNode`](crate::TransportError::OtherNode), [`NoSuchRank`](crate::TransportError::NoSuchRank),
    /// [`NoSuchWord`](crate::TransportError::NoSuchWord).
    fn atomic_fetch_add(&self, to: Rank, word: SymWord, n: u64) -> Result<u64>;

    /// Orders this thread's earlier puts and signals before its later ones, rank by rank.
    fn fence(&self);

    /// Waits until all earlier puts and signals of this rank have completed at their destinations.
    ///
    /// # Errors
    /// [`PeerLost`](crate::TransportError::PeerLost) by the deadline.
    fn quiet(&self, deadline: Deadline) -> Result<()>;

    /// The start of a payload range of `of`, if this rank reaches it by loads and stores: always for itself and
    /// inside a node, never between nodes. Valid as long as the heap handle. Not counted as traffic: see
    /// [`count_direct`](Heap::count_direct).
    ///
    /// # Errors
    /// [`OutOfBounds`](crate::TransportError::OutOfBounds), [`NoSuchRank`](crate::TransportError::NoSuchRank).
    fn peer_ptr(&self, of: Rank, offset: SymOffset, len: usize) -> Result<Option<NonNull<u8>>>;

    /// The start of a payload range of this rank.
    ///
    /// # Errors
    /// [`OutOfBounds`](crate::TransportError::OutOfBounds).
    fn local_ptr(&self, offset: SymOffset, len: usize) -> Result<NonNull<u8>>;

    /// Counts one transfer of `bytes` that the caller makes through [`peer_ptr`](Heap::peer_ptr). A rank outside
    /// the group is not counted.
    fn count_direct(&self, with: Rank, bytes: usize);

    /// A payload range of this rank, to read. Starts at an alignment of at least that of `offset`, up to
    /// [`HEAP_ALIGN`](crate::HEAP_ALIGN).
    ///
    /// # Errors
    /// [`OutOfBounds`](crate::TransportError::OutOfBounds).
    ///
    /// # Safety
    /// The access rule holds for the range as long as the reference lives.
    unsafe fn local(&self, offset: SymOffset, len: usize) -> Result<&[u8]> {
        let start = self.local_ptr(offset, len)?;
        // SAFETY: `local_ptr` has checked the range, the heap keeps it mapped and initialised while `self` is
        // borrowed, and the caller keeps the access rule.
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) })
    }

    /// A payload range of this rank, to write.
    ///
    /// # Errors
    /// [`OutOfBounds`](crate::TransportError::OutOfBounds).
    ///
    /// # Safety
    /// The access rule holds for the range as long as the reference lives; in particular no two exist at once.
    #[expect(clippy::mut_from_ref, reason = "exclusive by the access rule, not by the borrow of the heap")]
    unsafe fn local_mut(&self, offset: SymOffset, len: usize) -> Result<&mut [u8]> {
        let start = self.local_ptr(offset, len)?;
        // SAFETY: as in `local`; the access rule makes the reference the only one.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) })
    }

    /// A payload range of `of`, to read in place, counted as one transfer of `len` bytes. `None` between nodes.
    ///
    /// # Errors
    /// As [`peer_ptr`](Heap::peer_ptr).
    ///
    /// # Safety
    /// The access rule holds for the range as long as the reference lives.
    unsafe fn peer_slice(&self, of: Rank, offset: SymOffset, len: usize) -> Result<Option<&[u8]>> {
        let Some(start) = self.peer_ptr(of, offset, len)? else { return Ok(None) };
        self.count_direct(of, len);
        // SAFETY: `peer_ptr` has checked the range and it stays mapped while `self` is borrowed; the caller keeps
        // the access rule.
        Ok(Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }))
    }

    /// A payload range of `of`, to write in place, counted as one transfer of `len` bytes. `None` between nodes.
    /// Ordered before a later `put_signal` or `signal_set` of the same thread without a fence.
    ///
    /// # Errors
    /// As [`peer_ptr`](Heap::peer_ptr).
    ///
    /// # Safety
    /// The access rule holds for the range as long as the reference lives; in particular no two exist at once.
    #[expect(clippy::mut_from_ref, reason = "exclusive by the access rule, not by the borrow of the heap")]
    unsafe fn peer_slice_mut(&self, of: Rank, offset: SymOffset, len: usize) -> Result<Option<&mut [u8]>> {
        let Some(start) = self.peer_ptr(of, offset, len)? else { return Ok(None) };
        self.count_direct(of, len);
        // SAFETY: as in `peer_slice`; the access rule makes the reference the only one.
        Ok(Some(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }))
    }
}
