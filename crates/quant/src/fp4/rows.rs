//! Quantising one row of activations to NVFP4.

use fused_moe_core::Fp8Format;
use half::bf16;

use super::{MAX, NV_GROUP, VALUES, encode, whole_groups};
use crate::codec::{Encoder, decode_table};
use crate::error::{QuantError, check_len, check_scale};
use crate::row::Unrounded;

/// Smallest positive E4M3 scale.
const SMALLEST_SCALE: f32 = 1.0 / 512.0;

/// Quantises single rows to NVFP4 under one global scale. It is `Copy` and holds no buffers; no method allocates.
///
/// For a group of 16 with the largest finite magnitude `amax`, in f32 and from left to right:
///
/// ```text
/// scale = e4m3(min(amax · (1/6) · (1/global), 448))       rounded to nearest even
/// code  = e2m1(x · (1/(scale · global)))                   rounded to nearest even, ±6 beyond; 0 where scale is 0
/// ```
///
/// so that `x ≈ code · scale · global`. The formula is that of TensorRT-LLM's `quantization_utils.cuh` with
/// `global` in place of its reciprocal. ±Inf becomes ±6; a group with a NaN has the NaN scale (0x7F) and codes 0.
#[derive(Clone, Copy, Debug)]
pub struct Nvfp4Rows {
    global: f32,
    /// `1/6`, `1/global`.
    factors: [f32; 2],
}

impl Nvfp4Rows {
    /// Quantises under the global scale `global`.
    ///
    /// # Errors
    /// [`QuantError::BadScale`] for a scale that is not positive and finite, or under which an E4M3 scale could
    /// not be divided by.
    pub fn new(global: f32) -> Result<Self, QuantError> {
        check_scale(0, global)?;
        // The smallest and the largest quantum of a group must be numbers that can be divided by.
        for extreme in [SMALLEST_SCALE, Fp8Format::E4M3Fn.max()] {
            if check_scale(0, extreme * global).is_err() {
                return Err(QuantError::BadScale { index: 0, scale: global });
            }
        }
        Ok(Self { global, factors: [1.0 / MAX, 1.0 / global] })
    }

    /// The global scale.
    pub fn global(&self) -> f32 {
        self.global
    }

    /// Quantises `row` into `codes`, `[columns / 2]` pairs, and `scales`, `[columns / 16]` E4M3 codes.
    ///
    /// # Errors
    /// [`QuantError::RaggedGroup`], [`QuantError::BufferLength`].
    pub fn quantize<T: Unrounded>(
        &self,
        row: &[T],
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<(), QuantError> {
        whole_groups(row.len(), NV_GROUP)?;
        check_len("code pairs", row.len() / 2, codes.len())?;
        check_len("scales", row.len() / NV_GROUP, scales.len())?;
        let groups = row.as_chunks::<NV_GROUP>().0.iter().zip(codes.as_chunks_mut::<{ NV_GROUP / 2 }>().0);
        for ((group, codes), scale) in groups.zip(scales) {
            let group = group.map(T::widen);
            let quantum = self.quantum(&group);
            *scale = quantum.code;
            let unpacked = group.map(|x| encode(x * quantum.inverse) & quantum.mask);
            for (pair, [even, odd]) in codes.iter_mut().zip(unpacked.as_chunks().0) {
                *pair = even | odd << 4;
            }
        }
        Ok(())
    }

    /// Writes `code · scale` in place of the codes and scales of [`Nvfp4Rows::quantize`], which leaves one factor,
    /// the global scale, to whoever multiplies. bf16 holds every such product exactly. `values` is as long as
    /// `row`.
    ///
    /// # Errors
    /// [`QuantError::RaggedGroup`], [`QuantError::BufferLength`].
    pub fn quantize_to_values<T: Unrounded>(&self, row: &[T], values: &mut [bf16]) -> Result<(), QuantError> {
        whole_groups(row.len(), NV_GROUP)?;
        check_len("values", row.len(), values.len())?;
        let groups = row.as_chunks::<NV_GROUP>().0.iter().zip(values.as_chunks_mut::<NV_GROUP>().0);
        for (group, values) in groups {
            let group = group.map(T::widen);
            let quantum = self.quantum(&group);
            for (value, x) in values.iter_mut().zip(group) {
                let code = encode(x * quantum.inverse) & quantum.mask;
                let exact = VALUES[usize::from(code)] * quantum.scale;
                *value = bf16::from_bits((exact.to_bits() >> 16) as u16);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn quantum(&self, group: &[f32; NV_GROUP]) -> Quantum {
        let (mut amax, mut has_nan) = (0.0f32, false);
        for x in group {
            let magnitude = if x.is_finite() { x.abs() } else { 0.0 };
            amax = if magnitude > amax { magnitude } else { amax };
            has_nan |= x.is_nan();
        }
        let [sixth, inverse_global] = self.factors;
        let encoder = const { Encoder::new(Fp8Format::E4M3Fn) };
        let code = encoder.encode(if has_nan { f32::NAN } else { amax * sixth * inverse_global });
        let scale = decode_table(Fp8Format::E4M3Fn)[usize::from(code)];
        let mask = if scale > 0.0 { 0xf } else { 0 };
        Quantum { code, scale, inverse: 1.0 / (scale * self.global), mask }
    }
}

/// What the elements of a group are divided by.
struct Quantum {
    /// The E4M3 code of the scale.
    code: u8,
    scale: f32,
    inverse: f32,
    /// 0 where all codes are 0.
    mask: u8,
}
