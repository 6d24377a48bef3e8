//! How a call divides its workspace: fixed places, sized for the worst batch of the configuration.

use fused_moe_core::{Arena, ViewError};
use grouped_gemm::experts::{GemmPieces, GemmSizes, words};

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
    pub(crate) gemms: GemmSizes,
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
    pub(crate) gemms: GemmPieces<'a>,
}

impl Sizes {
    /// Bytes that [`Sizes::carve`] takes.
    pub(crate) fn bytes(&self) -> usize {
        let Sizes { permute, gemms, .. } = self;
        Arena::bytes_for::<i32>(self.chosen)
            + Arena::bytes_for::<f32>(self.chosen)
            + Arena::bytes_for::<i32>(permute.expanded)
            + Arena::bytes_for::<u32>(permute.permuted)
            + Arena::bytes_for::<i32>(permute.experts)
            + Arena::bytes_for::<f32>(self.permuted_weights)
            + gemms.bytes()
    }

    /// Divides a workspace. The addresses are the same in every call.
    pub(crate) fn carve<'a>(&self, arena: &mut Arena<'a>) -> Result<Pieces<'a>, ViewError> {
        let Sizes { permute, gemms, .. } = self;
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
                gemms: gemms.take(arena)?,
            },
        })
    }
}
