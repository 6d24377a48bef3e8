//! Sorting (token, slot) pairs by local expert: AITER's `moe_sorting`.

use std::num::NonZeroUsize;
use std::ops::Range;

use fused_moe_core::{ExpertMap, ExpertMask, LocalExpertId, NO_EXPERT, TopK};
use grouped_gemm::experts::ExpertsError;

use crate::AiterError;

/// Bits of a token in a [`SortedTokenId`].
const TOKEN_BITS: u32 = 24;
/// Tokens must be fewer than this. The number itself is the token of padding.
pub const MAX_TOKENS: usize = 1 << TOKEN_BITS;
/// Most experts per token. A slot is one byte, and the slot of padding is `top_k` itself.
pub const MAX_TOP_K: usize = u8::MAX as usize;
/// Largest block. AITER's are 256 at most; the limit keeps the padding of thousands of experts inside the i32s that
/// positions are.
pub const MAX_BLOCK_M: usize = 1 << 12;

/// One entry of the sorted order, `slot << 24 | token`.
///
/// Padding has the slot `top_k` and the token `num_tokens`, one past the last of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct SortedTokenId(u32);

impl SortedTokenId {
    /// Packs a token below [`MAX_TOKENS`] and one of its top-k slots.
    pub const fn new(token: usize, slot: u8) -> Self {
        debug_assert!(token < MAX_TOKENS);
        Self((slot as u32) << TOKEN_BITS | token as u32)
    }

    /// The token: a row of the received tensor.
    pub const fn token(self) -> usize {
        (self.0 & (MAX_TOKENS as u32 - 1)) as usize
    }

    /// The slot of the token's top-k row.
    pub const fn slot(self) -> u8 {
        (self.0 >> TOKEN_BITS) as u8
    }

    /// The packed bits, as device kernels read them.
    pub const fn bits(self) -> u32 {
        self.0
    }
}

/// Lengths of the buffers of a sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortSizes {
    /// Entries in sorted order, padding included: [`SortBuffers::token_ids`] and [`SortBuffers::weights`].
    pub entries: usize,
    /// Blocks of `block_m` entries: [`SortBuffers::expert_ids`].
    pub blocks: usize,
    /// (token, slot) pairs: [`SortBuffers::positions`].
    pub slots: usize,
    /// Local experts: [`SortBuffers::cursors`].
    pub experts: usize,
}

/// Lent memory for a sort, at least as long as [`SortSizes`] says. What was in it does not matter.
#[derive(Debug)]
pub struct SortBuffers<'a> {
    /// See [`SortedTokens::token_ids`].
    pub token_ids: &'a mut [SortedTokenId],
    /// See [`SortedTokens::weights`].
    pub weights: &'a mut [f32],
    /// See [`SortedTokens::expert_ids`].
    pub expert_ids: &'a mut [i32],
    /// See [`SortedTokens::positions`].
    pub positions: &'a mut [i32],
    /// Where the next token of each local expert goes. Means nothing afterwards.
    pub cursors: &'a mut [i32],
}

/// Owned memory for sorts outside a kernel, which lends its workspace.
#[derive(Debug)]
pub struct SortMemory {
    token_ids: Vec<SortedTokenId>,
    weights: Vec<f32>,
    expert_ids: Vec<i32>,
    positions: Vec<i32>,
    cursors: Vec<i32>,
}

impl SortMemory {
    /// Allocates buffers of these lengths.
    pub fn new(sizes: SortSizes) -> Self {
        Self {
            token_ids: vec![SortedTokenId(0); sizes.entries],
            weights: vec![0.0; sizes.entries],
            expert_ids: vec![0; sizes.blocks],
            positions: vec![0; sizes.slots],
            cursors: vec![0; sizes.experts],
        }
    }

    /// Lends them to a sort.
    pub fn buffers(&mut self) -> SortBuffers<'_> {
        SortBuffers {
            token_ids: &mut self.token_ids,
            weights: &mut self.weights,
            expert_ids: &mut self.expert_ids,
            positions: &mut self.positions,
            cursors: &mut self.cursors,
        }
    }
}

/// (token, slot) pairs in the order of their local experts, and of their tokens within an expert.
///
/// Every expert that has tokens starts at a multiple of `block_m` and is padded to one; experts without tokens
/// have no block.
#[derive(Clone, Copy, Debug)]
pub struct SortedTokens<'a> {
    /// `[entries]`, a multiple of `block_m`.
    pub token_ids: &'a [SortedTokenId],
    /// `[entries]` routing weights, 0 for padding.
    pub weights: &'a [f32],
    /// `[entries / block_m]` local expert of each block.
    pub expert_ids: &'a [i32],
    /// `[num_tokens, top_k]`, the entry of each slot; -1 for slots without a local expert.
    pub positions: &'a [i32],
    /// Tokens that were sorted. Together with the number of entries this is AITER's `num_valid_ids`.
    pub num_tokens: usize,
    block_m: usize,
}

impl<'a> SortedTokens<'a> {
    /// Each local expert that has tokens, ascending, with the entries of its tokens (without padding).
    pub fn experts(&self) -> impl Iterator<Item = (LocalExpertId, Range<usize>)> + 'a {
        let (token_ids, block_m, padding) = (self.token_ids, self.block_m, self.num_tokens);
        let mut start = 0;
        self.expert_ids.chunk_by(|a, b| a == b).map(move |blocks| {
            let end = start + blocks.len() * block_m;
            let last_block = &token_ids[end - block_m..end];
            let padded = last_block.iter().rev().take_while(|id| id.token() == padding).count();
            let rows = start..end - padded;
            start = end;
            (LocalExpertId(blocks[0] as u32), rows)
        })
    }
}

/// Sorts the received tokens of one rank. What is fixed when a kernel is built.
///
/// ```
/// use aiter_experts::{MoeSorting, SortMemory};
/// use fused_moe_core::{DType, ExpertMask, ExpertPlacement, Rank, TensorView, TopK};
///
/// // Rank 1 holds experts 1 and 2; token 0 goes to experts 2 and 0, token 1 to experts 1 and 2.
/// let placement = ExpertPlacement::from_owners(&[0, 1, 1], 2)?;
/// let mask = ExpertMask::new(&placement, Rank(1));
/// let sorting = MoeSorting::new(&mask, 2, 2.try_into()?)?;
/// let topk = TopK {
///     ids: TensorView::from_slice(&[2, 0, 1, 2], DType::I32, &[2, 2])?,
///     weights: TensorView::from_slice(&[0.6, 0.4, 0.7, 0.3], DType::F32, &[2, 2])?,
/// };
/// let mut memory = SortMemory::new(sorting.sizes(2));
/// let sorted = sorting.sort(topk, 2, memory.buffers())?;
/// assert_eq!(sorted.expert_ids, [0, 1]);
/// assert_eq!(sorted.weights, [0.7, 0.0, 0.6, 0.3]);
/// assert_eq!(sorted.positions, [2, -1, 0, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MoeSorting {
    experts: ExpertMap,
    num_local_experts: usize,
    top_k: usize,
    block_m: usize,
}

impl MoeSorting {
    /// For the experts that `mask` says are local, whose local id is the number of local experts before them,
    /// in blocks of `block_m` entries.
    ///
    /// # Errors
    /// [`AiterError::TopK`], [`AiterError::BlockSize`].
    pub fn new(mask: &ExpertMask, top_k: usize, block_m: NonZeroUsize) -> Result<Self, AiterError> {
        if top_k > MAX_TOP_K {
            return Err(AiterError::TopK { top_k });
        }
        if block_m.get() > MAX_BLOCK_M {
            return Err(AiterError::BlockSize { block_m: block_m.get() });
        }
        let num_local_experts = mask.as_slice().iter().filter(|&&held| held != 0).count();
        Ok(Self { experts: mask.to_map(), num_local_experts, top_k, block_m: block_m.get() })
    }

    /// Buffers that are long enough for every choice of experts by `num_tokens` tokens.
    ///
    /// A token never names an expert twice, so it fills at most as many entries as there are local experts; and
    /// only experts that have a token are padded. AITER reserves `num_tokens · top_k + num_experts · block_m - top_k`.
    /// More tokens than can be sorted count as [`MAX_TOKENS`].
    pub fn sizes(&self, num_tokens: usize) -> SortSizes {
        let num_tokens = num_tokens.min(MAX_TOKENS);
        let pairs = num_tokens * self.top_k.min(self.num_local_experts);
        let padding = pairs.min(self.num_local_experts) * (self.block_m - 1);
        let blocks = (pairs + padding) / self.block_m;
        SortSizes {
            entries: blocks * self.block_m,
            blocks,
            slots: num_tokens * self.top_k,
            experts: self.num_local_experts,
        }
    }

    /// Sorts the first `num_tokens` rows of `topk`, `[rows, top_k]` on the host; rows behind are not read. Slots
    /// that hold -1 or an expert of another rank are skipped.
    ///
    /// # Errors
    /// [`AiterError::ExpertId`], [`AiterError::DuplicateExpertId`] (of a local expert), [`AiterError::SortBuffer`],
    /// [`AiterError::TooManyRows`], [`AiterError::Experts`] and [`AiterError::View`] for a misfit tensor.
    pub fn sort<'a>(
        &self,
        topk: TopK<'_>,
        num_tokens: usize,
        buffers: SortBuffers<'a>,
    ) -> Result<SortedTokens<'a>, AiterError> {
        let max = self.max_tokens();
        if num_tokens > max {
            return Err(AiterError::TooManyRows { rows: num_tokens, max });
        }
        for (tensor, view) in [("top-k ids", topk.ids), ("top-k weights", topk.weights)] {
            if !matches!(view.dims(), &[rows, columns] if rows >= num_tokens && columns == self.top_k) {
                let wanted = format!("[{num_tokens} or more, {}]", self.top_k);
                return Err(ExpertsError::tensor(tensor, &view, wanted).into());
            }
        }
        let SortBuffers { token_ids, weights, expert_ids, positions, cursors } = buffers;
        let sizes = self.sizes(num_tokens);
        let token_ids = cut("token ids", token_ids, sizes.entries)?;
        let weights = cut("weights", weights, sizes.entries)?;
        let expert_ids = cut("expert ids", expert_ids, sizes.blocks)?;
        let positions = cut("positions", positions, sizes.slots)?;
        let cursors = cut("cursors", cursors, sizes.experts)?;

        self.count(topk, num_tokens, cursors)?;
        let mut blocks = 0;
        for (expert, cursor) in cursors.iter_mut().enumerate() {
            let taken = (*cursor as usize).div_ceil(self.block_m);
            *cursor = (blocks * self.block_m) as i32;
            expert_ids[blocks..blocks + taken].fill(expert as i32);
            blocks += taken;
        }
        let entries = blocks * self.block_m;
        let (token_ids, weights) = (&mut token_ids[..entries], &mut weights[..entries]);
        token_ids.fill(SortedTokenId::new(num_tokens, self.top_k as u8));
        weights.fill(0.0);
        positions.fill(-1);
        for token in 0..num_tokens {
            let (ids, row_weights) = (topk.ids.row::<i32>(token)?, topk.weights.row::<f32>(token)?);
            for (slot, (&id, &weight)) in ids.iter().zip(row_weights).enumerate() {
                let Some(expert) = self.experts.local(id) else { continue };
                let cursor = &mut cursors[expert.0 as usize];
                token_ids[*cursor as usize] = SortedTokenId::new(token, slot as u8);
                weights[*cursor as usize] = weight;
                positions[token * self.top_k + slot] = *cursor;
                *cursor += 1;
            }
        }
        Ok(SortedTokens {
            token_ids,
            weights,
            expert_ids: &expert_ids[..blocks],
            positions,
            num_tokens,
            block_m: self.block_m,
        })
    }

    /// The most tokens whose entries have a number and a position for each of them.
    fn max_tokens(&self) -> usize {
        let padding = self.num_local_experts.saturating_mul(self.block_m - 1);
        let entries = (i32::MAX as usize).saturating_sub(padding);
        let per_token = self.top_k.min(self.num_local_experts).max(1);
        (entries / per_token).min(MAX_TOKENS - 1)
    }

    /// Checks all ids and counts the tokens of each local expert.
    fn count(&self, topk: TopK<'_>, num_tokens: usize, counts: &mut [i32]) -> Result<(), AiterError> {
        let num_experts = self.experts.as_slice().len();
        counts.fill(0);
        for row in 0..num_tokens {
            let ids = topk.ids.row::<i32>(row)?;
            for (slot, &id) in ids.iter().enumerate() {
                if id != NO_EXPERT && usize::try_from(id).map_or(true, |id| id >= num_experts) {
                    return Err(AiterError::ExpertId { row, slot, id, num_experts });
                }
                let Some(expert) = self.experts.local(id) else { continue };
                if ids[..slot].contains(&id) {
                    return Err(AiterError::DuplicateExpertId { row, id });
                }
                counts[expert.0 as usize] += 1;
            }
        }
        Ok(())
    }
}

fn cut<'a, T>(buffer: &'static str, memory: &'a mut [T], wanted: usize) -> Result<&'a mut [T], AiterError> {
    let found = memory.len();
    memory.get_mut(..wanted).ok_or(AiterError::SortBuffer { buffer, wanted, found })
}
