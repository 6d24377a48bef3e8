//! Quantising and dequantising weight matrices.

use fused_moe_core::{BLOCK, DType, Fp8Format, TensorView};
use half::bf16;

use crate::codec::decode_table;
use crate::error::{QuantError, check_len};
use crate::isa::Isa;
use crate::row::{RowQuantizer, Unrounded, scale_for_amax};

/// How the scales of a weight matrix `[n, k]` (n output channels) lie over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightScales {
    /// One per 128x128 block, `[ceil(n/128), ceil(k/128)]`; blocks at the edges may be smaller.
    Block,
    /// One per output channel, `[n]`.
    Channel,
    /// One for the matrix, `[1]`.
    Tensor,
}

impl WeightScales {
    /// Rows and columns of the scales of a matrix `[n, k]`.
    pub const fn dims(self, n: usize, k: usize) -> [usize; 2] {
        match self {
            WeightScales::Block => [n.div_ceil(BLOCK), k.div_ceil(BLOCK)],
            WeightScales::Channel => [n, 1],
            WeightScales::Tensor => [1, 1],
        }
    }

    /// Number of scales of a matrix `[n, k]`.
    pub const fn count(self, n: usize, k: usize) -> usize {
        let [rows, columns] = self.dims(n, k);
        rows * columns
    }

    /// Rows and columns of weights that share a scale (at least 1, so that empty matrices can be chunked).
    fn tile(self, n: usize, k: usize) -> (usize, usize) {
        let (rows, columns) = match self {
            WeightScales::Block => (BLOCK, BLOCK),
            WeightScales::Channel => (1, k),
            WeightScales::Tensor => (n, k),
        };
        (rows.max(1), columns.max(1))
    }
}

/// Quantises weight matrices by the formula of the activations, with the scales of [`WeightScales`].
#[derive(Clone, Copy, Debug)]
pub struct WeightQuantizer {
    rows: RowQuantizer,
    scales: WeightScales,
}

impl WeightQuantizer {
    /// Quantises to `format` with the fastest instruction set.
    pub fn new(format: Fp8Format, scales: WeightScales) -> Self {
        Self { rows: RowQuantizer::new(format), scales }
    }

    /// The same with a given instruction set. The results are the same bits.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.rows = self.rows.with_isa(isa);
        self
    }

    /// Quantises `weights` `[n, k]`, bf16 or f32, on the host, rows contiguous, into `codes` `[n, k]` and
    /// `scales` (of [`WeightScales::dims`]), both without gaps. Nothing is allocated.
    ///
    /// # Errors
    /// [`QuantError::NotMatrix`], [`QuantError::InputDType`], [`QuantError::BufferLength`],
    /// [`QuantError::View`].
    pub fn quantize(
        &self,
        weights: TensorView<'_>,
        codes: &mut [u8],
        scales: &mut [f32],
    ) -> Result<(), QuantError> {
        let &[n, k] = weights.dims() else {
            return Err(QuantError::NotMatrix { dims: weights.dims().to_vec() });
        };
        check_len("codes", n * k, codes.len())?;
        check_len("scales", self.scales.count(n, k), scales.len())?;
        match weights.dtype() {
            DType::Bf16 => self.quantize_rows([n, k], |row| Ok(weights.row::<bf16>(row)?), codes, scales),
            DType::F32 => self.quantize_rows([n, k], |row| Ok(weights.row::<f32>(row)?), codes, scales),
            found => Err(QuantError::InputDType { found }),
        }
    }

    fn quantize_rows<'a, T: Unrounded + 'a>(
        &self,
        [n, k]: [usize; 2],
        row: impl Fn(usize) -> Result<&'a [T], QuantError>,
        codes: &mut [u8],
        scales: &mut [f32],
    ) -> Result<(), QuantError> {
        let (tile_rows, tile_columns) = self.scales.tile(n, k);
        let [_, scale_columns] = self.scales.dims(n, k);
        let format = self.rows.format();
        scales.fill(scale_for_amax(format, 0.0));
        if k == 0 {
            return Ok(());
        }
        // A band of tiles at a time, so that its second reading comes from the cache.
        let bands = codes.chunks_mut(tile_rows * k).zip(scales.chunks_mut(scale_columns));
        for (band, (codes, scales)) in bands.enumerate() {
            let first = band * tile_rows;
            let rows = first..n.min(first + tile_rows);
            for row_index in rows.clone() {
                for (tile, scale) in row(row_index)?.chunks(tile_columns).zip(scales.iter_mut()) {
                    // The scale grows with the largest magnitude, so the larger scale is that of the union.
                    *scale = scale.max(scale_for_amax(format, self.rows.amax(tile)));
                }
            }
            for (row_index, codes) in rows.zip(codes.chunks_mut(k)) {
                let tiles = row(row_index)?.chunks(tile_columns).zip(codes.chunks_mut(tile_columns));
                for ((tile, codes), &scale) in tiles.zip(scales.iter()) {
                    self.rows.encode(tile, scale, codes);
                }
            }
        }
        Ok(())
    }
}

/// A quantised weight matrix, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedWeights<'a> {
    /// What the codes mean.
    pub format: Fp8Format,
    /// What the scales belong to.
    pub granularity: WeightScales,
    /// Output channels n and input channels k.
    pub dims: [usize; 2],
    /// `[n, k]`, row-major without gaps.
    pub codes: &'a [u8],
    /// `[rows, columns]` of [`WeightScales::dims`], row-major without gaps. Multiply to dequantise.
    pub scales: &'a [f32],
}

impl QuantizedWeights<'_> {
    /// `out[i] = decode(codes[i]) · scale`, one f32 multiplication. `out` is `[n, k]`.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`] for the codes, the scales and `out`.
    pub fn dequantize_f32(&self, out: &mut [f32]) -> Result<(), QuantError> {
        self.dequantize(out, |x| x)
    }

    /// The result of [`QuantizedWeights::dequantize_f32`], rounded to bf16.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`] for the codes, the scales and `out`.
    pub fn dequantize_bf16(&self, out: &mut [bf16]) -> Result<(), QuantError> {
        self.dequantize(out, bf16::from_f32)
    }

    fn dequantize<T: Copy>(&self, out: &mut [T], round: impl Fn(f32) -> T) -> Result<(), QuantError> {
        let [n, k] = self.dims;
        check_len("codes", n * k, self.codes.len())?;
        check_len("scales", self.granularity.count(n, k), self.scales.len())?;
        check_len("dequantised elements", n * k, out.len())?;
        if k == 0 {
            return Ok(());
        }
        let (tile_rows, tile_columns) = self.granularity.tile(n, k);
        let [_, scale_columns] = self.granularity.dims(n, k);
        let values = decode_table(self.format);
        let bands = self.codes.chunks(tile_rows * k).zip(out.chunks_mut(tile_rows * k));
        for ((codes, out), scales) in bands.zip(self.scales.chunks(scale_columns)) {
            for (tile, &scale) in scales.iter().enumerate() {
                // A tile has far more weights than there are codes, so each product is rounded only once.
                let products = values.map(|value| round(value * scale));
                let columns = tile * tile_columns..k.min((tile + 1) * tile_columns);
                for (codes, out) in codes.chunks(k).zip(out.chunks_mut(k)) {
                    for (out, &code) in out[columns.clone()].iter_mut().zip(&codes[columns.clone()]) {
                        *out = products[usize::from(code)];
                    }
                }
            }
        }
        Ok(())
    }
}
