//! The memory of one heap: shared inside the node, open to puts from other nodes.

use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::ffi;

use super::comm::Comm;
use super::session::check;
use crate::error::Result;
use crate::segment::Segment;
use crate::symmetric::{HEAP_ALIGN, HeapSize, SymOffset, SymWord};

/// Most bytes of one MPI call, whose counts are C ints.
const LARGEST_PUT: usize = 1 << 30;

/// A heap's memory on all ranks of a group, as one of them reaches it.
#[derive(Debug)]
pub(super) struct Window {
    shared: ffi::MPI_Win,
    /// `None` in a group of one node.
    remote: Option<ffi::MPI_Win>,
    /// By rank; `None` on other nodes.
    segments: Box<[Option<Segment>]>,
    size: HeapSize,
    /// By rank: whether something may not have reached it yet.
    open: Box<[AtomicBool]>,
}

// SAFETY: window handles are names that any thread may use, and the session makes the calls one at a time; segments may
// be shared.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

/// The ranks that allocate together.
#[derive(Clone, Copy)]
pub(super) struct Members<'a> {
    pub(super) group: &'a Comm,
    /// Those on this rank's node, which are consecutive in the group.
    pub(super) node: &'a Comm,
}

impl Window {
    /// Allocates zeroed memory on every rank. Collective.
    pub(super) fn allocate(members: Members<'_>, size: HeapSize) -> Result<Self, c_int> {
        let Members { group, node } = members;
        let bytes = size.required_bytes();
        let shared = allocate_shared(node, bytes + HEAP_ALIGN)?;
        let first = group.rank() - node.rank();
        let mut segments: Box<[_]> = (0..group.size()).map(|_| None).collect();
        for peer in 0..node.size() {
            let start = shared_start(shared, peer)?;
            // SAFETY: the peer's part of the window has `bytes` behind its aligned start. It is mapped until the
            // window is freed, which is after the last heap handle of this rank and of all others is gone.
            segments[first + peer] = unsafe { Segment::lent(start, size) };
        }
        let start = shared_start(shared, node.rank())?;
        // SAFETY: the range lies in this rank's own part, which no one else uses before the allocation has ended on
        // all ranks.
        unsafe { start.write_bytes(0, bytes) };
        let remote = match group.size() == node.size() {
            true => None,
            false => Some(open_to_puts(group, start, bytes)?),
        };
        let open = (0..group.size()).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { shared, remote, segments, size, open })
    }

    /// Frees the memory. Collective; no rank uses it any more.
    pub(super) fn free(&self) -> Result<(), c_int> {
        for mut window in self.remote.into_iter().chain([self.shared]) {
            // SAFETY: the window is valid and this rank has locked it; it is not used again.
            unsafe {
                check(ffi::MPI_Win_unlock_all(window))?;
                check(ffi::MPI_Win_free(&mut window))?;
            }
        }
        Ok(())
    }

    pub(super) fn size(&self) -> HeapSize {
        self.size
    }

    /// The memory of `rank`, if it is on this rank's node. The rank is in the group.
    pub(super) fn segment(&self, rank: usize) -> Option<&Segment> {
        self.segments[rank].as_ref()
    }

    /// Starts copying `bytes` to a range of `to`'s payload.
    ///
    /// # Safety
    /// The range lies in the payload, `to` is on another node, and the bytes stay unchanged until `to` is flushed.
    pub(super) unsafe fn put(&self, to: usize, offset: SymOffset, bytes: &[u8]) -> Result<(), c_int> {
        let Some(remote) = self.remote else { return Ok(()) };
        self.open[to].store(true, Ordering::Relaxed);
        for (index, bytes) in bytes.chunks(LARGEST_PUT).enumerate() {
            let at = offset.0 + index * LARGEST_PUT;
            let (from, at) = (bytes.as_ptr().cast(), at as ffi::MPI_Aint);
            // SAFETY: the window is locked for all ranks; the caller vouches for the range and the bytes.
            check(unsafe {
                let (count, kind) = (bytes.len() as c_int, ffi::RSMPI_UINT8_T);
                ffi::MPI_Put(from, count, kind, to as c_int, at, count, kind, remote)
            })?;
        }
        Ok(())
    }

    /// Sets a word of `to`, in one piece, and sends it on its way.
    ///
    /// # Safety
    /// The word exists and `to` is on another node.
    pub(super) unsafe fn set(&self, to: usize, word: SymWord, value: u64) -> Result<(), c_int> {
        let (Some(remote), Some(words)) = (self.remote, self.size.words_start()) else { return Ok(()) };
        self.open[to].store(true, Ordering::Relaxed);
        let (from, at) = ((&raw const value).cast(), (words + size_of::<u64>() * word.0) as ffi::MPI_Aint);
        // SAFETY: as in `put`; the value may go once the call is complete on this side, which the flush waits for.
        unsafe {
            let kind = ffi::RSMPI_UINT64_T;
            check(ffi::MPI_Accumulate(from, 1, kind, to as c_int, at, 1, kind, replace(), remote))?;
            check(ffi::MPI_Win_flush_local(to as c_int, remote))
        }
    }

    /// Waits until everything has reached `to`.
    pub(super) fn flush(&self, to: usize) -> Result<(), c_int> {
        let Some(remote) = self.remote else { return Ok(()) };
        self.open[to].store(false, Ordering::Relaxed);
        // SAFETY: the window is locked for all ranks.
        check(unsafe { ffi::MPI_Win_flush(to as c_int, remote) })
    }

    /// The ranks that something may not have reached yet.
    pub(super) fn unflushed(&self) -> impl Iterator<Item = usize> + '_ {
        let open = |&rank: &usize| self.open[rank].load(Ordering::Relaxed);
        (0..self.open.len()).filter(open)
    }
}

/// MPI_REPLACE, for which the bindings have no name of their own; this is Open MPI's.
fn replace() -> ffi::MPI_Op {
    ffi::MPI_Op((&raw mut ffi::ompi_mpi_op_replace).cast())
}

fn allocate_shared(node: &Comm, bytes: usize) -> Result<ffi::MPI_Win, c_int> {
    let (mut window, mut info) = (ffi::MPI_Win(ptr::null_mut()), ffi::MPI_Info(ptr::null_mut()));
    let mut start = ptr::null_mut::<c_void>();
    // SAFETY: the communicator is valid, the strings end in zero, and the places are there to be written.
    unsafe {
        check(ffi::MPI_Info_create(&mut info))?;
        // Every rank's part on pages of its own.
        check(ffi::MPI_Info_set(info, c"alloc_shared_noncontig".as_ptr(), c"true".as_ptr()))?;
        let place = (&raw mut start).cast();
        let size = bytes as ffi::MPI_Aint;
        check(ffi::MPI_Win_allocate_shared(size, 1, info, node.raw(), place, &mut window))?;
        check(ffi::MPI_Info_free(&mut info))?;
        lock(window)?;
    }
    Ok(window)
}

/// The first aligned byte of `peer`'s part of a shared window.
fn shared_start(window: ffi::MPI_Win, peer: usize) -> Result<NonNull<u8>, c_int> {
    let (mut size, mut unit, mut start) = (0, 0, ptr::null_mut::<u8>());
    // SAFETY: the window is shared and valid, and the places are there to be written.
    check(unsafe {
        let place = (&raw mut start).cast();
        ffi::MPI_Win_shared_query(window, peer as c_int, &mut size, &mut unit, place)
    })?;
    // Pages are at least as large as the alignment, so all ranks of the node skip the same bytes.
    let start = start.wrapping_add(start.align_offset(HEAP_ALIGN));
    NonNull::new(start).ok_or(ffi::MPI_ERR_OTHER as c_int)
}

fn open_to_puts(group: &Comm, start: NonNull<u8>, bytes: usize) -> Result<ffi::MPI_Win, c_int> {
    let mut window = ffi::MPI_Win(ptr::null_mut());
    let (base, size) = (start.as_ptr().cast(), bytes as ffi::MPI_Aint);
    // SAFETY: the memory is this rank's own and outlives the window, which is freed first.
    unsafe {
        check(ffi::MPI_Win_create(base, size, 1, ffi::RSMPI_INFO_NULL, group.raw(), &mut window))?;
        lock(window)?;
    }
    Ok(window)
}

/// Opens the one epoch of a window, in which all ranks may access it until it is freed.
///
/// # Safety
/// The window is valid and not locked.
unsafe fn lock(window: ffi::MPI_Win) -> Result<(), c_int> {
    // SAFETY: the caller vouches for the window.
    unsafe {
        check(ffi::MPI_Win_set_errhandler(window, ffi::RSMPI_ERRORS_RETURN))?;
        check(ffi::MPI_Win_lock_all(ffi::MPI_MODE_NOCHECK as c_int, window))
    }
}
