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

/// Elements of bf16 in a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 32;

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
    /// Fetches the lines of `N` vectors of bf16 from `src` on into the caches, if it can.
    unsafe fn prefetch<const N: usize>(_src: *const bf16) {}
    /// Sum with `other`.
    unsafe fn add(self, other: Self) -> Self;
    /// Rounds to bf16 (nearest, ties to even; NaN stays NaN) and widens again.
    unsafe fn round_to_bf16(self) -> Self;
    /// Magnitudes, with zero in place of NaN and infinity.
    unsafe fn finite_magnitude(self) -> Self;
    /// Larger of the two; neither may hold NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// Largest element; none may be NaN.
    unsafe fn reduce_max(self) -> f32;
    /// Writes `LANES` elements at `dst`, which need not be aligned to more than its type.
    unsafe fn store_f32(self, dst: *mut f32);
    /// Rounds as [`Lanes::round_to_bf16`] and writes `LANES` elements at `dst`.
    unsafe fn store_bf16(self, dst: *mut bf16);
    /// Writes `LANES` codes at `dst`, each equal to [`Encoder::encode`] of its element.
    unsafe fn encode(self, encoder: &Encoder, dst: *mut u8);
}

/// An element type that is quantised from. It is `pub` in a private module, which seals
/// [`Unrounded`](crate::Unrounded).
pub trait Source: Copy {
    const ZERO: Self;
    /// The number in f32, which holds it exactly.
    fn widen(self) -> f32;
    /// # Safety
    /// As the methods of [`Lanes`]; `src` is readable for `V::LANES` elements.
    unsafe fn load<V: Lanes>(src: *const Self) -> V;
}

impl Source for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<V: Lanes>(src: *const Self) -> V {
        // SAFETY: the caller's contract is that of `load_f32`.
        unsafe { V::load_f32(src) }
    }
}

impl Source for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    fn widen(self) -> f32 {
        // By hand, because `bf16::to_f32` treats NaN apart.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
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
        let Self { src, prologue } = self;
        let full = src.chunks_exact(V::LANES);
        let rest = full.remainder();
        // SAFETY: the caller's contract covers the vector methods; `full` yields whole vectors.
        unsafe {
            let mut largest = V::zero();
            for chunk in full {
                largest = largest.max(prologue.apply(S::load::<V>(chunk.as_ptr())).finite_magnitude());
            }
            if !rest.is_empty() {
                largest = largest.max(prologue.apply(load_short::<S, V>(rest)).finite_magnitude());
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
        let Self { src, prologue, encoder, inverse_scale, dst } = self;
        let full = src.chunks_exact(V::LANES);
        let rest = full.remainder();
        let mut full_dst = dst.chunks_exact_mut(V::LANES);
        // SAFETY: the caller's contract covers the vector methods; `full` and `full_dst` yield whole vectors,
        // and `MAX_LANES` codes are enough for one.
        unsafe {
            for (src, dst) in full.zip(full_dst.by_ref()) {
                let x = prologue.apply(S::load::<V>(src.as_ptr()));
                x.mul(inverse_scale).encode(&encoder, dst.as_mut_ptr());
            }
            if !rest.is_empty() {
                let mut codes = [0; MAX_LANES];
                let x = prologue.apply(load_short::<S, V>(rest));
                x.mul(inverse_scale).encode(&encoder, codes.as_mut_ptr());
                full_dst.into_remainder().copy_from_slice(&codes[..rest.len()]);
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

/// Loads the end of a row that is shorter than a vector, with zeros behind it (they change no maximum).
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
unsafe fn load_short<S: Source, V: Lanes>(src: &[S]) -> V {
    let mut full = [S::ZERO; MAX_LANES];
    full[..src.len()].copy_from_slice(src);
    // SAFETY: the buffer has at least as many elements as are read.
    unsafe { S::load(full.as_ptr()) }
}
