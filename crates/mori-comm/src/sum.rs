//! Rows of outputs and their sums.

use half::bf16;
use quant::{Isa, Term, sum_rows};
use smallvec::SmallVec;

/// The rows of a sum, in their order. More than these are rare, and cost an allocation.
pub(crate) type Terms<'a> = SmallVec<[Term<'a>; 16]>;

/// A row of the layer's output.
pub(crate) enum OutputRow<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl OutputRow<'_> {
    /// Writes the sum of `terms`, rounded once.
    pub fn write(self, terms: &[Term<'_>]) {
        match self {
            OutputRow::F32(out) => sum_rows(Isa::detect(), terms, out),
            OutputRow::Bf16(out) => sum_rows(Isa::detect(), terms, out),
        }
    }
}

/// The bytes of `elements`.
pub(crate) fn bytes_of(elements: &[bf16]) -> &[u8] {
    // SAFETY: a bf16 is two initialised bytes without padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// `bytes` of a region as elements.
pub(crate) fn elements_of(bytes: &[u8]) -> &[bf16] {
    // SAFETY: any two bytes are a bf16.
    let (before, elements, behind) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && behind.is_empty(), "a row of a region begins and ends with an element");
    elements
}
