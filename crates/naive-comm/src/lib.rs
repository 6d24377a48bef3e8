//! Stages 2 and 4: dispatch and combine that gather every token everywhere. Simple, and right on any
//! transport.
//!
//! | provider | name | ranks | dispatch | combine |
//! |---|---|---|---|---|
//! | [`Local`] | `local` | 1 | quantise in place | cast |
//! | [`AllGatherReduceScatter`] | `allgather_reducescatter` | any | all-gather | reduce-scatter |
//! | [`Naive`] | `naive` | any | all-gather | all-reduce |
//!
//! [`DeviceLocal`] is `local` in the memory of a GPU, for modular layers. On the host, all three serve modular layers (ids and weights travel with the tokens) and monolithic ones (logits do),
//! carry bf16 or the scheme's FP8 with its scales, and lend the experts their combine buffer. Expert outputs
//! travel in bf16 and are summed once, over the ranks in rank order in f32, so the same input gives the same
//! bits.
//!
//! ```
//! use fused_moe_core::*;
//! use half::bf16;
//! use naive_comm::Local;
//!
//! let config = MoeConfig {
//!     hidden: 4,
//!     intermediate: 4,
//!     top_k: 1,
//!     max_tokens_per_rank: 2,
//!     ..MoeConfig::new(ExpertPlacement::linear(2, 1)?)
//! };
//! let experts = ExpertsCaps::host("mine", vec![WireFormat::unquantized(DType::Bf16)]);
//! let (_plan, built) = maybe_make_prepare_finalize(&[&Local], &config, &experts, &SingleRank)?;
//! let PrepareFinalize::Modular(mut comm) = built else { unreachable!("the experts are modular") };
//!
//! let mut workspace = Workspace::new(DeviceKind::Host, 0)?;
//! let mut cx = ExecCx { stream: Stream::Host, workspace: workspace.arena() };
//! let tokens = [1.0, 2.0, 3.0, 4.0].map(bf16::from_f32);
//! let hidden = TensorView::from_slice(&tokens, DType::Bf16, &[1, 4])?;
//! let topk = TopK {
//!     ids: TensorView::from_slice(&[1], DType::I32, &[1, 1])?,
//!     weights: TensorView::from_slice(&[1.0f32], DType::F32, &[1, 1])?,
//! };
//! let (dispatched, routed) = comm.prepare(&mut cx, PrepareInput { hidden, topk, input_scale: None, fault: None })?;
//! // Experts that hand back what they get.
//! let mut output = dispatched.output.expect("the plan says in place");
//! output.row_mut::<bf16>(0)?.copy_from_slice(dispatched.hidden.row(0)?);
//!
//! let mut sums = [f32::NAN; 4];
//! let out = TensorViewMut::from_slice(&mut sums, DType::F32, &[1, 4])?;
//! comm.finalize(&mut cx, routed, ExpertOut::InPlace, out)?;
//! assert_eq!(sums, [1.0, 2.0, 3.0, 4.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: it sends every token to every rank, wherever its experts are (`mori-comm` sends one
//! copy per rank that needs it); it has no hidden states but bf16, between GPUs it moves nothing, and it has no batched
//! activations.

mod provider;

mod handle;

mod all_gather;
mod device;
mod exchange;
mod local;

mod row;
mod sum;

pub use device::DeviceLocal;
pub use provider::{AllGatherReduceScatter, Local, Naive};
