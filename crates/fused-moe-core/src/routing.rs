//! What the router computes: methods and their parameters as data.

/// How logits `l` become expert ids and weights. Names follow FlashInfer's `RoutingMethodType` and vLLM;
/// their numbers have changed between versions and do not appear.
///
/// All arithmetic is f32, ties go to the lower expert id, masked groups are −inf. `b` is
/// [`RoutingConfig::correction_bias`], zero where there is none; it chooses and never weighs. Σ is the sum of
/// a token's weights. Every weight is multiplied by [`RoutingConfig::routed_scaling_factor`] at the end.
/// vLLM's `Custom` is an engine that routes by itself ([`crate::MoeConfig::routing`] is `None`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RoutingMethod {
    /// Softmax over all experts, then top-k, weights as they are.
    Default,
    /// Top-k of the logits, then softmax over the k chosen.
    Renormalize,
    /// Softmax over all experts, top-k, weights divided by their sum (Qwen3-MoE, Mixtral).
    RenormalizeNaive,
    /// Softmax; the best `topk_group` of `n_group` groups by their maximum; top-k inside them (DeepSeek-V2).
    /// With a bias, softmax + b chooses and a group counts as the sum of its best two. Weights are divided by
    /// Σ + 1e-20 if [`RoutingConfig::renormalize`] says so.
    GroupLimitedSoftmax,
    /// σ(l); the best `topk_group` of `n_group` groups by their maximum; top-k inside them; weights divided
    /// by Σ + 1e-20 if [`RoutingConfig::renormalize`] says so. With a bias it would be
    /// [`RoutingMethod::DeepSeekV3`].
    GroupLimitedSigmoid,
    /// σ(l) + b chooses, groups by the sum of their best two; weights σ(l) divided by Σ + 1e-20 if
    /// [`RoutingConfig::renormalize`] says so (DeepSeek-V3).
    DeepSeekV3,
    /// Top-1, weight σ(l). The model multiplies the weight into the expert's input, so it goes with
    /// [`crate::MoeConfig::apply_router_weight_on_input`]; the router only computes it.
    Llama4,
    /// Top-k of the logits, which are the weights (0 for −inf, which no expert could be weighed by).
    TopK,
    /// σ(l), then top-k, weights as they are.
    Sigmoid,
    /// Top-k of the logits, then σ of the k chosen. As σ is increasing this is [`RoutingMethod::Sigmoid`]
    /// without rounding, and a router that orders by logits gives the same bits for both.
    TopKSigmoid,
    /// σ(l), top-k, weights divided by Σ + 1e-20.
    SigmoidRenorm,
    /// Top-k of σ(l) + b, weights σ(l) divided by Σ + 1e-20 (MiniMax-M2).
    MiniMax2,
    /// Top-k of softmax(l) + b, weights softmax(l), divided by their sum if [`RoutingConfig::renormalize`]
    /// says so (ERNIE 4.5). vLLM's biased sigmoid is [`RoutingMethod::DeepSeekV3`] without groups.
    BiasedSoftmax,
    /// Top-k of √softplus(l) + b with softplus(l) = ln(1 + eˡ), weights √softplus(l), divided by their sum if
    /// [`RoutingConfig::renormalize`] says so (DeepSeek-V4).
    SqrtSoftplus,
}

impl RoutingMethod {
    /// Every method.
    pub const ALL: [Self; 14] = [
        Self::Default,
        Self::Renormalize,
        Self::RenormalizeNaive,
        Self::GroupLimitedSoftmax,
        Self::GroupLimitedSigmoid,
        Self::DeepSeekV3,
        Self::Llama4,
        Self::TopK,
        Self::Sigmoid,
        Self::TopKSigmoid,
        Self::SigmoidRenorm,
        Self::MiniMax2,
        Self::BiasedSoftmax,
        Self::SqrtSoftplus,
    ];

    /// Name as it is printed and parsed.
    pub const fn name(self) -> &'static str {
        match self {
            RoutingMethod::Default => "softmax",
            RoutingMethod::Renormalize => "renormalize",
            RoutingMethod::RenormalizeNaive => "renormalize-naive",
            RoutingMethod::GroupLimitedSoftmax => "group-limited-softmax",
            RoutingMethod::GroupLimitedSigmoid => "group-limited-sigmoid",
            RoutingMethod::DeepSeekV3 => "deepseek-v3",
            RoutingMethod::Llama4 => "llama4",
            RoutingMethod::TopK => "topk",
            RoutingMethod::Sigmoid => "sigmoid",
            RoutingMethod::TopKSigmoid => "topk-sigmoid",
            RoutingMethod::SigmoidRenorm => "sigmoid-renorm",
            RoutingMethod::MiniMax2 => "minimax2",
            RoutingMethod::BiasedSoftmax => "biased-softmax",
            RoutingMethod::SqrtSoftplus => "sqrt-softplus",
        }
    }
}

/// A name that no [`RoutingMethod`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("routing method {name:?} is none of {}", RoutingMethod::ALL.map(RoutingMethod::name).join(", "))]
pub struct UnknownRoutingMethod {
    /// The name.
    pub name: String,
}

impl std::str::FromStr for RoutingMethod {
    type Err = UnknownRoutingMethod;

    /// The method of a [`RoutingMethod::name`], spelt exactly so.
    fn from_str(name: &str) -> Result<Self, UnknownRoutingMethod> {
        let method = Self::ALL.into_iter().find(|method| method.name() == name);
        method.ok_or_else(|| UnknownRoutingMethod { name: name.to_owned() })
    }
}

impl std::fmt::Display for RoutingMethod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Expert groups of a group-limited method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertGroups {
    /// Number of groups; divides the number of experts.
    pub n_group: usize,
    /// Groups that may be chosen from.
    pub topk_group: usize,
}

/// A routing method with its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingConfig {
    /// The method.
    pub method: RoutingMethod,
    /// Experts over all ranks.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Groups, for the group-limited methods and DeepSeek-V3.
    pub groups: Option<ExpertGroups>,
    /// Whether the chosen weights are divided by their sum where the method leaves it open (DeepSeek's
    /// `norm_topk_prob`).
    pub renormalize: bool,
    /// Factor on the weights at the end (`routed_scaling_factor`); 1 where the model has none.
    pub routed_scaling_factor: f32,
    /// `e_score_correction_bias`, `[num_experts]`, for the methods whose formula has a `b`.
    pub correction_bias: Option<Vec<f32>>,
}

impl RoutingConfig {
    /// Everything that changes the chosen experts or their weights, on one line.
    pub(crate) fn fingerprint(&self) -> String {
        let Self { method, num_experts, top_k, groups, renormalize, routed_scaling_factor, correction_bias } =
            self;
        let groups = groups.map_or(String::new(), |g| format!(", {} of {} groups", g.topk_group, g.n_group));
        // FNV-1a of the bits: ranks only need to see that their biases differ.
        let hash = |bias: &Vec<f32>| {
            let bytes = bias.iter().flat_map(|x| x.to_bits().to_le_bytes());
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
        };
        let bias =
            correction_bias.as_ref().map_or(String::new(), |bias| format!(", bias {:016x}", hash(bias)));
        format!(
            "{method} top-{top_k} of {num_experts}{groups}, renormalize {renormalize}, x {routed_scaling_factor}{bias}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_parsed_from_its_name() {
        for method in RoutingMethod::ALL {
            assert_eq!(method.name().parse(), Ok(method));
        }
        let error = "Softmax".parse::<RoutingMethod>().unwrap_err().to_string();
        assert!(error.starts_with("routing method \"Softmax\" is none of softmax, renormalize,"), "{error}");
    }
}
