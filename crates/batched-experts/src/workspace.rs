//! How a call divides its workspace: fixed places, sized for the worst batch of the configuration.

use fused_moe_core::{Arena, MoeConfig, Plan, ViewError};
use grouped_gemm::experts::{CodeSizes, Codes, GroupSlots, Scheme, words};
use half::bf16;

use crate::scheme::most_local_experts;

/// Sizes that a workspace depends on: those of the rank with most experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    experts: usize,
    /// Rows of all batches, valid or not.
    rows: usize,
    /// Valid rows of all batches.
    pub(crate) entries: usize,
    intermediate: usize,
    /// Codes and scales of rows that arrive in bf16, zero where they are not needed.
    input: CodeSizes,
    /// Codes and scales of the activation's output.
    activated: CodeSizes,
    gemm_scratch: usize,
}

/// The temporaries of one call.
pub(crate) struct Pieces<'a> {
    /// Row in the batches of each entry.
    pub(crate) row_of_entry: &'a mut [u32],
    /// Entry of each valid row of the batches.
    pub(crate) entry_of_row: &'a mut [u32],
    /// Entries of each expert.
    pub(crate) dense: GroupSlots<'a>,
    /// Rows of each expert in the batches.
    pub(crate) batched: GroupSlots<'a>,
    pub(crate) input: Codes<'a>,
    /// `[entries, intermediate]`, the activation's output.
    pub(crate) activated: &'a mut [bf16],
    pub(crate) activated_codes: Codes<'a>,
    pub(crate) gemm_scratch: &'a mut [u8],
}

impl Sizes {
    pub(crate) fn new(config: &MoeConfig, plan: &Plan, scheme: Scheme, gemm_scratch: usize) -> Self {
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
        Self { experts, rows, entries, intermediate, input, activated, gemm_scratch }
    }

    /// Bytes that [`Sizes::carve`] takes.
    pub(crate) fn bytes(&self) -> usize {
        Arena::bytes_for::<u32>(self.entries)
            + Arena::bytes_for::<u32>(self.rows)
            + 2 * Arena::bytes_for::<u8>(GroupSlots::bytes(self.experts))
            + self.input.bytes()
            + Arena::bytes_for::<bf16>(self.entries * self.intermediate)
            + self.activated.bytes()
            + Arena::bytes_for::<u8>(self.gemm_scratch)
    }

    /// Divides a workspace. The addresses are the same in every call.
    pub(crate) fn carve<'a>(&self, arena: &mut Arena<'a>) -> Result<Pieces<'a>, ViewError> {
        Ok(Pieces {
            row_of_entry: words(arena.take(self.entries)?),
            entry_of_row: words(arena.take(self.rows)?),
            dense: GroupSlots::new(arena.take(GroupSlots::bytes(self.experts))?),
            batched: GroupSlots::new(arena.take(GroupSlots::bytes(self.experts))?),
            input: self.input.take(arena)?,
            activated: arena.take(self.entries * self.intermediate)?,
            activated_codes: self.activated.take(arena)?,
            gemm_scratch: arena.take(self.gemm_scratch)?,
        })
    }
}
