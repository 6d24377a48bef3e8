//! Every stage of a layer on the device, judged by what the stage before it has left: gemm1 by the tokens, the second quantisation by
//! the activations of the device, gemm2 by its codes, the sum by its products. Nothing is uncertain then, so that limits are those of
//! a sum and a rounding, and one scale that is off by a few percent is found.

use half::bf16;
use libtest_mimic::Failed;
use moe_kernels::experts::ExpertsShape;
use moe_kernels::grouped_gemm::{GemmScheme, TokenTile};
use rand::SeedableRng;
use rand_pcg::Pcg64;

use crate::experts::{MAP, Ran, calls, routing, shape};
use crate::reference::{Layer, Tokens, quantized};
use crate::{Gpu, OnGpu};

pub const TESTS: [(&str, OnGpu); 4] = [
    ("stages_bf16", |gpu| right(gpu, GemmScheme::Bf16)),
    ("stages_fp8_block", |gpu| right(gpu, GemmScheme::Fp8Block)),
    ("stages_fp8_row", |gpu| right(gpu, GemmScheme::Fp8Row)),
    ("stages_with_a_scale_off_are_not_right", a_scale_off),
];

const ROWS: usize = 300;
/// What a scale is off by where a layer must not pass.
const OFF: f32 = 1.03;

/// Relative errors of gemm1 with its rounding to bf16, and of gemm2 in f32. A rounding to bf16 is off by 2^-8 or 3.9e-3 at most.
/// Tensor cores align 32 products of FP8 and keep 13 bits of the largest, which makes some 1e-3 of a sum, twice in an activation.
const fn limits(scheme: GemmScheme) -> [f64; 2] {
    match scheme {
        GemmScheme::Bf16 => [4e-3, 1e-4],
        GemmScheme::Fp8Block | GemmScheme::Fp8Row => [6e-3, 4e-3],
    }
}

/// Squares of errors and of what was wanted, of each pair and of each column of an expert.
struct Errors {
    width: usize,
    of_pairs: Vec<[f64; 2]>,
    of_columns: Vec<[f64; 2]>,
}

impl Errors {
    fn new(pairs: usize, experts: usize, width: usize) -> Self {
        Self { width, of_pairs: vec![[0.0; 2]; pairs], of_columns: vec![[0.0; 2]; experts * width] }
    }

    fn add(&mut self, (pair, expert): (usize, usize), got: impl Iterator<Item = f64>, wanted: &[f64]) {
        for (column, (got, wanted)) in got.zip(wanted).enumerate() {
            let squares = [(got - wanted).powi(2), wanted.powi(2)];
            for sum in [&mut self.of_pairs[pair], &mut self.of_columns[expert * self.width + column]] {
                sum[0] += squares[0];
                sum[1] += squares[1];
            }
        }
    }

    /// The largest relative error of a pair or a column, beside its own size or that of most, whichever is larger: what a sum
    /// is off by hangs on its terms, and these may cancel.
    fn largest(&self) -> f64 {
        let worst = |sums: &[[f64; 2]]| {
            let used = sums.iter().filter(|sum| sum[1] > 0.0).count().max(1);
            let usual = sums.iter().map(|sum| sum[1]).sum::<f64>() / used as f64;
            let relative = |&[error, size]: &[f64; 2]| {
                if error.is_nan() { f64::INFINITY } else { (error / size.max(usual)).sqrt() }
            };
            sums.iter().map(relative).fold(0.0, f64::max)
        };
        worst(&self.of_pairs).max(worst(&self.of_columns))
    }
}

fn words(bytes: &[u8], at: usize, count: usize) -> Vec<[u8; 4]> {
    bytes[at..].as_chunks::<4>().0[..count].to_vec()
}

/// Why a stage is wrong.
fn judge(
    shape: &ExpertsShape,
    layer: &Layer,
    tokens: &Tokens,
    (ids, weights): (&[i32], &[f32]),
    Ran { out, workspace }: &Ran,
) -> Result<(), String> {
    let ExpertsShape { scheme, hidden, intermediate, top_k, experts, .. } = *shape;
    let pieces = shape.pieces(tokens.rows);
    let offsets: Vec<usize> = words(workspace, pieces.offsets, experts + 1)
        .into_iter()
        .map(|word| u32::from_le_bytes(word) as usize)
        .collect();
    let pairs = offsets[experts];
    let pair_rows = words(workspace, pieces.pair_rows, pairs);
    let positions = words(workspace, pieces.positions, ids.len());
    let products: Vec<f32> =
        words(workspace, pieces.products, pairs * hidden).into_iter().map(f32::from_le_bytes).collect();
    let activated: Vec<bf16> = workspace[pieces.activated..].as_chunks::<2>().0[..pairs * intermediate]
        .iter()
        .map(|&b| bf16::from_le_bytes(b))
        .collect();

    let mut gemm1 = Errors::new(pairs, experts, intermediate);
    let mut gemm2 = Errors::new(pairs, experts, hidden);
    for expert in 0..experts {
        for pair in offsets[expert]..offsets[expert + 1] {
            let row = u32::from_le_bytes(pair_rows[pair]) as usize;
            let mine = &activated[pair * intermediate..][..intermediate];
            let got = mine.iter().map(|x| f64::from(x.to_f32()));
            gemm1.add((pair, expert), got, &layer.activated(expert, tokens, row));
            let (codes, scales) = quantized(shape, mine);
            if scheme != GemmScheme::Bf16 {
                let found = &workspace[pieces.codes + pair * intermediate..][..intermediate];
                let at = pieces.scales + pair * scales.len() * 4;
                let found_scales = words(workspace, at, scales.len()).into_iter().map(f32::from_le_bytes);
                let same_scales =
                    found_scales.map(f32::to_bits).eq(scales.iter().map(|scale| scale.to_bits()));
                if found != codes || !same_scales {
                    return Err(format!("pair {pair}: codes or scales are not the host's"));
                }
            }
            let got = products[pair * hidden..][..hidden].iter().map(|&x| f64::from(x));
            gemm2.add((pair, expert), got, &layer.product(expert, &codes, &scales));
        }
    }
    for ((what, errors), limit) in [("gemm1", gemm1), ("gemm2", gemm2)].into_iter().zip(limits(scheme)) {
        let error = errors.largest();
        if error > limit {
            return Err(format!("{what}: relative error {error:.2e}, limit {limit:.0e}"));
        }
    }
    for (row, out) in out.chunks(hidden).enumerate() {
        let mut sum = vec![0f32; hidden];
        for slot in row * top_k..(row + 1) * top_k {
            let local = usize::try_from(ids[slot]).ok().and_then(|id| usize::try_from(MAP[id]).ok());
            let pair = usize::try_from(i32::from_le_bytes(positions[slot])).ok();
            let is_right = match (local, pair) {
                (Some(e), Some(pair)) => (offsets[e]..offsets[e + 1]).contains(&pair),
                (None, None) => true,
                _ => false,
            };
            if !is_right {
                return Err(format!("slot {slot} of local expert {local:?} is pair {pair:?}"));
            }
            let Some(pair) = pair else { continue };
            for (sum, x) in sum.iter_mut().zip(&products[pair * hidden..]) {
                *sum += x * weights[slot];
            }
        }
        if sum.iter().zip(out).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Err(format!("row {row}: not the sum of its products"));
        }
    }
    Ok(())
}

fn right(gpu: &Gpu, scheme: GemmScheme) -> Result<(), Failed> {
    let shape = shape(gpu, scheme)?;
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let layer = Layer::random(&mut random, shape);
    let tokens = Tokens::random(&mut random, &shape, ROWS);
    let (ids, weights) = routing(&mut random, ROWS);
    for tile in TokenTile::ALL {
        let ran = calls(gpu, &shape, &layer, &tokens, (&ids, &weights), tile)?;
        let judged = judge(&shape, &layer, &tokens, (&ids, &weights), &ran[0]);
        judged.map_err(|why| format!("{tile:?}, seed {seed}: {why}"))?;
    }
    Ok(())
}

/// What a negative control needs: one scale of one block or row that is off by three percent is found, whichever matrix it is of, and
/// so is one of a token.
fn a_scale_off(gpu: &Gpu) -> Result<(), Failed> {
    for scheme in [GemmScheme::Fp8Block, GemmScheme::Fp8Row] {
        let shape = shape(gpu, scheme)?;
        let seed = rand::random();
        let mut random = Pcg64::seed_from_u64(seed);
        let layer = Layer::random(&mut random, shape);
        let tokens = Tokens::random(&mut random, &shape, ROWS);
        let (mut ids, weights) = routing(&mut random, ROWS);
        // The row whose scale is off has an expert here.
        ids[0] = MAP.iter().position(|&local| local == 0).expect("local expert 0 is there") as i32;
        let off = (0..3).map(|matrix| layer.with_a_scale_off(0, matrix, OFF));
        let cases = off.map(|layer| (layer, None)).chain([(layer.clone(), Some(0))]);
        for (case, (given, row)) in cases.enumerate() {
            let lent = row.map_or_else(|| tokens.clone(), |row| tokens.with_a_scale_off(row, OFF));
            let ran = calls(gpu, &shape, &given, &lent, (&ids, &weights), TokenTile::T32)?;
            if judge(&shape, &layer, &tokens, (&ids, &weights), &ran[0]).is_ok() {
                return Err(format!("{scheme:?}, case {case}, seed {seed}: passes").into());
            }
        }
    }
    Ok(())
}
