//! The memory behind one rank's part of a heap.

use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use crate::symmetric::{HeapSize, SymOffset, SymWord};

/// From this size on the kernel is asked for huge pages, in bytes.
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed memory for one [`HeapSize`]: payload from the start, words behind it.
#[derive(Debug)]
pub(crate) struct Segment {
    start: NonNull<u8>,
    size: HeapSize,
    words_start: usize,
    /// Whether the memory goes with the segment.
    is_owner: bool,
}

// SAFETY: a segment is memory without an owner thread; words are accessed atomically only, and who accesses which
// payload is settled by the unsafe operations of `Heap`.
unsafe impl Send for Segment {}
// SAFETY: as above; no method writes payload through `&self`.
unsafe impl Sync for Segment {}

impl Segment {
    /// Allocates zeroed memory, `None` if there is none. Pages are not touched: untouched ones cost nothing.
    pub(crate) fn allocate(size: HeapSize) -> Option<Self> {
        let bytes = size.required_bytes();
        let words_start = size.words_start()?;
        // No object may be larger than `isize::MAX` bytes; pointer arithmetic relies on it.
        if bytes > isize::MAX as usize {
            return None;
        }
        Some(Self { start: map_zeroed(bytes)?, size, words_start, is_owner: true })
    }

    /// A segment in memory that belongs to someone else.
    ///
    /// # Safety
    /// `start` is aligned to [`HEAP_ALIGN`](crate::HEAP_ALIGN) and the start of `size.required_bytes()` initialised bytes,
    /// which stay mapped as long as the segment. Words are accessed atomically only.
    #[cfg(feature = "mpi")]
    pub(crate) unsafe fn lent(start: NonNull<u8>, size: HeapSize) -> Option<Self> {
        Some(Self { start, size, words_start: size.words_start()?, is_owner: false })
    }

    /// Maps zeroed memory that other processes map as well: `size` from `offset` on in `file`, a multiple of the
    /// page size within a file that never shrinks.
    #[cfg(target_os = "linux")]
    pub(crate) fn map_shared(
        file: std::os::fd::BorrowedFd<'_>,
        offset: u64,
        size: HeapSize,
    ) -> std::io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};

        let bytes = size.required_bytes();
        let words_start = size.words_start().ok_or(std::io::ErrorKind::OutOfMemory)?;
        let held = rustix::fs::fstat(file)?.st_size as u64;
        if bytes > isize::MAX as usize || offset.checked_add(bytes as u64).is_none_or(|end| end > held) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory. It is backed by
        // the file in its whole length, and stays so as the file cannot shrink.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )?
        };
        let start = NonNull::new(start.cast::<u8>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let segment = Self { start, size, words_start, is_owner: true };
        advise_huge_pages(start, bytes);
        segment.populate()?;
        Ok(segment)
    }

    /// Takes every page into the page table of this process, and gives those memory that have none yet.
    ///
    /// Where a row goes in a peer's memory changes from round to round, so a process would go on to meet pages that it
    /// has not touched for many rounds: half of the time of a dispatch of eight processes. Memory that cannot be had is
    /// an error here; at a first access it would be a signal.
    #[cfg(target_os = "linux")]
    fn populate(&self) -> std::io::Result<()> {
        use rustix::io::Errno;
        use rustix::mm::{Advice, madvise};

        let bytes = self.size.required_bytes();
        // SAFETY: the range is the mapping of this segment. The advice changes no contents.
        match unsafe { madvise(self.start.as_ptr().cast(), bytes, Advice::LinuxPopulateWrite) } {
            // Linux before 5.14 does not know it; there pages come as they are touched.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn size(&self) -> HeapSize {
        self.size
    }

    /// The start of a payload range; `None` if the range leaves the payload.
    pub(crate) fn payload(&self, offset: SymOffset, len: usize) -> Option<NonNull<u8>> {
        let end = offset.0.checked_add(len)?;
        if end > self.size.bytes {
            return None;
        }
        // SAFETY: the offset is at most the size of the payload, which lies within the allocation.
        Some(unsafe { self.start.add(offset.0) })
    }

    /// A word; `None` if there is no such word.
    pub(crate) fn word(&self, word: SymWord) -> Option<&AtomicU64> {
        if word.0 >= self.size.words {
            return None;
        }
        // SAFETY: word `i` lies 8·i bytes behind `words_start`, within the allocation and 8-aligned because both
        // summands are; the memory is initialised (zeroed) and nothing but this function gives access to words.
        Some(unsafe { self.start.add(self.words_start + 8 * word.0).cast::<AtomicU64>().as_ref() })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if !self.is_owner {
            return;
        }
        // SAFETY: `start` came from `map_zeroed` with this very size, and no reference into the segment outlives
        // the heap handles that keep it.
        unsafe { unmap(self.start, self.size.required_bytes()) }
    }
}

#[cfg(unix)]
fn map_zeroed(bytes: usize) -> Option<NonNull<u8>> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

    // SAFETY: a fresh private mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe {
        mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    };
    let start = NonNull::new(start.ok()?.cast::<u8>())?;
    #[cfg(target_os = "linux")]
    advise_huge_pages(start, bytes);
    Some(start)
}

/// Asks for huge pages where they are worth it, for the whole mapping at `start`.
#[cfg(target_os = "linux")]
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    if bytes >= HUGE_PAGE {
        // SAFETY: the range is a mapping just made. The advice changes no contents; a kernel without huge pages
        // refuses it, and then nothing is lost but speed.
        let _ =
            unsafe { rustix::mm::madvise(start.as_ptr().cast(), bytes, rustix::mm::Advice::LinuxHugepage) };
    }
}

#[cfg(unix)]
unsafe fn unmap(start: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller hands over a whole mapping of `map_zeroed` that no one uses any more.
    let _ = unsafe { rustix::mm::munmap(start.as_ptr().cast(), bytes) };
}

#[cfg(not(unix))]
fn layout(bytes: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes, crate::symmetric::HEAP_ALIGN).ok()
}

#[cfg(not(unix))]
fn map_zeroed(bytes: usize) -> Option<NonNull<u8>> {
    // SAFETY: `required_bytes` is never zero.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout(bytes)?) })
}

#[cfg(not(unix))]
unsafe fn unmap(start: NonNull<u8>, bytes: usize) {
    if let Some(layout) = layout(bytes) {
        // SAFETY: the caller hands over an allocation of `map_zeroed`, made with this layout.
        unsafe { std::alloc::dealloc(start.as_ptr(), layout) }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::symmetric::HEAP_ALIGN;

    #[rstest]
    #[case(0, 0)]
    #[case(1, 1)]
    #[case(5000, 3)]
    #[case(3 << 20, 100)]
    fn memory_is_zeroed_aligned_and_bounded(#[case] bytes: usize, #[case] words: usize) {
        let segment = Segment::allocate(HeapSize { bytes, words }).unwrap();
        let start = segment.payload(SymOffset(0), bytes).unwrap();
        assert_eq!(start.as_ptr() as usize % HEAP_ALIGN, 0);
        // SAFETY: the range was checked, and this test is alone with the segment.
        assert!(unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }.iter().all(|&b| b == 0));
        assert_eq!(segment.payload(SymOffset(bytes), 1), None);
        assert_eq!(segment.payload(SymOffset(1), usize::MAX), None);
        for word in 0..words {
            let word = segment.word(SymWord(word)).unwrap();
            assert_eq!(word.fetch_add(1, std::sync::atomic::Ordering::Relaxed), 0);
        }
        assert!(segment.word(SymWord(words)).is_none());
        assert!(segment.word(SymWord(usize::MAX)).is_none());
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        assert!(Segment::allocate(HeapSize { bytes: usize::MAX, words: 0 }).is_none());
        assert!(Segment::allocate(HeapSize { bytes: isize::MAX as usize, words: 8 }).is_none());
        assert!(Segment::allocate(HeapSize { bytes: 0, words: usize::MAX }).is_none());
    }
}
