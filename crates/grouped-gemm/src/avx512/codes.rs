//! Codes of fp8 and fp4 to operand words of bf16, in registers and in memory.

use std::arch::x86_64::*;

use quant::fp4::VALUES;

use super::{LANES, Lines, WIDE};
use crate::Fp8Kind;
use crate::kernel::Kernel;
use crate::panel::PANEL;

/// What becomes of widened codes beside the products.
pub(super) trait Widened: Copy {
    /// # Safety
    /// The machine has the features of [`Avx512`] and `pair` is inside the run.
    unsafe fn keep(self, pair: usize, words: [__m512i; WIDE]);
}

/// Nothing.
#[derive(Clone, Copy)]
pub(super) struct DoNotKeep;

impl Widened for DoNotKeep {
    #[inline(always)]
    unsafe fn keep(self, _: usize, _: [__m512i; WIDE]) {}
}

/// They are kept for the tiles that follow, 64 words to a pair from here on.
#[derive(Clone, Copy)]
pub(super) struct Keep(pub(super) *mut u32);

impl Widened for Keep {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn keep(self, pair: usize, words: [__m512i; WIDE]) {
        for (i, words) in words.into_iter().enumerate() {
            // SAFETY: there are 64 words for every pair of the run.
            unsafe { _mm512_storeu_si512(self.0.add(pair * PANEL + i * LANES).cast(), words) };
        }
    }
}

/// Codes that are widened in registers.
#[derive(Clone, Copy)]
pub(super) struct Fp8Lines<W, const FNUZ: bool> {
    pub(super) first: *const u8,
    pub(super) pairs: usize,
    pub(super) table: Fp8Table,
    pub(super) widened: W,
}

impl<W: Widened, const FNUZ: bool> Lines for Fp8Lines<W, FNUZ> {
    #[inline(always)]
    fn pairs(&self) -> usize {
        self.pairs
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    unsafe fn load(&self, pair: usize) -> [__m512i; WIDE] {
        // SAFETY: `pair` is inside the run, which holds 128 codes per pair.
        unsafe {
            let line = self.first.add(pair * 2 * PANEL);
            let [a, b] = self.table.interleave::<FNUZ>(_mm512_loadu_si512(line.cast()));
            let [c, d] = self.table.interleave::<FNUZ>(_mm512_loadu_si512(line.add(PANEL).cast()));
            self.widened.keep(pair, [a, b, c, d]);
            [a, b, c, d]
        }
    }
}

/// The low and the high byte of the bf16 value of each of the 128 magnitudes.
#[derive(Clone, Copy)]
pub(super) struct Fp8Table {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

impl Fp8Table {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
    pub(super) fn new(kind: Fp8Kind) -> Self {
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

/// # Safety
/// `words` has at least half as many elements as `codes`, rounded up.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
pub(super) unsafe fn decode_row(kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
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
pub(super) unsafe fn decode_panel<const FNUZ: bool>(kind: Fp8Kind, codes: &[u8], words: &mut [u32]) {
    let table = Fp8Table::new(kind);
    for (line, words) in codes.chunks_exact(2 * PANEL).zip(words.chunks_exact_mut(PANEL)) {
        // SAFETY: a chunk is two registers of codes.
        let line = unsafe {
            let [near, far] = [line.as_ptr(), line[PANEL..].as_ptr()];
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
pub(super) unsafe fn decode_fp4(codes: &[u8], scales: &[f32; PANEL], words: &mut [u32]) {
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
