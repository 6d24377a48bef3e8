//! `fmoe eplb`: from recorded loads to a placement that balances them.

mod files;
mod replicas;

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use fused_moe::router::eplb::{Balance, Demand, Proposal, ReplicaTable, Strategy, propose};
use serde::Serialize;

use crate::exit::{Failure, OrFailure, refused};
use crate::report::{print, print_json};
use crate::tokens::OutputFile;

pub use files::{LoadFile, PlacementFile, to_json};
pub use replicas::{Recorded, Replicas};

/// More ranks than any group has; the work of a proposal grows with them.
const MAX_RANKS: usize = 4096;

/// How experts are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Spread {
    /// Hierarchical where there are several nodes and the groups fit them, greedy elsewhere.
    Auto,
    /// Replicas of the heaviest experts over all ranks.
    Greedy,
    /// Groups of experts onto nodes first, then replicas inside every node.
    Hierarchical,
}

/// Arguments of `fmoe eplb`.
#[derive(Clone, Debug, Args)]
pub struct EplbArgs {
    /// File that `fmoe run --record-load` wrote; given several times, their loads are added up.
    #[arg(long, value_name = "FILE", required = true)]
    pub load: Vec<PathBuf>,
    /// Ranks that share the experts.
    #[arg(long, value_name = "R")]
    pub ranks: usize,
    /// Nodes that the ranks are on.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub nodes: usize,
    /// Experts that every rank has room for; one more than it needs without replicas if not given.
    #[arg(long, value_name = "S")]
    pub slots: Option<usize>,
    /// Groups of the router; those of the load file, or 1, if not given.
    #[arg(long, value_name = "G")]
    pub groups: Option<usize>,
    /// How experts are spread.
    #[arg(long, value_enum, default_value_t = Spread::Auto)]
    pub strategy: Spread,
    /// File to write, for `fmoe run --placement`.
    #[arg(long, value_name = "PLACEMENT.json")]
    pub output: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    num_experts: usize,
    ranks: usize,
    slots_per_rank: usize,
    nodes: usize,
    groups: usize,
    layers: Vec<LayerReport>,
}

#[derive(Serialize)]
struct LayerReport {
    layer: usize,
    method: &'static str,
    fallback: Vec<String>,
    before: BalanceReport,
    after: BalanceReport,
    changed_slots: usize,
    physical_to_logical: Vec<u32>,
}

/// How evenly a load lies on the ranks.
#[derive(Clone, Debug, Serialize)]
pub struct BalanceReport {
    /// The largest load over the mean.
    pub max_over_mean: f64,
    /// (token, expert) pairs.
    pub per_rank: Vec<f64>,
}

impl From<&Balance> for BalanceReport {
    fn from(balance: &Balance) -> Self {
        Self { max_over_mean: balance.max_over_mean(), per_rank: balance.per_rank().to_vec() }
    }
}

/// Runs the command.
pub fn run(args: &EplbArgs) -> Result<(), Failure> {
    let output = args.output.as_deref().map(OutputFile::check).transpose().or_refused()?;
    let files: Vec<(&Path, LoadFile)> =
        every(&args.load, |path| Ok((path.as_path(), LoadFile::read(path)?)))?;
    let loads = LoadFile::sum(&files).or_refused()?;
    let (num_experts, groups) = (files[0].1.num_experts, files[0].1.groups);
    let groups = args.groups.or(groups).unwrap_or(1);
    check(args, num_experts, groups)?;
    let slots_per_rank = args.slots.unwrap_or(num_experts.div_ceil(args.ranks) + 1);
    let strategy = match args.strategy {
        Spread::Auto => Strategy::Auto,
        Spread::Greedy => Strategy::Greedy,
        Spread::Hierarchical => Strategy::Hierarchical,
    };
    let (ranks, nodes) = (args.ranks, args.nodes);
    let mut report = Report { num_experts, ranks, slots_per_rank, nodes, groups, layers: Vec::new() };
    let mut placement = PlacementFile::new(num_experts, ranks, slots_per_rank);
    for (&layer, load) in &loads {
        let demand = Demand { load, ranks, slots_per_rank, nodes, groups, strategy, current: None };
        let proposal = propose(&demand).or_refused()?;
        placement.push(layer, &proposal.table);
        report.layers.push(layer_report(layer, &proposal).or_failed()?);
    }
    let staged = output.as_ref().map(|file| file.stage_bytes(&to_json(&placement)?));
    let staged = staged.transpose().or_failed()?;
    if args.json { print_json(&report) } else { print_table(&report) }.or_failed()?;
    // Last, so that a report that cannot be printed leaves no file behind.
    staged.map_or(Ok(()), |staged| staged.commit()).or_failed()
}

/// All results of `read`, or every error.
fn every<'p, T>(
    paths: &'p [PathBuf],
    read: impl Fn(&'p PathBuf) -> anyhow::Result<T>,
) -> Result<Vec<T>, Failure> {
    let (mut read_well, mut why) = (Vec::new(), Vec::new());
    for result in paths.iter().map(read) {
        match result {
            Ok(value) => read_well.push(value),
            Err(error) => why.push(format!("{error:#}")),
        }
    }
    if why.is_empty() { Ok(read_well) } else { refused(why.join("; ")) }
}

/// Refuses sizes that no placement has, with every reason.
fn check(args: &EplbArgs, num_experts: usize, groups: usize) -> Result<(), Failure> {
    let mut why = Vec::new();
    for (name, value) in [("--ranks", args.ranks), ("--nodes", args.nodes), ("--groups", groups)] {
        if value == 0 {
            why.push(format!("{name} 0: at least one is needed"));
        }
    }
    if args.ranks > MAX_RANKS {
        why.push(format!("--ranks {}: at most {MAX_RANKS}", args.ranks));
    }
    if let Some(slots) = args.slots {
        if args.ranks.saturating_mul(slots) < num_experts {
            let ranks = args.ranks;
            why.push(format!(
                "--slots {slots}: {ranks} ranks with so many do not hold {num_experts} experts"
            ));
        }
        if slots > num_experts {
            why.push(format!("--slots {slots}: a rank with {num_experts} holds every expert"));
        }
    }
    if why.is_empty() { Ok(()) } else { refused(why.join("; ")) }
}

fn layer_report(layer: usize, proposal: &Proposal) -> anyhow::Result<LayerReport> {
    let table = &proposal.table;
    let redundant = table.num_physical() - table.num_logical();
    let identity = ReplicaTable::identity(table.num_logical(), redundant).context("an identity table")?;
    Ok(LayerReport {
        layer,
        method: proposal.method.name(),
        fallback: proposal.fallback.iter().map(ToString::to_string).collect(),
        before: (&proposal.before).into(),
        after: (&proposal.after).into(),
        changed_slots: identity.changed_slots(table).count(),
        physical_to_logical: table.physical_to_logical().to_vec(),
    })
}

fn print_table(report: &Report) -> anyhow::Result<()> {
    let Report { num_experts, ranks, slots_per_rank, nodes, .. } = report;
    let redundant = ranks * slots_per_rank - num_experts;
    print(format_args!(
        "{num_experts} experts and {redundant} replicas in {slots_per_rank} slots on each of {ranks} ranks, {nodes} \
         nodes"
    ))?;
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(["layer", "method", "max/mean before", "max/mean predicted", "slots that change"]);
    for layer in &report.layers {
        table.add_row([
            layer.layer.to_string(),
            layer.method.to_string(),
            format!("{:.3}", layer.before.max_over_mean),
            format!("{:.3}", layer.after.max_over_mean),
            layer.changed_slots.to_string(),
        ]);
    }
    print(table)?;
    let first = report.layers.first().ok_or_else(|| anyhow!("a load file has layers"))?;
    // It follows from the sizes, so it is the same for every layer.
    for why in &first.fallback {
        print(format_args!("not hierarchical: {why}"))?;
    }
    Ok(())
}
