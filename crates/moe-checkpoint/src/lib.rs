//! Hugging Face MoE checkpoints for the fused-moe pipeline: memory-mapped, one rank's experts at a time.
//!
//! [`Checkpoint::open`] reads `config.json` into a [`MoeModel`] and maps the safetensors files;
//! [`Checkpoint::layer`] checks one MoE layer by the headers alone; [`MoeLayer::expert`] gives the projections of
//! one routed expert. Eight families ([`ModelFamily`]); experts in tensors of their own or packed; bf16, f16 and
//! f32; FP8 E4M3 with one scale per 128x128 block, per output channel or per tensor, the last also with static
//! activation scales; MXFP4 as gpt-oss stores it and NVFP4 as ModelOpt does. The scheme of a matrix is told by its
//! element type and its scales.
//!
//! ```no_run
//! use moe_checkpoint::Checkpoint;
//!
//! let checkpoint = Checkpoint::open("Qwen3-30B-A3B-FP8")?;
//! let first = checkpoint.model().moe_layers().next().ok_or("no MoE layer")?;
//! let layer = checkpoint.layer(first)?;
//! println!("{}: {} experts, {}", checkpoint.model().family, layer.gate().rows(), layer.scheme());
//! let expert = layer.expert(5)?;
//! let codes = expert.gate.values().view();
//! println!("{:?} {} with {:?}", codes.dims(), codes.dtype(), expert.gate.scale());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: it converts nothing but scales (and the bf16 rounding of [`Matrix::to_bf16`]), packs
//! nothing for a kernel, knows nothing of ranks, and reads no attention, embedding or dense layer.

mod config;
mod error;
mod files;
mod layer;
mod matrix;
mod model;
mod names;
mod projection;
mod quantization;
mod wanted;
mod weight;

pub use error::{CheckpointError, Result};
pub use layer::{Checkpoint, ExpertTensors, MoeLayer, Reads, SharedExperts};
pub use matrix::Matrix;
pub use model::{ModelFamily, MoeModel, SharedExpertShape};
pub use projection::{WeightMatrix, WeightScale};
