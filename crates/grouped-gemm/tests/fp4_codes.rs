//! Every fp4 code under every scale as a weight, through both instruction sets and all tile sizes.

use grouped_gemm::{
    Activations, Epilogue, Executor, F32Rows, Fp4Scale, Fp4Weight, Group, GroupedGemm, Isa, PackedFp4, Rows,
};
use half::bf16;
use rstest::rstest;

/// Rows of the weight: one per scale. Each has the sixteen codes in its first columns.
const SCALES: usize = 256;

/// `x · Wᵀ` where row `i` of `x` is `input` at column `i % 16` and zero elsewhere, so every sum has one product.
fn run(isa: Isa, weight: &PackedFp4, k: usize, rows: usize, input: f32) -> Option<Vec<f32>> {
    let executor = Executor::new(isa, 1.try_into().unwrap()).ok()?;
    let mut x = vec![bf16::ZERO; rows * k];
    for row in 0..rows {
        x[row * k + row % 16] = bf16::from_f32(input);
    }
    let gemm = GroupedGemm {
        weights: std::slice::from_ref(weight),
        activations: Activations::Bf16(Rows { values: &x, pitch: k }),
        gather: None,
        groups: &[Group { rows: 0..rows, expert: 0 }],
        router_weights: None,
        epilogue: Epilogue::Products,
    };
    let n = weight.unpack().len() * 2 / k;
    let mut out = vec![f32::NAN; rows * n];
    let mut scratch = vec![0xff; executor.scratch_bytes()];
    executor.run(&gemm, &mut scratch, &F32Rows::new(&mut out, n, n).unwrap()).unwrap();
    Some(out)
}

fn value(code: usize) -> f64 {
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][code % 8] * if code < 8 { 1.0 } else { -1.0 }
}

/// The product with an input that keeps it in the range of f32, exactly; both ends of the exponent included.
#[rstest]
fn mxfp4(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(16, 17, 33)] rows: usize,
) {
    let k = 32;
    // Scale 255 is NaN, in its place stands 127.
    let scales: Vec<u8> = (0..SCALES).map(|scale| if scale == 255 { 127 } else { scale as u8 }).collect();
    let codes: Vec<u8> = (0..SCALES)
        .flat_map(|_| (0..16).map(|pair| if pair < 8 { (2 * pair) | ((2 * pair + 1) << 4) } else { 0 }))
        .collect();
    let weight =
        PackedFp4::pack(Fp4Weight { codes: &codes, n: SCALES, k, scale: Fp4Scale::Mx32(&scales) }).unwrap();
    for input in [1.0f32, 2f32.powi(100), 2f32.powi(-20)] {
        let Some(out) = run(isa, &weight, k, rows, input) else { return };
        for (i, &got) in out.iter().enumerate() {
            let (code, scale) = (i / SCALES % 16, scales[i % SCALES]);
            let want = (value(code) * 2f64.powi(i32::from(scale) - 127) * f64::from(input)) as f32;
            // A result that is no normal f32 may be flushed.
            if want.is_finite() && (want == 0.0 || want.is_normal()) {
                assert_eq!(got, want, "code {code} scale {scale} input {input:e}");
            }
        }
    }
}

#[rstest]
fn nvfp4(#[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa, #[values(16, 33)] rows: usize) {
    let k = 16;
    let scales: Vec<u8> =
        (0..SCALES).map(|code| if code & 0x7f == 0x7f { 0x38 } else { code as u8 }).collect();
    let codes: Vec<u8> =
        (0..SCALES).flat_map(|_| (0..8).map(|pair| (2 * pair) | ((2 * pair + 1) << 4))).collect();
    for global in [1.0f32, 0.37e-4] {
        let scale = Fp4Scale::Nv16 { blocks: &scales, global };
        let weight = PackedFp4::pack(Fp4Weight { codes: &codes, n: SCALES, k, scale }).unwrap();
        let Some(out) = run(isa, &weight, k, rows, 1.0) else { return };
        for (i, &got) in out.iter().enumerate() {
            let (code, scale) = (i / SCALES % 16, scales[i % SCALES]);
            let scale_value = grouped_gemm::Fp8Kind::E4M3Fn.to_bf16(scale).to_f64();
            let want = (value(code) * scale_value * f64::from(global)) as f32;
            assert_eq!(got, want, "code {code} scale {scale:#04x} global {global:e}");
        }
    }
}

/// An infinite or zero product must not hide a weight: two ends of the range in one row, far from both in the result.
#[test]
fn the_ends_of_the_exponent_range_are_exact() {
    let k = 64;
    for (scales, inputs) in
        [([0u8, 250], [2f32.powi(120), 2f32.powi(-120)]), ([254, 4], [2f32.powi(-125), 2f32.powi(120)])]
    {
        let mut codes = [0u8; 32];
        (codes[0], codes[16]) = (0x01, 0x07);
        let weight =
            PackedFp4::pack(Fp4Weight { codes: &codes, n: 1, k, scale: Fp4Scale::Mx32(&scales) }).unwrap();
        let mut x = vec![bf16::ZERO; k];
        (x[0], x[32]) = (bf16::from_f32(inputs[0]), bf16::from_f32(inputs[1]));
        let gemm = GroupedGemm {
            weights: std::slice::from_ref(&weight),
            activations: Activations::Bf16(Rows { values: &x, pitch: k }),
            gather: None,
            groups: &[Group { rows: 0..1, expert: 0 }],
            router_weights: None,
            epilogue: Epilogue::Products,
        };
        let want: f64 = (0.5 * 2f64.powi(i32::from(scales[0]) - 127)) * f64::from(inputs[0])
            + 6.0 * 2f64.powi(i32::from(scales[1]) - 127) * f64::from(inputs[1]);
        for isa in Isa::ALL {
            let Ok(executor) = Executor::new(isa, 1.try_into().unwrap()) else { continue };
            let (mut out, mut scratch) = ([f32::NAN], vec![0xff; executor.scratch_bytes()]);
            executor.run(&gemm, &mut scratch, &F32Rows::new(&mut out, 1, 1).unwrap()).unwrap();
            assert_eq!(out[0], want as f32, "{scales:?} on {isa}");
        }
    }
}
