//! Storage that starts on a cache line, so that no panel load is split over two lines, and lies on huge pages where
//! the system gives them: panels are read once from end to end, which costs a page walk every 4 KiB otherwise.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

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

/// A fixed number of `T` starting on a cache line, and on a huge page if they fill one.
pub(crate) struct Aligned<T> {
    first: NonNull<T>,
    len: usize,
    /// Of the allocation, never of size zero.
    layout: Layout,
}

// SAFETY: the elements are owned, and a shared reference only reads them.
unsafe impl<T: Sync> Sync for Aligned<T> {}
// SAFETY: the elements are owned.
unsafe impl<T: Send> Send for Aligned<T> {}

#[expect(private_bounds, reason = "the element types are closed")]
impl<T: Plain> Aligned<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("the elements fit the address space").max(1);
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout = Layout::from_size_align(bytes, align).expect("the elements fit the address space");
        // SAFETY: the layout is not of size zero.
        let Some(first) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        if align == HUGE_PAGE {
            advise_huge_pages(first, bytes);
        }
        // Written only after the advice: a page gets its size when it is first touched.
        // SAFETY: `first` is an allocation of `bytes` bytes.
        unsafe { first.write_bytes(0, bytes) };
        Aligned { first: first.cast(), len, layout }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: `zeroed` allocated and initialised `len` elements, a line is at least as aligned as `T`,
        // and every bit pattern is a valid `T` (`Plain`).
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for Aligned<T> {
    fn drop(&mut self) {
        // SAFETY: `zeroed` allocated it with this layout.
        unsafe { dealloc(self.first.as_ptr().cast(), self.layout) }
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
}
