//! Pieces of a call's workspace that are not plain elements.

use std::mem::MaybeUninit;

use fused_moe_core::{Arena, ViewError};
use half::bf16;

use super::quantize::Codes;
use super::scheme::{Fp8Scheme, Scheme};
use crate::Group;

/// Lengths of [`Codes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeSizes {
    /// Codes, one byte each.
    pub codes: usize,
    /// Scales.
    pub scales: usize,
    /// Values of NVFP4 codes.
    pub values: usize,
}

impl CodeSizes {
    /// For `rows` rows of `columns` elements that are quantised in the call; none where nothing is.
    pub fn of(scheme: Scheme, [rows, columns]: [usize; 2]) -> Self {
        match scheme {
            Scheme::Bf16 | Scheme::Mxfp4 => Self::default(),
            Scheme::Nvfp4 => Self { values: rows * columns, ..Self::default() },
            Scheme::Fp8(fp8) => Self { codes: rows * columns, ..Self::scales_of(fp8, [rows, columns]) },
        }
    }

    /// For rows that arrive quantised: only their scales are kept, where they must be gathered.
    pub fn scales_of(fp8: Fp8Scheme, [rows, columns]: [usize; 2]) -> Self {
        Self { scales: rows * fp8.scaling.scales_per_row(columns), ..Self::default() }
    }

    /// Bytes that [`CodeSizes::take`] takes.
    pub fn bytes(&self) -> usize {
        Arena::bytes_for::<u8>(self.codes)
            + Arena::bytes_for::<f32>(self.scales)
            + Arena::bytes_for::<bf16>(self.values)
    }

    /// Takes the room from a workspace.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] if less is left.
    pub fn take<'a>(&self, arena: &mut Arena<'a>) -> Result<Codes<'a>, ViewError> {
        let Self { codes, scales, values } = *self;
        Ok(Codes { codes: arena.take(codes)?, scales: arena.take(scales)?, values: arena.take(values)? })
    }
}

/// A type of the size and alignment of `i32`, of which an arena has pieces.
///
/// # Safety
/// Same size and alignment as `i32`, and every bit pattern is a value of both.
pub unsafe trait Word: Copy {}
// SAFETY: the unsigned integer of the same width.
unsafe impl Word for u32 {}

/// A piece of an arena as elements of another type.
pub fn words<T: Word>(piece: &mut [i32]) -> &mut [T] {
    // SAFETY: `Word` says that the elements have the same size, alignment and set of bit patterns.
    unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr().cast(), piece.len()) }
}

const _: () = assert!(size_of::<i32>() == size_of::<u32>() && align_of::<i32>() == align_of::<u32>());

/// Room for one group per local expert. An arena has no pieces of [`Group`], so they are placed in bytes.
#[derive(Debug)]
pub struct GroupSlots<'a>(&'a mut [MaybeUninit<Group>]);

impl<'a> GroupSlots<'a> {
    /// Bytes for that many groups wherever the piece starts.
    pub const fn bytes(groups: usize) -> usize {
        groups * size_of::<Group>() + align_of::<Group>()
    }

    /// Room in `piece`.
    pub fn new(piece: &'a mut [u8]) -> Self {
        // SAFETY: any bytes are an uninitialised group, and a group has no padding (it is three `usize`), so
        // writing one leaves the bytes initialised.
        Self(unsafe { piece.align_to_mut().1 })
    }

    /// Stores the groups; more than there is room for are a bug of the caller and are dropped.
    pub fn fill(self, groups: impl Iterator<Item = Group>) -> &'a [Group] {
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
    use super::*;

    #[test]
    fn groups_come_back_wherever_their_piece_starts() {
        let groups: Vec<_> = (0..3).map(|expert| Group { rows: expert..2 * expert, expert }).collect();
        let mut bytes = vec![0xa5; GroupSlots::bytes(3) + 7];
        for start in 0..8 {
            let piece = &mut bytes[start..][..GroupSlots::bytes(3)];
            assert_eq!(GroupSlots::new(piece).fill(groups.iter().cloned()), groups, "start {start}");
        }
    }
}
