//! The layer in f64, quantised at exactly the two points where the layer quantises.
//!
//! Activations are quantised before gemm1 and, after the activation's output was rounded to bf16, before gemm2,
//! by quantisers of this module that shares no code with crate `quant`. Everything else is f64 and the
//! result is not rounded.

mod activation;
mod codec;
mod codes;
mod experts;
pub(crate) mod fp4;
mod matrix;

use fused_moe_core::{
    Accumulation, Activation, CombineWire, DType, ExpertMatrices, ExpertPlacement, Padding, PartialSums,
    Plan, QuantScheme, Rank, RouterWeight, ViewError,
};
use half::bf16;

use crate::bound::{Combine, Expected, Returned, Rounding};

pub use activation::activate;
pub use codec::{Codec, QuantizedRows, dequantize_rows, quantize_rows, quantize_rows_scaled};
pub(crate) use codes::Codes;
pub(crate) use experts::{ArrivedRows, RankExperts};

/// Why the oracle has no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OracleError {
    /// A tensor cannot be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A tensor has the wrong shape.
    #[error("{tensor} is {found:?}, needs {wanted:?}")]
    Shape {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the layer needs.
        wanted: Vec<usize>,
    },
    /// A weight matrix of a type that is not known.
    #[error("{tensor} is of {found}, which the oracle does not read")]
    DType {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its element type.
        found: DType,
    },
    /// An expert id that is neither -1 nor of the layer.
    #[error("expert id {id} of {rank} at position {position} does not exist")]
    NoSuchExpert {
        /// The rank whose tokens name it.
        rank: Rank,
        /// Position in the rank's ids.
        position: usize,
        /// The id.
        id: i32,
    },
}

/// Sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Elements of a token.
    pub hidden: usize,
    /// Elements between gemm1 and gemm2.
    pub intermediate: usize,
    /// Experts per token.
    pub top_k: usize,
}

/// The tokens of one rank and where they go.
#[derive(Clone, Copy, Debug)]
pub struct RankTokens<'a> {
    /// `[tokens, hidden]`.
    pub hidden: &'a [bf16],
    /// `[tokens, top_k]` global expert ids; -1 is no expert.
    pub ids: &'a [i32],
    /// `[tokens, top_k]` routing weights.
    pub weights: &'a [f32],
}

/// Whose activations share a dynamic per-tensor scale before gemm1. No other scheme looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputScales {
    /// Dispatch quantises: the tokens of a source rank.
    OfSource,
    /// Experts quantise, and every rank received all tokens: the tokens of all ranks.
    OfAllRows,
    /// Experts quantise, and a rank received the tokens that name one of its experts: those.
    OfNeededRows,
}

impl InputScales {
    /// What may share a scale under `plan`. Where experts quantise per tensor, that depends on whether their comm
    /// sends every token to every rank, which a plan does not say: two answers are right then.
    pub fn of_plan(quant: QuantScheme, plan: &Plan) -> &'static [Self] {
        let couples_rows = Codes { quant, input_scale: None }.couples_rows();
        match couples_rows && plan.wire().scale.is_none() {
            true => &[InputScales::OfNeededRows, InputScales::OfAllRows],
            false => &[InputScales::OfSource],
        }
    }
}

/// A layer over all ranks of a group.
///
/// ```
/// use fused_moe_core::*;
/// use half::bf16;
/// use moe_conformance::oracle::{InputScales, Layer, RankTokens, Shape};
///
/// // One expert whose gate and up are 2 and whose down is 1, hidden and intermediate size 1.
/// let (two, one) = ([bf16::from_f32(2.0)], [bf16::ONE]);
/// let matrix = |values| -> Result<_, ViewError> {
///     Ok(WeightMatrix::unquantized(TensorView::from_slice(values, DType::Bf16, &[1, 1])?))
/// };
/// let expert = ExpertMatrices { gate: matrix(&two)?, up: matrix(&two)?, down: matrix(&one)? };
/// let output = Layer {
///     shape: Shape { hidden: 1, intermediate: 1, top_k: 1 },
///     quant: QuantScheme::Unquantized,
///     activation: Activation::Silu,
///     padding: Padding::default(),
///     router_weight: RouterWeight::OnOutput,
///     input_scales: InputScales::OfSource,
///     experts: &[expert],
///     placement: &ExpertPlacement::linear(1, 1)?,
///     ranks: &[RankTokens { hidden: &one, ids: &[0], weights: &[0.5] }],
/// }
/// .run()?;
/// // 0.5 · bf16(silu(2) · 2)
/// assert!((output[0][0] - 0.5 * 3.515625).abs() < 1e-12, "{output:?}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Sizes.
    pub shape: Shape,
    /// How activations are quantised. The weights are what [`Layer::experts`] holds.
    pub quant: QuantScheme,
    /// Between the two GEMMs.
    pub activation: Activation,
    /// Trailing columns that are not read and come out as zeros.
    pub padding: Padding,
    /// Where the routing weight is applied.
    pub router_weight: RouterWeight,
    /// Who shares a dynamic per-tensor scale.
    pub input_scales: InputScales,
    /// All experts by global id: bf16, f16 or f32 values, or FP8 or FP4 codes with scales; with biases and input
    /// scales where the layer has them.
    pub experts: &'a [ExpertMatrices<'a>],
    /// Which rank holds which expert. Per-tensor scales before gemm2 are per rank.
    pub placement: &'a ExpertPlacement,
    /// The tokens of every rank.
    pub ranks: &'a [RankTokens<'a>],
}

impl Layer<'_> {
    /// The output of every rank, `[tokens, hidden]` each, without the roundings behind gemm2. Work is spread over
    /// all cores if there is much.
    ///
    /// # Errors
    /// [`OracleError`].
    pub fn run(&self) -> Result<Vec<Vec<f64>>, OracleError> {
        let rounding = Rounding {
            returned: Returned::PartialSums,
            combine_wire: CombineWire::InDtype,
            partial_sums: PartialSums::None,
            output: DType::F32,
            accumulation: Accumulation::F32,
            routes: false,
        };
        let Expected { exact, .. } = self.expected(rounding)?;
        let mut rest = exact.as_slice();
        let per_rank = self.ranks.iter().map(|tokens| {
            let (mine, others) = rest.split_at(tokens.hidden.len());
            rest = others;
            mine.to_vec()
        });
        Ok(per_rank.collect())
    }

    /// The outputs of all ranks, one behind the other, with how far a layer may be from them that rounds as
    /// `rounding` says.
    ///
    /// # Errors
    /// [`OracleError`].
    pub fn expected(&self, rounding: Rounding) -> Result<Expected, OracleError> {
        self.check()?;
        let Shape { hidden, .. } = self.shape;
        let rows: Vec<Vec<bf16>> = self.ranks.iter().map(|tokens| self.sent(tokens)).collect();
        let all_rows = rows.concat();
        let ids: Vec<i32> = self.ranks.iter().flat_map(|t| t.ids).copied().collect();
        let weights: Vec<f32> = self.ranks.iter().flat_map(|t| t.weights).copied().collect();
        let before_gemm1 = Codes::of_gemm1(self.quant, self.experts);
        let by_source: Vec<f64> = rows.iter().flat_map(|rows| before_gemm1.through(rows, hidden)).collect();

        let mut combine = Combine::new(rounding, all_rows.len() / hidden, hidden);
        for rank in (0..self.placement.ep_size() as u32).map(Rank) {
            let experts = RankExperts {
                shape: self.shape,
                codes: Codes::of_gemm2(self.quant, self.experts),
                activation: self.activation,
                padding: self.padding,
                router_weight: self.router_weight,
                accumulation: rounding.accumulation,
                experts: self.experts,
                placement: self.placement,
                rank,
            };
            let deferred = match (before_gemm1.couples_rows(), self.input_scales) {
                (true, InputScales::OfAllRows) => Some(before_gemm1.through(&all_rows, hidden)),
                (true, InputScales::OfNeededRows) => {
                    Some(before_gemm1.through(&self.needed(rank, &all_rows, &ids), hidden))
                }
                _ => None,
            };
            let values = deferred.as_deref().unwrap_or(&by_source);
            combine.add_rank(&experts.outputs(ArrivedRows { values, ids: &ids, weights: &weights })?);
        }
        Ok(combine.finish())
    }

    /// What a rank quantises: its tokens, times the routing weight where dispatch applies it.
    fn sent(&self, tokens: &RankTokens<'_>) -> Vec<bf16> {
        if self.router_weight != RouterWeight::OnInputByPrepare {
            return tokens.hidden.to_vec();
        }
        weighted_rows(tokens.hidden, tokens.weights, self.shape.hidden)
    }

    /// All rows, those that name no expert of `rank` zero.
    fn needed(&self, rank: Rank, rows: &[bf16], ids: &[i32]) -> Vec<bf16> {
        let Shape { hidden, top_k, .. } = self.shape;
        let mut masked = rows.to_vec();
        for (row, ids) in masked.chunks_exact_mut(hidden).zip(ids.chunks_exact(top_k)) {
            if ids.iter().all(|&id| self.placement.rank_of_slot(id) != Some(rank)) {
                row.fill(bf16::ZERO);
            }
        }
        masked
    }

    fn check(&self) -> Result<(), OracleError> {
        let Shape { hidden, top_k, .. } = self.shape;
        let wanted = [self.placement.num_experts()];
        if self.experts.len() != wanted[0] {
            let found = vec![self.experts.len()];
            return Err(OracleError::Shape { tensor: "experts", found, wanted: wanted.to_vec() });
        }
        for (rank, tokens) in self.ranks.iter().enumerate() {
            let count = tokens.hidden.len() / hidden;
            for (tensor, found, wanted) in [
                ("hidden states", tokens.hidden.len(), count * hidden),
                ("top-k ids", tokens.ids.len(), count * top_k),
                ("top-k weights", tokens.weights.len(), count * top_k),
            ] {
                if found != wanted {
                    return Err(OracleError::Shape { tensor, found: vec![found], wanted: vec![wanted] });
                }
            }
            for (position, &id) in tokens.ids.iter().enumerate() {
                if id != -1 && self.placement.rank_of_slot(id).is_none() {
                    return Err(OracleError::NoSuchExpert { rank: Rank(rank as u32), position, id });
                }
            }
        }
        Ok(())
    }
}

/// `bf16(x · w)` row by row, with one weight per row (`top_k` 1).
pub(crate) fn weighted_rows(rows: &[bf16], weights: &[f32], hidden: usize) -> Vec<bf16> {
    let rows = rows.chunks_exact(hidden).zip(weights);
    rows.flat_map(|(row, &w)| row.iter().map(move |x| bf16::from_f32(x.to_f32() * w))).collect()
}
