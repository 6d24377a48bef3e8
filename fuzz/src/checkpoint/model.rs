//! Small models as tables of tensors, correct until they are edited.

use std::collections::BTreeMap;

use arbitrary::{Result, Unstructured};
use serde_json::{Map, Value, json};

use super::{Files, MAX_TENSOR_BYTES, safetensors};

/// Element types by the names of the format, with their bits.
const DTYPES: [(&str, usize); 8] = [
    ("BF16", 16),
    ("F16", 16),
    ("F32", 32),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("U8", 8),
    ("F64", 64),
];

/// Values that a key may be changed to.
fn odd_value(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=9)? {
        0 => Value::Null,
        1 => json!(u.int_in_range(0..=9u64)?),
        2 => json!(u64::from(u.arbitrary::<u32>()?)),
        3 => json!(u.arbitrary::<i64>()?),
        4 => json!(u.arbitrary::<f64>()?),
        5 => json!(u.arbitrary::<bool>()?),
        6 => json!([u.int_in_range(0..=200u32)?, 128]),
        7 => json!({ "quant_method": "fp8", "weight_block_size": [128, 128] }),
        8 => json!(["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe"][u.int_in_range(0..=4)?]),
        _ => json!(u.arbitrary::<&str>()?),
    })
}

#[derive(Debug)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
}

/// How the projections are stored.
#[derive(Clone, Copy, Debug)]
enum Weights {
    Plain(&'static str),
    Block,
    Channel,
    PerTensor,
}

/// A checkpoint before it is written.
#[derive(Debug)]
pub struct Model {
    config: Map<String, Value>,
    tensors: BTreeMap<String, Tensor>,
    experts: usize,
    /// Filled into all tensors.
    byte: u8,
}

impl Model {
    /// A model of one MoE layer that reads back as it is.
    pub fn draw(u: &mut Unstructured<'_>) -> Result<Self> {
        let hidden: usize = *u.choose(&[1, 3, 16, 130])?;
        let experts: usize = *u.choose(&[1, 2, 4])?;
        let (family, packed) = (u.int_in_range(0..=5)?, u.ratio(1, 3)?);
        let weights = match u.int_in_range(0..=5)? {
            0 => Weights::Plain("F16"),
            1 => Weights::Plain("F32"),
            2 => Weights::Block,
            3 => Weights::Channel,
            4 => Weights::PerTensor,
            _ => Weights::Plain("BF16"),
        };
        let intermediate: usize = match (packed, weights) {
            // Gate and up of a packed tensor share no block.
            (true, Weights::Block) => 128,
            _ => *u.choose(&[2, 5, 20])?,
        };
        let quantization = match weights {
            Weights::Plain(_) => Value::Null,
            Weights::Block => json!({ "quant_method": "fp8", "weight_block_size": [128, 128] }),
            Weights::PerTensor => json!({ "quant_method": "fp8" }),
            Weights::Channel => json!({ "quant_method": "compressed-tensors", "config_groups": { "g": {
                "weights": { "num_bits": 8, "strategy": "channel" }, "input_activations": { "dynamic": true },
            }}}),
        };
        let model_type = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"][family];
        let config = json!({
            "model_type": model_type, "hidden_size": hidden, "num_hidden_layers": 1,
            "intermediate_size": intermediate, "moe_intermediate_size": intermediate,
            "num_experts": experts, "num_experts_per_tok": 1, "quantization_config": quantization,
            "shared_expert_intermediate_size": 7, "n_shared_experts": 1, "first_k_dense_replace": 0,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
        });
        let Value::Object(config) = config else { unreachable!("an object was written") };
        // 0x38 is 1 in E4M3 and a positive number in every other type.
        let mut model = Self { config, tensors: BTreeMap::new(), experts, byte: 0x38 };

        let (block, names) = match family {
            0 => ("model.layers.0.block_sparse_moe", ["w1", "w3", "w2"]),
            _ => ("model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        model.put(format!("{block}.gate.weight"), "BF16", &[experts, hidden]);
        if packed {
            let gate_up = format!("{block}.experts.gate_up_proj");
            model.put_matrix(gate_up, &[experts], [2 * intermediate, hidden], weights);
            let down = format!("{block}.experts.down_proj");
            model.put_matrix(down, &[experts], [hidden, intermediate], weights);
        } else {
            for expert in 0..experts {
                let base = format!("{block}.experts.{expert}");
                model.put_mlp(&base, names, (hidden, intermediate), weights);
            }
        }
        let projections = ["gate_proj", "up_proj", "down_proj"];
        match family {
            1 => {
                model.put_mlp(&format!("{block}.shared_expert"), projections, (hidden, 7), weights);
                model.put(format!("{block}.shared_expert_gate.weight"), "F32", &[1, hidden]);
            }
            4 | 5 => model.put_mlp(
                &format!("{block}.shared_experts"),
                projections,
                (hidden, intermediate),
                weights,
            ),
            _ => {}
        }
        if family == 5 {
            model.put(format!("{block}.gate.e_score_correction_bias"), "F32", &[experts]);
        }
        Ok(model)
    }

    fn put(&mut self, name: String, dtype: &str, shape: &[usize]) {
        self.tensors.insert(name, Tensor { dtype: dtype.to_owned(), shape: shape.to_vec() });
    }

    fn put_mlp(
        &mut self,
        base: &str,
        names: [&str; 3],
        (hidden, intermediate): (usize, usize),
        weights: Weights,
    ) {
        let shapes = [[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]];
        for (name, shape) in names.into_iter().zip(shapes) {
            self.put_matrix(format!("{base}.{name}.weight"), &[], shape, weights);
        }
    }

    /// A matrix, or one per expert if `lead` counts them, with its scale.
    fn put_matrix(&mut self, name: String, lead: &[usize], [rows, cols]: [usize; 2], weights: Weights) {
        let shape = |tail: &[usize]| [lead, tail].concat();
        match weights {
            Weights::Plain(_) => {}
            Weights::Block => {
                let blocks = shape(&[rows.div_ceil(128), cols.div_ceil(128)]);
                self.put(format!("{name}_scale_inv"), "F32", &blocks);
            }
            Weights::Channel => self.put(format!("{name}_scale"), "BF16", &shape(&[rows, 1])),
            Weights::PerTensor => self.put(format!("{name}_scale"), "F32", lead),
        }
        let dtype = if let Weights::Plain(dtype) = weights { dtype } else { "F8_E4M3" };
        self.put(name, dtype, &shape(&[rows, cols]));
    }

    /// Up to four changes; whether there were any.
    pub fn edit(&mut self, u: &mut Unstructured<'_>) -> Result<bool> {
        let edits = u.int_in_range(0..=4)?;
        for _ in 0..edits {
            let at = u.int_in_range(0..=self.tensors.len() - 1)?;
            let name = self.tensors.keys().nth(at).cloned().unwrap_or_default();
            let Some(tensor) = self.tensors.get_mut(&name) else { continue };
            match u.int_in_range(0..=6)? {
                0 => tensor.dtype = u.choose(&DTYPES)?.0.to_owned(),
                1 => tensor.shape.push(u.int_in_range(0..=3)?),
                2 => drop(tensor.shape.pop()),
                3 => {
                    for size in &mut tensor.shape {
                        *size = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=9)? };
                    }
                }
                4 if self.tensors.len() > 1 => drop(self.tensors.remove(&name)),
                5 => self.byte = u.arbitrary()?,
                _ => {
                    let at = u.int_in_range(0..=self.config.len() - 1)?;
                    if let Some((_, value)) = self.config.iter_mut().nth(at) {
                        *value = odd_value(u)?;
                    }
                }
            }
        }
        Ok(edits > 0)
    }

    /// Experts that a reader of all layers meets.
    pub fn expected_reads(&self) -> usize {
        self.experts
    }

    /// The files, whose tensors lie one behind the other.
    pub(super) fn files(&self) -> Files {
        let mut end = 0usize;
        let header: Map<String, Value> = self
            .tensors
            .iter()
            .map(|(name, Tensor { dtype, shape })| {
                let bits = DTYPES.iter().find(|(known, _)| known == dtype).map_or(8, |(_, bits)| *bits);
                let len = shape.iter().fold(bits / 8, |len, &size| len.saturating_mul(size));
                let start = end;
                end = end.saturating_add(len);
                (name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }))
            })
            .collect();
        let tensors = vec![self.byte; end.min(MAX_TENSOR_BYTES)];
        Files {
            config: Value::Object(self.config.clone()).to_string().into_bytes(),
            weights: safetensors(Value::Object(header).to_string().as_bytes(), &tensors),
            index: None,
        }
    }
}
