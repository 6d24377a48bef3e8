//! What an instruction set provides to the one algorithm of this crate.

use crate::Fp8Kind;
use crate::panel::PanelPairs;

/// Most rows of a tile: 6 rows of 64 columns are 24 AVX-512 accumulators, which leaves 8 registers
/// for the operands.
pub(crate) const TILE_ROWS: usize = 6;

/// The primitive operations. A value is proof that the machine has the instruction set.
pub(crate) trait Kernel: Copy + Send + Sync {
    /// Most rows of a tile whose fp8 codes are worth decoding in registers; 0 if they cannot be.
    const FP8_TILE_ROWS: usize;

    /// Runs `f` compiled for this instruction set, if it is inlined.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;

    /// Adds the product of `tile.rows` rows and one panel to `tile.sums`.
    ///
    /// Every element of the result is one chain of additions in ascending K, whatever the number of
    /// rows and however K is cut into calls: this is what makes a row's bits independent of its batch.
    fn multiply(self, tile: Tile<'_>, panel: PanelPairs<'_>);

    /// Widens codes to operand words, two neighbours to a word; an odd last one gets a zero half.
    fn decode_row(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]);

    /// Widens a run of fp8 panel pairs to the order of a bf16 panel.
    fn decode_panel(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]);
}

/// A few rows of the left operand and the sums that they add to.
pub(crate) struct Tile<'a> {
    /// Number of rows, 1 to [`TILE_ROWS`].
    pub(crate) rows: usize,
    /// Operand words; row `i` starts at `i * pitch` and has at least as many words as the panel has pairs.
    pub(crate) words: &'a [u32],
    /// Words from one row to the next.
    pub(crate) pitch: usize,
    /// f32 sums; row `i` starts at `i * sums_pitch` and has 64 columns.
    pub(crate) sums: &'a mut [f32],
    /// Floats from one row of sums to the next.
    pub(crate) sums_pitch: usize,
    /// Scales of every 128 of K, if there are any. The panel then starts at a multiple of 128.
    pub(crate) scales: Option<BlockScales<'a>>,
}

/// Scales that apply to each 128 of K: `sums += row * column * products`.
#[derive(Clone, Copy)]
pub(crate) struct BlockScales<'a> {
    /// 1x128 activation scales; row `i` starts at `i * row_pitch`.
    pub(crate) rows: Option<&'a [f32]>,
    /// Floats from one row of scales to the next.
    pub(crate) row_pitch: usize,
    /// Weight scales of the two half panels, one entry per block.
    pub(crate) columns: Option<&'a [[f32; 2]]>,
}

impl BlockScales<'_> {
    /// The factors of row `row` in block `block` for the two half panels.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, block: usize) -> [f32; 2] {
        let row = self.rows.map_or(1.0, |scales| scales[row * self.row_pitch + block]);
        self.columns.map_or([row; 2], |scales| scales[block].map(|column| row * column))
    }
}
