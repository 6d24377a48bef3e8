//! The AVX-512 kernel: `vdpbf16ps` on tiles of 64 columns, fp8 codes widened by `vpermi2b`.
//!
//! `vdpbf16ps` adds both products of a pair to an f32 lane, rounds to nearest even, and treats
//! subnormal bf16 operands and subnormal results as zero. No fp8 value widens to a subnormal.

use std::arch::x86_64::*;
use std::mem::transmute;

use quant::fp4::VALUES;

use crate::kernel::{Kernel, Tile};
use crate::panel::{BLOCK_PAIRS, PANEL, PanelPairs};
use crate::{Fp8Kind, Isa};

/// f32 lanes of a register.
const LANES: usize = 16;
/// Registers across a panel.
const WIDE: usize = PANEL / LANES;
/// Bytes that are fetched ahead of the pair in use: far enough for DRAM latency at one row.
const PREFETCH: usize = 4096;

/// Proof that the machine has the instruction set; made by [`new`](Self::new) only.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn new() -> Option<Self> {
        Isa::Avx512Bf16.is_available().then_some(Avx512(()))
    }
}

impl Kernel for Avx512 {
    const FP8_TILE_ROWS: usize = 4;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
        fn inner<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: `self` proves that the machine has the features.
        unsafe { inner(f) }
    }

    fn multiply(self, tile: Tile<'_>, panel: PanelPairs<'_>) {
        // SAFETY: `self` proves that the machine has the features.
        unsafe {
            match panel {
                PanelPairs::Bf16(words) => {
                    multiply_rows(tile, Bf16Lines { first: words.as_ptr(), pairs: words.len() / PANEL })
                }
                PanelPairs::Fp4(_) => unreachable!("fp4 panels are decoded before they are multiplied"),
                PanelPairs::Fp8 { codes, kind } => {
                    let pairs = codes.len() / (2 * PANEL);
                    let table = Fp8Table::new(kind);
                    match kind {
                        Fp8Kind::E4M3Fn => {
                            multiply_rows(tile, Fp8Lines::<false> { first: codes.as_ptr(), pairs, table })
                        }
                        Fp8Kind::E4M3Fnuz => {
                            multiply_rows(tile, Fp8Lines::<true> { first: codes.as_ptr(), pairs, table })
                        }
                    }
                }
            }
        }
    }

    fn decode_row(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        assert!(words.len() >= codes.len().div_ceil(2));
        // SAFETY: `self` proves the features, and the words cover the codes.
        unsafe { decode_row(kind, codes, words) }
    }

    fn decode_panel(self, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        assert!(codes.len().is_multiple_of(2 * PANEL) && words.len() == codes.len() / 2);
        // SAFETY: `self` proves the features, and the lengths were compared.
        unsafe {
            match kind {
                Fp8Kind::E4M3Fn => decode_panel::<false>(kind, codes, words),
                Fp8Kind::E4M3Fnuz => decode_panel::<true>(kind, codes, words),
            }
        }
    }

    fn decode_fp4(self, codes: &[u8], scales: &[f32; PANEL], words: &mut [u32]) {
        assert!(codes.len().is_multiple_of(PANEL) && words.len() == codes.len());
        // SAFETY: `self` proves the features, and the lengths were compared.
        unsafe { decode_fp4(codes, scales, words) }
    }
}

/// A run of K pairs of a panel, read as four registers of operand words at a time.
trait Lines: Copy {
    fn pairs(&self) -> usize;
    /// # Safety
    /// The machine has the features of [`Avx512`] and `pair < self.pairs()`.
    unsafe fn load(&self, pair: usize) -> [__m512i; WIDE];
}

#[derive(Clone, Copy)]
struct Bf16Lines {
    first: *const u32,
    pairs: usize,
}

impl Lines for Bf16Lines {
    #[inline(always)]
    fn pairs(&self) -> usize {
        self.pairs
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn load(&self, pair: usize) -> [__m512i; WIDE] {
        // SAFETY: `pair` is inside the run, which holds 64 words per pair. A prefetch may point anywhere.
        unsafe {
            let line = self.first.add(pair * PANEL);
            std::array::from_fn(|i| {
                let at = line.add(i * LANES);
                _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(PREFETCH));
                _mm512_loadu_si512(at.cast())
            })
        }
    }
}

#[derive(Clone, Copy)]
struct Fp8Lines<const FNUZ: bool> {
    first: *const u8,
    pairs: usize,
    table: Fp8Table,
}

impl<const FNUZ: bool> Lines for Fp8Lines<FNUZ> {
    #[inline(always)]
    fn pairs(&self) -> usize {
        self.pairs
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn load(&self, pair: usize) -> [__m512i; WIDE] {
        // SAFETY: `pair` is inside the run, which holds 128 codes per pair. A prefetch may point anywhere.
        unsafe {
            let line = self.first.add(pair * 2 * PANEL);
            _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH));
            _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH + PANEL));
            let [a, b] = self.table.interleave::<FNUZ>(_mm512_loadu_si512(line.cast()));
            let [c, d] = self.table.interleave::<FNUZ>(_mm512_loadu_si512(line.add(PANEL).cast()));
            [a, b, c, d]
        }
    }
}

/// The low and the high byte of the bf16 value of each of the 128 magnitudes.
#[derive(Clone, Copy)]
struct Fp8Table {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

impl Fp8Table {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    fn new(kind: Fp8Kind) -> Self {
        static FN: [[u8; 128]; 2] = magnitude_bytes(Fp8Kind::E4M3Fn.table());
        static FNUZ: [[u8; 128]; 2] = magnitude_bytes(Fp8Kind::E4M3Fnuz.table());
        let [low, high] = match kind {
            Fp8Kind::E4M3Fn => &FN,
            Fp8Kind::E4M3Fnuz => &FNUZ,
        };
        // SAFETY: both halves of 128 bytes are read.
        let halves = |bytes: &[u8; 128]| unsafe {
            [_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bytes.as_ptr().add(64).cast())]
        };
        Fp8Table { low: halves(low), high: halves(high) }
    }

    /// The low and high bytes of 64 codes. FNUZ has its only NaN where the sign alone is set.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    fn bytes<const FNUZ: bool>(&self, codes: __m512i) -> [__m512i; 2] {
        let sign = _mm512_set1_epi8(i8::MIN);
        let low = _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
        // Truth table of `high | (codes & sign)`.
        let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, sign);
        if !FNUZ {
            return [low, high];
        }
        let nan = _mm512_cmpeq_epi8_mask(codes, sign);
        let bytes = |value: u8| _mm512_set1_epi8(value as i8);
        [_mm512_mask_mov_epi8(low, nan, bytes(0xc0)), _mm512_mask_mov_epi8(high, nan, bytes(0x7f))]
    }

    /// 64 codes in panel order as two registers of operand words.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    fn interleave<const FNUZ: bool>(&self, codes: __m512i) -> [__m512i; 2] {
        let [low, high] = self.bytes::<FNUZ>(codes);
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

const fn magnitude_bytes(table: &[u16; 256]) -> [[u8; 128]; 2] {
    let mut bytes = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        [bytes[0][code], bytes[1][code]] = table[code].to_le_bytes();
        code += 1;
    }
    bytes
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn multiply_rows<L: Lines>(tile: Tile<'_>, lines: L) {
    match tile.rows {
        1 => multiply::<1, L>(tile, lines),
        2 => multiply::<2, L>(tile, lines),
        3 => multiply::<3, L>(tile, lines),
        4 => multiply::<4, L>(tile, lines),
        5 => multiply::<5, L>(tile, lines),
        6 => multiply::<6, L>(tile, lines),
        rows => unreachable!("a tile of {rows} rows"),
    }
}

type Sums<const M: usize> = [[__m512; WIDE]; M];

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn multiply<const M: usize, L: Lines>(tile: Tile<'_>, lines: L) {
    let pairs = lines.pairs();
    let Tile { words, pitch, sums, sums_pitch, scales, .. } = tile;
    assert!(words.len() >= (M - 1) * pitch + pairs, "operand rows are complete");
    assert!(sums.len() >= (M - 1) * sums_pitch + PANEL, "rows of sums are complete");
    let sums = sums.as_mut_ptr();
    // SAFETY: the assertions cover every row of words up to `pairs` and of sums up to 64 columns.
    unsafe {
        let at = |row: usize, i: usize| sums.add(row * sums_pitch + i * LANES);
        match scales {
            None => {
                let start: Sums<M> =
                    std::array::from_fn(|row| std::array::from_fn(|i| _mm512_loadu_ps(at(row, i))));
                let total = accumulate(start, words.as_ptr(), pitch, lines, 0, pairs);
                for (row, total) in total.into_iter().enumerate() {
                    for (i, total) in total.into_iter().enumerate() {
                        _mm512_storeu_ps(at(row, i), total);
                    }
                }
            }
            Some(scales) => {
                for (block, from) in (0..pairs).step_by(BLOCK_PAIRS).enumerate() {
                    let to = (from + BLOCK_PAIRS).min(pairs);
                    let zero = [[_mm512_setzero_ps(); WIDE]; M];
                    let products = accumulate(zero, words.as_ptr(), pitch, lines, from, to);
                    for (row, products) in products.into_iter().enumerate() {
                        let scale = scales.at(row, block).map(|scale| _mm512_set1_ps(scale));
                        for (i, products) in products.into_iter().enumerate() {
                            let sum = _mm512_loadu_ps(at(row, i));
                            _mm512_storeu_ps(at(row, i), _mm512_fmadd_ps(products, scale[i * 2 / WIDE], sum));
                        }
                    }
                }
            }
        }
    }
}

/// Adds pairs `from..to` to `sums` in ascending order.
///
/// # Safety
/// `M` rows of `words` at `pitch` are readable up to `to`, and `to <= lines.pairs()`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn accumulate<const M: usize, L: Lines>(
    mut sums: Sums<M>,
    words: *const u32,
    pitch: usize,
    lines: L,
    from: usize,
    to: usize,
) -> Sums<M> {
    for pair in from..to {
        // SAFETY: `pair < to`, which the caller bounds for the words and for the lines.
        unsafe {
            let columns = lines.load(pair);
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = _mm512_set1_epi32(words.add(row * pitch + pair).read() as i32);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = dot(*sum, word, column);
                }
            }
        }
    }
    sums
}

/// `sum + a.0 * b.0 + a.1 * b.1` in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both types are 64 bytes of plain bits.
    let (a, b) = unsafe { (transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) };
    _mm512_dpbf16_ps(sum, a, b)
}

/// # Safety
/// `words` has at least half as many elements as `codes`, rounded up.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn decode_row(kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
    let table = Fp8Table::new(kind);
    let (whole, rest) = codes.as_chunks::<64>();
    let widen = |codes: __m512i| {
        let [low, high] = match kind {
            Fp8Kind::E4M3Fn => table.bytes::<false>(codes),
            Fp8Kind::E4M3Fnuz => table.bytes::<true>(codes),
        };
        let join = |low: __m256i, high: __m256i| {
            let high = _mm512_slli_epi16::<8>(_mm512_cvtepu8_epi16(high));
            _mm512_or_si512(_mm512_cvtepu8_epi16(low), high)
        };
        [
            join(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high)),
            join(_mm512_extracti64x4_epi64::<1>(low), _mm512_extracti64x4_epi64::<1>(high)),
        ]
    };
    for (codes, words) in whole.iter().zip(words.chunks_exact_mut(32)) {
        // SAFETY: a chunk is 64 codes and 32 words.
        unsafe {
            let [first, second] = widen(_mm512_loadu_si512(codes.as_ptr().cast()));
            _mm512_storeu_si512(words.as_mut_ptr().cast(), first);
            _mm512_storeu_si512(words[16..].as_mut_ptr().cast(), second);
        }
    }
    crate::portable::Portable.decode_row(kind, rest, &mut words[whole.len() * 32..]);
}

/// # Safety
/// `codes` is whole pairs of 128 codes, and `words` has half as many elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn decode_panel<const FNUZ: bool>(kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
    let table = Fp8Table::new(kind);
    for (line, words) in codes.chunks_exact(2 * PANEL).zip(words.chunks_exact_mut(PANEL)) {
        // SAFETY: a chunk is two registers of codes. A prefetch may point anywhere.
        let line = unsafe {
            let [near, far] = [line.as_ptr(), line[PANEL..].as_ptr()];
            // The next run is fetched now, to arrive while the tiles of this one are multiplied.
            _mm_prefetch::<_MM_HINT_T1>(near.wrapping_add(codes.len()).cast());
            _mm_prefetch::<_MM_HINT_T1>(far.wrapping_add(codes.len()).cast());
            let [a, b] = table.interleave::<FNUZ>(_mm512_loadu_si512(near.cast()));
            let [c, d] = table.interleave::<FNUZ>(_mm512_loadu_si512(far.cast()));
            [a, b, c, d]
        };
        for (words, line) in words.chunks_exact_mut(LANES).zip(line) {
            // SAFETY: a chunk is one register of words.
            unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), line) };
        }
    }
}

/// # Safety
/// `codes` is whole pairs of 64 bytes, and `words` has as many elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn decode_fp4(codes: &[u8], scales: &[f32; PANEL], words: &mut [u32]) {
    // SAFETY: the table has sixteen values, the scales are four registers.
    let (values, scales): (_, [_; WIDE]) = unsafe {
        let scale = |i: usize| _mm512_loadu_ps(scales[i * LANES..].as_ptr());
        (_mm512_loadu_ps(VALUES.as_ptr()), std::array::from_fn(scale))
    };
    for (codes, words) in codes.chunks_exact(PANEL).zip(words.chunks_exact_mut(PANEL)) {
        for (i, &scale) in scales.iter().enumerate() {
            let (codes, words) = (&codes[i * LANES..][..LANES], &mut words[i * LANES..][..LANES]);
            // SAFETY: sixteen bytes are read and sixteen words written.
            unsafe {
                let pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                // A look-up reads the low four bits of its index only.
                let even = _mm512_mul_ps(_mm512_permutexvar_ps(pairs, values), scale);
                let odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(pairs), values), scale);
                let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
                let word = _mm512_or_si512(even, _mm512_castps_si512(odd));
                _mm512_storeu_si512(words.as_mut_ptr().cast(), word);
            }
        }
    }
}

/// Runs `rounds` rounds of 24 independent `vdpbf16ps` and returns the floating-point operations done.
pub(crate) fn spin_products(_: Avx512, rounds: usize) -> f64 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    fn inner(rounds: usize) {
        let one = _mm512_set1_epi32(std::hint::black_box(0x3f80_3f80));
        let mut sums = [_mm512_setzero_ps(); 24];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = dot(*sum, one, one);
            }
        }
        std::hint::black_box(sums);
    }
    // SAFETY: the argument proves that the machine has the features.
    unsafe { inner(rounds) };
    (rounds * 24 * LANES * 4) as f64
}
