//! What must not change a row's bits: its batch, the threads, other calls at the same time.

mod common;

use std::num::NonZeroUsize;

use common::{Call, Case, Operand, PackedSet, Scaling};
use grouped_gemm::{Activation, Executor, Fp8Kind, Group, Isa};
use rstest::rstest;

const FP8_BLOCK: Operand = Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Block);
const FP8_VECTOR: Operand = Operand::Fp8(Fp8Kind::E4M3Fnuz, Scaling::Vector);
/// Every tile size, one and several tiles, more than one chunk of rows.
const ROWS: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 11, 13, 32, 0, 130];

fn executor(isa: Isa, threads: usize) -> Option<Executor> {
    Executor::new(isa, NonZeroUsize::new(threads)?).ok()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// More K than is packed at once for a full chunk of rows, and an odd end.
fn call(weight: Operand, activation: Operand) -> Call {
    let is_fp4 = [weight, activation].iter().any(|o| matches!(o, Operand::Mxfp4 | Operand::Nvfp4));
    let k = if is_fp4 { 2464 } else { 2437 };
    let join = Activation::SwigluOai { alpha: 1.702, limit: 7.0 };
    Case { rows: &ROWS, n: 40, k, gate_up: true, weight, activation, join, bias: true }.make()
}

#[rstest]
fn a_row_alone_has_the_bits_it_has_in_a_batch(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Operand::Bf16, FP8_BLOCK, FP8_VECTOR, Operand::Mxfp4, Operand::Nvfp4)] weight: Operand,
    #[values(Operand::Bf16, FP8_BLOCK, FP8_VECTOR, Operand::Nvfp4)] activation: Operand,
) {
    bits_alone_and_together(isa, weight, activation);
}

#[rstest]
fn an_f32_row_alone_has_the_bits_it_has_in_a_batch(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
) {
    bits_alone_and_together(isa, Operand::F32, Operand::F32);
}

fn bits_alone_and_together(isa: Isa, weight: Operand, activation: Operand) {
    let Some(executor) = executor(isa, 1) else { return };
    let mut call = call(weight, activation);
    let together = call.run(&executor);
    let alone = call.groups.iter().flat_map(|group| {
        let expert = group.expert;
        group.rows.clone().map(move |row| Group { rows: row..row + 1, expert })
    });
    call.groups = alone.collect();
    assert_eq!(bits(&call.run(&executor)), bits(&together));
    // A run that could not tell rows apart would also pass the comparison above.
    call.router_weights[0] *= 1.5;
    assert_ne!(bits(&call.run(&executor)), bits(&together));
}

#[rstest]
fn the_number_of_threads_changes_nothing(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Operand::Bf16, Operand::F32, FP8_BLOCK, Operand::Mxfp4, Operand::Nvfp4)] weight: Operand,
) {
    let Some(one) = executor(isa, 1) else { return };
    let call = call(weight, if weight == Operand::F32 { weight } else { Operand::Bf16 });
    let want = bits(&call.run(&one));
    for threads in [2, 3, 7] {
        let many = executor(isa, threads).unwrap();
        assert_eq!(bits(&call.run(&many)), want, "{threads} threads");
    }
}

#[test]
fn calls_from_several_threads_do_not_disturb_each_other() {
    let calls = [call(FP8_BLOCK, Operand::Bf16), call(FP8_BLOCK, FP8_BLOCK), call(FP8_VECTOR, FP8_VECTOR)];
    let executor = Executor::new(Isa::detect(), NonZeroUsize::new(3).unwrap()).unwrap();
    std::thread::scope(|scope| {
        for call in &calls {
            scope.spawn(move || {
                let PackedSet::Fp8(weights) = call.pack() else { unreachable!() };
                let want = bits(&call.run_with(&executor, &weights, 0xff).unwrap());
                for _ in 0..10 {
                    assert_eq!(bits(&call.run_with(&executor, &weights, 0xff).unwrap()), want);
                }
            });
        }
    });
}

/// Products of bf16 are exact in f32, so fusing their addition changes nothing.
#[rstest]
fn avx2_gives_the_bits_of_plain_rust(
    #[values(Operand::Bf16, FP8_BLOCK, Operand::Mxfp4)] weight: Operand,
    #[values(Operand::Bf16, FP8_BLOCK)] activation: Operand,
) {
    let Some(fast) = executor(Isa::Avx2Fma, 2) else { return };
    let call = call(weight, activation);
    assert_eq!(bits(&call.run(&fast)), bits(&call.run(&executor(Isa::Portable, 2).unwrap())));
}

/// The documented exception: AVX-512 and the other two agree closely but need not agree in bits.
#[test]
fn instruction_sets_agree_closely() {
    let Some(fast) = executor(Isa::Avx512Bf16, 2) else { return };
    let call = call(FP8_BLOCK, Operand::Bf16);
    let (fast, portable) = (call.run(&fast), call.run(&executor(Isa::Portable, 2).unwrap()));
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.filter(|v| !v.is_nan()).map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    };
    let difference = norm(&mut fast.iter().zip(&portable).map(|(a, b)| a - b));
    assert!(difference <= 1e-6 * norm(&mut portable.iter().copied()), "{difference}");
}
