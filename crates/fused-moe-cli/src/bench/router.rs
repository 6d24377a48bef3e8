//! `fmoe bench router`: logits to experts, weights and, on a GPU, the pairs of each expert.

mod device;
mod host;

use std::time::Duration;

use fused_moe::{ExpertGroups, RoutingConfig, RoutingMethod};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use serde::Serialize;

use crate::args::{BenchRouterArgs, OnDevice};
use crate::exit::{Failure, OrFailure, refused};
use crate::report::{print, print_json};

/// Groups of DeepSeek-V3, and those that a token may choose from.
const GROUPS: ExpertGroups = ExpertGroups { n_group: 8, topk_group: 4 };

#[derive(Serialize)]
struct Report {
    device: String,
    experts: usize,
    top_k: usize,
    /// What is measured, and how.
    method: &'static str,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    routing: &'static str,
    tokens: usize,
    /// Kernels of a call; 0 on the host.
    launches: usize,
    /// Median.
    us: f64,
    /// Fastest and slowest sample.
    us_spread: [f64; 2],
}

impl Row {
    fn new(routing: &'static str, tokens: usize, launches: usize, mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let us_spread = [us(times[0]), us(times[times.len() - 1])];
        Self { routing, tokens, launches, us: us(times[times.len() / 2]), us_spread }
    }
}

/// Runs the command.
pub fn run(args: &BenchRouterArgs) -> Result<(), Failure> {
    if let Some(tokens) = args.tokens.iter().find(|&&tokens| tokens == 0 || tokens > 1 << 17) {
        return refused(format!("--tokens {tokens}: at least 1 and at most {}", 1 << 17));
    }
    if args.experts == 0 || args.experts > 1 << 10 {
        return refused(format!("--experts {}: at least 1 and at most {}", args.experts, 1 << 10));
    }
    if args.reps == 0 {
        return refused("--reps 0: at least one sample is needed");
    }
    let configs: Vec<RoutingConfig> = args.routing.iter().map(|&routing| config(args, routing)).collect();
    let (device, method, rows) = match args.device {
        OnDevice::Host => {
            let rows = host::measure(args, &configs)?;
            ("host, one thread".to_owned(), "medians of calls; routed, not sorted", rows)
        }
        on => {
            let (device, rows) = device::measure(args, &configs, on)?;
            (device, "medians of graph replays; routed and sorted, logits in bf16", rows)
        }
    };
    let report = Report { device, experts: args.experts, top_k: args.top_k, method, rows };
    if args.json {
        return print_json(&report).or_failed();
    }
    let mut lines = vec![
        format!("{}, top {} of {}: {}", report.device, report.top_k, report.experts, report.method),
        "routing                tokens  launches         us".to_owned(),
    ];
    lines.extend(report.rows.iter().map(|row| {
        let Row { routing, tokens, launches, us, .. } = row;
        format!("{routing:<21} {tokens:>7} {launches:>9} {us:>10.2}")
    }));
    print(lines.join("\n")).or_failed()
}

/// The method as models have it: DeepSeek's with groups and a bias, others plain.
fn config(args: &BenchRouterArgs, method: RoutingMethod) -> RoutingConfig {
    use RoutingMethod as M;
    let is_grouped = matches!(method, M::DeepSeekV3 | M::GroupLimitedSoftmax | M::GroupLimitedSigmoid);
    let is_biased = matches!(method, M::DeepSeekV3 | M::MiniMax2 | M::BiasedSoftmax | M::SqrtSoftplus);
    let mut random = Pcg64::seed_from_u64(1);
    RoutingConfig {
        method,
        num_experts: args.experts,
        top_k: args.top_k,
        groups: is_grouped.then_some(GROUPS),
        renormalize: true,
        routed_scaling_factor: 1.0,
        correction_bias: is_biased
            .then(|| (0..args.experts).map(|_| random.random_range(-0.1..0.1)).collect()),
    }
}

/// Logits that bf16 holds.
fn logits(tokens: usize, experts: usize) -> Vec<bf16> {
    let mut random = Pcg64::seed_from_u64(2);
    (0..tokens * experts).map(|_| bf16::from_f32(random.random_range(-4.0..4.0))).collect()
}
