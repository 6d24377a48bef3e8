//! `quantization_config`: how the checkpoint says that it was quantised.
//!
//! The tensors decide what a matrix is; this is read to refuse what cannot be run, and to tell apart shapes that
//! fit two schemes.

use fused_moe_core::{BLOCK, Fp8Format, QuantScheme};

use crate::config::Config;
use crate::error::{CheckpointError, Result};

/// The values of `quant_method` that can be read.
const KNOWN_METHODS: &str = "fp8, compressed-tensors";

/// The scheme that `config` declares; [`QuantScheme::Unquantized`] without a `quantization_config`.
pub(crate) fn declared_scheme(config: &Config<'_>) -> Result<QuantScheme> {
    let Some(quantization) = config.nested("quantization_config")? else {
        return Ok(QuantScheme::Unquantized);
    };
    match quantization.required_text("quant_method")? {
        "fp8" => fp8(&quantization),
        "compressed-tensors" => compressed_tensors(&quantization),
        _ => Err(quantization.bad("quant_method", format!("one of {KNOWN_METHODS}"))),
    }
}

/// DeepSeek's and Qwen's own FP8 checkpoints.
fn fp8(quantization: &Config<'_>) -> Result<QuantScheme> {
    match quantization.text("activation_scheme")? {
        None | Some("dynamic") => {}
        Some("static") => {
            let what = format!("{} = \"static\"", quantization.name("activation_scheme"));
            return Err(CheckpointError::StaticActivationScale { what });
        }
        Some(_) => return Err(quantization.bad("activation_scheme", "\"dynamic\"")),
    }
    if !matches!(quantization.text("fmt")?, None | Some("e4m3" | "float8_e4m3fn")) {
        return Err(quantization.bad("fmt", "\"e4m3\""));
    }
    // `scale_fmt` "ue8m0" restricts the scales to powers of two; as f32 they are scales like any other.
    match quantization.counts("weight_block_size")? {
        None => Ok(QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn)),
        Some(block) if block == [BLOCK, BLOCK] => Ok(QuantScheme::Fp8Block(Fp8Format::E4M3Fn)),
        Some(_) => Err(quantization.bad("weight_block_size", format!("[{BLOCK}, {BLOCK}]"))),
    }
}

/// compressed-tensors, as llm-compressor writes it.
fn compressed_tensors(quantization: &Config<'_>) -> Result<QuantScheme> {
    let groups = quantization.nested("config_groups")?;
    let mut declared = None;
    for group in groups.iter().flat_map(|groups| groups.keys()) {
        let group = groups.as_ref().and_then(|groups| groups.nested(group).transpose()).transpose()?;
        let Some(group) = group else { continue };
        let scheme = compressed_group(&group)?;
        if let Some(first) = declared.filter(|first| *first != scheme) {
            return Err(CheckpointError::Unsupported {
                what: quantization.name("config_groups"),
                why: format!("its groups declare {first} and {scheme}, wanted one scheme"),
            });
        }
        declared = Some(scheme);
    }
    declared.ok_or_else(|| quantization.bad("config_groups", "at least one group"))
}

fn compressed_group(group: &Config<'_>) -> Result<QuantScheme> {
    let Some(weights) = group.nested("weights")? else {
        return Err(group.bad("weights", "an object"));
    };
    for quantised in [Some(&weights), group.nested("input_activations")?.as_ref()].into_iter().flatten() {
        if quantised.count(&["num_bits"])?.is_some_and(|bits| bits != 8) {
            return Err(quantised.bad("num_bits", "8"));
        }
        if quantised.text("type")?.is_some_and(|kind| kind != "float") {
            return Err(quantised.bad("type", "\"float\""));
        }
        if quantised.flag("symmetric")? == Some(false) {
            return Err(quantised.bad("symmetric", "true"));
        }
    }
    if let Some(activations) = group.nested("input_activations")? {
        if activations.flag("dynamic")? != Some(true) {
            let what = activations.name("dynamic");
            return Err(CheckpointError::StaticActivationScale { what });
        }
    } else {
        return Err(group.bad("input_activations", "an object (weight-only FP8 is not supported)"));
    }
    match weights.text("strategy")? {
        Some("channel") => Ok(QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn)),
        Some("tensor") => Ok(QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn)),
        Some("block") => match weights.counts("block_structure")? {
            Some(block) if block != [BLOCK, BLOCK] => {
                Err(weights.bad("block_structure", format!("[{BLOCK}, {BLOCK}]")))
            }
            _ => Ok(QuantScheme::Fp8Block(Fp8Format::E4M3Fn)),
        },
        _ => Err(weights.bad("strategy", "one of \"channel\", \"tensor\", \"block\"")),
    }
}
