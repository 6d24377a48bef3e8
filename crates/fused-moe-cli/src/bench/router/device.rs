//! On a GPU: medians of graph replays, each of several calls.

#![expect(unsafe_code, reason = "kernels are launched on addresses")]

use fused_moe::device::{DeviceBuffer, DeviceResult, Runtime, Stream};
use fused_moe::kernels::router::{FusedRouter, RouterBuffers};
use fused_moe::kernels::{Float, Kernels};
use fused_moe::{Device, DeviceKind, RoutingConfig};

use super::{Row, logits};
use crate::args::{BenchRouterArgs, OnDevice};
use crate::bench::replays::{CALLS, replays};
use crate::exit::{Failure, OrFailure};

/// What the device is, and the rows.
pub fn measure(
    args: &BenchRouterArgs,
    configs: &[RoutingConfig],
    on: OnDevice,
) -> Result<(String, Vec<Row>), Failure> {
    let kind = if on == OnDevice::Cuda { DeviceKind::Cuda } else { DeviceKind::Hip };
    let runtime = Runtime::open(Device { kind, index: 0 }).or_refused()?;
    let kernels = Kernels::load(&runtime).or_refused()?;
    let stream = runtime.stream().or_failed()?;
    let info = runtime.info().or_failed()?;
    let mut rows = Vec::new();
    for config in configs {
        let router = FusedRouter::new(config, Float::Bf16, args.experts, info.compute_units).or_refused()?;
        for &tokens in &args.tokens {
            let buffers = buffers(&runtime, &stream, &router, config, tokens).or_failed()?;
            let [logits, bias, ids, weights, fault, workspace, offsets, pair_rows, positions] =
                buffers.each_ref().map(DeviceBuffer::address);
            let launches = router.launches(
                tokens,
                RouterBuffers {
                    logits,
                    bias,
                    ids,
                    weights,
                    fault,
                    workspace,
                    map: 0,
                    offsets,
                    pair_rows,
                    positions,
                },
            );
            let launches = launches.or_refused()?;
            let graph = stream.capture(|stream| {
                // SAFETY: the buffers are as large as the router says, and live until the graph is gone; nothing else runs.
                (0..CALLS).try_for_each(|_| unsafe { launches.enqueue(&kernels, stream) })
            });
            let times = replays(&runtime, &stream, &graph.or_failed()?, (CALLS, args.reps)).or_failed()?;
            let count = 1 + usize::from(launches.sort.is_some());
            rows.push(Row::new(config.method.name(), tokens, count, times));
        }
    }
    Ok((format!("{} ({}, driver {})", info.name, runtime.device(), info.driver_version), rows))
}

/// In the order of [`RouterBuffers`], without a map.
fn buffers(
    runtime: &Runtime,
    stream: &Stream,
    router: &FusedRouter,
    config: &RoutingConfig,
    tokens: usize,
) -> DeviceResult<[DeviceBuffer; 9]> {
    let (experts, slots) = (config.num_experts, tokens * config.top_k * 4);
    let upload = |bytes: Vec<u8>| {
        let mut buffer = runtime.alloc(bytes.len())?;
        buffer.write(&bytes)?;
        Ok(buffer)
    };
    let bias = config.correction_bias.clone().unwrap_or_else(|| vec![0.0; experts]);
    let mut workspace = runtime.alloc(router.workspace_bytes())?;
    workspace.fill(0, stream)?;
    Ok([
        upload(logits(tokens, experts).iter().flat_map(|l| l.to_le_bytes()).collect())?,
        upload(bias.iter().flat_map(|b| b.to_le_bytes()).collect())?,
        runtime.alloc(slots)?,
        runtime.alloc(slots)?,
        runtime.alloc(4)?,
        workspace,
        runtime.alloc((experts + 1) * 4)?,
        runtime.alloc(slots)?,
        runtime.alloc(slots)?,
    ])
}
