//! Stage 1 of the fused-moe pipeline on the host: hidden states to router logits, router logits to the top-k
//! experts of every token.
//!
//! [`gate_logits`] multiplies hidden states with the gate's weight; [`HostRouter`] chooses the experts by any of
//! the [`RoutingMethod`](fused_moe_core::RoutingMethod)s of the core, or takes them from a [`HashTable`], and
//! appends [`SharedSlots`]; [`shared_expert_gate`] is the factor that Qwen2-MoE puts on its shared expert.
//! [`simulate`] makes top-k rows without a model, [`eplb`] spreads replicas of busy experts over the ranks,
//! [`survivors`] goes on where a rank is lost.
//!
//! ```
//! use fused_moe_core::{
//!     Arena, DType, ExecCx, Router, RoutingConfig, RoutingMethod, Stream, TensorView, TensorViewMut, TopKMut,
//! };
//! use router::HostRouter;
//!
//! let router = HostRouter::new(RoutingConfig {
//!     method: RoutingMethod::RenormalizeNaive,
//!     num_experts: 4,
//!     top_k: 2,
//!     groups: None,
//!     renormalize: true,
//!     routed_scaling_factor: 1.0,
//!     correction_bias: None,
//! })?;
//! let logits = [0.0f32, 3.0, 1.0, 3.0];
//! let (mut ids, mut weights) = ([0i32; 2], [0f32; 2]);
//! let out = TopKMut {
//!     ids: TensorViewMut::from_slice(&mut ids, DType::I32, &[1, 2])?,
//!     weights: TensorViewMut::from_slice(&mut weights, DType::F32, &[1, 2])?,
//! };
//! let workspace = Arena::new(TensorViewMut::from_slice(&mut [0u8; 0], DType::U8, &[0])?);
//! let mut cx = ExecCx { stream: Stream::Host, workspace };
//! router.route(&mut cx, TensorView::from_slice(&logits, DType::F32, &[1, 4])?, out)?;
//! assert_eq!((ids, weights), ([1, 3], [0.5, 0.5]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: a router knows logical experts alone (replicas come after it), splits no work over threads
//! (every rank routes its own tokens), and allocates nothing in a call for up to 1024 experts.

mod best;
mod config;
mod elementary;
pub mod eplb;
mod gate;
mod host;
mod recipe;
mod score;
pub mod simulate;
mod slots;
pub mod survivors;

pub use config::RoutingError;
pub use gate::{add_gate_bias, gate_logits, shared_expert_gate};
pub use host::HostRouter;
pub use recipe::{Division, Grouping, Recipe, Score};
pub use slots::{HashTable, SharedSlots};
