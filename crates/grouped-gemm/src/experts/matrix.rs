//! One lent matrix of an expert: checked against the scheme, and read with its padding as zeros.

use std::borrow::Cow;

use fused_moe_core::{
    BLOCK, DType, Element, GlobalExpertId, TensorView, WeightMatrix, WeightScale as LentScale,
};
use half::bf16;
use quant::fp4::{E8M0_NAN, Nvfp4Rows};

use super::error::{ExpertsError, shape};
use super::scheme::{Fp8Scheme, Scaling, Scheme};
use crate::{Fp4Scale, Fp4Weight, Fp8Weight, Weight, WeightScale};

/// How errors call a matrix and what belongs to it.
#[derive(Clone, Copy)]
pub(super) struct Names {
    values: &'static str,
    scale: &'static str,
    bias: &'static str,
    input_scale: &'static str,
}

macro_rules! names {
    ($name:literal) => {
        Names {
            values: $name,
            scale: concat!($name, " scale"),
            bias: concat!($name, " bias"),
            input_scale: concat!($name, " input scale"),
        }
    };
}

pub(super) const GATE: Names = names!("gate");
pub(super) const UP: Names = names!("up");
pub(super) const DOWN: Names = names!("down");

/// A matrix whose shape and element type are those of the scheme.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    expert: GlobalExpertId,
    names: Names,
    lent: WeightMatrix<'a>,
    dims: [usize; 2],
    /// Rows and columns that are not padding.
    used: [usize; 2],
}

/// Codes of FP8 and their scales.
pub(super) struct Fp8Values<'a> {
    codes: Cow<'a, [u8]>,
    scale: WeightScale,
}

/// Pairs of FP4 codes and their scales; `global` is 1 for MXFP4.
pub(super) struct Fp4Values<'a> {
    codes: Cow<'a, [u8]>,
    scales: Cow<'a, [u8]>,
    global: f32,
}

impl<'a> Matrix<'a> {
    pub(super) fn new(
        scheme: Scheme,
        (expert, names): (GlobalExpertId, Names),
        lent: WeightMatrix<'a>,
        [dims, used]: [[usize; 2]; 2],
    ) -> Result<Self, ExpertsError> {
        let matrix = Self { expert, names, lent, dims, used };
        let view = lent.values;
        let [rows, columns] = dims;
        let (element, dtype_fits, stored) = match scheme {
            Scheme::Bf16 => ("bf16 or f32", matches!(view.dtype(), DType::Bf16 | DType::F32), dims),
            Scheme::Fp8(fp8) => (fp8.format.dtype().name(), view.dtype() == fp8.format.dtype(), dims),
            Scheme::Mxfp4 | Scheme::Nvfp4 => {
                (DType::Fp4E2M1x2.name(), view.dtype() == DType::Fp4E2M1x2, [rows, columns / 2])
            }
        };
        if view.dims() != stored || !dtype_fits {
            let (wanted, found) = (format!("{stored:?} of {element}"), shape(view.dims(), view.dtype()));
            return Err(matrix.wrong(names.values, wanted, found));
        }
        match (scheme, &lent.scale) {
            (Scheme::Bf16, Some(scale)) => Err(matrix.wrong(names.scale, "no scale".into(), describe(scale))),
            _ => Ok(matrix),
        }
    }

    fn wrong(&self, tensor: &'static str, wanted: String, found: String) -> ExpertsError {
        ExpertsError::Weight { expert: self.expert, tensor, wanted, found }
    }

    /// The values as a GEMM takes them.
    pub(super) fn weight<'v, T>(&self, values: &'v [T]) -> Weight<'v, T> {
        Weight { values, n: self.dims[0], k: self.dims[1] }
    }

    pub(super) fn fp8_weight<'v>(&self, fp8: Fp8Scheme, values: &'v Fp8Values<'_>) -> Fp8Weight<'v> {
        Fp8Weight { codes: self.weight(&values.codes), kind: fp8.kind, scale: &values.scale }
    }

    pub(super) fn fp4_weight<'v>(&self, scheme: Scheme, values: &'v Fp4Values<'_>) -> Fp4Weight<'v> {
        let [n, k] = self.dims;
        let (blocks, global) = (values.scales.as_ref(), values.global);
        let scale = match scheme {
            Scheme::Mxfp4 => Fp4Scale::Mx32(blocks),
            _ => Fp4Scale::Nv16 { blocks, global },
        };
        Fp4Weight { codes: &values.codes, n, k, scale }
    }

    /// The values, rounded to bf16 where they are f32.
    pub(super) fn bf16(&self) -> Result<Cow<'a, [bf16]>, ExpertsError> {
        let values = match self.lent.values.dtype() {
            DType::F32 => {
                let values = dense::<f32>(self.lent.values)?;
                values.iter().map(|&value| bf16::from_f32(value)).collect()
            }
            _ => dense(self.lent.values)?,
        };
        Ok(self.without_padding(values, bf16::ZERO))
    }

    pub(super) fn fp8(&self, scaling: Scaling) -> Result<Fp8Values<'a>, ExpertsError> {
        let codes = self.without_padding(dense(self.lent.values)?, 0);
        Ok(Fp8Values { codes, scale: self.fp8_scale(scaling)? })
    }

    pub(super) fn fp4(&self, scheme: Scheme) -> Result<Fp4Values<'a>, ExpertsError> {
        let [rows, columns] = self.dims;
        let mut codes = dense::<u8>(self.lent.values)?;
        if self.used != self.dims {
            let [used_rows, used] = self.used;
            for (row, pairs) in codes.to_mut().chunks_mut(columns / 2).enumerate() {
                let used = if row < used_rows { used } else { 0 };
                pairs[used.div_ceil(2)..].fill(0);
                if used % 2 == 1 {
                    pairs[used / 2] &= 0xf;
                }
            }
        }
        let group = scheme.group();
        let (view, dtype, neutral, global) = match (scheme, self.lent.scale) {
            (Scheme::Mxfp4, Some(LentScale::Mx32(view))) => (view, DType::E8M0, E8M0_ONE, 1.0),
            (Scheme::Nvfp4, Some(LentScale::Nv16 { blocks, global })) if global.is_finite() => {
                (blocks, DType::Fp8E4M3Fn, E4M3_ONE, global)
            }
            (_, scale) => {
                let wanted = match scheme {
                    Scheme::Mxfp4 => format!("an e8m0 scale per 1x{group}"),
                    _ => format!("an e4m3 scale per 1x{group} and a finite one for the matrix"),
                };
                return Err(self.wrong(self.names.scale, wanted, found(scale)));
            }
        };
        let wanted = [rows, columns / group];
        if view.dims() != wanted || view.dtype() != dtype {
            let found = shape(view.dims(), view.dtype());
            return Err(self.wrong(self.names.scale, shape(&wanted, dtype), found));
        }
        let scales = self.neutral_in_padding(dense(view)?, [1, group], neutral);
        let is_nan = |&code: &u8| if dtype == DType::E8M0 { code == E8M0_NAN } else { code & 0x7f == 0x7f };
        if let Some(at) = scales.iter().position(is_nan) {
            let found = format!("NaN (code {:#04x}) at {at}", scales[at]);
            return Err(self.wrong(self.names.scale, "scales that are numbers".into(), found));
        }
        Ok(Fp4Values { codes, scales, global })
    }

    /// The bias in f32, if there has to be one.
    pub(super) fn bias(&self, wanted: bool) -> Result<Option<Vec<f32>>, ExpertsError> {
        let rows = self.dims[0];
        let view = match (self.lent.bias, wanted) {
            (None, false) => return Ok(None),
            (Some(view), true) => view,
            (Some(view), false) => {
                let found = shape(view.dims(), view.dtype());
                return Err(self.wrong(self.names.bias, "no bias".into(), found));
            }
            (None, true) => {
                let wanted = format!("[{rows}] of bf16 or f32");
                return Err(self.wrong(self.names.bias, wanted, "no bias".into()));
            }
        };
        if view.dims() != [rows] || !matches!(view.dtype(), DType::Bf16 | DType::F32) {
            let found = shape(view.dims(), view.dtype());
            return Err(self.wrong(self.names.bias, format!("[{rows}] of bf16 or f32"), found));
        }
        let mut bias = match view.dtype() {
            DType::F32 => view.as_slice::<f32>()?.to_vec(),
            _ => view.as_slice::<bf16>()?.iter().map(|x| x.to_f32()).collect(),
        };
        bias[self.used[0]..].fill(0.0);
        Ok(Some(bias))
    }

    /// The scale by which the activations that this matrix meets are quantised.
    pub(super) fn input_scale(&self, scheme: Scheme) -> Result<f32, ExpertsError> {
        let is_usable = |&scale: &f32| match scheme {
            Scheme::Nvfp4 => Nvfp4Rows::new(scale).is_ok(),
            _ => scale > 0.0 && scale.is_finite() && (1.0 / scale).is_finite(),
        };
        self.lent.input_scale.filter(is_usable).ok_or_else(|| {
            let found = self.lent.input_scale.map_or("none".into(), |scale| scale.to_string());
            self.wrong(self.names.input_scale, "a scale that can be divided by".into(), found)
        })
    }

    /// `values` with zeros in the padding.
    fn without_padding<T: Copy>(&self, mut values: Cow<'a, [T]>, zero: T) -> Cow<'a, [T]> {
        if self.used != self.dims {
            let [used_rows, used] = self.used;
            for (row, values) in values.to_mut().chunks_mut(self.dims[1]).enumerate() {
                values[if row < used_rows { used } else { 0 }..].fill(zero);
            }
        }
        values
    }

    /// `scales`, one for each tile of that height and width, with `neutral` where all of the tile is padding.
    fn neutral_in_padding<T: Copy>(
        &self,
        mut scales: Cow<'a, [T]>,
        [height, width]: [usize; 2],
        neutral: T,
    ) -> Cow<'a, [T]> {
        if self.used != self.dims {
            let per_row = self.dims[1].div_ceil(width);
            for (i, scale) in scales.to_mut().iter_mut().enumerate() {
                if i / per_row * height >= self.used[0] || i % per_row * width >= self.used[1] {
                    *scale = neutral;
                }
            }
        }
        scales
    }

    fn fp8_scale(&self, scaling: Scaling) -> Result<WeightScale, ExpertsError> {
        let [n, k] = self.dims;
        let name = self.names.scale;
        let read = |view: TensorView<'a>, wanted: &[usize], tile| {
            let scales = match (view.dims() == wanted, dense::<f32>(view)) {
                (true, Ok(scales)) => self.neutral_in_padding(scales, tile, 1.0),
                _ => {
                    let found = shape(view.dims(), view.dtype());
                    return Err(self.wrong(name, shape(wanted, DType::F32), found));
                }
            };
            match scales.iter().position(|scale| !scale.is_finite()) {
                None => Ok(scales.into_owned()),
                Some(at) => Err(self.wrong(name, "finite scales".into(), format!("{} at {at}", scales[at]))),
            }
        };
        let blocks = [n.div_ceil(BLOCK), k.div_ceil(BLOCK)];
        match (scaling, self.lent.scale) {
            (Scaling::Tensor | Scaling::Static, Some(LentScale::Tensor(scale))) if scale.is_finite() => {
                Ok(WeightScale::PerTensor(scale))
            }
            (Scaling::Token, Some(LentScale::Channel(view))) => {
                Ok(WeightScale::PerChannel(read(view, &[n], [1, k])?))
            }
            (Scaling::Block, Some(LentScale::Block128(view))) => {
                Ok(WeightScale::Block128 { scales: read(view, &blocks, [BLOCK, BLOCK])? })
            }
            (_, scale) => {
                let wanted = match scaling {
                    Scaling::Tensor | Scaling::Static => "one finite scale".into(),
                    Scaling::Token => format!("a scale per output channel, [{n}]"),
                    Scaling::Block => format!("a scale per 128x128 block, {blocks:?}"),
                };
                Err(self.wrong(name, wanted, found(scale)))
            }
        }
    }
}

/// The codes of 1, which stand where all that a scale belongs to is zero.
const E8M0_ONE: u8 = 127;
const E4M3_ONE: u8 = 0x38;

fn found(scale: Option<LentScale<'_>>) -> String {
    scale.as_ref().map_or("no scale".into(), describe)
}

fn describe(scale: &LentScale<'_>) -> String {
    match scale {
        LentScale::Tensor(scale) => format!("one scale ({scale})"),
        LentScale::Channel(view) => format!("a scale per output channel, {:?}", view.dims()),
        LentScale::Block128(view) => format!("a scale per 128x128 block, {:?}", view.dims()),
        LentScale::Mx32(view) => format!("an e8m0 scale per 1x32, {:?}", view.dims()),
        LentScale::Nv16 { blocks, global } => {
            format!("an e4m3 scale per 1x16, {:?}, and {global} for the matrix", blocks.dims())
        }
        _ => "another kind of scale".into(),
    }
}

/// All elements of a host tensor in row-major order, copied only where its rows have gaps.
fn dense<T: Element>(view: TensorView<'_>) -> Result<Cow<'_, [T]>, ExpertsError> {
    if view.layout().is_contiguous() || view.dims().len() != 2 {
        return Ok(Cow::Borrowed(view.as_slice()?));
    }
    let rows = (0..view.dims()[0]).map(|row| view.row::<T>(row));
    Ok(Cow::Owned(rows.collect::<Result<Vec<_>, _>>()?.concat()))
}
