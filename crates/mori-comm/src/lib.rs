//! Stages 2 and 4: dispatch and combine after MoRI-EP, over any transport that reaches its peers' memory.
//!
//! [`MoriBackend::HighThroughput`] and [`MoriBackend::LowLatency`] are the two names that engines know
//! (`mori_high_throughput`, `mori_low_latency`). Which kernel a name runs follows from the topology
//! ([`KernelType`]): inside a node both run *IntraNode*, between nodes *InterNodeV1* and *InterNodeV1LL*.
//!
//! IntraNode, on rank `r`, for each of its tokens:
//!
//! 1. find the ranks that hold the token's experts; each gets one copy, however many experts it holds;
//! 2. reserve rows on them with one atomic add per destination, quantise the token once, and write payload, scales,
//!    all k global ids, all k weights and the token's source id straight into their memory;
//! 3. say how many rows were written (a status under the round's number) and wait for everyone else's word.
//!
//! Combine reads the experts' output rows where they are, in slot order, sums in f32 and rounds once. It applies
//! no routing weight: the experts already weighted and reduced what a rank computed for a token.
//!
//! InterNodeV1 has a second hop. Between nodes a token travels once per node that it visits, to the *proxy*, the rank
//! in the same place of that node, in chunks of 64 that are one put with a signal each. The proxy hands it on inside
//! the node as IntraNode would. In combine the proxy sums what its node computed for the token, rounds the sum to bf16
//! and puts it back; the token's rank adds the sums of all nodes, its own rounded likewise, in node order. This needs
//! nothing between nodes but puts and signals. InterNodeV1LL does the same with whole windows of 64 tokens, whichever
//! nodes they visit. A padding id of −1 goes nowhere in any of them.
//!
//! ```
//! use ep_transport::{ThreadOptions, run_ranks};
//! use fused_moe_core::*;
//! use mori_comm::MoriBackend;
//!
//! # fn config() -> MoeConfig {
//! #     MoeConfig {
//! #         hidden: 8, intermediate: 8, top_k: 2, max_tokens_per_rank: 4,
//! #         ..MoeConfig::new(ExpertPlacement::linear(4, 2).unwrap())
//! #     }
//! # }
//! let config = config();
//! let experts = ExpertsCaps::host("mine", vec![WireFormat::unquantized(DType::Bf16)]);
//! let plans = run_ranks(2, ThreadOptions::default(), |group| {
//!     let providers: [&dyn PrepareFinalizeProvider; 1] = [&MoriBackend::HighThroughput];
//!     let (plan, _dispatch_combine) = maybe_make_prepare_finalize(&providers, &config, &experts, &group)?;
//!     Ok::<_, MakeError>(plan.comm())
//! })?;
//! assert!(plans.iter().all(|plan| matches!(plan, Ok("mori_high_throughput"))));
//! # Ok::<(), ep_transport::TransportError>(())
//! ```
//!
//! With [`CombineWire::Fp8Block`](fused_moe_core::CombineWire) every row that comes back, a rank's output or a node's
//! sum, is rounded to bf16 and then quantised, with a true scale for each 128 columns.
//!
//! With `max_received_rows` a rank has room for fewer rows than all tokens of all ranks; if more come, the round is an
//! error on all ranks.
//!
//! Not here: monolithic layers. Nodes of different sizes are refused.

mod kernel_type;
mod provider;
mod traffic;
pub mod tuning;

mod handle;
mod kernel;

mod nodes;
mod record;
mod sum;

mod buffers;
mod node;
mod rails;

pub use kernel_type::{KernelType, MoriBackend};
