//! Packing the experts of a rank: checks against the configuration, then the layout of the GEMM.

use fused_moe_core::{ExpertMatrices, ExpertWeights, GlobalExpertId, MoeConfig, Rank};
use rayon::prelude::*;

use super::error::ExpertsError;
use super::layout::WeightLayout;
use super::matrix::{DOWN, GATE, Matrix, UP};
use super::scheme::{Fp8Scheme, Scheme};
use crate::aligned::Slab;
use crate::scale::gate_up_shape;
use crate::{Columns, PackedBf16, PackedFp4, PackedFp8, PackedShape, PackedWeight};

/// The packed experts of one layer on one rank, in local order.
#[derive(Debug)]
pub struct PackedExperts {
    /// What they were packed for.
    layout: WeightLayout,
    gemms: PackedGemms,
    input_scales: [f32; 2],
}

/// gemm1 and gemm2 of all experts. Weights keep the bits that they are stored in.
#[derive(Debug)]
pub enum PackedGemms {
    /// Of unquantized weights.
    Bf16(Gemms<PackedBf16>),
    /// Of FP8 weights.
    Fp8(Gemms<PackedFp8>),
    /// Of MXFP4 and NVFP4 weights.
    Fp4(Gemms<PackedFp4>),
}

/// The two weights of each expert.
#[derive(Debug)]
pub struct Gemms<W> {
    /// Gate and up, interleaved: `[2 · intermediate, hidden]`.
    pub w13: Vec<W>,
    /// `[hidden, intermediate]`.
    pub w2: Vec<W>,
}

impl<W: PackedWeight> Gemms<W> {
    fn bytes(&self) -> usize {
        self.w13.iter().chain(&self.w2).map(PackedWeight::bytes).sum()
    }
}

impl PackedExperts {
    /// Checks and packs `experts`, the experts of `rank` in local order, for a configuration of `scheme`. Padding of
    /// the configuration is packed as zeros, whatever it holds.
    ///
    /// # Errors
    /// [`ExpertsError::Weight`] with the expert, the tensor, and what is wrong with it; [`ExpertsError::Gemm`] for
    /// MXFP4 scales that are too far apart.
    pub fn pack(
        scheme: Scheme,
        config: &MoeConfig,
        rank: Rank,
        experts: &[ExpertMatrices<'_>],
    ) -> Result<Self, ExpertsError> {
        let layout = WeightLayout { experts: experts.len(), ..WeightLayout::new(scheme, config, rank) };
        let named: Vec<_> = config.placement.experts_of(rank).zip(experts).collect();
        let checked = named.par_iter().map(|&(expert, matrices)| Checked::new(&layout, expert, matrices));
        let checked: Vec<Checked<'_>> = checked.collect::<Result<_, _>>()?;
        let input_scales = input_scales(scheme, &checked)?;
        let experts = checked.par_iter();
        let gemms = match scheme {
            Scheme::Bf16 => {
                let slab = slab_of(&layout, PackedBf16::slab_bytes);
                PackedGemms::Bf16(gemms(experts.map(|expert| expert.bf16(&slab)))?)
            }
            Scheme::Fp8(fp8) => {
                let slab = slab_of(&layout, PackedFp8::slab_bytes);
                PackedGemms::Fp8(gemms(experts.map(|expert| expert.fp8(fp8, &slab)))?)
            }
            Scheme::Mxfp4 | Scheme::Nvfp4 => {
                PackedGemms::Fp4(gemms(experts.map(|expert| expert.fp4(scheme)))?)
            }
        };
        Ok(Self { layout, gemms, input_scales })
    }

    /// As the weights of `backend`, which [`PackedExperts::of`] takes apart again. They say the scale of what gemm1
    /// reads if the scheme has one and the rank an expert.
    pub fn into_weights(self, backend: &'static str) -> ExpertWeights {
        let bytes = match &self.gemms {
            PackedGemms::Bf16(gemms) => gemms.bytes(),
            PackedGemms::Fp8(gemms) => gemms.bytes(),
            PackedGemms::Fp4(gemms) => gemms.bytes(),
        };
        let is_known = self.layout.scheme.has_input_scales() && self.layout.experts > 0;
        let input_scale = is_known.then_some(self.input_scales[0]);
        ExpertWeights::new(backend, self, bytes).with_input_scale(input_scale)
    }

    /// The packed experts in `weights`, if `backend` packed them for `wanted`.
    ///
    /// # Errors
    /// [`ExpertsError::WeightsOf`].
    pub fn of<'w>(
        weights: &'w ExpertWeights,
        backend: &str,
        wanted: &WeightLayout,
    ) -> Result<&'w Self, ExpertsError> {
        let refused = |found| ExpertsError::WeightsOf { wanted: wanted.to_string(), found };
        match weights.packed::<Self>().filter(|_| weights.backend() == backend) {
            Some(packed) if packed.layout == *wanted => Ok(packed),
            Some(packed) => Err(refused(packed.layout.to_string())),
            None => Err(refused(format!("backend {}", weights.backend()))),
        }
    }

    /// What the two GEMMs multiply with.
    pub fn gemms(&self) -> &PackedGemms {
        &self.gemms
    }

    /// The scales by which the activations before gemm1 and before gemm2 are quantised: the largest of the rank's
    /// experts. 1 where nothing reads them.
    pub fn input_scales(&self) -> [f32; 2] {
        self.input_scales
    }
}

fn input_scales(scheme: Scheme, experts: &[Checked<'_>]) -> Result<[f32; 2], ExpertsError> {
    if !scheme.has_input_scales() || experts.is_empty() {
        return Ok([1.0; 2]);
    }
    let mut largest = [0.0f32; 2];
    for Checked { gate, up, down, .. } in experts {
        for (gemm, matrix) in [(0, gate), (0, up), (1, down)] {
            largest[gemm] = largest[gemm].max(matrix.input_scale(scheme)?);
        }
    }
    Ok(largest)
}

/// Memory for all experts, in which a weight takes what `bytes` says.
fn slab_of(layout: &WeightLayout, bytes: impl Fn(&PackedShape) -> usize) -> Slab {
    let &WeightLayout { experts, hidden, intermediate, .. } = layout;
    let down = PackedShape { n: hidden, k: intermediate, columns: Columns::Plain };
    Slab::new(experts * (bytes(&gate_up_shape(intermediate, hidden)) + bytes(&down)))
}

fn gemms<W: Send>(
    experts: impl ParallelIterator<Item = Result<(W, W), ExpertsError>>,
) -> Result<Gemms<W>, ExpertsError> {
    let pairs: Vec<(W, W)> = experts.collect::<Result<_, _>>()?;
    let (w13, w2) = pairs.into_iter().unzip();
    Ok(Gemms { w13, w2 })
}

/// The matrices of one expert, whose shapes and element types are right.
struct Checked<'a> {
    gate: Matrix<'a>,
    up: Matrix<'a>,
    down: Matrix<'a>,
    /// Of gate and up, and of down.
    biases: Option<[Vec<f32>; 2]>,
}

impl<'a> Checked<'a> {
    fn new(
        layout: &WeightLayout,
        expert: GlobalExpertId,
        lent: &ExpertMatrices<'a>,
    ) -> Result<Self, ExpertsError> {
        let scheme = layout.scheme;
        let dims = layout.gate_up_dims();
        let gate = Matrix::new(scheme, (expert, GATE), lent.gate, dims)?;
        let up = Matrix::new(scheme, (expert, UP), lent.up, dims)?;
        let transposed = dims.map(|[rows, columns]| [columns, rows]);
        let down = Matrix::new(scheme, (expert, DOWN), lent.down, transposed)?;
        let bias = |matrix: &Matrix<'_>| matrix.bias(layout.biases);
        let biases = match (bias(&gate)?, bias(&up)?, bias(&down)?) {
            (Some(gate), Some(up), Some(down)) => Some([[gate, up].concat(), down]),
            _ => None,
        };
        Ok(Self { gate, up, down, biases })
    }

    fn biased<W: PackedWeight>(&self, w13: W, w2: W) -> Result<(W, W), ExpertsError> {
        match &self.biases {
            None => Ok((w13, w2)),
            Some([gate_up, down]) => Ok((w13.with_bias(gate_up)?, w2.with_bias(down)?)),
        }
    }

    fn bf16(&self, slab: &Slab) -> Result<(PackedBf16, PackedBf16), ExpertsError> {
        let (gate, up, down) = (self.gate.bf16()?, self.up.bf16()?, self.down.bf16()?);
        let w13 = PackedBf16::pack_gate_up_in(Some(slab), [self.gate.weight(&gate), self.up.weight(&up)])?;
        self.biased(w13, PackedBf16::pack_in(Some(slab), self.down.weight(&down))?)
    }

    fn fp8(&self, fp8: Fp8Scheme, slab: &Slab) -> Result<(PackedFp8, PackedFp8), ExpertsError> {
        let values = |matrix: &Matrix<'a>| matrix.fp8(fp8.scaling);
        let (gate, up, down) = (values(&self.gate)?, values(&self.up)?, values(&self.down)?);
        let (gate, up) = (self.gate.fp8_weight(fp8, &gate), self.up.fp8_weight(fp8, &up));
        let w13 = PackedFp8::pack_gate_up_in(Some(slab), [gate, up])?;
        self.biased(w13, PackedFp8::pack_in(Some(slab), self.down.fp8_weight(fp8, &down))?)
    }

    fn fp4(&self, scheme: Scheme) -> Result<(PackedFp4, PackedFp4), ExpertsError> {
        let values = |matrix: &Matrix<'a>| matrix.fp4(scheme);
        let (gate, up, down) = (values(&self.gate)?, values(&self.up)?, values(&self.down)?);
        let (gate, up) = (self.gate.fp4_weight(scheme, &gate), self.up.fp4_weight(scheme, &up));
        self.biased(PackedFp4::pack_gate_up(gate, up)?, PackedFp4::pack(self.down.fp4_weight(scheme, &down))?)
    }
}
