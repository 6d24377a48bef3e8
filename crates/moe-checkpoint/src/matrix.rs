//! Matrices of a checkpoint as they are mapped, and small tensors as f32.

use std::borrow::Cow;
use std::path::Path;

use fused_moe_core::{Allocation, DType, Device, Layout, TensorView};
use half::{bf16, f16};
use safetensors::tensor::Dtype;

use crate::error::{CheckpointError, Result};

// Safetensors are little-endian and are used as they are mapped.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are only read on little-endian machines");

/// A row-major matrix, mapped from its file. Its rows have no gaps; between them there are other rows where a file
/// interleaves two matrices.
///
/// It is a copy only where a file places a tensor at an address that its element type does not allow, or holds the
/// transpose.
#[derive(Clone, Debug)]
pub struct Matrix<'c> {
    rows: usize,
    cols: usize,
    /// Elements from one row to the next.
    stride: usize,
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
    Halves(Vec<u16>),
    Words(Vec<u32>),
}

/// Part of a matrix that a file holds transposed, and among the columns of others.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'c> {
    /// The stored matrix, `[in, columns]`.
    pub(crate) bytes: &'c [u8],
    /// Its columns.
    pub(crate) columns: usize,
    /// The column that becomes row 0.
    pub(crate) first: usize,
    /// From the column of one row to that of the next.
    pub(crate) step: usize,
}

impl<'c> Matrix<'c> {
    /// `bytes` hold `rows * cols` elements of `dtype`.
    pub(crate) fn new(rows: usize, cols: usize, dtype: DType, bytes: &'c [u8]) -> Self {
        Self::strided([rows, cols], cols, dtype, bytes)
    }

    /// `bytes` start with row 0 and end with the last; rows are `stride` elements apart.
    pub(crate) fn strided([rows, cols]: [usize; 2], stride: usize, dtype: DType, bytes: &'c [u8]) -> Self {
        debug_assert_eq!(bytes.len(), ((rows - 1) * stride + cols) * dtype.size_bytes());
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
        Self { rows, cols, stride, dtype, bytes }
    }

    /// A copy of `[rows, cols]` of `dtype`, of two or four bytes, out of `columns`.
    pub(crate) fn transposed([rows, cols]: [usize; 2], dtype: DType, columns: Columns<'c>) -> Self {
        let bytes = match dtype.size_bytes() {
            2 => Bytes::Halves(transpose([rows, cols], columns, |b: [u8; 2]| u16::from_ne_bytes(b))),
            _ => Bytes::Words(transpose([rows, cols], columns, |b: [u8; 4]| u32::from_ne_bytes(b))),
        };
        Self { rows, cols, stride: cols, dtype, bytes }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns; of FP4 codes, the number of bytes that hold them in pairs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The matrix as `[rows, cols]` on the host.
    pub fn view(&self) -> TensorView<'_> {
        let (base, bytes) = match &self.bytes {
            Bytes::Mapped(bytes) => (bytes.as_ptr(), bytes.len()),
            Bytes::Copied { words, len } => (words.as_ptr().cast(), *len),
            Bytes::Halves(halves) => (halves.as_ptr().cast(), size_of_val(halves.as_slice())),
            Bytes::Words(words) => (words.as_ptr().cast(), size_of_val(words.as_slice())),
        };
        let allocation = Allocation { base: base.cast_mut(), bytes, dtype: self.dtype, device: Device::HOST };
        let layout = Layout::contiguous(&[self.rows, self.cols]).strided(&[self.stride, 1], 0);
        // SAFETY: every kind of memory is borrowed from `self` for as long as the view, holds `bytes` readable
        // bytes, and is written by nobody: the view is read-only in spite of the pointer's type.
        unsafe { TensorView::from_allocation(allocation, layout) }
            .expect("the constructors saw to the length and the alignment")
    }

    /// The byte at `row`, `col` of a matrix of one-byte elements.
    pub(crate) fn byte(&self, row: usize, col: usize) -> u8 {
        debug_assert_eq!(self.dtype.size_bytes(), 1);
        let at = row * self.stride + col;
        match &self.bytes {
            Bytes::Mapped(bytes) => bytes[at],
            // One-byte elements are never misaligned and never transposed.
            _ => self.view().row_bytes(row).map_or(0, |bytes| bytes[col]),
        }
    }

    /// All elements in row-major order rounded to bf16, without a copy if they are bf16; `None` for FP8 and FP4
    /// codes, which mean nothing without their scale.
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

/// Rows per tile and columns per tile of a transposition: what both sides touch fits the first-level cache.
const TILE: usize = 64;

/// `[rows, cols]` out of the stored `[cols, columns]`, tile by tile.
fn transpose<T: Copy + Default, const SIZE: usize>(
    [rows, cols]: [usize; 2],
    Columns { bytes, columns, first, step }: Columns<'_>,
    read: impl Fn([u8; SIZE]) -> T,
) -> Vec<T> {
    let (stored, _) = bytes.as_chunks::<SIZE>();
    let mut out = vec![T::default(); rows * cols];
    for from in (0..cols).step_by(TILE) {
        for top in (0..rows).step_by(TILE) {
            for col in from..cols.min(from + TILE) {
                let line = &stored[col * columns..(col + 1) * columns];
                for row in top..rows.min(top + TILE) {
                    out[row * cols + col] = read(line[first + row * step]);
                }
            }
        }
    }
    out
}

/// The values of a small tensor of bf16, f16 or f32 as f32, each of them checked.
pub(crate) struct SmallTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) path: &'a Path,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: &'a [u8],
}

/// Which values a small tensor may hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// A bias.
    Finite,
    /// A weight scale.
    NotNegative,
    /// The second level of an NVFP4 scale: its product with the largest code and group scale is finite.
    SecondLevel,
    /// An activation scale, which is divided by.
    Divisor,
}

impl Allowed {
    fn allows(self, value: f32) -> bool {
        value.is_finite()
            && match self {
                Allowed::Finite => true,
                Allowed::NotNegative => value >= 0.0,
                Allowed::SecondLevel => value >= 0.0 && (value * (6.0 * 448.0)).is_finite(),
                Allowed::Divisor => value > 0.0 && (1.0 / value).is_finite(),
            }
    }

    const fn words(self) -> &'static str {
        match self {
            Allowed::Finite => "finite",
            Allowed::NotNegative => "finite and not negative",
            Allowed::SecondLevel => "finite and not negative, as is 2688 times it",
            Allowed::Divisor => "finite and positive, as is 1 over it",
        }
    }
}

impl SmallTensor<'_> {
    /// All values, each of which must be `allowed`.
    pub(crate) fn to_f32(&self, allowed: Allowed) -> Result<Vec<f32>> {
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
        if let Some(index) = values.iter().position(|&value| !allowed.allows(value)) {
            return Err(CheckpointError::BadValue {
                tensor: self.name.to_owned(),
                path: self.path.to_owned(),
                index,
                value: values[index],
                wanted: allowed.words(),
            });
        }
        Ok(values)
    }
}
