//! Three phases: count in chunks of tokens, sum over experts and chunks, scatter.

use rayon::prelude::*;

use super::{MAX_CHUNKS, Pairs, SortBuffers, SortedTokenId};
use crate::AiterError;

/// Tokens of a chunk, so that it is worth a task.
const CHUNK_TOKENS: usize = 256;

/// Most chunks of a batch of that many tokens or fewer.
pub(super) fn chunks(num_tokens: usize) -> usize {
    num_tokens.div_ceil(CHUNK_TOKENS).min(MAX_CHUNKS)
}

/// Sorts; returns the number of blocks. `buffers` are as long as the sizes say.
pub(super) fn sort(pairs: &Pairs<'_>, buffers: &mut SortBuffers<'_>) -> Result<usize, AiterError> {
    let SortBuffers { token_ids, weights, expert_ids, positions, cursors } = buffers;
    if pairs.num_tokens == 0 || pairs.experts == 0 || pairs.top_k == 0 {
        // There is nothing to scatter, but ids are still checked.
        positions.fill(-1);
        return (0..pairs.num_tokens).try_for_each(|token| pairs.check(token, |_, _| ())).map(|()| 0);
    }
    let chunk_tokens = pairs.num_tokens.div_ceil(chunks(pairs.num_tokens));
    let chunks = pairs.num_tokens.div_ceil(chunk_tokens);
    let tokens_of = |chunk: usize| chunk * chunk_tokens..pairs.num_tokens.min((chunk + 1) * chunk_tokens);
    let counters = &mut cursors[..chunks * pairs.experts];

    let by_chunk = counters.par_chunks_mut(pairs.experts).enumerate();
    let first_error = by_chunk.map(|(chunk, counts)| {
        counts.fill(0);
        let mut tokens = tokens_of(chunk);
        tokens.try_for_each(|token| pairs.check(token, |_, expert| counts[expert.0 as usize] += 1))
    });
    // That of the first chunk, which is that of the first token, whatever the threads do.
    if let Some(error) = first_error.find_map_first(Result::err) {
        return Err(error);
    }

    let (mut entry, mut blocks) = (0, 0);
    for expert in 0..pairs.experts {
        let first = entry;
        for counter in counters[expert..].iter_mut().step_by(pairs.experts) {
            entry += std::mem::replace(counter, entry as i32) as usize;
        }
        let end = first + (entry - first).next_multiple_of(pairs.block_m);
        token_ids[entry..end].fill(pairs.padding());
        weights[entry..end].fill(0.0);
        let taken = (end - first) / pairs.block_m;
        expert_ids[blocks..blocks + taken].fill(expert as i32);
        (entry, blocks) = (end, blocks + taken);
    }

    let places = Places { token_ids: token_ids.as_mut_ptr(), weights: weights.as_mut_ptr(), len: entry };
    let by_chunk =
        counters.par_chunks_mut(pairs.experts).zip(positions.par_chunks_mut(chunk_tokens * pairs.top_k));
    by_chunk.enumerate().try_for_each(|(chunk, (cursors, positions))| {
        positions.fill(-1);
        let tokens = tokens_of(chunk);
        tokens.clone().zip(positions.chunks_mut(pairs.top_k)).try_for_each(|(token, positions)| {
            pairs.visit(token, |slot, expert, weight| {
                let cursor = &mut cursors[expert.0 as usize];
                let entry = *cursor as usize;
                // SAFETY: the sums gave every chunk as many entries of an expert as it counted, below `len` and
                // nobody else's, and this chunk meets the same pairs again.
                unsafe { places.put(entry, SortedTokenId::new(token, slot as u8), weight) };
                positions[slot] = *cursor;
                *cursor += 1;
            })
        })
    })?;
    Ok(blocks)
}

/// The entries, written by several threads each at its own.
struct Places {
    token_ids: *mut SortedTokenId,
    weights: *mut f32,
    len: usize,
}

// SAFETY: the only access is through `put`, whose callers keep entries apart.
unsafe impl Sync for Places {}

impl Places {
    /// # Safety
    /// `entry < len`, both buffers are borrowed for this value and at least `len` long, and no other thread puts to
    /// the same entry.
    unsafe fn put(&self, entry: usize, id: SortedTokenId, weight: f32) {
        debug_assert!(entry < self.len);
        // SAFETY: the contract.
        unsafe {
            self.token_ids.add(entry).write(id);
            self.weights.add(entry).write(weight);
        }
    }
}
