//! Quantising one row of activations.

use fused_moe_core::{Fp8Format, Granularity};
use half::bf16;

use crate::codec::{Encoder, decode_table};
use crate::error::{QuantError, check_len, check_scale};
use crate::isa::Isa;
use crate::kernel::{Amax, AsIs, Encode, Groups, Prologue, Source, Weighted};

/// No scale is computed from a smaller largest magnitude, so that an all-zero group has a scale that can be
/// divided by and the codes 0.
pub(crate) const AMAX_FLOOR: f32 = 1e-10;

/// The scale of a group whose largest finite magnitude is `amax`: `max(amax, 1e-10) · (1/max)`, in f32.
pub fn scale_for_amax(format: Fp8Format, amax: f32) -> f32 {
    scale_for_amax_of(format.max(), amax)
}

#[inline(always)]
pub(crate) fn scale_for_amax_of(max: f32, amax: f32) -> f32 {
    let floored = if amax > AMAX_FLOOR { amax } else { AMAX_FLOOR };
    floored * (1.0 / max)
}

/// A number before quantisation: `bf16` or `f32`. Nothing else can implement it.
pub trait Unrounded: Source {}

impl Unrounded for f32 {}
impl Unrounded for bf16 {}

/// Quantises single rows. It is `Copy` and holds no buffers; no method allocates.
#[derive(Clone, Copy, Debug)]
pub struct RowQuantizer {
    format: Fp8Format,
    row_factor: Option<f32>,
    isa: Isa,
}

impl RowQuantizer {
    /// Quantises to `format` with the fastest instruction set.
    pub fn new(format: Fp8Format) -> Self {
        Self { format, row_factor: None, isa: Isa::detect() }
    }

    /// The same with a given instruction set. The results are the same bits.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Quantises `bf16(x · factor)` in place of `x`: the router weight applied on the input.
    ///
    /// The product is rounded to bf16 for f32 rows too, as a model that stored its weighted input would do.
    #[must_use]
    pub fn with_row_factor(mut self, factor: Option<f32>) -> Self {
        self.row_factor = factor;
        self
    }

    /// What rows are quantised to.
    pub fn format(&self) -> Fp8Format {
        self.format
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Largest finite magnitude of `row` (after the row factor), 0 if there is none.
    pub fn amax<T: Unrounded>(&self, row: &[T]) -> f32 {
        match self.row_factor {
            None => self.isa.run(Amax { src: row, prologue: AsIs }),
            Some(w) => self.isa.run(Amax { src: row, prologue: Weighted(w) }),
        }
    }

    /// Quantises `row` with a given scale. `codes` is as long as `row`.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`]; [`QuantError::BadScale`] unless `scale` and `1/scale` are positive and
    /// finite.
    pub fn quantize_scaled<T: Unrounded>(
        &self,
        row: &[T],
        scale: f32,
        codes: &mut [u8],
    ) -> Result<(), QuantError> {
        check_len("codes", row.len(), codes.len())?;
        check_scale(0, scale)?;
        self.encode(row, scale, codes);
        Ok(())
    }

    /// Quantises `row` with one scale, which is returned. `codes` is as long as `row`.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`].
    pub fn quantize_per_token<T: Unrounded>(&self, row: &[T], codes: &mut [u8]) -> Result<f32, QuantError> {
        check_len("codes", row.len(), codes.len())?;
        let scale = scale_for_amax(self.format, self.amax(row));
        self.encode(row, scale, codes);
        Ok(scale)
    }

    /// Quantises `row` with one scale per `group` consecutive elements; the last group may be shorter.
    /// `codes` is as long as `row`, `scales` is `[ceil(row.len() / group)]`.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`]; [`QuantError::UnsupportedGranularity`] unless `granularity` is a group.
    pub fn quantize_per_group<T: Unrounded>(
        &self,
        row: &[T],
        granularity: Granularity,
        codes: &mut [u8],
        scales: &mut [f32],
    ) -> Result<(), QuantError> {
        let Granularity::Group(group) = granularity else {
            return Err(QuantError::UnsupportedGranularity { granularity });
        };
        check_len("codes", row.len(), codes.len())?;
        check_len("scales", row.len().div_ceil(group.get()), scales.len())?;
        self.encode_groups(row, group.get(), codes, f32_bytes_mut(scales));
        Ok(())
    }

    /// Codes of `row / scale`; the lengths agree.
    pub(crate) fn encode<T: Source>(&self, row: &[T], scale: f32, codes: &mut [u8]) {
        match self.row_factor {
            None => self.encode_after(row, AsIs, scale, codes),
            Some(w) => self.encode_after(row, Weighted(w), scale, codes),
        }
    }

    fn encode_after<T: Source, P: Prologue>(&self, src: &[T], prologue: P, scale: f32, dst: &mut [u8]) {
        let encoder = Encoder::new(self.format);
        self.isa.run(Encode { src, prologue, encoder, inverse_scale: 1.0 / scale, dst });
    }

    /// Codes and scale bytes of `row`; the lengths agree.
    pub(crate) fn encode_groups<T: Source>(
        &self,
        row: &[T],
        group: usize,
        codes: &mut [u8],
        scales: &mut [u8],
    ) {
        let encoder = Encoder::new(self.format);
        let (src, dst) = (row, codes);
        match self.row_factor {
            None => self.isa.run(Groups { src, prologue: AsIs, encoder, group, dst, scales }),
            Some(w) => self.isa.run(Groups { src, prologue: Weighted(w), encoder, group, dst, scales }),
        }
    }
}

/// A quantised row of activations, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedRow<'a> {
    /// What the codes mean.
    pub format: Fp8Format,
    /// What the scales belong to.
    pub granularity: Granularity,
    /// `[hidden]`.
    pub codes: &'a [u8],
    /// `[scales_per_token]` of [`Granularity::scales_per_token`].
    pub scales: &'a [f32],
}

impl QuantizedRow<'_> {
    /// `out[i] = decode(codes[i]) · scale`, one f32 multiplication. `out` is `[hidden]`.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`] for the scales and `out`.
    pub fn dequantize(&self, out: &mut [f32]) -> Result<(), QuantError> {
        let hidden = self.codes.len();
        check_len("dequantised elements", hidden, out.len())?;
        check_len("scales", self.granularity.scales_per_token(hidden), self.scales.len())?;
        let group = match self.granularity {
            Granularity::Group(group) => group.get(),
            _ => hidden.max(1),
        };
        let values = decode_table(self.format);
        for ((codes, out), &scale) in self.codes.chunks(group).zip(out.chunks_mut(group)).zip(self.scales) {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = values[usize::from(code)] * scale;
            }
        }
        Ok(())
    }
}

/// The bytes of `scales`.
pub(crate) fn f32_bytes_mut(scales: &mut [f32]) -> &mut [u8] {
    // SAFETY: the bytes are those of the exclusively borrowed slice, and every byte pattern is a valid f32.
    unsafe { std::slice::from_raw_parts_mut(scales.as_mut_ptr().cast(), size_of_val(scales)) }
}
