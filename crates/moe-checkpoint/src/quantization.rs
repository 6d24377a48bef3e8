//! `quantization_config`: how the checkpoint says that it was quantised.
//!
//! The tensors decide what a matrix is; this is read to refuse what cannot be run, and to tell apart shapes that
//! fit two schemes.

use fused_moe_core::{BLOCK, Fp8Format, QuantScheme};

use std::path::Path;

use crate::config::{Config, MAX_CONFIG_BYTES, read_object};
use crate::error::{CheckpointError, Result};
use crate::projection::NV_GROUP;

/// The values of `quant_method` that can be read.
const KNOWN_METHODS: &str = "fp8, compressed-tensors, modelopt, mxfp4";

/// Where ModelOpt writes what it did, beside or instead of `quantization_config`.
const MODELOPT_FILE: &str = "hf_quant_config.json";

/// The scheme that `config` declares; [`QuantScheme::Unquantized`] without a `quantization_config`.
pub(crate) fn declared_scheme(config: &Config<'_>) -> Result<QuantScheme> {
    let Some(quantization) = config.nested("quantization_config")? else {
        return Ok(QuantScheme::Unquantized);
    };
    match quantization.required_text("quant_method")? {
        "fp8" => fp8(&quantization),
        "compressed-tensors" => compressed_tensors(&quantization),
        "modelopt" | "modelopt_fp4" => modelopt(&quantization),
        "mxfp4" => Ok(QuantScheme::Mxfp4),
        _ => Err(quantization.bad("quant_method", format!("one of {KNOWN_METHODS}"))),
    }
}

/// DeepSeek's and Qwen's own FP8 checkpoints.
fn fp8(quantization: &Config<'_>) -> Result<QuantScheme> {
    let is_static = match quantization.text("activation_scheme")? {
        None | Some("dynamic") => false,
        Some("static") => true,
        Some(_) => return Err(quantization.bad("activation_scheme", "\"dynamic\" or \"static\"")),
    };
    if !matches!(quantization.text("fmt")?, None | Some("e4m3" | "float8_e4m3fn")) {
        return Err(quantization.bad("fmt", "\"e4m3\""));
    }
    // `scale_fmt` "ue8m0" restricts the scales to powers of two; as f32 they are scales like any other.
    match quantization.counts("weight_block_size")? {
        None if is_static => Ok(QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn)),
        None => Ok(QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn)),
        Some(_) if is_static => {
            let what = format!("{} = \"static\" with blocks", quantization.name("activation_scheme"));
            Err(CheckpointError::StaticActivationScale { what })
        }
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
    let Some(activations) = group.nested("input_activations")? else {
        return Err(group.bad("input_activations", "an object (weight-only FP8 is not supported)"));
    };
    let is_static = activations.flag("dynamic")? != Some(true);
    match weights.text("strategy")? {
        Some("tensor") if is_static => {
            if !matches!(activations.text("strategy")?, None | Some("tensor")) {
                return Err(activations.bad("strategy", "\"tensor\" with \"dynamic\": false"));
            }
            Ok(QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn))
        }
        Some(_) if is_static => {
            Err(CheckpointError::StaticActivationScale { what: activations.name("dynamic") })
        }
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

/// ModelOpt's own words, in `quantization_config` or under `quantization` of its file.
fn modelopt(quantization: &Config<'_>) -> Result<QuantScheme> {
    if quantization.count(&["group_size"])?.is_some_and(|size| size != NV_GROUP) {
        return Err(quantization.bad("group_size", format!("{NV_GROUP}")));
    }
    match quantization.required_text("quant_algo")? {
        "NVFP4" => Ok(QuantScheme::Nvfp4),
        "FP8" => Ok(QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn)),
        _ => Err(quantization.bad("quant_algo", "\"NVFP4\" or \"FP8\"")),
    }
}

/// The scheme of the checkpoint in `dir`, whose `config.json` declares `declared`: ModelOpt may say it in a file of
/// its own.
pub(crate) fn with_modelopt_file(dir: &Path, declared: QuantScheme) -> Result<QuantScheme> {
    let path = dir.join(MODELOPT_FILE);
    if !path.exists() {
        return Ok(declared);
    }
    let object = read_object(&path, MAX_CONFIG_BYTES)?;
    let file = Config::new(&path, &object);
    let Some(quantization) = file.nested("quantization")? else { return Ok(declared) };
    // A model that was calibrated but not quantised.
    if !quantization.has("quant_algo") {
        return Ok(declared);
    }
    let scheme = modelopt(&quantization)?;
    if declared != QuantScheme::Unquantized && declared != scheme {
        return Err(CheckpointError::ConflictingKeys {
            path,
            first: format!("quantization.quant_algo = {scheme}"),
            second: format!("quantization_config of config.json = {declared}"),
        });
    }
    Ok(scheme)
}
