//! The sorted layout against worked examples and its definition.

mod common;

use std::num::NonZeroUsize;
use std::ops::Range;

use aiter_experts::{
    AiterError, MAX_BLOCK_M, MAX_TOKENS, MoeSorting, SortBatch, SortMemory, SortPolicy, SortedTokenId,
};
use common::fresh_rng;
use fused_moe_core::{DType, ExpertMask, ExpertPlacement, Rank, TensorView, TopK};
use grouped_gemm::experts::ExpertsError;
use rand::Rng;
use rand::seq::index::sample;
use rstest::rstest;

const IDS: [[i32; 3]; 5] = [[0, 3, 5], [2, 3, 5], [1, 3, 5], [1, 2, 3], [1, 3, 5]];

fn sorting(held: &[bool], top_k: usize, block_m: usize) -> MoeSorting {
    let owners: Vec<usize> = held.iter().map(|&held| usize::from(!held)).collect();
    let placement = ExpertPlacement::from_owners(&owners, 2).unwrap();
    let mask = ExpertMask::new(&placement, Rank(0));
    MoeSorting::new(&mask, top_k, NonZeroUsize::new(block_m).unwrap()).unwrap()
}

fn topk<'a>(ids: &'a [i32], weights: &'a [f32], top_k: usize) -> TopK<'a> {
    let dims = [ids.len() / top_k, top_k];
    TopK {
        ids: TensorView::from_slice(ids, DType::I32, &dims).unwrap(),
        weights: TensorView::from_slice(weights, DType::F32, &dims).unwrap(),
    }
}

/// Memory of a sort, filled with what must not be taken for a result.
fn memory(sorting: &MoeSorting, tokens: usize) -> SortMemory {
    let mut memory = SortMemory::new(sorting.sizes(tokens));
    let buffers = memory.buffers();
    buffers.token_ids.fill(SortedTokenId::new(7, 77));
    buffers.weights.fill(f32::NAN);
    for ids in [buffers.expert_ids, buffers.positions, buffers.cursors] {
        ids.fill(i32::MAX);
    }
    memory
}

/// The worked example of AITER's sort: blocks of 4, 6 experts, 5 tokens, top-3.
#[rstest]
#[case([true; 6], &[0, 1, 2, 3, 3, 5], "0 | 2 3 4 | 1 3 | 0 1 2 3 4 | 0 1 2 4")]
#[case([true, false, true, true, false, true], &[0, 1, 2, 2, 3], "0 | 1 3 | 0 1 2 3 4 | 0 1 2 4")]
fn worked_example(
    #[case] held: [bool; 6],
    #[case] expert_ids: &[i32],
    #[case] tokens: &str,
    #[values(SortPolicy::Auto, SortPolicy::SinglePass, SortPolicy::MultiPhase)] policy: SortPolicy,
) {
    let sorting = sorting(&held, 3, 4).with_policy(policy);
    let weights: Vec<f32> = (0..15).map(|slot| slot as f32 + 0.5).collect();
    let mut memory = memory(&sorting, 5);
    let sorted = sorting.sort(topk(IDS.as_flattened(), &weights, 3), 5, memory.buffers()).unwrap();
    assert_eq!(sorted.expert_ids, expert_ids);
    assert_eq!(sorted.token_ids.len(), 4 * expert_ids.len());
    assert_eq!(sorted.num_valid_ids(), [4 * expert_ids.len() as i32, 5]);
    let tokens_of = |rows: Range<usize>| {
        let tokens: Vec<_> = sorted.token_ids[rows].iter().map(|id| id.token().to_string()).collect();
        tokens.join(" ")
    };
    let found: Vec<_> = sorted.experts().map(|(_, rows)| tokens_of(rows)).collect();
    assert_eq!(found.join(" | "), tokens);
    // Expert 0 has token 0 in slot 0, and three entries of padding: slot 3 (top-k), token 5 (their number).
    let bits: Vec<u32> = sorted.token_ids[..4].iter().map(|id| id.bits()).collect();
    assert_eq!(bits, [0, 3 << 24 | 5, 3 << 24 | 5, 3 << 24 | 5]);
    assert_eq!(sorted.weights[..4], [0.5, 0.0, 0.0, 0.0]);
    for (entry, id) in sorted.token_ids.iter().enumerate().filter(|(_, id)| id.token() < 5) {
        let slot = 3 * id.token() + id.slot() as usize;
        assert_eq!((sorted.weights[entry], sorted.positions[slot]), (weights[slot], entry as i32));
    }
}

#[test]
fn properties_of_random_sorts() {
    let mut rng = fresh_rng();
    for round in 0..300 {
        let experts = rng.random_range(1..20);
        let top_k = rng.random_range(1..=experts.min(9));
        let block_m = if rng.random_bool(0.8) { rng.random_range(1..6) } else { rng.random_range(6..200) };
        // Now and then enough for many chunks, the last of them smaller.
        let most = if round % 10 == 0 { 3000 } else { 40 };
        let (tokens, garbage) = (rng.random_range(0..most), rng.random_range(0..3));
        let held: Vec<bool> = (0..experts).map(|_| rng.random_bool(0.6)).collect();
        let local: Vec<usize> = (0..experts).filter(|&expert| held[expert]).collect();
        let mut ids = vec![i32::MAX; (tokens + garbage) * top_k];
        for row in ids.chunks_mut(top_k).take(tokens) {
            for (id, expert) in row.iter_mut().zip(sample(&mut rng, experts, top_k)) {
                *id = if rng.random_bool(0.1) { -1 } else { expert as i32 };
            }
        }
        let mut weights = vec![f32::NAN; ids.len()];
        weights[..tokens * top_k].fill_with(|| rng.random());

        // The definition: for every local expert, its (token, slot) pairs in ascending order, then padding.
        let (mut token_ids, mut sorted_weights, mut expert_ids) = (vec![], vec![], vec![]);
        let mut positions = vec![-1; tokens * top_k];
        for (local_id, &expert) in local.iter().enumerate() {
            for slot in (0..tokens * top_k).filter(|&slot| ids[slot] == expert as i32) {
                positions[slot] = token_ids.len() as i32;
                token_ids.push(SortedTokenId::new(slot / top_k, (slot % top_k) as u8));
                sorted_weights.push(weights[slot]);
            }
            token_ids
                .resize(token_ids.len().next_multiple_of(block_m), SortedTokenId::new(tokens, top_k as u8));
            sorted_weights.resize(token_ids.len(), 0.0);
            expert_ids.resize(token_ids.len() / block_m, local_id as i32);
        }
        for policy in SortPolicy::ALL {
            let sorting = sorting(&held, top_k, block_m).with_policy(policy);
            // Memory for more tokens, as a kernel has it.
            let mut memory = memory(&sorting, tokens + rng.random_range(0..2));
            let sorted = sorting.sort(topk(&ids, &weights, top_k), tokens, memory.buffers()).unwrap();
            assert_eq!(sorted.token_ids, token_ids, "{policy}");
            assert_eq!(sorted.weights, sorted_weights, "{policy}");
            assert_eq!(sorted.expert_ids, expert_ids, "{policy}");
            assert_eq!(sorted.positions, positions, "{policy}");
            let listed: usize = sorted.experts().map(|(_, rows)| rows.len()).sum();
            assert_eq!(listed, positions.iter().filter(|&&position| position >= 0).count(), "{policy}");
        }
    }
}

/// However the tokens are cut into chunks, the error is that of the first of them.
#[test]
fn all_policies_refuse_the_same_row() {
    let mut rng = fresh_rng();
    for _ in 0..50 {
        let tokens = rng.random_range(1..2000);
        let mut ids: Vec<i32> = (0..3 * tokens).map(|slot| slot as i32 % 3).collect();
        for _ in 0..rng.random_range(1..5) {
            let bad = [7, -2, 1, 0][rng.random_range(0..4)];
            ids[3 * rng.random_range(0..tokens) + 2] = bad;
        }
        let weights = vec![1.0; ids.len()];
        let refused = SortPolicy::ALL.map(|policy| {
            let sorting = sorting(&[true, true, false], 3, 2).with_policy(policy);
            let mut memory = memory(&sorting, tokens);
            sorting.sort(topk(&ids, &weights, 3), tokens, memory.buffers()).unwrap_err().to_string()
        });
        assert_eq!([&refused[1], &refused[2]], [&refused[0]; 2]);
    }
}

#[test]
fn auto_goes_by_pairs_experts_and_threads() {
    let batch = SortBatch { pairs: 1 << 18, experts: 32, threads: 8 };
    let auto = |batch| SortPolicy::Auto.for_batch(batch);
    assert_eq!(auto(batch), SortPolicy::MultiPhase);
    for other in [
        SortBatch { pairs: 1000, ..batch },
        SortBatch { experts: 1 << 14, ..batch },
        SortBatch { threads: 1, ..batch },
    ] {
        assert_eq!(auto(other), SortPolicy::SinglePass, "{other:?}");
        for policy in [SortPolicy::SinglePass, SortPolicy::MultiPhase] {
            assert_eq!(policy.for_batch(other), policy);
        }
    }
}

#[test]
fn policies_have_names() {
    for policy in SortPolicy::ALL {
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    let error = "2".parse::<SortPolicy>().unwrap_err().to_string();
    assert_eq!(error, "\"2\" is no sort policy (auto, single, multi)");
}

#[test]
fn ids_that_name_nothing_are_refused() {
    let sorting = sorting(&[true, false, true], 2, 1);
    let sort = |ids: [i32; 4], tokens| {
        sorting.sort(topk(&ids, &[1.0; 4], 2), tokens, memory(&sorting, 2).buffers()).map(drop)
    };
    assert!(sort([0, 2, -1, -1], 2).is_ok());
    for bad in [3, -2, i32::MIN, i32::MAX] {
        let error = sort([0, 2, 1, bad], 2).unwrap_err();
        let wanted = format!("expert id {bad} of row 1 slot 1 is neither -1 nor below 3");
        assert_eq!(error.to_string(), wanted);
        assert!(sort([0, 2, 1, bad], 1).is_ok(), "row 1 is behind the valid ones");
    }
    assert_eq!(sort([0, 1, 2, 2], 2).unwrap_err().to_string(), "row 1 names expert 2 twice");
    let long = sort([0, 2, -1, -1], 3).unwrap_err();
    assert_eq!(long.to_string(), "top-k ids is [2, 2] of i32, needs [3 or more, 2]");
    assert!(matches!(
        sort([0; 4], MAX_TOKENS).unwrap_err(),
        AiterError::Experts(ExpertsError::TooManyRows { .. })
    ));

    let mut short = memory(&sorting, 1);
    let error = sorting.sort(topk(&[0, 2, 0, 2], &[1.0; 4], 2), 2, short.buffers()).unwrap_err();
    assert_eq!(error.to_string(), "the token ids of the sort need room for 4 entries, found 2");
}

#[test]
fn a_slot_is_one_byte() {
    let placement = ExpertPlacement::linear(300, 1).unwrap();
    let new = |top_k| MoeSorting::new(&ExpertMask::new(&placement, Rank(0)), top_k, NonZeroUsize::MIN);
    assert!(new(255).is_ok());
    let error = new(256).unwrap_err().to_string();
    assert_eq!(error, "top-k 256 does not fit the 8 bits of a slot (at most 255)");
    let id = SortedTokenId::new(MAX_TOKENS - 1, 254);
    assert_eq!((id.token(), id.slot(), id.bits()), (MAX_TOKENS - 1, 254, 0xfeff_ffff));
}

/// The sizes of such sorts, and the positions in them, overflowed before there was a limit.
#[test]
fn sizes_that_overflow_are_refused() {
    let placement = ExpertPlacement::linear(300, 1).unwrap();
    let new = |block_m| {
        MoeSorting::new(&ExpertMask::new(&placement, Rank(0)), 255, NonZeroUsize::new(block_m).unwrap())
    };
    assert!(matches!(new(usize::MAX).unwrap_err(), AiterError::BlockSize { block_m: usize::MAX }));
    let error = new(MAX_BLOCK_M + 1).unwrap_err().to_string();
    assert_eq!(error, "blocks of 4097 entries are too large to sort into (at most 4096)");

    let sorting = new(MAX_BLOCK_M).unwrap();
    assert_eq!(sorting.sizes(usize::MAX), sorting.sizes(MAX_TOKENS));
    // 255 entries for each of 2^24 tokens have no i32.
    let view = topk(&[], &[], 255);
    let error = sorting.sort(view, MAX_TOKENS - 1, memory(&sorting, 0).buffers()).unwrap_err().to_string();
    assert_eq!(error, "16777215 rows were received, at most 8416686 are possible");
}
