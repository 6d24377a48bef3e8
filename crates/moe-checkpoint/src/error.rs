//! Why a checkpoint cannot be used.

use std::path::PathBuf;

use fused_moe_core::QuantScheme;

/// Why a checkpoint cannot be used; every variant names the file, key or tensor, what was wanted and what was
/// found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The folder holds no weights under the names of the format.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The checkpoint's folder.
        dir: PathBuf,
    },
    /// A JSON file is too large to be what it should be.
    #[error("{} has {bytes} bytes, at most {limit} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest size that is read.
        limit: u64,
    },
    /// A file is not JSON, or not an object.
    #[error("{}: {why}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// A key that the model family needs is missing.
    #[error("{}: key {key} is missing", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key, with its other spellings.
        key: String,
    },
    /// A key has a value of the wrong kind.
    #[error("{}: {key} is {found}, wanted {wanted}", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should hold.
        wanted: String,
        /// What it holds.
        found: String,
    },
    /// Two spellings of one key contradict each other.
    #[error("{}: {first} and {second} mean the same and differ", path.display())]
    ConflictingKeys {
        /// The file.
        path: PathBuf,
        /// One spelling and its value.
        first: String,
        /// The other spelling and its value.
        second: String,
    },
    /// A layer that does not exist or has no experts.
    #[error(
        "layer {layer} is not an MoE layer; the model has {num_layers} layers, with experts: {moe_layers}"
    )]
    NotAMoeLayer {
        /// The layer asked for.
        layer: usize,
        /// Layers of the model.
        num_layers: usize,
        /// The MoE layers, as ranges.
        moe_layers: String,
    },
    /// An expert that the model does not have.
    #[error("expert {expert} does not exist, layer {layer} has {num_experts}")]
    NoSuchExpert {
        /// The layer.
        layer: usize,
        /// The expert asked for.
        expert: usize,
        /// Experts of the layer.
        num_experts: usize,
    },
    /// A weight file ends before its tensors do.
    #[error("{} is truncated: wanted {wanted} bytes, found {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that its header announces.
        wanted: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A weight file is not safetensors, or its header contradicts itself (overlapping tensors, an offset out of
    /// range, an unknown element type).
    #[error("{}: {why}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The index names a file that is not there.
    #[error("shard {} of tensor {tensor} is missing", path.display())]
    MissingShard {
        /// The file.
        path: PathBuf,
        /// A tensor that it should hold.
        tensor: String,
    },
    /// A tensor is in none of the files, or not in the file that the index names.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The file, or the index.
        path: PathBuf,
    },
    /// A tensor has the wrong shape.
    #[error("{}: tensor {tensor} is {found:?}, wanted {wanted}", path.display())]
    BadShape {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// The shapes that fit.
        wanted: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A tensor has an element type that cannot be used there.
    #[error("{}: tensor {tensor} is of {found}, wanted {wanted}", path.display())]
    BadDType {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// The element types that fit.
        wanted: &'static str,
        /// Its element type.
        found: String,
    },
    /// An FP8 or FP4 weight without one of its scales.
    #[error("{}: {dtype} tensor {tensor} has no scale, wanted one of {wanted}", path.display())]
    MissingScale {
        /// The weight.
        tensor: String,
        /// `FP8` or `FP4`.
        dtype: &'static str,
        /// Its file.
        path: PathBuf,
        /// Names that its scale could have.
        wanted: String,
    },
    /// A scale beside a weight that has no use for it.
    #[error("tensor {tensor} of {dtype} has a scale {scale}, wanted none")]
    UnexpectedScale {
        /// The weight.
        tensor: String,
        /// Its element type.
        dtype: String,
        /// The scale.
        scale: String,
    },
    /// Scales of the activations that were fixed when the model was quantised, where the weights are neither FP8
    /// with one scale per tensor nor NVFP4.
    #[error(
        "{what}: static activation scales go with NVFP4 and with FP8 of one weight scale per tensor, wanted \
         dynamic ones"
    )]
    StaticActivationScale {
        /// The tensor or the key that says so.
        what: String,
    },
    /// Two matrices of one layer are quantised differently.
    #[error("tensor {tensor} is quantised as {found}, {first} as {wanted}: one layer has one scheme")]
    MixedSchemes {
        /// The matrix that differs.
        tensor: String,
        /// Its scheme.
        found: QuantScheme,
        /// The first matrix of the layer.
        first: String,
        /// Its scheme.
        wanted: QuantScheme,
    },
    /// The tensors contradict what the checkpoint says about itself.
    #[error("tensor {tensor} is quantised as {found}, the configuration declares {declared}")]
    ConflictingSchemes {
        /// The first matrix of the layer.
        tensor: String,
        /// Its scheme.
        found: QuantScheme,
        /// What `quantization_config` or `hf_quant_config.json` says.
        declared: QuantScheme,
    },
    /// Rows that cannot be cut into whole scale groups.
    #[error("{}: tensor {tensor} has {cols} columns, wanted a multiple of {group}, which share a scale", path.display())]
    UnevenGroups {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// Columns of the matrix.
        cols: usize,
        /// Columns that share a scale.
        group: usize,
    },
    /// A scale or a bias that is not a usable number.
    #[error("{}: tensor {tensor} holds {value} at index {index}, wanted {wanted}", path.display())]
    BadValue {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// Position in row-major order.
        index: usize,
        /// The value there.
        value: f32,
        /// What is allowed.
        wanted: &'static str,
    },
    /// Something that can be read in two ways.
    #[error("{what} is ambiguous: {why}")]
    Ambiguous {
        /// The tensor, key or file.
        what: String,
        /// The two ways.
        why: String,
    },
    /// A form that is recognised but not supported.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// The tensor or key, with its value.
        what: String,
        /// What is supported instead.
        why: String,
    },
}

/// Result of reading a checkpoint.
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;
