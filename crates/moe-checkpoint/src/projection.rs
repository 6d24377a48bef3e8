//! A projection: its values, its scales and what else belongs to it.

use fused_moe_core::{BLOCK, DType, Fp8Format, QuantScheme};

use crate::matrix::Matrix;

/// Columns that share a scale in MXFP4.
pub(crate) const MX_GROUP: usize = 32;

/// Columns that share a block scale in NVFP4.
pub(crate) const NV_GROUP: usize = 16;

/// Weight scales: an element is its code times its scale.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum WeightScale<'c> {
    /// One per 128x128 block, `[ceil(rows / 128), ceil(cols / 128)]` row-major.
    Block128(Vec<f32>),
    /// One per row.
    PerChannel(Vec<f32>),
    /// One for the matrix.
    PerTensor(f32),
    /// `[rows, cols / 32]` E8M0 as it is in the file, one per 32 columns (MXFP4); none is NaN.
    Mx32(Matrix<'c>),
    /// Two levels, whose product is the scale (NVFP4).
    Nv16 {
        /// `[rows, cols / 16]` E4M3 as it is in the file, one per 16 columns; none is NaN or negative.
        blocks: Matrix<'c>,
        /// For the whole matrix.
        global: f32,
    },
}

impl WeightScale<'_> {
    /// The scale of the element at `row`, `col` of a matrix of `cols` columns.
    ///
    /// # Panics
    /// If the matrix has no such element.
    pub fn at(&self, row: usize, col: usize, cols: usize) -> f32 {
        match self {
            WeightScale::Block128(scales) => scales[row / BLOCK * cols.div_ceil(BLOCK) + col / BLOCK],
            WeightScale::PerChannel(scales) => scales[row],
            WeightScale::PerTensor(scale) => *scale,
            WeightScale::Mx32(codes) => e8m0(codes.byte(row, col / MX_GROUP)),
            WeightScale::Nv16 { blocks, global } => e4m3(blocks.byte(row, col / NV_GROUP)) * global,
        }
    }
}

/// `2^(code − 127)`; NaN for 0xFF.
pub(crate) fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        0xff => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Value of an E4M3 code (OCP); NaN for 0x7F and 0xFF.
pub(crate) fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent + 120) as u32) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// A projection `[rows, cols]` = `[out, in]`: its values, its scales if it is FP8 or FP4, its bias if it has one.
#[derive(Clone, Debug)]
pub struct WeightMatrix<'c> {
    pub(crate) name: String,
    pub(crate) values: Matrix<'c>,
    pub(crate) scale: Option<WeightScale<'c>>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) input_scale: Option<f32>,
}

impl<'c> WeightMatrix<'c> {
    /// Name of the tensor in the checkpoint; of the packed one, where experts are packed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.values.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        let codes_per_byte = if self.values.dtype() == DType::Fp4E2M1x2 { 2 } else { 1 };
        self.values.cols() * codes_per_byte
    }

    /// The values: bf16, f16 or f32, or FP8 codes, or FP4 codes in pairs, as they are in the file.
    pub fn values(&self) -> &Matrix<'c> {
        &self.values
    }

    /// The scales, for FP8 and FP4 and only for those.
    pub fn scale(&self) -> Option<&WeightScale<'c>> {
        self.scale.as_ref()
    }

    /// `[rows]`, added to the product (gpt-oss).
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// What the activations are divided by before they are quantised, where that was fixed when the model was
    /// quantised: the largest over all experts of the layer and over the matrices that read the same activations.
    pub fn input_scale(&self) -> Option<f32> {
        self.input_scale
    }

    /// How the matrix is quantised.
    pub fn scheme(&self) -> QuantScheme {
        match (&self.scale, self.input_scale) {
            (None, _) => QuantScheme::Unquantized,
            (Some(WeightScale::Block128(_)), _) => QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
            (Some(WeightScale::PerChannel(_)), _) => QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
            (Some(WeightScale::PerTensor(_)), None) => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
            (Some(WeightScale::PerTensor(_)), Some(_)) => QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn),
            (Some(WeightScale::Mx32(_)), _) => QuantScheme::Mxfp4,
            (Some(WeightScale::Nv16 { .. }), _) => QuantScheme::Nvfp4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e8m0_is_a_power_of_two() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(0), 2f32.powi(-127));
        assert_eq!(e8m0(1), 2f32.powi(-126));
        assert_eq!(e8m0(254), 2f32.powi(127));
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn e4m3_is_what_the_format_says() {
        for (code, value) in [(0x38, 1.0), (0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x7e, 448.0)] {
            assert_eq!((e4m3(code), e4m3(code | 0x80)), (value, -value));
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }
}
