//! Stage 3 by the main loops of the devices, against sums in f64 that quantise where the layer does.

use moe_kernels::experts::{ExpertsCall, ExpertsShape, ExpertsWeights};
use moe_kernels::grouped_gemm::{GemmBuffers, GemmScheme, GroupedGemm, TokenTile};
use moe_kernels::host_simt::{Schedule, run};
use moe_kernels::{Arch, Float};
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

use crate::reference::{Layer, Tokens};

/// Relative L2 error that a right layer stays below. The instructions that are played sum exactly; what differs is that sums
/// round to f32, and then now and then to another bf16, or to another code of FP8.
const TOLERANCE: f64 = 3e-3;

const NUM_EXPERTS: usize = 8;
/// Local experts of the global ones; others are elsewhere. One of those here gets no token.
const MAP: [i32; NUM_EXPERTS] = [3, -1, 0, 1, -1, 2, -1, -1];
const EXPERTS: usize = 4;
const UNUSED: i32 = 1;
const TOP_K: usize = 3;
const POISON: u8 = 0xff;

/// As many steps of k as leave a rest, whatever the kernels do at once.
fn shape(arch: Arch, scheme: GemmScheme, products: Float) -> ExpertsShape {
    ExpertsShape {
        arch,
        scheme,
        hidden: 384,
        intermediate: 128 * if scheme == GemmScheme::Bf16 { 1 } else { 2 },
        top_k: TOP_K,
        experts: EXPERTS,
        num_experts: NUM_EXPERTS,
        products,
        out: Float::F32,
        // Blocks go round among the tiles.
        compute_units: 2,
    }
}

fn routing(random: &mut Pcg64, rows: usize) -> (Vec<i32>, Vec<f32>) {
    let mut ids = Vec::new();
    for _ in 0..rows {
        for id in sample(random, NUM_EXPERTS, TOP_K) {
            ids.push(if MAP[id] == UNUSED || random.random_range(0..20) == 0 { -1 } else { id as i32 });
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

/// The output of a call over poison.
fn output(
    shape: &ExpertsShape,
    layer: &Layer,
    tokens: &Tokens,
    (ids, weights): (&[i32], &[f32]),
    (tile, seed): (TokenTile, u64),
) -> Vec<f32> {
    let rows = tokens.rows;
    let packed = layer.packed().unwrap();
    // 256 is what a device's allocations are aligned to.
    let mut workspace = vec![POISON; shape.workspace_bytes(rows) + 256];
    let mut out = vec![f32::NAN; rows * shape.hidden];
    let weights_of = |bytes: &[u8]| bytes.as_ptr() as u64;
    let launches = shape.launches(
        ExpertsWeights {
            gate_up: weights_of(&packed.gate_up),
            gate_up_map: 0,
            gate_up_scales: packed.gate_up_scales.as_ptr() as u64,
            down: weights_of(&packed.down),
            down_map: 0,
            down_scales: packed.down_scales.as_ptr() as u64,
        },
        ExpertsCall {
            rows,
            tokens: tokens.codes.as_ptr() as u64,
            token_scales: tokens.scales.as_ptr() as u64,
            ids: ids.as_ptr() as u64,
            weights: weights.as_ptr() as u64,
            map: MAP.as_ptr() as u64,
            workspace: (workspace.as_mut_ptr() as u64).next_multiple_of(256),
            out: out.as_mut_ptr() as u64,
            tile,
        },
    );
    // SAFETY: all buffers are as large as the shape says.
    unsafe { launches.unwrap().simulate(shape.arch, Schedule { seed, resident: 4 }) }.unwrap();
    out
}

#[rstest]
fn layers_are_those_of_sums_in_f64(
    #[values(Arch::Gfx942, Arch::Gfx950)] arch: Arch,
    #[values(GemmScheme::Bf16, GemmScheme::Fp8Block, GemmScheme::Fp8Row)] scheme: GemmScheme,
    #[values((TokenTile::T8, 3), (TokenTile::T16, 60), (TokenTile::T32, 30), (TokenTile::T64, 30), (TokenTile::T128, 5))]
    (tile, rows): (TokenTile, usize),
) {
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    let products = if rows == 30 { Float::Bf16 } else { Float::F32 };
    let shape = shape(arch, scheme, products);
    let layer = Layer::random(&mut random, shape);
    let tokens = Tokens::random(&mut random, &shape, rows);
    let (ids, weights) = routing(&mut random, rows);
    let wanted = layer.run(&tokens, &ids, &weights, &MAP);
    let got = output(&shape, &layer, &tokens, (&ids, &weights), (tile, seed));
    let error = relative(&got, &wanted);
    assert!(error < TOLERANCE, "relative error {error:.2e}, seed {seed}");
}

/// What does not depend on the order of threads has the same bits in every order.
#[rstest]
fn every_schedule_gives_the_same_bits(#[values(Arch::Gfx942, Arch::Gfx950)] arch: Arch) {
    let mut random = Pcg64::seed_from_u64(rand::random());
    let shape = shape(arch, GemmScheme::Fp8Block, Float::F32);
    let layer = Layer::random(&mut random, shape);
    let tokens = Tokens::random(&mut random, &shape, 20);
    let (ids, weights) = routing(&mut random, 20);
    let of = |seed| output(&shape, &layer, &tokens, (&ids, &weights), (TokenTile::T16, seed));
    let bits = |out: Vec<f32>| out.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let first = bits(of(0));
    for seed in 1..5 {
        assert_eq!(bits(of(seed)), first, "seed {seed}");
    }
}

/// A layer whose scales are those of the next block, or row, does not pass; nor does one with a single scale that is
/// off: of a block by a tenth, of one row among hundreds by a factor.
#[rstest]
fn a_wrong_scale_is_found(
    #[values(Arch::Gfx942, Arch::Gfx950)] arch: Arch,
    #[values(GemmScheme::Fp8Block, GemmScheme::Fp8Row)] scheme: GemmScheme,
    #[values("weights", "tokens", "none", "one")] of: &str,
) {
    let mut random = Pcg64::seed_from_u64(rand::random());
    let shape = shape(arch, scheme, Float::F32);
    let layer = Layer::random(&mut random, shape);
    let mut tokens = Tokens::random(&mut random, &shape, 20);
    let (ids, weights) = routing(&mut random, 20);
    let wanted = layer.run(&tokens, &ids, &weights, &MAP);
    let broken = match (of, scheme) {
        ("weights", _) => layer.with_shifted_scales(),
        ("one", GemmScheme::Fp8Block) => layer.with_a_scale_off(0, 0, 1.1),
        ("one", _) => layer.with_a_scale_off(0, 2, 8.0),
        _ => layer,
    };
    match of {
        "tokens" => tokens.scales.rotate_left(1),
        "none" => tokens.scales.fill(1.0),
        _ => {}
    }
    let got = output(&shape, &broken, &tokens, (&ids, &weights), (TokenTile::T32, rand::random()));
    let error = relative(&got, &wanted);
    let limit = if of == "one" { TOLERANCE } else { 10.0 * TOLERANCE };
    assert!(error > limit, "passes with a relative error of {error:.2e}");
}

/// The product of one expert, without activation, by `kernel` in the place of the right one.
fn product(tile: TokenTile, kernel: Option<&'static str>) -> f64 {
    let (n, k, pairs) = (128, 448, 11);
    let mut random = Pcg64::seed_from_u64(rand::random());
    let mut matrix = |rows: usize| {
        let values = (0..rows * k).map(|_| half::bf16::from_f32(random.random_range(-1.0..1.0)));
        values.collect::<Vec<_>>()
    };
    let (weights, tokens) = (matrix(n), matrix(pairs));
    let bytes = |values: &[half::bf16]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let packed = moe_kernels::pack::down(Arch::Gfx942, &bytes(&weights), n, 2 * k).unwrap();
    let offsets = [0, pairs as u32];
    let mut out = vec![f32::NAN; pairs * n];
    let gemm = GroupedGemm {
        arch: Arch::Gfx942,
        scheme: GemmScheme::Bf16,
        experts: 1,
        n,
        k,
        has_activation: false,
        products: Float::F32,
        tile,
        compute_units: 1,
    };
    let mut launch = gemm
        .launch(GemmBuffers {
            weights: packed.as_ptr() as u64,
            weights_map: 0,
            weight_scales: 0,
            tokens: tokens.as_ptr() as u64,
            token_scales: 0,
            pair_rows: 0,
            offsets: offsets.as_ptr() as u64,
            out: out.as_mut_ptr() as u64,
        })
        .unwrap();
    launch.kernel = kernel.unwrap_or(launch.kernel);
    // SAFETY: the buffers are as large as the job says.
    unsafe { run(Arch::Gfx942, &launch, Schedule::of(rand::random())) }.unwrap();
    let wanted: Vec<f64> = (0..pairs * n)
        .map(|at| {
            let (token, row) = (&tokens[at / n * k..][..k], &weights[at % n * k..][..k]);
            token.iter().zip(row).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
        })
        .collect();
    relative(&out, &wanted)
}

#[test]
fn mistakes_of_a_main_loop_are_found() {
    for tile in [TokenTile::T16, TokenTile::T32] {
        let error = product(tile, None);
        assert!(error < 1e-6, "{tile:?}: relative error {error:.2e}");
    }
    for (tile, kernel) in [
        (TokenTile::T16, "grouped_gemm_other_lanes_16"),
        (TokenTile::T32, "grouped_gemm_other_lanes_32"),
        (TokenTile::T32, "grouped_gemm_without_barrier_32"),
    ] {
        let error = product(tile, Some(kernel));
        assert!(error.is_nan() || error > 0.1, "{kernel} passes with a relative error of {error:.2e}");
    }
}
