//! Which configurations this backend runs, and how it runs their quantisation scheme.

use fused_moe_core::{
    Activation, Axis, DType, DeviceKind, ExpertsCaps, Fp8Format, MoeConfig, QuantScheme, Unsupported,
    WireFormat,
};
use grouped_gemm::{Epilogue, Fp8Kind};

use crate::moe_sorting::{MAX_TOKENS, MAX_TOP_K};
use crate::{AiterError, NAME};

/// What the two GEMMs multiply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scheme {
    /// bf16 by bf16.
    Bf16,
    /// FP8 codes by FP8 codes, activations quantised before each GEMM.
    Fp8(Fp8Scheme),
}

/// FP8 weights and activations that are quantised to match.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fp8Scheme {
    /// Codes and the magnitude that the largest activation is mapped to.
    pub(crate) format: Fp8Format,
    /// The same codes as the GEMM names them.
    pub(crate) kind: Fp8Kind,
    /// What a scale belongs to.
    pub(crate) scaling: Scaling,
}

/// What a scale of an FP8 scheme belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scaling {
    /// Weights: the matrix. Activations: all rows of a call on this rank.
    Tensor,
    /// Weights: an output channel. Activations: a row (PTPC).
    Token,
    /// Weights: a block of 128x128. Activations: a group of 1x128.
    Block,
}

impl Scaling {
    /// Scales of `rows` activation rows of `columns` elements, when each row has its own.
    pub(crate) fn scales_per_row(self, columns: usize) -> usize {
        match self {
            Scaling::Tensor | Scaling::Token => 1,
            Scaling::Block => columns.div_ceil(fused_moe_core::BLOCK),
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

/// A configuration that this backend runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Supported {
    pub(crate) scheme: Scheme,
    pub(crate) epilogue: Epilogue,
}

impl Supported {
    /// Resolves `config`, or says everything that is against it.
    pub(crate) fn resolve(config: &MoeConfig) -> Result<Self, Vec<Unsupported>> {
        let mut why = Vec::new();
        let mut no = |axis, wanted: &str, offered: String| why.push(Unsupported::new(axis, wanted, offered));
        if config.device != DeviceKind::Host {
            no(Axis::Device, "the host", format!("{:?}", config.device));
        }
        if config.in_dtype != DType::Bf16 {
            no(Axis::DType, "bf16 hidden states", config.in_dtype.to_string());
        }
        if config.top_k > MAX_TOP_K {
            no(Axis::Shape, &format!("top_k of at most {MAX_TOP_K}"), config.top_k.to_string());
        }
        let rows = config.max_tokens_per_rank.saturating_mul(config.ep_size());
        if rows >= MAX_TOKENS {
            no(Axis::Shape, &format!("fewer than {MAX_TOKENS} tokens over all ranks"), rows.to_string());
        }
        let epilogue = epilogue(config.activation);
        if epilogue.is_none() {
            no(Axis::Activation, "silu", config.activation.name().into());
        }
        let scheme = scheme(config.quant);
        if scheme.is_none() {
            let wanted = "none, fp8-block, fp8-ptpc or dynamic fp8-per-tensor in e4m3fn or e4m3fnuz";
            no(Axis::Quant, wanted, config.quant.to_string());
        }
        match (scheme, epilogue) {
            (Some(scheme), Some(epilogue)) if why.is_empty() => Ok(Self { scheme, epilogue }),
            _ => Err(why),
        }
    }

    /// The same, with one error that lists all reasons, those that no backend could accept included.
    pub(crate) fn of(config: &MoeConfig) -> Result<Self, AiterError> {
        let mut reasons = config.contradictions();
        match Self::resolve(config) {
            Ok(supported) if reasons.is_empty() => return Ok(supported),
            Ok(_) => {}
            Err(more) => reasons.extend(more),
        }
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        Err(AiterError::Refused(reasons.join("; ")))
    }
}

/// The capabilities under a configuration that is supported.
pub(crate) fn caps(config: &MoeConfig) -> ExpertsCaps {
    let mut accepts = vec![config.quant.quantized_wire(config.in_dtype)];
    let unquantized = WireFormat::unquantized(config.in_dtype);
    if !accepts.contains(&unquantized) {
        accepts.push(unquantized);
    }
    ExpertsCaps::host(NAME, accepts)
}

fn epilogue(activation: Activation) -> Option<Epilogue> {
    match activation {
        Activation::Silu => Some(Epilogue::GateUp(grouped_gemm::Activation::Silu)),
        _ => None,
    }
}

fn scheme(quant: QuantScheme) -> Option<Scheme> {
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
