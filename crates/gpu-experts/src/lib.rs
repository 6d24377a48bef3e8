//! Stage 3 of the pipeline: experts with the contract of AITER's `fused_moe` on a GPU.
//!
//! Rows arrive with the global ids of all their experts, quantised by the scheme. One call sorts (token, slot) pairs by local
//! expert, multiplies with gate and up, forms SiLU(gate) · up, rounds it to bf16, quantises it again, multiplies with down, and
//! returns one row per received row: weighted, and summed over those of its experts that this rank holds, in the order of
//! slots, in f32, rounded to bf16 once. So results are the same bits from run to run.
//!
//! | scheme | weight scale | activation scales |
//! |---|---|---|
//! | none (bf16) | | |
//! | fp8-block (E4M3) | 128x128 | 1x128 |
//! | fp8-ptpc (E4M3) | output channel | row |
//!
//! It runs on Hopper. [`pack`](fused_moe_core::ExpertsProvider::pack) uploads; a call works in what it is lent, on the stream
//! that it is lent: it allocates nothing, waits for nothing, and can be captured in a graph, which replays it on whatever is in
//! the same memory then. How many rows have arrived has to be known on the host, since it decides the grids.
//!
//! ```
//! use fused_moe_core::*;
//! use gpu_experts::GpuExperts;
//! use moe_kernels::Target;
//!
//! let experts = GpuExperts::new(Target::open(Device { kind: DeviceKind::Cuda, index: 0 }));
//! let config = MoeConfig {
//!     hidden: 256,
//!     intermediate: 100,
//!     top_k: 2,
//!     max_tokens_per_rank: 8,
//!     device: DeviceKind::Cuda,
//!     ..MoeConfig::new(ExpertPlacement::linear(8, 1)?)
//! };
//! let Support::Unsupported(reasons) = experts.supports(&config) else { unreachable!() };
//! // And that there is no device, where there is none.
//! assert_eq!(reasons[0].to_string(), "shape: needs intermediate a multiple of 128, found 100");
//! # Ok::<(), PlacementError>(())
//! ```
//!
//! What it does not do: other schemes, activations or biases; rows that dispatch has left for the experts to quantise; a
//! routing weight on the input; weights that lie on the device already. It never moves tokens between ranks.

mod error;
mod limits;

mod kernel;
mod weights;

mod provider;

pub use error::GpuExpertsError;
pub use provider::GpuExperts;

/// The name of this backend in plans, registries and errors: it has the contract of the host's experts of the same name.
pub const NAME: &str = "aiter";
