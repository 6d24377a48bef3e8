//! Weights in the order in which kernels fetch them.
//!
//! A matrix `[n, k]` becomes `[n / 128, k bytes / 128]` tiles of 128 rows by 128 bytes, 16 KiB in one piece each. In a tile for
//! sm_90a, 16-byte chunk `c` of row `r` is at chunk `c ^ (r % 8)`, as tensor cores want it in shared memory. A tile for gfx942
//! and gfx950 has four slabs of 32 rows, each `[8 chunks, 32 rows, 16 bytes]`, as a wave reads them into its registers. Before
//! an activation, eight rows of gate and eight of up alternate, so that one thread gets both halves of an output. Nothing is
//! lost: [`unpack`] gives the rows back.

use device_runtime::{DeviceBuffer, DeviceResult, Runtime};

use crate::arch::Arch;
use crate::launch::BadLaunch;

/// Rows of a tile.
pub const TILE_ROWS: usize = 128;
/// Bytes of a row of a tile.
pub const TILE_ROW_BYTES: usize = 128;

const NAME: &str = "packed weights";
const CHUNK: usize = 16;
/// Rows of gate, or of up, that stay together.
const RUN: usize = 8;

/// Where packed row `row` comes from: of gate or of up, and its number there.
fn source(row: usize) -> (bool, usize) {
    let (run, within) = (row / RUN, row % RUN);
    (run % 2 == 1, run / 2 * RUN + within)
}

/// The map by which two blocks fetch a tile of `packed` together, in memory of the device; to be kept as long as `packed`.
///
/// # Errors
/// Of the driver.
pub fn map(runtime: &Runtime, packed: &DeviceBuffer) -> DeviceResult<DeviceBuffer> {
    runtime.row_map(packed, TILE_ROW_BYTES as u32, TILE_ROWS as u32)
}

/// Packs `[intermediate, k]` of gate and of up, each row `k_bytes` long, as one matrix of `2 · intermediate` rows for `arch`.
///
/// # Errors
/// [`BadLaunch::NotMultiple`] unless `intermediate` is a multiple of 64 and `k_bytes` of 128.
///
/// # Panics
/// If `gate` or `up` has another length.
pub fn gate_up(
    arch: Arch,
    gate: &[u8],
    up: &[u8],
    intermediate: usize,
    k_bytes: usize,
) -> Result<Vec<u8>, BadLaunch> {
    BadLaunch::multiple(NAME, "intermediate", intermediate, TILE_ROWS / 2)?;
    assert_eq!(
        (gate.len(), up.len()),
        (intermediate * k_bytes, intermediate * k_bytes),
        "bytes of gate and up"
    );
    tiles(arch, 2 * intermediate, k_bytes, |row| {
        let (is_up, row) = source(row);
        &(if is_up { up } else { gate })[row * k_bytes..][..k_bytes]
    })
}

/// Packs `[hidden, k]` of down, each row `k_bytes` long, for `arch`.
///
/// # Errors
/// [`BadLaunch::NotMultiple`] unless `hidden` and `k_bytes` are multiples of 128.
///
/// # Panics
/// If `down` has another length.
pub fn down(arch: Arch, down: &[u8], hidden: usize, k_bytes: usize) -> Result<Vec<u8>, BadLaunch> {
    BadLaunch::multiple(NAME, "hidden", hidden, TILE_ROWS)?;
    assert_eq!(down.len(), hidden * k_bytes, "bytes of down");
    tiles(arch, hidden, k_bytes, |row| &down[row * k_bytes..][..k_bytes])
}

fn tiles<'r>(
    arch: Arch,
    n: usize,
    k_bytes: usize,
    row: impl Fn(usize) -> &'r [u8],
) -> Result<Vec<u8>, BadLaunch> {
    BadLaunch::multiple(NAME, "bytes of k", k_bytes, TILE_ROW_BYTES)?;
    let mut packed = vec![0; n * k_bytes];
    for index in 0..n {
        for (chunk, bytes) in row(index).chunks_exact(CHUNK).enumerate() {
            packed[place(arch, index, chunk, k_bytes)..][..CHUNK].copy_from_slice(bytes);
        }
    }
    Ok(packed)
}

/// Where 16-byte chunk `chunk` of row `row` is.
fn place(arch: Arch, row: usize, chunk: usize, k_bytes: usize) -> usize {
    const CHUNKS: usize = TILE_ROW_BYTES / CHUNK;
    /// Rows of a wave.
    const SLAB: usize = 32;
    let (n_tile, row, k_tile, chunk) = (row / TILE_ROWS, row % TILE_ROWS, chunk / CHUNKS, chunk % CHUNKS);
    let tile = n_tile * (k_bytes / TILE_ROW_BYTES) + k_tile;
    let within = match arch {
        Arch::Sm90a => row * CHUNKS + (chunk ^ (row % RUN)),
        Arch::Gfx942 | Arch::Gfx950 => (row / SLAB * CHUNKS + chunk) * SLAB + row % SLAB,
    };
    tile * TILE_ROWS * TILE_ROW_BYTES + within * CHUNK
}

/// Row `row` of a matrix packed for `arch`.
pub fn unpack(arch: Arch, packed: &[u8], k_bytes: usize, row: usize) -> Vec<u8> {
    let chunks = 0..k_bytes / CHUNK;
    chunks.flat_map(|chunk| packed[place(arch, row, chunk, k_bytes)..][..CHUNK].iter().copied()).collect()
}

/// Scales of 128x128 blocks for [`gate_up`]: `[ceil(intermediate / 128), k_blocks]` of each become
/// `[2 · intermediate / 128, k_blocks, 2]`.
pub fn gate_up_block_scales(gate: &[f32], up: &[f32], intermediate: usize, k_blocks: usize) -> Vec<f32> {
    let tiles = 0..2 * intermediate / TILE_ROWS;
    // A tile has 64 rows of each, half a block.
    let of = |tile: usize, k: usize| tile / 2 * k_blocks + k;
    tiles.flat_map(|tile| (0..k_blocks).flat_map(move |k| [gate[of(tile, k)], up[of(tile, k)]])).collect()
}

/// Scales of 128x128 blocks for [`down`]: `[hidden / 128, k_blocks]` become `[hidden / 128, k_blocks, 2]`.
pub fn down_block_scales(down: &[f32]) -> Vec<f32> {
    down.iter().flat_map(|&scale| [scale, scale]).collect()
}

/// Scales of rows for [`gate_up`]: `[intermediate]` of each become `[2 · intermediate]`. Those of [`down`] stay as they are.
pub fn gate_up_row_scales(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let scale = |row| match source(row) {
        (false, row) => gate[row],
        (true, row) => up[row],
    };
    (0..gate.len() + up.len()).map(scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, k_bytes: usize, seed: usize) -> Vec<u8> {
        (0..n * k_bytes).map(|i| ((i * 31 + seed * 17) ^ (i >> 7)) as u8).collect()
    }

    #[test]
    fn packing_loses_nothing() {
        let (intermediate, k_bytes) = (192, 384);
        let (gate, up) = (rows(intermediate, k_bytes, 1), rows(intermediate, k_bytes, 2));
        let matrix = rows(256, k_bytes, 3);
        for arch in Arch::ALL {
            let packed = gate_up(arch, &gate, &up, intermediate, k_bytes).unwrap();
            assert_eq!(packed.len(), gate.len() + up.len());
            for row in 0..2 * intermediate {
                let (is_up, of) = source(row);
                let wanted = &(if is_up { &up } else { &gate })[of * k_bytes..][..k_bytes];
                assert_eq!(unpack(arch, &packed, k_bytes, row), wanted, "row {row} for {arch}");
            }
            let packed = down(arch, &matrix, 256, k_bytes).unwrap();
            let back: Vec<u8> = (0..256).flat_map(|row| unpack(arch, &packed, k_bytes, row)).collect();
            assert_eq!(back, matrix, "{arch}");
        }
    }

    #[test]
    fn rows_of_gate_and_up_alternate() {
        assert_eq!(
            [0, 7, 8, 15, 16, 24].map(source),
            [(false, 0), (false, 7), (true, 0), (true, 7), (false, 8), (true, 8)]
        );
        let scales = gate_up_row_scales(&[1.0; 8], &[2.0; 8]);
        assert_eq!(scales, [[1.0; 8], [2.0; 8]].concat());
        let blocks = gate_up_block_scales(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0], 192, 2);
        assert_eq!(blocks, [1.0, 5.0, 2.0, 6.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0, 4.0, 8.0]);
    }

    #[test]
    fn what_does_not_fill_tiles_is_refused() {
        let refused = gate_up(Arch::Gfx950, &[], &[], 0, 100).unwrap_err().to_string();
        assert_eq!(refused, "bytes of k 100 is not a multiple of 128 (packed weights)");
        let refused = down(Arch::Sm90a, &[0; 7000], 7000, 1).unwrap_err().to_string();
        assert_eq!(refused, "hidden 7000 is not a multiple of 128 (packed weights)");
    }
}
