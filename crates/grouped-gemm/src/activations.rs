//! The left operand: rows of activations, bf16, f32 or fp8 with scales, in the caller's memory.

use half::bf16;

use crate::kernel::Kernel;
use crate::panel::SCALE_BLOCK;
use crate::{Fp8Kind, GemmError};

/// Row-major rows in lent memory.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// The elements; row `i` starts at `i * pitch`. The last row need not be padded to the pitch.
    pub values: &'a [T],
    /// Elements from one row to the next, at least the number of columns.
    pub pitch: usize,
}

impl<'a, T> Rows<'a, T> {
    /// How many rows of `columns` elements there are.
    pub fn count(&self, columns: usize) -> usize {
        match self.values.len().checked_sub(columns) {
            Some(rest) => rest / self.pitch.max(1) + 1,
            None => 0,
        }
    }

    fn row(&self, row: usize, columns: usize) -> &'a [T] {
        &self.values[row * self.pitch..][..columns]
    }

    fn check(&self, what: &'static str, columns: usize) -> Result<(), GemmError> {
        if self.pitch < columns {
            return Err(GemmError::Pitch { what, pitch: self.pitch, columns });
        }
        Ok(())
    }
}

/// Rows `[m, K]` of activations.
#[derive(Clone, Copy, Debug)]
pub enum Activations<'a> {
    /// bf16 values.
    Bf16(Rows<'a, bf16>),
    /// bf16 values with `x = value * scale`, the scale applied to f32 sums. NVFP4 activations are this: bf16 holds
    /// every product of a code and its group's scale, and the global scale is what remains.
    ScaledBf16 {
        /// The values.
        values: Rows<'a, bf16>,
        /// One for all rows.
        scale: f32,
    },
    /// f32 values, for f32 weights only, which take no others.
    F32(Rows<'a, f32>),
    /// fp8 codes with `x = code * scale`. The codes are widened to bf16 exactly, the scales are
    /// applied to f32 sums.
    Fp8 {
        /// The codes.
        codes: Rows<'a, u8>,
        /// The encoding of the codes.
        kind: Fp8Kind,
        /// Their scales.
        scale: ActivationScale<'a>,
    },
}

/// Scales of fp8 activations.
#[derive(Clone, Copy, Debug)]
pub enum ActivationScale<'a> {
    /// One scale for all rows.
    PerTensor(f32),
    /// One scale per row, `[m]`.
    PerToken(&'a [f32]),
    /// One scale per 128 values of a row, row-major `[m, ceil(K / 128)]`; the last group may be ragged.
    Group128(Rows<'a, f32>),
}

impl Activations<'_> {
    /// Checks pitches and scale sizes for an inner size of `k`, and returns the number of rows.
    pub(crate) fn check(&self, k: usize) -> Result<usize, GemmError> {
        let (codes, scale) = match self {
            Activations::Bf16(rows) | Activations::ScaledBf16 { values: rows, .. } => {
                rows.check("activation", k)?;
                return Ok(rows.count(k));
            }
            Activations::F32(rows) => {
                rows.check("activation", k)?;
                return Ok(rows.count(k));
            }
            Activations::Fp8 { codes, scale, .. } => (codes, scale),
        };
        codes.check("activation", k)?;
        let rows = codes.count(k);
        let (what, found) = match scale {
            ActivationScale::PerTensor(_) => return Ok(rows),
            ActivationScale::PerToken(scales) => ("per-token activation scale", scales.len()),
            ActivationScale::Group128(scales) => {
                let groups = k.div_ceil(SCALE_BLOCK);
                scales.check("1x128 activation scale", groups)?;
                ("1x128 activation scale", scales.count(groups))
            }
        };
        // Scales that lie past the codes would be a caller's mix-up of two batches.
        if found == rows { Ok(rows) } else { Err(GemmError::ScaleLength { what, wanted: rows, found }) }
    }

    /// The 1x128 scales, if that is how these activations are scaled.
    pub(crate) fn groups(&self) -> Option<Rows<'_, f32>> {
        match self {
            Activations::Fp8 { scale: ActivationScale::Group128(scales), .. } => Some(*scales),
            _ => None,
        }
    }

    /// The factor on the finished sum of a row.
    pub(crate) fn row_scale(&self, row: usize) -> Option<f32> {
        match self {
            Activations::ScaledBf16 { scale, .. } => Some(*scale),
            Activations::Fp8 { scale: ActivationScale::PerTensor(scale), .. } => Some(*scale),
            Activations::Fp8 { scale: ActivationScale::PerToken(scales), .. } => Some(scales[row]),
            _ => None,
        }
    }

    /// Whether they are f32.
    pub(crate) fn is_f32(&self) -> bool {
        matches!(self, Activations::F32(_))
    }

    /// Widens `pairs` of row `row` to operand words. An odd K ends in a zero half. Of f32 values each is a word, and
    /// `pairs` counts these.
    pub(crate) fn pack_row<K: Kernel>(&self, kernel: K, row: usize, pairs: PairRange, words: &mut [u32]) {
        let (start, end) = (2 * pairs.start, (2 * pairs.end).min(pairs.k));
        match self {
            Activations::Bf16(rows) | Activations::ScaledBf16 { values: rows, .. } => {
                let row = &rows.row(row, pairs.k)[start..end];
                kernel.vectorize(
                    #[inline(always)]
                    || {
                        let (even, last) = row.as_chunks::<2>();
                        for (word, pair) in words.iter_mut().zip(even) {
                            *word = u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16;
                        }
                        if let [last] = last {
                            words[even.len()] = u32::from(last.to_bits());
                        }
                    },
                );
            }
            Activations::F32(rows) => {
                let row = &rows.row(row, pairs.k)[pairs.start..pairs.end];
                words.iter_mut().zip(row).for_each(|(word, value)| *word = value.to_bits());
            }
            Activations::Fp8 { codes, kind, .. } => {
                kernel.decode_row(*kind, &codes.row(row, pairs.k)[start..end], words);
            }
        }
    }
}

/// A run of K pairs out of an inner size of `k`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairRange {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) k: usize,
}

impl PairRange {
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }
}
