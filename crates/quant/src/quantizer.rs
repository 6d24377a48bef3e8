//! The closed set of activation quantisers, and their use row by row.

use std::num::NonZeroUsize;

use enum_dispatch::enum_dispatch;
use fused_moe_core::{
    DType, Fp8Format, Granularity, QuantScheme, ScaleLayout, ScaleOrder, ScaleSource, TensorView, WireFormat,
};
use half::bf16;

use crate::error::{QuantError, check_len, check_scale};
use crate::isa::Isa;
use crate::row::{RowQuantizer, Unrounded, f32_bytes_mut, scale_for_amax};

/// Activations of one call on one rank.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    /// `[tokens, hidden]`, bf16 or f32, on the host; rows are contiguous and may have gaps between them.
    pub hidden: TensorView<'a>,
    /// `[tokens]`: what is quantised is `bf16(x · factor)`. The tensor itself is never changed.
    pub row_factor: Option<&'a [f32]>,
    /// The scale of the layer, for quantisers with a static scale; others do not read it.
    pub static_scale: Option<f32>,
}

impl<'a> Activations<'a> {
    /// `hidden` as it is.
    pub fn of(hidden: TensorView<'a>) -> Self {
        Self { hidden, row_factor: None, static_scale: None }
    }

    /// The same, weighted row by row.
    #[must_use]
    pub fn weighted(mut self, row_factor: &'a [f32]) -> Self {
        self.row_factor = Some(row_factor);
        self
    }

    /// The same with the static scale of the layer.
    #[must_use]
    pub fn scaled(mut self, static_scale: Option<f32>) -> Self {
        self.static_scale = static_scale;
        self
    }

    fn dims(&self) -> Result<(usize, usize), QuantError> {
        let &[tokens, hidden] = self.hidden.dims() else {
            return Err(QuantError::NotMatrix { dims: self.hidden.dims().to_vec() });
        };
        let found = self.hidden.dtype();
        if !matches!(found, DType::Bf16 | DType::F32) {
            return Err(QuantError::InputDType { found });
        }
        if let Some(factors) = self.row_factor {
            check_len("row factors", tokens, factors.len())?;
        }
        Ok((tokens, hidden))
    }

    fn row(&self, row: usize) -> Result<Row<'a>, QuantError> {
        let elements = match self.hidden.dtype() {
            DType::Bf16 => Elements::Bf16(self.hidden.row(row)?),
            DType::F32 => Elements::F32(self.hidden.row(row)?),
            found => return Err(QuantError::InputDType { found }),
        };
        Ok(Row { elements, factor: self.row_factor.map(|factors| factors[row]) })
    }
}

#[derive(Clone, Copy)]
enum Elements<'a> {
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
}

/// One row of [`Activations`].
#[derive(Clone, Copy)]
struct Row<'a> {
    elements: Elements<'a>,
    factor: Option<f32>,
}

/// Where a row goes; the lengths are right.
struct RowOut<'a> {
    payload: &'a mut [u8],
    scales: &'a mut [u8],
}

/// What the variants of [`Quantizer`] have in common.
#[enum_dispatch]
trait WriteRow {
    /// See [`Quantizer::wire`].
    fn wire(&self) -> WireFormat;
    /// The scale that all rows of the call share; 1 for quantisers without one.
    fn tensor_scale(&self, activations: &Activations<'_>) -> Result<f32, QuantError>;
    /// Writes one row. `tensor_scale` is this quantiser's own answer for the call.
    fn write(&self, row: Row<'_>, tensor_scale: f32, out: RowOut<'_>);
}

/// A quantiser of activations.
///
/// The set is closed: a kernel can only be written for the granularities that are here. Callers use the
/// methods of this type and need not look inside.
#[enum_dispatch(WriteRow)]
#[derive(Clone, Copy, Debug)]
pub enum Quantizer {
    /// No quantisation: rows in bf16.
    Unquantized,
    /// One scale for all rows of a call.
    PerTensor,
    /// One scale per row (PTPC).
    PerToken,
    /// One scale per group of consecutive elements of a row (1x128).
    PerGroup,
}

/// Writes rows in bf16. A bf16 row is copied, an f32 row is rounded once.
#[derive(Clone, Copy, Debug)]
pub struct Unquantized;

/// One scale for all rows of a call, from their largest magnitude, or that of the layer.
#[derive(Clone, Copy, Debug)]
pub struct PerTensor {
    rows: RowQuantizer,
    source: ScaleSource,
}

/// One scale per row.
#[derive(Clone, Copy, Debug)]
pub struct PerToken {
    rows: RowQuantizer,
}

/// One scale per group of consecutive elements of a row; the last group may be shorter.
#[derive(Clone, Copy, Debug)]
pub struct PerGroup {
    rows: RowQuantizer,
    group: NonZeroUsize,
}

impl Quantizer {
    /// The quantiser of the activations of `scheme`, with the fastest instruction set.
    pub fn for_scheme(scheme: QuantScheme) -> Self {
        Self::for_scheme_with(Isa::detect(), scheme)
    }

    /// The same with a given instruction set. The results are the same bits.
    pub fn for_scheme_with(isa: Isa, scheme: QuantScheme) -> Self {
        match (scheme.fp8(), scheme.activation_granularity()) {
            (Some(format), Some(_)) if scheme.scale_source() == ScaleSource::Static => {
                Self::per_tensor(isa, format, ScaleSource::Static)
            }
            (Some(format), Some(granularity)) => Self::dynamic(isa, format, granularity),
            _ => Unquantized.into(),
        }
    }

    /// The quantiser that writes `wire`, if one does. `max` is the largest magnitude of the codes, by which the
    /// two FNUZ formats of the same element type differ.
    ///
    /// # Errors
    /// [`QuantError::UnsupportedWire`].
    pub fn for_wire(isa: Isa, wire: WireFormat, max: Fp8Format) -> Result<Self, QuantError> {
        let unsupported = |why| Err(QuantError::UnsupportedWire { wire, why });
        let Some(scale) = wire.scale else {
            return match wire.payload {
                DType::Bf16 => Ok(Unquantized.into()),
                _ => unsupported("without scales, rows are written in bf16"),
            };
        };
        if wire.payload != max.dtype() {
            unsupported("the payload is not of the FP8 format that was asked for")
        } else if scale.dtype != DType::F32 || scale.order != ScaleOrder::RowMajor {
            unsupported("scales are written row by row in f32")
        } else if scale.source == ScaleSource::Static {
            match scale.granularity {
                Granularity::Tensor => Ok(Self::per_tensor(isa, max, ScaleSource::Static)),
                _ => unsupported("a static scale is that of a tensor"),
            }
        } else {
            Ok(Self::dynamic(isa, max, scale.granularity))
        }
    }

    /// The quantiser with which a dispatch writes `wire` for experts of `scheme`, with the fastest instruction set.
    ///
    /// # Errors
    /// As [`Quantizer::for_wire`].
    pub fn for_dispatch(wire: WireFormat, scheme: QuantScheme) -> Result<Self, QuantError> {
        // The format matters only to a wire with scales, which no scheme without one puts into a plan.
        Self::for_wire(Isa::detect(), wire, scheme.fp8().unwrap_or(Fp8Format::E4M3Fn))
    }

    fn per_tensor(isa: Isa, format: Fp8Format, source: ScaleSource) -> Self {
        PerTensor { rows: RowQuantizer::new(format).with_isa(isa), source }.into()
    }

    fn dynamic(isa: Isa, format: Fp8Format, granularity: Granularity) -> Self {
        let rows = RowQuantizer::new(format).with_isa(isa);
        match granularity {
            Granularity::Token => PerToken { rows }.into(),
            Granularity::Group(group) => PerGroup { rows, group }.into(),
            _ => Self::per_tensor(isa, format, ScaleSource::Dynamic),
        }
    }

    /// What [`PreparedRows::row`] writes per token.
    pub fn wire(&self) -> WireFormat {
        WriteRow::wire(self)
    }

    /// Checks the activations and does what must be done before the first row: a dynamic per-tensor quantiser
    /// reads them all here. Nothing is allocated.
    ///
    /// # Errors
    /// [`QuantError::NotMatrix`], [`QuantError::InputDType`], [`QuantError::BufferLength`] for the row factors,
    /// [`QuantError::View`] for a tensor that is not on the host or has gaps inside its rows,
    /// [`QuantError::NoStaticScale`] and [`QuantError::BadScale`] for a quantiser with a static scale.
    pub fn prepare<'a>(&self, activations: Activations<'a>) -> Result<PreparedRows<'a>, QuantError> {
        let (tokens, hidden) = activations.dims()?;
        if tokens > 0 {
            activations.row(0)?;
        }
        let tensor_scale = self.tensor_scale(&activations)?;
        Ok(PreparedRows { quantizer: *self, activations, tokens, hidden, tensor_scale })
    }

    /// Quantises all rows. `payload` is `[tokens, payload_bytes]` and `scales` is `[tokens, scales_per_token]`
    /// of [`Quantizer::wire`], both without gaps. Nothing is allocated.
    ///
    /// # Errors
    /// As [`Quantizer::prepare`], and [`QuantError::BufferLength`].
    pub fn quantize_rows(
        &self,
        activations: Activations<'_>,
        payload: &mut [u8],
        scales: &mut [f32],
    ) -> Result<(), QuantError> {
        let rows = self.prepare(activations)?;
        let (payload_bytes, scale_bytes) = rows.bytes_per_row();
        check_len("payload bytes", rows.tokens * payload_bytes, payload.len())?;
        check_len("scales", rows.tokens * scale_bytes / size_of::<f32>(), scales.len())?;
        let scales = f32_bytes_mut(scales);
        for row in 0..rows.tokens {
            rows.row(
                row,
                &mut payload[row * payload_bytes..][..payload_bytes],
                &mut scales[row * scale_bytes..][..scale_bytes],
            )?;
        }
        Ok(())
    }
}

/// Activations that are ready to be quantised row by row, in any order, from any thread.
#[derive(Clone, Copy, Debug)]
pub struct PreparedRows<'a> {
    quantizer: Quantizer,
    activations: Activations<'a>,
    tokens: usize,
    hidden: usize,
    tensor_scale: f32,
}

impl<'a> PreparedRows<'a> {
    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Elements per row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Bytes of payload and of scales per row.
    pub fn bytes_per_row(&self) -> (usize, usize) {
        let wire = self.quantizer.wire();
        (wire.payload_bytes(self.hidden), wire.scale_bytes(self.hidden))
    }

    /// The payload of row `row` where it lies, if it travels as it is: bf16 and neither quantised nor weighted.
    ///
    /// # Errors
    /// [`QuantError::View`] if there is no such row.
    pub fn unchanged(&self, row: usize) -> Result<Option<&'a [u8]>, QuantError> {
        let Activations { hidden, row_factor, .. } = &self.activations;
        let as_it_is = matches!(self.quantizer, Quantizer::Unquantized(_))
            && row_factor.is_none()
            && hidden.dtype() == DType::Bf16;
        Ok(as_it_is.then(|| hidden.row_bytes(row)).transpose()?)
    }

    /// Quantises row `row` straight into its destination, which may be a peer's memory.
    ///
    /// `payload` and `scales` are as long as [`PreparedRows::bytes_per_row`] says and need no alignment; scales
    /// are f32 in the byte order of the machine. Without quantisation `scales` is empty.
    ///
    /// # Errors
    /// [`QuantError::BufferLength`]; [`QuantError::View`] if there is no such row.
    pub fn row(&self, row: usize, payload: &mut [u8], scales: &mut [u8]) -> Result<(), QuantError> {
        let (payload_bytes, scale_bytes) = self.bytes_per_row();
        check_len("payload bytes", payload_bytes, payload.len())?;
        check_len("scale bytes", scale_bytes, scales.len())?;
        self.quantizer.write(self.activations.row(row)?, self.tensor_scale, RowOut { payload, scales });
        Ok(())
    }
}

impl WriteRow for Unquantized {
    fn wire(&self) -> WireFormat {
        WireFormat::unquantized(DType::Bf16)
    }

    fn tensor_scale(&self, _: &Activations<'_>) -> Result<f32, QuantError> {
        Ok(1.0)
    }

    fn write(&self, row: Row<'_>, _: f32, out: RowOut<'_>) {
        let (stored, _) = out.payload.as_chunks_mut::<2>();
        match (row.elements, row.factor) {
            (Elements::Bf16(src), None) => store(stored, src, |x| x),
            (Elements::Bf16(src), Some(w)) => store(stored, src, |x| bf16::from_f32(x.to_f32() * w)),
            (Elements::F32(src), None) => store(stored, src, bf16::from_f32),
            (Elements::F32(src), Some(w)) => store(stored, src, |x| bf16::from_f32(x * w)),
        }
    }
}

fn store<T: Copy>(stored: &mut [[u8; 2]], src: &[T], round: impl Fn(T) -> bf16) {
    for (stored, &x) in stored.iter_mut().zip(src) {
        *stored = round(x).to_ne_bytes();
    }
}

impl WriteRow for PerTensor {
    fn wire(&self) -> WireFormat {
        let scale = ScaleLayout { source: self.source, ..ScaleLayout::dynamic_f32(Granularity::Tensor) };
        WireFormat { payload: self.rows.format().dtype(), scale: Some(scale) }
    }

    fn tensor_scale(&self, activations: &Activations<'_>) -> Result<f32, QuantError> {
        if self.source == ScaleSource::Static {
            let scale = activations.static_scale.ok_or(QuantError::NoStaticScale)?;
            return check_scale(0, scale).map(|()| scale);
        }
        let (tokens, _) = activations.dims()?;
        let mut amax: f32 = 0.0;
        for row in 0..tokens {
            let row = activations.row(row)?;
            let rows = self.rows.with_row_factor(row.factor);
            amax = amax.max(match row.elements {
                Elements::Bf16(src) => rows.amax(src),
                Elements::F32(src) => rows.amax(src),
            });
        }
        Ok(scale_for_amax(self.rows.format(), amax))
    }

    fn write(&self, row: Row<'_>, tensor_scale: f32, out: RowOut<'_>) {
        let rows = self.rows.with_row_factor(row.factor);
        match row.elements {
            Elements::Bf16(src) => rows.encode(src, tensor_scale, out.payload),
            Elements::F32(src) => rows.encode(src, tensor_scale, out.payload),
        }
        out.scales.copy_from_slice(&tensor_scale.to_ne_bytes());
    }
}

fn dynamic_wire(rows: &RowQuantizer, granularity: Granularity) -> WireFormat {
    WireFormat { payload: rows.format().dtype(), scale: Some(ScaleLayout::dynamic_f32(granularity)) }
}

impl WriteRow for PerToken {
    fn wire(&self) -> WireFormat {
        dynamic_wire(&self.rows, Granularity::Token)
    }

    fn tensor_scale(&self, _: &Activations<'_>) -> Result<f32, QuantError> {
        Ok(1.0)
    }

    fn write(&self, row: Row<'_>, _: f32, out: RowOut<'_>) {
        fn write<T: Unrounded>(rows: RowQuantizer, src: &[T], out: RowOut<'_>) {
            let scale = scale_for_amax(rows.format(), rows.amax(src));
            rows.encode(src, scale, out.payload);
            out.scales.copy_from_slice(&scale.to_ne_bytes());
        }
        let rows = self.rows.with_row_factor(row.factor);
        match row.elements {
            Elements::Bf16(src) => write(rows, src, out),
            Elements::F32(src) => write(rows, src, out),
        }
    }
}

impl WriteRow for PerGroup {
    fn wire(&self) -> WireFormat {
        dynamic_wire(&self.rows, Granularity::Group(self.group))
    }

    fn tensor_scale(&self, _: &Activations<'_>) -> Result<f32, QuantError> {
        Ok(1.0)
    }

    fn write(&self, row: Row<'_>, _: f32, out: RowOut<'_>) {
        let rows = self.rows.with_row_factor(row.factor);
        match row.elements {
            Elements::Bf16(src) => rows.encode_groups(src, self.group.get(), out.payload, out.scales),
            Elements::F32(src) => rows.encode_groups(src, self.group.get(), out.payload, out.scales),
        }
    }
}
