//! Tiny random checkpoints on disk, as a table of tensors that a test may change before it is written.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;

use half::bf16;
use moe_checkpoint::{Checkpoint, CheckpointError};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const HIDDEN: usize = 160;
pub const INTERMEDIATE: usize = 48;
/// A multiple of 32; twice it is not [`HIDDEN`].
pub const GPT_OSS_INTERMEDIATE: usize = 64;
pub const EXPERTS: usize = 4;
pub const LAYER: usize = 1;

/// One tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub fn bf16(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    }
}

/// How the projections are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weights {
    Bf16,
    Block,
    Channel,
    PerTensor,
    /// As [`Weights::PerTensor`], with a scale of the activations that is `1 / n` for the n-th matrix.
    Static,
    /// ModelOpt's, with such a scale too.
    Nvfp4,
}

/// A checkpoint before it is written.
pub struct Fixture {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
    rng: Pcg64,
}

impl Fixture {
    pub fn empty(config: Value) -> Self {
        let seed = rand::random();
        println!("seed {seed}");
        Self { config, tensors: BTreeMap::new(), rng: Pcg64::seed_from_u64(seed) }
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.rng.random_range(0.0..1.0)).collect()
    }

    pub fn put_bf16(&mut self, name: &str, shape: &[usize]) {
        let values = self.values(shape.iter().product());
        self.tensors.insert(name.to_owned(), Tensor::bf16(shape, &values));
    }

    pub fn put_f32(&mut self, name: &str, shape: &[usize]) {
        let values = self.values(shape.iter().product());
        self.tensors.insert(name.to_owned(), Tensor::f32(shape, &values));
    }

    pub fn put_codes(&mut self, name: &str, shape: &[usize]) {
        self.put_bytes(name, shape, Dtype::F8_E4M3, 0..=0x7e);
    }

    pub fn put_bytes(&mut self, name: &str, shape: &[usize], dtype: Dtype, range: RangeInclusive<u8>) {
        let bytes = (0..shape.iter().product()).map(|_| self.rng.random_range(range.clone())).collect();
        self.tensors.insert(name.to_owned(), Tensor { dtype, shape: shape.to_vec(), bytes });
    }

    fn put_input_scale(&mut self, base: &str) {
        let others = self.tensors.keys().filter(|name| name.ends_with(".input_scale")).count();
        let scale = Tensor::f32(&[], &[1.0 / (others + 1) as f32]);
        self.tensors.insert(format!("{base}.input_scale"), scale);
    }

    /// A projection `<base>.weight` with its scale.
    pub fn put_projection(&mut self, base: &str, [rows, cols]: [usize; 2], weights: Weights) {
        let name = format!("{base}.weight");
        if weights == Weights::Bf16 {
            return self.put_bf16(&name, &[rows, cols]);
        }
        if weights == Weights::Nvfp4 {
            self.put_bytes(&name, &[rows, cols / 2], Dtype::U8, 0..=0xff);
        } else {
            self.put_codes(&name, &[rows, cols]);
        }
        match weights {
            Weights::Bf16 => {}
            Weights::Nvfp4 => {
                self.put_bytes(&format!("{name}_scale"), &[rows, cols / 16], Dtype::F8_E4M3, 0..=0x7e);
                self.put_f32(&format!("{name}_scale_2"), &[]);
                self.put_input_scale(base);
            }
            Weights::Static => {
                self.put_bf16(&format!("{name}_scale"), &[]);
                self.put_input_scale(base);
            }
            Weights::Block => {
                self.put_f32(&format!("{name}_scale_inv"), &[rows.div_ceil(128), cols.div_ceil(128)]);
            }
            Weights::Channel => self.put_bf16(&format!("{name}_scale"), &[rows, 1]),
            Weights::PerTensor => self.put_f32(&format!("{name}_scale"), &[]),
        }
    }

    pub fn put_mlp(&mut self, base: &str, names: [&str; 3], intermediate: usize, weights: Weights) {
        let [gate, up, down] = names.map(|name| format!("{base}.{name}"));
        self.put_projection(&gate, [intermediate, HIDDEN], weights);
        self.put_projection(&up, [intermediate, HIDDEN], weights);
        self.put_projection(&down, [HIDDEN, intermediate], weights);
    }

    pub fn put_experts(&mut self, block: &str, names: [&str; 3], weights: Weights) {
        self.put_bf16(&format!("{block}.gate.weight"), &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            self.put_mlp(&format!("{block}.experts.{expert}"), names, INTERMEDIATE, weights);
        }
    }

    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// One tensor instead of another.
    pub fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.to_owned(), tensor);
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        assert!(self.tensors.remove(name).is_some(), "{name} was not there to begin with");
        self
    }

    pub fn write_config(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
    }

    pub fn write(&self) -> TempDir {
        let dir = TempDir::new().unwrap();
        self.write_config(dir.path());
        std::fs::write(dir.path().join("model.safetensors"), file(self.tensors.iter())).unwrap();
        dir
    }

    /// Opens the checkpoint and its layer [`LAYER`], reads all experts, and gives the error that one of them met.
    pub fn error(&self) -> String {
        let dir = self.write();
        let error = read_all(dir.path()).expect_err("the checkpoint was accepted");
        error.to_string().replace(&format!("{}/", dir.path().display()), "")
    }
}

pub fn read_all(dir: &Path) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(dir)?;
    let layer = checkpoint.layer(LAYER)?;
    for expert in 0..checkpoint.model().num_experts() {
        layer.expert(expert)?;
    }
    layer.shared_experts()?;
    Ok(())
}

/// A safetensors file of these tensors.
pub fn file<'a>(tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) -> Vec<u8> {
    let views = tensors.map(|(name, tensor)| {
        (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    serialize(views, None).unwrap()
}

pub const HF: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
pub const BLOCK: &str = "model.layers.1.mlp";

pub fn qwen3(weights: Weights) -> Fixture {
    let mut fixture = Fixture::empty(json!({
        "model_type": "qwen3_moe", "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 512, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "norm_topk_prob": true, "num_hidden_layers": 4, "decoder_sparse_step": 2, "hidden_act": "silu",
    }));
    fixture.put_experts(BLOCK, HF, weights);
    fixture
}

pub fn deepseek(version: usize, weights: Weights) -> Fixture {
    let mut fixture = Fixture::empty(json!({
        "model_type": format!("deepseek_v{version}"), "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 512, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2, "norm_topk_prob": version == 3, "num_hidden_layers": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 2, "routed_scaling_factor": 2.5,
        "topk_method": if version == 3 { "noaux_tc" } else { "group_limited_greedy" },
        "scoring_func": if version == 3 { "sigmoid" } else { "softmax" },
    }));
    fixture.put_experts(BLOCK, HF, weights);
    fixture.put_mlp(&format!("{BLOCK}.shared_experts"), HF, 2 * INTERMEDIATE, weights);
    if version == 3 {
        fixture.put_f32(&format!("{BLOCK}.gate.e_score_correction_bias"), &[EXPERTS]);
    }
    fixture
}

pub fn qwen2() -> Fixture {
    let mut fixture = qwen3(Weights::Bf16)
        .set("model_type", json!("qwen2_moe"))
        .set("norm_topk_prob", Value::Null)
        .set("mlp_only_layers", json!([3]))
        .set("shared_expert_intermediate_size", json!(96));
    fixture.put_mlp(&format!("{BLOCK}.shared_expert"), HF, 96, Weights::Bf16);
    fixture.put_f32(&format!("{BLOCK}.shared_expert_gate.weight"), &[1, HIDDEN]);
    fixture
}

/// Qwen3.5 as the hub has it: the language model is part of a larger one. Its experts are packed.
pub fn qwen3_5() -> Fixture {
    let mut text = qwen2().set("moe_intermediate_size", json!(INTERMEDIATE));
    text.tensors.retain(|name, _| !name.contains(".experts."));
    let packed = packed(INTERMEDIATE, Weights::Bf16).tensors;
    let all = packed.into_iter().chain(text.tensors);
    let config = text.config.as_object_mut().unwrap();
    config.retain(|key, _| !matches!(key.as_str(), "decoder_sparse_step" | "mlp_only_layers"));
    config.insert("model_type".into(), json!("qwen3_5_moe_text"));
    let mut fixture =
        Fixture::empty(json!({"model_type": "qwen3_5_moe", "text_config": text.config, "vision_config": {}}));
    fixture.tensors =
        all.map(|(name, tensor)| (name.replace("model.", "model.language_model."), tensor)).collect();
    fixture
}

/// gpt-oss in bf16, or in MXFP4 `blocks`.
pub fn gpt_oss(blocks: bool) -> Fixture {
    let mut fixture = Fixture::empty(json!({
        "model_type": "gpt_oss", "hidden_size": HIDDEN, "intermediate_size": GPT_OSS_INTERMEDIATE,
        "num_local_experts": EXPERTS, "experts_per_token": 2, "num_hidden_layers": 2, "swiglu_limit": 5.0,
        "hidden_act": "silu",
    }));
    fixture.put_bf16(&format!("{BLOCK}.router.weight"), &[EXPERTS, HIDDEN]);
    fixture.put_bf16(&format!("{BLOCK}.router.bias"), &[EXPERTS]);
    for (name, rows, cols) in
        [("gate_up_proj", 2 * GPT_OSS_INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, GPT_OSS_INTERMEDIATE)]
    {
        let name = format!("{BLOCK}.experts.{name}");
        fixture.put_bf16(&format!("{name}_bias"), &[EXPERTS, rows]);
        if blocks {
            fixture.put_bytes(
                &format!("{name}_blocks"),
                &[EXPERTS, rows, cols / 32, 16],
                Dtype::U8,
                0..=0xff,
            );
            fixture.put_bytes(&format!("{name}_scales"), &[EXPERTS, rows, cols / 32], Dtype::U8, 0..=0xfe);
        } else {
            fixture.put_bf16(&name, &[EXPERTS, cols, rows]);
        }
    }
    fixture
}

pub fn mixtral() -> Fixture {
    let mut fixture = Fixture::empty(json!({
        "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    }));
    fixture.put_experts("model.layers.1.block_sparse_moe", ["w1", "w3", "w2"], Weights::Bf16);
    fixture
}

pub fn olmoe() -> Fixture {
    let mut fixture = mixtral().set("model_type", json!("olmoe"));
    fixture.tensors.clear();
    fixture.put_experts(BLOCK, HF, Weights::Bf16);
    fixture
}

/// Qwen3 whose experts are packed; `weights` with whole blocks needs an intermediate size of 128.
pub fn packed(intermediate: usize, weights: Weights) -> Fixture {
    let mut fixture = qwen3(Weights::Bf16).set("moe_intermediate_size", json!(intermediate));
    fixture.tensors.retain(|name, _| name.ends_with("mlp.gate.weight"));
    for (name, rows, cols) in
        [("gate_up_proj", 2 * intermediate, HIDDEN), ("down_proj", HIDDEN, intermediate)]
    {
        let name = format!("{BLOCK}.experts.{name}");
        let shape = [EXPERTS, rows, cols];
        match weights {
            Weights::Bf16 => fixture.put_bf16(&name, &shape),
            _ => fixture.put_codes(&name, &shape),
        }
        match weights {
            Weights::Bf16 => {}
            Weights::Block => {
                let shape = [EXPERTS, rows.div_ceil(128), cols.div_ceil(128)];
                fixture.put_f32(&format!("{name}_scale_inv"), &shape);
            }
            Weights::Channel => fixture.put_f32(&format!("{name}.weight_scale"), &[EXPERTS, rows, 1]),
            _ => fixture.put_bf16(&format!("{name}_scale"), &[EXPERTS]),
        }
    }
    fixture
}
