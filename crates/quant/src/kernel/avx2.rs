//! Eight f32 in an AVX2 register.

use std::arch::x86_64::*;

use half::bf16;

use super::{Job, LINE, Lanes};
use crate::codec::Encoder;

/// Runs `job` with AVX2 enabled.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn run<J: Job>(job: J) -> J::Output {
    // SAFETY: this function's contract.
    unsafe { job.run::<Avx2>() }
}

/// Eight f32.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

// Every SAFETY below rests on the contract of `Lanes`: AVX2 is there, and pointers are good for eight elements.
impl Lanes for Avx2 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: AVX2 is there.
        Self(unsafe { _mm256_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load_f32(src: *const f32) -> Self {
        // SAFETY: AVX2 is there, `src` is readable.
        Self(unsafe { _mm256_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        // SAFETY: AVX2 is there, `src` is readable for 16 bytes.
        unsafe {
            let narrow = _mm_loadu_si128(src.cast());
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow))))
        }
    }

    #[inline(always)]
    unsafe fn mul(self, factor: f32) -> Self {
        // SAFETY: AVX2 is there.
        Self(unsafe { _mm256_mul_ps(self.0, _mm256_set1_ps(factor)) })
    }

    #[inline(always)]
    unsafe fn prefetch<const N: usize>(src: *const bf16) {
        for line in (0..N * Self::LANES).step_by(LINE) {
            // SAFETY: a prefetch touches no memory that the program sees.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(src.add(line).cast()) };
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX2 is there.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn round_to_bf16(self) -> Self {
        // SAFETY: AVX2 is there.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half_step = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_add_epi32(bits, half_step);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
            let upper_half = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            Self(_mm256_castsi256_ps(_mm256_and_si256(chosen, upper_half)))
        }
    }

    #[inline(always)]
    unsafe fn finite_magnitude(self) -> Self {
        // SAFETY: AVX2 is there.
        unsafe {
            let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0);
            let is_finite = _mm256_cmp_ps::<_CMP_LT_OQ>(magnitude, _mm256_set1_ps(f32::INFINITY));
            Self(_mm256_and_ps(magnitude, is_finite))
        }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: AVX2 is there.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: AVX2 is there.
        unsafe {
            let quarter = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
            _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)))
        }
    }

    #[inline(always)]
    unsafe fn store_f32(self, dst: *mut f32) {
        // SAFETY: AVX2 is there, `dst` is writable for 32 bytes.
        unsafe { _mm256_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut bf16) {
        // SAFETY: AVX2 is there, `dst` is writable for 16 bytes.
        unsafe {
            let upper = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.round_to_bf16().0));
            let halves = (_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            _mm_storeu_si128(dst.cast(), _mm_packus_epi32(halves.0, halves.1));
        }
    }

    #[inline(always)]
    unsafe fn encode(self, encoder: &Encoder, dst: *mut u8) {
        // SAFETY: AVX2 is there, `dst` is writable for 8 bytes. The steps are those of `Encoder::encode`.
        unsafe {
            let splat = |bits: u32| _mm256_set1_epi32(bits as i32);
            let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0);
            // The second operand is the result if one is NaN.
            let clamped = _mm256_min_ps(magnitude, _mm256_set1_ps(encoder.max));
            let raw_exponent = _mm256_and_si256(_mm256_castps_si256(clamped), splat(0x7f80_0000));
            let exponent = _mm256_max_epi32(raw_exponent, splat(encoder.min_normal));
            let magic = _mm256_add_epi32(exponent, splat(encoder.step));
            let sum = _mm256_castps_si256(_mm256_add_ps(clamped, _mm256_castsi256_ps(magic)));
            let binade = _mm256_srli_epi32::<20>(_mm256_sub_epi32(exponent, splat(encoder.min_normal)));
            let code = _mm256_add_epi32(_mm256_sub_epi32(sum, magic), binade);
            let sign_bit = _mm256_srli_epi32::<24>(_mm256_castps_si256(self.0));
            let sign = _mm256_and_si256(sign_bit, splat(0x80));
            let is_signless = _mm256_cmpeq_epi32(code, splat(encoder.signless));
            let signed = _mm256_or_si256(code, _mm256_andnot_si256(is_signless, sign));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let codes = _mm256_blendv_epi8(signed, splat(encoder.nan), is_nan);
            let words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
            _mm_storel_epi64(dst.cast(), _mm_packus_epi16(words, words));
        }
    }
}
