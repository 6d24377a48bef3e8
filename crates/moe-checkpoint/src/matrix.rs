//! Matrices of a checkpoint: mapped values, and scales as f32.

use std::borrow::Cow;
use std::path::Path;

use fused_moe_core::{Allocation, BLOCK, DType, Device, Fp8Format, Layout, QuantScheme, TensorView};
use half::{bf16, f16};
use safetensors::tensor::Dtype;

use crate::error::{CheckpointError, Result};

// Safetensors are little-endian and are used as they are mapped.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are only read on little-endian machines");

/// A row-major matrix without gaps, mapped from its file.
///
/// A file may place a tensor at an address that its element type does not allow; only then it is copied.
#[derive(Clone, Debug)]
pub struct Matrix<'c> {
    rows: usize,
    cols: usize,
    dtype: DType,
    bytes: Bytes<'c>,
}

#[derive(Clone, Debug)]
enum Bytes<'c> {
    Mapped(&'c [u8]),
    /// A copy in words, which are aligned for every element type; the last may be partly unused.
    Copied {
        words: Vec<u64>,
        len: usize,
    },
}

impl<'c> Matrix<'c> {
    /// `bytes` hold `rows * cols` elements of `dtype`.
    pub(crate) fn new(rows: usize, cols: usize, dtype: DType, bytes: &'c [u8]) -> Self {
        debug_assert_eq!(bytes.len(), rows * cols * dtype.size_bytes());
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(dtype.size_bytes());
        let bytes = if aligned {
            Bytes::Mapped(bytes)
        } else {
            let word = |chunk: &[u8]| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_ne_bytes(word)
            };
            Bytes::Copied { words: bytes.chunks(8).map(word).collect(), len: bytes.len() }
        };
        Self { rows, cols, dtype, bytes }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The matrix as `[rows, cols]` on the host, contiguous.
    pub fn view(&self) -> TensorView<'_> {
        let (base, bytes) = match &self.bytes {
            Bytes::Mapped(bytes) => (bytes.as_ptr(), bytes.len()),
            Bytes::Copied { words, len } => (words.as_ptr().cast(), *len),
        };
        let allocation = Allocation { base: base.cast_mut(), bytes, dtype: self.dtype, device: Device::HOST };
        // SAFETY: both kinds of memory are borrowed from `self` for as long as the view, hold `bytes` readable
        // bytes, and are written by nobody: the view is read-only in spite of the pointer's type.
        unsafe { TensorView::from_allocation(allocation, Layout::contiguous(&[self.rows, self.cols])) }
            .expect("`new` saw to the length and the alignment")
    }

    /// All elements in row-major order rounded to bf16, without a copy if they are bf16; `None` for FP8 codes, which
    /// mean nothing without their scale.
    pub fn to_bf16(&self) -> Option<Cow<'_, [bf16]>> {
        let view = self.view();
        match self.dtype {
            DType::Bf16 => view.as_slice::<bf16>().ok().map(Cow::Borrowed),
            DType::F32 => Some(view.as_slice::<f32>().ok()?.iter().map(|&x| bf16::from_f32(x)).collect()),
            DType::F16 => {
                let rounded = view.as_slice::<f16>().ok()?.iter().map(|&x| bf16::from_f32(x.to_f32()));
                Some(rounded.collect())
            }
            _ => None,
        }
    }
}

/// Weight scales as f32: an element is its code times its scale.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum WeightScale {
    /// One per 128x128 block, `[ceil(rows / 128), ceil(cols / 128)]` row-major.
    Block128(Vec<f32>),
    /// One per row.
    PerChannel(Vec<f32>),
    /// One for the matrix.
    PerTensor(f32),
}

impl WeightScale {
    /// The scheme of an FP8 weight with such scales.
    pub fn scheme(&self) -> QuantScheme {
        match self {
            WeightScale::Block128(_) => QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
            WeightScale::PerChannel(_) => QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
            WeightScale::PerTensor(_) => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
        }
    }

    /// The scale of the element at `row`, `col` of a matrix of `cols` columns.
    pub fn at(&self, row: usize, col: usize, cols: usize) -> f32 {
        match self {
            WeightScale::Block128(scales) => scales[row / BLOCK * cols.div_ceil(BLOCK) + col / BLOCK],
            WeightScale::PerChannel(scales) => scales[row],
            WeightScale::PerTensor(scale) => *scale,
        }
    }
}

/// A projection `[rows, cols]` = `[out, in]`: its values, and its scales if it is FP8.
#[derive(Clone, Debug)]
pub struct WeightMatrix<'c> {
    pub(crate) name: String,
    pub(crate) values: Matrix<'c>,
    pub(crate) scale: Option<WeightScale>,
}

impl<'c> WeightMatrix<'c> {
    /// Name of the tensor in the checkpoint; of the packed one, where experts are packed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.values.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.values.cols
    }

    /// The values: bf16, f16 or f32, or FP8 codes, as they are in the file.
    pub fn values(&self) -> &Matrix<'c> {
        &self.values
    }

    /// The scales, for FP8 and only for FP8.
    pub fn scale(&self) -> Option<&WeightScale> {
        self.scale.as_ref()
    }

    /// How the matrix is quantised.
    pub fn scheme(&self) -> QuantScheme {
        self.scale.as_ref().map_or(QuantScheme::Unquantized, WeightScale::scheme)
    }
}

/// The values of a small tensor of bf16, f16 or f32 as f32, each of them checked.
pub(crate) struct SmallTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) path: &'a Path,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: &'a [u8],
}

impl SmallTensor<'_> {
    /// All values. One that is not finite, or is negative where `not_negative`, is an error.
    pub(crate) fn to_f32(&self, not_negative: bool) -> Result<Vec<f32>> {
        let halves = |widen: fn(u16) -> f32| -> Vec<f32> {
            self.bytes.chunks_exact(2).map(|b| widen(u16::from_le_bytes([b[0], b[1]]))).collect()
        };
        let values: Vec<f32> = match self.dtype {
            Dtype::F32 => {
                let words = self.bytes.chunks_exact(4);
                words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Dtype::BF16 => halves(|bits| bf16::from_bits(bits).to_f32()),
            Dtype::F16 => halves(|bits| f16::from_bits(bits).to_f32()),
            found => {
                return Err(CheckpointError::BadDType {
                    tensor: self.name.to_owned(),
                    path: self.path.to_owned(),
                    wanted: "F32, BF16 or F16",
                    found: format!("{found:?}"),
                });
            }
        };
        let bad = |value: &f32| !value.is_finite() || (not_negative && *value < 0.0);
        if let Some(index) = values.iter().position(bad) {
            return Err(CheckpointError::BadValue {
                tensor: self.name.to_owned(),
                path: self.path.to_owned(),
                index,
                value: values[index],
                wanted: if not_negative { "finite and not negative" } else { "finite" },
            });
        }
        Ok(values)
    }
}
