//! How a call divides its workspace: fixed places, sized for the worst batch of the configuration.

use fused_moe_core::{Arena, ViewError};
use grouped_gemm::experts::{GemmPieces, GemmSizes, Word, words};

use crate::moe_sorting::{SortBuffers, SortSizes, SortedTokenId};

/// Sizes that a workspace depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Rows of the received tensor.
    pub(crate) rows: usize,
    pub(crate) sort: SortSizes,
    pub(crate) gemms: GemmSizes,
}

/// The temporaries of one call.
pub(crate) struct Pieces<'a> {
    pub(crate) sort: SortBuffers<'a>,
    /// Row of each sorted entry.
    pub(crate) gather: &'a mut [u32],
    pub(crate) gemms: GemmPieces<'a>,
}

impl Sizes {
    /// Bytes that [`Sizes::carve`] takes.
    pub(crate) fn bytes(&self) -> usize {
        let Sizes { sort, gemms, .. } = self;
        Arena::bytes_for::<SortedTokenId>(sort.entries)
            + Arena::bytes_for::<f32>(sort.entries)
            + Arena::bytes_for::<i32>(sort.blocks)
            + Arena::bytes_for::<i32>(sort.slots)
            + Arena::bytes_for::<i32>(sort.cursors)
            + Arena::bytes_for::<u32>(sort.entries)
            + gemms.bytes()
    }

    /// Divides a workspace. The addresses are the same in every call.
    pub(crate) fn carve<'a>(&self, arena: &mut Arena<'a>) -> Result<Pieces<'a>, ViewError> {
        let Sizes { sort, gemms, .. } = self;
        Ok(Pieces {
            sort: SortBuffers {
                token_ids: words(arena.take(sort.entries)?),
                weights: arena.take(sort.entries)?,
                expert_ids: arena.take(sort.blocks)?,
                positions: arena.take(sort.slots)?,
                cursors: arena.take(sort.cursors)?,
            },
            gather: words(arena.take(sort.entries)?),
            gemms: gemms.take(arena)?,
        })
    }
}

// SAFETY: a transparent wrapper of `u32` without invalid values.
unsafe impl Word for SortedTokenId {}

#[cfg(test)]
mod tests {
    use fused_moe_core::{DeviceKind, Fp8Format, Workspace};
    use grouped_gemm::experts::{CodeSizes, Fp8Scheme, Scaling, Scheme};
    use grouped_gemm::{Fp8Kind, Group};
    use rstest::rstest;

    use super::*;

    #[rstest]
    fn exactly_what_is_asked_for_is_taken(
        #[values(0, 1, 7)] rows: usize,
        #[values(1, 96)] hidden: usize,
        #[values(false, true)] quantised: bool,
    ) {
        let sort = SortSizes { entries: 3 * rows, blocks: 3 * rows, slots: 4 * rows, experts: 3, cursors: 6 };
        let fp8 = Fp8Scheme { format: Fp8Format::E4M3Fn, kind: Fp8Kind::E4M3Fn, scaling: Scaling::Block };
        let scheme = if quantised { Scheme::Fp8(fp8) } else { Scheme::Bf16 };
        let gemms = GemmSizes {
            experts: sort.experts,
            entries: sort.entries,
            intermediate: 200,
            products: hidden,
            input: CodeSizes::of(scheme, [rows, hidden]),
            activated: CodeSizes::of(scheme, [sort.entries, 200]),
            scratch: 1000,
        };
        let sizes = Sizes { rows, sort, gemms };
        let mut workspace = Workspace::new(DeviceKind::Host, sizes.bytes()).unwrap();
        let mut arena = workspace.arena();
        let pieces = sizes.carve(&mut arena).unwrap();
        assert_eq!(arena.remaining(), 0);
        let groups: Vec<_> = (0..3).map(|expert| Group { rows: expert..2 * expert, expert }).collect();
        assert_eq!(pieces.gemms.groups.fill(groups.iter().cloned()), groups);
        let mut short = Workspace::new(DeviceKind::Host, sizes.bytes() - 1000).unwrap();
        assert!(sizes.carve(&mut short.arena()).is_err());
    }
}
