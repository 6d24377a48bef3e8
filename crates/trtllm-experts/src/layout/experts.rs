//! All experts of a rank, from FlashInfer's tensors to matrices of a checkpoint.

use fused_moe_core::{
    BLOCK, DType, ExpertMatrices, MoeConfig, QuantScheme, Rank, TensorView, ViewError, WeightMatrix,
    WeightScale,
};
use half::bf16;

use super::matrix::{SchemeLayouts, TrtllmLayout, TrtllmMatrix};
use super::swizzle::{ScaleTile, SwizzledScales};
use super::{LayoutError, check_len};

/// Columns that share a scale of NVFP4.
const NV_GROUP: usize = 16;

/// The weights of a rank's experts in the layouts of [`SchemeLayouts`], expert after expert.
#[derive(Clone, Copy, Debug)]
pub struct TrtllmWeights<'a> {
    /// `[experts, …]`, `[up; gate]` of each: `gemm1_weights`.
    pub w13: TrtllmValues<'a>,
    /// `[experts, …]`, down of each: `gemm2_weights`.
    pub w2: TrtllmValues<'a>,
    /// Their scales.
    pub scales: TrtllmScales<'a>,
}

/// Elements of weights.
#[derive(Clone, Copy, Debug)]
pub enum TrtllmValues<'a> {
    /// Unquantized.
    Bf16(&'a [bf16]),
    /// FP8 codes, or pairs of FP4 codes.
    Codes(&'a [u8]),
}

/// Scales of weights and activations before they are folded into each other.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum TrtllmScales<'a> {
    /// Of unquantized weights.
    None,
    /// Of FP8 weights with a scale per tensor. Gate and up share one.
    Tensor {
        /// `[experts]`.
        w13: &'a [f32],
        /// `[experts]`.
        w2: &'a [f32],
        /// Static scale of what gemm1 reads, and of what gemm2 reads.
        inputs: [f32; 2],
    },
    /// Of block FP8.
    Block128 {
        /// `[experts, 2 · intermediate / 128, hidden / 128]`, up above gate.
        w13: &'a [f32],
        /// `[experts, hidden / 128, intermediate / 128]`.
        w2: &'a [f32],
    },
    /// Of NVFP4.
    Nv16 {
        /// `[experts, …]` E4M3 scales of `[up; gate]`, rows in the order of the codes' rows, in tiles of 128x4.
        w13: &'a [u8],
        /// `[experts, …]` of down, likewise.
        w2: &'a [u8],
        /// `[experts]` f32 scales of the matrices.
        w13_global: &'a [f32],
        /// `[experts]` f32 scales of the matrices.
        w2_global: &'a [f32],
        /// Global scale of what gemm1 reads, and of what gemm2 reads.
        inputs: [f32; 2],
    },
}

impl TrtllmScales<'_> {
    const fn name(&self) -> &'static str {
        match self {
            TrtllmScales::None => "values without scales",
            TrtllmScales::Tensor { .. } => "codes with a scale per tensor",
            TrtllmScales::Block128 { .. } => "codes with a scale per 128x128 block",
            TrtllmScales::Nv16 { .. } => "codes with scales per 1x16 and per tensor",
        }
    }
}

/// The three matrices of an expert as a checkpoint has them.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedExpert {
    gate: OwnedMatrix,
    up: OwnedMatrix,
    down: OwnedMatrix,
}

#[derive(Clone, Debug, PartialEq)]
struct OwnedMatrix {
    values: OwnedValues,
    dims: [usize; 2],
    dtype: DType,
    scale: OwnedScale,
    input_scale: Option<f32>,
}

#[derive(Clone, Debug, PartialEq)]
enum OwnedValues {
    Bf16(Vec<bf16>),
    Codes(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq)]
enum OwnedScale {
    None,
    Tensor(f32),
    Block128(Vec<f32>, [usize; 2]),
    Nv16 { blocks: Vec<u8>, dims: [usize; 2], global: f32 },
}

impl OwnedExpert {
    /// The matrices as [`pack`](fused_moe_core::ExpertsProvider::pack) takes them.
    ///
    /// # Errors
    /// [`ViewError`], which would be a bug here.
    pub fn matrices(&self) -> Result<ExpertMatrices<'_>, ViewError> {
        Ok(ExpertMatrices { gate: self.gate.view()?, up: self.up.view()?, down: self.down.view()? })
    }
}

impl OwnedMatrix {
    fn view(&self) -> Result<WeightMatrix<'_>, ViewError> {
        let values = match &self.values {
            OwnedValues::Bf16(values) => TensorView::from_slice(values, self.dtype, &self.dims)?,
            OwnedValues::Codes(codes) => TensorView::from_slice(codes, self.dtype, &self.dims)?,
        };
        let scale = match &self.scale {
            OwnedScale::None => None,
            OwnedScale::Tensor(scale) => Some(WeightScale::Tensor(*scale)),
            OwnedScale::Block128(scales, dims) => {
                Some(WeightScale::Block128(TensorView::from_slice(scales, DType::F32, dims)?))
            }
            OwnedScale::Nv16 { blocks, dims, global } => Some(WeightScale::Nv16 {
                blocks: TensorView::from_slice(blocks, DType::Fp8E4M3Fn, dims)?,
                global: *global,
            }),
        };
        Ok(WeightMatrix { scale, input_scale: self.input_scale, ..WeightMatrix::unquantized(values) })
    }
}

/// Takes the experts of `rank` out of FlashInfer's tensors, in local order. Every value is moved and none changed.
///
/// # Errors
/// [`LayoutError`] for tensors of another scheme or of other sizes than `config` says.
pub fn from_trtllm(
    config: &MoeConfig,
    rank: Rank,
    weights: TrtllmWeights<'_>,
) -> Result<Vec<OwnedExpert>, LayoutError> {
    let experts = config.placement.num_local_experts(rank);
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let wrong = || LayoutError::Scheme { wanted: config.quant.to_string(), found: weights.scales.name() };
    let layouts = SchemeLayouts::of(config.quant).ok_or_else(wrong)?;
    let (dtype, per_column) = match config.quant {
        QuantScheme::Nvfp4 => (DType::Fp4E2M1x2, 2),
        quant => (quant.fp8().map_or(DType::Bf16, |fp8| fp8.dtype()), 1),
    };
    let w13 = Stack { rows: 2 * intermediate, columns: hidden / per_column, experts, layout: layouts.w13 };
    let w2 = Stack { rows: hidden, columns: intermediate / per_column, experts, layout: layouts.w2 };
    let scales = Scales::new(config, experts, (&weights.scales, layouts)).ok_or_else(wrong)??;
    let mut owned = Vec::with_capacity(experts);
    let pairs = w13.take(weights.w13)?.into_iter().zip(w2.take(weights.w2)?);
    for (expert, (gate_up, down)) in pairs.enumerate() {
        let (gate, up) = match gate_up {
            Taken::Bf16(matrix) => {
                let (gate, up) = matrix.to_gate_up();
                (OwnedValues::Bf16(gate), OwnedValues::Bf16(up))
            }
            Taken::Codes(matrix) => {
                let (gate, up) = matrix.to_gate_up();
                (OwnedValues::Codes(gate), OwnedValues::Codes(up))
            }
        };
        let down = match down {
            Taken::Bf16(matrix) => OwnedValues::Bf16(matrix.to_rows()),
            Taken::Codes(matrix) => OwnedValues::Codes(matrix.to_rows()),
        };
        let [gate_scale, up_scale, down_scale] = scales.of(expert)?;
        let [first, second] = scales.inputs.map_or([None; 2], |inputs| inputs.map(Some));
        let matrix =
            |values, dims, scale, input_scale| OwnedMatrix { values, dims, dtype, scale, input_scale };
        let (narrow, wide) = ([intermediate, w13.columns], [hidden, w2.columns]);
        owned.push(OwnedExpert {
            gate: matrix(gate, narrow, gate_scale, first),
            up: matrix(up, narrow, up_scale, first),
            down: matrix(down, wide, down_scale, second),
        });
    }
    Ok(owned)
}

/// One kind of weight of all experts.
#[derive(Clone, Copy)]
struct Stack {
    rows: usize,
    columns: usize,
    experts: usize,
    layout: TrtllmLayout,
}

/// A matrix of one expert.
enum Taken<'a> {
    Bf16(TrtllmMatrix<'a, bf16>),
    Codes(TrtllmMatrix<'a, u8>),
}

impl Stack {
    fn take<'a>(&self, values: TrtllmValues<'a>) -> Result<Vec<Taken<'a>>, LayoutError> {
        match values {
            TrtllmValues::Bf16(values) => self.matrices(values, Taken::Bf16),
            TrtllmValues::Codes(codes) => self.matrices(codes, Taken::Codes),
        }
    }

    fn matrices<'a, T: Copy>(
        &self,
        values: &'a [T],
        taken: impl Fn(TrtllmMatrix<'a, T>) -> Taken<'a>,
    ) -> Result<Vec<Taken<'a>>, LayoutError> {
        let len = self.rows * self.columns;
        check_len("the weights of all experts", values.len(), self.experts * len)?;
        let experts = values.chunks_exact(len.max(1));
        experts.map(|e| TrtllmMatrix::new(e, [self.rows, self.columns], self.layout).map(&taken)).collect()
    }
}

/// The scales of all experts, checked.
struct Scales<'a> {
    of: &'a TrtllmScales<'a>,
    inputs: Option<[f32; 2]>,
    hidden: usize,
    intermediate: usize,
    layouts: SchemeLayouts,
}

impl<'a> Scales<'a> {
    /// `None` for scales of another scheme.
    fn new(
        config: &MoeConfig,
        experts: usize,
        (of, layouts): (&'a TrtllmScales<'a>, SchemeLayouts),
    ) -> Option<Result<Self, LayoutError>> {
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let blocks = hidden / BLOCK * (intermediate / BLOCK);
        let groups = |rows, columns: usize| ScaleTile::Rows128x4.bytes(rows, columns / NV_GROUP);
        let (lengths, inputs) = match (config.quant, of) {
            (QuantScheme::Unquantized, TrtllmScales::None) => (vec![], None),
            (QuantScheme::Fp8PerTensorStatic(_), &TrtllmScales::Tensor { w13, w2, inputs }) => {
                (vec![("scales of w13", w13.len(), 1), ("scales of w2", w2.len(), 1)], Some(inputs))
            }
            (QuantScheme::Fp8Block(_), TrtllmScales::Block128 { w13, w2 }) => {
                (vec![("scales of w13", w13.len(), 2 * blocks), ("scales of w2", w2.len(), blocks)], None)
            }
            (QuantScheme::Nvfp4, &TrtllmScales::Nv16 { w13, w2, w13_global, w2_global, inputs }) => (
                vec![
                    ("scales of w13", w13.len(), groups(2 * intermediate, hidden)),
                    ("scales of w2", w2.len(), groups(hidden, intermediate)),
                    ("global scales of w13", w13_global.len(), 1),
                    ("global scales of w2", w2_global.len(), 1),
                ],
                Some(inputs),
            ),
            _ => return None,
        };
        let checked =
            lengths.into_iter().try_for_each(|(what, len, of_one)| check_len(what, len, experts * of_one));
        Some(checked.map(|()| Self { of, inputs, hidden, intermediate, layouts }))
    }

    /// Those of gate, up and down of one expert.
    fn of(&self, expert: usize) -> Result<[OwnedScale; 3], LayoutError> {
        let Self { hidden, intermediate, layouts, .. } = *self;
        Ok(match *self.of {
            TrtllmScales::None => [OwnedScale::None, OwnedScale::None, OwnedScale::None],
            TrtllmScales::Tensor { w13, w2, .. } => {
                [w13[expert], w13[expert], w2[expert]].map(OwnedScale::Tensor)
            }
            TrtllmScales::Block128 { w13, w2 } => {
                let (n, k) = (intermediate / BLOCK, hidden / BLOCK);
                let (up, gate) = w13[expert * 2 * n * k..][..2 * n * k].split_at(n * k);
                let down = &w2[expert * n * k..][..n * k];
                let scale = |scales: &[f32], dims| OwnedScale::Block128(scales.to_vec(), dims);
                [scale(gate, [n, k]), scale(up, [n, k]), scale(down, [k, n])]
            }
            TrtllmScales::Nv16 { w13, w2, w13_global, w2_global, .. } => {
                let unswizzled = |all: &[u8], [rows, columns]: [usize; 2], layout: TrtllmLayout| {
                    let tile = ScaleTile::Rows128x4;
                    let (len, dims) = (tile.bytes(rows, columns), [rows, columns]);
                    let tiles = SwizzledScales::new(all[expert * len..][..len].to_vec(), dims, tile)?;
                    TrtllmMatrix::new(tiles.to_rows(), dims, layout)
                };
                let (k, n) = (hidden / NV_GROUP, intermediate / NV_GROUP);
                let (gate, up) = unswizzled(w13, [2 * intermediate, k], layouts.w13)?.to_gate_up();
                let down = unswizzled(w2, [hidden, n], layouts.w2)?.to_rows();
                let scale = |blocks, dims, global: f32| OwnedScale::Nv16 { blocks, dims, global };
                [
                    scale(gate, [intermediate, k], w13_global[expert]),
                    scale(up, [intermediate, k], w13_global[expert]),
                    scale(down, [hidden, n], w2_global[expert]),
                ]
            }
        })
    }
}
