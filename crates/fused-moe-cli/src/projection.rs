//! `fmoe plan --machine`: what dispatch and combine of every backend would cost on a machine, and which is fastest where.

use std::path::Path;

use anyhow::Context;
use fused_moe::{
    CommTraffic, DType, ExpertGroups, ExpertPlacement, MoeConfig, PerLink, QuantScheme, Registry,
    RoutingConfig, RoutingMethod, Selection, WireFormat,
};
use moe_checkpoint::Checkpoint;
use moe_cost::{CostModel, LayerCost, Machine};
use serde::Serialize;

use crate::args::{Draw, LayerArgs, PlanArgs, Quant};
use crate::exit::{Failure, OrFailure, refused};
use crate::geometry::{Crossover, Launch, crossover, launches};
use crate::layer;
use crate::report::{print, print_json};

/// Beyond what a call is given.
const MAX_TOKENS: usize = 1 << 16;

#[derive(Serialize)]
struct Report {
    machine: String,
    arch: String,
    gpus_per_node: usize,
    hidden: usize,
    top_k: usize,
    experts: usize,
    groups: Option<[usize; 2]>,
    wire: String,
    /// Of a backend that can carry it; others are priced in bf16, and have no buffers as this build refuses them.
    combine_wire: String,
    rows: Vec<Row>,
    fastest: Vec<Fastest>,
    /// By the tuning table of MoRI's kernels.
    crossover: Crossover,
}

/// One backend at one size.
#[derive(Serialize)]
struct Row {
    ep_size: usize,
    tokens: usize,
    all2all: &'static str,
    protocol: &'static str,
    dispatch_us: f64,
    combine_us: f64,
    total_us: f64,
    /// Bytes that leave one rank in one layer.
    dispatch_bytes: Links,
    combine_bytes: Links,
    /// Of one rank; none where this build refuses the configuration.
    buffer_bytes: Option<usize>,
    launches: Vec<Launch>,
    fastest: bool,
}

#[derive(Serialize)]
struct Links {
    scale_up: f64,
    network: f64,
}

impl Links {
    fn of(bytes: PerLink, tokens: usize) -> Self {
        let PerLink { scale_up, network } = bytes * tokens;
        Self { scale_up, network }
    }
}

/// From how many tokens per rank to how many a backend is the fastest.
#[derive(Serialize, PartialEq, Eq)]
struct Fastest {
    ep_size: usize,
    all2all: &'static str,
    from_tokens: usize,
    to_tokens: Option<usize>,
}

/// Runs the command.
pub fn run(args: &PlanArgs, machine: &str) -> Result<(), Failure> {
    let machine = read(machine)?;
    let registry = layer::backends(&args.layer);
    if let Some(&tokens) = args.tokens.iter().find(|&&tokens| tokens == 0 || tokens > MAX_TOKENS) {
        return refused(format!("--tokens {tokens}: at least 1 and at most {MAX_TOKENS}"));
    }
    let gpus_per_node = args.layer.gpus_per_node.unwrap_or(machine.gpus_per_node);
    let shape = shape(args)?;
    let wire = shape.quant.quantized_wire(shape.in_dtype);
    let mut report = Report {
        machine: machine.name.clone(),
        arch: machine.arch.clone(),
        gpus_per_node,
        hidden: shape.hidden,
        top_k: shape.top_k,
        experts: shape.num_experts(),
        groups: shape.routing.as_ref().and_then(|r| r.groups).map(|g| [g.n_group, g.topk_group]),
        wire: wire.to_string(),
        combine_wire: shape.combine_wire.format(shape.in_dtype).to_string(),
        rows: Vec::new(),
        fastest: Vec::new(),
        crossover: crossover(&machine.arch, &shape, &wire),
    };
    for &ranks in &args.ep.0 {
        let candidates = Candidates::new(&registry, &machine, over(&shape, ranks, gpus_per_node)?, wire)?;
        for &tokens in &args.tokens {
            report.rows.extend(candidates.rows(tokens)?);
        }
        report.fastest.extend(candidates.fastest()?);
    }
    if args.json { print_json(&report).or_failed() } else { print_tables(&report) }
}

fn read(machine: &str) -> Result<Machine, Failure> {
    if Machine::names().contains(&machine) || !Path::new(machine).exists() {
        return Machine::named(machine).or_refused();
    }
    let text =
        std::fs::read_to_string(machine).with_context(|| format!("cannot read {machine}")).or_refused()?;
    Machine::from_toml(&text).with_context(|| format!("in {machine}")).or_refused()
}

/// The layer on one rank: that of the checkpoint, or DeepSeek-V3's in FP8.
fn shape(args: &PlanArgs) -> Result<MoeConfig, Failure> {
    let mut config = match &args.checkpoint {
        Some(folder) => {
            let checkpoint = Checkpoint::open(folder).or_refused()?;
            let stored = layer::open(&checkpoint, args.layer.layer)?;
            let one_rank = LayerArgs { ep_size: 1, gpus_per_node: None, ..args.layer.clone() };
            layer::config(&stored, &one_rank, 1)?
        }
        None => deepseek_v3(&args.layer)?,
    };
    if let (Draw::Uniform, Some(routing)) = (args.routing, &mut config.routing) {
        routing.groups = None;
    }
    Ok(config)
}

fn deepseek_v3(args: &LayerArgs) -> Result<MoeConfig, Failure> {
    let routing = RoutingConfig {
        method: RoutingMethod::DeepSeekV3,
        num_experts: 256,
        top_k: 8,
        groups: Some(ExpertGroups { n_group: 8, topk_group: 4 }),
        renormalize: true,
        routed_scaling_factor: 2.5,
        correction_bias: None,
    };
    let stored = layer::scheme(Quant::Fp8Block, QuantScheme::Unquantized);
    Ok(MoeConfig {
        hidden: 7168,
        intermediate: 2048,
        top_k: 8,
        max_tokens_per_rank: 1,
        in_dtype: DType::Bf16,
        quant: layer::scheme(args.quant, stored),
        combine_wire: layer::combine_wire(args.combine_quant),
        routing: Some(routing),
        ..MoeConfig::new(ExpertPlacement::linear(256, 1).or_refused()?)
    })
}

/// `shape` over `ranks`; where there are more ranks than experts, every rank holds one, and some are replicas.
fn over(shape: &MoeConfig, ranks: usize, gpus_per_node: usize) -> Result<MoeConfig, Failure> {
    let ranks_per_node = gpus_per_node.min(ranks);
    if ranks_per_node == 0 || !ranks.is_multiple_of(ranks_per_node) {
        return refused(format!("--gpus-per-node {gpus_per_node} does not divide {ranks} ranks"));
    }
    let experts = shape.num_experts();
    Ok(MoeConfig {
        redundant_experts: ranks.saturating_sub(experts),
        placement: ExpertPlacement::linear(experts.max(ranks), ranks).or_refused()?,
        ranks_per_node,
        ..shape.clone()
    })
}

/// The backends that say what they move under one configuration, in the registry's order.
struct Candidates<'r> {
    registry: &'r Registry,
    machine: &'r Machine,
    config: MoeConfig,
    wire: WireFormat,
    traffic: Vec<(&'static str, CommTraffic)>,
}

impl<'r> Candidates<'r> {
    fn new(
        registry: &'r Registry,
        machine: &'r Machine,
        config: MoeConfig,
        wire: WireFormat,
    ) -> Result<Self, Failure> {
        let mut traffic = Vec::new();
        for name in registry.comm_names() {
            let moved = registry.comm(name).or_refused()?.traffic(&config, &wire);
            traffic.extend(moved.map(|moved| (name, moved)));
        }
        Ok(Self { registry, machine, config, wire, traffic })
    }

    /// Microseconds of every backend, and which of them is the first of the fastest.
    fn costs(&self, tokens: usize) -> Result<(Vec<LayerCost>, usize), Failure> {
        let cost = |(_, traffic): &(_, CommTraffic)| self.machine.layer(traffic, tokens);
        let costs: Vec<LayerCost> = self.traffic.iter().map(cost).collect::<Result<_, _>>().or_refused()?;
        let best = (0..costs.len()).min_by(|&a, &b| costs[a].total().total_cmp(&costs[b].total()));
        Ok((costs, best.unwrap_or(0)))
    }

    fn rows(&self, tokens: usize) -> Result<Vec<Row>, Failure> {
        let (costs, best) = self.costs(tokens)?;
        let config = MoeConfig { max_tokens_per_rank: tokens, ..self.config.clone() };
        let mut rows = Vec::new();
        for (index, (&(name, traffic), cost)) in self.traffic.iter().zip(&costs).enumerate() {
            let selection = Selection { comm: Some(name), experts: None };
            let survey = self.registry.survey(&config, selection).or_refused()?;
            let comm = self.registry.comm(name).or_refused()?;
            rows.push(Row {
                ep_size: config.ep_size(),
                tokens,
                all2all: name,
                protocol: traffic.protocol.0,
                dispatch_us: cost.dispatch,
                combine_us: cost.combine,
                total_us: cost.total(),
                dispatch_bytes: Links::of(traffic.dispatch, tokens),
                combine_bytes: Links::of(traffic.combine, tokens),
                buffer_bytes: survey.fitting.first().map(|plan| comm.required_bytes(&config, plan)),
                launches: launches(name, &self.machine.arch, &config, &self.wire, tokens),
                fastest: index == best,
            });
        }
        Ok(rows)
    }

    /// Who is the fastest from one token to [`MAX_TOKENS`]. Costs are straight lines, so a backend that is the fastest at
    /// both ends of an interval is so in between.
    fn fastest(&self) -> Result<Vec<Fastest>, Failure> {
        let best = |tokens| Ok::<_, Failure>(self.costs(tokens)?.1);
        let mut found: Vec<Fastest> = Vec::new();
        let mut from = 1;
        while from <= MAX_TOKENS && !self.traffic.is_empty() {
            let here = best(from)?;
            let (mut inside, mut outside) = (from, MAX_TOKENS + 1);
            if best(MAX_TOKENS)? == here {
                inside = MAX_TOKENS;
            }
            while outside - inside > 1 {
                let middle = inside + (outside - inside) / 2;
                if best(middle)? == here { inside = middle } else { outside = middle }
            }
            found.push(Fastest {
                ep_size: self.config.ep_size(),
                all2all: self.traffic[here].0,
                from_tokens: from,
                to_tokens: (inside < MAX_TOKENS).then_some(inside),
            });
            from = inside + 1;
        }
        Ok(found)
    }
}

fn print_tables(report: &Report) -> Result<(), Failure> {
    let groups =
        report.groups.map_or("uniform routing".to_string(), |[all, kept]| format!("{kept} of {all} groups"));
    print(format_args!(
        "{} ({}), {} GPUs per node; hidden {}, top-{} of {} experts, {groups}; dispatch in {}, combine in {}",
        report.machine,
        report.arch,
        report.gpus_per_node,
        report.hidden,
        report.top_k,
        report.experts,
        report.wire,
        report.combine_wire
    ))
    .or_failed()?;
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "EP",
        "tokens",
        "all2all",
        "protocol",
        "dispatch us",
        "combine us",
        "layer us",
        "scale-up MB",
        "network MB",
        "buffers GiB",
        "",
    ]);
    for row in &report.rows {
        let megabytes = |link: fn(&Links) -> f64| {
            format!("{:.2} + {:.2}", link(&row.dispatch_bytes) / 1e6, link(&row.combine_bytes) / 1e6)
        };
        table.add_row([
            row.ep_size.to_string(),
            row.tokens.to_string(),
            row.all2all.to_string(),
            row.protocol.to_string(),
            format!("{:.1}", row.dispatch_us),
            format!("{:.1}", row.combine_us),
            format!("{:.1}", row.total_us),
            megabytes(|links| links.scale_up),
            megabytes(|links| links.network),
            row.buffer_bytes.map_or("-".into(), |bytes| format!("{:.3}", bytes as f64 / f64::from(1 << 30))),
            if row.fastest { "fastest" } else { "" }.to_string(),
        ]);
    }
    print(format_args!(
        "{table}\nMB: what leaves one rank in dispatch + combine of one layer. Buffers: of one rank, where this build has \
         the kernel."
    ))
    .or_failed()?;
    for fastest in &report.fastest {
        let Fastest { ep_size, all2all, from_tokens, to_tokens } = fastest;
        let range = match to_tokens {
            Some(to) => format!("from {from_tokens} to {to}"),
            None => format!("from {from_tokens}"),
        };
        print(format_args!("EP{ep_size}: {all2all} is the fastest {range} tokens per rank")).or_failed()?;
    }
    let mut launches: Vec<&Launch> = Vec::new();
    for launch in report.rows.iter().flat_map(|row| &row.launches) {
        if !launches.contains(&launch) {
            launches.push(launch);
            print(launch).or_failed()?;
        }
    }
    let Crossover { low_latency_up_to, measured } = report.crossover;
    let how = if measured { "measured" } else { "heuristic" };
    print(format_args!(
        "between nodes, InterNodeV1LL is no slower than InterNodeV1 up to {low_latency_up_to} tokens per rank ({how})"
    ))
    .or_failed()
}
