//! Scales of weights, and biases, which are applied in the same place.

use crate::GemmError;
use crate::panel::{Columns, PANEL, PackedShape, SCALE_BLOCK};

/// Scales of an fp8 weight `[N, K]`: `w = code * scale`.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightScale {
    /// One scale for the whole matrix.
    PerTensor(f32),
    /// One scale per row of the weight (output channel), `[N]`.
    PerChannel(Vec<f32>),
    /// One scale per 128x128 block, row-major `[ceil(N / 128), ceil(K / 128)]`; the last block of
    /// either direction may be ragged. This is what checkpoints call `weight_scale_inv`.
    Block128 {
        /// The scales.
        scales: Vec<f32>,
    },
}

impl WeightScale {
    pub(crate) fn check(&self, n: usize, k: usize) -> Result<(), GemmError> {
        let (what, found, wanted) = match self {
            WeightScale::PerTensor(_) => return Ok(()),
            WeightScale::PerChannel(scales) => ("per-channel weight scale", scales.len(), n),
            WeightScale::Block128 { scales } => {
                ("128x128 weight scale", scales.len(), n.div_ceil(SCALE_BLOCK) * k.div_ceil(SCALE_BLOCK))
            }
        };
        if found == wanted { Ok(()) } else { Err(GemmError::ScaleLength { what, wanted, found }) }
    }

    pub(crate) fn granularity(&self) -> &'static str {
        match self {
            WeightScale::PerTensor(_) => "per-tensor scale",
            WeightScale::PerChannel(_) => "per-channel scale",
            WeightScale::Block128 { .. } => "128x128 scale",
        }
    }

    /// The scale of row `row` in K block `block` of `blocks`.
    fn at(&self, row: usize, block: usize, blocks: usize) -> f32 {
        match self {
            WeightScale::PerTensor(scale) => *scale,
            WeightScale::PerChannel(scales) => scales[row],
            WeightScale::Block128 { scales } => scales[row / SCALE_BLOCK * blocks + block],
        }
    }
}

/// Weight scales in the order in which the kernels meet them.
#[derive(Debug)]
pub(crate) enum PackedScale {
    /// One per packed column, `[panels][64]`, applied to the finished sum.
    PerColumn(Vec<f32>),
    /// `[panels][ceil(K / 128)][2]`, one for each half panel, applied to every 128 of K. 32 columns
    /// of one projection never straddle two blocks of 128.
    PerBlock(Vec<[f32; 2]>),
}

impl PackedScale {
    /// One per row of the weight, on the finished sum.
    pub(crate) fn per_column(shape: &PackedShape, scale_of: impl Fn(usize) -> f32) -> Self {
        PackedScale::PerColumn(per_column(shape, scale_of))
    }

    /// `parts` are the scales of the weight, or those of gate and up.
    pub(crate) fn pack(shape: &PackedShape, parts: &[&WeightScale]) -> Self {
        let part_rows = shape.n / parts.len();
        let blocks = shape.scale_blocks();
        let at = |panel, column, block| {
            shape
                .weight_row(panel, column)
                .map_or(0.0, |row| parts[row / part_rows].at(row % part_rows, block, blocks))
        };
        if matches!(parts[0], WeightScale::Block128 { .. }) {
            let halves = |panel, block| [at(panel, 0, block), at(panel, PANEL / 2, block)];
            let scales = (0..shape.panels()).flat_map(|p| (0..blocks).map(move |b| (p, b)));
            PackedScale::PerBlock(scales.map(|(panel, block)| halves(panel, block)).collect())
        } else {
            Self::per_column(shape, |row| parts[row / part_rows].at(row % part_rows, 0, blocks))
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            PackedScale::PerColumn(scales) => size_of_val(scales.as_slice()),
            PackedScale::PerBlock(scales) => size_of_val(scales.as_slice()),
        }
    }

    /// Scales of the columns of panels from `panel` on, if they apply to the finished sum.
    pub(crate) fn columns(&self, panel: usize) -> Option<&[f32]> {
        match self {
            PackedScale::PerColumn(scales) => Some(&scales[panel * PANEL..]),
            PackedScale::PerBlock(_) => None,
        }
    }

    /// Scales of the K blocks of `panel`, if they apply to every 128 of K.
    pub(crate) fn blocks(&self, panel: usize, shape: &PackedShape) -> Option<&[[f32; 2]]> {
        match self {
            PackedScale::PerColumn(_) => None,
            PackedScale::PerBlock(scales) => {
                Some(&scales[panel * shape.scale_blocks()..][..shape.scale_blocks()])
            }
        }
    }
}

/// What the columns of a packed weight bring to a row beside the products of their values.
#[derive(Debug, Default)]
pub(crate) struct ColumnTerms {
    pub(crate) scale: Option<PackedScale>,
    /// `[panels][64]`, added to the finished and scaled sum.
    bias: Option<Vec<f32>>,
}

impl ColumnTerms {
    pub(crate) fn scaled(scale: PackedScale) -> Self {
        ColumnTerms { scale: Some(scale), bias: None }
    }

    /// Takes the bias of the rows of a weight, gate rows before up rows.
    pub(crate) fn set_bias(&mut self, shape: &PackedShape, bias: &[f32]) -> Result<(), GemmError> {
        if bias.len() != shape.n {
            return Err(GemmError::ScaleLength { what: "bias", wanted: shape.n, found: bias.len() });
        }
        self.bias = Some(per_column(shape, |row| bias[row]));
        Ok(())
    }

    /// Biases of the columns of panels from `panel` on.
    pub(crate) fn bias(&self, panel: usize) -> Option<&[f32]> {
        self.bias.as_ref().map(|bias| &bias[panel * PANEL..])
    }

    pub(crate) fn bytes(&self) -> usize {
        let bias = self.bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()));
        bias + self.scale.as_ref().map_or(0, PackedScale::bytes)
    }
}

/// A number for every packed column, `[panels][64]`, zero in the padding.
fn per_column(shape: &PackedShape, of_row: impl Fn(usize) -> f32) -> Vec<f32> {
    let columns = (0..shape.panels()).flat_map(|panel| (0..PANEL).map(move |column| (panel, column)));
    columns.map(|(panel, column)| shape.weight_row(panel, column).map_or(0.0, &of_row)).collect()
}

/// The shape under which gate and up `[I, K]` are packed together.
pub(crate) fn gate_up_shape(size: usize, k: usize) -> PackedShape {
    PackedShape { n: 2 * size, k, columns: Columns::GateUp }
}
