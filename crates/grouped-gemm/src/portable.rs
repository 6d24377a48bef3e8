//! The portable kernel: plain loops over eight columns that compilers vectorise.
//!
//! A product of two bf16 values is exact in f32, so `sum + a * b` has one rounding here as in a fused
//! multiply-add. Unlike `vdpbf16ps` it keeps subnormal operands, and the two products of a pair are
//! added one after the other; results therefore differ in the last bits between instruction sets.

use crate::Fp8Kind;
use crate::kernel::{Kernel, Tile};
use crate::panel::{BLOCK_PAIRS, PANEL, PanelPairs, fp8_offset};

/// Columns that are accumulated at once: with 6 rows, 12 of the 16 registers of SSE2.
const COLUMNS: usize = 8;

#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Kernel for Portable {
    const FP8_TILE_ROWS: usize = 0;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn multiply(self, tile: Tile<'_>, panel: PanelPairs<'_>) {
        let panel = match panel {
            PanelPairs::Bf16(panel) => panel,
            PanelPairs::F32(panel) => return multiply_f32(tile, panel),
            _ => unreachable!("a kernel without fp8 tiles gets decoded panels"),
        };
        match tile.rows {
            1 => multiply::<1>(tile, panel),
            2 => multiply::<2>(tile, panel),
            3 => multiply::<3>(tile, panel),
            4 => multiply::<4>(tile, panel),
            5 => multiply::<5>(tile, panel),
            6 => multiply::<6>(tile, panel),
            rows => unreachable!("a tile of {rows} rows"),
        }
    }

    fn decode_row(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        let table = kind.table();
        for (word, pair) in words.iter_mut().zip(codes.chunks(2)) {
            let odd = pair.get(1).map_or(0, |&code| table[code as usize]);
            *word = u32::from(table[pair[0] as usize]) | u32::from(odd) << 16;
        }
    }

    fn decode_panel(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        let table = kind.table();
        for (words, codes) in words.chunks_exact_mut(PANEL).zip(codes.chunks_exact(2 * PANEL)) {
            for (column, word) in words.iter_mut().enumerate() {
                let at = fp8_offset(column);
                *word = u32::from(table[codes[at] as usize]) | u32::from(table[codes[at + 1] as usize]) << 16;
            }
        }
    }
}

/// f32 values, each product rounded before it is added. There are no block scales.
fn multiply_f32(tile: Tile<'_>, panel: &[u32]) {
    for row in 0..tile.rows {
        let words = &tile.words[row * tile.pitch..][..panel.len() / PANEL];
        for (sums, columns) in tile.sums[row * tile.sums_pitch..][..PANEL]
            .chunks_exact_mut(COLUMNS)
            .zip(0..)
            .map(|(sums, i)| (sums, i * COLUMNS))
        {
            let sums: &mut [f32; COLUMNS] = sums.try_into().expect("a run of COLUMNS floats");
            let mut total = *sums;
            for (word, line) in words.iter().zip(panel.chunks_exact(PANEL)) {
                let value = f32::from_bits(*word);
                for (sum, weight) in total.iter_mut().zip(&line[columns..][..COLUMNS]) {
                    *sum += value * f32::from_bits(*weight);
                }
            }
            *sums = total;
        }
    }
}

/// Takes 128 of K at a time: that much of a panel is 16 KiB, which stays in L1 for all its columns.
fn multiply<const M: usize>(tile: Tile<'_>, panel: &[u32]) {
    let pairs = panel.len() / PANEL;
    let rows: [&[u32]; M] = std::array::from_fn(|row| &tile.words[row * tile.pitch..][..pairs]);
    for (block, panel) in panel.chunks(BLOCK_PAIRS * PANEL).enumerate() {
        let start = block * BLOCK_PAIRS;
        let rows = rows.map(|row| &row[start..start + panel.len() / PANEL]);
        for column in (0..PANEL).step_by(COLUMNS) {
            let at = |row: usize| row * tile.sums_pitch + column..row * tile.sums_pitch + column + COLUMNS;
            let mut sums: [[f32; COLUMNS]; M] =
                std::array::from_fn(|row| tile.sums[at(row)].try_into().expect("a run of COLUMNS floats"));
            match tile.scales {
                None => accumulate(&mut sums, rows, &panel[column..]),
                Some(scales) => {
                    let mut products = [[0.0; COLUMNS]; M];
                    accumulate(&mut products, rows, &panel[column..]);
                    for (row, products) in products.into_iter().enumerate() {
                        let scale = scales.at(row, block)[column / (PANEL / 2)];
                        for (sum, product) in sums[row].iter_mut().zip(products) {
                            *sum += product * scale;
                        }
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                tile.sums[at(row)].copy_from_slice(sums);
            }
        }
    }
}

#[inline(always)]
fn accumulate<const M: usize>(sums: &mut [[f32; COLUMNS]; M], rows: [&[u32]; M], panel: &[u32]) {
    let pairs = rows[0].len();
    let rows = rows.map(|row| &row[..pairs]);
    let mut local = *sums;
    for (pair, line) in panel.chunks(PANEL).take(pairs).enumerate() {
        let line: &[u32; COLUMNS] = line[..COLUMNS].try_into().expect("a run of COLUMNS words");
        let even = line.map(low);
        let odd = line.map(high);
        for row in 0..M {
            let (a, b) = (low(rows[row][pair]), high(rows[row][pair]));
            for column in 0..COLUMNS {
                local[row][column] += a * even[column];
            }
            for column in 0..COLUMNS {
                local[row][column] += b * odd[column];
            }
        }
    }
    *sums = local;
}

/// The value of the even K of an operand word.
#[inline(always)]
fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

/// The value of the odd K of an operand word.
#[inline(always)]
fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}
