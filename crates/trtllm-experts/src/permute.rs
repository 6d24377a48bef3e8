//! (token, slot) pairs in the order of their local experts, as FlashInfer's routing kernels number them.

use std::num::NonZeroUsize;
use std::ops::Range;

use fused_moe_core::TensorView;
use grouped_gemm::experts::{ExpertsError, visit_local};

use crate::TrtllmError;

/// What stands in [`Permutation::permuted_idx_to_token_idx`] where no token is.
pub const NO_TOKEN: u32 = u32::MAX;

/// Lengths of the buffers of a permutation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermuteSizes {
    /// Slots of all rows, `rows · top_k`.
    pub expanded: usize,
    /// Permuted rows, padding included.
    pub permuted: usize,
    /// Local experts.
    pub experts: usize,
}

/// Lent memory for a permutation, at least as long as [`PermuteSizes`] says. What was in it does not matter.
#[derive(Debug)]
pub struct PermuteBuffers<'a> {
    /// See [`Permutation::expanded_idx_to_permuted_idx`].
    pub expanded_idx_to_permuted_idx: &'a mut [i32],
    /// See [`Permutation::permuted_idx_to_token_idx`].
    pub permuted_idx_to_token_idx: &'a mut [u32],
    /// See [`Permutation::num_tokens_per_expert`].
    pub num_tokens_per_expert: &'a mut [i32],
}

/// Where every slot went.
///
/// Permuted rows are sorted by local expert, and within an expert by row. The rows of an expert start at a multiple
/// of the tile and are padded to one; experts without rows take none. Names are FlashInfer's.
#[derive(Clone, Copy, Debug)]
pub struct Permutation<'a> {
    /// `[rows · top_k]`, the permuted row of slot `row · top_k + slot`; -1 where the expert is not local.
    pub expanded_idx_to_permuted_idx: &'a [i32],
    /// `[permuted_idx_size]`, the received row of each permuted row; [`NO_TOKEN`] in padding, which FlashInfer
    /// leaves undefined.
    pub permuted_idx_to_token_idx: &'a [u32],
    /// `[local experts]`, rows of each local expert without padding.
    pub num_tokens_per_expert: &'a [i32],
    tile: usize,
}

/// One thread block's tile of permuted rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cta {
    /// `cta_idx_xy_to_batch_idx`: the local expert.
    pub batch_idx: usize,
    /// `cta_idx_xy_to_mn_limit`: one past the last permuted row of the tile that is no padding.
    pub mn_limit: usize,
}

impl<'a> Permutation<'a> {
    /// Permuted rows, padding included: `total_num_padded_tokens`.
    pub fn permuted_idx_size(&self) -> usize {
        self.permuted_idx_to_token_idx.len()
    }

    /// Each local expert that has rows, ascending, with its permuted rows (without padding).
    pub fn experts(&self) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
        let (counts, tile) = (self.num_tokens_per_expert, self.tile);
        let mut start = 0;
        let all = counts.iter().enumerate().map(move |(expert, &count)| {
            let rows = start..start + count as usize;
            start += (count as usize).next_multiple_of(tile);
            (expert, rows)
        });
        all.filter(|(_, rows)| !rows.is_empty())
    }

    /// The tiles of all experts in order; `num_non_exiting_ctas` is how many there are.
    pub fn ctas(&self) -> impl Iterator<Item = Cta> + 'a {
        let tile = self.tile;
        self.experts().flat_map(move |(expert, rows)| {
            let tiles = rows.len().div_ceil(tile);
            (1..=tiles)
                .map(move |n| Cta { batch_idx: expert, mn_limit: (rows.start + n * tile).min(rows.end) })
        })
    }
}

/// Permutes slots by the experts of one rank. What is fixed when a kernel is built.
///
/// ```
/// use fused_moe_core::{DType, TensorView};
/// use trtllm_experts::{PermuteMemory, Permuter};
///
/// // Of four experts, 2 and 3 are local; row 0 goes to experts 3 and 0, row 1 to experts 3 and 2.
/// let permuter = Permuter::new(2..4, 4, 2, 2.try_into()?)?;
/// let ids = TensorView::from_slice(&[3, 0, 3, 2], DType::I32, &[2, 2])?;
/// let mut memory = PermuteMemory::new(permuter.sizes(2));
/// let permuted = permuter.permute(ids, 2, memory.buffers())?;
/// assert_eq!(permuted.expanded_idx_to_permuted_idx, [2, -1, 3, 0]);
/// assert_eq!(permuted.permuted_idx_to_token_idx, [1, u32::MAX, 0, 1]);
/// assert_eq!(permuted.ctas().map(|cta| cta.mn_limit).collect::<Vec<_>>(), [1, 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Permuter {
    local: Range<usize>,
    num_experts: usize,
    top_k: usize,
    tile: usize,
}

impl Permuter {
    /// For rows of `top_k` global ids of `num_experts` experts, of which the range `local` (`local_expert_offset`
    /// and `local_num_experts`) is on this rank, padded to `tile_tokens_dim` rows per expert.
    ///
    /// # Errors
    /// [`TrtllmError::LocalExperts`].
    pub fn new(
        local: Range<usize>,
        num_experts: usize,
        top_k: usize,
        tile_tokens_dim: NonZeroUsize,
    ) -> Result<Self, TrtllmError> {
        let Range { start: first, end } = local;
        if first > end || end > num_experts {
            return Err(TrtllmError::LocalExperts { first, end, num_experts });
        }
        Ok(Self { local, num_experts, top_k, tile: tile_tokens_dim.get() })
    }

    /// Buffers that are long enough for every choice of experts by `rows` rows.
    ///
    /// A row names an expert at most once. Tiles are most if every expert has one row and all others go where they
    /// fill a further tile each.
    pub fn sizes(&self, rows: usize) -> PermuteSizes {
        let experts = self.local.len();
        let pairs = rows.saturating_mul(self.top_k.min(experts));
        let filled = pairs.min(experts);
        let tiles = filled + (pairs - filled) / self.tile;
        PermuteSizes {
            expanded: rows.saturating_mul(self.top_k),
            permuted: tiles.saturating_mul(self.tile),
            experts,
        }
    }

    /// Permutes the first `rows` rows of `ids`, `[rows or more, top_k]` i32 on the host; rows behind are not read.
    /// Slots that hold -1 or an expert of another rank are skipped.
    ///
    /// # Errors
    /// [`ExpertsError::ExpertId`], [`ExpertsError::DuplicateExpertId`] (of a local expert), [`TrtllmError::Buffer`],
    /// [`ExpertsError::Tensor`] and [`TrtllmError::View`] for a misfit tensor.
    pub fn permute<'a>(
        &self,
        ids: TensorView<'_>,
        rows: usize,
        buffers: PermuteBuffers<'a>,
    ) -> Result<Permutation<'a>, TrtllmError> {
        if !matches!(ids.dims(), &[have, slots] if have >= rows && slots == self.top_k) {
            let wanted = format!("[{rows} or more, {}]", self.top_k);
            return Err(ExpertsError::tensor("top-k ids", &ids, wanted).into());
        }
        let sizes = self.sizes(rows);
        let PermuteBuffers { expanded_idx_to_permuted_idx, permuted_idx_to_token_idx, num_tokens_per_expert } =
            buffers;
        let expanded = cut("slots", expanded_idx_to_permuted_idx, sizes.expanded)?;
        let tokens = cut("permuted rows", permuted_idx_to_token_idx, sizes.permuted)?;
        let counts = cut("local experts", num_tokens_per_expert, sizes.experts)?;

        self.count(ids, rows, counts)?;
        let mut next = 0;
        for count in counts.iter_mut() {
            let padded = (*count as usize).next_multiple_of(self.tile);
            // Until the rows are placed, a count is the place of the expert's next row.
            *count = next as i32;
            next += padded;
        }
        let tokens = &mut tokens[..next];
        tokens.fill(NO_TOKEN);
        for row in 0..rows {
            let places = &mut expanded[row * self.top_k..][..self.top_k];
            for (place, &id) in places.iter_mut().zip(ids.row::<i32>(row)?) {
                *place = -1;
                let Some(expert) = self.local(id) else { continue };
                let cursor = &mut counts[expert];
                *place = *cursor;
                tokens[*cursor as usize] = row as u32;
                *cursor += 1;
            }
        }
        let mut start = 0;
        for count in counts.iter_mut() {
            *count -= start;
            start += (*count as usize).next_multiple_of(self.tile) as i32;
        }
        Ok(Permutation {
            expanded_idx_to_permuted_idx: expanded,
            permuted_idx_to_token_idx: tokens,
            num_tokens_per_expert: counts,
            tile: self.tile,
        })
    }

    /// The index of a slot's expert among the local ones.
    fn local(&self, id: i32) -> Option<usize> {
        let id = usize::try_from(id).ok()?;
        self.local.contains(&id).then(|| id - self.local.start)
    }

    /// Checks all ids and counts the rows of each local expert.
    fn count(&self, ids: TensorView<'_>, rows: usize, counts: &mut [i32]) -> Result<(), TrtllmError> {
        counts.fill(0);
        for row in 0..rows {
            let ids = ids.row::<i32>(row)?;
            visit_local((row, ids), self.num_experts, |id| self.local(id), |_, expert| counts[expert] += 1)?;
        }
        Ok(())
    }
}

/// Owned memory for permutations outside a kernel, which lends its workspace.
#[derive(Debug)]
pub struct PermuteMemory {
    expanded: Vec<i32>,
    tokens: Vec<u32>,
    counts: Vec<i32>,
}

impl PermuteMemory {
    /// Allocates buffers of these lengths.
    pub fn new(sizes: PermuteSizes) -> Self {
        let PermuteSizes { expanded, permuted, experts } = sizes;
        Self { expanded: vec![0; expanded], tokens: vec![0; permuted], counts: vec![0; experts] }
    }

    /// Lends them to a permutation.
    pub fn buffers(&mut self) -> PermuteBuffers<'_> {
        PermuteBuffers {
            expanded_idx_to_permuted_idx: &mut self.expanded,
            permuted_idx_to_token_idx: &mut self.tokens,
            num_tokens_per_expert: &mut self.counts,
        }
    }
}

/// Rows per tile that FlashInfer tries first: the mean rows of a local expert, rounded up to a power of two
/// between 8 and 128.
pub fn tile_tokens_dim(rows: usize, top_k: usize, local_experts: usize) -> usize {
    let mean = (rows * top_k).div_ceil(local_experts.max(1));
    mean.next_power_of_two().clamp(8, 128)
}

fn cut<'a, T>(buffer: &'static str, memory: &'a mut [T], wanted: usize) -> Result<&'a mut [T], TrtllmError> {
    let found = memory.len();
    memory.get_mut(..wanted).ok_or(TrtllmError::Buffer { buffer, wanted, found })
}
