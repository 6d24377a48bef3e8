//! How a call divides its workspace: fixed places, sized for the worst batch of the configuration.

use fused_moe_core::{Arena, ViewError};
use grouped_gemm::experts::{CodeSizes, Codes, GroupSlots, words};
use half::bf16;

use crate::permute::{PermuteBuffers, PermuteSizes};

/// Sizes that a workspace depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Rows of the received tensor.
    pub(crate) rows: usize,
    pub(crate) permute: PermuteSizes,
    /// Ids and weights that are chosen in the call: slots of all rows, or none where they arrive.
    pub(crate) chosen: usize,
    /// Weights by permuted row: all of them where they are applied on the input, else none.
    pub(crate) permuted_weights: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    /// Codes and scales of received rows, zero where they are not needed.
    pub(crate) input: CodeSizes,
    /// Codes and scales of the activation's output.
    pub(crate) activated: CodeSizes,
    pub(crate) gemm_scratch: usize,
}

/// The temporaries of one call.
pub(crate) struct Pieces<'a> {
    /// `[rows, top_k]` of the router.
    pub(crate) ids: &'a mut [i32],
    /// `[rows, top_k]` of the router.
    pub(crate) weights: &'a mut [f32],
    pub(crate) work: WorkPieces<'a>,
}

/// Those of the experts.
pub(crate) struct WorkPieces<'a> {
    pub(crate) permute: PermuteBuffers<'a>,
    /// Weight of each permuted row, where it is applied on the input.
    pub(crate) permuted_weights: &'a mut [f32],
    pub(crate) groups: GroupSlots<'a>,
    pub(crate) input: Codes<'a>,
    /// `[permuted, intermediate]`, the activation's output.
    pub(crate) activated: &'a mut [bf16],
    pub(crate) activated_codes: Codes<'a>,
    /// `[permuted, hidden]`, outputs before the weighted sum.
    pub(crate) products: &'a mut [f32],
    pub(crate) gemm_scratch: &'a mut [u8],
}

impl Sizes {
    /// Bytes that [`Sizes::carve`] takes.
    pub(crate) fn bytes(&self) -> usize {
        let Sizes { permute, input, activated, .. } = self;
        Arena::bytes_for::<i32>(self.chosen)
            + Arena::bytes_for::<f32>(self.chosen)
            + Arena::bytes_for::<i32>(permute.expanded)
            + Arena::bytes_for::<u32>(permute.permuted)
            + Arena::bytes_for::<i32>(permute.experts)
            + Arena::bytes_for::<f32>(self.permuted_weights)
            + Arena::bytes_for::<u8>(GroupSlots::bytes(permute.experts))
            + input.bytes()
            + Arena::bytes_for::<bf16>(permute.permuted * self.intermediate)
            + activated.bytes()
            + Arena::bytes_for::<f32>(permute.permuted * self.hidden)
            + Arena::bytes_for::<u8>(self.gemm_scratch)
    }

    /// Divides a workspace. The addresses are the same in every call.
    pub(crate) fn carve<'a>(&self, arena: &mut Arena<'a>) -> Result<Pieces<'a>, ViewError> {
        let Sizes { permute, input, activated, .. } = self;
        Ok(Pieces {
            ids: arena.take(self.chosen)?,
            weights: arena.take(self.chosen)?,
            work: WorkPieces {
                permute: PermuteBuffers {
                    expanded_idx_to_permuted_idx: arena.take(permute.expanded)?,
                    permuted_idx_to_token_idx: words(arena.take(permute.permuted)?),
                    num_tokens_per_expert: arena.take(permute.experts)?,
                },
                permuted_weights: arena.take(self.permuted_weights)?,
                groups: GroupSlots::new(arena.take(GroupSlots::bytes(permute.experts))?),
                input: input.take(arena)?,
                activated: arena.take(permute.permuted * self.intermediate)?,
                activated_codes: activated.take(arena)?,
                products: arena.take(permute.permuted * self.hidden)?,
                gemm_scratch: arena.take(self.gemm_scratch)?,
            },
        })
    }
}
