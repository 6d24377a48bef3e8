//! What an instruction set provides to the one algorithm of this crate.

use quant::fp4::VALUES;

use crate::Fp8Kind;
use crate::aligned::LINE;
use crate::panel::{PANEL, PanelPairs};

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

    /// As [`multiply`](Self::multiply) of a run of fp8 pairs, which is widened to `words` on the way, in the order of a
    /// bf16 panel. A tile of at most [`FP8_TILE_ROWS`](Self::FP8_TILE_ROWS).
    fn multiply_decoding(self, tile: Tile<'_>, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        self.decode_panel(kind, codes, words);
        self.multiply(tile, PanelPairs::Bf16(words));
    }

    /// Widens codes to operand words, two neighbours to a word; an odd last one gets a zero half.
    fn decode_row(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]);

    /// Widens a run of fp8 panel pairs to the order of a bf16 panel.
    fn decode_panel(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]);

    /// Widens the fp4 panel pairs of one group, a byte per pair and column, to the order of a bf16 panel, times the
    /// scale of each column. The products must be exact in bf16.
    #[inline(always)]
    fn decode_fp4(self, codes: &[u8], scales: &[f32; PANEL], words: &mut [u32]) {
        for (codes, words) in codes.chunks_exact(PANEL).zip(words.chunks_exact_mut(PANEL)) {
            for ((word, &pair), scale) in words.iter_mut().zip(codes).zip(scales) {
                let pair = FP4_PAIRS[usize::from(pair)];
                // Both products are exact and end in sixteen zero bits.
                let even = f32::from_bits(pair << 16) * scale;
                let odd = f32::from_bits(pair & 0xffff_0000) * scale;
                *word = even.to_bits() >> 16 | odd.to_bits();
            }
        }
    }
}

/// Both values of a byte of two fp4 codes as an operand word.
static FP4_PAIRS: [u32; 256] = {
    let mut words = [0; 256];
    let mut pair = 0;
    while pair < 256 {
        words[pair] = VALUES[pair & 0xf].to_bits() >> 16 | VALUES[pair >> 4].to_bits() & 0xffff_0000;
        pair += 1;
    }
    words
};

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
    /// What to fetch meanwhile, as far as two lines per pair go.
    pub(crate) ahead: Ahead,
}

/// Memory that tiles to come will read. Each of those that share a run of a panel fetches a part of it, so that memory
/// delivers all the time and not only under the first of them.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// Nothing is read through it but by prefetches.
    pub(crate) first: *const u8,
    /// Cache lines.
    pub(crate) lines: usize,
}

impl Ahead {
    pub(crate) const NOTHING: Ahead = Ahead { first: std::ptr::null(), lines: 0 };

    pub(crate) fn of(run: PanelPairs<'_>) -> Self {
        let (first, bytes) = match run {
            PanelPairs::Bf16(words) | PanelPairs::F32(words) => (words.as_ptr().cast(), size_of_val(words)),
            PanelPairs::Fp8 { codes, .. } => (codes.as_ptr(), codes.len()),
            PanelPairs::Fp4(run) => (run.codes().as_ptr(), run.codes().len()),
        };
        Ahead { first, lines: bytes / LINE }
    }

    /// Part `part` of `parts`.
    pub(crate) fn part(self, part: usize, parts: usize) -> Self {
        let at = |part: usize| part * self.lines / parts;
        Ahead { first: self.first.wrapping_add(at(part) * LINE), lines: at(part + 1) - at(part) }
    }
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
