//! The algorithms, once, over vectors of f32 whose width and instructions are those of an [`Isa`](crate::Isa).
//!
//! The same operations are applied to every element whatever the width, and the maximum of finite magnitudes
//! does not depend on the order, so all widths give the same bits. Nothing here multiplies and adds in one
//! instruction.

use half::bf16;

use crate::codec::Encoder;
use crate::row::scale_for_amax_of;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

/// No vector is wider than this.
const MAX_LANES: usize = 16;

/// A vector of f32.
///
/// # Safety
/// Every method requires that the CPU has the instruction set of the implementing type. Methods are inlined
/// into the `run` function of their module, which enables it.
pub trait Lanes: Copy {
    /// Number of elements, at most [`MAX_LANES`].
    const LANES: usize;

    /// All zero.
    unsafe fn zero() -> Self;
    /// Reads `LANES` elements at `src`, which need not be aligned to more than f32.
    unsafe fn load_f32(src: *const f32) -> Self;
    /// Reads and widens `LANES` elements at `src`.
    unsafe fn load_bf16(src: *const bf16) -> Self;
    /// Product with `factor`.
    unsafe fn mul(self, factor: f32) -> Self;
    /// Rounds to bf16 (nearest, ties to even; NaN stays NaN) and widens again.
    unsafe fn round_to_bf16(self) -> Self;
    /// Magnitudes, with zero in place of NaN and infinity.
    unsafe fn finite_magnitude(self) -> Self;
    /// Larger of the two; neither may hold NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// Largest element; none may be NaN.
    unsafe fn reduce_max(self) -> f32;
    /// Writes `LANES` codes at `dst`, each equal to [`Encoder::encode`] of its element.
    unsafe fn encode(self, encoder: &Encoder, dst: *mut u8);
}

/// An element type that is quantised from. It is `pub` in a private module, which seals
/// [`Unrounded`](crate::Unrounded).
pub trait Source: Copy {
    const ZERO: Self;
    /// # Safety
    /// As the methods of [`Lanes`]; `src` is readable for `V::LANES` elements.
    unsafe fn load<V: Lanes>(src: *const Self) -> V;
}

impl Source for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<V: Lanes>(src: *const Self) -> V {
        // SAFETY: the caller's contract is that of `load_f32`.
        unsafe { V::load_f32(src) }
    }
}

impl Source for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<V: Lanes>(src: *const Self) -> V {
        // SAFETY: the caller's contract is that of `load_bf16`.
        unsafe { V::load_bf16(src) }
    }
}

/// What happens to an element between memory and quantisation.
pub(crate) trait Prologue: Copy {
    /// # Safety
    /// As the methods of [`Lanes`].
    unsafe fn apply<V: Lanes>(self, x: V) -> V;
}

/// Nothing happens.
#[derive(Clone, Copy)]
pub(crate) struct AsIs;

/// The element is multiplied by the router weight and rounded to bf16, as a model would store it.
#[derive(Clone, Copy)]
pub(crate) struct Weighted(pub(crate) f32);

impl Prologue for AsIs {
    #[inline(always)]
    unsafe fn apply<V: Lanes>(self, x: V) -> V {
        x
    }
}

impl Prologue for Weighted {
    #[inline(always)]
    unsafe fn apply<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller's contract is that of the two methods.
        unsafe { x.mul(self.0).round_to_bf16() }
    }
}

/// Work that is written once for all vectors.
pub(crate) trait Job {
    type Output;
    /// # Safety
    /// As the methods of [`Lanes`]. Implementations are `#[inline(always)]`.
    unsafe fn run<V: Lanes>(self) -> Self::Output;
}

/// Largest finite magnitude of `src`, 0 if there is none.
pub(crate) struct Amax<'a, S, P> {
    pub(crate) src: &'a [S],
    pub(crate) prologue: P,
}

impl<S: Source, P: Prologue> Job for Amax<'_, S, P> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> f32 {
        // SAFETY: the caller's contract covers the vector methods, and `load_at_most` stays inside its slice.
        unsafe {
            let mut largest = V::zero();
            for chunk in self.src.chunks(V::LANES) {
                let x = self.prologue.apply(load_at_most::<S, V>(chunk));
                largest = largest.max(x.finite_magnitude());
            }
            largest.reduce_max()
        }
    }
}

/// Codes of `src · inverse_scale`. `dst` is as long as `src`.
pub(crate) struct Encode<'a, S, P> {
    pub(crate) src: &'a [S],
    pub(crate) prologue: P,
    pub(crate) encoder: Encoder,
    pub(crate) inverse_scale: f32,
    pub(crate) dst: &'a mut [u8],
}

impl<S: Source, P: Prologue> Job for Encode<'_, S, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for (src, dst) in self.src.chunks(V::LANES).zip(self.dst.chunks_mut(V::LANES)) {
            // SAFETY: the caller's contract covers the vector methods; loads and stores stay inside `src` and
            // `dst`, a short last chunk of either goes through a full-width buffer.
            unsafe {
                let x = self.prologue.apply(load_at_most::<S, V>(src)).mul(self.inverse_scale);
                if dst.len() == V::LANES {
                    x.encode(&self.encoder, dst.as_mut_ptr());
                } else {
                    let mut full = [0; MAX_LANES];
                    x.encode(&self.encoder, full.as_mut_ptr());
                    dst.copy_from_slice(&full[..dst.len()]);
                }
            }
        }
    }
}

/// Codes and scales of `src` in groups of `group` elements. `dst` is as long as `src`; `scales` holds the bytes
/// of one f32 per group and need not be aligned.
pub(crate) struct Groups<'a, S, P> {
    pub(crate) src: &'a [S],
    pub(crate) prologue: P,
    pub(crate) encoder: Encoder,
    pub(crate) group: usize,
    pub(crate) dst: &'a mut [u8],
    pub(crate) scales: &'a mut [u8],
}

impl<S: Source, P: Prologue> Job for Groups<'_, S, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { src, prologue, encoder, group, dst, scales } = self;
        let (stored_scales, _) = scales.as_chunks_mut::<4>();
        for ((src, dst), stored) in src.chunks(group).zip(dst.chunks_mut(group)).zip(stored_scales) {
            // SAFETY: the caller's contract is that of the two jobs.
            unsafe {
                let scale = scale_for_amax_of(encoder.max, Amax { src, prologue }.run::<V>());
                *stored = scale.to_ne_bytes();
                Encode { src, prologue, encoder, inverse_scale: 1.0 / scale, dst }.run::<V>();
            }
        }
    }
}

/// Loads a full vector, or a shorter end of a row with zeros behind it (zeros change no maximum).
///
/// # Safety
/// As the methods of [`Lanes`]; `src` is not longer than `V::LANES`.
#[inline(always)]
unsafe fn load_at_most<S: Source, V: Lanes>(src: &[S]) -> V {
    if src.len() == V::LANES {
        // SAFETY: the slice has exactly as many elements as are read.
        unsafe { S::load(src.as_ptr()) }
    } else {
        let mut full = [S::ZERO; MAX_LANES];
        full[..src.len()].copy_from_slice(src);
        // SAFETY: the buffer has at least as many elements as are read.
        unsafe { S::load(full.as_ptr()) }
    }
}
