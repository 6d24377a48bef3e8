//! What a layer is: sizes, schemes and placement, the same on every rank.

use crate::dtype::{DType, DeviceKind};
use crate::negotiate::{Axis, Unsupported};
use crate::placement::ExpertPlacement;
use crate::quantization::{CombineWire, QuantScheme};
use crate::routing::RoutingConfig;

/// What happens between gemm1 and gemm2.
///
/// `σ` is the logistic function, `Φ` the distribution function of the normal distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `gate · σ(gate) · up`.
    Silu,
    /// `gate · Φ(gate) · up`.
    Gelu,
    /// `gate · ½ · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) · up`.
    GeluTanh,
    /// `g · σ(alpha · g) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)` (gpt-oss).
    SwigluOai {
        /// Factor inside the logistic function.
        alpha: f32,
        /// Where gate is cut above and up on both sides.
        limit: f32,
    },
    /// `g · σ(g) · u` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`.
    SiluClamped {
        /// Where gate is cut above and up on both sides.
        limit: f32,
    },
}

impl Activation {
    /// gpt-oss as published: alpha 1.702, limit 7.
    pub const SWIGLU_OAI: Self = Activation::SwigluOai { alpha: 1.702, limit: 7.0 };

    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu-tanh",
            Activation::SwigluOai { .. } => "swiglu-oai",
            Activation::SiluClamped { .. } => "silu-clamped",
        }
    }
}

impl std::fmt::Display for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())?;
        match self {
            Activation::SwigluOai { alpha, limit } => write!(f, "(alpha {alpha}, limit {limit})"),
            Activation::SiluClamped { limit } => write!(f, "(limit {limit})"),
            _ => Ok(()),
        }
    }
}

/// Trailing columns that an engine adds to fill up tiles. They hold zeros in the hidden states, anything in the
/// weights, and zeros in the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Padding {
    /// Of [`MoeConfig::hidden`], how many at the end are padding.
    pub hidden: usize,
    /// Of [`MoeConfig::intermediate`], how many at the end are padding.
    pub intermediate: usize,
}

/// Everything that capabilities are checked against and buffers are sized from. Equal on all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Elements of a token.
    pub hidden: usize,
    /// Elements between gemm1 and gemm2 (rows of `gate` and of `up`).
    pub intermediate: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Largest number of tokens one rank brings to one call.
    pub max_tokens_per_rank: usize,
    /// Largest number of rows that a rank receives in one call, over which the call is an error on all ranks; `None`
    /// leaves room for every token of every rank.
    pub max_received_rows: Option<usize>,
    /// Element type of the hidden states that the engine lends, and of expert outputs on their way back.
    pub in_dtype: DType,
    /// Scheme of the experts' weights and activations.
    pub quant: QuantScheme,
    /// What the combine carries; lossy unless it is the default.
    pub combine_wire: CombineWire,
    /// Activation between the two GEMMs.
    pub activation: Activation,
    /// Llama-4 style: the routing weight multiplies the input of the expert, not its output. Needs `top_k` 1.
    pub apply_router_weight_on_input: bool,
    /// Whether every matrix of the experts has a bias, [`crate::WeightMatrix::bias`].
    pub expert_bias: bool,
    /// How much of `hidden` and `intermediate` is padding.
    pub padding: Padding,
    /// Of the experts in `placement`, how many are replicas of others (EPLB). Ids in a call are those of
    /// `placement`, physical ids; the router knows the logical experts alone.
    pub redundant_experts: usize,
    /// How logits become top-k; `None` when the engine routes by itself, which rules out monolithic experts.
    pub routing: Option<RoutingConfig>,
    /// Which rank holds which expert; its size is the expert-parallel size.
    pub placement: ExpertPlacement,
    /// Ranks that share a node (and with it memory), in rank order. At least 1.
    pub ranks_per_node: usize,
    /// Where tensors live.
    pub device: DeviceKind,
}

impl MoeConfig {
    /// The layer of `placement` with everything else at its plainest: bf16 on the host, one node, unquantized, SiLU,
    /// the engine routes. The sizes are 0, which no backend runs, so that none is forgotten:
    ///
    /// ```
    /// use fused_moe_core::*;
    ///
    /// let config = MoeConfig {
    ///     hidden: 1024,
    ///     intermediate: 512,
    ///     top_k: 4,
    ///     ..MoeConfig::new(ExpertPlacement::linear(32, 8)?)
    /// };
    /// let missing = config.contradictions();
    /// assert_eq!(missing[0].to_string(), "shape: needs max_tokens_per_rank of at least 1, found 0");
    /// # Ok::<(), PlacementError>(())
    /// ```
    pub fn new(placement: ExpertPlacement) -> Self {
        Self {
            hidden: 0,
            intermediate: 0,
            top_k: 0,
            max_tokens_per_rank: 0,
            max_received_rows: None,
            in_dtype: DType::Bf16,
            quant: QuantScheme::Unquantized,
            combine_wire: CombineWire::InDtype,
            activation: Activation::Silu,
            apply_router_weight_on_input: false,
            expert_bias: false,
            padding: Padding::default(),
            redundant_experts: 0,
            routing: None,
            ranks_per_node: placement.ep_size(),
            placement,
            device: DeviceKind::Host,
        }
    }

    /// Ranks in the expert-parallel group.
    pub fn ep_size(&self) -> usize {
        self.placement.ep_size()
    }

    /// Experts over all ranks.
    pub fn num_experts(&self) -> usize {
        self.placement.num_experts()
    }

    /// Experts that the router chooses from: [`MoeConfig::num_experts`] without the redundant ones.
    pub fn num_logical_experts(&self) -> usize {
        self.num_experts().saturating_sub(self.redundant_experts)
    }

    /// Whether all ranks share one node.
    pub fn is_single_node(&self) -> bool {
        self.ep_size() <= self.ranks_per_node
    }

    /// What no backend can run, whatever it offers. Empty if the configuration makes sense.
    pub fn contradictions(&self) -> Vec<Unsupported> {
        let mut why = Vec::new();
        let mut no = |axis, wanted: String, offered: String| why.push(Unsupported { axis, wanted, offered });
        for (name, value) in [
            ("hidden", self.hidden),
            ("intermediate", self.intermediate),
            ("top_k", self.top_k),
            ("max_tokens_per_rank", self.max_tokens_per_rank),
            ("ranks_per_node", self.ranks_per_node),
            ("max_received_rows", self.max_received_rows.unwrap_or(1)),
        ] {
            if value == 0 {
                no(Axis::Shape, format!("{name} of at least 1"), "0".into());
            }
        }
        if self.redundant_experts > 0 && self.redundant_experts >= self.num_experts() {
            let most = self.num_experts().saturating_sub(1);
            no(
                Axis::Shape,
                format!("redundant_experts of at most {most} in {} experts", self.num_experts()),
                self.redundant_experts.to_string(),
            );
        } else if self.top_k > self.num_logical_experts() {
            no(
                Axis::Shape,
                format!("top_k of at most {} (the number of experts)", self.num_logical_experts()),
                self.top_k.to_string(),
            );
        }
        for (name, size, padding) in [
            ("hidden", self.hidden, self.padding.hidden),
            ("intermediate", self.intermediate, self.padding.intermediate),
        ] {
            if padding > 0 && padding >= size {
                no(Axis::Shape, format!("{name} of more than its padding, {padding}"), size.to_string());
            }
        }
        if let Activation::SwigluOai { limit, .. } | Activation::SiluClamped { limit } = self.activation
            && (limit.is_nan() || limit <= 0.0)
        {
            no(Axis::Activation, "a limit above 0".into(), self.activation.to_string());
        }
        if self.apply_router_weight_on_input && self.top_k != 1 {
            no(
                Axis::RouterWeight,
                "top_k 1 (apply_router_weight_on_input)".into(),
                format!("top_k {}", self.top_k),
            );
        }
        if let Some(routing) = &self.routing
            && (routing.top_k, routing.num_experts) != (self.top_k, self.num_logical_experts())
        {
            no(
                Axis::Routing,
                format!("routing for top-{} of {} experts", self.top_k, self.num_logical_experts()),
                format!("top-{} of {}", routing.top_k, routing.num_experts),
            );
        }
        why
    }

    /// The configuration as named values, for the ranks to compare before anything is allocated.
    pub fn fingerprint(&self) -> Vec<(&'static str, String)> {
        let owners: Vec<String> = self.placement.owners().iter().map(|r| r.0.to_string()).collect();
        vec![
            ("version", env!("CARGO_PKG_VERSION").to_string()),
            ("hidden", self.hidden.to_string()),
            ("intermediate", self.intermediate.to_string()),
            ("top_k", self.top_k.to_string()),
            ("max_tokens_per_rank", self.max_tokens_per_rank.to_string()),
            ("max_received_rows", self.max_received_rows.map_or("all".into(), |rows| rows.to_string())),
            ("in_dtype", self.in_dtype.to_string()),
            ("quant", self.quant.to_string()),
            ("combine_wire", self.combine_wire.to_string()),
            ("activation", self.activation.to_string()),
            ("apply_router_weight_on_input", self.apply_router_weight_on_input.to_string()),
            ("expert_bias", self.expert_bias.to_string()),
            (
                "padding",
                format!("{} of hidden, {} of intermediate", self.padding.hidden, self.padding.intermediate),
            ),
            ("redundant_experts", self.redundant_experts.to_string()),
            ("routing", self.routing.as_ref().map_or("external".into(), RoutingConfig::fingerprint)),
            ("ep_size", self.ep_size().to_string()),
            ("placement", owners.join(",")),
            ("ranks_per_node", self.ranks_per_node.to_string()),
            ("device", format!("{:?}", self.device)),
        ]
    }
}
