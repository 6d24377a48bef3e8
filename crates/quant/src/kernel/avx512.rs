//! Sixteen f32 in an AVX-512 register.

use std::arch::x86_64::*;

use half::bf16;

use super::{Job, LINE, Lanes};
use crate::codec::Encoder;

/// Runs `job` with AVX-512 enabled.
///
/// # Safety
/// The CPU has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn run<J: Job>(job: J) -> J::Output {
    // SAFETY: this function's contract.
    unsafe { job.run::<Avx512>() }
}

/// Sixteen f32.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// Every SAFETY below rests on the contract of `Lanes`: AVX-512F is there, and pointers are good for sixteen
// elements.
impl Lanes for Avx512 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: AVX-512F is there.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn load_f32(src: *const f32) -> Self {
        // SAFETY: AVX-512F is there, `src` is readable.
        Self(unsafe { _mm512_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        // SAFETY: AVX-512F is there, `src` is readable for 32 bytes.
        unsafe {
            let narrow = _mm256_loadu_si256(src.cast());
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow))))
        }
    }

    #[inline(always)]
    unsafe fn mul(self, factor: f32) -> Self {
        // SAFETY: AVX-512F is there.
        Self(unsafe { _mm512_mul_ps(self.0, _mm512_set1_ps(factor)) })
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
        // SAFETY: AVX-512F is there.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn round_to_bf16(self) -> Self {
        // SAFETY: AVX-512F is there.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half_step = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_add_epi32(bits, half_step);
            let quiet = _mm512_set1_epi32(0x0040_0000);
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, quiet);
            let upper_half = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            Self(_mm512_castsi512_ps(_mm512_and_si512(chosen, upper_half)))
        }
    }

    #[inline(always)]
    unsafe fn finite_magnitude(self) -> Self {
        // SAFETY: AVX-512F is there.
        unsafe {
            let magnitude = _mm512_abs_ps(self.0);
            let is_finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(magnitude, _mm512_set1_ps(f32::INFINITY));
            Self(_mm512_maskz_mov_ps(is_finite, magnitude))
        }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: AVX-512F is there.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: AVX-512F is there.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn store_f32(self, dst: *mut f32) {
        // SAFETY: AVX-512F is there, `dst` is writable for 64 bytes.
        unsafe { _mm512_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut bf16) {
        // SAFETY: AVX-512F is there, `dst` is writable for 32 bytes.
        unsafe {
            let upper = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.round_to_bf16().0));
            _mm256_storeu_si256(dst.cast(), _mm512_cvtepi32_epi16(upper));
        }
    }

    #[inline(always)]
    unsafe fn encode(self, encoder: &Encoder, dst: *mut u8) {
        // SAFETY: AVX-512F is there, `dst` is writable for 16 bytes. The steps are those of `Encoder::encode`.
        unsafe {
            let splat = |bits: u32| _mm512_set1_epi32(bits as i32);
            // The second operand is the result if one is NaN.
            let clamped = _mm512_min_ps(_mm512_abs_ps(self.0), _mm512_set1_ps(encoder.max));
            let raw_exponent = _mm512_and_si512(_mm512_castps_si512(clamped), splat(0x7f80_0000));
            let exponent = _mm512_max_epi32(raw_exponent, splat(encoder.min_normal));
            let magic = _mm512_add_epi32(exponent, splat(encoder.step));
            let sum = _mm512_castps_si512(_mm512_add_ps(clamped, _mm512_castsi512_ps(magic)));
            let binade = _mm512_srli_epi32::<20>(_mm512_sub_epi32(exponent, splat(encoder.min_normal)));
            let code = _mm512_add_epi32(_mm512_sub_epi32(sum, magic), binade);
            let sign_bit = _mm512_srli_epi32::<24>(_mm512_castps_si512(self.0));
            let sign = _mm512_and_si512(sign_bit, splat(0x80));
            let takes_sign = _mm512_cmpneq_epi32_mask(code, splat(encoder.signless));
            let signed = _mm512_mask_or_epi32(code, takes_sign, code, sign);
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let codes = _mm512_mask_mov_epi32(signed, is_nan, splat(encoder.nan));
            _mm_storeu_si128(dst.cast(), _mm512_cvtepi32_epi8(codes));
        }
    }
}
