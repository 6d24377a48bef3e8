//! The AVX-512 kernel: `vdpbf16ps` on tiles of 64 columns, fp8 codes widened by `vpermi2b`.
//!
//! `vdpbf16ps` adds both products of a pair to an f32 lane, rounds to nearest even, and treats
//! subnormal bf16 operands and subnormal results as zero. No fp8 value widens to a subnormal.

mod codes;

use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::Range;

use self::codes::{DoNotKeep, Fp8Lines, Fp8Table, Keep, Widened, decode_fp4, decode_panel, decode_row};
use crate::aligned::LINE;
use crate::kernel::{Ahead, BlockScales, Kernel, Tile};
use crate::panel::{BLOCK_PAIRS, PANEL, PanelPairs};
use crate::{Fp8Kind, Isa};

/// f32 lanes of a register.
const LANES: usize = 16;
/// Registers across a panel.
const WIDE: usize = PANEL / LANES;
/// Most rows whose sums, products and tables of codes fit the registers together.
const ROWS_IN_REGISTERS: usize = 2;

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
                    let (first, pairs) = (words.as_ptr(), words.len() / PANEL);
                    multiply_rows(tile, Bf16Lines { first, pairs });
                }
                PanelPairs::F32(words) => {
                    let (first, pairs) = (words.as_ptr(), words.len() / PANEL);
                    multiply_rows(tile, F32Lines(Bf16Lines { first, pairs }));
                }
                PanelPairs::Fp4(_) => unreachable!("fp4 panels are decoded before they are multiplied"),
                PanelPairs::Fp8 { codes, kind } => multiply_codes(tile, kind, codes, DoNotKeep),
            }
        }
    }

    fn multiply_decoding(self, tile: Tile<'_>, kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
        assert!(codes.len().is_multiple_of(2 * PANEL) && words.len() == codes.len() / 2);
        // SAFETY: `self` proves the features, and the lengths were compared.
        unsafe { multiply_codes(tile, kind, codes, Keep(words.as_mut_ptr())) }
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

    /// `sum + a.0 * b.0 + a.1 * b.1` in every lane.
    ///
    /// # Safety
    /// The machine has the features of [`Avx512`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        dot(sum, a, b)
    }
}

/// Operand words in memory.
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
        // SAFETY: `pair` is inside the run, which holds 64 words per pair.
        unsafe {
            let line = self.first.add(pair * PANEL);
            std::array::from_fn(|i| _mm512_loadu_si512(line.add(i * LANES).cast()))
        }
    }
}

/// f32 values where pairs are: one product to a lane.
#[derive(Clone, Copy)]
struct F32Lines(Bf16Lines);

impl Lines for F32Lines {
    #[inline(always)]
    fn pairs(&self) -> usize {
        self.0.pairs
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn load(&self, pair: usize) -> [__m512i; WIDE] {
        // SAFETY: the contract is the same.
        unsafe { self.0.load(pair) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
    }
}

/// # Safety
/// `widened` has room for the words of `codes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn multiply_codes<W: Widened>(tile: Tile<'_>, kind: Fp8Kind, codes: &[u8], widened: W) {
    let (first, pairs, table) = (codes.as_ptr(), codes.len() / (2 * PANEL), Fp8Table::new(kind));
    match kind {
        Fp8Kind::E4M3Fn => multiply_few(tile, Fp8Lines::<W, false> { first, pairs, table, widened }),
        Fp8Kind::E4M3Fnuz => multiply_few(tile, Fp8Lines::<W, true> { first, pairs, table, widened }),
    }
}

/// Tables and rows share the registers, so there are fewer rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn multiply_few<L: Lines>(tile: Tile<'_>, lines: L) {
    match tile.rows {
        1 => multiply::<1, L>(tile, lines),
        2 => multiply::<2, L>(tile, lines),
        3 => multiply::<3, L>(tile, lines),
        4 => multiply::<4, L>(tile, lines),
        rows => unreachable!("a tile of {rows} rows of codes"),
    }
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
    let (ahead, pairs) = (tile.ahead, lines.pairs());
    match ahead.lines.div_ceil(pairs) {
        0 => multiply_fetching::<M, L>(tile, lines, FetchNothing),
        1 => multiply_fetching::<M, L>(tile, lines, Fetch::<1>::new(ahead, pairs)),
        _ => multiply_fetching::<M, L>(tile, lines, Fetch::<2>::new(ahead, pairs)),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
fn multiply_fetching<const M: usize, L: Lines>(tile: Tile<'_>, lines: L, mut fetch: impl Fetches) {
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
                let total = accumulate(start, (words.as_ptr(), pitch), lines, 0..pairs, fetch);
                for (row, total) in total.into_iter().enumerate() {
                    for (i, total) in total.into_iter().enumerate() {
                        _mm512_storeu_ps(at(row, i), total);
                    }
                }
            }
            Some(scales) if M <= ROWS_IN_REGISTERS => {
                let (words, sums) = ((words.as_ptr(), pitch), (sums, sums_pitch));
                add_blocks::<M, L>(words, lines, sums, (scales, fetch));
            }
            Some(scales) => {
                for (block, from) in (0..pairs).step_by(BLOCK_PAIRS).enumerate() {
                    let run = from..(from + BLOCK_PAIRS).min(pairs);
                    let scales = std::array::from_fn(|row| scales.at(row, block));
                    let (words, sums) = ((words.as_ptr(), pitch), (sums, sums_pitch));
                    add_block::<M, L>(words, lines, run, sums, (scales, fetch));
                    fetch = fetch.after(BLOCK_PAIRS);
                }
            }
        }
    }
}

/// As [`add_block`] for block after block, with the sums in registers meanwhile: a row or two wait for memory as long as
/// they multiply, and everything between two blocks would add to both.
///
/// # Safety
/// `M` rows of words at a pitch are readable up to the end of `lines`, and `M` rows of 64 sums are writable.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn add_blocks<const M: usize, L: Lines>(
    words: (*const u32, usize),
    lines: L,
    (sums, sums_pitch): (*mut f32, usize),
    (scales, mut fetch): (BlockScales<'_>, impl Fetches),
) {
    // SAFETY: the caller promises what is read and written.
    unsafe {
        let at = |row: usize, i: usize| sums.add(row * sums_pitch + i * LANES);
        let mut totals: Sums<M> =
            std::array::from_fn(|row| std::array::from_fn(|i| _mm512_loadu_ps(at(row, i))));
        let pairs = lines.pairs();
        for (block, from) in (0..pairs).step_by(BLOCK_PAIRS).enumerate() {
            let run = from..(from + BLOCK_PAIRS).min(pairs);
            let products = accumulate([[_mm512_setzero_ps(); WIDE]; M], words, lines, run, fetch);
            for (row, (totals, products)) in totals.iter_mut().zip(products).enumerate() {
                let scales = scales.at(row, block).map(|scale| _mm512_set1_ps(scale));
                for (i, (total, products)) in totals.iter_mut().zip(products).enumerate() {
                    *total = _mm512_fmadd_ps(products, scales[i * 2 / WIDE], *total);
                }
            }
            fetch = fetch.after(BLOCK_PAIRS);
        }
        for (row, totals) in totals.into_iter().enumerate() {
            for (i, total) in totals.into_iter().enumerate() {
                _mm512_storeu_ps(at(row, i), total);
            }
        }
    }
}

/// Adds the pairs of `run`, which are one block of scales, times those to the sums in memory. A function of its own, or
/// what belongs to the loop over blocks takes registers from the sums.
///
/// # Safety
/// As [`accumulate`], and `M` rows of 64 sums are writable.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn add_block<const M: usize, L: Lines>(
    words: (*const u32, usize),
    lines: L,
    run: Range<usize>,
    (sums, sums_pitch): (*mut f32, usize),
    (scales, fetch): ([[f32; 2]; M], impl Fetches),
) {
    // SAFETY: the caller promises what is read and written.
    unsafe {
        let zero = [[_mm512_setzero_ps(); WIDE]; M];
        let products = accumulate(zero, words, lines, run, fetch);
        for (row, (products, scales)) in products.into_iter().zip(scales).enumerate() {
            for (i, products) in products.into_iter().enumerate() {
                let at = sums.add(row * sums_pitch + i * LANES);
                let scale = _mm512_set1_ps(scales[i * 2 / WIDE]);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(products, scale, _mm512_loadu_ps(at)));
            }
        }
    }
}

/// What a pair fetches.
trait Fetches: Copy {
    /// Fetches for one pair, and is then what the next one fetches.
    fn fetch(self) -> Self;
    /// What the pair that comes `pairs` pairs later fetches.
    fn after(self, pairs: usize) -> Self;
}

/// The processor fetches by itself, and better than by request if a run is read by one tile only: on a Zen 4, requests
/// 4 KiB ahead cost 5 % of the rate of memory.
#[derive(Clone, Copy)]
struct FetchNothing;

impl Fetches for FetchNothing {
    #[inline(always)]
    fn fetch(self) -> Self {
        self
    }

    #[inline(always)]
    fn after(self, _: usize) -> Self {
        self
    }
}

/// Where the next pair fetches lines of what is ahead, and how far on the pair after it does, at most so many lines.
#[derive(Clone, Copy)]
struct Fetch<const LINES: usize> {
    next: *const i8,
    step: usize,
}

impl<const LINES: usize> Fetch<LINES> {
    fn new(Ahead { first, lines }: Ahead, pairs: usize) -> Self {
        Fetch { next: first.cast(), step: (lines * LINE).div_ceil(pairs).min(LINES * LINE) }
    }
}

impl<const LINES: usize> Fetches for Fetch<LINES> {
    #[inline(always)]
    fn fetch(self) -> Self {
        for line in 0..LINES {
            // SAFETY: every machine with AVX-512 has the instruction, and a prefetch may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.wrapping_add(line * LINE)) };
        }
        self.after(1)
    }

    #[inline(always)]
    fn after(self, pairs: usize) -> Self {
        Fetch { next: self.next.wrapping_add(pairs * self.step), ..self }
    }
}

/// Adds the pairs of `run` to `sums` in ascending order.
///
/// # Safety
/// `M` rows of words at a pitch are readable up to the end of `run`, which is at most `lines.pairs()`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn accumulate<const M: usize, L: Lines>(
    mut sums: Sums<M>,
    (words, pitch): (*const u32, usize),
    lines: L,
    run: Range<usize>,
    mut fetch: impl Fetches,
) -> Sums<M> {
    for pair in run {
        fetch = fetch.fetch();
        // SAFETY: `pair` is inside the run, which the caller bounds for the words and for the lines.
        unsafe {
            let columns = lines.load(pair);
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = _mm512_set1_epi32(words.add(row * pitch + pair).read() as i32);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = L::dot(*sum, word, column);
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

/// As [`spin_products`] with f32 fused multiply-adds.
pub(crate) fn spin_f32_products(_: Avx512, rounds: usize) -> f64 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    fn inner(rounds: usize) {
        let one = _mm512_set1_ps(std::hint::black_box(1.0));
        let mut sums = [_mm512_setzero_ps(); 24];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(one, one, *sum);
            }
        }
        std::hint::black_box(sums);
    }
    // SAFETY: the argument proves that the machine has the features.
    unsafe { inner(rounds) };
    (rounds * 24 * LANES * 2) as f64
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
