//! One task: pack the rows, multiply panel by panel, hand the results to the sink.

use std::ops::Range;

use crate::activations::PairRange;
use crate::aligned::floats;
use crate::epilogue::{RowTerms, join_gate_up};
use crate::kernel::{Ahead, BlockScales, Kernel, TILE_ROWS, Tile};
use crate::panel::{BLOCK_PAIRS, PANEL, PanelPairs};
use crate::sink::RowSink;
use crate::tasks::{CHUNK_ROWS, SUM_PANELS, Task};
use crate::weights::PackedWeight;
use crate::{Epilogue, GroupedGemm};

/// K pairs for which a full chunk of rows is packed at once. The rows (192 KiB), the sums (96 KiB), and the runs of a panel
/// that are multiplied and fetched share an L2 of 1 MiB.
const CHUNK_PAIRS: usize = 512;
/// K pairs of codes that are widened at once for several tiles, 16 KiB: they stay in L1.
const DECODED_PAIRS: usize = BLOCK_PAIRS;
/// K pairs of a bf16 panel that all tiles multiply before the next, 32 KiB: it stays in L1.
const RUN_PAIRS: usize = 2 * BLOCK_PAIRS;
/// Least K pairs from what is multiplied to what is fetched.
const AHEAD_PAIRS: usize = 2 * BLOCK_PAIRS;
/// Words between packed rows, which keeps rows of a tile off each other's L1 sets.
const ROW_GAP: usize = 16;
const SUM_COLUMNS: usize = SUM_PANELS * PANEL;

const OPERAND_WORDS: usize = CHUNK_ROWS * (CHUNK_PAIRS + ROW_GAP);
const SUM_WORDS: usize = CHUNK_ROWS * SUM_COLUMNS;
const DECODED_WORDS: usize = DECODED_PAIRS * PANEL;
/// A scale per 128 of K for every operand, and one more per row for a ragged end.
const SCALE_WORDS: usize = OPERAND_WORDS / BLOCK_PAIRS + CHUNK_ROWS;

/// Words of scratch of one worker, a whole number of cache lines.
pub(crate) const SCRATCH_WORDS: usize =
    (OPERAND_WORDS + SUM_WORDS + DECODED_WORDS + SCALE_WORDS).next_multiple_of(16);

/// One thread's share of the scratch. Its contents mean nothing between tasks.
pub(crate) struct Worker<'a, K> {
    kernel: K,
    /// Most rows of a tile whose fp8 codes are widened in registers.
    fp8_tile_rows: usize,
    operands: &'a mut [u32],
    decoded: &'a mut [u32],
    sums: &'a mut [f32],
    scales: &'a mut [f32],
}

/// The rows of a task as they are packed now.
#[derive(Clone, Copy)]
struct Packed {
    rows: usize,
    pairs: PairRange,
    /// Words between rows.
    pitch: usize,
    /// 1x128 scales between rows, if there are any.
    scale_pitch: Option<usize>,
}

impl<'a, K: Kernel> Worker<'a, K> {
    /// `scratch` starts on a cache line and has at least [`SCRATCH_WORDS`].
    pub(crate) fn new(kernel: K, fp8_tile_rows: usize, scratch: &'a mut [u32]) -> Self {
        let (operands, rest) = scratch.split_at_mut(OPERAND_WORDS);
        let (decoded, rest) = rest.split_at_mut(DECODED_WORDS);
        let (sums, scales) = floats(rest).split_at_mut(SUM_WORDS);
        let fp8_tile_rows = fp8_tile_rows.min(K::FP8_TILE_ROWS);
        Worker { kernel, fp8_tile_rows, operands, decoded, sums, scales }
    }

    pub(crate) fn run<W: PackedWeight>(
        &mut self,
        gemm: &GroupedGemm<'_, W>,
        task: Task,
        sink: &impl RowSink,
    ) {
        let weight = &gemm.weights[gemm.groups[task.group].expert];
        let (shape, words) = (weight.shape(), weight.row_words());
        let rows = task.rows.len();
        let step = pairs_at_once(rows);
        let mut is_packed = false;
        for first in task.panels.clone().step_by(SUM_PANELS) {
            let panels = first..(first + SUM_PANELS).min(task.panels.end);
            self.sums[..rows * SUM_COLUMNS].fill(0.0);
            for start in (0..words).step_by(step) {
                let end = (start + step).min(words);
                let pairs = PairRange { start, end, k: shape.k };
                let packed = Packed::new(gemm, rows, pairs);
                // Rows that fit as a whole are packed once for all panels of the task.
                if !is_packed {
                    self.pack(gemm, &task.rows, packed);
                    is_packed = pairs.len() == words;
                }
                for panel in panels.clone() {
                    let next = if panel + 1 < panels.end {
                        Some((panel + 1, pairs.start))
                    } else if end < words {
                        Some((first, end))
                    } else {
                        Some((panels.end, 0)).filter(|&(panel, _)| panel < shape.panels())
                    };
                    let next = next.map(|(panel, from)| weight.panel(panel).slice(from..words));
                    self.multiply(weight, panel, (panel - first) * PANEL, (packed, next));
                }
            }
            self.store(gemm, weight, &task.rows, panels, sink);
        }
    }

    fn pack<W: PackedWeight>(&mut self, gemm: &GroupedGemm<'_, W>, rows: &Range<usize>, packed: Packed) {
        let PairRange { start, end, .. } = packed.pairs;
        for (i, sorted) in rows.clone().enumerate() {
            let row = gemm.activation_row(sorted);
            let words = &mut self.operands[i * packed.pitch..][..packed.pairs.len()];
            gemm.activations.pack_row(self.kernel, row, packed.pairs, words);
            if let (Some(pitch), Some(groups)) = (packed.scale_pitch, gemm.activations.groups()) {
                let scales = &groups.values[row * groups.pitch..];
                self.scales[i * pitch..][..pitch]
                    .copy_from_slice(&scales[start / BLOCK_PAIRS..end.div_ceil(BLOCK_PAIRS)]);
            }
        }
    }

    /// Adds the packed rows times `panel` to the sums from column `column` on. `next` is what is multiplied after it.
    fn multiply<W: PackedWeight>(
        &mut self,
        weight: &W,
        panel: usize,
        column: usize,
        (packed, next): (Packed, Option<PanelPairs<'_>>),
    ) {
        let shape = weight.shape();
        let Packed { rows: total, pairs: PairRange { start, end, .. }, .. } = packed;
        let (lines, pairs) = (weight.panel(panel).slice(start..end), packed.pairs.len());
        let few = self.fp8_tile_rows;
        let (decodes, first_tile) = match lines {
            PanelPairs::Bf16(_) | PanelPairs::F32(_) => (false, 0),
            PanelPairs::Fp8 { .. } => (total > few, few),
            PanelPairs::Fp4(_) => (true, 0),
        };
        let tiles = if decodes && first_tile > 0 {
            1 + (total - first_tile).div_ceil(TILE_ROWS)
        } else {
            total.div_ceil(TILE_ROWS)
        };
        let step = if decodes { DECODED_PAIRS } else { RUN_PAIRS };
        let column_scales = weight.terms().scale.as_ref().and_then(|scale| scale.blocks(panel, shape));
        let scales = |row: usize, block: usize| BlockScales {
            rows: packed.scale_pitch.map(|pitch| &self.scales[row * pitch + block..]),
            row_pitch: packed.scale_pitch.unwrap_or(0),
            columns: column_scales.map(|scales| &scales[start / BLOCK_PAIRS + block..]),
        };
        let is_scaled = packed.scale_pitch.is_some() || column_scales.is_some();
        if tiles == 1 && !decodes {
            // The processor fetches by itself what one tile reads. Memory waits between panels, so little is done there.
            let operands = Tile {
                rows: total,
                words: self.operands,
                pitch: packed.pitch,
                sums: &mut self.sums[column..],
                sums_pitch: SUM_COLUMNS,
                scales: is_scaled.then(|| scales(0, 0)),
                ahead: Ahead::NOTHING,
            };
            return self.kernel.multiply(operands, lines);
        }
        for from in (0..pairs).step_by(step) {
            let lines = [Some(lines), next];
            let run = run_of(lines, pairs, from..from + step);
            let ahead = from + step.max(AHEAD_PAIRS);
            let ahead = match run_of(lines, pairs, ahead..ahead + step) {
                Some(run) => Ahead::of(run),
                None => Ahead::NOTHING,
            };
            let Some(run) = run else { return };
            if let PanelPairs::Fp4(run) = run {
                let words = &mut self.decoded[..run.words()];
                self.kernel.vectorize(
                    #[inline(always)]
                    || run.decode(self.kernel, words),
                );
            }
            let block = from / BLOCK_PAIRS;
            let mut row = 0;
            for tile in 0..tiles {
                // Rows are spread evenly: no tile is left with a single row next to full ones.
                let mut rows = (total - row).div_ceil(tiles - tile);
                let widens = decodes && first_tile > 0 && tile == 0;
                if widens {
                    rows = rows.min(first_tile);
                }
                let operands = Tile {
                    rows,
                    words: &self.operands[row * packed.pitch + from..],
                    pitch: packed.pitch,
                    sums: &mut self.sums[row * SUM_COLUMNS + column..],
                    sums_pitch: SUM_COLUMNS,
                    scales: is_scaled.then(|| scales(row, block)),
                    ahead: ahead.part(tile, tiles),
                };
                match run {
                    PanelPairs::Fp8 { codes, kind } if decodes => {
                        let words = &mut self.decoded[..codes.len() / 2];
                        match (widens, tile) {
                            (true, _) => self.kernel.multiply_decoding(operands, kind, codes, words),
                            (false, 0) => {
                                self.kernel.decode_panel(kind, codes, words);
                                self.kernel.multiply(operands, PanelPairs::Bf16(words));
                            }
                            (false, _) => self.kernel.multiply(operands, PanelPairs::Bf16(words)),
                        }
                    }
                    PanelPairs::Fp4(run) => {
                        self.kernel.multiply(operands, PanelPairs::Bf16(&self.decoded[..run.words()]));
                    }
                    run => self.kernel.multiply(operands, run),
                }
                row += rows;
            }
        }
    }

    fn store<W: PackedWeight>(
        &mut self,
        gemm: &GroupedGemm<'_, W>,
        weight: &W,
        rows: &Range<usize>,
        panels: Range<usize>,
        sink: &impl RowSink,
    ) {
        let shape = weight.shape();
        let column = panels.start * shape.columns.results_per_panel();
        let results = (panels.len() * shape.columns.results_per_panel()).min(shape.result_columns() - column);
        let terms = weight.terms();
        let scales = terms.scale.as_ref().and_then(|scale| scale.columns(panels.start));
        for (i, sorted) in rows.clone().enumerate() {
            let sums = &mut self.sums[i * SUM_COLUMNS..][..panels.len() * PANEL];
            let terms = RowTerms {
                scales,
                activation: gemm.activations.row_scale(gemm.activation_row(sorted)),
                router: gemm.router_weights.map(|weights| weights[sorted]),
                bias: terms.bias(panels.start),
            };
            self.kernel.vectorize(
                #[inline(always)]
                || {
                    terms.apply(gemm.epilogue, sums);
                    if let Epilogue::GateUp(activation) = gemm.epilogue {
                        join_gate_up(activation, sums);
                    }
                    // SAFETY: the call checked that the sink covers all rows of the groups and has the
                    // columns of the result; groups are disjoint, and tasks cover each row and panel once.
                    unsafe { sink.store(sorted, column, &sums[..results]) }
                },
            );
        }
    }
}

impl Packed {
    fn new<W: PackedWeight>(gemm: &GroupedGemm<'_, W>, rows: usize, pairs: PairRange) -> Self {
        let blocks = pairs.len().div_ceil(BLOCK_PAIRS);
        Packed {
            rows,
            pairs,
            pitch: pairs.len().next_multiple_of(16) + ROW_GAP,
            scale_pitch: gemm.activations.groups().map(|_| blocks),
        }
    }
}

/// Pairs `run` of two runs one after the other, of which the first has `pairs`, as far as they are in one of them.
fn run_of<'p>(
    [this, next]: [Option<PanelPairs<'p>>; 2],
    pairs: usize,
    run: Range<usize>,
) -> Option<PanelPairs<'p>> {
    if run.start < pairs {
        return Some(this?.slice(run.start..run.end.min(pairs)));
    }
    let (next, start) = (next?, run.start - pairs);
    let end = (run.end - pairs).min(next.pairs());
    (start < end).then(|| next.slice(start..end))
}

/// K pairs that are packed at once: all the scratch holds, in whole scale blocks.
fn pairs_at_once(rows: usize) -> usize {
    let fit = OPERAND_WORDS / rows - ROW_GAP;
    fit / BLOCK_PAIRS * BLOCK_PAIRS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_rows_fit_the_scratch() {
        for rows in 1..=CHUNK_ROWS {
            let pairs = pairs_at_once(rows);
            assert!(pairs >= CHUNK_PAIRS && pairs.is_multiple_of(BLOCK_PAIRS), "{rows} rows: {pairs} pairs");
            assert!(rows * (pairs + ROW_GAP) <= OPERAND_WORDS, "{rows} rows");
            assert!(rows * pairs / BLOCK_PAIRS <= SCALE_WORDS, "{rows} rows");
        }
    }
}
