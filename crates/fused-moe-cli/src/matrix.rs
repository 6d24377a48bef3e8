//! `fmoe matrix`: what every pair of backends does for every scheme and topology, and what every experts backend
//! does beside it, from their own capabilities.

use std::collections::BTreeSet;

use fused_moe::{
    Activation, DeviceKind, ExpertGroups, ExpertPlacement, Fp8Format, Granularity, MoeConfig, Padding, Plan,
    QuantScheme, Registry, RoutingConfig, RoutingMethod, ScaleSource, Selection, Survey, WireFormat,
};
use serde::Serialize;

use crate::args::MatrixArgs;
use crate::exit::{Failure, OrFailure};
use crate::report::{PlanReport, RejectedReport, print, print_json};

const SCHEMES: [QuantScheme; 7] = [
    QuantScheme::Unquantized,
    QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
    QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
    QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
    QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn),
    QuantScheme::Mxfp4,
    QuantScheme::Nvfp4,
];

/// Ranks, ranks per node, and how a reader would say it.
const TOPOLOGIES: [(usize, usize, &str); 3] = [(1, 1, "EP 1"), (8, 8, "EP 8"), (8, 4, "EP 8, 2 nodes")];

const EXPERTS: usize = 256;

#[derive(Serialize)]
struct Cell {
    topology: &'static str,
    scheme: String,
    fitting: Vec<PlanReport>,
    rejected: Vec<RejectedReport>,
}

/// Runs the command.
pub fn run(args: MatrixArgs) -> Result<(), Failure> {
    let device = args.device.device();
    let registry = fused_moe::backends_on(device);
    let surveys = Surveys::all(&registry, device.kind)?;
    if args.json {
        let cells = surveys.0.iter().flat_map(|(topology, surveys)| {
            surveys.iter().zip(SCHEMES).map(|(survey, scheme)| Cell {
                topology,
                scheme: scheme.to_string(),
                fitting: survey.fitting.iter().map(Into::into).collect(),
                rejected: survey.refused.iter().map(Into::into).collect(),
            })
        });
        return print_json(&cells.collect::<Vec<_>>()).or_failed();
    }
    let ran = match device.kind {
        DeviceKind::Host => "all of it ran on the host.".to_string(),
        kind => format!("this is for {kind:?}."),
    };
    let parts = [
        pairs(&registry, &surveys, args.markdown).to_string(),
        format!("A cell names what travels in dispatch; {ran} `-` is refused. These pairs fit nowhere:"),
        misfits(&registry, &surveys),
        "What each experts backend does beside its schemes, over its best scheme:".into(),
        features(&registry, device.kind, args.markdown)?.to_string(),
    ];
    print(parts.join("\n\n")).or_failed()
}

/// One survey per topology and scheme.
struct Surveys(Vec<(&'static str, Vec<Survey>)>);

impl Surveys {
    fn all(registry: &Registry, device: DeviceKind) -> Result<Self, Failure> {
        let topologies = TOPOLOGIES.iter().map(|&(ranks, ranks_per_node, name)| {
            let survey = |&quant: &QuantScheme| {
                let config = MoeConfig { quant, ranks_per_node, device, ..config(ranks)? };
                registry.survey(&config, Selection::default()).or_failed()
            };
            Ok((name, SCHEMES.iter().map(survey).collect::<Result<_, Failure>>()?))
        });
        Ok(Self(topologies.collect::<Result<_, Failure>>()?))
    }
}

/// A layer of the size of DeepSeek-V3, routed by softmax.
pub fn config(ranks: usize) -> Result<MoeConfig, Failure> {
    Ok(MoeConfig {
        hidden: 7168,
        intermediate: 2048,
        top_k: 8,
        max_tokens_per_rank: 128,
        routing: Some(RoutingConfig {
            method: RoutingMethod::RenormalizeNaive,
            num_experts: EXPERTS,
            top_k: 8,
            groups: None,
            renormalize: true,
            routed_scaling_factor: 1.0,
            correction_bias: None,
        }),
        ..MoeConfig::new(ExpertPlacement::linear(EXPERTS, ranks).or_failed()?)
    })
}

fn table(markdown: bool) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(match markdown {
        true => comfy_table::presets::ASCII_MARKDOWN,
        false => comfy_table::presets::UTF8_FULL_CONDENSED,
    });
    table
}

/// One row per pair that fits somewhere; topologies in which it does the same share the row.
fn pairs(registry: &Registry, surveys: &Surveys, markdown: bool) -> comfy_table::Table {
    let mut table = table(markdown);
    let header = ["experts", "all2all", "topology"].map(str::to_string);
    table.set_header(header.into_iter().chain(SCHEMES.map(|s| s.to_string())));
    for experts in registry.experts_names() {
        for comm in registry.comm_names() {
            let mut rows: Vec<(Vec<String>, Vec<&str>)> = Vec::new();
            for (topology, surveys) in &surveys.0 {
                let cells: Vec<_> = surveys.iter().map(|survey| cell(survey, comm, experts)).collect();
                match rows.iter_mut().find(|(same, _)| *same == cells) {
                    Some((_, topologies)) => topologies.push(topology),
                    None => rows.push((cells, vec![topology])),
                }
            }
            rows.retain(|(cells, _)| cells.iter().any(|cell| cell != REFUSED));
            for (cells, topologies) in rows {
                let start = [experts, comm, &topologies.join("; ")].map(str::to_string);
                table.add_row(start.into_iter().chain(cells));
            }
        }
    }
    table
}

const REFUSED: &str = "-";

fn cell(survey: &Survey, comm: &str, experts: &str) -> String {
    let fits = |plan: &&Plan| (plan.comm(), plan.experts()) == (comm, experts);
    survey.fitting.iter().find(fits).map_or(REFUSED.into(), |plan| short(plan.wire()))
}

fn short(wire: WireFormat) -> String {
    let Some(scale) = wire.scale else { return wire.payload.to_string() };
    match (scale.source, scale.granularity) {
        (ScaleSource::Static, Granularity::Tensor) => "fp8, static".into(),
        (_, Granularity::Tensor) => "fp8, per rank".into(),
        (_, Granularity::Token) => "fp8, per token".into(),
        (_, Granularity::Group(n)) => format!("fp8, 1x{n}"),
        _ => wire.to_string(),
    }
}

/// The pairs that fit in no topology under no scheme, by the axes on which they differ.
fn misfits(registry: &Registry, surveys: &Surveys) -> String {
    let all = || surveys.0.iter().flat_map(|(_, surveys)| surveys);
    let mut lines: Vec<(String, Vec<String>)> = Vec::new();
    for experts in registry.experts_names() {
        for comm in registry.comm_names() {
            if all().any(|survey| cell(survey, comm, experts) != REFUSED) {
                continue;
            }
            let axes = |survey: &Survey| {
                let pairs = survey.refused.iter().filter(|pair| pair.comm == comm && pair.experts == experts);
                let reasons = pairs.flat_map(|pair| &pair.reasons);
                reasons.map(|reason| reason.axis.name()).collect::<BTreeSet<_>>()
            };
            // What stands against the pair always, where each of the two alone would run.
            let reasons = || all().map(axes).filter(|axes| !axes.is_empty());
            let always = reasons().reduce(|a, b| &a & &b).unwrap_or_default();
            let sometimes = reasons().flatten().collect::<BTreeSet<_>>();
            let (which, word) = if always.is_empty() { (sometimes, " or ") } else { (always, ", ") };
            let always = which.into_iter().collect::<Vec<_>>().join(word);
            let pair = format!("`{comm}` with `{experts}`");
            match lines.iter_mut().find(|(axes, _)| *axes == always) {
                Some((_, pairs)) => pairs.push(pair),
                None => lines.push((always, vec![pair])),
            }
        }
    }
    let lines = lines.iter().map(|(axes, pairs)| format!("- {axes}: {}", pairs.join(", ")));
    lines.collect::<Vec<_>>().join("\n")
}

/// One row per property of a layer, one column per experts backend.
fn features(registry: &Registry, device: DeviceKind, markdown: bool) -> Result<comfy_table::Table, Failure> {
    let ranks = if device == DeviceKind::Host { 8 } else { 1 };
    let base = MoeConfig { device, ..config(ranks)? };
    let llama = RoutingConfig { method: RoutingMethod::Llama4, top_k: 1, ..routing(&base) };
    let with = |name: String, config: MoeConfig| (name, config);
    let activation =
        |activation: Activation| with(activation.to_string(), MoeConfig { activation, ..base.clone() });
    let mut rows = vec![
        activation(Activation::Silu),
        activation(Activation::Gelu),
        activation(Activation::GeluTanh),
        activation(Activation::SWIGLU_OAI),
        activation(Activation::SiluClamped { limit: 7.0 }),
        with("biases".into(), MoeConfig { expert_bias: true, ..base.clone() }),
        with(
            "padding of hidden and intermediate".into(),
            MoeConfig { padding: Padding { hidden: 64, intermediate: 64 }, ..base.clone() },
        ),
        with(
            "routing weight on the input".into(),
            MoeConfig {
                top_k: 1,
                apply_router_weight_on_input: true,
                routing: Some(llama.clone()),
                ..base.clone()
            },
        ),
        with(
            "redundant experts (EPLB)".into(),
            MoeConfig {
                redundant_experts: 8,
                routing: Some(RoutingConfig { num_experts: EXPERTS - 8, ..routing(&base) }),
                ..base.clone()
            },
        ),
        with("the engine routes".into(), MoeConfig { routing: None, ..base.clone() }),
    ];
    for method in RoutingMethod::ALL {
        let grouped = matches!(
            method,
            RoutingMethod::GroupLimitedSoftmax
                | RoutingMethod::GroupLimitedSigmoid
                | RoutingMethod::DeepSeekV3
        );
        let groups = grouped.then_some(ExpertGroups { n_group: 8, topk_group: 4 });
        let top_k = if method == RoutingMethod::Llama4 { 1 } else { 8 };
        let routing = RoutingConfig { method, groups, top_k, ..routing(&base) };
        rows.push(with(
            format!("routing {method}"),
            MoeConfig { routing: Some(routing), top_k, ..base.clone() },
        ));
    }
    let mut table = table(markdown);
    table.set_header(std::iter::once("a layer with").chain(registry.experts_names()));
    for (name, config) in rows {
        let cells = registry.experts_names().into_iter().map(|experts| feature(registry, &config, experts));
        let cells = cells.collect::<Result<Vec<_>, _>>()?;
        table.add_row(std::iter::once(name).chain(cells));
    }
    Ok(table)
}

fn routing(config: &MoeConfig) -> RoutingConfig {
    config.routing.clone().unwrap_or(RoutingConfig {
        method: RoutingMethod::Default,
        num_experts: config.num_logical_experts(),
        top_k: config.top_k,
        groups: None,
        renormalize: true,
        routed_scaling_factor: 1.0,
        correction_bias: None,
    })
}

/// `yes` if `experts` runs `config` with some dispatch and scheme; otherwise the axes of the scheme that fails on fewest.
fn feature(registry: &Registry, config: &MoeConfig, experts: &str) -> Result<String, Failure> {
    let mut fewest: Option<BTreeSet<&'static str>> = None;
    for quant in SCHEMES {
        let config = MoeConfig { quant, ..config.clone() };
        let selection = Selection { experts: Some(experts), ..Selection::default() };
        let survey = registry.survey(&config, selection).or_failed()?;
        if !survey.fitting.is_empty() {
            return Ok("yes".into());
        }
        for pair in &survey.refused {
            let axes: BTreeSet<_> = pair.reasons.iter().map(|reason| reason.axis.name()).collect();
            if fewest.as_ref().is_none_or(|fewest| axes.len() < fewest.len()) {
                fewest = Some(axes);
            }
        }
    }
    let axes = fewest.unwrap_or_default().into_iter().collect::<Vec<_>>().join(", ");
    Ok(format!("refused ({axes})"))
}
