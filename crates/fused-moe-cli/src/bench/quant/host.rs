//! On the host: the crate `quant`, row by row, on one thread.

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::Context;
use fused_moe::transport::probe::{Stores, copy_bandwidth};
use fused_moe::{Fp8Format, Granularity};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use super::{Report, Row};
use crate::args::BenchQuantArgs;
use crate::bench::clock::Clock;

pub fn measure(args: &BenchQuantArgs) -> anyhow::Result<Report> {
    let (hidden, clock) = (args.hidden, Clock::for_threads(1));
    let rows = NonZeroUsize::new((128 << 20) / (hidden * 2)).unwrap_or(NonZeroUsize::MIN);
    let copy = |stores| copy_bandwidth(NonZeroUsize::MIN, rows, hidden * 2, stores);
    let copy_gb_s = 2.0 * copy(Stores::Ordinary).max(copy(Stores::NonTemporal)) / 1e9;
    let granularity = Granularity::Group(NonZeroUsize::new(128).context("128 is not 0")?);
    let quantizer = fused_moe::quant::RowQuantizer::new(Fp8Format::E4M3Fn);
    let groups = hidden.div_ceil(128);
    let mut random = Pcg64::seed_from_u64(1);
    let mut measured = Vec::new();
    for &tokens in &args.tokens {
        let input: Vec<bf16> =
            (0..tokens * hidden).map(|_| bf16::from_f32(random.random_range(-4.0..4.0))).collect();
        let (mut codes, mut scales) = (vec![0; tokens * hidden], vec![0.0; tokens * groups]);
        let mut call = || -> anyhow::Result<()> {
            for ((row, codes), scales) in
                input.chunks(hidden).zip(codes.chunks_mut(hidden)).zip(scales.chunks_mut(groups))
            {
                quantizer.quantize_per_group(row, granularity, codes, scales)?;
            }
            Ok(())
        };
        call()?;
        let times: Vec<Duration> = (0..args.reps)
            .map(|_| {
                let (took, done) = clock.time(&mut call);
                done.map(|()| took)
            })
            .collect::<anyhow::Result<_>>()?;
        measured.push(Row::new(hidden, tokens, "row-major", times, copy_gb_s));
    }
    Ok(Report {
        device: "host, one thread".into(),
        hidden,
        method: "medians of calls",
        copy_gb_s,
        rows: measured,
    })
}
