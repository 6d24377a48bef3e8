//! `fmoe bench quant`: bf16 activations to FP8 with one scale per 128 columns, beside a copy on the same device.

mod device;
mod host;

use std::time::Duration;

use serde::Serialize;

use crate::args::{BenchQuantArgs, OnDevice};
use crate::exit::{Failure, OrFailure, refused};
use crate::report::{print, print_json};

#[derive(Serialize)]
struct Report {
    device: String,
    hidden: usize,
    /// How times were taken.
    method: &'static str,
    /// Bytes read and written per second by a copy that is larger than the caches.
    copy_gb_s: f64,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    tokens: usize,
    scales: &'static str,
    /// Median.
    us: f64,
    /// Fastest and slowest sample.
    us_spread: [f64; 2],
    /// Bytes of input, codes and scales per second.
    gb_s: f64,
    of_copy: f64,
}

impl Row {
    fn new(
        hidden: usize,
        tokens: usize,
        scales: &'static str,
        mut times: Vec<Duration>,
        copy_gb_s: f64,
    ) -> Self {
        times.sort_unstable();
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let bytes = tokens * (hidden * 3 + hidden.div_ceil(128) * 4);
        let median = us(times[times.len() / 2]);
        let gb_s = if median > 0.0 { bytes as f64 / median / 1e3 } else { 0.0 };
        let us_spread = [us(times[0]), us(times[times.len() - 1])];
        Self { tokens, scales, us: median, us_spread, gb_s, of_copy: gb_s / copy_gb_s }
    }
}

/// Runs the command.
pub fn run(args: &BenchQuantArgs) -> Result<(), Failure> {
    if args.hidden == 0 || !args.hidden.is_multiple_of(8) || args.hidden > 1 << 20 {
        return refused(format!("--hidden {}: a multiple of 8, at most {}", args.hidden, 1 << 20));
    }
    if let Some(tokens) = args.tokens.iter().find(|&&tokens| tokens == 0 || tokens > 1 << 20) {
        return refused(format!("--tokens {tokens}: at least 1 and at most {}", 1 << 20));
    }
    if args.reps == 0 {
        return refused("--reps 0: at least one sample is needed");
    }
    let report = match args.device {
        OnDevice::Host => host::measure(args).or_failed()?,
        device => device::measure(args, device)?,
    };
    if args.json {
        return print_json(&report).or_failed();
    }
    let mut lines = vec![
        format!(
            "{}, hidden {}: {}; a copy moves {:.0} GB/s",
            report.device, report.hidden, report.method, report.copy_gb_s
        ),
        "tokens  scales           us     GB/s  of a copy".to_owned(),
    ];
    lines.extend(report.rows.iter().map(|row| {
        let Row { tokens, scales, us, gb_s, of_copy, .. } = row;
        format!("{tokens:>6}  {scales:<10} {us:>8.2} {gb_s:>8.0} {of_copy:>10.2}")
    }));
    print(lines.join("\n")).or_failed()
}
