//! Packing the experts of a rank: checks against the configuration, then the layout of the GEMM.

use std::borrow::Cow;

use fused_moe_core::{
    BLOCK, DType, Element, ExpertMatrices, ExpertWeights, GlobalExpertId, MoeConfig, Rank, TensorView,
    WeightMatrix, WeightScale as LentScale,
};
use half::bf16;
use rayon::prelude::*;

use super::error::{ExpertsError, shape};
use super::scheme::{Fp8Scheme, Scaling, Scheme};
use crate::{Fp8Weight, PackedBf16, PackedFp8, PackedWeight, Weight, WeightScale};

/// The packed experts of one layer on one rank, in local order.
#[derive(Debug)]
pub struct PackedExperts {
    /// What they were packed for.
    layout: WeightLayout,
    gemms: PackedGemms,
}

/// Everything in which the weights of two kernels of a backend can differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightLayout {
    /// What the GEMMs multiply.
    pub scheme: Scheme,
    /// Experts on the rank.
    pub experts: usize,
    /// Columns of gate and up, rows of down.
    pub hidden: usize,
    /// Rows of gate and up, columns of down.
    pub intermediate: usize,
}

impl WeightLayout {
    /// The layout on `rank` under a configuration of `scheme`.
    pub fn new(scheme: Scheme, config: &MoeConfig, rank: Rank) -> Self {
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        Self { scheme, experts: config.placement.num_local_experts(rank), hidden, intermediate }
    }
}

impl std::fmt::Display for WeightLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { scheme, experts, hidden, intermediate } = self;
        match scheme {
            Scheme::Bf16 => write!(f, "bf16 weights")?,
            Scheme::Fp8(fp8) => write!(f, "{} weights with a scale per {}", fp8.format.dtype(), fp8.scaling)?,
        }
        write!(f, " of {experts} experts, hidden {hidden}, intermediate {intermediate}")
    }
}

/// gemm1 and gemm2 of all experts. FP8 weights stay one byte each.
#[derive(Debug)]
pub enum PackedGemms {
    /// Of unquantized weights.
    Bf16(Gemms<PackedBf16>),
    /// Of FP8 weights.
    Fp8(Gemms<PackedFp8>),
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
    /// Checks and packs `experts`, the experts of `rank` in local order, for a configuration of `scheme`.
    ///
    /// # Errors
    /// [`ExpertsError::Weight`] with the expert, the tensor, and what is wrong with it.
    pub fn pack(
        scheme: Scheme,
        config: &MoeConfig,
        rank: Rank,
        experts: &[ExpertMatrices<'_>],
    ) -> Result<Self, ExpertsError> {
        let layout = WeightLayout { experts: experts.len(), ..WeightLayout::new(scheme, config, rank) };
        let named: Vec<_> = config.placement.experts_of(rank).zip(experts).collect();
        let named = named.par_iter().map(|&(expert, matrices)| Checked::new(&layout, expert, matrices));
        let gemms = match scheme {
            Scheme::Bf16 => PackedGemms::Bf16(gemms(named.map(|expert| expert?.bf16()))?),
            Scheme::Fp8(fp8) => PackedGemms::Fp8(gemms(named.map(|expert| expert?.fp8(fp8)))?),
        };
        Ok(Self { layout, gemms })
    }

    /// As the weights of `backend`, which [`PackedExperts::of`] takes apart again.
    pub fn into_weights(self, backend: &'static str) -> ExpertWeights {
        let bytes = match &self.gemms {
            PackedGemms::Bf16(gemms) => gemms.bytes(),
            PackedGemms::Fp8(gemms) => gemms.bytes(),
        };
        ExpertWeights::new(backend, self, bytes)
    }

    /// The GEMMs of `weights`, if `backend` packed them for `wanted`.
    ///
    /// # Errors
    /// [`ExpertsError::WeightsOf`].
    pub fn of<'w>(
        weights: &'w ExpertWeights,
        backend: &str,
        wanted: &WeightLayout,
    ) -> Result<&'w PackedGemms, ExpertsError> {
        let refused = |found| ExpertsError::WeightsOf { wanted: wanted.to_string(), found };
        match weights.packed::<Self>().filter(|_| weights.backend() == backend) {
            Some(packed) if packed.layout == *wanted => Ok(&packed.gemms),
            Some(packed) => Err(refused(packed.layout.to_string())),
            None => Err(refused(format!("backend {}", weights.backend()))),
        }
    }
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
    expert: GlobalExpertId,
    gate: Named<'a>,
    up: Named<'a>,
    down: Named<'a>,
}

/// A matrix and how errors call it.
#[derive(Clone, Copy)]
struct Named<'a> {
    name: &'static str,
    scale_name: &'static str,
    matrix: WeightMatrix<'a>,
}

impl<'a> Checked<'a> {
    fn new(
        layout: &WeightLayout,
        expert: GlobalExpertId,
        lent: &ExpertMatrices<'a>,
    ) -> Result<Self, ExpertsError> {
        let &WeightLayout { scheme, hidden, intermediate, .. } = layout;
        let gate = Named { name: "gate", scale_name: "gate scale", matrix: lent.gate };
        let up = Named { name: "up", scale_name: "up scale", matrix: lent.up };
        let down = Named { name: "down", scale_name: "down scale", matrix: lent.down };
        for (named, dims) in
            [(gate, [intermediate, hidden]), (up, [intermediate, hidden]), (down, [hidden, intermediate])]
        {
            named.check(scheme, dims).map_err(|wrong| wrong.of(expert))?;
        }
        Ok(Self { expert, gate, up, down })
    }

    fn bf16(&self) -> Result<(PackedBf16, PackedBf16), ExpertsError> {
        let values = |named: Named<'a>| named.bf16();
        let (gate, up, down) = (values(self.gate)?, values(self.up)?, values(self.down)?);
        let w13 = PackedBf16::pack_gate_up(self.gate.weight(&gate), self.up.weight(&up))?;
        Ok((w13, PackedBf16::pack(self.down.weight(&down))?))
    }

    fn fp8(&self, fp8: Fp8Scheme) -> Result<(PackedFp8, PackedFp8), ExpertsError> {
        let codes = |named: Named<'a>| dense::<u8>(named.matrix.values);
        let scale = |named: Named<'a>| named.scale(fp8.scaling).map_err(|wrong| wrong.of(self.expert));
        let (gate, up, down) = (codes(self.gate)?, codes(self.up)?, codes(self.down)?);
        let scales = (scale(self.gate)?, scale(self.up)?, scale(self.down)?);
        let weight =
            |named: Named<'a>, codes, scale| Fp8Weight { codes: named.weight(codes), kind: fp8.kind, scale };
        let w13 =
            PackedFp8::pack_gate_up(weight(self.gate, &gate, &scales.0), weight(self.up, &up, &scales.1))?;
        Ok((w13, PackedFp8::pack(weight(self.down, &down, &scales.2))?))
    }
}

/// A tensor that is not what the configuration asks for.
struct Wrong {
    tensor: &'static str,
    wanted: String,
    found: String,
}

impl Wrong {
    fn of(self, expert: GlobalExpertId) -> ExpertsError {
        let Wrong { tensor, wanted, found } = self;
        ExpertsError::Weight { expert, tensor, wanted, found }
    }
}

impl<'a> Named<'a> {
    fn check(&self, scheme: Scheme, dims: [usize; 2]) -> Result<(), Wrong> {
        let view = self.matrix.values;
        let (element, dtype_fits) = match scheme {
            Scheme::Bf16 => ("bf16 or f32", matches!(view.dtype(), DType::Bf16 | DType::F32)),
            Scheme::Fp8(fp8) => (fp8.format.dtype().name(), view.dtype() == fp8.format.dtype()),
        };
        if view.dims() != dims || !dtype_fits {
            let (wanted, found) = (format!("{dims:?} of {element}"), shape(view.dims(), view.dtype()));
            return Err(Wrong { tensor: self.name, wanted, found });
        }
        match (scheme, &self.matrix.scale) {
            (Scheme::Bf16, Some(scale)) => {
                Err(Wrong { tensor: self.scale_name, wanted: "no scale".into(), found: describe(scale) })
            }
            _ => Ok(()),
        }
    }

    fn weight<'v, T>(&self, values: &'v [T]) -> Weight<'v, T> {
        let dims = self.matrix.values.dims();
        Weight { values, n: dims[0], k: dims[1] }
    }

    /// The values, rounded to bf16 where they are f32.
    fn bf16(&self) -> Result<Cow<'a, [bf16]>, ExpertsError> {
        match self.matrix.values.dtype() {
            DType::F32 => {
                let values = dense::<f32>(self.matrix.values)?;
                Ok(values.iter().map(|&value| bf16::from_f32(value)).collect())
            }
            _ => dense(self.matrix.values),
        }
    }

    fn scale(&self, scaling: Scaling) -> Result<WeightScale, Wrong> {
        let dims = self.matrix.values.dims();
        let (n, k) = (dims[0], dims[1]);
        let wrong = |wanted: String, found: String| Wrong { tensor: self.scale_name, wanted, found };
        let read = |view: TensorView<'a>, wanted: &[usize]| {
            let scales = match (view.dims() == wanted, dense::<f32>(view)) {
                (true, Ok(scales)) => scales.into_owned(),
                _ => {
                    return Err(wrong(shape(wanted, DType::F32), shape(view.dims(), view.dtype())));
                }
            };
            match scales.iter().position(|scale| !scale.is_finite()) {
                None => Ok(scales),
                Some(at) => Err(wrong("finite scales".into(), format!("{} at {at}", scales[at]))),
            }
        };
        match (scaling, self.matrix.scale) {
            (Scaling::Tensor, Some(LentScale::Tensor(scale))) if scale.is_finite() => {
                Ok(WeightScale::PerTensor(scale))
            }
            (Scaling::Token, Some(LentScale::Channel(view))) => {
                Ok(WeightScale::PerChannel(read(view, &[n])?))
            }
            (Scaling::Block, Some(LentScale::Block128(view))) => {
                Ok(WeightScale::Block128 { scales: read(view, &[n.div_ceil(BLOCK), k.div_ceil(BLOCK)])? })
            }
            (_, scale) => {
                let wanted = match scaling {
                    Scaling::Tensor => "one finite scale".into(),
                    Scaling::Token => format!("a scale per output channel, [{n}]"),
                    Scaling::Block => {
                        format!("a scale per 128x128 block, {:?}", [n.div_ceil(BLOCK), k.div_ceil(BLOCK)])
                    }
                };
                Err(wrong(wanted, scale.as_ref().map_or("no scale".into(), describe)))
            }
        }
    }
}

fn describe(scale: &LentScale<'_>) -> String {
    match scale {
        LentScale::Tensor(scale) => format!("one scale ({scale})"),
        LentScale::Channel(view) => format!("a scale per output channel, {:?}", view.dims()),
        LentScale::Block128(view) => format!("a scale per 128x128 block, {:?}", view.dims()),
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
