//! `fmoe plan`: the chosen pair, what it costs, and every other pair with every reason against it.

use anyhow::anyhow;
use fused_moe::{MoeConfig, Plan, Rank, Registry};
use moe_checkpoint::Checkpoint;
use serde::Serialize;

use crate::args::PlanArgs;
use crate::eplb::Replicas;
use crate::exit::{Failure, OrFailure};
use crate::layer;
use crate::report::{BytesReport, PlanReport, RejectedReport, WireReport, human_bytes, print, print_json};
use crate::{projection, published};

#[derive(Serialize)]
struct Report {
    layer: usize,
    scheme: String,
    sort_policy: &'static str,
    plan: Costed,
    alternatives: Vec<Costed>,
    rejected: Vec<RejectedReport>,
}

#[derive(Serialize)]
struct Costed {
    #[serde(flatten)]
    plan: PlanReport,
    bytes_per_rank: BytesReport,
    wire_bytes_per_token: WireReport,
}

impl Costed {
    fn new(registry: &Registry, config: &MoeConfig, plan: &Plan) -> Result<Self, Failure> {
        // The rank with the most experts has the largest buffers.
        let most =
            (0..config.ep_size() as u32).map(Rank).max_by_key(|&r| config.placement.num_local_experts(r));
        let bytes = registry.required_bytes(config, plan, most.unwrap_or(Rank(0))).or_refused()?;
        let wire = registry.comm(plan.comm()).or_refused()?.wire_bytes_per_token(config, plan);
        Ok(Self { plan: plan.into(), bytes_per_rank: bytes.into(), wire_bytes_per_token: wire.into() })
    }
}

/// Runs the command.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    if args.published {
        return published::run(args.json);
    }
    if let Some(machine) = &args.machine {
        return projection::run(args, machine);
    }
    let folder = args.checkpoint.as_deref().ok_or_else(|| anyhow!("--checkpoint is needed")).or_refused()?;
    let registry = layer::backends(&args.layer);
    let selection = layer::selection(&args.layer);
    // Names first: a misspelt backend is worth saying before a missing file.
    layer::check_names(&registry, selection)?;
    let checkpoint = Checkpoint::open(folder).or_refused()?;
    let stored = layer::open(&checkpoint, args.layer.layer)?;
    let config = layer::config(&stored, &args.layer, args.max_tokens)?;
    let config = Replicas::new(args.placement.as_deref(), stored.index(), config)?.config;
    let choice = layer::choose(&registry, &config, selection)?;
    let alternatives = choice.survey.fitting.iter().filter(|plan| **plan != choice.plan);
    let report = Report {
        layer: stored.index(),
        scheme: config.quant.to_string(),
        sort_policy: args.layer.sort_policy.name(),
        plan: Costed::new(&registry, &config, &choice.plan)?,
        alternatives: alternatives
            .map(|plan| Costed::new(&registry, &config, plan))
            .collect::<Result<_, _>>()?,
        rejected: choice.survey.refused.iter().map(Into::into).collect(),
    };
    if args.json {
        return print_json(&report).or_failed();
    }

    print(format_args!(
        "layer {} of {}: {}, EP {}, sort policy {}",
        report.layer,
        folder.display(),
        config.quant,
        config.ep_size(),
        report.sort_policy
    ))
    .or_failed()?;
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "",
        "all2all",
        "experts",
        "wire",
        "buffers per rank",
        "dispatch per token",
        "combine per token",
    ]);
    for (mark, plan) in [("chosen", &choice.plan)].into_iter().chain(
        choice.survey.fitting.iter().filter(|plan| **plan != choice.plan).map(|plan| ("also fits", plan)),
    ) {
        let most = registry.required_bytes(&config, plan, Rank(0)).or_refused()?;
        let wire = registry.comm(plan.comm()).or_refused()?.wire_bytes_per_token(&config, plan);
        table.add_row([
            mark.to_string(),
            plan.comm().to_string(),
            plan.experts().to_string(),
            plan.wire().to_string(),
            human_bytes(most.total() as f64),
            human_bytes(wire.dispatch),
            human_bytes(wire.combine),
        ]);
    }
    print(table).or_failed()?;
    for pair in &choice.survey.refused {
        print(format_args!("refused {} x {}:", pair.comm, pair.experts)).or_failed()?;
        for reason in &pair.reasons {
            print(format_args!("  {reason}")).or_failed()?;
        }
    }
    Ok(())
}
