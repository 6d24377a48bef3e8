//! Damaged checkpoints and hidden states: exit code 2, an error that names what is wrong, OUT untouched.

mod common;

use std::path::Path;

use common::{COMMS, Copied, Run, Tensor};
use rstest::rstest;
use safetensors::tensor::Dtype;
use serde_json::json;

const BF16: &str = "deepseek_v3";
const BLOCK: &str = "deepseek_v3_fp8_block";
const PTPC: &str = "deepseek_v3_fp8_ptpc_f32";
const UP: &str = "model.layers.1.mlp.experts.5.up_proj";

/// Refused by every backend and both over one rank and over several.
fn refused(copy: &Copied, words: &[&str]) {
    copy.run().refused(2, words);
    copy.run().with("--ep-size 8 --all2all naive --verify").refused(2, words);
}

#[rstest]
fn truncated_files(#[values("model.safetensors", "input.safetensors")] name: &str) {
    let copy = Copied::of(BF16);
    let whole = std::fs::read(copy.path(name)).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let cuts = [0, 1, 7, 8, 9, header / 2, header - 1, header, header + 1, whole.len() / 2, whole.len() - 1];
    for cut in cuts {
        std::fs::write(copy.path(name), &whole[..cut]).unwrap();
        let finished = copy.run().run().failed(2, &[name]);
        assert!(!copy.path("out.safetensors").exists(), "cut at {cut}: {finished:?}");
    }
    copy.run().refused(2, &[name]);
}

#[rstest]
fn files_that_are_not_safetensors(#[values("model.safetensors", "input.safetensors")] name: &str) {
    let copy = Copied::of(BF16);
    let whole = std::fs::read(copy.path(name)).unwrap();
    let mut huge_header = whole.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut no_json = whole.clone();
    no_json[8] = b'x';
    let trailing = [&whole[..], b"more"].concat();
    for bytes in [huge_header, no_json, trailing, b"\x80\x02}q\x00. a pickle, as of torch.save".to_vec()] {
        std::fs::write(copy.path(name), bytes).unwrap();
        copy.run().refused(2, &[name]);
    }
}

#[test]
fn a_missing_tensor() {
    for name in ["experts.5.up_proj.weight", "gate.weight", "gate.e_score_correction_bias"] {
        let tensor = format!("model.layers.1.mlp.{name}");
        let copy = Copied::of(BF16);
        copy.edit_tensors(|tensors| assert!(tensors.remove(&tensor).is_some()));
        refused(&copy, &[&tensor, "missing", "model.safetensors"]);
    }
}

#[test]
fn a_missing_shard() {
    let copy = Copied::of("qwen3_moe_sharded");
    let mut refusals = 0;
    for shard in (1..=5).map(|i| format!("model-0000{i}-of-00005.safetensors")) {
        let (path, aside) = (copy.path(&shard), copy.path("aside"));
        std::fs::rename(&path, &aside).unwrap();
        // A shard without tensors of the layer need not exist.
        if copy.run().run().code != 0 {
            refused(&copy, &["shard", &shard, "missing", "model.layers.1."]);
            refusals += 1;
        }
        std::fs::rename(&aside, &path).unwrap();
    }
    assert!(refusals >= 1);
}

#[rstest]
#[case::transposed(&[160, 96])]
#[case::flat(&[15360])]
fn a_weight_of_the_wrong_shape(#[case] shape: &[usize]) {
    let weight = format!("{UP}.weight");
    let copy = Copied::of("deepseek_v3_fp8_block_ragged");
    copy.edit_tensors(|tensors| tensors.get_mut(&weight).unwrap().shape = shape.to_vec());
    refused(&copy, &[&weight, &format!("{shape:?}"), "wanted"]);
}

#[rstest]
#[case::block(BLOCK, "weight_scale_inv", &[1, 1])]
#[case::block_one_row_more(BLOCK, "weight_scale_inv", &[2, 2])]
#[case::block_flat(BLOCK, "weight_scale_inv", &[2])]
#[case::ptpc_one_row_less(PTPC, "weight_scale", &[47, 1])]
#[case::ptpc_per_column(PTPC, "weight_scale", &[1, 48])]
#[case::empty(PTPC, "weight_scale", &[0, 1])]
fn a_scale_of_the_wrong_shape(#[case] case: &str, #[case] suffix: &str, #[case] shape: &[usize]) {
    let scale = format!("{UP}.{suffix}");
    let copy = Copied::of(case);
    copy.edit_tensors(|tensors| {
        let scales = Tensor::f32(shape, vec![0.01; shape.iter().product()]);
        assert_ne!(tensors.insert(scale.clone(), scales.clone()).unwrap().shape, scales.shape);
    });
    refused(&copy, &[&scale, &format!("{shape:?}"), "wanted"]);
}

#[rstest]
fn a_scale_of_the_wrong_type(#[values(Dtype::F64, Dtype::I32, Dtype::U8)] dtype: Dtype) {
    for (case, suffix) in [(BLOCK, "weight_scale_inv"), (PTPC, "weight_scale")] {
        let scale = format!("{UP}.{suffix}");
        let copy = Copied::of(case);
        copy.edit_tensors(|tensors| {
            let tensor = tensors.get_mut(&scale).unwrap();
            let elements: usize = tensor.shape.iter().product();
            tensor.bytes = vec![0; elements * dtype.bitsize() / 8];
            tensor.dtype = dtype;
        });
        refused(&copy, &[&scale, "wanted"]);
    }
}

#[rstest]
fn a_scale_that_is_no_scale(#[values(f32::NAN, f32::INFINITY, -1.0)] value: f32) {
    let scale = format!("{UP}.weight_scale_inv");
    let copy = Copied::of(BLOCK);
    copy.edit_tensors(|tensors| {
        let tensor = tensors.get_mut(&scale).unwrap();
        let shape = tensor.shape.clone();
        *tensor = Tensor::f32(&shape, vec![value; shape.iter().product()]);
    });
    refused(&copy, &[&scale]);
}

#[test]
fn fp8_codes_without_a_scale() {
    let copy = Copied::of(BLOCK);
    copy.edit_tensors(|tensors| {
        tensors.remove(&format!("{UP}.weight_scale_inv")).unwrap();
    });
    refused(&copy, &[&format!("{UP}.weight"), "scale"]);
    let copy = Copied::of(BLOCK);
    copy.edit_tensors(|tensors| tensors.retain(|name, _| !name.ends_with("weight_scale_inv")));
    refused(&copy, &["weight", "scale"]);
}

/// Blocks and scales of FP4 that are not what they should be; `byte` fills a tensor of its own shape.
#[rstest]
#[case::mxfp4_nan(
    "gpt_oss_mxfp4",
    "model.layers.0.mlp.experts.gate_up_proj_scales",
    Some(0xff),
    "holds NaN at index 0"
)]
#[case::mxfp4_scales("gpt_oss_mxfp4", "model.layers.0.mlp.experts.down_proj_scales", None, "has no scale")]
#[case::gpt_oss_bias("gpt_oss_mxfp4", "model.layers.0.mlp.experts.down_proj_bias", None, "is missing")]
#[case::router_bias("gpt_oss_mxfp4", "model.layers.0.mlp.router.bias", None, "is missing")]
#[case::nvfp4_nan(
    "qwen3_moe_nvfp4",
    "model.layers.0.mlp.experts.3.up_proj.weight_scale",
    Some(0x7f),
    "holds NaN"
)]
#[case::nvfp4_global(
    "qwen3_moe_nvfp4",
    "model.layers.0.mlp.experts.3.up_proj.weight_scale_2",
    None,
    "has no scale"
)]
#[case::input_scale(
    "qwen3_moe_nvfp4",
    "model.layers.0.mlp.experts.3.up_proj.input_scale",
    Some(0),
    "holds 0 at index 0"
)]
fn fp4_that_is_damaged(
    #[case] case: &str,
    #[case] name: &str,
    #[case] byte: Option<u8>,
    #[case] words: &str,
) {
    let copy = Copied::of(case);
    copy.edit_tensors(|tensors| match byte {
        Some(byte) => tensors.get_mut(name).unwrap().bytes.fill(byte),
        None => assert!(tensors.remove(name).is_some()),
    });
    refused(&copy, &[words]);
}

#[test]
fn weights_of_a_wrong_type() {
    let weight = format!("{UP}.weight");
    let copy = Copied::of(BF16);
    copy.edit_tensors(|tensors| tensors.get_mut(&weight).unwrap().dtype = Dtype::I16);
    refused(&copy, &[&weight, "wanted"]);
}

#[rstest]
#[case::unknown_quant_method("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "gptq")]
#[case::unknown_model_type("model_type", json!("llama"), "llama")]
#[case::model_type_that_is_no_text("model_type", json!(7), "model_type")]
#[case::hidden_size_of_text("hidden_size", json!("256"), "hidden_size")]
#[case::no_hidden_size("hidden_size", json!(0), "hidden_size")]
#[case::negative_hidden_size("hidden_size", json!(-1), "hidden_size")]
#[case::huge_hidden_size("hidden_size", json!(u64::MAX), "hidden_size")]
#[case::other_hidden_size("hidden_size", json!(64), "gate.weight")]
#[case::no_experts("n_routed_experts", json!(0), "n_routed_experts")]
#[case::more_experts_than_stored("n_routed_experts", json!(16), "gate.weight")]
#[case::top_k_above_experts("num_experts_per_tok", json!(9), "num_experts_per_tok")]
#[case::no_top_k("num_experts_per_tok", json!(0), "num_experts_per_tok")]
#[case::groups_that_do_not_divide("n_group", json!(5), "group")]
#[case::other_activation("hidden_act", json!("relu"), "relu")]
fn a_config_with_a_bad_value(#[case] key: &str, #[case] value: serde_json::Value, #[case] word: &str) {
    let copy = Copied::of(BF16);
    copy.edit_config(|config| {
        config.insert(key.into(), value);
    });
    refused(&copy, &[word]);
}

#[rstest]
fn a_config_without_a_key(
    #[values(
        "model_type",
        "hidden_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "num_experts_per_tok"
    )]
    key: &str,
) {
    let copy = Copied::of(BF16);
    copy.edit_config(|config| assert!(config.remove(key).is_some()));
    refused(&copy, &["config.json", key]);
}

#[test]
fn a_config_that_is_no_object() {
    let copy = Copied::of(BF16);
    for text in ["", "{", "[]", "null", "\"deepseek_v3\"", "\u{0}"] {
        std::fs::write(copy.path("config.json"), text).unwrap();
        refused(&copy, &["config.json"]);
    }
    std::fs::write(copy.path("config.json"), [0xff, 0xfe]).unwrap();
    refused(&copy, &["config.json"]);
}

#[test]
fn files_that_cannot_be_read() {
    for name in ["config.json", "model.safetensors", "input.safetensors"] {
        let copy = Copied::of(BF16);
        std::fs::remove_file(copy.path(name)).unwrap();
        refused(&copy, &[name.trim_end_matches(".safetensors")]);
        std::fs::create_dir(copy.path(name)).unwrap();
        refused(&copy, &[name]);
    }
}

#[cfg(unix)]
#[test]
fn files_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    for name in ["config.json", "model.safetensors", "input.safetensors"] {
        let copy = Copied::of(BF16);
        std::fs::set_permissions(copy.path(name), PermissionsExt::from_mode(0o000)).unwrap();
        // The superuser reads them nevertheless.
        if std::fs::File::open(copy.path(name)).is_err() {
            refused(&copy, &[name]);
        } else {
            copy.run().run().succeeded();
        }
    }
}

#[test]
fn no_checkpoint() {
    let empty = tempfile::tempdir().unwrap();
    for checkpoint in [empty.path(), &empty.path().join("nowhere"), Path::new("/dev/null")] {
        let run = Run { checkpoint: checkpoint.into(), ..Run::golden(BF16, &empty.path().join("out")) };
        // What the system says, once.
        assert_eq!(run.run().stderr.matches("os error").count(), 1);
        run.refused(2, &["config.json"]);
    }
}

#[rstest]
#[case::wide(Tensor::bf16(&[3, 257], vec![0.5; 771]), &["[3, 257]", "256"])]
#[case::narrow(Tensor::bf16(&[3, 255], vec![0.5; 765]), &["[3, 255]", "256"])]
#[case::no_columns(Tensor::bf16(&[3, 0], vec![]), &["[3, 0]", "256"])]
#[case::transposed(Tensor::bf16(&[256, 3], vec![0.5; 768]), &["[256, 3]", "256"])]
#[case::flat(Tensor::bf16(&[768], vec![0.5; 768]), &["[768]", "256"])]
#[case::batched(Tensor::bf16(&[1, 3, 256], vec![0.5; 768]), &["[1, 3, 256]", "256"])]
#[case::scalar(Tensor::bf16(&[], vec![0.5]), &["[]", "256"])]
#[case::f16(Tensor { dtype: Dtype::F16, ..Tensor::bf16(&[3, 256], vec![0.5; 768]) }, &["F16", "BF16"])]
#[case::i32(Tensor { dtype: Dtype::I32, ..Tensor::f32(&[3, 256], vec![0.5; 768]) }, &["I32", "BF16"])]
fn hidden_states_that_do_not_fit(#[case] hidden_states: Tensor, #[case] words: &[&str]) {
    let copy = Copied::of(BLOCK);
    copy.edit_hidden(|x| *x = hidden_states);
    refused(&copy, &[&["hidden_states", "input.safetensors"], words].concat());
}

#[test]
fn hidden_states_of_another_name() {
    let copy = Copied::of(BLOCK);
    let tensors = common::read(&copy.path("input.safetensors"));
    let renamed = [("x".to_string(), tensors["hidden_states"].clone())].into();
    common::write(&copy.path("input.safetensors"), &renamed);
    refused(&copy, &["hidden_states", "input.safetensors"]);
}

#[rstest]
fn hidden_states_that_are_not_finite(
    #[values(f32::NAN, f32::INFINITY, f32::NEG_INFINITY)] value: f32,
    #[values(BF16, BLOCK, PTPC)] case: &str,
) {
    let copy = Copied::of(case);
    for (token, element) in [(0, 0), (7, 31), (12, 255)] {
        let whole = common::read(&copy.path("input.safetensors"))["hidden_states"].clone();
        let (width, mut values) = (whole.shape[1], whole.values());
        let element = element.min(width - 1);
        values[token * width + element] = value;
        copy.edit_hidden(|x| *x = Tensor::bf16(&whole.shape, values.clone()));
        refused(&copy, &["hidden_states", &format!("token {token}"), &format!("element {element}")]);
        // The same as f32.
        copy.edit_hidden(|x| *x = Tensor::f32(&whole.shape, values));
        refused(&copy, &["hidden_states", &format!("token {token}")]);
        copy.edit_hidden(|x| *x = whole);
    }
}

/// Not looked for at load, which would read every weight once more; found in the output.
#[rstest]
#[case::expert(BF16, "experts.5.down_proj.weight")]
#[case::shared_expert(BF16, "shared_experts.down_proj.weight")]
#[case::fp8_expert(BLOCK, "experts.5.up_proj.weight")]
#[case::fp8_shared_expert(PTPC, "shared_experts.gate_proj.weight")]
fn weights_that_are_not_finite(#[case] case: &str, #[case] name: &str) {
    let copy = Copied::of(case);
    copy.edit_tensors(|tensors| {
        let weight = tensors.get_mut(&format!("model.layers.1.mlp.{name}")).unwrap();
        // NaN in bf16 and in e4m3fn.
        weight.bytes.fill(0xff);
    });
    for comm in COMMS {
        for ranks in [1, 8] {
            copy.run().with(&format!("--all2all {comm} --ep-size {ranks}")).refused(1, &["token", "NaN"]);
        }
    }
}

/// Only the ranks with tokens notice; those without must not wait for them.
#[test]
fn router_weights_that_are_not_finite() {
    let copy = Copied::of(BF16);
    copy.edit_tensors(|tensors| tensors.get_mut("model.layers.1.mlp.gate.weight").unwrap().bytes.fill(0xff));
    copy.edit_hidden(|x| *x = Tensor::bf16(&[3, x.shape[1]], vec![0.5; 3 * x.shape[1]]));
    for comm in COMMS {
        for ranks in [1, 8] {
            let run = copy.run().with(&format!("--all2all {comm} --ep-size {ranks}"));
            run.refused(2, &["router logit of token 0", "NaN"]);
        }
    }
}

/// Finite in f32, and not once it is rounded to bf16.
#[test]
fn hidden_states_beyond_bf16() {
    let copy = Copied::of(BLOCK);
    copy.edit_hidden(|x| {
        let values = x.values().into_iter().enumerate().map(|(i, x)| if i == 300 { f32::MAX } else { x });
        *x = Tensor::f32(&x.shape, values);
    });
    refused(&copy, &["hidden_states", "token 1", "inf"]);
}
