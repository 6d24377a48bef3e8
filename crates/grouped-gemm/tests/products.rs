//! Products, scales and activation against a plain f64 computation.

mod common;

use common::{Case, Operand, Scaling};
use grouped_gemm::{Executor, Fp8Kind, Isa};
use rstest::rstest;

const ROWS: [usize; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 64, 1];

fn check(isa: Isa, case: Case) {
    let Ok(executor) = Executor::new(isa, 2.try_into().unwrap()) else {
        println!("refused: {isa} is not available here");
        return;
    };
    case.make().check(&executor);
}

#[rstest]
fn bf16(
    #[values(Isa::Avx512Bf16, Isa::Portable)] isa: Isa,
    #[values((64, 128), (1, 1), (70, 33), (200, 257), (130, 1000))] (n, k): (usize, usize),
    #[values(false, true)] gate_up: bool,
) {
    check(isa, Case { rows: &ROWS, n, k, gate_up, weight: Operand::Bf16, activation: Operand::Bf16 });
}

#[rstest]
fn fp8_weights(
    #[values(Isa::Avx512Bf16, Isa::Portable)] isa: Isa,
    #[values(Fp8Kind::E4M3Fn, Fp8Kind::E4M3Fnuz)] kind: Fp8Kind,
    #[values(Scaling::Tensor, Scaling::Vector, Scaling::Block)] scaling: Scaling,
    #[values((64, 128), (33, 7), (130, 385), (65, 1100))] (n, k): (usize, usize),
    #[values(false, true)] gate_up: bool,
) {
    let weight = Operand::Fp8(kind, scaling);
    check(isa, Case { rows: &ROWS, n, k, gate_up, weight, activation: Operand::Bf16 });
}

#[rstest]
fn fp8_activations(
    #[values(Isa::Avx512Bf16, Isa::Portable)] isa: Isa,
    #[values(Fp8Kind::E4M3Fn, Fp8Kind::E4M3Fnuz)] kind: Fp8Kind,
    #[values(Scaling::Tensor, Scaling::Vector, Scaling::Block)] scaling: Scaling,
    #[values(
        Operand::Bf16,
        Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Tensor),
        Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Vector),
        Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Block)
    )]
    weight: Operand,
    #[values((33, 7), (130, 385))] (n, k): (usize, usize),
) {
    let activation = Operand::Fp8(kind, scaling);
    check(isa, Case { rows: &ROWS, n, k, gate_up: true, weight, activation });
}

/// More rows than a task takes and more K than is packed at once.
#[rstest]
fn large(
    #[values(Isa::Avx512Bf16, Isa::Portable)] isa: Isa,
    #[values(Operand::Bf16, Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Block))] weight: Operand,
) {
    check(isa, Case { rows: &[1, 200, 0, 97], n: 96, k: 2500, gate_up: true, weight, activation: weight });
    check(isa, Case { rows: &[20], n: 600, k: 300, gate_up: false, weight, activation: weight });
}
