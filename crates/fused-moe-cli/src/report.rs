//! Plans and runs as JSON, the same objects in every command.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use anyhow::Context;
use fused_moe::transport::Traffic;
use fused_moe::{KernelBytes, Plan, RefusedPair, WireBytes};
use serde::Serialize;

use crate::ep::Times;

/// A negotiated pair.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    all2all: &'static str,
    experts: &'static str,
    kind: &'static str,
    format: &'static str,
    wire: String,
    weight_and_reduce: &'static str,
    combine_quant: String,
    max_rows: usize,
}

impl From<&Plan> for PlanReport {
    fn from(plan: &Plan) -> Self {
        Self {
            all2all: plan.comm(),
            experts: plan.experts(),
            kind: plan.kind().name(),
            format: plan.format().name(),
            wire: plan.wire().to_string(),
            weight_and_reduce: plan.weight_and_reduce().name(),
            combine_quant: plan.combine_wire().to_string(),
            max_rows: plan.max_rows(),
        }
    }
}

/// A pair that does not fit.
#[derive(Clone, Debug, Serialize)]
pub struct RejectedReport {
    all2all: &'static str,
    experts: &'static str,
    reasons: Vec<ReasonReport>,
}

/// One reason why.
#[derive(Clone, Debug, Serialize)]
pub struct ReasonReport {
    axis: &'static str,
    wanted: String,
    found: String,
}

impl From<&RefusedPair> for RejectedReport {
    fn from(pair: &RefusedPair) -> Self {
        let reason = |r: &fused_moe::Unsupported| ReasonReport {
            axis: r.axis.name(),
            wanted: r.wanted.clone(),
            found: r.offered.clone(),
        };
        Self { all2all: pair.comm, experts: pair.experts, reasons: pair.reasons.iter().map(reason).collect() }
    }
}

/// Bytes of buffers on one rank.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BytesReport {
    comm: usize,
    workspace: usize,
    expert_out: usize,
    total: usize,
}

impl From<KernelBytes> for BytesReport {
    fn from(bytes: KernelBytes) -> Self {
        let KernelBytes { comm, workspace, expert_out } = bytes;
        Self { comm, workspace, expert_out, total: bytes.total() }
    }
}

/// Expected bytes per token between ranks.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct WireReport {
    dispatch: f64,
    combine: f64,
}

impl From<WireBytes> for WireReport {
    fn from(wire: WireBytes) -> Self {
        Self { dispatch: wire.dispatch, combine: wire.combine }
    }
}

/// Milliseconds per stage, of all ranks the longest.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TimesReport {
    router: f64,
    dispatch: f64,
    experts: f64,
    combine: f64,
    shared_experts: f64,
    total: f64,
}

impl From<Times> for TimesReport {
    fn from(times: Times) -> Self {
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        Self {
            router: ms(times.router),
            dispatch: ms(times.stages.dispatch),
            experts: ms(times.stages.experts),
            combine: ms(times.stages.combine),
            shared_experts: ms(times.shared),
            total: ms(times.total),
        }
    }
}

/// What the transport counted, over all ranks.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TrafficReport {
    remote_bytes: u64,
    internode_bytes: u64,
    local_bytes: u64,
    transfers: u64,
    signals: u64,
}

impl From<Traffic> for TrafficReport {
    fn from(traffic: Traffic) -> Self {
        Self {
            remote_bytes: traffic.remote_bytes,
            internode_bytes: traffic.internode_bytes,
            local_bytes: traffic.local_bytes,
            transfers: traffic.remote_puts,
            signals: traffic.signals,
        }
    }
}

/// Prints `text` and a line end on stdout.
///
/// A reader that has seen enough (`fmoe matrix | head`) is no error; a full disk is one.
pub fn print(text: impl Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => done.context("cannot write to stdout"),
    }
}

/// Prints `value` as one JSON object on stdout.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(serde_json::to_string_pretty(value)?)
}

/// `bytes` in the unit that a person would choose.
pub fn human_bytes(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", units[unit]) }
}
