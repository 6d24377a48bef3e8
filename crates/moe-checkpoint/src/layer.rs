//! One MoE layer: its gate, its experts, its shared expert.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fused_moe_core::{DType, QuantScheme, RoutingConfig};
use safetensors::tensor::Dtype;

use crate::config::{Config, MAX_CONFIG_BYTES, read_object};
use crate::error::{CheckpointError, Result};
use crate::files::TensorFiles;
use crate::matrix::{Allowed, Matrix, SmallTensor};
use crate::model::{ModelFamily, MoeModel};
use crate::names::{Names, mlp};
use crate::projection::WeightMatrix;
use crate::quantization::with_modelopt_file;
use crate::wanted::{Wanted, bad_shape};
use crate::weight::{Found, find};

/// An open checkpoint folder: `config.json`, and `model.safetensors` or shards with an index.
///
/// Weights are mapped, not read: only the tensors that are asked for are ever touched, and shards that no asked
/// tensor is in need not exist. The files must not change while the checkpoint is open.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    model: MoeModel,
    files: TensorFiles,
    reads: Mutex<Reads>,
}

/// What has been read of the experts of a checkpoint so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Routed experts that were asked for, as (layer, expert).
    pub experts: BTreeSet<(usize, usize)>,
    /// Bytes of their weights and scales; an expert that was asked for twice counts twice.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`CheckpointError`] for an unreadable, incomplete or contradictory `config.json`, an unknown `model_type` or
    /// `quant_method`, and missing or damaged weight files.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let object = read_object(&path, MAX_CONFIG_BYTES)?;
        let mut model = MoeModel::from_config(&Config::new(&path, &object))?;
        model.declared_scheme = with_modelopt_file(dir, model.declared_scheme)?;
        Ok(Self { dir: dir.to_owned(), model, files: TensorFiles::open(dir)?, reads: Mutex::default() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `config.json` says.
    pub fn model(&self) -> &MoeModel {
        &self.model
    }

    /// Layer `layer`, after checking by the files' headers that all its tensors are there and fit. Of their values
    /// only biases of the router and static activation scales, one number per matrix, are read.
    ///
    /// # Errors
    /// [`CheckpointError::NotAMoeLayer`], and the errors of any of its tensors.
    pub fn layer(&self, layer: usize) -> Result<MoeLayer<'_>> {
        MoeLayer::open(self, layer)
    }

    /// What has been read of the experts so far, by all threads.
    pub fn reads(&self) -> Reads {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One MoE layer of a [`Checkpoint`].
#[derive(Debug)]
pub struct MoeLayer<'c> {
    checkpoint: &'c Checkpoint,
    layer: usize,
    names: Names,
    scheme: QuantScheme,
    input_scales: InputScales,
    gate: Matrix<'c>,
    gate_bias: Option<Vec<f32>>,
    correction_bias: Option<Vec<f32>>,
}

/// The three projections of an expert, or of the shared expert.
#[derive(Clone, Debug)]
pub struct ExpertTensors<'c> {
    /// Gate projection, `[intermediate, hidden]`.
    pub gate: WeightMatrix<'c>,
    /// Up projection, `[intermediate, hidden]`.
    pub up: WeightMatrix<'c>,
    /// Down projection, `[hidden, intermediate]`.
    pub down: WeightMatrix<'c>,
}

/// The shared experts of a layer, as the one MLP that they are stored as.
#[derive(Clone, Debug)]
pub struct SharedExperts<'c> {
    /// The projections; their scheme need not be that of the routed experts.
    pub mlp: ExpertTensors<'c>,
    /// `[1, hidden]` bf16 or f32: the MLP's output is multiplied with sigmoid(x · gateᵀ) (Qwen2-MoE).
    pub sigmoid_gate: Option<Matrix<'c>>,
}

impl ExpertTensors<'_> {
    /// How the three projections are quantised.
    pub fn scheme(&self) -> QuantScheme {
        self.gate.scheme()
    }
}

/// Finds the projections of one MLP, which must be quantised alike.
fn find_mlp<'c>(
    files: &'c TensorFiles,
    wanted: [Wanted; 3],
    declared: QuantScheme,
) -> Result<[Found<'c>; 3]> {
    let [gate, up, down] = wanted;
    let found = [find(files, gate, declared)?, find(files, up, declared)?, find(files, down, declared)?];
    for other in &found[1..] {
        check_same_scheme(&found[0], other)?;
    }
    Ok(found)
}

fn check_same_scheme(first: &Found<'_>, other: &Found<'_>) -> Result<()> {
    if first.scheme() == other.scheme() {
        return Ok(());
    }
    Err(CheckpointError::MixedSchemes {
        tensor: other.tensor().to_owned(),
        found: other.scheme(),
        first: first.tensor().to_owned(),
        wanted: first.scheme(),
    })
}

/// Schemes that need to know something of the activations are declared wherever they are in use, and so must agree
/// with a declaration. FP8 with dynamic scales is told by the tensors alone. Layers may be left out of either.
fn check_declared(first: &Found<'_>, declared: QuantScheme) -> Result<()> {
    let found = first.scheme();
    let is_strict = |scheme| {
        matches!(scheme, QuantScheme::Mxfp4 | QuantScheme::Nvfp4 | QuantScheme::Fp8PerTensorStatic(_))
    };
    let unquantized = [found, declared].contains(&QuantScheme::Unquantized);
    if found == declared || unquantized || !(is_strict(found) || is_strict(declared)) {
        return Ok(());
    }
    Err(CheckpointError::ConflictingSchemes { tensor: first.tensor().to_owned(), found, declared })
}

/// Static scales of what gemm1 and gemm2 read: the largest of the matrices that share them.
#[derive(Clone, Copy, Debug, Default)]
struct InputScales {
    gemm1: Option<f32>,
    gemm2: Option<f32>,
}

impl InputScales {
    fn include(&mut self, [gate, up, down]: &[Found<'_>; 3]) -> Result<()> {
        let larger = |a: Option<f32>, b: Option<f32>| a.into_iter().chain(b).reduce(f32::max);
        self.gemm1 = larger(self.gemm1, larger(gate.input_scale()?, up.input_scale()?));
        self.gemm2 = larger(self.gemm2, down.input_scale()?);
        Ok(())
    }
}

fn read_mlp(found: [Found<'_>; 3], scales: InputScales) -> Result<ExpertTensors<'_>> {
    let [gate, up, down] = found;
    let (gate, up) = (gate.read(scales.gemm1)?, up.read(scales.gemm1)?);
    Ok(ExpertTensors { gate, up, down: down.read(scales.gemm2)? })
}

/// A matrix that is never quantised: bf16 or f32.
fn unquantized<'c>(files: &'c TensorFiles, name: &str, shape: [usize; 2]) -> Result<Matrix<'c>> {
    let stored = files.get(name)?;
    if stored.shape != shape {
        return Err(bad_shape(name, &stored, format!("{shape:?}")));
    }
    let dtype = match stored.dtype {
        Dtype::BF16 => DType::Bf16,
        Dtype::F32 => DType::F32,
        found => {
            return Err(CheckpointError::BadDType {
                tensor: name.to_owned(),
                path: stored.path.to_owned(),
                wanted: "BF16 or F32",
                found: format!("{found:?}"),
            });
        }
    };
    Ok(Matrix::new(shape[0], shape[1], dtype, stored.bytes))
}

impl<'c> MoeLayer<'c> {
    fn open(checkpoint: &'c Checkpoint, layer: usize) -> Result<Self> {
        let (model, files) = (&checkpoint.model, &checkpoint.files);
        if !model.is_moe_layer(layer) {
            return Err(CheckpointError::NotAMoeLayer {
                layer,
                num_layers: model.num_layers,
                moe_layers: model.moe_layers_in_words(),
            });
        }
        let names = Names::detect(files, model.family, layer)?;
        let gate = unquantized(files, &names.router("weight"), [model.num_experts(), model.hidden])?;
        let per_expert = |name: String| small_vector(files, &name, model.num_experts());
        let gate_bias = model.bias.then(|| per_expert(names.router("bias"))).transpose()?;
        let correction_bias = (model.family == ModelFamily::DeepSeekV3)
            .then(|| per_expert(names.router("e_score_correction_bias")))
            .transpose()?;
        let mut first: Option<Found<'_>> = None;
        let mut input_scales = InputScales::default();
        for expert in 0..model.num_experts() {
            let found = find_mlp(files, names.expert(expert, model), model.declared_scheme)?;
            input_scales.include(&found)?;
            let [gate, ..] = found;
            match &first {
                Some(first) => check_same_scheme(first, &gate)?,
                None => first = Some(gate),
            }
        }
        let scheme = first.as_ref().map_or(QuantScheme::Unquantized, Found::scheme);
        if let Some(first) = &first {
            check_declared(first, model.declared_scheme)?;
        }
        let layer = Self { checkpoint, layer, names, scheme, input_scales, gate, gate_bias, correction_bias };
        layer.find_shared()?;
        Ok(layer)
    }

    /// Number of the layer in the model.
    pub fn index(&self) -> usize {
        self.layer
    }

    /// The model that the layer is of.
    pub fn model(&self) -> &'c MoeModel {
        &self.checkpoint.model
    }

    /// How the routed experts are quantised, by their tensors.
    pub fn scheme(&self) -> QuantScheme {
        self.scheme
    }

    /// The router's weight, `[num_experts, hidden]` bf16 or f32.
    pub fn gate(&self) -> &Matrix<'c> {
        &self.gate
    }

    /// What is added to the router's logits, `[num_experts]` (gpt-oss).
    pub fn gate_bias(&self) -> Option<&[f32]> {
        self.gate_bias.as_deref()
    }

    /// DeepSeek-V3's `e_score_correction_bias`, `[num_experts]`.
    pub fn correction_bias(&self) -> Option<&[f32]> {
        self.correction_bias.as_deref()
    }

    /// The model's routing with this layer's correction bias.
    pub fn routing(&self) -> RoutingConfig {
        RoutingConfig { correction_bias: self.correction_bias.clone(), ..self.model().routing.clone() }
    }

    /// The projections of routed expert `expert`. Values stay mapped; scales are read and checked.
    ///
    /// # Errors
    /// [`CheckpointError::NoSuchExpert`], and [`CheckpointError::BadValue`] or [`CheckpointError::BadDType`] for
    /// its scales.
    pub fn expert(&self, expert: usize) -> Result<ExpertTensors<'c>> {
        let (model, layer) = (self.model(), self.layer);
        if expert >= model.num_experts() {
            let num_experts = model.num_experts();
            return Err(CheckpointError::NoSuchExpert { layer, expert, num_experts });
        }
        let wanted = self.names.expert(expert, model);
        let found = find_mlp(&self.checkpoint.files, wanted, model.declared_scheme)?;
        let bytes: u64 = found.iter().map(Found::bytes).sum();
        let tensors = read_mlp(found, self.input_scales)?;
        let mut reads = self.checkpoint.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.experts.insert((layer, expert));
        reads.bytes += bytes;
        Ok(tensors)
    }

    /// The shared experts, `None` if the model has none.
    ///
    /// # Errors
    /// As [`MoeLayer::expert`].
    pub fn shared_experts(&self) -> Result<Option<SharedExperts<'c>>> {
        let Some((found, sigmoid_gate)) = self.find_shared()? else { return Ok(None) };
        let mut scales = InputScales::default();
        scales.include(&found)?;
        Ok(Some(SharedExperts { mlp: read_mlp(found, scales)?, sigmoid_gate }))
    }

    fn find_shared(&self) -> Result<Option<([Found<'c>; 3], Option<Matrix<'c>>)>> {
        let (model, files) = (self.model(), &self.checkpoint.files);
        let prefix = &self.names.prefix;
        let Some(shape) = model.shared_expert else {
            let stray = format!("{prefix}shared_experts.gate_proj.weight");
            if files.contains(&stray) {
                return Err(CheckpointError::Ambiguous {
                    what: format!("the shared expert of layer {}", self.layer),
                    why: format!("config.json has none, but {stray} is there"),
                });
            }
            return Ok(None);
        };
        let base = match model.family {
            ModelFamily::Qwen2Moe | ModelFamily::Qwen3_5Moe => format!("{prefix}shared_expert"),
            _ => format!("{prefix}shared_experts"),
        };
        let projections = ["gate_proj", "up_proj", "down_proj"];
        let wanted = mlp(&base, projections, model.hidden, shape.intermediate);
        let found = find_mlp(files, wanted, model.declared_scheme)?;
        let gate = match shape.sigmoid_gate {
            true => Some(unquantized(files, &format!("{base}_gate.weight"), [1, model.hidden])?),
            false => None,
        };
        Ok(Some((found, gate)))
    }
}

/// A tensor of `len` finite values.
fn small_vector(files: &TensorFiles, name: &str, len: usize) -> Result<Vec<f32>> {
    let stored = files.get(name)?;
    if stored.shape != [len] {
        return Err(bad_shape(name, &stored, format!("[{len}]")));
    }
    SmallTensor { name, path: stored.path, dtype: stored.dtype, bytes: stored.bytes }.to_f32(Allowed::Finite)
}
