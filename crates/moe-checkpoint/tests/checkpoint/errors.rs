//! Every way in which a checkpoint can be wrong is an error that names what, wanted and found.

use moe_checkpoint::{Checkpoint, CheckpointError};
use rstest::rstest;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::fixture::*;

fn fp8(tensor: &str) -> String {
    format!("{BLOCK}.experts.2.{tensor}")
}

fn filled(dtype: Dtype, shape: &[usize], byte: u8) -> Tensor {
    let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    Tensor { dtype, shape: shape.to_vec(), bytes: vec![byte; len] }
}

#[rstest]
#[case::model_type("model_type", json!("llama"), "model_type is \"llama\", wanted one of mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, qwen3_5_moe, gpt_oss, qwen3_5_moe_text")]
#[case::no_model_type("model_type", Value::Null, "key model_type is missing")]
#[case::experts(
    "num_experts",
    Value::Null,
    "key num_experts or num_local_experts or n_routed_experts is missing"
)]
#[case::no_experts("num_experts", json!(0), "num_experts is 0, wanted a positive whole number")]
#[case::huge("hidden_size", json!(1u64 << 40), "hidden_size is 1099511627776, wanted a positive whole number")]
#[case::kind("hidden_size", json!("160"), "hidden_size is \"160\", wanted a positive whole number")]
#[case::conflict("num_local_experts", json!(8), "num_experts = 4 and num_local_experts = 8 mean the same and differ")]
#[case::top_k("num_experts_per_tok", json!(5), "num_experts_per_tok is 5, wanted at most 4, the number of experts")]
#[case::activation("hidden_act", json!("gelu"), "hidden_act is \"gelu\", wanted \"silu\"")]
#[case::flag("norm_topk_prob", json!(1), "norm_topk_prob is 1, wanted true or false")]
#[case::layers("decoder_sparse_step", json!(0), "decoder_sparse_step is 0, wanted a positive whole number")]
#[case::not_this_layer("decoder_sparse_step", json!(3), "layer 1 is not an MoE layer; the model has 4 layers, with experts: 2")]
// Found by fuzzing: the layers of such a config were enumerated for minutes.
#[case::billions_of_layers("num_hidden_layers", json!(i32::MAX), "num_hidden_layers is 2147483647, wanted at most 16384")]
#[case::none("decoder_sparse_step", json!(9), "layer 1 is not an MoE layer; the model has 4 layers, with experts: none")]
#[case::method("quantization_config", json!({"quant_method": "gptq"}), "quantization_config.quant_method is \"gptq\", wanted one of fp8, compressed-tensors, modelopt, mxfp4")]
#[case::no_method("quantization_config", json!({"bits": 8}), "key quantization_config.quant_method is missing")]
#[case::block("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [64, 128]}), "quantization_config.weight_block_size is [64,128], wanted [128, 128]")]
#[case::static_blocks("quantization_config", json!({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]}), "quantization_config.activation_scheme = \"static\" with blocks: static activation scales go with NVFP4 and with FP8 of one weight scale per tensor, wanted dynamic ones")]
#[case::activations("quantization_config", json!({"quant_method": "fp8", "activation_scheme": "none"}), "quantization_config.activation_scheme is \"none\", wanted \"dynamic\" or \"static\"")]
#[case::algorithm("quantization_config", json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}), "quantization_config.quant_algo is \"MIXED_PRECISION\", wanted \"NVFP4\" or \"FP8\"")]
#[case::no_algorithm("quantization_config", json!({"quant_method": "modelopt"}), "key quantization_config.quant_algo is missing")]
#[case::group("quantization_config", json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}), "quantization_config.group_size is 32, wanted 16")]
#[case::bits("quantization_config", json!({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}), "quantization_config.config_groups.g.weights.num_bits is 4, wanted 8")]
#[case::groups("quantization_config", json!({"quant_method": "compressed-tensors"}), "quantization_config.config_groups is missing, wanted at least one group")]
#[case::static_group("quantization_config", json!({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"strategy": "channel"}, "input_activations": {"dynamic": false}}}}), "quantization_config.config_groups.g.input_activations.dynamic: static activation scales go with NVFP4 and with FP8 of one weight scale per tensor, wanted dynamic ones")]
#[case::static_tokens("quantization_config", json!({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"strategy": "tensor"}, "input_activations": {"dynamic": false, "strategy": "token"}}}}), "quantization_config.config_groups.g.input_activations.strategy is \"token\", wanted \"tensor\" with \"dynamic\": false")]
fn config_errors(#[case] key: &str, #[case] value: Value, #[case] message: &str) {
    let error = qwen3(Weights::Bf16).set(key, value).error();
    assert_eq!(error.strip_prefix("config.json: ").unwrap_or(&error), message);
}

#[rstest]
#[case("n_group", json!(3), "n_group is 3, wanted a divisor of 4, the number of experts")]
#[case("n_group", json!(-1), "n_group is -1, wanted a positive whole number")]
#[case("topk_group", json!(3), "topk_group is 3, wanted at most n_group = 2")]
#[case("num_experts_per_tok", json!(3), "num_experts_per_tok is 3, wanted at most 2, the experts of topk_group = 1 groups")]
#[case("scoring_func", json!("softmax"), "scoring_func is \"softmax\", wanted \"sigmoid\"")]
#[case("topk_method", json!("greedy"), "topk_method is \"greedy\", wanted \"noaux_tc\"")]
#[case("routed_scaling_factor", json!("2"), "routed_scaling_factor is \"2\", wanted a finite number")]
fn deepseek_config_errors(#[case] key: &str, #[case] value: Value, #[case] message: &str) {
    let error = deepseek(3, Weights::Bf16).set(key, value).error();
    assert_eq!(error, format!("config.json: {message}"));
}

#[rstest]
#[case::gate(qwen3(Weights::Bf16).without("model.layers.1.mlp.gate.weight"), "model.layers.1.mlp.gate.weight")]
#[case::mixtral(mixtral().without("model.layers.1.block_sparse_moe.gate.weight"), "model.layers.1.block_sparse_moe.gate.weight")]
#[case::expert(qwen3(Weights::Bf16).without(&fp8("down_proj.weight")), "model.layers.1.mlp.experts.2.down_proj.weight")]
#[case::first(qwen3(Weights::Bf16).without("model.layers.1.mlp.experts.0.gate_proj.weight"), "model.layers.1.mlp.experts.0.gate_proj.weight")]
#[case::packed(packed(48, Weights::Bf16).without("model.layers.1.mlp.experts.down_proj"), "model.layers.1.mlp.experts.down_proj")]
#[case::bias(deepseek(3, Weights::Bf16).without("model.layers.1.mlp.gate.e_score_correction_bias"), "model.layers.1.mlp.gate.e_score_correction_bias")]
#[case::shared(deepseek(2, Weights::Bf16).without("model.layers.1.mlp.shared_experts.up_proj.weight"), "model.layers.1.mlp.shared_experts.up_proj.weight")]
#[case::shared_gate(qwen2().without("model.layers.1.mlp.shared_expert_gate.weight"), "model.layers.1.mlp.shared_expert_gate.weight")]
fn missing_tensors(#[case] fixture: Fixture, #[case] tensor: &str) {
    assert_eq!(fixture.error(), format!("model.safetensors: tensor {tensor} is missing"));
}

#[rstest]
#[case::weight("gate_proj.weight", filled(Dtype::F8_E4M3, &[160, 48], 0), "is [160, 48], wanted [48, 160]")]
#[case::rank("gate_proj.weight", filled(Dtype::F8_E4M3, &[7680], 0), "is [7680], wanted [48, 160]")]
#[case::dtype("gate_proj.weight", filled(Dtype::F8_E5M2, &[48, 160], 0), "is of F8_E5M2, wanted BF16, F16, F32, F8_E4M3 or U8")]
#[case::packed_int4("gate_proj.weight", filled(Dtype::U8, &[48, 160], 0), "is [48, 160], wanted [48, 80] (pairs of FP4 codes)")]
#[case::int4("gate_proj.weight", filled(Dtype::I32, &[48, 20], 0), "is of I32, wanted BF16, F16, F32, F8_E4M3 or U8")]
#[case::blocks("gate_proj.weight_scale_inv", filled(Dtype::F32, &[2, 1], 0), "is [2, 1], wanted [1, 2] (one per 128x128 block)")]
#[case::rows("gate_proj.weight_scale_inv", filled(Dtype::F32, &[48, 1], 0), "is [48, 1], wanted [1, 2] (one per 128x128 block)")]
#[case::scale_dtype("down_proj.weight_scale_inv", filled(Dtype::F8_E8M0, &[2, 1], 0), "is of F8_E8M0, wanted F32, BF16 or F16")]
#[case::nan("down_proj.weight_scale_inv", Tensor::f32(&[2, 1], &[1.0, f32::NAN]), "holds NaN at index 1, wanted finite and not negative")]
#[case::infinite("down_proj.weight_scale_inv", Tensor::bf16(&[2, 1], &[f32::INFINITY, 1.0]), "holds inf at index 0, wanted finite and not negative")]
#[case::negative("down_proj.weight_scale_inv", Tensor::f32(&[2, 1], &[1.0, -2.0]), "holds -2 at index 1, wanted finite and not negative")]
fn bad_tensors(#[case] name: &str, #[case] tensor: Tensor, #[case] message: &str) {
    let error = qwen3(Weights::Block).with(&fp8(name), tensor).error();
    assert_eq!(error, format!("model.safetensors: tensor {} {message}", fp8(name)));
}

#[test]
fn wrong_channel_scale() {
    let name = fp8("up_proj.weight_scale");
    let error = qwen3(Weights::Channel).with(&name, filled(Dtype::F32, &[47, 1], 0)).error();
    let wanted = "[48, 1] (one per row), [] (one per matrix) or [1, 2] (one per 128x128 block)";
    assert_eq!(error, format!("model.safetensors: tensor {name} is [47, 1], wanted {wanted}"));
}

#[test]
fn fp8_without_a_scale() {
    let error = qwen3(Weights::Block).without(&fp8("up_proj.weight_scale_inv")).error();
    let (weight, base) = (fp8("up_proj.weight"), fp8("up_proj"));
    assert_eq!(
        error,
        format!(
            "model.safetensors: FP8 tensor {weight} has no scale, wanted one of {base}.weight_scale_inv, {base}.weight_scale"
        )
    );
}

#[test]
fn bf16_with_a_scale() {
    let name = fp8("up_proj.weight_scale");
    let error = qwen3(Weights::Bf16).with(&name, filled(Dtype::F32, &[48, 1], 0)).error();
    assert_eq!(error, format!("tensor {} of bf16 has a scale {name}, wanted none", fp8("up_proj.weight")));
}

#[test]
fn two_scales() {
    let name = fp8("up_proj.weight_scale");
    let error = qwen3(Weights::Block).with(&name, filled(Dtype::F32, &[48, 1], 0)).error();
    assert!(
        error.starts_with(&format!("the scale of {} is ambiguous: both ", fp8("up_proj.weight"))),
        "{error}"
    );
}

#[rstest]
#[case::channel(Weights::Channel)]
#[case::blocks(Weights::Block)]
#[case::unquantized(Weights::Bf16)]
fn a_static_scale_where_it_has_no_place(#[case] weights: Weights) {
    let name = fp8("up_proj.input_scale");
    let error = qwen3(weights).with(&name, filled(Dtype::F32, &[], 0)).error();
    assert_eq!(
        error,
        format!(
            "tensor {name}: static activation scales go with NVFP4 and with FP8 of one weight scale per tensor, \
             wanted dynamic ones"
        )
    );
}

#[rstest]
#[case::zero("up_proj.input_scale", Tensor::f32(&[], &[0.0]), "holds 0 at index 0, wanted finite and positive, as is 1 over it")]
#[case::tiny("down_proj.input_scale", Tensor::f32(&[1], &[1e-45]), "holds 0.000000000000000000000000000000000000000000001 at index 0, wanted finite and positive, as is 1 over it")]
#[case::infinite("gate_proj.input_scale", Tensor::bf16(&[1], &[f32::INFINITY]), "holds inf at index 0, wanted finite and positive, as is 1 over it")]
#[case::many("gate_proj.input_scale", Tensor::f32(&[2], &[1.0, 1.0]), "is [2], wanted [] (one per matrix)")]
#[case::global("gate_proj.weight_scale_2", Tensor::f32(&[48], &[1.0; 48]), "is [48], wanted [] (one per matrix)")]
#[case::global_nan("gate_proj.weight_scale_2", Tensor::f32(&[], &[f32::NAN]), "holds NaN at index 0, wanted finite and not negative, as is 2688 times it")]
#[case::groups("gate_proj.weight_scale", filled(Dtype::F8_E4M3, &[48, 5], 0), "is [48, 5], wanted [48, 10] (one per 16 columns)")]
#[case::e8m0("gate_proj.weight_scale", filled(Dtype::U8, &[48, 10], 0), "is of U8, wanted F8_E4M3")]
#[case::nan("gate_proj.weight_scale", filled(Dtype::F8_E4M3, &[48, 10], 0x7f), "holds NaN at index 0, wanted finite and not negative")]
#[case::negative("down_proj.weight_scale", filled(Dtype::F8_E4M3, &[160, 3], 0xb8), "holds -1 at index 0, wanted finite and not negative")]
#[case::unpacked("gate_proj.weight", filled(Dtype::U8, &[48, 160], 0), "is [48, 160], wanted [48, 80] (pairs of FP4 codes)")]
fn bad_nvfp4_tensors(#[case] name: &str, #[case] tensor: Tensor, #[case] message: &str) {
    let error = qwen3(Weights::Nvfp4).with(&fp8(name), tensor).error();
    assert_eq!(error, format!("model.safetensors: tensor {} {message}", fp8(name)));
}

#[rstest]
#[case("weight_scale")]
#[case("weight_scale_2")]
#[case("input_scale")]
fn nvfp4_without_one_of_its_scales(#[case] scale: &str) {
    let (weight, scale) = (fp8("up_proj.weight"), fp8(&format!("up_proj.{scale}")));
    let error = qwen3(Weights::Nvfp4).without(&scale).error();
    assert_eq!(error, format!("model.safetensors: FP4 tensor {weight} has no scale, wanted one of {scale}"));
}

#[test]
fn nvfp4_groups_must_be_whole() {
    let mut fixture = qwen3(Weights::Bf16).set("moe_intermediate_size", json!(40));
    fixture.tensors.retain(|name, _| name.ends_with("mlp.gate.weight"));
    for expert in 0..EXPERTS {
        fixture.put_mlp(&format!("{BLOCK}.experts.{expert}"), HF, 40, Weights::Nvfp4);
    }
    assert_eq!(
        fixture.error(),
        "model.safetensors: tensor model.layers.1.mlp.experts.0.down_proj.weight has 40 columns, wanted a multiple of \
         16, which share a scale"
    );
}

#[test]
fn two_levels_of_scales_belong_to_fp4() {
    let name = fp8("up_proj.weight_scale_2");
    let error = qwen3(Weights::PerTensor).with(&name, Tensor::f32(&[], &[1.0])).error();
    assert_eq!(
        error,
        format!("tensor {} of fp8_e4m3fn has a scale {name}, wanted none", fp8("up_proj.weight"))
    );
}

#[rstest]
#[case::nvfp4_as_fp8(Weights::Nvfp4, json!({"quant_method": "fp8", "activation_scheme": "dynamic"}), "nvfp4", "fp8-per-tensor")]
#[case::fp8_as_nvfp4(Weights::Channel, json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}), "fp8-ptpc", "nvfp4")]
#[case::static_as_dynamic(Weights::Static, json!({"quant_method": "fp8", "activation_scheme": "dynamic"}), "fp8-per-tensor-static", "fp8-per-tensor")]
#[case::dynamic_as_static(Weights::PerTensor, json!({"quant_method": "fp8", "activation_scheme": "static"}), "fp8-per-tensor", "fp8-per-tensor-static")]
fn tensors_that_contradict_the_configuration(
    #[case] weights: Weights,
    #[case] declared: Value,
    #[case] found: &str,
    #[case] wanted: &str,
) {
    let error = qwen3(weights).set("quantization_config", declared).error();
    let tensor = "model.layers.1.mlp.experts.0.gate_proj.weight";
    assert_eq!(
        error,
        format!("tensor {tensor} is quantised as {found}, the configuration declares {wanted}")
    );
}

#[test]
fn two_files_that_contradict_each_other() {
    let declared = json!({"quant_method": "fp8", "activation_scheme": "dynamic"});
    let dir = qwen3(Weights::Nvfp4).set("quantization_config", declared).write();
    let file = dir.path().join("hf_quant_config.json");
    std::fs::write(&file, json!({"quantization": {"quant_algo": "NVFP4"}}).to_string()).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::ConflictingKeys { .. }), "{error}");
    assert!(error.to_string().ends_with(
        "hf_quant_config.json: quantization.quant_algo = nvfp4 and quantization_config of config.json = \
         fp8-per-tensor mean the same and differ"
    ));
}

#[rstest]
#[case::swiglu("swiglu_limit", json!(0), "swiglu_limit is 0, wanted a number above 0")]
#[case::top_k("num_experts_per_tok", json!(4), "num_experts_per_tok = 4 and experts_per_token = 2 mean the same and differ")]
#[case::activation("hidden_act", json!("gelu"), "hidden_act is \"gelu\", wanted \"silu\"")]
fn gpt_oss_config_errors(#[case] key: &str, #[case] value: Value, #[case] message: &str) {
    assert_eq!(gpt_oss(true).set(key, value).error(), format!("config.json: {message}"));
}

#[rstest]
#[case::blocks("gate_up_proj_blocks", filled(Dtype::U8, &[4, 128, 80], 0), "is [4, 128, 80], wanted [4, 128, 5, 16] (pairs of FP4 codes)")]
#[case::odd("gate_up_proj_blocks", filled(Dtype::U8, &[4, 127, 5, 16], 0), "is [4, 127, 5, 16], wanted [4, 128, 5, 16] (pairs of FP4 codes)")]
#[case::dtype("down_proj_blocks", filled(Dtype::F8_E4M3, &[4, 160, 2, 16], 0), "is of F8_E4M3, wanted U8")]
#[case::scales("down_proj_scales", filled(Dtype::U8, &[4, 160, 4], 0), "is [4, 160, 4], wanted [4, 160, 2] (one per 32 columns)")]
#[case::scale_dtype("down_proj_scales", filled(Dtype::BF16, &[4, 160, 2], 0), "is of BF16, wanted U8 or F8_E8M0")]
#[case::nan("gate_up_proj_scales", filled(Dtype::U8, &[4, 128, 5], 0xff), "holds NaN at index 0, wanted finite")]
#[case::bias("gate_up_proj_bias", filled(Dtype::BF16, &[4, 64], 0), "is [4, 64], wanted [4, 128]")]
#[case::bias_nan("down_proj_bias", Tensor::f32(&[4, 160], &[f32::NAN; 640]), "holds NaN at index 0, wanted finite")]
fn bad_mxfp4_tensors(#[case] name: &str, #[case] tensor: Tensor, #[case] message: &str) {
    let name = format!("{BLOCK}.experts.{name}");
    let error = gpt_oss(true).with(&name, tensor).error();
    assert_eq!(error, format!("model.safetensors: tensor {name} {message}"));
}

#[rstest]
#[case(true, "router.weight")]
#[case(true, "router.bias")]
#[case(true, "experts.gate_up_proj_bias")]
#[case(true, "experts.down_proj_blocks")]
#[case(false, "experts.down_proj")]
#[case(false, "experts.down_proj_bias")]
fn missing_gpt_oss_tensors(#[case] blocks: bool, #[case] tensor: &str) {
    let name = format!("{BLOCK}.{tensor}");
    let error = gpt_oss(blocks).without(&name).error();
    assert_eq!(error, format!("model.safetensors: tensor {name} is missing"));
}

#[test]
fn mxfp4_that_does_not_fit() {
    let scales = format!("{BLOCK}.experts.gate_up_proj_scales");
    assert_eq!(
        gpt_oss(true).without(&scales).error(),
        format!(
            "model.safetensors: FP4 tensor {BLOCK}.experts.gate_up_proj_blocks has no scale, wanted one of {scales}"
        )
    );
    assert_eq!(
        gpt_oss(true).set("hidden_size", json!(144)).set("intermediate_size", json!(80)).error(),
        "model.safetensors: tensor model.layers.1.mlp.router.weight is [4, 160], wanted [4, 144]"
    );
    let mut ragged = gpt_oss(true).set("hidden_size", json!(144));
    ragged.put_bf16(&format!("{BLOCK}.router.weight"), &[EXPERTS, 144]);
    assert_eq!(
        ragged.error(),
        format!(
            "model.safetensors: tensor {BLOCK}.experts.gate_up_proj_blocks has 144 columns, wanted a multiple of 32, \
             which share a scale"
        )
    );
    let declared = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    assert_eq!(
        gpt_oss(true).set("quantization_config", declared).error(),
        format!(
            "tensor {BLOCK}.experts.gate_up_proj_blocks is quantised as mxfp4, the configuration declares nvfp4"
        )
    );
}

#[test]
fn gpt_oss_in_other_layouts() {
    let name = format!("{BLOCK}.experts.gate_up_proj");
    let both = gpt_oss(true).with(&name, filled(Dtype::BF16, &[4, 160, 128], 0)).error();
    assert_eq!(both, format!("the experts of layer 1 is ambiguous: both {name} and {name}_blocks are there"));
    let untransposed = gpt_oss(false).with(&name, filled(Dtype::BF16, &[4, 128, 160], 0)).error();
    assert_eq!(
        untransposed,
        format!("model.safetensors: tensor {name} is [4, 128, 160], wanted [4, 160, 128]")
    );
    let fp8 = gpt_oss(false).with(&name, filled(Dtype::F8_E4M3, &[4, 160, 128], 0)).error();
    assert_eq!(fp8, format!("model.safetensors: tensor {name} is of F8_E4M3, wanted BF16, F16 or F32"));
}

#[test]
fn packed_fp4_is_refused() {
    let name = format!("{BLOCK}.experts.gate_up_proj");
    let error = packed(INTERMEDIATE, Weights::Bf16).with(&name, filled(Dtype::U8, &[4, 96, 80], 0)).error();
    assert_eq!(error, format!("model.safetensors: tensor {name} is of U8, wanted BF16, F16, F32 or F8_E4M3"));
}

#[test]
fn qwen3_5_that_may_be_transposed() {
    let mut fixture = qwen3_5();
    fixture.config["text_config"]["moe_intermediate_size"] = json!(HIDDEN / 2);
    let experts = "model.language_model.layers.1.mlp.experts";
    fixture.put_bf16(&format!("{experts}.gate_up_proj"), &[EXPERTS, HIDDEN, HIDDEN]);
    fixture.put_bf16(&format!("{experts}.down_proj"), &[EXPERTS, HIDDEN, HIDDEN / 2]);
    assert_eq!(
        fixture.error(),
        format!(
            "the layout of packed tensor {experts}.gate_up_proj [4, 160, 160] is ambiguous: hidden size 160 is twice \
             the intermediate size 80, so it may be [experts, out, in] or [experts, in, out]"
        )
    );
}

#[rstest]
#[case::inside_an_expert("up_proj")]
#[case::between_experts("gate_proj")]
fn mixed_schemes(#[case] projection: &str) {
    let mut fixture = qwen3(Weights::Channel);
    let all = ["gate_proj", "up_proj", "down_proj"];
    let changed: &[&str] = if projection == "gate_proj" { &all } else { &[projection] };
    for projection in changed {
        fixture = fixture.without(&fp8(&format!("{projection}.weight_scale")));
        let shape = if *projection == "down_proj" { [HIDDEN, INTERMEDIATE] } else { [INTERMEDIATE, HIDDEN] };
        fixture.put_bf16(&fp8(&format!("{projection}.weight")), &shape);
    }
    let dir = fixture.write();
    let error = Checkpoint::open(dir.path()).unwrap().layer(LAYER).unwrap_err();
    assert!(matches!(error, CheckpointError::MixedSchemes { .. }), "{error}");
    let text = error.to_string();
    assert!(text.starts_with(&format!("tensor {}.weight is quantised as none", fp8(projection))), "{text}");
}

#[test]
fn packed_layouts_that_are_refused() {
    let ambiguous = packed(HIDDEN / 2, Weights::Bf16).error();
    assert_eq!(
        ambiguous,
        "the layout of packed tensor model.layers.1.mlp.experts.gate_up_proj [4, 160, 160] is ambiguous: \
         hidden size 160 is twice the intermediate size 80, so it may be [experts, out, in] or [experts, in, out]"
    );
    let mut fixture = packed(INTERMEDIATE, Weights::Bf16);
    fixture.put_bf16("model.layers.1.mlp.experts.gate_up_proj", &[EXPERTS, HIDDEN, 2 * INTERMEDIATE]);
    assert_eq!(
        fixture.error(),
        "packed tensor model.layers.1.mlp.experts.gate_up_proj [4, 160, 96], [experts, in, out] is not supported: \
         wanted [experts, out, in] = [4, 96, 160]"
    );
    let straddling = packed(INTERMEDIATE, Weights::Block).error();
    assert!(
        straddling.contains("gate and up have 48 rows each, which is no multiple of 128"),
        "{straddling}"
    );
    let mut both = packed(INTERMEDIATE, Weights::Bf16);
    both.put_bf16("model.layers.1.mlp.experts.0.gate_proj.weight", &[INTERMEDIATE, HIDDEN]);
    assert!(both.error().starts_with("the experts of layer 1 is ambiguous"), "{}", both.error());
}

#[test]
fn a_shared_expert_that_the_config_does_not_know() {
    let error = deepseek(3, Weights::Block).set("n_shared_experts", json!(0)).error();
    assert!(error.contains("config.json has none, but"), "{error}");
}

#[test]
fn layers_and_experts_that_do_not_exist() {
    let dir = deepseek(3, Weights::Bf16).write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for layer in [0, 6, usize::MAX] {
        let error = checkpoint.layer(layer).unwrap_err();
        assert!(matches!(error, CheckpointError::NotAMoeLayer { .. }), "{error}");
        assert!(error.to_string().ends_with("with experts: 1..=5"), "{error}");
    }
    let error = checkpoint.layer(1).unwrap().expert(4).unwrap_err();
    assert_eq!(error.to_string(), "expert 4 does not exist, layer 1 has 4");
}

#[test]
fn truncated_files() {
    let fixture = qwen3(Weights::Block);
    let dir = fixture.write();
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap());
    for (keep, wanted) in [
        (whole.len() - 1, whole.len() as u64),
        (8 + header as usize, whole.len() as u64),
        (100, 8 + header),
        (3, 8),
        (0, 8),
    ] {
        std::fs::write(&path, &whole[..keep]).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        let found = keep as u64;
        assert!(
            matches!(error, CheckpointError::Truncated { wanted: w, found: f, .. } if (w, f) == (wanted, found)),
            "{keep}: {error}"
        );
    }
}

#[rstest]
#[case::overlap(json!({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}), 12)]
#[case::gap(json!({"a": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}), 12)]
#[case::size(json!({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 8]}}), 8)]
#[case::overflow(json!({"a": {"dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, 8]}}), 8)]
#[case::dtype(json!({"a": {"dtype": "F8_E9M9", "shape": [8], "data_offsets": [0, 8]}}), 8)]
#[case::trailing(json!({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}), 9)]
#[case::not_an_object(json!([1, 2]), 0)]
fn headers_that_contradict_themselves(#[case] header: Value, #[case] data: usize) {
    let dir = qwen3(Weights::Bf16).write();
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Header { .. }), "{error}");
}

#[test]
fn a_header_length_without_end() {
    let dir = qwen3(Weights::Bf16).write();
    std::fs::write(dir.path().join("model.safetensors"), [0xff; 64]).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Header { .. }), "{error}");
}

#[test]
fn folders_without_what_they_need() {
    let dir = tempfile::TempDir::new().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(&error, CheckpointError::Io { path, .. } if path.ends_with("config.json")), "{error}");
    qwen3(Weights::Bf16).write_config(dir.path());
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::NoWeights { .. }), "{error}");
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Json { .. }), "{error}");
    let huge = std::fs::File::create(dir.path().join("config.json")).unwrap();
    huge.set_len(1 << 30).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::TooLarge { bytes, .. } if bytes == 1 << 30), "{error}");
}

#[rstest]
#[case(json!({"weight_map": {"a": "../secret.safetensors"}}))]
#[case(json!({"weight_map": {"a": "/etc/passwd"}}))]
#[case(json!({"weight_map": {"a": 3}}))]
#[case(json!({"weight_map": []}))]
#[case(json!({}))]
fn bad_indexes(#[case] index: Value) {
    let dir = tempfile::TempDir::new().unwrap();
    qwen3(Weights::Bf16).write_config(dir.path());
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Json { .. }), "{error}");
}
