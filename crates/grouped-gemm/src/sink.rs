//! Where result rows go.

use std::marker::PhantomData;

use half::bf16;

use crate::GemmError;

/// Takes finished rows, a segment at a time, from several threads.
///
/// A segment starts at a multiple of 128 columns and is a multiple of 128 long, except where the row
/// ends, so that a sink may quantise groups of 128 as they arrive. Every segment of every row of the
/// groups is stored exactly once, in no particular order.
pub trait RowSink: Sync {
    /// Rows that can be stored.
    fn rows(&self) -> usize;
    /// Columns of a row; must be those of the result.
    fn columns(&self) -> usize;
    /// Takes columns `column..column + values.len()` of sorted row `row`.
    ///
    /// # Safety
    /// `row < self.rows()`, `column + values.len() <= self.columns()`, and no other call for an
    /// overlapping segment runs at the same time.
    unsafe fn store(&self, row: usize, column: usize, values: &[f32]);
}

/// Row-major memory of a sink, written by several threads in disjoint segments.
struct Destination<'a, T> {
    first: *mut T,
    rows: usize,
    columns: usize,
    pitch: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is through `segment`, whose callers keep segments disjoint.
unsafe impl<T: Send> Sync for Destination<'_, T> {}
// SAFETY: it stands for a mutable borrow of the memory, which may be sent where `T` may.
unsafe impl<T: Send> Send for Destination<'_, T> {}

impl<'a, T> Destination<'a, T> {
    fn new(values: &'a mut [T], columns: usize, pitch: usize) -> Result<Self, GemmError> {
        if pitch < columns || columns == 0 {
            return Err(GemmError::Pitch { what: "result", pitch, columns });
        }
        let rows = values.len().checked_sub(columns).map_or(0, |rest| rest / pitch + 1);
        Ok(Destination { first: values.as_mut_ptr(), rows, columns, pitch, memory: PhantomData })
    }

    /// # Safety
    /// As [`RowSink::store`]; the slice ends before another segment that overlaps it is made.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "callers keep segments disjoint")]
    unsafe fn segment(&self, row: usize, column: usize, len: usize) -> &mut [T] {
        debug_assert!(row < self.rows && column + len <= self.columns);
        // SAFETY: `new` borrowed `rows` rows of `columns` elements at `pitch`, and the caller's
        // segment lies inside them and is nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.pitch + column), len) }
    }
}

/// Stores rows as f32.
pub struct F32Rows<'a>(Destination<'a, f32>);

impl<'a> F32Rows<'a> {
    /// Rows of `columns` elements, `pitch` elements apart, in `values`.
    ///
    /// # Errors
    /// No columns, or a pitch below them.
    pub fn new(values: &'a mut [f32], columns: usize, pitch: usize) -> Result<Self, GemmError> {
        Destination::new(values, columns, pitch).map(F32Rows)
    }
}

impl RowSink for F32Rows<'_> {
    fn rows(&self) -> usize {
        self.0.rows
    }
    fn columns(&self) -> usize {
        self.0.columns
    }
    #[inline(always)]
    unsafe fn store(&self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: the contract is the same.
        unsafe { self.0.segment(row, column, values.len()) }.copy_from_slice(values);
    }
}

/// Stores rows as bf16, rounded to nearest even.
pub struct Bf16Rows<'a>(Destination<'a, bf16>);

impl<'a> Bf16Rows<'a> {
    /// Rows of `columns` elements, `pitch` elements apart, in `values`.
    ///
    /// # Errors
    /// No columns, or a pitch below them.
    pub fn new(values: &'a mut [bf16], columns: usize, pitch: usize) -> Result<Self, GemmError> {
        Destination::new(values, columns, pitch).map(Bf16Rows)
    }
}

impl RowSink for Bf16Rows<'_> {
    fn rows(&self) -> usize {
        self.0.rows
    }
    fn columns(&self) -> usize {
        self.0.columns
    }
    #[inline(always)]
    unsafe fn store(&self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: the contract is the same.
        let segment = unsafe { self.0.segment(row, column, values.len()) };
        for (stored, &value) in segment.iter_mut().zip(values) {
            *stored = round(value);
        }
    }
}

/// `bf16::from_f32` without a branch, so that a row is rounded in vectors.
#[inline(always)]
fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    // Only the bits of a NaN can wrap around.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_half_does() {
        let step = 0x1_0001u32 / 7;
        let ties = (0..=u16::MAX)
            .flat_map(|high| [0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(u32::from(high) << 16 | low)));
        let spread = (0..=u32::MAX / step).map(|i| f32::from_bits(i * step));
        for value in ties.chain(spread) {
            assert_eq!(round(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
        }
    }
}
