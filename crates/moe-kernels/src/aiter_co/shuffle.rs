//! The order in which AITER's kernels read FP8 weights: `shuffle_weight(w, (16, 16))`.

use crate::launch::BadLaunch;

const NAME: &str = "AITER's shuffle";
/// Rows and columns of a piece that lies together, and bytes of a row of it that a lane reads at once.
const ROWS: usize = 16;
const COLUMNS: usize = 32;
const LANE: usize = 16;

/// One expert's `[rows, columns]` FP8 matrix in AITER's order. There, dimensions from the outside are: 16 rows, 32 columns, half
/// of them, row, column.
///
/// # Errors
/// [`BadLaunch::NotMultiple`] unless `rows` is a multiple of 16 and `columns` of 32.
///
/// # Panics
/// If `matrix` has another length.
pub fn shuffle_weights(matrix: &[u8], rows: usize, columns: usize) -> Result<Vec<u8>, BadLaunch> {
    BadLaunch::multiple(NAME, "rows", rows, ROWS)?;
    BadLaunch::multiple(NAME, "columns", columns, COLUMNS)?;
    assert_eq!(matrix.len(), rows * columns, "bytes of a {rows}x{columns} matrix");
    let mut shuffled = vec![0; matrix.len()];
    for (index, from) in matrix.chunks_exact(LANE).enumerate() {
        let (row, piece) = (index / (columns / LANE), index % (columns / LANE));
        let band = row / ROWS * (columns / LANE) + piece;
        shuffled[(band * ROWS + row % ROWS) * LANE..][..LANE].copy_from_slice(from);
    }
    Ok(shuffled)
}

#[cfg(test)]
mod tests {
    use rand::RngCore;

    use super::*;

    /// AITER's definition: view `[rows / 16, 16, columns / 32, 2, 16]`, permuted to `[0, 2, 3, 1, 4]`.
    fn by_definition(from: &[u8], rows: usize, columns: usize) -> Vec<u8> {
        let mut to = Vec::new();
        for band in 0..rows / 16 {
            for block in 0..columns / 32 {
                for half in 0..2 {
                    for row in 0..16 {
                        let start = (band * 16 + row) * columns + block * 32 + half * 16;
                        to.extend(&from[start..start + 16]);
                    }
                }
            }
        }
        to
    }

    #[test]
    fn the_order_is_aiters() {
        for (rows, columns) in [(16, 32), (32, 96), (48, 256)] {
            let mut matrix = vec![0; rows * columns];
            rand::rng().fill_bytes(&mut matrix);
            let shuffled = shuffle_weights(&matrix, rows, columns).unwrap();
            assert_eq!(shuffled, by_definition(&matrix, rows, columns), "{rows}x{columns}");
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let refused = |rows, columns| shuffle_weights(&[], rows, columns).unwrap_err().to_string();
        assert!(refused(8, 32).starts_with("rows 8 is not a multiple of 16"));
        assert!(refused(16, 48).starts_with("columns 48 is not a multiple of 32"));
    }
}
