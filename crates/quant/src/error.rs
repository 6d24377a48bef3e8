//! Why something cannot be quantised.

use fused_moe_core::{DType, Granularity, ViewError, WireFormat};

/// Why something cannot be quantised.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A lent tensor cannot be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The tensor to quantise has a type that is not quantised.
    #[error("a tensor of {found} cannot be quantised, only bf16 and f32 can")]
    InputDType {
        /// Its element type.
        found: DType,
    },
    /// The tensor to quantise is not a matrix.
    #[error("a tensor with dimensions {dims:?} cannot be quantised, only a matrix can")]
    NotMatrix {
        /// Its dimensions.
        dims: Vec<usize>,
    },
    /// A buffer has the wrong length.
    #[error("the {buffer} hold {found} elements, not {wanted}")]
    BufferLength {
        /// What the buffer is for.
        buffer: &'static str,
        /// Elements that are needed.
        wanted: usize,
        /// Elements that are there.
        found: usize,
    },
    /// A scale that nothing can be divided by, or that overflows.
    #[error("{scale:e} at position {index} is not a usable scale")]
    BadScale {
        /// Position among the scales.
        index: usize,
        /// The scale.
        scale: f32,
    },
    /// A call without the scale that a static quantiser takes from it.
    #[error("the quantiser needs the static scale of the layer, the call has none")]
    NoStaticScale,
    /// A weight is NaN where NaN would silently become a number.
    #[error("weight {index} is NaN (code {code:#04x})")]
    NanCode {
        /// Position of the code, in elements.
        index: usize,
        /// The code.
        code: u8,
    },
    /// A row that is not whole groups of a format that has no ragged ones.
    #[error("a row of {columns} elements is not whole groups of {group}")]
    RaggedGroup {
        /// Elements of the row.
        columns: usize,
        /// Elements of a group.
        group: usize,
    },
    /// A weight is NaN, for which the format has no code.
    #[error("weight {index} is NaN, which FP4 cannot hold")]
    NanWeight {
        /// Position of the weight, in elements.
        index: usize,
    },
    /// A scale code is NaN.
    #[error("scale {index} is NaN (code {code:#04x})")]
    NanScale {
        /// Position among the scales.
        index: usize,
        /// The code.
        code: u8,
    },
    /// No quantiser writes this wire format.
    #[error("no quantiser writes {wire}: {why}")]
    UnsupportedWire {
        /// The wire format.
        wire: WireFormat,
        /// What is in the way.
        why: &'static str,
    },
    /// An instruction set was asked for by name that is unknown or not of this CPU.
    #[error("instruction set {name:?} is not available here (available: {available})")]
    IsaUnavailable {
        /// The name.
        name: String,
        /// The names of those that are available.
        available: String,
    },
    /// Scales of this granularity do not belong to rows.
    #[error("{granularity:?} scales cannot be used here")]
    UnsupportedGranularity {
        /// The granularity.
        granularity: Granularity,
    },
}

/// Refuses a buffer that does not hold exactly `wanted` elements.
pub(crate) fn check_len(buffer: &'static str, wanted: usize, found: usize) -> Result<(), QuantError> {
    if wanted == found { Ok(()) } else { Err(QuantError::BufferLength { buffer, wanted, found }) }
}

/// Refuses a scale whose reciprocal, or which itself, is zero, negative, infinite or NaN.
pub(crate) fn check_scale(index: usize, scale: f32) -> Result<(), QuantError> {
    if scale > 0.0 && scale.is_finite() && (1.0 / scale).is_finite() {
        Ok(())
    } else {
        Err(QuantError::BadScale { index, scale })
    }
}
