//! What FlashInfer's kernels cannot do, as data: everything here is from its launcher and routing kernels (commit
//! `fb28d7242b`), or from vLLM, which calls them.

use fused_moe_core::{
    Activation, Axis, ExpertGroups, Fp8Format, MoeConfig, QuantScheme, RoutingConfig, RoutingMethod,
    Unsupported,
};

/// A routing method that the kernels have, and the sizes that they are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RoutingLimits {
    /// The method.
    pub method: RoutingMethod,
    /// `(num_experts, top_k)`: up to so many experts, at most so many of them per token. The first that has room for
    /// the experts counts.
    pub steps: &'static [(usize, usize)],
    /// Whether weights are multiplied by `routed_scaling_factor`; elsewhere it must be 1.
    pub scales: bool,
}

impl RoutingLimits {
    const fn new(method: RoutingMethod, steps: &'static [(usize, usize)], scales: bool) -> Self {
        Self { method, steps, scales }
    }
}

/// The routing methods that are built into the kernels. vLLM falls back to the routed form for others.
pub const ROUTING: [RoutingLimits; 10] = [
    RoutingLimits::new(RoutingMethod::Default, &[(256, 8)], false),
    RoutingLimits::new(RoutingMethod::Renormalize, &[(2048, 32)], false),
    RoutingLimits::new(RoutingMethod::RenormalizeNaive, &[(2048, 32)], false),
    RoutingLimits::new(RoutingMethod::DeepSeekV3, &[(384, 8), (512, 22)], true),
    RoutingLimits::new(RoutingMethod::Llama4, &[(128, 1)], false),
    RoutingLimits::new(RoutingMethod::TopK, &[(256, 8)], false),
    RoutingLimits::new(RoutingMethod::Sigmoid, &[(256, 8)], false),
    RoutingLimits::new(RoutingMethod::TopKSigmoid, &[(256, 8)], false),
    RoutingLimits::new(RoutingMethod::SigmoidRenorm, &[(256, 8)], false),
    RoutingLimits::new(RoutingMethod::MiniMax2, &[(1024, 32)], true),
];

/// What the routed form is compiled for: it sorts ids that somebody else chose.
const ROUTED: (usize, usize) = (2048, 32);

/// Groups of DeepSeek-V3 routing.
const MAX_GROUPS: usize = 8;
/// Groups that may be chosen from.
const MAX_TOPK_GROUP: usize = 4;
/// Experts of a group: one warp ranks them.
const MAX_GROUP_SIZE: usize = 32;
/// The routing kernels read logits four at a time.
const EXPERTS_MULTIPLE: usize = 4;

/// A quantisation scheme that the kernels have, and the sizes that its layouts fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchemeLimits {
    /// `hidden` is a multiple of this.
    pub hidden: usize,
    /// `intermediate` is a multiple of this.
    pub intermediate: usize,
    /// Whether gemm1 takes clamps and factors of the activation, and both GEMMs biases.
    pub swiglu_and_bias: bool,
    /// Whether the routing weight can be multiplied in behind gemm1 (`use_routing_scales_on_input`).
    pub weight_on_input: bool,
}

/// Unquantized weights: `BlockMajorK` of 128 bytes, and FlashInfer's own check of the intermediate size.
const BF16: SchemeLimits =
    SchemeLimits { hidden: 64, intermediate: 128, swiglu_and_bias: false, weight_on_input: false };
/// Whole 128x128 blocks.
const FP8_BLOCK: SchemeLimits =
    SchemeLimits { hidden: 128, intermediate: 128, swiglu_and_bias: false, weight_on_input: false };
/// Whole blocks of the row shuffle: 32 rows of down, and of up and gate together.
const FP8_STATIC: SchemeLimits =
    SchemeLimits { hidden: 32, intermediate: 16, swiglu_and_bias: false, weight_on_input: true };
/// vLLM fills up `hidden` to 256; the scales of up and gate are swizzled in tiles of 128 rows.
const NVFP4: SchemeLimits =
    SchemeLimits { hidden: 256, intermediate: 64, swiglu_and_bias: true, weight_on_input: false };

impl SchemeLimits {
    /// The limits of `quant`.
    ///
    /// # Errors
    /// What the kernels need instead of a scheme that they do not have.
    pub fn of(quant: QuantScheme) -> Result<Self, &'static str> {
        match quant {
            QuantScheme::Unquantized => Ok(BF16),
            QuantScheme::Fp8Block(Fp8Format::E4M3Fn) => Ok(FP8_BLOCK),
            QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn) => Ok(FP8_STATIC),
            QuantScheme::Nvfp4 => Ok(NVFP4),
            QuantScheme::Fp8PerTensor(_) => {
                Err("a static scale of the activations, which is folded into those of the weights")
            }
            QuantScheme::Fp8Ptpc(_) => Err("a scale per tensor or per 128x128 block, not per output channel"),
            QuantScheme::Mxfp4 => Err("E4M3 scales of FP4 weights (nvfp4)"),
            _ => Err("none, fp8-block, fp8-per-tensor-static (e4m3fn) or nvfp4"),
        }
    }
}

/// Everything against `config` that holds for both forms.
pub(crate) fn common(config: &MoeConfig) -> Vec<Unsupported> {
    let mut why = Vec::new();
    let mut no = |axis, wanted: String, found: String| why.push(Unsupported::new(axis, wanted, found));
    match SchemeLimits::of(config.quant) {
        Err(wanted) => no(Axis::Quant, wanted.into(), config.quant.to_string()),
        Ok(limits) => {
            for (name, size, multiple) in [
                ("hidden", config.hidden, limits.hidden),
                ("intermediate", config.intermediate, limits.intermediate),
            ] {
                if !size.is_multiple_of(multiple) {
                    no(Axis::Shape, format!("{name} of a multiple of {multiple}"), size.to_string());
                }
            }
            let activation = match config.activation {
                Activation::Silu => true,
                Activation::SwigluOai { .. } | Activation::SiluClamped { .. } => limits.swiglu_and_bias,
                _ => false,
            };
            if !activation {
                let wanted = "silu (with nvfp4 also swiglu-oai and silu-clamped)";
                no(Axis::Activation, wanted.into(), config.activation.to_string());
            }
            if config.expert_bias && !limits.swiglu_and_bias {
                no(Axis::Weights, "experts without biases (or nvfp4)".into(), "biases".into());
            }
        }
    }
    let experts = config.num_experts();
    if !experts.is_multiple_of(EXPERTS_MULTIPLE) {
        let wanted = format!("a multiple of {EXPERTS_MULTIPLE} experts");
        no(Axis::Shape, wanted, experts.to_string());
    }
    if experts <= config.top_k {
        no(Axis::Shape, format!("more than top_k {} experts", config.top_k), experts.to_string());
    }
    if config.redundant_experts > 0 {
        no(Axis::Parallel, "no redundant experts (EPLB)".into(), config.redundant_experts.to_string());
    }
    if !is_linear(config) {
        let wanted = "equally many experts on every rank, in the order of their ids";
        no(Axis::Parallel, wanted.into(), "another placement".into());
    }
    let rows = config.max_tokens_per_rank.saturating_mul(config.ep_size());
    let slots = rows.saturating_mul(config.top_k);
    if i32::try_from(slots).is_err() {
        let wanted = format!("at most {} slots over all ranks", i32::MAX);
        no(Axis::Shape, wanted, slots.to_string());
    }
    why
}

/// What the routed form adds.
pub(crate) fn routed(config: &MoeConfig) -> Vec<Unsupported> {
    let mut why = common(config);
    why.extend(step("the routed form", config, &[ROUTED]));
    why
}

/// What the monolithic form adds: its routing.
pub(crate) fn monolithic(config: &MoeConfig) -> Vec<Unsupported> {
    let mut why = common(config);
    let Some(routing) = &config.routing else {
        why.push(Unsupported::new(Axis::Routing, "a routing method", "routing outside of the experts"));
        return why;
    };
    let Some(limits) = ROUTING.iter().find(|limits| limits.method == routing.method) else {
        let known: Vec<_> = ROUTING.iter().map(|limits| limits.method.name()).collect();
        why.push(Unsupported::new(Axis::Routing, known.join(", "), routing.method.name()));
        return why;
    };
    why.extend(step(routing.method.name(), config, limits.steps));
    if routing.routed_scaling_factor != 1.0 && !limits.scales {
        let wanted = format!("a routed_scaling_factor of 1 for {}", routing.method);
        why.push(Unsupported::new(Axis::Routing, wanted, routing.routed_scaling_factor.to_string()));
    }
    if routing.method == RoutingMethod::DeepSeekV3 {
        why.extend(deepseek(routing));
    } else if let Some(groups) = routing.groups
        && (groups.n_group > 1 || groups.topk_group > 1)
    {
        let found = format!("{} of {}", groups.topk_group, groups.n_group);
        why.push(Unsupported::new(Axis::Routing, format!("no expert groups for {}", routing.method), found));
    }
    // Whatever the kernels say, the method must make sense.
    if let Err(error) = router::HostRouter::new(routing.clone()) {
        why.push(Unsupported::new(Axis::Routing, "routing that fits together", error.to_string()));
    }
    why
}

/// The groups of DeepSeek-V3.
fn deepseek(routing: &RoutingConfig) -> Vec<Unsupported> {
    let mut why = Vec::new();
    let mut no = |wanted: String, found: String| why.push(Unsupported::new(Axis::Routing, wanted, found));
    let ExpertGroups { n_group, topk_group } =
        routing.groups.unwrap_or(ExpertGroups { n_group: 1, topk_group: 1 });
    if n_group > MAX_GROUPS {
        no(format!("n_group of at most {MAX_GROUPS}"), n_group.to_string());
    }
    if topk_group > MAX_TOPK_GROUP {
        no(format!("topk_group of at most {MAX_TOPK_GROUP}"), topk_group.to_string());
    }
    let size = routing.num_experts / n_group.max(1);
    if n_group > 1 && size > MAX_GROUP_SIZE {
        no(format!("groups of at most {MAX_GROUP_SIZE} experts"), size.to_string());
    }
    if routing.top_k >= topk_group.saturating_mul(size) {
        let wanted = format!("top_k below the {} experts of {topk_group} groups", topk_group * size);
        no(wanted, routing.top_k.to_string());
    }
    if !routing.renormalize {
        no("weights divided by their sum".into(), "weights as they are (renormalize false)".into());
    }
    why
}

/// What a kernel that is compiled for `steps` has against the sizes.
fn step(what: &str, config: &MoeConfig, steps: &[(usize, usize)]) -> Option<Unsupported> {
    let (experts, top_k) = (config.num_experts(), config.top_k);
    let Some(&(_, most)) = steps.iter().find(|&&(room, _)| experts <= room) else {
        let room = steps.last().map_or(0, |step| step.0);
        let wanted = format!("at most {room} experts for {what}");
        return Some(Unsupported::new(Axis::Shape, wanted, experts.to_string()));
    };
    let wanted = || format!("top_k of at most {most} for {what} with {experts} experts");
    (top_k > most).then(|| Unsupported::new(Axis::Shape, wanted(), top_k.to_string()))
}

/// Whether every rank holds as many experts as the others and the ranges are in rank order: FlashInfer gets an
/// offset and a count, and vLLM computes the offset as rank times count.
fn is_linear(config: &MoeConfig) -> bool {
    let (experts, ranks) = (config.num_experts(), config.ep_size());
    experts.is_multiple_of(ranks)
        && config
            .placement
            .owners()
            .iter()
            .enumerate()
            .all(|(id, owner)| owner.index() == id * ranks / experts)
}

#[cfg(test)]
mod tests {
    use fused_moe_core::ExpertPlacement;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(8, 4, true)]
    #[case(8, 1, true)]
    #[case(16, 3, false)]
    fn linear_is_equal(#[case] experts: usize, #[case] ranks: usize, #[case] want: bool) {
        let placement = ExpertPlacement::linear(experts, ranks).unwrap();
        assert_eq!(is_linear(&MoeConfig::new(placement)), want);
    }

    #[test]
    fn interleaved_and_swapped_experts_are_not_linear() {
        for owners in [[0, 1, 0, 1], [1, 1, 0, 0]] {
            let placement = ExpertPlacement::from_owners(&owners, 2).unwrap();
            assert!(!is_linear(&MoeConfig::new(placement)), "{owners:?}");
        }
    }

    #[test]
    fn every_method_is_listed_once_with_steps_that_rise() {
        for (at, limits) in ROUTING.iter().enumerate() {
            assert!(ROUTING[..at].iter().all(|other| other.method != limits.method));
            assert!(limits.steps.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1));
        }
    }
}
