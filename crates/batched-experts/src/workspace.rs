//! How a call divides its workspace: fixed places, sized for the worst batch of the configuration.

use fused_moe_core::{Arena, MoeConfig, Plan, ViewError};
use grouped_gemm::experts::{CodeSizes, GemmPieces, GemmSizes, GroupSlots, Scheme, words};

use crate::scheme::most_local_experts;

/// Sizes that a workspace depends on: those of the rank with most experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Rows of all batches, valid or not.
    rows: usize,
    /// The entries are the valid rows of all batches.
    pub(crate) gemms: GemmSizes,
}

/// The temporaries of one call.
pub(crate) struct Pieces<'a> {
    /// Row in the batches of each entry.
    pub(crate) row_of_entry: &'a mut [u32],
    /// Entry of each valid row of the batches.
    pub(crate) entry_of_row: &'a mut [u32],
    /// Rows of each expert in the batches.
    pub(crate) batched: GroupSlots<'a>,
    /// Groups of entries.
    pub(crate) gemms: GemmPieces<'a>,
}

impl Sizes {
    pub(crate) fn new(config: &MoeConfig, plan: &Plan, scheme: Scheme, scratch: usize) -> Self {
        let experts = most_local_experts(config);
        let rows = experts * plan.max_rows();
        let tokens = config.max_tokens_per_rank * config.ep_size();
        // A token has a row with an expert at most once, so the batches are never all full.
        let entries = rows.min(tokens * config.top_k.min(experts));
        let input = match plan.wire().scale {
            Some(_) => CodeSizes::default(),
            None => CodeSizes::of(scheme, [entries, config.hidden]),
        };
        let intermediate = config.intermediate;
        let activated = CodeSizes::of(scheme, [entries, intermediate]);
        let gemms = GemmSizes { experts, entries, intermediate, products: 0, input, activated, scratch };
        Self { rows, gemms }
    }

    /// Bytes that [`Sizes::carve`] takes.
    pub(crate) fn bytes(&self) -> usize {
        Arena::bytes_for::<u32>(self.gemms.entries)
            + Arena::bytes_for::<u32>(self.rows)
            + Arena::bytes_for::<u8>(GroupSlots::bytes(self.gemms.experts))
            + self.gemms.bytes()
    }

    /// Divides a workspace. The addresses are the same in every call.
    pub(crate) fn carve<'a>(&self, arena: &mut Arena<'a>) -> Result<Pieces<'a>, ViewError> {
        Ok(Pieces {
            row_of_entry: words(arena.take(self.gemms.entries)?),
            entry_of_row: words(arena.take(self.rows)?),
            batched: GroupSlots::new(arena.take(GroupSlots::bytes(self.gemms.experts))?),
            gemms: self.gemms.take(arena)?,
        })
    }
}
