//! Stages 2 and 4: dispatch and combine with the contract of DeepEP's low-latency mode, over any transport with puts.
//!
//! Experts receive the batched format: `[local_experts, max_tokens_per_rank · ranks, hidden]`, one row for every
//! (token, slot) pair that names the expert, and how many rows each expert has. Tokens that hit several experts of a
//! rank are sent as often.
//!
//! 1. *Dispatch.* Every rank has a window of `max_tokens_per_rank` rows in every batch, so it knows where its rows go
//!    without asking. It quantises its tokens, puts the rows, and then its count of rows for each expert.
//! 2. The receiver closes the gaps between the windows. An expert's rows are thus in the order of source ranks, and
//!    of the source's tokens: the same in every run.
//! 3. *Combine.* The ranks put every expert output back to the slot of the token that it belongs to. The token's
//!    owner multiplies with the routing weights, sums in slot order in f32, and rounds once.
//!
//! Nothing is reserved or added atomically and no rank reads another's memory, so ranks may be on several nodes.
//!
//! ```
//! use batched_comm::Batched;
//! use ep_transport::{ThreadOptions, run_ranks};
//! use fused_moe_core::*;
//!
//! # fn config() -> MoeConfig {
//! #     MoeConfig {
//! #         hidden: 8, intermediate: 8, top_k: 2, max_tokens_per_rank: 4,
//! #         ..MoeConfig::new(ExpertPlacement::linear(4, 2).unwrap())
//! #     }
//! # }
//! let config = config();
//! let mut experts = ExpertsCaps::host("mine", vec![WireFormat::unquantized(DType::Bf16)]);
//! experts.format = ActivationFormat::BatchedExperts;
//! experts.weight_and_reduce = TopKWeightAndReduce::delegate();
//! let plans = run_ranks(2, ThreadOptions::default(), |group| {
//!     let (plan, _dispatch_combine) = maybe_make_prepare_finalize(&[&Batched], &config, &experts, &group)?;
//!     Ok::<_, MakeError>((plan.comm(), plan.max_rows()))
//! })?;
//! assert!(plans.iter().all(|plan| matches!(plan, Ok(("batched", 8)))));
//! # Ok::<(), ep_transport::TransportError>(())
//! ```
//!
//! Not here: monolithic layers, quantised combine, a buffer for the experts to write into. The memory of a rank grows
//! with its experts times the tokens of all ranks, which suits decoding.

mod buffers;
mod low_latency;
mod provider;

pub use provider::Batched;

/// The name of this backend in plans, registries and errors.
pub const NAME: &str = "batched";
