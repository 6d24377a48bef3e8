//! How a quantisation scheme of the configuration is multiplied.

use fused_moe_core::{BLOCK, DType, Fp8Format, QuantScheme};

use crate::{Activation, Epilogue, Fp8Kind};

/// What the two GEMMs multiply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// bf16 by bf16.
    Bf16,
    /// FP8 codes by FP8 codes, activations quantised before each GEMM.
    Fp8(Fp8Scheme),
}

/// FP8 weights and activations that are quantised to match.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fp8Scheme {
    /// Codes and the magnitude that the largest activation is mapped to.
    pub format: Fp8Format,
    /// The same codes as the GEMM names them.
    pub kind: Fp8Kind,
    /// What a scale belongs to.
    pub scaling: Scaling,
}

/// What a scale of an FP8 scheme belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// Weights: the matrix. Activations: all rows of a call on this rank.
    Tensor,
    /// Weights: an output channel. Activations: a row (PTPC).
    Token,
    /// Weights: a block of 128x128. Activations: a group of 1x128.
    Block,
}

impl Scheme {
    /// How `quant` is multiplied; `None` if these GEMMs cannot.
    pub fn of(quant: QuantScheme) -> Option<Self> {
        let (format, scaling) = match quant {
            QuantScheme::Unquantized => return Some(Scheme::Bf16),
            QuantScheme::Fp8Block(format) => (format, Scaling::Block),
            QuantScheme::Fp8Ptpc(format) => (format, Scaling::Token),
            QuantScheme::Fp8PerTensor(format) => (format, Scaling::Tensor),
            _ => return None,
        };
        let kind = match format.dtype() {
            DType::Fp8E4M3Fn => Fp8Kind::E4M3Fn,
            DType::Fp8E4M3Fnuz => Fp8Kind::E4M3Fnuz,
            _ => return None,
        };
        Some(Scheme::Fp8(Fp8Scheme { format, kind, scaling }))
    }
}

impl Scaling {
    /// Scales of an activation row of `columns` elements, when each row has its own.
    pub fn scales_per_row(self, columns: usize) -> usize {
        match self {
            Scaling::Tensor | Scaling::Token => 1,
            Scaling::Block => columns.div_ceil(BLOCK),
        }
    }
}

impl std::fmt::Display for Scaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Scaling::Tensor => "tensor",
            Scaling::Token => "output channel",
            Scaling::Block => "128x128 block",
        })
    }
}

/// What gemm1 stores for an activation of the configuration; `None` if it cannot.
pub fn epilogue(activation: fused_moe_core::Activation) -> Option<Epilogue> {
    use fused_moe_core::Activation as Wanted;
    let activation = match activation {
        Wanted::Silu => Activation::Silu,
        Wanted::Gelu => Activation::Gelu,
        Wanted::GeluTanh => Activation::GeluTanh,
        Wanted::SwigluOai { alpha, limit } => Activation::SwigluOai { alpha, limit },
        Wanted::SiluClamped { limit } => Activation::SiluClamped { limit },
        _ => return None,
    };
    Some(Epilogue::GateUp(activation))
}
