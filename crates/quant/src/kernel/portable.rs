//! The "scalar" instruction set: plain Rust, which the compiler may still vectorise.

use half::bf16;

use super::Lanes;
use crate::codec::Encoder;

const LANES: usize = 8;

/// Eight f32.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }
}

impl Lanes for Portable {
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn load_f32(src: *const f32) -> Self {
        // SAFETY: the caller passes a pointer to `LANES` readable elements.
        Self(unsafe { *src.cast::<[f32; LANES]>() })
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        // SAFETY: the caller passes a pointer to `LANES` readable elements.
        let narrow = unsafe { *src.cast::<[bf16; LANES]>() };
        // The bits are moved by hand because `bf16::to_f32` treats NaN apart, which here changes nothing.
        Self(narrow.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)))
    }

    #[inline(always)]
    unsafe fn mul(self, factor: f32) -> Self {
        self.map(|x| x * factor)
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        let mut sum = self.0;
        sum.iter_mut().zip(other.0).for_each(|(sum, x)| *sum += x);
        Self(sum)
    }

    #[inline(always)]
    unsafe fn round_to_bf16(self) -> Self {
        self.map(|x| bf16::from_f32(x).to_f32())
    }

    #[inline(always)]
    unsafe fn finite_magnitude(self) -> Self {
        self.map(|x| if x.is_finite() { x.abs() } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        let mut larger = other.0;
        for (larger, x) in larger.iter_mut().zip(self.0) {
            *larger = if x > *larger { x } else { *larger };
        }
        Self(larger)
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        self.0.into_iter().fold(0.0, f32::max)
    }

    #[inline(always)]
    unsafe fn store_f32(self, dst: *mut f32) {
        // SAFETY: the caller passes a pointer to `LANES` writable elements.
        unsafe { *dst.cast::<[f32; LANES]>() = self.0 }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller passes a pointer to `LANES` writable elements.
        unsafe { *dst.cast::<[bf16; LANES]>() = self.0.map(bf16::from_f32) }
    }

    #[inline(always)]
    unsafe fn encode(self, encoder: &Encoder, dst: *mut u8) {
        // SAFETY: the caller passes a pointer to `LANES` writable bytes.
        unsafe { *dst.cast::<[u8; LANES]>() = self.0.map(|x| encoder.encode(x)) }
    }
}
