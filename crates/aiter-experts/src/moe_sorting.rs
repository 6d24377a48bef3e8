//! Sorting (token, slot) pairs by local expert: AITER's `moe_sorting`.

mod buffers;
mod multi_phase;
mod policy;
mod single_pass;

use std::num::NonZeroUsize;
use std::ops::Range;

use fused_moe_core::{ExpertMap, ExpertMask, LocalExpertId, TensorView, TopK};
use grouped_gemm::experts::{ExpertsError, visit_local};

use crate::AiterError;

pub use buffers::{SortBuffers, SortMemory, SortSizes};
pub use policy::{SortBatch, SortPolicy, UnknownSortPolicy};

/// Bits of a token in a [`SortedTokenId`].
const TOKEN_BITS: u32 = 24;
/// Tokens must be fewer than this. The number itself is the token of padding.
pub const MAX_TOKENS: usize = 1 << TOKEN_BITS;
/// Most experts per token. A slot is one byte, and the slot of padding is `top_k` itself.
pub const MAX_TOP_K: usize = u8::MAX as usize;
/// Largest block. AITER's are 256 at most; the limit keeps the padding of thousands of experts inside the i32s that
/// positions are.
pub const MAX_BLOCK_M: usize = 1 << 12;

/// Most chunks of tokens that are counted on their own.
const MAX_CHUNKS: usize = 64;

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
    /// Tokens that were sorted.
    pub num_tokens: usize,
    block_m: usize,
}

impl<'a> SortedTokens<'a> {
    /// AITER's `num_valid_ids`: entries, padding included, and tokens.
    pub fn num_valid_ids(&self) -> [i32; 2] {
        [self.token_ids.len() as i32, self.num_tokens as i32]
    }

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
/// The number of tokens is what AITER calls `num_local_tokens`: the rows that were received, which may be fewer than
/// the tensors have.
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
    policy: SortPolicy,
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
        let (experts, block_m, policy) = (mask.to_map(), block_m.get(), SortPolicy::default());
        Ok(Self { experts, num_local_experts, top_k, block_m, policy })
    }

    /// The same under another policy than auto. The results are the same.
    #[must_use]
    pub fn with_policy(mut self, policy: SortPolicy) -> Self {
        self.policy = policy;
        self
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
            // Two for each expert in one pass, one for each expert and chunk in several.
            cursors: self.num_local_experts * multi_phase::chunks(num_tokens).max(2),
        }
    }

    /// Sorts the first `num_tokens` rows of `topk`, `[rows, top_k]` on the host; rows behind are not read. Slots
    /// that hold -1 or an expert of another rank are skipped.
    ///
    /// # Errors
    /// That of the first token that has one, whatever the policy: [`ExpertsError::ExpertId`] and
    /// [`ExpertsError::DuplicateExpertId`] (of a local expert; AITER drops one of the two silently). And
    /// [`AiterError::SortBuffer`], [`ExpertsError::TooManyRows`], [`ExpertsError::Tensor`] and [`AiterError::View`] for
    /// a misfit tensor.
    pub fn sort<'a>(
        &self,
        topk: TopK<'_>,
        num_tokens: usize,
        buffers: SortBuffers<'a>,
    ) -> Result<SortedTokens<'a>, AiterError> {
        let max = self.max_tokens();
        if num_tokens > max {
            return Err(ExpertsError::TooManyRows { rows: num_tokens, max }.into());
        }
        for (tensor, view) in [("top-k ids", topk.ids), ("top-k weights", topk.weights)] {
            if !matches!(view.dims(), &[rows, columns] if rows >= num_tokens && columns == self.top_k) {
                let wanted = format!("[{num_tokens} or more, {}]", self.top_k);
                return Err(ExpertsError::tensor(tensor, &view, wanted).into());
            }
        }
        let mut buffers = buffers.cut(self.sizes(num_tokens))?;
        let pairs = Pairs {
            ids: topk.ids,
            weights: topk.weights,
            map: &self.experts,
            experts: self.num_local_experts,
            top_k: self.top_k,
            block_m: self.block_m,
            num_tokens,
        };
        let (pair_count, threads) = (num_tokens * self.top_k, rayon::current_num_threads());
        let batch = SortBatch { pairs: pair_count, experts: self.num_local_experts, threads };
        let blocks = match self.policy.for_batch(batch) {
            SortPolicy::MultiPhase => multi_phase::sort(&pairs, &mut buffers)?,
            _ => single_pass::sort(&pairs, &mut buffers)?,
        };
        let SortBuffers { token_ids, weights, expert_ids, positions, .. } = buffers;
        let entries = blocks * self.block_m;
        Ok(SortedTokens {
            token_ids: &token_ids[..entries],
            weights: &weights[..entries],
            expert_ids: &expert_ids[..blocks],
            positions,
            num_tokens,
            block_m: self.block_m,
        })
    }

    /// The most tokens whose entries and slots have an i32 for each of them.
    fn max_tokens(&self) -> usize {
        let padding = self.num_local_experts.saturating_mul(self.block_m - 1);
        let entries = (i32::MAX as usize).saturating_sub(padding);
        (entries / self.top_k.max(1)).min(MAX_TOKENS - 1)
    }
}

/// The pairs of a call, as both algorithms visit them.
struct Pairs<'a> {
    /// `[num_tokens or more, top_k]`.
    ids: TensorView<'a>,
    /// `[num_tokens or more, top_k]`.
    weights: TensorView<'a>,
    map: &'a ExpertMap,
    /// Local experts.
    experts: usize,
    top_k: usize,
    block_m: usize,
    num_tokens: usize,
}

impl Pairs<'_> {
    /// The entry that fills up blocks.
    fn padding(&self) -> SortedTokenId {
        SortedTokenId::new(self.num_tokens, self.top_k as u8)
    }

    /// Calls `pair(slot, expert)` for the slots of `token` that have a local expert, and checks its ids.
    fn check(&self, token: usize, pair: impl FnMut(usize, LocalExpertId)) -> Result<(), AiterError> {
        let num_experts = self.map.as_slice().len();
        let ids = self.ids.row::<i32>(token)?;
        Ok(visit_local((token, ids), num_experts, |id| self.map.local(id), pair)?)
    }

    /// Calls `pair(slot, expert, weight)` for the slots of `token` that have a local expert, once its ids have been
    /// checked.
    fn visit(&self, token: usize, mut pair: impl FnMut(usize, LocalExpertId, f32)) -> Result<(), AiterError> {
        let (ids, weights) = (self.ids.row::<i32>(token)?, self.weights.row::<f32>(token)?);
        for (slot, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
            if let Some(expert) = self.map.local(id) {
                pair(slot, expert, weight);
            }
        }
        Ok(())
    }
}
