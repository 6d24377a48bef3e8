//! Storage that starts on a cache line, so that no panel load is split over two lines, and lies on huge pages where
//! the system gives them: panels are read once from end to end, which costs a page walk every 4 KiB otherwise.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a cache line and of an AVX-512 register.
pub(crate) const LINE: usize = 64;

/// Bytes of a huge page of the common processors.
const HUGE_PAGE: usize = 2 << 20;

/// # Safety
/// Every bit pattern is a value of the type, which has no padding and divides a cache line evenly.
unsafe trait Plain: Copy {}
// SAFETY: integers have no padding and no invalid bit patterns.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}

/// A fixed number of `T` starting on a cache line, alone in its memory or beside others of one [`Slab`].
pub(crate) struct Aligned<T> {
    first: NonNull<T>,
    len: usize,
    /// Holds the elements.
    _region: Arc<Region>,
}

// SAFETY: the elements are owned, and a shared reference only reads them.
unsafe impl<T: Sync> Sync for Aligned<T> {}
// SAFETY: the elements are owned.
unsafe impl<T: Send> Send for Aligned<T> {}

#[expect(private_bounds, reason = "the element types are closed")]
impl<T: Plain> Aligned<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let slab = Slab::new(Slab::bytes_for::<T>(len));
        slab.take(len).expect("a slab has room for what it was made for")
    }

    /// In `slab` if there is one with enough room, else in memory of its own.
    pub(crate) fn zeroed_in(slab: Option<&Slab>, len: usize) -> Self {
        slab.and_then(|slab| slab.take(len)).unwrap_or_else(|| Self::zeroed(len))
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: `Slab::take` initialised `len` elements, which are nobody else's; a line is at least as aligned as
        // `T`, and every bit pattern is a valid `T` (`Plain`).
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

/// Memory that the weights of a layer share, so that small ones lie on huge pages too.
pub(crate) struct Slab {
    region: Arc<Region>,
    /// Bytes that were taken.
    taken: AtomicUsize,
}

/// An allocation, freed with the last of what lies in it.
struct Region {
    first: NonNull<u8>,
    /// Never of size zero.
    layout: Layout,
}

// SAFETY: a region only owns its memory; who reads and writes which part of it is a matter of `Slab::take`.
unsafe impl Sync for Region {}
// SAFETY: as above.
unsafe impl Send for Region {}

impl Slab {
    /// Bytes of a slab that `len` elements take.
    pub(crate) fn bytes_for<T>(len: usize) -> usize {
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_next_multiple_of(LINE));
        bytes.expect("the elements fit the address space")
    }

    /// On whole huge pages if `bytes` fill one.
    pub(crate) fn new(bytes: usize) -> Self {
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout =
            Layout::from_size_align(bytes.max(1), align).expect("the elements fit the address space");
        // SAFETY: the layout is not of size zero.
        let Some(first) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        if align == HUGE_PAGE {
            // Before anything is written: a page gets its size when it is first touched.
            advise_huge_pages(first, bytes);
        }
        Slab { region: Arc::new(Region { first, layout }), taken: AtomicUsize::new(0) }
    }

    /// The next `len` elements, zeroed; `None` if less is left.
    fn take<T: Plain>(&self, len: usize) -> Option<Aligned<T>> {
        let bytes = Self::bytes_for::<T>(len);
        let fits = |taken: usize| taken.checked_add(bytes).filter(|&end| end <= self.region.layout.size());
        let start = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        // SAFETY: `start + bytes` is at most the size of the region, and no other call got these bytes.
        let first = unsafe {
            let first = self.region.first.add(start);
            first.write_bytes(0, bytes);
            first
        };
        Some(Aligned { first: first.cast(), len, _region: Arc::clone(&self.region) })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `Slab::new` allocated it with this layout.
        unsafe { dealloc(self.first.as_ptr(), self.layout) }
    }
}

/// Asks for huge pages for the whole ones among `bytes` bytes from `first` on. It is advice: where it is refused, pages
/// are small and results the same.
fn advise_huge_pages(first: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let whole = bytes / HUGE_PAGE * HUGE_PAGE;
        // SAFETY: the pages lie inside an allocation that is not in use yet, and the advice changes no contents.
        let advised =
            unsafe { rustix::mm::madvise(first.as_ptr().cast(), whole, rustix::mm::Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, bytes, "no huge pages for weights");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (first, bytes);
}

/// The part of lent bytes that starts on a cache line, as 32-bit words.
pub(crate) fn words(bytes: &mut [u8]) -> &mut [u32] {
    let skip = bytes.as_ptr().align_offset(LINE).min(bytes.len());
    // SAFETY: any four bytes are a valid `u32`, and bytes have no invalid pattern.
    unsafe { bytes[skip..].align_to_mut::<u32>().1 }
}

/// The same words as floats.
pub(crate) fn floats(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: `u32` and `f32` have the same size and alignment, and every pattern is valid in both.
    unsafe { words.align_to_mut::<f32>().1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_zero_and_aligned() {
        for len in [0, 1, 100, HUGE_PAGE / 4 - 1, HUGE_PAGE / 4, HUGE_PAGE / 2 + 1] {
            let mut storage = Aligned::<u32>::zeroed(len);
            let align = if len * 4 >= HUGE_PAGE { HUGE_PAGE } else { LINE };
            assert_eq!(storage.as_slice().as_ptr().align_offset(align), 0, "{len} words");
            assert!(storage.as_slice().len() == len && storage.as_slice().iter().all(|&word| word == 0));
            storage.as_mut_slice().fill(7);
            assert!(storage.as_slice().iter().all(|&word| word == 7));
        }
    }

    #[test]
    fn a_slab_is_shared_without_overlap_and_outlived() {
        let slab = Slab::new(Slab::bytes_for::<u32>(5) + Slab::bytes_for::<u8>(HUGE_PAGE + 1));
        let mut words: Aligned<u32> = slab.take(5).unwrap();
        let mut codes = Aligned::<u8>::zeroed_in(Some(&slab), HUGE_PAGE + 1);
        words.as_mut_slice().fill(u32::MAX);
        assert!(codes.as_slice().iter().all(|&code| code == 0));
        assert!(slab.take::<u8>(1).is_none());
        let other = Aligned::<u8>::zeroed_in(Some(&slab), 3);
        codes.as_mut_slice().fill(7);
        drop(slab);
        drop(codes);
        assert_eq!((words.as_slice(), other.as_slice()), (&[u32::MAX; 5][..], &[0; 3][..]));
        assert_eq!(words.as_slice().as_ptr().align_offset(LINE), 0);
    }
}
