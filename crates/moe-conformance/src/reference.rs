//! Backends that are right because they are simple: the other half when one half is tested, and what the
//! saboteurs break. Slow on purpose; not for use in a program.

mod batched_comm;
mod batched_experts;
mod comm;
mod compute;
mod experts;
mod message;
mod monolithic_experts;
mod received;
mod slip;
mod weights;

pub use batched_comm::BatchedComm;
pub use batched_experts::BatchedExperts;
pub use comm::ReferenceComm;
pub(crate) use comm::{CombineIds, ReferenceHandle};
pub use experts::ReferenceExperts;
pub(crate) use experts::{ReferenceKernel, local_table};
pub use monolithic_experts::MonolithicExperts;
pub use slip::Slip;
pub(crate) use weights::{Format, PackedExperts};
