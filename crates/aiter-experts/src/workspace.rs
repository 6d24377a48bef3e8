//! How a call divides its workspace: fixed places, sized for the worst batch of the configuration.

use std::mem::MaybeUninit;

use fused_moe_core::{Arena, ViewError};
use grouped_gemm::Group;
use half::bf16;

use crate::moe_sorting::{SortBuffers, SortSizes, SortedTokenId};
use crate::quantize::Codes;
use crate::scheme::{Fp8Scheme, Scheme};

/// Sizes that a workspace depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) sort: SortSizes,
    /// Rows of the received tensor.
    pub(crate) rows: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    /// FP8 codes and scales of received rows, zero where they are not needed.
    pub(crate) input: CodeSizes,
    /// FP8 codes and scales of the activation's output.
    pub(crate) activated: CodeSizes,
    pub(crate) gemm_scratch: usize,
}

/// Lengths of [`Codes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CodeSizes {
    codes: usize,
    scales: usize,
}

impl CodeSizes {
    /// For `rows` rows of `columns` elements that this crate quantises.
    pub(crate) fn of(scheme: Scheme, [rows, columns]: [usize; 2]) -> Self {
        match scheme {
            Scheme::Bf16 => Self::default(),
            Scheme::Fp8(fp8) => Self { codes: rows * columns, ..Self::scales_of(fp8, [rows, columns]) },
        }
    }

    /// For rows that arrive quantised: only their scales are kept, where they must be gathered.
    pub(crate) fn scales_of(fp8: Fp8Scheme, [rows, columns]: [usize; 2]) -> Self {
        Self { codes: 0, scales: rows * fp8.scaling.scales_per_row(columns) }
    }
}

/// The temporaries of one call.
pub(crate) struct Pieces<'a> {
    pub(crate) sort: SortBuffers<'a>,
    /// Row of each sorted entry.
    pub(crate) gather: &'a mut [u32],
    pub(crate) groups: GroupSlots<'a>,
    pub(crate) input: Codes<'a>,
    /// `[entries, intermediate]`, the activation's output.
    pub(crate) activated: &'a mut [bf16],
    pub(crate) activated_codes: Codes<'a>,
    /// `[entries, hidden]`, weighted outputs before the reduction.
    pub(crate) products: &'a mut [f32],
    pub(crate) gemm_scratch: &'a mut [u8],
}

impl Sizes {
    /// Bytes that [`Sizes::carve`] takes.
    pub(crate) fn bytes(&self) -> usize {
        let Sizes { sort, input, activated, .. } = self;
        Arena::bytes_for::<SortedTokenId>(sort.entries)
            + Arena::bytes_for::<f32>(sort.entries)
            + Arena::bytes_for::<i32>(sort.blocks)
            + Arena::bytes_for::<i32>(sort.slots)
            + Arena::bytes_for::<i32>(sort.experts)
            + Arena::bytes_for::<u32>(sort.entries)
            + Arena::bytes_for::<u8>(GroupSlots::bytes(sort.experts))
            + Arena::bytes_for::<u8>(input.codes)
            + Arena::bytes_for::<f32>(input.scales)
            + Arena::bytes_for::<bf16>(sort.entries * self.intermediate)
            + Arena::bytes_for::<u8>(activated.codes)
            + Arena::bytes_for::<f32>(activated.scales)
            + Arena::bytes_for::<f32>(sort.entries * self.hidden)
            + Arena::bytes_for::<u8>(self.gemm_scratch)
    }

    /// Divides a workspace. The addresses are the same in every call.
    pub(crate) fn carve<'a>(&self, arena: &mut Arena<'a>) -> Result<Pieces<'a>, ViewError> {
        let Sizes { sort, input, activated, .. } = self;
        Ok(Pieces {
            sort: SortBuffers {
                token_ids: words(arena.take(sort.entries)?),
                weights: arena.take(sort.entries)?,
                expert_ids: arena.take(sort.blocks)?,
                positions: arena.take(sort.slots)?,
                cursors: arena.take(sort.experts)?,
            },
            gather: words(arena.take(sort.entries)?),
            groups: GroupSlots::new(arena.take(GroupSlots::bytes(sort.experts))?),
            input: codes(arena, input)?,
            activated: arena.take(sort.entries * self.intermediate)?,
            activated_codes: codes(arena, activated)?,
            products: arena.take(sort.entries * self.hidden)?,
            gemm_scratch: arena.take(self.gemm_scratch)?,
        })
    }
}

fn codes<'a>(arena: &mut Arena<'a>, sizes: &CodeSizes) -> Result<Codes<'a>, ViewError> {
    Ok(Codes { codes: arena.take(sizes.codes)?, scales: arena.take(sizes.scales)? })
}

/// A type of the size and alignment of `i32`, of which an arena has pieces.
///
/// # Safety
/// Same size and alignment as `i32`, and every bit pattern is a value of both.
unsafe trait Word: Copy {}
// SAFETY: the unsigned integer of the same width.
unsafe impl Word for u32 {}
// SAFETY: a transparent wrapper of `u32` without invalid values.
unsafe impl Word for SortedTokenId {}

fn words<T: Word>(piece: &mut [i32]) -> &mut [T] {
    // SAFETY: `Word` says that the elements have the same size, alignment and set of bit patterns.
    unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr().cast(), piece.len()) }
}

const _: () = assert!(size_of::<i32>() == size_of::<u32>() && align_of::<i32>() == align_of::<u32>());

/// Room for one group per local expert. An arena has no pieces of [`Group`], so they are placed in bytes.
pub(crate) struct GroupSlots<'a>(&'a mut [MaybeUninit<Group>]);

impl<'a> GroupSlots<'a> {
    /// Bytes for that many groups wherever the piece starts.
    const fn bytes(groups: usize) -> usize {
        groups * size_of::<Group>() + align_of::<Group>()
    }

    fn new(piece: &'a mut [u8]) -> Self {
        // SAFETY: any bytes are an uninitialised group, and a group has no padding (it is three `usize`), so
        // writing one leaves the bytes initialised.
        Self(unsafe { piece.align_to_mut().1 })
    }

    /// Stores the groups; more than there is room for are a bug of the caller and are dropped.
    pub(crate) fn fill(self, groups: impl Iterator<Item = Group>) -> &'a [Group] {
        let Self(slots) = self;
        let mut len = 0;
        for (slot, group) in slots.iter_mut().zip(groups) {
            slot.write(group);
            len += 1;
        }
        // SAFETY: the first `len` slots were written above and are borrowed for `'a`; a group needs no drop.
        unsafe { std::slice::from_raw_parts(slots.as_ptr().cast(), len) }
    }
}

const _: () = assert!(size_of::<Group>() == 3 * size_of::<usize>() && !std::mem::needs_drop::<Group>());

#[cfg(test)]
mod tests {
    use fused_moe_core::{DeviceKind, Fp8Format, Workspace};
    use grouped_gemm::Fp8Kind;
    use rstest::rstest;

    use super::*;
    use crate::scheme::Scaling;

    #[rstest]
    fn exactly_what_is_asked_for_is_taken(
        #[values(0, 1, 7)] rows: usize,
        #[values(1, 96)] hidden: usize,
        #[values(false, true)] quantised: bool,
    ) {
        let sort = SortSizes { entries: 3 * rows, blocks: 3 * rows, slots: 4 * rows, experts: 3 };
        let fp8 = Fp8Scheme { format: Fp8Format::E4M3Fn, kind: Fp8Kind::E4M3Fn, scaling: Scaling::Block };
        let scheme = if quantised { Scheme::Fp8(fp8) } else { Scheme::Bf16 };
        let sizes = Sizes {
            sort,
            rows,
            hidden,
            intermediate: 200,
            input: CodeSizes::of(scheme, [rows, hidden]),
            activated: CodeSizes::of(scheme, [sort.entries, 200]),
            gemm_scratch: 1000,
        };
        let mut workspace = Workspace::new(DeviceKind::Host, sizes.bytes()).unwrap();
        let mut arena = workspace.arena();
        let pieces = sizes.carve(&mut arena).unwrap();
        assert_eq!(arena.remaining(), 0);
        let groups: Vec<_> = (0..3).map(|expert| Group { rows: expert..2 * expert, expert }).collect();
        assert_eq!(pieces.groups.fill(groups.iter().cloned()), groups);
        let mut short = Workspace::new(DeviceKind::Host, sizes.bytes() - 1000).unwrap();
        assert!(sizes.carve(&mut short.arena()).is_err());
    }
}
