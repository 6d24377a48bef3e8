//! How a quantisation scheme of the configuration is multiplied.

use fused_moe_core::{BLOCK, DType, Fp8Format, QuantScheme};
use quant::fp4::{MX_GROUP, NV_GROUP};

use crate::{Activation, Epilogue, Fp8Kind};

/// What the two GEMMs multiply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// bf16 by bf16.
    Bf16,
    /// FP8 codes by FP8 codes, activations quantised before each GEMM.
    Fp8(Fp8Scheme),
    /// MXFP4 weights by bf16.
    Mxfp4,
    /// NVFP4 by NVFP4, activations quantised before each GEMM under a global scale that comes with the weights.
    Nvfp4,
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
    /// Weights: the matrix. Activations: all rows of every call, by a scale that comes with the weights.
    Static,
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
            QuantScheme::Fp8PerTensorStatic(format) => (format, Scaling::Static),
            QuantScheme::Mxfp4 => return Some(Scheme::Mxfp4),
            QuantScheme::Nvfp4 => return Some(Scheme::Nvfp4),
            _ => return None,
        };
        let kind = match format.dtype() {
            DType::Fp8E4M3Fn => Fp8Kind::E4M3Fn,
            DType::Fp8E4M3Fnuz => Fp8Kind::E4M3Fnuz,
            _ => return None,
        };
        Some(Scheme::Fp8(Fp8Scheme { format, kind, scaling }))
    }

    /// Columns that share a scale and must not be ragged; 1 where there are none.
    pub const fn group(self) -> usize {
        match self {
            Scheme::Bf16 | Scheme::Fp8(_) => 1,
            Scheme::Mxfp4 => MX_GROUP,
            Scheme::Nvfp4 => NV_GROUP,
        }
    }

    /// Whether activations are quantised under scales that come with the weights.
    pub const fn has_input_scales(self) -> bool {
        matches!(self, Scheme::Nvfp4 | Scheme::Fp8(Fp8Scheme { scaling: Scaling::Static, .. }))
    }

    /// Whether the GEMMs read activations as they are.
    pub const fn reads_bf16(self) -> bool {
        matches!(self, Scheme::Bf16 | Scheme::Mxfp4)
    }
}

impl std::fmt::Display for Scheme {
    /// Of the weights.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scheme::Bf16 => f.write_str("bf16 weights"),
            Scheme::Fp8(fp8) => {
                write!(f, "{} weights with a scale per {}", fp8.format.dtype(), fp8.scaling)?;
                if fp8.scaling == Scaling::Static { f.write_str(" and static input scales") } else { Ok(()) }
            }
            Scheme::Mxfp4 => f.write_str("mxfp4 weights"),
            Scheme::Nvfp4 => f.write_str("nvfp4 weights"),
        }
    }
}

impl Scaling {
    /// Scales of an activation row of `columns` elements, when each row has its own.
    pub fn scales_per_row(self, columns: usize) -> usize {
        match self {
            Scaling::Tensor | Scaling::Static | Scaling::Token => 1,
            Scaling::Block => columns.div_ceil(BLOCK),
        }
    }
}

impl std::fmt::Display for Scaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Scaling::Tensor | Scaling::Static => "tensor",
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
