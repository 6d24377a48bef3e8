//! Which configurations the kernels run.

use fused_moe_core::{
    Accumulation, Activation, Axis, DType, DeviceKind, ExpertsCaps, Fp8Format, MoeConfig, Padding,
    QuantScheme, Rank, Unsupported, WireFormat,
};
use moe_kernels::experts::{ExpertsCall, ExpertsShape, ExpertsWeights};
use moe_kernels::grouped_gemm::{GemmScheme, TokenTile};
use moe_kernels::{Arch, Float};

use crate::NAME;

/// Rows and columns of a tile: what sizes are multiples of.
const TILE: usize = 128;
/// Local experts that the GEMMs count.
const MAX_EXPERTS: usize = 256;

/// How wgmma adds FP8 products up on Hopper, and the GEMMs its sums. Products of bf16 are as good as in f32.
const TENSOR_CORES: Accumulation = Accumulation::Aligned { bits: 13, step: 32, promoted: 128 };

/// How the GEMMs run `quant`, if they do.
pub(crate) fn scheme(quant: QuantScheme) -> Option<GemmScheme> {
    match quant {
        QuantScheme::Unquantized => Some(GemmScheme::Bf16),
        QuantScheme::Fp8Block(Fp8Format::E4M3Fn) => Some(GemmScheme::Fp8Block),
        QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn) => Some(GemmScheme::Fp8Row),
        _ => None,
    }
}

/// The capabilities under a configuration that is supported.
pub(crate) fn caps(config: &MoeConfig) -> ExpertsCaps {
    let mut caps = ExpertsCaps::host(NAME, vec![wire(config)]);
    caps.devices = vec![DeviceKind::Cuda];
    caps.capturable = true;
    if config.quant.fp8().is_some() {
        caps.accumulation = TENSOR_CORES;
    }
    caps
}

/// What arrives: rows that dispatch has quantised, if the scheme quantises.
pub(crate) fn wire(config: &MoeConfig) -> WireFormat {
    config.quant.quantized_wire(config.in_dtype)
}

/// Everything that is against `config`, but for the device itself.
pub(crate) fn reasons(config: &MoeConfig) -> Vec<Unsupported> {
    let mut why = Vec::new();
    let mut no = |axis, wanted: &str, offered: String| why.push(Unsupported::new(axis, wanted, offered));
    if config.device != DeviceKind::Cuda {
        no(Axis::Device, "Cuda", format!("{:?}", config.device));
    }
    if config.in_dtype != DType::Bf16 {
        no(Axis::DType, "bf16 hidden states", config.in_dtype.to_string());
    }
    if scheme(config.quant).is_none() {
        no(Axis::Quant, "none, fp8-block or fp8-ptpc in fp8_e4m3fn", config.quant.to_string());
    }
    if config.activation != Activation::Silu {
        no(Axis::Activation, "silu", config.activation.to_string());
    }
    if config.expert_bias {
        no(Axis::Weights, "no biases", "a bias for every matrix".into());
    }
    if config.padding != Padding::default() {
        let Padding { hidden, intermediate } = config.padding;
        no(Axis::Shape, "no padding", format!("{hidden} of hidden, {intermediate} of intermediate"));
    }
    for (wanted, size) in
        [("hidden a multiple of 128", config.hidden), ("intermediate a multiple of 128", config.intermediate)]
    {
        if !size.is_multiple_of(TILE) {
            no(Axis::Shape, wanted, size.to_string());
        }
    }
    let most = ranks(config).map(|rank| config.placement.num_local_experts(rank)).max().unwrap_or(0);
    if most > MAX_EXPERTS {
        no(Axis::Shape, "at most 256 experts on a rank", most.to_string());
    }
    if why.is_empty()
        && let Some(error) = beyond_counters(config)
    {
        why.push(Unsupported::new(Axis::Shape, "sizes that the kernels count", error));
    }
    why
}

fn ranks(config: &MoeConfig) -> impl Iterator<Item = Rank> {
    (0..config.ep_size() as u32).map(Rank)
}

/// What the kernels say to the largest call of the configuration.
fn beyond_counters(config: &MoeConfig) -> Option<String> {
    let most = ranks(config).max_by_key(|&rank| config.placement.num_local_experts(rank))?;
    let rows = config.ep_size().saturating_mul(config.max_tokens_per_rank);
    let weights = ExpertsWeights {
        gate_up: 0,
        gate_up_map: 0,
        gate_up_scales: 0,
        down: 0,
        down_map: 0,
        down_scales: 0,
    };
    let call = ExpertsCall {
        rows,
        tokens: 0,
        token_scales: 0,
        ids: 0,
        weights: 0,
        map: 0,
        workspace: 0,
        out: 0,
        tile: TokenTile::T128,
    };
    shape(config, most, 1)?.launches(weights, call).err().map(|error| error.to_string())
}

/// The sizes of the part of `rank`; `None` for a scheme that is not supported.
pub(crate) fn shape(config: &MoeConfig, rank: Rank, compute_units: u32) -> Option<ExpertsShape> {
    Some(ExpertsShape {
        // The only device that has run them.
        arch: Arch::Sm90a,
        scheme: scheme(config.quant)?,
        hidden: config.hidden,
        intermediate: config.intermediate,
        top_k: config.top_k,
        experts: config.placement.num_local_experts(rank),
        num_experts: config.num_experts(),
        // Once to bf16, behind the sum, as the contract has it.
        products: Float::F32,
        out: Float::Bf16,
        compute_units,
    })
}

/// Bytes of workspace for batches of `rows` rows: those of the rank with most experts.
pub(crate) fn workspace_bytes(config: &MoeConfig, rows: usize) -> usize {
    let of = |rank| shape(config, rank, 1).map_or(0, |shape| shape.workspace_bytes(rows));
    ranks(config).map(of).max().unwrap_or(0)
}
