//! What packing takes, what it refuses, and how large the packed weights are.

use fused_moe_core::{
    DType, ErrorKind, ExpertMatrices, ExpertWeights, Fp8Format, MoeConfig, QuantScheme, Rank, Result,
    Support, TensorView, WeightScale,
};

use super::Target;
use crate::case::Case;
use crate::outcome::{Check, chain, fail};

/// Most bytes of packed weights, in units of the stored ones: room for padding, not for another element type.
const MOST_BYTES: f64 = 1.1;

/// The experts of `rank` in local order.
pub(crate) fn local_experts<'a>(
    case: &Case,
    all: &[ExpertMatrices<'a>],
    rank: Rank,
) -> Vec<ExpertMatrices<'a>> {
    case.placement.experts_of(rank).map(|id| all[id.0 as usize]).collect()
}

/// Packed weights are as large as stored ones: an FP8 weight is a byte.
pub(crate) fn weight_bytes(target: &Target<'_>, case: &Case) -> Check {
    // Multiples of every tile, so that padding is no excuse.
    let case = Case { hidden: 256, intermediate: 128, ..case.clone() };
    target.accepts(&case)?;
    let weights = case.weights();
    let local = local_experts(&case, &weights.matrices(), Rank(0));
    let packed = target.provider.pack(&case.config(), Rank(0), &local);
    let bytes = packed.or_else(|e| fail(format!("packing fails: {}", chain(&e))))?.bytes();
    let stored = weights.bytes_per_expert() * local.len();
    let per_byte = if matches!(case.quant, QuantScheme::Mxfp4 | QuantScheme::Nvfp4) { 2 } else { 1 };
    let codes = local.len() * 3 * case.hidden * case.intermediate / per_byte;
    let ratio = bytes as f64 / stored as f64;
    if bytes < codes || ratio > MOST_BYTES {
        return fail(format!(
            "{bytes} bytes of packed {} weights, {ratio:.2} times the {stored} of the stored ones",
            case.quant
        ));
    }
    Ok(())
}

/// Too few and too many experts, wrong shapes, wrong element types and wrong scales are broken contracts.
pub(crate) fn packing(target: &Target<'_>, case: &Case) -> Check {
    target.accepts(case)?;
    let config = case.config();
    let bias = vec![half::bf16::ZERO; case.hidden];
    let weights = case.weights();
    let all = weights.matrices();
    let local = local_experts(case, &all, Rank(0));
    let pack = |experts: &[ExpertMatrices<'_>]| target.provider.pack(&config, Rank(0), experts);
    let packed = pack(&local).or_else(|e| fail(format!("packing fails: {}", chain(&e))))?;
    if packed.backend() != target.provider.name() {
        return fail(format!("weights are marked as those of {}", packed.backend()));
    }
    let refused = |what: &str, packed: Result<ExpertWeights>| match packed {
        Err(error) if error.kind == ErrorKind::Contract => Ok(()),
        Err(error) => fail(format!("{what}: {error}, wanted a broken contract")),
        Ok(_) => fail(format!("{what} are packed without an error")),
    };
    refused("too few experts", pack(&local[1..]))?;
    refused("too many experts", pack(&[local.as_slice(), &local[..1]].concat()))?;
    let with = |change: &dyn Fn(&mut ExpertMatrices<'_>)| {
        let mut experts = local.clone();
        change(experts.last_mut().expect("the first rank of a small case holds experts"));
        pack(&experts)
    };
    refused("transposed matrices", with(&|e| std::mem::swap(&mut e.up, &mut e.down)))?;
    // The same sizes stored by another scheme.
    let other = match case.quant {
        QuantScheme::Unquantized => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
        QuantScheme::Fp8PerTensor(format) => QuantScheme::Fp8Ptpc(format),
        QuantScheme::Fp8Ptpc(format) => QuantScheme::Fp8Block(format),
        _ => QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
    };
    let others = Case { quant: other, ..case.clone() }.weights();
    refused("matrices of another scheme", pack(&local_experts(case, &others.matrices(), Rank(0))))?;
    let bias = TensorView::from_slice(&bias, DType::Bf16, &[case.hidden]).or_else(fail)?;
    let with_bias = local.iter().map(|expert| {
        let mut expert = *expert;
        expert.down.bias = Some(bias);
        expert
    });
    refused("biases that the configuration does not have", pack(&with_bias.collect::<Vec<_>>()))?;
    let biased = MoeConfig { expert_bias: true, ..config.clone() };
    if let Support::Supported(_) = target.provider.supports(&biased) {
        let unbiased = target.provider.pack(&biased, Rank(0), &local);
        refused("experts without the biases of the configuration", unbiased)?;
    }
    if local.iter().any(|expert| expert.gate.input_scale.is_some()) {
        let bare = |scale: Option<f32>| {
            let bare = local.iter().map(|expert| {
                let mut expert = *expert;
                for matrix in [&mut expert.gate, &mut expert.up, &mut expert.down] {
                    matrix.input_scale = scale;
                }
                expert
            });
            pack(&bare.collect::<Vec<_>>())
        };
        refused("experts without input scales", bare(None))?;
        refused("an input scale of zero", bare(Some(0.0)))?;
        if packed.input_scale().is_none() {
            return fail("the packed weights do not say their input scale");
        }
    }
    if case.quant.fp8().is_some() {
        let unscaled = local.iter().map(|expert| {
            let mut expert = *expert;
            expert.down.scale = None;
            expert
        });
        refused("codes without scales", pack(&unscaled.collect::<Vec<_>>()))?;
    } else {
        let scaled = local.iter().map(|expert| {
            let mut expert = *expert;
            expert.down.scale = Some(WeightScale::Tensor(2.0));
            expert
        });
        refused("scales without codes", pack(&scaled.collect::<Vec<_>>()))?;
    }
    Ok(())
}
