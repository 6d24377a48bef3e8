//! Quantisation schemes, and what one dispatched token looks like on the wire.

use std::num::NonZeroUsize;

use crate::dtype::DType;

/// Width of an activation scale group and edge of a weight scale block of the "per-1x128" scheme.
pub const BLOCK: usize = 128;

/// An FP8 encoding together with the largest magnitude that quantisation maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fp8Format {
    /// OCP E4M3, largest value 448 (NVIDIA, gfx950, the host).
    E4M3Fn,
    /// FNUZ E4M3, largest value 240 (gfx942, as AITER quantises).
    E4M3Fnuz,
    /// FNUZ E4M3 quantised to at most 224, the largest code that a checkpoint converted from OCP can hold.
    E4M3FnuzMax224,
}

impl Fp8Format {
    /// Element type of the codes.
    pub const fn dtype(self) -> DType {
        match self {
            Fp8Format::E4M3Fn => DType::Fp8E4M3Fn,
            Fp8Format::E4M3Fnuz | Fp8Format::E4M3FnuzMax224 => DType::Fp8E4M3Fnuz,
        }
    }

    /// The magnitude that the largest element of a scale group is mapped to.
    pub const fn max(self) -> f32 {
        match self {
            Fp8Format::E4M3Fn => 448.0,
            Fp8Format::E4M3Fnuz => 240.0,
            Fp8Format::E4M3FnuzMax224 => 224.0,
        }
    }
}

/// How the experts' weights, and the activations they meet, are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantScheme {
    /// Weights and activations in the model's own type.
    Unquantized,
    /// FP8 weights with one scale per 128x128 block, activations with one dynamic scale per 1x128 group.
    Fp8Block(Fp8Format),
    /// FP8 weights with one scale per output channel, activations with one dynamic scale per token.
    Fp8Ptpc(Fp8Format),
    /// FP8 weights with one scale per tensor, activations with one dynamic scale per tensor and rank.
    Fp8PerTensor(Fp8Format),
    /// FP8 weights with one scale per tensor, activations with one scale per GEMM and layer that comes with the
    /// weights.
    Fp8PerTensorStatic(Fp8Format),
    /// E2M1 weights with one E8M0 scale per 1x32 group, activations in the model's own type.
    Mxfp4,
    /// E2M1 weights with one E4M3 scale per 1x16 group and an f32 scale per matrix; activations likewise, with a
    /// global scale per GEMM and layer that comes with the weights.
    Nvfp4,
}

impl QuantScheme {
    /// The FP8 format, if the scheme has one.
    pub const fn fp8(self) -> Option<Fp8Format> {
        match self {
            QuantScheme::Unquantized | QuantScheme::Mxfp4 | QuantScheme::Nvfp4 => None,
            QuantScheme::Fp8Block(f)
            | QuantScheme::Fp8Ptpc(f)
            | QuantScheme::Fp8PerTensor(f)
            | QuantScheme::Fp8PerTensorStatic(f) => Some(f),
        }
    }

    /// Granularity of the f32 activation scales, if the scheme has any.
    pub fn activation_granularity(self) -> Option<Granularity> {
        match self {
            QuantScheme::Unquantized | QuantScheme::Mxfp4 | QuantScheme::Nvfp4 => None,
            QuantScheme::Fp8Block(_) => Some(Granularity::PER_1X128),
            QuantScheme::Fp8Ptpc(_) => Some(Granularity::Token),
            QuantScheme::Fp8PerTensor(_) | QuantScheme::Fp8PerTensorStatic(_) => Some(Granularity::Tensor),
        }
    }

    /// Where the activation scales of an FP8 scheme come from.
    pub const fn scale_source(self) -> ScaleSource {
        match self {
            QuantScheme::Fp8PerTensorStatic(_) => ScaleSource::Static,
            _ => ScaleSource::Dynamic,
        }
    }

    /// The wire format that carries activations quantised by this scheme; for schemes whose activations are not
    /// FP8 the activations in `in_dtype`.
    pub fn quantized_wire(self, in_dtype: DType) -> WireFormat {
        match (self.fp8(), self.activation_granularity()) {
            (Some(format), Some(granularity)) => {
                let scale = ScaleLayout::dynamic_f32(granularity);
                let scale = ScaleLayout { source: self.scale_source(), ..scale };
                WireFormat { payload: format.dtype(), scale: Some(scale) }
            }
            _ => WireFormat::unquantized(in_dtype),
        }
    }

    /// Name as the command line spells it.
    pub const fn name(self) -> &'static str {
        match self {
            QuantScheme::Unquantized => "none",
            QuantScheme::Fp8Block(_) => "fp8-block",
            QuantScheme::Fp8Ptpc(_) => "fp8-ptpc",
            QuantScheme::Fp8PerTensor(_) => "fp8-per-tensor",
            QuantScheme::Fp8PerTensorStatic(_) => "fp8-per-tensor-static",
            QuantScheme::Mxfp4 => "mxfp4",
            QuantScheme::Nvfp4 => "nvfp4",
        }
    }
}

impl std::fmt::Display for QuantScheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.fp8() {
            None | Some(Fp8Format::E4M3Fn) => f.write_str(self.name()),
            Some(format) => write!(f, "{} ({}, max {})", self.name(), format.dtype(), format.max()),
        }
    }
}

/// How many elements share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Granularity {
    /// One scale for all tokens of a rank. On the wire it travels once per token, since every rank has its own.
    Tensor,
    /// One scale per token.
    Token,
    /// One scale per group of this many consecutive elements of a token; the last group may be shorter.
    Group(NonZeroUsize),
}

impl Granularity {
    /// One scale per 1x128 group.
    pub const PER_1X128: Granularity = Granularity::Group(NonZeroUsize::new(BLOCK).unwrap());

    /// Scales per token of `hidden` elements.
    pub fn scales_per_token(self, hidden: usize) -> usize {
        match self {
            Granularity::Tensor | Granularity::Token => 1,
            Granularity::Group(n) => hidden.div_ceil(n.get()),
        }
    }
}

/// Whether scales come with the checkpoint or from the activations of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleSource {
    /// Fixed when the model was quantised.
    Static,
    /// Computed from the activations of this call.
    Dynamic,
}

/// How the scales of `[tokens, scales_per_token]` lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScaleOrder {
    /// All scales of a token together.
    RowMajor,
    /// All tokens of a group together, `stride` elements from one group to the next.
    Transposed {
        /// Elements from one group to the next.
        stride: usize,
    },
    /// Tiles of 128 rows by 4 groups, as NVFP4 tensor cores read them.
    Swizzled128x4,
}

/// Everything that must agree before scales written by one stage may be read by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScaleLayout {
    /// How many elements share a scale.
    pub granularity: Granularity,
    /// Where the scales come from.
    pub source: ScaleSource,
    /// Element type of the scales.
    pub dtype: DType,
    /// Order in memory.
    pub order: ScaleOrder,
}

impl ScaleLayout {
    /// Row-major dynamic f32 scales of the given granularity.
    pub const fn dynamic_f32(granularity: Granularity) -> Self {
        Self { granularity, source: ScaleSource::Dynamic, dtype: DType::F32, order: ScaleOrder::RowMajor }
    }
}

/// One dispatched token on the wire. `scale: None` is the only way to say that there are no scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WireFormat {
    /// Element type of the `hidden` payload elements.
    pub payload: DType,
    /// Layout of the scales that travel with the payload.
    pub scale: Option<ScaleLayout>,
}

impl WireFormat {
    /// Activations as they are, without scales.
    pub const fn unquantized(dtype: DType) -> Self {
        Self { payload: dtype, scale: None }
    }

    /// Bytes of payload per token.
    pub const fn payload_bytes(&self, hidden: usize) -> usize {
        hidden * self.payload.size_bytes()
    }

    /// Scales per token, 0 without scales.
    pub fn scales_per_token(&self, hidden: usize) -> usize {
        self.scale.map_or(0, |s| s.granularity.scales_per_token(hidden))
    }

    /// Bytes of scales per token, 0 without scales.
    pub fn scale_bytes(&self, hidden: usize) -> usize {
        self.scale.map_or(0, |s| s.granularity.scales_per_token(hidden) * s.dtype.size_bytes())
    }
}

/// In what the GEMMs of experts add products up. Products themselves are exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Accumulation {
    /// In f32, in whatever order and in however many parts.
    #[default]
    F32,
    /// As tensor cores add FP8 products up: `step` at a time and the sum so far are aligned to the largest of them and cut to
    /// `bits` bits behind its first one. Sums of `promoted` products are then added up in f32.
    Aligned {
        /// Bits that are kept behind the first one of the largest addend.
        bits: u32,
        /// Products that are added up at once.
        step: usize,
        /// Products after which a sum is added to one in f32; a multiple of `step`.
        promoted: usize,
    },
}

impl std::fmt::Display for Accumulation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Accumulation::F32 => f.write_str("f32"),
            Accumulation::Aligned { bits, step, promoted } => {
                write!(f, "{step} at a time in {bits} bits, {promoted} in f32")
            }
        }
    }
}

/// What a combine carries, apart from sums that it makes on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CombineWire {
    /// Rows in the configuration's element type.
    #[default]
    InDtype,
    /// Rows rounded to the configuration's element type, then FP8 codes with a scale for each 128 columns.
    Fp8Block(Fp8Format),
}

impl CombineWire {
    /// The format of a row that is `in_dtype` before it leaves.
    pub fn format(self, in_dtype: DType) -> WireFormat {
        match self {
            CombineWire::InDtype => WireFormat::unquantized(in_dtype),
            CombineWire::Fp8Block(format) => QuantScheme::Fp8Block(format).quantized_wire(in_dtype),
        }
    }
}

impl std::fmt::Display for CombineWire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CombineWire::InDtype => f.write_str("none"),
            CombineWire::Fp8Block(format) => write!(f, "{} 1x128", format.dtype()),
        }
    }
}

impl std::fmt::Display for WireFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.payload)?;
        let Some(scale) = self.scale else { return Ok(()) };
        let source = match scale.source {
            ScaleSource::Static => "static",
            ScaleSource::Dynamic => "dynamic",
        };
        match scale.granularity {
            Granularity::Tensor => write!(f, " + {source} {} scale per tensor", scale.dtype)?,
            Granularity::Token => write!(f, " + {source} {} scale per token", scale.dtype)?,
            Granularity::Group(n) => write!(f, " + {source} {} scale per 1x{n}", scale.dtype)?,
        }
        match scale.order {
            ScaleOrder::RowMajor => Ok(()),
            ScaleOrder::Transposed { stride } => write!(f, ", transposed with stride {stride}"),
            ScaleOrder::Swizzled128x4 => write!(f, ", swizzled 128x4"),
        }
    }
}
