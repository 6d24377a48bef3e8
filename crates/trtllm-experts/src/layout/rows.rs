//! The order of rows: interleaved, shuffled in blocks, or both.

use super::{LayoutError, check_multiple};

/// Rows of a block inside which rows are shuffled. It follows from the rows of an epilogue tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShuffleBlock {
    /// For epilogue tiles of 64 rows, which block FP8 uses.
    Rows16,
    /// For epilogue tiles that are a multiple of 128 rows: all other kernels.
    Rows32,
}

impl ShuffleBlock {
    /// Rows of a block.
    pub const fn rows(self) -> usize {
        match self {
            ShuffleBlock::Rows16 => 16,
            ShuffleBlock::Rows32 => 32,
        }
    }

    /// Rows of a block that lie eight places from each other once it is shuffled.
    const fn columns(self) -> usize {
        self.rows() / 8
    }

    /// Where `row` goes.
    ///
    /// Inside a block of 32, row `r` goes to `r % 4 · 8 + r / 4`; of 16, to `r % 2 · 8 + r / 2`.
    pub const fn place(self, row: usize) -> usize {
        let (block, inner) = (row / self.rows() * self.rows(), row % self.rows());
        block + inner % self.columns() * 8 + inner / self.columns()
    }

    /// The row that goes to `place`.
    pub const fn source(self, place: usize) -> usize {
        let (block, inner) = (place / self.rows() * self.rows(), place % self.rows());
        block + inner % 8 * self.columns() + inner / 8
    }
}

/// The order of the rows of a matrix. What is shuffled has been interleaved before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowOrder {
    /// Whether rows of the two halves alternate, beginning with the first half.
    pub interleaved: bool,
    /// Whether rows are shuffled inside blocks.
    pub shuffled: Option<ShuffleBlock>,
}

impl RowOrder {
    /// Rows as they are, shuffled if there is a block.
    pub const fn plain(shuffled: Option<ShuffleBlock>) -> Self {
        Self { interleaved: false, shuffled }
    }

    /// Rows of two halves in alternation, shuffled if there is a block.
    pub const fn interleaved(shuffled: Option<ShuffleBlock>) -> Self {
        Self { interleaved: true, shuffled }
    }

    /// Where `row` of `rows` goes.
    pub const fn place(self, row: usize, rows: usize) -> usize {
        let half = rows / 2;
        let row = match self.interleaved {
            true if row < half => 2 * row,
            true => 2 * (row - half) + 1,
            false => row,
        };
        match self.shuffled {
            Some(block) => block.place(row),
            None => row,
        }
    }

    /// The row of `rows` that goes to `place`.
    pub const fn source(self, place: usize, rows: usize) -> usize {
        let row = match self.shuffled {
            Some(block) => block.source(place),
            None => place,
        };
        match self.interleaved {
            true => row / 2 + row % 2 * (rows / 2),
            false => row,
        }
    }

    /// Checks that `rows` rows fill the order.
    pub(super) fn check(self, rows: usize) -> Result<(), LayoutError> {
        check_multiple("number of rows", rows, if self.interleaved { 2 } else { 1 })?;
        check_multiple("number of rows", rows, self.shuffled.map_or(1, ShuffleBlock::rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_are_those_of_flashinfer() {
        let places = |block: ShuffleBlock| (0..block.rows()).map(|row| block.place(row)).collect::<Vec<_>>();
        assert_eq!(places(ShuffleBlock::Rows16), [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]);
        let wide = [
            0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14,
            22, 30, 7, 15, 23, 31,
        ];
        assert_eq!(places(ShuffleBlock::Rows32), wide);
    }

    #[test]
    fn sources_undo_places() {
        for interleaved in [false, true] {
            for shuffled in [None, Some(ShuffleBlock::Rows16), Some(ShuffleBlock::Rows32)] {
                let order = RowOrder { interleaved, shuffled };
                for rows in [32, 96, 256] {
                    let mut seen = vec![false; rows];
                    for row in 0..rows {
                        let place = order.place(row, rows);
                        assert_eq!(order.source(place, rows), row, "{order:?}");
                        assert!(!std::mem::replace(&mut seen[place], true), "{order:?}");
                    }
                }
            }
        }
    }
}
