//! Memory of a sort.

use super::SortedTokenId;
use crate::AiterError;

/// Lengths of the buffers of a sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortSizes {
    /// Entries in sorted order, padding included: [`SortBuffers::token_ids`] and [`SortBuffers::weights`].
    pub entries: usize,
    /// Blocks of `block_m` entries: [`SortBuffers::expert_ids`].
    pub blocks: usize,
    /// (token, slot) pairs: [`SortBuffers::positions`].
    pub slots: usize,
    /// Local experts.
    pub experts: usize,
    /// Counters of experts, several for each: [`SortBuffers::cursors`].
    pub cursors: usize,
}

/// Lent memory for a sort, at least as long as [`SortSizes`] says. What was in it does not matter.
#[derive(Debug)]
pub struct SortBuffers<'a> {
    /// See [`SortedTokens::token_ids`](super::SortedTokens::token_ids).
    pub token_ids: &'a mut [SortedTokenId],
    /// See [`SortedTokens::weights`](super::SortedTokens::weights).
    pub weights: &'a mut [f32],
    /// See [`SortedTokens::expert_ids`](super::SortedTokens::expert_ids).
    pub expert_ids: &'a mut [i32],
    /// See [`SortedTokens::positions`](super::SortedTokens::positions).
    pub positions: &'a mut [i32],
    /// Counts and places of the experts. Means nothing afterwards.
    pub cursors: &'a mut [i32],
}

impl<'a> SortBuffers<'a> {
    /// The first part of each, as long as `sizes` says.
    pub(super) fn cut(self, sizes: SortSizes) -> Result<Self, AiterError> {
        Ok(Self {
            token_ids: cut("token ids", self.token_ids, sizes.entries)?,
            weights: cut("weights", self.weights, sizes.entries)?,
            expert_ids: cut("expert ids", self.expert_ids, sizes.blocks)?,
            positions: cut("positions", self.positions, sizes.slots)?,
            cursors: cut("cursors", self.cursors, sizes.cursors)?,
        })
    }
}

fn cut<'a, T>(buffer: &'static str, memory: &'a mut [T], wanted: usize) -> Result<&'a mut [T], AiterError> {
    let found = memory.len();
    memory.get_mut(..wanted).ok_or(AiterError::SortBuffer { buffer, wanted, found })
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
            token_ids: vec![SortedTokenId::new(0, 0); sizes.entries],
            weights: vec![0.0; sizes.entries],
            expert_ids: vec![0; sizes.blocks],
            positions: vec![0; sizes.slots],
            cursors: vec![0; sizes.cursors],
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
