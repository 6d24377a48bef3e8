//! `fmoe plan --published`: figures of others beside the cost model, and what part of a reported gain is communication.

use fused_moe::Protocol;
use moe_cost::Machine;
use moe_cost::published::{Figure, figures};
use moe_cost::vllm_28664::Gain;
use serde::Serialize;

use crate::exit::{Failure, OrFailure};
use crate::report::{print, print_json};

#[derive(Serialize)]
struct Report {
    figures: Vec<FigureReport>,
    vllm_28664: Vec<GainReport>,
}

#[derive(Serialize)]
struct FigureReport {
    what: String,
    source: String,
    machine: String,
    half: &'static str,
    ranks: usize,
    tokens: usize,
    unit: &'static str,
    published: f64,
    model: f64,
    error: f64,
    role: &'static str,
}

impl From<Figure> for FigureReport {
    fn from(figure: Figure) -> Self {
        Self {
            error: figure.error(),
            what: figure.what,
            source: figure.source,
            machine: figure.machine,
            half: figure.half.name(),
            ranks: figure.ranks,
            tokens: figure.tokens,
            unit: figure.unit.name(),
            published: figure.published,
            model: figure.model,
            role: figure.role.name(),
        }
    }
}

/// Ranges are the lower end, the middle and the upper end of the constants.
#[derive(Serialize)]
struct GainReport {
    ranks: usize,
    throughput: f64,
    tpot_ratio: f64,
    naive_layer_us: [f64; 3],
    mori_layer_us: f64,
    tpot_ratio_by_communication: [f64; 3],
    share_of_gain: [f64; 3],
    over_allgather_reducescatter_v1: f64,
    over_allgather_reducescatter_v1ll: f64,
}

impl GainReport {
    fn new(gain: &Gain, machine: &Machine) -> Result<Self, Failure> {
        Ok(Self {
            ranks: gain.ranks,
            throughput: gain.throughput,
            tpot_ratio: gain.published(),
            naive_layer_us: gain.naive_layer_us,
            mori_layer_us: gain.mori_layer_us(),
            tpot_ratio_by_communication: gain.by_communication(),
            share_of_gain: gain.share(),
            over_allgather_reducescatter_v1: gain.over_all_gather(machine, Protocol::TWO_HOP).or_failed()?,
            over_allgather_reducescatter_v1ll: gain
                .over_all_gather(machine, Protocol::TWO_HOP_LOW_LATENCY)
                .or_failed()?,
        })
    }
}

/// Prints both.
pub fn run(json: bool) -> Result<(), Failure> {
    let machine = Machine::named("mi300x").or_failed()?;
    let gains = Gain::all().iter().map(|gain| GainReport::new(gain, &machine)).collect::<Result<_, _>>()?;
    let report = Report { figures: figures().into_iter().map(Into::into).collect(), vllm_28664: gains };
    if json {
        return print_json(&report).or_failed();
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "machine", "EP", "", "tokens", "unit", "published", "model", "error", ""]);
    for row in &report.figures {
        table.add_row([
            row.what.clone(),
            row.machine.clone(),
            row.ranks.to_string(),
            row.half.to_string(),
            row.tokens.to_string(),
            row.unit.to_string(),
            format!("{:.0}", row.published),
            format!("{:.0}", row.model),
            format!("{:+.0} %", row.error * 100.0),
            row.role.to_string(),
        ]);
    }
    print(table).or_failed()?;
    for gain in &report.vllm_28664 {
        let [low, middle, high] = gain.share_of_gain.map(|share| share * 100.0);
        let [fast, mean, slow] = gain.tpot_ratio_by_communication;
        print(format_args!(
            "vLLM PR 28664, EP{}: {:.2} x the throughput of naive, {:.2} x by time per output token. By communication \
             alone {mean:.2} x ({fast:.2} to {slow:.2}): {middle:.0} % of the gain ({low:.0} to {high:.0} %). Against \
             allgather_reducescatter {:.2} x with V1, {:.2} x with V1LL.",
            gain.ranks,
            gain.throughput,
            gain.tpot_ratio,
            gain.over_allgather_reducescatter_v1,
            gain.over_allgather_reducescatter_v1ll
        ))
        .or_failed()?;
    }
    Ok(())
}
