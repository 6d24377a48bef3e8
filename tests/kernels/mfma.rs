//! The products of a wave as host SIMT plays them. Where elements are is what AMD's matrix instruction calculator says for
//! gfx942; gfx950 has longer runs of k in the same places, and no result depends on how both operands cut k. What codes stand
//! for is what `quant` and `half` say.

use fused_moe_core::Fp8Format;
use half::bf16;
use moe_kernels::Arch;
use moe_kernels::host_simt::{Schedule, run};
use moe_kernels::selftest::{SelftestParams, wave};
use quant::decode;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use rstest::rstest;

const LANES: usize = 64;

/// An instruction: its kernel, rows and columns, k, bytes of an element.
type Instruction = (Arch, &'static str, usize, usize, usize);

/// Lane, and number among its elements, of element `[i][k]` of a, or `[k][i]` of b. Lanes take turns at runs of elements: all
/// of an operand of 8 or 16 bytes, half of one of 32.
fn place((_, _, side, depth, bytes): Instruction, i: usize, k: usize) -> (usize, usize) {
    let groups = LANES / side;
    let of_lane = depth / groups;
    let run = of_lane.min(16 / bytes);
    (side * (k / run % groups) + i, k / (run * groups) * run + k % run)
}

/// Lane and register of element `[i][j]` of d.
fn place_of_sum(side: usize, i: usize, j: usize) -> (usize, usize) {
    match side {
        16 => (16 * (i / 4) + j, i % 4),
        _ => ((32 * (i / 4)) % 64 + j, 4 * (i / 8) + i % 4),
    }
}

fn number(format: Fp8Format, code: &[u8]) -> f64 {
    f64::from(match *code {
        [code] => decode(format, code),
        [low, high] => bf16::from_le_bytes([low, high]).to_f32(),
        _ => unreachable!("codes have one byte or two"),
    })
}

#[rstest]
fn elements_are_where_they_should_be(
    #[values(
        (Arch::Gfx942, "selftest_mfma_bf16_16", 16, 16, 2),
        (Arch::Gfx942, "selftest_mfma_bf16_32", 32, 8, 2),
        (Arch::Gfx942, "selftest_mfma_fp8_16", 16, 32, 1),
        (Arch::Gfx942, "selftest_mfma_fp8_32", 32, 16, 1),
        (Arch::Gfx950, "selftest_mfma_bf16_16", 16, 32, 2),
        (Arch::Gfx950, "selftest_mfma_bf16_32", 32, 16, 2),
        (Arch::Gfx950, "selftest_mfma_fp8_16", 16, 128, 1),
        (Arch::Gfx950, "selftest_mfma_fp8_32", 32, 64, 1)
    )]
    instruction: Instruction,
) {
    let (arch, kernel, side, depth, bytes) = instruction;
    let seed = rand::random();
    let mut random = Pcg64::seed_from_u64(seed);
    // All codes but those that stand for no number.
    let mut codes = || -> Vec<u8> {
        let numbers = (0..side * depth).flat_map(|_| match bytes {
            1 => loop {
                let code = random.random();
                if decode(arch.fp8(), code).is_finite() {
                    break vec![code];
                }
            },
            _ => bf16::from_f32(random.random_range(-2.0..2.0)).to_le_bytes().to_vec(),
        });
        numbers.collect()
    };
    let (a, b) = (codes(), codes());
    let operand = side * depth * bytes / LANES;
    let mut input = vec![0u8; 2 * LANES * operand + 16];
    // Operands of 16 bytes are aligned to them.
    let start = input.as_ptr().align_offset(16);
    for (matrix, codes) in [&a, &b].into_iter().enumerate() {
        for (at, code) in codes.chunks(bytes).enumerate() {
            let (lane, element) = place(instruction, at / depth, at % depth);
            let to = start + (matrix * LANES + lane) * operand + element * bytes;
            input[to..][..bytes].copy_from_slice(code);
        }
    }
    let sums = side * side / LANES;
    let mut output = vec![f32::NAN; LANES * sums];
    let params =
        SelftestParams { input: input.as_ptr() as u64 + start as u64, output: output.as_mut_ptr() as u64 };
    // SAFETY: the kernel reads two operands of each lane, and writes its sums.
    unsafe { run(arch, &wave(kernel, params), Schedule::of(seed)) }.unwrap();
    for i in 0..side {
        for j in 0..side {
            let element = |codes: &[u8], row: usize, k: usize| {
                number(arch.fp8(), &codes[(row * depth + k) * bytes..][..bytes])
            };
            let wanted: f64 = 1.0 + (0..depth).map(|k| element(&a, i, k) * element(&b, j, k)).sum::<f64>();
            let (lane, sum) = place_of_sum(side, i, j);
            let got = output[lane * sums + sum];
            assert_eq!(got.to_bits(), (wanted as f32).to_bits(), "[{i}][{j}]: {got}, {wanted}, seed {seed}");
        }
    }
}
