//! Stage 3 of the pipeline: host experts with the contract of AITER's `fused_moe`.
//!
//! Rows arrive with the global ids of all their experts. The experts sort (token, slot) pairs by local expert
//! ([`MoeSorting`], under a [`SortPolicy`]), multiply with gate and up, form the activation, round it to bf16, multiply
//! with down, and return one row per received row: weighted, and summed over those of its experts that this rank
//! holds. A combine only adds up the rows of the ranks.
//!
//! FP8 weights stay one byte each, FP4 weights half a byte. Activations are quantised at two points by the same
//! scheme: before gemm1 (by dispatch where FP8 travels, else here) and, after the rounding to bf16, before gemm2.
//!
//! | scheme | weight scale | activation scales before gemm1 | before gemm2 |
//! |---|---|---|---|
//! | none (bf16) | | | |
//! | fp8-block | 128x128 | 1x128 of a row | 1x128 of a (token, slot) |
//! | fp8-ptpc | output channel | a row | a (token, slot) |
//! | fp8-per-tensor | matrix | the rows of a source rank, or of the call | all local (token, slot) pairs of the call |
//! | fp8-per-tensor-static | matrix | that of the layer | that of the layer |
//! | mxfp4 | 1x32 | (bf16) | (bf16) |
//! | nvfp4 | 1x16 and matrix | 1x16 of a row, and that of the layer | 1x16 of a (token, slot), and that of the layer |
//!
//! Activations of the core's [`Activation`](fused_moe_core::Activation) are all there. A bias is added to the scaled
//! sums of its matrix. With the routing weight on the input (AITER's `doweight_stage1`, top-1) it multiplies the sums
//! of gemm1 before their bias, and gemm2's are not weighted. Padding is packed as zeros, so its outputs are zeros.
//!
//! Sums are f32. The sum over experts is taken in slot order and rounded to bf16 once, so results are the same bits
//! from run to run and for any number of threads, and (without a scale per tensor) a row does not depend on the
//! other rows of its batch.
//!
//! ```
//! use aiter_experts::AiterExperts;
//! use fused_moe_core::*;
//! use half::bf16;
//!
//! # let placement = ExpertPlacement::linear(2, 1)?;
//! let config = MoeConfig {
//!     hidden: 2,
//!     intermediate: 1,
//!     top_k: 1,
//!     // ...
//! #   max_tokens_per_rank: 2, ..MoeConfig::new(placement)
//! };
//! let provider = AiterExperts::new();
//! let Support::Supported(caps) = provider.supports(&config) else { unreachable!() };
//! # let wires = vec![WireFormat::unquantized(DType::Bf16)];
//! let comm = PrepareCaps::host("comm", KernelKind::Modular, wires, 2);
//! let plan = negotiate(&config, &comm, &caps).unwrap();
//! let Experts::Modular(kernel) = provider.build(&config, &plan, Rank(0))? else { unreachable!() };
//!
//! let [gate, up, down] = [[20.0, 0.0], [0.0, 1.0], [1.0, 2.0]].map(|m| m.map(bf16::from_f32));
//! let matrix = |values, dims: &[usize]| -> Result<_, ViewError> {
//!     Ok(WeightMatrix::unquantized(TensorView::from_slice(values, DType::Bf16, dims)?))
//! };
//! let expert =
//!     ExpertMatrices { gate: matrix(&gate, &[1, 2])?, up: matrix(&up, &[1, 2])?, down: matrix(&down, &[2, 1])? };
//! let weights = provider.pack(&config, Rank(0), &[expert; 2])?;
//!
//! // The second row has no expert: -1.
//! let (x, count) = ([1.0, 3.0, f32::NAN, 0.0].map(bf16::from_f32), [2]);
//! let topk = TopK {
//!     ids: TensorView::from_slice(&[1, -1], DType::I32, &[2, 1])?,
//!     weights: TensorView::from_slice(&[0.5, 0.0], DType::F32, &[2, 1])?,
//! };
//! let received = Dispatched {
//!     hidden: TensorView::from_slice(&x, DType::Bf16, &[2, 2])?,
//!     scale: None,
//!     arrived: Arrived::Standard { topk, rows: ReceivedRows(TensorView::from_slice(&count, DType::I32, &[1])?) },
//!     output: None,
//! };
//! let mut workspace = Workspace::new(DeviceKind::Host, kernel.workspace_bytes())?;
//! let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
//! let mut y = [bf16::NAN; 4];
//! kernel.apply(&mut cx, &weights, &received, TensorViewMut::from_slice(&mut y, DType::Bf16, &[2, 2])?)?;
//! assert_eq!(y.map(f32::from), [30.0, 60.0, 0.0, 0.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: MXFP8 activations, integer weights, gates without a partner. It never moves tokens between
//! ranks. It runs on the CPU: nothing here was run on an AMD GPU.

mod error;
mod scheme;

mod kernel;
mod moe_sorting;
mod workspace;

mod provider;

pub use error::AiterError;
pub use moe_sorting::{
    MAX_BLOCK_M, MAX_TOKENS, MAX_TOP_K, MoeSorting, SortBatch, SortBuffers, SortMemory, SortPolicy,
    SortSizes, SortedTokenId, SortedTokens, UnknownSortPolicy,
};
pub use provider::AiterExperts;

/// The name of this backend in plans, registries and errors.
pub const NAME: &str = "aiter";
