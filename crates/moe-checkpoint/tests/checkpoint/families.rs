//! What is read from checkpoints of every family, against the tensors that were written.

use std::collections::BTreeSet;

use fused_moe_core::{ExpertGroups, Fp8Format, QuantScheme, RoutingMethod};
use half::bf16;
use moe_checkpoint::{Checkpoint, Matrix, ModelFamily, SharedExpertShape, WeightMatrix, WeightScale};
use rstest::rstest;
use serde_json::{Value, json};

use crate::fixture::*;

/// The values and scales of `matrix` against the tensors that were written for `base`.
fn assert_projection(fixture: &Fixture, base: &str, matrix: &WeightMatrix<'_>) {
    let name = format!("{base}.weight");
    let tensor = &fixture.tensors[&name];
    assert_eq!(matrix.name(), name);
    let pairs = if tensor.dtype == safetensors::Dtype::U8 { 2 } else { 1 };
    assert_eq!(tensor.shape, [matrix.rows(), matrix.cols() / pairs]);
    assert!(bytes(matrix.values()) == tensor.bytes, "{name} differs");
    let stored = |suffix: &str| floats(&fixture.tensors[&format!("{name}{suffix}")]);
    match matrix.scale() {
        None => assert!(!matches!(tensor.dtype, safetensors::Dtype::F8_E4M3 | safetensors::Dtype::U8)),
        Some(WeightScale::Block128(scales)) => assert_eq!(*scales, stored("_scale_inv")),
        Some(WeightScale::PerChannel(scales)) => assert_eq!(*scales, stored("_scale")),
        Some(WeightScale::PerTensor(scale)) => assert_eq!([*scale], *stored("_scale")),
        Some(WeightScale::Nv16 { blocks, global }) => {
            assert_eq!(bytes(blocks), fixture.tensors[&format!("{name}_scale")].bytes);
            assert_eq!([*global], *stored("_scale_2"));
        }
        Some(other) => panic!("unknown scale {other:?}"),
    }
}

/// All bytes of a matrix, without the gaps between its rows.
fn bytes(matrix: &Matrix<'_>) -> Vec<u8> {
    let view = matrix.view();
    (0..matrix.rows()).flat_map(|row| view.row_bytes(row).unwrap().to_vec()).collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype {
        safetensors::Dtype::F32 => {
            tensor.bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        _ => tensor.bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
    }
}

#[rstest]
#[case::mixtral(mixtral(), QuantScheme::Unquantized, ["w1", "w3", "w2"])]
#[case::qwen2(qwen2(), QuantScheme::Unquantized, HF)]
#[case::qwen3(qwen3(Weights::Bf16), QuantScheme::Unquantized, HF)]
#[case::qwen3_block(qwen3(Weights::Block), QuantScheme::Fp8Block(Fp8Format::E4M3Fn), HF)]
#[case::qwen3_channel(qwen3(Weights::Channel), QuantScheme::Fp8Ptpc(Fp8Format::E4M3Fn), HF)]
#[case::qwen3_tensor(qwen3(Weights::PerTensor), QuantScheme::Fp8PerTensor(Fp8Format::E4M3Fn), HF)]
#[case::qwen3_static(qwen3(Weights::Static), QuantScheme::Fp8PerTensorStatic(Fp8Format::E4M3Fn), HF)]
#[case::qwen3_nvfp4(qwen3(Weights::Nvfp4), QuantScheme::Nvfp4, HF)]
#[case::olmoe(olmoe(), QuantScheme::Unquantized, HF)]
#[case::deepseek_v2(deepseek(2, Weights::Bf16), QuantScheme::Unquantized, HF)]
#[case::deepseek_v3(deepseek(3, Weights::Block), QuantScheme::Fp8Block(Fp8Format::E4M3Fn), HF)]
fn every_tensor_is_what_was_written(
    #[case] fixture: Fixture,
    #[case] scheme: QuantScheme,
    #[case] names: [&str; 3],
) {
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    assert_eq!((layer.index(), layer.scheme()), (LAYER, scheme));
    assert_eq!(layer.gate().view().dims(), [EXPERTS, HIDDEN]);
    let block = if names == HF { BLOCK } else { "model.layers.1.block_sparse_moe" };
    for expert in 0..EXPERTS {
        let tensors = layer.expert(expert).unwrap();
        assert_eq!(tensors.scheme(), scheme);
        for (name, matrix) in names.iter().zip([&tensors.gate, &tensors.up, &tensors.down]) {
            assert_projection(&fixture, &format!("{block}.experts.{expert}.{name}"), matrix);
        }
    }
    let shared = layer.shared_experts().unwrap();
    assert_eq!(shared.is_some(), checkpoint.model().shared_expert.is_some());
    if let Some(shared) = shared {
        let qwen = shared.sigmoid_gate.is_some();
        let base = format!("{block}.{}", if qwen { "shared_expert" } else { "shared_experts" });
        for (name, matrix) in HF.iter().zip([&shared.mlp.gate, &shared.mlp.up, &shared.mlp.down]) {
            assert_projection(&fixture, &format!("{base}.{name}"), matrix);
        }
        if let Some(gate) = shared.sigmoid_gate {
            assert_eq!(gate.view().dims(), [1, HIDDEN]);
            let written = floats(&fixture.tensors[&format!("{base}_gate.weight")]);
            assert_eq!(gate.view().as_slice::<f32>().unwrap(), written);
        }
    }
}

#[rstest]
#[case::bf16(INTERMEDIATE, Weights::Bf16)]
#[case::channel(INTERMEDIATE, Weights::Channel)]
#[case::tensor(INTERMEDIATE, Weights::PerTensor)]
#[case::block(128, Weights::Block)]
#[case::square_down(HIDDEN, Weights::Bf16)]
fn packed_experts_are_gate_rows_then_up_rows(#[case] intermediate: usize, #[case] weights: Weights) {
    let fixture = packed(intermediate, weights);
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    let stored = |suffix: &str| &fixture.tensors[&format!("{BLOCK}.experts.{suffix}")];
    for expert in 0..EXPERTS {
        let tensors = layer.expert(expert).unwrap();
        for (matrix, name, first, total) in [
            (&tensors.gate, "gate_up_proj", 0, 2 * intermediate),
            (&tensors.up, "gate_up_proj", intermediate, 2 * intermediate),
            (&tensors.down, "down_proj", 0, HIDDEN),
        ] {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let values = stored(name);
            let row_bytes = cols * values.dtype.bitsize() / 8;
            for row in 0..rows {
                let at = (expert * total + first + row) * row_bytes;
                let view = matrix.values().view();
                assert_eq!(view.row_bytes(row).unwrap(), &values.bytes[at..at + row_bytes], "{name} {row}");
            }
            let written = |row: usize, col: usize| {
                let row = first + row;
                let (scales, at) = match weights {
                    Weights::Bf16 => return None,
                    Weights::Block => {
                        let [_, n, k] = stored(&format!("{name}_scale_inv")).shape[..] else { panic!() };
                        (format!("{name}_scale_inv"), (expert * n + row / 128) * k + col / 128)
                    }
                    Weights::Channel => (format!("{name}.weight_scale"), expert * total + row),
                    _ => (format!("{name}_scale"), expert),
                };
                Some(floats(stored(&scales))[at])
            };
            for (row, col) in [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 2)] {
                let got = matrix.scale().map(|scale| scale.at(row, col, cols));
                assert_eq!(got, written(row, col), "{name} {row} {col}");
            }
        }
    }
}

/// Found by fuzzing: one row's scale per channel was taken for one per matrix, which its declaration rules out.
#[test]
fn a_single_row_has_the_scale_that_the_config_declares() {
    let group = json!({ "weights": { "strategy": "channel" }, "input_activations": { "dynamic": true } });
    let declared = json!({ "quant_method": "compressed-tensors", "config_groups": { "g": group } });
    let mut fixture = qwen3(Weights::Bf16).set("moe_intermediate_size", json!(1));
    fixture.tensors.retain(|name, _| name.ends_with("mlp.gate.weight"));
    for expert in 0..EXPERTS {
        fixture.put_mlp(&format!("{BLOCK}.experts.{expert}"), HF, 1, Weights::Channel);
    }
    assert!(fixture.error().ends_with("one layer has one scheme"), "without a declaration it is either");
    read_all(fixture.set("quantization_config", declared).write().path()).unwrap();
}

/// The bf16 values of `columns` columns, and of one of them.
fn column(tensor: &Tensor, expert: usize, column: usize) -> Vec<f32> {
    let [_, rows, columns] = tensor.shape[..] else { panic!() };
    floats(tensor)[expert * rows * columns..][..rows * columns]
        .iter()
        .skip(column)
        .step_by(columns)
        .copied()
        .collect()
}

#[test]
fn bf16_gpt_oss_is_transposed_with_alternating_gate_and_up() {
    let fixture = gpt_oss(false);
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    assert_eq!(layer.scheme(), QuantScheme::Unquantized);
    assert_eq!(layer.gate_bias().unwrap(), floats(&fixture.tensors[&format!("{BLOCK}.router.bias")]));
    for expert in 0..EXPERTS {
        let tensors = layer.expert(expert).unwrap();
        for (matrix, name, first, step) in [
            (&tensors.gate, "gate_up_proj", 0, 2),
            (&tensors.up, "gate_up_proj", 1, 2),
            (&tensors.down, "down_proj", 0, 1),
        ] {
            let stored = &fixture.tensors[&format!("{BLOCK}.experts.{name}")];
            let bias = &fixture.tensors[&format!("{BLOCK}.experts.{name}_bias")];
            let values = matrix.values().view();
            for row in 0..matrix.rows() {
                let at = first + row * step;
                let got: Vec<f32> = values.row::<bf16>(row).unwrap().iter().map(|x| x.to_f32()).collect();
                assert_eq!(got, column(stored, expert, at), "{name} {row}");
                assert_eq!(matrix.bias().unwrap()[row], floats(bias)[expert * bias.shape[1] + at]);
            }
            assert_eq!(matrix.bias().unwrap().len(), matrix.rows());
        }
        assert_eq!((tensors.gate.rows(), tensors.gate.cols()), (GPT_OSS_INTERMEDIATE, HIDDEN));
        assert_eq!((tensors.down.rows(), tensors.down.cols()), (HIDDEN, GPT_OSS_INTERMEDIATE));
    }
}

#[test]
fn mxfp4_gpt_oss_is_mapped_with_alternating_gate_and_up() {
    let fixture = gpt_oss(true).set("quantization_config", json!({"quant_method": "mxfp4"}));
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    assert_eq!(
        (layer.scheme(), checkpoint.model().declared_scheme),
        (QuantScheme::Mxfp4, QuantScheme::Mxfp4)
    );
    let mut read = 0;
    for expert in 0..EXPERTS {
        let tensors = layer.expert(expert).unwrap();
        for (matrix, name, first, step) in [
            (&tensors.gate, "gate_up_proj", 0, 2),
            (&tensors.up, "gate_up_proj", 1, 2),
            (&tensors.down, "down_proj", 0, 1),
        ] {
            let blocks = &fixture.tensors[&format!("{BLOCK}.experts.{name}_blocks")];
            let scales = &fixture.tensors[&format!("{BLOCK}.experts.{name}_scales")];
            let bias = &fixture.tensors[&format!("{BLOCK}.experts.{name}_bias")];
            let Some(WeightScale::Mx32(codes)) = matrix.scale() else { panic!("{:?}", matrix.scale()) };
            let total = scales.shape[1];
            for row in 0..matrix.rows() {
                let at = expert * total + first + row * step;
                let values = matrix.values().view();
                let bytes = matrix.cols() / 2;
                assert_eq!(values.row_bytes(row).unwrap(), &blocks.bytes[at * bytes..][..bytes]);
                let groups = matrix.cols() / 32;
                let stored = &scales.bytes[at * groups..][..groups];
                assert_eq!(codes.view().row_bytes(row).unwrap(), stored);
                let last = matrix.scale().unwrap().at(row, matrix.cols() - 1, matrix.cols());
                assert_eq!(last, 2f32.powi(i32::from(stored[groups - 1]) - 127));
                assert_eq!(matrix.bias().unwrap()[row], floats(bias)[at]);
            }
            read += blocks.bytes.len() / EXPERTS / step + scales.bytes.len() / EXPERTS / step;
            read += bias.bytes.len() / EXPERTS / step;
        }
    }
    assert_eq!(checkpoint.reads().bytes, read as u64);
}

#[test]
fn gpt_oss_has_one_layout_whatever_the_shape_allows() {
    // Hidden is twice the intermediate size, and hidden equals it: both packed tensors are square in turn.
    for intermediate in [HIDDEN / 2, HIDDEN] {
        let mut fixture = gpt_oss(false).set("intermediate_size", json!(intermediate));
        fixture.put_bf16(&format!("{BLOCK}.experts.gate_up_proj"), &[EXPERTS, HIDDEN, 2 * intermediate]);
        fixture.put_bf16(&format!("{BLOCK}.experts.gate_up_proj_bias"), &[EXPERTS, 2 * intermediate]);
        fixture.put_bf16(&format!("{BLOCK}.experts.down_proj"), &[EXPERTS, intermediate, HIDDEN]);
        let dir = fixture.write();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let up = checkpoint.layer(LAYER).unwrap().expert(1).unwrap().up;
        let stored = &fixture.tensors[&format!("{BLOCK}.experts.gate_up_proj")];
        let row: Vec<f32> = up.values().view().row::<bf16>(3).unwrap().iter().map(|x| x.to_f32()).collect();
        assert_eq!(row, column(stored, 1, 7));
    }
}

#[test]
fn qwen3_5_is_read_out_of_a_larger_model() {
    let fixture = qwen3_5();
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let model = checkpoint.model();
    assert_eq!((model.family, model.moe_layers_in_words().as_str()), (ModelFamily::Qwen3_5Moe, "0..=3"));
    assert_eq!(model.routing.method, RoutingMethod::RenormalizeNaive);
    assert_eq!(model.shared_expert, Some(SharedExpertShape { intermediate: 96, sigmoid_gate: true }));
    read_all(dir.path()).unwrap();
    // The language model alone.
    let mut text = qwen3_5();
    text.config = text.config["text_config"].take();
    text.tensors =
        text.tensors.into_iter().map(|(n, t)| (n.replace("model.language_model.", "model."), t)).collect();
    read_all(text.write().path()).unwrap();
}

#[rstest]
#[case::fp8(Weights::Static, json!({"quant_method": "fp8", "activation_scheme": "static"}))]
#[case::fp8_undeclared(Weights::Static, json!(null))]
#[case::compressed(Weights::Static, json!({"quant_method": "compressed-tensors", "config_groups": {"g": {
    "weights": {"strategy": "tensor"}, "input_activations": {"dynamic": false, "strategy": "tensor"}}}}))]
#[case::modelopt(Weights::Static, json!({"quant_method": "modelopt", "quant_algo": "FP8"}))]
#[case::nvfp4(Weights::Nvfp4, json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}))]
#[case::nvfp4_undeclared(Weights::Nvfp4, json!(null))]
fn the_input_scale_is_the_layers_largest(#[case] weights: Weights, #[case] declared: Value) {
    let dir = qwen3(weights).set("quantization_config", declared).write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    assert!(checkpoint.reads().experts.is_empty());
    for expert in 0..EXPERTS {
        let tensors = layer.expert(expert).unwrap();
        // Written first: expert 0's gate, up and down, with 1, 1/2 and 1/3.
        let scales = [&tensors.gate, &tensors.up, &tensors.down].map(|m| m.input_scale().unwrap());
        assert_eq!(scales, [1.0, 1.0, 1.0 / 3.0]);
    }
}

#[test]
fn modelopt_may_declare_in_a_file_of_its_own() {
    let dir = qwen3(Weights::Nvfp4).write();
    let file = dir.path().join("hf_quant_config.json");
    let declare = |quantization: Value| {
        let object = json!({"producer": {"name": "modelopt"}, "quantization": quantization});
        std::fs::write(&file, object.to_string()).unwrap();
        Checkpoint::open(dir.path()).map(|checkpoint| checkpoint.model().declared_scheme)
    };
    let scheme = declare(json!({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}));
    assert_eq!(scheme.unwrap(), QuantScheme::Nvfp4);
    assert_eq!(declare(json!({"quant_algo": null})).unwrap(), QuantScheme::Unquantized);
    let refused = declare(json!({"quant_algo": "W4A16_AWQ"})).unwrap_err().to_string();
    assert!(
        refused.ends_with("quantization.quant_algo is \"W4A16_AWQ\", wanted \"NVFP4\" or \"FP8\""),
        "{refused}"
    );
}

#[test]
fn models_without_a_language_head_have_no_prefix() {
    let mut fixture = qwen3(Weights::Channel);
    let names = std::mem::take(&mut fixture.tensors);
    fixture.tensors = names.into_iter().map(|(n, t)| (n.replace("model.", ""), t)).collect();
    read_all(fixture.write().path()).unwrap();
}

#[test]
fn only_the_experts_that_are_asked_for_are_read() {
    let dir = deepseek(3, Weights::Block).write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    assert_eq!(checkpoint.reads(), moe_checkpoint::Reads::default());
    layer.expert(1).unwrap();
    layer.expert(3).unwrap();
    let reads = checkpoint.reads();
    assert_eq!(reads.experts, BTreeSet::from([(LAYER, 1), (LAYER, 3)]));
    assert_eq!(reads.bytes, 2 * (3 * HIDDEN * INTERMEDIATE + 3 * 2 * 4) as u64);
}

#[test]
fn misaligned_tensors_are_copied() {
    let mut fixture = qwen3(Weights::Bf16);
    fixture.put_f32("model.layers.1.mlp.gate.weight", &[EXPERTS, HIDDEN]);
    let dir = fixture.write();
    // The writer aligns its header; one blank less puts every tensor at an odd address.
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 1;
    bytes.insert(8 + length as usize - 1, b' ');
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let layer = checkpoint.layer(LAYER).unwrap();
    let gate = &fixture.tensors["model.layers.1.mlp.gate.weight"];
    assert_eq!(layer.gate().view().as_slice::<f32>().unwrap(), floats(gate));
    let expert = layer.expert(2).unwrap();
    assert_projection(&fixture, &format!("{BLOCK}.experts.2.up_proj"), &expert.up);
    let rounded = expert.up.values().to_bf16().unwrap();
    assert_eq!(rounded.len(), INTERMEDIATE * HIDDEN);
}

#[test]
fn other_types_are_rounded_to_bf16() {
    let name = format!("{BLOCK}.experts.0.up_proj.weight");
    let mut fixture = qwen3(Weights::Bf16);
    fixture.put_f32(&name, &[INTERMEDIATE, HIDDEN]);
    let want: Vec<bf16> = floats(&fixture.tensors[&name]).into_iter().map(bf16::from_f32).collect();
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let expert = checkpoint.layer(LAYER).unwrap().expert(0).unwrap();
    assert_eq!(*expert.up.values().to_bf16().unwrap(), *want);
    let codes = qwen3(Weights::Channel).write();
    let checkpoint = Checkpoint::open(codes.path()).unwrap();
    let expert = checkpoint.layer(LAYER).unwrap().expert(0).unwrap();
    assert!(expert.up.values().to_bf16().is_none());
}

#[rstest]
#[case::mixtral(mixtral(), RoutingMethod::RenormalizeNaive, "0, 1", 1.0)]
#[case::qwen3(qwen3(Weights::Bf16), RoutingMethod::RenormalizeNaive, "1, 3", 1.0)]
#[case::qwen3_as_it_is(qwen3(Weights::Bf16).set("norm_topk_prob", json!(false)), RoutingMethod::Default, "1, 3", 1.0)]
#[case::qwen2(qwen2(), RoutingMethod::Default, "1", 1.0)]
#[case::olmoe(olmoe(), RoutingMethod::Default, "0, 1", 1.0)]
#[case::gpt_oss(gpt_oss(true), RoutingMethod::Renormalize, "0, 1", 1.0)]
#[case::v2(deepseek(2, Weights::Bf16), RoutingMethod::GroupLimitedSoftmax, "1..=5", 2.5)]
#[case::v2_greedy(
    deepseek(2, Weights::Bf16).set("topk_method", json!("greedy")).set("n_group", json!(null)),
    RoutingMethod::Default, "1..=5", 2.5
)]
#[case::v3(deepseek(3, Weights::Bf16), RoutingMethod::DeepSeekV3, "1..=5", 2.5)]
#[case::v3_every_other(
    deepseek(3, Weights::Bf16).set("moe_layer_freq", json!(2)), RoutingMethod::DeepSeekV3, "2, 4", 2.5
)]
fn routing_and_layers(
    #[case] fixture: Fixture,
    #[case] method: RoutingMethod,
    #[case] layers: &str,
    #[case] factor: f32,
) {
    let dir = fixture.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let model = checkpoint.model();
    let words = model.moe_layers_in_words();
    assert_eq!((model.routing.method, words.as_str()), (method, layers));
    assert_eq!(model.routing.routed_scaling_factor, factor);
    assert_eq!((model.num_experts(), model.top_k()), (EXPERTS, 2));
    let grouped = matches!(method, RoutingMethod::DeepSeekV3 | RoutingMethod::GroupLimitedSoftmax);
    let groups = ExpertGroups { n_group: 2, topk_group: 1 };
    assert_eq!(model.routing.groups, grouped.then_some(groups));
    if method == RoutingMethod::DeepSeekV3 && model.is_moe_layer(LAYER) {
        let routing = checkpoint.layer(LAYER).unwrap().routing();
        let bias = &fixture.tensors[&format!("{BLOCK}.gate.e_score_correction_bias")];
        assert_eq!(routing.correction_bias, Some(floats(bias)));
        assert!(routing.renormalize);
    }
}

#[rstest]
#[case("num_local_experts")]
#[case("num_experts")]
#[case("n_routed_experts")]
fn spellings_of_the_number_of_experts(#[case] key: &str) {
    for mut fixture in [qwen3(Weights::Bf16), mixtral(), olmoe(), deepseek(3, Weights::Block)] {
        let config = fixture.config.as_object_mut().unwrap();
        config.retain(|k, _| !matches!(k.as_str(), "num_local_experts" | "num_experts" | "n_routed_experts"));
        config.insert(key.to_owned(), json!(EXPERTS));
        read_all(fixture.write().path()).unwrap();
    }
}

#[test]
fn shared_expert_shapes() {
    let open = |fixture: Fixture| {
        let dir = fixture.write();
        Checkpoint::open(dir.path()).unwrap().model().shared_expert
    };
    let shape = |intermediate, sigmoid_gate| Some(SharedExpertShape { intermediate, sigmoid_gate });
    assert_eq!(open(qwen2()), shape(96, true));
    assert_eq!(open(deepseek(3, Weights::Bf16)), shape(2 * INTERMEDIATE, false));
    assert_eq!(open(deepseek(3, Weights::Bf16).set("n_shared_experts", json!(null))), None);
    assert_eq!(open(mixtral()), None);
}

#[test]
fn shards_are_opened_when_they_are_needed() {
    let mut fixture = qwen3(Weights::Block);
    fixture.put_bf16("model.layers.3.mlp.gate.weight", &[EXPERTS, HIDDEN]);
    let dir = tempfile::TempDir::new().unwrap();
    fixture.write_config(dir.path());
    let shard_of = |name: &str| match () {
        () if name.contains("layers.3") => "never-written.safetensors",
        () if name.contains("experts.2") => "b.safetensors",
        () => "a.safetensors",
    };
    let map: serde_json::Map<_, _> =
        fixture.tensors.keys().map(|name| (name.clone(), json!(shard_of(name)))).collect();
    std::fs::write(dir.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string())
        .unwrap();
    for shard in ["a.safetensors", "b.safetensors"] {
        let tensors = fixture.tensors.iter().filter(|(name, _)| shard_of(name) == shard);
        std::fs::write(dir.path().join(shard), file(tensors)).unwrap();
    }
    read_all(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let message = checkpoint.layer(3).unwrap_err().to_string();
    assert!(
        message.contains("never-written.safetensors of tensor model.layers.3.mlp.gate.weight is missing")
    );

    std::fs::write(dir.path().join("b.safetensors"), file(std::iter::empty())).unwrap();
    let message = read_all(dir.path()).unwrap_err().to_string();
    assert!(
        message.ends_with("b.safetensors: tensor model.layers.1.mlp.experts.2.gate_proj.weight is missing")
    );
}
