//! Stages 1 and 3 of the pipeline: host experts with the contract of FlashInfer's TRTLLM-gen fused MoE.
//!
//! [`TrtllmExperts`] are *monolithic*: they take the logits of all experts, route by the method of the configuration,
//! run the experts of this rank, and return one row per received row, weighted and summed. Under expert parallelism
//! every rank gets every row and routes it alike; what it returns is a partial sum, so dispatch is an all-gather and
//! combine a reduce-scatter. [`TrtllmRoutedExperts`] are FlashInfer's *routed* form beside it, for everything that
//! routes elsewhere: ids and weights arrive with the rows.
//!
//! On real hardware these kernels exist for NVIDIA's SM100 family alone. This crate is their contract on the host: the
//! same limits ([`ROUTING`], [`SchemeLimits`]), the same numbering of rows ([`Permuter`]), the same weight
//! [layouts](layout). What a plan says here, it says there.
//!
//! | scheme | weight scale | activation scales before gemm1 | before gemm2 | sizes |
//! |---|---|---|---|---|
//! | none (bf16) | | | | hidden 64, intermediate 128 |
//! | fp8-block | 128x128 | 1x128 of a row | 1x128 of a (token, slot) | hidden 128, intermediate 128 |
//! | fp8-per-tensor-static | matrix | of the layer | of the layer | hidden 32, intermediate 16 |
//! | nvfp4 | 1x16, matrix | 1x16 of a row, of the layer | 1x16 of a (token, slot), of the layer | hidden 256, intermediate 64 |
//!
//! (Sizes are multiples of what the table says.) Whatever the scheme, there are a multiple of four experts, more
//! than a row takes, in equal ranges over the ranks, none of them redundant; the activation is SiLU, with NVFP4 also
//! its clamped form and gpt-oss's, and only there experts have biases. The routing
//! methods that are built in have limits of their own. Everything else is refused with its reason, never rounded to what
//! fits.
//!
//! Rows are permuted by expert, in the order of the tokens; gemm1 reads them where they arrived. The activation's output
//! is rounded to bf16 before it is quantised again. The last step gathers for every row what is its own and sums it in
//! slot order in f32 without atomics, so results are the same bits from run to run and for any number of threads.
//! FlashInfer rounds routing weights and unsummed rows to bf16; here both are f32.
//!
//! ```
//! use fused_moe_core::*;
//! use half::bf16;
//! use trtllm_experts::TrtllmExperts;
//!
//! # let placement = ExpertPlacement::linear(4, 1)?;
//! let routing = RoutingConfig {
//!     method: RoutingMethod::RenormalizeNaive,
//!     num_experts: 4,
//!     top_k: 1,
//!     // ...
//! #   groups: None, renormalize: true, routed_scaling_factor: 1.0, correction_bias: None,
//! };
//! let config = MoeConfig {
//!     hidden: 64,
//!     intermediate: 128,
//!     top_k: 1,
//!     routing: Some(routing),
//!     // ...
//! #   max_tokens_per_rank: 2, ..MoeConfig::new(placement)
//! };
//! let provider = TrtllmExperts::new();
//! let Support::Supported(caps) = provider.supports(&config) else { unreachable!() };
//! # let wires = vec![WireFormat::unquantized(DType::Bf16)];
//! let comm = PrepareCaps::host("comm", KernelKind::Monolithic, wires, 2);
//! let plan = negotiate(&config, &comm, &caps).unwrap();
//! let Experts::Monolithic(kernel) = provider.build(&config, &plan, Rank(0))? else { unreachable!() };
//!
//! // Expert e multiplies by e; SiLU of 64 · 64 is 64 · 64.
//! let ones = vec![bf16::ONE; 64 * 128];
//! let scaled: Vec<_> = (0..4).map(|e| vec![bf16::from_f32(e as f32 / 128.0); 64 * 128]).collect();
//! let matrix = |values, dims: &[usize]| -> Result<_, ViewError> {
//!     Ok(WeightMatrix::unquantized(TensorView::from_slice(values, DType::Bf16, dims)?))
//! };
//! let mut experts = Vec::new();
//! for down in &scaled {
//!     let (gate, up) = (matrix(&ones, &[128, 64])?, matrix(&ones, &[128, 64])?);
//!     experts.push(ExpertMatrices { gate, up, down: matrix(down, &[64, 128])? });
//! }
//! let weights = provider.pack(&config, Rank(0), &experts)?;
//!
//! // All logits are negative, and the second row is no row.
//! let (x, count) = (vec![bf16::ONE; 128], [1]);
//! let logits = [-9.0, -8.0, -7.0, -6.0, f32::NAN, 0.0, 0.0, 0.0];
//! let input = DispatchedMonolithic {
//!     hidden: TensorView::from_slice(&x, DType::Bf16, &[2, 64])?,
//!     scale: None,
//!     logits: TensorView::from_slice(&logits, DType::F32, &[2, 4])?,
//!     rows: ReceivedRows(TensorView::from_slice(&count, DType::I32, &[1])?),
//!     output: None,
//! };
//! let mut workspace = Workspace::new(DeviceKind::Host, kernel.workspace_bytes())?;
//! let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
//! let mut y = vec![bf16::NAN; 128];
//! kernel.apply(&mut cx, &weights, &input, TensorViewMut::from_slice(&mut y, DType::Bf16, &[2, 64])?)?;
//! assert!(y[..64].iter().all(|y| y.to_f32() == 3.0 * 64.0 * 64.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: fused shared experts, deferred finalize, MXFP8, MXFP4 and MXINT4, non-gated activations. It never
//! moves rows between ranks.

mod error;
mod limits;
mod permute;

pub mod layout;

mod compute;
mod support;
mod workspace;

mod monolithic;
mod provider;
mod routed;

pub use error::TrtllmError;
pub use limits::{ROUTING, RoutingLimits, SchemeLimits};
pub use permute::{
    Cta, NO_TOKEN, Permutation, PermuteBuffers, PermuteMemory, PermuteSizes, Permuter, tile_tokens_dim,
};
pub use provider::{TrtllmExperts, TrtllmRoutedExperts};

/// The name of the monolithic form in plans, registries and errors.
pub const NAME: &str = "trtllm";
/// The name of the routed form.
pub const NAME_ROUTED: &str = "trtllm_routed";
