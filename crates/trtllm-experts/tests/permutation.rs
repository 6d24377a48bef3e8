//! Permutations of random rows against what their names say.

use std::num::NonZeroUsize;

use fused_moe_core::{DType, TensorView};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rstest::rstest;
use trtllm_experts::{NO_TOKEN, PermuteMemory, Permuter, TrtllmError, tile_tokens_dim};

fn fresh_rng() -> Pcg64Mcg {
    let seed = rand::random();
    println!("seed {seed}");
    Pcg64Mcg::seed_from_u64(seed)
}

fn random_ids(rows: usize, experts: usize, top_k: usize, rng: &mut Pcg64Mcg) -> Vec<i32> {
    let row = |_| {
        let mut ids: Vec<i32> = (0..experts as i32).collect();
        ids.shuffle(rng);
        ids.truncate(top_k);
        ids.iter_mut().for_each(|id| *id = if rng.random_bool(0.1) { -1 } else { *id });
        ids
    };
    (0..rows).flat_map(row).collect()
}

#[rstest]
fn rows_are_where_the_indices_say(
    #[values(0, 1, 7, 100)] rows: usize,
    #[values(1, 3, 8, 64)] tile: usize,
    #[values(0..12, 3..6, 5..6, 4..4)] local: std::ops::Range<usize>,
    #[values(1, 5)] top_k: usize,
) {
    let (rng, first) = (&mut fresh_rng(), local.start);
    let ids = random_ids(rows, 12, top_k, rng);
    let permuter = Permuter::new(local.clone(), 12, top_k, NonZeroUsize::new(tile).unwrap()).unwrap();
    let mut memory = PermuteMemory::new(permuter.sizes(rows));
    let view = TensorView::from_slice(&ids, DType::I32, &[rows, top_k]).unwrap();
    let permuted = permuter.permute(view, rows, memory.buffers()).unwrap();

    // The sorted order, written down the slow way.
    let mut tokens = Vec::new();
    let mut places = vec![-1; ids.len()];
    let mut tiles = Vec::new();
    for expert in local {
        let start = tokens.len();
        for (slot, _) in ids.iter().enumerate().filter(|(_, id)| **id == expert as i32) {
            places[slot] = tokens.len() as i32;
            tokens.push((slot / top_k) as u32);
        }
        let end = tokens.len();
        while tokens.len() % tile != 0 {
            tokens.push(NO_TOKEN);
        }
        for first in (start..end).step_by(tile) {
            tiles.push((expert, (first + tile).min(end)));
        }
    }
    assert_eq!(permuted.expanded_idx_to_permuted_idx, places);
    assert_eq!(permuted.permuted_idx_to_token_idx, tokens);
    assert_eq!(permuted.permuted_idx_size(), tokens.len());
    let ctas: Vec<_> = permuted.ctas().map(|cta| (cta.batch_idx + first, cta.mn_limit)).collect();
    assert_eq!(ctas, tiles);
}

/// Enough for the worst rows, and no more: FlashInfer's bound on tiles.
#[rstest]
fn the_bound_is_reached(#[values(1, 8)] tile: usize, #[values(1, 2, 30)] rows: usize) {
    let tile_tokens_dim = NonZeroUsize::new(tile).unwrap();
    let permuter = Permuter::new(0..3, 8, 3, tile_tokens_dim).unwrap();
    let sizes = permuter.sizes(rows);
    assert_eq!((sizes.expanded, sizes.experts), (rows * 3, 3));
    let mut most = 0;
    for spread in 0..rows {
        // The first rows go to all local experts, the others to one.
        let ids: Vec<i32> =
            (0..rows).flat_map(|row| if row <= spread { [0, 1, 2] } else { [0, 6, 7] }).collect();
        let mut memory = PermuteMemory::new(sizes);
        let view = TensorView::from_slice(&ids, DType::I32, &[rows, 3]).unwrap();
        most = most.max(permuter.permute(view, rows, memory.buffers()).unwrap().permuted_idx_size());
    }
    assert!(most <= sizes.permuted && most + 3 * tile > sizes.permuted, "{most} of {}", sizes.permuted);
    if tile == 1 {
        assert_eq!(most, sizes.permuted);
    }
}

#[test]
fn what_is_no_expert_is_refused() {
    let permuter = Permuter::new(2..4, 6, 2, NonZeroUsize::MIN).unwrap();
    let permute = |ids: &[i32], rows: usize, room: usize| {
        let mut memory = PermuteMemory::new(permuter.sizes(room));
        let view = TensorView::from_slice(ids, DType::I32, &[ids.len() / 2, 2]).unwrap();
        permuter.permute(view, rows, memory.buffers()).map(drop).map_err(|error| error.to_string())
    };
    // Rows behind the valid ones are not read, and the same remote expert twice is somebody else's error.
    assert_eq!(permute(&[2, 3, 5, 5, 99, -7], 2, 2), Ok(()));
    let wrong = |ids: &[i32]| permute(ids, ids.len() / 2, 4).unwrap_err();
    assert_eq!(wrong(&[2, 3, 1, 6]), "expert id 6 of row 1 slot 1 is neither -1 nor below 6");
    assert_eq!(wrong(&[-2, 3]), "expert id -2 of row 0 slot 0 is neither -1 nor below 6");
    assert_eq!(wrong(&[3, 3]), "row 0 names expert 3 twice");
    let short = permute(&[2, 3, 4, 5], 2, 1).unwrap_err();
    assert_eq!(short, "the slots of the permutation need room for 4 entries, found 2");
    let few = permute(&[2, 3], 2, 2).unwrap_err();
    assert!(few.starts_with("top-k ids is [1, 2] of i32, needs [2 or more, 2]"), "{few}");
    let outside = Permuter::new(5..7, 6, 2, NonZeroUsize::MIN).unwrap_err();
    assert!(matches!(outside, TrtllmError::LocalExperts { first: 5, end: 7, num_experts: 6 }), "{outside}");
}

#[test]
fn tiles_grow_with_the_mean_rows_of_an_expert() {
    for (rows, want) in [(1, 8), (64, 8), (80, 16), (500, 64), (5000, 128)] {
        assert_eq!(tile_tokens_dim(rows, 8, 64), want, "{rows}");
    }
    assert_eq!(tile_tokens_dim(0, 8, 0), 8);
}
