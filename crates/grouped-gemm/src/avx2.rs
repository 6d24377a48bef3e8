//! The AVX2 kernel: f32 fused multiply-adds on operands that are widened on the way, fp8 codes widened by arithmetic on
//! their nibbles.
//!
//! Products and sums are those of the portable kernel, bit for bit: a product of two bf16 values is exact in f32, so it
//! makes no difference that the addition is fused to it.

use std::arch::x86_64::*;

use crate::kernel::{Kernel, TILE_ROWS, Tile};
use crate::panel::{BLOCK_PAIRS, PANEL, PanelPairs, SCALE_BLOCK};
use crate::portable::Portable;
use crate::{Fp8Kind, Isa};

/// f32 lanes of a register.
const LANES: usize = 8;
/// Bytes that are fetched ahead of the pair in use.
const PREFETCH: usize = 4096;

/// Proof that the machine has the instruction set; made by [`new`](Self::new) only.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn new() -> Option<Self> {
        Isa::Avx2Fma.is_available().then_some(Avx2(()))
    }
}

impl Kernel for Avx2 {
    const FP8_TILE_ROWS: usize = 0;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma")]
        fn inner<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: `self` proves that the machine has the features.
        unsafe { inner(f) }
    }

    fn multiply(self, tile: Tile<'_>, panel: PanelPairs<'_>) {
        let panel = match panel {
            PanelPairs::Bf16(panel) => panel,
            // SAFETY: `self` proves that the machine has the features.
            PanelPairs::F32(panel) => return unsafe { multiply_f32(tile, panel) },
            _ => unreachable!("a kernel without fp8 tiles gets decoded panels"),
        };
        // SAFETY: `self` proves that the machine has the features.
        unsafe {
            // Eight to twelve accumulators hide the latency of their additions and leave registers for the operands.
            match tile.rows {
                1 => multiply::<1, 8>(tile, panel),
                2 => multiply::<2, 4>(tile, panel),
                3 => multiply::<3, 4>(tile, panel),
                4 => multiply::<4, 2>(tile, panel),
                5 => multiply::<5, 2>(tile, panel),
                6 => multiply::<6, 2>(tile, panel),
                rows => unreachable!("a tile of {rows} rows"),
            }
        }
    }

    fn decode_row(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        assert!(words.len() >= codes.len().div_ceil(2));
        // SAFETY: `self` proves that the machine has the features.
        unsafe {
            match kind {
                Fp8Kind::E4M3Fn => decode_row::<false>(kind, codes, words),
                Fp8Kind::E4M3Fnuz => decode_row::<true>(kind, codes, words),
            }
        }
    }

    fn decode_panel(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        assert!(codes.len().is_multiple_of(2 * PANEL) && words.len() == codes.len() / 2);
        // SAFETY: `self` proves that the machine has the features.
        unsafe {
            match kind {
                Fp8Kind::E4M3Fn => decode_panel::<false>(kind, codes, words),
                Fp8Kind::E4M3Fnuz => decode_panel::<true>(kind, codes, words),
            }
        }
    }
}

/// `M` rows by `W` registers of columns at a time, over 128 of K: the rows are widened once for all columns, and that
/// much of a panel, 16 KiB, stays in L1.
#[target_feature(enable = "avx2,fma")]
fn multiply<const M: usize, const W: usize>(tile: Tile<'_>, panel: &[u32]) {
    let Tile { words, pitch, sums, sums_pitch, scales, .. } = tile;
    let pairs = panel.len() / PANEL;
    assert!(M <= TILE_ROWS && words.len() >= (M - 1) * pitch + pairs, "operand rows are complete");
    assert!(sums.len() >= (M - 1) * sums_pitch + PANEL, "rows of sums are complete");
    let sums = sums.as_mut_ptr();
    let mut rows = [[0f32; SCALE_BLOCK]; M];
    for (block, panel) in panel.chunks(BLOCK_PAIRS * PANEL).enumerate() {
        let pairs = panel.len() / PANEL;
        for (i, row) in rows.iter_mut().enumerate() {
            let words = &words[i * pitch + block * BLOCK_PAIRS..][..pairs];
            for (pair, word) in row.as_chunks_mut::<2>().0.iter_mut().zip(words) {
                *pair = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
            }
        }
        for column in (0..PANEL).step_by(W * LANES) {
            let at = |row: usize, i: usize| row * sums_pitch + column + i * LANES;
            // SAFETY: the assertions cover 64 columns of sums in every row, and the panel has 64 words per pair.
            unsafe {
                let load = |row, i| _mm256_loadu_ps(sums.add(at(row, i)));
                let start: Sums<M, W> = match scales {
                    None => std::array::from_fn(|row| std::array::from_fn(|i| load(row, i))),
                    Some(_) => [[_mm256_setzero_ps(); W]; M],
                };
                let products = accumulate(start, &rows, panel.as_ptr().add(column), pairs);
                for (row, products) in products.into_iter().enumerate() {
                    for (i, products) in products.into_iter().enumerate() {
                        let total = match scales {
                            None => products,
                            Some(scales) => {
                                let half = (column + i * LANES) / (PANEL / 2);
                                let scale = _mm256_set1_ps(scales.at(row, block)[half]);
                                // Rounded twice, as in the portable kernel.
                                _mm256_add_ps(load(row, i), _mm256_mul_ps(products, scale))
                            }
                        };
                        _mm256_storeu_ps(sums.add(at(row, i)), total);
                    }
                }
            }
        }
    }
}

/// f32 rows, as many of them and as wide at a time as the registers hold. There are no block scales.
#[target_feature(enable = "avx2,fma")]
fn multiply_f32(tile: Tile<'_>, panel: &[u32]) {
    match tile.rows {
        1 => multiply_f32_rows::<1, 8>(tile, panel),
        2 => multiply_f32_rows::<2, 4>(tile, panel),
        3 => multiply_f32_rows::<3, 4>(tile, panel),
        4 => multiply_f32_rows::<4, 2>(tile, panel),
        5 => multiply_f32_rows::<5, 2>(tile, panel),
        6 => multiply_f32_rows::<6, 2>(tile, panel),
        rows => unreachable!("a tile of {rows} rows"),
    }
}

#[target_feature(enable = "avx2,fma")]
fn multiply_f32_rows<const M: usize, const W: usize>(tile: Tile<'_>, panel: &[u32]) {
    let Tile { words, pitch, sums, sums_pitch, .. } = tile;
    let k = panel.len() / PANEL;
    assert!(words.len() >= (M - 1) * pitch + k, "operand rows are complete");
    assert!(sums.len() >= (M - 1) * sums_pitch + PANEL, "rows of sums are complete");
    let (words, sums) = (words.as_ptr().cast::<f32>(), sums.as_mut_ptr());
    for column in (0..PANEL).step_by(W * LANES) {
        // SAFETY: the assertions cover `k` words and 64 columns of sums in every row, and the panel has 64 words per k.
        unsafe {
            let at = |row: usize, i: usize| sums.add(row * sums_pitch + column + i * LANES);
            let mut total: Sums<M, W> =
                std::array::from_fn(|row| std::array::from_fn(|i| _mm256_loadu_ps(at(row, i))));
            for k in 0..k {
                let line = panel.as_ptr().add(k * PANEL + column).cast::<f32>();
                let columns: [__m256; W] = std::array::from_fn(|i| _mm256_loadu_ps(line.add(i * LANES)));
                for (row, total) in total.iter_mut().enumerate() {
                    let value = _mm256_broadcast_ss(&*words.add(row * pitch + k));
                    for (sum, column) in total.iter_mut().zip(columns) {
                        *sum = _mm256_fmadd_ps(value, column, *sum);
                    }
                }
            }
            for (row, total) in total.into_iter().enumerate() {
                for (i, total) in total.into_iter().enumerate() {
                    _mm256_storeu_ps(at(row, i), total);
                }
            }
        }
    }
}

type Sums<const M: usize, const W: usize> = [[__m256; W]; M];

/// Adds `pairs` pairs to `sums`, in ascending order of K.
///
/// # Safety
/// `panel` is readable for `W` registers from each multiple of 64 words up to `pairs`, and `pairs <= 64`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate<const M: usize, const W: usize>(
    mut sums: Sums<M, W>,
    rows: &[[f32; SCALE_BLOCK]; M],
    panel: *const u32,
    pairs: usize,
) -> Sums<M, W> {
    let odd_half = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    for pair in 0..pairs {
        // SAFETY: `pair < pairs`, which the caller bounds for the panel and for the rows. A prefetch may point anywhere.
        unsafe {
            let line = panel.add(pair * PANEL);
            let columns: [__m256i; W] = std::array::from_fn(|i| {
                let at = line.add(i * LANES);
                if i.is_multiple_of(2) {
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(PREFETCH));
                }
                _mm256_loadu_si256(at.cast())
            });
            let even = columns.map(|words| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)));
            let odd = columns.map(|words| _mm256_castsi256_ps(_mm256_and_si256(words, odd_half)));
            for (parity, columns) in [even, odd].into_iter().enumerate() {
                for (row, sums) in rows.iter().zip(&mut sums) {
                    let value = _mm256_broadcast_ss(row.get_unchecked(2 * pair + parity));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm256_fmadd_ps(value, column, *sum);
                    }
                }
            }
        }
    }
    sums
}

/// What is not a matter of shifting nibbles: the bf16 bytes of the eight codes without exponent.
#[derive(Clone, Copy)]
struct Fp8Table {
    low: __m256i,
    high: __m256i,
}

impl Fp8Table {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(kind: Fp8Kind) -> Self {
        let table = kind.table();
        let mut bytes = [[0u8; 16]; 2];
        for code in 0..8 {
            [bytes[0][code], bytes[1][code]] = table[code].to_le_bytes();
        }
        // SAFETY: sixteen bytes are read.
        let both =
            |bytes: &[u8; 16]| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) };
        Fp8Table { low: both(&bytes[0]), high: both(&bytes[1]) }
    }

    /// The low and high bytes of 32 codes.
    ///
    /// The exponent of bf16 is that of the code plus 120 (FNUZ: 119), and its lowest bit lies in the low byte beside the
    /// mantissa. So the low byte is the low nibble of the code, and the high byte half the exponent, where adding 8 to a
    /// FNUZ code makes up for the odd distance.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn bytes<const FNUZ: bool>(&self, codes: __m256i) -> [__m256i; 2] {
        let (sign, nibble) = (_mm256_set1_epi8(i8::MIN), _mm256_set1_epi8(0x0f));
        let magnitude = _mm256_andnot_si256(sign, codes);
        let (shifted, half_bias) = match FNUZ {
            true => (_mm256_add_epi8(magnitude, _mm256_set1_epi8(8)), _mm256_set1_epi8(59)),
            false => (magnitude, _mm256_set1_epi8(60)),
        };
        let low = _mm256_slli_epi16::<4>(_mm256_and_si256(shifted, nibble));
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(shifted), nibble);
        let high = _mm256_add_epi8(high, half_bias);

        let exponent = _mm256_and_si256(codes, _mm256_set1_epi8(0x78));
        let is_subnormal = _mm256_cmpeq_epi8(exponent, _mm256_setzero_si256());
        let low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(self.low, magnitude), is_subnormal);
        let high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(self.high, magnitude), is_subnormal);

        let is_nan = match FNUZ {
            true => _mm256_cmpeq_epi8(codes, sign),
            false => _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f)),
        };
        let low = _mm256_blendv_epi8(low, _mm256_set1_epi8(0xc0_u8 as i8), is_nan);
        let high = _mm256_blendv_epi8(high, _mm256_set1_epi8(0x7f), is_nan);
        [low, _mm256_or_si256(high, _mm256_and_si256(codes, sign))]
    }
}

#[target_feature(enable = "avx2")]
fn decode_row<const FNUZ: bool>(kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
    let table = Fp8Table::new(kind);
    let (whole, rest) = codes.as_chunks::<32>();
    let (to, rest_words) = words.split_at_mut(whole.len() * 16);
    for (codes, words) in whole.iter().zip(to.as_chunks_mut::<16>().0) {
        // SAFETY: a chunk is a register of codes and two of words.
        unsafe {
            let [low, high] = table.bytes::<FNUZ>(_mm256_loadu_si256(codes.as_ptr().cast()));
            let (even, odd) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            let first = _mm256_permute2x128_si256::<0x20>(even, odd);
            let second = _mm256_permute2x128_si256::<0x31>(even, odd);
            _mm256_storeu_si256(words.as_mut_ptr().cast(), first);
            _mm256_storeu_si256(words[LANES..].as_mut_ptr().cast(), second);
        }
    }
    Portable.decode_row(kind, rest, rest_words);
}

#[target_feature(enable = "avx2")]
fn decode_panel<const FNUZ: bool>(kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
    let table = Fp8Table::new(kind);
    // A line of 64 codes is 32 columns; interleaving its halves gives columns 0..8 and 16..24, 8..16 and 24..32.
    for (codes, words) in codes.as_chunks::<64>().0.iter().zip(words.as_chunks_mut::<32>().0) {
        for (half, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
            // SAFETY: half a line is a register of codes and two of words.
            unsafe {
                let [low, high] = table.bytes::<FNUZ>(_mm256_loadu_si256(codes.as_ptr().cast()));
                let first = words[half * LANES..].as_mut_ptr();
                _mm256_storeu_si256(first.cast(), _mm256_unpacklo_epi8(low, high));
                _mm256_storeu_si256(first.add(16).cast(), _mm256_unpackhi_epi8(low, high));
            }
        }
    }
}
