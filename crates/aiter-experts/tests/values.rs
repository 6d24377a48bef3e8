//! Outputs against the contract in f64.

mod common;

use common::reference::{Expected, Fault};
use common::*;
use fused_moe_core::QuantScheme::{self, *};
use fused_moe_core::{ExpertPlacement, Fp8Format, Rank};
use rstest::rstest;

/// bf16 rounds the output once, which alone is 1.7e-3.
const TOLERANCE: f64 = 5e-3;

const TINY: Shape = Shape { hidden: 1, intermediate: 1, experts: 2, top_k: 1 };
const WHOLE_BLOCKS: Shape = Shape { hidden: 256, intermediate: 128, experts: 4, top_k: 4 };
const ODD: Shape = Shape { hidden: 131, intermediate: 257, experts: 5, top_k: 2 };

/// A batch whose reference does not hang on the last bits of a sum, and that reference.
fn draw(
    quant: QuantScheme,
    shape: Shape,
    [rows, max_rows]: [usize; 2],
    arrival: Arrival,
) -> (fused_moe_core::MoeConfig, Layer, Batch, Expected) {
    let mut rng = fresh_rng();
    let config = on_one_rank(quant, shape);
    let layer = Layer::random(&mut rng, &config);
    loop {
        let batch = Batch::random(&mut rng, &config, [rows, max_rows]);
        let expected = Expected::of(&config, (&layer, Rank(0)), &batch, (arrival, Fault::None));
        if !expected.is_ambiguous(quant) {
            return (config, layer, batch, expected);
        }
    }
}

#[rstest]
fn every_scheme_matches_the_contract(
    #[values(
        Unquantized,
        Fp8Block(FN),
        Fp8Block(FNUZ),
        Fp8Block(Fp8Format::E4M3FnuzMax224),
        Fp8Ptpc(FN),
        Fp8Ptpc(FNUZ),
        Fp8PerTensor(FN),
        Fp8PerTensor(FNUZ)
    )]
    quant: QuantScheme,
    #[values(Arrival::Quantised, Arrival::Bf16)] arrival: Arrival,
    #[values((RAGGED, [33, 40]), (WHOLE_BLOCKS, [130, 130]), (ODD, [7, 64]), (TINY, [20, 21]))]
    (shape, rows): (Shape, [usize; 2]),
) {
    let (config, layer, batch, expected) = draw(quant, shape, rows, arrival);
    let out = run(&config, &layer, &batch, arrival);
    let error = distance(out.iter().map(|v| v.to_f64()), &expected.out);
    assert!(error < TOLERANCE, "{quant} {shape:?} {rows:?} {arrival:?}: relative error {error:e}");
}

/// The comparison above sees each of these mistakes.
#[rstest]
#[case(Unquantized, Fault::SwappedGateUp)]
#[case(Unquantized, Fault::NoRouterWeight)]
#[case(Fp8Block(FN), Fault::NoSecondQuantisation)]
#[case(Fp8Ptpc(FN), Fault::NoSecondQuantisation)]
#[case(Fp8PerTensor(FNUZ), Fault::NoSecondQuantisation)]
#[case(Fp8Block(FNUZ), Fault::WrongInputScale)]
fn mistakes_are_noticed(#[case] quant: QuantScheme, #[case] fault: Fault) {
    let (config, layer, batch, _) = draw(quant, RAGGED, [33, 40], Arrival::Quantised);
    let wrong = Expected::of(&config, (&layer, Rank(0)), &batch, (Arrival::Quantised, fault));
    let out = run(&config, &layer, &batch, Arrival::Quantised);
    let error = distance(out.iter().map(|v| v.to_f64()), &wrong.out);
    assert!(error > 2.0 * TOLERANCE, "{quant} {fault:?}: relative error {error:e}");
}

#[rstest]
fn no_rows_and_no_experts_give_zeros(
    #[values(Unquantized, Fp8Block(FN), Fp8PerTensor(FN))] quant: QuantScheme,
) {
    let config = on_one_rank(quant, RAGGED);
    let mut rng = fresh_rng();
    let layer = Layer::random(&mut rng, &config);
    for arrival in [Arrival::Quantised, Arrival::Bf16] {
        assert!(run(&config, &layer, &Batch::random(&mut rng, &config, [0, 3]), arrival).is_empty());
        let mut batch = Batch::random(&mut rng, &config, [5, 6]);
        batch.ids[..5 * RAGGED.top_k].fill(-1);
        let out = run(&config, &layer, &batch, arrival);
        assert!(out.iter().all(|v| v.to_bits() == 0), "{out:?}");
    }
}

#[test]
fn all_tokens_may_go_to_one_expert() {
    let shape = Shape { top_k: 1, ..RAGGED };
    let config = on_one_rank(Unquantized, shape);
    let mut rng = fresh_rng();
    let layer = Layer::random(&mut rng, &config);
    let mut batch = Batch::random(&mut rng, &config, [200, 200]);
    batch.ids.fill(6);
    let expected = Expected::of(&config, (&layer, Rank(0)), &batch, (Arrival::Bf16, Fault::None));
    let out = run(&config, &layer, &batch, Arrival::Bf16);
    let error = distance(out.iter().map(|v| v.to_f64()), &expected.out);
    assert!(error < TOLERANCE, "relative error {error:e}");
}

/// The partial sums of the ranks add up to what one rank with all experts computes.
#[rstest]
fn ranks_add_up(
    #[values(Unquantized, Fp8Block(FN), Fp8Ptpc(FNUZ))] quant: QuantScheme,
    #[values(Arrival::Quantised, Arrival::Bf16)] arrival: Arrival,
) {
    let mut rng = fresh_rng();
    let one = on_one_rank(quant, RAGGED);
    // Rank 1 holds nothing, and no rank a run of neighbours.
    let owners = [2, 0, 3, 0, 2, 3, 0, 2];
    let many = config(quant, RAGGED, ExpertPlacement::from_owners(&owners, 4).unwrap());
    let layer = Layer::random(&mut rng, &one);
    let batch = Batch::random(&mut rng, &one, [33, 40]);
    let whole: Vec<f64> = run(&one, &layer, &batch, arrival).iter().map(|v| v.to_f64()).collect();
    let mut sum = vec![0.0; whole.len()];
    for rank in (0..4).map(Rank) {
        let provider = aiter_experts::AiterExperts::new();
        let part = run_with(&provider, &many, (&layer, rank), &batch, arrival);
        for ((row, part), sum) in part.chunks(RAGGED.hidden).enumerate().zip(sum.chunks_mut(RAGGED.hidden)) {
            let ids = &batch.ids[row * RAGGED.top_k..][..RAGGED.top_k];
            if !ids.iter().any(|&id| id >= 0 && owners[id as usize] == rank.index()) {
                assert!(part.iter().all(|v| v.to_bits() == 0), "row {row} of {rank} has no local expert");
            }
            part.iter().zip(sum).for_each(|(part, sum)| *sum += part.to_f64());
        }
    }
    let error = distance(sum, &whole);
    assert!(error < TOLERANCE, "{quant}: relative error {error:e}");
}
