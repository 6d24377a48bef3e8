//! Stage 3 of the pipeline: host experts on the batched format, `[local_experts, max_rows, hidden]`.
//!
//! Rows arrive sorted: those of local expert `e` are the first `tokens_per_expert[e]` rows of its batch, and there is
//! one row for every (token, slot) pair. The experts multiply with gate and up, form the activation, round it to bf16,
//! multiply with down, and write each result to the row it came from. Rows behind an expert's count are neither read
//! nor written.
//!
//! Nothing is weighted or summed here: that is delegated to the combine, which knows the routing weights.
//!
//! FP8 weights stay one byte each, FP4 weights half a byte. Activations are quantised at two points by the same
//! scheme: before gemm1 (by dispatch where FP8 travels, else here) and, after the rounding to bf16, before gemm2. A
//! row of the result has the same bits whatever other rows, experts and threads take part, except with a dynamic scale
//! per tensor, which is that of all valid rows of the call. Biases are added to the scaled sums of their matrix;
//! padding is packed as zeros, so its outputs are zeros.
//!
//! ```
//! use batched_experts::BatchedExperts;
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
//! let provider = BatchedExperts::new();
//! let Support::Supported(caps) = provider.supports(&config) else { unreachable!() };
//! let mut comm = PrepareCaps::host("comm", KernelKind::Modular, vec![WireFormat::unquantized(DType::Bf16)], 2);
//! (comm.format, comm.combine) = (ActivationFormat::BatchedExperts, CombineKind::WeightAndReduce);
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
//! // Two rows of room for each of two experts; only the second expert got a row.
//! let (x, counts) = ([9.0, 9.0, f32::NAN, 9.0, 1.0, 3.0, 9.0, 9.0].map(bf16::from_f32), [0, 1]);
//! let received = Dispatched {
//!     hidden: TensorView::from_slice(&x, DType::Bf16, &[2, 2, 2])?,
//!     scale: None,
//!     arrived: Arrived::Batched { tokens: TokensPerExpert(TensorView::from_slice(&counts, DType::I32, &[2])?) },
//!     output: None,
//! };
//! let mut workspace = Workspace::new(DeviceKind::Host, kernel.workspace_bytes())?;
//! let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
//! let mut y = [bf16::ZERO; 8];
//! kernel.apply(&mut cx, &weights, &received, TensorViewMut::from_slice(&mut y, DType::Bf16, &[2, 2, 2])?)?;
//! assert_eq!(y.map(f32::from), [0.0, 0.0, 0.0, 0.0, 60.0, 120.0, 0.0, 0.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: the routing weight on the input, since rows carry none (a prepare/finalize backend may do it).
//! It never moves tokens between ranks.

mod error;
mod scheme;

mod kernel;
mod workspace;

mod provider;

pub use error::BatchedError;
pub use provider::BatchedExperts;

/// The name of this backend in plans, registries and errors.
pub const NAME: &str = "batched";
