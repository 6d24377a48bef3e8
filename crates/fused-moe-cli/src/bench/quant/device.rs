//! On a GPU: medians of graph replays, each of several calls on buffers that together are larger than the caches.

#![expect(unsafe_code, reason = "kernels are launched on addresses")]

use std::time::Duration;

use fused_moe::device::{DeviceBuffer, DeviceResult, Runtime, Stream};
use fused_moe::kernels::Kernels;
use fused_moe::kernels::quantize::{Quantize1x128, QuantizeBuffers};
use fused_moe::{Device, DeviceKind, ScaleOrder};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use super::{Report, Row};
use crate::args::{BenchQuantArgs, OnDevice};
use crate::bench::replays::{BEYOND_CACHES, CALLS, copy_rate, replays};
use crate::exit::{Failure, OrFailure};

/// Sets of buffers that calls take turns on.
const MAX_SETS: usize = 8;
/// Buffers of one call.
struct Set {
    input: DeviceBuffer,
    codes: DeviceBuffer,
    scales: DeviceBuffer,
}

pub fn measure(args: &BenchQuantArgs, on: OnDevice) -> Result<Report, Failure> {
    let kind = if on == OnDevice::Cuda { DeviceKind::Cuda } else { DeviceKind::Hip };
    let runtime = Runtime::open(Device { kind, index: 0 }).or_refused()?;
    let kernels = Kernels::load(&runtime).or_refused()?;
    let stream = runtime.stream().or_failed()?;
    let copy_gb_s = copy_rate(&runtime, &stream, args.reps).or_failed()?;
    let mut rows = Vec::new();
    for &tokens in &args.tokens {
        for (name, scales) in
            [("row-major", ScaleOrder::RowMajor), ("transposed", ScaleOrder::Transposed { stride: tokens })]
        {
            let format = kernels.arch().fp8();
            let job = Quantize1x128 {
                rows: tokens,
                hidden: args.hidden,
                input_stride: args.hidden,
                scales,
                format,
            };
            let times = time(&runtime, &kernels, &stream, &job, args.reps)?;
            rows.push(Row::new(args.hidden, tokens, name, times, copy_gb_s));
        }
    }
    let info = runtime.info().or_failed()?;
    Ok(Report {
        device: format!("{} ({}, driver {})", info.name, runtime.device(), info.driver_version),
        hidden: args.hidden,
        method: "medians of graph replays",
        copy_gb_s,
        rows,
    })
}

fn time(
    runtime: &Runtime,
    kernels: &Kernels,
    stream: &Stream,
    job: &Quantize1x128,
    reps: usize,
) -> Result<Vec<Duration>, Failure> {
    let bytes = job.rows * job.hidden * 3;
    let sets = (BEYOND_CACHES / bytes.max(1)).clamp(1, MAX_SETS);
    let scales = job.scale_len().or_refused()?;
    let sets: Vec<Set> = (0..sets as u64)
        .map(|seed| set(runtime, job, scales, seed))
        .collect::<DeviceResult<_>>()
        .or_failed()?;
    let launches = sets.iter().map(|set| {
        job.launch(QuantizeBuffers {
            input: set.input.address(),
            codes: set.codes.address(),
            scales: set.scales.address(),
            count: 0,
        })
    });
    let launches: Vec<_> = launches.collect::<Result<_, _>>().or_refused()?;
    let graph = stream.capture(|stream| {
        launches.iter().cycle().take(CALLS).try_for_each(|launch| {
            // SAFETY: the buffers are as large as the job says, and live until the graph is gone.
            unsafe { kernels.launch(launch, stream) }
        })
    });
    replays(runtime, stream, &graph.or_failed()?, (CALLS, reps)).or_failed()
}

fn set(runtime: &Runtime, job: &Quantize1x128, scales: usize, seed: u64) -> DeviceResult<Set> {
    let mut random = Pcg64::seed_from_u64(seed);
    // One row's worth of random numbers, turned for every row: drawing all of them would take longer than the bench.
    let values: Vec<u8> =
        (0..job.hidden).flat_map(|_| bf16::from_f32(random.random_range(-4.0..4.0)).to_le_bytes()).collect();
    let mut all = Vec::with_capacity(job.rows * values.len());
    for row in 0..job.rows {
        let (head, tail) = values.split_at(row * 16 % values.len());
        all.extend([tail, head].concat());
    }
    let mut input = runtime.alloc(all.len())?;
    input.write(&all)?;
    Ok(Set { input, codes: runtime.alloc(job.code_bytes())?, scales: runtime.alloc(scales * 4)? })
}
