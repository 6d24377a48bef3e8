//! Which configurations host experts run, and which plans a built one accepts.

use fused_moe_core::{
    Axis, DType, DeviceKind, ExpertsCaps, MoeConfig, Plan, RouterWeight, Unsupported, WireFormat,
};

use super::{ExpertsError, Scheme, epilogue};
use crate::Epilogue;

/// A configuration that these GEMMs run, resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Supported {
    /// What the two GEMMs multiply.
    pub scheme: Scheme,
    /// What gemm1 stores.
    pub epilogue: Epilogue,
}

impl Supported {
    /// Resolves `config`, or says everything that is against it: what these GEMMs cannot do, and the backend's
    /// `own` reasons.
    ///
    /// # Errors
    /// All reasons.
    pub fn resolve(config: &MoeConfig, own: Vec<Unsupported>) -> Result<Self, Vec<Unsupported>> {
        let mut why = Vec::new();
        let mut no = |axis, wanted: &str, offered: String| why.push(Unsupported::new(axis, wanted, offered));
        if config.device != DeviceKind::Host {
            no(Axis::Device, "the host", format!("{:?}", config.device));
        }
        if config.in_dtype != DType::Bf16 {
            no(Axis::DType, "bf16 hidden states", config.in_dtype.to_string());
        }
        let epilogue = epilogue(config.activation);
        if epilogue.is_none() {
            no(
                Axis::Activation,
                "silu, gelu, gelu-tanh, swiglu-oai or silu-clamped",
                config.activation.name().into(),
            );
        }
        let scheme = Scheme::of(config.quant);
        if scheme.is_none() {
            let wanted = "none, fp8-block, fp8-ptpc, fp8-per-tensor (static or dynamic), mxfp4 or nvfp4";
            no(Axis::Quant, wanted, config.quant.to_string());
        }
        let group = scheme.map_or(1, Scheme::group);
        for (name, size) in [("hidden", config.hidden), ("intermediate", config.intermediate)] {
            if !size.is_multiple_of(group) {
                let wanted = format!("{name} in whole groups of {group} ({})", config.quant);
                no(Axis::Shape, &wanted, size.to_string());
            }
        }
        why.extend(own);
        match (scheme, epilogue) {
            (Some(scheme), Some(epilogue)) if why.is_empty() => Ok(Self { scheme, epilogue }),
            _ => Err(why),
        }
    }

    /// The same with one error that lists all reasons, those that no backend could accept included.
    ///
    /// # Errors
    /// [`ExpertsError::Refused`].
    pub fn of(config: &MoeConfig, own: Vec<Unsupported>) -> Result<Self, ExpertsError> {
        let mut reasons = config.contradictions();
        match Self::resolve(config, own) {
            Ok(supported) if reasons.is_empty() => return Ok(supported),
            Ok(_) => {}
            Err(more) => reasons.extend(more),
        }
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        Err(ExpertsError::Refused(reasons.join("; ")))
    }
}

/// The wire formats that host experts read, best first: quantised by the scheme, and as the engine lends them.
pub fn accepted_wires(config: &MoeConfig) -> Vec<WireFormat> {
    let mut accepts = vec![config.quant.quantized_wire(config.in_dtype)];
    let unquantized = WireFormat::unquantized(config.in_dtype);
    if !accepts.contains(&unquantized) {
        accepts.push(unquantized);
    }
    accepts
}

/// Refuses a plan that was negotiated with other experts or with other capabilities than `caps`.
///
/// # Errors
/// [`ExpertsError::Plan`].
pub fn check_plan(plan: &Plan, caps: &ExpertsCaps) -> Result<(), ExpertsError> {
    let refused = |what, wanted: &str, found: String| {
        Err(ExpertsError::Plan { what, wanted: wanted.to_string(), found })
    };
    if plan.experts() != caps.name {
        return refused("is for the experts", caps.name, plan.experts().into());
    }
    if plan.format() != caps.format {
        return refused("has the activation format", caps.format.name(), plan.format().name().into());
    }
    if plan.weight_and_reduce() != caps.weight_and_reduce {
        let (wanted, found) = (caps.weight_and_reduce.name(), plan.weight_and_reduce().name());
        return refused("weights and reduces by", wanted, found.into());
    }
    if plan.router_weight() == RouterWeight::OnInputByExperts && !caps.weight_on_input {
        return refused("applies the routing weight", "elsewhere", "in the experts, on the input".into());
    }
    if !caps.accepts.contains(&plan.wire()) {
        let accepts: Vec<_> = caps.accepts.iter().map(ToString::to_string).collect();
        return refused("dispatches", &accepts.join(" or "), plan.wire().to_string());
    }
    Ok(())
}
