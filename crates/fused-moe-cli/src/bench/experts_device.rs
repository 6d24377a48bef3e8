//! `fmoe bench experts --device`: stage 3 on a GPU, from sorting to the weighted sum, by medians of graph replays. Weights are
//! larger than the caches; tokens arrive quantised, as after a dispatch, and outputs are bf16.

#![expect(unsafe_code, reason = "kernels are launched on addresses")]

use std::time::Duration;

use fused_moe::device::{DeviceBuffer, DeviceResult, Runtime, Stream};
use fused_moe::kernels::experts::{ExpertsCall, ExpertsShape, ExpertsWeights};
use fused_moe::kernels::grouped_gemm::{GemmScheme, TokenTile};
use fused_moe::kernels::{Float, Kernels, pack};
use fused_moe::quant::encode;
use fused_moe::{Device, DeviceKind, Fp8Format};
use half::bf16;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use serde::Serialize;

use super::experts::Shape;
use super::replays::{copy_rate, replays};
use crate::args::{BenchExpertsArgs, OnDevice, Quant};
use crate::exit::{Failure, OrFailure, refused};
use crate::report::{print, print_json};

#[derive(Serialize)]
struct Report {
    device: String,
    shape: String,
    /// The experts are those of one of so many ranks, each with the tokens of a row.
    slice_of: usize,
    /// Of all ranks' experts, per token.
    top_k: usize,
    method: &'static str,
    /// Bytes read and written per second by a copy that is larger than the caches.
    copy_gb_s: f64,
    rows: Vec<Row>,
}

#[derive(Clone, Serialize)]
struct Row {
    scheme: &'static str,
    tokens_per_rank: usize,
    /// Rows that go to an expert here, and pairs of a row and such an expert.
    received: usize,
    pairs: usize,
    tile: usize,
    /// Whether the heuristic would take this tile.
    is_chosen: bool,
    us: f64,
    us_spread: [f64; 2],
    /// Weights of experts that have pairs, read once, per second.
    weight_gb_s: f64,
    tflops: f64,
}

/// Runs the command for a device.
pub fn run(args: &BenchExpertsArgs, shape: &Shape, tokens: &[usize]) -> Result<(), Failure> {
    let kind = if args.device == OnDevice::Cuda { DeviceKind::Cuda } else { DeviceKind::Hip };
    let (ranks, top_k) = (args.slice_of, args.top_k.unwrap_or(shape.top_k));
    if ranks == 0 || top_k == 0 || top_k > ranks.saturating_mul(shape.experts) {
        return refused(format!(
            "--slice-of {ranks} --top-k {top_k}: {} experts on each rank",
            shape.experts
        ));
    }
    let quants = if args.quant.is_empty() {
        vec![Quant::None, Quant::Fp8Block, Quant::Fp8Ptpc]
    } else {
        args.quant.clone()
    };
    let schemes = quants.into_iter().map(scheme).collect::<Result<Vec<_>, _>>()?;
    let runtime = Runtime::open(Device { kind, index: 0 }).or_refused()?;
    let kernels = Kernels::load(&runtime).or_refused()?;
    let stream = runtime.stream().or_failed()?;
    let info = runtime.info().or_failed()?;
    let copy_gb_s = copy_rate(&runtime, &stream, args.reps).or_failed()?;
    let mut rows = Vec::new();
    for (scheme, name) in schemes {
        let shape = ExpertsShape {
            arch: kernels.arch(),
            scheme,
            hidden: shape.hidden,
            intermediate: shape.intermediate,
            top_k,
            experts: shape.experts,
            num_experts: shape.experts * ranks,
            products: Float::Bf16,
            out: Float::Bf16,
            compute_units: info.compute_units,
        };
        let bench = Bench { runtime: &runtime, kernels: &kernels, stream: &stream, shape, name };
        let weights = bench.weights().or_failed()?;
        for &tokens in tokens {
            rows.extend(bench.measure(&weights, tokens, ranks, args.reps)?);
        }
    }
    let report = Report {
        device: format!("{} ({}, driver {})", info.name, runtime.device(), info.driver_version),
        shape: shape.name.clone(),
        slice_of: ranks,
        top_k,
        method: "medians of graph replays",
        copy_gb_s,
        rows,
    };
    if args.json { print_json(&report).or_failed() } else { print(text(&report)).or_failed() }
}

fn scheme(quant: Quant) -> Result<(GemmScheme, &'static str), Failure> {
    match quant {
        Quant::None => Ok((GemmScheme::Bf16, "bf16")),
        Quant::Fp8Block => Ok((GemmScheme::Fp8Block, "fp8 block")),
        Quant::Fp8Ptpc => Ok((GemmScheme::Fp8Row, "fp8 PTPC")),
        other => refused(format!("--quant {other:?}: devices run none, fp8-block and fp8-ptpc so far")),
    }
}

fn text(report: &Report) -> String {
    let Report { device, shape, slice_of, top_k, method, copy_gb_s, rows } = report;
    let mut lines = vec![
        format!(
            "{device}, {shape} as one of {slice_of} ranks, top-{top_k}: {method}; a copy moves {copy_gb_s:.0} GB/s"
        ),
        "scheme     tokens  received   pairs  tile         us  weights GB/s  TFLOP/s".to_owned(),
    ];
    lines.extend(rows.iter().map(|row| {
        let Row { scheme, tokens_per_rank, received, pairs, tile, us, weight_gb_s, tflops, .. } = row;
        let chosen = if row.is_chosen { "*" } else { " " };
        format!(
            "{scheme:<9} {tokens_per_rank:>7} {received:>9} {pairs:>7} {tile:>4}{chosen} {us:>10.1} {weight_gb_s:>13.0} {tflops:>8.0}"
        )
    }));
    lines.push("* the tile that the heuristic takes".to_owned());
    lines.join("\n")
}

struct Bench<'b> {
    runtime: &'b Runtime,
    kernels: &'b Kernels,
    stream: &'b Stream,
    shape: ExpertsShape,
    name: &'static str,
}

/// Random weights, packed as they are: what is timed does not depend on which number is where.
struct Weights {
    gate_up: DeviceBuffer,
    gate_up_map: DeviceBuffer,
    gate_up_scales: DeviceBuffer,
    down: DeviceBuffer,
    down_map: DeviceBuffer,
    down_scales: DeviceBuffer,
    /// What they repeat.
    piece: Vec<u8>,
}

impl Bench<'_> {
    /// Bytes of one expert.
    fn expert_bytes(&self) -> usize {
        3 * self.shape.hidden * self.shape.intermediate * self.shape.scheme.bytes()
    }

    fn weights(&self) -> DeviceResult<Weights> {
        let ExpertsShape { hidden, intermediate, experts, .. } = self.shape;
        let mut random = Pcg64::seed_from_u64(7);
        // Drawing all of them would take longer than the bench: a piece of odd length is repeated.
        let piece = self.codes(&mut random, (32 << 20) - 4094);
        let scales: Vec<u8> =
            (0..1 << 20).flat_map(|_| random.random_range(1e-4..2e-4_f32).to_le_bytes()).collect();
        let bytes = self.expert_bytes() / 3 * experts;
        // As many scales as any scheme has.
        let most = |n: usize, k: usize| experts * (n / 128 * k.div_ceil(128) * 2).max(n) * 4;
        let (gate_up, down) = (self.filled(2 * bytes, &piece)?, self.filled(bytes, &piece)?);
        Ok(Weights {
            gate_up_map: pack::map(self.runtime, &gate_up)?,
            gate_up,
            gate_up_scales: self.filled(most(2 * intermediate, hidden), &scales)?,
            down_map: pack::map(self.runtime, &down)?,
            down,
            down_scales: self.filled(most(hidden, intermediate), &scales)?,
            piece,
        })
    }

    /// Normally distributed numbers, as weights and activations are: of what is multiplied depends how much power it takes, and
    /// on that the clock.
    fn codes(&self, random: &mut Pcg64, bytes: usize) -> Vec<u8> {
        // Of twelve uniform numbers, the sum has a deviation of one.
        let mut normal = || (0..12).map(|_| random.random_range(-0.5..0.5_f32)).sum::<f32>();
        match self.shape.scheme {
            GemmScheme::Bf16 => {
                (0..bytes / 2).flat_map(|_| bf16::from_f32(0.02 * normal()).to_le_bytes()).collect()
            }
            _ => (0..bytes).map(|_| encode(Fp8Format::E4M3Fn, 60.0 * normal())).collect(),
        }
    }

    /// A row for every tile that is near the one that the heuristic takes.
    fn measure(
        &self,
        weights: &Weights,
        tokens: usize,
        ranks: usize,
        reps: usize,
    ) -> Result<Vec<Row>, Failure> {
        let ExpertsShape { hidden, intermediate, top_k, experts, num_experts, .. } = self.shape;
        let mut random = Pcg64::seed_from_u64(tokens as u64);
        let all = (0..tokens * ranks).map(|_| {
            index::sample(&mut random, num_experts, top_k).into_iter().map(|id| id as i32).collect::<Vec<_>>()
        });
        let is_here = |id: &i32| (*id as usize) < experts;
        let ids: Vec<i32> = all.filter(|row| row.iter().any(is_here)).flatten().collect();
        let (received, pairs) = (ids.len() / top_k, ids.iter().filter(|id| is_here(id)).count());
        let active = (0..experts as i32).filter(|id| ids.contains(id)).count();

        // Local experts are the first; the others are elsewhere.
        let map: Vec<i32> = (0..num_experts).map(|id| if id < experts { id as i32 } else { -1 }).collect();
        let integers =
            |values: &[i32]| self.upload(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>());
        let floats = |len: usize, value: f32| {
            self.upload(&vec![value; len].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
        };
        let (ids, map, codes) = (
            integers(&ids).or_failed()?,
            integers(&map).or_failed()?,
            self.filled(received * hidden * self.shape.scheme.bytes(), &weights.piece).or_failed()?,
        );
        let token_scales = floats(received * hidden.div_ceil(128), 0.01).or_failed()?;
        let router_weights = floats(received * top_k, 0.125).or_failed()?;
        let workspace = self.runtime.alloc(self.shape.workspace_bytes(received)).or_failed()?;
        let out = self.runtime.alloc(received * hidden * self.shape.out.bytes()).or_failed()?;
        let chosen = TokenTile::for_pairs(pairs, experts);
        let near = |tile: &&TokenTile| (**tile as i32 - chosen as i32).abs() <= 1;
        let mut rows = Vec::new();
        for &tile in TokenTile::ALL.iter().filter(near) {
            let launches = self.shape.launches(
                ExpertsWeights {
                    gate_up: weights.gate_up.address(),
                    gate_up_map: weights.gate_up_map.address(),
                    gate_up_scales: weights.gate_up_scales.address(),
                    down: weights.down.address(),
                    down_map: weights.down_map.address(),
                    down_scales: weights.down_scales.address(),
                },
                ExpertsCall {
                    rows: received,
                    tokens: codes.address(),
                    token_scales: token_scales.address(),
                    ids: ids.address(),
                    weights: router_weights.address(),
                    map: map.address(),
                    workspace: workspace.address(),
                    out: out.address(),
                    tile,
                },
            );
            let launches = launches.or_refused()?;
            // Milliseconds of work in a replay.
            let calls = (4000 / (pairs / 8 + 300)).clamp(1, 20);
            let graph = self.stream.capture(|stream| {
                // SAFETY: all buffers are as large as the shape says, and live until the graph is gone.
                (0..calls).try_for_each(|_| unsafe { launches.enqueue(self.kernels, stream) })
            });
            let graph = graph.or_failed()?;
            let mut times = replays(self.runtime, self.stream, &graph, (calls, reps)).or_failed()?;
            times.sort_unstable();
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            let median = us(times[times.len() / 2]);
            rows.push(Row {
                scheme: self.name,
                tokens_per_rank: tokens,
                received,
                pairs,
                tile: tile.tokens(),
                is_chosen: tile == chosen,
                us: median,
                us_spread: [us(times[0]), us(times[times.len() - 1])],
                weight_gb_s: (active * self.expert_bytes()) as f64 / median / 1e3,
                tflops: 6.0 * (pairs * hidden * intermediate) as f64 / median / 1e6,
            });
        }
        Ok(rows)
    }

    /// `piece` over and over.
    fn filled(&self, bytes: usize, piece: &[u8]) -> DeviceResult<DeviceBuffer> {
        let mut buffer = self.runtime.alloc(bytes)?;
        for at in (0..bytes).step_by(piece.len()) {
            buffer.write_at(at, &piece[..piece.len().min(bytes - at)])?;
        }
        Ok(buffer)
    }

    fn upload(&self, bytes: &[u8]) -> DeviceResult<DeviceBuffer> {
        let mut buffer = self.runtime.alloc(bytes.len())?;
        buffer.write(bytes)?;
        Ok(buffer)
    }
}
