//! Quantising and dequantising weight matrices in FP4.

use fused_moe_core::{DType, Fp8Format, TensorView};
use half::bf16;

use super::{E8M0_NAN, MAX, MX_GROUP, NV_GROUP, Nvfp4Rows, VALUES, decode_e8m0, encode, whole_groups};
use crate::codec::decode_table;
use crate::error::{QuantError, check_len};
use crate::row::{AMAX_FLOOR, Unrounded};

/// Quantises `weights` `[n, k]`, bf16 or f32, on the host, rows contiguous, to MXFP4: pairs of codes `[n, k / 2]` and
/// E8M0 scales `[n, k / 32]`, both without gaps. Nothing is allocated.
///
/// The scale of a group is the smallest power of two under which no element exceeds 6, `2^ceil(log2(amax / 6))` with
/// `amax` of at least 1e-10: AITER's and the OCP tools' "round up".
///
/// # Errors
/// [`QuantError::NotMatrix`], [`QuantError::InputDType`], [`QuantError::RaggedGroup`], [`QuantError::BufferLength`],
/// [`QuantError::View`], and [`QuantError::NanWeight`], since FP4 has no NaN. ±Inf becomes ±6 times the scale of the
/// finite elements.
pub fn quantize_mxfp4(
    weights: TensorView<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), QuantError> {
    let [n, k] = dims(weights, MX_GROUP)?;
    check_len("code pairs", n * k / 2, codes.len())?;
    check_len("scales", n * k / MX_GROUP, scales.len())?;
    let rows = codes.chunks_mut((k / 2).max(1)).zip(scales.chunks_mut((k / MX_GROUP).max(1)));
    for (row, (codes, scales)) in rows.enumerate() {
        match weights.dtype() {
            DType::Bf16 => mx_row(weights.row::<bf16>(row)?, codes, scales),
            _ => mx_row(weights.row::<f32>(row)?, codes, scales),
        }
        .map_err(|column| QuantError::NanWeight { index: row * k + column })?;
    }
    Ok(())
}

/// One row; the column of a NaN if there is one.
fn mx_row<T: Unrounded>(row: &[T], codes: &mut [u8], scales: &mut [u8]) -> Result<(), usize> {
    let codes = codes.as_chunks_mut::<{ MX_GROUP / 2 }>().0;
    for (i, ((group, codes), scale)) in
        row.as_chunks::<MX_GROUP>().0.iter().zip(codes).zip(scales).enumerate()
    {
        let group = group.map(T::widen);
        if let Some(at) = group.iter().position(|x| x.is_nan()) {
            return Err(i * MX_GROUP + at);
        }
        *scale = mx_scale(group.iter().filter(|x| x.is_finite()).fold(0.0, |amax, x| x.abs().max(amax)));
        // Of 2^-36 to 2^126, the reciprocal of which is exact and normal.
        let inverse = 1.0 / decode_e8m0(*scale);
        let unpacked = group.map(|x| encode(x * inverse));
        for (pair, [even, odd]) in codes.iter_mut().zip(unpacked.as_chunks().0) {
            *pair = even | odd << 4;
        }
    }
    Ok(())
}

/// The E8M0 code of `2^ceil(log2(amax / 6))`, from the bits: 6 is 1.5 times a power of two.
fn mx_scale(amax: f32) -> u8 {
    let bits = amax.max(AMAX_FLOOR).to_bits();
    let (exponent, mantissa) = (bits >> 23, bits & 0x7f_ffff);
    (exponent - 2 + u32::from(mantissa > 0x40_0000)) as u8
}

/// Quantises `weights` `[n, k]`, bf16 or f32, on the host, rows contiguous, to NVFP4: pairs of codes `[n, k / 2]` and
/// E4M3 scales `[n, k / 16]`, both without gaps. Returns the global scale, `amax / (6 · 448)` with the largest finite
/// magnitude of the matrix, at least 1e-10. Groups are quantised as by [`Nvfp4Rows`]. Nothing is allocated.
///
/// # Errors
/// As [`quantize_mxfp4`].
pub fn quantize_nvfp4(
    weights: TensorView<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<f32, QuantError> {
    let [n, k] = dims(weights, NV_GROUP)?;
    check_len("code pairs", n * k / 2, codes.len())?;
    check_len("scales", n * k / NV_GROUP, scales.len())?;
    let mut amax = AMAX_FLOOR;
    for row in 0..n {
        let of_row = match weights.dtype() {
            DType::Bf16 => finite_amax(weights.row::<bf16>(row)?),
            _ => finite_amax(weights.row::<f32>(row)?),
        };
        amax = amax.max(of_row.map_err(|column| QuantError::NanWeight { index: row * k + column })?);
    }
    let quantizer = Nvfp4Rows::new(amax / (MAX * Fp8Format::E4M3Fn.max()))?;
    let rows = codes.chunks_mut((k / 2).max(1)).zip(scales.chunks_mut((k / NV_GROUP).max(1)));
    for (row, (codes, scales)) in rows.enumerate() {
        match weights.dtype() {
            DType::Bf16 => quantizer.quantize(weights.row::<bf16>(row)?, codes, scales)?,
            _ => quantizer.quantize(weights.row::<f32>(row)?, codes, scales)?,
        }
    }
    Ok(quantizer.global())
}

fn finite_amax<T: Unrounded>(row: &[T]) -> Result<f32, usize> {
    let mut amax = 0.0f32;
    for (column, x) in row.iter().map(|x| x.widen()).enumerate() {
        if x.is_nan() {
            return Err(column);
        }
        if x.is_finite() {
            amax = amax.max(x.abs());
        }
    }
    Ok(amax)
}

/// Rows and columns of a matrix of whole groups that can be quantised.
fn dims(weights: TensorView<'_>, group: usize) -> Result<[usize; 2], QuantError> {
    let &[n, k] = weights.dims() else {
        return Err(QuantError::NotMatrix { dims: weights.dims().to_vec() });
    };
    let found = weights.dtype();
    if !matches!(found, DType::Bf16 | DType::F32) {
        return Err(QuantError::InputDType { found });
    }
    whole_groups(k, group)?;
    Ok([n, k])
}

/// Scales of [`Fp4Weights`].
#[derive(Clone, Copy, Debug)]
pub enum Fp4Scales<'a> {
    /// MXFP4: `[n, k / 32]` E8M0.
    Mx32(&'a [u8]),
    /// NVFP4: `[n, k / 16]` E4M3 (OCP), and one for the matrix.
    Nv16 {
        /// Of the groups.
        blocks: &'a [u8],
        /// Of the matrix.
        global: f32,
    },
}

/// A weight matrix in FP4, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Fp4Weights<'a> {
    /// Output channels n and input channels k.
    pub dims: [usize; 2],
    /// `[n, k / 2]` pairs, row-major without gaps.
    pub codes: &'a [u8],
    /// Row-major without gaps.
    pub scales: Fp4Scales<'a>,
}

impl Fp4Weights<'_> {
    /// `out[i] = code · scale`, and for NVFP4 times the global scale, rounded to f32 once. `out` is `[n, k]`.
    ///
    /// # Errors
    /// [`QuantError::RaggedGroup`], [`QuantError::BufferLength`], and [`QuantError::NanScale`] for the first scale that
    /// is NaN.
    pub fn dequantize_f32(&self, out: &mut [f32]) -> Result<(), QuantError> {
        self.dequantize(out, |x| x)
    }

    /// The result of [`Fp4Weights::dequantize_f32`], rounded to bf16.
    ///
    /// # Errors
    /// As [`Fp4Weights::dequantize_f32`].
    pub fn dequantize_bf16(&self, out: &mut [bf16]) -> Result<(), QuantError> {
        self.dequantize(out, bf16::from_f32)
    }

    fn dequantize<T: Copy>(&self, out: &mut [T], round: impl Fn(f32) -> T) -> Result<(), QuantError> {
        let [n, k] = self.dims;
        let (group, scales) = match self.scales {
            Fp4Scales::Mx32(scales) => (MX_GROUP, scales),
            Fp4Scales::Nv16 { blocks, .. } => (NV_GROUP, blocks),
        };
        whole_groups(k, group)?;
        check_len("code pairs", n * k / 2, self.codes.len())?;
        check_len("scales", n * k / group, scales.len())?;
        check_len("dequantised elements", n * k, out.len())?;
        let e4m3 = decode_table(Fp8Format::E4M3Fn);
        let groups = self.codes.chunks(group / 2).zip(out.chunks_mut(group));
        for (index, ((codes, out), &code)) in groups.zip(scales).enumerate() {
            let (scale, global) = match self.scales {
                Fp4Scales::Mx32(_) if code == E8M0_NAN => (f32::NAN, 1.0),
                Fp4Scales::Mx32(_) => (decode_e8m0(code), 1.0),
                // The product of code and E4M3 scale has six significant bits, so only the last factor rounds.
                Fp4Scales::Nv16 { global, .. } => (e4m3[usize::from(code)], global),
            };
            if scale.is_nan() {
                return Err(QuantError::NanScale { index, code });
            }
            let products = VALUES.map(|value| round(value * scale * global));
            for (pair, code) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                *pair = [products[usize::from(code & 0xf)], products[usize::from(code >> 4)]];
            }
        }
        Ok(())
    }
}
