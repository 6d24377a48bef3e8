//! Expert-parallel load balancing (EPLB): replicas of busy experts, chosen from the load that was recorded.
//!
//! The slots of a group are fixed: [`MoeConfig::placement`](fused_moe_core::MoeConfig::placement) says which rank has
//! which *physical* expert, [`redundant_experts`](fused_moe_core::MoeConfig::redundant_experts) how many more of
//! them there are than *logical* ones. Comm and experts backends know physical experts alone. What a layer adds
//! is a [`ReplicaTable`] between router and call:
//!
//! ```text
//! router ─▶ logical ids ─▶ ReplicaTable::map ─▶ physical ids ─▶ LoadRecorder::record ─▶ FusedMoEKernel::apply
//! ```
//!
//! From time to time, [`sum_over_ranks`] adds up what the ranks have recorded, [`propose`] makes a table of it, the
//! same on every rank, each rank packs the weights for its slots while calls go on, and
//! [`BalancedLayer::rebalance`] puts both in use between two calls.
//!
//! What it does not do: it moves no weights between ranks (an engine reads them from the checkpoint, only those of
//! [`ReplicaTable::changed_slots`]), and it does not decide when to rebalance.

mod balance;
mod layer;
mod load;
mod pack;
mod propose;
mod table;

pub use balance::Balance;
pub use layer::{BalancedLayer, PlacedWeights, RebalanceError, RefusedRebalance};
pub use load::{LoadError, LoadRecorder, LoadShape, sum_over_ranks};
pub use propose::{Demand, Fallback, Method, Proposal, ProposalError, Strategy, propose};
pub use table::{MapError, ReplicaTable, TableError};
