//! Every fp8 code as a weight and as an activation, through both instruction sets and all tile sizes.

use grouped_gemm::{
    ActivationScale, Activations, Epilogue, Executor, F32Rows, Fp8Kind, Fp8Weight, Group, GroupedGemm, Isa,
    PackedFp8, Rows, Weight, WeightScale,
};
use half::bf16;
use rstest::rstest;

const CODES: usize = 256;

fn executor(isa: Isa) -> Option<Executor> {
    Executor::new(isa, 1.try_into().unwrap()).ok()
}

fn run(executor: &Executor, weight: &PackedFp8, activations: Activations<'_>, rows: usize) -> Vec<f32> {
    let gemm = GroupedGemm {
        weights: std::slice::from_ref(weight),
        activations,
        gather: None,
        groups: &[Group { rows: 0..rows, expert: 0 }],
        router_weights: None,
        epilogue: Epilogue::Products,
    };
    let mut out = vec![f32::NAN; rows * CODES];
    let mut scratch = vec![0xff; executor.scratch_bytes()];
    executor.run(&gemm, &mut scratch, &F32Rows::new(&mut out, CODES, CODES).unwrap()).unwrap();
    out
}

/// A NaN must stay one; anything else must be exact, the sign of zero aside.
fn assert_exact(got: f32, want: f32, what: &str) {
    assert!(got == want || got.is_nan() && want.is_nan(), "{what}: {got}, not {want}");
}

/// Column `n` is code `n` at one K and zero elsewhere, so every result is one decoded code.
#[rstest]
fn weights(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Fp8Kind::E4M3Fn, Fp8Kind::E4M3Fnuz)] kind: Fp8Kind,
    #[values(1, 4, 7)] rows: usize,
    #[values(0, 1, 130)] at: usize,
) {
    let Some(executor) = executor(isa) else { return };
    let k = 131;
    let mut codes = vec![0u8; CODES * k];
    for code in 0..CODES {
        codes[code * k + at] = code as u8;
    }
    let codes = Weight { values: &codes, n: CODES, k };
    let ones = vec![bf16::ONE; rows * k];
    for scale in [WeightScale::PerTensor(1.0), WeightScale::Block128 { scales: vec![1.0; 4] }] {
        let weight = PackedFp8::pack(Fp8Weight { codes, kind, scale: &scale }).unwrap();
        let out = run(&executor, &weight, Activations::Bf16(Rows { values: &ones, pitch: k }), rows);
        for (i, &got) in out.iter().enumerate() {
            let code = (i % CODES) as u8;
            assert_exact(got, kind.to_bf16(code).to_f32(), &format!("code {code:#04x} in row {}", i / CODES));
        }
    }
}

/// Row `m` holds all codes, rotated by `m`; the weight is the identity.
#[rstest]
fn activations(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Fp8Kind::E4M3Fn, Fp8Kind::E4M3Fnuz)] kind: Fp8Kind,
    #[values(1, 7)] rows: usize,
) {
    let Some(executor) = executor(isa) else { return };
    let is_nan = |code: u8| kind.to_bf16(code).is_nan();
    // A NaN anywhere in a row makes all its results NaN, so rows are made without and with one.
    let codes: Vec<u8> = (0..rows * CODES).map(|i| (i % CODES + i / CODES) as u8).collect();
    let finite: Vec<u8> = codes.iter().map(|&code| if is_nan(code) { 0 } else { code }).collect();
    let mut identity = vec![0u8; CODES * CODES];
    let one = (0..=255).find(|&code| kind.to_bf16(code) == bf16::ONE).unwrap();
    (0..CODES).for_each(|n| identity[n * CODES + n] = one);
    let scale = WeightScale::PerTensor(1.0);
    let identity = Weight { values: &identity, n: CODES, k: CODES };
    let weight = PackedFp8::pack(Fp8Weight { codes: identity, kind, scale: &scale }).unwrap();
    let scale = ActivationScale::PerTensor(1.0);
    let rows_of = |codes| Activations::Fp8 { codes: Rows { values: codes, pitch: CODES }, kind, scale };
    for (got, &code) in run(&executor, &weight, rows_of(&finite), rows).iter().zip(&finite) {
        assert_exact(*got, kind.to_bf16(code).to_f32(), &format!("code {code:#04x}"));
    }
    assert!(run(&executor, &weight, rows_of(&codes), rows).iter().all(|value| value.is_nan()));
    // The NaN of one row must not reach the others.
    let mixed = [&finite[..CODES], &codes[CODES..]].concat();
    let out = run(&executor, &weight, rows_of(&mixed), rows);
    assert!(out[..CODES].iter().all(|value| value.is_finite()));
}
