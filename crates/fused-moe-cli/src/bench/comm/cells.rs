//! What is measured: every backend, wire, routing and number of tokens, unless refused.

use anyhow::bail;
use fused_moe::{
    ActivationFormat, CombineKind, DType, ExpertPlacement, ExpertsCaps, KernelKind, MoeConfig, Plan,
    QuantScheme, Rank, Registry, Support, TopKWeightAndReduce, negotiate,
};
use serde::Serialize;

use crate::args::{BenchCommArgs, Draw, Quant};
use crate::layer::scheme;

/// DeepSeek-V3's groups, for other numbers of experts too.
const N_GROUP: usize = 8;
const TOPK_GROUP: usize = 4;

/// Sizes that all cells share.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Layer {
    /// Elements of a token.
    pub hidden: usize,
    /// Experts over all ranks.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Groups, and how many of them a token goes to, where routing is group-limited.
    pub groups: [usize; 2],
}

impl Layer {
    /// The sizes that the arguments name.
    pub fn new(args: &BenchCommArgs) -> anyhow::Result<Self> {
        let BenchCommArgs { hidden, experts, top_k, .. } = *args;
        if hidden == 0 || hidden > 1 << 20 {
            bail!("--hidden {hidden}: at least 1 and at most {}", 1 << 20);
        }
        if experts == 0 || experts > 1 << 16 {
            bail!("--experts {experts}: at least 1 and at most {}", 1 << 16);
        }
        if top_k == 0 || top_k > experts {
            bail!("--top-k {top_k}: at least 1 and at most the {experts} experts");
        }
        Ok(Self { hidden, experts, top_k, groups: [N_GROUP, TOPK_GROUP] })
    }
}

/// Ranks, and how many of them share a (simulated) node.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// All.
    pub ranks: usize,
    /// On one node.
    pub ranks_per_node: usize,
}

impl Group {
    /// `ranks` on nodes as the arguments say.
    pub fn new(args: &BenchCommArgs, ranks: usize) -> anyhow::Result<Self> {
        let ranks_per_node = args.gpus_per_node.unwrap_or(ranks).min(ranks);
        if !(1..=64).contains(&ranks) {
            bail!("--ep-size {ranks}: at least 1 and at most 64 ranks");
        }
        if ranks_per_node == 0 || !ranks.is_multiple_of(ranks_per_node) {
            bail!("--gpus-per-node {ranks_per_node} does not divide {ranks} ranks");
        }
        Ok(Self { ranks, ranks_per_node })
    }
}

/// One thing to measure.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The layer.
    pub config: MoeConfig,
    /// Backend and wire, with experts that are not there.
    pub plan: Plan,
    /// Routing.
    pub draw: Draw,
    /// Tokens of every rank.
    pub tokens: usize,
}

impl Cell {
    /// Bytes of a token's payload and scales on the wire.
    pub fn payload_bytes(&self) -> usize {
        let (wire, hidden) = (self.plan.wire(), self.config.hidden);
        wire.payload_bytes(hidden) + wire.scale_bytes(hidden)
    }

    /// Elements of experts' output that a rank lends; none where the backend offers its own buffer.
    pub fn lent_output(&self) -> Option<[usize; 3]> {
        if self.plan.in_place_output() {
            return None;
        }
        let experts = match self.plan.format() {
            ActivationFormat::Standard => 1,
            ActivationFormat::BatchedExperts => self.config.placement.num_local_experts(Rank(0)),
        };
        Some([experts, self.plan.max_rows(), self.config.hidden])
    }

    /// Bytes over all ranks: buffers, inputs and outputs.
    fn bytes(&self, registry: &Registry) -> anyhow::Result<usize> {
        let comm = registry.comm(self.plan.comm())?.required_bytes(&self.config, &self.plan);
        let lent = self.lent_output().map_or(0, |dims| dims.iter().product::<usize>() * 2);
        let tokens = self.tokens * self.config.hidden * 2 * 2;
        Ok((comm.saturating_add(lent).saturating_add(tokens)).saturating_mul(self.config.ep_size()))
    }
}

/// A cell that is not measured.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Refused {
    all2all: &'static str,
    ep_size: usize,
    reasons: Vec<String>,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "refused {} over {} ranks: {}", self.all2all, self.ep_size, self.reasons.join("; "))
    }
}

/// What there is to measure in one group.
#[derive(Clone, Debug)]
pub struct Cells {
    /// The group.
    pub group: Group,
    /// What fits.
    pub measured: Vec<Cell>,
    /// What does not.
    pub refused: Vec<Refused>,
}

/// The cells of `group`, and those that are refused.
pub fn all(args: &BenchCommArgs, layer: &Layer, registry: &Registry, group: Group) -> anyhow::Result<Cells> {
    let mut cells = Cells { group, measured: Vec::new(), refused: Vec::new() };
    let tokens = match args.total_tokens.as_slice() {
        [] => args.tokens.clone(),
        totals => totals.iter().map(|total| total / group.ranks).collect(),
    };
    if let Some(tokens) = tokens.iter().find(|tokens| !(1..=1 << 16).contains(*tokens)) {
        bail!("{tokens} tokens per rank cannot be measured, at least 1 and at most {} can", 1 << 16);
    }
    let names = registry.comm_names();
    let names =
        names.into_iter().filter(|name| args.all2all.is_empty() || args.all2all.iter().any(|n| n == name));
    let names: Vec<&'static str> = names.collect();
    for &quant in &args.quant {
        for &draw in &args.routing {
            for &tokens in &tokens {
                let config = config(layer, group, quant, tokens)?;
                if draw == Draw::Model && !groups_fit(layer) {
                    bail!("--experts {} cannot be group-limited: {} groups", layer.experts, layer.groups[0]);
                }
                for &name in &names {
                    let verdict = cell(registry, name, &config, draw, tokens, args.max_gib)?;
                    match verdict {
                        Ok(cell) => cells.measured.push(cell),
                        Err(reasons) => {
                            let why = Refused { all2all: name, ep_size: group.ranks, reasons };
                            if !cells.refused.contains(&why) {
                                cells.refused.push(why);
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(cells)
}

fn groups_fit(layer: &Layer) -> bool {
    let [n_group, topk_group] = layer.groups;
    layer.experts.is_multiple_of(n_group) && topk_group * layer.experts / n_group >= layer.top_k
}

fn config(layer: &Layer, group: Group, quant: Quant, tokens: usize) -> anyhow::Result<MoeConfig> {
    Ok(MoeConfig {
        hidden: layer.hidden,
        // No experts run; their sizes do not matter.
        intermediate: layer.hidden,
        top_k: layer.top_k,
        max_tokens_per_rank: tokens,
        quant: scheme(quant, QuantScheme::Unquantized),
        ranks_per_node: group.ranks_per_node,
        ..MoeConfig::new(ExpertPlacement::linear(layer.experts, group.ranks)?)
    })
}

/// The cell, or every reason against it.
fn cell(
    registry: &Registry,
    name: &str,
    config: &MoeConfig,
    draw: Draw,
    tokens: usize,
    max_gib: f64,
) -> anyhow::Result<Result<Cell, Vec<String>>> {
    let words = |reasons: Vec<fused_moe::Unsupported>| reasons.iter().map(ToString::to_string).collect();
    let caps = match registry.comm(name)?.supports(config, KernelKind::Modular) {
        Support::Supported(caps) => caps,
        Support::Unsupported(reasons) => return Ok(Err(words(reasons))),
    };
    // Experts that take whatever this backend gives, in the wire format of the scheme.
    let wire = config.quant.quantized_wire(DType::Bf16);
    let mut experts = ExpertsCaps::host("none", vec![wire]);
    experts.format = caps.format;
    if caps.combine == CombineKind::WeightAndReduce {
        experts.weight_and_reduce = TopKWeightAndReduce::delegate();
    }
    let plan = match negotiate(config, &caps, &experts) {
        Ok(plan) => plan,
        Err(reasons) => return Ok(Err(words(reasons))),
    };
    let cell = Cell { config: config.clone(), plan, draw, tokens };
    let gib = cell.bytes(registry)? as f64 / f64::from(1 << 30);
    if gib > max_gib {
        let what = format!("{tokens} tokens per rank, {}", config.quant);
        return Ok(Err(vec![format!(
            "{what}: needs {gib:.1} GiB over all ranks, --max-gib is {max_gib:.1}"
        )]));
    }
    Ok(Ok(cell))
}
