//! Scales in tiles, as FP4 tensor cores read them.

use super::{LayoutError, check_len};

/// Rows and columns of a tile of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleTile {
    /// 128 rows by 4 scales: weights, and activations of large batches.
    Rows128x4,
    /// 8 rows by 4 scales: activations of small batches.
    Rows8x4,
}

/// Scales of a row that a tile has.
const TILE_COLUMNS: usize = 4;

impl ScaleTile {
    /// Rows of a tile.
    pub const fn rows(self) -> usize {
        match self {
            ScaleTile::Rows128x4 => 128,
            ScaleTile::Rows8x4 => 8,
        }
    }

    /// Bytes of `rows` rows of `columns` scales; both are filled up to whole tiles.
    pub const fn bytes(self, rows: usize, columns: usize) -> usize {
        rows.next_multiple_of(self.rows()) * columns.next_multiple_of(TILE_COLUMNS)
    }

    /// Index of the scale at `row` and `column` of rows of `columns` scales.
    ///
    /// Tiles lie row of tiles after row of tiles. In one of 128 rows, the rows 0, 32, 64 and 96 stand together, four
    /// scales each, then 1, 33, 65 and 97; one of 8 rows is row-major.
    pub const fn offset(self, row: usize, column: usize, columns: usize) -> usize {
        let tile = row / self.rows() * columns.div_ceil(TILE_COLUMNS) + column / TILE_COLUMNS;
        let row = row % self.rows();
        let in_tile = match self {
            ScaleTile::Rows128x4 => row % 32 * 16 + row / 32 * TILE_COLUMNS,
            ScaleTile::Rows8x4 => row * TILE_COLUMNS,
        };
        tile * self.rows() * TILE_COLUMNS + in_tile + column % TILE_COLUMNS
    }
}

/// One-byte scales `[rows, columns]` in tiles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwizzledScales {
    bytes: Vec<u8>,
    rows: usize,
    columns: usize,
    tile: ScaleTile,
}

impl SwizzledScales {
    /// Takes bytes that are in tiles already. What fills up the tiles is not looked at.
    ///
    /// # Errors
    /// [`LayoutError::Length`].
    pub fn new(bytes: Vec<u8>, [rows, columns]: [usize; 2], tile: ScaleTile) -> Result<Self, LayoutError> {
        check_len("the swizzled scales", bytes.len(), tile.bytes(rows, columns))?;
        Ok(Self { bytes, rows, columns, tile })
    }

    /// Brings row-major `scales` into tiles and fills them up with zeros.
    ///
    /// # Errors
    /// [`LayoutError::Length`].
    pub fn from_rows(
        scales: &[u8],
        [rows, columns]: [usize; 2],
        tile: ScaleTile,
    ) -> Result<Self, LayoutError> {
        check_len("the scales", scales.len(), rows * columns)?;
        let mut bytes = vec![0; tile.bytes(rows, columns)];
        for (at, &scale) in scales.iter().enumerate() {
            bytes[tile.offset(at / columns, at % columns, columns)] = scale;
        }
        Ok(Self { bytes, rows, columns, tile })
    }

    /// The scales row after row.
    pub fn to_rows(&self) -> Vec<u8> {
        let at = |row, column| self.bytes[self.tile.offset(row, column, self.columns)];
        (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| at(row, column))).collect()
    }

    /// The tiles.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of two tiles, by hand.
    #[test]
    fn tiles_have_the_order_of_the_hardware() {
        let tile = ScaleTile::Rows128x4;
        assert_eq!(tile.bytes(129, 5), 256 * 8);
        for (row, column, want) in [(0, 3, 3), (32, 0, 4), (96, 1, 13), (1, 0, 16), (31, 0, 496), (0, 4, 512)]
        {
            assert_eq!(tile.offset(row, column, 5), want, "{row} {column}");
        }
        assert_eq!(tile.offset(128, 0, 5), 1024);
        let small = ScaleTile::Rows8x4;
        assert_eq!((small.offset(7, 3, 8), small.offset(0, 4, 8), small.offset(8, 0, 8)), (31, 32, 64));
    }
}
