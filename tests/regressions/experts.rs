//! Shapes and weights of the experts.

use aiter_experts::{MoeSorting, SortMemory, SortPolicy};
use fused_moe::{
    DType, ErrorKind, ExpertMask, Fault, Fp8Format, Overlap, QuantScheme, Rank, Selection, TensorView, TopK,
};
use moe_conformance::{Case, Outcome, RoutingPattern, Settings, layer};
use rstest::rstest;

use crate::common::{self, PATIENT, linear, on_ranks, seed};

const BLOCK: QuantScheme = QuantScheme::Fp8Block(Fp8Format::E4M3Fn);

fn agrees(case: &Case) {
    let outcome = layer::run(&fused_moe::default_backends(), case, Selection::default(), Settings::default());
    assert_eq!(outcome, Outcome::Pass);
}

/// aiter #4783: FP8 with 1x128 scales read out of bounds for 304 and 336 rows (gfx942); #2946: for 128 experts and 64 rows
/// or more; #3471, #822: for sizes that a tile did not divide. The same shapes, on the host.
#[rstest]
#[case::rows_304(304, 8, 2)]
#[case::rows_336(336, 8, 2)]
#[case::experts_128(64, 128, 8)]
fn aiter_4783_rows_and_experts_that_fit_no_tile(
    #[case] tokens: usize,
    #[case] num_experts: usize,
    #[case] top_k: usize,
) {
    agrees(&Case {
        tokens: vec![tokens],
        num_experts,
        top_k,
        intermediate: 32,
        placement: linear(num_experts, 1),
        ..Case::small(BLOCK, 1, seed())
    });
}

/// aiter: all tokens on one expert, the others empty, was a case that no tuned configuration had.
#[test]
fn aiter_2946_one_expert_gets_everything() {
    agrees(&Case {
        tokens: vec![130],
        top_k: 1,
        routing: RoutingPattern::SameExperts,
        ..Case::small(BLOCK, 1, seed())
    });
}

/// aiter #2576, #2639: a bool stood where one of three ways to sort was meant, and `True` was the wrong one. They have names
/// here, are parsed from these alone, and give the same result.
#[test]
fn aiter_2576_ways_to_sort_have_names() {
    assert!("1".parse::<SortPolicy>().is_err() && "true".parse::<SortPolicy>().is_err());
    let sorting = |policy: &str| {
        let mask = ExpertMask::new(&linear(3, 1), Rank(0));
        let sorting = MoeSorting::new(&mask, 2, 2.try_into().unwrap()).unwrap();
        let sorting = sorting.with_policy(policy.parse().unwrap());
        let topk = TopK {
            ids: TensorView::from_slice(&[2, 0, 1, 2, 2, -1], DType::I32, &[3, 2]).unwrap(),
            weights: TensorView::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], DType::F32, &[3, 2]).unwrap(),
        };
        let mut memory = SortMemory::new(sorting.sizes(3));
        let sorted = sorting.sort(topk, 3, memory.buffers()).unwrap();
        (sorted.token_ids.to_vec(), sorted.weights.to_vec(), sorted.expert_ids.to_vec())
    };
    let single = sorting("single");
    assert_eq!(single.1, [2.0, 0.0, 3.0, 0.0, 1.0, 4.0, 5.0, 0.0]);
    assert_eq!((&sorting("multi"), &sorting("auto")), (&single, &single));
}

/// FlashInfer #3206: an intermediate size of 704 (under TP) was unsupported, found at run time. It is a size like any
/// other.
#[rstest]
fn flashinfer_3206_an_intermediate_size_of_704(
    #[values(QuantScheme::Unquantized, BLOCK)] quant: QuantScheme,
) {
    agrees(&Case { tokens: vec![9], intermediate: 704, ..Case::small(quant, 1, seed()) });
}

/// AITER's weights carry `is_shuffled` as an attribute, which a copy loses; the kernel then multiplies in the wrong order.
/// Packed weights are of a type that knows who packed them. Those of another backend are refused, on every rank alike.
#[test]
fn aiter_weights_packed_for_another_kernel_are_refused() {
    let case = Case::small(QuantScheme::Unquantized, 2, seed());
    let (weights, registry, inputs) = (case.weights(), fused_moe::default_backends(), case.inputs(0));
    let build = |experts, comm, group: &_| {
        let selection = Selection { comm: Some(comm), experts: Some(experts) };
        common::Rank::build(&registry, (&case.config(), &weights), selection, group)
    };
    on_ranks(&case, PATIENT, |group| {
        let mut aiter = build("aiter", "mori_high_throughput", &group)?;
        let batched = build("batched", "batched", &group)?;
        let before = aiter.apply(&inputs[aiter.rank], Overlap::default())?;
        let own = match aiter.rank {
            1 => Some(std::mem::replace(&mut aiter.weights, batched.weights)),
            _ => None,
        };
        let error = aiter.apply(&inputs[aiter.rank], Overlap::default()).expect_err("weights of `batched`");
        let wanted = ErrorKind::RankFailed { rank: Rank(1), fault: Fault::BadTensor };
        assert_eq!(error.kind, wanted);
        if let Some(own) = own {
            aiter.weights = own;
        }
        assert_eq!(aiter.apply(&inputs[aiter.rank], Overlap::default())?, before);
        Ok(())
    });
}

/// FlashInfer #2703: `output=` was ignored and another tensor returned. The output is lent, and written in every element:
/// `apply` returns nothing else. The buffers of these calls were full of NaN.
#[test]
fn flashinfer_2703_the_lent_output_is_what_is_written() {
    let case = Case::small(QuantScheme::Unquantized, 1, seed());
    let (weights, registry, inputs) = (case.weights(), fused_moe::default_backends(), case.inputs(0));
    on_ranks(&case, PATIENT, |group| {
        let mut rank =
            common::Rank::build(&registry, (&case.config(), &weights), Selection::default(), &group)?;
        let out = rank.apply(&inputs[0], Overlap::default())?;
        assert!(out.iter().all(|y| y.is_finite()) && out.iter().any(|y| *y != 0.0));
        Ok(())
    });
}
