//! What `config.json` says about the MoE layers of a model.

use fused_moe_core::{Activation, ExpertGroups, QuantScheme, RoutingConfig, RoutingMethod};

use crate::config::Config;
use crate::error::Result;
use crate::quantization::declared_scheme;

/// Most layers of a model. Layers are enumerated, so a config must not make them billions.
const MAX_LAYERS: usize = 1 << 14;

/// The `model_type` of Qwen3.5-MoE's language model alone.
const QWEN3_5_MOE_TEXT: &str = "qwen3_5_moe_text";

/// A family of models, by `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ModelFamily {
    /// `mixtral`.
    Mixtral,
    /// `qwen2_moe`.
    Qwen2Moe,
    /// `qwen3_moe`.
    Qwen3Moe,
    /// `olmoe`.
    Olmoe,
    /// `deepseek_v2`.
    DeepSeekV2,
    /// `deepseek_v3` (V3, V3.1, R1).
    DeepSeekV3,
    /// `qwen3_5_moe` with the language model's keys in `text_config`, or `qwen3_5_moe_text` with them at the top.
    Qwen3_5Moe,
    /// `gpt_oss`.
    GptOss,
}

impl ModelFamily {
    /// All families that can be read.
    pub const ALL: [ModelFamily; 8] = [
        ModelFamily::Mixtral,
        ModelFamily::Qwen2Moe,
        ModelFamily::Qwen3Moe,
        ModelFamily::Olmoe,
        ModelFamily::DeepSeekV2,
        ModelFamily::DeepSeekV3,
        ModelFamily::Qwen3_5Moe,
        ModelFamily::GptOss,
    ];

    /// The family's `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            ModelFamily::Mixtral => "mixtral",
            ModelFamily::Qwen2Moe => "qwen2_moe",
            ModelFamily::Qwen3Moe => "qwen3_moe",
            ModelFamily::Olmoe => "olmoe",
            ModelFamily::DeepSeekV2 => "deepseek_v2",
            ModelFamily::DeepSeekV3 => "deepseek_v3",
            ModelFamily::Qwen3_5Moe => "qwen3_5_moe",
            ModelFamily::GptOss => "gpt_oss",
        }
    }

    fn of_model_type(model_type: &str) -> Option<Self> {
        if model_type == QWEN3_5_MOE_TEXT {
            return Some(ModelFamily::Qwen3_5Moe);
        }
        Self::ALL.into_iter().find(|family| family.model_type() == model_type)
    }
}

impl std::fmt::Display for ModelFamily {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.model_type())
    }
}

/// The expert that sees every token, beside the routed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedExpertShape {
    /// Rows of its gate and up projections (all shared experts together, where a model has several).
    pub intermediate: usize,
    /// Whether its output is multiplied with sigmoid(x · gateᵀ) (Qwen2-MoE, Qwen3.5-MoE).
    pub sigmoid_gate: bool,
}

/// The MoE side of a model, as its `config.json` describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeModel {
    /// The family.
    pub family: ModelFamily,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Rows of one routed expert's gate projection, and of its up projection.
    pub intermediate: usize,
    /// Experts per layer, experts per token and how they are chosen. The correction bias is a tensor of each
    /// layer and not part of this; [`crate::MoeLayer::routing`] has it.
    pub routing: RoutingConfig,
    /// The shared experts of every MoE layer, if there are any.
    pub shared_expert: Option<SharedExpertShape>,
    /// What happens between an expert's two products.
    pub activation: Activation,
    /// Whether the router and every projection of the experts have a bias.
    pub bias: bool,
    /// What `quantization_config` declares. The tensors of a layer decide: [`crate::MoeLayer::scheme`].
    pub declared_scheme: QuantScheme,
    /// Layers of the model, dense ones included, without multi-token-prediction layers.
    pub num_layers: usize,
    layers: LayerRule,
}

/// Which layers have experts.
#[derive(Clone, Debug, PartialEq)]
struct LayerRule {
    /// Layers before this one are dense.
    first: usize,
    /// `(layer + offset) % step == 0`.
    step: usize,
    offset: usize,
    /// Dense whatever the rest says; ascending.
    dense: Vec<usize>,
}

impl MoeModel {
    /// Experts per layer.
    pub fn num_experts(&self) -> usize {
        self.routing.num_experts
    }

    /// Experts per token.
    pub fn top_k(&self) -> usize {
        self.routing.top_k
    }

    /// Whether `layer` exists and has experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        let rule = &self.layers;
        layer < self.num_layers
            && layer >= rule.first
            && (layer + rule.offset).is_multiple_of(rule.step)
            && rule.dense.binary_search(&layer).is_err()
    }

    /// The layers with experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> {
        (0..self.num_layers).filter(|&layer| self.is_moe_layer(layer))
    }

    /// The MoE layers in words: `3..=60`, `1, 3, 5`, `none`.
    pub fn moe_layers_in_words(&self) -> String {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for layer in self.moe_layers() {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == layer => *last = layer,
                _ => runs.push((layer, layer)),
            }
        }
        let words = runs.iter().map(|(first, last)| match last - first {
            0 => format!("{first}"),
            1 => format!("{first}, {last}"),
            _ => format!("{first}..={last}"),
        });
        if runs.is_empty() { "none".to_owned() } else { words.collect::<Vec<_>>().join(", ") }
    }

    pub(crate) fn from_config(config: &Config<'_>) -> Result<Self> {
        let model_type = config.required_text("model_type")?;
        let Some(family) = ModelFamily::of_model_type(model_type) else {
            let known = ModelFamily::ALL.map(ModelFamily::model_type).join(", ");
            return Err(config.bad("model_type", format!("one of {known}, {QWEN3_5_MOE_TEXT}")));
        };
        let declared_scheme = declared_scheme(config)?;
        // A model of several modalities describes its language model in an object of its own.
        let text = if model_type == "qwen3_5_moe" { config.nested("text_config")? } else { None };
        let config = text.as_ref().unwrap_or(config);
        if !matches!(config.text("hidden_act")?, None | Some("silu" | "swish")) {
            return Err(config.bad("hidden_act", "\"silu\""));
        }
        if config.flag("mlp_bias")? == Some(true) {
            return Err(config.bad("mlp_bias", "false"));
        }
        let intermediate = match family {
            ModelFamily::Mixtral | ModelFamily::Olmoe | ModelFamily::GptOss => {
                config.size(&["intermediate_size"])?
            }
            _ => config.size(&["moe_intermediate_size"])?,
        };
        let num_layers = config.size(&["num_hidden_layers"])?;
        if num_layers > MAX_LAYERS {
            return Err(config.bad("num_hidden_layers", format!("at most {MAX_LAYERS}")));
        }
        Ok(MoeModel {
            family,
            hidden: config.size(&["hidden_size"])?,
            intermediate,
            routing: routing(config, family)?,
            shared_expert: shared_expert(config, family, intermediate)?,
            activation: activation(config, family)?,
            bias: family == ModelFamily::GptOss,
            declared_scheme,
            num_layers,
            layers: layer_rule(config, family)?,
        })
    }
}

/// Missing keys mean what transformers' config class of the family means by them.
fn routing(config: &Config<'_>, family: ModelFamily) -> Result<RoutingConfig> {
    let num_experts = config.size(&["num_experts", "num_local_experts", "n_routed_experts"])?;
    let top_k = match family {
        ModelFamily::GptOss => config.size(&["num_experts_per_tok", "experts_per_token"])?,
        _ => config.size(&["num_experts_per_tok"])?,
    };
    if top_k > num_experts {
        return Err(
            config.bad("num_experts_per_tok", format!("at most {num_experts}, the number of experts"))
        );
    }
    let norm = config.flag("norm_topk_prob")?;
    let plain = |renormalize| RoutingConfig {
        method: if renormalize { RoutingMethod::RenormalizeNaive } else { RoutingMethod::Default },
        num_experts,
        top_k,
        groups: None,
        renormalize,
        routed_scaling_factor: 1.0,
        correction_bias: None,
    };
    match family {
        ModelFamily::Mixtral => Ok(plain(true)),
        // Its configuration class has no `norm_topk_prob`: the router always renormalises.
        ModelFamily::Qwen3_5Moe => Ok(plain(true)),
        ModelFamily::GptOss => Ok(RoutingConfig { method: RoutingMethod::Renormalize, ..plain(true) }),
        ModelFamily::Qwen2Moe | ModelFamily::Qwen3Moe | ModelFamily::Olmoe => {
            Ok(plain(norm.unwrap_or(false)))
        }
        ModelFamily::DeepSeekV2 => {
            expect_text(config, "scoring_func", "softmax")?;
            let factor = config.number("routed_scaling_factor")?.unwrap_or(1.0);
            // transformers scales and never renormalises here, whatever `norm_topk_prob` says.
            let plain = RoutingConfig { routed_scaling_factor: factor, ..plain(false) };
            match config.text("topk_method")? {
                None | Some("greedy") => Ok(plain),
                Some("group_limited_greedy") => Ok(RoutingConfig {
                    method: RoutingMethod::GroupLimitedSoftmax,
                    groups: Some(groups(config, &plain, [None; 2])?),
                    ..plain
                }),
                Some(_) => Err(config.bad("topk_method", "\"greedy\" or \"group_limited_greedy\"")),
            }
        }
        ModelFamily::DeepSeekV3 => {
            expect_text(config, "scoring_func", "sigmoid")?;
            expect_text(config, "topk_method", "noaux_tc")?;
            let plain = RoutingConfig {
                method: RoutingMethod::DeepSeekV3,
                routed_scaling_factor: config.number("routed_scaling_factor")?.unwrap_or(2.5),
                ..plain(norm.unwrap_or(true))
            };
            Ok(RoutingConfig { groups: Some(groups(config, &plain, [Some(8), Some(4)])?), ..plain })
        }
    }
}

fn expect_text(config: &Config<'_>, key: &str, only: &str) -> Result<()> {
    match config.text(key)? {
        Some(text) if text != only => Err(config.bad(key, format!("{only:?}"))),
        _ => Ok(()),
    }
}

/// `n_group` and `topk_group`, which must fit each other, the experts and top-k.
fn groups(config: &Config<'_>, routing: &RoutingConfig, default: [Option<usize>; 2]) -> Result<ExpertGroups> {
    let read = |key: &str, default: Option<usize>| match default {
        Some(default) if !config.has(key) => Ok(default),
        _ => config.size(&[key]),
    };
    let n_group = read("n_group", default[0])?;
    let topk_group = read("topk_group", default[1])?;
    let experts = routing.num_experts;
    if !experts.is_multiple_of(n_group) {
        return Err(config.bad("n_group", format!("a divisor of {experts}, the number of experts")));
    }
    if topk_group > n_group {
        return Err(config.bad("topk_group", format!("at most n_group = {n_group}")));
    }
    let available = topk_group * (experts / n_group);
    if routing.top_k > available {
        return Err(config.bad(
            "num_experts_per_tok",
            format!("at most {available}, the experts of topk_group = {topk_group} groups"),
        ));
    }
    Ok(ExpertGroups { n_group, topk_group })
}

fn shared_expert(
    config: &Config<'_>,
    family: ModelFamily,
    intermediate: usize,
) -> Result<Option<SharedExpertShape>> {
    match family {
        ModelFamily::Qwen2Moe | ModelFamily::Qwen3_5Moe => {
            let intermediate = config.size(&["shared_expert_intermediate_size"])?;
            Ok(Some(SharedExpertShape { intermediate, sigmoid_gate: true }))
        }
        ModelFamily::DeepSeekV2 | ModelFamily::DeepSeekV3 => {
            // A null means none, as in DeepSeek's own code; a missing key is the default of the config class.
            let default = match family {
                _ if config.is_null("n_shared_experts") => 0,
                ModelFamily::DeepSeekV2 => 2,
                _ => 1,
            };
            let count = config.count(&["n_shared_experts"])?.unwrap_or(default);
            let Some(intermediate) = count.checked_mul(intermediate).filter(|&n| n <= i32::MAX as usize)
            else {
                return Err(config.bad("n_shared_experts", "a small whole number"));
            };
            Ok((count > 0).then_some(SharedExpertShape { intermediate, sigmoid_gate: false }))
        }
        ModelFamily::Mixtral | ModelFamily::Qwen3Moe | ModelFamily::Olmoe | ModelFamily::GptOss => Ok(None),
    }
}

fn activation(config: &Config<'_>, family: ModelFamily) -> Result<Activation> {
    if family != ModelFamily::GptOss {
        return Ok(Activation::Silu);
    }
    let read = |key: &str, default: f32| match config.number(key)? {
        Some(number) if number <= 0.0 => Err(config.bad(key, "a number above 0")),
        number => Ok(number.unwrap_or(default)),
    };
    Ok(Activation::SwigluOai { alpha: read("swiglu_alpha", 1.702)?, limit: read("swiglu_limit", 7.0)? })
}

fn layer_rule(config: &Config<'_>, family: ModelFamily) -> Result<LayerRule> {
    let all = LayerRule { first: 0, step: 1, offset: 0, dense: Vec::new() };
    let step = |key: &str| if config.has(key) { config.size(&[key]) } else { Ok(1) };
    match family {
        ModelFamily::Mixtral | ModelFamily::Olmoe | ModelFamily::Qwen3_5Moe | ModelFamily::GptOss => Ok(all),
        ModelFamily::Qwen2Moe | ModelFamily::Qwen3Moe => {
            let mut dense = config.counts("mlp_only_layers")?.unwrap_or_default();
            dense.sort_unstable();
            Ok(LayerRule { step: step("decoder_sparse_step")?, offset: 1, dense, ..all })
        }
        ModelFamily::DeepSeekV2 | ModelFamily::DeepSeekV3 => {
            let default = if family == ModelFamily::DeepSeekV3 { 3 } else { 0 };
            let first = config.count(&["first_k_dense_replace"])?.unwrap_or(default);
            Ok(LayerRule { first, step: step("moe_layer_freq")?, ..all })
        }
    }
}
