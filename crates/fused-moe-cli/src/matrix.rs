//! `fmoe matrix`: what every pair of backends does for every scheme and topology, from their own capabilities.

use fused_moe::{
    Activation, DType, DeviceKind, ExpertPlacement, Fp8Format, Granularity, MoeConfig, Plan, QuantScheme,
    RefusedPair, Registry, Selection, Survey, WireFormat,
};
use serde::Serialize;

use crate::args::MatrixArgs;
use crate::exit::{Failure, OrFailure};
use crate::report::{PlanReport, RejectedReport, print, print_json};

const SCHEMES: [QuantScheme; 4] = [
    QuantScheme::Unquantized,
    QuantScheme::Fp8Block(Fp8Format::E4M3Fn),
    QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn),
    QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn),
];

/// Ranks, ranks per node, and how a reader would say it.
const TOPOLOGIES: [(usize, usize, &str); 3] = [(1, 1, "EP 1"), (8, 8, "EP 8"), (8, 4, "EP 8, 2 nodes")];

#[derive(Serialize)]
struct Cell {
    topology: &'static str,
    scheme: String,
    fitting: Vec<PlanReport>,
    rejected: Vec<RejectedReport>,
}

/// Runs the command.
pub fn run(args: MatrixArgs) -> Result<(), Failure> {
    let registry = fused_moe::default_backends();
    if args.json {
        let mut cells = Vec::new();
        for (ranks, ranks_per_node, topology) in TOPOLOGIES {
            for scheme in SCHEMES {
                let survey = survey(&registry, ranks, ranks_per_node, scheme)?;
                let fitting = survey.fitting.iter().map(Into::into).collect();
                let rejected = survey.refused.iter().map(Into::into).collect();
                cells.push(Cell { topology, scheme: scheme.to_string(), fitting, rejected });
            }
        }
        return print_json(&cells).or_failed();
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(if args.markdown {
        comfy_table::presets::ASCII_MARKDOWN
    } else {
        comfy_table::presets::UTF8_FULL_CONDENSED
    });
    let header = ["topology", "all2all", "experts", "format"].map(str::to_string);
    table.set_header(header.into_iter().chain(SCHEMES.map(|s| s.to_string())));
    for (ranks, ranks_per_node, topology) in TOPOLOGIES {
        let surveys: Vec<Survey> = SCHEMES
            .iter()
            .map(|&scheme| survey(&registry, ranks, ranks_per_node, scheme))
            .collect::<Result<_, _>>()?;
        for experts in registry.experts_names() {
            for comm in registry.comm_names() {
                let cells = surveys.iter().map(|survey| cell(survey, comm, experts));
                let format = surveys
                    .iter()
                    .flat_map(|s| &s.fitting)
                    .find(|p| (p.comm(), p.experts()) == (comm, experts));
                let format = format.map_or("-", |plan| plan.format().name());
                let row = [topology, comm, experts, format].map(str::to_string);
                table.add_row(row.into_iter().chain(cells));
            }
        }
    }
    print(&table).or_failed()?;
    if args.markdown {
        print(
            "\nA cell names what travels in dispatch; all of it ran on the host. `refused (…)` names what does not fit.",
        )
        .or_failed()?;
    }
    Ok(())
}

fn cell(survey: &Survey, comm: &str, experts: &str) -> String {
    let fits = |plan: &&Plan| (plan.comm(), plan.experts()) == (comm, experts);
    if let Some(plan) = survey.fitting.iter().find(fits) {
        return short(plan.wire());
    }
    let refuses = |pair: &&RefusedPair| (pair.comm == comm || pair.comm == "-") && pair.experts == experts;
    let axes = survey.refused.iter().filter(refuses).flat_map(|pair| &pair.reasons).map(|r| r.axis.name());
    format!("refused ({})", axes.collect::<Vec<_>>().join(", "))
}

fn short(wire: WireFormat) -> String {
    match wire.scale.map(|scale| scale.granularity) {
        None => wire.payload.to_string(),
        Some(Granularity::Tensor) => "fp8 + 1 scale per rank".into(),
        Some(Granularity::Token) => "fp8 + 1 scale per token".into(),
        Some(Granularity::Group(n)) => format!("fp8 + 1 scale per 1x{n}"),
        Some(_) => wire.to_string(),
    }
}

fn survey(
    registry: &Registry,
    ranks: usize,
    ranks_per_node: usize,
    quant: QuantScheme,
) -> Result<Survey, Failure> {
    let config = MoeConfig {
        hidden: 7168,
        intermediate: 2048,
        top_k: 8,
        max_tokens_per_rank: 128,
        in_dtype: DType::Bf16,
        quant,
        activation: Activation::Silu,
        apply_router_weight_on_input: false,
        expert_bias: false,
        padding: Default::default(),
        redundant_experts: 0,
        routing: None,
        placement: ExpertPlacement::linear(256, ranks).or_failed()?,
        ranks_per_node,
        device: DeviceKind::Host,
    };
    registry.survey(&config, Selection::default()).or_failed()
}
