//! Which configurations this backend runs.

use fused_moe_core::{
    ActivationFormat, Axis, DType, DeviceKind, ExpertsCaps, MoeConfig, Rank, TopKWeightAndReduce,
    Unsupported, WireFormat,
};
use grouped_gemm::Epilogue;
use grouped_gemm::experts::{Scheme, epilogue};

use crate::{BatchedError, NAME};

/// Rows of all batches of a rank must be fewer than this: they are numbered by `u32`.
pub(crate) const MAX_ROWS: usize = u32::MAX as usize;

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
        let rows = config.max_tokens_per_rank.saturating_mul(config.ep_size());
        let rows = rows.saturating_mul(most_local_experts(config));
        if rows >= MAX_ROWS {
            no(Axis::Shape, &format!("fewer than {MAX_ROWS} rows on a rank"), rows.to_string());
        }
        let epilogue = epilogue(config.activation);
        if epilogue.is_none() {
            no(Axis::Activation, "silu", config.activation.name().into());
        }
        let scheme = Scheme::of(config.quant);
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
    pub(crate) fn of(config: &MoeConfig) -> Result<Self, BatchedError> {
        let mut reasons = config.contradictions();
        match Self::resolve(config) {
            Ok(supported) if reasons.is_empty() => return Ok(supported),
            Ok(_) => {}
            Err(more) => reasons.extend(more),
        }
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        Err(BatchedError::Refused(reasons.join("; ")))
    }
}

/// The capabilities under a configuration that is supported.
pub(crate) fn caps(config: &MoeConfig) -> ExpertsCaps {
    let mut accepts = vec![config.quant.quantized_wire(config.in_dtype)];
    let unquantized = WireFormat::unquantized(config.in_dtype);
    if !accepts.contains(&unquantized) {
        accepts.push(unquantized);
    }
    let mut caps = ExpertsCaps::host(NAME, accepts);
    caps.format = ActivationFormat::BatchedExperts;
    caps.weight_and_reduce = TopKWeightAndReduce::delegate();
    caps
}

/// Experts of the rank that holds most.
pub(crate) fn most_local_experts(config: &MoeConfig) -> usize {
    let ranks = (0..config.ep_size() as u32).map(Rank);
    ranks.map(|rank| config.placement.num_local_experts(rank)).max().unwrap_or(0)
}
