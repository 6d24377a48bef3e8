//! Stage 3 on the device against sums in f64, which quantise where the layer does.

use libtest_mimic::Failed;
use moe_kernels::experts::{ExpertsCall, ExpertsShape, ExpertsWeights};
use moe_kernels::grouped_gemm::{GemmScheme, TokenTile};
use moe_kernels::{Float, pack};
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use crate::reference::{Layer, Tokens};
use crate::{Gpu, OnGpu};

pub const TESTS: [(&str, OnGpu); 5] = [
    ("experts_bf16", |gpu| layers(gpu, GemmScheme::Bf16)),
    ("experts_fp8_block", |gpu| layers(gpu, GemmScheme::Fp8Block)),
    ("experts_fp8_row", |gpu| layers(gpu, GemmScheme::Fp8Row)),
    ("experts_with_products_in_bf16", rounded_products),
    ("experts_are_not_right_with_wrong_scales", wrong_scales),
];

/// Relative L2 error of the whole that a right layer stays below; `stages` judges each stage far more closely. FP8: tensor cores sum 128 products in less than f32, so an activation
/// near the middle of two codes may go to either, which is an eighth of it at most and happens to some; a call of one row has
/// few over which that evens out. A wrong scale or row is an error of the size of the output.
const TOLERANCE_BF16: f64 = 2e-3;
const TOLERANCE_FP8: f64 = 4e-2;

const NUM_EXPERTS: usize = 12;
/// Local experts of the global ones; others are elsewhere. One of those here gets no token.
pub const MAP: [i32; NUM_EXPERTS] = [3, -1, 0, -1, 1, 5, -1, 2, -1, 4, -1, -1];
const EXPERTS: usize = 6;
const UNUSED: usize = 5;
const TOP_K: usize = 3;
const POISON: u8 = 0xff;

pub fn shape(gpu: &Gpu, scheme: GemmScheme) -> Result<ExpertsShape, Failed> {
    Ok(ExpertsShape {
        arch: gpu.kernels.arch(),
        scheme,
        hidden: 640,
        intermediate: 384,
        top_k: TOP_K,
        experts: EXPERTS,
        num_experts: NUM_EXPERTS,
        products: Float::F32,
        out: Float::F32,
        compute_units: gpu.runtime.info()?.compute_units,
    })
}

fn layers(gpu: &Gpu, scheme: GemmScheme) -> Result<(), Failed> {
    let shape = shape(gpu, scheme)?;
    let tolerance = if scheme == GemmScheme::Bf16 { TOLERANCE_BF16 } else { TOLERANCE_FP8 };
    for rows in [1, 37, 700] {
        let seed = rand::random();
        let mut random = Pcg64::seed_from_u64(seed);
        let layer = Layer::random(&mut random, shape);
        let tokens = Tokens::random(&mut random, &shape, rows);
        let (ids, weights) = routing(&mut random, rows);
        let wanted = layer.run(&tokens, &ids, &weights, &MAP);
        let mut first: Option<Vec<f32>> = None;
        for tile in TokenTile::ALL {
            let context = format!("{rows} rows, {tile:?}, seed {seed}");
            for got in run(gpu, &shape, &layer, &tokens, (&ids, &weights), tile)? {
                let error = relative(&got, &wanted);
                if error.is_nan() || error > tolerance {
                    return Err(format!("{context}: relative error {error:.2e}").into());
                }
                // The order of summation does not depend on the tile, nor on eager or graph.
                let same = first.get_or_insert_with(|| got.clone());
                if same.iter().zip(&got).any(|(a, b)| a.to_bits() != b.to_bits()) {
                    return Err(format!("{context}: other bits").into());
                }
            }
        }
    }
    Ok(())
}

/// Rounding an expert's output once more costs at most what bf16 does.
fn rounded_products(gpu: &Gpu) -> Result<(), Failed> {
    let shape = ExpertsShape { products: Float::Bf16, ..shape(gpu, GemmScheme::Bf16)? };
    let mut random = Pcg64::seed_from_u64(rand::random());
    let layer = Layer::random(&mut random, shape);
    let tokens = Tokens::random(&mut random, &shape, 300);
    let (ids, weights) = routing(&mut random, 300);
    let wanted = layer.run(&tokens, &ids, &weights, &MAP);
    for tile in TokenTile::ALL {
        let got = run(gpu, &shape, &layer, &tokens, (&ids, &weights), tile)?;
        let error = relative(&got[0], &wanted);
        if error.is_nan() || error > 2.0 * TOLERANCE_BF16 {
            return Err(format!("{tile:?}: relative error {error:.2e}").into());
        }
    }
    Ok(())
}

/// What a negative control needs: a layer whose scales are those of the next block must not pass.
fn wrong_scales(gpu: &Gpu) -> Result<(), Failed> {
    let shape = shape(gpu, GemmScheme::Fp8Block)?;
    let mut random = Pcg64::seed_from_u64(rand::random());
    let layer = Layer::random(&mut random, shape);
    let tokens = Tokens::random(&mut random, &shape, 20);
    let (ids, weights) = routing(&mut random, 20);
    let wanted = layer.run(&tokens, &ids, &weights, &MAP);
    let shifted = layer.with_shifted_scales();
    let got = run(gpu, &shape, &shifted, &tokens, (&ids, &weights), TokenTile::T16)?;
    let error = relative(&got[0], &wanted);
    if error > 2.0 * TOLERANCE_FP8 {
        Ok(())
    } else {
        Err(format!("passes with an error of {error:.2e}").into())
    }
}

/// Global ids, some of them none, and weights.
pub fn routing(random: &mut Pcg64, rows: usize) -> (Vec<i32>, Vec<f32>) {
    let global = MAP.iter().position(|&local| local == UNUSED as i32).unwrap_or(NUM_EXPERTS);
    let mut ids = Vec::new();
    for _ in 0..rows {
        for id in sample(random, NUM_EXPERTS, TOP_K) {
            ids.push(if id == global || random.random_range(0..20) == 0 { -1 } else { id as i32 });
        }
    }
    let weights = ids.iter().map(|_| random.random_range(0.05..1.0)).collect();
    (ids, weights)
}

fn relative(got: &[f32], wanted: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(wanted).map(|(&got, wanted)| square(f64::from(got) - wanted)).sum();
    let size: f64 = wanted.iter().copied().map(square).sum();
    if size == 0.0 { difference } else { (difference / size).sqrt() }
}

/// Outputs of three calls over poison: eager, eager again, and from a graph.
fn run(
    gpu: &Gpu,
    shape: &ExpertsShape,
    layer: &Layer,
    tokens: &Tokens,
    routing: (&[i32], &[f32]),
    tile: TokenTile,
) -> Result<Vec<Vec<f32>>, Failed> {
    Ok(calls(gpu, shape, layer, tokens, routing, tile)?.into_iter().map(|ran| ran.out).collect())
}

/// What a call leaves behind.
pub struct Ran {
    pub out: Vec<f32>,
    pub workspace: Vec<u8>,
}

/// As [`run`], with the workspaces.
pub fn calls(
    gpu: &Gpu,
    shape: &ExpertsShape,
    layer: &Layer,
    tokens: &Tokens,
    (ids, weights): (&[i32], &[f32]),
    tile: TokenTile,
) -> Result<Vec<Ran>, Failed> {
    let rows = tokens.rows;
    let upload = |bytes: &[u8]| -> Result<_, Failed> {
        let mut buffer = gpu.runtime.alloc(bytes.len())?;
        buffer.write(bytes)?;
        Ok(buffer)
    };
    let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let integers = |values: &[i32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let packed = layer.packed()?;
    let (gate_up, down) = (upload(&packed.gate_up)?, upload(&packed.down)?);
    let (gate_up_scales, down_scales) =
        (upload(&floats(&packed.gate_up_scales))?, upload(&floats(&packed.down_scales))?);
    let (codes, scales) = (upload(&tokens.codes)?, upload(&floats(&tokens.scales))?);
    let (ids, weights, map) = (upload(&integers(ids))?, upload(&floats(weights))?, upload(&integers(&MAP))?);
    let mut workspace = gpu.runtime.alloc(shape.workspace_bytes(rows))?;
    let mut out = gpu.runtime.alloc(rows * shape.hidden * 4)?;
    let (gate_up_map, down_map) = (pack::map(&gpu.runtime, &gate_up)?, pack::map(&gpu.runtime, &down)?);
    let launches = shape.launches(
        ExpertsWeights {
            gate_up: gate_up.address(),
            gate_up_map: gate_up_map.address(),
            gate_up_scales: gate_up_scales.address(),
            down: down.address(),
            down_map: down_map.address(),
            down_scales: down_scales.address(),
        },
        ExpertsCall {
            rows,
            tokens: codes.address(),
            token_scales: scales.address(),
            ids: ids.address(),
            weights: weights.address(),
            map: map.address(),
            workspace: workspace.address(),
            out: out.address(),
            tile,
        },
    )?;
    let stream = gpu.runtime.stream()?;
    // SAFETY: all buffers are as large as the shape says and are there until the stream has been waited for.
    let graph = stream.capture(|stream| unsafe { launches.enqueue(&gpu.kernels, stream) })?;
    let mut outputs = Vec::new();
    for from_graph in [false, false, true] {
        workspace.fill(POISON, &stream)?;
        out.fill(POISON, &stream)?;
        // SAFETY: as above.
        unsafe { if from_graph { graph.replay(&stream)? } else { launches.enqueue(&gpu.kernels, &stream)? } }
        stream.wait()?;
        let mut bytes = vec![0; out.bytes()];
        out.read(&mut bytes)?;
        let out = bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let mut left = vec![0; workspace.bytes()];
        workspace.read(&mut left)?;
        outputs.push(Ran { out, workspace: left });
    }
    Ok(outputs)
}
