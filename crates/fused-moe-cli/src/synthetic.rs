//! Small random checkpoints in the layout of Hugging Face, for the demo.

use std::path::Path;

use anyhow::{Context, anyhow};
use fused_moe::quant::{WeightQuantizer, WeightScales};
use fused_moe::{DType, Fp8Format, TensorView};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use safetensors::tensor::{Dtype, TensorView as FileTensor};
use serde_json::{Value, json};

/// A model to make up.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// What it is called in the demo's table.
    pub name: &'static str,
    /// The family it is shaped like.
    pub family: Family,
    /// Whether its experts are FP8 with one scale per 128x128 block.
    pub fp8_block: bool,
    /// Elements of a token.
    pub hidden: usize,
    /// Rows of an expert's gate projection.
    pub intermediate: usize,
    /// Experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
}

/// A family that the demo knows how to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Softmax, renormalised; no shared experts.
    Qwen3Moe,
    /// Grouped sigmoid with a correction bias; one shared expert; the first layer is dense.
    DeepSeekV3,
}

/// Tensors on their way into a file.
struct Tensors {
    random: Pcg64,
    named: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Tensors {
    fn add(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.named.push((name, dtype, shape.to_vec(), bytes));
    }

    /// Normal values with the variance that keeps a product with a unit vector at one.
    fn weights(&mut self, rows: usize, cols: usize) -> Vec<bf16> {
        let deviation = 1.0 / (cols as f32).sqrt();
        (0..rows * cols).map(|_| bf16::from_f32(normal(&mut self.random) * deviation)).collect()
    }

    fn projection(&mut self, name: &str, rows: usize, cols: usize, fp8_block: bool) -> anyhow::Result<()> {
        let values = self.weights(rows, cols);
        let shape = [rows, cols];
        if !fp8_block {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.add(format!("{name}.weight"), Dtype::BF16, &shape, bytes);
            return Ok(());
        }
        let mut codes = vec![0; rows * cols];
        let mut scales = vec![0f32; WeightScales::Block.count(rows, cols)];
        let view = TensorView::from_slice(&values, DType::Bf16, &shape)?;
        WeightQuantizer::new(Fp8Format::E4M3Fn, WeightScales::Block).quantize(
            view,
            &mut codes,
            &mut scales,
        )?;
        let scale_bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        self.add(format!("{name}.weight"), Dtype::F8_E4M3, &shape, codes);
        let scale_shape = WeightScales::Block.dims(rows, cols);
        self.add(format!("{name}.weight_scale_inv"), Dtype::F32, &scale_shape, scale_bytes);
        Ok(())
    }

    fn mlp(&mut self, prefix: &str, model: &Model) -> anyhow::Result<()> {
        let Model { hidden, intermediate, fp8_block, .. } = *model;
        self.projection(&format!("{prefix}.gate_proj"), intermediate, hidden, fp8_block)?;
        self.projection(&format!("{prefix}.up_proj"), intermediate, hidden, fp8_block)?;
        self.projection(&format!("{prefix}.down_proj"), hidden, intermediate, fp8_block)
    }
}

/// A standard normal value (Box and Muller).
pub fn normal(random: &mut Pcg64) -> f32 {
    let (u, v): (f32, f32) = (1.0 - random.random::<f32>(), random.random());
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

impl Model {
    /// The layer that has experts.
    fn layer(&self) -> usize {
        match self.family {
            Family::Qwen3Moe => 0,
            Family::DeepSeekV3 => 1,
        }
    }

    /// Writes `config.json` and `model.safetensors` with one MoE layer into `folder`.
    pub fn write(&self, folder: &Path, seed: u64) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let config = serde_json::to_vec_pretty(&self.config())?;
        std::fs::write(folder.join("config.json"), config)?;

        let mut tensors = Tensors { random: Pcg64::seed_from_u64(seed), named: Vec::new() };
        let prefix = format!("model.layers.{}.mlp", self.layer());
        let gate: Vec<u8> =
            tensors.weights(self.experts, self.hidden).iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.add(format!("{prefix}.gate.weight"), Dtype::BF16, &[self.experts, self.hidden], gate);
        if self.family == Family::DeepSeekV3 {
            let bias = (0..self.experts).flat_map(|_| (normal(&mut tensors.random) * 0.05).to_le_bytes());
            let bias: Vec<u8> = bias.collect();
            tensors.add(format!("{prefix}.gate.e_score_correction_bias"), Dtype::F32, &[self.experts], bias);
            tensors.mlp(&format!("{prefix}.shared_experts"), self)?;
        }
        for expert in 0..self.experts {
            tensors.mlp(&format!("{prefix}.experts.{expert}"), self)?;
        }

        let mut views = Vec::with_capacity(tensors.named.len());
        for (name, dtype, shape, bytes) in &tensors.named {
            let view = FileTensor::new(*dtype, shape.clone(), bytes).map_err(|e| anyhow!("{name}: {e}"))?;
            views.push((name, view));
        }
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
        Ok(())
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": true,
        });
        let own = match self.family {
            Family::Qwen3Moe => json!({
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": self.experts,
                "num_hidden_layers": 1,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }),
            Family::DeepSeekV3 => json!({
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                "n_routed_experts": self.experts,
                "n_shared_experts": 1,
                "n_group": 8,
                "topk_group": 4,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 1,
                "moe_layer_freq": 1,
                "num_hidden_layers": 2,
            }),
        };
        let fp8 = json!({"quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        }});
        let parts = [Some(own), self.fp8_block.then_some(fp8)];
        for part in parts.into_iter().flatten() {
            if let (Value::Object(config), Value::Object(part)) = (&mut config, part) {
                config.extend(part);
            }
        }
        config
    }
}
