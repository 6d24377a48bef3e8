//! Products, scales and activation against a plain f64 computation.

mod common;

use common::{Case, Operand, Scaling};
use grouped_gemm::{Activation, Executor, Fp8Kind, Isa};
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
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values((64, 128), (1, 1), (70, 33), (200, 257), (130, 1000))] (n, k): (usize, usize),
    #[values(false, true)] gate_up: bool,
) {
    check(
        isa,
        Case { rows: &ROWS, n, k, gate_up, weight: Operand::Bf16, activation: Operand::Bf16, ..Case::PLAIN },
    );
}

#[rstest]
fn f32(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values((64, 128), (1, 1), (70, 33), (200, 257), (130, 1000))] (n, k): (usize, usize),
    #[values(false, true)] gate_up: bool,
    #[values(false, true)] bias: bool,
) {
    let (weight, activation) = (Operand::F32, Operand::F32);
    check(isa, Case { rows: &ROWS, n, k, gate_up, weight, activation, bias, ..Case::PLAIN });
}

#[rstest]
fn fp8_weights(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Fp8Kind::E4M3Fn, Fp8Kind::E4M3Fnuz)] kind: Fp8Kind,
    #[values(Scaling::Tensor, Scaling::Vector, Scaling::Block)] scaling: Scaling,
    #[values((64, 128), (33, 7), (130, 385), (65, 1100))] (n, k): (usize, usize),
    #[values(false, true)] gate_up: bool,
) {
    let weight = Operand::Fp8(kind, scaling);
    check(isa, Case { rows: &ROWS, n, k, gate_up, weight, activation: Operand::Bf16, ..Case::PLAIN });
}

#[rstest]
fn fp8_activations(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
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
    check(isa, Case { rows: &ROWS, n, k, gate_up: true, weight, activation, ..Case::PLAIN });
}

/// More rows than a task takes and more K than is packed at once.
#[rstest]
fn large(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Operand::Bf16, Operand::F32, Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Block))] weight: Operand,
) {
    check(
        isa,
        Case {
            rows: &[1, 200, 0, 97],
            n: 96,
            k: 2500,
            gate_up: true,
            weight,
            activation: weight,
            ..Case::PLAIN
        },
    );
    check(
        isa,
        Case { rows: &[20], n: 600, k: 300, gate_up: false, weight, activation: weight, ..Case::PLAIN },
    );
}

#[rstest]
fn fp4_weights(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(Operand::Mxfp4, Operand::Nvfp4)] weight: Operand,
    #[values(Operand::Bf16, Operand::Nvfp4, Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Block))]
    activation: Operand,
    #[values((64, 128), (33, 32), (130, 416), (65, 1120))] (n, k): (usize, usize),
    #[values(false, true)] gate_up: bool,
) {
    check(isa, Case { rows: &ROWS, n, k, gate_up, weight, activation, ..Case::PLAIN });
}

#[rstest]
fn activations_and_biases(
    #[values(Isa::Avx512Bf16, Isa::Avx2Fma, Isa::Portable)] isa: Isa,
    #[values(
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::SwigluOai { alpha: 1.702, limit: 7.0 },
        Activation::SwigluOai { alpha: 0.9, limit: 0.5 },
        Activation::SiluClamped { limit: 1.5 }
    )]
    join: Activation,
    #[values(Operand::Bf16, Operand::Fp8(Fp8Kind::E4M3Fn, Scaling::Vector), Operand::Mxfp4)] weight: Operand,
    #[values(false, true)] bias: bool,
) {
    let case = Case { rows: &[3, 0, 20], n: 70, k: 64, gate_up: true, weight, join, bias, ..Case::PLAIN };
    check(isa, case);
}

/// Without an activation, a bias is part of what the router weight multiplies.
#[rstest]
fn a_bias_of_plain_products(
    #[values(Operand::Bf16, Operand::Fp8(Fp8Kind::E4M3Fnuz, Scaling::Block), Operand::Nvfp4)] weight: Operand,
) {
    check(Isa::Portable, Case { rows: &[5, 9], n: 130, k: 160, weight, bias: true, ..Case::PLAIN });
}

/// The comparison sees a wrong activation and a bias of the wrong column.
#[test]
#[should_panic(expected = "row 0 column")]
fn a_wrong_activation_is_noticed() {
    let join = Activation::Gelu;
    let mut call = Case { rows: &[20], n: 64, k: 64, gate_up: true, join, ..Case::PLAIN }.make();
    let executor = Executor::new(Isa::Portable, 1.try_into().unwrap()).unwrap();
    call.case.join = Activation::GeluTanh;
    let other = call.run(&executor);
    call.case.join = join;
    call.check_rows(&other);
}

#[test]
#[should_panic(expected = "row 0 column")]
fn a_wrong_bias_is_noticed() {
    let mut call = Case { rows: &[20], n: 64, k: 64, gate_up: true, bias: true, ..Case::PLAIN }.make();
    let executor = Executor::new(Isa::Portable, 1.try_into().unwrap()).unwrap();
    let out = call.run(&executor);
    call.biases.iter_mut().for_each(|bias| bias.rotate_left(1));
    call.check_rows(&out);
}
