//! What a layer is: sizes, schemes and placement, the same on every rank.

use crate::dtype::{DType, DeviceKind};
use crate::negotiate::{Axis, Unsupported};
use crate::placement::ExpertPlacement;
use crate::quantization::QuantScheme;
use crate::routing::RoutingConfig;

/// What happens between gemm1 and gemm2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
}

impl Activation {
    /// Name as it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
        }
    }
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
    /// Element type of the hidden states that the engine lends, and of expert outputs on their way back.
    pub in_dtype: DType,
    /// Scheme of the experts' weights and activations.
    pub quant: QuantScheme,
    /// Activation between the two GEMMs.
    pub activation: Activation,
    /// Llama-4 style: the routing weight multiplies the input of the expert, not its output. Needs `top_k` 1.
    pub apply_router_weight_on_input: bool,
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
    /// Ranks in the expert-parallel group.
    pub fn ep_size(&self) -> usize {
        self.placement.ep_size()
    }

    /// Experts over all ranks.
    pub fn num_experts(&self) -> usize {
        self.placement.num_experts()
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
        ] {
            if value == 0 {
                no(Axis::Shape, format!("{name} of at least 1"), "0".into());
            }
        }
        if self.top_k > self.num_experts() {
            no(
                Axis::Shape,
                format!("top_k of at most {} (the number of experts)", self.num_experts()),
                self.top_k.to_string(),
            );
        }
        if self.apply_router_weight_on_input && self.top_k != 1 {
            no(
                Axis::RouterWeight,
                "top_k 1 (apply_router_weight_on_input)".into(),
                format!("top_k {}", self.top_k),
            );
        }
        if let Some(routing) = &self.routing
            && (routing.top_k, routing.num_experts) != (self.top_k, self.num_experts())
        {
            no(
                Axis::Routing,
                format!("routing for top-{} of {} experts", self.top_k, self.num_experts()),
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
            ("in_dtype", self.in_dtype.to_string()),
            ("quant", self.quant.to_string()),
            ("activation", self.activation.name().to_string()),
            ("apply_router_weight_on_input", self.apply_router_weight_on_input.to_string()),
            ("routing", self.routing.as_ref().map_or("external".into(), RoutingConfig::fingerprint)),
            ("ep_size", self.ep_size().to_string()),
            ("placement", owners.join(",")),
            ("ranks_per_node", self.ranks_per_node.to_string()),
            ("device", format!("{:?}", self.device)),
        ]
    }
}
