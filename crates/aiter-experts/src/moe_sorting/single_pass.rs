//! One thread, one pass over the pairs: those of an expert are chained through the memory of their positions.

use super::{Pairs, SortBuffers, SortedTokenId};
use crate::AiterError;

/// No pair: the end of a chain, and the position of a slot without a local expert.
const NONE: i32 = -1;

/// Sorts; returns the number of blocks. `buffers` are as long as the sizes say.
pub(super) fn sort(pairs: &Pairs<'_>, buffers: &mut SortBuffers<'_>) -> Result<usize, AiterError> {
    let SortBuffers { token_ids, weights, expert_ids, positions, cursors } = buffers;
    let (heads, tails) = cursors.split_at_mut(pairs.experts);
    heads.fill(NONE);
    positions.fill(NONE);
    for token in 0..pairs.num_tokens {
        pairs.check(token, |slot, expert| {
            let (at, expert) = ((token * pairs.top_k + slot) as i32, expert.0 as usize);
            match heads[expert] {
                NONE => heads[expert] = at,
                // The position of a pair is its successor until the chain is followed.
                _ => positions[tails[expert] as usize] = at,
            }
            tails[expert] = at;
        })?;
    }
    let (mut entry, mut blocks) = (0, 0);
    for (expert, &head) in heads.iter().enumerate() {
        let (first, mut at) = (entry, head);
        while let Ok(pair) = usize::try_from(at) {
            let (token, slot) = (pair / pairs.top_k, pair % pairs.top_k);
            token_ids[entry] = SortedTokenId::new(token, slot as u8);
            weights[entry] = pairs.weights.row::<f32>(token)?[slot];
            at = std::mem::replace(&mut positions[pair], entry as i32);
            entry += 1;
        }
        let end = first + (entry - first).next_multiple_of(pairs.block_m);
        token_ids[entry..end].fill(pairs.padding());
        weights[entry..end].fill(0.0);
        let taken = (end - first) / pairs.block_m;
        expert_ids[blocks..blocks + taken].fill(expert as i32);
        (entry, blocks) = (end, blocks + taken);
    }
    Ok(blocks)
}
