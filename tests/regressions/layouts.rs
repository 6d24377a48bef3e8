//! Which row is whose: maps and masks, routing before and after dispatch, slots.

use aiter_experts::{MoeSorting, SortMemory};
use fused_moe::{DType, ExpertMap, ExpertMask, Overlap, QuantScheme, Rank, TensorView, TopK};
use moe_conformance::{Case, RoutingPattern};
use rstest::rstest;

use crate::common::{self, PAIRS, PATIENT, agrees_everywhere, linear, on_ranks, pair, seed};

/// vLLM #49758 (gsm8k 0.00 instead of 0.95), and before it vLLM #29773, #47158, #54580 and ATOM #1087: one tensor
/// argument was a map of local ids to some kernels and a mask of zeros and ones to others, and nobody could tell.
/// They are two types here, of which the sort takes one (`moe_tests::uncompilable::MAP_FOR_MASK`), and the conversion
/// is exact: on scattered experts, local ids are those of the placement.
#[test]
fn vllm_49758_a_mask_and_a_map_say_the_same() {
    let case =
        Case { placement: scattered(), num_experts: 13, ..Case::small(QuantScheme::Unquantized, 3, seed()) };
    for rank in (0..3).map(Rank) {
        let (mask, map) = (ExpertMask::new(&case.placement, rank), ExpertMap::new(&case.placement, rank));
        assert_eq!(mask.to_map(), map);
        // Read as a map, a mask would call every local expert 1 and every other 0.
        let sorting = MoeSorting::new(&mask, 1, 1.try_into().unwrap()).unwrap();
        let ids: Vec<i32> = (0..13).collect();
        let weights = [1.0; 13];
        let topk = TopK {
            ids: TensorView::from_slice(&ids, DType::I32, &[13, 1]).unwrap(),
            weights: TensorView::from_slice(&weights, DType::F32, &[13, 1]).unwrap(),
        };
        let mut memory = SortMemory::new(sorting.sizes(13));
        let sorted = sorting.sort(topk, 13, memory.buffers()).unwrap();
        let local: Vec<i32> = (0..case.placement.num_local_experts(rank) as i32).collect();
        assert_eq!(sorted.expert_ids, local);
    }
    agrees_everywhere(&case);
}

/// 13 experts over 3 ranks, no two neighbours on one.
fn scattered() -> fused_moe::ExpertPlacement {
    let owners: Vec<usize> = (0..13).map(|expert| (expert * 2) % 3).collect();
    fused_moe::ExpertPlacement::from_owners(&owners, 3).unwrap()
}

/// mori #475 and #546, InferenceX 2760: combine was called with the ids of the rows that had arrived instead of those
/// that the rank had sent; at EP8, 0.4 % of the tokens were wrong. Combine takes no ids here: `Routed`, made by
/// dispatch and consumed by combine, has them. Every rank sends all its tokens away, as many as none other.
#[rstest]
fn mori_475_combine_sums_the_rows_that_were_sent(#[values(2, 8)] ranks: usize) {
    agrees_everywhere(&Case {
        routing: RoutingPattern::RemoteOnly,
        num_experts: 16,
        top_k: 6,
        placement: linear(16, ranks),
        ..Case::small(QuantScheme::Unquantized, ranks, seed())
    });
}

/// vLLM #52639: dispatch kept its ids in a field of the backend, where the second micro-batch overwrote those of the
/// first. Here a whole layer call of one handle runs while the other's dispatch, or combine, is in flight.
#[test]
fn vllm_52639_micro_batches_in_flight_keep_their_routing() {
    let case = Case { top_k: 4, ..Case::small(QuantScheme::Unquantized, 3, seed()) };
    let (weights, registry) = (case.weights(), fused_moe::default_backends());
    let (first, second) = (case.inputs(0), case.inputs(1));
    for names in PAIRS {
        on_ranks(&case, PATIENT, |group| {
            let config = case.config();
            let build = || common::Rank::build(&registry, (&config, &weights), pair(names), &group);
            let (mut a, mut b) = (build()?, build()?);
            let (x, y) = (&first[a.rank], &second[a.rank]);
            let alone = (a.apply(x, Overlap::default())?, b.apply(y, Overlap::default())?);
            let mut meanwhile = Vec::new();
            let mut run_b = |_| {
                meanwhile = b.apply(y, Overlap::default())?;
                Ok(())
            };
            let in_dispatch = a.apply(x, Overlap { dispatch: Some(&mut run_b), combine: None })?;
            assert_eq!((&in_dispatch, &meanwhile), (&alone.0, &alone.1), "{names:?}");
            meanwhile.clear();
            let mut run_b = |_| {
                meanwhile = b.apply(y, Overlap::default())?;
                Ok(())
            };
            let in_combine = a.apply(x, Overlap { dispatch: None, combine: Some(&mut run_b) })?;
            assert_eq!((in_combine, meanwhile), alone, "{names:?}");
            Ok(())
        });
    }
}

/// mori #505 sent slots twice for top-6, which does not divide the 64 tokens of a window, and its IntraNodeLL loop
/// over eight ranks never looks at a ninth slot. Every number of slots is the same here.
#[rstest]
fn mori_505_every_slot_arrives_once(#[values(3, 6, 9, 16)] top_k: usize) {
    agrees_everywhere(&Case {
        top_k,
        num_experts: 16,
        placement: linear(16, 8),
        tokens: vec![5; 8],
        ..Case::small(QuantScheme::Unquantized, 8, seed())
    });
}

/// mori #363 and vLLM's floor of `num_experts / ranks`: the rank of an expert was a quotient of its id, which is wrong as
/// soon as the experts do not divide. It comes from a table here; 13 experts over 8 ranks, and a rank without any.
#[test]
fn mori_363_the_rank_of_an_expert_is_no_quotient() {
    let uneven = Case {
        num_experts: 13,
        placement: linear(13, 8),
        ..Case::small(QuantScheme::Unquantized, 8, seed())
    };
    agrees_everywhere(&uneven);
    let owners = [0, 0, 2, 2, 0];
    let placement = fused_moe::ExpertPlacement::from_owners(&owners, 3).unwrap();
    agrees_everywhere(&Case {
        num_experts: 5,
        placement,
        ..Case::small(QuantScheme::Unquantized, 3, seed())
    });
}

/// vLLM's batched and FlashInfer backends multiply the routing weight into the caller's own hidden states (`a1.mul_`),
/// which the shared experts then read. A `TensorView` cannot be written, and [`agrees_everywhere`] compares the
/// caller's tensors before and after.
#[test]
fn vllm_a1_mul_leaves_the_hidden_states_alone() {
    agrees_everywhere(&Case {
        top_k: 1,
        apply_router_weight_on_input: true,
        ..Case::small(QuantScheme::Unquantized, 3, seed())
    });
}
