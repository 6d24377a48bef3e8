//! Storage that starts on a cache line, so that no panel load is split over two lines.

use std::marker::PhantomData;

/// Bytes of a cache line and of an AVX-512 register.
pub(crate) const LINE: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// # Safety
/// Every bit pattern is a value of the type, which has no padding and divides a [`Line`] evenly.
unsafe trait Plain: Copy {}
// SAFETY: integers have no padding and no invalid bit patterns.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}

/// A fixed number of `T` starting on a cache line.
pub(crate) struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

#[expect(private_bounds, reason = "the element types are closed")]
impl<T: Plain> Aligned<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let lines = vec![Line([0; LINE]); (len * size_of::<T>()).div_ceil(LINE)];
        Aligned { lines, len, element: PhantomData }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: `zeroed` allocated and initialised at least `len` elements, a line is at least as
        // aligned as `T`, and every bit pattern is a valid `T` (`Plain`).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `self` is borrowed mutably. Bytes have no invalid pattern,
        // so whatever is written leaves the lines valid.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
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
