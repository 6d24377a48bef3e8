//! What the router computes: methods and their parameters as data.

/// How logits become expert ids and weights. Names follow FlashInfer and vLLM; their numbers do not appear.
///
/// All arithmetic is f32, ties go to the lower expert id, masked groups are −inf.
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
    GroupLimitedSoftmax,
    /// Sigmoid plus a bias to choose, groups by the sum of their best two, unbiased weights divided by their
    /// sum + 1e-20 (DeepSeek-V3).
    DeepSeekV3,
}

impl RoutingMethod {
    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            RoutingMethod::Default => "softmax",
            RoutingMethod::Renormalize => "renormalize",
            RoutingMethod::RenormalizeNaive => "renormalize-naive",
            RoutingMethod::GroupLimitedSoftmax => "group-limited-softmax",
            RoutingMethod::DeepSeekV3 => "deepseek-v3",
        }
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
    /// Groups, for the group-limited methods.
    pub groups: Option<ExpertGroups>,
    /// Whether the chosen weights are divided by their sum where the method leaves it open (DeepSeek's
    /// `norm_topk_prob`).
    pub renormalize: bool,
    /// Factor on the weights at the end (`routed_scaling_factor`); 1 where the model has none.
    pub routed_scaling_factor: f32,
    /// `e_score_correction_bias`, `[num_experts]`, for DeepSeek-V3.
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
