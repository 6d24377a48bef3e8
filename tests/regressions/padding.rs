//! Rows and slots that are none, and ids that name nothing.

use aiter_experts::{MoeSorting, SortMemory};
use fused_moe::{DType, ErrorKind, ExpertMask, Fault, Overlap, QuantScheme, Rank, TensorView, TopK};
use moe_conformance::{Case, RoutingPattern};
use rstest::rstest;

use crate::common::{self, PAIRS, PATIENT, agrees_everywhere, linear, on_ranks, pair, seed};

/// aiter #4636: -1 in a top-k row was an illegal access, although it is the padding of vLLM's contract (vLLM #42034,
/// #57946: rows of CUDA graph padding). Slots and whole rows of -1 run through every pair of backends.
#[rstest]
fn aiter_4636_minus_one_is_no_expert(#[values(1, 8)] top_k: usize) {
    agrees_everywhere(&Case {
        routing: RoutingPattern::Padded,
        top_k,
        ..Case::small(QuantScheme::Unquantized, 3, seed())
    });
}

/// vLLM #42034: a token without any expert must come out as zeros, not as what was in the buffer.
#[test]
fn vllm_42034_a_padded_row_is_zero() {
    let case = Case::small(QuantScheme::Unquantized, 2, seed());
    let (weights, registry) = (case.weights(), fused_moe::default_backends());
    let mut inputs = case.inputs(0);
    inputs.iter_mut().for_each(|input| input.ids[..case.top_k].fill(-1));
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let mut rank = common::Rank::build(&registry, (&case.config(), &weights), pair(names), &group)?;
            let out = rank.apply(&inputs[rank.rank], Overlap::default())?;
            assert!(out[..case.hidden].iter().all(|y| *y == 0.0), "{names:?}");
            assert!(out.iter().all(|y| y.is_finite()));
            Ok(())
        });
    }
}

/// rtp-llm #1325: executors ignored how many rows were valid and computed the garbage behind them, ids included. The
/// sort reads no further than it is told: ids behind, which would be refused, are not.
#[test]
fn rtp_llm_1325_rows_behind_the_valid_ones_are_not_read() {
    let mask = ExpertMask::new(&linear(4, 1), Rank(0));
    let sorting = MoeSorting::new(&mask, 2, 4.try_into().unwrap()).unwrap();
    let (ids, weights) = ([0, 3, i32::MAX, -7, 1, 1], [0.5, 0.5, f32::NAN, f32::NAN, f32::NAN, f32::NAN]);
    let topk = TopK {
        ids: TensorView::from_slice(&ids, DType::I32, &[3, 2]).unwrap(),
        weights: TensorView::from_slice(&weights, DType::F32, &[3, 2]).unwrap(),
    };
    let mut memory = SortMemory::new(sorting.sizes(3));
    let sorted = sorting.sort(topk, 1, memory.buffers()).unwrap();
    assert_eq!(sorted.positions, [0, 4]);
    assert!(sorted.weights.iter().all(|w| w.is_finite()));
    assert!(sorting.sort(topk, 3, memory.buffers()).is_err());
}

/// mori #363: ids of a wrong numbering (physical ids of replicas) lay past the last expert, and a page fault took the
/// node down. An id that names no expert is the same typed error on every rank, and the next round is right.
#[test]
fn mori_363_an_id_past_the_experts_is_an_error_on_every_rank() {
    let case = Case::small(QuantScheme::Unquantized, 3, seed());
    let (weights, registry) = (case.weights(), fused_moe::default_backends());
    let good = case.inputs(0);
    let mut bad = good.clone();
    bad[1].ids[1] = case.num_experts as i32;
    let fault = Fault::ExpertIdOutOfRange { token: 0, slot: 1, id: case.num_experts as i32 };
    let wanted = ErrorKind::RankFailed { rank: Rank(1), fault };
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let mut rank = common::Rank::build(&registry, (&case.config(), &weights), pair(names), &group)?;
            let before = rank.apply(&good[rank.rank], Overlap::default())?;
            let error = rank.apply(&bad[rank.rank], Overlap::default()).expect_err("the id was accepted");
            assert_eq!(error.kind, wanted, "{names:?}");
            assert_eq!(rank.apply(&good[rank.rank], Overlap::default())?, before, "{names:?}");
            Ok(())
        });
    }
}
